"""Dask's side of a rule: which arrays a function takes and returns, and the layers of the graph that call it.

Shapes and dtypes follow from the signature of the rule. One layer has a task for each block, which returns a tuple, and
one more layer for each result picks an entry of it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array

from ddnref._core.arrays import Array, namespace, real_dtype
from ddnref._core.checks import check_dtypes
from ddnref._rules.contract import Rule, input_counts
from ddnref._rules.table import RULES, rule_of

DTYPES = {"b": np.dtype(bool), "i": np.dtype(np.int32), "l": np.dtype(np.int64)}


@dataclass(frozen=True)
class Item:
    """One array of a signature: names of its own axes, "" where only their number is known, and its dtype's letter."""

    axes: tuple[str, ...]
    kind: str

    def dtype_of(self, dtype: Any) -> Any:
        return DTYPES.get(self.kind) or np.dtype(real_dtype(np, dtype) if self.kind == "r" else dtype)


class Given(NamedTuple):
    """One array that is given."""

    name: str
    array: Any
    item: Item


class Output(NamedTuple):
    """One array to come: shape of an item, dtype, and for a cotangent the array whose batch axes it has."""

    shape: tuple[int, ...]
    dtype: Any
    like: Given | None


class Called(NamedTuple):
    """One of the functions of a rule."""

    rule: Rule
    is_vjp: bool
    items: list[Item]
    """Of its arguments, in order."""
    nested: Any
    """The items of its results, nested as they are."""
    saves: bool = False

    def results(self, given: int) -> Any:
        """Nested items, without the cotangents of optional inputs that are not `given`: the function has ``None``."""
        required = input_counts(self.rule).start
        missing = len(self.items) - given
        if not (self.is_vjp and missing and isinstance(self.nested, tuple) and len(self.nested) > required):
            return self.nested
        return (*self.nested[: len(self.nested) - missing], *(None,) * missing)

    def like(self, place: int, given: dict[int, Given]) -> Given | None:
        """The array that has the batch axes of a cotangent: the input itself, or what the forward made of it."""
        rule, (inputs, outputs, saved, *_) = self.rule, items_of(self.rule)
        if not self.is_vjp or place >= len(inputs):
            return None
        after = 2 * len(outputs) + len(saved)
        own = given.get(after + rule.needs.index(place)) if place in rule.needs else None
        return own or given[2 * len(outputs) if saved and place == 0 else len(outputs)]


def items_of(rule: Rule) -> list[list[Item]]:
    """Items of inputs, outputs, saved arrays, and of both kinds of status."""
    parts = [re.findall(r"\(([^)]*)\)(\w?)", part) for part in rule.signature.split("->")]
    parts += [[]] * (5 - len(parts))
    return [[Item(tuple(filter(None, axes.split(","))), kind) for axes, kind in part] for part in parts]


def called(function: Callable[..., Any]) -> Called:
    """What a public function is of which rule, or ``TypeError``."""
    for rule in RULES.values():
        inputs, outputs, saved, info, vjp_info = items_of(rule)
        value: Any = outputs[0] if rule.outputs == 1 else tuple(outputs)
        if function is rule.vjp:
            bars = [Item(("",) * len(item.axes), item.kind) for item in outputs]
            needed = [inputs[i] for i in rule.needs]
            result: Any = inputs[0] if len(inputs) == 1 else tuple(inputs)
            if rule.vjp_info is not None:
                result = result, rule.vjp_info(*vjp_info)
            return Called(rule, True, [*bars, *outputs, *saved, *needed], result)
        if function is rule.forward:
            if not saved:
                raise TypeError(
                    f"How much {function.__name__} saves depends on the way it takes: map {rule.name}, and its VJP "
                    "with x and nothing saved, or use map_gradients, where nothing that is saved leaves a block."
                )
            value = value, tuple(saved)
        elif function is not rule.function:
            continue
        value = value if rule.info is None else (value, rule.info(*info))
        return Called(rule, False, inputs, value, function is rule.forward)
    return Called(rule_of(function), False, [], ())  # raises: it has no rule


