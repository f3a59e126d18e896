"""The benchmarks for a GPU, as far as they run without one: their cases, their instruments, what asv is told."""

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from ddnref._rules.table import RULES

BENCHES = Path(__file__).parents[2] / "asv_benches"
before = dict(os.environ)
os.environ["DDNREF_BENCH_THREADS"] = "1"  # as in test_benchmarks.py: the first to import the suite decides
sys.path.insert(0, str(BENCHES))
try:
    import _gpu_suite as gpu
    from benchmarks import _common as common
    from benchmarks import _gpu_cases as cases
finally:
    sys.path.remove(str(BENCHES))
    os.environ.clear()
    os.environ.update(before)  # importing the suite pins threads, which is not for the other tests

NUMPY = common.Backend("numpy", common.as_is, common.as_is, common.as_is, {})


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_every_rule_has_a_case(name, dtype):
    forward, vjp = cases.rule(NUMPY, name, 2, 4, dtype)
    for y in (*forward()[0], *vjp()):
        assert y.dtype == dtype
        assert np.isfinite(y).all()


@pytest.mark.parametrize("name", cases.SOLVERS)
def test_every_solver_has_a_case(name):
    _, info = cases.solver(NUMPY, name, 16, "float32")()
    assert np.all(info.converged)


def test_networks_have_a_case(monkeypatch):
    monkeypatch.setitem(cases.networks.NETWORKS, "small", ((5, 4, 3), 6))
    for name in cases.NETWORK:
        assert cases.network(NUMPY, name, "small", "float32")() is not None
    assert cases.hessian(NUMPY, 3, 4, 1)()[1].converged


def test_time_is_that_of_events(monkeypatch):
    """Their median, in ms, of as long a measurement as the suite is told to make."""
    asked = {}

    def benchmark(call, **options):
        asked.update(options)
        call()
        return SimpleNamespace(gpu_times=np.asarray([[0.5, 0.002, 0.001]]))

    profiler = ModuleType("cupyx.profiler")
    profiler.benchmark = benchmark
    monkeypatch.setenv("DDNREF_BENCH_SECONDS", "0.25")
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupyx", ModuleType("cupyx"))
    monkeypatch.setitem(sys.modules, "cupyx.profiler", profiler)
    called = []
    assert cases.gpu_time(lambda: called.append(1)) == pytest.approx(2.0)
    assert asked["max_duration"] == 0.25
    assert called


def test_memory_is_the_peak_above_what_was_held(monkeypatch):
    hooks = []

    class MemoryHook:
        def __enter__(self):
            hooks.append(self)
            return self

        def __exit__(self, *_):
            hooks.clear()

    def pool(**sizes):
        for event, size in sizes.items():
            for hook in hooks:
                getattr(hook, f"{event.rstrip('_')}_postprocess")(device_id=0, mem_size=size * 2**20, mem_ptr=0)

    def call():
        pool(malloc=3, free=3)
        pool(malloc=2, malloc_=4, free=4)  # one of 2 stays

    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(MemoryHook=MemoryHook)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert cases.gpu_memory(call) == 6
    assert cases.gpu_memory(lambda: pool(free=5, malloc=4)) == 0  # what was held before made room


@pytest.mark.parametrize(
    ("cls", "parameters"),
    [
        (gpu.GpuRules, ("eigh", (5, 32), "float32")),
        (gpu.GpuSolvers, ("cg", 64, "float32")),
        (gpu.GpuNetworks, ("gradient", gpu.NAMES[0], "float32")),
        (gpu.GpuHessian, ((20, 16, 1),)),
    ],
)
def test_without_cupy_setup_says_so(cls, parameters, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # asv shows n/a for this error in setup
    with pytest.raises(NotImplementedError, match="cupy is not installed"):
        cls().setup(*parameters)


def test_asv_is_shown_them_where_there_is_a_gpu(monkeypatch):
    def shown(found):
        monkeypatch.setattr(common, "backend", found)
        monkeypatch.delitem(sys.modules, "benchmarks.gpu", raising=False)
        return {name for name in vars(importlib.import_module("benchmarks.gpu")) if name.startswith("Gpu")}

    def missing(name):
        raise NotImplementedError(name)

    monkeypatch.syspath_prepend(BENCHES)
    assert shown(missing) == set()
    assert shown(lambda name: None) == {"GpuRules", "GpuSolvers", "GpuNetworks", "GpuHessian"}


@pytest.mark.parametrize("path", sorted((BENCHES / "benchmarks").glob("_[a-z]*.py")), ids=lambda path: path.stem)
def test_asv_finds_nothing_in_private_modules(path, monkeypatch):
    """It looks into them too, and would start a process for each parameter to hear that there is no GPU."""
    monkeypatch.syspath_prepend(BENCHES)
    classes = [c for name, c in vars(importlib.import_module(f"benchmarks.{path.stem}")).items()
               if isinstance(c, type) and not name.startswith("_")]  # fmt: skip
    assert [c for c in classes for name in dir(c) if name.startswith(("time_", "track_", "peakmem_"))] == []


def test_asv_starts_processes_that_cuda_survives():
    assert json.loads((BENCHES / "asv.conf.json").read_text())["launch_method"] == "spawn"
