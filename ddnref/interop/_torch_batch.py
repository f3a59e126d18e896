"""PyTorch's ``vmap`` for loops that read flags: they cannot be traced, and run on the whole batch, whose axis leads.

Arrays get the mapped axis in front, and where they broadcast against each other, single axes behind it, so that the
mapped axes meet. An operator's functions know nothing of the new axis in their parameters: they are mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ddnref._rules.binding import Layout
from ddnref.operators import LinearOperator

Tensor: TypeAlias = Any


def batched(size: int, in_dims: tuple[int | None, ...], arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Every array with the mapped axis in front, ``None`` where it is missing."""
    return tuple(
        array.movedim(dim, 0) if dim is not None else None if array is None else array.expand(size, *array.shape)
        for array, dim in zip(arrays, in_dims, strict=True)
    )


def aligned(
    layout: Layout, item_axes: tuple[int, ...], arrays: tuple[Tensor, ...]
) -> tuple[Layout, tuple[Tensor, ...]]:
    """The layout of a whole batch, from arrays that have the mapped axis in front.

    `item_axes` says how many axes of each input are those of one item, where inputs broadcast against each other.
    """
    if layout.plain:
        if not item_axes:
            return layout, arrays
        return layout, _level(arrays, item_axes[: len(arrays)])
    inputs = list(layout.join(arrays))
    (operator,) = (x for x in inputs if isinstance(x, LinearOperator))
    one = tuple(parameter[0] for parameter in operator.params)
    vector = torch.zeros(operator.domain_shape, dtype=_dtype(arrays), device=arrays[0].device)
    n = len(operator.range_shape)
    lead = operator.apply(one, vector).ndim - n
    lead = max([lead, *(x.ndim - 1 - n for x in inputs if not isinstance(x, LinearOperator))])
    parts = tuple(None if part is None else _mapped(part, lead) for part in layout.parts)
    flat: list[Tensor] = []
    for x in inputs:
        flat.extend(x.params if isinstance(x, LinearOperator) else (_single(x, lead + 1 + n),))
    return Layout(parts, layout.counts), tuple(flat)


def _dtype(arrays: tuple[Tensor, ...]) -> torch.dtype:
    """Of vectors: complex where any of them is."""
    return next((array.dtype for array in arrays if array.is_complex()), arrays[-1].dtype)


def _level(arrays: tuple[Tensor, ...], item_axes: tuple[int, ...]) -> tuple[Tensor, ...]:
    lead = max(array.ndim - n for array, n in zip(arrays, item_axes, strict=True))
    return tuple(_single(array, lead + n) for array, n in zip(arrays, item_axes, strict=True))


def _single(x: Tensor, ndim: int) -> Tensor:
    """`x` with single axes behind the mapped one, up to so many axes."""
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])


def _mapped(part: LinearOperator, lead: int) -> LinearOperator:
    """The operator with a mapped axis in front of every parameter and of the `lead` batch axes of its vectors."""
    domain, target = len(part.domain_shape), len(part.range_shape)

    def place(x: Tensor, own: int) -> int:
        """Where the mapped axis of vectors is: solvers may put more axes in front."""
        return int(x.ndim) - 1 - lead - own

    def product(f: Callable[..., Tensor], own: int) -> Callable[..., Tensor]:
        def mapped(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
            if x.ndim < 1 + lead + own:  # a vector for all: the image gets every axis
                x = x.reshape(*(1,) * (1 + lead + own - x.ndim), *x.shape)
            axis = place(x, own)
            if x.shape[axis] == 1 and params and params[0].shape[0] != 1:
                x = x.expand(*x.shape[:axis], params[0].shape[0], *x.shape[axis + 1 :])
            return torch.func.vmap(f, in_dims=((0,) * len(params), axis), out_dims=axis)(params, x)

        return mapped

    def params_vjp(params: tuple[Tensor, ...], y_bar: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        axes = (0,) * len(params), place(y_bar, target), place(x, domain)
        return tuple(torch.func.vmap(part.params_vjp, in_dims=axes)(params, y_bar, x))

    return LinearOperator(
        (), product(part.apply, domain), product(part.adjoint, target), params_vjp,
        part.domain_shape, part.range_shape, part.self_adjoint, part.positive_definite,
    )  # fmt: skip
