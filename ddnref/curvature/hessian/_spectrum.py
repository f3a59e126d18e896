"""The spectrum of a network's Hessian: exact counts by inertia, eigenpairs by shift and inversion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn

import array_api_compat

from ddnref._core.arrays import Array, eps, full, is_true, namespace_of
from ddnref._core.noise import noise
from ddnref._kernels.public import public
from ddnref._kernels.vectors import norm
from ddnref.curvature._gram import not_negative
from ddnref.curvature.hessian._expansion import NetworkHessian, flat, hessian_of
from ddnref.curvature.hessian._methods import check_method
from ddnref.curvature.hessian._solve import ZERO, HessianFactor, refuse_null_space
from ddnref.curvature.hessian._subspace import Subspace, spectrum, subspace_of
from ddnref.errors import ConvergenceError, SingularError
from ddnref.linalg._eigsh import CLUSTER_RTOL, WHICH, EigshInfo, eigsh
from ddnref.networks._chain import Chain
from ddnref.operators import LinearOperator

AT_ONCE = 24  # eigenpairs that one shift is asked for
WHOLE = 3000  # dimensions of the subspace up to which the whole spectrum is computed where something needs it
ALWAYS = 512  # and up to which everything is read off it: a fifth of a second
VECTORS = 6000  # parameters up to which the eigenvectors of the whole spectrum are formed without being asked for


class EigvalCountInfo(NamedTuple):
    """How sure a count is."""

    uncertain: tuple[int, ...]
    """For each edge of the intervals, the eigenvalues within 3e-10 ‖H‖ of it: these may count on either side."""
    paths: tuple[str, ...]
    """The factorisation that counted at each edge."""


class HessianEigvalsInfo(NamedTuple):
    """How the eigenvalues were found."""

    converged: bool | Array
    """Whether all residuals reached `rtol`; true where they were read off the whole spectrum."""
    n_iter: int | Array
    """Cycles of the iteration; 0 where they were read off the whole spectrum."""
    residual_norm: Array
    """``‖H v − λ v‖`` relative to ‖H‖ (of the inverse with `sigma`), ``(k,)``."""
    cut: bool | Array
    """Whether the last eigenvalue equals the next one, which is left out: its eigenvectors are a basis of a part of the
    cluster, chosen arbitrarily. The eigenvalues are right all the same."""
    n_products: int | Array
    """Products of H (of the inverse with `sigma`) with one vector."""
    zeros: int | None
    """How many eigenvalues of H are zero, up to 16 eps ‖H‖; ``None`` where the whole spectrum was not computed."""


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
    return _counts(hessian_of(chain, x, t, curvature), edges, method, throw)


def _edges(interval: Sequence[float]) -> list[float]:
    """Validate the edges of intervals."""
    message = f"interval is {interval!r}, expected two or more ascending numbers."
    try:
        edges = [float(edge) for edge in interval]
    except (TypeError, ValueError):
        raise TypeError(message) from None
    if len(edges) < 2 or not all(a < b for a, b in pairwise(edges)):
        raise ValueError(message)
    return edges


def _counts(
    hessian: NetworkHessian, edges: list[float], method: str, throw: bool
) -> tuple[tuple[int, ...], EigvalCountInfo]:
    """Count the eigenvalues below each edge by inertia, and subtract neighbours."""
    counted = []
    for edge in edges:
        if math.isinf(edge):
            counted.append((hessian.total if edge > 0 else 0, 0, "none"))
            continue
        # Eigenvalues of H below the edge are the negative ones of H − edge·I.
        factor = HessianFactor(hessian, -edge, method)
        found = factor.inertia()
        if found.zero and throw:
            _refuse_edge(edge, found.zero, float(factor.norm))
        counted.append((found.negative, found.zero, factor.counted_by))
    below, uncertain, paths = zip(*counted, strict=True)
    return tuple(b - a for a, b in pairwise(below)), EigvalCountInfo(uncertain, paths)


def _refuse_edge(edge: float, count: int, size: float) -> NoReturn:
    raise SingularError(
        f"{count} eigenvalue(s) lie within {ZERO:.0e} ‖H‖ = {ZERO * size:.1e} of the edge {edge}, too close to decide "
        "on which side. Zero is an eigenvalue wherever there are more inputs than samples. Move the edge, or pass "
        "throw=False to count them above it (info.uncertain says how many)."
    )


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
    vectors: bool = True,
    throw: bool = True,
) -> tuple[tuple[Array, list[Array] | None], HessianEigvalsInfo | EigvalCountInfo]:
    r"""Eigenvalues of a network's Hessian with their eigenvectors: all, the extreme, those near a number or in between.

    Parameters
    ----------
    chain, x, t, curvature
        As in `hessian_factor`.
    k : int, optional
        How many; not with `interval`. Default all.
    which : {"LA", "SA", "LM"}
        The largest, smallest or largest in magnitude first, where neither `sigma` nor `interval` is given.
    sigma : float, optional
        The k eigenvalues nearest to this number, by shift and inversion.
    interval : (low, high), optional
        All eigenvalues in between: counted by inertia, then found slice by slice.
    rtol : float, optional
        As in `eigsh`, of the operator that is iterated (with `sigma` or `interval`, the inverse). Not used where the
        whole spectrum is computed.
    vectors : bool, default True
        With ``False`` v is ``None``: the eigenvectors of all eigenvalues are as many numbers as the matrix has.
    throw : bool, default True
        Raise what `info` says.

    Returns
    -------
    (w, v) : (k,) array, and a list like ``chain.params`` with k leading on every entry
        Most wanted first: as `eigsh` orders them, nearest to `sigma`, ascending in `interval`. Eigenvectors have unit
        length over all parameters together.
    info : HessianEigvalsInfo, or EigvalCountInfo with `interval`

    Raises
    ------
    ConvergenceError
        As `eigsh`; with `interval`, fewer were found than counted. Never because eigenvalues are equal: ``info.cut``
        says where the last one equals the next.
    SingularError
        As `hessian_eigval_count`, an infinite edge excepted; `sigma` is zero and the Hessian is singular by its shape,
        and the network is too large for the whole spectrum.
    TypeError, ValueError
        As `hessian_factor`; `k` with `interval`; `sigma` with `interval`, or not finite; all eigenvalues of a network
        that is too large for that.

    Notes
    -----
    The Hessian is zero outside the span, in every layer, of ``u qᵀ`` with q in the range of its inputs and ``b pᵀ``
    with b in the range of the gradients of its pre-activations. If that has d <= 512 dimensions (3000, where all
    eigenvalues or those nearest to zero are asked for, or where the iteration does not converge), the Hessian is formed
    on it by d products and decomposed, in about ``9 d³`` flops; the other eigenvalues are exact zeros. Larger networks
    are left to `eigsh`.

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
    if k is not None and interval is not None:
        raise ValueError("Pass either k or interval: how many eigenvalues, or between which numbers.")
    if sigma is not None and not math.isfinite(sigma):
        raise ValueError(f"sigma is {sigma}, expected a finite number; which= asks for the extreme eigenvalues.")
    if which not in WHICH:
        raise ValueError(f'which is {which!r}, expected "LA" (largest), "SA" (smallest) or "LM" (largest magnitude).')
    # Find the eigenpairs with rows of all parameters, and return them as lists like the parameters.
    hessian = hessian_of(chain, x, t, curvature)
    if k is not None and not 1 <= k <= hessian.total:
        raise ValueError(f"k is {k}, expected 1 <= k <= {hessian.total} for a network with that many parameters.")
    edges = None if interval is None else _edges(interval)
    w, v, info = _found(hessian, k, which, sigma, edges, rtol, vectors, throw)
    w = not_negative(w) if curvature == "ggn" else w
    return (w, None if v is None else hessian.params(hessian.from_rows(v))), info


