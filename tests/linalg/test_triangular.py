"""Triangular systems: the triangle that is not read, zeros on the diagonal, right-hand sides that broadcast."""

from functools import partial

import numpy as np
import pytest
import scipy.linalg
from problems import adjoint, relative

import ddnref
from conftest import backend
from ddnref.testing import assert_vjp, numerical_jvp

SHAPES = [
    ((4, 4), (4,)),
    ((4, 4), (3, 4)),
    ((2, 4, 4), (2, 4)),
    ((2, 4, 4), (4,)),
    ((2, 4, 4), (3, 2, 4)),
    ((2, 1, 4, 4), (5, 1, 3, 4)),
    ((0, 4, 4), (0, 4)),
    ((2, 0, 0), (2, 0)),
    ((1, 1), (3, 1)),
]


def normal(rng, shape, is_complex=False):
    z = rng.standard_normal((2, *shape))
    return z[0] + 1j * z[1] if is_complex else z[0]


def system(rng, a_shape, b_shape, a_complex=False, b_complex=False):
    return normal(rng, a_shape, a_complex) + 3 * np.eye(a_shape[-1]), normal(rng, b_shape, b_complex)


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
def test_right_hand_sides_broadcast_and_their_gradients_are_sums(a_shape, b_shape, lower, xp, rng):
    """It is `solve` of the triangle, in value and in both derivatives."""
    a, b = system(rng, a_shape, b_shape)
    triangle = np.tril if lower else np.triu
    x = ddnref.solve_triangular(xp.asarray(a), xp.asarray(b), lower=lower)
    y, saved = ddnref.solve_fwd(triangle(a), b)
    np.testing.assert_allclose(xp.numpy(x), y, atol=1e-12)
    x_bar, a_dot, b_dot = (normal(rng, shape) for shape in (y.shape, a_shape, b_shape))
    given = x, xp.asarray(a), xp.asarray(b)
    a_bar, b_bar = ddnref.solve_triangular_vjp(xp.asarray(x_bar), *given, lower=lower)
    expected = ddnref.solve_vjp(x_bar, y, *saved, b)
    np.testing.assert_allclose(xp.numpy(a_bar), triangle(expected[0]), atol=1e-12)
    np.testing.assert_allclose(xp.numpy(b_bar), expected[1], atol=1e-12)
    x_dot = ddnref.solve_triangular_jvp(xp.asarray(a_dot), xp.asarray(b_dot), *given, lower=lower)
    np.testing.assert_allclose(xp.numpy(x_dot), ddnref.solve_jvp(triangle(a_dot), b_dot, y, *saved, b), atol=1e-12)


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize(("a_complex", "b_complex"), [(False, False), (True, True), (True, False), (False, True)])
def test_derivatives(a_complex, b_complex, lower, xp, rng):
    a, b = system(rng, (2, 4, 4), (3, 1, 4), a_complex, b_complex)
    a_dot, b_dot = normal(rng, a.shape, a_complex), normal(rng, b.shape, b_complex)
    x = xp.numpy(ddnref.solve_triangular(xp.asarray(a), xp.asarray(b), lower=lower))
    jvp = xp.lift(partial(ddnref.solve_triangular_jvp, lower=lower, throw=False))
    x_dot = jvp(a_dot, b_dot, x, a, b)
    moved = lambda t: ddnref.solve_triangular(a + t * a_dot, b + t * b_dot, lower=lower)
    assert relative(x_dot, numerical_jvp(moved, np.zeros(1), np.ones(1), step=1e-3)) <= 1e-9
    x_bar = normal(rng, x.shape, np.iscomplexobj(x))
    vjp = xp.lift(partial(ddnref.solve_triangular_vjp, lower=lower, throw=False))
    a_bar, b_bar = vjp(x_bar, x, a, b)
    assert (a_bar.dtype, b_bar.dtype) == (a.dtype, b.dtype)
    forward = np.sum(np.conj(x_bar) * x_dot).real
    backward = np.sum(np.conj(a_bar) * a_dot).real + np.sum(np.conj(b_bar) * b_dot).real
    assert abs(forward - backward) <= 1e-12 * np.linalg.norm(x_bar) * np.linalg.norm(x_dot)


@pytest.mark.parametrize("lower", [False, True])
def test_finite_differences(lower, rng):
    a, b = system(rng, (5, 5), (3, 5))
    forward, vjp = (partial(f, lower=lower) for f in (ddnref.solve_triangular, ddnref.solve_triangular_vjp))
    report = assert_vjp(forward, vjp, a, b, needs=(0, 1), saves=False)
    assert report.error <= 1e-9


def test_only_one_triangle_is_read(xp, rng):
    a, b = system(rng, (4, 4), (4,))
    for lower, rest in ((False, np.tril(np.full((4, 4), np.nan), -1)), (True, np.triu(np.full((4, 4), np.inf), 1))):
        x = ddnref.solve_triangular(xp.asarray(a), xp.asarray(b), lower=lower)
        junk = xp.asarray(np.where(rest == 0, a, rest))
        found = ddnref.solve_triangular(junk, xp.asarray(b), lower=lower)
        assert np.array_equal(xp.numpy(found), xp.numpy(x))
        a_bar, _ = ddnref.solve_triangular_vjp(x, x, junk, lower=lower)
        assert np.all(np.isfinite(xp.numpy(a_bar)))
        assert np.all(xp.numpy(a_bar)[rest != 0] == 0)
        x_dot = ddnref.solve_triangular_jvp(junk, None, x, junk, lower=lower)
        assert np.all(np.isfinite(xp.numpy(x_dot)))


