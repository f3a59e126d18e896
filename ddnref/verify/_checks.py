"""The checks of ``ddnref verify``: each measures one error of a rule and returns it with its tolerance.

Double precision is compared with finite differences. Single precision is compared with double precision on identical
inputs, because finite differences in float32 have no correct digits. The structural identities are checked in both.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np

from ddnref import testing
from ddnref._rules.binding import options_of, plain_vjp
from ddnref._rules.contract import Rule
from ddnref._rules.table import TRIALS
from ddnref.testing._vjp import RTOL
from ddnref.verify import _forward as forward
from ddnref.verify._backends import Backend
from ddnref.verify._hard import HARD, OF_TORCH, Hard, measure
from ddnref.verify._problem import (
    DOUBLE,
    SINGLE,
    Case,
    Measured,
    Outcome,
    Problem,
    accepting,
    batch_error,
    largest,
    pose,
    relative,
)

COMPLEX = ("complex128", "complex64")
SIZES = (1, 2, 5, 16)
BATCHES: tuple[tuple[int, ...], ...] = ((), (3,), (2, 2))

HARD_SIZE = 5  # the one for which hard problems are drawn, whose own sizes are random
HARD_PROBLEMS, FEW_HARD_PROBLEMS = 10, 1  # other libraries, of which some compile each size, have to run, no more

# Other libraries run the same code as NumPy. Each call takes ten times as long there, or is compiled first.
FEW_SIZES = (1, 5)
FEW_BATCHES: tuple[tuple[int, ...], ...] = ((), (2, 2))


def cases(backend: Backend, rule: Rule, dtypes: tuple[str, ...]) -> list[Case]:
    """List the cases in which a rule is checked."""
    sizes, batches = (SIZES, BATCHES) if backend.name == "numpy" else (FEW_SIZES, FEW_BATCHES)
    shapes = [(m, batch) for m in sizes for batch in batches]
    if backend.compiles:  # every shape takes seconds
        shapes = [(m, batch) for m, batch in shapes if m > 1 or not batch]
    taken = [dtype for dtype in dtypes if TRIALS[rule.name].is_complex or dtype not in COMPLEX]
    return [Case(rule, dtype, m, batch) for dtype in taken for m, batch in shapes]


def run_case(backend: Backend, case: Case, seed: int) -> list[Outcome]:
    """Run every check that applies. An exception counts as an infinite error, with its message as the note."""
    try:
        problem = pose(backend, case, seed)
    except Exception as error:  # noqa: BLE001 - a rule that crashes is a rule that failed
        return [Outcome("forward", case, math.inf, 0.0, f"{type(error).__name__}: {error}")]
    outcomes = []
    for name, check in CHECKS.items():
        try:
            measured = check(problem)
        except Exception as error:  # noqa: BLE001 - as above
            outcomes.append(Outcome(name, case, math.inf, 0.0, f"{type(error).__name__}: {error}"))
        else:
            outcomes += [] if measured is None else [Outcome(name, case, *measured)]
    return outcomes


# --- the checks ---------------------------------------------------------------------------------------------------


def finite_differences(p: Problem) -> Measured | None:
    """Compare with Richardson-extrapolated central differences (double precision only)."""
    if p.case.dtype not in DOUBLE.values():
        return None
    rule = p.case.rule
    trial = TRIALS[rule.name]
    report = testing.check_vjp(
        p.forward, p.vjp, *p.sample.inputs, saves=True, needs=rule.needs, loss=p.sample.loss,
        tangent=trial.tangent, symmetrises=trial.symmetrises, gap=p.sample.gap, rtol=RTOL, seed=p.seed,
    )  # fmt: skip
    return report.error, RTOL


def against_double(p: Problem) -> Measured | None:
    """Compare with the same VJP in double precision on the same numbers (single precision only)."""
    if p.case.dtype not in SINGLE.values():
        return None

    # Run the VJP in both precisions on identical numbers.
    options = {**p.sample.options, **accepting(p.case.rule, p.case.rule.vjp)}
    _, options = options_of(p.case.rule, options, p.backend.while_loop)
    exact = p.backend.bound(plain_vjp(p.case.rule), **options)(*map(p.double, (*p.bars, *p.kept)))
    single = p.pull(p.bars)
    # A cotangent of another dtype is an error, however accurate it is.
    for x, x_bar in zip(p.sample.inputs, single, strict=True):
        if x.dtype != x_bar.dtype:
            raise TypeError(f"the cotangent of a {x.dtype} input has dtype {x_bar.dtype}")
    tolerance = 20 * float(np.finfo(p.case.dtype).eps) * p.sample.condition
    return relative(p.numbers(single), p.numbers(exact)), tolerance


def linear(p: Problem) -> Measured:
    """Check that the VJP is linear in the cotangents."""
    a, b = 2.0, -3.0
    mixed = tuple(a * u + b * t for u, t in zip(p.bars, p.other_bars, strict=True))
    u, t = p.numbers(p.pull(p.bars)), p.numbers(p.pull(p.other_bars))
    # Relative to the terms, because their sum may cancel.
    size = np.linalg.norm(a * u) + np.linalg.norm(b * t)
    return float(np.linalg.norm(p.numbers(p.pull(mixed)) - (a * u + b * t)) / (size or 1.0)), p.rounding


def zero_cotangent(p: Problem) -> Measured:
    """Check that zero cotangents give exactly zero."""
    return largest(p.numbers(p.pull(tuple(0.0 * u for u in p.bars)))), 0.0


def batch_is_loop(p: Problem) -> Measured | None:
    """Compare a batch with a loop over its items."""
    if not p.case.batch:
        return None
    return batch_error(p, p.vjp, (*p.bars, *p.kept)), p.rounding


def hermitian(p: Problem) -> Measured | None:
    """Check that the cotangent is exactly Hermitian, which symmetric directional derivatives cannot see."""
    if TRIALS[p.case.rule.name].tangent != "symmetric":
        return None
    parts = [p.backend.to_numpy(x_bar) for x_bar in p.pull(p.bars)]
    return max(largest(x_bar - np.conj(np.swapaxes(x_bar, -1, -2))) for x_bar in parts), 0.0


def compiled(p: Problem) -> Measured | None:
    """Compare with the VJP run step by step, if the backend compiles. The other checks run compiled functions."""
    # One shape is enough: each step is compiled separately, which takes seconds.
    if not p.backend.compiles or p.case.m == 1 or not p.case.batch:
        return None
    _, options = options_of(p.case.rule, p.sample.options, p.backend.while_loop)
    # Without `bind`, nothing is compiled as a whole.
    eager = p.backend.held(partial(plain_vjp(p.case.rule), **options))(*p.bars, *p.kept)
    return relative(p.numbers(p.pull(p.bars)), p.numbers(eager)), p.rounding


def hard(kind: str, p: Problem) -> Measured | None:
    """Return the worst of some hard problems of a kind, in one case per rule and dtype."""
    make, names = HARD[kind]
    if p.case.rule.name not in names or p.case.batch or p.case.m != HARD_SIZE:
        return None
    if kind in OF_TORCH and p.backend.name != "torch":
        return None
    rng = np.random.default_rng([p.seed, zlib.crc32(f"{kind} {p.case.rule.name} {p.case}".encode())])
    few = HARD_PROBLEMS if p.backend.name == "numpy" else FEW_HARD_PROBLEMS
    problems = (make(p.case.rule, rng, np.dtype(p.case.dtype)) for _ in range(few))
    measured = (_measured_hard(problem, p.backend) for problem in problems)
    return max(measured, key=lambda found: math.inf if not found[0] <= found[1] else found[0] / (found[1] or 1.0))


def _measured_hard(problem: Hard, backend: Backend) -> Measured:
    return measure(problem, backend.convert, backend.to_numpy)


CHECKS: dict[str, Callable[[Problem], Measured | None]] = {
    "finite differences": finite_differences,
    "single against double": against_double,
    "linear in the cotangent": linear,
    "zero cotangent": zero_cotangent,
    "batch equals loop": batch_is_loop,
    "exactly Hermitian": hermitian,
    "compiled (jit)": compiled,
    **forward.CHECKS,
    **{kind: partial(hard, kind) for kind in HARD},
}
