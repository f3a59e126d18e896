"""``ddnref verify``: it passes on right rules, fails on wrong ones, and says what is missing."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import io
import math
import sys
import types

import array_api_strict
import numpy as np
import pytest
from rich.console import Console

from ddnref._rules import table as _rules
from ddnref.report import terminal
from ddnref.verify import _checks as checks
from ddnref.verify._backends import backend
from ddnref.verify._cli import main
from ddnref.verify._run import measure, verify, worst


@pytest.fixture
def small(monkeypatch):
    """Few problems: enough to see every check."""
    for sizes, batches in (("SIZES", "BATCHES"), ("FEW_SIZES", "FEW_BATCHES")):
        monkeypatch.setattr(checks, sizes, (3,))
        monkeypatch.setattr(checks, batches, ((2,),))


def only(monkeypatch, rule):
    monkeypatch.setattr(_rules, "RULES", {rule.name: rule})


def test_numpy_passes_in_full_and_sums_up(capsys):
    assert main(["verify"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    for rule in _rules.RULES:
        assert rule in out
    for check in set(checks.CHECKS) - {"compiled (jit)"}:
        symmetric = sum(_rules.TRIALS[rule.name].tangent == "symmetric" for rule in _rules.RULES.values())
        expected = symmetric if check == "exactly Hermitian" else len(_rules.RULES)
        assert sum(check in line for line in lines) == expected
    assert "1.0e-07" in out
    assert "exact" in out
    assert "FAIL" not in out
    assert "\x1b" not in out  # not a terminal: no colours, no bar
    assert lines[-1].startswith(f"passed: {len(_rules.RULES)} rules, ")


@pytest.mark.parametrize("name", ["array-api-strict", *(
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax"))])  # fmt: skip
def test_other_backends_pass(small, monkeypatch, capsys, name):
    few = {rule: _rules.RULES[rule] for rule in ("eigh_topk", "logm")}  # JAX compiles for a second each
    monkeypatch.setattr(_rules, "RULES", few if name == "jax" else _rules.RULES)
    assert main(["verify", "--backend", name, "--dtype", "complex128"]) == 0
    assert f"checks on {name};" in capsys.readouterr().out


@pytest.mark.framework("jax")
def test_jax_runs_compiled_and_not(small, monkeypatch):
    only(monkeypatch, _rules.RULES["eigh"])
    with backend("jax") as library:
        outcomes = measure(library, ("float32",), 0)
        assert library.bind(lambda x, *, k: x * k, k=2)(np.ones(2)).sum() == 4
    assert "compiled (jit)" in {outcome.check for outcome in outcomes}
    assert all(outcome.passed for outcome in outcomes)


def test_strict_flags_hold_inside_only():
    before = array_api_strict.get_array_api_strict_flags()
    with backend("array-api-strict"):
        inside = array_api_strict.get_array_api_strict_flags()
        assert not inside["boolean_indexing"]
        assert not inside["data_dependent_shapes"]
    assert array_api_strict.get_array_api_strict_flags() == before


# --- wrong rules fail, each in the check that is there for it -------------------------------------------------


def antisymmetric(x_bar, size):
    return x_bar + size * np.triu(np.ones(x_bar.shape), 1)


MUTANTS = {
    "sign": ("finite differences", "float64", lambda x, a: -x),
    "1e-6 relative": ("finite differences", "float64", lambda x, a: (1 + 1e-6) * x),
    "twice": ("finite differences", "complex128", lambda x, a: 2 * x),
    "zero": ("finite differences", "float64", lambda x, a: 0 * x),
    "not a number": ("finite differences", "float64", lambda x, a: x * math.nan),
    "conjugate": ("finite differences", "complex128", lambda x, a: np.conj(x)),
    "not symmetrised": ("exactly Hermitian", "float64", lambda x, a: antisymmetric(x, 1e-12)),
    "not linear": ("linear in the cotangent", "float64", lambda x, a: x * (1 + 1e-10 * np.max(np.abs(x)))),
    "not zero at zero": ("zero cotangent", "float64", lambda x, a: x + 1e-300),
    "mixes the batch": ("batch equals loop", "float64", lambda x, a: x + 1e-10 * np.sum(x, axis=0)),
    "half precision": ("single against double", "float32", lambda x, a: np.float32(x) * np.float32(1 + 1e-3)
                       if x.dtype == np.float32 else x),
    "double from single": ("single against double", "float32", lambda x, a: x.astype(np.float64)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("name", ["eigh", "expm"])
def test_wrong_rule_fails(small, monkeypatch, capsys, name, mutant):
    check, dtype, change = MUTANTS[mutant]
    rule = _rules.RULES[name]

    @functools.wraps(rule.vjp)
    def wrong(*arrays, **options):
        return change(rule.vjp(*arrays, **options), arrays)

    only(monkeypatch, rule._replace(vjp=wrong))
    assert main(["verify", "--dtype", dtype]) == 1
    out = capsys.readouterr().out
    assert any(line.startswith(f"FAIL {name}: {check} ({dtype}, m=3, batch (2,))") for line in out.splitlines())
    assert out.splitlines()[-1].startswith("FAILED")


@pytest.mark.parametrize("part", ["forward", "vjp"])
def test_rule_that_crashes_fails_with_its_message(small, monkeypatch, capsys, part):
    rule = _rules.RULES["sqrtm"]

    @functools.wraps(getattr(rule, part))
    def crash(*arrays, **options):
        raise ValueError("no such [thing]")

    only(monkeypatch, rule._replace(**{part: crash}))
    assert main(["verify", "--dtype", "float64"]) == 1
    assert "ValueError: no such [thing]" in capsys.readouterr().out


def test_nan_is_worst_and_fails():
    case = checks.Case(_rules.RULES["eigh"], "float64", 3, ())
    found = [checks.Outcome("linear", case, error, 1e-13) for error in (1e-12, math.nan, 1e-14)]
    assert math.isnan(worst(found)[0].error)
    assert [outcome.passed for outcome in found] == [False, False, True]
    assert checks.Outcome("zero", case, 0.0, 0.0).passed


# --- options ----------------------------------------------------------------------------------------------------


def test_problem_depends_on_seed_and_not_on_backend(small):
    case = checks.Case(_rules.RULES["eigh"], "complex64", 3, (2,))
    with backend("numpy") as numpy, backend("array-api-strict") as strict:
        first, again, other = (checks.pose(numpy, case, seed) for seed in (0, 0, 1))
        elsewhere = checks.pose(strict, case, 0)
        assert np.array_equal(first.sample.inputs[0], again.sample.inputs[0])
        assert not np.array_equal(first.sample.inputs[0], other.sample.inputs[0])
        assert np.array_equal(first.sample.inputs[0], strict.to_numpy(elsewhere.sample.inputs[0]))
    assert first.sample.inputs[0].dtype == np.complex64


def test_options_reach_the_checks(small, capsys):
    assert main(["verify", "--dtype", "complex64", "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert "seed 7" in out
    assert "single against double" in out
    assert "finite differences" not in out
    assert "complex64, m=3" in out


@pytest.mark.parametrize("argv", [[], ["verify", "--backend", "fortran"], ["verify", "--dtype", "float16"],
                                  ["verify", "--seed", "-1"], ["verify", "--seed", "x"], ["prove"]])  # fmt: skip
def test_usage_errors_exit_with_2(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: ddnref" in capsys.readouterr().err


def test_version_and_help_exit_with_0(capsys):
    for argv in (["--version"], ["--help"], ["verify", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 0


# --- what is missing is named, with the command that installs it ------------------------------------------------


def hide(monkeypatch, *modules):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in modules else find(name, *a))


@pytest.mark.parametrize(("name", "module", "extras"), [
    ("torch", "torch", ["torch"]), ("jax", "jax", ["jax"]), ("cupy", "cupy", ["cuda12", "cuda13"]),
    ("array-api-strict", "array_api_strict", ["test"]),
])  # fmt: skip
def test_missing_backend(monkeypatch, capsys, name, module, extras):
    hide(monkeypatch, module)
    for command in ("verify", "report"):
        assert main([command, "--backend", name]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"The backend {name} needs {module}" in error
        for extra in extras:
            assert f'pip install "ddnref[{extra}]"' in error


@pytest.mark.parametrize(("command", "module"), [("verify", "rich"), ("report", "rich"), ("report", "matplotlib"),
                                                 ("report", "sklearn")])  # fmt: skip
def test_missing_report_extra(monkeypatch, capsys, command, module):
    hide(monkeypatch, module)
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert module in error
    assert 'pip install "ddnref[report]"' in error


def test_cupy_without_a_gpu(monkeypatch, capsys):
    class CUDARuntimeError(RuntimeError):
        pass

    def count():
        raise CUDARuntimeError("no device")

    fake = types.ModuleType("cupy")
    fake.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    fake.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=count)
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    assert main(["verify", "--backend", "cupy"]) == 2
    error = capsys.readouterr().err
    assert "no usable GPU (no device)" in error
    assert "ddnref[cuda12]" in error


def test_progress_bar_on_a_terminal_only():
    file = io.StringIO()
    shown = Console(file=file, force_terminal=True, width=80)
    with terminal.progress(shown) as track:
        assert list(track([1, 2, 3], "Counting")) == [1, 2, 3]
    assert "Counting" in file.getvalue()
    file = io.StringIO()
    with terminal.progress(Console(file=file)) as track:
        assert list(track([1, 2, 3], "Counting")) == [1, 2, 3]
    assert file.getvalue() == ""


@pytest.mark.parametrize(("width", "says_where"), [(80, False), (120, True)])
def test_table_fits_the_terminal(small, monkeypatch, width, says_where):
    file = io.StringIO()
    monkeypatch.setattr(terminal, "console", lambda: Console(file=file, width=width))
    with backend("numpy") as library:
        assert verify(library, ("float32",), 0)
    rows = [line for line in file.getvalue().splitlines() if " single against double " in line]
    assert len(rows) == len(_rules.RULES)
    for row in rows:
        assert len(row) <= width
        assert " pass " in row
        assert any(place in row for place in ("float32, m=3, batch (2,)", "nowhere")) == says_where
