r"""
The gradient through a linear solver, four ways
===============================================

:math:`K(\theta)\, x = b`, and a loss of x. What is the gradient with respect to b and to :math:`\theta`? This story
computes both by the inverse, by a solve, by differentiating through a solver, and by `ddnref.linear_solve_vjp`, which
needs products with K only. All agree to rounding.
"""

import matplotlib.pyplot as plt
import numpy as np

import ddnref
from ddnref.examples import BLUE, ORANGE, check, compare
from ddnref.examples._peers import figure, peers
from ddnref.reference import cg_unrolled, cg_unrolled_vjp

LIMIT = 1e-12  # of the relative error
rng = np.random.default_rng(0)
theta, x_true = rng.standard_normal((5, 5)), rng.standard_normal(5)
K = 2 * theta
b = K @ x_true

operator = ddnref.operators.scaled(ddnref.operators.dense(theta), 2.0)  # x ↦ 2 θ x: the matrix K is not formed
x, info = ddnref.linear_solve(operator, b, rtol=1e-13)
x_bar = np.full(5, 1 / 5)  # the loss is the mean of x
print(f"{info.n_iter} iterations, relative residual {info.residual_norm:.0e}")

# %%
# The gradient of b
# -----------------
# Differentiate both sides of :math:`K x = b` at fixed K: :math:`K\,\partial x / \partial b = I`. So the Jacobian is the
# inverse, row i column j holding :math:`\partial x_i / \partial b_j`, and the gradient of a loss is
#
# .. math:: \bar b = \left(\frac{\partial x}{\partial b}\right)^T \bar x = K^{-T} \bar x.
#
# No inverse is needed for that. It is the solution of the adjoint system, for which the products of
# `ddnref.operators.adjoint` are enough.

by_inverse = np.linalg.inv(K).T @ x_bar
((theta_bar,), b_bar), info = ddnref.linear_solve_vjp(x_bar, x, operator, rtol=1e-13)
compare("b: solve with the transpose", np.linalg.solve(K.T, x_bar), by_inverse, LIMIT)
compare("b: linear_solve_vjp", b_bar, by_inverse, LIMIT)

# %%
# The gradient of the parameters
# ------------------------------
# At fixed b, :math:`\mathrm dK\, x + K\, \mathrm dx = 0`, and so for every entry of :math:`\theta`
#
# .. math:: \frac{\partial x}{\partial \theta_{jk}} = -K^{-1} \frac{\partial K}{\partial \theta_{jk}} x.
#
# The explicit Jacobian has three axes, (entry of x; row, column of :math:`\theta`), as that of
# ``torch.autograd.functional.jacobian``; the right-hand sides are 25 vectors, of which each has one entry.

dK_x = np.kron(np.eye(5), 2 * x)  # (entry of K x; entry of θ): row j of K x depends on row j of θ only
jacobian = np.linalg.solve(K, -dK_x).reshape(5, 5, 5)
compare("Jacobian: inverse", -(np.linalg.inv(K) @ dK_x).reshape(5, 5, 5), jacobian, LIMIT)

# %%
# A loss needs the sum over the entries of x, weighted with :math:`\bar x`. Doing that sum first leaves one vector to
# solve for, and it is :math:`\bar b` again:
#
# .. math:: \bar\theta = -\,\partial_\theta \langle \bar b,\; K(\theta)\, x \rangle,
#
# here :math:`-2\, \bar b\, x^T`. `ddnref.linear_solve_vjp` asks the operator for it (``params_vjp``), so that a
# product with the operator and its derivative is all that is ever evaluated.

by_jacobian = np.tensordot(x_bar, jacobian, axes=1)
compare("θ: −2 b̄ xᵀ", -2 * np.outer(b_bar, x), by_jacobian, LIMIT)
compare("θ: linear_solve_vjp", theta_bar, by_jacobian, LIMIT)

# %%
# Forward mode
# ------------
# `ddnref.linear_solve_jvp` moves along a direction instead: one column of the Jacobian, by one solve of K itself.

direction = rng.standard_normal((5, 5))
x_dot, _ = ddnref.linear_solve_jvp((direction,), None, x, operator, rtol=1e-13)
compare("ẋ: linear_solve_jvp", x_dot, np.tensordot(jacobian, direction, axes=2), LIMIT)

# %%
# Autograd through a direct solver, for comparison
# ------------------------------------------------


def by_autograd(_):
    import torch

    theta_t, b_t = torch.tensor(theta, requires_grad=True), torch.tensor(b, requires_grad=True)
    torch.linalg.solve(2 * theta_t, b_t).mean().backward()
    by_torch = torch.autograd.functional.jacobian(lambda t: torch.linalg.solve(2 * t, torch.tensor(b)), theta_t)
    pairs = (b_bar, b_t.grad), (theta_bar, theta_t.grad), (jacobian, by_torch)
    return [np.linalg.norm(ours - theirs.numpy()) / np.linalg.norm(theirs) for ours, theirs in pairs]


differences = figure("linear solve: b, theta and the Jacobian", "PyTorch", by_autograd)
for name, difference in zip(("b", "θ", "Jacobian"), differences, strict=True):
    check(f"{name}: {peers()['PyTorch']}", difference, LIMIT)

# %%
# Why not through the iterations
# ------------------------------
# An iterative solver can be differentiated through as well, if every iterate is kept. ``ddnref.reference.cg_unrolled``
# does, for conjugate gradients. Memory grows by three vectors per step. Worse, rounding that the forward iteration
# forgives is amplified in reverse. The picture follows the gradient of the kernel of a blur.

shape, rho = (64, 64), 1e-3
i = np.arange(-4, 5)
kernel = np.exp(-(i[:, None] ** 2 + i[None, :] ** 2) / 4)
kernel /= kernel.sum()
system = ddnref.operators.normal(ddnref.operators.convolution(kernel, shape), rho)
b, x_bar = rng.standard_normal((2, *shape))

x, _ = ddnref.linear_solve(system, b, rtol=1e-13)
((exact,), _), _ = ddnref.linear_solve_vjp(x_bar, x, system, rtol=1e-13)
steps, unrolled, implicit = [], [], []
for rtol in 10.0 ** -np.arange(1, 13):
    x, info = ddnref.linear_solve(system, b, rtol=rtol)
    ((k_bar,), _), _ = ddnref.linear_solve_vjp(x_bar, x, system, rtol=rtol)
    _, saved = cg_unrolled(system, b, int(info.n_iter))
    by_iterates = cg_unrolled_vjp(x_bar, b, saved, system)[0][0]
    steps.append(int(info.n_iter))
    for errors, found in ((implicit, k_bar), (unrolled, by_iterates)):
        errors.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))

fig, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
ax.semilogy(steps, unrolled, "o-", color=ORANGE, label="through the stored iterates")
ax.semilogy(steps, implicit, "o-", color=BLUE, label="linear_solve_vjp, at the same tolerance")
ax.axhline(1, color="0.6", lw=0.8, ls=":")
ax.set(xlabel="steps of conjugate gradients, for tolerances from 0.1 to 1e-12", ylabel="relative error of the gradient")
ax.legend()
plt.show()
