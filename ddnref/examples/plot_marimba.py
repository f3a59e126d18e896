r"""
How to carve a bar that sounds in tune
======================================

A wooden bar that is struck vibrates in its eigenmodes. Those of a plain bar are out of tune: the second frequency is
2.76 times the first. Builders of marimbas carve an arch into the underside until it is 4 times the first, two octaves,
and the third 10 times. Frequencies and modes are eigenpairs of two matrices, stiffness K and mass M,

.. math:: K v = \omega^2 M v ,

and `ddnref.eigh_generalized_vjp` says how they depend on every entry of both. So a few Newton steps carve the bar.
"""

# sphinx_gallery_thumbnail_number = 2

import matplotlib.pyplot as plt
import numpy as np

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, check, picture, settings, table

convert, to_numpy = settings.backend.convert, settings.backend.to_numpy

# %%
# A bar of finite elements
# ------------------------
# The bar is cut into elements of one thickness each. Every joint has two unknowns, a displacement and a slope, and in
# between the bar bends as a cubic polynomial (the theory of Euler and Bernoulli, which is good for slender bars). An
# element of thickness h contributes :math:`E b h^3 / 12` times a fixed 4×4 matrix to the stiffness, and
# :math:`\rho b h` times another to the mass.
#
# Displacements are in metres and slopes are numbers, so the entries of both matrices have different units. That makes
# the condition number of the mass matrix large, but the results of `ddnref.eigh_generalized` do not depend on it.

ELEMENTS, LENGTH, WIDTH, BLANK = 40, 0.35, 0.05, 0.024  # metres
YOUNG, DENSITY = 18e9, 900.0  # rosewood, in N/m² and kg/m³
size = LENGTH / ELEMENTS
x = np.linspace(0, LENGTH, ELEMENTS + 1)
middle = (x[1:] + x[:-1]) / 2

stretch = np.asarray([1, size, 1, size])
bending = np.asarray([[12, 6, -12, 6], [6, 4, -6, 2], [-12, -6, 12, -6], [6, 2, -6, 4]]) * np.outer(stretch, stretch)
moving = [[156, 22, 54, -13], [22, 4, 13, -3], [54, 13, 156, -22], [-13, -3, -22, 4]] * np.outer(stretch, stretch)
bending = bending * YOUNG * WIDTH / 12 / size**3
moving = moving * DENSITY * WIDTH * size / 420
joints = 2 * np.arange(ELEMENTS)[:, None] + np.arange(4)  # the unknowns of each element
places = joints[:, :, None], joints[:, None, :]


def matrices(h):
    """Return stiffness and mass of a bar whose elements have the thicknesses h."""
    pair = np.zeros((2, 2 * ELEMENTS + 2, 2 * ELEMENTS + 2))
    np.add.at(pair[0], places, h[:, None, None] ** 3 * bending)
    np.add.at(pair[1], places, h[:, None, None] * moving)
    return pair


def matrices_vjp(k_bar, m_bar, h):
    """Return the gradient with respect to h from those with respect to stiffness and mass."""
    return np.sum(k_bar[places] * bending, axis=(1, 2)) * 3 * h**2 + np.sum(m_bar[places] * moving, axis=(1, 2))


# %%
# Frequencies, and what they depend on
# ------------------------------------
# The highest eigenvalue of these matrices is many million times the lowest that sounds, and rounding errors are
# relative to the highest. It is the lowest ones that are wanted here. Therefore the matrices exchange their places, and
# a part of the mass is added to the stiffness, which is singular: a free bar can move and turn as a whole, with
# frequency zero.
#
# .. math:: M v = \mu\, (K + \sigma M)\, v, \qquad \omega^2 = 1 / \mu - \sigma .
#
# Now the modes that are wanted have the largest eigenvalues. The last two columns are the motions without bending, and
# the three before them are the first modes that sound. Gradients with ``index=`` of these columns need a few products
# with them. They do not depend on the two vectors of frequency zero, which are arbitrary.

