"""Record the benchmarks of a commit in the repository, show their history as a site, compare two commits.

    python asv_benches/history.py record     # run asv on HEAD
    python asv_benches/history.py site       # the recorded history as pages in .asv/html; --offline: without a network
    python asv_benches/history.py compare    # the two newest records; exit 1 where a track_ figure got worse

Records name no machine, user or folder, so that they can be committed: asv_benches/history/. Exit code 2: the command
could not be carried out, and the message says why.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import site as python_site
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _offline import Missing, make_offline
from _records import changes, differing, is_tracked, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MACHINE = "ddnref-ci"  # one name for every machine: whose it was is nobody's business
MACHINE_FILE = {"machine": MACHINE, "version": 1}
PEERS = ("numpy", "scipy", "array-api-compat", "array-api-strict", "torch", "jax", "autograd",
         "vivit-for-pytorch", "curvlinops-for-pytorch", "dask", "cupy-cuda12x", "cupy-cuda13x")  # fmt: skip
BRIEF = ("rounds=1", "repeat=(1, 5, 2.0)")  # at most two seconds of each time_, and not all of them a second time
COLUMNS = ("result", "params", "version", "stats_ci_99_a", "stats_ci_99_b", "stats_q_25", "stats_q_75", "stats_number",
           "stats_repeat")  # fmt: skip


class Refused(Exception):
    """A request that cannot be fulfilled; the message says why and what to do."""


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"git {arguments[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def asv(work: Path, results: Path, html: Path, branch: str, *arguments: str) -> int:
    """Run asv with a separate configuration and home directory, so that it neither asks nor remembers."""
    if importlib.util.find_spec("asv") is None:
        raise Refused('asv is not installed: python -m pip install -e ".[bench]"')
    configuration = json.loads((HERE / "asv.conf.json").read_text(encoding="utf-8"))
    configuration |= {
        "repo": str(ROOT),
        "branches": [branch],
        "benchmark_dir": str(HERE / "benchmarks"),
        "env_dir": str(work / "env"),
        "results_dir": str(results),
        "html_dir": str(html),
    }
    (work / "asv.conf.json").write_text(json.dumps(configuration), encoding="utf-8")
    known = {MACHINE: {"machine": MACHINE}, "version": 1}
    (work / ".asv-machine.json").write_text(json.dumps(known), encoding="utf-8")
    environment = {
        **os.environ,
        "HOME": str(work),
        "PYTHONUSERBASE": python_site.getuserbase(),  # what else would have been found in the home directory
        "GIT_CONFIG_GLOBAL": os.environ.get("GIT_CONFIG_GLOBAL", str(Path.home() / ".gitconfig")),
        "ASV_PYTHONPATH": str(ROOT),  # asv drops PYTHONPATH; measure this clone, whatever is installed
    }
    command = [sys.executable, "-m", "asv", "--config", str(work / "asv.conf.json"), *arguments]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written(content) + "\n", encoding="utf-8")


def written(content: Any, depth: int = 2) -> str:
    """JSON with one line for each benchmark, so that a difference between two records can be read."""
    if not depth or not isinstance(content, dict) or not content:
        return json.dumps(content, ensure_ascii=False)
    lines = (f"{json.dumps(key)}: {written(value, depth - 1)}" for key, value in content.items())
    return "{\n" + ",\n".join(lines) + "\n}"


# --- record -----------------------------------------------------------------------------------------------------


def refuse_dirty(history: Path) -> None:
    """A record is of a commit, so what is measured must be that commit; only the records may differ."""
    inside = [f":(exclude){history.resolve().relative_to(ROOT)}"] if history.resolve().is_relative_to(ROOT) else []
    if changes := git("status", "--porcelain", "--", ".", *inside):
        raise Refused(f"the working tree differs from HEAD; commit or stash first:\n{changes}")


def neutral(result: dict[str, Any], python: str) -> dict[str, Any]:
    """A result file of asv with what it measured and nothing about where: a list of what stays, not of what goes."""
    where = [result["result_columns"].index(column) for column in COLUMNS]

    def kept(row: list[Any]) -> list[Any]:
        values = [row[i] if i < len(row) else None for i in where]
        while values[-1] is None:  # the version never is
            values.pop()
        return values

    return {
        "commit_hash": result["commit_hash"],
        "env_name": f"existing-py{python}",
        "date": result["date"],
        "params": {"machine": MACHINE, "python": python},
        "python": python,
        "requirements": {},
        "env_vars": {},
        "result_columns": list(COLUMNS),
        "results": {name: kept(row) for name, row in sorted(result["results"].items())},
        "durations": {},
        "version": result["version"],
    }


def conditions(bench: Sequence[str], quick: bool) -> dict[str, Any]:
    """Under what conditions was measured, as far as a reader of the figures needs them; asv does not read this."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import THREADS
    from benchmarks._common import backend, load, seconds

    looks = {"torch": backend, "jax": backend, "cupy": backend, "autograd": load, "array_api_strict": load}
    missing = []
    for name, look in looks.items():
        try:
            look(name)
        except NotImplementedError as reason:
            missing.append(str(reason))
    return {
        "bench": list(bench),
        "quick": quick,
        "seconds": seconds(),
        "threads": THREADS,
        "versions": {name: found for name in PEERS if (found := version_of(name))},
        "missing": missing,
    }


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def record(options: argparse.Namespace) -> int:
    refuse_dirty(options.history)
    commit = git("rev-parse", "HEAD")
    chosen = [part for regex in options.bench for part in ("--bench", regex)] + ["--quick"] * options.quick
    chosen += [part for attribute in BRIEF for part in ("--attribute", attribute)]
    with tempfile.TemporaryDirectory(prefix="ddnref-asv-") as folder:
        work = Path(folder)
        results = work / "results"
        code = asv(work, results, work / "html", "HEAD", "run", "--python=same", "--machine", MACHINE,
                   "--set-commit-hash", commit, *chosen)  # fmt: skip
        found = list((results / MACHINE).glob(f"{commit[:8]}-*.json"))
        if code not in (0, 2) or not found:  # 2: a benchmark failed, which is worth recording
            raise Refused(f"asv run ended with code {code}; nothing was recorded")
        refuse_dirty(options.history)  # it may have changed during the run
        if git("rev-parse", "HEAD") != commit:
            raise Refused(f"HEAD moved away from {commit[:8]} during the run; nothing was recorded")
        result = json.loads(found[0].read_text(encoding="utf-8"))
        benchmarks = json.loads((results / "benchmarks.json").read_text(encoding="utf-8"))
    result = neutral(result, ".".join(platform.python_version_tuple()[:2]))
    result["conditions"] = conditions(options.bench, options.quick)
    path = options.history / MACHINE / f"{commit[:8]}-{result['env_name']}.json"
    measured = result["results"]
    if path.exists():
        result = joined(json.loads(path.read_text(encoding="utf-8")), result)
    write(path, result)
    write(path.with_name("machine.json"), MACHINE_FILE)
    write(options.history / "benchmarks.json", benchmarks)
    print(f"\nrecorded {len(measured)} benchmarks of {commit[:8]} in {path}: commit it")
    print(f"it now holds {len(result['results'])}")
    for reason in result["conditions"]["missing"]:
        print(f"skipped: {reason}")
    failed = sorted(name for name, row in measured.items() if row[0] is None or None in row[0])
    for name in failed:
        print(f"failed: {name}")
    return 1 if failed else 0


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A commit recorded in two parts, the later figures where both have some; under other conditions only the later."""
    before, after = old["conditions"], new["conditions"]
    if {**before, "bench": None} != {**after, "bench": None}:
        print("the earlier record of this commit was made under other conditions and is replaced")
        return new
    whole = not before["bench"] or not after["bench"]
    chosen = [] if whole else sorted({*before["bench"], *after["bench"]})
    results = dict(sorted({**old["results"], **new["results"]}.items()))
    return {**new, "results": results, "conditions": {**after, "bench": chosen}}


# --- what is recorded -------------------------------------------------------------------------------------------


def records(history: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every record, those of HEAD's history last and in its order."""
    paths = [path for path in sorted(history.glob(f"{MACHINE}/*.json")) if path.name != "machine.json"]
    if not paths:
        raise Refused(f"nothing is recorded in {history}: python asv_benches/history.py record")
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    order = {commit: i for i, commit in enumerate(ancestors())}
    return sorted(found, key=lambda item: (order.get(item[1]["commit_hash"], -1), item[0].name))


