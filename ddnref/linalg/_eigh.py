"""Symmetric / Hermitian eigendecomposition and its VJP in closed form; of all eigenpairs, or of the top k.

`ddnref._kernels.eigh_vjp` has the equations, for all eigenpairs and for a subset of them, and computes both.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NoReturn

from ddnref._core.arrays import (
    Array,
    Namespace,
    adjoint,
    among,
    eps,
    full,
    is_true,
    namespace,
    namespace_of,
    nan_where,
    real_dtype,
    refuse_non_finite,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes, check_square, conform
from ddnref._core.selection import Columns, columns_of, take
from ddnref._kernels.dense import eigh as _eigh
from ddnref._kernels.dense import hermitian_part
from ddnref._kernels.eigh_jvp import Split, eigenpairs_jvp, one_sided_derivatives
from ddnref._kernels.eigh_vjp import antisymmetric_part, cluster_mask, eigenpairs_vjp, jump, masked
from ddnref._kernels.public import public
from ddnref.errors import GaugeError

RTOL = 16  # neighbours closer than this many eps·max|λ| are equal; exact repeats split by at most 1, their spread by 13


@public
def eigh(x: Array, /, *, check_finite: bool = False) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of a real symmetric or complex Hermitian matrix.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Its Hermitian part ``½ (X + Xᴴ)`` is decomposed, so a non-symmetric input is symmetrised, not half ignored.
    check_finite : bool, default False
        Read one flag on the host and raise `NonFiniteError` if `x` contains NaN or infinity. Without it such an item of
        the batch comes out as NaN, and the others are not affected.

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
        As `check_finite` says.

    See Also
    --------
    spectral_function : functions of the matrix, differentiable at any degeneracy.

    Notes
    -----
    Cost: LAPACK's or cuSOLVER's divide and conquer, about 9 m³ flops; two extra m×m arrays.

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh(np.asarray([[2.0, 1.0], [1.0, 2.0]]))
    >>> np.round(w, 12)
    array([1., 3.])
    """
    namespace(x=x)
    check_square("x", x)
    refuse_recording("eigh", x=x)  # PyTorch would record its own derivative beside ours
    if check_finite:
        refuse_non_finite("x", x)
    return _eigh(hermitian_part(x))  # exactly Hermitian, so that every library reads the same matrix


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
    w_bar, v_bar : (..., k) real array and (..., m, k) array, or None
        Cotangents of eigenvalues and eigenvectors; ``None`` for one that the loss does not use.
    w, v : (..., m) real array and (..., m, m) array
        All eigenvalues, ascending, and all eigenvectors, from `eigh`.
    index : sequence of k distinct int, optional
        The columns of `v` that `w_bar` and `v_bar` belong to, negatives counting from the end. All by default.
    rtol : float, optional
        Neighbouring eigenvalues no further apart than ``rtol * max|w|`` count as equal, chained into clusters.
        Default ``16 * eps`` of the dtype. A larger one is needed only where the loss is known not to depend on how a
        group of close eigenvalues is resolved, but its cotangents are less accurate than rounding.
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
        or on the phase of a complex eigenvector.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit; repeated or out-of-range `index`.

    Notes
    -----
    With :math:`M = V^H \bar V` and :math:`F_{ij} = 1/(\lambda_j - \lambda_i)`, zero inside a cluster,

    .. math:: \bar X = V \left( \mathrm{diag}(\bar\lambda) + \tfrac12 F \circ (M - M^H) \right) V^H

    for the pairing :math:`\mathrm{Re} \sum \mathrm{conj}(\bar y)\,\dot y`. Cost: three products of m×m
    matrices (6 m³ flops real), three m×m arrays; with `index` 6 m²k flops and no m×m array but the result.

    *Close eigenvalues.* Entries of :math:`M - M^H` that are no more than rounding, ``4 * eps`` times the norms of both
    columns, are left out where the gap would amplify them (up to ``max|w| / (16 * sqrt(m))``). The result is that of
    the formula for a cotangent whose columns differ from those given by at most ``8 * sqrt(m) * eps`` of the part that
    counts, which leaves out the component along the eigenvector itself. So a loss of the space of a group is right to
    rounding at every gap. Single entries much smaller than the rest of their column are not each accurate.

    *Equal eigenvalues.* The masked value 0 is right for every loss of the cluster's projector and of symmetric
    functions of its eigenvalues. It is wrong for a loss that weights the eigenvectors by functions of their
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
    xp, columns = _checked(w_bar, v_bar, w, v, index)
    if 0 in v.shape:  # an empty matrix has no largest eigenvalue
        return xp.zeros_like(v)
    if gauge_rtol is None:
        gauge_rtol = eps(xp, w.dtype) ** 0.5  # half of the digits
    size = radius(xp, w)
    x_bar, bad = eigenpairs_vjp(w_bar, v_bar, w, v, columns, neighbours(xp, w, rtol, size), size, gauge_rtol)
    if throw and bad is not None and is_true(xp.any(bad)):
        # Only now compute by how much, for the message.
        raise_gauge(gauge_residual(w_bar, v_bar, w, v, index=index, rtol=rtol), gauge_rtol)
    return x_bar


