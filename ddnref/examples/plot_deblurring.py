r"""
Deblurring a photograph: learning through the solver
====================================================

A camera that shook during the exposure took a blurred and slightly noisy photograph y. It is restored by the solution
of a linear system with one unknown for each pixel,

.. math:: (K^T K + \rho\, D^T D)\, x = K^T y,

K the convolution with the blur, D the differences of neighbouring pixels. The matrix is never stored:
`ddnref.linear_solve` needs its product with an image. But neither the blur nor the weight :math:`\rho` is known. Both
are learned here from one photograph whose sharp version is at hand, by following the gradient of the restoration's
error through the solver. `ddnref.linear_solve_vjp` solves one more system of the same kind and stores no iterate.
"""

# sphinx_gallery_thumbnail_number = 3

import array_api_compat
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import ddnref
from ddnref.examples import BLUE, GREY, ORANGE, card, check, image, picture, settings, table, track
from ddnref.examples._peers import figure, peers
from ddnref.operators import add, adjoint, convolution, difference, normal, scaled

convert, to_numpy = settings.backend.convert, settings.backend.to_numpy
xp = array_api_compat.array_namespace(convert(np.zeros(1)))
SIDE = 96  # of the photographs
SIZE = 9  # of the kernel

# %%
# The camera
# ----------
# It moved along a diagonal, a little out of focus. It took two photographs: one to learn from, and one that the
# learning never sees.

i = np.arange(SIZE) - SIZE // 2
along, across = (i[:, None] + i) / 2, (i[:, None] - i) / 2
shake = np.exp(-((across / 0.7) ** 2) - (along / 2.2) ** 4)
shake /= shake.sum()
rng = np.random.default_rng(settings.seed)


def photograph(name, top, left):
    """A square of a photograph, sharp and as the camera saw it."""
    sharp = load_sample_image(name)[top : top + SIDE, left : left + SIDE].mean(axis=-1) / 255
    blurred = convolution(shake, sharp.shape)(sharp) + 0.003 * rng.standard_normal(sharp.shape)
    return convert(sharp), convert(blurred)


flower, temple = photograph("flower.jpg", 160, 240), photograph("china.jpg", 60, 75)

# %%
# The model and its gradient
# --------------------------
# The kernel is the projection of its parameters onto the simplex, so that it is not negative and has sum one.
# ``normal`` is :math:`K^T K`, one pair of Fourier transforms; the smoothness term is added with its weight. The
# gradient takes three VJPs, called in reverse. The blur enters twice, through the matrix and through the right-hand
# side :math:`K^T y`.

smoothness = normal(difference((SIDE, SIDE)))


def restore(theta, log_rho, blurred, **options):
    kernel, rho = xp.reshape(ddnref.nodes.project_simplex(theta), (SIZE, SIZE)), xp.exp(log_rho)
    blur = convolution(kernel, blurred.shape)
    system = add(normal(blur), scaled(smoothness, rho), positive_definite=True)
    x, info = ddnref.linear_solve(system, adjoint(blur)(blurred), **options)
    return x, info, system, adjoint(blur), kernel, rho


def loss_and_gradient(theta, log_rho, sharp, blurred, rtol, x0=None, y0=None):
    x, forward, system, blur_t, kernel, rho = restore(theta, log_rho, blurred, rtol=rtol, x0=x0)
    loss = xp.mean((x - sharp) ** 2)

    # Back through the solve, through the two places of the kernel, and through its projection.
    x_bar = 2 / SIDE**2 * (x - sharp)
    ((kernel_bar, rho_bar), b_bar), backward = ddnref.linear_solve_vjp(x_bar, x, system, y0=y0, rtol=rtol)
    kernel_bar = kernel_bar + blur_t.params_vjp(blur_t.params, b_bar, blurred)[0]
    theta_bar = ddnref.nodes.project_simplex_vjp(xp.reshape(kernel_bar, (-1,)), xp.reshape(kernel, (-1,)))
    return loss, (theta_bar, rho_bar * rho), (x, b_bar), (int(forward.n_iter), int(backward.n_iter))


# %%
# Is the gradient right? Finite differences along the gradient itself, of kernel and weight together, with accurate
# solves and a step that stays inside the simplex.

round_blur = np.exp(-(i[:, None] ** 2 + i**2) / 8)
start = convert((round_blur / round_blur.sum()).ravel()), convert(np.asarray(np.log(3e-3)))
_, bars, _, _ = loss_and_gradient(*start, *flower, rtol=1e-12)
everything, direction = (xp.concat([a, xp.reshape(b, (1,))]) for a, b in (start, bars))
slope = ddnref.testing.numerical_jvp(
    lambda q: loss_and_gradient(q[:-1], xp.reshape(q[-1:], ()), *flower, rtol=1e-12)[0],
    everything, direction, step=2e-5,
)  # fmt: skip
error = abs(float(slope) / float(xp.sum(direction**2)) - 1)
check("gradient of kernel and weight: error against finite differences", error, 1e-7)

# %%
# Learning
# --------
# Adam, with one rate for the kernel and one for the weight. Each solve starts from the solution of the last step.

