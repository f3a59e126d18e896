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

from ddnref._core.arrays import Array, Namespace, eps, is_true, namespace, nan_where, refuse_recording
from ddnref._core.checks import check_dtypes, check_real, check_shapes
from ddnref._core.loops import CHECK_EVERY, WhileLoop, run
from ddnref._kernels.public import public
from ddnref.errors import ConvergenceError, SingularError


class Penalty(NamedTuple):
    """φ with ``α = 1`` in scaled arguments ``z / α``, up to a factor: value, weight ψ/z, second derivative."""

    value: Callable[[Namespace, Array], Array]
    weight: Callable[[Namespace, Array], Array]
    curvature: Callable[[Namespace, Array], Array]


def _inside(xp: Namespace, z: Array) -> Array:
    return xp.astype(xp.abs(z) <= 1, z.dtype)


def _s(xp: Namespace, z: Array) -> Array:
    return xp.sqrt(1 + z * z)


def _e(xp: Namespace, z: Array) -> Array:
    return xp.exp(-z * z / 2)


def _over_size(xp: Namespace, z: Array) -> Array:
    return 1 / xp.maximum(xp.abs(z), xp.ones_like(z))


def _huber(xp: Namespace, z: Array) -> Array:
    c = xp.abs(z) - xp.maximum(xp.abs(z) - 1, xp.zeros_like(z))  # |clip(z)|
    return c * (xp.abs(z) - c / 2)


PENALTIES = {
    "quadratic": Penalty(lambda xp, z: z * z / 2, lambda xp, z: xp.ones_like(z), lambda xp, z: xp.ones_like(z)),  # noqa: ARG005
    "pseudo-huber": Penalty(
        lambda xp, z: z * z / (1 + _s(xp, z)), lambda xp, z: 1 / _s(xp, z), lambda xp, z: 1 / _s(xp, z) ** 3
    ),
    "huber": Penalty(_huber, _over_size, _inside),
    "welsch": Penalty(lambda xp, z: -xp.expm1(-z * z / 2), _e, lambda xp, z: _e(xp, z) * (1 - z * z)),
    "truncated": Penalty(lambda xp, z: xp.minimum(z * z, xp.ones_like(z)) / 2, lambda xp, z: _inside(xp, z), _inside),
}
"""By kind; with α they are ``α² φ(z/α)``, but for Welsch ``φ(z/α)``: a factor that no minimum and no gradient sees."""


class RobustPoolInfo(NamedTuple):
    """What became of each item."""

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
        As ``jax.lax.while_loop``, where the call is traced.

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
    and both find the minimum. Those of Welsch and the truncated quadratic are not: the result is the better of two
    local minima, not always the global one. Where Huber's minimum is an interval (no number within alpha of it) any
    point of it may come back. Each step is Newton's where that ends lower than the reweighted mean
    ``Σ w_i x_i / Σ w_i``, ``w = ψ(z)/z``, which never ascends, and else that mean. Cost: some ten passes over x for
    each step.

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
    xp = _check(kind, alpha, x=x)
    refuse_recording("robust_pool", x)
    finite = xp.all(xp.isfinite(x), axis=-1)
    x = nan_where(~finite[..., None], x)
    rtol = 64 * eps(xp, x.dtype) if rtol is None else rtol
    center = _median(x)
    z = (x - center) / alpha  # small numbers: a common offset costs no digits
    start = xp.stack([xp.mean(z, axis=-1), xp.zeros_like(z[..., 0])], axis=-1)
    state = _descend(PENALTIES[kind], z[..., None, :], start, rtol, maxiter, check_every, while_loop)
    won = state.value[..., 0] < state.value[..., 1]
    u, n_iter, residual = (xp.where(won, a[..., 0], a[..., 1]) for a in (state.u, state.n_iter, state.residual))
    info = RobustPoolInfo(residual <= rtol, n_iter, residual)
    if throw and is_true(xp.any(~info.converged)):
        raise ConvergenceError(
            f"robust_pool({kind!r}) did not converge within maxiter={maxiter}, or its input is not finite. Likely "
            "rtol is below rounding, or alpha is very small against the spread of the numbers. Raise alpha, rtol or "
            "maxiter, or pass throw=False to get NaN for these items."
        )
    return nan_where(~info.converged, center[..., 0] + alpha * u), info


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
    xp = _check(kind, alpha, x=x, y_bar=y_bar, y=y)
    check_shapes(y_bar=(y_bar, tuple(x.shape[:-1])), y=(y, tuple(x.shape[:-1])))
    finite = xp.all(xp.isfinite(x), axis=-1) & xp.isfinite(y)
    z = nan_where(~finite[..., None], y[..., None] - x) / alpha
    curvature = PENALTIES[kind].curvature(xp, z)
    curvature = nan_where(~finite[..., None], curvature)
    total = xp.sum(curvature, axis=-1, keepdims=True)
    bad = ~(total > 4 * eps(xp, x.dtype) * xp.sum(xp.abs(curvature), axis=-1, keepdims=True))
    if throw and is_true(xp.any(bad)):
        raise SingularError(
            f"robust_pool_vjp({kind!r}): the sum of the second derivatives is not positive, so no gradient exists. "
            "Likely no number is within alpha of the pooled one, or the input is not finite. Raise alpha, or pass "
            "throw=False to get NaN for these items."
        )
    return y_bar[..., None] * (curvature / nan_where(bad, total))


