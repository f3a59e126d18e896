"""Random matrices with known spectra, and tall factors."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddnref._core.arrays import Array
from ddnref._rules.samples import Batch, Convert, Sample, eigen_loss, is_double, normal, random_spectrum


def eigh(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool, k: int = 0) -> Sample:
    """Eigenvalues 0.05 to 0.15 apart, on both sides of zero."""
    # Shifted so that both signs occur.
    gaps = rng.uniform(0.05, 0.15, (*batch, m))
    w = np.cumsum(gaps, axis=-1) - 0.05 * m
    x = convert(random_spectrum(rng, batch, w, is_complex))
    size = float(np.max(np.abs(w))) if w.size else 1.0
    loss = eigen_loss(convert, rng, (*batch, m), k or m, is_complex)
    return Sample((x,), {"k": k} if k else {}, loss, 0.05, size / 0.05)


def eigh_topk(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The problem of `eigh`, for the largest third of the eigenpairs."""
    return eigh(convert, rng, batch, m, is_complex, k=max(1, m // 3))


def eigsh(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The problem of `eigh` for a sixth of the eigenpairs; small matrices leave the iteration no room."""
    sample = eigh(convert, rng, batch, m, is_complex, k=max(1, m // 6))
    options: dict[str, Any] = {"method": "iterative", "basis": m // 2 + 3} if m >= 12 else {}
    # Finite differences compare in double precision, and need eigenpairs as exact as they get.
    if is_double(sample.inputs[0]):
        options["rtol"] = 1e-14
    return sample._replace(options={**sample.options, **options})


def spectral(
    convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool, **options: Any
) -> Sample:
    """Positive definite, with a triple eigenvalue where there is room, because degeneracy is no obstacle here."""
    w = rng.uniform(0.5, 2.0, (*batch, m))
    # Entries 1 and 2 equal entry 0.
    w[..., 1 : min(3, m - 1)] = w[..., :1]
    return Sample((convert(random_spectrum(rng, batch, w, is_complex)),), options, None, 0.5, 40.0)


def square(w: Array) -> Array:
    """``f(λ) = λ²``."""
    return w * w


def twice(w: Array) -> Array:
    """The derivative of `square`, ``f'(λ) = 2 λ``."""
    return 2 * w


def power_iteration(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, _: bool, n: int = 0) -> Sample:
    """A matrix that is not symmetric, its dominant eigenvalue negative and well ahead."""
    k = n or 1
    w = np.concatenate([[-2.0, 1.5, -1.1][: min(k, m)], rng.uniform(-0.4, 0.4, max(0, m - k))])
    # Eigenvectors near those of a rotation are well conditioned.
    basis = np.linalg.qr(rng.standard_normal((*batch, m, m)))[0] + 0.1 * rng.standard_normal((*batch, m, m)) / m**0.5
    x = convert((basis * w) @ np.linalg.inv(basis))
    options = {"maxiter": 200, **({"n": n} if n else {})}
    return Sample((x,), options, None, 0.3, 2.0 / 0.3)


def simultaneous_iteration(
    convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool
) -> Sample:
    """The matrix of `power_iteration`, its three largest eigenvalues well ahead of the others."""
    return power_iteration(convert, rng, batch, m, is_complex, n=min(m, 3))


def tall(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """Orthogonal columns of length 1, slightly disturbed."""
    n = max(1, m // 2)
    # An orthonormal basis, and a tenth of the matrix that it came from.
    z = normal(rng, (*batch, m, n), is_complex)
    a = np.linalg.qr(z)[0] + 0.1 * z / m**0.5
    return Sample((convert(a),), {}, None, 0.3, 3.0)


def gram_eigh(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A tall factor whose squared singular values lie a tenth apart, and the leading half of them."""
    n = max(1, m // 2)
    k = (n + 1) // 2

    def orthonormal(rows: int) -> Any:
        return np.linalg.qr(normal(rng, (*batch, rows, n), is_complex))[0]

    # V = U diag(σ) Wᴴ with random factors.
    sigma = np.sqrt(1 + 0.1 * np.arange(n))
    v = (orthonormal(m) * sigma) @ np.conj(np.swapaxes(orthonormal(n), -1, -2))
    return Sample(
        (convert(v),), {"k": k}, eigen_loss(convert, rng, (*batch, m), k, is_complex), 0.1, (1 + 0.1 * n) / 0.1
    )


def gram_eigvalsh(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The factor of `gram_eigh`, for a loss of all eigenvalues."""
    return gram_eigh(convert, rng, batch, m, is_complex)._replace(options={}, loss=None)
