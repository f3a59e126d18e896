"""The pictures of the declarative section: one line for every pass, ours in blue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ddnref.report.cost import Figures, Size
from ddnref.report.declarative_precision import DTYPES, FORWARD, Key, Precision, median
from ddnref.report.pictures import BLUE, GREEN, GREY, ORANGE, figure

FORWARD_LOOK = {"eigh": (GREY, "s"), "PI": (BLUE, "o"), "SI": (ORANGE, "^")}
LOOK: dict[str, tuple[str, str, str]] = {
    "AT forward": (GREY, "s", ":"),
    "PI forward": (BLUE, "o", ":"),
    "SI forward": (BLUE, "^", ":"),
    "AT": (GREY, "s", "-"),
    "PI-Unroll": (GREEN, "o", "-"),
    "SI-Unroll": (GREEN, "^", "-"),
    "PI-DDN-J": (ORANGE, "D", "--"),
    "PI-DDN-E": (ORANGE, "o", "-"),
    "PI-DDN-E, pinv": ("#e39a7d", "v", "-"),
    "PI-IFT-J": ("#8b5aa8", "D", "--"),
    "PI-IFT-E, B stored": ("#8b5aa8", "v", ":"),
    "PI-IFT-E": ("#8b5aa8", "o", "-"),
    "fixed_point": ("#569aca", "X", "-"),
    "bordered": (BLUE, "P", "-"),
}
COMPARED = ("PI-DDN-E", "PI-DDN-E, pinv", "PI-IFT-E", "PI-Unroll", "fixed_point", "bordered")


def draw_residuals(found: Precision, widths: Sequence[int]) -> Figure:
    """Eigen residual beside fixed-point residual; float32 solid, float64 dashed."""
    drawing = figure(4.2)
    panels = drawing.subplots(1, 2, sharey=True)
    for axes, quantity in zip(panels, ("eigen", "fixed point"), strict=True):
        for name in FORWARD:
            for dtype, line in zip(DTYPES, ("-", "--"), strict=True):
                colour, mark = FORWARD_LOOK[name]
                heights = [median(found, Key("gaussian", m, 1, dtype, name, quantity)) for m in widths]
                axes.plot(widths, heights, color=colour, marker=mark, linestyle=line, label=f"{name}, {dtype}")
        axes.set_title(f"{quantity} residual")
        _scales(axes, widths)
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawing


def draw_gradients(found: Precision, widths: Sequence[int]) -> Figure:
    """Error by size, a panel for each precision."""
    drawing = figure(4.6)
    panels = drawing.subplots(1, 2, sharey=True)
    for axes, dtype in zip(panels, DTYPES, strict=True):
        for name in COMPARED:
            heights = [median(found, Key("gaussian", m, 1, dtype, "PI", name, "random")) for m in widths]
            _line(axes, widths, heights, name)
        axes.set_title(dtype)
        _scales(axes, widths)
    panels[0].set_ylabel("relative error")
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawing


def draw_cost(figures: Figures, sizes: Sequence[Size], kind: str) -> Figure:
    """Time or memory by size, n = 1; a line ends where a pass was skipped."""
    drawing = figure(5.8)
    axes = drawing.subplots()
    ones = [size for size in sizes if size[-1] == 1]
    for name in LOOK:
        known = [size for size in ones if (name, size) in figures]
        label = name if known else f"{name}: not measured"
        factor = 1e3 if kind == "time" else 2.0**-20
        _line(axes, [size[1] for size in known], [factor * figures[name, size] for size in known], label)
    _scales(axes, [size[1] for size in ones])
    axes.set_ylabel("ms" if kind == "time" else "MiB")
    drawing.legend(loc="outside lower center", ncols=3, fontsize=10)
    return drawing


def _line(axes: Any, widths: Sequence[int], heights: Sequence[float], label: str) -> None:
    colour, mark, line = LOOK[label.partition(":")[0]]
    heights = [h if np.isfinite(h) else float("nan") for h in heights]
    axes.plot(widths, heights, color=colour, marker=mark, markersize=6, linestyle=line, linewidth=1.6, label=label)


def _scales(axes: Any, widths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(widths, [str(m) for m in widths])
    axes.set_xlabel("m")
