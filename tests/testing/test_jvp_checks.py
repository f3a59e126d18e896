"""The checks of JVPs: they pass what is right, reject what is wrong, and say what they saw."""

import math
from functools import partial

import numpy as np
import pytest
from problems import adjoint, symmetric

import ddnref
from ddnref.testing import assert_jvp, assert_transpose, check_jvp, check_transpose


def scaled_product(a, b):
    """Two outputs of two inputs."""
    return a @ b, 3 * a


def product_jvp(a_dot, b_dot, y, z, a, b, factor=1.0, drops=None, sign=1.0):
    """The right derivative, unless an argument says what is wrong with it."""
    y_dot, z_dot = 0 * y, 0 * z
    if a_dot is not None and drops != 0:
        y_dot, z_dot = y_dot + a_dot @ b, z_dot + 3 * a_dot
    if b_dot is not None and drops != 1:
        y_dot = y_dot + sign * (a @ b_dot)
    return factor * y_dot, factor * z_dot


def product_vjp(y_bar, z_bar, y, z, a, b, factor=1.0):
    return factor * (y_bar @ b.conj().T + 3 * z_bar), factor * (a.conj().T @ y_bar)


def matrices(rng, is_complex=True):
    a, b = rng.standard_normal((2, 3, 3)) + 1j * is_complex * rng.standard_normal((2, 3, 3))
    return (a[:2], b) if is_complex else (a[:2].real, b.real)


WRONG = {
    "sign": {"factor": -1.0},
    "one part in a million": {"factor": 1 + 1e-6},
    "zero": {"factor": 0.0},
    "NaN": {"factor": math.nan},
    "a term is missing": {"drops": 0},
    "the other term is missing": {"drops": 1},
    "sign of one term": {"sign": -1.0},
}


# --- finite differences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_a_right_jvp_passes(shape, xp, rng):
    x = xp.asarray(rng.standard_normal(shape))
    assert assert_jvp(lambda x: x**3, lambda x_dot, y, x: 3 * x**2 * x_dot, x, needs=(0,)).error < 1e-9


@pytest.mark.parametrize("is_complex", [False, True])
def test_several_inputs_move_alone_and_together(is_complex, rng):
    inputs = matrices(rng, is_complex)
    given = []

    def recorded(a_dot, b_dot, *kept):
        given.append((a_dot is None, b_dot is None))
        return product_jvp(a_dot, b_dot, *kept)

    report = check_jvp(scaled_product, recorded, *inputs, needs=(0, 1), directions=2)
    assert report.passed
    assert given == [(False, True)] * 2 + [(True, False)] * 2 + [(False, False)] * 2
    assert [d.name for d in report.directions[::2]] == [f"random 0 of {which}" for which in INPUTS]


INPUTS = ("input 0", "input 1", "all inputs")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_jvp_fails(wrong, rng):
    jvp = partial(product_jvp, **WRONG[wrong])
    with pytest.raises(AssertionError, match=r"The JVP disagrees with finite differences(.|\n)*FAILED"):
        assert_jvp(scaled_product, jvp, *matrices(rng), needs=(0, 1))


def test_a_term_that_is_missing_only_where_all_inputs_move_is_found(rng):
    """A JVP that returns at the first tangent that it sees."""

    def first_only(a_dot, b_dot, *kept):
        return product_jvp(a_dot, None if a_dot is not None else b_dot, *kept)

    report = check_jvp(scaled_product, first_only, *matrices(rng), needs=(0, 1))
    assert {d.name.partition(" of ")[2] for d in report.directions if d.error > 1e-7} == {"all inputs"}


def test_inputs_of_different_size_move_by_their_own_steps(rng):
    """Sizes 1e6 and 1e-6: a common step would leave one of them unmoved, or far outside its scale."""
    a, b = 1e6 * rng.standard_normal(3), 1e-6 * rng.standard_normal(3)

    def jvp(a_dot, b_dot, y):
        return y * ((0 if a_dot is None else 1e-6 * a_dot) + (0 if b_dot is None else 1e6 * b_dot))

    assert check_jvp(lambda a, b: np.exp(1e-6 * a + 1e6 * b), jvp, a, b).passed


