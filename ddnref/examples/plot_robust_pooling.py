"""
Pooling that outliers cannot move
=================================

Mean pooling is the minimum of a sum of squares: :math:`y = \\arg\\min_u \\sum_i \\frac12 (u - x_i)^2`. Another
penalty makes another pooling. Its output is a minimum too, so that the gradient follows from the penalty's second
derivative at the solution, whatever found it.
"""

# sphinx_gallery_thumbnail_number = 2

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, check, image

KINDS = ("quadratic", "pseudo-huber", "huber", "welsch", "truncated")
LOOKS = dict(zip(KINDS, (GREY, BLUE, GREEN, ORANGE, "#7a4ba0"), strict=True))

# %%
# One outlier on its way out
# --------------------------
# Seven numbers lie together; an eighth leaves. The mean follows it forever. Huber's penalties let it pull with a
# constant force; those of Welsch and the truncated quadratic let it go. The gradient with respect to that number says
# the same.

cluster = np.asarray([-0.8, -0.5, -0.2, 0.0, 0.1, 0.4, 0.7])
away = np.linspace(0, 6, 200)
x = np.concat([np.broadcast_to(cluster, (200, 7)), away[:, None]], axis=-1)

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for kind, colour in LOOKS.items():
    y, _ = ddnref.nodes.robust_pool(x, kind=kind)
    x_bar = ddnref.nodes.robust_pool_vjp(np.ones_like(y), y, x, kind=kind)
    axes[0].plot(away, y, color=colour, label=kind)
    axes[1].plot(away, x_bar[:, -1], color=colour)
axes[0].set(xlabel="the eighth number", title="pooled")
axes[1].set(xlabel="the eighth number", title="its gradient")
axes[0].legend(fontsize=9)
plt.show()

# %%
# Patches of a damaged photograph
# -------------------------------
# One pixel in five is replaced by black or white. Pooling over patches of 5×5 pixels removes the damage where the
# penalty ignores what is far from the rest; all patches are one batch.

clean = load_sample_image("china.jpg").mean(axis=-1)[::2, ::2] / 255
rng = np.random.default_rng(0)
damaged = np.where(rng.uniform(size=clean.shape) < 0.2, rng.integers(0, 2, clean.shape), clean)
SIDE = 5
trimmed = damaged[: clean.shape[0] // SIDE * SIDE, : clean.shape[1] // SIDE * SIDE]


def patches(image):
    rows, columns = image.shape[0] // SIDE, image.shape[1] // SIDE
    blocks = image[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE)
    return blocks.swapaxes(1, 2).reshape(rows, columns, SIDE**2)


target = patches(clean).mean(axis=-1)
pooled = {kind: ddnref.nodes.robust_pool(patches(damaged), kind=kind, alpha=0.2)[0] for kind in ("quadratic", "welsch")}

images = {"damaged": trimmed, "mean": pooled["quadratic"], "Welsch": pooled["welsch"]}
fig, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
for ax, (title, pixels) in zip(axes, images.items(), strict=True):
    image(ax, pixels, title)
plt.show()
for kind, pixels in pooled.items():
    print(f"{kind}: root mean square error {np.sqrt(np.mean((pixels - target) ** 2)):.3f}")

# %%
# The gradient, checked
# ---------------------
# Finite differences on one row of patches, away from the corners that two of the penalties have.

row = patches(damaged)[30, :20]
for kind in ("quadratic", "pseudo-huber", "welsch"):
    report = ddnref.testing.check_vjp(
        lambda x, kind=kind: ddnref.nodes.robust_pool(x, kind=kind, alpha=0.2)[0],
        lambda y_bar, y, x, kind=kind: ddnref.nodes.robust_pool_vjp(y_bar, y, x, kind=kind, alpha=0.2),
        row, needs=(0,), gap=0.03,
    )  # fmt: skip
    check(f"{kind}: error of the gradient", report.error, 1e-7)
