"""Random linear systems and factorisations, well conditioned."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddnref._rules.samples import Batch, Convert, Sample, is_double, normal, random_spectrum


def solve(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A matrix near a rotation, and a vector."""
    a, b = normal(rng, (*batch, m, m), is_complex), normal(rng, (*batch, m), is_complex)
    a = np.linalg.qr(a)[0] + 0.3 * a / max(m, 1) ** 0.5
    return Sample((convert(a), convert(b)), {}, None, 0.3, 30.0)


def linear_solve(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A matrix near the identity, where an iteration is fast; small ones are factorised."""
    a = np.eye(m) + 0.3 * normal(rng, (*batch, m, m), is_complex) / max(m, 1) ** 0.5
    sample = Sample((convert(a), convert(normal(rng, (*batch, m), is_complex))), {}, None, 0.3, 30.0)
    options: dict[str, Any] = {"solver": "gmres"} if m >= 12 else {}
    options["rtol"] = 1e-13 if is_double(sample.inputs[0]) else 2e-6
    return sample._replace(options=options)


def lstsq(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A tall matrix with orthogonal columns of length 1, slightly disturbed, and a vector."""
    n = max(1, m // 2)
    a, b = normal(rng, (*batch, m, n), is_complex), normal(rng, (*batch, m), is_complex)
    a = np.linalg.qr(a)[0] + 0.1 * a / max(m, 1) ** 0.5
    return Sample((convert(a), convert(b)), {}, None, 0.3, 30.0)


def definite(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A positive definite matrix with eigenvalues between 0.5 and 2."""
    a = random_spectrum(rng, batch, rng.uniform(0.5, 2.0, (*batch, m)), is_complex)
    return Sample((convert(a),), {}, None, 0.5, 40.0)


def square(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The matrix of `solve`."""
    sample = solve(convert, rng, batch, m, is_complex)
    return sample._replace(inputs=sample.inputs[:1])


def triangular(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """An upper triangle with a large diagonal, beside a lower one that is not read."""
    a = 0.5 * normal(rng, (*batch, m, m), is_complex) / max(m, 1) ** 0.5
    a = np.where(np.eye(m) == 1, rng.uniform(1.0, 2.0, (*batch, m, 1)), a)
    return Sample((convert(a), convert(normal(rng, (*batch, m), is_complex))), {}, None, 0.3, 30.0)


def tridiagonal(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """Three bands without symmetry, and a vector."""
    lower, upper = (0.3 * normal(rng, (*batch, m - 1), is_complex) for _ in range(2))
    diagonal = rng.uniform(2.0, 3.0, (*batch, m)) * np.exp(1j * rng.uniform(0, 6, m) if is_complex else 0)
    b = normal(rng, (*batch, m), is_complex)
    return Sample(tuple(convert(z) for z in (lower, diagonal, upper, b)), {}, None, 0.3, 30.0)


def block_tridiagonal(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """Blocks of order two, those on the diagonal near rotations, and a vector."""
    n, k = (m + 1) // 2, min(m, 2)
    lower, upper, diagonal = (normal(rng, (*batch, count, k, k), is_complex) for count in (n - 1, n - 1, n))
    diagonal = 2 * np.linalg.qr(diagonal)[0] + 0.1 * diagonal
    b = normal(rng, (*batch, n, k), is_complex)
    return Sample(tuple(convert(z) for z in (0.2 * lower, diagonal, 0.2 * upper, b)), {}, None, 0.3, 30.0)
