"""Read the records of two commits and judge what changed between them; the command is history.py."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

EXACT = ("reads", "matrices")  # counted: one more is worse
ROUNDED = ("relative error", "backward error", "eps·‖A‖/gap")  # of the size of rounding, which another BLAS multiplies
ROUNDING = 10.0  # by less than this, as gate.py has it
TIMES = ("seconds", "µs")


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


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """The figures of a record by benchmark and parameters."""
    found = {}
    for benchmark, row in result["results"].items():
        columns = dict(zip(result["result_columns"], row, strict=False))
        names = [f"{benchmark}({', '.join(values)})" if values else benchmark for values in product(*columns["params"])]
        for name, value in zip(names, columns["result"] or [None] * len(names), strict=True):
            known = isinstance(value, int | float) and not math.isnan(value)
            found[name] = Figure(float(value) if known else None, benchmark, columns.get("version"))
    return found


def judged(name: str, old: float, new: float | None, unit: str, factor: float) -> Change:
    """Lower is better. Counts are exact, rounding errors get their own factor."""
    allowed = 1.0 if unit in EXACT else max(factor, ROUNDING) if unit in ROUNDED else factor
    if new is None:
        return Change("gone", name, old, new, unit)
    verdict = "worse" if new > old * allowed else "better" if new * allowed < old else "same"
    return Change(verdict, name, old, new, unit)


def changes(
    old: dict[str, Any], new: dict[str, Any], units: dict[str, str], factor: float
) -> tuple[list[Change], Counter[str]]:
    """Every figure that was measured before, worst first, and how many are not judged for which reason."""
    before, after = figures(old), figures(new)
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


def selected(name: str, benchmark: str, result: dict[str, Any]) -> bool:
    """Whether that record was meant to contain the figure."""
    chosen = result.get("conditions", {}).get("bench", [])
    return not chosen or any(re.search(regex, text) for regex in chosen for text in (benchmark, name))


def is_tracked(change: Change) -> bool:
    """Whether it is judged: times, and differences of times, are comparable on one quiet machine only."""
    return change.unit not in TIMES and change.name.split("(")[0].rsplit(".", 1)[-1].startswith("track_")


def table(found: Sequence[Change]) -> Iterator[str]:
    if found:
        yield f"{'':6} {'old':>10} {'new':>10} {'ratio':>7}  figure"
    for change in found:
        new, ratio = ("–", "–") if change.new is None else (f"{change.new:.4g}", f"{change.ratio:.2f}")
        gone = ": no longer measured" if change.new is None else ""
        yield f"{change.verdict:6} {change.old:10.4g} {new:>10} {ratio:>7}  {change.name} [{change.unit}]{gone}"


def differing(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield the conditions, other than the code, that differ between the two measurements."""
    before, after = ({**r.get("conditions", {})} for r in (old, new))
    before |= before.pop("versions", {})
    after |= after.pop("versions", {})
    for key in sorted((before.keys() | after.keys()) - {"bench"}):
        if before.get(key) != after.get(key):
            yield f"note: {key} was {before.get(key)}, is {after.get(key)}"
    if before.get("quick") or after.get("quick"):
        yield "note: a record made with --quick is a smoke test; only its counts and errors mean anything"
