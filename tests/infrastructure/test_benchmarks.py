"""The benchmark suite runs, and its instruments show what they are there to show."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ddnref
from conftest import need

BENCHES = Path(__file__).parents[2] / "asv_benches"
MODULES = (
    "bridges",
    "eigh",
    "eigsh",
    "generalized",
    "factorisations",
    "forward",
    "ggn",
    "hessian",
    "iteration",
    "krylov",
    "linear",
    "spectral",
    "ladder",
    "networks",
    "nodes",
    "operators",
    "polar",
    "scale_out",
    "startup",
    "svd",
    "trust_region",
    "work",
)
PREFIXES = ("time_", "peakmem_", "track_")

before = dict(os.environ)
os.environ["DDNREF_BENCH_THREADS"] = "1"  # nothing spins where tests run side by side
sys.path.insert(0, str(BENCHES))
try:
    benchmarks = {name: importlib.import_module(f"benchmarks.{name}") for name in MODULES}
    import _figures
    import figures
    import history
    from benchmarks import _accuracy as accuracy
    from benchmarks import _common as common
    from benchmarks import _iteration as iteration
    from benchmarks import _scale_cases as scale_cases
    from benchmarks._cases import products
finally:
    sys.path.remove(str(BENCHES))
    os.environ.clear()
    os.environ.update(before)  # importing the suite pins threads, which is not for the other tests


@pytest.fixture(autouse=True)
def _short_and_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threadpoolctl = pytest.importorskip("threadpoolctl", reason='pip install "ddnref[bench]"')
    monkeypatch.setenv("DDNREF_BENCH_SECONDS", "0.02")
    torch = sys.modules.get("torch")
    torch_threads = torch.get_num_threads() if torch else None
    with threadpoolctl.threadpool_limits(limits=1):  # restores what it and the benchmarks changed
        yield
    if torch:
        torch.set_num_threads(torch_threads)


def methods() -> list[Any]:
    """Every benchmark at the first, smallest value of each of its parameters."""
    found = []
    for module in benchmarks.values():
        for name, cls in inspect.getmembers(module, inspect.isclass):
            for method in (m for m in dir(cls) if m.startswith(PREFIXES)):
                found.append(pytest.param(cls, method, id=f"{name}.{method}"))
    return found


def smallest(cls: type) -> tuple[Any, ...]:
    axes = getattr(cls, "params", ())
    nested = axes and isinstance(axes[0], (tuple, list)) and len(cls.param_names) == len(axes)
    return tuple(axis[0] for axis in axes) if nested else axes[:1]


def run(cls: type, method: str, parameters: tuple[Any, ...]) -> Any:
    instance = cls()
    if hasattr(instance, "setup"):
        instance.setup(*parameters)
    try:
        return getattr(instance, method)(*parameters)
    finally:
        if hasattr(instance, "teardown"):
            instance.teardown(*parameters)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # BackPACK's, below vivit
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own forward mode
@pytest.mark.parametrize(("cls", "method"), methods())
@pytest.mark.slow
def test_benchmark_runs(
    cls: type, method: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = smallest(cls)
    monkeypatch.setattr(benchmarks["linear"].cases, "GRID", (32, 32))
    networks = benchmarks["networks"]
    torch_only = {benchmarks["eigh"].EighTorchApart, benchmarks["iteration"].IterationForward}
    if cls in torch_only | {networks.NetworksOverTorch, networks.NetworksErrors} or "torch" in parameters:
        need(request.config, "torch")
    if cls in (benchmarks["polar"].PolarOverTorch, benchmarks["polar"].LstsqOverTorch):
        need(request.config, "torch")
    if cls in (benchmarks["svd"].SvdBridge, benchmarks["svd"].SvdTop4):
        need(request.config, "torch")
    if cls is benchmarks["forward"].JvpPeers:
        need(request.config, parameters[0])
    if cls is benchmarks["factorisations"].CholeskyTorch:
        need(request.config, "torch")
    of_jax = benchmarks["krylov"].CgRatioJax, benchmarks["linear"].BlurJax, benchmarks["factorisations"].TridiagonalJax
    if cls in of_jax:
        need(request.config, "jax")
    if cls.__module__ == "benchmarks.scale_out":
        need(request.config, "dask")
    if cls in (benchmarks["ggn"].GgnRatio, benchmarks["ggn"].GgnErrors) and importlib.util.find_spec("vivit") is None:
        with pytest.raises(NotImplementedError, match="vivit is not installed"):
            run(cls, method, parameters)
        return
    ggn = benchmarks["ggn"]
    if cls in (ggn.GgnModule, ggn.GgnModuleOverChain):
        need(request.config, "torch")
    if cls is ggn.GgnModuleRatio and importlib.util.find_spec("curvlinops") is None:
        with pytest.raises(NotImplementedError, match="curvlinops is not installed"):
            run(cls, method, parameters)
        return
    value = run(cls, method, parameters)
    if method.startswith("track_"):
        assert np.isfinite(value)
        assert getattr(getattr(cls, method), "unit", "") or cls.unit


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.framework(n)) for n in ("torch", "jax")])
def test_backends_run(name: str) -> None:
    for cls, size in ((benchmarks["eigh"].Eigh, (2, 4)), (benchmarks["spectral"].Spectral, (2, 4))):
        parameters = (name, size, "float32") if "Eigh" in cls.__name__ else (name, "logm", size, "float64")
        for method in (m for m in dir(cls) if m.startswith("time_")):
            run(cls, method, parameters)


def test_every_module_has_the_three_kinds() -> None:
    names = {
        name: {m.values[1].split("_")[0] for m in methods() if m.values[0].__module__.endswith(name)}
        for name in ("eigh", "iteration", "spectral", "operators")
    }
    assert names == {name: {"time", "peakmem", "track"} for name in names}


@pytest.mark.parametrize("name", ["torch", "jax", "cupy"])
def test_missing_framework_is_skipped_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotImplementedError, match=f"{name} is not installed"):
        common.backend(name)


@pytest.mark.parametrize(
    ("name", "cls", "parameters"),
    [
        ("torch", "EighPeers", ("torch", (5, 32))),
        ("autograd", "EighTop4", ("autograd", 64)),
        ("torch", "EighTorchApart", ((5, 32, 0),)),
        ("jax", "EighWrong", ("jax",)),
        ("array_api_strict", "EighHostReads", (False,)),
    ],
)
def test_missing_framework_is_said_in_setup(
    name: str, cls: str, parameters: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # asv skips on this error in setup, and fails on it elsewhere
    with pytest.raises(NotImplementedError, match=f"{name} is not installed"):
        getattr(benchmarks["eigh"], cls)().setup(*parameters)


def test_slow_rungs_are_skipped_with_the_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"v2 at .* takes longer than 20 s"):
        benchmarks["ladder"].Ladder().setup("v2", (5, 1024))


# --- the instruments ----------------------------------------------------------------------------------------------


def test_interleaved_shows_a_planted_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDNREF_BENCH_SECONDS", "0.3")
    base = products(40, 32, "float32", count=3)
    assert common.interleaved(products(40, 32, "float32", count=6), base).median >= 1.5
    assert 0.7 <= common.interleaved(products(40, 32, "float32", count=3), base).median <= 1.4


def test_alternating_processes_show_a_planted_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDNREF_BENCH_SECONDS", "0.4")
    options = {"batch": 40, "m": 32, "dtype": "float32"}
    planted, base = (common.Case("products", {**options, "count": count}) for count in (12, 3))
    ratio = common.alternating(planted, base)
    assert ratio.median >= 1.5
    assert ratio.low <= ratio.median <= ratio.high


def test_host_reads_are_counted() -> None:
    strict = pytest.importorskip("array_api_strict")
    x = strict.asarray([1.0])
    with accuracy.counted_reads(type(x)) as reads:
        float(x[0])
        bool(x[0] > 0)
    assert reads == ["__float__", "__bool__"]
    assert accuracy.host_reads(throw=False) == 0
    assert accuracy.host_reads(throw=True) == 1


@pytest.mark.framework("dask")
def test_workers_are_not_timed_handing_out_what_they_have() -> None:
    from ddnref.interop.dask import map_gradients

    x = scale_cases.matrices(scale_cases.Size(2, 3, 4))
    plain, clones = ([set(call().dask) - set(x.dask) for _ in range(2)] for call in (
        lambda: map_gradients(ddnref.eigh, scale_cases.loss, x)[1], lambda: scale_cases.mapped(x)[1]
    ))  # fmt: skip
    assert plain[0] == plain[1]  # one name for one computation: what a worker still has is taken
    assert clones[0].isdisjoint(clones[1])


def test_extra_memory_is_measured() -> None:
    x = np.ones((128, 128))
    assert accuracy.extra_arrays(lambda: [x.copy() for _ in range(5)], x) == pytest.approx(5, abs=0.1)
    assert accuracy.extra_arrays(lambda: None, x) < 0.1


def test_closed_form_of_the_projector_gradient() -> None:
    p = accuracy.repeated(count=3)
    rng = np.random.default_rng(1)
    d = rng.standard_normal(p.x.shape)
    d = d + d.mT

    def loss(x: np.ndarray) -> np.ndarray:
        _, v = np.linalg.eigh(x)
        v_c = np.where(p.inside[:, None, :], v, 0)
        return np.trace(p.c @ v_c @ v_c.mT, axis1=-2, axis2=-1)

    numerical = (loss(p.x + 1e-6 * d) - loss(p.x - 1e-6 * d)) / 2e-6
    assert np.allclose(numerical, np.sum(accuracy.projector_gradient(p) * d, axis=(-2, -1)), rtol=1e-6)


def test_the_textbook_form_is_the_same_gradient() -> None:
    """In float64, from eigenvalues a little off, so that its matrix can be solved with."""
    (p,) = iteration.pairs(iteration.matrices("uniform", 5, 8), (2,))
    x = p.x.astype(np.float64)
    w, v = (a[..., -1:] for a in np.linalg.eigh(x))
    v_bar = p.v_bar[..., :1].astype(np.float64)
    ours = ddnref.simultaneous_iteration_vjp(None, v_bar, w, v, x, symmetric=True)
    assert np.allclose(iteration.structured(v_bar, w * (1 + 1e-7), v, x), ours, atol=1e-5 * np.max(np.abs(ours)))


def test_an_untrue_status_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert iteration.misreported(steps=20, m=32) == 0
    solve = ddnref.simultaneous_iteration

    def boasting(*arguments: Any, **options: Any) -> Any:
        pair, info = solve(*arguments, **options)
        return pair, info._replace(converged=np.ones_like(info.converged))

    monkeypatch.setattr(ddnref, "simultaneous_iteration", boasting)
    assert iteration.misreported(steps=20, m=32) == 5


def test_verdicts() -> None:
    assert _figures.at_most("f", 1.0, 1.0).met == "yes"
    assert _figures.at_most("f", 1.05, 1.0).met == "no"
    assert _figures.at_most("f", 1.05, 1.0, margin=1.1).met == "within 10%"
    assert _figures.at_most("f", 1.2, 1.0, margin=1.1).met == "no"
    assert _figures.at_least("f", 1.4, 1.5, margin=1.1).met == "within 10%"
    assert _figures.at_least("f", float("nan"), 1.5, margin=1.1).met == "no"
    assert _figures.at_most("f", float("nan"), 1.5, margin=1.1).met == "no"


def test_timings_on_a_busy_machine_are_not_judged() -> None:
    timed, counted = _figures.at_most("f", 1.0, 1.0, margin=1.1), _figures.at_most("f", 1.0, 1.0)
    assert figures.judged(timed, others=1.0).met == "machine busy"
    assert figures.judged(timed, others=0.01) == timed
    assert figures.judged(counted, others=1.0) == counted


def test_a_figure_that_cannot_be_measured_says_why() -> None:
    def missing(_: int) -> float:
        raise NotImplementedError("nolib is not installed")

    assert _figures.or_skipped("f", _figures.value_row, 2, float, 1) == _figures.at_most("f", 1, 2)
    assert _figures.or_skipped("f", _figures.value_row, 2, missing, 1) == _figures.Row(
        "f", "skipped: nolib is not installed"
    )


def test_ratios_are_judged_as_timings() -> None:
    ratio = common.Ratio(2.0, 1.9, 2.1)
    without = _figures.ratio_row("f", None, _figures.at_most, lambda: ratio)
    assert without == _figures.Row("f", "2.00 (1.90 to 2.10)", timed=True)
    assert _figures.ratio_row("f", 1.5, _figures.at_least, lambda: ratio).met == "yes"
    assert _figures.ratio_row("f", 1.5, _figures.at_most, lambda: ratio).met == "no"


def test_figures_print_and_write_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.md"
    figures.main(["--quick", "--only", "host-reads", "--only", "memory", "--write", str(path)])
    text = capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == text
    assert "| figure | measured | bar | met |" in text
    assert "| host reads of eigh_vjp, throw=True | 1 | ≤ 1 | yes |" in text
    assert f"numpy {np.__version__}" in text
    assert "1 thread" in text
    assert str(BENCHES.parent) not in text


def test_figures_list_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    figures.main(["--list"])
    assert capsys.readouterr().out.split() == list(figures.FIGURES)


def test_a_record_names_the_missing_frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("torch", "jax", "cupy", "autograd", "array_api_strict")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = history.conditions(["Errors"], quick=True)
    assert found["missing"] == [f"{name} is not installed" for name in names]
    assert (found["bench"], found["quick"], found["seconds"], found["threads"]) == (["Errors"], True, 0.02, 1)
    assert found["versions"]["numpy"] == np.__version__


# --- the gate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gate():
    import importlib.util

    path = BENCHES / "gate.py"
    spec = importlib.util.spec_from_file_location("gate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_gate_passes_ten_times_on_an_unchanged_commit(gate, capsys):
    assert [gate.main([]) for _ in range(10)] == [0] * 10


def test_the_gate_catches_one_more_product_in_a_vjp(gate, monkeypatch, capsys):
    from ddnref._kernels import eigh_vjp

    tiled = eigh_vjp._tiled

    def with_one_more(w_bar, w, cluster, v_bar, v, *rest):
        np.matmul(v, v)
        tiled(w_bar, w, cluster, v_bar, v, *rest)

    monkeypatch.setattr(eigh_vjp, "_tiled", with_one_more)
    assert gate.main([]) == 1
    assert "eigh_vjp: products: 3.84, recorded 2.84" in capsys.readouterr().out


def test_the_gate_catches_a_figure_that_is_not_recorded(gate):
    assert gate.compare({"new": 1.0}, {}) == ["new is not recorded: run gate.py --write"]


def test_an_older_ddnref_is_measured_under_the_present_names():
    code = """
