"""`check_operator` finds each fault, and says which it is."""

import numpy as np
import pytest
from operator_cases import case

import ddnref
from ddnref import operators

CLEAN = {"shape of apply", "shape of adjoint", "dtype of apply", "adjoint", "params_vjp[0]", "pure functions"}


def sound(is_complex=True):
    """``y = d ∘ (x − x shifted)``, written by hand, with two parameters."""
    rng = np.random.default_rng(1)
    d = rng.uniform(1, 2, 6) + (1j * rng.standard_normal(6) if is_complex else 0)

    def apply(params, x):
        return params[1] * params[0] * (x - np.roll(x, 1, axis=-1))

    def adjoint(params, y):
        z = np.conj(params[1] * params[0]) * y
        return z - np.roll(z, -1, axis=-1)

    def params_vjp(params, y_bar, x):
        z = x - np.roll(x, 1, axis=-1)
        d_bar = y_bar * np.conj(params[1] * z)
        c_bar = np.sum(y_bar * np.conj(params[0] * z))
        return np.sum(d_bar, axis=tuple(range(d_bar.ndim - 1))), np.asarray(c_bar.real)

    return operators.LinearOperator((d, np.asarray(1.5)), apply, adjoint, params_vjp, (6,), (6,))


def failures(operator, x=None, **options):
    report = operators.check_operator(operator, x, throw=False, **options)
    assert report.passed == all(check.passed for check in report.checks)
    failed = [check for check in report.checks if not check.passed]
    assert all(check.message for check in failed)
    if failed:
        with pytest.raises(ddnref.OperatorError, match="not what it says") as raised:
            operators.check_operator(operator, x, **options)
        assert all(check.name in str(raised.value) for check in failed)
    return {check.name for check in failed}


def test_a_sound_operator_passes():
    report = operators.check_operator(sound())
    assert report.passed
    assert {check.name for check in report.checks} >= CLEAN
    assert "passed" in str(report)
    assert failures(sound(False), np.zeros((3, 2, 6))) == set()


def wrap(operator, **changes):
    """The operator with its functions replaced by functions of the old ones."""
    return operator._replace(**{name: change(getattr(operator, name)) for name, change in changes.items()})


