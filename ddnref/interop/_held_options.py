"""Arrays that options hold, as operands of an operation, so that transformations see them.

A preconditioner or a start changes how a solution is found, not the solution. So its arrays have no gradient; but they
may depend on values that are differentiated or mapped, and a closure would carry such values past the transformation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddnref._core.arrays import Array
from ddnref._rules.binding import Bound, Layout, flatten, on_arrays
from ddnref._rules.contract import Rule
from ddnref.operators import LinearOperator

FUNCTIONS = ("preconditioner", "preconditioner_adjoint")
STARTS = ("x0", "y0")


def held_by(options: dict[str, Any]) -> tuple[tuple[str, ...], Layout, tuple[Array, ...]]:
    """The options that are arrays or operators, their layout and all their arrays."""
    names = tuple(
        name for name in (*FUNCTIONS, *STARTS)
        if isinstance(options.get(name), LinearOperator) or (name in STARTS and options.get(name) is not None)
    )  # fmt: skip
    return names, *flatten([options[name] for name in names])


def holding(bind_with: Callable[[tuple[Array, ...]], Bound], rule: Rule, layout: Layout, count: int) -> Bound:
    """A bound operation on the arrays of a layout, whose last `count` arrays are those that options hold."""

    def split(arrays: tuple[Array, ...]) -> tuple[Bound, tuple[Array, ...]]:
        cut = len(arrays) - count
        return on_arrays(bind_with(tuple(arrays[cut:])), rule, layout), tuple(arrays[:cut])

    def forward(*arrays: Array) -> Any:
        bound, rest = split(arrays)
        return bound.forward(*rest)

    def reverse(bars: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        bound, rest = split(arrays)
        return bound.reverse(bars, rest)

    def push(dots: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        bound, rest = split(arrays)
        return bound.push(dots[: len(dots) - count], rest)  # type: ignore[misc]

    return Bound(forward, reverse, push, None, None, None, lambda *_: None)
