"""Products, diagonals and LU factors of single small matrices, for eliminations that visit hundreds of blocks.

Each function takes one real matrix, not a batch; only the log-determinants take batches, real or complex. The general
forms in `dense` and `lu` check and copy what they are given, which takes longer than LAPACK on a small block: factors
and solution of a 64×64 block with one right-hand side take 53 µs there and 23 µs here (`timeit`, best of 40 runs of 50
calls, one thread).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import array_api_compat
import numpy as np
import scipy

from ddnref._core.arrays import Array, as_dtype, eps, full, index_dtype, namespace_of
from ddnref._kernels import cholesky as _cholesky
from ddnref._kernels import lu as _lu
from ddnref._kernels import numpy as _numpy
from ddnref._kernels.dense import identity

TILE = 128  # order of the tiles in which a triangle is copied to the other, which stay in the cache


def add_diagonal(m: Array, d: Array | float) -> Array:
    """Return ``M + diag(d)``; on NumPy M itself, overwritten, so that only the caller may hold it."""
    if type(m) is np.ndarray:
        diagonal = np.einsum("ii->i", m)  # a view, whatever the order of M in memory
        diagonal += d
        return m
    return m + identity(m.shape[0], m) * d


def matmul(a: Array, b: Array) -> Array:
    """Return ``A B``; on NumPy, products large enough for threads use SciPy's BLAS, as the LU factors do.

    NumPy and SciPy have separate pools of threads, which wait for each other when products alternate with LU: 200
    layers of width 128 took six times as long.
    """
    if type(a) is not np.ndarray or a.shape[0] * a.shape[1] * b.shape[1] <= _numpy.BLAS_THREADS:
        return a @ b
    gemm = scipy.linalg.blas.dgemm if a.dtype == np.float64 else scipy.linalg.blas.sgemm
    # BLAS reads by columns: a matrix stored by rows is passed as its transpose, without a copy.
    (left, trans_a), (right, trans_b) = ((x, 0) if x.flags.f_contiguous else (x.T, 1) for x in (a, b))
    return gemm(1.0, left, right, trans_a=trans_a, trans_b=trans_b)


# --- LU factors of a symmetric block ----------------------------------------------------------------------------------


class Lu(NamedTuple):
    """LU factors of a symmetric block D, with row exchanges."""

    factors: Array  # L and U in one matrix
    swaps: Array  # step k exchanged row k with this row, counted from 0


def lu(d: Array) -> Lu:
    """Factor a symmetric block; if it is singular, what is solved with the factors is infinite or NaN."""
    if 0 in d.shape:
        return Lu(d, namespace_of(d).zeros((0,), dtype=index_dtype(d), device=array_api_compat.device(d)))
    if type(d) is np.ndarray:
        getrf = scipy.linalg.lapack.dgetrf if d.dtype == np.float64 else scipy.linalg.lapack.sgetrf
        # D is symmetric, so that its transpose gives LAPACK columns without a copy.
        factors, swaps, _ = getrf(d if d.flags.f_contiguous else d.T)
        return Lu(factors, swaps)
    return Lu(*_lu.packed(d))


def lu_solve(f: Lu, b: Array) -> Array:
    """Return ``D⁻¹ B`` for a matrix B."""
    if type(b) is np.ndarray:
        getrs = scipy.linalg.lapack.dgetrs if b.dtype == np.float64 else scipy.linalg.lapack.sgetrs
        return getrs(f.factors, f.swaps, b)[0] if b.size else b
    return _lu.lu_solve(f.factors, f.swaps, b)


def lu_and_solution(d: Array, b: Array) -> tuple[Lu, Array]:
    """Return the factors of D and ``D⁻¹ B``; on NumPy one call of LAPACK, which starts no threads if D is small."""
    if type(d) is np.ndarray and b.size:  # LAPACK writes where it must not for no right-hand side
        gesv = scipy.linalg.lapack.dgesv if d.dtype == np.float64 else scipy.linalg.lapack.sgesv
        factors, swaps, x, singular = gesv(d if d.flags.f_contiguous else d.T, b)
        return Lu(factors, swaps), np.full_like(x, np.nan) if singular else x
    f = lu(d)
    return f, lu_solve(f, b)


def cholesky(d: Array) -> tuple[Array, Array]:
    """Return the lower factor of a symmetric block, and whether it is positive definite; on NumPy D is overwritten.

    It counts as positive definite if all pivots exceed 16 eps of their diagonal entry. The factor's upper triangle is
    not to be read.
    """
    xp = namespace_of(d)
    diagonal = xp.linalg.diagonal(d) + 0
    if type(d) is np.ndarray:
        potrf = scipy.linalg.lapack.dpotrf if d.dtype == np.float64 else scipy.linalg.lapack.spotrf
        factor, stopped = (
            potrf(d if d.flags.f_contiguous else d.T, lower=1, clean=0, overwrite_a=1) if d.size else (d, 0)
        )
        if stopped:
            return factor, np.asarray(False)
    else:
        factor, _ = _cholesky.cholesky(d)
    # NaN, where another library has found no factor, compares as false.
    pivots = xp.linalg.diagonal(factor)
    return factor, xp.all(pivots * pivots > 16 * eps(xp, d.dtype) * diagonal)


def forward_substitution(l_: Array, b: Array) -> Array:
    """Return ``L⁻¹ B`` for a lower factor and a matrix B, which NumPy overwrites."""
    if 0 in b.shape:
        return b
    if type(b) is not np.ndarray:
        return _lu.solve_triangular(l_, b, lower=True)
    trsm = scipy.linalg.blas.dtrsm if b.dtype == np.float64 else scipy.linalg.blas.strsm
    # BLAS reads by columns: B stored by rows is solved for as its transpose, Xᵀ Lᵀ = Bᵀ.
    by_rows = not b.flags.f_contiguous
    l_t = not l_.flags.f_contiguous
    options = {"side": by_rows, "lower": not l_t, "trans_a": by_rows != l_t, "overwrite_b": 1}
    x = trsm(1.0, l_.T if l_t else l_, b.T if by_rows else b, **options)
    return x.T if by_rows else x


def minus_gram(p: Array, x: Array) -> Array:
    """Return ``P − XᵀX`` for a symmetric P, exactly symmetric; NumPy overwrites P."""
    if 0 in x.shape:
        return p
    if type(p) is not np.ndarray:
        p = p - x.mT @ x
        return (p + p.mT) / 2
    syrk = scipy.linalg.blas.dsyrk if p.dtype == np.float64 else scipy.linalg.blas.ssyrk
    # P is symmetric and may be read either way; of X, BLAS gets the order that it has in memory.
    by_columns = x.flags.f_contiguous
    c = p if p.flags.f_contiguous else p.T
    c = syrk(-1.0, x if by_columns else x.T, beta=1.0, c=c, trans=by_columns, lower=1, overwrite_c=1)
    return _mirrored(c)


def _mirrored(c: np.ndarray) -> np.ndarray:
    """Copy the lower triangle of a matrix to the upper one, in tiles, in place."""
    n = c.shape[0]
    for i in range(0, n, TILE):
        j = min(i + TILE, n)
        c[i:j, j:] = c[j:, i:j].T
        np.copyto(c[i:j, i:j], c[i:j, i:j].T.copy(), where=_above(j - i))
    return c


@cache
def _above(n: int) -> np.ndarray:
    """Mark what is above the diagonal."""
    return ~np.tri(n, dtype=bool)


def lu_slogdet(f: Lu) -> tuple[Array, Array]:
    """Return sign and ``log|det D|`` of one matrix or a batch; minus infinity where a pivot is exactly zero."""
    xp = namespace_of(f.factors)
    sign, log = triangular_slogdet(f.factors)
    # Every exchange of two different rows changes the sign.
    i = xp.arange(f.swaps.shape[-1], dtype=f.swaps.dtype, device=array_api_compat.device(f.swaps))
    return sign * xp.prod(xp.where(f.swaps != i, full((), -1.0, sign), full((), 1.0, sign)), axis=-1), log


def triangular_slogdet(r: Array) -> tuple[Array, Array]:
    """Return sign and log-determinant of triangular matrices, real or complex, from their diagonals alone."""
    xp = namespace_of(r)
    diagonal = xp.linalg.diagonal(r)
    size = xp.abs(diagonal)
    # A zero on the diagonal is left out of the logarithms, which would warn, and put in at the end.
    zero = size == 0
    size = xp.where(zero, xp.ones_like(size), size)
    log = xp.sum(xp.log(size), axis=-1)
    sign = xp.prod(diagonal / as_dtype(size, diagonal), axis=-1)
    return sign, xp.where(xp.any(zero, axis=-1), full((), float("-inf"), log), log)