# --- the algorithm ------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    u: Array
    value: Array
    residual: Array
    n_iter: Array


def _descend(
    phi: Penalty, x: Array, start: Array, rtol: float, maxiter: int, check_every: int, while_loop: WhileLoop | None
) -> _State:
    """Both starts at once, (..., 2) over x of shape (..., 1, m)."""
    xp = array_api_compat.array_namespace(x)

    def measure(u: Array) -> tuple[Array, Array, Array]:
        z = u[..., None] - x
        psi = z * phi.weight(xp, z)
        total, size = xp.sum(psi, axis=-1), xp.sum(xp.abs(psi), axis=-1)
        residual = xp.abs(total) / xp.where(size > 0, size, xp.ones_like(size))
        return total, xp.sum(phi.value(xp, z), axis=-1), residual

    def body(s: _State) -> _State:
        z = s.u[..., None] - x
        psi, weight, curvature = (
            measure(s.u)[0],
            xp.sum(phi.weight(xp, z), axis=-1),
            xp.sum(phi.curvature(xp, z), axis=-1),
        )
        one = xp.ones_like(weight)
        mean = s.u - psi / xp.where(weight > 0, weight, one)
        newton = s.u - psi / xp.where(curvature > 0, curvature, one)
        better = (curvature > 0) & (measure(newton)[1] <= measure(mean)[1])
        u = xp.where(s.residual > rtol, xp.where(better, newton, mean), s.u)
        _, value, residual = measure(u)
        return _State(u, value, residual, s.n_iter + xp.astype(s.residual > rtol, s.n_iter.dtype))

    _, value, residual = measure(start)
    n_iter = xp.zeros(start.shape, dtype=xp.int64, device=array_api_compat.device(x))
    return run(
        lambda s: s.residual > rtol, body, _State(start, value, residual, n_iter), maxiter=maxiter,
        check_every=check_every, while_loop=while_loop,
    )  # fmt: skip


def _median(x: Array) -> Array:
    """Mean of the two middle numbers, (..., 1)."""
    xp = array_api_compat.array_namespace(x)
    m = x.shape[-1]
    x = xp.sort(x, axis=-1)
    lower, upper = x[..., (m - 1) // 2, None], x[..., m // 2, None]
    return lower / 2 + upper / 2


def _check(kind: str, alpha: float, **arrays: Array) -> Namespace:
    xp = namespace(**arrays)
    check_real(**arrays)
    x = arrays["x"]
    check_dtypes(**{name: (a, x.dtype) for name, a in arrays.items()})
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., m) with m at least 1.")
    if not isinstance(kind, str) or kind not in PENALTIES:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(PENALTIES)}.")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha!r}, expected a positive number.")
    return xp
