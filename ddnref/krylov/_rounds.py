"""Rounds that end with a residual computed afresh.

A method updates its residual by recurrence, and rounding lets that drift from ``b − A x``. So a *round* runs the
method until its own residual meets the tolerance; then ``r = b − A x`` is computed. If that is not good enough and
has fallen by half at least, the next round starts from it (residual replacement); if it has not, x is as good as
it gets, and the status says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import array_api_compat

from ddnref._core.arrays import Array, full, nan_where, own, quiet, with_axes
from ddnref._core.loops import run
from ddnref._kernels.vectors import column, norm
from ddnref.krylov._common import (
    CONVERGED,
    ITERATION_LIMIT,
    NOT_FINITE,
    RUNNING,
    SLACK,
    STAGNATION,
    Options,
    Progress,
    SolveInfo,
    System,
    mark,
    raise_if_failed,
)

FALL = 0.5  # what a round must leave of the residual to be followed by another

Inner = TypeVar("Inner")


class Round(NamedTuple):
    """Between two rounds."""

    x: Array
    r: Array
    """``b − A x``, computed afresh."""
    size: Array
    """``‖r‖ / ‖b‖``."""
    status: Array
    n_iter: Array


class Result(NamedTuple):
    """What a method hands back after a round."""

    x: Array
    status: Array
    """RUNNING where nothing was found wrong."""
    n_iter: Array


def first_round(system: System, x0: Array | None) -> Round:
    """At x0, or at zero, where the residual is b."""
    xp = array_api_compat.array_namespace(system.b)
    zeros = xp.zeros(system.batch, dtype=xp.int32, device=array_api_compat.device(system.b))
    if x0 is None:
        shape = system.domain_shape if system.axes > 1 else (math.prod(system.domain_shape),)
        x = full((*system.batch, *shape), 0.0, system.b)
        size = norm(system.b, system.axes) / system.norm_b
        return Round(x, own(system.b), size, system.status, zeros)
    r = system.b - system.apply(x0)
    size = norm(r, system.axes) / system.norm_b
    go = system.status == RUNNING
    status = mark(system.status, go & (size <= system.options.rtol), CONVERGED)
    return Round(own(x0), r, size, mark(status, go & ~(size < float("inf")), NOT_FINITE), zeros)


def rounds(
    system: System,
    x0: Array | None,
    method: Callable[[System, Round, Callable[..., Any]], Result],
    *,
    fall: float = FALL,
    restarts: bool = False,
) -> Round:
    """Repeat `method` until every recomputed residual meets the tolerance or cannot fall.

    A method that fails where a new start can help (`restarts`) gets one, as long as the residual falls.
    """
    iterate = iterator(system.options)

    def body(last: Round) -> Round:
        new = method(system, last, iterate)
        r = system.b - system.apply(new.x)
        size = norm(r, system.axes) / system.norm_b
        return Round(new.x, r, size, judged(system, last, new, size, fall, restarts), new.n_iter)

    def active(state: Round) -> Array:
        return state.status == RUNNING

    with quiet():
        first = first_round(system, x0)
        limit = system.options.maxiter + 1
        return run(active, body, first, maxiter=limit, check_every=1, while_loop=system.options.while_loop)


def judged(system: System, last: Round, new: Result, size: Array, fall: float, restarts: bool) -> Array:
    """The status after a round."""
    xp = array_api_compat.array_namespace(size)
    running = last.status == RUNNING
    good = size <= SLACK * system.options.rtol
    finite = size < float("inf")
    helps = size <= fall * last.size
    failed = (new.status != RUNNING) & ~(helps if restarts else xp.zeros_like(helps))
    limit = new.n_iter >= system.options.maxiter
    status = xp.where(running, xp.where(failed & ~good & finite, new.status, xp.zeros_like(new.status) + RUNNING),
                      last.status)  # fmt: skip
    for bad, code in ((good, CONVERGED), (~finite, NOT_FINITE), (limit, ITERATION_LIMIT), (~helps, STAGNATION)):
        status = mark(status, (status == RUNNING) & bad, code)
    return status


def iterator(options: Options) -> Callable[..., Any]:
    """``iterate(active, body, state, relative)``: `run` with the options given; the callback sees ``relative``."""
    seen = [0, 0]  # steps before this round, and in it

    def iterate(
        active: Callable[[Inner], Array],
        body: Callable[[Inner], Inner],
        state: Inner,
        relative: Callable[[Inner], Array],
        maxiter: int | None = None,
    ) -> Inner:
        def watched(state: Inner) -> Array:
            if options.callback is not None:
                options.callback(Progress(seen[0] + seen[1], relative(state)))
            return active(state)

        def counted(state: Inner) -> Inner:
            seen[1] += 1
            return body(state)

        seen[:] = [sum(seen), 0]
        plain = options.callback is None
        limit = options.maxiter if maxiter is None else maxiter
        return run(
            active if plain else watched, body if plain else counted, state,
            maxiter=limit, check_every=options.check_every, while_loop=options.while_loop,
        )  # fmt: skip

    return iterate


def finish(function: str, system: System, last: Round, throw: bool) -> tuple[Array, SolveInfo]:
    """The solution in its shape and scale, and how it ended; raises where asked to."""
    xp = array_api_compat.array_namespace(last.x)
    with quiet():
        bad = last.status == NOT_FINITE
        info = SolveInfo(last.status == CONVERGED, last.n_iter, nan_where(bad, last.size), last.status)
        x = nan_where(with_axes(bad, system.axes), column(system.scale, last.x) * last.x)
    if throw:
        raise_if_failed(function, info, system.options)
    return xp.reshape(x, (*system.batch, *system.domain_shape)), info
