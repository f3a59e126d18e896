"""The criterion of singularity, in one place: a reciprocal condition number of at most 16 eps.

    rcond(M) = σ_min(M) / σ_max(M) <= 16 eps

Over orders 4 to 300, matrices that are singular but for rounding have at most 7 eps, and matrices with a condition of
1e13 (float32: 1e5) at least 48 eps. So the verdict does not depend on how rounding fell. What M is depends on what the
algorithm can see:

==========================================================  ==========================================================
used by                                                     M
==========================================================  ==========================================================
`solve`, dense `linear_solve`, dense and structured          the matrix, its rows and columns scaled by powers of two
systems of nodes                                             (`scaled_rcond`), because units do not matter there
`qr_vjp`, `weighted_least_squares`                           R with columns of unit length (`lu.rcond_of_triangle`)
Gram matrices, `least_squares_on_sphere`                     the eigenvalues themselves, known to eps of the largest
`polar`                                                      the singular values themselves, or sums of two
VJPs of the iterations                                       the gap of an eigenvalue (`amplification`)
==========================================================  ==========================================================

NaN counts as singular.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import array_api_compat

from ddnref._core.arrays import (
    Array,
    Namespace,
    as_dtype,
    eps,
    first_flagged,
    full,
    listed,
    namespace_of,
    power_of_two_below,
    real,
)
from ddnref._kernels.vectors import norm, normalised

SINGULAR = 16
"""A reciprocal condition, or a gap in units of the matrix, of at most this many eps is nothing but rounding."""
HESSIAN_AMPLIFICATION = 2**-5
"""Amplification, in units of 1/eps, from which a damped Hessian counts as singular to working precision."""
SWEEPS = 3  # over rows and columns; the scales of random units 1e-12 to 1e12 are within 2 after two
ROUNDS = 2  # of inverse iteration: the estimate is at most 3 times too large far from singular, and right near it

Product: TypeAlias = Callable[[Array, bool], Array]
"""``f(x, adjoint)``: a product with a matrix, or with its adjoint, for vectors (..., n)."""


def is_singular(rcond: Array) -> Array:
    """Judge reciprocal condition numbers; NaN counts as singular."""
    return ~(rcond > SINGULAR * eps(namespace_of(rcond), rcond.dtype))


def probe(x: Array) -> Array:
    """Return vectors of the shape of `x` and of length about one, without a structure that others might share."""
    xp, n = namespace_of(x), x.shape[-1]
    i = xp.arange(n, dtype=real(x).dtype, device=array_api_compat.device(x))
    return xp.broadcast_to(as_dtype((2 / n) ** 0.5 * xp.cos(2.4 * i * i + 0.3), x), x.shape)


def rcond(product: Product, inverse: Product, like: Array) -> Array:
    """Estimate ``σ_min / σ_max``, (...), from products with M and M⁻¹; `like` is (..., n). 0 where M⁻¹ is not finite.

    Power iterations with MᴴM and its inverse approach both from the inside, so that the estimate is never too small,
    except for rounding.
    """
    xp, start = namespace_of(like), probe(like)
    sizes = []
    for apply in (product, inverse):
        x = start
        for _ in range(ROUNDS):
            x = _unit(apply(x, False))[0]
            x, size = _unit(apply(x, True))
        sizes.append(size)
    condition = sizes[0] * sizes[1]
    good = (condition > 0) & xp.isfinite(condition)
    return xp.where(good, 1 / xp.where(good, condition, xp.ones_like(condition)), xp.zeros_like(condition))


def _unit(x: Array) -> tuple[Array, Array]:
    """Return vectors scaled to length one, unless they are zero, and their lengths."""
    size = norm(x)
    return normalised(x, as_dtype(size, x)), size


def scales(size: Product, like: Array) -> tuple[Array, Array]:
    """Return powers of two ``d_r, d_c`` such that rows and columns of ``D_r |A| D_c`` sum to about one.

    `size` is the product with |A| or a bound of it; `like`, (..., n), is real. Rows or columns of zeros are left alone.
    """
    xp = namespace_of(like)
    columns = full(like.shape, 1 / like.shape[-1], like)  # so that a row sum cannot overflow
    for _ in range(SWEEPS):
        rows = _inverse_or_one(xp, size(columns, False))
        columns = _inverse_or_one(xp, size(rows, True))
    return power_of_two_below(rows), power_of_two_below(columns)


def _inverse_or_one(xp: Namespace, x: Array) -> Array:
    positive = x > (2.0**-120 if eps(xp, x.dtype) > 2.0**-52 else 2.0**-1000)  # the inverse of less could be infinite
    return xp.where(positive, 1 / xp.where(positive, x, xp.ones_like(x)), xp.ones_like(x))


def scaled_rcond(size: Product, product: Product, inverse: Product, like: Array) -> Array:
    """Estimate the `rcond` of ``M = D_r A D_c``, whose rows and columns are of about one size, from products with A."""
    d_r, d_c = scales(size, real(like))
    # The inverses are taken of real numbers, because the square of a complex one may leave the range of exponents.
    d_r, d_c, i_r, i_c = (as_dtype(d, like) for d in (d_r, d_c, 1 / d_r, 1 / d_c))

    def scaled(x: Array, adjoint: bool) -> Array:
        return d_c * product(d_r * x, True) if adjoint else d_r * product(d_c * x, False)

    def unscaled(x: Array, adjoint: bool) -> Array:
        return i_r * inverse(i_c * x, True) if adjoint else i_c * inverse(i_r * x, False)

    return rcond(scaled, unscaled, like)


def named(one: str, many: str, singular: Array, rcond: Callable[[tuple[int, ...]], Array] | None = None) -> str:
    """Say how many of the items are singular, name the first ones, and give the `rcond` of the first; reads the host.

    `one` and `many` are words for what is singular; ``rcond(index)`` is called with the index of an item.
    """
    places, count = first_flagged(singular)
    value = "" if rcond is None else f"; rcond {float(rcond(places[0])):.1e} is not above {SINGULAR} eps"
    # A problem without batch axes has no index.
    if not singular.ndim:
        return f"{one} is singular to working precision{value and f' ({value[2:]})'}"
    items = f"item{'s' if count > 1 else ''} {listed(places)}{', …' if count > len(places) else ''}"
    return f"{count} of {math.prod(singular.shape)} {many} are singular to working precision ({items}{value})"


def gap_probe(i: Array) -> Array:
    """Return a vector of length about one for ``i = 0, 1, … n − 1``, without structure.

    It has a part of about ``1/√n`` along the direction that a nearly singular matrix almost annihilates, so that its
    solution grows like ``1 / (√n gap)``.
    """
    return (2 / i.shape[0]) ** 0.5 * namespace_of(i).cos(i * i)


def amplification(growth: Array, size: Array, unit: float) -> Array:
    """Judge by the growth ``1 / gap`` of a probe whether the gap is below 16 units times the size of the matrix."""
    return ~(growth * size * (SINGULAR * unit) < 1)
