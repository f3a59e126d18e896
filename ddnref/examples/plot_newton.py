"""
Newton's method on a network of 50 layers: where it helps and where it does not
===============================================================================

With `ddnref.curvature.hessian_factor` an exact Newton step for all weights of a deep narrow network costs about fifteen
gradients, so that textbook methods can be tried as they stand. Here are three of them in a few lines each, checked
against a dense matrix: damped Newton, a trust region by the secular equation, saddle-free Newton. Then the training of
50 layers on ten digits, against momentum and Adam, by steps and by time.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import brentq
from sklearn.datasets import load_digits

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, compare
from ddnref.reference import network_hessian
from ddnref.reference.ggn import flat

images, labels = load_digits(return_X_y=True)
x, t = images[:10] / 16, np.eye(10)[labels[:10]]  # one of each digit; the squared error of ten outputs
x = x - x.mean(axis=0)


def dot(u, v):
    return float(flat(u) @ flat(v))


def minus(chain, step):
    return chain.with_params([p - s for p, s in zip(chain.params, step, strict=True)])


# %%
# Three steps
# -----------
# A damped Newton step takes one factorisation and one solve, ``hessian_factor(...).solve(g)``.
#
# A trust region asks for the step of a given length :math:`r`, that is for the root of the *secular equation*
# :math:`\|(H + \varepsilon I)^{-1} g\| = r` above all poles, where :math:`H + \varepsilon I` is positive definite.
# Newton's method for :math:`1/r - 1/\|s(\varepsilon)\|`, which is nearly straight there, finds it in a few trials, with
# one factorisation each. The derivative takes one more solve,
#
# .. math:: \frac{\mathrm d}{\mathrm d\varepsilon} \|s\| = -\frac{\langle s, (H + \varepsilon I)^{-1} s\rangle}{\|s\|}.
#
# The inertia says on which side of the largest pole a trial lies. (The hard case, a gradient without any part along
# the lowest eigenvector, has no root; this loop would then end with a step that is too short.)


def trust_region(chain, x, t, r, epsilon, trials=40):
    g, low, high = chain.gradient(x, t), 0.0, np.inf
    for _ in range(trials):
        factor = ddnref.curvature.hessian_factor(chain, x, t, damping=epsilon)
        if factor.inertia().negative:  # below the largest pole
            low, epsilon = epsilon, min(4 * epsilon, (epsilon + high) / 2)
            continue
        step, _ = factor.solve(g)
        size = np.sqrt(dot(step, step))
        if abs(size - r) <= 1e-9 * r:
            break
        low, high = (low, epsilon) if size < r else (epsilon, high)
        toward, _ = factor.solve(step)
        epsilon += (size / r - 1) * size**2 / dot(step, toward)
        if not low < epsilon < high:
            epsilon = (low + high) / 2
    return step, epsilon


# %%
# Saddle-free Newton reverses the directions of negative curvature: :math:`(|H| + \varepsilon I)^{-1} g`. That is the
# damped step with the parts along the eigenvectors of negative eigenvalues replaced. Those are counted by inertia and
# found by shift and inversion; the ones above ``-cut`` are left as they are, which the cut says how much to trust.


def saddle_free(chain, x, t, epsilon, cut):
    g = chain.gradient(x, t)
    step, _ = ddnref.curvature.hessian_factor(chain, x, t, damping=epsilon).solve(g)
    (w, v), _ = ddnref.curvature.hessian_eigvals(chain, x, t, interval=(-np.inf, -cut))
    parts = sum(np.tensordot(a, b, axes=b.ndim) for a, b in zip(v, g, strict=True))
    weights = parts * (1 / (np.abs(w) + epsilon) - 1 / (w + epsilon))
    return [s + np.tensordot(weights, a, axes=1) for s, a in zip(step, v, strict=True)], len(w)


# %%
# Against the dense matrix, where there can be one: eight layers of width 6, six samples, the pixels reduced to their
# six principal components. SciPy too finds the root of the secular equation above all poles.

_, _, axes = np.linalg.svd(x, full_matrices=False)
z = x[:6] @ axes[:6].T
small = ddnref.networks.Chain.mlp(6, 6, 10, 8, gain=1.2, loss="mse")
H, g = network_hessian(small, z, t[:6]), flat(small.gradient(z, t[:6]))
w, V = np.linalg.eigh(H)
print(f"{len(w)} parameters, {np.sum(w < -1e-9)} negative eigenvalues, the lowest {w[0]:.4f}")

step, _ = ddnref.curvature.hessian_factor(small, z, t[:6], damping=0.5).solve(small.gradient(z, t[:6]))
compare("damped Newton", flat(step), V @ (V.T @ g / (w + 0.5)), 1e-9)
root = brentq(lambda epsilon: np.linalg.norm(V.T @ g / (w + epsilon)) - 0.5, -w[0] + 1e-6, 1e3, xtol=1e-14)
step, epsilon = trust_region(small, z, t[:6], r=0.5, epsilon=0.01)
compare(f"trust region, ε = {epsilon:.6f} > {-w[0]:.6f}", flat(step), V @ (V.T @ g / (w + root)), 1e-9)
step, turned = saddle_free(small, z, t[:6], 0.5, 1e-3)
compare(f"saddle-free, {turned} turned", flat(step), V @ (V.T @ g / (np.where(w < -1e-3, -w, w) + 0.5)), 1e-9)

# %%
# Training 50 layers
# ------------------
# 50 layers of width 8, tanh, weights of gain 1.2. The damping follows the ratio of the true decrease to the one that
# the quadratic model expects: quartered above 3/4, quadrupled below 1/4; the step is not taken below 1/1000. Each
# trial counts as a step. With ``curvature="ggn"`` the same loop is a Gauss–Newton method.

start = ddnref.networks.Chain.mlp(64, 8, 10, 50, gain=1.2, loss="mse")
print(sum(p.size for p in start.params), "parameters")
DECAY = 0.0  # of the weights


def objective(chain):
    loss, g = chain.loss_and_gradient(x, t)
    params = chain.params
    return loss + DECAY / 2 * dot(params, params), [a + DECAY * p for a, p in zip(g, params, strict=True)]


def second_order(chain, steps, curvature, epsilon=0.1):
    course, begun = [], time.process_time()
    loss, g = objective(chain)
    for _ in range(steps):
        course.append((time.process_time() - begun, float(loss)))
        factor = ddnref.curvature.hessian_factor(chain, x, t, damping=DECAY + epsilon, curvature=curvature)
        step, _ = factor.solve(g)
        expected = dot(g, step) / 2 + epsilon / 2 * dot(step, step)
        new = minus(chain, step)
        new_loss, new_g = objective(new)
        ratio = float(loss - new_loss) / expected if expected > 0 else -1.0
        if ratio > 0.75:
            epsilon /= 4
        elif not ratio > 0.25:
            epsilon *= 4
        if ratio > 1e-3:
            chain, loss, g = new, new_loss, new_g
    course.append((time.process_time() - begun, float(loss)))
    return np.array(course)


def first_order(chain, steps, rate, adam, state=None):
    course, begun = [], time.process_time()
    m, v, done = state or ([0 * p for p in chain.params], [0 * p for p in chain.params], 0)
    for k in range(done + 1, done + steps + 1):
        loss, g = objective(chain)
        course.append((time.process_time() - begun, float(loss)))
        m = [0.9 * a + b for a, b in zip(m, g, strict=True)]
        if adam:
            v = [0.999 * a + 0.001 * b**2 for a, b in zip(v, g, strict=True)]
            first, second = 0.1 * rate / (1 - 0.9**k), 1 - 0.999**k
            chain = minus(chain, [first * a / (np.sqrt(b / second) + 1e-8) for a, b in zip(m, v, strict=True)])
        else:
            chain = minus(chain, [rate * a for a in m])
    return np.array(course), (chain, (m, v, k))


# %%
# Momentum and Adam with two rates each, 600 steps; the picture has the rate with the lowest loss.

courses = {}
for name, rates in {"momentum": (1e-3, 1e-2), "Adam": (3e-4, 1e-3)}.items():
    tried = {f"{name}, rate {rate}": first_order(start, 600, rate, name == "Adam")[0] for rate in rates}
    best = min(tried, key=lambda label: tried[label][:, 1].min())
    courses[best] = tried[best]
courses["Gauss–Newton"] = second_order(start, 60, "ggn")
courses["Newton"] = second_order(start, 60, "hessian")


def draw(courses, colours):
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for (name, course), colour in zip(courses.items(), colours, strict=True):
        left.semilogy(np.arange(len(course)) + 1, course[:, 1], color=colour, label=name)
        right.semilogy(course[:, 0], course[:, 1], color=colour)
        each = course[-1, 0] / (len(course) - 1)
        print(f"{name}: {1000 * each:.0f} ms per step, {course[-1, 1]:.4f} after {course[-1, 0]:.1f} s")
    left.set(xscale="log", xlabel="steps", ylabel="objective")
    right.set(xlabel="seconds of processor time")
    left.legend(fontsize=8)


draw(courses, (GREY, ORANGE, GREEN, BLUE))

# %%
# By steps, Gauss–Newton is far ahead. By time it is not: a step costs what ten of Adam's do, the two run side by
# side, and Adam ends lower. Newton with the full Hessian is behind both from a random start, where the damping that
# makes its quadratic model believable is large, and many trials are refused.
#
# Late in training
# ----------------
# Where the loss no longer falls fast, curvature is what holds it back. Cross-entropy with a weight decay of 1e-3,
# after 1000 steps of Adam: Adam goes on, or Newton takes over. Weight decay is damping: the objective's Hessian is
# :math:`H + \rho I`, for which nothing has to be built.

DECAY, t = 1e-3, labels[:10]
start = ddnref.networks.Chain.mlp(64, 8, 10, 50, gain=1.2)
_, (chain, state) = first_order(start, 1000, 1e-3, adam=True)
on, _ = first_order(chain, 400, 1e-3, adam=True, state=state)
draw({"Adam goes on": on, "Newton": second_order(chain, 45, "hessian", epsilon=1.0)}, (ORANGE, BLUE))
plt.show()

# %%
# Here Newton is ahead by steps and by time. One network, one start, ten samples in one batch: no more is claimed. A
# step is linear in depth, but grows with the cube of samples × width, so that these methods are for networks that
# are deep and narrow and for small sets of samples; with a new batch at every step the model of one says little
# about the next.
