"""QR factorisation of tall matrices and its derivatives.

``A = Q R``, Q with orthonormal columns, the diagonal of R not negative. With ``M = R R̄ᴴ − Q̄ᴴ Q`` and ``copyltu(M)`` the
Hermitian matrix that has the lower triangle of M and the real part of its diagonal,

    Ā = (Q̄ + Q copyltu(M)) R⁻ᴴ

Forward, ``Ȧ = Q̇ R + Q Ṙ``. With ``B = Ȧ R⁻¹``, ``C = Qᴴ B`` and the upper triangular ``T = Ṙ R⁻¹``,

    T = triu(C + Cᴴ, 1) + Re diag C,      Q̇ = B − Q T,      Ṙ = T R

because ``Qᴴ Q̇ = C − T`` must be skew-Hermitian.
"""

from __future__ import annotations

from ddnref._core.arrays import Array, adjoint, conj, is_true, namespace, nan_where, refuse_recording
from ddnref._core.checks import conform
from ddnref._kernels import singularity
from ddnref._kernels.dense import identity, solve
from ddnref._kernels.dense import qr as _qr
from ddnref._kernels.lu import rcond_of_triangle, solve_triangular
from ddnref._kernels.public import public
from ddnref.errors import SingularError


@public
def qr(a: Array, /) -> tuple[Array, Array]:
    """Orthonormal columns and a triangular factor of a tall matrix, unique: the diagonal of R is not negative.

    Parameters
    ----------
    a : (..., m, n) array, real or complex floating, m >= n

    Returns
    -------
    q : (..., m, n) array
        ``q.conj().T @ q = I``.
    r : (..., n, n) array
        Upper triangular.

    Raises
    ------
    TypeError, ValueError
        As `eigh`; `a` has more columns than rows.

    Notes
    -----
    An item that contains NaN or infinity comes out as NaN. Cost: 4 m n² flops (Householder, both factors).

    Examples
    --------
    >>> import numpy as np
    >>> q, r = ddnref.qr(np.asarray([[-3.0], [4.0]]))
    >>> np.round(q, 12).tolist(), r.tolist()
    ([[-0.6], [0.8]], [[5.0]])
    """
    xp = namespace(a=a)
    refuse_recording("qr", a=a)
    if a.ndim < 2 or a.shape[-2] < a.shape[-1]:
        raise ValueError(f"a has shape {tuple(a.shape)}, expected (..., m, n) with m >= n: pass its adjoint.")
    # Items that are not finite are replaced, and come out as NaN.
    finite = xp.all(xp.isfinite(a), axis=(-2, -1), keepdims=True)
    q, r = _qr(xp.where(finite, a, xp.ones_like(a)))
    # Turn each column of Q so that the diagonal of R is not negative.
    diagonal = xp.linalg.diagonal(r)
    size = xp.abs(diagonal)
    one = xp.ones_like(diagonal)
    sign = xp.where(size > 0, diagonal / xp.where(size > 0, xp.astype(size, a.dtype), one), one)
    r = conj(sign)[..., :, None] * r
    bad = xp.logical_not(finite)
    return nan_where(bad, q * sign[..., None, :]), nan_where(bad, r)


@public
def qr_vjp(q_bar: Array | None, r_bar: Array | None, q: Array, r: Array, /, *, throw: bool = True) -> Array:
    r"""Gradient of a loss with respect to the matrix, from its gradients with respect to the factors.

    Parameters
    ----------
    q_bar : (..., m, n) array or None
    r_bar : (..., n, n) array or None
        Only its upper triangle is used, because the rest of R is zero whatever the matrix is.
    q, r
        The outputs of `qr`.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    a_bar : (..., m, n) array

    Raises
    ------
    SingularError
        The columns of `a` are linearly dependent to working precision, so that they do not determine Q: scaled to unit
        length, ``σ_min(R) <= 16 eps σ_max(R)``. Or `r` is not finite.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit.

    Notes
    -----
    With :math:`M = R \bar R^H - \bar Q^H Q`,

    .. math:: \bar A = (\bar Q + Q\, \mathrm{copyltu}(M))\, R^{-H}

    Cost: 6 m n² flops.

    References
    ----------
    .. [1] S. F. Walter and L. Lehmann, "Algorithmic differentiation of linear algebra functions with application in
       optimum experimental design" (2010), section 4.1 (real); M. Seeger et al., "Auto-differentiating linear algebra"
       (2017), section 4.3.

    Examples
    --------
    >>> import numpy as np
    >>> q, r = ddnref.qr(np.asarray([[-3.0], [4.0]]))
    >>> ddnref.qr_vjp(None, np.ones((1, 1)), q, r)  # of the norm
    array([[-0.6],
           [ 0.8]])
    """
    if q_bar is None and r_bar is None:
        raise TypeError("q_bar and r_bar are both None: there is nothing to differentiate.")
    xp, _, sizes = conform("(m,n),(n,n),(m,n),(n,n)", q=q, r=r, q_bar=q_bar, r_bar=r_bar)
    n = sizes["n"]
    q_bar = xp.zeros_like(q) if q_bar is None else q_bar
    m_ = -adjoint(q_bar) @ q  # M = R R̄ᴴ − Q̄ᴴ Q
    if r_bar is not None:
        m_ = m_ + r @ adjoint(xp.triu(r_bar))
    # copyltu(M): the lower triangle mirrored, the real part of the diagonal.
    lower, diagonal = xp.tril(m_, k=-1), m_ * identity(n, m_)
    total = q_bar + q @ (lower + adjoint(lower) + (diagonal + adjoint(diagonal)) / 2)
    a_bar = adjoint(solve(r, adjoint(total)))
    return a_bar if n == 0 else nan_where(_dependent(r, throw), a_bar)


