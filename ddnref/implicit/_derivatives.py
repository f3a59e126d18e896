"""Derivatives of the solution of a problem, whatever solved it: the general deep declarative nodes in both modes.

The reverse mode solves with the adjoint of a matrix for a cotangent of the solution, and the forward mode with the
matrix itself for tangents of the inputs. The same matrix takes a Newton step from the given point. The derivative is
that of the corrected point, and a second step tells how exact it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddnref._core.arrays import Array, as_tuple, namespace_of
from ddnref._core.checks import conform
from ddnref._kernels.dense import matvec, outer
from ddnref._kernels.public import public
from ddnref.implicit._point import Bars, Functions, NodeInfo, Point, constrained, of_shape, unconstrained
from ddnref.implicit._structures import Structure
from ddnref.implicit._tangents import split_arguments


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
) -> tuple[Bars, NodeInfo]:
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
        The gradient of a parameter that a batch shares is the sum over its items.
    rtol, atol : float
        `y` is corrected by a Newton step of at most ``rtol * ‖y‖ + atol``; default 0.01 and 0. A longer step hints at
        callables that state another problem. A smaller `rtol` asks for a point that is as good; `atol` is for a
        solution at zero.
    throw : bool, default True
        Raise for items without a gradient, reading flags on the host; with ``False`` their w is NaN.

    Returns
    -------
    x_bar : array, or a tuple of them where there are several inputs
        The gradient at the corrected point, whose error is about the square of that at `y`.
    info : NodeInfo
        `error` estimates the relative error of `x_bar`.

    Raises
    ------
    OptimalityError
        `y` is not a root, and a Newton step does not help: it is too long, or the next one is more than half as long,
        or `error` is above 0.1.
    SingularError
        The Jacobian is singular to working precision, or `Products` met a direction of no positive curvature.
    ConvergenceError
        The conjugate gradients of `Products` reached their limit.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; complex arrays; shapes that do not fit.

    Notes
    -----
    The implicit function theorem, Lemma 4.3 of [1]_, gives

    .. math:: \left(\frac{\partial r}{\partial y}\right)^T w = \bar y, \qquad
              \bar x = -\left(\frac{\partial r}{\partial x}\right)^T w

    The Jacobian J at `y` is factorised once. It takes the Newton step to ``y₁ = y − J⁻¹ r`` and refines w twice with
    the Jacobian at ``y₁``. One more step of both gives a gradient that is so much more exact that the difference is the
    error of the one returned. To that step the worst effect of rounding errors is added.

    Cost: one inverse; three evaluations of the Jacobian, two of the residual, three of its gradient.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([4.0])  # y² = x
    >>> near = np.asarray([2.001])
    >>> x_bar, info = ddnref.implicit.root_vjp(np.ones(1), near, x, residual=lambda y, x: y * y - x,
    ...     jacobian=lambda y, x: ddnref.implicit.Diagonal(2 * y), residual_vjp=lambda w, y, x: -w)
    >>> x_bar.round(6), float(info.error.round(8))
    (array([0.25]), 1.2e-07)
    """
    point = Point("root_vjp", y, None, rtol, atol, throw, y_bar=y_bar)
    return unconstrained(point, residual, jacobian, residual_vjp, inputs, ("residual", "jacobian", "residual_vjp"))


