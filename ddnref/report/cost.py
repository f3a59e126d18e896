"""What passes through ``eigh`` cost, in time and memory, measured in processes of their own.

One process for one library: the thread pools of NumPy and PyTorch spin after a product and slow each other down. And
one process for times, another for memory: there malloc asks the system for every array, which takes time.

Memory is the growth of the address space, the peak over the call above what is in use before it. It is the same
measure for every library, where tracemalloc sees NumPy only; it is exact to a page and it repeats, where resident
memory (``ru_maxrss``, ``VmHWM``) starts at what the parent once had, hides what an allocator kept from earlier calls,
and is counted in batches of pages for each CPU. What a library keeps for good is not counted, such as the buffers of
its BLAS: they are there before the call.
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
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

import ddnref
from ddnref import reference

Call: TypeAlias = Callable[[], Any]
Size: TypeAlias = tuple[int, ...]
"""A batch of b matrices, m×m: ``(b, m)``, and what else a problem needs."""
Figures: TypeAlias = dict[tuple[str, Size], float]
"""By pass and size; what was skipped is not in it."""

PATIENCE = 8.0  # seconds that one call may be expected to take
REPEAT = 0.1  # seconds for which a call is repeated, and `LEAST` times unless that takes five times as long
LEAST = 3
LONG = 0.5  # seconds; a call that takes longer is not made to warm up: it was at a smaller size
THREADS = 1
_PINNED = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(THREADS)),
    "JAX_PLATFORMS": "cpu",
}
_NOTHING_KEPT = {  # malloc takes all but small change from the system and gives it back at once
    "MALLOC_MMAP_THRESHOLD_": "4096",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def seconds(
    library: str,
    sizes: Sequence[Size],
    patience: float = PATIENCE,
    *,
    least: int = LEAST,
    repeat: float = REPEAT,
    always: Sequence[str] = (),
) -> Figures:
    """Median time of every pass of a library at every size, growing; skips what is `expected` to exceed `patience`.

    Passes named in `always` are never skipped: what others are divided by. A library is a name in `PASSES`, or
    ``"module:function"``, a function of the size that returns the calls by name.
    """
    return _ask(_PINNED, ["seconds", library, sizes, patience, least, repeat, always])


def peaks(library: str, timed: Figures) -> Figures:
    """Peak memory of the passes of a library that were timed, in bytes; nothing where the system does not tell."""
    return _ask(_PINNED | _NOTHING_KEPT, ["peaks", library, _flat(timed)])


def expected(name: str, size: Size, known: Figures) -> float:
    """Seconds of a pass from its time at the largest size measured: no pass costs more than O(b m⁴)."""
    before = [other for one, other in known if one == name]
    if not before:
        return 0.0
    b, m = before[-1][:2]
    return known[name, before[-1]] * (size[0] / b) * (size[1] / m) ** 4


# --- the passes -------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Random symmetric matrices, their eigenpairs, and a cotangent of the eigenvectors, float32 as in the tutorial."""

    x: NDArray[Any]
    w: NDArray[Any]
    v: NDArray[Any]
    v_bar: NDArray[Any]


def problem(size: Size, seed: int = 0) -> Problem:
    """The same for every library."""
    b, m = size
    x, v_bar = np.random.default_rng(seed).standard_normal((2, b, m, m)).astype(np.float32)
    x = (x + np.swapaxes(x, -1, -2)) / 2
    return Problem(x, *ddnref.eigh(x), v_bar)


def _numpy(p: Problem) -> dict[str, Call]:
    return {
        "NumPy forward": partial(ddnref.eigh, p.x),
        "v1": partial(reference.eigh_vjp_v1, p.v_bar, p.x, p.w, p.v),
        "v2": partial(reference.eigh_vjp_v2, p.v_bar, p.w, p.v),
        "v3": partial(reference.eigh_vjp_v3, p.v_bar, p.w, p.v),
        "final": partial(ddnref.eigh_vjp, None, p.v_bar, p.w, p.v),
    }


def _torch(p: Problem) -> dict[str, Call]:
    import torch

    torch.set_num_threads(THREADS)
    x, v_bar = torch.tensor(p.x, requires_grad=True), torch.tensor(p.v_bar)
    v = torch.linalg.eigh(x)[1]
    return {
        "PyTorch forward": partial(torch.linalg.eigh, x),
        "PyTorch": partial(torch.autograd.grad, v, x, v_bar, retain_graph=True),
    }


