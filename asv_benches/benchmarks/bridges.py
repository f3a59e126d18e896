"""Cost of a bridge above the pair that it calls, and that of the barest wrapper of its framework."""

from __future__ import annotations

from . import _bridges as bridges
from ._common import interleaved


class Bridges:
    """Forward and backward at m = 8, float64, eager: µs through the bridge less those of the pair by hand."""

    params = (bridges.FRAMEWORKS, bridges.OPERATIONS)
    param_names = ("framework", "operation")
    unit = "µs"

    def setup(self, framework: str, name: str) -> None:
        self.calls = bridges.calls(framework, name)

    def track_over_the_pair(self, *_: object) -> float:
        return bridges.overhead(self.calls.bridge, self.calls.by_hand).median

    # In PyTorch the pair is that on NumPy arrays now, as in the bridge.
    track_over_the_pair.version = "2"  # type: ignore[attr-defined]

    def track_bare_wrapper_over_the_pair(self, *_: object) -> float:
        """The framework's own part."""
        return bridges.overhead(self.calls.bare, self.calls.by_hand).median

    track_bare_wrapper_over_the_pair.version = "2"  # type: ignore[attr-defined]


class EndToEnd:
    """Time of an operation, forward and backward, through the bridge to PyTorch over that of PyTorch's own."""

    params = (("eigh", "solve", "invsqrtm"), ((5, 8), (5, 32), (64, 16), (1, 256)), ("float32", "float64"))
    param_names = ("operation", "size", "dtype")
    unit = "ratio"

    def setup(self, name: str, size: tuple[int, int], dtype: str) -> None:
        self.calls = bridges.end_to_end(name, True, *size, dtype), bridges.end_to_end(name, False, *size, dtype)

    def track_pair_over_torch(self, *_: object) -> float:
        return interleaved(*self.calls).median
