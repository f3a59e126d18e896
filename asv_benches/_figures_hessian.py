"""The stated figures of the Hessian, as `_figures.py` has those of the other capabilities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from _figures import MARGIN, Row, Size, Sizes, at_least, at_most, written
from benchmarks import _hessian_cases as cases
from benchmarks._common import interleaved

import ddnref


def depth_rows(sizes: Sizes) -> Iterator[Row]:
    """Exponents of time and memory in depth."""
    depths = [25, 50, 100, 200, 400, 800] if len(sizes) > 1 else [5, 10]
    problems = [cases.problem(depth, 32, 1) for depth in depths]
    slope = cases.exponent(depths, [cases.fastest(cases.ours(p)) for p in problems])
    figure = f"Hessian solve, width 32, N = 1, L = {depths[0]} to {depths[-1]}: exponent of "
    yield at_most(f"{figure}time", slope, 1.1, margin=MARGIN)
    memory = [cases.peak(cases.ours(p)) for p in problems]
    yield at_most(f"{figure}peak memory", cases.exponent(depths, memory), 1.1)


def width_rows(sizes: Sizes) -> Iterator[Row]:
    """Exponents of flops and time in width."""
    widths = [64, 128, 256, 512] if len(sizes) > 1 else [8, 16]
    problems = [cases.problem(20, a, 1) for a in widths]
    figure = f"Hessian solve, 20 layers, N = 1, a = {widths[0]} to {widths[-1]}: exponent of "
    flops = [ddnref.curvature.hessian_factor(p.chain, p.x, p.t, damping=1e-3).flops for p in problems]
    yield at_most(f"{figure}counted flops", round(cases.exponent(widths, flops), 2), 3.0)
    slope = cases.exponent(widths, [cases.fastest(cases.ours(p)) for p in problems])
    yield at_most(f"{figure}time", slope, 2.8, margin=MARGIN)


def headline_rows(sizes: Sizes) -> Iterator[Row]:
    """The deep narrow networks by which the method is judged."""
    for size, n, bar in zip(sizes, (1, 4), (0.35, 2.5), strict=False):
        p = cases.problem(size.batch, size.m, n)
        call = cases.ours(p)
        name = f"{size.batch} layers × width {size.m}, N = {n}, {sum(w.size for w in p.chain.params)} parameters"
        if n == 1:
            yield at_most(f"{name}: seconds of factor and solve", cases.fastest(call, 5), bar, margin=MARGIN)
        else:
            ratio = cases.quotient(call, cases.bare(size.batch, n * size.m))
            figure = f"{name}: factor and solve / its LU factorisations, solves and products"
            yield at_most(figure, ratio.median, bar, written(ratio), MARGIN)
        yield at_most(f"{name}: backward error", float(call()[1].backward_error), 1e-15)
        ratio = cases.quotient(cases.second(p), call)
        yield at_most(f"{name}: second right-hand side / first", ratio.median, 0.2, written(ratio), MARGIN)


def large_rows(sizes: Sizes) -> Iterator[Row]:
    """As many parameters as fit in memory comfortably."""
    size = sizes[0]
    p = cases.problem(size.batch, size.m, 1)
    call = cases.ours(p)
    name = f"{size.batch} layers × width {size.m}, N = 1, {sum(w.size for w in p.chain.params)} parameters"
    yield Row(f"{name}: seconds of factor and solve", f"{cases.fastest(call, 1):.2f}", timed=True)
    yield Row(f"{name}: peak memory in GiB above weights and right-hand side", f"{cases.peak(call) / 2**30:.2f}")
    yield at_most(f"{name}: backward error", float(call()[1].backward_error), 1e-15)


def textbook_rows(sizes: Sizes) -> Iterator[Row]:
    """Against the inventor's construction with explicit matrices."""
    for size, n, bar in zip(sizes, (1, 4, 8), (20.0, 20.0, 3.0), strict=False):
        p = cases.problem(size.batch, size.m, n)
        ratio = cases.quotient(cases.textbook(p), cases.ours(p))
        figure = f"textbook's construction / Hessian solve, {size.batch} layers × width {size.m}, N = {n}"
        yield at_least(figure, ratio.median, bar, written(ratio), MARGIN)


def dense_rows(sizes: Sizes) -> Iterator[Row]:
    """Method "auto" against the dense form on networks so small that either may win."""
    worst, at = 0.0, ""
    for n_layers, a, n in itertools.product((1, 2, 5, 20), (4, 8, 16), (1, 4, 16)) if len(sizes) > 1 else [(1, 4, 1)]:
        p = cases.problem(n_layers, a, n, classes=4)
        if sum(w.size for w in p.chain.params) > 2000:
            continue
        ratio = interleaved(cases.ours(p, 0.1), cases.ours(p, 0.1, "dense")).median
        worst, at = max((worst, at), (ratio, f"L = {n_layers}, a = {a}, N = {n}"))
    figure = 'method "auto" / "dense", worst of L 1 to 20, a 4 to 16, N 1 to 16 up to 2000 parameters'
    yield at_most(figure, worst, 1.1, f"{worst:.2f} ({at})", MARGIN)


FIGURES = {
    "hessian-depth": (depth_rows, (Size(1, 32), Size(1, 32))),
    "hessian-width": (width_rows, (Size(1, 64), Size(1, 512))),
    "hessian-headline": (headline_rows, (Size(400, 64), Size(200, 64))),
    "hessian-large": (large_rows, (Size(1000, 128),)),
    "hessian-textbook": (textbook_rows, (Size(10, 16), Size(10, 16), Size(20, 8))),
    "hessian-dense": (dense_rows, (Size(1, 4), Size(20, 16))),
}
