r"""
Alignment by the closest rotation
=================================

Two descriptions of the same things often differ by a rotation that means nothing: coordinates from two cameras, or
embeddings by two networks. The *orthogonal Procrustes problem* finds it,

.. math:: \min_{W^T W = I} \| A W - B \|_F^2, \qquad W = \text{the polar factor of } A^T B.

This story aligns two descriptions of handwritten digits, improves one of them by a gradient through the alignment, and
shows where that gradient comes from: of `ddnref.polar`, not of singular vectors.
"""

# sphinx_gallery_thumbnail_number = 2

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, check, image, picture, settings, table
from ddnref.examples._peers import figure, peers

rng = np.random.default_rng(settings.seed)

# %%
# Two views of a digit
# --------------------
# One view sees the even rows of pixels, the other one the odd rows. Each describes a digit by its eight principal
# components. Signs and order of the components are arbitrary, and nearly equal variances mix them.

DIMENSIONS, FIT = 8, 900
images, labels = load_digits(return_X_y=True)
order = rng.permutation(len(images))
images, labels = images[order].reshape(-1, 8, 8) / 16, labels[order]


def components(rows):
    """The pixels of these rows, centred, and the basis of their principal components."""
    pixels = images[:, rows].reshape(len(images), -1)
    pixels = pixels - pixels[:FIT].mean(axis=0)
    _, v = ddnref.eigh_topk(np.cov(pixels[:FIT].T), k=DIMENSIONS)
    return pixels, v


(even, v_even), (odd, v_odd) = components(slice(0, 8, 2)), components(slice(1, 8, 2))
a, b = even @ v_even, odd @ v_odd

# %%
# A classifier that knows the odd rows compares with the mean of each class. Can it read descriptions by the even rows?
# Only after the alignment, which 900 pairs determine. No label is used for it.

means = np.stack([b[:FIT][labels[:FIT] == digit].mean(axis=0) for digit in range(10)])


def accuracy(described):
    distances = np.linalg.norm(described[FIT:, None] - means, axis=-1)
    return float(np.mean(np.argmin(distances, axis=-1) == labels[FIT:]))


def distance(described):
    return float(np.linalg.norm(described[FIT:] - b[FIT:]) / np.linalg.norm(b[FIT:]))


w, _ = ddnref.polar(a[:FIT].T @ b[:FIT])
described = {"before": a, "after the alignment": a @ w, "odd rows themselves": b}
table("accuracy", "Digits that were not used for the alignment.", ("description by the even rows", "right", "distance"),
      [(name, f"{accuracy(d):.0%}", distance(d)) for name, d in described.items()], format=".2f")  # fmt: skip

# %%
# The gradient through the alignment
# ----------------------------------
# Which pixels help? Give each pixel of the even rows a weight, describe by the weighted pixels, align on one half of
# the digits, and measure the distance on the other half. The weights change the alignment too, so that the gradient
# goes through the polar factor. By hand, from the last function to the first:


def loss_and_gradient(weights):
    """The mean squared distance of the second half, and its gradient with respect to the weights."""
    a = (even * weights) @ v_even
    (w, h), saved = ddnref.polar_fwd(a[:FIT].T @ b[:FIT])
    residual = a[FIT:] @ w - b[FIT:]
    bar = 2 * residual / len(residual)
    product_bar = ddnref.polar_vjp(a[FIT:].T @ bar, None, w, h, *saved)
    a_bar = np.concat([b[:FIT] @ product_bar.T, bar @ w.T])
    return np.sum(residual**2) / len(residual), np.sum(even * (a_bar @ v_even.T), axis=0)


weights, losses = np.ones(32), []
_, slope = loss_and_gradient(weights)
f_dot = ddnref.testing.numerical_jvp(lambda z: np.asarray(loss_and_gradient(z)[0]), weights, slope, gap=1.0)
check("gradient of the weights: error against finite differences", abs(f_dot / np.sum(slope**2) - 1), 1e-9)
for _ in range(200):
    loss, slope = loss_and_gradient(weights)
    losses.append(loss)
    weights -= 0.5 * slope
weighted = (even * weights) @ v_even
aligned = weighted @ ddnref.polar(weighted[:FIT].T @ b[:FIT])[0]
print(f"Distance of aligned descriptions: {distance(a @ w):.2f}, {distance(aligned):.2f} with learned weights")
print(f"{accuracy(aligned):.0%} right with learned weights: closer as a whole, which is all that the loss asks for")

