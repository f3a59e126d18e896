"""The checks of ``ddnref verify``: each measures one error of a rule and returns it with its tolerance.

Double precision is compared with finite differences. Single precision is compared with double precision on identical
inputs, because finite differences in float32 have no correct digits. The structural identities are checked in both.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddnref import testing
from ddnref._core.arrays import Array, as_tuple
from ddnref._rules.binding import options_of, plain_forward, plain_vjp
from ddnref._rules.contract import Rule
from ddnref._rules.samples import Sample
from ddnref._rules.table import TRIALS
from ddnref.testing._checker import RTOL
from ddnref.verify._backends import Backend

DTYPES = ("float64", "complex128", "float32", "complex64")
COMPLEX = ("complex128", "complex64")
SIZES = (1, 2, 5, 16)
BATCHES: tuple[tuple[int, ...], ...] = ((), (3,), (2, 2))

# Other libraries run the same code as NumPy. Each call takes ten times as long there, or is compiled first.
FEW_SIZES = (1, 5)
FEW_BATCHES: tuple[tuple[int, ...], ...] = ((), (2, 2))

SINGLE = {"f": "float32", "c": "complex64"}
DOUBLE = {"f": "float64", "c": "complex128"}
ROUNDING = 450  # structural identities hold to this many eps: 1e-13 in double precision

Measured = tuple[float, float]
"""An error and its tolerance."""


class Case(NamedTuple):
    """A rule and the dtype, size and batch shape of the problem it is checked on."""

    rule: Rule
    dtype: str
    m: int
    batch: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}, m={self.m}, batch {self.batch}"


class Outcome(NamedTuple):
    """The error that one check measured in one case."""

    check: str
    case: Case
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within its tolerance; a NaN is not."""
        return self.error <= self.tolerance

    @property
    def badness(self) -> float:
        """Error in units of its tolerance, infinite where it is not a number."""
        if math.isnan(self.error):
            return math.inf
        if self.tolerance == 0:
            return math.inf if self.error > 0 else 0.0
        return self.error / self.tolerance


class Problem(NamedTuple):
    """A case with its arrays: inputs, outputs, and two sets of cotangents for which the gradient exists."""

    backend: Backend
    case: Case
    sample: Sample
    forward: Callable[..., Any]
    vjp: Callable[..., tuple[Array, ...]]
    outputs: tuple[Array, ...]
    kept: tuple[Array, ...]
    """The VJP's arguments after the cotangents: outputs, saved arrays, inputs that it needs."""
    bars: tuple[Array, ...]
    other_bars: tuple[Array, ...]
    seed: int

    def pull(self, bars: tuple[Array, ...]) -> tuple[Array, ...]:
        """Call the VJP with some cotangents of the outputs."""
        return self.vjp(*bars, *self.kept)

    def numbers(self, arrays: tuple[Array, ...]) -> NDArray[Any]:
        """Copy all entries of some arrays to the host as one vector."""
        return np.concatenate([np.ravel(self.backend.to_numpy(array)) for array in arrays])

    @property
    def rounding(self) -> float:
        """The tolerance of a structural identity."""
        # An iterative solve amplifies rounding by its condition number.
        amplified = max(1.0, self.sample.condition) if self.case.rule.vjp_info else 1.0
        return ROUNDING * amplified * float(np.finfo(self.case.dtype).eps)


def cases(backend: Backend, rule: Rule, dtypes: tuple[str, ...]) -> list[Case]:
    """List the cases in which a rule is checked."""
    sizes, batches = (SIZES, BATCHES) if backend.name == "numpy" else (FEW_SIZES, FEW_BATCHES)
    taken = [dtype for dtype in dtypes if TRIALS[rule.name].is_complex or dtype not in COMPLEX]
    return [Case(rule, dtype, m, batch) for dtype in taken for m in sizes for batch in batches]


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


def pose(backend: Backend, case: Case, seed: int) -> Problem:
    """Draw the problem of a case. It depends on the seed and the case only, not on the backend or other rules."""
    rule, is_complex = case.rule, case.dtype.startswith("complex")
    key = zlib.crc32(f"{rule.name} {case}".encode())  # unlike hash(), equal in every process
    rng = np.random.default_rng([seed, key])
    kinds = SINGLE if case.dtype in SINGLE.values() else DOUBLE

    def convert(values: Any) -> Array:
        array = np.asarray(values)
        return backend.convert(array.astype(kinds[array.dtype.kind]))

    # The second sample supplies other cotangents for the check of linearity.
    sample, other = (TRIALS[rule.name].sample(convert, rng, case.batch, case.m, is_complex) for _ in range(2))
    # Bind the options, so that the library compiles functions of arrays only.
    forward_options, vjp_options = options_of(rule, sample.options, backend.while_loop)
    forward = backend.bind(plain_forward(rule), **forward_options)
    vjp = backend.bind(plain_vjp(rule), **vjp_options)
    # Run the forward pass and collect the arguments of the VJP.
    outputs, saved = forward(*sample.inputs)
    kept = *outputs, *saved, *(sample.inputs[i] for i in rule.needs)
    bars, other_bars = (_cotangents(s, rng, backend, outputs) for s in (sample, other))
    return Problem(backend, case, sample, forward, vjp, outputs, kept, bars, other_bars, seed)


