"""Every operation on CuPy arrays: time by events on the stream, memory by a hook on CuPy's pool.

The other modules time CuPy beside NumPy, PyTorch and JAX by the clock, waiting for each result; here is what the GPU
itself takes. It lies outside of the suite, where asv would find it on any machine; `benchmarks/gpu.py` shows it to asv.
"""

from __future__ import annotations

from benchmarks._common import Call, backend
from benchmarks._gpu_cases import NETWORK, RULES, SOLVERS, gpu_memory, gpu_time, hessian, network, rule, solver
from benchmarks.networks import NAMES

DTYPES = ("float32", "float64")


class GpuRules:
    """Forward and VJP of every rule in the table."""

    params = (tuple(RULES), ((5, 32), (1000, 32), (1, 512)), DTYPES)
    param_names = ("operation", "size", "dtype")

    def setup(self, name: str, size: tuple[int, int], dtype: str) -> None:
        self.forward, self.vjp = rule(backend("cupy"), name, *size, dtype)

    def track_time_of_forward(self, *_: object) -> float:
        return gpu_time(self.forward)

    def track_time_of_vjp(self, *_: object) -> float:
        return gpu_time(self.vjp)

    def track_memory_of_forward(self, *_: object) -> float:
        return gpu_memory(self.forward)

    def track_memory_of_vjp(self, *_: object) -> float:
        return gpu_memory(self.vjp)

    track_time_of_forward.unit = track_time_of_vjp.unit = "ms"  # type: ignore[attr-defined]
    track_memory_of_forward.unit = track_memory_of_vjp.unit = "MiB"  # type: ignore[attr-defined]


class _OneCall:
    call: Call

    def track_time(self, *_: object) -> float:
        return gpu_time(self.call)

    def track_memory(self, *_: object) -> float:
        return gpu_memory(self.call)

    track_time.unit = "ms"  # type: ignore[attr-defined]
    track_memory.unit = "MiB"  # type: ignore[attr-defined]


class GpuSolvers(_OneCall):
    """Krylov methods on an operator that is never stored."""

    params = (SOLVERS, (64, 1024), DTYPES)
    param_names = ("solver", "n of an n×n grid", "dtype")

    def setup(self, name: str, n: int, dtype: str) -> None:
        self.call = solver(backend("cupy"), name, n, dtype)


class GpuNetworks(_OneCall):
    """Derivatives of networks, and their Gauss–Newton matrix."""

    params = (NETWORK, NAMES[:2], DTYPES)
    param_names = ("product", "network", "dtype")

    def setup(self, name: str, net: str, dtype: str) -> None:
        self.call = network(backend("cupy"), name, net, dtype)


class GpuHessian(_OneCall):
    """A solve with the damped Hessian of a deep network; it reads flags, and its layers are one after the other."""

    params = (((20, 16, 1), (100, 64, 1)),)
    param_names = ("layers, width, samples",)

    def setup(self, size: tuple[int, int, int]) -> None:
        self.call = hessian(backend("cupy"), *size)
