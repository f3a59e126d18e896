"""Fourier transforms over the last axes of a grid: SciPy's in place for NumPy, the standard's elsewhere.

Real arrays have half a spectrum. The *multiplier* of a spectrum is what `filtered` multiplies with; on NumPy it holds
the normalisation as well.
"""

from __future__ import annotations

import array_api_compat

from ddnref._core.arrays import Array, is_complex
from ddnref.operators import _numpy
from ddnref.operators._operator import as_complex, zeros


def transform(x: Array, n: int) -> Array:
    """The spectrum over the last n axes; half of it for real `x`."""
    if array_api_compat.is_numpy_array(x):
        return _numpy.transform(x, n)
    xp = array_api_compat.array_namespace(x)
    axes = tuple(range(-n, 0))
    if 0 in x.shape:  # an empty batch, which PyTorch's transforms refuse
        points = x.shape[-1] if is_complex(x) else x.shape[-1] // 2 + 1
        return as_complex(zeros((*x.shape[:-1], points), x))
    return xp.fft.fftn(x, axes=axes) if is_complex(x) else xp.fft.rfftn(x, axes=axes)


def inverse(z: Array, shape: tuple[int, ...], is_real: bool) -> Array:
    """From a spectrum, half of one if the result is real, to the grid."""
    xp = array_api_compat.array_namespace(z)
    axes = tuple(range(-len(shape), 0))
    if 0 in z.shape:
        return zeros((*z.shape[: z.ndim - len(shape)], *shape), xp.real(z) if is_real else z)
    return xp.fft.irfftn(z, s=shape, axes=axes) if is_real else xp.fft.ifftn(z, axes=axes)


def multiplier(spectrum: Array, shape: tuple[int, ...]) -> Array:
    """What `filtered` multiplies with."""
    return _numpy.multiplier(spectrum, shape) if array_api_compat.is_numpy_array(spectrum) else spectrum


def filtered(x: Array, factor: Array, shape: tuple[int, ...], is_real: bool) -> Array:
    """Vectors on a grid with their spectrum multiplied; `is_real`: the factor is half the spectrum of a real map."""
    is_numpy = array_api_compat.is_numpy_array(x)
    if is_numpy and is_real == (x.dtype.kind == "f"):  # the common case, before any look-up
        return _numpy.filtered(x, factor, shape)
    xp = array_api_compat.array_namespace(x)
    if is_real and is_complex(x):  # two real transforms cost what one complex does
        parts = filtered(xp.stack([xp.real(x), xp.imag(x)]), factor, shape, True)
        return xp.astype(parts[0, ...], x.dtype) + xp.astype(parts[1, ...], x.dtype) * 1j
    if not is_real and not is_complex(x):
        x = as_complex(x)
    return _numpy.filtered(x, factor, shape) if is_numpy else inverse(transform(x, len(shape)) * factor, shape, is_real)
