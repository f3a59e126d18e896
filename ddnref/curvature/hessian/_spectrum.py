"""The spectrum of a network's Hessian: exact counts by inertia, eigenpairs by shift and inversion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ddnref._core.arrays import Array, full, namespace_of
from ddnref._core.noise import noise
from ddnref._kernels.public import public
from ddnref.curvature.hessian._expansion import NetworkHessian, flat
from ddnref.curvature.hessian._methods import check_method
from ddnref.curvature.hessian._solve import ZERO, HessianFactor, prepared, refuse_null_space
from ddnref.errors import ConvergenceError, SingularError
from ddnref.linalg._eigsh import EigshInfo, eigsh
from ddnref.networks._chain import Chain
from ddnref.operators import LinearOperator

AT_ONCE = 24  # eigenpairs that one shift is asked for


class EigvalCountInfo(NamedTuple):
    """How sure a count is."""

    uncertain: tuple[int, ...]
    """For each edge of the intervals, the eigenvalues within 3e-10 ‖H‖ of it: these may count on either side."""
    paths: tuple[str, ...]
    """The factorisation that counted at each edge."""


@public
def hessian_eigval_count(
    chain: Chain,
    x: Array,
    t: Array,
    interval: Sequence[float],
    /,
    *,
    curvature: str = "hessian",
    method: str = "auto",
    throw: bool = True,
) -> tuple[tuple[int, ...], EigvalCountInfo]:
    r"""How many eigenvalues of a network's Hessian lie in an interval, exactly, without computing them.

    Parameters
    ----------
    chain, x, t, curvature, method
        As in `hessian_factor`.
    interval : sequence of two or more ascending numbers
        Edges, infinite ones included: counts come back for each interval between neighbours.
    throw : bool, default True
        Raise where an eigenvalue is too close to an edge to decide on which side it lies.

    Returns
    -------
    counts : tuple of int, one fewer than edges
    info : EigvalCountInfo

    Raises
    ------
    SingularError
        An eigenvalue lies within 3e-10 ‖H‖ of an edge (zero is one, with more inputs than samples).
    TypeError, ValueError
        As `hessian_factor`; edges that do not ascend.

    Notes
    -----
    By Sylvester's law, ``inertia(H − σI)`` is the inertia of the pivots of its elimination: three factorisations for
    each edge, in time linear in depth.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.mlp(4, 4, 3, 6, bias=False)
    >>> x, t = np.ones((1, 4)), np.asarray([0])
    >>> counts, _ = ddnref.curvature.hessian_eigval_count(chain, x, t, [-np.inf, -1e-6, 1e-6, np.inf])
    >>> sum(counts) == sum(p.size for p in chain.params), counts[1] > sum(counts) // 2
    (True, True)
    """
    edges = _edges(interval)
    check_method(method)
    return _counts(prepared(chain, x, t, curvature), edges, method, throw)


def _edges(interval: Sequence[float]) -> list[float]:
    """Validate the edges of intervals."""
    try:
        edges = [float(edge) for edge in interval]
    except (TypeError, ValueError):
        raise TypeError(f"interval is {interval!r}, expected two or more ascending numbers.") from None
    if len(edges) < 2 or not all(a < b for a, b in pairwise(edges)):
        raise ValueError(f"interval is {interval!r}, expected two or more ascending numbers.")
    return edges


def _counts(
    hessian: NetworkHessian, edges: list[float], method: str, throw: bool
) -> tuple[tuple[int, ...], EigvalCountInfo]:
    """Count the eigenvalues below each edge by inertia, and subtract neighbours."""
    below, uncertain, paths = [], [], []
    for edge in edges:
        if math.isinf(edge):
            below.append(hessian.total if edge > 0 else 0)
            uncertain.append(0)
            paths.append("none")
            continue
        # Eigenvalues of H below the edge are the negative ones of H − edge·I.
        factor = HessianFactor(hessian, -edge, method)
        found = factor.inertia()
        if found.zero and throw:
            raise SingularError(
                f"{found.zero} eigenvalue(s) lie within {ZERO:.0e} ‖H‖ = {ZERO * float(factor.norm):.1e} of the edge "
                f"{edge}, too close to decide on which side. Zero is an eigenvalue wherever there are more inputs than "
                "samples. Move the edge, or pass throw=False to count them above it (info.uncertain says how many)."
            )
        below.append(found.negative)
        uncertain.append(found.zero)
        paths.append(factor.counted_by)
    counts = tuple(b - a for a, b in pairwise(below))
    return counts, EigvalCountInfo(tuple(uncertain), tuple(paths))


@public
def hessian_eigvals(
    chain: Chain,
    x: Array,
    t: Array,
    /,
    k: int | None = None,
    *,
    which: str = "LA",
    sigma: float | None = None,
    interval: tuple[float, float] | None = None,
    curvature: str = "hessian",
    rtol: float | None = None,
    throw: bool = True,
) -> tuple[tuple[Array, list[Array]], EigshInfo | EigvalCountInfo]:
    r"""Eigenvalues of a network's Hessian with their eigenvectors: the extreme, those near a number, or all in between.

    Parameters
    ----------
    chain, x, t, curvature
        As in `hessian_factor`.
    k : int
        How many; not with `interval`.
    which : {"LA", "SA", "LM"}
        The largest, smallest or largest in magnitude, where neither `sigma` nor `interval` is given.
    sigma : float, optional
        The k eigenvalues nearest to this number, by shift and inversion.
    interval : (low, high), optional
        All eigenvalues in between: counted by inertia, then found slice by slice.
    rtol : float, optional
        As in `eigsh`, of the operator that is iterated (with `sigma` or `interval`, the inverse).
    throw : bool, default True
        Raise what `info` says.

    Returns
    -------
    (w, v) : (k,) array, and a list like ``chain.params`` with k leading on every entry
        Most wanted first: as `eigsh` orders them, nearest to `sigma`, ascending in `interval`. Eigenvectors have unit
        length over all parameters together.
    info : EigshInfo, or EigvalCountInfo with `interval`

    Raises
    ------
    ConvergenceError, GaugeError
        As `eigsh`; with `interval`, fewer were found than counted.
    SingularError
        As `hessian_eigval_count`; `sigma` is zero and the Hessian is singular by its shape.
    TypeError, ValueError
        As `hessian_factor`; not exactly one of `k` and `interval`; `sigma` with `interval`, or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.mlp(4, 4, 3, 6, bias=False)
    >>> x, t = np.ones((1, 4)), np.asarray([0])
    >>> (w, v), _ = ddnref.curvature.hessian_eigvals(chain, x, t, 2)
    >>> hv = chain.hvp(x, t, v)
    >>> bool(np.allclose(hv[0], w[:, None, None] * v[0]))
    True
    """
    if sigma is not None and interval is not None:
        raise ValueError("sigma and interval were both given. Pass one of them: both say where to look.")
    if (k is None) == (interval is None):
        raise ValueError("Pass either k or interval: how many eigenvalues, or between which numbers.")
    if sigma is not None and not math.isfinite(sigma):
        raise ValueError(f"sigma is {sigma}, expected a finite number; which= asks for the extreme eigenvalues.")
    # Find the eigenpairs with rows of all parameters, and return them as lists like the parameters.
    hessian = prepared(chain, x, t, curvature)
    if sigma == 0 and throw:
        refuse_null_space(hessian, "sigma", "Pass a sigma beside it, such as 1e-6 times the largest eigenvalue.")
    info: EigshInfo | EigvalCountInfo
    if k is None:
        (w, v), info = _between(hessian, _edges(interval or ()), rtol, throw)
    elif sigma is None:
        start = noise(2, hessian.total, hessian.like)
        (w, v), info = eigsh(_operator(hessian), k, which=which, v0=start, rtol=rtol, throw=throw)
    else:
        (w, v), info = _nearest(hessian, k, float(sigma), rtol, throw)
    return (w, hessian.params(hessian.from_rows(v.mT))), info


def _operator(hessian: NetworkHessian, factor: HessianFactor | None = None) -> LinearOperator:
    """H, or ``(H + εI)⁻¹``, on vectors of all parameters."""

    def apply(params: tuple[Array, ...], v: Array) -> Array:  # noqa: ARG001
        xp = namespace_of(v)
        blocks = hessian.from_rows(xp.reshape(v, (-1, hessian.total)))
        found = hessian.product(blocks) if factor is None else factor.inverse(blocks)
        return xp.reshape(flat(found), tuple(v.shape))

    def refuse(*_: object) -> tuple[Array, ...]:
        raise TypeError("The Hessian has no derivative with respect to the weights here.")

    return LinearOperator((), apply, apply, refuse, (hessian.total,), (hessian.total,), self_adjoint=True)


def _nearest(
    hessian: NetworkHessian, k: int, sigma: float, rtol: float | None, throw: bool
) -> tuple[tuple[Array, Array], EigshInfo]:
    """Find ``λ = σ + 1/θ`` for the largest |θ| of ``(H − σI)⁻¹``."""
    operator, start = _operator(hessian, HessianFactor(hessian, -sigma)), noise(2, hessian.total, hessian.like)
    (theta, v), info = eigsh(operator, k, which="LM", v0=start, rtol=rtol, throw=throw)
    return (sigma + 1 / theta, v), info


def _between(
    hessian: NetworkHessian, edges: list[float], rtol: float | None, throw: bool
) -> tuple[tuple[Array, Array], EigvalCountInfo]:
    """Cut the interval into slices with few eigenvalues, and find those nearest to the middle of each slice."""
    xp = namespace_of(hessian.like)
    # Infinite or far ends would make the first slices too wide.
    low, high = _clipped(hessian, edges[0], edges[-1])
    counts, info = _counts(hessian, [low, high], "auto", throw)
    found_w, found_v = [full((0,), 0.0, hessian.like)], [full((hessian.total, 0), 0.0, hessian.like)]
    waiting = [(low, high, counts[0])]
    while waiting:
        a, b, count = waiting.pop()
        if count > AT_ONCE:
            # Halve the slice; the lower half is worked on first, so that eigenvalues come out ascending.
            middle = _free_edge(hessian, a, b)
            (left, right), _ = _counts(hessian, [a, middle, b], "auto", False)
            waiting += [(middle, b, right), (a, middle, left)]
        elif count:
            # The eigenvalues nearest to the middle are those in the slice, if as many as were counted lie there.
            (w, v), _ = _nearest(hessian, count, (a + b) / 2, rtol, throw)
            inside = int(xp.sum(xp.astype((w >= a) & (w <= b), xp.int64)))
            if inside != count and throw:
                raise ConvergenceError(
                    f"{count} eigenvalues were counted between {a} and {b}, but {inside} of those found lie there. The "
                    "most likely cause is a multiple eigenvalue. Pass another interval, or throw=False to get what was "
                    "found."
                )
            order = xp.argsort(w)
            found_w.append(xp.take(w, order, axis=0))
            found_v.append(xp.take(v, order, axis=1))
    return (xp.concat(found_w), xp.concat(found_v, axis=1)), info


def _clipped(hessian: NetworkHessian, low: float, high: float) -> tuple[float, float]:
    """Cut off the ends of the interval beyond the spectrum.

    Where the spectrum ends is counted, because the estimated norm is too low.
    """
    reach = 1.5 * float(HessianFactor(hessian, 1.0).norm) or 1.0
    # Double each end until no eigenvalue lies beyond it.
    above = max(reach, 2 * low)
    while above < high:
        found = HessianFactor(hessian, -above).inertia()
        if found.zero + found.positive == 0:
            break
        above *= 2
    below = max(reach, -2 * high)
    while below < -low:
        found = HessianFactor(hessian, below).inertia()
        if found.negative + found.zero == 0:
            break
        below *= 2
    return max(low, -below), min(high, above)


def _free_edge(hessian: NetworkHessian, a: float, b: float) -> float:
    """Find a number between a and b, near the middle, that is not an eigenvalue."""
    for part in (0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65):
        edge = a + part * (b - a)
        if HessianFactor(hessian, -edge).inertia().zero == 0:
            return edge
    raise SingularError(
        f"Between {a} and {b} lie more than {AT_ONCE} eigenvalues too close to each other to separate. The most likely "
        "cause is a multiple eigenvalue, such as zero. Pass an interval without it."
    )
