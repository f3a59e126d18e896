"""Curvature of a network that learns: its Gauss–Newton spectrum, whose digits it is due to, and noise of the slopes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ddnref.report import curvature_model as model
from ddnref.report import digits, pictures
from ddnref.report.content import Cell, Content, Context, Headline, Part, Picture, Section, Table, Text
from ddnref.report.curvature_model import LEADING, Errors, Learned, Look, Slopes
from ddnref.report.page import brief
from ddnref.report.pictures import BLUE, GREY, ORANGE

DRAWN = 40  # eigenvalues over training

# --- pictures ---------------------------------------------------------------------------------------------------


def draw_spectrum(looks: list[Look]) -> Figure:
    """The largest eigenvalues over training; all of them at its start, on the way and at its end."""
    drawing = pictures.figure(6.4)
    top, bottom = drawing.subplots(2, 1)
    steps = [found.step for found in looks]
    values = np.stack([found.w[:DRAWN] for found in looks])
    for i in reversed(range(values.shape[1])):
        colour, width = (BLUE, 1.6) if i < LEADING else (GREY, 0.6)
        top.plot(steps, values[:, i], color=colour, linewidth=width)
    top.set_xscale("symlog", linthresh=10)
    top.set(yscale="log", xlabel="steps of training", ylabel=f"the {values.shape[1]} largest")
    top.set_xticks(steps, [str(step) for step in steps])
    top.minorticks_off()
    for found, colour in zip((looks[0], looks[len(looks) // 2], looks[-1]), (GREY, BLUE, ORANGE), strict=True):
        size = len(found.w)
        bottom.loglog(range(1, size + 1), np.maximum(found.w, 1e-20), color=colour, label=f"step {found.step}")
    bottom.axvline(LEADING + 0.5, color="black", linewidth=0.8, linestyle=":")
    bottom.set(xlabel="number, the largest first", ylabel="all eigenvalues", ylim=(1e-9, None))
    bottom.legend(loc="lower left")
    drawing.align_ylabels()
    return drawing


def draw_shares(before: NDArray[Any], after: NDArray[Any]) -> Figure:
    """Eigenvectors by digits, before and after learning, on one scale."""
    drawing = pictures.figure(3.6)
    axes = drawing.subplots(1, 2, sharey=True)
    high = float(max(np.max(before), np.max(after)))
    for ax, part, title in zip(axes, (before, after), ("before learning", "after learning"), strict=True):
        shown = ax.imshow(part, cmap="Blues", vmin=0.0, vmax=high, aspect="auto", interpolation="nearest")
        ax.set(title=title, xlabel="digit", xticks=range(digits.CLASSES), yticks=range(LEADING))
        ax.grid(visible=False)
    axes[0].set_yticklabels([f"$e_{{{k + 1}}}$" for k in range(LEADING)])
    drawing.colorbar(shown, ax=axes, shrink=0.9)
    return drawing


def draw_noise(before: NDArray[Any], after: NDArray[Any]) -> Figure:
    """Signal to noise along each direction."""
    drawing = pictures.figure(3.6)
    axes = drawing.subplots()
    for ratio, label, colour in ((before, "before learning", GREY), (after, "after learning", BLUE)):
        axes.loglog(range(1, len(ratio) + 1), ratio, "o", markersize=4, color=colour, label=label)
    axes.axhline(1 / model.TRAIN, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="direction, the most curved first", ylabel="mean² / variance")
    axes.set_ylim(top=30 * float(max(np.max(before), np.max(after))))
    axes.legend(loc="upper left", ncols=2)
    return drawing


# --- the section ------------------------------------------------------------------------------------------------

_INTRODUCTION = Text(
    f"A network of widths 64-{model.HIDDEN}-{model.HIDDEN}-10 learns to read digits. How much its loss bends as the "
    "weights move is told by the <em>generalised Gauss-Newton matrix</em> <em>G = mean<sub>n</sub> J<sub>n</sub>"
    "<sup>T</sup> ∇²ℓ<sub>n</sub> J<sub>n</sub></em>, which has a row for each weight; it keeps the curvature of the "
    f"loss and leaves out that of the network. It is looked at on {model.SAMPLES} images, and never formed: its "
    f"eigenvalues are those of a smaller matrix, of inner products between {LEADING} vectors for each image, which "
    "<code>ddnref.curvature.ggn_eigvalsh</code> puts together layer by layer. The same matrix gives the eigenvectors, "
    "and the slope and the curvature of every single image's loss along them: "
    "<code>ddnref.curvature.ggn_directional_derivatives</code>."
)


def _spectrum(looks: list[Look]) -> Picture:
    rows: list[tuple[Cell, ...]] = [(found.step, i + 1, float(w)) for found in looks for i, w in enumerate(found.w)]
    caption = (
        f"Eigenvalues while the network learns. Blue, and left of the dotted line: the first {LEADING}, one less than "
        "there are digits. Before learning a gap follows them; it closes while they grow."
    )
    return Picture("spectrum", caption, "Eigenvalues over the steps of training, and all of them at three steps",
                   draw_spectrum(looks), ("step", "number", "eigenvalue"), rows)  # fmt: skip


def _shares(before: NDArray[Any], after: NDArray[Any]) -> Picture:
    rows: list[tuple[Cell, ...]] = [
        (when, k + 1, *map(float, row))
        for when, part in (("before", before), ("after", after))
        for k, row in enumerate(part)
    ]
    caption = (
        f"Which digits bend the loss along each of the first {LEADING} eigenvectors: the part of the eigenvalue that "
        "is due to the images of each digit. A row adds up to one. Before learning every digit has about the part that "
        "it has among the images; afterwards some directions belong to one or two of them."
    )
    columns = ("when", "eigenvector", *(f"digit {digit}" for digit in range(digits.CLASSES)))
    return Picture("classes", caption, "Shares of the digits in nine eigenvalues, before and after learning",
                   draw_shares(before, after), columns, rows)  # fmt: skip


def _noise(before: NDArray[Any], after: NDArray[Any]) -> Picture:
    rows: list[tuple[Cell, ...]] = [
        (k + 1, float(a), float(b)) for k, (a, b) in enumerate(zip(before, after, strict=True))
    ]
    caption = (
        f"Do the images agree about the slope? For each eigenvector the squared mean of the {model.TRAIN} slopes over "
        "their variance. At the dotted line the mean is as large as its standard error; below it, it is lost in the "
        "noise."
    )
    return Picture("noise", caption, "Signal to noise ratio of the slopes along the eigenvectors",
                   draw_noise(before, after), ("direction", "before", "after"), rows)  # fmt: skip


def _numbers(learned: Learned, ratios: tuple[NDArray[Any], ...], errors: Errors) -> list[tuple[Cell, ...]]:
    first, last = learned.looks[0], learned.looks[-1]
    gaps = (found.w[LEADING - 1] / found.w[LEADING] for found in (first, last))
    clear = (f"{np.sum(ratio > 1 / model.TRAIN)} of {len(ratio)}" for ratio in ratios)
    weights = sum(math.prod(p.shape) for p in learned.end.params)
    return [
        ("weights, and rows of the smaller matrix", f"{weights}, {LEADING * model.SAMPLES}"),
        ("eigenvalues of a small network (7-5-5-3, 4 samples) against its dense matrix", errors.spectrum),
        (f"the first {LEADING} eigenpairs here: G e - λ e, over the largest eigenvalue", errors.pairs),
        ("slopes along these against finite differences, over the size of the gradient", errors.slopes),
        ("held-out digits recognised, before and after", f"{first.accuracy:.1%}, {last.accuracy:.1%}"),
        (f"eigenvalue {LEADING} over the next, before and after", ", ".join(f"{gap:.1f}" for gap in gaps)),
        ("directions in which the mean slope exceeds its standard error, before and after", ", ".join(clear)),
    ]


def _run(context: Context) -> Content:
    data = model.prepare(context)
    learned = model.learn(context, data)
    errors = model.check(context, data, learned.end)
    both: list[Slopes] = [model.slopes(context, data, chain) for chain in (learned.start, learned.end)]
    labels = context.backend.to_numpy(data.t)
    ratios = tuple(model.signal_to_noise(found) for found in both)
    parts: list[Part] = [
        _INTRODUCTION,
        _spectrum(learned.looks),
        _shares(*(model.shares(found, labels) for found in both)),
        _noise(*ratios),
        Table("numbers", "The curvature, checked and in numbers.", ("", "value"), _numbers(learned, ratios, errors)),
    ]
    worst = f"eigenvalues {brief(errors.spectrum)}", f"slopes {brief(errors.slopes)}"
    return Content(parts, [Headline("Curvature of a network: errors", worst)])


SECTION = Section("curvature", "Curvature: the Gauss-Newton spectrum of a network", _run)
