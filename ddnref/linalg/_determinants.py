"""Log-determinants: of a positive definite matrix from its Cholesky factor, of any matrix from its LU factors.

The differential of the determinant is ``d det A = det A tr(A⁻¹ dA)``. So ``log|det A|`` moves by the real part of
``τ = tr(A⁻¹ Ȧ)``, and the sign, a complex number of length one, turns by its imaginary part:

    (log|det A|)˙ = Re τ,        ṡ = i s Im τ,        Ā = (l̄ + i Im(conj(s) s̄)) A⁻ᴴ
"""

from __future__ import annotations

from ddnref._core.arrays import (
    Array,
    adjoint,
    among,
    as_dtype,
    conj,
    full,
    is_complex,
    is_true,
    namespace,
    namespace_of,
    nan_where,
    real,
    real_dtype,
    refuse_recording,
    with_scalars_as_arrays,
)
from ddnref._core.checks import check_dtypes, check_shapes, check_square
from ddnref._kernels.blocks import Lu, lu_slogdet
from ddnref._kernels.dense import hermitian_part, hermitian_product, identity
from ddnref._kernels.lu import lu_factor, lu_factor_jvp, lu_factor_vjp, lu_solve, solve_triangular
from ddnref._kernels.public import public
from ddnref.errors import SingularError
from ddnref.linalg._cholesky import between_factors, cholesky_jvp, cholesky_vjp, factored, raise_if_failed
from ddnref.linalg._solve import check_factors


@public
def logdet(a: Array, /, *, throw: bool = True) -> Array:
    """Log-determinant of a positive definite matrix.

    Parameters
    ----------
    a : (..., m, m) array, real or complex floating
        Its Hermitian part ``½ (A + Aᴴ)`` is used, as in `cholesky`.
    throw : bool, default True
        Raise for a matrix that is not positive definite, reading one flag. With ``False`` the result is NaN.

    Returns
    -------
    logabsdet : (...) real array

    Raises
    ------
    SingularError, TypeError, ValueError
        As `cholesky`.

    See Also
    --------
    slogdet : for matrices that are not positive definite.

    Notes
    -----
    Twice the sum of the logarithms of the pivots of the Cholesky factor, which neither overflows nor underflows. Cost:
    ``⅓ m³`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> round(float(ddnref.logdet(np.diag(np.asarray([1e-200, 1e-200])))), 6)
    -921.034037
    """
    return logdet_fwd(a, throw=throw)[0]


@public
def logdet_fwd(a: Array, /, *, throw: bool = True) -> tuple[Array, tuple[Array]]:
    """Compute `logdet` and the Cholesky factor that its reverse pass uses: ``logabsdet, (l,)``."""
    l_ = factored("logdet", a, throw)
    xp = namespace_of(l_)
    logabsdet = 2 * xp.sum(xp.log(real(xp.linalg.diagonal(l_))), axis=-1)
    return with_scalars_as_arrays(logabsdet), (l_,)


@public
def logdet_vjp(logabsdet_bar: Array, logabsdet: Array, l: Array, /, *, throw: bool = True) -> Array:  # noqa: E741
    r"""Gradient of a loss of the log-determinant with respect to the matrix, from the factor of the forward.

    Parameters
    ----------
    logabsdet_bar, logabsdet, l
        Cotangent of the log-determinant ``(...)``, the log-determinant, and the factor that `logdet_fwd` saved.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` the gradient of such an item is NaN.

    Returns
    -------
    a_bar : (..., m, m) array
        Exactly Hermitian: the gradient for *all* entries of the matrix taken as free, as `logdet` symmetrises.

    Raises
    ------
    SingularError, TypeError, ValueError
        As `cholesky_vjp`.

    Notes
    -----
    .. math:: \bar A = \bar\ell\, A^{-1} = \bar\ell\, L^{-H} L^{-1}

    Cost: a triangular solve and a product, about ``2 m³`` flops.

    References
    ----------
    .. [1] M. B. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
       differentiation" (2008), section 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> logabsdet, saved = ddnref.logdet_fwd(np.diag(np.asarray([2.0, 4.0])))
    >>> ddnref.logdet_vjp(np.asarray(1.0), logabsdet, *saved)
    array([[0.5 , 0.  ],
           [0.  , 0.25]])
    """
    xp = namespace(logabsdet_bar=logabsdet_bar, logabsdet=logabsdet, l=l)
    _check("l", l, logabsdet=logabsdet, logabsdet_bar=logabsdet_bar)
    if throw:
        raise_if_failed(l)
    if 0 in l.shape:
        return l + 0
    inverse = solve_triangular(l, xp.broadcast_to(identity(l.shape[-1], l), l.shape), lower=True)
    inverse = nan_where(xp.isnan(logabsdet)[..., None, None], xp.tril(inverse))
    # With the cotangent outside of the product it may have any sign.
    return as_dtype(logabsdet_bar, l)[..., None, None] * hermitian_product(adjoint(inverse), adjoint(inverse))


