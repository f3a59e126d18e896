"""Products for NumPy arrays, in place, held to the standard form by the tests.

Fourier transforms, measured on 256×256 points, float64, one thread, forms interleaved in one process (median of 200,
ms): `rfft2`, product, `irfft2` of NumPy 1.00, of SciPy 0.95; one axis at a time, overwriting, NumPy 0.69, SciPy 0.66;
besides that the normalisation in the factor, and a real factor doubled for the interleaved parts, 0.61. In float32:
1.36, 0.54, 1.19, 0.43, 0.37; NumPy's is not vectorised there. With the shift added to the factor in each product, 0.92.
A batch of 64 grids of 128×128 (best of 15, ms): in chunks of 4 30, all at once 51, one by one 47.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[Any]

CHUNK = 2**16  # numbers in a chunk of a batch of grids, 4 of 128×128: their spectra stay in the second-level cache


def transform(x: Array, n: int) -> Array:
    """The spectrum over the last n axes, half of it for real `x`: a fresh array."""
    z = scipy.fft.fft(x) if x.dtype.kind == "c" else scipy.fft.rfft(x)
    for axis in range(-n, -1):
        z = scipy.fft.fft(z, axis=axis, overwrite_x=True)
    return np.asarray(z)


def multiplier(spectrum: Array, shape: tuple[int, ...]) -> Array:
    """The spectrum over the number of points; a real one with each number twice, for real and imaginary part."""
    spectrum = spectrum * spectrum.real.dtype.type(1 / math.prod(shape))
    return spectrum if spectrum.dtype.kind == "c" else np.repeat(spectrum, 2, axis=-1)


def filtered(x: Array, factor: Array, shape: tuple[int, ...]) -> Array:
    """The grids of a batch in chunks that stay in cache."""
    lead = x.shape[: x.ndim - len(shape)]
    width = max(1, CHUNK * lead[0] // x.size) if lead and x.size else 1
    if x.size <= CHUNK or not lead or width >= lead[0] or factor.ndim > x.ndim:
        return _filtered(x, factor, shape)
    shared = factor.ndim < x.ndim or factor.shape[0] == 1
    if factor.ndim == x.ndim and factor.shape[0] == 1:
        factor = factor[0]
    batch = np.broadcast_shapes(lead, factor.shape[: factor.ndim - len(shape)])
    y = np.empty((*batch, *shape), dtype=x.dtype)
    for i in range(0, lead[0], width):
        part = slice(i, i + width) if width > 1 else i
        y[part] = filtered(x[part], factor if shared else factor[part], shape)
    return y


def _filtered(x: Array, factor: Array, shape: tuple[int, ...]) -> Array:
    n, is_real = len(shape), x.dtype.kind != "c"
    z = transform(x, n)
    parts = z.view(z.real.dtype) if factor.dtype.kind != "c" else z
    fits = parts.shape[max(0, parts.ndim - factor.ndim) :] == factor.shape
    if fits or np.broadcast_shapes(parts.shape, factor.shape) == parts.shape:
        parts *= factor
    else:  # one vector for a batch of factors
        z = np.ascontiguousarray(parts * factor).view(z.dtype)
    for axis in range(-n, -1):
        z = np.asarray(scipy.fft.ifft(z, axis=axis, overwrite_x=True, norm="forward"))
    if is_real:
        return np.asarray(scipy.fft.irfft(z, shape[-1], norm="forward"))
    return np.asarray(scipy.fft.ifft(z, overwrite_x=True, norm="forward"))


def laplacian(x: Array, axes: tuple[int, ...], boundary: str, shift: Any) -> Array:
    """``Σ DᵀD x + shift x`` of forward differences D along `axes`, counted from the end.

    Measured on 256×256 points, float64, one thread: 0.2 to 0.6 of the time of the difference and its adjoint, by the
    state of the allocator (``OperatorsLimit`` of ``asv_benches/benchmarks/operators.py``).
    """
    y = np.asarray((2 * len(axes) + shift) * x)
    for axis in axes:
        u, v = np.moveaxis(y, axis, -1), np.moveaxis(x, axis, -1)
        u[..., 1:] -= v[..., :-1]
        u[..., :-1] -= v[..., 1:]
        if boundary == "periodic":
            u[..., 0] -= v[..., -1]
            u[..., -1] -= v[..., 0]
        else:  # there is no difference in front of the first point
            u[..., 0] -= v[..., 0]
        if boundary == "replicate":  # nor one behind the last
            u[..., -1] -= v[..., -1]
    return y
