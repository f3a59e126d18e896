"""Read the records of commits, judge what changed between two of them, and find steps over all; see history.py."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

Record = dict[str, Any]

EXACT = ("reads", "matrices", "numbers")  # counted: one more is worse
ROUNDED = ("relative error", "backward error", "relative residual", "relative", "eps·‖A‖/gap", "eps·condition")
COUNTED = ("products", "m×m products", "steps", "share")  # a few more are none: rounding decides when a loop ends
MEMORY = ("m×m arrays", "n×n arrays", "vectors", "blocks")
UNTIMED = EXACT + ROUNDED + COUNTED + MEMORY
TIMES = ("seconds", "µs")
ROUNDING = 5.0  # by which an error may grow before it has lost a digit; reordered sums doubled a few
SMALLEST = 1e-17  # an error below this is none


class Figure(NamedTuple):
    """One figure of a record: a value, or None where it was skipped or failed, and what measured it."""

    value: float | None
    benchmark: str
    version: str | None


class Change(NamedTuple):
    verdict: str
    """gone, worse, better or same."""
    name: str
    old: float
    new: float | None
    unit: str

    @property
    def ratio(self) -> float:
        if self.new is None:
            return math.inf
        return self.new / self.old if self.old else (math.inf if self.new else 1.0)


def figures(result: Record) -> dict[str, Figure]:
    """The figures of a record by benchmark and parameters."""
    found = {}
    for benchmark, row in result["results"].items():
        columns = dict(zip(result["result_columns"], row, strict=False))
        names = [f"{benchmark}({', '.join(values)})" if values else benchmark for values in product(*columns["params"])]
        for name, value in zip(names, columns["result"] or [None] * len(names), strict=True):
            known = isinstance(value, int | float) and not math.isnan(value)
            found[name] = Figure(float(value) if known else None, benchmark, columns.get("version"))
    return found


# --- two records ------------------------------------------------------------------------------------------------


def allowed(old: float, unit: str, factor: float) -> float:
    """The largest figure that is not worse than that one: lower is better."""
    if unit in EXACT:
        return old
    if unit in ROUNDED:
        return max(old, SMALLEST) * max(factor, ROUNDING)
    return old * factor


def judged(name: str, old: float, new: float | None, unit: str, factor: float) -> Change:
    if new is None:
        return Change("gone", name, old, new, unit)
    worse, better = new > allowed(old, unit, factor), old > allowed(new, unit, factor)
    return Change("worse" if worse else "better" if better else "same", name, old, new, unit)


def changes(old: Record, new: Record, factor: float) -> tuple[list[Change], Counter[str]]:
    """Every figure that was measured before, worst first, and how many are not judged for which reason."""
    before, after = figures(old), figures(new)
    units = {**old["units"], **new["units"]}
    found: list[Change] = []
    others: Counter[str] = Counter()
    for name, was in before.items():
        now = after.get(name, Figure(None, was.benchmark, was.version))
        if was.value is None:
            others["measured for the first time"] += now.value is not None
        elif now.value is None and not selected(name, was.benchmark, new):
            others["not selected by --bench in the newer record"] += 1
        elif now.version != was.version:
            others["of a benchmark that changed itself, not comparable"] += 1
        else:
            found.append(judged(name, was.value, now.value, units.get(was.benchmark, ""), factor))
    others["measured for the first time"] += sum(after[name].value is not None for name in after.keys() - before.keys())
    return sorted(found, key=lambda change: (-change.ratio, change.name)), others


def selected(name: str, benchmark: str, result: Record) -> bool:
    """Whether that record was meant to contain the figure."""
    chosen = result.get("conditions", {}).get("bench", [])
    return not chosen or any(re.search(regex, text) for regex in chosen for text in (benchmark, name))


def is_quick(*results: Record) -> bool:
    """Whether one of them is a smoke test, which has no times that mean anything."""
    return any(result.get("conditions", {}).get("quick", False) for result in results)


def is_judged(change: Change, quick: bool) -> bool:
    """Whether it can be compared: no time can, and a ratio of times only if both records took the time it needs."""
    tracked = change.name.split("(")[0].rsplit(".", 1)[-1].startswith("track_")
    return tracked and (change.unit in UNTIMED or (change.unit not in TIMES and not quick))


def table(found: Sequence[Change]) -> Iterator[str]:
    if found:
        yield f"{'':6} {'old':>10} {'new':>10} {'ratio':>7}  figure"
    for change in found:
        new, ratio = ("–", "–") if change.new is None else (f"{change.new:.4g}", f"{change.ratio:.2f}")
        gone = ": no longer measured" if change.new is None else ""
        yield f"{change.verdict:6} {change.old:10.4g} {new:>10} {ratio:>7}  {change.name} [{change.unit}]{gone}"


def differing(old: Record, new: Record) -> Iterator[str]:
    """Yield the conditions, other than the code, that differ between the two measurements."""
    before, after = ({**r.get("conditions", {})} for r in (old, new))
    before |= before.pop("versions", {})
    after |= after.pop("versions", {})
    for key in sorted((before.keys() | after.keys()) - {"bench"}):
        if before.get(key) != after.get(key):
            yield f"note: {key} was {before.get(key)}, is {after.get(key)}"
    if is_quick(old, new):
        yield "note: a record made with --quick is a smoke test; only its counts and errors mean anything"


# --- all records ------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One figure of one commit."""

    record: Record
    value: float


