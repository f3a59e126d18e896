"""
Learning through eigenvectors: digits with a bad spot
=====================================================

A camera has a bad spot: nine of its 64 pixels are noise. Every handwritten digit is described by a *subspace*, spanned
by the top eigenvectors of the second moments of its pixels, and an image is taken for the digit whose subspace holds
most of it. Strong noise ends up in the top eigenvectors, so this goes wrong. Gradient descent finds one weight per
pixel that puts it right, without being told which pixels are bad. For that it needs the derivative of the eigenvectors,
which is what ddnref provides.
"""

from functools import partial

import array_api_compat
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits

import ddnref
from ddnref.examples import BLUE, ORANGE, card, check, image, picture, settings, table, track
from ddnref.examples._peers import autograd_gradient, figure, peers

array, host = settings.backend.convert, settings.backend.to_numpy

# %%
# Damaged digits
# --------------
# A random training set and the held-out rest, all of them with noise in the same block of pixels.

TRAIN = 1200  # of 1797 images
NOISE = 1.5  # standard deviation; pixels lie between 0 and 1
BLOCK = np.zeros((8, 8), dtype=bool)
BLOCK[2:5, 2:5] = True  # the damaged pixels

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(settings.seed).permutation(len(labels))
clean, labels = images[order] / 16, labels[order]
rng = np.random.default_rng([settings.seed, 1])
damaged = clean.copy()
damaged[:, BLOCK.ravel()] += NOISE * rng.standard_normal((len(labels), BLOCK.sum()))


