"""The VJP and JVP of packed LU factors, in nothing but products and triangular solves.

With ``Φ = tril(Lᴴ L̄, −1) + triu(Ū Uᴴ)`` the cotangent of ``P A = L U`` is

    Ā = Pᵀ L⁻ᴴ Φ U⁻ᴴ = A⁻ᴴ (Uᴴ Φ U⁻ᴴ).

and with ``Ψ = L⁻¹ P Ȧ U⁻¹ = U (A⁻¹ Ȧ) U⁻¹`` the tangents are ``L̇ = L tril(Ψ, −1)`` and ``U̇ = triu(Ψ) U``. The second
forms interpret no pivot, because a solve with A or Aᴴ applies the row exchanges.
"""

from __future__ import annotations

from collections.abc import Callable

from ddnref._core.arrays import Array, adjoint, namespace_of


def packed_lu_vjp(
    lu_bar: Array,
    lower: Array,
    upper: Array,
    solve_upper: Callable[[Array, Array], Array],
    solve_adjoint: Callable[[Array], Array],
) -> Array:
    """Return the cotangent of the matrix; differentiable itself.

    ``solve_upper(u, b)`` is ``U⁻¹ B`` and ``solve_adjoint(b)`` is ``A⁻ᴴ B``, each library's own.
    """
    xp = namespace_of(lower)
    u_h = adjoint(upper)
    phi = xp.tril(adjoint(lower) @ xp.tril(lu_bar, k=-1), k=-1) + xp.triu(xp.triu(lu_bar) @ u_h)
    # Φ U⁻ᴴ is the adjoint of U⁻¹ Φᴴ.
    return solve_adjoint(u_h @ adjoint(solve_upper(upper, adjoint(phi))))


def packed_lu_jvp(
    a_dot: Array,
    lower: Array,
    upper: Array,
    solve_lower: Callable[[Array, Array], Array],
    solve: Callable[[Array], Array],
) -> Array:
    """Return the tangent of the packed factors; differentiable itself.

    ``solve_lower(l, b)`` is ``L⁻¹ B`` and ``solve(b)`` is ``A⁻¹ B``, each library's own.
    """
    xp = namespace_of(lower)
    # Ψ is the adjoint of U⁻ᴴ (U A⁻¹ Ȧ)ᴴ.
    psi = adjoint(solve_lower(adjoint(upper), adjoint(upper @ solve(a_dot))))
    return xp.tril(lower @ xp.tril(psi, k=-1), k=-1) + xp.triu(xp.triu(psi) @ upper)
