"""Symmetric / Hermitian eigendecomposition and its VJP in closed form.

``X = V diag(λ) Vᴴ``. With ``M = Vᴴ V̄`` and ``F_ij = 1 / (λ_j − λ_i)`` between distinct eigenvalues, 0 elsewhere,

    X̄ = V (diag(λ̄) + ½ F ∘ (M − Mᴴ)) Vᴴ                                 (all eigenpairs)
    X̄ = sym(V (F_K ∘ (Vᴴ V̄_K)) V_Kᴴ) + V_K diag(λ̄_K) V_Kᴴ                (a subset K of them)

The middle matrix is Hermitian before the outer products, and only the anti-Hermitian part of ``M`` enters:
a loss cannot depend on the length of an eigenvector.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import array_api_compat

from ddnref import _numpy
from ddnref._array import (
    Array,
    check_dtypes,
    check_shapes,
    check_square,
    is_true,
    namespace,
    nan_where,
    real_dtype,
    refuse_recording,
)
from ddnref._errors import GaugeError
from ddnref._linalg import adjoint, hermitian_part, hermitian_product
from ddnref._linalg import eigh as _eigh

RTOL = 16  # neighbours closer than this many eps·max|λ| are equal; exact repeats split by at most 1, their spread by 13


def eigh(x: Array, /) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of a real symmetric or complex Hermitian matrix.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Its Hermitian part ``½ (X + Xᴴ)`` is decomposed, so a non-symmetric input is symmetrised, not half ignored.

    Returns
    -------
    w : (..., m) array, real
        Eigenvalues, ascending.
    v : (..., m, m) array
        Orthonormal eigenvectors in the columns: ``X @ v[..., i] = w[..., i] * v[..., i]``.

    Raises
    ------
    TypeError
        For integer, boolean or float16 input, for something that is not an array, and for a PyTorch tensor that
        requires grad outside ``ddnref.interop.torch.differentiable``.
    ValueError
        If the last two axes are not square.

    See Also
    --------
    eigh_vjp : its reverse-mode derivative.
    spectral_function : functions of the matrix, differentiable at any degeneracy.

    Notes
    -----
    An item of the batch that contains NaN or infinity comes out as NaN; the others are not affected. Cost: LAPACK's
    or cuSOLVER's divide and conquer, about 9 m³ flops; two extra m×m arrays.

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh(np.asarray([[2.0, 1.0], [1.0, 2.0]]))
    >>> np.round(w, 12)
    array([1., 3.])
    """
    namespace(x=x)
    check_square("x", x)
    refuse_recording("eigh", x)
    return _eigh(hermitian_part(x))


