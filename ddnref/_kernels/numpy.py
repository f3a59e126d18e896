"""In-place forms for NumPy arrays, each with a measured reason.

The standard forms in ``dense.py`` and ``eigh_vjp.py`` write a fresh m×m array in every step. On a CPU these passes over
memory, most of all the transposed ones, cost as much as the matrix products up to m = 512. Buffers that stay in cache
and tiles do not. ``tests/kernels/test_numpy.py`` compares every form here with its standard one.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import lru_cache, partial
from itertools import combinations_with_replacement, product
from typing import Any, TypeAlias

import numpy as np
import scipy  # its parts are loaded where they are first used

Array: TypeAlias = np.ndarray[Any, Any]

WHOLE = 256  # up to this width a matrix and its buffers stay in the second-level cache: no tiles needed
TILE = 128  # wider: antisymmetrise and divide in tiles
BLOCK = 256  # wider: block rows of the last product
STRIP = 64  # its width where only a few columns are multiplied, so that mirroring it costs the most
WIDE = 100  # from this order transposes are copied in strips
SLAB = 16  # rows of such a strip
NARROW = 128  # up to this width OpenBLAS takes twice as long for A Bᵀ as for A B and a copy
CHUNK = 2**18  # numbers in a chunk of a batch, 256 matrices of 32×32: smaller ones wait for the interpreter's lock
BLAS_THREADS = 2**18  # multiplications from which OpenBLAS splits one product over threads
WORTH_THREADS = 2**16  # numbers in a batch from which a second thread pays for waking it
WORTH_IN_LAPACK = 2**14  # the same for decompositions, which take 6 to 7 times as long per number as their VJP


def adjoint(x: Array) -> Array:
    """Return the conjugate transpose, a view where `x` is real."""
    return np.conj(x.mT) if x.dtype.kind == "c" else x.mT


def transposed(x: Array) -> Array:
    """Return a contiguous copy of the transposes.

    Large ones are written in strips that stay in cache: from order 128 they take 0.3 to 0.6 of the time.
    """
    if x.shape[-2] < WIDE:
        return np.array(x.mT, order="C")
    found = np.empty((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)
    for rows in _blocks(x.shape[-2], SLAB):
        found[..., rows] = x[..., rows, :].mT
    return found


def _diagonal(x: Array) -> Array:
    """Return the diagonals of a contiguous batch of matrices as a writable view."""
    m = x.shape[-1]
    return x.reshape(*x.shape[:-2], m * m)[..., :: m + 1]


def _blocks(m: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, m)) for start in range(0, m, width)]


def threads() -> int:
    """Return how many threads a batch may use: the cores of this process, or fewer if the user says so.

    The ways to say so are OMP_NUM_THREADS and, where PyTorch is loaded, ``torch.set_num_threads``, which its data
    loader calls in each of its processes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (told := getattr(sys.modules.get("torch"), "get_num_threads", None)) is not None:
        cores = min(cores, told())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


@lru_cache(maxsize=1)
def _pool(process: int, size: int) -> Any:  # noqa: ARG001
    """Return a pool for this process: a forked child must not inherit its parent's."""
    from concurrent.futures import ThreadPoolExecutor  # loads logging, a tenth of the time of ``import ddnref``

    return ThreadPoolExecutor(size, thread_name_prefix="ddnref")


def for_parts(run: Callable[[slice], None], count: int, m: int, worth: int = WORTH_THREADS) -> None:
    """Call `run` on slices of a batch of `count` m×m matrices: chunks that stay in cache, on several threads.

    Threads share the batch from `worth` numbers.

    At (1000, 32) in float32, chunks on two threads take 0.5 of the time of the whole batch in one call. Wide matrices
    run as one part, because BLAS uses the threads itself there.
    """
    if count * m * m < worth:
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

    # Each in a copy of this context, which has NumPy's setting for floating-point warnings.
    pool = _pool(os.getpid(), workers - 1)
    with _one_blas_thread(os.getpid()):
        others = [pool.submit(copy_context().run, work) for _ in range(min(workers, len(parts)) - 1)]
        work()
        for other in others:
            other.result()


class _OneBlasThread:
    """Hold OpenBLAS to one thread in the whole process, while any batch is shared between threads.

    Otherwise two threads that decompose 16 matrices of 128×128 start four, which wait for each other: on two cores that
    something else uses as well, 3 s instead of 24 ms. ``threadpoolctl`` finds the library. Its limits are not used,
    because only the thread that sets one can lift it, which need not be the last to finish.
    """

    def __init__(self) -> None:
        from threadpoolctl import ThreadpoolController

        self.lock, self.batches = threading.Lock(), 0
        self.before: tuple[int, ...] = ()
        self.libraries: list[tuple[Callable[[], int], Callable[[int], None]]] = []
        for found in ThreadpoolController().select(internal_api="openblas").lib_controllers:
            # NumPy's and SciPy's own copies decorate the names.
            for prefix, suffix in product(("", "scipy_"), ("", "64_", "_64")):
                get, set_ = (
                    getattr(found.dynlib, f"{prefix}openblas_{verb}_num_threads{suffix}", None)
                    for verb in ("get", "set")
                )
                if get is not None and set_ is not None:
                    self.libraries.append((get, set_))

    def __enter__(self) -> None:
        with self.lock:
            self.batches += 1
            if self.batches == 1:
                self.before = tuple(get() for get, _ in self.libraries)
                self._set((1,) * len(self.libraries))

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.batches -= 1
            if self.batches == 0:
                self._set(self.before)

    def _set(self, numbers: tuple[int, ...]) -> None:
        for (_, set_), number in zip(self.libraries, numbers, strict=True):
            set_(number)


