r"""
Smoothing, with weights that are learned
========================================

A smoother balances two wishes: stay close to the data, and do not bend. How much each weighs is usually found by trial
and error. Here the weights are parameters with a gradient, and cross-validation chooses them: the numbers that are held
out say how good a smoother is, and one more system of equations says how to improve it. Both smoothers solve a banded
system in time linear in its size, `ddnref.solve_tridiagonal` and `ddnref.solve_block_tridiagonal`.
"""

# sphinx_gallery_thumbnail_number = 2

import matplotlib.pyplot as plt
import numpy as np
from scipy.interpolate import make_smoothing_spline
from scipy.optimize import minimize
from sklearn.datasets import load_sample_image, load_wine

import ddnref
from ddnref.examples import BLUE, GREEN, GREY, ORANGE, check, compare, picture, settings, table

convert, to_numpy = settings.backend.convert, settings.backend.to_numpy
rng = np.random.default_rng(settings.seed)

# %%
# A row of a photograph
# ---------------------
# One row of pixels, the sky on either side of a roof, with noise. Among all signals x, the smoother chooses the one
# with the smallest
#
# .. math:: \tfrac12 \sum_i m_i (x_i - y_i)^2 + \tfrac12 \sum_i w_i (x_{i+1} - x_i)^2 .
#
# Weights w that are all equal blur edges. *Total variation* has the weights :math:`w_i = \lambda / |x_{i+1} - x_i|`,
# which let a jump be a jump. They depend on the solution, so a few rounds of reweighting find both, with
# :math:`w_i = \lambda\, ((x_{i+1} - x_i)^2 + \delta^2)^{-1/2}` to stay finite. Every round is a tridiagonal system with
# the matrix :math:`\mathrm{diag}(m) + D^T \mathrm{diag}(w)\, D`, where D takes differences. Pixels with
# :math:`m_i = 0` are held out: the smoother does not see them.

ROW, NOISE, ROUNDS, FOLDS = 60, 0.1, 8, 5
clean = load_sample_image("china.jpg")[ROW, :, 1] / 255
n = len(clean)
noisy = clean + NOISE * rng.standard_normal(n)
seen = (np.arange(n) % FOLDS != np.arange(FOLDS)[:, None]).astype(float)  # each row leaves out another fifth


def bands(m, w):
    """Return the three bands of diag(m) + Dᵀ diag(w) D for any leading axes."""
    diagonal = np.array(np.broadcast_to(m, np.broadcast_shapes(m.shape, (*w.shape[:-1], n))))
    diagonal[..., :-1] += w
    diagonal[..., 1:] += w
    return tuple(map(convert, (-w, diagonal, -w)))


def smooth(m, log_lambda, log_delta, rounds=ROUNDS):
    """Return the smooth signal, and the function that maps its cotangent to the gradient in both logarithms."""
    lam, delta2 = np.exp(log_lambda), np.exp(2 * log_delta)
    x, tape = np.zeros((*m.shape[:-1], n)), []
    for _ in range(rounds):
        d = np.diff(x)
        s = d * d + delta2
        w = lam / np.sqrt(s)
        solved = ddnref.solve_tridiagonal(*bands(m, w), convert(m * noisy))
        tape.append((d, s, w, solved))
        x = to_numpy(solved)

    def pull(x_bar):
        log_lambda_bar = log_delta_bar = 0.0
        for d, s, w, solved in reversed(tape):
            lower_bar, diagonal_bar, upper_bar, _ = map(
                to_numpy, ddnref.solve_tridiagonal_vjp(convert(x_bar), solved, *bands(m, w))
            )
            # The weight of a difference is in two numbers on the diagonal and, negative, in one on either side.
            w_bar = diagonal_bar[..., :-1] + diagonal_bar[..., 1:] - lower_bar - upper_bar
            log_lambda_bar += np.sum(w_bar * w)
            log_delta_bar -= np.sum(w_bar * w * delta2 / s)
            d_bar = -w_bar * w * d / s  # of the signal of the round before
            x_bar = np.concatenate([-d_bar[..., :1], d_bar[..., :-1] - d_bar[..., 1:], d_bar[..., -1:]], axis=-1)
        return np.asarray([log_lambda_bar, log_delta_bar])

    return x, pull


