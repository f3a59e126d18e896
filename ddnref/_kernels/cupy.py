"""CuPy's own forms of the kernels, each with the reason why the standard function does not suffice.

cuSOLVER and cuBLAS report success in an array on the device. CuPy does not read it, because that would wait for the
GPU, and so returns numbers even for a singular matrix or one on which Jacobi's sweeps have not converged. Here every
result is judged on the device, and results that do not pass are NaN. Nothing is read on the host.

`lu_solve` calls cuBLAS by addresses, as CuPy's own solvers do, because CuPy has no batched solver that takes factors.
Everything else but `lu_factor` calls public functions of CuPy or the standard.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, eps, nan_where, with_axes
from ddnref._kernels.vectors import column, norm, normalised, power_of_two

EIGH_ITEMS = 2**19  # syevjBatched counts in 32 bits: it failed above a million matrices (cupy issue 7261)
EIGH_ENTRIES = 2**27  # of one call: its copy, its eigenvectors and its workspace are a few GiB at most
RESIDUAL = 10  # · m · eps · ‖S‖_F: LAPACK's is below 1, eigenvalues that are just the diagonal (issue 4847) about 1/eps
BATCHED_LU = 2**16  # matrices · this >= n²: one call for the batch, as CuPy's own heuristic has it; else one by one


# --- eigenvalues -------------------------------------------------------------------------------------------------


def eigh(s: Array) -> tuple[Array, Array]:
    """Return eigenvalues and eigenvectors of finite, exactly Hermitian `s`; NaN for items on which cuSOLVER fails.

    Results are judged by ``‖S V − V Λ‖``, at the price of one product beside a decomposition that costs ten or more.
    """
    xp = array_api_compat.array_namespace(s)
    m, items = s.shape[-1], math.prod(s.shape[:-2])
    step = max(1, min(EIGH_ITEMS, EIGH_ENTRIES // max(m, 1) ** 2))
    if s.size > 0 and items <= step:
        return _judged(s, *xp.linalg.eigh(s))
    w, v = xp.zeros((items, m), dtype=xp.real(s).dtype), xp.zeros((items, m, m), dtype=s.dtype)
    # Large batches go in parts that cuSOLVER can index and the memory can hold.
    flat = xp.reshape(s, v.shape)
    for start in range(0, items if m else 0, step):
        chosen = slice(start, min(start + step, items))
        part = flat[chosen, ...]
        w[chosen, :], v[chosen, ...] = _judged(part, *xp.linalg.eigh(part))
    return xp.reshape(w, s.shape[:-1]), xp.reshape(v, s.shape)


def eigvalsh(s: Array) -> Array:
    """Return eigenvalues alone: those of a batch with their vectors, which judge them, those of one matrix without.

    One matrix is judged by ``Σ λ² = ‖S‖²_F``. The difference is the square of what was not diagonalised, so that a
    remainder below ``√(10 m eps) ‖S‖_F`` is not seen.
    """
    if s.ndim > 2 or s.size == 0:
        return eigh(s)[0]
    xp = array_api_compat.array_namespace(s)
    w = xp.linalg.eigvalsh(s)
    # Scale first, so that no square leaves the range.
    scale = with_axes(power_of_two(s, 2), 2)
    size = norm(s / scale, 2) ** 2
    left = xp.abs(size - xp.sum((w / scale[..., 0]) ** 2, axis=-1))
    return nan_where(~(left <= RESIDUAL * s.shape[-1] * eps(xp, s.dtype) * size)[..., None], w)


def _judged(s: Array, w: Array, v: Array) -> tuple[Array, Array]:
    """Replace eigenpairs with a large residual by NaN."""
    scale = with_axes(power_of_two(s, 2), 2)
    s, scaled = s / scale, w / scale[..., 0]
    residual = norm(s @ v - v * scaled[..., None, :], 2)
    failed = ~(residual <= RESIDUAL * s.shape[-1] * eps(array_api_compat.array_namespace(s), s.dtype) * norm(s, 2))
    return nan_where(failed[..., None], w), nan_where(failed[..., None, None], v)


# --- Cholesky ----------------------------------------------------------------------------------------------------


def cholesky(a: Array) -> Array:
    """Return lower factors of finite, exactly Hermitian `a`; NaN where cuSOLVER met a pivot that is not positive.

    What it leaves behind there is not specified, so factors are judged by ``‖A − L Lᴴ‖``, at the price of one product.
    """
    xp = array_api_compat.array_namespace(a)
    l_ = xp.tril(xp.linalg.cholesky(a))
    # Scale first, so that no square leaves the range.
    scale = with_axes(power_of_two(a, 2), 2)
    root = scale**0.5
    residual = norm(a / scale - (l_ / root) @ xp.conj(xp.matrix_transpose(l_ / root)), 2)
    allowed = RESIDUAL * a.shape[-1] * eps(xp, a.dtype) * norm(a / scale, 2)
    return nan_where(~(residual <= allowed)[..., None, None], l_)


# --- linear systems ----------------------------------------------------------------------------------------------


def lu_factor(a: Array) -> tuple[Array, Array]:
    """Return packed factors and pivots, counted from 0, of finite ``(..., n, n)``.

    ``cupyx.scipy.linalg.lu_factor`` takes one matrix, reads two flags on the host, and warns if it is singular.
    """
    xp = array_api_compat.array_namespace(a)
    if a.size == 0:
        return xp.zeros_like(a), xp.zeros(a.shape[:-1], dtype=xp.int32)
    # The function with which CuPy's slogdet factors a batch: stored by columns, no flag read.
    from cupy.linalg._decomposition import _lu_factor

    lu_t, pivots, _ = _lu_factor(xp.matrix_transpose(a), a.dtype)
    return xp.matrix_transpose(lu_t), pivots - 1


def lu_solve(lu: Array, pivots: Array, b: Array, adjoint: bool) -> Array:
    """Return ``A⁻¹ B`` or ``A⁻ᴴ B`` of ``(..., n, k)``, not empty, with the batch axes of the factors.

    ``cupyx.scipy.linalg.lu_solve`` takes one matrix and reads a flag on the host.
    """
    from cupy.cuda import cublas, cusolver, device

    xp = array_api_compat.array_namespace(lu, b)
    n, k = b.shape[-2:]
    items = math.prod(b.shape[:-2])
    # Copies in LAPACK's order, with exactly these shapes and dtypes, because cuBLAS is given addresses.
    lu_t = _copy(xp.matrix_transpose(lu), (items, n, n), lu.dtype)
    x_t = _copy(xp.matrix_transpose(b), (items, k, n), lu.dtype)
    swaps = _copy(pivots, (items, n), xp.int32) + 1
    kind = {"f": "s", "d": "d", "F": "c", "D": "z"}[lu.dtype.char]
    trans = cublas.CUBLAS_OP_C if adjoint else cublas.CUBLAS_OP_N
    if items * BATCHED_LU >= n * n:
        info = np.zeros(1, dtype=np.int32)  # on the host; reports illegal arguments only
        f, x = _addresses(lu_t), _addresses(x_t)
        getrs = getattr(cublas, f"{kind}getrsBatched")
        getrs(device.get_cublas_handle(), trans, n, k, f.data.ptr, n, swaps.data.ptr, x.data.ptr, n, info.ctypes.data,
              items)  # fmt: skip
    else:
        info = xp.zeros((1,), dtype=xp.int32)
        getrs = getattr(cusolver, f"{kind}getrs")
        for i in range(items):
            f, p, x = lu_t[i, ...], swaps[i, ...], x_t[i, ...]
            getrs(device.get_cusolver_handle(), trans, n, k, f.data.ptr, n, p.data.ptr, x.data.ptr, n, info.data.ptr)
    return xp.reshape(xp.matrix_transpose(x_t), b.shape)


def _copy(x: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return a copy in C order that owns its memory."""
    xp = array_api_compat.array_namespace(x)
    return xp.reshape(x.astype(dtype, order="C", copy=True), shape)