def _found(
    hessian: NetworkHessian,
    k: int | None,
    which: str,
    sigma: float | None,
    edges: list[float] | None,
    rtol: float | None,
    vectors: bool,
    throw: bool,
) -> tuple[Array, Array | None, HessianEigvalsInfo | EigvalCountInfo]:
    """Return eigenvalues, and eigenvectors in rows, by the way that suits the size of the network."""
    every = k is None and edges is None
    space = subspace_of(hessian, WHOLE if every or sigma == 0 else ALWAYS)
    if space is not None:
        return _read_off(space, k, which, sigma, edges, vectors, throw)
    if every:
        raise ValueError(
            f"All eigenvalues were asked for, but the Hessian of this network with {hessian.total} parameters does not "
            f"fit into {WHOLE} dimensions. Pass k=, or interval= for all between two numbers, or fewer samples."
        )
    if sigma == 0 and throw:
        refuse_null_space(hessian, "sigma", "Pass a sigma beside it, such as 1e-6 times the largest eigenvalue.")
    # Iterate; equal eigenvalues are no failure, and what the iteration does not find the whole spectrum may have.
    try:
        if edges is not None:
            (w, v), counted = _between(hessian, edges, rtol, throw)
            return w, v.mT if vectors else None, counted
        if sigma is None:
            start = noise(2, hessian.total, hessian.like)
            (w, v), info = eigsh(_operator(hessian), k or 1, which=which, v0=start, rtol=rtol, throw=False)
        else:
            (w, v), info = _nearest(hessian, k or 1, float(sigma), rtol)
        if throw and not is_true(info.converged):
            raise _failure(info.residual_norm, info.n_iter)
    except (ConvergenceError, SingularError):
        space = subspace_of(hessian, WHOLE)
        if space is None:
            raise
        return _read_off(space, k, which, sigma, edges, vectors, throw)
    return w, v.mT if vectors else None, HessianEigvalsInfo(*info, None)


