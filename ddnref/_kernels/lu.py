"""LU factorisation with partial pivoting, and triangular systems, in one form for every array library.

``P A = L U`` with both factors packed in one array, as in LAPACK. ``pivots[k]`` is the row, counted from 0, that step k
exchanged with row k. NumPy arrays use SciPy's LAPACK, CuPy arrays cuBLAS, PyTorch and JAX arrays their libraries' own
functions, and all others a form in nothing but the standard. An item that is not finite or is singular comes out as NaN
and leaves the others alone.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import array_api_compat
import numpy as np
import scipy

from ddnref._core.arrays import Array, Namespace, adjoint, as_dtype, eps, full, nan_where, put_nan, real
from ddnref._kernels import cupy as _cupy
from ddnref._kernels import singularity
from ddnref._kernels.compiled import compiled
from ddnref._kernels.dense import identity, matvec
from ddnref._kernels.lu_vjp import packed_lu_jvp, packed_lu_vjp
from ddnref._kernels.numpy import transposed
from ddnref._kernels.vectors import safe_norm

UNITS = 16
"""Rows whose sizes differ by more are in different units: they are scaled before pivots are chosen."""
MARGIN = 4
"""How much closer to regular than the criterion the quick test of NumPy must be."""


def lu_factor(a: Array) -> tuple[Array, Array, Array]:
    """Return packed factors and pivots of ``(..., n, n)``, and which items are singular, ``(...)``.

    An item counts as singular by the `rcond` of its rows and columns scaled. Items that are not finite are NaN and do
    not count as singular. Rows in very different units are scaled by powers of two while pivots are chosen, because the
    largest entry of a column means little then. Reads nothing on the host, except on NumPy.
    """
    # NumPy looks closely only at items that a cheaper test suspects.
    return _factor_numpy(a) if array_api_compat.is_numpy_array(a) else _factor_and_judge(a)


@compiled
def _factor_and_judge(a: Array) -> tuple[Array, Array, Array]:
    xp = array_api_compat.array_namespace(a)
    finite = xp.all(xp.isfinite(a), axis=(-2, -1))
    if 0 in a.shape:
        return (*packed(a), ~finite)
    a = xp.where(finite[..., None, None], a, identity(a.shape[-1], a))
    lu, pivots = _packed_in_units(a)
    singular = singularity.is_singular(rcond(a, lu, pivots))
    return nan_where((singular | ~finite)[..., None, None], lu), pivots, singular


def packed(a: Array) -> tuple[Array, Array]:
    """Return packed factors and pivots by the library's own function, on NumPy of one matrix."""
    if array_api_compat.is_numpy_array(a):
        return lapack_functions(a.dtype)[0](a)[:2]  # type: ignore[no-any-return]
    if array_api_compat.is_torch_array(a):
        from ddnref._kernels import torch as _torch

        lu, pivots, _ = _torch.lu_factor(a)
        return lu, pivots - 1  # counted from 1 there
    if array_api_compat.is_jax_array(a):
        import jax

        return jax.scipy.linalg.lu_factor(a)  # type: ignore[no-any-return]
    if array_api_compat.is_cupy_array(a):
        return _cupy.lu_factor(a)
    return _factor_standard(a)


def rcond(a: Array, lu: Array, pivots: Array) -> Array:
    """Estimate the reciprocal condition of A, rows and columns scaled, from its factors: 4 products and 4 solves."""
    xp = array_api_compat.array_namespace(a)
    zero = xp.any(xp.linalg.diagonal(lu) == 0, axis=-1)  # would be divided by
    a, lu = (xp.where(zero[..., None, None], identity(lu.shape[-1], lu), m) for m in (a, lu))
    size = xp.abs(a)
    found = singularity.scaled_rcond(
        lambda x, is_adjoint: matvec(xp.matrix_transpose(size) if is_adjoint else size, x),
        lambda x, is_adjoint: matvec(adjoint(a) if is_adjoint else a, x),
        lambda x, is_adjoint: lu_solve(lu, pivots, x[..., None], adjoint=is_adjoint)[..., 0],
        a[..., 0],
    )
    return xp.where(zero, xp.zeros_like(found), found)


def rcond_of_matrix(a: Array) -> Array:
    """Estimate the reciprocal condition of one matrix, rows and columns scaled."""
    return rcond(a, *_packed_in_units(a))