def _addresses(x: Array) -> Array:
    """Return the addresses at which the items of a batch in C order start, as an array on the device."""
    xp = array_api_compat.array_namespace(x)
    step = math.prod(x.shape[1:]) * x.dtype.itemsize
    return xp.arange(x.data.ptr, x.data.ptr + step * x.shape[0], step, dtype=xp.uint64)


def solve(a: Array, b: Array) -> Array:
    """Return ``A⁻¹ B`` with equal batch axes, and NaN where a pivot is exactly zero, whatever the right-hand side.

    ``cupy.linalg.solve`` leaves such items to a division by zero, which a right-hand side with zeros avoids. Above
    n = 256 it loops over the batch.
    """
    xp = array_api_compat.array_namespace(a, b)
    lu, pivots = lu_factor(a)
    singular = xp.any(xp.linalg.diagonal(lu) == 0, axis=-1)
    return nan_where(singular[..., None, None], lu_solve(lu, pivots, b, False))


def solve_triangular(a: Array, b: Array, *, lower: bool, unit_diagonal: bool) -> Array:
    """Solve triangular systems by cuBLAS, which takes batches."""
    from cupyx.scipy.linalg import solve_triangular

    return solve_triangular(a, b, lower=lower, unit_diagonal=unit_diagonal)


