"""Convolution of images as a product with their patches, which one slice per position of the kernel cuts out.

The transposed map ``Wᵀ δ`` is such a convolution too: of δ, with ``stride − 1`` zeros between its entries and a margin
of zeros, by the kernel turned around.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import array_api_compat

from ddnref._core.arrays import Array
from ddnref.networks._activations import Activation
from ddnref.networks._layers import Affine, AffineSaved
from ddnref.networks._protocol import Shape

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Conv2d(Affine):
    """A two-dimensional convolution (cross-correlation, as in PyTorch) of inputs ``(N, c_in, height, width)``.

    Parameters
    ----------
    weight : (c_out, c_in, kh, kw) array, real floating
    bias : (c_out,) array, optional
    stride : int or pair of ints
        Rows and columns between two positions of the kernel.
    padding : int or pair of ints
        Rows and columns of zeros on each side.
    activation : str or Activation
        As in `Dense`.

    Notes
    -----
    Arguments that do not fit raise as in `Dense`. The patches ``(N, c_in kh kw, positions)`` are stored: kh kw times
    the input, over the product of the strides.

    Examples
    --------
    >>> import numpy as np
    >>> edges = ddnref.networks.Conv2d(np.asarray([[[[-1.0, 1.0]]]]))
    >>> image = np.asarray([[[[0.0, 0.0, 1.0]]]])
    >>> ddnref.networks.Chain([edges, ddnref.networks.Flatten()], "mse").output(image)
    array([[0., 1.]])
    """

    weight: Array
    bias: Array | None = None
    stride: int | Pair = 1
    padding: int | Pair = 0
    activation: str | Activation = "identity"
    phi: Activation = field(init=False, repr=False)
    step: Pair = field(init=False, repr=False)
    margin: Pair = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.check(4, "(c_out, c_in, kh, kw)")
        object.__setattr__(self, "step", _pair("stride", self.stride, 1))
        object.__setattr__(self, "margin", _pair("padding", self.padding, 0))

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return ``(c_out, rows, columns)``."""
        # Without an image the number of positions is not known.
        if shape is None:
            return None
        c_in, kernel = self.weight.shape[1], tuple(self.weight.shape[2:])
        if len(shape) != 3 or shape[0] != c_in:
            raise ValueError(f"it takes samples of shape ({c_in}, height, width), but they come with shape {shape}.")
        out = self.positions(shape)
        if min(out) < 1:
            raise ValueError(f"its kernel {kernel} is larger than the image {shape[1:]} with padding {self.margin}.")
        return (self.weight.shape[0], *out)

    def positions(self, shape: Shape) -> Pair:
        """Return the rows and columns of the output for an input ``(..., height, width)``."""
        p, s, k = self.margin, self.step, self.weight.shape[2:]
        rows, columns = ((shape[i - 2] + 2 * p[i] - k[i]) // s[i] + 1 for i in (0, 1))
        return rows, columns

    def lift(self, x: Array, ndim: int) -> Array:
        """Return the patches ``(..., N, c_in kh kw, positions)``."""
        # One column of u per position of the kernel.
        (p, q), out = self.margin, self.positions(x.shape)
        return _patches(_margins(x, (p, p), (q, q)), tuple(self.weight.shape[2:]), self.step, out)

    def linear(self, weight: Array, u: Array) -> Array:
        """Return ``W u`` with the kernels as rows."""
        return _kernels(weight) @ u

    def linear_x(self, weight: Array, delta: Array, saved: AffineSaved) -> Array:
        """Convolve δ, spread out by the stride, with the flipped kernel."""
        xp = array_api_compat.array_namespace(delta)
        size, (kh, kw) = saved.x.shape[-2:], tuple(weight.shape[-2:])
        # The adjoint of striding inserts zeros, the adjoint of padding crops, and the kernel is flipped.
        image = _spread_out(self.shaped(delta, saved.x), self.step)
        # Zeros around δ such that each input pixel sees all outputs that it contributed to.
        margins = [
            (k - 1 - p, n + p - image.shape[i])
            for i, k, p, n in zip((-2, -1), (kh, kw), self.margin, size, strict=True)
        ]
        patches = _patches(_margins(image, *margins), (kh, kw), (1, 1), tuple(size))
        # Exchange channels of input and output.
        turned = xp.flip(xp.moveaxis(weight, -4, -3), axis=(-2, -1))
        x_bar = _kernels(turned) @ patches
        return xp.reshape(x_bar, (*x_bar.shape[:-1], *size))

    def linear_w(self, delta: Array, u: Array, per_sample: bool = False) -> Array:
        """Return ``Σ_positions δ uᵀ``, summed over the samples unless `per_sample`."""
        xp = array_api_compat.array_namespace(u)
        # The sum over positions is a matrix product; that over the samples joins it where axes allow.
        if per_sample:
            w_bar = delta @ xp.matrix_transpose(u)
        elif u.ndim == 3:
            w_bar = xp.tensordot(delta, u, axes=((delta.ndim - 3, delta.ndim - 1), (0, 2)))
        else:
            w_bar = xp.sum(delta @ xp.matrix_transpose(u), axis=-3)
        return xp.reshape(w_bar, (*w_bar.shape[:-1], *self.weight.shape[1:]))

    def linear_b(self, delta: Array, per_sample: bool = False) -> Array:
        """Return ``Σ_positions δ``, summed over the samples unless `per_sample`."""
        xp = array_api_compat.array_namespace(delta)
        return xp.sum(delta, axis=-1 if per_sample else (-3, -1))

    def spread(self, bias: Array) -> Array:
        """Return one number for each output channel."""
        return bias[..., None, :, None]

    def shaped(self, s: Array, saved_x: Array) -> Array:
        """Reshape positions to rows and columns."""
        return array_api_compat.array_namespace(s).reshape(s, (*s.shape[:-1], *self.positions(saved_x.shape)))

    def flat(self, y_bar: Array) -> Array:
        """Reshape rows and columns to positions."""
        xp = array_api_compat.array_namespace(y_bar)
        return xp.reshape(y_bar, (*y_bar.shape[:-2], y_bar.shape[-2] * y_bar.shape[-1]))


def _kernels(weight: Array) -> Array:
    """Return kernels ``(..., c_out, c_in, kh, kw)`` as matrices ``(..., 1, c_out, c_in kh kw)``."""
    *lead, c_out, c_in, kh, kw = weight.shape
    return array_api_compat.array_namespace(weight).reshape(weight, (*lead, 1, c_out, c_in * kh * kw))


def _patches(x: Array, kernel: Pair, stride: Pair, out: Pair) -> Array:
    """Return the patches ``(..., c kh kw, positions)`` of images ``(..., c, height, width)``."""
    xp = array_api_compat.array_namespace(x)
    (rows, columns), (s, t) = out, stride
    # Each position of the kernel sees one strided slice of the image.
    slices = [
        x[..., i : i + (rows - 1) * s + 1 : s, j : j + (columns - 1) * t + 1 : t]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    patches = xp.stack(slices, axis=-3)
    return xp.reshape(patches, (*x.shape[:-3], x.shape[-3] * len(slices), rows * columns))


def _margins(x: Array, rows: Pair, columns: Pair) -> Array:
    """Add zeros before and after images; a negative number crops."""
    for axis, (before, after) in ((x.ndim - 2, rows), (x.ndim - 1, columns)):
        n = x.shape[axis]
        # Crop where the number is negative, then add zeros.
        keep = slice(max(-before, 0), n - max(-after, 0))
        x = x[..., keep, :] if axis == x.ndim - 2 else x[..., keep]
        x = _with_zeros(x, max(before, 0), max(after, 0), axis)
    return x


def _with_zeros(x: Array, before: int, after: int, axis: int) -> Array:
    xp, device = array_api_compat.array_namespace(x), array_api_compat.device(x)
    shapes = ((*x.shape[:axis], count, *x.shape[axis + 1 :]) for count in (before, after))
    first, last = (xp.zeros(shape, dtype=x.dtype, device=device) for shape in shapes)
    return xp.concat([first, x, last], axis=axis) if before or after else x


def _spread_out(x: Array, stride: Pair) -> Array:
    """Insert ``stride − 1`` zeros between neighbouring entries of images."""
    xp = array_api_compat.array_namespace(x)
    for back, s in ((2, stride[0]), (1, stride[1])):
        if s > 1:
            axis = x.ndim - back
            n = x.shape[axis]
            # Append zeros behind each entry along a new axis, merge the axes, and cut the last ones.
            apart = _with_zeros(xp.expand_dims(x, axis=axis + 1), 0, s - 1, axis + 1)
            x = xp.reshape(apart, (*x.shape[:axis], n * s, *x.shape[axis + 1 :]))
            x = x[..., : (n - 1) * s + 1, :] if back == 2 else x[..., : (n - 1) * s + 1]
    return x


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 2 and all(isinstance(z, int) and z >= least for z in pair):
        return pair
    raise ValueError(f"{name} is {value!r}, expected an int of at least {least}, or a pair of them.")
