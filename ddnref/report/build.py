"""``ddnref report``: run the sections, write the page, its pictures and its numbers."""

from __future__ import annotations

import csv
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import array_api_compat
import matplotlib as mpl
import numpy as np
import sklearn
from rich.console import Console
from rich.markup import escape
from threadpoolctl import threadpool_limits

import ddnref
from ddnref.report import (
    curvature,
    deblurring,
    declarative,
    gaps,
    hessian,
    peers,
    profile,
    subspaces,
    terminal,
    whitening,
)
from ddnref.report.content import Content, Context, Headline, Picture, Section, Text
from ddnref.report.page import file_name, page
from ddnref.report.pictures import png, style
from ddnref.verify._backends import Backend

SECTIONS: tuple[Section, ...] = (
    subspaces.SECTION,
    whitening.SECTION,
    gaps.SECTION,
    profile.SECTION,
    declarative.SECTION,
    deblurring.SECTION,
    curvature.SECTION,
    hessian.SECTION,
)
"""The chapters of the report, in order. A new one is a file that defines a `Section`, and its name here."""


def build(backend: Backend, out: Path, seed: int, *, full: bool = False) -> Path:
    """Run all sections on a backend, write everything to `out`, and say where the page is."""
    console = terminal.console()
    found = _run(console, backend, seed, full)
    pictures: dict[str, bytes] = {}
    for section, content in found:
        pictures |= write_parts(section, content, out)
    path = out / "index.html"
    path.write_text(page(found, pictures, _facts(backend, seed, full)), encoding="utf-8")
    _say(console, path, [headline for _, content in found for headline in content.headlines])
    return path


def _run(console: Console, backend: Backend, seed: int, full: bool) -> list[tuple[Section, Content]]:
    found = []
    # Matrices of 64×64 gain nothing from BLAS threads, which spin for seconds where other work has the cores.
    with terminal.progress(console) as track, style(), threadpool_limits(1):
        for i, section in enumerate(SECTIONS, 1):
            start = time.perf_counter()
            found.append((section, section.run(Context(backend, seed, track, full))))
            took = time.perf_counter() - start
            console.print(f"{i}/{len(SECTIONS)} {escape(section.title)}: {took:.0f} s", soft_wrap=True)
    return found


def write_parts(section: Section, content: Content, out: Path) -> dict[str, bytes]:
    """Every table and picture as ``<section>-<part>.csv``, every picture as ``.png`` too, which is returned."""
    pictures = {}
    for part in content.parts:
        if isinstance(part, Text):
            continue
        name = file_name(section, part)
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(part.columns)
            writer.writerows(part.rows)
        if isinstance(part, Picture):
            pictures[name] = png(part.drawing)
            (out / f"{name}.png").write_bytes(pictures[name])
    return pictures


def _facts(backend: Backend, seed: int, full: bool) -> list[tuple[str, str]]:
    versions = {
        "ddnref": ddnref.__version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "array-api-compat": array_api_compat.__version__,
        "Matplotlib": mpl.__version__,
        "scikit-learn": sklearn.__version__,
    }
    compared = {name: version or "not installed" for name, version in peers.versions().items()}
    return [
        ("Made by:", f"ddnref report --backend {backend.name} --seed {seed}{' --full' if full else ''}"),
        ("Check every derivative on your machine:", f"ddnref verify --backend {backend.name}"),
        ("Backend:", f"{backend.name} {backend.version}, double precision"),
        ("Versions:", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Compared with:", ", ".join(f"{name} {version}" for name, version in compared.items())),
    ]


def _say(console: Console, path: Path, headlines: Sequence[Headline]) -> None:
    width = max(len(headline.label) for headline in headlines)
    for headline in headlines:
        console.print(f"{escape(headline.label):<{width}}  {escape(', '.join(headline.values))}", soft_wrap=True)
    console.print(f"The page: [bold]{escape(str(path))}[/bold]", soft_wrap=True)
