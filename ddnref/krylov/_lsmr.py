"""LSMR (Fong and Saunders 2011): least squares, by MINRES on the normal equations without forming them.

Golub–Kahan bidiagonalisation, ``β_{k+1} u_{k+1} = A v_k − α_k u_k`` and ``α_{k+1} v_{k+1} = Aᴴ u_{k+1} − β_{k+1} v_k``,
turns the problem into a bidiagonal one, and two sequences of rotations solve that. The letters are those of the paper,
section 2.8, with accents written out: ``rhobar`` is ρ̄, ``betadd`` β̈.
"""

from __future__ import annotations

from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, namespace_of, nan_where, quiet
from ddnref._core.loops import WhileLoop, run
from ddnref._kernels.public import public
from ddnref._kernels.vectors import axpy, column, norm, quotient
from ddnref.krylov._rounds import FALL, first_round, iterator, unscaled
from ddnref.krylov._system import (
    CONVERGED,
    ITERATION_LIMIT,
    NOT_FINITE,
    RUNNING,
    SLACK,
    STAGNATION,
    Callback,
    System,
    count,
    mark,
    prepare,
)
from ddnref.operators import LinearOperator


class LeastSquaresInfo(NamedTuple):
    """How a least-squares solve ended, for each right-hand side."""

    converged: Array
    """(...) bool: whether one of the two recomputed residuals is at most 1.1 rtol."""
    n_iter: Array
    """(...) int32: steps taken before it was frozen."""
    residual_norm: Array
    """(...) real: ``‖b − A x‖ / ‖b‖``, computed from the x that is returned; large where b is not in the range of A."""
    status: Array
    """(...) int32, with the codes of `SolveInfo`."""
    normal_residual_norm: Array
    """(...) real: ``‖Aᴴ(b − A x)‖ / ‖Aᴴ b‖``, computed from the x that is returned."""


class _Round(NamedTuple):
    """The state between two rounds; both residuals are computed afresh."""

    x: Array
    r: Array
    size: Array
    """``‖r‖ / ‖b‖``."""
    normal: Array
    """``‖Aᴴ r‖ / ‖Aᴴ b‖``."""
    status: Array
    n_iter: Array


class _State(NamedTuple):
    x: Array
    u: Array
    v: Array
    h: Array
    hbar: Array
    alpha: Array
    alphabar: Array
    rho: Array
    rhobar: Array
    cbar: Array
    sbar: Array
    zeta: Array
    zetabar: Array
    """``±‖Aᴴ r‖``."""
    betadd: Array
    betad: Array
    rhod: Array
    tautilde: Array
    thetatilde: Array
    size: Array
    """``‖r‖ / ‖b‖``, by recurrence."""
    normal: Array
    """``‖Aᴴ r‖ / ‖Aᴴ b‖``, by recurrence."""
    status: Array
    n_iter: Array


