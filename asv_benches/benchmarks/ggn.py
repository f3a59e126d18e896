"""``ddnref.ggn_*``: time, ratios to vivit and curvlinops in separate processes, memory, agreement."""

from __future__ import annotations

from . import _ggn_cases as cases
from ._common import Case, alternating, interleaved, load, pin_threads


class Ggn:
    """Time of each function on two networks, float32."""

    params = (tuple(cases.NETS), cases.TASKS)
    param_names = ("net", "task")

    def setup(self, net: str, task: str) -> None:
        pin_threads()
        self.call = cases.ours(task, net)

    def time_call(self, *_: object) -> None:
        self.call()


class GgnRatio:
    """The same work by vivit: ours over theirs."""

    params = (tuple(cases.NETS), cases.TASKS)
    param_names = ("net", "task")
    unit = "ratio"

    def setup(self, *_: object) -> None:
        load("vivit")  # asv skips on what this raises here

    def track_time_over_vivit(self, net: str, task: str) -> float:
        options = {"task": task, "net": net}
        return alternating(Case("ggn", options), Case("vivit", options)).median

    def track_memory_over_vivit(self, net: str, task: str) -> float:
        options = {"task": task, "net": net}
        theirs = cases.growth(Case("vivit", options))
        return cases.growth(Case("ggn", options)) / theirs


class GgnAssembly:
    """The Gram matrix over its eigenvalues."""

    params = (tuple(cases.NETS),)
    param_names = ("net",)
    unit = "ratio"

    def setup(self, *_: object) -> None:
        pin_threads()

    def track_over_eigenvalues(self, net: str) -> float:
        return interleaved(cases.assembly(net), cases.values(net)).median


class GgnErrors:
    """Eigenvalues against vivit's, relative to the largest."""

    params = (tuple(cases.NETS),)
    param_names = ("net",)
    unit = "relative error"

    def setup(self, *_: object) -> None:
        load("vivit")

    def track_difference_to_vivit(self, net: str) -> float:
        return cases.difference(net)
