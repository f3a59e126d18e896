"""MINRES (Paige and Saunders 1975): the smallest residual over a Krylov space of a self-adjoint operator.

Lanczos vectors v_k with ``A v_k = β_{k+1} v_{k+1} + α_k v_k + β_k v_{k−1}`` turn the problem into a tridiagonal one,
and reflections (c_k, s_k) make that triangular with rows (γ_k, δ_{k+1}, ε_{k+2}). With a preconditioner M the v are
orthonormal in the inner product of M; φ̄_k is the norm of the residual in that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, eps, namespace_of, own
from ddnref._core.loops import WhileLoop
from ddnref._kernels.public import public
from ddnref._kernels.vectors import axpy, column, norm, quotient, real_dot
from ddnref.krylov._rounds import Result, Round, finish, rounds
from ddnref.krylov._system import (
    PRECONDITIONER_NOT_POSITIVE_DEFINITE,
    RUNNING,
    STAGNATION,
    Callback,
    Preconditioner,
    SolveInfo,
    System,
    count,
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
    size: Array
    """``‖r‖ / ‖b‖``."""
    status: Array
    n_iter: Array


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
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, SolveInfo]:
    r"""Solve ``A x = b`` with a self-adjoint operator, definite or not, by MINRES.

    Parameters
    ----------
    operator : LinearOperator or (..., n, n) array, real or complex floating
        Self-adjoint, which is not checked.
    b, x0, preconditioner, rtol, maxiter, check_every, callback, throw, while_loop
        As in `cg`. The preconditioner must be positive definite although the operator need not be.

    Returns
    -------
    x : (..., \*domain_shape) array
    info : SolveInfo
        As in `cg`.

    Raises
    ------
    ConvergenceError
        Iteration limit, a preconditioner that is not positive definite, stagnation (a singular operator whose range
        does not contain b: then x is a least-squares solution), NaN or infinity.
    TypeError, ValueError
        As `cg`.

    See Also
    --------
    cg : for positive definite operators, with fewer operations per step.

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
    return finish(system, rounds(system, _round))


def _round(system: System, start: Round, iterate: Callable[..., Any]) -> Result:
    """Steps from a residual that was computed afresh."""
    xp = namespace_of(start.r)
    z = start.r if system.precondition is None else system.precondition(start.r)
    rz = real_dot(start.r, z)
    running = start.status == RUNNING
    status = failure(start.status, running, rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    beta = xp.where(rz > 0, rz, xp.ones_like(rz)) ** 0.5
    zero, one = xp.zeros_like(beta), xp.ones_like(beta)
    vector = xp.zeros_like(start.r)
    first = _State(
        x=start.x, r=own(start.r), before=vector, now=own(start.r), z=z, w=vector, w_before=vector, beta_before=one,
        beta=beta, dbar=zero, epsilon=zero, phibar=beta, c=-one, s=zero, norm2=zero, size=start.size,
        status=status, n_iter=start.n_iter,
    )  # fmt: skip

    def active(state: _State) -> Array:
        return (state.size > system.options.rtol) & (state.status == RUNNING) & (state.n_iter < system.options.maxiter)

    last = iterate(active, lambda state: _step(system, state, active(state)), first, lambda state: state.size)
    return Result(last.x, last.status, last.n_iter, last.size)


def _step(system: System, state: _State, go: Array) -> _State:
    """One Lanczos step, one reflection, one step along w."""
    xp = namespace_of(state.r)

    # Lanczos: β_{k+1} v_{k+1} = A v_k − α_k v_k − β_k v_{k−1}.
    v = state.z * column(1 / state.beta, state.z)
    y = system.apply(v) - column(state.beta / state.beta_before, v) * state.before
    alpha = real_dot(v, y)
    after = y - column(alpha / state.beta, y) * state.now
    z = after if system.precondition is None else system.precondition(after)
    rz = real_dot(after, z)
    finite = rz < float("inf")
    rounding = (16 * eps(xp, v.dtype)) ** 2 * state.norm2  # a smaller β² shows that the space is invariant
    status = failure(state.status, go & ~(xp.abs(rz) <= rounding), rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    go = go & (status == RUNNING)
    beta = xp.where(finite & (rz > 0), rz, xp.zeros_like(rz)) ** 0.5

    # The last reflection on the new column of the tridiagonal matrix, then the next reflection (c, s).
    delta = state.c * state.dbar + state.s * alpha
    gbar = state.s * state.dbar - state.c * alpha
    epsilon, dbar = state.s * beta, -state.c * beta
    gamma = (gbar * gbar + beta * beta) ** 0.5
    norm2 = xp.maximum(state.norm2, alpha * alpha + beta * beta)
    # ‖A r‖ = ‖r‖ ‖(γ̄, d̄)‖; where it is this small a step along w would amplify rounding by 1/√eps and more [2].
    left = (gbar * gbar + dbar * dbar) ** 0.5
    stuck = go & (left <= (eps(xp, v.dtype) * norm2) ** 0.5)
    go, status = go & ~stuck, mark(status, stuck, STAGNATION)
    c, s = quotient(gbar, gamma, go), quotient(beta, gamma, go)

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
    return _State(
        x=axpy(state.x, go, phi, w), r=r, before=state.now, now=after, z=z, w=w, w_before=state.w,
        beta_before=state.beta, beta=xp.where(goes_on, beta, xp.ones_like(beta)), dbar=dbar, epsilon=epsilon,
        phibar=phibar, c=c, s=s, norm2=norm2, size=norm(r) / system.norm_b, status=status,
        n_iter=count(go, state.n_iter),
    )  # fmt: skip
