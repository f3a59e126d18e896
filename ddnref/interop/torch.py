"""PyTorch: ``differentiable(op)`` makes an operation record our VJP instead of PyTorch's own derivative.

Everything runs on the tensors themselves, on their device, without a copy. Works with ``backward``,
``torch.func.grad / vmap / jacrev`` and ``torch.compile(fullgraph=True)``. Second derivatives are PyTorch's own
through our VJP; where that would be wrong, at repeated eigenvalues, they raise.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import lru_cache, partial, reduce
from operator import or_
from typing import Any, TypeAlias

import torch

from ddnref._kernels.torch import is_eager
from ddnref._rules.binding import (
    WARNING,
    Bound,
    Layout,
    bind,
    failed,
    flatten,
    input_counts,
    on_arrays,
    refuse_foreign,
    spread,
)
from ddnref._rules.contract import Rule
from ddnref._rules.table import rule_of
from ddnref.errors import GaugeError
from ddnref.interop._dlpack import elsewhere
from ddnref.interop._kept import kept
from ddnref.interop._torch_batch import aligned, batched
from ddnref.operators import LinearOperator

Tensor: TypeAlias = Any  # torch is optional, so that types must not depend on it


@torch.library.custom_op("ddnref::warn", mutates_args=(), schema="(Tensor flags) -> Tensor")
def _warn(flags: Tensor) -> Tensor:
    """Warn where a flag is set, at run time also inside a compiled graph."""
    if flags.any():
        warnings.warn(WARNING, RuntimeWarning, stacklevel=2)
    return flags.clone()


@_warn.register_fake
def _(flags: Tensor) -> Tensor:
    return torch.empty_like(flags)


@_warn.register_vmap
def _(info: Any, in_dims: tuple[int | None], flags: Tensor) -> tuple[Tensor, int | None]:  # noqa: ARG001
    return torch.ops.ddnref.warn(flags), in_dims[0]


def differentiable(operation: Callable[..., Any], *, compute: str | None = None, **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations into a function that PyTorch differentiates with our VJP.

    Parameters
    ----------
    operation : callable
        A public operation with a rule, such as ``ddnref.eigh``.
    compute : {None, "cupy", "numpy"}
        Whose kernels compute: PyTorch's own, or those of another library, which gets the tensors through DLPack,
        without a copy: ``"cupy"`` CUDA tensors, on PyTorch's current stream, ``"numpy"`` tensors of the CPU. A graph
        break for ``torch.compile``, and without second derivatives.
    **options
        Options of the operation and of its VJP, bound once: ``differentiable(ddnref.eigh_topk, k=4)``.

    Returns
    -------
    function : callable
        Takes tensors, returns what the operation returns.

    Raises
    ------
    TypeError
        The operation has no rule, an option is unknown, or a required one is missing.
    NotImplementedError
        When differentiating twice through an operation with ``compute=``, or whose VJP iterates.

    Notes
    -----
    The VJP runs with ``throw=False``: where no gradient exists (a gauge-dependent loss, a singular matrix), that
    item's gradient is NaN and a warning says why. Second derivatives through a repeated eigenvalue raise
    `GaugeError`, or are NaN under ``torch.func.vmap``, which cannot raise for one item.

    Examples
    --------
    >>> import torch
    >>> from ddnref.interop.torch import differentiable
    >>> x = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)).requires_grad_()
    >>> w, v = differentiable(ddnref.eigh)(x)
    >>> w[1].backward()
    >>> x.grad
    tensor([[0., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    rule = rule_of(operation)
    if compute is None:
        return _bridge(rule, options)
    function = _function(*elsewhere(rule, bind(rule, options), compute))
    return function if rule.info is not None else torch.compiler.disable(function)  # tracers cannot follow it


@kept
def _bridge(rule: Rule, options: dict[str, Any]) -> Callable[..., Any]:
    return _function(rule, bind(rule, options, solve=_again(rule) if rule.recursive else None))


def _function(rule: Rule, bound: Bound) -> Callable[..., Any]:
    """What the user calls."""
    operations = {count: _operation(rule, bound, _arrays(count)) for count in input_counts(rule)}
    with_operators = lru_cache(maxsize=16)(partial(_operation, rule, bound))
    n, fields = rule.outputs, rule.info_fields

    def function(*inputs: Any) -> Any:
        operation, arrays = operations.get(len(inputs)), inputs
        if operation is None or any(isinstance(x, LinearOperator) for x in inputs):
            layout, arrays = flatten(inputs)
            operation = with_operators(layout)
        if not all(isinstance(x, torch.Tensor) for x in arrays):
            refuse_foreign(rule, inputs, lambda x: isinstance(x, torch.Tensor), "a PyTorch tensor")
        if is_eager():
            operation = operation.eager
        flat = operation.apply(*arrays)
        return bound.result(flat[:n], flat[len(flat) - fields :])

    function = function if rule.info is None else _outside_graphs(rule.name, function)
    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = rule.function.__doc__
    return function


def _outside_graphs(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left out of compiled graphs, and refused where ``fullgraph=True`` asks for a single one."""
    reason = (
        f"{name} iterates until a flag that it reads on the host is clear, which no graph can hold: leave out "
        f"fullgraph=True, and {name} runs between two compiled parts"
    )
    return torch.compiler.disable(function, reason=reason)  # type: ignore[no-any-return]


