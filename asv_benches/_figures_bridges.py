"""The stated figures of the bridges: what they cost above the pair called by hand; `figures.py` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from _figures import MARGIN, Row, Size, Sizes, at_most, or_skipped
from benchmarks import _bridges as bridges

BAR = 60.0  # µs


def bridge_rows(sizes: Sizes) -> Iterator[Row]:
    """Every framework and operation; a smoke test takes the first operation."""
    for framework in bridges.FRAMEWORKS:
        for name in bridges.OPERATIONS[: None if len(sizes) > 1 else 1]:
            figure = f"µs of the bridge over the pair by hand, {framework} eager, {name}, m = {bridges.M} float64"
            yield or_skipped(figure, bridge_row, framework, name)


def bridge_row(figure: str, framework: str, name: str) -> Row:
    calls = bridges.calls(framework, name)
    over, bare = (bridges.overhead(call, calls.by_hand) for call in (calls.bridge, calls.bare))
    nothing = bridges.overhead(lambda: (calls.by_hand(), calls.nothing()), calls.by_hand)  # as cold as the others
    text = (
        f"{over.median:.0f} ({over.low:.0f} to {over.high:.0f}); the barest wrapper: {bare.median:.0f}; "
        f"a function of the framework that computes nothing: {nothing.median:.0f}"
    )
    return at_most(figure, over.median, BAR, text, MARGIN)


FIGURES: dict[str, tuple[Callable[[Sizes], Iterator[Row]], Sizes]] = {
    "bridges": (bridge_rows, (Size(1, bridges.M, ("float64",)), Size(1, bridges.M, ("float64",)))),
}
