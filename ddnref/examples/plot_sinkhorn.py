"""
Colours of one photograph for another: optimal transport
========================================================

Two photographs, two palettes of colours with their masses. Entropic optimal transport finds the cheapest way to carry
one onto the other; because the plan is the minimum of a stated problem, its gradient needs no iterate of the solver.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_sample_image

import ddnref
from ddnref.examples import BLUE, check

# %%
# Two palettes
# ------------
# Each photograph is reduced to 64 colours; the share of its pixels that each colour takes is a histogram.

COLOURS = 64


def palette(name):
    """A photograph, its colours, their shares, and which one each pixel takes."""
    image = load_sample_image(name)[::4, ::4] / 255
    pixels = image.reshape(-1, 3)
    means = MiniBatchKMeans(COLOURS, random_state=0, n_init=1, batch_size=4096).fit(pixels)
    shares = np.bincount(means.labels_, minlength=COLOURS) / len(pixels)
    return image, means.cluster_centers_.astype(np.float64), shares, means.labels_


china, x, p, china_labels = palette("china.jpg")
flower, z, q, _ = palette("flower.jpg")

# %%
# The plan
# --------
# The cost of carrying mass from one colour to another is the squared distance between them.
# :func:`ddnref.nodes.sinkhorn` returns the plan :math:`P` of the problem with entropy :math:`\varepsilon`,
#
# .. math:: P = \arg\min \; \langle C, P \rangle + \varepsilon \sum_{ij} P_{ij} (\log P_{ij} - 1)
#           \quad \text{subject to} \quad P 1 = p, \; P^T 1 = q .
#
# Every colour of the first photograph becomes the mean of the colours that its mass is carried to.

EPS = 0.02


def squared_distances(x):
    return np.sum((x[:, None] - z[None]) ** 2, axis=-1)


cost = squared_distances(x)
plan, info = ddnref.nodes.sinkhorn(cost, p, q, eps=EPS)
print(f"{info.n_iter} updates, error of the marginals {info.residual_norm:.0e}")
carried = (plan @ z) / np.sum(plan, axis=1, keepdims=True)

fig, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
recoloured = carried[china_labels].reshape(china.shape)
images = {"photograph": china, "its colours from": flower, "recoloured": recoloured}
for ax, (title, image) in zip(axes, images.items(), strict=True):
    ax.imshow(np.clip(image, 0, 1))
    ax.set_title(title)
    ax.set_axis_off()
plt.show()

# %%
# The gradient of the transport cost
# ----------------------------------
# The loss :math:`L = \langle C, P(C) \rangle` depends on the cost twice: directly, and through the plan.
# :func:`ddnref.nodes.sinkhorn_vjp` takes the cotangent of the plan, which is :math:`C`, and the plan itself, and
# nothing else. From the cost the chain rule goes on to the colours.


def loss(x):
    cost = squared_distances(x)
    return np.sum(cost * ddnref.nodes.sinkhorn(cost, p, q, eps=EPS, rtol=1e-11)[0])


def gradient(x):
    cost = squared_distances(x)
    plan, _ = ddnref.nodes.sinkhorn(cost, p, q, eps=EPS, rtol=1e-11)
    cost_bar = plan + ddnref.nodes.sinkhorn_vjp(cost, plan, eps=EPS)[0]
    return 2 * (np.sum(cost_bar, axis=1, keepdims=True) * x - cost_bar @ z)


def direct(x):
    """The part of the gradient that does not go through the plan."""
    plan, _ = ddnref.nodes.sinkhorn(squared_distances(x), p, q, eps=EPS)
    return 2 * (p[:, None] * x - plan @ z)


def error_of(rule):
    return ddnref.testing.check_vjp(loss, lambda bar, _, x: bar * rule(x), x, needs=(0,), step=1e-5).error


check("gradient of the transport cost: error", error_of(gradient), 1e-7)
print(f"without the plan's part: relative error {error_of(direct):.0e}")

# %%
# Steps along it
# --------------
# A step against the gradient moves every colour a little towards where its mass goes; divided by the mass, frequent
# and rare colours move alike. The photograph takes on the other's colours bit by bit.

moved, losses = x.copy(), []
pictures = [x]
for step in range(12):
    losses.append(loss(moved))
    moved = moved - 0.12 * gradient(moved) / p[:, None]
    if step in (2, 11):
        pictures.append(moved.copy())
losses.append(loss(moved))
print(f"transport cost {losses[0]:.4f} before, {losses[-1]:.4f} after {len(losses) - 1} steps")

fig, axes = plt.subplots(1, 4, figsize=(11, 2.4), layout="constrained", width_ratios=[1, 1, 1, 0.8])
for ax, title, colours in zip(axes, ("start", "3 steps", "12 steps"), pictures, strict=False):
    ax.imshow(np.clip(colours[china_labels].reshape(china.shape), 0, 1))
    ax.set_title(title)
    ax.set_axis_off()
axes[3].plot(losses, "o-", color=BLUE)
axes[3].set(xlabel="step", title="transport cost", ylim=(0, None))
plt.show()
