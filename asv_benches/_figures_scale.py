"""Stated figures of several processes. `figures.py` runs them with the others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from _figures import Row, Size, Sizes, at_most, written
from benchmarks import _scale_cases as cases
from benchmarks._common import Ratio, interleaved


def scale_rows(sizes: Sizes) -> Iterator[Row]:
    """Two workers against one process; rows come when the workers have ended, or their CPU time counted as others'."""
    size = cases.Size(40, sizes[0].batch // 40, sizes[0].m) if len(sizes) > 1 else cases.Size(8, 25, sizes[0].m)
    name = f"eigh and its VJP, {size.blocks * size.items} matrices {size.m}×{size.m} float64, {size.blocks} blocks"
    try:
        import distributed  # noqa: F401
    except ModuleNotFoundError:
        yield Row(f"two worker processes: {name}", "skipped: distributed is not installed")
        return
    data = cases.every_block(size)
    expected = cases.expected(data)
    ratios, found, killed = _measured(size, data)
    differences = cases.differences(found, expected)
    yield at_most(f"two worker processes, {name}: numbers that differ from those of one process", differences, 0)
    what = f"a worker killed with {killed[1]} blocks done, {killed[2]} of them lost: numbers that differ"
    yield at_most(f"two worker processes, {name}: {what}", int(np.sum(killed[0] != expected[1])), 0)
    for (count, how), ratio in ratios.items():
        threads = f"one process with {count} BLAS thread{'s' * (count > 1)}"
        yield Row(f"{threads} / two worker processes{how}, {name}: time", written(ratio), timed=True)
    with cases.cluster(1) as client:
        large = cases.Size(6, sizes[1].batch if len(sizes) > 1 else 500, size.m)
        peak = cases.peak_in_blocks(client, large)
    what = f"blocks of {large.items} matrices {large.m}×{large.m}"
    yield at_most(f"peak memory of a worker above idle, {what}, in blocks", peak, 6, f"{peak:.1f}")


def _measured(
    size: cases.Size, data: list[np.ndarray]
) -> tuple[dict[tuple[int, str], Ratio], tuple[np.ndarray, np.ndarray], tuple[np.ndarray, int, int]]:
    ratios = {}
    with cases.cluster() as client:
        x = client.persist(cases.matrices(size))
        found = cases.fetched(x)
        for count in (1, 2):
            one = partial(cases.alone, data, count)
            ratios[count, ""] = interleaved(one, lambda: cases.left_there(client, x))
            ratios[count, ", results fetched"] = interleaved(one, lambda: cases.fetched(x))
        return ratios, found, cases.with_one_killed(client, size)


FIGURES = {"scale-out": (scale_rows, (Size(20_000, 32), Size(8_000, 32)))}