@public
def root_jvp(
    *arrays: Array | None,
    residual: Callable[..., Array],
    jacobian: Callable[..., Array | Structure],
    residual_jvp: Callable[..., Array],
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> tuple[Array, NodeInfo]:
    r"""Tangent of a root ``r(y, x) = 0`` along a direction of its inputs.

    Other options, the info and the errors are those of `root_vjp`.

    Parameters
    ----------
    *arrays : arrays
        ``(*x_dots, y, *inputs)``: a tangent for each input, of its shape and dtype; the root (..., n); and the inputs.
        ``None`` is the tangent of an input that does not move, and not all of them may be ``None``.
    residual, jacobian : callable
        As in `root_vjp`.
    residual_jvp : callable
        ``residual_jvp(*x_dots, y, *inputs)``: the tangent of ``r(y, x)``, (..., n), along ``x_dots``, y held fixed.
        It gets zeros for an input that does not move.

    Returns
    -------
    y_dot : (..., n) array
        The tangent at the corrected point.
    info : NodeInfo
        `error` estimates the relative error of `y_dot`.

    Notes
    -----
    .. math:: \frac{\partial r}{\partial y}\, \dot y = -\frac{\partial r}{\partial x}\, \dot x

    The point is corrected and the system refined as in `root_vjp`, with the Jacobian in place of its transpose. Cost:
    one inverse; three evaluations of the Jacobian, two of the residual, two of its tangent.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([4.0])  # y² = x
    >>> y_dot, _ = ddnref.implicit.root_jvp(np.ones(1), np.asarray([2.001]), x, residual=lambda y, x: y * y - x,
    ...     jacobian=lambda y, x: ddnref.implicit.Diagonal(2 * y), residual_jvp=lambda x_dot, y, x: -x_dot)
    >>> y_dot.round(6)
    array([0.25])
    """
    dots, (y,), inputs = split_arguments("root_jvp", arrays, ("y",))
    point = Point("root_jvp", y, None, rtol, atol, throw, dots=dots)
    return unconstrained(point, residual, jacobian, residual_jvp, inputs, ("residual", "jacobian", "residual_jvp"))


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
) -> tuple[Bars, NodeInfo]:
    r"""Gradient through an unconstrained minimum ``y ∈ argmin_u f(x, u)``.

    Other arguments, the result and the errors are those of `root_vjp`, for the gradient as the residual. That `y` is a
    minimum and not another stationary point is assumed, not checked.

    Parameters
    ----------
    gradient : callable
        ``gradient(y, *inputs) = ∇_y f``, (..., n).
    hessian : callable
        ``hessian(y, *inputs) = f_yy``, symmetric: an array or any structure, `Products` included.
    gradient_vjp : callable
        ``gradient_vjp(w, y, *inputs)``: the gradient of ``wᵀ ∇_y f(x, y)`` with respect to each input.

    Notes
    -----
    Proposition 4.4 of the reference in `root_vjp`:

    .. math:: f_{yy}\, w = \bar y, \qquad \bar x = -\frac{\partial}{\partial x}\, w^T \nabla_y f(x, y)

    Cost: as `root_vjp`; for `Products` eight runs of conjugate gradients, six of them to three digits.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([1.0, 5.0])  # minimise Σ ½ (u − x)²
    >>> x_bar, _ = ddnref.implicit.argmin_vjp(np.asarray([1.0, 2.0]), x, x, gradient=lambda y, x: y - x,
    ...     hessian=lambda y, x: np.eye(2), gradient_vjp=lambda w, y, x: -w)
    >>> x_bar
    array([1., 2.])
    """
    # A minimum is a root of the gradient, whose Jacobian is the Hessian.
    point = Point("argmin_vjp", y, None, rtol, atol, throw, y_bar=y_bar)
    return unconstrained(point, gradient, hessian, gradient_vjp, inputs, ("gradient", "hessian", "gradient_vjp"))


