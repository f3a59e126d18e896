"""The VJP of singular triples in closed form, and how far a loss depends on what the matrix leaves undetermined.

With ``M = Uᴴ Ū_K`` and ``N = Vᴴ V̄_K`` for the k leading columns K, zero in the others, and the skew parts
``J = ½ (M − Mᴴ)`` and ``L = ½ (N − Nᴴ)``,

    P_ij = (J + L)_ij / (s_j − s_i)    between distinct singular values, 0 elsewhere
    Q_ij = (J − L)_ij / (s_j + s_i)    unless both are zero, its diagonal the phase between u_j and v_j
    X̄ = U (diag(s̄) + P + Q) Vᴴ + (I − U Uᴴ) Ū diag(1/s) Vᴴ + U diag(1/s) V̄ᴴ (I − V Vᴴ)

Only ``J + L`` meets the small denominators, because equal singular values leave open a rotation of u and v together; no
digit is lost in ``s_j² − s_i²``. Two zero values leave the rotations of u and of v open separately.

An entry of ``J + L``, of ``J − L`` or a column of ``(I − U Uᴴ) Ū`` that is no more than the rounding errors of the
cotangents is left out where the denominator is small, as in ``eigh_vjp.py``. The result is that of the formula for
cotangents whose columns differ by at most ``8 √m eps`` of the part that counts, which leaves out the components of
``ū_j`` along ``u_j`` and of ``v̄_j`` along ``v_j``.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import numpy as np
from array_api_compat import is_numpy_array

from ddnref._core.arrays import Array, adjoint, as_dtype, eps, full, is_complex, namespace_of, nan_where
from ddnref._core.selection import Columns, take
from ddnref._kernels.dense import constant, infinity
from ddnref._kernels.eigh_jvp import none_flagged
from ddnref._kernels.eigh_vjp import (
    ROUNDING,
    _pairs,
    antisymmetric_part,
    close_gap,
    cluster_mask,
    exceeds,
    is_rounding,
    jump,
    left_out,
    own_entries,
)
from ddnref._kernels.numpy import _diagonal, for_parts
from ddnref._kernels.numpy import adjoint as adjoint_of
from ddnref._kernels.vectors import largest, safe_norm


class Undetermined(NamedTuple):
    """How far the loss depends on what the matrix leaves open, for each item."""

    gauge: Array
    """Flags: it depends on a basis, an order or a phase."""
    singular: Array
    """Flags: it depends on a zero value, or on a vector of one that leaves the space of the others."""
    measured: tuple[tuple[Array, Array], ...]
    """Parts of the cotangents inside the gauge, each with the size to compare it with."""


def triples_vjp(
    u_bar: Array | None,
    s_bar: Array | None,
    v_bar: Array | None,
    u: Array,
    s: Array,
    v: Array,
    k: int,
    near: Array,
    zero: Array,
    gauge_rtol: float,
) -> tuple[Array, Undetermined | None]:
    """Return X̄, NaN for items whose loss is not determined by the matrix, and which these are.

    The cotangents, one of them given, belong to the k leading columns of the thin decomposition `u`, `s`, `v`. `near`
    says which neighbouring values count as equal, ``(..., n - 1)``, and `zero` which count as zero, ``(..., n)``.
    ``None`` instead of flags says that there is nothing to depend on.
    """
    xp, columns, everything = namespace_of(u), range(k), k == s.shape[-1]
    if is_numpy_array(u) and everything and u_bar is not None and v_bar is not None:
        flagged = np.any(near, axis=-1) | np.any(zero, axis=-1)
        if not flagged.any():
            return _in_place(u_bar, s_bar, v_bar, u, s, v, gauge_rtol)
        if not flagged.all():
            return _apart(flagged, u_bar, s_bar, v_bar, u, s, v, near, zero, gauge_rtol)
    u_k, s_k, v_k, zero_k = (take(a, columns, -1) for a in (u, s, v, zero))
    if u_bar is None and v_bar is None:
        found = _of_values(s_bar, near, zero, columns, gauge_rtol)
        values = _or_nan(as_dtype(s_bar, u)[..., None, :], found)
        return (u_k * values) @ adjoint(v_k), found

    # Components inside the spaces of U and V, and what is left outside of them.
    m_, n_ = (None if bar is None else adjoint(q) @ bar for q, bar in ((u, u_bar), (v, v_bar)))
    outer_u, outer_v = (
        None if bar is None or q.shape[-2] == q.shape[-1] else bar - q @ inside
        for q, bar, inside in ((u, u_bar, m_), (v, v_bar, n_))
    )
    a, b = (antisymmetric_part(x, columns) for x in (_sum(m_, n_), _sum(m_, None if n_ is None else -n_)))
    both_zero = zero[..., :, None] & zero_k[..., None, :]
    same = cluster_mask(near, columns) | both_zero
    found = _checked(s_bar, (m_, n_, outer_u, outer_v), a, b, same, both_zero, near, zero, columns, gauge_rtol)

    # ½ (P + Q) and ½ (P − Q) of the skew parts; no branch divides by zero.
    lengths, close = _lengths(m_, n_, outer_u, outer_v, columns), close_gap(s, s[..., :1])
    difference, total = (s_k[..., None, :] + sign * s[..., :, None] for sign in (-1, 1))
    infinite = infinity(s)
    a = left_out(a, is_rounding(a, lengths, difference, close, columns))
    b = left_out(b, is_rounding(b, lengths, total, close, columns))
    p = a / xp.where(same, infinite, 2 * difference)
    q = b / xp.where(both_zero, infinite, 2 * total)

    # X̄ = Y V_Kᴴ + U_K Zᴴ. Columns that were not chosen move with the chosen ones only, in Z.
    y = u @ _or_nan(p + q, found)
    if s_bar is not None:
        y = y + u_k * as_dtype(s_bar, u)[..., None, :]
    divisor = xp.where(zero_k, infinite, s_k)[..., None, :]
    if outer_u is not None:
        y = y + _outer(outer_u, lengths, s_k, close) / divisor
    z = None if everything else v[..., :, k:] @ (p - q)[..., k:, :]
    if outer_v is not None:
        z = _sum(z, _outer(outer_v, lengths, s_k, close) / divisor)
    if z is None:
        return y @ adjoint(v_k), found
    return xp.concat([y, u_k], axis=-1) @ adjoint(xp.concat([v_k, z], axis=-1)), found


# --- what the matrix leaves undetermined ----------------------------------------------------------------------------


def _of_values(s_bar: Array, near: Array, zero: Array, columns: Columns, gauge_rtol: float) -> Undetermined | None:
    """Say where a loss of the values alone depends on their order, or on one that is zero."""
    if none_flagged(near) and none_flagged(zero):
        return None
    xp = namespace_of(s_bar)
    # Zero ones are equal too, but have a kink each, as the absolute value has.
    order = jump(s_bar, near & ~zero[..., 1:], columns)
    kink = largest(xp.where(take(zero, columns, -1), s_bar, xp.zeros_like(s_bar)))
    return Undetermined(exceeds(*order, gauge_rtol), exceeds(kink, largest(s_bar), gauge_rtol), (order,))


def _checked(
    s_bar: Array | None,
    parts: tuple[Array | None, ...],
    a: Array,
    b: Array,
    same: Array,
    both_zero: Array,
    near: Array,
    zero: Array,
    columns: Columns,
    gauge_rtol: float,
) -> Undetermined | None:
    """Measure what lies inside the gauge: M, N and what is outside of the spaces are `parts`, A and B twice J ± L."""
    if none_flagged(near) and none_flagged(zero) and not is_complex(a):
        return None
    xp, nothing = namespace_of(a), full((), 0.0, a)
    *_, outer_u, outer_v = parts
    whole = reduce(xp.maximum, (largest(part, 2) for part in parts if part is not None))
    # Equal values leave J + L open, its diagonal being the phase, and zero ones J − L as well.
    inside = xp.maximum(largest(xp.where(same, a, nothing), 2), largest(xp.where(both_zero, b, nothing), 2))
    gauge, measured = exceeds(inside, whole, gauge_rtol), ((inside, whole),)
    # Vectors of zero values may turn to whatever is orthogonal to the others.
    singular = gauge & False
    for outer in (outer_u, outer_v):
        if outer is not None:
            loose = xp.where(take(zero, columns, -1)[..., None, :], outer, nothing)
            singular = singular | exceeds(largest(loose, 2), whole, gauge_rtol)
    values = None if s_bar is None else _of_values(s_bar, near, zero, columns, gauge_rtol)
    if values is None:
        return Undetermined(gauge, singular, measured)
    return Undetermined(gauge | values.gauge, singular | values.singular, (*measured, *values.measured))


def _or_nan(x: Array, found: Undetermined | None) -> Array:
    """`x`, or NaN for items whose loss is not determined: from a small factor it reaches every entry of X̄."""
    return x if found is None else nan_where((found.gauge | found.singular)[..., None, None], x)


# --- rounding -------------------------------------------------------------------------------------------------------


def _lengths(
    m_: Array | None, n_: Array | None, outer_u: Array | None, outer_v: Array | None, columns: Columns
) -> Array:
    """Norms of ``ū_j`` and ``v̄_j`` together, without their components along ``u_j`` and ``v_j``, ``(..., k)``."""
    parts = [constant(part) for part in (outer_u, outer_v) if part is not None]
    for part in (m_, n_):
        if part is not None:
            xp = namespace_of(part)
            own = own_entries(columns, part.shape[-2], part)
            parts.append(xp.where(own, full((), 0.0, part), constant(part)))
    return safe_norm(xp.matrix_transpose(xp.concat(parts, axis=-2)))


def _outer(outer: Array, lengths: Array, s: Array, close: Array) -> Array:
    """``(I − U Uᴴ) Ū`` with zeros in columns that are rounding, where ``1/s`` would amplify it.

    Of random problems, 6 to 512 rows, that of a column was at most half of what is left out.
    """
    xp = namespace_of(outer)
    size = safe_norm(xp.matrix_transpose(constant(outer)))
    bound = 2 * ROUNDING * outer.shape[-2] ** 0.5 * eps(xp, s.dtype) * lengths
    return left_out(outer, ((size <= bound) & (s <= close))[..., None, :])


def _sum(a: Array | None, b: Array | None) -> Array:
    """The sum of two arrays, of which ``None`` is zero."""
    return b if a is None else a if b is None else a + b


# --- the same for NumPy, in place -------------------------------------------------------------------------------------


def _in_place(
    u_bar: Array, s_bar: Array | None, v_bar: Array, u: Array, s: Array, v: Array, gauge_rtol: float
) -> tuple[Array, Undetermined | None]:
    """All columns of NumPy arrays in which no values are equal or zero, so that the phase alone is to be checked.

    On one thread in float32 this takes 0.4 of the time of the standard form at (1000, 16, 8), 0.8 at (5, 128, 128).
    ``tests/linalg/test_svd.py`` holds the two to each other.
    """
    (*lead, m, k), n, count = u.shape, v.shape[-2], math.prod(u.shape[:-2])
    x_bar, inside, whole = np.empty((count, m, n), u.dtype), None, None
    if u.dtype.kind == "c":
        inside, whole = np.zeros(count, s.dtype), np.zeros(count, s.dtype)
    # One batch axis, so that threads can share it.
    arrays = [u_bar.reshape(count, m, k), v_bar.reshape(count, n, k), u.reshape(count, m, k), v.reshape(count, n, k)]
    arrays += [s.reshape(count, k), x_bar]
    others = [None if s_bar is None else s_bar.reshape(count, k), inside, whole]
    for_parts(
        lambda part: _whole(*[a[part] for a in arrays], *[None if a is None else a[part] for a in others]),
        count,
        math.isqrt(m * n),
    )
    x_bar = x_bar.reshape(*lead, m, n)
    if inside is None or whole is None:
        return x_bar, None
    inside, whole = inside.reshape(lead), whole.reshape(lead)
    bad = np.asarray(exceeds(inside, whole, gauge_rtol))
    x_bar[bad] = np.nan
    return x_bar, Undetermined(bad, bad & False, ((inside, whole),))


def _apart(
    flagged: Array,
    u_bar: Array,
    s_bar: Array | None,
    v_bar: Array,
    u: Array,
    s: Array,
    v: Array,
    near: Array,
    zero: Array,
    gauge_rtol: float,
) -> tuple[Array, Undetermined]:
    """Compute items without equal or zero values in place, and the flagged ones in the standard form.

    Of 1000 random 32×32 matrices in float32, one is often enough to be flagged; together they took 4.3 times as
    long.
    """
    x_bar = np.empty((*u.shape[:-1], v.shape[-2]), u.dtype)
    gauge, singular = np.zeros(flagged.shape, dtype=bool), np.zeros(flagged.shape, dtype=bool)
    measured: list[tuple[Array, Array]] = []
    for items in (flagged, ~flagged):
        bars = u_bar[items], None if s_bar is None else s_bar[items], v_bar[items]
        triples = u[items], s[items], v[items], s.shape[-1]
        x_bar[items], found = triples_vjp(*bars, *triples, near[items], zero[items], gauge_rtol)
        if found is None:
            continue
        gauge[items], singular[items] = found.gauge, found.singular
        for pair in found.measured:
            part, whole = np.zeros(flagged.shape, s.dtype), np.zeros(flagged.shape, s.dtype)
            part[items], whole[items] = pair
            measured.append((part, whole))
    return x_bar, Undetermined(gauge, singular, tuple(measured))


def _whole(
    u_bar: Array,
    v_bar: Array,
    u: Array,
    v: Array,
    s: Array,
    out: Array,
    s_bar: Array | None,
    inside: Array | None,
    whole: Array | None,
) -> None:
    """One part of the batch: the steps of `triples_vjp`, but a look only at pairs that can be close, or small."""
    k, unit = s.shape[-1], ROUNDING * eps(np, s.dtype)
    m_, n_ = adjoint_of(u) @ u_bar, adjoint_of(v) @ v_bar
    outer = None
    if u.shape[-2] != v.shape[-2]:  # of the longer side
        outer = u_bar - u @ m_ if u.shape[-2] > k else v_bar - v @ n_
    lengths, close = _lengths_of(m_, n_, outer), close_gap(s, s[:, :1])
    if inside is not None and whole is not None:
        for part in (m_, n_, outer):
            if part is not None:
                np.maximum(whole, np.max(np.abs(part), axis=(-2, -1)), out=whole)
        inside[...] = np.max(2 * np.abs(_diagonal(m_).imag + _diagonal(n_).imag), axis=-1)
    a, b = m_ + n_, m_ - n_
    a, b = a - adjoint_of(a), b - adjoint_of(b)
    difference = 2 * (s[:, None, :] - s[:, :, None])
    _diagonal(difference)[...] = np.inf
    total = 2 * (s[:, None, :] + s[:, :, None])

    # Of a random spectrum, few values are close to more than the next one, and few are small.
    if k > 1:
        reach = 1 + k // 64
        while reach < k - 1 and np.count_nonzero(s[:, : -reach - 1] - s[:, reach + 1 :] <= close):
            reach *= 2
        i, j, places = _pairs(k, min(reach, k - 1))
        entries = np.abs(a.reshape(-1, k * k).take(places[: i.size], axis=1))
        small = (entries <= unit * (lengths[:, i] + lengths[:, j])) & (s[:, i] - s[:, j] <= close)
        item, pair = np.nonzero(small)
        difference[item, i[pair], j[pair]] = difference[item, j[pair], i[pair]] = np.inf
    tail = slice(k - max(np.count_nonzero(s <= close, axis=-1), default=0), k)
    if tail.start < k:
        small = np.abs(b[:, tail, tail]) <= unit * (lengths[:, None, tail] + lengths[:, tail, None])
        small &= total[:, tail, tail] <= 2 * close[..., None]
        total[:, tail, tail][small] = np.inf

    a /= difference
    b /= total
    a += b
    if s_bar is not None:
        diagonal = _diagonal(a)
        diagonal += s_bar
    y = u @ a
    if outer is not None:
        if tail.start < k:
            outer[..., tail] = _outer(outer[..., tail], lengths[:, tail], s[:, tail], close)
        outer /= s[:, None, :]
        if u.shape[-2] > k:
            y += outer
    np.matmul(y, adjoint_of(v), out=out)
    if outer is not None and u.shape[-2] == k:
        out += u @ adjoint_of(outer)


def _lengths_of(m_: Array, n_: Array, outer: Array | None) -> Array:
    """Return what `_lengths` does, without a copy unless a square has left the range of exponents."""
    squares = np.zeros(m_.shape[::2], m_.real.dtype)
    for part in (m_, n_):
        own = _diagonal(part).copy()
        _diagonal(part)[...] = 0
        squares += _squares(part)
        _diagonal(part)[...] = own
    if outer is not None:
        squares += _squares(outer)
    if np.all((squares > eps(np, squares.dtype) ** 4) & (squares < np.inf)):
        return np.sqrt(squares)
    return _lengths(m_, n_, outer, None, range(m_.shape[-1]))


def _squares(x: Array) -> Array:
    """Sums of the squares of each column."""
    if x.dtype.kind == "c":
        return _squares(x.real) + _squares(x.imag)
    return np.einsum("bij,bij->bj", x, x)