@pytest.mark.parametrize("condition", [1e4, 1e10, 1e18])
def test_ill_conditioned_ones_against_fifty_digits(condition, rng):
    """Substitution is as accurate as if every entry were off by rounding, so a large condition does no harm alone."""
    import mpmath

    n = 8
    units = np.geomspace(1, 1 / condition, n)
    a = np.triu(rng.uniform(0.1, 0.3, (n, n)), 1) + np.eye(n)
    a, b, x_bar = a * units[:, None], rng.standard_normal(n), rng.standard_normal(n)
    with mpmath.workdps(50):
        matrix = mpmath.matrix(a.tolist())
        x_exact = mpmath.lu_solve(matrix, mpmath.matrix(b.tolist()))
        y_exact = mpmath.lu_solve(matrix.T, mpmath.matrix(x_bar.tolist()))
        x_exact, y_exact = (np.asarray([float(v) for v in z]) for z in (x_exact, y_exact))
    x = ddnref.solve_triangular(a, b)
    a_bar, b_bar = ddnref.solve_triangular_vjp(x_bar, x, a)
    assert relative(x, x_exact) <= 1e-14
    assert relative(b_bar, y_exact) <= 1e-14
    assert relative(a_bar, -np.triu(np.outer(y_exact, x_exact))) <= 1e-14


def test_a_zero_on_the_diagonal_raises_or_is_nan_alone(xp, rng):
    a, b = system(rng, (4, 3, 3), (4, 3))
    a[1, 1, 1] = 0
    a[2, 0, 1] = np.nan
    b[3, 1] = np.inf
    a, b = xp.asarray(a), xp.asarray(b)
    says = r"zero on its diagonal and is singular \(item 1 of 4\).*lower="
    with pytest.raises(ddnref.SingularError, match=says):
        ddnref.solve_triangular(a, b)
    x = ddnref.solve_triangular(a, b, throw=False)
    ones = xp.asarray(np.ones((4, 3)))
    with pytest.raises(ddnref.SingularError, match="item 1 of 4"):
        ddnref.solve_triangular_vjp(ones, x, a)
    with pytest.raises(ddnref.SingularError, match="item 1 of 4"):
        ddnref.solve_triangular_jvp(None, ones, x, a)
    bars = ddnref.solve_triangular_vjp(ones, x, a, b, throw=False)
    for array in (x, *bars, ddnref.solve_triangular_jvp(a, ones, x, a, b, throw=False)):
        flags = np.isnan(xp.numpy(array).reshape(4, -1))
        assert flags.all(axis=-1).tolist() == flags.any(axis=-1).tolist() == [False, True, True, True]


def test_it_agrees_with_scipy(rng):
    a, b = system(rng, (6, 6), (6,), True)
    for lower in (False, True):
        theirs = scipy.linalg.solve_triangular(a, b, lower=lower)
        assert relative(ddnref.solve_triangular(a, b, lower=lower), theirs) <= 1e-14
        assert relative(ddnref.solve_triangular(adjoint(a), b, lower=not lower),
                        scipy.linalg.solve_triangular(a, b, lower=lower, trans="C")) <= 1e-14  # fmt: skip


def test_single_precision(xp, rng):
    a, b = system(rng, (2, 5, 5), (3, 2, 5))
    x = ddnref.solve_triangular(a, b)
    exact = ddnref.solve_triangular_vjp(x, x, a)
    a, b = (xp.asarray(y.astype(np.float32)) for y in (a, b))
    x = ddnref.solve_triangular(a, b)
    for found, wanted in zip(ddnref.solve_triangular_vjp(x, x, a), exact, strict=True):
        assert xp.numpy(found).dtype == np.float32
        assert relative(xp.numpy(found), wanted) <= 1e-5


def test_static_errors(rng):
    a, b = system(rng, (3, 3), (2, 3))
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\)"):
        ddnref.solve_triangular(a[:, :2], b)
    with pytest.raises(ValueError, match=r"b has shape \(3, 2\), expected \(..., 3\): vectors"):
        ddnref.solve_triangular(a, np.ones((3, 2)))
    with pytest.raises(TypeError, match="one precision"):
        ddnref.solve_triangular(a, b.astype(np.float32))
    with pytest.raises(TypeError, match="a has dtype int64"):
        ddnref.solve_triangular(a.astype(np.int64), b)
    x = ddnref.solve_triangular(a, b)
    with pytest.raises(ValueError, match=r"x_bar has shape \(3,\), expected \(2, 3\)"):
        ddnref.solve_triangular_vjp(x[0], x, a)
    with pytest.raises(ValueError, match=r"x has leading axes \(2,\), expected \(1, 2\): the solution for this matrix"):
        ddnref.solve_triangular_vjp(x, x, a[None, None])
    with pytest.raises(TypeError, match="a_dot and b_dot are both None"):
        ddnref.solve_triangular_jvp(None, None, x, a)
    with pytest.raises(ValueError, match=r"a_dot has shape \(2, 3\), expected \(3, 3\)"):
        ddnref.solve_triangular_jvp(b, None, x, a)
    with pytest.raises(ValueError, match=r"b_dot has shape \(3,\), expected \(2, 3\)"):
        ddnref.solve_triangular_jvp(None, b[0], x, a, b)


def test_one_flag_is_read(host_reads, rng):
    strict = backend("array-api-strict")
    a, b = map(strict.asarray, system(rng, (2, 3, 3), (4, 2, 3)))
    x = ddnref.solve_triangular(a, b, throw=False)
    ddnref.solve_triangular_vjp(x, x, a, b, throw=False)
    ddnref.solve_triangular_jvp(a, b, x, a, b, throw=False)
    assert host_reads == []
    ddnref.solve_triangular(a, b)
    assert host_reads == ["__bool__"]
