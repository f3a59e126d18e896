"""Gradient error against the gap between eigenvalues, down to exactly repeated ones, where the truth is known."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import ddnref
from ddnref._core.arrays import Array
from ddnref._rules.samples import random_spectrum
from ddnref.report import peers
from ddnref.report.content import Cell, Content, Context, Headline, Part, Picture, Section, Table, Text
from ddnref.report.page import brief
from ddnref.report.pictures import BLUE, GREEN, GREY, ORANGE, figure
from ddnref.verify._backends import Backend

BELOW, CENTRE, ABOVE = (-3.0, -2.0, -1.5), 1.0, (4.0, 5.0)  # the other eigenvalues stay well apart
SIZE = 3  # eigenvalues that come together
CLUSTER = tuple(range(len(BELOW), len(BELOW) + SIZE))
MATRICES = 50
GAPS = (*(10.0**-e for e in range(16)), 0.0)
TOGETHER = 0.05  # rtol that says: eigenvalues this close belong together

OURS, TOLD = "ddnref", f"ddnref, rtol={TOGETHER}"


class Problem(NamedTuple):
    """Matrices ``Q diag(λ) Qᵀ``, the loss ``⟨C, P⟩`` of the cluster's projector, and its gradient in closed form."""

    x: NDArray[Any]
    c: NDArray[Any]
    gradient: NDArray[Any]


def pose(seed: int) -> Problem:
    """All gaps × all matrices, ``(17, 50, m, m)``; the same rotations and C at every gap.

    With ``C̃ = Qᵀ C Q`` and ``Φ_ij = 1/(λ_i − λ_j)``, i in the cluster and j outside (or the other way round):
    ``X̄ = Q (Φ ∘ C̃) Qᵀ``. No gap inside the cluster occurs in it.
    """
    rng = np.random.default_rng(seed)
    lam = np.asarray([[*BELOW, *(CENTRE + gap * i for i in range(SIZE)), *ABOVE] for gap in GAPS])[:, None, :]
    m = lam.shape[-1]
    q = np.linalg.qr(rng.standard_normal((MATRICES, m, m)))[0]
    q_t = np.swapaxes(q, -1, -2)
    c = random_spectrum(rng, (MATRICES,), rng.standard_normal((MATRICES, m)))
    inside = np.isin(np.arange(m), CLUSTER)
    across = inside[:, None] != inside[None, :]
    gap = np.where(inside[:, None], 1.0, -1.0) * (lam[..., :, None] - lam[..., None, :])
    phi = np.where(across, 1 / np.where(across, gap, 1.0), 0.0)
    x = (q * lam[..., None, :]) @ q_t
    c = np.broadcast_to(c, x.shape).copy()
    return Problem((x + np.swapaxes(x, -1, -2)) / 2, c, q @ (phi * (q_t @ c @ q)) @ q_t)


def projector_loss(w: Array, v: Array, c: Array) -> Array:  # noqa: ARG001
    """``⟨C, V_c V_cᵀ⟩`` over the cluster's columns, as one would write it for autograd."""
    xp = array_api_compat.array_namespace(v)
    v_c = v[..., CLUSTER[0] : CLUSTER[-1] + 1]
    return xp.sum(c * (v_c @ xp.matrix_transpose(v_c)))


def ours(backend: Backend, problem: Problem, rtol: float | None) -> NDArray[Any]:
    """The same gradient by `ddnref.eigh_vjp`: the cotangent of ``V_c`` is ``2 C V_c``."""
    x, c = backend.convert(problem.x), backend.convert(problem.c)
    w, v = ddnref.eigh(x)
    v_bar = 2 * (c @ v[..., CLUSTER[0] : CLUSTER[-1] + 1])
    return backend.to_numpy(ddnref.eigh_vjp(None, v_bar, w, v, index=CLUSTER, rtol=rtol, throw=False))


def errors(context: Context) -> dict[str, NDArray[Any] | None]:
    """Relative error by library, ``(gaps, matrices)``; ``None`` where it is not installed."""
    problem = pose(context.seed)
    found: dict[str, NDArray[Any] | None] = {
        OURS: ours(context.backend, problem, None),
        TOLD: ours(context.backend, problem, TOGETHER),
        **peers.gradients(projector_loss, problem.x, problem.c),
    }
    size = np.linalg.norm(problem.gradient, axis=(-2, -1))
    return {
        name: None if g is None else np.linalg.norm(g - problem.gradient, axis=(-2, -1)) / size
        for name, g in found.items()
    }


def worst(error: NDArray[Any]) -> NDArray[Any]:
    """The largest finite error at every gap; NaN where there is none."""
    finite = np.isfinite(error)
    high = np.max(np.where(finite, error, 0.0), axis=-1)
    return np.asarray(np.where(np.any(finite, axis=-1), high, np.nan))


def nans(error: NDArray[Any]) -> NDArray[Any]:
    """How many gradients at every gap are NaN or infinite."""
    return np.asarray(np.sum(~np.isfinite(error), axis=-1))


def _rows(found: dict[str, NDArray[Any] | None]) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for i, gap in enumerate(GAPS):
        row: list[Cell] = [f"{gap:.0e}" if gap else "0 (repeated)"]
        for error in found.values():
            row += ["not installed", ""] if error is None else [float(worst(error)[i]), int(nans(error)[i])]
        rows.append(tuple(row))
    return rows


