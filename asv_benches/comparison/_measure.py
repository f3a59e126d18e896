"""Measure cells: one process per problem and library, with the same inputs for all of a problem."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from benchmarks import ENVIRONMENT

from ._problem import DTYPES, LIBRARIES, Inputs, Problem, extended, rounded

ROOT = Path(__file__).parents[2]
AT_ONCE = 2  # processes that compute errors side by side; times are taken one process after another
LIMIT = 300  # seconds of CPU time for everything but times; a process that takes longer ends
PATIENCE = 4 * LIMIT  # seconds of wall time, for a process that waits
ROUNDS = 7
STEP = 1e-11  # of the differences of oracles, whose digits suffice for it, that tell second derivatives
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "POT_BACKEND_DISABLE_JAX": "1",  # POT imports every framework that it finds
    "POT_BACKEND_DISABLE_TENSORFLOW": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the system, so that growth can be seen again
}


class Task(NamedTuple):
    inputs: Inputs
    truth: np.ndarray


class Tasks(NamedTuple):
    """All that one process needs to know about a problem."""

    instances: dict[str, list[Task]]
    second: tuple[Task, np.ndarray] | None
    hard: Inputs | None
    large: Inputs


def tasks_of(problem: Problem, count: int) -> Tasks:
    """Draw the instances of a problem and compute the truth about them."""
    instances = {
        dtype: [Task(inputs, problem.expected(inputs)) for inputs in problem.instances(dtype, count)]
        for dtype in problem.dtypes
    }
    hard = rounded(problem.hard(), "float64") if problem.hard else None
    large = rounded(problem.large(np.random.default_rng(1)), "float64")
    return Tasks(instances, second_of(problem, instances[DTYPES[0]][0].inputs), hard, large)


def second_of(problem: Problem, inputs: Inputs) -> tuple[Task, np.ndarray] | None:
    """Return a direction and the derivative of the gradient along it, by central differences of the oracle."""
    if not problem.is_gradient:
        return None
    direction = np.random.default_rng(2).standard_normal(inputs["x"].shape)
    direction = problem.compared(direction)
    exact = extended(inputs)
    above, below = (problem.truth({**exact, "x": exact["x"] + step * direction}) for step in (STEP, -STEP))
    return Task(inputs, problem.compared((above - below) / (2 * STEP))), direction


class Worker:
    """A process that has measured the errors of one cell and waits to be told how long to take times."""

    def __init__(self, problem: str, library: str, tasks: Path) -> None:
        folders = [str(ROOT / "asv_benches"), str(ROOT)]
        environment = {**os.environ, **ENVIRONMENT, **QUIET, "PYTHONPATH": os.pathsep.join(folders)}
        command = [sys.executable, "-W", "ignore", "-m", f"{__package__}._worker", problem, library, str(tasks)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        line = self.process.stdout.readline()
        self.report: dict[str, Any] = json.loads(line) if line else {"missing": self._end()}

    def seconds(self, duration: float) -> float:
        """Return the median seconds of one call."""
        self.process.stdin.write(f"{duration}\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def _end(self) -> str:
        """Say how the library ended the process; a Python error is one of this harness and is raised."""
        code = self.process.wait()
        if code > 0:
            self.log.seek(0)
            raise RuntimeError(f"{' '.join(self.process.args)} failed:\n{self.log.read()}")
        slow = code in (-signal.SIGPROF, -signal.SIGALRM)
        return f"took longer than {LIMIT} s" if slow else f"ended the process by signal {-code}"


def with_partners(problem: Problem, libraries: Sequence[str]) -> list[str]:
    """Return the libraries and, for each, the call of ddnref that it is timed against, in the order of `LIBRARIES`."""
    wanted = {name for library in libraries for name in (library, partner(library)) if name in problem.cells}
    return [name for name in LIBRARIES if name in wanted]


def partner(library: str) -> str:
    return f"ddnref-{LIBRARIES[library].framework}"


def measure(problem: Problem, libraries: Sequence[str], count: int, duration: float) -> dict[str, dict[str, Any]]:
    """Measure the cells of a problem; a duration of zero takes no times."""
    with tempfile.TemporaryDirectory(prefix="ddnref-compare-") as folder:
        path = Path(folder) / "tasks"
        path.write_bytes(pickle.dumps(tasks_of(problem, count)))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            started = pool.map(lambda library: Worker(problem.name, library, path), libraries)
            workers = dict(zip(libraries, started, strict=True))
        try:
            cells = {library: dict(worker.report) for library, worker in workers.items()}
            running = {
                library: worker
                for library, worker in workers.items()
                if not worker.report.get("missing", worker.report.get("fails"))
            }
            if duration:
                add_times(cells, running, duration)
        finally:
            for worker in workers.values():
                worker.close()
    return cells


def add_times(cells: dict[str, dict[str, Any]], workers: dict[str, Worker], duration: float) -> None:
    """Take times in rounds, in which every process has its turn; a ratio compares two turns of one round."""
    for worker in workers.values():
        worker.seconds(duration)  # warm up
    order = list(workers)
    rounds = []
    for k in range(ROUNDS):
        rounds.append({library: workers[library].seconds(duration) for library in (order[::-1] if k % 2 else order)})
    for library in order:
        cells[library]["milliseconds"] = float(f"{1e3 * median(one[library] for one in rounds):.3g}")
        if partner(library) in workers and partner(library) != library:
            ratios = [one[library] / one[partner(library)] for one in rounds]
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            cells[library]["ratio"] = [round(float(value), 3) for value in (middle, low, high)]
