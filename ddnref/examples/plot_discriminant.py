r"""
A map of handwritten digits that learns what to keep apart
==========================================================

*Linear discriminant analysis* draws labelled data in a plane, such that classes are far apart compared with the
scatter inside them. Its axes are eigenvectors of two matrices, the scatter between the classes and that within them:

.. math:: S_b\, v = \lambda\, S_w\, v .

Ten digits hardly fit into a plane, and the textbook's two axes put one image in three next to a wrong digit. Both
matrices leave choices open, such as how much each pair of digits matters. With `ddnref.eigh_generalized_vjp`,
the images that were left out make them, by the gradient of a loss.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke
from scipy.optimize import minimize
from sklearn.datasets import load_digits

import ddnref
from ddnref.examples import check, compare, image, picture, settings, table

# %%
# The textbook, with weights
# --------------------------
# With the means :math:`m_c` of the ten classes and the covariance :math:`S_w` of the images about the mean of their
# class, the two matrices are
#
# .. math::
#
#    A = \sum_{c < d} \omega_{cd}\, (m_c - m_d) (m_c - m_d)^T, \qquad B = S_w + \mathrm{diag}(r) .
#
# For classes of equal size, the textbook's :math:`\omega_{cd}` is the same for all 45 pairs. Distances count squared,
# so the pairs that are far apart already matter most. The ridge r, one small number for all pixels, keeps B invertible,
# because some pixels never change. Here every pair has a weight and every pixel a ridge, and their 109 logarithms,
# :math:`\theta`, are learned.

TRAIN, FOLDS = 1200, 5  # of 1797 images
START = np.append(np.full(64, -4.0), np.full(45, np.log(0.01)))  # the textbook
FIRST, SECOND = np.triu_indices(10, 1)  # the digits of each pair

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(settings.seed).permutation(len(labels))
images, labels = images[order] / 16, labels[order]


def statistics(images, labels):
    """The covariance within the classes, and their means."""
    one_hot = np.eye(10)[labels]
    means = one_hot.T @ images / one_hot.sum(axis=0)[:, None]
    rest = images - means[labels]
    return rest.T @ rest / len(labels), means


def pencils(theta, within, means):
    """The matrices A and B of every item of a batch."""
    ridge, pair = np.exp(theta[:64]), np.exp(theta[64:])
    apart = means[..., FIRST, :] - means[..., SECOND, :]
    return apart.mT @ (pair[:, None] * apart), within + np.diag(ridge)


def pencils_vjp(a_bar, b_bar, theta, means):
    """The gradient with respect to θ from those with respect to a batch of A and B."""
    apart = means[..., FIRST, :] - means[..., SECOND, :]
    pair_bar = np.sum((apart @ a_bar) * apart, axis=(0, -1))
    ridge_bar = np.sum(np.diagonal(b_bar, axis1=-2, axis2=-1), axis=0)
    return np.exp(theta) * np.append(ridge_bar, pair_bar)


# %%
# A loss of images that were left out
# -----------------------------------
# The columns of V fulfil :math:`V^T B V = I`, so that a class has a variance of about one in every direction of the
# plane. The probability that an image x belongs to class c is therefore the softmax over the classes of
# :math:`-\frac12 \| V_2^T (x - m_c) \|^2`, with the last two columns :math:`V_2`. The loss is the mean of minus its
# logarithm, by cross-validation: each fifth of the training images is judged by the plane of the other four fifths.
# That makes five pairs of matrices, which are one batch.

PLANE = [-1, -2]
fold = np.arange(TRAIN) % FOLDS
parts = [statistics(images[:TRAIN][fold != i], labels[:TRAIN][fold != i]) for i in range(FOLDS)]
within, means = map(np.stack, zip(*parts, strict=True))
left_out = np.stack([images[:TRAIN][fold == i] for i in range(FOLDS)])
truth = np.eye(10)[np.stack([labels[:TRAIN][fold == i] for i in range(FOLDS)])]


def log_probabilities(v, means, images):
    """Logarithms of the probability of every class, and the images relative to every mean, in the coordinates v."""
    offset = (images @ v)[..., :, None, :] - (means @ v)[..., None, :, :]
    score = -np.sum(offset**2, axis=-1) / 2
    score = score - np.max(score, axis=-1, keepdims=True)
    return score - np.log(np.sum(np.exp(score), axis=-1, keepdims=True)), offset


def exact(v_bar, w, v, columns, a, b):
    """Gradients of A and B from that of some columns of V."""
    return ddnref.eigh_generalized_vjp(None, v_bar, w, v, index=columns)


def plane_loss(a, b, vjp=exact):
    """The loss by cross-validation, and its gradients with respect to A and B."""
    w, v = ddnref.eigh_generalized(a, b)
    logs, offset = log_probabilities(v[..., PLANE], means, left_out)

    score_bar = (np.exp(logs) - truth) / TRAIN
    offset_bar = -score_bar[..., None] * offset
    v_bar = left_out.mT @ np.sum(offset_bar, axis=-2) - means.mT @ np.sum(offset_bar, axis=-3)
    return -np.sum(truth * logs) / TRAIN, vjp(v_bar, w, v, PLANE, a, b)


def loss_of_choices(theta):
    """The loss as a function of θ, and its gradient."""
    loss, gradients = plane_loss(*pencils(theta, within, means))
    return loss, pencils_vjp(*gradients, theta, means)


options = {"gap": 0.01, "directions": 4, "seed": settings.seed}  # B has eigenvalues of 0.02, the smallest ridge
checked = ddnref.testing.check_vjp(
    lambda theta: np.asarray(loss_of_choices(theta)[0]), lambda bar, _, theta: bar * loss_of_choices(theta)[1], START,
    needs=(0,), **options,
)  # fmt: skip
check("loss of the choices: error against finite differences", checked.error, 1e-7)

# %%
# The eigenvalue zero, 55 times
# -----------------------------
# Ten means have nine independent differences, so that A has rank 9, and 55 of its 64 eigenvalues are zero. Their
# eigenvectors :math:`V_0` are arbitrary, but the space that they span is not: it is all that discriminant analysis
# throws away. How well would that space have separated the images that were left out? With the scatter S of their
# means, the answer is :math:`\operatorname{tr}(V_0^T S V_0)`. It does not depend on the basis of the space, so it has a
# gradient.

KEPT, THROWN_AWAY = list(range(55, 64)), list(range(55))
left_out_means = truth.mT @ left_out / np.sum(truth, axis=1)[..., None]
scatter = np.stack([np.cov(each.T, bias=True) for each in left_out_means])


def missed(a, b, vjp=exact, columns=THROWN_AWAY):
    """The separation of the images left out by some columns of V, and its gradients with respect to A and B."""
    w, v = ddnref.eigh_generalized(a, b)
    product = scatter @ v[..., columns]
    return np.sum(v[..., columns] * product) / FOLDS, vjp(2 * product / FOLDS, w, v, columns, a, b)


# %%
# There is another way to the same number: from all separation, :math:`\operatorname{tr}(B^{-1} S)`, subtract that of
# the nine other vectors. Its gradient has to be the same.

a, b = pencils(START, within, means)
inverse = np.linalg.inv(b)
lost, of_lost = missed(a, b)
kept, of_kept = missed(a, b, columns=KEPT)
print(f"Separation that nine vectors miss: {lost / (lost + kept):.1%}")
compare("missed separation, A: difference from the complement", of_lost[0], -of_kept[0], 1e-9)
compare("missed separation, B: difference from the complement", of_lost[1],
        -of_kept[1] - inverse @ scatter @ inverse / FOLDS, 1e-9)  # fmt: skip

# %%
# Three gradients of both losses are compared with finite differences. The first one is that of ddnref. The second goes
# through the Cholesky factor, :math:`B = L L^T`, and the eigenvectors of :math:`L^{-1} A L^{-T}`, as automatic
# differentiation does, in PyTorch or JAX. It divides by the differences of all eigenvalues. Those of the 55 are zero
# or rounding. A loss of the plane has nothing there to be divided, but the missed separation has rounding errors. They
# cancel in the gradient of θ, whose changes keep the rank of A, but not in that of A. The third one is wrong on
# purpose, to see that the comparison notices: it forgets that B decides about the lengths of the vectors.


def through_cholesky(v_bar, w, v, columns, a, b):
    """Gradients of A and B as automatic differentiation forms them."""
    whole = np.zeros_like(v)
    whole[..., columns] = v_bar
    with np.errstate(divide="ignore", invalid="ignore"):
        return ddnref.reference.eigh_generalized_vjp_cholesky(np.zeros_like(w), whole, w, v, a, b)


def without_lengths(v_bar, w, v, columns, a, b):
    """Gradients of A and B that lack the term with the symmetric part of Vᵀ V̄."""
    a_bar, b_bar = exact(v_bar, w, v, columns, a, b)
    lengths = v @ (v.mT @ v_bar) @ v[..., columns].mT / 4
    return a_bar, b_bar + lengths + lengths.mT


rows = []
for name, vjp in (("ddnref", exact), ("Cholesky factor", through_cholesky), ("no lengths", without_lengths)):
    reports = [
        ddnref.testing.check_vjp(
            lambda a, b, loss=loss: np.asarray(loss(a, b)[0]),
            lambda bar, _, a, b, loss=loss, vjp=vjp: tuple(bar * x for x in loss(a, b, vjp)[1]),
            a, b, needs=(0, 1), tangent="symmetric", symmetrises=True, **options,
        )
        for loss in (plane_loss, missed)
    ]  # fmt: skip
    rows.append((name, *(report.error for report in reports)))
    accepted = all(report.passed for report in reports)
    check(f"wrong verdict on '{name}'", float(accepted != (vjp is exact)), 0.0)
table("gradients",
      "Errors against finite differences, relative to the gradient that is checked. At 1 all of it is error.",
      ("", "loss of the plane", "missed separation"), rows)  # fmt: skip
check("loss of the plane: error against finite differences", rows[0][1], 1e-7)
check("missed separation: error against finite differences", rows[0][2], 1e-7)

# %%
# Learning
# --------
# A quasi-Newton method minimises the loss, with a slight pull towards the textbook. The last 597 images take no part.

PULL = 1e-3


def objective(theta):
    """The loss and the pull, and their gradient."""
    loss, gradient = loss_of_choices(theta)
    return loss + PULL * np.sum((theta - START) ** 2), gradient + 2 * PULL * (theta - START)


learned = minimize(objective, START, jac=True, method="L-BFGS-B", options={"maxiter": 60}).x
ridges = [np.append(np.full(64, value), START[64:]) for value in np.arange(-9.0, 0.0, 0.5)]
one_ridge = min(ridges, key=lambda theta: loss_of_choices(theta)[0])

whole, whole_means = statistics(images[:TRAIN], labels[:TRAIN])


def judged(theta):
    """The plane of all training images, and the loss and the accuracy of the images that took no part."""
    v = ddnref.eigh_generalized(*pencils(theta, whole, whole_means))[1][:, PLANE]
    logs, _ = log_probabilities(v, whole_means, images[TRAIN:])
    right = np.argmax(logs, axis=-1) == labels[TRAIN:]
    return v, -np.mean(logs[np.arange(len(right)), labels[TRAIN:]]), np.mean(right)


choices = {"textbook": START, "textbook, the best ridge": one_ridge, "learned": learned}
results = {name: judged(theta) for name, theta in choices.items()}
table("accuracy", "Losses, and the share of images that are nearest to the mean of their class in the plane.",
      ("choice", "loss, cross-validation", "loss, new images", "recognised"),
      [(name, loss_of_choices(choices[name])[0], *of[1:]) for name, of in results.items()], ".3f")  # fmt: skip
before, after = results["textbook"], results["learned"]
print(f"Digits recognised in a plane: {before[2]:.1%} by the textbook, {after[2]:.1%} after learning")
check("loss of new images, over that of the textbook with its best ridge",
      after[1] / results["textbook, the best ridge"][1], 0.9)  # fmt: skip
check("mistakes, over those of the textbook with its best ridge",
      (1 - after[2]) / (1 - results["textbook, the best ridge"][2]), 0.9)  # fmt: skip

# %%
# The map before and after. Every small digit is an image that took no part. The large ones are the means of the
# classes, and an image counts as the digit in whose region it lies. The second map is turned to match the first, by
# `ddnref.polar`; the loss does not depend on how it is turned.

colours = plt.get_cmap("tab10")(np.arange(10))
planes = {"the textbook": before, "learned": after}
fig, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
drawn = []
for ax, (name, (v, _, right)) in zip(axes, planes.items(), strict=True):
    middle = whole_means.mean(axis=0)
    points, centres = (images[TRAIN:] - middle) @ v, (whole_means - middle) @ v
    signs = np.diag(np.sign(centres[0]))  # the zero is at the upper right
    turn = ddnref.polar(centres.T @ drawn[0][1])[0] if drawn else signs
    points, centres = points @ turn, centres @ turn
    drawn.append((points, centres))

    low, high = points.min(axis=0) - 0.5, points.max(axis=0) + 0.5
    x, y = np.linspace(low[0], high[0], 400), np.linspace(low[1], high[1], 400)
    ground = np.stack(np.meshgrid(x, y), axis=-1)[:, :, None] - centres
    nearest = np.argmin(np.sum(ground**2, axis=-1), axis=-1)
    ax.imshow(1 - 0.22 * (1 - colours[nearest, :3]), origin="lower", extent=(*x[[0, -1]], *y[[0, -1]]), aspect="auto")
    for digit in range(10):
        ax.scatter(*points[labels[TRAIN:] == digit].T, marker=f"${digit}$", s=28, color=colours[digit], linewidth=0.2)
    for digit in range(10):
        ax.text(*centres[digit], str(digit), color=colours[digit], fontsize=24, fontweight="bold", ha="center",
                va="center", path_effects=[withStroke(linewidth=4, foreground="white")])  # fmt: skip
    ax.set(title=f"{name}: {right:.0%} lie in their region", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
picture("map", fig, "New handwritten digits in the discriminant plane, before and after learning.",
        "Two maps of handwritten digits, with overlapping classes before learning and separate ones after",
        ["digit", "x before", "y before", "x after", "y after"],
        np.column_stack([labels[TRAIN:], drawn[0][0], drawn[1][0]]).tolist())  # fmt: skip
plt.show()

# %%
# What was learned: the weights of 5 and 8, of 1 and 5, and of 3 and 7 are more than twice as large as before. That of 0
# and 7, which are far apart in the first map, is less than half. All weights act together: 1 and 7, which the first map
# mixes most, come apart although their weight hardly changes. A pixel with a larger ridge counts for less. The ridges
# of pixels that never change have no gradient, and stay as they were.

change = (learned - START) / np.log(2)
pairs = np.full((10, 10), np.nan)
pairs[FIRST, SECOND] = pairs[SECOND, FIRST] = change[64:]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for ax, title, values in zip(axes, ("pairs of digits", "ridges of the pixels"), (pairs, change[:64]), strict=True):
    limit = np.nanmax(np.abs(values))
    shown = image(ax, values, title, signed=True, vmax=limit)
    fig.colorbar(shown, ax=ax, label="change, as a power of two")
axes[0].set(xticks=range(10), yticks=range(10))
axes[0].grid(visible=False)
picture("weights", fig, "How the weights of the pairs and the ridges of the pixels change.",
        "Learned weights of 45 pairs of digits as a matrix, and of 64 ridges as an image",
        ["name", "change, as a power of two"],
        [*((f"pair {c},{d}", float(x)) for c, d, x in zip(FIRST, SECOND, change[64:], strict=True)),
         *((f"pixel {i // 8},{i % 8}", float(x)) for i, x in enumerate(change[:64]))])  # fmt: skip
plt.show()
