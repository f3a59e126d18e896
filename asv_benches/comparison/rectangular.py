"""Losses of rectangular matrices with repeated singular values: low rank, closest rotation, principal components."""

from __future__ import annotations

from typing import Any

import numpy as np

import ddnref

from ._oracles import gram_gradient, identity, inverse_root, projector_below
from ._problem import Inputs, cell, problem

K = 2  # singular triples that are kept


def orthonormal(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((m, n)))[0]


def draw_low_rank(rng: np.random.Generator, _: str) -> Inputs:
    s = np.asarray([2.0, 2.0, 1.0, 0.5])
    x = (orthonormal(rng, 6, 4) * s) @ orthonormal(rng, 4, 4).T
    return {"x": x, "c": rng.standard_normal((6, 4)), "_shift": np.asarray(2.5)}


def truth_low_rank(i: Inputs) -> np.ndarray:
    """The best approximation of rank k is A P, P the projector on the leading eigenvectors of AᵀA."""

    def leading(gram: np.ndarray) -> np.ndarray:
        return identity(len(gram), gram) - projector_below(gram, i["_shift"])

    return gram_gradient(leading, i["x"], i["c"])


LOW_RANK = problem(
    name="svd",
    title="SVD, best approximation of low rank",
    text="⟨C, A V₂ V₂ᵀ⟩, the closest matrix of rank two to a 6×4 matrix with singular values 2, 2, 1 and 0.5. Written "
    "as U₂ S₂ V₂ᵀ its cotangents do not determine the gradient at equal singular values, and ddnref refuses it.",
    draw=draw_low_rank,
    truth=truth_low_rank,
    large=lambda rng: {"x": rng.standard_normal((128, 64)), "c": rng.standard_normal((128, 64))},
    large_text="128×64",
    hard=lambda: {"x": np.eye(6, 4) * np.asarray([3.0, 2.0, 2.0, 1.0]), "c": np.random.default_rng(1).random((6, 4))},
    hard_text="the second and the third singular value are equal",
)


def draw_polar(rng: np.random.Generator, _: str) -> Inputs:
    s = np.asarray([1.5, 1.5, rng.uniform(0.3, 1.0)])
    u, v = (orthonormal(rng, 3, 3) for _ in range(2))
    u[:, 2] *= np.linalg.det(u) * np.linalg.det(v)  # the closest orthogonal matrix is a rotation
    return {"x": (u * s) @ v.T, "c": rng.standard_normal((3, 3))}


POLAR = problem(
    name="polar",
    title="Polar factor, closest rotation",
    text="⟨C, R⟩, R the closest rotation to a 3×3 matrix with two equal singular values, as in the alignment of point "
    "clouds that are round in one plane.",
    draw=draw_polar,
    truth=lambda i: gram_gradient(inverse_root, i["x"], i["c"]),
    large=lambda rng: {"x": np.eye(64) + 0.1 * rng.standard_normal((64, 64)), "c": rng.standard_normal((64, 64))},
    large_text="64×64",
    hard=lambda: {"x": np.diag([1.0, 0.0, 0.0]), "c": np.random.default_rng(1).random((3, 3))},
    hard_text="two singular values are zero, so that the closest rotation is not unique",
)


def draw_pca(rng: np.random.Generator, _: str) -> Inputs:
    """Draw points on a circle in five dimensions, with noise: two equal variances, and smaller ones."""
    angles = 2 * np.pi * np.arange(12) / 12
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    across = rng.standard_normal((12, 3))
    across -= across.mean(0)
    across -= circle @ (circle.T @ across) / 6
    x = np.concatenate([circle, 0.2 * across], axis=1) @ orthonormal(rng, 5, 5).T + rng.standard_normal(5)
    return {"x": x, "c": rng.standard_normal((12, 5))}


