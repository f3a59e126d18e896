"""Equations ``r(y, x) = 0`` with their derivatives, and ``∂r/∂y`` as an operator, which is applied and never stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ddnref._core.arrays import Array, as_tuple, namespace_of
from ddnref._kernels.autodiff import autodiff_of, gradient, mapped, pullback, pushforward
from ddnref.operators import LinearOperator


@dataclass(frozen=True)
class Equation:
    """``r(y, *inputs) = 0`` with derivatives from the user, or from the library of the arrays.

    The classes of this module compare by what they are made of, so that bridges recognise an operator that they know.
    """

    residual: Callable[..., Array]
    residual_vjp: Callable[..., Any] | None = None
    residual_jvp: Callable[..., Array] | None = None

    def value(self, y: Array, inputs: tuple[Array, ...]) -> Array:
        r = self.residual(y, *inputs)
        if tuple(r.shape) != tuple(y.shape):
            raise ValueError(
                f"The residual has shape {tuple(r.shape)} for a solution of shape {tuple(y.shape)}: there must be as "
                "many equations as unknowns."
            )
        return r

    def pull(self, y: Array, inputs: tuple[Array, ...]) -> Callable[[Array], tuple[Array, ...]]:
        """A function of w that returns cotangents of y and of the floating inputs, ``None`` for the others."""
        if self.residual_vjp is not None:
            vjp = self.residual_vjp

            def called(w: Array) -> tuple[Array, ...]:
                found = as_tuple(vjp(w, y, *inputs))
                if len(found) != 1 + len(inputs):
                    raise TypeError(
                        f"residual_vjp returned {len(found)} array(s), expected {1 + len(inputs)}: the gradients with "
                        "respect to the solution and to each input."
                    )
                return found

            return called
        self._require_autodiff(y, "residual_vjp")
        places, moving = floating(inputs)
        back = pullback(lambda y, *moving: self.value(y, filled(inputs, places, moving)), (y, *moving))

        def pulled(w: Array) -> tuple[Array, ...]:
            y_bar, *x_bars = back(w)
            return y_bar, *filled((None,) * len(inputs), places, x_bars)

        return pulled

    def push(self, y: Array, inputs: tuple[Array, ...], y_dot: Array | None, x_dots: tuple[Array | None, ...]) -> Array:
        """The tangent of r; ``None`` for what does not move."""
        zeros = namespace_of(y).zeros_like
        if self.residual_jvp is not None:
            given = ((y, y_dot), *zip(inputs, x_dots, strict=True))
            return self.residual_jvp(*(zeros(x) if dot is None else dot for x, dot in given), y, *inputs)
        self._require_autodiff(y, "residual_jvp")
        arrays, dots = (y, *inputs), (y_dot, *x_dots)
        places = [i for i, dot in enumerate(dots) if dot is not None]

        def at(*moving: Array) -> Array:
            y, *rest = filled(arrays, places, moving)
            return self.value(y, tuple(rest))

        return pushforward(at, tuple(arrays[i] for i in places), tuple(dots[i] for i in places))

    def _require_autodiff(self, y: Array, name: str) -> None:
        if autodiff_of((y,)) is None:
            raise TypeError(
                f"{name} is missing: pass {name}= with the residual, since only PyTorch and JAX differentiate a "
                f"function by themselves, and {type(y).__module__}.{type(y).__qualname__} is of neither."
            )


@dataclass(frozen=True)
class Gradient:
    """The gradient in y of an objective, as a residual."""

    objective: Callable[..., Array]

    def __call__(self, y: Array, *inputs: Array) -> Array:
        return gradient(self.objective, (y, *inputs), 0)


def floating(inputs: tuple[Array, ...]) -> tuple[list[int], tuple[Array, ...]]:
    """Positions of the inputs that have derivatives, and these inputs."""
    kinds = ("real floating", "complex floating")
    places = [i for i, x in enumerate(inputs) if namespace_of(x).isdtype(x.dtype, kinds)]
    return places, tuple(inputs[i] for i in places)


def filled(arrays: Any, places: list[int], moving: Any) -> tuple[Any, ...]:
    """The arrays, with others in some places."""
    own = list(arrays)
    for i, x in zip(places, moving, strict=True):
        own[i] = x
    return tuple(own)


# --- the linear map ∂r/∂y -----------------------------------------------------------------------------------------


HALF = 2**12
"""Integers are parameters in two parts, which float32 holds exactly up to 2³⁶."""


def as_params(y: Array, inputs: tuple[Array, ...]) -> tuple[tuple[Any, ...], tuple[Array, ...]]:
    """Inputs as arrays of the dtype of the solution, which a bridge sees, and the dtypes of those that are integers."""
    xp, kinds, found = namespace_of(y), [], []
    places, _ = floating(inputs)
    for i, x in enumerate(inputs):
        kinds.append(None if i in places else x.dtype)
        if i in places:
            found.append(x)
        else:
            x = xp.astype(x, xp.int64)
            found += [xp.astype(x // HALF, y.dtype), xp.astype(x % HALF, y.dtype)]
    return tuple(kinds), tuple(found)


@dataclass(frozen=True)
class Product:
    """``v -> A v``, or ``Aᵀ v``, as a function of the parameters ``(y, *inputs)``, integers in two parts."""

    equation: Equation
    kinds: tuple[Any, ...]
    """The dtype of each input that is an integer, ``None`` for the others."""
    transposed: bool

    def inputs(self, params: tuple[Array, ...]) -> tuple[Array, ...]:
        rest, found = iter(params), []
        for kind in self.kinds:
            x = next(rest)
            if kind is not None:
                xp = namespace_of(x)
                x = xp.astype(xp.astype(x, xp.int64) * HALF + xp.astype(next(rest), xp.int64), kind)
            found.append(x)
        return tuple(found)

    def __call__(self, params: tuple[Array, ...], v: Array) -> Array:
        y, *moving = params
        inputs = self.inputs(tuple(moving))
        pull = self.equation.pull(y, inputs) if self.transposed else None

        def one(v: Array) -> Array:
            return self.equation.push(y, inputs, v, (None,) * len(inputs)) if pull is None else pull(v)[0]

        return over_batch(one, v, y)

    def vjp(self, params: tuple[Array, ...], y_bar: Array, x: Array) -> tuple[Array, ...]:
        return pullback(lambda *params: self(params, x), params)(y_bar)

    def jvp(self, params: tuple[Array, ...], dots: tuple[Array, ...], x: Array) -> Array:
        return pushforward(lambda *params: self(params, x), params, dots)


product = lru_cache(maxsize=256)(Product)
"""Equal products are one object, so that their methods are equal too."""


@dataclass(frozen=True)
class Prepare:
    """The operator for many products: what does not depend on the vector is computed once."""

    forth: Product
    back: Product
    axes: int
    self_adjoint: bool

    def __call__(self, params: tuple[Array, ...]) -> LinearOperator:
        y, *moving = params
        inputs = self.forth.inputs(tuple(moving))

        def ready(one: Product) -> Callable[..., Array]:
            if not one.transposed:
                return one
            pull = one.equation.pull(y, inputs)
            return lambda params, v: over_batch(lambda v: pull(v)[0], v, y)  # noqa: ARG005

        return jacobian(params, self.forth, self.back, self.axes, self.self_adjoint)._replace(
            apply=ready(self.forth), adjoint=ready(self.back), prepare=None
        )


def over_batch(one: Callable[[Array], Array], v: Array, y: Array) -> Array:
    """Apply a map of arrays of the shape of y to vectors with more leading axes, or with fewer, which broadcast."""
    xp, shape = namespace_of(v), tuple(y.shape)
    if v.ndim <= y.ndim:
        return one(v if tuple(v.shape) == shape else xp.broadcast_to(v, shape))
    extra = tuple(v.shape[: v.ndim - y.ndim])
    whole = xp.broadcast_to(v, (*extra, *shape))
    if 0 in whole.shape:
        return whole  # nothing to compute
    whole = xp.reshape(whole, (math.prod(extra), *shape))
    return xp.reshape(mapped(one, whole), (*extra, *shape))


def jacobian(params: tuple[Array, ...], forth: Product, back: Product, axes: int, self_adjoint: bool) -> LinearOperator:
    """The operator of two products; items of the batch are the last `axes` axes."""
    y = params[0]
    own = tuple(y.shape[y.ndim - axes :])
    return LinearOperator(
        params, forth, back, forth.vjp, own, own, self_adjoint, prepare=Prepare(forth, back, axes, self_adjoint),
        params_jvp=forth.jvp, adjoint_jvp=back.jvp,
    )  # fmt: skip