def described(history: Path) -> dict[str, Any]:
    """The benchmarks by name, as the newest record found them: code, parameters, unit."""
    path = history / "benchmarks.json"
    if not path.exists():
        raise Refused(f"{path} is missing: restore it, or record again")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def ancestors(*options: str) -> list[str]:
    """The commits of HEAD's history, oldest first."""
    return git("rev-list", "--topo-order", "--reverse", *options, "HEAD").split()


def lost(found: Iterable[tuple[Path, dict[str, Any]]]) -> list[str]:
    """The recorded commits that HEAD's history does not contain."""
    known = set(ancestors())
    return sorted({result["commit_hash"] for _, result in found} - known)


# --- site -------------------------------------------------------------------------------------------------------


def site(options: argparse.Namespace) -> int:
    found = records(options.history)
    gone = lost(found)
    for commit in gone:
        print(f"left out: {commit[:8]} is not in the history of HEAD (rebased, on another branch, or a shallow clone)")
    kept = [(path, result) for path, result in found if result["commit_hash"] not in gone]
    if not kept:
        raise Refused("no recorded commit is in the history of HEAD; in a shallow clone: git fetch --unshallow")
    # asv follows first parents only; a commit that came in by a merge has to be named beside HEAD.
    merged = {result["commit_hash"][:12] for _, result in kept} - {c[:12] for c in ancestors("--first-parent")}
    with tempfile.TemporaryDirectory(prefix="ddnref-asv-") as folder:
        work = Path(folder)
        for path, result in kept:
            write(work / "results" / MACHINE / path.name, result)
        write(work / "results" / MACHINE / "machine.json", MACHINE_FILE)
        write(work / "results" / "benchmarks.json", described(options.history))
        branch = " ".join(["HEAD", *sorted(merged)])
        code = asv(work, work / "results", options.out.resolve(), branch, "publish", "--no-pull")
    if code:
        raise Refused(f"asv publish ended with code {code}")
    print(f"\nrecords shown: {len(kept)}; pages in {options.out}")
    if options.offline:
        make_offline(options.out)
    else:
        print("They load jQuery, flot and Bootstrap from the network; with --offline they bring them along.")
    print("They load their data too, so serve them, for http://localhost:8000:")
    print(f"python -m http.server --directory {options.out} 8000")
    return 0