def _jax(p: Problem) -> dict[str, Call]:
    import jax

    x, v_bar = jax.numpy.asarray(p.x), jax.numpy.asarray(p.v_bar)
    forward = jax.jit(lambda x: jax.numpy.linalg.eigh(x)[1])
    pull_back = jax.vjp(forward, x)[1]  # holds what the forward pass saved
    backward = jax.jit(lambda pull_back, v_bar: pull_back(v_bar))
    return {
        "JAX forward": lambda: jax.block_until_ready(forward(x)),
        "JAX": lambda: jax.block_until_ready(backward(pull_back, v_bar)),
    }


PASSES: dict[str, Callable[[Problem], dict[str, Call]]] = {"NumPy": _numpy, "PyTorch": _torch, "JAX": _jax}


def _calls(library: str, size: Size) -> dict[str, Call]:
    module, _, function = library.partition(":")
    if not function:
        return PASSES[library](problem(size))
    found: dict[str, Call] = getattr(importlib.import_module(module), function)(size)
    return found


# --- measuring --------------------------------------------------------------------------------------------------


def medians(calls: dict[str, Call], repeat: float = REPEAT, least: int = LEAST) -> dict[str, float]:
    """Median seconds of each call, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}

    def unfinished(taken: list[float]) -> bool:
        return sum(taken) < (repeat if len(taken) >= least else 5 * repeat)

    while names := [name for name, taken in times.items() if unfinished(taken)]:
        for name in names:
            times[name].append(_seconds(calls[name]))
    return {name: median(taken) for name, taken in times.items()}


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak(call: Call) -> int | None:
    """Bytes by which the address space grows during a call, at most; ``None`` where the system does not tell.

    The kernel's record of the largest address space cannot be reset. So pages that nobody may touch are added first,
    until the process is as large as it ever was, and any growth sets a new record.
    """
    gc.collect()
    before = _address_space()
    if before is None:
        return None
    unused = before.peak - before.now
    filler = mmap.mmap(-1, unused, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0) if unused else None
    call()
    after = _address_space()
    if filler is not None:
        filler.close()
    return None if after is None else after.peak - before.peak


class _Space(NamedTuple):
    peak: int
    now: int


def _address_space() -> _Space | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    kilobytes = {name: text.split()[0] for name, _, text in (line.partition(":") for line in lines) if name[:2] == "Vm"}
    if not {"VmPeak", "VmSize"} <= kilobytes.keys():
        return None
    return _Space(int(kilobytes["VmPeak"]) * 1024, int(kilobytes["VmSize"]) * 1024)


# --- the other process ------------------------------------------------------------------------------------------


def _ask(settings: dict[str, str], question: list[Any]) -> Figures:
    folders = [str(Path(ddnref.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-m", "ddnref.report.cost"]
    done = subprocess.run(
        command, input=json.dumps(question), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring {question[1]} ended with code {done.returncode}:\n{done.stderr}")
    return _figures(json.loads(done.stdout.splitlines()[-1]))


def _flat(figures: Figures) -> list[Any]:
    return [[name, size, value] for (name, size), value in figures.items()]


def _figures(flat: list[Any]) -> Figures:
    return {(name, tuple(size)): value for name, size, value in flat}


def _answer_seconds(
    library: str, sizes: Sequence[Sequence[int]], patience: float, least: int, repeat: float, always: Sequence[str]
) -> Figures:
    found: Figures = {}
    for size in map(tuple, sizes):
        calls = _calls(library, size)
        guess = {name: expected(name, size, found) for name in calls}
        wanted = {name: call for name, call in calls.items() if guess[name] <= patience or name in always}
        for name, call in wanted.items():
            if guess[name] <= LONG:
                call()
        found |= {(name, size): value for name, value in medians(wanted, repeat, least).items()}
    return found


def _answer_peaks(library: str, timed: list[Any]) -> Figures:
    known, found = _figures(timed), Figures()
    for size in dict.fromkeys(size for _, size in known):
        calls = _calls(library, size)
        for name in [name for name, other in known if other == size]:
            if known[name, size] <= LONG:
                calls[name]()  # compiled, and the BLAS has its buffers
            if (value := peak(calls[name])) is not None:
                found[name, size] = value
    return found


_ANSWERS: dict[str, Callable[..., Figures]] = {"seconds": _answer_seconds, "peaks": _answer_peaks}


def _main() -> None:
    kind, *options = json.load(sys.stdin)
    found = _ANSWERS[kind](*options)
    sys.stdout.write(f"\n{json.dumps(_flat(found))}\n")  # the last line: a library may have printed before


if __name__ == "__main__":
    _main()
