"""The JVP of singular triples in closed form, and how far a direction splits equal or moves zero singular values.

With ``S = Uᴴ Ẋ V_K`` and ``T = Vᴴ Ẋᴴ U_K`` for the k leading columns K, of which T is the adjoint of S where both are
known,

    P_ij = (S + T)_ij / (s_j − s_i)    between distinct singular values, 0 elsewhere
    Q_ij = (S − T)_ij / (s_j + s_i)    unless both are zero
    ṡ_j  = Re S_jj
    U̇_K  = ½ U (P + Q) + (I − U Uᴴ) Ẋ V_K diag(1/s)
    V̇_K  = ½ V (P − Q) + (I − V Vᴴ) Ẋᴴ U_K diag(1/s)

Between chosen columns P and Q are exactly anti-Hermitian, so that what a small gap amplifies cancels in every function
of the spaces of close singular values. A direction splits a cluster of equal values unless the Hermitian part of the
block of S inside it is a multiple of the identity. It moves zero values unless it maps their right vectors into the
space of the other left ones.
"""

from __future__ import annotations

from typing import NamedTuple

from ddnref._core.arrays import Array, adjoint, full, namespace_of, nan_where, real
from ddnref._core.selection import take
from ddnref._kernels.dense import infinity, matvec
from ddnref._kernels.eigh_jvp import Split, chosen, needs_check, split_of
from ddnref._kernels.eigh_vjp import cluster_mask, exceeds
from ddnref._kernels.vectors import largest, without_structure


class Moved(NamedTuple):
    """Directions along which there is no linear derivative, for each item."""

    split: Split | None
    """How far it splits equal values; ``None`` where there are none."""
    kink: Array
    """Flags: it moves a zero value."""


def triples_jvp(
    x_dot: Array, u: Array, s: Array, v: Array, k: int, near: Array, zero: Array, gauge_rtol: float
) -> tuple[Array, Array, Array, Moved]:
    """Return the tangents of the k leading triples ``U_K``, ``s_K``, ``V_K``, NaN where `Moved` says so.

    `near` says which neighbouring values count as equal, ``(..., n - 1)``, and `zero` which of them count as zero.
    """
    xp, columns, wide = namespace_of(u), range(k), v.shape[-2] > u.shape[-2]
    u_k, s_k, v_k, zero_k = (take(a, columns, -1) for a in (u, s, v, zero))
    # The images that both vectors and values need: of a full square or tall matrix, Ẋ V has all.
    right = None if wide and k == s.shape[-1] else x_dot @ v_k
    left = None if right is not None and k == s.shape[-1] else adjoint(x_dot) @ u_k
    if right is None:
        t = adjoint(v) @ left
        s_ = adjoint(t)
    else:
        s_ = adjoint(u) @ right
        t = adjoint(s_[..., :k, :])
        if left is not None:
            t = xp.concat([t, adjoint(v[..., :, k:]) @ left], axis=-2)
    both, moved = (s_ + t) / 2, _moved(x_dot, u, v, (s_ + t) / 2, near & ~zero[..., 1:], k, gauge_rtol)
    kink = moves_zero(x_dot, u, v, zero, gauge_rtol) & zero_k[..., -1]
    bad = kink if moved is None else kink | moved.bad

    # ½ (P + Q) and ½ (P − Q); no branch divides by zero.
    infinite = infinity(s)
    both_zero = zero[..., :, None] & zero_k[..., None, :]
    same = cluster_mask(near, columns) | both_zero
    p = both / xp.where(same, infinite, s_k[..., None, :] - s[..., :, None])
    q = (s_ - t) / xp.where(both_zero, infinite, 2 * (s_k[..., None, :] + s[..., :, None]))
    p = nan_where(bad[..., None, None], p)
    u_dot, v_dot = u @ (p + q), v @ (p - q)
    divisor = xp.where(zero_k, infinite, s_k)[..., None, :]
    if u.shape[-2] > u.shape[-1]:
        u_dot = u_dot + (right - u @ s_) / divisor
    if v.shape[-2] > v.shape[-1]:
        v_dot = v_dot + (left - v @ t) / divisor
    s_dot = nan_where(bad[..., None], real(xp.linalg.diagonal(s_[..., :k, :])))
    return u_dot, s_dot, v_dot, Moved(moved, kink)


def _moved(x_dot: Array, u: Array, v: Array, both: Array, near: Array, k: int, gauge_rtol: float) -> Split | None:
    """Measure how far the Hermitian part of ``Uᴴ Ẋ V`` splits clusters, also those that the k-th value may cut."""
    if not needs_check(near, gauge_rtol):
        return None
    (_, cut), (_, cut_v) = (chosen(q, range(k), near) for q in (u, v))
    moved = None
    if cut is not None and cut_v is not None:
        moved = (adjoint(u) @ (x_dot @ cut_v.vectors) + adjoint(v) @ (adjoint(x_dot) @ cut.vectors)) / 2
    return split_of(both, moved, cut, range(k), near, gauge_rtol, largest(x_dot, 2))


def moves_zero(x_dot: Array, u: Array, v: Array, zero: Array, gauge_rtol: float) -> Array:
    """Whether a direction maps right vectors of zero values out of the space of the other left ones, ``(...)``.

    One vector without structure in their space shows it. Of a wide matrix the adjoint is asked, whose right vectors of
    zero values are all known.
    """
    xp, none = namespace_of(u), full((), 0.0, u)
    if not needs_check(zero, gauge_rtol):
        return xp.any(zero, axis=-1) & False
    if v.shape[-2] > u.shape[-2]:
        x_dot, u, v = adjoint(x_dot), v, u
    image = matvec(x_dot, matvec(v, xp.where(zero, without_structure(tuple(v.shape[-1:]), v), none)))
    inside = xp.where(zero, none, matvec(adjoint(u), image))
    return exceeds(largest(image - matvec(u, inside)), xp.maximum(largest(image), largest(x_dot, 2)), gauge_rtol)
