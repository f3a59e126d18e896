"""All kinds of problems, by the operation whose estimate they judge."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import numpy as np

from . import _iterations, _points, _systems, _transport
from ._results import Results, table

DTYPES = (np.float64, np.float32)
KINDS: dict[str, Callable[[np.random.Generator, int, Any], list[Results]]] = {
    **{kind: partial(_points.measured, kind) for kind in _points.KINDS},
    "direct": _systems.direct,
    "lsmr": _systems.least_squares,
    **{name: partial(_systems.on_request, name) for name in ("cg", "minres", "gmres", "bicgstab")},
    "iterations": _iterations.measured,
    "sinkhorn": _transport.measured,
}
"""``kind(rng, problems, dtype)`` draws problems and compares all estimates that they have."""


def measured(kind: str, seed: int, problems: int) -> list[Results]:
    """Return the rows of one kind in both precisions, from seeds that no other kind shares."""
    number = list(KINDS).index(kind)
    return [
        row
        for i, dtype in enumerate(DTYPES)
        for row in KINDS[kind](np.random.default_rng((seed, number, i)), problems, dtype)
    ]


def record(rows: list[Results], seed: int, problems: int) -> str:
    """The file that the documentation shows."""
    command = f"python -m tests.estimates --problems {problems} --seed {seed} --record docs/estimates.md"
    head = f"Recorded on {date.today()} by `{command}`, with NumPy {np.__version__}: {problems:,} problems of each "
    return f"{head}kind and precision.\n\n{table(rows)}"
