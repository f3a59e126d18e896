"""
Eigenvectors by iteration, and their gradients
==============================================

Simultaneous iteration finds the leading eigenvectors of a covariance matrix by products with it. Stopped early it
returns something else, and the gradient depends on which of the two is meant: the eigenvectors, or what was computed.
The second half of this page compares the ways of the tutorial on deep declarative networks to take that gradient.
"""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, _measure, card, check, image, picture, settings, table, track
from ddnref.examples._passes import COTANGENTS, DISTRIBUTIONS, GIB, MEMORY, PASSES, expected_bytes, names
from ddnref.examples._peers import peers, with_peers
from ddnref.examples._precision import BATCH, DTYPES, SMALL, Key, precision

images, labels = load_digits(return_X_y=True)
rows = images[labels == 3] / 16
rows = rows - rows.mean(axis=0)
covariance = rows.T @ rows / len(rows)  # 64×64, of all threes
N = 4
exact, vectors = ddnref.eigh(covariance)
print("relative gaps behind the first five:", np.round(-np.diff(exact[::-1])[:5] / exact[-1], 3))

# %%
# The eigen-digits appear
# -----------------------
# Each row shows the :math:`n = 4` vectors after so many steps. The start is pseudo-random, and the first step only
# orthogonalises it. Above each image is its relative residual :math:`\lVert X v - \lambda v \rVert / |\lambda|`. With
# ``throw=False`` an iteration that has not converged returns its last iterate.

STEPS = (1, 2, 5, 20, 80)
leading = vectors[:, : -N - 1 : -1]


def iterate(x, steps):
    return ddnref.simultaneous_iteration(
        x, N, symmetric=True, maxiter=steps, throw=False, align="positive", reference=leading
    )


fig, axes = plt.subplots(len(STEPS), N, figsize=(5.6, 7.4), layout="constrained")
shown = []
for row, steps in zip(axes, STEPS, strict=True):
    (w, v), info = iterate(covariance, steps)
    residual = ddnref.eigen_residual(covariance, w, v) / w
    shown += [(steps, k + 1, float(residual[k]), *map(float, v[:, k])) for k in range(N)]
    for k, ax in enumerate(row):
        image(ax, v[:, k], f"{residual[k]:.0e}", signed=True)
    row[0].set_ylabel(f"{steps} step{'s' * (steps > 1)}")
picture("eigen-digits", fig,
    "Four eigen-digits as the iteration finds them.",
    "Four eigenvectors as images after 1 to 80 steps, with their residuals",
    ("steps", "vector", "residual", *(f"pixel {i}" for i in range(64))),
    shown)  # fmt: skip

# %%
# Three gradients of one loss
# ---------------------------
# The loss is the part of one image :math:`a` that the four vectors leave outside,
# :math:`L = \frac{1}{2} \lVert a - V V^T a \rVert^2`, plus a little of each vector by itself, so that it is not
# a function of their span alone. There are two questions to ask of an unconverged iterate :math:`(w, V)`:
#
# - How far is the gradient from that of the eigenvectors, :math:`\bar X^*`, by the closed form of `ddnref.eigh_vjp`?
# - How far is it from that of the iterate itself, by finite differences through all the steps?

probe = rows[np.argmax(np.sum((rows - rows @ leading @ leading.T) ** 2, axis=1))]
tilt = 0.1 * np.random.default_rng(settings.seed).standard_normal((64, N))


def loss(v):
    return -0.5 * np.sum((probe @ v) ** 2) + np.sum(tilt * v)


def loss_gradient(v):
    return -np.outer(probe, probe @ v) + tilt


limit = ddnref.eigh_vjp(None, loss_gradient(leading), exact, vectors, index=range(63, 63 - N, -1))


def difference_of_the_iterate(gradient, steps):
    """``|fd − ⟨X̄, D⟩| / ‖X̄‖``, the worst of three unit directions D and of ``X̄ / ‖X̄‖``."""
    rng = np.random.default_rng(1)
    directions = [a + a.T for a in rng.standard_normal((3, 64, 64))] + [gradient]
    worst = []
    for d in directions:
        d = d / np.linalg.norm(d)
        numerical = ddnref.testing.numerical_jvp(lambda x: loss(iterate(x, steps)[0][1]), covariance, d, gap=0.05)
        worst.append(abs(numerical - np.sum(gradient * d)) / np.linalg.norm(gradient))
    return float(np.max(worst))


