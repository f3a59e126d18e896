"""The VJP of eigenpairs in closed form, and how far a loss depends on what the matrix leaves undetermined.

With ``M = Vᴴ V̄_K`` for the columns K, and ``F_ij = 1 / (λ_j − λ_i)`` between distinct eigenvalues, 0 elsewhere,

    X̄ = V (diag(λ̄) + ½ F ∘ (M − Mᴴ)) Vᴴ                                  (K all eigenpairs)
    X̄ = sym(V (F_K ∘ M) V_Kᴴ) + V_K diag(λ̄_K) V_Kᴴ                      (K a subset of them)

Only the anti-Hermitian part of M counts, because a loss cannot depend on the length of an eigenvector. The standard
form comes first. The form for NumPy below takes the same steps in place, in a third of the time up to m = 256
(``asv_benches/figures.py --only products``); ``tests/kernels/test_numpy.py`` holds the two to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, adjoint, full, namespace_of, nan_where
from ddnref._core.selection import Columns, scatter, take
from ddnref._kernels.dense import hermitian_product
from ddnref._kernels.numpy import (
    BLAS_THREADS,
    TILE,
    WHOLE,
    WORTH_THREADS,
    _blocks,
    _diagonal,
    _hermitian_product,
    for_parts,
)
from ddnref._kernels.numpy import adjoint as _adjoint
from ddnref._kernels.vectors import largest

SMALL = 2**13  # numbers in a batch of gaps from which a product of rank two pays: 0.87 of (1000, 32) float32
PANEL = 16  # rows of a product that stays below that up to m = 128


def eigenpairs_vjp(
    w_bar: Array | None, v_bar: Array | None, w: Array, v: Array, columns: Columns, near: Array, gauge_rtol: float
) -> tuple[Array, Array | None]:
    """Return X̄, exactly Hermitian, and which items have a gauge-dependent loss; these come out as NaN.

    `w_bar` and `v_bar`, one of them given, belong to the columns of the full decomposition `w`, `v`; `near` says which
    neighbouring eigenvalues count as equal. A loss depends on the gauge where more than `gauge_rtol` of M lies inside
    clusters, or of λ̄ jumps there. ``None`` instead of flags says that there is nothing to depend on.
    """
    everything = columns == range(w.shape[-1])
    if array_api_compat.is_numpy_array(v) and v_bar is not None and everything:
        return _in_place(w_bar, v_bar, w, v, near, gauge_rtol)
    xp = namespace_of(v)
    v_k = take(v, columns, -1)
    bad = None if w_bar is None else exceeds(*jump(w_bar, near, columns), gauge_rtol)
    if v_bar is None:
        return hermitian_product(v_k * _or_nan(w_bar, bad)[..., None, :], v_k), bad

    m_, same = adjoint(v) @ v_bar, cluster_mask(near, columns)
    gauge = exceeds(*masked(m_, same, columns), gauge_rtol)
    bad = gauge if bad is None else bad | gauge
    diagonal = _or_nan(xp.zeros_like(w[..., : len(columns)]) if w_bar is None else w_bar, bad)
    twice = 2 * w  # the ½ of the Hermitian part, where it costs nothing
    gap = take(twice, columns, -1)[..., None, :] - twice[..., :, None]
    k = m_ / xp.where(same, full((), float("inf"), gap), gap)  # ½ F ∘ M; no branch divides by zero
    p = v @ k + v_k * (diagonal / 2)[..., None, :]
    if everything:
        x_bar = p @ adjoint(v)
        return x_bar + adjoint(x_bar), bad
    return hermitian_product(xp.concat([p, v_k], axis=-1), xp.concat([v_k, p], axis=-1)), bad


def _or_nan(diagonal: Array, bad: Array | None) -> Array:
    """``λ̄``, or NaN for bad items: from the diagonal it reaches every entry of X̄, at no further pass."""
    return diagonal if bad is None else nan_where(bad[..., None], diagonal)


# --- what the matrix leaves undetermined ----------------------------------------------------------------------------


def cluster_mask(near: Array, columns: Columns) -> Array:
    """Whether eigenvalue i and the j-th chosen one are in one cluster, chained through neighbours: ``(..., m, k)``."""
    xp = namespace_of(near)
    apart = xp.astype(~near, xp.int32)
    first = xp.zeros((*near.shape[:-1], 1), dtype=apart.dtype, device=array_api_compat.device(near))
    # Number the clusters: a new one begins wherever two neighbours are apart.
    cluster = xp.concat([first, xp.cumulative_sum(apart, axis=-1, dtype=apart.dtype)], axis=-1)
    return cluster[..., :, None] == take(cluster, columns, -1)[..., None, :]


def masked(m_: Array, same: Array, columns: Columns) -> tuple[Array, Array]:
    """The largest entry of ``M − Mᴴ`` inside clusters (its diagonal is the phase), and the largest of ``M``."""
    inside = namespace_of(m_).where(same, m_, full((), 0.0, m_))
    inside_h = adjoint(take(inside, columns, -2))  # M is zero in the columns not chosen
    return largest(inside - scatter(inside_h, columns, m_.shape[-2], -2), 2), largest(m_, 2)


def jump(w_bar: Array, near: Array, columns: Columns) -> tuple[Array, Array]:
    """The largest jump of ``λ̄`` between neighbours of a cluster, and the largest ``λ̄``."""
    xp = namespace_of(w_bar)
    every = scatter(w_bar, columns, near.shape[-1] + 1, -1)
    jump = every[..., 1:] - every[..., :-1]
    return largest(xp.where(near, jump, xp.zeros_like(jump))), largest(w_bar)


def exceeds(part: Array, whole: Array, rtol: float) -> Array:
    """``part > rtol * whole``; nothing exceeds an infinite `rtol`, for which ``0 · ∞`` is not computed."""
    return part > rtol * whole if math.isfinite(rtol) else part < 0


# --- the same for NumPy, in place -----------------------------------------------------------------------------------


def _in_place(
    w_bar: Array | None, v_bar: Array, w: Array, v: Array, near: Array, gauge_rtol: float
) -> tuple[Array, Array | None]:
    """All columns of NumPy arrays; the gauge is looked at only where something was masked."""
    cluster: Array | None = None
    if near.any():
        cluster = np.zeros(w.shape, dtype=np.int64)
        np.cumsum(~near, axis=-1, out=cluster[..., 1:])
    m, lead = w.shape[-1], w.shape[:-1]
    x_bar, inside, whole = np.empty(v.shape, v.dtype), np.zeros(lead, w.dtype), np.zeros(lead, w.dtype)

    # One batch axis, so that threads can share it; a flat batch is taken as it is.
    vectors: tuple[Any, ...] = (w_bar, w, cluster)
    matrices: tuple[Any, ...] = (v_bar, v, x_bar)
    scalars: tuple[Any, ...] = (inside, whole)
    count = math.prod(lead)
    if len(lead) != 1:
        vectors = tuple(None if a is None else a.reshape(count, m) for a in vectors)
        matrices, scalars = tuple(a.reshape(count, m, m) for a in matrices), tuple(a.reshape(count) for a in scalars)
    kernel: Callable[..., None] = _whole if m <= WHOLE else _tiled

    def run(part: slice) -> None:
        with np.errstate(all="ignore"):  # non-finite items come out non-finite: that is their report
            kernel(*(None if a is None else a[part] for a in (*vectors, *matrices, *scalars)))

    for_parts(run, count, m)
    if cluster is None and v.dtype.kind != "c":  # nothing was masked, and real eigenvectors have no phase
        return x_bar, None
    bad = exceeds(inside, whole, gauge_rtol)
    if w_bar is not None:
        bad |= exceeds(*jump(w_bar, near, range(m)), gauge_rtol)
    x_bar[bad] = float("nan")
    return x_bar, bad


def _whole(
    w_bar: Array | None,
    w: Array,
    cluster: Array | None,
    v_bar: Array,
    v: Array,
    x_bar: Array,
    inside: Array,
    whole: Array,
) -> None:
    """One pass for matrices that stay in cache: the sum with the adjoint comes last, from a buffer."""
    m_ = _product(_adjoint(v), v_bar, np.empty(v.shape, v.dtype))
    gap = _gap(w, np.empty(v.shape, w.dtype))

    # Take out what lies inside clusters, or on the diagonal, and note how much that was.
    if cluster is not None:
        same = cluster[..., None, :] == cluster[..., :, None]
        inside[...] = np.max(np.abs(m_ - _adjoint(m_)), axis=(-2, -1), initial=0, where=same)
        whole[...] = np.max(np.abs(m_), axis=(-2, -1), initial=0)
        gap[same] = np.inf
    else:
        if m_.dtype.kind == "c":
            inside[...] = np.max(2 * np.abs(_diagonal(m_).imag), axis=-1, initial=0)
            whole[...] = np.max(np.abs(m_), axis=(-2, -1), initial=0)
        _diagonal(gap)[...] = np.inf

    m_ /= gap  # ½ F ∘ M
    if w_bar is not None:
        diagonal = _diagonal(m_)
        diagonal += 0.5 * w_bar
    # V (…) Vᴴ into buffers that are free by now, then the sum with the adjoint.
    t = _product(v, m_, gap if gap.dtype == v.dtype else np.empty(v.shape, v.dtype))
    x = _product(t, _adjoint(v), m_)
    np.add(x, _adjoint(x), out=x_bar)


def _gap(w: Array, out: Array) -> Array:
    """``2 (λ_j − λ_i)``; for many as a product of rank two, which is as exact as the subtraction and faster."""
    if out.size < SMALL:
        twice = 2 * w
        np.subtract(twice[..., None, :], twice[..., :, None], out=out)
        return out
    left, right = np.empty((*w.shape, 2), w.dtype), np.empty((*w.shape[:-1], 2, w.shape[-1]), w.dtype)
    np.multiply(w, -2, out=left[..., 0])
    left[..., 1] = right[..., 0, :] = 1
    np.multiply(w, 2, out=right[..., 1, :])
    return np.matmul(left, right, out=out)


def _product(a: Array, b: Array, out: Array) -> Array:
    """``A B``, by row panels where BLAS would split one product over threads that the batch is using already."""
    m, panel = b.shape[-1], PANEL
    if m**3 <= BLAS_THREADS or m >= WHOLE or m % panel or a.shape[0] * m * m < WORTH_THREADS // 2:
        return np.matmul(a, b, out=out)
    panels = (a.shape[0], m // panel, panel, m)
    np.matmul(a.reshape(panels), b[:, None], out=out.reshape(panels))
    return out


def _tiled(
    w_bar: Array | None,
    w: Array,
    cluster: Array | None,
    v_bar: Array,
    v: Array,
    x_bar: Array,
    inside: Array,
    whole: Array,
) -> None:
    """Wide matrices: tiles in place, and only the lower block triangle of the last product."""
    m_ = np.matmul(_adjoint(v), v_bar, out=x_bar)
    if cluster is not None or m_.dtype.kind == "c":
        whole[...] = np.max(np.abs(m_), axis=(-2, -1), initial=0)
    # Overwrite M with ½ (M − Mᴴ) ∘ F.
    for upper, lower in combinations_with_replacement(_blocks(w.shape[-1], TILE), 2):
        q = m_[..., lower, upper] - _adjoint(m_[..., upper, lower])
        gap = 2 * (w[..., None, upper] - w[..., lower, None])
        same = None
        if cluster is not None:
            same = cluster[..., None, upper] == cluster[..., lower, None]
        elif lower == upper:
            same = np.broadcast_to(np.eye(q.shape[-1], dtype=bool), q.shape)
        if same is not None:
            np.maximum(inside, np.max(np.abs(q), axis=(-2, -1), initial=0, where=same), out=inside)
            gap[same] = np.inf
        q /= gap
        m_[..., lower, upper] = q
        if lower != upper:
            m_[..., upper, lower] = _adjoint(q)
    if w_bar is not None:
        diagonal = _diagonal(m_)
        diagonal += w_bar
    t = np.matmul(v, m_)
    _hermitian_product(t, _adjoint(v), x_bar)
