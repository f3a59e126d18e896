"""
Repeated eigenvalues: where other gradients fail, and why
=========================================================

The derivative of an eigenvector divides by differences of eigenvalues. When eigenvalues come together, those
quotients have no correct digit left, although the loss may be perfectly smooth there. This story measures the error of
the gradient against the gap, down to exactly repeated eigenvalues.
"""

import matplotlib.pyplot as plt
import numpy as np

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, autograd_gradients, check, headline, picture, settings, table

# %%
# Matrices with three eigenvalues that come together
# --------------------------------------------------
# At every gap there are 50 matrices :math:`Q\, \mathrm{diag}(\lambda)\, Q^T` of size 8×8 with random eigenvectors.
# Three of their eigenvalues are 1, 1 + gap and 1 + 2 gap; the others keep their distance.
#
# Repeated eigenvalues are not exotic. Directions without data, isotropic noise, a ridge and any symmetry of the
# problem all make them.

MATRICES = 50
GAPS = [10.0**-e for e in range(16)] + [0.0]
rng = np.random.default_rng(settings.seed)

lam = np.asarray([[-3, -2, -1.5, 1, 1 + gap, 1 + 2 * gap, 4, 5] for gap in GAPS])[:, None, :]
cluster = slice(3, 6)
q = np.linalg.qr(rng.standard_normal((MATRICES, 8, 8)))[0]
x = (q * lam[..., None, :]) @ q.mT
x = (x + x.mT) / 2
c = rng.standard_normal((MATRICES, 8, 8))
c = np.broadcast_to((c + c.mT) / 2, x.shape).copy()

# %%
# A smooth loss whose gradient is known
# -------------------------------------
# The loss is :math:`L = \langle C, P \rangle`, with the projector :math:`P = V_c V_c^T` on the space of the three
# eigenvectors and a random symmetric C. Turning the three eigenvectors inside their space leaves P as it is. With
# :math:`\tilde C = Q^T C Q`, the gradient is
#
# .. math:: \bar X = Q\, (\Phi \circ \tilde C)\, Q^T, \qquad
#           \Phi_{ij} = \frac{1}{\lambda_i - \lambda_j} \text{ for } i \text{ inside and } j \text{ outside}
#
# (and the mirror image), zero elsewhere. No gap inside the cluster occurs. So the truth is well conditioned at every
# gap, and every error below is an error of the software.

inside = np.zeros(8, dtype=bool)
inside[cluster] = True
difference = np.where(inside[:, None], 1.0, -1.0) * (lam[..., :, None] - lam[..., None, :])
phi = np.divide(1, difference, where=inside[:, None] != inside, out=np.zeros_like(difference))
truth = q @ (phi * (q.mT @ c @ q)) @ q.mT

# %%
# Four ways to differentiate it
# -----------------------------
# `ddnref.eigh_vjp` with its default tolerance, with ``rtol`` set by somebody who knows that the loss depends on the
# group only, and the automatic differentiation of PyTorch and JAX through their ``eigh``.


def by_ddnref(rtol=None):
    matrix, constant = settings.backend.convert(x), settings.backend.convert(c)
    w, v = ddnref.eigh(matrix)
    v_bar = 2 * (constant @ v[..., cluster])
    x_bar = ddnref.eigh_vjp(None, v_bar, w, v, index=range(3, 6), rtol=rtol, throw=False)
    return settings.backend.to_numpy(x_bar)


def loss(w, v, c):
    v_c = v[..., cluster]
    return (c * (v_c @ v_c.mT)).sum()


gradients = {"ddnref": by_ddnref(), "ddnref, rtol=0.05": by_ddnref(rtol=0.05), **autograd_gradients(loss, x, c)}

# At every gap, the largest finite error and the number of gradients that are NaN or infinite.
worst, nans = {}, {}
for name, gradient in gradients.items():
    if gradient is not None:
        error = np.linalg.norm(gradient - truth, axis=(-2, -1)) / np.linalg.norm(truth, axis=(-2, -1))
        finite = np.isfinite(error)
        worst[name] = np.where(finite.any(axis=1), np.max(error, axis=1, where=finite, initial=0), np.nan)
        nans[name] = np.sum(~finite, axis=1)

# %%
# Error against gap
# -----------------

NAN = 1e3  # where NaN is drawn
LOOKS = {  # colour, marker, its size, and which curve lies above which
    "ddnref": (BLUE, "o", 6, 4),
    "ddnref, rtol=0.05": (GREEN, "s", 4, 5),
    "PyTorch": (ORANGE, "^", 8, 2),
    "JAX": (GREY, "v", 8, 3),
}
place = np.asarray([-np.log10(gap) if gap else 17.0 for gap in GAPS])

