"""LU factors of one symmetric block, and solves with them: those of `ddnref._kernels.lu`, without its checks on NumPy.

A block of a layer is small: there the checks and copies that a public function owes its user take longer than LAPACK
(64×64 and one right-hand side, factors and solution: 53 µs there, 23 here; `timeit`, best of 40 runs of 50 calls, one
thread). What is singular shows in the residual of the solution.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy

from ddnref._core.arrays import Array, full
from ddnref._kernels import lu as _lu
from ddnref.curvature.hessian._dense_blocks import space


class Lu(NamedTuple):
    """Factors of a block D."""

    factors: Array
    """L and U in one matrix."""
    swaps: Array
    """Row k was exchanged with this one, counted from 0."""


def lu(d: Array) -> Lu:
    """Factors of D; a singular block shows as infinity or NaN in what is solved with it."""
    if type(d) is np.ndarray:
        lapack = scipy.linalg.lapack
        getrf = lapack.dgetrf if d.dtype == np.float64 else lapack.sgetrf
        factors, swaps, _ = getrf(d if d.flags.f_contiguous else d.T)  # by columns without a copy: D is symmetric
        return Lu(factors, swaps)
    factors, swaps, _ = _lu.lu_factor(d)
    return Lu(factors, swaps)


def lu_solve(f: Lu, b: Array) -> Array:
    """``D⁻¹ B`` for a matrix B."""
    if type(b) is np.ndarray:
        lapack = scipy.linalg.lapack
        getrs = lapack.dgetrs if b.dtype == np.float64 else lapack.sgetrs
        return getrs(f.factors, f.swaps, b)[0] if b.size else b
    return _lu.lu_solve(f.factors, f.swaps, b)


def lu_and_solution(d: Array, b: Array) -> tuple[Lu, Array]:
    """Factors of D and ``D⁻¹ B``: on NumPy by one call of LAPACK, which takes no threads for a small block."""
    if type(d) is np.ndarray and d.size:
        lapack = scipy.linalg.lapack
        gesv = lapack.dgesv if d.dtype == np.float64 else lapack.sgesv
        factors, swaps, x, singular = gesv(d if d.flags.f_contiguous else d.T, b)
        return Lu(factors, swaps), np.full_like(x, np.nan) if singular else x
    f = lu(d)
    return f, lu_solve(f, b)


def lu_slogdet(f: Lu) -> tuple[Array, Array]:
    """Sign and ``log|det D|``; minus infinity where D is exactly singular."""
    xp = space(f.factors)
    diagonal = xp.linalg.diagonal(f.factors)
    i = xp.arange(diagonal.shape[0], dtype=f.swaps.dtype, device=f.swaps.device)
    flips = xp.where(f.swaps != i, full((), -1.0, diagonal), full((), 1.0, diagonal))
    sign, log = triangular_slogdet(diagonal)
    return sign * xp.prod(flips), log


def triangular_slogdet(diagonal: Array) -> tuple[Array, Array]:
    """Of a triangular matrix with that diagonal."""
    xp = space(diagonal)
    size = xp.abs(diagonal)
    log = xp.sum(xp.log(xp.where(size == 0, xp.ones_like(size), size)))
    return xp.prod(xp.sign(diagonal)), xp.where(xp.any(size == 0), full((), float("-inf"), log), log)


def solve_upper(r: Array, b: Array) -> Array:
    """``R⁻¹ B`` for an upper triangular R; infinity or NaN where its diagonal has a zero."""
    return _lu.solve_triangular(r, b, lower=False)
