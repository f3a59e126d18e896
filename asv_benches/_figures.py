"""Every stated figure: how it is measured, at which sizes, and the bar that it is held to. `figures.py` runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from benchmarks import _accuracy as accuracy
from benchmarks import _eigsh_cases as eigsh_cases
from benchmarks import _iteration as iteration
from benchmarks import _krylov_cases as krylov
from benchmarks import _linear_cases as linear
from benchmarks import networks, nodes, startup
from benchmarks._common import Call, Case, Ratio, alternating, backend, interleaved

MARGIN = 1.1  # for noise, on figures that a clock enters
SINGLE = ("float32",)
BOTH = ("float32", "float64")


class Row(NamedTuple):
    figure: str
    measured: str
    bar: str = "–"
    met: str = "–"
    timed: bool = False


class Size(NamedTuple):
    batch: int
    m: int
    dtypes: Sequence[str] = BOTH
    bar: float | None = None


Sizes = tuple[Size, ...]


def at_most(figure: str, value: float, bar: float, text: str = "", margin: float = 1.0) -> Row:
    met = "yes" if value <= bar else f"within {margin - 1:.0%}" if value <= bar * margin else "no"
    return Row(figure, text or f"{value:.3g}", f"≤ {bar:g}", met, margin > 1)


def at_least(figure: str, value: float, bar: float, text: str = "", margin: float = 1.0) -> Row:
    met = "yes" if value >= bar else f"within {margin - 1:.0%}" if value * margin >= bar else "no"
    return Row(figure, text or f"{value:.3g}", f"≥ {bar:g}", met, margin > 1)


def written(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def value_row(figure: str, bar: float, measure: Callable[..., float], *arguments: object) -> Row:
    """A number that may not exceed its bar."""
    return at_most(figure, measure(*arguments), bar)


def ratio_row(
    figure: str, bar: float | None, judge: Callable[..., Row], measure: Callable[..., Ratio], *arguments: object
) -> Row:
    """A ratio of times, held to its bar if it has one."""
    ratio = measure(*arguments)
    if bar is None:
        return Row(figure, written(ratio), timed=True)
    return judge(figure, ratio.median, bar, written(ratio), MARGIN)


def or_skipped(figure: str, row: Callable[..., Row], *arguments: object) -> Row:
    """``row(figure, *arguments)``, or a row that names the framework which is missing."""
    try:
        return row(figure, *arguments)
    except NotImplementedError as missing:
        return Row(figure, f"skipped: {missing}")


def in_one_process(a: Case, b: Case) -> Ratio:
    return interleaved(a.build(), b.build())


def against(peer: str, sizes: Sizes, judge: Callable[..., Row], inverse: bool = False, k: int = 0) -> Iterator[Row]:
    """Rows of peer / ours (how many times faster ours is), or of ours / peer if `inverse`."""
    for size in sizes:
        for dtype in size.dtypes:
            options = {"batch": size.batch, "m": size.m, "dtype": dtype, "k": k}
            cases = Case(peer, options), Case("ours", options)
            quotient = f"ddnref / {peer}" if inverse else f"{peer} / ddnref"
            for way, measure in (("one process", in_one_process), ("two processes", alternating)):
                figure = f"backward{f' of {k} eigenpairs' if k else ''}, {quotient}, "
                figure += f"({size.batch}, {size.m}) {dtype}, {way}"
                yield or_skipped(figure, ratio_row, size.bar, judge, measure, *(cases[::-1] if inverse else cases))


# --- the figures ------------------------------------------------------------------------------------------------


def products_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        for dtype in size.dtypes:
            options = {"batch": size.batch, "m": size.m, "dtype": dtype}
            ratio = interleaved(Case("ours", options).build(), Case("products", options).build())
            figure = f"backward / three NumPy products, ({size.batch}, {size.m}) {dtype}"
            yield at_most(figure, ratio.median, size.bar, written(ratio), MARGIN)


def torch_rows(sizes: Sizes) -> Iterator[Row]:
    return against("torch", sizes, at_least)


def torch_batch_rows(sizes: Sizes) -> Iterator[Row]:
    return against("torch", sizes, at_most, inverse=True)


def top4_rows(sizes: Sizes) -> Iterator[Row]:
    return against("torch", sizes, at_least, k=4)


def jax_rows(sizes: Sizes) -> Iterator[Row]:
    return against("jax", sizes, at_least)


def autograd_rows(sizes: Sizes) -> Iterator[Row]:
    return against("autograd", sizes, at_least)


def memory_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        for dtype in size.dtypes:
            value = accuracy.extra_arrays_of_vjp(size.m, dtype)
            figure = f"peak memory of the backward above its inputs, in m×m arrays, m = {size.m} {dtype}"
            yield at_most(figure, value, size.bar, f"{value:.2f}")


def projector_rows(_: Sizes) -> Iterator[Row]:
    what = "cluster projector at a triple eigenvalue, 200 matrices"
    yield at_most(f"{what}: worst error", float(np.max(accuracy.projector_errors("ddnref"))), 1e-12)
    for peer in ("torch", "jax"):
        yield or_skipped(f"{what}: NaN or off by more than {accuracy.WRONG:g} in {peer}", share_row, peer)


def share_row(figure: str, peer: str) -> Row:
    return Row(figure, f"{accuracy.wrong_share(peer):.1%}")


def scales_rows(_: Sizes) -> Iterator[Row]:
    for scale in accuracy.SCALES[1:]:
        worst = float(np.max(accuracy.projector_errors("ddnref", scale)))
        yield at_most(f"the same, spectra scaled by {scale:g}: worst error", worst, 1e-12)


def trace_rows(_: Sizes) -> Iterator[Row]:
    figure = "tr(C X²) through spectral_function, the same matrices and X = I: worst error"
    yield at_most(figure, accuracy.trace_of_square_error(), 1e-12)


def masked_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        figure = f"generic float32 matrices with anything masked, of five, m = {size.m}"
        yield at_most(figure, accuracy.masked_neighbours(size.m), 0)


def difference_rows(_: Sizes) -> Iterator[Row]:
    for gap, bar in ((1e-4, 1e-7), (1e-3, 1e-7), (1e-2, 1e-9), (1e-1, 1e-9)):
        worst = max(accuracy.finite_difference_error(gap, seed) for seed in range(5))
        yield at_most(f"finite differences, float64, smallest gap {gap:g}: worst error", worst, bar)


def float32_rows(_: Sizes) -> Iterator[Row]:
    for name in accuracy._rules.RULES:
        figure = f"{name}: float32 against float64, in eps·‖A‖/gap"
        yield at_most(figure, accuracy.single_precision_error(name), 20)


def host_read_rows(what: str, reads: Callable[[bool], int]) -> Iterator[Row]:
    for throw, bar in ((False, 0), (True, 1)):
        yield or_skipped(f"host reads of {what}, throw={throw}", value_row, bar, reads, throw)


def read_rows(_: Sizes) -> Iterator[Row]:
    yield from host_read_rows("eigh_vjp", accuracy.host_reads)


def sinkhorn_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        forward, vjp = nodes.calls(backend("numpy"), size.m)
        ratio = interleaved(vjp, forward)
        figure = f"sinkhorn_vjp / sinkhorn, n = {size.m}, eps 0.05, marginal error 1e-9"
        yield at_most(figure, ratio.median, size.bar, written(ratio), MARGIN)
        for eps, newton, bar in ((0.05, False, 1.5), (0.05, True, 3.0), (0.01, False, 1.0), (0.01, True, 1.3)):
            ratio = nodes.against_textbook("plain", newton, eps, size.m)
            how = "with" if newton else "without"
            figure = f"sinkhorn {how} Newton steps / the textbook's plain loop, n = {size.m}, eps {eps}"
            yield at_most(figure, ratio.median, bar, written(ratio), MARGIN)
        ratio = nodes.against_textbook("in_logarithms", True, 0.05, size.m)
        figure = f"sinkhorn with Newton steps / the textbook's loop in logarithms, n = {size.m}, eps 0.05"
        yield at_most(figure, ratio.median, 0.25, written(ratio), MARGIN)


def eigsh_rows(sizes: Sizes) -> Iterator[Row]:
    """The spectrum 1/i at m = 2048 and a Gaussian matrix at m = 1024; the bars belong to these sizes."""
    for size, spectrum in zip(sizes, ("1/i", "gaussian"), strict=False):
        problem = (spectrum, size.m)
        ratio = interleaved(eigsh_cases.ours(*problem), eigsh_cases.full(*problem))
        figure = f"eigsh and its VJP, k = 4 / full spectrum, {spectrum}, m = {size.m} float64"
        yield at_most(figure, ratio.median, size.bar, written(ratio), MARGIN)
        ratio = interleaved(eigsh_cases.forward(*problem), eigsh_cases.scipy_forward(*problem))
        yield Row(f"eigsh / scipy.sparse.linalg.eigsh, forward, {spectrum}, m = {size.m}", written(ratio), timed=True)
        yield at_most(f"gradient of eigsh, {spectrum}, m = {size.m}", eigsh_cases.gradient_error(*problem), 1e-8)


def grid_rows(sizes: Sizes) -> Iterator[Row]:
    shape = eigsh_cases.GRID if sizes[0].m == math.prod(eigsh_cases.GRID) else (10, 20)
    result = eigsh_cases.grid(shape)
    figure = f"eigsh of a matrix-free Laplacian, {shape[0]}×{shape[1]} grid, k = 6 smallest"
    yield at_most(f"{figure}: largest residual / ‖A‖", result.residual, 1e-8)
    yield at_most(f"{figure}: gradient of the edge weights against finite differences", result.error, 1e-6)
    yield at_most(f"{figure}: peak memory of the process in GiB", result.peak, 1.0)


def network_rows(_: Sizes) -> Iterator[Row]:
    """No bars: 3, 5 and 8 products with the weights for one of the loss, and the elementwise work on top."""
    for name in networks.NAMES:
        for product in networks.PRODUCTS[1:]:
            ours, loss = (networks.call(backend("numpy"), p, name, "float64") for p in (product, "loss"))
            yield Row(f"{product} / loss, {name}, float64", written(interleaved(ours, loss)), timed=True)
        for product in ("gradient", "hvp"):
            for library in ("numpy", "torch"):
                figure = f"{product} on {library} / PyTorch's autograd, {name}, float32"
                yield or_skipped(figure, ratio_row, None, at_most, against_autograd, library, product, name)


def against_autograd(library: str, product: str, name: str) -> Ratio:
    theirs = networks.autograd(product, name, "float32")
    return interleaved(networks.call(backend(library), product, name, "float32"), theirs)


def iteration_error_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        for (n, method), worst in iteration.errors(size.m).items():
            figure = f"iteration VJP, {method}: worst error in float32, five distributions, (5, {size.m}), n = {n}"
            yield at_most(figure, worst, 1e-6 if method == "bordered" else 1e-4)
        textbook = ", ".join(f"{iteration.textbook_error(size.m, n):.2g} (n = {n})" for n in (1, 4))
        yield Row(f"the textbook's structured form there, zero-mean matrices, m = {size.m}", textbook)
    for method in iteration.IMPLICIT:
        yield at_most(f"iteration VJP, {method}: the same at top gap 1e-2", iteration.error_at_gap(1e-2, method), 1e-5)


def iteration_time_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        for n in (1, 4):
            ratio = interleaved(iteration.ours(size.batch, size.m, n), iteration.textbook(size.batch, size.m, n))
            figure = f"iteration VJP / textbook's three solves per pair, ({size.batch}, {size.m}) float32, n = {n}"
            yield at_most(figure, ratio.median, size.bar, written(ratio), MARGIN)


def iteration_memory_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        for n in (1, 4):
            figure = f"peak memory, iteration VJP / textbook's, ({size.batch}, {size.m}) float32, n = {n}"
            yield at_most(figure, iteration.memory(size.m, n), size.bar)


def iteration_step_rows(_: Sizes) -> Iterator[Row]:
    figure = "100 eager torch steps / power iteration until its rule stops it, (5, 128) float32"
    yield or_skipped(figure, torch_power_row)
    ratio = interleaved(iteration.qr_of_all_columns(1, 512), iteration.our_steps(1, 512, 4))
    ratio = Ratio(*(iteration.STEPS * value for value in ratio))
    figure = "QR of all 512 columns / a step of simultaneous iteration with n = 4, float32"
    yield at_least(figure, ratio.median, 50.0, written(ratio), MARGIN)
    for steps in (100, 2000):
        figure = f"simultaneous iteration, (5, 512), n = 4, {steps} steps: items whose status is not true"
        yield at_most(figure, iteration.misreported(steps), 0)


def torch_power_row(figure: str) -> Row:
    ratio = interleaved(iteration.torch_power(5, 128), iteration.our_power(5, 128))
    ours, theirs = iteration.final_residuals(5, 128)
    figure += f", residuals {theirs:.1e} and {ours:.1e}"
    return at_least(figure, ratio.median, 15.0, written(ratio), MARGIN)


def iteration_read_rows(_: Sizes) -> Iterator[Row]:
    yield from host_read_rows("the iteration VJP", iteration.host_reads)


def krylov_rows(sizes: Sizes) -> Iterator[Row]:
    """A user's own product on a grid, rtol 1e-6, float64."""
    n = sizes[0].m
    for product in krylov.PRODUCTS:
        ratio = interleaved(krylov.ours(product, n), krylov.scipy_cg(product, n))
        yield at_most(f"cg / SciPy's cg, {product}, {n}×{n} float64", ratio.median, 1.05, written(ratio), MARGIN)
    for product in krylov.PRODUCTS:
        figure = f"cg / jax.scipy's cg, both compiled, {product}, {n}×{n} float64"
        yield or_skipped(figure, ratio_row, 1.0, at_most, against_jax_cg, product, n)