PITCH = 330.0  # Hz
SHIFT = (2 * np.pi * PITCH) ** 2
SOUNDING = [-3, -4, -5]


def modes(h):
    """Return all eigenpairs of a bar."""
    stiffness, mass = matrices(h)
    return ddnref.eigh_generalized(convert(mass), convert(stiffness + SHIFT * mass))


def squares(w):
    """Return the first three angular frequencies, squared."""
    return 1 / to_numpy(w)[SOUNDING] - SHIFT


def frequencies(w):
    """Return the first three frequencies in Hz."""
    return np.sqrt(squares(w)) / (2 * np.pi)


def pulled(squares_bar, v_bar, w, v, h):
    """Return the gradient with respect to h from cotangents of the squares and of the sounding modes."""
    w_bar = None if squares_bar is None else convert(-squares_bar / to_numpy(w)[SOUNDING] ** 2)
    v_bar = None if v_bar is None else convert(v_bar)
    m_bar, b_bar = map(to_numpy, ddnref.eigh_generalized_vjp(w_bar, v_bar, w, v, index=SOUNDING))
    return matrices_vjp(b_bar, m_bar + SHIFT * b_bar, h)


blank = np.full(ELEMENTS, BLANK)
w, v = modes(blank)
plain = frequencies(w)
gradients = [pulled(np.eye(3)[i], None, w, v, blank) / (2 * squares(w)[i]) for i in range(3)]

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for i, colour in enumerate((BLUE, ORANGE, GREEN)):
    shape = to_numpy(v)[::2, SOUNDING[i]]
    axes[0].plot(100 * x, shape / shape[0], color=colour, label=f"{plain[i] / plain[0]:.2f}")
    axes[1].plot(100 * middle, gradients[i] * BLANK * ELEMENTS, color=colour)
axes[0].set(title="modes of the plain bar", xlabel="cm", yticks=[])
axes[0].legend(title="frequency", fontsize=9, loc="lower center", ncols=3)
axes[1].set(title="what a thicker bar there does to the frequency", xlabel="cm")
axes[1].axhline(0, color=GREY, linewidth=0.7)
names = [f"gradient of frequency {i}" for i in (1, 2, 3)]
picture("modes", fig,
        "Left, three modes of a bar of constant thickness, and their frequencies relative to the first. Right, the "
        "relative change of each frequency for a relative change of the thickness, per part of the length. Wood at the "
        "ends is mass only and lowers all of them. Wood where a mode bends raises its frequency.",
        "Mode shapes and gradients of three frequencies along a bar", ["cm", *names],
        [(100 * at, *row) for at, row in zip(middle, np.transpose(gradients), strict=True)])  # fmt: skip

# %%
# Carving
# -------
# The logarithm of the thickness is a sum of ten cosines, symmetric about the middle. The three wishes are a pitch, an E
# at 330 Hz, and the two ratios. Each gives one row of a Jacobian, by one VJP, and each Newton step takes the smallest
# change of the shape that fulfils them to first order. Steps are short in the beginning, because the bar changes much.
#
# There is a fourth wish. The bar hangs on a cord through two holes, which should be where its first mode stands still.
# That is a function of the eigenvector.

WAVES = np.cos(2 * np.pi * np.arange(10)[:, None] * middle / LENGTH)
RATIOS, HOLE = (4.0, 10.0), 9  # the joint of the hole


def wishes(shape):
    """Return by how much each wish is missed, the Jacobian, and the modes."""
    h = BLANK * np.exp(shape @ WAVES)
    w, v = modes(h)
    values, vectors = squares(w), to_numpy(v)[:, SOUNDING]
    # Logarithms of frequencies, half of those of their squares
    logs = np.log(values / SHIFT) / 2
    missed = np.append(logs - np.log([1.0, *RATIOS]), vectors[2 * HOLE, 0] / vectors[0, 0])
    rows = [pulled(np.eye(3)[i] / (2 * values[i]), None, w, v, h) for i in range(3)]
    v_bar = np.zeros_like(vectors)
    v_bar[2 * HOLE, 0], v_bar[0, 0] = 1 / vectors[0, 0], -vectors[2 * HOLE, 0] / vectors[0, 0] ** 2
    rows.append(pulled(None, v_bar, w, v, h))
    return missed, (np.asarray(rows) * h) @ WAVES.T, (w, v, h)


