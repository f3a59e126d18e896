"""Functions of a symmetric / Hermitian matrix, with gradients that are exact at any degeneracy.

``f(X) = V f(Λ) Vᴴ`` has the derivative (Daleckii and Krein)

    X̄ = V (Φ ∘ (Vᴴ Ȳ V)) Vᴴ,    Φ_ij = (f(λ_i) − f(λ_j)) / (λ_i − λ_j),    Φ_ij = f'(λ_i) where λ_i = λ_j

No gap is a denominator by itself, so neither repeated eigenvalues nor the choice of eigenvectors matter. The
square root, its inverse, the logarithm and the exponential have divided differences Φ in closed form without
cancellation, so that their gradients are accurate to rounding at every gap, large, small or none.
"""

from __future__ import annotations

from collections.abc import Callable

from ddnref._core.arrays import (
    Array,
    adjoint,
    eps,
    full,
    is_true,
    library,
    namespace,
    namespace_of,
    nan_where,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes, check_square, conform
from ddnref._kernels.dense import eigh, hermitian_part, hermitian_product
from ddnref._kernels.public import public
from ddnref.errors import SingularError

Scalar = Callable[[Array], Array]
DividedDifference = Callable[[Array, Array], Array]
Saved = tuple[Array, Array]


@public
def spectral_function(x: Array, /, *, f: Scalar, throw: bool = True) -> Array:
    """Apply a real function to the eigenvalues of a symmetric / Hermitian matrix: ``V f(Λ) Vᴴ``.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Symmetrised first, as in `eigh`.
    f : callable
        Maps the ``(..., m)`` real array of eigenvalues elementwise to real values of the same dtype.
    throw : bool, default True
        Raise `SingularError` where `f` is not finite at an eigenvalue, reading one flag on the host. With ``False``
        nothing is read and such an item comes out non-finite.

    Returns
    -------
    y : (..., m, m) array, exactly Hermitian

    Raises
    ------
    SingularError
        `f` is not finite at an eigenvalue of a finite matrix (only with ``throw=True``).
    TypeError, ValueError
        As `eigh`; `f` returned another shape or dtype.

    See Also
    --------
    spectral_function_vjp : the reverse-mode derivative.
    sqrtm, invsqrtm, logm, expm : functions with divided differences in closed form.

    Notes
    -----
    Cost: one eigendecomposition and one product (at most 2 m³ flops).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[2.0, 1.0], [1.0, 2.0]])
    >>> np.round(ddnref.spectral_function(x, f=lambda w: w**2), 12)
    array([[5., 4.],
           [4., 5.]])
    """
    return spectral_function_fwd(x, f=f, throw=throw)[0]


@public
def spectral_function_fwd(x: Array, /, *, f: Scalar, throw: bool = True) -> tuple[Array, Saved]:
    """Compute `spectral_function` and what its reverse pass needs: ``y, (w, v)``, the latter as from `eigh`."""
    return _forward("spectral_function", x, f, throw)


@public
def spectral_function_vjp(
    y_bar: Array, y: Array, w: Array, v: Array, /, *, f: Scalar, df: Scalar, throw: bool = True
) -> Array:
    r"""Gradient of a loss of `spectral_function`, exact at any degeneracy.

    Parameters
    ----------
    y_bar : (..., m, m) array
        Cotangent of the output.
    y, w, v
        Output of `spectral_function_fwd` and what it saved, ``(..., m, m)``, ``(..., m)``, ``(..., m, m)``.
    f, df : callable
        The function and its derivative, elementwise on real arrays.
    throw : bool, default True
        Raise `SingularError` where the derivative is not finite; with ``False`` it comes out non-finite.

    Returns
    -------
    x_bar : (..., m, m) array, exactly Hermitian

    Raises
    ------
    SingularError
        A divided difference is not finite, for example of the square root at a zero eigenvalue.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit.

    Notes
    -----
    .. math:: \bar X = V \left( \Phi \circ (V^H \bar Y V) \right) V^H, \qquad
              \Phi_{ij} = \frac{f(\lambda_i) - f(\lambda_j)}{\lambda_i - \lambda_j}

    Where the quotient differs from the mean of ``df`` by no more than its own rounding error, that mean is used. So
    there is no tolerance to choose, and the accuracy is full at equal eigenvalues and about ``eps**(2/3)`` in the
    worst case between. The named functions have divided differences in closed form and are accurate to rounding
    everywhere. Cost: four products (8 m³ flops real).

    References
    ----------
    .. [1] Ju. L. Daleckii, S. G. Krein, "Integration and differentiation of functions of Hermitian operators and
       applications to the theory of perturbations", AMS Translations 47 (1965).
    .. [2] N. J. Higham, "Functions of Matrices" (SIAM, 2008), theorem 3.11 and section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> square = dict(f=lambda w: w**2, df=lambda w: 2 * w)
    >>> y, saved = ddnref.spectral_function_fwd(np.eye(2), f=square["f"])
    >>> ddnref.spectral_function_vjp(np.asarray([[0.0, 1.0], [0.0, 0.0]]), y, *saved, **square)
    array([[0., 1.],
           [1., 0.]])
    """
    return _reverse("spectral_function", y_bar, y, w, v, _quotient_of(f, df), throw)


def _forward(name: str, x: Array, f: Scalar, throw: bool) -> tuple[Array, Saved]:
    """``V f(Λ) Vᴴ`` and ``(λ, V)``."""
    xp = namespace(x=x)
    check_square("x", x)
    refuse_recording(name, x)
    w, v = eigh(hermitian_part(x))  # the only decomposition; the reverse pass reuses it
    f_w = _values("f", f, w)
    if throw:
        _raise_singular(f"{name} is", f_w, xp.isfinite(w))  # items that were not finite stay silent
    return hermitian_product(v * f_w[..., None, :], v), (w, v)


def _reverse(
    name: str, y_bar: Array, y: Array, w: Array, v: Array, difference: DividedDifference, throw: bool
) -> Array:
    """``X̄ = V (Φ ∘ (Vᴴ Ȳ V)) Vᴴ``."""
    xp = conform("(m,m),(m)r,(m,m),(m,m)", v=v, w=w, y=y, y_bar=y_bar).xp
    phi = difference(w[..., :, None], w[..., None, :])  # symmetric in i and j
    if throw:
        _raise_singular(f"The derivative of {name} is", phi, xp.isfinite(w)[..., None])
    g = adjoint(v) @ hermitian_part(y_bar) @ v  # Y is Hermitian, so only that part of its cotangent counts
    return hermitian_product(v @ (phi * g), v)


def _raise_singular(subject: str, values: Array, expected: Array) -> None:
    """Raise `SingularError` if a value is not finite where it should be."""
    xp = namespace_of(values)
    if is_true(xp.any(expected & ~xp.isfinite(values))):
        raise SingularError(
            f"{subject} not finite at an eigenvalue of the given matrix. The most likely cause is a matrix that is "
            "singular or indefinite (a covariance of fewer samples than features, a constant pixel) where it must be "
            "positive definite. Add a ridge, x + 1e-6 * eye(m), or pass throw=False to get non-finite values for "
            "these items."
        )


def _values(name: str, f: Scalar, w: Array) -> Array:
    """``f(w)``, checked: a user's function may return anything."""
    f_w = f(w)
    library(**{f"{name}(w)": f_w, "w": w})  # an array of the same library
    check_shapes(**{f"{name}(w)": (f_w, tuple(w.shape))})
    check_dtypes(**{f"{name}(w)": (f_w, w.dtype)})
    return f_w


def _quotient_of(f: Scalar, df: Scalar) -> DividedDifference:
    """Divided differences of any function, as a quotient where that is more than rounding."""

    def quotient(a: Array, b: Array) -> Array:
        xp = namespace_of(a)
        f_a, f_b, gap = _values("f", f, a), _values("f", f, b), a - b
        mean = (_values("df", df, a) + _values("df", df, b)) / 2  # the limit of the quotient for a small gap
        gap_or_1 = xp.where(gap == 0, xp.ones_like(gap), gap)  # no branch divides by zero
        q = (f_a - f_b) / gap_or_1
        # Where the two agree within the quotient's own rounding error, the mean of the derivatives is more accurate.
        rounding = 2 * eps(xp, q.dtype) * (xp.abs(f_a) + xp.abs(f_b)) / xp.abs(gap_or_1)
        return xp.where((gap == 0) | (xp.abs(q - mean) <= rounding), mean, q)

    return quotient


# --- square root ----------------------------------------------------------------------------------------------------


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
    At a zero eigenvalue there is a value but no derivative, and `sqrtm_vjp` raises. Add a ridge,
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
    """Compute `sqrtm` and what its reverse pass needs: ``y, (w, v)``, the latter as from `eigh`; errors as `sqrtm`."""
    return _forward("sqrtm", x, _sqrt, throw)


@public
def sqrtm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `sqrtm`.

    Parameters, result, errors and cost as `spectral_function_vjp`, with ``Φ_ij = 1 / (√λ_i + √λ_j)``.
    """

    def difference(a: Array, b: Array) -> Array:
        return _reciprocal(_real_sqrt(a) + _real_sqrt(b))

    return _reverse("sqrtm", y_bar, y, w, v, difference, throw)


def _sqrt(w: Array) -> Array:
    """Square root; eigenvalues that are negative by no more than rounding count as zero, others give NaN."""
    xp = namespace_of(w)
    if w.shape[-1] == 0:  # no largest eigenvalue to measure rounding by
        return w
    rounding = w.shape[-1] * eps(xp, w.dtype) * xp.max(xp.abs(w), axis=-1, keepdims=True)
    return _real_sqrt(xp.where((w < 0) & (w >= -rounding), xp.zeros_like(w), w))


def _real_sqrt(w: Array) -> Array:
    """Square root, NaN for negative numbers."""
    return _unless(w < 0, namespace_of(w).sqrt, w, float("nan"))


def _reciprocal(x: Array) -> Array:
    """``1 / x``, infinite at zero."""
    return _unless(x == 0, lambda x: 1 / x, x, float("inf"))


def _unless(bad: Array, f: Scalar, x: Array, other: float) -> Array:
    """``f(x)``, and `other` where `bad`, without evaluating f there."""
    xp = namespace_of(x)
    return xp.where(bad, full((), other, x), f(xp.where(bad, xp.ones_like(x), x)))


@public
def invsqrtm(x: Array, /, *, throw: bool = True) -> Array:
    """Inverse principal square root of a symmetric / Hermitian positive definite matrix, as used for whitening.

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
    """Compute `invsqrtm` and what its reverse pass needs, ``y, (w, v)`` as in `sqrtm_fwd`; errors as `invsqrtm`."""
    return _forward("invsqrtm", x, lambda w: _reciprocal(_sqrt(w)), throw)


@public
def invsqrtm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `invsqrtm`.

    Parameters, result, errors and cost as `spectral_function_vjp`, with ``Φ_ij = −1 / (√λ_i √λ_j (√λ_i + √λ_j))``.
    """

    def difference(a: Array, b: Array) -> Array:
        root_a, root_b = _real_sqrt(a), _real_sqrt(b)
        return -_reciprocal(root_a * root_b * (root_a + root_b))

    return _reverse("invsqrtm", y_bar, y, w, v, difference, throw)


# --- logarithm and exponential --------------------------------------------------------------------------------------


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
    This is the log-Euclidean chart of positive definite matrices, in which means and distances are Euclidean. Cost
    as `spectral_function`.

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
    """Compute `logm` and what its reverse pass needs, ``y, (w, v)`` as in `sqrtm_fwd`; errors as `logm`."""
    return _forward("logm", x, lambda w: _unless(w <= 0, namespace_of(w).log, w, float("nan")), throw)


@public
def logm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `logm`.

    Parameters, result, errors and cost as `spectral_function_vjp`, with
    ``Φ_ij = log1p((λ_i − λ_j) / λ_j) / (λ_i − λ_j)``, ``1 / λ_j`` where they are equal.
    """

    def difference(a: Array, b: Array) -> Array:
        xp = namespace_of(a)
        low, gap = xp.minimum(a, b), xp.abs(a - b)  # log1p is accurate for the ratio to the smaller one
        bad = low <= 0
        low = xp.where(bad, xp.ones_like(low), low)
        gap_or_1 = xp.where(gap == 0, xp.ones_like(gap), gap)
        phi = xp.where(gap == 0, 1 / low, xp.log1p(gap / low) / gap_or_1)
        return nan_where(bad, phi)

    return _reverse("logm", y_bar, y, w, v, difference, throw)


@public
def expm(x: Array, /, *, throw: bool = True) -> Array:
    """Exponential of a symmetric / Hermitian matrix.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Symmetrised first, as in `eigh`.
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
    This is the inverse of `logm`. Cost as `spectral_function`.

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
    """Compute `expm` and what its reverse pass needs, ``y, (w, v)`` as in `sqrtm_fwd`; errors as `expm`."""
    return _forward("expm", x, _exp, throw)


@public
def expm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `expm`.

    Parameters, result, errors and cost as `spectral_function_vjp`, with
    ``Φ_ij = e^λ_i (1 − e^−δ) / δ``, ``δ = λ_i − λ_j ≥ 0``, and ``e^λ_i`` where δ = 0.
    """

    def difference(a: Array, b: Array) -> Array:
        xp = namespace_of(a)
        high, gap = xp.maximum(a, b), xp.abs(a - b)  # the larger one outside, so that nothing overflows
        gap_or_1 = xp.where(gap == 0, xp.ones_like(gap), gap)
        return _exp(high) * xp.where(gap == 0, xp.ones_like(gap), -xp.expm1(-gap) / gap_or_1)

    return _reverse("expm", y_bar, y, w, v, difference, throw)


def _exp(w: Array) -> Array:
    """Exponential, infinite where it would overflow."""
    xp = namespace_of(w)
    largest = 709.0 if w.dtype == xp.float64 else 88.0  # below log of the largest number
    return _unless(w > largest, xp.exp, w, float("inf"))
