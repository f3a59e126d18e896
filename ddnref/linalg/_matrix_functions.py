"""Square root, inverse square root, logarithm and exponential of a symmetric / Hermitian matrix.

Their divided differences have closed forms without cancellation, so gradients are accurate to rounding at every gap
between eigenvalues, large, small or none.
"""

from __future__ import annotations

import array_api_compat

from ddnref._core.arrays import Array, eps
from ddnref._kernels.public import public
from ddnref.linalg._functions import Saved, forward, reverse


@public
def sqrtm(x: Array, /, *, throw: bool = True) -> Array:
    """Principal square root of a symmetric / Hermitian positive semidefinite matrix.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Positive semidefinite; eigenvalues down to ``-m * eps * max|w|``, within rounding of zero, count as zero.
    throw : bool, default True
        Raise `SingularError`, reading one flag on the host; with ``False`` such an item comes out non-finite.

    Returns
    -------
    y : (..., m, m) array, exactly Hermitian

    Raises
    ------
    SingularError
        An eigenvalue is negative beyond rounding (only with ``throw=True``).
    TypeError, ValueError
        As `eigh`.

    Notes
    -----
    At a zero eigenvalue there is a value and no derivative: `sqrtm_vjp` raises. Add a ridge,
    ``x + 1e-6 * eye``, where gradients are needed. Cost as `spectral_function`.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.sqrtm(np.diag(np.asarray([4.0, 9.0])))
    array([[2., 0.],
           [0., 3.]])
    """
    return sqrtm_fwd(x, throw=throw)[0]


@public
def sqrtm_fwd(x: Array, /, *, throw: bool = True) -> tuple[Array, Saved]:
    """`sqrtm` and what its reverse pass needs: ``y, (w, v)``, the latter as from `eigh`; errors as `sqrtm`."""
    return forward("sqrtm", x, _sqrt, throw)


@public
def sqrtm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `sqrtm`.

    Parameters, result, errors and cost as `spectral_function_vjp`, with ``Φ_ij = 1 / (√λ_i + √λ_j)``.
    """
    return reverse("sqrtm", y_bar, y, w, v, _sqrt_difference, throw)


@public
def invsqrtm(x: Array, /, *, throw: bool = True) -> Array:
    """Inverse principal square root of a symmetric / Hermitian positive definite matrix: whitening.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Positive definite.
    throw : bool, default True
        Raise `SingularError`, reading one flag on the host; with ``False`` such an item comes out non-finite.

    Returns
    -------
    y : (..., m, m) array, exactly Hermitian

    Raises
    ------
    SingularError
        An eigenvalue is not positive (only with ``throw=True``). Add a ridge, ``x + 1e-6 * eye``.
    TypeError, ValueError
        As `eigh`.

    Notes
    -----
    With `x` a covariance, ``samples @ invsqrtm(x)`` has the identity as its covariance. Cost as `spectral_function`.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.invsqrtm(np.diag(np.asarray([4.0, 16.0])))
    array([[0.5 , 0.  ],
           [0.  , 0.25]])
    """
    return invsqrtm_fwd(x, throw=throw)[0]


@public
def invsqrtm_fwd(x: Array, /, *, throw: bool = True) -> tuple[Array, Saved]:
    """`invsqrtm` and what its reverse pass needs: ``y, (w, v)``, the latter as from `eigh`; errors as `invsqrtm`."""
    return forward("invsqrtm", x, _invsqrt, throw)


@public
def invsqrtm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `invsqrtm`.

    Parameters, result, errors and cost as `spectral_function_vjp`, with ``Φ_ij = −1 / (√λ_i √λ_j (√λ_i + √λ_j))``.
    """
    return reverse("invsqrtm", y_bar, y, w, v, _invsqrt_difference, throw)


@public
def logm(x: Array, /, *, throw: bool = True) -> Array:
    """Principal logarithm of a symmetric / Hermitian positive definite matrix.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Positive definite.
    throw : bool, default True
        Raise `SingularError`, reading one flag on the host; with ``False`` such an item comes out non-finite.

    Returns
    -------
    y : (..., m, m) array, exactly Hermitian

    Raises
    ------
    SingularError
        An eigenvalue is not positive (only with ``throw=True``). Add a ridge, ``x + 1e-6 * eye``.
    TypeError, ValueError
        As `eigh`.

    Notes
    -----
    The log-Euclidean chart of positive definite matrices, in which means and distances are Euclidean. Cost as
    `spectral_function`.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.logm(np.diag(np.asarray([1.0, np.e])))
    array([[0., 0.],
           [0., 1.]])
    """
    return logm_fwd(x, throw=throw)[0]


@public
def logm_fwd(x: Array, /, *, throw: bool = True) -> tuple[Array, Saved]:
    """`logm` and what its reverse pass needs: ``y, (w, v)``, the latter as from `eigh`; errors as `logm`."""
    return forward("logm", x, _log, throw)


