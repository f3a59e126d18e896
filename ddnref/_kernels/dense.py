"""Dense linear algebra for every array library: each function is specified once and dispatches to the best form.

NumPy's and CuPy's own forms are in ``numpy.py`` and ``cupy.py``; other libraries use the standard.
"""

from __future__ import annotations

import math
from functools import reduce
from operator import add

import array_api_compat
import numpy as np
from numpy.linalg import LinAlgError

from ddnref._core.arrays import Array, adjoint, double, full, is_true, nan_where
from ddnref._kernels import cupy as _cupy
from ddnref._kernels import numpy as _numpy

GRAM_PIECE = 2**22  # numbers of a factor that are converted to double precision at once: 32 MB


def infinity(like: Array) -> Array:
    """Return the number by which a quotient is divided where it is left out, of the dtype of real `like`.

    This is infinity. PyTorch 2.6 divides complex numbers by infinity to NaN, and gets a number near the largest one.
    """
    if array_api_compat.is_torch_array(like):
        from ddnref._kernels.torch_versions import infinity_of

        return full((), infinity_of(like.dtype), like)
    return full((), float("inf"), like)


def constant(x: Array) -> Array:
    """Return `x` as a constant for the frameworks that record derivatives."""
    if array_api_compat.is_torch_array(x):
        return x.detach()
    if array_api_compat.is_jax_array(x):
        import jax

        return jax.lax.stop_gradient(x)
    return x


def hermitian_part(x: Array) -> Array:
    """Return the Hermitian part ``½ (X + Xᴴ)``, exactly Hermitian."""
    x = x / 2  # first, so that the sum cannot overflow
    return x + adjoint(x)


def hermitian_product(a: Array, b: Array) -> Array:
    """Return ``A Bᴴ``, which is known to be Hermitian up to rounding, made exactly Hermitian."""
    if array_api_compat.is_numpy_array(a):
        return _numpy.hermitian_product(a, b)
    return hermitian_part(a @ adjoint(b))


