"""Conjugate gradients (Hestenes and Stiefel 1952), preconditioned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, eps, namespace_of, own
from ddnref._core.loops import WhileLoop
from ddnref._kernels.public import public
from ddnref._kernels.vectors import axpy, quotient, real_dot, xpay
from ddnref.krylov._common import (
    NOT_POSITIVE_DEFINITE,
    PRECONDITIONER_NOT_POSITIVE_DEFINITE,
    RUNNING,
    Callback,
    Preconditioner,
    SolveInfo,
    System,
    count,
    failure,
    mark,
)
from ddnref.krylov._rounds import Result, Round, finish, rounds
from ddnref.krylov._system import prepare
from ddnref.operators import LinearOperator


class _State(NamedTuple):
    x: Array
    r: Array
    p: Array
    rz: Array
    """``rᴴ M r``."""
    size: Array
    """``‖r‖ / ‖b‖``, by recurrence."""
    status: Array
    n_iter: Array


@public
def cg(
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
    r"""Solve ``A x = b`` with a positive definite operator, by conjugate gradients.

    Parameters
    ----------
    operator : LinearOperator or (..., n, n) array, real or complex floating
        Self-adjoint and positive definite. Self-adjointness is taken at its word (`LinearOperator.self_adjoint`; of a
        matrix both triangles are used); positive definiteness is watched.
    b : (..., \*range_shape) array
        Right-hand sides. Leading axes broadcast with those that the operator's parameters give to its images.
    x0 : (..., \*domain_shape) array, optional
        Where to start; default zero.
    preconditioner : LinearOperator or callable, optional
        ``r -> M r`` with M ≈ A⁻¹ self-adjoint positive definite, on all right-hand sides at once.
    rtol : float, optional
        Stop when ``‖b − A x‖ <= rtol * ‖b‖``, for each right-hand side; default ``√eps``: 1.5e-8, and 3.5e-4 in single
        precision, which rounding lets be reached up to condition ``1/√eps``.
    maxiter : int, optional
        Most steps for each right-hand side; default ten times the number of unknowns, at least 100, at most 20,000.
    check_every : int, optional
        Steps between two looks at the stopping rule, each of which reads one flag on the host; default 1 for NumPy, 10
        for other libraries. The result does not depend on it.
    callback : callable, optional
        Called with ``Progress(step, residual_norm)`` at each look; not together with `while_loop`.
    throw : bool, default True
        Raise if a right-hand side has failed, reading one more flag. With ``False`` the last iterate is returned (NaN
        where it is not finite) and ``info.status`` says why.
    while_loop : callable, optional
        Such as ``jax.lax.while_loop``, which runs under ``jax.jit`` and reads nothing.

    Returns
    -------
    x : (..., \*domain_shape) array
    info : SolveInfo
        ``converged``, ``n_iter``, ``residual_norm`` (recomputed from x, relative) and ``status``, each ``(...)``.

    Raises
    ------
    ConvergenceError
        Iteration limit, an operator or a preconditioner that is not positive definite, stagnation, NaN or infinity.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit; an operator that is not self-adjoint.

    See Also
    --------
    minres : for indefinite operators.
    gmres, bicgstab : for operators that are not self-adjoint.
    lsmr : for least squares.

    Notes
    -----
    The error falls by ``(√κ − 1)/(√κ + 1)`` a step at least, κ the condition of M A. Cost of a step: one product, one
    with M, and 10 n flops. Memory: four vectors, however many steps. When the recurrence has met the tolerance,
    the residual is computed afresh; if it is above ``1.1 rtol``, the iteration starts again from it. A right-hand
    side that is done is frozen bit for bit while the others go on. A zero right-hand side gives exact zeros.

    References
    ----------
    .. [1] M. R. Hestenes and E. Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Nat.
       Bur. Standards 49 (1952), section 3.

    Examples
    --------
    >>> import numpy as np
    >>> x, info = ddnref.krylov.cg(np.asarray([[2.0, 1.0], [1.0, 2.0]]), np.asarray([3.0, 3.0]))
    >>> x, bool(info.converged)
    (array([1., 1.]), True)
    """
    # shaped: XLA fuses a stencil with what follows only where no reshape is between; 0.75 of the time for a Laplacian
    limits = {"rtol": rtol, "maxiter": maxiter, "check_every": check_every}
    system, x0 = prepare(
        "cg", operator, b, x0, preconditioner, limits, callback, while_loop, self_adjoint=True, shaped=True
    )
    return finish("cg", system, rounds(system, x0, _round), throw)


def _round(system: System, start: Round, iterate: Callable[..., Any]) -> Result:
    """Steps from a residual that was computed afresh."""
    z = start.r if system.precondition is None else system.precondition(start.r)
    rz = real_dot(start.r, z, system.axes)
    running = start.status == RUNNING
    status = failure(start.status, running, rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    first = _State(start.x, start.r, own(z), rz, start.size, status, start.n_iter)
    limit = start.size / eps(namespace_of(start.r), start.r.dtype) ** 2  # at most √κ times it, if A is definite

    def active(state: _State) -> Array:
        on = (state.size > system.options.rtol) & (state.size < limit)
        return on & (state.status == RUNNING) & (state.n_iter < system.options.maxiter)

    last = iterate(active, lambda state: _step(system, state, active(state)), first, lambda state: state.size)
    grown = (last.status == RUNNING) & (last.size >= limit) & (last.size < float("inf"))
    return Result(last.x, mark(last.status, grown, NOT_POSITIVE_DEFINITE), last.n_iter)


def _step(system: System, state: _State, go: Array) -> _State:
    """``α = rᴴz / pᴴAp``, ``x ← x + α p``, ``r ← r − α A p``, ``β = rᴴz / old``, ``p ← z + β p``."""
    q = system.apply(state.p)
    pq = real_dot(state.p, q, system.axes)
    status = failure(state.status, go, pq, NOT_POSITIVE_DEFINITE)
    go = go & (status == RUNNING)
    alpha = quotient(state.rz, pq, go)
    x = axpy(state.x, go, alpha, state.p)
    r = axpy(state.r, go, -alpha, q)
    rr = real_dot(r, r, system.axes)
    z, rz = r, rr
    if system.precondition is not None:
        z = system.precondition(r)
        rz = real_dot(r, z, system.axes)
        status = failure(status, go & (rr > 0), rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    p = xpay(z, quotient(rz, state.rz, go), state.p)
    return _State(x, r, p, rz, rr**0.5 / system.norm_b, status, count(go, state.n_iter))
