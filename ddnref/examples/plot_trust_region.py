"""
A trust region for deep networks, and kinks that count
======================================================

Second-order methods have a bad name in deep learning: they stall where plain gradients go on. Two things help. One is a
trust region, with the absolute values of the curvatures along which a step goes: `ddnref.curvature.trust_region_step`.
The other one, for ReLUs, is second derivatives that see the kinks: `ddnref.networks.Chain.smoothed`. Here one fixed
batch of 64 patches of photographs is learned by heart by a network of 22,128 weights, and eight patches by one of 100
layers, beside gradient descent, Adam, a damped Newton method and SciPy's minimiser, by steps and by seconds.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_sample_images

import ddnref
from ddnref.curvature import hessian_factor, trust_region_step
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, settings

GOAL = 1e-5
STEPS = 60 if settings.full else 45  # of the trust region
FIRST = 1000 if settings.full else 300  # of first-order methods
NEWTON = 60 if settings.full else 5

# %%
# Data
# ----
# Patches of 32 x 32 pixels from scikit-learn's two photographs, averaged to 16 x 16 pixels of three colours. The class
# of a patch is its photograph and one of five vertical bands. Patches keep a distance of 4.5, because nearly equal
# patches with different labels cannot be learned by heart.

photographs = [image / 255 for image in load_sample_images().images]


def patches(n, seed):
    rng, x, t = np.random.default_rng(seed), [], []
    while len(x) < n:
        i = rng.integers(2)
        height, width, _ = photographs[i].shape
        row, column = rng.integers(height - 32), rng.integers(width - 32)
        pixels = photographs[i][row : row + 32, column : column + 32]
        patch = pixels.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)).ravel()
        if all(np.linalg.norm(patch - other) >= 4.5 for other in x):
            x.append(patch)
            t.append(5 * i + min(4, 5 * (column + 16) // width))
    return np.asarray(x), np.asarray(t)


# %%
# The methods
# -----------
# With the gradient g, the Hessian H and the radius r a step p solves
#
# .. math:: \min_{\|p\| \leq r}\; g^T p + \tfrac12 p^T |H| p .
#
# The loop around it is the textbook's: the radius is quartered where the loss falls by less than a quarter of
# what the model predicts, and doubled where it falls by more than three quarters and the step ended on the boundary.
# A step takes 30 Hessian-vector products.


def trust_region(chain, x, t, steps, smooth=False, radius=0.1):
    course, begun = [], time.process_time()
    loss, gradient = chain.loss_and_gradient(x, t)
    for _ in range(steps):
        course.append((time.process_time() - begun, float(loss)))
        if loss <= GOAL:
            break
        model = chain.smoothed(0.2, x) if smooth else chain
        h = model.hessian_operator(x, t, throw=False)
        p, info = trust_region_step(h, chain.flatten(gradient), radius, model="absolute")
        new = moved(chain, p)
        new_loss = new.loss(x, t)
        ratio = float((loss - new_loss) / info.predicted)
        if not ratio >= 0.25:
            radius /= 4
        elif ratio > 0.75 and info.boundary:
            radius *= 2
        if ratio > 1e-4:
            chain = new
            loss, gradient = chain.loss_and_gradient(x, t)
    return np.asarray(course)


def moved(chain, step):
    return chain.with_params(chain.unflatten(chain.flatten(chain.params) + step))


def first_order(chain, x, t, steps, rate, adam=False):
    course, begun, m, v = [], time.process_time(), 0.0, 0.0
    for k in range(1, steps + 1):
        loss, gradient = chain.loss_and_gradient(x, t)
        course.append((time.process_time() - begun, float(loss)))
        g = chain.flatten(gradient)
        if adam:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            g = m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        chain = moved(chain, -rate * g)
    return np.asarray(course)


def damped_newton(chain, x, t, steps, damping=1.0):
    """Solve with the exact factored Hessian; the damping follows the ratio of actual to expected decrease."""
    course, begun = [], time.process_time()
    loss, gradient = chain.loss_and_gradient(x, t)
    for _ in range(steps):
        course.append((time.process_time() - begun, float(loss)))
        step, _ = hessian_factor(chain, x, t, damping=damping).solve(gradient)
        s, g = chain.flatten(step), chain.flatten(gradient)
        expected = float(g @ s + damping * s @ s) / 2
        new = moved(chain, -s)
        new_loss = new.loss(x, t)
        ratio = float(loss - new_loss) / expected if expected > 0 else -1.0
        damping = damping / 4 if ratio > 0.75 else damping if ratio > 0.25 else 4 * damping
        if ratio > 1e-4:
            chain = new
            loss, gradient = chain.loss_and_gradient(x, t)
    return np.asarray(course)


def scipy_trust_krylov(chain, x, t, steps):
    course, begun = [], time.process_time()

    def at(theta):
        return chain.with_params(chain.unflatten(theta))

    def keep(theta):
        course.append((time.process_time() - begun, float(at(theta).loss(x, t))))
        if course[-1][1] <= GOAL:
            raise StopIteration

    keep(chain.flatten(chain.params))
    minimize(
        lambda theta: float(at(theta).loss(x, t)),
        chain.flatten(chain.params),
        jac=lambda theta: chain.flatten(at(theta).gradient(x, t)),
        hessp=lambda theta, v: chain.flatten(at(theta).hvp(x, t, chain.unflatten(v))),
        method="trust-krylov",
        callback=keep,
        options={"maxiter": steps},
    )
    return np.asarray(course)


def compared(chain, x, t, rates, newton, steps):
    """Return the courses of all methods; of first-order ones that with the rate that ends lowest."""
    courses = {}
    for name, adam in (("SGD", False), ("Adam", True)):
        tried = {rate: first_order(chain, x, t, FIRST, rate, adam) for rate in rates[name]}
        best = min(tried, key=lambda rate: np.nan_to_num(tried[rate][-1, 1], nan=np.inf))
        courses[f"{name}, rate {best:g}"] = tried[best]
    if newton:
        courses["damped Newton"] = damped_newton(chain, x, t, NEWTON)
    courses["trust-krylov, SciPy"] = scipy_trust_krylov(chain, x, t, 3 * steps if settings.full else steps)
    courses["trust region, |H|"] = trust_region(chain, x, t, steps)
    return courses


def told(title, courses):
    print(title)
    for name, course in courses.items():
        seconds, loss = course[-1]
        print(f"  {name:32} loss {loss:8.1e} after {len(course) - 1:4} steps, {seconds:5.1f} s")


# %%
# Tanh
# ----
# Seven layers of 24 units, and no biases. With an exact factorisation in each step, damped Newton gets few steps in the
# same time.

x, t = patches(64, seed=100)
options = {"bias": False, "gain": 2**0.5, "seed": 100}
rates = {"SGD": (0.03, 0.1, 0.3), "Adam": (3e-4, 1e-3, 3e-3)} if settings.full else {"SGD": (0.1,), "Adam": (1e-3,)}
tanh = compared(ddnref.networks.Chain.mlp(768, 24, 10, 8, **options), x, t, rates, newton=True, steps=STEPS)
told("tanh, 768-24x7-10", tanh)

# %%
# ReLU
# ----
# The Hessian of a ReLU network is that of the linear piece in which the weights are: it does not see the kinks that a
# step will cross, and the radius collapses. ``chain.smoothed(0.2, x)`` lets the second derivative of each activation be
# a bump of 0.2 times the root mean square of the layer's pre-activations. The network, its loss and its gradient stay
# as they are.

chain = ddnref.networks.Chain.mlp(768, 24, 10, 8, activation="relu", **options)
relu = {
    f"SGD, rate {rates['SGD'][0]:g}": first_order(chain, x, t, FIRST, rates["SGD"][0]),
    f"Adam, rate {rates['Adam'][0]:g}": first_order(chain, x, t, FIRST, rates["Adam"][0], adam=True),
    "trust region, |H|": trust_region(chain, x, t, STEPS),
    "trust region, |H|, kinks count": trust_region(chain, x, t, STEPS, smooth=True),
}
told("ReLU, 768-24x7-10", relu)

# %%
# 100 layers
# ----------
# Sixteen units in each layer, and eight patches, averaged to 4 x 4 grey pixels. The weights begin orthogonal, so that
# signals and gradients keep their length through the layers, up to what tanh takes away. With random normal weights
# the goal was not reached in sixty steps. A step takes about as long as forty gradients.

x, t = patches(8, seed=0)
x = x.reshape(8, 4, 4, 4, 4, 3).mean(axis=(2, 4, 5)).reshape(8, 16)
x = (x - x.mean(axis=0)) / x.std(axis=0)
rng = np.random.default_rng(0)
weights = [np.linalg.qr(rng.standard_normal((16, 16)))[0] for _ in range(99)]
weights.append(np.linalg.qr(rng.standard_normal((16, 10)))[0].T)
layers = [ddnref.networks.Dense(w, None, "tanh") for w in weights[:-1]]
chain = ddnref.networks.Chain([*layers, ddnref.networks.Dense(weights[-1], None, "identity")], "cross_entropy")
deep = compared(chain, x, t, rates, newton=settings.full, steps=STEPS if settings.full else 32)
told("tanh, 100 layers of 16", deep)

# %%
# One picture, against seconds.

colours = {
    "SGD": GREY,
    "Adam": ORANGE,
    "damped Newton": "#8a4f9e",
    "trust-krylov, SciPy": GREEN,
    "trust region, |H|": BLUE,
}
_, panels = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained")
for ax, (title, courses) in zip(panels, {"tanh": tanh, "ReLU": relu, "100 layers, tanh": deep}.items(), strict=True):
    for name, course in courses.items():
        kinks = name.endswith("kinks count")
        colour = colours.get(name.split(", rate")[0], BLUE)
        style = "-" if kinks or title != "ReLU" or colour != BLUE else ":"
        ax.loglog(course[1:, 0], course[1:, 1], style, color=colour, label=name)
    ax.set(title=title, xlabel="seconds")
    ax.legend(fontsize=7)
panels[0].set(ylabel="loss", ylim=(GOAL / 3, 5))
plt.show()

# %%
# What this shows, and what it does not
# -------------------------------------
# On the tanh network the trust region with ``|H|`` reaches 1e-5 in about thirty steps. A step costs as much as fifty
# gradients, so that Adam takes more than a thousand steps in that time. SciPy's minimiser takes fewer products and a
# fraction of the time for each step, and more steps. A damped Newton step with the exact Hessian is too expensive here,
# and too short. On the ReLU network everything depends on the kinks. The deep network is learned as well, if its
# weights begin orthogonal. A fixed batch learned by heart is no test of generalisation, and with a new batch at every
# step the model of one says little about the next.
