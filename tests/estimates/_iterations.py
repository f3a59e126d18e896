"""Eigenvalues by `power_iteration` and `simultaneous_iteration` of matrices that are far from normal, and easy ones."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np

import ddnref
from ddnref._rules.table import RULES, TRIALS
from ddnref.verify._hard import non_normal as hard_non_normal

from ._results import ITERATIONS, Results


def exact(x: np.ndarray) -> np.ndarray:
    """All eigenvalues, largest magnitude first, in 40 digits; rounding to float32 makes some pairs complex."""
    with mpmath.workdps(40):
        values = mpmath.eig(mpmath.matrix(x.astype(float).tolist()), left=False, right=False)
        return np.asarray(sorted(map(complex, values), key=lambda w: -abs(w)))


def non_normal(rng, dtype):
    """Triangular, rotated, badly scaled, or of random eigenvectors; the spectrum real and its moduli apart."""
    m = int(rng.integers(2, 6))
    w = np.cumprod(rng.uniform(0.3, 0.9, m)) * rng.choice([-1, 1], m)
    basis, q = rng.standard_normal((m, m)), np.linalg.qr(rng.standard_normal((m, m)))[0]
    kind = rng.integers(4)
    if kind < 2:
        x = np.diag(w) + np.triu(10 ** rng.uniform(0, 6 if kind else 3) * rng.standard_normal((m, m)), k=1)
        x = x if kind else q @ x @ q.T
    else:
        x = basis @ np.diag(w) @ np.linalg.inv(basis)
        d = 10.0 ** rng.uniform(-4, 4, m) if kind == 2 else 1 + 0 * w
        x = x * d / d[:, None]
    return x.astype(dtype)


def matrix(rng: np.random.Generator, number: int, dtype: Any) -> np.ndarray:
    """Half of them as above, a quarter hard ones of ``ddnref verify``, a quarter easy ones of the rule table."""
    if number % 4 < 2:
        return non_normal(rng, dtype)
    if number % 4 == 2:
        return hard_non_normal(RULES["simultaneous_iteration"], rng, dtype).arrays[0]
    sample = TRIALS["power_iteration"].sample(np.asarray, rng, (), int(rng.integers(2, 7)), False)
    return sample.inputs[0].astype(dtype)


def measured(rng: np.random.Generator, problems: int, dtype: Any) -> list[Results]:
    """The dominant eigenvalue, and the first n, of the same matrices; every third time with a loose tolerance."""
    rows: tuple[list[Any], list[Any]] = ([], [])
    for number in range(problems):
        x = matrix(rng, number, dtype)
        right = exact(x)
        options = {"rtol": float(1e3 * np.finfo(dtype).eps ** 0.7)} if rng.integers(3) == 0 else {}
        n = 1 + int(rng.integers(len(x)))
        for found, one in zip(rows, (True, False), strict=True):
            (w, _), info = (
                ddnref.power_iteration(x, throw=False, **options)
                if one
                else ddnref.simultaneous_iteration(x, n, throw=False, **options)
            )
            w, estimate = np.atleast_1d(w), np.atleast_1d(info.error)
            error = np.abs(w - right[: len(w)]) / np.abs(right[: len(w)])
            found += [(number, *pair, bool(info.converged)) for pair in zip(error, estimate, strict=True)]
    names = ("power_iteration", "simultaneous_iteration")
    return [
        Results(name, dtype, ITERATIONS, *map(np.asarray, zip(*found, strict=True)))
        for name, found in zip(names, rows, strict=True)
    ]