def _arrays(count: int) -> Layout:
    """Inputs that are all arrays."""
    return Layout((None,) * count, (1,) * count)


def _again(rule: Rule) -> Callable[..., Any]:
    """The operation made differentiable, for a VJP that solves its own systems with it."""

    def solve(*inputs: Any, **options: Any) -> Any:
        return _bridge(rule, options)(*inputs)

    return solve


def _operation(rule: Rule, bound: Bound, layout: Layout) -> Any:
    whole, bound = bound, on_arrays(bound, rule, layout)
    guarded = bound.undefined is not None and not rule.opaque  # an opaque one refuses by itself
    first_order = _first_order(bound.undefined, rule.refusal) if guarded else None
    reverse = _opaque(rule, whole, layout) if rule.opaque else bound.reverse
    needs, count = layout.places(rule.needs), sum(layout.counts)
    fields = rule.info_fields
    recursive = rule.recursive  # torch.compile takes closures over this, not over a rule

    class Operation(torch.autograd.Function):
        """Outputs, saved arrays and status; saved ones are outputs too, so that second derivatives pass through."""

        generate_vmap_rule = rule.info is None and not rule.opaque

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            ctx.set_materialize_grads(False)
            results = output[: len(output) - fields]
            if fields:
                ctx.mark_non_differentiable(*output[len(results) :])
            ctx.save_for_backward(*results, *(inputs[i] for i in needs))

        @staticmethod
        def backward(ctx: Any, *bars: Tensor | None) -> Any:
            arrays = ctx.saved_tensors
            gradients = reverse(bars[: len(bars) - fields], arrays)
            if not gradients:
                return (None,) * len(ctx.needs_input_grad)
            warned = _warned(gradients[:count], recursive)
            if first_order is None or not torch.is_grad_enabled():
                return warned
            return tuple(first_order.apply(gradient, *arrays) for gradient in warned)

    Operation.forward = staticmethod(_forward(bound, count))
    Operation.eager = _eager(Operation)
    if rule.info is not None or rule.opaque:  # loops and other libraries cannot be traced by vmap: batch axes lead
        Operation.vmap = staticmethod(_vmap(rule, whole, layout, Operation))
    return Operation


def _eager(operation: Any) -> Any:
    """The same where ``torch.func`` is not at work, which costs less: PyTorch does not bind a signature each time."""
    forward, setup_context = operation.forward, operation.setup_context

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output  # type: ignore[no-any-return]

    Eager.backward = operation.backward
    return Eager


