"""The tutorial's comparison: eigenvectors by iteration, their gradients by its forms and ours; precision and cost."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ddnref.report import cost, peers
from ddnref.report.content import Cell, Content, Context, Headline, Part, Picture, Section, Table, Text
from ddnref.report.cost import Figures, Size
from ddnref.report.declarative_passes import GIB, MEMORY, PROCESSES, STEPS, expected_bytes, names
from ddnref.report.declarative_pictures import draw_cost, draw_gradients, draw_residuals
from ddnref.report.declarative_precision import (
    BATCH,
    DTYPES,
    FORWARD,
    PATIENCE,
    SMALL,
    Key,
    Precision,
    gradients,
    median,
    precision,
    worst,
)
from ddnref.report.matrices import DISTRIBUTIONS
from ddnref.report.page import brief


class Plan(NamedTuple):
    """How much is measured."""

    widths: tuple[int, ...]
    pairs: tuple[int, ...]
    """How many eigenpairs, n."""
    seeds: int
    """Of the precision."""
    calls: int
    repeat: float
    """Seconds for which a pass is repeated, and `calls` times unless that takes five times as long."""
    patience: float
    """Seconds that one timed call may be expected to take."""
    command: str

    @property
    def sizes(self) -> list[Size]:
        """``(b, m, n)``, n by n."""
        return [(BATCH, m, n) for n in self.pairs for m in self.widths]


QUICK = Plan((32, 64, 128), (1, 4), seeds=2, calls=3, repeat=0.03, patience=1.5, command="ddnref report")
FULL = Plan(
    (32, 64, 128, 256, 512, 1024),
    (1, 4),
    seeds=100,
    calls=10,
    repeat=0.1,
    patience=20.0,
    command="ddnref report --full",
)


def plan(*, full: bool) -> Plan:
    """The tutorial's sizes and seeds, or what half a minute allows."""
    return FULL if full else QUICK


class Costs(NamedTuple):
    """Seconds and bytes by pass and size, and whose software is missing."""

    seconds: Figures
    peaks: Figures
    missing: tuple[str, ...]


def measure(context: Context, what: Plan) -> tuple[Costs, Precision]:
    """Times one library after the other; then memory, of all at once, and precision, which do not mind the company."""
    installed = {"NumPy": True, **{name: version is not None for name, version in peers.versions().items()}}
    missing = tuple(name for name in PROCESSES if not installed[name])
    processes = [process for name, process in PROCESSES.items() if name not in missing]
    timed = {}
    for process in context.track(processes, "Timing the tutorial's passes"):
        timed[process] = cost.seconds(process, what.sizes, what.patience, least=what.calls, repeat=what.repeat)
    with ThreadPoolExecutor() as pool:
        weighed = pool.map(cost.peaks, timed, timed.values())
        seeds = range(context.seed, context.seed + what.seeds)
        found = precision(context.track(what.widths, "Precision of the tutorial's passes"), seeds)
        return Costs(_together(timed.values()), _together(weighed), missing), found


def _together(parts: Iterable[Figures]) -> Figures:
    return {key: value for part in parts for key, value in part.items()}


def state(found: Costs, what: Plan, name: str, size: Size) -> str:
    """Why there is no figure, or "measured"."""
    if (name, size) in found.seconds:
        return "measured"
    if name.startswith("AT") and "PyTorch" in found.missing:
        return "PyTorch not installed"
    if (needed := expected_bytes(name, size)) > MEMORY:
        return f"skipped: {needed / GIB:.3g} GiB expected"
    return f"skipped: {cost.expected(name, size, found.seconds):.2g} s expected, {what.patience:g} s allowed"


# --- tables -----------------------------------------------------------------------------------------------------


def pairs_table(found: Precision) -> Table:
    """Eigenvalues and eigenvectors by each forward pass, for every distribution."""
    columns = ("matrices", *(f"{name}, {q}" for q in ("λ", "y") for name in FORWARD))
    rows: list[tuple[Cell, ...]] = [
        (d, *(median(found, Key(d, SMALL, 1, "float32", name, q)) for q in ("λ", "y") for name in FORWARD))
        for d in DISTRIBUTIONS
    ]
    caption = (
        "Difference of float32 eigenvalues λ (relative) and eigenvectors y (largest entry) from float64, n = 1, "
        f"{BATCH} matrices {SMALL}×{SMALL} a seed, medians; PI and SI after {STEPS} steps."
    )
    return Table("pairs", caption, columns, rows)


