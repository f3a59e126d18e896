"""The history of the benchmarks: what is recorded names no machine, pages can be built from it, regressions show."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).parents[2] / "asv_benches"

sys.path.insert(0, str(BENCHES))
try:
    import _offline
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
    def setup(self):
        raise NotImplementedError("nolib is not installed")

    def track_missing(self):
        return 1


class Broken:
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

    def record(self, commit: str, figures: dict[str, Any], bench: tuple[str, ...] = ()) -> None:
        conditions = {"bench": list(bench), "quick": False, "versions": {"torch": "1.0"}}
        result = history.neutral(raw(commit, figures), "3.11") | {"conditions": conditions}
        history.write(self.history / history.MACHINE / f"{commit[:8]}-existing-py3.11.json", result)
        described = {
            name: {"name": name, "unit": unit, "version": "v", "type": "track", "params": [], "param_names": [],
                   "code": ""}
            for name, unit in UNITS.items()
        }  # fmt: skip
        history.write(self.history / "benchmarks.json", {**described, "version": 2})


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
    text = json.dumps(history.neutral(raw("c0ffee", {READS: 1}), "3.11"))
    for planted in ("ada", "home", "Z80", "6.1", "64", "SECRET", "profile"):
        assert planted in json.dumps(raw("c0ffee", {READS: 1}))
        assert planted not in text
    assert '"result"' in text
    assert "[0.5]" in text, "the quartile of a timing stays"


def test_ratios_are_judged_and_times_are_not() -> None:
    judged = {
        unit: _records.is_tracked(_records.Change("worse", "a.A.track_x", 1, 2, unit))
        for unit in ("ratio", "µs", "seconds")
    }
    assert judged == {"ratio": True, "µs": False, "seconds": False}


def test_the_committed_records_name_no_machine_user_or_folder() -> None:
    machine, *paths = sorted(
        (BENCHES / "history" / history.MACHINE).glob("*.json"), key=lambda p: p.name != "machine.json"
    )
    assert json.loads(machine.read_text(encoding="utf-8")) == {"machine": history.MACHINE, "version": 1}
    assert paths
    for path in (*paths, BENCHES / "history" / "benchmarks.json"):
        assert not re.search(r'["_ ](/|[A-Z]:\\)\w|home|Users|/bin|/tmp', path.read_text(encoding="utf-8")), path
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["params"] == {"machine": history.MACHINE, "python": result["python"]}
        assert re.fullmatch(r"3\.\d+", result["python"])
        assert path.name == f"{result['commit_hash'][:8]}-existing-py{result['python']}.json"
        assert (result["env_vars"], result["requirements"]) == ({}, {})


def test_record_runs_asv_on_head(
    asv: None, clone: Clone, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    benches = clone.root / "asv_benches"
    (benches / "benchmarks").mkdir(parents=True)
    (benches / "benchmarks" / "__init__.py").touch()
    (clone.root / "measured.py").write_text("READS = 3")  # the clone's own, installed nowhere
    (clone.root / ".gitignore").write_text("__pycache__/\n")
    (benches / "benchmarks" / "a.py").write_text(SUITE)
    (benches / "asv.conf.json").write_text((BENCHES / "asv.conf.json").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(history, "HERE", benches)
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
    (path,) = (clone.history / history.MACHINE).glob(f"{commit[:8]}-existing-py3.*.json")
    found = _records.figures(json.loads(path.read_text(encoding="utf-8")))
    assert {name: figure.value for name, figure in found.items()} == {
        READS: 3, "a.Missing.track_missing": None, "a.Broken.track_broken": None
    }  # fmt: skip
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    assert not (tmp_path / ".asv-machine.json").exists()
    history.refuse_dirty(clone.history)  # the record itself is no change
    assert run(clone, "record", "--bench", "Nothing") == 2
    assert "nothing was recorded" in capfd.readouterr().err
    assert run(clone, "site", "--out", str(tmp_path / "site")) == 0


@pytest.mark.parametrize(
    ("before", "after", "chosen"), [(["a"], ["b"], ["a", "b"]), ([], ["b"], []), (["a"], [], []), (["b"], ["b"], ["b"])]
)
def test_a_commit_can_be_recorded_in_parts(before: list[str], after: list[str], chosen: list[str]) -> None:
    old = {"results": {READS: [1], RATIO: [2]}, "conditions": {"bench": before, "seconds": 1}, "date": 1}
    new = {"results": {RATIO: [3], ERROR: [4]}, "conditions": {"bench": after, "seconds": 1}, "date": 2}
    both = history.joined(old, new)
    assert both["results"] == {READS: [1], RATIO: [3], ERROR: [4]}
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


def test_without_asv_record_and_site_say_what_to_install(
    clone: Clone, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clone.record(clone.commit("one"), {READS: 1})
    monkeypatch.setattr(history.importlib.util, "find_spec", lambda name: None)
    for command in (("record",), ("site", "--out", str(tmp_path / "site"))):
        assert run(clone, *command) == 2
        assert 'asv is not installed: python -m pip install -e ".[bench]"' in capsys.readouterr().err


# --- site ---------------------------------------------------------------------------------------------------------


def test_site_shows_merged_commits_and_leaves_out_lost_ones(
    asv: None, clone: Clone, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = clone.commit("first")
    clone.git("checkout", "-q", "-b", "work")
    merged = clone.commit("on a branch")
    clone.git("checkout", "-q", "main")
    clone.commit("second")
    clone.git("merge", "-q", "--no-ff", "-m", "merge", "work")
    for commit, value in ((first, 1), (merged, 2), ("dead" * 10, 7)):
        clone.record(commit, {READS: value})
    out = tmp_path / "site"
    assert run(clone, "site", "--out", str(out)) == 0
    printed = capfd.readouterr().out
    assert "left out: deaddead is not in the history of HEAD" in printed
    assert "records shown: 2" in printed
    assert (out / "index.html").exists()
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    assert sorted(index["revision_to_hash"].values()) == sorted([first, merged])
    values = {v for path in out.glob("graphs/**/a.A.track_reads.json") for _, v in json.loads(path.read_text())}
    assert {1, 2} <= values


@pytest.mark.parametrize("commit", [None, "dead" * 10])
def test_site_without_a_usable_record_says_so(
    clone: Clone, tmp_path: Path, capsys: pytest.CaptureFixture[str], commit: str | None
) -> None:
    clone.commit("first")
    if commit:
        clone.record(commit, {READS: 1})
    assert run(clone, "site", "--out", str(tmp_path / "site")) == 2
    assert ("git fetch --unshallow" if commit else "nothing is recorded") in capsys.readouterr().err


PAGE = """<script src="https://cdn/lib-1.min.js" integrity="sha256-x" onerror="js_load_failure()"></script>
<script src="own.js"></script><a href="https://example.org/page">a link</a>
<link rel="stylesheet" href="https://cdn/lib.css" integrity="sha256-y">"""
OFFLINE = """<script src="vendor/lib/dist/lib.js" onerror="js_load_failure()"></script>
<script src="own.js"></script><a href="https://example.org/page">a link</a>
<link rel="stylesheet" href="vendor/lib/dist/lib.css">"""


def packed(files: dict[str, bytes]) -> bytes:
    """An archive as npm's registry has it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = packed({"dist/lib.js": b"js", "dist/lib.css": b"css", "fonts/a.woff": b"woff", "README.md": b"not needed"})
