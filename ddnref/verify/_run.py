"""``ddnref verify``: every rule of the table, checked on one array library."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddnref._rules import table as _rules
from ddnref.report import terminal
from ddnref.verify import _checks as checks
from ddnref.verify._backends import Backend
from ddnref.verify._checks import Outcome

WIDE = 108  # columns of a terminal from which the table has room to say where the worst error was


def verify(backend: Backend, dtypes: tuple[str, ...], seed: int) -> bool:
    """Check every rule, print the table of worst errors, and return whether all passed."""
    console = terminal.console()
    with terminal.progress(console) as track:
        outcomes = measure(backend, dtypes, seed, track)
    rows = worst(outcomes)
    _show(console, rows, f"Worst errors on {backend.name} {backend.version}, seed {seed}")
    failed = [row for row in rows if not row.passed]
    for row in failed:
        reason = row.note or f"error {row.error:.1e} > {_tolerance(row)}"
        console.print(
            f"[red]FAIL[/red] {row.case.rule.name}: {row.check} ({row.case}): {escape(reason)}",
            soft_wrap=True,
        )
    console.print(_summary(backend, outcomes, failed), soft_wrap=True)
    return not failed


def measure(
    backend: Backend, dtypes: tuple[str, ...], seed: int, track: terminal.Track = lambda items, _: items
) -> list[Outcome]:
    """All outcomes of all checks of all rules."""
    todo = [case for rule in _rules.RULES.values() for case in checks.cases(backend, rule, dtypes)]
    return [outcome for case in track(todo, "Checking") for outcome in checks.run_case(backend, case, seed)]


def worst(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Per rule and check the outcome furthest beyond, or closest to, its tolerance; in the order of the tables."""
    found: dict[tuple[str, str], Outcome] = {}
    for outcome in outcomes:
        key = outcome.case.rule.name, outcome.check
        if key not in found or outcome.badness > found[key].badness:
            found[key] = outcome
    return sorted(found.values(), key=lambda o: (list(_rules.RULES).index(o.case.rule.name), _order(o.check)))


def _order(check: str) -> int:
    names = list(checks.CHECKS)
    return names.index(check) if check in names else -1


def _show(console: Console, rows: list[Outcome], title: str) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("rule", "check"):
        table.add_column(name, no_wrap=True)
    for name in ("error", "tolerance"):
        table.add_column(name, justify="right", no_wrap=True)
    wide = console.width >= WIDE
    for name in ("result", "worst at")[: 1 + wide]:
        table.add_column(name, no_wrap=True)
    for name, group in groupby(rows, key=lambda row: row.case.rule.name):
        for i, row in enumerate(group):
            result = "[green]pass[/green]" if row.passed else "[red]FAIL[/red]"
            where = [str(row.case) if row.badness else "nowhere"][:wide]
            table.add_row(name if i == 0 else "", row.check, f"{row.error:.1e}", _tolerance(row), result, *where)
        table.add_section()
    console.print(table)


def _tolerance(row: Outcome) -> str:
    return "exact" if row.tolerance == 0 else f"{row.tolerance:.1e}"


def _summary(backend: Backend, outcomes: list[Outcome], failed: list[Outcome]) -> str:
    count = len(outcomes)
    rules = len({outcome.case.rule.name for outcome in outcomes})
    if failed:
        wrong = sorted({row.case.rule.name for row in failed})
        return f"[red]FAILED[/red]: {len(failed)} kinds of check fail, in {', '.join(wrong)}."
    margin = max((outcome.badness for outcome in outcomes), default=math.nan)
    return (
        f"[green]passed[/green]: {rules} rules, {count} checks on {backend.name}; "
        f"the closest reached {margin:.0%} of its tolerance."
    )