def eigh_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    /,
    *,
    index: Sequence[int] | None = None,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    """Gradient of a loss with respect to the matrix, from its gradients with respect to eigenpairs.

    Parameters
    ----------
    w_bar : (..., k) real array or None
        Cotangent of the eigenvalues; ``None`` where the loss does not use them.
    v_bar : (..., m, k) array or None
        Cotangent of the eigenvectors; ``None`` where the loss does not use them.
    w : (..., m) real array
        All eigenvalues, ascending, from `eigh`.
    v : (..., m, m) array
        All eigenvectors, from `eigh`.
    index : sequence of k distinct int, optional
        The columns of `v` that `w_bar` and `v_bar` belong to, negatives counting from the end. All by default.
    rtol : float, optional
        Neighbouring eigenvalues no further apart than ``rtol * max|w|`` count as equal, chained into clusters.
        Default ``16 * eps`` of the dtype.
    gauge_rtol : float, optional
        Largest accepted `gauge_residual`; default ``sqrt(eps)``. Pass ``float("inf")`` to accept the masked
        gradient of a loss that you know to be invariant whatever its cotangents say.
    throw : bool, default True
        Raise `GaugeError` for a gauge-dependent loss, reading one flag on the host. With ``False`` nothing is read
        and the gradient of such an item is NaN.

    Returns
    -------
    x_bar : (..., m, m) array
        Exactly Hermitian: the gradient for *all* entries of the matrix taken as free, as `eigh` symmetrises.

    Raises
    ------
    GaugeError
        If the loss depends on the basis chosen inside a cluster of equal eigenvalues, on how they are ordered,
        or on the phase of a complex eigenvector (only with ``throw=True``).
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit; repeated or out-of-range `index`.

    See Also
    --------
    gauge_residual : how far a loss is from being well defined.
    spectral_function_vjp : for losses that weight eigenvectors by functions of their own eigenvalues.

    Notes
    -----
    With :math:`M = V^H \\bar V` and :math:`F_{ij} = 1/(\\lambda_j - \\lambda_i)`, zero inside a cluster,

    .. math:: \\bar X = V \\left( \\mathrm{diag}(\\bar\\lambda) + \\tfrac12 F \\circ (M - M^H) \\right) V^H

    for the pairing :math:`\\mathrm{Re} \\sum \\mathrm{conj}(\\bar y)\\,\\dot y`. Cost: three products of m×m
    matrices (6 m³ flops real), three m×m arrays; with `index` 6 m²k flops and no m×m array but the result.

    *Equal eigenvalues.* The masked value 0 is right for every loss of the cluster's projector and of symmetric
    functions of its eigenvalues. It is wrong for a loss that weights the eigenvectors by functions of their own
    eigenvalues, such as tr(C X²) written as ``sum(w**2 * yᵀCy)``: there the part of the gradient inside the
    cluster is not in the cotangents any more. A small gauge residual is therefore necessary, not sufficient;
    functions of the matrix belong in `spectral_function`, which is exact at any degeneracy. Second derivatives
    *through* this function are wrong wherever anything was masked; the bridges refuse them.

    References
    ----------
    .. [1] J. R. Magnus, "On differentiating eigenvalues and eigenvectors", Econometric Theory 1 (1985), Theorem 1.
    .. [2] M. B. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
       differentiation" (2008), section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.diag(np.asarray([1.0, 2.0, 4.0]))
    >>> w, v = ddnref.eigh(x)
    >>> ddnref.eigh_vjp(np.asarray([0.0, 0.0, 1.0]), None, w, v)  # of the largest eigenvalue
    array([[0., 0., 0.],
           [0., 0., 0.],
           [0., 0., 1.]])
    """
    columns = _check(w_bar, v_bar, w, v, index)
    x_bar, residual = _eigh_vjp(w_bar, v_bar, w, v, columns, _near(w, rtol))
    return x_bar if residual is None else _settle(x_bar, residual, gauge_rtol, throw)


def gauge_residual(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    /,
    *,
    index: Sequence[int] | None = None,
    rtol: float | None = None,
) -> Array:
    """How strongly a loss depends on choices that the matrix does not determine.

    Parameters
    ----------
    w_bar, v_bar, w, v, index, rtol
        As in `eigh_vjp`.

    Returns
    -------
    residual : (...) real array
        The largest of: the part of ``M − Mᴴ`` inside clusters of equal eigenvalues and, for complex input, on its
        diagonal (the phase), relative to the largest entry of ``M = Vᴴ V̄``; the jump of ``w_bar`` between
        neighbours of a cluster, relative to its largest entry. Around machine precision for a well-defined loss,
        of order one for a gauge-dependent one.

    Raises
    ------
    TypeError, ValueError
        As `eigh_vjp`.

    Notes
    -----
    Small is necessary, not sufficient: see the notes of `eigh_vjp`. Cost: one product, 2 m²k flops.
    """
    columns = _check(w_bar, v_bar, w, v, index)
    near = _near(w, rtol)
    xp = array_api_compat.array_namespace(w)
    residual = _jump(w_bar, w, near, columns)
    if v_bar is not None:
        m_ = adjoint(v) @ v_bar
        residual = xp.maximum(residual, _masked_residual(m_, _antisymmetric(m_, columns), _same(near, columns)))
    return residual


def eigh_topk(x: Array, /, k: int, *, which: str = "LA") -> tuple[Array, Array]:
    """The k largest or smallest eigenpairs, most wanted first, from a full decomposition.

    Parameters
    ----------
    x : (..., m, m) array, real or complex floating
        Symmetrised as in `eigh`.
    k : int
        How many, ``1 <= k <= m``.
    which : {"LA", "SA"}
        The largest eigenvalues, descending, or the smallest, ascending.

    Returns
    -------
    w : (..., k) real array
    v : (..., m, k) array

    Raises
    ------
    TypeError, ValueError
        As `eigh`; `k` out of range; unknown `which`.

    See Also
    --------
    eigh_topk_fwd, eigh_topk_vjp

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh_topk(np.diag(np.asarray([1.0, 4.0, 2.0])), 2)
    >>> w
    array([4., 2.])
    """
    return eigh_topk_fwd(x, k, which=which)[0]


