"""LU factorisation with partial pivoting, and triangular systems, in one form for every array library.

``P A = L U`` with both factors packed in one array, as in LAPACK. ``pivots[k]`` is the row, counted from 0, that step k
exchanged with row k. NumPy arrays use SciPy's LAPACK, CuPy arrays cuBLAS, PyTorch and JAX arrays their libraries' own
functions, and all others a form in nothing but the standard. An item that is not finite or is singular comes out as NaN
and leaves the others alone.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat
import numpy as np
import scipy

from ddnref._core.arrays import Array, Namespace, adjoint, full, nan_where
from ddnref._kernels import cupy as _cupy
from ddnref._kernels import singularity
from ddnref._kernels.dense import identity
from ddnref._kernels.lu_vjp import packed_lu_vjp


def lu_factor(a: Array) -> tuple[Array, Array, Array]:
    """Return packed factors and pivots of ``(..., n, n)``, and which items are singular, ``(...)``.

    An item counts as singular if a pivot is no larger than the rounding of the sum that it was computed as,
    ``|u_jj| <= 64 eps Σ_k |l_jk| |u_kj|``, a criterion that does not depend on the scale of rows and columns. Items
    that are not finite are NaN and do not count as singular. Reads nothing on the host, except on NumPy.
    """
    # NumPy judges each item as it is factored, which needs no further pass.
    if array_api_compat.is_numpy_array(a):
        return _factor_numpy(a)
    xp = array_api_compat.array_namespace(a)
    finite = xp.all(xp.isfinite(a), axis=(-2, -1))
    a = xp.where(finite[..., None, None], a, identity(a.shape[-1], a))
    lu, pivots = _factor(a)
    singular = singularity.pivots(lu)
    return nan_where((singular | ~finite)[..., None, None], lu), pivots, singular


def lu_solve(lu: Array, pivots: Array, b: Array, *, adjoint: bool = False) -> Array:
    """Return ``A⁻¹ B`` or ``A⁻ᴴ B`` of ``(..., n, k)`` with the batch axes of the factors; NaN factors give NaN."""
    if 0 in b.shape:
        return b
    if array_api_compat.is_numpy_array(lu):
        x = _solve_numpy(lu, pivots, b, adjoint)
    elif array_api_compat.is_torch_array(lu):
        import torch

        x = torch.linalg.lu_solve(lu, pivots + 1, b, adjoint=adjoint)
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
    return nan_where(xp.isnan(lu[..., :1, :1]), x)  # NaN factors may turn a zero right-hand side into zero


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


def _factor(a: Array) -> tuple[Array, Array]:
    """Factor finite items on any library but NumPy."""
    if array_api_compat.is_torch_array(a):
        from ddnref._kernels import torch as _torch

        lu, pivots, _ = _torch.lu_factor(a)
        return lu, pivots - 1
    if array_api_compat.is_jax_array(a):
        import jax

        # JAX counts pivots from 0 already.
        lu, pivots = jax.scipy.linalg.lu_factor(a)
        return lu, pivots
    if array_api_compat.is_cupy_array(a):
        return _cupy.lu_factor(a)
    return _factor_standard(a)


# --- NumPy: LAPACK, item by item --------------------------------------------------------------------------------


def _factor_numpy(a: Any) -> tuple[Array, Array, Array]:
    """Factor item by item, because NumPy's batched functions neither keep the factors nor compute in float32.

    Factors are stored by columns, as LAPACK wants them; stored by rows, each solve would copy them first.
    """
    *batch, n = a.shape[:-1]
    flat = a.reshape(math.prod(batch), n, n)
    alone = len(flat) == 1 and n > 0  # without a copy of what LAPACK wrote: 0.1 of the time at n = 1000
    lu_t, pivots = np.empty((0 if alone else len(flat), n, n), a.dtype), np.empty(flat.shape[:-1], np.int32)
    singular = np.zeros(len(flat), dtype=bool)
    getrf: Any = scipy.linalg.get_lapack_funcs("getrf", (a,))
    for i, item in enumerate(flat if n else ()):
        lu, pivots[i], info = getrf(item)
        with np.errstate(over="ignore", invalid="ignore"):
            singular[i], finite = _judge(lu, info)
        if singular[i] or not finite:
            lu[...] = np.nan
        if alone:
            lu_t = lu.T[None]
        else:
            lu_t[i] = lu.T
    return lu_t.reshape(a.shape).mT, pivots.reshape(a.shape[:-1]), singular.reshape(batch)


def _judge(lu: Any, info: int) -> tuple[bool, bool]:
    """Return what `singularity.pivots` does for one item, and whether it is finite, from little more than one pass.

    No entry of L exceeds 1, so that ``Σ_k |l_jk| |u_kj| <= √n ‖U‖_F``. Only pivots below that bound need their sum.
    """
    flat = lu.ravel(order="K")
    square = float(np.vdot(flat, flat).real)
    size = square**0.5
    if not 1e-20 < square < np.inf:  # squares may have left the range of exponents
        size = float(abs(flat).max(initial=0.0)) * flat.size**0.5
        if not size < np.inf:
            return False, False
    rounding = singularity.PIVOT * float(np.finfo(lu.dtype).eps)
    pivot = abs(lu.diagonal())
    suspects = np.flatnonzero(pivot <= rounding * len(lu) ** 0.5 * size)
    terms = (abs(lu[j, :j]) @ abs(lu[:j, j]) for j in suspects)
    return info > 0 or any(pivot[j] <= rounding * t for j, t in zip(suspects, terms, strict=True)), True


def _solve_numpy(lu: Any, pivots: Any, b: Any, adjoint: bool) -> Any:
    # LAPACK solves all right-hand sides of an item at a time.
    getrs: Any = scipy.linalg.get_lapack_funcs("getrs", (lu, b))
    n, k = b.shape[-2:]
    x_t = np.empty((*b.shape[:-2], k, n), b.dtype)
    for item in np.ndindex(b.shape[:-2]):
        x_t[item] = getrs(lu[item], pivots[item], b[item], trans=2 if adjoint else 0)[0].T
    return x_t.mT


def _triangular_numpy(a: Any, b: Any, lower: bool, unit_diagonal: bool) -> Any:
    trsm: Any = scipy.linalg.get_blas_funcs("trsm", (a, b))
    x = np.empty_like(b)
    for item in np.ndindex(b.shape[:-2]):
        # BLAS reads by columns: a row-major factor is its transpose.
        by_columns = a[item].flags.f_contiguous
        factor = a[item] if by_columns else a[item].T
        x[item] = trsm(1.0, factor, b[item], lower=lower == by_columns, trans_a=not by_columns, diag=unit_diagonal)
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
    """Substitute, one row per step."""
    xp = array_api_compat.array_namespace(a)
    n = a.shape[-1]
    rows: dict[int, Array] = {}
    for k in range(n) if lower else range(n - 1, -1, -1):
        total = b[..., k, :]
        # Subtract what is known, then divide by the diagonal.
        for j, x in rows.items():
            total = total - a[..., k, j][..., None] * x
        rows[k] = total if unit_diagonal else total / a[..., k, k][..., None]
    return xp.stack([rows[k] for k in range(n)], axis=-2)