def against_jax_cg(product: str, n: int) -> Ratio:
    return interleaved(*krylov.jax_pair(product, n))


def krylov_many_rows(sizes: Sizes) -> Iterator[Row]:
    """Dense and a periodic convolution; the bars belong to these sizes."""
    for kind, size in zip(("dense", "convolution"), sizes, strict=False):
        at_once, one_by_one = krylov.many(kind, size.m, size.batch)
        ratio = interleaved(one_by_one, at_once)
        figure = f"{size.batch} right-hand sides one by one / at once, {kind}, n = {size.m} float64"
        yield at_least(figure, ratio.median, size.bar, written(ratio), MARGIN)


def krylov_memory_rows(_: Sizes) -> Iterator[Row]:
    growth = krylov.memory(200) - krylov.memory(20)
    yield at_most("memory of 200 steps of cg less that of 20, in vectors", growth, 0.1)
    growth = (krylov.unrolled_memory(200) - krylov.unrolled_memory(20)) / 180
    yield Row("the same, reversed through stored iterates, in vectors a step", f"{growth:.2f}")
    for steps in (20, 60, 180):
        errors = f"{krylov.implicit_error(steps):.1e} and {krylov.unrolled_error(steps):.1e}"
        yield Row(f"error of the gradient after {steps} steps, implicit and through the iterates", errors)