# --- the picture ----------------------------------------------------------------------------------------------

TOP = 1e3  # where NaN is drawn
MARKS = {  # colour, marker, its size, what is drawn over what, and a shift that keeps two NaN markers apart
    OURS: (BLUE, "o", 6, 4, 0.0),
    TOLD: (GREEN, "s", 4, 5, 0.0),
    "PyTorch": (ORANGE, "^", 8, 2, -0.22),
    "JAX": (GREY, "v", 8, 3, 0.22),
}


def draw(found: dict[str, NDArray[Any] | None]) -> Figure:
    """Worst error against gap, both logarithmic; exactly repeated at the right, NaN at the top."""
    drawing = figure(5.2)
    axes = drawing.subplots()
    places = np.asarray([-math.log10(gap) if gap else 17.0 for gap in GAPS])
    for name, error in found.items():
        colour, mark, size, order, shift = MARKS[name]
        if error is None:
            axes.plot([], [], color=colour, marker=mark, label=f"{name}: not installed")
            continue
        high = worst(error)
        look: dict[str, Any] = {"color": colour, "marker": mark, "markersize": size, "zorder": order}
        axes.plot(places[:-1], high[:-1], label=name, **look)
        axes.plot(places[-1:], high[-1:], **look)
        bad = nans(error) > 0
        at = places[bad] + shift
        axes.plot(at, np.full(at.shape, TOP), linestyle="none", markerfacecolor="white", markeredgewidth=1.8,
                  **{**look, "markersize": size + 3})  # fmt: skip
    _scales(axes)
    drawing.legend(loc="outside lower center", ncols=2)
    return drawing


def _scales(axes: Any) -> None:
    axes.set_yscale("log")
    axes.set_ylim(1e-16, TOP * 10)
    axes.set_yticks([1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1.0, TOP])
    axes.set_yticklabels([r"$10^{-15}$", r"$10^{-12}$", r"$10^{-9}$", r"$10^{-6}$", r"$10^{-3}$", "1", "NaN"])
    axes.minorticks_off()
    axes.axvline(16, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xticks([0, 3, 6, 9, 12, 15, 17])
    axes.set_xticklabels(["1", *(rf"$10^{{-{e}}}$" for e in (3, 6, 9, 12, 15)), "0"])
    axes.set_xlabel("gap between the eigenvalues that come together")
    axes.set_ylabel("relative error of the gradient")


# --- the section ------------------------------------------------------------------------------------------------

_INTRODUCTION = Text(
    f"The textbook derivative of an eigenvector divides by the differences of eigenvalues. Here {SIZE} eigenvalues "
    "of an 8×8 matrix come together until they are equal, and the loss is <code>⟨C, P⟩</code>, with P the "
    f"projector on the {SIZE} eigenvectors as a group. Nothing dramatic happens to this loss: turning the "
    "eigenvectors inside their group leaves P as it is, and its gradient is known in closed form at every gap. "
    "So every error below is an error of the software."
)
_READING = Text(
    "How to read it. Rounding of about 1e-16 is divided by the gap, so digits go as the gap closes. Below "
    "16&nbsp;rounding errors ddnref treats the eigenvalues as one and is exact again. Someone who knows that the "
    "loss depends on the group only can say so with <code>rtol</code>, and is exact at every gap. Software that "
    "divides all the same returns numbers without a correct digit, or NaN, once the eigenvalues are equal. A loss that "
    "does depend on single eigenvectors of the group has no gradient there; for that <code>eigh_vjp</code> raises "
    "<code>GaugeError</code> instead of returning a number."
)


def _run(context: Context) -> Content:
    found = errors(context)
    rows = _rows(found)
    columns = ("gap", *(text for name in found for text in (f"{name}: worst error", f"NaN, of {MATRICES}")))
    caption = (
        f"Worst relative error of {MATRICES} random 8×8 matrices at every gap. Open markers at the top: some of "
        "the gradients are NaN; then the worst of the others is drawn too. Right of the dotted line the "
        "eigenvalues are exactly repeated."
    )
    parts: list[Part] = [
        _INTRODUCTION,
        Picture("error", caption, "Error of the gradient against the gap, by library, both axes logarithmic",
                draw(found), columns, rows),
        _READING,
        Table("errors", "The numbers of the picture: the largest finite error, and how many gradients are NaN.",
              columns, rows),
    ]  # fmt: skip
    return Content(parts, [Headline("Worst gradient error at exactly repeated eigenvalues", summary(found))])


def summary(found: dict[str, NDArray[Any] | None]) -> tuple[str, ...]:
    """Every library at exactly repeated eigenvalues, in a few words."""

    def say(name: str) -> str:
        error = found[name]
        if error is None:
            return f"{name} not installed"
        bad = int(nans(error)[-1])
        return f"{name} {brief(float(worst(error)[-1]))}" + (f" ({bad} of {MATRICES} NaN)" if bad else "")

    return tuple(say(name) for name in (OURS, "PyTorch", "JAX"))


SECTION = Section("gaps", "When eigenvalues come together", _run)