def eigh_topk_fwd(
    x: Array, /, k: int, *, which: str = "LA"
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """`eigh_topk` and what its reverse pass needs: ``(w, v), (w_all, v_all)``, the latter as from `eigh`."""
    w, v = eigh(x)
    columns = _top(k, which, w.shape[-1])
    return (_take(w, columns, -1), _take(v, columns, -1)), (w, v)


def eigh_topk_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    w_all: Array,
    v_all: Array,
    /,
    *,
    which: str = "LA",
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    """Gradient of a loss of the top k eigenpairs, at O(m²k).

    Parameters
    ----------
    w_bar : (..., k) real array or None
    v_bar : (..., m, k) array or None
    w, v
        The outputs of `eigh_topk_fwd`, ``(..., k)`` and ``(..., m, k)``.
    w_all, v_all
        What it saved, ``(..., m)`` and ``(..., m, m)``.
    which, rtol, gauge_rtol, throw
        As in `eigh_topk` and `eigh_vjp`. A cluster of equal eigenvalues that the k-th one cuts has no derivative:
        it shows as a gauge-dependent loss.

    Returns
    -------
    x_bar : (..., m, m) array, exactly Hermitian

    Raises
    ------
    GaugeError, TypeError, ValueError
        As `eigh_vjp`.
    """
    namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v, w_all=w_all, v_all=v_all)
    k, m = w.shape[-1], w_all.shape[-1]
    check_shapes(w=(w, (*w_all.shape[:-1], k)), v=(v, (*w_all.shape, k)))
    return eigh_vjp(
        w_bar, v_bar, w_all, v_all, index=_top(k, which, m), rtol=rtol, gauge_rtol=gauge_rtol, throw=throw
    )


def has_repeated(w: Array, rtol: float | None = None) -> Array:
    """Per item, whether `eigh_vjp` masks anything: there a second derivative through it is wrong."""
    xp = array_api_compat.array_namespace(w)
    return xp.any(_near(w, rtol), axis=-1)


# --- below: the algorithm, without validation ----------------------------------------------------------------


def _eigh_vjp(
    w_bar: Array | None, v_bar: Array | None, w: Array, v: Array, columns: range | tuple[int, ...], near: Array
) -> tuple[Array, Array | None]:
    """The gradient and the gauge residual; ``None`` for the latter says that no gauge was left to check."""
    xp = array_api_compat.array_namespace(w)
    if v_bar is None:
        v_k = _take(v, columns, -1)
        return hermitian_product(v_k * w_bar[..., None, :], v_k), _jump(w_bar, w, near, columns)
    if columns != range(w.shape[-1]):
        x_bar, residual = _columns(w_bar, v_bar, w, v, columns, near)
    elif array_api_compat.is_numpy_array(v):
        x_bar, residual = _numpy.eigh_vjp(w_bar, v_bar, w, v, near)
        if residual is None:
            return x_bar, None
    else:
        x_bar, residual = _full(w_bar, v_bar, w, v, near)
    return x_bar, xp.maximum(residual, _jump(w_bar, w, near, columns))


def _full(w_bar: Array | None, v_bar: Array, w: Array, v: Array, near: Array) -> tuple[Array, Array]:
    """``X̄ = V (diag(λ̄) + ½ F ∘ (M − Mᴴ)) Vᴴ``."""
    xp = array_api_compat.array_namespace(w)
    m_ = adjoint(v) @ v_bar
    a = m_ - adjoint(m_)
    same = _same(near, range(w.shape[-1]))
    k = _divide(a / 2, w[..., None, :] - w[..., :, None], same)
    if w_bar is not None:
        eye = xp.eye(w.shape[-1], dtype=w.dtype, device=array_api_compat.device(w))
        k = k + eye * w_bar[..., None, :]
    return hermitian_product(v @ k, v), _masked_residual(m_, a, same)