import sys, types
for path in ("", "._rule", "._rules", "._samples", "._eigh", "._ggn", "._ggn._spectrum"):
    name = "ddnref" + path
    sys.modules[name] = types.ModuleType(name)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, sys.modules[name])
old = sys.modules["ddnref"]
old.cg = object()
sys.modules["ddnref._samples"].eigen_loss = object()
sys.modules["ddnref._rules"].RULES = {}
import benchmarks
import ddnref
from ddnref._rules.samples import eigen_loss
from ddnref._rules import binding
from ddnref._rules.table import RULES, TRIALS
assert ddnref.krylov.cg is old.cg and eigen_loss and binding is sys.modules["ddnref._rule"] and TRIALS is RULES
"""
    subprocess.run([sys.executable, "-c", code], cwd=BENCHES, check=True)


@pytest.mark.parametrize("path", sorted((BENCHES / "benchmarks").glob("_[a-z]*.py")), ids=lambda path: path.stem)
def test_asv_finds_nothing_in_private_modules(path, monkeypatch):
    """It looks into them too, and would start a process for each parameter."""
    monkeypatch.syspath_prepend(BENCHES)
    classes = [c for name, c in vars(importlib.import_module(f"benchmarks.{path.stem}")).items()
               if isinstance(c, type) and not name.startswith("_")]  # fmt: skip
    assert [c for c in classes for name in dir(c) if name.startswith(PREFIXES)] == []


def test_asv_starts_processes_that_cuda_survives():
    assert json.loads((BENCHES / "asv.conf.json").read_text())["launch_method"] == "spawn"