@compiled
def rcond_of_triangle(r: Array) -> Array:
    """Estimate the reciprocal condition of an upper triangular R whose columns are scaled to unit length."""
    xp = array_api_compat.array_namespace(r)
    size = safe_norm(xp.matrix_transpose(r))
    m = r * as_dtype(1 / xp.where(size > 0, size, xp.ones_like(size)), r)[..., None, :]
    # Zeros on the diagonal would be divided by.
    diagonal = xp.linalg.diagonal(m)
    zero = xp.any((diagonal == 0) | ~xp.isfinite(diagonal), axis=-1)
    m = xp.where(zero[..., None, None], identity(m.shape[-1], m), m)
    m_h = adjoint(m)

    def inverse(x: Array, is_adjoint: bool) -> Array:
        return solve_triangular(m_h if is_adjoint else m, x[..., None], lower=is_adjoint)[..., 0]

    found = singularity.rcond(lambda x, is_adjoint: matvec(m_h if is_adjoint else m, x), inverse, m[..., 0])
    return xp.where(zero, xp.zeros_like(found), found)


def _packed_in_units(a: Array) -> tuple[Array, Array]:
    """Return packed factors and pivots of finite matrices, chosen with the rows in one unit."""
    scale = _row_scale(a)
    lu, pivots = packed(as_dtype(scale, a)[..., None] * a)
    return _scaled_back(lu, pivots, scale), pivots


def _row_scale(a: Array) -> Array:
    """Return powers of two (..., n) for the rows of finite matrices: one unless the rows are in different units."""
    xp = array_api_compat.array_namespace(a)
    size = xp.abs(a)
    rows, _ = singularity.scales(
        lambda x, is_adjoint: matvec(xp.matrix_transpose(size) if is_adjoint else size, x), size[..., 0]
    )
    # Ratios of factors must stay in the range of exponents.
    most, largest = (2.0**100, 2.0**127) if eps(xp, a.dtype) > 2.0**-52 else (2.0**900, 2.0**1023)
    low = xp.min(rows, axis=-1, keepdims=True)
    low = xp.minimum(low, full((), largest / most / 2, low))
    rows = xp.minimum(rows, most * low)
    total = xp.sum(size / a.shape[-1], axis=-1)
    graded = ~(xp.max(total, axis=-1) <= UNITS * xp.min(total, axis=-1))
    return xp.where(graded[..., None], rows, xp.ones_like(rows))


def _scaled_back(lu: Array, pivots: Array, scale: Array) -> Array:
    """Turn factors of ``D A`` into those of A with the same pivots, ``P A = (E L E⁻¹) (E U)`` for ``E = P D⁻¹ Pᵀ``."""
    xp, n = array_api_compat.array_namespace(lu), lu.shape[-1]
    exchange = xp.broadcast_to(identity(n, lu), lu.shape)  # factors of the identity, with which a solve only permutes
    e = real(lu_solve(exchange, pivots, as_dtype(1 / scale, lu)[..., None]))  # the square of a complex one may overflow
    return xp.tril(lu, k=-1) * as_dtype(e / xp.matrix_transpose(e), lu) + xp.triu(lu) * as_dtype(e, lu)


def lu_solve(lu: Array, pivots: Array, b: Array, *, adjoint: bool = False) -> Array:
    """Return ``A⁻¹ B`` or ``A⁻ᴴ B`` of ``(..., n, k)`` with the batch axes of the factors; NaN factors give NaN."""
    if 0 in b.shape:
        return b
    if array_api_compat.is_numpy_array(lu):
        x = _solve_numpy(lu, pivots, b, adjoint)
    elif array_api_compat.is_torch_array(lu):
        from ddnref._kernels import torch as _torch

        x = _torch.lu_solve(lu, pivots + 1, b, adjoint)
    elif array_api_compat.is_jax_array(lu):
        import jax

        # In a second derivative pivots carry a tangent, and JAX cannot convert that to integers: drop it.
        pivots = jax.lax.stop_gradient(pivots.astype(lu.real.dtype)).astype(pivots.dtype)
        x = jax.scipy.linalg.lu_solve((lu, pivots), b, trans=2 if adjoint else 0)
    elif array_api_compat.is_cupy_array(lu):
        x = _cupy.lu_solve(lu, pivots, b, adjoint)
    else:
        x = _solve_standard(lu, pivots, b, adjoint)
    xp = array_api_compat.array_namespace(lu)
    return put_nan(x, xp.isnan(lu[..., :1, :1]))  # NaN factors may turn a zero right-hand side into zero


