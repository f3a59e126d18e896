"""
Repeated eigenvalues: where other gradients fail, and why
=========================================================

The derivative of an eigenvector divides by differences of eigenvalues. When eigenvalues come together, those
quotients have no correct digit left, although the loss may be perfectly smooth there. This page measures the error of
the gradient against the gap, down to exactly repeated eigenvalues.
"""

import importlib.util

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref

# %%
# Covariance matrices with three eigenvalues that come together
# -------------------------------------------------------------
# We take the covariance of each of the ten handwritten digits in its 16 leading principal directions of all digits,
# keep the eigenvectors and 13 of the eigenvalues, and set three in the middle to ``c``, ``c + gap``, ``c + 2 gap``.
#
# Repeated eigenvalues are not exotic: directions without data, isotropic noise, a ridge and any symmetry of the
# problem all make them.

images, labels = load_digits(return_X_y=True)
images = images / 16
basis = np.linalg.svd(images - images.mean(axis=0), full_matrices=False)[2][:16].T
everything = np.cov((images @ basis).T)
spectra, q = np.linalg.eigh(np.stack([np.cov((images[labels == d] @ basis).T) for d in range(10)]))
spectra, q = spectra[:, ::-1] / spectra[:, -1:], q[:, :, ::-1]  # largest first, scaled to one

cluster = slice(5, 8)
inside = np.zeros(16, dtype=bool)
inside[cluster] = True


def matrices(gap):
    lam = spectra.copy()
    lam[:, cluster] = spectra[:, 6:7] + gap * np.asarray([1.0, 0.0, -1.0])
    x = (q * lam[:, None, :]) @ np.swapaxes(q, -1, -2)
    return lam, (x + np.swapaxes(x, -1, -2)) / 2


# %%
# A smooth loss whose gradient is known
# -------------------------------------
# The loss is the variance of *all* digits inside the space of the three eigenvectors, :math:`L = \langle C, P
# \rangle` with :math:`P = V_c V_c^T`. Turning the three eigenvectors inside their space leaves :math:`P` as it is. Its
# gradient, with :math:`\tilde C = Q^T C Q`, is
#
# .. math:: \bar X = Q\, (\Phi \circ \tilde C)\, Q^T, \qquad
#           \Phi_{ij} = \frac{1}{\lambda_i - \lambda_j} \text{ for } i \text{ inside and } j \text{ outside}
#
# (and the mirror image), zero elsewhere. No gap inside the cluster occurs: the truth is well conditioned at every gap.


def truth(lam):
    across = inside[:, None] != inside[None, :]
    difference = np.where(inside[:, None], 1.0, -1.0) * (lam[:, :, None] - lam[:, None, :])
    phi = np.where(across, 1 / np.where(across, difference, 1.0), 0.0)
    return q @ (phi * (np.swapaxes(q, -1, -2) @ everything @ q)) @ np.swapaxes(q, -1, -2)


# %%
# Four ways to differentiate it
# -----------------------------
# `ddnref.eigh_vjp` with its default tolerance, with ``rtol`` set by somebody who knows that the loss depends on the
# group only, and the automatic differentiation of PyTorch and JAX through their own ``eigh``.


columns = range(8, 11)  # the cluster in ascending order


def by_ddnref(x, rtol=None):
    w, v = ddnref.eigh(x)
    v_bar = 2 * everything @ v[..., 8:11]
    return ddnref.eigh_vjp(None, v_bar, w, v, index=columns, rtol=rtol, throw=False)


def by_torch(x):
    import torch

    leaf = torch.tensor(x, requires_grad=True)
    v_c = torch.linalg.eigh(leaf)[1][..., 8:11]
    torch.sum(torch.tensor(everything) * (v_c @ v_c.mT)).backward()
    return leaf.grad.numpy()


def by_jax(x):
    import jax
    import jax.numpy as jnp

    def loss(x):
        v_c = jnp.linalg.eigh(x)[1][..., 8:11]
        return jnp.sum(everything * (v_c @ v_c.mT))

    with jax.enable_x64(True):
        return np.asarray(jax.grad(loss)(jnp.asarray(x)))


methods = {"ddnref": by_ddnref, "ddnref, rtol=0.01": lambda x: by_ddnref(x, rtol=0.01)}
methods["PyTorch"] = by_torch if importlib.util.find_spec("torch") else None
methods["JAX"] = by_jax if importlib.util.find_spec("jax") else None

