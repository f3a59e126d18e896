"""Eigenpairs of ``G = V Vᴴ`` through the Gram matrix ``K = Vᴴ V``, and their VJPs with respect to the tall factor V.

``K = U Λ Uᴴ`` is n×n where G is D×D. Both have the same non-zero eigenvalues, and ``e_i = V u_i / √λ_i``.
The gradient is that of the eigenpairs of G, never formed. With ``Ḡ`` Hermitian, ``V̄ = 2 Ḡ V`` and

    Ḡ = ½ (A Eᴴ + E Aᴴ) + E diag(λ̄) Eᴴ,    a_i = (λ_i I − G)⁺ ē_i

Directions outside the range of V have the eigenvalue 0 of G: ``1/λ_i`` of ē_i there, ``1/(λ_i − λ_j)`` along e_j.
Written with ``M = Uᴴ Vᴴ Ē`` no small eigenvalue is divided by, but those asked for:

    A = (Ē + V U T) / λ,    T_ji = M_ji / (λ_i − λ_j),  inside a cluster −M_ji / λ_j
    V̄ = A diag(√λ) U_Kᴴ + E (Fᴴ Uᴴ + 2 diag(λ̄ √λ) U_Kᴴ),    F = T outside clusters, 0 inside
"""

from __future__ import annotations

import operator
from typing import Any

import array_api_compat

from ddnref._core.arrays import Array, Namespace, as_dtype, full, is_complex, is_true, namespace, nan_where, real_dtype
from ddnref._core.checks import check_dtypes, check_shapes, given
from ddnref._core.selection import take
from ddnref._kernels.dense import adjoint, eigh
from ddnref._kernels.eigh_vjp import cluster_mask, jump, masked
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest
from ddnref.curvature._gram_values import columns_of, count, gauge_check, gram_matrix, ready, zero_tolerance
from ddnref.errors import SingularError
from ddnref.linalg._eigh import neighbours
from ddnref.operators._blocks import Factor, Pieces, Tall, tall


@public
def gram_eigh(
    factor: Factor,
    /,
    k: int | None = None,
    *,
    zero_rtol: float | None = None,
    check_finite: bool = False,
    throw: bool = True,
) -> tuple[Array, Any]:
    r"""The k largest eigenpairs of ``V Vᴴ`` for a tall factor V, from its n×n Gram matrix.

    Parameters
    ----------
    factor, check_finite
        As in `gram_eigvalsh`.
    k : int, optional
        How many, ``1 <= k <= min(D, n)``; default all of these.
    zero_rtol : float, optional
        Eigenvalues up to ``zero_rtol * λ_1`` count as zero; default ``max(16, n) * eps``.
    throw : bool, default True
        Raise `SingularError` if one of the k eigenvalues is zero, reading one flag on the host. With ``False`` its
        eigenvector is NaN.

    Returns
    -------
    w : (..., k) real array
        Descending.
    e : (..., D, k) array, or a tuple of pieces ``(..., D_l, k)``, or ``(..., \*range_shape, k)`` for an operator
        Orthonormal eigenvectors ``V u / √λ`` in the columns.

    Raises
    ------
    SingularError
        If k exceeds the rank of V: an eigenvector of a zero eigenvalue is not in the range of V, and is refused.
    TypeError, ValueError, NonFiniteError
        As `gram_eigvalsh`; `k` out of range.

    See Also
    --------
    gram_eigh_fwd, gram_eigh_vjp

    Notes
    -----
    Cost: that of `gram_eigvalsh` with eigenvectors (9 n³ flops), and 2 D n k. The error of an eigenvector is
    ``eps * λ_1`` over the gap, and its length is accurate to ``eps * λ_1 / λ_i``.

    Examples
    --------
    >>> import numpy as np
    >>> w, e = ddnref.curvature.gram_eigh(np.asarray([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), 1)
    >>> np.abs(e[:, 0])
    array([1., 0., 0.])
    """
    return gram_eigh_fwd(factor, k, zero_rtol=zero_rtol, check_finite=check_finite, throw=throw)[0]


@public
def gram_eigh_fwd(
    factor: Factor,
    /,
    k: int | None = None,
    *,
    zero_rtol: float | None = None,
    check_finite: bool = False,
    throw: bool = True,
) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
    """`gram_eigh` and what its reverse pass needs.

    Parameters
    ----------
    factor, k, zero_rtol, check_finite, throw
        As in `gram_eigh`.

    Returns
    -------
    (w, e)
        The outputs of `gram_eigh`.
    (w_all, u_all) : (..., n) and (..., n, n) arrays
        The decomposition of the Gram matrix, ascending, as from `eigh`.

    Raises
    ------
    SingularError, TypeError, ValueError, NonFiniteError
        As `gram_eigh`.
    """
    v = ready(factor, "gram_eigh")
    columns = columns_of(count(v) if k is None else operator.index(k), v)
    w_all, u_all = eigh(gram_matrix(v, check_finite))
    w, u = take(w_all, columns, -1), take(u_all, columns, -1)
    scale = inverse_roots(w, w_all[..., -1:], v.n, zero_rtol, throw)
    e = v.apply(u * as_dtype(scale, u)[..., None, :])
    return (w, v.join(e)), (w_all, u_all)


