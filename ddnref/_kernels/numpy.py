"""In-place forms for NumPy arrays, each the twin of a standard-only form and there for a measured reason.

The standard-only forms in ``_linalg.py`` and ``_eigh.py`` write a fresh m×m array for every step. On a CPU those
passes over memory, most of all the transposed ones, cost as much as the matrix products up to m = 512; buffers
that stay in cache and tiles do not. ``tests/kernels/test_numpy.py`` holds every form here to its twin.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
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
SMALL = 2**13  # numbers in a batch below which the fewest calls win
NARROW = 128  # up to this width OpenBLAS takes twice as long for A Bᵀ as for A B and a copy
CHUNK = 2**18  # numbers in a chunk of a batch, 256 matrices of 32×32: smaller ones wait for the interpreter's lock
BLAS_THREADS = 2**18  # multiplications from which OpenBLAS splits one product over threads
PANEL = 16  # rows of a product that stays below that up to m = 128
WORTH_THREADS = 2**16  # numbers in a batch from which a second thread pays for waking it


def adjoint(x: Array) -> Array:
    """Conjugate transpose; a view where `x` is real."""
    return np.conj(x.mT) if x.dtype.kind == "c" else x.mT


def _diagonal(x: Array) -> Array:
    """The diagonal of the matrices of a contiguous batch, as a writable view."""
    m = x.shape[-1]
    return x.reshape(*x.shape[:-2], m * m)[..., :: m + 1]


def _blocks(m: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, m)) for start in range(0, m, width)]


def threads() -> int:
    """Threads that a batch may use: the cores of this process, or fewer if OMP_NUM_THREADS asks for fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


