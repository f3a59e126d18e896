"""The stated figures of the Gauss–Newton spectrum, beside vivit and curvlinops; `figures.py` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from _figures import MARGIN, Row, Size, Sizes, at_least, at_most, or_skipped, ratio_row, value_row, written
from benchmarks import _ggn_cases as ggn_cases
from benchmarks import _module_cases as module_cases
from benchmarks._common import Case, alternating, interleaved

GGN_BARS = {"eigvalsh": (1.1, 1.3), "eigh": (0.55, 0.55), "derivatives": (0.15, 0.15), "newton": (0.15, 0.15)}


def ggn_rows(sizes: Sizes) -> Iterator[Row]:
    """Both networks; a smoke test takes the first of them."""
    for i, net in list(enumerate(ggn_cases.NETS))[: len(sizes)]:
        for task, bars in GGN_BARS.items():
            cases = Case("ggn", {"task": task, "net": net}), Case("vivit", {"task": task, "net": net})
            figure = f"GGN {task}, ddnref / vivit, {net} float32, two processes"
            yield or_skipped(figure, ratio_row, bars[i], at_most, alternating, *cases)
            if task in ("derivatives", "newton"):
                figure = f"growth of memory, GGN {task}, ddnref / vivit, {net} float32"
                yield or_skipped(figure, growth_row, 0.15, *cases)
        peer = Case("curvlinops", {"net": net}), Case("ggn", {"task": "eigh", "net": net})
        figure = f"GGN eigh, curvlinops with eigsh / ddnref, {net} float32, two processes"
        yield or_skipped(figure, ratio_row, 5.0, at_least, alternating, *peer)
        ratio = interleaved(ggn_cases.assembly(net), ggn_cases.values(net))
        figure = f"GGN, Gram matrix / its eigenvalues, {net} float32"
        yield at_most(figure, ratio.median, 0.2, written(ratio), MARGIN)
        figure = f"GGN eigenvalues against vivit's, {net} float32: largest difference / largest eigenvalue"
        yield or_skipped(figure, value_row, 1e-5, ggn_cases.difference, net)

    for name in ("vit", "resnet"):
        peer = Case("module_curvlinops", {"name": name}), Case("module", {"name": name})
        figure = f"GGN eigh of a PyTorch module, curvlinops with eigsh / ddnref, {name} float32, two processes"
        yield or_skipped(figure, ratio_row, 5.0, at_least, alternating, *peer)
        figure = f"GGN eigenvalues of a PyTorch module against curvlinops', {name} float32: difference / the largest"
        yield or_skipped(figure, value_row, 1e-5, module_cases.difference, name)


def growth_row(figure: str, bar: float, *cases: Case) -> Row:
    a, b = map(ggn_cases.growth, cases)
    return at_most(figure, a / b, bar, f"{a / b:.2f} ({a:.1f} MiB, {b:.1f} MiB)")


FIGURES: dict[str, tuple[Callable[[Sizes], Iterator[Row]], Sizes]] = {
    "ggn": (ggn_rows, (Size(64, 784), Size(128, 64))),
}
