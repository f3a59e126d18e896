"""
Eigen-digits and the gradient of a subspace loss
================================================

The images of one handwritten digit lie near a subspace of few dimensions: the span of the leading eigenvectors of
their covariance, the *eigen-digits*. A loss of that subspace has a gradient with respect to every image it was
computed from. Here that gradient is itself an image.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref
from ddnref.examples import check

images, labels = load_digits(return_X_y=True)
images = images / 16  # 1797 images of 8×8 pixels, between 0 and 1

# %%
# Ten covariance matrices, one decomposition
# ------------------------------------------
# Batch axes lead: ten 64×64 covariance matrices go through `ddnref.eigh_topk` at once.

K = 4


def centred(digit):
    rows = images[labels == digit]
    return rows - rows.mean(axis=0)


covariance = np.stack([centred(d).T @ centred(d) / np.sum(labels == d) for d in range(10)])
(w, v), saved = ddnref.eigh_topk_fwd(covariance, K)
print(covariance.shape, w.shape, v.shape)

fig, axes = plt.subplots(K, 10, figsize=(9, 3.9), layout="constrained")
for digit in range(10):
    axes[0, digit].set_title(f"{digit}\n{w[digit].sum() / np.trace(covariance[digit]):.0%}")
    for ax, image in zip(axes[:, digit], v[digit].T, strict=True):
        size = np.abs(image).max()
        ax.imshow(image.reshape(8, 8), cmap="RdBu_r", vmin=-size, vmax=size)
        ax.set_axis_off()
fig.suptitle(f"The {K} leading eigen-digits of each digit, and the share of the variance they hold")
plt.show()

# %%
# A loss of the subspace
# ----------------------
# How much of one image :math:`a` is left outside the subspace of the image's class? With :math:`V_K` the chosen
# eigenvectors and :math:`P = V_K V_K^T` the projector on their span,
#
# .. math:: L = \tfrac12 \| a - P a \|^2 = \tfrac12 \left( a^T a - a^T P a \right), \qquad
#           {\bar V}_K = -\, a\, (a^T V_K).
#
# The loss sees the eigenvectors only through :math:`P`, so it does not matter which sign each has, nor whether two of
# the eigenvalues are equal. The flat pair: cotangents first, then what the forward returned.

DIGIT = 3
members = np.flatnonzero(labels == DIGIT)
rows = centred(DIGIT)
probe = rows[np.argmax(np.sum((rows - rows @ v[DIGIT] @ v[DIGIT].T) ** 2, axis=1))]  # the image that fits worst

vk = v[DIGIT]
v_bar = -np.outer(probe, probe @ vk)
x_bar = ddnref.eigh_topk_vjp(None, v_bar, w[DIGIT], vk, saved[0][DIGIT], saved[1][DIGIT])

residual = probe - vk @ (vk.T @ probe)
print(f"loss {0.5 * residual @ residual:.4f}, gradient {x_bar.shape}, symmetric: {np.array_equal(x_bar, x_bar.T)}")

# %%
# Through to the images
# ---------------------
# The covariance is :math:`C = \frac1n \sum_i r_i r_i^T`, so the gradient with respect to row :math:`r_i` is
# :math:`\frac2n \bar C r_i`. (The probe is held fixed.) A step of gradient descent changes each image a little, so
# that the subspace bends towards the probe. The images that matter most are those with the largest gradient.

gradient = 2 * rows @ x_bar / len(rows)
order = np.argsort(-np.linalg.norm(gradient, axis=1))[:7]

fig, axes = plt.subplots(2, 8, figsize=(9, 3.0))
fig.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.9, wspace=0.1, hspace=0.25)
axes[0, 0].imshow((probe + images[members].mean(axis=0)).reshape(8, 8), cmap="gray_r")
axes[0, 0].set_title("probe")
size = np.abs(residual).max()
axes[1, 0].imshow(residual.reshape(8, 8), cmap="RdBu_r", vmin=-size, vmax=size)
axes[1, 0].set_title("left outside")
size = np.abs(gradient[order]).max()
for column, i in enumerate(order, start=1):
    axes[0, column].imshow(images[members[i]].reshape(8, 8), cmap="gray_r")
    axes[1, column].imshow(-gradient[i].reshape(8, 8), cmap="RdBu_r", vmin=-size, vmax=size)
axes[0, 1].set_title("the images with the largest gradients", loc="left")
axes[1, 1].set_title("−gradient: red asks for darker, blue for lighter", loc="left")
for ax in axes.flat:
    ax.set_axis_off()
plt.show()

# %%
# Is it right?
# ------------
# `ddnref.testing.check_vjp` compares with finite differences, in random directions and along the gradient itself.
# The smallest gap that matters to this loss is the one between the last eigenvalue inside and the first outside.

gap = saved[0][DIGIT][-K] - saved[0][DIGIT][-K - 1]
loss = lambda _, v: 0.5 * (probe @ probe - np.sum((probe @ v) ** 2)), lambda _, v: (None, -np.outer(probe, probe @ v))
report = ddnref.testing.check_vjp(
    lambda x: ddnref.eigh_topk_fwd(x, K), ddnref.eigh_topk_vjp, covariance[DIGIT],
    saves=True, loss=loss, tangent="symmetric", symmetrises=True, gap=gap,
)  # fmt: skip
print(report)
check("gradient of the loss: error against finite differences", report.error, 1e-7)
