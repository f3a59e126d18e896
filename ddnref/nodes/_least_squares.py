"""Least squares on the sphere, and weighted least squares with ridge and bias."""

from __future__ import annotations

import array_api_compat

from ddnref._core.arrays import Array, eps, full, is_true, namespace_of, nan_where, refuse_recording
from ddnref._core.checks import conform
from ddnref._kernels import dense
from ddnref._kernels.public import public
from ddnref._kernels.vectors import safe_norm
from ddnref.errors import SingularError
from ddnref.implicit._derivatives import eq_argmin_vjp
from ddnref.implicit._structures import Dense, checked_solve

NEWTON_STEPS = 25  # quadratic and monotone; 12 suffice where c_1 is 1e-12 of the others
HARD = 64  # a component of the solution below this many eps of the radius is rounding


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

    See Also
    --------
    least_squares_on_sphere_vjp : its reverse-mode derivative.

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
    refuse_recording("least_squares_on_sphere", a)
    a, b = _finite_or_nan(a, b)
    # In the eigenvectors of AᵀA the solution has the components z = c / (δ + μ), and one equation for μ remains.
    a_t = xp.matrix_transpose(a)
    w, v = dense.eigh(dense.hermitian_product(a_t, a_t))
    c = dense.matvec(xp.matrix_transpose(v), dense.matvec(a_t, b))
    delta = w - w[..., :1]
    mu = _secular(c, delta, radius)
    z = c / nan_where(~(delta + mu > 0), delta + mu)
    # The hard case: μ is lost in rounding, and the components with a definite quotient do not reach the sphere.
    hard = ~(xp.abs(safe_norm(z) - radius) <= 1e3 * eps(xp, z.dtype) * radius)
    hard = hard | ~(mu[..., 0] > HARD * eps(xp, w.dtype) * (w[..., -1] + mu[..., 0]))
    finite = xp.isfinite(w[..., 0])
    if throw and is_true(xp.any(hard & finite)):
        raise SingularError(
            "least_squares_on_sphere met its hard case: the solution is not unique, because Aᵀb has no component along "
            "the smallest singular vector of A (b = 0, or a column of A that is zero or repeated). Add a ridge row to "
            "A along the wanted solution, perturb b, or pass throw=False to get NaN for these items."
        )
    return nan_where(hard[..., None], dense.matvec(v, z))


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
    r"""Gradient of a loss of `least_squares_on_sphere`: `eq_argmin_vjp`, with its callables.

    Parameters
    ----------
    y_bar, y : (..., n) arrays
        Cotangent of the output, and the output.
    a : (..., m, n) array
    b : (..., m) array
    radius, throw
        As in `least_squares_on_sphere`.
    check_rtol : float, optional
        `y` is accepted as the minimum where a Newton step from it is at most ``check_rtol * ‖y‖``; default
        ``sqrt(eps)``.

    Returns
    -------
    a_bar : (..., m, n) array
    b_bar : (..., m) array

    Raises
    ------
    OptimalityError, SingularError
        As `eq_argmin_vjp`; with ``throw=False`` NaN for these items.
    TypeError, ValueError
        As `least_squares_on_sphere`.

    Notes
    -----
    With ``ℒ = ½ ‖A y − b‖² − ½ ν (yᵀy − r²)`` and ``w`` from the bordered system of `eq_argmin_vjp`,

    .. math:: \bar A = -(A y - b) w^T - (A w) y^T, \qquad \bar b = A w

    Cost: 2 m n² flops for AᵀA and one solve of order n + 1.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022), section 5.2.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.eye(2), np.asarray([0.0, 2.0])
    >>> ddnref.nodes.least_squares_on_sphere_vjp(np.ones(2), np.asarray([0.0, 1.0]), a, b)[1] + 0.0
    array([0.5, 0. ])
    """
    xp = conform("(m,n+),(m),(n),(n)", real_only=True, a=a, b=b, y=y, y_bar=y_bar).xp
    a, b = _finite_or_nan(a, b)
    a_t = xp.matrix_transpose(a)
    s = dense.hermitian_product(a_t, a_t)

    def residual_vjp(w: Array, eta: Array, y: Array, nu: Array, a: Array, b: Array) -> tuple[Array, Array]:  # noqa: ARG001
        # The constraint does not depend on A and b, and so η takes no part.
        a_w = dense.matvec(a, w)
        return dense.outer(dense.matvec(a, y) - b, w) + dense.outer(a_w, y), -a_w

    # The problem ``min ½ ‖A y − b‖²`` subject to ``½ (yᵀy − r²) = 0``, as `eq_argmin_vjp` wants it stated.
    a_bar, b_bar = eq_argmin_vjp(
        y_bar,
        y,
        None,
        a,
        b,
        gradient=lambda y, a, b: dense.matvec(a_t, dense.matvec(a, y) - b),
        hessian=lambda y, nu, a, b: s - nu[..., None] * dense.identity(y.shape[-1], s),  # noqa: ARG005
        constraint=lambda y, a, b: (xp.sum(y * y, axis=-1, keepdims=True) - radius * radius) / 2,  # noqa: ARG005
        constraint_jacobian=lambda y, a, b: y[..., None, :],  # noqa: ARG005
        residual_vjp=residual_vjp,
        rtol=check_rtol,
        throw=throw,
    )
    return a_bar, b_bar


