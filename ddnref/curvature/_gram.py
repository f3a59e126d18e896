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
    among,
    as_dtype,
    conj,
    eps,
    full,
    is_complex,
    is_true,
    named_arrays,
    namespace,
    nan_where,
    real,
    real_dtype,
    refuse_non_finite,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._core.selection import take
from ddnref._kernels import singularity
from ddnref._kernels.dense import constant, eigh, eigvalsh, identity
from ddnref._kernels.eigh_jvp import chosen, diagonal_of, hermitian_block, needs_check, projected, split_of
from ddnref._kernels.eigh_vjp import (
    antisymmetric_part,
    close_gap,
    cluster_mask,
    exceeds,
    is_rounding,
    jump,
    left_out,
    masked,
    own_entries,
)
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest, safe_norm
from ddnref.errors import SingularError
from ddnref.linalg._complement import checked_tangents
from ddnref.linalg._eigh import eigh_vjp, neighbours, raise_gauge, raise_split, ratio
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import Factor, Pieces, Tall, tall


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
        Descending, and never negative: a zero eigenvalue comes out as zero or as rounding above it. The other
        ``|D − n|`` eigenvalues of ``V Vᴴ`` or ``Vᴴ V`` are zero.

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
    accurate to ``eps * λ_1``, not to ``eps * √(λ_1 λ_i)`` as from a singular value decomposition of V. For arrays in
    single precision it is formed and decomposed in double precision where the device has it (not on Apple's GPU, in JAX
    only with ``jax_enable_x64``), and eps is then that of double precision; operators are multiplied in their own.

    So ``√w`` has an error of ``√(eps λ_1)`` where an eigenvalue is zero. For a nuclear norm, or any other function that
    small singular values matter to, use `ddnref.svdvals`. A log-determinant ``Σ log(w + δ)`` is right for
    ``δ ≫ n eps λ_1``.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.curvature.gram_eigvalsh(np.asarray([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    array([9., 1.])
    """
    v, k = _gram(factor, "gram_eigvalsh", check_finite)
    return take(as_dtype(not_negative(eigvalsh(k)), _real_like(v)), columns_of(v), -1)


@public
def gram_eigvalsh_fwd(factor: Factor, /, *, check_finite: bool = False) -> tuple[Array, tuple[Array, Array]]:
    """Compute `gram_eigvalsh` and what its reverse pass needs, with the same parameters and errors.

    Returns
    -------
    w : (..., min(D, n)) real array
    (w_all, u_all) : (..., n) and (..., n, n) arrays
        The decomposition of the Gram matrix, ascending, as from `eigh`.
    """
    v, k = _gram(factor, "gram_eigvalsh", check_finite)
    w_all, u_all = _decomposed(v, k)
    return take(w_all, columns_of(v), -1), (w_all, u_all)


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
        What `gram_eigvalsh_fwd` returned for `factor`.
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
    columns = columns_of(v)
    xp = _check_saved(v, len(columns), w_bar, w, w_all, u_all)
    # K̄ = U diag(λ̄) Uᴴ; the freedom inside clusters is checked below, where zero eigenvalues are no cluster.
    k_bar = eigh_vjp(w_bar, None, w_all, u_all, index=columns, gauge_rtol=float("inf"), throw=False)
    # Eigenvalues that are zero are equal, but have a gradient of zero each, because V u = 0.
    zero = w <= zero_tolerance(xp, w, None) * w[..., :1]
    residual = jump(xp.where(zero, xp.zeros_like(w_bar), w_bar), neighbours(xp, w_all, rtol), columns)
    bad = _gauge_check([residual], gauge_rtol, throw)
    # V̄ = 2 V K̄
    return v.join_bar(v.times(nan_where(bad[..., None, None], 2 * k_bar)))


@public
def gram_eigvalsh_jvp(
    factor_dot: Any,
    w: Array,
    w_all: Array,
    u_all: Array,
    factor: Factor,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    r"""Derivative of the eigenvalues along a direction of the factor.

    Parameters
    ----------
    factor_dot : (..., D, n) array, a tuple of pieces, or a tuple with one direction for each parameter
        As the factor was given; ``None`` for a piece or parameter that does not move.
    w, w_all, u_all
        What `gram_eigvalsh_fwd` returned for `factor`.
    rtol, gauge_rtol, throw
        As in `eigh_jvp`.

    Returns
    -------
    w_dot : (..., min(D, n)) real array

    Raises
    ------
    GaugeError
        If the direction splits equal eigenvalues other than zero (only with ``throw=True``).
        `ddnref.cluster_derivatives` of the Gram matrix has the one-sided derivatives.
    TypeError, ValueError
        As `gram_eigvalsh_vjp`; nothing moves; an operator without ``params_jvp``.

    Notes
    -----
    With :math:`V^H V = U \Lambda U^H`, :math:`\dot\lambda = 2 \, \mathrm{Re} \, \mathrm{diag}(U^H V^H \dot V U)`.
    It exists at zero eigenvalues too, where it vanishes. Cost: 2 D n² + 2 n³ flops, and 2 n³ to look for
    equal ones, which NumPy does only where there are any.

    Examples
    --------
    >>> import numpy as np
    >>> v = np.asarray([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> w, saved = ddnref.curvature.gram_eigvalsh_fwd(v)
    >>> ddnref.curvature.gram_eigvalsh_jvp(np.asarray([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]), w, *saved, v)
    array([6., 4.])
    """
    v = tall(factor)
    columns = columns_of(v)
    xp = _check_saved(v, len(columns), None, w, w_all, u_all)
    v_dot, images = _moved(factor_dot, factor)
    if 0 in u_all.shape:
        return xp.zeros_like(w)
    # K̇ = VᴴV̇ + V̇ᴴV
    if images is None:
        images = v_dot.apply(xp.broadcast_to(identity(v.n, u_all), u_all.shape))
    half, near = v.adjoint(images), _near(xp, w_all, rtol)
    gauge_rtol = eps(xp, w.dtype) ** 0.5 if gauge_rtol is None else gauge_rtol
    u = take(u_all, columns, -1)
    w_dot = 2 * real(xp.sum(conj(u) * (half @ u), axis=-2))
    if not needs_check(near, gauge_rtol):
        return w_dot
    *_, split = projected(2 * half, u_all, columns, near, gauge_rtol, _size_of_motion(images, w_all))
    if split is None:
        return w_dot
    if throw and is_true(xp.any(split.bad)):
        raise_split(split, w, gauge_rtol, remedy=_ONE_SIDED)
    return nan_where(split.bad[..., None], w_dot)


_ONE_SIDED = "Use ddnref.cluster_derivatives of the Gram matrix for the one-sided ones of the eigenvalues;"


def _near(xp: Namespace, w_all: Array, rtol: float | None) -> Array:
    """Flag equal neighbours other than zero ones, which stay zero because ``V u = 0``."""
    zero = w_all <= zero_tolerance(xp, w_all, None) * w_all[..., -1:]
    return neighbours(xp, w_all, rtol) & ~zero[..., 1:]


def _moved(factor_dot: Any, factor: Factor) -> tuple[Tall, Pieces | None]:
    """The products of the tangent of a factor, validated, and its pieces; operators have none."""
    if factor_dot is None:
        raise TypeError("factor_dot is None: there is no direction.")
    if not isinstance(factor, LinearOperator):
        bare = not isinstance(factor, (list, tuple))
        arrays, pieces = (factor,) if bare else tuple(factor), (factor_dot,) if bare else tuple(factor_dot)
        dots = checked_tangents("factor_dot" if bare else "factor_dot[{}]", pieces, arrays)
        return tall(dots[0] if bare else dots), dots
    if factor.params_jvp is None or factor.adjoint_jvp is None:
        raise TypeError(
            "The operator has no params_jvp and adjoint_jvp, which compute V̇ u and V̇ᴴ e. Pass them: "
            "LinearOperator(..., params_jvp=lambda params, params_dot, u: ..., adjoint_jvp=...)."
        )
    params, params_jvp, adjoint_jvp = factor.params, factor.params_jvp, factor.adjoint_jvp
    dots = checked_tangents("factor_dot[{}]", factor_dot if isinstance(factor_dot, tuple) else (factor_dot,), params)
    # V̇ is an operator with the tangents as its parameters.
    motion = factor._replace(
        params=dots,
        apply=lambda params_dot, u: params_jvp(params, params_dot, u),
        adjoint=lambda params_dot, e: adjoint_jvp(params, params_dot, e),
    )
    return tall(motion), None


def _size_of_motion(images: Pieces, w_all: Array) -> Array:
    """The size of the numbers that are added up in ``VᴴV̇ + V̇ᴴV``, whose sum may be much smaller."""
    xp = namespace(w_all=w_all)
    return xp.sqrt(w_all[..., -1]) * xp.max(xp.stack([largest(image, 2) for image in images], axis=-1), axis=-1)


def has_repeated(w_all: Array, rtol: float | None = None) -> Array:
    """Whether an item has equal eigenvalues other than zero, where a second derivative is wrong.

    Those that are zero stay equal when the factor moves, because ``V u = 0`` for their eigenvectors.
    """
    xp = array_api_compat.array_namespace(w_all)
    return xp.any(_near(xp, w_all, rtol), axis=-1)


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
        Eigenvalues up to ``zero_rtol * λ_1`` count as zero; default ``16 * eps``.
    throw : bool, default True
        Raise `SingularError`, reading one flag on the host. With ``False`` the eigenvector of a zero eigenvalue is NaN.

    Returns
    -------
    w : (..., k) real array
        Descending.
    e : (..., D, k) array, or a tuple of pieces ``(..., D_l, k)``, or ``(..., \*range_shape, k)`` for an operator
        Orthonormal eigenvectors ``V u / √λ`` in the columns.

    Raises
    ------
    SingularError
        If k exceeds the rank of V: an eigenvector of a zero eigenvalue is not in the range of V.
    TypeError, ValueError, NonFiniteError
        As `gram_eigvalsh`; `k` out of range.

    See Also
    --------
    gram_eigh_fwd, gram_eigh_vjp

    Notes
    -----
    Cost: that of `gram_eigvalsh` with eigenvectors (9 n³ flops), and 2 D n k. The error of an eigenvector is
    ``eps * λ_1`` over the gap, and its length is accurate to ``eps * λ_1 / λ_i``, with the eps that `gram_eigvalsh`
    has.

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
    """Compute `gram_eigh` and what its reverse pass needs, with the same parameters and errors.

    Returns
    -------
    (w, e)
        The outputs of `gram_eigh`.
    (w_all, u_all)
        As from `gram_eigvalsh_fwd`.
    """
    v, gram = _gram(factor, "gram_eigh", check_finite)
    columns = columns_of(v, k)
    w_all, u_all = _decomposed(v, gram)
    w, u = take(w_all, columns, -1), take(u_all, columns, -1)
    # e_i = V u_i / √λ_i
    scale = inverse_roots(w, w_all[..., -1:], zero_rtol, throw)
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
        What `gram_eigh_fwd` returned for `factor`.
    rtol, gauge_rtol, throw
        As in `eigh_vjp`.

    Returns
    -------
    factor_bar
        As from `gram_eigvalsh_vjp`.

    Raises
    ------
    GaugeError
        If the loss depends on the basis chosen inside a cluster of equal eigenvalues, on how they are ordered, on the
        phase of a complex eigenvector, or on a cluster that the k-th one cuts (only with ``throw=True``).
    TypeError, ValueError
        As `gram_eigvalsh_vjp`.

    Notes
    -----
    With :math:`K = V^H V = U \Lambda U^H`, :math:`M = U^H V^H \bar E`, and :math:`F_{ji} = M_{ji} / (\lambda_i -
    \lambda_j)`, zero inside a cluster,

    .. math::

       \begin{gathered}
       \bar V = A \, \mathrm{diag}(\sqrt\lambda) \, U_K^H
              + E \left( F^H U^H + 2 \, \mathrm{diag}(\bar\lambda \sqrt\lambda) \, U_K^H \right), \\
       A = \left( \bar E + V U T \right) \mathrm{diag}(\lambda)^{-1},
       \end{gathered}

    where T is F, and :math:`-M_{ji} / \lambda_j` inside a cluster: the component of :math:`\bar e_i` outside the range
    of V sees the eigenvalue 0 of :math:`V V^H`, those inside a cluster see nothing. Exact at repeated eigenvalues for
    every loss that is well defined there, and for factors whose smaller eigenvalues are zero. Rounding between close
    eigenvalues is left out as in `eigh_vjp`. Cost: 8 D n k + 4 n² k
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
    namespace(w=w)
    k = w.shape[-1] if w.ndim else 0
    xp = _check_saved(v, k, w_bar, w, w_all, u_all)
    e, columns = v.split(e, "e"), columns_of(v, k)
    check_shapes(e=(e[0], (*e[0].shape[:-1], k)))
    near, u = neighbours(xp, w_all, rtol), take(u_all, columns, -1)
    root = xp.sqrt(nan_where(~(w > 0), w))  # refused eigenvectors leave no gradient
    # Measure how much of the loss depends on the freedom inside clusters: of λ̄ the jumps, of Ē what e_jᴴ ē_i has.
    residuals = [] if w_bar is None else [jump(w_bar, near, columns)]
    if e_bar is not None:
        e_bar = v.split(e_bar, "e_bar")
        check_shapes(e_bar=(e_bar[0], (*e_bar[0].shape[:-1], k)))
        same, m_ = cluster_mask(near, columns), adjoint(u_all) @ v.adjoint(e_bar)
        scaled = m_ / as_dtype(root, m_)[..., None, :]
        inside, whole = masked(antisymmetric_part(scaled, columns), scaled, same)
        lengths = xp.stack([safe_norm(xp.matrix_transpose(e_l)) for e_l in e_bar], axis=-1)
        residuals.append((inside, xp.maximum(whole, largest(safe_norm(lengths)))))
    bad = _gauge_check(residuals, gauge_rtol, throw)
    root = nan_where(bad[..., None], root)
    # E · 2 diag(λ̄ √λ) U_Kᴴ
    u_bar = 0 * u if w_bar is None else u * as_dtype(2 * w_bar * root, u)[..., None, :]
    if e_bar is None:
        return v.join_bar(v.outer(e, u_bar))
    # A = (Ē + V U T) / λ, here without one of the two √λ
    small = _rounding(m_, e, e_bar, w_all, columns)
    t, f = _quotients(xp, m_, same, small, w_all, columns)
    a = tuple((b + vut) / as_dtype(root, vut)[..., None, :] for b, vut in zip(e_bar, v.apply(u_all @ t), strict=True))
    # V̄ = A diag(√λ) U_Kᴴ + E (Fᴴ Uᴴ + 2 diag(λ̄ √λ) U_Kᴴ), as one product
    left = tuple(xp.concat([a_l, e_l], axis=-1) for a_l, e_l in zip(a, e, strict=True))
    return v.join_bar(v.outer(left, xp.concat([u, u_all @ f + u_bar], axis=-1)))


@public
def gram_eigh_jvp(
    factor_dot: Any,
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
) -> tuple[Array, Any]:
    r"""Derivative of the k largest eigenpairs of ``V Vᴴ`` along a direction of V.

    Parameters
    ----------
    factor_dot
        As in `gram_eigvalsh_jvp`.
    w, e, w_all, u_all
        What `gram_eigh_fwd` returned for `factor`.
    rtol, gauge_rtol, throw
        As in `eigh_jvp`.

    Returns
    -------
    w_dot : (..., k) real array
    e_dot
        Derivatives of the eigenvectors, in the form of `e`. Each is orthogonal to its own, but for the phase that a
        complex one takes over from ``V u``, and to those of equal eigenvalues.

    Raises
    ------
    GaugeError
        If the direction splits equal eigenvalues, chosen or cut by the k-th one (only with ``throw=True``).
    TypeError, ValueError
        As `gram_eigvalsh_jvp`.

    Notes
    -----
    With :math:`K = V^H V = U \Lambda U^H`, :math:`N = U^H V^H \dot V U_K`, :math:`N' = U^H \dot V^H V U_K` and
    :math:`S = N + N'`,

    .. math::

       \dot\lambda = \mathrm{Re} \, \mathrm{diag}(S), \qquad
       \dot E = (\dot V U_K + V U T) \, \mathrm{diag}(\lambda)^{-1/2}, \qquad
       T_{ji} = S_{ji} / (\lambda_i - \lambda_j)

    with :math:`-N_{ji} / \lambda_j` inside a cluster and :math:`-S_{ii} / (2 \lambda_i)` on the diagonal. Exact at
    repeated eigenvalues for every function of the cluster's projector, and for factors whose smaller eigenvalues are
    zero. Close eigenvalues are treated as in `eigh_jvp`. Cost: 8 D n k + 6 n² k flops. As an eigenvalue approaches zero
    its eigenvector has no derivative: it grows as :math:`1/\sqrt{\lambda_i}`, and is NaN where the eigenvector is.

    Examples
    --------
    >>> import numpy as np
    >>> v = np.asarray([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> (w, e), saved = ddnref.curvature.gram_eigh_fwd(v, 1)
    >>> w_dot, e_dot = ddnref.curvature.gram_eigh_jvp(np.asarray([[1.0, 0.0], [0.0, 0.0], [6.0, 0.0]]), w, e, *saved, v)
    >>> w_dot, np.abs(np.round(e_dot[:, 0], 12))
    (array([6.]), array([0., 0., 2.]))
    """
    v = tall(factor)
    namespace(w=w)
    k = w.shape[-1] if w.ndim else 0
    xp = _check_saved(v, k, None, w, w_all, u_all)
    e, columns = v.split(e, "e"), columns_of(v, k)
    check_shapes(e=(e[0], (*e[0].shape[:-1], k)))
    v_dot, _ = _moved(factor_dot, factor)
    gauge_rtol = eps(xp, w.dtype) ** 0.5 if gauge_rtol is None else gauge_rtol
    near, root = _near(xp, w_all, rtol), xp.sqrt(w)
    checked = k > 0 and needs_check(near, gauge_rtol)

    # V̇ U_K and V U_K
    u_k, cut = chosen(u_all, columns, near if checked else None)
    moved = v_dot.apply(u_k)
    refused = tuple(xp.isnan(e_l) for e_l in e)  # V u is zero, or rounding, for these
    images = tuple(
        xp.where(no, full((), 0.0, e_l), e_l * as_dtype(root, e_l)[..., None, :])
        for no, e_l in zip(refused, e, strict=True)
    )
    u_h = adjoint(u_all)
    n_ = u_h @ v.adjoint(moved)
    s = hermitian_block(n_ + u_h @ v_dot.adjoint(images), columns)
    w_dot = diagonal_of(s, columns)

    # Ė = (V̇ U_K + V U T) / √λ
    t = _tangent_quotients(s, n_, w_all, near, columns)
    bad, split = xp.any(xp.isnan(w), axis=-1), None
    if checked:
        others, size = None, _size_of_motion(moved, w_all)
        if cut is not None:
            # One more vector for a cluster that the k-th eigenvalue cuts.
            more = v_dot.apply(cut.vectors)
            others = u_h @ (v.adjoint(more) + v_dot.adjoint(v.apply(cut.vectors)))
            size = xp.maximum(size, _size_of_motion(more, w_all))
        split = split_of(s, others, cut, columns, near, gauge_rtol, size)
        if throw and is_true(xp.any(split.bad)):
            raise_split(split, w, gauge_rtol, remedy=_ONE_SIDED)
        bad = bad | split.bad
    root = nan_where(bad[..., None] | ~(w > 0), root)
    e_dot = tuple(
        nan_where(no, (x + y) / as_dtype(root, y)[..., None, :])
        for no, x, y in zip(refused, moved, v.apply(u_all @ t), strict=True)
    )
    return nan_where(bad[..., None], w_dot), v.join(e_dot)


def _tangent_quotients(s: Array, n_: Array, w_all: Array, near: Array, columns: range) -> Array:
    """T of the notes of `gram_eigh_jvp`; no branch divides by zero."""
    xp, one = namespace(w_all=w_all), full((), 1.0, w_all)
    gap = take(w_all, columns, -1)[..., None, :] - w_all[..., :, None]
    own = xp.where(w_all == 0, one, w_all)[..., :, None]
    inside = -n_ / as_dtype(own, n_)
    t = xp.where(cluster_mask(near, columns), inside, s / as_dtype(xp.where(gap == 0, one, gap), s))
    return xp.where(own_entries(columns, w_all.shape[-1], s), -s / as_dtype(2 * own, s), t)


def _rounding(m_: Array, e: Any, e_bar: Any, w_all: Array, columns: range) -> Array:
    """Whether entries of ``N − Nᴴ``, with ``N_ji = e_jᴴ ē_i = M_ji / √λ_j``, are no more than rounding of ``VᴴĒ``."""
    xp, w = namespace(w_all=w_all), take(w_all, columns, -1)
    # Zero eigenvalues have no eigenvector in the range of V: NaN is never rounding.
    zero = w_all <= zero_tolerance(xp, w_all, None) * w_all[..., -1:]
    root_all = xp.sqrt(xp.where(zero, full((), float("nan"), w_all), w_all))
    n_ = constant(m_) / as_dtype(root_all, m_)[..., None]
    own = xp.linalg.diagonal(take(n_, columns, -2))
    # The part of each cotangent that counts: all but the component along its own eigenvector.
    parts = (constant(b_l) - constant(e_l) * own[..., None, :] for b_l, e_l in zip(e_bar, e, strict=True))
    lengths = safe_norm(xp.stack([safe_norm(xp.matrix_transpose(part)) for part in parts], axis=-1))
    gap = w[..., None, :] - w_all[..., :, None]
    growth = xp.sqrt(w_all[..., -1:]) / root_all  # V ē has the rounding of the largest eigenvalue
    return is_rounding(
        antisymmetric_part(n_, columns), lengths, gap, close_gap(w_all, w_all[..., -1:]), columns, growth
    )


def _quotients(
    xp: Namespace, m_: Array, same: Array, small: Array, w_all: Array, columns: range
) -> tuple[Array, Array]:
    """T and F of the notes; no branch divides by zero.

    Entries that are rounding count as those of a cluster, but have the derivative of the quotient. On the diagonal F
    has the phase that e_i takes over from u_i. It is zero for a loss that does not depend on it, and completes a second
    derivative, in which a part of the loss is one of U.
    """
    one = full((), 1.0, w_all)
    w = take(w_all, columns, -1)[..., None, :]
    # T_ji = M_ji / (λ_i − λ_j), inside a cluster −M_ji / λ_j
    gap = w - w_all[..., :, None]
    gap = xp.where(gap == 0, one, gap)
    own = xp.where(w_all == 0, -one, -w_all)[..., :, None]
    t = m_ / as_dtype(xp.where(same | small, own, gap), m_)
    # What is left out there, M_ji λ_i / (λ_j (λ_i − λ_j)), is zero but for its derivative.
    small = small & ~same
    t = t - left_out(xp.where(small, m_, full((), 0.0, m_)), small) * as_dtype(w / (own * gap), m_)
    f = left_out(xp.where(same, full((), 0.0, m_), m_), small) / as_dtype(gap, m_)  # F = T outside clusters
    if not is_complex(m_):
        return t, f
    # F_ii = (M_ii − conj M_ii) / (−2 λ_i), the phase
    i = xp.arange(w_all.shape[-1], device=array_api_compat.device(m_))
    diagonal = i[:, None] == take(i, columns, -1)[None, :]
    return t, xp.where(diagonal, (m_ - xp.conj(m_)) / as_dtype(2 * own, m_), f)


def _gram(factor: Factor, function: str, check_finite: bool) -> tuple[Tall, Array]:
    """Split the factor into pieces, unless PyTorch records it, and form its Gram matrix."""
    # A tensor that requires grad would be recorded with PyTorch's derivative.
    v = tall(factor)
    refuse_recording(function, **named_arrays(factor=factor))
    k = v.gram()
    if check_finite:
        refuse_non_finite("the Gram matrix of factor", k)
    return v, k


def _decomposed(v: Tall, k: Array) -> tuple[Array, Array]:
    """Return all eigenpairs of the Gram matrix, ascending, in the precision of the factor."""
    w, u = eigh(k)
    return as_dtype(not_negative(w), _real_like(v)), as_dtype(u, v.like)


def _real_like(v: Tall) -> Array:
    """Return an empty array of the factor's real dtype."""
    xp = array_api_compat.array_namespace(v.like)
    return xp.empty((0,), dtype=real_dtype(xp, v.like.dtype), device=array_api_compat.device(v.like))


def not_negative(w: Array) -> Array:
    """Replace negative eigenvalues of a Gram matrix, which are rounding, by zero; NaN stays."""
    return array_api_compat.array_namespace(w).where(w < 0, full((), 0.0, w), w)


def _check_saved(v: Tall, k: int, w_bar: Array | None, w: Array, w_all: Array, u_all: Array) -> Namespace:
    """Validate k eigenvalues, their cotangent and the saved decomposition against the factor."""
    xp = namespace(w_bar=w_bar, w=w, w_all=w_all, u_all=u_all, factor=v.like)
    number = real_dtype(xp, v.like.dtype)
    check_dtypes(w=(w, number), w_bar=(w_bar, number), w_all=(w_all, number), u_all=(u_all, v.like.dtype))
    check_shapes(w=(w, (*v.batch, k)), w_bar=(w_bar, (*v.batch, k)))
    check_shapes(w_all=(w_all, (*v.batch, v.n)), u_all=(u_all, (*v.batch, v.n, v.n)))
    return xp


def columns_of(v: Tall, k: int | None = None) -> range:
    """The columns of the k largest of n ascending eigenvalues, by default of all that need not be zero."""
    most = min(v.rows, v.n)
    k = most if k is None else operator.index(k)
    if not (1 <= k <= most or k == most):
        raise ValueError(
            f"k is {k}, expected 1 <= k <= {most}: a factor with {v.rows} rows and {v.n} columns has at most that "
            "many non-zero eigenvalues."
        )
    return range(v.n - 1, v.n - 1 - k, -1)


def zero_tolerance(xp: Namespace, w: Array, zero_rtol: float | None) -> float:
    """The multiple of the largest eigenvalue up to which those of a Gram matrix are rounding."""
    return singularity.SINGULAR * eps(xp, w.dtype) if zero_rtol is None else zero_rtol


def inverse_roots(w: Array, top: Array, zero_rtol: float | None, throw: bool) -> Array:
    """Return ``1/√λ``; NaN, or `SingularError`, for eigenvalues that count as zero."""
    xp = array_api_compat.array_namespace(w)
    # An eigenvalue below the rounding of the largest one is zero: its eigenvector is not in the range of V.
    zero = w <= zero_tolerance(xp, w, zero_rtol) * top
    if throw and is_true(xp.any(zero)):
        rank = int(xp.min(xp.sum(xp.astype(~zero, xp.int32), axis=-1)))
        found = f"only {rank} eigenvalue(s) are not zero" if rank else "all eigenvalues are zero"
        found += among(xp.any(zero, axis=-1))
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
