"""In-place updates of NumPy vectors, each the twin of a form in ``_vectors.py`` that writes a fresh array.

Measured on a 256×256 grid, float64, one thread: BLAS's ``y ← y + α x`` takes 23 µs where ``y + α x`` takes 103 µs,
because a vector of half a megabyte is written once and not three times. Two such updates and two inner products are
all that a step of conjugate gradients does beside the product. ``tests/test_krylov.py`` holds every form to its twin.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import get_blas_funcs

Array = NDArray[Any]

LONG = 2**11  # numbers in a vector from which a call of BLAS for each pays for itself


@lru_cache(maxsize=4)
def _blas(dtype: np.dtype[Any]) -> Any:
    return get_blas_funcs("axpy", dtype=dtype)


def axpy(y: Array, go: Array, alpha: Array, x: Array) -> Array:
    """``y ← y + α x`` for the vectors whose flag `go` is set; the others are not touched."""
    n = y.shape[-1]
    if n < LONG:
        np.add(y, alpha[..., None] * x, out=y, where=go[..., None])
        return y
    add = _blas(y.dtype)
    if y.ndim == 1:
        if go:
            add(x, y, a=alpha)
        return y
    rows = zip(y.reshape(-1, n), x.reshape(-1, n), go.ravel().tolist(), alpha.ravel().tolist(), strict=True)
    for row, other, flag, factor in rows:
        if flag:
            add(other, row, a=factor)
    return y


def xpay(z: Array, beta: Array, p: Array) -> Array:
    """``p ← z + β p``."""
    np.multiply(p, beta[..., None], out=p)
    np.add(p, z, out=p)
    return p
