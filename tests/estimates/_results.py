"""Estimates and true errors of many problems, the promise about them, and the rows of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LARGE = 100
"""Machine epsilons above which a true error is compared with its estimate."""


class Promise(NamedTuple):
    """The promise about an estimate where the true error is large and the result has converged."""

    half: float = 0.98
    """The share of estimates that are at least half of the true error."""
    tenth: float = 1.0
    """The share of estimates that are at least a tenth of it."""
    median: float = 10.0
    """The largest median of the estimate over the true error."""


ITERATIONS = Promise(tenth=0.995)
TRANSPORT = Promise(half=0.95)


class Results(NamedTuple):
    """One number for each result: a problem may have several, such as its eigenvalues, or none, if it is refused."""

    operation: str
    dtype: Any
    promise: Promise | None
    """``None`` where nothing is promised."""
    problem: np.ndarray
    """The number of the problem that the result belongs to."""
    error: np.ndarray
    """The true relative error, NaN for a problem that was refused."""
    estimate: np.ndarray
    converged: np.ndarray

    @property
    def refused(self) -> int:
        """Problems without a result."""
        return len(np.unique(self.problem[np.isnan(self.error)]))

    @property
    def unconverged(self) -> int:
        """Problems with a result that is marked as not converged."""
        return len(np.unique(self.problem[~np.isnan(self.error) & ~self.converged]))

    def ratios(self, converged: bool = True) -> np.ndarray:
        """Estimate over true error, where that error is large."""
        large = (self.converged == converged) & (self.error > LARGE * np.finfo(self.dtype).eps)
        with np.errstate(over="ignore"):
            return self.estimate[large] / self.error[large]

    def broken(self) -> list[str]:
        """Return what does not hold; among a few results a single one below half is no rate."""
        ratio, promise = self.ratios(), self.promise
        if promise is None or not len(ratio):
            return []
        found = {
            "half": np.sum(ratio < 0.5) > max(1, (1 - promise.half) * len(ratio)),
            "tenth": np.sum(ratio < 0.1) > (1 - promise.tenth) * len(ratio),
            "median": np.median(ratio) > promise.median,
            "NaN": np.any(np.isnan(ratio)),
        }
        return [name for name, is_broken in found.items() if is_broken]

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        ratio, other = self.ratios(), self.ratios(converged=False)

        def share(ratio: np.ndarray, least: float) -> str:
            return f"{100 * np.mean(ratio >= least):.1f} %" if len(ratio) else "–"

        return (
            self.operation,
            np.dtype(self.dtype).name,
            str(len(np.unique(self.problem))),
            str(self.refused),
            str(self.unconverged),
            str(len(ratio)),
            share(ratio, 0.5),
            share(ratio, 0.1),
            f"{np.median(ratio):.2g}" if len(ratio) else "–",
            f"{share(other, 0.5)} of {len(other)}" if len(other) else "–",
        )


HEADS = (
    "result", "precision", "problems", "refused", "not converged", "true error > 100 eps", "estimate ≥ half of it",
    "≥ a tenth", "median of estimate / error", "not converged: ≥ half",
)  # fmt: skip


def joined(parts: Sequence[Results]) -> Results:
    """Join results of the same operation, whose problems are numbered from zero in each part."""
    first, *_ = parts
    offsets = np.cumsum([0, *(part.problem.max(initial=-1) + 1 for part in parts)])
    problem = np.concat([part.problem + offset for part, offset in zip(parts, offsets, strict=False)])
    rest = (np.concat([np.asarray(getattr(part, name)) for part in parts]) for name in Results._fields[4:])
    return Results(*first[:3], problem, *rest)


def of_batch(operation: str, dtype: Any, promise: Promise | None, error: Any, estimate: Any, converged: Any) -> Results:
    """One result for each problem; infinite estimates of refused problems are not compared."""
    arrays = (np.asarray(a).reshape(-1) for a in (error, estimate, converged))
    error, estimate, converged = (a.astype(kind) for a, kind in zip(arrays, (float, float, bool), strict=True))
    return Results(operation, dtype, promise, np.arange(len(error)), error, estimate, converged)


def distance(x: np.ndarray, exact: np.ndarray, axes: int = 1) -> np.ndarray:
    """``‖x − exact‖ / ‖exact‖`` over the last axes, with a range of exponents in which no square is lost."""
    size = tuple(range(-axes, 0))
    norm = lambda a: np.sqrt(np.sum(np.square(a.astype(np.longdouble)), axis=size))
    length = norm(exact)
    return (norm(x - exact) / np.where(length > 0, length, 1)).astype(float)


def table(rows: Sequence[Results]) -> str:
    """Return a Markdown table with one row for each result and precision."""
    lines = [HEADS, ["---"] * len(HEADS), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
