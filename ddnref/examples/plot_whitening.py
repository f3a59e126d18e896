"""
Whitening, and the geometry of covariance matrices
==================================================

Functions of a symmetric matrix, :math:`f(X) = V f(\\Lambda) V^T`, do not depend on the choice of eigenvectors. Their
derivative is exact at any degeneracy. This page uses three of them on patches of a photograph and on covariance
matrices of digits: the inverse square root, the logarithm and the exponential.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

import ddnref

# %%
# Whitening the patches of a photograph
# -------------------------------------
# Neighbouring pixels of a photograph say nearly the same. Multiplying patches by the inverse square root of their
# covariance removes that: afterwards every direction has variance one. The rows of the whitening matrix
# :math:`C^{-1/2}` are filters; each takes a pixel and subtracts what its neighbours already told.

photograph = load_sample_image("flower.jpg").mean(axis=-1) / 255
SIDE = 9
rng = np.random.default_rng(0)
corners = rng.integers(0, np.asarray(photograph.shape) - SIDE, (20_000, 2))
patches = np.stack([photograph[i : i + SIDE, j : j + SIDE].ravel() for i, j in corners])
patches -= patches.mean(axis=0)
covariance = patches.T @ patches / len(patches) + 1e-5 * np.eye(SIDE**2)

whitening, saved = ddnref.invsqrtm_fwd(covariance)
after = whitening @ covariance @ whitening
print(f"covariance after whitening: at most {np.max(np.abs(after - np.eye(SIDE**2))):.0e} from the identity")

centre = SIDE**2 // 2
kernel = whitening[centre].reshape(SIDE, SIDE)
windows = np.lib.stride_tricks.sliding_window_view(photograph - photograph.mean(), (SIDE, SIDE))
white = np.einsum("ijkl,kl->ij", windows, kernel, optimize=True)

fig, axes = plt.subplots(1, 3, figsize=(9, 2.7), layout="constrained", width_ratios=[1.5, 1, 1.5])
axes[0].imshow(photograph, cmap="gray")
axes[0].set_title("photograph")
size = np.abs(kernel).max()
axes[1].imshow(kernel, cmap="RdBu_r", vmin=-size, vmax=size)
axes[1].set_title("centre row of $C^{-1/2}$")
limit = np.quantile(np.abs(white), 0.99)
axes[2].imshow(white, cmap="gray", vmin=-limit, vmax=limit)
axes[2].set_title("whitened")
for ax in axes:
    ax.set_axis_off()
plt.show()

# %%
# The gradient through whitening
# ------------------------------
# A layer that whitens its input is differentiated through :math:`C^{-1/2}`. Any cotangent will do for a check; the
# saved eigenpairs go back in after the output, and the report compares with finite differences.

y_bar = rng.standard_normal(covariance.shape)
x_bar = ddnref.invsqrtm_vjp(y_bar, whitening, *saved)
report = ddnref.testing.check_vjp(
    ddnref.invsqrtm_fwd,
    ddnref.invsqrtm_vjp,
    covariance,
    saves=True,
    tangent="symmetric",
    symmetrises=True,
    gap=float(saved[0][0]),  # a step must stay well inside the positive definite matrices
)
print(report)

# %%
# A mean of covariance matrices
# -----------------------------
# The ten digits have ten covariance matrices (here of 64 pixels, with a ridge, because some pixels never change). Their
# arithmetic mean swells: its determinant is larger than that of every member. The *log-Euclidean* mean averages in the
# chart of logarithms, where positive definite matrices are a vector space,
#
# .. math:: \bar C = \exp\left( \frac1{10} \sum_d \log C_d \right),
#
# and its determinant is the geometric mean of the determinants.

images, labels = load_digits(return_X_y=True)
images = images / 16
classes = np.stack([np.cov(images[labels == d].T) + 1e-3 * np.eye(64) for d in range(10)])

logarithms, log_saved = ddnref.logm_fwd(classes)
chart_mean = logarithms.mean(axis=0)
log_mean, exp_saved = ddnref.expm_fwd(chart_mean)
means = {"arithmetic": classes.mean(axis=0), "log-Euclidean": log_mean}

volume = {name: np.linalg.slogdet(c)[1] for name, c in means.items()}
members = np.linalg.slogdet(classes)[1]

fig, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained", width_ratios=[1, 1, 1.1])
size = np.abs(means["arithmetic"]).max()
for ax, (name, c) in zip(axes[:2], means.items(), strict=True):
    ax.imshow(c, cmap="RdBu_r", vmin=-size, vmax=size)
    ax.set_title(f"{name} mean")
    ax.set_axis_off()
axes[2].plot(range(10), members, "o", color="#6b6b6b", label="each digit")
axes[2].axhline(volume["arithmetic"], color="#c4501b", label="arithmetic mean")
axes[2].axhline(volume["log-Euclidean"], color="#0067a5", label="log-Euclidean mean")
axes[2].set(
    xticks=range(10), xlabel="digit", title="log-determinant", ylim=(members.min() - 5, volume["arithmetic"] + 28)
)
axes[2].legend(fontsize=9, loc="upper center")
plt.show()

# %%
# Distances between digits
# ------------------------
# The distance :math:`d(C_i, C_j) = \| \log C_i - \log C_j \|_F` compares shapes of variation. Digits that vary alike
# are close.

difference = logarithms[:, None] - logarithms[None, :]
distance = np.linalg.norm(difference, axis=(-2, -1))

fig, ax = plt.subplots(figsize=(4.6, 3.9), layout="constrained")
shown = ax.imshow(np.where(np.eye(10, dtype=bool), np.nan, distance), cmap="viridis")
ax.set(xticks=range(10), yticks=range(10), title="log-Euclidean distance")
ax.grid(visible=False)
fig.colorbar(shown, ax=ax)
plt.show()

# %%
# The gradient of such a mean
# ---------------------------
# How does the mean's total variance :math:`\operatorname{tr} \bar C` depend on each class? Two VJPs in sequence, last
# function first; the batch of ten is one call. The trace of each gradient says how strongly that digit pulls.

chart_bar = ddnref.expm_vjp(np.eye(64), log_mean, *exp_saved)
each = np.broadcast_to(chart_bar / 10, classes.shape)
classes_bar = ddnref.logm_vjp(each.copy(), logarithms, *log_saved)


def total_variance(c):
    return np.trace(ddnref.expm(ddnref.logm(c).mean(axis=0)))


numerical = ddnref.testing.numerical_jvp(total_variance, classes, classes_bar, gap=1e-3)
analytic = np.sum(classes_bar * classes_bar)
print(f"finite differences / gradient along the gradient: {numerical / analytic:.9f}")
