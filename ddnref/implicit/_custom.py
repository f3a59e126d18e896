"""A user's solver, made differentiable by the condition that its solution satisfies.

The solver may be anything. With ``r(y, x) = 0`` at its solution y, and A = ∂r/∂y, which is applied and never stored,

    Aᵀ w = ȳ,      x̄ = −(∂r/∂x)ᵀ w          (reverse mode)
    A ẏ = −(∂r/∂x) ẋ                          (forward mode)

A point that solves the equation only nearly is corrected by the Newton step ``y − A⁻¹ r`` that checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from importlib import import_module
from inspect import signature
from operator import index
from typing import Any

from ddnref._core.arrays import Array, library, namespace_of
from ddnref._core.checks import check_precision, conform, given
from ddnref._kernels.autodiff import autodiff_of, holds_gradients
from ddnref._kernels.public import guarded, public
from ddnref.implicit._conditions import Minimum, Root
from ddnref.implicit._equation import Equation, Gradient, floating
from ddnref.implicit._point import STEP
from ddnref.implicit._tangents import split_arguments
from ddnref.linalg import linear_solve


class ImplicitFunction:
    """A solver with the derivatives of its solution, which `custom_root` and `custom_argmin` make.

    Call it like the solver, ``y = f(*inputs, **options)``. With tensors of PyTorch and arrays of JAX it is
    differentiable; other arrays get the solver's result. The derivatives can be called by hand, with any arrays.
    """

    def __init__(self, solver: Callable[..., Array], condition: Root | Minimum) -> None:
        if not callable(solver):
            raise TypeError(f"The solver is {solver!r}, expected a function: write custom_root(residual)(solver).")
        self.__name__ = type(solver).__name__  # of an object that is called
        update_wrapper(self, solver)
        self.solver, self.condition = solver, condition
        self._bridged: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        inputs, options = self._split(inputs, options)
        framework = autodiff_of(inputs)
        if framework is None:
            return self.solver(*inputs, **options)
        # Options that are arrays are operands without derivative, so that transformations see them.
        arrays = {name: x for name, x in options.items() if autodiff_of((x,)) == framework}
        others = {name: x for name, x in options.items() if name not in arrays}
        key = (framework, tuple(arrays), tuple(others.items()))
        try:
            function = self._bridged.get(key)
        except TypeError:  # an option that has no hash
            key, function = None, None  # type: ignore[assignment]
        if function is None:
            # The bridges are built on this package, so they are looked up when they are needed.
            function = import_module(f"ddnref.interop.{framework}").implicit(self, others, tuple(arrays))
            if key is not None and len(self._bridged) < 64:
                self._bridged[key] = function
        y = function(*inputs, *arrays.values())
        self._refuse_closures(y, inputs)
        return y

    def _split(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inputs and options: a parameter of the solver without a default is an input, also where it is named."""
        try:
            parameters = list(signature(self.solver).parameters.values())
        except (TypeError, ValueError):  # some built-in functions have none
            return inputs, options
        named = [
            p.name for p in parameters[len(inputs) :] if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
        ]
        there = [name for name in named if name in options]
        if there != named[: len(there)]:
            return inputs, options  # the solver itself says what is missing
        rest = {name: x for name, x in options.items() if name not in there}
        return (*inputs, *(options[name] for name in there)), rest

    def solved(self, *inputs: Array, **options: Any) -> Array:
        """Call the solver and check that it returns an array."""
        y = self.solver(*inputs, **options)
        if not hasattr(y, "dtype"):
            raise TypeError(f"{self.__name__} returned a {type(y).__qualname__}, expected one array: the solution.")
        return y

    def _refuse_closures(self, y: Array, inputs: tuple[Array, ...]) -> None:
        """Raise ``TypeError`` where the condition holds a tensor that would silently get no gradient."""
        condition = self.condition
        functions = [condition.equation.residual] if isinstance(condition, Root) else condition.parts
        if any(holds_gradients(function, (y, *inputs)) for function in functions):
            raise TypeError(
                f"The condition of {self.__name__} uses a tensor that requires grad and is not among its inputs, so it "
                "would get no gradient: make it an argument of the solver and of the condition."
            )

    @guarded
    def vjp(self, y_bar: Array, y: Array, /, *inputs: Array, throw: bool = True) -> tuple[Any, Any]:
        """The gradient of each input for a cotangent of the solution y, and the status of its computation.

        With ``throw=True`` it raises what `root_vjp` raises; otherwise items without a gradient are NaN.
        """
        given(y=y, y_bar=y_bar)
        conform("(),()", real_only=True, y=y, y_bar=y_bar)
        _check_inputs(y, inputs)
        solve = partial(linear_solve, throw=throw)
        x_bars, info = self.condition.vjp(y_bar, y, inputs, solve, self.__name__, throw)
        return (x_bars[0] if len(x_bars) == 1 else x_bars), info

    @guarded
    def jvp(self, *arrays: Array | None, throw: bool = True) -> tuple[Array, Any]:
        """The tangent of the solution from ``(*x_dots, y, *inputs)``, and the status of its computation.

        ``None`` is the tangent of an input that does not move.
        """
        dots, (y,), inputs = split_arguments(f"{self.__name__}.jvp", arrays, ("y",))
        given(y=y)
        conform("()", real_only=True, y=y)
        _check_inputs(y, inputs)
        solve = partial(linear_solve, throw=throw)
        return self.condition.jvp(dots, y, inputs, solve, self.__name__, throw)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImplicitFunction, (self.solver, self.condition)

    def __repr__(self) -> str:
        return f"<{self.__name__}, differentiable by its {type(self.condition).__name__.lower()}>"


