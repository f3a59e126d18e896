"""Dask: operations, VJPs and reducers over the blocks of a collection, for more items than one process can handle.

The plain function gets each block as it is, a NumPy or a CuPy array. Shape, dtype and array type of every result are
known before anything runs: they follow from the signature of the rule, without a trial run. A worker needs ddnref, and
one thread for BLAS (see the page on scale-out).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ddnref.interop._extras import needed_by_bridge

with needed_by_bridge("dask"):
    import dask
    import dask.array as da
    from dask.array.utils import meta_from_array

from ddnref._core.arrays import Array, as_tuple, nan_where
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._rules.binding import bind, leaves, numbers_as_arrays, options_of, plain_vjp, spread
from ddnref._rules.table import RULES, rule_of
from ddnref.curvature._reducers import Reducer
from ddnref.interop._dask_signatures import Given, Item, called, checked, items_of, names_of, on_blocks, refuse_others

__all__ = ["map_gradients", "map_items", "reduce_blocks"]


def map_items(function: Callable[..., Any], /, *arrays: da.Array | None, **options: Any) -> Any:
    """Call one of ddnref's functions on every block of Dask arrays: an operation, its ``_fwd`` or its ``_vjp``.

    Parameters
    ----------
    function : callable
        A public function of an operation with a rule, such as ``ddnref.eigh`` or ``ddnref.eigh_vjp``. A JVP is not
        mapped: call it on blocks of your own.
    *arrays : dask.array.Array or None
        The arrays of the function, in its order. Batch axes lead and may be chunked; the axes of one item must be in
        one chunk. An array that several items share has fewer batch axes, or some of length one, as for the function
        itself. A bare array of NumPy or CuPy counts as a Dask array of one block.
    **options
        Options of the function, such as ``k=4``, the same for every block.

    Returns
    -------
    result : dask.array.Array, or tuples and named tuples of them
        The results of the function. The cotangent of a shared array is the sum over all blocks.

    Raises
    ------
    TypeError
        The function belongs to no rule, arguments do not fit its signature, an argument is not a Dask array, or dtypes
        and libraries are mixed.
    ValueError
        The axes of one item are in several chunks, have unknown lengths, or do not fit each other.

    Notes
    -----
    Errors that depend on values come out of ``compute`` with their type; with ``throw=False`` such an item is NaN, and
    the others of its block are right. Batch axes of unknown length are allowed where the arrays have the same chunks.
    Blocks may hold no items at all.

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
    # Find the function's rule, and validate the arrays against its signature.
    own = called(function)
    arrays = on_blocks(numbers_as_arrays(function, arrays, _as_dask))
    names = names_of(function, arrays, options)
    given = {i: Given(names[i], x, own.items[i]) for i, x in enumerate(arrays) if x is not None}
    sizes, dtype = checked(list(given.values()), options)
    batches = {str(each.batch) for each in given.values()}  # as text, because nan is not equal to nan
    if function is own.rule.forward and len(batches) > 1:
        raise ValueError(
            f"{' and '.join(names)} have different batch axes: every block would compute again what "
            f"{function.__name__} saves of a shared array. Give them the same, or use map_gradients."
        )
    # Say what each result will be, and build the graph that computes them all.
    results = own.results(len(arrays))
    outputs = [
        _Output(tuple(sizes[axis] for axis in item.axes), item.dtype_of(dtype), own.like(place, given))
        for place, item in enumerate(_present(results))
    ]
    run = partial(_call, function, len(arrays), tuple(given), options)
    found = iter(_blockwise(function.__name__, run, list(given.values()), outputs))

    def nested(items: Any) -> Any:
        if not isinstance(items, tuple):
            return None if items is None else next(found)
        entries = [nested(entry) for entry in items]
        return type(items)(*entries) if hasattr(items, "_fields") else tuple(entries)

    return nested(results)


