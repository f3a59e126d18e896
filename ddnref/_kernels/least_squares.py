"""Least squares by factors of a tall matrix: QR, or on NumPy Cholesky factors where these lose nothing.

Both solve systems with BᵀB, and refine the solution by its residual. Cholesky factors of BᵀB take half the time of QR
where B has many rows and columns, but their error is that of a condition squared. Refinement removes it only where that
square leaves digits to begin with, which a traced program cannot ask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array
from ddnref._kernels import dense, singularity
from ddnref._kernels.compiled import compiled
from ddnref._kernels.lu import rcond_of_triangle, solve_triangular

CHOLESKY = 1e3
"""Cholesky factors are used where ``rcond(B)² > 1e3 eps``: two steps of refinement then leave a relative error of 1e-9
(float32: 1e-7) of what the condition makes of rounding."""


class Factors(NamedTuple):
    """The triangle of ``BᵀB = RᵀR``, with Q of ``B = Q R`` or, for Cholesky factors, with R⁻¹."""

    r: Array
    q: Array | None
    inverse: Array | None


def replaced(out: Array, a: Array) -> Array:
    """Return matrices (..., m, n) with those that are `out` replaced: where m > n, their columns are independent."""
    if array_api_compat.is_numpy_array(a) and not out.any():
        return a  # without a pass over memory
    xp, (m, n) = array_api_compat.array_namespace(a), a.shape[-2:]
    i, j = (xp.arange(k, device=array_api_compat.device(a)) for k in (m, n))
    return xp.where(out[..., None, None], xp.broadcast_to(xp.astype(i[:, None] == j, a.dtype), a.shape), a)


@compiled
def factor(b: Array, border: Array | None) -> tuple[Factors, Array]:
    """Factor real and finite ``(..., k, n)`` with k >= n; also return `rcond`, (...), of R with columns of unit length.

    With a `border`, (..., n), that is the condition of R below a row ``(1, border)``, which belongs to a column that
    was eliminated beforehand. On NumPy it may be a lower bound.
    """
    if array_api_compat.is_numpy_array(b):
        factors, rcond = _cholesky(b, border)
        if factors is not None:
            return factors, rcond
    q, r = dense.qr(b)
    triangle = r
    if border is not None:
        xp = array_api_compat.array_namespace(b)
        one = xp.ones_like(border[..., :1])
        above = xp.concat([one, border], axis=-1)[..., None, :]
        triangle = xp.concat([above, xp.concat([xp.zeros_like(r[..., :1]), r], axis=-1)], axis=-2)
    return Factors(r, q, None), rcond_of_triangle(triangle)


def _cholesky(b: Any, border: Any) -> tuple[Factors | None, Any]:
    """Return Cholesky factors of a batch and a bound of their condition, or ``None`` if they do not suffice for all."""
    n, b_t = b.shape[-1], b.mT
    h = dense.hermitian_product(b_t, b_t)
    # The diagonal scales columns to unit length, which costs a pass over B otherwise.
    length = np.sqrt(np.linalg.diagonal(h))
    length = np.where(length > 0, length, 1)
    try:
        r = np.linalg.cholesky(h / (length[..., :, None] * length[..., None, :])).mT
        inverse = np.linalg.inv(r)
    except np.linalg.LinAlgError:  # without saying which item it is
        return None, None
    rcond = 1 / (_largest_singular_value(r) * _largest_singular_value(inverse))
    unit = float(np.finfo(b.dtype).eps)
    enough = rcond * rcond > CHOLESKY * unit
    if border is not None:
        # Of whole columns, R is the smaller part, and the border adds as much again for each column.
        rcond = rcond / (2 * (1 + n**0.5) * np.sqrt(1 + np.max((border / length) ** 2, axis=-1)))
        enough &= rcond > 2 * singularity.SINGULAR * unit
    if not enough.all():
        return None, None
    return Factors(r * length[..., None, :], None, inverse / length[..., :, None]), rcond


def _largest_singular_value(x: Any) -> Any:
    """Return the bound ``√(‖X‖₁ ‖X‖∞)``."""
    size = np.abs(x)
    return np.sqrt(np.max(np.sum(size, axis=-1), axis=-1) * np.max(np.sum(size, axis=-2), axis=-1))


@compiled
def solve(f: Factors, b: Array, *, t: Array | None = None, g: Array | None = None) -> Array:
    """Return y (..., n) for one of two right-hand sides: ``BᵀB y = Bᵀ t``, t (..., k), or ``BᵀB y = g``, g (..., n)."""
    xp = array_api_compat.array_namespace(b)
    b_t, r_t = xp.matrix_transpose(b), xp.matrix_transpose(f.r)

    def inverse(x: Array) -> Array:
        """``R⁻¹ R⁻ᵀ x``."""
        if f.inverse is not None:
            return f.inverse @ (xp.matrix_transpose(f.inverse) @ x)
        return solve_triangular(f.r, solve_triangular(r_t, x, lower=True), lower=False)

    # Correct the first solution by its residual and the triangle alone ("corrected semi-normal equations").
    if g is not None:
        right = g[..., None]
        y = inverse(right)
        for _ in range(_corrections(f)):
            y = y + inverse(right - b_t @ (b @ y))
        return y[..., 0]
    assert t is not None  # noqa: S101
    right = t[..., None]
    y = inverse(b_t @ right) if f.q is None else solve_triangular(f.r, xp.matrix_transpose(f.q) @ right, lower=False)
    for _ in range(_corrections(f)):
        y = y + inverse(b_t @ (right - b @ y))
    return y[..., 0]


def _corrections(f: Factors) -> int:
    return 2 if f.q is None else 1
