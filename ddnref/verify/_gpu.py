"""``ddnref gpu-record``: what a GPU makes of the package, measured and written to one JSON file that can be sent.

Everything runs on CuPy arrays. The record has the environment, the outcome of the array tests and of ``ddnref verify``,
for each rule its difference from NumPy, time, memory and whether the host waits for the GPU, the times of cuBLAS and
cuSOLVER to judge them by, and the gradients of the bridges of PyTorch and JAX on the same device.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import ddnref
from ddnref._core.arrays import Array, as_tuple
from ddnref._rules.binding import options_of, plain_forward, plain_vjp
from ddnref._rules.table import RULES, TRIALS
from ddnref.verify._backends import Backend
from ddnref.verify._run import measure, worst

Call: TypeAlias = Callable[[], Any]

DTYPES = ("float32", "float64")
SIZES = ((5, 32), (1000, 32), (1, 512))
"""Matrices per batch, and their size."""
SOLVERS = ("cg", "minres", "bicgstab", "gmres", "lsmr", "eigsh")
BRIDGED = ("eigh", "svd", "cholesky", "solve", "sqrtm", "lstsq")
BUSY = 4096  # rows of the matrix whose products keep the GPU busy: about a tenth of a second on a fast one
SECONDS = 0.2  # for which a call is repeated
MIB = 2**20
TESTS = Path(ddnref.__file__).parents[1] / "tests" / "conftest.py"


# --- what is measured ---------------------------------------------------------------------------------------------


def rule(convert: Callable[[Any], Array], name: str, batch: int, m: int, dtype: str) -> tuple[Call, Call]:
    """Return forward and VJP of a rule on its own sample, with arrays made by `convert`, and with ``throw=False``."""

    def rounded(values: Any) -> NDArray[Any]:
        array: NDArray[Any] = np.asarray(values)
        return array.astype(dtype) if array.dtype.kind == "f" else array

    sample = TRIALS[name].sample(rounded, np.random.default_rng(0), (batch,), m, False)
    forward_options, vjp_options = options_of(RULES[name], sample.options)
    forward = partial(plain_forward(RULES[name]), *map(convert, sample.inputs), **forward_options)
    outputs, saved = plain_forward(RULES[name])(*sample.inputs, **forward_options)  # on the host: they are NumPy's
    bars = as_tuple(sample.loss[1](*outputs)) if sample.loss else outputs
    kept = (*outputs, *saved, *(sample.inputs[i] for i in RULES[name].needs))
    arrays = [convert(np.ascontiguousarray(a)) for a in (*map(rounded, bars), *kept)]
    return forward, partial(plain_vjp(RULES[name]), *arrays, **vjp_options)


def solver(convert: Callable[[Any], Array], name: str, n: int, dtype: str) -> Call:
    """Return a Krylov method on a blur with a ridge over an n×n grid; `eigsh`: its four largest eigenpairs."""
    rng = np.random.default_rng(0)
    kernel, ridge, b = map(convert, (np.full((5, 5), 1 / 25, dtype), np.asarray(0.1, dtype),
                                     rng.standard_normal((n, n)).astype(dtype)))  # fmt: skip
    operator = ddnref.operators.normal(ddnref.operators.convolution(kernel, (n, n)), ridge)
    if name == "eigsh":
        return partial(ddnref.eigsh, operator, 4, v0=b, rtol=1e-3, throw=False)
    return partial(getattr(ddnref.krylov, name), operator, b, rtol=1e-3, throw=False)


def networks(convert: Callable[[Any], Array], widths: tuple[int, int, int, int]) -> dict[str, Call]:
    """Return what is computed of a network, by name; `widths` are those of `Chain.mlp`, in double precision."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((64, widths[0])), rng.integers(widths[2], size=64)
    start = ddnref.networks.Chain.mlp(*widths, seed=0)
    chain = ddnref.networks.Chain.from_arrays(
        [convert(p) for p in start.params], activation="tanh", loss="cross_entropy"
    )
    data, b = (convert(x), convert(labels)), [convert(p) for p in start.params]
    few = data[0][:2, ...], data[1][:2]
    return {
        "gradient": partial(chain.gradient, *data, throw=False),
        "hvp": partial(chain.hvp, *data, b, throw=False),
        "ggn_eigh": partial(ddnref.curvature.ggn_eigh, chain, *few, k=2, throw=False),
        "hessian_solve": partial(ddnref.curvature.hessian_solve, chain, *few, b, damping=1e-3, throw=False),
    }


