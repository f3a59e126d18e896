"""Functions of a symmetric / Hermitian matrix, with gradients that are exact at any degeneracy.

``f(X) = V f(Λ) Vᴴ`` has the derivative (Daleckii and Krein)

    X̄ = V (Φ ∘ (Vᴴ Ȳ V)) Vᴴ,    Φ_ij = (f(λ_i) − f(λ_j)) / (λ_i − λ_j),    Φ_ij = f'(λ_i) where λ_i = λ_j

No gap is a denominator by itself, so neither repeated eigenvalues nor the choice of eigenvectors matter. The
square root, its inverse, the logarithm and the exponential have divided differences Φ in closed form without
cancellation, so that their gradients are accurate to rounding at every gap, large, small or none. For any other
function the mean of ``f'`` replaces the quotient where it is more accurate (`ddnref._kernels.differences`).

The derivative is self-adjoint, so one map serves cotangents and tangents. The second derivative has divided differences
of three eigenvalues,

    D²f(X)[Ȳ, Ẋ] = V (T + Tᴴ) Vᴴ,    T_ij = Σ_k f[λ_i, λ_k, λ_j] (Vᴴ Ȳ V)_ik (Vᴴ Ẋ V)_kj

and is exact at any degeneracy for the same reason.

An eigenvalue of a computed decomposition is known to a few eps of the largest one. One of at most 16 eps counts as
exactly zero, so that it does not depend on rounding whether a singular matrix has an inverse square root, or on which
side of a step at zero its eigenvalues are.
"""

from __future__ import annotations

from collections.abc import Callable

