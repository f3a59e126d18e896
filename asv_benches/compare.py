"""Compare ddnref with other libraries on the same problems, and record errors, times and memory.

``python asv_benches/compare.py`` makes a virtual environment in a temporary folder, with the pinned versions of
``comparison/requirements.txt``, measures everything in it, and prints the tables.

- ``--here``: measure in the present environment; a library that is not installed is named as missing;
- ``--environment FOLDER``: make the environment there, or use the one that is there;
- ``--only PROBLEM`` or ``--only PROBLEM:LIBRARY``: one problem or one cell, may be repeated; ``--list`` names them;
- ``--show PROBLEM:LIBRARY``: print the code of a cell;
- ``--instances N``: random instances per precision; ``--no-times``: errors only, which no other process disturbs;
- ``--write``: record in ``docs/comparison.json``, from which the page of the documentation is made; with ``--only``,
  other cells and the conditions stay as they are;
- ``--check``: end with 1 where errors or shares differ from that record.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE.parent / "docs/comparison.json"
Record = dict[str, Any]
REQUIREMENTS = HERE / "comparison/requirements.txt"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    if not (options.here or options.list or options.show):
        return in_environment(options.environment, sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("DDNREF_BENCH_THREADS", "1")  # the processes of all cells get it
    from comparison._problem import load_problems

    problems = load_problems()
    if options.list:
        print("\n".join(f"{name}:{library}" for name, one in problems.items() for library in one.cells))
        return 0
    if options.show:
        name, library = options.show.split(":")
        print("\n\n".join(sources(problems[name].cells[library])))
        return 0

    from benchmarks import THREADS
    from comparison import _tables
    from comparison._measure import measure, with_partners
    from comparison._oracles import IS_EXTENDED
    from figures import Load, cpu

    if not IS_EXTENDED:
        raise SystemExit("compare.py: numpy.longdouble has no more digits than float64 here; use Linux on x86.")
    started, load = time.monotonic(), Load()
    record: Record = {
        "command": f"python asv_benches/compare.py{''.join(f' --only {wish}' for wish in options.only or ())}",
        "date": datetime.date.today().isoformat(),
        "processor": cpu(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "versions": versions(),
        "problems": {},
    }
    for name, libraries in chosen(options.only, {name: list(one.cells) for name, one in problems.items()}).items():
        one, start = problems[name], time.monotonic()
        cells = measure(one, with_partners(one, libraries), options.instances, options.seconds)
        record["problems"][name] = {**described(one), "instances": options.instances, "cells": cells}
        record["others"] = round(load.others(), 2)
        record["minutes"] = round((time.monotonic() - started) / 60, 1)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if options.write:  # after each problem, as a run takes long
            write(record, merge=bool(options.only))
    print("\n\n".join(_tables.of_problem(record, name) for name in record["problems"]))
    if options.check:
        found = list(differences(json.loads(RECORD.read_text(encoding="utf-8")), record))
        print("\n".join(found or ["errors and shares are those of the record"]))
        return 1 if found else 0
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="measure in the present environment")
    parser.add_argument("--environment", type=Path, metavar="FOLDER", help="make or use a virtual environment there")
    parser.add_argument("--only", action="append", metavar="PROBLEM[:LIBRARY]", help="may be repeated")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--show", metavar="PROBLEM:LIBRARY", help="print the code of a cell and stop")
    parser.add_argument("--instances", type=int, default=100, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.15, help="duration of one turn of a process")
    parser.add_argument("--no-times", dest="seconds", action="store_const", const=0.0)
    parser.add_argument("--write", action="store_true", help=f"record in {RECORD.parent.name}/{RECORD.name}")
    parser.add_argument("--check", action="store_true", help="compare errors and shares with the record")
    return parser.parse_args(arguments)


def in_environment(folder: Path | None, arguments: Sequence[str]) -> int:
    """Run this command in a virtual environment with the pinned versions."""
    with tempfile.TemporaryDirectory(prefix="ddnref-compare-") as temporary:
        place = folder or Path(temporary) / "environment"
        python = place / "bin/python"
        if not python.exists():
            venv.create(place, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS], check=True)
        command = [python, Path(__file__), "--here", *arguments]
        return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(HERE.parent)}).returncode


def chosen(only: Sequence[str] | None, cells: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the libraries of every problem that was asked for."""
    if not only:
        return cells
    found: dict[str, list[str]] = {}
    for wish in only:
        name, _, library = wish.partition(":")
        if name not in cells or (library and library not in cells[name]):
            raise SystemExit(f"compare.py: {wish} is not a cell; --list names them.")
        found.setdefault(name, []).extend([library] if library else cells[name])
    return found


def sources(build: Any) -> Iterator[str]:
    """Yield the code of a cell, after the functions of its module that it calls."""
    for name in build.__code__.co_names:
        helper = build.__globals__.get(name)
        if inspect.isfunction(helper) and helper.__module__ == build.__module__:
            yield inspect.getsource(helper)
    yield inspect.getsource(build)


def described(problem: Any) -> dict[str, Any]:
    """Return the texts of a problem, which the page shows with the record."""
    return {name: getattr(problem, name) for name in ("title", "text", "large_text", "hard_text", "is_gradient")}


def versions() -> dict[str, str]:
    """Return the installed version of every distribution that the requirements name, and Python's."""
    found = {"Python": sys.version.split()[0]}
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        name, _, _ = line.partition("==")
        if name and not line.startswith("#"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "not installed"
    return found


def differences(old: Record, new: Record) -> Iterator[str]:
    """Yield every cell of the new record whose errors or shares are not those of the old one."""
    for name, one in new["problems"].items():
        for library, cell in one["cells"].items():
            was = old["problems"].get(name, {}).get("cells", {}).get(library, {})
            for key in ("missing", "errors", "second", "hard"):
                before, after = without_words(was.get(key)), without_words(cell.get(key))
                if before != after:
                    yield f"{name}:{library}: {key} was {before}, is {after}"


def without_words(value: Any) -> Any:
    """Leave out what a library says, of which only the kind is compared."""
    if isinstance(value, dict):
        return {dtype: {key: v for key, v in found.items() if key != "said"} for dtype, found in value.items()}
    return value.partition(":")[0] if isinstance(value, str) else value


def write(record: Record, merge: bool) -> None:
    """Write the record; where only some cells were measured, put them into the one that is there."""
    if merge and RECORD.exists():
        old = json.loads(RECORD.read_text(encoding="utf-8"))
        if changed := sorted(
            name for name in record["versions"] if old["versions"].get(name) != record["versions"][name]
        ):
            raise SystemExit(f"compare.py: other versions than in the record: {', '.join(changed)}. Measure all of it.")
        for name, one in record["problems"].items():
            cells = {**old["problems"].get(name, {}).get("cells", {}), **one["cells"]}
            old["problems"][name] = {**one, "cells": cells}
        record = old
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
