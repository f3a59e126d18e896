"""The JVP of eigenpairs in closed form, and how far a direction splits equal eigenvalues.

With ``S = Vᴴ sym(Ẋ) V_K`` for the columns K, and ``F_ij = 1 / (λ_j − λ_i)`` between distinct eigenvalues, 0 elsewhere,

    λ̇_j = Re S_jj,    V̇_K = V (F_K ∘ S)

A direction splits a cluster of equal eigenvalues unless the block of S inside the cluster is a multiple of the
identity. Of a subset of the columns this block is known in part only: where the subset may cut the cluster, a
further vector z of the cluster's space says whether ``Vᴴ sym(Ẋ) z`` is that multiple of z inside the cluster.

The block of S between chosen columns is made exactly Hermitian. Then F ∘ S is exactly anti-Hermitian there, and what a
small gap amplifies, a true coupling or rounding, cancels in every function of the space of close eigenvalues.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, adjoint, as_dtype, conj, full, namespace_of, nan_where, real
from ddnref._core.selection import Columns, scatter, take
from ddnref._kernels.dense import eigh, hermitian_part, identity, infinity, matvec
from ddnref._kernels.eigh_vjp import _gap, cluster_mask, cluster_numbers, own_entries
from ddnref._kernels.numpy import NARROW, WHOLE, _diagonal, for_parts
from ddnref._kernels.numpy import adjoint as adjoint_of
from ddnref._kernels.vectors import largest, without_structure


class Split(NamedTuple):
    """How far a direction splits the cluster of each chosen eigenvalue."""

    part: Array
    """The largest entry of ``S − mean(diag S) I`` inside the cluster, ``(..., k)``."""
    whole: Array
    """The size to compare it with, ``(...)``."""
    bad: Array
    """Items at which it counts, ``(...)``."""


def eigenpairs_jvp(
    x_dot: Array, w: Array, v: Array, columns: Columns, near: Array, gauge_rtol: float
) -> tuple[Array, Array, Split | None]:
    """Return the tangents of the chosen eigenvalues and eigenvectors, NaN for items whose clusters are split.

    `near` says which neighbouring eigenvalues count as equal. ``None`` instead of a `Split` says that there is nothing
    to split.
    """
    xp, m = namespace_of(v), v.shape[-1]
    if columns == range(m) and m <= WHOLE and none_flagged(near):
        return (*_in_place(x_dot, w, v), None)
    s, w_dot, split = projected(x_dot, v, columns, near, gauge_rtol)
    same = cluster_mask(near, columns)
    gap = take(w, columns, -1)[..., None, :] - w[..., :, None]
    v_dot = v @ (s / xp.where(same, infinity(gap), gap))  # no branch divides by zero
    return w_dot, v_dot if split is None else nan_where(split.bad[..., None, None], v_dot), split


def projected(
    x_dot: Array, v: Array, columns: Columns, near: Array, gauge_rtol: float, size: Array | None = None
) -> tuple[Array, Array, Split | None]:
    """Return ``S = Vᴴ sym(Ẋ) V_K``, the tangents of the eigenvalues, NaN for split items, and what was split.

    `size` is that of the numbers whose rounding Ẋ has, where it is not that of Ẋ, ``(...)``.
    """
    x_dot = hermitian_part(x_dot)
    checked = needs_check(near, gauge_rtol)
    v_k, cut = chosen(v, columns, near if checked else None)
    s = hermitian_block(adjoint(v) @ (x_dot @ v_k), columns)
    w_dot = diagonal_of(s, columns)
    if not checked:
        return s, w_dot, None
    moved = None
    if cut is not None:
        moved = adjoint(v) @ (x_dot @ cut.vectors)
        size = largest(x_dot, 2) if size is None else namespace_of(size).maximum(size, largest(x_dot, 2))
    split = split_of(s, moved, cut, columns, near, gauge_rtol, size)
    return s, nan_where(split.bad[..., None], w_dot), split


def hermitian_block(s: Array, columns: Columns) -> Array:
    """``S``, its block between the chosen columns exactly Hermitian."""
    block = take(s, columns, -2)
    return s + scatter((adjoint(block) - block) / 2, columns, s.shape[-2], -2)


def diagonal_of(s: Array, columns: Columns) -> Array:
    """``Re S_jj`` of the chosen columns, ``(..., k)``."""
    return real(namespace_of(s).linalg.diagonal(take(s, columns, -2)))


# --- directions that split a cluster ----------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A further vector for each cluster that the choice of columns may cut."""

    ends: tuple[int, ...]
    """Positions of the columns in these clusters."""
    inside: Array
    """Flags of the eigenvalues that belong to each, ``(..., m, e)``."""
    z: Array
    """The vectors in the basis of eigenvectors, ``(..., m, e)``."""
    vectors: Array
    """The vectors themselves. Products with them stay apart from those with the chosen eigenvectors, whose bits in one
    item must not depend on whether another has something to check."""


