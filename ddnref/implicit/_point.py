"""A point that claims to solve a problem: is it one, which constraints hold it, and the solve behind its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, eps, full, is_true, namespace, nan_where
from ddnref._core.checks import check_dtypes, check_real, check_shapes
from ddnref._kernels.dense import matvec
from ddnref.errors import ConvergenceError, OptimalityError, SingularError
from ddnref.implicit._bordered import Diagonal, Products, Solution, Structure, as_structure, bordered_solve, solve

Bars: TypeAlias = Array | tuple[Array, ...]


class Functions(NamedTuple):
    """What a problem ``min f`` subject to ``h`` is made of, as the user states it."""

    gradient: Callable[..., Array]
    hessian: Callable[..., Array | Structure]
    constraint: Callable[..., Array]
    constraint_jacobian: Callable[..., Array]
    residual_vjp: Callable[..., Any]


class Point:
    """The given point, and how far from a solution it may be."""

    def __init__(self, name: str, y: Array, y_bar: Array, nu: Array | None, rtol: float | None, atol: float) -> None:
        xp = namespace(y_bar=y_bar, y=y, nu=nu)
        check_real(y_bar=y_bar, y=y, nu=nu)
        check_dtypes(y_bar=(y_bar, y.dtype), nu=(nu, y.dtype))
        if y.ndim < 1 or y.shape[-1] < 1:
            raise ValueError(f"y has shape {tuple(y.shape)}, expected (..., n) with n at least 1.")
        check_shapes(y_bar=(y_bar, tuple(y.shape)))
        self.name, self.y = name, y
        self.rtol = eps(xp, y.dtype) ** 0.5 if rtol is None else rtol
        self.tolerance = self.rtol * norm(y) + atol
        """(...): as far as a Newton step may go."""

    def is_near(self, step: Array) -> Array:
        """Whether a Newton step (..., n) stays within the tolerance; NaN does not."""
        return norm(step) <= self.tolerance

    def report(self, solution: Solution, optimal: Array, throw: bool) -> tuple[Array, Array]:
        """``w`` and ``η`` of the cotangent (the first right-hand side): NaN in failed items, or an error saying why."""
        xp = array_api_compat.array_namespace(self.y)
        bad = solution.singular | ~solution.converged | ~optimal
        if throw and is_true(xp.any(bad)):
            self._raise(solution)
        return nan_where(bad[..., None], solution.w[..., 0]), nan_where(bad[..., None], solution.eta[..., 0])

    def _raise(self, solution: Solution) -> NoReturn:
        xp = array_api_compat.array_namespace(self.y)
        if is_true(xp.any(solution.singular)):
            raise SingularError(
                f"The linear system of {self.name} is singular to working precision, or not finite. Likely the "
                "solution is not isolated (a flat direction), constraints repeat each other there, or a structured "
                "Hessian is singular although the bordered one is not: pass it as an array. throw=False gives NaN "
                "for these items."
            )
        if not is_true(xp.all(solution.converged)):
            raise ConvergenceError(
                f"The conjugate gradients of {self.name} reached their limit. Likely the Hessian is badly "
                "conditioned: raise maxiter or rtol of Products, or pass a structured Hessian. throw=False gives NaN "
                "for these items."
            )
        raise OptimalityError(
            f"The point given to {self.name} does not solve its problem: a Newton step from it is longer than "
            f"{self.rtol:.1e} of the point, or a constraint is violated, or a multiplier is wrong. Likely the solver "
            "stopped early, or the callables state another problem (ℒ = f − νᵀh; inequalities h ≤ 0 have ν ≤ 0). "
            "Solve further, raise rtol (or atol, for a solution at zero), or pass throw=False to get NaN for these "
            "items."
        )


def unconstrained(
    point: Point, h: Structure, y_bar: Array, r: Array, vjp: Callable[..., Any], inputs: tuple[Array, ...], throw: bool
) -> Bars:
    """One symmetric solve, for the cotangent and the Newton step."""
    xp = array_api_compat.array_namespace(y_bar)
    solution = solve(h, xp.stack([y_bar, -r], axis=-1))
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
    """The bordered solve; all constraints are equalities where `equalities` is None, else the first so many."""
    y, xp = point.y, array_api_compat.array_namespace(point.y)
    f_y = of_shape("gradient", of.gradient(y, *inputs), y, tuple(y.shape))
    h = of.constraint(y, *inputs)
    h = of_shape("constraint", h, y, (*y.shape[:-1], h.shape[-1] if h.ndim else 0))
    h_y = of_shape("constraint_jacobian", of.constraint_jacobian(y, *inputs), y, (*h.shape, y.shape[-1]))
    check_shapes(nu=(nu, tuple(h.shape)))
    equal = xp.arange(h.shape[-1], device=array_api_compat.device(h)) < (
        h.shape[-1] if equalities is None else equalities
    )
    active, nu, feasible = _activity(point, f_y, h, h_y, nu, equal)
    hessian = as_structure(of.hessian(y, nu, *inputs), y, "hessian")
    l_y = f_y - matvec(xp.matrix_transpose(h_y), nu)
    solution = bordered_solve(
        hessian, h_y, active, xp.stack([y_bar, -l_y], axis=-1), xp.stack([xp.zeros_like(h), -h], axis=-1)
    )
    correct = _multipliers_hold(point, solution.eta[..., 1], f_y, h_y, hessian)
    w, eta = point.report(solution, feasible & correct & point.is_near(solution.w[..., 1]), throw)
    return negative(of.residual_vjp(w, -eta, y, nu, *inputs))


def _activity(
    point: Point, f_y: Array, h: Array, h_y: Array, nu: Array | None, equal: Array
) -> tuple[Array, Array, Array]:
    """Which constraints are active, their multipliers (0 for the others), and which items are feasible."""
    xp = array_api_compat.array_namespace(h)
    norms = norm(h_y)
    reach = point.tolerance[..., None] * norms  # h changes by so much within the tolerance of y
    near = equal | (h >= -reach)
    if nu is None:  # least squares, ‖f_y − h_yᵀν‖: the bordered system with the identity for a Hessian
        ones = Diagonal(full(f_y.shape, 1.0, f_y))
        nu = bordered_solve(ones, h_y, near, -f_y[..., None], xp.zeros_like(h)[..., None]).eta[..., 0]
    force, floor = nu * norms, point.rtol * norm(f_y)[..., None]
    # A positive force is not active either: where it is no rounding, the Newton step will follow it. NaN stays active.
    active = equal | (near & ~(force >= -floor))
    held = (h <= reach) & (~equal | (h >= -reach))
    return active, xp.where(active, nu, xp.zeros_like(nu)), xp.all(held, axis=-1)


def _multipliers_hold(point: Point, step: Array, f_y: Array, h_y: Array, hessian: Structure) -> Array:
    """Whether the Newton step of the multipliers is small, as forces ``h_yᵀ δν`` against those of the problem."""
    xp = array_api_compat.array_namespace(h_y)
    bound = point.rtol * norm(f_y)
    if not isinstance(hessian, Products):
        bound = bound + xp.max(hessian.row_size(), axis=-1) * point.tolerance  # by so much may ∇f itself be off
    return norm(matvec(xp.matrix_transpose(h_y), step)) <= bound


def of_shape(name: str, array: Array, y: Array, shape: tuple[int, ...]) -> Array:
    """What a callable returned, checked; infinities become NaN, which spreads without a warning."""
    check_shapes(**{f"what {name} returned": (array, shape)})
    check_dtypes(**{f"what {name} returned": (array, y.dtype)})
    return nan_where(~array_api_compat.array_namespace(array).isfinite(array), array)


def norm(x: Array) -> Array:
    """``‖x‖₂`` over the last axis, without overflow."""
    xp = array_api_compat.array_namespace(x)
    if x.shape[-1] == 0:
        return full(x.shape[:-1], 0.0, x)
    size = xp.max(xp.abs(x), axis=-1, keepdims=True)
    size = xp.where((size > 0) & xp.isfinite(size), size, xp.ones_like(size))
    return size[..., 0] * xp.sqrt(xp.sum((x / size) ** 2, axis=-1))


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple as it is, anything else as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)


def negative(bars: Any) -> Bars:
    """``−x̄`` of one or several inputs."""
    return tuple(-bar for bar in bars) if isinstance(bars, tuple) else -bars
