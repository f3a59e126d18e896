r"""
Newton's method from the rest state of a rubber sheet
=====================================================

The elastic energy of rubber is a sum of powers of its *principal stretches*: a function of the eigenvalues of
:math:`C = F^T F`, with F the deformation gradient. Newton's method needs its Hessian, the tangent stiffness, and starts
at rest, where :math:`C = I` everywhere and all eigenvalues are equal. The derivative of an eigendecomposition does not
exist there. That of a function of the matrix does: `ddnref.spectral_function_jvp` is exact at any degeneracy.
"""

import matplotlib.pyplot as plt
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.linalg import splu

import ddnref
from ddnref.examples import GREY, card, check, compare, picture, settings, table
from ddnref.examples._peers import autograd_gradient, figure, peers

convert, to_numpy = settings.backend.convert, settings.backend.to_numpy

# %%
# Rubber
# ------
# Ogden fitted Treloar's classical measurements of vulcanised rubber by three powers,
#
# .. math:: W = \sum_r \frac{\mu_r}{\alpha_r}
#           \left( \lambda_1^{\alpha_r} + \lambda_2^{\alpha_r} + \lambda_3^{\alpha_r} - 3 \right)
#
# (R. W. Ogden, "Large deformation isotropic elasticity", Proc. R. Soc. A 326 (1972)). Rubber keeps its volume, so that
# a thin sheet has :math:`\lambda_3 = 1 / (\lambda_1 \lambda_2)`. With the matrix C of the plane,
# :math:`\lambda_1^\alpha + \lambda_2^\alpha = \operatorname{tr} C^{\alpha/2}` and
# :math:`\lambda_3^\alpha = (\det C)^{-\alpha/2}`. The stress, twice the derivative of W with respect to C, is therefore
# a function of the matrix less a multiple of the inverse,
#
# .. math:: S = f(C) - p\, C^{-1}, \qquad f(c) = \sum_r \mu_r c^{\alpha_r/2 - 1}, \qquad
#           p = \sum_r \mu_r (\det C)^{-\alpha_r/2} .
#
# Its derivative along :math:`\dot C` takes one JVP; the rest is the rule of the determinant and of the inverse.

OGDEN = ((0.63, 1.3), (0.0012, 5.0), (-0.01, -2.0))  # μ in N/mm², α


def f(c):
    return sum(mu * c ** (alpha / 2 - 1) for mu, alpha in OGDEN)


def df(c):
    return sum(mu * (alpha / 2 - 1) * c ** (alpha / 2 - 2) for mu, alpha in OGDEN)


def stress(c):
    """Return S for a batch of matrices C, and the function that maps a direction of C to that of S."""
    y, saved = ddnref.spectral_function_fwd(convert(c), f=f)
    inverse, det = np.linalg.inv(c), np.linalg.det(c)[:, None, None]
    p = sum(mu * det ** (-alpha / 2) for mu, alpha in OGDEN)
    slope = sum(-alpha / 2 * mu * det ** (-alpha / 2) for mu, alpha in OGDEN)

    def tangent(c_dot):
        y_dot = to_numpy(ddnref.spectral_function_jvp(convert(c_dot), y, *saved, f=f, df=df))
        turned = inverse @ c_dot
        p_dot = slope * np.trace(turned, axis1=-2, axis2=-1)[:, None, None]
        return y_dot - p_dot * inverse + p * turned @ inverse

    return to_numpy(y) - p * inverse, tangent


# %%
# The sheet
# ---------
# A square sheet with a round hole, in triangles, is held on its left side and pulled at its right side. F is constant
# in each triangle, a sum over its three corners. Entry by entry, the tangent stiffness is the change of the forces when
# one corner of a triangle moves along one axis: six directions, each for all triangles at once.

RINGS = 12  # of triangles around the hole
around = 4 * RINGS
angle = np.linspace(0, 2 * np.pi, around, endpoint=False)
circle = np.stack([np.cos(angle), np.sin(angle)], -1)
square = circle / np.max(np.abs(circle), axis=1, keepdims=True)
outwards = np.linspace(0, 1, RINGS + 1)[:, None, None] ** 1.3
rest = ((1 - outwards) * 0.35 * circle + outwards * square).reshape(-1, 2)

ring, spoke = (index.ravel() for index in np.indices((RINGS, around)))
a, b = around * ring + spoke, around * ring + (spoke + 1) % around  # neighbours on a ring
corners = np.concatenate([np.stack(three, -1) for three in ((a, a + around, b + around), (a, b + around, b))])

edges = np.swapaxes(rest[corners[:, 1:]] - rest[corners[:, :1]], 1, 2)
area = np.linalg.det(edges)[:, None, None] / 2
gradients = np.asarray([[-1, -1], [1, 0], [0, 1]]) @ np.linalg.inv(edges)  # of the shape functions


def assemble(x):
    """Return the elastic forces at the positions x, their derivative as a sparse matrix, and C."""
    deformation = np.swapaxes(x[corners], 1, 2) @ gradients
    c = deformation.mT @ deformation
    s, tangent = stress(c)
    forces, stiffness = np.zeros_like(x), np.zeros((len(corners), 3, 2, 3, 2))
    np.add.at(forces, corners, area * (gradients @ s @ deformation.mT))
    # Move one corner of each triangle along one axis; F, C and S move with it.
    for corner, axis in np.ndindex(3, 2):
        moved = np.zeros_like(deformation)
        moved[:, axis] = gradients[:, corner]
        c_dot = moved.mT @ deformation + deformation.mT @ moved
        stiffness[..., corner, axis] = area * (gradients @ (s @ moved.mT + tangent(c_dot) @ deformation.mT))
    # Add up what triangles share.
    unknowns = (2 * corners[..., None] + np.arange(2)).reshape(-1, 6)
    rows, columns = np.repeat(unknowns, 6, axis=1).ravel(), np.tile(unknowns, 6).ravel()
    return forces, coo_array((stiffness.ravel(), (rows, columns))).tocsc(), c


