"""Gradients through the solution of a problem, whatever solved it: the general deep declarative nodes.

With ``ℒ = f − νᵀh`` and the Hessian of ℒ bordered by the constraints,

    [ ℒ_yy  −h_yᵀ ] [ w ]   [ ȳ ]
    [ h_y     0   ] [ η ] = [ 0 ],        x̄ = −∂/∂x [ wᵀ ∇_yℒ(x, y, ν) − ηᵀ h(x, y) ]

The same matrix takes a Newton step ``[δ; δν]`` from the given point, ``−[∇_yℒ; h]`` on the right: its length,
relative to ``‖y‖``, says how far from a solution the point is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddnref._core.arrays import Array, as_tuple
from ddnref._core.checks import conform
from ddnref._kernels.dense import matvec
from ddnref._kernels.public import public
from ddnref.implicit._bordered import solve
from ddnref.implicit._point import Bars, Functions, Point, constrained, negative, of_shape, unconstrained
from ddnref.implicit._structures import Products, Structure, as_structure


@public
def root_vjp(
    y_bar: Array,
    y: Array,
    /,
    *inputs: Array,
    residual: Callable[..., Array],
    jacobian: Callable[..., Array | Structure],
    residual_vjp: Callable[..., Any],
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> Bars:
    r"""Gradient through a root ``r(y, x) = 0``.

    Parameters
    ----------
    y_bar, y : (..., n) real arrays
        Cotangent of the root, and the root.
    *inputs : arrays
        The arrays x that the root depends on.
    residual : callable
        ``residual(y, *inputs) = r``, (..., n).
    jacobian : callable
        ``jacobian(y, *inputs) = ∂r/∂y``: an array (..., n, n) or a `Diagonal`, `BlockDiagonal` or
        `DiagonalPlusLowRank`; `Products` where it is symmetric and positive definite.
    residual_vjp : callable
        ``residual_vjp(w, y, *inputs)``: the gradient of ``wᵀ r(y, x)`` with respect to each input, y held fixed.
        A parameter shared by a batch gets the sum.
    rtol, atol : float
        `y` is a root where a Newton step from it is at most ``rtol * ‖y‖ + atol``; default ``sqrt(eps)`` and 0.
    throw : bool, default True
        Raise for items without a gradient, reading flags on the host; with ``False`` their `w` is NaN.

    Returns
    -------
    x_bar : array, or a tuple of them where there are several inputs

    Raises
    ------
    OptimalityError
        `y` is not a root.
    SingularError
        The Jacobian is singular to working precision, or `Products` met a direction of no positive curvature.
    ConvergenceError
        The conjugate gradients of `Products` reached their limit.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; complex arrays; shapes that do not fit.

    Notes
    -----
    .. math:: \left(\frac{\partial r}{\partial y}\right)^T w = \bar y, \qquad
              \bar x = -\left(\frac{\partial r}{\partial x}\right)^T w

    Cost: two solves, of the transposed Jacobian and of itself for the check.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022), Lemma 4.3.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([4.0])  # y² = x
    >>> ddnref.implicit.root_vjp(np.ones(1), np.sqrt(x), x, residual=lambda y, x: y * y - x,
    ...     jacobian=lambda y, x: ddnref.implicit.Diagonal(2 * y), residual_vjp=lambda w, y, x: -w)
    array([0.25])
    """
    point = Point("root_vjp", y, y_bar, None, rtol, atol)
    h = as_structure(jacobian(y, *inputs), y, "jacobian")
    r = of_shape("residual", residual(y, *inputs), y, tuple(y.shape))
    if isinstance(h, Products):  # symmetric: one solve serves both
        return unconstrained(point, h, y_bar, r, residual_vjp, inputs, throw)
    # The transposed Jacobian takes the cotangent back; the Jacobian itself takes the Newton step that judges `y`.
    back, newton = solve(h.transpose(), y_bar[..., None]), solve(h, -r[..., None])
    optimal = point.is_near(newton.w[..., 0])
    w, _ = point.report(back._replace(singular=back.singular | newton.singular), optimal, throw)
    return negative(residual_vjp(w, y, *inputs))


@public
def argmin_vjp(
    y_bar: Array,
    y: Array,
    /,
    *inputs: Array,
    gradient: Callable[..., Array],
    hessian: Callable[..., Array | Structure],
    gradient_vjp: Callable[..., Any],
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> Bars:
    r"""Gradient through an unconstrained minimum ``y ∈ argmin_u f(x, u)``.

    Parameters
    ----------
    y_bar, y, *inputs, rtol, atol, throw
        As in `root_vjp`. That `y` is a minimum and not another stationary point is assumed, not checked.
    gradient : callable
        ``gradient(y, *inputs) = ∇_y f``, (..., n).
    hessian : callable
        ``hessian(y, *inputs) = f_yy``, symmetric: an array or any structure, `Products` included.
    gradient_vjp : callable
        ``gradient_vjp(w, y, *inputs)``: the gradient of ``wᵀ ∇_y f(x, y)`` with respect to each input.

    Returns
    -------
    x_bar : array, or a tuple of them

    Raises
    ------
    OptimalityError, SingularError, ConvergenceError, TypeError, ValueError
        As `root_vjp`.

    Notes
    -----
    .. math:: f_{yy}\, w = \bar y, \qquad \bar x = -\frac{\partial}{\partial x}\, w^T \nabla_y f(x, y)

    Cost: one solve with two right-hand sides.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022), Proposition 4.4.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([1.0, 5.0])  # minimise Σ ½ (u − x)²
    >>> ddnref.implicit.argmin_vjp(np.asarray([1.0, 2.0]), x, x, gradient=lambda y, x: y - x,
    ...     hessian=lambda y, x: np.eye(2), gradient_vjp=lambda w, y, x: -w)
    array([1., 2.])
    """
    # A minimum is a root of the gradient whose Jacobian, the Hessian, is symmetric.
    point = Point("argmin_vjp", y, y_bar, None, rtol, atol)
    h = as_structure(hessian(y, *inputs), y, "hessian")
    f_y = of_shape("gradient", gradient(y, *inputs), y, tuple(y.shape))
    return unconstrained(point, h, y_bar, f_y, gradient_vjp, inputs, throw)


@public
def eq_argmin_vjp(
    y_bar: Array,
    y: Array,
    nu: Array | None,
    /,
    *inputs: Array,
    gradient: Callable[..., Array],
    hessian: Callable[..., Array | Structure],
    constraint: Callable[..., Array],
    constraint_jacobian: Callable[..., Array],
    residual_vjp: Callable[..., Any],
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> Bars:
    r"""Gradient through a minimum under equality constraints, ``y ∈ argmin_u f(x, u)`` subject to ``h(x, u) = 0``.

    Parameters
    ----------
    y_bar, y, *inputs, rtol, atol, throw
        As in `argmin_vjp`.
    nu : (..., p) array or None
        Multipliers of ``ℒ = f − νᵀh``; computed by least squares from ``∇_y f = h_yᵀ ν`` where not given.
    gradient : callable
        ``gradient(y, *inputs) = ∇_y f``, (..., n): of the objective alone.
    hessian : callable
        ``hessian(y, nu, *inputs) = ℒ_yy``: of the Lagrangian. An array may be singular where the bordered matrix
        is not; a structured one may not; `Products` must be positive definite in the tangent of the constraints.
    constraint, constraint_jacobian : callable
        ``constraint(y, *inputs) = h``, (..., p), and ``h_y``, (..., p, n).
    residual_vjp : callable
        ``residual_vjp(w, eta, y, nu, *inputs)``: the gradient of ``wᵀ ∇_yℒ(x, y, ν) + ηᵀ h(x, y)`` with respect
        to each input, y and ν held fixed.

    Returns
    -------
    x_bar : array, or a tuple of them

    Raises
    ------
    OptimalityError
        `y` is not stationary or not feasible, or `nu` are not its multipliers.
    SingularError
        The bordered matrix is singular, for example because the constraints repeat each other at `y`.
    ConvergenceError, TypeError, ValueError
        As `root_vjp`.

    Notes
    -----
    .. math::
        \begin{bmatrix} \mathcal L_{yy} & -h_y^T \\ h_y & 0 \end{bmatrix}
        \begin{bmatrix} w \\ \eta \end{bmatrix} = \begin{bmatrix} \bar y \\ 0 \end{bmatrix}, \qquad
        \bar x = -\frac{\partial}{\partial x} \left[ w^T \nabla_y \mathcal L - \eta^T h \right]

    Cost: one solve of order n + p (dense) or p (structured), with two right-hand sides.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022), Proposition 4.5,
       there by block elimination, which needs an invertible ℒ_yy.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([3.0, 4.0])  # the nearest point to x with uᵀu = 1
    >>> ddnref.implicit.eq_argmin_vjp(np.asarray([0.0, 1.0]), x / 5, None, x, gradient=lambda y, x: y - x,
    ...     hessian=lambda y, nu, x: (1 - 2 * nu) * np.eye(2), constraint=lambda y, x: np.sum(y * y, keepdims=True) - 1,
    ...     constraint_jacobian=lambda y, x: 2 * y[None], residual_vjp=lambda w, eta, y, nu, x: -w).round(12)
    array([-0.096,  0.072])
    """
    point = Point("eq_argmin_vjp", y, y_bar, nu, rtol, atol)
    functions = Functions(gradient, hessian, constraint, constraint_jacobian, residual_vjp)
    return constrained(point, y_bar, nu, inputs, functions, None, throw)  # None: all are equalities


@public
def lineq_argmin_vjp(
    y_bar: Array,
    y: Array,
    nu: Array | None,
    a: Array,
    b: Array,
    /,
    *inputs: Array,
    gradient: Callable[..., Array],
    hessian: Callable[..., Array | Structure],
    gradient_vjp: Callable[..., Any] | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> Bars:
    r"""Gradient through a minimum under linear constraints, ``y ∈ argmin_u f(x, u)`` subject to ``A u = b``.

    Parameters
    ----------
    y_bar, y, nu, *inputs, rtol, atol, throw
        As in `eq_argmin_vjp`.
    a : (..., p, n) array
    b : (..., p) array
    gradient, hessian, gradient_vjp : callable
        As in `argmin_vjp`: linear constraints add nothing to the Hessian. `gradient_vjp` only where there are
        inputs.

    Returns
    -------
    (a_bar, b_bar, *x_bar) : tuple of arrays

    Raises
    ------
    OptimalityError, SingularError, ConvergenceError, TypeError, ValueError
        As `eq_argmin_vjp`.

    Notes
    -----
    With ``w`` and ``η`` of `eq_argmin_vjp`,

    .. math:: \bar A = \nu w^T + \eta y^T, \qquad \bar b = -\eta, \qquad
              \bar x = -\frac{\partial}{\partial x}\, w^T \nabla_y f

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022), Corollary 4.9.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.ones((1, 2)), np.asarray([2.0])  # the shortest y with y_1 + y_2 = 2
    >>> _, b_bar = ddnref.implicit.lineq_argmin_vjp(np.asarray([1.0, 0.0]), np.ones(2), None, a, b,
    ...     gradient=lambda y: y, hessian=lambda y: ddnref.implicit.Diagonal(np.ones(2)))
    >>> b_bar
    array([0.5])
    """
    point = Point("lineq_argmin_vjp", y, y_bar, nu, rtol, atol)
    conform("(n),(p),(p,n)", real_only=True, y=y, b=b, a=a)
    if inputs and gradient_vjp is None:
        raise TypeError("gradient_vjp must be given: the objective depends on inputs.")

    def residual_vjp(w: Array, eta: Array, y: Array, nu: Array, a: Array, b: Array, *x: Array) -> Any:  # noqa: ARG001
        # ∂/∂A and ∂/∂b of ``wᵀ ∇_yℒ + ηᵀ h`` with ``∇_yℒ = ∇_y f − Aᵀ ν`` and ``h = A y − b``.
        a_bar = eta[..., :, None] * y[..., None, :] - nu[..., :, None] * w[..., None, :]
        return a_bar, -eta, *(as_tuple(gradient_vjp(w, y, *x)) if gradient_vjp else ())

    # The same problem for `constrained`, for which A and b are the first inputs.
    functions = Functions(
        gradient=lambda y, a, b, *x: gradient(y, *x),  # noqa: ARG005
        hessian=lambda y, nu, a, b, *x: hessian(y, *x),  # noqa: ARG005
        constraint=lambda y, a, b, *x: matvec(a, y) - b,  # noqa: ARG005
        constraint_jacobian=lambda y, a, b, *x: a,  # noqa: ARG005
        residual_vjp=residual_vjp,
    )
    return constrained(point, y_bar, nu, (a, b, *inputs), functions, None, throw)


@public
def ineq_argmin_vjp(
    y_bar: Array,
    y: Array,
    nu: Array | None,
    /,
    *inputs: Array,
    gradient: Callable[..., Array],
    hessian: Callable[..., Array | Structure],
    constraint: Callable[..., Array],
    constraint_jacobian: Callable[..., Array],
    residual_vjp: Callable[..., Any],
    equalities: int = 0,
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> Bars:
    r"""Gradient through a minimum under inequalities, ``y ∈ argmin_u f(x, u)`` subject to ``h(x, u) ≤ 0``.

    Parameters
    ----------
    y_bar, y, nu, *inputs, gradient, hessian, constraint, constraint_jacobian, residual_vjp, rtol, atol, throw
        As in `eq_argmin_vjp`. With ``ℒ = f − νᵀh`` the multipliers of inequalities are negative or zero. The
        callables always see all p constraints; those not active have ``ν = η = 0``.
    equalities : int, default 0
        Number of leading constraints that are equalities ``h_j = 0``.

    Returns
    -------
    x_bar : array, or a tuple of them

    Raises
    ------
    OptimalityError
        `y` is not feasible or not stationary, which includes a positive multiplier of an inequality.
    SingularError, ConvergenceError, TypeError, ValueError
        As `eq_argmin_vjp`.

    Notes
    -----
    A constraint is active where `y` is within ``rtol * ‖y‖ + atol`` of its boundary (to first order) and its
    multiplier is not zero, ``−ν_j ‖∂h_j‖ > rtol * ‖∇f‖``; the system of `eq_argmin_vjp` holds the active ones,
    which may differ between the items of a batch. Where a constraint is touched with a zero multiplier the activity
    changes and only one-sided derivatives exist; the one returned is that of the side where it is not active.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022), Proposition 4.6.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([-1.0, 2.0])  # the nearest point to x with u ≥ 0
    >>> ddnref.implicit.ineq_argmin_vjp(np.ones(2), np.asarray([0.0, 2.0]), None, x, gradient=lambda y, x: y - x,
    ...     hessian=lambda y, nu, x: np.eye(2), constraint=lambda y, x: -y,
    ...     constraint_jacobian=lambda y, x: -np.eye(2), residual_vjp=lambda w, eta, y, nu, x: -w) + 0.0
    array([0., 1.])
    """
    point = Point("ineq_argmin_vjp", y, y_bar, nu, rtol, atol)
    functions = Functions(gradient, hessian, constraint, constraint_jacobian, residual_vjp)
    return constrained(point, y_bar, nu, inputs, functions, equalities, throw)
