"""The comparison with other libraries: its oracles are right, it catches planted errors, its page shows its record."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "docs/comparison.json").read_text(encoding="utf-8"))

before = dict(os.environ)
os.environ["DDNREF_BENCH_THREADS"] = "1"
sys.path.insert(0, str(ROOT / "asv_benches"))
try:
    import compare
    from comparison import _measure, _oracles, _problem, _tables, _worker
    from comparison._frameworks import Framework, eager

    PROBLEMS = _problem.load_problems()
finally:
    sys.path.remove(str(ROOT / "asv_benches"))
    os.environ.clear()
    os.environ.update(before)  # importing the suite pins threads, which is not for the other tests


# --- oracles ------------------------------------------------------------------------------------------------------


@pytest.mark.framework("torch")
@pytest.mark.parametrize("name", [name for name, one in PROBLEMS.items() if one.is_gradient])
def test_truths_agree_with_differences_of_values(name: str) -> None:
    """The values are those of PyTorch, in float64, at the well-conditioned instances that are meant for float32."""
    import torch

    one = PROBLEMS[name]
    inputs = _problem.rounded(one.draw(np.random.default_rng(3), "float32"), "float64")
    direction = one.compared(np.random.default_rng(4).standard_normal(inputs["x"].shape))
    loss = one.cells.get("torch", one.cells.get("ddnref-torch"))()

    def value(step: float) -> float:
        moved = {**inputs, "x": inputs["x"] + step * direction}
        arguments = {key: v for key, v in moved.items() if not key.startswith("_")}
        return float(loss(**{k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}))

    predicted = float(np.sum(one.expected(inputs) * direction))
    assert (value(1e-6) - value(-1e-6)) / 2e-6 == pytest.approx(predicted, rel=1e-5, abs=1e-6)


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own forward mode
@pytest.mark.parametrize("name", [name for name, one in PROBLEMS.items() if not one.is_gradient])
def test_truths_of_values_agree_with_dense_matrices(name: str) -> None:
    """PyTorch differentiates the network twice by itself, where the oracle takes complex steps."""
    import torch

    one = PROBLEMS[name]
    inputs = one.instances("float64", 1)[0]
    arguments = {key: torch.tensor(v) if isinstance(v, np.ndarray) else v for key, v in inputs.items()}
    assert _problem.relative_error(one.cells["torch"]()(**arguments).numpy(), one.expected(inputs)) < 1e-12


def to_mpmath(a: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda v: mpmath.mpf(float(v)), otypes=[object])(a)


def test_extended_precision_agrees_with_forty_digits() -> None:
    rng = np.random.default_rng(0)
    c = rng.standard_normal((3, 3))
    x, c = np.diag([1.0, 1.0, 3.0]) + 0.1 * np.ones((3, 3)), c + c.T
    shift = 2.0
    for f in (lambda x: _oracles.projector_below(x, shift), _oracles.inverse_root, _oracles.logarithm):
        found = _oracles.derivative(f, x.astype(np.longdouble), c.astype(np.longdouble))
        with mpmath.workdps(40):
            exact = _oracles.derivative(f, to_mpmath(x) + mpmath.mpc(0), to_mpmath(c))
            error = max(abs(mpmath.mpf(str(a)) - b) for a, b in zip(found.ravel(), exact.ravel(), strict=True))
            assert error < 1000 * float(np.finfo(np.longdouble).eps)


def test_functions_of_a_matrix_agree_with_mpmath() -> None:
    x = np.diag([0.5, 2.0, 3.0]) + 0.2 * np.ones((3, 3))
    exact = mpmath.inverse(mpmath.sqrtm(mpmath.matrix(x))), mpmath.logm(mpmath.matrix(x))
    for f, truth in zip((_oracles.inverse_root, _oracles.logarithm), exact, strict=True):
        found = np.asarray(f(x.astype(np.longdouble)), dtype=np.float64)
        assert np.allclose(found, np.asarray(truth.tolist(), dtype=np.complex128).real, rtol=0, atol=1e-14)


# --- verdicts -----------------------------------------------------------------------------------------------------


def planted(change: Any) -> dict[str, Any]:
    """Judge a library that returns the true gradients of three instances after a change."""
    one = PROBLEMS["eigenspace-equal"]
    tasks = [_measure.Task(inputs, one.expected(inputs)) for inputs in one.instances("float64", 3)]
    truths = {task.inputs["x"].tobytes(): task.truth for task in tasks}
    numpy = Framework(np.asarray, eager, eager, eager)

    def call(x: np.ndarray, **_: Any) -> Any:
        return change(np.asarray(truths[x.tobytes()], dtype=np.float64)), True

    return _worker.errors(one, numpy, call, tasks, "float64")


def counts(found: dict[str, Any]) -> tuple[int, ...]:
    return tuple(found[key] for key in ("right", "silent", "nan", "told"))


def test_a_planted_wrong_gradient_is_silently_wrong() -> None:
    assert counts(planted(lambda g: g)) == (3, 0, 0, 0)
    assert counts(planted(lambda g: g * (1 + 1e-7))) == (3, 0, 0, 0)
    wrong = planted(lambda g: g * (1 + 1e-5))
    assert counts(wrong) == (0, 3, 0, 0)
    assert wrong["worst"] == pytest.approx(1e-5, rel=0.1)
    assert counts(planted(lambda g: np.where(np.arange(8) == 0, np.nan, g))) == (0, 0, 3, 0)


def test_errors_warnings_and_statuses_are_not_silent() -> None:
    truth = np.ones(3, dtype=np.longdouble)
    wrong = np.full(3, 2.0)
    for outcome, expected in (
        (_problem.Outcome(None, "ValueError: no"), "told"),
        (_problem.Outcome(wrong, "its status"), "told"),
        (_problem.Outcome(wrong), "silent"),
        (_problem.Outcome(wrong * np.inf, "a warning"), "nan"),
        (_problem.Outcome(np.ones(3), "a warning"), "right"),
    ):
        assert _problem.verdict(outcome, truth, "float64") == expected
    assert _problem.verdict(_problem.Outcome(np.full(3, 1 + 1e-4)), truth, "float64") == "silent"
    assert _problem.verdict(_problem.Outcome(np.full(3, 1 + 1e-4)), truth, "float32") == "right"


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.framework("autograd")
def test_a_problem_is_measured() -> None:
    """The lightest framework, in two processes."""
    one = PROBLEMS["eigenspace-equal"]
    libraries = _measure.with_partners(one, ["autograd"])
    assert libraries == ["ddnref-autograd", "autograd"]
    cells = _measure.measure(one, libraries, count=4, duration=0.001)
    ours, theirs = (cells[library] for library in libraries)
    for dtype in ("float64", "float32"):
        assert counts(ours["errors"][dtype]) == (4, 0, 0, 0)
        assert theirs["errors"][dtype]["right"] < 4
    assert ours["hard"].startswith("NaN and a warning")
    assert theirs["ratio"][0] > 0
    again = _measure.measure(one, ["autograd"], count=4, duration=0)
    assert again["autograd"]["errors"] == theirs["errors"]


def test_cells_are_chosen_by_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDNREF_BENCH_THREADS", "1")
    cells = {"a": ["x", "y"], "b": ["x"]}
    assert compare.chosen(None, cells) == cells
    assert compare.chosen(["a:y", "b"], cells) == {"a": ["y"], "b": ["x"]}
    with pytest.raises(SystemExit, match="a:z is not a cell"):
        compare.chosen(["a:z"], cells)
    compare.main(["--list"])
    listed = capsys.readouterr().out.split()
    assert listed == [f"{name}:{library}" for name, one in PROBLEMS.items() for library in one.cells]
    compare.main(["--show", "eigenspace-equal:torch"])
    assert "torch.linalg.eigh(x)" in capsys.readouterr().out


def test_a_changed_share_is_a_difference() -> None:
    changed = copy.deepcopy(RECORD)
    assert not list(compare.differences(RECORD, changed))
    name, one = next(iter(changed["problems"].items()))
    library, cell = next((library, cell) for library, cell in one["cells"].items() if "errors" in cell)
    cell["errors"]["float64"]["silent"] += 1
    (found,) = compare.differences(RECORD, changed)
    assert found.startswith(f"{name}:{library}: errors was")


def test_one_cell_is_written_into_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RECORD", tmp_path / "comparison.json")
    one = {"versions": {"numpy": "2"}, "date": "a", "problems": {"p": {"cells": {"x": 1, "y": 2}}, "q": {"cells": {}}}}
    compare.write(one, merge=False)
    compare.write({**one, "date": "b", "problems": {"p": {"cells": {"y": 3}}}}, merge=True)
    found = json.loads(compare.RECORD.read_text(encoding="utf-8"))
    assert found == {**one, "problems": {"p": {"cells": {"x": 1, "y": 3}}, "q": {"cells": {}}}}
    with pytest.raises(SystemExit, match="other versions than in the record: numpy"):
        compare.write({**one, "versions": {"numpy": "3"}}, merge=True)


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_record_holds_every_cell() -> None:
    recorded = {name: set(one["cells"]) for name, one in RECORD["problems"].items()}
    assert recorded == {name: set(one.cells) for name, one in PROBLEMS.items()}
    assert all(set(one.cells) <= set(_problem.LIBRARIES) for one in PROBLEMS.values())
    assert all(one["title"] == PROBLEMS[name].title for name, one in RECORD["problems"].items())
    assert all(one["text"] == PROBLEMS[name].text for name, one in RECORD["problems"].items())


def test_the_page_shows_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="the directive needs Sphinx")
    pytest.importorskip("markdown_it", reason="the directive needs markdown-it-py")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    directives = importlib.import_module("_directives")

    def page(record: dict[str, Any]) -> str:
        parts = ("conditions", "charts", "better", "problems")
        return "\n".join(line for part in parts for line in directives.comparison_parts(record, part))

    text = page(RECORD)
    assert RECORD["date"] in text
    for name, one in RECORD["problems"].items():
        assert one["title"] in text
        assert f"--only {name}" in text
        timed = sum("ratio" in cell for cell in one["cells"].values())
        assert text.count(f"<title>{name}:") == 2 * len(one["cells"]) + timed
    changed = copy.deepcopy(RECORD)
    cell = changed["problems"]["eigenspace-equal"]["cells"]["torch"]
    cell["errors"]["float64"]["worst"] = 1e52
    cell["ratio"] = [0.123, 0.1, 0.2]
    assert "1e+52" not in text
    assert "1e+52" in page(changed)
    assert "0.12" in page(changed)


def test_faster_and_better_libraries_are_listed() -> None:
    changed = copy.deepcopy(RECORD)
    cell = changed["problems"]["eigenspace-regular"]["cells"]["torch"]
    cell["ratio"] = [0.5, 0.4, 0.6]
    assert any("PyTorch takes 0.50 of ddnref's time" in line for line in _tables.faster(changed))
    cell["errors"]["float64"]["silent"] = 1
    assert not any("PyTorch takes 0.50" in line for line in _tables.faster(changed))
    ours = changed["problems"]["eigenspace-regular"]["cells"]["ddnref-torch"]
    ours["errors"]["float32"]["nan"] = 7
    ours["second"], cell["second"] = "no: because", "yes"
    behind = "\n".join(_tables.behind(changed))
    assert "ddnref in PyTorch in float32 is wrong" in behind
    assert "Second derivatives that PyTorch gives and ddnref in PyTorch does not" in behind
