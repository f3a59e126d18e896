"""Restarted GMRES (Saad and Schultz 1986), preconditioned from the right.

A cycle builds an orthonormal basis ``A M Q_j = Q_{j+1} H_j`` of j ≤ m columns and takes the x that makes
``‖β e_1 − H y‖`` smallest. Instead of the Givens rotations their product Ω is kept, so that a step applies all of them
to its column at once. ``Ω H = R`` is triangular, and the norm of the residual is ``β |Ω_{j+1,1}|``.
"""

from __future__ import annotations

import operator as operators
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, Namespace, as_dtype, conj, full, real
from ddnref._core.loops import WhileLoop
from ddnref._kernels.dense import identity, matvec, solve
from ddnref._kernels.public import public
from ddnref._kernels.vectors import axpy, norm, normalised, put_row
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
from ddnref.operators._blocks import inner

RESTART = 30  # longer cycles take fewer steps but more memory, and their last steps cost more


class _State(NamedTuple):
    q: Array
    """The basis as rows, ``(..., m + 1, n)``."""
    rotation: Array
    """Ω, ``(..., m + 1, m + 1)``."""
    triangle: Array
    """R, ``(..., m, m)``; a column of the identity where no step was taken."""
    used: Array
    """Whether a step has filled the column, ``(..., m)``."""
    j: Any
    """The column of the next step: a number, or an array in a traced loop."""
    size: Array
    """``‖r‖ / ‖b‖``, by recurrence."""
    status: Array
    n_iter: Array
    active: Array


@public
def gmres(
    operator: Array | LinearOperator,
    b: Array,
    /,
    *,
    x0: Array | None = None,
    preconditioner: Preconditioner | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    restart: int = RESTART,
    check_every: int | None = None,
    callback: Callback | None = None,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, SolveInfo]:
    r"""Solve ``A x = b`` with any square operator, by restarted GMRES.

    Parameters
    ----------
    operator : LinearOperator or (..., n, n) array, real or complex floating
        Need not be self-adjoint.
    restart : int, default 30
        Steps of a cycle, and vectors held at once; at least 1, at most n. Longer cycles need fewer steps, but more
        memory and more work per step.
    b, x0, preconditioner, rtol, maxiter, check_every, callback, throw, while_loop
        As in `cg`, like the results, but M ≈ A⁻¹ need only be regular. `maxiter` counts steps, not cycles.

    Raises
    ------
    ConvergenceError
        As `cg` apart from definiteness. Stagnation is a cycle that does not reduce the residual.

    Notes
    -----
    The residual never grows and is the smallest that the space of the cycle allows. Cost of step j: one product, one
    with M, ``8 j n`` flops for two passes of Gram–Schmidt. Memory: ``restart + 1`` vectors. Each cycle ends with a
    residual computed afresh, which takes one more product.

    References
    ----------
    .. [1] Y. Saad and M. H. Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
       systems", SIAM J. Sci. Stat. Comput. 7 (1986), algorithm 4.

    Examples
    --------
    >>> import numpy as np
    >>> x, info = ddnref.krylov.gmres(np.asarray([[0.0, 1.0], [-1.0, 0.0]]), np.asarray([1.0, -1.0]))
    >>> np.round(x, 12), bool(info.converged)
    (array([1., 1.]), True)
    """
    system = prepare(
        "gmres", operator, b, x0=x0, preconditioner=preconditioner, callback=callback, rtol=rtol, maxiter=maxiter,
        check_every=check_every, while_loop=while_loop, throw=throw,
    )  # fmt: skip
    cycle = partial(_cycle, min(operators.index(restart), system.b.shape[-1]))
    fall = 1 - system.eps**0.5  # cycles may converge slowly
    return finish(system, rounds(system, cycle, fall=fall, restarts=True))


