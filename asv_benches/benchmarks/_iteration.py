"""Problems, rivals and errors for the iterative eigenpairs. Nothing here is a benchmark by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

import ddnref

from ._accuracy import counted_reads, extra_arrays, relative
from ._common import Call, load

DRAWS: dict[str, Callable[..., np.ndarray]] = {
    "gaussian": lambda rng, shape: np.abs(rng.standard_normal(shape)),
    "uniform": lambda rng, shape: rng.uniform(0.0, 1.0, shape),
    "von Mises": lambda rng, shape: np.abs(rng.vonmises(0.0, 4.0, shape)),
    "choice": lambda rng, shape: rng.choice(10, shape).astype(np.float64),
    "zero-mean": lambda rng, shape: rng.standard_normal(shape),
}
"""The distributions of the deep declarative networks tutorial, all positive, and one that is not."""


IMPLICIT = ("bordered", "fixed_point")


class Pairs(NamedTuple):
    """float32 matrices, correctly rounded leading eigenpairs, random cotangents; and the gradient in float64."""

    w_bar: np.ndarray
    v_bar: np.ndarray
    w: np.ndarray
    v: np.ndarray
    x: np.ndarray
    exact: np.ndarray


@lru_cache(maxsize=4)
def matrices(distribution: str, batch: int, m: int, seed: int = 0) -> np.ndarray:
    x = DRAWS[distribution](np.random.default_rng(seed), (batch, m, m))
    return (x + x.mT).astype(np.float32)


def pairs(x: np.ndarray, numbers: Sequence[int]) -> Iterator[Pairs]:
    """The n pairs of largest magnitude, for each n, from `numpy.linalg.eigh` of the same entries in float64."""
    w, v = np.linalg.eigh(x.astype(np.float64))
    magnitude = np.argsort(-np.abs(w), axis=-1)
    for n in numbers:
        order, rng = magnitude[..., :n], np.random.default_rng(1)
        w_bar, v_bar = (rng.standard_normal(s).astype(np.float32) for s in (order.shape, (*x.shape[:-1], n)))
        bars = w_bar.astype(np.float64), v_bar.astype(np.float64)
        exact = [ddnref.eigh_vjp(*(bar[i] for bar in bars), w[i], v[i], index=order[i]) for i in range(len(x))]
        w_n, v_n = np.take_along_axis(w, order, axis=-1), np.take_along_axis(v, order[:, None, :], axis=-1)
        yield Pairs(w_bar, v_bar, w_n.astype(np.float32), v_n.astype(np.float32), x, np.stack(exact))


@lru_cache(maxsize=4)
def planted_pairs(batch: int, m: int, n: int) -> Pairs:
    """Zero-mean matrices with n pairs put in just outside their spectrum: no eigendecomposition in the setup.

    The largest eigenvalues of what is left are at ``± 2.8 √m``, the n at 3, −3.1, 3.2, … times that root.
    """
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((batch, *shape)).astype(np.float32)

    w = np.broadcast_to(m**0.5 * (3 + 0.1 * np.arange(n)) * (-1.0) ** np.arange(n), (batch, n))
    y = np.linalg.qr(draw(m, n).astype(np.float64))[0]
    x = matrices("zero-mean", batch, m).astype(np.float64)
    x = x - y @ (y.mT @ x)
    x = x - (x @ y) @ y.mT + (y * w[:, None, :]) @ y.mT
    x = ((x + x.mT) / 2).astype(np.float32)
    return Pairs(draw(n), draw(m, n), w.astype(np.float32), y.astype(np.float32), x, x)


# --- the reverse pass -------------------------------------------------------------------------------------------


def ours(batch: int, m: int, n: int, method: str = "bordered") -> Call:
    """The default call, its check included."""
    p = planted_pairs(batch, m, n)
    return partial(ddnref.simultaneous_iteration_vjp, *p[:5], method=method, symmetric=True)


def textbook(batch: int, m: int, n: int) -> Call:
    """The node's formula with its structure used, in plain NumPy: three solves with H for each pair.

    ``K = H⁻¹Aᵀ (A H⁻¹Aᵀ)⁻¹ A H⁻¹ȳ − H⁻¹ȳ``, ``X̄ = −K yᵀ − y Kᵀ``, with ``H = 2λI − (X + Xᵀ)`` and ``A = 2yᵀ``. It has
    no cotangent for the eigenvalues.
    """
    p = planted_pairs(batch, m, n)
    return partial(structured, p.v_bar, p.w, p.v, p.x)


def structured(v_bar: np.ndarray, w: np.ndarray, v: np.ndarray, x: np.ndarray) -> np.ndarray:
    eye, twice, x_bar = np.eye(x.shape[-1], dtype=x.dtype), x + x.mT, np.zeros_like(x)
    for i in range(w.shape[-1]):
        y, y_bar = v[..., i : i + 1], v_bar[..., i : i + 1]
        h, a = 2 * w[..., i, None, None] * eye - twice, 2 * y.mT
        h_a, h_y_bar = np.linalg.solve(h, a.mT), np.linalg.solve(h, y_bar)
        a_h = np.linalg.solve(h.mT, a.mT).mT
        k = h_a @ np.linalg.solve(a @ h_a, a_h @ y_bar) - h_y_bar
        x_bar += -k @ y.mT - y @ k.mT
    return x_bar


def errors(m: int, distributions: Sequence[str] = tuple(DRAWS)) -> dict[tuple[int, str], float]:
    """Worst relative error of five float32 gradients over the distributions, by n and method."""
    worst = dict.fromkeys(product((1, 4), IMPLICIT), 0.0)
    for distribution in distributions:
        for p in pairs(matrices(distribution, 5, m), (1, 4)):
            for method in IMPLICIT:
                key = p.w.shape[-1], method
                worst[key] = max(worst[key], _worst(p, method))
    return worst


def error_at_gap(gap: float, method: str, m: int = 64) -> float:
    """Worst error for matrices whose largest eigenvalue is 1, the second smaller by `gap`, the others below 1/2."""
    rng = np.random.default_rng(0)
    spectrum = np.concatenate([[1.0, 1.0 - gap], rng.uniform(-0.5, 0.5, m - 2)])
    q, _ = np.linalg.qr(rng.standard_normal((5, m, m)))
    x = ((q * spectrum) @ q.mT).astype(np.float32)
    (p,) = pairs((x + x.mT) / 2, (1,))
    return _worst(p, method)


def _worst(p: Pairs, method: str) -> float:
    x_bar = ddnref.simultaneous_iteration_vjp(*p[:5], method=method, symmetric=True)
    return float(np.max(relative(x_bar.astype(np.float64), p.exact)))


def textbook_error(m: int, n: int, distribution: str = "zero-mean") -> float:
    """Worst error of the textbook form, from the same pairs, for the eigenvectors' cotangents alone."""
    (p,) = pairs(matrices(distribution, 5, m), (n,))
    exact = p.exact - (p.v.astype(np.float64) * p.w_bar[..., None, :]) @ p.v.mT
    return float(np.max(relative(structured(p.v_bar, p.w, p.v, p.x).astype(np.float64), exact)))