METHODS = {"bordered": "o-", "fixed_point": "s--", "unrolled": "^-"}
COUNTS = (2, 3, 5, 10, 20, 40, 80, 160)
to_limit, to_iterate = ({method: [] for method in METHODS} for _ in range(2))
residuals = []
for steps in track(COUNTS, "Gradients of an iteration"):
    (w, v), info = iterate(covariance, steps)
    residuals.append(float(info.residual_norm))
    for method in METHODS:
        x_bar = ddnref.simultaneous_iteration_vjp(
            None, loss_gradient(v), w, v, covariance, method=method, symmetric=True, n_iter=int(info.n_iter)
        )
        to_limit[method].append(float(np.linalg.norm(x_bar - limit) / np.linalg.norm(limit)))
        to_iterate[method].append(difference_of_the_iterate(x_bar, steps))

fig, steps_axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, errors, name in ((steps_axes[0], to_limit, "eigenvectors"), (steps_axes[1], to_iterate, "iterate")):
    for method, style in METHODS.items():
        ax.loglog(COUNTS, errors[method], style, label=method, markersize=5)
    ax.loglog(COUNTS, residuals, "k:", label="residual of the span")
    ax.set(xlabel="steps", title=f"from the gradient of the {name}")
steps_axes[0].set_ylabel("relative error")
steps_axes[0].legend()
picture("steps", fig,
    "Distance of three gradients from that of the eigenvectors and from that of the iterate.",
    "Errors of three methods against the number of steps, on logarithmic axes",
    ("method", "steps", "from the eigenvectors'", "from the iterate's"),
    [(m, *row) for m in METHODS for row in zip(COUNTS, to_limit[m], to_iterate[m], strict=True)])  # fmt: skip

# %%
# Left: all three approach the gradient of the eigenvectors as fast as the vectors themselves converge, the unrolled
# one a little behind, because the derivative of an iterate converges later than the iterate. Right: reversing the
# steps is right from the first one on, to the accuracy of finite differences. The implicit methods assume convergence
# and are wrong until it is reached. So look at ``info.converged``, or let the default ``throw=True`` do it.

for method in METHODS:
    check(f"{method}, converged, from the gradient of the eigenvectors", to_limit[method][-1], 1e-8)
check("unrolled, from the gradient of the iterate, at any number of steps", max(to_iterate["unrolled"]), 1e-6)

# %%
# The tutorial's comparison
# -------------------------
# The tutorial finds eigenvectors as the solution of an optimisation problem, by power iteration (*PI*) or simultaneous
# iteration (*SI*), and takes the gradient from the equations that they solve. *DDN* is the declarative node, *IFT* the
# fixed point, each with the Jacobian (*J*) or structured (*E*), *Unroll* the reverse of all steps ("raw": not
# symmetrised, as for a matrix with free entries), *AT* PyTorch's autograd through ``eigh``. *bordered* and
# *fixed_point* are the methods of ddnref. DDN solves with a matrix that is exactly singular at the solution, unless it
# takes the pseudo-inverse; the bordered system is the same equation without that flaw.
#
# The matrices are random, with positive entries. Errors are those of the gradient against the float64 closed form;
# time and memory, in float32 on one thread, are measured in fresh processes. ``ddnref report --full`` takes the
# tutorial's sizes, seeds and distributions, four eigenvectors too, and hours.

WIDTHS = (32, 64, 128, 256, 512, 1024) if settings.full else (32, 64, 128)
PAIRS = (1, 4) if settings.full else (1,)  # how many eigenpairs
SEEDS = 100 if settings.full else 2
PATIENCE = 20.0 if settings.full else 1.5  # seconds that one timed call may be expected to take
CALLS, REPEAT = (10, 0.1) if settings.full else (3, 0.03)
COSTS = WIDTHS if settings.full else (SMALL,)  # the sizes at which time and memory are measured

sizes = [(BATCH, m, n) for n in PAIRS for m in COSTS]
torch = peers()["PyTorch"]
seconds, peaks = {}, {}
sources = [source for name, source in PASSES.items() if name != "PyTorch" or torch == "PyTorch"]
for source in track(sources, "Timing the tutorial's passes"):
    timed = _measure.seconds(source, sizes, PATIENCE, least=CALLS, repeat=REPEAT)
    seconds |= timed
    peaks |= _measure.peaks(source, timed)
seeds = range(settings.seed, settings.seed + SEEDS)
at = (BATCH, SMALL, 1)
relative = {(name, size): value / seconds["PI forward", at] for (name, size), value in seconds.items() if size == at}
relative, peaks = (
    with_peers(f"iteration: {what}", {"AT forward": "PyTorch", "AT": "PyTorch"}, [at], figures)
    for what, figures in (("time", relative), ("peak memory", peaks))
)
found = precision(track(WIDTHS, "Precision of the tutorial's passes"), seeds, full=settings.full)


