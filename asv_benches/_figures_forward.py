"""The stated figures of forward mode: each JVP over its VJP, second derivatives, and two peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from _figures import MARGIN, Row, Size, Sizes, at_most, or_skipped, ratio_row, written
from benchmarks import _forward_cases as cases
from benchmarks._common import Ratio, interleaved

BAR = 1.2


def jvp_rows(sizes: Sizes) -> Iterator[Row]:
    for size in sizes:
        for name in cases.RULES:
            ratio = interleaved(*cases.pair(name, (size.batch, size.m), size.dtypes[0]))
            figure = f"{name}_jvp / {name}_vjp, ({size.batch}, {size.m}) {size.dtypes[0]}"
            yield at_most(figure, ratio.median, BAR, written(ratio), MARGIN)


def second_rows(sizes: Sizes) -> Iterator[Row]:
    """No bars: 7 to 13 products for 4, and differences of the derivative."""
    for size in sizes:
        for name in cases.FUNCTIONS:
            ratio = interleaved(*cases.second_pair(name, (size.batch, size.m), size.dtypes[0]))
            figure = f"{name}_second_derivative / {name}_vjp, ({size.batch}, {size.m}) {size.dtypes[0]}"
            yield Row(figure, written(ratio), timed=True)


def peer_rows(sizes: Sizes) -> Iterator[Row]:
    """No bars: the decomposition takes most of the time on both sides."""
    for size in sizes:
        for library in cases.PEERS:
            figure = f"eigh and eigh_jvp / forward mode of {library}'s eigh, ({size.batch}, {size.m}) {size.dtypes[0]}"
            yield or_skipped(figure, ratio_row, None, at_most, against_peer, library, size)


def against_peer(library: str, size: Size) -> Ratio:
    options = size.batch, size.m, size.dtypes[0]
    return interleaved(cases.ours(library, *options), cases.peer(library, *options))


_SIZES = tuple(Size(batch, m, ("float64",)) for batch, m in ((5, 64), (1, 256)))

FIGURES: dict[str, tuple[Callable[[Sizes], Iterator[Row]], Sizes]] = {
    "jvp": (jvp_rows, _SIZES),
    "second-derivatives": (second_rows, _SIZES),
    "jvp-peers": (peer_rows, _SIZES),
}
