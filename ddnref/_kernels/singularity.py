"""The criteria by which something counts as singular, each in one place with its constant.

A matrix is singular in floating point if the rounding errors of its entries could make it exactly singular. What can be
measured cheaply differs from algorithm to algorithm, and so does the criterion:

================  ============================================  =================================
criterion         used by                                       what it compares
================  ============================================  =================================
`pivots`          LU factors (`solve`, dense `linear_solve`)    pivots with their own rounding
`condition`       bordered systems, least squares, sinkhorn     Skeel's condition number with 1/eps
`amplification`   VJPs of the iterations, Hessian solves        the growth of a solution with 1/eps
`diagonal`        `qr_vjp`                                      entries of R with its largest entry
`zero_rtol`       Gram matrices                                 eigenvalues with the largest
================  ============================================  =================================

Every criterion is relative, and NaN counts as singular.
"""

from __future__ import annotations

import array_api_compat

from ddnref._core.arrays import Array, Namespace, eps, namespace_of

PIVOT = 64
"""Pivots below this many eps times the terms of their sum are rounding: 98 of 100 matrices that are singular up to
rounding have one, and the smallest quotient of matrices with a condition number of 1e12 was above 2e4."""
CONDITION = 16
"""A condition number above ``1 / (16 n eps)`` leaves no digit of the solution worth having."""
GAP = 16
"""A gap below this many eps times the size of the matrix is rounding, as for neighbouring eigenvalues of `eigh`."""
HESSIAN_AMPLIFICATION = 2**-5
"""Amplification, in units of 1/eps, from which a damped Hessian counts as singular to working precision."""


def pivots(lu: Array) -> Array:
    """Compare each pivot of packed LU factors with the rounding of the sum that it was computed as.

    ``|u_jj| <= 64 eps Σ_k |l_jk| |u_kj|`` does not depend on the scale of rows and columns.
    """
    xp = namespace_of(lu)
    size = xp.abs(lu)
    terms = xp.sum(xp.tril(size, k=-1) * xp.matrix_transpose(xp.triu(size, k=1)), axis=-1)
    rounding = PIVOT * eps(xp, lu.dtype) * terms
    return xp.any(~(xp.linalg.diagonal(size) > rounding), axis=-1)


def condition_probe(row_size: Array) -> Array:
    """Return a right-hand side of the size of each row, without a symmetry that a null vector might share.

    The largest entry of its solution is a lower bound of Skeel's condition number ``‖ |H⁻¹| |H| e ‖∞``, which does not
    depend on the scale of the rows.
    """
    xp = namespace_of(row_size)
    i = xp.arange(row_size.shape[-1], dtype=row_size.dtype, device=array_api_compat.device(row_size))
    return row_size * xp.cos(2.4 * i * i + 0.3)


def condition(probed: Array) -> Array:
    """Judge by the solution ``(..., n)`` of the probe whether the matrix is singular to working precision."""
    xp = namespace_of(probed)
    largest = xp.max(xp.abs(probed), axis=-1)
    return ~(largest <= 1 / (CONDITION * probed.shape[-1] * eps(xp, probed.dtype)))


def gap_probe(i: Array) -> Array:
    """Return a vector of length about one for ``i = 0, 1, … n − 1``, without structure.

    It has a part of about ``1/√n`` along the direction that a nearly singular matrix almost annihilates, so that its
    solution grows like ``1 / (√n gap)``.
    """
    return (2 / i.shape[0]) ** 0.5 * namespace_of(i).cos(i * i)


def amplification(growth: Array, size: Array, unit: float) -> Array:
    """Judge by the growth ``1 / gap`` of a probe whether the gap is below 16 units times the size of the matrix."""
    return ~(growth * size * (GAP * unit) < 1)


def diagonal(r: Array) -> Array:
    """Compare the smallest diagonal entry of a triangular factor with ``n eps`` times the largest."""
    xp = namespace_of(r)
    size = xp.abs(xp.linalg.diagonal(r))
    return ~(xp.min(size, axis=-1) > r.shape[-1] * eps(xp, r.dtype) * xp.max(size, axis=-1))


def zero_rtol(xp: Namespace, dtype: object, n: int) -> float:
    """Return the multiple of the largest eigenvalue up to which those of an n×n Gram matrix are rounding."""
    return max(16, n) * eps(xp, dtype)