STEPS = 60
RTOL = 1e-6
RATES = 0.006, 0.3
params, last = start, (None, None)
means = [(0 * p, 0 * p) for p in params]
course = []
for step in track(range(1, STEPS + 1), "learning to deblur"):
    loss, bars, last, n_iter = loss_and_gradient(*params, *flower, RTOL, *last)
    course.append((step - 1, float(loss), float(xp.exp(params[1])), *n_iter))
    means = [(0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2) for (m, v), g in zip(means, bars, strict=True)]
    params = tuple(
        p - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.98**step)) ** 0.5 + 1e-12)
        for p, rate, (m, v) in zip(params, RATES, means, strict=True)
    )

_, losses, rhos, forward, backward = np.asarray(course).T
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
left.plot(losses, color=BLUE)
left.axhline(losses[0], color=GREY, linewidth=1, linestyle=":")
left.set(xlabel="steps", ylabel="mean squared error", ylim=(0, None))
right.plot(rhos, color=ORANGE)
right.set(xlabel="steps", ylabel=r"smoothness $\rho$", ylim=(0, None))
picture("course", fig, "The error of the restored photograph and the weight of smoothness while they are learned.",
        "Loss and weight over the steps", ["step", "loss", "rho", "iterations forward", "iterations backward"],
        course)  # fmt: skip

# %%
# The kernel that was found. Nothing was told about the camera's.

first, learned = (to_numpy(ddnref.nodes.project_simplex(p[0])).reshape(SIZE, SIZE) for p in (start, params))
kernels = {"at the start": first, "learned": learned, "the camera's": shake}
fig, axes = plt.subplots(1, 3, figsize=(8, 2.8), layout="constrained")
for ax, (title, kernel) in zip(axes, kernels.items(), strict=True):
    image(ax, kernel, title, cmap="gray_r", vmax=max(map(np.max, kernels.values())))
picture("kernels", fig, "The blur: where the light of one point went.",
        "Three kernels: at the start, learned, and the camera's",
        ["kernel", "row", *(f"column {j}" for j in range(SIZE))], kernels)  # fmt: skip
rows = [
    ("unknowns of each system", SIDE**2),
    ("iterations forward and backward, first step", f"{forward[0]:.0f} and {backward[0]:.0f}"),
    ("later steps, on average", f"{forward[1:].mean():.0f} and {backward[1:].mean():.0f}"),
    ("distance of the learned kernel from the camera's (0 to 2)", np.sum(np.abs(learned - shake))),
]
table("numbers", "The solves.", ("", "value"), rows, format=".2f")

# %%
# Before and after
# ----------------
# In decibels: peak signal to noise ratio, higher is better.

rows = []
fig, axes = plt.subplots(2, 4, figsize=(8, 4.5), layout="constrained")
for line, (label, (sharp, blurred)) in zip(axes, {"learned from": flower, "held out": temple}.items(), strict=True):
    before, after = (restore(*p, blurred, rtol=RTOL)[0] for p in (start, params))
    images = {"as taken": blurred, "restored, before": before, "restored, learned": after, "sharp": sharp}
    for ax, (title, pixels) in zip(line, images.items(), strict=True):
        if title != "sharp":
            rows.append((label, title, -10 * np.log10(float(xp.mean((pixels - sharp) ** 2)))))
            title = f"{title}\n{rows[-1][2]:.1f} dB"
        image(ax, to_numpy(pixels), title)
    line[0].set_ylabel(label)
picture("photographs", fig,
        "The photograph from which kernel and weight were learned, and another one, taken with the same shake.",
        "Two photographs, blurred, restored and sharp", ["photograph", "image", "decibels"], rows)  # fmt: skip
plt.show()
card(
    "A camera shook during the exposure. Learn from one photograph how it shook, and restore another.",
    axes[1],
    "x, _ = ddnref.linear_solve(system, b)\n(system_bar, b_bar), _ = ddnref.linear_solve_vjp(x_bar, x, system)",
    f"A photograph that was not learned from goes from {rows[3][2]:.1f} dB to {rows[5][2]:.1f} dB. Each step of "
    f"learning solves two systems of {SIDE**2} unknowns; its gradient is wrong by {error:.0e}.",
)

# %%
# In PyTorch
# ----------
# There ``linear_solve`` becomes one operation of the graph, and ``backward()`` calls the same VJP. Operators take
# tensors as they are; their parameters are in the open, so that PyTorch sees them. The gradient is that from above.


def in_pytorch(_):
    import torch

    from ddnref.interop.torch import differentiable

    solve = differentiable(ddnref.linear_solve, rtol=1e-12)
    project = differentiable(ddnref.nodes.project_simplex)
    theta, log_rho = (torch.tensor(to_numpy(p), requires_grad=True) for p in start)
    sharp, blurred = (torch.tensor(to_numpy(image)) for image in flower)

    blur = convolution(project(theta).reshape(SIZE, SIZE), sharp.shape)
    system = add(normal(blur), scaled(smoothness, log_rho.exp()), positive_definite=True)
    x, _ = solve(system, adjoint(blur)(blurred))
    torch.mean((x - sharp) ** 2).backward()

    found, expected = np.concat([theta.grad.numpy(), [log_rho.grad]]), to_numpy(direction)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


difference = figure("deblurring: gradient through the bridge", "PyTorch", in_pytorch)
check(f"gradient in {peers()['PyTorch']}: difference from the three VJPs", difference, 1e-7)
