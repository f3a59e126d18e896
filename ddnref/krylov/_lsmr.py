"""LSMR (Fong and Saunders 2011): least squares, by MINRES on the normal equations without forming them.

Golub–Kahan bidiagonalisation ``A v_k = α_k u_k + β_{k+1} u_{k+1}`` up to the sides, and two sequences of rotations; the
letters are those of the paper, section 2.8, a bar written out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, full, namespace_of, nan_where, quiet
from ddnref._core.loops import WhileLoop, run
from ddnref._kernels.public import public
from ddnref._kernels.vectors import axpy, column, norm, quotient
from ddnref.krylov._common import (
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
    raise_if_failed,
)
from ddnref.krylov._rounds import FALL, first_round, iterator
from ddnref.krylov._system import prepare
from ddnref.operators import LinearOperator


class LeastSquaresInfo(NamedTuple):
    """How a least-squares solve ended, for each right-hand side."""

    converged: Array
    """(...) bool: whether one of the two recomputed residuals is at most 1.1 rtol."""
    n_iter: Array
    """(...) int32: steps taken before it was frozen."""
    residual_norm: Array
    """(...) real: ``‖b − A x‖ / ‖b‖``, computed from the x that is returned; not small where A x cannot reach b."""
    status: Array
    """(...) int32, as in `SolveInfo`."""
    normal_residual_norm: Array
    """(...) real: ``‖Aᴴ(b − A x)‖ / ‖Aᴴ b‖``, computed from the x that is returned."""


class _Round(NamedTuple):
    x: Array
    r: Array
    size: Array
    """``‖r‖ / ‖b‖``, computed afresh."""
    normal: Array
    """``‖Aᴴ r‖ / ‖Aᴴ b‖``, computed afresh."""
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
    """``‖Aᴴ r‖`` but for the sign."""
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
    r"""The x that makes ``‖b − A x‖`` smallest, by LSMR.

    Parameters
    ----------
    operator : LinearOperator or (..., n, m) array, real or complex floating
        Any shape; its `adjoint` is used as well.
    b, x0, maxiter, check_every, callback, throw, while_loop
        As in `cg`.
    rtol : float, optional
        Stop when ``‖Aᴴ(b − A x)‖ <= rtol * ‖Aᴴ b‖``, or ``‖b − A x‖ <= rtol * ‖b‖`` where that can be reached; for each
        right-hand side; default ``√eps``.

    Returns
    -------
    x : (..., \*domain_shape) array
        From ``x0=None``, where A does not determine x, the one of smallest norm.
    info : LeastSquaresInfo
        As `SolveInfo`, with ``normal_residual_norm``; both residuals are recomputed from x.

    Raises
    ------
    ConvergenceError
        Iteration limit, stagnation, NaN or infinity.
    TypeError, ValueError
        As `cg`; `operator` need neither be square nor self-adjoint.

    See Also
    --------
    cg : with ``normal(operator, damping)`` for regularised least squares.

    Notes
    -----
    In exact arithmetic MINRES on ``AᴴA x = Aᴴb``, so ``‖Aᴴ r‖`` never grows; rounding enters with κ instead of κ².
    Cost of a step: one product with A, one with Aᴴ, and ``3 n + 10 m`` flops. Memory: two vectors of n, four of m
    numbers.

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
    limits = {"rtol": rtol, "maxiter": maxiter, "check_every": check_every}
    system, x0 = prepare("lsmr", operator, b, x0, None, limits, callback, while_loop, rectangular=True)
    with quiet():
        return _finish(system, _rounds(system, x0), throw)


def _rounds(system: System, x0: Array | None) -> _Round:
    """Rounds that end with both residuals computed afresh."""
    xp = array_api_compat.array_namespace(system.b)
    given = norm(system.adjoint(system.b))
    size_of = xp.where(given > 0, given, xp.ones_like(given))
    iterate = iterator(system.options)

    def body(last: _Round) -> _Round:
        state = _first(system, last, size_of)
        state = iterate(
            lambda s: _active(system, s), lambda s: _step(system, s, _active(system, s), size_of), state,
            lambda s: s.size,
        )  # fmt: skip
        r = system.b - system.apply(state.x)
        size, normal = norm(r) / system.norm_b, norm(system.adjoint(r)) / size_of
        return _Round(state.x, r, size, normal, _judged(system, last, state, size, normal), state.n_iter)

    first = first_round(system, x0)
    normal = norm(system.adjoint(first.r)) / size_of
    status = mark(first.status, (first.status == RUNNING) & (normal <= system.options.rtol), CONVERGED)
    status = mark(status, (status == RUNNING) & ~(normal < float("inf")), NOT_FINITE)
    start = _Round(first.x, first.r, first.size, normal, status, first.n_iter)
    limit = system.options.maxiter + 1
    loop = system.options.while_loop
    return run(lambda s: s.status == RUNNING, body, start, maxiter=limit, check_every=1, while_loop=loop)