def gram(v: Array) -> Array:
    """Return ``VᴴV`` of ``(..., D, n)``, exactly Hermitian, in double precision where the device has it.

    In single precision its eigenvalues would be right to ``eps * λ_1`` only, and half of those that are zero negative.
    A few rows at a time are converted, so that no second copy of V is held.
    """
    xp = array_api_compat.array_namespace(v)
    if 0 in v.shape[-2:] or double(xp, v[..., :1, :]).dtype == v.dtype:
        return hermitian_product(adjoint(v), adjoint(v))
    rows = max(GRAM_PIECE // max(1, math.prod(v.shape[:-2]) * v.shape[-1]), 1)
    pieces = (double(xp, v[..., i : min(i + rows, v.shape[-2]), :]) for i in range(0, v.shape[-2], rows))
    products = (hermitian_product(adjoint(piece), adjoint(piece)) for piece in pieces)
    return reduce(add, products)


def symmetrised(x: Array) -> Array:
    """Return ``½ (X + Xᴴ)``; on NumPy `x` itself if it is Hermitian already."""
    return _numpy.symmetrised(x) if array_api_compat.is_numpy_array(x) else hermitian_part(x)


def hermitian_sum(b: Array, v: Array) -> Array:
    """Return ``B Vᴴ + V Bᴴ`` for a few columns, exactly Hermitian."""
    if array_api_compat.is_numpy_array(b):
        return _numpy.hermitian_sum(b, v)
    if array_api_compat.is_jax_array(b):
        # XLA contracts the sum below with the products of small matrices, and what it rounds is not symmetric.
        xp = array_api_compat.array_namespace(b)
        return hermitian_part(xp.concat([b, v], axis=-1) @ adjoint(xp.concat([v, b], axis=-1)))
    x = b @ adjoint(v)
    return x + adjoint(x)


def eigh(s: Array) -> tuple[Array, Array]:
    """Return eigenvalues (ascending) and eigenvectors of exactly Hermitian `s`; items that are not finite give NaN."""
    if array_api_compat.is_numpy_array(s) and np.isfinite(s).all():
        return _numpy.eigh(s)  # without a further pass over memory
    xp = array_api_compat.array_namespace(s)
    finite = xp.all(xp.isfinite(s), axis=(-2, -1), keepdims=True)
    # Zeros replace items that are not finite, so that the others come out right.
    s, bad = xp.where(finite, s, xp.zeros_like(s)), xp.logical_not(finite)
    if array_api_compat.is_numpy_array(s):
        w, v = _numpy.eigh(s)
    elif array_api_compat.is_cupy_array(s):
        w, v = _cupy.eigh(s)
    elif array_api_compat.is_jax_array(s):
        w, v = xp.linalg.eigh(s, symmetrize_input=False)  # s is exactly Hermitian, and x + xᴴ could overflow
    else:
        w, v = xp.linalg.eigh(s)
    return nan_where(bad[..., 0], w), nan_where(bad, v)


def eigvalsh(s: Array) -> Array:
    """Return the eigenvalues of exactly Hermitian `s`, ascending; items that are not finite give NaN.

    NumPy converts float32 to float64 first. SciPy does not, and takes half the time on its own, but its separate pool
    of threads waits for NumPy's pool, which has just computed products: all eigenvalues of a network's Gram matrix
    (n = 576 and 1152, two threads) took 2.6 and 1.6 times as long with SciPy.
    """
    xp = array_api_compat.array_namespace(s)
    finite = xp.all(xp.isfinite(s), axis=(-2, -1), keepdims=True)
    s = xp.where(finite, s, xp.zeros_like(s))
    if array_api_compat.is_cupy_array(s):
        w = _cupy.eigvalsh(s)
    elif array_api_compat.is_jax_array(s):
        w = xp.linalg.eigvalsh(s, symmetrize_input=False)
    else:
        w = xp.linalg.eigvalsh(s)
    return nan_where(~finite[..., 0], w)


def eigh_largest(s: Array, k: int) -> tuple[Array, Array]:
    """Return the k largest eigenpairs of one exactly Hermitian matrix, descending; NaN where it is not finite."""
    xp = array_api_compat.array_namespace(s)
    # LAPACK can stop after the k pairs for a single matrix.
    if array_api_compat.is_numpy_array(s) and s.ndim == 2 and k < s.shape[-1] and is_true(xp.all(xp.isfinite(s))):
        return _numpy.eigh_largest(s, k)
    w, v = eigh(s)
    return xp.flip(w[..., -k:], axis=-1), xp.flip(v[..., -k:], axis=-1)


def svd(a: Array) -> tuple[Array, Array, Array]:
    """Return ``U``, ``s`` (descending) and ``Vᴴ`` of the thin decomposition; items that are not finite give NaN."""
    if 0 in a.shape:
        return _svd_of_nothing(a)
    if array_api_compat.is_numpy_array(a) and np.isfinite(a).all():
        return _numpy.svd(a)  # without a further pass over memory
    xp = array_api_compat.array_namespace(a)
    finite = xp.all(xp.isfinite(a), axis=(-2, -1), keepdims=True)
    # Zeros replace items that are not finite, so that the others come out right.
    a, bad = xp.where(finite, a, xp.zeros_like(a)), ~finite
    u, s, v_h = _numpy.svd(a) if array_api_compat.is_numpy_array(a) else xp.linalg.svd(a, full_matrices=False)
    return nan_where(bad, u), nan_where(bad[..., 0], s), nan_where(bad, v_h)


def _svd_of_nothing(a: Array) -> tuple[Array, Array, Array]:
    """Return the factors of no matrices, or of matrices without entries, which some libraries refuse."""
    *batch, m, n = a.shape
    k = min(m, n)
    u, s, v_h = (full((*batch, *shape), 0.0, a) for shape in ((m, k), (k,), (k, n)))
    return u, array_api_compat.array_namespace(a).abs(s), v_h


def matvec(a: Array, x: Array) -> Array:
    """Return ``A x`` for vectors ``(..., n)``."""
    return (a @ x[..., None])[..., 0]


def move_axis(x: Array, source: int, destination: int) -> Array:
    """Move an axis by ``permute_dims``, because PyTorch's vmap over grad has no rule for ``moveaxis``."""
    order = list(range(x.ndim))
    order.insert(destination % x.ndim, order.pop(source % x.ndim))
    return array_api_compat.array_namespace(x).permute_dims(x, tuple(order))


def outer(u: Array, v: Array) -> Array:
    """Return ``u vᵀ`` for vectors."""
    return u[..., :, None] * v[..., None, :]


def identity(n: int, like: Array) -> Array:
    """Return the n×n identity, of the dtype and on the device of `like`."""
    xp = array_api_compat.array_namespace(like)
    i = xp.arange(n, device=array_api_compat.device(like))
    return xp.astype(i[:, None] == i[None, :], like.dtype)


def qr(a: Array) -> tuple[Array, Array]:
    """Return the reduced QR factors of finite, tall ``(..., m, n)``; their signs depend on the library."""
    if array_api_compat.is_cupy_array(a):
        return _cupy.qr(a)
    q, r = array_api_compat.array_namespace(a).linalg.qr(a, mode="reduced")
    return q, r


def solve(a: Array, b: Array) -> Array:
    """Return ``A⁻¹ B`` of ``(..., n, n)`` and ``(..., n, k)`` with equal batch axes.

    Items with NaN or infinity, and those whose elimination meets a pivot that is exactly zero, come out as NaN and
    leave the others alone. A matrix that is singular only up to rounding is the caller's to notice. Reads nothing on
    the host.
    """
    xp = array_api_compat.array_namespace(a, b)
    if 0 in b.shape:
        return xp.zeros_like(b)
    finite = xp.all(xp.isfinite(a), axis=(-2, -1), keepdims=True)
    if not (array_api_compat.is_numpy_array(a) and finite.all()):  # saves a copy
        a = xp.where(finite, a, identity(a.shape[-1], a))
    x = _solve_finite(a, b)
    return nan_where(~(finite & xp.all(xp.isfinite(x), axis=(-2, -1), keepdims=True)), x)


def _solve_finite(a: Array, b: Array) -> Array:
    """Solve finite systems; exactly singular items come out as NaN or infinity."""
    xp = array_api_compat.array_namespace(a, b)
    if array_api_compat.is_torch_array(a):
        from ddnref._kernels import torch as _torch

        x, info = _torch.solve(a, b)
        return nan_where((info != 0)[..., None, None], x)
    if array_api_compat.is_cupy_array(a):
        return _cupy.solve(a, b)
    try:
        return xp.linalg.solve(a, b)
    except LinAlgError:  # NumPy gives up the whole batch without saying which item is singular
        if a.ndim == 2:
            return full(b.shape, float("nan"), b)
        # Solve one by one, so that only the singular items become NaN.
        alone = [_solve_finite(a[i, ...], b[i, ...]) for i in range(a.shape[0])]
        return xp.stack(alone)
