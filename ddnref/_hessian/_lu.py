"""LU factors of one square block, and solves with them: LAPACK for NumPy, a library's own form, or the inverse."""

from __future__ import annotations

from typing import NamedTuple

import array_api_compat
import numpy as np
from numpy.linalg import LinAlgError
from scipy.linalg import lapack

from ddnref._array import Array, full


class Lu(NamedTuple):
    """Factors of a block D."""

    factors: Array
    """L and U in one matrix; D⁻¹ itself where the library has no LU."""
    swaps: Array
    """Row interchanges as LAPACK gives them, counted from `first`; ``None`` where `factors` is the inverse."""
    first: int
    logdet: tuple[Array, Array] | None
    """Sign and logarithm of ``|det D|`` where they cannot be read off `factors`."""


def lu(d: Array) -> Lu:
    """Factors of D; a singular block shows as infinity or NaN in what is solved with it."""
    if array_api_compat.is_numpy_array(d):
        getrf = lapack.dgetrf if d.dtype == np.float64 else lapack.sgetrf
        factors, swaps, _ = getrf(d.T)  # column-major without a copy: D is symmetric
        return Lu(factors, swaps, 0, None)
    if array_api_compat.is_torch_array(d):
        import torch

        factors, swaps, _ = torch.linalg.lu_factor_ex(d)
        return Lu(factors, swaps, 1, None)
    if array_api_compat.is_jax_array(d):
        from jax.scipy.linalg import lu_factor

        factors, swaps = lu_factor(d)
        return Lu(factors, swaps, 0, None)
    if array_api_compat.is_cupy_array(d):
        from cupyx.scipy.linalg import lu_factor

        factors, swaps = lu_factor(d, check_finite=False)
        return Lu(factors, swaps, 0, None)
    return _inverted(d)


def _inverted(d: Array) -> Lu:
    xp = array_api_compat.array_namespace(d)
    try:
        inverse = xp.linalg.inv(d)
    except LinAlgError:
        inverse = full(tuple(d.shape), float("nan"), d)
    return Lu(inverse, None, 0, tuple(xp.linalg.slogdet(d)))


def lu_solve(f: Lu, b: Array) -> Array:
    """``D⁻¹ B`` for a matrix B."""
    if f.swaps is None:
        return f.factors @ b
    if array_api_compat.is_numpy_array(b):
        getrs = lapack.dgetrs if b.dtype == np.float64 else lapack.sgetrs
        return getrs(f.factors, f.swaps, b)[0] if b.size else b
    if array_api_compat.is_torch_array(b):
        import torch

        return torch.linalg.lu_solve(f.factors, f.swaps, b)
    if array_api_compat.is_jax_array(b):
        from jax.scipy.linalg import lu_solve as solve
    else:
        from cupyx.scipy.linalg import lu_solve as solve
    return solve((f.factors, f.swaps), b)


def lu_slogdet(f: Lu) -> tuple[Array, Array]:
    """Sign and ``log|det D|``; a sign of zero where D is exactly singular."""
    xp = array_api_compat.array_namespace(f.factors)
    if f.logdet is not None:
        return f.logdet
    n = f.factors.shape[-1]
    i = xp.arange(n, device=array_api_compat.device(f.factors))
    diagonal = xp.sum(xp.where(i[:, None] == i[None, :], f.factors, xp.zeros_like(f.factors)), axis=0)
    moved = xp.astype(f.swaps, i.dtype) - f.first != i
    flips = xp.where(moved, full((n,), -1.0, diagonal), full((n,), 1.0, diagonal))
    size = xp.abs(diagonal)
    logarithms = xp.log(xp.where(size > 0, size, xp.ones_like(size)))
    log = xp.where(xp.all(size > 0) | xp.any(xp.isnan(size)), xp.sum(logarithms), full((), float("-inf"), size))
    return xp.prod(xp.sign(diagonal) * flips), log


def solve_upper(r: Array, b: Array) -> Array:
    """``R⁻¹ B`` for an upper triangular R; infinity or NaN where its diagonal has a zero."""
    if array_api_compat.is_numpy_array(r):
        trtrs = lapack.dtrtrs if r.dtype == np.float64 else lapack.strtrs
        if not b.size:
            return b
        x, info = trtrs(r, b)
        return x if info == 0 else full(b.shape, float("nan"), b)
    if array_api_compat.is_torch_array(r):
        import torch

        return torch.linalg.solve_triangular(r, b, upper=True)
    if array_api_compat.is_jax_array(r):
        from jax.scipy.linalg import solve_triangular

        return solve_triangular(r, b)
    if array_api_compat.is_cupy_array(r):
        from cupyx.scipy.linalg import solve_triangular

        return solve_triangular(r, b, check_finite=False)
    return lu_solve(lu(r), b)