from ddnref._core.arrays import (
    Array,
    adjoint,
    among,
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
from ddnref._kernels.differences import Scalar, divided_differences, second_difference_product
from ddnref._kernels.public import public
from ddnref._kernels.singularity import SINGULAR
from ddnref._kernels.vectors import largest
from ddnref.errors import SingularError

DividedDifference = Callable[[Array], Array]  # of eigenvalues (..., m), for all pairs of them
SecondProduct = Callable[[Array, Array, Array], tuple[Array, Array]]
"""Maps λ, A and B to ``Σ_k f[λ_i, λ_k, λ_j] A_ik B_kj``, and to numbers that are finite if these differences exist."""
Saved = tuple[Array, Array]


@public
def spectral_function(x: Array, /, *, f: Scalar, throw: bool = True) -> Array:
    """Apply a real function to the eigenvalues of a symmetric / Hermitian matrix: ``V f(Λ) Vᴴ``.

    Parameters
    ----------
    x : (..., m, m) array, float32, float64, complex64 or complex128
        Symmetrised first, as in `eigh`.
    f : callable
        Maps a real array elementwise to real values of the same dtype. Eigenvalues of at most ``16 * eps * max|w|``
        are exactly zero when it gets them.
    throw : bool, default True
        Raise `SingularError`, reading one flag on the host. With ``False`` nothing is read and such an item comes out
        non-finite.

    Returns
    -------
    y : (..., m, m) array, exactly Hermitian

    Raises
    ------
    SingularError
        `f` is not finite at an eigenvalue of a finite matrix.
    TypeError, ValueError
        As `eigh`; `f` returned another shape or dtype.

    See Also
    --------
    sqrtm, invsqrtm, logm, expm : functions whose gradient is accurate to rounding at every gap.

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
    return _forward("spectral_function", x, lambda w: _values("f", f, _zeroed(w)), throw)


@public
def spectral_function_vjp(
    y_bar: Array, y: Array, w: Array, v: Array, /, *, f: Scalar, df: Scalar, throw: bool = True
) -> Array:
    r"""Gradient of a loss of `spectral_function`, exact at any degeneracy.

    Parameters
    ----------
    y_bar, y, w, v
        Cotangent of the output ``(..., m, m)``, the output, and the eigenpairs that `spectral_function_fwd` saved.
    f, df : callable
        The function and its derivative, elementwise on real arrays of any shape. `df` is also evaluated between
        eigenvalues.
    throw : bool, default True
        As in `spectral_function`.

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

    The mean of ``df`` between the two eigenvalues, by a quadrature rule of seven points [3]_, takes the place of the
    quotient where it is estimated to be more accurate. For a smooth `f` the relative error of
    :math:`\Phi` is at most 1e-12 at every gap (1e-13 in the measured cases), or the rounding of `f` itself over the gap
    if that is larger. Steps and kinks of `f` between eigenvalues are noticed, and the quotient is taken. A step
    smaller than ``eps**0.25 * max|f|`` (1e-4 in double, 2e-2 in single precision) is not noticed where the derivative
    is the same on both sides.

    Cost: four products (8 m³ flops real), and `df` at five points between the eigenvalues of each pair.

    References
    ----------
    .. [1] Ju. L. Daleckii, S. G. Krein, "Integration and differentiation of functions of Hermitian operators and
       applications to the theory of perturbations", AMS Translations 47 (1965).
    .. [2] N. J. Higham, "Functions of Matrices" (SIAM, 2008), theorem 3.11 and section 3.2.
    .. [3] W. Gander and W. Gautschi, "Adaptive quadrature - revisited", BIT 40 (2000), equations (2.4) and (2.5).

    Examples
    --------
    >>> import numpy as np
    >>> square = dict(f=lambda w: w**2, df=lambda w: 2 * w)
    >>> y, saved = ddnref.spectral_function_fwd(np.eye(2), f=square["f"])
    >>> ddnref.spectral_function_vjp(np.asarray([[0.0, 1.0], [0.0, 0.0]]), y, *saved, **square)
    array([[0., 1.],
           [1., 0.]])
    """
    return _derivative("spectral_function", _difference_of(f, df), throw, y, w, v, y_bar=y_bar)


@public
def spectral_function_jvp(
    x_dot: Array, y: Array, w: Array, v: Array, /, *, f: Scalar, df: Scalar, throw: bool = True
) -> Array:
    r"""Derivative of `spectral_function` along a direction, exact at any degeneracy.

    Parameters
    ----------
    x_dot : (..., m, m) array
        Direction of the matrix. Like the matrix, it is symmetrised.
    y, w, v, f, df, throw
        As in `spectral_function_vjp`.

    Returns
    -------
    y_dot : (..., m, m) array, exactly Hermitian

    Raises
    ------
    SingularError, TypeError, ValueError
        As `spectral_function_vjp`.

    Notes
    -----
    .. math:: \dot Y = V \left( \Phi \circ (V^H \dot X V) \right) V^H

    The derivative is a self-adjoint map, so this is `spectral_function_vjp` with a tangent in place of the cotangent.
    Accuracy, cost and sources are the same. No direction splits a cluster, because the function of a matrix does not
    depend on the choice of eigenvectors.

    Examples
    --------
    >>> import numpy as np
    >>> square = dict(f=lambda w: w**2, df=lambda w: 2 * w)
    >>> y, saved = ddnref.spectral_function_fwd(np.eye(2), f=square["f"])
    >>> ddnref.spectral_function_jvp(np.asarray([[1.0, 3.0], [3.0, 0.0]]), y, *saved, **square)
    array([[2., 6.],
           [6., 0.]])
    """
    return _derivative("spectral_function", _difference_of(f, df), throw, y, w, v, x_dot=x_dot)


@public
def spectral_function_second_derivative(
    x_dot: Array,
    y_bar: Array,
    y: Array,
    w: Array,
    v: Array,
    /,
    *,
    f: Scalar,
    df: Scalar,
    d2f: Scalar,
    throw: bool = True,
) -> Array:
    r"""Second derivative of `spectral_function` along two directions, exact at any degeneracy.

    This is the derivative of `spectral_function_vjp` along `x_dot`, and that of `spectral_function_jvp` as well. It is
    symmetric: its inner product with a third direction does not depend on the order of the three. So it is its own
    transpose in each of its directions.

    Parameters
    ----------
    x_dot, y_bar : (..., m, m) arrays
        The two directions; they can be exchanged. Like the matrix, they are symmetrised.
    y, w, v
        The output, and the eigenpairs that `spectral_function_fwd` saved.
    f, df, d2f : callable
        The function and its first two derivatives, elementwise on real arrays of any shape. The derivatives are also
        evaluated between eigenvalues.
    throw : bool, default True
        As in `spectral_function`.

    Returns
    -------
    z : (..., m, m) array, exactly Hermitian

    Raises
    ------
    SingularError
        A divided difference of `f` or `df` is not finite.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit.

    Notes
    -----
    .. math:: D^2 f(X)[\bar Y, \dot X] = V \left( T + T^H \right) V^H, \qquad
              T_{ij} = \sum_k f[\lambda_i, \lambda_k, \lambda_j]\, (V^H \bar Y V)_{ik} (V^H \dot X V)_{kj}

    It does not depend on the choice of eigenvectors. For close eigenvalues the divided differences come from those of
    ``df`` and from ``d2f``, for others from quotients. For a smooth `f` the relative error is at most about
    ``eps**0.75`` at any gap (6e-12 in the measured cases, and rounding for equal and for well separated eigenvalues),
    or the rounding of `f` and its derivatives over the gap if that is larger. It is relative to the size of ``df`` and
    ``d2f``: where all eigenvalues are close to an inflection point of `f`, the result is as much smaller as ``d2f`` is
    there. Jumps and kinks are noticed as in `spectral_function_vjp`; with a step between clusters, and zero for both
    derivatives, this is the second derivative of their projector.

    Cost: 13 products (26 m³ flops real), and `df` and `d2f` at five points between the eigenvalues of each pair. No
    array has more than m² entries per item.

    References
    ----------
    .. [1] N. J. Higham, S. D. Relton, "Higher order Fréchet derivatives of matrix functions and the level-2 condition
       number", SIAM J. Matrix Anal. Appl. 35 (2014).
    .. [2] R. Bhatia, "Matrix Analysis" (Springer, 1997), section V.3 for the first derivative and divided differences.

    Examples
    --------
    >>> import numpy as np
    >>> square = dict(f=lambda w: w**2, df=lambda w: 2 * w, d2f=lambda w: 2 + 0 * w)
    >>> y, saved = ddnref.spectral_function_fwd(np.eye(2), f=square["f"])
    >>> x_dot, y_bar = np.asarray([[0.0, 1.0], [1.0, 0.0]]), np.diag([1.0, 0.0])
    >>> ddnref.spectral_function_second_derivative(x_dot, y_bar, y, *saved, **square)  # x_dot @ y_bar + y_bar @ x_dot
    array([[0., 1.],
           [1., 0.]])
    """

    def product(w: Array, a: Array, b: Array) -> tuple[Array, Array]:
        phi, psi, w = _difference_of(f, df)(w), _difference_of(df, d2f, "df", "d2f")(w), _zeroed(w)
        return _general_product(w, f(w), phi, psi, a, b)

    return _second_derivative("spectral_function", product, throw, x_dot, y_bar, y, w, v)


def _difference_of(f: Scalar, df: Scalar, name: str = "f", derivative: str = "df") -> DividedDifference:
    """Return the function that computes ``f[λ_i, λ_j]`` for any f; messages call f and its derivative as given."""
    return lambda w: divided_differences(
        lambda w: _values(name, f, w), lambda w: _values(derivative, df, w), _zeroed(w)
    )


def _general_product(w: Array, f_w: Array, phi: Array, psi: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Return the product with the second differences of any f, and a sum that is finite where Φ and Ψ are."""
    return second_difference_product(w, f_w, phi, psi, a, b), phi + psi


def _forward(name: str, x: Array, f: Scalar, throw: bool) -> tuple[Array, Saved]:
    """``V f(Λ) Vᴴ`` and ``(λ, V)``."""
    namespace(x=x)
    check_square("x", x)
    refuse_recording(name, x=x)
    w, v = eigh(hermitian_part(x))  # the only decomposition; the reverse pass reuses it
    f_w = f(w)
    if throw:
        _raise_singular(f"{name} is", f_w, w)  # items that were not finite stay silent
    return hermitian_product(v * f_w[..., None, :], v), (w, v)


def _derivative(
    name: str, difference: DividedDifference, throw: bool, y: Array, w: Array, v: Array, /, **direction: Array
) -> Array:
    """``Df(X)[D] = V (Φ ∘ (Vᴴ D V)) Vᴴ``, its own adjoint; D is a cotangent or a tangent, named for messages."""
    ((called, d),) = direction.items()
    conform("(m,m),(m)r,(m,m),(m,m)", v=v, w=w, y=y, **{called: d})
    phi = difference(w)  # symmetric in i and j
    if throw:
        _raise_singular(f"The derivative of {name} is", phi, w)
    g = adjoint(v) @ hermitian_part(d) @ v  # X and Y are Hermitian, so only that part counts
    return hermitian_product(v @ (phi * g), v)


def _second_derivative(
    name: str, product: SecondProduct, throw: bool, x_dot: Array, y_bar: Array, y: Array, w: Array, v: Array
) -> Array:
    """``D²f(X)[Ȳ, Ẋ] = V (T + Tᴴ) Vᴴ``."""
    xp = conform("(m,m),(m)r,(m,m),(m,m),(m,m)", v=v, w=w, y=y, y_bar=y_bar, x_dot=x_dot).xp
    a, b = (adjoint(v) @ hermitian_part(d) @ v for d in (y_bar, x_dot))
    t, differences = product(w, a, b)
    if throw:
        _raise_singular(f"The second derivative of {name} is", differences, w)
    # Masks may have hidden a difference that does not exist.
    exists = xp.all(xp.isfinite(differences), axis=(-2, -1), keepdims=True)
    return hermitian_product(v @ nan_where(~exists, t + adjoint(t)), v)


def _raise_singular(subject: str, values: Array, w: Array) -> None:
    """Raise `SingularError` if a value is not finite although the eigenvalues are, naming such items."""
    xp = namespace_of(w)
    axes = tuple(range(w.ndim - 1, values.ndim))
    bad = xp.all(xp.isfinite(w), axis=-1) & ~xp.all(xp.isfinite(values), axis=axes)
    if not is_true(xp.any(bad)):
        return
    # Only now look for the first one, for the message.
    first = int(xp.argmax(xp.reshape(xp.astype(bad, xp.int32), (-1,))))
    found = xp.reshape(w, (-1, w.shape[-1]))[first, ...]
    raise SingularError(
        f"{subject} not finite at an eigenvalue of the given matrix{among(bad)}: the eigenvalues are "
        f"{float(xp.min(found)):.1e} to {float(xp.max(found)):.1e}{', in the first of these items' * bool(bad.ndim)}, "
        f"and those of at most {SINGULAR} eps of the largest magnitude count as zero. The most likely cause is "
        f"{_cause(subject)}, or pass throw=False to get non-finite values for these items."
    )


def _cause(subject: str) -> str:
    """Return why such a function is not finite, and what to do about it."""
    if "expm" in subject:
        return (
            "an eigenvalue above 709, or 88 in single precision, whose exponential overflows or nearly so. Shift the "
            "matrix: expm(x) = exp(c) expm(x - c * eye(m))"
        )
    if "spectral_function" in subject:
        return (
            "an eigenvalue outside the domain of f or df, such as zero for a logarithm or an inverse, or one at which "
            "they overflow. Move the eigenvalues, for example by a ridge, x + 1e-6 * eye(m)"
        )
    return (
        "a matrix that is singular or indefinite (a covariance of fewer samples than features, a constant pixel) where "
        "it must be positive definite. Add a ridge, x + 1e-6 * eye(m)"
    )


def _values(name: str, f: Scalar, w: Array) -> Array:
    """``f(w)``, checked: a user's function may return anything."""
    f_w = f(w)
    library(**{f"{name}(w)": f_w, "w": w})  # an array of the same library
    check_shapes(**{f"{name}(w)": (f_w, tuple(w.shape))})
    check_dtypes(**{f"{name}(w)": (f_w, w.dtype)})
    return f_w


def _zeroed(w: Array) -> Array:
    """The eigenvalues, with exact zeros for those that count as zero."""
    xp = namespace_of(w)
    zero = xp.abs(w) <= SINGULAR * eps(xp, w.dtype) * largest(w)[..., None]
    return xp.where(zero, xp.zeros_like(w), w)


# --- functions with divided differences in closed form --------------------------------------------------------------


@public
def sqrtm(x: Array, /, *, throw: bool = True) -> Array:
    """Principal square root of a symmetric / Hermitian positive semidefinite matrix.

    Parameters, result, errors and cost are those of `spectral_function`. Eigenvalues between ``-16 * eps * max|w|`` and
    ``16 * eps * max|w|`` count as zero. There the square root has a value but no derivative, and `sqrtm_vjp` raises
    `SingularError`. Add a ridge, ``x + 1e-6 * eye``, where gradients are needed.

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
    """Compute `sqrtm` and what its reverse pass needs, as `spectral_function_fwd`."""
    return _forward("sqrtm", x, _sqrt, throw)


@public
def sqrtm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `sqrtm`, as `spectral_function_vjp` with ``Φ_ij = 1 / (√λ_i + √λ_j)``."""
    return _derivative("sqrtm", _sqrt_difference, throw, y, w, v, y_bar=y_bar)


@public
def sqrtm_jvp(x_dot: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Derivative of `sqrtm` along `x_dot`, as `spectral_function_jvp` with the ``Φ`` of `sqrtm_vjp`."""
    return _derivative("sqrtm", _sqrt_difference, throw, y, w, v, x_dot=x_dot)


@public
def sqrtm_second_derivative(
    x_dot: Array, y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True
) -> Array:
    """Second derivative of `sqrtm` along two directions, as `spectral_function_second_derivative`.

    ``f[λ_i, λ_k, λ_j] = −Φ_ik Φ_kj Φ_ij`` with the ``Φ`` of `sqrtm_vjp`, accurate to rounding at every gap. Cost: 7
    products.
    """

    def product(w: Array, a: Array, b: Array) -> tuple[Array, Array]:
        phi = _sqrt_difference(w)
        return -phi * ((phi * a) @ (phi * b)), phi

    return _second_derivative("sqrtm", product, throw, x_dot, y_bar, y, w, v)


def _sqrt_difference(w: Array) -> Array:
    """``1 / (√λ_i + √λ_j)``."""
    root = _sqrt(w)
    return _reciprocal(root[..., :, None] + root[..., None, :])


def _sqrt(w: Array) -> Array:
    """Square root of eigenvalues; NaN for negative ones, unless they count as zero."""
    w = _zeroed(w)
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

    Parameters, result, errors and cost are those of `spectral_function`. `SingularError` means that an eigenvalue is
    at most ``16 * eps * max|w|``: add a ridge, ``x + 1e-6 * eye``. With `x` a covariance, ``samples @ invsqrtm(x)`` has
    the identity as its covariance.

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
    """Compute `invsqrtm` and what its reverse pass needs, as `spectral_function_fwd`."""
    return _forward("invsqrtm", x, lambda w: _reciprocal(_sqrt(w)), throw)


@public
def invsqrtm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `invsqrtm`, as `spectral_function_vjp` with ``Φ_ij = −1 / (√λ_i √λ_j (√λ_i + √λ_j))``."""
    return _derivative("invsqrtm", _invsqrt_difference, throw, y, w, v, y_bar=y_bar)


@public
def invsqrtm_jvp(x_dot: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Derivative of `invsqrtm` along `x_dot`, as `spectral_function_jvp` with the ``Φ`` of `invsqrtm_vjp`."""
    return _derivative("invsqrtm", _invsqrt_difference, throw, y, w, v, x_dot=x_dot)


@public
def invsqrtm_second_derivative(
    x_dot: Array, y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True
) -> Array:
    """Second derivative of `invsqrtm` along two directions, as `spectral_function_second_derivative`.

    ``f[λ_i, λ_k, λ_j] = Ψ_ik Ψ_kj Ψ_ij ((r_i + r_j) / r_k + 1) / (r_i r_j)`` with ``Ψ_ij = 1 / (r_i + r_j)`` and the
    roots ``r = √λ``, accurate to rounding at every gap. Cost: 8 products.
    """

    def product(w: Array, a: Array, b: Array) -> tuple[Array, Array]:
        root, psi = _sqrt(w), _sqrt_difference(w)
        r_i, r_j, inverse = root[..., :, None], root[..., None, :], _reciprocal(root)
        a, b = psi * a, psi * b
        t = (r_i + r_j) * ((a * inverse[..., None, :]) @ b) + a @ b
        return psi * inverse[..., :, None] * inverse[..., None, :] * t, psi

    return _second_derivative("invsqrtm", product, throw, x_dot, y_bar, y, w, v)


def _invsqrt_difference(w: Array) -> Array:
    """``−1 / (√λ_i √λ_j (√λ_i + √λ_j))``."""
    root = _sqrt(w)
    a, b = root[..., :, None], root[..., None, :]
    return -_reciprocal(a * b * (a + b))


@public
def logm(x: Array, /, *, throw: bool = True) -> Array:
    """Principal logarithm of a symmetric / Hermitian positive definite matrix.

    Parameters, result, errors and cost are those of `spectral_function`, and `SingularError` means the same as in
    `invsqrtm`. This is the log-Euclidean chart of positive definite matrices, in which means and distances are
    Euclidean.

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
    """Compute `logm` and what its reverse pass needs, as `spectral_function_fwd`."""
    return _forward("logm", x, _log, throw)


def _log(w: Array) -> Array:
    """Logarithm of eigenvalues; NaN unless they are positive and do not count as zero."""
    w = _zeroed(w)
    return _unless(w <= 0, namespace_of(w).log, w, float("nan"))


@public
def logm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `logm`, as `spectral_function_vjp`.

    ``Φ_ij = log1p((λ_i − λ_j) / λ_j) / (λ_i − λ_j)``, and ``1 / λ_j`` where they are equal.
    """
    return _derivative("logm", _log_difference, throw, y, w, v, y_bar=y_bar)


@public
def logm_jvp(x_dot: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Derivative of `logm` along `x_dot`, as `spectral_function_jvp` with the ``Φ`` of `logm_vjp`."""
    return _derivative("logm", _log_difference, throw, y, w, v, x_dot=x_dot)


@public
def logm_second_derivative(x_dot: Array, y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Second derivative of `logm` along two directions, as `spectral_function_second_derivative`.

    The first differences of its derivative are ``−1 / (λ_i λ_j)``.
    """

    def product(w: Array, a: Array, b: Array) -> tuple[Array, Array]:
        psi = -_reciprocal(w[..., :, None] * w[..., None, :])
        return _general_product(w, _log(w), _log_difference(w), psi, a, b)

    return _second_derivative("logm", product, throw, x_dot, y_bar, y, w, v)


def _log_difference(w: Array) -> Array:
    """``log1p((λ_i − λ_j) / λ_j) / (λ_i − λ_j)``, and NaN unless both are positive."""
    xp, w = namespace_of(w), _zeroed(w)
    a, b = w[..., :, None], w[..., None, :]
    low, gap = xp.minimum(a, b), xp.abs(a - b)  # log1p is accurate for the ratio to the smaller one
    bad = low <= 0
    low = xp.where(bad, xp.ones_like(low), low)
    gap_or_1 = xp.where(gap == 0, xp.ones_like(gap), gap)
    phi = xp.where(gap == 0, 1 / low, xp.log1p(gap / low) / gap_or_1)
    return nan_where(bad, phi)


@public
def expm(x: Array, /, *, throw: bool = True) -> Array:
    """Exponential of a symmetric / Hermitian matrix, the inverse of `logm`.

    Parameters, result, errors and cost are those of `spectral_function`. `SingularError` means that an eigenvalue
    overflows the exponential.

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
    """Compute `expm` and what its reverse pass needs, as `spectral_function_fwd`."""
    return _forward("expm", x, _exp, throw)


@public
def expm_vjp(y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Gradient through `expm`, as `spectral_function_vjp`.

    ``Φ_ij = e^λ_i (1 − e^−δ) / δ`` with ``δ = λ_i − λ_j ≥ 0``, and ``e^λ_i`` where δ = 0.
    """
    return _derivative("expm", _exp_difference, throw, y, w, v, y_bar=y_bar)


@public
def expm_jvp(x_dot: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Derivative of `expm` along `x_dot`, as `spectral_function_jvp` with the ``Φ`` of `expm_vjp`."""
    return _derivative("expm", _exp_difference, throw, y, w, v, x_dot=x_dot)


@public
def expm_second_derivative(x_dot: Array, y_bar: Array, y: Array, w: Array, v: Array, /, *, throw: bool = True) -> Array:
    """Second derivative of `expm` along two directions, as `spectral_function_second_derivative`.

    The exponential is its own derivative, so ``Φ`` serves for both.
    """

    def product(w: Array, a: Array, b: Array) -> tuple[Array, Array]:
        phi = _exp_difference(w)
        return _general_product(w, _exp(w), phi, phi, a, b)

    return _second_derivative("expm", product, throw, x_dot, y_bar, y, w, v)


def _exp_difference(w: Array) -> Array:
    """``e^λ_i (1 − e^−δ) / δ`` with ``δ = λ_i − λ_j ≥ 0``."""
    xp = namespace_of(w)
    a, b = w[..., :, None], w[..., None, :]
    high, gap = xp.maximum(a, b), xp.abs(a - b)  # the larger one outside, so that nothing overflows
    return _exp(high) * _unless(gap == 0, lambda gap: -xp.expm1(-gap) / gap, gap, 1.0)


def _exp(w: Array) -> Array:
    """Exponential, infinite where it would overflow."""
    xp = namespace_of(w)
    largest = 709.0 if w.dtype == xp.float64 else 88.0  # below log of half of the largest number
    return _unless(w > largest, xp.exp, w, float("inf"))
