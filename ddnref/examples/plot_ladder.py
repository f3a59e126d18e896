"""
The ladder: four ways to compute one gradient
=============================================

The tutorial on deep declarative networks derives the reverse pass through an eigendecomposition in three steps, v1 to
v3. All return the same gradient, each in less time than the one before. They are in `ddnref.reference`. The last rung
is `ddnref.eigh_vjp`, which adds a relative tolerance and the check for a gauge. This page times them at the build of
these pages, on one thread. ``ddnref report`` draws the same chart at more sizes.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref
from ddnref import reference
from ddnref.report import cost, peers

# %%
# The problem
# -----------
# Five covariance matrices of 32 pixels of the handwritten digits, in float32, and a random cotangent of all
# eigenvectors. The eigenvalues are distinct; the rungs v1 to v3 need that.

images, labels = load_digits(return_X_y=True)
pixels = np.argsort(images.var(axis=0))[-32:]
x = np.stack([np.cov(images[labels == d][:, pixels].T / 16) for d in range(5)]).astype(np.float32)
v_bar = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
w, v = ddnref.eigh(x)

# %%
# The rungs
# ---------
# ========  ==========================================================================================  ==========
# rung      one line                                                                                    cost
# ========  ==========================================================================================  ==========
# v1        a pseudo-inverse :math:`(\lambda_k I - X)^+` by SVD for every eigenvector                    O(m⁴)
# v2        the same pseudo-inverse from the decomposition, :math:`V (\lambda_k I - \Lambda)^+ V^T`       O(m⁴)
# v3        all eigenvectors at once: three products                                                     O(m³)
# final     three products, divided in place, relative tolerance, gauge checked                         O(m³)
# ========  ==========================================================================================  ==========

rungs = {
    "v1": lambda: reference.eigh_vjp_v1(v_bar, x, w, v),
    "v2": lambda: reference.eigh_vjp_v2(v_bar, w, v),
    "v3": lambda: reference.eigh_vjp_v3(v_bar, w, v),
    "final": lambda: ddnref.eigh_vjp(None, v_bar, w, v),
}
w_64, v_64 = ddnref.eigh(x.astype(np.float64))
v_64 *= np.sign(np.sum(v_64 * v, axis=-2, keepdims=True))  # the same choice of signs as in float32
exact = ddnref.eigh_vjp(None, v_bar.astype(np.float64), w_64, v_64)
for name, backward in rungs.items():
    print(f"{name:<6} differs from float64 by {np.linalg.norm(backward() - exact) / np.linalg.norm(exact):.0e}")

# %%
# Time and memory
# ---------------
# Random matrices of the same size. The median of repeated calls, after a warm-up, on one thread, each library in a
# process of its own, because their thread pools disturb each other. Numbers depend on the machine; the ratio to
# NumPy's forward pass is what to compare.
#
# Peak memory is how far the address space of a fresh process grows during the call. That is the same measure for all
# libraries; ``tracemalloc`` sees NumPy's arrays only. It is counted in pages, so it is shown for larger matrices.

small, larger = (5, 32), (5, 64)
missing = [name for name, version in peers.versions().items() if version is None]
timed, peak = {}, {}
for library in ("NumPy", "PyTorch", "JAX"):
    if library not in missing:
        found = cost.seconds(library, [small, larger])
        timed |= found
        peak |= cost.peaks(library, {key: value for key, value in found.items() if key[1] == larger})

seconds = {name: value for (name, size), value in timed.items() if size == small}
inputs = {name: value / (5 * 64 * 64 * 4) for (name, _), value in peak.items()}

# %%
# The profile
# -----------

unit = seconds["NumPy forward"]
bars = [*rungs, "PyTorch", "JAX"]
colours = {"PyTorch": "#c4501b", "JAX": "#6b6b6b"}

fig, (ax, ax_2) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained", width_ratios=[1.35, 1])
for place, name in enumerate(bars):
    if name in missing:
        ax.text(place, 1.0, "not\ninstalled", ha="center", va="bottom", fontsize=9)
        continue
    before = seconds.get(f"{name} forward", unit) / unit
    ax.bar(place - 0.2, before, 0.38, color="#c9d3da")
    ax.bar(place + 0.2, seconds[name] / unit, 0.38, color=colours.get(name, "#0067a5"))
    ax.text(place + 0.2, seconds[name] / unit, f"{seconds[name] / unit:.2g}", ha="center", va="bottom", fontsize=9)
ax.set_yscale("log")
ax.set_xticks(range(len(bars)), bars)
ax.set_ylabel("time / NumPy forward pass")
ax.set_title("forward (light) and backward (dark), (5, 32) float32", loc="left")
ax.set_xlim(-0.7, len(bars) - 0.3)
ax.set_ylim(None, 3 * max(seconds.values()) / unit)
ax.set_axisbelow(True)
for place, name in enumerate(bars):
    if name in inputs:
        ax_2.bar(place, inputs[name], 0.6, color=colours.get(name, "#0067a5"))
    label = f"{inputs[name]:.2g}" if name in inputs else "not\ninstalled" if name in missing else "not\nknown"
    ax_2.text(place, inputs.get(name, 0), label, ha="center", va="bottom", fontsize=9)
ax_2.set_xticks(range(len(bars)), bars)
ax_2.set_title("backward: peak memory / input, (5, 64)", loc="left")
ax_2.set_xlim(-0.6, len(bars) - 0.4)
ax_2.set_axisbelow(True)
fig.supxlabel(
    f"wall-clock, one thread, measured when these pages were built; NumPy forward pass: {unit * 1e6:.0f} µs",
    fontsize=9,
)
plt.show()

for name, value in seconds.items():
    print(f"{name:<16} {value * 1e6:10.1f} µs   {value / unit:8.2f} of the NumPy forward pass")
