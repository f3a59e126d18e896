"""Factorisations and structured systems: time, and ratios to the stated limits and to PyTorch and JAX."""

from __future__ import annotations

from . import _factorisation_cases as cases
from ._common import interleaved

SIZES = tuple((*size, dtype) for size in ((5, 32), (1000, 16), (5, 128), (1, 512)) for dtype in ("float64", "float32"))
LENGTHS = tuple((n, dtype) for n in (100, 1000, 100_000) for dtype in ("float64", "float32"))


class Cholesky:
    """Time of a factor with its gradient, and its ratios to two products and to PyTorch."""

    params = (SIZES,)
    param_names = ("batch, m, dtype",)

    def setup(self, size: tuple[int, int, str]) -> None:
        self.both = cases.cholesky(*size)
        self.both()

    def time_forward_and_vjp(self, *_: object) -> None:
        self.both()

    def track_over_two_products(self, size: tuple[int, int, str]) -> float:
        return interleaved(self.both, cases.products(*size)).median

    track_over_two_products.unit = "ratio"  # type: ignore[attr-defined]


class CholeskyTorch:
    """Forward and VJP over PyTorch's forward and backward."""

    params = (SIZES,)
    param_names = ("batch, m, dtype",)
    unit = "ratio"

    def setup(self, size: tuple[int, int, str]) -> None:
        self.ours, self.theirs = cases.cholesky(*size), cases.cholesky_in_torch(*size)

    def track_both_over_torch(self, *_: object) -> float:
        return interleaved(self.ours, self.theirs).median


class Tridiagonal:
    """Time of the solution, and of it with its gradient; the solution over LAPACK's elimination alone."""

    params = (LENGTHS,)
    param_names = ("n, dtype",)

    def setup(self, size: tuple[int, str]) -> None:
        self.forward, self.both = cases.tridiagonal(*size), cases.tridiagonal_both(*size)

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_forward_and_vjp(self, *_: object) -> None:
        self.both()

    def track_forward_over_lapack(self, size: tuple[int, str]) -> float:
        return interleaved(self.forward, cases.tridiagonal_in_scipy(*size)).median

    track_forward_over_lapack.unit = "ratio"  # type: ignore[attr-defined]


class TridiagonalJax:
    """Time of `solve_tridiagonal` on NumPy over that of ``jax.lax.linalg.tridiagonal_solve``, compiled."""

    params = (LENGTHS,)
    param_names = ("n, dtype",)
    unit = "ratio"

    def setup(self, size: tuple[int, str]) -> None:
        self.calls = [
            (cases.tridiagonal(*size), cases.tridiagonal_in_jax(*size, gradient=False)),
            (cases.tridiagonal_both(*size), cases.tridiagonal_in_jax(*size, gradient=True)),
        ]

    def track_forward_over_jax(self, *_: object) -> float:
        return interleaved(*self.calls[0]).median

    def track_both_over_jax(self, *_: object) -> float:
        return interleaved(*self.calls[1]).median


class BlockTridiagonal:
    """Time of a block tridiagonal system."""

    params = ((100, 1000), (2, 16))
    param_names = ("n", "k")

    def setup(self, n: int, k: int) -> None:
        self.solve = cases.block_tridiagonal(n, k)

    def time_forward(self, *_: object) -> None:
        self.solve()
