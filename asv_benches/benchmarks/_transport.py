"""The two textbook forms of Sinkhorn's iteration as the library POT runs them, with its stopping rule."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

Array = np.ndarray


def plain(cost: Array, p: Array, q: Array, eps: float, stop: float = 1e-9, maxiter: int = 10_000) -> Array:
    """Scaling with ``K = exp(−C/ε)``, which underflows for small ε; the marginals are looked at every ten updates."""
    u, v = np.full(len(p), 1 / len(p)), np.full(len(q), 1 / len(q))
    k = np.exp(cost / -eps)
    k_by_rows = k / p[:, None]
    for i in range(maxiter):
        k_u = k.T @ u
        v = q / k_u
        u = 1 / (k_by_rows @ v)
        if np.any(k_u == 0) or not (np.all(np.isfinite(u)) and np.all(np.isfinite(v))):
            break
        if i % 10 == 0 and np.linalg.norm(np.einsum("i,ij,j->j", u, k, v) - q) < stop:
            break
    return u[:, None] * k * v


def in_logarithms(cost: Array, p: Array, q: Array, eps: float, stop: float = 1e-9, maxiter: int = 10_000) -> Array:
    """Update log u and log v instead of u and v, at two exponentials of every entry for each update."""
    k, log_p, log_q = cost / -eps, np.log(p), np.log(q)
    phi, gamma = np.zeros(len(p)), np.zeros(len(q))
    for i in range(maxiter):
        gamma = log_q - logsumexp(k + phi[:, None], axis=0)
        phi = log_p - logsumexp(k + gamma, axis=1)
        if i % 10 == 0 and np.linalg.norm(np.sum(np.exp(k + phi[:, None] + gamma), axis=0) - q) < stop:
            break
    return np.exp(k + phi[:, None] + gamma)
