"""The stated figures of generalised pairs, singular values, polar factors and factorisations, beside their peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from _figures import BOTH, MARGIN, Row, Size, Sizes, at_most, or_skipped, ratio_row, written
from benchmarks import _bridges as bridges
from benchmarks import _eigsh_cases as sparse
from benchmarks import _factorisation_cases as factorisations
from benchmarks import _generalized_cases as generalized
from benchmarks import _polar_cases as polar
from benchmarks import _svd_cases as svd
from benchmarks._common import Call, Ratio, interleaved

COLUMNS = {16: 8}
"""Columns of matrices that are not square, by their rows."""
K = 4
GRID, TALL = (100, 200), (1500, 800)


def shapes(sizes: Sizes) -> Iterator[tuple[int, int, int, str]]:
    for size in sizes:
        for dtype in size.dtypes:
            yield size.batch, size.m, COLUMNS.get(size.m, size.m), dtype


def over(ours: Callable[..., Call], theirs: Callable[..., Call], *problem: object) -> Ratio:
    return interleaved(ours(*problem), theirs(*problem))


def svd_rows(sizes: Sizes) -> Iterator[Row]:
    """Forward and backward, for which a user waits."""
    for problem in shapes(sizes):
        named = f"({', '.join(map(str, problem[:-1]))}) {problem[-1]}"
        figure = f"svd and its gradient, bridge / torch.linalg.svd, {named}"
        yield or_skipped(figure, ratio_row, 1.2, at_most, over, svd.bridge_pair, svd.torch_pair, *problem)
        figure = f"svd and svd_vjp on NumPy / the faster of PyTorch and jitted JAX, {named}"
        yield or_skipped(figure, ratio_row, 1.2, at_most, over_the_faster, *problem)


def over_the_faster(*problem: object) -> Ratio:
    ratios = [over(svd.our_pair, theirs, *problem) for theirs in svd.PAIRS.values()]
    return max(ratios, key=lambda ratio: ratio.median)


def top_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        for dtype in size.dtypes:
            named = f"the {K} largest of {size.m}, {dtype}"
            square, one = (1, size.m, size.m, dtype, K), (1, size.m, dtype, K)
            figure = f"svd_topk_vjp / PyTorch's backward through a slice, {named}"
            yield or_skipped(figure, ratio_row, 0.3, at_most, over, svd.our_backward, svd.torch_backward, *square)
            figure = f"eigh_generalized_vjp / PyTorch's backward through Cholesky and a slice, {named}"
            yield or_skipped(figure, ratio_row, 0.3, at_most, over, generalized.ours, generalized.torch_backward, *one)


def factor_rows(sizes: Sizes) -> Iterator[Row]:
    """No bars."""
    for batch, m, n, dtype in shapes(sizes):
        named, problem = f"({batch}, {m}, {n}) {dtype}", (batch, m, n, dtype)
        figure = f"polar, W and its gradient, bridge / PyTorch's through svd, {named}"
        yield or_skipped(figure, ratio_row, None, at_most, over, polar.polar_bridge, polar.polar_torch, *problem)
        if m == n:
            figure = f"cholesky and its gradient on NumPy / PyTorch's, ({batch}, {m}) {dtype}"
            calls = factorisations.cholesky, factorisations.cholesky_in_torch
            yield or_skipped(figure, ratio_row, None, at_most, over, *calls, batch, m, dtype)


def sparse_rows(sizes: Sizes) -> Iterator[Row]:
    """Matrix-free and sparse problems, and bands."""
    shape = GRID if sizes[0].m == GRID[0] * GRID[1] else (10, 20)
    ratio = interleaved(generalized.grid_forward(*shape), generalized.grid_scipy(*shape))
    figure = f"eigsh_generalized, six pairs near 0 of a {shape[0]}×{shape[1]} grid / SciPy's eigsh(sigma=0)"
    yield at_most(figure, ratio.median, 1.2, written(ratio), MARGIN)
    for spectrum in ("1/i", "gaussian"):
        tall = spectrum, TALL if shape == GRID else (200, 60)
        ratio = interleaved(sparse.triples(*tall), sparse.scipy_triples(*tall))
        figure = f"svds, {K} triples of {tall[1][0]}×{tall[1][1]} / SciPy's svds of the Gram matrix, {spectrum}"
        yield Row(figure, written(ratio), timed=True)
    band = 100 * shape[0], "float64"
    ratio = interleaved(factorisations.tridiagonal(*band), factorisations.tridiagonal_in_scipy(*band))
    yield Row(f"solve_tridiagonal / LAPACK's gtsv, n = {band[0]} float64", written(ratio), timed=True)
    for gradient in (False, True):
        ours = factorisations.tridiagonal_both if gradient else factorisations.tridiagonal
        figure = f"solve_tridiagonal{' and its gradient' if gradient else ''} / compiled JAX, n = {band[0]} float64"
        yield or_skipped(figure, ratio_row, None, at_most, against_jax, ours, gradient, *band)


def against_jax(ours: Callable[..., Call], gradient: bool, n: int, dtype: str) -> Ratio:
    return interleaved(ours(n, dtype), factorisations.tridiagonal_in_jax(n, dtype, gradient))


def end_to_end_rows(sizes: Sizes) -> Iterator[Row]:
    """In PyTorch, forward and backward: through the bridge over PyTorch's own; a smoke test takes one size."""
    for name, bars in BARS.items():
        for size in sizes if len(sizes) == 1 else (Size(batch, m, BOTH, bar) for batch, m, bar in bars):
            for dtype in size.dtypes:
                figure = f"{name} and its gradient, bridge / PyTorch's own, ({size.batch}, {size.m}) {dtype}"
                problem = name, size.batch, size.m, dtype
                yield or_skipped(figure, ratio_row, size.bar, at_most, over_torch, *problem)


def over_torch(name: str, *problem: Any) -> Ratio:
    return interleaved(*(bridges.end_to_end(name, ours, *problem) for ours in (True, False)))


BARS = {
    "eigh": ((5, 8, 2.0), (5, 32, 1.4), (100, 16, 1.15), (1000, 32, 1.15), (5, 128, 1.15), (1, 512, 1.05)),
    "solve": ((1, 8, 2.5), (64, 8, 2.5), (1, 256, 1.2), (16, 128, 1.2)),
    "invsqrtm": ((8, 8, 1.5), (64, 16, 1.0), (1, 256, 1.0)),
}
"""Batch, order and bar of each operation."""

_SIZES = tuple(Size(batch, m, BOTH) for batch, m in ((5, 32), (1000, 16), (5, 128), (1, 512)))

FIGURES: dict[str, tuple[Callable[[Sizes], Iterator[Row]], Sizes]] = {
    "svd": (svd_rows, _SIZES),
    "top4-of-512": (top_rows, (Size(1, 512),)),
    "factors": (factor_rows, _SIZES),
    "sparse-decompositions": (sparse_rows, (Size(1, GRID[0] * GRID[1]),)),
    "end-to-end": (end_to_end_rows, tuple(Size(batch, m) for batch, m, _ in BARS["eigh"])),
}
