"""Derivatives of derivatives in the PyTorch bridge: refused where they would be wrong, explicit where they are known.

Every function comes in two classes. That with a `jvp` is used in forward mode; ``torch.compile``, which never sees
forward mode here, refuses to trace it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch

from ddnref._kernels.torch import is_forward, tangents
from ddnref._rules.binding import spread
from ddnref.errors import GaugeError

Tensor: TypeAlias = Any


def first_order(undefined: Callable[..., Tensor], refusal: str) -> Callable[..., Tensor]:
    """An identity on derivatives whose own derivative is refused for items that are `undefined`.

    ``f(x_bar, *arrays)`` gets the arrays that the derivative was computed from. Where these do not move, it is a linear
    map and may be differentiated.
    """

    def refused(x: Tensor, arrays: tuple[Tensor, ...]) -> Tensor:
        wrong = undefined(*arrays)
        try:
            found = bool(wrong.any())
        except RuntimeError:  # under vmap no value can be read, and one item cannot raise: it is NaN
            return torch.where(spread(wrong, x), torch.nan, x)
        if found:
            raise GaugeError(refusal)
        return x

    class FirstOrder(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor, *arrays: Tensor) -> Tensor:  # noqa: ARG004
            return x.view_as(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
            ctx.save_for_backward(*inputs[1:])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            arrays = ctx.saved_tensors
            return refused(grad, arrays), *(None for _ in arrays)

    class FirstOrderForward(FirstOrder):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            FirstOrder.setup_context(ctx, inputs, output)
            ctx.set_materialize_grads(False)
            ctx.save_for_forward(*inputs[1:])

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None,) * len(ctx.needs_input_grad) if grad is None else FirstOrder.backward(ctx, grad)

        @staticmethod
        def jvp(ctx: Any, x_dot: Tensor | None, *dots: Tensor | None) -> Tensor | None:
            if x_dot is None:
                return None
            x_dot = x_dot.view_as(x_dot)
            if all(dot is None for dot in dots):
                return x_dot
            return tangents(lambda given, saved: refused(given[0], saved), ctx, x_dot)

    return lambda x, *arrays: (FirstOrderForward if is_forward() else FirstOrder).apply(x, *arrays)


def linear_map(derivative: Callable[..., Tensor], second: Callable[..., Tensor], refusal: str) -> Callable[..., Tensor]:
    """The map ``t -> DF(X)[t]`` of a function of a matrix, ``f(t, x, *arrays)``, whose derivative in X is explicit.

    ``derivative(t, *arrays)`` and ``second(t, x_dot, *arrays)`` take the result and the eigenpairs, which are constants
    here: neither derivative depends on the choice of eigenvectors.
    """

    class Linear(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(t: Tensor, x: Tensor, *arrays: Tensor) -> Tensor:  # noqa: ARG004
            return derivative(t, *arrays)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, z: Tensor) -> tuple[Tensor | None, ...]:
            t, x, *arrays = ctx.saved_tensors
            t_bar = chosen(z, x, *arrays) if ctx.needs_input_grad[0] else None
            x_bar = curved(t, z, x, *arrays) if ctx.needs_input_grad[1] else None
            return t_bar, x_bar, *(None for _ in arrays)

    class LinearForward(Linear):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            Linear.setup_context(ctx, inputs, output)
            ctx.set_materialize_grads(False)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, z: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None,) * len(ctx.needs_input_grad) if z is None else Linear.backward(ctx, z)

        @staticmethod
        def jvp(ctx: Any, t_dot: Tensor | None, x_dot: Tensor | None, *_: Tensor | None) -> Tensor | None:
            return tangents(moved, ctx, t_dot, x_dot)

    def moved(dots: tuple[Tensor | None, ...], saved: tuple[Tensor, ...]) -> Tensor | None:
        (t_dot, x_dot), (t, x, *arrays) = dots, saved
        return added(
            None if t_dot is None else chosen(t_dot, x, *arrays),
            None if x_dot is None else curved(t, x_dot, x, *arrays),
        )

    class Second(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a: Tensor, b: Tensor, x: Tensor, *arrays: Tensor) -> Tensor:  # noqa: ARG004
            return second(a, b, *arrays)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, z: Tensor) -> tuple[Tensor | None, ...]:
            a, b, *point = ctx.saved_tensors
            if ctx.needs_input_grad[2]:
                raise NotImplementedError(refusal)
            a_bar = curved(z, b, *point) if ctx.needs_input_grad[0] else None
            b_bar = curved(a, z, *point) if ctx.needs_input_grad[1] else None
            return a_bar, b_bar, *(None for _ in point)

    class SecondForward(Second):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            Second.setup_context(ctx, inputs, output)
            ctx.set_materialize_grads(False)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, z: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None,) * len(ctx.needs_input_grad) if z is None else Second.backward(ctx, z)

        @staticmethod
        def jvp(ctx: Any, a_dot: Tensor | None, b_dot: Tensor | None, x_dot: Tensor | None, *_: Tensor | None) -> Any:
            if x_dot is not None:
                raise NotImplementedError(refusal)
            return tangents(turned, ctx, a_dot, b_dot)

    def turned(dots: tuple[Tensor | None, ...], saved: tuple[Tensor, ...]) -> Tensor | None:
        (a_dot, b_dot), (a, b, *point) = dots, saved
        return added(
            None if a_dot is None else curved(a_dot, b, *point), None if b_dot is None else curved(a, b_dot, *point)
        )

    def chosen(t: Tensor, x: Tensor, *arrays: Tensor) -> Tensor:
        return (LinearForward if is_forward() else Linear).apply(t, x, *arrays)

    def curved(a: Tensor, b: Tensor, x: Tensor, *arrays: Tensor) -> Tensor:
        return (SecondForward if is_forward() else Second).apply(a, b, x, *arrays)

    return chosen


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two tangents, ``None`` for one that is zero."""
    return b if a is None else a if b is None else a + b


# --- which derivatives are around -------------------------------------------------------------------------------------


def moves_saved(arrays: tuple[Tensor, ...]) -> bool:
    """Whether tangents of what a forward saves are used: one level records, or pushes, inside that of forward mode."""
    kinds = _levels()
    forward = torch._C._functorch.TransformType.Jvp
    # A level of torch.autograd.forward_ad is none of torch.func.
    return len(kinds) + (forward not in kinds) > 1 or any(x.requires_grad for x in arrays)


def is_differentiated(arrays: tuple[Tensor, ...]) -> bool:
    """Whether what is computed from these arrays now, inside a `jvp`, is differentiated by an outer level."""
    return bool(_levels()) or (torch.is_grad_enabled() and any(x.requires_grad for x in arrays))


def is_nested() -> bool:
    """Whether what is computed now, inside a `jvp`, is pushed by an outer level of forward mode."""
    return torch._C._functorch.TransformType.Jvp in _levels()


def _levels() -> list[Any]:
    """The levels of ``torch.func`` around that differentiate, the outermost first."""
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return [kind for kind in (level.key() for level in stack) if kind in (kinds.Grad, kinds.Jvp)]


@cache
def nests() -> bool:
    """Whether forward mode through a function of our own nests, which hangs on a private name of PyTorch."""

    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx: Any, x_dot: Tensor) -> Tensor:
            return tangents(lambda dots, saved: 2 * saved[0] * dots[0], ctx, x_dot)

    one = torch.ones(())

    def slope(x: Tensor) -> Tensor:
        return torch.func.jvp(Square.apply, (x,), (one,))[1]

    try:
        return float(torch.func.jvp(slope, (one,), (one,))[1]) == 2
    except (AttributeError, RuntimeError):
        return False
