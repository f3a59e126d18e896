"""Parts shared by all benchmarks: threads, backends, problems with a fixed seed, ratios that noise cannot fake.

No framework is imported until it is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

import ddnref

from . import ENVIRONMENT, THREADS

BACKENDS = ("numpy", "torch", "jax", "cupy")
Call = Callable[[], Any]


def seconds() -> float:
    """How long one ratio is measured: two seconds, or what ``DDNREF_BENCH_SECONDS`` says (a smoke test: 0.05)."""
    return float(os.environ.get("DDNREF_BENCH_SECONDS", "2"))


def pin_threads() -> None:
    """Limit what was loaded before the environment could: BLAS and OpenMP pools, and torch's own."""
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        pass
    else:
        threadpool_limits(THREADS)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(THREADS)


def load(name: str) -> Any:
    """Import an optional framework; a missing one is skipped by its name, which is what asv does on this error."""
    try:
        module = __import__(name)
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"{name} is not installed") from error
    pin_threads()
    return module


def kilobytes(field: str) -> int:
    """Read this process's memory from Linux: ``VmRSS`` (resident) or ``VmHWM`` (its peak in this address space)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    if found is None:
        raise NotImplementedError("no /proc/self/status")
    return int(found.split()[1])


# --- backends ---------------------------------------------------------------------------------------------------


class Backend(NamedTuple):
    """How one array library takes arrays, waits for its results and wants to be called."""

    name: str
    array: Callable[[np.ndarray], Any]
    wait: Callable[[Any], Any]
    """Return when the given result has been computed."""
    compile: Callable[[Callable[..., Any]], Callable[..., Any]]
    options: dict[str, Any]
    """Options of every VJP: under ``jax.jit`` nothing can be raised."""


def as_is(value: Any) -> Any:
    return value


def _numpy_backend() -> Backend:
    return Backend("numpy", as_is, as_is, as_is, {})


def _torch_backend() -> Backend:
    torch = load("torch")
    if os.environ.get("DDNREF_BENCH_DEVICE", "cpu") == "cpu":
        return Backend("torch", torch.from_numpy, as_is, as_is, {})
    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no CUDA device")

    def wait(result: Any) -> Any:
        torch.cuda.synchronize()
        return result

    return Backend("torch", lambda a: torch.from_numpy(a).cuda(), wait, as_is, {})


def load_jax() -> Any:
    jax = load("jax")
    jax.config.update("jax_enable_x64", True)
    return jax


def _jax_backend() -> Backend:
    jax = load_jax()
    return Backend("jax", jax.numpy.asarray, jax.block_until_ready, jax.jit, {"throw": False})


def _cupy_backend() -> Backend:
    cupy = load("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise NotImplementedError("cupy finds no usable CUDA device") from error

    def wait(result: Any) -> Any:
        cupy.cuda.get_current_stream().synchronize()
        return result

    return Backend("cupy", cupy.asarray, wait, as_is, {})


_BACKENDS = {
    "numpy": _numpy_backend,
    "torch": _torch_backend,
    "jax": _jax_backend,
    "cupy": _cupy_backend,
}


def backend(name: str) -> Backend:
    """The named backend, or ``NotImplementedError`` that says what is missing."""
    pin_threads()
    return _BACKENDS[name]()


def prepared(on: Backend, function: Callable[..., Any], *arrays: Any, **options: Any) -> Call:
    """A call of `function` on arrays of the backend, compiled where it compiles, that waits for its result."""
    compiled = on.compile(partial(function, **options))
    return lambda: on.wait(compiled(*arrays))


# --- problems ---------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A batch of random symmetric matrices, their eigenpairs and cotangents of these, as NumPy arrays."""

    x: np.ndarray
    w: np.ndarray
    v: np.ndarray
    w_bar: np.ndarray
    v_bar: np.ndarray


