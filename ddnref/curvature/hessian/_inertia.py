r"""Counting eigenvalues without computing them: the inertia of a block-tridiagonal matrix, by whatever is trustworthy.

Sylvester's law makes the signs of the pivots the signs of the eigenvalues. Where an elimination by layers meets a
pivot that is nearly singular while its layer is coupled to the next, `delayed` does what sparse symmetric solvers do:
it diagonalises the pivot and hands the directions with ``|λ| < θ ‖coupling‖`` over to the next block, where the
coupling itself makes them large. Growth is bounded by 1/θ in every step, for every shift.
"""

from __future__ import annotations

from collections.abc import Iterable

from ddnref._core.arrays import Array, full, is_true
from ddnref._kernels.dense import eigh, eigvalsh, identity
from ddnref.curvature.hessian import _riccati, _tridiagonal
from ddnref.curvature.hessian._dense_blocks import space, t
from ddnref.curvature.hessian._expansion import Terms
from ddnref.curvature.hessian._joint import joint
from ddnref.curvature.hessian._riccati import Basis, Pivot
from ddnref.errors import ConvergenceError

THETA = 1e-3


def negative(pivots: Iterable[Array]) -> int:
    """Negative eigenvalues of all pivots together."""
    return sum(below(eigvalsh(d), 0.0) for d in pivots)


def below(w: Array, bound: float) -> int:
    """How many of the eigenvalues are below a bound; NaN, which would count as none, is refused."""
    xp = space(w)
    if is_true(xp.any(xp.isnan(w))):
        raise ConvergenceError(
            "Eigenvalues cannot be counted: an eigendecomposition has not converged, or met NaN. Likely the weights or "
            "the data are huge, or the damping makes a block exactly singular: pass another damping="
        )
    return int(xp.sum(xp.astype(w < bound, xp.int64)))


def by_tridiagonal(bases: list[Basis], terms: Terms, damping: float) -> int:
    """Negative eigenvalues of H + εI from the pivots of T."""
    pivots = (pivot for _, pivot in _tridiagonal.sweep(bases, terms, damping))
    return negative(pivots) + (damping < 0) * sum(b.rest for b in bases)


def by_riccati(terms: Terms, damping: float) -> int:
    """Negative eigenvalues of H + εI from the pivots of the general form."""
    pivots = [found[0] for found in _riccati.sweep(terms, damping) if isinstance(found[0], Pivot)]
    return negative(p.q_uu for p in pivots) + (damping < 0) * sum(p.basis.rest for p in pivots)


def delayed(terms: Terms, damping: float) -> int:
    """Negative eigenvalues of H + εI for any shift: the joint matrix has one more for each multiplier."""
    j = joint(terms, damping)
    xp = space(terms.curvature)
    count = 0
    pivot = j.diagonal[0]
    for i, e in enumerate(j.below):
        w, q = eigh((pivot + t(pivot)) / 2)
        old = pivot.shape[0] - e.shape[1]
        b = e @ q[old:, :]  # the next block is coupled to the layer itself alone
        ratio = xp.abs(w) / xp.sqrt(xp.sum(b * b, axis=0) + full((), 1e-300, w))
        order = xp.argsort(ratio)
        late = int(xp.sum(xp.astype(ratio < THETA, xp.int64)))
        w, b = xp.take(w, order, axis=0), xp.take(b, order, axis=1)
        count += below(w[late:], 0.0)
        now = b[:, late:]
        d = j.diagonal[i + 1] - (now / w[late:]) @ t(now)
        kept = identity(late, d) * w[:late]
        top = xp.concat([kept, t(b[:, :late])], axis=1)
        pivot = xp.concat([top, xp.concat([b[:, :late], d], axis=1)])
    count += negative([(pivot + t(pivot)) / 2])
    return count - sum(j.tangents) + (damping < 0) * sum(f.rest for f in j.frames)