def truth_pca(i: Inputs) -> np.ndarray:
    """The gradient with respect to centred data, centred."""
    x, c = i["x"], i["c"]
    centred, c = x - x.mean(0), c - c.mean(0)
    w = np.linalg.eigvalsh(np.asarray(centred.T @ centred, dtype=np.float64))
    shift = np.asarray((w[2] + w[3]) / 2, dtype=x.dtype)

    def leading(gram: np.ndarray) -> np.ndarray:
        return identity(len(gram), gram) - projector_below(gram, shift)

    found = gram_gradient(leading, centred, c)
    return found - found.mean(0)


def cut_pca() -> Inputs:
    """Make data whose second and third variance are equal."""
    x = np.concatenate([np.diag([3.0, 2.0, 2.0, 1.0, 0.5]), -np.diag([3.0, 2.0, 2.0, 1.0, 0.5]), np.zeros((2, 5))])
    return {"x": x, "c": np.random.default_rng(1).random((12, 5))}


PCA = problem(
    name="pca",
    title="Layer of principal components",
    text="⟨C, (X − x̄) P⟩, P the projector on the two leading principal components of 12 points in five dimensions, "
    "which lie around a circle: the two variances are equal.",
    draw=draw_pca,
    truth=truth_pca,
    large=lambda rng: {"x": rng.standard_normal((256, 32)), "c": rng.standard_normal((256, 32))},
    large_text="256 points in 32 dimensions",
    hard=cut_pca,
    hard_text="the second and the third variance are equal",
)


# --- low rank -----------------------------------------------------------------------------------------------------


def low_rank(svd: Any) -> Any:
    def loss(x, c):
        u, s, vh = svd(x)
        return (c * (x @ vh[:K].T @ vh[:K])).sum()

    return loss


@cell("torch", LOW_RANK)
def _torch_svd():
    import torch

    return low_rank(lambda x: torch.linalg.svd(x, full_matrices=False))


@cell("ddnref-torch", LOW_RANK)
def _ddnref_torch_svd():
    from ddnref.interop.torch import differentiable

    return low_rank(differentiable(ddnref.svd))


@cell("jax", LOW_RANK)
def _jax_svd():
    import jax.numpy as jnp

    return low_rank(lambda x: jnp.linalg.svd(x, full_matrices=False))


@cell("ddnref-jax", LOW_RANK)
def _ddnref_jax_svd():
    from ddnref.interop.jax import differentiable

    return low_rank(differentiable(ddnref.svd))


@cell("autograd", LOW_RANK)
def _autograd_svd():
    import autograd.numpy as np

    return low_rank(lambda x: np.linalg.svd(x, full_matrices=False))


@cell("ddnref-autograd", LOW_RANK)
def _ddnref_autograd_svd():
    from ddnref.interop.autograd import differentiable

    return low_rank(differentiable(ddnref.svd))


@cell("tensorflow", LOW_RANK)
def _tensorflow_svd():
    import tensorflow as tf

    def loss(x, c):
        s, u, v = tf.linalg.svd(x)
        return tf.reduce_sum(c * tf.matmul(x @ v[:, :K], v[:, :K], transpose_b=True))

    return loss


@cell("ddnref-tensorflow", LOW_RANK)
def _ddnref_tensorflow_svd():
    import tensorflow as tf

    from ddnref.interop.tensorflow import differentiable

    svd = differentiable(ddnref.svd)

    def loss(x, c):
        u, s, vh = svd(x)
        return tf.reduce_sum(c * (tf.matmul(x, vh[:K], transpose_b=True) @ vh[:K]))

    return loss


# --- closest rotation ---------------------------------------------------------------------------------------------


def rotation(svd: Any) -> Any:
    def loss(x, c):
        u, _, vh = svd(x)
        return (c * (u @ vh)).sum()

    return loss


@cell("torch", POLAR)
def _torch_rotation():
    import torch

    return rotation(torch.linalg.svd)