def linear_dense_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        for dtype in size.dtypes:
            where = f"n = {size.m}, {dtype}"
            forward = linear.dense_forward(size.m, dtype)
            ratio = interleaved(forward, linear.dense_scipy(size.m, dtype))
            yield at_most(f"solve / SciPy's LU, {where}", ratio.median, 1.1, written(ratio), MARGIN)
            ratio = interleaved(linear.dense_both(size.m, dtype), forward)
            yield at_most(f"solve and its VJP / solve, {where}", ratio.median, 1.2, written(ratio), MARGIN)


def linear_blur_rows(_: Sizes) -> Iterator[Row]:
    figure, forward = "linear_solve, blur and ridge, 256×256, float64, rtol 1e-6", linear.blur_forward()
    ratio = interleaved(forward, linear.blur_scipy())
    yield at_most(f"{figure} / SciPy's cg by hand", ratio.median, 0.9, written(ratio), MARGIN)
    ratio = interleaved(linear.blur_backward(), forward)
    yield at_most(f"{figure}: backward / forward", ratio.median, 1.1, written(ratio), MARGIN)
    for how, bar, ours in (("", 1.3, linear.blur_forward), (", under jax.jit", 1.0, linear.blur_jax_ours)):
        peer = f"{figure}{how} / jitted jax.scipy cg"
        yield or_skipped(peer, ratio_row, bar, at_most, against_jax_blur, ours)