def _failure(residual: Array, n_iter: Array) -> ConvergenceError:
    """Return the error of an iteration that has not converged."""
    xp = namespace_of(residual)
    return ConvergenceError(
        f"The eigenvalues of the Hessian have not converged: largest residual {float(xp.max(residual)):.1e} after "
        f"{int(n_iter)} cycles. The most likely cause is that the wanted eigenvalues are close to each other relative "
        "to the whole spectrum. Pass a sigma beside them, an interval, a larger rtol, or throw=False to get the "
        "present values and info.converged."
    )


def _read_off(
    space: Subspace,
    k: int | None,
    which: str,
    sigma: float | None,
    edges: list[float] | None,
    vectors: bool,
    throw: bool,
) -> tuple[Array, Array | None, HessianEigvalsInfo | EigvalCountInfo]:
    """Choose among all eigenvalues: those on the subspace, and zeros outside."""
    xp, hessian = namespace_of(space.hessian.like), space.hessian
    w, c = spectrum(space)
    every = xp.concat([w, full((space.null,), 0.0, w)])
    size = xp.max(xp.abs(every))
    if edges is not None:
        chosen, uncertain = _within(every, edges, float(size), throw)
        info: HessianEigvalsInfo | EigvalCountInfo = EigvalCountInfo(uncertain, ("whole",) * len(edges))
    else:
        # Most wanted first.
        wish = {"LA": -every, "SA": every, "LM": -xp.abs(every)}[which] if sigma is None else xp.abs(every - sigma)
        order = xp.argsort(wish, stable=True)
        chosen = [int(order[i]) for i in range(hessian.total if k is None else k)]
        cut = False
        if len(chosen) < hessian.total:
            last, following = wish[chosen[-1]], wish[int(order[len(chosen)])]
            cut = is_true(following - last <= CLUSTER_RTOL * eps(xp, w.dtype) * size)
        zeros = int(xp.sum(xp.astype(xp.abs(every) <= 16 * eps(xp, w.dtype) * size, xp.int64)))
    index = xp.asarray(chosen, dtype=xp.int64, device=_device(w))
    if vectors and len(chosen) * hessian.total > VECTORS**2:
        raise ValueError(
            f"{len(chosen)} eigenvectors of {hessian.total} parameters were asked for, more numbers than a matrix of "
            f"order {VECTORS} has. Pass vectors=False for the eigenvalues alone, or k=."
        )
    values, rows = xp.take(every, index, axis=0), _rows(space, c, chosen) if vectors else None
    if edges is None:
        left = full((len(chosen),), 0.0, w) if rows is None else _residuals(hessian, rows, values, size)
        info = HessianEigvalsInfo(True, 0, left, cut, space.d, zeros)
    return values, rows, info


def _device(w: Array) -> object:
    return array_api_compat.device(w)


