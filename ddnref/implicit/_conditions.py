"""The two kinds of conditions that a solution satisfies, each with the derivatives that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddnref._core.arrays import Array, as_tuple, full, is_complex, is_true, namespace_of, nan_where, with_axes
from ddnref._kernels.autodiff import autodiff_of, gradient, mapped, pullback, pushforward, unrecorded
from ddnref._kernels.dense import identity, move_axis
from ddnref._kernels.vectors import safe_norm
from ddnref.errors import OptimalityError
from ddnref.implicit._derivatives import ineq_argmin_jvp, ineq_argmin_vjp
from ddnref.implicit._equation import Equation, as_params, filled, floating, jacobian, product
from ddnref.operators import LinearOperator

STEP_RTOL = 0.01
"""Tolerance of the linear solve for the Newton step, which need not be exact: two more digits of the solution."""

DIRECT_UP_TO = 32
"""Unknowns of one item up to which its matrix is formed and factorised, in place of a Krylov method."""

Solve = Callable[..., tuple[Array, Any]]


@dataclass(frozen=True)
class Root:
    """A solution of as many equations as unknowns, whose linear systems a Krylov method solves."""

    equation: Equation
    axes: int | None
    self_adjoint: bool
    rtol: float
    atol: float
    options: tuple[tuple[str, Any], ...]
    """Options of `linear_solve`; without a solver one is chosen by the number of unknowns."""

    def vjp(
        self, y_bar: Array, y: Array, inputs: tuple[Array, ...], solve: Solve, name: str, throw: bool
    ) -> tuple[Any, Any]:
        y = self.corrected(y, inputs, solve, name, throw)
        w, info = self.solved(solve, self.operator(y, inputs, True), y_bar)
        _, *x_bars = self.equation.pull(y, inputs)(-w)
        return tuple(x_bars), info

    def jvp(
        self, dots: tuple[Array | None, ...], y: Array, inputs: tuple[Array, ...], solve: Solve, name: str, throw: bool
    ) -> tuple[Array, Any]:
        y = self.corrected(y, inputs, solve, name, throw)
        places, _ = floating(inputs)
        r_dot = self.equation.push(y, inputs, None, tuple(dots[i] if i in places else None for i in range(len(dots))))
        return self.solved(solve, self.operator(y, inputs, False), -r_dot)

    def solved(self, solve: Solve, operator: LinearOperator, b: Array) -> tuple[Array, Any]:
        """A solution of the linear system, NaN where it has not converged."""
        x, info = solve(operator, b, **self.options_for(operator))
        return nan_where(~with_axes(info.converged, len(operator.domain_shape)), x), info

    def options_for(self, operator: LinearOperator, **changed: Any) -> dict[str, Any]:
        """The options, with the solver that suits the number of unknowns."""
        iterative = "minres" if self.self_adjoint else "gmres"
        chosen = "direct" if operator.size <= DIRECT_UP_TO else iterative
        options = {"solver": chosen, **dict(self.options), **changed}
        if options["solver"] == "direct":
            return {key: value for key, value in options.items() if key in ("solver", "throw")}
        return options

    def operator(self, y: Array, inputs: tuple[Array, ...], transposed: bool) -> LinearOperator:
        kinds, params = as_params(y, inputs)
        both = product(self.equation, kinds, False), product(self.equation, kinds, True)
        # The matrix of a gradient is symmetric, and reverse mode is the cheaper product.
        forth, back = (both[1], both[1]) if self.self_adjoint else both[::-1] if transposed else both
        axes = y.ndim if self.axes is None else self.axes
        return jacobian((y, *params), forth, back, axes, self.self_adjoint)

    def corrected(self, y: Array, inputs: tuple[Array, ...], solve: Solve, name: str, throw: bool) -> Array:
        """The solution after a Newton step, NaN for items where the step is too long for it to be one."""
        if is_complex(y):
            raise TypeError(f"The solution of {name} is complex: write its real and imaginary parts as real unknowns.")
        axes, xp = y.ndim if self.axes is None else self.axes, namespace_of(y)
        if axes > y.ndim:
            raise ValueError(f"axes is {axes}, but the solution of {name} has shape {tuple(y.shape)}.")
        with unrecorded((y, *inputs)) as (y_0, *inputs_0):
            r = self.equation.value(y_0, tuple(inputs_0))
            operator = self.operator(y_0, tuple(inputs_0), False)
            step, _ = solve(operator, -r, **self.options_for(operator, rtol=STEP_RTOL))
        flat = (*y.shape[: y.ndim - axes], math.prod(y.shape[y.ndim - axes :]))
        lengths = [safe_norm(xp.reshape(x, flat)) for x in (step, y_0)]
        good = lengths[0] <= self.rtol * lengths[1] + self.atol
        if throw and not is_true(xp.all(good)):
            raise OptimalityError(
                f"The solution of {name} does not satisfy its condition: a Newton step moves it by "
                f"{float(xp.max(lengths[0])):.2e}, and at most rtol = {self.rtol:g} of its norm is accepted. The most "
                "likely causes: the solver stopped early, or the residual states another problem. Solve further, raise "
                "rtol (or atol, for a solution at zero), or pass throw=False to get NaN for these items."
            )
        return nan_where(~with_axes(good, axes), y + step)


@dataclass(frozen=True)
class Minimum:
    """A minimum under constraints, by `ineq_argmin_vjp` with matrices that the library of the arrays differentiates."""

    objective: Callable[..., Array]
    equality: Callable[..., Array] | None
    inequality: Callable[..., Array] | None
    rtol: float
    atol: float

    def vjp(
        self,
        y_bar: Array,
        y: Array,
        inputs: tuple[Array, ...],
        solve: Solve,  # noqa: ARG002
        name: str,  # noqa: ARG002
        throw: bool,
    ) -> tuple[Any, Any]:
        places, moving = floating(inputs)
        functions = self.functions(y, inputs, places)
        x_bars, info = ineq_argmin_vjp(
            y_bar, y, None, *moving, **functions, residual_vjp=self.residual_vjp(inputs, places), rtol=self.rtol,
            atol=self.atol, throw=throw,
        )  # fmt: skip
        return filled((None,) * len(inputs), places, as_tuple(x_bars)), info

    def jvp(
        self,
        dots: tuple[Array | None, ...],
        y: Array,
        inputs: tuple[Array, ...],
        solve: Solve,  # noqa: ARG002
        name: str,  # noqa: ARG002
        throw: bool,
    ) -> tuple[Array, Any]:
        places, moving = floating(inputs)
        functions = self.functions(y, inputs, places)
        return ineq_argmin_jvp(
            *(dots[i] for i in places), y, None, *moving, **functions, residual_jvp=self.residual_jvp(inputs, places),
            rtol=self.rtol, atol=self.atol, throw=throw,
        )  # fmt: skip

    @property
    def parts(self) -> list[Callable[..., Array]]:
        """The functions that state the problem."""
        return [f for f in (self.objective, self.equality, self.inequality) if f is not None]

    def lagrangian(self, y: Array, nu: Array, *inputs: Array) -> Array:
        """``f − νᵀ h``."""
        return self.objective(y, *inputs) - namespace_of(y).sum(nu * self.constraint(y, *inputs), axis=-1)

    def constraint(self, y: Array, *inputs: Array) -> Array:
        """The equalities, and the inequalities behind them."""
        given = [h(y, *inputs) for h in (self.equality, self.inequality) if h is not None]
        return given[0] if len(given) == 1 else namespace_of(y).concat(given, axis=-1)

    def functions(self, y: Array, inputs: tuple[Array, ...], places: list[int]) -> dict[str, Any]:
        """The functions of `ineq_argmin_vjp`, whose inputs are those in some places."""
        if autodiff_of((y,)) is None:
            raise TypeError(
                f"custom_argmin with constraints got a {type(y).__module__}.{type(y).__qualname__}, and only PyTorch "
                "and JAX differentiate functions by themselves: call ddnref.implicit.ineq_argmin_vjp with your own "
                "derivatives."
            )

        def at(moving: tuple[Array, ...]) -> tuple[Array, ...]:
            return filled(inputs, places, moving)

        def columns(function: Callable[[Array], Array], y: Array) -> Array:
            """The Jacobian, one column for each entry of an item."""
            spread = namespace_of(y).broadcast_to
            found = mapped(
                lambda e: pushforward(function, (y,), (spread(e, tuple(y.shape)),)), identity(y.shape[-1], y)
            )
            return move_axis(found, 0, -1)

        stated = {"equality": self.equality, "inequality": self.inequality}
        shapes = {what: tuple(h(y, *inputs).shape) for what, h in stated.items() if h is not None}
        for what, shape in shapes.items():
            if len(shape) != y.ndim:
                raise ValueError(
                    f"{what} has shape {shape} for a solution of shape {tuple(y.shape)}, expected "
                    f"{(*y.shape[:-1], 'p')}: one axis with the constraints, also where there is one."
                )
        return {
            "gradient": lambda y, *x: gradient(self.objective, (y, *at(x)), 0),
            "hessian": lambda y, nu, *x: columns(lambda y: gradient(self.lagrangian, (y, nu, *at(x)), 0), y),
            "constraint": lambda y, *x: self.constraint(y, *at(x)),
            "constraint_jacobian": lambda y, *x: columns(lambda y: self.constraint(y, *at(x)), y),
            "equalities": shapes["equality"][-1] if "equality" in shapes else 0,
        }

    def residual_vjp(self, inputs: tuple[Array, ...], places: list[int]) -> Callable[..., Any]:
        def vjp(w: Array, eta: Array, y: Array, nu: Array, *moving: Array) -> tuple[Array, ...]:
            def equations(*moving: Array) -> Array:
                own = filled(inputs, places, moving)
                xp = namespace_of(y)
                f_y = gradient(self.lagrangian, (y, nu, *own), 0)
                return xp.sum(w * f_y) + xp.sum(eta * self.constraint(y, *own))

            return pullback(equations, tuple(moving))(full((), 1.0, y))

        return vjp

    def residual_jvp(self, inputs: tuple[Array, ...], places: list[int]) -> Callable[..., tuple[Array, Array]]:
        def jvp(*arrays: Array) -> tuple[Array, Array]:
            n = len(places)
            dots, (y, nu), moving = arrays[:n], arrays[n : n + 2], arrays[n + 2 :]

            def force(*moving: Array) -> Array:
                return gradient(self.lagrangian, (y, nu, *filled(inputs, places, moving)), 0)

            def constraint(*moving: Array) -> Array:
                return self.constraint(y, *filled(inputs, places, moving))

            return pushforward(force, moving, dots), pushforward(constraint, moving, dots)

        return jvp
