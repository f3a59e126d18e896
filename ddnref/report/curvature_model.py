"""The network of the curvature section: it learns to read digits, and its Gauss–Newton matrix is looked at meanwhile.

    G = V Vᵀ,  G e_k = λ_k e_k          eigenvalues and eigenvectors on some samples, through the Gram matrix VᵀV
    γ_nk = e_kᵀ g_n                     the slope of the loss of sample n along e_k
    λ_nk,  λ_k = mean_n λ_nk            its second derivative

Everything but the numbers that are shown runs on the arrays of the report's backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
from numpy.typing import NDArray

import ddnref
from ddnref._core.arrays import Array
from ddnref._kernels.dense import eigh
from ddnref.reference.ggn import flat, like_params
from ddnref.reference.network import network_ggn
from ddnref.report import digits
from ddnref.report.content import Context
from ddnref.testing import numerical_jvp

HIDDEN, LAYERS, GAIN = 32, 3, 0.6
RATE, MOMENTUM = 0.2, 0.9
LOOKS = (0, 3, 6, 10, 15, 22, 35, 60, 100)  # after how many steps the curvature is looked at
TRAIN, SAMPLES = 800, 100  # learned from; the curvature is that of the first of these
LEADING, DIRECTIONS = digits.CLASSES - 1, 60  # looked at closely; along which slopes are measured


class Data(NamedTuple):
    """Images ``(N, 64)`` and class indices ``(N,)``, to learn from and held out."""

    x: Array
    t: Array
    x_test: Array
    t_test: Array


class Look(NamedTuple):
    """On the host: the network at one step."""

    step: int
    loss: float
    accuracy: float
    """The share of the held-out digits that are recognised."""
    w: NDArray[Any]
    """Eigenvalues on the curvature's samples."""


class Slopes(NamedTuple):
    """On the host: derivatives along the leading eigenvectors."""

    first: NDArray[Any]
    """γ (TRAIN, DIRECTIONS)."""
    second: NDArray[Any]
    """λ (SAMPLES, DIRECTIONS)."""


class Learned(NamedTuple):
    """The course of the learning, and the networks at its start and its end."""

    looks: list[Look]
    start: ddnref.networks.Chain
    end: ddnref.networks.Chain


class Errors(NamedTuple):
    """Three checks, each against something that shares no code with what it checks."""

    spectrum: float
    """Largest difference from the eigenvalues of the dense matrix over the largest of these."""
    pairs: float
    """Largest entry of ``G e − λ e`` over the largest eigenvalue, G by passes forward and backward."""
    slopes: float
    """Largest difference from finite differences over the norm of the gradient."""


def prepare(context: Context) -> Data:
    """Digits as arrays of the backend."""
    convert = context.backend.convert
    train, test = digits.split(context.seed)
    return Data(*map(convert, (train.images[:TRAIN], train.labels[:TRAIN], test.images, test.labels)))


def learn(context: Context, data: Data) -> Learned:
    """Gradient descent with momentum on all images at once."""
    start = ddnref.networks.Chain.mlp(
        digits.PIXELS, HIDDEN, digits.CLASSES, LAYERS, gain=GAIN, seed=context.seed, like=data.x
    )  # fmt: skip
    gradient_at = context.backend.bind(lambda params: start.with_params(params).gradient(data.x, data.t, throw=False))
    chain, velocity = start, [0.0 * p for p in start.params]
    looks = [look(context, data, start, 0)]
    for step in context.track(range(1, LOOKS[-1] + 1), "Learning, and looking at the curvature"):
        velocity = [MOMENTUM * v + g for v, g in zip(velocity, gradient_at(chain.params), strict=True)]
        chain = chain.with_params([p - RATE * v for p, v in zip(chain.params, velocity, strict=True)])
        if step in LOOKS:
            looks.append(look(context, data, chain, step))
    return Learned(looks, start, chain)


def look(context: Context, data: Data, chain: ddnref.networks.Chain, step: int) -> Look:
    """Loss, accuracy, and the spectrum."""
    host = context.backend.to_numpy
    answers = np.argmax(host(chain.output(data.x_test)), axis=1)
    w = ddnref.curvature.ggn_eigvalsh(chain, data.x[:SAMPLES, ...], data.t[:SAMPLES])
    return Look(step, float(chain.loss(data.x, data.t)), float(np.mean(answers == host(data.t_test))), host(w))


