"""Calls around the singular value decomposition that are measured against each other.

Each function builds the same problem in the arrays of a library and returns a call without arguments. A *pair* is the
forward pass and the gradient, for which a user waits. A *backward* computes the gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

import ddnref

from ._common import Call, load, load_jax


class Problem(NamedTuple):
    """A batch of random matrices and cotangents of their triples, as NumPy arrays."""

    x: np.ndarray
    bars: tuple[np.ndarray, np.ndarray, np.ndarray]


@lru_cache(maxsize=4)
def problem(batch: int, m: int, n: int, dtype: str, k: int = 0) -> Problem:
    """Draw one problem for all libraries, with cotangents of the k largest triples, of all by default."""
    rng = np.random.default_rng(0)
    count = k or min(m, n)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((batch, *shape)).astype(dtype)

    return Problem(draw(m, n), (draw(m, count), draw(count), draw(count, n)))


def our_pair(batch: int, m: int, n: int, dtype: str) -> Call:
    """``ddnref.svd`` and ``ddnref.svd_vjp`` on NumPy arrays, all checks on."""
    p = problem(batch, m, n, dtype)
    return lambda: ddnref.svd_vjp(*p.bars, *ddnref.svd(p.x))


def our_backward(batch: int, m: int, n: int, dtype: str, k: int = 0) -> Call:
    """``ddnref.svd_vjp``, or ``ddnref.svd_topk_vjp`` of the k largest, on NumPy arrays, all checks on."""
    p = problem(batch, m, n, dtype, k)
    if not k:
        return partial(ddnref.svd_vjp, *p.bars, *ddnref.svd(p.x))
    outputs, saved = ddnref.svd_topk_fwd(p.x, k)
    return partial(ddnref.svd_topk_vjp, *p.bars, *outputs, *saved)


def products(batch: int, m: int, n: int, dtype: str, count: int = 4) -> Call:
    """The stated limit: that many NumPy products of square matrices of the same size."""
    x = problem(batch, m, n, dtype).x

    def call() -> None:
        for _ in range(count):
            x @ x

    return call


def _torch_pair(svd: Callable[[Any], Any], batch: int, m: int, n: int, dtype: str) -> Call:
    torch = load("torch")
    p = problem(batch, m, n, dtype)
    x, bars = torch.from_numpy(p.x.copy()).requires_grad_(), tuple(map(torch.from_numpy, p.bars))
    return lambda: torch.autograd.grad(tuple(svd(x)), x, bars)


def torch_pair(batch: int, m: int, n: int, dtype: str) -> Call:
    """``torch.linalg.svd`` and its backward."""
    torch = load("torch")
    return _torch_pair(partial(torch.linalg.svd, full_matrices=False), batch, m, n, dtype)


def bridge_pair(batch: int, m: int, n: int, dtype: str) -> Call:
    """Forward and gradient through ddnref's bridge to PyTorch."""
    load("torch")
    from ddnref.interop.torch import differentiable

    return _torch_pair(differentiable(ddnref.svd), batch, m, n, dtype)


def torch_backward(batch: int, m: int, n: int, dtype: str, k: int = 0) -> Call:
    """The backward of ``torch.linalg.svd`` through a graph that is kept; with `k` through a slice of the outputs."""
    torch = load("torch")
    p = problem(batch, m, n, dtype, k)
    x = torch.from_numpy(p.x.copy()).requires_grad_()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    outputs = (u[..., :k], s[..., :k], vh[..., :k, :]) if k else (u, s, vh)
    bars = tuple(map(torch.from_numpy, p.bars))
    return partial(torch.autograd.grad, outputs, x, bars, retain_graph=True)


def jax_pair(batch: int, m: int, n: int, dtype: str) -> Call:
    """``jax.numpy.linalg.svd`` and its VJP in one compiled function."""
    jax = load_jax()
    p = problem(batch, m, n, dtype)

    @jax.jit
    def pair(x: Any, bars: Any) -> Any:
        return jax.vjp(lambda x: tuple(jax.numpy.linalg.svd(x, full_matrices=False)), x)[1](bars)

    x, bars = jax.numpy.asarray(p.x), tuple(map(jax.numpy.asarray, p.bars))
    return lambda: jax.block_until_ready(pair(x, bars))


PAIRS: dict[str, Callable[..., Call]] = {"torch": torch_pair, "jax": jax_pair}


# --- errors at equal and at zero values -----------------------------------------------------------------------------