def test_conjugates(xp, rng):
    x = xp.asarray(rng.standard_normal(4) + 1j * rng.standard_normal(4))
    conj = xp.namespace.conj
    assert check_jvp(lambda x: x * x, lambda x_dot, y, x: 2 * x * x_dot, x, needs=(0,)).passed
    assert not check_jvp(lambda x: x * x, lambda x_dot, y, x: 2 * conj(x) * x_dot, x, needs=(0,)).passed


def test_a_missing_symmetrisation(rng):
    x = symmetric(rng, 5, is_complex=True)
    f, right, wrong = lambda x: (x + adjoint(x)) / 2, lambda d, y: (d + adjoint(d)) / 2, lambda d, y: d
    assert check_jvp(f, right, x, tangent="symmetric", symmetrises=True).passed
    assert check_jvp(f, wrong, x, tangent="symmetric").passed  # symmetric directions cannot see it
    report = check_jvp(f, wrong, x, tangent="symmetric", symmetrises=True)
    assert report.direction == "non-symmetric"
    assert not report.passed


def eigh_jvp(x_dot, w, v, gauge=0.0):
    """The derivative of simple real eigenpairs, with a part along each eigenvector that depends on the gauge."""
    s = v.T @ ((x_dot + x_dot.T) / 2) @ v
    gap = w - w[:, None] + np.diag(np.full(w.size, math.inf))
    return np.diag(s), v @ (s / gap + gauge * np.eye(w.size))


EIGEN_LOSS = (
    lambda w, v: np.sum(w**2) + v[0, -1] * v[1, -1] / np.sum(v[:, -1] ** 2),
    lambda w, v: (2 * w, eigenvector_gradient(v)),
)


def eigenvector_gradient(v):
    """Gradient of ``v_0 v_1 / ‖v‖²`` for the last eigenvector, orthogonal to that eigenvector."""
    last = v[:, -1]
    out = np.zeros_like(v)
    out[:, -1] = np.eye(last.size)[0] * last[1] + np.eye(last.size)[1] * last[0] - 2 * last[0] * last[1] * last
    return out


def flipping_eigh(x):
    """Eigenvectors whose signs change with every small change of the matrix."""
    w, v = np.linalg.eigh((x + x.T) / 2)
    return w, v * (1 - 2 * (np.floor(1e9 * np.abs(x[0, 0])) % 2))


def test_a_loss_makes_the_comparison_independent_of_the_gauge(rng):
    x = symmetric(rng, 4)
    options = {"tangent": "symmetric", "symmetrises": True, "gap": 0.5}
    assert check_jvp(flipping_eigh, eigh_jvp, x, loss=EIGEN_LOSS, **options).passed
    assert check_jvp(flipping_eigh, partial(eigh_jvp, gauge=1.0), x, loss=EIGEN_LOSS, **options).passed
    assert not check_jvp(flipping_eigh, eigh_jvp, x, **options).passed
    for i, change in ((0, -1), (1, -1), (0, 1 + 1e-6), (1, 1 + 1e-6)):

        def wrong(*args, i=i, change=change):
            return tuple(change * dot if j == i else dot for j, dot in enumerate(eigh_jvp(*args)))

        assert not check_jvp(flipping_eigh, wrong, x, loss=EIGEN_LOSS, **options).passed


def test_a_loss_may_leave_an_output_out(rng):
    x = symmetric(rng, 4)
    loss = (lambda w, v: np.sum(w**2), lambda w, v: (2 * w, None))
    assert check_jvp(flipping_eigh, eigh_jvp, x, loss=loss, gap=0.5).passed
    assert check_transpose(np.linalg.eigh, eigh_jvp, ddnref.eigh_vjp, x, loss=loss, tangent="symmetric").passed


def test_saved_arrays_and_outputs_reach_the_jvp(rng):
    f = lambda x: (np.tanh(x), (1 - np.tanh(x) ** 2,))
    assert check_jvp(f, lambda x_dot, y, slope: slope * x_dot, rng.standard_normal(3), saves=True).passed


