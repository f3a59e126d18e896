"""The model of the deblurring section: a kernel and a weight of smoothness, learned through the linear solver.

    b = Kᴴ y,   A = KᴴK + ρ DᴴD,   A x = b,   loss = mean (x − sharp)²

K is the periodic convolution with a kernel on the simplex, D the finite differences. Everything but the table of
numbers runs on the arrays of the report's backend.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_sample_image

import ddnref
from ddnref._core.arrays import Array
from ddnref.operators import LinearOperator
from ddnref.report.content import Context

SIDE, KERNEL, NOISE = 96, 9, 0.003
STEPS, RTOL = 60, 1e-6
RATES, DECAYS = (0.006, 0.3), (0.9, 0.98)  # of theta and of log rho; of Adam's two averages
LEARN, HELD_OUT = "flower.jpg", "china.jpg"
CORNERS = {LEARN: (160, 240), HELD_OUT: (60, 75)}


class Pair(NamedTuple):
    """A photograph as it is, and as the camera saw it."""

    sharp: Array
    blurred: Array


class Parameters(NamedTuple):
    """What is learned."""

    theta: Array
    """(KERNEL²,): the kernel before its projection onto the simplex."""
    log_rho: Array
    """(): the logarithm of the weight of smoothness."""


class Pass(NamedTuple):
    """Forward and backward at some parameters."""

    loss: Array
    bars: Parameters
    x: Array
    """The restored image."""
    y: Array
    """The solution of the adjoint system, from which the next one can start."""
    n_iter: tuple[Array, Array]


class Learned(NamedTuple):
    """The course of the learning."""

    passes: list[Pass]
    parameters: list[Parameters]


def photograph(name: str) -> NDArray[Any]:
    """A square of one of scikit-learn's photographs, in grey, from 0 to 1."""
    i, j = CORNERS[name]
    return np.asarray(np.mean(load_sample_image(name)[i : i + SIDE, j : j + SIDE], axis=-1) / 255)


def camera_shake() -> NDArray[Any]:
    """The kernel to be found: a diagonal line, a little out of focus."""
    i = np.arange(KERNEL) - KERNEL // 2
    along, across = (i[:, None] + i[None, :]) / 2, (i[:, None] - i[None, :]) / 2
    kernel = np.exp(-((across / 0.7) ** 2) - (along / 2.2) ** 4)
    return np.asarray(kernel / np.sum(kernel))


def pair(context: Context, name: str) -> Pair:
    """A photograph and its blurred and noisy version."""
    rng = np.random.default_rng([context.seed, len(name)])
    sharp = photograph(name)
    blurred = ddnref.operators.convolution(camera_shake(), sharp.shape)(sharp) + NOISE * rng.standard_normal(
        sharp.shape
    )
    return Pair(context.backend.convert(sharp), context.backend.convert(blurred))


def start(context: Context) -> Parameters:
    """A round blur, and little smoothness."""
    i = np.arange(KERNEL) - KERNEL // 2
    kernel = np.exp(-(i[:, None] ** 2 + i[None, :] ** 2) / 8)
    theta = (kernel / np.sum(kernel)).ravel()
    return Parameters(context.backend.convert(theta), context.backend.convert(np.asarray(math.log(3e-3))))


def kernel_of(p: Parameters) -> Array:
    """(KERNEL, KERNEL): non-negative, of sum one."""
    xp = array_api_compat.array_namespace(p.theta)
    return xp.reshape(ddnref.nodes.project_simplex(p.theta), (KERNEL, KERNEL))


def system(kernel: Array, rho: Array) -> tuple[LinearOperator, LinearOperator]:
    """The blur K, and ``A = KᴴK + ρ DᴴD``."""
    blur = ddnref.operators.convolution(kernel, (SIDE, SIDE))
    smooth = ddnref.operators.normal(ddnref.operators.difference((SIDE, SIDE)))
    return blur, ddnref.operators.add(
        ddnref.operators.normal(blur), ddnref.operators.scaled(smooth, rho), positive_definite=True
    )


def forward_and_backward(pair: Pair, p: Parameters, rtol: float, last: Pass | None = None) -> Pass:
    """The loss and its gradient: three VJPs, called in reverse."""
    xp = array_api_compat.array_namespace(p.theta)
    k, rho = kernel_of(p), xp.asarray(xp.exp(p.log_rho))
    blur, a = system(k, rho)
    blur_h = ddnref.operators.adjoint(blur)
    x, forward = ddnref.linear_solve(a, blur_h(pair.blurred), x0=last and last.x, rtol=rtol)
    error = x - pair.sharp

    x_bar = 2 / SIDE**2 * error
    ((k_bar, rho_bar), b_bar), backward = ddnref.linear_solve_vjp(x_bar, x, a, y0=last and last.y, rtol=rtol)
    k_bar = k_bar + blur_h.params_vjp(blur_h.params, b_bar, pair.blurred)[0]  # b = Kᴴ y depends on the kernel too
    theta_bar = ddnref.nodes.project_simplex_vjp(*(xp.reshape(z, p.theta.shape) for z in (k_bar, k)))
    bars = Parameters(theta_bar, rho_bar * rho)
    return Pass(xp.mean(error**2), bars, x, b_bar, (forward.n_iter, backward.n_iter))


def learn(context: Context, pair: Pair) -> Learned:
    """Adam; each solve starts from the last step's solution."""
    xp = array_api_compat.array_namespace(pair.sharp)
    p, last = start(context), None
    m, v = (tuple(map(xp.zeros_like, p)) for _ in range(2))
    passes, course = [], [p]
    for step in context.track(range(1, STEPS + 1), "learning to deblur"):
        last = forward_and_backward(pair, p, RTOL, last)
        m, v = (
            tuple(decay * a + (1 - decay) * g**power for a, g in zip(average, last.bars, strict=True))
            for decay, power, average in zip(DECAYS, (1, 2), (m, v), strict=True)
        )
        p = Parameters(*(_moved(step, *each) for each in zip(p, RATES, m, v, strict=True)))
        passes.append(last)
        course.append(p)
    return Learned(passes, course)


def _moved(step: int, q: Array, rate: float, m: Array, v: Array) -> Array:
    xp = array_api_compat.array_namespace(q)
    first, second = (1 - decay**step for decay in DECAYS)
    return q - rate * (m / first) / (xp.sqrt(v / second) + 1e-12)
