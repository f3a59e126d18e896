"""Matrices with known eigenvalues and eigenvectors, and losses whose gradient is known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np


def adjoint(x: Any) -> Any:
    return np.conj(np.swapaxes(x, -1, -2))


def rotation(rng: np.random.Generator, m: int, batch: tuple[int, ...] = (), is_complex: bool = False) -> Any:
    z = rng.standard_normal((*batch, m, m))
    return np.linalg.qr(z + 1j * rng.standard_normal(z.shape) if is_complex else z)[0]


def symmetric(rng: np.random.Generator, m: int, batch: tuple[int, ...] = (), is_complex: bool = False) -> Any:
    z = rng.standard_normal((*batch, m, m))
    z = z + 1j * rng.standard_normal(z.shape) if is_complex else z
    return (z + adjoint(z)) / 2


def with_singular(
    rng: np.random.Generator,
    m: int,
    sigma: Any,
    batch: tuple[int, ...] = (),
    is_complex: bool = False,
    n: int | None = None,
) -> Any:
    """An m×n matrix with these singular values, up to the rounding of its entries; by default as many columns."""
    sigma = np.asarray(sigma)
    left, right = (
        rotation(rng, side, batch, is_complex)[..., : len(sigma)] for side in (m, len(sigma) if n is None else n)
    )
    return (left * sigma) @ adjoint(right)


def with_spectrum(q: Any, w: Any) -> Any:
    x = (q * np.asarray(w)[..., None, :]) @ adjoint(q)
    return (x + adjoint(x)) / 2


def projector_gradient(q: Any, w: Any, inside: Any, c: Any) -> Any:
    """Gradient of ``Re tr(C P)``, P the projector of the eigenvalues marked by `inside`, by perturbation theory."""
    w = np.asarray(w, dtype=np.float64)
    inside = np.asarray(inside)
    gap = w[:, None] - w[None, :]
    across = inside[:, None] != inside[None, :]
    phi = np.where(across, np.where(inside[:, None], 1.0, -1.0) / np.where(across, gap, 1.0), 0.0)
    c = (c + adjoint(c)) / 2
    return q @ (phi * (adjoint(q) @ c @ q)) @ adjoint(q)


def relative(x: Any, y: Any) -> float:
    size = np.linalg.norm(np.ravel(y))
    return float(np.linalg.norm(np.ravel(x - y)) / (size if size else 1.0))
