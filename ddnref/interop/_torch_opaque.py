"""Derivatives that PyTorch cannot trace, such as loops that read flags; they are not differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch

from ddnref._rules.binding import Bound, Layout, on_arrays
from ddnref._rules.contract import Rule
from ddnref.interop._torch_vmap import align_batch, mapped_axis_first, one_by_one

Tensor: TypeAlias = Any


def opaque(rule: Rule, bound: Bound, layout: Layout, mode: str) -> Callable[..., tuple[Tensor, ...]]:
    """The VJP or the JVP of a bound operation on the arrays of a layout, ``mode`` being "reverse" or "push"."""
    function: Callable[..., tuple[Tensor, ...]] = getattr(on_arrays(bound, rule, layout), mode)
    needed = layout.select(rule.needs)
    own = sum(needed.counts)

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(count: int, *arrays: Tensor | None) -> tuple[Tensor, ...]:
            return function(arrays[:count], arrays[count:])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *bars: Tensor | None) -> Any:
            raise NotImplementedError(rule.refusal)

        @staticmethod
        def jvp(ctx: Any, *dots: Tensor | None) -> Any:
            raise NotImplementedError(rule.refusal)

        @staticmethod
        def vmap(
            info: Any, in_dims: tuple[int | None, ...], count: int, *arrays: Tensor | None
        ) -> tuple[tuple[Tensor, ...], int]:
            arrays = mapped_axis_first(info.batch_size, in_dims[1:], arrays)
            if rule.one_by_one:
                return one_by_one(partial(Opaque.apply, count), arrays), 0
            if needed.plain:
                return Opaque.apply(count, *arrays), 0
            # An operator of one item becomes one of the whole batch, which has another derivative.
            whole, inputs, _ = align_batch(needed, rule.item_axes, arrays[len(arrays) - own :])
            given, results = arrays[:count], arrays[count : len(arrays) - own]
            return opaque(rule, bound, whole, mode)(given, (*results, *inputs)), 0

    def derivative(given: tuple[Tensor | None, ...], arrays: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if all(x is None for x in given):
            return ()
        return Opaque.apply(len(given), *given, *arrays)  # type: ignore[no-any-return]

    return derivative
