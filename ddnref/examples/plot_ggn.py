"""
Curvature of a network: its Gauss-Newton spectrum
=================================================

The generalised Gauss–Newton matrix of a network,

.. math:: G = \\frac1N \\sum_n J_n^T \\, \\nabla^2 \\ell_n \\, J_n = V V^T,

has a row for each parameter of the network, but no larger rank than :math:`V` has columns: one for each sample and
output. So its eigenvalues are those of the small Gram matrix :math:`V^T V`, and `ddnref.curvature.ggn_eigvalsh` forms
that layer by layer, without :math:`V`. The first example is a network so small that :math:`G` fits into memory. The
second learns to read digits, and its curvature shows how the spectrum changes, which digits it comes from, whether the
samples agree about the slopes, and what a Newton step costs.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import ddnref
from ddnref.examples import BLUE, GREY, ORANGE, card, check, picture, settings, track
from ddnref.examples._peers import figure, peers
from ddnref.reference import network_ggn
from ddnref.reference.ggn import flat, like_params
from ddnref.testing import numerical_jvp

array, host, compiled = settings.backend.convert, settings.backend.to_numpy, settings.backend.bind

# %%
# A network whose matrix fits
# ---------------------------
# Four samples, a network of widths 7-5-5-3 with ReLU, mean-squared error. It has 88 parameters and 4·3 outputs, so that
# all but twelve of the 88 eigenvalues are zero.

rng = np.random.default_rng(settings.seed)
x, t = array(rng.random((4, 7))), array(rng.random((4, 3)))
small = ddnref.networks.Chain.mlp(7, 5, 3, 3, activation="relu", loss="mse", gain=2**0.5, seed=settings.seed, like=x)
gram = host(compiled(lambda x, t: ddnref.curvature.ggn_eigvalsh(small, x, t, throw=False))(x, t))
dense = np.linalg.eigvalsh(host(compiled(lambda x, t: network_ggn(small, x, t))(x, t)))[::-1]
print("Gram, 12×12: ", " ".join(f"{w:.2g}" for w in gram))
print("dense, 88×88:", " ".join(f"{w:.2g}" for w in dense[:12]), "...")
spectrum_error = np.max(np.abs(gram - dense[:12])) / dense[0]
check("eigenvalues against the dense matrix", spectrum_error, 1e-13)

# %%
# A network that learns
# ---------------------
# Widths 64-32-32-10 with tanh: 3466 parameters, trained on most of the digits that come with scikit-learn by gradient
# descent with momentum. Between steps ``ddnref`` looks at the curvature on 100 of these samples. One Gram matrix serves
# the eigenvalues, the eigenvectors and the derivatives of every sample's loss along these; it is accumulated once by
# `ddnref.curvature.ggn_reducer`.

TRAIN = 1200
N = 100
LOOKS = (0, 3, 6, 10, 15, 22, 35, 60, 100)  # after how many steps the curvature is looked at
LATE = 60  # the step at which it is looked at closely, as at step 0
LEADING = 9  # eigenvectors looked at closely: one less than there are digits

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(settings.seed).permutation(len(labels))
images, labels = images[order] / 16, labels[order]
x, t = array(images[:TRAIN]), array(labels[:TRAIN])
start = ddnref.networks.Chain.mlp(64, 32, 10, 3, gain=0.6, seed=settings.seed, like=x)
gradient_at = compiled(lambda params: start.with_params(params).gradient(x, t, throw=False))

chain, velocity = start, [0.0 * p for p in start.params]
spectra, chains, ggns = [], {}, {}
for step in track(range(LOOKS[-1] + 1), "Learning, and looking at the curvature"):
    if step in LOOKS:
        reducer = ddnref.curvature.ggn_reducer(chain, subsampling=range(N))
        ggn = reducer.finalise(reducer.update(reducer.init(), x, t))  # of N samples, with the gradients of all
        spectra.append(host(ddnref.curvature.ggn_eigvalsh(ggn)))
        answers = np.argmax(host(chain.output(array(images[TRAIN:]))), axis=1)
        right = np.mean(answers == labels[TRAIN:])
        print(f"step {step:3}: loss {float(chain.loss(x, t)):.3f}, {right:.1%} of held-out digits recognised")
        if step in (0, LATE):
            chains[step], ggns[step] = chain, ggn
    velocity = [0.9 * v + g for v, g in zip(velocity, gradient_at(chain.params), strict=True)]
    chain = chain.with_params([p - 0.2 * v for p, v in zip(chain.params, velocity, strict=True)])

# %%
# The spectrum over training
# --------------------------
# The matrix has rank 900 at most: 100 samples, and one less than ten columns for each, because probabilities sum to
# one. At the start a gap follows the first nine eigenvalues, in blue. While the network learns, the largest grow and
# fall again, and the gap closes.

values = np.stack(spectra)
spectrum, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for i in range(40):
    left.plot(LOOKS, values[:, i], color=BLUE if i < 9 else GREY, linewidth=1.4 if i < 9 else 0.6)
left.set_xscale("symlog", linthresh=10)
left.set(yscale="log", xlabel="steps of training", title="the 40 largest, nine of them in blue")
left.set_xticks(LOOKS, map(str, LOOKS))
left.minorticks_off()
for i, colour in ((0, GREY), (len(LOOKS) // 2, BLUE), (-1, ORANGE)):
    right.loglog(np.arange(1, values.shape[1] + 1), values[i].clip(1e-20), color=colour, label=f"step {LOOKS[i]}")
right.axvline(9.5, color="black", linewidth=0.8, linestyle=":")
right.set(xlabel="number, the largest first", title="all of them", ylim=(1e-9, None))
right.legend(loc="lower left")
picture("spectrum", spectrum,
    "Eigenvalues while the network learns.",
    "Eigenvalues over the steps of training, and all of them at three steps",
    ("step", "number", "eigenvalue"),
    [(step, i + 1, float(w)) for step, row in zip(LOOKS, values, strict=True) for i, w in enumerate(row)])  # fmt: skip
print("ninth / tenth eigenvalue, step by step:", ", ".join(f"{row[8] / row[9]:.1f}" for row in values))

# %%
# Are they right?
# ---------------
# The eigenvectors are compared with products :math:`G e`, which `Chain.ggnvp` forms by passes forward and backward, and
# the slopes of the loss along them with finite differences.

w, e = ddnref.curvature.ggn_eigh(ggns[LATE], k=LEADING, method="full")
derivatives = {s: ddnref.curvature.ggn_directional_derivatives(g, k=N, method="full") for s, g in ggns.items()}
chain = chains[LATE]
e_flat, w = host(flat(e, LEADING)), host(w)
product = host(flat(chain.ggnvp(x[:N, ...], t[:N], e), LEADING))
pairs_error = np.max(np.abs(product - w[:, None] * e_flat)) / w[0]
check("eigenpairs: G e - λ e, over the largest eigenvalue", pairs_error, 1e-12)


def along(function):
    """The derivatives of a function of the network along all eigenvectors, by finite differences."""
    at = compiled(lambda theta: function(chain.with_params(like_params(chain, theta))))
    directions = flat(e, LEADING)
    return np.stack([host(numerical_jvp(at, flat(chain.params), directions[k, :])) for k in range(LEADING)])


slopes = along(lambda chain: chain.loss(x, t, throw=False))
gradient = {step: host(flat(each.gradient(x, t))) for step, each in chains.items()}
slopes_error = np.max(np.abs(slopes - np.mean(host(derivatives[LATE].first)[:, :LEADING], axis=0)))
slopes_error /= np.linalg.norm(gradient[LATE])
check("slopes against finite differences, over the size of the gradient", slopes_error, 1e-7)
card(
    "In which directions does the loss of a network curve while it learns, and how strongly?",
    spectrum,
    "w, e = ddnref.curvature.ggn_eigh(chain, x, t, k=10)",
    f"The {values.shape[1]} eigenvalues of a matrix of {len(e_flat[0])} rows that is never formed, to "
    f"{spectrum_error:.0e} of the largest. Nine stand out at first, one less than there are digits.",
)

# %%
# Which digits the curvature comes from
# -------------------------------------
# An eigenvalue is the mean of the curvatures of single samples along its eigenvector,
# :math:`\lambda_k = \frac1N \sum_n \lambda_{nk}`, and none of these is negative; so each digit has a share in it.
# The :math:`\lambda_{nk}` are ``derivatives.second``, and no eigenvector was formed for them. At the start every digit
# has about the share that it has among the samples; later some directions belong to one or two digits. Which answers
# trade places along a direction is seen from the change of the mean probability of each digit, on the right, divided by
# its largest entry, because the sign of an eigenvector is arbitrary.


def shares(step):
    """The part of each leading eigenvalue that is due to the samples of each digit; rows sum to one."""
    second = host(derivatives[step].second)[:, :LEADING]  # (N, 9)
    return second.T @ (labels[:N, None] == np.arange(10)) / np.sum(second, axis=0)[:, None]


p = np.exp(host(chain.output(x[:N, ...])))
p /= p.sum(axis=1, keepdims=True)
y_dot = along(lambda chain: chain.output(x[:N, ...]))  # (9, N, 10)
p_dot = p * (y_dot - np.sum(p * y_dot, axis=-1, keepdims=True))
second = host(derivatives[LATE].second)[:, :LEADING]
check("curvature of each sample against finite differences",
      np.max(np.abs(np.sum(p_dot * y_dot, axis=-1).T - second)) / np.max(second), 1e-7)  # fmt: skip
change = p_dot.mean(axis=1)
change /= np.take_along_axis(change, np.abs(change).argmax(axis=1)[:, None], axis=1)

parts = {"share at step 0": shares(0), f"share at step {LATE}": shares(LATE), "change of probability": change}
high = max(part.max() for part in parts.values() if part is not change)
fig, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained")
for ax, (title, part) in zip(axes, parts.items(), strict=True):
    colours, low, top = ("RdBu_r", -1, 1) if part is change else ("Blues", 0, high)
    shown = ax.imshow(part, cmap=colours, vmin=low, vmax=top, aspect="auto")
    ax.set(xticks=range(10), yticks=range(LEADING), title=title, xlabel="digit")
    ax.grid(visible=False)
    fig.colorbar(shown, ax=ax)
axes[0].set_yticklabels([f"$e_{{{k + 1}}}$" for k in range(LEADING)])
picture("classes", fig,
    "The part of each of the first nine eigenvalues that is due to the images of each digit, before learning and at "
    f"step {LATE}, and the change of the mean probability of each digit along the eigenvectors at that step.",
    "Shares of the digits in nine eigenvalues, before and during learning, and changes of their probabilities",
    ("quantity", "eigenvector", *(f"digit {digit}" for digit in range(10))),
    [(name, k + 1, *map(float, row)) for name, part in parts.items() for k, row in enumerate(part)])  # fmt: skip

# %%
# Signal and noise of the slopes
# ------------------------------
# Every sample has its slope along each direction, :math:`\gamma_{nk} = e_k^T g_n`, and their mean is that of the loss.
# The ratio :math:`\mathrm{mean}_n(\gamma_{nk})^2 / \mathrm{var}_n(\gamma_{nk})` says whether the samples agree: at
# the dotted line, one over the number of samples, the mean is as large as its standard error; below, it is lost in the
# noise. The directions are those of the curvature of 100 samples.

ratios, inside = {}, {}
for step, found in derivatives.items():
    first = host(found.first)  # (TRAIN, N)
    ratios[step] = np.mean(first, axis=0) ** 2 / np.var(first, axis=0, ddof=1)
    inside[step] = np.cumsum(np.mean(first, axis=0) ** 2) / np.sum(gradient[step] ** 2)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for step, colour in ((0, GREY), (LATE, BLUE)):
    left.loglog(np.arange(1, N + 1), ratios[step], ".", color=colour, label=f"step {step}")
    right.semilogx(np.arange(1, N + 1), inside[step], color=colour, label=f"step {step}")
left.axhline(1 / TRAIN, color="black", linewidth=0.8, linestyle=":")
left.set(xlabel="direction, the most curved first", title="signal to noise of the slope")
right.set(xlabel="directions, from the first on", title="share of the squared gradient", ylim=(0, 1))
right.legend(loc="upper left")
picture("noise", fig,
    "Signal to noise ratio of the slopes along each eigenvector, and the share of the squared gradient in the first.",
    "Signal to noise ratio of the slopes along the eigenvectors, and their share of the gradient",
    ("direction", "ratio before", f"ratio at step {LATE}", "share before", f"share at step {LATE}"),
    [(k + 1, *(float(part[step][k]) for part in (ratios, inside) for step in (0, LATE))) for k in range(N)],
)  # fmt: skip
for step in (0, LATE):
    clear, first, all_of_them = np.mean(ratios[step] > 1 / TRAIN), inside[step][8], inside[step][-1]
    print(f"step {step}: the mean exceeds its standard error in {clear:.0%} of directions; {first:.0%} of the squared")
    print(f"         gradient lies in the first nine, {all_of_them:.0%} in all {N}")

# %%
# At the start the samples agree most in the directions after the ninth, and that is where the gradient lies. Later they
# pull in opposite ways in most directions, and more than half of the remaining gradient lies outside all of them.
#
# Damped Newton against gradient descent
# --------------------------------------
# The step :math:`s = -\sum_k \gamma_k / (\lambda_k + \delta)\, e_k` is zero outside the span of the eigenvectors. So
# all of them are taken, but of a cheaper matrix: 300 samples, new ones at each step, and one random combination of each
# sample's columns in place of nine, ``mc_samples=1``. The gradient is that of all samples, as in the two ways of
# gradient descent beside it. Each was tried at a few rates, or dampings; the best is shown.

STEPS = {"gradient descent": 200, "with momentum": 200, "damped Newton": 20}
SUBSAMPLE = 300


def course(method):
    """The loss, and the seconds spent, after each step."""
    chain, velocity, losses, seconds = start, [0.0 * p for p in start.params], [], [0.0]
    rate, momentum = (1.0, 0.0) if method == "gradient descent" else (0.5, 0.9)
    rng = np.random.default_rng(settings.seed)
    for i in range(STEPS[method]):
        losses.append(float(chain.loss(x, t)))
        begun = time.perf_counter()
        if method == "damped Newton":
            samples = rng.choice(TRAIN, SUBSAMPLE, replace=False).tolist()
            options = {"damping": 0.1, "subsampling": samples, "mc_samples": 1, "seed": i}
            s = ddnref.curvature.ggn_damped_newton(chain, x, t, **options)
        else:
            velocity = [momentum * v + g for v, g in zip(velocity, gradient_at(chain.params), strict=True)]
            s = [-rate * v for v in velocity]
        chain = chain.with_params([p + s_p for p, s_p in zip(chain.params, s, strict=True)])
        seconds.append(seconds[-1] + time.perf_counter() - begun)
    return [*losses, float(chain.loss(x, t))], seconds


fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
courses = {method: course(method) for method in track(list(STEPS), "Newton against gradient descent")}
for (method, (losses, seconds)), colour in zip(courses.items(), (GREY, ORANGE, BLUE), strict=True):
    left.semilogy(losses, color=colour, label=method)
    right.semilogy(seconds, losses, color=colour)
    below = next((i for i, loss in enumerate(losses) if loss < 0.2), len(losses) - 1)
    each = 1e3 * seconds[-1] / STEPS[method]
    print(f"{method:16}: {each:5.1f} ms per step; loss {losses[below]:.2f} after {below} steps, {seconds[below]:.2f} s")
left.set(xlabel="steps", ylabel="loss on the training set")
right.set(xlabel="seconds of computation")
left.legend()
picture("newton", fig,
    "The loss over steps and over seconds.",
    "Loss of gradient descent, with and without momentum, and of damped Newton steps",
    ("method", "step", "loss", "seconds"),
    [(method, i, *row) for method, found in courses.items() for i, row in enumerate(zip(*found, strict=True))],
)  # fmt: skip
plt.show()

# %%
# Counted in steps, Newton is first. But a step decomposes a matrix of 300 columns and costs many steps of the others.
# In seconds, this small network learns sooner by gradient descent with momentum. The Gram matrix is worth its cost here
# for what it shows of the curvature, not for the time it saves.

# %%
# From PyTorch in three lines
# ---------------------------
# A chain is made of a module of PyTorch by ``Chain.from_torch``. The weights are not copied: the chain reads those of
# the module, and sees every later step of an optimiser. For the matrix itself, :func:`torch.func.jacrev`; the loss is
# a mean over 4·3 squares, so that its second derivative by the outputs is 2/12 times the identity.


def from_pytorch(_):
    import torch
    from torch import nn

    torch.manual_seed(settings.seed)
    z, s = torch.rand(4, 7).double(), torch.rand(4, 3).double()
    module = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()

    chain = ddnref.networks.Chain.from_torch(module, loss=nn.MSELoss())
    w, v = ddnref.curvature.ggn_eigh(chain, z, s, k=3)
    print("an eigenvector, parameter by parameter:", [tuple(e.shape[1:]) for e in v])

    weights = {name: p.detach() for name, p in module.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(module, p, (z,)))(weights)
    rows = torch.cat([j.reshape(12, -1) for j in jacobian.values()], dim=1)
    dense = torch.linalg.eigvalsh(2 / 12 * rows.T @ rows).flip(0)
    return torch.max(torch.abs(w - dense[:3])) / dense[0]


error = figure("ggn: eigenvalues against the Jacobian", "PyTorch", from_pytorch)
check(f"eigenvalues against the Jacobian of {peers()['PyTorch']}", error, 1e-13)
