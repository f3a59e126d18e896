"""Random problems for the declarative nodes, away from where their gradients jump."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddnref._rules.samples import Batch, Convert, Sample


def sphere(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, _: bool, **options: Any) -> Sample:
    """A point outside a sphere of any norm, half its entries in the support."""
    norm, signs = options.get("norm", 2), rng.choice([-1.0, 1.0], (*batch, m))
    if norm == 1:  # magnitudes around θ = 1
        x = signs * np.abs(_around(rng, batch, m, 1.0))
    elif norm == 2:  # away from the centre
        x = rng.standard_normal((*batch, m)) + 2 * signs / m**0.5
    else:
        x = signs * np.where(
            np.arange(m) % 2 == 0, rng.uniform(1.3, 2, (*batch, m)), rng.uniform(0.2, 0.7, (*batch, m))
        )
    return Sample((convert(x),), options, None, 0.3 / m, 10.0 * m)


def simplex(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, _: bool) -> Sample:
    """A point with half its entries in the support."""
    return Sample((convert(_around(rng, batch, m, rng.standard_normal())),), {}, None, 0.3 / m, 10.0 * m)


def least_squares_on_sphere(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, _: bool) -> Sample:
    """An overdetermined problem whose free solution lies well outside the sphere."""
    m = max(m, 2)  # in one dimension nothing could move
    a, b = rng.standard_normal((*batch, m + 2, m)), 3 * rng.standard_normal((*batch, m + 2))
    return Sample((convert(a), convert(b)), {}, None, 0.1, 1e3)


def weighted_least_squares(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, _: bool) -> Sample:
    """An overdetermined problem with ridge and bias."""
    a, b = rng.standard_normal((*batch, 2 * m + 2, m)), rng.standard_normal((*batch, 2 * m + 2))
    inputs = (a, b, rng.uniform(0.5, 1.5, b.shape), rng.uniform(0.5, 1.5, batch))
    return Sample(tuple(convert(z) for z in inputs), {}, None, 0.5, 1e3)


def sinkhorn(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, _: bool) -> Sample:
    """A cost that is not square; the marginals may only move with their sums fixed."""
    m = max(m, 2)  # a single row would leave nothing to choose
    p, q = rng.uniform(0.5, 1.5, (*batch, m)), rng.uniform(0.5, 1.5, (*batch, m + 1))
    p, q = p / np.sum(p, axis=-1, keepdims=True), q / np.sum(q, axis=-1, keepdims=True)
    cost, eps = rng.uniform(0, 1, (*batch, m, m + 1)), rng.uniform(0.15, 0.25, batch)
    return Sample(tuple(convert(np.asarray(z)) for z in (cost, p, q, eps)), {}, None, 0.1, 1e3)


def robust_pool(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, _: bool, **options: Any) -> Sample:
    """A cluster within a tenth, and outliers beyond three."""
    x = 0.1 * rng.standard_normal((*batch, m))
    # A third of the numbers, less than the majority, are outliers.
    x[..., : (m - 1) // 3] += 3 + rng.uniform(0, 1, (*batch, (m - 1) // 3))
    return Sample((convert(x),), options, None, 0.5, 10.0)


def _around(rng: np.random.Generator, batch: Batch, m: int, theta: float) -> Any:
    """Numbers above and below θ, those above it by a total of one."""
    over = np.arange(m) % 2 == 0
    y = np.where(over, rng.uniform(0.5, 1.5, (*batch, m)), 0)
    return theta + y / np.sum(y, axis=-1, keepdims=True) - np.where(over, 0, rng.uniform(0.2, 0.8, (*batch, m)))
