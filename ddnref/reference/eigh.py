"""The ladder of reverse passes through a symmetric eigendecomposition, slowest first.

All three return the same gradient, of real eigenvectors of simple eigenvalues, for the same cotangent. They follow
the derivation of the Deep Declarative Networks tutorial on eigen decomposition, where eigenvector k moves as

    dy_k = (λ_k I − X)⁺ dX y_k                                          (Magnus 1985, theorem 1)

and each rung reorganises the sum over k. ``ddnref.eigh_vjp`` is the top of the ladder. As in the tutorial,
eigenvalues closer than an absolute `atol` count as equal; ``ddnref.eigh_vjp`` says why that is wrong in general.
"""

from __future__ import annotations

import array_api_compat

from ddnref._core.arrays import Array, namespace
from ddnref._core.checks import check_square

ATOL = 1e-9


def eigh_vjp_v1(v_bar: Array, x: Array, w: Array, v: Array, /) -> Array:
    """One pseudo-inverse of an m×m matrix per eigenpair: ``X̄ = sym Σ_k (λ_k I − X)⁺ v̄_k v_kᵀ``.

    Parameters
    ----------
    v_bar, x, v : (..., m, m) real arrays
        Cotangent of the eigenvectors, the symmetric matrix, its eigenvectors.
    w : (..., m) real array
        Its eigenvalues.

    Returns
    -------
    x_bar : (..., m, m) array, symmetric

    Raises
    ------
    TypeError, ValueError
        Mixed libraries or dtypes that are not floating; `x` not square.

    Notes
    -----
    Cost: m singular value decompositions, O(m⁴).
    """
    xp = _namespace(v_bar, x, w, v)
    eye = xp.eye(x.shape[-1], dtype=x.dtype, device=array_api_compat.device(x))
    x_bar = xp.zeros_like(x)
    for k in range(x.shape[-1]):
        pinv = xp.linalg.pinv(w[..., k, None, None] * eye - x)
        u = xp.matmul(pinv, v_bar[..., :, k, None])
        x_bar = x_bar + _symmetric_outer(u, v[..., :, k, None])
    return x_bar


def eigh_vjp_v2(v_bar: Array, w: Array, v: Array, /, *, atol: float = ATOL) -> Array:
    """The same sum with the pseudo-inverse from the decomposition: ``(λ_k I − X)⁺ = V (λ_k I − Λ)⁺ Vᵀ``.

    Parameters, errors and result as `eigh_vjp_v1`, and `atol`: eigenvalues no further apart count as equal. Cost: m
    products of m×m matrices, O(m⁴) with a small constant.
    """
    xp = _namespace(v_bar, w, v)
    x_bar = xp.zeros_like(v)
    for k in range(w.shape[-1]):
        gap = _pseudo_reciprocal(w[..., k, None] - w, atol)
        pinv = xp.matmul(v * gap[..., None, :], xp.matrix_transpose(v))
        u = xp.matmul(pinv, v_bar[..., :, k, None])
        x_bar = x_bar + _symmetric_outer(u, v[..., :, k, None])
    return x_bar


def eigh_vjp_v3(v_bar: Array, w: Array, v: Array, /, *, atol: float = ATOL) -> Array:
    """All eigenpairs at once, rows as in the derivation: ``X̄ = sym(V (Λ̃ ∘ V̄ᵀV) Vᵀ)``, ``Λ̃_kj = 1/(λ_k − λ_j)``.

    Parameters, errors and result as `eigh_vjp_v2`. Cost: three products, O(m³).
    """
    xp = _namespace(v_bar, w, v)
    v_t = xp.matrix_transpose(v)
    gap = _pseudo_reciprocal(w[..., :, None] - w[..., None, :], atol)
    x_bar = xp.matmul(v, xp.matmul(gap * xp.matmul(xp.matrix_transpose(v_bar), v), v_t))
    return (x_bar + xp.matrix_transpose(x_bar)) / 2


def _namespace(v_bar: Array, *others: Array) -> Array:
    xp = namespace(v_bar=v_bar, **{f"argument {i + 2}": other for i, other in enumerate(others)})
    check_square("v_bar", v_bar)
    return xp


def _pseudo_reciprocal(gap: Array, atol: float) -> Array:
    xp = array_api_compat.array_namespace(gap)
    apart = xp.abs(gap) > atol
    return xp.where(apart, 1 / xp.where(apart, gap, xp.ones_like(gap)), xp.zeros_like(gap))


def _symmetric_outer(a: Array, b: Array) -> Array:
    xp = array_api_compat.array_namespace(a)
    outer = a * xp.matrix_transpose(b)
    return (outer + xp.matrix_transpose(outer)) / 2
