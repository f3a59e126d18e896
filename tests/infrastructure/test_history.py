"""The history of the benchmarks: records name no machine and leave checkouts alone; regressions and steps show."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).parents[2] / "asv_benches"

sys.path.insert(0, str(BENCHES))
try:
    import _records
    import history
finally:
    sys.path.remove(str(BENCHES))

READS, RATIO, ERROR, TIME = "a.A.track_reads", "a.A.track_ratio", "a.A.track_error", "a.A.time_it"
UNITS = {READS: "reads", RATIO: "ratio", ERROR: "relative error", TIME: "seconds"}
SUITE = """
import measured


class A:
    unit = "reads"

    def track_reads(self):
        return measured.READS


class Missing:
    unit = "reads"

    def setup(self):
        raise NotImplementedError("nolib is not installed")

    def track_missing(self):
        return 1


class Broken:
    unit = "reads"

    def track_broken(self):
        raise ValueError("broken")
"""


@pytest.fixture
def asv() -> None:
    pytest.importorskip("asv", reason='pip install "ddnref[bench]"')


class Clone:
    """A repository with nothing but commits, and records of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.history = root, root / "asv_benches" / "history"
        root.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *identity, *arguments], cwd=self.root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit(self, message: str) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def record(
        self, commit: str, figures: dict[str, Any], bench: tuple[str, ...] = (), quick: bool = False
    ) -> dict[str, Any]:
        conditions = {"bench": list(bench), "quick": quick, "versions": {"torch": "1.0"}}
        lost = {"commit_hash": commit, "subject": "lost", "revision": 9, "date": 0}
        known = lost if commit.startswith("dead") else history.of_commit(commit)
        result = known | history.neutral(raw(commit, figures), UNITS) | {"conditions": conditions}
        history.write(self.history / history.MACHINE / f"{commit[:8]}-{result['env_name']}.json", result)
        return result


