"""LU factorisation and triangular systems on every library: one format, singular and bad items alone."""

import numpy as np
import pytest
import scipy.linalg
from problems import adjoint, relative

from conftest import Backend, backend
from ddnref._kernels.lu import lu_factor, lu_factor_vjp, lu_solve, solve_triangular, unpack

NUMPY = Backend("numpy", np)


def random(rng, shape, is_complex=False, dtype=np.float64):
    z = rng.standard_normal(shape)
    z = z + 1j * rng.standard_normal(shape) if is_complex else z
    return z.astype(np.result_type(dtype, np.complex64) if is_complex else dtype)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("is_adjoint", [False, True])
def test_every_library_solves_with_the_factors_of_every_other(is_complex, is_adjoint, xp, rng):
    """The packed factors and pivots are LAPACK's, wherever they come from."""
    a, b = random(rng, (3, 5, 5), is_complex), random(rng, (3, 5, 2), is_complex)
    theirs, ours = lu_factor(xp.asarray(a)), lu_factor(a)
    np.testing.assert_allclose(xp.numpy(theirs[0]), ours[0], atol=1e-12)
    np.testing.assert_array_equal(xp.numpy(theirs[1]), ours[1])
    assert not np.any(xp.numpy(theirs[2]))
    x = lu_solve(xp.asarray(np.ascontiguousarray(ours[0])), xp.asarray(ours[1]), xp.asarray(b), adjoint=is_adjoint)
    expected = np.linalg.solve(adjoint(a) if is_adjoint else a, b)
    assert relative(xp.numpy(x), expected) <= 1e-12


def test_factors_are_those_of_lapack(rng):
    a = rng.standard_normal((6, 6))
    lu, pivots, _ = lu_factor(a)
    theirs = scipy.linalg.lu_factor(a)
    assert np.array_equal(lu, theirs[0])
    assert np.array_equal(pivots, theirs[1])
    low, up = unpack(lu)
    order = scipy.linalg.lu(a, p_indices=True)[0]
    assert relative((low @ up)[order], a) <= 1e-14


def test_single_precision_is_not_computed_in_double(xp, rng):
    a, b = random(rng, (4, 4), dtype=np.float32), random(rng, (4, 1), dtype=np.float32)
    lu, pivots, _ = lu_factor(xp.asarray(a))
    x = xp.numpy(lu_solve(lu, pivots, xp.asarray(b)))
    assert str(lu.dtype).endswith("float32")
    assert x.dtype == np.float32
    assert 0 < relative(x, np.linalg.solve(a.astype(np.float64), b)) <= 1e-4


