"""Shifted systems ``(λ_i I − X) w_i = b_i`` of eigenpairs, singular but for what makes them regular.

A border of eigenvectors makes them regular, in every library. NumPy solves those of dominant pairs by Cholesky instead:
half the flops, no pivots, one buffer; without it the VJP of simultaneous iteration takes 1.4 times as long at m = 32
and 2.4 times at m = 256 (``asv_benches/figures.py --only iteration-time``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import array_api_compat
import numpy as np
import scipy  # its parts are loaded where they are first used

from ddnref._core.arrays import Array, double, namespace_of
from ddnref._core.noise import noise
from ddnref._kernels import singularity
from ddnref._kernels.dense import solve

CHUNK = 2**16  # entries of the matrices that NumPy works on at once: 4 items at m = 128, one from 256 on


def in_chunks(part: Callable[..., tuple[Array, Array]], *arrays: Array) -> tuple[Array, Array]:
    """``part(*arrays)`` for arrays with the same batch axes, of which the last are matrices ``(..., m, m)``.

    On NumPy it is called on chunks of the batch, so that the systems which it makes in float64 stay small: without
    that the peak memory of the VJP is 1.2 times as high at m = 128, and 2.2 times at m = 512.
    """
    x = arrays[-1]
    if not array_api_compat.is_numpy_array(x) or x.size <= CHUNK:
        return part(*arrays)
    # Flatten the batch, so that a chunk is a slice.
    batch, step = x.shape[:-2], max(1, CHUNK // x.shape[-1] ** 2)
    flat = [a.reshape(-1, *a.shape[len(batch) :]) for a in arrays]
    parts = [part(*(a[i : i + step] for a in flat)) for i in range(0, len(flat[-1]), step)]
    left, growth = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return left.reshape(*batch, *left.shape[1:]), growth.reshape(batch)


def product_in_double(x: Array, y: Array) -> Array:
    """``X Y`` in float64, where `y` is; NumPy converts wide matrices one by one, in one buffer.

    Without that a float32 batch is kept in float64 as well: 1.9 times the peak memory of the whole VJP at m = 512.
    """
    if not array_api_compat.is_numpy_array(x):
        return double(namespace_of(x), x) @ y
    if x.dtype == y.dtype or x.shape[-1] ** 2 <= CHUNK:
        return x @ y
    product, a = np.empty(y.shape), np.empty(x.shape[-2:])
    for item in np.ndindex(x.shape[:-2]):
        np.copyto(a, x[item])
        np.matmul(a, y[item], out=product[item])
    return product


def shifted(x: Array, w: Array) -> Array:
    """``λ I − X``, in the precision of λ if that is the higher one."""
    eye = namespace_of(x).eye(x.shape[-1], dtype=w.dtype, device=array_api_compat.device(x))
    return w[..., None, None] * eye - x


def bordered(a: Array, y: Array) -> Array:
    """``[[A, Y], [Yᵀ, 0]]`` of real ``(..., m, m)`` and ``(..., m, n)``."""
    xp = namespace_of(a)
    y_t = xp.matrix_transpose(y)
    below = xp.concat([y_t, xp.zeros_like(y_t[..., : y.shape[-1]])], axis=-1)
    return xp.concat([xp.concat([a, y], axis=-1), below], axis=-2)


def solve_each(systems: Iterable[Array], right: Array) -> tuple[Array, Array]:
    """Column i from the i-th system ``(..., n, n)``, and how much the worst of them amplifies a probe, ``(...)``.

    A system whose matrix is nearly singular, ``gap`` being its smallest singular value, amplifies by about ``1 / gap``.
    """
    xp, n = namespace_of(right), right.shape[-2]
    probe = singularity.gap_probe(xp.arange(n, dtype=right.dtype, device=array_api_compat.device(right)))
    probe = xp.broadcast_to(probe[:, None], (*right.shape[:-1], 1))
    rights = (xp.concat([right[..., i : i + 1], probe], axis=-1) for i in range(right.shape[-1]))
    if array_api_compat.is_jax_array(right):
        # All at once, because XLA would run separate solves side by side, and batches of LAPACK can deadlock then.
        both = solve(xp.stack(list(systems), axis=0), xp.stack(list(rights), axis=0))
        solved = [both[i, ...] for i in range(right.shape[-1])]
    else:
        solved = [solve(a, b) for a, b in zip(systems, rights, strict=True)]
    columns, growth = (xp.concat([x[..., j : j + 1] for x in solved], axis=-1) for j in range(2))
    return columns, xp.max(xp.abs(growth), axis=(-2, -1)) * n**0.5


def solve_on_complement(w: Array, y: Array, right: Array, size: Array, x: Array) -> tuple[Array, Array]:
    """Solve ``(λ_i I − X) w_i = b_i`` with ``Yᵀ w_i = 0``, X symmetric, for b_i orthogonal to its eigenvectors Y.

    `size`, ``(..., 1)``, is that of the largest |λ|. The second result is the amplification as in `solve_each`.
    """
    if not array_api_compat.is_numpy_array(x):
        return _solve_bordered(w, y, right, size, x)
    flat = [a.reshape(-1, *a.shape[w.ndim - 1 :]) for a in (w, y, right, size, x)]
    left, growth, failed = solve_dominant(*flat)
    if failed.any():
        left[failed], growth[failed] = in_chunks(_solve_bordered, *(a[failed] for a in flat))
    return left.reshape(y.shape), growth.reshape(w.shape[:-1])


def _solve_bordered(w: Array, y: Array, right: Array, size: Array, x: Array) -> tuple[Array, Array]:
    """Solve by LU factors, with a border that is scaled like the matrix."""
    xp, n = namespace_of(y), y.shape[-1]
    border = size[..., None] * y  # of the size of the matrix, or the condition number would suffer
    systems = (bordered(shifted(x, w[..., i]), border) for i in range(n))
    right = xp.concat([right, xp.zeros_like(right[..., :n, :])], axis=-2)
    left, growth = solve_each(systems, right)
    return left[..., : x.shape[-1], :], growth


def solve_dominant(w: Array, y: Array, right: Array, size: Array, x: Array) -> tuple[Array, Array, Array]:
    """`solve_on_complement` for NumPy arrays ``(items, ...)``, and the items where that failed.

    ``σ_i (λ_i I − X) + 2 |λ_max| Y Yᵀ`` with ``σ_i = sign λ_i`` is positive definite where Y spans all eigenvectors of
    larger magnitude than the rest, and on the complement of Y equal to ``σ_i (λ_i I − X)``. Where it is not, the result
    means nothing.
    """
    m, n = y.shape[-2:]
    sign = np.where(w < 0, -1.0, 1.0)
    # The right-hand sides and a probe for each, as rows, which LAPACK overwrites with the solutions.
    both = np.empty((len(x), n, 2, m))
    both[:, :, 0], both[:, :, 1] = right.mT, singularity.gap_probe(np.arange(m, dtype=w.dtype))
    both *= sign[..., None, None]
    a, failed = np.empty((m, m)), []
    diagonal, a_t = a.reshape(-1)[:: m + 1], a.T  # LAPACK reads by columns, and A is symmetric
    items = zip(x, y.mT, both.mT, sign.tolist(), np.abs(w).tolist(), (2 * size[:, 0]).tolist(), strict=True)
    for x_i, y_t, rows, signs, shifts, weight in items:
        info = 0  # LAPACK's flag: not positive definite
        for b, s, shift in zip(rows, signs, shifts, strict=True):
            np.multiply(x_i, -s, out=a)
            scipy.linalg.blas.dsyrk(weight, y_t, 1.0, a_t, trans=1, lower=1, overwrite_c=1)
            diagonal += shift
            info |= scipy.linalg.lapack.dposv(a_t, b, lower=1, overwrite_a=1, overwrite_b=1)[2]
        failed.append(info != 0)
    return both[:, :, 0].mT, np.abs(both[:, :, 1]).max(axis=(-2, -1)) * m**0.5, np.asarray(failed, dtype=bool)


def inverse_iteration(w: Array, y: Array, x: Array, both: bool = True) -> tuple[Array, Array, Array]:
    """Right and left eigenvectors ``v_i`` and ``u_i`` of a real matrix by one step from unit vectors y_i.

    Without `both` v_i is y_i, which saves half of the factorisations.

    `w`, ``(..., n)``, must differ from the eigenvalues by little, but by more than nothing. The v_i have unit length,
    and ``u_iᵀ y_i = 1``. The third result, ``(..., n)``, is about ``‖(λ_i I − X)⁻¹‖`` on the directions other than u_i.
    """

    def solutions(w: Array, y: Array, x: Array) -> tuple[Array, Array]:
        xp, x_t, n = namespace_of(y), namespace_of(x).matrix_transpose(x), w.shape[-1]
        probe = xp.broadcast_to(noise(0, y.shape[-2], y)[:, None], (*y.shape[:-1], 1))
        matrices = (x_t, x) if both else (x_t,)
        pairs = ((shifted(a, w[..., i]), y[..., i : i + 1]) for i in range(n) for a in matrices)
        systems = ((a, xp.concat([b, probe], axis=-1)) for a, b in pairs)
        if array_api_compat.is_jax_array(y):  # all at once, as in `solve_each`
            a, b = (xp.stack(part, axis=0) for part in zip(*systems, strict=True))
            together = solve(a, b)
            solved = [together[i, ...] for i in range(together.shape[0])]
        else:
            solved = [solve(a, b) for a, b in systems]
        return xp.concat(solved, axis=-1), xp.zeros_like(w[..., 0])

    found, _ = in_chunks(solutions, w, y, x)
    xp = namespace_of(y)
    step = 4 if both else 2
    u, probed, v = found[..., ::step], found[..., 1::step], found[..., 2::step] if both else y
    u = u / xp.sum(u * y, axis=-2, keepdims=True)
    probed = probed - u * xp.sum(y * probed, axis=-2, keepdims=True)
    v = v / xp.sqrt(xp.sum(v * v, axis=-2, keepdims=True))
    return v, u, xp.sqrt(x.shape[-1] * xp.sum(probed * probed, axis=-2))
