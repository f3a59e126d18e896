"""Problems for ``ddnref.eigsh``: dense matrices with a decaying and a Gaussian spectrum, a weighted Laplacian."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

import ddnref
from ddnref._rules.samples import eigen_loss
from ddnref.operators import LinearOperator

from ._common import Call, kilobytes

K = 4
GRID = (100, 200)


class Dense(NamedTuple):
    x: np.ndarray
    w_bar: np.ndarray
    v_bar: np.ndarray


@lru_cache(maxsize=2)
def dense(spectrum: str, m: int) -> Dense:
    """``"1/i"`` with random eigenvectors, or a ``"gaussian"`` matrix, float64."""
    rng = np.random.default_rng(0)
    if spectrum == "gaussian":
        x = rng.standard_normal((m, m))
    else:
        u = rng.standard_normal(m)
        u /= np.linalg.norm(u)
        q = np.eye(m) - 2 * np.multiply.outer(u, u)
        x = (q / np.arange(1, m + 1)) @ q
    return Dense((x + x.T) / 2, rng.standard_normal(K), rng.standard_normal((m, K)))


def ours(spectrum: str, m: int, method: str = "iterative") -> Call:
    """Forward and backward, checks included."""
    p = dense(spectrum, m)

    def call() -> Any:
        ((w, v), saved), _ = ddnref.eigsh_fwd(p.x, K, method=method)
        return ddnref.eigsh_vjp(p.w_bar, p.v_bar, w, v, *saved, p.x)[0]

    return call


def full(spectrum: str, m: int) -> Call:
    """NumPy's eigh and the closed form for K columns."""
    p = dense(spectrum, m)

    def call() -> Any:
        w, v = np.linalg.eigh(p.x)
        return ddnref.eigh_vjp(p.w_bar, p.v_bar, w, v, index=range(m - 1, m - 1 - K, -1))

    return call


def forward(spectrum: str, m: int) -> Call:
    return partial(ddnref.eigsh, dense(spectrum, m).x, K, method="iterative")


def scipy_forward(spectrum: str, m: int) -> Call:
    """ARPACK, to the same tolerance."""
    from scipy.sparse.linalg import eigsh

    return partial(eigsh, dense(spectrum, m).x, K, which="LA", tol=1e-12)


@lru_cache(maxsize=2)
def tall(spectrum: str, shape: tuple[int, int]) -> np.ndarray:
    """A Gaussian matrix, or one with singular values ``"1/i"``."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal(shape)
    if spectrum == "gaussian":
        return a
    return (np.linalg.qr(a)[0] / np.arange(1, shape[1] + 1)) @ np.linalg.qr(rng.standard_normal((shape[1],) * 2))[0]


def triples(spectrum: str, shape: tuple[int, int]) -> Call:
    return partial(ddnref.svds, tall(spectrum, shape), K)


def triples_and_gradient(spectrum: str, shape: tuple[int, int]) -> Call:
    """Forward and backward of a loss of the approximation of rank K."""
    a, c = tall(spectrum, shape), np.random.default_rng(1).standard_normal(shape)

    def call() -> Any:
        ((u, s, vh), saved), _ = ddnref.svds_fwd(a, K)
        left, right = c @ vh.T, u.T @ c
        return ddnref.svds_vjp(left * s, np.diagonal(u.T @ left), s[:, None] * right, u, s, vh, *saved, a)[0]

    return call


def scipy_triples(spectrum: str, shape: tuple[int, int]) -> Call:
    """ARPACK on the Gram matrix, to the same tolerance."""
    from scipy.sparse.linalg import svds

    return partial(svds, tall(spectrum, shape), K, tol=1e-12)


def gradient_error(spectrum: str, m: int) -> float:
    """Error of the gradient of a gauge-independent loss, relative to the closed form."""
    p = dense(spectrum, m)
    loss = eigen_loss(np.asarray, np.random.default_rng(1), (m,), K, False)[1]
    ((w, v), saved), _ = ddnref.eigsh_fwd(p.x, K, method="iterative")
    got = ddnref.eigsh_vjp(*loss(w, v), w, v, *saved, p.x)[0]
    w, v = np.linalg.eigh(p.x)
    columns = range(m - 1, m - 1 - K, -1)
    expected = ddnref.eigh_vjp(*loss(w[columns], v[:, columns]), w, v, index=columns)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# --- a Laplacian with a weight on every edge of a grid ----------------------------------------------------------


def _flow(params: tuple[Any, ...], x: Any) -> Any:
    across, down = params
    y = np.zeros(x.shape)
    flow = (x[..., :, 1:] - x[..., :, :-1]) * across
    y[..., :, 1:] += flow
    y[..., :, :-1] -= flow
    flow = (x[..., 1:, :] - x[..., :-1, :]) * down
    y[..., 1:, :] += flow
    y[..., :-1, :] -= flow
    return y


def _flow_vjp(params: tuple[Any, ...], y_bar: Any, x: Any) -> tuple[Any, ...]:
    across = (y_bar[..., :, 1:] - y_bar[..., :, :-1]) * (x[..., :, 1:] - x[..., :, :-1])
    down = (y_bar[..., 1:, :] - y_bar[..., :-1, :]) * (x[..., 1:, :] - x[..., :-1, :])
    return tuple(g.reshape(-1, *p.shape).sum(axis=0) for g, p in zip((across, down), params, strict=True))


def laplacian(shape: tuple[int, int] = GRID) -> LinearOperator:
    """The free (Neumann) Laplacian of a grid, with random edge weights between 0.5 and 1.5 as parameters."""
    rng = np.random.default_rng(0)
    params = rng.uniform(0.5, 1.5, (shape[0], shape[1] - 1)), rng.uniform(0.5, 1.5, (shape[0] - 1, shape[1]))
    return LinearOperator(params, _flow, _flow, _flow_vjp, shape, shape, self_adjoint=True)


class Grid(NamedTuple):
    residual: float
    error: float
    """Relative error of the gradient along its own direction, against central differences with one Richardson step."""
    peak: float
    """Resident memory of the process at its largest, in GiB."""


def grid(shape: tuple[int, int] = GRID, k: int = 6, basis: int = 64, step: float = 3e-3) -> Grid:
    """The k smoothest eigenvectors of the Laplacian and the gradient with respect to its edge weights."""
    operator = laplacian(shape)
    solve = partial(ddnref.eigsh_fwd, k=k, which="SA", basis=basis)
    ((w, v), saved), info = solve(operator)
    value, gradient = eigen_loss(np.asarray, np.random.default_rng(1), (operator.size,), k, False)
    w_bar, v_bar = gradient(w, v.reshape(-1, k))
    bars, _ = ddnref.eigsh_vjp(w_bar, v_bar.reshape(v.shape), w, v, *saved, operator, which="SA")
    size = float(np.sqrt(sum(np.sum(bar * bar) for bar in bars)))
    start = v.sum(axis=-1)

    def central(h: float) -> float:
        f = []
        for sign in (1, -1):
            moved = operator.with_params(
                *(p + sign * h / size * bar for p, bar in zip(operator.params, bars, strict=True))
            )
            ((w, v), _), _ = solve(moved, v0=start)
            f.append(float(value(w, v.reshape(-1, k))))
        return (f[0] - f[1]) / (2 * h)

    numerical = (4 * central(step / 2) - central(step)) / 3
    peak = kilobytes("VmHWM") / 2**20
    return Grid(float(np.max(info.residual_norm)), abs(numerical - size) / size, peak)
