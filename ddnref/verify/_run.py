"""``ddnref verify``: check every rule of the table on one array library and print the worst errors as plain text."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TextIO

from ddnref._rules import table as _rules
from ddnref.verify import _checks as checks
from ddnref.verify._backends import Backend
from ddnref.verify._problem import Case, Outcome

WIDTH = 80  # columns; no line of the output is longer
ROW = "  {:<23}  {:>7}  {:>9}  {:<4}  {}"  # what was checked, error, tolerance, result, worst case


def verify(backend: Backend, dtypes: tuple[str, ...], seed: int) -> bool:
    """Check every rule, print the table of worst errors, and return whether all passed."""
    outcomes = measure(backend, dtypes, seed, progress=sys.stderr)
    rows = worst(outcomes)
    # The table first, then the failures, and the verdict last, where a terminal shows it.
    failed = [row for row in rows if not row.passed]
    lines = [
        f"Worst errors on {backend.name} {backend.version}, seed {seed}",
        "",
        *_table(rows),
        *(line for row in failed for line in _failure(row)),
        *_summary(backend, outcomes, failed),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return not failed


def measure(backend: Backend, dtypes: tuple[str, ...], seed: int, *, progress: TextIO | None = None) -> list[Outcome]:
    """Return all outcomes of all checks of all rules; ``progress`` shows a counter where it is a terminal."""
    todo = [case for rule in _rules.RULES.values() for case in checks.cases(backend, rule, dtypes)]
    return [outcome for case in _counted(todo, progress) for outcome in checks.run_case(backend, case, seed)]


def worst(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the worst outcome per rule and check, in the order of the tables."""
    # The worst is the one with the largest error in units of its tolerance.
    found: dict[tuple[str, str], Outcome] = {}
    for outcome in outcomes:
        key = outcome.case.rule.name, outcome.check
        if key not in found or outcome.badness > found[key].badness:
            found[key] = outcome
    rules, names = list(_rules.RULES), ["forward", *checks.CHECKS]  # "forward": the case could not be set up
    return sorted(found.values(), key=lambda row: (rules.index(row.case.rule.name), names.index(row.check)))


def _counted(cases: Sequence[Case], stream: TextIO | None) -> Iterator[Case]:
    """Yield the cases; on a terminal, show the number and the rule of each on one line, which is cleared at the end."""
    if stream is None or not stream.isatty():
        yield from cases
        return
    for i, case in enumerate(cases, 1):
        stream.write(f"\r{f'Checking {i} of {len(cases)}: {case.rule.name}':<{WIDTH - 1}}")
        stream.flush()
        yield case
    # Blank the line for what is printed next.
    stream.write(f"\r{'':<{WIDTH - 1}}\r")
    stream.flush()


def _table(rows: list[Outcome]) -> Iterator[str]:
    """Yield one block of lines per rule with one line per check."""
    yield ROW.format("check", "error", "tolerance", "", "worst at: dtype, m, batch")
    for name, group in groupby(rows, key=lambda row: row.case.rule.name):
        yield name
        for row in group:
            where = f"{row.case.dtype}, {row.case.m}, {row.case.batch}" if row.badness else "error 0 everywhere"
            yield ROW.format(row.check, f"{row.error:.1e}", _tolerance(row), "pass" if row.passed else "FAIL", where)
    yield ""


def _failure(row: Outcome) -> Iterator[str]:
    """Yield the rule and the check that failed, then the worst case and the reason on indented lines."""
    yield f"FAIL {row.case.rule.name}: {row.check}"
    # An exception has its message as the note; a wrong number has none.
    reason = row.note or f"error {row.error:.1e} > {_tolerance(row)}"
    yield from textwrap.wrap(f"{row.case}: {reason}", WIDTH, initial_indent="  ", subsequent_indent="  ")


def _tolerance(row: Outcome) -> str:
    return "exact" if row.tolerance == 0 else f"{row.tolerance:.1e}"


def _summary(backend: Backend, outcomes: list[Outcome], failed: list[Outcome]) -> Iterator[str]:
    """Yield how close the largest error came to its tolerance, and the verdict as the last line."""
    if failed:
        rules = len({row.case.rule.name for row in failed})
        yield f"FAILED: {len(failed)} checks of {rules} {'rule' if rules == 1 else 'rules'}"
        return
    rules = len({outcome.case.rule.name for outcome in outcomes})
    margin = max((outcome.badness for outcome in outcomes), default=math.nan)
    yield f"The largest error is at {margin:.0%} of its tolerance."
    yield f"passed: {rules} rules, {len(outcomes)} checks on {backend.name}"
