"""Work for several processes: the matrices are drawn from the number of their block, so none travels."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ddnref

from ._common import kilobytes

HERE = str(Path(__file__).parents[1])


class Size(NamedTuple):
    blocks: int
    items: int
    m: int


def drawn(block: int, items: int, m: int) -> np.ndarray:
    x = np.random.default_rng(block).standard_normal((items, m, m))
    x += x.mT.copy()
    return x


def draw(_: Any, items: int = 0, m: int = 0, block_info: Any = None) -> np.ndarray:
    return drawn(block_info[None]["chunk-location"][0], items, m)


def loss(w: np.ndarray, v: np.ndarray) -> Any:
    """Loss of each item, from all eigenvalues and the projector on the last eigenvector, and its cotangents."""
    v_bar = np.zeros_like(v)
    v_bar[..., 0, -1] = 2 * v[..., 0, -1]
    return np.sum(w**3, axis=-1) + v[..., 0, -1] ** 2, (3 * w**2, v_bar)


def gradients(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w, v = ddnref.eigh(x)
    value, bars = loss(w, v)
    return value, ddnref.eigh_vjp(*bars, w, v)


# --- one process --------------------------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads of BLAS and of ddnref's batches, here and in processes started meanwhile.

    A process that is started imports the benchmarks' package, which sets what it is told.
    """
    from threadpoolctl import threadpool_limits

    names = ["DDNREF_BENCH_THREADS", *(f"{library}_NUM_THREADS" for library in ("OMP", "OPENBLAS", "MKL"))]
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        with threadpool_limits(count):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def every_block(size: Size) -> list[np.ndarray]:
    return [drawn(block, size.items, size.m) for block in range(size.blocks)]


def expected(data: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Values and gradients of all blocks, by one process with one thread."""
    return tuple(np.concatenate(parts) for parts in zip(*alone(data, 1), strict=True))


def differences(found: tuple[np.ndarray, ...], wanted: tuple[np.ndarray, ...]) -> int:
    """Numbers that are not the same bit by bit."""
    return sum(int(np.sum(a != b)) for a, b in zip(found, wanted, strict=True))


def alone(data: list[np.ndarray], count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    with threads(count):
        return [gradients(x) for x in data]


# --- processes ----------------------------------------------------------------------------------------------------


@contextmanager
def cluster(workers: int = 2) -> Iterator[Any]:
    """Processes of one thread each."""
    import dask
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(threads(1))  # what is set here goes before Dask's own setting, which is one, too
        sys.path.append(HERE)  # which workers take over; asv imports the package in another way
        stack.callback(sys.path.remove, HERE)
        stack.enter_context(dask.config.set({"distributed.comm.timeouts.connect": "120s"}))
        processes = LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=":0",
            memory_limit=0, local_directory=folder, silence_logs=logging.CRITICAL,
        )  # fmt: skip
        stack.enter_context(processes)
        client = stack.enter_context(Client(processes))
        client.run(gradients, drawn(0, 2, 3))  # imports are no part of any figure
        yield client


def matrices(size: Size) -> Any:
    import dask.array as da

    chunks = ((size.items,) * size.blocks, (size.m,), (size.m,))
    numbers = da.zeros(size.blocks * size.items, chunks=size.items)
    return numbers.map_blocks(
        draw, items=size.items, m=size.m, chunks=chunks, new_axis=[1, 2], dtype=float, meta=np.empty((0, 0, 0))
    )


def mapped(x: Any) -> tuple[Any, Any]:
    """Map under fresh names; otherwise Dask would return what the previous call has left on the workers."""
    from dask.graph_manipulation import clone

    from ddnref.interop.dask import map_gradients

    value, gradient = clone(*map_gradients(ddnref.eigh, loss, x), omit=x)
    return value, gradient


def left_there(client: Any, x: Any) -> None:
    """Values and gradients computed, in the memory of the workers."""
    from distributed import wait

    wait(client.persist(mapped(x)))


def fetched(x: Any) -> tuple[np.ndarray, np.ndarray]:
    import dask

    result: tuple[np.ndarray, np.ndarray] = dask.compute(*mapped(x))
    return result


def with_one_killed(client: Any, size: Size) -> tuple[np.ndarray, int, int]:
    """The gradients, how many blocks were done when a worker was killed, and how many of these were lost with it."""
    from distributed import as_completed, futures_of

    processes = client.run(os.getpid)
    gradient = client.persist(mapped(matrices(size))[1])
    blocks = futures_of(gradient)
    done = as_completed(blocks)
    for _ in range(len(blocks) // 3):
        next(done)
    held = [address for places in client.who_has(blocks).values() for address in places]
    victim = max(processes, key=held.count)
    os.kill(processes[victim], getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows kills by the latter
    return gradient.compute(), len(held), held.count(victim)


def peak_in_blocks(client: Any, size: Size) -> float:
    """Peak memory of the worker that needed most, above what it had before, in blocks of matrices."""

    before = client.run(kilobytes, "VmHWM")  # `getrusage` gives a child its parent's peak, if that is higher
    mapped(matrices(size))[1].sum().compute()
    after = client.run(kilobytes, "VmHWM")
    return 1024 * float(max(after[name] - before[name] for name in before)) / (8 * size.items * size.m**2)