MUTANTS = [
    ("the adjoint is not one", {"adjoint": lambda f: lambda p, y: -f(p, y)}, {"adjoint"}),
    ("no conjugate", {"adjoint": lambda f: lambda p, y: f((np.conj(p[0]), p[1]), y)}, {"adjoint"}),
    ("the adjoint off by 1e-9", {"adjoint": lambda f: lambda p, y: f(p, y) * (1 + 1e-9)}, {"adjoint"}),
    ("shifted to the wrong side", {"adjoint": lambda f: lambda p, y: np.roll(f(p, y), 1, axis=-1)}, {"adjoint"}),
    ("a constant part", {"apply": lambda f: lambda p, x: f(p, x) + 1e-6}, {"linearity of apply"}),
    ("conjugates", {"apply": lambda f: lambda p, x: f(p, np.conj(x))}, {"linearity of apply"}),
    ("quadratic", {"apply": lambda f: lambda p, x: f(p, x * x)}, {"linearity of apply"}),
    ("NaN", {"apply": lambda f: lambda p, x: f(p, x) * np.nan}, {"linearity of apply"}),
    ("an adjoint with a constant part", {"adjoint": lambda f: lambda p, y: f(p, y) + 1}, {"linearity of adjoint"}),
    ("another range", {"apply": lambda f: lambda p, x: f(p, x)[..., :5]}, {"shape of apply"}),
    ("another domain", {"adjoint": lambda f: lambda p, y: f(p, y)[..., :5]}, {"shape of adjoint"}),
    ("single precision", {"apply": lambda f: lambda p, x: f(p, x).astype(np.complex64)}, {"dtype of apply"}),
    ("real part only", {"adjoint": lambda f: lambda p, y: f(p, y).real}, {"dtype of adjoint"}),
    ("written to its argument", {"apply": lambda f: lambda p, x: f(p, np.multiply(x, 1 + 1e-9, out=x))},
     {"pure functions"}),
    ("a gradient twice as large", {"params_vjp": lambda f: lambda p, y, x: (2 * f(p, y, x)[0], f(p, y, x)[1])},
     {"params_vjp[0]"}),
    ("a gradient off by 1e-6", {"params_vjp": lambda f: lambda p, y, x: (f(p, y, x)[0], f(p, y, x)[1] * (1 + 1e-6))},
     {"params_vjp[1]"}),
    ("a gradient without its conjugate",
     {"params_vjp": lambda f: lambda p, y, x: (np.conj(f(p, y, x)[0]), f(p, y, x)[1])}, {"params_vjp[0]"}),
    ("one gradient missing", {"params_vjp": lambda f: lambda p, y, x: f(p, y, x)[:1]}, {"params_vjp"}),
    ("a complex gradient of a real parameter",
     {"params_vjp": lambda f: lambda p, y, x: (f(p, y, x)[0], f(p, y, x)[1] + 0j)}, {"params_vjp[1]"}),
    ("no sum over right-hand sides",
     {"params_vjp": lambda f: lambda p, y, x: (y * np.conj(p[1] * (x - np.roll(x, 1, axis=-1))), f(p, y, x)[1])},
     {"batch of params_vjp[0]"}),
    ("right-hand sides mixed", {"apply": lambda f: lambda p, x: np.flip(f(p, x), 0) if x.ndim > 1 else f(p, x)},
     {"batch of apply"}),
    ("right-hand sides of the adjoint mixed",
     {"adjoint": lambda f: lambda p, y: np.flip(f(p, y), 0) if y.ndim > 1 else f(p, y)}, {"batch of adjoint"}),
    ("not self-adjoint", {"self_adjoint": lambda flag: True}, {"self_adjoint"}),
    ("positive definite alone", {"positive_definite": lambda flag: True}, {"self_adjoint"}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "names"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_each_fault_is_found_and_named(changes, names):
    assert failures(wrap(sound(), **changes)) == names


@pytest.mark.parametrize("d", [[1.0, 2.0, -1e-3], [1.0, 1.0, 0.0], [-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]])
def test_an_indefinite_operator_is_found(d):
    good = operators.diagonal(np.asarray([1.0, 2.0, 1e-3]), positive_definite=True)
    assert failures(good) == set()
    found = failures(good.with_params(np.asarray(d)))
    assert found == {"positive_definite"}


def test_one_negative_eigenvalue_among_many():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    w = np.linspace(1.0, 2.0, 60)
    w[30] = -0.2
    a = (q * w) @ q.T
    assert failures(operators.dense((a + a.T) / 2, positive_definite=True)) == {"positive_definite"}


def test_wrong_hooks_are_found():
    operator = case("convolution")
    other = operator.with_params(operator.params[0] * (1 + 1e-9))
    assert failures(operator._replace(prepare=lambda p: other)) == {"prepare"}
    assert failures(operator._replace(gram=lambda p, shift: operator.gram(p, None))) == {"gram"}
    assert failures(operator._replace(gram=lambda p, shift: operator.gram(p, 0.75))) == {"gram"}


def test_a_wrong_sparse_matrix_is_found():
    operator = case("coo")
    other = operator.params[0] * (1 + 1e-9)
    assert failures(operator._replace(sparse=lambda p: operator.sparse((other,)))) == {"sparse"}


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("name", ["params_jvp", "adjoint_jvp"])
def test_a_wrong_forward_mode_is_found(name, is_complex):
    operator = case("normal", is_complex=is_complex)
    assert failures(wrap(operator, **{name: lambda f: lambda p, d, x: f(p, d, x) * (1 + 1e-9)})) == {name}
    assert failures(wrap(operator, **{name: lambda f: lambda p, d, x: f(p, (d[0], 0 * d[1]), x)})) == {name}
    if is_complex:
        assert failures(wrap(operator, **{name: lambda f: lambda p, d, x: f(p, (np.conj(d[0]), d[1]), x)})) == {name}


def test_options():
    slightly = wrap(sound(), adjoint=lambda f: lambda p, y: f(p, y) * (1 + 1e-9))
    assert failures(slightly, rtol=1e-8) == set()
    gradient = wrap(sound(), params_vjp=lambda f: lambda p, y, x: (f(p, y, x)[0] * (1 + 1e-6), f(p, y, x)[1]))
    assert failures(gradient, vjp_rtol=1e-5) == set()
    errors = [operators.check_operator(slightly, throw=False, seed=seed).checks[6].error for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]


def test_x_tells_library_dtype_and_batch(xp):
    difference = operators.difference((3, 2))
    with pytest.raises(TypeError, match="there is nothing to compute from"):
        operators.check_operator(difference)
    assert operators.check_operator(difference, xp.asarray(np.zeros((2, 3, 2)))).passed
    with pytest.raises(ValueError, match=r"x has shape \(3, 3\)"):
        operators.check_operator(difference, xp.asarray(np.zeros((3, 3))))


def test_single_precision_is_refused():
    with pytest.raises(TypeError, match="params and x of dtype float64 or complex128, got float32"):
        operators.check_operator(operators.dense(np.ones((2, 2), dtype=np.float32)))
