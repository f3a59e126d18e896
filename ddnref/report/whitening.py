"""Whitening of the digits by the inverse square root of their covariance, and the gradient through it."""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import ddnref
from ddnref._core.arrays import Array
from ddnref.report import digits, peers, pictures
from ddnref.report.content import Cell, Content, Context, Headline, Part, Picture, Section, Table, Text
from ddnref.report.page import brief
from ddnref.report.pictures import Row

RIDGE = 1e-2  # added to every variance: some pixels never change, and a variance of zero has no inverse


class Whitening(NamedTuple):
    """On the host: the covariance, its inverse square root, and the digits before and after."""

    mean: NDArray[Any]
    covariance: NDArray[Any]
    matrix: NDArray[Any]
    before: NDArray[Any]
    after: NDArray[Any]


def linear_loss(w: Array, v: Array, y_bar: Array) -> Array:
    """``⟨Ȳ, X^(−1/2)⟩``, as one would write it for autograd."""
    xp = array_api_compat.array_namespace(v)
    return xp.sum(y_bar * ((v / xp.sqrt(w)[..., None, :]) @ xp.matrix_transpose(v)))


def whiten(context: Context) -> Whitening:
    """Covariance of the training images plus a ridge, its inverse square root, and one digit of each kind."""
    train, test = digits.split(context.seed)
    mean = np.mean(train.images, axis=0)
    centred = train.images - mean
    covariance = centred.T @ centred / len(centred) + RIDGE * np.eye(digits.PIXELS)
    matrix = context.backend.to_numpy(ddnref.invsqrtm(context.backend.convert(covariance)))
    before = test.images[digits.one_of_each(test)]
    return Whitening(mean, covariance, matrix, before, (before - mean) @ matrix)


def gradient_errors(context: Context, covariance: NDArray[Any]) -> tuple[float, dict[str, float | None]]:
    """Ours against finite differences; the peers against ours, ``None`` where one is not installed."""
    x = context.backend.convert(covariance)
    report = ddnref.testing.check_vjp(
        ddnref.invsqrtm_fwd, ddnref.invsqrtm_vjp, x, saves=True, tangent="symmetric", symmetrises=True,
        gap=RIDGE, seed=context.seed,
    )  # fmt: skip
    y_bar = np.random.default_rng(context.seed).standard_normal(covariance.shape)
    y_bar = (y_bar + y_bar.T) / 2
    y, saved = ddnref.invsqrtm_fwd(x)
    exact = context.backend.to_numpy(ddnref.invsqrtm_vjp(context.backend.convert(y_bar), y, *saved))
    found: dict[str, float | None] = {}
    for name, gradient in peers.gradients(linear_loss, covariance, y_bar).items():
        found[name] = None if gradient is None else _relative(gradient, exact)
    return report.error, found


def _relative(x: NDArray[Any], exact: NDArray[Any]) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


# --- pictures ---------------------------------------------------------------------------------------------------


def draw_covariances(before: NDArray[Any], after: NDArray[Any]) -> Figure:
    """Two covariance matrices side by side, each with its scale."""
    drawing = pictures.figure(3.3)
    for axes, matrix, title in zip(drawing.subplots(1, 2), (before, after), ("before", "after whitening"), strict=True):
        size = float(np.max(np.abs(matrix)))
        shown = pictures.image(axes, matrix, (-size, size), "RdBu_r")
        axes.set_title(title)
        drawing.colorbar(shown, ax=axes, orientation="horizontal", shrink=0.9, ticks=[-size, 0, size],
                         format="%.2g")  # fmt: skip
    return drawing


def draw_digits(found: Whitening) -> Figure:
    """One digit of each kind, before and after."""
    size = float(np.quantile(np.abs(found.after), 0.99))
    return pictures.tiles(
        [
            Row("before", digits.square(found.before), (0.0, 1.0), "gray_r"),
            Row("after", digits.square(found.after), (-size, size), "gray_r"),
        ]
    )


# --- the section ------------------------------------------------------------------------------------------------

_INTRODUCTION = Text(
    "Neighbouring pixels say nearly the same thing, and some vary much more than others. <em>Whitening</em> removes "
    "both: it multiplies every image by the inverse square root of the covariance matrix, "
    "<code>ddnref.invsqrtm(C)</code>, after which all directions have variance one and none is correlated with "
    "another. A network layer that whitens its input has to be differentiated through that inverse square root."
)
_GRADIENT = Text(
    "The gradient through <code>invsqrtm</code> is checked against finite differences: we nudge the matrix and "
    f"look how the result moves. The ridge of {RIDGE} gives all pixels that never change the same variance, so the "
    "matrix has repeated eigenvalues. The usual way, an autograd eigendecomposition, divides by their differences; "
    "<code>invsqrtm_vjp</code> has no such division."
)


def _rows(found: Whitening, error: float, others: dict[str, float | None]) -> list[tuple[Cell, ...]]:
    w = np.linalg.eigvalsh(found.covariance)
    left = found.matrix @ found.covariance @ found.matrix - np.eye(digits.PIXELS)
    rows: list[tuple[Cell, ...]] = [
        ("largest / smallest variance of a direction, before", f"{w[-1] / w[0]:.0f}"),
        ("after: largest distance of the covariance from the identity", float(np.max(np.abs(left)))),
        ("gradient, ddnref: error against finite differences", error),
    ]
    for name, other in others.items():
        text = f"gradient, {name} eigh: relative difference from ddnref"
        rows.append((text, "not installed" if other is None else other))
    return rows


def _run(context: Context) -> Content:
    found = whiten(context)
    error, others = gradient_errors(context, found.covariance)
    after = found.matrix @ found.covariance @ found.matrix
    pixels = digits.pixel_columns()
    covariance_rows: list[tuple[Cell, ...]] = [
        (when, i, *map(float, row))
        for when, matrix in (("before", found.covariance), ("after", after))
        for i, row in enumerate(matrix)
    ]
    digit_rows: list[tuple[Cell, ...]] = [
        (when, digit, *map(float, row))
        for when, images in (("before", found.before), ("after", found.after))
        for digit, row in enumerate(images)
    ]
    parts: list[Part] = [
        _INTRODUCTION,
        Picture("covariance", "Covariance of the 64 pixels. Red: they are dark together. Blue: one is dark where "
                "the other is light. After whitening only the diagonal is left: every pixel varies as much as any "
                "other, and on its own.", "Covariance matrix of the pixels before and after whitening",
                draw_covariances(found.covariance, after), ("when", "pixel", *pixels), covariance_rows),
        Picture("digits", "Held-out digits before and after. What could be guessed from the neighbours is gone; "
                "edges and unusual strokes remain.", "Ten digits before and after whitening", draw_digits(found),
                ("when", "digit", *pixels), digit_rows),
        _GRADIENT,
        Table("numbers", "Whitening in numbers.", ("", "value"), _rows(found, error, others)),
    ]  # fmt: skip
    return Content(parts, [Headline("Gradient through whitening: error", _summary({"ddnref": error, **others}))])


def _summary(errors: dict[str, float | None]) -> tuple[str, ...]:
    return tuple(
        f"{name} not installed" if error is None else f"{name} {brief(error)}" for name, error in errors.items()
    )


SECTION = Section("whitening", "Whitening: the inverse square root of a covariance", _run)
