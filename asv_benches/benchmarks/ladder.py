"""The tutorial's ladder of reverse passes: v1, v2, v3 and the final form, on NumPy arrays."""

from __future__ import annotations

from ._cases import rung
from ._common import interleaved, pin_threads

RUNGS = ("final", "v3", "v2", "v1")
SIZES = ((5, 32), (5, 64), (5, 128), (5, 256), (5, 512), (5, 1024), (1000, 32))
# One call would take longer than 20 s: m pseudo-inverses (v1) or m products (v2) of m×m matrices are O(m⁴).
# On two cores v1 takes 2.3 s at m = 128 and v2 takes 0.6 s at m = 256; each doubling of m costs 12 to 16 times that.
TOO_SLOW = {("v1", 256), ("v1", 512), ("v1", 1024), ("v2", 1024)}


def refuse_slow(name: str, size: tuple[int, int]) -> None:
    if (name, size[1]) in TOO_SLOW:
        raise NotImplementedError(f"{name} at {size} takes longer than 20 s")


class Ladder:
    """Time of each rung for the same cotangent of the eigenvectors, float32 as in the tutorial."""

    params = (RUNGS, SIZES)
    param_names = ("rung", "size")
    repeat = (1, 10, 5.0)
    timeout = 120

    def setup(self, name: str, size: tuple[int, int]) -> None:
        refuse_slow(name, size)
        pin_threads()
        self.call = rung(*size, "float32", name)

    def time_vjp(self, *_: object) -> None:
        self.call()


class LadderRatio:
    """Time of the final form over that of each rung, where that can be interleaved within seconds."""

    params = (RUNGS[1:], ((5, 32), (5, 64), (5, 256), (1000, 32)))
    param_names = ("rung", "size")
    unit = "ratio"

    def setup(self, name: str, size: tuple[int, int]) -> None:
        refuse_slow(name, size)
        pin_threads()
        if name == "v1" and size == (1000, 32):  # 4.5 s per call: six rounds and their warm-up would take a minute
            raise NotImplementedError(f"{name} at {size} is too slow to interleave")
        self.calls = rung(*size, "float32", "final"), rung(*size, "float32", name)

    def track_final_over_rung(self, *_: object) -> float:
        return interleaved(*self.calls).median

    track_final_over_rung.version = "b968b154199ea91d54f32b99c07325150a70beef3039f9c68bf9fd9f1a8d3306"  # type: ignore[attr-defined]