def needs_check(flags: Array, gauge_rtol: float) -> bool:
    """Whether an item may have something to check; flags of other libraries than NumPy are taken as set."""
    return math.isfinite(gauge_rtol) and not none_flagged(flags)


def chosen(v: Array, columns: Columns, near: Array | None) -> tuple[Array, Cut | None]:
    """The chosen eigenvectors and, if `near` is given, the `Cut`, unless nothing can be cut."""
    v_k, m = take(v, columns, -1), v.shape[-1]
    ends = () if near is None else _ends(columns, m)
    if near is None or not ends:
        return v_k, None
    xp, inside = namespace_of(v), cluster_mask(near, tuple(columns[i] for i in ends))
    z = xp.where(inside, without_structure((m,), v)[:, None], full((), 0.0, v))
    return v_k, Cut(ends, inside, z, v @ z)


def split_of(
    s: Array, moved: Array | None, cut: Cut | None, columns: Columns, near: Array, gauge_rtol: float, size: Array | None
) -> Split:
    """Measure how far a block ``(..., m, k)`` of S, and its products with the vectors of the cut, split clusters."""
    xp, (m, k), zero = namespace_of(s), s.shape[-2:], full((), 0.0, s)
    same, w_dot = cluster_mask(near, columns), diagonal_of(s, columns)
    # Inside a cluster, S is a multiple of the identity if the eigenvalues stay together.
    mean = cluster_means(w_dot, take(same, columns, -2))
    own = xp.where(own_entries(columns, m, s), as_dtype(mean, s)[..., None, :], zero)
    part = xp.max(xp.abs(xp.where(same, s - own, zero)), axis=-2)
    whole = largest(s, 2) if size is None else xp.maximum(largest(s, 2), size)
    if cut is not None and moved is not None:
        rest = moved - as_dtype(take(mean, cut.ends, -1), s)[..., None, :] * cut.z
        rest = xp.max(xp.abs(xp.where(cut.inside, rest, zero)), axis=-2)
        part, whole = xp.maximum(part, scatter(rest, cut.ends, k, -1)), xp.maximum(whole, largest(moved, 2))
    return Split(part, whole, xp.any(part > gauge_rtol * whole[..., None], axis=-1))


def none_flagged(flags: Array) -> bool:
    """Whether no flag is set, where looking costs nothing: on NumPy."""
    return array_api_compat.is_numpy_array(flags) and not np.count_nonzero(flags)


def _ends(columns: Columns, m: int) -> tuple[int, ...]:
    """Positions of chosen columns whose clusters may be cut: all of them, but the ends only of consecutive ones."""
    k = len(columns)
    if k in (0, m):
        return ()
    if not isinstance(columns, range):
        return tuple(range(k))
    # A cluster that begins with the spectrum or ends with it is not cut there.
    outermost = {0: columns[0], k - 1: columns[-1]}
    return tuple(i for i, column in outermost.items() if k == 1 or 0 < column < m - 1)


