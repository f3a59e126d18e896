"""Euclidean projections ``y = argmin_u ½ ‖u − x‖²`` onto spheres, balls and the simplex."""

from __future__ import annotations

import math

import array_api_compat

from ddnref._core.arrays import Array, among, is_true, namespace_of, nan_where, refuse_recording
from ddnref._core.checks import conform
from ddnref._kernels.public import public
from ddnref._kernels.vectors import normalised, safe_norm
from ddnref.errors import SingularError

NORMS = (1, 2, math.inf)


@public
def project_sphere(x: Array, /, *, norm: float = 2, radius: float = 1.0, throw: bool = True) -> Array:
    """Nearest point of the sphere ``‖u‖ = radius``, from inside as well as from outside.

    Parameters
    ----------
    x : (..., m) real array
    norm : {1, 2, inf}
    radius : float, positive
    throw : bool, default True
        Raise `SingularError` where the nearest point is not unique, as it may be because the sphere is not convex;
        with ``False`` such items are NaN.

    Returns
    -------
    y : (..., m) array

    Raises
    ------
    SingularError
        The nearest point is not unique. L2: ``x = 0``. L1: x is inside and has a zero entry, which may move to
        either side. L∞: x is inside and its largest magnitude occurs twice, or is zero.
    TypeError, ValueError
        Mixed libraries or dtypes, complex arrays; no entries; unknown norm; a radius that is not positive.

    Notes
    -----
    With s the signs of x and θ such that ``‖y‖₁ = radius``,

    ====  =====================================================================================
    norm  nearest point
    ====  =====================================================================================
    L1    ``y = s max(|x| − θ, 0)``, as `project_simplex`; from inside, θ is negative
    L2    ``y = radius x / ‖x‖``
    L∞    ``y = clip(x, −radius, radius)``; from inside, only the largest entry moves to ±radius
    ====  =====================================================================================

    Items with NaN or infinity are NaN. Cost: one sort for L1, else linear.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep Declarative Networks", IEEE TPAMI 44 (2022), section 5.2.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.nodes.project_sphere(np.asarray([3.0, 4.0]))
    array([0.6, 0.8])
    """
    _check(norm, "(m+)", x=x)
    refuse_recording("project_sphere", x=x)
    x = _finite_or_nan(x)
    bad = _ambiguous("project_sphere", x, norm, radius, throw)
    return nan_where(bad, _nearest(x, norm, radius))


@public
def project_sphere_vjp(
    y_bar: Array, y: Array, x: Array, /, *, norm: float = 2, radius: float = 1.0, throw: bool = True
) -> Array:
    """Gradient of a loss of `project_sphere`, which has the same options and errors.

    Parameters
    ----------
    y_bar, y, x : (..., m) arrays
        Cotangent of the output, the output, and the input.

    Returns
    -------
    x_bar : (..., m) array

    Notes
    -----
    L2: ``x̄ = (radius / ‖x‖) (ȳ − u uᵀȳ)`` with ``u = y / radius``. L1: ``x̄ = ȳ − s (sᵀȳ) / |S|`` on the support S of
    y with signs s, else 0. L∞: `y_bar`, but 0 for entries at the bound. Where the support changes (``|x_i| = θ`` for
    L1, ``|x_i| = radius`` for L∞ from outside) only one-sided derivatives exist: such an entry counts as fixed.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([0.0, 2.0])
    >>> ddnref.nodes.project_sphere_vjp(np.ones(2), ddnref.nodes.project_sphere(x), x)
    array([0.5, 0. ])
    """
    _check(norm, "(m+),(m),(m)", x=x, y=y, y_bar=y_bar)
    return _sphere_derivative("project_sphere_vjp", y_bar, y, x, norm, radius, throw)


