"""Polar factors and least squares, forward and gradient: ours, the products that are the limit, PyTorch's own."""

from __future__ import annotations

from typing import Any

import numpy as np

import ddnref

from ._common import Call, load, pin_threads


def matrices(batch: int, m: int, n: int, dtype: str) -> tuple[Any, Any]:
    """A batch of random matrices, and cotangents of W."""
    pin_threads()
    x, w_bar = np.random.default_rng(0).standard_normal((2, batch, m, n)).astype(dtype)
    return x, w_bar


def polar_forward(batch: int, m: int, n: int, dtype: str) -> Call:
    x, _ = matrices(batch, m, n, dtype)
    return lambda: ddnref.polar_fwd(x)


def polar_backward(batch: int, m: int, n: int, dtype: str) -> Call:
    x, w_bar = matrices(batch, m, n, dtype)
    (w, h), saved = ddnref.polar_fwd(x)
    return lambda: ddnref.polar_vjp(w_bar, None, w, h, *saved)


def polar_products(batch: int, m: int, n: int, dtype: str) -> Call:
    """The limit of `polar_backward` for square matrices: six products."""
    x, w_bar = matrices(batch, m, n, dtype)

    def call() -> None:
        for _ in range(6):
            x @ w_bar

    return call


def polar_both(batch: int, m: int, n: int, dtype: str) -> Call:
    """Factors and gradient on NumPy arrays."""
    x, w_bar = matrices(batch, m, n, dtype)

    def call() -> Any:
        (w, h), saved = ddnref.polar_fwd(x)
        return ddnref.polar_vjp(w_bar, None, w, h, *saved)

    return call


def polar_bridge(batch: int, m: int, n: int, dtype: str) -> Call:
    """Factors and gradient through the bridge to PyTorch."""
    torch = load("torch")
    from ddnref.interop.torch import differentiable

    polar = differentiable(ddnref.polar)
    return _recorded(torch, lambda x: polar(x)[0], *matrices(batch, m, n, dtype))


def polar_torch(batch: int, m: int, n: int, dtype: str) -> Call:
    """W and its gradient through ``torch.linalg.svd``; H is left out."""
    torch = load("torch")

    def closest(x: Any) -> Any:
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return u @ vh

    return _recorded(torch, closest, *matrices(batch, m, n, dtype))


def _recorded(torch: Any, function: Any, x: Any, bar: Any) -> Call:
    leaf, y_bar = torch.from_numpy(x.copy()).requires_grad_(), torch.from_numpy(bar)
    return lambda: torch.autograd.grad(function(leaf), leaf, y_bar)


# --- least squares ----------------------------------------------------------------------------------------------------


def system(batch: int, m: int, n: int, dtype: str) -> tuple[Any, Any, Any]:
    """Random matrices, right-hand sides, and cotangents of the solutions."""
    pin_threads()
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in ((batch, m, n), (batch, m), (batch, n)))


def lstsq_both(batch: int, m: int, n: int, dtype: str) -> Call:
    """Solution and gradient on NumPy arrays."""
    a, b, x_bar = system(batch, m, n, dtype)

    def call() -> Any:
        x, saved = ddnref.lstsq_fwd(a, b)
        return ddnref.lstsq_vjp(x_bar, x, *saved, a, b)

    return call


def lstsq_torch(batch: int, m: int, n: int, dtype: str) -> Call:
    """``torch.linalg.lstsq`` and its gradient; by a QR factorisation, for full rank alone."""
    torch = load("torch")
    a, b, x_bar = (torch.from_numpy(y.copy()) for y in system(batch, m, n, dtype))
    a, b = a.requires_grad_(), b.requires_grad_()
    return lambda: torch.autograd.grad(torch.linalg.lstsq(a, b[..., None]).solution[..., 0], (a, b), x_bar)