@public
def argmin_jvp(
    *arrays: Array | None,
    gradient: Callable[..., Array],
    hessian: Callable[..., Array | Structure],
    gradient_jvp: Callable[..., Array],
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> tuple[Array, NodeInfo]:
    r"""Tangent of an unconstrained minimum ``y ∈ argmin_u f(x, u)`` along a direction of its inputs.

    Arguments, the result and the errors are those of `root_jvp`, for the gradient as the residual.

    Parameters
    ----------
    gradient, hessian : callable
        As in `argmin_vjp`.
    gradient_jvp : callable
        ``gradient_jvp(*x_dots, y, *inputs)``: the tangent of ``∇_y f(x, y)``, (..., n), along ``x_dots``, y held
        fixed.

    Notes
    -----
    .. math:: f_{yy}\, \dot y = -\frac{\partial}{\partial x} \nabla_y f(x, y)\, \dot x

    Cost: as `root_jvp`; for `Products` eight runs of conjugate gradients, six of them to three digits.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([1.0, 5.0])  # minimise Σ ½ (u − x)²
    >>> y_dot, _ = ddnref.implicit.argmin_jvp(np.asarray([1.0, 2.0]), x, x, gradient=lambda y, x: y - x,
    ...     hessian=lambda y, x: np.eye(2), gradient_jvp=lambda x_dot, y, x: -x_dot)
    >>> y_dot
    array([1., 2.])
    """
    dots, (y,), inputs = split_arguments("argmin_jvp", arrays, ("y",))
    point = Point("argmin_jvp", y, None, rtol, atol, throw, dots=dots)
    return unconstrained(point, gradient, hessian, gradient_jvp, inputs, ("gradient", "hessian", "gradient_jvp"))


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
) -> tuple[Bars, NodeInfo]:
    r"""Gradient through a minimum under equality constraints, ``y ∈ argmin_u f(x, u)`` subject to ``h(x, u) = 0``.

    Other arguments, the result and the errors are those of `argmin_vjp`.

    Parameters
    ----------
    nu : (..., p) array or None
        Multipliers of ``ℒ = f − νᵀh``; computed by least squares from ``∇_y f = h_yᵀ ν`` where not given. They are
        corrected together with `y`.
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

    Raises
    ------
    OptimalityError
        `y` is not stationary or not feasible, or `nu` are not its multipliers, and a Newton step does not help.
    SingularError
        The bordered matrix is singular, for example because the constraints repeat each other at `y`.

    Notes
    -----
    Proposition 4.5 of the reference in `root_vjp`, where block elimination needs an invertible ``ℒ_yy``:

    .. math::
        \begin{bmatrix} \mathcal L_{yy} & -h_y^T \\ h_y & 0 \end{bmatrix}
        \begin{bmatrix} w \\ \eta \end{bmatrix} = \begin{bmatrix} \bar y \\ 0 \end{bmatrix}, \qquad
        \bar x = -\frac{\partial}{\partial x} \left[ w^T \nabla_y \mathcal L - \eta^T h \right]

    Cost: one inverse of order n + p (dense) or p (structured), and evaluations as for `root_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([3.0, 4.0])  # the nearest point to x with uᵀu = 1
    >>> x_bar, _ = ddnref.implicit.eq_argmin_vjp(np.asarray([0.0, 1.0]), x / 5, None, x, gradient=lambda y, x: y - x,
    ...     hessian=lambda y, nu, x: (1 - 2 * nu) * np.eye(2), constraint=lambda y, x: np.sum(y * y, keepdims=True) - 1,
    ...     constraint_jacobian=lambda y, x: 2 * y[None], residual_vjp=lambda w, eta, y, nu, x: -w)
    >>> x_bar.round(12)
    array([-0.096,  0.072])
    """
    point = Point("eq_argmin_vjp", y, nu, rtol, atol, throw, y_bar=y_bar)
    functions = Functions(gradient, hessian, constraint, constraint_jacobian, residual_vjp)
    return constrained(point, inputs, functions)  # without a number, all constraints are equalities