def gradients_table(found: Precision, n: int) -> Table:
    """Every backward pass on Gaussian matrices."""
    forward = "PI" if n == 1 else "eigh"
    cases = [(dtype, kind) for dtype in DTYPES for kind in ("ones", "random")]
    rows: list[tuple[Cell, ...]] = [
        (name, *(median(found, Key("gaussian", SMALL, n, dtype, forward, name, kind)) for dtype, kind in cases))
        for name in gradients(SMALL, n)
    ]
    source = {
        1: "PI. “Raw” is the unrolled gradient as it comes, not symmetrised, that of a matrix with free entries.",
        4: f"<code>eigh</code>. Unroll repeats SI, which needs more than {STEPS} steps for the fourth.",
    }[n]
    caption = (
        f"Relative error of the gradient, n = {n}, Gaussian {SMALL}×{SMALL}, medians, by backward pass and cotangent. "
        f"Eigenpairs from {source}"
    )
    return Table(f"gradients-{n}", caption, ("pass", *(f"{dtype}, {kind}" for dtype, kind in cases)), rows)


def distributions_table(found: Precision) -> Table:
    """Every backward pass on every distribution."""
    rows: list[tuple[Cell, ...]] = [
        (name, *(median(found, Key(d, SMALL, 1, "float32", "PI", name, "random")) for d in DISTRIBUTIONS))
        for name in gradients(SMALL, 1)
    ]
    caption = "The same in float32 with random cotangents, n = 1, for every kind of matrix."
    return Table("distributions", caption, ("pass", *DISTRIBUTIONS), rows)


def costs_table(found: Costs, what: Plan, n: int, kind: str) -> Table:
    """A row for every pass, a column for every size."""
    figures, factor, unit = (found.seconds, 1e3, "ms") if kind == "time" else (found.peaks, 2.0**-20, "MiB")
    sizes = [size for size in what.sizes if size[-1] == n]

    def cell(name: str, size: Size) -> Cell:
        if (name, size) in figures:
            return factor * figures[name, size]
        return state(found, what, name, size).partition(":")[0].replace("measured", "unknown")

    caption = f"{kind.capitalize()} in {unit}, n = {n}, by (b, m)."
    rows: list[tuple[Cell, ...]] = [(name, *(cell(name, size) for size in sizes)) for name in names(n)]
    return Table(f"{kind}-{n}", caption, ("pass", *(str(size[:2]) for size in sizes)), rows, ".3g")


def skipped(found: Costs, exact: Precision, what: Plan) -> list[str]:
    """What was skipped, each by name and reason."""
    costs = [
        f"{name} at {size} ({reason.removeprefix('skipped: ')})"
        for size in what.sizes
        for name in names(size[-1])
        if (reason := state(found, what, name, size)).startswith("skipped")
    ]
    return costs + [f"precision at m = {m} ({guess:.0f} s a seed expected)" for m, guess in exact.skipped.items()]


# --- the section ------------------------------------------------------------------------------------------------

_INTRODUCTION = Text(
    "Eigenvectors as the solution of an optimisation problem: the tutorial on deep declarative networks finds them by "
    "power iteration (<em>PI</em>) or simultaneous iteration (<em>SI</em>) and takes the gradient from the equations "
    "that they solve. <em>DDN</em> is the declarative node, <em>IFT</em> the fixed point, each with the Jacobian "
    "(<em>J</em>) or structured (<em>E</em>), <em>Unroll</em> the reverse of all steps, <em>AT</em> PyTorch's "
    "autograd through <code>eigh</code>. <em>bordered</em> and <em>fixed_point</em> are what ddnref offers. DDN "
    "solves with a matrix that is exactly singular at the solution, unless it takes the pseudo-inverse; the bordered "
    "system is the same equation without that flaw."
)


