"""Checks of static facts: dtypes and shapes of the arrays that a function is given."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, Namespace, is_complex, namespace, real_dtype


class Conformed(NamedTuple):
    """What arrays that fit a signature have in common."""

    xp: Namespace
    batch: tuple[int, ...]
    """Their batch axes, those of the first array."""
    sizes: dict[str, int]
    """The length of each named axis."""


def conform(signature: str, /, *, real_only: bool = False, **arrays: Array | None) -> Conformed:
    """Validate named arrays against a signature such as ``"(m,m),(m)r,(m,k)"``, one part for each array in order.

    The first array, which must be given, defines the dtype and the batch axes; each axis is defined by the first
    array that has it. So the arrays that a user is least likely to have wrong come first, and the message names the one
    that does not fit them. ``None`` arrays are skipped.

    Parameters
    ----------
    signature
        ``(m,k)`` names trailing axes. ``m+`` must have at least length one. A suffix ``r`` asks for the real dtype of
        the same precision; without one the dtype is that of the first array.
    real_only
        Refuse complex arrays: the operation is defined for real ones.
    arrays
        In the order of the parts.

    Raises
    ------
    TypeError
        Arrays of different libraries, devices or dtypes, a dtype that is not floating, or complex where refused.
    ValueError
        A shape that does not fit.
    """
    xp = namespace(**arrays)
    if real_only:
        check_real(**arrays)
    parts = [(axes.split(",") if axes else [], kind) for axes, kind in re.findall(r"\(([^)]*)\)(\w?)", signature)]
    first = next(iter(arrays.values()))
    assert first is not None  # noqa: S101
    core = len(parts[0][0])
    sizes: dict[str, int] = {}
    batch = tuple(first.shape[: max(first.ndim - core, 0)])
    for (name, array), (axes, kind) in zip(arrays.items(), parts, strict=True):
        if array is None:
            continue
        shape, letters = tuple(array.shape), [axis.rstrip("+") for axis in axes]
        own = shape[len(shape) - len(axes) :] if len(shape) >= len(axes) else ()
        for letter, size in zip(letters, own, strict=False):
            sizes.setdefault(letter, size)
        empty = any(axis[-1] == "+" and not sizes.get(axis[:-1]) for axis in axes)
        expected = (*batch, *(sizes.get(letter, -1) for letter in letters))
        if shape != expected or empty:
            # Letters describe the first array, and one with too few axes; numbers are clearer for all others.
            if array is first or -1 in expected:
                least = f" with {' and '.join(letters)} at least 1" if empty else ""
                square = ": square in its last two axes" if letters[:1] * 2 == letters else ""
                raise ValueError(f"{name} has shape {shape}, expected (..., {', '.join(letters)}){least}{square}.")
            raise ValueError(f"{name} has shape {shape}, expected {expected}.")
        check_dtypes(**{name: (array, real_dtype(xp, first.dtype) if kind == "r" else first.dtype)})
    return Conformed(xp, batch, sizes)


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
        if array is not None and tuple(array.shape) != tuple(shape):
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
