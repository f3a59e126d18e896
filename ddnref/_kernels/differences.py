"""First and second divided differences of any function, from its values and derivatives.

The quotient ``f[a, b] = (f(b) − f(a)) / (b − a)`` loses digits where `f` cancels or the gap is small. There ``f[a, b]``
is computed as the mean of ``f'`` over the interval, by the four-point Lobatto rule and its extension of Kronrod's kind
to seven points:

    (a + b)/2 ± t (b − a)/2,    t = 0, 1/√5, √(2/3), 1,    weights 0, 5, 0, 1 of 12 and 672, 625, 432, 77 of 2940

The difference between the two says how accurate the larger one is. Both ends of the interval are nodes, so that a kink
inside it shows. A jump of f is not seen by its derivative, but by its values.

Second differences ``f[a, b, c] = (f[a, b] − f[b, c]) / (a − c)`` of all triples would be an array of m³ numbers. What
the second derivative of a function of a matrix needs is a sum over one index, which is a few products of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ddnref._core.arrays import Array, as_dtype, eps, namespace_of
from ddnref._kernels.dense import constant

Scalar: TypeAlias = Callable[[Array], Array]

JUMP = 0.25
"""A change of f that differs from its integrated derivative by more than ``eps**0.25 * max|f|`` (1e-4, in single
precision 2e-2) is taken for a jump, and less for rounding. Jumps below it are missed; above it, rounding would be taken
for a jump where f cancels to ``eps**0.75`` of its terms at all eigenvalues."""


def divided_differences(f: Scalar, df: Scalar, w: Array) -> Array:
    """Return ``f[w_i, w_j]`` for all pairs of ``(..., m)`` numbers, ``df(w_i)`` where they are equal.

    It evaluates `df` at five points inside the interval of each pair, whatever its quotient looks like: terms that
    cancel inside of f, as in ``1 - exp(-w)`` near 0, do not show in its values.
    """
    xp = namespace_of(w)
    f_w, df_w = f(w), df(w)
    if w.shape[-1] == 0:
        return f_w[..., :, None] + f_w[..., None, :]

    # The quotient, and its error: f has the rounding of its value and of its argument.
    unit, size = eps(xp, w.dtype), xp.abs(f_w) + xp.abs(w * df_w)
    gap = _pairwise(w, lambda a, b: b - a)
    equal = gap == 0
    gap = xp.where(equal, xp.ones_like(gap), gap)  # no branch divides by zero
    quotient = _pairwise(f_w, lambda f_a, f_b: f_b - f_a) / gap
    rounding = unit * _pairwise(size, lambda a, b: a + b) / xp.abs(gap)
    jump = unit**JUMP * xp.max(xp.abs(f_w), axis=-1)

    zero = xp.zeros_like(gap)
    ends = w[..., :, None] + zero, w[..., None, :] + zero, df_w[..., :, None] + zero, df_w[..., None, :] + zero
    mean, error = _mean_of_derivative(df, *ends)
    use = ~equal & _is_better(*map(constant, (mean, error, quotient, rounding, gap, jump[..., None, None])))
    return xp.where(use, mean, xp.where(equal, df_w[..., None], quotient))


def _pairwise(x: Array, function: Callable[[Array, Array], Array]) -> Array:
    return function(x[..., :, None], x[..., None, :])


def _mean_of_derivative(df: Scalar, a: Array, b: Array, df_a: Array, df_b: Array) -> tuple[Array, Array]:
    """Return the mean of ``f'`` between `a` and `b` by the seven-point rule, and an estimate of its error."""
    xp = namespace_of(a)
    centre, half = a / 2 + b / 2, b / 2 - a / 2
    middle = df(centre)
    inner, outer = ((df(centre - t * half), df(centre + t * half)) for t in (0.2**0.5, (2 / 3) ** 0.5))
    rule = ((77, (df_a, df_b)), (432, outer), (625, inner), (672, (middle,)))
    mean = sum(weight / 2940 * sum(values) for weight, values in rule)
    size = sum(weight / 2940 * sum(map(xp.abs, values)) for weight, values in rule)
    # The smaller rule has order h⁶, the larger one h¹⁰.
    difference = xp.abs(mean - (df_a + df_b + 5 * sum(inner)) / 12)
    ratio = difference / xp.where(size > 0, size, xp.ones_like(size))
    error = xp.where(ratio < 1, size * ratio**1.5, size)
    return mean, xp.where(error > 2 * eps(xp, a.dtype) * size, error, xp.zeros_like(error))