@public
def eigh_jvp(
    x_dot: Array,
    w: Array,
    v: Array,
    /,
    *,
    index: Sequence[int] | None = None,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> tuple[Array, Array]:
    r"""Derivative of eigenvalues and eigenvectors along a direction of the matrix.

    Parameters
    ----------
    x_dot : (..., m, m) array
        The direction. Its Hermitian part counts, as `eigh` symmetrises.
    w, v : (..., m) real array and (..., m, m) array
        All eigenvalues, ascending, and all eigenvectors, from `eigh`.
    index : sequence of k distinct int, optional
        The columns of `v` whose derivatives are wanted, negatives counting from the end. All by default.
    rtol : float, optional
        Which neighbouring eigenvalues count as equal, as in `eigh_vjp`.
    gauge_rtol : float, optional
        By how much a direction may split equal eigenvalues: the largest entry of :math:`S_{cc} - \mu I` in a cluster
        c, :math:`\mu` the mean of the diagonal, relative to the largest of S. Default ``sqrt(eps)``. Pass
        ``float("inf")`` to accept the masked derivative for an output that you know to be a function of the cluster's
        projector and of symmetric functions of its eigenvalues.
    throw : bool, default True
        Raise `GaugeError` where the direction splits equal eigenvalues, reading one flag on the host. With ``False``
        nothing is read and the derivatives of such an item are NaN.

    Returns
    -------
    w_dot, v_dot : (..., k) real array and (..., m, k) array
        Derivatives of the chosen eigenvalues and eigenvectors. Each ``v_dot[..., i]`` is orthogonal to its
        eigenvector, which fixes the phase of a complex one.

    Raises
    ------
    GaugeError
        If the direction splits equal eigenvalues, chosen or cut by the choice: single eigenvalues and eigenvectors
        have no derivative there that is linear in the direction. `cluster_derivatives` has the one-sided ones.
    TypeError, ValueError
        As `eigh_vjp`; `x_dot` is ``None``.

    Notes
    -----
    With :math:`S = V^H \dot X V` and :math:`F_{ij} = 1/(\lambda_j - \lambda_i)`, zero inside a cluster,

    .. math:: \dot\lambda = \mathrm{diag}(S), \qquad \dot V = V (F \circ S)

    The adjoint of `eigh_vjp` for the pairing :math:`\mathrm{Re} \sum \mathrm{conj}(\bar y)\,\dot y`. Cost: three
    products of m×m matrices (6 m³ flops real); with `index` 6 m²k flops, and as many again to look for clusters that
    the choice cuts, or those of two columns if the chosen ones are consecutive.

    *Close eigenvalues.* The result is that of the formula for a direction that differs from the given one by rounding,
    and :math:`F \circ S` is exactly anti-Hermitian. So derivatives of a function of the space of a group are right to
    the rounding of the sum that forms them, even where those of single vectors are amplified by a small gap. Nothing is
    left out here, while `eigh_vjp` leaves out what is rounding in its cotangents. Both sides of
    :math:`\langle \bar V, \dot V \rangle = \langle \bar X, \dot X \rangle` therefore differ by rounding relative to
    :math:`\|\bar V\| \|\dot V\|`, at every gap.

    *Equal eigenvalues.* The masked value 0 is right for every function of the cluster's projector and of symmetric
    functions of its eigenvalues, whatever the direction. A loss is not seen here, so that a direction which splits the
    cluster is reported instead of being averaged in silence.

    References
    ----------
    .. [1] J. R. Magnus, "On differentiating eigenvalues and eigenvectors", Econometric Theory 1 (1985), Theorem 1.

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh(np.diag(np.asarray([1.0, 2.0, 4.0])))
    >>> w_dot, v_dot = ddnref.eigh_jvp(np.diag(np.asarray([0.0, 0.0, 1.0])), w, v)
    >>> w_dot
    array([0., 0., 1.])
    """
    xp = conform("(m,m),(m)r,(m,m)", v=v, w=w, x_dot=x_dot).xp
    columns = columns_of(index, v.shape[-1])
    if 0 in v.shape:  # an empty matrix has no largest eigenvalue
        return take(w, columns, -1), take(v, columns, -1)
    if gauge_rtol is None:
        gauge_rtol = eps(xp, w.dtype) ** 0.5  # half of the digits
    w_dot, v_dot, split = eigenpairs_jvp(x_dot, w, v, columns, neighbours(xp, w, rtol), gauge_rtol)
    if throw and split is not None and is_true(xp.any(split.bad)):
        raise_split(split, take(w, columns, -1), gauge_rtol)
    return w_dot, v_dot


@public
def cluster_derivatives(x_dot: Array, w: Array, v: Array, /, *, rtol: float | None = None) -> Array:
    r"""One-sided derivatives of all eigenvalues along a direction, which may split equal ones.

    Parameters
    ----------
    x_dot, w, v, rtol
        As in `eigh_jvp`, with the same static errors.

    Returns
    -------
    w_dot : (..., m) real array
        Derivatives of the sorted eigenvalues of :math:`X + t \dot X` at :math:`t = 0`, for growing t: ascending within
        each cluster of equal eigenvalues. For falling t they are ``-cluster_derivatives(-x_dot, w, v)``.

    Notes
    -----
    In a cluster c they are the eigenvalues of :math:`V_c^H \dot X V_c`, elsewhere those of `eigh_jvp`. They are not
    linear in the direction, so that no derivative can be formed from them by the chain rule for single eigenvalues.
    Cost: three products of m×m matrices and one decomposition; no value is read on the host.

    References
    ----------
    .. [1] P. Lancaster, "On eigenvalues of matrices dependent on a parameter", Numerische Mathematik 6 (1964),
       theorem 7.

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh(np.diag(np.asarray([1.0, 1.0, 4.0])))
    >>> x_dot = np.asarray([[0.0, 3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> np.round(ddnref.cluster_derivatives(x_dot, w, v), 12)
    array([-3.,  3.,  1.])
    """
    xp = conform("(m,m),(m)r,(m,m)", v=v, w=w, x_dot=x_dot).xp
    if 0 in v.shape:
        return xp.zeros_like(w)
    finite = xp.all(xp.isfinite(w), axis=-1, keepdims=True)
    return nan_where(~finite, one_sided_derivatives(x_dot, v, neighbours(xp, w, rtol)))


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
    """Measure how strongly a loss depends on choices that the matrix does not determine.

    Parameters
    ----------
    w_bar, v_bar, w, v, index, rtol
        As in `eigh_vjp`, with the same static errors.

    Returns
    -------
    residual : (...) real array
        The largest of: the part of ``M − Mᴴ`` inside clusters of equal eigenvalues and, for complex input, on its
        diagonal (the phase), relative to the largest entry of ``M = Vᴴ V̄``; the jump of ``w_bar`` between
        neighbours of a cluster, relative to its largest entry. Around machine precision for a well-defined loss,
        of order one for a gauge-dependent one. Cost: one product, 2 m²k flops.

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh(np.diag(np.asarray([1.0, 1.0, 2.0])))
    >>> float(ddnref.gauge_residual(np.asarray([1.0, 1.0, 0.0]), None, w, v))  # λ_1 + λ_2: no order needed
    0.0
    >>> float(ddnref.gauge_residual(np.asarray([1.0, 0.0, 0.0]), None, w, v))  # λ_1 alone
    1.0
    """
    xp, columns = _checked(w_bar, v_bar, w, v, index)
    residual = full(w.shape[:-1], 0.0, w)  # 0 for a loss that is well defined
    if 0 in v.shape:
        return residual
    near = neighbours(xp, w, rtol)  # clusters of equal eigenvalues
    missing = xp.any(xp.isnan(w), axis=-1)  # NaN must not look like a small residual
    # Equal eigenvalues must have equal cotangents, or their order matters.
    if w_bar is not None:
        residual = xp.maximum(residual, ratio(*jump(w_bar, near, columns)))
        missing = missing | xp.any(xp.isnan(w_bar), axis=-1)
    # Inside a cluster the basis is free, and on the diagonal the phase.
    if v_bar is not None:
        m_ = adjoint(v) @ v_bar
        part = masked(antisymmetric_part(m_, columns), m_, cluster_mask(near, columns))
        residual = xp.maximum(residual, ratio(*part))
        missing = missing | xp.any(xp.isnan(v_bar), axis=(-2, -1))
    return nan_where(missing, residual)


def _checked(
    w_bar: Array | None, v_bar: Array | None, w: Array, v: Array, index: Sequence[int] | None
) -> tuple[Namespace, Columns]:
    """Validate the arguments of a VJP; return their namespace and the columns that `index` chooses.

    By hand, because `conform` takes 6 µs more, a tenth of the whole VJP of five 32×32 matrices.
    """
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v)
    check_square("v", v)
    real = real_dtype(xp, v.dtype)
    check_dtypes(w=(w, real), w_bar=(w_bar, real), v_bar=(v_bar, v.dtype))
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    columns = columns_of(index, v.shape[-1])
    k = len(columns)
    check_shapes(w=(w, tuple(v.shape[:-1])), w_bar=(w_bar, (*v.shape[:-2], k)), v_bar=(v_bar, (*v.shape[:-1], k)))
    return xp, columns


