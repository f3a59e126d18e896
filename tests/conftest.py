"""Array libraries as fixtures, the options of the test command, and the summary of skipped and slow tests.

The fixture `xp` runs a test on each library, `second` on a device or mode that refuses host access.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import matrix
import numpy as np
import pytest
from hypothesis import settings

BACKENDS = ("numpy", "array-api-strict", "torch", "jax")
MODULES = {"array-api-strict": "array_api_strict", "emulated-cupy": "numpy"}
FRAMEWORKS = ("torch", "jax", "autograd", "tensorflow", "dask", "asv", "sphinx")

TRACED = [
    r"ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning",
    r"ignore:.*is deprecated.*:FutureWarning",
    r"ignore:.*is deprecated.*:DeprecationWarning",
    r"ignore:.*should not be instantiated.*:DeprecationWarning",
    r"ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # behind any break of a graph
]
"""Warnings of PyTorch's own tracer about code that it traces correctly."""

gc.set_threshold(50_000, 20, 50)  # a collection looks at everything that the frameworks have imported

settings.register_profile("ddnref", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ddnref")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=[*BACKENDS, "cupy", "emulated-cupy"],
        action="append",
        help="run the array tests on this library only; may be repeated; emulated-cupy needs no GPU "
        "(tests/emulated_cupy.py)",
    )
    parser.addoption("--all-frameworks", action="store_true", help="a missing optional framework is an error")
    parser.addoption("--matrix-out", type=Path, help="write what the tests found of operation × framework × transform")


def need(config: pytest.Config, name: str) -> None:
    """Skip, or fail with --all-frameworks, where an optional framework is not installed."""
    if importlib.util.find_spec(MODULES.get(name, name)) is None:
        message = f'{name} is not installed: pip install "ddnref[{name}]"'
        if config.getoption("--all-frameworks"):
            pytest.fail(message)
        pytest.skip(message)


class MatrixWriter:
    """Collects what tests record, in other processes too, and writes it with --matrix-out."""

    def __init__(self, path: Path) -> None:
        self.path, self.record = path, matrix.Record()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.record.add(report.user_properties)

    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        terminalreporter.write_line(self.record.write(self.path, exitstatus))


