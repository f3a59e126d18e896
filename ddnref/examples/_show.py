"""Show the results of a story: print them, or hand them to the runner that makes a page of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from ddnref.verify._backends import Backend

Cell: TypeAlias = str | int | float
T = TypeVar("T")

BLUE, ORANGE, GREEN, GREY = "#0067a5", "#c4501b", "#2b8a57", "#6b6b6b"
LOOK: Any = {  # of every figure, in the gallery and in the report
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "figure.dpi": 110,
    "figure.facecolor": "white",
}


class Settings:
    """The choices of whoever runs a story; the gallery uses these defaults."""

    def __init__(self) -> None:
        self.full: bool = False
        """Whether to take the time for every size and seed."""
        self.seed: int = 0
        self.backend: Backend = Backend("numpy", np.__version__, np.asarray, np.asarray)
        """The array library: ``settings.backend.convert(array)`` and ``.to_numpy(array)``."""


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


class Headline(NamedTuple):
    """One of the few results that a reader should take away."""

    label: str
    values: tuple[str, ...]


class Check(NamedTuple):
    """A measured error and the limit that it has to keep."""

    label: str
    error: float
    limit: float


class CheckError(Exception):
    """A story measured an error above its limit."""


settings = Settings()
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


def picture(
    name: str, figure: Any, caption: str, alt: str, columns: Sequence[str] = (), rows: Sequence[Sequence[Cell]] = ()
) -> None:
    """Keep a finished figure; the report writes ``<story>-<name>.png`` and its numbers to a CSV file.

    Outside the report pyplot shows the figure. Captions are written as the narrative. Call this after the last change.
    """
    if _recorder is not None:
        _recorder.add(Picture(name, figure, caption, alt, columns, rows))


def headline(label: str, *values: str) -> None:
    """State one of the few results that a reader should take away."""
    if _recorder is not None:
        _recorder.add(Headline(label, values))
    else:
        print(f"{label}: {', '.join(values)}")


def check(label: str, error: float, limit: float) -> None:
    """State an error and raise `CheckError` unless it is at most `limit`; NaN is above every limit."""
    if _recorder is not None:
        _recorder.add(Check(label, float(error), limit))
    else:
        print(f"{label}: {error:.1e}, at most {limit:.0e}")
    if not error <= limit:
        raise CheckError(f"{label}: {error:.1e} is more than {limit:.0e}.")


def track(items: Iterable[T], label: str) -> Iterable[T]:
    """Iterate over `items`; the report shows the progress."""
    if _recorder is None:
        return items
    tracked: Iterable[T] = _recorder.track(items, label)
    return tracked