@public
def lsmr(
    operator: Array | LinearOperator,
    b: Array,
    /,
    *,
    x0: Array | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int | None = None,
    callback: Callback | None = None,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, LeastSquaresInfo]:
    r"""Minimise ``‖b − A x‖``, by LSMR.

    Parameters
    ----------
    operator : LinearOperator or (..., n, m) array, real or complex floating
        Of any shape. Its `adjoint` is used as well.
    b, x0, maxiter, check_every, callback, throw, while_loop
        As in `cg`.
    rtol : float, optional
        For each right-hand side, stop when ``‖Aᴴ(b − A x)‖ <= rtol * ‖Aᴴ b‖``, or when ``‖b − A x‖ <= rtol * ‖b‖``
        where that can be reached; default ``√eps``.

    Returns
    -------
    x : (..., \*domain_shape) array
        Where A does not determine x, the solution of smallest norm if ``x0=None``.
    info : LeastSquaresInfo
        Like `SolveInfo`, with ``normal_residual_norm`` added; both residuals are recomputed from x.

    Raises
    ------
    ConvergenceError
        Iteration limit, stagnation, NaN or infinity.
    TypeError, ValueError
        As `cg`; `operator` need be neither square nor self-adjoint.

    See Also
    --------
    cg : with ``normal(operator, damping)`` for regularised least squares.

    Notes
    -----
    In exact arithmetic this is MINRES on ``AᴴA x = Aᴴb``, so ``‖Aᴴ r‖`` never grows; but rounding errors grow with κ
    instead of κ². Cost of a step: one product with A, one with Aᴴ, and ``3 n + 10 m`` flops. Memory: two vectors of n
    numbers, four of m numbers.

    References
    ----------
    .. [1] D. C.-L. Fong and M. A. Saunders, "LSMR: an iterative algorithm for sparse least-squares problems", SIAM J.
       Sci. Comput. 33 (2011), section 2.8.

    Examples
    --------
    >>> import numpy as np
    >>> x, info = ddnref.krylov.lsmr(np.asarray([[1.0], [1.0]]), np.asarray([1.0, 3.0]))
    >>> np.round(x, 12), bool(info.converged)
    (array([2.]), True)
    """
    system = prepare(
        "lsmr", operator, b, x0=x0, callback=callback, rtol=rtol, maxiter=maxiter, check_every=check_every,
        while_loop=while_loop, throw=throw, rectangular=True,
    )  # fmt: skip
    with quiet():
        last = _rounds(system)
        bad = last.status == NOT_FINITE
        sizes = nan_where(bad, last.size), nan_where(bad, last.normal)
        info = LeastSquaresInfo(last.status == CONVERGED, last.n_iter, sizes[0], last.status, sizes[1])
    return unscaled(system, last.x, bad, info), info


def _rounds(system: System) -> _Round:
    """Repeat rounds, each of which ends with both residuals computed afresh, until none can improve x."""
    xp = array_api_compat.array_namespace(system.b)
    rtol, maxiter = system.options.rtol, system.options.maxiter
    norm_ab = norm(system.adjoint(system.b))
    norm_ab = xp.where(norm_ab > 0, norm_ab, xp.ones_like(norm_ab))
    iterate = iterator(system)

    def active(state: _State) -> Array:
        on = (state.size > rtol) & (state.normal > rtol)
        return on & (state.status == RUNNING) & (state.n_iter < maxiter)

    def body(last: _Round) -> _Round:
        first = _first(system, last, norm_ab)
        state = iterate(active, lambda s: _step(system, s, active(s), norm_ab), first, lambda s: s.size)
        r = system.b - system.apply(state.x)
        size, normal = norm(r) / system.norm_b, norm(system.adjoint(r)) / norm_ab
        return _Round(state.x, r, size, normal, _judged(system, last, state, size, normal), state.n_iter)

    first = first_round(system)
    normal = norm(system.adjoint(first.r)) / norm_ab
    status = mark(first.status, (first.status == RUNNING) & (normal <= rtol), CONVERGED)
    status = mark(status, (status == RUNNING) & ~(normal < float("inf")), NOT_FINITE)
    start = _Round(first.x, first.r, first.size, normal, status, first.n_iter)
    return run(
        lambda s: s.status == RUNNING, body, start, maxiter=maxiter + 1, check_every=1,
        while_loop=system.options.while_loop,
    )  # fmt: skip


def _judged(system: System, last: _Round, state: _State, size: Array, normal: Array) -> Array:
    """The status after a round, as for the other methods, but by the better of two residuals."""
    tol = SLACK * system.options.rtol
    status = last.status
    for bad, code in (
        ((size <= tol) | (normal <= tol), CONVERGED),
        (~((size < float("inf")) & (normal < float("inf"))), NOT_FINITE),
        (state.n_iter >= system.options.maxiter, ITERATION_LIMIT),
        ((normal > FALL * last.normal) & (size > FALL * last.size), STAGNATION),
    ):
        status = mark(status, (status == RUNNING) & bad, code)
    return status


