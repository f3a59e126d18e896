"""The command ``ddnref``. Exit codes: 0 success, 1 a check failed, 2 wrong usage or a missing dependency."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import ddnref
from ddnref.verify._backends import NAMES, MissingDependencyError, backend, require

DTYPES = ("float32", "float64", "complex64", "complex128")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except MissingDependencyError as error:  # one line that names the extra, not a traceback
        sys.stderr.write(f"ddnref: {error}\n")
        return 2


def _verify(arguments: argparse.Namespace) -> int:
    from ddnref.verify._run import verify

    dtypes = DTYPES if arguments.dtype == "all" else (arguments.dtype,)
    with backend(arguments.backend) as library:
        return 0 if verify(library, dtypes, arguments.seed) else 1


def _report(arguments: argparse.Namespace) -> int:
    require("docutils", "matplotlib", "sklearn", "threadpoolctl", extra="report", what="ddnref report")
    # The report is a later layer: load it by name, and only now, because Matplotlib takes a second to import.
    build = importlib.import_module("ddnref.report.build").build

    if arguments.record:
        require("torch", "jax", extra="torch,jax", what="ddnref report --record")
        if (arguments.backend, arguments.seed, arguments.full) != ("numpy", 0, False):
            sys.stderr.write(
                "ddnref: --record takes no --backend, --seed or --full: the record is of the default page\n"
            )
            return 2
    with backend(arguments.backend) as library:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.stderr.write(f"ddnref: the folder for the report cannot be made: {error}\n")
            return 2
        _, passed = build(library, arguments.out, arguments.seed, full=arguments.full, record=arguments.record)
    return 0 if passed else 1


def _gpu_record(arguments: argparse.Namespace) -> int:
    from ddnref.verify._gpu import record, shown

    for path in arguments.show or ():
        sys.stdout.write(shown(json.loads(path.read_text(encoding="utf-8"))))
    if arguments.show:
        return 0
    try:
        with backend("cupy") as library:
            return 0 if record(library, arguments.out) else 1
    except MissingDependencyError as error:
        sys.stderr.write(f"ddnref: no GPU was found, so nothing is recorded. {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ddnref", description=ddnref.__doc__)
    parser.add_argument("--version", action="version", version=f"ddnref {ddnref.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    verify = _command(commands, "verify", "check every VJP and JVP on this machine; exit code 1 when one is wrong")
    verify.add_argument("--dtype", choices=(*DTYPES, "all"), default="all", help="default: all four")
    verify.set_defaults(command=_verify)

    report = _command(
        commands, "report", "run the examples on real data and write one web page with pictures and numbers"
    )
    report.add_argument("--out", type=Path, default=Path("ddnref-report"), metavar="DIR",
                        help="folder for the page, pictures and CSV files (default: %(default)s)")  # fmt: skip
    report.add_argument("--full", action="store_true",
                        help="the declarative section at the tutorial's sizes and seeds: takes hours")  # fmt: skip
    report.add_argument("--record", action="store_true",
                        help="for developers: keep the figures of PyTorch and JAX for other machines")  # fmt: skip
    report.set_defaults(command=_report)

    summary = "measure this GPU with CuPy (tests, errors, host reads, times, bridges), and write one JSON file to send"
    gpu = commands.add_parser("gpu-record", help=summary, description=summary[0].upper() + summary[1:] + ".")
    gpu.add_argument("--out", type=Path, default=Path("ddnref-gpu.json"), metavar="FILE",
                     help="default: %(default)s")  # fmt: skip
    gpu.add_argument("--show", type=Path, nargs="+", metavar="FILE",
                     help="print these records as Markdown, and measure nothing")  # fmt: skip
    gpu.set_defaults(command=_gpu_record)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    command.add_argument("--backend", choices=NAMES, default="numpy", help="array library (default: numpy)")
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    return command


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; expected 0 or more")
    return seed


if __name__ == "__main__":
    sys.exit(main())