def solve_triangular(a: Array, b: Array, *, lower: bool, unit_diagonal: bool = False) -> Array:
    """Return ``A⁻¹ B`` of triangular ``(..., n, n)`` and ``(..., n, k)`` with equal batch axes.

    Only one triangle is read. A zero on the diagonal gives infinity or NaN.
    """
    if 0 in b.shape:
        return b
    if array_api_compat.is_torch_array(a):
        import torch

        return torch.linalg.solve_triangular(a, b, upper=not lower, unitriangular=unit_diagonal)
    if array_api_compat.is_jax_array(a):
        import jax

        return jax.lax.linalg.triangular_solve(a, b, left_side=True, lower=lower, unit_diagonal=unit_diagonal)
    if array_api_compat.is_cupy_array(a):
        return _cupy.solve_triangular(a, b, lower=lower, unit_diagonal=unit_diagonal)
    if array_api_compat.is_numpy_array(a):
        return _triangular_numpy(a, b, lower, unit_diagonal)
    return _triangular_standard(a, b, lower, unit_diagonal)


def unpack(lu: Array) -> tuple[Array, Array]:
    """Return the factors L, with ones on its diagonal, and U."""
    xp = array_api_compat.array_namespace(lu)
    return xp.tril(lu, k=-1) + identity(lu.shape[-1], lu), xp.triu(lu)


def lu_factor_vjp(lu_bar: Array, lu: Array, pivots: Array) -> Array:
    """Return the cotangent of the matrix from that of the packed factors; second derivatives pass through it."""
    return packed_lu_vjp(
        lu_bar,
        *unpack(lu),
        lambda u, b: solve_triangular(u, b, lower=False),
        lambda b: lu_solve(lu, pivots, b, adjoint=True),
    )


def lu_factor_jvp(a_dot: Array, lu: Array, pivots: Array) -> Array:
    """Return the tangent of the packed factors from that of the matrix; further derivatives pass through it."""
    return packed_lu_jvp(
        a_dot,
        *unpack(lu),
        lambda l_, b: solve_triangular(l_, b, lower=True),
        lambda b: lu_solve(lu, pivots, b),
    )


# --- NumPy: LAPACK, item by item --------------------------------------------------------------------------------


def _factor_numpy(a: Any) -> tuple[Array, Array, Array]:
    """Factor item by item, because NumPy's batched functions neither keep the factors nor compute in float32.

    Factors are stored by columns, as LAPACK wants them; stored by rows, each solve would copy them first.
    """
    *batch, n = a.shape[:-1]
    flat, singular = a.reshape(math.prod(batch), n, n), np.zeros(batch, dtype=bool)
    if not flat.size:
        return np.empty_like(a), np.empty(a.shape[:-1], np.int32), singular
    with np.errstate(all="ignore"):
        rows = np.vecdot(flat, flat).real  # squared lengths: one pass, without temporary arrays
        if in_one_unit(rows.min(), rows.max(), a.dtype):
            (lu, pivots, regular), failed = _factor_and_screen(flat, rows), np.zeros(len(flat), dtype=bool)
        else:
            lu, pivots, regular, failed = _factor_in_units(flat, rows)
        # Look closely at finite matrices that are not certainly regular.
        if not regular.all():
            near = ~(regular | failed)
            found = singularity.is_singular(rcond(flat[near], lu[near], pivots[near]))
            singular.reshape(-1)[near] = found
            lu[failed | singular.reshape(-1)] = np.nan
    # By columns: the array that is reshaped is the transposed one.
    return lu.mT.reshape(a.shape).mT, pivots.reshape(a.shape[:-1]), singular


def in_one_unit(low: Any, high: Any, dtype: Any) -> Any:
    """Return whether rows whose squared lengths lie between `low` and `high` are in one unit, and finite.

    Rows that are too small or too large to be squared count as being in different units.
    """
    info = np.finfo(dtype)
    return (high <= UNITS**2 * low) & (low > info.tiny / info.eps) & (high < math.inf)


def _factor_in_units(flat: Any, rows: Any) -> tuple[Any, Any, Any, Any]:
    """Factor items of which some have rows in different units, or are not finite; the last result flags these."""
    graded = ~in_one_unit(rows.min(axis=-1), rows.max(axis=-1), flat.dtype)
    failed = graded.copy()
    failed[graded] = ~np.isfinite(flat[graded]).all(axis=(-2, -1))
    graded &= ~failed
    scale, matrices = _row_scale(flat[graded]), flat.copy()
    matrices[graded] *= scale[..., None]
    rows[graded] = np.vecdot(matrices[graded], matrices[graded]).real
    lu, pivots, regular = _factor_and_screen(matrices, rows)
    lu[graded] = _scaled_back(lu[graded], pivots[graded], scale)
    return lu, pivots, regular & ~failed, failed