def names_of(function: Callable[..., Any], arrays: Sequence[Any], options: dict[str, Any]) -> list[str]:
    """The names of the arrays, of a call that Python would accept."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*arrays, **options)
    except TypeError as error:
        raise TypeError(f"{function.__name__}: {error}. Arrays come by position, options by their names.") from None
    names: list[str] = []
    for name, value in bound.arguments.items():
        several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}[{i}]" for i in range(len(value))] if several else [name]
    refuse_others(zip(names, arrays, strict=False))  # options follow
    for name, value in options.items():
        if dask.is_dask_collection(value):
            raise TypeError(f"{name} is a Dask collection: options are the same for every block. Compute it first.")
    return names[: len(arrays)]


def refuse_others(arrays: Iterable[tuple[str, Any]]) -> None:
    """Raise ``TypeError`` for what is neither a Dask array nor ``None``."""
    for name, array in arrays:
        if not isinstance(array, da.Array) and array is not None:
            raise TypeError(
                f"{name} is of type {type(array).__name__}, not a Dask array: pass dask.array.from_array(..., "
                "chunks=...), and options by their names."
            )


def checked(given: Sequence[Given], options: dict[str, Any]) -> tuple[dict[str, int], Any]:
    """Sizes of the axes of an item, and the dtype that is neither the real one nor a status; static facts raise."""
    sizes: dict[str, int] = {}
    for name, array, item in given:
        own = len(item.axes)
        if array.ndim < own:
            raise ValueError(f"{name} has shape {array.shape}, expected (..., {', '.join(item.axes)}).")
        for axis, size, blocks in zip(item.axes, _last(array.shape, own), _last(array.numblocks, own), strict=True):
            if math.isnan(size):
                raise ValueError(f"{name} has an axis of unknown length inside an item: {name}.compute_chunk_sizes().")
            if blocks != 1:
                chunks = dict.fromkeys(range(-own, 0), -1)
                raise ValueError(
                    f"{name} is chunked along the last {own} axes, those of one item, which must be in one block: "
                    f"pass {name}.rechunk({chunks}), and chunk the batch axes in front of them."
                )
            if axis and sizes.setdefault(axis, size) != size:
                raise ValueError(f"{name} has shape {array.shape}, but its axis {axis} has length {sizes[axis]}.")
    floating = {name: array._meta for name, array, item in given if item.kind in ("", "r")}
    if not floating:
        return sizes, None
    namespace(**floating)
    dtype = next(array.dtype for _, array, item in given if item.kind == "")
    check_dtypes(**{name: (array, item.dtype_of(dtype)) for name, array, item in given})
    sizes.update({axis: options[axis] for axis in ("k", "n") if axis not in sizes and options.get(axis) is not None})
    sizes.setdefault("k", min(sizes.get("m", 0), sizes.get("n", 0)))
    sizes.setdefault("p", sizes.get("n", 0) + bool(options.get("bias", True)))
    return sizes, dtype


def _last(values: Sequence[Any], count: int) -> Sequence[Any]:
    return values[len(values) - count :]


# --- the graph -------------------------------------------------------------------------------------------------------


def blockwise(name: str, run: Callable[..., Any], given: Sequence[Given], outputs: Sequence[Output]) -> list[Any]:
    """One task a block, which returns a tuple, and one array for each entry of it: layers that Dask can fuse."""
    lead = max(array.ndim - len(item.axes) for _, array, item in given)
    batch = tuple(f"batch{j}" for j in range(lead))
    lengths = [_length(j - lead, given) for j in range(lead)]
    pairs: list[Any] = []
    for n, each in enumerate(given):
        index = [f"{n}:{j}" if j in _repeated(each, lengths) else batch[j] for j in range(lead)][_missing(each, lead) :]
        pairs += [each.array, (*index, *(f"{n}.{a}" for a in range(len(each.item.axes))))]
    nothing = np.empty((0,) * lead, dtype=object)
    parts = da.blockwise(run, batch, *pairs, token=name, dtype=object, meta=nothing)
    like = given[0].array._meta
    return [_part(f"{name}-{i}", parts, batch, i, output, like, lengths) for i, output in enumerate(outputs)]


def _part(
    name: str, parts: Any, batch: tuple[str, ...], place: int, output: Output, like: Any, lengths: Sequence[float]
) -> Any:
    """One entry of every block's tuple; the cotangent of what was repeated is a sum over blocks, too."""
    own = tuple(f"own{a}" for a in range(len(output.shape)))
    missing = 0 if output.like is None else _missing(output.like, len(batch))
    single = [] if output.like is None else _repeated(output.like, lengths)
    array = da.blockwise(
        partial(_entry, place, missing), (*batch, *own), parts, batch, token=name,
        new_axes=dict(zip(own, output.shape, strict=True)),
        adjust_chunks=dict.fromkeys([*batch[:missing], *(batch[j] for j in single)], 1),
        meta=np.empty_like(meta_from_array(like, ndim=len(batch) + len(own)), dtype=output.dtype),
    )  # fmt: skip
    array = array.sum(axis=tuple(single), keepdims=True) if single else array
    return array.sum(axis=tuple(range(missing))) if missing else array


def _missing(each: Given, lead: int) -> int:
    """How many batch axes the array lacks."""
    return int(lead - (each.array.ndim - len(each.item.axes)))


def _repeated(each: Given, lengths: Sequence[float]) -> list[int]:
    """Batch axes in which the array has length one and others have not."""
    missing = _missing(each, len(lengths))
    return [j for j in range(missing, len(lengths)) if each.array.shape[j - missing] == 1 != lengths[j]]


def _length(axis: int, given: Sequence[Given]) -> float:
    """Of a batch axis, counted from the last one."""
    found = {
        name: array.shape[axis - len(item.axes)]
        for name, array, item in given
        if array.ndim >= len(item.axes) - axis and array.shape[axis - len(item.axes)] != 1
    }
    if len({length for length in found.values() if not math.isnan(length)}) > 1:
        raise ValueError(f"Batch axes do not fit each other: batch axis {axis} has length {found}.")
    return next(iter(found.values()), 1)


def _entry(place: int, missing: int, result: tuple[Array, ...]) -> Array:
    return result[place][(None,) * missing] if missing else result[place]


def unlisted(block: Any) -> Array:
    """The array in the lists in which Dask hands over what is not chunked."""
    while isinstance(block, list):
        (block,) = block
    return block


def leaves(value: Any) -> Iterator[Any]:
    """The arrays in nested tuples, without ``None``."""
    if isinstance(value, tuple):
        for entry in value:
            yield from leaves(entry)
    elif value is not None:
        yield value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Nested tuples with `function` of every leaf; ``None`` stays."""
    if isinstance(value, tuple):
        entries = [mapped(function, entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    return None if value is None else function(value)