def mosaic(rows):
    """Rows of images ``(rows, columns, 64)`` as one image with white lines between them."""
    tiles = np.pad(rows.reshape(*rows.shape[:2], 8, 8), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    return tiles.transpose(0, 2, 1, 3).reshape(9 * rows.shape[0], 9 * rows.shape[1])


def outline(ax, left=0, top=0, colour="black"):
    """Mark the bad spot of an image whose first pixel is there."""
    y, x = np.argwhere(BLOCK)[0] - 0.5
    high, wide = np.ptp(np.argwhere(BLOCK), axis=0) + 1
    ax.add_patch(Rectangle((left + x, top + y), wide, high, fill=False, edgecolor=colour, linewidth=1.8))


pixels = tuple(f"pixel {i},{j}" for i in range(8) for j in range(8))
shown = [TRAIN + int(np.argmax(labels[TRAIN:] == digit)) for digit in range(10)]
digits, ax = plt.subplots(figsize=(7, 1.6), layout="constrained")
image(ax, mosaic(np.stack([clean[shown], damaged[shown]])), cmap="gray_r")
for digit in range(10):
    outline(ax, 9 * digit, 9, ORANGE)
picture("digits", digits,
    "One held-out digit of each kind, and the same with the bad spot.",
    "Ten handwritten digits, clean and with noise in a block of nine pixels",
    ("images", "digit", *pixels), {"clean": clean[shown], "damaged": damaged[shown]})  # fmt: skip

# %%
# The loss and its gradient
# -------------------------
# The second moments :math:`C_c` of each digit, ten 64×64 matrices, are decomposed as one batch. What is learned is one
# weight per pixel, :math:`s = \exp\theta`:
#
# .. math::
#
#    C_c(s) = \mathrm{diag}(s)\, C_c\, \mathrm{diag}(s), \qquad
#    P_c = V_c V_c^T \text{ of its top } k \text{ eigenvectors},
#
# .. math::
#
#    u_n = \frac{s \circ x_n}{\| s \circ x_n \|}, \qquad a_{nc} = \| P_c u_n \|^2,
#
# .. math::
#
#    L = \mathrm{mean}_n \left( -\log \mathrm{softmax}_c (\tau a_{nc})[\text{label of } n] \right).
#
# The loss depends on the eigenvectors only through the projectors :math:`P_c`, so it has a gradient whatever the
# eigenvalues inside and outside of the subspace do. The gradient goes back through the eigenvectors by
# `ddnref.eigh_topk_vjp` and through the rest by the chain rule, written out; there is no automatic differentiation.

COMPONENTS = 6  # k
SHARPNESS = 20.0  # τ


def prepare(images, labels):
    """Second moments ``(10, 64, 64)``, images ``(n, 64)`` and labels as 0 or 1 ``(10, n)``."""
    one_hot = (labels == np.arange(10)[:, None]).astype(np.float64)
    c = np.einsum("cn,ni,nj->cij", one_hot / one_hot.sum(axis=1, keepdims=True), images, images, optimize=True)
    return array(c), array(images), array(one_hot)


def coordinates(v, u):
    """The coordinates ``(10, k, n)`` of all images in the bases ``(10, 64, k)`` of all digits."""
    return v.mT @ u.T


def log_softmax(a):
    """The logarithm of the softmax of ``τ a`` over the digits, the first axis."""
    names = array_api_compat.array_namespace(a)  # those of PyTorch and JAX too, which differentiate the loss below
    a = SHARPNESS * (a - names.max(a, axis=0, keepdims=True))
    return a - names.log(names.sum(names.exp(a), axis=0, keepdims=True))


def loss_of_pairs(w, v, u, one_hot):
    """``L`` of the eigenpairs, of which the last k count."""
    names = array_api_compat.array_namespace(v)
    p = coordinates(v[..., v.shape[-1] - COMPONENTS :], u)
    return -names.sum(one_hot * log_softmax(names.sum(p * p, axis=1))) / u.shape[0]


def cotangents(v, u, one_hot):
    """``V̄_c = Uᵀ p̄_cᵀ`` and ``Ū = Σ_c p̄_cᵀ V_cᵀ``, where ``p̄ = 2 (∂L/∂a) p``."""
    p = coordinates(v, u)
    p_bar = 2 * SHARPNESS * (xp.exp(log_softmax(xp.sum(p * p, axis=1))) - one_hot)[:, None, :] * p / u.shape[0]
    return (p_bar @ u).mT, xp.sum(p_bar.mT @ v.mT, axis=0)


def forward(theta, data):
    """The loss of the pixel weights ``exp(θ)``, and the values that the reverse pass needs."""
    c, x, one_hot = data
    s = xp.exp(theta)
    (w, v), saved = ddnref.eigh_topk_fwd(c * s[:, None] * s[None, :], COMPONENTS)
    z = x * s
    length = xp.sqrt(xp.sum(z * z, axis=1, keepdims=True))
    return loss_of_pairs(w, v, z / length, one_hot), (s, w, v, saved, z / length, length)


def reverse(state, data):
    """``θ̄``: through the eigenvectors by `ddnref.eigh_topk_vjp`, the rest by the chain rule."""
    c, x, one_hot = data
    s, w, v, saved, u, length = state
    v_bar, u_bar = cotangents(v, u, one_hot)
    c_bar = ddnref.eigh_topk_vjp(None, v_bar, w, v, *saved)  # of C_c(s)
    s_bar = 2 * xp.sum((c_bar * c) @ s[:, None], axis=(0, 2))  # of diag(s) C_c diag(s)
    z_bar = (u_bar - u * xp.sum(u * u_bar, axis=1, keepdims=True)) / length  # through the normalisation
    return (s_bar + xp.sum(z_bar * x, axis=0)) * s


data = prepare(damaged[:TRAIN], labels[:TRAIN])
xp = array_api_compat.array_namespace(data[0])
equal = array(np.zeros(64))
_, state = first = forward(equal, data)

# %%
# Is the gradient right?
# ----------------------
# Pixels in the corners of an image never change, so that each of these matrices has many eigenvalues that are exactly
# zero: *repeated eigenvalues are in everyday data*. The loss does not depend on them, but the usual formula divides
# zero by zero there.

spectra = host(state[3][0])
fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
magnitudes = np.maximum(np.abs(spectra[:, ::-1]), 1e-19).T  # rounding makes some of the zeros negative
ax.semilogy(np.arange(1, 65), magnitudes, ".", color=BLUE, alpha=0.45, markersize=5, markeredgewidth=0)
rounding = 16 * np.finfo(float).eps * spectra.max()
ax.axhline(rounding, color=ORANGE, linestyle="--", linewidth=1.2, label="equal to rounding below this line")
ax.set(xlabel="number of the eigenvalue, largest first", ylabel="eigenvalue")
ax.legend(loc="lower left")
picture("spectra", fig,
    "All eigenvalues of the ten second moments, one dot each.",
    "Eigenvalues of all classes, logarithmic scale",
    ("digit", "number, largest first", "eigenvalue"),
    [(d, i + 1, float(value)) for d, w in enumerate(spectra) for i, value in enumerate(w[::-1])])  # fmt: skip

# %%
# ddnref is compared with finite differences: nudge the input and see how the loss moves. Then PyTorch's and JAX's
# autograd differentiate the same loss through their own ``eigh``.

_, w, v, saved, u, _ = state
one_hot = data[2]
gap = float(np.min(spectra[:, -COMPONENTS] - spectra[:, -COMPONENTS - 1]))
options = {"directions": 4, "gap": gap, "seed": settings.seed}
of_matrices = ddnref.testing.check_vjp(
    partial(ddnref.eigh_topk_fwd, k=COMPONENTS), ddnref.eigh_topk_vjp, data[0], saves=True,
    loss=(lambda w, v: loss_of_pairs(w, v, u, one_hot), lambda _, v: (None, cotangents(v, u, one_hot)[0])),
    tangent="symmetric", symmetrises=True, **options,
)  # fmt: skip
of_weights = ddnref.testing.check_vjp(
    lambda theta: forward(theta, data)[0],
    lambda loss_bar, _, theta: loss_bar * reverse(forward(theta, data)[1], data),
    equal, needs=(0,), **options,
)  # fmt: skip
check("gradient of the matrices", of_matrices.error, 1e-7)
check("gradient of the pixel weights", of_weights.error, 1e-8)

ours = host(ddnref.eigh_topk_vjp(None, cotangents(v, u, one_hot)[0], w, v, *saved))


def by_autograd(name):
    """The number of gradients that are not finite, and the error of the others relative to ours."""
    x_bar = autograd_gradient(name, loss_of_pairs, *map(host, (data[0], u, one_hot)))
    keep = np.isfinite(x_bar).all(axis=(-2, -1))
    error = np.linalg.norm(x_bar[keep] - ours[keep]) / np.linalg.norm(ours[keep]) if keep.any() else np.nan
    return np.sum(~keep), error


rows, said = (
    [("ddnref, of the pixel weights", of_weights.error, ""), ("ddnref, of the matrices", of_matrices.error, "")],
    [],
)
for name, label in peers().items():
    nan, error = figure("subspaces: gradients that are NaN, error of the others", name, by_autograd)
    rows.append((f"{label}, of the matrices", error, f"{nan:.0f} of 10"))
    said.append(f"NaN for {nan:.0f} of the ten digits in {label}")
repeated = int(np.sum(np.diff(spectra, axis=1) <= 16 * np.finfo(float).eps * spectra[:, -1:]))
table(
    "gradients",
    "Relative errors: of ddnref against finite differences, of the others against ddnref where they return a number. "
    f"The ten matrices have {repeated} pairs of neighbouring eigenvalues that are equal to rounding.",
    ("gradient", "error", "NaN"),
    rows,
)

# %%
# Learning
# --------
# Plain gradient descent on :math:`\theta` from equal weights, with a constant step.

STEP = 2.0
ITERATIONS = 60


def accuracy(state, images, labels):
    """The share of images whose nearest subspace is that of their digit."""
    p = coordinates(state[2], array(images) * state[0])  # the length of an image changes nothing here
    return float(np.mean(np.argmax(host(xp.sum(p * p, axis=1)), axis=0) == labels))


held_out = damaged[TRAIN:], labels[TRAIN:]
theta, (loss, state) = equal, first
losses, accuracies = [float(loss)], [accuracy(state, *held_out)]
for _ in track(range(ITERATIONS), "Learning pixel weights"):
    theta = theta - STEP * reverse(state, data)
    loss, state = forward(theta, data)
    losses.append(float(loss))
    accuracies.append(accuracy(state, *held_out))

fig, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, layout="constrained")
top.plot(losses, color=BLUE)
top.set(ylabel="training loss", ylim=(0, None))
bottom.plot(100 * np.asarray(accuracies), color=ORANGE)
bottom.set(ylabel="recognised, %", xlabel="steps of gradient descent", ylim=(0, 100))
fig.align_ylabels()
picture("course", fig,
    "The loss falls, and the accuracy on images that were not used for learning rises.",
    "Training loss and held-out accuracy against steps of gradient descent",
    ("step", "training loss", "held-out accuracy"),
    [(i, *row) for i, row in enumerate(zip(losses, accuracies, strict=True))])  # fmt: skip
