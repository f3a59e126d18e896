"""QR: unique factors, both derivatives, columns that depend on each other, bad input."""

import numpy as np
import pytest
from problems import adjoint, relative
from singular_problems import TALL_REGULAR, TALL_SINGULAR, stack

import ddnref
from conftest import backend
from ddnref.testing import numerical_jvp


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 4), (2, 3, 6, 1)])
def test_factors(is_complex, shape, xp, rng):
    a = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)
    q, r = xp.tuple(ddnref.qr(xp.asarray(a)))
    assert relative(q @ r, a) <= 1e-14
    assert relative(adjoint(q) @ q, np.broadcast_to(np.eye(shape[-1]), r.shape)) <= 1e-14
    assert np.all(np.tril(r, -1) == 0)
    diagonal = np.einsum("...ii->...i", r)
    assert np.all(diagonal.real > 0)
    assert np.max(np.abs(diagonal.imag)) <= 1e-15 * np.max(np.abs(r))


def test_dependent_columns_have_no_gradient(xp, rng):
    a = rng.standard_normal((2, 5, 3))
    a[0, :, 2] = a[0, :, 0] - a[0, :, 1]
    q, r = ddnref.qr(xp.asarray(a))
    with pytest.raises(ddnref.SingularError, match=r"1 of 2 factors R.*item 0; rcond.*linearly dependent"):
        ddnref.qr_vjp(q, r, q, r)
    a_bar = xp.numpy(xp.derivative(ddnref.qr_vjp, q, r, q, r, throw=False))
    assert np.all(np.isnan(a_bar[0]))
    assert np.all(np.isfinite(a_bar[1]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_columns_are_judged_whatever_their_units(dtype, xp, rng):
    """Dependent but for rounding: always refused. Regular in any units: never."""
    for kinds, expected in ((TALL_SINGULAR, True), (TALL_REGULAR, False)):
        for name, kind in kinds.items():
            a = stack(kind, rng, dtype, 50, xp.name)
            q, r = ddnref.qr(xp.asarray(a))
            a_bar = xp.numpy(xp.derivative(ddnref.qr_vjp, q, r, q, r, throw=False))
            assert np.all(np.any(np.isnan(a_bar), axis=(-2, -1)) == expected), name


def test_the_gradient_of_columns_in_units(xp, rng):
    """Q does not depend on the lengths of the columns, so that a column 1e-20 as long has 1e20 times the gradient."""
    a, q_bar, unit = rng.standard_normal((5, 2)), rng.standard_normal((5, 2)), np.asarray([1, 1e-20])
    expected = ddnref.qr_vjp(q_bar, None, *ddnref.qr(a)) / unit
    found = xp.numpy(xp.derivative(ddnref.qr_vjp, xp.asarray(q_bar), None, *ddnref.qr(xp.asarray(a * unit))))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_what_lies_below_the_diagonal_of_r_bar_is_not_used(rng):
    a, r_bar = rng.standard_normal((5, 3)), rng.standard_normal((3, 3))
    q, r = ddnref.qr(a)
    assert np.array_equal(ddnref.qr_vjp(None, r_bar, q, r), ddnref.qr_vjp(None, np.triu(r_bar), q, r))


def test_static_errors(rng):
    a = rng.standard_normal((5, 3))
    q, r = ddnref.qr(a)
    with pytest.raises(ValueError, match="m >= n"):
        ddnref.qr(a.T)
    with pytest.raises(TypeError, match="both None"):
        ddnref.qr_vjp(None, None, q, r)
    with pytest.raises(ValueError, match="q_bar has shape"):
        ddnref.qr_vjp(r, r, q, r)
    with pytest.raises(TypeError, match="r_bar has dtype"):
        ddnref.qr_vjp(q, r.astype(np.float32), q, r)


# --- forward mode -----------------------------------------------------------------------------------------------


def random(rng, shape, is_complex=False):
    return rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 4), (2, 3, 6, 1)])
def test_jvp_agrees_with_finite_differences_and_with_the_vjp(is_complex, shape, xp, rng):
    a, a_dot = random(rng, shape, is_complex), random(rng, shape, is_complex)
    q, r = ddnref.qr(a)
    dots = xp.lift(lambda *arrays: ddnref.qr_jvp(*arrays, throw=False))(a_dot, q, r)
    step = 3e-4 * np.linalg.norm(a_dot)
    for dot, numerical in zip(dots, numerical_jvp(ddnref.qr, a, a_dot, step=step), strict=True):
        assert relative(dot, numerical) <= 1e-9
    # Each cotangent alone, so that no error hides behind the other.
    bars = random(rng, q.shape, is_complex), random(rng, r.shape, is_complex)
    for i, (bar, dot) in enumerate(zip(bars, dots, strict=True)):
        a_bar = ddnref.qr_vjp(*(bar if i == j else None for j in range(2)), q, r)
        forward, backward = np.sum(np.conj(bar) * dot).real, np.sum(np.conj(a_bar) * a_dot).real
        assert abs(forward - backward) <= 1e-12 * np.linalg.norm(bar) * np.linalg.norm(dot)


