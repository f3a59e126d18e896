"""``ddnref.ggn_*``: time, ratios to vivit and curvlinops in separate processes, memory, agreement; PyTorch modules."""

from __future__ import annotations

from . import _ggn_cases as cases
from . import _module_cases as modules
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


class GgnModule:
    """The ten largest eigenpairs of PyTorch modules by hooks, float32."""

    params = (modules.MODULES,)
    param_names = ("module",)

    def setup(self, module: str) -> None:
        load("torch")
        self.call = modules.ours(module)

    def time_call(self, *_: object) -> None:
        self.call()


class GgnModuleOverChain:
    """Hooks over a `Chain` of the same convolutions."""

    unit = "ratio"

    def setup(self) -> None:
        load("torch")

    def track_time_over_chain(self) -> float:
        options = {"name": "cnn"}
        return alternating(Case("module", options), Case("module_chain", options)).median


class GgnModuleRatio:
    """Hooks over curvlinops with SciPy's eigsh."""

    params = (("vit", "resnet"),)
    param_names = ("module",)

    def setup(self, *_: object) -> None:
        load("curvlinops")

    def track_time_over_curvlinops(self, module: str) -> float:
        options = {"name": module}
        return alternating(Case("module", options), Case("module_curvlinops", options)).median

    track_time_over_curvlinops.unit = "ratio"  # type: ignore[attr-defined]

    def track_difference_to_curvlinops(self, module: str) -> float:
        return modules.difference(module)

    track_difference_to_curvlinops.unit = "relative error"  # type: ignore[attr-defined]
