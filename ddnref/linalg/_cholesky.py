"""Cholesky factor of a positive definite matrix and its derivatives.

``A = L Lᴴ``, L lower triangular with a positive diagonal. Differentiated, ``L⁻¹ Ȧ L⁻ᴴ = L⁻¹ L̇ + (L⁻¹ L̇)ᴴ``, and
``L⁻¹ L̇`` is lower triangular, so that it is half of the diagonal and all below it. With Φ(M) the lower triangle of M
with half of the real part of its diagonal,

    L̇ = L Φ(L⁻¹ Ȧ L⁻ᴴ),        Ā = sym(L⁻ᴴ Φ(Lᴴ L̄) L⁻¹)
"""

from __future__ import annotations

import math

from ddnref._core.arrays import (
    Array,
    adjoint,
    as_dtype,
    first_flagged,
    is_true,
    listed,
    namespace,
    namespace_of,
    nan_where,
    refuse_recording,
)
from ddnref._core.checks import check_square, conform
from ddnref._kernels.cholesky import cholesky as _cholesky
from ddnref._kernels.dense import constant, eigvalsh, hermitian_part, identity
from ddnref._kernels.lu import solve_triangular
from ddnref._kernels.public import public
from ddnref._kernels.vectors import power_of_two
from ddnref.errors import SingularError


@public
def cholesky(a: Array, /, *, throw: bool = True) -> Array:
    """Lower triangular factor of a positive definite matrix, ``A = L Lᴴ``.

    Parameters
    ----------
    a : (..., m, m) array, real or complex floating
        Its Hermitian part ``½ (A + Aᴴ)`` is factored, as in `eigh`.
    throw : bool, default True
        Raise for a matrix that is not positive definite, reading one flag. With ``False`` its factor is NaN.

    Returns
    -------
    l : (..., m, m) array
        Zero above the diagonal, which is real and positive.

    Raises
    ------
    SingularError
        A matrix of the batch is not positive definite, to working precision.
    TypeError, ValueError
        As `eigh`.

    See Also
    --------
    logdet : the log-determinant, from this factor.
    solve_triangular : systems with this factor.
    sqrtm : a square root for matrices that may be singular.

    Notes
    -----
    A matrix is refused where a pivot is not positive, or where it is singular to working precision: with rows and
    columns scaled to a unit diagonal, which leaves units out of account, ``λ_min <= 16 eps λ_max``. So it does not
    depend on rounding whether a singular matrix has a factor. An item with NaN or infinity comes out as NaN; the others
    are not affected. Cost: ``⅓ m³`` flops, and about ``8 m²`` for the condition (on NumPy only near singular).

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.cholesky(np.asarray([[4.0, 2.0], [2.0, 2.0]]))
    array([[2., 0.],
           [1., 1.]])
    """
    return factored("cholesky", a, throw)


@public
def cholesky_vjp(l_bar: Array, l: Array, /, *, throw: bool = True) -> Array:  # noqa: E741
    r"""Gradient of a loss with respect to the matrix, from its gradient with respect to the factor.

    Parameters
    ----------
    l_bar : (..., m, m) array
        Only its lower triangle is used, because the rest of the factor is zero whatever the matrix is, and only the
        real part of its diagonal.
    l
        The factor from `cholesky`, of which the lower triangle is read.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` the gradient of such an item is NaN.

    Returns
    -------
    a_bar : (..., m, m) array
        Exactly Hermitian: the gradient for *all* entries of the matrix taken as free, as `cholesky` symmetrises.

    Raises
    ------
    SingularError
        A factor is NaN, because its matrix was not positive definite (or not finite).
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit.

    Notes
    -----
    With :math:`\Phi(M)` the lower triangle of M and half of the real part of its diagonal,

    .. math:: \bar A = \mathrm{sym} \left( L^{-H} \Phi(L^H \bar L)\, L^{-1} \right)

    The error grows with the square root of the condition of A for each of the two factors. Cost: a product and two
    triangular solves, ``4 m³`` flops.

    References
    ----------
    .. [1] I. Murray, "Differentiation of the Cholesky decomposition" (2016), arXiv:1602.07527.

    Examples
    --------
    >>> import numpy as np
    >>> l = ddnref.cholesky(np.asarray([[4.0, 2.0], [2.0, 2.0]]))
    >>> ddnref.cholesky_vjp(np.asarray([[1.0, 0.0], [0.0, 0.0]]), l)  # of the first pivot
    array([[0.25, 0.  ],
           [0.  , 0.  ]])
    """
    xp, _, sizes = conform("(m,m),(m,m)", l=l, l_bar=l_bar)
    if throw:
        raise_if_failed(l)
    if sizes["m"] == 0:
        return l_bar + 0
    l, scale = _scaled(xp.tril(l))  # noqa: E741
    middle = _half(adjoint(l) @ xp.tril(l_bar))
    # L⁻ᴴ (Φ + Φᴴ)/2 L⁻¹, by columns and then by rows.
    upper = adjoint(l)
    left = solve_triangular(upper, hermitian_part(middle), lower=False)
    a_bar = hermitian_part(adjoint(solve_triangular(upper, adjoint(left), lower=False)))
    return nan_where(_failed(l)[..., None, None], a_bar / scale)


