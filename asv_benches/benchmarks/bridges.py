"""What a bridge costs above the pair that it calls, and what of that is the framework's own."""

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

    def track_floor(self, *_: object) -> float:
        """A bridge of as many arrays that does nothing."""
        return bridges.overhead(self.calls.floor, bridges.nothing).median