def raw(commit: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A result file as asv writes it, full of what must not be published."""
    home = "/home/ada/venv/bin/python"
    return {
        "commit_hash": commit,
        "env_name": f"existing-py{home.replace('/', '_')}",
        "date": 1_700_000_000_000,
        "params": {"machine": "adas-laptop", "cpu": "Z80", "os": "Linux 6.1 adas-laptop", "ram": "64", "python": home},
        "python": home,
        "requirements": {"local": "file:///home/ada/wheel"},
        "env_vars": {"SECRET": "/home/ada/token"},
        "result_columns": ["result", "params", "version", "started_at", "duration", "stats_ci_99_a", "stats_ci_99_b",
                           "stats_q_25", "stats_q_75", "stats_number", "stats_repeat", "samples", "profile"],
        "results": {
            name: [None if value is None else [value], [], "v", 1, 2.0, None, None, [0.5], None, None, None, None,
                   "/home/ada/profile"]
            for name, value in figures.items()
        },
        "durations": {"<build>": 0.1, "/home/ada": 1.0},
        "version": 2,
    }  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    made = Clone(tmp_path / "clone")
    monkeypatch.setattr(history, "ROOT", made.root)
    return made


def run(clone: Clone, command: str, *arguments: str) -> int:
    return history.main([command, "--history", str(clone.history), *arguments])


# --- record -------------------------------------------------------------------------------------------------------


def test_a_record_names_no_machine_user_or_folder() -> None:
    text = json.dumps(history.neutral(raw("c0ffee", {READS: 1}), UNITS))
    for planted in ("ada", "home", "Z80", "6.1", "64", "SECRET", "profile"):
        assert planted in json.dumps(raw("c0ffee", {READS: 1}))
        assert planted not in text
    assert '"result"' in text
    assert "[0.5]" in text, "the quartile of a timing stays"


def test_times_are_never_judged_and_ratios_of_times_not_in_quick_records() -> None:
    judged = {
        unit: [
            _records.is_judged(_records.Change("worse", "a.A.track_x", 1, 2, unit), quick) for quick in (False, True)
        ]
        for unit in ("reads", "relative error", "ratio", "µs", "seconds")
    }
    assert judged == {
        "reads": [True, True], "relative error": [True, True], "ratio": [True, False],
        "µs": [False, False], "seconds": [False, False],
    }  # fmt: skip
    assert not _records.is_judged(_records.Change("worse", "a.A.time_x", 1, 2, "reads"), False)


def test_the_committed_records_name_no_machine_user_or_folder() -> None:
    found = _records.read(BENCHES / "history")
    assert len(found) >= 40
    assert sorted(path for path, _ in found) == sorted((BENCHES / "history").rglob("*.*"))
    for path, result in found:
        assert not re.search(r'["_ ](/|[A-Z]:\\)\w|home|Users|/bin|/tmp', path.read_text(encoding="utf-8")), path
        assert re.fullmatch(r"(existing|counted)-py3\.\d+", result["env_name"])
        assert result["env_name"].endswith(f"py{result['python']}")
        assert path.name == f"{result['commit_hash'][:8]}-{result['env_name']}.json"
        assert result["units"].keys() == result["results"].keys()


def test_record_runs_asv_on_head(
    asv: None, clone: Clone, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    benches = clone.root / "asv_benches"
    (benches / "benchmarks").mkdir(parents=True)
    (benches / "benchmarks" / "__init__.py").touch()
    (clone.root / "measured.py").write_text("READS = 3")  # the clone's own, installed nowhere
    (benches / "benchmarks" / "a.py").write_text(SUITE)
    (benches / "asv.conf.json").write_text((BENCHES / "asv.conf.json").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(history, "HERE", benches)
    (clone.root / ".gitignore").write_text("__pycache__/\n.asv/\n")
    missing = ["nolib is not installed"]
    monkeypatch.setattr(history, "conditions", lambda bench, quick: {"bench": list(bench), "missing": missing})
    monkeypatch.setenv("HOME", str(tmp_path))  # with no machine file in it
    commit = clone.commit("suite")
    assert run(clone, "record", "--bench", "Missing|Broken") == 1, "one benchmark fails"
    assert run(clone, "record", "--bench", READS) == 0
    out = capfd.readouterr().out
    assert "skipped: nolib is not installed" in out
    assert "failed: a.Broken.track_broken" in out
    assert "failed: a.Missing" not in out
    assert clone.git("status", "--porcelain") == "", "nothing that a checkout could meet"
    (path,) = (clone.root / ".asv" / "history" / history.MACHINE).glob(f"{commit[:8]}-existing-py3.*.json")
    found = _records.figures(json.loads(path.read_text(encoding="utf-8")))
    assert {name: figure.value for name, figure in found.items()} == {
        READS: 3, "a.Missing.track_missing": None, "a.Broken.track_broken": None
    }  # fmt: skip
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    assert not (tmp_path / ".asv-machine.json").exists()
    assert run(clone, "record", "--bench", "Nothing") == 2
    assert "nothing was recorded" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "chosen"), [(["a"], ["b"], ["a", "b"]), ([], ["b"], []), (["a"], [], []), (["b"], ["b"], ["b"])]
)
def test_a_commit_can_be_recorded_in_parts(before: list[str], after: list[str], chosen: list[str]) -> None:
    old = {
        "units": {READS: "reads"},
        "results": {READS: [1], RATIO: [2]},
        "conditions": {"bench": before, "seconds": 1},
        "date": 1,
    }
    new = {
        "units": {ERROR: "x"},
        "results": {RATIO: [3], ERROR: [4]},
        "conditions": {"bench": after, "seconds": 1},
        "date": 2,
    }
    both = history.joined(old, new)
    assert both["results"] == {READS: [1], RATIO: [3], ERROR: [4]}
    assert both["units"] == {ERROR: "x", READS: "reads"}
    assert both["conditions"] == {"bench": chosen, "seconds": 1}
    assert both["date"] == 2


def test_parts_under_other_conditions_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    old = {"results": {READS: [1]}, "conditions": {"bench": [], "seconds": 1}}
    new = {"results": {RATIO: [3]}, "conditions": {"bench": [], "seconds": 2}}
    assert history.joined(old, new) == new
    assert "under other conditions and is replaced" in capsys.readouterr().out


def test_record_refuses_a_tree_that_is_not_head(
    clone: Clone, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "asv", lambda *_: pytest.fail("nothing should be measured"))
    clone.commit("one")
    (clone.root / "changed.py").touch()
    assert run(clone, "record") == 2
    assert "commit or stash first:\n?? changed.py" in capsys.readouterr().err


def test_without_asv_record_says_what_to_install(
    clone: Clone, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clone.commit("one")
    monkeypatch.setattr(history.importlib.util, "find_spec", lambda name: None)
    assert run(clone, "record") == 2
    assert 'asv is not installed: python -m pip install -e ".[bench]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("HEAD~1",), "only HEAD can be recorded with a clock"),
        (("--no-clock", "--quick"), "--no-clock takes none"),
        (("--no-clock", "nonsense"), "git rev-parse: fatal"),
        (("--no-clock",), "git archive"),  # of a commit without a package
    ],
)
def test_record_explains_bad_input(
    clone: Clone, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    clone.commit("one")
    clone.commit("two")
    assert run(clone, "record", *arguments) == 2
    assert message in capsys.readouterr().err


# --- without a clock ----------------------------------------------------------------------------------------------

PACKAGE = "READS, ERROR, PRODUCTS = 3, 2e-15, 4\n"
TWO_MODULES = """
from ddnref import {name}
import ddnref


class A:
    params = ("ours", "theirs")
    unit = "reads"

    def track_reads(self, name):
        return ddnref.READS


class B:
    unit = "relative error"

    def track_error(self):
        return ddnref.ERROR

    def track_products(self):
        return ddnref.PRODUCTS

    track_products.unit = "products"

    def time_nothing(self):
        raise AssertionError
"""


@pytest.fixture
def measurable(asv: None, clone: Clone, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """A clone with a package of three figures, and benchmarks of which one module needs a name that comes later."""
    benches = clone.root / "asv_benches"
    (benches / "benchmarks").mkdir(parents=True)
    (benches / "benchmarks" / "__init__.py").touch()
    (benches / "benchmarks" / "early.py").write_text(TWO_MODULES.format(name="READS"))
    (benches / "benchmarks" / "late.py").write_text(TWO_MODULES.format(name="LATER"))
    (benches / "_measure.py").write_text((BENCHES / "_measure.py").read_text(encoding="utf-8"), encoding="utf-8")
    (clone.root / ".gitignore").write_text("__pycache__/\n.asv/\n")
    (clone.root / "ddnref").mkdir()
    (clone.root / "ddnref" / "__init__.py").write_text(PACKAGE)
    monkeypatch.setattr(history, "HERE", benches)
    monkeypatch.setattr(history, "NO_CLOCK", (r"\.A\..*ours", r"\.B\."))
    return clone


def test_an_older_commit_is_recorded_without_a_checkout(measurable: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    first = measurable.commit("first")
    package = measurable.root / "ddnref" / "__init__.py"
    package.write_text(PACKAGE + "LATER = 1\n")
    second = measurable.commit("second")
    assert run(measurable, "record", "--no-clock", first, "HEAD") == 0
    assert "not measured: late: cannot import name 'LATER'" in capsys.readouterr().out
    assert measurable.git("status", "--porcelain") == ""
    found = _records.read(measurable.root / ".asv" / "history")
    assert [result["commit_hash"] for _, result in found] == [first, second]
    assert [result["subject"] for _, result in found] == ["first", "second"]
    figures = [_records.figures(result) for _, result in found]
    early = {"early.A.track_reads('ours')": 3, "early.A.track_reads('theirs')": None,
             "early.B.track_error": 2e-15, "early.B.track_products": 4}  # fmt: skip
    assert {name: figure.value for name, figure in figures[0].items()} == early
    assert len(figures[1]) == 2 * len(early)
    assert found[0][1]["units"]["early.B.track_products"] == "products"
    assert run(measurable, "record", "--no-clock", "--keep") == 0
    assert [path.name for path, _ in _records.read(measurable.history)] == [found[1][0].name]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("", ""), 0, "neither the package nor its benchmarks differ"),
        (("PRODUCTS = 3, 2e-15, 4", "PRODUCTS = 3, 3e-15, 4  # rounding"), 0, "3 figures did not change"),
        (("2e-15", "2e-14"), 1, r"worse +2e-15 +2e-14 +10.00  early.B.track_error \[relative error\]"),
        (("= 3,", "= 4,"), 1, r"worse +3 +4 +1.33  early.A.track_reads\('ours'\) \[reads\]"),
        ((", 4", ", 5"), 1, r"worse +4 +5 +1.25  early.B.track_products \[products\]"),
        (("PRODUCTS = 3, 2e-15, 4", "LOST = 3, 2e-15, 4"), 1, "early.B.track_products .*: no longer measured"),
    ],
    ids=["nothing", "rounding", "one digit", "one read", "one product", "gone"],
)
def test_check_finds_what_was_planted(
    measurable: Clone, capsys: pytest.CaptureFixture[str], change: tuple[str, str], code: int, said: str
) -> None:
    measurable.record(measurable.commit("base"), {READS: 1})
    measurable.commit("the record")
    package = measurable.root / "ddnref" / "__init__.py"
    package.write_text(PACKAGE.replace(*change))
    assert run(measurable, "check") == code
    assert re.search(said, capsys.readouterr().out)


def test_check_needs_a_base(measurable: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    commit = measurable.commit("base")
    assert run(measurable, "check") == 2
    assert "no commit before HEAD is recorded" in capsys.readouterr().err
    assert run(measurable, "check", "--base", commit) == 0


def test_what_is_measured_without_a_clock_needs_none() -> None:
    """Each choice finds something, in units that no clock enters; a renamed benchmark would drop out in silence."""
    newest = [result for _, result in _records.read(BENCHES / "history") if result["env_name"].startswith("counted")][
        -1
    ]
    assert set(newest["units"].values()) <= set(_records.UNTIMED)
    for regex in history.NO_CLOCK:
        assert any(re.search(regex, name) for name in _records.figures(newest)), regex


# --- compare ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ({RATIO: 1.0}, {RATIO: 1.2}, 1, r"worse +1 +1.2 +1.20  a.A.track_ratio \[ratio\]"),
        ({RATIO: 1.0}, {RATIO: 1.05}, 0, "1 figures did not change"),
        ({RATIO: 1.0}, {RATIO: 0.5}, 0, r"better +1 +0.5 +0.50"),
        ({READS: 100}, {READS: 101}, 1, "worse"),
        ({READS: 101}, {READS: 100}, 0, "better"),
        ({ERROR: 0.0}, {ERROR: 4e-17}, 0, "1 figures did not change"),
        ({READS: 0}, {READS: 1}, 1, r"worse +0 +1 +inf"),
        ({READS: 0}, {READS: 0}, 0, "1 figures did not change"),
        ({ERROR: 1e-15}, {ERROR: 4e-15}, 0, "1 figures did not change"),
        ({ERROR: 1e-15}, {ERROR: 1e-14}, 1, "worse"),
        ({RATIO: 1.0}, {RATIO: math.nan}, 1, r"gone .* a.A.track_ratio \[ratio\]: no longer measured"),
        ({RATIO: 1.0}, {RATIO: None}, 1, "no longer measured"),
        ({RATIO: 1.0, READS: 1}, {READS: 1}, 1, "no longer measured"),
        ({RATIO: math.nan}, {RATIO: 9.0}, 0, "1 figures measured for the first time"),
        ({READS: 1}, {READS: 1, RATIO: 9.0}, 0, "1 figures measured for the first time"),
        ({TIME: 1.0}, {TIME: 9.0}, 0, "0 figures did not change"),
    ],
)
def test_compare(
    clone: Clone, capsys: pytest.CaptureFixture[str], old: dict[str, Any], new: dict[str, Any], code: int, said: str
) -> None:
    clone.record(clone.commit("one"), old)
    clone.record(clone.commit("two"), new)
    assert run(clone, "compare") == code
    out = capsys.readouterr().out
    assert re.search(said, out)
    assert TIME not in out


def test_compare_options(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = clone.commit("one"), clone.commit("two")
    clone.record(one, {RATIO: 1.0, READS: 1, TIME: 1.0})
    clone.record(two, {RATIO: 1.5, READS: 1, TIME: 9.0})
    assert run(clone, "compare", "--factor", "2") == 0
    assert run(clone, "compare", two[:8], "HEAD~1") == 0, "an improvement, seen backwards"
    capsys.readouterr()
    assert run(clone, "compare", "--all") == 1
    assert re.search(r"Not judged[^\n]*\n.*\nworse +1 +9 +9.00  a.A.time_it", capsys.readouterr().out)


def test_a_ratio_of_a_quick_record_is_not_judged(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    clone.record(clone.commit("one"), {RATIO: 1.0, READS: 1})
    clone.record(clone.commit("two"), {RATIO: 9.0, READS: 1}, quick=True)
    assert run(clone, "compare") == 0
    out = capsys.readouterr().out
    assert RATIO not in out
    assert "only its counts and errors mean anything" in out


def test_the_worst_comes_first(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    clone.record(clone.commit("one"), {READS: 1, RATIO: 1.0, ERROR: 1.0})
    clone.record(clone.commit("two"), {READS: 2, RATIO: 0.1, ERROR: 20.0})
    assert run(clone, "compare") == 1
    assert re.findall(r"track_(\w+) ", capsys.readouterr().out)[:3] == ["error", "reads", "ratio"]


def test_what_was_not_selected_is_not_missing(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    clone.record(clone.commit("one"), {READS: 1, RATIO: 1.0})
    clone.record(clone.commit("two"), {READS: 1}, bench=("track_reads",))
    assert run(clone, "compare") == 0
    assert "1 figures not selected by --bench in the newer record" in capsys.readouterr().out


def test_a_benchmark_that_changed_itself_is_not_compared(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = clone.commit("one"), clone.commit("two")
    clone.record(one, {RATIO: 1.0})
    clone.record(two, {RATIO: 5.0})
    (path,) = (clone.history / history.MACHINE).glob(f"{two[:8]}*")
    path.write_text(path.read_text().replace('"v"', '"w"').replace('"1.0"', '"2.0"'))
    assert run(clone, "compare") == 0
    out = capsys.readouterr().out
    assert "1 figures of a benchmark that changed itself" in out
    assert "note: torch was 1.0, is 2.0" in out


def test_compare_in_the_order_of_commits_without_lost_ones(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    commits = [clone.commit(str(i)) for i in range(4)]  # all in one second: no date can order them
    for commit in reversed(commits):
        clone.record(commit, {RATIO: 1.0})
    clone.record("dead" * 10, {RATIO: 9.0})
    assert run(clone, "compare") == 0
    assert f"{commits[2][:8]} → {commits[3][:8]}" in capsys.readouterr().out
    assert run(clone, "compare", commits[0][:8], "deadbeef"[:4]) == 1, "by name it can still be compared"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "nonsense is not recorded; recorded, oldest first: "),
        (("HEAD",), "HEAD is not recorded; recorded, oldest first: "),
        ((), "1 commits of the history of HEAD are recorded, two are needed"),
        (("--factor", "0.5"), "--factor 0.5: 1 or more"),
        (("--factor", "nan"), "--factor nan: 1 or more"),
    ],
)
def test_compare_explains_bad_input(
    clone: Clone, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    commit = clone.commit("one")
    clone.record(commit, {RATIO: 1.0})
    clone.record("dead" * 10, {RATIO: 1.0})
    clone.commit("not recorded")
    assert run(clone, "compare", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert commit[:8] in error or "is not recorded" not in error


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([0.0] * 5, [0]),
        ([0.0, 0.1, 0.0, -0.1, 0.0], [0]),
        ([0.0, 0.0, 1.2, 0.0, 0.0], [0]),  # one that stands out
        ([0.0, 0.0, 0.0, 0.0, 1.0], [0, 4]),  # the newest one counts
        ([0.0, 0.0, 0.0, 0.4, 0.3, 0.4], [0, 3]),
        ([2.0, 2.0, 0.0, 0.0, 1.0, 1.0], [0, 2, 4]),
    ],
)
def test_levels(values: list[float], places: list[int]) -> None:
    assert _records.levels(values, 0.7) == places


def test_steps_of_errors_counts_and_times(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    errors = [1e-15, 2e-15, 1e-15, 1.2e-14, 1e-14, 2e-14]
    times = [1.0, 1.02, 1.5, 1.6, 1.55, 1.5]
    for i, (error, time) in enumerate(zip(errors, times, strict=True)):
        clone.record(clone.commit(f"commit {i}"), {ERROR: error, READS: int(i == 4), TIME: time, RATIO: 1.0})
    assert run(clone, "steps") == 0
    found = re.findall(r"(\S+) → (\S+) +a\.A\.(\w+) .*: commit (\d)", capsys.readouterr().out)
    assert found == [
        ("1.01", "1.52", "time_it", "2"), ("1e-15", "1.2e-14", "track_error", "3"),
        ("0", "1", "track_reads", "4"), ("1", "0", "track_reads", "5"),
    ]  # fmt: skip


def test_a_curve_has_one_value_for_each_commit_of_the_newest_form_of_its_benchmark(clone: Clone) -> None:
    found = [clone.record(clone.commit(str(i)), {READS: i, RATIO: i}, quick=i == 1) for i in range(4)]
    found[0]["results"][READS][2] = "another form"
    curves = _records.curves([*found, found[3]])
    assert [point.value for point in curves[READS]] == [1, 2, 3]
    assert [point.value for point in curves[RATIO]] == [0, 2, 3], "no ratio of a quick record"
