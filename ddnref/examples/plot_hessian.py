"""
The whole spectrum of a deep network's Hessian, counted
=======================================================

How many directions of negative curvature has the loss of a deep network, and where do they go while it learns?
`ddnref.curvature.hessian_eigval_count` answers without computing an eigenvalue and without sampling: the signs of the
pivots of :math:`H - \\sigma I`, eliminated layer by layer, are the signs of its eigenvalues, so that one elimination
counts those below :math:`\\sigma`. Its time is linear in the number of layers, which is then measured, as is the
backward error of every way to factor.
"""

import time
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, card, check, picture, settings, track
from ddnref.reference import tall_skinny_derivatives, tall_skinny_solve

backend = settings.backend
STRICT = backend.name == "array-api-strict"  # checks every operation, which is slow: a small network will do

# %%
# Training
# --------
# A network with more layers than its layers are wide (tanh, weights of gain 1.2), one image of each digit,
# cross-entropy; Adam in a few lines.

LAYERS = 3 if STRICT else 30 if settings.full else 20
WIDTH = 3 if STRICT else 8
KEPT = (0, 100, 1000) if settings.full else (0, 60, 600)  # steps after which the spectrum is counted

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(settings.seed).permutation(len(labels))
places = [next(i for i in order if labels[i] == digit) for digit in range(10)]
x, t = images[places] / 16, labels[places]
x = x - x.mean(axis=0)
chain = ddnref.networks.Chain.mlp(64, WIDTH, 10, LAYERS, gain=1.2, seed=settings.seed)

m = v = [0 * p for p in chain.params]
kept = {}
for k in track(range(max(KEPT) + 1), "Training a deep network"):
    if k in KEPT:
        kept[k] = chain
    g = chain.gradient(x, t)
    m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
    v = [0.999 * a + 0.001 * b**2 for a, b in zip(v, g, strict=True)]
    first, second = 1 - 0.9 ** (k + 1), 1 - 0.999 ** (k + 1)
    steps = (1e-3 * a / first / (np.sqrt(b / second) + 1e-8) for a, b in zip(m, v, strict=True))
    chain = chain.with_params([p - step for p, step in zip(chain.params, steps, strict=True)])
losses = {k: float(chain.loss(x, t)) for k, chain in kept.items()}

# %%
# The spectrum
# ------------
# Edges at powers of ten, on both sides of zero. The bars are exact counts and sum to the number of parameters;
# ``info.uncertain`` says how many eigenvalues were too close to an edge to tell their side. Nothing of the size of the
# Hessian is formed.

SIZES = (0.1, 1.0, 10.0)
EDGES = (-np.inf, *(-size for size in reversed(SIZES)), *SIZES, np.inf)


def in_backend(chain, *arrays):
    """A network and its data in the arrays of the library that was chosen."""
    params = [backend.convert(p) for p in chain.params]
    moved = ddnref.networks.Chain.from_arrays(params, activation="tanh", loss="cross_entropy")
    return moved, *map(backend.convert, arrays)


spectra, uncertain = {}, {}
for k, chain in kept.items():
    moved = in_backend(chain, x, t)
    spectra[k], info = ddnref.curvature.hessian_eigval_count(*moved, EDGES, method="riccati", throw=False)
    uncertain[k] = sum(info.uncertain)

n = len(EDGES) // 2 - 1  # the bins on each side of the one around zero
total = sum(p.size for p in kept[0].params)
bins = [f"{low:g} to {high:g}" for low, high in pairwise(EDGES[1:-1])]
bins = [f"below {EDGES[1]:g}", *bins, f"above {EDGES[-2]:g}"]
fig, axes = plt.subplots(len(kept), 1, figsize=(7.2, 7.4), sharex=True, layout="constrained", squeeze=False)
for ax, (k, counts) in zip(axes[:, 0], spectra.items(), strict=True):
    ax.bar(bins, counts, width=0.9, color=[ORANGE] * n + [GREY] * (len(counts) - 2 * n) + [BLUE] * n)
    ax.set(yscale="log", ylim=(0.5, 5 * total), title=f"after {k} steps, loss {losses[k]:.3f}", ylabel="eigenvalues")
    ax.grid(visible=False, axis="x")
    for i, count in enumerate(counts):
        ax.text(i, max(count, 0.5), f"{count}", ha="center", va="bottom", fontsize=9)
