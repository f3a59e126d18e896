"""In-place updates of NumPy vectors, each the twin of a form in ``_vectors.py`` that writes a fresh array.

Two such updates and two inner products are all that a step of conjugate gradients does beside the product. In pieces
that stay in the cache ``y + α x`` writes the long vector once, not three times. SciPy's BLAS would do the same in one
call, but has a pool of threads of its own: with two threads, beside NumPy's pool, it made whole solves 8 to 16 times
slower on an idle machine. ``tests/krylov/test_krylov.py`` holds every form to its twin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LONG = 2**11  # numbers in a vector from which a step of its own for each pays
PIECE = 2**15  # at 2**13 the number of calls shows: `figures.py --only krylov`, Laplacian, 1.37 there and 1.08 here


def axpy(y: Array, go: Array, alpha: Array, x: Array) -> Array:
    """``y ← y + α x`` for the vectors whose flag `go` is set; the others are not touched."""
    n = y.shape[-1]
    if y.ndim == 1:
        if go:
            _add(y, alpha, x)
        return y
    if n < LONG:
        np.add(y, alpha[..., None] * x, out=y, where=go[..., None])
        return y
    rows = zip(y.reshape(-1, n), x.reshape(-1, n), np.ravel(go).tolist(), np.ravel(alpha).tolist(), strict=True)
    for row, other, flag, factor in rows:
        if flag:
            _add(row, factor, other)
    return y


def _add(y: Array, alpha: Any, x: Array) -> None:
    scratch = np.empty(min(PIECE, y.size), dtype=y.dtype)
    for i in range(0, y.size, PIECE):
        part = y[i : i + PIECE]
        np.add(part, np.multiply(x[i : i + PIECE], alpha, out=scratch[: part.size]), out=part)


def xpay(z: Array, beta: Array, p: Array) -> Array:
    """``p ← z + β p``."""
    np.multiply(p, beta[..., None], out=p)
    np.add(p, z, out=p)
    return p