def cluster_means(diagonal: Array, same: Array) -> Array:
    """Replace each number, ``(..., k)``, by the mean of its cluster; `same` is ``(..., k, k)``."""
    xp = namespace_of(diagonal)
    together = xp.astype(same, diagonal.dtype)
    return matvec(together, diagonal) / xp.sum(together, axis=-1)


# --- one-sided derivatives --------------------------------------------------------------------------------------------


def one_sided_derivatives(x_dot: Array, v: Array, near: Array) -> Array:
    """Eigenvalues of the block of S inside each cluster, ascending in each, at the places of the cluster: ``(..., m)``.

    One decomposition of all blocks at once, each moved to a separate place on the line. The eigenvectors then say
    the eigenvalues of the blocks as they were, without the rounding of the distance they were moved by.
    """
    xp, m = namespace_of(v), v.shape[-1]
    s = hermitian_part(adjoint(v) @ (hermitian_part(x_dot) @ v))
    diagonal, number = real(xp.linalg.diagonal(s)), cluster_numbers(near)
    same = number[..., :, None] == number[..., None, :]
    mean = cluster_means(diagonal, same)
    eye = identity(m, v)
    s = xp.where(same, s - eye * as_dtype(mean, v)[..., None, :], full((), 0.0, v))

    # Only clusters need separate places. What is between two of them, zero by now, shares one.
    no = number[..., :1] < 0
    before, after = xp.concat([no, near], axis=-1), xp.concat([near, no], axis=-1)
    alone, begins = ~(before | after), xp.astype(after & ~before, xp.int32)
    place = 2 * xp.cumulative_sum(begins, axis=-1, dtype=begins.dtype) + xp.astype(alone, xp.int32)
    distance = 2 * largest(xp.sum(xp.abs(s), axis=-1))[..., None] * xp.astype(place, mean.dtype)
    _, q = eigh(s + eye * as_dtype(distance, v)[..., None, :])
    inside = real(xp.sum(conj(q) * (s @ q), axis=-2))

    # Rounding may have exchanged neighbours: sort by value, then by cluster.
    order = xp.argsort(inside, axis=-1, stable=True)
    order = xp.take_along_axis(
        order, xp.argsort(xp.take_along_axis(number, order, axis=-1), axis=-1, stable=True), axis=-1
    )
    return mean + xp.take_along_axis(inside, order, axis=-1)


# --- the same for NumPy, in place -----------------------------------------------------------------------------------


def _in_place(x_dot: Array, w: Array, v: Array) -> tuple[Array, Array]:
    """All columns of NumPy arrays up to a width of `WHOLE`, where no eigenvalues are equal."""
    m, count = w.shape[-1], math.prod(w.shape[:-1])
    w_dot, v_dot = np.empty(w.shape, w.dtype), np.empty(v.shape, v.dtype)
    # One batch axis, so that threads can share it.
    vectors, matrices = (a.reshape(count, m) for a in (w, w_dot)), (a.reshape(count, m, m) for a in (x_dot, v, v_dot))
    arrays = (*vectors, *matrices)
    for_parts(lambda part: _whole(*[a[part] for a in arrays]), count, m)
    return w_dot, v_dot


def _whole(w: Array, w_dot: Array, x_dot: Array, v: Array, v_dot: Array) -> None:
    """One pass for matrices that stay in cache, with ``½ (S + Sᴴ)`` made where it is divided by the gaps."""
    half = np.multiply(x_dot, 0.5, out=np.empty(v.shape, v.dtype))
    both = np.add(half, adjoint_of(half), out=v_dot)
    # As LAPACK leaves V, the product with it would be of the form A Bᵀ.
    right = v
    if v.shape[-1] <= NARROW:
        half[...] = v
        right = half
    image = np.matmul(both, right)
    s = np.matmul(adjoint_of(v), image, out=v_dot)
    w_dot[...] = _diagonal(s).real
    k = np.add(s, adjoint_of(s), out=image)
    gap = _gap(w, half if half.dtype == w.dtype else np.empty(v.shape, w.dtype))  # twice the gaps
    _diagonal(gap)[...] = np.inf
    k /= gap
    np.matmul(v, k, out=v_dot)
