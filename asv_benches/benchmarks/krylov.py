"""``ddnref.krylov.cg`` and its siblings: time, ratios to SciPy and JAX, many right-hand sides, memory against steps."""

from __future__ import annotations

import ddnref

from . import _krylov_cases as cases
from ._common import interleaved, pin_threads

SIZES = (("laplacian", 32), ("laplacian", 256), ("convolution", 256))


class Krylov:
    """Time of each solver on the same positive definite system."""

    params = (("cg", "minres", "bicgstab", "gmres", "lsmr"), (32, 128))
    param_names = ("solver", "n of an n×n grid")

    def setup(self, solver: str, n: int) -> None:
        pin_threads()
        self.solve = getattr(ddnref.krylov, solver)
        self.arguments = cases.operator("laplacian", n), cases.images(n)

    def time_solve(self, *_: object) -> None:
        self.solve(*self.arguments, rtol=1e-3)

    time_solve.version = "85844aec91dd2ef8f05758b4adea9eae87aa415e7f35fe182b9e9f37337d435e"  # type: ignore[attr-defined]

    def track_steps(self, *_: object) -> int:
        return int(self.solve(*self.arguments, rtol=1e-3)[1].n_iter)

    track_steps.version = "95b5f2fb3147138e5554ba482e51a001cc5b099cde4b8edd9ddef00ebb3c7113"  # type: ignore[attr-defined]

    track_steps.unit = "steps"  # type: ignore[attr-defined]


class CgRatio:
    """Time over that of SciPy's and JAX's conjugate gradients with the same product."""

    params = (SIZES,)
    param_names = ("product, n",)
    unit = "ratio"

    def setup(self, size: tuple[str, int]) -> None:
        pin_threads()
        self.size = size

    def track_over_scipy(self, *_: object) -> float:
        return interleaved(cases.ours(*self.size), cases.scipy_cg(*self.size)).median


class CgRatioJax:
    """Compiled, with JAX's own loop."""

    params = (SIZES,)
    param_names = ("product, n",)
    unit = "ratio"

    def setup(self, size: tuple[str, int]) -> None:
        self.pair = cases.jax_pair(*size)

    def track_over_jax_scipy(self, *_: object) -> float:
        return interleaved(*self.pair).median


class CgMany:
    """One after the other over all at once."""

    params = ((("dense", 200), ("dense", 2000), ("convolution", 128)),)
    param_names = ("product, n",)
    unit = "ratio"

    def track_one_by_one(self, size: tuple[str, int]) -> float:
        pin_threads()
        at_once, one_by_one = cases.many(*size)
        return interleaved(one_by_one, at_once).median


class CgMemory:
    """Peak memory in vectors, and the error of the gradient, beside the form that stores every iterate."""

    params = ((20, 60, 180),)
    param_names = ("steps",)
    unit = "vectors"

    def track_ours(self, steps: int) -> float:
        return cases.memory(steps)

    def track_unrolled(self, steps: int) -> float:
        return cases.unrolled_memory(steps)

    def track_unrolled_error(self, steps: int) -> float:
        return cases.unrolled_error(steps)

    track_unrolled_error.unit = "relative error"  # type: ignore[attr-defined]

    def track_implicit_error(self, steps: int) -> float:
        return cases.implicit_error(steps)

    track_implicit_error.unit = "relative error"  # type: ignore[attr-defined]
