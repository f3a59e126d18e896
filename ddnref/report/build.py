"""``ddnref report``: run the stories, write the page, its pictures and its numbers."""

from __future__ import annotations

import csv
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap
from typing import TextIO, TypeVar

from threadpoolctl import threadpool_limits

import ddnref
from ddnref.examples._peers import compared, note, write_record
from ddnref.examples._show import Picture, Table
from ddnref.report.page import page
from ddnref.report.runner import FOLDER, Told, run
from ddnref.verify._backends import Backend

T = TypeVar("T")

STORIES = ["subspaces", "deblurring", "whitening", "rubber", "repeated_eigenvalues", "ladder"]
STORIES += ["iteration_digits", "ggn", "hessian"]
"""The chapters of the report, in order: names of scripts in ``ddnref/examples``."""


class Terminal:
    """Say which story is finished, and how far the present one is where there is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live = stream.isatty()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.stream.write(("\r\x1b[K" if self.live else "") + line + "\n")

    def show(self, line: str) -> None:
        """Show a line until the next one; nothing where the output goes to a file."""
        if self.live:
            self.stream.write(f"\r\x1b[K{line}")
            self.stream.flush()

    def track(self, items: Iterable[T], label: str) -> Iterator[T]:
        """Iterate and show the progress."""
        known = list(items)
        for i, item in enumerate(known):
            self.show(f"  {label} {i}/{len(known)}")
            yield item


def build(backend: Backend, out: Path, seed: int, *, full: bool = False, record: bool = False) -> tuple[Path, bool]:
    """Run all stories on a backend and write everything to `out`.

    Returns the path of the page, and whether all checks of errors passed. A story ends with the first that does not.
    With `record`, the stories of the gallery that compare with other frameworks run too, and all figures of these
    frameworks become the record that is read where they are not installed.
    """
    terminal = Terminal(sys.stdout)
    stories, names = [], list(STORIES)
    if record:
        compares = [path for path in FOLDER.glob("plot_*.py") if "figure(" in path.read_text(encoding="utf-8")]
        others = sorted(path.stem.removeprefix("plot_") for path in compares)
        names += [name for name in others if name not in names]
    # Matrices of 64×64 gain nothing from BLAS threads, which spin for seconds where other work has the cores.
    with threadpool_limits(1):
        for i, name in enumerate(names, 1):
            start = time.perf_counter()
            terminal.show(f"{i}/{len(names)} {name}")
            story = run(name, backend, seed, full=full, track=terminal.track)
            terminal.say(f"{i}/{len(names)} {story.title}: {time.perf_counter() - start:.0f} s")
            if story.failed:
                terminal.say(f"    FAILED: {story.failed}")
            stories.append(story)
            write_parts(story, out)

    # The page comes last, because its head shows the results of all stories.
    path = out / "index.html"
    path.write_text(page(stories, _facts(backend, seed, full), missing := note()), encoding="utf-8")
    results = [f"{story.title}\n{story.card.result}" for story in stories if story.card]
    for text in filter(None, [*results, missing]):
        terminal.say("\n" + "\n".join(line for part in text.splitlines() for line in wrap(part, 80)))
    passed = not any(story.failed for story in stories)
    if record and passed:
        write_record()
    terminal.say(f"\nThe page: {path}")
    return path, passed


def write_parts(story: Told, out: Path) -> None:
    """Write every table and picture as ``<story>-<part>.csv``, every picture as ``.png`` too."""
    for part in story.parts:
        if not isinstance(part, (Table, Picture)):
            continue
        name = f"{story.name}-{part.name}"
        if isinstance(part, Picture):
            (out / f"{name}.png").write_bytes(part.figure)
        if part.columns:
            with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(part.columns)
                writer.writerows(part.rows)


def _facts(backend: Backend, seed: int, full: bool) -> list[tuple[str, str]]:
    found = {"ddnref": ddnref.__version__, "Python": platform.python_version()}
    found |= {name: version(name) for name in ("NumPy", "array-api-compat", "Matplotlib", "scikit-learn")}
    return [
        ("Made by:", f"ddnref report --backend {backend.name} --seed {seed}{' --full' if full else ''}"),
        ("Check every derivative on your machine:", f"ddnref verify --backend {backend.name}"),
        ("Backend:", f"{backend.name} {backend.version}, double precision"),
        ("Versions:", ", ".join(f"{name} {number}" for name, number in found.items())),
        ("Compared with:", compared()),
    ]
