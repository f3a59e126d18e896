"""Cases by number, what became of them, and the workers that a crash of the interpreter may take with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import _judge, _mutations, _oracle, _site
from ._targets import Target

ROOT = Path(__file__).parents[2]
BATCHES = ((), (1,), (3,), (2, 2), (4,))
SECONDS = 120.0
"""After which a case counts as hanging, and its worker is ended."""


class Case(NamedTuple):
    """One case and its outcome."""

    seed: int
    number: int
    function: str
    kind: str
    what: str
    outcome: str
    """``equal``, or the name of the error by which it was refused."""
    finding: str = ""

    def line(self) -> str:
        verdict = f"FINDING: {self.finding}" if self.finding else self.outcome
        return f"--seed {self.seed} --case {self.number}: {self.function} [{self.kind}] {self.what}: {verdict}"


def run_case(seed: int, number: int, targets: Sequence[Target]) -> Case:
    """One case, from its number alone."""
    rng = np.random.default_rng((seed, number))
    target = targets[int(rng.integers(len(targets)))]
    batch = BATCHES[int(rng.integers(len(BATCHES)))] if target.items else ()
    m = int(rng.integers(2, 7)) if rng.integers(20) else int(rng.integers(1, 41))
    is_complex = target.is_complex and bool(rng.integers(4) == 0)
    problem = target.make(rng, batch, m, is_complex)
    site = _site.Site(rng, target, problem, cores(target), batch)
    kind, hostile, outcome, finding = "", None, "", ""
    while hostile is None:
        kind = site.choice(target.kinds or _mutations.GENERAL)
        hostile = _mutations.MUTATIONS[kind](site)
    try:
        outcome = _oracle.EXPECTATIONS[hostile.expect](site, hostile).name
    except _judge.Finding as error:
        finding = str(error)
    except Exception as error:  # noqa: BLE001 - of the oracle itself, or of a callback of this campaign
        finding = f"the oracle failed with {type(error).__name__} at {_judge.where(error)}: {error}"
    return Case(
        seed,
        number,
        target.name,
        kind,
        f"{batch} m={m}{' complex' if is_complex else ''} {hostile.what}",
        outcome,
        finding,
    )


@cache
def _cores(target_name: str, make: object) -> tuple[int, ...]:
    arrays = make(np.random.default_rng(0), (), 4, False).arrays  # type: ignore[operator]
    return tuple(a.ndim if isinstance(a, np.ndarray) else 0 for a in arrays)


def cores(target: Target) -> tuple[int, ...]:
    """Axes of one item of each array."""
    return _cores(target.name, target.make)


def run(seed: int, numbers: Sequence[int], targets: Sequence[Target]) -> Iterator[Case]:
    """Cases in this process."""
    for number in numbers:
        yield run_case(seed, number, targets)


def table(cases: Sequence[Case]) -> str:
    """Return a Markdown table of what was tried and what came of it, one row per kind."""
    errors = sorted({case.outcome for case in cases if case.outcome not in ("equal", "")})
    heads = ("what was done", "cases", "accepted and right", *(f"`{name}`" for name in errors), "findings")
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]

    def row(name: str, chosen: Sequence[Case]) -> str:
        counts = Counter("finding" if case.finding else case.outcome for case in chosen)
        cells = (name, len(chosen), counts["equal"], *(counts[error] for error in errors), counts["finding"])
        return f"| {' | '.join(map(str, cells))} |"

    rows += [row(kind, [case for case in cases if case.kind == kind]) for kind in _mutations.MUTATIONS]
    return "\n".join([*rows, row("all", cases)]) + "\n"


def record(cases: Sequence[Case], functions: int) -> str:
    """The file that the documentation shows."""
    seed, count = cases[0].seed, len(cases)
    head = (
        f"Recorded on {date.today()} by `python -m tests.fuzz --cases {count} --seed {seed} --record docs/fuzz.md`, "
        f"with NumPy {np.__version__}: {count:,} cases over {functions} functions and classes.\n\n"
    )
    return head + table(cases)


# --- workers ----------------------------------------------------------------------------------------------------


def worker(seed: int, numbers: Sequence[int], targets: Sequence[Target], seconds: float) -> None:
    """Run cases and print each before and after, so that one which ends the process is known by name."""
    import faulthandler

    faulthandler.enable()
    for number in numbers:
        faulthandler.dump_traceback_later(seconds, exit=True)
        print(json.dumps({"start": number}), flush=True)
        print(json.dumps(run_case(seed, number, targets)), flush=True)
    faulthandler.cancel_dump_traceback_later()


def in_workers(seed: int, numbers: Sequence[int], workers: int, command: Sequence[str]) -> list[Case]:
    """Run cases in separate processes; a process that ends is a finding, and the next one continues after it."""
    with ThreadPoolExecutor(workers) as pool:
        parts = [numbers[i::workers] for i in range(workers)]
        found = [case for part in pool.map(lambda part: _drive(seed, part, command), parts) for case in part]
    return sorted(found, key=lambda case: case.number)


def _drive(seed: int, numbers: Sequence[int], command: Sequence[str]) -> list[Case]:
    found: list[Case] = []
    left = list(numbers)
    while left:
        text = ",".join(map(str, left))
        process = subprocess.run(
            [*command, "--seed", str(seed), "--worker"], input=text, capture_output=True, text=True, check=False,
            cwd=ROOT,
        )  # fmt: skip
        started = None
        for line in process.stdout.splitlines():
            record = json.loads(line)
            if isinstance(record, dict):
                started = record["start"]
            else:
                found.append(Case(*record))
                started = None
        done = {case.number for case in found}
        if process.returncode != 0 or started is not None:
            if started is None:
                raise RuntimeError(process.stderr)
            last = "\n".join(process.stderr.strip().splitlines()[-12:])
            found.append(
                Case(seed, started, "?", "?", "?", "", f"the interpreter ended ({process.returncode}): {last}")
            )
            done.add(started)
        left = [n for n in left if n not in done]
    return found


def command() -> list[str]:
    """How this campaign starts its workers."""
    return [sys.executable, "-m", "tests.fuzz"]
