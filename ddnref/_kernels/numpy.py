"""In-place forms for NumPy arrays, each with a measured reason.

The standard forms in ``dense.py`` and ``eigh_vjp.py`` write a fresh m×m array in every step. On a CPU these passes over
memory, most of all the transposed ones, cost as much as the matrix products up to m = 512. Buffers that stay in cache
and tiles do not. ``tests/kernels/test_numpy.py`` compares every form here with its standard one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import scipy  # its parts are loaded where they are first used
from numpy.typing import NDArray

Array = NDArray[Any]

WHOLE = 256  # up to this width a matrix and its buffers stay in the second-level cache: no tiles needed
TILE = 128  # wider: antisymmetrise and divide in tiles
BLOCK = 256  # wider: block rows of the last product
STRIP = 64  # its width where only a few columns are multiplied, so that mirroring it costs the most
NARROW = 128  # up to this width OpenBLAS takes twice as long for A Bᵀ as for A B and a copy
CHUNK = 2**18  # numbers in a chunk of a batch, 256 matrices of 32×32: smaller ones wait for the interpreter's lock
BLAS_THREADS = 2**18  # multiplications from which OpenBLAS splits one product over threads
WORTH_THREADS = 2**16  # numbers in a batch from which a second thread pays for waking it


def adjoint(x: Array) -> Array:
    """Return the conjugate transpose, a view where `x` is real."""
    return np.conj(x.mT) if x.dtype.kind == "c" else x.mT


def _diagonal(x: Array) -> Array:
    """Return the diagonals of a contiguous batch of matrices as a writable view."""
    m = x.shape[-1]
    return x.reshape(*x.shape[:-2], m * m)[..., :: m + 1]


def _blocks(m: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, m)) for start in range(0, m, width)]


def threads() -> int:
    """Return how many threads a batch may use: the cores of this process, or fewer if OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


@lru_cache(maxsize=1)
def _pool(process: int, size: int) -> ThreadPoolExecutor:  # noqa: ARG001
    """Return a pool for this process: a forked child must not inherit its parent's."""
    return ThreadPoolExecutor(size, thread_name_prefix="ddnref")