def against_jax_blur(ours: Callable[[], Call]) -> Ratio:
    return interleaved(ours(), linear.blur_jax_scipy())


def import_rows(_: Sizes) -> Iterator[Row]:
    ours, first_call, theirs = startup.process_seconds(startup.OURS, startup.FIRST_CALL, startup.THEIRS)
    above = "seconds of a fresh interpreter above one that imports NumPy and SciPy"
    yield at_most(f"import ddnref: {above}", ours - theirs, 0.15, margin=MARGIN)
    yield Row(f"import ddnref and the first eigh: {above}", f"{first_call - theirs:.3g}", timed=True)


_PEER_SIZES = tuple(Size(batch, m, SINGLE) for batch, m in ((5, 32), (5, 64), (5, 128), (5, 256), (1000, 32)))

# The products come first, before any other library has started its threads.
FIGURES: dict[str, tuple[Callable[[Sizes], Iterator[Row]], Sizes]] = {
    "products": (
        products_rows,
        (Size(5, 256, bar=1.5), Size(5, 512, bar=1.5), Size(1, 1024, bar=1.15), Size(1, 2048, bar=1.15)),
    ),
    "memory": (memory_rows, (Size(1, 1024, bar=3),)),
    "torch": (
        torch_rows,
        (Size(5, 32, SINGLE, 1.5), *(Size(5, m, bar=1.0) for m in (64, 128, 256))),
    ),
    "torch-batch": (torch_batch_rows, (Size(1000, 32, SINGLE, 1.25),)),
    "top4": (top4_rows, (Size(1, 1024, bar=5.0),)),
    "jax": (jax_rows, _PEER_SIZES),
    "autograd": (autograd_rows, _PEER_SIZES),
    "eigsh": (eigsh_rows, (Size(1, 2048, bar=0.09), Size(1, 1024, bar=0.8))),
    "eigsh-grid": (grid_rows, (Size(1, 20_000),)),
    "projector": (projector_rows, ()),
    "scales": (scales_rows, ()),
    "trace": (trace_rows, ()),
    "masked": (masked_rows, tuple(Size(1, m) for m in (256, 512, 1024))),
    "finite-differences": (difference_rows, ()),
    "float32": (float32_rows, ()),
    "host-reads": (read_rows, ()),
    "sinkhorn": (sinkhorn_rows, (Size(1, 200, bar=1.5),)),
    "networks": (network_rows, ()),
    "iteration-errors": (iteration_error_rows, tuple(Size(5, m) for m in (32, 128, 512, 1024))),
    "iteration-time": (
        iteration_time_rows,
        (Size(5, 32, bar=1.0), *(Size(5, m, bar=0.4) for m in (128, 256, 512, 1024))),
    ),
    "iteration-memory": (iteration_memory_rows, tuple(Size(5, m, bar=0.75) for m in (128, 256, 512, 1024))),
    "iteration-steps": (iteration_step_rows, ()),
    "linear-dense": (linear_dense_rows, (Size(1, 1000), Size(1, 2000))),
    "linear-blur": (linear_blur_rows, ()),
    "iteration-host-reads": (iteration_read_rows, ()),
    "krylov": (krylov_rows, (Size(1, 256),)),
    "krylov-many": (krylov_many_rows, (Size(64, 2000, bar=4.0), Size(64, 128, bar=1.0))),
    "krylov-memory": (krylov_memory_rows, ()),
    "import": (import_rows, ()),
}