SPECTRA = {
    "triple": np.asarray([2.0, 1.1, 0.5, 0.5, 0.5, 0.2]),
    "zero": np.asarray([2.0, 1.1, 0.7, 0.0, 0.0, 0.0]),
}
CHOSEN = {"triple": 0.5, "zero": 0.0}
"""The value whose singular vectors the loss depends on."""
WRONG = 1e-6  # relative error above which a float64 gradient counts as wrong


def invariant_errors(implementation: str, kind: str, m: int = 6, n: int = 6, count: int = 200) -> np.ndarray:
    """Relative errors of the gradient of ``tr(E Π)`` in random m×n matrices; NaN where the gradient is NaN.

    Π is the projector of ``[[0, X], [Xᵀ, 0]]`` on the eigenvalue that is `CHOSEN`, so that the loss is a function of
    ``U_c U_cᵀ``, ``V_c V_cᵀ`` and ``U_c V_cᵀ``. Of zeros the last one is not determined, nor the first or the second
    where m and n differ: there E is zero. The reference is perturbation theory with the vectors that were drawn.
    """
    rng, s, chosen = np.random.default_rng(0), SPECTRA[kind], SPECTRA[kind] == CHOSEN[kind]
    left, right = (np.linalg.qr(rng.standard_normal((count, side, side)))[0] for side in (m, n))
    e = rng.standard_normal((count, m + n, m + n))
    e = (e + e.mT) / 2
    if kind == "zero":
        e[:, :m, m:] = e[:, m:, :m] = 0
        e[:, :m, :m] *= 2 * (m <= n)
        e[:, m:, m:] *= 2 * (n <= m)

    def cotangents(u: np.ndarray, vh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = np.where(chosen, e @ np.concatenate([u, vh.mT], axis=-2), 0)
        return both[:, :m].copy(), both[:, m:].mT.copy()

    with np.errstate(all="ignore"):  # peers return NaN and infinity
        gradient = _GRADIENTS[implementation]((left[..., :6] * s) @ right[..., :6].mT, cotangents)
    exact = _exact(left, right, s, CHOSEN[kind], e / 2 if kind == "zero" else e)
    size = np.linalg.norm(exact, axis=(-2, -1))
    return np.linalg.norm(gradient - exact, axis=(-2, -1)) / size


def _exact(left: np.ndarray, right: np.ndarray, s: np.ndarray, chosen: float, e: np.ndarray) -> np.ndarray:
    m, n, k = left.shape[-1], right.shape[-1], len(s)
    q = np.zeros((len(left), m + n, m + n))
    q[:, :m, : 2 * k] = np.concatenate([left[..., :k], left[..., :k]], axis=-1) / 2**0.5
    q[:, m:, : 2 * k] = np.concatenate([right[..., :k], -right[..., :k]], axis=-1) / 2**0.5
    q[:, :m, 2 * k : m + k], q[:, m:, m + k :] = left[..., k:], right[..., k:]
    w = np.concatenate([s, -s, np.zeros(m + n - 2 * k)])
    across = (w == chosen)[:, None] & (w != chosen)[None, :]
    g = q @ np.where(across, (q.mT @ e @ q) / np.where(across, w[:, None] - w[None, :], 1), 0) @ q.mT
    return 2 * (g + g.mT)[:, :m, m:]


def _ours(x: np.ndarray, cotangents: Callable[..., Any]) -> np.ndarray:
    u, s, vh = ddnref.svd(x)
    u_bar, vh_bar = cotangents(u, vh)
    return ddnref.svd_vjp(u_bar, None, vh_bar, u, s, vh)


def _torch(x: np.ndarray, cotangents: Callable[..., Any]) -> np.ndarray:
    torch = load("torch")
    leaf = torch.from_numpy(x.copy()).requires_grad_()
    u, _, vh = torch.linalg.svd(leaf, full_matrices=False)
    bars = map(torch.from_numpy, cotangents(u.detach().numpy(), vh.detach().numpy()))
    return torch.autograd.grad((u, vh), leaf, tuple(bars))[0].numpy()


def _jax(x: np.ndarray, cotangents: Callable[..., Any]) -> np.ndarray:
    jax = load_jax()
    (u, vh), vjp = jax.vjp(lambda x: jax.numpy.linalg.svd(x, full_matrices=False)[::2], jax.numpy.asarray(x))
    bars = map(jax.numpy.asarray, cotangents(np.asarray(u), np.asarray(vh)))
    return np.asarray(vjp(tuple(bars))[0])


_GRADIENTS = {"ddnref": _ours, "torch": _torch, "jax": _jax}
