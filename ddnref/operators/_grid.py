"""Operators by Fourier transforms: convolution on a grid and Toeplitz matrices; and forward differences on a grid.

With the kernel of a convolution embedded in the grid, its centre at the origin, and ``k̂``, ``x̂`` the transforms:

    y_i = Σ_j k_j x_{i − (j − c)},  c = ⌊shape(k)/2⌋        ŷ = k̂ ∘ x̂
    AᴴA + ρ                                                 ŷ = (|k̂|² + ρ) ∘ x̂
    k̄_j = Σ_i ȳ_i conj(x_{i − (j − c)})                     k̄ = crop of the inverse transform of ȳ̂ ∘ conj(x̂)

With other borders, and for a Toeplitz matrix, the grid is larger. E extends a vector to it, and C cuts the image out,
so that no point sees one from behind the other end:

    A = C K E        Aᴴ = Eᵀ Kᴴ Cᵀ        k̄ that of K for Cᵀ ȳ and E x
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, as_dtype, conj, full, is_complex, namespace, namespace_of
from ddnref._core.checks import check_precision
from ddnref._kernels.grid import difference as forward
from ddnref._kernels.grid import difference_adjoint as backward
from ddnref._kernels.grid import (
    fast_length,
    filtered,
    inverse,
    multiplier,
    normal_difference,
    part,
    reflected,
    reflected_adjoint,
    transform,
    zero_padded,
)
from ddnref._kernels.public import public
from ddnref._kernels.vectors import alike, as_complex
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
BORDERS = ("periodic", "zero", "reflect")


@public
def convolution(
    kernel: Array,
    shape: tuple[int, ...] | int,
    /,
    *,
    boundary: str = "periodic",
    self_adjoint: bool = False,
    positive_definite: bool = False,
) -> LinearOperator:
    r"""Convolution from ``(..., *shape)`` to the same, on a grid with one to three axes.

    Parameters
    ----------
    kernel : (..., \*kernel_shape) array, real or complex floating
        Behind its batch axes it has as many axes as the grid, none empty or longer than the grid's. Its centre, entry
        ``size // 2`` of each axis, is the origin.
    shape : tuple of int
        Shape of the grid, without empty axes.
    boundary : {"periodic", "zero", "reflect"}
        The points outside of the grid: those of the other end; 0; or the mirror image ``c b a | a b c d | d c b`` of
        those inside, which repeats the last point. These are the modes "wrap", "constant" and "reflect" of
        `scipy.ndimage.convolve`, and "reflect" is "symmetric" in `numpy.pad`.
    self_adjoint, positive_definite : bool, default False
        Properties of the kernel: self-adjoint if ``k_{−j} = conj(k_j)`` around the centre, with a reflecting boundary
        if it is also real and symmetric along each axis; positive definite if its spectrum is positive as well. Its
        gradient treats all entries as free.

    Notes
    -----
    .. math:: y_i = \sum_j k_j\, x_{i - (j - c)}, \qquad \bar k_j = \sum_i \bar y_i\, \overline{x_{i - (j - c)}}

    A product of N points takes two Fourier transforms, N log N flops each, and one more for the spectrum of the kernel,
    which `LinearOperator.prepared` computes once. ``normal(convolution(...), damping)`` multiplies with the real
    ``|k̂|² + ρ`` between one pair of transforms. Real kernels use real transforms. With a zero or reflecting boundary
    the grid of the transforms is larger by about half of the kernel or all of it, and `normal` takes two products.

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
    if boundary not in BORDERS:
        raise ValueError(f"boundary is {boundary!r}, expected one of {', '.join(map(repr, BORDERS))}.")
    small = tuple(kernel.shape[max(0, kernel.ndim - n) :])
    if len(small) != n or any(not 1 <= k <= size for k, size in zip(small, sizes, strict=True)):
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}; expected {n} axes for the grid {sizes}, batch axes in front, "
            "none empty or longer than the grid's. Crop a larger kernel, or sum it over the periods of the grid."
        )
    flags = self_adjoint or positive_definite, positive_definite
    of = shared(_Convolution, small, _window(small, sizes, boundary), *flags)
    return LinearOperator(
        (kernel,), of.apply, of.adjoint, of.params_vjp, sizes, sizes, *flags,
        gram=of.gram if boundary == "periodic" else None, prepare=of.prepare, **motions(of),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Convolution(Linear):
    small: tuple[int, ...]
    window: _Window
    self_adjoint: bool
    positive_definite: bool

    def spectrum(self, params: Params) -> Array:
        grid = self.window.grid
        return transform(_embed(params[0], self.small, grid), len(grid))

    # ŷ = k̂ ∘ x̂, and conj(k̂) for the adjoint
    def apply(self, params: Params, x: Array) -> Array:
        return self.window.apply(x, multiplier(self.spectrum(params), self.window.grid), not is_complex(params[0]))

    def adjoint(self, params: Params, y: Array) -> Array:
        k_hat = conj(self.spectrum(params))
        return self.window.adjoint(y, multiplier(k_hat, self.window.grid), not is_complex(params[0]))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        (k,), window = params, self.window
        bar = _correlation(window.cut_adjoint(y_bar), window.extend(x), k, window.grid)
        return (cotangent(_crop(bar, self.small, window.grid), k),)

    def prepare(self, params: Params) -> LinearOperator:
        flags = self.self_adjoint, self.positive_definite
        return _filter(self.spectrum(params), self.window, not is_complex(params[0]), *flags)

    def gram(self, params: Params, shift: Array | float | None) -> LinearOperator:
        # AᴴA + ρ is the filter |k̂|² + ρ, which is real.
        k_hat, xp = self.spectrum(params), array_api_compat.array_namespace(params[0])
        power = xp.real(k_hat) ** 2 + xp.imag(k_hat) ** 2
        power = power if shift is None else power + over(shift, len(self.window.grid))
        return _filter(power, self.window, not is_complex(params[0]), True, shift is not None)


@public
def toeplitz(column: Array, row: Array | None = None, /, *, positive_definite: bool = False) -> LinearOperator:
    r"""A Toeplitz matrix, whose entries are equal along each diagonal, from ``(..., m)`` to ``(..., n)``.

    Parameters
    ----------
    column : (..., n) array, real or complex floating
        The first column.
    row : (..., m) array, optional
        The first row, of which the first entry is ignored: it is that of `column`. Its gradient there is 0. Default:
        the conjugate of `column`, so that the matrix is Hermitian; of a complex first entry the real part counts.
    positive_definite : bool, default False
        Whether the matrix is known to be positive definite; only without `row`.

    Raises
    ------
    TypeError
        If `column` or `row` is not a floating array, or both differ in library, device or precision.
    ValueError
        If one has no axis or no entry, or with both ``positive_definite=True`` and `row`.

    Notes
    -----
    .. math:: y_i = \sum_j t_{i - j}\, x_j, \qquad \bar t_d = \sum_j \bar y_{j + d}\, \overline{x_j}

    with the column in ``t_0, t_1, …`` and the row in ``t_0, t_{−1}, …``. The matrix is the corner of a circulant one of
    order N, at least ``n + m − 1``. A product takes two Fourier transforms of N points, N log N flops each, and one
    more for the spectrum, which `LinearOperator.prepared` computes once.

    Examples
    --------
    >>> import numpy as np
    >>> t = ddnref.operators.toeplitz(np.asarray([1.0, 2.0]), np.asarray([1.0, 3.0, 4.0]))
    >>> np.round(t.matrix(), 12) + 0
    array([[1., 3., 4.],
           [2., 1., 3.]])
    """
    arrays = {"column": column} if row is None else {"column": column, "row": row}
    check_precision(namespace(**arrays), **arrays)
    for name, x in arrays.items():
        if x.ndim == 0 or x.shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., n) with n at least 1.")
    if positive_definite and row is not None:
        raise ValueError("positive_definite is True, but only a Hermitian matrix can be: leave out row.")
    n = column.shape[-1]
    m = n if row is None else row.shape[-1]
    # The second period of the circulant begins behind both.
    window = _Window((m,), (n,), (fast_length(n + m - 1),), (0,), (0,))
    of = shared(_Toeplitz, window, row is None, positive_definite)
    return LinearOperator(
        tuple(arrays.values()), of.apply, of.adjoint, of.params_vjp, (m,), (n,), row is None, positive_definite,
        prepare=of.prepare, **motions(of),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Toeplitz(Linear):
    window: _Window
    hermitian: bool
    positive_definite: bool

    def circulant(self, params: Params) -> Array:
        """The first column of the circulant matrix: t_0, t_1, …, zeros, …, t_{−2}, t_{−1}."""
        c, r = alike(params[0], conj(params[0]) if self.hermitian else params[1])
        xp, n, m = namespace_of(c), c.shape[-1], r.shape[-1]
        lead = np.broadcast_shapes(tuple(c.shape[:-1]), tuple(r.shape[:-1]))
        c, r = xp.broadcast_to(c, (*lead, n)), xp.broadcast_to(r, (*lead, m))
        if self.hermitian and is_complex(c):
            c = xp.concat([as_dtype(xp.real(c[..., :1]), c), c[..., 1:]], axis=-1)
        gap = full((*lead, self.window.grid[0] - n - m + 1), 0.0, c)
        return xp.concat([c, gap, xp.flip(r[..., 1:], axis=-1)], axis=-1)

    def spectrum(self, params: Params) -> Array:
        return transform(self.circulant(params), 1)

    def apply(self, params: Params, x: Array) -> Array:
        t_hat = self.spectrum(params)
        return self.window.apply(x, multiplier(t_hat, self.window.grid), not any(map(is_complex, params)))

    def adjoint(self, params: Params, y: Array) -> Array:
        t_hat = conj(self.spectrum(params))
        return self.window.adjoint(y, multiplier(t_hat, self.window.grid), not any(map(is_complex, params)))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        window, t = self.window, self.circulant(params)
        xp, (n,), (m,) = namespace_of(t), window.target, window.domain
        t_bar = _correlation(window.cut_adjoint(y_bar), window.extend(x), t, window.grid)
        # The row is stored backwards, behind the gap; its first entry counts as that of the column.
        c_bar, before = t_bar[..., :n], xp.flip(t_bar[..., window.grid[0] - m + 1 :], axis=-1)
        r_bar = xp.concat([full((*t_bar.shape[:-1], 1), 0.0, t_bar), before], axis=-1)
        if not self.hermitian:
            return cotangent(c_bar, params[0]), cotangent(r_bar, params[1])
        if is_complex(t_bar):
            c_bar = xp.concat([as_dtype(xp.real(c_bar[..., :1]), c_bar), c_bar[..., 1:]], axis=-1)
        return (cotangent(c_bar + conj(r_bar), params[0]),)

    def prepare(self, params: Params) -> LinearOperator:
        flags = self.hermitian, self.positive_definite
        return _filter(self.spectrum(params), self.window, not any(map(is_complex, params)), *flags)


# --- filters of a grid that is larger than the vectors --------------------------------------------------------------


class _Window(NamedTuple):
    """The places of vectors and their images in the periodic grid of the Fourier transforms."""

    domain: tuple[int, ...]
    target: tuple[int, ...]
    grid: tuple[int, ...]
    before: tuple[int, ...]
    """How many points in front of a vector are its mirror image, along each axis; it begins behind them."""
    after: tuple[int, ...]
    """How many points behind a vector are its mirror image. All others are zeros."""

    def apply(self, x: Array, factor: Array, is_real: bool) -> Array:
        """``C K E x`` with the multiplier of K."""
        return self.cut(filtered(self.extend(x), factor, self.grid, is_real))

    def adjoint(self, y: Array, factor: Array, is_real: bool) -> Array:
        """``Eᵀ K Cᵀ y`` with the multiplier of K."""
        return self.extend_adjoint(filtered(self.cut_adjoint(y), factor, self.grid, is_real))

    def extend(self, x: Array) -> Array:
        for axis in range(-len(self.grid), 0):
            before, after = self.before[axis], self.after[axis]
            if before + after:
                x = reflected(x, axis, before, after)
            x = zero_padded(x, axis, 0, self.grid[axis] - int(x.shape[axis]))
        return x

    def extend_adjoint(self, y: Array) -> Array:
        for axis in range(-len(self.grid), 0):
            before, after = self.before[axis], self.after[axis]
            y = part(y, axis, 0, before + self.domain[axis] + after)
            if before + after:
                y = reflected_adjoint(y, axis, before, after)
        return y

    def cut(self, y: Array) -> Array:
        for axis in range(-len(self.grid), 0):
            y = part(y, axis, self.before[axis], self.before[axis] + self.target[axis])
        return y

    def cut_adjoint(self, y: Array) -> Array:
        for axis in range(-len(self.grid), 0):
            front = self.before[axis]
            y = zero_padded(y, axis, front, self.grid[axis] - front - self.target[axis])
        return y


def _window(small: tuple[int, ...], sizes: tuple[int, ...], boundary: str) -> _Window:
    """The window of a convolution: y_i needs the points from i − (k − 1 − c) to i + c."""
    if boundary == "periodic":
        return _Window(sizes, sizes, sizes, (0,) * len(sizes), (0,) * len(sizes))
    reach = tuple((k - 1 - k // 2, k // 2) for k in small)
    if boundary == "zero":  # zeros behind are enough, because the grid is periodic
        grid = tuple(fast_length(n + max(both)) for n, both in zip(sizes, reach, strict=True))
        return _Window(sizes, sizes, grid, (0,) * len(sizes), (0,) * len(sizes))
    grid = tuple(fast_length(n + sum(both)) for n, both in zip(sizes, reach, strict=True))
    return _Window(sizes, sizes, grid, *zip(*reach, strict=True))


def _filter(
    spectrum: Array, window: _Window, is_real: bool, self_adjoint: bool, positive_definite: bool
) -> LinearOperator:
    """The multiplication of a spectrum, or of half of it for a real kernel, as a prepared operator."""
    # A real spectrum belongs to a self-adjoint map and needs no conjugate.
    factor = multiplier(spectrum, window.grid)
    params = (factor, conj(factor)) if is_complex(spectrum) else (factor,)
    of, shapes = shared(_Filter, window, is_real), (window.domain, window.target)
    return LinearOperator(params, of.apply, of.adjoint, no_params_vjp, *shapes, self_adjoint, positive_definite)


@dataclass(frozen=True, eq=False)
class _Filter(Structure):
    window: _Window
    is_real: bool

    def apply(self, params: Params, x: Array) -> Array:
        return self.window.apply(x, params[0], self.is_real)

    def adjoint(self, params: Params, y: Array) -> Array:
        return self.window.adjoint(y, params[-1], self.is_real)


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
        of = shared(_NormalDifference, self.axes, self.boundary, self.sizes, 0.0 if is_array(shift) else shift or 0.0)
        shapes = self.sizes, self.sizes
        return LinearOperator(params, of.apply, of.apply, no_params_vjp, *shapes, True, shift is not None)


@dataclass(frozen=True, eq=False)
class _NormalDifference(Structure):
    axes: tuple[int, ...]
    boundary: str
    shape: tuple[int, ...]
    number: float
    """The shift if it is no parameter."""

    def apply(self, params: Params, x: Array) -> Array:
        shift = over(params[0], len(self.shape)) if params else self.number
        return normal_difference(x, self.axes, self.boundary, shift)
