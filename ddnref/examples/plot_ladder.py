"""
The ladder: four ways to compute one gradient
=============================================

The tutorial on deep declarative networks derives the reverse pass through an eigendecomposition in three steps, v1 to
v3, and profiles them. All return the same gradient, each in less time than the one before. They are in
`ddnref.reference`. The last rung is `ddnref.eigh_vjp`, which adds a relative tolerance and a check that the gradient
exists. This page repeats the tutorial's profile, with PyTorch and JAX beside it.
"""

from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from sklearn.datasets import load_digits

import ddnref
from ddnref import reference
from ddnref.examples import BLUE, GREY, ORANGE, _measure, card, compare, picture, settings, table, track
from ddnref.examples._passes import LADDER
from ddnref.examples._peers import peers, with_peers

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
#
# They agree on five covariance matrices of 32 pixels of the handwritten digits, in float32, with a random cotangent of
# all eigenvectors. The eigenvalues are distinct, which the rungs v1 to v3 need.

images, labels = load_digits(return_X_y=True)
pixels = np.argsort(images.var(axis=0))[-32:]
x = np.stack([np.cov(images[labels == d][:, pixels].T / 16) for d in range(5)]).astype(np.float32)
v_bar = np.random.default_rng(settings.seed).standard_normal(x.shape).astype(np.float32)
w_64, v_64 = ddnref.eigh(x.astype(np.float64))
w, v = w_64.astype(np.float32), v_64.astype(np.float32)  # all rungs start from the same pairs

rungs = {
    "v1": reference.eigh_vjp_v1(v_bar, x, w, v),
    "v2": reference.eigh_vjp_v2(v_bar, w, v),
    "v3": reference.eigh_vjp_v3(v_bar, w, v),
    "final": ddnref.eigh_vjp(None, v_bar, w, v),
}
exact = ddnref.eigh_vjp(None, v_bar.astype(np.float64), w_64, v_64)
for name, x_bar in rungs.items():
    compare(f"{name} in float32 against float64", x_bar, exact, 1e-4)

# %%
# Time
# ----
# Now the cost, on random matrices. Each library is measured in its own process, because their thread pools disturb
# each other: the median of repeated calls, on one thread, JAX compiled. A pass is skipped where one call is expected to
# take too long, judging by its largest measured size and a growth of m⁴. Where PyTorch or JAX is not installed, its
# times are read from a record, divided by the time of NumPy's forward pass on the machine that made it.

SIZES = ((5, 32), (5, 64), (5, 128), (5, 256), (5, 512)) if settings.full else ((5, 32), (5, 64), (5, 128), (5, 256))
PATIENCE = 20.0 if settings.full else 8.0  # seconds that one call may take
UNIT = "NumPy forward"
PASSES = {  # the library, the colours of edge and face; forward passes are outlines
    UNIT: ("NumPy", BLUE, "white"),
    "PyTorch forward": ("PyTorch", ORANGE, "white"),
    "JAX forward": ("JAX", GREY, "white"),
    "v1": ("NumPy", BLUE, "#d3e5f0"),
    "v2": ("NumPy", BLUE, "#9cc5de"),
    "v3": ("NumPy", BLUE, "#569aca"),
    "final": ("NumPy", BLUE, BLUE),
    "PyTorch": ("PyTorch", ORANGE, ORANGE),
    "JAX": ("JAX", GREY, GREY),
}
BACKWARD = [name for name in PASSES if "forward" not in name]
LABELS = {"NumPy": "NumPy"} | peers()
BY_PEERS = {name: library for name, (library, *_) in PASSES.items() if library != "NumPy"}

recorded = [library for library, label in LABELS.items() if label != library]
sources = [source for library, source in LADDER.items() if library not in recorded]
timed = [_measure.seconds(source, SIZES, PATIENCE, always=(UNIT,)) for source in track(sources, "Timing the ladder")]
seconds = {key: value for found in timed for key, value in found.items()}
relative = {(name, size): value / seconds[UNIT, size] for (name, size), value in seconds.items()}
relative = with_peers("ladder: time", BY_PEERS, SIZES, relative)


def state(name, size):
    """Say why there is no figure for a pass, or that there is one."""
    if PASSES[name][0] in recorded:
        return "recorded" if (name, size) in relative else "not recorded"
    if (name, size) in seconds:
        return "measured"
    return f"skipped: {_measure.expected(name, size, seconds):.0f} s expected"


for name in PASSES:
    for size in SIZES:
        if state(name, size).startswith("skipped"):
            print(f"{name} at {size} {state(name, size)}, {PATIENCE:g} s allowed")


def label(name):
    """The name of a pass, with version and date where it was recorded."""
    library = PASSES[name][0]
    return name.replace(library, LABELS[library])


