"""Cholesky factorisation ``A = L Lᴴ``, in one form for every array library.

NumPy arrays use SciPy's LAPACK, CuPy arrays cuSOLVER, PyTorch and JAX arrays their libraries' own functions, and all
others a form in nothing but the standard. An item that is not finite or not positive definite comes out as NaN and
leaves the others alone.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat
import numpy as np
import scipy

from ddnref._core.arrays import Array, adjoint, eps, full, nan_where, real
from ddnref._kernels import cupy as _cupy
from ddnref._kernels import singularity
from ddnref._kernels.compiled import compiled
from ddnref._kernels.dense import identity
from ddnref._kernels.lu import rcond_of_triangle, solve_triangular

SMALL = 32
"""Up to this order NumPy's loop over a batch is faster than calls of LAPACK: half of the time at (1000, 16)."""
MARGIN = 4
"""How much closer to regular than the criterion the quick test of NumPy must be."""


def cholesky(a: Array) -> tuple[Array, Array]:
    """Return the lower factors of exactly Hermitian ``(..., m, m)``, and which items are not positive definite.

    An item counts as not positive definite where a pivot is not positive, or where the matrix is singular to working
    precision: ``rcond <= 16 eps`` with the rows and columns scaled to a unit diagonal. Items that are not finite are
    NaN and do not count. Reads nothing on the host, except on NumPy.
    """
    # NumPy looks closely only at items that a cheaper test suspects.
    return _factor_numpy(a) if array_api_compat.is_numpy_array(a) else _factor_and_judge(a)


@compiled
def _factor_and_judge(a: Array) -> tuple[Array, Array]:
    xp = array_api_compat.array_namespace(a)
    finite = xp.all(xp.isfinite(a), axis=(-2, -1))
    if 0 in a.shape:
        return a, ~finite
    a = xp.where(finite[..., None, None], a, identity(a.shape[-1], a))
    l_ = _factor(a)
    # A factor that was not completed holds NaN, or a pivot that is not positive.
    pivots = real(xp.linalg.diagonal(l_))
    broken = ~(xp.all(xp.isfinite(l_), axis=(-2, -1)) & xp.all(pivots > 0, axis=-1))
    l_ = xp.where(broken[..., None, None], identity(a.shape[-1], a), l_)
    indefinite = broken | _is_singular(l_)
    return nan_where((indefinite | ~finite)[..., None, None], l_), indefinite


def _is_singular(l_: Array) -> Array:
    """Judge ``A = L Lᴴ`` with a unit diagonal, whose condition is the square of that of ``Lᴴ`` with unit columns."""
    return singularity.is_singular(rcond_of_triangle(adjoint(l_)) ** 2)


def _factor(a: Array) -> Array:
    """Return lower factors of finite matrices by the library's own function; anything where there is no factor."""
    if array_api_compat.is_torch_array(a):
        import torch

        l_, broken = torch.linalg.cholesky_ex(a)
        return nan_where((broken != 0)[..., None, None], l_)
    if array_api_compat.is_jax_array(a):
        import jax

        return jax.lax.linalg.cholesky(a, symmetrize_input=False)
    if array_api_compat.is_cupy_array(a):
        return _cupy.cholesky(a)
    return _factor_standard(a)


def _factor_standard(a: Array) -> Array:
    """Factor a whole batch at once, one column per step."""
    xp = array_api_compat.array_namespace(a)
    n = a.shape[-1]
    i = xp.arange(n, device=array_api_compat.device(a))
    zero, columns = full((), 0.0, a), []
    for k in range(n):
        # A pivot that is not positive has a root of NaN, which all that follows inherits.
        pivot = real(a[..., k, k])
        root = xp.sqrt(xp.where(pivot > 0, pivot, full((), float("nan"), pivot)))
        root = xp.astype(root, a.dtype)[..., None]
        column = xp.where(i > k, a[..., :, k] / root, xp.where(i == k, root, zero))
        columns.append(column)
        a = a - column[..., :, None] * adjoint(column[..., :, None])
    return xp.stack(columns, axis=-1)


def inverse_of_factor(l_: Array) -> Array:
    """Return the inverses of lower triangular ``(..., m, m)``, lower triangular; NaN items give NaN.

    NumPy inverts a batch at once, which its own pool of threads does. SciPy's triangular solves start a second pool,
    and the decomposition that comes next then takes several times as long (five matrices of 32×32, two threads).
    """
    xp = array_api_compat.array_namespace(l_)
    if array_api_compat.is_numpy_array(l_):
        return xp.tril(xp.linalg.inv(l_))
    eye = xp.broadcast_to(identity(l_.shape[-1], l_), l_.shape)
    return solve_triangular(l_, eye, lower=True)


# --- NumPy: LAPACK, item by item --------------------------------------------------------------------------------


def _factor_numpy(a: Any) -> tuple[Array, Array]:
    """Factor small matrices by NumPy, and larger ones by LAPACK, because NumPy computes float32 in double precision."""
    n = a.shape[-1]
    flat = a.reshape(math.prod(a.shape[:-2]), n, n)
    indefinite = np.zeros(len(flat), dtype=bool)
    l_ = np.zeros_like(flat)
    if not flat.size:
        return l_.reshape(a.shape), indefinite.reshape(a.shape[:-2])
    finite = np.isfinite(flat).all(axis=(-2, -1))
    if not finite.all():
        flat = np.where(finite[:, None, None], flat, np.eye(n, dtype=a.dtype))
    if n <= SMALL:
        _factor_part(flat, l_, indefinite, slice(0, len(flat)))
    else:
        potrf: Any = scipy.linalg.get_lapack_funcs("potrf", (a,))
        for i, item in enumerate(flat):
            # LAPACK reads by columns and sees the transpose: Aᵀ = Uᴴ U gives L = Uᵀ.
            u, broken = potrf(item.T, lower=False, clean=True)
            l_[i], indefinite[i] = u.T, broken != 0
    # With a unit diagonal, the smallest eigenvalue is at least the determinant over e, and the largest at most n.
    l_[indefinite] = np.eye(n)
    with np.errstate(divide="ignore", invalid="ignore"):  # a diagonal of an indefinite item may be zero or negative
        squares = np.einsum("...ii->...i", l_).real ** 2 / np.einsum("...ii->...i", flat).real
        size = np.sum(np.log(squares), axis=-1)
    limit = math.log(MARGIN * singularity.SINGULAR * eps(np, a.dtype) * math.e * n)
    suspects = np.flatnonzero(finite & ~indefinite & ~(size > limit))
    if suspects.size:
        indefinite[suspects] = _is_singular(l_[suspects])
    l_[indefinite | ~finite] = np.nan
    return l_.reshape(a.shape), indefinite.reshape(a.shape[:-2])


def _factor_part(flat: Any, l_: Any, indefinite: Any, part: slice) -> None:
    """Factor a part of the batch by NumPy, which does not say which item it raises for: then try both halves."""
    try:
        l_[part] = np.linalg.cholesky(flat[part])
    except np.linalg.LinAlgError:
        middle = (part.start + part.stop) // 2
        if middle == part.start:
            indefinite[part] = True
        else:
            _factor_part(flat, l_, indefinite, slice(part.start, middle))
            _factor_part(flat, l_, indefinite, slice(middle, part.stop))
