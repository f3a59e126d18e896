"""The matrix of operations, frameworks and transforms: what the tests found, as ``docs/matrix.md`` keeps it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ddnref._rules.table import RULES

FILE = Path(__file__).parents[1] / "docs" / "matrix.md"
COMMAND = (
    "python -m pytest tests/infrastructure/test_matrix.py tests/rules/test_rules.py tests/interop/test_tensorflow.py "
    "-k 'test_matrix or finite_differences' --all-frameworks --matrix-out docs/matrix.md"
)
HOLDS = "✓"

LIBRARIES = {"numpy": "NumPy", "array-api-strict": "array-api-strict", "torch": "PyTorch", "jax": "JAX"}
PAIR = "Plain arrays, no bridge"
FORWARD_AND_SECOND = ("jvp", "jacfwd", "linearize", "hessian", "reverse over reverse")
BRIDGES = {
    "PyTorch": ("first order", "batched", "vmap", "jacrev", "compile", *FORWARD_AND_SECOND),
    "JAX": ("first order", "batched", "vmap", "jacrev", "jit", *FORWARD_AND_SECOND),
    "HIPS autograd": ("first order", "batched", "make_jvp", "second order"),
    "TensorFlow": ("batched", "graph", "forward mode"),
}
SECTIONS: dict[str, tuple[str, ...]] = {
    PAIR: tuple(f"{name}{kind}" for name in LIBRARIES.values() for kind in ("", ", batched")),
    **BRIDGES,
}


class Cell(NamedTuple):
    section: str
    column: str
    operation: str


CELLS = tuple(
    Cell(section, column, name) for section, columns in SECTIONS.items() for name in RULES for column in columns
)
Outcomes = dict[Cell, str]
"""`HOLDS`, or how the operation refuses."""


def render(outcomes: Outcomes) -> str:
    """Markdown: a table for each section; refusals are numbered and listed below."""
    reasons = list(dict.fromkeys(outcomes[cell] for cell in CELLS if outcomes[cell] != HOLDS))
    lines = [f"Written by `{COMMAND}`. {HOLDS}: tested, and right."]
    for section, columns in SECTIONS.items():
        lines += ["", f"## {section}", "", f"| operation | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for name in RULES:
            found = [outcomes[Cell(section, column, name)] for column in columns]
            marks = [HOLDS if outcome == HOLDS else f"refused ({1 + reasons.index(outcome)})" for outcome in found]
            lines.append(f"| `{name}` | {' | '.join(marks)} |")
    lines += ["", "## Refused", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def parse(text: str) -> Outcomes:
    """The outcomes again."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    outcomes: Outcomes = {}
    section, columns = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| "):
            name, *marks = (part.strip() for part in line.strip("|").split("|"))
            if name == "operation":
                columns = marks
                continue
            for column, mark in zip(columns, marks, strict=True):
                number = re.fullmatch(r"refused \((\d+)\)", mark)
                outcomes[Cell(section, column, name.strip("`"))] = reasons[number[1]] if number else mark
    return outcomes


class Record:
    """Outcomes of the tests of one run."""

    def __init__(self) -> None:
        self.outcomes: Outcomes = {}

    def add(self, properties: Any) -> None:
        """Add the outcomes that a test has recorded, even in another process."""
        for name, value in properties:
            if name == "matrix":
                section, column, operation, outcome = value
                self.outcomes[Cell(section, column, operation)] = outcome

    def write(self, path: Path, exitstatus: int) -> str:
        """Write the file if all outcomes are known and green; return what to say."""
        missing = [cell for cell in CELLS if cell not in self.outcomes]
        if exitstatus or missing:
            return f"{path} is not written: {'tests failed' if exitstatus else f'{len(missing)} cells did not run'}"
        path.write_text(render(self.outcomes), encoding="utf-8")
        return f"{path} is written: {len(CELLS)} cells"