@public
def project_sphere_jvp(
    x_dot: Array, y: Array, x: Array, /, *, norm: float = 2, radius: float = 1.0, throw: bool = True
) -> Array:
    """Derivative of `project_sphere` along a direction; options and errors are those of `project_sphere_vjp`.

    Parameters
    ----------
    x_dot, y, x : (..., m) arrays
        Tangent of the input, the output, and the input.

    Returns
    -------
    y_dot : (..., m) array

    Notes
    -----
    The derivative of a projection is a symmetric matrix. So ẏ is x̄ of `project_sphere_vjp` with ẋ in place of ȳ, also
    where the support changes. Cost: linear.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([0.0, 2.0])
    >>> ddnref.nodes.project_sphere_jvp(np.ones(2), ddnref.nodes.project_sphere(x), x)
    array([0.5, 0. ])
    """
    _check(norm, "(m+),(m),(m)", x=x, y=y, x_dot=x_dot)
    return _sphere_derivative("project_sphere_jvp", x_dot, y, x, norm, radius, throw)


@public
def project_ball(x: Array, /, *, norm: float = 2, radius: float = 1.0) -> Array:
    """Nearest point of the ball ``‖u‖ ≤ radius``: `x` where it is inside, elsewhere that of `project_sphere`.

    The ball is convex, so the nearest point is unique. Arguments, ``TypeError``, ``ValueError`` and cost are those of
    `project_sphere`.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.nodes.project_ball(np.asarray([2.0, -1.0, 0.5]), norm=1)
    array([ 1., -0.,  0.])
    """
    _check(norm, "(m+)", x=x)
    refuse_recording("project_ball", x=x)
    x = _finite_or_nan(x)
    # From outside, the nearest point of a convex set is on its boundary.
    return namespace_of(x).where(_length(x, norm) <= radius, x, _nearest(x, norm, radius))


@public
def project_ball_vjp(y_bar: Array, y: Array, x: Array, /, *, norm: float = 2, radius: float = 1.0) -> Array:
    """Gradient of a loss of `project_ball`: `y_bar` where x is inside, elsewhere that of `project_sphere_vjp`.

    Exactly on the boundary only one-sided derivatives exist; the one from inside is returned, `y_bar`. Arguments are
    those of `project_sphere_vjp`, and errors those of `project_ball`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([2.0, -0.5])
    >>> ddnref.nodes.project_ball_vjp(np.ones(2), ddnref.nodes.project_ball(x, norm=np.inf), x, norm=np.inf)
    array([0., 1.])
    """
    _check(norm, "(m+),(m),(m)", x=x, y=y, y_bar=y_bar)
    return _ball_derivative(y_bar, y, x, norm, radius)


@public
def project_ball_jvp(x_dot: Array, y: Array, x: Array, /, *, norm: float = 2, radius: float = 1.0) -> Array:
    """Derivative of `project_ball` along a direction: `x_dot` inside, elsewhere that of `project_sphere_jvp`.

    The derivative is a symmetric matrix, the one of `project_ball_vjp`: on the boundary it is that from inside.
    Arguments are those of `project_sphere_jvp`, and errors those of `project_ball`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([2.0, -0.5])
    >>> ddnref.nodes.project_ball_jvp(np.ones(2), ddnref.nodes.project_ball(x, norm=np.inf), x, norm=np.inf)
    array([0., 1.])
    """
    _check(norm, "(m+),(m),(m)", x=x, y=y, x_dot=x_dot)
    return _ball_derivative(x_dot, y, x, norm, radius)


@public
def project_simplex(x: Array, /, *, total: float = 1.0) -> Array:
    """Nearest point of the simplex ``u ≥ 0, Σ u = total``.

    Parameters
    ----------
    x : (..., m) real array
    total : float, positive

    Returns
    -------
    y : (..., m) array

    Notes
    -----
    ``y = max(x − θ, 0)`` with ``θ = max_k (Σ of the k largest − total) / k`` [1]_. Items with NaN or infinity are NaN.
    ``TypeError`` and ``ValueError`` are those of `project_sphere`. Cost: one sort.

    References
    ----------
    .. [1] J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, "Efficient projections onto the l1-ball for learning in
       high dimensions", ICML (2008), figure 1.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.nodes.project_simplex(np.asarray([0.75, 0.5, -1.0]))
    array([0.625, 0.375, 0.   ])
    """
    conform("(m+)", real_only=True, x=x)
    refuse_recording("project_simplex", x=x)
    return _simplex(_finite_or_nan(x), total)


