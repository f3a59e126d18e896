"""Calls of the generalised eigenproblem that are measured against each other, and errors at a triple eigenvalue."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

import ddnref
from ddnref import reference

from ._common import Call, load, load_jax

TRIPLE = np.asarray([-1.0, 0.3, 0.3, 0.3, 1.1, 2.0])
INSIDE = TRIPLE == 0.3


class Pencil(NamedTuple):
    """Two matrices, their eigenpairs and cotangents of these, as NumPy arrays."""

    a: np.ndarray
    b: np.ndarray
    w: np.ndarray
    v: np.ndarray
    w_bar: np.ndarray
    v_bar: np.ndarray


@lru_cache(maxsize=4)
def pencil(batch: int, m: int, dtype: str) -> Pencil:
    """A random symmetric A and a B of condition 4, the same for every library."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((batch, m, m))
    q = np.linalg.qr(rng.standard_normal((batch, m, m)))[0]
    b = (q * rng.uniform(0.5, 2.0, (batch, 1, m))) @ q.mT
    a, b = (((x + x.mT) / 2).astype(dtype) for x in (a, b))
    w, v = ddnref.eigh_generalized(a, b)
    return Pencil(a, b, w, v, rng.standard_normal(w.shape).astype(dtype), rng.standard_normal(v.shape).astype(dtype))


def ours(batch: int, m: int, dtype: str, k: int = 0) -> Call:
    """The VJP on NumPy arrays with all checks, of all pairs or of the k largest."""
    p = pencil(batch, m, dtype)
    if not k:
        return partial(ddnref.eigh_generalized_vjp, p.w_bar, p.v_bar, p.w, p.v)
    bars = p.w_bar[..., -k:].copy(), p.v_bar[..., -k:].copy()
    return partial(ddnref.eigh_generalized_vjp, *bars, p.w, p.v, index=range(m - k, m))


def forward(batch: int, m: int, dtype: str) -> Call:
    p = pencil(batch, m, dtype)
    return partial(ddnref.eigh_generalized, p.a, p.b)


def products(batch: int, m: int, dtype: str) -> Call:
    """The stated limit: five NumPy products of the same matrices."""
    p = pencil(batch, m, dtype)

    def call() -> None:
        for _ in range(5):
            p.v @ p.v_bar

    return call


def textbook(batch: int, m: int, dtype: str) -> Call:
    """The reverse pass through the Cholesky factor, on NumPy arrays."""
    p = pencil(batch, m, dtype)
    return partial(reference.eigh_generalized_vjp_cholesky, p.w_bar, p.v_bar, p.w, p.v, p.a, p.b)


