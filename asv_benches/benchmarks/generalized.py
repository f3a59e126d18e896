"""``ddnref.eigh_generalized`` and its VJP: time, ratios to the limit and to peers, errors."""

from __future__ import annotations

import numpy as np

from . import _generalized_cases as cases
from ._common import interleaved, load, pin_threads

SIZES = ((5, 32), (1000, 16), (1, 512))
K = 4


class Generalized:
    """Time of the forward pass and of the VJPs."""

    params = (SIZES, ("float32", "float64"))
    param_names = ("size", "dtype")

    def setup(self, size: tuple[int, int], dtype: str) -> None:
        pin_threads()
        self.forward, self.vjp = cases.forward(*size, dtype), cases.ours(*size, dtype)
        self.top_vjp = cases.ours(*size, dtype, k=K)

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_vjp(self, *_: object) -> None:
        self.vjp()

    def time_vjp_of_4_columns(self, *_: object) -> None:
        self.top_vjp()


class GeneralizedLimit:
    """Time of the VJP over that of five NumPy products, and over that of the textbook form."""

    params = (SIZES,)
    param_names = ("size",)
    unit = "ratio"

    def setup(self, size: tuple[int, int]) -> None:
        pin_threads()
        self.size = size

    def track_vjp_over_five_products(self, *_: object) -> float:
        return interleaved(cases.ours(*self.size, "float64"), cases.products(*self.size, "float64")).median

    def track_vjp_over_textbook(self, *_: object) -> float:
        return interleaved(cases.ours(*self.size, "float64"), cases.textbook(*self.size, "float64")).median


class GeneralizedPeers:
    """Time of the VJP over that of a peer's backward through a Cholesky factor; of 4 columns through a slice."""

    params = (tuple(cases.PEERS), ((*SIZES[0], 0), (*SIZES[1], 0), (*SIZES[2], 0), (1, 512, K)))
    param_names = ("peer", "batch, m, k")
    unit = "ratio"

    def setup(self, peer: str, size: tuple[int, int, int]) -> None:
        batch, m, k = size
        self.calls = cases.ours(batch, m, "float64", k), cases.PEERS[peer](batch, m, "float64", k)

    def track_vjp_over_peer(self, *_: object) -> float:
        return interleaved(*self.calls).median


class GeneralizedErrors:
    """Largest and median relative error of 200 gradients of a loss of the space of a triple eigenvalue."""

    params = ("ddnref", "textbook", "torch")
    param_names = ("implementation",)
    unit = "relative error"

    def setup(self, implementation: str) -> None:
        if implementation == "torch":
            load(implementation)

    def track_largest(self, implementation: str) -> float:
        return float(np.max(cases.errors(implementation)))

    def track_median(self, implementation: str) -> float:
        return float(np.median(cases.errors(implementation)))


class GeneralizedGrid:
    """Six pairs of finite elements on a grid by shift and invert: time, ratio to SciPy, residual."""

    params = (((20, 40), (100, 200)),)
    param_names = ("grid",)

    def setup(self, size: tuple[int, int]) -> None:
        pin_threads()
        self.forward, self.vjp = cases.grid_forward(*size), cases.grid_vjp(*size)
        self.scipy = cases.grid_scipy(*size)

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_vjp(self, *_: object) -> None:
        self.vjp()

    def track_forward_over_scipy(self, *_: object) -> float:
        return interleaved(self.forward, self.scipy).median

    track_forward_over_scipy.unit = "ratio"  # type: ignore[attr-defined]

    def track_residual(self, *_: object) -> float:
        return float(np.max(self.forward()[1].residual_norm))

    track_residual.unit = "relative residual"  # type: ignore[attr-defined]
