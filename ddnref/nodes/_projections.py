"""Euclidean projections onto spheres, balls and the simplex, ``y = argmin_u ½ ‖u − x‖²`` subject to ``u`` in the set.

With ``θ`` such that ``Σ max(|x_i| − θ, 0) = r``, s the signs of x and S the support of y,

    L1   y = s ∘ max(|x| − θ, 0)      x̄_S = ȳ_S − s_S (s_Sᵀ ȳ_S) / |S|, 0 elsewhere
    L2   y = r x / ‖x‖                x̄ = (r / ‖x‖) (ȳ − u uᵀȳ),  u = y / r
    L∞   y = clip(x, −r, r)           x̄ = ȳ where |x_i| < r, 0 elsewhere

for x outside the ball. From inside, θ is negative and the L1 form still holds, and only the largest entry moves to
the L∞ sphere, to ``±r``.
"""

from __future__ import annotations

import math

import array_api_compat

from ddnref._core.arrays import Array, is_true, namespace_of, nan_where, refuse_recording
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

    See Also
    --------
    project_sphere_vjp : its reverse-mode derivative.
    project_ball : onto the ball, which is convex.

    Notes
    -----
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
    refuse_recording("project_sphere", x)
    x = _finite_or_nan(x)
    bad = _ambiguous("project_sphere", x, norm, radius, throw)
    return nan_where(bad, _nearest(x, norm, radius))