def state(name, size):
    """Say why there is no figure for a pass, or that there is one."""
    if (name, size) in seconds:
        return "measured"
    if name.startswith("AT") and torch != "PyTorch":
        return "not recorded"
    if (needed := expected_bytes(name, size)) > MEMORY:
        return f"skipped: {needed / GIB:.3g} GiB expected"
    return f"skipped: {_measure.expected(name, size, seconds):.2g} s expected, {PATIENCE:g} s allowed"


UNITS = {"ms": (seconds, 1e3), "MiB": (peaks, 2.0**-20), "time": (relative, 1.0)}


def label(name):
    """The name of a pass, with version and date where it was recorded."""
    return f"{name}, {torch}" if name.startswith("AT") and torch != "PyTorch" else name


def cell(name, size, figures, factor):
    """A figure for a table, or why there is none."""
    reason = state(name, size).partition(":")[0].replace("measured", "unknown")
    return factor * figures[name, size] if (name, size) in figures else reason


for size in sizes:
    for name in names(size[-1]):
        if (reason := state(name, size)).startswith("skipped"):
            print(f"{name} at {size} {reason}")
for m, guess in found.skipped.items():
    print(f"precision at m = {m} skipped: {guess:.0f} s per seed expected")

key = Key("gaussian", SMALL, 1, "float32", "PI", "", "random")
gradients = list(dict.fromkeys(k.quantity for k in found.errors if k[:3] == key[:3] and k.cotangent))
rows = []
for name in ["PI-Unroll, raw", *names(1)]:
    errors = [found.median(key._replace(dtype=dtype, quantity=name)) if name in gradients else "" for dtype in DTYPES]
    costs = ["" if "raw" in name else cell(name, at, *UNITS[unit]) for unit in ("time", "MiB")]
    rows.append((label(name), *errors, *costs))
table(
    "passes",
    f"Every pass through one eigenvector at m = {SMALL}, b = {BATCH}: relative error of the gradient (medians of "
    f"{SEEDS} seeds, random cotangents, eigenpairs from PI), time relative to PI's forward pass, peak memory in MiB.",
    ("pass", *DTYPES, "time", "MiB"),
    rows,
    ".3g",
)
for name in ("PI-Unroll", "PI-DDN-E, pinv", "PI-IFT-E", "fixed_point", "bordered"):
    for dtype in DTYPES:
        error = found.median(key._replace(dtype=dtype, quantity=name))
        check(f"gradient by {name}, {dtype}", error, 200 * float(np.finfo(dtype).eps))
bordered, ddn = (found.median(key._replace(quantity=name)) for name in ("bordered", "PI-DDN-E"))
card(
    "An eigenvector is found step by step. Where the steps stop early, which gradient is right?",
    steps_axes[0],
    "(w, v), info = ddnref.simultaneous_iteration(x, n, symmetric=True)\n"
    "x_bar = ddnref.simultaneous_iteration_vjp(None, v_bar, w, v, x, symmetric=True)",
    "The picture shows how far three gradients are from that of the eigenvectors. Once the steps have converged, ours "
    f"is wrong by {bordered:.0e} in float32. The equation of a declarative node, solved as it is, is off by {ddn:.1g}.",
)

# %%
# By size:

LOOK = {  # colour, marker and line of each pass
    "AT forward": (GREY, "s", ":"),
    "PI forward": (BLUE, "o", ":"),
    "SI forward": (BLUE, "^", ":"),
    "AT": (GREY, "s", "-"),
    "SI-Unroll": (GREEN, "^", "-"),
    "PI-Unroll": (GREEN, "o", "-"),
    "PI-DDN-J": (ORANGE, "D", "--"),
    "PI-DDN-E": (ORANGE, "o", "-"),
    "PI-DDN-E, pinv": ("#e39a7d", "v", "-"),
    "PI-IFT-J": ("#8b5aa8", "D", "--"),
    "PI-IFT-E, B stored": ("#8b5aa8", "v", ":"),
    "PI-IFT-E": ("#8b5aa8", "o", "-"),
    "fixed_point": ("#569aca", "X", "-"),
    "bordered": (BLUE, "P", "-"),
}


