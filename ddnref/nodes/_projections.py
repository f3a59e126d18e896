"""Euclidean projections onto spheres, balls and the simplex, ``y = argmin_u ½ ‖u − x‖²`` subject to ``u`` in the set.

With ``θ`` such that ``Σ max(|x_i| − θ, 0) = r``, s the signs of x and S the support of y,

    L1   y = s ∘ max(|x| − θ, 0)      x̄_S = ȳ_S − s_S (s_Sᵀ ȳ_S) / |S|, 0 elsewhere
    L2   y = r x / ‖x‖                x̄ = (r / ‖x‖) (ȳ − u uᵀȳ),  u = y / r
    L∞   y = clip(x, −r, r)           x̄ = ȳ where |x_i| < r, 0 elsewhere

for x outside the ball. From inside, θ is negative and the L1 form still holds; on the L∞ sphere the largest entry
alone moves to ``±r``.
"""

from __future__ import annotations

import math

import array_api_compat

from ddnref._core.arrays import Array, Namespace, is_true, namespace, nan_where, refuse_recording
from ddnref._core.checks import check_dtypes, check_real, check_shapes
from ddnref._kernels.public import public
from ddnref.errors import SingularError
from ddnref.implicit._point import norm as l2_norm

NORMS = (1, 2, math.inf)


