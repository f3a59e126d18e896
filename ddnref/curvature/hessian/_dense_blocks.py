"""Small steps that every layer takes several times, where the price of a call is most of the price.

Measured on a net of 400 layers of width 64: asking ``array_namespace`` and ``matrix_transpose`` as everywhere else
takes a quarter of the time of a factorisation, and adding a diagonal by way of the identity another eighth.
"""

from __future__ import annotations

import numpy as np
import scipy

from ddnref._core.arrays import Array
from ddnref._core.arrays import namespace_of as space
from ddnref._kernels import numpy as _numpy
from ddnref._kernels.dense import identity
from ddnref._kernels.vectors import dot as inner_product


def t(x: Array) -> Array:
    """The transpose of the last two axes."""
    return x.mT if type(x) is np.ndarray else space(x).matrix_transpose(x)


def add_diagonal(m: Array, d: Array | float) -> Array:
    """``M + diag(d)``; on NumPy M itself, which the caller has just made, overwritten."""
    if type(m) is np.ndarray:
        diagonal = np.einsum("ii->i", m)  # a view, whatever the order of M in memory
        diagonal += d
        return m
    return m + identity(m.shape[0], m) * d


def dot(u: Array, v: Array) -> Array:
    """``Σ u v`` over the last two axes."""
    return inner_product(u, v, 2)


def matmul(a: Array, b: Array) -> Array:
    """``A B`` of two matrices: on NumPy those that take threads by SciPy's BLAS, whose pool then solves with them too.

    Two pools wait for each other: 200 layers of width 128 took six times as long.
    """
    if type(a) is not np.ndarray or a.shape[0] * a.shape[1] * b.shape[1] <= _numpy.BLAS_THREADS:
        return a @ b
    gemm = scipy.linalg.blas.dgemm if a.dtype == np.float64 else scipy.linalg.blas.sgemm
    (left, trans_a), (right, trans_b) = ((x, 0) if x.flags.f_contiguous else (x.T, 1) for x in (a, b))
    return gemm(1.0, left, right, trans_a=trans_a, trans_b=trans_b)


def repeated(x: Array, k: int) -> Array:
    """The same matrix for each of k vectors, ``(k, ...)``; not by ``broadcast_to`` for one, which takes 6 µs."""
    return x[None, ...] if k == 1 else space(x).broadcast_to(x, (k, *x.shape))


def flat(x: Array) -> Array:
    """All entries in one axis."""
    return space(x).reshape(x, (-1,))


def symmetric(x: Array) -> Array:
    """``½ (X + Xᵀ)``."""
    return (x + t(x)) / 2


__all__ = ["add_diagonal", "dot", "flat", "matmul", "repeated", "space", "symmetric", "t"]