def radius(xp: Namespace, w: Array) -> Array:
    """Return ``max|λ|`` of an ascending spectrum, ``(..., 1)``."""
    return xp.maximum(-w[..., :1], w[..., -1:])


def neighbours(xp: Namespace, w: Array, rtol: float | None, size: Array | None = None) -> Array:
    """Return which neighbours in the sorted spectrum of that radius count as equal, ``(..., m − 1)``."""
    if rtol is None:
        rtol = RTOL * eps(xp, w.dtype)
    return w[..., 1:] - w[..., :-1] <= rtol * (radius(xp, w) if size is None else size)  # false for NaN


def has_repeated(w: Array, rtol: float | None = None) -> Array:
    """Whether `eigh_vjp` masks anything, for each item: a second derivative through it is wrong there."""
    xp = namespace_of(w)
    return xp.any(neighbours(xp, w, rtol), axis=-1)


def ratio(part: Array, whole: Array) -> Array:
    """``part / whole``, and `part` itself where `whole` is zero."""
    xp = namespace_of(part)
    return part / xp.where(whole > 0, whole, xp.ones_like(whole))


def raise_gauge(residual: Array, gauge_rtol: float) -> NoReturn:
    """Raise `GaugeError`, saying what a loss that is not well defined depends on, and by how much."""
    xp = namespace_of(residual)
    # NaN items do not count here: they are reported by their result.
    worst = float(xp.max(xp.where(xp.isnan(residual), xp.zeros_like(residual), residual)))
    raise GaugeError(
        f"The loss depends on a choice that the matrix does not determine{among(residual > gauge_rtol)}: gauge "
        f"residual {worst:.1e} > gauge_rtol {gauge_rtol:.1e}. The most likely cause is a loss that treats eigenvectors "
        "or eigenvalues inside a cluster of equal eigenvalues individually, cuts such a cluster, or depends on the "
        "phase of a complex eigenvector; no gradient exists there. Write it through the cluster's projector V_c V_cᴴ "
        "or through ddnref.spectral_function; or pass throw=False to get NaN for these items, gauge_rtol=inf to "
        "accept the masked gradient."
    )


