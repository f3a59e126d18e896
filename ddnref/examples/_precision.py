"""Measure the errors of the tutorial's passes and of ddnref's against the closed form ``ddnref.eigh_vjp`` in float64.

The matrices are float32 numbers for both precisions, so that there is one truth.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

import ddnref
from ddnref.examples import _passes
from ddnref.examples._passes import Matrix

DTYPES = ("float32", "float64")
BATCH = 5
PATIENCE = 20.0  # seconds: longest expected time of one seed at one size
SMALL = 64  # the size at which everything is compared


class Key(NamedTuple):
    """The origin of an error; `quantity` is "λ", "y", "eigen", "fixed point" or the name of a backward pass."""

    distribution: str
    m: int
    n: int
    dtype: str
    forward: str
    quantity: str
    cotangent: str = ""


class Precision(NamedTuple):
    """Errors, one for every matrix, and the seconds expected per seed at sizes that were skipped."""

    errors: dict[Key, list[float]]
    skipped: dict[int, float]

    def median(self, key: Key) -> float:
        """Return infinity where more than half are not finite, NaN where nothing was measured."""
        return float(np.median(self._values(key)))

    def worst(self, key: Key) -> float:
        """Return the largest; infinity where one is not finite, NaN where nothing was measured."""
        return float(np.max(self._values(key)))

    def _values(self, key: Key) -> Matrix:
        values = np.asarray(self.errors.get(key, []))
        return np.where(np.isfinite(values), values, np.inf) if values.size else np.asarray([np.nan])


def precision(sizes: Iterable[int], seeds: Sequence[int], *, full: bool, patience: float = PATIENCE) -> Precision:
    """Compare all passes on Gaussian matrices of every size, and with `full` on all that the tutorial compares.

    A size is skipped where one of its seeds is expected to take longer than `patience`, at a growth of m⁴.
    """
    errors: dict[Key, list[float]] = {}
    skipped: dict[int, float] = {}
    took, before = 0.0, 1
    for m in sizes:
        if (guess := took * (m / before) ** 4) > patience:
            skipped[m] = guess
            continue
        for seed in seeds:
            cases = [("gaussian", 1)]
            if full and m == SMALL:
                cases += [*((name, 1) for name in _passes.DISTRIBUTIONS if name != "gaussian"), ("gaussian", 4)]
            for i, (distribution, n) in enumerate(cases):
                start = time.perf_counter()
                for key, values in compare(distribution, m, n, seed, full=full):
                    errors.setdefault(key, []).extend(map(float, values))
                if i == 0:
                    took, before = time.perf_counter() - start, m
    return Precision(errors, skipped)


def compare(distribution: str, m: int, n: int, seed: int, *, full: bool) -> Iterator[tuple[Key, Matrix]]:
    """Yield the errors of eigenpairs, of their residuals and of all gradients, for one batch of matrices."""
    x32 = _passes.matrices(distribution, BATCH, m, seed)
    exact = x32.astype(np.float64)
    w_exact, v_exact = _passes.forward("eigh", exact, n)
    all_w, all_v = ddnref.eigh(exact)
    chosen = np.round(np.swapaxes(all_v, -1, -2) @ v_exact)  # selects the n columns and their signs
    for dtype in DTYPES:
        x = x32.astype(dtype)
        for name in ("PI",) if not full else ("eigh", "PI", "SI") if n == 1 else ("eigh",):
            w, v = _passes.forward(name, x, n, stop=False)
            key = Key(distribution, m, n, dtype, name, "")
            yield key._replace(quantity="λ"), np.max(np.abs(w - w_exact) / np.abs(w_exact), axis=-1)
            yield key._replace(quantity="y"), np.max(np.abs(v - v_exact), axis=(-2, -1))
            wide = [a.astype(np.float64) for a in (x, w, v)]  # so that no rounding of the residual itself is measured
            eigen = ddnref.eigen_residual(*wide) / np.abs(w_exact)
            yield key._replace(quantity="eigen"), np.max(eigen, axis=-1)
            yield key._replace(quantity="fixed point"), np.max(ddnref.fixed_point_residual(*wide), axis=-1)
            if n == 1 and name != "PI":
                continue
            for kind in _passes.COTANGENTS if full and distribution == "gaussian" else ("random",):
                v_bar = _passes.cotangent(kind, v.shape, seed)
                right = np.asarray(ddnref.eigh_vjp(None, v_bar @ np.swapaxes(chosen, -1, -2), all_w, all_v))
                for backward, found in _gradients(n, v_bar.astype(dtype), x, w, v):
                    error = np.linalg.norm(found - right, axis=(-2, -1)) / np.linalg.norm(right, axis=(-2, -1))
                    yield key._replace(quantity=backward, cotangent=kind), error


def _gradients(n: int, v_bar: Matrix, x: Matrix, w: Matrix, v: Matrix) -> Iterator[tuple[str, Matrix]]:
    """Yield the gradient of every backward pass; those that store a Jacobian run at one size only."""
    if n == 1:
        raw = _passes.unrolled("PI", v_bar, x, w, v, symmetric=False)
        yield "PI-Unroll, raw", raw
        yield "PI-Unroll", (raw + np.swapaxes(raw, -1, -2)) / 2
    else:
        yield "SI-Unroll", _passes.unrolled("SI", v_bar, x, w, v)
    for name, run in _passes.BACKWARD.items():
        if x.shape[-1] == SMALL or name not in _passes.JACOBIANS:
            yield _passes.full_name(name, n), run(v_bar, x, w, v)
