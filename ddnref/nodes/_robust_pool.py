r"""Robust pooling: the location ``y = argmin_u Σ_i φ(u − x_i; α)`` of many numbers, some of them outliers.

    kind          φ(z)                       ψ = φ'                        φ''
    quadratic     ½ z²                       z                             1
    pseudo-huber  α² (s − 1), s = √(1+z²/α²) z / s                         1 / s³
    huber         ½ z², outside α|z| − ½ α²  clip(z, −α, α)                1 inside, 0 outside
    welsch        1 − e, e = exp(−z²/2α²)    z e / α²                      e (1 − z²/α²) / α²
    truncated     ½ z², outside ½ α²         z inside, 0 outside           1 inside, 0 outside

Implicit differentiation of ``Σ ψ(y − x_i) = 0`` gives ``x̄_i = ȳ φ''_i / Σ_j φ''_j``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, Namespace, eps, is_true, namespace_of, nan_where, refuse_recording
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
    return xp.sqrt(1 + z * z)


def _e(xp: Namespace, z: Array) -> Array:
    return xp.exp(-z * z / 2)


def _huber(xp: Namespace, z: Array) -> Array:
    c = xp.abs(z) - xp.maximum(xp.abs(z) - 1, xp.zeros_like(z))  # |clip(z)|
    return c * (xp.abs(z) - c / 2)


# With α these are α² φ(z/α), but for Welsch φ(z/α): a factor that changes no minimum and no gradient.
PENALTIES = {
    "quadratic": Penalty(lambda xp, z: z * z / 2, _one, _one),  # noqa: ARG005
    "pseudo-huber": Penalty(
        lambda xp, z: z * z / (1 + _s(xp, z)), lambda xp, z: 1 / _s(xp, z), lambda xp, z: 1 / _s(xp, z) ** 3
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
    """(...): ``|Σ ψ_i| / Σ |ψ_i|`` at the returned point."""


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
        Largest accepted ``|Σ ψ_i| / Σ |ψ_i|``; default ``64 eps``.
    maxiter, check_every : int
        Steps, and steps between two looks at the flags.
    throw : bool, default True
        Raise for items that fail; with ``False`` these are NaN.
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

    See Also
    --------
    robust_pool_vjp : its reverse-mode derivative.

    Notes
    -----
    Two descents, from the mean and from the median; the lower end is returned. The first three penalties are convex
    and both descents find the minimum. Welsch's and the truncated one are not; the result is the better of two local
    minima, not always the global one. Where Huber's minimum is an interval (no number within alpha of it) any point
    of it may be returned. Each step is Newton's where that ends lower than the reweighted mean
    ``Σ w_i x_i / Σ w_i``, ``w = ψ(z)/z``, which never ascends, and that mean elsewhere. Cost: about ten passes over x
    per step.

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
    refuse_recording("robust_pool", x)
    x = nan_where(~xp.all(xp.isfinite(x), axis=-1, keepdims=True), x)
    rtol = 64 * eps(xp, x.dtype) if rtol is None else rtol
    # Measured from the median, in units of alpha, the numbers are small, and a common offset costs no digits.
    ordered, m = xp.sort(x, axis=-1), x.shape[-1]
    center = ordered[..., (m - 1) // 2, None] / 2 + ordered[..., m // 2, None] / 2
    z = (x - center) / alpha
    # Descend from the mean and from the median, and keep the lower end.
    start = xp.stack([xp.mean(z, axis=-1), xp.zeros_like(z[..., 0])], axis=-1)
    state = _descend(penalty, z[..., None, :], start, LoopOptions(rtol, maxiter, check_every, while_loop, throw))
    won = state.value[..., 0] < state.value[..., 1]
    u, n_iter, residual = (xp.where(won, a[..., 0], a[..., 1]) for a in (state.u, state.n_iter, state.residual))
    info = RobustPoolInfo(residual <= rtol, n_iter, residual)
    if throw and is_true(xp.any(~info.converged)):
        raise ConvergenceError(
            f"robust_pool({kind!r}) did not converge within maxiter={maxiter}, or its input is not finite. The most "
            "likely causes: rtol is below rounding, or alpha is very small compared with the spread of the numbers. "
            "Raise alpha, rtol or maxiter, or pass throw=False to get NaN for these items."
        )
    return nan_where(~info.converged, center[..., 0] + alpha * u), info


class _State(NamedTuple):
    u: Array
    value: Array
    residual: Array
    n_iter: Array


def _descend(phi: Penalty, x: Array, start: Array, options: LoopOptions) -> _State:
    """Both starts at once, (..., 2) over x of shape (..., 1, m)."""
    xp, rtol = namespace_of(x), options.rtol

    def measure(u: Array) -> tuple[Array, Array, Array]:
        """``Σ ψ``, ``Σ φ`` and the residual ``|Σ ψ| / Σ |ψ|``."""
        z = u[..., None] - x
        psi = z * phi.weight(xp, z)
        total, size = xp.sum(psi, axis=-1), xp.sum(xp.abs(psi), axis=-1)
        residual = xp.abs(total) / xp.where(size > 0, size, xp.ones_like(size))
        return total, xp.sum(phi.value(xp, z), axis=-1), residual

    def body(s: _State) -> _State:
        z, psi = s.u[..., None] - x, measure(s.u)[0]
        weight, curvature = xp.sum(phi.weight(xp, z), axis=-1), xp.sum(phi.curvature(xp, z), axis=-1)
        one = xp.ones_like(weight)
        # The reweighted mean never ascends; Newton's step is taken where it ends lower still.
        mean = s.u - psi / xp.where(weight > 0, weight, one)
        newton = s.u - psi / xp.where(curvature > 0, curvature, one)
        better = (curvature > 0) & (measure(newton)[1] <= measure(mean)[1])
        u = xp.where(s.residual > rtol, xp.where(better, newton, mean), s.u)
        _, value, residual = measure(u)
        return _State(u, value, residual, s.n_iter + xp.astype(s.residual > rtol, s.n_iter.dtype))

    _, value, residual = measure(start)
    n_iter = xp.zeros(start.shape, dtype=xp.int64, device=array_api_compat.device(x))
    return run(
        lambda s: s.residual > rtol, body, _State(start, value, residual, n_iter), maxiter=options.maxiter,
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
    x : (..., m) array
    kind, alpha
        As in `robust_pool`.
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
    TypeError, ValueError
        As `robust_pool`.

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
    xp, penalty = conform("(m+),(),()", real_only=True, x=x, y=y, y_bar=y_bar).xp, _penalty(kind)
    # An item that is not finite has NaN curvature, even where φ'' is a constant, and so is NaN as a whole.
    bad = ~(xp.all(xp.isfinite(x), axis=-1) & xp.isfinite(y))[..., None]
    z = nan_where(bad, y[..., None] - x) / alpha
    curvature = nan_where(bad, penalty.curvature(xp, z))
    total = xp.sum(curvature, axis=-1, keepdims=True)
    # A sum of curvatures that could be rounding counts as zero.
    bad = ~(total > 4 * eps(xp, x.dtype) * xp.sum(xp.abs(curvature), axis=-1, keepdims=True))
    if throw and is_true(xp.any(bad)):
        raise SingularError(
            f"robust_pool_vjp({kind!r}): the sum of the second derivatives is not positive, so no gradient exists. The "
            "most likely causes: no number is within alpha of the pooled one, or the input is not finite. Raise "
            "alpha, or pass throw=False to get NaN for these items."
        )
    return y_bar[..., None] * (curvature / nan_where(bad, total))
