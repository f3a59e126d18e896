"""Pseudo-inverse of a matrix of any rank, and its derivatives along directions that keep the rank.

``P = V diag(1/s) Uᴴ`` over the singular values that are not zero. With the projectors ``X P`` and ``P X`` on the ranges
of X and of P (Golub and Pereyra),

    Ṗ = −P Ẋ P + P Pᴴ Ẋᴴ (I − X P) + (I − P X) Ẋᴴ Pᴴ P
    X̄ = −Pᴴ P̄ Pᴴ + (I − X P) P̄ᴴ P Pᴴ + Pᴴ P P̄ᴴ (I − P X)

At full rank ``P X = I`` or ``X P = I``, and a term vanishes. A direction Ẋ keeps the rank, to first order, if
``(I − X P) Ẋ (I − P X) = 0``. Along any other one the pseudo-inverse of a matrix without full rank is not even
continuous: a singular value that is zero becomes a small one, with a large reciprocal.

Values that are not zero, but count as zero because the user says so, turn with those that are kept. For kept i and
dropped j, with ``q = s_j / s_i`` and ``R = Uᴴ P̄ᴴ V``, this adds ``U D Vᴴ`` to X̄,

    D_ij = q / (1 − q²) (q R_ij + conj R_ji) / s_i²,       D_ji = q / (1 − q²) (q R_ji + conj R_ij) / s_i²

and to Ṗᴴ the same with ``UᴴẊV`` in place of R. As values near the limit are refused, ``q <= ¼``.
"""

from __future__ import annotations

from ddnref._core.arrays import (
    Array,
    adjoint,
    among,
    as_dtype,
    eps,
    full,
    is_true,
    namespace,
    namespace_of,
    nan_where,
    refuse_recording,
)
from ddnref._core.checks import conform
from ddnref._kernels.dense import constant, svd
from ddnref._kernels.eigh_jvp import needs_check
from ddnref._kernels.public import public
from ddnref._kernels.singularity import SINGULAR
from ddnref._kernels.vectors import largest, quotient
from ddnref.errors import SingularError
from ddnref.linalg._polar import moves_zero

Saved = tuple[Array, Array, Array, Array]
SAVED = "(m,k),(k)r,(k)r,(k,n)"
UNDECIDED = 2
"""Singular values within this factor of the limit of the rank leave it undecided. Those of 300 matrices that are
singular but for rounding were at most 7 eps, and those of matrices with a condition of 1e13 at least 48 eps."""


@public
def pinv(x: Array, /, *, rtol: float | None = None, throw: bool = True) -> Array:
    r"""Pseudo-inverse (Moore and Penrose) of a matrix of any shape and rank.

    Parameters
    ----------
    x : (..., m, n) array, real or complex floating
    rtol : float, optional
        Singular values of at most ``rtol`` times the largest one count as zero. Default ``max(m, n, 16) * eps``, which
        is rounding. Pass the relative size of the errors in `x` where these are larger.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    p : (..., n, m) array

    Raises
    ------
    SingularError
        A singular value is within a factor of 2 of the limit, on either side, so that a change of a few eps would
        decide between its reciprocal and zero.
    TypeError, ValueError
        Not floating, or a PyTorch tensor that requires grad; fewer than two axes.

    See Also
    --------
    lstsq : its product with a vector, without its errors.

    Notes
    -----
    The singular values are those of `x` as it is: columns in different units are not scaled, because the pseudo-inverse
    of a matrix without full rank depends on the units. An item with NaN or infinity comes out as NaN. The relative
    error is about eps times the largest over the smallest singular value that counts. Cost: a singular value
    decomposition, and ``2 m n k`` flops, with k the smaller of m and n.

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, "Matrix Computations", 4th ed. (2013), section 5.5.2.

    Examples
    --------
    >>> import numpy as np
    >>> np.round(ddnref.pinv(np.asarray([[1.0, 1.0], [1.0, 1.0]])), 12)
    array([[0.25, 0.25],
           [0.25, 0.25]])
    """
    return pinv_fwd(x, rtol=rtol, throw=throw)[0]


@public
def pinv_fwd(x: Array, /, *, rtol: float | None = None, throw: bool = True) -> tuple[Array, Saved]:
    """Compute `pinv` and what its derivatives need, with the same parameters and errors.

    Returns
    -------
    p : (..., n, m) array
    (u, s, inverse, vh) : (..., m, k), (..., k) real, (..., k) real and (..., k, n) arrays
        The thin singular value decomposition, descending, and the reciprocals of the values, 0 for those that count as
        zero.
    """
    namespace(x=x)
    check_matrix("x", x)
    refuse_recording("pinv", x=x)
    return pinv_of("x", x, rtol, throw)


