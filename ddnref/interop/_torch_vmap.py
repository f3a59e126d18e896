"""PyTorch's ``vmap`` of operations that it cannot trace: they run on the whole batch, or item by item.

A loop that reads a flag, or a kernel of another library, cannot be traced. Its arrays get the mapped axis in front, and
axes of length one behind it where they broadcast against each other, so that the mapped axes meet. The functions of an
operator do not know that their parameters have a new axis, so these functions are mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ddnref._rules.binding import Layout
from ddnref.operators import LinearOperator
from ddnref.operators._operator import batch_axes

Tensor: TypeAlias = Any


def mapped_axis_first(size: int, in_dims: tuple[int | None, ...], arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give every array the mapped axis in front; ``None`` is left as it is."""
    return tuple(
        array.movedim(dim, 0) if dim is not None else None if array is None else array.expand(size, *array.shape)
        for array, dim in zip(arrays, in_dims, strict=True)
    )


def one_by_one(apply: Callable[..., tuple[Tensor | None, ...]], arrays: tuple[Tensor | None, ...]) -> Any:
    """Call a function for each item of arrays that have the mapped axis in front, and stack what it returns."""
    size = next(len(x) for x in arrays if x is not None)
    if size == 0:  # shapes and dtypes come from a call with random numbers
        one = apply(*(None if x is None else _like_an_item(x) for x in arrays))
        return tuple(None if y is None else y.new_empty((0, *y.shape)) for y in one)
    found = [apply(*(None if x is None else x[i] for x in arrays)) for i in range(size)]
    return tuple(None if items[0] is None else torch.stack(items) for items in zip(*found, strict=True))


def _like_an_item(x: Tensor) -> Tensor:
    item = x.new_zeros(x.shape[1:])
    return torch.rand_like(item) + 0.5 if item.is_floating_point() or item.is_complex() else item


def align_batch(
    layout: Layout, item_axes: tuple[int, ...], arrays: tuple[Tensor, ...]
) -> tuple[Layout, tuple[Tensor, ...], int]:
    """Line up the batch axes of arrays that have the mapped axis in front; return layout and arrays of the batch.

    `item_axes` says how many axes of each input belong to one item, where inputs broadcast against each other. The last
    result is the number of batch axes behind the mapped one.
    """
    if layout.plain:
        if not item_axes:
            return layout, arrays, 0
        own = item_axes[: len(arrays)]
        lead = max(array.ndim - n for array, n in zip(arrays, own, strict=True))
        aligned = tuple(_with_single_axes(array, lead + n) for array, n in zip(arrays, own, strict=True))
        return layout, aligned, lead - 1

    # The product of one item's operator with zeros shows how many batch axes its parameters have.
    inputs = list(layout.join(arrays))
    (operator,) = (x for x in inputs if isinstance(x, LinearOperator))
    dtype = next((array.dtype for array in arrays if array.is_complex()), arrays[-1].dtype)
    item = operator.with_params(*(parameter[0] for parameter in operator.params))
    batch, _ = batch_axes(item, torch.zeros(operator.domain_shape, dtype=dtype, device=arrays[0].device))

    # Right-hand sides and starting points may have more batch axes than that, where they broadcast.
    n = len(operator.range_shape)
    if not item_axes:
        parts = tuple(None if part is None else _mapped_operator(part, len(batch)) for part in layout.parts)
        return Layout(parts, layout.counts), arrays, len(batch)
    lead = max([len(batch), *(x.ndim - 1 - n for x in inputs if not isinstance(x, LinearOperator))])
    parts = tuple(None if part is None else _mapped_operator(part, lead) for part in layout.parts)
    flat: list[Tensor] = []
    for x in inputs:
        flat.extend(x.params if isinstance(x, LinearOperator) else (_with_single_axes(x, lead + 1 + n),))
    return Layout(parts, layout.counts), tuple(flat), lead


def align_held(layout: Layout, arrays: tuple[Tensor, ...], lead: int, own: int) -> tuple[Layout, tuple[Tensor, ...]]:
    """Line up what options hold with vectors of `lead` batch axes and `own` axes, and the mapped axis in front."""
    parts = tuple(None if part is None else _mapped_operator(part, lead) for part in layout.parts)
    flat: list[Tensor] = []
    for x in layout.join(arrays):
        flat.extend(x.params if isinstance(x, LinearOperator) else (_with_single_axes(x, max(1 + lead + own, x.ndim)),))
    return Layout(parts, layout.counts), tuple(flat)


def _with_single_axes(x: Tensor, ndim: int) -> Tensor:
    """Insert axes of length one behind the mapped axis, so that `x` has `ndim` axes."""
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])


def _mapped_operator(part: LinearOperator, lead: int) -> LinearOperator:
    """The operator with a mapped axis in front of every parameter and of the `lead` batch axes of its vectors."""
    domain, target = len(part.domain_shape), len(part.range_shape)

    def mapped_axis(x: Tensor, own: int) -> int:
        return int(x.ndim) - 1 - lead - own  # not always 0: solvers may put more axes in front

    def product(f: Callable[..., Tensor], own: int) -> Callable[..., Tensor]:
        def mapped(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
            # One vector for the whole batch gets every batch axis, as its image has them all.
            if x.ndim < 1 + lead + own:
                x = x.reshape(*(1,) * (1 + lead + own - x.ndim), *x.shape)
            axis = mapped_axis(x, own)
            # vmap, unlike broadcasting, wants the same length from all.
            if x.shape[axis] == 1 and params and params[0].shape[0] != 1:
                x = x.expand(*x.shape[:axis], params[0].shape[0], *x.shape[axis + 1 :])
            return torch.func.vmap(f, in_dims=((0,) * len(params), axis), out_dims=axis)(params, x)

        return mapped

    def params_vjp(params: tuple[Tensor, ...], y_bar: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        axes = (0,) * len(params), mapped_axis(y_bar, target), mapped_axis(x, domain)
        return tuple(torch.func.vmap(part.params_vjp, in_dims=axes)(params, y_bar, x))

    def motion(f: Callable[..., Tensor] | None, own: int) -> Callable[..., Tensor] | None:
        if f is None:
            return None
        # A product of parameters and their tangents with a vector is one of twice as many parameters.
        both = product(lambda pairs, x: f(pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :], x), own)
        return lambda params, params_dot, x: both((*params, *params_dot), x)

    return LinearOperator(
        (), product(part.apply, domain), product(part.adjoint, target), params_vjp,
        part.domain_shape, part.range_shape, part.self_adjoint, part.positive_definite,
        params_jvp=motion(part.params_jvp, domain), adjoint_jvp=motion(part.adjoint_jvp, target),
    )  # fmt: skip