gaps = [10.0**-e for e in range(3, 17)] + [0.0]
error = {}
for name, gradient in methods.items():
    if gradient is None:
        continue
    found = []
    for gap in gaps:
        lam, x = matrices(gap)
        g, exact = gradient(x), truth(lam)
        with np.errstate(invalid="ignore"):
            g = (g + np.swapaxes(g, -1, -2)) / 2  # what a symmetric perturbation can see
        found.append(np.linalg.norm(g - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1)))
    error[name] = np.asarray(found)

# %%
# Error against gap
# -----------------

NAN = 1e4  # where NaN is drawn
look = {
    "ddnref": ("#0067a5", "o", 6, 4),
    "ddnref, rtol=0.01": ("#2b8a57", "s", 4, 5),
    "PyTorch": ("#c4501b", "^", 7, 2),
    "JAX": ("#6b6b6b", "v", 7, 3),
}
place = np.asarray([-np.log10(gap) if gap else 18.0 for gap in gaps])

fig, ax = plt.subplots(figsize=(8, 4.4), layout="constrained")
for name, (colour, marker, size, order) in look.items():
    style = {"color": colour, "marker": marker, "markersize": size, "zorder": order}
    if name not in error:
        ax.plot([], [], label=f"{name}: not installed", **style)
        continue
    worst = np.asarray([max(row[np.isfinite(row)], default=np.nan) for row in error[name]])
    ax.plot(place[:-1], worst[:-1], label=name, **style)
    ax.plot(place[-1:], worst[-1:], **style)
    bad = ~np.all(np.isfinite(error[name]), axis=1)
    ax.plot(place[bad], np.full(bad.sum(), NAN), linestyle="none", **{**style, "markerfacecolor": "white"})
ax.axvline(17, color="#6b6b6b", linewidth=0.8, linestyle=":")
ax.set_yscale("log")
ax.set_yticks(
    [1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1, NAN], [*(f"$10^{{{e}}}$" for e in (-15, -12, -9, -6, -3)), "1", "NaN"]
)
ax.minorticks_off()
ax.set_ylim(1e-16, NAN * 8)
ax.set_xticks([4, 6, 8, 10, 12, 14, 16, 18], [*(f"$10^{{-{e}}}$" for e in (4, 6, 8, 10, 12, 14, 16)), "0"])
ax.set_xlabel("gap between three eigenvalues (largest eigenvalue: 1); right of the line: exactly repeated")
ax.set_ylabel("worst relative error of the gradient")
ax.set_title("The same smooth loss, differentiated through eigh", loc="left")
fig.legend(loc="outside lower center", ncols=4)
plt.show()

for name, found in error.items():
    last = found[-1][np.isfinite(found[-1])]
    worst = f"{max(last):.0e}" if len(last) else "-"
    print(f"{name:<18} exactly repeated: worst finite error {worst}, NaN {np.sum(~np.isfinite(found[-1]))} of 10")

# %%
# Why
# ---
# With :math:`M = V^T \bar V` the textbook formula needs :math:`(M_{ij} - M_{ji}) / (\lambda_j - \lambda_i)`. For this
# loss :math:`M_{ij} = M_{ji}` inside the cluster: the numerator is zero but for rounding, about :math:`10^{-16}`.
# Divided by a gap of :math:`10^{-10}`, it is an error of :math:`10^{-6}`. Divided by the gap between *computed*
# repeated eigenvalues, itself a rounding error, it is a number of order one with no meaning, and NaN or infinite where
# that gap happens to be exactly zero.
#
# `ddnref.eigh_vjp` asks first which neighbouring eigenvalues cannot be told apart (16 rounding errors of the largest
# one) and leaves their quotients out. That is exact for this loss. It would be wrong for a loss that does depend on a
# single eigenvector of the cluster; there no gradient exists, the numerator is not small, and the function says so:

w, v = ddnref.eigh(matrices(0.0)[1][3])
single = np.zeros_like(v)
single[:, 8] = everything @ v[:, 8]  # one of the three on its own
try:
    ddnref.eigh_vjp(None, single, w, v)
except ddnref.GaugeError as refused:
    print(refused)
