r"""Robust pooling: the location ``y = argmin_u Σ_i φ(u − x_i; α)`` of many numbers, some of them outliers.

    kind          φ(z)                       ψ = φ'                        φ''
    quadratic     ½ z²                       z                             1
    pseudo-huber  α² (s − 1), s = √(1+z²/α²) z / s                         1 / s³
    huber         ½ z², outside α|z| − ½ α²  clip(z, −α, α)                1 inside, 0 outside
    welsch        1 − e, e = exp(−z²/2α²)    z e / α²                      e (1 − z²/α²) / α²
    truncated     ½ z², outside ½ α²         z inside, 0 outside           1 inside, 0 outside

VJP and JVP differentiate ``Σ ψ(y − x_i) = 0``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, Namespace, among, eps, is_true, namespace_of, nan_where, refuse_recording
from ddnref._core.checks import conform
from ddnref._core.loops import CHECK_EVERY, LoopOptions, WhileLoop, run
from ddnref._kernels.public import public
from ddnref.errors import ConvergenceError, SingularError


class Penalty(NamedTuple):
    """φ with ``α = 1`` in scaled arguments ``z / α``, up to a factor."""

    value: Callable[[Namespace, Array], Array]  # φ
    weight: Callable[[Namespace, Array], Array]  # ψ / z
    curvature: Callable[[Namespace, Array], Array]  # φ''


def _one(xp: Namespace, z: Array) -> Array:
    return xp.ones_like(z)


def _inside(xp: Namespace, z: Array) -> Array:  # the bound itself counts as inside
    return xp.astype(xp.abs(z) <= 1, z.dtype)


def _s(xp: Namespace, z: Array) -> Array:  # s and e of the table
    return xp.minimum(xp.sqrt(1 + z * z), 1 + xp.abs(z))  # the second one where the square overflows


def _e(xp: Namespace, z: Array) -> Array:
    return xp.exp(-z * z / 2)


def _huber(xp: Namespace, z: Array) -> Array:
    c = xp.abs(z) - xp.maximum(xp.abs(z) - 1, xp.zeros_like(z))  # |clip(z)|
    return c * (xp.abs(z) - c / 2)


# With α these are α² φ(z/α), but for Welsch φ(z/α): a factor that changes no minimum and no gradient.
PENALTIES = {
    "quadratic": Penalty(lambda xp, z: z * z / 2, _one, _one),  # noqa: ARG005
    "pseudo-huber": Penalty(
        lambda xp, z: z * (z / (1 + _s(xp, z))), lambda xp, z: 1 / _s(xp, z), lambda xp, z: 1 / _s(xp, z) ** 3
    ),
    "huber": Penalty(_huber, lambda xp, z: 1 / xp.maximum(xp.abs(z), xp.ones_like(z)), _inside),
    "welsch": Penalty(lambda xp, z: -xp.expm1(-z * z / 2), _e, lambda xp, z: _e(xp, z) * (1 - z * z)),
    "truncated": Penalty(lambda xp, z: xp.minimum(z * z, xp.ones_like(z)) / 2, _inside, _inside),
}


class RobustPoolInfo(NamedTuple):
    """How the iteration ended for each item."""

    converged: Array
    """(...) flags."""
    n_iter: Array
    """(...) integers: steps of the start that won."""
    residual_norm: Array
    """(...): ``|Σ ψ_i| / Σ |ψ_i|`` at the returned point, less what rounding of the numbers makes of the sum."""


@public
def robust_pool(
    x: Array,
    /,
    *,
    kind: str = "pseudo-huber",
    alpha: float = 1.0,
    rtol: float | None = None,
    maxiter: int = 100,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, RobustPoolInfo]:
    r"""Location of the numbers in the last axis under a robust penalty.

    Parameters
    ----------
    x : (..., m) real array
    kind : {"quadratic", "pseudo-huber", "huber", "welsch", "truncated"}
    alpha : float, positive
        The distance at which a number starts to count as an outlier.
    rtol : float, optional
        Largest accepted ``|Σ ψ_i| / Σ |ψ_i|`` beyond rounding; default ``64 eps``.
    maxiter, check_every : int
        Steps, and steps between two looks at the flags.
    throw : bool, default True
        Raise for items that fail. With ``False`` their last iterate is returned, NaN where an item is not finite.
    while_loop : callable, optional
        A loop such as ``jax.lax.while_loop``, where the call is traced.

    Returns
    -------
    y : (...) array
    info : RobustPoolInfo

    Raises
    ------
    ConvergenceError
        The stationarity condition was not met within `maxiter`, or an item is not finite.
    TypeError, ValueError
        Complex or integer arrays; no entries; unknown `kind`; `alpha` not positive.

    Notes
    -----
    Descents from the mean and from the median; the lowest end is returned. The first three penalties are convex, and
    every descent finds the minimum. The truncated one is not. Its minimum is the mean of those numbers that are within
    alpha of it, neighbours in sorted order; one sort finds the best such set, and a third descent starts there. So the
    result is the global minimum, up to ties. Welsch's penalty gets the same third start, and the lowest of three
    local minima is not always the global one. Where Huber's minimum is an interval (no number within alpha of it) any
    point of it may be returned. Each step is Newton's where that ends lower than the reweighted mean
    ``Σ w_i x_i / Σ w_i``, ``w = ψ(z)/z``, which never ascends, and that mean elsewhere. Cost: one sort, two for the
    last two penalties, and about ten passes over x per step.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022), section 5.1.

    Examples
    --------
    >>> import numpy as np
    >>> y, info = ddnref.nodes.robust_pool(np.asarray([1.0, 1.1, 0.9, 50.0]), kind="truncated")
    >>> float(y.round(12))
    1.0
    """
    xp, penalty = conform("(m+)", real_only=True, x=x).xp, _penalty(kind)
    refuse_recording("robust_pool", x=x)
    x = nan_where(~xp.all(xp.isfinite(x), axis=-1, keepdims=True), x)
    rtol = 64 * eps(xp, x.dtype) if rtol is None else rtol
    # Measured from the median, in units of alpha, the numbers are small, and a common offset costs no digits.
    ordered, m = xp.sort(x, axis=-1), x.shape[-1]
    center = ordered[..., (m - 1) // 2, None] / 2 + ordered[..., m // 2, None] / 2
    z = (x - center) / alpha
    # Descend from the median and from the mean, for penalties that are not convex also from the truncated minimum.
    starts = [xp.zeros_like(z[..., 0]), xp.mean(z, axis=-1)]
    if kind in ("welsch", "truncated"):
        starts.append(_truncated_minimum((ordered - center) / alpha))
    start = xp.stack(starts, axis=-1)
    state = _descend(penalty, z[..., None, :], start, LoopOptions(rtol, maxiter, check_every, while_loop, throw))
    # Keep the lowest end, and of those that are equal but for rounding the first.
    lowest = xp.min(state.value, axis=-1, keepdims=True)
    low = state.value <= lowest + 16 * eps(xp, x.dtype) * xp.abs(lowest)
    won = xp.argmax(xp.astype(low, xp.int32), axis=-1, keepdims=True)
    u, n_iter, residual = (xp.take_along_axis(a, won, axis=-1)[..., 0] for a in (state.u, state.n_iter, state.residual))
    info = RobustPoolInfo(residual <= rtol, n_iter, residual)
    if throw and is_true(xp.any(~info.converged)):
        raise ConvergenceError(
            f"robust_pool({kind!r}) did not converge within maxiter={maxiter}{among(~info.converged)}, or its input is "
            "not finite. The most likely causes: rtol is below rounding, or alpha is very small compared with the "
            "spread of the numbers. Raise alpha, rtol or maxiter, or pass throw=False to get the last iterate and info."
        )
    return nan_where(xp.isnan(residual), center[..., 0] + alpha * u), info  # an array, also without axes


def _truncated_minimum(x: Array) -> Array:
    """The minimum of ``Σ min((u − x_i)², 1)`` over u, for ascending numbers (..., m).

    While u grows, x_i comes within reach at x_i − 1 and leaves at x_i + 1. Between two such events the set in reach
    does not change: n neighbours from `low` to `high`. Their mean is a candidate, with the value ``m − n`` plus their
    squared deviations. At the minimum the candidate has exactly its set in reach; for all others the value is an upper
    bound.
    """
    xp, m = namespace_of(x), x.shape[-1]
    events = xp.concat([x - 1, x + 1], axis=-1)
    enters = xp.astype(xp.argsort(events, axis=-1, stable=True) < m, xp.int64)
    high = xp.cumulative_sum(enters, axis=-1)
    low = xp.cumulative_sum(1 - enters, axis=-1)
    # Numbers far away must not cost digits, so sums are kept relative to cells of length 2. A set spans two cells at
    # most, one with an even and one with an odd number.
    cell = xp.floor(x / 2)
    offset = x - 2 * cell
    is_odd = cell - 2 * xp.floor(cell / 2) > 0.5
    zero = xp.zeros_like(x[..., :1])

    def sums(flags: Array) -> list[Array]:
        """Number, mean and squared deviations of the members of each set in one kind of cell."""
        members = (xp.where(flags, a, xp.zeros_like(a)) for a in (xp.ones_like(x), offset, offset * offset))
        totals = [xp.concat([zero, xp.cumulative_sum(a, axis=-1)], axis=-1) for a in members]
        n, first, second = (xp.take_along_axis(t, high, axis=-1) - xp.take_along_axis(t, low, axis=-1) for t in totals)
        mean = first / xp.where(n > 0, n, xp.ones_like(n))
        return [n, mean, second - n * mean * mean]

    (n_even, even, spread), (n_odd, odd, more) = sums(~is_odd), sums(is_odd)
    # The odd cell lies to the right of the even one if the lowest member is even, and to the left if it is odd.
    lowest = xp.minimum(low, xp.full_like(low, m - 1))
    starts_odd = xp.take_along_axis(xp.astype(is_odd, x.dtype), lowest, axis=-1)
    apart = odd + 2 - 4 * starts_odd - even
    n = xp.where(high > low, n_even + n_odd, xp.ones_like(even))
    value = spread + more + n_even * n_odd / n * apart * apart - (n_even + n_odd)
    # Each mean, from the origin of the cell of the lowest member.
    origin = xp.take_along_axis(2 * cell, lowest, axis=-1)
    mean = origin + xp.where(starts_odd > 0, odd - n_even / n * apart, even + n_odd / n * apart)
    best = xp.argmin(value, axis=-1, keepdims=True)
    return xp.take_along_axis(mean, best, axis=-1)[..., 0]


class _State(NamedTuple):
    """Points, and sums over the numbers at each."""

    u: Array
    value: Array  # Σ φ
    residual: Array  # |Σ ψ| / Σ |ψ|
    psi: Array
    weight: Array
    curvature: Array
    n_iter: Array


def _descend(phi: Penalty, x: Array, start: Array, options: LoopOptions) -> _State:
    """Both starts at once, (..., 2) over x of shape (..., 1, m)."""
    xp, rtol, unit = namespace_of(x), options.rtol, eps(namespace_of(x), x.dtype)

    def at(u: Array, n_iter: Array) -> _State:
        z = u[..., None] - x
        weight = phi.weight(xp, z)
        psi = z * weight
        total, size = xp.sum(psi, axis=-1), xp.sum(xp.abs(psi), axis=-1)
        # Where nearly all ψ are zero, what is left of their sum may be the rounding of u and x.
        blur = 2 * unit * xp.sum(xp.abs(weight) * (xp.abs(u)[..., None] + xp.abs(x)), axis=-1)
        beyond = xp.maximum(xp.abs(total) - blur, xp.zeros_like(total))
        residual = beyond / xp.where(size > 0, size, xp.ones_like(size))
        value, curvature = (xp.sum(f(xp, z), axis=-1) for f in (phi.value, phi.curvature))
        return _State(u, value, residual, total, xp.sum(weight, axis=-1), curvature, n_iter)

    def body(s: _State) -> _State:
        # The reweighted mean never ascends; Newton's step is taken where it ends lower still.
        mean, newton = (
            at(s.u - s.psi / xp.where(slope > 0, slope, xp.ones_like(slope)), s.n_iter + 1)
            for slope in (s.weight, s.curvature)
        )
        better = (s.curvature > 0) & (newton.value <= mean.value + 8 * unit * mean.value)  # near the end both are equal
        step = (xp.where(better, a, b) for a, b in zip(newton, mean, strict=True))
        # Items that have converged stay as they are, bit for bit.
        return _State(*(xp.where(s.residual > rtol, new, old) for new, old in zip(step, s, strict=True)))

    n_iter = xp.zeros(start.shape, dtype=xp.int32, device=array_api_compat.device(x))
    return run(
        lambda s: s.residual > rtol, body, at(start, n_iter), maxiter=options.maxiter,
        check_every=options.check_every, while_loop=options.while_loop,
    )  # fmt: skip


def _penalty(kind: str) -> Penalty:
    if not isinstance(kind, str) or kind not in PENALTIES:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(PENALTIES)}.")
    return PENALTIES[kind]


@public
def robust_pool_vjp(
    y_bar: Array, y: Array, x: Array, /, *, kind: str = "pseudo-huber", alpha: float = 1.0, throw: bool = True
) -> Array:
    r"""Gradient of a loss of `robust_pool`.

    Parameters
    ----------
    y_bar, y : (...) arrays
        Cotangent of the output, and the output.
    x, kind, alpha
        As in `robust_pool`, which has the same ``TypeError`` and ``ValueError``.
    throw : bool, default True
        Raise `SingularError`, reading one flag; with ``False`` such items are NaN.

    Returns
    -------
    x_bar : (..., m) array

    Raises
    ------
    SingularError
        ``Σ φ''`` is not positive: all numbers are outliers (truncated), none is within alpha (Huber), or y is not a
        strict minimum (Welsch).

    Notes
    -----
    .. math:: \bar x_i = \bar y\, \frac{\varphi''(y - x_i)}{\sum_j \varphi''(y - x_j)}

    Huber's and the truncated penalty have no second derivative at ``|y − x_i| = alpha``: such a number counts as
    inside. Cost: linear.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([1.0, 2.0, 50.0])
    >>> y, _ = ddnref.nodes.robust_pool(x, kind="truncated")
    >>> ddnref.nodes.robust_pool_vjp(np.asarray(1.0), y, x, kind="truncated")
    array([0.5, 0.5, 0. ])
    """
    conform("(m+),(),()", real_only=True, x=x, y=y, y_bar=y_bar)
    return y_bar[..., None] * _shares("robust_pool_vjp", "gradient", y, x, kind, alpha, throw)


@public
def robust_pool_jvp(
    x_dot: Array, y: Array, x: Array, /, *, kind: str = "pseudo-huber", alpha: float = 1.0, throw: bool = True
) -> Array:
    r"""Derivative of `robust_pool` along a direction; options and errors are those of `robust_pool_vjp`.

    Parameters
    ----------
    x_dot : (..., m) array
        Tangent of the numbers.
    y : (...) array
        The output.
    x : (..., m) array

    Returns
    -------
    y_dot : (...) array

    Notes
    -----
    .. math:: \dot y = \frac{\sum_i \varphi''(y - x_i)\, \dot x_i}{\sum_j \varphi''(y - x_j)}

    Kinks of the penalties count as in `robust_pool_vjp`. Cost: linear.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([1.0, 2.0, 50.0])
    >>> y, _ = ddnref.nodes.robust_pool(x, kind="truncated")
    >>> float(ddnref.nodes.robust_pool_jvp(np.asarray([1.0, 2.0, 7.0]), y, x, kind="truncated"))
    1.5
    """
    xp = conform("(m+),(),(m)", real_only=True, x=x, y=y, x_dot=x_dot).xp
    return xp.sum(_shares("robust_pool_jvp", "tangent", y, x, kind, alpha, throw) * x_dot, axis=-1)


def _shares(name: str, derivative: str, y: Array, x: Array, kind: str, alpha: float, throw: bool) -> Array:
    """Return the share of each number in the motion of y, ``φ''_i / Σ φ''``; NaN for items without a derivative."""
    xp, penalty = namespace_of(x), _penalty(kind)
    # An item that is not finite has NaN curvature, even where φ'' is a constant, and so is NaN as a whole.
    bad = ~(xp.all(xp.isfinite(x), axis=-1) & xp.isfinite(y))[..., None]
    z = nan_where(bad, y[..., None] - x) / alpha
    curvature = nan_where(bad, penalty.curvature(xp, z))
    total = xp.sum(curvature, axis=-1, keepdims=True)
    # A sum of curvatures that could be rounding counts as zero.
    bad = ~(total > 4 * eps(xp, x.dtype) * xp.sum(xp.abs(curvature), axis=-1, keepdims=True))
    if throw and is_true(xp.any(bad)):
        raise SingularError(
            f"{name}({kind!r}): the sum of the second derivatives is not positive{among(bad[..., 0])}, so no "
            f"{derivative} exists. The most likely causes: no number is within alpha of the pooled one, or the input "
            "is not finite. Raise alpha, or pass throw=False to get NaN for these items."
        )
    return curvature / nan_where(bad, total)
