"""MINRES (Paige and Saunders 1975): the smallest residual over a Krylov space of a self-adjoint operator.

Lanczos vectors v_k with ``A v_k = β_{k+1} v_{k+1} + α_k v_k + β_k v_{k−1}`` turn the problem into a tridiagonal one,
and reflections (c_k, s_k) make that triangular with rows (γ_k, δ_{k+1}, ε_{k+2}). With a preconditioner M the v are
orthonormal in the inner product of M; φ̄_k is the norm of the residual in that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, own
from ddnref._core.loops import WhileLoop
from ddnref._kernels.public import public
from ddnref._kernels.vectors import axpy, column, norm, quotient, real_dot
from ddnref.krylov._pivots import grid
from ddnref.krylov._rounds import Result, Round, finish, rounds
from ddnref.krylov._system import (
    PRECONDITIONER_NOT_POSITIVE_DEFINITE,
    RUNNING,
    STAGNATION,
    Callback,
    Preconditioner,
    SolveInfo,
    System,
    active,
    counted,
    failure,
    mark,
    prepare,
)
from ddnref.operators import LinearOperator


class _State(NamedTuple):
    x: Array
    r: Array
    """``b − A x``, by recurrence."""
    before: Array
    """β_{k−1} v_{k−1} without M."""
    now: Array
    """β_k v_k without M."""
    z: Array
    """β_k v_k: M times `now`."""
    w: Array
    w_before: Array
    beta_before: Array
    beta: Array
    dbar: Array
    epsilon: Array
    phibar: Array
    c: Array
    s: Array
    norm2: Array
    """Square of the longest column of the tridiagonal matrix so far, a lower bound of ‖A‖²."""
    ritz: Any
    """`_Ritz`, or ``None``."""
    size: Array
    """``‖r‖ / ‖b‖``."""
    status: Array
    n_iter: Array
    active: Array


class _Ritz(NamedTuple):
    """Pivots that show the eigenvalues of M A, of the tridiagonal matrix."""

    shifts: Array
    """Relative to the first column: positive ones that fall by factors of four, and their negatives."""
    anchor: Array
    """The length of the first column, which no smallest absolute value exceeds; 0 before."""
    pivot: Array
    """The last pivot of the matrix less each shift; infinity before the first."""
    below: Array
    """The number of eigenvalues below each shift."""
    largest: Array
    """The longest column."""


@public
def minres(
    operator: Array | LinearOperator,
    b: Array,
    /,
    *,
    x0: Array | None = None,
    preconditioner: Preconditioner | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int | None = None,
    callback: Callback | None = None,
    estimate_condition: bool = False,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, SolveInfo]:
    r"""Solve ``A x = b`` with a self-adjoint operator, definite or not, by MINRES.

    Parameters
    ----------
    operator : LinearOperator or (..., n, n) array, real or complex floating
        Self-adjoint, which is not checked.
    b, x0, preconditioner, rtol, maxiter, check_every, callback, estimate_condition, throw, while_loop
        As in `cg`, like the results and the errors. The preconditioner must be positive definite although the operator
        need not be.

    Notes
    -----
    Without a preconditioner the residual never grows. For an indefinite operator it falls at least by
    ``(κ − 1)/(κ + 1)`` in two steps. Cost of a step: one product, one with M, 20 n flops. Memory: eight vectors.

    Rounding errors grow with κ² [2]_. So the iteration ends with status 4 where ``‖A r‖ <= √eps ‖A‖ ‖r‖``. Then either
    A is singular and x is a least-squares solution, or κ exceeds ``1/√eps``, 7e7 in double and 3,000 in single
    precision.

    References
    ----------
    .. [1] C. C. Paige and M. A. Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer.
       Anal. 12 (1975), section 6.
    .. [2] G. L. G. Sleijpen, H. A. van der Vorst and J. Modersitzki, "Differences in the effects of rounding errors in
       Krylov solvers for symmetric indefinite linear systems", SIAM J. Matrix Anal. Appl. 22 (2000).

    Examples
    --------
    >>> import numpy as np
    >>> x, info = ddnref.krylov.minres(np.asarray([[1.0, 2.0], [2.0, 1.0]]), np.asarray([3.0, 3.0]))
    >>> x, bool(info.converged)
    (array([1., 1.]), True)
    """
    system = prepare(
        "minres", operator, b, x0=x0, preconditioner=preconditioner, callback=callback, rtol=rtol, maxiter=maxiter,
        check_every=check_every, while_loop=while_loop, throw=throw, self_adjoint=True,
    )  # fmt: skip
    return finish(system, rounds(system._replace(ritz=estimate_condition), _round))


def _round(system: System, start: Round, iterate: Callable[..., Any]) -> Result:
    """Steps from a residual that was computed afresh."""
    xp = system.xp
    z = start.r if system.precondition is None else system.precondition(start.r)
    rz = real_dot(start.r, z)
    status = failure(system, start.status, start.status == RUNNING, rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    # β_1 v_1 = r, measured in the inner product of M; the first reflection is c = −1, s = 0.
    beta = xp.where(rz > 0, rz, xp.ones_like(rz)) ** 0.5
    zero, one = xp.zeros_like(beta), xp.ones_like(beta)
    vector, ritz = xp.zeros_like(start.r), None
    if system.ritz:
        positive = grid(xp, 1.0, system.eps, 4.0, zero)
        shifts = xp.concat([positive, -positive])
        zeros = zero[..., None] + 0 * shifts
        ritz = _Ritz(shifts, zero, zeros + float("inf"), zeros, zero)
    first = _State(
        x=start.x, r=own(start.r), before=vector, now=own(start.r), z=z, w=vector, w_before=vector, beta_before=one,
        beta=beta, dbar=zero, epsilon=zero, phibar=beta, c=-one, s=zero, norm2=zero,
        ritz=ritz, size=start.size,
        status=status, n_iter=start.n_iter, active=active(system, start.size, status, start.n_iter),
    )  # fmt: skip
    last = iterate(partial(_step, system), first)
    return Result(
        last.x, last.status, last.n_iter, last.size, None if last.ritz is None else _condition(system, last.ritz)
    )


def _step(system: System, state: _State) -> _State:
    """One Lanczos step, one reflection, one step along w."""
    xp, go = system.xp, state.active

    # Lanczos: β_{k+1} v_{k+1} = A v_k − α_k v_k − β_k v_{k−1}.
    v = state.z * column(1 / state.beta, state.z)
    y = system.apply(v) - column(state.beta / state.beta_before, v) * state.before
    alpha = real_dot(v, y)
    after = y - column(alpha / state.beta, y) * state.now
    z = after if system.precondition is None else system.precondition(after)
    rz = real_dot(after, z)
    finite = rz < float("inf")  # false for NaN
    rounding = (16 * system.eps) ** 2 * state.norm2  # a smaller β² shows that the space is invariant
    status = failure(system, state.status, go & ~(xp.abs(rz) <= rounding), rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    go = go & (status == RUNNING)
    beta = xp.where(finite & (rz > 0), rz, xp.zeros_like(rz)) ** 0.5

    # The last reflection on the new column of the tridiagonal matrix, then the next reflection (c, s).
    delta = state.c * state.dbar + state.s * alpha
    gbar = state.s * state.dbar - state.c * alpha
    epsilon, dbar = state.s * beta, -state.c * beta
    gamma = (gbar * gbar + beta * beta) ** 0.5
    # A column of the tridiagonal matrix is not longer than ‖A‖.
    norm2 = xp.maximum(state.norm2, alpha * alpha + beta * beta)
    # ‖A r‖ = ‖r‖ ‖(γ̄, d̄)‖; where it is this small a step along w would amplify rounding by 1/√eps and more [2].
    left = (gbar * gbar + dbar * dbar) ** 0.5
    stuck = go & (left <= (system.eps * norm2) ** 0.5)
    go, status = go & ~stuck, mark(status, stuck, STAGNATION)
    c, s = quotient(gbar, gamma, go), quotient(beta, gamma, go)

    ritz = state.ritz if state.ritz is None else _with_column(system, state.ritz, go, state.beta, alpha, beta)
    # x moves along w, the next column of V R⁻¹.
    phi = c * state.phibar
    w = (v - column(state.epsilon, v) * state.w_before - column(delta, v) * state.w) * column(
        quotient(xp.ones_like(gamma), gamma, go), v
    )
    goes_on = beta > 0
    phibar = s * state.phibar

    # r ← s² r − φ̄ c v_{k+1}, frozen where `go` is not set.
    r = column(s * s, v) * state.r + column(quotient(-phibar * c, beta, goes_on), v) * after
    r = xp.where(go[..., None], r, state.r)
    size = norm(r) / system.norm_b
    n_iter, on = counted(system, go, size, status, state.n_iter)
    return _State(
        x=axpy(state.x, go, phi, w), r=r, before=state.now, now=after, z=z, w=w, w_before=state.w,
        beta_before=state.beta, beta=xp.where(goes_on, beta, xp.ones_like(beta)), dbar=dbar, epsilon=epsilon,
        phibar=phibar, c=c, s=s, norm2=norm2, ritz=ritz, size=size, status=status,
        n_iter=n_iter, active=on,
    )  # fmt: skip


def _with_column(system: System, ritz: _Ritz, go: Array, above: Array, alpha: Array, beta: Array) -> _Ritz:
    """One more column of the tridiagonal matrix, ``(above, α, β)``, where `go` is set."""
    xp, length = system.xp, (alpha * alpha + beta * beta) ** 0.5
    anchor = xp.where(ritz.anchor > 0, ritz.anchor, length)
    # d = α − μ − β² / d; a zero pivot counts as negative.
    pivot = alpha[..., None] - anchor[..., None] * ritz.shifts - (above * above)[..., None] / ritz.pivot
    pivot = xp.where(pivot == 0, -(system.eps**2) * anchor[..., None], pivot)
    each, below = go[..., None], ritz.below + xp.astype(pivot < 0, alpha.dtype)
    return _Ritz(
        ritz.shifts, xp.where(go, anchor, ritz.anchor), xp.where(each, pivot, ritz.pivot),
        xp.where(each, below, ritz.below), xp.where(go, xp.maximum(ritz.largest, length), ritz.largest),
    )  # fmt: skip


def _condition(system: System, ritz: _Ritz) -> Array:
    """The quotient of the longest column and of the Ritz value next to zero, from the middle of its gap."""
    xp, j = system.xp, ritz.below.shape[-1] // 2
    shifts = ritz.shifts[:j]
    near = ritz.below[..., :j] > ritz.below[..., j:]  # between −μ and μ
    free = xp.max(xp.where(near, 0 * shifts, shifts), axis=-1)
    smallest = xp.where(free < 1, 2 * xp.where(free > 0, free, system.eps / 4 + 0 * free), free) * ritz.anchor
    return quotient(ritz.largest, smallest, smallest > 0)
