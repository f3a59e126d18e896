"""Rounds of iterations, each of which ends with a residual that is computed afresh.

A method updates its residual by recurrence, and rounding lets that drift from ``b − A x``. So a *round* runs the
method until its own residual meets the tolerance; then ``r = b − A x`` is computed. If that is too large but has at
least halved, the next round starts from it (residual replacement). If it has not, x cannot be improved, and the status
says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from ddnref._core.arrays import Array, full, nan_where, own, with_axes
from ddnref._core.loops import run
from ddnref._kernels.vectors import column, norm
from ddnref.krylov._system import (
    CONVERGED,
    ITERATION_LIMIT,
    NOT_FINITE,
    RUNNING,
    SLACK,
    STAGNATION,
    Progress,
    SolveInfo,
    System,
    mark,
    raise_if_failed,
)

FALL = 0.5  # a round that leaves more than this part of the residual is the last

Inner = TypeVar("Inner", bound=Any)


class Round(NamedTuple):
    """The state between two rounds."""

    x: Array
    r: Array
    """``b − A x``, computed afresh."""
    size: Array
    """``‖r‖ / ‖b‖``."""
    status: Array
    n_iter: Array
    condition: Array
    """An estimate of the condition number; 0 before there is one."""


class Result(NamedTuple):
    """The result of a method after one round."""

    x: Array
    status: Array
    """RUNNING where nothing was found wrong."""
    n_iter: Array
    size: Array
    """``‖r‖ / ‖b‖``, by recurrence."""
    condition: Array | None = None
    """An estimate of the condition number, from methods that make one."""


def first_round(system: System) -> Round:
    """The state at x0, or at zero, where the residual is b."""
    # From zero no product is needed.
    if system.x0 is None:
        shape = system.domain_shape if system.axes > 1 else (math.prod(system.domain_shape),)
        x, r = full((*system.batch, *shape), 0.0, system.b), own(system.b)
    else:
        x, r = own(system.x0), system.b - system.apply(system.x0)
    size = norm(r, system.axes) / system.norm_b
    # A start that meets the tolerance is returned as it is.
    status = mark(system.status, (system.status == RUNNING) & (size <= system.options.rtol), CONVERGED)
    status = mark(status, (status == RUNNING) & ~(size < float("inf")), NOT_FINITE)
    return Round(x, r, size, status, system.xp.zeros_like(status), system.xp.zeros_like(size))


def rounds(
    system: System,
    method: Callable[[System, Round, Callable[..., Any]], Result],
    *,
    fall: float = FALL,
    restarts: bool = False,
) -> Round:
    """Repeat `method` until every recomputed residual meets the tolerance or cannot fall.

    With `restarts` a method that has failed gets a new start, as long as the residual falls.
    """
    iterate = iterator(system)

    def body(last: Round) -> Round:
        # Iterate by recurrence, then judge x by its true residual.
        new = method(system, last, iterate)
        r = system.b - system.apply(new.x)
        size = norm(r, system.axes) / system.norm_b
        helps = size <= fall * last.size
        # A failure that the method reports counts unless x is good enough, or a new start can help.
        good = size <= SLACK * system.options.rtol
        finite = size < float("inf")
        failed = (last.status == RUNNING) & (new.status != RUNNING) & ~good & finite
        status = system.xp.where(failed & ~helps if restarts else failed, new.status, last.status)
        status = decided(system, status, new.n_iter, good, finite, helps)
        known = last.condition if new.condition is None else system.xp.maximum(last.condition, new.condition)
        return Round(new.x, r, size, status, new.n_iter, known)

    return run(
        lambda state: state.status == RUNNING, body, first_round(system), maxiter=system.options.maxiter + 1,
        check_every=1, while_loop=system.options.while_loop,
    )  # fmt: skip


def decided(system: System, status: Array, n_iter: Array, good: Array, finite: Array, helps: Array) -> Array:
    """The status after a round: `good` x have converged, and another round may only follow where this one `helps`."""
    limit = n_iter >= system.options.maxiter
    # The first of these that holds decides.
    for bad, code in ((good, CONVERGED), (~finite, NOT_FINITE), (limit, ITERATION_LIMIT), (~helps, STAGNATION)):
        status = mark(status, (status == RUNNING) & bad, code)
    return status


def iterator(system: System) -> Callable[..., Any]:
    """A function ``iterate(step, state)`` that repeats ``state = step(state)`` while any of ``state.active`` is set.

    The callback is given ``state.size``, and the steps of all rounds so far.
    """
    options, callback = system.options, system.callback
    steps = 0

    def iterate(step: Callable[[Inner], Inner], state: Inner, maxiter: int = options.maxiter) -> Inner:
        def watched(state: Inner) -> Array:
            if callback is not None:
                callback(Progress(steps, state.size))
            return state.active

        def counted(state: Inner) -> Inner:
            nonlocal steps
            steps += 1
            return step(state)

        plain = callback is None  # then nothing has to be counted
        return run(
            attrgetter("active") if plain else watched, step if plain else counted, state, maxiter=maxiter,
            check_every=options.check_every, while_loop=options.while_loop,
        )  # fmt: skip

    return iterate


def finish(system: System, last: Round) -> tuple[Array, SolveInfo]:
    """The solution in its own shape and scale, and how it ended; raises if the options say so."""
    # Where a NaN or infinity was met, neither x nor its residual says anything.
    size = nan_where(last.status == NOT_FINITE, last.size)
    unknown = full(tuple(size.shape), float("inf"), size)
    condition = system.xp.where(last.condition > 0, last.condition, unknown)
    info = SolveInfo(last.status == CONVERGED, last.n_iter, size, last.status, unknown, condition)
    if system.options.throw:
        raise_if_failed(system.function, info, system.options)
    return solution(system, last.x, last.status), info


def solution(system: System, x: Array, status: Array) -> Array:
    """An iterate in its own shape and scale; NaN where it is not finite."""
    factor = system.scale if system.size_a is None else system.scale / system.size_a
    x = column(factor, x) * x
    x = nan_where(with_axes(status == NOT_FINITE, system.axes), x)
    return system.xp.reshape(x, (*system.batch, *system.domain_shape))
