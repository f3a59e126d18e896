"""Dominant eigenpairs by power iteration and by simultaneous iteration.

    power         v ← ± X v / ‖X v‖,      λ = vᵀ X v
    simultaneous  Q R = X Q,              T = Qᵀ X Q

The sign follows that of λ, so that a negative eigenvalue has a fixed point too. Simultaneous iteration stops when
the span of Q is invariant, ``X Q = Q T``, and takes the eigenpairs of the n×n matrix T: close or equal eigenvalues
among the n cost no further steps.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, Namespace, eps, full, is_complex, is_true, namespace, nan_where, refuse_recording
from ddnref._core.checks import check_dtypes, check_shapes, check_square
from ddnref._core.loops import CHECK_EVERY, IterationInfo, WhileLoop, run
from ddnref._kernels.dense import eigh, hermitian_part, matvec, symmetrised
from ddnref._kernels.public import public
from ddnref.errors import ConvergenceError, NonFiniteError
from ddnref.linalg._pairs import SIGNS, align_signs, norm
from ddnref.linalg._qr import qr

RTOL = 16  # in units of eps, with √m more: the rounding of products with m terms reached 18 at m = 512
MAXITER = 1000


class _Power(NamedTuple):
    """A frozen item keeps its v; all else follows from v and comes out as it was."""

    v: Array
    z: Array
    """``X v``, or the start vector before the first step."""
    w: Array
    size: Array
    """``‖z‖`` with the sign of λ; 1 where it is zero."""
    residual: Array
    n_iter: Array
    active: Array


@public
def power_iteration(
    x: Array,
    /,
    *,
    symmetric: bool = False,
    v0: Array | None = None,
    align: str | None = "positive",
    reference: Array | None = None,
    rtol: float | None = None,
    maxiter: int = MAXITER,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[Array, Array], IterationInfo]:
    """The eigenvalue of largest magnitude and its eigenvector, by power iteration.

    Parameters
    ----------
    x : (..., m, m) array, float32 or float64
        Need not be symmetric, but its dominant eigenvalue must be real and simple in magnitude. For complex
        Hermitian matrices take `eigsh`.
    symmetric : bool, default False
        Iterate with ``½ (X + Xᵀ)`` instead of `x`. Give the VJP the same value: the gradients differ.
    v0 : (..., m) or (m,) array, optional
        Where to start; default fixed pseudo-random numbers.
    align : {"positive", "negative", None}
        The sign of the eigenvector, as in `align_signs`; ``None`` leaves it as the start vector determines it.
    reference : (..., m) or (m,) array, optional
        As in `align_signs`.
    rtol : float, optional
        Stop when ``‖X v − λ v‖ <= rtol * ‖X v‖``; default ``(16 + √m) * eps``, the rounding
        of the products.
    maxiter : int, default 1000
    check_every : int, default 10
        Steps between two looks at the stopping rule: each reads one flag on the host.
    throw : bool, default True
        Raise if an item has not converged, reading one more flag. With ``False`` the last iterate is returned and
        ``info.converged`` says so.
    while_loop : callable, optional
        Such as ``jax.lax.while_loop``, which runs under ``jax.jit`` and reads nothing.

    Returns
    -------
    (w, v) : (...) and (..., m) arrays
        Eigenvalue and eigenvector of unit length.
    info : IterationInfo
        ``converged``, ``n_iter``, ``residual_norm`` (relative), each ``(...)``.

    Raises
    ------
    ConvergenceError
        Not converged within `maxiter`: two eigenvalues of (nearly) the same largest magnitude, such as λ and −λ or a
        complex pair, let the iteration oscillate or creep; a zero matrix has no dominant eigenvalue.
    NonFiniteError
        An item contains NaN or infinity; with ``throw=False`` it comes out as NaN and the others are not affected.
    TypeError, ValueError
        Complex, integer or mixed input; shapes that do not fit; unknown `align`.

    See Also
    --------
    power_iteration_vjp, simultaneous_iteration
    eigsh : k eigenpairs of a symmetric matrix, at a rate that two close eigenvalues do not spoil.

    Notes
    -----
    The error of v falls by ``|λ₂/λ₁|`` a step; a residual r leaves an error of about ``r |λ₁| / gap`` in v. Cost: one
    product with X a step, 2 m² flops.

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, "Matrix Computations" (4th ed., 2013), section 7.3.1.

    Examples
    --------
    >>> import numpy as np
    >>> (w, v), info = ddnref.power_iteration(np.asarray([[2.0, 1.0], [1.0, 2.0]]))
    >>> round(float(w), 12), bool(info.converged)
    (3.0, True)
    """
    xp, x, scale, bad, rtol = _prepare("power_iteration", x, symmetric, align, rtol)
    one = full(x.shape[:-2], 1.0, x)
    z = _start(xp, v0, x, ())
    size = _length(xp, z)
    state = _Power(z, z, one, xp.where(size > 0, size, one), one, xp.zeros_like(one, dtype=xp.int32), ~bad)

    def body(state: _Power) -> _Power:
        return _power_step(xp, x, state, rtol, one)

    state = run(lambda s: s.active, body, state, maxiter=maxiter, check_every=check_every, while_loop=while_loop)
    converged = ~bad & (state.residual <= rtol)
    w, residual = nan_where(bad, scale * state.w), nan_where(bad, state.residual)
    v = state.v if align is None else align_signs(state.v, reference, sign=align, axis=-1)
    info = IterationInfo(converged, state.n_iter, residual)
    if throw and not is_true(xp.all(converged)):
        _raise(bad, info, maxiter, rtol)
    return (w, nan_where(bad[..., None], v)), info


def _power_step(xp: Namespace, x: Array, state: _Power, rtol: float, one: Array) -> _Power:
    """``v = ± z/‖z‖`` and one product with it, by which it is judged."""
    v = xp.where(state.active[..., None], state.z / state.size[..., None], state.v)
    z = matvec(x, v)
    w = xp.vecdot(v, z)
    size = _length(xp, z)
    there = size > 0  # or v is in the null space: a zero matrix, or a start vector without a part in the range
    size = xp.where(there, size, one)
    residual = xp.where(there, _length(xp, z - w[..., None] * v) / size, one)
    return _Power(
        v,
        z,
        w,
        xp.where(w < 0, -size, size),
        residual,
        state.n_iter + xp.astype(state.active, state.n_iter.dtype),
        state.active & there & (residual > rtol),
    )


class _Simultaneous(NamedTuple):
    """A frozen item keeps its q, as in `_Power`."""

    q: Array
    z: Array
    """``X q``, or the start before the first step."""
    t: Array
    residual: Array
    n_iter: Array
    active: Array


@public
def simultaneous_iteration(
    x: Array,
    /,
    n: int,
    *,
    symmetric: bool = False,
    v0: Array | None = None,
    align: str | None = "positive",
    reference: Array | None = None,
    rtol: float | None = None,
    maxiter: int = MAXITER,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[Array, Array], IterationInfo]:
    """The n eigenvalues of largest magnitude and their eigenvectors, by simultaneous (orthogonal, QR) iteration.

    Parameters
    ----------
    x : (..., m, m) array, float32 or float64
    n : int
        How many, ``1 <= n <= m``. Only n columns are ever multiplied and orthogonalised.
    symmetric : bool, default False
        Iterate with ``½ (X + Xᵀ)``, and rely on its symmetry. With ``False`` the matrix may be any with n real
        dominant eigenvalues of distinct magnitude, and each must converge by itself.
    v0 : (..., m, n) or (m, n) array, optional
        Where to start; default fixed pseudo-random numbers.
    align, reference, rtol, maxiter, check_every, throw, while_loop
        As in `power_iteration`; the residual is that of the subspace, ``‖X Q − Q T‖ <= rtol * ‖T‖``.

    Returns
    -------
    (w, v) : (..., n) and (..., m, n) arrays
        Eigenvalues, largest magnitude first, and eigenvectors of unit length in the columns (right ones if `x` is not
        symmetric, and then not orthogonal).
    info : IterationInfo
        ``converged``, ``n_iter``, ``residual_norm`` (relative), each ``(...)``.

    Raises
    ------
    ConvergenceError, NonFiniteError, TypeError, ValueError
        As `power_iteration`; n out of range.

    See Also
    --------
    simultaneous_iteration_vjp

    Notes
    -----
    The error falls by ``|λ_{n+1}/λ_n|`` a step (symmetric), by the largest ``|λ_{i+1}/λ_i|``, ``i <= n``, otherwise.
    Cost of a step: 2 m² n flops for the product and 8 m n² for the orthogonalisation.

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, "Matrix Computations" (4th ed., 2013), sections 7.3.2 and 8.2.4.

    Examples
    --------
    >>> import numpy as np
    >>> (w, v), info = ddnref.simultaneous_iteration(np.diag(np.asarray([1.0, -5.0, 3.0])), 2)
    >>> np.round(w, 12)
    array([-5.,  3.])
    """
    xp, x, scale, bad, rtol = _prepare("simultaneous_iteration", x, symmetric, align, rtol)
    n = operator.index(n)
    if not 1 <= n <= x.shape[-1]:
        raise ValueError(f"n is {n}, expected 1 <= n <= {x.shape[-1]} for a matrix with {x.shape[-1]} columns.")
    one = full(x.shape[:-2], 1.0, x)
    z = _start(xp, v0, x, (n,))
    t = xp.zeros_like(x[..., :n, :n])
    state = _Simultaneous(z, z, t, float("inf") * one, xp.zeros_like(one, dtype=xp.int32), ~bad)

    def body(state: _Simultaneous) -> _Simultaneous:
        return _simultaneous_step(xp, x, state, rtol, symmetric)

    state = run(lambda s: s.active, body, state, maxiter=maxiter, check_every=check_every, while_loop=while_loop)
    w, u = _ritz(xp, state.t, symmetric)
    v = state.q @ u
    converged = ~bad & (state.residual <= rtol)
    if align is not None:
        v = align_signs(v, reference, sign=align)
    info = IterationInfo(converged, state.n_iter, nan_where(bad, state.residual))
    if throw and not is_true(xp.all(converged)):
        _raise(bad, info, maxiter, rtol)
    return (nan_where(bad[..., None], scale[..., None] * w), nan_where(bad[..., None, None], v)), info


def _simultaneous_step(xp: Namespace, x: Array, state: _Simultaneous, rtol: float, symmetric: bool) -> _Simultaneous:
    q = xp.where(state.active[..., None, None], qr(state.z)[0], state.q)
    z = x @ q
    t = xp.matrix_transpose(q) @ z
    size = norm(xp, t)
    there = size > 0
    left = norm(xp, z - q @ t)
    if not symmetric:
        left = left + norm(xp, xp.tril(t, k=-1))  # each column by itself: T is triangular
    one = xp.ones_like(size)
    residual = xp.where(there, left / xp.where(there, size, one), one)
    n_iter = state.n_iter + xp.astype(state.active, state.n_iter.dtype)
    return _Simultaneous(q, z, t, residual, n_iter, state.active & there & (residual > rtol))


def _ritz(xp: Namespace, t: Array, symmetric: bool) -> tuple[Array, Array]:
    """Eigenpairs of the n×n matrix T, largest magnitude first."""
    if not symmetric:
        return xp.linalg.diagonal(t), _triangular_eigenvectors(xp, t)
    w, u = eigh(hermitian_part(t))
    order = xp.argsort(-xp.abs(w), axis=-1, stable=True)
    return xp.take_along_axis(w, order, axis=-1), xp.take_along_axis(u, order[..., None, :], axis=-1)


def _triangular_eigenvectors(xp: Namespace, t: Array) -> Array:
    """Unit eigenvectors of an upper triangular matrix with distinct diagonal entries, by back substitution.

    For column k, ``u_k = 1`` and ``u_i = Σ_{i<j<=k} t_ij u_j / (t_kk − t_ii)`` upwards.
    """
    n = t.shape[-1]
    zero, one = xp.zeros_like(t[..., 0, 0]), xp.ones_like(t[..., 0, 0])
    columns = []
    for k in range(n):
        u = [zero] * n
        u[k] = one
        for i in range(k - 1, -1, -1):
            total = zero
            for j in range(i + 1, k + 1):
                total = total + t[..., i, j] * u[j]
            gap = t[..., k, k] - t[..., i, i]
            u[i] = total / xp.where(gap == 0, full((), float("nan"), gap), gap)
        column = xp.stack(u, axis=-1)
        columns.append(column / _length(xp, column)[..., None])
    return xp.stack(columns, axis=-1)


# --- below: static facts and small pieces -----------------------------------------------------------------------


def _prepare(
    function: str, x: Array, symmetric: bool, align: str | None, rtol: float | None
) -> tuple[Namespace, Array, Array, Array, float]:
    """The matrix to iterate with over a power of two, that power, which items are not finite, the tolerance.

    The power is the one below the largest entry of each matrix, 1 for zero. Scaled so, squares neither overflow nor
    vanish, and nothing is rounded; items that are not finite become zero.
    """
    xp = namespace(x=x)
    check_square("x", x)
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: a matrix without entries has no eigenvalue.")
    refuse_recording(function, x)
    if is_complex(x):
        raise TypeError(f"{function} takes real matrices, got {x.dtype}: use ddnref.eigsh for Hermitian ones.")
    if align is not None and align not in SIGNS:
        raise ValueError(f'align is {align!r}, expected "positive", "negative" or None.')
    largest = xp.max(xp.abs(x), axis=(-2, -1))
    bad = ~xp.isfinite(largest)  # NaN and infinity come through: one pass over x less
    x = xp.where(bad[..., None, None], full((), 0.0, x), x)
    if symmetric:
        x = symmetrised(x)
        largest = xp.max(xp.abs(x), axis=(-2, -1))
    two = full((), 2.0, x)
    scale = two ** xp.floor(xp.log2(xp.where(~bad & (largest > 0), largest, xp.ones_like(largest))))
    default = (RTOL + x.shape[-1] ** 0.5) * eps(xp, x.dtype)
    return xp, x / scale[..., None, None], scale, bad, default if rtol is None else rtol


def _start(xp: Namespace, v0: Array | None, x: Array, columns: tuple[int, ...]) -> Array:
    """The given start, or fixed pseudo-random numbers, for every item of the batch: ``(..., m, *columns)``."""
    shape = (*x.shape[:-1], *columns)
    if v0 is None:
        v0 = xp.asarray(_draw(shape[x.ndim - 2 :]).copy(), dtype=x.dtype, device=array_api_compat.device(x))
    else:
        check_start(v0, x, columns)
    return xp.broadcast_to(v0, shape)


def check_start(v0: Array, x: Array, columns: tuple[int, ...]) -> None:
    """Raise unless `v0` is a start for every item of the batch, or one for all."""
    shape = (*x.shape[:-1], *columns)
    namespace(x=x, v0=v0)
    check_dtypes(v0=(v0, x.dtype))
    check_shapes(v0=(v0, shape if v0.ndim == len(shape) else shape[x.ndim - 2 :]))


@lru_cache(maxsize=4)
def _draw(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Kept: to make a generator takes as long as several steps of power iteration."""
    return np.random.default_rng(0).standard_normal(shape)


def _length(xp: Namespace, v: Array) -> Array:
    """Euclidean length along the last axis."""
    return xp.sqrt(xp.vecdot(v, v))


def _raise(bad: Array, info: IterationInfo, maxiter: int, rtol: float) -> NoReturn:
    xp = array_api_compat.array_namespace(bad)
    if is_true(xp.any(bad)):
        raise NonFiniteError(
            "x contains NaN or infinity. Likely a diverged step or a division by zero before this call. Pass "
            "throw=False to get NaN for these items of the batch and the right results for the others."
        )
    failed, items = int(xp.sum(xp.astype(~info.converged, xp.int32))), math.prod(info.converged.shape)
    worst = float(xp.max(info.residual_norm))
    raise ConvergenceError(
        f"{failed} of {items} items have not converged after at most {maxiter} steps: relative "
        f"residual {worst:.1e} > rtol {rtol:.1e}. Likely two eigenvalues have nearly the same largest magnitude (λ and "
        "−λ, a complex pair, a small gap behind the last one wanted), or the matrix is zero. Use ddnref.eigsh or "
        "ddnref.eigh for symmetric matrices, pass a larger maxiter or rtol, a shifted matrix, or throw=False to get "
        "the last iterate and info."
    )