def _secular(c: Array, delta: Array, radius: float) -> Array:
    """The root μ ≥ 0 of ``‖c / (δ + μ)‖ = r``, (..., 1), by a fixed number of Newton steps from below.

    ``1 / ‖y(μ)‖`` is concave, so no step overshoots.
    """
    xp = namespace_of(c)
    # Start from the best bound that a single component gives.
    mu = xp.max(xp.abs(c) / radius - delta, axis=-1, keepdims=True)
    zero = full((), 0.0, c)
    mu = xp.where(mu > 0, mu, zero * mu)
    for _ in range(NEWTON_STEPS):
        d = delta + mu
        safe = xp.where(d > 0, d, xp.ones_like(d))
        z = xp.where(d > 0, c / safe, zero)  # where d = 0 so is c, or μ would be larger
        length = safe_norm(z)[..., None]
        slope = xp.sum(z * z / safe, axis=-1, keepdims=True)
        step = (length / radius - 1) * length * length / xp.where(slope > 0, slope, xp.ones_like(slope))
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
        ρ, one for each item of the batch; the bias is not penalised.
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
        The normal equations are singular to working precision: more columns than samples of positive weight, or
        repeated columns; or a weight or the ridge is negative.
    TypeError, ValueError
        Mixed libraries or dtypes, complex arrays; shapes that do not fit.

    See Also
    --------
    weighted_least_squares_vjp : its reverse-mode derivative.

    Notes
    -----
    With ``Ã = [A 1]``, W the weights and D the identity without the bias,

    .. math:: (\tilde A^T W \tilde A + \rho D)\, y = \tilde A^T W b

    Normal equations square the condition of A. Cost: 2 m n² flops and one solve of order n + 1.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.asarray([[0.0], [1.0], [2.0]]), np.asarray([1.0, 3.0, 50.0])
    >>> ddnref.nodes.weighted_least_squares(a, b, np.asarray([1.0, 1.0, 0.0])).round(12)  # the outlier has no weight
    array([2., 1.])
    """
    xp = conform("(m,n+),(m),(m),()", real_only=True, a=a, b=b, weights=weights, ridge=ridge).xp
    refuse_recording("weighted_least_squares", a)
    a, b = _finite_or_nan(a, b)
    weights = nan_where(~xp.isfinite(weights), weights)
    a_, h = _normal_equations(a, weights, ridge, bias)
    y, singular = checked_solve(Dense(h), xp.matrix_transpose(a_) @ (weights * b)[..., None])
    # A negative weight or ridge would turn the minimum into a saddle.
    singular = singular | ~xp.all(weights >= 0, axis=-1)
    if ridge is not None:
        singular = singular | ~(ridge >= 0)
    # Items that are not finite are NaN without an error.
    finite = xp.all(xp.isfinite(b), axis=-1) & xp.all(xp.isfinite(weights), axis=-1)
    _refuse(singular & finite, throw)
    return nan_where(singular[..., None], y[..., 0])


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
    r"""Gradient of a loss of `weighted_least_squares`.

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

    Raises
    ------
    SingularError, TypeError, ValueError
        As `weighted_least_squares`.

    Notes
    -----
    With ``z = Ã u`` and the residual ``r = b − Ã y``,

    .. math:: (\tilde A^T W \tilde A + \rho D)\, u = \bar y, \quad
              \bar b = W z, \quad \bar\omega = z \circ r, \quad \bar\rho = -u^T D y, \quad
              \bar{\tilde A} = (W r) u^T - (W z) y^T

    Cost: 2 m n² flops and one solve.

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
    a, b = _finite_or_nan(a, b)
    weights = nan_where(~xp.isfinite(weights), weights)
    a_, h = _normal_equations(a, weights, ridge, bias)
    u, singular = checked_solve(Dense(h), y_bar[..., None])
    _refuse(singular, throw)
    u = nan_where(singular[..., None], u[..., 0])
    z, r = dense.matvec(a_, u), b - dense.matvec(a_, y)
    # The last column of the gradient is that of the constant column, which is no input.
    a_bar = dense.outer(weights * r, u) - dense.outer(weights * z, y)
    ridge_bar = None if ridge is None else -xp.sum(u[..., :n] * y[..., :n], axis=-1)
    return a_bar[..., :n], weights * z, z * r, ridge_bar


def _normal_equations(a: Array, weights: Array, ridge: Array | None, bias: bool) -> tuple[Array, Array]:
    """``Ã = [A 1]``, and ``Ãᵀ W Ã + ρ D``, symmetric to the last bit."""
    xp = namespace_of(a)
    n = a.shape[-1]
    a_ = xp.concat([a, full((*a.shape[:-1], 1), 1.0, a)], axis=-1) if bias else a
    h = dense.hermitian_part(xp.matrix_transpose(a_) @ (weights[..., None] * a_))
    if ridge is None:
        return a_, h
    # D is the identity, but for the zero of a bias.
    i = xp.arange(a_.shape[-1], device=array_api_compat.device(a))
    d = xp.astype(i < n, a.dtype) * dense.identity(a_.shape[-1], a)
    return a_, h + nan_where(~xp.isfinite(ridge), ridge)[..., None, None] * d


def _refuse(singular: Array, throw: bool) -> None:
    if throw and is_true(namespace_of(singular).any(singular)):
        raise SingularError(
            "The normal equations of weighted least squares are singular to working precision, or a weight or the "
            "ridge is negative. The most likely causes: more columns than samples of positive weight, or linearly "
            "dependent columns (a constant one beside the bias). Pass a ridge, drop columns, or pass throw=False to "
            "get NaN for these items."
        )


def _finite_or_nan(a: Array, b: Array) -> tuple[Array, Array]:
    """Make an item NaN as a whole where a or b is not finite."""
    xp = namespace_of(a)
    bad = ~(xp.all(xp.isfinite(a), axis=(-2, -1)) & xp.all(xp.isfinite(b), axis=-1))
    return nan_where(bad[..., None, None], a), nan_where(bad[..., None], b)
