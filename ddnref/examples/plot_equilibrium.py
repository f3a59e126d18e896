r"""
An equilibrium layer, and how exact its gradient is
===================================================

A *deep-equilibrium layer* returns the fixed point of one layer in place of the output of many,
:math:`z = \tanh(W z + U x + b)`. Its gradient needs no step of the iteration that found it: the condition that z
satisfies is enough. `ddnref.implicit.custom_root` takes that condition and any solver. Here the layer learns to read
digits, and then we stop its solver early and watch the gradient.
"""

import array_api_compat
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, check, picture, settings, table, track

convert, to_numpy = settings.backend.convert, settings.backend.to_numpy
rng = np.random.default_rng(settings.seed)

# %%
# The layer
# ---------
# Its condition is :math:`r(z) = z - \tanh(W z + U x + b) = 0`, with as many equations as unknowns. PyTorch and JAX
# differentiate a residual by themselves. Here it is written for any array library, so its two derivatives are as well:
# the gradient of :math:`w^T r`, and the tangent of r.


def cell(z, x, w, u, b):
    """Apply the layer once."""
    xp = array_api_compat.array_namespace(z)
    return xp.tanh(z @ w.T + x @ u.T + b)


def residual(z, x, w, u, b):
    """Return zero where z is the fixed point."""
    return z - cell(z, x, w, u, b)


def residual_vjp(r_bar, z, x, w, u, b):
    """Return the gradient of the residual's product with `r_bar`, in z and in every input."""
    xp = array_api_compat.array_namespace(z)
    s = -(1 - cell(z, x, w, u, b) ** 2) * r_bar
    return r_bar + s @ w, s @ u, s.T @ z, s.T @ x, xp.sum(s, axis=0)


def residual_jvp(z_dot, x_dot, w_dot, u_dot, b_dot, z, x, w, u, b):
    """Return the tangent of the residual."""
    moved = z_dot @ w.T + z @ w_dot.T + x_dot @ u.T + x @ u_dot.T + b_dot
    return z_dot - (1 - cell(z, x, w, u, b) ** 2) * moved


# %%
# The solver applies the layer as often as it is told. One decoration makes it differentiable. The last axis of z is one
# problem and the axis in front of it the batch: ``axes=1``.


@ddnref.implicit.custom_root(residual, residual_vjp=residual_vjp, residual_jvp=residual_jvp, axes=1)
def equilibrium(x, w, u, b, steps=60):
    """Return the fixed point, by so many steps."""
    xp = array_api_compat.array_namespace(x)
    drive = x @ u.T + b
    z = xp.zeros_like(drive)
    for _ in range(steps):
        z = xp.tanh(z @ w.T + drive)
    return z


# %%
# Reading digits
# --------------
# A sixth of scikit-learn's handwritten digits are for training, and half of them for the test. A matrix W of norm 0.9
# makes the layer a contraction, so that there is exactly one fixed point. Its free parameter is a matrix A with
# :math:`W = 0.9\, A / \|A\|_F`. A linear map turns z into ten scores. The gradient of the loss in z goes to
# ``equilibrium.vjp``, and Adam takes the steps.

UNITS, EPOCHS, RATE, NORM = 16, 40, 0.03, 0.9
images, labels = load_digits(return_X_y=True)
images = images / 16
train, test = images[::6], images[1::2]
wanted, expected = labels[::6], labels[1::2]
one_hot = np.eye(10)[wanted]

parameters = {
    "a": rng.standard_normal((UNITS, UNITS)),
    "u": 0.1 * rng.standard_normal((UNITS, 64)),
    "b": np.zeros(UNITS),
    "v": 0.1 * rng.standard_normal((10, UNITS)),
}


def layer_of(p):
    """Return the arrays of the layer."""
    return tuple(map(convert, (NORM * p["a"] / np.linalg.norm(p["a"]), p["u"], p["b"])))


def loss(p):
    """Return the cross-entropy and its gradient in every parameter."""
    arrays = convert(train), *layer_of(p)
    z = equilibrium(*arrays)
    scores = to_numpy(z) @ p["v"].T
    q = np.exp(scores - scores.max(axis=-1, keepdims=True))
    q /= q.sum(axis=-1, keepdims=True)
    scores_bar = (q - one_hot) / len(train)
    (_, w_bar, u_bar, b_bar), _ = equilibrium.vjp(convert(scores_bar @ p["v"]), z, *arrays)
    w_bar, size = to_numpy(w_bar), np.linalg.norm(p["a"])
    a_bar = NORM * (w_bar / size - p["a"] * np.sum(w_bar * p["a"]) / size**3)
    gradient = {"a": a_bar, "u": to_numpy(u_bar), "b": to_numpy(b_bar), "v": scores_bar.T @ to_numpy(z)}
    return -np.mean(np.log(q[np.arange(len(q)), wanted])), gradient


