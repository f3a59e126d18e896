"""Finite differences of a function of arrays: where its inputs move, how far, and what is seen there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from operator import add
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, adjoint, as_tuple, conj, is_complex, namespace, namespace_of, real
from ddnref._core.checks import check_shapes
from ddnref._kernels.dense import hermitian_part
from ddnref._kernels.public import public
from ddnref._kernels.vectors import safe_norm
from ddnref.testing._report import Direction

SMALLEST_STEP = 1e-290  # quarters of it are still normal numbers
VISIBLE = 1e-10  # changes between differences below this fraction of the derivative are rounding

Parts = Sequence[Array | float]
"""Values of a function: arrays, or one Python number."""


# --- where inputs may move ----------------------------------------------------------------------------------------


class Tangent(NamedTuple):
    """The set in which an input may move."""

    project: Callable[[Array, Array], Array]
    """``project(x, d)``: the part of a direction that stays in the set to first order."""
    retract: Callable[[Array, Array], Array]
    """``retract(x, d)``: `x` moved along `d` and brought back to the set."""


def _stiefel_retract(x: Array, d: Array) -> Array:
    # The polar factor is the nearest matrix with orthonormal columns.
    u, _, v_h = namespace_of(x).linalg.svd(x + d, full_matrices=False)
    return u @ v_h


TANGENTS: dict[str, Tangent] = {
    "dense": Tangent(lambda x, d: d, add),  # noqa: ARG005
    "symmetric": Tangent(lambda x, d: hermitian_part(d), add),  # noqa: ARG005
    "stiefel": Tangent(lambda x, d: d - x @ hermitian_part(adjoint(x) @ d), _stiefel_retract),
    "zero-sum": Tangent(lambda x, d: d - namespace_of(d).mean(d, axis=-1, keepdims=True), add),  # noqa: ARG005
}
"""Named tangent spaces: free entries, symmetric (Hermitian if complex), orthonormal columns, a fixed sum along the
last axis (histograms)."""


def tangent_spaces(tangent: Any, count: int) -> list[Tangent]:
    """Return one tangent space for each input."""
    # One space serves all inputs, or a tuple has one for each.
    given = tangent if type(tangent) is tuple else (tangent,) * count
    if len(given) != count:
        raise ValueError(f"tangent has {len(given)} entries for {count} inputs.")
    for space in given:
        if not isinstance(space, Tangent) and not (isinstance(space, str) and space in TANGENTS):
            raise ValueError(f"tangent is {space!r}, expected one of {', '.join(map(repr, TANGENTS))} or a Tangent.")
    return [TANGENTS[space] if isinstance(space, str) else space for space in given]


class Moves(NamedTuple):
    """How the inputs of a function move in a check."""

    inputs: tuple[Array, ...]
    spaces: list[Tangent]
    symmetrises: bool
    n_random: int
    """How many random directions are drawn for each input."""

    def directions(self, rng: np.random.Generator, i: int) -> list[tuple[str, Array]]:
        """Draw directions of unit norm for one input, and a free one if the function symmetrises."""
        x, project = self.inputs[i], self.spaces[i].project
        named = [(f"random {k}", project(x, random_like(rng, x))) for k in range(self.n_random)]
        if self.symmetrises:
            named.append(("non-symmetric", random_like(rng, x)))
        return unit_directions(named)

    def each_and_all(self, rng: np.random.Generator) -> Iterator[list[tuple[str, tuple[Array | None, ...]]]]:
        """Yield the directions in which each input moves alone, and then those in which all of them move."""
        drawn = [self.directions(rng, i) for i in range(len(self.inputs))]
        for i, named in enumerate(drawn):
            # An input that does not move has no tangent.
            before, after = (None,) * i, (None,) * (len(drawn) - i - 1)
            yield [(name + self.suffix(i), (*before, d, *after)) for name, d in named]
        # An input without entries cannot move. The others move together.
        movable = [i for i, named in enumerate(drawn) if named]
        if len(movable) > 1:
            together = zip(*(self.directions(rng, i) for i in movable), strict=False)
            yield [
                (f"{parts[0][0]} of all inputs", self._in_place(movable, [d for _, d in parts])) for parts in together
            ]

    def suffix(self, i: int) -> str:
        """Return what follows the name of a direction of one input."""
        return f" of input {i}" if len(self.inputs) > 1 else ""

    def moved(self, tangents: Sequence[Array | None], s: float) -> tuple[Array, ...]:
        """Return the inputs moved by `s` along some tangents."""
        triples = zip(self.inputs, tangents, self.spaces, strict=True)
        return tuple(x if d is None else space.retract(x, s * d) for x, d, space in triples)

    def _in_place(self, positions: list[int], arrays: list[Array]) -> tuple[Array | None, ...]:
        placed = dict(zip(positions, arrays, strict=True))
        return tuple(map(placed.get, range(len(self.inputs))))


def unit_directions(named: Sequence[tuple[str, Array]]) -> list[tuple[str, Array]]:
    """Divide named directions by their norms."""
    # A direction of length zero shows nothing; one with NaN must be reported.
    return [(name, d / length) for name, d in named if (length := norm(d)) > 0 or math.isnan(length)]


# --- differences --------------------------------------------------------------------------------------------------


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
    check_double("x", x)
    check_double("x_dot", x_dot)
    namespace(x=x, x_dot=x_dot)
    check_shapes(x_dot=(x_dot, tuple(x.shape)))
    length = norm(x_dot)
    if length == 0:
        raise ValueError("x_dot is zero: there is no direction to differentiate along.")
    h = (default_step(norm(x), gap) if step is None else step) / length
    # Central differences with two step lengths, extrapolated so that the error is of fourth order.
    f_0 = [f(x + s * x_dot) for s in (h, -h, h / 2, -h / 2)]
    out = tuple((4 * (c - d) / h - (a - b) / (2 * h)) / 3 for a, b, c, d in zip(*map(as_tuple, f_0), strict=True))
    return out if isinstance(f_0[0], tuple) else out[0]


class Differences(NamedTuple):
    """The derivative of a path ``s ↦ at(s)`` at zero, by central differences."""

    derivative: Parts
    """The extrapolated derivative."""
    first_change: float
    """How much halving the step changes the plain difference."""
    second_change: float
    """How much halving it once more does."""

    def order(self, size: float) -> float:
        """Return the observed order of the plain differences of a derivative of some size."""
        # Successive differences shrink by 2**order until rounding hides them.
        floor = VISIBLE * max(size, size_of(self.derivative))
        visible = min(self.first_change, self.second_change) > floor
        return math.log2(self.first_change / self.second_change) if visible else math.nan


def central_differences(at: Callable[[float], Parts], h: float) -> Differences:
    """Differentiate a path at zero with steps h, h/2 and h/4: two give the value, the third its observed order."""
    coarse, middle, fine = (_scaled(_less(at(s), at(-s)), 1 / (2 * s)) for s in (h, h / 2, h / 4))
    derivative = tuple((4 * m - c) / 3 for c, m in zip(coarse, middle, strict=True))
    return Differences(derivative, size_of(_less(coarse, middle)), size_of(_less(middle, fine)))


def compare_directions(
    rng: np.random.Generator,
    moves: Moves,
    at: Callable[..., Parts],
    push: Callable[..., Parts],
    steps: Sequence[float],
    prefix: str = "",
) -> list[Direction]:
    """Compare a forward derivative with finite differences: for each input alone, and for all of them together.

    ``at(*inputs)`` is the function and ``push(*tangents)`` its derivative. Errors are relative to the root mean square
    of the derivative over the directions in which the same inputs move, because along a single one it may be small.
    """
    rows: list[Direction] = []
    for group in moves.each_and_all(rng):
        found = []
        for name, units in group:
            # Each input moves by its own step.
            h = max(step for step, d in zip(steps, units, strict=True) if d is not None)
            tangents = tuple(None if d is None else d * (s / h) for s, d in zip(steps, units, strict=True))

            def path(s: float, tangents: tuple[Array | None, ...] = tangents) -> Parts:
                return at(*moves.moved(tangents, s))

            found.append((name, push(*tangents), central_differences(path, h)))
        size = math.hypot(*(size_of(pushed) for _, pushed, _ in found)) / max(len(found), 1) ** 0.5
        rows += [_compared(prefix + name, differences, pushed, size) for name, pushed, differences in found]
    return rows


def _compared(name: str, differences: Differences, analytic: Parts, size: float) -> Direction:
    error = size_of(_less(differences.derivative, analytic)) / (size or 1.0)
    # Of arrays, the table shows the components along the analytic derivative.
    length = size_of(analytic)
    if all(isinstance(part, float) for part in analytic):
        shown = [float(sum(parts)) for parts in (differences.derivative, analytic)]
    elif length == 0:
        shown = [size_of(differences.derivative), 0.0]
    else:
        unit = _scaled(analytic, 1 / length)
        shown = [sum(map(real_dot, unit, parts)) for parts in (differences.derivative, analytic)]
    return Direction(name, shown[0], shown[1], error, differences.order(size))


def default_step(size: float, gap: float) -> float:
    """Return the step for an input of some norm whose function changes within `gap`."""
    step = min(1e-4 * (size or 1.0), 3e-3 * gap)
    if step < SMALLEST_STEP:
        raise ValueError(f"x, or one of inputs, has norm {size:.0e}: too small for a step. Scale it, or pass step=.")
    return step


def check_double(name: str, x: Array) -> None:
    """Raise ``TypeError`` unless `x` has double precision."""
    xp = namespace(**{name: x})
    if x.dtype not in (xp.float64, xp.complex128):
        raise TypeError(
            f"{name} has dtype {x.dtype}: finite differences need float64 or complex128. Compare a float32 derivative "
            "with its float64 self on the same inputs instead."
        )


# --- vectors ------------------------------------------------------------------------------------------------------


def norm(x: Array) -> float:
    """Euclidean norm of all entries as one vector."""
    return float(safe_norm(namespace_of(x).reshape(x, (-1,))))


def size_of(parts: Parts) -> float:
    """Euclidean norm of all entries of several arrays or numbers."""
    return math.hypot(*(abs(part) if isinstance(part, float) else norm(part) for part in parts))


def real_dot(y_bar: Array, y: Array) -> float:
    """Real part of the inner product of two arrays."""
    return float(namespace_of(y).sum(real(conj(y_bar) * y)))


def random_like(rng: np.random.Generator, x: Array) -> Array:
    """Draw standard normal numbers of the shape, dtype and device of `x`."""
    values = rng.standard_normal(tuple(x.shape))
    if is_complex(x):
        values = values + 1j * rng.standard_normal(tuple(x.shape))
    return namespace_of(x).asarray(values, dtype=x.dtype, device=array_api_compat.device(x))


def _less(a: Parts, b: Parts) -> Parts:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _scaled(a: Parts, c: float) -> Parts:
    return tuple(x * c for x in a)
