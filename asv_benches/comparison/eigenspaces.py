"""Losses of the projector on an eigenspace: eigenvalues far apart, close to each other, and equal."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._oracles import derivative, projector_below
from ._problem import Inputs, cell, problem

K = 3  # the loss depends on the eigenvectors of the three smallest eigenvalues
M = 8
CLOSEST = {"float64": 1e-14, "float32": 1e-7}


def symmetric(rng: np.random.Generator, m: int) -> np.ndarray:
    c = rng.standard_normal((m, m))
    return (c + c.T) / 2


def with_spectrum(rng: np.random.Generator, w: np.ndarray) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    q, _ = np.linalg.qr(rng.standard_normal((len(w), len(w))))
    x = (q * w) @ q.T
    return (x + x.T) / 2


def spread(rng: np.random.Generator, m: int) -> np.ndarray:
    """Draw ascending eigenvalues around zero whose gaps are between 0.5 and 1.5."""
    return np.cumsum(rng.uniform(0.5, 1.5, m)) - m / 2


def with_shift(x: np.ndarray, w: np.ndarray, c: np.ndarray) -> Inputs:
    return {"x": x, "c": c, "_shift": np.asarray((w[K - 1] + w[K]) / 2)}


def draw_regular(rng: np.random.Generator, _: str) -> Inputs:
    w = spread(rng, M)
    return with_shift(with_spectrum(rng, w), w, symmetric(rng, M))


def draw_close(rng: np.random.Generator, dtype: str) -> Inputs:
    w = spread(rng, M)
    gap = CLOSEST[dtype] ** rng.uniform(0.25, 1.0)
    w[1], w[2] = w[0] + gap, w[0] + 2 * gap
    return with_shift(with_spectrum(rng, w), w, symmetric(rng, M))


def draw_equal(rng: np.random.Generator, _: str) -> Inputs:
    """Draw eigenvalues and eigenvectors whose products are exact, so that three are equal for the machine too."""
    w = np.cumsum(rng.integers(1, 4, M)) / 2.0
    w[:K] = w[0]
    two = np.asarray([[1.0, 1.0], [1.0, -1.0]])
    q = np.kron(np.kron(two, two), two)[rng.permutation(M)] * rng.choice([-1.0, 1.0], M)
    x = (q * w) @ q.T / M if rng.random() < 0.5 else np.diag(rng.permutation(w))
    return with_shift(x, w, symmetric(rng, M))


def truth(i: Inputs) -> np.ndarray:
    """The gradient of tr(C f(X)) is the derivative of f along C, for symmetric X and C."""
    return derivative(lambda x: projector_below(x, i["_shift"]), i["x"], i["c"])


def large(rng: np.random.Generator) -> Inputs:
    return {"x": with_spectrum(rng, spread(rng, 64)), "c": symmetric(rng, 64)}


def cut() -> Inputs:
    """Make a matrix whose third and fourth eigenvalues are equal."""
    return {"x": np.diag([1.0, 2.0, 3.0, 3.0, 5.0, 6.0, 7.0, 8.0]), "c": symmetric(np.random.default_rng(1), M)}


COMMON: dict[str, Any] = {
    "truth": truth,
    "large": large,
    "large_text": "m = 64",
    "hard": cut,
    "hard_text": "the third and the fourth eigenvalue are equal, so that the space of three has no derivative",
    "symmetric": True,
}
REGULAR = problem(
    name="eigenspace-regular",
    title="Eigenspace, eigenvalues far apart",
    text="tr(C P), P the projector on the eigenvectors of the three smallest eigenvalues of an 8×8 matrix. The gaps "
    "between eigenvalues are 0.5 to 1.5.",
    draw=draw_regular,
    **COMMON,
)
CLOSE = problem(
    name="eigenspace-close",
    title="Eigenspace, close eigenvalues",
    text="The same loss, with gaps between the three eigenvalues that are log-uniform, between 1e-14 and 3e-4 in "
    "float64 and between 1e-7 and 2e-2 in float32. The space of the three is as well separated from the rest as "
    "before, and so is its gradient.",
    draw=draw_close,
    **COMMON,
)
EQUAL = problem(
    name="eigenspace-equal",
    title="Eigenspace, equal eigenvalues",
    text="The same loss with three equal eigenvalues. All numbers are exact in both precisions; half of the matrices "
    "are diagonal, the others have entries of many sizes.",
    draw=draw_equal,
    **COMMON,
)


@cell("torch", REGULAR, CLOSE, EQUAL)
def _torch():
    import torch

    def loss(x, c):
        w, v = torch.linalg.eigh(x)
        return (c * (v[:, :K] @ v[:, :K].T)).sum()

    return loss


@cell("ddnref-torch", REGULAR, CLOSE, EQUAL)
def _ddnref_torch():
    import ddnref
    from ddnref.interop.torch import differentiable

    eigh = differentiable(ddnref.eigh)

    def loss(x, c):
        w, v = eigh(x)
        return (c * (v[:, :K] @ v[:, :K].T)).sum()

    return loss


@cell("jax", REGULAR, CLOSE, EQUAL)
def _jax():
    import jax.numpy as jnp

    def loss(x, c):
        w, v = jnp.linalg.eigh(x)
        return (c * (v[:, :K] @ v[:, :K].T)).sum()

    return loss


@cell("ddnref-jax", REGULAR, CLOSE, EQUAL)
def _ddnref_jax():
    import ddnref
    from ddnref.interop.jax import differentiable

    eigh = differentiable(ddnref.eigh)

    def loss(x, c):
        w, v = eigh(x)
        return (c * (v[:, :K] @ v[:, :K].T)).sum()

    return loss


@cell("autograd", REGULAR, CLOSE, EQUAL)
def _autograd():
    import autograd.numpy as np

    def loss(x, c):
        w, v = np.linalg.eigh(x)
        return np.sum(c * (v[:, :K] @ v[:, :K].T))

    return loss


@cell("ddnref-autograd", REGULAR, CLOSE, EQUAL)
def _ddnref_autograd():
    import autograd.numpy as np

    import ddnref
    from ddnref.interop.autograd import differentiable

    eigh = differentiable(ddnref.eigh)

    def loss(x, c):
        w, v = eigh(x)
        return np.sum(c * (v[:, :K] @ v[:, :K].T))

    return loss


@cell("tensorflow", REGULAR, CLOSE, EQUAL)
def _tensorflow():
    import tensorflow as tf

    def loss(x, c):
        w, v = tf.linalg.eigh(x)
        return tf.reduce_sum(c * tf.matmul(v[:, :K], v[:, :K], transpose_b=True))

    return loss


@cell("ddnref-tensorflow", REGULAR, CLOSE, EQUAL)
def _ddnref_tensorflow():
    import tensorflow as tf

    import ddnref
    from ddnref.interop.tensorflow import differentiable

    eigh = differentiable(ddnref.eigh)

    def loss(x, c):
        w, v = eigh(x)
        return tf.reduce_sum(c * tf.matmul(v[:, :K], v[:, :K], transpose_b=True))

    return loss