@public
def project_simplex_vjp(y_bar: Array, y: Array, /) -> Array:
    """Gradient of a loss of `project_simplex`, which has the same errors.

    Parameters
    ----------
    y_bar, y : (..., m) arrays
        Cotangent of the output, and the output, whose support S is all that the derivative depends on.

    Returns
    -------
    x_bar : (..., m) array
        ``x̄ = ȳ − (Σ_S ȳ) / |S|`` on S, 0 elsewhere. An entry with ``x_i = θ`` exactly, where the support changes and
        only one-sided derivatives exist, counts as outside.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.nodes.project_simplex_vjp(np.asarray([1.0, 0.0, 5.0]), np.asarray([0.625, 0.375, 0.0]))
    array([ 0.5, -0.5,  0. ])
    """
    conform("(m+),(m)", real_only=True, y=y, y_bar=y_bar)
    return _simplex_derivative(y_bar, y)


@public
def project_simplex_jvp(x_dot: Array, y: Array, /) -> Array:
    """Derivative of `project_simplex` along a direction, with the errors of `project_simplex`.

    Parameters
    ----------
    x_dot, y : (..., m) arrays
        Tangent of the input, and the output, whose support S is all that the derivative depends on.

    Returns
    -------
    y_dot : (..., m) array
        ``ẏ = ẋ − (Σ_S ẋ) / |S|`` on S, 0 elsewhere: the derivative is a symmetric matrix. An entry with ``x_i = θ``
        exactly counts as outside, as in `project_simplex_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.nodes.project_simplex_jvp(np.asarray([1.0, 0.0, 5.0]), np.asarray([0.625, 0.375, 0.0]))
    array([ 0.5, -0.5,  0. ])
    """
    conform("(m+),(m)", real_only=True, y=y, x_dot=x_dot)
    return _simplex_derivative(x_dot, y)


# --- the algorithms -------------------------------------------------------------------------------------------------


def _nearest(x: Array, norm: float, radius: float) -> Array:
    """Nearest point of the sphere, or one of several."""
    xp = namespace_of(x)
    if norm == 1:
        return xp.sign(x) * _simplex(xp.abs(x), radius)
    if norm == 2:
        return radius * normalised(x, safe_norm(x))  # zero has no direction and stays zero
    size, bound = xp.abs(x), radius * xp.ones_like(x)
    # From inside, the largest entry moves out to the bound; from outside it is cut to the bound as others are.
    moves = size == xp.max(size, axis=-1, keepdims=True)
    return xp.sign(x) * xp.where(moves, bound, xp.minimum(size, bound))


def _simplex(x: Array, total: float) -> Array:
    """``max(x − θ, 0)``; θ_k increases with k up to the size of the support and then decreases, so θ is the largest."""
    xp = namespace_of(x)
    # A common shift changes nothing, and a large one would cost digits.
    x = x - xp.max(x, axis=-1, keepdims=True)
    count = xp.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=array_api_compat.device(x))
    largest = xp.cumulative_sum(xp.sort(x, axis=-1, descending=True), axis=-1)
    theta = xp.max((largest - total) / count, axis=-1, keepdims=True)
    return xp.maximum(x - theta, xp.zeros_like(x))


# --- the derivatives ------------------------------------------------------------------------------------------------
#
# Each is a symmetric matrix. Its product with d, a cotangent or a tangent, serves both modes.


def _sphere_derivative(name: str, d: Array, y: Array, x: Array, norm: float, radius: float, throw: bool) -> Array:
    """Return the part of `d` along which y can move on the sphere, NaN where the nearest point is not unique."""
    x = _finite_or_nan(x)
    bad = _ambiguous(name, x, norm, radius, throw)
    return nan_where(bad | _not_finite(x), _along_sphere(d, y, x, norm, radius))