def defective(rng, n):
    """Rows, columns and a product of thin matrices that depend on each other, badly scaled ones too."""
    rows = rng.standard_normal((n, n))
    rows[-1] = 3 * rows[0] - rows[: n // 2].sum(axis=0)
    thin = rng.standard_normal((n, n - 1)) @ rng.standard_normal((n - 1, n))
    zero = np.zeros((n, n))
    column = rng.standard_normal((n, n))
    column[:, 1] = 0
    return np.stack([rows, rows.T, rows * 10.0 ** rng.uniform(-8, 8, n), thin, zero, column, np.ones((n, n))])


@pytest.mark.parametrize("n", [2, 5, 30])
def test_singular_items_are_found_and_leave_the_others_alone(n, xp, rng):
    bad = defective(rng, n)
    good = np.stack([np.eye(n), rng.standard_normal((n, n)), np.diag(10.0 ** -np.arange(0, 10 * n, 10.0))])
    a = np.concatenate([bad, good, np.full((1, n, n), np.inf)])
    lu, pivots, singular = (xp.numpy(y) for y in lu_factor(xp.asarray(a)))
    assert singular.tolist() == [True] * len(bad) + [False] * len(good) + [False]
    assert np.all(np.isnan(lu[: len(bad)]))
    assert np.all(np.isnan(lu[-1]))
    alone = lu_factor(xp.asarray(good))
    np.testing.assert_allclose(lu[len(bad) : -1], xp.numpy(alone[0]), rtol=1e-13)
    np.testing.assert_array_equal(pivots[len(bad) : -1], xp.numpy(alone[1]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ill_conditioned_is_not_singular(dtype, xp, rng):
    """Condition 1e4 / 1e12: what rounding leaves of the digits is the caller's to judge."""
    kappa = 1e4 if dtype == np.float32 else 1e12
    q, u = (np.linalg.qr(rng.standard_normal((20, 20)))[0] for _ in range(2))
    a = np.stack([(q * np.geomspace(1, 1 / kappa, 20)) @ u, scipy.linalg.hilbert(20) + np.eye(20)]).astype(dtype)
    assert not np.any(xp.numpy(lu_factor(xp.asarray(a))[2]))


def test_a_nan_right_hand_side_or_a_zero_one(xp, rng):
    a = rng.standard_normal((2, 3, 3))
    a[1] = 0
    lu, pivots, _ = lu_factor(xp.asarray(a))
    x = xp.numpy(lu_solve(lu, pivots, xp.asarray(np.zeros((2, 3, 1)))))
    assert np.all(x[0] == 0)
    assert np.all(np.isnan(x[1]))


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("unit_diagonal", [True, False])
@pytest.mark.parametrize("is_complex", [False, True])
def test_triangular_systems_read_one_triangle(lower, unit_diagonal, is_complex, xp, rng):
    a, b = random(rng, (2, 4, 4), is_complex) + 2 * np.eye(4), random(rng, (2, 4, 3), is_complex)
    triangle = np.tril(a) if lower else np.triu(a)
    if unit_diagonal:
        triangle = triangle - triangle * np.eye(4) + np.eye(4)
    x = solve_triangular(xp.asarray(a), xp.asarray(b), lower=lower, unit_diagonal=unit_diagonal)
    assert relative(xp.numpy(x), np.linalg.solve(triangle, b)) <= 1e-12
    by_columns = np.swapaxes(np.ascontiguousarray(np.swapaxes(a, -1, -2)), -1, -2)
    assert relative(solve_triangular(by_columns, b, lower=lower, unit_diagonal=unit_diagonal), xp.numpy(x)) <= 1e-12


@pytest.mark.parametrize("is_complex", [False, True])
def test_the_factors_own_vjp(is_complex, rng):
    """Through ``Re <c, lu>``, in the direction of the gradient; pivots do not change in a small step."""
    a, c = random(rng, (5, 5), is_complex), random(rng, (5, 5), is_complex)
    lu, pivots, _ = lu_factor(a)
    a_bar = lu_factor_vjp(c, lu, pivots)
    d = a_bar / np.linalg.norm(a_bar)
    value = lambda t: np.sum(np.conj(c) * lu_factor(a + t * d)[0]).real
    h = 1e-4
    slope = (4 * (value(h / 2) - value(-h / 2)) / h - (value(h) - value(-h)) / (2 * h)) / 3
    assert abs(slope - np.linalg.norm(a_bar)) <= 1e-7 * np.linalg.norm(a_bar)


def test_empty(xp):
    for batch, n in (((0,), 3), ((2,), 0), ((), 0)):
        lu, pivots, singular = lu_factor(xp.asarray(np.ones((*batch, n, n))))
        assert tuple(lu.shape) == (*batch, n, n)
        assert tuple(pivots.shape) == (*batch, n)
        assert tuple(singular.shape) == batch
        assert tuple(lu_solve(lu, pivots, xp.asarray(np.ones((*batch, n, 2)))).shape) == (*batch, n, 2)


def test_reads_nothing_on_the_host(host_reads, rng):
    strict = backend("array-api-strict")
    lu, pivots, _ = lu_factor(strict.asarray(rng.standard_normal((2, 3, 3))))
    lu_solve(lu, pivots, strict.asarray(rng.standard_normal((2, 3, 1))), adjoint=True)
    assert host_reads == []


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e160, 1e200])
def test_numbers_whose_squares_leave_the_range_are_judged_alike(scale, xp, rng):
    a = scale * np.stack([rng.standard_normal((5, 5)), np.ones((5, 5)), np.diag([1.0, 2, 3, 4, 1e-9])])
    assert xp.numpy(lu_factor(xp.asarray(a))[2]).tolist() == [False, True, False]
