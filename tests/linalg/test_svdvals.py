"""Singular values: small ones, equal ones, zero ones."""

from functools import partial

import numpy as np
import pytest
from problems import adjoint, relative, with_singular

import ddnref
from ddnref.testing import assert_vjp, numerical_jvp


def of_shape(rng, m, n, is_complex):
    """Two matrices of any shape whose singular values are 0.3 apart."""
    a = with_singular(rng, max(m, n), 1 + 0.3 * np.arange(min(m, n)), (2,), is_complex)
    return a if m >= n else adjoint(a)


def exact(a):
    """Singular values and the gradient of their sum, with forty digits."""
    import mpmath

    with mpmath.workdps(40):
        u, s, v = mpmath.svd_r(mpmath.matrix(a.astype(float).tolist()), full_matrices=False)
        return np.asarray([float(x) for x in s]), np.asarray((u * v).tolist(), dtype=float)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("small", [1e-4, 1e-9])
def test_small_values_and_their_gradient_are_exact(small, dtype, xp, rng):
    """Check the smallest value, which has no digit in a Gram matrix of the same precision."""
    a = with_singular(rng, 12, [1.0, 0.5, small]).astype(dtype)
    s_exact, polar = exact(a)
    s, saved = xp.lift(ddnref.svdvals_fwd)(a)
    unit = np.finfo(np.float64).eps / s_exact[-1]
    assert np.all(np.abs(s - s_exact) <= (8 * unit + np.finfo(dtype).eps) * s_exact)
    assert s.dtype == dtype
    assert np.all(np.abs(xp.lift(ddnref.svdvals)(a) - s_exact) <= (8 * unit + np.finfo(dtype).eps) * s_exact)
    vjp = xp.lift(partial(ddnref.svdvals_vjp, throw=False))
    assert relative(vjp(np.ones(3, dtype), s, *saved), polar) <= 8 * unit + 4 * np.finfo(dtype).eps


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), [(7, 3), (4, 4), (5, 1), (3, 6)])
def test_gradient(m, n, is_complex, rng):
    a = of_shape(rng, m, n, is_complex)
    report = assert_vjp(ddnref.svdvals_fwd, ddnref.svdvals_vjp, a, saves=True, needs=(), gap=0.3)
    assert report.error <= 1e-9
    s, (u, s_all, w) = ddnref.svdvals_fwd(a)
    np.testing.assert_allclose(s, np.linalg.svd(a, compute_uv=False), rtol=1e-13)
    np.testing.assert_allclose((u * s_all[..., None, :]) @ adjoint(w), a, atol=1e-14)


def test_equal_and_zero_values(rng):
    equal = with_singular(rng, 6, [2.0, 2.0, 1.0])
    s, saved = ddnref.svdvals_fwd(equal)
    u, _, w = saved
    got = ddnref.svdvals_vjp(np.asarray([1.0, 1.0, 3.0]), s, *saved)
    assert relative(got, (u * [1.0, 1.0, 3.0]) @ w.T) <= 1e-14
    with pytest.raises(ddnref.GaugeError):
        ddnref.svdvals_vjp(np.asarray([1.0, 0.0, 0.0]), s, *saved)
    assert np.all(np.isfinite(ddnref.svdvals_vjp(np.asarray([1.0, 0.0, 0.0]), s, *saved, gauge_rtol=np.inf)))
    both = np.stack([equal, with_singular(rng, 6, [2.0, 0.0, 0.0])])
    s, saved = ddnref.svdvals_fwd(both)
    with pytest.raises(ddnref.SingularError, match="nuclear norm"):
        ddnref.svdvals_vjp(np.ones((2, 3)), s, *saved)
    got = ddnref.svdvals_vjp(np.ones((2, 3)), s, *saved, throw=False)
    assert np.all(np.isfinite(got[0]))
    assert np.all(np.isnan(got[1]))
    smooth = 2 * s / (1 + s * s)  # of log(1 + s²)
    a_bar = np.linalg.solve(np.eye(3) + adjoint(both) @ both, 2 * adjoint(both))
    assert relative(ddnref.svdvals_vjp(smooth, s, *saved), adjoint(a_bar)) <= 1e-13


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), [(7, 3), (4, 4), (5, 1), (3, 6)])
def test_jvp(m, n, is_complex, xp, rng):
    """Check it against differences and as the adjoint of the VJP."""
    a = of_shape(rng, m, n, is_complex)
    a_dot = rng.standard_normal(a.shape).astype(a.dtype) + (1j * rng.standard_normal(a.shape) if is_complex else 0)
    s, saved = ddnref.svdvals_fwd(xp.asarray(a))
    jvp = xp.jit(partial(ddnref.svdvals_jvp, throw=False))
    s_dot = xp.numpy(jvp(xp.asarray(a_dot), s, *saved))
    assert relative(s_dot, numerical_jvp(ddnref.svdvals, a, a_dot, gap=0.3)) <= 1e-9
    s_bar = rng.standard_normal((2, min(m, n)))
    a_bar = xp.numpy(xp.derivative(ddnref.svdvals_vjp, xp.asarray(s_bar), s, *saved))
    error = abs(np.vdot(a_bar, a_dot).real - np.vdot(s_bar, s_dot))
    assert error <= 1e-12 * np.linalg.norm(s_bar) * np.linalg.norm(s_dot)


