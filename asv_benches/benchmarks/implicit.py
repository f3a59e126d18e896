"""Functions of a user's: an equilibrium layer against its recorded steps, a pair against the barest Function."""

from __future__ import annotations

from . import _implicit_cases as cases
from ._common import interleaved


class Equilibrium:
    """Forward and backward in PyTorch through `custom_root` over differentiating 40 recorded steps."""

    params = ((1, 100), (24, 128))
    param_names = ("batch", "n")
    unit = "ratio"

    def setup(self, batch: int, n: int) -> None:
        self.calls = cases.equilibrium(True, batch, n), cases.equilibrium(False, batch, n)

    def track_implicit_over_recorded(self, *_: object) -> float:
        return interleaved(*self.calls).median


class OwnPair:
    """Forward and backward of softmax through ``differentiable(f, vjp=...)`` over a bare ``autograd.Function``."""

    params = (8, 10**5)
    param_names = ("n",)
    unit = "ratio"

    def setup(self, n: int) -> None:
        self.calls = cases.own_pair(True, n), cases.own_pair(False, n)

    def track_bridge_over_barest(self, *_: object) -> float:
        return interleaved(*self.calls).median
