"""
Eigenvectors of a photograph's graph, matrix-free
=================================================

Pixels are nodes, neighbours are joined by an edge whose weight falls with their difference in brightness. The smoothest
eigenvectors of the graph's Laplacian are constant inside regions and change at their borders. The Laplacian is never
stored: `ddnref.eigsh` needs its product with an image, and `ddnref.eigsh_vjp` returns the gradient for every edge.
"""

# %%
# The operator
# ------------
#
# .. math:: (L u)_i = \sum_j w_{ij}\,(u_i - u_j)
#
# as differences along rows and columns. A `ddnref.operators.LinearOperator` carries its parameters, the weights, in the
# open: three pure functions say how to apply it and how it depends on them. L is self-adjoint, so the adjoint is L
# itself.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import ddnref
from ddnref.examples import check, compare, image

photograph = load_sample_image("flower.jpg")[40:400:8, 60:600:8].mean(axis=-1) / 255
shape = photograph.shape


def laplacian(params, u):
    down, right = params
    flow_down, flow_right = down * np.diff(u, axis=-2), right * np.diff(u, axis=-1)
    y = np.zeros(np.broadcast_shapes(u.shape, flow_down.shape[:-2] + shape))
    y[..., :-1, :] -= flow_down
    y[..., 1:, :] += flow_down
    y[..., :, :-1] -= flow_right
    y[..., :, 1:] += flow_right
    return y


def laplacian_vjp(params, y_bar, u):  # linear in the weights: they do not enter
    lead = tuple(range(u.ndim - 2))  # the weights are shared by all vectors: their gradients add up
    return tuple(np.sum(np.diff(y_bar, axis=axis) * np.diff(u, axis=axis), axis=lead) for axis in (-2, -1))


weights = tuple(np.exp(-((np.diff(photograph, axis=axis) / 0.1) ** 2)) + 0.01 for axis in (0, 1))
operator = ddnref.operators.LinearOperator(
    weights, laplacian, laplacian, laplacian_vjp, shape, shape, self_adjoint=True
)  # fmt: skip
(w, v), info = ddnref.eigsh(operator, 5, which="SA", basis=64)
print(f"{operator.size} unknowns, {info.n_products} products, residual {info.residual_norm.max():.0e} of the norm of L")

# %%
# Smallest first: the constant vector with eigenvalue 0, then the borders.

figure, axes = plt.subplots(1, 5, figsize=(11, 2.2), layout="constrained")
image(axes[0], photograph, "photograph")
for i in range(1, 5):
    image(axes[i], v[..., i], f"λ = {w[i]:.1e}", signed=True)

# %%
# Which edges hold the regions together?
# --------------------------------------
#
# The gradient of λ₂, the algebraic connectivity, with respect to every weight. By hand it is ``(u_i − u_j)²`` of the
# second eigenvector: the VJP gives the same. With eigenvectors in the loss there is no such formula, and the VJP solves
# a system in the complement of the five pairs; finite differences along one random direction agree.

w_bar = np.zeros(5)
w_bar[1] = 1.0
(down_bar, right_bar), _ = ddnref.eigsh_vjp(w_bar, None, w, v, operator, which="SA")
compare("λ₂: gradient against the formula", down_bar, np.diff(v[..., 1], axis=0) ** 2, 1e-10)

target = np.random.default_rng(0).standard_normal((2, *shape))


def loss(params):
    """``(t₁ᵀ u)(uᵀ t₂)`` of the second eigenvector u: its sign does not matter."""
    (_, v), _ = ddnref.eigsh(operator.with_params(*params), 5, which="SA", basis=64)
    return np.sum(target[0] * v[..., 1]) * np.sum(target[1] * v[..., 1])


a, b = (np.sum(t * v[..., 1]) for t in target)
v_bar = np.zeros_like(v)
v_bar[..., 1] = a * target[1] + b * target[0]
gradient, solved = ddnref.eigsh_vjp(None, v_bar, w, v, operator, which="SA")
step = [1e-3 * p * np.random.default_rng(1).standard_normal(p.shape) for p in operator.params]
slope = [loss([p + t * s for p, s in zip(operator.params, step, strict=True)]) / t for t in (0.5, -0.5, 1, -1)]
difference = (4 * (slope[0] + slope[1]) - (slope[2] + slope[3])) / 6
analytic = sum(np.sum(g * s) for g, s in zip(gradient, step, strict=True))
print(f"{int(solved.n_iter.max())} iterations of the solve")
check("eigenvector: gradient against a finite difference", abs(difference / analytic - 1), 1e-6)

figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for ax, bar, title in zip(axes, (down_bar, gradient[0]), ("∂λ₂/∂w", "∂loss/∂w, loss of the eigenvector"), strict=True):
    shown = image(ax, bar, title, signed=True, vmax=np.quantile(np.abs(bar), 0.99))
    figure.colorbar(shown, ax=ax, shrink=0.8)
