"""Textbook forms of factorisations and structured systems: one step per column, and no exchange of rows."""

from __future__ import annotations

from ddnref._core.arrays import Array
from ddnref._core.checks import conform
from ddnref._kernels.dense import hermitian_part


def cholesky_vjp_unrolled(l_bar: Array, l: Array, /) -> Array:  # noqa: E741
    """Gradient through a Cholesky factorisation by reversing its steps, one column at a time.

    Cost: ``2 m³/3`` flops in ``m`` steps, each of which is a product with one vector.

    Parameters
    ----------
    l_bar, l : (m, m) real arrays
        Cotangent of the factor, and the factor.

    Returns
    -------
    a_bar : (m, m) array, symmetric

    Raises
    ------
    TypeError, ValueError
        Mixed libraries or dtypes; complex arrays; shapes that do not fit.

    References
    ----------
    .. [1] S. P. Smith, "Differentiation of the Cholesky algorithm", Journal of Computational and Graphical Statistics 4
       (1995).
    """
    xp = conform("(m,m),(m,m)", real_only=True, l=l, l_bar=l_bar).xp
    m = l.shape[-1]
    i = xp.arange(m)
    bar = xp.tril(l_bar)
    for j in range(m - 1, -1, -1):
        below, row, column = i > j, i == j, l[:, j]
        # From column j to the numbers of which it is the root and the quotients.
        c_bar = xp.where(below, bar[:, j] / column[j], xp.zeros_like(column))
        d_bar = (bar[j, j] - xp.sum(c_bar * column)) / column[j]
        new = c_bar + xp.where(row, d_bar / 2, xp.zeros_like(column))
        # From these numbers to the rows left of column j, whose products were subtracted.
        left = xp.where(i < j, l[j, :], xp.zeros_like(column))
        into_row = d_bar * left + xp.where(i < j, c_bar @ l, xp.zeros_like(column))
        bar = bar - xp.where(row[:, None], into_row[None, :], c_bar[:, None] * left[None, :])
        bar = xp.where(row[None, :] & (below | row)[:, None], new[:, None], bar)
    return hermitian_part(xp.tril(bar))


def thomas_solve(lower: Array, diagonal: Array, upper: Array, b: Array, /) -> Array:
    """Solution of a tridiagonal system by elimination in the order of the unknowns, without exchanging rows.

    Digits are lost wherever a pivot is small, and a pivot that is zero makes the result infinite or NaN although the
    matrix may be well conditioned. Only for diagonally dominant and for positive definite matrices this cannot happen.

    Parameters
    ----------
    lower, diagonal, upper, b : (..., n - 1), (..., n), (..., n - 1) and (..., n) arrays

    Returns
    -------
    x : (..., n) array

    Raises
    ------
    TypeError, ValueError
        Mixed libraries or dtypes; shapes that do not fit.
    """
    xp = conform("(n),(p),(p),(n)", diagonal=diagonal, lower=lower, upper=upper, b=b).xp
    n = diagonal.shape[-1]
    pivots, rights = [diagonal[..., 0]], [b[..., 0]]
    for i in range(1, n):
        factor = lower[..., i - 1] / pivots[-1]
        pivots.append(diagonal[..., i] - factor * upper[..., i - 1])
        rights.append(b[..., i] - factor * rights[-1])
    x = [rights[-1] / pivots[-1]]
    for i in range(n - 2, -1, -1):
        x.append((rights[i] - upper[..., i] * x[-1]) / pivots[i])
    return xp.stack(x[::-1], axis=-1)