@pytest.mark.parametrize("is_complex", [False, True])
def test_structure_of_the_jvp(is_complex, xp, rng):
    a, a_dot = random(rng, (2, 6, 4), is_complex), random(rng, (2, 6, 4), is_complex)
    q, r = ddnref.qr(xp.asarray(a))
    q_dot, r_dot = xp.tuple(ddnref.qr_jvp(xp.asarray(a_dot), q, r))
    q, r = xp.tuple((q, r))
    skew = adjoint(q) @ q_dot
    assert relative(skew, -adjoint(skew)) <= 1e-14 * np.linalg.cond(r).max()
    assert np.all(np.tril(r_dot, -1) == 0)
    assert np.max(np.abs(np.einsum("...ii->...i", r_dot).imag)) <= 1e-14 * np.max(np.abs(r_dot))
    assert relative(q_dot @ r + q @ r_dot, a_dot) <= 1e-14 * np.linalg.cond(r).max()


def test_the_jvp_in_single_precision(xp, rng):
    a, a_dot = rng.standard_normal((2, 3, 6, 4))
    exact = ddnref.qr_jvp(a_dot, *ddnref.qr(a))
    a, a_dot = (xp.asarray(y.astype(np.float32)) for y in (a, a_dot))
    for dot, expected in zip(xp.tuple(ddnref.qr_jvp(a_dot, *ddnref.qr(a))), exact, strict=True):
        assert dot.dtype == np.float32
        assert relative(dot, expected) <= 1e-4


def test_dependent_columns_have_no_derivative(xp, rng):
    a = rng.standard_normal((2, 5, 3))
    a[0, :, 2] = a[0, :, 0] - a[0, :, 1]
    q, r = ddnref.qr(xp.asarray(a))
    with pytest.raises(ddnref.SingularError, match=r"1 of 2 factors R.*item 0; rcond.*linearly dependent"):
        ddnref.qr_jvp(q, q, r)
    for dot in xp.tuple(ddnref.qr_jvp(q, q, r, throw=False)):
        assert np.all(np.isnan(dot[0]))
        assert np.all(np.isfinite(dot[1]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_jvp_judges_columns_whatever_their_units(dtype, xp, rng):
    for kinds, expected in ((TALL_SINGULAR, True), (TALL_REGULAR, False)):
        for name, kind in kinds.items():
            q, r = ddnref.qr(xp.asarray(stack(kind, rng, dtype, 20, xp.name)))
            for dot in xp.tuple(xp.derivative(ddnref.qr_jvp, q, q, r, throw=False)):
                assert np.all(np.any(np.isnan(dot), axis=(-2, -1)) == expected), name


@pytest.mark.parametrize("order", [1, -1])
def test_the_jvp_of_columns_in_units(order, xp, rng):
    """Columns and their directions in other units: Q moves alike, and R in these units, entry by entry."""
    a, a_dot = rng.standard_normal((2, 6, 4))
    units = np.asarray([1e-60, 1e-40, 1.0, 1e50])[::order]
    q_dot, r_dot = ddnref.qr_jvp(a_dot, *ddnref.qr(a))
    q, r = ddnref.qr(xp.asarray(a * units))
    ours = xp.tuple(ddnref.qr_jvp(xp.asarray(a_dot * units), q, r))
    for dot, expected in zip(ours, (q_dot, r_dot * units), strict=True):
        np.testing.assert_allclose(dot, expected, rtol=1e-11)


def test_empty_factors(xp):
    for shape in ((5, 0), (0, 5, 3)):
        a = xp.asarray(np.zeros(shape))
        q, r = ddnref.qr(a)
        assert [tuple(dot.shape) for dot in ddnref.qr_jvp(a, q, r)] == [tuple(q.shape), tuple(r.shape)]


def test_static_errors_of_the_jvp(rng):
    a = rng.standard_normal((5, 3))
    q, r = ddnref.qr(a)
    with pytest.raises(TypeError, match="a_dot is None"):
        ddnref.qr_jvp(None, q, r)
    with pytest.raises(ValueError, match=r"a_dot has shape \(3, 5\), expected \(5, 3\)"):
        ddnref.qr_jvp(a.T, q, r)
    with pytest.raises(TypeError, match="a_dot has dtype float32"):
        ddnref.qr_jvp(a.astype(np.float32), q, r)
    with pytest.raises(TypeError, match="one library"):
        ddnref.qr_jvp(backend("array-api-strict").asarray(a), q, r)


def test_reads_nothing_on_the_host_without_throw(host_reads, rng):
    a = backend("array-api-strict").asarray(rng.standard_normal((2, 5, 3)))
    q, r = ddnref.qr(a)
    host_reads.clear()
    ddnref.qr_jvp(a, q, r, throw=False)
    assert host_reads == []
    ddnref.qr_jvp(a, q, r)
    assert host_reads == ["__bool__"]
