"""Conjugate gradients (Hestenes and Stiefel 1952), preconditioned, on the whole space or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, eps, namespace_of, own, quiet
from ddnref._core.loops import LoopOptions, WhileLoop
from ddnref._kernels.public import public
from ddnref._kernels.vectors import axpy, norm, on_host, quotient, real_dot, xpay
from ddnref.krylov._pivots import grid, next_pivot
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
    active,
    counted,
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
    estimate_condition: bool = False,
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
    estimate_condition : bool, default False
        Estimate the condition number of M A from the coefficients of the iteration, at about 15 operations with 27
        numbers per step: some 10 % of the time for 32×32 points, nothing for many more.
    throw : bool, default True
        Raise if a right-hand side has failed, which reads one more flag. With ``False`` the last iterate is returned
        (NaN where it is not finite) and ``info.status`` says why.
    while_loop : callable, optional
        The library's own loop, such as ``jax.lax.while_loop``, which runs under ``jax.jit`` and reads no flag.

    Returns
    -------
    x : (..., \*domain_shape) array
    info : SolveInfo
        ``converged``, ``n_iter``, ``residual_norm`` (recomputed from x, relative), ``status`` and ``condition``, each
        ``(...)``. The condition number is that of M A, as far as the iteration has met its eigenvalues: a lower bound,
        up to a factor of two; infinity if it was not asked for. ``error`` is always infinite; see `linear_solve`.

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
    # shaped: vectors on a grid may keep their shape, where the library is faster with it
    system = prepare(
        "cg", operator, b, x0=x0, preconditioner=preconditioner, callback=callback, rtol=rtol, maxiter=maxiter,
        check_every=check_every, while_loop=while_loop, throw=throw, self_adjoint=True, shaped=True, squares=False,
    )  # fmt: skip
    return finish(system, rounds(system._replace(ritz=estimate_condition), _round))


def solve_from_zero(
    apply: Callable[[Array], Array],
    b: Array,
    options: LoopOptions,
    *,
    precondition: Callable[[Array], Array] | None = None,
    project: Callable[[Array], Array] | None = None,
    metric: Callable[[Array], Array] | None = None,
) -> Result:
    """Run conjugate gradients alone, for callers that have valid arguments and judge the result themselves.

    The functions map vectors ``(..., n)`` to the same. The orthogonal projection `project` is applied to each residual
    and each direction, to remove rounding errors that would lead out of its range; b lies in that range, which `apply`
    must not leave and on which it must be self-adjoint and positive definite. In the inner product ``⟨x, B y⟩`` of a
    `metric` B, everything is meant in that. All options but ``throw`` are used.

    Nothing is validated, scaled or computed afresh, and nothing raises. Each vector ends with one of the statuses
    CONVERGED, ITERATION_LIMIT, NOT_POSITIVE_DEFINITE, PRECONDITIONER_NOT_POSITIVE_DEFINITE and NOT_FINITE, by the
    residual of the recurrence. A zero vector takes no step. Cost per step: one product, two projections.
    """
    xp = namespace_of(b)
    with quiet():
        size = norm(b) if metric is None else real_dot(b, metric(b)) ** 0.5
        zero, one, batch = size == 0, xp.ones_like(size), tuple(b.shape[:-1])
        # A zero right-hand side has converged, and its norm must not divide.
        status = xp.zeros(batch, dtype=xp.int32, device=array_api_compat.device(b)) + RUNNING
        system = System(
            "cg", xp, eps(xp, b.dtype), apply, apply, precondition, b, xp.where(zero, one, size), None, one, None,
            mark(status, zero, CONVERGED), batch, tuple(b.shape[-1:]), 1, options, on_host(b), project=project,
            metric=metric,
        )  # fmt: skip
        # One round, judged by the residual of the recurrence
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
    active: Array
    ritz: Any
    """`_Ritz`, or ``None``."""


class _Ritz(NamedTuple):
    """Pivots that show the eigenvalues of M A, of the Lanczos matrix with ``q = 1 / α`` and ``θ² = β / α``."""

    shifts: Array
    """Relative to the first Rayleigh quotient, which no smallest eigenvalue exceeds."""
    anchor: Array
    """The first q, a Rayleigh quotient, to which the shifts are relative; 0 before."""
    e: Array
    """The last θ²."""
    slack: Array
    below: Array
    """Whether an eigenvalue is below each shift."""
    largest: Array
    """The largest entry on the diagonal."""


def _round(system: System, start: Round, iterate: Callable[..., Any]) -> Result:
    """Steps from a residual that was computed afresh, until every vector has converged or failed."""
    z = start.r if system.precondition is None else system.precondition(start.r)
    rz = _dot(system, start.r, z)
    status = failure(system, start.status, start.status == RUNNING, rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    go = active(system, start.size, status, start.n_iter)
    limit = start.size / system.eps**2  # ‖r‖ grows by √κ at most if A is definite
    ritz = None
    if system.ritz:
        zero = system.xp.zeros_like(rz)
        shifts = grid(system.xp, 1.0, system.eps, 4.0, rz)
        slack = zero[..., None] + 0 * shifts
        ritz = _Ritz(shifts, zero, zero, slack, slack > 0, zero)
    first = _State(start.x, start.r, own(z), rz, start.size, status, start.n_iter, go, ritz)
    last = iterate(partial(_step, system, limit), first)
    # A residual that has grown beyond any bound shows the same as a direction of negative curvature.
    grown = (last.status == RUNNING) & (last.size >= limit) & (last.size < float("inf"))
    status = mark(last.status, grown, NOT_POSITIVE_DEFINITE)
    condition = None if last.ritz is None else _condition(system, last.ritz)
    return Result(last.x, status, last.n_iter, last.size, condition)


def _step(system: System, limit: Array, state: _State) -> _State:
    """``α = rᴴz / pᴴAp``, ``x ← x + α p``, ``r ← r − α A p``, ``β = rᴴz / old``, ``p ← z + β p``."""
    q = system.apply(state.p)
    pq = _dot(system, state.p, q)
    # Freeze a vector in the step in which A turns out not to be positive definite.
    status = failure(system, state.status, state.active, pq, NOT_POSITIVE_DEFINITE)
    go = state.active & (status == RUNNING)
    # Step to the minimum along p.
    alpha = quotient(state.rz, pq, go)
    x = axpy(state.x, go, alpha, state.p)
    r = axpy(state.r, go, -alpha, q)
    if system.project is not None:
        r = system.xp.where(go[..., None], system.project(r), r)
    # Precondition the residual.
    rr = _dot(system, r, r)
    z, rz = r, rr
    if system.precondition is not None:
        z = system.precondition(r)
        rz = _dot(system, r, z)
        status = failure(system, status, go & (rr > 0), rz, PRECONDITIONER_NOT_POSITIVE_DEFINITE)
    # The new direction is conjugate to all directions before it.
    beta = quotient(rz, state.rz, go)
    ritz = None if state.ritz is None else _with_step(system, state.ritz, go, quotient(pq, state.rz, go), beta)
    p = xpay(z, beta, state.p)
    p = p if system.project is None else system.project(p)
    size = rr**0.5 / system.norm_b
    n_iter, go = counted(system, go, size, status, state.n_iter)
    return _State(x, r, p, rz, size, status, n_iter, go & (size < limit), ritz)


def _dot(system: System, y: Array, z: Array) -> Array:
    """``Re ⟨y, z⟩`` in the inner product of the system."""
    return real_dot(y, z if system.metric is None else system.metric(z), system.axes)


def _with_step(system: System, ritz: _Ritz, go: Array, q: Array, beta: Array) -> _Ritz:
    """One more row and column of the Lanczos matrix, where `go` is set."""
    xp = system.xp
    anchor = xp.where(ritz.anchor > 0, ritz.anchor, q)
    diagonal = q + ritz.e
    q = quotient(q, anchor, go)
    slack, negative = next_pivot(xp, system.eps, ritz.shifts, ritz.slack, q, quotient(ritz.e, anchor, go))
    each = go[..., None]
    return _Ritz(
        ritz.shifts, xp.where(go, anchor, ritz.anchor), xp.where(go, beta * q * anchor, ritz.e),
        xp.where(each, slack, ritz.slack), ritz.below | (each & negative),
        xp.where(go, xp.maximum(ritz.largest, diagonal), ritz.largest),
    )  # fmt: skip


def _condition(system: System, ritz: _Ritz) -> Array:
    """The quotient of the extreme Ritz values, the smaller one taken from the middle of its gap; 0 at first."""
    xp, shifts = system.xp, ritz.shifts
    free = xp.max(xp.where(ritz.below, 0 * shifts, shifts), axis=-1)
    smallest = xp.where(free < 1, 2 * xp.where(free > 0, free, system.eps / 4 + 0 * free), free)
    smallest = smallest * ritz.anchor
    return quotient(ritz.largest, smallest, smallest > 0)
