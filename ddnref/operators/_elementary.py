"""Operators given by their entries: a matrix, a diagonal, a mask.

dense       y = A x         Ā = Σ ȳ xᴴ
diagonal    y = d ∘ x       d̄ = Σ ȳ ∘ conj(x)
mask        y = m ∘ x       m̄ = Re Σ ȳ ∘ conj(x), m real
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, conj, is_complex, library, namespace, namespace_of, with_scalars_as_arrays
from ddnref._core.checks import check_precision
from ddnref._kernels.dense import move_axis
from ddnref._kernels.public import public
from ddnref._kernels.vectors import alike
from ddnref.operators._operator import (
    Linear,
    LinearOperator,
    Params,
    as_shape,
    cotangent,
    is_array,
    motions,
    no_params_vjp,
    over,
    shared,
)


@public
def dense(a: Array, /, *, self_adjoint: bool = False, positive_definite: bool = False) -> LinearOperator:
    """A matrix as an operator from ``(..., m)`` to ``(..., n)``, with the one parameter `a`.

    Parameters
    ----------
    a : (..., n, m) array, real or complex floating
    self_adjoint, positive_definite : bool, default False
        Properties of the matrix. It is applied as it is, without being symmetrised, and its gradient treats all
        entries as free.

    Notes
    -----
    ``Ā = Σ ȳ xᴴ``, summed over the right-hand sides, at 2 n m flops each. Several right-hand sides are one matrix
    product.

    Examples
    --------
    >>> import numpy as np
    >>> a = ddnref.operators.dense(np.asarray([[1.0, 2.0], [0.0, 1.0]]))
    >>> a(np.asarray([1.0, 1.0]))
    array([3., 1.])
    """
    # A positive definite matrix is self-adjoint, and a self-adjoint one is square.
    n, m = _sizes("a", a)
    if (self_adjoint or positive_definite) and n != m:
        raise ValueError(f"a has shape {tuple(a.shape)}; only a square matrix can be self-adjoint.")
    flags = self_adjoint or positive_definite, positive_definite
    of = shared(_Dense)
    return LinearOperator((a,), of.apply, of.adjoint, of.params_vjp, (m,), (n,), *flags, **motions(of))


def _sizes(name: str, a: Array) -> tuple[int, int]:
    """Return n and m of a floating array ``(..., n, m)``, or raise."""
    namespace(**{name: a})
    if a.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(a.shape)}, expected (..., n, m).")
    n, m = a.shape[-2:]
    return n, m


@dataclass(frozen=True, eq=False)
class _Dense(Linear):
    def apply(self, params: Params, x: Array) -> Array:
        (a,) = params
        return _rows_times(x, namespace_of(a).matrix_transpose(a))

    def adjoint(self, params: Params, y: Array) -> Array:
        return conj(_rows_times(conj(y), params[0]))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        (a,) = params
        xp = namespace_of(a)
        # One product ȳᵀ conj(x) per item of the batch sums over all right-hand sides.
        lead = np.broadcast_shapes(tuple(y_bar.shape[:-1]), tuple(x.shape[:-1]))
        u = _rows(xp.broadcast_to(y_bar, (*lead, y_bar.shape[-1])), a.ndim - 2)
        v = _rows(xp.broadcast_to(x, (*lead, x.shape[-1])), a.ndim - 2)
        u, v = alike(u, v)  # a real matrix may be applied to complex vectors
        return (cotangent(xp.matrix_transpose(u) @ conj(v), a),)


def _rows_times(x: Array, a: Array) -> Array:
    """Vectors ``(..., m)`` as rows times matrices ``(..., m, n)``, with all right-hand sides in one product."""
    xp = namespace_of(x)
    x, a = alike(x, a)
    batch = a.ndim - 2
    # One vector, or one for each item
    if x.ndim == 1 and batch == 0:
        return x @ a
    if x.ndim - 1 <= batch:
        return (x[..., None, :] @ a)[..., 0, :]
    # Leading axes in front of those of the matrix become the rows of one product per item.
    y = _rows(x, batch) @ a
    return xp.reshape(move_axis(y, -2, 0), (*x.shape[: x.ndim - 1 - batch], *y.shape[:-2], y.shape[-1]))


def _rows(x: Array, batch: int) -> Array:
    """Reshape ``(..., *batch, m)`` to ``(*batch, j, m)``, where j counts the vectors in front of the batch axes."""
    xp = namespace_of(x)
    # Flatten the axes in front, then move them next to the vectors.
    lead = tuple(x.shape[: max(0, x.ndim - 1 - batch)])
    flat = xp.reshape(x, (math.prod(lead), *x.shape[len(lead) :]))
    return move_axis(flat, 0, -2)


@public
def diagonal(
    d: Array, /, shape: tuple[int, ...] | int | None = None, *, positive_definite: bool = False
) -> LinearOperator:
    r"""Multiplication with one number for each entry; self-adjoint if `d` is real.

    Parameters
    ----------
    d : (..., \*shape) array, real or complex floating
        Its gradient is ``Σ ȳ ∘ conj(x)``, summed over the axes that it lacks.
    shape : tuple of int, optional
        Shape of a vector; the last axis of `d` by default. Pass it for vectors on a grid, whose other axes would
        otherwise count as batch axes.
    positive_definite : bool, default False
        Whether all entries are positive; then `d` must be real.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.diagonal(np.asarray([1.0, 2.0]))(np.asarray([3.0, 3.0]))
    array([3., 6.])
    """
    namespace(d=d)
    if positive_definite and is_complex(d):
        raise TypeError(f"d has dtype {d.dtype}; a positive definite diagonal is real.")
    sizes = _domain_shape("d", d, shape)  # behind any batch axes
    return _diagonal(d, sizes, not is_complex(d), positive_definite)


@public
def mask(m: Array, /, shape: tuple[int, ...] | int | None = None) -> LinearOperator:
    r"""Self-adjoint projection that keeps some entries and sets the others to zero.

    Parameters
    ----------
    m : (..., \*shape) array, real floating or bool
        One where an entry is kept, zero where it is not; or a real weight, to which the gradient refers. Boolean masks
        become floating numbers of the library's default precision; convert them yourself for another precision.
    shape : tuple of int, optional
        As in `diagonal`.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.mask(np.asarray([True, False]))(np.asarray([3.0, 3.0]))
    array([3., 0.])
    """
    # Boolean entries become numbers, because a mask is multiplied with.
    if array_api_compat.is_array_api_obj(m):
        xp = library(m=m)
        if xp.isdtype(m.dtype, "bool"):
            m = xp.astype(m, xp.zeros((), device=array_api_compat.device(m)).dtype)
    namespace(m=m)
    if is_complex(m):
        raise TypeError(f"m has dtype {m.dtype}; a mask is real. Pass a complex diagonal to ddnref.operators.diagonal.")
    return _diagonal(m, _domain_shape("m", m, shape), True, False)


def _domain_shape(name: str, d: Array, shape: tuple[int, ...] | int | None) -> tuple[int, ...]:
    sizes = tuple(d.shape[-1:]) if shape is None else as_shape("shape", shape)
    if d.ndim == 0 or tuple(d.shape[max(0, d.ndim - len(sizes)) :]) != sizes:
        raise ValueError(f"{name} has shape {tuple(d.shape)}, expected (..., *{sizes or '(n,)'}).")
    return sizes


def _diagonal(d: Array, shape: tuple[int, ...], self_adjoint: bool, positive_definite: bool) -> LinearOperator:
    of = shared(_Diagonal, shape)
    flags = self_adjoint, positive_definite
    return LinearOperator((d,), of.apply, of.adjoint, of.params_vjp, shape, shape, *flags, of.gram, **motions(of))


@dataclass(frozen=True, eq=False)
class _Diagonal(Linear):
    shape: tuple[int, ...]

    def apply(self, params: Params, x: Array) -> Array:
        return params[0] * x

    def adjoint(self, params: Params, y: Array) -> Array:
        return conj(params[0]) * y

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        return (cotangent(y_bar * conj(x), params[0]),)

    def gram(self, params: Params, shift: Array | float | None) -> LinearOperator:
        # AᴴA + shift is the diagonal |d|² + shift.
        (d,) = params
        xp = namespace_of(d)
        power = xp.real(d) ** 2 + xp.imag(d) ** 2 if is_complex(d) else d * d
        if shift is not None:
            power = power + over(shift, len(self.shape))
        return _diagonal(power, self.shape, True, shift is not None)._replace(params_vjp=no_params_vjp)


def as_operator(a: Array | LinearOperator, name: str = "operator") -> LinearOperator:
    """Return an operator unchanged, and wrap an array ``(..., n, m)`` by `dense`."""
    if isinstance(a, LinearOperator):
        return a
    if not array_api_compat.is_array_api_obj(a):
        raise TypeError(
            f"{name} is a {type(a).__qualname__}, expected a LinearOperator or an array (..., n, m). "
            "SciPy's and CuPy's operators and sparse matrices are wrapped by ddnref.operators.from_scipy."
        )
    _sizes(name, a)  # names the argument in the message
    return dense(a)


def coefficient(name: str, c: Any, params: Params, real: bool = False) -> Any:
    """Return a Python number, or a floating array of the precision of the parameters, or raise.

    NumPy's scalars, which its functions return for arrays without axes, count as arrays and get a gradient.
    """
    if c is None:
        raise TypeError(f"{name} is None, expected a number or an array.")
    if not is_array(c):
        if real and isinstance(c, complex):
            raise TypeError(f"{name} is {c!r}, expected a real number or a real array.")
        return c
    # An array must go together with the parameters.
    c = with_scalars_as_arrays(c)
    arrays = {name: c, **{f"params[{i}]": parameter for i, parameter in enumerate(params)}}
    check_precision(namespace(**arrays), **arrays)
    if real and is_complex(c):
        raise TypeError(f"{name} has dtype {c.dtype}, expected a real array.")
    return c
