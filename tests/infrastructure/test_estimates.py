"""Estimated errors against true ones: promises on fixed problems, the record, and wrong estimates that are found."""

import re
from pathlib import Path

import numpy as np
import pytest
from estimates._all import KINDS, measured, record
from estimates._results import ITERATIONS, Promise, of_batch

RECORD = Path(__file__).parents[2] / "docs" / "estimates.md"
PROBLEMS = {"direct": 120, "iterations": 48, "sinkhorn": 48} | dict.fromkeys(("minres", "gmres", "bicgstab"), 50)
"""Fewer where each problem is solved by itself in many digits, or nothing is promised."""


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_hold(kind):
    for row in measured(kind, seed=1, problems=PROBLEMS.get(kind, 200)):
        assert row.broken() == [], row.cells()
        assert len(row.ratios()) >= 4 or row.dtype is np.float32


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_hold_on_more_problems(kind):
    for row in measured(kind, seed=2, problems=400):
        assert row.broken() == [], row.cells()


def test_estimates_that_do_not_hold_are_found():
    error, yes = np.geomspace(1e-13, 1e-3, 400), np.ones(400, dtype=bool)
    some = np.arange(400) < 10
    for estimate, promise, broken in (
        (error, Promise(), []),
        (0.4 * error, Promise(), ["half"]),
        (np.where(some, 0.4, 1) * error, Promise(), ["half"]),
        (np.where(some, 0.4, 1) * error, Promise(half=0.95), []),
        (np.where(some[::-1] & ~np.roll(some[::-1], 1), 0.01, 1) * error, Promise(), ["tenth"]),
        (np.where(some[::-1] & ~np.roll(some[::-1], 1), 0.01, 1) * error, ITERATIONS, []),
        (11 * error, Promise(), ["median"]),
        (np.nan * error, Promise(), ["NaN"]),
        (0.4 * error, None, []),
    ):
        assert of_batch("any", np.float64, promise, error, estimate, yes).broken() == broken
    # What has not converged, is refused or small is counted, and not compared.
    row = of_batch("any", np.float64, Promise(), np.where(some, np.nan, error), 0 * error, some)
    assert (row.refused, row.unconverged, row.broken()) == (10, 390, [])
    assert of_batch("any", np.float64, Promise(), 1e-15 + 0 * error, 0 * error, yes).broken() == []


def test_the_record_in_the_documentation_is_of_this_measurement():
    command, *_ = text = RECORD.read_text(encoding="utf-8").strip().splitlines()
    head = (
        r"Recorded on \d{4}-\d\d-\d\d by `python -m tests.estimates --problems \d+ --seed \d+ --record .*`, with NumPy "
    )
    assert re.match(head, command)
    assert re.match(head, record([], 0, 1000))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text if line.startswith("| ")][2:]
    expected = [row.cells()[:2] for kind in KINDS for row in measured(kind, seed=0, problems=6)]
    assert [tuple(row[:2]) for row in rows] == expected
    assert all(int(row[2]) >= 1000 for row in rows)