rng = np.random.default_rng(settings.seed)
start = 0.05 * rng.standard_normal(10)
_, jacobian, _ = wishes(start)
direction = rng.standard_normal(10)
numerical = ddnref.testing.numerical_jvp(lambda shape: wishes(shape)[0], start, direction, step=3e-3)
off = np.max(np.abs(numerical - jacobian @ direction) / np.linalg.norm(jacobian, axis=1))
check("gradients of frequencies and of a mode: error against finite differences", off, 1e-7)

shape, history = np.zeros(10), []
for step in range(10):
    missed, jacobian, (w, v, h) = wishes(shape)
    history.append((step, *(frequencies(w) / frequencies(w)[0])[1:], frequencies(w)[0], np.max(np.abs(missed))))
    change = np.linalg.lstsq(jacobian / [1, *range(1, 10)], -missed)[0] / [1, *range(1, 10)]  # smooth shapes first
    shape = shape + change * min(1.0, 0.3 / np.max(np.abs(change @ WAVES)))
missed, _, (w, v, h) = wishes(shape)
tuned = frequencies(w)
table("steps", "Newton steps from a plain bar.",
      ("step", "second / first", "third / first", "first, Hz", "farthest wish"), history, ".5g")  # fmt: skip
print(f"Overtones of the carved bar: {tuned[1] / tuned[0]:.6f}, {tuned[2] / tuned[0]:.6f}")
check("carved bar: farthest wish", np.max(np.abs(missed)), 1e-10)
check("carved bar: wood that would have to be added, in metres", max(0.0, np.max(h) - BLANK), 0.0)

# %%
# The shape that the gradient finds is the one that builders know: an arch, thinnest in the middle.

fig, axes = plt.subplots(4, 1, figsize=(9, 5), layout="constrained", sharex=True, height_ratios=[1.3, 1, 1, 1])
outline = np.repeat(h, 2) * 100
edges = 100 * np.repeat(x, 2)[1:-1]
axes[0].fill_between(edges, 0, -100 * BLANK, color="#eeeeee", label="plain")
axes[0].fill_between(edges, 0, -outline, color="#8a5a33", label="carved")
for at in (x[HOLE], LENGTH - x[HOLE]):
    axes[0].plot(100 * at, -0.5, "o", color="white", markersize=5)
axes[0].set(ylabel="cm")
axes[0].grid(visible=False)
axes[0].legend(fontsize=9, loc="lower center", ncols=2)
for ax, i, colour in zip(axes[1:], range(3), (BLUE, ORANGE, GREEN), strict=True):
    mode = to_numpy(v)[::2, SOUNDING[i]]
    ax.axhline(0, color=GREY, linewidth=0.7)
    ax.fill_between(100 * x, mode / mode[0], -mode / mode[0], color=colour, alpha=0.25)
    ax.plot(100 * x, mode / mode[0], color=colour)
    ax.set(yticks=[], ylabel=f"{tuned[i]:.0f} Hz")
    ax.grid(visible=False)
axes[-1].set_xlabel("cm")
modes_shown = [to_numpy(v)[::2, column] for column in SOUNDING]
picture("bar", fig,
        "The carved bar with the holes of its cord, and its first three modes, with frequencies of 1 : 4 : 10. "
        "The first one stands still at the holes.",
        "Profile of a carved bar, and three modes of vibration",
        ["cm", "mode 1", "mode 2", "mode 3"],
        [(100 * at, *row) for at, row in zip(x, np.transpose(modes_shown), strict=True)])  # fmt: skip
plt.show()