@public
def gram_eigh_vjp(
    w_bar: Array | None,
    e_bar: Any,
    w: Array,
    e: Any,
    w_all: Array,
    u_all: Array,
    factor: Factor,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Any:
    r"""Gradient of a loss of the k largest eigenpairs of ``V Vᴴ`` with respect to V.

    Parameters
    ----------
    w_bar : (..., k) real array or None
    e_bar : (..., D, k) array, tuple of pieces, or None
        As `gram_eigh` returned the eigenvectors.
    w, e, w_all, u_all
        What `gram_eigh_fwd` returned.
    factor
        As in `gram_eigh`.
    rtol, gauge_rtol, throw
        As in `eigh_vjp`.

    Returns
    -------
    factor_bar : (..., D, n) array, a tuple of pieces, or a tuple with one cotangent for each parameter
        As the factor was given.

    Raises
    ------
    GaugeError
        If the loss depends on the basis chosen inside a cluster of equal eigenvalues, on how they are ordered, on the
        phase of a complex eigenvector, or on a cluster that the k-th one cuts (only with ``throw=True``).
    TypeError, ValueError
        As `gram_eigh`; shapes that do not fit.

    Notes
    -----
    With :math:`K = V^H V = U \Lambda U^H`, :math:`M = U^H V^H \bar E`, and :math:`F_{ji} = M_{ji} / (\lambda_i -
    \lambda_j)`, zero inside a cluster,

    .. math::

       \bar V = A \, \mathrm{diag}(\sqrt\lambda) \, U_K^H
              + E \left( F^H U^H + 2 \, \mathrm{diag}(\bar\lambda \sqrt\lambda) \, U_K^H \right), \qquad
       A = \left( \bar E + V U T \right) \mathrm{diag}(\lambda)^{-1},

    where T is F, and :math:`-M_{ji} / \lambda_j` inside a cluster: the component of :math:`\bar e_i` outside the range
    of V sees the eigenvalue 0 of :math:`V V^H`, those inside a cluster see nothing. Exact at repeated eigenvalues for
    every loss that is well defined there, and for factors whose smaller eigenvalues are zero. Cost: 8 D n k + 4 n² k
    flops. As an eigenvalue approaches zero its eigenvector has no derivative: the gradient grows as
    :math:`1/\sqrt{\lambda_i}`.

    Examples
    --------
    >>> import numpy as np
    >>> v = np.asarray([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> (w, e), saved = ddnref.curvature.gram_eigh_fwd(v, 1)
    >>> e_bar = np.asarray([[0.0], [0.0], [3.0 * e[0, 0]]])  # the third component, made independent of the sign
    >>> ddnref.curvature.gram_eigh_vjp(None, e_bar, w, e, *saved, v)
    array([[0., 0.],
           [0., 0.],
           [1., 0.]])
    """
    v = tall(factor)
    xp, e = _check(v, w_bar, e_bar, w, e, w_all, u_all)
    columns = columns_of(w.shape[-1], v)
    near, u = neighbours(xp, w_all, rtol), take(u_all, columns, -1)
    root = xp.sqrt(nan_where(~(w > 0), w))  # refused eigenvectors leave no gradient
    residuals = [] if w_bar is None else [jump(w_bar, near, columns)]
    if e_bar is not None:
        e_bar = v.split(e_bar, "e_bar")
        same, m_ = cluster_mask(near, columns), adjoint(u_all) @ v.adjoint(e_bar)
        m_i = m_ / as_dtype(root, m_)[..., None, :]  # e_jᴴ ē_i inside a cluster
        inside, whole = masked(m_i, same, columns)
        residuals.append((inside, xp.maximum(whole, _longest(xp, e_bar))))
    bad = gauge_check(residuals, gauge_rtol, throw)
    root = nan_where(bad[..., None], root)
    u_bar = 0 * u if w_bar is None else u * as_dtype(2 * w_bar * root, u)[..., None, :]
    if e_bar is None:
        return v.join_bar(v.outer(e, u_bar))
    t, f = _quotients(xp, m_, same, w_all, columns)
    a = tuple((b + vut) / as_dtype(root, vut)[..., None, :] for b, vut in zip(e_bar, v.apply(u_all @ t), strict=True))
    left = tuple(xp.concat([a_l, e_l], axis=-1) for a_l, e_l in zip(a, e, strict=True))
    return v.join_bar(v.outer(left, xp.concat([u, u_all @ f + u_bar], axis=-1)))


# --- below: the algorithm, without validation ----------------------------------------------------------------


def _quotients(xp: Namespace, m_: Array, same: Array, w_all: Array, columns: range) -> tuple[Array, Array]:
    """T and F of the notes; no branch divides by zero.

    On the diagonal F has the phase that e_i takes over from u_i. It is zero for a loss that does not depend on it, and
    completes a second derivative, in which a part of the loss is one of U.
    """
    one = full((), 1.0, w_all)
    gap = take(w_all, columns, -1)[..., None, :] - w_all[..., :, None]
    own = xp.where(w_all == 0, -one, -w_all)[..., :, None]
    t = m_ / as_dtype(xp.where(same, own, xp.where(gap == 0, one, gap)), m_)
    f = xp.where(same, xp.zeros_like(t), t)
    if not is_complex(m_):
        return t, f
    i = xp.arange(w_all.shape[-1], device=array_api_compat.device(m_))
    diagonal = i[:, None] == take(i, columns, -1)[None, :]
    return t, xp.where(diagonal, (m_ - xp.conj(m_)) / as_dtype(2 * own, m_), f)


def inverse_roots(w: Array, top: Array, n: int, zero_rtol: float | None, throw: bool) -> Array:
    """``1/√λ``; NaN, or `SingularError`, for those that count as zero."""
    xp = array_api_compat.array_namespace(w)
    zero = w <= zero_tolerance(xp, w, n, zero_rtol) * top
    if throw and is_true(xp.any(zero)):
        raise_singular(w, zero)
    return 1 / xp.sqrt(xp.where(zero, full((), float("nan"), w), w))


def raise_singular(w: Array, zero: Array) -> None:
    """Say which eigenvector does not exist."""
    xp = array_api_compat.array_namespace(w)
    rank = int(xp.min(xp.sum(xp.astype(~zero, xp.int32), axis=-1)))
    if rank == 0:
        raise SingularError(
            f"k = {w.shape[-1]} eigenvectors were asked for, but all eigenvalues are zero: the eigenvector of a zero "
            "eigenvalue is not in the range of the factor. Likely the factor is zero (inputs of zeros, dead units), or "
            "zero_rtol= is one or more. Ask for the eigenvalues alone, or pass throw=False to get NaN for these "
            "eigenvectors."
        )
    raise SingularError(
        f"k = {w.shape[-1]} eigenvectors were asked for, but only {rank} eigenvalue(s) are not zero: the eigenvector "
        "of a zero eigenvalue is not in the range of the factor, V u / √λ would divide by zero. Likely the factor has "
        f"dependent columns (a repeated sample, dead units). Pass k={rank}, a smaller zero_rtol=, or throw=False to "
        "get NaN for these eigenvectors."
    )


def _longest(xp: Namespace, e_bar: Pieces) -> Array:
    """The largest length of a column, ``(...)``."""
    size = xp.max(xp.stack([largest(e, 2) for e in e_bar]), axis=0)  # of unit size, so that squares stay in range
    size = xp.where(size > 0, size, xp.ones_like(size))
    square = sum(xp.sum(xp.abs(e / as_dtype(size, e)[..., None, None]) ** 2, axis=-2) for e in e_bar)
    return size * largest(xp.sqrt(square), 1)


def _check(
    v: Tall, w_bar: Array | None, e_bar: Any, w: Array, e: Any, w_all: Array, u_all: Array
) -> tuple[Namespace, Pieces]:
    if w_bar is None and e_bar is None:
        raise TypeError("w_bar and e_bar are both None: there is nothing to differentiate.")
    given(w=w, w_all=w_all, u_all=u_all)
    xp = namespace(w_bar=w_bar, w=w, w_all=w_all, u_all=u_all, factor=v.like)
    number, k = real_dtype(xp, v.like.dtype), w.shape[-1] if w.ndim else 0
    check_dtypes(w=(w, number), w_bar=(w_bar, number), w_all=(w_all, number), u_all=(u_all, v.like.dtype))
    check_shapes(
        w=(w, (*v.batch, k)), w_bar=(w_bar, (*v.batch, k)), w_all=(w_all, (*v.batch, v.n)),
        u_all=(u_all, (*v.batch, v.n, v.n)),
    )  # fmt: skip
    return xp, v.split(e, "e")
