"""Problems to check a rule on: inputs, a loss that has a gradient there (no gauge), and the scale of change.

Each generator is called as ``sample(convert, rng, batch, m, is_complex)``, with `convert` from NumPy to the library
in question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, Namespace

Convert = Callable[[Any], Array]
Loss = tuple[Callable[..., Array], Callable[..., Any]]


class Sample(NamedTuple):
    """One random problem for a rule."""

    inputs: tuple[Array, ...]
    options: dict[str, Any]
    loss: Loss | None
    gap: float
    condition: float
    """``‖A‖ / gap``: float32 may differ from float64 by 20·eps times this."""


def random_spectrum(rng: np.random.Generator, batch: tuple[int, ...], spectrum: Any, is_complex: bool = False) -> Any:
    """A random Hermitian matrix with the given eigenvalues, its eigenvectors uniformly distributed."""
    w = np.asarray(spectrum, dtype=np.float64)
    shape = (*batch, w.shape[-1], w.shape[-1])
    z = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)
    q, _ = np.linalg.qr(z)
    x = (q * w[..., None, :]) @ np.conj(np.swapaxes(q, -1, -2))
    return (x + np.conj(np.swapaxes(x, -1, -2))) / 2


def eigen_loss(convert: Convert, rng: np.random.Generator, shape: tuple[int, ...], k: int, is_complex: bool) -> Loss:
    """``Σ c_i λ_i + Re Σ (a_iᴴ y_i)(y_iᴴ b_i)``: every first-order loss of simple eigenpairs, free of gauge."""

    def draw() -> Array:
        z = rng.standard_normal((*shape, k))
        return convert(z + 1j * rng.standard_normal(z.shape) if is_complex else z)

    a, b, c = draw(), draw(), convert(rng.standard_normal((*shape[:-1], k)))

    def parts(v: Array) -> tuple[Namespace, Array, Array]:
        xp = array_api_compat.array_namespace(v)
        conj = xp.conj if is_complex else (lambda z: z)
        return xp, xp.sum(conj(a) * v, axis=-2, keepdims=True), xp.sum(conj(v) * b, axis=-2, keepdims=True)

    def value(w: Array, v: Array) -> Array:
        xp, alpha, beta = parts(v)
        product = alpha * beta
        return xp.sum(c * w) + xp.sum(xp.real(product) if is_complex else product)

    def gradient(w: Array, v: Array) -> tuple[Array, Array]:  # noqa: ARG001
        xp, alpha, beta = parts(v)
        return c, a * (xp.conj(beta) if is_complex else beta) + b * alpha

    return value, gradient


def eigh(
    convert: Convert, rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool, k: int = 0
) -> Sample:
    """Eigenvalues 0.05 to 0.15 apart, on both sides of zero."""
    gaps = rng.uniform(0.05, 0.15, (*batch, m))
    w = np.cumsum(gaps, axis=-1) - 0.05 * m
    x = convert(random_spectrum(rng, batch, w, is_complex))
    size = float(np.max(np.abs(w))) if w.size else 1.0
    loss = eigen_loss(convert, rng, (*batch, m), k or m, is_complex)
    return Sample((x,), {"k": k} if k else {}, loss, 0.05, size / 0.05)


def eigh_topk(convert: Convert, rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool) -> Sample:
    """The same for the largest third of them."""
    return eigh(convert, rng, batch, m, is_complex, k=max(1, m // 3))


def eigsh(convert: Convert, rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool) -> Sample:
    """Large enough ones for the iteration, which small matrices leave no room for."""
    sample = eigh(convert, rng, batch, m, is_complex, k=max(1, m // 6))
    options: dict[str, Any] = {"method": "iterative", "basis": m // 2 + 3} if m >= 12 else {}
    if is_double(sample.inputs[0]):
        options["rtol"] = 1e-14
    return sample._replace(options={**sample.options, **options})


def is_double(x: Array) -> bool:
    """Whether the dtype has double precision, by its name: the library may be any."""
    return str(x.dtype).rpartition(".")[2] in ("float64", "complex128")


def spectral(
    convert: Convert,
    rng: np.random.Generator,
    batch: tuple[int, ...],
    m: int,
    is_complex: bool,
    **options: Any,
) -> Sample:
    """Positive definite, with a triple eigenvalue where there is room: degeneracy is no obstacle here."""
    w = rng.uniform(0.5, 2.0, (*batch, m))
    w[..., 1 : min(3, m - 1)] = w[..., :1]
    return Sample((convert(random_spectrum(rng, batch, w, is_complex)),), options, None, 0.5, 40.0)


def square(w: Array) -> Array:
    """``f(λ) = λ²``."""
    return w * w


def twice(w: Array) -> Array:
    """Its derivative, ``2 λ``."""
    return 2 * w


def power_iteration(
    convert: Convert,
    rng: np.random.Generator,
    batch: tuple[int, ...],
    m: int,
    is_complex: bool,  # noqa: ARG001
    n: int = 0,
) -> Sample:
    """A matrix that is not symmetric, its dominant eigenvalue negative and well ahead, its eigenvectors not skew."""
    k = n or 1
    w = np.concatenate([[-2.0, 1.5, -1.1][: min(k, m)], rng.uniform(-0.4, 0.4, max(0, m - k))])
    basis = np.linalg.qr(rng.standard_normal((*batch, m, m)))[0] + 0.1 * rng.standard_normal((*batch, m, m)) / m**0.5
    x = convert((basis * w) @ np.linalg.inv(basis))
    options = {"maxiter": 200, **({"n": n} if n else {})}
    return Sample((x,), options, None, 0.3, 2.0 / 0.3)


def simultaneous_iteration(
    convert: Convert, rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool
) -> Sample:
    """The same, the three largest well ahead of the others."""
    return power_iteration(convert, rng, batch, m, is_complex, n=min(m, 3))


def tall(convert: Convert, rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool) -> Sample:
    """Orthogonal columns of length 1, slightly disturbed."""
    n = max(1, m // 2)
    z = (
        rng.standard_normal((*batch, m, n, 2)) @ np.asarray([1.0, 1j])
        if is_complex
        else rng.standard_normal((*batch, m, n))
    )
    a = np.linalg.qr(z)[0] + 0.1 * z / m**0.5
    return Sample((convert(a),), {}, None, 0.3, 3.0)


def gram_eigh(convert: Convert, rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool) -> Sample:
    """A tall factor whose squared singular values lie a tenth apart, and the leading half of them."""
    n = max(1, m // 2)
    k = (n + 1) // 2

    def orthonormal(rows: int) -> Any:
        z = rng.standard_normal((*batch, rows, n, 2))
        return np.linalg.qr(z @ np.asarray([1.0, 1j]) if is_complex else z[..., 0])[0]

    sigma = np.sqrt(1 + 0.1 * np.arange(n))
    v = (orthonormal(m) * sigma) @ np.conj(np.swapaxes(orthonormal(n), -1, -2))
    return Sample(
        (convert(v),), {"k": k}, eigen_loss(convert, rng, (*batch, m), k, is_complex), 0.1, (1 + 0.1 * n) / 0.1
    )


def gram_eigvalsh(
    convert: Convert, rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool
) -> Sample:
    """The same, for a loss of all eigenvalues."""
    return gram_eigh(convert, rng, batch, m, is_complex)._replace(options={}, loss=None)
