"""Least squares on the sphere, and weighted least squares with ridge and bias."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from array_api_compat import device

from ddnref._core.arrays import (
    Array,
    eps,
    full,
    is_true,
    namespace_of,
    nan_where,
    power_of_two_below,
    refuse_recording,
)
from ddnref._core.checks import conform
from ddnref._kernels import dense, least_squares, singularity
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest, power_of_two, safe_norm
from ddnref.errors import SingularError
from ddnref.implicit._derivatives import eq_argmin_jvp, eq_argmin_vjp
from ddnref.implicit._tangents import require_direction

NEWTON_STEPS = 25  # quadratic and monotone; 12 suffice where c_1 is 1e-12 of the others


@public
def least_squares_on_sphere(a: Array, b: Array, /, *, radius: float = 1.0, throw: bool = True) -> Array:
    r"""Global solution of ``min ½ ‖A u − b‖²`` subject to ``‖u‖₂ = radius``.

    Parameters
    ----------
    a : (..., m, n) real array
    b : (..., m) array
    radius : float, positive
    throw : bool, default True
        Raise `SingularError` in the hard case, reading one flag; with ``False`` such items are NaN.

    Returns
    -------
    y : (..., n) array

    Raises
    ------
    SingularError
        The hard case: Aᵀb has no component in the eigenspace of the smallest eigenvalue of AᵀA, and the sphere is
        too large for the others. Two solutions (or a circle of them) are equally good and no gradient exists.
    TypeError, ValueError
        Mixed libraries or dtypes, complex arrays, shapes that do not fit; a radius that is not positive.

    Notes
    -----
    With ``AᵀA = V diag(λ) Vᵀ``, ``c = VᵀAᵀb`` and ``μ > 0`` such that

    .. math:: y = V \frac{c}{\lambda - \lambda_1 + \mu}, \qquad
              \sum_i \frac{c_i^2}{(\lambda_i - \lambda_1 + \mu)^2} = r^2

    by Newton's method on ``1/r − 1/‖y(μ)‖``, which converges monotonically from below. Items with NaN or infinity
    are NaN. Cost: 2 m n² flops for AᵀA (which squares the condition of A) and one eigendecomposition of order n.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022), section 5.2.
    .. [2] A. R. Conn, N. I. M. Gould, Ph. L. Toint, "Trust-Region Methods" (SIAM, 2000), section 7.3.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.nodes.least_squares_on_sphere(np.eye(2), np.asarray([3.0, 4.0])).round(12)
    array([0.6, 0.8])
    """
    xp = conform("(m,n+),(m)", real_only=True, a=a, b=b).xp
    refuse_recording("least_squares_on_sphere", a=a, b=b)
    a, b = _finite_or_nan(a, b)
    # Powers of two make A and b of about unit size, so that no square leaves the range of exponents.
    size, size_b = power_of_two(a, 2), power_of_two(b)
    a, b = a / size[..., None, None], b / size_b[..., None]
    # In the eigenvectors of AᵀA the solution has the components z = c / (δ + μ), and one equation for μ remains. In
    # units of the radius it is a unit vector.
    a_t = xp.matrix_transpose(a)
    w, v = dense.eigh(dense.hermitian_product(a_t, a_t))
    c = dense.matvec(xp.matrix_transpose(v), dense.matvec(a_t, b)) / (radius * size / size_b)[..., None]
    delta = w - w[..., :1]
    mu = secular(c, delta)
    z = c / nan_where(~(delta + mu > 0), delta + mu)
    # The hard case: μ is lost in rounding, and the components with a definite quotient do not reach the sphere.
    hard = ~(xp.abs(safe_norm(z) - 1) <= 1e3 * eps(xp, z.dtype))
    hard = hard | singularity.is_singular(mu[..., 0] / (w[..., -1] + mu[..., 0]))
    finite = xp.isfinite(w[..., 0])
    if throw and is_true(xp.any(hard & finite)):
        raise SingularError(
            "least_squares_on_sphere met its hard case: the solution is not unique, because Aᵀb has no component along "
            "the smallest singular vector of A (b = 0, or a column of A that is zero or repeated). Add a ridge row to "
            "A along the wanted solution, perturb b, or pass throw=False to get NaN for these items."
        )
    return nan_where(hard[..., None], radius * dense.matvec(v, z))


@public
def least_squares_on_sphere_vjp(
    y_bar: Array,
    y: Array,
    a: Array,
    b: Array,
    /,
    *,
    radius: float = 1.0,
    check_rtol: float | None = None,
    throw: bool = True,
) -> tuple[Array, Array]:
    r"""Gradient of a loss of `least_squares_on_sphere`, by `eq_argmin_vjp`.

    Parameters
    ----------
    y_bar, y : (..., n) arrays
        Cotangent of the output, and the output.
    check_rtol : float, optional
        `y` is accepted as the minimum where a Newton step from it is at most ``check_rtol * ‖y‖``; default
        ``sqrt(eps)``.
    a, b, radius, throw
        As in `least_squares_on_sphere`, which has the same ``TypeError`` and ``ValueError``.

    Returns
    -------
    a_bar : (..., m, n) array
    b_bar : (..., m) array

    Raises
    ------
    OptimalityError, SingularError
        As `eq_argmin_vjp`.

    Notes
    -----
    With ``ℒ = ½ ‖A y − b‖² − ½ ν (yᵀy − r²)`` and ``w`` from the bordered system of `eq_argmin_vjp`,

    .. math:: \bar A = -(A y - b) w^T - (A w) y^T, \qquad \bar b = A w

    Cost: 2 m n² flops for AᵀA and one solve of order n + 1.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.eye(2), np.asarray([0.0, 2.0])
    >>> ddnref.nodes.least_squares_on_sphere_vjp(np.ones(2), np.asarray([0.0, 1.0]), a, b)[1] + 0.0
    array([0.5, 0. ])
    """
    conform("(m,n+),(m),(n),(n)", real_only=True, a=a, b=b, y=y, y_bar=y_bar)
    p = _on_sphere(y, a, b, radius)

    def residual_vjp(w: Array, eta: Array, y: Array, nu: Array, a: Array, b: Array) -> tuple[Array, Array]:  # noqa: ARG001
        # The constraint does not depend on A and b, and so η takes no part.
        a_w = dense.matvec(a, w)
        return dense.outer(dense.matvec(a, y) - b, w) + dense.outer(a_w, y), -a_w

    (a_bar, b_bar), _ = eq_argmin_vjp(
        p.unit * y_bar, p.y, None, p.a, p.b, **p.stated, residual_vjp=residual_vjp, rtol=check_rtol, throw=throw
    )
    return a_bar / p.size[..., None, None], b_bar / (p.unit * p.size)[..., None]


@public
def least_squares_on_sphere_jvp(
    a_dot: Array | None,
    b_dot: Array | None,
    y: Array,
    a: Array,
    b: Array,
    /,
    *,
    radius: float = 1.0,
    check_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    r"""Derivative of `least_squares_on_sphere` along a direction, by `eq_argmin_jvp`.

    Parameters
    ----------
    a_dot : (..., m, n) array or None
    b_dot : (..., m) array or None
        Tangents of `a` and `b`; ``None`` for the one that does not move.
    y : (..., n) array
        The output.
    a, b, radius, check_rtol, throw
        As in `least_squares_on_sphere_vjp`, which has the same errors.

    Returns
    -------
    y_dot : (..., n) array

    Notes
    -----
    With the multiplier ν of `least_squares_on_sphere_vjp`,

    .. math::
        \begin{bmatrix} A^T A - \nu I & -y \\ y^T & 0 \end{bmatrix}
        \begin{bmatrix} \dot y \\ \dot\nu \end{bmatrix}
        = -\begin{bmatrix} \dot A^T (A y - b) + A^T (\dot A y - \dot b) \\ 0 \end{bmatrix}

    Cost: 2 m n² flops for AᵀA and one solve of order n + 1.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.eye(2), np.asarray([0.0, 2.0])
    >>> ddnref.nodes.least_squares_on_sphere_jvp(None, np.ones(2), np.asarray([0.0, 1.0]), a, b) + 0.0
    array([0.5, 0. ])
    """
    require_direction(a_dot=a_dot, b_dot=b_dot)
    xp = conform("(m,n+),(m),(n),(m,n),(m)", real_only=True, a=a, b=b, y=y, a_dot=a_dot, b_dot=b_dot).xp
    p = _on_sphere(y, a, b, radius)
    a_dot = None if a_dot is None else a_dot / p.size[..., None, None]
    b_dot = None if b_dot is None else b_dot / (p.unit * p.size)[..., None]

    def residual_jvp(a_dot: Array, b_dot: Array, y: Array, nu: Array, a: Array, b: Array) -> tuple[Array, Array]:
        moved = dense.matvec(xp.matrix_transpose(a_dot), dense.matvec(a, y) - b)
        moved = moved + dense.matvec(xp.matrix_transpose(a), dense.matvec(a_dot, y) - b_dot)
        return moved, xp.zeros_like(nu)

    y_dot, _ = eq_argmin_jvp(
        a_dot, b_dot, p.y, None, p.a, p.b, **p.stated, residual_jvp=residual_jvp, rtol=check_rtol, throw=throw
    )
    return p.unit * y_dot


class _OnSphere(NamedTuple):
    """The problem on the sphere in units in which A and the radius are of about unit size, as a node states it."""

    y: Array  # divided by `unit`
    a: Array  # divided by `size`
    b: Array  # divided by both
    unit: float  # a power of two, as are the entries of `size`
    size: Array  # (...)
    stated: dict[str, Any]  # the callables


def _on_sphere(y: Array, a: Array, b: Array, radius: float) -> _OnSphere:
    """State ``min ½ ‖A y − b‖²`` subject to ``½ (yᵀy − r²) = 0``, scaled as in the forward pass."""
    xp = namespace_of(a)
    a, b = _finite_or_nan(a, b)
    unit = 2.0 ** math.floor(math.log2(radius))
    radius = radius / unit
    size = power_of_two(a, 2)
    a, b, y = a / size[..., None, None], b / (unit * size)[..., None], y / unit
    a_t = xp.matrix_transpose(a)
    s = dense.hermitian_product(a_t, a_t)
    stated = {
        "gradient": lambda y, a, b: dense.matvec(a_t, dense.matvec(a, y) - b),
        "hessian": lambda y, nu, a, b: s - nu[..., None] * dense.identity(y.shape[-1], s),  # noqa: ARG005
        "constraint": lambda y, a, b: (xp.sum(y * y, axis=-1, keepdims=True) - radius * radius) / 2,  # noqa: ARG005
        "constraint_jacobian": lambda y, a, b: y[..., None, :],  # noqa: ARG005
    }
    return _OnSphere(y, a, b, unit, size, stated)


def secular(c: Array, delta: Array, steps: int = NEWTON_STEPS) -> Array:
    """The root μ ≥ 0 of ``‖c / (δ + μ)‖ = 1``, (..., 1), by a fixed number of Newton steps from below."""
    xp = namespace_of(c)
    # Start from the best bound that a single component gives.
    mu = xp.max(xp.abs(c) - delta, axis=-1, keepdims=True)
    zero = full((), 0.0, c)
    mu = xp.where(mu > 0, mu, zero * mu)
    for _ in range(steps):  # none overshoots, because ``1 / ‖y(μ)‖`` is concave
        d = delta + mu
        safe = xp.where(d > 0, d, xp.ones_like(d))
        z = xp.where(d > 0, c / safe, zero)  # where d = 0 so is c, or μ would be larger
        z = z * z  # at most 1, by the choice of the first μ
        length = xp.sum(z, axis=-1, keepdims=True) ** 0.5
        slope = xp.sum(z / safe, axis=-1, keepdims=True)
        step = (length - 1) * length * length / xp.where(slope > 0, slope, xp.ones_like(slope))
        # Multiplied by μ, zero is NaN for items that are NaN.
        mu = xp.maximum(mu + step, zero * mu)
    return mu


@public
def weighted_least_squares(
    a: Array, b: Array, weights: Array, ridge: Array | None = None, /, *, bias: bool = True, throw: bool = True
) -> Array:
    r"""Minimum of ``½ Σ_i ω_i (a_iᵀ u + u_0 − b_i)² + ½ ρ ‖u‖²``.

    Parameters
    ----------
    a : (..., m, n) real array
        One sample in each row.
    b, weights : (..., m) arrays
        Targets and weights ω, not negative.
    ridge : (...) array, optional
        ρ of each item; the bias is not penalised.
    bias : bool, default True
        Whether there is a bias ``u_0``.
    throw : bool, default True
        Raise `SingularError`, reading one flag; with ``False`` such items are NaN.

    Returns
    -------
    y : (..., n + 1) array
        The coefficients and last the bias, as if `a` had one more column of ones; (..., n) without bias.

    Raises
    ------
    SingularError
        The columns of ``√W Ã`` (with those of the ridge below), scaled to unit length, are linearly dependent to
        working precision, ``σ_min <= 16 eps σ_max``: there are more unknowns than samples of positive weight, or
        repeated columns, or a constant one beside the bias. Or a weight or the ridge is negative.
    TypeError, ValueError
        Mixed libraries or dtypes, complex arrays; shapes that do not fit.

    Notes
    -----
    With ``Ã = [A 1]``, W the weights and D the identity without the bias,

    .. math:: (\tilde A^T W \tilde A + \rho D)\, y = \tilde A^T W b

    The bias is eliminated by taking weighted means out of columns and targets, and the rest is solved by QR. On NumPy
    Cholesky factors of the normal equations take the place of QR where their error can be removed by refinement (a
    condition below 2e6, in float32 90). The relative error is about ``eps / rcond``, where rcond is the reciprocal
    condition of ``√W Ã`` with columns of unit length: neither their units nor the mean of a feature costs digits of
    the coefficients. Weights may spread over ``1 / eps²``. Items with NaN or infinity are NaN. Cost: 4 m n² flops
    (Cholesky: m n²).

    References
    ----------
    .. [1] Å. Björck, "Numerical Methods for Least Squares Problems" (SIAM, 1996), sections 2.4 and 6.6.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.asarray([[0.0], [1.0], [2.0]]), np.asarray([1.0, 3.0, 50.0])
    >>> ddnref.nodes.weighted_least_squares(a, b, np.asarray([1.0, 1.0, 0.0])).round(12)  # the outlier has no weight
    array([2., 1.])
    """
    conform("(m,n+),(m),(m),()", real_only=True, a=a, b=b, weights=weights, ridge=ridge)
    refuse_recording("weighted_least_squares", a=a, b=b, weights=weights, ridge=ridge)
    p = _regression(a, b, weights, ridge, bias)
    _refuse(p, throw)
    y = least_squares.solve(p.factors, p.rows, t=p.targets)
    if bias:
        xp = namespace_of(a)
        y = xp.concat([y, p.target_mean - xp.sum(p.mean * y, axis=-1, keepdims=True)], axis=-1)
    return nan_where((p.bad | p.singular)[..., None], y)


@public
def weighted_least_squares_vjp(
    y_bar: Array,
    y: Array,
    a: Array,
    b: Array,
    weights: Array,
    ridge: Array | None = None,
    /,
    *,
    bias: bool = True,
    throw: bool = True,
) -> tuple[Array, Array, Array, Array | None]:
    r"""Gradient of a loss of `weighted_least_squares`, which has the same errors.

    Parameters
    ----------
    y_bar, y : (..., n + 1) arrays, or (..., n) without bias
        Cotangent of the output, and the output.
    a, b, weights, ridge, bias, throw
        As in `weighted_least_squares`.

    Returns
    -------
    a_bar, b_bar, weights_bar, ridge_bar
        Of the shapes of the inputs; ``None`` for a ridge that was not given.

    Notes
    -----
    With ``z = Ã u`` and the residual ``r = b − Ã y``,

    .. math::

       \begin{gathered}
       (\tilde A^T W \tilde A + \rho D)\, u = \bar y, \qquad \bar{\tilde A} = (W r) u^T - (W z) y^T, \\
       \bar b = W z, \qquad \bar\omega = z \circ r, \qquad \bar\rho = -u^T D y
       \end{gathered}

    The system is solved as the forward pass solves its own, with the same factors, computed again. Cost: that of the
    forward pass and 6 m n flops.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.asarray([[1.0], [1.0]]), np.asarray([1.0, 3.0])  # the mean
    >>> y = ddnref.nodes.weighted_least_squares(a, b, np.ones(2), bias=False)
    >>> ddnref.nodes.weighted_least_squares_vjp(np.ones(1), y, a, b, np.ones(2), bias=False)[1]
    array([0.5, 0.5])
    """
    xp, _, sizes = conform("(m,n+),(m),(m),()", real_only=True, a=a, b=b, weights=weights, ridge=ridge)
    n = sizes["n"]
    conform("(m),(k),(k)", sizes={"k": n + bias}, b=b, y=y, y_bar=y_bar)
    p = _regression(a, b, weights, ridge, bias)
    _refuse(p, throw)
    y, bar = y[..., :n], y_bar[..., :n]
    if bias:
        bar = bar - y_bar[..., n:] * p.mean
    # u and z = Ã u in units of the largest weight and of the matrix, p.size: u / p.size² and z / p.size are meant.
    u = least_squares.solve(p.factors, p.rows, g=bar)
    u = nan_where((p.bad | p.singular)[..., None], u) / p.size
    z = dense.matvec(p.a, u)
    if bias:  # what the means leave of the bias of u: ȳ₀ / Σω
        z = z + y_bar[..., n:] * (p.size / p.total)
    r = p.b - dense.matvec(p.a, y)
    b_bar = p.weights * z / p.size
    a_bar = dense.outer(p.weights * r / p.size, u) - dense.outer(b_bar, y)
    ridge_bar = None if ridge is None else -xp.sum(u * y, axis=-1) / (p.size * p.unit)[..., 0]
    return a_bar, b_bar, z * r / p.size / p.unit, ridge_bar


@public
def weighted_least_squares_jvp(
    a_dot: Array | None,
    b_dot: Array | None,
    weights_dot: Array | None,
    ridge_dot: Array | None,
    y: Array,
    a: Array,
    b: Array,
    weights: Array,
    ridge: Array | None = None,
    /,
    *,
    bias: bool = True,
    throw: bool = True,
) -> Array:
    r"""Derivative of `weighted_least_squares` along a direction, with the same errors.

    Parameters
    ----------
    a_dot : (..., m, n) array or None
    b_dot, weights_dot : (..., m) arrays or None
    ridge_dot : (...) array or None
        Tangents of the inputs; ``None`` for one that does not move.
    y : (..., n + 1) array, or (..., n) without bias
        The output.
    a, b, weights, ridge, bias, throw
        As in `weighted_least_squares`.

    Returns
    -------
    y_dot : array of the shape of `y`

    Raises
    ------
    TypeError
        A tangent of a ridge that is not given.

    Notes
    -----
    With the residual ``r = b − Ã y``, and zeros for the bias in the last column of the tangent of Ã,

    .. math:: (\tilde A^T W \tilde A + \rho D)\, \dot y = \dot{\tilde A}^T W r
              + \tilde A^T \left( W (\dot b - \dot A y) + \dot\omega \circ r \right) - \dot\rho D y

    The system is solved as the forward pass solves its own, with the same factors, computed again: the part with
    ``ḃ − Ȧ y`` is a least-squares problem and loses digits as such. Cost: that of the forward pass and 8 m n flops.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.asarray([[1.0], [1.0]]), np.asarray([1.0, 3.0])  # the mean
    >>> y = ddnref.nodes.weighted_least_squares(a, b, np.ones(2), bias=False)
    >>> b_dot = np.asarray([1.0, 0.0])
    >>> ddnref.nodes.weighted_least_squares_jvp(None, b_dot, None, None, y, a, b, np.ones(2), bias=False)
    array([0.5])
    """
    require_direction(a_dot=a_dot, b_dot=b_dot, weights_dot=weights_dot, ridge_dot=ridge_dot)
    xp, _, sizes = conform("(m,n+),(m),(m),()", real_only=True, a=a, b=b, weights=weights, ridge=ridge)
    n = sizes["n"]
    if ridge is None and ridge_dot is not None:
        raise TypeError("ridge_dot is given, but there is no ridge that could move.")
    conform(
        "(m),(k),(m,n),(m),(m),()", real_only=True, sizes={"k": n + bias, "n": n},
        b=b, y=y, a_dot=a_dot, b_dot=b_dot, weights_dot=weights_dot, ridge_dot=ridge_dot,
    )  # fmt: skip
    p = _regression(a, b, weights, ridge, bias)
    _refuse(p, throw)
    y = y[..., :n]
    r = p.b - dense.matvec(p.a, y)
    y_dot, bias_dot = xp.zeros_like(y), xp.zeros_like(p.total)
    # Targets that follow ḃ − Ȧ y, with their mean: a regression like the given one.
    if a_dot is not None or b_dot is not None:
        target = xp.zeros_like(r) if b_dot is None else b_dot
        target = target if a_dot is None else target - dense.matvec(a_dot, y)
        if bias:
            target, bias_dot = _centred(target[..., None], p.weights / p.total)
            target = target[..., 0]
        t = xp.sqrt(p.weights) / p.size * target
        below = xp.zeros_like(p.targets[..., t.shape[-1] :])
        y_dot = least_squares.solve(p.factors, p.rows, t=xp.concat([t, below], axis=-1))
    # The rest of the right-hand side, in units of the largest weight and of the matrix.
    if a_dot is not None or weights_dot is not None or ridge_dot is not None:
        g = xp.zeros_like(y)
        if a_dot is not None:
            g = g + dense.matvec(xp.matrix_transpose(a_dot / p.size[..., None]), p.weights * r / p.size)
        if weights_dot is not None:
            pull = weights_dot / p.unit * r / p.size
            g = g + dense.matvec(xp.matrix_transpose(p.a), pull) / p.size
            if bias:
                bias_dot = bias_dot + xp.sum(pull, axis=-1, keepdims=True) * (p.size / p.total)
        if ridge_dot is not None:
            g = g - (ridge_dot[..., None] / p.unit / p.size) * (y / p.size)
        y_dot = y_dot + least_squares.solve(p.factors, p.rows, g=g)
    if bias:
        y_dot = xp.concat([y_dot, bias_dot - xp.sum(p.mean * y_dot, axis=-1, keepdims=True)], axis=-1)
    return nan_where((p.bad | p.singular)[..., None], y_dot)


class _Regression(NamedTuple):
    """A weighted regression whose bias is accounted for by its means, and its factors."""

    a: Array  # (..., m, n): centred columns
    b: Array  # (..., m): centred targets
    weights: Array  # (..., m): divided by `unit`
    total: Array  # (..., 1): their sum
    unit: Array  # (..., 1): a power of two, of the size of the largest weight
    size: Array  # (..., 1): a power of two, of the size of the largest entry
    mean: Array  # (..., n): of the columns
    target_mean: Array  # (..., 1)
    rows: Array  # (..., k, n): √W A, and below it the ridge, divided by `size`
    targets: Array  # (..., k): √W b, and below it zeros, divided by `size`
    factors: least_squares.Factors  # of `rows`
    rcond: Array  # (...)
    singular: Array  # (...)
    bad: Array  # (...): not finite


def _regression(a: Array, b: Array, weights: Array, ridge: Array | None, bias: bool) -> _Regression:
    """Centre and scale a regression, and factor it."""
    xp, (m, n) = namespace_of(a), a.shape[-2:]
    # The largest entry of each item is not finite if one of them is not.
    size = largest(a, 2)[..., None]
    bad = ~xp.isfinite(size[..., 0])
    for x in (b, weights):
        bad = bad | ~xp.all(xp.isfinite(x), axis=-1)
    negative = xp.any(weights < 0, axis=-1)
    if ridge is not None:
        bad, negative = bad | ~xp.isfinite(ridge), negative | (ridge < 0)
    # Items without a solution get numbers that are harmless to the factorisation of the others.
    out = bad | negative
    a = least_squares.replaced(out, a)
    b, weights = (xp.where(out[..., None], xp.ones_like(x), x) for x in (b, weights))
    unit = power_of_two(weights)[..., None]
    weights = weights / unit
    if ridge is not None:
        root_ridge = xp.sqrt(xp.where(out, xp.ones_like(ridge), ridge) / unit[..., 0])[..., None]
        size = xp.maximum(size, root_ridge)
    size = power_of_two_below(xp.where(out[..., None], xp.ones_like(size), size))
    # Without their weighted means, columns and targets have no bias.
    total = xp.sum(weights, axis=-1, keepdims=True)
    mean, target_mean, singular = full((*bad.shape, n), 0.0, a), xp.zeros_like(total), negative
    if bias:
        singular = singular | (total[..., 0] == 0)
        total = xp.where(total > 0, total, xp.ones_like(total))
        share = weights / total
        a, mean = _centred(a, share)
        b, target_mean = _centred(b[..., None], share)
        b = b[..., 0]
    # Rows √ω, below them those of the ridge.
    root = xp.sqrt(weights) / size
    rows, targets = root[..., None] * a, root * b
    if ridge is not None:
        rows = xp.concat([rows, (root_ridge / size)[..., None] * dense.identity(n, a)], axis=-2)
    elif m < n:  # singular, but factors need a tall matrix
        rows = xp.concat([rows, xp.zeros((*bad.shape, n - m, n), dtype=a.dtype, device=device(a))], axis=-2)
    more = rows.shape[-2] - m
    if more:
        targets = xp.concat([targets, xp.zeros_like(rows[..., :more, 0])], axis=-1)
    factors, rcond = least_squares.factor(rows, xp.sqrt(total) / size * mean if bias else None)
    singular = singular | singularity.is_singular(rcond)
    return _Regression(
        a, b, weights, total, unit, size, mean, target_mean, rows, targets, factors, rcond, singular, bad
    )


def _centred(x: Array, share: Array) -> tuple[Array, Array]:
    """Subtract the weighted means of columns (..., m, n); they are taken twice, because the first ones are rounded."""
    first = (share[..., None, :] @ x)[..., 0, :]
    x = x - first[..., None, :]
    second = (share[..., None, :] @ x)[..., 0, :]
    return x - second[..., None, :], first + second


def _refuse(p: _Regression, throw: bool) -> None:
    singular = p.singular & ~p.bad
    if throw and is_true(namespace_of(singular).any(singular)):
        found = singularity.named(
            "The matrix of weighted least squares", "matrices", singular, lambda i: p.rcond[(*i, ...)]
        )
        raise SingularError(
            f"{found}, or a weight or the ridge is negative. The most likely causes: more columns than samples of "
            "positive weight, or linearly dependent columns (a constant one beside the bias). Pass a ridge, drop "
            "columns, or pass throw=False to get NaN for these items."
        )


def _finite_or_nan(a: Array, b: Array) -> tuple[Array, Array]:
    """Make an item NaN as a whole where a or b is not finite."""
    xp = namespace_of(a)
    bad = ~(xp.all(xp.isfinite(a), axis=(-2, -1)) & xp.all(xp.isfinite(b), axis=-1))
    return nan_where(bad[..., None, None], a), nan_where(bad[..., None], b)