@public
def cholesky_jvp(a_dot: Array, l: Array, /, *, throw: bool = True) -> Array:  # noqa: E741
    r"""Derivative of the factor along a direction of the matrix.

    Parameters
    ----------
    a_dot : (..., m, m) array
        The direction. Its Hermitian part counts, as `cholesky` symmetrises.
    l
        The factor from `cholesky`, of which the lower triangle is read.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` the derivative of such an item is NaN.

    Returns
    -------
    l_dot : (..., m, m) array
        Lower triangular, its diagonal real.

    Raises
    ------
    SingularError, TypeError, ValueError
        As `cholesky_vjp`; `a_dot` is ``None``.

    Notes
    -----
    With :math:`\Phi(M)` the lower triangle of M and half of the real part of its diagonal,

    .. math:: \dot L = L\, \Phi(L^{-1} \dot A L^{-H})

    Cost: two triangular solves and a product, ``4 m³`` flops.

    References
    ----------
    .. [1] I. Murray, "Differentiation of the Cholesky decomposition" (2016), arXiv:1602.07527.

    Examples
    --------
    >>> import numpy as np
    >>> l = ddnref.cholesky(np.asarray([[4.0, 2.0], [2.0, 2.0]]))
    >>> ddnref.cholesky_jvp(np.asarray([[1.0, 0.0], [0.0, 0.0]]), l)
    array([[ 0.25 ,  0.   ],
           [-0.125,  0.125]])
    """
    xp, _, sizes = conform("(m,m),(m,m)", l=l, a_dot=a_dot)
    if throw:
        raise_if_failed(l)
    if sizes["m"] == 0:
        return a_dot + 0
    l, scale = _scaled(xp.tril(l))  # noqa: E741
    l_dot = xp.tril(l @ _half(between_factors(hermitian_part(a_dot), l)))
    return nan_where(_failed(l)[..., None, None], l_dot / scale)


def _scaled(l_: Array) -> tuple[Array, Array]:
    """A factor over a power of two of about its size, and that power: squares of a factor may leave the exponents."""
    scale = as_dtype(power_of_two(constant(l_), 2), l_)[..., None, None]
    return l_ / scale, scale


def _half(m_: Array) -> Array:
    """``Φ(M)``: the lower triangle, with half of the real part of the diagonal."""
    xp = namespace_of(m_)
    diagonal = m_ * identity(m_.shape[-1], m_)
    return xp.tril(m_, k=-1) + (diagonal + adjoint(diagonal)) / 4


def between_factors(s: Array, l_: Array) -> Array:
    """``L⁻¹ S L⁻ᴴ`` of a Hermitian S."""
    right = solve_triangular(l_, s, lower=True)
    return adjoint(solve_triangular(l_, adjoint(right), lower=True))


def factored(name: str, a: Array, throw: bool) -> Array:
    """Validate a matrix and return its factor, for the function of that name."""
    xp = namespace(a=a)
    check_square("a", a)
    refuse_recording(name, a=a)
    s = hermitian_part(a)
    l_, indefinite = _cholesky(s)
    if throw and is_true(xp.any(indefinite)):
        _raise_indefinite(s, indefinite)
    return l_


def _failed(l_: Array) -> Array:
    """Return flags ``(...)`` of the factors that are NaN."""
    xp = namespace_of(l_)
    return xp.any(xp.isnan(xp.linalg.diagonal(l_)), axis=-1)


def raise_if_failed(l_: Array) -> None:
    """Raise `SingularError` for factors that are NaN; reads one flag."""
    xp, failed = namespace_of(l_), _failed(l_)
    if is_true(xp.any(failed)):
        raise SingularError(
            f"{_items(failed)} not positive definite, or not finite, so that there is no factor and no derivative. "
            "Pass throw=False to get NaN for these items and the right results for the others."
        )


def _raise_indefinite(s: Array, indefinite: Array) -> None:
    """Raise `SingularError`, which names the items and the extreme eigenvalues of the first."""
    first = first_flagged(indefinite)[0][0]
    w = eigvalsh(s[(*first, ...)])
    raise SingularError(
        f"{_items(indefinite)} not positive definite to working precision (eigenvalues from {float(w[0]):.1e} to "
        f"{float(w[-1]):.1e}{' in the first' if indefinite.ndim else ''}). The most likely causes are (a) linearly "
        "dependent features, or fewer samples than features, behind a covariance, (b) a kernel matrix of points that "
        "coincide, (c) a Hessian away from a minimum. Add a ridge, A + δ I, use ddnref.slogdet or ddnref.solve for a "
        "matrix that is indefinite, or pass throw=False to get NaN for these items and the right results for the "
        "others."
    )


def _items(failed: Array) -> str:
    """Name the flagged matrices as the subject of a sentence; reads the host."""
    places, count = first_flagged(failed)
    if not failed.ndim:
        return "The matrix is"
    more = ", …" if count > len(places) else ""
    return f"{count} of {math.prod(failed.shape)} matrices (item{'s' if count > 1 else ''} {listed(places)}{more}) are"
