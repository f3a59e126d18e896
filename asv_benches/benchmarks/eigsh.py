"""``ddnref.eigsh`` and its VJP: time, memory, ratios to the full spectrum and to SciPy, errors."""

from __future__ import annotations

import ddnref

from . import _eigsh_cases as cases
from ._common import interleaved, pin_threads

SIZES = (("gaussian", 300), ("gaussian", 1024), ("1/i", 1024), ("1/i", 2048))


class Eigsh:
    """Time of the k largest eigenpairs, and of these with their gradient."""

    params = (SIZES,)
    param_names = ("spectrum, m",)

    def setup(self, size: tuple[str, int]) -> None:
        pin_threads()
        self.forward, self.both = cases.forward(*size), cases.ours(*size)

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_forward_and_vjp(self, *_: object) -> None:
        self.both()


class EigshRatio:
    """Forward and backward over NumPy's eigh and the closed form for 4 columns; the forward over ARPACK's."""

    params = (SIZES,)
    param_names = ("spectrum, m",)
    unit = "ratio"

    def setup(self, size: tuple[str, int]) -> None:
        pin_threads()
        self.size = size

    def track_over_full_spectrum(self, *_: object) -> float:
        return interleaved(cases.ours(*self.size), cases.full(*self.size)).median

    def track_forward_over_scipy(self, *_: object) -> float:
        return interleaved(cases.forward(*self.size), cases.scipy_forward(*self.size)).median


class Svds:
    """Time of the 4 largest singular triples of a tall matrix, alone and with their gradient."""

    params = (("gaussian", "1/i"), ((1500, 800),))
    param_names = ("spectrum", "shape")

    def setup(self, spectrum: str, shape: tuple[int, int]) -> None:
        pin_threads()
        self.forward, self.both = cases.triples(spectrum, shape), cases.triples_and_gradient(spectrum, shape)

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_forward_and_vjp(self, *_: object) -> None:
        self.both()


class SvdsRatio:
    """Time of the 4 largest singular triples over that of SciPy's."""

    params = (("gaussian", "1/i"), ((1500, 800),))
    param_names = ("spectrum", "shape")
    unit = "ratio"

    def setup(self, spectrum: str, shape: tuple[int, int]) -> None:
        pin_threads()
        self.calls = cases.triples(spectrum, shape), cases.scipy_triples(spectrum, shape)

    def track_forward_over_scipy(self, *_: object) -> float:
        return interleaved(*self.calls).median


class EigshErrors:
    """Relative error of the gradient against the closed form."""

    params = (SIZES,)
    param_names = ("spectrum, m",)
    unit = "relative error"

    def track_gradient(self, size: tuple[str, int]) -> float:
        return cases.gradient_error(*size)


class EigshOperator:
    """The smoothest eigenvectors of a Laplacian that is never a matrix."""

    params = (((10, 20), (50, 100)),)
    param_names = ("grid",)
    unit = "products"

    def setup(self, shape: tuple[int, int]) -> None:
        self.operator = cases.laplacian(shape)

    def time_forward(self, *_: object) -> None:
        ddnref.eigsh(self.operator, 3, which="SA", method="iterative")

    def peakmem_setup(self, *_: object) -> None:
        """The baseline: nothing."""

    def peakmem_forward(self, *_: object) -> None:
        self.time_forward()

    def track_products(self, *_: object) -> int:
        return int(ddnref.eigsh(self.operator, 3, which="SA", method="iterative")[1].n_products)
