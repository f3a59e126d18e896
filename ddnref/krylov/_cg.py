"""Conjugate gradients (Hestenes and Stiefel 1952), preconditioned, on the whole space or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, eps, namespace_of, own, quiet
from ddnref._core.loops import LoopOptions, WhileLoop
from ddnref._kernels.public import public
from ddnref._kernels.vectors import axpy, norm, quotient, real_dot, xpay
from ddnref.krylov._rounds import Result, Round, finish, first_round, iterator, rounds
from ddnref.krylov._system import (
    CONVERGED,
    ITERATION_LIMIT,
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
    prepare,
)
from ddnref.operators import LinearOperator


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
        Self-adjoint and positive definite. Self-adjointness is not checked (an operator declares it in
        `LinearOperator.self_adjoint`; both triangles of a matrix are used). A direction of negative curvature is
        reported.
    b : (..., \*range_shape) array
        Right-hand sides. Their leading axes broadcast against the batch axes of the operator.
    x0 : (..., \*domain_shape) array, optional
        Start of the iteration; default zero.
    preconditioner : LinearOperator or callable, optional
        ``r -> M r`` with M ≈ A⁻¹ self-adjoint positive definite, on all right-hand sides at once.
    rtol : float, optional
        For each right-hand side, stop when ``‖b − A x‖ <= rtol * ‖b‖``. The default ``√eps``, 1.5e-8 in double and
        3.5e-4 in single precision, can be reached in spite of rounding up to condition ``1/√eps``.
    maxiter : int, optional
        Largest number of steps for each right-hand side; default ten times the number of unknowns, at least 100, at
        most 20,000.
    check_every : int, optional
        Steps between two evaluations of the stopping rule, each of which reads one flag on the host; default 1 for
        NumPy, 10 for other libraries. The result does not depend on it.
    callback : callable, optional
        Called with ``Progress(step, residual_norm)`` at each evaluation; not together with `while_loop`.
    throw : bool, default True
        Raise if a right-hand side has failed, which reads one more flag. With ``False`` the last iterate is returned
        (NaN where it is not finite) and ``info.status`` says why.
    while_loop : callable, optional
        The library's own loop, such as ``jax.lax.while_loop``, which runs under ``jax.jit`` and reads no flag.

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
    The error falls at least by ``(√κ − 1)/(√κ + 1)`` per step, where κ is the condition of M A. Cost of a step: one
    product, one with M, and 10 n flops. Memory: four vectors for any number of steps. When the residual of the
    recurrence meets the tolerance, the residual is computed afresh; if it is above ``1.1 rtol``, the iteration starts
    again from it. A right-hand side that is done is frozen bit for bit while the others go on. A zero right-hand side
    gives exact zeros.

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
    system = prepare(
        "cg", operator, b, x0=x0, preconditioner=preconditioner, callback=callback, rtol=rtol, maxiter=maxiter,
        check_every=check_every, while_loop=while_loop, throw=throw, self_adjoint=True, shaped=True,
    )  # fmt: skip
    return finish(system, rounds(system, _round))


def solve_from_zero(
    apply: Callable[[Array], Array],
    b: Array,
    options: LoopOptions,
    *,
    precondition: Callable[[Array], Array] | None = None,
    project: Callable[[Array], Array] | None = None,
) -> Result:
    """Run conjugate gradients alone, for callers that have valid arguments and judge the result themselves.

    Nothing is validated, scaled or computed afresh, and nothing raises. Each vector ends with one of the statuses
    CONVERGED, ITERATION_LIMIT, NOT_POSITIVE_DEFINITE, PRECONDITIONER_NOT_POSITIVE_DEFINITE and NOT_FINITE, by the
    residual of the recurrence. A zero vector takes no step. Cost per step: one product, two projections.

    Parameters
    ----------
    apply : callable
        The product with A, from vectors ``(..., n)`` to the same, self-adjoint and positive definite on the range of
        `project`, which it must not leave.
    b : (..., n) array
        Right-hand sides, in the range of `project`.
    options : LoopOptions
        All but ``throw`` are used; ``rtol`` is relative to ``‖b‖``.
    precondition : callable, optional
        The product with a positive definite M ≈ A⁻¹.
    project : callable, optional
        An orthogonal projection. Applied to each residual and each direction, it removes the rounding errors that
        would lead out of its range.
    """
    xp = namespace_of(b)
    with quiet():
        size = norm(b)
        zero, one, batch = size == 0, xp.ones_like(size), tuple(b.shape[:-1])
        status = xp.zeros(batch, dtype=xp.int32, device=array_api_compat.device(b)) + RUNNING
        system = System(
            "cg", apply, apply, precondition, b, xp.where(zero, one, size), None, one, mark(status, zero, CONVERGED),
            batch, tuple(b.shape[-1:]), 1, options, project=project,
        )  # fmt: skip
        last = _round(system, first_round(system), iterator(system))
        status = mark(last.status, (last.status == RUNNING) & (last.size <= options.rtol), CONVERGED)
        return last._replace(status=mark(status, status == RUNNING, ITERATION_LIMIT))


# --- the loop ---------------------------------------------------------------------------------------------------


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


def _round(system: System, start: Round, iterate: Callable[..., Any]) -> Result:
    """Steps from a residual that was computed afresh, until every vector has converged or failed."""
    z = start.r if system.precondition is None else system.precondition(start.r)
    rz = real_dot(start.r, z, system.axes)
    running = start.status == RUNNING
    status = failure(start.status, running, rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    first = _State(start.x, start.r, own(z), rz, start.size, status, start.n_iter)
    limit = start.size / eps(namespace_of(start.r), start.r.dtype) ** 2  # ‖r‖ grows by √κ at most if A is definite

    def active(state: _State) -> Array:
        on = (state.size > system.options.rtol) & (state.size < limit)
        return on & (state.status == RUNNING) & (state.n_iter < system.options.maxiter)

    last = iterate(active, lambda state: _step(system, state, active(state)), first, lambda state: state.size)
    # A residual that has grown beyond any bound shows the same as a direction of negative curvature.
    grown = (last.status == RUNNING) & (last.size >= limit) & (last.size < float("inf"))
    return Result(last.x, mark(last.status, grown, NOT_POSITIVE_DEFINITE), last.n_iter, last.size)


def _step(system: System, state: _State, go: Array) -> _State:
    """``α = rᴴz / pᴴAp``, ``x ← x + α p``, ``r ← r − α A p``, ``β = rᴴz / old``, ``p ← z + β p``."""
    q = system.apply(state.p)
    pq = real_dot(state.p, q, system.axes)
    # Freeze a vector in the step in which A turns out not to be positive definite.
    status = failure(state.status, go, pq, NOT_POSITIVE_DEFINITE)
    go = go & (status == RUNNING)
    alpha = quotient(state.rz, pq, go)
    x = axpy(state.x, go, alpha, state.p)
    r = axpy(state.r, go, -alpha, q)
    if system.project is not None:
        r = namespace_of(r).where(go[..., None], system.project(r), r)
    rr = real_dot(r, r, system.axes)
    z, rz = r, rr
    if system.precondition is not None:
        z = system.precondition(r)
        rz = real_dot(r, z, system.axes)
        status = failure(status, go & (rr > 0), rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    # The new direction is conjugate to all directions before it.
    p = xpay(z, quotient(rz, state.rz, go), state.p)
    p = p if system.project is None else system.project(p)
    return _State(x, r, p, rz, rr**0.5 / system.norm_b, status, count(go, state.n_iter))
