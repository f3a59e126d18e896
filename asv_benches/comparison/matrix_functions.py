"""Functions of a symmetric matrix whose eigenvalues repeat: whitening by a shrunk covariance, logarithmic strain."""

from __future__ import annotations

import numpy as np

from ._oracles import derivative, inverse_root, logarithm
from ._problem import cell, problem
from .eigenspaces import symmetric


def shrunk(rng: np.random.Generator, samples: int, m: int) -> np.ndarray:
    """Draw the covariance of fewer samples than features, shrunk towards the identity."""
    s = rng.standard_normal((samples, m))
    return 0.9 * s.T @ s / samples + 0.1 * np.eye(m)


WHITENING = problem(
    name="whitening",
    title="Whitening",
    text="tr(C X^(-1/2)), X the covariance of 5 samples of 8 features, shrunk by a tenth towards the identity. Its "
    "smallest eigenvalue, 0.1, is repeated three times.",
    draw=lambda rng, _: {"x": shrunk(rng, 5, 8), "c": symmetric(rng, 8)},
    truth=lambda i: derivative(inverse_root, i["x"], i["c"]),
    large=lambda rng: {"x": shrunk(rng, 40, 64), "c": symmetric(rng, 64)},
    large_text="m = 64, 40 samples",
    hard=lambda: {"x": np.diag([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0]), "c": np.ones((8, 8))},
    hard_text="the matrix is singular",
    symmetric=True,
)


def stretch(rng: np.random.Generator, axes: int = 3) -> np.ndarray:
    """Draw the deformation of an incompressible body that is pulled along a random axis: FᵀF."""
    n = rng.standard_normal(axes)
    n /= np.linalg.norm(n)
    long = rng.uniform(1.1, 2.0)
    across = long ** (-1 / (axes - 1))
    f = across * np.eye(axes) + (long - across) * np.outer(n, n)
    return f @ f


LOGARITHM = problem(
    name="logarithm",
    title="Matrix logarithm",
    text="tr(C log X), X = FᵀF the right Cauchy–Green tensor of an incompressible body pulled along a random axis to "
    "1.1 to 2 times its length: two of its three eigenvalues are equal.",
    draw=lambda rng, _: {"x": stretch(rng), "c": symmetric(rng, 3)},
    truth=lambda i: derivative(logarithm, i["x"], i["c"]),
    large=lambda rng: {"x": shrunk(rng, 40, 64), "c": symmetric(rng, 64)},
    large_text="m = 64, a covariance as for whitening",
    hard=lambda: {"x": np.diag([0.0, 1.0, 1.0]), "c": np.ones((3, 3))},
    hard_text="the matrix is singular",
    symmetric=True,
)


@cell("torch", WHITENING)
def _torch_whitening():
    import torch

    def loss(x, c):
        w, v = torch.linalg.eigh(x)
        return (c * ((v / w.sqrt()) @ v.T)).sum()

    return loss


@cell("torch", LOGARITHM)
def _torch_logarithm():
    import torch

    def loss(x, c):
        w, v = torch.linalg.eigh(x)
        return (c * ((v * w.log()) @ v.T)).sum()

    return loss


@cell("ddnref-torch", WHITENING)
def _ddnref_torch_whitening():
    import ddnref
    from ddnref.interop.torch import differentiable

    invsqrtm = differentiable(ddnref.invsqrtm)

    def loss(x, c):
        return (c * invsqrtm(x)).sum()

    return loss


@cell("ddnref-torch", LOGARITHM)
def _ddnref_torch_logarithm():
    import ddnref
    from ddnref.interop.torch import differentiable

    logm = differentiable(ddnref.logm)

    def loss(x, c):
        return (c * logm(x)).sum()

    return loss


@cell("jax", WHITENING)
def _jax_whitening():
    import jax.numpy as jnp

    def loss(x, c):
        w, v = jnp.linalg.eigh(x)
        return (c * ((v / jnp.sqrt(w)) @ v.T)).sum()

    return loss


@cell("jax", LOGARITHM)
def _jax_logarithm():
    import jax.numpy as jnp

    def loss(x, c):
        w, v = jnp.linalg.eigh(x)
        return (c * ((v * jnp.log(w)) @ v.T)).sum()

    return loss


@cell("ddnref-jax", WHITENING)
def _ddnref_jax_whitening():
    import ddnref
    from ddnref.interop.jax import differentiable

    invsqrtm = differentiable(ddnref.invsqrtm)

    def loss(x, c):
        return (c * invsqrtm(x)).sum()

    return loss


@cell("ddnref-jax", LOGARITHM)
def _ddnref_jax_logarithm():
    import ddnref
    from ddnref.interop.jax import differentiable

    logm = differentiable(ddnref.logm)

    def loss(x, c):
        return (c * logm(x)).sum()

    return loss


@cell("autograd", WHITENING)
def _autograd_whitening():
    import autograd.numpy as np

    def loss(x, c):
        w, v = np.linalg.eigh(x)
        return np.sum(c * ((v / np.sqrt(w)) @ v.T))

    return loss


@cell("autograd", LOGARITHM)
def _autograd_logarithm():
    import autograd.numpy as np

    def loss(x, c):
        w, v = np.linalg.eigh(x)
        return np.sum(c * ((v * np.log(w)) @ v.T))

    return loss


@cell("ddnref-autograd", WHITENING)
def _ddnref_autograd_whitening():
    import autograd.numpy as np

    import ddnref
    from ddnref.interop.autograd import differentiable

    invsqrtm = differentiable(ddnref.invsqrtm)

    def loss(x, c):
        return np.sum(c * invsqrtm(x))

    return loss


@cell("ddnref-autograd", LOGARITHM)
def _ddnref_autograd_logarithm():
    import autograd.numpy as np

    import ddnref
    from ddnref.interop.autograd import differentiable

    logm = differentiable(ddnref.logm)

    def loss(x, c):
        return np.sum(c * logm(x))

    return loss


@cell("tensorflow", WHITENING)
def _tensorflow_whitening():
    import tensorflow as tf

    def loss(x, c):
        return tf.reduce_sum(c * tf.linalg.inv(tf.linalg.sqrtm(x)))

    return loss


@cell("tensorflow", LOGARITHM)
def _tensorflow_logarithm():
    import tensorflow as tf

    def loss(x, c):
        w, v = tf.linalg.eigh(x)
        return tf.reduce_sum(c * tf.matmul(v * tf.math.log(w), v, transpose_b=True))

    return loss


@cell("ddnref-tensorflow", WHITENING)
def _ddnref_tensorflow_whitening():
    import tensorflow as tf

    import ddnref
    from ddnref.interop.tensorflow import differentiable

    invsqrtm = differentiable(ddnref.invsqrtm)

    def loss(x, c):
        return tf.reduce_sum(c * invsqrtm(x))

    return loss


@cell("ddnref-tensorflow", LOGARITHM)
def _ddnref_tensorflow_logarithm():
    import tensorflow as tf

    import ddnref
    from ddnref.interop.tensorflow import differentiable

    logm = differentiable(ddnref.logm)

    def loss(x, c):
        return tf.reduce_sum(c * logm(x))

    return loss
