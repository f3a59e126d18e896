"""Measure the stated figures of the eigenpairs and print them beside their bars as a Markdown table.

- ``python asv_benches/figures.py``: all of them, about ten minutes on an idle machine;
- ``--quick``: a smoke test, smallest sizes and no time to measure anything;
- ``--only NAME``: some of them, may be repeated; ``--list`` names them;
- ``--write PATH``: write the table as well.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from benchmarks import THREADS  # isort: skip - pins the threads before NumPy

import _figures
import _figures_bridges
import _figures_decompositions
import _figures_forward
import _figures_ggn
import _figures_hessian
import _figures_scale
from _figures import Row, Sizes
from benchmarks._common import pin_threads

GROUPS = (
    _figures,
    _figures_forward,
    _figures_decompositions,
    _figures_ggn,
    _figures_hessian,
    _figures_bridges,
    _figures_scale,
)
FIGURES = {name: figure for group in GROUPS for name, figure in group.FIGURES.items()}
BUSY = 0.1  # of one core, in other processes, above which a timing is not judged
DISTURBED = "machine busy"
ATTEMPTS = 3  # at timings that others disturb


def smallest(sizes: Sizes) -> Sizes:
    return tuple(size._replace(dtypes=size.dtypes[:1]) for size in sizes[:1])


# --- the table --------------------------------------------------------------------------------------------------


def cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> str:
    found = []
    for name in ("numpy", "torch", "jax", "autograd", "dask"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join([f"Python {platform.python_version()}", *found])


def cpu_seconds() -> tuple[float, float] | None:
    """CPU seconds of the whole machine and of this process with its children so far; None where unknown."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split("\n", 1)[0].split()[1:9])
    everything = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everything, sum(os.times()[:4])


class Load:
    """CPU time that other processes use from now on, as a share of one core; NaN where it cannot be known."""

    def __init__(self) -> None:
        self.before, self.start = cpu_seconds(), time.perf_counter()

    def others(self) -> float:
        after, elapsed = cpu_seconds(), time.perf_counter() - self.start
        if self.before is None or after is None:
            return math.nan
        return max(0.0, (after[0] - self.before[0]) - (after[1] - self.before[1])) / elapsed


def judged(row: Row, others: float) -> Row:
    """A timing on a busy machine is not judged: OpenMP threads that wait for a core multiply a peer's time."""
    return row._replace(met=DISTURBED) if row.timed and others > BUSY else row


def table(rows: Sequence[Row], conditions: str, command: str) -> str:
    """The Markdown: under what conditions, the rows, how to read them."""
    lines = [f"Measured by `{command}`: {conditions}.", "", "| figure | measured | bar | met |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row[:4])} |" for row in rows]
    lines += [
        "",
        "Ratios are medians of interleaved rounds, with their quartiles; a ratio that needs the 10 % margin for noise "
        "says so. In one process the thread pools of NumPy and another library may disturb each other; in two "
        "processes that run in turn they cannot.",
    ]
    return "\n".join(lines)


def measure(names: Sequence[str], quick: bool) -> list[Row]:
    """The rows of every name; those of a name with a timing that was disturbed are measured again."""
    rows: list[Row] = []
    for name in names:
        for _ in range(1 if quick else ATTEMPTS):
            measured = measure_one(name, quick)
            if all(row.met != DISTURBED for row in measured):
                break
        rows += measured
    return rows


def measure_one(name: str, quick: bool) -> list[Row]:
    rows_of, sizes = FIGURES[name]
    rows: list[Row] = []
    load = Load()
    for row in rows_of(smallest(sizes) if quick else sizes):
        print(f"{name}: {row.figure}: {row.measured}", file=sys.stderr, flush=True)
        rows.append(judged(row, load.others()))
        load = Load()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test, not a measurement")
    parser.add_argument("--only", action="append", choices=FIGURES, metavar="NAME", help="may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the table there as well")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(FIGURES))
        return
    if options.quick:
        os.environ["DDNREF_BENCH_SECONDS"] = "0.05"
    pin_threads()
    load = Load()
    rows = measure(options.only or list(FIGURES), options.quick)
    others = load.others()
    share = "an unknown share" if math.isnan(others) else f"{others:.0%}"
    date = datetime.date.today().isoformat()
    conditions = f"{date}, {THREADS} thread{'s' * (THREADS > 1)}, {cpu()}, {versions()}"
    conditions += f"; other processes used {share} of one core meanwhile"
    if options.quick:
        conditions += "; --quick, so no figure here is a measurement"
    only = "".join(f" --only {name}" for name in options.only or ())
    text = table(rows, conditions, f"python asv_benches/figures.py{' --quick' if options.quick else ''}{only}")
    print(text)
    if options.write:
        options.write.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