@lru_cache(maxsize=1)
def _pool(process: int, size: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked child must not inherit the pool
    return ThreadPoolExecutor(size, thread_name_prefix="ddnref")


def for_parts(run: Callable[[slice], None], count: int, m: int) -> None:
    """Call `run` on slices of a batch of `count` m×m matrices: chunks that stay in cache, on several threads.

    Measured at (1000, 32) float32: chunks on two threads take 0.5 of the time of the batch at once. Wide matrices
    run as one part, because there BLAS uses the threads itself and the two would wait for each other.
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
    tasks = iter(parts)

    def work() -> None:
        for part in tasks:
            run(part)

    others = [_pool(os.getpid(), workers - 1).submit(work) for _ in range(min(workers, len(parts)) - 1)]
    work()
    for other in others:
        other.result()


def eigh(s: Array) -> tuple[Array, Array]:
    """LAPACK over a batch, in parallel; an item on which it fails comes out as NaN and leaves the others alone.

    Eigenvectors are stored one after the other, as LAPACK has them: then no product of the VJP is of the form
    ``A Bᵀ``, at which OpenBLAS is slow up to m = 128.
    """
    m = s.shape[-1]
    flat = s.reshape(math.prod(s.shape[:-2]), m, m)
    w, v_t = np.empty(flat.shape[:-1], dtype=flat.real.dtype), np.empty_like(flat)

    for_parts(partial(_eigh_part, flat, w, v_t), flat.shape[0], m)
    return w.reshape(s.shape[:-1]), v_t.reshape(s.shape).mT


def _eigh_part(flat: Array, w: Array, v_t: Array, part: slice) -> None:
    """Not a closure that calls itself: such a cycle would keep the arrays until the garbage collector comes."""
    try:
        w[part], v = np.linalg.eigh(flat[part])
        v_t[part] = v.mT
    except np.linalg.LinAlgError:
        if part.stop - part.start > 1:
            for item in _blocks(part.stop, 1)[part.start :]:
                _eigh_part(flat, w, v_t, item)
        else:
            w[part], v_t[part] = np.nan, np.nan


def eigh_largest(s: Array, k: int) -> tuple[Array, Array]:
    """The k largest eigenpairs of one matrix, descending, from LAPACK's reduction without the other eigenvectors.

    Measured for k = 10 of m = 576 in float32, one thread: 0.23 of the time of all.
    """
    m = s.shape[-1]
    w, v = scipy.linalg.eigh(s, subset_by_index=(m - k, m - 1), check_finite=False)
    return w[::-1], v[:, ::-1]


def is_finite(s: Array) -> bool:
    """Whether a matrix has neither NaN nor infinity."""
    return bool(np.isfinite(s).all())


def hermitian_product(a: Array, b: Array) -> Array:
    """``A Bᴴ``, known to be Hermitian up to rounding, made exactly so.

    Wide matrices: only the lower block triangle is multiplied, then mirrored. Measured at m = 1024: 0.63 of the
    time of the full product, and the pass over memory that symmetrises it is saved as well.
    """
    x = np.empty((*a.shape[:-1], a.shape[-2]), dtype=a.dtype)
    _hermitian_product(a, adjoint(b), x)
    return x


def _hermitian_product(a: Array, b_h: Array, x: Array, width: int = BLOCK) -> None:
    for rows in _blocks(a.shape[-2], width):
        np.matmul(a[..., rows, :], b_h[..., : rows.stop], out=x[..., rows, : rows.stop])
        block = x[..., rows, rows]
        block = block + adjoint(block)
        block *= 0.5
        x[..., rows, rows] = block
        for columns in _blocks(rows.start, TILE):
            x[..., columns, rows] = adjoint(x[..., rows, columns])


def symmetrised(x: Array) -> Array:
    """``½ (X + Xᴴ)`` of wide matrices, or `x` itself where it is Hermitian already, in tiles that stay in cache.

    Measured at m = 2048: 0.5 of the time of two passes, 0.15 where nothing has to be written. For an iteration of a
    few products either is a large part of the whole.
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
    """``B Vᴴ + V Bᴴ`` for a few columns as one product, exactly Hermitian.

    What is written is all that counts: measured at m = 128 to 2048, 0.2 to 0.8 of the time of two products a tile.
    """
    left, right_h = np.concatenate([b, v], axis=-1), adjoint(np.concatenate([v, b], axis=-1))
    if b.shape[-2] < NARROW:
        x = left @ (right_h / 2)
        return x + adjoint(x)
    x = np.empty((*b.shape[:-1], b.shape[-2]), dtype=b.dtype)
    for item in np.ndindex(b.shape[:-2]):
        _hermitian_product(left[item], right_h[item], x[item], STRIP)
    return x


def bordered(x: Array, y: Array) -> Array:
    """``[[−X, Y], [Yᵀ, 0]]``, each block written once: the standard form writes twice and converts before."""
    m, n = y.shape[-2:]
    a = np.empty((*x.shape[:-2], m + n, m + n), dtype=y.dtype)
    np.negative(x, out=a[..., :m, :m])
    a[..., :m, m:], a[..., m:, :m], a[..., m:, m:] = y, y.mT, 0
    return a


def with_diagonal(a: Array, d: Array) -> Array:
    """`a` itself with other leading diagonal entries: m numbers are written where the standard form writes m²."""
    _diagonal(a)[..., : d.shape[-1]] = d
    return a


def product_in_double(x: Array, y: Array) -> Array:
    """``X Y`` of float32 and float64, converted a matrix at a time: measured from m = 512 on, 0.5 of ``x @ y``."""
    if x.dtype == y.dtype or x.shape[-1] <= WHOLE:
        return x @ y
    product, a = np.empty(y.shape), np.empty(x.shape[-2:])
    for item in np.ndindex(x.shape[:-2]):
        np.copyto(a, x[item])
        np.matmul(a, y[item], out=product[item])
    return product


def dominant_solve(w: Array, y: Array, size: Array, right: Array, x: Array) -> tuple[Array, Array]:
    """``(λ_i I − X + 2 σ_i |λ_max| Y Yᵀ)⁻¹`` times the rows ``(items, n, r, m)``, and the items where that failed.

    Times ``σ_i = sign λ_i`` it is positive definite where Y spans all eigenvectors of larger magnitude than the rest.
    Cholesky's half of the flops, without pivots, in one buffer: measured at m = 32 to 1024, 0.3 to 0.7 of the time
    of `numpy.linalg.solve`. A failed item is not overwritten by anything useful.
    """
    blas, lapack = scipy.linalg.blas, scipy.linalg.lapack
    sign = np.where(w < 0, -1.0, 1.0)
    z = right * sign[..., None, None]
    a = np.empty(x.shape[-2:])
    diagonal, a_t, failed = _diagonal(a), a.T, []
    pairs = zip(x, y.mT, z.mT, sign.tolist(), np.abs(w).tolist(), (2 * size[:, 0]).tolist(), strict=True)
    for x_i, y_t, rows, signs, shifts, weight in pairs:
        info = 0
        for b, s, shift in zip(rows, signs, shifts, strict=True):
            np.multiply(x_i, -s, out=a)
            blas.dsyrk(weight, y_t, 1.0, a_t, trans=1, lower=1, overwrite_c=1)
            diagonal += shift
            info |= lapack.dposv(a_t, b, lower=1, overwrite_a=1, overwrite_b=1)[2]
        failed.append(info != 0)
    return z, np.asarray(failed)


def eigh_vjp(
    w_bar: Array | None, v_bar: Array, w: Array, v: Array, near: Array
) -> tuple[Array, tuple[Array, Array] | None]:
    """``X̄ = V (diag(λ̄) + ½ F ∘ (M − Mᴴ)) Vᴴ``, and the largest entries of ``M − Mᴴ`` inside clusters and of ``M``.

    `near` says which neighbouring eigenvalues count as equal. ``None`` comes back where no gauge is left to check:
    nothing was masked, and real eigenvectors have no phase.
    """
    cluster: Array | None = None
    if near.any():
        cluster = np.zeros(w.shape, dtype=np.int64)
        np.cumsum(~near, axis=-1, out=cluster[..., 1:])
    m, lead = w.shape[-1], w.shape[:-1]
    count = math.prod(lead)
    x_bar, masked, largest = np.empty(v.shape, v.dtype), np.zeros(lead, w.dtype), np.zeros(lead, w.dtype)
    kernel: Callable[..., None] = _whole if m <= WHOLE else _tiled
    vectors: tuple[Any, ...] = (w_bar, w, cluster)
    matrices: tuple[Any, ...] = (v_bar, v, x_bar)
    scalars: tuple[Any, ...] = (masked, largest)
    if len(lead) != 1:
        vectors = tuple(None if a is None else a.reshape(count, m) for a in vectors)
        matrices, scalars = tuple(a.reshape(count, m, m) for a in matrices), tuple(a.reshape(count) for a in scalars)

    def run(part: slice) -> None:
        with np.errstate(all="ignore"):  # non-finite items come out non-finite: that is their report
            kernel(*(None if a is None else a[part] for a in (*vectors, *matrices, *scalars)))

    for_parts(run, count, m)
    return x_bar, None if cluster is None and v.dtype.kind != "c" else (masked, largest)


def _product(a: Array, b: Array, out: Array) -> Array:
    """``A B``, by row panels where BLAS would split one product over threads that the batch is using already."""
    m, panel = b.shape[-1], PANEL
    if m**3 <= BLAS_THREADS or m >= WHOLE or m % panel or a.shape[0] * m * m < WORTH_THREADS // 2:
        return np.matmul(a, b, out=out)
    panels = (a.shape[0], m // panel, panel, m)
    np.matmul(a.reshape(panels), b[:, None], out=out.reshape(panels))
    return out


def _gap(w: Array, out: Array) -> Array:
    """``2 (λ_j − λ_i)``; for many as a product of rank two, exact like the subtraction and in a quarter of its time."""
    if out.size < SMALL:
        twice = 2 * w
        np.subtract(twice[..., None, :], twice[..., :, None], out=out)
        return out
    left, right = np.empty((*w.shape, 2), w.dtype), np.empty((*w.shape[:-1], 2, w.shape[-1]), w.dtype)
    np.multiply(w, -2, out=left[..., 0])
    left[..., 1] = right[..., 0, :] = 1
    np.multiply(w, 2, out=right[..., 1, :])
    return np.matmul(left, right, out=out)


def _whole(
    w_bar: Array | None,
    w: Array,
    cluster: Array | None,
    v_bar: Array,
    v: Array,
    x_bar: Array,
    masked: Array,
    largest: Array,
) -> None:
    """One pass for matrices that stay in cache: the sum with the adjoint comes last, from a buffer."""
    m_ = _product(adjoint(v), v_bar, np.empty(v.shape, v.dtype))
    gap = _gap(w, np.empty(v.shape, w.dtype))
    if cluster is not None:
        same = cluster[..., None, :] == cluster[..., :, None]
        masked[...] = np.max(np.abs(m_ - adjoint(m_)), axis=(-2, -1), initial=0, where=same)
        largest[...] = np.max(np.abs(m_), axis=(-2, -1), initial=0)
        gap[same] = np.inf
    else:
        if m_.dtype.kind == "c":
            masked[...] = np.max(2 * np.abs(_diagonal(m_).imag), axis=-1, initial=0)
            largest[...] = np.max(np.abs(m_), axis=(-2, -1), initial=0)
        _diagonal(gap)[...] = np.inf
    m_ /= gap
    if w_bar is not None:
        diagonal = _diagonal(m_)
        diagonal += 0.5 * w_bar
    t = _product(v, m_, gap if gap.dtype == v.dtype else np.empty(v.shape, v.dtype))
    v_h = adjoint(v)
    if v.shape[-1] <= NARROW:
        v_h = np.ascontiguousarray(v_h)  # as it is where `eigh` made it
    x = _product(t, v_h, m_)
    np.add(x, adjoint(x), out=x_bar)


def _tiled(
    w_bar: Array | None,
    w: Array,
    cluster: Array | None,
    v_bar: Array,
    v: Array,
    x_bar: Array,
    masked: Array,
    largest: Array,
) -> None:
    """Wide matrices: tiles in place, and only the lower block triangle of the last product."""
    m_ = np.matmul(adjoint(v), v_bar, out=x_bar)
    if cluster is not None or m_.dtype.kind == "c":
        largest[...] = np.max(np.abs(m_), axis=(-2, -1), initial=0)
    _antisymmetric_quotient(m_, w, cluster, masked)
    if w_bar is not None:
        diagonal = _diagonal(m_)
        diagonal += w_bar
    t = np.matmul(v, m_)
    _hermitian_product(t, adjoint(v), x_bar)


def _antisymmetric_quotient(m_: Array, w: Array, cluster: Array | None, masked: Array) -> None:
    """Overwrite ``M`` with ``½ (M − Mᴴ) ∘ F``, tile by tile, and `masked` with the largest entry taken out."""
    tiles: Iterable[tuple[slice, slice]] = combinations_with_replacement(_blocks(w.shape[-1], TILE), 2)
    for upper, lower in tiles:
        q = m_[..., lower, upper] - adjoint(m_[..., upper, lower])
        gap = 2 * (w[..., None, upper] - w[..., lower, None])
        same = None
        if cluster is not None:
            same = cluster[..., None, upper] == cluster[..., lower, None]
        elif lower == upper:
            same = np.broadcast_to(np.eye(q.shape[-1], dtype=bool), q.shape)
        if same is not None:
            np.maximum(masked, np.max(np.abs(q), axis=(-2, -1), initial=0, where=same), out=masked)
            gap[same] = np.inf
        q /= gap
        m_[..., lower, upper] = q
        if lower != upper:
            m_[..., upper, lower] = adjoint(q)
