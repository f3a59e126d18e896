"""LU factorisation and triangular systems on every library: one format, singular and bad items alone."""

import numpy as np
import pytest
import scipy.linalg
from problems import adjoint, relative
from singular_problems import SQUARE_REGULAR, SQUARE_SINGULAR, TALL_REGULAR, stack

from conftest import Backend, backend
from ddnref._kernels import singularity
from ddnref._kernels.lu import (
    lu_factor,
    lu_factor_vjp,
    lu_solve,
    rcond,
    rcond_of_triangle,
    solve_triangular,
    unpack,
)

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
def test_singular_but_for_rounding_is_always_found(dtype, xp, rng):
    for name, kind in SQUARE_SINGULAR.items():
        a = stack(kind, rng, dtype, 100, xp.name)
        assert np.all(xp.numpy(lu_factor(xp.asarray(a))[2])), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ill_conditioned_is_not_singular(dtype, xp, rng):
    """Condition 1e5 / 1e13, and any units: what rounding leaves of the digits is the caller's to judge."""
    for name, kind in SQUARE_REGULAR.items():
        a = stack(kind, rng, dtype, 40, xp.name)
        assert not np.any(xp.numpy(lu_factor(xp.asarray(a))[2])), name


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_in_units_do_not_spoil_the_solution(dtype, is_complex, xp, rng):
    """Without scaling, the first pivot below is 1 in a row of 1e20, and the first unknown comes out as 0."""
    known = np.asarray([[[1, 1e20], [1, 1]], [[1, 1], [1e20, 1]]], dtype)
    a = random(rng, (20, 2, 2), is_complex, dtype) * 10.0 ** rng.uniform(-15, 15, (20, 2, 1)).astype(dtype)
    regular = np.abs(np.linalg.det(a / np.max(np.abs(a), axis=-1, keepdims=True))) > 0.1
    a = np.concatenate([known.astype(a.dtype), a[regular]])
    double = a.astype(np.result_type(a, np.float64))
    right = np.sum(double, axis=-1)[..., None]
    lu, pivots, _ = lu_factor(xp.asarray(a))
    x = xp.numpy(lu_solve(lu, pivots, xp.asarray(right.astype(a.dtype))))
    assert np.max(np.abs(x - 1)) <= 100 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reciprocal_condition_numbers(dtype, xp, rng):
    """Never below the right value, and above it by a small factor only."""

    def exact(m):
        s = np.linalg.svd(m.astype(np.float64), compute_uv=False)
        return s[..., -1] / s[..., 0]

    for kind in (SQUARE_REGULAR["one small"], SQUARE_REGULAR["random"], SQUARE_REGULAR["rows and columns in units"]):
        a = stack(kind, rng, dtype, 5, xp.name)
        lu, pivots, _ = lu_factor(a)
        found = xp.numpy(rcond(*(xp.asarray(np.ascontiguousarray(z)) for z in (a, lu, pivots))))
        size = abs(a)
        d_r, d_c = singularity.scales(lambda x, t, s=size: ((s.mT if t else s) @ x[..., None])[..., 0], a[..., 0])
        ratio = found / exact(d_r[..., :, None].astype(np.float64) * a * d_c[..., None, :])
        assert np.all((ratio > 0.9) & (ratio < 6))
    for kind in (TALL_REGULAR["one small"], TALL_REGULAR["random"], TALL_REGULAR["columns in units"]):
        r = np.linalg.qr(stack(kind, rng, dtype, 5, xp.name))[1]
        found = xp.numpy(rcond_of_triangle(xp.asarray(r)))
        ratio = found / exact(r / np.linalg.norm(r.astype(np.float64), axis=-2, keepdims=True))
        assert np.all((ratio > 0.9) & (ratio < 6))


def test_singular_items_are_named():
    flags = np.zeros((3, 4), dtype=bool)
    flags[1, 2] = True
    name = lambda flags: singularity.named("The matrix", "matrices", flags, lambda i: np.asarray(1e-17))
    assert name(flags) == (
        "1 of 12 matrices are singular to working precision (item (1, 2); rcond 1.0e-17 is not above 16 eps)"
    )
    assert "7 of 7 matrices are singular to working precision (items 0, 1, 2, 3, 4, …;" in name(np.ones(7, dtype=bool))
    assert name(np.asarray(True)).startswith("The matrix is singular to working precision (rcond 1.0e-17")


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


@pytest.mark.framework("torch")
def test_a_single_axis_of_pytorch_has_any_stride(torch, rng):
    """PyTorch's own solve takes the stride of the last batch axis, and solved with the factors of another item."""
    a = torch.asarray(rng.standard_normal((3, 4, 4)) + 4 * np.eye(4))
    b = torch.asarray(rng.standard_normal((3, 4, 2)))
    lu, pivots, _ = lu_factor(a)
    alone = torch.stack([torch.linalg.solve(m, y) for m, y in zip(a, b, strict=True)])
    found = lu_solve(lu[:, None], pivots[:, None], b[:, None])[:, 0]
    torch.testing.assert_close(found, alone)
    # The axis that `jacrev` maps has length one behind the axis of the outer vmap.
    gradient = torch.func.jacrev(lambda m, y: (lu_solve(*lu_factor(m)[:2], y) ** 2).sum(), 1)
    each = torch.stack([gradient(m, y) for m, y in zip(a, b, strict=True)])
    torch.testing.assert_close(torch.func.vmap(gradient)(a, b), each)