def draw(ax, curves, title):
    """Draw lines ``{pass: values by m}``; they end where a pass was skipped."""
    for name, values in curves.items():
        colour, marker, line = LOOK[name]
        ax.plot(WIDTHS, values, color=colour, marker=marker, linestyle=line, linewidth=1.6, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(WIDTHS, map(str, WIDTHS))
    ax.set(yscale="log", xlabel="m", title=title)


def by_size(**parts):
    """Medians for every m, of the errors with these parts of the key."""
    return [found.median(key._replace(m=m, **parts)) for m in WIDTHS]


def numbers(*wanted):
    """Median and worst of all errors of these quantities, for a CSV file."""
    return [(*one, found.median(one), found.worst(one)) for one in found.errors if one.quantity in wanted]


compared = [name for name in LOOK if name in gradients and name not in ("PI-DDN-J", "PI-IFT-J", "PI-IFT-E, B stored")]
fig, panels = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
for ax, dtype in zip(panels, DTYPES, strict=True):
    draw(ax, {name: by_size(dtype=dtype, quantity=name) for name in compared}, dtype)
panels[0].set_ylabel("relative error")
fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
picture("gradients", fig,
    f"Error of the gradient on Gaussian matrices, medians of {SEEDS} seeds.",
    "Gradient error by size for each backward pass, float32 and float64, logarithmic",
    (*Key._fields, "median", "worst"),
    numbers(*gradients))  # fmt: skip

# %%
# With ``--full``, all that the tutorial's comparison contains: the precision of the eigenpairs, gradients by
# distribution and for four eigenvectors, and the cost of every pass at every size.


def medians(name, caption, row, values, columns, **fixed):
    """Make a table of medians: a row fills in one part of the key, a column others."""
    one = key._replace(**fixed)
    cells = [(v, *(found.median(one._replace(**{row: v}, **part)) for part in columns.values())) for v in values]
    table(name, caption, (row, *columns), cells)


if settings.full:
    medians(
        "pairs",
        f"Difference of float32 eigenvalues λ (relative) and eigenvectors y (largest entry) from float64, m = {SMALL}.",
        "distribution",
        DISTRIBUTIONS,
        {f"{name}, {q}": {"forward": name, "quantity": q} for q in ("λ", "y") for name in ("eigh", "PI", "SI")},
        cotangent="",
    )
    for n, name in ((1, "PI"), (4, "eigh")):
        medians(
            f"gradients-{n}",
            f"Relative error of the gradient, n = {n}, by precision and cotangent, eigenpairs from {name}.",
            "quantity",
            dict.fromkeys(k.quantity for k in found.errors if k.n == n and k.cotangent),
            {f"{dtype}, {kind}": {"dtype": dtype, "cotangent": kind} for dtype in DTYPES for kind in COTANGENTS},
            n=n,
            forward=name,
        )
    caption = "Relative error of the gradient in float32 for every kind of matrix, random cotangents, n = 1."
    medians("distributions", caption, "quantity", gradients, {d: {"distribution": d} for d in DISTRIBUTIONS})

    fig, panels = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey=True, layout="constrained")
    for ax, (dtype, quantity) in zip(panels.flat, product(DTYPES, ("eigen", "fixed point")), strict=True):
        one = {"dtype": dtype, "quantity": quantity, "cotangent": ""}
        forward = {"AT forward": "eigh", "PI forward": "PI", "SI forward": "SI"}
        curves = {name: by_size(forward=short, **one) for name, short in forward.items()}
        draw(ax, curves, f"{quantity} residual, {dtype}")
    fig.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    picture("residuals", fig,
        "Residuals of the eigenpairs, ‖Xy − λy‖/λ and ‖y − Xy/‖Xy‖‖.",
        "Two residuals by size for eigh, power and simultaneous iteration, logarithmic",
        (*Key._fields, "median", "worst"),
        numbers("eigen", "fixed point"))  # fmt: skip
    plt.show()

    for kind, unit in (("time", "ms"), ("memory", "MiB")):
        figures, factor = UNITS[unit]
        fig, ax = plt.subplots(figsize=(7.2, 5.4), layout="constrained")
        curves = {name: [factor * figures.get((name, (BATCH, m, 1)), np.nan) for m in WIDTHS] for name in LOOK}
        draw(ax, curves, f"{kind} in {unit}, n = 1")
        fig.legend(loc="outside lower center", ncols=3)
        picture(f"{kind}-by-size", fig,
            f"{kind.capitalize()} of every pass. Every backward pass but Unroll is the same for PI and SI.",
            f"{kind.capitalize()} of every pass by size, logarithmic",
            ("b", "m", "n", "pass", kind, "state"),
            [(*s, name, figures.get((name, s), ""), state(name, s)) for s in sizes for name in names(s[-1])],
        )  # fmt: skip
        plt.show()
        for n in PAIRS:
            some = [size for size in sizes if size[-1] == n]
            cells = [(label(name), *(cell(name, size, figures, factor) for size in some)) for name in names(n)]
            caption = f"{kind.capitalize()} in {unit}, n = {n}, by (b, m)."
            table(f"{kind}-{n}", caption, ("pass", *(str(size[:2]) for size in some)), cells, ".3g")
