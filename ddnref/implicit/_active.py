"""The search for the inequalities that are active at the solution next to a given point, and their multipliers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, eps, full, is_true, namespace_of, with_axes
from ddnref._kernels.dense import matvec
from ddnref._kernels.vectors import safe_norm
from ddnref.implicit._bordered import Bordered, ConjugateGradients, Direct, lengths_of, stiffness
from ddnref.implicit._structures import Diagonal, Structure

NEAR = (1e-9, 1e-7, 1e-5, 1e-3)
"""Reaches, relative to the point, within which constraints first count as active where no multipliers are given."""
SEARCH = 10
"""Steps of the search for the active constraints; with ``throw=False`` all are taken."""
PATIENCE = 3
"""Steps of the search that may not reduce the number of constraints on the wrong side."""


def multipliers(f_y: Array, h_y: Array, active: Array, softness: Array | None) -> Array:
    """Least squares for ``f_y = h_yᵀ ν`` over the active constraints: the bordered system of the identity."""
    xp = namespace_of(f_y)
    norms = lengths_of(h_y)
    # Rows of unit length need no other scale.
    c = held(h_y / norms[..., None], active[..., None])
    k = Bordered(Diagonal(xp.ones_like(f_y)), c, xp.astype(~active, f_y.dtype))
    x = k.inverse(softness, scaled=False).solve(xp.concat([-f_y, xp.zeros_like(norms)], axis=-1))
    return x[..., f_y.shape[-1] :] / norms


def softness_of(like: Array) -> float:
    """Return the softness of constraints that may repeat each other: far from rounding, and far from one."""
    return float(eps(namespace_of(like), like.dtype) ** (2 / 3))


def held(x: Array, active: Array) -> Array:
    """`x` with zeros for constraints that are not active."""
    xp = namespace_of(x)
    return xp.where(active, x, xp.zeros_like(x))


class Found(NamedTuple):
    """Active constraints and their multipliers."""

    active: Array  # (..., p)
    nu: Array  # (..., p), zero for the others
    softness: Array | None = None  # (..., p), where constraints repeat each other
    n_iter: Array | None = None
    settled: Array | None = None


class _Search(NamedTuple):
    active: Array
    pull: Array  # (..., p): multipliers as lengths
    repeated: Array  # (...) flags: active constraints depend on each other
    wrong: Array  # (...): the number of constraints on the wrong side, -1 before the first look
    fewest: Array
    patience: Array
    n_iter: Array


def search(
    y: Array,
    nu: Array | None,
    f_y: Array,
    h: Array,
    h_y: Array,
    equal: Array,
    hessian: Callable[[Array, Array], Structure],
    *,
    stop: bool,
) -> Found:
    """Find the active set of ``min ½ dᵀHd + f_yᵀd`` subject to ``h + h_y d ≤ 0``, by block principal pivoting.

    Near a solution this is the active set there, also where the point does not touch its constraints yet, or touches
    others. All constraints on the wrong side change sides at once; where that does not reduce their number, one by one.
    Constraints may repeat each other: a small number on the diagonal lets them share the multiplier. With `stop` a flag
    is read after each step.
    """
    xp, n, unit, soft = namespace_of(h), y.shape[-1], eps(namespace_of(h), h.dtype), softness_of(h)
    norms = lengths_of(h_y)
    softness = held(full(h.shape, soft, h), ~equal)
    if nu is None:
        nu = _first_multipliers(y, f_y, h, h_y, norms, equal, softness)
    h_yy = hessian(y, nu)
    # Rows of the size of H make multipliers lengths, ``η = ν ‖C_j‖ / ‖H‖``, and the matrix needs no other scale.
    size = stiffness(h_yy, y)[..., None]
    h, h_y, pull = h / norms, h_y / norms[..., None], nu * norms / size
    # What may be rounding.
    least = 8 * unit * (safe_norm(y) + safe_norm(f_y) / size[..., 0])[..., None]
    index = xp.arange(h.shape[-1], device=array_api_compat.device(h))

    def step(s: _Search) -> _Search:
        k = Bordered(h_yy, held(h_y * size[..., None], s.active[..., None]), size * xp.astype(~s.active, y.dtype))
        inverse = k.inverse(held(softness, s.active), scaled=False)
        right = xp.concat([-f_y, held(-h * size, s.active)], axis=-1)
        x = inverse.solve(right)
        for _ in range(3):  # take the softness out again
            x = x + inverse.solve(right - k.times(x), rough=True)
        d, pull = x[..., :n], x[..., n:]
        # A constraint is on the wrong side if it pulls, or if it is violated.
        wrong = xp.where(s.active, ~equal & (-pull <= least), h + matvec(h_y, d) > least)
        count = xp.sum(xp.astype(wrong, xp.int32), axis=-1, dtype=xp.int32)
        patience = xp.where(count < s.fewest, xp.full_like(count, PATIENCE), s.patience - 1)
        last = wrong & (index == xp.max(xp.where(wrong, index, xp.full_like(index, -1)), axis=-1, keepdims=True))
        change = xp.where((patience > 0)[..., None], wrong, last)
        # Without the softness, constraints that depend on each other would react without bounds.
        reaction = held(inverse.reaction(), s.active & ~equal) * size
        repeated = xp.max(reaction, axis=-1) * (64 * soft) > 1
        # Items that have settled stay as they are.
        go = s.wrong != 0
        new = _Search(s.active ^ change, pull, repeated, count, xp.minimum(count, s.fewest), patience, s.n_iter + 1)
        return _Search(*(xp.where(with_axes(go, a.ndim - go.ndim), a, b) for a, b in zip(new, s, strict=True)))

    zero = xp.zeros_like(h[..., 0], dtype=xp.int32)
    s = _Search(equal | (-pull > -h), pull, zero > 0, zero - 1, zero + (h.shape[-1] + 1), zero + PATIENCE, zero)
    for _ in range(SEARCH):
        s = step(s)
        if stop and is_true(xp.all(s.wrong == 0)):
            break
    repeated = held(softness, s.active & s.repeated[..., None])
    return Found(s.active, held(s.pull * size / norms, s.active), repeated, s.n_iter, s.wrong == 0)


def _first_multipliers(y: Array, f_y: Array, h: Array, h_y: Array, norms: Array, equal: Array, soft: Array) -> Array:
    """Return multipliers of the constraints near `y`, with the reach at which they balance the gradient best.

    A reach below the error of the point misses constraints, and one far beyond it has too many.
    """
    xp = namespace_of(h)
    best, smallest = xp.zeros_like(h), safe_norm(f_y)
    for reach in NEAR:
        nu = multipliers(f_y, h_y, equal | (h >= -reach * safe_norm(y)[..., None] * norms), soft)
        nu = xp.where(equal, nu, xp.minimum(nu, xp.zeros_like(nu)))
        left = safe_norm(f_y - matvec(xp.matrix_transpose(h_y), nu))
        better = ~(left > smallest / 10)  # NaN spreads
        best = xp.where(better[..., None], nu, best)
        smallest = xp.where(better, left, smallest)
    return best


def certainty(
    found: Found,
    equal: Array,
    z: Array,
    step: Array,
    blur: Array,
    h: Array,
    h_y: Array,
    inverse: Direct | ConjugateGradients,
) -> tuple[Array, Array]:
    """Whether the active set is right, and whether a constraint is touched with a zero multiplier up to rounding.

    The next step tells how far the corrected point may still be off. Every slack and every force must exceed it.
    """
    xp, n, unit = namespace_of(h), h_y.shape[-1], eps(namespace_of(h), h.dtype)
    norms = lengths_of(h_y)
    active, other = found.active & ~equal, ~found.active & ~equal
    slack, force = -h / norms, -z[..., n:] * norms
    length, pull = safe_norm(step[..., :n])[..., None], xp.abs(step[..., n:]) * norms
    least_length = 4 * safe_norm(blur[..., :n])[..., None] + 8 * unit * safe_norm(z[..., :n])[..., None]
    least_pull = 4 * xp.abs(blur[..., n:]) * norms
    # Steps that are rounding leave nothing open but what is at its boundary up to rounding.
    length = 3 * xp.where(length > least_length, length, xp.zeros_like(length))
    pull = 3 * xp.where(pull > least_pull, pull, xp.zeros_like(pull))
    # A constraint whose gradient is a combination of those that are held moves nothing, whether it is active or not.
    other = other & ~inverse.spans(h_y)
    unsure = (other & (slack < length - least_length)) | (active & (force < pull - least_pull))
    touched = (other & (slack <= least_length)) | (active & (force <= least_pull))
    return found.settled & ~xp.any(unsure, axis=-1), xp.any(touched, axis=-1)