def _columns(
    w_bar: Array | None, v_bar: Array, w: Array, v: Array, columns: range | tuple[int, ...], near: Array
) -> tuple[Array, Array]:
    """``X̄ = sym(V (F_K ∘ M) V_Kᴴ) + V_K diag(λ̄) V_Kᴴ``, as one product of two m×2k matrices."""
    xp = array_api_compat.array_namespace(w)
    w_k, v_k = _take(w, columns, -1), _take(v, columns, -1)
    m_ = adjoint(v) @ v_bar
    same = _same(near, columns)
    p = v @ _divide(m_, w_k[..., None, :] - w[..., :, None], same)
    if w_bar is not None:
        p = p + v_k * w_bar[..., None, :]
    p = p / 2
    x_bar = hermitian_product(xp.concat([p, v_k], axis=-1), xp.concat([v_k, p], axis=-1))
    return x_bar, _masked_residual(m_, _antisymmetric(m_, columns), same)


def _divide(a: Array, gap: Array, same: Array) -> Array:
    """``A / gap`` between clusters and 0 inside one; no branch divides by zero, so derivatives stay finite too."""
    xp = array_api_compat.array_namespace(gap)
    return xp.where(same, xp.zeros_like(a), a / xp.where(same, xp.ones_like(gap), gap))


def _near(w: Array, rtol: float | None) -> Array:
    """Which neighbours in the sorted spectrum count as equal, ``(..., m − 1)``."""
    xp = array_api_compat.array_namespace(w)
    if rtol is None:
        rtol = RTOL * float(xp.finfo(w.dtype).eps)
    size = xp.maximum(-w[..., :1], w[..., -1:])  # max|λ| of an ascending spectrum
    return w[..., 1:] - w[..., :-1] <= rtol * size


def _cluster(near: Array) -> Array:
    """Number the clusters, chained through near neighbours: ``(..., m)`` integers, ascending from 0."""
    xp = array_api_compat.array_namespace(near)
    apart = xp.astype(xp.logical_not(near), xp.int64)
    first = xp.zeros((*near.shape[:-1], 1), dtype=xp.int64, device=array_api_compat.device(near))
    return xp.concat([first, xp.cumulative_sum(apart, axis=-1)], axis=-1)


def _same(near: Array, columns: range | tuple[int, ...]) -> Array:
    """Whether eigenvalue i and the j-th chosen one are in one cluster, ``(..., m, k)``."""
    cluster = _cluster(near)
    return cluster[..., :, None] == _take(cluster, columns, -1)[..., None, :]


def _antisymmetric(m_: Array, columns: range | tuple[int, ...]) -> Array:
    """``M − Mᴴ`` restricted to the chosen columns, where M is zero in the others."""
    return m_ - _scatter(adjoint(_take(m_, columns, -2)), columns, m_.shape[-2], -2)


def _masked_residual(m_: Array, a: Array, same: Array) -> Array:
    """The largest entry of ``A`` that the mask removes, relative to the largest of ``M``; 0 where M is 0."""
    xp = array_api_compat.array_namespace(m_)
    if 0 in m_.shape[-2:]:
        return xp.zeros(m_.shape[:-2], dtype=real_dtype(xp, m_.dtype), device=array_api_compat.device(m_))
    size = xp.abs(a)
    masked = xp.max(xp.where(same, size, xp.zeros_like(size)), axis=(-2, -1))
    whole = xp.max(xp.abs(m_), axis=(-2, -1))
    return masked / xp.where(whole > 0, whole, xp.ones_like(whole))


def _jump(w_bar: Array | None, w: Array, near: Array, columns: range | tuple[int, ...]) -> Array:
    """The largest jump of ``λ̄`` inside a cluster, relative to the largest ``λ̄``."""
    xp = array_api_compat.array_namespace(w)
    if w_bar is None or w.shape[-1] < 2 or w_bar.shape[-1] == 0:
        return xp.zeros(w.shape[:-1], dtype=w.dtype, device=array_api_compat.device(w))
    w_bar = _scatter(w_bar, columns, w.shape[-1], -1)
    jump = xp.abs(w_bar[..., 1:] - w_bar[..., :-1])
    jump = xp.max(xp.where(near, jump, xp.zeros_like(jump)), axis=-1)
    whole = xp.max(xp.abs(w_bar), axis=-1)
    return jump / xp.where(whole > 0, whole, xp.ones_like(whole))


