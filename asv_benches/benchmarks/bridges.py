"""Cost of a bridge above the pair that it calls, and that of the barest wrapper of its framework."""

from __future__ import annotations

from . import _bridges as bridges


class Bridges:
    """Forward and backward at m = 8, float64, eager: µs through the bridge less those of the pair by hand."""

    params = (bridges.FRAMEWORKS, bridges.OPERATIONS)
    param_names = ("framework", "operation")
    unit = "µs"

    def setup(self, framework: str, name: str) -> None:
        self.calls = bridges.calls(framework, name)

    def track_over_the_pair(self, *_: object) -> float:
        return bridges.overhead(self.calls.bridge, self.calls.by_hand).median

    def track_bare_wrapper_over_the_pair(self, *_: object) -> float:
        """The framework's own part."""
        return bridges.overhead(self.calls.bare, self.calls.by_hand).median