class Step(NamedTuple):
    """A commit from which on a figure has another level."""

    record: Record
    name: str
    unit: str
    old: float
    new: float


def read(folder: Path) -> list[tuple[Path, Record]]:
    """Every record of a folder, the commits in their order."""
    paths = [path for path in sorted(folder.glob("*/*.json")) if path.name != "machine.json"]
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return sorted(found, key=lambda item: (item[1]["revision"], item[1]["commit_hash"], item[0].name))


def curves(records: Iterable[Record]) -> dict[str, list[Point]]:
    """Every figure by name, with its values in the order of the records, as the newest form of its benchmark has them.

    A commit that was measured twice has one value, that of the later file.
    """
    found: dict[str, dict[str, tuple[str | None, Point]]] = {}
    for record in records:
        for name, figure in figures(record).items():
            usable = not is_quick(record) or record["units"].get(figure.benchmark) in UNTIMED
            if figure.value is not None and usable:
                found.setdefault(name, {})[record["commit_hash"]] = figure.version, Point(record, figure.value)
    series = {}
    for name, by_commit in found.items():
        newest = list(by_commit.values())[-1][0]
        series[name] = [point for version, point in by_commit.values() if version == newest]
    return series


def levels(values: Sequence[float], penalty: float) -> list[int]:
    """The places where a sequence changes its level, the first one included.

    Of all piecewise constant sequences the one that minimises the sum of absolute differences plus `penalty` for each
    step. So one value that stands out by less than twice the penalty is no step, and the last one counts from once it.
    """
    n = len(values)
    best, last = [0.0] * (n + 1), [0] * (n + 1)
    for end in range(1, n + 1):
        costs = []
        for start in range(end):
            middle = median(values[start:end])
            costs.append(best[start] + sum(abs(v - middle) for v in values[start:end]) + penalty * (start > 0))
        last[end] = min(range(end), key=costs.__getitem__)
        best[end] = costs[last[end]]
    places, end = [], n
    while end:
        end = last[end]
        places.append(end)
    return places[::-1]


def steps(series: dict[str, list[Point]], factor: float = 1.1) -> Iterator[Step]:
    """Find the commits at which a figure took another level: counts exactly, all others on a logarithmic scale."""
    for name, points in series.items():
        unit = points[-1].record["units"].get(name.split("(")[0], "")
        values = [point.value for point in points]
        if unit in EXACT:
            places = [0, *(i for i, (a, b) in enumerate(pairwise(values), 1) if a != b)]
        else:
            smallest = SMALLEST if unit in ROUNDED else 1e-9
            digits = [math.log10(max(value, smallest)) for value in values]
            if max(digits) - min(digits) <= math.log10(least(unit, factor)):
                continue
            places = levels(digits, math.log10(ROUNDING if unit in ROUNDED else 1.5))
        middles = [median(values[a:b]) for a, b in pairwise([*places, len(values)])]
        for place, (old, new) in zip(places[1:], pairwise(middles), strict=True):
            if unit in EXACT or max(old, new) > least(unit, factor) * min(old, new):
                yield Step(points[place].record, name, unit, old, new)


def least(unit: str, factor: float) -> float:
    """The smallest step that is reported: half a digit of an error."""
    return 3.0 if unit in ROUNDED else factor