def _settle(x_bar: Array, residual: Array, gauge_rtol: float | None, throw: bool) -> Array:
    """Raise for a gauge-dependent loss, or make the gradient of its items NaN without reading anything."""
    xp = array_api_compat.array_namespace(residual)
    if gauge_rtol is None:
        gauge_rtol = float(xp.finfo(residual.dtype).eps) ** 0.5
    bad = residual > gauge_rtol
    if not throw:
        return nan_where(bad[..., None, None], x_bar)
    if is_true(xp.any(bad)):
        raise GaugeError(
            f"The loss depends on a choice that the matrix does not determine: gauge residual "
            f"{float(xp.max(xp.where(bad, residual, xp.zeros_like(residual)))):.1e} > gauge_rtol {gauge_rtol:.1e}. "
            "Likely it treats eigenvectors or eigenvalues inside a cluster of equal eigenvalues individually, cuts "
            "such a cluster, or depends on the phase of a complex eigenvector; no gradient exists there. Write it "
            "through the cluster's projector V_c V_cᴴ or through ddnref.spectral_function; or pass throw=False to "
            "get NaN for these items, gauge_rtol=inf to accept the masked gradient."
        )
    return x_bar


# --- static facts ---------------------------------------------------------------------------------------------


def _check(
    w_bar: Array | None, v_bar: Array | None, w: Array, v: Array, index: Sequence[int] | None
) -> range | tuple[int, ...]:
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v)
    check_square("v", v)
    real = real_dtype(xp, v.dtype)
    check_dtypes(w=(w, real), w_bar=(w_bar, real), v_bar=(v_bar, v.dtype))
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    m = v.shape[-1]
    columns = _columns_of(index, m)
    k = len(columns)
    check_shapes(
        w=(w, tuple(v.shape[:-1])),
        w_bar=(w_bar, (*v.shape[:-2], k)),
        v_bar=(v_bar, (*v.shape[:-1], k)),
    )
    return columns


def _columns_of(index: Sequence[int] | None, m: int) -> range | tuple[int, ...]:
    """The chosen columns as non-negative integers; a range where they are consecutive, so that views suffice."""
    if index is None:
        return range(m)
    given = [operator.index(i) for i in index]
    if any(not -m <= i < m for i in given):
        raise ValueError(f"index {tuple(given)} is out of range for a matrix with {m} columns.")
    columns = tuple(i % m for i in given)
    if len(set(columns)) < len(columns):
        raise ValueError(f"index {tuple(given)} names a column twice; add their cotangents and name it once.")
    for step in (1, -1):
        run = range(columns[0], columns[0] + step * len(columns), step) if columns else range(0)
        if tuple(run) == columns:
            return run
    return columns


def _top(k: int, which: str, m: int) -> range:
    k = operator.index(k)
    if which not in ("LA", "SA"):
        raise ValueError(f'which is {which!r}, expected "LA" (largest) or "SA" (smallest).')
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}, expected 1 <= k <= {m} for a matrix with {m} columns.")
    return range(m - 1, m - 1 - k, -1) if which == "LA" else range(k)


def _take(x: Array, columns: range | tuple[int, ...], axis: int) -> Array:
    """``x`` at the chosen places along `axis` (−1 or −2); a view where they are a range."""
    if isinstance(columns, range) and columns.step == 1:
        part: Any = slice(columns.start, columns.stop)
        return x[..., part] if axis == -1 else x[..., part, :]
    xp = array_api_compat.array_namespace(x)
    places = xp.asarray(list(columns), dtype=xp.int64, device=array_api_compat.device(x))
    return xp.take(x, places, axis=axis)


def _scatter(x: Array, columns: range | tuple[int, ...], m: int, axis: int) -> Array:
    """The inverse of `_take`: `x` at the chosen places of `m` along `axis`, zero elsewhere."""
    if columns == range(m):
        return x
    xp = array_api_compat.array_namespace(x)
    place = {column: j for j, column in enumerate(columns)}
    return _take(xp.concat([x, xp.zeros_like(x[..., :1] if axis == -1 else x[..., :1, :])], axis=axis),
                 tuple(place.get(i, len(columns)) for i in range(m)), axis)
