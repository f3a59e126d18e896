"""Vectors of a Krylov method: updates that leave frozen ones alone, in place on NumPy.

A vector is one trailing axis, or several where `axes` says so; NumPy's are always one.
"""

from __future__ import annotations

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, as_dtype, conj, namespace_of, power_of_two_below, real, with_axes
from ddnref._kernels import inplace as _inplace
from ddnref._kernels import numpy as _numpy

NUMPY = np.ndarray, np.generic  # numbers of one right-hand side are NumPy scalars


def column(x: Array, like: Array) -> Array:
    """Numbers ``(...)`` as factors of vectors ``(..., n)`` or ``(..., *shape)``, in their dtype."""
    return with_axes(as_dtype(x, like), like.ndim - x.ndim)


def complex_dots(y: Array, z: Array, axes: int = 1) -> Array:
    """``yᴴ z`` over that many trailing axes."""
    if type(y) is np.ndarray:
        return _numpy.dots(y, z)
    return namespace_of(y).sum(conj(y) * z, axis=tuple(range(-axes, 0)))


def dots(y: Array, z: Array, axes: int = 1) -> Array:
    """``Re yᴴ z``."""
    return real(complex_dots(y, z, axes))


def norms(y: Array, axes: int = 1) -> Array:
    """``‖y‖``."""
    return dots(y, y, axes) ** 0.5


def axpy(y: Array, go: Array, alpha: Array, x: Array) -> Array:
    """``y + α x`` where `go` is set and y elsewhere, bit for bit; on NumPy y itself, overwritten."""
    if type(y) is np.ndarray:
        return _inplace.axpy(y, go, alpha, x)
    return namespace_of(y).where(with_axes(go, y.ndim - go.ndim), y + column(alpha, y) * x, y)


def xpay(z: Array, beta: Array, p: Array) -> Array:
    """``z + β p``; on NumPy p itself, overwritten."""
    if type(p) is np.ndarray:
        return _inplace.xpay(z, beta, p)
    return z + column(beta, p) * p


def quotient(a: Array, b: Array, ok: Array) -> Array:
    """``a / b`` where `ok`, 0 elsewhere; never a division by zero."""
    if isinstance(b, NUMPY):
        return np.where(ok, a / b, 0.0)  # inside `quiet`; a third of the time, which counts for one vector
    xp = namespace_of(a)
    return xp.where(ok, a / xp.where(ok, b, xp.ones_like(b)), xp.zeros_like(a))


def power_of_two(x: Array, axes: int = 1) -> Array:
    """The power of two below the largest entry of each vector, 1 for zero."""
    xp = array_api_compat.array_namespace(x)
    return power_of_two_below(xp.max(xp.abs(x), axis=tuple(range(-axes, 0))))