# --- QR ----------------------------------------------------------------------------------------------------------


def qr(a: Array) -> tuple[Array, Array]:
    """Return the reduced factors of tall ``(..., m, n)``: by CuPy, with one call per item, or for all items at once.

    One of our n steps launches about as many kernels as one of CuPy's calls, so the smaller of n and the number of
    items decides; this is a count, not a measurement. We use Householder reflections rather than Cholesky factors of
    AᵀA twice, which lose the orthogonality of Q beyond a condition of ``1/√eps`` and fail for dependent columns.
    """
    xp = array_api_compat.array_namespace(a)
    # Many items: all of them together, one column per step.
    if math.prod(a.shape[:-2]) > a.shape[-1]:
        return householder(a)
    q, r = xp.linalg.qr(a, mode="reduced")
    return q, r


def householder(a: Array) -> tuple[Array, Array]:
    """Factor a whole batch, one column per step, for libraries whose arrays can be written to."""
    xp = array_api_compat.array_namespace(a)
    m, n = a.shape[-2:]
    if a.size == 0:
        return xp.zeros_like(a), xp.zeros((*a.shape[:-2], n, n), dtype=a.dtype)
    scale = column(power_of_two(a, 2), a)
    r = a / scale  # a fresh array, and squares stay in range
    reflections = []
    for k in range(n):
        u = _reflection(r[..., k:, k])
        r[..., k:, k:] -= 2 * u[..., :, None] * (xp.conj(u)[..., None, :] @ r[..., k:, k:])
        reflections.append(u)
    # Apply the reflections to the first n columns of the identity, last one first.
    i, j = xp.arange(m), xp.arange(n)
    q = xp.zeros_like(a) + xp.astype(i[:, None] == j[None, :], a.dtype)
    for k in reversed(range(n)):
        u = reflections[k]
        q[..., k:, k:] -= 2 * u[..., :, None] * (xp.conj(u)[..., None, :] @ q[..., k:, k:])
    return q, xp.triu(r[..., :n, :]) * scale


def _reflection(x: Array) -> Array:
    """Return u, of unit length or zero, such that only the first entry of ``x − 2 u ⟨u, x⟩`` is not zero."""
    xp = array_api_compat.array_namespace(x)
    first = x[..., :1]
    size = xp.abs(first)
    phase = xp.where(size > 0, first / xp.where(size > 0, size, xp.ones_like(size)), xp.ones_like(first))
    # The first entry grows in its own direction, so that nothing cancels.
    u = xp.concat([first + phase * norm(x)[..., None], x[..., 1:]], axis=-1)
    return normalised(u, norm(u))
