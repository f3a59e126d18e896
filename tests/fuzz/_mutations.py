"""Mutations of an input and what must follow, one for every kind that the documentation names."""

from __future__ import annotations

from collections.abc import Callable

from ddnref.verify._hard import HARD

from ._options import keyword, option, throw
from ._site import Hostile, Site
from ._stored import (
    broadcast,
    byte_order,
    container,
    dtype,
    foreign_dtype,
    layout,
    library,
    mixed_library,
    mixed_precision,
    none,
    single,
    subclass,
)
from ._values import (
    again,
    batches,
    derivative,
    empty,
    hard,
    items,
    linear,
    not_finite,
    order,
    scale,
    scale_bars,
    scale_single,
    shape,
)

MUTATIONS: dict[str, Callable[[Site], Hostile | None]] = {
    "strides, order, alignment, read-only": layout,
    "stride 0": broadcast,
    "byte order": byte_order,
    "memory map, subclass": subclass,
    "wrong dtype": dtype,
    "wrong dtype of PyTorch": foreign_dtype,
    "float32": single,
    "mixed precision": mixed_precision,
    "not an array": container,
    "None": none,
    "another library or device": library,
    "mixed libraries or devices": mixed_library,
    "shape": shape,
    "batch axes that disagree": batches,
    "empty": empty,
    "NaN or infinity in one item": not_finite,
    "scale up to 2**±1000": scale,
    "scale up to 2**±120, float32": scale_single,
    "scale of the cotangents": scale_bars,
    "as it is, item by item": items,
    "items reordered": order,
    "twice": again,
    "sum of cotangents": linear,
    "finite differences": derivative,
    "option out of range or of wrong type": option,
    "unknown keyword": keyword,
    "throw=False": throw,
    **dict.fromkeys(HARD, hard),
}
"""Kinds of the table in the documentation, in its order."""
GENERAL = tuple(kind for kind in MUTATIONS if kind not in HARD)
"""The kinds that are tried on any target."""
