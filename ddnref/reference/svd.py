"""Textbook forms of the singular value decomposition and its reverse pass, which show what is lost.

Both go through squares. The decomposition by eigenvectors of ``XᵀX`` has an error of ``eps * s_1²`` in ``s²``, so that
a value below ``sqrt(eps)`` times the largest has no digit. The gradient with ``s_j² − s_i²`` divides what two equal
values leave open by a difference that has lost half of the digits, and is NaN or wrong at equal and at zero values.
"""

from __future__ import annotations

from ddnref._core.arrays import Array, full, namespace_of
from ddnref._core.checks import conform
from ddnref._kernels.dense import eigh, hermitian_part, identity


def svd_gram(x: Array, /) -> tuple[Array, Array, Array]:
    """Thin decomposition of a tall real matrix by the eigenvectors of ``XᵀX``.

    Parameters
    ----------
    x : (..., m, n) real array, m >= n

    Returns
    -------
    u, s, vh : (..., m, n), (..., n) and (..., n, n) arrays

    Raises
    ------
    TypeError, ValueError
        Complex arrays; shapes that do not fit.
    """
    xp = conform("(m,n)", real_only=True, x=x).xp
    w, v = eigh(hermitian_part(xp.matrix_transpose(x) @ x))
    w, v = xp.flip(w, axis=-1), xp.flip(v, axis=-1)
    s = xp.sqrt(xp.where(w > 0, w, xp.zeros_like(w)))
    divisor = xp.where(s > 0, s, full((), float("inf"), s))
    return (x @ v) / divisor[..., None, :], s, xp.matrix_transpose(v)


def svd_vjp_squares(u_bar: Array, s_bar: Array, vh_bar: Array, u: Array, s: Array, vh: Array, /) -> Array:
    """Gradient with ``F_ij = 1 / (s_j² − s_i²)``, zero on the diagonal, of a real matrix of any shape.

    ``X̄ = U (F ∘ (UᵀŪ − ŪᵀU) S + S F ∘ (VᵀV̄ − V̄ᵀV) + diag(s̄)) Vᵀ + (I − UUᵀ) Ū S⁻¹ Vᵀ + U S⁻¹ V̄ᵀ (I − VVᵀ)``

    Parameters
    ----------
    u_bar, s_bar, vh_bar, u, s, vh : (..., m, k), (..., k) and (..., k, n) real arrays, twice
        Cotangents, and the thin decomposition.

    Returns
    -------
    x_bar : (..., m, n) array

    Raises
    ------
    TypeError, ValueError
        Complex arrays; shapes that do not fit.
    """
    bars = {"u_bar": u_bar, "s_bar": s_bar, "vh_bar": vh_bar}
    conform("(m,k),(k),(k,n),(m,k),(k),(k,n)", real_only=True, u=u, s=s, vh=vh, **bars)
    xp = namespace_of(u)
    t, column, row = xp.matrix_transpose, s[..., None, :], s[..., :, None]
    eye, v, v_bar = identity(s.shape[-1], u), t(vh), t(vh_bar)
    f = (1 - eye) / (column * column - row * row + eye)
    m_, n_ = t(u) @ u_bar, vh @ v_bar
    inner = f * (m_ - t(m_)) * column + row * f * (n_ - t(n_)) + eye * s_bar[..., None, :]
    return (u @ inner + (u_bar - u @ m_) / column) @ vh + u @ t((v_bar - v @ n_) / column)
