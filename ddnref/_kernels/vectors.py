"""Inner products, norms and updates of vectors, in place where the library can.

A vector is one trailing axis, or several where `axes` says so. Two updates and two inner products are all that a step
of conjugate gradients does beside the product. NumPy's forms work in pieces that stay in cache and start no threads.
SciPy's BLAS would do the same in one call, but its pool of threads competes with NumPy's, and with two threads whole
solves took 8 to 16 times as long on an idle machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat
import numpy as np

from ddnref._core.arrays import (
    Array,
    as_dtype,
    conj,
    is_complex,
    namespace_of,
    power_of_two_below,
    real,
    real_dtype,
    with_axes,
)

LONG = 2**11  # numbers in a vector from which a separate step for each vector pays
PIECE = 2**15  # at 2**13 the number of calls shows: `figures.py --only krylov`, Laplacian, 1.37 there and 1.08 here
LONG_IN_PARTS = 2**13  # numbers in a vector from which a matrix would take half a gigabyte, see `in_parts`
PART = 2**16  # numbers in a part of many long vectors: 4 images of 128×128, which stay in the second-level cache
UNTHREADED = 2**13  # numbers of an inner product up to which OpenBLAS starts no threads; its own limit is 10,000


NUMPY = np.ndarray, np.generic  # numbers of one right-hand side are NumPy scalars


def column(x: Array, like: Array) -> Array:
    """Numbers ``(...)`` as factors of vectors ``(..., n)`` or ``(..., *shape)``, in their dtype."""
    return with_axes(as_dtype(x, like), like.ndim - x.ndim)


def as_complex(x: Array) -> Array:
    """`x` in the complex dtype of the same precision."""
    xp = array_api_compat.array_namespace(x)
    kind = xp.complex64 if real_dtype(xp, x.dtype) == xp.float32 else xp.complex128
    return xp.astype(x, kind, copy=False)


def alike(a: Array, b: Array) -> tuple[Array, Array]:
    """Make both complex if one is, because PyTorch's matrix product does not mix real and complex arrays."""
    if is_complex(a) == is_complex(b):
        return a, b
    xp = namespace_of(a)
    return (a, xp.astype(b, a.dtype)) if is_complex(a) else (xp.astype(a, b.dtype), b)


# --- inner products and norms ---------------------------------------------------------------------------------------


def dot(y: Array, z: Array, axes: int = 1) -> Array:
    """Inner product ``yᴴ z`` over `axes` trailing axes."""
    if type(y) is np.ndarray:
        if axes != 1:
            y, z = (v.reshape(*v.shape[: v.ndim - axes], -1) for v in (y, z))
        return _dot_in_pieces(y, z)
    return namespace_of(y).sum(conj(y) * z, axis=tuple(range(-axes, 0)))


def _dot_in_pieces(y: Array, z: Array) -> Array:
    """``yᴴ z`` by BLAS, without an array of products, in pieces for which BLAS starts no thread.

    A pool that has been used once spins for some 30 ms, and takes a core from whatever comes next. Measured on 256×256
    points with two threads: a threaded inner product alone takes half the time of this one, but conjugate gradients
    with it take 1.03 times as long for a blur and 1.22 times for a Laplacian.
    """
    n, k = y.shape[-1], y.shape[-1] // UNTHREADED
    if n <= UNTHREADED:
        return np.vecdot(y, z)
    cut = k * UNTHREADED
    whole = (v[..., :cut].reshape(*v.shape[:-1], k, UNTHREADED) for v in (y, z))
    return np.vecdot(*whole).sum(axis=-1) + np.vecdot(y[..., cut:], z[..., cut:])


def real_dot(y: Array, z: Array, axes: int = 1) -> Array:
    """Real part of the inner product, ``Re yᴴ z``."""
    product = dot(y, z, axes)
    return product.real if type(y) is np.ndarray else real(product)  # saves a call where there are many


def norm(y: Array, axes: int = 1) -> Array:
    """Euclidean norm; squares may leave the range of exponents, for which there is `safe_norm`."""
    return real_dot(y, y, axes) ** 0.5


def norm_of_pieces(pieces: Sequence[Array], axes: int) -> Array:
    """Euclidean norm of vectors whose entries are spread over several arrays, each with `axes` trailing axes."""
    xp = namespace_of(pieces[0])
    return xp.sqrt(real(xp.sum(xp.stack([dot(piece, piece, axes) for piece in pieces]), axis=0)))


def safe_norm(y: Array, axes: int = 1) -> Array:
    """Euclidean norm without overflow or underflow; infinity and NaN as they are."""
    xp = namespace_of(y)
    if 0 in y.shape:
        return xp.sum(xp.abs(y), axis=tuple(range(-axes, 0)))
    size = largest(y, axes)
    size = xp.where((size > 0) & xp.isfinite(size), size, xp.ones_like(size))
    return size * norm(y / column(size, y), axes)


def largest(y: Array, axes: int = 1) -> Array:
    """Largest absolute value of each vector; 0 for a vector without entries."""
    xp = namespace_of(y)
    # The standard has no maximum of nothing, but a sum.
    reduced = xp.sum if 0 in y.shape[y.ndim - axes :] else xp.max
    return reduced(xp.abs(y), axis=tuple(range(-axes, 0)))


def power_of_two(y: Array, axes: int = 1) -> Array:
    """The power of two below the largest entry of each vector, 1 for zero: dividing by it is exact."""
    return power_of_two_below(largest(y, axes))