@lru_cache(maxsize=4)
def problem(batch: int, m: int, dtype: str, seed: int = 0) -> Problem:
    """The same problem for every library: drawn in float64 with a fixed seed, then rounded to the dtype.

    Complex cotangents are those of a loss that does not depend on the phase of an eigenvector: others have no
    gradient, and every library says so.
    """
    rng = np.random.default_rng(seed)
    is_complex = np.dtype(dtype).kind == "c"

    def draw(*shape: int) -> np.ndarray:
        values = rng.standard_normal((batch, *shape))
        return (values + 1j * rng.standard_normal(values.shape) if is_complex else values).astype(dtype)

    x = draw(m, m)
    x = (x + np.conj(x.mT)) / 2
    w, v = ddnref.eigh(x)
    w_bar = rng.standard_normal((batch, m)).astype(w.dtype)
    v_bar = draw(m, m)
    if is_complex:
        v_bar = v_bar - v * (1j * np.imag(np.sum(np.conj(v) * v_bar, axis=-2, keepdims=True))).astype(dtype)
    return Problem(x, w, v, w_bar, v_bar)


def lean_problem(m: int, dtype: str) -> Problem:
    """One matrix whose eigenvectors are a Householder reflection, made without an eigendecomposition.

    For benchmarks of memory: an eigendecomposition in the setup needs more of it than a VJP and would hide it.
    """
    rng = np.random.default_rng(0)
    u = rng.standard_normal(m).astype(dtype)
    u /= np.linalg.norm(u)
    v = np.multiply.outer(-2 * u, u)
    v[np.arange(m), np.arange(m)] += 1
    w = np.linspace(1, 2, m, dtype=dtype)
    return Problem(v, w, v, rng.standard_normal(m, dtype=dtype), rng.standard_normal((m, m), dtype=dtype))


# --- ratios -----------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """The median over rounds of time(a) / time(b), with the quartiles of the rounds."""

    median: float
    low: float
    high: float


def burst(call: Call, duration: float) -> float:
    """Median time of one call, called for that long and at least once; the first quarter of the calls is dropped.

    They find the caches full of the other side's data and perhaps its threads still spinning.
    """
    times: list[float] = []
    end = time.perf_counter() + duration
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[len(times) // 4 :])


def _summary(ratios: list[float]) -> Ratio:
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return Ratio(float(middle), float(low), float(high))


def interleaved(a: Call, b: Call) -> Ratio:
    """time(a) / time(b) in this process: A B, B A, A B, … in bursts of 20 ms, after a warm-up of both."""
    duration = min(0.02, seconds() / 10)
    for call in (a, b):
        burst(call, 5 * duration)
    ratios: list[float] = []
    end = time.perf_counter() + seconds()
    while len(ratios) < 6 or time.perf_counter() < end:
        if len(ratios) % 2:
            time_b, time_a = burst(b, duration), burst(a, duration)
        else:
            time_a, time_b = burst(a, duration), burst(b, duration)
        ratios.append(time_a / time_b)
    return _summary(ratios)


def alternating(a: Case, b: Case) -> Ratio:
    """time(a) / time(b) in two processes that stay alive and run in turn, never together.

    NumPy's and torch's thread pools spin for a while after a product. In one process each takes the cores from the
    other, here neither does.
    """
    duration = min(0.3, seconds() / 4)
    rounds = max(3, round(3.5 * seconds()))
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(case, duration)) for case in (a, b)]
        ratios = []
        for k in range(rounds):
            times = {i: workers[i].measure(duration) for i in ((1, 0) if k % 2 else (0, 1))}
            ratios.append(times[0] / times[1])
    return _summary(ratios)


class Case(NamedTuple):
    """A call by name, from `_cases.CASES`, so that another process can build it too."""

    name: str
    options: dict[str, Any]

    def build(self) -> Call:
        from ._cases import CASES

        return CASES[self.name](**self.options)


class Worker:
    """A process that builds and warms up one case, then measures a burst whenever it is told to."""

    QUIET = 0.1  # OpenBLAS spins for some 30 ms after its last product

    def __init__(self, case: Case, warm_up: float) -> None:
        command = [sys.executable, "-m", f"{__package__}._worker", json.dumps([*case, warm_up])]
        folders = [Path(__file__).parents[1], Path(ddnref.__file__).parents[1]]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, folders))}
        self.case = case
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Worker:
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def measure(self, duration: float) -> float:
        """Median seconds of one call."""
        self.process.stdin.write(f"{duration}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that measures {self.case} ended with code {self.process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise NotImplementedError(answer)
        time.sleep(self.QUIET)
        return answer
