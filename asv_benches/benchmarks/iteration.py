"""Power and simultaneous iteration and their VJPs: time, memory, ratios to the textbook's forms, errors, host reads."""

from __future__ import annotations

import ddnref

from . import _iteration as iteration
from ._common import BACKENDS, backend, interleaved, load, pin_threads, prepared

N = 4


class Iteration:
    """Time of ten steps of the forward pass, and of the VJP by each implicit method."""

    params = (BACKENDS, ((5, 32), (5, 128), (1, 512)), iteration.IMPLICIT)
    param_names = ("backend", "size", "method")

    def setup(self, name: str, size: tuple[int, int], method: str) -> None:
        on = backend(name)
        p = iteration.planted_pairs(*size, N)
        arrays = [on.array(a) for a in p[:5]]
        steps = {"n": N, "symmetric": True, "rtol": 0.0, "maxiter": 10, "check_every": 10, "throw": False}
        if name == "jax":
            steps["while_loop"] = load("jax").lax.while_loop
        self.forward = prepared(on, ddnref.simultaneous_iteration, arrays[4], **steps)
        vjp = ddnref.simultaneous_iteration_vjp
        self.vjp = prepared(on, vjp, *arrays, method=method, symmetric=True, **on.options)
        for call in (self.forward, self.vjp):
            call()

    def time_ten_steps(self, *_: object) -> None:
        self.forward()

    def time_vjp(self, *_: object) -> None:
        self.vjp()


class IterationMemory:
    """Peak resident memory of the process; what a call adds is its figure less that of `peakmem_setup`."""

    params = (("numpy", "torch"), (512,))
    param_names = ("backend", "m")

    def setup(self, name: str, m: int) -> None:
        on = backend(name)
        self.arrays = [on.array(a) for a in iteration.planted_pairs(5, m, N)[:5]]

    def peakmem_setup(self, *_: object) -> None:
        """The baseline: nothing."""

    def peakmem_vjp(self, *_: object) -> None:
        ddnref.simultaneous_iteration_vjp(*self.arrays, symmetric=True)


class IterationTextbook:
    """The VJP over the textbook's structured form, three solves per pair: time interleaved, and peak memory."""

    params = ((32, 128, 512), (1, N))
    param_names = ("m", "n")
    unit = "ratio"

    def setup(self, m: int, n: int) -> None:
        pin_threads()
        self.calls = iteration.ours(5, m, n), iteration.textbook(5, m, n)

    def track_time_of_vjp(self, *_: object) -> float:
        return interleaved(*self.calls).median

    def track_memory_of_vjp(self, m: int, n: int) -> float:
        return iteration.memory(m, n)


class IterationForward:
    """Time of the iterations over that of the textbook's: a hundred steps in PyTorch, a QR of all columns."""

    unit = "ratio"

    def setup(self) -> None:
        load("torch")

    def track_power_over_100_torch_steps(self) -> float:
        return interleaved(iteration.our_power(5, 128), iteration.torch_power(5, 128)).median

    def track_step_of_4_over_qr_of_512(self) -> float:
        ratio = interleaved(iteration.our_steps(1, 512, N), iteration.qr_of_all_columns(1, 512))
        return ratio.median / iteration.STEPS


class IterationErrors:
    """Relative errors of float32 gradients against float64 ones, and iterations that misreport how they ended."""

    params = iteration.IMPLICIT
    param_names = ("method",)
    unit = "relative error"

    def track_float32(self, method: str) -> float:
        return max(error for (_, name), error in iteration.errors(128).items() if name == method)

    def track_float32_at_top_gap_1e_2(self, method: str) -> float:
        return iteration.error_at_gap(1e-2, method)


class IterationHostReads:
    """Values that the VJP reads on the host: one flag with the default check, none without."""

    params = (False, True)
    param_names = ("throw",)
    unit = "reads"

    def setup(self, throw: bool) -> None:  # noqa: ARG002
        load("array_api_strict")

    def track_host_reads_of_vjp(self, throw: bool) -> int:
        return iteration.host_reads(throw)