def through_cholesky(torch: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """Eigenpairs in PyTorch as its users write them."""
    factor = torch.linalg.cholesky(b)
    half = torch.linalg.solve_triangular(factor, a, upper=False)
    w, y = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    return w, torch.linalg.solve_triangular(factor.mT, y, upper=True)


def torch_backward(batch: int, m: int, dtype: str, k: int = 0) -> Call:
    """PyTorch's backward through `through_cholesky`, of all pairs or through a slice of the k largest."""
    torch = load("torch")
    p = pencil(batch, m, dtype)
    leaves = [torch.from_numpy(x.copy()).requires_grad_() for x in (p.a, p.b)]
    outputs = [x[..., -k:] if k else x for x in through_cholesky(torch, *leaves)]
    bars = [torch.from_numpy(x[..., -k:].copy() if k else x) for x in (p.w_bar, p.v_bar)]
    return lambda: torch.autograd.grad(outputs, leaves, bars, retain_graph=True)


def jax_backward(batch: int, m: int, dtype: str, k: int = 0) -> Call:
    """JAX's pullback of the same steps, compiled."""
    jax = load_jax()
    p = pencil(batch, m, dtype)

    def pairs(a: Any, b: Any) -> Any:
        factor = jax.numpy.linalg.cholesky(b)
        solve = partial(jax.lax.linalg.triangular_solve, left_side=True, lower=True)
        half = jax.numpy.matrix_transpose(solve(factor, a))
        w, y = jax.numpy.linalg.eigh(solve(factor, half))
        v = jax.lax.linalg.triangular_solve(factor, y, left_side=True, lower=True, transpose_a=True)
        return (w[..., -k:], v[..., -k:]) if k else (w, v)

    _, pull = jax.vjp(pairs, *map(jax.numpy.asarray, (p.a, p.b)))
    pull = jax.jit(pull)
    bars = tuple(jax.numpy.asarray(x[..., -k:] if k else x) for x in (p.w_bar, p.v_bar))
    return lambda: jax.block_until_ready(pull(bars))


PEERS: dict[str, Callable[..., Call]] = {"torch": torch_backward, "jax": jax_backward}


# --- finite elements on a grid -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def grid(rows: int, columns: int) -> tuple[Any, Any]:
    """Stiffness and mass of bilinear elements on a rectangle of 1×2.3 that is held at its border, sparse."""
    import scipy.sparse as sp

    def lines(n: int, length: float) -> tuple[Any, Any]:
        step = length / (n + 1)
        one, two = np.ones(n - 1), np.full(n, 2.0)
        bending = sp.diags_array([-one, two, -one], offsets=[-1, 0, 1]) / step
        return bending, sp.diags_array([one, 2 * two, one], offsets=[-1, 0, 1]) * step / 6

    (k_y, m_y), (k_x, m_x) = lines(rows, 1.0), lines(columns, 2.3)
    return (sp.kron(k_y, m_x) + sp.kron(m_y, k_x)).tocsr(), sp.kron(m_y, m_x).tocsr()


def grid_operators(rows: int, columns: int) -> tuple[Any, Any]:
    stiffness, mass = grid(rows, columns)
    from_scipy = ddnref.operators.from_scipy
    return from_scipy(stiffness, self_adjoint=True), from_scipy(mass, positive_definite=True)


def grid_forward(rows: int, columns: int) -> Call:
    """The six smallest pairs by shift and invert."""
    a, b = grid_operators(rows, columns)
    return partial(ddnref.eigsh_generalized, a, b, 6, sigma=0.0)


def grid_vjp(rows: int, columns: int) -> Call:
    """The gradient of a loss of the six eigenpairs."""
    a, b = grid_operators(rows, columns)
    ((w, v), saved), _ = ddnref.eigsh_generalized_fwd(a, b, 6, sigma=0.0)
    v_bar = np.random.default_rng(0).standard_normal(v.shape)
    return partial(ddnref.eigsh_generalized_vjp, w, v_bar, w, v, *saved, a, b, sigma=0.0)


def grid_scipy(rows: int, columns: int) -> Call:
    """ARPACK, by shift and invert with SciPy's sparse LU."""
    from scipy.sparse.linalg import eigsh

    stiffness, mass = grid(rows, columns)
    return partial(eigsh, stiffness, 6, M=mass, sigma=0.0)


# --- errors at a triple eigenvalue --------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def triple() -> tuple[np.ndarray, ...]:
    """Eigenvectors, both matrices, the matrix of the loss and both exact gradients of 200 random pencils."""
    rng = np.random.default_rng(0)
    q = [np.linalg.qr(rng.standard_normal((200, 6, 6)))[0] for _ in range(2)]
    v = (q[0] * np.exp(rng.uniform(0, np.log(3), (200, 1, 6)))) @ q[1]
    c = rng.standard_normal((200, 6, 6))
    c, left = (c + c.mT) / 2, np.linalg.inv(v)
    a, b = left.mT @ (TRIPLE[:, None] * left), left.mT @ left
    # ⟨C, V_c V_cᵀ⟩: the cluster couples with the others alone, over gaps of 0.8 and more.
    m_ = np.where(INSIDE, 2 * v.mT @ c @ v, 0)
    gap, across = TRIPLE - TRIPLE[:, None], INSIDE[:, None] != INSIDE
    t = np.where(across, (m_ - m_.mT) / np.where(across, 2 * gap, 1), 0)
    mean = (TRIPLE + TRIPLE[:, None]) / 2
    return v, (a + a.mT) / 2, (b + b.mT) / 2, c, v @ t @ v.mT, -v @ (t * mean + (m_ + m_.mT) / 4) @ v.mT


def errors(implementation: str) -> np.ndarray:
    """Relative errors of the gradients of 200 pencils, the larger of both."""
    _, a, b, c, *exact = triple()
    if implementation == "ddnref":
        w, v = ddnref.eigh_generalized(a, b)
        found = ddnref.eigh_generalized_vjp(None, np.where(INSIDE, 2 * c @ v, 0), w, v)
    elif implementation == "textbook":
        w, v = ddnref.eigh_generalized(a, b)
        found = reference.eigh_generalized_vjp_cholesky(0 * w, np.where(INSIDE, 2 * c @ v, 0), w, v, a, b)
    else:
        torch = load("torch")
        leaves = [torch.from_numpy(x.copy()).requires_grad_() for x in (a, b)]
        top = through_cholesky(torch, *leaves)[1][..., 1:4]
        (torch.from_numpy(c) * (top @ top.mT)).sum().backward()
        found = [np.asarray((x.grad + x.grad.mT) / 2) for x in leaves]
    pairs = zip(found, exact, strict=True)
    each = [np.linalg.norm(x - y, axis=(-2, -1)) / np.linalg.norm(y, axis=(-2, -1)) for x, y in pairs]
    return np.max(each, axis=0)
