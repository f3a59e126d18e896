"""The leading eigenvectors of a large matrix that need not be stored: the communalities of a factor model."""

from __future__ import annotations

from typing import Any

import numpy as np

import ddnref

from ._oracles import derivative, identity, projector_below
from ._problem import Inputs, cell, problem

K = 3


def draw(rng: np.random.Generator, _: str, m: int = 24) -> Inputs:
    """Draw loadings of three factors, two of them equally strong, and the variances of the noise."""
    z = np.linalg.qr(rng.standard_normal((m, K)))[0] * np.asarray([3.0, 2.0, 2.0])
    return {"x": rng.uniform(0.5, 1.5, m), "z": z, "c": rng.standard_normal(m), "_shift": np.asarray(3.0)}


def truth(i: Inputs) -> np.ndarray:
    """The gradient of cᵀ diag f(A) with respect to the diagonal of A is the diagonal of the derivative along diag c."""

    def leading(a: np.ndarray) -> np.ndarray:
        return identity(len(a), a) - projector_below(a, i["_shift"])

    a = np.diag(i["x"]) + i["z"] @ i["z"].T
    return np.diag(derivative(leading, a, np.diag(i["c"]))).copy()


TOPK = problem(
    name="topk",
    title="Leading eigenvectors of an operator",
    text="Σ cᵢ Pᵢᵢ, P the projector on the three leading eigenvectors of Z Zᵀ + diag(ψ), a factor model with 24 "
    "variables; two factors are equally strong. The gradient of ψ.",
    draw=draw,
    truth=truth,
    large=lambda rng: draw(rng, "float64", 1000),
    large_text="1000 variables",
    hard=lambda: {"x": np.ones(24), "z": 3 * np.eye(24, 2), "c": np.arange(24.0)},
    hard_text="there are two factors, and all other eigenvalues are equal",
)


def dense(eigh: Any, diag: Any) -> Any:
    def loss(x, z, c):
        w, v = eigh(z @ z.T + diag(x))
        return (c * (v[:, -K:] ** 2).sum(1)).sum()

    return loss


@cell("torch", TOPK)
def _torch():
    import torch

    return dense(torch.linalg.eigh, torch.diag)


@cell("xitorch", TOPK)
def _xitorch():
    import xitorch
    from xitorch.linalg import usymeig

    class FactorModel(xitorch.LinearOperator):
        def __init__(self, x, z):
            super().__init__(shape=(len(x), len(x)), is_hermitian=True, dtype=x.dtype, device=x.device)
            self.x, self.z = x, z

        def _mv(self, v):
            return self.x * v + v @ self.z @ self.z.T

        def _getparamnames(self, prefix=""):
            return [prefix + "x", prefix + "z"]

    def loss(x, z, c):
        w, v = usymeig(FactorModel(x, z), neig=K, method="davidson", min_eps=1e-9 if "64" in str(x.dtype) else 1e-4)
        return (c * (v**2).sum(1)).sum()

    return loss


def matrix_free(differentiable: Any) -> Any:
    from ddnref import operators

    eigsh = differentiable(ddnref.eigsh, k=K)

    def loss(x, z, c):
        model = operators.add(operators.normal(operators.adjoint(operators.dense(z))), operators.diagonal(x))
        (w, v), info = eigsh(model)
        return (c * (v**2).sum(1)).sum()

    return loss


@cell("ddnref-torch", TOPK)
def _ddnref_torch():
    from ddnref.interop.torch import differentiable

    return matrix_free(differentiable)


@cell("jax", TOPK)
def _jax():
    import jax.numpy as jnp

    return dense(jnp.linalg.eigh, jnp.diag)


@cell("matfree", TOPK)
def _matfree():
    import jax.numpy as jnp
    from matfree import decomp, eig

    def loss(x, z, c):
        steps = min(20, len(x))
        eigh = eig.eigh_partial(decomp.tridiag_sym(steps, reortho="full"))
        start = jnp.sin(jnp.arange(1, len(x) + 1, dtype=x.dtype))
        w, v = eigh(lambda s, x, z: x * s + z @ (z.T @ s), start, x, z)
        v = v.T if v.shape[0] == len(x) else v
        leading = v[jnp.argsort(w)[-K:]]
        return (c * (leading**2).sum(0)).sum()

    return loss


@cell("ddnref-jax", TOPK)
def _ddnref_jax():
    from ddnref.interop.jax import differentiable

    return matrix_free(differentiable)


@cell("autograd", TOPK)
def _autograd():
    import autograd.numpy as np

    return dense(np.linalg.eigh, np.diag)
