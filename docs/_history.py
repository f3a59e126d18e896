"""Directives of the page on the history: the commits, the steps and the curves of what asv_benches/history holds."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

BENCHES = Path(__file__).resolve().parent.parent / "asv_benches"
sys.path.insert(0, str(BENCHES))
import _records
from _records import COUNTED, EXACT, MEMORY, ROUNDED, Point, Record

sys.path.remove(str(BENCHES))

KINDS = {"errors": ROUNDED, "counts": EXACT + COUNTED, "memory": MEMORY}
WIDTH, HEIGHT, MARGIN = 260, 70, 6
FEWEST = 10  # a curve has this many points at least


def recorded() -> list[Record]:
    """Return every record, in the order of the commits."""
    return [record for _, record in _records.read(BENCHES / "history")]


def commit(record: Record) -> str:
    """Return the beginning of the hash, the day and the subject of a recorded commit."""
    day = datetime.fromtimestamp(record["date"] / 1000, UTC).strftime("%Y-%m-%d")
    return f"{record['commit_hash'][:8]}, {day}: {record['subject']}"


def number(value: float) -> str:
    """Write a figure with the digits that a reader compares."""
    return f"{value:.3g}"


class HistoryDirective(SphinxDirective):
    """Show HTML that is made of the records."""

    def run(self) -> list[nodes.Node]:
        """Return it as one raw node, and build the page again where a record changed."""
        for path in (BENCHES / "history").glob("*/*.json"):
            self.env.note_dependency(str(path))
        return [nodes.raw("", "\n".join(self.html(recorded())), format="html")]

    def html(self, records: list[Record]) -> Iterator[str]:
        """Yield the HTML."""
        raise NotImplementedError


class Commits(HistoryDirective):
    """List the recorded commits, folded."""

    def html(self, records: list[Record]) -> Iterator[str]:
        """Yield how many there are, and one line for each."""
        every = {record["commit_hash"]: record for record in records}
        yield f"<details><summary>The {len(every)} recorded commits, newest first</summary><ul>"
        yield from (f"<li><code>{escape(commit(record))}</code></li>" for record in reversed(every.values()))
        yield "</ul></details>"


class Steps(HistoryDirective):
    """List the commits at which a figure took another level, newest first."""

    def html(self, records: list[Record]) -> Iterator[str]:
        """Yield a row for each commit with steps, and below it one for each of them."""
        found = sorted(_records.steps(_records.curves(records)), key=lambda s: (-s.record["revision"], s.name))
        yield '<div class="pst-scrollable-table-container"><table class="table history-steps"><thead><tr>'
        yield "<th>figure</th><th>before</th><th>after</th><th></th></tr></thead><tbody>"
        for said, steps in groupby(found, lambda step: commit(step.record)):
            yield f'<tr><th colspan="4">{escape(said)}</th></tr>'
            for step in steps:
                verdict = "worse" if step.new > step.old else "better"
                figure = f"<code>{escape(step.name)}</code>, {escape(step.unit)}"
                cells = "".join(f"<td>{cell}</td>" for cell in (figure, number(step.old), number(step.new), verdict))
                yield f'<tr class="{verdict}">{cells}</tr>'
        yield "</tbody></table></div>"


class Curves(HistoryDirective):
    """Draw every figure of a kind over the recorded commits: errors, counts or memory."""

    required_arguments = 1

    def html(self, records: list[Record]) -> Iterator[str]:
        """Yield a heading for each class of benchmarks, and below it a chart for each figure of it."""
        places = {h: i for i, h in enumerate(dict.fromkeys(record["commit_hash"] for record in records))}
        groups: dict[str, list[str]] = {}
        for name, points in sorted(_records.curves(records).items()):
            benchmark, _, parameters = name.partition("(")
            unit = points[-1].record["units"].get(benchmark)
            if len(points) >= FEWEST and unit in KINDS[self.arguments[0]]:
                owner, _, method = benchmark.rpartition(".")
                measured = method.removeprefix("track_").replace("_", " ")
                label = ", ".join(filter(None, (measured, parameters.removesuffix(")"))))
                groups.setdefault(owner, []).append(chart(label, unit, points, places))
        for owner, charts in groups.items():
            yield f'<p class="history-title"><code>{owner}</code>: {escape(purpose(owner))}</p>'
            yield f'<div class="history">{"".join(charts)}</div>'


def purpose(owner: str) -> str:
    """Return the summary of a class of benchmarks, or nothing if there is no such class any more."""
    module, _, name = owner.partition(".")
    path = BENCHES / "benchmarks" / f"{module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return (ast.get_docstring(found[0]) or "").partition("\n")[0].replace("`", "") if found else ""


def chart(label: str, unit: str, points: Sequence[Point], places: dict[str, int]) -> str:
    """Draw one figure over all recorded commits from left to right: errors on a logarithmic scale, others from zero."""
    values = [point.value for point in points]
    if unit in ROUNDED:
        heights = [math.log10(max(value, _records.SMALLEST)) for value in values]
        middle, half = (max(heights) + min(heights)) / 2, max(max(heights) - min(heights), 1.0) / 2
        low, high = middle - half, middle + half
    else:
        heights, low, high = values, 0.0, max(*values, 1e-9)
    x = [MARGIN + (WIDTH - 2 * MARGIN) * places[p.record["commit_hash"]] / max(len(places) - 1, 1) for p in points]
    y = [HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (h - low) / (high - low) for h in heights]
    line = " ".join(f"{a:.0f},{b:.1f}" for a, b in zip(x, y, strict=True))
    dots = "".join(
        f'<circle cx="{a:.0f}" cy="{b:.1f}" r="2"><title>{number(p.value)}, {escape(commit(p.record))}</title></circle>'
        for a, b, p in zip(x, y, points, strict=True)
    )
    said = f"{label}: {number(values[0])} → {number(values[-1])} {unit}"
    return (
        f'<figure><figcaption>{escape(said)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(said)}, {len(points)} commits"><polyline points="{line}"/>{dots}</svg></figure>'
    )


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("history-commits", Commits)
    app.add_directive("history-steps", Steps)
    app.add_directive("history-curves", Curves)
    return {"version": "1", "parallel_read_safe": True}
