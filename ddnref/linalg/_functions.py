"""Functions of a symmetric / Hermitian matrix, with gradients that are exact at any degeneracy.

``f(X) = V f(Λ) Vᴴ`` has the derivative (Daleckii and Krein)

    X̄ = V (Φ ∘ (Vᴴ Ȳ V)) Vᴴ,    Φ_ij = (f(λ_i) − f(λ_j)) / (λ_i − λ_j),    Φ_ij = f'(λ_i) where λ_i = λ_j

No gap stands alone in a denominator, so neither repeated eigenvalues nor the choice of eigenvectors matter.
"""

from __future__ import annotations

from collections.abc import Callable

import array_api_compat

from ddnref._core.arrays import Array, eps, is_true, library, namespace, real_dtype, refuse_recording
from ddnref._core.checks import check_dtypes, check_shapes, check_square
from ddnref._kernels.dense import adjoint, eigh, hermitian_part, hermitian_product
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
    spectral_function_vjp : its reverse-mode derivative.
    sqrtm, invsqrtm, logm, expm : with divided differences in closed form.

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
    """`spectral_function` and what its reverse pass needs: ``y, (w, v)``, the latter as from `eigh`."""
    return forward("spectral_function", x, f, throw)


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

    Where the quotient cannot be told from the mean of ``df`` within its own rounding error, that mean is used: no
    tolerance to choose, full accuracy at equal eigenvalues, about ``eps**(2/3)`` in the worst case between. The
    named functions have divided differences in closed form and are accurate to rounding everywhere. Cost: four
    products (8 m³ flops real).

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
    return reverse("spectral_function", y_bar, y, w, v, _quotient_of(f, df), throw)


# --- the algorithm --------------------------------------------------------------------------------------------


def forward(name: str, x: Array, f: Scalar, throw: bool) -> tuple[Array, Saved]:
    """``V f(Λ) Vᴴ`` and ``(λ, V)``."""
    xp = namespace(x=x)
    check_square("x", x)
    refuse_recording(name, x)
    w, v = eigh(hermitian_part(x))
    f_w = _values("f", f, w)
    if throw:
        _raise_singular(f"{name} is", f_w, xp.isfinite(w))
    return hermitian_product(v * f_w[..., None, :], v), (w, v)


def reverse(name: str, y_bar: Array, y: Array, w: Array, v: Array, difference: DividedDifference, throw: bool) -> Array:
    """``X̄ = V (Φ ∘ (Vᴴ Ȳ V)) Vᴴ``."""
    xp = namespace(y_bar=y_bar, y=y, w=w, v=v)
    check_square("v", v)
    check_dtypes(y_bar=(y_bar, v.dtype), y=(y, v.dtype), w=(w, real_dtype(xp, v.dtype)))
    check_shapes(y_bar=(y_bar, tuple(v.shape)), y=(y, tuple(v.shape)), w=(w, tuple(v.shape[:-1])))
    phi = difference(w[..., :, None], w[..., None, :])
    if throw:
        _raise_singular(f"The derivative of {name} is", phi, xp.isfinite(w)[..., None])
    g = adjoint(v) @ hermitian_part(y_bar) @ v
    return hermitian_product(v @ (phi * g), v)


def _raise_singular(what: str, values: Array, expected: Array) -> None:
    xp = array_api_compat.array_namespace(values)
    if is_true(xp.any(expected & ~xp.isfinite(values))):
        raise SingularError(
            f"{what} not finite at an eigenvalue of the given matrix. Likely the matrix is singular or indefinite "
            "(a covariance of fewer samples than features, a constant pixel) where it must be positive definite. "
            "Add a ridge, x + 1e-6 * eye(m), or pass throw=False to get non-finite values for these items."
        )


def _values(name: str, f: Scalar, w: Array) -> Array:
    """``f(w)``, if that is what it should be."""
    f_w = f(w)
    library(**{f"{name}(w)": f_w, "w": w})
    check_shapes(**{f"{name}(w)": (f_w, tuple(w.shape))})
    check_dtypes(**{f"{name}(w)": (f_w, w.dtype)})
    return f_w


def _quotient_of(f: Scalar, df: Scalar) -> DividedDifference:
    def quotient(a: Array, b: Array) -> Array:
        xp = array_api_compat.array_namespace(a)
        f_a, f_b, gap = _values("f", f, a), _values("f", f, b), a - b
        mean = (_values("df", df, a) + _values("df", df, b)) / 2
        gap_or_1 = xp.where(gap == 0, xp.ones_like(gap), gap)
        q = (f_a - f_b) / gap_or_1
        rounding = 2 * eps(xp, q.dtype) * (xp.abs(f_a) + xp.abs(f_b)) / xp.abs(gap_or_1)
        return xp.where((gap == 0) | (xp.abs(q - mean) <= rounding), mean, q)

    return quotient
