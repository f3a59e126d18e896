"""PyTorch: ``differentiable(op)`` makes an operation record our VJP instead of PyTorch's own derivative.

Everything runs on the tensors themselves, on their device, without a copy. Works with ``backward``,
``torch.func.grad / vmap / jacrev`` and ``torch.compile(fullgraph=True)``. Second derivatives are PyTorch's own
through our VJP; where that would be wrong, at repeated eigenvalues, they raise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ddnref._errors import GaugeError
from ddnref._rules import WARNING, as_tuple, bind, failed, rule_of

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


def differentiable(operation: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations into a function that PyTorch differentiates with our VJP.

    Parameters
    ----------
    operation : callable
        A public operation with a rule, such as ``ddnref.eigh``.
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
    forward, reverse, undefined = bind(rule, options)
    n = rule.outputs

    operate = _operation(forward, reverse, _first_order(undefined))

    def function(*inputs: Tensor) -> Any:
        outputs = operate.apply(*inputs)[:n]
        return outputs[0] if n == 1 else outputs

    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = operation.__doc__
    return function


def _operation(forward: Callable[..., Any], reverse: Callable[..., Any], first_order: Any) -> Any:
    class Operation(torch.autograd.Function):
        """Outputs and saved arrays; the latter are outputs too, so that second derivatives pass through them."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            outputs, saved = forward(*inputs)
            return *as_tuple(outputs), *saved

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*output)

        @staticmethod
        def backward(ctx: Any, *bars: Tensor | None) -> Tensor | None:
            arrays = ctx.saved_tensors
            x_bar = reverse(bars, arrays)
            if x_bar is None:
                return None
            corner = x_bar[..., :1, :1]  # through an entry, or a compiler would drop the warning as unused
            x_bar[..., :1, :1] = torch.where(torch.ops.ddnref.warn(failed(x_bar)), torch.nan, corner)
            return first_order.apply(x_bar, *arrays) if torch.is_grad_enabled() else x_bar

    return Operation


def _first_order(undefined: Callable[..., Any]) -> Any:
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
            return _Refuse.apply(grad, undefined(*arrays)), *(None for _ in arrays)

    return FirstOrder


class _Refuse(torch.autograd.Function):
    """Identity on a second-order gradient that raises where it is wrong; under vmap it is NaN there instead."""

    @staticmethod
    def forward(grad: Tensor, undefined: Tensor) -> Tensor:
        if undefined.any():
            raise GaugeError(
                "A second derivative through repeated eigenvalues was asked for. It would be wrong (11 % in a "
                "measured case), because the masked entries depend on the matrix as well. Use "
                "ddnref.spectral_function for first derivatives of functions of the matrix, or separate the "
                "eigenvalues, for example by a small ridge with distinct entries."
            )
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], grad: Tensor, undefined: Tensor) -> tuple[Tensor, int]:
        grad, undefined = (
            array.expand(info.batch_size, *array.shape) if dim is None else array.movedim(dim, 0)
            for array, dim in zip((grad, undefined), in_dims, strict=True)
        )
        return torch.where(undefined[..., None, None], torch.nan, grad), 0