def limits(convert: Callable[[Any], Array], cupy: Any, batch: int, m: int, dtype: str) -> dict[str, Call]:
    """Return the calls of cuBLAS and cuSOLVER that no rule of this size can be faster than."""
    a = np.random.default_rng(0).standard_normal((batch, m, m)).astype(dtype)
    a = a @ a.mT + m * np.eye(m, dtype=dtype)
    x = convert(a)
    named = {"product": partial(cupy.matmul, x, x), "eigh": partial(cupy.linalg.eigh, x)}
    return named | {name: partial(getattr(cupy.linalg, name), x) for name in ("cholesky", "qr", "svd", "inv")}


# --- the instruments ----------------------------------------------------------------------------------------------


def gpu_time(call: Call) -> float:
    """Median time between two events on the current stream, in ms: what the GPU takes, whatever the host does."""
    benchmark = importlib.import_module("cupyx.profiler").benchmark
    times = benchmark(call, n_repeat=1000, n_warmup=3, max_duration=SECONDS).gpu_times
    return 1e3 * float(np.median(times))


def gpu_memory(cupy: Any, call: Call) -> float:
    """Peak of what a second call holds of CuPy's memory pool above what is held before, in MiB.

    Counted request by request: the pool's own total only says what it has ever taken from the device.
    """

    class Peak(cupy.cuda.MemoryHook):
        name = "Peak"
        held = 0
        peak = 0

        def malloc_postprocess(self, **given: Any) -> None:
            self.held += given["mem_size"]
            self.peak = max(self.peak, self.held)

        def free_postprocess(self, **given: Any) -> None:
            self.held -= given["mem_size"]

    call()  # kernels, plans and handles are made once
    with Peak() as hook:
        call()
    return float(hook.peak) / MIB


def host_waits(cupy: Any, call: Call, busy: Array) -> bool:
    """Whether a call returns only after the GPU has finished what was in its queue before.

    Products of the large matrix `busy` fill the queue. An event behind them that is over when the call returns means
    that the host has waited: it has read a value, or a library has synchronised.
    """
    call()  # the first call compiles and takes memory from the device, which waits
    cupy.cuda.get_current_stream().synchronize()
    for _ in range(20):
        cupy.matmul(busy, busy)
    event = cupy.cuda.Event()
    event.record()
    call()
    return bool(event.done)


def _measured(cupy: Any, call: Call, busy: Array) -> dict[str, Any]:
    """Time, memory and whether the host waits; the message of an error where the call fails."""
    try:
        return {"ms": gpu_time(call), "MiB": gpu_memory(cupy, call), "host waits": host_waits(cupy, call, busy)}
    except Exception as error:  # noqa: BLE001 - one failing call is part of the record, not its end
        return {"error": f"{type(error).__name__}: {error}"}


def _difference(backend: Backend, name: str, batch: int, m: int, dtype: str) -> float | str:
    """The relative difference of a VJP from that of NumPy on the same arrays."""
    try:
        here = rule(np.asarray, name, batch, m, dtype)[1]()
        there = [backend.to_numpy(x_bar) for x_bar in rule(backend.convert, name, batch, m, dtype)[1]()]
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return _largest_difference(there, here)


def _largest_difference(found: Iterable[NDArray[Any]], expected: Iterable[NDArray[Any]]) -> float:
    """The largest difference of two gradients of one input, relative to the expected one."""
    pairs = zip(found, expected, strict=True)
    return max(float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)) for a, b in pairs)


# --- the parts of the record --------------------------------------------------------------------------------------


def environment(cupy: Any) -> dict[str, Any]:
    """Return versions, device and driver."""
    runtime = cupy.cuda.runtime
    device = runtime.getDeviceProperties(cupy.cuda.Device().id)
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=TESTS.parents[1], capture_output=True, text=True, check=False
    )
    return {
        "date": str(date.today()),
        "ddnref": ddnref.__version__,
        "commit": git.stdout.strip() if TESTS.exists() and git.returncode == 0 else None,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "CuPy": cupy.__version__,
        "CUDA runtime": runtime.runtimeGetVersion(),
        "CUDA driver": runtime.driverGetVersion(),
        "device": device["name"].decode() if isinstance(device["name"], bytes) else device["name"],
        "compute capability": f"{device['major']}.{device['minor']}",
        "memory in GiB": round(device["totalGlobalMem"] / 2**30, 1),
    }


def array_tests(*options: str) -> dict[str, Any]:
    """Run the array tests in another process, where this is a clone, and return the summary and what failed."""
    if not TESTS.exists():
        return {"skipped": "the tests are in a clone of the repository, not in the installed package"}
    arguments = ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--backend", "cupy", *options]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=TESTS.parents[1], capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    failed = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    return {"command": f"python {' '.join(arguments)}", "summary": lines[-1], "failed": failed}


