"""Cost of ``import ddnref`` above the imports of NumPy and SciPy themselves, in fresh processes that take turns."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import ddnref

from ._common import seconds

THEIRS = "import numpy, scipy"
OURS = "import ddnref"
FIRST_CALL = "import numpy, ddnref; ddnref.eigh(numpy.eye(2))"
"""Loads what ``import ddnref`` leaves for the first use: SciPy's LAPACK, array-api-compat's NumPy."""


def process_seconds(*programs: str) -> list[float]:
    """Median wall time of a fresh interpreter that runs each program, in turn, with its byte code in place."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    folders = [str(Path(ddnref.__file__).parents[1]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    times: list[list[float]] = [[] for _ in programs]
    for k in range(1 + max(2, round(10 * seconds()))):
        for program, taken in zip(programs, times, strict=True):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, env=environment)
            if k:  # the first round compiles
                taken.append(time.perf_counter() - start)
    return [median(taken) for taken in times]


class Startup:
    """Time of a fresh interpreter that imports, over one that imports NumPy and SciPy alone."""

    params = (OURS, FIRST_CALL)
    param_names = ("program",)
    unit = "ratio"
    timeout = 300

    def track_over_numpy_and_scipy(self, program: str) -> float:
        ours, theirs = process_seconds(program, THEIRS)
        return ours / theirs
