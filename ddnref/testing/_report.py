"""Records of the measurements of checks, which print as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Direction(NamedTuple):
    """One directional derivative, by finite differences and from the function that is checked.

    Where the derivative is an array, the two numbers are its components along the analytic one.
    """

    name: str
    """Name of the direction."""
    numerical: float
    """The derivative by Richardson-extrapolated central differences."""
    analytic: float
    """``⟨x̄, D⟩`` from the VJP, or what the JVP returned."""
    error: float
    """``|numerical − analytic| / ‖x̄‖`` for a VJP; for a JVP relative to the analytic one, as in `check_jvp`."""
    order: float
    """Observed order of the differences; NaN where it cannot be seen."""


class Report(NamedTuple):
    """The measurements of `check_vjp` and `check_jvp`; ``str(report)`` is a table."""

    passed: bool
    """Whether every direction is within `rtol` and the structure holds."""
    error: float
    """The worst error over the directions."""
    direction: str
    """Name of the worst direction."""
    step: float
    """Length of the step; the smallest over the inputs."""
    order: float
    """Observed order of the central differences in that direction: 2 where the step is inside the smooth range,
    NaN where they agree to rounding and no order can be seen."""
    structure: float
    """``‖x̄ − x̄ᴴ‖ / ‖x̄‖`` for symmetric inputs of a VJP, which symmetric directions cannot see; else 0."""
    rtol: float
    """The tolerance that was asked for."""
    directions: tuple[Direction, ...]
    """Every direction that was tried."""

    def __str__(self) -> str:
        rows = [f"{'direction':<32}{'numerical':>24}{'analytic':>24}{'error':>10}{'order':>7}"]
        rows += [
            f"{d.name:<32}{d.numerical:>24.15e}{d.analytic:>24.15e}{d.error:>10.1e}{d.order:>7.2f}"
            for d in self.directions
        ]
        rows.append(
            f"{_verdict(self.passed)}: worst relative error {self.error:.1e} (tolerance {self.rtol:.0e}) in direction "
            f"{self.direction}, step {self.step:.1e}, order {self.order:.2f}, structure {self.structure:.1e}"
        )
        return "\n".join(rows)


class Pairing(NamedTuple):
    """The inner product of a cotangent with a derivative, in forward and in reverse mode."""

    name: str
    """Name of the direction."""
    forward: float
    """``⟨ȳ, J ẋ⟩`` from the JVP."""
    reverse: float
    """``⟨Jᵀ ȳ, ẋ⟩`` from the VJP."""
    error: float
    """``|forward − reverse| / (‖ȳ‖ ‖J ẋ‖)``."""


class TransposeReport(NamedTuple):
    """The measurements of `check_transpose`; ``str(report)`` is a table."""

    passed: bool
    """Whether every pairing is within `rtol`."""
    error: float
    """The worst error over the pairings."""
    direction: str
    """Name of the worst direction."""
    rtol: float
    """The tolerance that was asked for."""
    pairings: tuple[Pairing, ...]
    """Every pairing that was tried."""

    def __str__(self) -> str:
        rows = [f"{'direction':<32}{'forward':>24}{'reverse':>24}{'error':>10}"]
        rows += [f"{p.name:<32}{p.forward:>24.15e}{p.reverse:>24.15e}{p.error:>10.1e}" for p in self.pairings]
        rows.append(
            f"{_verdict(self.passed)}: worst relative error {self.error:.1e} (tolerance {self.rtol:.0e}) in direction "
            f"{self.direction}"
        )
        return "\n".join(rows)


def report_of(rows: Sequence[Direction], step: float, rtol: float, structure: float, structure_rtol: float) -> Report:
    """Judge the directions that were tried."""
    rows = rows or [Direction("none: nothing can move", 0.0, 0.0, 0.0, math.nan)]
    worst = max(rows, key=_badness)
    passed = all(row.error <= rtol for row in rows) and structure <= structure_rtol
    return Report(passed, worst.error, worst.name, step, worst.order, structure, rtol, tuple(rows))


def transpose_report_of(rows: Sequence[Pairing], rtol: float) -> TransposeReport:
    """Judge the pairings that were tried."""
    rows = rows or [Pairing("none: nothing can move", 0.0, 0.0, 0.0)]
    worst = max(rows, key=_badness)
    return TransposeReport(all(row.error <= rtol for row in rows), worst.error, worst.name, rtol, tuple(rows))


def _badness(row: Direction | Pairing) -> float:
    """Return the error, with NaN as the largest."""
    return math.inf if math.isnan(row.error) else row.error


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"
