"""Singular value decomposition with its derivatives in closed form; of all triples, of the top k, or of values alone.

`ddnref._kernels.svd_vjp` and `ddnref._kernels.svd_jvp` have the equations. `svdvals` keeps small values: those of a
Gram matrix have an error of ``eps * s_1²``, so that one below ``sqrt(eps)`` times the largest has no digit there.
"""

from __future__ import annotations

import operator

from ddnref._core.arrays import (
    Array,
    Namespace,
    adjoint,
    among,
    as_dtype,
    double,
    eps,
    full,
    is_true,
    namespace,
    namespace_of,
    nan_where,
    own,
    real,
    real_dtype,
    refuse_non_finite,
    refuse_recording,
)
from ddnref._core.checks import conform
from ddnref._core.selection import take
from ddnref._kernels.dense import hermitian_part
from ddnref._kernels.dense import qr as dense_qr
from ddnref._kernels.dense import svd as _svd
from ddnref._kernels.eigh_jvp import needs_check, split_of
from ddnref._kernels.public import public
from ddnref._kernels.svd_jvp import Moved, moves_zero, triples_jvp
from ddnref._kernels.svd_vjp import Undetermined, triples_vjp
from ddnref._kernels.vectors import largest, power_of_two
from ddnref.errors import GaugeError, SingularError
from ddnref.linalg._eigh import neighbours, raise_split, ratio

ZERO = 16  # times eps and the largest one, up to which a singular value is rounding


@public
def svd(x: Array, /, *, check_finite: bool = False) -> tuple[Array, Array, Array]:
    r"""Thin singular value decomposition of a matrix of any shape.

    Parameters
    ----------
    x : (..., m, n) array, real or complex floating
    check_finite : bool, default False
        Read one flag on the host and raise `NonFiniteError` if `x` contains NaN or infinity. Without it such an item of
        the batch comes out as NaN, and the others are not affected.

    Returns
    -------
    u : (..., m, k) array, ``k = min(m, n)``
        Orthonormal left singular vectors in the columns.
    s : (..., k) real array
        Singular values, descending and not negative.
    vh : (..., k, n) array
        The adjoint of the right singular vectors, which are orthonormal: ``x = (u * s) @ vh``.

    Raises
    ------
    TypeError
        Not floating; a PyTorch tensor that requires grad outside ``ddnref.interop.torch.differentiable``.
    ValueError
        Fewer than two axes.
    NonFiniteError
        As `check_finite` says.

    See Also
    --------
    svd_topk : the largest triples, at a lower cost of the derivative.
    svdvals : the values alone, small ones included.

    Notes
    -----
    Cost: LAPACK's or cuSOLVER's divide and conquer, about ``6 m n² + 20 n³`` flops of a tall matrix.

    Examples
    --------
    >>> import numpy as np
    >>> u, s, vh = ddnref.svd(np.asarray([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    >>> s
    array([3., 2.])
    """
    xp = namespace(x=x)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., m, n).")
    refuse_recording("svd", x=x)  # PyTorch would record its own derivative beside ours
    if check_finite:
        refuse_non_finite("x", x)
    u, s, vh = _svd(x)
    return u, xp.where(s < 0, xp.zeros_like(s), s), vh  # a value that is zero may come out as rounding below it