def _cycle(m: int, system: System, start: Round, iterate: Callable[..., Any]) -> Result:
    """At most m steps from a residual that was computed afresh, then the best x in the space that they span."""
    xp = system.xp
    # The first basis vector is the residual; rows of the basis and columns of R are filled step by step.
    beta = norm(start.r)
    device = array_api_compat.device(start.r)
    rest = full((*system.batch, m, start.r.shape[-1]), 0.0, start.r)
    first = _State(
        q=xp.concat([normalised(start.r, beta)[..., None, :], rest], axis=-2),
        rotation=xp.broadcast_to(identity(m + 1, start.r), (*system.batch, m + 1, m + 1)),
        triangle=xp.broadcast_to(identity(m, start.r), (*system.batch, m, m)),
        used=xp.zeros((*system.batch, m), dtype=xp.bool, device=device),
        j=0 if system.options.while_loop is None else xp.zeros((), dtype=xp.int32, device=device),
        size=start.size,
        status=start.status,
        n_iter=start.n_iter,
        active=active(system, start.size, start.status, start.n_iter),
    )
    last = iterate(partial(_step, system, start.size), first, m)

    # Solve R y = Ω β e_1 and take the step M Q y; columns without a step contribute nothing.
    g = xp.where(last.used, as_dtype(beta, start.r)[..., None] * last.rotation[..., :m, 0], full((), 0.0, start.r))
    y = solve(last.triangle, g[..., None])[..., 0]
    step = (y[..., None, :] @ last.q[..., :m, :])[..., 0, :]
    step = step if system.precondition is None else system.precondition(step)
    go = xp.any(last.used, axis=-1)  # leave x bit for bit as it is where no step was taken
    x = axpy(start.x, go, xp.ones_like(last.size), step)
    return Result(x, last.status, last.n_iter, last.size)


def _step(system: System, start: Array, state: _State) -> _State:
    """One column of H, orthogonalised twice; the rotation that brings its last entry to zero."""
    xp, go = system.xp, state.active
    m, j = state.used.shape[-1], state.j
    i = xp.arange(m + 1, device=array_api_compat.device(state.q))
    # Where j is a number, the basis so far is a slice. In a traced loop it is the whole array, whose other rows are 0.
    q = state.q[..., : j + 1, :] if isinstance(j, int) else state.q
    last = state.q[..., j, :] if isinstance(j, int) else xp.sum(as_dtype(i == j, state.q)[:, None] * state.q, axis=-2)
    w = system.apply(last if system.precondition is None else system.precondition(last))[..., None, :]
    scale = norm(w)[..., 0]

    # Orthogonalise twice: the second pass removes the rounding errors of the first.
    h = inner(w, q)
    w = w - h @ q
    g = inner(w, q)
    w = w - g @ q
    h = (h + g)[..., 0, :]
    below = norm(w)[..., 0]
    below = xp.where(below > 4 * system.eps * scale, below, xp.zeros_like(below))  # the space is invariant
    finite = scale < float("inf")
    status = mark(state.status, go & ~finite, NOT_FINITE)
    go = go & finite

    # All rotations so far on the new column, and the new one, which takes its last entry to zero.
    h = xp.concat([h, full((*h.shape[:-1], m + 1 - h.shape[-1]), 0.0, h)], axis=-1)
    h = matvec(state.rotation, h)
    here, after = i == j, i == j + 1
    a = xp.sum(xp.where(here, h, xp.zeros_like(h)), axis=-1)
    rho = (real(conj(a) * a) + below * below) ** 0.5
    singular = go & (rho <= system.eps * scale)  # a zero column of R
    go, status = go & ~singular, mark(status, singular, BREAKDOWN)
    rotation = _rotated(xp, state.rotation, go, here, after, a, below, rho)

    # Store the column of R; the residual is the last entry of Ω β e_1.
    entries = xp.where(here, as_dtype(rho, h)[..., None], xp.where(i < j, h, xp.zeros_like(h)))[..., :m]
    fill = go[..., None] & here[:m]
    triangle = xp.where(fill[..., None, :], entries[..., None], state.triangle)
    size = start * xp.abs(xp.sum(xp.where(after, rotation[..., 0], xp.zeros_like(h)), axis=-1))
    size = xp.where(go, size, state.size)
    n_iter, go = counted(system, go, size, status, state.n_iter)
    q = put_row(state.q, j + 1, normalised(w, norm(w)))
    return _State(q, rotation, triangle, state.used | fill, j + 1, size, status, n_iter, go)


def _rotated(
    xp: Namespace, rotation: Array, go: Array, here: Array, after: Array, a: Array, below: Array, rho: Array
) -> Array:
    """Rows j and j + 1 of Ω replaced by ``c̄ ω_j + s ω_{j+1}`` and ``−s ω_j + c ω_{j+1}``, ``c = a/ρ``, ``s = β/ρ``."""
    rho = xp.where(go, rho, xp.ones_like(rho))
    c, s = (as_dtype(1 / rho, a) * a)[..., None], as_dtype(below / rho, a)[..., None]
    # Pick the two rows by masks, because j may be traced.
    zero = xp.zeros_like(rotation)
    first = xp.sum(xp.where(here[:, None], rotation, zero), axis=-2)
    second = xp.sum(xp.where(after[:, None], rotation, zero), axis=-2)
    upper, lower = conj(c) * first + s * second, c * second - s * first
    new = xp.where(here[:, None], upper[..., None, :], xp.where(after[:, None], lower[..., None, :], rotation))
    return xp.where(go[..., None, None], new, rotation)
