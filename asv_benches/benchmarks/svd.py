"""``ddnref.svd`` and its derivatives: time, ratios to the limit and to peers, errors."""

from __future__ import annotations

import numpy as np

import ddnref

from ._common import BACKENDS, backend, interleaved, load, pin_threads, prepared
from ._svd_cases import (
    PAIRS,
    SPECTRA,
    WRONG,
    bridge_pair,
    invariant_errors,
    our_backward,
    our_pair,
    problem,
    products,
    torch_backward,
    torch_pair,
)

DTYPES = ("float32", "float64")
SIZES = ((5, 32, 32), (1000, 16, 8), (5, 128, 128), (1, 512, 512))
K = 4


class Svd:
    """Time of the forward pass, the VJP and the JVP on every backend; of the default call, all checks included."""

    params = (BACKENDS, ((5, 32, 32), (1000, 16, 8), (1, 512, 512)), DTYPES)
    param_names = ("backend", "size", "dtype")

    def setup(self, name: str, size: tuple[int, int, int], dtype: str) -> None:
        on = backend(name)
        p = problem(*size, dtype)
        x, *bars = map(on.array, (p.x, *p.bars))
        u, s, vh = map(on.array, ddnref.svd(p.x))
        self.forward = prepared(on, ddnref.svd, x)
        self.vjp = prepared(on, ddnref.svd_vjp, *bars, u, s, vh, **on.options)
        self.jvp = prepared(on, ddnref.svd_jvp, x, u, s, vh, **on.options)
        for call in (self.forward, self.vjp, self.jvp):
            call()

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_vjp(self, *_: object) -> None:
        self.vjp()

    def time_jvp(self, *_: object) -> None:
        self.jvp()


class SvdLimit:
    """Time of the VJP over that of four NumPy products of the same size and dtype, interleaved in one process."""

    params = (((5, 32, 32), (5, 128, 128), (1, 512, 512)), DTYPES)
    param_names = ("size", "dtype")
    unit = "ratio"

    def setup(self, size: tuple[int, int, int], dtype: str) -> None:
        pin_threads()
        self.calls = our_backward(*size, dtype), products(*size, dtype)

    def track_vjp_over_four_products(self, *_: object) -> float:
        return interleaved(*self.calls).median


class SvdPeers:
    """Time of forward and VJP on NumPy arrays over that of a peer's forward and backward, in one process."""

    params = (tuple(PAIRS), SIZES, DTYPES)
    param_names = ("peer", "size", "dtype")
    unit = "ratio"

    def setup(self, peer: str, size: tuple[int, int, int], dtype: str) -> None:
        self.calls = our_pair(*size, dtype), PAIRS[peer](*size, dtype)

    def track_pair_over_peer(self, *_: object) -> float:
        return interleaved(*self.calls).median


class SvdBridge:
    """Time of forward and backward through the bridge to PyTorch over that of ``torch.linalg.svd``."""

    params = (SIZES, DTYPES)
    param_names = ("size", "dtype")
    unit = "ratio"

    def setup(self, size: tuple[int, int, int], dtype: str) -> None:
        self.calls = bridge_pair(*size, dtype), torch_pair(*size, dtype)

    def track_pair_over_torch(self, *_: object) -> float:
        return interleaved(*self.calls).median


class SvdTop4:
    """Time of the VJP of the 4 largest triples over that of PyTorch's backward through a slice."""

    params = ((64, 512), DTYPES)
    param_names = ("m", "dtype")
    unit = "ratio"

    def setup(self, m: int, dtype: str) -> None:
        size = (1, m, m)
        self.calls = our_backward(*size, dtype, K), torch_backward(*size, dtype, K)

    def track_vjp_over_torch(self, *_: object) -> float:
        return interleaved(*self.calls).median


class SvdErrors:
    """Largest relative error of 200 gradients of losses that are smooth at a triple value, and at a triple zero."""

    params = (tuple(SPECTRA), ((6, 6), (9, 6), (6, 9)))
    param_names = ("kind", "shape")
    unit = "relative error"

    def track_invariant_loss(self, kind: str, shape: tuple[int, int]) -> float:
        return float(np.max(invariant_errors("ddnref", kind, *shape)))


class SvdWrong:
    """Share of the gradients of `SvdErrors` at square matrices that are NaN or wrong."""

    params = (("ddnref", "torch", "jax"), tuple(SPECTRA))
    param_names = ("implementation", "kind")
    unit = "share"

    def setup(self, implementation: str, kind: str) -> None:  # noqa: ARG002
        load(implementation)

    def track_wrong(self, implementation: str, kind: str) -> float:
        return float(np.mean(~(invariant_errors(implementation, kind) <= WRONG)))