@public
def svd_vjp(
    u_bar: Array | None,
    s_bar: Array | None,
    vh_bar: Array | None,
    u: Array,
    s: Array,
    vh: Array,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    r"""Gradient of a loss with respect to the matrix, from its gradients with respect to singular triples.

    Parameters
    ----------
    u_bar, s_bar, vh_bar : (..., m, k) array, (..., k) real array and (..., k, n) array, or None
        Cotangents of what `svd` returned; ``None`` for one that the loss does not use.
    u, s, vh : (..., m, k) array, (..., k) real array and (..., k, n) array
        What `svd` returned, ``k = min(m, n)``.
    rtol : float, optional
        Neighbouring singular values no further apart than ``rtol * s[0]`` count as equal, chained into clusters.
        Default ``16 * eps`` of the dtype. A larger one is needed only where the loss is known not to depend on how a
        group of close values is resolved, but its cotangents are less accurate than rounding.
    gauge_rtol : float, optional
        Largest part of the cotangents, relative to their largest entry, that may lie where the matrix determines
        nothing. Default ``sqrt(eps)``. Pass ``float("inf")`` to accept the masked gradient of a loss that you know to
        be invariant whatever its cotangents say.
    throw : bool, default True
        Raise what is listed below, reading one flag on the host. With ``False`` nothing is read and the gradient of
        such an item is NaN.

    Returns
    -------
    x_bar : (..., m, n) array

    Raises
    ------
    GaugeError
        If the loss depends on the basis chosen for equal singular values, on how these are ordered, or on the phase
        that u and v share.
    SingularError
        If a singular value is zero, up to ``16 * eps`` times the largest, and the loss depends on it (there is a kink,
        as that of ``abs``), or on where its vector points outside of the space of the others.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit; all cotangents ``None``; fewer than ``min(m, n)``
        triples.

    Notes
    -----
    With the skew parts :math:`J` of :math:`U^H \bar U` and :math:`L` of :math:`V^H \bar V`,
    :math:`P_{ij} = (J + L)_{ij} / (s_j - s_i)`, zero inside a cluster, and
    :math:`Q_{ij} = (J - L)_{ij} / (s_j + s_i)`, zero where both are zero,

    .. math::

       \begin{aligned}
       \bar X = {} & U \left( \mathrm{diag}(\bar s) + P + Q \right) V^H \\
       & + (I - U U^H)\, \bar U\, \mathrm{diag}(1/s)\, V^H + U\, \mathrm{diag}(1/s)\, \bar V^H (I - V V^H)
       \end{aligned}

    Cost: four products of m×m matrices of a square one (8 m³ flops real), ``8 m n²`` flops of a tall or wide one with
    n the smaller side. With `s_bar` alone ``2 m n²``.

    *Close and small values.* Entries of J + L and of J − L, and columns of the last two terms, that are no more than
    rounding are left out where a small difference or sum would amplify them (up to ``s[0] / (16 * sqrt(k))``). The
    result is that of the formula for cotangents whose columns differ from those given by at most ``8 * sqrt(m) * eps``
    of the part that counts. So a loss of the spaces of a group is right to rounding at every gap.

    *Equal values.* The masked value 0 is right for every loss of :math:`U_c U_c^H`, :math:`V_c V_c^H`,
    :math:`U_c V_c^H` and of symmetric functions of the values of a cluster c. Of zero values the last product is not
    determined. It is wrong for a loss that weights vectors by functions of the values that belong to them.
    A small residual is therefore necessary, not sufficient, as in `eigh_vjp`, and bridges refuse second derivatives
    there.

    References
    ----------
    .. [1] J. Townsend, "Differentiating the singular value decomposition" (2016).
    .. [2] Z.-Q. Wan and S.-X. Zhang, "Automatic differentiation for complex valued SVD", arXiv:1909.02659 (2019).

    Examples
    --------
    >>> import numpy as np
    >>> u, s, vh = ddnref.svd(np.asarray([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    >>> np.round(ddnref.svd_vjp(None, np.asarray([1.0, 0.0]), None, u, s, vh), 12) + 0.0  # of the spectral norm
    array([[0., 0.],
           [1., 0.],
           [0., 0.]])
    """
    signature = "(m,k),(k)r,(k,n),(m,k),(k)r,(k,n)"
    sizes = conform(signature, u=u, s=s, vh=vh, u_bar=u_bar, s_bar=s_bar, vh_bar=vh_bar).sizes
    _check_all(sizes, sizes["k"], "s")
    return _pulled(u_bar, s_bar, vh_bar, u, s, vh, sizes["k"], rtol, gauge_rtol, throw)


@public
def svd_jvp(
    x_dot: Array,
    u: Array,
    s: Array,
    vh: Array,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> tuple[Array, Array, Array]:
    r"""Derivative of the singular triples along a direction of the matrix.

    Parameters
    ----------
    x_dot : (..., m, n) array
        The direction.
    u, s, vh : (..., m, k) array, (..., k) real array and (..., k, n) array
        What `svd` returned, ``k = min(m, n)``.
    rtol : float, optional
        Which neighbouring values count as equal, as in `svd_vjp`.
    gauge_rtol : float, optional
        By how much a direction may split equal values or move zero ones, relative to its size. Default ``sqrt(eps)``.
        Pass ``float("inf")`` to accept the masked derivative for an output that you know to be a function of the spaces
        of each cluster and of symmetric functions of its values.
    throw : bool, default True
        Raise what is listed below, reading one flag on the host. With ``False`` nothing is read and the derivatives of
        such an item are NaN.

    Returns
    -------
    u_dot, s_dot, vh_dot : (..., m, k) array, (..., k) real array and (..., k, n) array
        The phase that the two vectors of a complex triple share stays, to first order: the component of ``u_dot``
        along u is minus that of ``v_dot`` along v.

    Raises
    ------
    GaugeError
        The direction splits equal singular values, other than zero: they have one-sided derivatives only, which are
        the eigenvalues of the Hermitian part of :math:`U_c^H \dot X V_c`.
    SingularError
        The direction moves a singular value that is zero, up to ``16 * eps`` times the largest.
    TypeError, ValueError
        As `svd_vjp`; `x_dot` is ``None``.

    Notes
    -----
    With :math:`S = U^H \dot X V`, :math:`P_{ij} = (S + S^H)_{ij} / (s_j - s_i)`, zero inside a cluster, and
    :math:`Q_{ij} = (S - S^H)_{ij} / (s_j + s_i)`, zero where both are zero,

    .. math::

       \begin{aligned}
       \dot s &= \mathrm{Re}\, \mathrm{diag}(S), \\
       \dot U &= \tfrac12 U (P + Q) + (I - U U^H)\, \dot X\, V\, \mathrm{diag}(1/s), \\
       \dot V &= \tfrac12 V (P - Q) + (I - V V^H)\, \dot X^H\, U\, \mathrm{diag}(1/s)
       \end{aligned}

    The adjoint of `svd_vjp` for the pairing :math:`\mathrm{Re} \sum \mathrm{conj}(\bar y)\,\dot y`. Cost: four products
    of m×m matrices of a square one. P and Q are exactly anti-Hermitian, so that derivatives of functions of the space
    of a group are right to rounding at every gap.

    Examples
    --------
    >>> import numpy as np
    >>> u, s, vh = ddnref.svd(np.asarray([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    >>> u_dot, s_dot, vh_dot = ddnref.svd_jvp(np.asarray([[0.0, 5.0], [7.0, 0.0], [0.0, 0.0]]), u, s, vh)
    >>> s_dot
    array([7., 5.])
    """
    sizes = conform("(m,k),(k)r,(k,n),(m,n)", u=u, s=s, vh=vh, x_dot=x_dot).sizes
    _check_all(sizes, sizes["k"], "s")
    return _pushed(x_dot, u, s, vh, sizes["k"], rtol, gauge_rtol, throw)


def _pulled(
    u_bar: Array | None,
    s_bar: Array | None,
    vh_bar: Array | None,
    u: Array,
    s: Array,
    vh: Array,
    k: int,
    rtol: float | None,
    gauge_rtol: float | None,
    throw: bool,
) -> Array:
    """Return the cotangent of the matrix from those of its k leading triples, and raise where there is none."""
    xp = namespace_of(u)
    if u_bar is None and s_bar is None and vh_bar is None:
        raise TypeError("u_bar, s_bar and vh_bar are all None: there is nothing to differentiate.")
    if k == 0:
        return u @ vh
    near, zero, gauge_rtol = equal_values(s, rtol), is_zero(s), half_of_digits(xp, s, gauge_rtol)
    v_bar = None if vh_bar is None else adjoint(vh_bar)
    x_bar, found = triples_vjp(u_bar, s_bar, v_bar, u, s, adjoint(vh), k, near, zero, gauge_rtol)
    if throw and found is not None:
        _raise_undetermined(found, gauge_rtol)
    return x_bar


def _pushed(
    x_dot: Array, u: Array, s: Array, vh: Array, k: int, rtol: float | None, gauge_rtol: float | None, throw: bool
) -> tuple[Array, Array, Array]:
    """Return the tangents of the k leading triples, and raise where there are none."""
    if k == 0:
        return u, s, vh
    gauge_rtol = half_of_digits(namespace_of(u), s, gauge_rtol)
    near, zero = equal_values(s, rtol), is_zero(s)
    u_dot, s_dot, v_dot, moved = triples_jvp(x_dot, u, s, adjoint(vh), k, near, zero, gauge_rtol)
    if throw:
        _raise_moved(moved, take(s, range(k), -1), gauge_rtol)
    return u_dot, s_dot, adjoint(v_dot)


def _check_all(sizes: dict[str, int], count: int, name: str) -> None:
    """Raise ``ValueError`` for a decomposition that was cut: the rest of the matrix counts in the derivative."""
    if count != min(sizes["m"], sizes["n"]):
        raise ValueError(
            f"{name} has {count} singular values, but the matrix has {sizes['m']} rows and {sizes['n']} columns: pass "
            "the whole thin decomposition, and use svd_topk for the largest triples."
        )


def equal_values(s: Array, rtol: float | None = None) -> Array:
    """Return which neighbours among descending singular values count as equal, ``(..., n - 1)``."""
    return neighbours(namespace_of(s), -s, rtol, s[..., :1])


def is_zero(s: Array) -> Array:
    """Return which singular values are rounding of the largest one."""
    return s <= ZERO * eps(namespace_of(s), s.dtype) * s[..., :1]


def half_of_digits(xp: Namespace, s: Array, gauge_rtol: float | None) -> float:
    """The default of `gauge_rtol`."""
    return eps(xp, s.dtype) ** 0.5 if gauge_rtol is None else gauge_rtol


def has_repeated(s: Array, rtol: float | None = None) -> Array:
    """Whether an item has equal singular values, or zero ones, where a second derivative is wrong."""
    xp = namespace_of(s)
    return xp.any(is_zero(s), axis=-1) | xp.any(equal_values(s, rtol), axis=-1)


def _raise_undetermined(found: Undetermined, gauge_rtol: float) -> None:
    """Raise what the flags say, reading one where all is well."""
    xp = namespace_of(found.gauge)
    if not is_true(xp.any(found.gauge | found.singular)):
        return
    if is_true(xp.any(found.singular)):
        raise SingularError(
            f"A singular value is zero to working precision{among(found.singular)}, and the loss depends on it or on "
            "a vector of it that the matrix leaves open: it has no derivative there, as the absolute value has none "
            "at zero. The most likely cause is a nuclear norm, or a sum of singular values, of a matrix with dependent "
            "columns. Drop dependent columns or rows, take a function that is smooth in s², such as sqrt(s² + δ²), "
            "leave the vectors of zero values out of the loss, or pass throw=False to get NaN for these items."
        )
    residuals = [ratio(*pair) for pair in found.measured]
    # NaN items do not count here: they are reported by their result.
    worst = max(float(xp.max(xp.where(xp.isnan(r), xp.zeros_like(r), r))) for r in residuals)
    raise GaugeError(
        f"The loss depends on a choice that the matrix does not determine{among(found.gauge)}: gauge residual "
        f"{worst:.1e} > gauge_rtol {gauge_rtol:.1e}. The most likely cause is a loss that treats singular vectors or "
        "values inside a cluster of equal singular values individually, cuts such a cluster, or depends on the phase "
        "that u and v share; no gradient exists there. Write it through the cluster's products U_c U_cᴴ, V_c V_cᴴ and "
        "U_c V_cᴴ; or pass throw=False to get NaN for these items, gauge_rtol=inf to accept the masked gradient."
    )


def _raise_moved(moved: Moved, s: Array, gauge_rtol: float) -> None:
    """Raise where a direction moves zero values or splits equal ones, reading one flag where it does not."""
    xp, kink, split = namespace_of(s), moved.kink, moved.split
    if not is_true(xp.any(kink if split is None else kink | split.bad)):
        return
    if split is None or is_true(xp.any(kink)):
        raise SingularError(
            f"The direction moves a singular value that is zero to working precision{among(kink)}: it has no "
            "derivative there, as the absolute value has none at zero. The most likely cause is a matrix with "
            "dependent columns. Drop dependent columns or rows, or pass throw=False to get NaN for these items, "
            "gauge_rtol=inf if the result is smooth in s²."
        )
    remedy = "The one-sided ones are the eigenvalues of the Hermitian part of the block U_cᴴ Ẋ V_c. Use these,"
    raise_split(split, s, gauge_rtol, "singular values", remedy)


# --- the top k --------------------------------------------------------------------------------------------------------


@public
def svd_topk(x: Array, /, k: int, *, check_finite: bool = False) -> tuple[Array, Array, Array]:
    """The k largest singular triples, from a full thin decomposition.

    Parameters
    ----------
    x, check_finite
        As in `svd`, with the same errors and cost.
    k : int
        How many, ``1 <= k <= min(m, n)``; `ValueError` otherwise.

    Returns
    -------
    u, s, vh : (..., m, k) array, (..., k) real array and (..., k, n) array

    Examples
    --------
    >>> import numpy as np
    >>> u, s, vh = ddnref.svd_topk(np.diag(np.asarray([1.0, 4.0, 2.0])), 2)
    >>> s
    array([4., 2.])
    """
    return svd_topk_fwd(x, k, check_finite=check_finite)[0]


@public
def svd_topk_fwd(
    x: Array, /, k: int, *, check_finite: bool = False
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    """Compute `svd_topk` and what its reverse pass needs, all triples: ``(u, s, vh), (u_all, s_all, vh_all)``."""
    refuse_recording("svd_topk", x=x)  # by its own name, before svd does
    u, s, vh = svd(x, check_finite=check_finite)
    columns = range(_top(k, s.shape[-1]))
    # Copies, because PyTorch does not take views of what is saved for outputs in forward mode.
    return (own(take(u, columns, -1)), own(take(s, columns, -1)), own(take(vh, columns, -2))), (u, s, vh)


@public
def svd_topk_vjp(
    u_bar: Array | None,
    s_bar: Array | None,
    vh_bar: Array | None,
    u: Array,
    s: Array,
    vh: Array,
    u_all: Array,
    s_all: Array,
    vh_all: Array,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    """Gradient of a loss of the k largest singular triples, at a cost of O(m n k).

    Parameters
    ----------
    u_bar, s_bar, vh_bar, u, s, vh, u_all, s_all, vh_all
        Cotangents as in `svd_vjp`, the outputs of `svd_topk_fwd` and what it saved.
    rtol, gauge_rtol, throw
        As in `svd_vjp`. A cluster of equal singular values that the k-th one cuts has no derivative: it shows as a
        gauge-dependent loss.

    Returns
    -------
    x_bar : (..., m, n) array
        As from `svd_vjp`, with the same errors.

    Examples
    --------
    >>> import numpy as np
    >>> outputs, saved = ddnref.svd_topk_fwd(np.diag(np.asarray([1.0, 4.0, 2.0])), 1)
    >>> ddnref.svd_topk_vjp(None, np.ones(1), None, *outputs, *saved) + 0.0  # of the spectral norm
    array([[0., 0., 0.],
           [0., 1., 0.],
           [0., 0., 0.]])
    """
    signature = "(m,l),(l)r,(l,n),(m,k),(k)r,(k,n),(m,k),(k)r,(k,n)"
    outputs = {"u": u, "s": s, "vh": vh, "u_bar": u_bar, "s_bar": s_bar, "vh_bar": vh_bar}
    sizes = conform(signature, u_all=u_all, s_all=s_all, vh_all=vh_all, **outputs).sizes
    _check_all(sizes, sizes["l"], "s_all")
    k = _top(sizes["k"], sizes["l"])
    return _pulled(u_bar, s_bar, vh_bar, u_all, s_all, vh_all, k, rtol, gauge_rtol, throw)


@public
def svd_topk_jvp(
    x_dot: Array,
    u: Array,
    s: Array,
    vh: Array,
    u_all: Array,
    s_all: Array,
    vh_all: Array,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> tuple[Array, Array, Array]:
    """Derivative of the k largest singular triples along a direction of the matrix, at a cost of O(m n k).

    Parameters
    ----------
    x_dot, u, s, vh, u_all, s_all, vh_all
        The direction as in `svd_jvp`, the outputs of `svd_topk_fwd` and what it saved.
    rtol, gauge_rtol, throw
        As in `svd_jvp`. A direction that splits a cluster which the k-th value cuts is found by one more vector of the
        cluster's space.

    Returns
    -------
    u_dot, s_dot, vh_dot : (..., m, k) array, (..., k) real array and (..., k, n) array
        As from `svd_jvp`, with the same errors.

    Examples
    --------
    >>> import numpy as np
    >>> outputs, saved = ddnref.svd_topk_fwd(np.diag(np.asarray([1.0, 4.0, 2.0])), 1)
    >>> u_dot, s_dot, vh_dot = ddnref.svd_topk_jvp(np.diag(np.asarray([5.0, 6.0, 7.0])), *outputs, *saved)
    >>> s_dot
    array([6.])
    """
    signature = "(m,l),(l)r,(l,n),(m,k),(k)r,(k,n),(m,n)"
    outputs = {"u": u, "s": s, "vh": vh}
    sizes = conform(signature, u_all=u_all, s_all=s_all, vh_all=vh_all, **outputs, x_dot=x_dot).sizes
    _check_all(sizes, sizes["l"], "s_all")
    return _pushed(x_dot, u_all, s_all, vh_all, _top(sizes["k"], sizes["l"]), rtol, gauge_rtol, throw)


def _top(k: int, count: int) -> int:
    """Check how many of `count` triples are asked for."""
    k = operator.index(k)  # TypeError for 1.5
    if not 1 <= k <= count:
        raise ValueError(f"k is {k}, expected 1 <= k <= {count}, the smaller side of the matrix.")
    return k


# --- the values alone -------------------------------------------------------------------------------------------------


@public
def svdvals(a: Array, /) -> Array:
    r"""Singular values of a matrix, the largest first.

    Parameters
    ----------
    a : (..., m, n) array, real or complex floating

    Returns
    -------
    s : (..., k) real array, ``k = min(m, n)``
        Descending and not negative. An item with NaN or infinity comes out as NaN.

    Raises
    ------
    TypeError
        Not floating; a PyTorch tensor that requires grad.
    ValueError
        Fewer than two axes.

    See Also
    --------
    svdvals_fwd, svdvals_vjp
    svd : singular vectors too.
    ddnref.curvature.gram_eigvalsh : their squares in a fraction of the time, for factors whose small ones do not
        matter, that come in pieces, or that are operators.

    Notes
    -----
    By a QR factorisation of the matrix, or of its adjoint if it is wide, and the decomposition of the small factor. A
    singular value has an error of ``eps * s_1``. Single precision is computed in double where the device has it (not on
    Apple's GPU, in JAX only with ``jax_enable_x64``), so that even one of 1e-9 times the largest is right to single
    precision. Cost of a tall matrix: ``2 m n²`` flops and about ``3 n³``, and a copy of the matrix.

    References
    ----------
    .. [1] T. F. Chan, "An improved algorithm for computing the singular value decomposition", ACM Transactions on
       Mathematical Software 8 (1982).

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.svdvals(np.asarray([[3.0, 0.0], [0.0, 1e-9], [4.0, 0.0]]))
    array([5.e+00, 1.e-09])
    """
    xp, r, _, scale, bad = _triangle(a)
    s = _nothing(r) if 0 in r.shape else xp.linalg.svdvals(r)
    return _singular_values(s, a, scale, bad)


@public
def svdvals_fwd(a: Array, /) -> tuple[Array, tuple[Array, Array, Array]]:
    """Compute `svdvals` and what its reverse pass needs, with the same parameters and errors.

    Returns
    -------
    s : (..., k) real array
    (u, s_all, w) : (..., m, k), (..., k) and (..., n, k) arrays
        The decomposition ``A = U diag(s) Wᴴ``, singular vectors in the columns.
    """
    _, r, q, scale, bad = _triangle(a)
    u, s, w_h = _svd(r)
    u, w = u if q is None else q @ u, adjoint(w_h)
    # Those of the adjoint are exchanged.
    vectors = (w, u) if a.shape[-1] > a.shape[-2] else (u, w)
    u, w = (nan_where(bad[..., None, None], as_dtype(v, a)) for v in vectors)
    s = _singular_values(s, a, scale, bad)
    return s, (u, 1.0 * s, w)  # a separate array: an output that is saved as well confuses torch.compile


def _triangle(a: Array) -> tuple[Namespace, Array, Array | None, Array, Array]:
    """Validate; return R and Q of the matrix over a power of two, that power, and which items are not finite.

    A wide matrix is replaced by its adjoint. Q is ``None``, and R the matrix itself, where a factorisation would save
    nothing.
    """
    xp = namespace(a=a)
    refuse_recording("svdvals", a=a)
    if a.ndim < 2:
        raise ValueError(f"a has shape {tuple(a.shape)}, expected (..., m, n).")
    bad = ~xp.all(xp.isfinite(a), axis=(-2, -1))
    r = double(xp, xp.where(bad[..., None, None], full((), 0.0, a), a))
    scale = power_of_two(r, 2)
    r = r / as_dtype(scale, r)[..., None, None]  # squares stay in the range of exponents
    if a.shape[-1] > a.shape[-2]:
        r = adjoint(r)
    if r.shape[-2] == r.shape[-1] or 0 in r.shape:
        return xp, r, None, scale, bad
    q, r = dense_qr(r)
    return xp, r, q, scale, bad


def _nothing(r: Array) -> Array:
    """Return the singular values of tall matrices without entries, or of no matrices."""
    return largest(namespace_of(r).matrix_transpose(r))


def _singular_values(s: Array, a: Array, scale: Array, bad: Array) -> Array:
    """Undo the scaling, in the precision of the input."""
    xp = namespace_of(s)
    s = xp.where(s < 0, xp.zeros_like(s), s) * scale[..., None]
    return nan_where(bad[..., None], xp.astype(s, real_dtype(xp, a.dtype), copy=False))


@public
def svdvals_vjp(
    s_bar: Array,
    s: Array,
    u: Array,
    s_all: Array,
    w: Array,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    r"""Gradient of a loss of the singular values with respect to the matrix.

    Parameters
    ----------
    s_bar : (..., k) real array
        Cotangent of the singular values.
    s, u, s_all, w
        What `svdvals_fwd` returned.
    rtol, gauge_rtol
        As in `svd_vjp`.
    throw : bool, default True
        Raise what is listed below, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    a_bar : (..., m, n) array

    Raises
    ------
    GaugeError
        The loss treats equal singular values differently.
    SingularError
        A singular value is zero, up to ``16 eps`` times the largest, and the loss depends on it: it has a kink there,
        as ``abs`` has. Losses that are smooth in ``s²`` do not depend on it.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit.

    Notes
    -----
    .. math:: \bar A = U \, \mathrm{diag}(\bar s) \, W^H

    Nothing is divided by a singular value, however small. Cost: ``2 m n k`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> s, saved = ddnref.svdvals_fwd(np.asarray([[3.0, 0.0], [0.0, 1e-9], [4.0, 0.0]]))
    >>> np.abs(np.round(ddnref.svdvals_vjp(np.ones(2), s, *saved), 12))  # of the nuclear norm
    array([[0.6, 0. ],
           [0. , 1. ],
           [0.8, 0. ]])
    """
    found = conform("(m,k),(k)r,(k)r,(n,k),(k)r", u=u, s=s, s_all=s_all, w=w, s_bar=s_bar)
    k = found.sizes["k"]
    if k == 0:
        return u @ adjoint(w)
    gauge_rtol = half_of_digits(found.xp, s, gauge_rtol)
    near, zero = equal_values(s, rtol), _is_zero(found.xp, s)
    a_bar, undetermined = triples_vjp(None, s_bar, None, u, s, w, k, near, zero, gauge_rtol)
    if throw and undetermined is not None:
        _raise_undetermined(undetermined, gauge_rtol)
    return a_bar


@public
def svdvals_jvp(
    a_dot: Array,
    s: Array,
    u: Array,
    s_all: Array,
    w: Array,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    r"""Derivative of the singular values along a direction of the matrix.

    Parameters
    ----------
    a_dot : (..., m, n) array
        The direction.
    s, u, s_all, w
        What `svdvals_fwd` returned.
    rtol, gauge_rtol
        As in `svd_jvp`.
    throw : bool, default True
        Raise what is listed below, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    s_dot : (..., k) real array

    Raises
    ------
    GaugeError
        The direction splits equal singular values, other than zero: they have one-sided derivatives only, which are
        the eigenvalues of the Hermitian part of :math:`U_c^H \dot A W_c`.
    SingularError
        A singular value is zero, up to ``16 eps`` times the largest, and the direction moves it: it has a kink there,
        as ``abs`` has. Pass ``gauge_rtol=float("inf")`` for a result that is smooth in ``s²``.
    TypeError, ValueError
        As `svdvals_vjp`; `a_dot` is ``None``.

    Notes
    -----
    .. math:: \dot s = \mathrm{Re} \, \mathrm{diag}(U^H \dot A \, W)

    Cost: ``2 m n k`` flops, and ``2 k³`` to look for equal ones, which NumPy does only where there are any.

    Examples
    --------
    >>> import numpy as np
    >>> s, saved = ddnref.svdvals_fwd(np.asarray([[3.0, 0.0], [0.0, 1e-9], [4.0, 0.0]]))
    >>> np.round(ddnref.svdvals_jvp(np.asarray([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), s, *saved), 12)
    array([0.6, 2. ])
    """
    xp = conform("(m,k),(k)r,(k)r,(n,k),(m,n)", u=u, s=s, s_all=s_all, w=w, a_dot=a_dot).xp
    if s.shape[-1] == 0:
        return xp.zeros_like(s)
    gauge_rtol = half_of_digits(xp, s, gauge_rtol)
    near, zero, columns = equal_values(s, rtol), _is_zero(xp, s), range(s.shape[-1])
    t = adjoint(u) @ a_dot
    s_dot, split = real(xp.sum(t * xp.matrix_transpose(w), axis=-1)), None
    if needs_check(near, gauge_rtol):
        split = split_of(hermitian_part(t @ w), None, None, columns, near, gauge_rtol, largest(a_dot, 2))
        s_dot = nan_where(split.bad[..., None], s_dot)
    moved = Moved(split, moves_zero(a_dot, u, w, zero, gauge_rtol))
    if throw:
        _raise_moved(moved, s, gauge_rtol)
    return nan_where(moved.kink[..., None], s_dot)


def _is_zero(xp: Namespace, s: Array) -> Array:
    """Return which singular values are rounding of the precision in which `svdvals` computed them."""
    return s <= ZERO * eps(xp, double(xp, s).dtype) * s[..., :1]


# --- second derivatives -----------------------------------------------------------------------------------------------


def saved_svdvals_vjp(
    u_bar: Array | None, s_bar: Array | None, w_bar: Array | None, u: Array, s: Array, w: Array
) -> Array:
    """Turn cotangents of the saved decomposition into one of the matrix, as second derivatives need.

    The gauge of one part alone is not checked: only the sum over all parts does not depend on it.
    """
    near, zero = equal_values(s), _is_zero(namespace_of(s), s)
    return triples_vjp(u_bar, s_bar, w_bar, u, s, w, s.shape[-1], near, zero, float("inf"))[0]


def saved_svdvals_jvp(a_dot: Array, u: Array, s: Array, w: Array) -> tuple[Array, Array, Array]:
    """Turn a tangent of the matrix into those of the saved decomposition, the transpose of `saved_svdvals_vjp`."""
    near, zero = equal_values(s), _is_zero(namespace_of(s), s)
    u_dot, s_dot, w_dot, _ = triples_jvp(a_dot, u, s, w, s.shape[-1], near, zero, float("inf"))
    return u_dot, s_dot, w_dot


def has_repeated_value(s: Array, rtol: float | None = None) -> Array:
    """Return what `has_repeated` does, for values as exact as those of `svdvals`."""
    xp = namespace_of(s)
    return xp.any(_is_zero(xp, s), axis=-1) | xp.any(equal_values(s, rtol), axis=-1)
