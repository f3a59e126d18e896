"""The spectrum of a deep network's Hessian by counting, the time of a solve against depth, backward errors."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from ddnref.report import hessian_model as model
from ddnref.report import pictures
from ddnref.report.content import Cell, Content, Context, Headline, Part, Picture, Section, Table, Text
from ddnref.report.hessian_model import Snapshot
from ddnref.report.page import brief
from ddnref.report.pictures import BLUE, GREEN, GREY, ORANGE

NEGATIVE = len(model.SIZES)  # the bins left of the one around zero
BINS = (
    f"below -{model.SIZES[-1]:g}",
    *(f"-{high:g} to -{low:g}" for low, high in zip(model.SIZES[-2::-1], model.SIZES[:0:-1], strict=True)),
    f"-{model.SIZES[0]:g} to {model.SIZES[0]:g}",
    *(f"{low:g} to {high:g}" for low, high in zip(model.SIZES[:-1], model.SIZES[1:], strict=True)),
    f"above {model.SIZES[-1]:g}",
)


# --- pictures ---------------------------------------------------------------------------------------------------


def draw_spectra(snapshots: list[Snapshot]) -> Figure:
    """One panel of bars for each snapshot, negative eigenvalues to the left."""
    drawing = pictures.figure(2.0 * len(snapshots) + 0.9)
    colours = [ORANGE] * NEGATIVE + [GREY] + [BLUE] * NEGATIVE
    panels = drawing.subplots(len(snapshots), 1, sharex=True, squeeze=False)[:, 0]
    top = 5 * sum(snapshots[0].counts)
    for axes, found in zip(panels, snapshots, strict=True):
        axes.bar(range(len(BINS)), found.counts, width=0.9, color=colours)
        axes.set(yscale="log", ylim=(0.5, top), title=f"after {found.steps} steps: loss {found.loss:.3f}")
        axes.grid(visible=False, axis="x")
        axes.set_axisbelow(True)
        for i, n in enumerate(found.counts):
            axes.annotate(str(n), (i, max(n, 0.5)), ha="center", va="bottom", fontsize=10)
    panels[-1].set_xticks(range(len(BINS)), BINS, rotation=30, ha="right", fontsize=10)
    panels[len(panels) // 2].set_ylabel("eigenvalues")
    return drawing


def draw_time(seconds: list[float]) -> Figure:
    """Seconds against layers, both logarithmic, with a line of slope one."""
    drawing = pictures.figure(3.2)
    axes = drawing.subplots()
    depths = np.asarray(model.DEPTHS)
    axes.loglog(depths, seconds, "o-", color=BLUE, label=f"measured: slope {model.slope(model.DEPTHS, seconds):.2f}")
    axes.loglog(depths, seconds[-1] * depths / depths[-1], ":", color=GREY, label="slope 1")
    axes.set_xticks(depths, [str(n) for n in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="layers", ylabel="seconds")
    axes.legend()
    return drawing


def draw_errors(found: dict[str, NDArray[Any]]) -> Figure:
    """Backward error against damping; dotted before refinement."""
    drawing = pictures.figure(3.4)
    axes = drawing.subplots()
    for (path, (plain, refined)), colour in zip(found.items(), (BLUE, ORANGE, GREEN), strict=True):
        axes.loglog(model.DAMPINGS, plain, ":", color=colour)
        axes.loglog(model.DAMPINGS, refined, "o-", color=colour, label=path)
    axes.set(xlabel="damping ε", ylabel="backward error")
    axes.legend(fontsize=10)
    return drawing


# --- the section ------------------------------------------------------------------------------------------------

_TIME = Text(
    "A solve with the Hessian, from the weights to the refined solution, with the gradient as right-hand side: width "
    f"{model.DEPTH_WIDTH}, one sample, ε = {model.DAMPING:g}. The best of three, one thread."
)
_NO_TIME = Text(
    "Time against depth is not drawn for this backend: outside of a compiled program it would be the time of starting "
    "operations."
)
_ERRORS = Text(
    "Every way to factor layer by layer, judged by what it leaves: ‖b − (H + εI)x‖ / (‖H‖‖x‖ + ‖b‖), which for a "
    f"perfect solver is about the rounding error of the arithmetic, 1e-16. {model.HARD_LAYERS} layers of width "
    f"{model.HARD_WIDTH}, {model.HARD_SAMPLES} samples, weights of gain {model.HARD_GAIN}, random right-hand side."
)


def _introduction(layers: int, width: int) -> Text:
    return Text(
        "A network with more layers than its layers are wide is easy to differentiate twice: layer by layer, its "
        "Hessian plus a multiple of the identity can be factored in time linear in the number of layers "
        "(<code>ddnref.curvature.hessian_factor</code>). The factors solve, and the signs of their pivots are the "
        "signs of the eigenvalues: <code>ddnref.curvature.hessian_eigval_count</code> counts the eigenvalues in any "
        f"interval, all of them, without computing or sampling one. Here a network of {layers} layers of width "
        f"{width} learns ten digits, one image of each."
    )


def _spectra(snapshots: list[Snapshot]) -> Picture:
    rows: list[tuple[Cell, ...]] = [(found.steps, found.loss, *found.counts) for found in snapshots]
    caption = (
        f"All {sum(snapshots[0].counts)} eigenvalues of the Hessian while the network learns, by counting. Left of the "
        "middle: directions in which the loss curves down. Numbers above bars are exact counts; the scale is "
        "logarithmic."
    )
    return Picture("spectrum", caption, "Counts of eigenvalues in bins, at three times of training",
                   draw_spectra(snapshots), ("steps", "loss", *BINS), rows)  # fmt: skip


def _depth(context: Context) -> tuple[list[Part], list[float]]:
    if not model.timed(context.backend):
        return [_NO_TIME], []
    seconds = [model.seconds(context.backend, layers, context.seed) for layers in model.DEPTHS]
    picture = Picture("time", "Seconds of one factorisation and one solve, against the number of layers.",
                      "Time against depth on logarithmic axes", draw_time(seconds), ("layers", "seconds"),
                      list(zip(model.DEPTHS, seconds, strict=True)))  # fmt: skip
    return [_TIME, picture], seconds


def _errors(found: dict[str, NDArray[Any]]) -> Picture:
    rows: list[tuple[Cell, ...]] = [
        (path, damping, float(plain), float(refined))
        for path, errors in found.items()
        for damping, plain, refined in zip(model.DAMPINGS, *errors, strict=True)
    ]
    return Picture("errors", "Backward error of each path. Dotted: as the factorisation solves. Solid: after "
                   "refinement with exact Hessian-vector products.",
                   "Backward error against damping for three factorisations",
                   draw_errors(found), ("path", "damping", "unrefined", "refined"), rows)  # fmt: skip


def _run(context: Context) -> Content:
    size = model.size(context.backend)
    learned = model.learn(context, model.one_of_each(context.seed, *size))
    snapshots = [model.count(context.backend, *each) for each in learned]
    wrong = int(np.sum(np.abs(np.subtract(snapshots[-1].counts, model.count_densely(snapshots[-1].problem))))) // 2
    errors = model.backward_errors(context.backend, context.seed)
    worst = max(float(np.max(refined)) for _, refined in errors.values())
    depth, seconds = _depth(context)
    rows: list[tuple[Cell, ...]] = [
        ("parameters", sum(snapshots[0].counts)),
        ("eigenvalues in another bin than the dense matrix puts them, after training", wrong),
        ("eigenvalues too close to an edge to tell their side, all counts", sum(s.uncertain for s in snapshots)),
        *(
            (f"eigenvalues below -{model.SIZES[0]:g} after {s.steps} steps", sum(s.counts[:NEGATIVE]))
            for s in snapshots
        ),
        ("largest backward error, refined", worst),
    ]
    if seconds:
        rows.append(("exponent of the time in the depth", f"{model.slope(model.DEPTHS, seconds):.2f}"))
    parts: list[Part] = [
        _introduction(*size), _spectra(snapshots), *depth, _ERRORS, _errors(errors),
        Table("numbers", "The Hessian in numbers.", ("", "value"), rows),
    ]  # fmt: skip
    counts = " to ".join(str(sum(found.counts[:NEGATIVE])) for found in (snapshots[0], snapshots[-1]))
    return Content(parts, [
        Headline(f"Eigenvalues of the Hessian below -{model.SIZES[0]:g}, while learning", (counts,)),
        Headline("Solve with the Hessian: largest backward error", (f"ddnref {brief(worst)}",)),
    ])  # fmt: skip


SECTION = Section("hessian", "The Hessian of a deep network: counted and solved with", _run)
