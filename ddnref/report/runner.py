"""Run a story: execute its code block by block and keep its narrative, what it prints, its tables and pictures."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.transforms import Bbox

import ddnref.examples
from ddnref.examples._look import LOOK
from ddnref.examples._show import Card, Check, CheckError, Picture, Table, recording
from ddnref.verify._backends import Backend

FOLDER = Path(ddnref.examples.__file__).parent
DPI = 160
Track = Callable[[Iterable[Any], str], Iterable[Any]]


class Narrative(NamedTuple):
    """Text between code, in reStructuredText."""

    rst: str


class Code(NamedTuple):
    """A block of code, as the script has it, and the numbers of its first and last line."""

    source: str
    lines: tuple[int, int] = (0, 0)


class Printed(NamedTuple):
    """Text that the code above it printed."""

    text: str


Part: TypeAlias = Narrative | Code | Printed | Table | Picture | Check


class Told(NamedTuple):
    """A story after it was run."""

    name: str
    title: str
    parts: list[Part]
    card: Card | None
    failed: str
    """The message of the check that ended it, or an empty string."""
    namespace: dict[str, Any]


def split(source: str) -> tuple[str, list[Narrative | Code]]:
    """Split a script in sphinx-gallery's format into its title and its blocks of text and code."""
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree)
    if docstring is None:
        raise ValueError("The script has no docstring, which is the first text of its page.")
    title, _, rest = docstring.partition("\n")
    blocks: list[Narrative | Code] = [Narrative(rest.partition("\n")[2].strip())]
    lines = source.splitlines()
    i = tree.body[0].end_lineno or 0  # the first line after the docstring, counted from 0
    while i < len(lines):
        begin, is_text = i, lines[i].startswith("# %%")
        i += 1
        # A text goes on while there are comments, code until the next text.
        while i < len(lines) and (lines[i].startswith("#") if is_text else not lines[i].startswith("# %%")):
            i += 1
        if is_text:
            blocks.append(Narrative("\n".join(re.sub("^# ?", "", line) for line in lines[begin + 1 : i])))
        elif any(line.strip() for line in lines[begin:i]):
            shown = [line for line in lines[begin:i] if not line.startswith("# sphinx_gallery_")]
            blocks.append(Code("\n".join(shown).strip("\n"), (begin + 1, i)))
    return title, blocks


class Recorder:
    """Collect the parts of a running story in their order."""

    def __init__(self, track: Track) -> None:
        self.parts: list[Part] = []
        self.card: Card | None = None
        self.stdout = io.StringIO()
        self.track = track

    def add(self, part: Part | Card) -> None:
        """Keep a part, below everything that was printed before it, or the card for the head of the page."""
        if text := self.stdout.getvalue():
            self.parts.append(Printed(text))
            self.stdout.seek(0)
            self.stdout.truncate()
        if isinstance(part, Card):
            self.card = part._replace(picture=_png(part.picture))
            return
        if isinstance(part, Picture):
            part = part._replace(figure=_png(part.figure))
        self.parts.append(part)


def _png(shown: Any) -> bytes:
    """Draw a figure, or the part of it that some axes take."""
    figure, box, buffer = shown, None, io.BytesIO()
    if not isinstance(shown, mpl.figure.Figure):
        axes = np.ravel(shown)
        figure = axes[0].figure
        for legend in figure.legends:
            legend.set_visible(False)  # it would move into the picture
        figure.draw_without_rendering()  # so that the axes are where the layout puts them
        box = Bbox.union([ax.get_tightbbox() for ax in axes])
        box = box.transformed(figure.dpi_scale_trans.inverted()).padded(0.05)
    # Without the name of the software, the same figure has the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, bbox_inches=box)
    return buffer.getvalue()


def run(
    name: str,
    backend: Backend,
    seed: int = 0,
    *,
    full: bool = False,
    track: Track = lambda items, label: items,  # noqa: ARG005
    constants: Mapping[str, Any] | None = None,
) -> Told:
    """Run ``ddnref/examples/plot_<name>.py`` with ``ddnref.examples.settings`` of this backend, seed and length.

    `track` wraps the loops that the story names, to show progress. `constants` are other values for constants that the
    script assigns at its top level; tests make stories small with them.
    """
    path = FOLDER / f"plot_{name}.py"
    source = path.read_text(encoding="utf-8")
    title, blocks = split(source)
    tree = _replace(ast.parse(source), constants or {}, name)
    recorder, failed = Recorder(track), ""
    namespace: dict[str, Any] = {"__name__": f"ddnref.examples.plot_{name}", "__file__": str(path)}
    with (
        recording(recorder, full=full, seed=seed, backend=backend),
        _figures(),
        contextlib.redirect_stdout(recorder.stdout),
    ):
        for block in blocks:
            recorder.add(block)
            if isinstance(block, Narrative):
                continue
            # Statements keep their line numbers, so that a traceback points into the script.
            body = [node for node in tree.body if block.lines[0] <= node.lineno <= block.lines[1]]
            try:
                exec(compile(ast.Module(body, []), str(path), "exec"), namespace)
            except CheckError as error:
                failed = str(error)
                break
            finally:
                plt.close("all")
        recorder.add(Narrative(""))  # below what was printed last
    parts = [part for part in recorder.parts if part != Narrative("")]
    return Told(name, title, parts, recorder.card, failed, namespace)


def _replace(tree: ast.Module, constants: Mapping[str, Any], story: str) -> ast.Module:
    """Change the values that the script assigns to these constants."""
    missing = set(constants)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in constants:
            node.value = ast.parse(repr(constants[node.targets[0].id]), mode="eval").body
            missing.discard(node.targets[0].id)
    if missing:
        raise KeyError(f"The story {story} assigns no constant {', '.join(sorted(missing))}.")
    return tree


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
