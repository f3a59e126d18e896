"""Functions of a matrix: values, exact gradients at any degeneracy, and where they are refused."""

import mpmath
import numpy as np
import pytest
from problems import relative, rotation, symmetric, with_spectrum

import ddnref
from ddnref import SingularError

SQUARE = {"f": lambda w: w * w, "df": lambda w: 2 * w}
TRIPLE = np.asarray([0.2, 0.7, 0.7, 0.7, 1.1, 2.0])
NAMED = {
    "sqrtm": (mpmath.sqrt, lambda x: 1 / (2 * mpmath.sqrt(x))),
    "invsqrtm": (lambda x: 1 / mpmath.sqrt(x), lambda x: -1 / (2 * x * mpmath.sqrt(x))),
    "logm": (mpmath.log, lambda x: 1 / x),
    "expm": (mpmath.exp, mpmath.exp),
}


def exact_gradient(q, w, c, f, df):
    """Daleckii–Krein in 60 digits, from known eigenvectors and eigenvalues."""
    with mpmath.workdps(60):
        w = [mpmath.mpf(float(a)) for a in w]
        phi = [[df(a) if a == b else (f(a) - f(b)) / (a - b) for b in w] for a in w]
    return q @ (np.asarray(phi, dtype=float) * (q.T @ ((c + c.T) / 2) @ q)) @ q.T


def gradient(name, x, c, xp, **options):
    y, saved = getattr(ddnref, f"{name}_fwd")(xp.asarray(x), **{k: v for k, v in options.items() if k == "f"})
    return xp.numpy(getattr(ddnref, f"{name}_vjp")(xp.asarray(c), y, *saved, **options))


@pytest.mark.parametrize("name", NAMED)
def test_values(name, xp, rng):
    q = rotation(rng, 6)
    expected = with_spectrum(q, [float(NAMED[name][0](w)) for w in TRIPLE])
    assert relative(xp.numpy(getattr(ddnref, name)(xp.asarray(with_spectrum(q, TRIPLE)))), expected) <= 1e-14


def test_functions_are_inverse_to_each_other(xp, rng):
    x = with_spectrum(rotation(rng, 5, (3,)), rng.uniform(0.5, 2, (3, 5)))
    y = ddnref.sqrtm(xp.asarray(x))
    assert relative(xp.numpy(y @ y), x) <= 1e-14
    assert relative(xp.numpy(ddnref.expm(ddnref.logm(xp.asarray(x)))), x) <= 1e-14
    whitened = xp.numpy(ddnref.invsqrtm(xp.asarray(x)))
    assert relative(whitened @ x @ whitened, np.broadcast_to(np.eye(5), x.shape)) <= 1e-14


def test_trace_of_c_x_squared_on_triple_eigenvalues_and_on_the_identity(xp, rng):
    """The loss that masked eigenvectors get wrong: exact here, 200 matrices and the identity."""
    x = np.concatenate([with_spectrum(rotation(rng, 6, (200,)), TRIPLE), np.eye(6)[None]])
    c = symmetric(rng, 6, (201,))
    x_bar = gradient("spectral_function", x, c, xp, **SQUARE)
    exact = c @ x + x @ c
    assert max(relative(x_bar[i], exact[i]) for i in range(201)) <= 1e-12


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0])
def test_named_functions_are_accurate_at_every_gap(name, gap, rng):
    q, w = rotation(rng, 4), np.asarray([0.5, 0.9, 0.9 + gap, 3.0])
    c = rng.standard_normal((4, 4))
    f, df = NAMED[name]
    assert relative(gradient_of_known(name, q, w, c), exact_gradient(q, w, c, f, df)) <= 2e-14


