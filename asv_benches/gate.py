"""A gate on figures that do not depend on the clock: work, memory, host reads, errors.

    python asv_benches/gate.py            # compare with gate.json, exit 1 where a figure got worse
    python asv_benches/gate.py --write    # record the present figures, after looking at why they changed

Work is counted, not timed: every matrix product that NumPy computes inside a derivative, in products of m×m matrices.
So an unchanged commit always passes and one extra product always fails, on any machine, however busy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from benchmarks import _accuracy as accuracy
from benchmarks import _iteration as iteration
from benchmarks import _work as work

RECORD = Path(__file__).with_name("gate.json")
FACTORS = {"products": 1.05, "extra arrays": 1.1, "host reads": 1.0, "error": 10.0}


def figures() -> dict[str, tuple[str, Callable[[], float]]]:
    """Each figure by name: its kind, which sets the factor, and how to measure it."""
    measured: dict[str, tuple[str, Callable[[], float]]] = {
        f"{name}_{mode}: products": ("products", partial(work.products, name, mode))
        for mode in ("vjp", "jvp")
        for name in work.names()
    }
    for dtype in ("float32", "float64"):
        extra = partial(accuracy.extra_arrays_of_vjp, work.M, dtype)
        measured[f"eigh_vjp: extra m×m arrays, {dtype}"] = ("extra arrays", extra)
    for throw in (False, True):
        measured[f"eigh_vjp: host reads, throw={throw}"] = ("host reads", partial(accuracy.host_reads, throw))
        reads = partial(iteration.host_reads, throw)
        measured[f"simultaneous_iteration_vjp: host reads, throw={throw}"] = ("host reads", reads)
    for method in iteration.IMPLICIT:
        error = partial(iteration.error_at_gap, 1e-2, method)
        measured[f"simultaneous_iteration_vjp: float32 error at gap 1e-2, {method}"] = ("error", error)
    measured["simultaneous_iteration_vjp: memory over the textbook's"] = (
        "extra arrays",
        partial(iteration.memory, 128, 4),
    )
    measured["eigh_vjp: error of a cluster's projector"] = (
        "error",
        lambda: float(np.max(accuracy.projector_errors("ddnref"))),
    )
    measured["spectral_function_vjp: error of tr(C X²)"] = ("error", accuracy.trace_of_square_error)
    return measured


def compare(now: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """List the figures that got worse than their factors allow or are not recorded, one line per figure."""
    kinds = {name: kind for name, (kind, _) in figures().items()}
    worse = [f"{name} is not recorded: run gate.py --write" for name in now if name not in recorded]
    for name in sorted(set(now) & set(recorded)):
        limit = recorded[name] * FACTORS[kinds[name]]
        if not now[name] <= limit:
            worse.append(f"{name}: {now[name]:.3g}, recorded {recorded[name]:.3g}, allowed {limit:.3g}")
    return worse


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the present figures in gate.json")
    options = parser.parse_args(arguments)
    now = {name: float(measure()) for name, (_, measure) in figures().items()}
    for name, value in now.items():
        print(f"{value:10.3g}  {name}")
    if options.write:
        RECORD.write_text(json.dumps(now, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    worse = compare(now, json.loads(RECORD.read_text(encoding="utf-8")))
    print("\n".join(worse) or "passed: no figure got worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
