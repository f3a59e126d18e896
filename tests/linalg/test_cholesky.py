"""Cholesky factors: which item has none and why, gradients of ill-conditioned ones, what the textbook form gives."""

from functools import partial

import numpy as np
import pytest
from problems import adjoint, relative, rotation, with_spectrum

import ddnref
from conftest import backend
from ddnref.reference import cholesky_vjp_unrolled
from ddnref.testing import assert_jvp, assert_transpose, assert_vjp


def definite(rng, m, batch=(), is_complex=False, condition=4.0):
    return with_spectrum(rotation(rng, m, batch, is_complex), np.geomspace(1, 1 / condition, m))


def normal(rng, shape, is_complex):
    z = rng.standard_normal((2, *shape))
    return z[0] + 1j * z[1] if is_complex else z[0]


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 4, 4), (2, 0, 3, 3), (0, 0), (2, 0, 0)])
def test_factor(shape, is_complex, xp, rng):
    a = definite(rng, shape[-1], shape[:-2], is_complex)
    l_ = xp.lift(ddnref.cholesky)(a) if xp.name != "jax" else xp.numpy(ddnref.cholesky(xp.asarray(a)))
    assert l_.shape == shape
    assert l_.dtype == a.dtype
    np.testing.assert_allclose(l_ @ adjoint(l_), a, atol=1e-14)
    assert np.all(np.triu(l_, 1) == 0)
    diagonal = np.einsum("...ii->...i", l_)
    assert np.all(diagonal.imag == 0)
    assert np.all(diagonal.real > 0)


@pytest.mark.parametrize("is_complex", [False, True])
def test_derivatives(is_complex, rng):
    a = definite(rng, 6, (2,), is_complex)
    given = {"saves": False, "needs": (), "tangent": "symmetric", "symmetrises": True}
    report = assert_vjp(ddnref.cholesky, ddnref.cholesky_vjp, a, gap=0.2, **given)
    assert report.error <= 1e-9
    assert_jvp(ddnref.cholesky, ddnref.cholesky_jvp, a, gap=0.2, rtol=1e-9, **given)
    assert_transpose(ddnref.cholesky, ddnref.cholesky_jvp, ddnref.cholesky_vjp, a, rtol=1e-12, **given)


def test_the_gradient_is_that_of_the_reversed_algorithm(xp, rng):
    l_ = np.linalg.cholesky(definite(rng, 20))
    l_bar = rng.standard_normal((20, 20))
    a_bar = xp.lift(partial(ddnref.cholesky_vjp, throw=False))(l_bar, l_)
    assert np.array_equal(a_bar, adjoint(a_bar))
    assert relative(a_bar, cholesky_vjp_unrolled(l_bar, l_)) <= 1e-13
    # What is above the diagonal of factor and cotangent counts for nothing.
    junk = np.triu(rng.standard_normal((20, 20)), 1)
    assert np.array_equal(xp.lift(partial(ddnref.cholesky_vjp, throw=False))(l_bar + junk, l_), a_bar)


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12])
def test_ill_conditioned_ones_against_fifty_digits(condition, rng):
    """The factor is as accurate as the matrix allows, and so is the gradient: the error is about eps κ."""
    import mpmath

    m = 6
    a, l_bar = definite(rng, m, condition=condition), np.tril(rng.standard_normal((m, m)))
    with mpmath.workdps(50):
        l_exact = mpmath.cholesky(mpmath.matrix(a.tolist()))
        inverse = l_exact**-1
        product = l_exact.T * mpmath.matrix(l_bar.tolist())
        for i in range(m):
            for j in range(m):
                product[i, j] = 0 if j > i else product[i, j] / 2 if i == j else product[i, j]
        exact = inverse.T * (product + product.T) / 2 * inverse
        factor, exact = (np.asarray(x.tolist(), dtype=float) for x in (l_exact, exact))
    unit = np.finfo(float).eps * condition
    l_ = ddnref.cholesky(a)
    assert relative(l_, factor) <= 4 * unit
    assert relative(ddnref.cholesky_vjp(l_bar, l_), exact) <= 4 * unit
    assert relative(ddnref.cholesky_vjp(l_bar, factor), exact) <= 4 * np.finfo(float).eps * condition**0.5


@pytest.mark.parametrize("is_complex", [False, True])
def test_single_precision(is_complex, xp, rng):
    a = definite(rng, 8, (3,), is_complex)
    a_dot, l_bar = (normal(rng, a.shape, is_complex) for _ in range(2))
    kind = np.complex64 if is_complex else np.float32
    l_ = ddnref.cholesky(a)
    exact = l_, ddnref.cholesky_vjp(l_bar, l_), ddnref.cholesky_jvp(a_dot, l_)
    a, a_dot, l_bar = (xp.asarray(x.astype(kind)) for x in (a, a_dot, l_bar))
    l_ = ddnref.cholesky(a)
    found = l_, ddnref.cholesky_vjp(l_bar, l_), ddnref.cholesky_jvp(a_dot, l_)
    for ours, wanted in zip(found, exact, strict=True):
        assert xp.numpy(ours).dtype == kind
        assert 0 < relative(xp.numpy(ours), wanted) <= 1e-5


