"""Rounds of iterations, each of which ends with a residual that is computed afresh.

A method updates its residual by recurrence, and rounding lets that drift from ``b − A x``. So a *round* runs the
method until its own residual meets the tolerance; then ``r = b − A x`` is computed. If that is too large but has at
least halved, the next round starts from it (residual replacement). If it has not, x cannot be improved, and the status
says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import array_api_compat

from ddnref._core.arrays import Array, full, nan_where, own, quiet, with_axes
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

Inner = TypeVar("Inner")


class Round(NamedTuple):
    """The state between two rounds."""

    x: Array
    r: Array
    """``b − A x``, computed afresh."""
    size: Array
    """``‖r‖ / ‖b‖``."""
    status: Array
    n_iter: Array


class Result(NamedTuple):
    """The result of a method after one round."""

    x: Array
    status: Array
    """RUNNING where nothing was found wrong."""
    n_iter: Array
    size: Array
    """``‖r‖ / ‖b‖``, by recurrence."""


def first_round(system: System) -> Round:
    """The state at x0, or at zero, where the residual is b."""
    xp = array_api_compat.array_namespace(system.b)
    n_iter = xp.zeros(system.batch, dtype=xp.int32, device=array_api_compat.device(system.b))
    if system.x0 is None:
        shape = system.domain_shape if system.axes > 1 else (math.prod(system.domain_shape),)
        x = full((*system.batch, *shape), 0.0, system.b)
        size = norm(system.b, system.axes) / system.norm_b
        return Round(x, own(system.b), size, system.status, n_iter)
    r = system.b - system.apply(system.x0)
    size = norm(r, system.axes) / system.norm_b
    go = system.status == RUNNING
    status = mark(system.status, go & (size <= system.options.rtol), CONVERGED)
    return Round(own(system.x0), r, size, mark(status, go & ~(size < float("inf")), NOT_FINITE), n_iter)


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
        new = method(system, last, iterate)
        r = system.b - system.apply(new.x)
        size = norm(r, system.axes) / system.norm_b
        return Round(new.x, r, size, _judged(system, last, new, size, fall, restarts), new.n_iter)

    with quiet():
        return run(
            lambda state: state.status == RUNNING, body, first_round(system), maxiter=system.options.maxiter + 1,
            check_every=1, while_loop=system.options.while_loop,
        )  # fmt: skip


def _judged(system: System, last: Round, new: Result, size: Array, fall: float, restarts: bool) -> Array:
    """The status after a round."""
    xp = array_api_compat.array_namespace(size)
    running = last.status == RUNNING
    good = size <= SLACK * system.options.rtol
    finite = size < float("inf")
    helps = size <= fall * last.size
    # A failure that the method reports counts unless x is good enough, or a new start can help.
    failed = (new.status != RUNNING) & ~(helps if restarts else xp.zeros_like(helps))
    limit = new.n_iter >= system.options.maxiter
    status = xp.where(running, xp.where(failed & ~good & finite, new.status, xp.zeros_like(new.status) + RUNNING),
                      last.status)  # fmt: skip
    for bad, code in ((good, CONVERGED), (~finite, NOT_FINITE), (limit, ITERATION_LIMIT), (~helps, STAGNATION)):
        status = mark(status, (status == RUNNING) & bad, code)
    return status


def iterator(system: System) -> Callable[..., Any]:
    """A function ``iterate(active, body, state, relative)``: `run` with the options of the system.

    The callback is given ``relative(state)``, and the steps of all rounds so far.
    """
    options, callback = system.options, system.callback
    seen = [0, 0]  # steps before this round, and in it

    def iterate(
        active: Callable[[Inner], Array],
        body: Callable[[Inner], Inner],
        state: Inner,
        relative: Callable[[Inner], Array],
        maxiter: int | None = None,
    ) -> Inner:
        def watched(state: Inner) -> Array:
            if callback is not None:
                callback(Progress(seen[0] + seen[1], relative(state)))
            return active(state)

        def counted(state: Inner) -> Inner:
            seen[1] += 1
            return body(state)

        seen[:] = [sum(seen), 0]
        plain = callback is None
        return run(
            active if plain else watched, body if plain else counted, state,
            maxiter=options.maxiter if maxiter is None else maxiter, check_every=options.check_every,
            while_loop=options.while_loop,
        )  # fmt: skip

    return iterate


def finish(system: System, last: Round) -> tuple[Array, SolveInfo]:
    """The solution in its own shape and scale, and how it ended; raises if the options say so."""
    with quiet():
        bad = last.status == NOT_FINITE
        info = SolveInfo(last.status == CONVERGED, last.n_iter, nan_where(bad, last.size), last.status)
    return unscaled(system, last.x, bad, info), info


def unscaled(system: System, x: Array, bad: Array, info: Any) -> Array:
    """The solution in its own shape and scale, NaN where `bad`; raises for failures in `info` if the options say so."""
    with quiet():
        x = nan_where(with_axes(bad, system.axes), column(system.scale, x) * x)
    if system.options.throw:
        raise_if_failed(system.function, info, system.options)
    return array_api_compat.array_namespace(x).reshape(x, (*system.batch, *system.domain_shape))
