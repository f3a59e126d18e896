"""Messages of errors: the operation, the argument, the items of the batch, and a remedy that exists."""

import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
from public_names import PUBLIC

import ddnref
from ddnref import curvature, krylov, nodes, operators, testing
from ddnref._core.arrays import among


def message(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


# --- items of the batch -------------------------------------------------------------------------------------------


def test_items_are_named(xp):
    def named(flags):
        return among(xp.asarray(np.asarray(flags)))

    assert named(True) == named([]) == named([False, False]) == ""
    assert named([False, True, False]) == " (item 1 of 3)"
    assert named([[False, True], [True, True]]) == " (items (0, 1), (1, 0), (1, 1) of 2 x 2)"
    assert named([True] * 7) == " (items 0, 1, 2, 3, 4, ..., 7 in all, of 7)"


IDENTITIES = np.stack([np.eye(3)] * 4)
REPEATED = np.stack([np.diag([1.0, 2.0, 3.0]), np.eye(3), np.diag([3.0, 1.0, 2.0]), np.eye(3)])


def second_is_nan(x):
    x = np.array(x)
    x[1, 0] = np.nan
    return x


def of_first_eigenvector(x):
    w, v = ddnref.eigh(x)
    return ddnref.eigh_vjp(None, np.ones((3, 3)) + 0 * v + np.arange(3.0) ** 2, w, v)


def of_first_eigsh(x):
    (w, v), _ = ddnref.eigsh(x, 1, throw=False)
    return ddnref.eigsh_vjp(None, np.ones((3, 1)) + 0 * v, w, v, x)


def of_pairs_of_factors():
    factor = np.stack([np.eye(3), np.ones((3, 3)), np.eye(3), np.ones((3, 3))])
    return curvature.gram_eigh(factor, k=2)


ITEMS = {
    "eigh, not finite": (lambda: ddnref.eigh(second_is_nan(IDENTITIES), check_finite=True), "item 1 of 4"),
    "eigh, gauge": (lambda: of_first_eigenvector(REPEATED), "items 1, 3 of 4"),
    "eigsh, cut": (lambda: ddnref.eigsh(REPEATED, 1), "items 1, 3 of 4"),
    "eigsh_vjp": (lambda: of_first_eigsh(REPEATED), "items 1, 3 of 4"),
    "power_iteration, not finite": (lambda: ddnref.power_iteration(second_is_nan(REPEATED)), "item 1 of 4"),
    "power_iteration": (
        lambda: ddnref.power_iteration(np.stack([np.diag([1.0, z, 0.0]) for z in (-1.0, 0.0, -1.0, 0.0)])),
        "items 0, 2 of 4",
    ),
    "project_sphere": (lambda: nodes.project_sphere(np.asarray([[1.0, 2.0], [0.0, 0.0]])), "item 1 of 2"),
    "robust_pool": (lambda: nodes.robust_pool(second_is_nan(np.ones((4, 3)))), "item 1 of 4"),
    "gram_eigh": (of_pairs_of_factors, "items 1, 3 of 4"),
    "cg": (
        lambda: krylov.cg(operators.dense(REPEATED, positive_definite=True), np.ones((4, 3)), maxiter=1),
        "items 0, 2 of 4",
    ),
}


@pytest.mark.parametrize("case", ITEMS)
def test_the_items_that_fail_are_named(case):
    call, says = ITEMS[case]
    assert f"({says})" in message(ddnref.DdnrefError, call)


# --- what a matrix function says -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda: ddnref.expm(np.diag([709.5, 0.0])), "above 709, or 88 in single precision, whose exponential"),
        (lambda: ddnref.expm(np.diag([88.9, 0.0]).astype(np.float32)), "overflows"),
        (lambda: ddnref.spectral_function(np.diag([0.0, 1.0]), f=lambda w: 1 / w), "outside the domain of f or df"),
        (lambda: ddnref.logm(np.zeros((2, 2))), "covariance of fewer samples than features"),
        (lambda: ddnref.invsqrtm(np.zeros((2, 2))), "covariance of fewer samples than features"),
    ],
)
def test_a_function_of_a_matrix_says_what_its_own_domain_is(call, cause):
    said = message(ddnref.SingularError, call)
    assert cause in said
    assert ("covariance" in said) == ("covariance" in cause)


# --- objects that are not arrays -------------------------------------------------------------------------------------

SPARSE = scipy.sparse.eye_array(3).tocsr()


@pytest.mark.parametrize(
    "call",
    [
        lambda a: ddnref.eigsh(a, 1),
        ddnref.eigh,
        lambda a: ddnref.solve(a, np.ones(3)),
        lambda a: ddnref.linear_solve(a, np.ones(3)),
        lambda a: krylov.cg(a, np.ones(3)),
        curvature.gram_eigvalsh,
        lambda a: nodes.project_ball(a),
    ],
)
@pytest.mark.parametrize("wrap", [lambda a: a, scipy.sparse.linalg.aslinearoperator], ids=["sparse", "operator"])
def test_sparse_matrices_are_sent_to_from_scipy(call, wrap):
    assert "ddnref.operators.from_scipy" in message(TypeError, lambda: call(wrap(SPARSE)))