@public
def qr_jvp(a_dot: Array, q: Array, r: Array, /, *, throw: bool = True) -> tuple[Array, Array]:
    r"""Derivative of both factors along a direction of the matrix.

    Parameters
    ----------
    a_dot : (..., m, n) array
    q, r
        The outputs of `qr`.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    q_dot : (..., m, n) array
        ``q.conj().T @ q_dot`` is skew-Hermitian.
    r_dot : (..., n, n) array
        Upper triangular, its diagonal real.

    Raises
    ------
    SingularError, TypeError, ValueError
        As `qr_vjp`; `a_dot` is ``None``.

    Notes
    -----
    With :math:`B = \dot A R^{-1}`, :math:`C = Q^H B` and :math:`T = \mathrm{triu}(C + C^H, 1) + \mathrm{Re\,diag}\, C`,

    .. math:: \dot Q = B - Q T, \qquad \dot R = T R

    Triangular systems with R are solved column by column, so that the units of the columns do not matter. Cost:
    5 m n² flops.

    References
    ----------
    .. [1] S. F. Walter and L. Lehmann, "Algorithmic differentiation of linear algebra functions with application in
       optimum experimental design" (2010), section 4.1 (real).

    Examples
    --------
    >>> import numpy as np
    >>> q, r = ddnref.qr(np.asarray([[-3.0], [4.0]]))
    >>> q_dot, r_dot = ddnref.qr_jvp(np.asarray([[0.0], [1.0]]), q, r)
    >>> np.round(q_dot, 12).tolist(), np.round(r_dot, 12).tolist()
    ([[0.096], [0.072]], [[0.8]])
    """
    xp, _, sizes = conform("(m,n),(n,n),(m,n)", q=q, r=r, a_dot=a_dot)
    # B from Rᴴ Bᴴ = Ȧᴴ, by substitution, which no choice of pivots disturbs where columns are in different units.
    b = adjoint(solve_triangular(adjoint(r), adjoint(a_dot), lower=True))
    c = adjoint(q) @ b
    # T takes all of C but its skew-Hermitian part, which is the motion of Q within its own columns.
    upper, diagonal = xp.triu(c + adjoint(c), k=1), c * identity(sizes["n"], c)
    t = upper + (diagonal + adjoint(diagonal)) / 2
    q_dot, r_dot = b - q @ t, t @ r
    if sizes["n"] == 0:
        return q_dot, r_dot
    bad = _dependent(r, throw)
    return nan_where(bad, q_dot), nan_where(bad, r_dot)


def _dependent(r: Array, throw: bool) -> Array:
    """Flags ``(..., 1, 1)`` of items whose columns depend on each other, which their lengths do not change.

    Q is not determined there: with `throw` they raise `SingularError`.
    """
    condition = rcond_of_triangle(r)
    singular = singularity.is_singular(condition)
    if throw and is_true(namespace(r=r).any(singular)):
        raise SingularError(
            f"{singularity.named('R', 'factors R', singular, lambda i: condition[(*i, ...)])}, so that the columns of "
            "the matrix are linearly dependent and do not determine Q. Drop dependent columns, or pass throw=False to "
            "get NaN for these items."
        )
    return singular[..., None, None]