@public
def eq_argmin_jvp(
    *arrays: Array | None,
    gradient: Callable[..., Array],
    hessian: Callable[..., Array | Structure],
    constraint: Callable[..., Array],
    constraint_jacobian: Callable[..., Array],
    residual_jvp: Callable[..., tuple[Array, Array]],
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> tuple[Array, NodeInfo]:
    r"""Tangent of a minimum under equality constraints along a direction of its inputs.

    Other options and the errors are those of `eq_argmin_vjp`.

    Parameters
    ----------
    *arrays : arrays
        ``(*x_dots, y, nu, *inputs)``: a tangent for each input, of its shape and dtype, or ``None`` for one that does
        not move; the minimum (..., n); the multipliers (..., p), or ``None``; and the inputs.
    gradient, hessian, constraint, constraint_jacobian : callable
        As in `eq_argmin_vjp`.
    residual_jvp : callable
        ``residual_jvp(*x_dots, y, nu, *inputs)``: the tangents of ``∇_yℒ(x, y, ν)``, (..., n), and of ``h(x, y)``,
        (..., p), along ``x_dots``, y and ν held fixed. It gets zeros for an input that does not move.

    Returns
    -------
    y_dot : (..., n) array
    info : NodeInfo
        As in `root_jvp`.

    Notes
    -----
    .. math::
        \begin{bmatrix} \mathcal L_{yy} & -h_y^T \\ h_y & 0 \end{bmatrix}
        \begin{bmatrix} \dot y \\ \dot\nu \end{bmatrix}
        = -\begin{bmatrix} \partial_x \nabla_y \mathcal L\, \dot x \\ \partial_x h\, \dot x \end{bmatrix}

    The matrix is that of `eq_argmin_vjp`. Cost: one inverse of order n + p (dense) or p (structured), and evaluations
    as for `root_jvp`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([3.0, 4.0])  # the nearest point to x with uᵀu = 1
    >>> y_dot, _ = ddnref.implicit.eq_argmin_jvp(np.asarray([0.0, 1.0]), x / 5, None, x, gradient=lambda y, x: y - x,
    ...     hessian=lambda y, nu, x: (1 - 2 * nu) * np.eye(2), constraint=lambda y, x: np.sum(y * y, keepdims=True) - 1,
    ...     constraint_jacobian=lambda y, x: 2 * y[None], residual_jvp=lambda x_dot, y, nu, x: (-x_dot, np.zeros(1)))
    >>> y_dot.round(12)
    array([-0.096,  0.072])
    """
    dots, (y, nu), inputs = split_arguments("eq_argmin_jvp", arrays, ("y", "nu"))
    point = Point("eq_argmin_jvp", y, nu, rtol, atol, throw, dots=dots)
    return constrained(point, inputs, Functions(gradient, hessian, constraint, constraint_jacobian, residual_jvp))


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
) -> tuple[Bars, NodeInfo]:
    r"""Gradient through a minimum under linear constraints, ``y ∈ argmin_u f(x, u)`` subject to ``A u = b``.

    Other arguments and the errors are those of `eq_argmin_vjp`.

    Parameters
    ----------
    a : (..., p, n) array
    b : (..., p) array
    gradient, hessian, gradient_vjp : callable
        As in `argmin_vjp`: linear constraints add nothing to the Hessian. `gradient_vjp` only where there are
        inputs.

    Returns
    -------
    (a_bar, b_bar, *x_bar) : tuple of arrays
    info : NodeInfo

    Notes
    -----
    With ``w`` and ``η`` of `eq_argmin_vjp` (Corollary 4.9 of the reference in `root_vjp`),

    .. math:: \bar A = \nu w^T + \eta y^T, \qquad \bar b = -\eta, \qquad
              \bar x = -\frac{\partial}{\partial x}\, w^T \nabla_y f

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.ones((1, 2)), np.asarray([2.0])  # the shortest y with y_1 + y_2 = 2
    >>> (_, b_bar), _ = ddnref.implicit.lineq_argmin_vjp(np.asarray([1.0, 0.0]), np.ones(2), None, a, b,
    ...     gradient=lambda y: y, hessian=lambda y: ddnref.implicit.Diagonal(np.ones(2)))
    >>> b_bar
    array([0.5])
    """
    point = Point("lineq_argmin_vjp", y, nu, rtol, atol, throw, y_bar=y_bar)
    conform("(n),(p),(p,n)", real_only=True, y=y, b=b, a=a)
    if inputs and gradient_vjp is None:
        raise TypeError("gradient_vjp must be given: the objective depends on inputs.")

    def residual_vjp(w: Array, eta: Array, y: Array, nu: Array, a: Array, b: Array, *x: Array) -> Any:  # noqa: ARG001
        # ∂/∂A and ∂/∂b of ``wᵀ ∇_yℒ + ηᵀ h`` with ``∇_yℒ = ∇_y f − Aᵀ ν`` and ``h = A y − b``.
        return outer(eta, y) - outer(nu, w), -eta, *(as_tuple(gradient_vjp(w, y, *x)) if gradient_vjp else ())

    return constrained(point, (a, b, *inputs), _under_linear_constraints(gradient, hessian, residual_vjp))