def raise_split(split: Split, w: Array, gauge_rtol: float, what: str = "eigenvalues", remedy: str = "") -> NoReturn:
    """Raise `GaugeError`, naming the first eigenvalue ``w``, (..., k), that the direction splits from its equals."""
    xp, size = namespace_of(w), w.shape[-1]
    # The most split eigenvalue of the first such item.
    item = int(xp.argmax(xp.astype(xp.reshape(split.bad, (-1,)), xp.int32)))
    by_how_much = xp.reshape(ratio(split.part, split.whole[..., None]), (-1, size))[item, :]
    value = float(xp.reshape(w, (-1, size))[item, int(xp.argmax(by_how_much))])
    remedy = remedy or (
        "Use ddnref.cluster_derivatives for the one-sided ones of the eigenvalues, or ddnref.spectral_function for a "
        "function of the matrix;"
    )
    raise GaugeError(
        f"The direction splits equal {what}{among(split.bad)}, those at {value:.6g}, by "
        f"{float(xp.max(by_how_much)):.1e} > gauge_rtol {gauge_rtol:.1e} of its size. Their derivatives are those of "
        f"the projected direction, other ones on either side, so that none is linear in the direction. {remedy} or "
        "pass throw=False to get NaN for these items, gauge_rtol=inf to accept the masked derivative if the result "
        "depends on the projector only."
    )


# --- the top k ------------------------------------------------------------------------------------------------------