fig, ax = plt.subplots(figsize=(8, 4.4), layout="constrained")
for name, (colour, marker, size, order) in LOOKS.items():
    style = {"color": colour, "marker": marker, "markersize": size, "zorder": order}
    if name not in worst:
        ax.plot([], [], label=f"{name}: not installed", **style)
        continue
    ax.plot(place[:-1], worst[name][:-1], label=name, **style)
    ax.plot(place[-1:], worst[name][-1:], **style)
    # The markers of two libraries for NaN at the same gap lie side by side.
    bad = place[nans[name] > 0] + {"PyTorch": -0.22, "JAX": 0.22}.get(name, 0.0)
    ax.plot(bad, np.full(len(bad), NAN), linestyle="none", **{**style, "markerfacecolor": "white"})
ax.axvline(16, color=GREY, linewidth=0.8, linestyle=":")
ax.set_yscale("log")
powers = [-15, -12, -9, -6, -3]
ax.set_yticks([*(10.0**e for e in powers), 1, NAN], [*(f"$10^{{{e}}}$" for e in powers), "1", "NaN"])
ax.minorticks_off()
ax.set_ylim(1e-16, NAN * 10)
ax.set_xticks([17, *(-e for e in powers), 0], ["0", *(f"$10^{{{e}}}$" for e in powers), "1"])
ax.set_xlabel("gap between three eigenvalues; right of the line: exactly repeated")
ax.set_ylabel("worst relative error of the gradient")
ax.set_title("The same smooth loss, differentiated through eigh", loc="left")
fig.legend(loc="outside lower center", ncols=4)

columns, rows = ["gap"], [[f"{gap:.0e}" if gap else "0 (repeated)"] for gap in GAPS]
for name in gradients:
    columns += [f"{name}: worst error", f"NaN, of {MATRICES}"]
    for i, row in enumerate(rows):
        row += [float(worst[name][i]), int(nans[name][i])] if name in worst else ["not installed", ""]
picture("error", fig,
        f"Worst relative error of the {MATRICES} gradients at every gap. Open markers at the top say that some of them "
        "are NaN or infinite; the worst of the others is drawn too.",
        "Error of the gradient against the gap, by library, both axes logarithmic", columns, rows)  # fmt: skip
plt.show()

# %%
# Rounding of about :math:`10^{-16}` is divided by the gap, so digits go as the gap closes. Below 16 rounding errors
# ddnref treats the eigenvalues as one and is exact again; with ``rtol`` it is exact at every gap. Software that divides
# all the same returns numbers without a correct digit, or NaN.

table("errors", "The numbers of the picture.", columns, rows)
check("exactly repeated eigenvalues: error of ddnref", worst["ddnref"][-1], 1e-12)
check("eigenvalues equal within rounding: error of ddnref", worst["ddnref"][-2], 1e-12)
check("every gap: error of ddnref with rtol", np.max(worst["ddnref, rtol=0.05"]), 1e-12)


def say(name):
    if name not in worst:
        return f"{name} not installed"
    bad = f" ({nans[name][-1]} of {MATRICES} NaN)" if nans[name][-1] else ""
    return f"{name} {worst[name][-1]:.0e}{bad}"


headline("Worst gradient error at exactly repeated eigenvalues", say("ddnref"), say("PyTorch"), say("JAX"))

# %%
# Why
# ---
# With :math:`M = V^T \bar V` the textbook formula needs :math:`(M_{ij} - M_{ji}) / (\lambda_j - \lambda_i)`. For this
# loss :math:`M_{ij} = M_{ji}` inside the cluster: the numerator is zero but for rounding, about :math:`10^{-16}`.
# Divided by a gap of :math:`10^{-10}`, it is an error of :math:`10^{-6}`. Divided by the gap between *computed*
# repeated eigenvalues, itself a rounding error, it is a number of order one with no meaning, and NaN or infinite where
# that gap happens to be exactly zero.
#
# `ddnref.eigh_vjp` first asks which neighbouring eigenvalues are equal within 16 rounding errors of the largest one,
# and leaves their quotients out. That is exact for this loss. It would be wrong for a loss that does depend on a
# single eigenvector of the cluster. No gradient exists there, the numerator is not small, and the function says so:

w, v = ddnref.eigh(x[-1, 3])
single = np.zeros_like(v)
single[:, 3] = c[-1, 3] @ v[:, 3]  # one of the three alone
try:
    ddnref.eigh_vjp(None, single, w, v)
except ddnref.GaugeError as refused:
    print(refused)