@public
def project_sphere(x: Array, /, *, norm: float = 2, radius: float = 1.0, throw: bool = True) -> Array:
    """Nearest point of the sphere ``‖u‖ = radius``, which is not convex: from inside as well as from outside.

    Parameters
    ----------
    x : (..., m) real array
    norm : {1, 2, inf}
    radius : float, positive
    throw : bool, default True
        Raise `SingularError` where the nearest point is not unique; with ``False`` such items are NaN.

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
    _check(norm, radius, x=x)
    refuse_recording("project_sphere", x)
    x = _finite_or_nan(x)
    bad = _ambiguous(x, norm, radius)
    _refuse("project_sphere", bad, x, throw)
    return nan_where(bad, _PROJECT[norm](x, radius, False))


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
    _check(norm, radius, y_bar=y_bar, y=y, x=x)
    x = _finite_or_nan(x)
    bad = _ambiguous(x, norm, radius)
    _refuse("project_sphere_vjp", bad, x, throw)
    return nan_where(bad | _not_finite(x), _REVERSE[norm](y_bar, y, x, radius))


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
    _check(norm, radius, x=x)
    refuse_recording("project_ball", x)
    return _PROJECT[norm](_finite_or_nan(x), radius, True)


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
    Inside, `y_bar` itself; outside, the formula of the sphere. Exactly on the boundary only one-sided derivatives
    exist: what comes back is the one from inside, `y_bar`. Elsewhere as `project_sphere_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([2.0, -0.5])
    >>> ddnref.nodes.project_ball_vjp(np.ones(2), ddnref.nodes.project_ball(x, norm=np.inf), x, norm=np.inf)
    array([0., 1.])
    """
    xp = _check(norm, radius, y_bar=y_bar, y=y, x=x)
    x = _finite_or_nan(x)
    if norm == math.inf:
        x_bar = xp.where(xp.abs(x) <= radius, y_bar, xp.zeros_like(y_bar))
    else:
        x_bar = xp.where(_length(x, norm) <= radius, y_bar, _REVERSE[norm](y_bar, y, x, radius))
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
    _check(1, total, x=x)
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
    outside of it.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.nodes.project_simplex_vjp(np.asarray([1.0, 0.0, 5.0]), np.asarray([0.625, 0.375, 0.0]))
    array([ 0.5, -0.5,  0. ])
    """
    xp = _check(1, 1.0, y_bar=y_bar, y=y)
    return nan_where(_not_finite(y), _reverse_face(y_bar, xp.astype(y > 0, y.dtype)))


# --- the algorithms -----------------------------------------------------------------------------------------------


def _simplex(x: Array, total: float) -> Array:
    """θ increases with k up to the size of the support and decreases from there: it is the largest."""
    xp = array_api_compat.array_namespace(x)
    x = x - xp.max(x, axis=-1, keepdims=True)  # shifts change nothing, and large ones would cost digits
    count = xp.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=array_api_compat.device(x))
    largest = xp.cumulative_sum(xp.sort(x, axis=-1, descending=True), axis=-1)
    theta = xp.max((largest - total) / count, axis=-1, keepdims=True)
    return xp.maximum(x - theta, xp.zeros_like(x))


def _l1(x: Array, radius: float, ball: bool) -> Array:
    xp = array_api_compat.array_namespace(x)
    y = xp.sign(x) * _simplex(xp.abs(x), radius)
    return xp.where(_length(x, 1) <= radius, x, y) if ball else y


def _l2(x: Array, radius: float, ball: bool) -> Array:
    xp = array_api_compat.array_namespace(x)
    length = _length(x, 2)
    y = radius * (x / xp.where(length == 0, xp.ones_like(length), length))
    return xp.where(length <= radius, x, y) if ball else y


def _linf(x: Array, radius: float, ball: bool) -> Array:
    xp = array_api_compat.array_namespace(x)
    size = xp.abs(x)
    bound = xp.minimum(size, radius * xp.ones_like(x))
    if not ball:  # inside, the largest entry moves out; outside it is at the bound already
        bound = xp.where(size == xp.max(size, axis=-1, keepdims=True), radius * xp.ones_like(x), bound)
    return xp.sign(x) * bound


def _reverse_l1(y_bar: Array, y: Array, x: Array, radius: float) -> Array:  # noqa: ARG001
    return _reverse_face(y_bar, array_api_compat.array_namespace(y).sign(y))


def _reverse_face(y_bar: Array, s: Array) -> Array:
    """``ȳ_S − s_S (s_Sᵀ ȳ_S) / |S|``: the part along the face on which y may move."""
    xp = array_api_compat.array_namespace(y_bar)
    support = s * s
    count = xp.sum(support, axis=-1, keepdims=True)
    mean = xp.sum(s * y_bar, axis=-1, keepdims=True) / xp.where(count > 0, count, xp.ones_like(count))
    return support * y_bar - s * mean


def _reverse_l2(y_bar: Array, y: Array, x: Array, radius: float) -> Array:
    xp = array_api_compat.array_namespace(y_bar)
    u, length = y / radius, _length(x, 2)
    length = xp.where(length == 0, xp.ones_like(length), length)
    return (radius / length) * (y_bar - u * xp.sum(u * y_bar, axis=-1, keepdims=True))


def _reverse_linf(y_bar: Array, y: Array, x: Array, radius: float) -> Array:  # noqa: ARG001
    xp = array_api_compat.array_namespace(y_bar)
    largest = _length(x, math.inf)
    free = xp.abs(x) < xp.minimum(largest, radius * xp.ones_like(largest))
    return xp.where(free, y_bar, xp.zeros_like(y_bar))


_PROJECT = {1: _l1, 2: _l2, math.inf: _linf}
_REVERSE = {1: _reverse_l1, 2: _reverse_l2, math.inf: _reverse_linf}


def _length(x: Array, norm: float) -> Array:
    """``‖x‖`` as (..., 1)."""
    xp = array_api_compat.array_namespace(x)
    if norm == 2:
        return l2_norm(x)[..., None]
    return (xp.sum if norm == 1 else xp.max)(xp.abs(x), axis=-1, keepdims=True)


def _ambiguous(x: Array, norm: float, radius: float) -> Array:
    """Where the nearest point of the sphere is not unique, (..., 1)."""
    xp = array_api_compat.array_namespace(x)
    length = _length(x, norm)
    if norm == 2:
        return length == 0
    if norm == 1:
        return (length < radius) & xp.any(x == 0, axis=-1, keepdims=True)
    ties = xp.sum(xp.astype(xp.abs(x) == length, xp.int64), axis=-1, keepdims=True)
    return (length < radius) & ((ties > 1) | (length == 0))


def _refuse(name: str, bad: Array, x: Array, throw: bool) -> None:
    if throw and is_true(array_api_compat.array_namespace(x).any(bad)):
        raise SingularError(
            f"{name}: the nearest point of the sphere is not unique, so neither it nor a gradient is determined. "
            "Likely the input is zero, or (L1) has a zero entry or (L∞) has equal largest entries inside the sphere. "
            "Project onto the ball, perturb the input, or pass throw=False to get NaN for these items."
        )


def _not_finite(x: Array) -> Array:
    xp = array_api_compat.array_namespace(x)
    return ~xp.all(xp.isfinite(x), axis=-1, keepdims=True)


def _finite_or_nan(x: Array) -> Array:
    """Whole items NaN that are not finite."""
    return nan_where(_not_finite(x), x)


def _check(norm: float, radius: float, **arrays: Array) -> Namespace:
    xp = namespace(**arrays)
    check_real(**arrays)
    first = next(iter(arrays.values()))
    if first.ndim < 1 or first.shape[-1] < 1:
        name = next(iter(arrays))
        raise ValueError(f"{name} has shape {tuple(first.shape)}, expected (..., m) with m at least 1.")
    check_dtypes(**{name: (a, first.dtype) for name, a in arrays.items()})
    check_shapes(**{name: (a, tuple(first.shape)) for name, a in arrays.items()})
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, expected 1, 2 or inf.")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius (or total) is {radius!r}, expected a positive number.")
    return xp