card(
    "Nine pixels of a camera are broken, and nobody knows which. Can a program that reads digits find out by itself?",
    digits,
    "(w, v), saved = ddnref.eigh_topk_fwd(c, k)\nc_bar = ddnref.eigh_topk_vjp(None, v_bar, w, v, *saved)",
    f"It reads {accuracies[0]:.0%} of new images right before learning and {accuracies[-1]:.0%} after. "
    f"The automatic gradient of the same loss is {', and '.join(said)}.",
)

# %%
# How good is that? Two comparisons with equal weights: on clean images, and on images without the bad pixels.


def plain(images):
    """Held-out accuracy with equal weights, learned from and tested on these images."""
    _, state = forward(equal, prepare(images[:TRAIN], labels[:TRAIN]))
    return accuracy(state, images[TRAIN:], labels[TRAIN:])


table(
    "accuracy",
    f"Share of the {len(labels) - TRAIN} held-out images that are recognised.",
    ("", "recognised"),
    [
        ("clean images, equal weights", plain(clean)),
        ("damaged images, equal weights", accuracies[0]),
        ("damaged images, learned weights", accuracies[-1]),
        ("damaged images, bad pixels removed by someone who knows them", plain(damaged * ~BLOCK.ravel())),
    ],
    ".1%",
)

