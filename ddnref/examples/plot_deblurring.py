"""
Deblurring a photograph: learning through the solver, in PyTorch
================================================================

A blurred photograph y is restored by the solution of a linear system with one unknown for each pixel,

.. math:: (K^T K + \\rho\\, D^T D)\\, x = K^T y,

K the convolution with the camera's blur, D the differences of neighbouring pixels. Neither the blur nor the weight
:math:`\\rho` is known: both are learned from one photograph whose sharp version is at hand, by gradient descent on the
restoration's error. PyTorch does what it is good at; `ddnref.linear_solve` and its derivative are one operation in its
graph, of which no iterate is stored.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_image

import ddnref
from ddnref.interop.torch import differentiable

SIDE, SIZE = 96, 9


def photograph(name, i, j):
    return torch.tensor(load_sample_image(name)[i : i + SIDE, j : j + SIDE].mean(axis=-1) / 255)


flower, temple = photograph("flower.jpg", 160, 240), photograph("china.jpg", 60, 75)

# %%
# The camera
# ----------
# It moved along a diagonal during the exposure. Operators take tensors as they are; parameters are in the open, so
# that PyTorch sees them.

i = torch.arange(SIZE, dtype=torch.float64) - SIZE // 2
along, across = (i[:, None] + i) / 2, (i[:, None] - i) / 2
shake = torch.exp(-((across / 0.7) ** 2) - (along / 2.2) ** 4)
shake /= shake.sum()
torch.manual_seed(0)


def taken(sharp):
    return ddnref.operators.convolution(shake, sharp.shape)(sharp) + 0.003 * torch.randn(sharp.shape, dtype=sharp.dtype)


blurred, blurred_temple = taken(flower), taken(temple)

# %%
# The model
# ---------
# The kernel is the softmax of its parameters: positive, of sum one. ``normal`` is :math:`K^T K`, one pair of Fourier
# transforms; the smoothness term is added with its weight. The options of the solver are bound once.

solve = differentiable(ddnref.linear_solve, solver="cg", rtol=1e-6)
smoothness = ddnref.operators.normal(ddnref.operators.difference((SIDE, SIDE)))


def restore(y, logits, log_rho):
    kernel = torch.softmax(logits.ravel(), dim=0).reshape(SIZE, SIZE)
    blur = ddnref.operators.convolution(kernel, y.shape)
    system = ddnref.operators.add(
        ddnref.operators.normal(blur), ddnref.operators.scaled(smoothness, log_rho.exp()), positive_definite=True
    )
    x, info = solve(system, ddnref.operators.adjoint(blur)(y))
    return x, info


# %%
# Is the gradient right? PyTorch's own checker compares it with finite differences, here on a small crop and with the
# solver at full accuracy, for kernel, weight and photograph at once.

start = -(i[:, None] ** 2 + i**2) / 8  # a round blur
crop = slice(40, 52)
exactly = differentiable(ddnref.linear_solve, solver="cg", rtol=1e-13)


def small(kernel, rho, y):
    blur = ddnref.operators.convolution(kernel, y.shape)
    regulariser = ddnref.operators.scaled(ddnref.operators.normal(ddnref.operators.difference(tuple(y.shape))), rho)
    system = ddnref.operators.add(ddnref.operators.normal(blur), regulariser, positive_definite=True)
    return exactly(system, ddnref.operators.adjoint(blur)(y))[0]


inputs = (shake[3:6, 3:6].clone(), torch.tensor(0.1, dtype=torch.float64), blurred[crop, crop].clone())
print("gradient check:", torch.autograd.gradcheck(small, [z.requires_grad_() for z in inputs]))

# %%
# Learning
# --------

logits = start.clone().requires_grad_()
log_rho = torch.tensor(np.log(3e-3), requires_grad=True)
optimiser = torch.optim.Adam([{"params": logits, "lr": 0.3}, {"params": log_rho, "lr": 0.2}])
losses, rhos = [], []
for _ in range(60):
    optimiser.zero_grad()
    x, info = restore(blurred, logits, log_rho)
    loss = torch.mean((x - flower) ** 2)
    loss.backward()
    losses.append(loss.item())
    rhos.append(log_rho.exp().item())
    optimiser.step()
print(f"mean squared error {losses[0]:.4f} before, {losses[-1]:.4f} after; {info.n_iter} iterations in the last solve")

# %%
# The loss and the weight over the steps, and the kernel that was found. Nothing was told about the camera's.

with torch.no_grad():
    learned = torch.softmax(logits.ravel(), dim=0).reshape(SIZE, SIZE)
    first = torch.softmax(start.ravel(), dim=0).reshape(SIZE, SIZE)

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
left.plot(losses, color="#0067a5")
left.set(xlabel="steps", ylabel="mean squared error", ylim=(0, None))
right.semilogy(rhos, color="#c4501b")
right.set(xlabel="steps", ylabel=r"smoothness $\rho$")

fig, axes = plt.subplots(1, 3, figsize=(8, 2.8), layout="constrained")
kernels = {"at the start": first, "learned": learned, "the camera's": shake}
for ax, (title, kernel) in zip(axes, kernels.items(), strict=True):
    ax.imshow(kernel, cmap="gray_r", vmin=0, vmax=float(shake.max()))
    ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %%
# Before and after
# ----------------
# The photograph from which was learned, and one that was not seen before. In decibels: peak signal to noise ratio.

fig, axes = plt.subplots(2, 4, figsize=(8, 4.5), layout="constrained")
with torch.no_grad():
    for row, y, sharp in zip(axes, (blurred, blurred_temple), (flower, temple), strict=True):
        before = restore(y, start, torch.tensor(np.log(3e-3)))[0]
        after = restore(y, logits, log_rho)[0]
        images = {"as taken": y, "restored, before": before, "restored, learned": after, "sharp": sharp}
        for ax, (title, image) in zip(row, images.items(), strict=True):
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            error = torch.mean((image - sharp) ** 2).item()
            ax.set_title(f"{title}\n{-10 * np.log10(error):.1f} dB" if error else title, fontsize=9)
            ax.set_axis_off()
plt.show()