def _factor_and_screen(a: Any, rows: Any) -> tuple[Any, Any, Any]:
    """Return packed factors, pivots, and which matrices are certainly regular; `rows` has the rows' squared lengths.

    Two steps of inverse iteration find the smallest singular value of a nearly singular matrix. No scaling of rows and
    columns makes a well-conditioned matrix singular, so only the others have to be looked at with one.
    """
    items, n = a.shape[:2]
    if items == 1:
        lu, pivots, regular = factor_one(a[0], rows.sum())
        return lu.T[None].mT, pivots[None], np.asarray([regular])
    lu, pivots = _getrf(a)
    start, limit = probe_and_limit(a.dtype, n)
    x = np.empty((items, 1, n), a.dtype)
    x[...] = start
    x = _getrs(lu, pivots, x, False)
    y = _getrs(lu, pivots, x.copy(), True)
    before, after = np.vecdot(x, x).real[:, 0], np.vecdot(y, y).real[:, 0]
    growth = after / before
    # Squares that leave the range of exponents say nothing, and NaN is not below the limit.
    exact = np.minimum(before, after) > np.finfo(a.dtype).tiny
    regular = (growth * rows.sum(axis=-1) < limit) & exact
    # The Frobenius norm bounds the largest singular value, but may be √n times as large: two products are closer.
    if not regular.all():
        product = matvec(a, start)
        back = matvec(adjoint(a), product)
        size = np.vecdot(back, back).real / np.vecdot(product, product).real
        regular |= (growth * size < limit / 4) & exact
    return lu, pivots, regular


def factor_one(a: Any, square: Any) -> tuple[Any, Any, bool]:
    """`_factor_and_screen` for one matrix of squared norm `square`, by LAPACK and numbers, which cost the least."""
    getrf, getrs, length = lapack_functions(a.dtype)
    start, limit = probe_and_limit(a.dtype, len(a))
    lu, pivots, _ = getrf(transposed(a).T, overwrite_a=True)
    x = getrs(lu, pivots, start)[0]
    before = length(x)
    if not 0 < before < math.inf:
        return lu, pivots, False
    growth = (length(getrs(lu, pivots, x, trans=2)[0]) / before) ** 2
    if not growth * square < limit:
        x = a @ start
        square = 4 * (length(a.T.conj() @ x) / length(x)) ** 2
    return lu, pivots, bool(growth * square < limit)


@lru_cache(maxsize=8)
def lapack_functions(dtype: Any) -> tuple[Any, Any, Any]:
    """Return LAPACK's ``getrf`` and ``getrs``, and the length of a vector, for a dtype."""
    getrf, getrs = (scipy.linalg.get_lapack_funcs(name, dtype=dtype) for name in ("getrf", "getrs"))
    return getrf, getrs, scipy.linalg.get_blas_funcs("nrm2", dtype=dtype)


@lru_cache(maxsize=64)
def probe_and_limit(dtype: Any, n: int) -> tuple[Any, float]:
    """Return the vector with which `_factor_and_screen` starts, and the square of the condition that it accepts."""
    limit = 1 / (MARGIN * singularity.SINGULAR * float(np.finfo(dtype).eps))
    return singularity.probe(np.empty(n, dtype)), limit**2


def _getrf(a: Any) -> tuple[Any, Any]:
    """Factor the matrices ``(items, n, n)``."""
    getrf = lapack_functions(a.dtype)[0]
    lu = transposed(a).mT  # by columns, so that LAPACK overwrites it
    pivots = np.empty(a.shape[:-1], np.int32)
    for item, swaps in zip(lu, pivots, strict=True):
        swaps[:] = getrf(item, overwrite_a=True)[1]
    return lu, pivots


def _getrs(lu: Any, pivots: Any, rows: Any, adjoint: bool) -> Any:
    """Overwrite right-hand sides ``(items, k, n)`` by solutions."""
    getrs, trans = lapack_functions(rows.dtype)[1], 2 if adjoint else 0
    for factors, swaps, columns in zip(lu, pivots, rows.mT, strict=True):
        getrs(factors, swaps, columns, trans=trans, overwrite_b=True)
    return rows


def _solve_numpy(lu: Any, pivots: Any, b: Any, adjoint: bool) -> Any:
    n, k = b.shape[-2:]
    rows = np.array(b.mT, order="C")  # a right-hand side is a column, whose numbers LAPACK wants side by side
    flat = lu if lu.ndim == 3 else lu.mT.reshape(-1, n, n).mT
    return _getrs(flat, pivots.reshape(-1, n), rows.reshape(-1, k, n), adjoint).reshape(rows.shape).mT


