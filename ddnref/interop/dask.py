"""Dask: operations, VJPs and reducers over the blocks of a collection, for more items than one process has time for.

A block is handed to the plain function as it is, a NumPy or a CuPy array, and every result's shape, dtype and array
type are known before anything runs: they follow from the signature of the rule, not from a trial run. A worker needs
ddnref installed, and one thread for BLAS (the page on scale-out says how).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import dask
import dask.array as da

from ddnref._core.arrays import Array, nan_where
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._rules.contract import as_tuple, bind, options_of, spread
from ddnref._rules.table import RULES, rule_of
from ddnref.curvature._reducers import Reducer
from ddnref.interop._dask_blocks import (
    Given,
    Item,
    Output,
    blockwise,
    called,
    checked,
    items_of,
    leaves,
    mapped,
    names_of,
    refuse_others,
    unlisted,
)

__all__ = ["map_gradients", "map_items", "reduce_blocks"]


def map_items(function: Callable[..., Any], /, *arrays: da.Array | None, **options: Any) -> Any:
    """Call one of ddnref's functions on every block of Dask arrays: an operation, its ``_fwd`` or its ``_vjp``.

    Parameters
    ----------
    function : callable
        A public function of an operation with a rule, such as ``ddnref.eigh`` or ``ddnref.eigh_vjp``.
    *arrays : dask.array.Array or None
        Its arrays, in its order. Batch axes lead and may be chunked; the axes of one item lie in one chunk. An array
        that others share has fewer batch axes, or some of length one, as for the function itself.
    **options
        Its options, such as ``k=4``, the same for every block.

    Returns
    -------
    result : dask.array.Array, or tuples and named tuples of them
        What the function returns. The cotangent of an array that is shared is the sum over all blocks.

    Raises
    ------
    TypeError
        The function belongs to no rule, arguments do not fit its signature, an argument is not a Dask array, or dtypes
        and libraries are mixed.
    ValueError
        The axes of one item are in several chunks, have unknown sizes, or do not fit each other.

    Notes
    -----
    What a value raises, such as `GaugeError` with ``throw=True``, is raised by the worker and comes out of ``compute``
    with its own type; with ``throw=False`` that item is NaN, and the others of its block are right.

    Batch axes of unknown length are allowed where the arrays have the same chunks. Blocks may hold no items at all.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> from ddnref.interop.dask import map_items
    >>> x = da.from_array(np.stack([np.diag([1.0, 2.0]), np.diag([3.0, 5.0])]), chunks=(1, 2, 2))
    >>> w, v = map_items(ddnref.eigh, x)
    >>> x_bar = map_items(ddnref.eigh_vjp, 2 * w, None, w, v)  # of the sum of squares
    >>> x_bar.compute()[1].tolist()
    [[6.0, 0.0], [0.0, 10.0]]
    """
    own = called(function)
    names = names_of(function, arrays, options)
    given = {i: Given(names[i], x, own.items[i]) for i, x in enumerate(arrays) if x is not None}
    sizes, dtype = checked(list(given.values()), options)
    batches = {str(x.shape[: x.ndim - len(item.axes)]) for _, x, item in given.values()}  # nan is not equal to nan
    if own.saves and len(batches) > 1:
        raise ValueError(
            f"{' and '.join(names)} have different batch axes: every block would compute again what "
            f"{function.__name__} saves of a shared array. Give them the same, or use map_gradients."
        )
    outputs = [
        Output(tuple(sizes[axis] for axis in item.axes), item.dtype_of(dtype), own.like(place, given))
        for place, item in enumerate(leaves(own.results(len(arrays))))
    ]
    run = partial(_call, function, len(arrays), tuple(given), options)
    found = iter(blockwise(function.__name__, run, list(given.values()), outputs))
    return mapped(lambda _: next(found), own.results(len(arrays)))


def map_gradients(
    operation: Callable[..., Any],
    loss: Callable[..., Any],
    /,
    *inputs: da.Array,
    data: Sequence[da.Array] = (),
    throw: bool = True,
    **options: Any,
) -> tuple[da.Array, Any]:
    """Loss and gradient of every item: forward, loss and VJP of a block in one task, whose saved arrays stay there.

    Parameters
    ----------
    operation : callable
        A public operation with a rule, such as ``ddnref.eigh``.
    loss : callable
        ``loss(*outputs, *data)`` of the plain blocks returns ``(value, bars)``: a real number for each item, ``(...)``,
        and a tuple of the cotangents of the outputs, ``None`` for one that the loss does not use.
    *inputs : dask.array.Array
        Of the operation, as in `map_items`.
    data : sequence of dask.array.Array
        What else the loss needs of each item, with the batch axes of the inputs in front: targets, weights.
    throw : bool, default True
        Raise what the operation and its VJP raise. With ``False`` the gradient of such an item is NaN, as are outputs
        that have not converged.
    **options
        Of the operation and of its VJP.

    Returns
    -------
    value : (...) dask.array.Array
    gradients : dask.array.Array, or a tuple of them
        One for each input.

    Raises
    ------
    TypeError, ValueError
        As `map_items`.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> from ddnref.interop.dask import map_gradients
    >>> x = da.from_array(np.stack([np.diag([1.0, 2.0]), np.diag([3.0, 5.0])]), chunks=(1, 2, 2))
    >>> value, x_bar = map_gradients(ddnref.eigh, lambda w, v: (w[..., -1], (np.eye(2)[-1:] + 0 * w, None)), x)
    >>> value.compute().tolist(), x_bar.compute()[1].tolist()
    ([2.0, 5.0], [[0.0, 0.0], [0.0, 1.0]])
    """
    rule = rule_of(operation)
    names = names_of(rule.function, inputs, options_of(rule, options)[0])
    bind(rule, options)  # refuses what only the VJP misses
    given = [Given(*each) for each in zip(names, inputs, items_of(rule)[0][: len(inputs)], strict=True)]
    sizes, dtype = checked(given, options)
    batch = max(x.ndim - len(item.axes) for _, x, item in given)
    refuse_others((f"data[{j}]", x) for j, x in enumerate(data))
    others = [Given(f"data[{j}]", x, Item(("",) * (x.ndim - batch), "?")) for j, x in enumerate(data)]
    checked(others, {})
    outputs = [Output((), Item((), "r").dtype_of(dtype), None)]
    outputs += [Output(tuple(sizes[axis] for axis in each.item.axes), dtype, each) for each in given]
    run = partial(_value_and_gradients, rule.name, loss, len(inputs), throw, options)
    value, *gradients = blockwise(f"{rule.name}_gradient", run, given + others, outputs)
    return value, gradients[0] if len(gradients) == 1 else tuple(gradients)


def reduce_blocks(reducer: Reducer, /, *collections: Any, split_every: int = 4) -> Any:
    """The result of a reducer over the blocks of collections: one update a block, merged in a tree, in order.

    Parameters
    ----------
    reducer : Reducer
        From `gram_reducer`, `sum_reducer` or `ggn_reducer`.
    *collections : dask.array.Array, or sequence of Delayed
        What ``reducer.update`` takes, block by block: arrays chunked along one axis and alike, or one Delayed a shard.
    split_every : int, default 4
        Up to how many states are merged by one task.

    Returns
    -------
    result : dask.delayed.Delayed
        Of ``reducer.finalise``.

    Raises
    ------
    ValueError
        Collections in different numbers or sizes of blocks, or chunked along two axes; none at all; `split_every`
        below 2.

    Notes
    -----
    Where ``reducer.init`` takes the number of the first sample, as that of `ggn_reducer`, it is given. Blocks without
    samples are left out. The reducer, with the parameters of the network inside, is sent to each worker once.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> from ddnref.interop.dask import reduce_blocks
    >>> v = da.from_array(np.arange(8.0).reshape(4, 2), chunks=(3, 2))
    >>> reduce_blocks(ddnref.curvature.gram_reducer("rows"), v).compute()
    array([[56., 68.],
           [68., 84.]])
    """
    if split_every < 2:
        raise ValueError(f"split_every is {split_every}; a task merges at least 2 states.")
    shards = _shards(collections)
    held = dask.delayed(SimpleNamespace(**reducer._asdict()), traverse=False)  # a value of its own, not in every task
    update, merge = dask.delayed(_update), dask.delayed(_merged)
    numbered = "first" in inspect.signature(reducer.init).parameters
    firsts = _firsts(collections, shards) if numbered else [None] * len(shards)
    states = [update(held, first, *shard) for first, shard in zip(firsts, shards, strict=True)]
    while len(states) > 1:
        states = [merge(held, states[i : i + split_every]) for i in range(0, len(states), split_every)]
    return dask.delayed(_finalised)(held, states[0])


# --- on a worker -----------------------------------------------------------------------------------------------------


def _call(
    function: Callable[..., Any], count: int, given: tuple[int, ...], options: dict[str, Any], *blocks: Any
) -> tuple[Array, ...]:
    """What `map_items` runs on a block."""
    found = dict(zip(given, map(unlisted, blocks), strict=True))
    return tuple(leaves(function(*(found.get(i) for i in range(count)), **options)))


def _value_and_gradients(
    name: str, loss: Callable[..., Any], count: int, throw: bool, options: dict[str, Any], *blocks: Any
) -> tuple[Array, ...]:
    """What `map_gradients` runs on a block."""
    rule, arrays = RULES[name], [unlisted(block) for block in blocks]
    inputs, data = arrays[:count], arrays[count:]
    forward, vjp = ({**o, "throw": throw} if "throw" in o else o for o in options_of(rule, options))
    result = rule.forward(*inputs, **forward)
    (outputs, saved), info = result if rule.info is not None else (result, None)
    outputs = as_tuple(outputs)
    if info is not None:
        outputs = tuple(nan_where(~spread(info.converged, y), y) for y in outputs)
    value, bars = loss(*outputs, *data)
    first = items_of(rule)[1][0]
    check_shapes(value=(value, outputs[0].shape[: outputs[0].ndim - len(first.axes)]))
    check_dtypes(value=(value, outputs[0].real.dtype))
    found = rule.vjp(*as_tuple(bars), *outputs, *saved, *(inputs[i] for i in rule.needs if i < count), **vjp)
    return value, *as_tuple(found[0] if rule.vjp_info is not None else found)[:count]


# --- reducers --------------------------------------------------------------------------------------------------------


def _shards(collections: Sequence[Any]) -> list[tuple[Any, ...]]:
    """One tuple of Delayed for each block."""
    columns, chunks = [], set()
    for i, collection in enumerate(collections):
        if not isinstance(collection, da.Array):
            columns.append(list(collection))
            continue
        axes = [axis for axis, blocks in enumerate(collection.numblocks) if blocks > 1]
        if len(axes) > 1:
            raise ValueError(f"Collection {i} is chunked along axes {axes}; rechunk it along all but one.")
        chunks |= {collection.chunks[axis] for axis in axes if not math.isnan(collection.shape[axis])}
        columns.append(collection.to_delayed().ravel().tolist())
    if len(chunks) > 1 or len(set(map(len, columns))) != 1 or not columns[0]:
        raise ValueError(
            f"Collections of {[len(column) for column in columns]} blocks, with chunks {sorted(chunks)}: all need the "
            "same blocks, at least one. Rechunk them alike."
        )
    return list(zip(*columns, strict=True))


def _firsts(collections: Sequence[Any], shards: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The number of each shard's first sample, known or computed."""
    first = collections[0]
    if isinstance(first, da.Array) and first.numblocks[0] != len(shards):
        raise ValueError("Collection 0 is chunked along its features; samples are axis 0: rechunk it along that one.")
    if isinstance(first, da.Array) and not math.isnan(first.shape[0]):
        counts: list[Any] = list(first.chunks[0])
    else:
        counts = [dask.delayed(len)(shard[0]) for shard in shards]
    return list(accumulate(counts[:-1], initial=0))


def _update(reducer: Any, first: int | None, *shard: Any) -> Any:
    state = reducer.init() if first is None else reducer.init(first)
    return state if any(0 in getattr(array, "shape", ()) for array in shard) else reducer.update(state, *shard)


def _merged(reducer: Any, states: list[Any]) -> Any:
    return reduce(reducer.merge, states)


def _finalised(reducer: Any, state: Any) -> Any:
    return reducer.finalise(state)