@public
def eigh_topk(x: Array, /, k: int, *, which: str = "LA", check_finite: bool = False) -> tuple[Array, Array]:
    """The k largest or smallest eigenpairs, most wanted first, from a full decomposition.

    Parameters
    ----------
    x, check_finite
        As in `eigh`, with the same errors and cost.
    k : int
        How many, ``1 <= k <= m``; `ValueError` otherwise.
    which : {"LA", "SA"}
        The largest eigenvalues, descending, or the smallest, ascending.

    Returns
    -------
    w, v : (..., k) real array and (..., m, k) array

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh_topk(np.diag(np.asarray([1.0, 4.0, 2.0])), 2)
    >>> w
    array([4., 2.])
    """
    return eigh_topk_fwd(x, k, which=which, check_finite=check_finite)[0]


@public
def eigh_topk_fwd(
    x: Array, /, k: int, *, which: str = "LA", check_finite: bool = False
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Compute `eigh_topk` and what its reverse pass needs: ``(w, v), (w_all, v_all)``, all pairs as from `eigh`."""
    refuse_recording("eigh_topk", x=x)  # by its own name, before eigh does
    w, v = eigh(x, check_finite=check_finite)
    columns = _top(k, which, w.shape[-1])  # a range, so that the columns are views
    return (take(w, columns, -1), take(v, columns, -1)), (w, v)


@public
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
    """Gradient of a loss of the top k eigenpairs, at a cost of O(m²k).

    Parameters
    ----------
    w_bar, v_bar, w, v, w_all, v_all
        Cotangents as in `eigh_vjp`, the outputs of `eigh_topk_fwd` and what it saved.
    which, rtol, gauge_rtol, throw
        As in `eigh_topk` and `eigh_vjp`. A cluster of equal eigenvalues that the k-th one cuts has no derivative:
        it shows as a gauge-dependent loss.

    Returns
    -------
    x_bar : (..., m, m) array
        As from `eigh_vjp`, with the same errors.

    Examples
    --------
    >>> import numpy as np
    >>> (w, v), saved = ddnref.eigh_topk_fwd(np.diag(np.asarray([1.0, 4.0, 2.0])), 1)
    >>> ddnref.eigh_topk_vjp(np.ones(1), None, w, v, *saved)  # of the largest eigenvalue
    array([[0., 0., 0.],
           [0., 1., 0.],
           [0., 0., 0.]])
    """
    sizes = conform("(m,m),(m)r,(k)r,(m,k)", v_all=v_all, w_all=w_all, w=w, v=v).sizes
    index = _top(sizes["k"], which, sizes["m"])  # the same columns as in the forward
    return eigh_vjp(w_bar, v_bar, w_all, v_all, index=index, rtol=rtol, gauge_rtol=gauge_rtol, throw=throw)


@public
def eigh_topk_jvp(
    x_dot: Array,
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
) -> tuple[Array, Array]:
    """Derivative of the top k eigenpairs along a direction of the matrix, at a cost of O(m²k).

    Parameters
    ----------
    x_dot, w, v, w_all, v_all
        The direction as in `eigh_jvp`, the outputs of `eigh_topk_fwd` and what it saved.
    which, rtol, gauge_rtol, throw
        As in `eigh_topk` and `eigh_jvp`. A direction that splits a cluster which the k-th eigenvalue cuts is found by
        one more vector of the cluster's space.

    Returns
    -------
    w_dot, v_dot : (..., k) real array and (..., m, k) array
        As from `eigh_jvp`, with the same errors.

    Examples
    --------
    >>> import numpy as np
    >>> (w, v), saved = ddnref.eigh_topk_fwd(np.diag(np.asarray([1.0, 4.0, 2.0])), 1)
    >>> w_dot, v_dot = ddnref.eigh_topk_jvp(np.diag(np.asarray([5.0, 6.0, 7.0])), w, v, *saved)
    >>> w_dot
    array([6.])
    """
    sizes = conform("(m,m),(m)r,(k)r,(m,k)", v_all=v_all, w_all=w_all, w=w, v=v).sizes
    index = _top(sizes["k"], which, sizes["m"])  # the columns of the forward
    return eigh_jvp(x_dot, w_all, v_all, index=index, rtol=rtol, gauge_rtol=gauge_rtol, throw=throw)


def _top(k: int, which: str, m: int) -> range:
    """The columns of the k most wanted of m ascending eigenvalues, most wanted first."""
    k = operator.index(k)  # TypeError for 1.5
    if which not in ("LA", "SA"):
        raise ValueError(f'which is {which!r}, expected "LA" (largest) or "SA" (smallest).')
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}, expected 1 <= k <= {m} for a matrix with {m} columns.")
    return range(m - 1, m - 1 - k, -1) if which == "LA" else range(k)
