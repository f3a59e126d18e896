"""PyTorch: ``differentiable(op)`` makes an operation record our VJP instead of PyTorch's own derivative.

Everything runs on the tensors themselves, on their device, without a copy. It works with ``backward``,
``torch.func.grad / vmap / jacrev`` and ``torch.compile(fullgraph=True)``. For second derivatives PyTorch differentiates
our VJP. At repeated eigenvalues they would be wrong, so they raise.
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
from ddnref.interop._bridge_cache import cached_by_options
from ddnref.interop._torch_foreign_kernels import computed_by
from ddnref.interop._torch_vmap import align_batch, mapped_axis_first
from ddnref.operators import LinearOperator

Tensor: TypeAlias = Any  # torch is optional, so that types must not depend on it


def differentiable(operation: Callable[..., Any], *, compute: str | None = None, **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations into a function that PyTorch differentiates with our VJP.

    Parameters
    ----------
    operation : callable
        A public operation with a rule, such as ``ddnref.eigh``.
    compute : {None, "cupy", "numpy"}
        The library that computes: PyTorch by default, CuPy for CUDA tensors (on PyTorch's current stream) or NumPy
        for CPU tensors. The other libraries get the tensors through DLPack, without a copy. They break the graph of
        ``torch.compile``, and they have no second derivatives.
    **options
        Options of the operation and of its VJP, bound once: ``differentiable(ddnref.eigh_topk, k=4)``.

    Returns
    -------
    function : callable
        Takes tensors and returns the same values as the operation.

    Raises
    ------
    TypeError
        The operation has no rule, an option is unknown, or a required one is missing.
    NotImplementedError
        When a second derivative is taken with ``compute=``, or of an operation whose VJP iterates.

    Notes
    -----
    The VJP runs with ``throw=False``: where no gradient exists (a gauge-dependent loss, a singular matrix), that
    item's gradient is NaN and a warning says why. A second derivative through a repeated eigenvalue raises
    `GaugeError`. Under ``torch.func.vmap``, which cannot raise for one item, it is NaN for that item.

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
    function = _function(*computed_by(compute, rule, bind(rule, options)))
    return function if rule.info is not None else torch.compiler.disable(function)  # no graph can hold its kernels


@cached_by_options
def _bridge(rule: Rule, options: dict[str, Any]) -> Callable[..., Any]:
    def solve(*inputs: Any, **others: Any) -> Any:
        return _bridge(rule, others)(*inputs)

    # A VJP that solves its own systems solves them with this bridge, and so it can be differentiated again.
    return _function(rule, bind(rule, options, solve=solve if rule.recursive else None))


def _function(rule: Rule, bound: Bound) -> Callable[..., Any]:
    """The function that the user calls: it takes operators apart and puts the results together."""
    # Where all inputs are arrays, their number says which operation it is. Operators get one for each structure.
    operations = {count: _operation(rule, bound, Layout((None,) * count, (1,) * count)) for count in input_counts(rule)}
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

    if rule.info is not None:  # it iterates
        reason = (
            f"{rule.name} iterates until a flag that it reads on the host is clear, which no graph can hold: leave out "
            f"fullgraph=True, and {rule.name} runs between two compiled parts"
        )
        function = torch.compiler.disable(function, reason=reason)
    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = rule.function.__doc__
    return function


def _operation(rule: Rule, bound: Bound, layout: Layout) -> Any:
    """An operation as ``autograd.Function`` of the arrays of a layout."""
    flat = on_arrays(bound, rule, layout)
    reverse = _opaque_reverse(rule, bound, layout) if rule.opaque else flat.reverse
    # Where a second derivative would be wrong it must be refused; an opaque VJP refuses all of them by itself.
    undefined = None if rule.opaque else flat.undefined
    first_order = None if undefined is None else _first_order(undefined, rule.refusal)
    needs, count = layout.places(rule.needs), sum(layout.counts)
    fields, recursive = rule.info_fields, rule.recursive  # torch.compile takes closures over these, not over a rule

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
            if not gradients:  # no cotangent was given
                return (None,) * len(ctx.needs_input_grad)
            gradients = _with_warning(gradients[:count], recursive)
            if first_order is None or not torch.is_grad_enabled():
                return gradients
            return tuple(first_order.apply(x_bar, *arrays) for x_bar in gradients)

    Operation.forward = staticmethod(_forward(flat, count))
    Operation.eager = _eager(Operation)

    # vmap cannot trace loops and other libraries, so they run once on the whole batch, whose axis leads.
    if rule.info is not None or rule.opaque:

        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], int]:
            arrays = mapped_axis_first(info.batch_size, in_dims, inputs)
            whole, arrays = align_batch(layout, rule.item_axes, arrays)
            operation = Operation if whole is layout else _operation(rule, bound, whole)
            return operation.apply(*arrays), 0

        Operation.vmap = staticmethod(vmap)
    return Operation


def _forward(flat: Bound, count: int) -> Callable[..., Any]:
    """A function of `count` inputs that returns outputs, saved arrays and status in one tuple."""

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, saved, info = flat.forward(*inputs)
        return *outputs, *saved, *info

    # torch.compile counts parameters to see whether the first one is a context.
    parameters = [inspect.Parameter(f"input_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(count)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def _eager(operation: Any) -> Any:
    """A cheaper form of an operation outside ``torch.func``, where PyTorch does not bind a signature at every call."""
    forward, setup_context = operation.forward, operation.setup_context

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output  # type: ignore[no-any-return]

    Eager.backward = operation.backward
    return Eager


def _opaque_reverse(rule: Rule, bound: Bound, layout: Layout) -> Callable[..., Any]:
    """A VJP that PyTorch cannot trace, as its loop reads flags: it runs on whole batches and has no derivative."""
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
            arrays = mapped_axis_first(info.batch_size, in_dims[1:], arrays)
            if needed.plain:
                return Reverse.apply(count, *arrays), 0
            # An operator of one item becomes one of the whole batch, which has another VJP.
            whole, inputs = align_batch(needed, rule.item_axes, arrays[len(arrays) - own :])
            bars, results = arrays[:count], arrays[count : len(arrays) - own]
            return _opaque_reverse(rule, bound, whole)(bars, (*results, *inputs)), 0

    def opaque(bars: tuple[Tensor | None, ...], arrays: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if all(bar is None for bar in bars):
            return ()
        return Reverse.apply(len(bars), *bars, *arrays)  # type: ignore[no-any-return]

    return opaque


def _with_warning(gradients: tuple[Tensor | None, ...], shared: bool) -> tuple[Tensor | None, ...]:
    """The gradients, with a warning if one of them is NaN: at once where values can be read, else when the graph runs.

    `shared` says whether the computation of the gradients still uses them, and is differentiated again.
    """
    if not torch.compiler.is_compiling():
        try:
            # One read for all gradients: on a GPU, each read would wait for it.
            found = bool(reduce(or_, (failed(x_bar).any() for x_bar in gradients if x_bar is not None)))
        except RuntimeError:  # under vmap, or while a graph is recorded, no value can be read
            pass
        else:
            if found:
                warnings.warn(WARNING, RuntimeWarning, stacklevel=2)
            return gradients
    return tuple(None if x_bar is None else _with_warning_in_graph(x_bar, shared) for x_bar in gradients)


def _with_warning_in_graph(x_bar: Tensor, shared: bool) -> Tensor:
    """The gradient, computed from the result of the warning, which a compiler would otherwise drop as unused."""
    flags = torch.ops.ddnref.warn(failed(x_bar))
    # A gradient that something else uses must not be changed in place.
    if shared and torch.is_grad_enabled():
        return torch.where(flags, torch.nan, x_bar)
    # The flags are those of one column, so it is enough to write that one.
    column = x_bar[..., :1] if x_bar.ndim else x_bar
    column.copy_(torch.where(flags, torch.nan, column))
    return x_bar


@torch.library.custom_op("ddnref::warn", mutates_args=(), schema="(Tensor flags) -> Tensor")
def _warn(flags: Tensor) -> Tensor:
    """Warn if a flag is set, when it runs, also inside a compiled graph."""
    if flags.any():
        warnings.warn(WARNING, RuntimeWarning, stacklevel=2)
    return flags.clone()


_warn.register_fake(lambda flags: torch.empty_like(flags))
_warn.register_vmap(lambda info, in_dims, flags: (torch.ops.ddnref.warn(flags), in_dims[0]))  # noqa: ARG005


def _first_order(undefined: Callable[..., Tensor], refusal: str) -> Any:
    """An identity on gradients whose own derivative is refused for items that are `undefined`."""

    class FirstOrder(torch.autograd.Function):
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
            wrong = undefined(*arrays)
            try:
                refused = bool(wrong.any())
            except RuntimeError:  # under vmap no value can be read, and one item cannot raise: it is NaN
                grad = torch.where(spread(wrong, grad), torch.nan, grad)
            else:
                if refused:
                    raise GaugeError(refusal)
            return grad, *(None for _ in arrays)

    return FirstOrder
