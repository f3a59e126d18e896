"""Checks of VJPs, yours or ours, against finite differences, on any array library.

A check passes if the directional derivative of the loss and ``⟨x̄, D⟩`` differ by at most ``1e-7 · ‖x̄‖`` for eight
random directions D of unit norm *and* for ``D = x̄ / ‖x̄‖``. Random directions alone miss a relative error of 1e-6
entirely once an input has a thousand entries. A tolerance of 1e-3, the common default, misses a 10 % error in one of
4096 entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, Namespace, adjoint, conj, is_complex, namespace, real
from ddnref._core.checks import check_shapes
from ddnref._kernels.dense import hermitian_part
from ddnref._kernels.public import public

__all__ = ["TANGENTS", "Direction", "Report", "Tangent", "assert_vjp", "check_vjp", "numerical_jvp"]

RTOL = 1e-7
STRUCTURE_RTOL = 1e-13
SMALLEST_STEP = 1e-290  # quarters of it are still normal numbers


class Tangent(NamedTuple):
    """The set in which an input may move."""

    project: Callable[[Array, Array], Array]
    """``project(x, d)``: the part of a direction that stays in the set to first order."""
    retract: Callable[[Array, Array], Array]
    """``retract(x, d)``: `x` moved along `d` and brought back to the set."""


def _stiefel_project(x: Array, d: Array) -> Array:
    return d - x @ hermitian_part(adjoint(x) @ d)


def _stiefel_retract(x: Array, d: Array) -> Array:
    xp = array_api_compat.array_namespace(x)
    u, _, v_h = xp.linalg.svd(x + d, full_matrices=False)
    return u @ v_h


def _zero_sum_project(x: Array, d: Array) -> Array:  # noqa: ARG001
    xp = array_api_compat.array_namespace(d)
    return d - xp.mean(d, axis=-1, keepdims=True)


TANGENTS: dict[str, Tangent] = {
    "dense": Tangent(lambda x, d: d, lambda x, d: x + d),  # noqa: ARG005
    "symmetric": Tangent(lambda x, d: hermitian_part(d), lambda x, d: x + d),  # noqa: ARG005
    "stiefel": Tangent(_stiefel_project, _stiefel_retract),
    "zero-sum": Tangent(_zero_sum_project, lambda x, d: x + d),
}
"""Named tangent spaces: free entries, symmetric (Hermitian if complex), orthonormal columns, a fixed sum along the
last axis (histograms)."""


class Direction(NamedTuple):
    """One directional derivative, by finite differences and from the gradient."""

    name: str
    """Name of the direction."""
    numerical: float
    """The derivative by Richardson-extrapolated central differences."""
    analytic: float
    """``⟨x̄, D⟩`` from the VJP."""
    error: float
    """``|numerical − analytic| / ‖x̄‖``."""
    order: float
    """Observed order of the differences; NaN where it cannot be seen."""


class Report(NamedTuple):
    """The measurements of `check_vjp`; ``str(report)`` is a table."""

    passed: bool
    """Whether every direction is within `rtol` and the structure holds."""
    error: float
    """Worst ``|numerical − analytic| / ‖x̄‖`` over the directions."""
    direction: str
    """Name of the worst direction."""
    step: float
    """Length of the step; the smallest over the inputs."""
    order: float
    """Observed order of the central differences in that direction: 2 where the step is inside the smooth range,
    NaN where they agree to rounding and no order can be seen."""
    structure: float
    """``‖x̄ − x̄ᴴ‖ / ‖x̄‖`` for symmetric inputs, which symmetric directions cannot see; else 0."""
    rtol: float
    """The tolerance that was asked for."""
    directions: tuple[Direction, ...]
    """Every direction that was tried."""

    def __str__(self) -> str:
        rows = [f"{'direction':<24}{'numerical':>24}{'analytic':>24}{'error':>10}{'order':>7}"]
        rows += [
            f"{d.name:<24}{d.numerical:>24.15e}{d.analytic:>24.15e}{d.error:>10.1e}{d.order:>7.2f}"
            for d in self.directions
        ]
        verdict = "passed" if self.passed else "FAILED"
        rows.append(
            f"{verdict}: worst relative error {self.error:.1e} (tolerance {self.rtol:.0e}) in direction "
            f"{self.direction}, step {self.step:.1e}, order {self.order:.2f}, structure {self.structure:.1e}"
        )
        return "\n".join(rows)


@public
def numerical_jvp(
    f: Callable[[Array], Any], x: Array, x_dot: Array, /, *, step: float | None = None, gap: float = math.inf
) -> Any:
    """Directional derivative of `f` at `x` along `x_dot` by Richardson-extrapolated central differences.

    Parameters
    ----------
    f : callable
        Maps an array to an array or a tuple of arrays.
    x, x_dot : arrays of the same shape, float64 or complex128
    step : float, optional
        Length of the step along ``x_dot / ‖x_dot‖``; default ``min(1e-4 * ‖x‖, 3e-3 * gap)``.
    gap : float, optional
        The smallest eigenvalue gap (or other scale of change) that `f` can tell apart: a step near it measures nothing.

    Returns
    -------
    f_dot : as `f` returns
        ``(4 c(h/2) − c(h)) / 3`` with central differences c: fourth order in the step.

    Raises
    ------
    TypeError
        If `x` is not float64 or complex128.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([1.0, 2.0])
    >>> np.round(ddnref.testing.numerical_jvp(np.exp, x, np.asarray([1.0, 0.0])) - np.exp(x) * [1, 0], 9)
    array([0., 0.])
    """
    xp = _double("x", x)
    _double("x_dot", x_dot)
    namespace(x=x, x_dot=x_dot)
    check_shapes(x_dot=(x_dot, tuple(x.shape)))
    # Central differences with two step lengths, extrapolated so that the error is of fourth order.
    length = _norm(xp, x_dot)
    if length == 0:
        raise ValueError("x_dot is zero: there is no direction to differentiate along.")
    h = (_default_step(_norm(xp, x), gap) if step is None else step) / length
    f_0 = f(x + h * x_dot), f(x - h * x_dot), f(x + h / 2 * x_dot), f(x - h / 2 * x_dot)
    single = not isinstance(f_0[0], tuple)
    plus, minus, plus_2, minus_2 = (((y,) if single else y) for y in f_0)
    out = tuple(
        (4 * (c - d) / h - (a - b) / (2 * h)) / 3 for a, b, c, d in zip(plus, minus, plus_2, minus_2, strict=True)
    )
    return out[0] if single else out


@public
def check_vjp(
    f: Callable[..., Any],
    f_vjp: Callable[..., Any],
    *inputs: Array,
    saves: bool = False,
    needs: Sequence[int] = (),
    loss: tuple[Callable[..., Array], Callable[..., Any]] | None = None,
    tangent: str | Tangent | tuple[str | Tangent, ...] = "dense",
    symmetrises: bool = False,
    gap: float = math.inf,
    step: float | None = None,
    directions: int = 8,
    rtol: float = RTOL,
    seed: int = 0,
) -> Report:
    """Check a VJP against finite differences.

    Parameters
    ----------
    f : callable
        ``f(*inputs)`` returns an array or a tuple of arrays. Bind options with ``functools.partial``.
    f_vjp : callable
        ``f_vjp(*cotangents, *outputs, *saved, *needed inputs)`` returns one cotangent per input.
    *inputs : arrays, float64 or complex128
    saves : bool
        `f` returns ``(outputs, saved)``, as the ``_fwd`` functions do.
    needs : sequence of int
        Positions of the inputs that `f_vjp` takes after outputs and saved arrays.
    loss : (value, gradient), optional
        ``value(*outputs)`` a real scalar, ``gradient(*outputs)`` its cotangents. Default: a random linear function
        of the outputs. Needed where outputs have a gauge: an eigenvector's sign must not matter.
    tangent : {"dense", "symmetric", "stiefel", "zero-sum"} or Tangent, or a tuple with one for each input
        Where the inputs may move.
    symmetrises : bool
        `f` takes non-symmetric input and symmetrises it: adds a non-symmetric direction, without which a missing
        symmetrisation in the VJP is invisible.
    gap, step
        As in `numerical_jvp`.
    directions : int
        Random directions for every input, besides its gradient's own.
    rtol : float
        Largest accepted ``|numerical − analytic| / ‖x̄‖``.
    seed : int

    Returns
    -------
    report : Report

    Raises
    ------
    TypeError
        An input is not float64 or complex128: finite differences in float32 show nothing.
    ValueError
        `f_vjp` returned a cotangent of another shape, or too few.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.linspace(0.0, 1.0, 5)
    >>> bool(ddnref.testing.check_vjp(np.sin, lambda y_bar, y, x: y_bar * np.cos(x), x, needs=(0,)).passed)
    True
    >>> bool(ddnref.testing.check_vjp(np.sin, lambda y_bar, y, x: y_bar * np.sin(x), x, needs=(0,)).passed)
    False
    """
    # Validate inputs and tangent spaces before anything is computed.
    rng = np.random.default_rng(seed)
    spaces = _spaces(tangent, len(inputs))
    for i, x in enumerate(inputs):
        _double(f"inputs[{i}]", x)

    def forward(*arrays: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        result, saved = f(*arrays) if saves else (f(*arrays), ())
        return (result if isinstance(result, tuple) else (result,)), saved

    # Forward and VJP once, at the inputs as they are.
    outputs, saved = forward(*inputs)
    value, gradient = _linear_loss(rng, outputs) if loss is None else loss
    cotangents = gradient(*outputs)
    cotangents = cotangents if isinstance(cotangents, tuple) else (cotangents,)
    bars = f_vjp(*cotangents, *outputs, *saved, *(inputs[i] for i in needs))
    bars = bars if isinstance(bars, tuple) else (bars,)
    if [tuple(b.shape) for b in bars] != [tuple(x.shape) for x in inputs]:
        raise ValueError(
            f"f_vjp returned shapes {[tuple(b.shape) for b in bars]} for inputs of shapes "
            f"{[tuple(x.shape) for x in inputs]}."
        )

    rows: list[Direction] = []
    structure, worst_step = 0.0, math.nan
    for i, (x, x_bar, space) in enumerate(zip(inputs, bars, spaces, strict=True)):
        xp = _double(f"inputs[{i}]", x)
        h = _default_step(_norm(xp, x), gap) if step is None else step
        worst_step = h if math.isnan(worst_step) else min(worst_step, h)
        if space is TANGENTS["symmetric"]:
            structure = max(structure, _norm(xp, x_bar - adjoint(x_bar)) / (_norm(xp, x_bar) or 1.0))

        def at(d: Array, i: int = i, x: Array = x, space: Tangent = space) -> float:
            return float(value(*forward(*inputs[:i], space.retract(x, d), *inputs[i + 1 :])[0]))

        suffix = f" of input {i}" if len(inputs) > 1 else ""
        for name, d in _directions(rng, xp, x, x_bar, space, symmetrises, directions):
            rows.append(_differentiate(name + suffix, at, xp, x_bar, d, h))
    rows = rows or [Direction("none: the gradient is empty or zero", 0.0, 0.0, 0.0, math.nan)]
    worst = max(rows, key=lambda row: math.inf if math.isnan(row.error) else row.error)
    passed = all(row.error <= rtol for row in rows) and structure <= STRUCTURE_RTOL
    return Report(passed, worst.error, worst.name, worst_step, worst.order, structure, rtol, tuple(rows))


@public
def assert_vjp(f: Callable[..., Any], f_vjp: Callable[..., Any], *inputs: Array, **options: Any) -> Report:
    """Call `check_vjp`, and raise ``AssertionError`` with the whole table if the check fails.

    Parameters, return value and static errors are those of `check_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> report = ddnref.testing.assert_vjp(np.exp, lambda y_bar, y: y_bar * y, np.linspace(0.0, 1.0, 5))
    """
    report = check_vjp(f, f_vjp, *inputs, **options)
    if not report.passed:
        raise AssertionError(f"The VJP disagrees with finite differences.\n{report}")
    return report


def _spaces(tangent: Any, count: int) -> list[Tangent]:
    """Return one tangent space for each input."""
    # One space for all inputs, or one for each.
    given = tangent if type(tangent) is tuple else (tangent,) * count
    if len(given) != count:
        raise ValueError(f"tangent has {len(given)} entries for {count} inputs.")
    for space in given:
        if not isinstance(space, Tangent) and not (isinstance(space, str) and space in TANGENTS):
            raise ValueError(f"tangent is {space!r}, expected one of {', '.join(map(repr, TANGENTS))} or a Tangent.")
    return [TANGENTS[space] if isinstance(space, str) else space for space in given]


def _directions(
    rng: np.random.Generator,
    xp: Namespace,
    x: Array,
    x_bar: Array,
    space: Tangent,
    symmetrises: bool,
    count: int,
) -> list[tuple[str, Array]]:
    """Return random tangent directions, a free one if the input is symmetrised, and the gradient's own."""
    # Random directions find most errors, the gradient's own direction finds small relative ones.
    named = [(f"random {k}", space.project(x, _random(rng, xp, x))) for k in range(count)]
    if symmetrises:
        named.append(("non-symmetric", _random(rng, xp, x)))
    named.append(("gradient", x_bar if symmetrises else space.project(x, x_bar)))
    return [(name, d / length) for name, d in named if (length := _norm(xp, d)) > 0 or math.isnan(length)]


def _differentiate(
    name: str, at: Callable[[Array], float], xp: Namespace, x_bar: Array, d: Array, h: float
) -> Direction:
    # Three step lengths: two give the extrapolated value, the third its observed order.
    central = [(at(s * d) - at(-s * d)) / (2 * s) for s in (h, h / 2, h / 4)]
    numerical = (4 * central[1] - central[0]) / 3
    analytic = float(xp.sum(real(conj(x_bar) * d)))
    size = _norm(xp, x_bar)
    # Successive differences shrink by 2**order until rounding hides them.
    first, second = abs(central[0] - central[1]), abs(central[1] - central[2])
    visible = min(first, second) > 1e-10 * max(size, abs(numerical))
    order = math.log2(first / second) if visible else math.nan
    return Direction(name, numerical, analytic, abs(numerical - analytic) / (size or 1.0), order)


def _default_step(size: float, gap: float) -> float:
    step = min(1e-4 * (size or 1.0), 3e-3 * gap)
    if step < SMALLEST_STEP:
        raise ValueError(f"x, or one of inputs, has norm {size:.0e}: too small for a step. Scale it, or pass step=.")
    return step


def _double(name: str, x: Array) -> Namespace:
    xp = namespace(**{name: x})
    if x.dtype not in (xp.float64, xp.complex128):
        raise TypeError(
            f"{name} has dtype {x.dtype}: finite differences need float64 or complex128. Compare a float32 VJP with "
            "its float64 self on the same inputs instead."
        )
    return xp


def _norm(xp: Namespace, x: Array) -> float:
    if 0 in x.shape:
        return 0.0
    # Scale by the largest entry, so that no square overflows.
    size = xp.abs(x)
    largest = float(xp.max(size))
    return largest * float(xp.sum((size / largest) ** 2)) ** 0.5 if 0 < largest < math.inf else largest


def _random(rng: np.random.Generator, xp: Namespace, x: Array) -> Array:
    """Draw standard normal numbers of the shape, dtype and device of `x`."""
    values = rng.standard_normal(tuple(x.shape))
    if is_complex(x):
        values = values + 1j * rng.standard_normal(tuple(x.shape))
    return xp.asarray(values, dtype=x.dtype, device=array_api_compat.device(x))


def _linear_loss(
    rng: np.random.Generator, outputs: tuple[Array, ...]
) -> tuple[Callable[..., Array], Callable[..., Any]]:
    bars = tuple(_random(rng, array_api_compat.array_namespace(y), y) for y in outputs)

    def value(*outputs: Array) -> Array:
        total: Any = 0.0
        for y_bar, y in zip(bars, outputs, strict=True):
            xp = array_api_compat.array_namespace(y)
            total = total + xp.sum(real(conj(y_bar) * y))
        return total

    return value, lambda *outputs: bars  # noqa: ARG005
