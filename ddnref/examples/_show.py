"""Show the results of a story: print them, or hand them to the runner that makes a page of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from ddnref.verify._backends import Backend

Cell: TypeAlias = str | int | float
T = TypeVar("T")


class Table(NamedTuple):
    """Numbers, shown rounded and written to a CSV file in full."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    format: str


class Picture(NamedTuple):
    """A figure, in the report as PNG, with the numbers that it shows."""

    name: str
    figure: Any
    caption: str
    alt: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Card(NamedTuple):
    """A story in a few words: the problem, a picture, what one writes and what comes out."""

    problem: str
    picture: Any
    code: str
    result: str


class Check(NamedTuple):
    """A measured error and the limit that it has to keep."""

    label: str
    error: float
    limit: float

    def __str__(self) -> str:
        error, limit = f"{self.error:.1e}" if self.error else "0", f"{self.limit:.0e}" if self.limit else "0"
        return f"{self.label}: {error}, at most {limit}"


class CheckError(Exception):
    """A story measured an error above its limit."""


settings = SimpleNamespace(  # the choices of whoever runs a story; the gallery uses these defaults
    full=False,  # whether to take the time for every size and seed
    seed=0,
    backend=Backend("numpy", np.__version__, np.asarray, np.asarray),  # to convert arrays, and back by ``to_numpy``
)
_recorder: Any = None  # the runner: ``add(result)`` keeps a result, ``track(items, label)`` shows progress


@contextmanager
def recording(recorder: Any, *, full: bool, seed: int, backend: Backend) -> Iterator[None]:
    """Send the results of the stories that run inside this context to `recorder`, with these settings."""
    global _recorder
    before = _recorder, dict(vars(settings))
    _recorder = recorder
    vars(settings).update(full=full, seed=seed, backend=backend)
    try:
        yield
    finally:
        _recorder = before[0]
        vars(settings).update(before[1])


def shown(cell: Cell, spec: str) -> str:
    """Format a cell for a reader: floats rounded, NaN by its name."""
    if isinstance(cell, float):
        return "NaN" if math.isnan(cell) else format(cell, spec)
    return str(cell)


def table(name: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], format: str = ".1e") -> None:
    """Print an aligned table, every float in `format`; the report writes ``<story>-<name>.csv`` with all digits."""
    if _recorder is not None:
        _recorder.add(Table(name, caption, columns, rows, format))
        return
    cells = [list(columns), *([shown(cell, format) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(caption)
    for row in cells:
        first, *others = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join([f"{first.strip():<{widths[0]}}", *others]).rstrip())


def picture(name: str, figure: Any, caption: str, alt: str, columns: Sequence[str] = (), rows: Any = ()) -> None:
    """Keep a finished figure; the report writes ``<story>-<name>.png`` and its numbers to a CSV file.

    Outside the report pyplot shows the figure. Captions are written as the narrative. Call this after the last change.
    A dictionary of matrices becomes their rows, each after the name of its matrix and its number.
    """
    if isinstance(rows, dict):
        rows = [(key, i, *row) for key, matrix in rows.items() for i, row in enumerate(matrix)]
    if _recorder is not None:
        _recorder.add(Picture(name, figure, caption, alt, columns, rows))


def card(problem: str, picture: Any, code: str, result: str) -> None:
    """Say what a story is good for, to a stranger: the head of the report shows it.

    The picture is a finished figure, or some of its axes, to which it is cropped.
    """
    if _recorder is not None:
        _recorder.add(Card(problem, picture, code, result))
    else:
        print(result)


def check(label: str, error: float, limit: float) -> None:
    """State an error and raise `CheckError` unless it is at most `limit`; NaN is above every limit."""
    said = Check(label, float(error), limit)
    if _recorder is not None:
        _recorder.add(said)
    else:
        print(said)
    if not error <= limit:
        raise CheckError(f"{label}: {error:.1e} is more than {limit:.0e}.")


def compare(label: str, found: Any, expected: Any, limit: float) -> None:
    """`check` the distance between two arrays, divided by the norm of the expected one."""
    check(label, float(np.linalg.norm(found - expected) / np.linalg.norm(expected)), limit)


def track(items: Iterable[T], label: str) -> Iterable[T]:
    """Iterate over `items`; the report shows the progress."""
    tracked: Iterable[T] = items if _recorder is None else _recorder.track(items, label)
    return tracked
