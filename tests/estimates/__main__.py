"""``python -m tests.estimates --problems 1000``: measure every estimate, print the table, exit 1 if a promise fails."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

for name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{name}_NUM_THREADS", "1")

from ._all import KINDS, measured, record  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.estimates", description=__doc__)
    parser.add_argument("--problems", type=int, default=1000, help="of each kind and precision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="measure this kind alone")
    parser.add_argument("--record", type=Path, help="write the table of the documentation there")
    arguments = parser.parse_args()
    rows = []
    for kind in [arguments.only] if arguments.only else KINDS:
        for row in measured(kind, arguments.seed, arguments.problems):
            rows.append(row)
            print(*row.cells(), *(f"BROKEN: {what}" for what in row.broken()), sep=" | ", flush=True)
    if arguments.record is not None:
        arguments.record.write_text(record(rows, arguments.seed, arguments.problems), encoding="utf-8")
    return any(row.broken() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