def _is_better(mean: Array, error: Array, quotient: Array, rounding: Array, gap: Array, jump: Array) -> Array:
    """Whether the mean of the derivative is more accurate than the quotient, and f has no jump; false for NaN."""
    xp = namespace_of(mean)
    return (error <= rounding) & (xp.abs(gap * (quotient - mean)) <= jump)


# --- second differences ---------------------------------------------------------------------------------------------


def second_difference_product(w: Array, f_w: Array, phi: Array, psi: Array, a: Array, b: Array) -> Array:
    """Return ``T_ij = Σ_k f[w_i, w_k, w_j] A_ik B_kj`` for ``(..., m, m)`` matrices A and B.

    `phi` and `psi` are the first differences ``f[w_i, w_j]`` and ``f'[w_i, w_j]``, with f' and f'' on their diagonals.
    It takes seven products, whatever coincides.
    """
    xp = namespace_of(w)
    if w.shape[-1] == 0:
        return a @ b
    gap = _pairwise(w, lambda w_i, w_j: w_i - w_j)
    near = _are_near(gap, w, f_w, phi, psi)
    reciprocal = xp.where(near, xp.zeros_like(gap), 1 / xp.where(near, xp.ones_like(gap), gap))

    # Where i and j are far from each other, f[i, k, j] = (f[i, k] − f[k, j]) / (w_i − w_j) for every k.
    far = reciprocal * ((phi * a) @ b - a @ (phi * b))
    # Where they are near but k is far, f[i, k, j] = (f[i, j] − f[k, j]) / (w_i − w_k).
    distant = reciprocal * a
    mixed = phi * (distant @ b) - distant @ (phi * b)
    # Where all are near, f[i, k, j] = (f'[i, k] + f'[k, j] + f'[i, j]) / 4 − (f''_i + f''_k + f''_j) / 12, which is
    # exact for polynomials of degree four.
    d = xp.linalg.diagonal(psi)
    close = as_dtype(near, a) * a
    rest = psi / 4 - _pairwise(d, lambda d_i, d_j: d_i + d_j) / 12
    within = (close * (psi / 4 - d[..., None, :] / 12)) @ b + close @ (psi / 4 * b) + rest * (close @ b)
    return far + as_dtype(near, a) * (mixed + within)


def _are_near(gap: Array, w: Array, f_w: Array, phi: Array, psi: Array) -> Array:
    """Whether the formula for close numbers is more accurate for a pair than a quotient of first differences.

    For numbers within h of each other its error is about ``h³ f⁽⁵⁾ / 720``. The quotient has that of rounding,
    ``eps |f'| / h``, so that at most about ``eps**0.75`` is lost at any gap. Two estimates of the former are used.
    """
    xp = namespace_of(w)
    h, unit = xp.abs(gap), eps(xp, w.dtype)
    df, d = xp.linalg.diagonal(phi), xp.linalg.diagonal(psi)

    # The first estimate extrapolates how much f'' changes between the two, relative to its size.
    size = xp.maximum(_pairwise(xp.abs(d), xp.maximum), xp.abs(psi))
    size_or_1 = xp.where(size > 0, size, xp.ones_like(size))
    change = _pairwise(d, lambda d_i, d_j: xp.abs(d_i - d_j))
    bend = xp.abs(_pairwise(d, lambda d_i, d_j: d_i + d_j) / 2 - psi)
    error = size * ((change / size_or_1) ** 3 / 8 + (bend / size_or_1) ** 1.5)
    largest = _pairwise(xp.max(xp.abs(phi), axis=-1), xp.maximum)  # of all quotients with one of the two
    changes_little = error * h <= 4 * unit * largest

    # The second one compares f[i, j] with the trapezoidal rule corrected at its ends, whose error is h⁴ f⁽⁵⁾ / 720. It
    # is needed at inflection points, where f'' is small by itself, and is blind unless f' nearly determines the rule.
    rule = _pairwise(df, lambda f_i, f_j: f_i + f_j) / 2 + gap * _pairwise(d, lambda d_i, d_j: d_j - d_i) / 12
    misfit = xp.abs(phi - rule)
    rounding = unit * xp.max(xp.abs(df) + xp.abs(w * d), axis=-1)[..., None, None]  # of f' and of its argument
    slope = xp.maximum(_pairwise(xp.abs(df), xp.maximum), xp.abs(phi))
    fits = (misfit <= 4 * rounding) & (h * (change + bend) <= 0.01 * slope)

    # A jump between the two is not seen by derivatives, and makes them far from each other at any gap.
    jump = unit**JUMP * xp.max(xp.abs(f_w), axis=-1)[..., None, None]
    return (changes_little | fits) & (h * misfit <= jump)
