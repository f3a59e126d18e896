"""What a section of the report is made of. A new section is a file that defines one `Section`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from matplotlib.figure import Figure as Drawing

from ddnref.report.terminal import Track
from ddnref.verify._backends import Backend

Cell: TypeAlias = str | int | float


class Text(NamedTuple):
    """One paragraph; inline HTML allowed."""

    html: str


class Table(NamedTuple):
    """Numbers, shown rounded and written to a CSV file in full."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    format: str = ".1e"
    """How a float is shown."""


class Picture(NamedTuple):
    """A drawing with the numbers that it shows, which go to a CSV file beside it."""

    name: str
    caption: str
    alt: str
    drawing: Drawing
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]


Part: TypeAlias = Text | Table | Picture


class Headline(NamedTuple):
    """One of the few numbers that a reader should take away."""

    label: str
    values: tuple[str, ...]


class Content(NamedTuple):
    """What a section found."""

    parts: Sequence[Part]
    headlines: Sequence[Headline]


class Context(NamedTuple):
    """What a section is given."""

    backend: Backend
    seed: int
    track: Track
    full: bool = False
    """Whether to take the time for everything."""


class Section(NamedTuple):
    """One chapter of the report; `name` begins its file names."""

    name: str
    title: str
    run: Callable[[Context], Content]
