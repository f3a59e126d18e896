"""``ddnref.eigh`` and its VJPs: time, memory, ratios to the limit and to peers, errors, host reads."""

from __future__ import annotations

import numpy as np

import ddnref

from . import _accuracy as accuracy
from ._cases import PEERS, ours, products
from ._common import (
    BACKENDS,
    Case,
    alternating,
    backend,
    interleaved,
    lean_problem,
    load,
    pin_threads,
    prepared,
    problem,
)

DTYPES = ("float32", "float64")
K = 4


class Eigh:
    """Time of the forward pass and of the VJPs on every backend; of the default call, gauge check included."""

    params = (BACKENDS, ((5, 32), (1000, 32), (1, 512)), DTYPES)
    param_names = ("backend", "size", "dtype")

    def setup(self, name: str, size: tuple[int, int], dtype: str) -> None:
        on = backend(name)
        x, w, v, w_bar, v_bar = (on.array(a) for a in problem(*size, dtype))
        self.forward = prepared(on, ddnref.eigh, x)
        self.vjp = prepared(on, ddnref.eigh_vjp, w_bar, v_bar, w, v, **on.options)
        top = range(-K, 0)
        self.top_vjp = prepared(on, ddnref.eigh_vjp, w_bar[..., :K], v_bar[..., :K], w, v, index=top, **on.options)
        for call in (self.forward, self.vjp, self.top_vjp):
            call()

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_vjp(self, *_: object) -> None:
        self.vjp()

    def time_vjp_of_4_columns(self, *_: object) -> None:
        self.top_vjp()


class EighMemory:
    """Peak resident memory of the process; what a call adds is its figure less that of `peakmem_setup`.

    Memory on a GPU does not show here.
    """

    params = (("numpy", "torch"), (1024,), DTYPES)
    param_names = ("backend", "m", "dtype")

    def setup(self, name: str, m: int, dtype: str) -> None:
        on = backend(name)
        p = lean_problem(m, dtype)
        self.x = on.array(p.x)
        self.arrays = tuple(on.array(a) for a in (p.w_bar, p.v_bar, p.w, p.v))

    def peakmem_setup(self, *_: object) -> None:
        """The baseline: nothing."""

    def peakmem_forward(self, *_: object) -> None:
        ddnref.eigh(self.x)

    def peakmem_vjp(self, *_: object) -> None:
        ddnref.eigh_vjp(*self.arrays)


class EighExtraMemory:
    """Peak memory of the VJP above its inputs, in m×m arrays, as NumPy reports it to tracemalloc."""

    params = ((128, 1024), DTYPES)
    param_names = ("m", "dtype")
    unit = "m×m arrays"

    def track_extra_arrays_of_vjp(self, m: int, dtype: str) -> float:
        return accuracy.extra_arrays_of_vjp(m, dtype)


class EighLimit:
    """Time of the VJP over that of three NumPy products of the same size and dtype, interleaved in one process."""

    params = (((5, 32), (5, 128), (1000, 32), (5, 256), (5, 512), (1, 1024), (1, 2048)), DTYPES)
    param_names = ("size", "dtype")
    unit = "ratio"

    def setup(self, size: tuple[int, int], dtype: str) -> None:
        pin_threads()
        self.calls = ours(*size, dtype), products(*size, dtype)

    def track_vjp_over_three_products(self, *_: object) -> float:
        return interleaved(*self.calls).median


class EighPeers:
    """Time of the VJP on NumPy arrays over that of a peer's backward, interleaved in one process."""

    params = (tuple(PEERS), ((5, 32), (5, 128), (1000, 32)))
    param_names = ("peer", "size")
    unit = "ratio"

    def setup(self, peer: str, size: tuple[int, int]) -> None:
        options = {"batch": size[0], "m": size[1], "dtype": "float32"}
        self.calls = ours(**options), PEERS[peer](**options)

    def track_vjp_over_peer(self, *_: object) -> float:
        return interleaved(*self.calls).median


class EighTop4:
    """Time of the VJP of the 4 largest eigenpairs over that of a peer's backward through a slice."""

    params = (tuple(PEERS), (64, 1024))
    param_names = ("peer", "m")
    unit = "ratio"

    def setup(self, peer: str, m: int) -> None:
        if (peer, m) == ("autograd", 1024):  # a second a call: six rounds would measure nothing new
            raise NotImplementedError("autograd is too slow at m = 1024")
        options = {"batch": 1, "m": m, "dtype": "float32", "k": K}
        self.calls = ours(**options), PEERS[peer](**options)

    def track_vjp_over_peer(self, *_: object) -> float:
        return interleaved(*self.calls).median


class EighTorchApart:
    """The ratios to torch once more, in two processes that run in turn: their thread pools cannot meet."""

    params = (((5, 32, 0), (5, 128, 0), (1000, 32, 0), (1, 1024, K)),)
    param_names = ("batch, m, k",)
    unit = "ratio"

    def setup(self, size: tuple[int, int, int]) -> None:
        load("torch")
        self.options = {"batch": size[0], "m": size[1], "k": size[2], "dtype": "float32"}

    def track_vjp_over_torch(self, *_: object) -> float:
        return alternating(Case("ours", self.options), Case("torch", self.options)).median


class EighErrors:
    """Relative errors of gradients: closed forms, finite differences, float32 against float64."""

    unit = "relative error"

    def track_projector_of_triple_eigenvalue(self) -> float:
        return float(np.max(accuracy.projector_errors("ddnref")))

    def track_projector_at_other_scales(self) -> float:
        return max(float(np.max(accuracy.projector_errors("ddnref", scale))) for scale in accuracy.SCALES)

    def track_finite_differences_at_gap_1e_4(self) -> float:
        return accuracy.finite_difference_error(1e-4)

    def track_finite_differences_at_gap_1e_2(self) -> float:
        return accuracy.finite_difference_error(1e-2)

    def track_float32(self) -> float:
        return accuracy.single_precision_error("eigh")

    track_float32.unit = "eps·‖A‖/gap"


class EighWrong:
    """Share of 200 gradients of a cluster-projector loss at a triple eigenvalue that are NaN or wrong."""

    params = ("ddnref", "torch", "jax")
    param_names = ("implementation",)
    unit = "share"

    def setup(self, implementation: str) -> None:
        load(implementation)

    def track_wrong_at_triple_eigenvalue(self, implementation: str) -> float:
        return accuracy.wrong_share(implementation)


class EighMasked:
    """Generic float32 matrices in which the VJP takes eigenvalues for equal: there should be none."""

    params = (256, 512, 1024)
    param_names = ("m",)
    unit = "matrices"

    def track_masked(self, m: int) -> int:
        return accuracy.masked_neighbours(m)


class EighHostReads:
    """Values that the VJP reads on the host: one flag with the default check, none without."""

    params = (False, True)
    param_names = ("throw",)
    unit = "reads"

    def setup(self, throw: bool) -> None:  # noqa: ARG002
        load("array_api_strict")

    def track_host_reads_of_vjp(self, throw: bool) -> int:
        return accuracy.host_reads(throw)
