"""Deblurring a photograph: kernel and smoothness learned by gradient descent through a linear solver."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ddnref._core.arrays import Array
from ddnref.report import deblurring_model as model
from ddnref.report import pictures
from ddnref.report.content import Cell, Content, Context, Headline, Part, Picture, Section, Table, Text
from ddnref.report.deblurring_model import Learned, Pair, Parameters, Pass
from ddnref.report.page import brief
from ddnref.report.pictures import BLUE, GREY, ORANGE
from ddnref.testing import numerical_jvp

TIGHT, STEP = 1e-12, 2e-5  # where the gradient is checked: residual of the solves; a step that stays in the simplex


def gradient_error(pair: Pair, p: Parameters) -> float:
    """Relative error along the gradient itself, of kernel and weight together, against finite differences."""
    xp = array_api_compat.array_namespace(p.theta)
    bars = model.forward_and_backward(pair, p, TIGHT).bars
    g = xp.concat([bars.theta, xp.reshape(bars.log_rho, (1,))])

    def loss(q: Array) -> Array:
        moved = Parameters(q[:-1], xp.reshape(q[-1:], ()))
        return model.forward_and_backward(pair, moved, TIGHT).loss

    slope = numerical_jvp(loss, xp.concat([p.theta, xp.reshape(p.log_rho, (1,))]), g, step=STEP)
    exact = xp.sum(g * g)
    return abs(float(slope) - float(exact)) / float(exact)


def decibels(image: NDArray[Any], sharp: NDArray[Any]) -> float:
    """Peak signal to noise ratio; higher is better."""
    return -10 * math.log10(float(np.mean((image - sharp) ** 2)))


# --- pictures ---------------------------------------------------------------------------------------------------


def draw_photographs(rows: list[tuple[str, list[NDArray[Any]]]], titles: tuple[str, ...]) -> Figure:
    """One row for each photograph."""
    drawing = pictures.figure(1.75 * len(rows) + 0.3)
    grid = drawing.subplots(len(rows), len(titles))
    for line, (label, images) in zip(grid, rows, strict=True):
        for axes, image in zip(line, images, strict=True):
            pictures.image(axes, np.clip(image, 0, 1), (0, 1), "gray")
            axes.set_title(f"{decibels(image, images[-1]):.1f} dB" if image is not images[-1] else " ", fontsize=10)
        line[0].set_ylabel(label)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(f"{title}\n{axes.get_title()}", fontsize=10)
    return drawing


def draw_kernels(kernels: list[tuple[str, NDArray[Any]]]) -> Figure:
    """Kernels side by side on one scale."""
    drawing = pictures.figure(2.5)
    size = max(float(np.max(k)) for _, k in kernels)
    for axes, (title, k) in zip(drawing.subplots(1, len(kernels)), kernels, strict=True):
        pictures.image(axes, k, (0, size), "gray_r")
        axes.set_title(title)
    return drawing


def draw_course(losses: list[float], rhos: list[float]) -> Figure:
    """Loss and weight of smoothness over the steps."""
    drawing = pictures.figure(4.2)
    top, bottom = drawing.subplots(2, 1, sharex=True)
    top.plot(losses, color=BLUE)
    top.axhline(losses[0], color=GREY, linewidth=1, linestyle=":")
    top.set(ylabel="mean squared error", ylim=(0, None))
    bottom.plot(rhos, color=ORANGE)
    bottom.set(ylabel=r"smoothness $\rho$", xlabel="steps", ylim=(0, None))
    drawing.align_ylabels()
    return drawing


# --- the section ------------------------------------------------------------------------------------------------

_INTRODUCTION = Text(
    "A camera that shook during the exposure took a blurred and slightly noisy photograph y. To restore it one solves "
    "a linear system with one unknown for each pixel: <em>(KᴴK + ρ DᴴD) x = Kᴴ y</em>, K the blur, D the differences "
    "of neighbouring pixels. The matrix is never stored: <code>ddnref.linear_solve</code> needs its product with an "
    "image. But neither the blur nor the weight ρ is known. Both are learned here, from one photograph of which the "
    "sharp version is known, by following the gradient of the restoration's error <em>through the solver</em>: "
    "<code>ddnref.linear_solve_vjp</code> solves one more system of the same kind and stores none of the iterates."
)


def _photographs(context: Context, pairs: dict[str, Pair], course: list[Parameters]) -> Picture:
    host = context.backend.to_numpy
    titles = ("as taken", "restored, before", "restored, learned", "sharp")
    rows, table = [], []
    for name, label in ((model.LEARN, "learned from"), (model.HELD_OUT, "held out")):
        pair = pairs[name]
        before, after = (host(model.forward_and_backward(pair, p, model.RTOL).x) for p in (course[0], course[-1]))
        images = [host(pair.blurred), before, after, host(pair.sharp)]
        rows.append((label, images))
        table += [(label, title, decibels(image, images[-1])) for title, image in zip(titles[:3], images, strict=False)]
    caption = (
        "The photograph from which kernel and weight were learned, and another one, taken with the same shake, that "
        "the learning never saw. In decibels: peak signal to noise ratio, higher is better."
    )
    drawing = draw_photographs(rows, titles)
    return Picture("photographs", caption, "Two photographs, blurred and restored", drawing,
                   ("photograph", "image", "decibels"), table)  # fmt: skip


def _kernels(context: Context, course: list[Parameters]) -> tuple[Picture, float]:
    found = [context.backend.to_numpy(model.kernel_of(p)) for p in (course[0], course[-1])]
    true = model.camera_shake()
    kernels = [("at the start", found[0]), ("learned", found[1]), ("the camera's", true)]
    rows: list[tuple[Cell, ...]] = [(name, i, *map(float, row)) for name, k in kernels for i, row in enumerate(k)]
    columns = ("kernel", "row", *(f"column {j}" for j in range(model.KERNEL)))
    caption = (
        "The blur: where the light of one point went. The camera's kernel is shown for comparison; nothing was told "
        "about it."
    )
    alt = "Three kernels: at the start, learned, and the camera's"
    picture = Picture("kernels", caption, alt, draw_kernels(kernels), columns, rows)
    return picture, float(np.sum(np.abs(found[1] - true)))


def _course(learned: Learned) -> Picture:
    losses, rhos = [float(p.loss) for p in learned.passes], [math.exp(float(p.log_rho)) for p in learned.parameters]
    rows: list[tuple[Cell, ...]] = [
        (i, loss, rho, *map(int, p.n_iter))
        for i, (loss, rho, p) in enumerate(zip(losses, rhos, learned.passes, strict=False))
    ]
    return Picture("course", "The error of the restored photograph and the weight of smoothness while they are "
                   "learned.", "Loss and weight over the steps", draw_course(losses, rhos[:-1]),
                   ("step", "loss", "rho", "iterations forward", "iterations backward"), rows)  # fmt: skip


def _numbers(learned: Learned, error: float, distance: float) -> list[tuple[Cell, ...]]:
    def iterations(passes: list[Pass]) -> str:
        forward, backward = (round(float(np.mean([int(p.n_iter[i]) for p in passes]))) for i in (0, 1))
        return f"{forward} and {backward}"

    return [
        ("unknowns of each system", f"{model.SIDE**2}"),
        ("gradient of kernel and weight: error against finite differences", error),
        ("iterations forward and backward, first step", iterations(learned.passes[:1])),
        ("later steps, each starting from the one before", iterations(learned.passes[1:])),
        ("distance of the learned kernel from the camera's (0 to 2)", f"{distance:.2f}"),
    ]


def _run(context: Context) -> Content:
    pairs = {name: model.pair(context, name) for name in (model.LEARN, model.HELD_OUT)}
    error = gradient_error(pairs[model.LEARN], model.start(context))
    learned = model.learn(context, pairs[model.LEARN])
    photographs = _photographs(context, pairs, learned.parameters)
    kernels, distance = _kernels(context, learned.parameters)
    parts: list[Part] = [
        _INTRODUCTION, photographs, kernels, _course(learned),
        Table("numbers", "The solves and their gradient.", ("", "value"), _numbers(learned, error, distance)),
    ]  # fmt: skip
    taken, _, restored = (row[2] for row in photographs.rows if row[0] == "held out")
    return Content(parts, [
        Headline("Held-out photograph, as taken and restored", (f"{taken:.1f} dB", f"{restored:.1f} dB")),
        Headline("Gradient through the linear solver: error", (f"ddnref {brief(error)}",)),
    ])  # fmt: skip


SECTION = Section("deblurring", "Deblurring: learning through a linear solver", _run)
