"""The texts about each operation in the documentation."""

from __future__ import annotations

from typing import NamedTuple


class Texts(NamedTuple):
    """The cells of one operation in the cheat sheet."""

    docs: str  # its inputs or its result, in one line
    singular: str  # where the derivative does not exist, and which error is raised there
    cost: str  # the cost of the VJP
    page: str  # of the documentation, without its extension
