"""The checks of ``ddnref verify`` for the JVP of a rule.

The transpose identity holds to rounding and needs no step. Finite differences find an error that both modes share. A
library that compiles runs the checks in one case per rule and dtype, because each compilation takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddnref import testing
from ddnref._core.arrays import Array
from ddnref._rules.binding import jvp_options_of, plain_jvp
from ddnref._rules.table import TRIALS
from ddnref.verify._problem import (
    DOUBLE,
    SINGLE,
    Measured,
    Problem,
    accepting,
    batch_error,
    largest,
    relative,
)

RTOL = 1e-9  # of finite differences
TRANSPOSE = 4500  # times eps: 1e-12 in double precision
DIRECTIONS, DIRECTIONS_OF_A_LOSS = 1, 2  # a loss sees one number per direction, instead of all entries of a tangent


def transposed(p: Problem) -> Measured:
    """Check that JVP and VJP are transposes of each other."""
    # Real parts of both inner products, relative to the norms of cotangent and tangent.
    bars, dots = p.numbers(p.bars), p.numbers(p.push(p.dots))
    error = abs(_real_dot(bars, dots) - _real_dot(p.numbers(p.pull(p.bars)), p.numbers(p.dots)))
    size = float(np.linalg.norm(bars) * np.linalg.norm(dots))
    # Iterative solves stop at a small residual. Direct ones are exact transposes up to rounding.
    amplification = 1.0 if p.case.rule.direct else p.amplification
    return error / (size or 1.0), TRANSPOSE * amplification * p.eps


def finite_differences(p: Problem) -> Measured | None:
    """Compare with Richardson-extrapolated central differences (double precision only)."""
    if p.case.dtype not in DOUBLE.values() or p.jvp is None:
        return None
    trial = TRIALS[p.case.rule.name]
    directions = DIRECTIONS if p.sample.loss is None else DIRECTIONS_OF_A_LOSS
    report = testing.check_jvp(
        p.forward, p.jvp, *p.sample.inputs, saves=True, needs=p.case.rule.needs, loss=p.sample.loss,
        tangent=trial.tangent, symmetrises=trial.symmetrises, gap=p.sample.gap, directions=directions, seed=p.seed,
    )  # fmt: skip
    return report.error, RTOL


def against_double(p: Problem) -> Measured | None:
    """Compare with the same JVP in double precision on the same numbers (single precision only)."""
    rule = p.case.rule
    if p.case.dtype not in SINGLE.values():
        return None
    options = jvp_options_of(rule, {**p.sample.options, **accepting(rule, rule.jvp)}, p.backend.while_loop)
    exact = p.backend.bound(plain_jvp(rule), **options)(*map(p.double, (*p.dots, *p.kept)))
    single = p.push(p.dots)
    # A tangent of another dtype is an error, however accurate it is.
    for y, y_dot in zip(p.outputs, single, strict=True):
        if y.dtype != y_dot.dtype:
            raise TypeError(f"the tangent of a {y.dtype} output has dtype {y_dot.dtype}")
    tolerance = 20 * p.eps * p.sample.condition
    return relative(p.numbers(single), p.numbers(exact)), tolerance


def zero_tangent(p: Problem) -> Measured:
    """Check that zero tangents give exactly zero."""
    return largest(p.numbers(p.push(tuple(0.0 * d for d in p.dots)))), 0.0


def batch_is_loop(p: Problem) -> Measured | None:
    """Compare a batch with a loop over its items."""
    if not p.case.batch or p.jvp is None:
        return None
    return batch_error(p, p.jvp, (*p.dots, *p.kept)), p.rounding


def none_is_zeros(p: Problem) -> Measured | None:
    """Compare ``None`` with a tangent of zeros, for each input that moves alone."""
    if len(p.dots) == 1:
        return None
    errors = []
    for i, dot in enumerate(p.dots):
        alone: list[Array | None] = [None] * len(p.dots)
        alone[i] = dot
        zeros = tuple(d if j == i else 0.0 * d for j, d in enumerate(p.dots))
        errors.append(relative(p.numbers(p.push(tuple(alone))), p.numbers(p.push(zeros))))
    # NumPy's maximum keeps a NaN.
    return float(np.max(errors)), p.rounding


def compiled(p: Problem) -> Measured | None:
    """Compare with the JVP run step by step, if the backend compiles."""
    if not p.backend.compiles:
        return None
    options = jvp_options_of(p.case.rule, p.sample.options, p.backend.while_loop)
    eager = p.backend.held(partial(plain_jvp(p.case.rule), **options))(*p.dots, *p.kept)
    return relative(p.numbers(p.push(p.dots)), p.numbers(eager)), p.rounding


def _where_it_applies(check: Callable[[Problem], Measured | None]) -> Callable[[Problem], Measured | None]:
    """Run a check only for a rule that has a JVP, and few cases where each is compiled."""

    def chosen(p: Problem) -> Measured | None:
        compiles_too_much = p.backend.compiles and (p.case.m == 1 or not p.case.batch)
        return None if p.jvp is None or compiles_too_much else check(p)

    return chosen


CHECKS: dict[str, Callable[[Problem], Measured | None]] = {
    name: _where_it_applies(check)
    for name, check in {
        "jvp: transpose of vjp": transposed,
        "jvp: finite differences": finite_differences,
        "jvp: single and double": against_double,
        "jvp: zero tangent": zero_tangent,
        "jvp: batch and loop": batch_is_loop,
        "jvp: None and zeros": none_is_zeros,
        "jvp: compiled (jit)": compiled,
    }.items()
}


def _real_dot(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.real(np.vdot(a, b)))