def _triangular_numpy(a: Any, b: Any, lower: bool, unit_diagonal: bool) -> Any:
    trsm: Any = scipy.linalg.get_blas_funcs("trsm", (a, b))
    x, (n, k) = np.array(b, order="C"), b.shape[-2:]
    # BLAS reads by columns and sees transposes of what is stored by rows: Xᵀ Aᵀ = Bᵀ is solved in place. For a thousand
    # matrices of order 16 that takes a quarter of the time of A X = B, which copies each right-hand side in and out.
    by_columns = a.strides[-2] == a.itemsize
    factors = (a if by_columns else a.mT).reshape(-1, n, n)
    options = {"lower": lower == by_columns, "trans_a": by_columns, "diag": unit_diagonal}
    for factor, right in zip(factors, x.reshape(-1, n, k), strict=True):
        trsm(1.0, factor, right.T, side=1, overwrite_b=True, **options)
    return x


# --- any other library: nothing but the standard -------------------------------------------------------------


def _factor_standard(a: Array) -> tuple[Array, Array]:
    """Eliminate a whole batch at once, one column per step."""
    xp = array_api_compat.array_namespace(a)
    i = xp.arange(a.shape[-1], device=array_api_compat.device(a))
    pivots = []
    for k in range(a.shape[-1]):
        # Find the largest entry on or below the diagonal, and exchange its row with row k.
        size = xp.abs(a[..., :, k])
        p = xp.argmax(xp.where(i >= k, size, full((), -1.0, size)), axis=-1, keepdims=True)
        pivots.append(p)
        a = xp.take_along_axis(a, xp.broadcast_to(_swap(xp, i, k, p)[..., None], a.shape), axis=-2)
        # Store the multipliers below the diagonal and update the remaining block.
        below = i > k
        pivot = a[..., k, k][..., None]
        column = a[..., :, k] / xp.where(pivot == 0, xp.ones_like(pivot), pivot)
        column = xp.where(below, column, xp.zeros_like(column))
        row = xp.where(below, a[..., k, :], xp.zeros_like(column))
        a = a - column[..., :, None] * row[..., None, :]
        a = xp.where(below[:, None] & (i == k), column[..., :, None], a)
    joined = xp.concat(pivots, axis=-1) if pivots else xp.zeros(a.shape[:-1], dtype=i.dtype, device=i.device)
    return a, xp.astype(joined, xp.int32)


def _swap(xp: Namespace, i: Array, k: int, p: Array) -> Array:
    """Return the row numbers `i` with k and p exchanged."""
    return xp.where(i == k, p, xp.where(i == p, k, i))


def _solve_standard(lu: Array, pivots: Array, b: Array, is_adjoint: bool) -> Array:
    xp = array_api_compat.array_namespace(lu)
    i = xp.arange(lu.shape[-1], device=array_api_compat.device(lu))
    # Turn the sequence of exchanges into one permutation of the rows.
    order = xp.broadcast_to(i, pivots.shape)
    for k in range(lu.shape[-1]):
        order = xp.take_along_axis(order, _swap(xp, i, k, xp.astype(pivots[..., k][..., None], i.dtype)), axis=-1)
    if is_adjoint:
        y = solve_triangular(adjoint(lu), b, lower=True)
        y = solve_triangular(adjoint(lu), y, lower=False, unit_diagonal=True)
        back = xp.argsort(order, axis=-1)
        return xp.take_along_axis(y, xp.broadcast_to(back[..., None], y.shape), axis=-2)
    b = xp.take_along_axis(b, xp.broadcast_to(order[..., None], b.shape), axis=-2)
    return solve_triangular(lu, solve_triangular(lu, b, lower=True, unit_diagonal=True), lower=False)


def _triangular_standard(a: Array, b: Array, lower: bool, unit_diagonal: bool) -> Array:
    """Substitute, one unknown per step."""
    xp = array_api_compat.array_namespace(a)
    n, diagonal = a.shape[-1], xp.linalg.diagonal(a)
    a = xp.tril(a, k=-1) if lower else xp.triu(a, k=1)
    rows: dict[int, Array] = {}
    for k in range(n) if lower else range(n - 1, -1, -1):
        rows[k] = b[..., k, :] if unit_diagonal else b[..., k, :] / diagonal[..., k][..., None]
        b = b - a[..., :, k][..., None] * rows[k][..., None, :]
    return xp.stack([rows[k] for k in range(n)], axis=-2)