def accuracy(p):
    """Return the fraction of the test's digits that are read right."""
    scores = to_numpy(equilibrium(convert(test), *layer_of(p))) @ p["v"].T
    return np.mean(np.argmax(scores, axis=-1) == expected)


value, gradient = loss(parameters)
direction = {name: g / np.linalg.norm(g) for name, g in gradient.items()}
for name in ("a", "u"):
    moved = [loss({**parameters, name: parameters[name] + h * direction[name]})[0] for h in (-1e-5, 1e-5)]
    slope = (moved[1] - moved[0]) / 2e-5
    check(f"gradient in {name.upper()}: error against finite differences",
          abs(slope / np.linalg.norm(gradient[name]) - 1), 1e-5)  # fmt: skip

means, squares, losses, scores = {}, {}, [], [accuracy(parameters)]
for t in track(range(1, EPOCHS + 1), "epochs"):
    value, gradient = loss(parameters)
    losses.append(value)
    for name, g in gradient.items():
        means[name] = 0.9 * means.get(name, 0) + 0.1 * g
        squares[name] = 0.999 * squares.get(name, 0) + 0.001 * g * g
        step = means[name] / (1 - 0.9**t) / (np.sqrt(squares[name] / (1 - 0.999**t)) + 1e-8)
        parameters[name] = parameters[name] - RATE * step
    scores.append(accuracy(parameters))
print(f"Digits read right by an equilibrium layer of 16 units: {100 * scores[-1]:.1f} % of {len(test)}")

# %%
# Stopping early
# --------------
# Now the trained layer solves for 20 digits, and its iteration stops after k steps. A loss :math:`\sum c \circ z` with
# random numbers c has three gradients with respect to W, to be compared with that at the fixed point:
#
# - of the k *recorded steps*, by backpropagation through the iteration;
# - of the *condition at z*, the formula of implicit differentiation evaluated where the iteration stopped;
# - of ``custom_root``, which takes one Newton step first. It needs that step anyway, to see whether z is a solution: if
#   the step is longer than a hundredth of z, there is no gradient but an error.

x, (w, u, b) = images[2:22], map(to_numpy, layer_of(parameters))
exact = equilibrium.solver(x, w, u, b, steps=500)
c = rng.standard_normal(exact.shape)


def recorded(steps):
    """Return the gradient by backpropagation through the steps."""
    states = [np.zeros_like(exact)]
    for _ in range(steps):
        states.append(cell(states[-1], x, w, u, b))
    z_bar, w_bar = c, np.zeros_like(w)
    for before, after in zip(states[-2::-1], states[:0:-1], strict=True):
        s_bar = (1 - after**2) * z_bar
        w_bar += s_bar.T @ before
        z_bar = s_bar @ w
    return w_bar


def at(z):
    """Return the gradient by the condition at z, with dense matrices."""
    slopes = 1 - cell(z, x, w, u, b) ** 2
    system = np.eye(UNITS) - slopes[:, :, None] * w
    found = np.linalg.solve(system.mT, c[..., None])[..., 0]
    return (slopes * found).T @ z


def corrected(z):
    """Return the gradient by `custom_root`, NaN where it is refused."""
    arrays = map(convert, (c, z, x, w, u, b))
    (_, w_bar, _, _), _ = equilibrium.vjp(*arrays, throw=False)
    return to_numpy(w_bar)


truth = at(exact)
rows = []
for steps in range(1, 41):
    z = equilibrium.solver(x, w, u, b, steps=steps)
    distance = np.linalg.norm(z - exact) / np.linalg.norm(exact)
    rows.append((steps, distance, *(np.linalg.norm(g - truth) / np.linalg.norm(truth)
                                    for g in (recorded(steps), at(z), corrected(z)))))  # fmt: skip
check("gradient of the converged layer: error", rows[-1][4], 1e-9)
names = ["steps", "error of z", "recorded steps", "condition at z", "custom_root"]
table("early", "Relative errors after k steps; NaN where custom_root refuses a point that is no solution.",
      names, [rows[i] for i in (1, 3, 7, 11, 15, 23)])  # fmt: skip

fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), layout="constrained", width_ratios=[1, 1.3])
axes[0].plot(losses, color=GREY, label="loss")
axes[0].plot(scores, color=BLUE, label="digits read right")
axes[0].set(xlabel="epoch")
axes[0].legend(fontsize=9)
columns = np.asarray(rows).T
for i, colour in ((1, GREY), (2, ORANGE), (3, GREEN), (4, BLUE)):
    axes[1].semilogy(columns[0], columns[i], color=colour, label=names[i], linewidth=1.6)
axes[1].set(xlabel="steps of the iteration", title="relative error", ylim=(5e-17, 5))
axes[1].legend(fontsize=9)
picture("early", fig,
        "Left, training. Right, the error of the fixed point after k steps, and of three gradients there.",
        "A falling loss and a rising accuracy; four falling error curves, that of custom_root the steepest",
        names, rows)  # fmt: skip
plt.show()