@public
def logdet_jvp(a_dot: Array, logabsdet: Array, l: Array, /, *, throw: bool = True) -> Array:  # noqa: E741
    r"""Derivative of the log-determinant along a direction of the matrix.

    Parameters
    ----------
    a_dot : (..., m, m) array
        The direction. Its Hermitian part counts, as `logdet` symmetrises.
    logabsdet, l
        The log-determinant, and the factor that `logdet_fwd` saved.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` the derivative of such an item is NaN.

    Returns
    -------
    logabsdet_dot : (...) real array

    Raises
    ------
    SingularError, TypeError, ValueError
        As `cholesky_vjp`; `a_dot` is ``None``.

    Notes
    -----
    .. math:: \dot\ell = \mathrm{tr}(L^{-1} \dot A L^{-H})

    Cost: two triangular solves, ``2 m³`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> logabsdet, saved = ddnref.logdet_fwd(np.diag(np.asarray([2.0, 4.0])))
    >>> round(float(ddnref.logdet_jvp(np.eye(2), logabsdet, *saved)), 12)
    0.75
    """
    xp = namespace(a_dot=a_dot, logabsdet=logabsdet, l=l)
    _check("l", l, logabsdet=logabsdet)
    check_dtypes(a_dot=(a_dot, l.dtype))
    check_shapes(a_dot=(a_dot, tuple(l.shape)))
    if throw:
        raise_if_failed(l)
    if 0 in l.shape:
        return xp.zeros_like(logabsdet)
    moved = real(_trace(between_factors(hermitian_part(a_dot), l)))
    return nan_where(xp.isnan(logabsdet), moved)


def saved_logdet_vjp(l_bar: Array, l_: Array) -> Array:
    """Turn a cotangent of the factor into one of the matrix, as second derivatives need."""
    return cholesky_vjp(l_bar, l_, throw=False)


def saved_logdet_jvp(a_dot: Array, l_: Array) -> tuple[Array]:
    """Turn a tangent of the matrix into one of the factor, as second derivatives need."""
    return (cholesky_jvp(a_dot, l_, throw=False),)


# --- any matrix -----------------------------------------------------------------------------------------------------


@public
def slogdet(a: Array, /) -> tuple[Array, Array]:
    """Sign and logarithm of the absolute value of the determinant of a square matrix.

    Parameters
    ----------
    a : (..., m, m) array, real or complex floating

    Returns
    -------
    sign : (...) array of the dtype of `a`
        1 or −1, for complex matrices a number of length one; 0 for a singular matrix.
    logabsdet : (...) real array
        Minus infinity for a singular matrix.

    Raises
    ------
    TypeError, ValueError
        As `eigh`.

    See Also
    --------
    logdet : half the cost for a positive definite matrix.

    Notes
    -----
    A matrix that is singular to working precision, as `solve` has it, has the determinant zero: what rounding leaves of
    it has neither a sign nor a size. An item with NaN or infinity comes out as NaN. Cost: ``⅔ m³`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> sign, logabsdet = ddnref.slogdet(np.asarray([[0.0, 2.0], [3.0, 0.0]]))
    >>> float(sign), round(float(np.exp(logabsdet)), 12)
    (-1.0, 6.0)
    """
    return slogdet_fwd(a)[0]


