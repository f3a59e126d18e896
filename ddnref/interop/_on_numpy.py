"""An operation and its derivatives on NumPy arrays, for the bridges that give first derivatives only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ddnref._core.arrays import Array
from ddnref._rules.binding import (
    ITERATE,
    NAN,
    NAN_TANGENT,
    Bound,
    Layout,
    bind,
    failed,
    failed_items,
    on_arrays,
    output_axes,
    own_axes,
    warn,
    widest,
)
from ddnref._rules.contract import Rule
from ddnref._rules.own import Own, implicit_function, own_function
from ddnref.implicit import ImplicitFunction
from ddnref.linalg import linear_solve


def own_on_numpy(operation: Callable[..., Any], options: dict[str, Any]) -> Own | None:
    """A function of a user with its derivatives; ``None`` for one of ddnref's operations."""
    if isinstance(operation, ImplicitFunction):
        return implicit_function(operation, partial(linear_solve, throw=False), options)
    return own_function(operation, **options) if "vjp" in options else None


def bind_on_numpy(rule: Rule, options: dict[str, Any]) -> Bound:
    """Bind options to an operation on NumPy arrays."""

    def notify(flags: Array) -> None:
        if np.any(flags):
            warn(ITERATE, rule.name, np.asarray(flags))

    return bind(rule, options, notify=notify)


class OnNumpy(NamedTuple):
    """A bound operation on the NumPy arrays of a layout."""

    forward: Callable[..., tuple[Array, ...]]
    """``forward(*inputs)`` returns outputs, saved arrays and the status of an iteration in one tuple."""
    reverse: Callable[..., tuple[Array | None, ...]]
    """``reverse(bars, arrays)`` gives the cotangents of the inputs, or ``()`` if all given ones are zero."""
    push: Callable[..., tuple[Array, ...]]
    """``push(dots, arrays)`` gives the tangents of the outputs, or ``()`` if all given ones are zero or ``None``."""


def on_numpy(rule: Rule, bound: Bound, layout: Layout) -> OnNumpy:
    """Return a bound operation on the arrays of a layout; its derivatives warn where they are NaN."""
    flat = on_arrays(bound, rule, layout)
    inputs, outputs = own_axes(rule, layout), output_axes(rule, layout)

    def forward(*arrays: Array) -> tuple[Array, ...]:
        return tuple(np.asarray(y) for group in flat.forward(*arrays) for y in group)

    def reverse(bars: tuple[Array, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        gradients = flat.reverse(tuple(map(_none_for_zeros, bars)), arrays)
        warn_of_nan(NAN, rule.name, gradients, inputs)
        return gradients

    def push(dots: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        tangents: tuple[Array, ...] = flat.push(tuple(map(_none_for_zeros, dots)), arrays)  # type: ignore[misc]
        warn_of_nan(NAN_TANGENT, rule.name, tangents, outputs)
        return tangents

    return OnNumpy(forward, reverse, push)


def _none_for_zeros(x: Array | None) -> Array | None:
    """These frameworks fill in zeros for what does not move or is not used; a derivative saves work at ``None``."""
    return x if np.any(x) else None


def warn_of_nan(message: str, name: str, found: tuple[Array | None, ...], axes: tuple[int | None, ...]) -> None:
    """Warn where a derivative is NaN because it does not exist; not for functions of a user, whose `axes` are empty."""
    if axes and any(x is not None and failed(x, n).any() for x, n in zip(found, axes, strict=False)):
        i = widest(found, axes)
        warn(message, name, None if found[i] is None else failed_items(failed(found[i], axes[i]), axes[i]))


def refuse_second_derivative(framework: str) -> Callable[..., Any]:
    """The derivative of a VJP or a JVP in a first-order bridge: it always raises."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"A second derivative was taken through ddnref's bridge to {framework}, which gives first derivatives "
            "only. The bridges to PyTorch and JAX give second ones."
        )

    return refuse
