"""Static choices of columns: those of `index=`, or the top k eigenvectors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, full, index_dtype

Columns: TypeAlias = range | tuple[int, ...]


def columns_of(index: Sequence[int] | None, m: int) -> Columns:
    """Return the chosen columns as non-negative integers, as a range where they are consecutive."""
    if index is None:
        return range(m)
    # Everything that Python takes as an index is one, NumPy's integers too.
    try:
        given = [operator.index(i) for i in index]
    except TypeError:
        raise TypeError(f"index is {index!r}, expected a sequence of integers.") from None
    if any(not -m <= i < m for i in given):
        raise ValueError(f"index {tuple(given)} is out of range for a matrix with {m} columns.")
    # Count from the front, and refuse what is named twice.
    columns = tuple(i % m for i in given)
    if len(set(columns)) < len(columns):
        raise ValueError(f"index {tuple(given)} names a column twice; add their cotangents and name it once.")
    # A range lets `take` return a view.
    for step in (1, -1):
        run = range(columns[0], columns[0] + step * len(columns), step) if columns else range(0)
        if tuple(run) == columns:
            return run
    return columns


def take(x: Array, columns: Columns, axis: int) -> Array:
    """Return ``x`` at the chosen places along `axis` (−1 or −2); a range gives a view where the library has views."""
    xp = array_api_compat.array_namespace(x)
    if isinstance(columns, range):
        part = slice(min(columns, default=0), max(columns, default=-1) + 1)
        run = x[..., part] if axis == -1 else x[..., part, :]
        return run if columns.step == 1 else xp.flip(run, axis=axis)
    # Any other choice needs a gather.
    places = xp.asarray(list(columns), dtype=index_dtype(x), device=array_api_compat.device(x))
    return xp.take(x, places, axis=axis)


def scatter(x: Array, columns: Columns, m: int, axis: int) -> Array:
    """Return `x` at the chosen places of `m` along `axis` and zero elsewhere: the inverse of `take`."""
    if columns == range(m):
        return x
    xp = array_api_compat.array_namespace(x)
    zero = full((*x.shape[:-1], 1) if axis == -1 else (*x.shape[:-2], 1, x.shape[-1]), 0.0, x)
    # Unchosen columns all take the zero column appended at the end.
    place = {column: j for j, column in enumerate(columns)}
    return take(xp.concat([x, zero], axis=axis), tuple(place.get(i, len(columns)) for i in range(m)), axis)