ax.tick_params(axis="x", labelrotation=30)
picture("spectrum", fig,
    f"All {total} eigenvalues of the Hessian while the network learns. Left of the middle, in orange: directions in "
    "which the loss curves down. The scale is logarithmic.",
    "Counts of eigenvalues in bins, at three times of training",
    ("steps", "loss", *bins),
    [(k, losses[k], *counts) for k, counts in spectra.items()])  # fmt: skip

# %%
# At the start the spectrum is nearly symmetric: for every direction of positive curvature one of negative. Learning
# removes the negative side down to the innermost bin, and leaves a few directions of large positive curvature.
#
# Does the dense matrix say the same? Its columns are products with unit vectors, its eigenvalues LAPACK's.


def count_densely(chain, x, t):
    """The number of eigenvalues in each bin, from the dense Hessian."""
    size = sum(p.size for p in chain.params)
    rows = np.split(np.eye(size), np.cumsum([p.size for p in chain.params])[:-1], axis=1)
    units = [row.reshape(size, *p.shape) for row, p in zip(rows, chain.params, strict=True)]
    h = np.concatenate([p.reshape(size, -1) for p in chain.hvp(x, t, units)], axis=1)
    return np.histogram(np.linalg.eigvalsh((h + h.T) / 2), EDGES)[0]


last = max(KEPT)
wrong = np.sum(np.abs(spectra[last] - count_densely(kept[last], x, t))) // 2
check("eigenvalues in another bin than the dense matrix puts them, after training", wrong, uncertain[last])
negative = {k: sum(counts[:n]) for k, counts in spectra.items()}
for k, count in negative.items():
    print(f"after {k} steps: {count} eigenvalues below {-SIZES[0]:g}, {uncertain[k]} too close to an edge to tell")
card(
    "How many directions of negative curvature has the loss of a deep network, and where do they go while it learns?",
    axes[-1, 0],
    "counts, info = ddnref.curvature.hessian_eigval_count(chain, x, t, edges)",
    f"{negative[0]} of {total} eigenvalues are below {-SIZES[0]:g} before learning, and {negative[last]} after (left "
    "of the middle). The counts are exact, and the Hessian is never formed.",
)

# %%
# Time against depth and width
# ----------------------------
# How long does it take to factor, solve once and refine? One sample, weights of gain 1, damping 1e-3, width 16. Beside
# it the construction in ``ddnref.reference.tall_skinny_solve``, which factors blocks with a row for every weight of a
# layer, and the dense matrix. The best of three; slopes are fitted to the logarithms of the points drawn. Then against
# the width, at 20 layers (5 for the dense matrix). The textbook's blocks have more than :math:`a^2` rows, so that its
# exponent tends to six; ours to three, which these widths are far from: it is Python that takes the time at small
# widths.
#
# With libraries that compile or check each operation, the times would be those of starting operations, and are left
# out.

TIMED = not (STRICT or backend.compiles)
DEPTHS = {"ddnref": (25, 50, 100, 200), "textbook": (5, 10, 20), "dense": (2, 4)}
WIDTHS = {"ddnref": (16, 32, 64, 128), "textbook": (4, 8, 16), "dense": (4, 8, 12)}
if settings.full:
    DEPTHS = {"ddnref": (25, 50, 100, 200, 400, 800), "textbook": (5, 10, 20, 40), "dense": (2, 4, 8)}
    WIDTHS = {"ddnref": (16, 32, 64, 128, 256), "textbook": (4, 8, 16, 24), "dense": (4, 8, 12)}


def problem(depth, width, samples, gain=1.0):
    """A network without biases, random inputs and classes, in NumPy."""
    rng = np.random.default_rng(settings.seed)
    chain = ddnref.networks.Chain.mlp(width, width, width, depth, bias=False, gain=gain, seed=settings.seed)
    return chain, rng.standard_normal((samples, width)), np.arange(samples) % width


def ours(chain, x, t, method="tridiagonal"):
    factor = ddnref.curvature.hessian_factor(chain, x, t, damping=1e-3, method=method)
    return float(factor.solve(chain.gradient(x, t))[1].backward_error)  # waits for the device


