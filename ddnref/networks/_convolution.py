"""Convolution of images as a product with their patches."""

from __future__ import annotations

from dataclasses import dataclass, field

import array_api_compat

from ddnref._core.arrays import Array
from ddnref._kernels.convolution import Pair, kernels, patches, positions, transposed
from ddnref.networks._activations import Activation
from ddnref.networks._layers import Affine, AffineSaved
from ddnref.networks._protocol import Shape


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
        return positions(tuple(shape[-2:]), tuple(self.weight.shape[2:]), self.step, self.margin)

    def lift(self, x: Array, ndim: int) -> Array:
        """Return the patches ``(..., N, c_in kh kw, positions)``."""
        return patches(x, tuple(self.weight.shape[2:]), self.step, self.margin)

    def linear(self, weight: Array, u: Array) -> Array:
        """Return ``W u`` with the kernels as rows."""
        return kernels(weight) @ u

    def linear_x(self, weight: Array, delta: Array, saved: AffineSaved) -> Array:
        """Return the transposed convolution of δ."""
        return transposed(weight, self.shaped(delta, saved.x), self.step, self.margin, tuple(saved.x.shape[-2:]))

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


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 2 and all(isinstance(z, int) and z >= least for z in pair):
        return pair
    raise ValueError(f"{name} is {value!r}, expected an int of at least {least}, or a pair of them.")