def slopes(context: Context, data: Data, chain: ddnref.networks.Chain) -> Slopes:
    """Of all samples, along the eigenvectors on some."""
    host = context.backend.to_numpy
    found = ddnref.curvature.ggn_directional_derivatives(
        chain, data.x, data.t, k=DIRECTIONS, subsampling=range(SAMPLES), method="full"
    )  # fmt: skip
    return Slopes(host(found.first), host(found.second))


# --- what the numbers say -----------------------------------------------------------------------------------------


def shares(found: Slopes, labels: NDArray[Any]) -> NDArray[Any]:
    """The part of each leading eigenvalue that is due to the samples of each class ``(LEADING, CLASSES)``."""
    of_class = labels[: len(found.second), None] == np.arange(digits.CLASSES)
    second = found.second[:, :LEADING]
    part: NDArray[Any] = second.T @ of_class / np.sum(second, axis=0)[:, None]
    return part


def signal_to_noise(found: Slopes) -> NDArray[Any]:
    """``mean_n(γ_nk)² / var_n(γ_nk)`` of each direction."""
    ratio: NDArray[Any] = np.mean(found.first, axis=0) ** 2 / np.var(found.first, axis=0, ddof=1)
    return ratio


# --- checks -------------------------------------------------------------------------------------------------------


def check(context: Context, data: Data, chain: ddnref.networks.Chain) -> Errors:
    """A network small enough for its matrix, and the one that has learned."""
    return Errors(_spectrum_error(context), *_direction_errors(context, data, chain))


def _spectrum_error(context: Context) -> float:
    """Four samples, widths 7-5-5-3, ReLU, mean-squared error: 12 eigenvalues beside the largest of the dense 88."""
    rng = np.random.default_rng(context.seed)
    x, t = (context.backend.convert(rng.random((4, width))) for width in (7, 3))
    chain = ddnref.networks.Chain.mlp(
        7, 5, 3, 3, activation="relu", loss="mse", gain=math.sqrt(2), seed=context.seed, like=x
    )
    bind, host = context.backend.bind, context.backend.to_numpy
    w = host(bind(lambda x, t: ddnref.curvature.ggn_eigvalsh(chain, x, t, throw=False))(x, t))
    dense = host(bind(lambda x, t: eigh(network_ggn(chain, x, t))[0])(x, t))[::-1]
    return float(np.max(np.abs(w - dense[: len(w)])) / dense[0])


def _direction_errors(context: Context, data: Data, chain: ddnref.networks.Chain) -> tuple[float, float]:
    x, t = data.x[:SAMPLES, ...], data.t[:SAMPLES]
    xp = array_api_compat.array_namespace(x)
    bind = context.backend.bind
    w, v = bind(lambda x, t: ddnref.curvature.ggn_eigh(chain, x, t, k=LEADING, method="full", throw=False))(x, t)
    product = flat(bind(lambda x, t, v: chain.ggnvp(x, t, v, throw=False))(x, t, v), LEADING)
    e = flat(v, LEADING)
    pairs = xp.max(xp.abs(product - w[:, None] * e)) / w[0]

    first = bind(_slopes_along(chain))(x, t)
    theta = flat(chain.params)
    norm = math.sqrt(sum(float(xp.sum(g * g)) for g in chain.gradient(x, t)))
    loss = bind(lambda q: chain.with_params(like_params(chain, q)).loss(x, t, throw=False))
    differences = [float(numerical_jvp(loss, theta, e[k, :]) - xp.mean(first[:, k])) for k in range(LEADING)]
    return float(pairs), float(np.max(np.abs(differences))) / norm  # NaN if any is


def _slopes_along(chain: ddnref.networks.Chain) -> Callable[[Array, Array], Array]:
    def first(x: Array, t: Array) -> Any:
        return ddnref.curvature.ggn_directional_derivatives(chain, x, t, k=LEADING, method="full", throw=False).first

    return first
