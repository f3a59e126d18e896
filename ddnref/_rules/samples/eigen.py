"""Random matrices with known spectra, and tall factors."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddnref._core.arrays import Array, conj, namespace_of, real
from ddnref._rules.samples import (
    Batch,
    Convert,
    Loss,
    Sample,
    eigen_loss,
    is_double,
    normal,
    random_spectrum,
    with_singular_values,
)


def eigh(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool, k: int = 0) -> Sample:
    """Eigenvalues 0.05 to 0.15 apart, on both sides of zero."""
    # Shifted so that both signs occur.
    gaps = rng.uniform(0.05, 0.15, (*batch, m))
    w = np.cumsum(gaps, axis=-1) - 0.05 * m
    x = convert(random_spectrum(rng, batch, w, is_complex))
    size = float(np.max(np.abs(w))) if w.size else 1.0
    loss = eigen_loss(convert, rng, (*batch, m), k or m, is_complex)
    return Sample((x,), {"k": k} if k else {}, loss, 0.05, size / 0.05)


def eigh_generalized(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The problem of `eigh` in the inner product of a matrix with eigenvalues between 1 and 2."""
    sample = eigh(np.asarray, rng, batch, m, is_complex)
    b = random_spectrum(rng, batch, rng.uniform(1, 2, (*batch, m)), is_complex)
    factor = np.linalg.cholesky(b)
    a = factor @ sample.inputs[0] @ np.conj(np.swapaxes(factor, -1, -2))
    a = (a + np.conj(np.swapaxes(a, -1, -2))) / 2
    loss = eigen_loss(convert, rng, (*batch, m), m, is_complex)
    return sample._replace(inputs=(convert(a), convert(b)), loss=loss, condition=2 * sample.condition)


