"""Run those benchmarks of the suite that no clock enters, in this process, and print their figures as JSON.

    PYTHONPATH=TREE python asv_benches/_measure.py REGEX ...

The package is that of TREE, the benchmarks are those beside this file. A module of benchmarks that an older package
cannot run, because a name does not exist there, is left out and named. asv would start a process for every figure,
which takes four times as long and isolates nothing that matters to a count.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

import benchmarks


def absent() -> dict[str, str]:
    """Why a module of benchmarks cannot be imported with this package, by its name."""
    reasons = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if not module.name.startswith("_"):
            try:
                importlib.import_module(f"benchmarks.{module.name}")
            except (ImportError, AttributeError, KeyError) as error:
                reasons[module.name] = str(error) or type(error).__name__
    return reasons


def chosen(regexes: Sequence[str]) -> Iterator[tuple[Any, list[int]]]:
    """Each benchmark of which a parameter was chosen, as asv's option --bench chooses, and which of them."""
    from asv_runner.discovery import disc_benchmarks

    with redirect_stderr(io.StringIO()):  # what cannot be imported was named already
        every = list(disc_benchmarks(str(Path(benchmarks.__file__).parent), ignore_import_errors=True))
    for benchmark in every:
        texts = [label(benchmark.name, values) for values in product(*benchmark.params)]
        places = [i for i, text in enumerate(texts) if any(re.search(regex, text) for regex in regexes)]
        if benchmark.type == "track" and places:
            yield benchmark, places


def label(name: str, values: Sequence[str]) -> str:
    return f"{name}({', '.join(values)})" if values else name


def value(benchmark: Any, place: int) -> float:
    """Measure one figure; NaN where the benchmark says that it cannot be measured here, as asv has it."""
    if benchmark.params:
        benchmark.set_param_idx(place)
    try:
        if benchmark.do_setup():
            return math.nan
        return benchmark.do_run()
    except NotImplementedError:
        return math.nan
    finally:
        benchmark.do_teardown()


def main(regexes: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"absent": absent(), "failed": {}, "units": {}, "results": {}}
    for benchmark, places in chosen(regexes):
        count = math.prod(len(values) for values in benchmark.params)
        row: list[float | None] = [math.nan] * count
        for place in places:
            try:
                row[place] = value(benchmark, place)
            except Exception as error:  # noqa: BLE001  # an older package may fail in any way
                row[place] = None
                found["failed"][benchmark.name] = f"{type(error).__name__}: {error}"
        found["units"][benchmark.name] = benchmark.unit
        found["results"][benchmark.name] = [row, benchmark.params, benchmark.version]
    return found


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        measured = main(sys.argv[1:])
    print(json.dumps(measured, default=float))
