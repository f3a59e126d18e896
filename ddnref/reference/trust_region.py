"""The step of a trust region from all eigenvalues of a dense matrix, with the secular equation solved by bisection.

With ``H = V diag(w) Vᵀ`` and ``c = Vᵀ g``, and ε_0 = max(0, −w_1), the step is one of

    interior    w_1 > 0 and ‖c / w‖ ≤ r:   p = −V (c / w)
    hard        c is zero where w = w_1 ≤ 0, and the others do not reach the boundary with ε = ε_0:
                p = −V (c / (w + ε_0)) + τ v_1 with ‖p‖ = r (with w_1 = 0 the first term alone solves the problem)
    boundary    p = −V (c / (w + ε)) with the ε > ε_0 at which ‖p‖ = r
"""

from __future__ import annotations

import math

import numpy as np

from ddnref._core.arrays import Array

ZERO = 1e-12  # of the largest eigenvalue, or of ‖g‖: smaller ones count as zero
BISECTIONS = 400


def trust_region_dense(h: Array, g: Array, /, radius: float, *, absolute: bool = False) -> tuple[Array, float, str]:
    """Return the minimum of ``gᵀp + ½ pᵀHp`` with ``‖p‖ ≤ radius``, its ε and its kind.

    Parameters
    ----------
    h : (n, n) NumPy array, symmetric
    g : (n,) NumPy array
    radius : float, positive
    absolute : bool, default False
        Take ``|H|``, with the absolute values of the eigenvalues.

    References
    ----------
    .. [1] J. J. Moré, D. C. Sorensen, "Computing a trust region step", SIAM J. Sci. Stat. Comput. 4 (1983).

    Examples
    --------
    >>> import numpy as np
    >>> p, damping, kind = ddnref.reference.trust_region_dense(np.diag([1.0, -1.0]), np.asarray([2.0, 0.0]), 2.0)
    >>> np.abs(p).round(12), damping, kind
    (array([1.        , 1.73205081]), 1.0, 'hard')
    """
    w, v = np.linalg.eigh(h)
    if absolute:
        w = np.abs(w)
        order = np.argsort(w)
        w, v = w[order], v[:, order]
    c = v.T @ g
    size = float(np.max(np.abs(w)))
    least = max(0.0, -float(w[0]))
    # Components along the lowest eigenspace that are rounding are zero.
    lowest = w + least <= ZERO * size
    c = np.where(lowest & (np.abs(c) <= ZERO * np.linalg.norm(g)), 0.0, c)

    def coordinates(mu: float) -> Array:
        """Return ``c / (w + ε_0 + μ)``, and zero where c is."""
        d = w + least + mu
        return np.divide(c, d, out=np.zeros_like(c), where=c != 0)

    definite = not np.any(lowest & (c != 0))
    if definite and np.linalg.norm(coordinates(0.0)) <= radius:
        y = -coordinates(0.0)
        if w[0] >= -ZERO * size:
            return v @ y, 0.0, "interior"
        y[0] += math.sqrt(max(0.0, radius**2 - float(y @ y)))
        return v @ y, least, "hard"
    # The length falls with μ, from above the radius to below it.
    low, high = 0.0, float(np.linalg.norm(g)) / radius
    for _ in range(BISECTIONS):
        mu = (low + high) / 2
        if mu in (low, high):
            break
        low, high = (mu, high) if np.linalg.norm(coordinates(mu)) > radius else (low, mu)
    return v @ -coordinates(high), least + high, "boundary"
