"""Hard problems with a known answer as targets: those of ``ddnref verify``, drawn by the campaign."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from ddnref._rules.contract import Rule
from ddnref._rules.table import RULES, TRIALS
from ddnref.verify._hard import HARD, OF_TORCH

from ._targets import Problem, Target

SINGLE, DOUBLE = (np.float32, np.complex64), (np.float64, np.complex128)


def hard_target(kind: str, rule: Rule) -> Target:
    """The target of one kind of problem for one rule, which the tests replace by a copy with an old fault."""
    make = HARD[kind][0]

    def draw(rng: np.random.Generator, batch: Any, m: int, is_complex: bool) -> Problem:
        dtype = (SINGLE if rng.integers(2) else DOUBLE)[is_complex]
        problem = make(rule, rng, dtype)
        return Problem(problem.arrays, {"problem": problem})

    return Target(
        f"{kind}: {rule.name}",
        lambda *arrays, problem: problem.call(*arrays),
        draw,
        ("a", "b", "c", "d", "e"),
        items=False,
        is_complex=TRIALS[rule.name].is_complex and kind not in OF_TORCH,
        kinds=(kind,),
    )


def hard_targets() -> list[Target]:
    torch = importlib.util.find_spec("torch") is not None
    kinds = {kind: names for kind, (_, names) in HARD.items() if torch or kind not in OF_TORCH}
    return [hard_target(kind, RULES[name]) for kind, names in kinds.items() for name in names]
