"""The generalised eigenproblem ``A v = w B v``, A Hermitian and B positive definite, and its derivatives.

``A V = B V Λ`` with ``Vᴴ B V = I``. Differentiate both, and write ``V̇ = V Ω``, ``P = Vᴴ Ȧ V``, ``Q = Vᴴ Ḃ V``:

    R = P − ½ (Q Λ + Λ Q),        λ̇ = diag(R),        Ω = F ∘ R − ½ Q

with ``F_ij = 1 / (λ_j − λ_i)`` between distinct eigenvalues, 0 elsewhere. R takes the place that a direction of the
matrix has in `eigh`, and ``−½ Q`` keeps the vectors orthonormal in the inner product of B. The transpose, with
``M = Vᴴ V̄``:

    T = diag(λ̄) + ½ F ∘ (M − Mᴴ),        Ā = V T Vᴴ,        B̄ = −V (½ (T Λ + Λ T) + ¼ (M + Mᴴ)) Vᴴ

T is that of `eigh`, so that its mask, its gauge check and its treatment of rounding hold here. Everything is computed
in the basis V, to which neither B nor its factor needs to be known. The unit of an unknown, the factor D in ``D A D``
and ``D B D``, turns V into ``D⁻¹ V`` and V̄ into ``D V̄``, and leaves M, P and Q alone. Sizes of columns of V and V̄ are
therefore compared after all rows of V were scaled to one length, that is, with a unit diagonal of ``B⁻¹ = V Vᴴ``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ddnref._core.arrays import (
    Array,
    adjoint,
    among,
    as_dtype,
    eps,
    full,
    is_true,
    namespace_of,
    nan_where,
    power_of_two_below,
    real,
    refuse_non_finite,
    refuse_recording,
)
from ddnref._core.checks import conform
from ddnref._core.selection import Columns, columns_of, take
from ddnref._kernels.cholesky import cholesky, inverse_of_factor
from ddnref._kernels.dense import constant, eigh, hermitian_part, hermitian_product, hermitian_sum, identity, infinity
from ddnref._kernels.eigh_jvp import Split, chosen, diagonal_of, hermitian_block, needs_check, split_of
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
from ddnref._kernels.singularity import SINGULAR
from ddnref._kernels.vectors import largest, safe_norm
from ddnref.errors import SingularError
from ddnref.linalg._eigh import neighbours, radius, raise_gauge, raise_split, ratio


@public
def eigh_generalized(a: Array, b: Array, /, *, check_finite: bool = False, throw: bool = True) -> tuple[Array, Array]:
    r"""Eigenvalues and eigenvectors of ``A v = w B v``, A Hermitian and B Hermitian positive definite.

    Parameters
    ----------
    a, b : (..., m, m) arrays of one dtype, float32, float64, complex64 or complex128
        Their Hermitian parts count, as in `eigh`.
    check_finite : bool, default False
        Read one flag for each matrix and raise `NonFiniteError` if it contains NaN or infinity. Without it such an
        item of the batch comes out as NaN, and the others are not affected.
    throw : bool, default True
        Raise for a `b` that is not positive definite, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    w : (..., m) array, real
        Eigenvalues, ascending.
    v : (..., m, m) array
        Eigenvectors in the columns, orthonormal in the inner product of B: ``Vᴴ B V = I``.

    Raises
    ------
    SingularError
        If a matrix `b` is not positive definite, or singular to working precision.
    TypeError
        As `eigh`; if `a` and `b` differ in library, device or dtype.
    ValueError
        If `a` is not square, or `b` has another shape.
    NonFiniteError
        As `check_finite` says.

    See Also
    --------
    eigh : the problem with ``B = I``.

    Notes
    -----
    By the Cholesky factor of B, ``B = L Lᴴ``: ``L⁻¹ A L⁻ᴴ = Y Λ Yᴴ``, ``V = L⁻ᴴ Y``. Rows and columns of both matrices
    are scaled by powers of two first, which give B a diagonal between 1 and 4. So the units of the unknowns do not
    matter: with :math:`\kappa` the condition number of the scaled B, an eigenvalue has an error of about
    ``eps`` :math:`\kappa \max|w|`. B counts as singular where `cholesky` refuses it. Cost: that of `eigh` and about
    ``8 m³`` flops in matrix products.

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, "Matrix Computations" (4th ed., 2013), algorithm 8.7.1.

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh_generalized(np.diag([12.0, 2.0]), np.diag([4.0, 1.0]))
    >>> w
    array([2., 3.])
    >>> np.abs(v)
    array([[0. , 0.5],
           [1. , 0. ]])
    """
    xp = conform("(m,m),(m,m)", a=a, b=b).xp
    refuse_recording("eigh_generalized", a=a, b=b)
    if check_finite:
        refuse_non_finite("a", a)
        refuse_non_finite("b", b)
    w, v, indefinite = _decomposed(hermitian_part(a), hermitian_part(b))
    if throw and is_true(xp.any(indefinite)):
        raise SingularError(
            f"b is not positive definite to working precision{among(indefinite)}: in its Cholesky factorisation a "
            "pivot is not positive, or the reciprocal condition, units aside, is not above "
            f"{SINGULAR} eps. The most likely cause is that b has "
            "dependent rows (a duplicated feature, an unknown without mass), that its sign is wrong, or that a and b "
            "are exchanged. Add a ridge to b or leave the unknown out; or pass throw=False to get NaN for these items."
        )
    return w, v


def _decomposed(s: Array, t: Array) -> tuple[Array, Array, Array]:
    """Return the eigenpairs of exactly Hermitian S and T, and which finite items have a T that is not definite."""
    xp = namespace_of(s)
    finite = xp.all(xp.isfinite(s) & xp.isfinite(t), axis=(-2, -1))
    if 0 in s.shape:
        return xp.sum(xp.abs(s), axis=-1), s, ~finite
    # Items that cannot be factored are replaced, so that the others come out right.
    definite = finite & xp.all(real(xp.linalg.diagonal(t)) > 0, axis=-1)
    one = definite[..., None, None]
    s, t = xp.where(one, s, xp.zeros_like(s)), xp.where(one, t, identity(t.shape[-1], t))

    # In units in which B has a diagonal between 1 and 4
    d = as_dtype(1 / power_of_two_below(xp.sqrt(real(xp.linalg.diagonal(t)))), s)
    row, column = d[..., :, None], d[..., None, :]
    s, t = row * s * column, row * t * column
    l_, failed = cholesky(t)
    definite = definite & ~failed

    # L⁻¹ A L⁻ᴴ = Y Λ Yᴴ, V = L⁻ᴴ Y
    inverse = inverse_of_factor(l_)
    w, y = eigh(hermitian_part(inverse @ s @ adjoint(inverse)))
    v = row * (adjoint(inverse) @ y)
    return nan_where(~definite[..., None], w), nan_where(~definite[..., None, None], v), finite & ~definite


@public
def eigh_generalized_vjp(
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
) -> tuple[Array, Array]:
    r"""Gradients of a loss with respect to both matrices, from its gradients with respect to eigenpairs.

    Parameters
    ----------
    w_bar, v_bar : (..., k) real array and (..., m, k) array, or None
        Cotangents of eigenvalues and eigenvectors; ``None`` for one that the loss does not use.
    w, v : (..., m) real array and (..., m, m) array
        All eigenvalues, ascending, and all eigenvectors, from `eigh_generalized`.
    index, rtol, gauge_rtol, throw
        As in `eigh_vjp`.

    Returns
    -------
    a_bar, b_bar : (..., m, m) arrays
        Exactly Hermitian: the gradients for *all* entries of both matrices taken as free.

    Raises
    ------
    GaugeError
        As `eigh_vjp`.
    TypeError, ValueError
        As `eigh_vjp`.

    Notes
    -----
    With :math:`M = V^H \bar V` and :math:`F_{ij} = 1/(\lambda_j - \lambda_i)`, zero inside a cluster,

    .. math::

        \begin{gathered}
        T = \mathrm{diag}(\bar\lambda) + \tfrac12 F \circ (M - M^H), \qquad \bar A = V T V^H, \\
        \bar B = -V \left( \tfrac12 (T \Lambda + \Lambda T) + \tfrac14 (M + M^H) \right) V^H
        \end{gathered}

    Cost: five products of m×m matrices (10 m³ flops real), six m×m arrays; with `index` 14 m²k flops; with `w_bar`
    alone two products. Neither matrix is needed.

    *Close eigenvalues.* Entries of :math:`M - M^H` that are no more than the rounding errors of the sums that form them
    are left out where the gap would amplify them, as in `eigh_vjp`, so that a loss of the space of a group is right to
    rounding at every gap. Those of :math:`M_{ij}` are bounded by ``4 * eps`` times
    :math:`\| D v_i \| \, \| D^{-1} \bar v_j \|`, where the diagonal matrix D gives the rows of :math:`D V` the length
    one. So the bound does not depend on the units of the unknowns. The whole of :math:`\bar v_j` counts, because the
    length of an eigenvector, which depends on B, enters the gradient here.

    *Equal eigenvalues.* As for `eigh_vjp`, the masked value 0 is right for every loss of
    :math:`V_c V_c^H`, whose value does not depend on the basis of the cluster c, and of symmetric functions of its
    eigenvalues. It is wrong for a loss that weights the eigenvectors by functions of their eigenvalues. Second
    derivatives through this function are wrong wherever anything was masked; the bridges refuse them.

    References
    ----------
    .. [1] R. L. Fox and M. P. Kapoor, "Rates of change of eigenvalues and eigenvectors", AIAA Journal 6 (1968).

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh_generalized(np.diag([12.0, 2.0]), np.diag([4.0, 1.0]))
    >>> a_bar, b_bar = ddnref.eigh_generalized_vjp(np.asarray([0.0, 1.0]), None, w, v)  # of the larger one, 12 / 4
    >>> a_bar
    array([[0.25, 0.  ],
           [0.  , 0.  ]])
    >>> b_bar
    array([[-0.75,  0.  ],
           [ 0.  ,  0.  ]])
    """
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    xp = conform("(m,m),(m)r", v=v, w=w).xp
    columns = columns_of(index, v.shape[-1])
    k = len(columns)
    conform("(m,m),(k)r,(m,k)", sizes={"k": k}, v=v, w_bar=w_bar, v_bar=v_bar)
    if 0 in v.shape:  # an empty matrix has no largest eigenvalue
        return xp.zeros_like(v), xp.zeros_like(v)
    if gauge_rtol is None:
        gauge_rtol = eps(xp, w.dtype) ** 0.5  # half of the digits
    size = radius(xp, w)
    near = neighbours(xp, w, rtol, size)
    # The parts of M − Mᴴ and of λ̄ that a choice decides, each with its whole
    undetermined = [] if w_bar is None else [jump(w_bar, near, columns)]
    diagonal = xp.zeros_like(w[..., :k]) if w_bar is None else w_bar
    v_k, w_k = take(v, columns, -1), take(w, columns, -1)

    if v_bar is None:
        bad = exceeds(*undetermined[0], gauge_rtol)
        if throw and is_true(xp.any(bad)):
            raise_gauge(ratio(*undetermined[0]), gauge_rtol)
        diagonal = nan_where(bad[..., None], diagonal)
        a_bar = hermitian_product(v_k * diagonal[..., None, :], v_k)
        return a_bar, hermitian_product(v_k * (-w_k * diagonal)[..., None, :], v_k)

    m_, same = adjoint(v) @ v_bar, cluster_mask(near, columns)
    gap = w_k[..., None, :] - w[..., :, None]
    a = antisymmetric_part(m_, columns)
    growth, lengths = _sizes(constant(v), constant(v_bar))
    a = left_out(a, is_rounding(a, lengths, gap, close_gap(w, size), columns, growth))
    undetermined.append(masked(a, m_, same))
    bad = xp.any(xp.stack([exceeds(*pair, gauge_rtol) for pair in undetermined]), axis=0)
    if throw and is_true(xp.any(bad)):
        raise_gauge(xp.max(xp.stack([ratio(*pair) for pair in undetermined]), axis=0), gauge_rtol)

    # Half of each matrix, P with P V_Kᴴ + V_K Pᴴ: an entry of T between two chosen columns is there twice.
    everything = columns == range(v.shape[-1])
    among_chosen = xp.any(own_entries(columns, v.shape[-1], w), axis=-1)[:, None]
    twice = xp.where(among_chosen, full((), 4.0, w), full((), 2.0, w))
    t = a / (twice * xp.where(same, infinity(gap), gap))  # no branch divides by zero
    mean = (w_k[..., None, :] + w[..., :, None]) / 2
    diagonal = nan_where(bad[..., None], diagonal) / 2  # from there NaN reaches every entry, at no further pass
    stretch = (m_ + adjoint(m_)) / 8 if everything else m_ / 4
    p = v @ t + v_k * diagonal[..., None, :]
    q = v @ (t * mean + stretch) + v_k * (w_k * diagonal)[..., None, :]
    if everything:
        return hermitian_product(2 * p, v), hermitian_product(-2 * q, v)
    return hermitian_sum(p, v_k), hermitian_sum(-q, v_k)


def _sizes(v: Array, v_bar: Array) -> tuple[Array, Array]:
    """Return the lengths ``‖D v_i‖``, (..., m), and ``‖D⁻¹ v̄_j‖``, (..., k), in units in which ``V Vᴴ`` has ones."""
    xp, unit = namespace_of(v), _units(v)[..., None]
    unit = as_dtype(unit, v)
    return safe_norm(xp.matrix_transpose(v / unit)), safe_norm(xp.matrix_transpose(v_bar * unit))


def _units(v: Array) -> Array:
    """Return the lengths of the rows of V, (..., m); 1 for a row of zeros, which no basis has."""
    xp, length = namespace_of(v), safe_norm(v)
    return xp.where(length > 0, length, xp.ones_like(length))


@public
def eigh_generalized_jvp(
    a_dot: Array | None,
    b_dot: Array | None,
    w: Array,
    v: Array,
    /,
    *,
    index: Sequence[int] | None = None,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> tuple[Array, Array]:
    r"""Derivative of eigenvalues and eigenvectors along a direction of both matrices.

    Parameters
    ----------
    a_dot, b_dot : (..., m, m) array, or None
        The direction, whose Hermitian parts count; ``None`` for a matrix that does not move.
    w, v : (..., m) real array and (..., m, m) array
        All eigenvalues, ascending, and all eigenvectors, from `eigh_generalized`.
    index, rtol, throw
        As in `eigh_jvp`.
    gauge_rtol : float, optional
        By how much a direction may split equal eigenvalues, as in `eigh_jvp`, for the matrix R below.

    Returns
    -------
    w_dot, v_dot : (..., k) real array and (..., m, k) array
        Derivatives of the chosen eigenvalues and eigenvectors. :math:`v_i^H B \dot v_i` is real, which fixes the phase
        of a complex one.

    Raises
    ------
    GaugeError
        If the direction splits equal eigenvalues, chosen or cut by the choice. The one-sided derivatives of the
        eigenvalues are the eigenvalues of the block of R inside the cluster.
    TypeError, ValueError
        As `eigh_generalized_vjp`; both directions are ``None``.

    Notes
    -----
    With :math:`P = V^H \dot A V`, :math:`Q = V^H \dot B V`, and F zero inside a cluster,

    .. math::

        R = P - \tfrac12 (Q \Lambda + \Lambda Q), \qquad \dot\lambda = \mathrm{diag}(R), \qquad
        \dot V = V (F \circ R - \tfrac12 Q)

    The adjoint of `eigh_generalized_vjp`. Cost: five products of m×m matrices (10 m³ flops real), three where only one
    matrix moves; with `index` 10 m²k flops, and as many again to look for clusters that the choice cuts, or those
    of two columns if the chosen ones are consecutive.

    References
    ----------
    .. [1] R. L. Fox and M. P. Kapoor, "Rates of change of eigenvalues and eigenvectors", AIAA Journal 6 (1968).

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh_generalized(np.diag([12.0, 2.0]), np.diag([4.0, 1.0]))
    >>> w_dot, v_dot = ddnref.eigh_generalized_jvp(None, np.diag([1.0, 0.0]), w, v)  # 12 / (4 + t)
    >>> w_dot
    array([ 0.  , -0.75])
    """
    if a_dot is None and b_dot is None:
        raise TypeError("a_dot and b_dot are both None: there is no direction.")
    xp = conform("(m,m),(m)r,(m,m),(m,m)", v=v, w=w, a_dot=a_dot, b_dot=b_dot).xp
    columns = columns_of(index, v.shape[-1])
    v_k, w_k = take(v, columns, -1), take(w, columns, -1)
    if 0 in v.shape:  # an empty matrix has no largest eigenvalue
        return w_k, v_k
    if gauge_rtol is None:
        gauge_rtol = eps(xp, w.dtype) ** 0.5  # half of the digits
    near = neighbours(xp, w, rtol)
    a_dot, b_dot = (None if x is None else hermitian_part(x) for x in (a_dot, b_dot))

    p, q, r = _projected(a_dot, b_dot, w, v, v_k, lambda q: q * w_k[..., None, :])
    r = hermitian_block(r, columns)
    same = cluster_mask(near, columns)
    gap = w_k[..., None, :] - w[..., :, None]
    omega = r / xp.where(same, infinity(gap), gap)  # no branch divides by zero
    w_dot, v_dot = diagonal_of(r, columns), v @ (omega if q is None else omega - q / 2)
    if not needs_check(near, gauge_rtol):
        return w_dot, v_dot
    split = _split(a_dot, b_dot, w, v, r, (p, q), columns, near, gauge_rtol)
    if throw and is_true(xp.any(split.bad)):
        remedy = "The one-sided ones of the eigenvalues are the eigenvalues of the block of R inside the cluster. Use"
        raise_split(split, w_k, gauge_rtol, remedy=f"{remedy} these,")
    return nan_where(split.bad[..., None], w_dot), nan_where(split.bad[..., None, None], v_dot)


def _projected(
    a_dot: Array | None, b_dot: Array | None, w: Array, v: Array, x: Array, scaled: Callable[[Array], Array]
) -> tuple[Array | None, Array | None, Array]:
    """Return ``P c``, ``Q c`` and ``R c`` for columns c, given ``x = V c``; ``None`` for what rests.

    `scaled` maps ``Q c`` to ``Q Λ c``.
    """
    v_h = adjoint(v)
    p = None if a_dot is None else v_h @ (a_dot @ x)
    if b_dot is None:
        return p, None, p
    q = v_h @ (b_dot @ x)
    moved = (scaled(q) + as_dtype(w, q)[..., :, None] * q) / 2
    return p, q, -moved if p is None else p - moved


def _split(
    a_dot: Array | None,
    b_dot: Array | None,
    w: Array,
    v: Array,
    r: Array,
    parts: tuple[Array | None, Array | None],
    columns: Columns,
    near: Array,
    gauge_rtol: float,
) -> Split:
    """Measure how far a direction splits equal eigenvalues, relative to the terms of which R is the sum."""
    xp, (p, q) = namespace_of(v), parts
    farthest = radius(xp, w)[..., 0]
    size = largest(r, 2)
    if p is not None:
        size = xp.maximum(size, largest(p, 2))
    if q is not None:
        size = xp.maximum(size, farthest * largest(q, 2))
    _, cut = chosen(v, columns, near)
    if cut is None:
        return split_of(r, None, None, columns, near, gauge_rtol, size)
    # Of some columns only a part of each direction shows: compare with all of it, in the units of `_sizes`.
    unit = as_dtype(_units(v), v)
    row, column = unit[..., :, None], unit[..., None, :]
    for x, factor in ((a_dot, None), (b_dot, farthest)):
        if x is not None:
            whole = largest(row * x * column, 2)
            size = xp.maximum(size, whole if factor is None else factor * whole)
    scaled = v @ (as_dtype(w, v)[..., :, None] * cut.z)
    _, _, moved = _projected(a_dot, b_dot, w, v, cut.vectors, lambda _: adjoint(v) @ (b_dot @ scaled))
    return split_of(r, moved, cut, columns, near, gauge_rtol, size)
