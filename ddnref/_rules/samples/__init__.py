"""Problems on which a rule is checked: inputs, a loss that has a gradient there (no gauge), and the scale of change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddnref._core.arrays import Array, conj, namespace_of, real

Batch = tuple[int, ...]
Convert = Callable[[Any], Array]
Loss = tuple[Callable[..., Array], Callable[..., Any]]  # of the outputs: its value, its gradient


class Sample(NamedTuple):
    """One random problem for a rule."""

    inputs: tuple[Array, ...]
    options: dict[str, Any]
    loss: Loss | None  # None where every loss of the outputs has a gradient
    gap: float  # the distance in which the derivative changes, which bounds steps of finite differences
    condition: float  # ‖A‖ / gap: float32 may differ from float64 by 20 eps times this


class Trial(NamedTuple):
    """The record by which tests, ``ddnref verify`` and benchmarks try an operation."""

    sample: Callable[[Convert, np.random.Generator, Batch, int, bool], Sample]
    """``sample(convert, rng, batch, m, is_complex)``, with `convert` from NumPy to the library in question."""
    tangent: str | tuple[str, ...] = "dense"
    """The set in which the inputs may move, as in `ddnref.testing`; a tuple has one for each."""
    symmetrises: bool = False
    is_complex: bool = True
    """Whether complex input is taken."""
    products: Callable[[int, int], float] | None = None
    """Number of products of m×m matrices (2 m³ flops if real) of a VJP that consists of them, for k columns."""


def normal(rng: np.random.Generator, shape: tuple[int, ...], is_complex: bool) -> Any:
    """Standard normal numbers, with as large an imaginary part where they are complex."""
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def random_spectrum(rng: np.random.Generator, batch: tuple[int, ...], spectrum: Any, is_complex: bool = False) -> Any:
    """A random Hermitian matrix with the given eigenvalues, its eigenvectors uniformly distributed."""
    w = np.asarray(spectrum, dtype=np.float64)
    q, _ = np.linalg.qr(normal(rng, (*batch, w.shape[-1], w.shape[-1]), is_complex))
    # Symmetric up to rounding, and then exactly.
    x = (q * w[..., None, :]) @ np.conj(np.swapaxes(q, -1, -2))
    return (x + np.conj(np.swapaxes(x, -1, -2))) / 2


def with_singular_values(
    rng: np.random.Generator, batch: Batch, m: int, n: int, values: Any, is_complex: bool = False
) -> Any:
    """A random m×n matrix with the given singular values, at most ``min(m, n)``."""
    s = np.asarray(values)
    left, right = (np.linalg.qr(normal(rng, (*batch, side, s.shape[-1]), is_complex))[0] for side in (m, n))
    return (left * s[..., None, :]) @ np.conj(np.swapaxes(right, -1, -2))


def eigen_loss(convert: Convert, rng: np.random.Generator, shape: tuple[int, ...], k: int, is_complex: bool) -> Loss:
    """``Σ c_i λ_i + Re Σ (a_iᴴ y_i)(y_iᴴ b_i)``: every first-order loss of simple eigenpairs, free of gauge."""
    a, b = (convert(normal(rng, (*shape, k), is_complex)) for _ in range(2))
    c = convert(rng.standard_normal((*shape[:-1], k)))

    def parts(v: Array) -> tuple[Array, Array]:
        xp = namespace_of(v)
        return xp.sum(conj(a) * v, axis=-2, keepdims=True), xp.sum(conj(v) * b, axis=-2, keepdims=True)

    def value(w: Array, v: Array) -> Array:
        xp, (alpha, beta) = namespace_of(v), parts(v)
        return xp.sum(c * w) + xp.sum(real(alpha * beta))

    def gradient(w: Array, v: Array) -> tuple[Array, Array]:  # noqa: ARG001
        alpha, beta = parts(v)
        return c, a * conj(beta) + b * alpha

    return value, gradient


def is_double(x: Array) -> bool:
    """Whether the dtype has double precision, judged by its name because the library may be any."""
    return str(x.dtype).rpartition(".")[2] in ("float64", "complex128")