def test_stiefel_directions(rng):
    x, c = np.linalg.qr(rng.standard_normal((6, 2)))[0], symmetric(rng, 6)
    jvp = lambda x_dot, y, x: 2 * np.sum(x_dot * (c @ x))
    assert check_jvp(lambda x: np.sum(x * (c @ x)), jvp, x, needs=(0,), tangent="stiefel").passed


def test_order_and_step_are_reported():
    smooth = check_jvp(np.exp, lambda x_dot, y: y * x_dot, np.linspace(-1, 1, 5), step=1e-2)
    assert smooth.order == pytest.approx(2.0, abs=0.01)
    assert smooth.step == 1e-2
    assert check_jvp(np.exp, lambda x_dot, y: y * x_dot, np.ones(4), gap=1e-3).step == pytest.approx(3e-6)


def test_an_output_that_does_not_move_passes(rng):
    x = rng.standard_normal(4)
    assert check_jvp(lambda x: 0 * x + 1, lambda x_dot, y: 0 * x_dot, x).passed
    assert not check_jvp(lambda x: x, lambda x_dot, y: 0 * x_dot, x).passed


def test_nothing_to_check_passes(rng):
    empty, x = np.ones((0, 3)), rng.standard_normal(3)
    assert check_jvp(np.exp, lambda x_dot, y: y * x_dot, empty).passed
    assert check_transpose(np.exp, lambda d, y: y * d, lambda b, y: y * b, empty).passed
    # An input without entries beside one that has some.
    jvp = lambda e_dot, x_dot, y: 0 * y if x_dot is None else x_dot
    assert check_jvp(lambda e, x: x + np.sum(e), jvp, empty, x).passed


def test_the_report_reads_as_a_table():
    text = str(check_jvp(np.exp, lambda x_dot, y: y * x_dot, np.ones(2)))
    assert text.splitlines()[0].split() == ["direction", "numerical", "analytic", "error", "order"]
    assert text.splitlines()[-1].startswith("passed: worst relative error")
    flipped = check_jvp(np.exp, lambda x_dot, y: -y * x_dot, np.ones(2)).directions[0]
    assert flipped.numerical == pytest.approx(-flipped.analytic, rel=1e-8)


# --- the transpose identity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
def test_a_right_pair_passes(is_complex, rng):
    report = assert_transpose(scaled_product, product_jvp, product_vjp, *matrices(rng, is_complex), needs=(0, 1))
    assert report.error < 1e-15
    assert len(report.pairings) == 24
    text = str(report)
    assert text.splitlines()[0].split() == ["direction", "forward", "reverse", "error"]
    assert text.splitlines()[-1].startswith("passed: worst relative error")


@pytest.mark.parametrize("wrong", [*WRONG, "of the other mode"])
def test_a_wrong_pair_fails(wrong, rng):
    options = WRONG.get(wrong, {"factor": 1 + 1e-10})
    jvp, vjp = partial(product_jvp, **options), product_vjp
    if wrong == "of the other mode":
        jvp, vjp = product_jvp, partial(product_vjp, **options)
    with pytest.raises(AssertionError, match=r"The JVP is not the transpose of the VJP(.|\n)*FAILED"):
        assert_transpose(scaled_product, jvp, vjp, *matrices(rng), needs=(0, 1))


def test_transposes_on_every_library(xp, rng):
    x = xp.asarray(rng.standard_normal(5) + 1j * rng.standard_normal(5))
    conj = xp.namespace.conj
    jvp, vjp = lambda d, y, x: 2 * x * d, lambda b, y, x: 2 * conj(x) * b
    assert check_transpose(lambda x: x * x, jvp, vjp, x, needs=(0,)).passed
    assert not check_transpose(lambda x: x * x, jvp, jvp, x, needs=(0,)).passed


def test_transposes_in_single_precision(rng):
    x = rng.standard_normal(100).astype(np.float32)
    jvp = vjp = lambda d, y: y * d
    report = check_transpose(np.exp, jvp, vjp, x)
    assert 1e-12 < report.error < 1e-6
    assert check_transpose(np.exp, jvp, vjp, x, rtol=1e-6).passed