def test_an_item_that_is_not_definite_raises_or_is_nan_alone(xp, rng):
    a = definite(rng, 4, (5,))
    a[1] = np.diag([1.0, 2.0, -3.0, 1.0])
    a[2, 0, 0] = np.nan
    a[3] = 0
    given = xp.asarray(a)
    says = (
        r"2 of 5 matrices \(items 1, 3\) are not positive definite.*eigenvalues from -3.0e\+00 to 2.0e\+00 in the first"
    )
    with pytest.raises(ddnref.SingularError, match=says):
        ddnref.cholesky(given)
    with pytest.raises(ddnref.SingularError, match=r"The matrix is not positive definite.*-3.0e\+00.*ridge"):
        ddnref.cholesky(given[1, ...])
    l_ = ddnref.cholesky(given, throw=False)
    missing = [False, True, True, True, False]

    def check(array):
        flags = np.isnan(xp.numpy(array).reshape(5, -1))
        assert flags.all(axis=-1).tolist() == flags.any(axis=-1).tolist() == missing

    check(l_)
    assert np.array_equal(xp.numpy(l_)[0], xp.numpy(ddnref.cholesky(given[0, ...])))
    ones = xp.asarray(np.ones((5, 4, 4)))
    with pytest.raises(ddnref.SingularError, match=r"3 of 5 matrices \(items 1, 2, 3\) are not positive definite, or"):
        ddnref.cholesky_vjp(ones, l_)
    with pytest.raises(ddnref.SingularError, match="items 1, 2, 3"):
        ddnref.cholesky_jvp(ones, l_)
    check(ddnref.cholesky_vjp(ones, l_, throw=False))
    check(ddnref.cholesky_jvp(ones, l_, throw=False))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_singular_ones_are_refused_whatever_rounding_makes_of_them(dtype, xp, rng):
    """Covariances of dependent features in any units: the last pivot is rounding, of either sign."""
    count = 40 if xp.name == "numpy" else 4
    z = rng.standard_normal((count, 30, 5))
    z[..., 4] = z[..., :4].sum(axis=-1)
    z = (z * 10.0 ** rng.uniform(-3, 3, 5)).astype(dtype)
    l_ = xp.numpy(ddnref.cholesky(xp.asarray(adjoint(z) @ z), throw=False))
    assert np.all(np.isnan(l_))
    # Regular ones of a large condition, and those whose units differ, are not refused.
    small = 1e-11 if dtype == np.float64 else 1e-4
    a = with_spectrum(rotation(rng, 5, (count,)), np.geomspace(1, small, 5))
    units = np.asarray([1e-9, 1.0, 1e3, 1e9, 1e-3])
    for regular in (a, units[:, None] * definite(rng, 5, (count,)) * units):
        assert np.all(np.isfinite(xp.numpy(ddnref.cholesky(xp.asarray(regular.astype(dtype))))))


def test_the_quick_test_of_numpy_agrees_with_the_criterion(rng):
    """Matrices around the limit are judged alike by the form that looks at every item."""
    from ddnref._kernels import cholesky

    strict = backend("array-api-strict")
    for m in (1, 2, 7, 30):
        exponents = rng.uniform(-18, -12, 30)
        a = np.stack([with_spectrum(rotation(rng, m), np.geomspace(1, 10.0**e, m)) for e in exponents])
        l_, bad = cholesky.cholesky(a)
        _, flags = cholesky.cholesky(strict.asarray(a))
        good = ~(bad | strict.numpy(flags))
        np.testing.assert_allclose(l_[good] @ adjoint(l_[good]), a[good], atol=1e-14)
        clear = (exponents < -16.5) | (exponents > -13.5) | (m == 1)
        assert np.array_equal(bad[clear], strict.numpy(flags)[clear])
        assert np.array_equal(bad[clear], (exponents[clear] < -15) & (m > 1))


def test_static_errors(rng):
    a = definite(rng, 3)
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\), expected \(..., m, m\)"):
        ddnref.cholesky(a[:, :2])
    with pytest.raises(TypeError, match="a has dtype int64"):
        ddnref.cholesky(a.astype(np.int64))
    with pytest.raises(TypeError, match=r"a is a builtins\.list"):
        ddnref.cholesky([[1.0]])
    l_ = ddnref.cholesky(a)
    with pytest.raises(TypeError, match="l_bar has dtype float32, expected float64"):
        ddnref.cholesky_vjp(a.astype(np.float32), l_)
    with pytest.raises(ValueError, match=r"l_bar has shape \(2, 3\), expected \(3, 3\)"):
        ddnref.cholesky_vjp(a[:2], l_)
    with pytest.raises(ValueError, match=r"a_dot has shape \(2, 3, 3\), expected \(3, 3\)"):
        ddnref.cholesky_jvp(np.stack([a, a]), l_)
    with pytest.raises(TypeError, match="a_dot is None"):
        ddnref.cholesky_jvp(None, l_)
    with pytest.raises(TypeError, match="l_bar is None"):
        ddnref.cholesky_vjp(None, l_)


def test_one_flag_is_read(host_reads, rng):
    strict = backend("array-api-strict")
    a = strict.asarray(definite(rng, 3, (2,)))
    l_ = ddnref.cholesky(a, throw=False)
    ddnref.cholesky_vjp(l_, l_, throw=False)
    ddnref.cholesky_jvp(a, l_, throw=False)
    assert host_reads == []
    ddnref.cholesky(a)
    ddnref.cholesky_vjp(l_, l_)
    ddnref.cholesky_jvp(a, l_)
    assert host_reads == ["__bool__"] * 3
