"""The texts about each operation in README and documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Texts(NamedTuple):
    """The cells of one operation in the capability table."""

    docs: str  # its inputs or its result, in one line
    singular: str  # where the derivative does not exist, and which error is raised there
    cost: str  # the cost of the VJP


def capability_table(texts: Mapping[str, Texts]) -> str:
    """The table of README and documentation, in Markdown, with one row for each operation."""
    rows = [f"| `{name}`, `{name}_vjp` | {text.docs} | {text.cost} | {text.singular} |" for name, text in texts.items()]
    head = "| operation | differentiates | cost of the VJP | where it has no derivative |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"
