"""How exact the tutorial's passes and ours are, against the closed form ``ddnref.eigh_vjp`` in float64.

The matrices are float32 numbers for both precisions, so that there is one truth.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ddnref
from ddnref.report.declarative_passes import BACKWARD, Matrix, forward, full_name, iteration, unrolled
from ddnref.report.matrices import COTANGENTS, DISTRIBUTIONS, cotangent, matrices

DTYPES = ("float32", "float64")
FORWARD = ("eigh", "PI", "SI")
BATCH = 5
PATIENCE = 20.0  # seconds that one seed at one size may be expected to take
SMALL = 64  # the size at which everything is compared


class Key(NamedTuple):
    """What an error is an error of; `quantity` is "λ", "y", "eigen", "fixed point" or a backward pass."""

    distribution: str
    m: int
    n: int
    dtype: str
    forward: str
    quantity: str
    cotangent: str = ""


class Truth(NamedTuple):
    """The n eigenpairs of largest magnitude in float64, and all of them."""

    x: Matrix
    w: Matrix
    v: Matrix
    all_w: Matrix
    all_v: Matrix

    def gradient(self, v_bar: Matrix) -> Matrix:
        """Of a loss of the n eigenvectors, by the closed form."""
        chosen = np.round(np.swapaxes(self.all_v, -1, -2) @ self.v)  # which columns, and their signs
        all_bar = v_bar @ np.swapaxes(chosen, -1, -2)
        return np.asarray(ddnref.eigh_vjp(None, all_bar, self.all_w, self.all_v))


Errors = dict[Key, list[float]]
"""One number for every matrix."""


class Precision(NamedTuple):
    """What was measured, and the sizes whose seeds were expected to take too long, with the seconds expected."""

    errors: Errors
    skipped: dict[int, float]


def precision(sizes: Iterable[int], seeds: Sequence[int], patience: float = PATIENCE) -> Precision:
    """Gaussian matrices at every size, every distribution at one; all seeds, or none where one takes too long."""
    errors: Errors = {}
    skipped: dict[int, float] = {}
    took, before = 0.0, 1
    for m in sizes:
        if (guess := took * (m / before) ** 4) > patience:
            skipped[m] = guess
            continue
        for seed in seeds:
            start = time.perf_counter()
            _add(errors, _compare("gaussian", m, 1, seed))
            took, before = time.perf_counter() - start, m
            if m == SMALL:
                for distribution in [name for name in DISTRIBUTIONS if name != "gaussian"]:
                    _add(errors, _compare(distribution, m, 1, seed))
                _add(errors, _compare("gaussian", m, 4, seed))
    return Precision(errors, skipped)


def median(found: Precision, key: Key) -> float:
    """Over all matrices and seeds; infinity where more than half are not finite, NaN where nothing was measured."""
    values = np.asarray(found.errors.get(key, []))
    return float(np.median(np.where(np.isfinite(values), values, np.inf))) if values.size else float("nan")


def worst(found: Precision, key: Key) -> float:
    """The largest; infinity where one is not finite, NaN where nothing was measured."""
    values = np.asarray(found.errors.get(key, []))
    return float(np.max(np.where(np.isfinite(values), values, np.inf))) if values.size else float("nan")


def gradients(m: int, n: int) -> list[str]:
    """The backward passes compared at a size: Jacobians only at the small one."""
    chosen = [full_name(name, n) for name, one in BACKWARD.items() if m == SMALL or not one.jacobian]
    raw = ["PI-Unroll, raw"] if n == 1 else []
    return [*raw, f"{iteration(n)}-Unroll", *chosen]


def _add(errors: Errors, found: Iterator[tuple[Key, NDArray[Any]]]) -> None:
    for key, values in found:
        errors.setdefault(key, []).extend(float(value) for value in values)


def _compare(distribution: str, m: int, n: int, seed: int) -> Iterator[tuple[Key, NDArray[Any]]]:
    x32 = matrices(distribution, BATCH, m, seed)
    x = x32.astype(np.float64)
    truth = Truth(x, *forward("eigh", x, n), *ddnref.eigh(x))
    for dtype in DTYPES:
        given = x32.astype(dtype)
        for name in FORWARD if n == 1 else ("eigh",):
            w, v = forward(name, given, n, stop=False)
            key = Key(distribution, m, n, dtype, name, "")
            yield from _pairs(key, truth, given, w, v)
            if n > 1 or name == "PI":
                yield from _gradients(key, truth, given, w, v, seed)


def _pairs(key: Key, truth: Truth, x: Matrix, w: Matrix, v: Matrix) -> Iterator[tuple[Key, NDArray[Any]]]:
    size = np.abs(truth.w)
    yield key._replace(quantity="λ"), np.max(np.abs(w - truth.w) / size, axis=-1)
    yield key._replace(quantity="y"), np.max(np.abs(v - truth.v), axis=(-2, -1))
    wide = [a.astype(np.float64) for a in (x, w, v)]  # residuals of what was found, not of their own rounding
    yield key._replace(quantity="eigen"), np.max(ddnref.eigen_residual(*wide) / size, axis=-1)
    yield key._replace(quantity="fixed point"), np.max(ddnref.fixed_point_residual(*wide), axis=-1)


def _gradients(
    key: Key, truth: Truth, x: Matrix, w: Matrix, v: Matrix, seed: int
) -> Iterator[tuple[Key, NDArray[Any]]]:
    n = key.n
    for kind in COTANGENTS if key.distribution == "gaussian" else ("random",):
        v_bar = cotangent(kind, v.shape, seed)
        right = truth.gradient(v_bar)
        for name, found in _backward(key.m, n, v_bar.astype(x.dtype), x, w, v):
            error = np.linalg.norm(found - right, axis=(-2, -1)) / np.linalg.norm(right, axis=(-2, -1))
            yield key._replace(quantity=name, cotangent=kind), error


def _backward(m: int, n: int, v_bar: Matrix, x: Matrix, w: Matrix, v: Matrix) -> Iterator[tuple[str, Matrix]]:
    if n == 1:
        raw = unrolled("PI", v_bar, x, w, v, symmetric=False)
        yield "PI-Unroll, raw", raw
        yield "PI-Unroll", (raw + np.swapaxes(raw, -1, -2)) / 2
    else:
        yield "SI-Unroll", unrolled("SI", v_bar, x, w, v)
    for name, one in BACKWARD.items():
        if m == SMALL or not one.jacobian:
            yield full_name(name, n), one.run(v_bar, x, w, v)