def test_operators_are_sent_to_what_takes_them():
    said = message(TypeError, lambda: ddnref.eigh(operators.dense(np.eye(3))))
    assert "x is a ddnref.LinearOperator" in said
    assert "ddnref.eigsh, ddnref.linear_solve" in said


def test_paths_in_messages_exist():
    """The advice for tensors that PyTorch would record names the operation as users import it."""
    from ddnref._core.arrays import public_path
    from ddnref._rules.table import RULES

    for name, rule in RULES.items():
        subject, _, found = public_path(name).rpartition(".")
        assert getattr(sys.modules[subject], found) is PUBLIC[name]
        assert subject == "ddnref" or rule.function.__module__.startswith(subject)


# --- the checker of a user's VJP --------------------------------------------------------------------------------------


def product(a, b):
    return a * b


CHECKED = {
    "no needs": (TypeError, np.sin, lambda y_bar, y, x: y_bar * np.cos(x), (), r"'x'.*here needs=\(0,\)"),
    "no needs of two": (TypeError, product, lambda y_bar, y, a, b: (b, a), (), r"here needs=\(0, 1\)"),
    "too many needs": (TypeError, np.sin, lambda y_bar, y: y_bar, (0,), r"does not take 3 arguments.*1 input\(s\)"),
    "too few saved": (TypeError, np.sin, lambda y_bar, y, s, t, x: y_bar, (0,), r"0 saved array\(s\)"),
    "None": (TypeError, np.sin, lambda y_bar, y: None, (), r"returned None for inputs\[0\].*zeros"),
    "None for the second": (TypeError, product, lambda y_bar, y: (y_bar, None), (), r"None for inputs\[1\]"),
    "a list": (TypeError, np.sin, lambda y_bar, y: [y_bar], (), r"the cotangent of inputs\[0\] is a builtins\.list"),
    "a number": (TypeError, np.sin, lambda y_bar, y: 1.0, (), r"the cotangent of inputs\[0\] is a builtins\.float"),
    "single precision": (TypeError, np.sin, lambda y_bar, y: np.float32(y_bar), (), r"dtype float32 for inputs\[0\]"),
    "complex": (TypeError, np.sin, lambda y_bar, y: y_bar + 0j, (), r"dtype complex128 for inputs\[0\]"),
    "one of two": (ValueError, product, lambda y_bar, y: y_bar, (), r"returned shapes \[\(3,\)\] for inputs of shapes"),
    "another shape": (ValueError, np.sin, lambda y_bar, y: y_bar[:2], (), r"returned shapes \[\(2,\)\]"),
    "f returns None": (TypeError, lambda x: None, lambda y_bar, y: y_bar, (), "f returned a NoneType"),
    "f returns a list": (TypeError, lambda x: [x, x], lambda y_bar, y: y_bar, (), "f returned a list"),
    "one result is a number": (TypeError, lambda x: (x, 1.0), lambda *a: a[0], (), "result 1 of f is a float"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKED)
@pytest.mark.parametrize("check", [testing.check_vjp, testing.assert_vjp])
def test_the_checker_says_what_is_wrong_with_the_functions(case, check):
    error, f, f_vjp, needs, says = CHECKED[case]
    inputs = [np.ones(3)] * (2 if f is product else 1)
    assert re.search(says, message(error, lambda: check(f, f_vjp, *inputs, needs=needs)))


def test_the_checker_takes_functions_without_a_signature_or_with_any_number_of_arguments():
    assert testing.check_vjp(np.exp, np.multiply, np.linspace(0.0, 1.0, 3)).passed
    assert testing.check_vjp(np.exp, lambda *a, scale=1.0: scale * a[0] * a[1], np.linspace(0.0, 1.0, 3)).passed


# --- warnings -----------------------------------------------------------------------------------------------------

QUIET = """
import warnings
import jax.numpy as jnp
import ddnref
from ddnref import nodes
from ddnref.curvature.ggn._options import rows
from ddnref.curvature.hessian._joint import count_below
x = jnp.asarray([[3.0, 1.0, 0.5], [1.0, 2.0, 0.0]])
with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert nodes.robust_pool(x)[0].shape == (2,)
    assert nodes.project_sphere(x, norm=float("inf"), radius=2.0).shape == (2, 3)
    assert rows(x, [1]).shape == (1, 3)
    assert count_below(x[0, :], 2.0) == 2
"""


@pytest.mark.framework("jax")
def test_jax_in_its_default_single_precision_warns_of_nothing():
    """It warns where 64-bit integers are asked for."""
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
