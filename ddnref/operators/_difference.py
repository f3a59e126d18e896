"""Forward differences on a grid, and their adjoint, for three kinds of border.

(D x)_i = x_{i+1} − x_i        (Dᵀ y)_i = y_{i−1} − y_i

periodic     x_n = x_0          y_{−1} = y_{n−1}
replicate    x_n = x_{n−1}      y_{−1} = 0, and y_{n−1} counts as 0
zero         x_n = 0            y_{−1} = 0
"""

from __future__ import annotations

from typing import Any

import array_api_compat

from ddnref._core.arrays import Array
from ddnref._kernels.public import public
from ddnref.operators import _numpy
from ddnref.operators._operator import LinearOperator, Params, as_shape, is_array, no_motions, no_params_vjp, over

BOUNDARIES = ("periodic", "replicate", "zero")


@public
def difference(
    shape: tuple[int, ...] | int, /, axis: int | tuple[int, ...] | None = None, *, boundary: str = "periodic"
) -> LinearOperator:
    r"""Finite-difference gradient of a function on a grid.

    Parameters
    ----------
    shape : tuple of int
        Of the grid.
    axis : int or tuple of int, optional
        Along which axes of the grid; all by default.
    boundary : {"periodic", "replicate", "zero"}
        What lies behind the last point: the first one; the last one again, so that the last difference is 0 (no flux,
        Neumann); or 0 (Dirichlet, at that end alone: in front of the first point nothing is assumed).

    Returns
    -------
    operator : LinearOperator
        Without parameters. From ``(..., *shape)`` to ``(..., *shape)`` for an int, else to ``(..., j, *shape)`` with
        one component for each of the j axes.

    Raises
    ------
    ValueError
        For an unknown boundary, an axis that the grid does not have or that is given twice, an empty grid.

    Notes
    -----
    ``(D x)_i = x_{i+1} − x_i`` at unit spacing; `scaled` has other ones. `normal` of it is the negative Laplacian of
    the same boundary, and its null space for "periodic" and "replicate" are the constants. Two flops an entry and axis.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.difference((3,), axis=0, boundary="replicate")(np.asarray([1.0, 4.0, 9.0]))
    array([3., 5., 0.])
    """
    sizes = as_shape("shape", shape)
    n = len(sizes)
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary is {boundary!r}, expected one of {', '.join(map(repr, BOUNDARIES))}.")
    if n == 0 or 0 in sizes:
        raise ValueError(f"shape is {sizes}; a grid has at least one axis and no empty one.")
    given = tuple(range(n)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -n <= i < n for i in given) or len({i % n for i in given}) != len(given) or not given:
        raise ValueError(f"axis is {axis}, expected different axes of a grid with {n}.")
    axes = tuple(i % n - n for i in given)  # from the end: batch axes lead
    single = isinstance(axis, int)

    def apply(params: Params, x: Array) -> Array:  # noqa: ARG001
        if single:
            return _forward(x, axes[0], boundary)
        return array_api_compat.array_namespace(x).stack([_forward(x, i, boundary) for i in axes], axis=-n - 1)

    def adjoint(params: Params, y: Array) -> Array:  # noqa: ARG001
        if single:
            return _backward(y, axes[0], boundary)
        components = [y[(..., j, *(slice(None),) * n)] for j in range(len(axes))]
        return sum(_backward(y_j, i, boundary) for y_j, i in zip(components, axes, strict=True))

    def params_vjp(params: Params, y_bar: Array, x: Array) -> Params:  # noqa: ARG001
        return ()

    def gram(params: Params, shift: Array | float | None) -> LinearOperator:  # noqa: ARG001
        return _laplacian(axes, boundary, sizes, shift)

    target = sizes if single else (len(axes), *sizes)
    return LinearOperator((), apply, adjoint, params_vjp, sizes, target, gram=gram, **no_motions(apply, adjoint))


def _laplacian(
    axes: tuple[int, ...], boundary: str, shape: tuple[int, ...], shift: Array | float | None
) -> LinearOperator:
    """``DᵀD + shift``, axis by axis: no component is stored."""
    number = 0.0 if is_array(shift) or shift is None else shift

    def apply(params: Params, x: Array) -> Array:
        rho = over(params[0], len(shape)) if params else number
        if array_api_compat.is_numpy_array(x):
            return _numpy.laplacian(x, axes, boundary, rho)
        return sum((_backward(_forward(x, axis, boundary), axis, boundary) for axis in axes), start=rho * x)

    params = (shift,) if is_array(shift) else ()
    return LinearOperator(params, apply, apply, no_params_vjp, shape, shape, True, shift is not None)


def _part(x: Array, axis: int, start: int | None, stop: int | None) -> Array:
    """A slice along an axis counted from the end."""
    index: tuple[Any, ...] = (..., slice(start, stop), *(slice(None),) * (-axis - 1))
    return x[index]


def _forward(x: Array, axis: int, boundary: str) -> Array:
    """``x_{i+1} − x_i``."""
    xp = array_api_compat.array_namespace(x)
    behind = _part(x, axis, -1, None) if boundary == "replicate" else _part(x, axis, None, 1)
    if boundary == "zero":
        behind = xp.zeros_like(behind)
    return xp.concat([_part(x, axis, 1, None), behind], axis=axis) - x


def _backward(y: Array, axis: int, boundary: str) -> Array:
    """``y_{i−1} − y_i``, the adjoint."""
    xp = array_api_compat.array_namespace(y)
    last = _part(y, axis, -1, None)
    before, rest = (last, y) if boundary == "periodic" else (xp.zeros_like(last), y)
    if boundary == "replicate":
        rest = xp.concat([_part(y, axis, None, -1), before], axis=axis)
    return xp.concat([before, _part(rest, axis, None, -1)], axis=axis) - rest
