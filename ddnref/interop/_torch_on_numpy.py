"""Calls on plain CPU tensors: NumPy computes on their memory, because its functions cost less to call.

PyTorch records such a call like any other. What would have to look inside gets tensors as before: second derivatives,
transforms of ``torch.func``, ``torch.compile``, forward mode, traces, and modes that see every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from ddnref._kernels import torch_solve
from ddnref._kernels.torch import is_eager, is_forward
from ddnref._rules.binding import NAN, Bound, Layout, own_axes
from ddnref._rules.contract import Rule
from ddnref.interop._on_numpy import bind_on_numpy, warn_of_nan
from ddnref.interop._torch_batched_grads import are_mapped
from ddnref.linalg import solve_fwd

Tensor: TypeAlias = Any

IN_FEW_CALLS: dict[Callable[..., Any], tuple[Callable[..., Any], Callable[..., Any]]] = {
    solve_fwd: (torch_solve.solve, torch_solve.solve_vjp),
}
"""Forms of operations and VJPs on tensors for the usual case, which return ``None`` in all others."""
KINDS = (torch.Tensor, torch.nn.Parameter)  # subclasses have their own ways
HALF = (torch.bfloat16, torch.float16)  # NumPy lacks the first, and ddnref refuses both by name
# PyTorch's own test for modes that see every operation. Without it no call counts as plain.
_modes_are_active = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def bound_on_numpy(rule: Rule, options: dict[str, Any]) -> Bound | None:
    """Bind options for NumPy arrays; ``None`` where one of them is a function or holds tensors."""
    return bind_on_numpy(rule, options) if all(map(_is_plain_option, options.values())) else None


def _is_plain_option(value: Any) -> bool:
    if isinstance(value, (tuple, list, range)):
        return all(map(_is_plain_option, value))
    return value is None or isinstance(value, (bool, int, float, str))


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether NumPy can read these tensors, and PyTorch misses nothing if it does."""
    if _modes_are_active() or torch._C._get_tracing_state() is not None:
        return False
    if are_mapped(tensors):
        return False
    for x in tensors:
        if x is not None and not (
            type(x) in KINDS and x.is_cpu and x.layout is torch.strided and x.dtype not in HALF
        ):  # fmt: skip
            return False
    return True


def on_numpy(
    otherwise: Any, setup_context: Callable[..., None], rule: Rule, bound: Bound, layout: Layout, unused: int
) -> Callable[..., tuple[Tensor, ...]]:
    """A function that computes an operation on plain tensors with NumPy.

    `otherwise` is the ``autograd.Function`` for other tensors and for a backward pass that is recorded; both keep what
    `setup_context` saves. Only that pass uses the last `unused` saved tensors.
    """
    fields, axes = rule.info_fields, own_axes(rule, layout)
    usual, usual_vjp = IN_FEW_CALLS.get(rule.forward, (_never, _never))

    class OnNumpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
            output = usual(*inputs)
            ctx.is_usual = output is not None
            if output is None:
                arrays = tuple(map(_array, inputs))
                outputs, saved, info = bound.forward(*arrays)
                output = _tensors((*outputs, *saved, *info), arrays)
            setup_context(ctx, inputs, output)
            return output  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, *bars: Tensor | None) -> Any:
            saved, own = ctx.saved_tensors, bars[: len(bars) - fields]
            recorded = torch.is_grad_enabled() or is_forward() or not is_eager()
            if recorded or not is_plain((*own, *saved)):
                return otherwise.backward(ctx, *bars)
            if ctx.is_usual and (found := usual_vjp(own, saved)) is not None:
                return found
            given = tuple(map(_array, (*own, *saved[: len(saved) - unused])))
            gradients = bound.reverse(given[: len(own)], given[len(own) :])
            if not gradients:  # no cotangent was given
                return (None,) * len(ctx.needs_input_grad)
            warn_of_nan(NAN, rule.name, gradients, axes)
            return _tensors(gradients, given)

    def apply(*inputs: Tensor) -> tuple[Tensor, ...]:
        function = OnNumpy if is_plain(inputs) else otherwise
        return function.apply(*inputs)  # type: ignore[no-any-return]

    return apply


def _never(*_: Any) -> None:
    """The form of an operation that has none for the usual case."""


def _array(x: Tensor | None) -> Any:
    """A tensor as an array of the same memory; a copy where a bit says that it is conjugated or negated."""
    if x is None:
        return None
    x = x.detach()
    try:
        return x.numpy()
    except RuntimeError:
        return x.resolve_conj().resolve_neg().numpy()


def _tensors(results: Iterable[Any], given: Iterable[Any]) -> tuple[Tensor, ...]:
    """Results as tensors; a copy of one that shares memory with another, whose changes in place PyTorch must count."""
    held = [x for x in given if x is not None]
    tensors: list[Tensor | None] = []
    for result in results:
        if result is None:
            tensors.append(None)
            continue
        array = writable(result)
        # What owns its memory shares it only with views of itself, which are looked at.
        if array.base is not None or any(array is other for other in held):
            for other in held:
                if np.may_share_memory(array, other):
                    array = array.copy()
                    break
        held.append(array)
        tensors.append(torch.from_numpy(array))
    return tuple(tensors)


def writable(result: Any) -> Any:
    """A number or an array of NumPy as an array that a tensor can be made of; a copy where it is read-only."""
    array = np.asarray(result)
    has_negative = min(array.strides, default=0) < 0  # PyTorch has no such strides
    return array if array.flags.writeable and not has_negative else array.copy()