# %%
# Red pixels count for less, blue ones for more. The black square marks the bad spot, which was never pointed out.

weights = host(state[0])
fig, ax = plt.subplots(figsize=(4.4, 3.4), layout="constrained")
shown = image(ax, np.log2(weights), signed=True, cmap="RdBu")
outline(ax)
fig.colorbar(shown, ax=ax, label="weight of the pixel, as a power of two")
picture("weights", fig,
    "The learned weight of every pixel.",
    "Learned weight of the 8 by 8 pixels, low inside the damaged block",
    ("row", "column", "weight", "damaged"),
    [(i // 8, i % 8, float(weight), int(BLOCK.ravel()[i])) for i, weight in enumerate(weights)])  # fmt: skip

# %%
# The eigenvectors of the ten digits before and after. Before, all but the first show nothing but the bad spot. After,
# they show strokes.

SHOWN = 3  # of the k eigenvectors of each digit
parts = {}
for when, found in (("before", first[1]), ("after", state)):
    v = np.moveaxis(host(found[2])[..., :SHOWN], -1, 0)  # (SHOWN, 10, 64)
    # Choose signs such that the strongest entry is positive.
    v = v * np.sign(np.take_along_axis(v, np.abs(v).argmax(axis=-1)[..., None], axis=-1))
    parts |= {f"{when} {i + 1}": vectors for i, vectors in enumerate(v)}
fig, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
ax.imshow(mosaic(np.stack(list(parts.values()))), cmap="RdBu_r", vmin=-0.5, vmax=0.5)
ax.set_xticks(9 * np.arange(10) + 3.5, map(str, range(10)))
ax.set_yticks(9 * np.arange(2 * SHOWN) + 3.5, parts)
ax.grid(visible=False)
picture("eigen-digits", fig,
    f"The first {SHOWN} of {COMPONENTS} eigenvectors of every digit, before and after learning.",
    "Eigenvectors of the digit classes as images, before and after learning",
    ("eigenvector", "digit", *pixels), parts)  # fmt: skip
plt.show()