def _active(system: System, state: _State) -> Array:
    rtol = system.options.rtol
    return (
        (state.size > rtol) & (state.normal > rtol) & (state.status == RUNNING)
        & (state.n_iter < system.options.maxiter)
    )  # fmt: skip


def _judged(system: System, last: _Round, state: _State, size: Array, normal: Array) -> Array:
    """The status after a round: as for the other methods, with the better of two residuals."""
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


def _first(system: System, start: _Round, size_of: Array) -> _State:
    xp = namespace_of(start.r)
    beta = norm(start.r)
    u = start.r * column(quotient(xp.ones_like(beta), beta, beta > 0), start.r)
    v = system.adjoint(u)
    alpha = norm(v)
    v = v * column(quotient(xp.ones_like(alpha), alpha, alpha > 0), v)
    zero, one = xp.zeros_like(beta), xp.ones_like(beta)
    return _State(
        x=start.x, u=u, v=v, h=v, hbar=xp.zeros_like(v), alpha=alpha, alphabar=alpha, rho=one, rhobar=one, cbar=one,
        sbar=zero, zeta=zero, zetabar=alpha * beta, betadd=beta, betad=zero, rhod=one, tautilde=zero, thetatilde=zero,
        size=start.size, normal=alpha * beta / size_of, status=start.status, n_iter=start.n_iter,
    )  # fmt: skip


def _step(system: System, state: _State, go: Array, size_of: Array) -> _State:
    """The next u and v, two rotations, one step along h̄; then the estimate of ‖r‖."""
    u, v, beta, alpha = _bidiagonal(system, state)
    c, s, rho = _rotation(state.alphabar, beta)
    thetanew, alphabar = s * alpha, c * alpha
    thetabar = state.sbar * rho
    cbar, sbar, rhobar = _rotation(state.cbar * rho, thetanew)
    zeta, zetabar = cbar * state.zetabar, -sbar * state.zetabar
    xp = namespace_of(v)
    finite = (rho < float("inf")) & (rhobar < float("inf"))
    status = mark(state.status, go & ~finite, NOT_FINITE)
    go = go & finite & (rho > 0) & (rhobar > 0)
    hbar = state.h - column(quotient(thetabar * rho, state.rho * state.rhobar, go), v) * state.hbar
    x = axpy(state.x, go, quotient(zeta, rho * rhobar, go), hbar)
    h = v - column(quotient(thetanew, rho, go), v) * state.h
    betahat, betadd = c * state.betadd, -s * state.betadd
    ctilde, stilde, rhotilde = _rotation(state.rhod, thetabar)
    thetatilde, rhod = stilde * rhobar, ctilde * rhobar
    betad = -stilde * state.betad + ctilde * betahat
    tautilde = quotient(state.zeta - state.thetatilde * state.tautilde, rhotilde, rhotilde > 0)
    taud = quotient(zeta - thetatilde * tautilde, rhod, rhod != 0)
    size = ((betad - taud) ** 2 + betadd * betadd) ** 0.5 / system.norm_b
    normal = xp.abs(zetabar) / size_of
    return _State(
        x, u, v, h, hbar, alpha, alphabar, rho, rhobar, cbar, sbar, zeta, zetabar, betadd, betad, rhod, tautilde,
        thetatilde, xp.where(go, size, state.size), xp.where(go, normal, full((), 0.0, normal)), status,
        count(go, state.n_iter),
    )  # fmt: skip


def _bidiagonal(system: System, state: _State) -> tuple[Array, Array, Array, Array]:
    """``β u ← A v − α u``, ``α v ← Aᴴ u − β v``."""
    xp = namespace_of(state.v)
    u = system.apply(state.v) - column(state.alpha, state.u) * state.u
    beta = norm(u)
    u = u * column(quotient(xp.ones_like(beta), beta, beta > 0), u)
    v = system.adjoint(u) - column(beta, state.v) * state.v
    alpha = norm(v)
    return u, v * column(quotient(xp.ones_like(alpha), alpha, alpha > 0), v), beta, alpha


def _rotation(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """``c, s, r`` with ``c a + s b = r`` and ``c b = s a``; c = 1 where both vanish."""
    xp = namespace_of(a)
    r = (a * a + b * b) ** 0.5
    there = r > 0
    return xp.where(there, quotient(a, r, there), xp.ones_like(a)), quotient(b, r, there), r


def _finish(system: System, last: _Round, throw: bool) -> tuple[Array, Any]:
    xp = array_api_compat.array_namespace(last.x)
    bad = last.status == NOT_FINITE
    sizes = nan_where(bad, last.size), nan_where(bad, last.normal)
    info = LeastSquaresInfo(last.status == CONVERGED, last.n_iter, sizes[0], last.status, sizes[1])
    x = nan_where(bad[..., None], column(system.scale, last.x) * last.x)
    if throw:
        raise_if_failed("lsmr", info, system.options)
    return xp.reshape(x, (*system.batch, *system.domain_shape)), info
