"""Checks of JVPs, yours or ours: against finite differences, and against the VJP of the same function.

The transpose identity ``⟨ȳ, J ẋ⟩ = ⟨Jᵀ ȳ, ẋ⟩`` needs no step and holds to rounding, but it cannot see an error that
both modes share. Finite differences see that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddnref._core.arrays import Array, as_tuple, namespace
from ddnref._kernels.public import public
from ddnref.testing._arguments import (
    COTANGENTS,
    TANGENTS_OF_OUTPUTS,
    check_call,
    check_outputs,
    check_returned,
    checked,
    forward_of,
)
from ddnref.testing._differences import (
    Moves,
    Parts,
    Tangent,
    check_double,
    compare_directions,
    default_step,
    norm,
    random_like,
    real_dot,
    size_of,
    tangent_spaces,
)
from ddnref.testing._report import Pairing, Report, TransposeReport, report_of, transpose_report_of

RTOL = 1e-7
TRANSPOSE_RTOL = 1e-12


@public
def check_jvp(
    f: Callable[..., Any],
    f_jvp: Callable[..., Any] | Array,
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
    """Check a JVP against finite differences.

    Parameters
    ----------
    f : callable
        ``f(*inputs)`` returns an array or a tuple of arrays. Bind options with ``functools.partial``. A function that
        ``differentiable`` of a bridge made is checked with its own derivatives: leave out `f_jvp`, `saves` and
        `needs`, and pass arrays of any library that the functions inside take.
    f_jvp : callable
        ``f_jvp(*tangents, *outputs, *saved, *needed inputs)`` returns one tangent per output. It is called with all
        tangents, and with ``None`` for all inputs but one.
    *inputs : arrays, float64 or complex128
    saves, needs, tangent, symmetrises, gap, step, seed
        As in `check_vjp`; `needs` names the inputs that `f_jvp` takes.
    loss : (value, gradient), optional
        ``value(*outputs)`` a real scalar, ``gradient(*outputs)`` its cotangents. Needed where outputs have a gauge.
        Then the tangents are paired with the gradient. By default they are compared as they are, which is stricter.
    directions : int
        Random directions for every input, and as many in which all inputs move.
    rtol : float
        Largest accepted error: the norm of the difference, over all outputs, relative to the root mean square of that
        of the tangents over the directions in which the same inputs move.

    Returns
    -------
    report : Report

    Raises
    ------
    TypeError
        An input is not float64 or complex128. `f_jvp` does not take the arguments that it would be given, or returned
        ``None``, something that is not an array, or another dtype.
    ValueError
        `f_jvp` returned a tangent of another shape, or too few.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.linspace(0.0, 1.0, 5)
    >>> bool(ddnref.testing.check_jvp(np.sin, lambda x_dot, y, x: np.cos(x) * x_dot, x, needs=(0,)).passed)
    True
    >>> bool(ddnref.testing.check_jvp(np.sin, lambda x_dot, y, x: np.sin(x) * x_dot, x, needs=(0,)).passed)
    False
    """
    f, (f_jvp,), inputs, saves, needs = checked(f, (f_jvp, *inputs), saves, needs, "jvp")
    # Validate inputs and tangent spaces before anything is computed.
    rng = np.random.default_rng(seed)
    moves = Moves(inputs, tangent_spaces(tangent, len(inputs)), symmetrises, directions)
    for i, x in enumerate(inputs):
        check_double(f"inputs[{i}]", x)
    forward = forward_of(f, saves)

    # Forward once, at the inputs as they are.
    outputs, saved = forward(*inputs)
    check_outputs("f", outputs)
    jvp = _checked_jvp(f_jvp, len(inputs), outputs, saved, tuple(inputs[i] for i in needs))
    bars = () if loss is None else as_tuple(loss[1](*outputs))

    # A loss reduces outputs and tangents to one number.
    def at(*arrays: Array) -> Parts:
        moved, _ = forward(*arrays)
        return moved if loss is None else (float(loss[0](*moved)),)

    def push(*tangents: Array | None) -> Parts:
        dots = jvp(*tangents)
        return dots if loss is None else (_pairing(bars, dots),)

    steps = [default_step(norm(x), gap) if step is None else step for x in inputs]
    rows = compare_directions(rng, moves, at, push, steps)
    return report_of(rows, min(steps, default=math.nan), rtol, structure=0.0, structure_rtol=0.0)


@public
def assert_jvp(f: Callable[..., Any], f_jvp: Callable[..., Any] | Array, *inputs: Array, **options: Any) -> Report:
    """Call `check_jvp`, and raise ``AssertionError`` with the whole table if the check fails.

    Parameters, return value and static errors are those of `check_jvp`.

    Examples
    --------
    >>> import numpy as np
    >>> report = ddnref.testing.assert_jvp(np.exp, lambda x_dot, y: y * x_dot, np.linspace(0.0, 1.0, 5))
    """
    report = check_jvp(f, f_jvp, *inputs, **options)
    if not report.passed:
        raise AssertionError(f"The JVP disagrees with finite differences.\n{report}")
    return report


@public
def check_transpose(
    f: Callable[..., Any],
    f_jvp: Callable[..., Any] | Array,
    f_vjp: Callable[..., Any] | Array | None = None,
    *inputs: Array,
    saves: bool = False,
    needs: Sequence[int] = (),
    loss: tuple[Callable[..., Array], Callable[..., Any]] | None = None,
    tangent: str | Tangent | tuple[str | Tangent, ...] = "dense",
    symmetrises: bool = False,
    directions: int = 8,
    rtol: float = TRANSPOSE_RTOL,
    seed: int = 0,
) -> TransposeReport:
    """Check that a JVP and a VJP are transposes of each other: ``Re ⟨ȳ, J ẋ⟩ = Re ⟨Jᴴ ȳ, ẋ⟩``.

    There is no step to choose, so the identity holds to rounding. It does not see an error that both share: use
    `check_vjp` or `check_jvp` for one of them.

    Parameters
    ----------
    f : callable
        ``f(*inputs)`` returns an array or a tuple of arrays, or a function that a bridge made, without `f_jvp` and
        `f_vjp`, as in `check_vjp`.
    f_jvp, f_vjp : callables
        As in `check_jvp` and `check_vjp`.
    *inputs : arrays, real or complex floating
    saves, needs, tangent, symmetrises, seed
        As in `check_vjp`; `needs` names the inputs that both functions take.
    loss : (value, gradient), optional
        Its gradient gives the cotangents. Needed where `f_vjp` refuses others, as at repeated eigenvalues. Default: new
        random cotangents for each direction.
    directions : int
        Random directions for every input, and as many in which all inputs move.
    rtol : float
        Largest accepted ``|⟨ȳ, J ẋ⟩ − ⟨Jᴴ ȳ, ẋ⟩| / (‖ȳ‖ ‖J ẋ‖)``. The rounding of an inner product is
        that of its terms. The inner product itself may be near zero by chance, as for a cotangent and a tangent that
        are nearly orthogonal, and then a right pair would have a large error relative to it.

    Returns
    -------
    report : TransposeReport

    Raises
    ------
    TypeError, ValueError
        As in `check_jvp` and `check_vjp`, except that single precision is accepted.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.linspace(0.0, 1.0, 5)
    >>> jvp, vjp = lambda x_dot, y: y * x_dot, lambda y_bar, y: y * y_bar
    >>> bool(ddnref.testing.check_transpose(np.exp, jvp, vjp, x).passed)
    True
    """
    arguments = (f_jvp, f_vjp, *inputs)
    f, (f_jvp, f_vjp), inputs, saves, needs = checked(f, arguments, saves, needs, "jvp", "vjp")
    rng = np.random.default_rng(seed)
    moves = Moves(inputs, tangent_spaces(tangent, len(inputs)), symmetrises, directions)
    for i, x in enumerate(inputs):
        namespace(**{f"inputs[{i}]": x})

    # Forward once. Both derivatives get the same outputs, saved arrays and inputs.
    outputs, saved = forward_of(f, saves)(*inputs)
    check_outputs("f", outputs)
    needed = tuple(inputs[i] for i in needs)
    jvp = _checked_jvp(f_jvp, len(inputs), outputs, saved, needed)
    given = None if loss is None else as_tuple(loss[1](*outputs))
    n_bars = len(outputs) if given is None else len(given)
    counts = {"cotangent(s)": n_bars, "output(s)": len(outputs), "saved array(s)": len(saved), "input(s)": len(needed)}
    check_call("f_vjp", f_vjp, counts, len(inputs))

    def vjp(bars: tuple[Array | None, ...]) -> tuple[Array, ...]:
        x_bars = as_tuple(f_vjp(*bars, *outputs, *saved, *needed))
        check_returned(COTANGENTS, x_bars, inputs)
        return x_bars

    x_bars = None if given is None else vjp(given)
    rows = []
    for group in moves.each_and_all(rng):
        for name, tangents in group:
            dots = jvp(*tangents)
            bars = given or tuple(random_like(rng, y) for y in outputs)
            pulled = x_bars or vjp(bars)
            # The rounding of both sides is relative to the norms.
            forward, reverse = _pairing(bars, dots), _pairing(tangents, pulled)
            size = _size(bars) * size_of(dots) or _size(tangents) * size_of(pulled)
            rows.append(Pairing(name, forward, reverse, abs(forward - reverse) / (size or 1.0)))
    return transpose_report_of(rows, rtol)


@public
def assert_transpose(
    f: Callable[..., Any],
    f_jvp: Callable[..., Any] | Array,
    f_vjp: Callable[..., Any] | Array | None = None,
    *inputs: Array,
    **options: Any,
) -> TransposeReport:
    """Call `check_transpose`, and raise ``AssertionError`` with the whole table if the check fails.

    Parameters, return value and static errors are those of `check_transpose`.

    Examples
    --------
    >>> import numpy as np
    >>> jvp, vjp = lambda x_dot, y: y * x_dot, lambda y_bar, y: y * y_bar
    >>> report = ddnref.testing.assert_transpose(np.exp, jvp, vjp, np.linspace(0.0, 1.0, 5))
    """
    report = check_transpose(f, f_jvp, f_vjp, *inputs, **options)
    if not report.passed:
        raise AssertionError(f"The JVP is not the transpose of the VJP.\n{report}")
    return report


def _checked_jvp(
    f_jvp: Callable[..., Any],
    n_inputs: int,
    outputs: tuple[Array, ...],
    saved: tuple[Array, ...],
    needed: tuple[Array, ...],
) -> Callable[..., tuple[Array, ...]]:
    """Return `f_jvp` as a function of the tangents, which checks what it returns."""
    counts = {
        "tangent(s)": n_inputs,
        "output(s)": len(outputs),
        "saved array(s)": len(saved),
        "input(s)": len(needed),
    }
    check_call("f_jvp", f_jvp, counts, n_inputs)

    def jvp(*tangents: Array | None) -> tuple[Array, ...]:
        dots = as_tuple(f_jvp(*tangents, *outputs, *saved, *needed))
        check_returned(TANGENTS_OF_OUTPUTS, dots, outputs)
        return dots

    return jvp


def _pairing(a: Sequence[Array | None], b: Sequence[Array | None]) -> float:
    """Real inner product of arrays, without the pairs of which one is ``None``."""
    return float(sum(real_dot(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None))


def _size(arrays: Sequence[Array | None]) -> float:
    return size_of([array for array in arrays if array is not None])