@public
def lineq_argmin_jvp(
    *arrays: Array | None,
    gradient: Callable[..., Array],
    hessian: Callable[..., Array | Structure],
    gradient_jvp: Callable[..., Array] | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> tuple[Array, NodeInfo]:
    r"""Tangent of a minimum under linear constraints ``A u = b`` along a direction of A, b and the other inputs.

    Other options, the result and the errors are those of `eq_argmin_jvp`.

    Parameters
    ----------
    *arrays : arrays
        ``(a_dot, b_dot, *x_dots, y, nu, a, b, *inputs)``, each tangent an array or ``None``.
    gradient, hessian, gradient_jvp : callable
        As in `argmin_jvp`. `gradient_jvp` only where there are inputs.

    Notes
    -----
    The right-hand side of `eq_argmin_jvp` is

    .. math:: -\begin{bmatrix} \partial_x \nabla_y f\, \dot x - \dot A^T \nu \\ \dot A y - \dot b \end{bmatrix}

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.ones((1, 2)), np.asarray([2.0])  # the shortest y with y_1 + y_2 = 2
    >>> y_dot, _ = ddnref.implicit.lineq_argmin_jvp(None, np.ones(1), np.ones(2), None, a, b,
    ...     gradient=lambda y: y, hessian=lambda y: ddnref.implicit.Diagonal(np.ones(2)))
    >>> y_dot
    array([0.5, 0.5])
    """
    dots, (y, nu), inputs = split_arguments("lineq_argmin_jvp", arrays, ("y", "nu"), ("a", "b"))
    point = Point("lineq_argmin_jvp", y, nu, rtol, atol, throw, dots=dots)
    conform("(n),(p),(p,n)", real_only=True, y=y, b=inputs[1], a=inputs[0])
    count = len(inputs) - 2
    if count and gradient_jvp is None:
        raise TypeError("gradient_jvp must be given: the objective depends on inputs.")

    def residual_jvp(a_dot: Array, b_dot: Array, *rest: Array) -> tuple[Array, Array]:
        x_dots, (y, nu, _, _), x = rest[:count], rest[count : count + 4], rest[count + 4 :]
        f_dot = namespace_of(y).zeros_like(y)
        if gradient_jvp is not None:
            f_dot = of_shape("gradient_jvp", gradient_jvp(*x_dots, y, *x), y, tuple(y.shape))
        return f_dot - matvec(namespace_of(a_dot).matrix_transpose(a_dot), nu), matvec(a_dot, y) - b_dot

    return constrained(point, inputs, _under_linear_constraints(gradient, hessian, residual_jvp))


def _under_linear_constraints(
    gradient: Callable[..., Array], hessian: Callable[..., Array | Structure], derivative: Callable[..., Any]
) -> Functions:
    """State a problem under linear constraints for `constrained`, whose first inputs are A and b."""
    return Functions(
        gradient=lambda y, a, b, *x: gradient(y, *x),  # noqa: ARG005
        hessian=lambda y, nu, a, b, *x: hessian(y, *x),  # noqa: ARG005
        constraint=lambda y, a, b, *x: matvec(a, y) - b,  # noqa: ARG005
        constraint_jacobian=lambda y, a, b, *x: a,  # noqa: ARG005
        derivative=derivative,
    )


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
) -> tuple[Bars, NodeInfo]:
    r"""Gradient through a minimum under inequalities, ``y ∈ argmin_u f(x, u)`` subject to ``h(x, u) ≤ 0``.

    Other arguments, the result and the errors are those of `eq_argmin_vjp`. With ``ℒ = f − νᵀh`` the multipliers of
    inequalities are negative or zero; those given are corrected with the point. The callables always see all p
    constraints; those not active have ``ν = η = 0``.

    Parameters
    ----------
    equalities : int, default 0
        Number of leading constraints that are equalities ``h_j = 0``.

    Notes
    -----
    The active constraints are those of the quadratic problem ``min ½ dᵀ ℒ_yy d + ∇fᵀ d`` subject to
    ``h + h_y d ≤ 0``, whose solution d is the Newton step; so the point may be inexact. They may differ between the
    items of a batch. The system of `eq_argmin_vjp` holds the active ones. If a second step leaves it open on which side
    a constraint is, `OptimalityError` is raised.

    Constraints may repeat each other. The gradient with respect to their parameters is then one of several, in which
    equal constraints have equal shares.

    Where a constraint is touched with a zero multiplier the activity changes and only one-sided derivatives exist. The
    one returned is that of the side where it is not active, and its `error` is 1. See Proposition 4.6 of the reference
    in `root_vjp`.

    Cost: as `eq_argmin_vjp`, and one inverse per step of the search, usually one to five. With ``throw=False`` ten
    steps are always taken, because stopping would read a flag.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([-1.0, 2.0])  # the nearest point to x with u ≥ 0
    >>> x_bar, _ = ddnref.implicit.ineq_argmin_vjp(np.ones(2), np.asarray([0.0, 2.0]), None, x,
    ...     gradient=lambda y, x: y - x, hessian=lambda y, nu, x: np.eye(2), constraint=lambda y, x: -y,
    ...     constraint_jacobian=lambda y, x: -np.eye(2), residual_vjp=lambda w, eta, y, nu, x: -w)
    >>> x_bar + 0.0
    array([0., 1.])
    """
    point = Point("ineq_argmin_vjp", y, nu, rtol, atol, throw, y_bar=y_bar)
    functions = Functions(gradient, hessian, constraint, constraint_jacobian, residual_vjp)
    return constrained(point, inputs, functions, equalities)


