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

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref
from ddnref.reference import network_hessian, tall_skinny_derivatives, tall_skinny_solve

BLUE, ORANGE, GREEN, GREY = "#0067a5", "#c4501b", "#2b8a57", "#6b6b6b"

# %%
# Training
# --------
# Thirty layers of width 8 (tanh, weights of gain 1.2), one image of each digit, cross-entropy; Adam in its own few
# lines.

images, labels = load_digits(return_X_y=True)
x, t = images[:10] / 16, labels[:10]
x = x - x.mean(axis=0)
chain = ddnref.networks.Chain.mlp(64, 8, 10, 30, gain=1.2)
total = sum(p.size for p in chain.params)

m = v = [0 * p for p in chain.params]
kept = {}
for k in range(1001):
    if k in (0, 100, 1000):
        kept[k] = chain
    g = chain.gradient(x, t)
    m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
    v = [0.999 * a + 0.001 * b**2 for a, b in zip(v, g, strict=True)]
    first, second = 1 - 0.9 ** (k + 1), 1 - 0.999 ** (k + 1)
    steps = (1e-3 * a / first / (np.sqrt(b / second) + 1e-8) for a, b in zip(m, v, strict=True))
    chain = chain.with_params([p - step for p, step in zip(chain.params, steps, strict=True)])
for k, chain in kept.items():
    print(f"after {k:4d} steps: loss {chain.loss(x, t):.3f}")

# %%
# The spectrum
# ------------
# Sixteen edges, two for each power of ten, on both sides of zero. The bars are exact counts and sum to the number of
# parameters; ``info.uncertain`` says how many eigenvalues were too close to an edge to tell their side. Nothing of the
# size of the Hessian is formed.

sizes = 10 ** np.arange(-1.5, 2.1, 0.5)
edges = [-np.inf, *-sizes[::-1], *sizes, np.inf]
spectra = {}
begun = time.process_time()
for k, chain in kept.items():
    spectra[k], info = ddnref.curvature.hessian_eigval_count(chain, x, t, edges, throw=False)
    negative, positive = sum(spectra[k][:8]), sum(spectra[k][9:])
    print(
        f"after {k:4d} steps: {negative} below {-sizes[0]:.3f}, {positive} above {sizes[0]:.3f}, "
        f"{sum(spectra[k])} of {total} counted, {sum(info.uncertain)} uncertain"
    )
print(f"{time.process_time() - begun:.1f} s for {len(kept)} spectra")


def draw_counts(ax, counts, title):
    ax.bar(range(len(counts)), counts, width=0.9, color=[ORANGE] * 8 + [GREY] + [BLUE] * 8)
    ax.set(yscale="log", ylim=(0.5, 4 * total), title=title, ylabel="eigenvalues")
    for i, count in enumerate(counts):
        ax.text(i, max(count, 0.5), f"{count}", ha="center", va="bottom", fontsize=7)
    ax.set_xticks(np.arange(len(counts) - 1) + 0.5, [f"{e:.2g}" for e in edges[1:-1]], rotation=90, fontsize=7)


fig, axes = plt.subplots(3, 1, figsize=(6.4, 8), sharex=True, layout="constrained")
for ax, (k, counts) in zip(axes, spectra.items(), strict=True):
    draw_counts(ax, counts, f"after {k} steps, loss {kept[k].loss(x, t):.3f}")
axes[-1].set_xlabel("eigenvalue: edges of the bins")
plt.show()

# %%
# At the start the spectrum is nearly symmetric: for every direction of positive curvature one of negative. Learning
# removes the negative side down to the innermost bin, and leaves a few directions of large positive curvature.
#
# Does the dense matrix say the same? On a network that is small enough:

small = ddnref.networks.Chain.mlp(6, 6, 10, 8, gain=1.2)
z, s = np.random.default_rng(0).standard_normal((4, 6)), np.arange(4)
counts, _ = ddnref.curvature.hessian_eigval_count(small, z, s, edges, throw=False)
dense = np.histogram(np.linalg.eigvalsh(network_hessian(small, z, s)), edges)[0]
print("counts: ", counts)
print("dense:  ", tuple(map(int, dense)))

# %%
# Time against depth
# ------------------
# Factor, solve once and refine, from the weights on: width 16, one sample, weights of gain 1, one thread. Beside it the
# construction in ``ddnref.reference.tall_skinny_solve``, which factors blocks with a row for every weight of a layer,
# and the dense matrix. Processor time, the best of three; slopes are fitted to the logarithms of the points drawn.


