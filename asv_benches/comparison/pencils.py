"""The lowest modes of two matrices, A v = w B v, with double eigenvalues as in the vibration of a square plate."""

from __future__ import annotations

from typing import Any

import numpy as np

import ddnref

from ._oracles import derivative, inverse, projector_below
from ._problem import Inputs, cell, problem
from .eigenspaces import symmetric, with_spectrum

K = 3


def draw(rng: np.random.Generator, _: str) -> Inputs:
    """Draw A = L M Lᵀ and B = L Lᵀ, M with the eigenvalues 1, 2, 2, 4, 5 and 6."""
    lower = np.tril(rng.uniform(-0.5, 0.5, (6, 6)), -1) + np.diag(rng.uniform(0.8, 1.2, 6))
    m = with_spectrum(rng, np.asarray([1.0, 2.0, 2.0, 4.0, 5.0, 6.0]))
    return {"x": lower @ m @ lower.T, "b": lower @ lower.T, "c": symmetric(rng, 6), "_shift": np.asarray(3.0)}


def truth(i: Inputs) -> np.ndarray:
    """Reduce the pencil by B = L Lᵀ: its modes are L⁻ᵀ times those of L⁻¹ A L⁻ᵀ."""
    inner = inverse(lower_factor(i["b"]))
    along = derivative(lambda x: projector_below(x, i["_shift"]), inner @ i["x"] @ inner.T, inner @ i["c"] @ inner.T)
    return inner.T @ along @ inner


def lower_factor(b: np.ndarray) -> np.ndarray:
    """The Cholesky factor, column by column."""
    lower = np.zeros_like(b)
    for j in range(len(b)):
        lower[j, j] = np.sqrt(b[j, j] - np.sum(lower[j, :j] ** 2))
        lower[j + 1 :, j] = (b[j + 1 :, j] - lower[j + 1 :, :j] @ lower[j, :j]) / lower[j, j]
    return lower


def large(rng: np.random.Generator) -> Inputs:
    a = rng.standard_normal((2, 64, 64))
    return {"x": symmetric(rng, 64), "b": np.eye(64) + a[0] @ a[0].T / 64, "c": symmetric(rng, 64)}


PENCIL = problem(
    name="pencil",
    title="Generalised pencil",
    text="tr(C V Vᵀ), V the three lowest modes of A v = w B v, normalised by B, for 6×6 matrices; the second and the "
    "third eigenvalue are equal. The gradient is that of A.",
    draw=draw,
    truth=truth,
    large=large,
    large_text="m = 64",
    hard=lambda: {
        "x": np.diag([1.0, 2.0, 3.0, 3.0, 5.0, 6.0]),
        "b": np.eye(6),
        "c": symmetric(np.random.default_rng(1), 6),
    },
    hard_text="the third and the fourth eigenvalue are equal",
    symmetric=True,
)


@cell("torch", PENCIL)
def _torch():
    import torch

    def loss(x, b, c):
        inner = torch.linalg.inv(torch.linalg.cholesky(b))
        w, v = torch.linalg.eigh(inner @ x @ inner.T)
        modes = inner.T @ v[:, :K]
        return (c * (modes @ modes.T)).sum()

    return loss


@cell("xitorch", PENCIL)
def _xitorch():
    import xitorch
    from xitorch.linalg import lsymeig

    def loss(x, b, c):
        operator = xitorch.LinearOperator.m(x, is_hermitian=True)
        mass = xitorch.LinearOperator.m(b, is_hermitian=True)
        w, modes = lsymeig(operator, neig=K, M=mass, method="exacteig")
        return (c * (modes @ modes.T)).sum()

    return loss


def modes_loss(eigh_generalized: Any) -> Any:
    def loss(x, b, c):
        w, v = eigh_generalized(x, b)
        return (c * (v[:, :K] @ v[:, :K].T)).sum()

    return loss


@cell("ddnref-torch", PENCIL)
def _ddnref_torch():
    from ddnref.interop.torch import differentiable

    return modes_loss(differentiable(ddnref.eigh_generalized))


@cell("jax", PENCIL)
def _jax():
    import jax.numpy as jnp
    from jax.scipy.linalg import solve_triangular

    def loss(x, b, c):
        lower = jnp.linalg.cholesky(b)
        reduced = solve_triangular(lower, solve_triangular(lower, x, lower=True).T, lower=True)
        w, v = jnp.linalg.eigh(reduced)
        modes = solve_triangular(lower.T, v[:, :K], lower=False)
        return (c * (modes @ modes.T)).sum()

    return loss


@cell("ddnref-jax", PENCIL)
def _ddnref_jax():
    from ddnref.interop.jax import differentiable

    return modes_loss(differentiable(ddnref.eigh_generalized))


@cell("autograd", PENCIL)
def _autograd():
    import autograd.numpy as np

    def loss(x, b, c):
        inner = np.linalg.inv(np.linalg.cholesky(b))
        w, v = np.linalg.eigh(inner @ x @ inner.T)
        modes = inner.T @ v[:, :K]
        return np.sum(c * (modes @ modes.T))

    return loss


@cell("ddnref-autograd", PENCIL)
def _ddnref_autograd():
    from ddnref.interop.autograd import differentiable

    return modes_loss(differentiable(ddnref.eigh_generalized))