def _check_inputs(y: Array, inputs: tuple[Array, ...]) -> None:
    """Raise ``TypeError`` for inputs of another library, device or precision than the solution."""
    named = {f"x[{i}]": x for i, x in enumerate(inputs)}
    xp = namespace_of(y)
    library(y=y, **named)
    places, _ = floating(inputs)
    check_precision(xp, y=y, **{f"x[{i}]": inputs[i] for i in places})


@public
def custom_root(
    residual: Callable[..., Array],
    /,
    *,
    residual_vjp: Callable[..., Any] | None = None,
    residual_jvp: Callable[..., Array] | None = None,
    axes: int | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    **options: Any,
) -> Callable[[Callable[..., Array]], ImplicitFunction]:
    r"""Make a solver of ``r(y, x) = 0`` differentiable, whatever it does: ``custom_root(residual)(solver)``.

    Parameters
    ----------
    residual : callable
        ``residual(y, *inputs) = r``, of the shape of y: real floating.
    residual_vjp, residual_jvp : callable, optional
        ``residual_vjp(w, y, *inputs)`` returns the gradient of ``wᵀ r`` with respect to y and to each input, and
        ``residual_jvp(y_dot, *x_dots, y, *inputs)`` the tangent of r. PyTorch and JAX differentiate the residual
        themselves; NumPy and CuPy need both.
    axes : int, optional
        How many of the last axes of y make one item, where the batch axes in front of them are independent problems.
        By default all of y is one problem, which is always right. Items solve their own linear systems, which takes
        fewer steps, and a bad item does not spoil the others. That they are independent is not checked.
    rtol, atol : float
        A solution is one if a Newton step moves it by at most ``rtol * ‖y‖ + atol``; default 0.01 and 0. The
        derivative is that of the point after the step.
    **options
        Of `ddnref.linear_solve`, for the linear systems: ``solver=``, ``maxiter=``, ``preconditioner=`` and, as
        ``solve_rtol=``, its ``rtol``. By default the matrix of an item with up to 32 unknowns is formed and factorised
        ("direct"), and a larger one is only applied ("gmres").

    Returns
    -------
    decorator : callable
        It takes ``solver(*inputs, **options) = y`` and returns an `ImplicitFunction`. Each input that is a floating
        array gets a gradient; options, which are the parameters of the solver with a default, get none: a start or a
        number of steps.

    Raises
    ------
    OptimalityError
        By ``.vjp`` and ``.jvp``: the solution does not satisfy the condition. In PyTorch and JAX the gradient is NaN
        and a warning says so.
    ConvergenceError
        Likewise: a linear system was not solved, for example because ∂r/∂y is singular.
    TypeError
        NumPy arrays without `residual_vjp`; a tensor in the closure of the residual that requires grad; a complex
        solution.

    Notes
    -----
    .. math:: \left(\frac{\partial r}{\partial y}\right)^T w = \bar y, \qquad
              \bar x = -\left(\frac{\partial r}{\partial x}\right)^T w

    Cost: two linear solves, one of them to two digits. A step of "gmres" is one derivative of the residual in one
    direction; "direct" takes as many as there are unknowns. No iterate of the solver is stored. Second derivatives are
    the framework's own, through bridged linear solves.

    Examples
    --------
    >>> import numpy as np
    >>> root = ddnref.implicit.custom_root(
    ...     lambda y, x: y * y - x, residual_vjp=lambda w, y, x: (2 * y * w, -w),
    ...     residual_jvp=lambda y_dot, x_dot, y, x: 2 * y * y_dot - x_dot)(np.sqrt)  # any solver
    >>> x_bar, _ = root.vjp(np.ones(2), root(np.asarray([4.0, 9.0])), np.asarray([4.0, 9.0]))
    >>> x_bar.round(6)
    array([0.25    , 0.166667])
    """
    if not callable(residual):
        raise TypeError(f"The residual is {residual!r}, expected a function.")
    equation = Equation(residual, residual_vjp, residual_jvp)
    return partial(ImplicitFunction, condition=_root(equation, axes, False, rtol, atol, options))