LIBRARY = _offline.Library(
    "lib", "1", base64.b64encode(hashlib.sha512(ARCHIVE).digest()).decode(),
    {"lib-1.min.js": "dist/lib.js", "lib.css": "dist/lib.css"}, ("fonts",),
)  # fmt: skip


def test_offline_pages_load_nothing_from_the_network(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(PAGE, encoding="utf-8")
    asked: list[str] = []
    _offline.make_offline(tmp_path, (LIBRARY,), lambda url: asked.append(url) or ARCHIVE)  # type: ignore[func-returns-value]
    assert asked == ["https://registry.npmjs.org/lib/-/lib-1.tgz"]
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == OFFLINE
    vendor = tmp_path / "vendor" / "lib"
    found = {str(path.relative_to(vendor)): path.read_bytes() for path in vendor.rglob("*.*")}
    assert found == {"dist/lib.js": b"js", "dist/lib.css": b"css", "fonts/a.woff": b"woff"}


@pytest.mark.parametrize(
    ("library", "said"),
    [(LIBRARY._replace(sha512="another"), "is not the archive"), (LIBRARY._replace(files={}), "does not know")],
)
def test_offline_pages_take_only_what_was_stated(tmp_path: Path, library: _offline.Library, said: str) -> None:
    (tmp_path / "index.html").write_text(PAGE, encoding="utf-8")
    with pytest.raises(_offline.Missing, match=said):
        _offline.make_offline(tmp_path, (library,), lambda _: ARCHIVE)
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == PAGE


def test_offline_pages_say_what_could_not_be_had(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(PAGE, encoding="utf-8")
    with pytest.raises(_offline.Missing, match=r"nowhere.invalid"):
        _offline.make_offline(tmp_path, (LIBRARY,), lambda _: _offline.fetched("https://nowhere.invalid/lib.tgz"))


# --- compare ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ({RATIO: 1.0}, {RATIO: 1.2}, 1, r"worse +1 +1.2 +1.20  a.A.track_ratio \[ratio\]"),
        ({RATIO: 1.0}, {RATIO: 1.05}, 0, "1 track_ figures did not change"),
        ({RATIO: 1.0}, {RATIO: 0.5}, 0, r"better +1 +0.5 +0.50"),
        ({READS: 100}, {READS: 101}, 1, "worse"),
        ({READS: 0}, {READS: 1}, 1, r"worse +0 +1 +inf"),
        ({READS: 0}, {READS: 0}, 0, "1 track_ figures did not change"),
        ({ERROR: 1e-15}, {ERROR: 5e-15}, 0, "1 track_ figures did not change"),
        ({ERROR: 1e-15}, {ERROR: 5e-14}, 1, "worse"),
        ({RATIO: 1.0}, {RATIO: math.nan}, 1, r"gone .* a.A.track_ratio \[ratio\]: no longer measured"),
        ({RATIO: 1.0}, {RATIO: None}, 1, "no longer measured"),
        ({RATIO: 1.0, READS: 1}, {READS: 1}, 1, "no longer measured"),
        ({RATIO: math.nan}, {RATIO: 9.0}, 0, "1 figures measured for the first time"),
        ({READS: 1}, {READS: 1, RATIO: 9.0}, 0, "1 figures measured for the first time"),
        ({TIME: 1.0}, {TIME: 9.0}, 0, "0 track_ figures did not change"),
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