@public
def project_sphere_vjp(
    y_bar: Array, y: Array, x: Array, /, *, norm: float = 2, radius: float = 1.0, throw: bool = True
) -> Array:
    """Gradient of a loss of `project_sphere`.

    Parameters
    ----------
    y_bar, y, x : (..., m) real arrays
        Cotangent of the output, the output, and the input.
    norm, radius, throw
        As in `project_sphere`.

    Returns
    -------
    x_bar : (..., m) array

    Raises
    ------
    SingularError, TypeError, ValueError
        As `project_sphere`.

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
    x = _finite_or_nan(x)
    bad = _ambiguous("project_sphere_vjp", x, norm, radius, throw)
    return nan_where(bad | _not_finite(x), _nearest_vjp(y_bar, y, x, norm, radius))


@public
def project_ball(x: Array, /, *, norm: float = 2, radius: float = 1.0) -> Array:
    """Nearest point of the ball ``‖u‖ ≤ radius``.

    Parameters
    ----------
    x : (..., m) real array
    norm : {1, 2, inf}
    radius : float, positive

    Returns
    -------
    y : (..., m) array
        A copy of `x` where it is inside.

    Raises
    ------
    TypeError, ValueError
        As `project_sphere`.

    Notes
    -----
    Items with NaN or infinity are NaN. Cost: one sort for L1, else linear.

    References
    ----------
    .. [1] J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, "Efficient projections onto the l1-ball for learning in
       high dimensions", ICML (2008), figure 1.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.nodes.project_ball(np.asarray([2.0, -1.0, 0.5]), norm=1)
    array([ 1., -0.,  0.])
    """
    _check(norm, "(m+)", x=x)
    refuse_recording("project_ball", x)
    x = _finite_or_nan(x)
    # The ball is convex: from outside, its nearest point is that of the sphere.
    return namespace_of(x).where(_length(x, norm) <= radius, x, _nearest(x, norm, radius))


@public
def project_ball_vjp(y_bar: Array, y: Array, x: Array, /, *, norm: float = 2, radius: float = 1.0) -> Array:
    """Gradient of a loss of `project_ball`.

    Parameters
    ----------
    y_bar, y, x : (..., m) real arrays
        Cotangent of the output, the output, and the input.
    norm, radius
        As in `project_ball`.

    Returns
    -------
    x_bar : (..., m) array

    Raises
    ------
    TypeError, ValueError
        As `project_sphere`.

    Notes
    -----
    Inside, `y_bar` itself; outside, the formula of `project_sphere_vjp`. Exactly on the boundary only one-sided
    derivatives exist; the one from inside is returned, `y_bar`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([2.0, -0.5])
    >>> ddnref.nodes.project_ball_vjp(np.ones(2), ddnref.nodes.project_ball(x, norm=np.inf), x, norm=np.inf)
    array([0., 1.])
    """
    _check(norm, "(m+),(m),(m)", x=x, y=y, y_bar=y_bar)
    xp, x = namespace_of(x), _finite_or_nan(x)
    if norm == math.inf:  # the entries are projected one by one, and so each has its own boundary
        x_bar = xp.where(xp.abs(x) <= radius, y_bar, xp.zeros_like(y_bar))
    else:
        x_bar = xp.where(_length(x, norm) <= radius, y_bar, _nearest_vjp(y_bar, y, x, norm, radius))
    return nan_where(_not_finite(x), x_bar)


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

    Raises
    ------
    TypeError, ValueError
        As `project_sphere`.

    Notes
    -----
    ``y = max(x − θ, 0)`` with ``θ = max_k (Σ of the k largest − total) / k``. Items with NaN or infinity are NaN.
    Cost: one sort.

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
    _check(1, "(m+)", x=x)
    refuse_recording("project_simplex", x)
    return _simplex(_finite_or_nan(x), total)


@public
def project_simplex_vjp(y_bar: Array, y: Array, /) -> Array:
    r"""Gradient of a loss of `project_simplex`.

    Parameters
    ----------
    y_bar, y : (..., m) real arrays
        Cotangent of the output, and the output: its support is all that the derivative depends on.

    Returns
    -------
    x_bar : (..., m) array

    Raises
    ------
    TypeError, ValueError
        As `project_sphere`.

    Notes
    -----
    With S the support of y,

    .. math:: \bar x_S = \bar y_S - \frac{1}{|S|} \sum_S \bar y, \qquad \bar x = 0 \text{ elsewhere}

    Where ``x_i = θ`` exactly the support changes and only one-sided derivatives exist; such an entry counts as
    outside the support.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.nodes.project_simplex_vjp(np.asarray([1.0, 0.0, 5.0]), np.asarray([0.625, 0.375, 0.0]))
    array([ 0.5, -0.5,  0. ])
    """
    _check(1, "(m+),(m)", y=y, y_bar=y_bar)
    return nan_where(_not_finite(y), _reverse_face(y_bar, namespace_of(y).astype(y > 0, y.dtype)))


# --- the algorithms -------------------------------------------------------------------------------------------------


def _nearest(x: Array, norm: float, radius: float) -> Array:
    """Nearest point of the sphere, one of them where there are several."""
    xp = namespace_of(x)
    if norm == 1:
        return xp.sign(x) * _simplex(xp.abs(x), radius)
    if norm == 2:
        return radius * normalised(x, safe_norm(x))  # zero has no direction and stays zero
    size, bound = xp.abs(x), radius * xp.ones_like(x)
    # From inside, the largest entry moves out to the bound; from outside it is cut to the bound as others are.
    moves = size == xp.max(size, axis=-1, keepdims=True)
    return xp.sign(x) * xp.where(moves, bound, xp.minimum(size, bound))


def _nearest_vjp(y_bar: Array, y: Array, x: Array, norm: float, radius: float) -> Array:
    """Cotangent of `x`: the part of `y_bar` along which y can move on the sphere."""
    xp = namespace_of(y_bar)
    if norm == 1:
        return _reverse_face(y_bar, xp.sign(y))
    length = _length(x, norm)
    if norm == 2:
        u = y / radius
        # A zero input is ambiguous, and the caller makes it NaN.
        length = xp.where(length == 0, xp.ones_like(length), length)
        return (radius / length) * (y_bar - u * xp.sum(u * y_bar, axis=-1, keepdims=True))
    # Entries at the bound stay there; from inside, this is the largest alone.
    free = xp.abs(x) < xp.minimum(length, radius * xp.ones_like(length))
    return xp.where(free, y_bar, xp.zeros_like(y_bar))


def _simplex(x: Array, total: float) -> Array:
    """``max(x − θ, 0)``; θ_k increases with k up to the size of the support and then decreases, so θ is the largest."""
    xp = namespace_of(x)
    # A common shift changes nothing, and a large one would cost digits.
    x = x - xp.max(x, axis=-1, keepdims=True)
    count = xp.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=array_api_compat.device(x))
    largest = xp.cumulative_sum(xp.sort(x, axis=-1, descending=True), axis=-1)
    theta = xp.max((largest - total) / count, axis=-1, keepdims=True)
    return xp.maximum(x - theta, xp.zeros_like(x))


def _reverse_face(y_bar: Array, s: Array) -> Array:
    """``ȳ_S − s_S (s_Sᵀ ȳ_S) / |S|``: the part along the face on which y may move."""
    xp = namespace_of(y_bar)
    support = s * s
    # An empty support has no face, and its mean of nothing is zero.
    count = xp.sum(support, axis=-1, keepdims=True)
    mean = xp.sum(s * y_bar, axis=-1, keepdims=True) / xp.where(count > 0, count, xp.ones_like(count))
    return support * y_bar - s * mean


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
        ties = xp.sum(xp.astype(xp.abs(x) == length, xp.int64), axis=-1, keepdims=True)
        bad = (length < radius) & ((ties > 1) | (length == 0))
    if throw and is_true(xp.any(bad)):
        raise SingularError(
            f"{name}: the nearest point of the sphere is not unique, so neither it nor a gradient is determined. The "
            "input is zero, or lies inside the sphere and has a zero entry (L1) or equal largest entries (L∞). "
            "Project onto the ball, perturb the input, or pass throw=False to get NaN for these items."
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
