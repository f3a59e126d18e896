"""Checks of static facts: dtypes and shapes of the arrays that a function is given."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, Namespace, is_complex, namespace, real_dtype


class Conformed(NamedTuple):
    """Namespace, batch axes and sizes of arrays that fit a signature."""

    xp: Namespace
    batch: tuple[int, ...]
    """Their batch axes, those of the first array."""
    sizes: dict[str, int]
    """The length of each named axis."""


def conform(
    signature: str, /, *, real_only: bool = False, sizes: dict[str, int] | None = None, **arrays: Array | None
) -> Conformed:
    """Validate named arrays against a signature such as ``"(m,m),(m)r,(m,k)"``, one part for each array in order.

    The first array, which must be given, defines the dtype and the batch axes; each axis is defined by the first
    array that has it. So the arrays that a user is least likely to have wrong come first, and the message names the one
    that does not fit them. ``None`` arrays are skipped.

    ``(m,k)`` names trailing axes. ``m+`` must have at least length one. A suffix ``r`` asks for the real dtype of the
    same precision; without one the dtype is that of the first array. With `real_only` complex arrays are refused.
    `sizes` has lengths of axes that are known from elsewhere, such as an option. Libraries, devices and dtypes that do
    not fit raise ``TypeError``, shapes ``ValueError``.
    """
    # Library, device and dtype kinds are common to all arrays.
    xp = namespace(**arrays)
    if real_only:
        check_real(**arrays)
    # That the first array is given is for the caller to ensure.
    parts = _parsed(signature)
    first = next(iter(arrays.values()))
    assert first is not None  # noqa: S101
    dtype, number = first.dtype, real_dtype(xp, first.dtype)
    lengths = dict(sizes or {})
    batch = tuple(first.shape[: max(first.ndim - len(parts[0].axes), 0)])
    for (name, array), (axes, not_empty, is_real) in zip(arrays.items(), parts, strict=True):
        if array is None:
            continue
        shape, wanted = tuple(array.shape), number if is_real else dtype
        expected = batch
        # The first array that has an axis defines its length.
        for i, axis in enumerate(axes, len(shape) - len(axes)):
            if axis not in lengths and len(shape) >= len(axes):
                lengths[axis] = shape[i]
            expected += (lengths.get(axis, -1),)
        # An axis marked with + must not be empty.
        empty = bool(not_empty) and not all(map(lengths.get, not_empty))
        if shape != expected or empty:
            # Letters describe the first array, and one with too few axes; numbers are clearer for all others.
            if array is first or -1 in expected:
                least = f" with {' and '.join(not_empty)} at least 1" if empty else ""
                square = ": square in its last two axes" if axes[:1] * 2 == axes else ""
                raise ValueError(f"{name} has shape {shape}, expected (..., {', '.join(axes)}){least}{square}.")
            raise ValueError(f"{name} has shape {shape}, expected {expected}.")
        if array.dtype != wanted:
            # The slower function words the message.
            check_dtypes(**{name: (array, wanted)})
    return Conformed(xp, batch, lengths)


class _Part(NamedTuple):
    """One array of a signature."""

    axes: tuple[str, ...]
    not_empty: tuple[str, ...]
    is_real: bool


@lru_cache
def _parsed(signature: str) -> tuple[_Part, ...]:
    """The parts of a signature, kept: to parse one takes longer than all that is checked with it."""
    parts = [(text.split(",") if text else [], kind) for text, kind in re.findall(r"\(([^)]*)\)(\w?)", signature)]
    return tuple(
        _Part(tuple(a.rstrip("+") for a in axes), tuple(a[:-1] for a in axes if a[-1] == "+"), kind == "r")
        for axes, kind in parts
    )


def given(**arrays: Array | None) -> None:
    """Raise ``TypeError`` for an array that is ``None``."""
    for name, array in arrays.items():
        if array is None:
            raise TypeError(f"{name} is None: an array must be given.")


def check_dtypes(**pairs: tuple[Array | None, Any]) -> None:
    """Raise ``TypeError`` unless each named ``(array, dtype)`` agrees; ``None`` arrays are skipped."""
    for name, (array, dtype) in pairs.items():
        if array is not None and array.dtype != dtype:
            wanted = getattr(dtype, "__name__", dtype)
            raise TypeError(f"{name} has dtype {array.dtype}, expected {wanted}: nothing is converted silently.")


def check_precision(xp: Namespace, **arrays: Array) -> None:
    """Raise ``TypeError`` unless all are single or all double precision; real and complex go together."""
    if len({str(real_dtype(xp, array.dtype)) for array in arrays.values()}) > 1:
        kinds = ", ".join(f"{name}: {array.dtype}" for name, array in arrays.items())
        raise TypeError(f"All arrays must have one precision, but got {kinds}: nothing is converted silently.")


def check_shapes(**pairs: tuple[Array | None, tuple[int, ...]]) -> None:
    """Raise ``ValueError`` unless each named ``(array, shape)`` agrees; ``None`` arrays are skipped."""
    for name, (array, shape) in pairs.items():
        if array is not None and array.shape != shape and tuple(array.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {tuple(shape)}.")


def check_real(**arrays: Array | None) -> None:
    """Raise ``TypeError`` for a complex array where the operation is defined for real ones; ``None`` is skipped."""
    for name, array in arrays.items():
        if array is not None and is_complex(array):
            raise TypeError(f"{name} has dtype {array.dtype}; this operation is defined for real arrays only.")


def check_square(name: str, x: Array) -> None:
    """Raise ``ValueError`` unless `x` is a square matrix or a batch of them."""
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., m, m): square in its last two axes.")
