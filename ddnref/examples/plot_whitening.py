r"""
Whitening, and the geometry of covariance matrices
==================================================

Functions of a symmetric matrix, :math:`f(X) = V f(\Lambda) V^T`, do not depend on the choice of eigenvectors. Their
derivative is exact at any degeneracy. This story uses three of them on handwritten digits and on a photograph: the
inverse square root, the logarithm and the exponential.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

import ddnref
from ddnref.examples import BLUE, GREY, ORANGE, autograd_gradients, check, headline, picture, settings, table

convert, to_numpy = settings.backend.convert, settings.backend.to_numpy
rng = np.random.default_rng(settings.seed)

# %%
# Whitening handwritten digits
# ----------------------------
# Neighbouring pixels say nearly the same thing, and some vary much more than others. *Whitening* removes both: it
# multiplies every image by the inverse square root of the covariance matrix, after which all directions have variance
# one and none is correlated with another. A small ridge is added to the covariance, because some pixels never change,
# and a variance of zero has no inverse.

RIDGE = 1e-2
images, labels = load_digits(return_X_y=True)
order = rng.permutation(len(images))
images, labels = images[order] / 16, labels[order]
mean = images[:1200].mean(axis=0)
covariance = np.cov((images[:1200] - mean).T, bias=True) + RIDGE * np.eye(64)

y, saved = ddnref.invsqrtm_fwd(convert(covariance))
whitening = to_numpy(y)
after = whitening @ covariance @ whitening

fig, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for ax, matrix, title in zip(axes, (covariance, after), ("before", "after whitening"), strict=True):
    size = np.abs(matrix).max()
    shown = ax.imshow(matrix, cmap="RdBu_r", vmin=-size, vmax=size)
    ax.set_title(title)
    ax.set_axis_off()
    fig.colorbar(shown, ax=ax, orientation="horizontal", shrink=0.9, ticks=[-size, 0, size], format="%.2g")

pixels = [f"pixel {i},{j}" for i in range(8) for j in range(8)]
rows = [(when, i, *row) for when, c in (("before", covariance), ("after", after)) for i, row in enumerate(c)]
picture("covariance", fig,
        "Covariance of the 64 pixels. Red pairs are dark together; in blue pairs one is dark where the other is light. "
        "After whitening only the diagonal is left: all pixels vary equally, and independently of each other.",
        "Covariance matrix of the pixels before and after whitening", ["when", "pixel", *pixels], rows)  # fmt: skip

# %%
# What could be guessed from the neighbours is gone; edges and unusual strokes remain.

held_out = [1200 + np.argmax(labels[1200:] == digit) for digit in range(10)]
before = images[held_out]
white = (before - mean) @ whitening

size = np.quantile(np.abs(white), 0.99)
fig, axes = plt.subplots(2, 10, figsize=(9, 2.1), layout="constrained")
for column in range(10):
    axes[0, column].imshow(before[column].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    axes[1, column].imshow(white[column].reshape(8, 8), cmap="gray_r", vmin=-size, vmax=size)
for ax in axes.flat:
    ax.set_axis_off()
rows = [(when, i, *row) for when, c in (("before", before), ("after", white)) for i, row in enumerate(c)]
picture("digits", fig, "Digits that were not used for the covariance, above as they are, below whitened.",
        "Ten digits before and after whitening", ["when", "digit", *pixels], rows)  # fmt: skip

# %%
# The gradient through whitening
# ------------------------------
# A network layer that whitens its input is differentiated through :math:`C^{-1/2}`. The checker compares the VJP with
# finite differences: it nudges the matrix and measures how the result moves.
#
# The ridge gives all pixels that never change the same variance, so the matrix has repeated eigenvalues. The usual way,
# an autograd eigendecomposition, divides by their differences; `ddnref.invsqrtm_vjp` has no such division.

options = {"saves": True, "tangent": "symmetric", "symmetrises": True, "seed": settings.seed}
options["gap"] = RIDGE  # a step must stay well inside the positive definite matrices
checked = ddnref.testing.check_vjp(ddnref.invsqrtm_fwd, ddnref.invsqrtm_vjp, convert(covariance), **options)
y_bar = rng.standard_normal(covariance.shape)
y_bar = (y_bar + y_bar.T) / 2
x_bar = to_numpy(ddnref.invsqrtm_vjp(convert(y_bar), y, *saved))


def loss(w, v, y_bar):
    """Return that loss, written for autograd."""
    return (y_bar * ((v / w[..., None, :] ** 0.5) @ v.mT)).sum()


variances = np.linalg.eigvalsh(covariance)
distance = np.max(np.abs(after - np.eye(64)))
rows = [
    ("largest / smallest variance of a direction, before", f"{variances[-1] / variances[0]:.0f}"),
    ("after: largest distance of the covariance from the identity", distance),
    ("gradient, ddnref: error against finite differences", checked.error),
]
said = [f"ddnref {checked.error:.0e}"]
for name, other in autograd_gradients(loss, covariance, y_bar).items():
    difference = "not installed" if other is None else np.linalg.norm(other - x_bar) / np.linalg.norm(x_bar)
    rows.append((f"gradient, {name} eigh: relative difference from ddnref", difference))
    said.append(f"{name} {difference}" if other is None else f"{name} {difference:.0e}")
table("numbers", "Whitening in numbers.", ("", "value"), rows)
headline("Gradient through whitening: error", *said)
check("covariance after whitening: distance from the identity", distance, 1e-10)
check("gradient through whitening: error against finite differences", checked.error, 1e-7)

# %%
# The rows of the whitening matrix are filters: each takes a pixel and subtracts what its neighbours predict. Here is
# the filter of patches of a photograph, and the photograph after it.

SIDE = 9
photograph = load_sample_image("flower.jpg").mean(axis=-1) / 255
corners = rng.integers(0, np.asarray(photograph.shape) - SIDE, (20_000, 2))
patches = np.stack([photograph[i : i + SIDE, j : j + SIDE].ravel() for i, j in corners])
kernel = ddnref.invsqrtm(np.cov(patches.T) + 1e-5 * np.eye(SIDE**2))[SIDE**2 // 2].reshape(SIDE, SIDE)
windows = np.lib.stride_tricks.sliding_window_view(photograph - photograph.mean(), (SIDE, SIDE))
filtered = np.einsum("ijkl,kl->ij", windows, kernel, optimize=True)

fig, axes = plt.subplots(1, 3, figsize=(9, 2.7), layout="constrained", width_ratios=[1.5, 1, 1.5])
axes[0].imshow(photograph, cmap="gray")
axes[0].set_title("photograph")
size = np.abs(kernel).max()
axes[1].imshow(kernel, cmap="RdBu_r", vmin=-size, vmax=size)
axes[1].set_title("centre row of $C^{-1/2}$")
limit = np.quantile(np.abs(filtered), 0.99)
axes[2].imshow(filtered, cmap="gray", vmin=-limit, vmax=limit)
axes[2].set_title("whitened")
for ax in axes:
    ax.set_axis_off()
picture("photograph", fig, "A photograph whitened by one filter.", "A photograph, the filter, and what it leaves")

# %%
# A mean of covariance matrices
# -----------------------------
# The ten digits have ten covariance matrices. Their arithmetic mean swells: its determinant is larger than that of
# every member. The *log-Euclidean* mean averages in the chart of logarithms, where positive definite matrices are a
# vector space,
#
# .. math:: \bar C = \exp\left( \frac1{10} \sum_d \log C_d \right),
#
# and its determinant is the geometric mean of the determinants.

classes = np.stack([np.cov(images[labels == digit].T) + 1e-3 * np.eye(64) for digit in range(10)])
logarithms, log_saved = ddnref.logm_fwd(classes)
log_mean, exp_saved = ddnref.expm_fwd(logarithms.mean(axis=0))
means = {"arithmetic": classes.mean(axis=0), "log-Euclidean": log_mean}
volume = {name: np.linalg.slogdet(c)[1] for name, c in means.items()}
members = np.linalg.slogdet(classes)[1]

# The distance between two logarithms compares shapes of variation: digits that vary alike are close.
distances = np.linalg.norm(logarithms[:, None] - logarithms, axis=(-2, -1))

fig, axes = plt.subplots(2, 2, figsize=(8, 7), layout="constrained")
size = np.abs(means["arithmetic"]).max()
for ax, (name, c) in zip(axes[0], means.items(), strict=True):
    ax.imshow(c, cmap="RdBu_r", vmin=-size, vmax=size)
    ax.set_title(f"{name} mean")
    ax.set_axis_off()
axes[1, 0].plot(range(10), members, "o", color=GREY, label="each digit")
axes[1, 0].axhline(volume["arithmetic"], color=ORANGE, label="arithmetic mean")
axes[1, 0].axhline(volume["log-Euclidean"], color=BLUE, label="log-Euclidean mean")
axes[1, 0].set(xlabel="digit", title="log-determinant", ylim=(members.min() - 5, volume["arithmetic"] + 28))
axes[1, 0].legend(fontsize=9, loc="upper center")
shown = axes[1, 1].imshow(np.where(np.eye(10, dtype=bool), np.nan, distances), cmap="viridis")
axes[1, 1].set(yticks=range(10), title="log-Euclidean distance")
axes[1, 1].grid(visible=False)
fig.colorbar(shown, ax=axes[1, 1])
for ax in axes[1]:
    ax.set_xticks(range(10))
columns = ["digit", "log-determinant", *(f"distance from {digit}" for digit in range(10))]
rows = [(digit, members[digit], *distances[digit]) for digit in range(10)]
picture("means", fig,
        "Above, the two means of the ten covariance matrices. Below, their log-determinants beside those of the ten, "
        "and the distances :math:`\\| \\log C_i - \\log C_j \\|_F`.",
        "Two mean covariance matrices, log-determinants by digit, and distances", columns, rows)  # fmt: skip
plt.show()

# %%
# The gradient of such a mean
# ---------------------------
# How does the mean's total variance :math:`\operatorname{tr} \bar C` depend on each class? Two VJPs in sequence, last
# function first; the batch of ten is one call.

chart_bar = ddnref.expm_vjp(np.eye(64), log_mean, *exp_saved)
classes_bar = ddnref.logm_vjp(np.tile(chart_bar / 10, (10, 1, 1)), logarithms, *log_saved)


def total_variance(c):
    return np.trace(ddnref.expm(ddnref.logm(c).mean(axis=0)))


slope = ddnref.testing.numerical_jvp(total_variance, classes, classes_bar, gap=1e-3)
check("gradient of the mean: error against finite differences", abs(slope / np.sum(classes_bar**2) - 1), 1e-7)
