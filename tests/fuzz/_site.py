"""The site at which a mutation is applied, and the mutated call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._targets import Problem, Target

NUMBERS = ("c", "damping", "eps")
"""Arguments that may be an array, one number for all items, or a Python number."""


class Hostile(NamedTuple):
    """A mutated call and what it must lead to."""

    arrays: tuple[Any, ...]
    options: dict[str, Any]
    what: str
    """For the report: which argument and how."""
    expect: str
    """A function of `_oracle`: ``same``, ``refused``, ``same_or_refused``, ``items``, ``others``, ..."""
    names: tuple[str, ...] = ()
    """Names of which the message of a refusal must mention one; any argument by default."""
    more: Any = None
    """Further data that the expectation needs."""


class Site(NamedTuple):
    """The target and problem to which a mutation is applied, with a random generator."""

    rng: np.random.Generator
    target: Target
    problem: Problem
    core: tuple[int, ...]
    """Axes of one item of each array."""
    batch: tuple[int, ...]

    def pick(
        self, accept: Callable[[Any], bool] = lambda a: True, floating: bool = True, ours: bool = True
    ) -> int | None:
        """One of the arrays that satisfy a condition."""
        names = self.target.names
        places = [
            i
            for i, a in enumerate(self.problem.arrays)
            if isinstance(a, np.ndarray)
            and accept(a)
            and not (floating and names[i] in self.target.integers)
            and not (ours and names[i] in self.target.theirs)
        ]
        return int(self.rng.choice(places)) if places else None

    def choice(self, values: Any) -> Any:
        values = list(values)
        return values[int(self.rng.integers(len(values)))]

    def replaced(self, i: int, value: Any, how: str, expect: str, **fields: Any) -> Hostile:
        arrays = self.problem.arrays
        name = self.target.names[i]
        fields = {"names": (name, *self.target.aliases.get(name, ())), **fields}
        return Hostile((*arrays[:i], value, *arrays[i + 1 :]), self.problem.options, f"{name}: {how}", expect, **fields)

    def all(self, change: Callable[[Any], Any], how: str, expect: str, **fields: Any) -> Hostile:
        arrays = tuple(map(change, self.problem.arrays))
        return Hostile(arrays, self.problem.options, f"all: {how}", expect, **fields)
