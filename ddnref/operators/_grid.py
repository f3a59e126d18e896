"""Operators on a grid: periodic convolution with a small kernel, and forward differences.

With the kernel of a convolution embedded in the grid, its centre at the origin, and ``k̂``, ``x̂`` the transforms:

    y_i = Σ_j k_j x_{i − (j − c)},  c = ⌊shape(k)/2⌋        ŷ = k̂ ∘ x̂
    AᴴA + ρ                                                 ŷ = (|k̂|² + ρ) ∘ x̂
    k̄_j = Σ_i ȳ_i conj(x_{i − (j − c)})                     k̄ = crop of the inverse transform of ȳ̂ ∘ conj(x̂)
"""

from __future__ import annotations

from dataclasses import dataclass

import array_api_compat

from ddnref._core.arrays import Array, conj, full, is_complex, namespace
from ddnref._kernels.grid import difference as forward
from ddnref._kernels.grid import difference_adjoint as backward
from ddnref._kernels.grid import filtered, inverse, laplacian, multiplier, part, transform
from ddnref._kernels.public import public
from ddnref._kernels.vectors import as_complex
from ddnref.operators._operator import (
    Constant,
    Linear,
    LinearOperator,
    Params,
    Structure,
    as_shape,
    cotangent,
    is_array,
    motions,
    no_params_vjp,
    over,
    shared,
)

BOUNDARIES = ("periodic", "replicate", "zero")


@public
def convolution(
    kernel: Array, shape: tuple[int, ...] | int, /, *, self_adjoint: bool = False, positive_definite: bool = False
) -> LinearOperator:
    r"""Periodic convolution from ``(..., *shape)`` to the same, on a grid with one to three axes.

    Parameters
    ----------
    kernel : (..., \*kernel_shape) array, real or complex floating
        Behind its batch axes it has as many axes as the grid, none empty or longer than the grid's. Its centre, entry
        ``size // 2`` of each axis, is the origin.
    shape : tuple of int
        Shape of the grid, without empty axes.
    self_adjoint, positive_definite : bool, default False
        Properties of the kernel: self-adjoint if ``k_{−j} = conj(k_j)`` around the centre, positive definite if its
        spectrum is positive as well. Its gradient treats all entries as free.

    Notes
    -----
    .. math:: y_i = \sum_j k_j\, x_{i - (j - c)}, \qquad \bar k_j = \sum_i \bar y_i\, \overline{x_{i - (j - c)}}

    A product of N points takes two Fourier transforms, N log N flops each, and one more for the spectrum of the kernel,
    which `LinearOperator.prepared` computes once. ``normal(convolution(...), damping)`` multiplies with the real
    ``|k̂|² + ρ`` between one pair of transforms. Real kernels use real transforms.

    Examples
    --------
    >>> import numpy as np
    >>> blur = ddnref.operators.convolution(np.asarray([0.25, 0.5, 0.25]), (4,), self_adjoint=True)
    >>> np.round(blur(np.asarray([0.0, 4.0, 0.0, 0.0])), 12) + 0
    array([1., 2., 1., 0.])
    """
    # The trailing axes of the kernel belong to the grid, those in front to a batch.
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
    flags = self_adjoint or positive_definite, positive_definite
    of = shared(_Convolution, small, sizes, *flags)
    return LinearOperator(
        (kernel,), of.apply, of.adjoint, of.params_vjp, sizes, sizes, *flags, of.gram, of.prepare, **motions(of)
    )


@dataclass(frozen=True, eq=False)
class _Convolution(Linear):
    small: tuple[int, ...]
    shape: tuple[int, ...]
    self_adjoint: bool
    positive_definite: bool

    def spectrum(self, params: Params) -> Array:
        return transform(_embed(params[0], self.small, self.shape), len(self.shape))

    # ŷ = k̂ ∘ x̂, and conj(k̂) for the adjoint
    def apply(self, params: Params, x: Array) -> Array:
        return filtered(x, multiplier(self.spectrum(params), self.shape), self.shape, not is_complex(params[0]))

    def adjoint(self, params: Params, y: Array) -> Array:
        k_hat = conj(self.spectrum(params))
        return filtered(y, multiplier(k_hat, self.shape), self.shape, not is_complex(params[0]))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        (k,) = params
        return (cotangent(_crop(_correlation(y_bar, x, k, self.shape), self.small, self.shape), k),)

    def prepare(self, params: Params) -> LinearOperator:
        flags = self.self_adjoint, self.positive_definite
        return _filter(self.spectrum(params), self.shape, not is_complex(params[0]), *flags)

    def gram(self, params: Params, shift: Array | float | None) -> LinearOperator:
        # AᴴA + ρ is the filter |k̂|² + ρ, which is real.
        k_hat, xp = self.spectrum(params), array_api_compat.array_namespace(params[0])
        power = xp.real(k_hat) ** 2 + xp.imag(k_hat) ** 2
        power = power if shift is None else power + over(shift, len(self.shape))
        return _filter(power, self.shape, not is_complex(params[0]), True, shift is not None)


def _filter(
    spectrum: Array, shape: tuple[int, ...], is_real: bool, self_adjoint: bool, positive_definite: bool
) -> LinearOperator:
    """The multiplication of a spectrum, or of half of it for a real kernel, as a prepared operator."""
    # A real spectrum belongs to a self-adjoint map and needs no conjugate.
    factor = multiplier(spectrum, shape)
    params = (factor, conj(factor)) if is_complex(spectrum) else (factor,)
    of, shapes = shared(_Filter, shape, is_real), (shape, shape)
    return LinearOperator(params, of.apply, of.adjoint, no_params_vjp, *shapes, self_adjoint, positive_definite)


