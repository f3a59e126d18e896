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
from ddnref.examples import BLUE, check, image

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
plan, info = ddnref.nodes.sinkhorn(cost, p, q, EPS)
print(f"{info.n_iter} updates and {info.newton_steps} Newton steps, error of the marginals {info.residual_norm:.0e}")
print(f"estimated error of a gradient {info.error:.0e}")
carried = (plan @ z) / np.sum(plan, axis=1, keepdims=True)

fig, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
images = {"photograph": china, "its colours from": flower, "recoloured": carried[china_labels].reshape(china.shape)}
for ax, (title, pixels) in zip(axes, images.items(), strict=True):
    image(ax, np.clip(pixels, 0, 1), title)

# %%
# The gradient of the transport cost
# ----------------------------------
# The loss :math:`L = \langle C, P(C) \rangle` depends on the cost twice: directly, and through the plan.
# :func:`ddnref.nodes.sinkhorn_vjp` takes the cotangent of the plan, which is :math:`C`, the plan itself and the inputs,
# and no iterate of the solver. From the cost the chain rule goes on to the colours.


def loss(x):
    cost = squared_distances(x)
    return np.sum(cost * ddnref.nodes.sinkhorn(cost, p, q, EPS)[0])


def gradient(x, through_plan=True):
    cost = squared_distances(x)
    plan, _ = ddnref.nodes.sinkhorn(cost, p, q, EPS)
    (cost_bar, *_), _ = ddnref.nodes.sinkhorn_vjp(cost, plan, cost, p, q, EPS)
    cost_bar = plan + through_plan * cost_bar
    return 2 * (np.sum(cost_bar, axis=1, keepdims=True) * x - cost_bar @ z)


full, direct = gradient(x), gradient(x, through_plan=False)
report = ddnref.testing.check_vjp(loss, lambda a, _, x: a * gradient(x), x, needs=(0,), step=1e-5)
check("gradient of the transport cost: error", report.error, 1e-7)
print(f"without the plan's part: relative error {np.linalg.norm(direct - full) / np.linalg.norm(full):.0e}")

# That part is small, so an error in it shows better in a loss of the plan alone.
plan_bar = np.random.default_rng(0).standard_normal(cost.shape)
(cost_bar, *_), _ = ddnref.nodes.sinkhorn_vjp(plan_bar, plan, cost, p, q, EPS)
slope = ddnref.testing.numerical_jvp(
    lambda cost: np.sum(plan_bar * ddnref.nodes.sinkhorn(cost, p, q, EPS)[0]), cost, cost_bar, step=1e-4
)
check("gradient of a random loss of the plan: error", abs(slope / np.sum(cost_bar**2) - 1), 1e-7)

# %%
# Steps along it
# --------------
# A step against the gradient moves every colour a little towards where its mass goes; divided by the mass, frequent
# and rare colours move alike. The photograph takes on the other's colours bit by bit.

moved = [x]
for _ in range(12):
    moved.append(moved[-1] - 0.12 * gradient(moved[-1]) / p[:, None])
losses = [loss(x) for x in moved]
print(f"transport cost {losses[0]:.4f} before, {losses[-1]:.4f} after {len(losses) - 1} steps")

fig, axes = plt.subplots(1, 4, figsize=(11, 2.4), layout="constrained", width_ratios=[1, 1, 1, 0.8])
for ax, steps in zip(axes, (0, 3, 12), strict=False):
    image(ax, np.clip(moved[steps][china_labels].reshape(china.shape), 0, 1), f"after {steps} steps")
axes[3].plot(losses, "o-", color=BLUE)
axes[3].set(xlabel="step", title="transport cost", ylim=(0, None))
plt.show()
