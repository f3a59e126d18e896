"""The spectrum of a network's Hessian: exact counts by inertia, eigenpairs by shift and inversion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ddnref._core.arrays import Array, double
from ddnref._core.noise import noise
from ddnref._kernels.public import public
from ddnref.curvature.hessian._dense_blocks import space
from ddnref.curvature.hessian._expansion import flat
from ddnref.curvature.hessian._factor import ZERO, HessianFactor
from ddnref.curvature.hessian._network import System
from ddnref.curvature.hessian._solve import CURVATURES, check_method, prepared, refuse_null_space
from ddnref.errors import ConvergenceError, SingularError
from ddnref.linalg._eigsh import EigshInfo, eigsh
from ddnref.networks._chain import Chain
from ddnref.operators import LinearOperator

AT_ONCE = 24
"""Eigenpairs that one shift is asked for."""


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
        Raise where an eigenvalue is too close to an edge to tell its side.

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
    s = _prepared(chain, x, t, curvature)
    return _counts(s, edges, method, double(space(x), x), chain.params, throw)


def _edges(interval: Sequence[float]) -> list[float]:
    try:
        edges = [float(edge) for edge in interval]
    except (TypeError, ValueError):
        raise TypeError(f"interval is {interval!r}, expected two or more ascending numbers.") from None
    if len(edges) < 2 or not all(a < b for a, b in pairwise(edges)):
        raise ValueError(f"interval is {interval!r}, expected two or more ascending numbers.")
    return edges


def _prepared(chain: Chain, x: Array, t: Array, curvature: str) -> System:
    if curvature not in CURVATURES:
        raise ValueError(f'curvature is {curvature!r}, expected "hessian" or "ggn".')
    return prepared(chain, x, t, curvature)


def _counts(
    s: System, edges: list[float], method: str, like: Array, params: Sequence[Array], throw: bool
) -> tuple[tuple[int, ...], EigvalCountInfo]:
    below, uncertain, paths = [], [], []
    for edge in edges:
        if abs(edge) == float("inf"):
            below.append(s.total if edge > 0 else 0)
            uncertain.append(0)
            paths.append("none")
            continue
        factor = HessianFactor(s, -edge, method, like, params)
        found = factor.inertia()
        if found.zero and throw:
            raise SingularError(
                f"{found.zero} eigenvalue(s) lie within {ZERO:.0e} ‖H‖ = {ZERO * float(factor.norm):.1e} of the edge "
                f"{edge}: their side cannot be told. Zero is an eigenvalue wherever there are more inputs than "
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
        raise ValueError("sigma is a number to look around; interval already says where to look.")
    if (k is None) == (interval is None):
        raise ValueError("Pass either k or interval: how many eigenvalues, or between which numbers.")
    if sigma is not None and not abs(float(sigma)) < float("inf"):
        raise ValueError(f"sigma is {sigma}, expected a finite number; which= asks for the extreme eigenvalues.")
    s = _prepared(chain, x, t, curvature)
    like = double(space(x), x)
    if k is None:
        return _between(s, _edges(interval or ()), like, chain.params, rtol, throw)
    if sigma is None:
        (w, v), info = eigsh(_operator(s, None), k, which=which, v0=noise(2, s.total, like), rtol=rtol, throw=throw)
        return (w, _lists(s, v)), info
    if sigma == 0 and throw:
        refuse_null_space(s, "sigma", "Pass a sigma beside it, such as 1e-6 times the largest eigenvalue.")
    (w, v), info = _nearest(s, k, float(sigma), like, chain.params, rtol, throw)
    return (w, _lists(s, v)), info


def _operator(s: System, factor: HessianFactor | None) -> LinearOperator:
    """H, or ``(H + εI)⁻¹``, on vectors of all parameters."""

    def apply(params: tuple[Array, ...], v: Array) -> Array:  # noqa: ARG001
        xp = space(v)
        rows = xp.reshape(v, (-1, s.total))
        blocks = s.split(rows)
        found = s.product(blocks) if factor is None else factor.inverse(blocks)
        return xp.reshape(flat(found), tuple(v.shape))

    def refuse(*_: object) -> tuple[Array, ...]:
        raise TypeError("The Hessian has no derivative with respect to the weights here.")

    return LinearOperator((), apply, apply, refuse, (s.total,), (s.total,), self_adjoint=True)


def _nearest(
    s: System, k: int, sigma: float, like: Array, params: Sequence[Array], rtol: float | None, throw: bool
) -> tuple[tuple[Array, Array], EigshInfo]:
    """``λ = σ + 1/θ`` for the largest |θ| of ``(H − σI)⁻¹``."""
    factor = HessianFactor(s, -sigma, "auto", like, params)
    operator = _operator(s, factor)
    (theta, v), info = eigsh(operator, k, which="LM", v0=noise(2, s.total, like), rtol=rtol, throw=throw)
    return (sigma + 1 / theta, v), info


def _between(
    s: System, edges: list[float], like: Array, params: Sequence[Array], rtol: float | None, throw: bool
) -> tuple[tuple[Array, list[Array]], EigvalCountInfo]:
    """Slices with few eigenvalues each, all of them nearest to the middle of their slice."""
    xp = space(like)
    low, high = _clipped(s, edges[0], edges[-1], like, params)
    counts, info = _counts(s, [low, high], "auto", like, params, throw)
    waiting, found = [(low, high, counts[0])], []
    while waiting:
        a, b, count = waiting.pop()
        if count > AT_ONCE:
            middle = _free_edge(s, a, b, like, params)
            (left, right), _ = _counts(s, [a, middle, b], "auto", like, params, False)
            waiting += [(middle, b, right), (a, middle, left)]
        elif count:
            (w, v), _ = _nearest(s, count, (a + b) / 2, like, params, rtol, throw)
            inside = int(xp.sum(xp.astype((w >= a) & (w <= b), xp.int64)))
            if inside != count and throw:
                raise ConvergenceError(
                    f"{count} eigenvalues were counted between {a} and {b}, but {inside} of those found are there. "
                    "Likely a multiple eigenvalue. Pass another interval, or throw=False to get what was found."
                )
            order = xp.argsort(w)
            found.append((xp.take(w, order, axis=0), xp.take(v, order, axis=1)))
    if not found:
        nothing = like[:0, ...] if like.ndim == 1 else xp.reshape(like[:0, ...], (-1,))
        return (nothing, _lists(s, xp.zeros((s.total, 0), dtype=like.dtype))), info
    w = xp.concat([w for w, _ in found])
    return (w, _lists(s, xp.concat([v for _, v in found], axis=1))), info


def _clipped(s: System, low: float, high: float, like: Array, params: Sequence[Array]) -> tuple[float, float]:
    """The interval without its ends beyond the spectrum: where that ends is counted, an estimated norm is too low."""
    reach = 1.5 * float(HessianFactor(s, 1.0, "auto", like, params).norm) or 1.0
    above = max(reach, 2 * low)
    while above < high:
        found = HessianFactor(s, -above, "auto", like, params).inertia()
        if found.zero + found.positive == 0:
            break
        above *= 2
    below = max(reach, -2 * high)
    while below < -low:
        found = HessianFactor(s, below, "auto", like, params).inertia()
        if found.negative + found.zero == 0:
            break
        below *= 2
    return max(low, -below), min(high, above)


def _free_edge(s: System, a: float, b: float, like: Array, params: Sequence[Array]) -> float:
    """A number between a and b, near the middle, that is no eigenvalue."""
    for part in (0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65):
        edge = a + part * (b - a)
        if HessianFactor(s, -edge, "auto", like, params).inertia().zero == 0:
            return edge
    raise SingularError(
        f"Between {a} and {b} lie more than {AT_ONCE} eigenvalues that cannot be told apart: likely a multiple "
        "eigenvalue, such as zero. Pass an interval without it."
    )


def _lists(s: System, v: Array) -> list[Array]:
    """Columns as lists of parameters, k leading."""
    return s.params(s.split(space(v).matrix_transpose(v)))
