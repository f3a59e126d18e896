"""Matrices that are singular but for rounding, and regular ones that look as if they were, by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

Kind = Callable[[np.random.Generator, Any], Any]


def _gram(x: Any, dtype: Any) -> Any:
    x = x.astype(dtype)
    return x.T @ x


def _features(rng: np.random.Generator) -> Any:
    return rng.standard_normal((50, 5))


def _duplicate(rng: np.random.Generator) -> Any:
    x = _features(rng)
    x[:, 4] = x[:, 0]
    return x * 10.0 ** rng.uniform(-3, 3, 5)


def _combination(rng: np.random.Generator) -> Any:
    x = _features(rng)
    x[:, 4] = x[:, 0] - 2 * x[:, 1]
    return x


def _centred(rng: np.random.Generator) -> Any:
    """Features whose sum is zero in each sample."""
    x = _features(rng)[:, :4]
    return x - x.mean(axis=1, keepdims=True)


def _dependent(rng: np.random.Generator, n: int = 6) -> Any:
    x = rng.standard_normal((n, n))
    x[-1] = 3 * x[0] - x[1]
    return x


def _units(rng: np.random.Generator, n: int, decades: float) -> Any:
    return 10.0 ** rng.uniform(-decades, decades, (n, 1))


def _without_small_pivot(dtype: Any) -> Any:
    """Each pivot is 1, and the smallest singular value about ``2⁻ⁿ``."""
    n = 35 if dtype == np.float32 else 70
    return np.eye(n, dtype=dtype) - np.triu(np.ones((n, n), dtype=dtype), 1)


def _low_rank(rng: np.random.Generator, dtype: Any) -> Any:
    return rng.standard_normal((30, 29)).astype(dtype) @ rng.standard_normal((29, 30)).astype(dtype)


def _with_condition(rng: np.random.Generator, shape: tuple[int, int], dtype: Any, one_small: bool) -> Any:
    kappa = 1e5 if dtype == np.float32 else 1e13
    q, u = (np.linalg.qr(rng.standard_normal((m, shape[1])))[0] for m in shape)
    s = np.where(np.arange(shape[1]) == 0, 1 / kappa, 1.0) if one_small else np.geomspace(1, 1 / kappa, shape[1])
    return (q * s) @ u


SQUARE_SINGULAR: dict[str, Kind] = {
    "covariance of centred features": lambda rng, dtype: _gram(_centred(rng), dtype),
    "covariance of dependent features": lambda rng, dtype: _gram(_combination(rng), dtype),
    "covariance of a duplicate in other units": lambda rng, dtype: _gram(_duplicate(rng), dtype),
    "dependent rows": lambda rng, dtype: _dependent(rng).astype(dtype),
    "dependent rows in units": lambda rng, dtype: (_dependent(rng) * _units(rng, 6, 12)).astype(dtype),
    "dependent columns in units": lambda rng, dtype: (_dependent(rng) * _units(rng, 6, 12)).T.astype(dtype),
    "low rank": _low_rank,
    "no small pivot": lambda rng, dtype: rng.permutation(_without_small_pivot(dtype)),
}  # fmt: skip
SQUARE_REGULAR: dict[str, Kind] = {
    "log spectrum": lambda rng, dtype: _with_condition(rng, (20, 20), dtype, False).astype(dtype),
    "one small": lambda rng, dtype: _with_condition(rng, (20, 20), dtype, True).astype(dtype),
    "random": lambda rng, dtype: rng.standard_normal((30, 30)).astype(dtype),
    "covariance in units": lambda rng, dtype: _gram(_features(rng) * _units(rng, 5, 6).T, dtype),
    "rows and columns in units": lambda rng, dtype: (
        rng.standard_normal((8, 8)) * _units(rng, 8, 12) * _units(rng, 8, 12).T
    ).astype(dtype),
    "diagonal": lambda rng, dtype: np.diag(_units(rng, 6, 30)[:, 0]).astype(dtype),
    "Hilbert": lambda rng, dtype: scipy.linalg.hilbert(4 if dtype == np.float32 else 10).astype(dtype),
}  # fmt: skip
TALL_SINGULAR: dict[str, Kind] = {
    "a duplicate in other units": lambda rng, dtype: _duplicate(rng).astype(dtype),
    "a combination": lambda rng, dtype: _combination(rng).astype(dtype),
    "sums of zero": lambda rng, dtype: _centred(rng).astype(dtype),
    "low rank": _low_rank,
    "no small pivot": lambda _, dtype: _without_small_pivot(dtype),
}  # fmt: skip
TALL_REGULAR: dict[str, Kind] = {
    "log spectrum": lambda rng, dtype: _with_condition(rng, (30, 20), dtype, False).astype(dtype),
    "one small": lambda rng, dtype: _with_condition(rng, (30, 20), dtype, True).astype(dtype),
    "random": lambda rng, dtype: rng.standard_normal((30, 30)).astype(dtype),
    "columns in units": lambda rng, dtype: (_features(rng) * _units(rng, 5, 12).T).astype(dtype),
    "diagonal": lambda rng, dtype: np.diag([1.0, 1e-20]).astype(dtype),
}  # fmt: skip


def stack(kind: Kind, rng: np.random.Generator, dtype: Any, count: int, library: str = "numpy") -> Any:
    """`count` matrices for NumPy; fewer where they take longer."""
    count = {"numpy": count, "array-api-strict": 1}.get(library, max(1, count // 10))
    return np.stack([kind(rng, dtype) for _ in range(count)])