# --- compare ----------------------------------------------------------------------------------------------------


def pick(found: Sequence[tuple[Path, dict[str, Any]]], names: Sequence[str | None]) -> list[str]:
    """The two commits to compare, by a beginning of their hash or any name git knows; by default the newest two."""
    gone = set(lost(found))
    recorded = list(dict.fromkeys(result["commit_hash"] for _, result in found))
    newest = [commit for commit in recorded if commit not in gone]
    picked = []
    for name, place in zip(names, (-2, -1), strict=True):
        if name is None:
            if len(newest) < -place:
                raise Refused(f"{len(newest)} commits of the history of HEAD are recorded, two are needed")
            picked.append(newest[place])
            continue
        matching = [commit for commit in recorded if commit.startswith(name.lower())]
        if not matching:
            known = subprocess.run(["git", "rev-parse", "-q", "--verify", "--end-of-options", f"{name}^{{commit}}"],
                                   cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
            matching = [commit for commit in recorded if commit == known.stdout.strip()]
        if len(matching) != 1:
            which = "is not recorded" if not matching else "is the beginning of more than one"
            raise Refused(f"{name} {which}; recorded, oldest first: {', '.join(c[:8] for c in recorded)}")
        picked.append(matching[0])
    return picked


def compare(options: argparse.Namespace) -> int:
    if not options.factor >= 1:
        raise Refused(f"--factor {options.factor:g}: 1 or more, because a figure that did not change is not worse")
    found = records(options.history)
    old, new = pick(found, (options.old, options.new))
    units = {name: entry["unit"] for name, entry in described(options.history).items() if name != "version"}
    by_environment = [{r["env_name"]: r for _, r in found if r["commit_hash"] == c} for c in (old, new)]
    common = sorted(by_environment[0].keys() & by_environment[1].keys())
    if not common:
        recorded = " and ".join(", ".join(sorted(environments)) for environments in by_environment)
        raise Refused(f"{old[:8]} and {new[:8]} were recorded in different environments: {recorded}")
    worse = 0
    for environment in common:
        pair = by_environment[0][environment], by_environment[1][environment]
        print(f"{old[:8]} → {new[:8]}, {environment}, lower is better")
        worse += report(*pair, units, options)
    return 1 if worse else 0


def report(old: dict[str, Any], new: dict[str, Any], units: dict[str, str], options: argparse.Namespace) -> int:
    """Print one comparison and return how many figures got worse."""
    for note in differing(old, new):
        print(note)
    every, others = changes(old, new, units, options.factor)
    tracked = [change for change in every if is_tracked(change)]
    changed = [change for change in tracked if change.verdict != "same"]
    for line in table(changed):
        print(line)
    print(f"{len(tracked) - len(changed):6} track_ figures did not change by more than their factor")
    for why, count in (+others).items():
        print(f"{count:6} figures {why}")
    if options.all:
        print("\nNot judged, because comparable only between runs on one quiet machine:")
        for line in table([change for change in every if not is_tracked(change)]):
            print(line)
    return sum(change.verdict in ("gone", "worse") for change in tracked)


# --- the command ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--history", type=Path, default=HERE / "history", metavar="DIR", help="where the records are")
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("record", parents=[shared], help="measure HEAD and write a record of it")
    one.add_argument("--bench", action="append", default=[], metavar="REGEX", help="only these, may be repeated")
    one.add_argument("--quick", action="store_true", help="every benchmark once: times mean nothing then")
    one.set_defaults(command=record)
    one = commands.add_parser("site", parents=[shared], help="build the pages from the records")
    one.add_argument("--out", type=Path, default=ROOT / ".asv" / "html", metavar="DIR", help="where to")
    one.add_argument(
        "--offline", action="store_true", help="with the libraries that the pages load, from npm's registry"
    )
    one.set_defaults(command=site)
    one = commands.add_parser("compare", parents=[shared], help="compare two recorded commits")
    one.add_argument("old", nargs="?", metavar="OLD", help="default: the newest recorded but one")
    one.add_argument("new", nargs="?", metavar="NEW", help="default: the newest recorded")
    one.add_argument("--factor", type=float, default=1.1, help="by which a figure may get worse; counts may not")
    one.add_argument("--all", action="store_true", help="show time_ and peakmem_ figures too, which are not judged")
    one.set_defaults(command=compare)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (Refused, Missing) as reason:
        print(f"history.py: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