def for_parts(run: Callable[[slice], None], count: int, m: int) -> None:
    """Call `run` on slices of a batch of `count` m×m matrices: chunks that stay in cache, on several threads.

    At (1000, 32) in float32, chunks on two threads take 0.5 of the time of the whole batch in one call. Wide matrices
    run as one part, because BLAS uses the threads itself there and the two pools would wait for each other.
    """
    if count * m * m < WORTH_THREADS:
        run(slice(0, count))
        return
    workers = threads() if m < WHOLE else 1
    parallel = workers > 1 and count > 1
    share = -(-count // workers) if parallel else count
    parts = _blocks(count, max(1, min(CHUNK // max(m * m, 1), share)))
    if not parallel:
        for part in parts:
            run(part)
        return
    # All threads, this one included, take the next part from one iterator until none is left.
    tasks = iter(parts)

    def work() -> None:
        for part in tasks:
            run(part)

    others = [_pool(os.getpid(), workers - 1).submit(work) for _ in range(min(workers, len(parts)) - 1)]
    work()
    for other in others:
        other.result()


def eigh(s: Array) -> tuple[Array, Array]:
    """Decompose a batch in parallel; an item on which LAPACK fails comes out as NaN and leaves the others alone.

    Each eigenvector is contiguous, as LAPACK stores it. Then no product of the VJP has the form ``A Bᵀ``, which is slow
    in OpenBLAS up to m = 128.
    """
    m = s.shape[-1]
    flat = s.reshape(math.prod(s.shape[:-2]), m, m)
    w, v_t = np.empty(flat.shape[:-1], dtype=flat.real.dtype), np.empty_like(flat)

    for_parts(partial(_eigh_part, flat, w, v_t), flat.shape[0], m)
    return w.reshape(s.shape[:-1]), v_t.reshape(s.shape).mT


def _eigh_part(flat: Array, w: Array, v_t: Array, part: slice) -> None:
    """Decompose a part of the batch.

    This is not a closure, because one that calls itself would keep the arrays alive until the garbage collector runs.
    """
    try:
        w[part], v = np.linalg.eigh(flat[part])
        v_t[part] = v.mT
    except np.linalg.LinAlgError:
        # NumPy does not say which item failed: try them one by one.
        if part.stop - part.start > 1:
            for item in _blocks(part.stop, 1)[part.start :]:
                _eigh_part(flat, w, v_t, item)
        else:
            w[part], v_t[part] = np.nan, np.nan


def eigh_largest(s: Array, k: int) -> tuple[Array, Array]:
    """Return the k largest eigenpairs of one matrix, descending, without computing the other eigenvectors.

    For k = 10 of m = 576 in float32 on one thread this takes 0.23 of the time of all pairs.
    """
    m = s.shape[-1]
    w, v = scipy.linalg.eigh(s, subset_by_index=(m - k, m - 1), check_finite=False)
    return w[::-1], v[:, ::-1]


def is_finite(s: Array) -> bool:
    """Return whether a matrix has neither NaN nor infinity."""
    return bool(np.isfinite(s).all())


def hermitian_product(a: Array, b: Array) -> Array:
    """Return ``A Bᴴ``, which is known to be Hermitian up to rounding, made exactly Hermitian.

    Of wide matrices only the lower block triangle is multiplied, then mirrored. At m = 1024 this takes 0.63 of the time
    of the full product, and saves the pass over memory that symmetrises it.
    """
    x = np.empty((*a.shape[:-1], a.shape[-2]), dtype=a.dtype)
    _hermitian_product(a, adjoint(b), x)
    return x


def _hermitian_product(a: Array, b_h: Array, x: Array, width: int = BLOCK) -> None:
    """Write the product to `x`, one block row at a time."""
    for rows in _blocks(a.shape[-2], width):
        np.matmul(a[..., rows, :], b_h[..., : rows.stop], out=x[..., rows, : rows.stop])
        # Symmetrise the diagonal block, and mirror what is left of it.
        block = x[..., rows, rows]
        block = block + adjoint(block)
        block *= 0.5
        x[..., rows, rows] = block
        for columns in _blocks(rows.start, TILE):
            x[..., columns, rows] = adjoint(x[..., rows, columns])


def symmetrised(x: Array) -> Array:
    """Return ``½ (X + Xᴴ)``, or `x` itself if it is Hermitian already, in tiles that stay in cache.

    At m = 2048 this takes 0.5 of the time of two passes, and 0.15 where nothing has to be written. For an iteration of
    a few products either is a large part of the whole.
    """
    tiles = list(combinations_with_replacement(_blocks(x.shape[-1], TILE), 2))
    if all(np.array_equal(x[..., i, j], adjoint(x[..., j, i])) for i, j in tiles):
        return x
    s = np.empty_like(x)
    for i, j in tiles:
        tile = x[..., i, j] / 2
        tile = tile + adjoint(x[..., j, i] / 2)
        s[..., i, j], s[..., j, i] = tile, adjoint(tile)
    return s


def hermitian_sum(b: Array, v: Array) -> Array:
    """Return ``B Vᴴ + V Bᴴ`` for a few columns as one product, exactly Hermitian.

    Writing the result is all that counts: this takes 0.2 to 0.8 of the time of two products per tile at m = 128…2048.
    """
    left, right_h = np.concatenate([b, v], axis=-1), adjoint(np.concatenate([v, b], axis=-1))
    if b.shape[-2] < NARROW:
        x = left @ (right_h / 2)
        return x + adjoint(x)
    x = np.empty((*b.shape[:-1], b.shape[-2]), dtype=b.dtype)
    for item in np.ndindex(b.shape[:-2]):
        _hermitian_product(left[item], right_h[item], x[item], STRIP)
    return x
