"""``python -m tests.fuzz --cases 20000 --seed 0``: run the campaign, print its findings, exit 1 if there are any."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

for name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{name}_NUM_THREADS", "1")

from . import _campaign  # noqa: E402
from ._all import targets  # noqa: E402
from ._planted import PLANTED, planted  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one, in this process")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--record", type=Path, help="write the table of the documentation there, if nothing is found")
    parser.add_argument("--planted", choices=PLANTED, help="run on a copy of a rule with a defect instead")
    parser.add_argument("--seconds", type=float, default=_campaign.SECONDS, help="after which a case counts as hanging")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = (planted(arguments.planted),) if arguments.planted else targets()
    if arguments.worker:
        numbers = [int(n) for n in sys.stdin.read().split(",")]
        _campaign.worker(arguments.seed, numbers, chosen, arguments.seconds)
        return 0
    if arguments.case is not None:
        case = _campaign.run_case(arguments.seed, arguments.case, chosen)
        print(case.line())
        return bool(case.finding)
    numbers = range(arguments.first, arguments.first + arguments.cases)
    command = [*_campaign.command(), "--seconds", str(arguments.seconds)]
    command += ["--planted", arguments.planted] if arguments.planted else []
    cases = _campaign.in_workers(arguments.seed, numbers, arguments.workers, command)
    findings = [case for case in cases if case.finding]
    for case in findings:
        print(case.line())
    if arguments.record is not None and not findings:
        arguments.record.write_text(_campaign.record(cases, len(chosen)), encoding="utf-8")
    print(f"{len(cases)} cases, {len(findings)} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
