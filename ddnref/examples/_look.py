"""The look of figures, in the gallery and in the report: colours, Matplotlib's settings and images."""

from __future__ import annotations

from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, GREY = "#0067a5", "#c4501b", "#2b8a57", "#6b6b6b"
LOOK: Any = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', {[BLUE, ORANGE, GREEN, GREY]})",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "figure.dpi": 110,
    "figure.facecolor": "white",
}


def image(ax: Any, pixels: Any, title: str = "", *, signed: bool = False, **options: Any) -> Any:
    """Draw an array, or 64 numbers as a digit, as an image without axes, from black for 0 to white for 1.

    A signed one is blue, white for 0, and red, up to its largest magnitude unless `options` has ``vmax``. All `options`
    are passed to ``imshow``, whose image is returned.
    """
    look = {"cmap": "gray", "vmin": 0, "vmax": 1}
    if signed:
        limit = options.get("vmax", np.abs(pixels).max())
        look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    ax.set(title=title, xticks=[], yticks=[])
    ax.spines[:].set_visible(False)  # unlike set_axis_off, this keeps the labels of the axes
    return ax.imshow(np.reshape(pixels, (8, 8)) if np.size(pixels) == 64 else pixels, **{**look, **options})