rng = np.random.default_rng(settings.seed)
somewhere = rest @ (np.eye(2) + 0.1 * rng.standard_normal((2, 2)))
direction = rng.standard_normal(rest.shape)
numerical = ddnref.testing.numerical_jvp(lambda x: assemble(x)[0], somewhere, direction, gap=0.01)
product = (assemble(somewhere)[1] @ direction.ravel()).reshape(rest.shape)
compare("tangent stiffness: error against finite differences of the forces", product, numerical, 1e-9)

# %%
# Newton's method
# ---------------
# All of the load is applied at once, and nothing is perturbed at rest. Plain Newton steps, without a line search,
# double the number of right digits in the end. With the stiffness of the rest state kept, every step gains the same
# small factor.

LOAD = 0.2  # N/mm² of the undeformed cross-section
free = np.flatnonzero(np.repeat(rest[:, 0] > -1 + 1e-9, 2))
side = np.flatnonzero(rest[:, 0] > 1 - 1e-9)
side = side[np.argsort(rest[side, 1])]
load = np.zeros_like(rest)
for end in (side[:-1], side[1:]):  # each end of an edge carries half of it
    load[end, 0] += LOAD * np.diff(rest[side, 1]) / 2


def newton(steps, keep=False):
    """Return the residuals of some steps from rest, the positions that they reach, and C there."""
    x, residuals, factor = rest.copy(), [], None
    for _ in range(steps + 1):
        forces, stiffness, c = assemble(x)
        missing = (load - forces).ravel()[free]
        residuals.append(np.linalg.norm(missing) / np.linalg.norm(load))
        if factor is None or not keep:
            factor = splu(stiffness[free][:, free])
        if len(residuals) <= steps:
            x.ravel()[free] += factor.solve(missing)
    return residuals, x, c


residuals, x, c = newton(5)
kept, _, _ = newton(5, keep=True)
stretch = np.sqrt(np.linalg.eigvalsh(c)[:, -1])

fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=[1.7, 1])
axes[0].triplot(*rest.T, corners, color=GREY, linewidth=0.3)
shown = axes[0].tripcolor(*x.T, corners, facecolors=stretch, cmap="viridis", edgecolors="white", linewidth=0.1)
axes[0].set(title="the sheet at rest (grey) and pulled", aspect="equal", xticks=[], yticks=[])
axes[0].spines[:].set_visible(False)
fig.colorbar(shown, ax=axes[0], label="largest principal stretch", shrink=0.8)
axes[1].semilogy(residuals, "o-", label="exact tangent stiffness")
axes[1].semilogy(kept, "s-", label="that of the rest state, kept")
axes[1].set(xlabel="step", title="force that is not balanced, relative")
axes[1].legend(fontsize=9, loc="lower left")
picture("sheet", fig,
        "The sheet, coloured by the largest principal stretch of each triangle, and what is left of the load after "
        "each step from rest.", "A stretched sheet with a hole, and residuals by step",
        ("step", "exact tangent stiffness", "that of the rest state"),
        [(i, *pair) for i, pair in enumerate(zip(residuals, kept, strict=True))])  # fmt: skip
plt.show()

order = np.log(residuals[4] / residuals[3]) / np.log(residuals[3] / residuals[2])
check("Newton's method: load that is not balanced after five steps", residuals[-1], 1e-12)
check("Newton's method: distance of its order from 2", abs(order - 2), 0.3)

# %%
# The same derivative through eigh
# --------------------------------
# At rest :math:`\dot S` is a number times :math:`\dot C` plus a number times its trace. Through their own ``eigh``,
# PyTorch and JAX differentiate :math:`f(C) = V f(\Lambda) V^T` by way of the eigenvectors, which divides by the
# difference of equal eigenvalues, so that the first Newton step is not a number. Common cures perturb C, or difference
# the stress numerically; neither is needed.

c_dot = np.asarray([[0.3, 1.0], [1.0, -0.2]])
y, saved = ddnref.spectral_function_fwd(convert(np.eye(2)), f=f)
ours = to_numpy(ddnref.spectral_function_jvp(convert(c_dot), y, *saved, f=f, df=df))
exact = df(1.0) * c_dot


def by_autograd(name):
    found = autograd_gradient(name, lambda w, v, d: (d * ((v * f(w)) @ v.mT)).sum(), np.eye(2), c_dot)
    return np.max(np.abs(found - exact))


rows = [("ddnref", float(np.max(np.abs(ours - exact))))]
rows += [(label, figure("rubber: derivative at rest", name, by_autograd)) for name, label in peers().items()]
table("rest", "Derivative of f(C) at rest along one direction.", ("", "error"), rows)
compare("derivative of f(C) at rest: error", ours, exact, 1e-15)
failing = [label for label, error in rows if np.isnan(error)]
card(
    "Pull a sheet of rubber. Newton's method starts at rest, where all principal stretches are equal.",
    axes[0],
    "y, saved = ddnref.spectral_function_fwd(c, f=f)\n"
    "y_dot = ddnref.spectral_function_jvp(c_dot, y, *saved, f=f, df=df)",
    f"Five steps from rest, and {residuals[-1]:.0e} of the load is not balanced."
    + (f" The first step is NaN by the derivative of eigh in {' and in '.join(failing)}." if failing else ""),
)
