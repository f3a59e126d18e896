"""
Eigen-digits, step by step
==========================

Simultaneous iteration finds the leading eigenvectors of a covariance matrix by products with it. Stopped early it
returns something else, and the gradient depends on which of the two is meant: the eigenvectors, or what was computed.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref

images, labels = load_digits(return_X_y=True)
rows = images[labels == 3] / 16
rows = rows - rows.mean(axis=0)
covariance = rows.T @ rows / len(rows)  # 64×64, of all threes
N = 4
exact, vectors = ddnref.eigh(covariance)
print("relative gaps behind the first five:", np.round(-np.diff(exact[::-1])[:5] / exact[-1], 3))

# %%
# The eigen-digits appear
# -----------------------
# Each row shows the :math:`n = 4` vectors after so many steps. The start is pseudo-random, and the first step only
# orthogonalises it. Above each image stands its relative residual
# :math:`\lVert X v - \lambda v \rVert / |\lambda|`. With ``throw=False`` an iteration that has not converged returns
# its last iterate.

STEPS = (1, 2, 5, 20, 80)


def iterate(x, steps, align="positive"):
    return ddnref.simultaneous_iteration(
        x, N, symmetric=True, maxiter=steps, throw=False, align=align, reference=vectors[:, : -N - 1 : -1]
    )


fig, axes = plt.subplots(len(STEPS), N, figsize=(5.6, 7.4), layout="constrained")
for row, steps in zip(axes, STEPS, strict=True):
    (w, v), info = iterate(covariance, steps)
    residual = ddnref.eigen_residual(covariance, w, v) / w
    for k, ax in enumerate(row):
        size = np.abs(v[:, k]).max()
        ax.imshow(v[:, k].reshape(8, 8), cmap="RdBu_r", vmin=-size, vmax=size)
        ax.set_title(f"{residual[k]:.0e}", fontsize="small")
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"{steps} step{'s' * (steps > 1)}")
fig.suptitle("Four eigen-digits as the iteration finds them")
plt.show()

# %%
# Three gradients of one loss
# ---------------------------
# The loss is the part of one image :math:`a` that the four vectors leave outside,
# :math:`L = \tfrac12 \lVert a - V V^T a \rVert^2`, plus a little of each vector by itself, so that it is not a
# function of their span alone. There are two questions to ask of an unconverged iterate :math:`(w, V)`:
#
# - How far is the gradient from that of the eigenvectors, :math:`\bar X^*`, by the closed form of `ddnref.eigh_vjp`?
# - How far is it from that of the iterate itself, by finite differences through all the steps?

probe = rows[np.argmax(np.sum((rows - rows @ vectors[:, -N:] @ vectors[:, -N:].T) ** 2, axis=1))]
tilt = 0.1 * np.random.default_rng(0).standard_normal((64, N))


def loss(v):
    return -0.5 * np.sum((probe @ v) ** 2) + np.sum(tilt * v)


def cotangent(v):
    return -np.outer(probe, probe @ v) + tilt


leading = vectors[:, : -N - 1 : -1]
limit = ddnref.eigh_vjp(None, cotangent(leading), exact, vectors, index=range(63, 63 - N, -1))


def difference_of_the_iterate(gradient, steps):
    """``|fd − ⟨X̄, D⟩| / ‖X̄‖``, the worst of three unit directions D and of ``X̄ / ‖X̄‖``."""
    rng = np.random.default_rng(1)
    directions = [a + a.T for a in rng.standard_normal((3, 64, 64))] + [gradient]
    worst = 0.0
    for d in directions:
        d = d / np.linalg.norm(d)
        numerical = ddnref.testing.numerical_jvp(lambda x: loss(iterate(x, steps)[0][1]), covariance, d, gap=0.05)
        worst = max(worst, abs(numerical - np.sum(gradient * d)) / np.linalg.norm(gradient))
    return worst


METHODS = ("bordered", "fixed_point", "unrolled")
counts = (2, 3, 5, 10, 20, 40, 80, 160)
to_limit = {method: [] for method in METHODS}
to_iterate = {method: [] for method in METHODS}
residuals = []
for steps in counts:
    (w, v), info = iterate(covariance, steps)
    residuals.append(float(info.residual_norm))
    for method in METHODS:
        x_bar = ddnref.simultaneous_iteration_vjp(
            None, cotangent(v), w, v, covariance, method=method, symmetric=True, n_iter=int(info.n_iter)
        )
        to_limit[method].append(np.linalg.norm(x_bar - limit) / np.linalg.norm(limit))
        to_iterate[method].append(difference_of_the_iterate(x_bar, steps))

fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
styles = {"bordered": "o-", "fixed_point": "s--", "unrolled": "^-"}
for ax, errors, title in (
    (axes[0], to_limit, "from the gradient of the eigenvectors"),
    (axes[1], to_iterate, "from the gradient of the iterate"),
):
    for method in METHODS:
        ax.loglog(counts, errors[method], styles[method], label=method, markersize=5)
    ax.loglog(counts, residuals, "k:", label="residual of the span")
    ax.set(xlabel="steps", title=title)
axes[0].set_ylabel("relative error")
axes[0].legend()
plt.show()

# %%
# Left: all three approach the gradient of the eigenvectors as fast as the vectors themselves converge, the unrolled
# one a little behind, because the derivative of an iterate converges later than the iterate. Right: reversing the
# steps is right from the first one on, to the accuracy of finite differences. The implicit methods assume convergence
# and are wrong until it is there. So look at ``info.converged``, or let the default ``throw=True`` do it.

for name, errors in (("eigenvectors", to_limit), ("iterate", to_iterate)):
    for method in METHODS:
        print(f"{name:12} {method:12}", " ".join(f"{error:.0e}" for error in errors[method]))
