"""BiCGSTAB (van der Vorst 1992), preconditioned from the right, so that its residual is that of ``A x = b``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, Namespace, as_dtype, own
from ddnref._core.loops import WhileLoop
from ddnref._kernels.public import public
from ddnref._kernels.vectors import axpy, dot, norm, quotient, real_dot, xpay
from ddnref.krylov._rounds import Result, Round, finish, rounds
from ddnref.krylov._system import (
    BREAKDOWN,
    NOT_FINITE,
    Callback,
    Preconditioner,
    SolveInfo,
    System,
    active,
    counted,
    mark,
    prepare,
)
from ddnref.operators import LinearOperator


class _State(NamedTuple):
    x: Array
    r: Array
    shadow: Array
    """The residual with which the round began."""
    p: Array
    v: Array
    rho: Array
    """``shadowᴴ r`` of the step before."""
    alpha: Array
    omega: Array
    size: Array
    """``‖r‖ / ‖b‖``, by recurrence."""
    status: Array
    n_iter: Array
    active: Array


@public
def bicgstab(
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
    r"""Solve ``A x = b`` with any square operator in seven vectors, by BiCGSTAB.

    Parameters
    ----------
    operator : LinearOperator or (..., n, n) array, real or complex floating
        Need not be self-adjoint.
    b, x0, preconditioner, rtol, maxiter, check_every, callback, throw, while_loop
        As in `cg`, like the results, but M ≈ A⁻¹ need only be regular.

    Raises
    ------
    ConvergenceError
        Breakdown, and as `cg` apart from definiteness.

    Notes
    -----
    A step divides by ``ρ = r̃ᴴ r``, by ``r̃ᴴ A p`` and by ω. Where one of them vanishes up to rounding, the iteration
    starts again with the present residual as r̃, provided that this has at least halved; otherwise the breakdown is
    reported; `gmres` never breaks down. Cost of a step: two products, two with M, 20 n flops.

    References
    ----------
    .. [1] H. A. van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of
       nonsymmetric linear systems", SIAM J. Sci. Stat. Comput. 13 (1992), section 3.

    Examples
    --------
    >>> import numpy as np
    >>> x, info = ddnref.krylov.bicgstab(np.asarray([[3.0, 1.0], [0.0, 2.0]]), np.asarray([4.0, 2.0]))
    >>> np.round(x, 12), bool(info.converged)
    (array([1., 1.]), True)
    """
    system = prepare(
        "bicgstab", operator, b, x0=x0, preconditioner=preconditioner, callback=callback, rtol=rtol, maxiter=maxiter,
        check_every=check_every, while_loop=while_loop, throw=throw,
    )  # fmt: skip
    return finish(system, rounds(system, _round, restarts=True))


def _round(system: System, start: Round, iterate: Callable[..., Any]) -> Result:
    """Steps from a residual that was computed afresh and that also serves as the shadow residual."""
    one = as_dtype(system.xp.ones_like(start.size), start.r)
    zeros = system.xp.zeros_like(start.r)  # so that the first direction is the residual
    first = _State(
        start.x, start.r, own(start.r), zeros, zeros, one, one, one, start.size, start.status, start.n_iter,
        active(system, start.size, start.status, start.n_iter),
    )  # fmt: skip
    last = iterate(partial(_step, system), first)
    return Result(last.x, last.status, last.n_iter, last.size)


def _step(system: System, state: _State) -> _State:
    """``p ← r + β (p − ω v)``, ``s = r − α v``, ``x ← x + α M p + ω M s``, ``r ← s − ω t``."""
    xp, go = system.xp, state.active
    tiny = system.eps**1.5  # an inner product below this part of both lengths is only rounding
    shadow = norm(state.shadow)

    # The direction of the Bi-CG half of the step, and the step along it to the residual s.
    rho = dot(state.shadow, state.r)
    go, status = _divisor(xp, go, state.status, rho, tiny * shadow * state.size * system.norm_b)
    beta = quotient(rho, state.rho, go) * quotient(state.alpha, state.omega, go)
    p = axpy(own(state.p), go, -state.omega, state.v)
    p = xpay(state.r, beta, p)
    p_hat = p if system.precondition is None else system.precondition(p)
    v = own(system.apply(p_hat))  # an operator may return the same buffer again
    sigma = dot(state.shadow, v)
    go, status = _divisor(xp, go, status, sigma, tiny * shadow * norm(v))
    alpha = quotient(rho, sigma, go)
    s = axpy(state.r, go, -alpha, v)
    s_hat = s if system.precondition is None else system.precondition(s)

    # The stabilising half: the ω that makes ‖s − ω t‖ smallest.
    t = system.apply(s_hat)
    tt = real_dot(t, t)
    omega = quotient(dot(t, s), as_dtype(tt, t), go & (tt > 0))
    x = axpy(axpy(state.x, go, alpha, p_hat), go, omega, s_hat)
    r = axpy(s, go, -omega, t)
    size = norm(r) / system.norm_b

    # With ω = 0 the next β has no value; and a residual beyond ‖r̃‖ / eps has lost every digit.
    wild = size * system.norm_b > shadow / system.eps
    flat = go & (((xp.abs(omega) == 0) & (size > system.options.rtol)) | (wild & (size < float("inf"))))
    status = mark(status, flat, BREAKDOWN)
    status = mark(status, go & ~flat & ~(size < float("inf")), NOT_FINITE)
    n_iter, on = counted(system, go, size, status, state.n_iter)
    # A frozen item keeps divisors of one.
    one = xp.ones_like(rho)
    return _State(
        x, r, state.shadow, p, v, xp.where(go, rho, one), xp.where(go, alpha, one),
        xp.where(go & ~flat, omega, one), size, status, n_iter, on,
    )  # fmt: skip


def _divisor(xp: Namespace, go: Array, status: Array, value: Array, smallest: Array) -> tuple[Array, Array]:
    """Return where a step may divide by `value`, and the status where it may not."""
    size = xp.abs(value)
    small = go & (size <= smallest)  # a restart may help
    wild = go & ~small & ~(size < float("inf"))
    return go & ~small & ~wild, mark(mark(status, small, BREAKDOWN), wild, NOT_FINITE)