def _along_sphere(d: Array, y: Array, x: Array, norm: float, radius: float) -> Array:
    """Return the part of `d` along which y can move on the sphere."""
    xp = namespace_of(d)
    if norm == 1:
        return _along_face(d, xp.sign(y))
    length = _length(x, norm)
    if norm == 2:
        u = y / radius
        # A zero input is ambiguous, and the caller makes it NaN.
        length = xp.where(length == 0, xp.ones_like(length), length)
        return (radius / length) * (d - u * xp.sum(u * d, axis=-1, keepdims=True))
    # Entries at the bound stay there; from inside, this is the largest alone.
    free = xp.abs(x) < xp.minimum(length, radius * xp.ones_like(length))
    return xp.where(free, d, xp.zeros_like(d))


def _ball_derivative(d: Array, y: Array, x: Array, norm: float, radius: float) -> Array:
    """Return `d` where x is inside, elsewhere its part along the sphere."""
    xp, x = namespace_of(x), _finite_or_nan(x)
    if norm == math.inf:  # the entries are projected one by one, and so each has its own boundary
        moved = xp.where(xp.abs(x) <= radius, d, xp.zeros_like(d))
    else:
        moved = xp.where(_length(x, norm) <= radius, d, _along_sphere(d, y, x, norm, radius))
    return nan_where(_not_finite(x), moved)


def _simplex_derivative(d: Array, y: Array) -> Array:
    """Return the part of `d` along the face of the simplex that y is in."""
    return nan_where(_not_finite(y), _along_face(d, namespace_of(y).astype(y > 0, y.dtype)))


def _along_face(d: Array, s: Array) -> Array:
    """``d_S − s_S (s_Sᵀ d_S) / |S|``: the part along the face on which y may move."""
    xp = namespace_of(d)
    support = s * s
    # An empty support has no face, and its mean of nothing is zero.
    count = xp.sum(support, axis=-1, keepdims=True)
    mean = xp.sum(s * d, axis=-1, keepdims=True) / xp.where(count > 0, count, xp.ones_like(count))
    return support * d - s * mean


# --- sizes and checks -----------------------------------------------------------------------------------------------


def _length(x: Array, norm: float) -> Array:
    """``‖x‖`` as (..., 1)."""
    xp = namespace_of(x)
    if norm == 2:
        return safe_norm(x)[..., None]
    return (xp.sum if norm == 1 else xp.max)(xp.abs(x), axis=-1, keepdims=True)


def _ambiguous(name: str, x: Array, norm: float, radius: float, throw: bool) -> Array:
    """Return where the nearest point of the sphere is not unique, (..., 1), or raise with `throw`."""
    xp = namespace_of(x)
    length = _length(x, norm)
    if norm == 2:  # all of the sphere is equally near to its centre
        bad = length == 0
    elif norm == 1:
        # From inside, every entry grows in magnitude, and that of zero may take either sign.
        bad = (length < radius) & xp.any(x == 0, axis=-1, keepdims=True)
    else:
        ties = xp.sum(xp.astype(xp.abs(x) == length, xp.int32), axis=-1, keepdims=True)
        bad = (length < radius) & ((ties > 1) | (length == 0))
    if throw and is_true(xp.any(bad)):
        raise SingularError(
            f"{name}: the nearest point of the sphere is not unique{among(bad[..., 0])}, so neither it nor a gradient "
            "is determined. The input is zero, or lies inside the sphere and has a zero entry (L1) or equal largest "
            "entries (L∞). Project onto the ball, perturb the input, or pass throw=False to get NaN for these items."
        )
    return bad


def _not_finite(x: Array) -> Array:
    xp = namespace_of(x)
    return ~xp.all(xp.isfinite(x), axis=-1, keepdims=True)


def _finite_or_nan(x: Array) -> Array:
    """Make an item NaN as a whole where one of its numbers is not finite."""
    return nan_where(_not_finite(x), x)


def _check(norm: float, signature: str, **arrays: Array) -> None:
    conform(signature, real_only=True, **arrays)
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, expected 1, 2 or inf.")