def _vmap(rule: Rule, bound: Bound, layout: Layout, operation: Any) -> Callable[..., Any]:
    """The operation on the whole batch, in one loop."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], int]:
        mapped, arrays = aligned(layout, rule.item_axes, batched(info.batch_size, in_dims, inputs))
        whole = operation if mapped is layout else _operation(rule, bound, mapped)
        return whole.apply(*arrays), 0

    return vmap


def _forward(bound: Bound, count: int) -> Callable[..., Any]:
    """Outputs, saved arrays and status in one tuple, from so many inputs."""

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, saved, info = bound.forward(*inputs)
        return *outputs, *saved, *info

    # torch.compile counts parameters to see whether the first one is a context.
    parameters = [inspect.Parameter(f"input_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(count)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def _opaque(rule: Rule, bound: Bound, layout: Layout) -> Callable[..., Any]:
    """A VJP that iterates: its loop reads flags, so it is run on whole batches, and not differentiated again."""
    reverse = on_arrays(bound, rule, layout).reverse
    needed = layout.select(rule.needs)
    own = sum(needed.counts)

    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(count: int, *arrays: Tensor | None) -> tuple[Tensor, ...]:
            return reverse(arrays[:count], arrays[count:])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *bars: Tensor | None) -> Any:
            raise NotImplementedError(rule.refusal)

        @staticmethod
        def vmap(
            info: Any, in_dims: tuple[int | None, ...], count: int, *arrays: Tensor | None
        ) -> tuple[tuple[Tensor, ...], int]:
            arrays = batched(info.batch_size, in_dims[1:], arrays)
            mapped, inputs = aligned(layout.select(rule.needs), rule.item_axes, arrays[len(arrays) - own :])
            if mapped is needed or mapped.plain:
                return Reverse.apply(count, *arrays), 0
            bars, results = arrays[:count], arrays[count : len(arrays) - own]
            return _opaque(rule, bound, mapped)(bars, (*results, *inputs)), 0

    def opaque(bars: tuple[Tensor | None, ...], arrays: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if all(bar is None for bar in bars):
            return ()
        return Reverse.apply(len(bars), *bars, *arrays)  # type: ignore[no-any-return]

    return opaque


def _warned(gradients: tuple[Tensor | None, ...], shared: bool) -> tuple[Tensor | None, ...]:
    """The gradients, after a warning where one of them is NaN: now if that can be seen, else when the graph runs."""
    if not torch.compiler.is_compiling():
        try:
            found = bool(reduce(or_, (failed(x_bar).any() for x_bar in gradients if x_bar is not None)))
        except RuntimeError:  # under vmap, or while a graph is recorded, no value can be read
            pass
        else:
            if found:
                warnings.warn(WARNING, RuntimeWarning, stacklevel=2)
            return gradients
    return tuple(None if x_bar is None else _warn_in_graph(x_bar, shared) for x_bar in gradients)


def _warn_in_graph(x_bar: Tensor, shared: bool) -> Tensor:
    """The gradient, passed through the warning in one of its columns, or a compiler would drop that as unused.

    Not in place where the gradient is shared with what computed it, and differentiated again.
    """
    column = x_bar[..., :1] if x_bar.ndim else x_bar
    if shared and torch.is_grad_enabled():
        return torch.where(torch.ops.ddnref.warn(failed(x_bar)), torch.nan, x_bar)
    column.copy_(torch.where(torch.ops.ddnref.warn(failed(x_bar)), torch.nan, column))
    return x_bar


def _first_order(undefined: Any, refusal: str) -> Any:
    class FirstOrder(torch.autograd.Function):
        """Identity on a gradient; its own derivative is refused where that would be wrong."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x_bar: Tensor, *arrays: Tensor) -> Tensor:  # noqa: ARG004
            return x_bar.view_as(x_bar)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
            ctx.save_for_backward(*inputs[1:])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            arrays = ctx.saved_tensors
            return _Refuse.apply(grad, undefined(*arrays), refusal), *(None for _ in arrays)

    return FirstOrder


class _Refuse(torch.autograd.Function):
    """Identity on a second-order gradient that raises where it is wrong; under vmap it is NaN there instead."""

    @staticmethod
    def forward(grad: Tensor, undefined: Tensor, refusal: str) -> Tensor:
        if undefined.any():
            raise GaugeError(refusal)
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ARG004
        return grad, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        grad: Tensor,
        undefined: Tensor,
        refusal: str,  # noqa: ARG004
    ) -> tuple[Tensor, int]:
        grad, undefined = batched(info.batch_size, in_dims[:2], (grad, undefined))
        return torch.where(spread(undefined, grad), torch.nan, grad), 0
