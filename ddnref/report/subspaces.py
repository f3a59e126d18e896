"""The first section: damaged digits, recognised again after gradient descent through eigenvectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ddnref.report import digits, pictures
from ddnref.report import subspace_model as model
from ddnref.report.content import Cell, Content, Context, Headline, Part, Picture, Section, Table, Text
from ddnref.report.digits import CLASSES, Digits
from ddnref.report.page import brief
from ddnref.report.pictures import BLUE, ORANGE, Row
from ddnref.report.subspace_model import BLOCK, COMPONENTS, ITERATIONS, NOISE, Checked, Compared, Learned
from ddnref.verify._backends import Backend

SHOWN = 3  # eigen-digits per class


class Found(NamedTuple):
    """Everything that the section shows, on the host."""

    clean: Digits
    damaged: Digits
    learned: Learned
    checked: Checked
    compared: dict[str, Compared | None]
    clean_accuracy: float
    repaired_accuracy: float
    weights: NDArray[Any]
    spectra: NDArray[Any]
    before: NDArray[Any]
    after: NDArray[Any]


def find(context: Context) -> Found:
    """Damage the digits, check the gradients, learn the pixel weights."""
    backend = context.backend
    train, test = digits.split(context.seed)
    rng = np.random.default_rng([context.seed, 1])
    bad_train, bad_test = model.damage(train, rng), model.damage(test, rng)
    data, held_out = model.prepare(backend, bad_train), model.prepare(backend, bad_test)
    learned = model.learn(data, held_out, context.track(range(ITERATIONS), "Learning pixel weights"))
    return Found(
        clean=test,
        damaged=bad_test,
        learned=learned,
        checked=model.check(backend, data, learned.first, context.seed),
        compared=model.compare(backend, data, learned.first),
        clean_accuracy=model.plain(train, test, backend),
        repaired_accuracy=model.repaired(bad_train, bad_test, backend),
        weights=backend.to_numpy(learned.last.s),
        spectra=backend.to_numpy(learned.first.saved[0]),
        before=eigen_digits(backend, learned.first.v),
        after=eigen_digits(backend, learned.last.v),
    )


def eigen_digits(backend: Backend, v: Any) -> NDArray[Any]:
    """The first eigenvectors of every class, ``(SHOWN, 10, 64)``; signs such that the strongest entry is positive."""
    shown = np.moveaxis(backend.to_numpy(v)[..., :SHOWN], -1, 0)
    strongest = np.take_along_axis(shown, np.abs(shown).argmax(axis=-1)[..., None], axis=-1)
    return np.asarray(shown * np.sign(strongest))


# --- pictures ---------------------------------------------------------------------------------------------------


def draw_digits(found: Found) -> Figure:
    """One digit of each kind, clean and damaged."""
    chosen = digits.one_of_each(found.clean)
    clean, bad = (digits.square(d.images[chosen]) for d in (found.clean, found.damaged))
    drawing = pictures.tiles([Row("clean", clean, (0, 1), "gray_r"), Row("damaged", bad, (0, 1), "gray_r")])
    top, left, high, wide = _block()
    for digit in range(CLASSES):
        corner = pictures.place(1, digit, (top, left), BLOCK.shape)
        drawing.axes[0].add_patch(_outline(corner, wide * pictures.SCALE, high * pictures.SCALE, ORANGE, 1.6))
    return drawing


def _block() -> tuple[int, int, int, int]:
    """First row and column of the damaged pixels, and how many of each."""
    rows, columns = np.nonzero(BLOCK)
    return int(rows.min()), int(columns.min()), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def _outline(corner: tuple[float, float], wide: float, high: float, colour: str, line: float) -> Rectangle:
    return Rectangle(corner, wide, high, fill=False, edgecolor=colour, linewidth=line)


def draw_spectra(spectra: NDArray[Any]) -> Figure:
    """All eigenvalues of all classes, largest first, on a logarithmic scale."""
    drawing = pictures.figure(3.4)
    axes = drawing.subplots()
    for digit, w in enumerate(spectra[:, ::-1]):
        shown = np.maximum(np.abs(w), 1e-19)  # rounding makes some of the zeros negative
        axes.plot(np.arange(1, len(w) + 1), shown, ".", color=BLUE, alpha=0.45, markersize=5,
                  markeredgewidth=0, label="one digit class" if digit == 0 else None)  # fmt: skip
    size = float(np.max(spectra))
    axes.axhline(16 * np.finfo(float).eps * size, color=ORANGE, linestyle="--", linewidth=1.2,
                 label="equal to rounding below this line")  # fmt: skip
    axes.set_yscale("log")
    axes.set_yticks([1e-19, 1e-15, 1e-11, 1e-7, 1e-3, 10])
    axes.set_yticklabels([r"$\leq 10^{-19}$", *(rf"$10^{{{e}}}$" for e in (-15, -11, -7, -3, 1))])
    axes.minorticks_off()
    axes.set(
        xlabel="number of the eigenvalue, largest first", ylabel="eigenvalue", xlim=(0, 65), xticks=(1, 16, 32, 48, 64)
    )
    axes.legend(loc="lower left")
    return drawing


def draw_course(learned: Learned) -> Figure:
    """Loss and held-out accuracy over the steps."""
    drawing = pictures.figure(4.6)
    top, bottom = drawing.subplots(2, 1, sharex=True)
    top.plot(learned.losses, color=BLUE)
    top.set(ylabel="training loss", ylim=(0, None))
    bottom.plot(100 * np.asarray(learned.accuracies), color=ORANGE)
    bottom.set(ylabel="recognised, %", xlabel="steps of gradient descent", ylim=(0, 100))
    drawing.align_ylabels()
    return drawing


def draw_weights(weights: NDArray[Any]) -> Figure:
    """The learned weight of every pixel, with the damaged block outlined."""
    drawing = pictures.figure(3.4)
    axes = drawing.subplots()
    size = float(np.max(np.abs(np.log2(weights))))
    shown = pictures.image(axes, np.log2(digits.square(weights)), (-size, size), "RdBu")
    top, left, high, wide = _block()
    axes.add_patch(_outline((left - 0.5, top - 0.5), wide, high, "black", 2.2))
    bar = drawing.colorbar(shown, ax=axes)
    ticks = [t for t in range(-6, 7) if abs(t) <= size]
    bar.set_ticks(ticks, labels=[f"1/{2**-t}" if t < 0 else f"{2**t}" for t in ticks])
    bar.set_label("weight of the pixel")
    return drawing


def draw_eigen_digits(before: NDArray[Any], after: NDArray[Any]) -> Figure:
    """Rows: first, second, third eigenvector, before and after. Columns: the digits."""
    rows = [
        Row(f"{when} {i + 1}", digits.square(row), (-0.5, 0.5), "RdBu_r")
        for when, vectors in (("before", before), ("after", after))
        for i, row in enumerate(vectors)
    ]
    return pictures.tiles(rows, [str(digit) for digit in range(CLASSES)])


# --- the section ------------------------------------------------------------------------------------------------

_TASK = Text(
    "A camera has a bad spot: nine of its 64 pixels are noise. Every handwritten digit is described by a "
    "<em>subspace</em>, spanned by the top eigenvectors of the covariance of its pixels, and an image is taken for "
    "the digit whose subspace holds most of it. Strong noise ends up in the top eigenvectors, so this "
    "goes wrong. We let the computer find one weight per pixel by gradient descent, and it is not told "
    "which pixels are bad. For that it needs the derivative of the eigenvectors, which is what ddnref provides."
)
_EQUATIONS = Text(
    "In numbers: ten 64×64 covariances <code>C</code> (second moments, one per digit) are decomposed as one "
    f"batch by <code>ddnref.eigh_topk_fwd(C, {COMPONENTS})</code>. The loss is the cross-entropy of the right digit. "
    "Its gradient goes back through the eigenvectors by <code>ddnref.eigh_topk_vjp</code> and through everything else "
    "by the chain rule, written out by hand. No automatic differentiation is involved."
)
_REPEATED = Text(
    "Pixels in the corners of an image never change, so each of these covariances has many eigenvalues that "
    "are exactly zero: <em>repeated eigenvalues are in everyday data</em>. The loss does not depend on "
    "them, but the usual formula divides zero by zero there."
)


def _draw_parts(found: Found) -> list[Picture]:
    pixels = digits.pixel_columns()
    chosen = digits.one_of_each(found.clean)
    learned = found.learned
    return [
        Picture("digits", "One held-out digit of each kind, and the same with the bad spot.",
                "Ten handwritten digits, clean and with noise in a block of nine pixels", draw_digits(found),
                ("images", "digit", *pixels),
                [(name, d, *map(float, row)) for name, images in (("clean", found.clean), ("damaged", found.damaged))
                 for d, row in enumerate(images.images[chosen])]),
        Picture("course", "The loss falls, and the accuracy on images that were not used for learning rises.",
                "Training loss and held-out accuracy against steps of gradient descent", draw_course(learned),
                ("step", "training loss", "held-out accuracy"),
                [(i, *row) for i, row in enumerate(zip(learned.losses, learned.accuracies, strict=True))]),
        Picture("weights", "What was learned: the weight of every pixel. Red pixels count for less, blue ones for "
                "more. The outline marks the bad spot, which the computer was never shown.",
                "Learned weight of the 8 by 8 pixels, low inside the damaged block", draw_weights(found.weights),
                ("row", "column", "weight", "damaged"),
                [(i // 8, i % 8, float(weight), int(BLOCK.ravel()[i])) for i, weight in enumerate(found.weights)]),
        Picture("eigen-digits", f"The first {SHOWN} of {COMPONENTS} eigenvectors of every digit, before "
                "and after. Before, all but the first show nothing but the bad spot. After, they show strokes.",
                "Eigenvectors of the digit classes as images, before and after learning",
                draw_eigen_digits(found.before, found.after), ("when", "eigenvector", "digit", *pixels),
                [(when, i + 1, d, *map(float, row)) for when, v in (("before", found.before), ("after", found.after))
                 for i, vectors in enumerate(v) for d, row in enumerate(vectors)]),
        Picture("spectra", "All eigenvalues of the ten covariances, one dot each.",
                "Eigenvalues of all classes, logarithmic scale",
                draw_spectra(found.spectra), ("digit", "number, largest first", "eigenvalue"),
                [(d, i + 1, float(value)) for d, w in enumerate(found.spectra) for i, value in enumerate(w[::-1])]),
    ]  # fmt: skip


def _accuracies(found: Found) -> Table:
    learned = found.learned
    rows: list[tuple[Cell, ...]] = [
        ("clean images, equal weights", found.clean_accuracy),
        ("damaged images, equal weights", learned.accuracies[0]),
        ("damaged images, learned weights", learned.accuracies[-1]),
        ("damaged images, bad pixels removed by someone who knows them", found.repaired_accuracy),
    ]
    caption = (
        f"Share of the {len(found.clean.labels)} held-out images that are recognised. Learning used only the other "
        f"{digits.TRAIN}, all of them damaged (noise of standard deviation {NOISE}, pixels between 0 and 1)."
    )
    return Table("accuracy", caption, ("", "recognised"), rows, ".1%")


def _gradients(found: Found) -> Table:
    rows: list[tuple[Cell, ...]] = [
        ("ddnref, of the matrices", found.checked.matrix, _of_ten(found.checked.nan)),
        ("ddnref, of the pixel weights", found.checked.chain, ""),
    ]
    for name, other in found.compared.items():
        if other is None:
            rows.append((f"{name}, of the matrices", "not installed", ""))
        else:
            rows.append((f"{name}, of the matrices", other.difference, _of_ten(other.nan)))
    caption = (
        "Is the gradient right? ddnref is compared with finite differences (nudge the input and see how the loss "
        "moves), the others are compared with ddnref where they return a number. Errors are relative. The ten "
        f"matrices have {found.checked.repeated} pairs of neighbouring eigenvalues that are equal to rounding."
    )
    return Table("gradients", caption, ("gradient", "error", "NaN"), rows)


def _of_ten(nan: int) -> str:
    return f"NaN for {nan} of {CLASSES}" if nan else f"0 of {CLASSES}"


def _run(context: Context) -> Content:
    found = find(context)
    images, course, weights, eigen, spectra = _draw_parts(found)
    parts: list[Part] = [
        _TASK, images, _EQUATIONS, course, _accuracies(found), weights, eigen, _REPEATED, spectra, _gradients(found),
    ]  # fmt: skip
    first, last = found.learned.accuracies[0], found.learned.accuracies[-1]
    others = tuple(
        f"{name} not installed" if other is None else f"{name} NaN for {other.nan} of {CLASSES}"
        for name, other in found.compared.items()
    )
    headlines = [
        Headline("Damaged digits recognised", (f"{first:.1%} before learning", f"{last:.1%} after")),
        Headline("Error of the gradient that learning used", (brief(found.checked.chain),)),
        Headline("The same gradient by autograd eigh, ten digits", others),
    ]
    return Content(parts, headlines)


SECTION = Section("subspaces", "Learning through eigenvectors: digits with a bad spot", _run)