@public
def custom_argmin(
    objective: Callable[..., Array] | None = None,
    /,
    *,
    gradient: Callable[..., Array] | None = None,
    gradient_vjp: Callable[..., Any] | None = None,
    gradient_jvp: Callable[..., Array] | None = None,
    equality: Callable[..., Array] | None = None,
    inequality: Callable[..., Array] | None = None,
    axes: int | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    **options: Any,
) -> Callable[[Callable[..., Array]], ImplicitFunction]:
    r"""Make a solver of ``min f(y, x)``, also under constraints, differentiable: ``custom_argmin(objective)(solver)``.

    Other arguments, the result and the errors are those of `custom_root`.

    Parameters
    ----------
    objective : callable
        ``objective(y, *inputs) = f``: a number, or one for each item of the batch, (...).
    gradient : callable, optional
        ``gradient(y, *inputs) = ∇_y f`` in place of the objective, where there are no constraints. With NumPy and CuPy
        arrays it comes with `gradient_vjp` and `gradient_jvp`, as the residual of `custom_root` does.
    equality, inequality : callable, optional
        ``equality(y, *inputs) = 0``, (..., p), and ``inequality(y, *inputs) ≤ 0``, (..., q), for a solution (..., n).
    **options
        As in `custom_root`, without constraints, with "minres" in place of "gmres": the Hessian is symmetric.

    Raises
    ------
    OptimalityError, SingularError
        With constraints, as from `ddnref.implicit.ineq_argmin_vjp`, which finds multipliers and active constraints.
    NotImplementedError
        A second derivative with constraints, in PyTorch and JAX.

    Notes
    -----
    Without constraints this is a root of the gradient. With constraints the Hessian of the Lagrangian and the Jacobian
    of the constraints are formed, n derivatives of each, and factorised: for up to a few hundred unknowns.

    Examples
    --------
    >>> import numpy as np
    >>> shrink = ddnref.implicit.custom_argmin(  # minimise ½ (y − x)² + ½ y²
    ...     gradient=lambda y, x: 2 * y - x, gradient_vjp=lambda w, y, x: (2 * w, -w),
    ...     gradient_jvp=lambda y_dot, x_dot, y, x: 2 * y_dot - x_dot)(lambda x: x / 2)  # any solver
    >>> x_bar, _ = shrink.vjp(np.ones(2), np.asarray([1.0, 2.0]), np.asarray([2.0, 4.0]))
    >>> x_bar
    array([0.5, 0.5])

    In PyTorch and JAX, where nothing but the objective is needed, `shrink` is differentiable as it is.
    """
    if (objective is None) == (gradient is None):
        raise TypeError("Give custom_argmin either an objective or gradient=.")
    if equality is None and inequality is None:
        residual = Gradient(objective) if gradient is None else gradient  # type: ignore[arg-type]
        equation = Equation(residual, gradient_vjp, gradient_jvp)
        return partial(ImplicitFunction, condition=_root(equation, axes, True, rtol, atol, options))
    if objective is None or gradient_vjp or gradient_jvp or options or axes not in (None, 1):
        raise TypeError(
            "With constraints custom_argmin takes an objective, whose derivatives PyTorch or JAX take, and neither "
            "axes= nor options of linear solves: an item is the last axis, and its system is factorised."
        )
    condition = Minimum(objective, equality, inequality, STEP if rtol is None else rtol, atol)
    return partial(ImplicitFunction, condition=condition)


def _root(
    equation: Equation, axes: int | None, self_adjoint: bool, rtol: float | None, atol: float, options: dict[str, Any]
) -> Root:
    options = {"rtol" if key == "solve_rtol" else key: value for key, value in options.items()}
    known = {p.name for p in signature(linear_solve).parameters.values() if p.kind is p.KEYWORD_ONLY} - {"throw"}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"linear_solve has no option {', '.join(unknown)}; it takes {', '.join(sorted(known))}.")
    if axes is not None and index(axes) < 0:
        raise ValueError(f"axes is {axes}, expected the number of the last axes that make one item, at least 0.")
    return Root(equation, axes, self_adjoint, STEP if rtol is None else rtol, atol, tuple(options.items()))