def memory(m: int, n: int, method: str = "bordered") -> float:
    """Peak memory of the VJP over that of the textbook form, both above their inputs."""
    x = matrices("zero-mean", 5, m)
    return extra_arrays(ours(5, m, n, method), x) / extra_arrays(textbook(5, m, n), x)


def host_reads(throw: bool) -> int:
    """Values that the VJP reads on the host, counted on array-api-strict arrays."""
    strict = load("array_api_strict")
    (p,) = pairs(matrices("zero-mean", 3, 6), (2,))
    arrays = [strict.asarray(a) for a in p[:5]]
    with counted_reads(type(arrays[0])) as reads:
        ddnref.simultaneous_iteration_vjp(*arrays, symmetric=True, throw=throw)
    return len(reads)


# --- the iterations ---------------------------------------------------------------------------------------------


def our_power(batch: int, m: int) -> Call:
    """With its stopping rule, on the tutorial's own matrices."""
    return partial(ddnref.power_iteration, matrices("gaussian", batch, m))


def torch_power(batch: int, m: int, steps: int = 100) -> Call:
    """A fixed number of steps, eager, as the tutorial iterates by default."""
    torch = load("torch")
    x = torch.from_numpy(matrices("gaussian", batch, m).copy())
    start = torch.from_numpy(np.random.default_rng(0).standard_normal((batch, m, 1)).astype(np.float32))

    def call() -> Any:
        v = start
        with torch.no_grad():
            for _ in range(steps):
                v = x @ v
                v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        return v

    return call


def final_residuals(batch: int, m: int) -> tuple[float, float]:
    """Worst ``‖Xv − λv‖ / |λ|``, in float64, of our power iteration and of PyTorch's 100 steps."""
    x = matrices("gaussian", batch, m).astype(np.float64)
    (_, v), _ = our_power(batch, m)()

    def residual(v: np.ndarray) -> float:
        v = v.astype(np.float64)
        w = np.sum(v * (x @ v[..., None])[..., 0], axis=-1)
        return float(np.max(ddnref.eigen_residual(x, w, v) / np.abs(w)))

    return residual(v), residual(torch_power(batch, m)().numpy()[..., 0])


STEPS = 20


def our_steps(batch: int, m: int, n: int) -> Call:
    """Twenty steps of simultaneous iteration that none can leave early."""
    x = matrices("zero-mean", batch, m)
    return partial(ddnref.simultaneous_iteration, x, n, symmetric=True, rtol=0.0, maxiter=STEPS, throw=False)


def qr_of_all_columns(batch: int, m: int) -> Call:
    """One step of the tutorial's form: all m columns are multiplied and orthogonalised, whatever n is."""
    x = matrices("zero-mean", batch, m)
    q, _ = np.linalg.qr(x)
    return lambda: np.linalg.qr(x @ q)


def misreported(steps: int = 100, m: int = 512, n: int = 4) -> int:
    """Items of five of which ``info`` says something else than their residual, recomputed in float64.

    Called converged, a residual may be twice the tolerance; called unconverged, no less than half.
    """
    x, rtol = matrices("zero-mean", 5, m), (16 + m**0.5) * float(np.finfo(np.float32).eps)
    (w, v), info = ddnref.simultaneous_iteration(x, n, symmetric=True, rtol=rtol, maxiter=steps, throw=False)
    residual = np.linalg.norm(ddnref.eigen_residual(*(a.astype(np.float64) for a in (x, w, v))), axis=-1)
    residual /= np.linalg.norm(w, axis=-1) * rtol
    return int(np.sum(np.where(info.converged, residual > 2, residual < 0.5)))