fig, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained", width_ratios=[1, 1, 1, 0.8])
colours = plt.get_cmap("tab10")(labels[FIT:])
limits = [1.1 * np.abs(b[FIT:, i]).max() for i in range(2)]
for ax, (title, d) in zip(axes, {"even rows": a, "aligned": a @ w, "odd rows": b}.items(), strict=False):
    ax.scatter(*d[FIT:, :2].T, s=4, c=colours)
    ax.set(title=title, xticks=[], yticks=[], xlim=(-limits[0], limits[0]), ylim=(-limits[1], limits[1]))
    ax.grid(visible=False)
kept = np.zeros((8, 8))
kept[::2] = weights.reshape(4, 8) - 1
image(axes[3], kept, "learned weights", signed=True)
pixels = [f"weight of pixel {i},{j}" for i in range(0, 8, 2) for j in range(8)]
picture("digits", fig,
        "Two of the eight components of 897 images, one colour for each digit: as the even rows describe them, "
        "aligned, and as the odd rows do. On the right, the change of the weights: red pixels gained.",
        "Three scatter plots of digits and the learned weights of 8 by 8 pixels", ["steps", *pixels],
        [(200, *weights)])  # fmt: skip

# %%
# The average of rotations
# ------------------------
# A camera measures its orientation several times. The average of the measured rotations is the rotation that is closest
# to their sum. For small errors of measurement the sum is nearly a multiple of a rotation, and then *all its singular
# values are nearly equal*: in the best case the derivative of singular vectors is at its worst. That of the polar
# factor divides by sums, and does not notice.

TIMES, errors = 20, 10.0 ** -np.arange(0.0, 9.0)


def rotations(size):
    """Rotations by random angles of this size, around random axes, times one common rotation."""
    x, y, z = size * rng.standard_normal((3, TIMES))
    zero = np.zeros(TIMES)
    skew = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(TIMES, 3, 3)
    common, _ = ddnref.polar(rng.standard_normal((3, 3)), rotation=True)
    return ddnref.polar(np.eye(3) + skew, rotation=True)[0] @ common


def by_construction(total, bar):
    """The gradient ``W K``, in vectors k and c of the skew matrices: ``(tr(H) I − H) k = c``."""
    w, h = ddnref.polar(total, rotation=True)
    c = w.T @ bar
    c = np.asarray([c[2, 1] - c[1, 2], c[0, 2] - c[2, 0], c[1, 0] - c[0, 1]])
    x, y, z = np.linalg.solve(np.trace(h) * np.eye(3) - h, c)
    return w @ np.asarray([[0, -z, y], [z, 0, -x], [-y, x, 0]])


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def by_ddnref(total, bar):
    (w, h), saved = ddnref.polar_fwd(total, rotation=True)
    return ddnref.polar_vjp(bar, None, w, h, *saved, rotation=True)


def by_pytorch(total, bar):
    import torch

    leaf = torch.tensor(total, requires_grad=True)
    u, _, vh = torch.linalg.svd(leaf)
    (torch.tensor(bar) * (u @ vh)).sum().backward()
    return leaf.grad.numpy()


def by_jax(total, bar):
    import jax

    jax.config.update("jax_enable_x64", True)

    def loss(x):
        u, _, vh = jax.numpy.linalg.svd(x)
        return (bar * (u @ vh)).sum()

    return np.asarray(jax.grad(loss)(jax.numpy.asarray(total)))


problems = [(rotations(size).sum(axis=0), rng.standard_normal((3, 3))) for size in errors]
ways = {"ddnref": by_ddnref, "PyTorch": by_pytorch, "JAX": by_jax}


def measure(name):
    return [relative(ways[name](*problem), by_construction(*problem)) for problem in problems]


found = {"ddnref": measure("ddnref")}
found |= {label: figure("procrustes: average of rotations", name, measure) for name, label in peers().items()}

fig, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for (name, values), colour in zip(found.items(), (BLUE, ORANGE, GREEN), strict=False):
    ax.loglog(errors, np.maximum(values, 1e-17), "o-", color=colour, label=name)
ax.axhline(1, color=GREY, lw=0.8, ls=":")
ax.set(xlabel="error of the measured rotations", ylabel="relative error of the gradient")
ax.invert_xaxis()
ax.legend(fontsize=9)
picture("rotations", fig,
        "The gradient of a loss of the average of 20 rotations. As the measurements get better, the singular values of "
        "their sum come together.",
        "Relative error of the gradient over the error of measurement", ["error of measurement", *found],
        [(size, *values) for size, *values in zip(errors, *found.values(), strict=True)])  # fmt: skip
plt.show()
check("gradient of the average of rotations: largest relative error", max(found["ddnref"]), 1e-13)

# %%
# Here the determinant of the sum is positive. Where it is not, ``rotation=True`` finds the closest rotation all the
# same, and its gradient. :doc:`The page on polar factors </polar>` has the derivation.