def test_the_transpose_identity_has_no_step_to_choose(rng):
    """A kink of the function, an overflowing scale: only the two linear maps count."""
    x = 1e300 * rng.standard_normal(5)
    sign = lambda d, y, x: np.sign(x) * d
    assert check_transpose(np.abs, sign, sign, x, needs=(0,)).passed


def test_an_inner_product_that_vanishes_is_no_error():
    """The derivative turns by a quarter, so the cotangent of the loss is orthogonal to the tangent along x."""
    turn = np.asarray([[0.0, -1.0], [1.0, 0.0]])
    x = np.asarray([0.6, 0.8])
    along = ddnref.testing.Tangent(lambda x, d: x * np.sum(x * d), lambda x, d: x + d)
    loss = (lambda y: 0.0, lambda y: turn @ y * (1 + 1e-16))
    jvp, vjp = lambda d, y: turn @ d, lambda b, y: turn.T @ b
    report = check_transpose(lambda x: turn @ x, jvp, vjp, x, loss=loss, tangent=along)
    assert report.passed
    assert all(abs(p.forward) < 1e-15 for p in report.pairings)


def test_zero_against_something_is_found(rng):
    x = 1e-20 * rng.standard_normal(5)
    zero, one = lambda d, y: 0 * d, lambda b, y: 1e-20 * b
    assert not check_transpose(lambda x: x, zero, one, x).passed
    assert not check_transpose(lambda x: x, one, zero, x).passed
    assert check_transpose(lambda x: x, zero, zero, x).passed


# --- what is wrong with a user's functions ----------------------------------------------------------------------------

CASES = {
    "no needs": (TypeError, lambda d, y, x: d, r"f_jvp does not take 2 arguments.*1 tangent\(s\).*here needs=\(0,\)"),
    "None": (TypeError, lambda d, y: None, r"f_jvp returned None for outputs\[0\].*shape \(3,\).*zeros"),
    "a list": (TypeError, lambda d, y: [d], r"the tangent of outputs\[0\] is a builtins\.list"),
    "single precision": (TypeError, lambda d, y: np.float32(d), r"f_jvp returned dtype float32 for outputs\[0\]"),
    "complex": (TypeError, lambda d, y: d + 0j, r"dtype complex128 for outputs\[0\]"),
    "two of one": (ValueError, lambda d, y: (d, d), r"returned shapes \[\(3,\), \(3,\)\] for outputs of shapes"),
    "another shape": (ValueError, lambda d, y: d[:2], r"returned shapes \[\(2,\)\]"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_with_a_jvp_is_said(case):
    error, jvp, says = CASES[case]
    with pytest.raises(error, match=says):
        check_jvp(np.sin, jvp, np.ones(3))
    with pytest.raises(error, match=says):
        check_transpose(np.sin, jvp, lambda b, y: b, np.ones(3))


def test_static_errors():
    jvp = lambda d, y: d
    with pytest.raises(TypeError, match="dtype float32: finite differences need float64"):
        check_jvp(np.exp, jvp, np.ones(2, np.float32))
    with pytest.raises(ValueError, match="tangent is 'sphere'"):
        check_jvp(np.exp, jvp, np.ones(2), tangent="sphere")
    with pytest.raises(TypeError, match="f returned a list"):
        check_jvp(lambda x: [x], jvp, np.ones(2))
    with pytest.raises(ValueError, match=r"f_vjp returned shapes \[\(1,\)\] for inputs"):
        check_transpose(lambda x: x, jvp, lambda b, y: b[:1], np.ones(2))
    with pytest.raises(TypeError, match=r"inputs\[0\]"):
        check_transpose(lambda x: x, jvp, jvp, np.ones(2, np.int64))
    with pytest.raises(TypeError, match=r"f_vjp does not take 2 arguments .*1 cotangent\(s\)"):
        check_transpose(lambda x: x, jvp, lambda b, y, x: b, np.ones(2))
