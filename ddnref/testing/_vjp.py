"""Checks of VJPs, yours or ours, against finite differences, on any array library.

A check passes if the directional derivative of the loss and ``⟨x̄, D⟩`` differ by at most ``1e-7 · ‖x̄‖`` for eight
random directions D of unit norm *and* for ``D = x̄ / ‖x̄‖``. Random directions alone miss a relative error of 1e-6
entirely once an input has a thousand entries. A tolerance of 1e-3, the common default, misses a 10 % error in one of
4096 entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddnref._core.arrays import Array, adjoint, as_tuple
from ddnref._kernels.public import public
from ddnref.testing._arguments import (
    COTANGENTS,
    SECONDS,
    check_call,
    check_outputs,
    check_returned,
    checked,
    forward_of,
)
from ddnref.testing._differences import (
    TANGENTS,
    Moves,
    Tangent,
    central_differences,
    check_double,
    compare_directions,
    default_step,
    norm,
    random_like,
    real_dot,
    tangent_spaces,
    unit_directions,
)
from ddnref.testing._report import Direction, Report, report_of

RTOL = 1e-7
STRUCTURE_RTOL = 1e-13  # a symmetric gradient is symmetric up to rounding


@public
def check_vjp(
    f: Callable[..., Any],
    f_vjp: Callable[..., Any] | Array,
    *inputs: Array,
    saves: bool = False,
    needs: Sequence[int] = (),
    loss: tuple[Callable[..., Array], Callable[..., Any]] | None = None,
    second: Callable[..., Any] | None = None,
    tangent: str | Tangent | tuple[str | Tangent, ...] = "dense",
    symmetrises: bool = False,
    gap: float = math.inf,
    step: float | None = None,
    directions: int = 8,
    rtol: float = RTOL,
    seed: int = 0,
) -> Report:
    """Check a VJP against finite differences, and its own derivative if it is given.

    Parameters
    ----------
    f : callable
        ``f(*inputs)`` returns an array or a tuple of arrays. Bind options with ``functools.partial``. A function that
        ``differentiable`` of a bridge made is checked with its own derivatives: leave out `f_vjp`, `saves` and
        `needs`, and pass arrays of any library that the functions inside take.
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
    second : callable, optional
        Second derivatives, to be checked as well: the forward derivative of `f_vjp`. ``second(*tangents, *cotangents,
        *outputs, *saved, *needed inputs)`` returns the derivative of each cotangent that `f_vjp` returns, along
        tangents of the inputs, of which ``None`` does not move. Outputs and saved arrays move with the inputs. The
        cotangents of the outputs are constant, but those of a `loss` are its gradient and move with the outputs: then
        `second` multiplies the Hessian of ``loss(f(x))`` by the tangents.
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
        An input is not float64 or complex128: finite differences in float32 show nothing. `f_vjp` does not take the
        arguments that it would be given, or returned ``None``, something that is not an array, or another dtype.
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
    f, (f_vjp,), inputs, saves, needs = checked(f, (f_vjp, *inputs), saves, needs, "vjp")
    # Validate inputs and tangent spaces before anything is computed.
    rng = np.random.default_rng(seed)
    moves = Moves(inputs, tangent_spaces(tangent, len(inputs)), symmetrises, directions)
    for i, x in enumerate(inputs):
        check_double(f"inputs[{i}]", x)
    forward = forward_of(f, saves)

    # Forward and VJP once, at the inputs as they are.
    outputs, saved = forward(*inputs)
    check_outputs("f", outputs)
    value, gradient = _linear_loss(rng, outputs) if loss is None else loss
    bars = as_tuple(gradient(*outputs))
    counts = {"cotangent(s)": len(bars), "output(s)": len(outputs), "saved array(s)": len(saved)}
    check_call("f_vjp", f_vjp, {**counts, "input(s)": len(needs)}, len(inputs))

    def reverse(*arrays: Array) -> tuple[Array, ...]:
        outputs, saved = forward(*arrays)
        return as_tuple(f_vjp(*as_tuple(gradient(*outputs)), *outputs, *saved, *(arrays[i] for i in needs)))

    kept = (*bars, *outputs, *saved, *(inputs[i] for i in needs))
    x_bars = as_tuple(f_vjp(*kept))
    check_returned(COTANGENTS, x_bars, inputs)

    # Move one input at a time, along each of its directions.
    rows: list[Direction] = []
    structure = 0.0
    steps = [default_step(norm(x), gap) if step is None else step for x in inputs]
    for i, (x, x_bar, space, h) in enumerate(zip(inputs, x_bars, moves.spaces, steps, strict=True)):
        if space is TANGENTS["symmetric"]:
            structure = max(structure, norm(x_bar - adjoint(x_bar)) / (norm(x_bar) or 1.0))
        # Random directions find most errors, the gradient's own direction finds small relative ones.
        own = unit_directions([("gradient", x_bar if symmetrises else space.project(x, x_bar))])
        size = norm(x_bar)
        for name, d in (*moves.directions(rng, i), *own):

            def at(s: float, i: int = i, d: Array = d) -> tuple[float]:
                moved = (*inputs[:i], moves.spaces[i].retract(inputs[i], s * d), *inputs[i + 1 :])
                return (float(value(*forward(*moved)[0])),)

            differences = central_differences(at, h)
            (numerical,), analytic = differences.derivative, real_dot(x_bar, d)
            error = abs(numerical - analytic) / (size or 1.0)
            rows.append(Direction(name + moves.suffix(i), numerical, analytic, error, differences.order(size)))

    if second is not None:
        # The VJP is a function as well, and `second` its forward derivative.
        function = second
        check_call("second", function, {"tangent(s)": len(inputs), **counts, "input(s)": len(needs)}, len(inputs))

        def push(*tangents: Array | None) -> tuple[Array, ...]:
            dots = as_tuple(function(*tangents, *kept))
            check_returned(SECONDS, dots, inputs)
            return dots

        rows += compare_directions(rng, moves, reverse, push, steps, "second, ")
    return report_of(rows, min(steps, default=math.nan), rtol, structure, STRUCTURE_RTOL)


@public
def assert_vjp(f: Callable[..., Any], f_vjp: Callable[..., Any] | Array, *inputs: Array, **options: Any) -> Report:
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


def _linear_loss(
    rng: np.random.Generator, outputs: tuple[Array, ...]
) -> tuple[Callable[..., Array], Callable[..., Any]]:
    # Random cotangents, so that no error in an output cancels.
    bars = tuple(random_like(rng, y) for y in outputs)

    def value(*outputs: Array) -> Any:
        return sum(real_dot(y_bar, y) for y_bar, y in zip(bars, outputs, strict=True))

    return value, lambda *outputs: bars  # noqa: ARG005
