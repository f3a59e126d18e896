"""Run a story: execute its code block by block and keep its narrative, what it prints, its tables and pictures."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import matplotlib as mpl
import matplotlib.pyplot as plt

import ddnref.examples
from ddnref.examples import CheckError
from ddnref.examples._show import LOOK, Cell, recording
from ddnref.verify._backends import Backend

FOLDER = Path(ddnref.examples.__file__).parent
DPI = 160
T = TypeVar("T")
Track = Callable[[Iterable[Any], str], Iterable[Any]]


class Narrative(NamedTuple):
    """Text between code, in reStructuredText."""

    rst: str


class Code(NamedTuple):
    """A block of code, as the script has it."""

    source: str


class Printed(NamedTuple):
    """What the code above it printed."""

    text: str


class Table(NamedTuple):
    """Numbers, shown rounded and written to a CSV file in full."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    format: str


class Picture(NamedTuple):
    """A figure as a PNG file, with the numbers that it shows."""

    name: str
    caption: str
    alt: str
    png: bytes
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Check(NamedTuple):
    """A measured error and the limit that it has to keep."""

    label: str
    error: float
    limit: float


class Headline(NamedTuple):
    """One of the few results that a reader should take away."""

    label: str
    values: tuple[str, ...]


Part: TypeAlias = Narrative | Code | Printed | Table | Picture | Check


class Told(NamedTuple):
    """A story after it was run."""

    name: str
    title: str
    parts: list[Part]
    headlines: list[Headline]
    failed: str
    """The message of the check that ended it, or an empty string."""
    namespace: dict[str, Any]


class Block(NamedTuple):
    """A part of a script: text, or code with the numbers of its first and last line."""

    text: str
    lines: tuple[int, int] | None


def split(source: str) -> tuple[str, list[Block]]:
    """Split a script in sphinx-gallery's format into its title and its blocks of text and code."""
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree)
    if docstring is None:
        raise ValueError("The script has no docstring, which is the first text of its page.")
    title, _, rest = docstring.partition("\n")
    blocks = [Block(rest.partition("\n")[2].strip(), None)]
    lines = source.splitlines()
    i = tree.body[0].end_lineno or 0  # the first line after the docstring, counted from 0
    while i < len(lines):
        begin, is_text = i, lines[i].startswith("# %%")
        i += 1
        # A text goes on while there are comments, code until the next text.
        while i < len(lines) and (lines[i].startswith("#") if is_text else not lines[i].startswith("# %%")):
            i += 1
        if is_text:
            blocks.append(Block("\n".join(re.sub("^# ?", "", line) for line in lines[begin + 1 : i]), None))
        elif any(line.strip() for line in lines[begin:i]):
            shown = [line for line in lines[begin:i] if not line.startswith("# sphinx_gallery_")]
            blocks.append(Block("\n".join(shown).strip("\n"), (begin + 1, i)))
    return title, blocks


class Recorder:
    """Collect the parts of a running story in their order."""

    def __init__(self, track: Track) -> None:
        self.parts: list[Part] = []
        self.headlines: list[Headline] = []
        self.stdout = io.StringIO()
        self._track = track

    def add(self, part: Part) -> None:
        """Add a part below everything that was printed before it."""
        if text := self.stdout.getvalue():
            self.parts.append(Printed(text))
            self.stdout.seek(0)
            self.stdout.truncate()
        self.parts.append(part)

    def table(self, name: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]],
              format: str) -> None:  # fmt: skip
        """Keep a table."""
        self.add(Table(name, caption, columns, rows, format))

    def picture(self, name: str, figure: Any, caption: str, alt: str, columns: Sequence[str],
                rows: Sequence[Sequence[Cell]]) -> None:  # fmt: skip
        """Keep a figure, as it is now."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})  # the same bytes for the same figure
        self.add(Picture(name, caption, alt, buffer.getvalue(), columns, rows))

    def headline(self, label: str, values: tuple[str, ...]) -> None:
        """Keep a result for the head of the page."""
        self.headlines.append(Headline(label, values))

    def check(self, label: str, error: float, limit: float) -> None:
        """Keep an error and its limit; the story raises where the limit is exceeded."""
        self.add(Check(label, error, limit))

    def track(self, items: Iterable[T], label: str) -> Iterable[T]:
        """Show the progress of a loop."""
        return self._track(items, label)


def run(
    name: str,
    backend: Backend,
    seed: int = 0,
    *,
    full: bool = False,
    track: Track = lambda items, label: items,  # noqa: ARG005
    constants: Mapping[str, Any] | None = None,
) -> Told:
    """Run ``ddnref/examples/plot_<name>.py``.

    Parameters
    ----------
    name : str
    backend, seed, full
        What ``ddnref.examples.settings`` says while the story runs.
    track : callable
        Wraps the loops that the story names, to show progress.
    constants : mapping, optional
        Values for constants that the script assigns at its top level, in place of those that stand there. Tests make
        stories small with it.

    Raises
    ------
    KeyError
        The script assigns no constant of that name.
    """
    path = FOLDER / f"plot_{name}.py"
    source = path.read_text(encoding="utf-8")
    title, blocks = split(source)
    tree, replaced = _replace(ast.parse(source), constants or {}, name)
    recorder, failed = Recorder(track), ""
    namespace: dict[str, Any] = {"__name__": f"ddnref.examples.plot_{name}", "__file__": str(path), **replaced}
    with (
        recording(recorder, full=full, seed=seed, backend=backend),
        _figures(),
        contextlib.redirect_stdout(recorder.stdout),
    ):
        for block in blocks:
            if block.lines is None:
                recorder.add(Narrative(block.text))
                continue
            recorder.add(Code(block.text))
            # Statements keep their line numbers, so that a traceback points into the script.
            first, last = block.lines
            body = [node for node in tree.body if first <= node.lineno <= last]
            try:
                exec(compile(ast.Module(body, []), str(path), "exec"), namespace)
            except CheckError as error:
                failed = str(error)
                break
            finally:
                plt.close("all")
        recorder.add(Narrative(""))  # below what was printed last
    parts = [part for part in recorder.parts if part != Narrative("")]
    return Told(name, title, parts, recorder.headlines, failed, namespace)


def _replace(tree: ast.Module, constants: Mapping[str, Any], story: str) -> tuple[ast.Module, dict[str, Any]]:
    """Let the script's assignments of these constants read other values, under names that it does not use."""
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in constants:
                values[f"__{name}"] = constants[name]
                node.value = ast.copy_location(ast.Name(f"__{name}", ast.Load()), node.value)
    for name in constants:
        if f"__{name}" not in values:
            raise KeyError(f"The story {story} assigns no constant {name}.")
    return tree, values


@contextlib.contextmanager
def _figures() -> Any:
    """Draw without a window, in the look of the gallery, and leave pyplot as it was."""
    before, show = mpl.get_backend(), plt.show
    plt.switch_backend("agg")
    plt.show = lambda *_, **__: None
    try:
        with mpl.rc_context(LOOK):
            yield
    finally:
        plt.show = show
        plt.switch_backend(before)
