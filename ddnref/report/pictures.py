"""The look of all pictures, readable on a phone; drawn without pyplot, so nothing global changes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

BLUE, ORANGE, GREEN, GREY = "#0067a5", "#c4501b", "#2b8a57", "#6b6b6b"
WIDTH = 6.4  # inches; the page shows 6.4 inches as its full width, and text at 12 points stays legible
DPI = 160

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 12.0,
    "axes.titlesize": 12.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def style() -> AbstractContextManager[None]:
    """Draw and save inside this context."""
    return mpl.rc_context(STYLE)


def figure(height: float) -> Figure:
    """An empty drawing of the page's width."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def png(drawing: Figure) -> bytes:
    """The same bytes for the same drawing."""
    buffer = io.BytesIO()
    with style():
        drawing.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def image(
    axes: Axes,
    pixels: NDArray[Any],
    limits: tuple[float, float],
    colours: str = "gray_r",
    frame: str = "#bbbbbb",
) -> Any:
    """A matrix as an image with a thin frame and no ticks."""
    shown = axes.imshow(pixels, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame, linewidth=0.6)
    return shown


class Row(NamedTuple):
    """A line of small images."""

    label: str
    pixels: NDArray[Any]
    """``(n, h, w)``"""
    limits: tuple[float, float]
    colours: str


SCALE, FRAME, SPACE = 12, 2, 8  # in dots: one pixel of a small image, the frame around it, between two of them


def tiles(rows: Sequence[Row], titles: Sequence[str] = ()) -> Figure:
    """Rows of small images, as one image: many axes take a second to draw."""
    lines = [[_tile(one, row) for one in row.pixels] for row in rows]
    high, wide = lines[0][0].shape[:2]
    drawing = figure(0.62 * len(rows) + (0.3 if titles else 0.05))
    axes = drawing.subplots()
    axes.imshow(np.concatenate([np.concatenate(line, axis=1) for line in lines], axis=0), aspect="auto")
    axes.grid(visible=False)
    axes.set_frame_on(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_yticks([(i + 0.5) * high for i in range(len(rows))], [row.label for row in rows])
    axes.set_xticks([(i + 0.5) * wide for i in range(len(titles))], titles)
    return drawing


def place(row: int, column: int, pixel: tuple[int, int], shape: tuple[int, int]) -> tuple[float, float]:
    """Where the upper left corner of a pixel ``(y, x)`` of a small image lies in `tiles`, as x and y."""
    high, wide = (size * SCALE + 2 * FRAME + SPACE for size in shape)
    start = SPACE // 2 + FRAME - 0.5
    return column * wide + start + pixel[1] * SCALE, row * high + start + pixel[0] * SCALE


def _tile(pixels: NDArray[Any], row: Row) -> NDArray[Any]:
    low, high = row.limits
    colours = mpl.colormaps[row.colours](np.clip((pixels - low) / (high - low), 0, 1))[..., :3]
    colours = np.kron(colours, np.ones((SCALE, SCALE, 1)))
    for width, shade in ((FRAME, 0.73), (SPACE // 2, 1.0)):
        colours = np.pad(colours, ((width, width), (width, width), (0, 0)), constant_values=shade)
    return np.asarray(colours)