@lru_cache(maxsize=1)
def _one_blas_thread(process: int) -> _OneBlasThread:  # noqa: ARG001
    """Return the hold of this process, as `_pool` does."""
    return _OneBlasThread()


def eigh(s: Array) -> tuple[Array, Array]:
    """Decompose a batch in parallel; an item on which LAPACK fails comes out as NaN and leaves the others alone.

    Each eigenvector is contiguous, as LAPACK stores it. Then no product of the VJP has the form ``A Bᵀ``, which is slow
    in OpenBLAS up to m = 128.
    """
    m = s.shape[-1]
    flat = s.reshape(math.prod(s.shape[:-2]), m, m)
    w, v_t = np.empty(flat.shape[:-1], dtype=flat.real.dtype), np.empty_like(flat)

    run = partial(_decompose_part, "eigh_lo", np.linalg.eigh, flat, (w, v_t.mT))
    for_parts(run, flat.shape[0], m, WORTH_IN_LAPACK)
    return w.reshape(s.shape[:-1]), v_t.reshape(s.shape).mT


def svd(a: Array) -> tuple[Array, Array, Array]:
    """Decompose a batch in parallel; an item on which LAPACK fails comes out as NaN and leaves the others alone."""
    *batch, m, n = a.shape
    k, count = min(m, n), math.prod(batch)
    flat = a.reshape(count, m, n)
    u, v_h = np.empty((count, m, k), a.dtype), np.empty((count, k, n), a.dtype)
    s = np.empty((count, k), a.real.dtype)

    public = partial(np.linalg.svd, full_matrices=False)
    run = partial(_decompose_part, "svd_s", public, flat, (u, s, v_h))
    for_parts(run, count, math.isqrt(m * n), WORTH_IN_LAPACK)
    return u.reshape(*batch, m, k), s.reshape(*batch, k), v_h.reshape(*batch, k, n)


def _decompose_part(name: str, public: Callable[..., Any], flat: Array, out: tuple[Array, ...], part: slice) -> None:
    """Write the factors of a part of the batch to `out`, by the driver `name`, or by NumPy's public function.

    This is not a closure, because one that calls itself would keep the arrays alive until the garbage collector runs.
    """
    driver = _driver(name) or public
    try:
        with np.errstate(all="ignore"):
            found = driver(flat[part])
    except np.linalg.LinAlgError:
        # NumPy does not say which item failed: try them one by one.
        if part.stop - part.start > 1:
            for item in _blocks(part.stop, 1)[part.start :]:
                _decompose_part(name, public, flat, out, item)
            return
        found = (np.nan,) * len(out)
    for factor, values in zip(out, found, strict=True):
        factor[part] = values


@lru_cache(maxsize=8)
def _driver(name: str) -> Any:
    """NumPy's ufunc around a driver of LAPACK; ``numpy.linalg`` converts single precision to double before it.

    An item that fails comes out as NaN. The module is not public: ``None`` where it has no such name.
    """
    return getattr(getattr(np.linalg, "_umath_linalg", None), name, None)


def eigh_largest(s: Array, k: int) -> tuple[Array, Array]:
    """Return the k largest eigenpairs of one matrix, descending, without computing the other eigenvectors.

    For k = 10 of m = 576 in float32 on one thread this takes 0.23 of the time of all pairs.
    """
    m = s.shape[-1]
    w, v = scipy.linalg.eigh(s, subset_by_index=(m - k, m - 1), check_finite=False)
    return w[::-1], v[:, ::-1]


def hermitian_product(a: Array, b: Array) -> Array:
    """Return ``A Bᴴ``, which is known to be Hermitian up to rounding, made exactly Hermitian.

    Of wide matrices only the lower block triangle is multiplied, then mirrored. At m = 1024 this takes 0.63 of the time
    of the full product, and saves the pass over memory that symmetrises it.
    """
    x = np.empty((*a.shape[:-1], a.shape[-2]), dtype=a.dtype)
    _product_rows(a, adjoint(b), x)
    return x


def _product_rows(a: Array, b_h: Array, x: Array, width: int = BLOCK) -> None:
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
        _product_rows(left[item], right_h[item], x[item], STRIP)
    return x