class Summary:
    """Counts the tests that were skipped or left out, in other processes too, and says so in a few lines."""

    left_out = 0

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.left_out += len(items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended; each of them collects all tests."""
        self.left_out = max(self.left_out, getattr(node, "workeroutput", {}).get("left_out", 0))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["left_out"] = self.left_out

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")]
        # Most reasons name a framework that is not installed: one line for all of these.
        found = [(re.search("|".join(FRAMEWORKS), reason), reason) for reason in reasons]
        frameworks = Counter(name[0] for name, _ in found if name)
        if frameworks:
            counts = ", ".join(f"{count} {name}" for name, count in frameworks.most_common())
            terminalreporter.write_line(f'skipped, not installed: {counts} (pip install "ddnref[NAME]")')
        for reason, count in Counter(reason for name, reason in found if not name).items():
            terminalreporter.write_line(f"skipped: {count} {reason}")
        if self.left_out and config.option.markexpr == "not slow" and not config.option.keyword:
            terminalreporter.write_line(f'slow tests left out: {self.left_out} (all tests: python -m pytest -m "")')


class CompiledByJax:
    """Lets JAX forget what it compiled before the process has as many mappings of memory as Linux allows.

    Each compiled function takes about five of the 65,530. Beyond them JAX crashes.
    """

    most, every = 25_000, 20  # mappings; tests between two looks at them

    def __init__(self, maps: Path = Path("/proc/self/maps")) -> None:
        self.maps, self.tests = maps, 0

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        self.tests += 1
        if self.tests % self.every or "jax" not in sys.modules or not self.maps.exists():
            return
        if self.maps.read_bytes().count(b"\n") > self.most:
            sys.modules["jax"].clear_caches()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let workers take neighbouring tests, which share fixtures and what JAX compiled, and steal when they are done."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Summary())
    config.pluginmanager.register(CompiledByJax())
    if (path := config.getoption("--matrix-out")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(MatrixWriter(path))


@pytest.fixture
def torch(request: pytest.FixtureRequest) -> Any:
    """PyTorch."""
    need(request.config, "torch")
    return importlib.import_module("torch")


@pytest.fixture
def jax(request: pytest.FixtureRequest) -> Any:
    """JAX, in double precision."""
    need(request.config, "jax")
    backend("jax")
    return importlib.import_module("jax")


@pytest.fixture
def cell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``cell(section, column, operation, outcome)``: this test showed it, and the documentation says the same."""

    def record(section: str, column: str, operation: str, outcome: str = matrix.HOLDS) -> None:
        record_property("matrix", [section, column, operation, outcome])
        if request.config.getoption("--matrix-out") is None:
            documented = matrix.parse(matrix.FILE.read_text(encoding="utf-8"))
            assert documented[matrix.Cell(section, column, operation)] == outcome, f"run {matrix.COMMAND}"

    return record


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of the report as slow, because most of them run its stories."""
    for item in items:
        if item.path.name.startswith("test_report"):
            item.add_marker("slow")


def compiles() -> bool:
    """Whether this version of PyTorch holds our functions in its graphs."""
    from ddnref._kernels.torch_versions import COMPILES

    return COMPILES


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("framework"):
        need(item.config, marker.args[0])
    if item.get_closest_marker("graphs"):
        need(item.config, "torch")
        if not compiles():
            pytest.skip("PyTorch before 2.13 runs our functions between its graphs")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "xp" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend")
        metafunc.parametrize("xp", chosen or BACKENDS, indirect=True)


@dataclass(frozen=True)
class Backend:
    """One array library: how arrays get in and out of it, and how it compiles."""

    name: str
    namespace: Any
    device: Any = None
    jit: Callable[..., Any] = lambda f: f
    while_loop: Any = None
    """The library's own loop, which a compiled iteration needs."""

    def asarray(self, values: Any) -> Any:
        values = np.array(values, order="C")  # a copy: PyTorch takes no negative strides
        options = {} if self.device is None else {"device": self.device}
        return self.namespace.asarray(values, dtype=getattr(self.namespace, values.dtype.name), **options)

    def numpy(self, array: Any) -> Any:
        if self.name == "torch":
            return array.detach().resolve_conj().cpu().numpy()
        if self.name == "cupy":
            return array.get()
        if self.name == "array-api-strict":
            import array_api_strict

            return np.asarray(array.to_device(array_api_strict.Device("CPU_DEVICE")))
        return np.asarray(array)

    def tuple(self, arrays: Any) -> Any:
        return tuple(self.numpy(a) for a in arrays)

    def derivative(self, function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Call a derivative; JAX compiles it as a whole, and gives NaN in place of an error."""
        if self.name != "jax":
            return function(*arrays, **options)
        quiet = {"throw": False} if "throw" in inspect.signature(function).parameters else {}
        return self.jit(partial(function, **(quiet | options)))(*arrays)

    def lift(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, compiled, from NumPy arrays to NumPy arrays: what a test computes around it stays on NumPy."""
        compiled = self.jit(function)

        def back(result: Any) -> Any:
            if isinstance(result, tuple):
                return getattr(type(result), "_make", tuple)(map(back, result))
            return self.numpy(result)

        return lambda *arrays: back(compiled(*(a if a is None else self.asarray(a) for a in arrays)))


@lru_cache(maxsize=256)
def _jax_jit(function: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    import jax

    return jax.jit(partial(function, **dict(options)))


def jax_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit``, the same for the same function with the same options, so that tests share what is compiled."""
    if not isinstance(function, partial) or function.args:
        return _jax_jit(function, ())
    options = tuple(sorted(function.keywords.items()))
    try:
        return _jax_jit(function.func, options)
    except TypeError:  # an array among the options has no hash
        return _jax_jit.__wrapped__(function.func, options)


def backend(name: str, device: Any = None) -> Backend:
    if name == "numpy":
        import array_api_compat.numpy as namespace
    elif name == "torch":
        import array_api_compat.torch as namespace
    elif name in ("cupy", "emulated-cupy"):
        if name == "emulated-cupy":
            import emulated_cupy

            emulated_cupy.install()
            name = "cupy"
        import array_api_compat.cupy as namespace
    elif name == "array-api-strict":
        import array_api_strict as namespace

        namespace.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)
    else:
        import jax
        import jax.numpy as namespace

        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
        jax.config.update("jax_traceback_in_locations_limit", 0)
        return Backend(name, namespace, jit=jax_jit, while_loop=jax.lax.while_loop)
    return Backend(name, namespace, device)


@pytest.fixture
def xp(request: pytest.FixtureRequest) -> Backend:
    need(request.config, request.param)
    return backend(request.param)


@pytest.fixture(params=["array-api-strict", "torch"])
def second(request: pytest.FixtureRequest) -> Backend:
    """array-api-strict's second device, on which NumPy cannot look, and torch's meta device, which has no values."""
    need(request.config, request.param)
    if request.param == "torch":
        return backend("torch", "meta")
    import array_api_strict

    return backend("array-api-strict", array_api_strict.Device("device1"))


@pytest.fixture
def host_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every read of an array value on the host by array-api-strict, as the name of the conversion."""
    import array_api_strict

    reads: list[str] = []
    cls = type(array_api_strict.asarray(0))
    for name in ("__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "__buffer__"):
        original = getattr(cls, name, None)
        if original is None:
            continue

        def read(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, read)
    return reads


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