def verified(backend: Backend, dtypes: tuple[str, ...] = ("float32", "float64", "complex64", "complex128")) -> Any:
    """Return the worst error of each check of each rule, its tolerance, and whether it passed."""
    rows = worst(measure(backend, dtypes, 0))
    keys = ("rule", "check", "worst at", "error", "tolerance", "passed")
    values = ((row.case.rule.name, row.check, str(row.case), row.error, row.tolerance, row.passed) for row in rows)
    return [dict(zip(keys, value, strict=True)) for value in values]


def rules(backend: Backend, cupy: Any, sizes: Iterable[tuple[int, int]] = SIZES) -> Iterator[dict[str, Any]]:
    """Yield what is measured of forward and VJP of every rule, size and dtype, and the limits of each size."""
    busy = backend.convert(np.ones((BUSY, BUSY), np.float32))
    for dtype in DTYPES:
        for size in sizes:
            where = {"batch, m": size, "dtype": dtype}
            for name, call in limits(backend.convert, cupy, *size, dtype).items():
                yield {"limit": name, **where, **_measured(cupy, call, busy)}
            for name in RULES:
                try:
                    calls = rule(backend.convert, name, *size, dtype)
                except Exception as error:  # noqa: BLE001
                    yield {"rule": name, **where, "error": f"{type(error).__name__}: {error}"}
                    continue
                forward, vjp = (_measured(cupy, call, busy) for call in calls)
                difference = _difference(backend, name, *size, dtype)
                yield {"rule": name, **where, "forward": forward, "vjp": vjp, "VJP - NumPy's, relative": difference}


def others(backend: Backend, cupy: Any, n: int = 1024, widths: tuple[int, int, int, int] = (256, 64, 10, 4)) -> Any:
    """Yield what is measured of the solvers on a grid and of a network."""
    busy = backend.convert(np.ones((BUSY, BUSY), np.float32))
    for name in SOLVERS:
        for dtype in DTYPES:
            call = solver(backend.convert, name, n, dtype)
            yield {"solver": name, "grid": n, "dtype": dtype, **_measured(cupy, call, busy)}
    for name, call in networks(backend.convert, widths).items():
        yield {"network": name, "widths": widths, **_measured(cupy, call, busy)}


def torch_bridge(device: str) -> Iterator[dict[str, Any]]:
    """Yield the difference of gradients through PyTorch's bridge from NumPy's; on CUDA also with CuPy's kernels."""
    torch = importlib.import_module("torch") if find_spec("torch") else None
    if torch is None or (device == "cuda" and not torch.cuda.is_available()):
        yield {"bridge": "torch", "skipped": "PyTorch is not installed or has no CUDA device"}
        return

    def gradients(function: Callable[..., Any], *inputs: NDArray[Any], bars: Any) -> list[NDArray[Any]]:
        leaves = [torch.tensor(x, device=device, requires_grad=True) for x in inputs]
        torch.autograd.backward(as_tuple(function(*leaves)), [torch.tensor(bar, device=device) for bar in bars])
        return [leaf.grad.cpu().numpy() for leaf in leaves]

    differentiable = importlib.import_module("ddnref.interop.torch").differentiable
    for compute in (None, "cupy") if device == "cuda" else (None,):
        for name in BRIDGED:
            compared = _bridged(name, partial(differentiable, compute=compute), gradients)
            yield {"bridge": "torch", "compute": compute or "torch", **compared}


def jax_bridge(device: str) -> Iterator[dict[str, Any]]:
    """Yield the difference of gradients through JAX's bridge from NumPy's, on JAX's default device."""
    jax = importlib.import_module("jax") if find_spec("jax") else None
    if jax is None or (device == "cuda" and jax.default_backend() != "gpu"):
        yield {"bridge": "jax", "skipped": "JAX is not installed or has no GPU"}
        return
    jax.config.update("jax_enable_x64", True)

    def gradients(function: Callable[..., Any], *inputs: NDArray[Any], bars: Any) -> list[NDArray[Any]]:
        outputs, pull_back = jax.vjp(function, *map(jax.numpy.asarray, inputs))
        bars = tuple(map(jax.numpy.asarray, bars))
        return [np.asarray(x_bar) for x_bar in pull_back(bars if isinstance(outputs, tuple) else bars[0])]

    differentiable = importlib.import_module("ddnref.interop.jax").differentiable
    for name in BRIDGED:
        yield {"bridge": "jax", **_bridged(name, differentiable, gradients)}


