"""The results of ``ddnref.curvature.ggn_*`` from the dense Gauss–Newton matrix, and its eigenpairs by power iteration.

All functions follow the definitions: with the Jacobians J_n of the outputs, ``G = Σ_n J_nᵀ ∇²ℓ_n J_n`` (times 1/N for
the mean), its eigenvectors e_k, and the gradients g_n of single samples,

    γ_nk = e_kᵀ g_n,    λ_nk = e_kᵀ J_nᵀ ∇²ℓ_n J_n e_k,    s = − Σ_k e_kᵀ g / (λ_k + δ) e_k
"""

from __future__ import annotations

import math
from typing import Any

from ddnref._core.arrays import Array, namespace_of
from ddnref._core.noise import noise
from ddnref._kernels.dense import eigh
from ddnref.networks._chain import Chain
from ddnref.networks._losses import count
from ddnref.reference.network import network_ggn, network_jacobian


def ggn_dense_derivatives(chain: Chain, x: Array, t: Array, k: int) -> tuple[Array, Array, Array, Array]:
    """The k largest eigenvalues, their eigenvectors, and the directional derivatives of every sample.

    Parameters
    ----------
    chain : Chain
        A chain of `Dense` layers; ``TypeError`` for others.
    x, t : (N, a_0) and (N,) or (N, C) arrays
    k : int

    Returns
    -------
    w, v, first, second : (k,), (D, k), (N, k) and (N, k) arrays
    """
    xp = namespace_of(x)
    # The k largest, in descending order.
    w, v = eigh(network_ggn(chain, x, t))
    w, v = xp.flip(w, axis=0)[:k], xp.flip(v, axis=1)[:, :k]
    j, y = network_jacobian(chain, x), chain.output(x)
    # Gradients of single samples by the chain rule, and Je_k (N, C, k) for the second derivatives.
    g_n = (chain.criterion.gradient(y, t)[:, None, :] @ j)[:, 0, :]
    je = j @ v
    return w, v, g_n @ v, xp.sum(je * (chain.criterion.hessian(y, t) @ je), axis=1)


def ggn_dense_newton(chain: Chain, x: Array, t: Array, k: int, damping: float) -> Array:
    """The damped Newton step along the k leading eigenvectors ``(D,)``; for parameters see `ggn_dense_derivatives`."""
    w, v, first, _ = ggn_dense_derivatives(chain, x, t, k)
    n = count(chain.criterion, chain.output(x), t)
    slope = chain.scale(n) * namespace_of(x).sum(first, axis=0)  # e_kᵀ g
    return -(v @ (slope / (w + damping)))


def ggn_power_iteration(chain: Chain, x: Array, t: Array, k: int = 1, *, steps: int = 1000) -> tuple[Array, Array]:
    """The k leading eigenpairs, (k,) and (D, k), by power iteration on `Chain.ggnvp`, one after the other.

    The chain may have any layers; `x` and `t` are as for `Chain.loss`. Each pair takes `steps` products, and its error
    decreases as ``(λ_(k+1) / λ_k)`` to the power of `steps`.
    """
    xp = namespace_of(chain.params[0])
    size = sum(math.prod(p.shape) for p in chain.params)
    values: list[Any] = []
    found: list[Any] = []
    for i in range(k):
        v = noise(i, size, chain.params[0])
        for _ in range(steps):
            for e in found:  # stay orthogonal to the pairs found before
                v = v - xp.sum(e * v) * e
            v = v / xp.sqrt(xp.sum(v * v))
            image = flat(chain.ggnvp(x, t, like_params(chain, v)))
            value, v = xp.sum(v * image), image
        values.append(value)
        found.append(v / xp.sqrt(xp.sum(v * v)))
    return xp.stack(values), xp.stack(found, axis=-1)


def flat(arrays: list[Array], *lead: int) -> Array:
    """Arrays like the chain's parameters, with these leading axes, as vectors ``(*lead, D)``."""
    xp = namespace_of(arrays[0])
    return xp.concat([xp.reshape(a, (*lead, -1)) for a in arrays], axis=-1)


def like_params(chain: Chain, v: Array) -> list[Array]:
    """One vector ``(D,)`` as arrays like the chain's parameters."""
    xp = namespace_of(v)
    parts, start = [], 0
    for p in chain.params:
        size = math.prod(p.shape)
        parts.append(xp.reshape(v[start : start + size], p.shape))
        start += size
    return parts
