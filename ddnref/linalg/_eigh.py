"""Symmetric / Hermitian eigendecomposition and its VJP in closed form.

``X = V diag(λ) Vᴴ``. With ``M = Vᴴ V̄`` and ``F_ij = 1 / (λ_j − λ_i)`` between distinct eigenvalues, 0 elsewhere,

    X̄ = V (diag(λ̄) + ½ F ∘ (M − Mᴴ)) Vᴴ                                 (all eigenpairs)
    X̄ = sym(V (F_K ∘ (Vᴴ V̄_K)) V_Kᴴ) + V_K diag(λ̄_K) V_Kᴴ                (a subset K of them)

The middle matrix is Hermitian before the outer products, and only the anti-Hermitian part of ``M`` enters:
a loss cannot depend on the length of an eigenvector.
"""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ddnref._core.arrays import (
    Array,
    Namespace,
    eps,
    full,
    is_true,
    namespace,
    nan_where,
    real_dtype,
    refuse_non_finite,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes, check_square
from ddnref._core.selection import Columns, columns_of, take
from ddnref._kernels import numpy as _numpy
from ddnref._kernels.dense import adjoint, hermitian_part, hermitian_product
from ddnref._kernels.dense import eigh as _eigh
from ddnref._kernels.public import public
from ddnref.linalg._gauge import RTOL, exceeds, jump, masked, raise_gauge, ratio


@public
def eigh(x: Array, /, *, check_finite: bool = False) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of a real symmetric or complex Hermitian matrix.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Its Hermitian part ``½ (X + Xᴴ)`` is decomposed, so a non-symmetric input is symmetrised, not half ignored.
    check_finite : bool, default False
        Raise `NonFiniteError` if `x` contains NaN or infinity, reading one flag on the host.

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
    NonFiniteError
        Only with ``check_finite=True``.

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
    if check_finite:
        refuse_non_finite("x", x)
    return _eigh(hermitian_part(x))


@public
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
    r"""Gradient of a loss with respect to the matrix, from its gradients with respect to eigenpairs.

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
    With :math:`M = V^H \bar V` and :math:`F_{ij} = 1/(\lambda_j - \lambda_i)`, zero inside a cluster,

    .. math:: \bar X = V \left( \mathrm{diag}(\bar\lambda) + \tfrac12 F \circ (M - M^H) \right) V^H

    for the pairing :math:`\mathrm{Re} \sum \mathrm{conj}(\bar y)\,\dot y`. Cost: three products of m×m
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
    xp, columns = _check(w_bar, v_bar, w, v, index)
    if 0 in v.shape:
        return xp.zeros_like(v)
    near = neighbours(xp, w, rtol)
    if gauge_rtol is None:
        gauge_rtol = eps(xp, w.dtype) ** 0.5
    x_bar, bad = _eigh_vjp(xp, w_bar, v_bar, w, v, columns, near, gauge_rtol, throw)
    if throw and bad is not None and is_true(xp.any(bad)):
        raise_gauge(gauge_residual(w_bar, v_bar, w, v, index=index, rtol=rtol), gauge_rtol)
    return x_bar


@public
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

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh(np.diag(np.asarray([1.0, 1.0, 2.0])))
    >>> float(ddnref.gauge_residual(np.asarray([1.0, 1.0, 0.0]), None, w, v))  # λ_1 + λ_2: no order needed
    0.0
    >>> float(ddnref.gauge_residual(np.asarray([1.0, 0.0, 0.0]), None, w, v))  # λ_1 alone
    1.0
    """
    xp, columns = _check(w_bar, v_bar, w, v, index)
    residual = full(w.shape[:-1], 0.0, w)
    if 0 in v.shape:
        return residual
    near = neighbours(xp, w, rtol)
    if w_bar is not None:
        residual = xp.maximum(residual, ratio(*jump(w_bar, near, columns)))
    if v_bar is not None:
        m_ = adjoint(v) @ v_bar
        residual = xp.maximum(residual, ratio(*masked(m_, cluster_mask(near, columns), columns)))
    bad = xp.any(xp.isnan(w), axis=-1)
    bad = bad if w_bar is None else bad | xp.any(xp.isnan(w_bar), axis=-1)
    bad = bad if v_bar is None else bad | xp.any(xp.isnan(v_bar), axis=(-2, -1))
    return nan_where(bad, residual)


def has_repeated(w: Array, rtol: float | None = None) -> Array:
    """Per item, whether `eigh_vjp` masks anything: there a second derivative through it is wrong."""
    xp = array_api_compat.array_namespace(w)
    return xp.any(neighbours(xp, w, rtol), axis=-1)


# --- below: the algorithm, without validation ----------------------------------------------------------------


def _eigh_vjp(
    xp: Namespace,
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    columns: Columns,
    near: Array,
    gauge_rtol: float,
    throw: bool,
) -> tuple[Array, Array | None]:
    """The gradient, and which items have none; ``None`` for the latter says that there was no gauge to check."""
    if array_api_compat.is_numpy_array(v) and v_bar is not None and columns == range(w.shape[-1]):
        return _numpy_vjp(w_bar, v_bar, w, v, near, gauge_rtol, throw)
    v_k = take(v, columns, -1)
    bad = None if w_bar is None else exceeds(*jump(w_bar, near, columns), gauge_rtol)
    if v_bar is None:
        return hermitian_product(v_k * _or_nan(w_bar, bad, throw)[..., None, :], v_k), bad
    m_, same = adjoint(v) @ v_bar, cluster_mask(near, columns)
    gauge = exceeds(*masked(m_, same, columns), gauge_rtol)
    bad = gauge if bad is None else bad | gauge
    diagonal = _or_nan(xp.zeros_like(w[..., : len(columns)]) if w_bar is None else w_bar, bad, throw)
    twice = 2 * w  # the ½ of the Hermitian part, where it costs nothing
    gap = take(twice, columns, -1)[..., None, :] - twice[..., :, None]
    k = m_ / xp.where(same, full((), float("inf"), gap), gap)  # ½ F ∘ M; no branch divides by zero
    p = v @ k + v_k * (diagonal / 2)[..., None, :]
    if columns == range(w.shape[-1]):
        x_bar = p @ adjoint(v)
        return x_bar + adjoint(x_bar), bad
    return hermitian_product(xp.concat([p, v_k], axis=-1), xp.concat([v_k, p], axis=-1)), bad


def _numpy_vjp(
    w_bar: Array | None, v_bar: Array, w: Array, v: Array, near: Array, gauge_rtol: float, throw: bool
) -> tuple[Array, Array | None]:
    """All columns of NumPy arrays, in place; the gauge is looked at only where something was masked."""
    x_bar, masked = _numpy.eigh_vjp(w_bar, v_bar, w, v, near)
    if masked is None:
        return x_bar, None
    bad = exceeds(*masked, gauge_rtol)
    if w_bar is not None:
        bad |= exceeds(*jump(w_bar, near, range(w.shape[-1])), gauge_rtol)
    if not throw:
        x_bar[bad] = float("nan")
    return x_bar, bad


def _or_nan(diagonal: Array, bad: Array | None, throw: bool) -> Array:
    """``λ̄``, or NaN for items without a gradient: from the diagonal it reaches every entry, at no further pass."""
    return diagonal if throw or bad is None else nan_where(bad[..., None], diagonal)


def neighbours(xp: Namespace, w: Array, rtol: float | None) -> Array:
    """Which neighbours in the sorted spectrum count as equal, ``(..., m − 1)``."""
    if rtol is None:
        rtol = RTOL * eps(xp, w.dtype)
    size = xp.maximum(-w[..., :1], w[..., -1:])  # max|λ| of an ascending spectrum
    return w[..., 1:] - w[..., :-1] <= rtol * size


def cluster_mask(near: Array, columns: Columns) -> Array:
    """Whether eigenvalue i and the j-th chosen one are in one cluster, chained through neighbours: ``(..., m, k)``."""
    xp = array_api_compat.array_namespace(near)
    apart = xp.astype(~near, xp.int32)
    first = xp.zeros((*near.shape[:-1], 1), dtype=apart.dtype, device=array_api_compat.device(near))
    cluster = xp.concat([first, xp.cumulative_sum(apart, axis=-1, dtype=apart.dtype)], axis=-1)
    return cluster[..., :, None] == take(cluster, columns, -1)[..., None, :]


# --- static facts ---------------------------------------------------------------------------------------------


def _check(
    w_bar: Array | None, v_bar: Array | None, w: Array, v: Array, index: Sequence[int] | None
) -> tuple[Namespace, Columns]:
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v)
    check_square("v", v)
    real = real_dtype(xp, v.dtype)
    check_dtypes(w=(w, real), w_bar=(w_bar, real), v_bar=(v_bar, v.dtype))
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    m = v.shape[-1]
    columns = columns_of(index, m)
    k = len(columns)
    check_shapes(
        w=(w, tuple(v.shape[:-1])),
        w_bar=(w_bar, (*v.shape[:-2], k)),
        v_bar=(v_bar, (*v.shape[:-1], k)),
    )
    return xp, columns