def _bridged(name: str, differentiable: Any, gradients: Any, batch: int = 3, m: int = 16) -> dict[str, Any]:
    """Compare the gradient of a bridged operation with NumPy's, for cotangents that the outputs themselves give."""
    sample = TRIALS[name].sample(np.asarray, np.random.default_rng(0), (batch,), m, False)
    try:
        forward, vjp = rule(np.asarray, name, batch, m, "float64")
        outputs, _ = forward()
        bars = as_tuple(sample.loss[1](*outputs)) if sample.loss else outputs
        bars = [np.zeros_like(y) if bar is None else bar for y, bar in zip(outputs, bars, strict=True)]
        found = gradients(differentiable(getattr(ddnref, name), **sample.options), *sample.inputs, bars=bars)
        return {"rule": name, "difference": _largest_difference(found, vjp())}
    except Exception as error:  # noqa: BLE001
        return {"rule": name, "error": f"{type(error).__name__}: {error}"}


# --- the record ---------------------------------------------------------------------------------------------------


def record(backend: Backend, out: Path) -> bool:
    """Measure everything and write it to `out` after each part; return whether nothing failed."""
    cupy = importlib.import_module("cupy")
    parts: dict[str, Callable[[], Any]] = {
        "environment": partial(environment, cupy),
        "verify": partial(verified, backend),
        "rules": lambda: list(rules(backend, cupy)),
        "solvers and networks": lambda: list(others(backend, cupy)),
        "bridges": lambda: [*torch_bridge("cuda"), *jax_bridge("cuda")],
        "tests": array_tests,
    }
    kept: dict[str, Any] = {}
    for i, (name, make) in enumerate(parts.items(), 1):
        sys.stdout.write(f"{i}/{len(parts)} {name}\n")
        sys.stdout.flush()
        kept[name] = make()
        # After each part, so that a crash of the driver leaves what came before.
        out.write_text(json.dumps(_plain(kept), indent=1) + "\n", encoding="utf-8")
    wrong = failures(kept)
    sys.stdout.write("\n".join([*wrong, f"{len(wrong)} failures. The record: {out}", ""]))
    return not wrong


def failures(kept: dict[str, Any]) -> list[str]:
    """List in words what failed in a record."""
    found = [f"verify: {row['rule']}, {row['check']}: {row['error']}" for row in kept["verify"] if not row["passed"]]
    for part in ("rules", "solvers and networks", "bridges"):
        for row in kept[part]:
            about = ", ".join(
                f"{value}" for key, value in row.items() if isinstance(value, (str, tuple)) and key != "error"
            )
            errors = [row, *(value for value in row.values() if isinstance(value, dict))]
            found += [f"{part}: {about}: {one['error']}" for one in errors if "error" in one]
    return found + [f"tests: {name}" for name in kept["tests"].get("failed", [])]


def _plain(value: Any) -> Any:
    """Make a value fit for JSON, which has no infinity and no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def shown(kept: dict[str, Any]) -> str:
    """Return a record as Markdown for the page of records: device, verdicts, and times beside their limits."""
    e = kept["environment"]
    checks = kept["verify"]
    lines = [
        f"## {e['device']}",
        "",
        f"Recorded by `ddnref gpu-record` on {e['date']}: ddnref {e['ddnref']}, CuPy {e['CuPy']}, CUDA "
        f"{e['CUDA runtime']}, NumPy {e['NumPy']}, Python {e['Python']}. `ddnref verify`: "
        f"{sum(row['passed'] for row in checks)} of {len(checks)} checks passed. Tests: "
        f"{kept['tests'].get('summary', 'not run')}. Failures in all: {len(failures(kept))}.",
        "",
        "| rule | batch, m | dtype | forward, ms | VJP, ms | a product, ms | eigh of cuSOLVER, ms | host waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {
        (row["limit"], *row["batch, m"], row["dtype"]): row.get("ms", math.nan)
        for row in kept["rules"]
        if "limit" in row
    }
    for row in kept["rules"]:
        if "forward" in row:
            where = (*row["batch, m"], row["dtype"])
            times = [row[part].get("ms", math.nan) for part in ("forward", "vjp")]
            times += [found["product", *where], found["eigh", *where]]
            waits = ", ".join(part for part in ("forward", "vjp") if row[part].get("host waits")) or "no"
            cells = [f"`{row['rule']}`", str(tuple(row["batch, m"])), row["dtype"], *(f"{t:.3g}" for t in times), waits]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