def map_gradients(
    operation: Callable[..., Any],
    loss: Callable[..., Any],
    /,
    *inputs: da.Array,
    data: Sequence[da.Array] = (),
    loss_per: str = "item",
    throw: bool = True,
    **options: Any,
) -> tuple[da.Array, Any]:
    """Loss and gradient of every item: forward, loss and VJP of a block are one task, which keeps the saved arrays.

    Parameters
    ----------
    operation : callable
        A public operation with a rule, such as ``ddnref.eigh``.
    loss : callable
        ``loss(*outputs, *data)`` gets plain blocks and returns ``(value, bars)``: a real number for each item,
        ``(...)``, or one for the block, ``()``, and a tuple of the cotangents of the outputs, ``None`` for one that
        the loss does not use.
    *inputs : dask.array.Array
        Inputs of the operation, bare or not, as in `map_items`.
    data : sequence of dask.array.Array
        Other arrays that the loss needs, such as targets and weights, with the batch axes of the inputs in front.
    loss_per : {"item", "block"}
        What the loss returns a number for. With ``"block"`` the value is the sum of these numbers, and the gradient is
        that of the sum. A mean over all items divides by their number in the loss, because blocks differ in length.
    throw : bool, default True
        Raise the errors of the operation and its VJP. With ``False`` the gradient of such an item is NaN, and so are
        outputs that have not converged.
    **options
        Options of the operation and of its VJP.

    Returns
    -------
    value : (...) dask.array.Array, or () with ``loss_per="block"``
    gradients : dask.array.Array, or a tuple of them
        One for each input. Errors are those of `map_items`.

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
    if loss_per not in ("item", "block"):
        raise ValueError(f'loss_per is {loss_per!r}, expected "item" or "block".')
    inputs, data = on_blocks(numbers_as_arrays(rule.forward, inputs, _as_dask)), on_blocks(data)
    names = names_of(rule.function, inputs, options_of(rule, options)[0])
    bind(rule, options)  # raises for options that only the VJP misses
    given = [Given(*each) for each in zip(names, inputs, items_of(rule)[0][: len(inputs)], strict=True)]
    sizes, dtype = checked(given, options)
    # The axes of data behind the batch axes have no names, and their dtypes are free.
    batch = max(len(each.batch) for each in given)
    refuse_others((f"data[{j}]", x) for j, x in enumerate(data))
    others = [Given(f"data[{j}]", x, Item(("",) * (x.ndim - batch), "?")) for j, x in enumerate(data)]
    checked(others, {})
    # The task returns the values and one gradient for each input.
    outputs = [_Output((), Item((), "r").dtype_of(dtype), None, of_block=loss_per == "block")]
    outputs += [_Output(tuple(sizes[axis] for axis in each.item.axes), dtype, each) for each in given]
    run = partial(_value_and_gradients, rule.name, loss, loss_per, batch, len(inputs), throw, options)
    value, *gradients = _blockwise(f"{rule.name}_gradient", run, given + others, outputs)
    return value, gradients[0] if len(gradients) == 1 else tuple(gradients)


def reduce_blocks(reducer: Reducer, /, *collections: Any, split_every: int = 4) -> Any:
    """The result of a reducer over the blocks of collections: one update per block, merged in a tree, in order.

    Parameters
    ----------
    reducer : Reducer
        From `gram_reducer`, `sum_reducer` or `ggn_reducer`.
    *collections : dask.array.Array, or sequence of Delayed
        The arguments of ``reducer.update``, block by block: arrays with the same chunks along one axis, or sequences
        with one Delayed per shard.
    split_every : int, default 4
        The most states that one task merges. More states need more memory in a task and fewer rounds.

    Returns
    -------
    result : dask.delayed.Delayed
        The result of ``reducer.finalise``.

    Raises
    ------
    ValueError
        Collections in different numbers or sizes of blocks, or chunked along two axes; none at all; `split_every`
        below 2.

    Notes
    -----
    If ``reducer.init`` takes the number of the first sample, as that of `ggn_reducer`, it gets it. Blocks without
    samples are left out. The reducer, which holds the parameters of a network, is sent to each worker once.

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
    # The reducer is a separate value of the graph: it is not sent with every task.
    held = dask.delayed(SimpleNamespace(**reducer._asdict()), traverse=False)
    update, merge = dask.delayed(_update), dask.delayed(_merged)
    numbered = "first" in inspect.signature(reducer.init).parameters
    firsts = _firsts(collections, shards) if numbered else [None] * len(shards)
    states = [update(held, first, *shard) for first, shard in zip(firsts, shards, strict=True)]
    while len(states) > 1:
        states = [merge(held, states[i : i + split_every]) for i in range(0, len(states), split_every)]
    return held.finalise(states[0])


# --- the graph -------------------------------------------------------------------------------------------------------


class _Output(NamedTuple):
    """A result: the shape of an item, the dtype, and for a cotangent the argument that has its batch axes."""

    shape: tuple[int, ...]
    dtype: Any
    like: Given | None
    of_block: bool = False
    """Whether a block gives a single number, with axes of length one, which are summed over the blocks."""


