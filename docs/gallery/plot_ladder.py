"""
The ladder: four ways to compute one gradient
=============================================

The tutorial on deep declarative networks derives the reverse pass through an eigendecomposition in three steps, v1 to
v3. All return the same gradient, each in less time than the one before. They are in `ddnref.reference`. The last rung
is `ddnref.eigh_vjp`, which adds a relative tolerance and the check for a gauge. This page times them at the build of
these pages, on one thread.
"""

import importlib.util
import os
import time
import tracemalloc

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

import ddnref
from ddnref import reference

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
# Timing
# ------
# The median of repeated calls, each method after a warm-up, all on one thread in one process. Numbers depend on the
# machine; the ratio to the forward pass, which every method shares, is what to compare.


def median_time(call, seconds=0.4):
    call()
    call()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def torch_case():
    import torch

    torch.set_num_threads(1)
    leaf, bar = torch.tensor(x, requires_grad=True), torch.tensor(v_bar)
    vectors = torch.linalg.eigh(leaf)[1]

    def forward():
        with torch.no_grad():
            torch.linalg.eigh(leaf)

    return forward, lambda: torch.autograd.grad(vectors, leaf, bar, retain_graph=True)


def jax_case():
    import jax
    import jax.numpy as jnp

    leaf, bar = jnp.asarray(x), jnp.asarray(v_bar)
    forward = jax.jit(lambda x: jnp.linalg.eigh(x)[1])
    pull_back = jax.vjp(forward, leaf)[1]  # holds what the forward saved; compiled on its own
    backward = jax.jit(lambda pull_back, bar: pull_back(bar)[0])
    return lambda: forward(leaf).block_until_ready(), lambda: backward(pull_back, bar).block_until_ready()


seconds = {}
missing = []
with threadpool_limits(1):
    seconds["NumPy forward"] = median_time(lambda: ddnref.eigh(x))
    for name, backward in rungs.items():
        seconds[name] = median_time(backward)
    for name, module, case in (("PyTorch", "torch", torch_case), ("JAX", "jax", jax_case)):
        if importlib.util.find_spec(module) is None:
            missing.append(name)
            continue
        forward, backward = case()
        seconds[f"{name} forward"] = median_time(forward)
        seconds[name] = median_time(backward)

# %%
# Peak memory of the backward pass, for the rungs (``tracemalloc`` sees NumPy's arrays, not those of PyTorch and JAX).

peak = {}
for name, backward in rungs.items():
    tracemalloc.start()
    backward()
    peak[name] = tracemalloc.get_traced_memory()[1] / x.nbytes
    tracemalloc.stop()

# %%
# The profile
# -----------

unit = seconds["NumPy forward"]
bars = [*rungs, "PyTorch", "JAX"]
colours = {"PyTorch": "#c4501b", "JAX": "#6b6b6b"}

fig, (ax, ax_2) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained", width_ratios=[1.7, 1])
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
ax_2.bar(range(4), list(peak.values()), 0.6, color="#0067a5")
for place, value in enumerate(peak.values()):
    ax_2.text(place, value, f"{value:.2g}", ha="center", va="bottom", fontsize=9)
ax_2.set_xticks(range(4), list(peak))
ax_2.set_title("backward: peak memory / input", loc="left")
ax_2.set_axisbelow(True)
fig.supxlabel(
    f"wall-clock, one thread, measured when these pages were built; NumPy forward pass: {unit * 1e6:.0f} µs",
    fontsize=9,
)
plt.show()

for name, value in seconds.items():
    print(f"{name:<16} {value * 1e6:10.1f} µs   {value / unit:8.2f} of the NumPy forward pass")