@public
def ineq_argmin_jvp(
    *arrays: Array | None,
    gradient: Callable[..., Array],
    hessian: Callable[..., Array | Structure],
    constraint: Callable[..., Array],
    constraint_jacobian: Callable[..., Array],
    residual_jvp: Callable[..., tuple[Array, Array]],
    equalities: int = 0,
    rtol: float | None = None,
    atol: float = 0.0,
    throw: bool = True,
) -> tuple[Array, NodeInfo]:
    r"""Tangent of a minimum under inequalities ``h(x, u) ≤ 0`` along a direction of its inputs.

    Arguments, the result and the errors are those of `eq_argmin_jvp`; multipliers, `equalities` and the search for the
    active constraints are those of `ineq_argmin_vjp`.

    Raises
    ------
    SingularError
        As `eq_argmin_jvp`. Also where active constraints repeat each other and the direction moves them apart: which
        of them stay active depends on the sign of the direction, so only a one-sided derivative exists. The gradient
        of `ineq_argmin_vjp` is not affected, because it shares itself equally among such constraints.

    Notes
    -----
    The system of `eq_argmin_jvp` holds the active constraints; the tangents of all others are ignored. Where a
    constraint is touched with a zero multiplier, the tangent is that of the side where it is not active, and its
    `error` is 1.

    Cost: as `eq_argmin_jvp`, and the search as in `ineq_argmin_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([-1.0, 2.0])  # the nearest point to x with u ≥ 0
    >>> y_dot, _ = ddnref.implicit.ineq_argmin_jvp(np.ones(2), np.asarray([0.0, 2.0]), None, x,
    ...     gradient=lambda y, x: y - x, hessian=lambda y, nu, x: np.eye(2), constraint=lambda y, x: -y,
    ...     constraint_jacobian=lambda y, x: -np.eye(2), residual_jvp=lambda x_dot, y, nu, x: (-x_dot, 0 * y))
    >>> y_dot + 0.0
    array([0., 1.])
    """
    dots, (y, nu), inputs = split_arguments("ineq_argmin_jvp", arrays, ("y", "nu"))
    point = Point("ineq_argmin_jvp", y, nu, rtol, atol, throw, dots=dots)
    functions = Functions(gradient, hessian, constraint, constraint_jacobian, residual_jvp)
    return constrained(point, inputs, functions, equalities)
