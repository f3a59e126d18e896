"""``python -m tests.fuzz --cases 20000 --seed 0``: run the campaign, print its findings, end with 1 if there are any."""

from __future__ import annotations

import argparse
import os
import sys

for name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{name}_NUM_THREADS", "1")

from . import _campaign  # noqa: E402
from ._all import targets  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one, in this process")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--function", help="only this function")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = targets()
    if arguments.worker:
        _campaign.worker(arguments.seed, [int(n) for n in sys.stdin.read().split(",")], chosen)
        return 0
    if arguments.case is not None:
        case = _campaign.run_case(arguments.seed, arguments.case, chosen)
        print(case.line())
        return bool(case.finding)
    numbers = range(arguments.first, arguments.first + arguments.cases)
    cases = _campaign.in_workers(arguments.seed, numbers, arguments.workers, _campaign.command())
    findings = [case for case in cases if case.finding]
    for case in findings:
        print(case.line())
    print(f"{len(cases)} cases, {len(findings)} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
