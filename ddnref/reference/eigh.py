"""The ladder of reverse passes through a symmetric eigendecomposition, slowest first.

All three return the same gradient, for real eigenvectors of simple eigenvalues. They follow the derivation of the
Deep Declarative Networks tutorial on eigen decomposition, where eigenvector k moves as

    dy_k = (λ_k I − X)⁺ dX y_k                                          (Magnus 1985, theorem 1)

and each rung reorganises the sum over k. ``ddnref.eigh_vjp`` is the top of the ladder. As in the tutorial,
eigenvalues closer than an absolute `atol` count as equal; ``ddnref.eigh_vjp`` explains why that is wrong in general.
"""

from __future__ import annotations

from ddnref._core.arrays import Array, namespace_of
from ddnref._core.checks import conform
from ddnref._kernels.dense import hermitian_part, identity

ATOL = 1e-9


def eigh_vjp_v1(v_bar: Array, x: Array, w: Array, v: Array, /) -> Array:
    """Gradient by one pseudo-inverse of an m×m matrix per eigenpair: ``X̄ = sym Σ_k (λ_k I − X)⁺ v̄_k v_kᵀ``.

    Cost: m singular value decompositions, O(m⁴).

    Parameters
    ----------
    v_bar, x, v : (..., m, m) real arrays
        Cotangent of the eigenvectors, the symmetric matrix, its eigenvectors.
    w : (..., m) real array
        The eigenvalues of `x`.

    Returns
    -------
    x_bar : (..., m, m) array, symmetric

    Raises
    ------
    TypeError, ValueError
        Mixed libraries or dtypes; complex arrays; shapes that do not fit.
    """
    xp = conform("(m,m),(m,m),(m),(m,m)", real_only=True, v_bar=v_bar, x=x, w=w, v=v).xp
    eye, x_bar = identity(x.shape[-1], x), xp.zeros_like(x)
    for k in range(x.shape[-1]):
        # Singular in the direction of v_k alone, which the pseudo-inverse leaves out.
        pinv = xp.linalg.pinv(w[..., k, None, None] * eye - x)
        x_bar = x_bar + (pinv @ v_bar[..., :, k, None]) @ xp.matrix_transpose(v[..., :, k, None])
    return hermitian_part(x_bar)


def eigh_vjp_v2(v_bar: Array, w: Array, v: Array, /, *, atol: float = ATOL) -> Array:
    """Gradient of `eigh_vjp_v1` with each pseudo-inverse from the decomposition: ``(λ_k I − X)⁺ = V (λ_k I − Λ)⁺ Vᵀ``.

    Parameters, errors and result are those of `eigh_vjp_v1`; eigenvalues no further apart than `atol` count as equal.
    Cost: m products of m×m matrices, O(m⁴) with a small constant.
    """
    xp = conform("(m,m),(m),(m,m)", real_only=True, v_bar=v_bar, w=w, v=v).xp
    x_bar, v_t = xp.zeros_like(v), xp.matrix_transpose(v)
    for k in range(w.shape[-1]):
        # The reciprocal of the gap to λ_k itself is zero, which makes this a pseudo-inverse.
        gap = _pseudo_reciprocal(w[..., k, None] - w, atol)
        pinv = (v * gap[..., None, :]) @ v_t
        x_bar = x_bar + (pinv @ v_bar[..., :, k, None]) @ v_t[..., k : k + 1, :]
    return hermitian_part(x_bar)


def eigh_vjp_v3(v_bar: Array, w: Array, v: Array, /, *, atol: float = ATOL) -> Array:
    """Gradient of all eigenpairs at once: ``X̄ = sym(V (Λ̃ ∘ V̄ᵀV) Vᵀ)``, ``Λ̃_kj = 1/(λ_k − λ_j)``.

    Parameters, errors and result are those of `eigh_vjp_v2`. Cost: three products, O(m³).
    """
    xp = conform("(m,m),(m),(m,m)", real_only=True, v_bar=v_bar, w=w, v=v).xp
    gap = _pseudo_reciprocal(w[..., :, None] - w[..., None, :], atol)
    # Row k of Λ̃ ∘ V̄ᵀV holds the coefficients of (λ_k I − X)⁺ v̄_k in the eigenvectors.
    coefficients = gap * (xp.matrix_transpose(v_bar) @ v)
    return hermitian_part(v @ (coefficients @ xp.matrix_transpose(v)))


def _pseudo_reciprocal(gap: Array, atol: float) -> Array:
    xp = namespace_of(gap)
    apart = xp.abs(gap) > atol
    return xp.where(apart, 1 / xp.where(apart, gap, xp.ones_like(gap)), xp.zeros_like(gap))