@public
def pinv_vjp(p_bar: Array, p: Array, u: Array, s: Array, inverse: Array, vh: Array, x: Array, /) -> Array:
    r"""Gradient of a loss of the pseudo-inverse with respect to the matrix.

    Parameters
    ----------
    p_bar : (..., n, m) array
        Cotangent of the pseudo-inverse.
    p, u, s, inverse, vh
        What `pinv_fwd` returned.
    x : (..., m, n) array

    Returns
    -------
    x_bar : (..., m, n) array
        For a matrix without full rank, the gradient on the set of matrices of this rank, which has no part that would
        change the rank. A loss has no other gradient there, whatever the cotangent: in every direction that changes the
        rank, P is not continuous.

    Raises
    ------
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit.

    Notes
    -----
    .. math:: \bar X = -P^H \bar P P^H + (I - X P)\, \bar P^H P P^H + P^H P\, \bar P^H (I - P X)

    If values that are not zero count as zero, by `rtol`, their coupling with the others is added, so that this is the
    gradient of what `pinv` computes. Where `p` is NaN, so is the gradient. Cost: ``20 m n k`` flops, and
    ``8 m n k`` for such values.

    References
    ----------
    .. [1] G. H. Golub and V. Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems
       whose variables separate", SIAM Journal on Numerical Analysis 10 (1973), equation 4.12.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[2.0, 0.0]])
    >>> p, saved = ddnref.pinv_fwd(x)
    >>> ddnref.pinv_vjp(np.asarray([[1.0], [0.0]]), p, *saved, x)  # of p[0, 0]
    array([[-0.25,  0.  ]])
    """
    conform(f"(m,n),(n,m),{SAVED},(n,m)", x=x, p=p, u=u, s=s, inverse=inverse, vh=vh, p_bar=p_bar)
    x_bar = rank_preserving_vjp(p_bar, p, x)
    if not counts_noise(s, inverse, x):
        return x_bar
    u, vh = constant(u), constant(vh)
    return x_bar + u @ coupling(adjoint(vh @ p_bar @ u), s, inverse, x) @ vh


@public
def pinv_jvp(
    x_dot: Array,
    p: Array,
    u: Array,
    s: Array,
    inverse: Array,
    vh: Array,
    x: Array,
    /,
    *,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    r"""Derivative of the pseudo-inverse along a direction of the matrix that keeps its rank.

    Parameters
    ----------
    x_dot, x : (..., m, n) arrays
        The direction and the matrix.
    p, u, s, inverse, vh
        What `pinv_fwd` returned.
    gauge_rtol : float, optional
        The largest part of the direction that may change the rank, relative to its largest entry. Default
        ``sqrt(eps)``. Pass ``float("inf")`` to drop that part.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    p_dot : (..., n, m) array

    Raises
    ------
    SingularError
        The matrix has not full rank, and the direction changes it: the pseudo-inverse is not continuous there.
    TypeError, ValueError
        As `pinv_vjp`; `x_dot` is ``None``.

    Notes
    -----
    .. math:: \dot P = -P \dot X P + P P^H \dot X^H (I - X P) + (I - P X)\, \dot X^H P^H P

    Every direction keeps full rank. Values that are not zero, but count as zero, may move in any way, because they
    stay below the limit; their coupling is added as in `pinv_vjp`. The cost is that of `pinv_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[2.0, 0.0]])
    >>> p, saved = ddnref.pinv_fwd(x)
    >>> ddnref.pinv_jvp(np.asarray([[1.0, 4.0]]), p, *saved, x)
    array([[-0.25],
           [ 1.  ]])
    """
    conform(f"(m,n),(n,m),{SAVED},(m,n)", x=x, p=p, u=u, s=s, inverse=inverse, vh=vh, x_dot=x_dot)
    p_dot = rank_preserving_jvp(x_dot, p, x)
    if counts_noise(s, inverse, x):
        u_, vh_ = constant(u), constant(vh)
        p_dot = p_dot + adjoint(u_ @ coupling(adjoint(u_) @ x_dot @ adjoint(vh_), s, inverse, x) @ vh_)
    changed = changes_rank("x", x_dot, u, s, inverse, vh, gauge_rtol, throw)
    return p_dot if changed is None else nan_where(changed[..., None, None], p_dot)


# --- parts shared with least squares ----------------------------------------------------------------------------------


def check_matrix(name: str, x: Array) -> None:
    """Raise ``ValueError`` unless `x` is a matrix or a batch of them."""
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., m, n).")


def pinv_of(name: str, x: Array, rtol: float | None, throw: bool) -> tuple[Array, Saved]:
    """The pseudo-inverse ``V diag(inverse) Uᴴ`` and its factors, NaN for items whose rank is undecided.

    With `throw` these raise `SingularError`, reading one flag.
    """
    xp, (m, n) = namespace_of(x), x.shape[-2:]
    if 0 in x.shape:
        k, batch = min(m, n), tuple(x.shape[:-2])
        p, u, vh = (full((*batch, *shape), 0.0, x) for shape in ((n, m), (m, k), (k, n)))
        s = largest(full((*batch, k, 0), 0.0, x))
        return p, (u, s, 1.0 * s, vh)
    rtol = rounding_rtol(x) if rtol is None else rtol
    u, s, vh = svd(x)
    limit = rtol * s[..., :1]
    undecided = (s > limit / UNDECIDED) & (s < limit * UNDECIDED)
    bad = xp.any(undecided, axis=-1)
    if throw and is_true(xp.any(bad)):
        _raise_undecided(name, bad, s, undecided, rtol)
    inverse = nan_where(xp.isnan(s) | bad[..., None], quotient(xp.ones_like(s), s, s > limit))
    v = adjoint(vh)
    return (v * as_dtype(inverse, v)[..., None, :]) @ adjoint(u), (u, s, inverse, vh)


