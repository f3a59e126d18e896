r"""
Nuclear norm and spectral norm
==============================

Two norms of a matrix are functions of its singular values: the *nuclear norm* :math:`\|X\|_* = \sum_i s_i`, whose
minimum has a low rank, and the *spectral norm* :math:`\|X\|_2 = s_1`, by which a linear map stretches at most. Their
gradients are :math:`U V^T` and :math:`u_1 v_1^T`. This story fills the holes of a photograph with the one, and keeps a
classifier calm with the other.
"""

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_digits, load_sample_image

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, check, image

rng = np.random.default_rng(0)

# %%
# A photograph with holes
# -----------------------
# Half of the pixels are missing. A photograph is nearly of low rank, so we look for the matrix with the smallest
# nuclear norm among all that agree with the known pixels. The nuclear norm has a kink wherever a singular value is
# zero, at the very matrices that we look for, and there `ddnref.svdvals_vjp` raises `SingularError`. A small
# :math:`\delta` rounds the kink off:
#
# .. math:: L(X) = \sum_i \sqrt{s_i^2 + \delta^2}, \qquad \bar s_i = \frac{s_i}{\sqrt{s_i^2 + \delta^2}} .
#
# The cotangent of a value that is zero is zero then, and the gradient exists everywhere.

DELTA, STEPS = 0.1, 200
photograph = load_sample_image("china.jpg").mean(axis=-1)[::5, ::5] / 255
known = rng.uniform(size=photograph.shape) < 0.5


def nuclear(x):
    """The rounded nuclear norm of a matrix, wide or tall, and its gradient."""
    s, saved = ddnref.svdvals_fwd(x)
    root = np.sqrt(s**2 + DELTA**2)
    return root.sum(), ddnref.svdvals_vjp(s / root, s, *saved)


def fill(holes):
    """The loss of the missing pixels, and its gradient."""
    x = photograph.copy()
    x[~known] = holes
    value, x_bar = nuclear(x)
    return value, x_bar[~known]


start = np.full(np.count_nonzero(~known), photograph[known].mean())
found = minimize(fill, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
filled = {"with holes": photograph.copy(), "filled": photograph.copy()}
filled["with holes"][~known] = start
filled["filled"][~known] = found.x

fig, axes = plt.subplots(1, 3, figsize=(9, 2.5), layout="constrained")
image(axes[0], np.where(known, photograph, 1), "half of the pixels")
image(axes[1], filled["filled"], "smallest nuclear norm")
image(axes[2], photograph, "photograph")
plt.show()

# %%
# The singular values say why it works. Noise, which the holes are, lifts all of them; the minimum brings the small ones
# back down, and keeps the large ones, which are the picture.

fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for (name, x), colour in zip({**filled, "photograph": photograph}.items(), (GREY, BLUE, ORANGE), strict=True):
    ax.semilogy(ddnref.svdvals(x), color=colour, label=name)
ax.set(xlabel="number of the singular value", ylabel="singular value")
ax.legend()
plt.show()

error = {name: np.sqrt(np.mean((x - photograph)[~known] ** 2)) for name, x in filled.items()}
print(f"root mean square error of the missing pixels: mean {error['with holes']:.3f}, filled {error['filled']:.3f}")
checked = ddnref.testing.check_vjp(
    ddnref.svdvals_fwd, ddnref.svdvals_vjp, filled["filled"], saves=True, gap=DELTA,
    loss=(lambda s: np.sqrt(s**2 + DELTA**2).sum(), lambda s: (s / np.sqrt(s**2 + DELTA**2),)),
)  # fmt: skip
check("nuclear norm: error against finite differences", checked.error, 1e-7)
check("error of the missing pixels, over that of their mean", error["filled"] / error["with holes"], 0.5)

# %%
# A classifier that does not overreact
# ------------------------------------
# A linear classifier of handwritten digits has one weight per pixel and class, :math:`W`. Its outputs move by at most
# :math:`\|W\|_2` times a change of the image. We add :math:`\mu\, s_1^2` to the usual cross-entropy.
# `ddnref.svd_topk` with one triple gives the norm and the vectors in its gradient
# :math:`2 \mu\, s_1 u_1 v_1^T`; the other triples are computed, but no product with them is.

PENALTY = 0.02
pixels, labels = load_digits(return_X_y=True)
order = rng.permutation(len(pixels))
pixels, labels = pixels[order] / 16, labels[order]
train, test = slice(0, 1200), slice(1200, None)
wanted = np.eye(10)[labels]


def spectral(w):
    """The square of the spectral norm, and its gradient."""
    (u, s, vh), saved = ddnref.svd_topk_fwd(w, 1)
    return s[0] ** 2, ddnref.svd_topk_vjp(None, 2 * s, None, u, s, vh, *saved)


def objective(flat, penalty):
    w = flat.reshape(10, 64)
    scores = pixels[train] @ w.T
    scores -= scores.max(axis=1, keepdims=True)
    p = np.exp(scores)
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.mean(np.log(p[wanted[train] == 1]))
    w_bar = (p - wanted[train]).T @ pixels[train] / 1200
    value, slope = spectral(w)
    return loss + penalty * value, (w_bar + penalty * slope).ravel()


# The loss without a penalty falls for ever as W grows, so it stops after as many steps.
starting = 1e-3 * rng.standard_normal(640)
weights = {
    name: minimize(objective, starting, args=(mu,), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    for name, mu in (("no penalty", 0.0), ("spectral norm", PENALTY))
}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
levels = np.linspace(0, 0.6, 13)
noise = rng.standard_normal((20, *pixels[test].shape))
accuracy = {}
for (name, flat), colour in zip(weights.items(), (GREY, GREEN), strict=True):
    w = flat.reshape(10, 64)
    axes[0].semilogy(range(1, 11), ddnref.svdvals(w), "o-", color=colour, label=name)
    right = [np.mean(np.argmax((pixels[test] + a * noise) @ w.T, axis=-1) == labels[test]) for a in levels]
    axes[1].plot(levels, right, color=colour)
    accuracy[name] = right
    print(f"{name}: spectral norm {ddnref.svdvals(w)[0]:.1f}, right {right[0]:.1%}, with noise 0.4 {right[8]:.1%}")
axes[0].set(xlabel="number of the singular value", title="singular values of W", xticks=range(1, 11))
axes[0].legend()
axes[1].set(xlabel="noise", title="share of digits that are right")
plt.show()

# %%
# The penalty pulls at the largest value alone, so that it comes down to the next ones, and the largest values of the
# result lie close together. Where two of them are equal the norm has a kink, as a maximum has. There
# `ddnref.svd_topk_vjp` raises `GaugeError`, because the cluster is cut. An optimiser that takes steps stays beside it.

s = ddnref.svdvals(weights["spectral norm"].reshape(10, 64))
print(f"the four largest singular values: {', '.join(f'{value:.4f}' for value in s[:4])}")

w, direction = rng.standard_normal((2, 10, 64))
slope = ddnref.testing.numerical_jvp(lambda w: np.asarray(spectral(w)[0]), w, direction, gap=0.1)
check("spectral norm: error against finite differences", abs(slope / np.sum(spectral(w)[1] * direction) - 1), 1e-7)
check("loss of accuracy by noise, over that without the penalty",
      (accuracy["spectral norm"][0] - accuracy["spectral norm"][8])
      / (accuracy["no penalty"][0] - accuracy["no penalty"][8]), 0.9)  # fmt: skip