def textbook(chain, x, t):
    g = [p.ravel() for p in chain.gradient(x, t)]
    tall_skinny_solve(tall_skinny_derivatives(chain, x, t), g, 1e-3)


def seconds(function, depth, width):
    """The best of three; of processor time for NumPy, which other work on the machine does not disturb."""
    clock = time.process_time if function is not ours or backend.name == "numpy" else time.perf_counter
    arguments = in_backend(*problem(depth, width, 1)) if function is ours else problem(depth, width, 1)
    times = []
    for _ in range(3):
        begun = clock()
        function(*arguments)
        times.append(clock() - begun)
    return min(times)


def slope(sizes, values):
    """The exponent of a power law, by least squares of the logarithms."""
    return np.polyfit(np.log(sizes), np.log(values), 1)[0]


if TIMED:
    rows = []
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    ways = {"ddnref": (ours, BLUE), "textbook": (textbook, ORANGE), "dense": (partial(ours, method="dense"), GREEN)}
    for name, (function, colour) in track(list(ways.items()), "Timing solves with the Hessian"):
        for ax, depths, widths in (
            (left, DEPTHS[name], [16] * len(DEPTHS[name])),
            (right, [5 if name == "dense" else 20] * len(WIDTHS[name]), WIDTHS[name]),
        ):
            sizes = depths if ax is left else widths
            times = [seconds(function, *size) for size in zip(depths, widths, strict=True)]
            rows += [(name, *row) for row in zip(depths, widths, times, strict=True)]
            ax.loglog(sizes, times, "o-", color=colour, label=f"{name}: slope {slope(sizes, times):.2f}")
            ax.legend(fontsize=8)
    left.set(xlabel="layers, at width 16", ylabel="seconds")
    right.set(xlabel="width")
    picture("time", fig,
        "Seconds of one factorisation and one solve, against the number of layers and the width.",
        "Time of three ways to solve against depth and width, on logarithmic axes",
        ("method", "layers", "width", "seconds"),
        rows)  # fmt: skip
else:
    print(f"Times are not measured with {backend.name}.")

# %%
# Backward errors
# ---------------
# :math:`\|b - (H + \varepsilon I)x\| \,/\, (\|H\|\,\|x\| + \|b\|)` of each path, which for a perfect solver is about
# the rounding error of the arithmetic, 1e-16. Weights of gain 1.4 make it hard. Dotted: as the factorisation solves;
# solid: after refinement with exact Hessian-vector products.

HARD = (10, 8, 4)  # layers, width, samples
DAMPINGS = tuple(10.0 ** np.arange(-9, 0)) if settings.full else (1e-8, 1e-6, 1e-4, 1e-2)
PATHS = ("tridiagonal", "riccati", "qr", "dense")

chain, *data = problem(*HARD, gain=1.4)
rng = np.random.default_rng(settings.seed)
b = [backend.convert(rng.standard_normal(p.shape)) for p in chain.params]
hard = in_backend(chain, *data)
errors = {}
for path in track(PATHS, "Solving with the Hessian"):
    factors = [ddnref.curvature.hessian_factor(*hard, damping=float(e), method=path) for e in DAMPINGS]
    errors[path] = [
        [float(factor.solve(b, refine=refine, throw=False)[1].backward_error) for factor in factors]
        for refine in (0, "auto")
    ]

fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for (path, (plain, refined)), colour in zip(errors.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
    ax.loglog(DAMPINGS, plain, ":", color=colour)
    ax.loglog(DAMPINGS, refined, "o-", ms=4, color=colour, label=path)
ax.set(xlabel=r"damping $\varepsilon$", ylabel="backward error")
ax.legend(fontsize=8)
picture("errors", fig,
    "Backward error of each path, before (dotted) and after (solid) refinement.",
    "Backward error against damping for each factorisation",
    ("path", "damping", "unrefined", "refined"),
    [(path, float(e), *two) for path, found in errors.items() for e, *two in zip(DAMPINGS, *found, strict=True)],
)  # fmt: skip
plt.show()
worst = max(error for _, refined in errors.values() for error in refined)
check("largest backward error, refined", worst, 1e-14)