@pytest.mark.parametrize("small", [1e-4, 1e-9])
def test_jvp_of_small_values(small, xp, rng):
    """Check float32, in which the smallest one has no digit in a Gram matrix, against float64."""
    a, a_dot = (
        with_singular(rng, 12, [1.0, 0.5, small]).astype("float32"),
        rng.standard_normal((12, 3)).astype("float32"),
    )
    s, saved = xp.lift(ddnref.svdvals_fwd)(a)
    s_dot = xp.lift(partial(ddnref.svdvals_jvp, throw=False))(a_dot, s, *saved)
    assert s_dot.dtype == np.float32
    s, saved = ddnref.svdvals_fwd(a.astype("float64"))
    assert relative(s_dot, ddnref.svdvals_jvp(a_dot.astype("float64"), s, *saved)) <= 8 * 2.0**-23


def test_directions_at_equal_values(xp, rng):
    a = with_singular(rng, 6, [3.0, 2.0, 2.0, 1.0], (3,))
    s, saved = ddnref.svdvals_fwd(xp.asarray(a))
    u, _, w = map(xp.numpy, saved)
    block = np.asarray([[0.1, 0.2, 0.3, 0.4], [1.0, 5.0, 2.0, 0.2], [0.3, -2.0, 5.0, 0.1], [0.2, 0.3, 0.4, 0.5]])
    together = xp.asarray(u @ block @ adjoint(w))
    np.testing.assert_allclose(
        xp.numpy(xp.derivative(ddnref.svdvals_jvp, together, s, *saved)), [[0.1, 5.0, 5.0, 0.5]] * 3, rtol=1e-13
    )
    aside = xp.asarray(
        1e8 * (np.eye(6) - u @ adjoint(u)) @ rng.standard_normal(a.shape)
    )  # only rounding is left of it in the space of U
    np.testing.assert_allclose(xp.numpy(xp.derivative(ddnref.svdvals_jvp, aside, s, *saved)), 0, atol=1e-6)
    direction = xp.asarray(rng.standard_normal(a.shape))
    with pytest.raises(ddnref.GaugeError, match=r"splits equal singular values \(items 0, 1, 2 of 3\), those at 2, by"):
        ddnref.svdvals_jvp(direction, s, *saved)
    assert np.all(np.isnan(xp.numpy(xp.derivative(ddnref.svdvals_jvp, direction, s, *saved, throw=False))))
    sums = xp.numpy(xp.derivative(ddnref.svdvals_jvp, direction, s, *saved, gauge_rtol=np.inf))
    expected = np.trace(adjoint(u) @ xp.numpy(direction) @ w, axis1=-2, axis2=-1)
    assert relative(np.sum(sums, axis=-1), expected) <= 1e-13


def test_directions_at_zero_values(xp, rng):
    a = with_singular(rng, 6, [2.0, 1.0, 0.0, 0.0], (2,))
    s, saved = ddnref.svdvals_fwd(xp.asarray(a))
    # Factors of rank two stay of rank two along this direction, while the second item is left alone.
    direction = np.stack([a[0] @ rng.standard_normal((4, 4)), 0 * a[0]])
    s_dot = xp.numpy(xp.derivative(ddnref.svdvals_jvp, xp.asarray(direction), s, *saved))
    np.testing.assert_allclose(s_dot[:, 2:], 0, atol=1e-14)
    direction[1] = np.outer(*(xp.numpy(part)[1][:, 3] for part in (saved[0], saved[2])))  # the last one alone
    with pytest.raises(ddnref.SingularError, match=r"moves a singular value that is zero .*item 1 of 2"):
        ddnref.svdvals_jvp(xp.asarray(direction), s, *saved)
    s_dot = xp.numpy(xp.derivative(ddnref.svdvals_jvp, xp.asarray(direction), s, *saved, throw=False))
    assert np.all(np.isfinite(s_dot[0]))
    assert np.all(np.isnan(s_dot[1]))
    assert np.all(
        np.isfinite(xp.numpy(xp.derivative(ddnref.svdvals_jvp, xp.asarray(direction), s, *saved, gauge_rtol=np.inf)))
    )