@dataclass(frozen=True, eq=False)
class _Filter(Structure):
    shape: tuple[int, ...]
    is_real: bool

    def apply(self, params: Params, x: Array) -> Array:
        return filtered(x, params[0], self.shape, self.is_real)

    def adjoint(self, params: Params, y: Array) -> Array:
        return filtered(y, params[-1], self.shape, self.is_real)


def _embed(k: Array, small: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The kernel in a grid of zeros, with its centre at the origin and its first half wrapped around."""
    xp = array_api_compat.array_namespace(k)
    for axis in range(-len(shape), 0):
        c, gap = small[axis] // 2, list(k.shape)
        gap[axis] = shape[axis] - small[axis]
        # The centre and what follows it come first, then zeros, then the entries before the centre.
        k = xp.concat([part(k, axis, c, None), full(tuple(gap), 0.0, k), part(k, axis, None, c)], axis=axis)
    return k


def _crop(g: Array, small: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The transpose of `_embed`."""
    xp = array_api_compat.array_namespace(g)
    for axis in range(-len(shape), 0):
        c = small[axis] // 2
        g = xp.concat([part(g, axis, shape[axis] - c, None), part(g, axis, None, small[axis] - c)], axis=axis)
    return g


def _correlation(y_bar: Array, x: Array, k: Array, shape: tuple[int, ...]) -> Array:
    """``Σ_i ȳ_i conj(x_{i − j})`` for all j of the grid, summed over the batch in Fourier space."""
    n = len(shape)
    # Half spectra will do if everything is real.
    if is_complex(k) or is_complex(x) or is_complex(y_bar):
        y_bar, x = as_complex(y_bar), as_complex(x)
    is_real = not is_complex(x)
    # Sum over the batch before the inverse transform, which is linear.
    product = transform(y_bar, n) * conj(transform(x, n))
    like = full((*k.shape[: k.ndim - n], *product.shape[product.ndim - n :]), 0.0, product)
    return inverse(cotangent(product, like), shape, is_real)


@public
def difference(
    shape: tuple[int, ...] | int, /, axis: int | tuple[int, ...] | None = None, *, boundary: str = "periodic"
) -> LinearOperator:
    r"""Finite-difference gradient of a function on a grid, an operator without parameters.

    Parameters
    ----------
    shape : tuple of int
        Shape of the grid.
    axis : int or tuple of int, optional
        Axes of the grid along which differences are taken, each at most once; all by default. For an int the range is
        ``(..., *shape)``, else ``(..., j, *shape)`` with one component for each of the j axes.
    boundary : {"periodic", "replicate", "zero"}
        The value behind the last point: the first point; the last point again, so that the last difference is 0 (no
        flux, Neumann); or 0 (Dirichlet, at that end only, as nothing is assumed in front of the first point).

    Notes
    -----
    ``(D x)_i = x_{i+1} − x_i`` at unit spacing; use `scaled` for another. Its `normal` is the negative Laplacian with
    the same boundary, whose null space consists of the constants for "periodic" and "replicate". Cost: two flops per
    entry and axis.

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
    axes = tuple(i % n - n for i in given)  # counted from the end because batch axes lead
    single = isinstance(axis, int)
    # One axis given as an int adds no axis of components.
    target = sizes if single else (len(axes), *sizes)
    of = shared(_Difference, axes, single, boundary, sizes)
    return LinearOperator((), of.apply, of.adjoint, of.params_vjp, sizes, target, gram=of.gram, **motions(of))


@dataclass(frozen=True, eq=False)
class _Difference(Constant):
    axes: tuple[int, ...]
    single: bool
    boundary: str
    sizes: tuple[int, ...]

    def apply(self, params: Params, x: Array) -> Array:  # noqa: ARG002
        if self.single:
            return forward(x, self.axes[0], self.boundary)
        components = [forward(x, i, self.boundary) for i in self.axes]
        return array_api_compat.array_namespace(x).stack(components, axis=-len(self.sizes) - 1)

    def adjoint(self, params: Params, y: Array) -> Array:  # noqa: ARG002
        if self.single:
            return backward(y, self.axes[0], self.boundary)
        # Dᵀ y is the sum over the components.
        components = [y[(..., j, *(slice(None),) * len(self.sizes))] for j in range(len(self.axes))]
        return sum(backward(y_j, i, self.boundary) for y_j, i in zip(components, self.axes, strict=True))

    def gram(self, params: Params, shift: Array | float | None) -> LinearOperator:
        """``DᵀD + shift`` as a prepared operator, without storing any component of D x."""
        params = (shift,) if is_array(shift) else ()
        of = shared(_Laplacian, self.axes, self.boundary, self.sizes, 0.0 if is_array(shift) else shift or 0.0)
        shapes = self.sizes, self.sizes
        return LinearOperator(params, of.apply, of.apply, no_params_vjp, *shapes, True, shift is not None)


@dataclass(frozen=True, eq=False)
class _Laplacian(Structure):
    axes: tuple[int, ...]
    boundary: str
    shape: tuple[int, ...]
    number: float
    """The shift if it is no parameter."""

    def apply(self, params: Params, x: Array) -> Array:
        shift = over(params[0], len(self.shape)) if params else self.number
        return laplacian(x, self.axes, self.boundary, shift)
