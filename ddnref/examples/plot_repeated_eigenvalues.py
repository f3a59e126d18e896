"""
Repeated eigenvalues: where other gradients fail, and why
=========================================================

The derivative of an eigenvector divides by differences of eigenvalues. When eigenvalues come together, those
quotients have no correct digit left, although the loss may be perfectly smooth there. This story measures the error of
the gradient against the gap, from wide gaps down to exactly repeated eigenvalues, at three sizes and in two precisions.
"""

import matplotlib.pyplot as plt
import numpy as np

import ddnref
from ddnref.examples import BLUE, GREY, ORANGE, card, check, picture, settings, table
from ddnref.examples._peers import autograd_gradient, figure, peers

# %%
# Matrices with three eigenvalues that come together
# --------------------------------------------------
# At every gap there are 50 matrices :math:`Q\, \mathrm{diag}(\lambda)\, Q^T` of size 6×6 with random eigenvectors, 8 of
# size 64×64 and one of size 256×256. Three of their eigenvalues are 0, gap / 2 and gap. The others lie between -1 and
# -0.4, so that the gap is relative to the largest magnitude.
#
# Repeated eigenvalues are not exotic. Directions without data, isotropic noise, a ridge and any symmetry of the
# problem all make them.

COUNTS = {6: 50, 64: 8, 256: 1}
MATRICES = COUNTS[6]
DTYPES = ("float64", "float32")
GAPS = [10.0**-e for e in range(16)] + [0.0]
rng = np.random.default_rng(settings.seed)


def matrices(m):
    """Return the matrices of one size, the loss's matrices C, and the eigenvectors and eigenvalues."""
    others = np.broadcast_to(np.linspace(-1, -0.4, m - 3), (len(GAPS), m - 3))
    lam = np.concatenate([others, np.outer(GAPS, [0, 0.5, 1])], axis=-1)[:, None, :]
    q = np.linalg.qr(rng.standard_normal((COUNTS[m], m, m)))[0]
    x = (q * lam[..., None, :]) @ q.mT
    c = rng.standard_normal((COUNTS[m], m, m))
    return (x + x.mT) / 2, np.broadcast_to((c + c.mT) / 2, x.shape).copy(), q, lam


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


def known_gradient(c, q, lam):
    """Return the gradient from the eigenvectors and eigenvalues that the matrices were made of."""
    inside = np.arange(lam.shape[-1]) >= lam.shape[-1] - 3
    difference = np.where(inside[:, None], 1.0, -1.0) * (lam[..., :, None] - lam[..., None, :])
    phi = np.divide(1, difference, where=inside[:, None] != inside, out=np.zeros_like(difference))
    return q @ (phi * (q.mT @ c @ q)) @ q.mT


# %%
# Three ways to differentiate it
# ------------------------------
# `ddnref.eigh_vjp` as it is, without a tolerance, at all sizes, and the automatic differentiation of PyTorch and JAX
# through their ``eigh`` at the smallest. Where one of them is not installed, its errors on the same matrices are read
# from a file; the legend says when they were recorded, and with which version.


def by_ddnref(x, c):
    matrix, constant = settings.backend.convert(x), settings.backend.convert(c)
    w, v = ddnref.eigh(matrix)
    m = x.shape[-1]
    v_bar = 2 * (constant @ v[..., m - 3 :])
    return settings.backend.to_numpy(ddnref.eigh_vjp(None, v_bar, w, v, index=range(m - 3, m), throw=False))


def loss(w, v, c):
    v_c = v[..., v.shape[-1] - 3 :]
    return (c * (v_c @ v_c.mT)).sum()


# At every gap, the largest finite error and the number of gradients that are NaN or infinite.
worst, nans = {dtype: {} for dtype in DTYPES}, {dtype: {} for dtype in DTYPES}


def errors(gradient, truth):
    error = np.linalg.norm(gradient - truth, axis=(-2, -1)) / np.linalg.norm(truth, axis=(-2, -1))
    finite = np.isfinite(error)
    worst = np.where(finite.any(axis=1), np.max(error, axis=1, where=finite, initial=0), np.nan)
    return worst, np.sum(~finite, axis=1)


for m in reversed(COUNTS):
    x, c, q, lam = matrices(m)
    truth = known_gradient(c, q, lam)
    for dtype in DTYPES:
        name = f"ddnref, m = {m}"
        worst[dtype][name], nans[dtype][name] = errors(by_ddnref(x.astype(dtype), c.astype(dtype)), truth)


def by_autograd(name):
    """The errors on the smallest matrices, with which the loop ended, in the present precision."""
    return errors(autograd_gradient(name, loss, x.astype(dtype), c.astype(dtype)), truth)


for dtype in DTYPES:
    for name in peers():
        found = figure(f"repeated eigenvalues: worst errors and numbers of NaN, {dtype}", name, by_autograd)
        worst[dtype][name], nans[dtype][name] = found

# %%
# Error against gap
# -----------------

NAN = 1e3  # where NaN is drawn
LOOKS = {  # colour, marker, its size, and which curve lies above which
    "ddnref, m = 6": (BLUE, "o", 5, 4),
    "ddnref, m = 64": (BLUE, "s", 5, 5),
    "ddnref, m = 256": (BLUE, "D", 5, 6),
    "PyTorch": (ORANGE, "^", 7, 2),
    "JAX": (GREY, "v", 7, 3),
}
labels = {name: name for name in LOOKS} | peers()
place = np.asarray([-np.log10(gap) if gap else 17.0 for gap in GAPS])

fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained", sharey=True)
for ax, dtype in zip(axes, DTYPES, strict=True):
    for name, (colour, marker, size, order) in LOOKS.items():
        style = {"color": colour, "marker": marker, "markersize": size, "zorder": order}
        style |= {"markerfacecolor": "white"} if name == "ddnref, m = 64" else {}
        ax.plot(place[:-1], worst[dtype][name][:-1], label=labels[name], **style)
        ax.plot(place[-1:], worst[dtype][name][-1:], **style)
        # The markers of two libraries for NaN at the same gap lie side by side.
        bad = place[nans[dtype][name] > 0] + {"PyTorch": -0.22, "JAX": 0.22}.get(name, 0.0)
        ax.plot(bad, np.full(len(bad), NAN), linestyle="none", **{**style, "markerfacecolor": "white"})
    ax.axvline(16, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_title(dtype, loc="left")
    ax.set(yscale="log", xlabel="gap / largest eigenvalue; right of the line: repeated")
    ax.set_xticks([17, 15, 12, 9, 6, 3, 0], ["0", *(f"$10^{{{-e}}}$" for e in (15, 12, 9, 6, 3)), "1"])
    ax.minorticks_off()
powers = [-15, -12, -9, -6, -3]
axes[0].set_ylabel("worst relative error of the gradient")
axes[0].set_yticks([*(10.0**e for e in powers), 1, NAN], [*(f"$10^{{{e}}}$" for e in powers), "1", "NaN"])
axes[0].set_ylim(1e-17, NAN * 10)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

columns, rows = ["gap"], [[f"{gap:.0e}" if gap else "0 (repeated)"] for gap in GAPS]
for dtype in DTYPES:
    for name in LOOKS:
        columns += [f"{labels[name]}, {dtype}: worst error"]
        if peer := name in peers():
            columns += [f"NaN, of {MATRICES}"]
        for i, row in enumerate(rows):
            row += [float(worst[dtype][name][i])]
            row += [int(nans[dtype][name][i])] if peer else []
picture("error", fig,
        "Worst relative error of the gradients at every gap, in both precisions. Open markers at the top say that some "
        "of them are NaN or infinite; the worst of the others is drawn too.",
        "Error of the gradient against the gap, by library and size, in two precisions, logarithmic axes",
        columns, rows)  # fmt: skip
plt.show()

# %%
# Rounding is divided by the gap, so the digits of PyTorch and JAX go as the gap closes. ddnref leaves out numbers
# that are only rounding before they are divided. Its error stays below 60 rounding errors times the square root of the
# size, at every gap, without a tolerance that somebody would have to choose.

table("errors", "The numbers of the picture.", columns, rows)
for dtype in DTYPES:
    for m in COUNTS:
        label = f"every gap, {dtype}, m = {m}: error of ddnref over 60 eps √m"
        check(label, np.max(worst[dtype][f"ddnref, m = {m}"]) / (60 * np.finfo(dtype).eps * m**0.5), 1)


def say(name):
    count = nans["float64"][name][-1]
    bad = f" and NaN for {count:.0f} of {MATRICES} matrices" if count else ""
    return f"{worst['float64'][name][-1]:.1g}{bad}"


card(
    "Equal eigenvalues are everyday: pixels that never change, symmetries, a ridge. Is a gradient through them right?",
    axes[0],
    "x_bar = ddnref.eigh_vjp(None, v_bar, w, v)",
    f"Three eigenvalues come together, from left to right. Where they are equal, the gradient is wrong by "
    f"{say('ddnref, m = 6')} (blue). Automatic differentiation is wrong by {say('PyTorch')} in {labels['PyTorch']} "
    f"(orange), and by {say('JAX')} in {labels['JAX']} (grey).",
)

# %%
# Why
# ---
# With :math:`M = V^T \bar V` the textbook formula needs :math:`(M_{ij} - M_{ji}) / (\lambda_j - \lambda_i)`. For this
# loss :math:`M_{ij} = M_{ji}` inside the cluster: the numerator is zero but for rounding, about :math:`10^{-16}`.
# Divided by a gap of :math:`10^{-10}`, it is an error of :math:`10^{-6}`. Divided by the gap between *computed*
# repeated eigenvalues, itself a rounding error, it is a number of order one with no meaning, and NaN or infinite where
# that gap happens to be exactly zero.
#
# `ddnref.eigh_vjp` leaves such a numerator out where it is below 4 rounding errors of the two columns of M that it
# comes from. The result is the exact gradient for a cotangent that differs from the given one by rounding, column by
# column. That is what is promised, and :doc:`the page of eigh <../eigen>` says what is not. Eigenvalues that are equal
# within 16 rounding errors of the largest one count as repeated, and there it also checks the loss. If the loss depends
# on a single eigenvector of the cluster, no gradient exists, the numerator is not small, and the function says so:

w, v = ddnref.eigh(x[-1, 3])
single = np.zeros_like(v)
single[:, 3] = c[-1, 3] @ v[:, 3]  # one of the three alone
try:
    ddnref.eigh_vjp(None, single, w, v)
except ddnref.GaugeError as refused:
    print(refused)