def test_bad_input_of_the_jvp(host_reads, rng):
    s, saved = ddnref.svdvals_fwd(with_singular(rng, 5, [2.0, 1.0], (2,)))
    with pytest.raises(TypeError, match="a_dot is None"):
        ddnref.svdvals_jvp(None, s, *saved)
    with pytest.raises(TypeError, match="a_dot has dtype float32, expected float64"):
        ddnref.svdvals_jvp(np.ones((2, 5, 2), np.float32), s, *saved)
    with pytest.raises(ValueError, match=r"a_dot has shape \(5, 2\), expected \(2, 5, 2\)"):
        ddnref.svdvals_jvp(np.ones((5, 2)), s, *saved)
    assert ddnref.svdvals_jvp(np.ones((3, 4, 0)), *_flat(ddnref.svdvals_fwd(np.ones((3, 4, 0))))).shape == (3, 0)
    import array_api_strict as strict

    arrays = [strict.asarray(a) for a in (np.ones((2, 5, 2)), s, *saved)]
    host_reads.clear()
    ddnref.svdvals_jvp(*arrays, throw=False)
    assert host_reads == []
    ddnref.svdvals_jvp(*arrays)
    assert host_reads == ["__bool__"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_random_spectra(dtype):
    """Singular values down to the rounding of the largest, at any scale, against forty digits."""
    rng = np.random.default_rng(17)
    for _ in range(15):
        n = int(rng.integers(1, 5))
        scale = 10.0 ** rng.uniform(-30, 30)
        a = (with_singular(rng, n + int(rng.integers(0, 6)), 10.0 ** rng.uniform(-9, 0, n)) * scale).astype(dtype)
        s_exact, polar = exact(a)
        s, saved = ddnref.svdvals_fwd(a)
        unit = np.finfo(np.float64).eps * s_exact[0]
        assert np.all(np.abs(s - s_exact) <= 8 * unit + np.finfo(dtype).eps * s_exact)
        gap = np.min(np.abs(np.diff(s_exact)), initial=s_exact[-1])
        if gap > 1e3 * np.finfo(dtype).eps * s_exact[0] or n == 1:
            bars = ddnref.svdvals_vjp(np.ones(n, dtype), s, *saved)
            assert relative(bars, polar) <= 16 * unit / s_exact[-1] + 8 * np.finfo(dtype).eps


def test_bad_input(host_reads, rng):
    a = with_singular(rng, 5, [2.0, 1.0], (2,))
    a[1, 0, 0] = np.nan
    s, saved = ddnref.svdvals_fwd(a)
    assert np.all(np.isfinite(s[0]))
    assert np.all(np.isnan(s[1]))
    assert np.all(np.isnan(ddnref.svdvals(a)[1]))
    assert np.all(np.isnan(ddnref.svdvals_vjp(np.ones((2, 2)), s, *saved)[1]))
    assert ddnref.svdvals(np.ones((3, 4, 0))).shape == (3, 0)
    assert ddnref.svdvals_vjp(np.ones((3, 0)), *_flat(ddnref.svdvals_fwd(np.ones((3, 4, 0))))).shape == (3, 4, 0)
    for bad, error, match in [
        (np.ones(3), ValueError, "expected"),
        (np.ones((3, 2), dtype=np.int64), TypeError, "float32, float64"),
    ]:
        with pytest.raises(error, match=match):
            ddnref.svdvals(bad)
    with pytest.raises(ValueError, match="s_bar has shape"):
        ddnref.svdvals_vjp(np.ones(3), s, *saved)
    import array_api_strict as strict

    a = strict.asarray(a[:1])
    host_reads.clear()
    s, saved = ddnref.svdvals_fwd(a)
    ddnref.svdvals_vjp(s, s, *saved, throw=False)
    assert host_reads == []


def _flat(result):
    s, saved = result
    return s, *saved