def _within(every: Array, edges: list[float], size: float, throw: bool) -> tuple[list[int], tuple[int, ...]]:
    """Return the places of the eigenvalues between the outer edges, ascending, and how many are close to each edge."""
    xp = namespace_of(every)
    uncertain = tuple(int(xp.sum(xp.astype(xp.abs(every - edge) <= ZERO * size, xp.int64))) for edge in edges)
    for edge, count in zip(edges, uncertain, strict=True):
        if count and throw:
            _refuse_edge(edge, count, size)
    order = xp.argsort(every, stable=True)
    places = [int(order[i]) for i in range(order.shape[0])]
    return [i for i in places if edges[0] <= float(every[i]) <= edges[-1]], uncertain


def _rows(space: Subspace, c: Array, chosen: list[int]) -> Array:
    """Return eigenvectors in rows: of the subspace, or of the null space outside."""
    xp = namespace_of(c)
    if not chosen:
        return full((0, space.hessian.total), 0.0, c)
    inside = xp.asarray([i if i < space.d else 0 for i in chosen], dtype=xp.int64, device=_device(c))
    rows = space.rows(xp.take(c, inside, axis=0)) if space.d else full((len(chosen), space.hessian.total), 0.0, c)
    outside = [i - space.d for i in chosen if i >= space.d]
    if not outside:
        return rows
    null = space.null_rows(min(outside), max(outside) + 1)
    place = {i: j for j, i in enumerate(range(min(outside), max(outside) + 1))}
    taken = [place[i - space.d] if i >= space.d else 0 for i in chosen]
    is_null = xp.asarray([i >= space.d for i in chosen], device=_device(c))
    return xp.where(is_null[:, None], xp.take(null, xp.asarray(taken, dtype=xp.int64, device=_device(c)), axis=0), rows)


def _residuals(hessian: NetworkHessian, rows: Array, w: Array, size: Array) -> Array:
    """Return ``‖H v − λ v‖ / ‖H‖`` by exact products."""
    xp, width = namespace_of(w), max(1, 2**22 // hessian.total)
    found = []
    for i in range(0, rows.shape[0], width):
        part, values = rows[i : min(i + width, rows.shape[0]), :], w[i : min(i + width, rows.shape[0])]
        found.append(norm(flat(hessian.product(hessian.from_rows(part))) - values[:, None] * part))
    return xp.concat(found) / xp.where(size > 0, size, xp.ones_like(size))


def _operator(hessian: NetworkHessian, factor: HessianFactor | None = None) -> LinearOperator:
    """H, or ``(H + εI)⁻¹``, on vectors of all parameters."""

    def apply(params: tuple[Array, ...], v: Array) -> Array:  # noqa: ARG001
        xp = namespace_of(v)
        blocks = hessian.from_rows(xp.reshape(v, (-1, hessian.total)))
        found = hessian.product(blocks) if factor is None else factor.inverse(blocks)
        return xp.reshape(flat(found), tuple(v.shape))

    shape = (hessian.total,)
    return LinearOperator((), apply, apply, lambda *_: (), shape, shape, self_adjoint=True)  # it has no parameters


def _nearest(
    hessian: NetworkHessian, k: int, sigma: float, rtol: float | None
) -> tuple[tuple[Array, Array], EigshInfo]:
    """Find ``λ = σ + 1/θ`` for the largest |θ| of ``(H − σI)⁻¹``."""
    operator, start = _operator(hessian, HessianFactor(hessian, -sigma)), noise(2, hessian.total, hessian.like)
    (theta, v), info = eigsh(operator, k, which="LM", v0=start, rtol=rtol, throw=False)
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
            (w, v), found = _nearest(hessian, count, (a + b) / 2, rtol)
            if throw and not is_true(found.converged):
                raise _failure(found.residual_norm, found.n_iter)
            inside = int(xp.sum(xp.astype((w >= a) & (w <= b), xp.int32)))
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
    start = 1.5 * float(HessianFactor(hessian, 1.0).norm) or 1.0

    def end(sign: int, edge: float, other: float) -> float:
        """Double an end of the spectrum, or of minus the spectrum, until it lies beyond all or the edge."""
        reach = max(start, 2 * other)
        while reach < edge:
            found = HessianFactor(hessian, -sign * reach).inertia()
            if found.zero + (found.positive if sign > 0 else found.negative) == 0:
                break
            reach *= 2
        return min(edge, reach)

    return -end(-1, -low, -high), end(1, high, low)


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
