"""Define what a problem and a library are, and when a result counts as silently wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

THRESHOLD = {"float64": 1e-6, "float32": 1e-3}  # relative error above which a result is wrong
DTYPES = tuple(THRESHOLD)
INSTANCES = 100
MODULES = (
    "eigenspaces", "matrix_functions", "rectangular", "pencils", "operators", "systems", "programs", "networks",
)  # fmt: skip

Inputs = dict[str, Any]
"""Arrays by the name of the argument. "x" is differentiated; names with an underscore are for the oracle only."""


# --- libraries ----------------------------------------------------------------------------------------------------


class Library(NamedTuple):
    title: str
    framework: str
    """The framework whose arrays it takes, and in which ddnref is called to compare times."""
    distribution: str
    """The name under which it is installed."""


LIBRARIES = {
    "ddnref-torch": Library("ddnref, PyTorch", "torch", "ddnref"),
    "torch": Library("PyTorch", "torch", "torch"),
    "xitorch": Library("xitorch", "torch", "xitorch"),
    "POT": Library("POT", "torch", "POT"),
    "roma": Library("roma", "torch", "roma"),
    "cvxpylayers": Library("cvxpylayers", "torch", "cvxpylayers"),
    "curvlinops": Library("curvlinops", "torch", "curvlinops-for-pytorch"),
    "vivit": Library("vivit", "torch", "vivit-for-pytorch"),
    "ddnref-jax": Library("ddnref, JAX", "jax", "ddnref"),
    "jax": Library("JAX", "jax", "jax"),
    "lineax": Library("lineax", "jax", "lineax"),
    "optimistix": Library("optimistix + lineax", "jax", "optimistix"),
    "jaxopt": Library("jaxopt", "jax", "jaxopt"),
    "ott": Library("OTT", "jax", "ott-jax"),
    "qpax": Library("qpax", "jax", "qpax"),
    "matfree": Library("matfree", "jax", "matfree"),
    "ddnref-autograd": Library("ddnref, autograd", "autograd", "ddnref"),
    "autograd": Library("HIPS autograd", "autograd", "autograd"),
    "ddnref-tensorflow": Library("ddnref, TensorFlow", "tensorflow", "ddnref"),
    "tensorflow": Library("TensorFlow", "tensorflow", "tensorflow-cpu"),
}


# --- problems -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A quantity that several libraries compute, random instances of it, and the truth about them."""

    name: str
    title: str
    text: str
    """The loss and its instances, for the page."""
    draw: Callable[[np.random.Generator, str], Inputs]
    """Draw one instance for a dtype, in float64."""
    truth: Callable[[Inputs], np.ndarray]
    """Compute the result in extended precision, from inputs in extended precision."""
    large: Callable[[np.random.Generator], Inputs]
    """Draw the instance whose time is taken."""
    large_text: str
    hard: Callable[[], Inputs] | None = None
    """Make an instance without a result: no derivative exists there, or no solver can converge."""
    hard_text: str = ""
    symmetric: bool = False
    """Whether x is symmetric, so that only the symmetric part of its gradient means anything."""
    dtypes: tuple[str, ...] = DTYPES
    is_gradient: bool = True
    """Whether the result is the gradient of the loss, not the value of the function."""
    cells: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)

    def instances(self, dtype: str, count: int = INSTANCES) -> list[Inputs]:
        """Draw the instances of a dtype, rounded to it. They are the same in every run."""
        rng = np.random.default_rng(0)
        return [rounded(self.draw(rng, dtype), dtype) for _ in range(count)]

    def expected(self, inputs: Inputs) -> np.ndarray:
        """Compute the truth of an instance, from the rounded numbers that the libraries get."""
        return self.compared(self.truth(extended(inputs)))

    def compared(self, result: np.ndarray) -> np.ndarray:
        """Return the part of a result that is compared."""
        return (result + result.T) / 2 if self.symmetric else result


PROBLEMS: dict[str, Problem] = {}


def problem(**fields: Any) -> Problem:
    """Make a problem and register it under its name."""
    made = Problem(**fields)
    PROBLEMS[made.name] = made
    return made


def cell(library: str, *problems: Problem) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that imports a library and returns its loss, for one problem or several."""

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        for one in problems:
            one.cells[library] = build
        return build

    return register


def load_problems() -> Mapping[str, Problem]:
    """Import all groups of problems. No library is imported until one of its cells is built."""
    for module in MODULES:
        importlib.import_module(f"{__package__}.{module}")
    return PROBLEMS


def rounded(inputs: Inputs, dtype: str) -> Inputs:
    return {name: _floats_as(value, np.dtype(dtype)) for name, value in inputs.items()}


def extended(inputs: Inputs) -> Inputs:
    return {name: _floats_as(value, np.dtype(np.longdouble)) for name, value in inputs.items()}


def _floats_as(value: Any, dtype: np.dtype) -> Any:
    return value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


# --- verdicts -----------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """One call of a library."""

    value: np.ndarray | None
    """The result, or None where the call raised an error."""
    said: str = ""
    """The error, the warning, or the status of the library, where one says that something is wrong."""


def relative_error(value: np.ndarray, truth: np.ndarray) -> float:
    """Norm of the difference relative to the norm of the truth, computed in extended precision."""
    difference = np.asarray(value, dtype=truth.dtype) - truth
    return float(np.sqrt(np.sum(difference**2) / np.sum(truth**2)))


def verdict(outcome: Outcome, truth: np.ndarray, dtype: str) -> str:
    """Judge one call: "right", "silent", "nan" or "told".

    Silently wrong is a finite result whose relative error exceeds `THRESHOLD`, without an error, a warning or a status
    that says so. "told" is an error, or a wrong finite result with a warning or such a status. A result that is not
    finite is "nan", whatever was said.
    """
    if outcome.value is None:
        return "told"
    if not np.all(np.isfinite(outcome.value)):
        return "nan"
    if relative_error(outcome.value, truth) <= THRESHOLD[dtype]:
        return "right"
    return "told" if outcome.said else "silent"
