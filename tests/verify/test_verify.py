"""``ddnref verify``: it passes on right rules, fails on wrong ones, and says what is missing."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import io
import math
import subprocess
import sys
import types

import array_api_strict
import numpy as np
import pytest
from fuzz._old_faults import OLD, old_rule

import ddnref
from ddnref._rules import table as _rules
from ddnref._rules.binding import inputs_of
from ddnref.verify import _checks as checks
from ddnref.verify import _run
from ddnref.verify._backends import backend
from ddnref.verify._cli import main
from ddnref.verify._hard import HARD, OF_TORCH, Hard
from ddnref.verify._hard import measure as measure_hard
from ddnref.verify._run import measure, worst


@pytest.fixture
def small(monkeypatch):
    """Few problems: enough to see every check."""
    for sizes, batches in (("SIZES", "BATCHES"), ("FEW_SIZES", "FEW_BATCHES")):
        monkeypatch.setattr(checks, sizes, (3,))
        monkeypatch.setattr(checks, batches, ((2,),))


def only(monkeypatch, rule):
    monkeypatch.setattr(_rules, "RULES", {rule.name: rule})


@pytest.mark.slow
def test_numpy_passes_in_full_and_sums_up(capsys):
    assert main(["verify"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    for rule in _rules.RULES:
        assert rule in out
    rules = _rules.RULES.values()
    symmetric = [rule for rule in rules if _rules.TRIALS[rule.name].tangent == "symmetric"]
    forward = [rule for rule in rules if rule.jvp is not None]
    several = [rule for rule in forward if len(inputs_of(rule)) > 1]
    for check in set(checks.CHECKS) - {"compiled (jit)", "jvp: compiled (jit)", *OF_TORCH}:
        expected = len(forward) if check.startswith("jvp: ") else len(rules)
        expected = {"exactly Hermitian": len(symmetric), "jvp: None and zeros": len(several)}.get(check, expected)
        expected = len(HARD[check][1]) if check in HARD else expected
        assert sum(line.startswith(f"  {check} ") for line in lines) == expected
    assert "1.0e-07" in out
    assert "1.0e-09" in out
    assert "exact" in out
    assert "FAIL" not in out
    assert max(map(len, lines)) <= 80
    assert out.replace("\n", "").isprintable()  # no colours, no bar
    assert lines[-1].startswith(f"passed: {len(_rules.RULES)} rules, ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["array-api-strict", *(
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax"))])  # fmt: skip
def test_other_backends_pass(small, monkeypatch, capsys, name):
    few = {rule: _rules.RULES[rule] for rule in ("eigh_topk", "logm")}  # JAX compiles for a second each
    monkeypatch.setattr(_rules, "RULES", few if name == "jax" else _rules.RULES)
    assert main(["verify", "--backend", name, "--dtype", "complex128"]) == 0
    assert capsys.readouterr().out.endswith(f"checks on {name}\n")


@pytest.mark.framework("jax")
def test_jax_runs_compiled_and_not(small, monkeypatch):
    only(monkeypatch, _rules.RULES["eigh"])
    with backend("jax") as library:
        outcomes = measure(library, ("float32",), 0)
        assert library.bind(lambda x, *, k: x * k, k=2)(np.ones(2)).sum() == 4
    assert {"compiled (jit)", "jvp: compiled (jit)"} <= {outcome.check for outcome in outcomes}
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
    assert f"\nFAIL {name}: {check}\n  {dtype}, m=3, batch (2,): " in out
    assert out.splitlines()[-1].startswith("FAILED")
    assert max(map(len, out.splitlines())) <= 80


FORWARD_MUTANTS = {
    "sign": ("transpose of vjp", "float64", lambda t, a: -t),
    "1e-6 relative": ("transpose of vjp", "float64", lambda t, a: (1 + 1e-6) * t),
    "1e-8 relative": ("finite differences", "float64", lambda t, a: (1 + 1e-8) * t),
    "zero": ("finite differences", "float64", lambda t, a: 0 * t),
    "not a number": ("finite differences", "float64", lambda t, a: t * math.nan),
    "conjugate": ("finite differences", "complex128", lambda t, a: np.conj(t)),
    "not zero at zero": ("zero tangent", "float64", lambda t, a: t + 1e-300),
    "mixes the batch": ("batch and loop", "float64", lambda t, a: t + 1e-10 * np.sum(t, axis=0)),
    "half precision": ("single and double", "float32", lambda t, a: t * np.float32(1 + 1e-3)
                       if t.dtype == np.float32 else t),
    "double from single": ("single and double", "float32", lambda t, a: t.astype(np.float64)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", FORWARD_MUTANTS)
@pytest.mark.parametrize("name", ["eigh", "expm", "solve"])
def test_wrong_jvp_fails(small, monkeypatch, capsys, name, mutant):
    check, dtype, change = FORWARD_MUTANTS[mutant]
    failed = failed_checks_of_jvp(monkeypatch, capsys, name, dtype, lambda jvp, arrays: change_all(change, jvp, arrays))
    assert check in failed


def test_a_missing_symmetrisation_of_the_tangent_is_found(small, monkeypatch, capsys):
    """Through the upper triangle alone, or through one that is not averaged, eigenvalues move along other paths."""

    def one_triangle(jvp, arrays):
        upper = np.triu(arrays[0])
        return jvp(upper + np.conj(np.swapaxes(np.triu(arrays[0], 1), -1, -2)), *arrays[1:])

    for name in ("eigh", "expm"):
        failed = failed_checks_of_jvp(monkeypatch, capsys, name, "float64", one_triangle)
        assert {"transpose of vjp", "finite differences"} <= failed


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_dropped_tangent_is_found(small, monkeypatch, capsys, dropped):
    def drops(jvp, arrays):
        dots = [0 * a if i == dropped and a is not None else a for i, a in enumerate(arrays[:2])]
        return jvp(*dots, *arrays[2:])

    failed = failed_checks_of_jvp(monkeypatch, capsys, "solve", "float64", drops)
    assert {"transpose of vjp", "finite differences"} <= failed


def test_none_that_is_not_zeros_is_found(small, monkeypatch, capsys):
    """Half of the tangent is lost where the other input does not move."""

    def half(jvp, arrays):
        return jvp(*arrays) * (0.5 if arrays[1] is None else 1.0)

    failed = failed_checks_of_jvp(monkeypatch, capsys, "solve", "float32", half)
    assert failed == {"None and zeros"}


def test_a_rule_without_a_jvp_has_no_checks_of_one(small, monkeypatch, capsys):
    only(monkeypatch, _rules.RULES["qr"]._replace(jvp=None))
    assert main(["verify", "--dtype", "float64"]) == 0
    assert "jvp" not in capsys.readouterr().out


def change_all(change, jvp, arrays):
    """Change one array or each of several."""
    result = jvp(*arrays)
    return tuple(change(t, arrays) for t in result) if isinstance(result, tuple) else change(result, arrays)


def failed_checks_of_jvp(monkeypatch, capsys, name, dtype, wrong):
    """The names of the checks that find a JVP wrong which is ``wrong(jvp, arrays)``."""
    rule = _rules.RULES[name]

    @functools.wraps(rule.jvp)
    def changed(*arrays, **options):
        return wrong(functools.partial(rule.jvp, **options), arrays)

    with monkeypatch.context() as patch:
        only(patch, rule._replace(jvp=changed))
        assert main(["verify", "--dtype", dtype]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    found = {line.partition(": jvp: ")[2] for line in lines if line.startswith(f"FAIL {name}: ")}
    assert "" not in found  # only checks of the JVP fail
    return found


@pytest.mark.parametrize("part", ["forward", "vjp", "jvp"])
def test_rule_that_crashes_fails_with_its_message(small, monkeypatch, capsys, part):
    rule = _rules.RULES["sqrtm"]

    @functools.wraps(getattr(rule, part))
    def crash(*arrays, **options):
        raise ValueError("no such [thing]")

    only(monkeypatch, rule._replace(**{part: crash}))
    assert main(["verify", "--dtype", "float64"]) == 1
    assert "ValueError: no such [thing]" in capsys.readouterr().out


@pytest.mark.framework("torch")
@pytest.mark.parametrize("name", OLD)
def test_hard_problems_find_the_fault_that_they_are_there_for(name):
    kind, _, _, _ = OLD[name]
    case = checks.Case(old_rule(name), "float32" if kind in OF_TORCH else "float64", checks.HARD_SIZE, ())
    with backend("torch" if kind in OF_TORCH else "numpy") as library:
        (outcome,) = (found for found in checks.run_case(library, case, 0) if found.check == kind)
    assert not outcome.passed
    assert "Error" not in outcome.note  # a check that crashes finds nothing


@pytest.mark.parametrize("name", ["array-api-strict", *(
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax"))])  # fmt: skip
def test_hard_problems_take_every_library(name):
    """The calls run on it, and a judge can read the results."""
    few = {kind: rules for kind, (_, rules) in HARD.items() if name == "torch" or kind not in OF_TORCH}
    if name == "jax":  # compiles for seconds each
        few = {kind: few[kind] for kind in ("units of columns",) if kind in few}
    with backend(name) as library:
        for kind, rules in few.items():
            problem = HARD[kind][0](_rules.RULES[rules[0]], np.random.default_rng(3), np.float64)
            for convert, to_numpy in ((np.asarray, np.asarray), (library.convert, library.to_numpy)):
                error, _ = measure_hard(problem, convert, to_numpy)
                assert math.isinf(error) or error >= 0


def test_a_hard_problem_is_judged():
    one = Hard("", (np.ones(2),), lambda x: (2 * x,), lambda results: (float(abs(results[0][0] - 2)), 1e-3))
    assert measure_hard(one) == (0.0, 1e-3)
    assert measure_hard(one._replace(is_singular=True))[0] == math.inf
    assert math.isinf(measure_hard(one._replace(judge=lambda results: (math.nan, 1.0)))[0])

    def refuse(x):
        raise ddnref.SingularError

    def fail(x):
        raise ddnref.ConvergenceError

    assert math.isinf(measure_hard(one._replace(call=refuse))[0])
    assert measure_hard(one._replace(call=refuse, is_singular=True)) == (0.0, 0.0)
    assert math.isinf(measure_hard(one._replace(call=fail, is_singular=True))[0])


def test_nan_is_worst_and_fails():
    case = checks.Case(_rules.RULES["eigh"], "float64", 3, ())
    found = [checks.Outcome("linear in the cotangent", case, error, 1e-13) for error in (1e-12, math.nan, 1e-14)]
    assert math.isnan(worst(found)[0].error)
    assert [outcome.passed for outcome in found] == [False, False, True]
    assert checks.Outcome("zero cotangent", case, 0.0, 0.0).passed


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
    assert "complex64, 3, (2,)" in out


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


@pytest.mark.parametrize("module", ["docutils", "matplotlib", "sklearn"])
def test_missing_report_extra(monkeypatch, capsys, module):
    hide(monkeypatch, module)
    assert main(["report"]) == 2
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
    for command in (["verify", "--backend", "cupy"], ["gpu-record"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no usable GPU (no device)" in error
        assert "ddnref[cuda12]" in error
    assert error.startswith("ddnref: no GPU was found, so nothing is recorded.")


def test_cupy_without_the_libraries_of_cuda(monkeypatch, capsys):
    class Cuda(types.ModuleType):
        runtime = types.SimpleNamespace(CUDARuntimeError=RuntimeError, getDeviceCount=lambda: 1)

        def __getattr__(self, name):
            raise ImportError(f"no lib{name}.so")

    fake = types.ModuleType("cupy")
    fake.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    fake.cuda = Cuda("cupy.cuda")
    monkeypatch.setitem(sys.modules, "cupy", fake)
    assert main(["verify", "--backend", "cupy"]) == 2
    error = capsys.readouterr().err
    assert "finds a GPU but not the libraries of CUDA (no libcublas.so)" in error
    assert "cupy-cuda12x[ctk]" in error


EXTRAS = ("docutils", "matplotlib", "sklearn", "threadpoolctl")


def test_verify_needs_no_extra():
    """A fresh interpreter in which the packages of the extra ``report`` cannot be imported."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); from ddnref._rules import table; "
        "from ddnref.verify import _cli; table.RULES = {'qr': table.RULES['qr']}; sys.exit(_cli.main(['verify']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith("passed: 1 rules, ")
    assert done.stderr == ""


