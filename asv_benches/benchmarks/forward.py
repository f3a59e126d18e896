"""Forward mode and second derivatives: time over that of the VJP, and over the forward mode of PyTorch and JAX."""

from __future__ import annotations

from . import _forward_cases as cases
from ._common import interleaved, pin_threads


class JvpRatio:
    """Time of each JVP over that of its VJP, interleaved in one process."""

    params = (cases.RULES, ((5, 64), (1, 256)))
    param_names = ("operation", "size")
    unit = "ratio"

    def setup(self, name: str, size: tuple[int, int]) -> None:
        pin_threads()
        self.calls = cases.pair(name, size, "float64")

    def track_jvp_over_vjp(self, *_: object) -> float:
        return interleaved(*self.calls).median


class SecondDerivativeRatio:
    """Time of the second derivative of a function of a matrix over that of its VJP."""

    params = (cases.FUNCTIONS, ((5, 64), (1, 256)))
    param_names = ("function", "size")
    unit = "ratio"

    def setup(self, name: str, size: tuple[int, int]) -> None:
        pin_threads()
        self.calls = cases.second_pair(name, size, "float64")

    def time_second_derivative(self, *_: object) -> None:
        self.calls[0]()

    def track_second_derivative_over_vjp(self, *_: object) -> float:
        return interleaved(*self.calls).median


class JvpPeers:
    """Decomposition and tangent, ours on the library's arrays over the library's own forward mode."""

    params = (cases.PEERS, ((5, 64), (1, 256)))
    param_names = ("peer", "size")
    unit = "ratio"

    def setup(self, library: str, size: tuple[int, int]) -> None:
        self.calls = cases.ours(library, *size, "float64"), cases.peer(library, *size, "float64")

    def track_ours_over_peer(self, *_: object) -> float:
        return interleaved(*self.calls).median
