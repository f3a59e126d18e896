"""Record the benchmarks of a commit, compare two commits, find the commit at which a figure changed.

    python asv_benches/history.py record               # run asv on HEAD, on an idle machine
    python asv_benches/history.py record --no-clock    # errors, counts, memory: in seconds, of any COMMIT, busy or not
    python asv_benches/history.py compare              # the two newest records; exit 1 where a figure got worse
    python asv_benches/history.py check                # measure a base and the working tree without a clock; likewise
    python asv_benches/history.py steps                # every commit at which a figure took another level

Records go to .asv/history, which git ignores, so that no checkout meets them; --keep writes them to
asv_benches/history instead, to be committed. Those name no machine, user or folder. docs/history.rst draws them. Exit
code 2: the command could not be carried out, and the message says why.
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
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _records import Record, changes, curves, differing, is_judged, is_quick, read, steps, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KEPT = HERE / "history"
MACHINE = "ddnref-ci"  # one name for every machine: whose it was is nobody's business
PYTHON = ".".join(platform.python_version_tuple()[:2])
PEERS = ("numpy", "scipy", "array-api-compat", "array-api-strict", "torch", "jax", "autograd",
         "vivit-for-pytorch", "curvlinops-for-pytorch", "dask", "cupy-cuda12x", "cupy-cuda13x")  # fmt: skip
CORE = ("numpy", "scipy", "array-api-compat", "array-api-strict")
BRIEF = ("rounds=1", "repeat=(1, 5, 2.0)")  # at most two seconds of each time_, and not all of them a second time
COLUMNS = ("result", "params", "version", "stats_ci_99_a", "stats_ci_99_b", "stats_q_25", "stats_q_75", "stats_number",
           "stats_repeat")  # fmt: skip
NO_CLOCK = (
    r"^(eigh|iteration|operators|spectral|svd)\.\w+Errors\.",
    r"^eigsh\.EigshErrors\..*300",
    r"^generalized\.GeneralizedErrors\..*ddnref",
    r"^(eigh|svd)\.\w+Wrong\..*ddnref",
    r"^eigh\.EighMasked\..*\((256|512)\)",
    r"HostReads\.|ExtraMemory\.|Float32\.|track_extra_arrays",
    r"^hessian\.HessianSolve\.track_backward_error\(\((25|100, 16|100, 32|20),",
    r"^krylov\.CgMemory\.track_(ours|implicit_error)",
    r"^krylov\.Krylov\.track_steps\('(cg|minres|bicgstab|gmres)'",
    r"^linear\.WithoutSymmetry\.",
    r"^trust_region\.TrustRegion(Step|Error)\.",
    r"^work\.",
)
"""Errors, counts and memory that take seconds together: the parameters of ddnref, and the small problems."""


class Refused(Exception):
    """A request that cannot be fulfilled; the message says why and what to do."""


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise Refused(f"git {arguments[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def asv(work: Path, results: Path, *arguments: str) -> int:
    """Run asv with a separate configuration and home directory, so that it neither asks nor remembers."""
    if importlib.util.find_spec("asv") is None:
        raise Refused('asv is not installed: python -m pip install -e ".[bench]"')
    configuration = json.loads((HERE / "asv.conf.json").read_text(encoding="utf-8"))
    configuration |= {
        "repo": str(ROOT),
        "benchmark_dir": str(HERE / "benchmarks"),
        "env_dir": str(work / "env"),
        "results_dir": str(results),
        "html_dir": str(work / "html"),
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


def of_commit(commit: str) -> Record:
    """The part of a record by which a reader without the repository can order and name its commit."""
    seconds, subject = git("show", "-s", "--format=%ct%n%s", commit).split("\n", 1)
    revision = int(git("rev-list", "--count", commit))
    return {"commit_hash": commit, "subject": subject, "revision": revision, "date": 1000 * int(seconds)}


def neutral(result: Record, units: dict[str, str]) -> Record:
    """A result file of asv with what it measured and nothing about where: a list of what stays, not of what goes."""
    where = [result["result_columns"].index(column) for column in COLUMNS]

    def kept(row: list[Any]) -> list[Any]:
        values = [row[i] if i < len(row) else None for i in where]
        while values[-1] is None:  # the version never is
            values.pop()
        return values

    results = {name: kept(row) for name, row in sorted(result["results"].items())}
    return {
        "env_name": f"existing-py{PYTHON}",
        "python": PYTHON,
        "units": {name: units[name] for name in results},
        "result_columns": list(COLUMNS),
        "results": results,
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
    if options.commits and not options.no_clock:
        raise Refused("only HEAD can be recorded with a clock; add --no-clock")
    if options.no_clock and options.quick:
        raise Refused("--quick shortens times, and --no-clock takes none")
    refuse_dirty(options.history)
    commits = [git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}") for name in options.commits]
    code = 0
    for commit in commits or [git("rev-parse", "HEAD")]:
        result = without_clock(commit, options.bench or NO_CLOCK) if options.no_clock else with_asv(commit, options)
        refuse_dirty(options.history)  # it may have changed during the run
        path = folder_of(options) / MACHINE / f"{commit[:8]}-{result['env_name']}.json"
        new = result["results"]
        if path.exists():
            result = joined(json.loads(path.read_text(encoding="utf-8")), result)
        write(path, result)
        print(f"\nrecorded {len(new)} benchmarks of {commit[:8]} in {path}{': commit it' * options.keep}")
        print(f"it now holds {len(result['results'])}")
        for reason in result["conditions"].get("missing", []):
            print(f"skipped: {reason}")
        failed = sorted(name for name, row in new.items() if row[0] is None or None in row[0])
        for name in failed:
            print(f"failed: {name}")
        code |= bool(failed) and not options.no_clock  # an older commit may lack what a benchmark measures
    return code


def folder_of(options: argparse.Namespace) -> Path:
    return Path(options.history if options.keep else local())


def local() -> Path:
    """The folder of records that nobody asked to keep."""
    return ROOT / ".asv" / "history"


def with_asv(commit: str, options: argparse.Namespace) -> Record:
    """Every benchmark of HEAD that was chosen, as asv measures it."""
    chosen = [part for regex in options.bench for part in ("--bench", regex)] + ["--quick"] * options.quick
    chosen += [part for attribute in BRIEF for part in ("--attribute", attribute)]
    with tempfile.TemporaryDirectory(prefix="ddnref-asv-") as folder:
        work = Path(folder)
        results = work / "results"
        code = asv(work, results, "run", "--python=same", "--machine", MACHINE,
                   "--set-commit-hash", commit, *chosen)  # fmt: skip
        found = list((results / MACHINE).glob(f"{commit[:8]}-*.json"))
        if code not in (0, 2) or not found:  # 2: a benchmark failed, which is worth recording
            raise Refused(f"asv run ended with code {code}; nothing was recorded")
        if git("rev-parse", "HEAD") != commit:
            raise Refused(f"HEAD moved away from {commit[:8]} during the run; nothing was recorded")
        result = json.loads(found[0].read_text(encoding="utf-8"))
        described = json.loads((results / "benchmarks.json").read_text(encoding="utf-8"))
    units = {name: entry["unit"] for name, entry in described.items() if name != "version"}
    return of_commit(commit) | neutral(result, units) | {"conditions": conditions(options.bench, options.quick)}


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The package of a commit in a folder; the working tree and HEAD stay as they are."""
    done = subprocess.run(
        ["git", "archive", "--format=tar", commit, "ddnref"], cwd=ROOT, capture_output=True, check=False
    )
    if done.returncode:
        raise Refused(f"git archive {commit[:8]}: {done.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="ddnref-tree-") as folder:
        with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
            # Python has had filters since 3.11.4.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(folder)
        yield Path(folder)


def measured(tree: Path, bench: Sequence[str]) -> Record:
    """Measure the package of a tree with the benchmarks of this clone, in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "DDNREF_BENCH_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(HERE / "_measure.py"), *bench]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise Refused(f"the benchmarks did not end within {error.timeout:g} s") from error
    if done.returncode:
        raise Refused(f"the benchmarks cannot run:\n{done.stderr[-2000:]}")
    found: Record = json.loads(done.stdout)
    for name, reason in (*found["absent"].items(), *found["failed"].items()):
        print(f"not measured: {name}: {reason.splitlines()[0]}")
    versions = {name: known for name in CORE if (known := version_of(name))}
    return {
        "env_name": f"counted-py{PYTHON}",
        "python": PYTHON,
        "units": dict(sorted(found["units"].items())),
        "result_columns": ["result", "params", "version"],
        "results": dict(sorted(found["results"].items())),
        "conditions": {"bench": list(bench), "threads": 1, "versions": versions},
    }


def without_clock(commit: str, bench: Sequence[str]) -> Record:
    with tree_of(commit) as tree:
        return of_commit(commit) | measured(tree, bench)


def joined(old: Record, new: Record) -> Record:
    """A commit recorded in two parts, the later figures where both have some; under other conditions only the later."""
    before, after = old["conditions"], new["conditions"]
    if {**before, "bench": None} != {**after, "bench": None}:
        print("the earlier record of this commit was made under other conditions and is replaced")
        return new
    whole = not before["bench"] or not after["bench"]
    chosen = [] if whole else sorted({*before["bench"], *after["bench"]})
    both = {key: dict(sorted({**old[key], **new[key]}.items())) for key in ("units", "results")}
    return {**new, **both, "conditions": {**after, "bench": chosen}}


# --- what is recorded -------------------------------------------------------------------------------------------


def records(history: Path) -> list[tuple[Path, Record]]:
    """Every record, the kept ones and those of this clone, in the order of the commits."""
    found = read(history) + (read(local()) if history != local() else [])
    if not found:
        raise Refused(f"nothing is recorded in {history}: python asv_benches/history.py record")
    return sorted(found, key=lambda item: item[1]["revision"])


def ancestors() -> list[str]:
    """The commits of HEAD's history."""
    return git("rev-list", "HEAD").split()


def lost(found: Sequence[tuple[Path, Record]]) -> set[str]:
    """The recorded commits that HEAD's history does not contain: rebased, on another branch, or a shallow clone."""
    return {result["commit_hash"] for _, result in found} - set(ancestors())


# --- compare ----------------------------------------------------------------------------------------------------


def pick(found: Sequence[tuple[Path, Record]], names: Sequence[str | None]) -> list[str]:
    """The two commits to compare, by a beginning of their hash or any name git knows; by default the newest two."""
    gone = lost(found)
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
    found = records(options.history)
    old, new = pick(found, (options.old, options.new))
    by_environment = [{r["env_name"]: r for _, r in found if r["commit_hash"] == c} for c in (old, new)]
    common = sorted(by_environment[0].keys() & by_environment[1].keys())
    if not common:
        recorded = " and ".join(", ".join(sorted(environments)) for environments in by_environment)
        raise Refused(f"{old[:8]} and {new[:8]} were recorded in different environments: {recorded}")
    worse = 0
    for environment in common:
        pair = by_environment[0][environment], by_environment[1][environment]
        print(f"{old[:8]} → {new[:8]}, {environment}, lower is better")
        worse += report(*pair, options.factor, options.all)
    return 1 if worse else 0


def report(old: Record, new: Record, factor: float, with_others: bool = False) -> int:
    """Print one comparison and return how many figures got worse."""
    for note in differing(old, new):
        print(note)
    every, others = changes(old, new, factor)
    quick = is_quick(old, new)
    judged = [change for change in every if is_judged(change, quick)]
    changed = [change for change in judged if change.verdict != "same"]
    for line in table(changed):
        print(line)
    print(f"{len(judged) - len(changed):6} figures did not change by more than their factor")
    for why, count in (+others).items():
        print(f"{count:6} figures {why}")
    if with_others:
        print("\nNot judged, because comparable only between runs on one quiet machine:")
        for line in table([change for change in every if not is_judged(change, quick)]):
            print(line)
    return sum(change.verdict in ("gone", "worse") for change in judged)


def check(options: argparse.Namespace) -> int:
    """Compare the working tree with a base, both measured here and now by the benchmarks of the working tree."""
    base = options.base or base_of(options.history)
    base = git("rev-parse", "--verify", "--end-of-options", f"{base}^{{commit}}")
    if not git("diff", "--stat", base, "--", "ddnref", "asv_benches/benchmarks"):
        print(f"neither the package nor its benchmarks differ from {base[:8]}: nothing to compare")
        return 0
    old, new = without_clock(base, NO_CLOCK), measured(ROOT, NO_CLOCK)
    print(f"{base[:8]} ({old['subject']}) → the working tree, lower is better")
    worse = report(old, new, options.factor)
    if worse:
        print("If that is meant, commit, and record it as the new base: history.py record --no-clock --keep")
    return 1 if worse else 0


def base_of(history: Path) -> str:
    """The newest kept record before HEAD, so that no change since then escapes; it is the merge base or older."""
    known = set(ancestors()) - {git("rev-parse", "HEAD")}
    kept = [result["commit_hash"] for _, result in read(history) if result["commit_hash"] in known]
    if not kept:
        raise Refused("no commit before HEAD is recorded; name one with --base, or in a shallow clone: "
                      "git fetch --unshallow")  # fmt: skip
    return kept[-1]


def show_steps(options: argparse.Namespace) -> int:
    found = sorted(steps(curves(result for _, result in records(options.history)), options.factor),
                   key=lambda step: (step.record["revision"], step.name))  # fmt: skip
    for step in found:
        commit, subject = step.record["commit_hash"][:8], step.record["subject"]
        print(f"{commit} {step.old:10.3g} → {step.new:<9.3g} {step.name} [{step.unit}]: {subject}")
    print(f"{len(found)} steps")
    return 0


# --- the command ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--history", type=Path, default=KEPT, metavar="DIR", help="where the kept records are")
    judging = argparse.ArgumentParser(add_help=False)
    judging.add_argument("--factor", type=factor, default=1.1, help="by which a figure may get worse; counts may not")
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("record", parents=[shared], help="measure a commit and write a record of it")
    one.add_argument("commits", nargs="*", metavar="COMMIT", help="with --no-clock; default: HEAD")
    one.add_argument("--no-clock", action="store_true", help="only what no clock enters, with the present benchmarks")
    one.add_argument("--keep", action="store_true", help="in the folder of the kept records, to be committed")
    one.add_argument("--bench", action="append", default=[], metavar="REGEX", help="only these, may be repeated")
    one.add_argument("--quick", action="store_true", help="every benchmark once: times mean nothing then")
    one.set_defaults(command=record)
    one = commands.add_parser("compare", parents=[shared, judging], help="compare two recorded commits")
    one.add_argument("old", nargs="?", metavar="OLD", help="default: the newest recorded but one")
    one.add_argument("new", nargs="?", metavar="NEW", help="default: the newest recorded")
    one.add_argument("--all", action="store_true", help="show also what is not judged: times")
    one.set_defaults(command=compare)
    one = commands.add_parser(
        "check", parents=[shared, judging], help="measure and compare a base and the working tree"
    )
    one.add_argument("--base", metavar="COMMIT", help="default: the newest kept record before HEAD")
    one.set_defaults(command=check)
    one = commands.add_parser("steps", parents=[shared, judging], help="commits at which a figure took another level")
    one.set_defaults(command=show_steps)
    return top


def factor(text: str) -> float:
    value = float(text)
    if not value >= 1:
        raise Refused(f"--factor {value:g}: 1 or more, because a figure that did not change is not worse")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parser().parse_args(arguments)
        return int(options.command(options))
    except Refused as reason:
        print(f"history.py: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
