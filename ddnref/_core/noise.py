"""Fixed pseudo-random vectors, the same for every array library."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, as_dtype, namespace_of, real


def noise(index: int, m: int, like: Array) -> Array:
    """Gaussian vector of unit length ``(m,)`` with a fixed seed, in the dtype and on the device of `like`.

    Vectors of different `index` are independent.
    """
    xp = namespace_of(like)
    constant = xp.asarray(_unit_gaussian(index, m), dtype=real(like).dtype, device=array_api_compat.device(like))
    return as_dtype(constant, like)


@lru_cache(maxsize=4)  # making a generator takes as long as several steps of an iteration
def _unit_gaussian(index: int, m: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    z = np.random.default_rng([index, m]).standard_normal(m)
    return z / np.linalg.norm(z)
