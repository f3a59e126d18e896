"""Operators among the inputs of an operation, as bridges see them: flat arrays, and a hashable rest.

A framework differentiates with respect to arrays. An operator is taken apart into its parameters, which are arrays,
and what is left of it, pure functions and shapes, and put together again where the operation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ddnref._core.arrays import Array
from ddnref._rules.contract import Bound, Rule, inputs_of
from ddnref.operators import LinearOperator


class Layout(NamedTuple):
    """What each input is made of."""

    parts: tuple[LinearOperator | None, ...]
    """Operators without their parameters, and ``None`` for arrays."""
    counts: tuple[int, ...]
    """How many arrays each input is."""

    @property
    def plain(self) -> bool:
        """Whether there is no operator."""
        return all(part is None for part in self.parts)

    def select(self, positions: Sequence[int]) -> Layout:
        """The layout of some of the inputs; positions beyond the last are optional inputs that were not given."""
        given = [i for i in positions if i < len(self.parts)]
        return Layout(tuple(self.parts[i] for i in given), tuple(self.counts[i] for i in given))

    def places(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Where the arrays of these inputs are among all."""
        starts = [sum(self.counts[:i]) for i in range(len(self.counts) + 1)]
        return tuple(j for i in positions if i < len(self.counts) for j in range(starts[i], starts[i + 1]))

    def join(self, arrays: Sequence[Array]) -> Iterator[Any]:
        """The inputs again."""
        rest = iter(arrays)
        for part, count in zip(self.parts, self.counts, strict=True):
            own = tuple(next(rest) for _ in range(count))
            yield own[0] if part is None else part._replace(params=own)


def flatten(inputs: Sequence[Any]) -> tuple[Layout, tuple[Array, ...]]:
    """The inputs as a layout and arrays."""
    parts = tuple(x._replace(params=()) if isinstance(x, LinearOperator) else None for x in inputs)
    groups = [x.params if isinstance(x, LinearOperator) else (x,) for x in inputs]
    return Layout(parts, tuple(map(len, groups))), tuple(array for group in groups for array in group)


def refuse_foreign(rule: Rule, inputs: Sequence[Any], is_own: Callable[[Any], bool], wanted: str) -> None:
    """Raise ``TypeError`` for an input, or a parameter of an operator, that is no array of the bridge's library."""
    for parameter, x in zip(inputs_of(rule), inputs, strict=False):  # Python says where there are too many or too few
        params = x.params if isinstance(x, LinearOperator) else (x,)
        for i, array in enumerate(params):
            if not is_own(array):
                name = f"{parameter.name}.params[{i}]" if isinstance(x, LinearOperator) else parameter.name
                kind = f"{type(array).__module__}.{type(array).__qualname__}"
                raise TypeError(f"{name} is a {kind}; pass {wanted}: nothing else is converted.")


def on_arrays(bound: Bound, rule: Rule, layout: Layout) -> Bound:
    """A bound operation that takes the arrays of a layout, and gives a cotangent for each."""
    if layout.plain:
        return bound
    needed = layout.select(rule.needs)
    count = sum(needed.counts)

    def forward(*arrays: Array) -> Any:
        return bound.forward(*layout.join(arrays))

    def reverse(bars: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        results, inputs = arrays[: len(arrays) - count], arrays[len(arrays) - count :]
        return tuple(leaves(bound.reverse(bars, (*results, *needed.join(inputs)))))

    return bound._replace(forward=forward, reverse=reverse)


def leaves(bars: Any) -> Iterator[Array | None]:
    """Cotangents one after the other: those of an operator are a tuple."""
    for bar in bars:
        if isinstance(bar, tuple):
            yield from leaves(bar)
        else:
            yield bar
