"""The patches of images, and the transposed convolution.

PyTorch has both. Elsewhere one slice per position of the kernel cuts the patches out, and the transposed map is a
convolution too: of δ, with ``stride − 1`` zeros between its entries and a margin of zeros, by the kernel turned around.
"""

from __future__ import annotations

import array_api_compat

from ddnref._core.arrays import Array

Pair = tuple[int, int]


def positions(image: tuple[int, ...], kernel: Pair, stride: Pair, margin: Pair) -> Pair:
    """Return the rows and columns of the output for images ``(height, width)``."""
    rows, columns = ((image[i] + 2 * margin[i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
    return rows, columns


def kernels(weight: Array) -> Array:
    """Return kernels ``(..., c_out, c_in, kh, kw)`` as matrices ``(..., 1, c_out, c_in kh kw)``."""
    *lead, c_out, c_in, kh, kw = weight.shape
    return array_api_compat.array_namespace(weight).reshape(weight, (*lead, 1, c_out, c_in * kh * kw))


def patches(x: Array, kernel: Pair, stride: Pair, margin: Pair) -> Array:
    """Return the patches ``(..., c kh kw, positions)`` of images ``(..., c, height, width)`` with margins of zeros."""
    if array_api_compat.is_torch_array(x):
        from ddnref._kernels import torch_convolution

        return torch_convolution.patches(x, kernel, stride, margin)
    (p, q), out = margin, positions(x.shape[-2:], kernel, stride, margin)
    return _cut(_margins(x, (p, p), (q, q)), kernel, stride, out)


def transposed(weight: Array, image: Array, stride: Pair, margin: Pair, size: Pair) -> Array:
    """Return ``Wᵀ δ``, ``(..., c_in, *size)``, for δ ``(..., c_out, rows, columns)``."""
    if array_api_compat.is_torch_array(image):
        from ddnref._kernels import torch_convolution

        return torch_convolution.transposed(kernels(weight), image, tuple(weight.shape[-2:]), stride, margin, size)
    xp = array_api_compat.array_namespace(image)
    kernel = tuple(weight.shape[-2:])
    # The adjoint of striding inserts zeros, the adjoint of padding crops, and the kernel is flipped.
    image = _spread_out(image, stride)
    # Zeros around δ such that each input pixel sees all outputs that it contributed to.
    rows, columns = (
        (k - 1 - p, n + p - image.shape[i]) for i, k, p, n in zip((-2, -1), kernel, margin, size, strict=True)
    )
    around = _cut(_margins(image, rows, columns), kernel, (1, 1), size)
    # Exchange channels of input and output.
    turned = xp.flip(xp.moveaxis(weight, -4, -3), axis=(-2, -1))
    x_bar = kernels(turned) @ around
    return xp.reshape(x_bar, (*x_bar.shape[:-1], *size))


def _cut(x: Array, kernel: Pair, stride: Pair, out: Pair) -> Array:
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