def draw(names, sizes, ratios, ylabel, log):
    """Draw bars in groups by size, with a note in place of a skipped bar, and return the figure."""
    fig, ax = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    width = 0.86 / len(names)
    floor = 10.0 ** np.floor(np.log10(min(ratios.values()))) if log else 0.0
    for k, name in enumerate(names):
        _, edge, face = PASSES[name]
        for i, size in enumerate(sizes):
            place = i + (k - (len(names) - 1) / 2) * width
            if (name, size) in ratios:
                ax.bar(place, ratios[name, size] - floor, 0.82 * width, bottom=floor, edgecolor=edge, facecolor=face)
            else:
                ax.annotate(f"{name} {state(name, size).partition(':')[0]}", (place, floor), (0, 3), rotation=90,
                            textcoords="offset points", ha="center", va="bottom", fontsize=7.5, color=GREY)  # fmt: skip
    if log:
        ax.set_yscale("log")
        ax.axhline(1, color=BLUE, linewidth=0.8, linestyle=":")
        ax.minorticks_off()
    ax.grid(visible=False, axis="x")
    ax.set_xticks(range(len(sizes)), map(str, sizes))
    ax.set(xlabel="(b, m): b matrices, m×m, float32", ylabel=ylabel)
    # The legend is made by hand, so that a pass without bars keeps its colour.
    handles = [Patch(label=label(name), edgecolor=PASSES[name][1], facecolor=PASSES[name][2]) for name in names]
    fig.legend(handles=handles, loc="outside lower center", ncols=2 if recorded else 3, fontsize=9)
    return fig


times = draw(PASSES, SIZES, relative, "time / NumPy forward pass", log=True)
picture("time", times,
    "Time of forward passes (outlines) and backward passes (filled), divided by the time of NumPy's forward pass at "
    "the same size, ``ddnref.eigh``, on the machine that made this page. PyTorch and JAX may call another LAPACK than "
    "NumPy, so their own forward passes are shown too.",
    "Time of forward and backward passes by size, logarithmic",
    ("b", "m", "pass", "seconds", f"{UNIT} = 1", "state"),
    [(*s, n, seconds.get((n, s), ""), relative.get((n, s), ""), state(n, s)) for s in SIZES for n in PASSES],
)  # fmt: skip

# %%
# The numbers of the picture, and the time that 1 stands for:


def rows(names, sizes, ratios):
    """Return a row for every pass with a column for every size; where there is no figure, the reason."""
    return [(label(n), *(ratios.get((n, s), state(n, s).partition(":")[0]) for s in sizes)) for n in names]


table(
    "times",
    "Time of each pass, divided by that of NumPy's forward pass.",
    ("pass", *map(str, SIZES)),
    [(f"{UNIT}, in ms", *(1e3 * seconds[UNIT, size] for size in SIZES)), *rows(PASSES, SIZES, relative)],
    ".3g",
)
(_, ours), *others = rows(("final", "PyTorch", "JAX"), SIZES[-1:], relative)
b, m = SIZES[-1]
said = [f"{ratio if isinstance(ratio, str) else format(ratio, '.2g')} in {name}" for name, ratio in others]
card(
    "An eigendecomposition takes its time. How much does the gradient add?",
    times,
    "x_bar = ddnref.eigh_vjp(None, v_bar, w, v)",
    f"{ours:.2g} of the time of eigh itself, for {b} matrices of {m} rows; {' and '.join(said)}. The first two ways of "
    "the textbook take many times as long.",
)

# %%
# Memory
# ------
# Peak memory of a backward pass, with the gradient that it returns, above the memory in use before the call. It is
# measured as the growth of the address space of a fresh process, in the same way for all libraries (``tracemalloc``
# would see NumPy's arrays only), with a malloc that keeps nothing from earlier calls. Buffers that a library keeps for
# good, such as those of its BLAS, do not count. Inputs of less than 64 KiB are left out, because memory is counted in
# pages of 4 KiB.

INPUTS = {size: 4 * size[0] * size[1] ** 2 for size in SIZES}  # bytes of the matrices, in float32
large = [size for size in SIZES if INPUTS[size] >= 64 * 1024]
weighed = [{(n, s): t for (n, s), t in found.items() if n in BACKWARD and s in large} for found in timed]
with ThreadPoolExecutor() as pool:  # unlike times, memory does not suffer from company
    peaks = {key: value for found in pool.map(_measure.peaks, sources, weighed) for key, value in found.items()}
peaks = with_peers("ladder: peak memory", {n: BY_PEERS[n] for n in ("PyTorch", "JAX")}, large, peaks)
in_inputs = {(name, size): value / INPUTS[size] for (name, size), value in peaks.items()}

if peaks:
    fig = draw(BACKWARD, large, in_inputs, "peak memory / input", log=False)
    picture("memory", fig,
        "Peak memory of backward passes, divided by the memory of the matrices that were decomposed.",
        "Peak memory of backward passes by size, in units of the input",
        ("b", "m", "pass", "bytes", "input = 1", "state"),
        [(*s, n, peaks.get((n, s), ""), in_inputs.get((n, s), ""), state(n, s)) for s in large for n in BACKWARD],
    )  # fmt: skip
    table("peaks", "The numbers of the picture.", ("pass", *map(str, large)), rows(BACKWARD, large, in_inputs), ".3g")
else:
    print("Peak memory is read from /proc, which this system does not have.")
plt.show()
