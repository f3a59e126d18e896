"""Special functions that the standard lacks: the library's own, or a form in the functions of the standard."""

from __future__ import annotations

import math
from collections.abc import Callable

import array_api_compat

from ddnref._core.arrays import Array, full

SERIES_TERMS, FRACTION_TERMS, SPLIT = 40, 80, 1.5


def erf(x: Array) -> Array:
    """Return the error function of a real array, by its library where that has one."""
    own: Callable[[Array], Array] = erf_standard
    if array_api_compat.is_numpy_array(x):
        from scipy.special import erf as own
    elif array_api_compat.is_cupy_array(x):
        from cupyx.scipy.special import erf as own  # type: ignore[no-redef]
    elif array_api_compat.is_torch_array(x):
        from torch import erf as own  # type: ignore[no-redef]
    elif array_api_compat.is_jax_array(x):
        from jax.scipy.special import erf as own  # type: ignore[no-redef]
    return own(x)


def erf_standard(x: Array) -> Array:
    """Compute `erf` within 5 eps in functions of the standard: by a series, beyond 1.5 by a continued fraction.

    erf x = 2/√π e^(−x²) Σ_n 2ⁿ x^(2n+1) / (2n+1)!!,    1 − erf x = e^(−x²)/√π · 1/(x + ½/(x + 1/(x + 3⁄2/(x + …))))
    """
    xp = array_api_compat.array_namespace(x)
    size = xp.abs(x)
    # The series has positive terms only, so nothing cancels. NaN is in neither part and is put back at the end.
    small = xp.where(size < SPLIT, size, full((), SPLIT, x))
    term = total = small
    for n in range(1, SERIES_TERMS):
        term = term * (2 * small * small) / (2 * n + 1)
        total = total + term
    large = xp.where(size > SPLIT, size, full((), SPLIT, x))
    fraction = large
    for n in range(FRACTION_TERMS, 0, -1):
        fraction = large + (n / 2) / fraction
    inside = 2 / math.sqrt(math.pi) * xp.exp(-small * small) * total
    outside = 1 - xp.exp(-large * large) / (math.sqrt(math.pi) * fraction)
    return xp.where(xp.isnan(x), x, xp.sign(x) * xp.where(size < SPLIT, inside, outside))