def _cotangents(
    sample: Sample, rng: np.random.Generator, backend: Backend, outputs: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Return the cotangents of the sample's loss at the given outputs, or random ones if it has no loss."""
    if sample.loss is not None:
        return as_tuple(sample.loss[1](*outputs))

    # Any cotangent of the dtype and shape of an output will do.
    def draw(y: NDArray[Any]) -> Array:
        z = rng.standard_normal(y.shape)
        z = z + 1j * rng.standard_normal(y.shape) if y.dtype.kind == "c" else z
        return backend.convert(z.astype(y.dtype))

    return tuple(draw(backend.to_numpy(y)) for y in outputs)


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

    def double(array: Array) -> Array:
        values = p.backend.to_numpy(array)
        return p.backend.convert(values.astype(DOUBLE.get(values.dtype.kind, values.dtype)))  # pivots are integers

    vjp = p.case.rule.vjp
    # Judged in double precision, outputs that were rounded to single precision fail the check of the gauge or of the
    # solution. Accept them.
    names = {"gauge_rtol", "check_rtol"} & set(inspect.signature(vjp).parameters)
    accepting = dict.fromkeys(names, math.inf)
    if p.case.rule.vjp_info:
        # With saved pairs of single precision, no solve reaches a smaller residual.
        accepting["rtol"] = 16 * float(np.finfo(np.float32).eps)
    # Run the VJP in both precisions on identical numbers.
    _, options = options_of(p.case.rule, {**p.sample.options, **accepting}, p.backend.while_loop)
    exact = p.backend.bind(plain_vjp(p.case.rule), **options)(*map(double, (*p.bars, *p.kept)))
    single = p.pull(p.bars)
    # A cotangent of another dtype is an error, however accurate it is.
    for x, x_bar in zip(p.sample.inputs, single, strict=True):
        if x.dtype != x_bar.dtype:
            raise TypeError(f"the cotangent of a {x.dtype} input has dtype {x_bar.dtype}")
    tolerance = 20 * float(np.finfo(p.case.dtype).eps) * p.sample.condition
    return _relative(p.numbers(single), p.numbers(exact)), tolerance


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
    return _largest(p.numbers(p.pull(tuple(0.0 * u for u in p.bars)))), 0.0


def batch_is_loop(p: Problem) -> Measured | None:
    """Compare a batch with a loop over its items."""
    if not p.case.batch:
        return None
    # One call for the batch, then one call per item, of which the worst counts.
    whole = p.pull(p.bars)
    error, tolerance = 0.0, p.rounding
    for item in np.ndindex(p.case.batch):
        arrays = tuple(array[(*item, ...)] for array in (*p.bars, *p.kept))
        one = p.numbers(p.vjp(*arrays))
        same = p.numbers(tuple(x_bar[(*item, ...)] for x_bar in whole))
        error = max(error, _relative(same, one), key=lambda e: math.inf if math.isnan(e) else e)
    return error, tolerance


def hermitian(p: Problem) -> Measured | None:
    """Check that the cotangent is exactly Hermitian, which symmetric directional derivatives cannot see."""
    if TRIALS[p.case.rule.name].tangent != "symmetric":
        return None
    parts = [p.backend.to_numpy(x_bar) for x_bar in p.pull(p.bars)]
    return max(_largest(x_bar - np.conj(np.swapaxes(x_bar, -1, -2))) for x_bar in parts), 0.0


def compiled(p: Problem) -> Measured | None:
    """Compare with the VJP run step by step, if the backend compiles. The other checks run compiled functions."""
    # One shape is enough: each step is compiled separately, which takes seconds.
    if not p.backend.compiles or p.case.m == 1 or not p.case.batch:
        return None
    _, options = options_of(p.case.rule, p.sample.options, p.backend.while_loop)
    # Without `bind`, nothing is compiled as a whole.
    eager = plain_vjp(p.case.rule)(*p.bars, *p.kept, **options)
    return _relative(p.numbers(p.pull(p.bars)), p.numbers(eager)), p.rounding


CHECKS: dict[str, Callable[[Problem], Measured | None]] = {
    "finite differences": finite_differences,
    "single against double": against_double,
    "linear in the cotangent": linear,
    "zero cotangent": zero_cotangent,
    "batch equals loop": batch_is_loop,
    "exactly Hermitian": hermitian,
    "compiled (jit)": compiled,
}


def _relative(x: NDArray[Any], reference: NDArray[Any]) -> float:
    return float(np.linalg.norm(x - reference) / (np.linalg.norm(reference) or 1.0))


def _largest(x: NDArray[Any]) -> float:
    return float(np.max(np.abs(x), initial=0.0))
