"""Polar factors through the Gram matrix, and least squares by the normal equations: what the textbook forms lose.

Both square the condition number, so that half of the digits of small singular values are lost. ``ddnref.polar`` and
``ddnref.lstsq`` keep them.
"""

from __future__ import annotations

from ddnref import linalg
from ddnref._core.arrays import Array, adjoint
from ddnref._core.checks import conform
from ddnref._kernels.dense import solve


def polar_through_gram(x: Array, /) -> tuple[Array, Array]:
    """Polar factors of a tall matrix of full rank as ``H = (XᴴX)^½`` and ``W = X (XᴴX)^-½``.

    Parameters
    ----------
    x : (..., m, n) array, m >= n

    Returns
    -------
    w, h : (..., m, n) and (..., n, n) arrays

    Raises
    ------
    SingularError
        The condition of x is above about ``1 / (4 sqrt(eps))``.
    TypeError, ValueError
        As `ddnref.invsqrtm`.
    """
    gram = adjoint(x) @ x
    return x @ linalg.invsqrtm(gram), linalg.sqrtm(gram)


def polar_vjp_through_gram(w_bar: Array, x: Array, /) -> Array:
    """Gradient of a loss of W alone, through ``W = X (XᴴX)^-½``: with ``S̄ = (D invsqrtm)(XᴴW̄)``, ``W̄ M + 2 X S̄``.

    Parameters, errors and assumptions are those of `polar_through_gram`.
    """
    conform("(m,n),(m,n)", x=x, w_bar=w_bar)
    root, saved = linalg.invsqrtm_fwd(adjoint(x) @ x)
    return w_bar @ root + 2 * (x @ linalg.invsqrtm_vjp(adjoint(x) @ w_bar, root, *saved))


def lstsq_normal_equations(a: Array, b: Array, /) -> Array:
    """Least squares with independent columns as ``(AᴴA)⁻¹ Aᴴb``.

    Parameters
    ----------
    a, b : (..., m, n) and (..., m) arrays, m >= n

    Returns
    -------
    x : (..., n) array

    Raises
    ------
    TypeError, ValueError
        Mixed libraries or dtypes; shapes that do not fit.
    """
    conform("(m,n),(m)", a=a, b=b)
    a_h = adjoint(a)
    return solve(a_h @ a, a_h @ b[..., None])[..., 0]
