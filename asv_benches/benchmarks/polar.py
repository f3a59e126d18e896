"""Polar factors and least squares with their gradients: time, ratio to the limit, and to PyTorch's own."""

from __future__ import annotations

from typing import Any

from . import _polar_cases as cases
from ._common import Case, alternating, interleaved

SQUARE = ((5, 32, 32), (1000, 3, 3), (1, 256, 256))
TALL = ((5, 100, 10), (1, 1000, 100), (1, 300, 300))
DTYPES = ("float64", "float32")


def options(size: tuple[int, int, int], dtype: str) -> dict[str, Any]:
    return dict(zip(("batch", "m", "n"), size, strict=True)) | {"dtype": dtype}


class Polar:
    """Time of the factors, and of their gradient."""

    params = (SQUARE, DTYPES)
    param_names = ("size", "dtype")

    def setup(self, size: tuple[int, int, int], dtype: str) -> None:
        self.forward, self.vjp = cases.polar_forward(*size, dtype), cases.polar_backward(*size, dtype)

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_vjp(self, *_: object) -> None:
        self.vjp()


class PolarLimit:
    """Time of the VJP over that of six products of the same matrices, interleaved in one process."""

    params = (((5, 64, 64), (1, 512, 512)),)
    param_names = ("size",)
    unit = "ratio"

    def setup(self, size: tuple[int, int, int]) -> None:
        self.calls = cases.polar_backward(*size, "float64"), cases.polar_products(*size, "float64")

    def track_vjp_over_its_products(self, *_: object) -> float:
        return interleaved(*self.calls).median


class PolarOverTorch:
    """Factors and gradient over W and its gradient through ``torch.linalg.svd``."""

    params = (SQUARE, DTYPES)
    param_names = ("size", "dtype")
    unit = "ratio"

    def track_bridge(self, size: tuple[int, int, int], dtype: str) -> float:
        return interleaved(cases.polar_bridge(*size, dtype), cases.polar_torch(*size, dtype)).median

    def track_numpy(self, size: tuple[int, int, int], dtype: str) -> float:
        given = options(size, dtype)
        return alternating(Case("polar_both", given), Case("polar_torch", given)).median


class Lstsq:
    """Time of the solution and its gradient."""

    params = (TALL, DTYPES)
    param_names = ("size", "dtype")

    def setup(self, size: tuple[int, int, int], dtype: str) -> None:
        self.both = cases.lstsq_both(*size, dtype)

    def time_both(self, *_: object) -> None:
        self.both()


class LstsqOverTorch:
    """Solution and gradient over those of ``torch.linalg.lstsq``, whose QR factorisation needs full rank."""

    params = (TALL, DTYPES)
    param_names = ("size", "dtype")
    unit = "ratio"

    def track_numpy(self, size: tuple[int, int, int], dtype: str) -> float:
        given = options(size, dtype)
        return alternating(Case("lstsq_both", given), Case("lstsq_torch", given)).median
