"""Measure the time and peak memory of calls in fresh processes, one library at a time.

The thread pools of NumPy and PyTorch keep spinning after a product and slow each other down, hence the processes.
Memory is measured in another process than time, because there malloc requests every array from the system, slowly.

Peak memory is the growth of the address space: its maximum during a call less its size before. This measure is the
same for every library, whereas tracemalloc sees NumPy only. It is exact to a page and reproducible, whereas resident
memory (``ru_maxrss``, ``VmHWM``) starts at the parent's peak, hides what an allocator kept from earlier calls and is
counted in batches of pages per CPU. Buffers that a library allocates once and keeps, such as those of its BLAS, exist
before the call and are not counted.
"""

from __future__ import annotations

import gc
import importlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import ddnref

Call: TypeAlias = Callable[[], Any]
Size: TypeAlias = tuple[int, ...]
"""A batch of b matrices, m×m, as ``(b, m)``, followed by any further numbers that define a problem."""
Passes: TypeAlias = Callable[[Size], dict[str, Call]]
Figures: TypeAlias = dict[tuple[str, Size], float]
"""Measured values by name of the pass and size; skipped passes are absent."""

PATIENCE = 8.0  # seconds: longest expected time of a call that is still made
REPEAT = 0.1  # seconds for which a call is repeated, at least `LEAST` times unless that takes five times as long
LEAST = 3
LONG = 0.5  # seconds: slower calls are not warmed up, since they ran at a smaller size before
THREADS = 1
PINNED = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(THREADS)),
    "JAX_PLATFORMS": "cpu",
}
NOTHING_KEPT = {  # malloc requests all but small blocks from the system and returns them at once
    "MALLOC_MMAP_THRESHOLD_": "4096",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "PYTHONMALLOC": "malloc",  # its own allocator would request a whole megabyte at times
}


def seconds(
    source: str,
    sizes: Sequence[Size],
    patience: float = PATIENCE,
    *,
    least: int = LEAST,
    repeat: float = REPEAT,
    always: Sequence[str] = (),
) -> Figures:
    """Return the median time of every pass at every size, skipping those `expected` to take longer than `patience`.

    `source` is ``"module:function"``, a function that takes a size and returns the calls by name. Sizes grow. The
    passes in `always` are never skipped, because others are divided by their time.
    """
    return _ask(PINNED, "seconds", source, sizes, patience, least, repeat, always)


def peaks(source: str, timed: Figures) -> Figures:
    """Return the peak memory in bytes of the passes that were timed; empty where the system does not provide it."""
    return _ask(PINNED | NOTHING_KEPT, "peaks", source, list(timed.items()))


def expected(name: str, size: Size, known: Figures) -> float:
    """Extrapolate the seconds of a pass from its largest measured size, at O(b m⁴), which no pass exceeds."""
    before = [other for one, other in known if one == name]
    if not before:
        return 0.0
    b, m = before[-1][:2]
    return known[name, before[-1]] * (size[0] / b) * (size[1] / m) ** 4


def peak(call: Call) -> int | None:
    """Return by how many bytes the address space grows at most during a call; ``None`` where that is unknown.

    The kernel's record of the largest address space cannot be reset. So pages that are never touched are mapped first,
    until the process is as large as that record; any further growth then sets a new one.
    """
    gc.collect()
    if (before := address_space()) is None:
        return None
    most, now = before
    filler = mmap.mmap(-1, most - now, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0) if most > now else None
    call()
    after = address_space()
    if filler is not None:
        filler.close()
    return None if after is None else after[0] - most


def address_space() -> tuple[int, int] | None:
    """Read the largest and the present size of this process's address space in bytes; ``None`` without ``/proc``."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    kilobytes = {name: text.split()[0] for name, _, text in (line.partition(":") for line in lines) if name[:2] == "Vm"}
    if not {"VmPeak", "VmSize"} <= kilobytes.keys():
        return None
    return int(kilobytes["VmPeak"]) * 1024, int(kilobytes["VmSize"]) * 1024


# --- the other process ------------------------------------------------------------------------------------------


def _ask(settings: dict[str, str], *question: Any) -> Figures:
    """Run this module in a fresh process, with the question on stdin and the answer in the last line of stdout."""
    folders = [str(Path(ddnref.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(folders)}
    command, given = [sys.executable, "-m", __name__], json.dumps(question)
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {question[1]} ended with code {done.returncode}:\n{done.stderr}")
    return _figures(json.loads(done.stdout.splitlines()[-1]))


def _figures(items: list[Any]) -> Figures:
    return {(name, tuple(size)): value for (name, size), value in items}  # JSON has made lists of all tuples


def _answer_seconds(passes: Passes, sizes: Any, patience: float, least: int, repeat: float, always: Any) -> Figures:
    found: Figures = {}
    for size in map(tuple, sizes):
        calls = passes(size)
        guess = {name: expected(name, size, found) for name in calls}
        times: dict[str, list[float]] = {name: [] for name in calls if guess[name] <= patience or name in always}
        for name in times:
            if guess[name] <= LONG:
                calls[name]()  # warm up
        # Take turns, so that a disturbance of the machine hits all passes alike.
        while names := [n for n, t in times.items() if sum(t) < (repeat if len(t) >= least else 5 * repeat)]:
            for name in names:
                start = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - start)
        found |= {(name, size): median(taken) for name, taken in times.items()}
    return found


def _answer_peaks(passes: Passes, timed: list[Any]) -> Figures:
    known, found = _figures(timed), Figures()
    for size in dict.fromkeys(size for _, size in known):
        calls = passes(size)
        for name in [name for name, other in known if other == size]:
            if known[name, size] <= LONG:
                calls[name]()  # compile, and let the BLAS allocate its buffers
            if (value := peak(calls[name])) is not None:
                found[name, size] = value
    return found


if __name__ == "__main__":
    kind, source, *options = json.load(sys.stdin)
    module, _, function = source.partition(":")
    answer = _answer_seconds if kind == "seconds" else _answer_peaks
    found = answer(getattr(importlib.import_module(module), function), *options)
    print(f"\n{json.dumps(list(found.items()))}")  # in a line by itself, because a library may have printed before