def normalised(y: Array, size: Array) -> Array:
    """Each vector divided by its size; a zero size leaves the vector as it is."""
    xp = namespace_of(y)
    return y / column(size + xp.astype(size == 0, size.dtype), y)


def without_structure(shape: tuple[int, ...], like: Array) -> Array:
    """A fixed vector with entries between −1 and 1, without a pattern that an operator may annihilate."""
    xp = namespace_of(like)
    i = xp.arange(math.prod(shape), device=array_api_compat.device(like))
    kind = real_dtype(xp, like.dtype)
    angles = xp.astype(i * i % 6007, kind) + 0.5  # small numbers, which single precision holds exactly
    return xp.reshape(xp.astype(xp.cos(angles), like.dtype), shape)


# --- updates --------------------------------------------------------------------------------------------------------


def axpy(y: Array, go: Array, alpha: Array, x: Array) -> Array:
    """``y + α x`` where `go` is set and y elsewhere, bit for bit; on NumPy y itself, overwritten."""
    if type(y) is not np.ndarray:
        return namespace_of(y).where(with_axes(go, y.ndim - go.ndim), y + column(alpha, y) * x, y)
    n = y.shape[-1]
    if y.ndim == 1:
        if go:
            _add(y, alpha, x)
    elif n < LONG:
        np.add(y, alpha[..., None] * x, out=y, where=go[..., None])
    else:
        vectors = zip(y.reshape(-1, n), x.reshape(-1, n), np.ravel(go).tolist(), np.ravel(alpha).tolist(), strict=True)
        for vector, other, flag, factor in vectors:
            if flag:
                _add(vector, factor, other)
    return y


def _add(y: Array, alpha: Any, x: Array) -> None:
    """``y ← y + α x`` in pieces, so that the long vector is written once and not three times."""
    scratch = np.empty(min(PIECE, y.size), dtype=y.dtype)
    for i in range(0, y.size, PIECE):
        part = y[i : i + PIECE]
        np.add(part, np.multiply(x[i : i + PIECE], alpha, out=scratch[: part.size]), out=part)


def xpay(z: Array, beta: Array, p: Array) -> Array:
    """``z + β p``; on NumPy p itself, overwritten."""
    if type(p) is not np.ndarray:
        return z + column(beta, p) * p
    np.multiply(p, beta[..., None], out=p)
    np.add(p, z, out=p)
    return p


def quotient(a: Array, b: Array, ok: Array) -> Array:
    """``a / b`` where `ok`, 0 elsewhere; never a division by zero."""
    if isinstance(b, NUMPY):
        return np.where(ok, a / b, 0.0)  # without warnings inside a public function; takes a third of the time
    xp = namespace_of(a)
    return xp.where(ok, a / xp.where(ok, b, xp.ones_like(b)), xp.zeros_like(a))


def put_row(q: Array, j: int, row: Array) -> Array:
    """`q`, which only the caller holds, with row j replaced: in place wherever the library can.

    A fresh copy of the basis in each step of a Krylov method would cost as much as its orthogonalisation.
    """
    if array_api_compat.is_jax_array(q):
        return q.at[..., j, :].set(row[..., 0, :])
    q[..., j, :] = row[..., 0, :]
    return q


# --- loops over vectors -----------------------------------------------------------------------------------------------


def on_host(like: Array) -> bool:
    """Whether a number can be read without waiting for a device."""
    return bool(array_api_compat.is_numpy_array(like))


def keeps_shape(like: Array) -> bool:
    """Whether a loop should leave vectors on a grid in their shape, as it should on JAX.

    XLA fuses a stencil with the updates that follow only where no reshape is between: 0.75 of the time for a Laplacian.
    """
    return not array_api_compat.is_numpy_array(like)


def keeping_last(
    xp: Any, product: Callable[[Any, Array], Array], params: Any, shape: tuple[int, ...], target: tuple[int, ...]
) -> Callable[[Array], Array]:
    """``product(params, x)`` of vectors that are brought to `shape`, with the result in the shape `target`.

    On NumPy the last result stays allocated until the next exists. Freed before, it would go back to the system page
    by page. A blur of 256×256 points by conjugate gradients takes 1.17 times as long without this, of 512×512 points
    1.26 times.
    """
    last: list[Array] = [None]

    def apply(x: Array) -> Array:
        y = xp.reshape(product(params, xp.reshape(x, shape)), target)
        last[0] = y if type(y) is np.ndarray else None
        return y

    return apply


def in_parts(
    product: Callable[[Any, Array], Array], shape: tuple[int, ...], target: tuple[int, ...]
) -> Callable[[Any, Array], Array]:
    """``product(params, x)``, applied to a few of many long NumPy vectors of `shape` at a time.

    The intermediate results of a product then stay in the second-level cache: conjugate gradients with a user's blur
    of 64 images of 128×128 points take 1.3 times as long without this. Short vectors go through at once, because a
    matrix is then read once for all of them.
    """
    size = math.prod(shape)
    if min(size, math.prod(target)) < LONG_IN_PARTS:
        return product
    width = max(1, PART // size)

    def apply(params: Any, x: Array) -> Array:
        batch = x.shape[: x.ndim - len(shape)]
        count = math.prod(batch)
        if type(x) is not np.ndarray or count <= width:
            return product(params, x)
        x = x.reshape(count, *shape)
        images = [product(params, x[i : i + width]) for i in range(0, count, width)]
        return np.concatenate(images).reshape(*batch, *images[0].shape[1:])

    return apply
