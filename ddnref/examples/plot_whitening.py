r"""
Whitening, and the geometry of covariance matrices
==================================================

Functions of a symmetric matrix, :math:`f(X) = V f(\Lambda) V^T`, do not depend on the choice of eigenvectors. Their
derivative is exact at any degeneracy. This story uses three of them on handwritten digits and on a photograph: the
inverse square root, the logarithm and the exponential.
"""

# sphinx_gallery_thumbnail_number = 2

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

import ddnref
from ddnref.examples import BLUE, GREY, ORANGE, card, check, image, picture, settings, table
from ddnref.examples._peers import autograd_gradient, figure, peers

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
    shown = image(ax, matrix, title, signed=True)
    fig.colorbar(shown, ax=ax, orientation="horizontal", shrink=0.9, ticks=[-size, 0, size], format="%.2g")

pixels = [f"pixel {i},{j}" for i in range(8) for j in range(8)]
picture("covariance", fig,
        "Covariance of the 64 pixels. Red pairs are dark together; in blue pairs one is dark where the other is light. "
        "After whitening only the diagonal is left: all pixels vary equally, and independently of each other.",
        "Covariance matrix of the pixels before and after whitening", ["when", "pixel", *pixels],
        {"before": covariance, "after": after})  # fmt: skip

# %%
# What could be guessed from the neighbours is gone; edges and unusual strokes remain.

held_out = [1200 + np.argmax(labels[1200:] == digit) for digit in range(10)]
before = images[held_out]
white = (before - mean) @ whitening

size = np.quantile(np.abs(white), 0.99)
digits, axes = plt.subplots(2, 10, figsize=(9, 2.1), layout="constrained")
for column in range(10):
    image(axes[0, column], before[column], cmap="gray_r")
    image(axes[1, column], white[column], cmap="gray_r", vmin=-size, vmax=size)
picture("digits", digits, "Digits that were not used for the covariance, above as they are, below whitened.",
        "Ten digits before and after whitening", ["when", "digit", *pixels],
        {"before": before, "after": white})  # fmt: skip

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


def loss(w, v, c):
    return (c * ((v / w[..., None, :] ** 0.5) @ v.mT)).sum()


def by_autograd(name):
    """The difference of the gradient through a framework's eigh from ours."""
    return np.linalg.norm(autograd_gradient(name, loss, covariance, y_bar) - x_bar) / np.linalg.norm(x_bar)


variances = np.linalg.eigvalsh(covariance)
distance = np.max(np.abs(after - np.eye(64)))
rows = [
    ("largest / smallest variance of a direction, before", f"{variances[-1] / variances[0]:.0f}"),
    ("after: largest distance of the covariance from the identity", distance),
    ("gradient, ddnref: error against finite differences", checked.error),
]
said = []
for name, label in peers().items():
    difference = figure("whitening: difference of the gradient", name, by_autograd)
    rows.append((f"gradient through the eigh of {label}: relative difference from ddnref", difference))
    said.append(f"{'NaN' if np.isnan(difference) else format(difference, '.1g')} in {label}")
table("numbers", "Whitening in numbers.", ("", "value"), rows)
card(
    "Neighbouring pixels say nearly the same thing. A layer of a network shall remove that, and pass gradients on.",
    digits,
    "y, saved = ddnref.invsqrtm_fwd(covariance)\ncovariance_bar = ddnref.invsqrtm_vjp(y_bar, y, *saved)",
    f"Afterwards all 64 pixels vary equally and independently. The gradient is wrong by {checked.error:.0e}. "
    f"Through an eigendecomposition it is wrong by {' and '.join(said)}.",
)
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
limit = np.quantile(np.abs(filtered), 0.99)
image(axes[0], photograph, "photograph")
image(axes[1], kernel, "centre row of $C^{-1/2}$", signed=True)
image(axes[2], filtered, "whitened", vmin=-limit, vmax=limit)
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
for ax, (name, c), colour in zip(axes[0], means.items(), (ORANGE, BLUE), strict=True):
    image(ax, c, f"{name} mean", signed=True, vmax=np.abs(means["arithmetic"]).max())
    axes[1, 0].axhline(volume[name], color=colour, label=f"{name} mean")
axes[1, 0].plot(range(10), members, "o", color=GREY, label="each digit")
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
slope = ddnref.testing.numerical_jvp(
    lambda c: np.trace(ddnref.expm(ddnref.logm(c).mean(axis=0))), classes, classes_bar, gap=1e-3
)  # fmt: skip
check("gradient of the mean: error against finite differences", abs(slope / np.sum(classes_bar**2) - 1), 1e-7)