@cell("roma", POLAR)
def _roma():
    import roma

    def loss(x, c):
        return (c * roma.special_procrustes(x)).sum()

    return loss


@cell("ddnref-torch", POLAR)
def _ddnref_torch_rotation():
    from ddnref.interop.torch import differentiable

    polar = differentiable(ddnref.polar)

    def loss(x, c):
        return (c * polar(x)[0]).sum()

    return loss


@cell("jax", POLAR)
def _jax_rotation():
    import jax.numpy as jnp

    return rotation(jnp.linalg.svd)


@cell("ddnref-jax", POLAR)
def _ddnref_jax_rotation():
    from ddnref.interop.jax import differentiable

    polar = differentiable(ddnref.polar)

    def loss(x, c):
        return (c * polar(x)[0]).sum()

    return loss


@cell("autograd", POLAR)
def _autograd_rotation():
    import autograd.numpy as np

    return rotation(lambda x: np.linalg.svd(x, full_matrices=False))


@cell("ddnref-autograd", POLAR)
def _ddnref_autograd_rotation():
    import autograd.numpy as np

    from ddnref.interop.autograd import differentiable

    polar = differentiable(ddnref.polar)

    def loss(x, c):
        return np.sum(c * polar(x)[0])

    return loss


@cell("tensorflow", POLAR)
def _tensorflow_rotation():
    import tensorflow as tf

    def loss(x, c):
        s, u, v = tf.linalg.svd(x)
        return tf.reduce_sum(c * tf.matmul(u, v, transpose_b=True))

    return loss


@cell("ddnref-tensorflow", POLAR)
def _ddnref_tensorflow_rotation():
    import tensorflow as tf

    from ddnref.interop.tensorflow import differentiable

    polar = differentiable(ddnref.polar)

    def loss(x, c):
        return tf.reduce_sum(c * polar(x)[0])

    return loss


# --- principal components -----------------------------------------------------------------------------------------


def principal(eigh: Any) -> Any:
    def loss(x, c):
        x = x - x.mean(0)
        w, v = eigh(x.T @ x)
        leading = v[:, -K:]
        return (c * (x @ leading @ leading.T)).sum()

    return loss


@cell("torch", PCA)
def _torch_pca():
    import torch

    return principal(torch.linalg.eigh)


@cell("ddnref-torch", PCA)
def _ddnref_torch_pca():
    from ddnref.interop.torch import differentiable

    return principal(differentiable(ddnref.eigh))


@cell("jax", PCA)
def _jax_pca():
    import jax.numpy as jnp

    return principal(jnp.linalg.eigh)


@cell("ddnref-jax", PCA)
def _ddnref_jax_pca():
    from ddnref.interop.jax import differentiable

    return principal(differentiable(ddnref.eigh))


@cell("autograd", PCA)
def _autograd_pca():
    import autograd.numpy as np

    return principal(np.linalg.eigh)


@cell("ddnref-autograd", PCA)
def _ddnref_autograd_pca():
    from ddnref.interop.autograd import differentiable

    return principal(differentiable(ddnref.eigh))


@cell("tensorflow", PCA)
def _tensorflow_pca():
    import tensorflow as tf

    def loss(x, c):
        x = x - tf.reduce_mean(x, 0)
        w, v = tf.linalg.eigh(tf.matmul(x, x, transpose_a=True))
        leading = v[:, -K:]
        return tf.reduce_sum(c * (x @ leading @ tf.transpose(leading)))

    return loss


@cell("ddnref-tensorflow", PCA)
def _ddnref_tensorflow_pca():
    import tensorflow as tf

    from ddnref.interop.tensorflow import differentiable

    eigh = differentiable(ddnref.eigh)

    def loss(x, c):
        x = x - tf.reduce_mean(x, 0)
        w, v = eigh(tf.matmul(x, x, transpose_a=True))
        leading = v[:, -K:]
        return tf.reduce_sum(c * (x @ leading @ tf.transpose(leading)))

    return loss