def eigh_topk(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The problem of `eigh`, for the largest third of the eigenpairs."""
    return eigh(convert, rng, batch, m, is_complex, k=max(1, m // 3))


def eigsh(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The problem of `eigh` for a sixth of the eigenpairs; small matrices leave the iteration no room."""
    sample = eigh(convert, rng, batch, m, is_complex, k=max(1, m // 6))
    options: dict[str, Any] = {"method": "iterative", "basis": m // 2 + 3} if m >= 12 else {}
    # Finite differences compare in double precision, and need eigenpairs as exact as they get.
    if is_double(sample.inputs[0]):
        options["rtol"] = 1e-14
    return sample._replace(options={**sample.options, **options})


def eigsh_generalized(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The problem of `eigh_generalized` for a sixth of the eigenpairs, the smallest, next to a shift below all."""
    sample, k = eigh_generalized(convert, rng, batch, m, is_complex), max(1, m // 6)
    loss = eigen_loss(convert, rng, (*batch, m), k, is_complex)
    options: dict[str, Any] = {"k": k, "sigma": -0.05 * (m + 1), "which": "LA"}
    if m >= 12:
        options |= {"method": "iterative", "basis": m // 2 + 3}
    if is_double(sample.inputs[0]):
        options["rtol"] = 1e-14
    # Most gaps are twice the smallest one, and longer steps measure less of the rounding of the pencil.
    return sample._replace(options=options, loss=loss, gap=1.5 * sample.gap)


def spectral(
    convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool, **options: Any
) -> Sample:
    """Positive definite, with a triple eigenvalue where there is room, because degeneracy is no obstacle here."""
    w = rng.uniform(0.5, 2.0, (*batch, m))
    # Entries 1 and 2 equal entry 0.
    w[..., 1 : min(3, m - 1)] = w[..., :1]
    return Sample((convert(random_spectrum(rng, batch, w, is_complex)),), options, None, 0.5, 40.0)


def square(w: Array) -> Array:
    """``f(λ) = λ²``."""
    return w * w


def twice(w: Array) -> Array:
    """The derivative of `square`, ``f'(λ) = 2 λ``."""
    return 2 * w


def power_iteration(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, _: bool, n: int = 0) -> Sample:
    """A matrix that is not symmetric, its dominant eigenvalue negative and well ahead."""
    k = n or 1
    w = np.concatenate([[-2.0, 1.5, -1.1][: min(k, m)], rng.uniform(-0.4, 0.4, max(0, m - k))])
    # Eigenvectors near those of a rotation are well conditioned.
    basis = np.linalg.qr(rng.standard_normal((*batch, m, m)))[0] + 0.1 * rng.standard_normal((*batch, m, m)) / m**0.5
    x = convert((basis * w) @ np.linalg.inv(basis))
    options = {"maxiter": 200, **({"n": n} if n else {})}
    return Sample((x,), options, None, 0.3, 2.0 / 0.3)


def simultaneous_iteration(
    convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool
) -> Sample:
    """The matrix of `power_iteration`, its three largest eigenvalues well ahead of the others."""
    return power_iteration(convert, rng, batch, m, is_complex, n=min(m, 3))


def tall(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """Orthogonal columns of length 1, slightly disturbed."""
    n = max(1, m // 2)
    # An orthonormal basis, and a tenth of the matrix that it came from.
    z = normal(rng, (*batch, m, n), is_complex)
    a = np.linalg.qr(z)[0] + 0.1 * z / m**0.5
    return Sample((convert(a),), {}, None, 0.3, 3.0)


def gram_eigh(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A tall factor whose squared singular values lie a tenth apart, and the leading half of them."""
    n = max(1, m // 2)
    k = (n + 1) // 2
    v = with_singular_values(rng, batch, m, n, np.sqrt(1 + 0.1 * np.arange(n)), is_complex)
    return Sample(
        (convert(v),), {"k": k}, eigen_loss(convert, rng, (*batch, m), k, is_complex), 0.1, (1 + 0.1 * n) / 0.1
    )


def gram_eigvalsh(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The factor of `gram_eigh`, for a loss of all eigenvalues."""
    return gram_eigh(convert, rng, batch, m, is_complex)._replace(options={}, loss=None)


def svdvals(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A tall matrix whose singular values lie at least a tenth apart."""
    n = max(1, m // 2)
    a = with_singular_values(rng, batch, m, n, 1 + 0.1 * np.arange(n), is_complex)
    return Sample((convert(a),), {}, None, 0.1, (1 + 0.1 * n) / 0.1)


def svd(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool, k: int = 0) -> Sample:
    """Singular values a tenth apart; tall for odd m, wide for even m."""
    count = max(1, 2 * m // 3)
    rows, columns = (m, count) if m % 2 else (count, m)
    x = with_singular_values(rng, batch, rows, columns, 1 + 0.1 * np.arange(count), is_complex)
    loss = triple_loss(convert, rng, batch, rows, columns, k or count, is_complex)
    return Sample((convert(x),), {"k": k} if k else {}, loss, 0.1, (1 + 0.1 * count) / 0.1)


def svd_topk(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """The problem of `svd`, for the larger half of the triples."""
    return svd(convert, rng, batch, m, is_complex, k=max(1, m // 3))


def triple_loss(
    convert: Convert, rng: np.random.Generator, batch: Batch, m: int, n: int, k: int, is_complex: bool
) -> Loss:
    """``Σ c_i s_i + Re Σ ((a_iᴴ u_i)(u_iᴴ b_i) + (d_iᴴ v_i)(v_iᴴ e_i) + (f_iᴴ u_i)(v_iᴴ g_i))``, free of gauge."""
    a, b, f = (convert(normal(rng, (*batch, m, k), is_complex)) for _ in range(3))
    d, e, g = (convert(normal(rng, (*batch, k, n), is_complex)) for _ in range(3))
    c = convert(rng.standard_normal((*batch, k)))

    def parts(u: Array, vh: Array) -> tuple[Array, ...]:
        xp = namespace_of(u)
        of_u = (xp.sum(conj(z) * u, axis=-2, keepdims=True) for z in (a, b, f))
        of_v = (xp.matrix_transpose(xp.sum(vh * z, axis=-1, keepdims=True)) for z in (d, e, g))
        return *of_u, *of_v

    def value(u: Array, s: Array, vh: Array) -> Array:
        xp = namespace_of(u)
        ua, ub, uf, vd, ve, vg = parts(u, vh)
        return xp.sum(c * s) + xp.sum(real(ua * conj(ub) + conj(vd) * ve + uf * vg))

    def gradient(u: Array, s: Array, vh: Array) -> tuple[Array, Array, Array]:  # noqa: ARG001
        ua, ub, uf, vd, ve, vg = parts(u, vh)
        t = namespace_of(u).matrix_transpose
        u_bar = a * ub + b * ua + f * conj(vg)
        return u_bar, c, conj(e) * t(vd) + conj(d) * t(ve) + conj(g) * t(conj(uf))

    return value, gradient


def polar(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A tall matrix, with a triple singular value where there is room, because degeneracy is no obstacle here."""
    n = (m + 1) // 2
    s = rng.uniform(0.5, 2.0, (*batch, n))
    s[..., 1 : min(3, n - 1)] = s[..., :1]
    x = with_singular_values(rng, batch, m, n, s, is_complex)
    return Sample((convert(x),), {}, None, 0.5, 40.0)


def svds(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A wide matrix whose singular values lie a tenth apart, and the leading third of its triples."""
    n = (m + 1) // 2
    a = with_singular_values(rng, batch, n, m, 1 + 0.1 * np.arange(n), is_complex)
    k = max(1, n // 3)
    loss = triple_loss(convert, rng, batch, n, m, k, is_complex)
    options: dict[str, Any] = {"k": k}
    if m + n >= 16:
        options |= {"method": "iterative", "basis": (m + n) // 2 + 3}
    x = convert(a)
    if is_double(x):
        options["rtol"] = 1e-14
    return Sample((x,), options, loss, 0.1, (1 + 0.1 * n) / 0.1)