@public
def logm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `logm`.

    Parameters, result, errors and cost as `spectral_function_vjp`, with
    ``Φ_ij = log1p((λ_i − λ_j) / λ_j) / (λ_i − λ_j)``, ``1 / λ_j`` where they are equal.
    """
    return reverse("logm", y_bar, y, w, v, _log_difference, throw)


@public
def expm(x: Array, /, *, throw: bool = True) -> Array:
    """Exponential of a symmetric / Hermitian matrix.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Any.
    throw : bool, default True
        Raise `SingularError`, reading one flag on the host; with ``False`` such an item comes out non-finite.

    Returns
    -------
    y : (..., m, m) array, exactly Hermitian

    Raises
    ------
    SingularError
        An eigenvalue overflows the exponential (only with ``throw=True``).
    TypeError, ValueError
        As `eigh`.

    Notes
    -----
    The inverse of `logm`. Cost as `spectral_function`.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.expm(np.diag(np.asarray([0.0, 0.0])))
    array([[1., 0.],
           [0., 1.]])
    """
    return expm_fwd(x, throw=throw)[0]


@public
def expm_fwd(x: Array, /, *, throw: bool = True) -> tuple[Array, Saved]:
    """`expm` and what its reverse pass needs: ``y, (w, v)``, the latter as from `eigh`; errors as `expm`."""
    return forward("expm", x, _exp, throw)


@public
def expm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `expm`.

    Parameters, result, errors and cost as `spectral_function_vjp`, with
    ``Φ_ij = e^λ_i (1 − e^−δ) / δ``, ``δ = λ_i − λ_j ≥ 0``, and ``e^λ_i`` where δ = 0.
    """
    return reverse("expm", y_bar, y, w, v, _exp_difference, throw)


# --- the functions and their divided differences, free of cancellation ----------------------------------------------


def _sqrt(w: Array) -> Array:
    xp = array_api_compat.array_namespace(w)
    if w.shape[-1] == 0:
        return w
    rounding = w.shape[-1] * eps(xp, w.dtype) * xp.max(xp.abs(w), axis=-1, keepdims=True)
    return _real_sqrt(xp.where((w < 0) & (w >= -rounding), xp.zeros_like(w), w))


def _real_sqrt(w: Array) -> Array:
    xp = array_api_compat.array_namespace(w)
    return xp.where(w < 0, xp.full_like(w, float("nan")), xp.sqrt(xp.where(w < 0, xp.zeros_like(w), w)))


def _invsqrt(w: Array) -> Array:
    return _reciprocal(_sqrt(w))


def _sqrt_difference(a: Array, b: Array) -> Array:
    return _reciprocal(_real_sqrt(a) + _real_sqrt(b))


def _invsqrt_difference(a: Array, b: Array) -> Array:
    root_a, root_b = _real_sqrt(a), _real_sqrt(b)
    return -_reciprocal(root_a * root_b * (root_a + root_b))


def _reciprocal(x: Array) -> Array:
    """``1 / x``, infinite at zero without a warning."""
    xp = array_api_compat.array_namespace(x)
    return xp.where(x == 0, xp.full_like(x, float("inf")), 1 / xp.where(x == 0, xp.ones_like(x), x))


def _log(w: Array) -> Array:
    xp = array_api_compat.array_namespace(w)
    return xp.where(w <= 0, xp.full_like(w, float("nan")), xp.log(xp.where(w <= 0, xp.ones_like(w), w)))


def _log_difference(a: Array, b: Array) -> Array:
    xp = array_api_compat.array_namespace(a)
    low, gap = xp.minimum(a, b), xp.abs(a - b)
    bad = low <= 0
    low = xp.where(bad, xp.ones_like(low), low)
    gap_or_1 = xp.where(gap == 0, xp.ones_like(gap), gap)
    phi = xp.where(gap == 0, 1 / low, xp.log1p(gap / low) / gap_or_1)
    return xp.where(bad, xp.full_like(phi, float("nan")), phi)


def _exp(w: Array) -> Array:
    xp = array_api_compat.array_namespace(w)
    largest = 709.0 if w.dtype == xp.float64 else 88.0
    return xp.where(w > largest, xp.full_like(w, float("inf")), xp.exp(xp.where(w > largest, xp.zeros_like(w), w)))


def _exp_difference(a: Array, b: Array) -> Array:
    xp = array_api_compat.array_namespace(a)
    high, gap = xp.maximum(a, b), xp.abs(a - b)
    gap_or_1 = xp.where(gap == 0, xp.ones_like(gap), gap)
    return _exp(high) * xp.where(gap == 0, xp.ones_like(gap), -xp.expm1(-gap) / gap_or_1)
