"""Systems and least squares by a factorisation, refined once, with an estimate of their error.

A square matrix is factored as ``P A = L U``. A tall one has its columns scaled by powers of two, D, and is factored as
``A = Q R D``; the adjoint of a wide one is tall. Then with full rank

    A⁺ b = D⁻¹ R⁻¹ Qᴴ b,        (Aᴴ)⁺ x̄ = Q R⁻ᴴ D⁻¹ x̄

One step of refinement adds ``δ = A⁺ (b − A x)``. The error that rounding leaves is about as large as δ, or as the
change that a residual as large as its rounding makes, ``A⁺ g`` with ``g = eps (|A| |x| + |b|)`` and signs
without a pattern. For least squares a rounding of A counts too: ``h = eps |A|ᴴ |r|`` changes x by ``(AᴴA)⁻¹ h`` where A
is tall, by ``h`` with ``(Aᴴ)⁺ x`` in place of r where it is wide.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ddnref._core.arrays import (
    Array,
    adjoint,
    as_dtype,
    eps,
    full,
    is_complex,
    namespace_of,
    nan_where,
    power_of_two_below,
)
from ddnref._kernels.dense import identity, qr
from ddnref._kernels.lu import lu_factor, solve_triangular
from ddnref._kernels.singularity import SINGULAR
from ddnref._kernels.vectors import as_complex, largest, norm, quotient, safe_norm, without_structure
from ddnref.krylov._system import BREAKDOWN, CONVERGED, NOT_FINITE, SLACK, STAGNATION, SolveInfo
from ddnref.linalg._solve import _columns, _solved, _vectors, joint_axes
from ddnref.operators import as_operator


class Factors(NamedTuple):
    """A matrix and its factors: ``lu, pivots``, or ``q, r, d`` of the tall one of A and Aᴴ."""

    matrix: Array
    arrays: tuple[Array, ...]
    condition: Array
    """(...) σ_max / σ_min of the scaled matrix, or of a square one an estimate; infinity where it is singular."""
    finite: Array
    """(...) whether the matrix is finite."""

    @property
    def square(self) -> bool:
        """Whether the matrix is square."""
        return bool(self.matrix.shape[-1] == self.matrix.shape[-2])

    @property
    def wide(self) -> bool:
        """Whether the matrix has more columns than rows."""
        return bool(self.matrix.shape[-1] > self.matrix.shape[-2])


def factorise(matrix: Array) -> Factors:
    """Factor ``(..., n, m)``; the factors of items that are singular or not finite are NaN."""
    xp = namespace_of(matrix)
    finite = xp.all(xp.isfinite(matrix), axis=(-2, -1))
    if matrix.shape[-1] == matrix.shape[-2]:
        lu, pivots, _ = lu_factor(matrix)
        f = Factors(matrix, (lu, pivots), finite, finite)
        return f._replace(condition=_condition(f))

    tall = adjoint(matrix) if matrix.shape[-1] > matrix.shape[-2] else matrix
    tall = xp.where(finite[..., None, None], tall, xp.zeros_like(tall))
    # Powers of two bring the columns to lengths between one and two, first by their largest entries.
    columns = xp.matrix_transpose(tall)
    d = power_of_two_below(largest(columns))
    d = d * power_of_two_below(norm(columns / as_dtype(d, tall)[..., None]))
    q, r = qr(tall / as_dtype(d, tall)[..., None, :])
    # The values of R are those of the scaled matrix, whose length is at most 2 √n, and which is near 1.
    values = xp.linalg.svdvals(r)
    least, most = values[..., -1], values[..., 0]
    regular = least > SINGULAR * eps(xp, r.dtype) * most
    condition = xp.where(regular, quotient(most, least, regular), full((), float("inf"), most))
    r = xp.where(regular[..., None, None], r, identity(r.shape[-1], r))
    bad = ~(regular & finite)[..., None, None]
    return Factors(matrix, (nan_where(bad, q), r, d), condition, finite)


def _condition(f: Factors) -> Array:
    """Estimate the condition number of a square matrix, by one step of inverse iteration and its Frobenius norm."""
    xp, n = namespace_of(f.matrix), f.matrix.shape[-1]
    start = xp.broadcast_to(without_structure((n,), f.matrix), tuple(f.matrix.shape[:-1]))
    once = _inverse(f, start, is_adjoint=False)
    size = safe_norm(once)
    gain = quotient(safe_norm(_inverse(f, once, is_adjoint=True)), size, size > 0)
    condition = gain * safe_norm(f.matrix, 2)
    return xp.where(condition >= 0, condition, full((), float("inf"), condition))  # NaN where it is singular


def _inverse(f: Factors, v: Array, is_adjoint: bool) -> Array:
    """``A⁺ v`` for vectors ``(..., n)``, or ``(Aᴴ)⁺ v`` for vectors ``(..., m)``."""
    xp, batch = namespace_of(v), tuple(f.matrix.shape[:-2])
    lead = np.broadcast_shapes(batch, tuple(v.shape[:-1]))
    if f.square:
        lu, pivots = f.arrays
        return _solved(lu, pivots, v, lead, is_adjoint=is_adjoint)
    q, r, d = f.arrays
    if 0 in lead:
        return full((*lead, q.shape[-2] if is_adjoint != f.wide else q.shape[-1]), 0.0, v)
    # Several right-hand sides of one matrix become columns.
    b = _columns(v, batch, lead)
    items = tuple(b.shape[:-2])
    if is_complex(b) and not is_complex(q):
        q, r = as_complex(q), as_complex(r)
    b = as_dtype(b, q)
    q, r, d = (
        xp.broadcast_to(array, (*items, *array.shape[len(batch) :])) for array in (q, r, as_dtype(d, q)[..., None])
    )
    if is_adjoint != f.wide:  # Q R⁻ᴴ D⁻¹
        x = q @ solve_triangular(adjoint(r), b / d, lower=True)
    else:
        x = solve_triangular(r, adjoint(q) @ b, lower=False) / d
    return _vectors(x, batch, lead)


def solve_refined(f: Factors, b: Array, rtol: float | None, *, is_adjoint: bool = False) -> tuple[Array, SolveInfo]:
    """``A⁺ b`` for vectors ``(..., n)``, or ``(Aᴴ)⁺ b``, refined once, and the status that an iteration would have.

    Nothing raises. What is singular or not finite comes out as NaN.
    """
    xp = namespace_of(b)
    joint_axes("b", tuple(b.shape[:-1]), tuple(f.matrix.shape[:-2]))
    a = as_operator(f.matrix)
    apply, transposed = (a.adjoint, a.apply) if is_adjoint else (a.apply, a.adjoint)
    x = _inverse(f, b, is_adjoint)
    x = x + _inverse(f, b - apply(a.params, x), is_adjoint)
    r = b - apply(a.params, x)
    tall = not f.square and is_adjoint == f.wide

    # Judge by the backward error, which is rounding unless the matrix is singular; for least squares by the smaller of
    # two.
    rtol = eps(xp, b.dtype) ** 0.5 if rtol is None else rtol
    sizes = _magnitudes(f, x, b, r, is_adjoint)
    size = _ratio(r, sizes[0])
    if tall:
        columns = as_operator(xp.abs(f.matrix))
        longest = safe_norm(r)[..., None] + xp.zeros_like(xp.abs(r))
        whole = (columns.apply if is_adjoint else columns.adjoint)(columns.params, longest)
        size = xp.minimum(size, _ratio(transposed(a.params, r), whole))
    size = nan_where(xp.any(xp.isnan(x), axis=-1), size)
    finite = f.finite & xp.all(xp.isfinite(b), axis=-1)
    status = xp.zeros_like(size, dtype=xp.int32)
    for bad, code in ((size > SLACK * rtol, STAGNATION), (xp.isnan(size), BREAKDOWN), (~finite, NOT_FINITE)):
        status = xp.where(bad, xp.zeros_like(status) + code, status)

    error = _error(f, x, sizes, r, is_adjoint)
    condition = xp.broadcast_to(f.condition, tuple(size.shape)) + xp.zeros_like(size)
    return x, SolveInfo(status == CONVERGED, xp.zeros_like(status), size, status, error, condition)


def orthogonal(f: Factors, r: Array) -> Array:
    """``r − A A⁺ r`` for a tall matrix, ``s − A⁺ A s`` for a wide one."""
    a = as_operator(f.matrix)
    if f.wide:
        return r - _inverse(f, a.apply(a.params, r), is_adjoint=False)
    return r - a.apply(a.params, _inverse(f, r, is_adjoint=False))


def error_of(f: Factors, x: Array, b: Array | None) -> Array:
    """Estimate the relative error of a solution that was found elsewhere.

    Where b is not known, as in a derivative, only roundings of the product A x are counted.
    """
    r = None if b is None else b - as_operator(f.matrix).apply((f.matrix,), x)
    return _error(f, x, _magnitudes(f, x, b, r, is_adjoint=False), r, is_adjoint=False)


def _magnitudes(f: Factors, x: Array, b: Array | None, r: Array | None, is_adjoint: bool) -> tuple[Array, Array | None]:
    """The sizes of the terms of each entry of ``b − A x``, and of ``Aᴴ r``, or ``Aᴴ (Aᴴ)⁺ x`` where A is wide."""
    xp, wide = namespace_of(x), f.wide != is_adjoint
    a = as_operator(xp.abs(f.matrix))
    apply, transposed = (a.adjoint, a.apply) if is_adjoint else (a.apply, a.adjoint)
    g = apply(a.params, xp.abs(x)) + (0 if b is None else xp.abs(b))
    if f.square or (r is None and not wide):
        return g, None
    source = _inverse(f, x, not is_adjoint) if wide else r
    return g, transposed(a.params, xp.abs(source))


def _error(f: Factors, x: Array, sizes: tuple[Array, Array | None], r: Array | None, is_adjoint: bool) -> Array:
    """The relative size of the changes that x suffers from its residual and from roundings of this magnitude."""
    xp = namespace_of(x)
    unit = eps(xp, x.dtype)
    g, h = (None if size is None else unit * size * without_structure(tuple(size.shape[-1:]), size) for size in sizes)
    changes = [_inverse(f, g, is_adjoint)] + ([] if r is None else [_inverse(f, r, is_adjoint)])
    if h is not None:
        wide = f.wide != is_adjoint
        changes.append(h if wide else _inverse(f, _inverse(f, h, not is_adjoint), is_adjoint))
    total = sum(map(safe_norm, changes))
    length = safe_norm(x)
    return nan_where(xp.isnan(length), xp.maximum(quotient(total, length, length > 0), unit + xp.zeros_like(length)))


def _ratio(v: Array, size: Array) -> Array:
    """``‖v‖ / ‖size‖``, 0 where both vanish."""
    whole = safe_norm(size)
    return quotient(safe_norm(v), whole, whole > 0)
