"""Periodic convolution with a small kernel, and its normal operator, by one pair of Fourier transforms.

With the kernel embedded in the grid, its centre at the origin, and ``k̂``, ``x̂`` the transforms:

    y_i = Σ_j k_j x_{i − (j − c)},  c = ⌊shape(k)/2⌋        ŷ = k̂ ∘ x̂
    AᴴA + ρ                                                 ŷ = (|k̂|² + ρ) ∘ x̂
    k̄_j = Σ_i ȳ_i conj(x_{i − (j − c)})                     k̄ = crop of the inverse transform of ȳ̂ ∘ conj(x̂)
"""

from __future__ import annotations

import array_api_compat

from ddnref._core.arrays import Array, conj, is_complex, namespace
from ddnref._kernels.public import public
from ddnref.operators._fourier import filtered, inverse, multiplier, transform
from ddnref.operators._operator import (
    LinearOperator,
    Params,
    as_complex,
    as_shape,
    cotangent,
    linear_motions,
    no_params_vjp,
    over,
    zeros,
)


@public
def convolution(
    kernel: Array, shape: tuple[int, ...] | int, /, *, self_adjoint: bool = False, positive_definite: bool = False
) -> LinearOperator:
    r"""Periodic convolution on a grid with one to three axes.

    Parameters
    ----------
    kernel : (..., \*kernel_shape) array, real or complex floating
        With as many axes as the grid behind its batch axes, none longer than the grid's. Its centre, entry
        ``size // 2`` of each axis, is the origin.
    shape : tuple of int
        Of the grid.
    self_adjoint, positive_definite : bool, default False
        What is known of the kernel: self-adjoint if ``k_{−j} = conj(k_j)`` around the centre, positive definite if its
        spectrum is positive besides. Its gradient is that of free entries.

    Returns
    -------
    operator : LinearOperator
        From ``(..., *shape)`` to the same, with the one parameter `kernel`.

    Raises
    ------
    TypeError
        If `kernel` is not a floating array.
    ValueError
        If the grid is empty or has not one to three axes, or the kernel has fewer axes, an empty one, or is larger.

    Notes
    -----
    .. math:: y_i = \sum_j k_j\, x_{i - (j - c)}, \qquad \bar k_j = \sum_i \bar y_i\, \overline{x_{i - (j - c)}}

    By Fourier transforms: two for a product of N points, N log N flops each, and one more for the kernel's spectrum,
    which `LinearOperator.prepared` computes once. ``normal(convolution(...), damping)`` multiplies with the real
    ``|k̂|² + ρ`` between one pair of transforms. Real kernels use real transforms.

    Examples
    --------
    >>> import numpy as np
    >>> blur = ddnref.operators.convolution(np.asarray([0.25, 0.5, 0.25]), (4,), self_adjoint=True)
    >>> np.round(blur(np.asarray([0.0, 4.0, 0.0, 0.0])), 12) + 0
    array([1., 2., 1., 0.])
    """
    namespace(kernel=kernel)
    sizes = as_shape("shape", shape)
    n = len(sizes)
    if not 1 <= n <= 3 or 0 in sizes:
        raise ValueError(f"shape is {sizes}, expected one to three axes, none of them empty.")
    small = tuple(kernel.shape[max(0, kernel.ndim - n) :])
    if len(small) != n or any(not 1 <= k <= size for k, size in zip(small, sizes, strict=True)):
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}; expected {n} axes for the grid {sizes}, batch axes in front, "
            "none empty or longer than the grid's. Crop a larger kernel, or sum it over the periods of the grid."
        )
    return _convolution(kernel, small, sizes, self_adjoint or positive_definite, positive_definite)


def _convolution(
    kernel: Array, small: tuple[int, ...], shape: tuple[int, ...], self_adjoint: bool, positive_definite: bool
) -> LinearOperator:
    def spectrum(params: Params) -> Array:
        return transform(_embed(params[0], small, shape), len(shape))

    def apply(params: Params, x: Array) -> Array:
        return filtered(x, multiplier(spectrum(params), shape), shape, not is_complex(params[0]))

    def adjoint(params: Params, y: Array) -> Array:
        return filtered(y, multiplier(conj(spectrum(params)), shape), shape, not is_complex(params[0]))

    def params_vjp(params: Params, y_bar: Array, x: Array) -> Params:
        (k,) = params
        return (cotangent(_crop(_correlation(y_bar, x, k, shape), small, shape), k),)

    def prepare(params: Params) -> LinearOperator:
        k_hat, is_real = spectrum(params), not is_complex(params[0])
        return _prepared(k_hat, shape, is_real, self_adjoint, positive_definite)

    def gram(params: Params, shift: Array | float | None) -> LinearOperator:
        """``|k̂|² + shift``: real."""
        k_hat, xp = spectrum(params), array_api_compat.array_namespace(params[0])
        power = xp.real(k_hat) ** 2 + xp.imag(k_hat) ** 2
        power = power if shift is None else power + over(shift, len(shape))
        return _prepared(power, shape, not is_complex(params[0]), True, shift is not None)

    return LinearOperator(
        (kernel,), apply, adjoint, params_vjp, shape, shape, self_adjoint, positive_definite, gram, prepare,
        **linear_motions(apply, adjoint),
    )  # fmt: skip


def _prepared(
    spectrum: Array, shape: tuple[int, ...], is_real: bool, self_adjoint: bool, positive_definite: bool
) -> LinearOperator:
    """Multiplication with a given spectrum: half of it where the kernel is real."""

    def apply(params: Params, x: Array) -> Array:
        return filtered(x, params[0], shape, is_real)

    def adjoint(params: Params, y: Array) -> Array:
        return filtered(y, params[-1], shape, is_real)

    factor = multiplier(spectrum, shape)
    params = (factor, conj(factor)) if is_complex(spectrum) else (factor,)
    return LinearOperator(params, apply, adjoint, no_params_vjp, shape, shape, self_adjoint, positive_definite)


def _embed(k: Array, small: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The kernel in an empty grid, its centre at the origin and its first half wrapped around."""
    xp = array_api_compat.array_namespace(k)
    n = len(shape)
    for axis in range(n):
        c = small[axis] // 2
        index = (..., slice(c, None)), (..., slice(None, c))
        after, before = (k[(*i, *(slice(None),) * (n - 1 - axis))] for i in index)
        gap = list(k.shape)
        gap[axis - n] = shape[axis] - small[axis]
        k = xp.concat([after, zeros(tuple(gap), k), before], axis=axis - n)
    return k


def _crop(g: Array, small: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The transpose of `_embed`."""
    xp = array_api_compat.array_namespace(g)
    n = len(shape)
    for axis in range(n):
        c = small[axis] // 2
        index = (..., slice(shape[axis] - c, None)), (..., slice(None, small[axis] - c))
        g = xp.concat([g[(*i, *(slice(None),) * (n - 1 - axis))] for i in index], axis=axis - n)
    return g


def _correlation(y_bar: Array, x: Array, k: Array, shape: tuple[int, ...]) -> Array:
    """``Σ_i ȳ_i conj(x_{i − j})`` for all j of the grid, summed over the batch in the spectrum."""
    n = len(shape)
    if is_complex(k) or is_complex(x) or is_complex(y_bar):
        y_bar, x = as_complex(y_bar), as_complex(x)
    is_real = not is_complex(x)
    product = transform(y_bar, n) * conj(transform(x, n))
    like = zeros((*k.shape[: k.ndim - n], *product.shape[product.ndim - n :]), product)
    return inverse(cotangent(product, like), shape, is_real)