def _made(what: Plan) -> Text:
    return Text(
        f"Made by <code>{what.command}</code>, with NumPy arrays whatever the backend: {what.seeds} seeds, "
        f"m up to {what.widths[-1]}. <code>{FULL.command}</code> takes the tutorial's {FULL.seeds} seeds and sizes to "
        f"{FULL.widths[-1]}, and hours."
    )


def _precision(found: Precision, what: Plan) -> list[Part]:
    made = f"{what.seeds} seeds; <code>{what.command}</code> makes it."
    widths = [m for m in what.widths if m not in found.skipped]
    rows: list[tuple[Cell, ...]] = [(*key, median(found, key), worst(found, key)) for key in found.errors]
    columns = (*Key._fields, "median", "worst")
    residuals = [row for row in rows if row[5] in ("eigen", "fixed point")]
    errors = [row for row in rows if row[6]]
    return [
        pairs_table(found),
        Picture("residuals", "How well λ and y fit: the eigen residual ‖Xy − λy‖/λ and the fixed-point residual "
                f"‖y − Xy/‖Xy‖‖, Gaussian matrices, n = 1, medians of {made}",
                "Two residuals by size for eigh, power and simultaneous iteration, logarithmic",
                draw_residuals(found, widths), columns, residuals),
        gradients_table(found, 1),
        gradients_table(found, 4),
        Picture("gradients", "Error of the gradient against the float64 closed form <code>ddnref.eigh_vjp</code>, "
                f"random cotangents, Gaussian matrices, eigenpairs from PI, n = 1, medians of {made}",
                "Gradient error by size for each backward pass, float32 and float64, logarithmic",
                draw_gradients(found, widths), columns, errors),
        distributions_table(found),
    ]  # fmt: skip


def _costs(found: Costs, exact: Precision, what: Plan) -> list[Part]:
    made = f"<code>{what.command}</code> makes it, on the machine where it runs."
    parts: list[Part] = []
    captions = {
        "time": f"Time of every pass, n = 1, float32, b = {BATCH}, {cost.THREADS} thread, medians. Every backward pass "
                "but Unroll is the same for PI and SI. Forward passes stop when they have converged. " + made,
        "memory": "Peak memory of every pass above what is in use before the call, n = 1. " + made,
    }  # fmt: skip
    for kind, figures in (("time", found.seconds), ("memory", found.peaks)):
        if not figures:
            parts.append(Text("Peak memory is not shown: it is read from <code>/proc</code>, which is not there."))
            continue
        rows: list[tuple[Cell, ...]] = [
            (*size, name, figures.get((name, size), ""), state(found, what, name, size))
            for size in what.sizes
            for name in names(size[-1])
        ]
        alt = f"{kind.capitalize()} of every pass by size, logarithmic"
        columns = ("b", "m", "n", "pass", kind, "state")
        drawing = draw_cost(figures, what.sizes, kind)
        parts.append(Picture(f"{kind}-by-size", captions[kind], alt, drawing, columns, rows))
        parts += [costs_table(found, what, n, kind) for n in what.pairs]
    if left_out := skipped(found, exact, what):
        parts.append(Text(
            f"Skipped, because one call is expected to take more than {what.patience:g} s (one seed of the precision "
            f"{PATIENCE:.0f} s), at m⁴ from the largest size that was measured, or a Jacobian and its copies more than "
            f"{MEMORY // GIB} GiB: {'; '.join(left_out)}."
        ))  # fmt: skip
    return parts


def headline(found: Precision) -> Headline:
    """The structured form as the tutorial runs it beside ours."""
    key = Key("gaussian", SMALL, 1, "float32", "PI", "", "random")
    shown = {"ddnref bordered": "bordered", "tutorial's DDN-E, solve": "PI-DDN-E"}
    label = f"Gradient error of an eigenvector, float32, m = {SMALL}"
    values = (f"{text} {brief(median(found, key._replace(quantity=name)))}" for text, name in shown.items())
    return Headline(label, tuple(values))


def _run(context: Context) -> Content:
    what = plan(full=context.full)
    costs, found = measure(context, what)
    return Content(
        [_INTRODUCTION, _made(what), *_precision(found, what), *_costs(costs, found, what)], [headline(found)]
    )


SECTION = Section("declarative", "Eigenvectors as a declarative node", _run)
