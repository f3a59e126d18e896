"""Linear systems and their gradients: time, and ratios to SciPy's and JAX's own solvers."""

from __future__ import annotations

import ddnref

from . import _linear_cases as cases
from ._common import interleaved

SIZES = tuple((n, dtype) for n in (1000, 2000) for dtype in ("float64", "float32"))


class Dense:
    """Time of `ddnref.solve`, and of it with its gradient."""

    params = (SIZES,)
    param_names = ("n, dtype",)

    def setup(self, size: tuple[int, str]) -> None:
        self.forward, self.both = cases.dense_forward(*size), cases.dense_both(*size)

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_forward_and_vjp(self, *_: object) -> None:
        self.both()


class DenseRatio:
    """Forward over SciPy's LU of the same dtype; forward and backward over forward."""

    params = (SIZES,)
    param_names = ("n, dtype",)
    unit = "ratio"

    def setup(self, size: tuple[int, str]) -> None:
        self.forward, self.both, self.scipy = (
            build(*size) for build in (cases.dense_forward, cases.dense_both, cases.dense_scipy)
        )

    def track_forward_over_scipy(self, *_: object) -> float:
        return interleaved(self.forward, self.scipy).median

    def track_both_over_forward(self, *_: object) -> float:
        return interleaved(self.both, self.forward).median


class Blur:
    """Blur and ridge on a 256×256 grid, by conjugate gradients to a residual of 1e-6."""

    def setup(self) -> None:
        self.forward, self.backward = cases.blur_forward(), cases.blur_backward()

    def time_forward(self) -> None:
        self.forward()

    def time_vjp(self) -> None:
        self.backward()


class BlurRatio:
    """The same over SciPy's cg with a product written by hand; backward over forward."""

    unit = "ratio"

    def setup(self) -> None:
        self.forward, self.backward = cases.blur_forward(), cases.blur_backward()

    def track_over_scipy(self) -> float:
        return interleaved(self.forward, cases.blur_scipy()).median

    def track_backward_over_forward(self) -> float:
        return interleaved(self.backward, self.forward).median


class BlurJax:
    """The same beside jax.scipy's cg, ours in NumPy and ours compiled by JAX."""

    unit = "ratio"

    def setup(self) -> None:
        self.theirs = cases.blur_jax_scipy()

    def track_numpy_over_jax(self) -> float:
        return interleaved(cases.blur_forward(), self.theirs).median

    def track_jax_over_jax(self) -> float:
        return interleaved(cases.blur_jax_ours(), self.theirs).median


class WithoutSymmetry:
    """Products that the two solvers for square operators need."""

    params = (tuple(cases.without_symmetry()),)
    param_names = ("matrix",)
    unit = "products"

    def track_gmres(self, name: str) -> float:
        return cases.products(name, ddnref.krylov.gmres)

    track_gmres.version = "51152756c5eec59cf481095616a9bafcc1d6bd7c49508ceba768c49596e4d50b"  # type: ignore[attr-defined]

    def track_bicgstab(self, name: str) -> float:
        return cases.products(name, ddnref.krylov.bicgstab)

    track_bicgstab.version = "8ff83104cf22b9249a57090735b9582b602ec28de179721520d7da54f03a65b9"  # type: ignore[attr-defined]