def _first(system: System, start: _Round, norm_ab: Array) -> _State:
    """``β u = r``, ``α v = Aᴴ u`` and the other letters before the first step."""
    xp = namespace_of(start.r)
    u, beta = _unit(start.r)
    v, alpha = _unit(system.adjoint(u))
    zero, one = xp.zeros_like(beta), xp.ones_like(beta)
    return _State(
        x=start.x, u=u, v=v, h=v, hbar=xp.zeros_like(v), alpha=alpha, alphabar=alpha, rho=one, rhobar=one, cbar=one,
        sbar=zero, zeta=zero, zetabar=alpha * beta, betadd=beta, betad=zero, rhod=one, tautilde=zero, thetatilde=zero,
        size=start.size, normal=alpha * beta / norm_ab, status=start.status, n_iter=start.n_iter,
    )  # fmt: skip


def _step(system: System, state: _State, go: Array, norm_ab: Array) -> _State:
    """The next u and v, two rotations, one step along h̄, and the estimates of both residuals."""
    # Bidiagonalise: ``β u ← A v − α u``, ``α v ← Aᴴ u − β v``.
    u, beta = _unit(system.apply(state.v) - column(state.alpha, state.u) * state.u)
    v, alpha = _unit(system.adjoint(u) - column(beta, state.v) * state.v)

    # Rotate the bidiagonal matrix to an upper one, R, and Rᵀ to R̄.
    c, s, rho = _rotation(state.alphabar, beta)
    thetanew, alphabar = s * alpha, c * alpha
    thetabar = state.sbar * rho
    cbar, sbar, rhobar = _rotation(state.cbar * rho, thetanew)
    zeta, zetabar = cbar * state.zetabar, -sbar * state.zetabar

    # Step along h̄, except where a number that it divides by is zero, infinite or NaN.
    finite = (rho < float("inf")) & (rhobar < float("inf"))
    status = mark(state.status, go & ~finite, NOT_FINITE)
    go = go & finite & (rho > 0) & (rhobar > 0)
    hbar = state.h - column(quotient(thetabar * rho, state.rho * state.rhobar, go), v) * state.hbar
    x = axpy(state.x, go, quotient(zeta, rho * rhobar, go), hbar)
    h = v - column(quotient(thetanew, rho, go), v) * state.h

    # Estimate ‖r‖ by a third sequence of rotations; ‖Aᴴ r‖ is the last entry of the rotated right-hand side.
    betahat, betadd = c * state.betadd, -s * state.betadd
    ctilde, stilde, rhotilde = _rotation(state.rhod, thetabar)
    thetatilde, rhod = stilde * rhobar, ctilde * rhobar
    betad = -stilde * state.betad + ctilde * betahat
    tautilde = quotient(state.zeta - state.thetatilde * state.tautilde, rhotilde, rhotilde > 0)
    taud = quotient(zeta - thetatilde * tautilde, rhod, rhod != 0)
    size = ((betad - taud) ** 2 + betadd * betadd) ** 0.5 / system.norm_b
    xp = namespace_of(size)
    normal = xp.abs(zetabar) / norm_ab
    return _State(
        x, u, v, h, hbar, alpha, alphabar, rho, rhobar, cbar, sbar, zeta, zetabar, betadd, betad, rhod, tautilde,
        thetatilde, xp.where(go, size, state.size), xp.where(go, normal, xp.zeros_like(normal)), status,
        count(go, state.n_iter),
    )  # fmt: skip


def _unit(u: Array) -> tuple[Array, Array]:
    """A vector divided by its length, or zero, and the length."""
    size = norm(u)
    return u * column(quotient(namespace_of(size).ones_like(size), size, size > 0), u), size


def _rotation(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """``c, s, r`` with ``c a + s b = r`` and ``c b = s a``; c = 1 where both vanish."""
    xp = namespace_of(a)
    r = (a * a + b * b) ** 0.5
    positive = r > 0
    return xp.where(positive, quotient(a, r, positive), xp.ones_like(a)), quotient(b, r, positive), r