def problem(depth, width, samples, gain=1.0):
    rng = np.random.default_rng(1)
    chain = ddnref.networks.Chain.mlp(width, width, width, depth, bias=False, gain=gain)
    return chain, rng.standard_normal((samples, width)), np.arange(samples) % width


def ours(chain, x, t):
    ddnref.curvature.hessian_factor(chain, x, t, damping=1e-3, method="tridiagonal").solve(chain.gradient(x, t))


def dense(chain, x, t):
    ddnref.curvature.hessian_factor(chain, x, t, damping=1e-3, method="dense").solve(chain.gradient(x, t))


def textbook(chain, x, t):
    g = [p.ravel() for p in chain.gradient(x, t)]
    tall_skinny_solve(tall_skinny_derivatives(chain, x, t), g, 1e-3)


def seconds(function, arguments, repeats=3):
    """The best of a few, of processor time."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        function(*arguments)
        times.append(time.process_time() - begun)
    return min(times)


def draw(ax, title, sizes, times, colour):
    slope = np.polyfit(np.log(sizes), np.log(times), 1)[0]
    ax.loglog(sizes, times, "o-", color=colour, label=f"{title}: slope {slope:.2f}")
    print(f"{title}: " + ", ".join(f"{n}: {1000 * s:.1f} ms" for n, s in zip(sizes, times, strict=True)))


fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
ways = {
    "ddnref": (ours, (25, 50, 100, 200, 400, 800), (16, 32, 64, 128, 256), BLUE),
    "textbook": (textbook, (5, 10, 20, 40), (4, 8, 16, 24), ORANGE),
    "dense": (dense, (2, 4, 8), (4, 8, 12), GREEN),
}
print("against depth")
for title, (function, depths, _, colour) in ways.items():
    draw(left, title, depths, [seconds(function, problem(n, 16, 1)) for n in depths], colour)
left.set(xlabel="layers, at width 16", ylabel="seconds", ylim=(1e-3, 20))
left.legend(fontsize=8)

# %%
# Time against width, at 20 layers for ours and the textbook's, at 5 for the dense matrix. The textbook's blocks have
# more than :math:`a^2` rows, so that its exponent tends to six; ours to three, which these widths are far from: it is
# Python that takes the time up to width 64. The slopes are those of the points drawn, not of that limit.

print("against width")
for title, (function, _, widths, colour) in ways.items():
    times = [seconds(function, problem(5 if title == "dense" else 20, a, 1)) for a in widths]
    draw(right, title, widths, times, colour)
right.set(xlabel="width, at 20 layers (dense: 5)")
right.legend(fontsize=8)
plt.show()

# %%
# Backward errors
# ---------------
# :math:`\|b - (H + \varepsilon I)x\| \,/\, (\|H\|\,\|x\| + \|b\|)` of each path: 20 layers, width 8, four
# samples, gain 1.4, which makes it hard, float64. Dotted: as the factorisation solves; solid: after refinement with
# exact products. With ``method="auto"`` what stays above is solved for again by a stable path.

epsilons = 10.0 ** np.arange(-9, 0)
paths = {"tridiagonal": BLUE, "riccati": ORANGE, "qr": GREEN, "dense": GREY}
chain, x, t = problem(20, 8, 4, gain=1.4)
b = [np.random.default_rng(2).standard_normal(p.shape) for p in chain.params]
fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for method, colour in paths.items():
    errors = {"auto": [], 0: []}
    for epsilon in epsilons:
        factor = ddnref.curvature.hessian_factor(chain, x, t, damping=float(epsilon), method=method)
        for refine, found in errors.items():
            found.append(float(factor.solve(b, refine=refine, throw=False)[1].backward_error))
    ax.loglog(epsilons, errors[0], ":", color=colour)
    ax.loglog(epsilons, errors["auto"], "o-", ms=4, color=colour, label=method)
    print(f"{method}: largest {max(errors[0]):.0e}, refined {max(errors['auto']):.0e}")
ax.axhline(1e-15, color="0.6", lw=0.8, ls="--")
ax.set(xlabel=r"damping $\varepsilon$", ylabel="backward error")
ax.legend(fontsize=8)
plt.show()
