"""The VJP of eigenpairs in closed form, and how far a loss depends on what the matrix leaves undetermined.

With ``M = Vᴴ V̄_K`` for the columns K, and ``F_ij = 1 / (λ_j − λ_i)`` between distinct eigenvalues, 0 elsewhere,

    X̄ = V (diag(λ̄) + ½ F ∘ (M − Mᴴ)) Vᴴ                                  (K all eigenpairs)
    X̄ = sym(V (F_K ∘ M) V_Kᴴ) + V_K diag(λ̄_K) V_Kᴴ                      (K a subset of them)

Only the anti-Hermitian part of M counts, because a loss cannot depend on the length of an eigenvector. Where that part
is no more than the rounding errors of M, it is left out before a small gap can amplify it. With ``n_j`` the norm of the
column j of M without ``M_jj``, an entry counts as rounding if

    |M_ij − M̄_ji| ≤ 4 eps (n_i + n_j)    and    |λ_j − λ_i| ≤ max|λ| / (16 √m)

The result is then that of the exact formula for a cotangent ``V̄ + δV̄`` with ``‖δv̄_j‖ ≤ 8 √m eps n_j``. The component
of ``v̄_j`` along ``v_j`` does not count, because it does not enter the gradient: a large one must not hide the others.
At wider gaps no quotient is large enough to do harm.

The standard form comes first. The form for NumPy below takes the same steps in place, in a third of the time up to
m = 256 (``asv_benches/figures.py --only products``); ``tests/kernels/test_numpy.py`` holds the two to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Any

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, adjoint, eps, full, namespace_of, nan_where
from ddnref._core.selection import Columns, scatter, take
from ddnref._kernels.dense import constant, hermitian_product, infinity
from ddnref._kernels.numpy import TILE, WHOLE, _blocks, _diagonal, _product_rows, for_parts
from ddnref._kernels.numpy import adjoint as _adjoint
from ddnref._kernels.vectors import largest, safe_norm

ROUNDING = 4
"""Rounding errors of ``M − Mᴴ`` were at most 0.7 eps times the norms of both columns, m = 6 to 512, all dtypes."""
CLOSE = 2**-4
"""Gaps above this part of ``max|λ|``, over ``√m``, amplify rounding by no more than 16 √m."""
SMALL = 2**13  # numbers in a batch of gaps from which a product of rank two pays: 0.87 of (1000, 32) float32


def eigenpairs_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    columns: Columns,
    near: Array,
    radius: Array,
    gauge_rtol: float,
) -> tuple[Array, Array | None]:
    """Return X̄, exactly Hermitian, and which items have a gauge-dependent loss; these come out as NaN.

    `w_bar` and `v_bar`, one of them given, belong to the columns of the full decomposition `w`, `v`; `near` says which
    neighbouring eigenvalues count as equal, and `radius` is ``max|w|``, ``(..., 1)``. A loss depends on the gauge where
    more than `gauge_rtol` of M lies inside clusters, or of λ̄ jumps there. ``None`` instead of flags says that there is
    nothing to depend on.
    """
    everything = columns == range(w.shape[-1])
    if array_api_compat.is_numpy_array(v) and v_bar is not None and everything:
        return _in_place(w_bar, v_bar, w, v, near, radius, gauge_rtol)
    xp = namespace_of(v)
    v_k = take(v, columns, -1)
    bad = None if w_bar is None else exceeds(*jump(w_bar, near, columns), gauge_rtol)
    if v_bar is None:
        return hermitian_product(v_k * _or_nan(w_bar, bad)[..., None, :], v_k), bad

    m_, same = adjoint(v) @ v_bar, cluster_mask(near, columns)
    twice = 2 * w  # the ½ of the Hermitian part, where it costs nothing
    gap = take(twice, columns, -1)[..., None, :] - twice[..., :, None]
    a = antisymmetric_part(m_, columns)
    gauge = exceeds(*masked(a, m_, same), gauge_rtol)
    bad = gauge if bad is None else bad | gauge
    small = is_rounding(a, lengths_without_own(m_, columns), gap, 2 * close_gap(w, radius), columns)
    # ½ F ∘ M; no branch divides by zero.
    k = left_out(m_, small) / xp.where(same, infinity(gap), gap)
    diagonal = _or_nan(xp.zeros_like(w[..., : len(columns)]) if w_bar is None else w_bar, bad)
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
    cluster = cluster_numbers(near)
    return cluster[..., :, None] == take(cluster, columns, -1)[..., None, :]


def cluster_numbers(near: Array) -> Array:
    """Number the clusters of a sorted spectrum: a new one begins wherever two neighbours are apart, ``(..., m)``."""
    xp = namespace_of(near)
    apart = xp.astype(~near, xp.int32)
    first = xp.zeros((*near.shape[:-1], 1), dtype=apart.dtype, device=array_api_compat.device(near))
    return xp.concat([first, xp.cumulative_sum(apart, axis=-1, dtype=apart.dtype)], axis=-1)


def antisymmetric_part(m_: Array, columns: Columns) -> Array:
    """``M − Mᴴ`` in the chosen columns, ``(..., m, k)``; M is zero in the others."""
    return m_ - scatter(adjoint(take(m_, columns, -2)), columns, m_.shape[-2], -2)


def masked(a: Array, m_: Array, same: Array) -> tuple[Array, Array]:
    """The largest entry of ``A = M − Mᴴ`` inside clusters (its diagonal is the phase), and the largest of ``M``."""
    return largest(namespace_of(a).where(same, a, full((), 0.0, a)), 2), largest(m_, 2)


def jump(w_bar: Array, near: Array, columns: Columns) -> tuple[Array, Array]:
    """The largest jump of ``λ̄`` between neighbours of a cluster, and the largest ``λ̄``."""
    xp = namespace_of(w_bar)
    every = scatter(w_bar, columns, near.shape[-1] + 1, -1)
    jump = every[..., 1:] - every[..., :-1]
    return largest(xp.where(near, jump, xp.zeros_like(jump))), largest(w_bar)


def exceeds(part: Array, whole: Array, rtol: float) -> Array:
    """``part > rtol * whole``; nothing exceeds an infinite `rtol`, for which ``0 · ∞`` is not computed."""
    return part > rtol * whole if math.isfinite(rtol) else part < 0


# --- rounding at small gaps ------------------------------------------------------------------------------------------


def close_gap(w: Array, radius: Array) -> Array:
    """The gap up to which rounding is left out, from the eigenvalues ``(..., m)`` and the largest magnitude."""
    return CLOSE / max(1, w.shape[-1]) ** 0.5 * radius


def lengths_without_own(m_: Array, columns: Columns) -> Array:
    """Norm of each column of ``M`` without its component along the own eigenvector, ``(..., k)``."""
    xp = namespace_of(m_)
    own = own_entries(columns, m_.shape[-2], m_)
    return safe_norm(xp.matrix_transpose(xp.where(own, full((), 0.0, m_), constant(m_))))


def own_entries(columns: Columns, m: int, like: Array) -> Array:
    """Whether row i belongs to the j-th chosen column itself, ``(m, k)``."""
    xp = namespace_of(like)
    i = xp.arange(m, device=array_api_compat.device(like))
    return i[:, None] == take(i, columns, -1)[None, :]


def is_rounding(
    a: Array, lengths: Array, gap: Array, close: Array, columns: Columns, growth: Array | None = None
) -> Array:
    """Whether entries of ``A = M − Mᴴ`` are no more than rounding, at gaps up to `close`: ``(..., m, k)``.

    `lengths` are those of the parts of the cotangents that count, ``(..., k)``, and `close` is ``(..., 1)``. The rows
    of M may have `growth` times the rounding errors of the cotangents, ``(..., m)``.
    """
    xp = namespace_of(a)
    columnwise = ROUNDING * eps(xp, a.dtype) * lengths[..., None, :]
    rowwise = xp.matrix_transpose(scatter(columnwise, columns, a.shape[-2], -1))
    if growth is not None:
        columnwise = columnwise * growth[..., :, None]
        rowwise = rowwise * take(growth, columns, -1)[..., None, :]
    return (xp.abs(constant(a)) <= columnwise + rowwise) & (xp.abs(gap) <= close[..., None])


def left_out(m_: Array, small: Array) -> Array:
    """``M`` with zeros where `small`, and the derivative of M: an entry may be zero at this point only."""
    return m_ - constant(namespace_of(m_).where(small, m_, full((), 0.0, m_)))


# --- the same for NumPy, in place -----------------------------------------------------------------------------------


def _in_place(
    w_bar: Array | None, v_bar: Array, w: Array, v: Array, near: Array, radius: Array, gauge_rtol: float
) -> tuple[Array, Array | None]:
    """All columns of NumPy arrays; the gauge is looked at only where something was masked."""
    label: Array | None = None  # the number of each eigenvalue's cluster
    if np.count_nonzero(near):
        label = np.zeros(w.shape, dtype=np.int64)
        np.cumsum(~near, axis=-1, out=label[..., 1:])
    m, lead = w.shape[-1], w.shape[:-1]
    x_bar, inside, whole = np.empty(v.shape, v.dtype), None, None
    # Where nothing is masked, and eigenvectors have no phase, there is nothing to check.
    if label is not None or v.dtype.kind == "c":
        inside, whole = np.zeros(lead, w.dtype), np.zeros(lead, w.dtype)

    # One batch axis, so that threads can share it; a flat batch is taken as it is.
    vectors: tuple[Any, ...] = (w_bar, w, label, close_gap(w, radius))
    matrices: tuple[Any, ...] = (v_bar, v, x_bar)
    numbers: tuple[Any, ...] = (inside, whole)
    count = math.prod(lead)
    if len(lead) != 1:
        vectors = tuple(None if a is None else a.reshape(count, a.shape[-1]) for a in vectors)
        matrices = tuple(a.reshape(count, m, m) for a in matrices)
        numbers = tuple(None if a is None else a.reshape(count) for a in numbers)
    kernel: Callable[..., None] = _whole if m <= WHOLE else _tiled
    for_parts(lambda part: kernel(*[None if a is None else a[part] for a in (*vectors, *matrices, *numbers)]), count, m)
    if inside is None:
        return x_bar, None
    bad = exceeds(inside, whole, gauge_rtol)
    if w_bar is not None:
        bad |= exceeds(*jump(w_bar, near, range(m)), gauge_rtol)
    x_bar[bad] = float("nan")
    return x_bar, bad


def _whole(
    w_bar: Array | None,
    w: Array,
    label: Array | None,
    close: Array,
    v_bar: Array,
    v: Array,
    out: Array,
    inside: Array | None,
    whole: Array | None,
) -> None:
    """One pass for matrices that stay in cache: the sum with the adjoint comes last, from a buffer."""
    m_ = np.matmul(_adjoint(v), v_bar)
    gap = _gap(w, np.empty(v.shape, w.dtype))

    # Take out what lies inside clusters, or on the diagonal, and note how much that was.
    same = None if label is None else label[..., None, :] == label[..., :, None]
    if inside is not None and whole is not None:
        whole[...] = np.max(np.abs(m_), axis=(-2, -1), initial=0)
        if same is None:
            inside[...] = np.max(2 * np.abs(_diagonal(m_).imag), axis=-1, initial=0)
        else:
            inside[...] = np.max(np.abs(m_ - _adjoint(m_)), axis=(-2, -1), initial=0, where=same)
    if same is None:
        _diagonal(gap)[...] = np.inf
    else:
        gap[same] = np.inf

    _leave_out_rounding(m_, w, gap, close)
    m_ /= gap  # ½ F ∘ M
    if w_bar is not None:
        diagonal = _diagonal(m_)
        diagonal += 0.5 * w_bar
    # V (…) Vᴴ into buffers that are free by now, then the sum with the adjoint.
    t = np.matmul(v, m_, out=gap if gap.dtype == v.dtype else None)
    x = np.matmul(t, _adjoint(v), out=m_)
    np.add(x, _adjoint(x), out=out)


def _leave_out_rounding(m_: Array, w: Array, gap: Array, close: Array) -> None:
    """Make gaps infinite where ``M − Mᴴ`` is only rounding, looking at close eigenvalues, a band of M, alone."""
    m, unit = w.shape[-1], eps(np, w.dtype)
    if m == 1:
        return
    # The norm of an item bounds those of its columns, unless its square has left the range of exponents.
    flat = m_.reshape(-1, m * m)
    squares = np.vecdot(flat, flat).real
    highest = max(squares.tolist())
    clear = ROUNDING * unit * (2 * highest) ** 0.5 if highest > unit**4 else math.inf
    # Of a random spectrum, few eigenvalues are close to more than the next one.
    reach = 1 + m // 64
    while reach < m - 1 and np.count_nonzero(w[:, reach + 1 :] - w[:, : -reach - 1] <= close):
        reach *= 2
    i, j, places = _pairs(m, min(reach, m - 1))
    both = flat.take(places, axis=1)
    a, mirrored = both[:, : i.size], both[:, i.size :]
    a = np.abs(a - (mirrored.conj() if a.dtype.kind == "c" else mirrored))
    if a.min() > clear:
        return
    bound = np.where(squares > unit**4, ROUNDING * unit * np.sqrt(2 * squares), np.inf)
    item, pair = np.divmod(np.flatnonzero(a <= bound[:, None]), i.size)
    i, j = i[pair], j[pair]

    # Compare each of the others with the norms of both columns.
    asked = np.zeros(w.shape, dtype=bool)
    asked[item, i] = asked[item, j] = True
    lengths = np.zeros(w.shape, w.dtype)
    lengths[asked] = _lengths_without_own(m_, *np.nonzero(asked))
    small = a[item, pair] <= ROUNDING * unit * (lengths[item, i] + lengths[item, j])
    small &= w[item, j] - w[item, i] <= close[item, 0]
    item, i, j = item[small], i[small], j[small]
    gap[item, i, j] = gap[item, j, i] = np.inf


@lru_cache(maxsize=16)
def _pairs(m: int, reach: int) -> tuple[Array, Array, Array]:
    """Rows and columns of the pairs ``i < j ≤ i + reach``, and where they, then their mirror images, are in memory."""
    i, j = np.nonzero(np.triu(np.tri(m, k=reach, dtype=bool), 1))
    return i, j, np.concatenate([i * m + j, j * m + i])


def _lengths_without_own(m_: Array, item: Array, column: Array) -> Array:
    """Return what `lengths_without_own` does, for the given columns."""
    rows = np.abs(m_[item, :, column])
    rows[np.arange(column.size), column] = 0
    size = rows.max(axis=-1, initial=0)
    rows /= np.where((size > 0) & (size < np.inf), size, 1)[:, None]  # no square leaves the range of exponents
    return size * np.sqrt(np.vecdot(rows, rows))


def _all_lengths_without_own(m_: Array) -> Array:
    """Return what `lengths_without_own` does, for wide matrices."""
    count, m = m_.shape[:2]
    squares = np.zeros((count, m), m_.real.dtype)
    for rows in _blocks(m, TILE):
        panel = m_[:, rows]
        panel = np.square(panel) if m_.dtype.kind != "c" else np.square(panel.real) + np.square(panel.imag)
        panel[:, range(rows.stop - rows.start), range(rows.start, rows.stop)] = 0
        squares += panel.sum(axis=1)
    lengths = np.sqrt(squares)
    # A square may have left the range of exponents.
    item, column = np.nonzero(~((squares > eps(np, squares.dtype) ** 4) & (squares < np.inf)))
    lengths[item, column] = _lengths_without_own(m_, item, column)
    return lengths


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


def _tiled(
    w_bar: Array | None,
    w: Array,
    label: Array | None,
    close: Array,
    v_bar: Array,
    v: Array,
    out: Array,
    inside: Array | None,
    whole: Array | None,
) -> None:
    """Wide matrices: tiles in place, and only the lower block triangle of the last product."""
    m_ = np.matmul(_adjoint(v), v_bar, out=out)
    if whole is not None:
        whole[...] = np.max(np.abs(m_), axis=(-2, -1), initial=0)
    bound = ROUNDING * eps(np, w.dtype) * _all_lengths_without_own(m_)
    # Overwrite M with ½ (M − Mᴴ) ∘ F.
    for upper, lower in combinations_with_replacement(_blocks(w.shape[-1], TILE), 2):
        q = m_[..., lower, upper] - _adjoint(m_[..., upper, lower])
        gap = 2 * (w[..., None, upper] - w[..., lower, None])
        same = None
        if label is not None:
            same = label[..., None, upper] == label[..., lower, None]
        elif lower == upper:
            same = np.broadcast_to(np.eye(q.shape[-1], dtype=bool), q.shape)
        if same is not None:
            if inside is not None:
                np.maximum(inside, np.max(np.abs(q), axis=(-2, -1), initial=0, where=same), out=inside)
            gap[same] = np.inf
        if np.any(w[:, lower.start, None] - w[:, upper.stop - 1, None] <= close):  # the smallest gaps of the tile
            small = np.abs(q) <= bound[..., None, upper] + bound[..., lower, None]
            small &= np.abs(gap) <= 2 * close[..., None]
            gap[small] = np.inf
        q /= gap
        m_[..., lower, upper] = q
        if lower != upper:
            m_[..., upper, lower] = _adjoint(q)
    if w_bar is not None:
        diagonal = _diagonal(m_)
        diagonal += w_bar
    t = np.matmul(v, m_)
    _product_rows(t, _adjoint(v), out)
