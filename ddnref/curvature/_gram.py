"""Eigenvalues and eigenpairs of ``G = V Vᴴ`` through the Gram matrix ``K = VᴴV``, and their VJPs to the tall factor V.

``K = U Λ Uᴴ`` is n×n where G is D×D. Both have the same non-zero eigenvalues, and ``e_i = V u_i / √λ_i``. The gradients
are those of the eigenpairs of G, which is never formed: with ``Ḡ`` Hermitian, ``V̄ = 2 Ḡ V`` and

    Ḡ = ½ (A Eᴴ + E Aᴴ) + E diag(λ̄) Eᴴ,    a_i = (λ_i I − G)⁺ ē_i

Directions outside the range of V have the eigenvalue 0 of G: ``1/λ_i`` of ē_i there, ``1/(λ_i − λ_j)`` along e_j. The
form in the notes of `gram_eigh_vjp` divides only by the eigenvalues that are asked for.
"""

from __future__ import annotations

import operator
from typing import Any

import array_api_compat

from ddnref._core.arrays import (
    Array,
    Namespace,
    adjoint,
    as_dtype,
    eps,
    full,
    is_complex,
    is_true,
    namespace,
    nan_where,
    real_dtype,
    refuse_non_finite,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._core.selection import take
from ddnref._kernels import singularity
from ddnref._kernels.dense import eigh, eigvalsh
from ddnref._kernels.eigh_vjp import cluster_mask, exceeds, jump, masked
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest, safe_norm
from ddnref.errors import SingularError
from ddnref.linalg._eigh import eigh_vjp, neighbours, raise_gauge, ratio
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import Factor, Tall, tall


@public
def gram_eigvalsh(factor: Factor, /, *, check_finite: bool = False) -> Array:
    r"""The eigenvalues of ``V Vᴴ`` for a tall factor V, largest first, from its n×n Gram matrix.

    Parameters
    ----------
    factor : (..., D, n) array, real or complex floating
        V, with as many columns as the Gram matrix shall have. Also a list of pieces ``(..., D_l, n)`` stacked on top
        of each other, such as one for each layer of a network, or a `LinearOperator` from n entries to D.
    check_finite : bool, default False
        Raise `NonFiniteError` if the Gram matrix contains NaN or infinity, reading one flag on the host.

    Returns
    -------
    w : (..., min(D, n)) real array
        Descending. The other ``|D − n|`` eigenvalues of ``V Vᴴ`` or ``Vᴴ V`` are zero. Zero eigenvalues within these
        come out as rounding, of either sign.

    Raises
    ------
    TypeError
        Not floating, mixed libraries or devices; a PyTorch tensor that requires grad.
    ValueError
        Fewer than two axes, pieces that do not fit, an empty list.
    NonFiniteError
        Only with ``check_finite=True``.

    See Also
    --------
    gram_eigvalsh_fwd, gram_eigvalsh_vjp
    gram_eigh : with eigenvectors.
    gram_reducer : for a factor that arrives in shards.

    Notes
    -----
    Cost: D n² flops for the Gram matrix and about 4/3 n³ for its eigenvalues, n² numbers of memory. V itself need not
    fit into memory if it comes in pieces or shards. Forming the Gram matrix squares the condition: an eigenvalue is
    accurate to ``eps * λ_1``, not to ``eps * √(λ_1 λ_i)`` as from a singular value decomposition of V.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.curvature.gram_eigvalsh(np.asarray([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    array([9., 1.])
    """
    v, k = _gram(factor, "gram_eigvalsh", check_finite)
    return take(eigvalsh(k), columns_of(count(v), v), -1)


@public
def gram_eigvalsh_fwd(factor: Factor, /, *, check_finite: bool = False) -> tuple[Array, tuple[Array, Array]]:
    """Compute `gram_eigvalsh` and what its reverse pass needs.

    Parameters
    ----------
    factor, check_finite
        As in `gram_eigvalsh`.

    Returns
    -------
    w : (..., min(D, n)) real array
        The output of `gram_eigvalsh`.
    (w_all, u_all) : (..., n) and (..., n, n) arrays
        The decomposition of the Gram matrix, ascending, as from `eigh`.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `gram_eigvalsh`.
    """
    v, k = _gram(factor, "gram_eigvalsh", check_finite)
    w_all, u_all = eigh(k)
    return take(w_all, columns_of(count(v), v), -1), (w_all, u_all)


@public
def gram_eigvalsh_vjp(
    w_bar: Array,
    w: Array,
    w_all: Array,
    u_all: Array,
    factor: Factor,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Any:
    r"""Gradient of a loss of the eigenvalues with respect to the factor.

    Parameters
    ----------
    w_bar : (..., min(D, n)) real array
        Cotangent of the eigenvalues.
    w, w_all, u_all
        What `gram_eigvalsh_fwd` returned.
    factor
        As in `gram_eigvalsh`.
    rtol, gauge_rtol, throw
        As in `eigh_vjp`.

    Returns
    -------
    factor_bar : (..., D, n) array, a tuple of pieces, or a tuple with one cotangent for each parameter
        As the factor was given.

    Raises
    ------
    GaugeError
        If the loss treats equal eigenvalues differently (only with ``throw=True``).
    TypeError, ValueError
        As `gram_eigvalsh`; shapes that do not fit.

    Notes
    -----
    With :math:`V^H V = U \Lambda U^H`, :math:`\bar V = 2 V U \mathrm{diag}(\bar\lambda) U^H`. It exists at zero
    eigenvalues too, where it vanishes along their eigenvectors. Cost: 2 D n² + 2 n³ flops.

    Examples
    --------
    >>> import numpy as np
    >>> v = np.asarray([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> w, saved = ddnref.curvature.gram_eigvalsh_fwd(v)
    >>> ddnref.curvature.gram_eigvalsh_vjp(np.asarray([1.0, 0.0]), w, *saved, v)  # of the largest, 3² = 9
    array([[6., 0.],
           [0., 0.],
           [0., 0.]])
    """
    v = tall(factor)
    xp = _check_saved(v, count(v), w_bar, w, w_all, u_all)
    columns = columns_of(count(v), v)
    # K̄ = U diag(λ̄) Uᴴ; the freedom inside clusters is checked below, where zero eigenvalues are no cluster.
    k_bar = eigh_vjp(w_bar, None, w_all, u_all, index=columns, gauge_rtol=float("inf"), throw=False)
    # Eigenvalues that are zero are equal, but have a gradient of zero each, because V u = 0.
    zero = w <= zero_tolerance(xp, w, v.n, None) * w[..., :1]
    residual = jump(xp.where(zero, xp.zeros_like(w_bar), w_bar), neighbours(xp, w_all, rtol), columns)
    bad = _gauge_check([residual], gauge_rtol, throw)
    # V̄ = 2 V K̄
    return v.join_bar(v.times(nan_where(bad[..., None, None], 2 * k_bar)))


def has_repeated(w_all: Array, rtol: float | None = None) -> Array:
    """Whether an item has equal eigenvalues other than zero, where a second derivative is wrong.

    Those that are zero stay equal when the factor moves, because ``V u = 0`` for their eigenvectors.
    """
    xp = array_api_compat.array_namespace(w_all)
    zero = w_all <= zero_tolerance(xp, w_all, w_all.shape[-1], None) * w_all[..., -1:]
    return xp.any(neighbours(xp, w_all, rtol) & ~zero[..., 1:], axis=-1)


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
    """Compute `gram_eigh` and what its reverse pass needs.

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
    v, gram = _gram(factor, "gram_eigh", check_finite)
    columns = columns_of(count(v) if k is None else operator.index(k), v)
    w_all, u_all = eigh(gram)
    w, u = take(w_all, columns, -1), take(u_all, columns, -1)
    # e_i = V u_i / √λ_i
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
    if w_bar is None and e_bar is None:
        raise TypeError("w_bar and e_bar are both None: there is nothing to differentiate.")
    v = tall(factor)
    xp = _check_saved(v, w.shape[-1] if w.ndim else 0, w_bar, w, w_all, u_all)
    e, columns = v.split(e, "e"), columns_of(w.shape[-1], v)
    near, u = neighbours(xp, w_all, rtol), take(u_all, columns, -1)
    root = xp.sqrt(nan_where(~(w > 0), w))  # refused eigenvectors leave no gradient
    # Measure how much of the loss depends on the freedom inside clusters: of λ̄ the jumps, of Ē what e_jᴴ ē_i has.
    residuals = [] if w_bar is None else [jump(w_bar, near, columns)]
    if e_bar is not None:
        e_bar = v.split(e_bar, "e_bar")
        same, m_ = cluster_mask(near, columns), adjoint(u_all) @ v.adjoint(e_bar)
        inside, whole = masked(m_ / as_dtype(root, m_)[..., None, :], same, columns)
        lengths = xp.stack([safe_norm(xp.matrix_transpose(e_l)) for e_l in e_bar], axis=-1)
        residuals.append((inside, xp.maximum(whole, largest(safe_norm(lengths)))))
    bad = _gauge_check(residuals, gauge_rtol, throw)
    root = nan_where(bad[..., None], root)
    # E · 2 diag(λ̄ √λ) U_Kᴴ
    u_bar = 0 * u if w_bar is None else u * as_dtype(2 * w_bar * root, u)[..., None, :]
    if e_bar is None:
        return v.join_bar(v.outer(e, u_bar))
    # A = (Ē + V U T) / λ, here without one of the two √λ
    t, f = _quotients(xp, m_, same, w_all, columns)
    a = tuple((b + vut) / as_dtype(root, vut)[..., None, :] for b, vut in zip(e_bar, v.apply(u_all @ t), strict=True))
    # V̄ = A diag(√λ) U_Kᴴ + E (Fᴴ Uᴴ + 2 diag(λ̄ √λ) U_Kᴴ), as one product
    left = tuple(xp.concat([a_l, e_l], axis=-1) for a_l, e_l in zip(a, e, strict=True))
    return v.join_bar(v.outer(left, xp.concat([u, u_all @ f + u_bar], axis=-1)))


def _quotients(xp: Namespace, m_: Array, same: Array, w_all: Array, columns: range) -> tuple[Array, Array]:
    """T and F of the notes; no branch divides by zero.

    On the diagonal F has the phase that e_i takes over from u_i. It is zero for a loss that does not depend on it, and
    completes a second derivative, in which a part of the loss is one of U.
    """
    one = full((), 1.0, w_all)
    # T_ji = M_ji / (λ_i − λ_j), inside a cluster −M_ji / λ_j
    gap = take(w_all, columns, -1)[..., None, :] - w_all[..., :, None]
    own = xp.where(w_all == 0, -one, -w_all)[..., :, None]
    t = m_ / as_dtype(xp.where(same, own, xp.where(gap == 0, one, gap)), m_)
    f = xp.where(same, xp.zeros_like(t), t)  # F = T outside clusters
    if not is_complex(m_):
        return t, f
    # F_ii = (M_ii − conj M_ii) / (−2 λ_i), the phase
    i = xp.arange(w_all.shape[-1], device=array_api_compat.device(m_))
    diagonal = i[:, None] == take(i, columns, -1)[None, :]
    return t, xp.where(diagonal, (m_ - xp.conj(m_)) / as_dtype(2 * own, m_), f)


def _gram(factor: Factor, function: str, check_finite: bool) -> tuple[Tall, Array]:
    """Split the factor into pieces, unless PyTorch records it, and form its Gram matrix."""
    # A tensor that requires grad would be recorded with PyTorch's derivative.
    arrays = factor.params if isinstance(factor, LinearOperator) else factor
    v = tall(factor)
    for array in arrays if isinstance(arrays, (list, tuple)) else (arrays,):
        refuse_recording(function, array)
    k = v.gram()
    if check_finite:
        refuse_non_finite("the Gram matrix of factor", k)
    return v, k


def _check_saved(v: Tall, k: int, w_bar: Array | None, w: Array, w_all: Array, u_all: Array) -> Namespace:
    """Validate k eigenvalues, their cotangent and the saved decomposition against the factor."""
    xp = namespace(w_bar=w_bar, w=w, w_all=w_all, u_all=u_all, factor=v.like)
    real = real_dtype(xp, v.like.dtype)
    check_dtypes(w=(w, real), w_bar=(w_bar, real), w_all=(w_all, real), u_all=(u_all, v.like.dtype))
    check_shapes(w=(w, (*v.batch, k)), w_bar=(w_bar, (*v.batch, k)))
    check_shapes(w_all=(w_all, (*v.batch, v.n)), u_all=(u_all, (*v.batch, v.n, v.n)))
    return xp


def count(v: Tall) -> int:
    """The most eigenvalues that are not zero: the smaller of D and n."""
    return min(v.rows, v.n)


def columns_of(k: int, v: Tall) -> range:
    """The columns of the k largest of n ascending eigenvalues."""
    if not (1 <= k <= count(v) or k == count(v)):
        raise ValueError(
            f"k is {k}, expected 1 <= k <= {count(v)}: a factor with {v.rows} rows and {v.n} columns has at most that "
            "many non-zero eigenvalues."
        )
    return range(v.n - 1, v.n - 1 - k, -1)


def zero_tolerance(xp: Namespace, w: Array, n: int, zero_rtol: float | None) -> float:
    """The multiple of the largest eigenvalue up to which those of an n×n Gram matrix are rounding."""
    return singularity.zero_rtol(xp, w.dtype, n) if zero_rtol is None else zero_rtol


def inverse_roots(w: Array, top: Array, n: int, zero_rtol: float | None, throw: bool) -> Array:
    """Return ``1/√λ``; NaN, or `SingularError`, for eigenvalues that count as zero."""
    xp = array_api_compat.array_namespace(w)
    # An eigenvalue below the rounding of the largest one is zero: its eigenvector is not in the range of V.
    zero = w <= zero_tolerance(xp, w, n, zero_rtol) * top
    if throw and is_true(xp.any(zero)):
        rank = int(xp.min(xp.sum(xp.astype(~zero, xp.int32), axis=-1)))
        found = f"only {rank} eigenvalue(s) are not zero" if rank else "all eigenvalues are zero"
        cause = "dependent columns of the factor (a repeated sample, dead units)"
        if rank == 0:
            cause = "a factor of zeros (inputs of zeros, dead units), or a zero_rtol= of one or more"
        remedy = f"Pass k={rank}, a smaller zero_rtol=," if rank else "Ask for the eigenvalues alone,"
        raise SingularError(
            f"k = {w.shape[-1]} eigenvectors were asked for, but {found}: the eigenvector of a zero eigenvalue is not "
            f"in the range of the factor, and V u / √λ would divide by zero. The most likely cause is {cause}. "
            f"{remedy} or pass throw=False to get NaN for these eigenvectors."
        )
    return 1 / xp.sqrt(xp.where(zero, full((), float("nan"), w), w))


def _gauge_check(residuals: list[tuple[Array, Array]], gauge_rtol: float | None, throw: bool) -> Array:
    """Return which items have an ill-defined loss, by residuals ``(part, whole)``, or raise `GaugeError`."""
    xp = array_api_compat.array_namespace(residuals[0][0])
    rtol = eps(xp, residuals[0][0].dtype) ** 0.5 if gauge_rtol is None else gauge_rtol
    bad = xp.any(xp.stack([exceeds(*residual, rtol) for residual in residuals]), axis=0)
    if throw and is_true(xp.any(bad)):
        raise_gauge(xp.max(xp.stack([ratio(*residual) for residual in residuals]), axis=0), rtol)
    return bad