def _blockwise(
    name: str, run: Callable[..., Any], given: Sequence[Given], outputs: Sequence[_Output]
) -> list[da.Array]:
    """Call `run` on every block, and return one array for each entry of the tuples that it returns.

    One layer of the graph has a task per block, which returns a tuple. Another layer for each result picks an entry of
    the tuples. Dask can fuse the layers.
    """
    lead = max(len(each.batch) for each in given)
    lengths = [_batch_length(j - lead, given) for j in range(lead)]
    # Batch axes have the same index in all arrays, except where an array of length one is repeated; Dask then hands
    # the only block to every task. The axes of an item have an index that no other array has.
    batch = tuple(f"batch{j}" for j in range(lead))
    pairs: list[Any] = []
    for n, each in enumerate(given):
        repeated = _repeated(each, lengths)
        index = [f"{n}:{j}" if j in repeated else batch[j] for j in range(lead - len(each.batch), lead)]
        pairs += [each.array, (*index, *(f"{n}.{a}" for a in range(len(each.item.axes))))]
    nothing = np.empty((0,) * lead, dtype=object)
    tuples = da.blockwise(run, batch, *pairs, token=name, dtype=object, meta=nothing)

    arrays = []
    for place, (shape, dtype, like, of_block) in enumerate(outputs):
        own = tuple(f"own{a}" for a in range(len(shape)))
        missing = lead if of_block else 0 if like is None else lead - len(like.batch)
        repeated = [] if like is None else _repeated(like, lengths)
        array = da.blockwise(
            partial(_entry, place, 0 if of_block else missing), (*batch, *own), tuples, batch, token=f"{name}-{place}",
            new_axes=dict(zip(own, shape, strict=True)),
            adjust_chunks=dict.fromkeys([*batch[:missing], *(batch[j] for j in repeated)], 1),
            meta=np.empty_like(meta_from_array(given[0].array._meta, ndim=lead + len(own)), dtype=dtype),
        )  # fmt: skip
        # The function sums the cotangent of a shared array inside a block; sum it over the blocks too.
        array = array.sum(axis=tuple(repeated), keepdims=True) if repeated else array
        arrays.append(array.sum(axis=tuple(range(missing))) if missing else array)
    return arrays


def _batch_length(axis: int, given: Sequence[Given]) -> float:
    """The common length of a batch axis, which is counted from the last one: -1, -2, ..."""
    found = {each.name: each.batch[axis] for each in given if len(each.batch) >= -axis and each.batch[axis] != 1}
    if len({length for length in found.values() if not math.isnan(length)}) > 1:
        raise ValueError(f"Batch axes do not fit each other: batch axis {axis} has length {found}.")
    return next(iter(found.values()), 1)


def _repeated(each: Given, lengths: Sequence[float]) -> list[int]:
    """Batch axes in which the array has length one and others do not."""
    missing = len(lengths) - len(each.batch)
    return [j for j in range(missing, len(lengths)) if each.batch[j - missing] == 1 != lengths[j]]


def _as_dask(number: float, x: Any) -> Any:
    """A number as a Dask array of the dtype of another one, which may not be one and is refused later."""
    return da.from_array(np.asarray(number, getattr(x, "dtype", None)))


def _present(nested: Any) -> list[Any]:
    """The entries of nested tuples that are not ``None``, in order."""
    return [entry for entry in leaves((nested,)) if entry is not None]


# --- on a worker -----------------------------------------------------------------------------------------------------


def _entry(place: int, missing: int, result: tuple[Array, ...]) -> Array:
    """An entry of a block's tuple, with an axis of length one for every batch axis that it lacks."""
    return result[place][(None,) * missing] if missing else result[place]


def _unlisted(block: Any) -> Array:
    """The array inside the lists that Dask hands over for axes that are not in the result."""
    while isinstance(block, list):
        (block,) = block
    return block


def _call(
    function: Callable[..., Any], count: int, given: tuple[int, ...], options: dict[str, Any], *blocks: Any
) -> tuple[Array, ...]:
    """The task of `map_items`."""
    found = dict(zip(given, map(_unlisted, blocks), strict=True))
    return tuple(_present(function(*(found.get(i) for i in range(count)), **options)))


def _value_and_gradients(
    name: str,
    loss: Callable[..., Any],
    loss_per: str,
    lead: int,
    count: int,
    throw: bool,
    options: dict[str, Any],
    *blocks: Any,
) -> tuple[Array, ...]:
    """The task of `map_gradients`."""
    rule, arrays = RULES[name], [_unlisted(block) for block in blocks]
    inputs, data = arrays[:count], arrays[count:]
    # Run the forward. Outputs that have not converged are NaN.
    forward, vjp = ({**o, "throw": throw} if "throw" in o else o for o in options_of(rule, options))
    result = rule.forward(*inputs, **forward)
    (outputs, saved), info = result if rule.info is not None else (result, None)
    outputs = as_tuple(outputs)
    if info is not None:
        outputs = tuple(nan_where(~spread(info.converged, y), y) for y in outputs)
    # Run the loss, and check its value: one for all, or those of the batch axes of the first output.
    value, bars = loss(*outputs, *data)
    first = items_of(rule)[1][0]
    items = outputs[0].shape[: outputs[0].ndim - len(first.axes)]
    check_shapes(value=(value, items if loss_per == "item" else ()))
    check_dtypes(value=(value, outputs[0].real.dtype))
    if loss_per == "block":
        value = value.reshape((1,) * lead)
    needed = (inputs[i] for i in rule.needs if i < count)
    return value, *plain_vjp(rule)(*as_tuple(bars), *outputs, *saved, *needed, **vjp)[:count]


# --- reducers --------------------------------------------------------------------------------------------------------


def _shards(collections: Sequence[Any]) -> list[tuple[Any, ...]]:
    """One tuple of Delayed per block, with an entry for each collection."""
    columns, chunks = [], set()
    for i, collection in enumerate(collections):
        if not isinstance(collection, da.Array):
            columns.append(list(collection))
            continue
        # An array is chunked along one axis at most, and known chunks must agree with those of the others.
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
