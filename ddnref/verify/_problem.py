"""A problem of ``ddnref verify``: a rule, bound to one array library, with the arrays that its checks need."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddnref._core.arrays import Array, as_tuple
from ddnref._rules.binding import jvp_options_of, keywords, options_of, plain_forward, plain_jvp, plain_vjp
from ddnref._rules.contract import Rule
from ddnref._rules.samples import Sample, normal
from ddnref._rules.table import TRIALS
from ddnref.testing._differences import random_like, tangent_spaces
from ddnref.verify._backends import Backend

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
    jvp: Callable[..., tuple[Array, ...]] | None
    """The JVP; ``None`` if the rule is tried without one."""
    dots: tuple[Array, ...]
    """A random tangent for each input, which leaves the symmetric matrices where the rule symmetrises."""
    seed: int

    def pull(self, bars: tuple[Array, ...]) -> tuple[Array, ...]:
        """Call the VJP with some cotangents of the outputs."""
        return self.vjp(*bars, *self.kept)

    def numbers(self, arrays: tuple[Array, ...]) -> NDArray[Any]:
        """Copy all entries of some arrays to the host as one vector."""
        return np.concatenate([np.ravel(self.backend.to_numpy(array)) for array in arrays])

    def push(self, dots: tuple[Array | None, ...]) -> tuple[Array, ...]:
        """Call the JVP with some tangents of the inputs."""
        assert self.jvp is not None  # noqa: S101 - for the type checker
        return self.jvp(*dots, *self.kept)

    def double(self, array: Array) -> Array:
        """Convert an array to double precision."""
        values = self.backend.to_numpy(array)
        return self.backend.hold(values.astype(DOUBLE.get(values.dtype.kind, values.dtype)))  # pivots are integers

    @property
    def eps(self) -> float:
        """The rounding of one operation."""
        return float(np.finfo(self.case.dtype).eps)

    @property
    def amplification(self) -> float:
        """How much an iterative solve amplifies rounding: the condition number of its system."""
        return max(1.0, self.sample.condition) if self.case.rule.vjp_info else 1.0

    @property
    def rounding(self) -> float:
        """The tolerance of a structural identity."""
        return ROUNDING * self.amplification * self.eps


def pose(backend: Backend, case: Case, seed: int) -> Problem:
    """Draw the problem of a case. It depends on the seed and the case only, not on the backend or other rules."""
    rule, is_complex = case.rule, case.dtype.startswith("complex")
    key = zlib.crc32(f"{rule.name} {case}".encode())  # unlike hash(), equal in every process
    rng = np.random.default_rng([seed, key])
    kinds = SINGLE if case.dtype in SINGLE.values() else DOUBLE

    def convert(values: Any) -> Array:
        array = np.asarray(values)
        return backend.hold(array.astype(kinds[array.dtype.kind]))

    # The second sample supplies other cotangents for the check of linearity.
    sample, other = (TRIALS[rule.name].sample(convert, rng, case.batch, case.m, is_complex) for _ in range(2))
    # Bind the options, so that the library compiles functions of arrays only.
    forward_options, vjp_options = options_of(rule, sample.options, backend.while_loop)
    forward = backend.bound(plain_forward(rule), **forward_options)
    vjp = backend.bound(plain_vjp(rule), **vjp_options)
    jvp_options = jvp_options_of(rule, sample.options, backend.while_loop)
    jvp = None if rule.jvp is None else backend.bound(plain_jvp(rule), **jvp_options)
    # Run the forward pass and collect the arguments of the VJP.
    outputs, saved = forward(*sample.inputs)
    kept = *outputs, *saved, *(sample.inputs[i] for i in rule.needs)
    bars, other_bars = (_cotangents(s, rng, backend, outputs) for s in (sample, other))
    dots = _tangents(rule, sample.inputs, rng)
    return Problem(backend, case, sample, forward, vjp, outputs, kept, bars, other_bars, jvp, dots, seed)


def _tangents(rule: Rule, inputs: tuple[Array, ...], rng: np.random.Generator) -> tuple[Array, ...]:
    """Draw a tangent for each input of a rule."""
    trial = TRIALS[rule.name]
    drawn = [random_like(rng, x) for x in inputs]
    if trial.symmetrises:
        return tuple(drawn)
    spaces = tangent_spaces(trial.tangent, len(inputs))
    return tuple(space.project(x, d) for space, x, d in zip(spaces, inputs, drawn, strict=True))


def _cotangents(
    sample: Sample, rng: np.random.Generator, backend: Backend, outputs: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Return the cotangents of the sample's loss at the given outputs, or random ones if it has no loss."""
    if sample.loss is not None:
        return as_tuple(sample.loss[1](*outputs))
    # Any cotangent of the dtype and shape of an output will do.
    drawn = ((normal(rng, y.shape, y.dtype.kind == "c"), y.dtype) for y in map(backend.to_numpy, outputs))
    return tuple(backend.hold(z.astype(dtype)) for z, dtype in drawn)


def accepting(rule: Rule, function: Callable[..., Any]) -> dict[str, float]:
    """Return the options with which a derivative in double precision takes results of single precision."""
    # Judged in double precision, outputs that were rounded to single precision fail the check of the gauge or of the
    # solution. Accept them.
    options = dict.fromkeys({"gauge_rtol", "check_rtol"} & keywords(function), math.inf)
    if rule.vjp_info and not rule.direct:
        # With saved pairs of single precision, no solve reaches a smaller residual.
        options["rtol"] = 16 * float(np.finfo(np.float32).eps)
    return options


def batch_error(p: Problem, derivative: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...]) -> float:
    """Compare one call for a batch with one call per item, of which the worst counts."""
    whole = derivative(*arrays)
    error = 0.0
    for item in np.ndindex(p.case.batch):
        one = p.numbers(derivative(*(array[(*item, ...)] for array in arrays)))
        same = p.numbers(tuple(result[(*item, ...)] for result in whole))
        error = max(error, relative(same, one), key=lambda e: math.inf if math.isnan(e) else e)
    return error


def relative(x: NDArray[Any], reference: NDArray[Any]) -> float:
    """Norm of the difference relative to that of the reference, or as it is where that is zero."""
    return float(np.linalg.norm(x - reference) / (np.linalg.norm(reference) or 1.0))


def largest(x: NDArray[Any]) -> float:
    """The largest absolute value, 0 of no entries."""
    return float(np.max(np.abs(x), initial=0.0))
