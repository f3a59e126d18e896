"""Extreme singular values of a bidiagonal matrix that grows by one column per step, without storing it.

For an upper bidiagonal R with entries ρ_k and θ_k above ρ_{k+1}, the pivots of ``RᴴR − μ`` are

    d = q + t,      q = ρ_k²,      t ← θ_k² (t / d) − μ

and the number of negative ones is that of eigenvalues of RᴴR below μ. A grid of shifts μ, each with the count so far,
shows the smallest eigenvalue between two neighbours, at the cost of one division per shift and step. The quotient
``t / d`` is all that is kept, and it loses no digits where μ is small (Parlett and Dhillon, Linear Algebra Appl. 309
(2000), section 4).
"""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array


def grid(xp: Any, largest: float, smallest: float, factor: float, like: Array) -> Array:
    """Shifts that fall from `largest` to about `smallest`, each by the same factor."""
    count = int(np.ceil(np.log(largest / smallest) / np.log(factor))) + 1
    shifts = largest * factor ** -np.arange(count, dtype=np.float64)
    return xp.asarray(shifts, dtype=like.dtype, device=array_api_compat.device(like))


def next_pivot(xp: Any, unit: float, shifts: Array, slack: Array, q: Array, e: Array) -> tuple[Array, Array]:
    """The new ``t / d`` for each shift, and whether d is negative; e is the last θ², 0 at first."""
    t = e[..., None] * slack - shifts
    d = q[..., None] + t
    d = xp.where(d == 0, -unit * unit * (q[..., None] + shifts), d)  # as in LAPACK, a zero pivot counts as negative
    return t / d, d < 0
