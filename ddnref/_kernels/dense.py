"""What the operations need of linear algebra, specified once: NumPy's and CuPy's forms, or the standard."""

from __future__ import annotations

import array_api_compat
from numpy.linalg import LinAlgError

from ddnref._core.arrays import Array, conj, full, is_true, nan_where
from ddnref._kernels import cupy as _cupy
from ddnref._kernels import numpy as _numpy


def adjoint(x: Array) -> Array:
    """Conjugate transpose of the last two axes."""
    xp = array_api_compat.array_namespace(x)
    return conj(xp.matrix_transpose(x))


def hermitian_part(x: Array) -> Array:
    """``½ (X + Xᴴ)``, exactly Hermitian; halved first, so that it cannot overflow."""
    x = x / 2
    return x + adjoint(x)


def hermitian_product(a: Array, b: Array) -> Array:
    """``A Bᴴ``, known to be Hermitian up to rounding, made exactly so."""
    if array_api_compat.is_numpy_array(a):
        return _numpy.hermitian_product(a, b)
    return hermitian_part(a @ adjoint(b))


def symmetrised(x: Array) -> Array:
    """``½ (X + Xᴴ)``; on NumPy `x` itself where that is equal to it."""
    return _numpy.symmetrised(x) if array_api_compat.is_numpy_array(x) else hermitian_part(x)


def hermitian_sum(b: Array, v: Array) -> Array:
    """``B Vᴴ + V Bᴴ`` for a few columns, exactly Hermitian."""
    if array_api_compat.is_numpy_array(b):
        return _numpy.hermitian_sum(b, v)
    x = b @ adjoint(v)
    return x + adjoint(x)


def eigh(s: Array) -> tuple[Array, Array]:
    """Eigenvalues (ascending) and eigenvectors of exactly Hermitian `s`; NaN for its non-finite items alone."""
    xp = array_api_compat.array_namespace(s)
    finite = xp.all(xp.isfinite(s), axis=(-2, -1), keepdims=True)
    if array_api_compat.is_numpy_array(s) and finite.all():
        return _numpy.eigh(s)  # the rule: no further pass
    w, v = _eigh_finite(xp.where(finite, s, xp.zeros_like(s)))
    bad = xp.logical_not(finite)
    return nan_where(bad[..., 0], w), nan_where(bad, v)


def eigvalsh(s: Array) -> Array:
    """Eigenvalues alone of exactly Hermitian `s`, ascending; NaN for its non-finite items alone.

    NumPy computes those of float32 in float64. SciPy, which does not, takes half the time by itself, but has a pool of
    threads of its own, which waits for that of the products before: all eigenvalues of a network from its Gram matrix
    (n = 576 and 1152, two threads) took 2.6 and 1.6 times as long with it.
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
    """The k largest eigenpairs of one exactly Hermitian matrix, descending; NaN where it is not finite."""
    if array_api_compat.is_numpy_array(s) and s.ndim == 2 and k < s.shape[-1] and is_true(_numpy.is_finite(s)):
        return _numpy.eigh_largest(s, k)
    xp = array_api_compat.array_namespace(s)
    w, v = eigh(s)
    return xp.flip(w[..., -k:], axis=-1), xp.flip(v[..., -k:], axis=-1)


def _eigh_finite(s: Array) -> tuple[Array, Array]:
    xp = array_api_compat.array_namespace(s)
    if array_api_compat.is_numpy_array(s):
        return _numpy.eigh(s)
    if array_api_compat.is_cupy_array(s):
        return _cupy.eigh(s)
    if array_api_compat.is_jax_array(s):
        w, v = xp.linalg.eigh(s, symmetrize_input=False)  # s is exactly Hermitian, and x + xᴴ could overflow
    else:
        w, v = xp.linalg.eigh(s)
    return w, v


def matvec(a: Array, x: Array) -> Array:
    """``A x`` for vectors ``(..., n)``."""
    return (a @ x[..., None])[..., 0]


def move_axis(x: Array, source: int, destination: int) -> Array:
    """``moveaxis`` by a permutation: PyTorch's vmap over grad has no rule for the other."""
    order = list(range(x.ndim))
    order.insert(destination % x.ndim, order.pop(source % x.ndim))
    return array_api_compat.array_namespace(x).permute_dims(x, tuple(order))


def outer(u: Array, v: Array) -> Array:
    """``u vᵀ`` for vectors."""
    return u[..., :, None] * v[..., None, :]


def identity(n: int, like: Array) -> Array:
    """The n×n identity, of the dtype and on the device of `like`."""
    xp = array_api_compat.array_namespace(like)
    i = xp.arange(n, device=array_api_compat.device(like))
    return xp.astype(i[:, None] == i[None, :], like.dtype)


def qr(a: Array) -> tuple[Array, Array]:
    """Reduced factors of finite, tall ``(..., m, n)``; the signs are the library's."""
    if array_api_compat.is_cupy_array(a):
        return _cupy.qr(a)
    q, r = array_api_compat.array_namespace(a).linalg.qr(a, mode="reduced")
    return q, r


def solve(a: Array, b: Array) -> Array:
    """``A⁻¹ B`` of ``(..., n, n)`` and ``(..., n, k)`` with equal batch axes; NaN for its bad items alone.

    Bad are items with NaN or infinity and those whose elimination meets a pivot that is exactly zero: a matrix
    singular only up to rounding is for the caller to notice, from its condition. Reads nothing on the host.
    """
    xp = array_api_compat.array_namespace(a, b)
    if 0 in b.shape:
        return xp.zeros_like(b)
    finite = xp.all(xp.isfinite(a), axis=(-2, -1), keepdims=True)
    if not (array_api_compat.is_numpy_array(a) and finite.all()):  # where it is: no further copy
        a = xp.where(finite, a, identity(a.shape[-1], a))
    x = _solve_finite(a, b)
    return nan_where(~(finite & xp.all(xp.isfinite(x), axis=(-2, -1), keepdims=True)), x)


def _solve_finite(a: Array, b: Array) -> Array:
    """NaN or infinity in singular items: PyTorch's flag, CuPy's pivots, JAX's division by zero, NumPy's one by one."""
    xp = array_api_compat.array_namespace(a, b)
    if array_api_compat.is_torch_array(a):
        from ddnref._kernels import torch as _torch_lu

        x, info = _torch_lu.solve(a, b)
        return nan_where((info != 0)[..., None, None], x)
    if array_api_compat.is_cupy_array(a):
        return _cupy.solve(a, b)
    try:
        return xp.linalg.solve(a, b)
    except LinAlgError:  # for the whole batch, without saying which item
        if a.ndim == 2:
            return full(b.shape, float("nan"), b)
        alone = [_solve_finite(a[i, ...], b[i, ...]) for i in range(a.shape[0])]
        return xp.stack(alone)
