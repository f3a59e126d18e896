"""A point that claims to solve a problem: its check, its active constraints, and the solve for its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, eps, full, is_true, namespace_of, nan_where
from ddnref._core.checks import check_dtypes, check_shapes, conform
from ddnref._kernels.dense import matvec
from ddnref._kernels.vectors import safe_norm
from ddnref.errors import ConvergenceError, OptimalityError, SingularError
from ddnref.implicit._bordered import Solution, bordered_solve, solve
from ddnref.implicit._structures import Diagonal, Products, Structure, as_structure

Bars: TypeAlias = Array | tuple[Array, ...]


class Functions(NamedTuple):
    """The functions by which a user states ``min f`` subject to ``h``."""

    gradient: Callable[..., Array]
    hessian: Callable[..., Array | Structure]
    constraint: Callable[..., Array]
    constraint_jacobian: Callable[..., Array]
    residual_vjp: Callable[..., Any]


class Point:
    """The given point, and how far from a solution it may be."""

    def __init__(self, name: str, y: Array, y_bar: Array, nu: Array | None, rtol: float | None, atol: float) -> None:
        xp = conform("(n+),(n),(p)", real_only=True, y=y, y_bar=y_bar, nu=nu).xp
        self.name, self.y = name, y
        self.rtol = eps(xp, y.dtype) ** 0.5 if rtol is None else rtol
        self.tolerance = self.rtol * safe_norm(y) + atol
        """(...): the longest Newton step that is accepted."""

    def is_near(self, step: Array) -> Array:
        """Whether a Newton step (..., n) is within the tolerance; one with NaN is not."""
        return safe_norm(step) <= self.tolerance

    def report(self, solution: Solution, optimal: Array, throw: bool) -> tuple[Array, Array]:
        """``w`` and ``η`` of the cotangent (the first right-hand side): NaN in failed items, or an error saying why."""
        bad = solution.singular | ~solution.converged | ~optimal
        if throw and is_true(namespace_of(bad).any(bad)):
            self._raise(solution)
        return nan_where(bad[..., None], solution.w[..., 0]), nan_where(bad[..., None], solution.eta[..., 0])

    def _raise(self, solution: Solution) -> NoReturn:
        xp = namespace_of(self.y)
        # The causes in their order: a singular system also spoils the iteration and the Newton step.
        if is_true(xp.any(solution.singular)):
            raise SingularError(
                f"The linear system of {self.name} is singular to working precision, or not finite. The most likely "
                "causes: the solution is not isolated (a flat direction), constraints repeat each other there, or a "
                "structured Hessian is singular although the bordered matrix is not (then pass it as an array). Pass "
                "throw=False to get NaN for these items."
            )
        if not is_true(xp.all(solution.converged)):
            raise ConvergenceError(
                f"The conjugate gradients of {self.name} reached their limit. The most likely cause is a badly "
                "conditioned Hessian: raise maxiter or rtol of Products, or pass a structured Hessian. Pass "
                "throw=False to get NaN for these items."
            )
        raise OptimalityError(
            f"The point given to {self.name} does not solve its problem: a Newton step from it is longer than "
            f"{self.rtol:.1e} of the point, or a constraint is violated, or a multiplier is wrong. The most likely "
            "causes: the solver stopped early, or the callables state another problem (ℒ = f − νᵀh; inequalities "
            "h ≤ 0 have ν ≤ 0). Solve further, raise rtol (or atol, for a solution at zero), or pass throw=False to "
            "get NaN for these items."
        )


def unconstrained(
    point: Point, h: Structure, y_bar: Array, r: Array, vjp: Callable[..., Any], inputs: tuple[Array, ...], throw: bool
) -> Bars:
    """The gradient without constraints: one symmetric solve, for the cotangent and for the Newton step."""
    solution = solve(h, namespace_of(y_bar).stack([y_bar, -r], axis=-1))
    w, _ = point.report(solution, point.is_near(solution.w[..., 1]), throw)
    return negative(vjp(w, point.y, *inputs))


def constrained(
    point: Point,
    y_bar: Array,
    nu: Array | None,
    inputs: tuple[Array, ...],
    of: Functions,
    equalities: int | None,
    throw: bool,
) -> Bars:
    """The gradient by the bordered solve; the first `equalities` constraints are equalities, with None all of them."""
    y, xp = point.y, namespace_of(point.y)
    # Evaluate the problem at the point.
    f_y = of_shape("gradient", of.gradient(y, *inputs), y, tuple(y.shape))
    h = of.constraint(y, *inputs)
    h = of_shape("constraint", h, y, (*y.shape[:-1], h.shape[-1] if h.ndim else 0))
    h_y = of_shape("constraint_jacobian", of.constraint_jacobian(y, *inputs), y, (*h.shape, y.shape[-1]))
    check_shapes(nu=(nu, tuple(h.shape)))
    # Border the Hessian of the Lagrangian by the active constraints.
    p = h.shape[-1]
    equal = xp.arange(p, device=array_api_compat.device(h)) < (p if equalities is None else equalities)
    active, nu, feasible = _activity(point, f_y, h, h_y, nu, equal)
    hessian = as_structure(of.hessian(y, nu, *inputs), y, "hessian")
    l_y = f_y - matvec(xp.matrix_transpose(h_y), nu)
    # The cotangent is the first right-hand side; the second gives the Newton step that judges the point.
    solution = bordered_solve(
        hessian, h_y, active, xp.stack([y_bar, -l_y], axis=-1), xp.stack([xp.zeros_like(h), -h], axis=-1)
    )
    correct = _multipliers_hold(point, solution.eta[..., 1], f_y, h_y, hessian)
    w, eta = point.report(solution, feasible & correct & point.is_near(solution.w[..., 1]), throw)
    return negative(of.residual_vjp(w, -eta, y, nu, *inputs))


def _activity(
    point: Point, f_y: Array, h: Array, h_y: Array, nu: Array | None, equal: Array
) -> tuple[Array, Array, Array]:
    """Find the active constraints, their multipliers (0 for the others), and which items are feasible."""
    xp = namespace_of(h)
    norms = safe_norm(h_y)
    reach = point.tolerance[..., None] * norms  # the change of h within the tolerance of y
    near = equal | (h >= -reach)
    if nu is None:  # least squares, ‖f_y − h_yᵀν‖: the bordered system with the identity for a Hessian
        ones = Diagonal(full(f_y.shape, 1.0, f_y))
        nu = bordered_solve(ones, h_y, near, -f_y[..., None], xp.zeros_like(h)[..., None]).eta[..., 0]
    force, floor = nu * norms, point.rtol * safe_norm(f_y)[..., None]
    # A positive force does not hold the point: unless it is rounding, the Newton step will follow it. NaN stays active.
    active = equal | (near & ~(force >= -floor))
    held = (h <= reach) & (~equal | (h >= -reach))
    return active, xp.where(active, nu, xp.zeros_like(nu)), xp.all(held, axis=-1)


def _multipliers_hold(point: Point, step: Array, f_y: Array, h_y: Array, hessian: Structure) -> Array:
    """Whether the Newton step of the multipliers is small, as forces ``h_yᵀ δν`` against those of the problem."""
    xp = namespace_of(h_y)
    bound = point.rtol * safe_norm(f_y)
    if not isinstance(hessian, Products):
        # Within the tolerance of y, ∇f itself changes by up to this.
        bound = bound + xp.max(hessian.row_size(), axis=-1) * point.tolerance
    return safe_norm(matvec(xp.matrix_transpose(h_y), step)) <= bound


def of_shape(name: str, array: Array, y: Array, shape: tuple[int, ...]) -> Array:
    """Check the array that a callable returned; infinities become NaN, which spreads without a warning."""
    check_shapes(**{f"the result of {name}": (array, shape)})
    check_dtypes(**{f"the result of {name}": (array, y.dtype)})
    return nan_where(~namespace_of(array).isfinite(array), array)


def negative(bars: Any) -> Bars:
    """``−x̄`` of one or several inputs."""
    return tuple(-bar for bar in bars) if isinstance(bars, tuple) else -bars
