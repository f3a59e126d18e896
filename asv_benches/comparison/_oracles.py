"""High-precision truth: textbook iterations for the values, and their derivatives by complex steps.

No rule for a derivative of an eigenvector, or of any decomposition, is used here. A derivative is the imaginary part of
a value: f(x + i h d) = f(x) + i h f'(x) d + O(h²), with h so small that the last term vanishes. Arrays are
`numpy.longdouble`, with 64 bits of mantissa on x86. Every function also takes object arrays of mpmath numbers, which
the tests use to check the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEP = 1e-30

IS_EXTENDED = bool(np.finfo(np.longdouble).eps < 1e-18)  # on x86 under Linux; elsewhere longdouble may be float64


def derivative(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return the derivative of f at x along a direction, by one complex step."""
    value = f(x + 1j * (STEP * direction))
    return np.asarray(_imaginary(value) / STEP)


def gradient(loss: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return all partial derivatives of a number, one complex step for each."""
    partials = np.empty_like(x)
    for place in np.ndindex(*x.shape):
        unit = np.zeros_like(x)
        unit[place] = 1
        partials[place] = derivative(loss, x, unit)
    return partials


def _imaginary(value: np.ndarray) -> np.ndarray:
    if value.dtype == object:
        return np.vectorize(lambda z: z.imag, otypes=[object])(value)
    return value.imag


# --- linear algebra for any dtype -----------------------------------------------------------------------------------


def identity(m: int, like: np.ndarray) -> np.ndarray:
    return np.eye(m, dtype=like.dtype) if like.dtype != object else np.eye(m, dtype=int).astype(object)


def solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solve a x = b by Gauss–Jordan elimination with partial pivoting."""
    m = len(a)
    work = np.concatenate([a, b.reshape(m, -1)], axis=1)
    for j in range(m):
        pivot = j + int(np.argmax(np.abs(work[j:, j])))
        work[[j, pivot]] = work[[pivot, j]]
        row = work[j] / work[j, j]
        work = work - np.outer(work[:, j], row)
        work[j] = row
    return work[:, m:].reshape(b.shape)


def inverse(a: np.ndarray) -> np.ndarray:
    return solve(a, identity(len(a), a))


# --- functions of a matrix ------------------------------------------------------------------------------------------


def projector_below(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Projector on the eigenvectors of the eigenvalues below a shift: (1 − sign(x − shift)) / 2, sign by Newton."""
    s = x - shift * identity(len(x), x)
    for _ in range(40):
        s = (s + inverse(s)) / 2
    return (identity(len(x), x) - s) / 2


def inverse_root(x: np.ndarray) -> np.ndarray:
    """Inverse square root by the iteration of Denman and Beavers."""
    y, z = x, identity(len(x), x)
    for _ in range(20):
        y, z = (y + inverse(z)) / 2, (z + inverse(y)) / 2
    return z


def logarithm(x: np.ndarray) -> np.ndarray:
    """Logarithm by four square roots and the series of 2 artanh((x − 1)(x + 1)⁻¹)."""
    one = identity(len(x), x)
    for _ in range(4):
        x = x @ inverse_root(x)
    w = (x - one) @ inverse(x + one)
    square, power, total = w @ w, w, w
    for k in range(1, 15):
        power = power @ square
        total = total + power / (2 * k + 1)
    return 32 * total


def gram_gradient(f: Callable[[np.ndarray], np.ndarray], a: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Gradient of tr(Cᵀ A f(AᵀA)): C f(AᵀA) + A (S + Sᵀ), S the derivative of f along AᵀC, symmetrised."""
    gram, along = a.T @ a, a.T @ c
    s = derivative(f, gram, (along + along.T) / 2)
    return c @ f(gram) + a @ (s + s.T)
