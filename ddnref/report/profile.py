"""The tutorial's profile: time and memory of every rung of the ladder, of PyTorch and of JAX, against the forward pass.

NumPy arrays whatever the backend of the report: the algorithms are compared, and the peers' own software.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ddnref.report import cost, peers
from ddnref.report.content import Cell, Content, Context, Headline, Part, Picture, Section, Table, Text
from ddnref.report.cost import Figures, Size
from ddnref.report.pictures import BLUE, GREY, ORANGE, figure

SIZES: tuple[Size, ...] = ((5, 32), (5, 64), (5, 128), (5, 256), (5, 512))
SMALL = 64 * 1024  # bytes of input below which memory is not shown: it is counted in pages of 4 KiB
UNIT = "NumPy forward"


class Pass(NamedTuple):
    """How a pass is drawn, and who runs it; a forward pass is an outline, a backward pass is filled."""

    library: str
    edge: str
    face: str
    backward: bool = True


PASSES = {
    UNIT: Pass("NumPy", BLUE, "white", backward=False),
    "PyTorch forward": Pass("PyTorch", ORANGE, "white", backward=False),
    "JAX forward": Pass("JAX", GREY, "white", backward=False),
    "v1": Pass("NumPy", BLUE, "#d3e5f0"),
    "v2": Pass("NumPy", BLUE, "#9cc5de"),
    "v3": Pass("NumPy", BLUE, "#569aca"),
    "final": Pass("NumPy", BLUE, BLUE),
    "PyTorch": Pass("PyTorch", ORANGE, ORANGE),
    "JAX": Pass("JAX", GREY, GREY),
}


class Profile(NamedTuple):
    """What was measured, and whose software is missing."""

    sizes: tuple[Size, ...]
    seconds: Figures
    peaks: Figures
    missing: tuple[str, ...]


def measure(context: Context) -> Profile:
    """Times one library after the other, then memory of all at once, which does not mind the company."""
    missing = tuple(name for name, version in peers.versions().items() if version is None)
    libraries = [name for name in cost.PASSES if name not in missing]
    seconds: Figures = {}
    for library in context.track(libraries, "Timing the ladder"):
        seconds |= cost.seconds(library, SIZES, always=(UNIT,))  # a machine may be slow, or busy
    peaks: Figures = {}
    with ThreadPoolExecutor() as pool:
        for found in pool.map(lambda library: cost.peaks(library, _weighed(library, seconds)), libraries):
            peaks |= found
    return Profile(SIZES, seconds, peaks, missing)


def _weighed(library: str, seconds: Figures) -> Figures:
    """The passes whose memory is measured: backward, and not too small."""
    return {
        (name, size): value
        for (name, size), value in seconds.items()
        if PASSES[name].library == library and PASSES[name].backward and _input(size) >= SMALL
    }


def _input(size: Size) -> int:
    return size[0] * size[1] ** 2 * 4  # float32


# --- the numbers ------------------------------------------------------------------------------------------------


def relative(found: Profile) -> Figures:
    """Every time over that of NumPy's forward pass at the same size."""
    return {(name, size): value / found.seconds[UNIT, size] for (name, size), value in found.seconds.items()}


def in_inputs(found: Profile) -> Figures:
    """Every peak over the memory of the matrices that are decomposed."""
    return {(name, size): value / _input(size) for (name, size), value in found.peaks.items()}


def state(found: Profile, name: str, size: Size) -> str:
    """Why there is no figure, or "measured"."""
    if PASSES[name].library in found.missing:
        return "not installed"
    if (name, size) in found.seconds:
        return "measured"
    guess = cost.expected(name, size, found.seconds)
    return f"skipped: {guess:.0f} s expected"


def skipped(found: Profile) -> list[str]:
    """What was skipped, each by name and reason."""
    return [
        f"{name} at {size} ({reason})"
        for name in PASSES
        for size in found.sizes
        if (reason := state(found, name, size).removeprefix("skipped: ")) not in ("measured", "not installed")
    ]


def _long(found: Profile, figures: Figures, ratios: Figures, sizes: Sequence[Size]) -> list[tuple[Cell, ...]]:
    """A row for every size and pass, for a CSV file."""
    return [
        (*size, name, figures.get((name, size), ""), ratios.get((name, size), ""), state(found, name, size))
        for size in sizes
        for name in _shown(ratios)
    ]


def _wide(found: Profile, ratios: Figures, sizes: Sequence[Size]) -> list[tuple[Cell, ...]]:
    """A row for every pass, a column for every size."""
    return [
        (name, *(ratios.get((name, size), state(found, name, size).partition(":")[0]) for size in sizes))
        for name in _shown(ratios)
    ]


def _shown(ratios: Figures) -> list[str]:
    """All passes, or the backward passes where there is nothing about forward passes."""
    forward = any(not PASSES[name].backward for name, _ in ratios)
    return [name for name, one in PASSES.items() if forward or one.backward]


# --- pictures ---------------------------------------------------------------------------------------------------


