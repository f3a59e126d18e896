"""The arrays that ddnref's functions take and return, for Dask: shapes and dtypes from the signatures of the rules."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import array_api_compat
import dask
import dask.array as da
import numpy as np

from ddnref._core.arrays import namespace, real_dtype
from ddnref._core.checks import check_dtypes
from ddnref._rules.binding import input_counts
from ddnref._rules.contract import Rule
from ddnref._rules.table import RULES, rule_of

DTYPES = {"b": np.dtype(bool), "i": np.dtype(np.int32), "l": np.dtype(np.int64)}


@dataclass(frozen=True)  # not a tuple, so that it is a leaf of nested tuples
class Item:
    """One array of a signature: the names of an item's axes ("" if only their number is known), and a dtype letter."""

    axes: tuple[str, ...]
    kind: str

    def dtype_of(self, dtype: Any) -> Any:
        """The dtype of this array where the inputs have `dtype`."""
        return DTYPES.get(self.kind) or np.dtype(real_dtype(np, dtype) if self.kind == "r" else dtype)


class Given(NamedTuple):
    """An argument: its name, the Dask array, and its place in the signature."""

    name: str
    array: Any
    item: Item

    @property
    def batch(self) -> tuple[float, ...]:
        """Lengths of the batch axes."""
        return tuple(self.array.shape[: self.array.ndim - len(self.item.axes)])


class Called(NamedTuple):
    """A function of a rule: the operation, its ``_fwd`` or its ``_vjp``."""

    rule: Rule
    is_vjp: bool
    items: list[Item]
    """Items of its arguments, in order."""
    nested: Any
    """Items of its results, nested as the results are."""

    def results(self, count: int) -> Any:
        """Nested items of the results of a call with `count` arguments."""
        required = input_counts(self.rule).start
        missing = len(self.items) - count
        if not (self.is_vjp and missing and isinstance(self.nested, tuple) and len(self.nested) > required):
            return self.nested
        # The VJP returns None for optional inputs that are not given.
        return (*self.nested[: len(self.nested) - missing], *(None,) * missing)

    def like(self, place: int, given: dict[int, Given]) -> Given | None:
        """The argument that has the batch axes of a cotangent; ``None`` for other results."""
        rule, (inputs, outputs, saved, *_) = self.rule, items_of(self.rule)
        if not self.is_vjp or place >= len(inputs):
            return None
        # The arguments are cotangents, outputs, saved arrays and inputs. Take the input itself if it is among them,
        # else what the forward made of it.
        after = 2 * len(outputs) + len(saved)
        own = given.get(after + rule.needs.index(place)) if place in rule.needs else None
        return own or given[2 * len(outputs) if saved and place == 0 else len(outputs)]


def items_of(rule: Rule) -> list[list[Item]]:
    """Items of inputs, outputs, saved arrays, the status of the operation and that of its VJP."""
    parts = [re.findall(r"\(([^)]*)\)(\w?)", part) for part in rule.signature.split("->")]
    parts += [[]] * (5 - len(parts))
    return [[Item(tuple(filter(None, axes.split(","))), kind) for axes, kind in part] for part in parts]


def called(function: Callable[..., Any]) -> Called:
    """Find the rule that a public function belongs to, or raise ``TypeError``."""
    for rule in RULES.values():
        inputs, outputs, saved, info, vjp_info = items_of(rule)
        if function is rule.vjp:
            # The axes of a cotangent have no names, because it may have fewer columns than its output.
            bars = [Item(("",) * len(item.axes), item.kind) for item in outputs]
            result: Any = inputs[0] if len(inputs) == 1 else tuple(inputs)
            if rule.vjp_info is not None:
                result = result, rule.vjp_info(*vjp_info)
            return Called(rule, True, [*bars, *outputs, *saved, *(inputs[i] for i in rule.needs)], result)
        if function is rule.forward and not saved:
            raise TypeError(
                f"The arrays that {function.__name__} saves depend on its method: map {rule.name}, and its VJP with x "
                "and nothing saved, or use map_gradients, where the saved arrays do not leave a block."
            )
        if function is rule.function or function is rule.forward:
            value: Any = outputs[0] if rule.outputs == 1 else tuple(outputs)
            value = (value, tuple(saved)) if function is rule.forward else value
            value = value if rule.info is None else (value, rule.info(*info))
            return Called(rule, False, inputs, value)
    return Called(rule_of(function), False, [], ())  # raises, because it has no rule


def names_of(function: Callable[..., Any], arrays: Sequence[Any], options: dict[str, Any]) -> list[str]:
    """The names of the arrays in a call; raise ``TypeError`` where Python would, and for what is not a Dask array."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*arrays, **options)
    except TypeError as error:
        raise TypeError(f"{function.__name__}: {error}. Pass arrays by position and options by name.") from None
    names: list[str] = []
    for name, value in bound.arguments.items():
        several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}[{i}]" for i in range(len(value))] if several else [name]
    refuse_others(zip(names, arrays, strict=False))  # the names of options follow
    for name, value in options.items():
        if dask.is_dask_collection(value):
            raise TypeError(f"{name} is a Dask collection: options are the same for every block. Compute it first.")
    return names[: len(arrays)]


def on_blocks(arrays: Iterable[Any]) -> tuple[Any, ...]:
    """The arrays, with bare ones of NumPy and CuPy as Dask arrays of one block."""
    return tuple(
        da.from_array(array, chunks=-1, asarray=False)
        if isinstance(array, np.ndarray) or array_api_compat.is_cupy_array(array)
        else array
        for array in arrays
    )


def refuse_others(arrays: Iterable[tuple[str, Any]]) -> None:
    """Raise ``TypeError`` for a value that is neither a Dask array nor ``None``."""
    for name, array in arrays:
        if not isinstance(array, da.Array) and array is not None:
            raise TypeError(
                f"{name} is of type {type(array).__name__}, not a Dask array: pass dask.array.from_array(..., "
                "chunks=...) or an array of NumPy, and options by their names."
            )


def checked(given: Sequence[Given], options: dict[str, Any]) -> tuple[dict[str, int], Any]:
    """Validate arrays; return the lengths of the named axes of an item and the dtype of the inputs."""
    sizes: dict[str, int] = {}
    for name, array, item in given:
        own, lead = len(item.axes), array.ndim - len(item.axes)
        if lead < 0:
            raise ValueError(f"{name} has shape {array.shape}, expected (..., {', '.join(item.axes)}).")
        # The axes of an item must have known lengths, lie in one block, and agree with those of the same name.
        for axis, size, blocks in zip(item.axes, array.shape[lead:], array.numblocks[lead:], strict=True):
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
    namespace(**floating)  # one library
    dtype = next(array.dtype for _, array, item in given if item.kind == "")
    check_dtypes(**{name: (array, item.dtype_of(dtype)) for name, array, item in given})
    # Results may have axes that no argument has: columns that an option asks for, or a bias.
    sizes.update({axis: options[axis] for axis in ("k", "n") if axis not in sizes and options.get(axis) is not None})
    sizes.setdefault("k", min(sizes.get("m", 0), sizes.get("n", 0)))
    sizes.setdefault("l", min(sizes.get("m", 0), sizes.get("n", 0)))
    sizes.setdefault("p", sizes.get("n", 0) + bool(options.get("bias", True)))
    return sizes, dtype
