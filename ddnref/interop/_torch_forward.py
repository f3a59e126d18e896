"""Forward mode of the PyTorch bridge: an operation with a `jvp` that is right at every level of nesting.

Operations take this form only where forward mode is active: ``torch.compile`` refuses functions with a `jvp`, and
reverse mode is cheaper without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ddnref._kernels.torch import tangents
from ddnref._rules.binding import NAN_TANGENT, Bound, Layout, keywords, output_axes
from ddnref._rules.contract import Rule
from ddnref.errors import GaugeError
from ddnref.interop._torch_opaque import opaque
from ddnref.interop._torch_second import is_differentiated, is_nested, nests
from ddnref.interop._torch_warnings import any_failed, with_warning

Tensor: TypeAlias = Any
Push: TypeAlias = Callable[[tuple[Tensor | None, ...], tuple[Tensor, ...]], tuple[Tensor | None, ...]]


def pushing(
    rule: Rule,
    bound: Bound,
    layout: Layout,
    flat: Bound,
    refused: Callable[..., Tensor] | None,
    linear: Callable[..., Tensor] | None,
) -> Push:
    """The tangents of the outputs: ``push(dots, arrays)``, where what cannot be pushed is refused by name.

    `refused` and `linear` are the functions of ``_torch_second`` for derivatives of this one.
    """
    # A loop is traced where its own systems are solved by a bridged operation, and otherwise by nobody.
    iterates = rule.vjp_info is not None and not rule.direct
    plain: Any = flat.push if not iterates or rule.recursive else opaque(rule, bound, layout, "push")
    gauged = "gauge_rtol" in keywords(rule.jvp)
    axes = output_axes(rule, layout)

    def push(dots: tuple[Tensor | None, ...], arrays: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        outer = is_differentiated(arrays)
        if is_nested() and not nests():
            raise NotImplementedError(
                f"This version of PyTorch loses the outer derivative of a tangent of {rule.name}: nest torch.func.grad "
                "or torch.func.jacrev instead of forward mode, or install another version."
            )
        if outer and linear is not None:
            *results, x = arrays
            moved: tuple[Tensor | None, ...] = (linear(dots[0], x, *results),)
        else:
            own = arrays if linear is None else arrays[:-1]
            moved = plain(dots, own)
            if gauged and _found(moved, axes):
                _raise_if_split(flat, dots, own)
        if outer and refused is not None and linear is None:
            moved = tuple(refused(dot, *arrays) for dot in moved)
        return with_warning(moved, axes, NAN_TANGENT, rule.name) if moved else (None,) * rule.outputs

    return push


def refuse_graph(rule: Rule) -> None:
    """Raise ``NotImplementedError`` where ``torch.func.linearize`` records what no graph can hold."""
    if get_proxy_mode() is not None:
        why = (
            f"another library computes {rule.name}" if rule.info is None
            else f"{rule.name} iterates until a flag that it reads is clear"
        )  # fmt: skip
        raise NotImplementedError(
            f"torch.func.linearize records {rule.name} as a graph, and {why}, which no graph can hold: use "
            "torch.func.jvp, which takes one direction at a time."
        )


def _found(moved: tuple[Tensor | None, ...], axes: tuple[int | None, ...]) -> bool:
    """Whether a tangent is NaN; false where no value can be read."""
    try:
        return any_failed(moved, axes)
    except RuntimeError:
        return False


def _raise_if_split(flat: Bound, dots: tuple[Tensor | None, ...], arrays: tuple[Tensor, ...]) -> None:
    """Raise `GaugeError` if a tangent is NaN because its direction splits equal eigenvalues."""
    try:
        flat.push(dots, arrays, throw=True)  # type: ignore[misc]
    except GaugeError:
        raise
    except ArithmeticError:  # there is no derivative for another reason, of which the bridge only warns
        pass


def in_forward_mode(operation: Any, push: Push, needs: tuple[int, ...], fields: int, push_saved: Push | None) -> Any:
    """An operation that has tangents; those of what it saves too, where `push_saved` is given.

    `needs` are the inputs that its derivative takes, and `fields` says how many arrays are its status.
    """

    class InForwardMode(operation):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            operation.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*output[: len(output) - fields], *(inputs[i] for i in needs))

        @staticmethod
        def jvp(ctx: Any, *dots: Tensor | None) -> tuple[Tensor | None, ...]:
            moved: tuple[Tensor | None, ...] = tangents(pushed, ctx, *dots)
            return moved

    def pushed(dots: tuple[Tensor | None, ...], arrays: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        moved = push(dots, arrays)
        kept = arrays[len(moved) : len(arrays) - len(needs)]
        used = push_saved is not None and len(kept) > 0
        through_saved = push_saved(dots, arrays) if used else (None,) * len(kept)  # type: ignore[misc]
        # PyTorch wants a tangent for every array of floating point.
        rest = (_zeros(x) if dot is None else dot for x, dot in zip(kept, through_saved, strict=True))
        return *moved, *rest, *(None,) * fields

    return InForwardMode


def _zeros(x: Tensor) -> Tensor | None:
    return torch.zeros_like(x) if x.is_floating_point() or x.is_complex() else None