def draw(found: Profile, ratios: Figures, sizes: Sequence[Size], label: str, *, log: bool) -> Figure:
    """Bars grouped by size; what was skipped is written where its bar would stand."""
    drawing = figure(4.6)
    axes = drawing.subplots()
    names = _shown(ratios)
    shown = [name for name in names if PASSES[name].library not in found.missing]
    floor = 10.0 ** np.floor(np.log10(min(ratios.values()))) if log else 0.0
    width = 0.86 / len(shown)
    places = dict(zip(shown, (np.arange(len(shown)) - (len(shown) - 1) / 2) * width, strict=True))
    for name in shown:
        at = [i for i, size in enumerate(sizes) if (name, size) in ratios]
        heights = [ratios[name, sizes[i]] - floor for i in at]
        axes.bar([i + places[name] for i in at], heights, 0.82 * width, bottom=floor,
                 edgecolor=PASSES[name].edge, facecolor=PASSES[name].face, linewidth=1.0)  # fmt: skip
        for i in set(range(len(sizes))) - {*at}:
            axes.annotate(f"{name} skipped", (i + places[name], floor), (0, 3), textcoords="offset points",
                          rotation=90, ha="center", va="bottom", fontsize=7.5, color=GREY)  # fmt: skip
    _scales(axes, sizes, label, log=log)
    drawing.legend(handles=[_key(name, found.missing) for name in names], loc="outside lower center", ncols=3)
    return drawing


def _key(name: str, missing: Sequence[str]) -> Patch:
    """Made by hand: a pass without bars must keep its colour."""
    label = f"{name}: not installed" if PASSES[name].library in missing else name
    return Patch(edgecolor=PASSES[name].edge, facecolor=PASSES[name].face, linewidth=1.0, label=label)


def _scales(axes: Any, sizes: Sequence[Size], label: str, *, log: bool) -> None:
    if log:
        axes.set_yscale("log")
        axes.axhline(1, color=BLUE, linewidth=0.8, linestyle=":")
        axes.minorticks_off()
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("(b, m): b matrices, m×m")
    axes.set_ylabel(label)


# --- the section ------------------------------------------------------------------------------------------------

_INTRODUCTION = Text(
    "The tutorial on deep declarative networks derives the backward pass through the eigenvectors in three steps, v1 "
    "to v3, each a rearrangement of the one before, and profiles them. This is its chart again, at more sizes. "
    "<em>v1</em> takes a pseudo-inverse for every eigenvector, <em>v2</em> takes it from the decomposition, both at "
    "O(m⁴); <em>v3</em> does all eigenvectors at once, in O(m³); <em>final</em> is <code>ddnref.eigh_vjp</code>, with "
    "its checks on. PyTorch and JAX bring their own forward and backward pass."
)


def _time(found: Profile) -> list[Part]:
    ratios = relative(found)
    milliseconds: tuple[Cell, ...] = (f"{UNIT}, in ms", *(1e3 * found.seconds[UNIT, size] for size in found.sizes))
    columns = ("pass", *map(str, found.sizes))
    caption = (
        "Time of forward passes (outlines) and backward passes (filled), all divided by one number at each size: the "
        "time of NumPy's forward pass, <code>ddnref.eigh</code>. PyTorch's and JAX's bars are divided by it too, so "
        "that bars can be compared; they may call another LAPACK, so their own forward pass stands beside. NumPy "
        f"arrays, float32, {cost.THREADS} thread, medians, each library in a process of its own, JAX compiled. The "
        "figures are those of the machine that made this page; <code>ddnref report</code> measures them, with any "
        "<code>--backend</code>."
    )
    parts: list[Part] = [
        Picture("time", caption, "Time of forward and backward passes by size, logarithmic",
                draw(found, ratios, found.sizes, "time / NumPy forward pass", log=True),
                ("b", "m", "pass", "seconds", UNIT + " = 1", "state"),
                _long(found, found.seconds, ratios, found.sizes)),
        Table("times", "The numbers of the picture, and what 1 stands for.", columns,
              [milliseconds, *_wide(found, ratios, found.sizes)], ".3g"),
    ]  # fmt: skip
    if names := skipped(found):
        parts.append(Text(
            f"Skipped, because one call is expected to take more than {cost.PATIENCE:.0f} seconds, at m⁴ from the "
            f"largest size that was measured: {'; '.join(names)}."
        ))  # fmt: skip
    return parts


def _memory(found: Profile) -> list[Part]:
    if not found.peaks:
        return [Text("Peak memory is not shown: it is read from <code>/proc</code>, which this system does not have.")]
    ratios = in_inputs(found)
    sizes = [size for size in found.sizes if _input(size) >= SMALL]
    caption = (
        "Peak memory of a backward pass, the returned gradient included, above what is in use before the call, in "
        f"units of the matrices that were decomposed, on {cost.THREADS} thread. The measure is the same for all: how "
        "far the address space of a fresh process grows, with a malloc that keeps nothing from earlier calls. What a "
        f"library holds for good does not count, such as the buffers of its BLAS. Inputs of less than {SMALL // 1024} "
        "KiB are left out: they are no larger than a few pages."
    )
    return [
        Picture("memory", caption, "Peak memory of backward passes by size, in units of the input",
                draw(found, ratios, sizes, "peak memory / input", log=False),
                ("b", "m", "pass", "bytes", "input = 1", "state"),
                _long(found, found.peaks, ratios, sizes)),
        Table("peaks", "The numbers of the picture.", ("pass", *map(str, sizes)), _wide(found, ratios, sizes), ".3g"),
    ]  # fmt: skip


def summary(found: Profile) -> tuple[str, ...]:
    """The backward passes at the largest size, in a few words."""
    size, ratios = found.sizes[-1], relative(found)

    def say(label: str, name: str) -> str:
        return f"{label} {ratios[name, size]:.2g}" if (name, size) in ratios else f"{label} {state(found, name, size)}"

    return tuple(say(label, name) for label, name in (("ddnref", "final"), ("PyTorch", "PyTorch"), ("JAX", "JAX")))


def _run(context: Context) -> Content:
    found = measure(context)
    headline = Headline(f"Backward pass, in NumPy forward passes, {found.sizes[-1]} float32", summary(found))
    return Content([_INTRODUCTION, *_time(found), *_memory(found)], [headline])


SECTION = Section("profile", "What a backward pass costs", _run)