def gradient_of_known(name, q, w, c, **options):
    """The VJP at eigenpairs given exactly, so that only its own error is seen."""
    y = np.zeros_like(q)
    return getattr(ddnref, f"{name}_vjp")(c, y, w, q, **options)


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_any_function_is_accurate_at_every_gap(gap, scale, rng):
    """Worst case eps^(2/3) between the quotient and the mean of df, at any scale of the spectrum."""
    q, w = rotation(rng, 4), scale * np.asarray([0.5, 0.9, 0.9 + gap, 3.0])
    c = rng.standard_normal((4, 4))
    exact = exact_gradient(q, w, c, lambda x: mpmath.sin(x / scale), lambda x: mpmath.cos(x / scale) / scale)
    options = {"f": lambda w: np.sin(w / scale), "df": lambda w: np.cos(w / scale) / scale}
    assert relative(gradient_of_known("spectral_function", q, w, c, **options), exact) <= 2e-10


@pytest.mark.parametrize("name", ["sqrtm", "invsqrtm", "logm"])
def test_indefinite_and_singular_matrices_are_refused(name, xp, rng):
    x = xp.asarray(with_spectrum(rotation(rng, 3, (2,)), [[1.0, 2.0, 3.0], [-1.0, 1.0, 2.0]]))
    with pytest.raises(SingularError, match=rf"{name} is not finite at an eigenvalue.*Add a ridge.*throw=False"):
        getattr(ddnref, name)(x)
    y = xp.numpy(xp.jit(lambda x: getattr(ddnref, name)(x, throw=False))(x))
    assert np.all(np.isfinite(y[0]))
    assert not np.any(np.isfinite(y[1]))


def test_square_root_of_a_singular_matrix_has_a_value_and_no_gradient(xp, rng):
    q, w = rotation(rng, 4), [0.0, 0.0, 1.0, 4.0]
    y, saved = ddnref.sqrtm_fwd(xp.asarray(with_spectrum(q, w)))
    np.testing.assert_allclose(xp.numpy(y), with_spectrum(q, np.sqrt(w)), atol=1e-7)
    with pytest.raises(SingularError, match="The derivative of sqrtm is not finite"):
        ddnref.sqrtm_vjp(y, y, xp.asarray(np.asarray(w)), saved[1])


def test_overflowing_exponential_is_refused(xp):
    x = xp.asarray(np.diag([1.0, 800.0]))
    with pytest.raises(SingularError, match="expm is not finite"):
        ddnref.expm(x)
    y, saved = ddnref.expm_fwd(xp.asarray(np.diag([-2000.0, 1.0])))
    x_bar = xp.numpy(ddnref.expm_vjp(xp.asarray(np.ones((2, 2))), y, *saved))
    np.testing.assert_allclose(x_bar, [[0.0, np.e / 2001], [np.e / 2001, np.e]], rtol=1e-14)


def test_what_f_returns_is_checked():
    with pytest.raises(ValueError, match=r"f\(w\) has shape \(\), expected \(2,\)"):
        ddnref.spectral_function(np.eye(2), f=np.sum)
    with pytest.raises(TypeError, match=r"f\(w\) has dtype complex128"):
        ddnref.spectral_function(np.eye(2), f=lambda w: w + 0j)


def test_static_errors(rng):
    with pytest.raises(ValueError, match="x has shape"):
        ddnref.sqrtm(np.ones((2, 3)))
    y, (w, v) = ddnref.sqrtm_fwd(np.eye(2))
    with pytest.raises(ValueError, match=r"y_bar has shape \(3, 3\), expected \(2, 2\)"):
        ddnref.sqrtm_vjp(np.eye(3), y, w, v)
    with pytest.raises(TypeError, match="y_bar has dtype float32"):
        ddnref.sqrtm_vjp(np.eye(2, dtype=np.float32), y, w, v)


@pytest.mark.parametrize("name", NAMED)
def test_host_reads(name, host_reads, rng):
    from conftest import backend

    strict = backend("array-api-strict")
    x = strict.asarray(with_spectrum(rotation(rng, 4), [0.5, 1.0, 1.0, 2.0]))
    host_reads.clear()
    y, saved = getattr(ddnref, f"{name}_fwd")(x, throw=False)
    getattr(ddnref, f"{name}_vjp")(y, y, *saved, throw=False)
    assert host_reads == []
    getattr(ddnref, f"{name}_fwd")(x)
    getattr(ddnref, f"{name}_vjp")(y, y, *saved)
    assert host_reads == ["__bool__", "__bool__"]