def rounding_rtol(x: Array) -> float:
    """The size of rounding errors of singular values, relative to the largest one."""
    m, n = x.shape[-2:]
    return float(max(m, n, SINGULAR)) * eps(namespace_of(x), x.dtype)


def _raise_undecided(name: str, bad: Array, s: Array, undecided: Array, rtol: float) -> None:
    xp = namespace_of(s)
    found = float(xp.max(xp.where(undecided, s / s[..., :1], xp.zeros_like(s))))
    raise SingularError(
        f"The rank of {name} is not decided{among(bad)}: a singular value is {found:.1e} times the largest one, within "
        f"a factor of {UNDECIDED} of rtol = {rtol:.1e}, up to which it counts as zero. The most likely cause is a "
        "matrix that would not have full rank without rounding or noise. Pass an rtol in a gap between its singular "
        "values, or throw=False to get NaN for these items."
    )


def rank_preserving_vjp(p_bar: Array, p: Array, x: Array) -> Array:
    """``X̄`` of the equations at the top, by products that are n×n or m×n for a tall matrix."""
    if x.shape[-1] > x.shape[-2]:
        return adjoint(rank_preserving_vjp(adjoint(p_bar), adjoint(p), adjoint(x)))
    p_h, bar_h = adjoint(p), adjoint(p_bar)
    # One term outside of the range of X, one outside of that of Xᴴ.
    left, right = bar_h @ (p @ p_h), p_h @ (p @ bar_h)
    return (left - x @ (p @ left)) + (right - right @ (p @ x)) - p_h @ (p_bar @ p_h)


def rank_preserving_jvp(x_dot: Array, p: Array, x: Array) -> Array:
    """``Ṗ`` of the equations at the top, by products that are n×n or n×m for a tall matrix."""
    if x.shape[-1] > x.shape[-2]:
        return adjoint(rank_preserving_jvp(adjoint(x_dot), adjoint(p), adjoint(x)))
    dot_h, p_h = adjoint(x_dot), adjoint(p)
    up, down = (p @ p_h) @ dot_h, (dot_h @ p_h) @ p
    return (up - (up @ x) @ p) + (down - (p @ x) @ down) - (p @ x_dot) @ p


def noise(s: Array, inverse: Array, x: Array) -> Array:
    """Values that are not rounding, but count as zero, ``(..., k)``; `x` is the matrix."""
    return (inverse == 0) & (s > rounding_rtol(x) * s[..., :1])


def counts_noise(s: Array, inverse: Array, x: Array) -> bool:
    """Whether an item may have such values; other libraries than NumPy are not asked."""
    return 0 not in x.shape and needs_check(noise(s, inverse, x), 0.0)


def coupling(r: Array, s: Array, inverse: Array, x: Array) -> Array:
    """D of the equations at the top, for R or UᴴẊV, ``(..., k, k)``."""
    xp, s, inverse = namespace_of(r), constant(s), constant(inverse)
    small = xp.where(noise(s, inverse, x), s, xp.zeros_like(s))
    kept = inverse > 0
    # One of the two terms of each sum is zero where one value is kept and the other one dropped.
    row, column = inverse[..., :, None], inverse[..., None, :]
    q = xp.where(
        kept[..., :, None] ^ kept[..., None, :], small[..., :, None] * column + row * small[..., None, :], 0 * row
    )
    factor = as_dtype(q / (1 - q * q) * (row + column) ** 2, r)
    return factor * (as_dtype(q, r) * r + adjoint(r))


def changes_rank(
    name: str,
    x_dot: Array,
    u: Array,
    s: Array,
    inverse: Array,
    vh: Array,
    gauge_rtol: float | None,
    throw: bool,
) -> Array | None:
    """Items without full rank whose direction changes the rank, seen by one vector; ``None`` where there are none.

    With `throw` they raise `SingularError`, reading one flag.
    """
    if 0 in x_dot.shape:
        return None
    xp = namespace_of(x_dot)
    gauge_rtol = eps(xp, x_dot.dtype) ** 0.5 if gauge_rtol is None else gauge_rtol
    zero = (inverse == 0) & (s <= rounding_rtol(x_dot) * s[..., :1])
    changed = moves_zero(x_dot, zero, u, vh, gauge_rtol)
    if throw and changed is not None and is_true(xp.any(changed)):
        raise SingularError(
            f"{name}_dot changes the rank of {name}{among(changed)}, which has not full rank: there the pseudo-inverse "
            "is not continuous along this direction. The most likely cause is a matrix whose columns or rows depend on "
            "each other only by accident. Remove the dependence, add a ridge, or pass throw=False to get NaN for these "
            "items, gauge_rtol=inf to leave out that part of the direction."
        )
    return changed
