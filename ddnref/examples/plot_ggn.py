"""
Curvature of a network in PyTorch: its Gauss–Newton spectrum
============================================================

The generalised Gauss–Newton matrix of a network,

.. math:: G = \\frac1N \\sum_n J_n^T \\, \\nabla^2 \\ell_n \\, J_n = V V^T,

has as many rows as the network has parameters, but no larger rank than :math:`V` has columns: one for each sample and
output. So its eigenvalues are those of the small Gram matrix :math:`V^T V`, and `ddnref.curvature.ggn_eigvalsh` forms
that layer by layer, without :math:`V`. First a network so small that :math:`G` fits; then one that learns to read
digits, and what its curvature tells: how the spectrum changes, which digits it comes from, whether the samples agree
about the slopes, and what a Newton step costs.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import ddnref

BLUE, ORANGE, GREY = "#0067a5", "#c4501b", "#6b6b6b"

# %%
# From PyTorch in three lines
# ---------------------------
# Four samples, a network of widths 7-5-5-3 with ReLU, mean-squared error, in double precision.

torch.manual_seed(0)
x, t = torch.rand(4, 7).double(), torch.rand(4, 3).double()
module = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()

chain = ddnref.networks.Chain.from_torch(module, loss=nn.MSELoss())
w, v = ddnref.curvature.ggn_eigh(chain, x, t, k=3)
derivatives = ddnref.curvature.ggn_directional_derivatives(chain, x, t, k=3)

print("eigenvalues:", np.round(w.numpy(), 5))
print("an eigenvector, parameter by parameter:", [tuple(e.shape[1:]) for e in v])
print("slope of every sample's loss along the first:", np.round(derivatives.first[:, 0].numpy(), 3))

# %%
# The weights were not copied: the chain reads those of the module, and sees every later step of an optimiser.

for ours, theirs in zip(chain.params, module.parameters(), strict=True):
    assert ours.data_ptr() == theirs.data_ptr()

# %%
# The same from the matrix itself
# -------------------------------
# Here :math:`G` is small enough for :func:`torch.func.jacrev`. The loss is a mean over 4·3 squares, so that its second
# derivative by the outputs is 2/12 times the identity. With twelve outputs, all but twelve of the 88 eigenvalues are
# zero.

weights = {name: p.detach() for name, p in module.named_parameters()}
jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(module, p, (x,)))(weights)
rows = torch.cat([j.reshape(12, -1) for j in jacobian.values()], dim=1)
dense = torch.linalg.eigvalsh(2 / 12 * rows.T @ rows).flip(0)

gram = ddnref.curvature.ggn_eigvalsh(chain, x, t)
for ours, theirs in zip(gram, dense, strict=False):
    print(f"{ours:12.5e}   dense {theirs:12.5e}")
assert gram.shape == (12,)
assert torch.allclose(gram, dense[:12], rtol=1e-10, atol=1e-14)

# %%
# Eleven agree; the twelfth is zero to rounding in both, and so are all that come after it.

fig, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
ax.semilogy(np.arange(1, 25), dense[:24].abs(), ".", color=GREY, label="dense, 88×88")
ax.semilogy(np.arange(1, 13), gram.abs(), "o", color=BLUE, mfc="none", markersize=9, label="Gram, 12×12")
ax.set(xlabel="number, the largest first", ylabel=r"$|\lambda|$", xticks=range(2, 25, 2))
ax.legend(loc="upper right")
plt.show()

# %%
# A network that learns
# ---------------------
# Widths 64-32-32-10 with tanh: 3466 parameters, trained on 1200 of the digits that come with scikit-learn. PyTorch
# trains; between its steps ``ddnref`` looks at the curvature on 100 of these samples. One Gram matrix serves the
# eigenvalues, the eigenvectors and the derivatives: it is accumulated once by `ddnref.curvature.ggn_reducer`.

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
images, labels = torch.from_numpy(images[order] / 16), torch.from_numpy(labels[order])
x, t, x_test, t_test = images[:1200], labels[:1200], images[1200:], labels[1200:]
N = 100


def network():
    torch.manual_seed(0)
    layers = nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    return nn.Sequential(*layers).double()


def gauss_newton(chain):
    """The Gram matrix of the first N samples, with the gradients of all."""
    reducer = ddnref.curvature.ggn_reducer(chain, subsampling=range(N))
    return reducer.finalise(reducer.update(reducer.init(), x, t))


module = network()
chain = ddnref.networks.Chain.from_torch(module)
optimiser = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
LOOKS, EARLY, LATE = (0, 2, 4, 7, 12, 20, 35, 60, 100, 200), 0, 60
spectra, derivatives, squared = [], {}, {}
for step in range(LOOKS[-1] + 1):
    if step in LOOKS:
        ggn = gauss_newton(chain)
        spectra.append(ddnref.curvature.ggn_eigvalsh(ggn))
        if step in (EARLY, LATE):
            derivatives[step] = ddnref.curvature.ggn_directional_derivatives(ggn, k=N)
            squared[step] = sum(float((g**2).sum()) for g in chain.gradient(x, t))
        if step == LATE:
            w, v = ddnref.curvature.ggn_eigh(ggn, k=9)
            weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        right = (chain.output(x_test).argmax(dim=1) == t_test).double().mean()
        print(f"step {step:3}: loss {chain.loss(x, t):.3f}, {right:.1%} of held-out digits recognised")
    optimiser.zero_grad()
    nn.functional.cross_entropy(module(x), t).backward()
    optimiser.step()

# %%
# The spectrum over training
# --------------------------
# The curvature matrix has rank 900 at most: 100 samples, and one less than ten columns for each, because probabilities
# sum to one. At the start nine eigenvalues, as many, stand apart from the rest. While the network learns, the largest
# grow and fall again; the gap behind the ninth closes.

values = np.stack([w.numpy() for w in spectra])
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for i in range(40):
    left.plot(LOOKS, values[:, i], color=BLUE if i < 9 else GREY, linewidth=1.4 if i < 9 else 0.6)
left.set_xscale("symlog", linthresh=2)
left.set(yscale="log", xlabel="steps of training", title="the 40 largest, nine of them in blue")
left.set_xticks([0, 2, 10, 50, 200], ["0", "2", "10", "50", "200"])
left.minorticks_off()
for step, colour in ((0, GREY), (20, BLUE), (200, ORANGE)):
    w_step = values[LOOKS.index(step)]
    right.loglog(np.arange(1, 901), w_step.clip(1e-20), color=colour, label=f"step {step}")
right.axvline(9.5, color="black", linewidth=0.8, linestyle=":")
right.set(xlabel="number, the largest first", title="all 900", ylim=(1e-9, 20))
right.legend(loc="lower left")
plt.show()
print("ninth / tenth eigenvalue, step by step:", ", ".join(f"{w[8] / w[9]:.1f}" for w in values))

# %%
# Which digits the curvature comes from
# -------------------------------------
# An eigenvalue is the mean of what single samples curve along its eigenvector,
# :math:`\lambda_k = \frac1N \sum_n \lambda_{nk}`, and none of these is negative; so each class has a share in it.
# These are ``derivatives.second``, and no eigenvector was formed for them. Which answers trade places along a direction
# is seen with one: how the probabilities change, on average over the samples, by :func:`torch.func.jvp`. The same
# derivatives give :math:`\lambda_{nk}` a second time.

looked = derivatives[LATE]
of_digit = torch.nn.functional.one_hot(t[:N]).double()  # (N, 10)
shares = (looked.second[:, :9].T @ of_digit) / (N * looked.w[:9, None])  # (9, 10), rows of sum one

then = network()
then.load_state_dict(weights)


def output(p):
    return torch.func.functional_call(then, p, (x[:N],))


changes = []
for k in range(9):
    direction = {name: e[k] for name, e in zip(weights, v, strict=True)}
    y, y_dot = torch.func.jvp(output, (weights,), (direction,))
    p = y.softmax(dim=1)
    p_dot = p * (y_dot - (p * y_dot).sum(dim=1, keepdim=True))
    assert torch.allclose((p_dot * y_dot).sum(dim=1), looked.second[:, k], rtol=1e-8, atol=1e-12)
    changes.append(p_dot.mean(dim=0))
changes = torch.stack(changes)
changes = changes / changes.gather(1, changes.abs().argmax(dim=1, keepdim=True))

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for ax, picture, colours, limits, title in (
    (left, shares, "Blues", (0, float(shares.max())), "share of the curvature"),
    (right, changes, "RdBu_r", (-1, 1), "change of the mean probability"),
):
    shown = ax.imshow(picture, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    ax.set(xticks=range(10), yticks=range(9), title=title)
    ax.set_yticklabels([f"$e_{{{k + 1}}}$" for k in range(9)])
    ax.grid(visible=False)
    fig.colorbar(shown, ax=ax)
left.set_xlabel("digit shown")
right.set_xlabel("digit answered")
plt.show()
for k in range(3):
    a, b = shares[k].topk(2).indices.tolist()
    both = float(shares[k, [a, b]].sum())
    ends = f"{int(changes[k].argmax())} and {int(changes[k].argmin())}"
    print(f"e_{k + 1}: {both:.0%} of its curvature from {a} and {b}; probability moves between {ends}")

# %%
# Each row on the right is divided by its largest entry: an eigenvector has no sign of its own. Before anything is
# learned, each class has nearly the share in the curvature that it has among the samples:

for step, found in derivatives.items():
    share = (found.second[:, :9].T @ of_digit) / (N * found.w[:9, None])
    distance = float((share - of_digit.mean(dim=0)).abs().max())
    print(f"step {step}: share of curvature less share of the samples, at most {distance:.2f}")

# %%
# Signal and noise of the slopes
# ------------------------------
# Every sample has a slope of its own along each direction, :math:`\gamma_{nk} = e_k^T g_n`, and their mean is that of
# the loss. Whether it means anything, :math:`\mathrm{SNR}_k = \mathrm{mean}_n(\gamma_{nk})^2 / \mathrm{var}_n
# (\gamma_{nk})` tells: at :math:`1/N_g`, here of 1200 samples, mean and standard error are equal, the dotted line. The
# directions are those of the curvature of 100 samples.

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for step, colour in ((EARLY, GREY), (LATE, BLUE)):
    slopes = derivatives[step].first.numpy()  # (1200, 100)
    ratio = slopes.mean(axis=0) ** 2 / slopes.var(axis=0, ddof=1)
    inside = np.cumsum(slopes.mean(axis=0) ** 2) / squared[step]
    left.loglog(np.arange(1, N + 1), ratio, ".", color=colour, label=f"step {step}")
    right.semilogx(np.arange(1, N + 1), inside, color=colour, label=f"step {step}")
    print(f"step {step}: SNR above 1/N_g in {np.mean(ratio > 1 / len(x)):.0%} of directions; ", end="")
    print(f"{inside[8]:.0%} of the squared gradient in the first nine, {inside[-1]:.0%} in all {N}")
left.axhline(1 / len(x), color="black", linewidth=0.8, linestyle=":")
left.set(xlabel="direction", title="signal to noise of the slope")
right.set(xlabel="directions, from the first on", title="share of the squared gradient", ylim=(0, 1))
right.legend(loc="upper left")
plt.show()

# %%
# At the start the samples agree most in the directions after the ninth, and that is where the gradient lies. At step 60
# they pull in opposite ways nearly everywhere, and half of what gradient is left lies outside all these directions.

# %%
# Damped Newton against gradient descent
# --------------------------------------
# The step :math:`s = -\sum_k \gamma_k / (\lambda_k + \delta)\, e_k` is zero outside the span of the eigenvectors. At
# the start most of the gradient lies outside the leading ones, so all of them are taken, but of a cheaper matrix: 300
# samples, new ones at each step, and one random combination of each sample's columns in place of nine,
# ``mc_samples=1``. The gradient is that of all samples, as in the two ways of gradient descent beside it. Each was
# tried at a few rates, or dampings: 0.5 to 1.5, with momentum 0.2 to 0.5, damping 0.01 to 0.3. The best is shown;
# gradient descent at 1.5 and Newton steps with a damping of 0.03 or less run away.

STEPS = {"gradient descent": 200, "with momentum": 200, "damped Newton": 20}


def course(method):
    """The loss, and the seconds spent, after each step."""
    module, losses, seconds = network(), [], [0.0]
    chain = ddnref.networks.Chain.from_torch(module)
    rate, momentum = (1.0, 0.0) if method == "gradient descent" else (0.5, 0.9)
    optimiser = torch.optim.SGD(module.parameters(), lr=rate, momentum=momentum)
    rng = np.random.default_rng(0)
    for i in range(STEPS[method]):
        losses.append(float(chain.loss(x, t)))
        start = time.perf_counter()
        if method == "damped Newton":
            samples = rng.choice(len(x), 300, replace=False).tolist()
            options = {"damping": 0.1, "subsampling": samples, "mc_samples": 1, "seed": i}
            s = ddnref.curvature.ggn_damped_newton(chain, x, t, **options)
            for p, s_p in zip(chain.params, s, strict=True):
                p += s_p  # in place: the module moves too
        else:
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(x), t).backward()
            optimiser.step()
        seconds.append(seconds[-1] + time.perf_counter() - start)
    return [*losses, float(chain.loss(x, t))], seconds


fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for method, colour in zip(STEPS, (GREY, ORANGE, BLUE), strict=True):
    losses, seconds = course(method)
    left.semilogy(losses, color=colour, label=method)
    right.semilogy(seconds, losses, color=colour)
    below = next(i for i, loss in enumerate(losses) if loss < 0.2)
    each = 1e3 * seconds[-1] / STEPS[method]
    print(f"{method:16}: {each:5.1f} ms a step; below 0.2 after {below:2} steps, {seconds[below]:.2f} s")
left.set(xlabel="steps", ylabel="loss on the training set")
right.set(xlabel="seconds of computation")
left.legend()
plt.show()

# %%
# Counted in steps, Newton is first. But a step decomposes a matrix of 300 columns and costs many steps of the others,
# as the times say: in seconds, this small network learns sooner by gradient descent with momentum. What the Gram matrix
# gives here is the look at the curvature, not time.