# %%
# The five folds are a leading axis: five systems at a time. The loss is the mean square error of the pixels that are
# held out, and its gradient takes one more system per round, in the reverse order.


def held_out(parameters):
    """Return the error of cross-validation and its gradient."""
    x, pull = smooth(seen, *parameters)
    missing = (1 - seen) * (x - noisy)
    return np.sum(missing**2) / n, pull(2 * missing / n)


start = np.log([0.1, 0.1])
value, gradient = held_out(start)
slope = ddnref.testing.numerical_jvp(lambda p: np.asarray(held_out(p)[0]), start, gradient / np.linalg.norm(gradient))
check("gradient of cross-validation: error against finite differences", abs(slope / np.linalg.norm(gradient) - 1), 1e-7)

found = minimize(held_out, start, jac=True, method="L-BFGS-B", bounds=[np.log([1e-4, 10]), np.log([1e-3, 10])])
# A large delta makes all weights equal: the best blur, for comparison.
blur = minimize(
    lambda p: (lambda v, g: (v, g[:1]))(*held_out([p[0], np.log(10.0)])), [0.0], jac=True, method="L-BFGS-B"
)
every = np.ones(n)
restored, _ = smooth(every, *found.x)
blurred, _ = smooth(every, blur.x[0], np.log(10.0))

signals = {"noisy": noisy, "equal weights": blurred, "total variation": restored}
errors = {name: np.sqrt(np.mean((x - clean) ** 2)) for name, x in signals.items()}
cv = {"noisy": np.nan, "equal weights": np.sqrt(blur.fun), "total variation": np.sqrt(found.fun)}
table("numbers", "Distance from the row without noise, which no smoother saw, and from the pixels held out.",
      ("signal", "error", "held out"), [(name, errors[name], cv[name]) for name in signals], format=".4f")  # fmt: skip
print("Error of a row of pixels:", ", ".join(f"{name} {error:.3f}" for name, error in errors.items()))

fig, axes = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", sharex=True)
axes[0].plot(noisy, ".", color=GREY, markersize=3, label="noisy")
axes[0].plot(clean, color=GREEN, linewidth=1, label="without noise")
axes[1].plot(clean, color=GREEN, linewidth=1)
axes[1].plot(blurred, color=ORANGE, linewidth=1.3, label="equal weights")
axes[1].plot(restored, color=BLUE, linewidth=1.3, label="total variation")
for ax in axes:
    ax.set(ylabel="brightness")
    ax.legend(fontsize=9, loc="lower right", ncols=2)
axes[1].set(xlabel="pixel")
picture("row", fig,
        "Above, a row of a photograph with noise. Below, what two smoothers make of it, each with the weights "
        "that cross-validation found by its gradient.",
        "A noisy row of pixels, and the row smoothed with equal weights and by total variation",
        ["pixel", "clean", "noisy", "equal weights", "total variation"],
        list(zip(range(n), clean, noisy, blurred, restored, strict=True)))  # fmt: skip

# %%
# A smoothing spline
# ------------------
# How does the hue of a wine depend on the intensity of its colour? A smoothing spline minimises
#
# .. math:: \sum_i m_i (y_i - f(t_i))^2 + \lambda \int f''(t)^2\, dt
#
# over all functions. Its unknowns are value and slope at every knot. The integral over an interval of length h is the
# energy of a bent beam, a quadratic form in the values and slopes at both ends, so that the matrix is block tridiagonal
# with blocks of order two.

intensity, hue = load_wine().data[:, [9, 10]].T
intensity = np.round(intensity, 1)  # closer knots would only cost digits
t, group = np.unique(intensity, return_inverse=True)
fold = rng.integers(0, FOLDS, len(intensity))
part = fold != np.arange(FOLDS)[:, None]
count = np.stack([np.bincount(group, p, len(t)) for p in (*part, np.ones(len(intensity)))])
total = np.stack([np.bincount(group, p * hue, len(t)) for p in (*part, np.ones(len(intensity)))])

