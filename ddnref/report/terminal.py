"""The terminal: one console, and a progress bar that is not there when the output goes to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_WIDTH = 120  # of a log file, where there is no terminal to ask

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""``for item in track(items, description)`` shows the progress of a loop."""


def console() -> Console:
    """A console on stdout; wide enough for tables where stdout is a file or a pipe."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


@contextmanager
def progress(on: Console) -> Iterator[Track]:
    """Yield a `Track`; outside a terminal it iterates and says nothing."""
    if not on.is_terminal:
        yield lambda items, description: items  # noqa: ARG005
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=on, transient=True) as bars:
        yield lambda items, description: _tracked(bars, items, description)


def _tracked(bars: Progress, items: Sequence[Any], description: str) -> Iterable[Any]:
    task = bars.add_task(description, total=len(items))
    for item in items:
        yield item
        bars.advance(task)
    bars.remove_task(task)