class Terminal(io.StringIO):
    """Text that is kept, of a stream that calls itself a terminal."""

    def isatty(self):
        return True


def test_progress_on_a_terminal_only(small, monkeypatch):
    only(monkeypatch, _rules.RULES["qr"])
    terminal, file = Terminal(), io.StringIO()
    with backend("numpy") as library:
        for stream in (terminal, file):
            assert measure(library, ("float32", "complex64"), 0, progress=stream)
    first, second, blank, end = terminal.getvalue().split("\r")[1:]
    assert first.rstrip() == "Checking 1 of 2: qr"
    assert second.rstrip() == "Checking 2 of 2: qr"
    assert blank.strip() == end == ""
    assert file.getvalue() == ""


def test_the_table_fits_80_columns_and_says_where(monkeypatch, capsys):
    """The longest entries of each column."""
    case = checks.Case(_rules.RULES["weighted_least_squares"], "complex128", 16, (2, 2))
    found = [checks.Outcome(check, case, 1e-100, 1e-300) for check in checks.CHECKS]
    monkeypatch.setattr(_run, "measure", lambda *_, **__: found)
    with backend("array-api-strict") as library:
        assert not _run.verify(library, ("complex128",), 10**9)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for check in checks.CHECKS:
        (row,) = (line for line in lines if line.startswith(f"  {check} "))
        assert "complex128, 16, (2, 2)" in row
        assert " FAIL " in row