h = np.diff(t)
beam = np.stack([np.stack(row, axis=-1) for row in (
    (12 / h**3, 6 / h**2, -12 / h**3, 6 / h**2), (6 / h**2, 4 / h, -6 / h**2, 2 / h),
    (-12 / h**3, -6 / h**2, 12 / h**3, -6 / h**2), (6 / h**2, 2 / h, -6 / h**2, 4 / h),
)], axis=-2)  # fmt: skip
stiffness = np.zeros((len(t), 2, 2))
stiffness[:-1] += beam[:, :2, :2]
stiffness[1:] += beam[:, 2:, 2:]
below, above = beam[:, 2:, :2], beam[:, :2, 2:]
at_value = np.asarray([[1.0, 0.0], [0.0, 0.0]])


def spline(counts, totals, log_lambda):
    """Return the values at the knots, and the function that maps their cotangent to the gradient."""
    lam = np.exp(log_lambda)
    diagonal = lam * stiffness + counts[..., None, None] * at_value
    given = tuple(map(convert, (lam * below, diagonal, lam * above)))  # what all folds share has no leading axis
    f = ddnref.solve_block_tridiagonal(*given, convert(np.stack([totals, 0 * totals], axis=-1)))

    def pull(values_bar):
        f_bar = np.stack([values_bar, 0 * values_bar], axis=-1)
        bars = map(to_numpy, ddnref.solve_block_tridiagonal_vjp(convert(f_bar), f, *given))
        lower_bar, diagonal_bar, upper_bar, _ = bars
        moved = np.sum(lower_bar * below) + np.sum(diagonal_bar * stiffness) + np.sum(upper_bar * above)
        return lam * moved

    return to_numpy(f)[..., 0], pull


def spline_held_out(parameters):
    """Return the mean square error of the wines held out, and its derivative."""
    values, pull = spline(count[:-1], total[:-1], parameters[0])
    missing = np.where(part, 0, values[:, group] - hue)
    bars = np.stack([np.bincount(group, 2 * row / len(intensity), len(t)) for row in missing])
    return np.sum(missing**2) / len(intensity), np.asarray([pull(bars)])


value, gradient = spline_held_out([0.0])
slope = ddnref.testing.numerical_jvp(lambda p: np.asarray(spline_held_out(p)[0]), np.zeros(1), np.ones(1), step=1e-2)
check("gradient of the spline: error against finite differences", abs(slope / gradient[0] - 1), 1e-7)

best = minimize(spline_held_out, [0.0], jac=True, method="L-BFGS-B", bounds=[np.log([1e-6, 1e6])])
curve, _ = spline(count[-1], total[-1], best.x[0])
theirs = make_smoothing_spline(t, total[-1] / count[-1], w=count[-1], lam=np.exp(best.x[0]))
compare("spline: distance from SciPy's", curve, theirs(t), 1e-6)
print(f"Smoothing parameter of a spline, by cross-validation: {np.exp(best.x[0]):.3g}, {best.nfev} gradients")

grid = np.linspace(-9, 10, 25)
scores = [np.sqrt(spline_held_out([p])[0]) for p in grid]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", width_ratios=[1.4, 1])
axes[0].plot(intensity, hue, ".", color=GREY, markersize=3)
for p, colour, label in ((-9.0, ORANGE, "too little smoothing"), (best.x[0], BLUE, "cross-validation")):
    axes[0].plot(t, spline(count[-1], total[-1], p)[0], color=colour, linewidth=1.5, label=label)
axes[0].set(xlabel="intensity of the colour", ylabel="hue")
axes[0].legend(fontsize=9, loc="upper right")
axes[1].plot(np.exp(grid), scores, color=GREY)
axes[1].plot(np.exp(best.x[0]), np.sqrt(best.fun), "o", color=BLUE)
axes[1].set(xscale="log", xlabel="smoothing parameter", title="error of wines held out")
picture("spline", fig,
        "Left, hue against intensity of the colour of 178 wines, with two smoothing splines. Right, the error of wines "
        "held out against the smoothing parameter, and where the gradient led.",
        "Scattered data with a rough and a smooth curve, and an error curve with its minimum marked",
        ["smoothing parameter", "error of wines held out"], list(zip(np.exp(grid), scores, strict=True)))  # fmt: skip
plt.show()