@public
def slogdet_fwd(a: Array, /) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Compute `slogdet` and the factorisation that its reverse pass uses: ``(sign, logabsdet), (lu, pivots)``.

    The arrays ``(..., m, m)`` and ``(..., m)`` are in the library's own form, NaN for singular items.
    """
    xp = namespace(a=a)
    check_square("a", a)
    refuse_recording("slogdet", a=a)
    lu, pivots, singular = lu_factor(a)
    sign, logabsdet = lu_slogdet(Lu(lu, pivots))
    sign = xp.where(singular, full((), 0.0, sign), sign)
    logabsdet = xp.where(singular, full((), float("-inf"), logabsdet), logabsdet)
    return (sign, logabsdet), (lu, pivots)


@public
def slogdet_vjp(
    sign_bar: Array | None,
    logabsdet_bar: Array | None,
    sign: Array,
    logabsdet: Array,
    lu: Array,
    pivots: Array,
    /,
    *,
    throw: bool = True,
) -> Array:
    r"""Gradient of a loss of `slogdet` with respect to the matrix, without another factorisation.

    Parameters
    ----------
    sign_bar, logabsdet_bar : (...) array of the dtype of `lu` and (...) real array, or None
        Cotangents; ``None`` for one that the loss does not use. The sign of a real determinant does not move.
    sign, logabsdet, lu, pivots
        The outputs, and what `slogdet_fwd` saved.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` the gradient of such an item is NaN.

    Returns
    -------
    a_bar : (..., m, m) array

    Raises
    ------
    SingularError
        A matrix of the batch is singular to working precision (or not finite): its log-determinant is minus infinity.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit; both cotangents are ``None``.

    Notes
    -----
    .. math:: \bar A = \left( \bar\ell + i\, \mathrm{Im}(\mathrm{conj}(s)\, \bar s) \right) A^{-H}

    Cost: ``4/3 m³`` flops to ``2 m³``, the inverse from the factors.

    References
    ----------
    .. [1] M. B. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
       differentiation" (2008), section 2.2 (real).

    Examples
    --------
    >>> import numpy as np
    >>> outputs, saved = ddnref.slogdet_fwd(np.asarray([[0.0, 2.0], [4.0, 0.0]]))
    >>> ddnref.slogdet_vjp(None, np.asarray(1.0), *outputs, *saved)
    array([[0.  , 0.5 ],
           [0.25, 0.  ]])
    """
    if sign_bar is None and logabsdet_bar is None:
        raise TypeError("sign_bar and logabsdet_bar are both None: there is nothing to differentiate.")
    xp = namespace(sign_bar=sign_bar, logabsdet_bar=logabsdet_bar, sign=sign, logabsdet=logabsdet, lu=lu)
    _check_factors(sign, logabsdet, lu, pivots)
    check_dtypes(sign_bar=(sign_bar, lu.dtype), logabsdet_bar=(logabsdet_bar, logabsdet.dtype))
    check_shapes(sign_bar=(sign_bar, tuple(sign.shape)), logabsdet_bar=(logabsdet_bar, tuple(sign.shape)))
    if throw:
        _raise_if_singular(logabsdet)
    if 0 in lu.shape:
        return lu + 0
    # l̄ + i Im(conj(s) s̄); real matrices have the first term alone.
    factor = xp.zeros_like(lu[..., 0, 0]) if logabsdet_bar is None else as_dtype(logabsdet_bar, lu)
    if sign_bar is not None and is_complex(lu):
        turn = conj(sign) * sign_bar
        factor = factor + (turn - conj(turn)) / 2
    eye = xp.broadcast_to(identity(lu.shape[-1], lu), lu.shape)
    a_bar = factor[..., None, None] * lu_solve(lu, pivots, eye, adjoint=True)
    return nan_where(~xp.isfinite(logabsdet)[..., None, None], a_bar)


@public
def slogdet_jvp(
    a_dot: Array, sign: Array, logabsdet: Array, lu: Array, pivots: Array, /, *, throw: bool = True
) -> tuple[Array, Array]:
    r"""Derivative of `slogdet` along a direction of the matrix, from the factors of the forward.

    Parameters
    ----------
    a_dot : (..., m, m) array
    sign, logabsdet, lu, pivots
        The outputs, and what `slogdet_fwd` saved.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` the derivatives of such an item are NaN.

    Returns
    -------
    sign_dot : (...) array of the dtype of `lu`
        Zero for real matrices.
    logabsdet_dot : (...) real array

    Raises
    ------
    SingularError, TypeError, ValueError
        As `slogdet_vjp`; `a_dot` is ``None``.

    Notes
    -----
    With :math:`\tau = \mathrm{tr}(A^{-1} \dot A)`,

    .. math:: \dot s = i\, s\, \mathrm{Im}\, \tau, \qquad \dot\ell = \mathrm{Re}\, \tau

    Cost: ``2 m³`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> outputs, saved = ddnref.slogdet_fwd(np.asarray([[0.0, 2.0], [4.0, 0.0]]))
    >>> sign_dot, logabsdet_dot = ddnref.slogdet_jvp(np.asarray([[0.0, 1.0], [1.0, 0.0]]), *outputs, *saved)
    >>> float(sign_dot), float(logabsdet_dot)
    (0.0, 0.75)
    """
    xp = namespace(a_dot=a_dot, sign=sign, logabsdet=logabsdet, lu=lu)
    _check_factors(sign, logabsdet, lu, pivots)
    check_dtypes(a_dot=(a_dot, lu.dtype))
    check_shapes(a_dot=(a_dot, tuple(lu.shape)))
    if throw:
        _raise_if_singular(logabsdet)
    if 0 in lu.shape:
        return xp.zeros_like(sign), xp.zeros_like(logabsdet)
    trace = _trace(lu_solve(lu, pivots, a_dot))
    sign_dot = sign * (trace - conj(trace)) / 2 if is_complex(lu) else xp.zeros_like(sign)
    bad = ~xp.isfinite(logabsdet)
    return nan_where(bad, sign_dot), nan_where(bad, real(trace))


def saved_slogdet_vjp(lu_bar: Array, _: None, lu: Array, pivots: Array) -> Array:
    """Turn a cotangent of the factorisation into one of the matrix, as second derivatives need."""
    return lu_factor_vjp(lu_bar, lu, pivots)


def saved_slogdet_jvp(a_dot: Array, lu: Array, pivots: Array) -> tuple[Array, None]:
    """Turn a tangent of the matrix into one of the factorisation, as second derivatives need; pivots never move."""
    return lu_factor_jvp(a_dot, lu, pivots), None


def _trace(m_: Array) -> Array:
    """Sum of the diagonal, in the dtype of the matrix."""
    xp = namespace_of(m_)
    return xp.sum(xp.linalg.diagonal(m_), axis=-1)


def _check(name: str, factor: Array, **numbers: Array) -> None:
    """Validate a factor and real numbers, one per item."""
    check_square(name, factor)
    kind = real_dtype(namespace_of(factor), factor.dtype)
    check_dtypes(**{key: (number, kind) for key, number in numbers.items()})
    check_shapes(**{key: (number, tuple(factor.shape[:-2])) for key, number in numbers.items()})


def _check_factors(sign: Array, logabsdet: Array, lu: Array, pivots: Array) -> None:
    """Validate the outputs of `slogdet` and its factors."""
    check_factors(lu, pivots, "slogdet_fwd")
    _check("lu", lu, logabsdet=logabsdet)
    check_dtypes(sign=(sign, lu.dtype))
    check_shapes(sign=(sign, tuple(lu.shape[:-2])))


def _raise_if_singular(logabsdet: Array) -> None:
    """Raise `SingularError` for items without a logarithm; reads one flag."""
    xp = namespace_of(logabsdet)
    bad = ~xp.isfinite(logabsdet)
    if is_true(xp.any(bad)):
        raise SingularError(
            f"The log-determinant is minus infinity, or not a number{among(bad)}, and has no derivative there. The "
            "most likely cause is linearly dependent rows or columns. Remove the dependence, add a ridge, or pass "
            "throw=False to get NaN for these items."
        )
