"""Linear systems of declarative nodes: a structured Hessian, bordered by the constraints that are active.

    [ H  −Cᵀ ] [ w ]   [ a ]
    [ C   0  ] [ η ] = [ c ]

Dense Hessians may be singular where the bordered matrix is not; structured ones are eliminated first and may not.
"""

from __future__ import annotations

from typing import NamedTuple

from ddnref._core.arrays import Array, eps, full, namespace_of, nan_where, power_of_two_below
from ddnref._core.loops import LoopOptions
from ddnref._kernels import dense
from ddnref.implicit._structures import Dense, Products, Structure, checked_solve
from ddnref.krylov._cg import solve_from_zero
from ddnref.krylov._system import ITERATION_LIMIT


class Solution(NamedTuple):
    """The solution of a bordered system; NaN in failed items."""

    w: Array  # (..., n, k)
    eta: Array  # (..., p, k)
    singular: Array  # (...) flags
    converged: Array  # (...) flags of the inner iteration


def solve(h: Structure, a: Array) -> Solution:
    """Solve ``H w = a`` without constraints, for a of shape (..., n, k)."""
    none = a[..., :0, :]
    if isinstance(h, Products):
        return _projected_cg(h, namespace_of(a).matrix_transpose(none[..., :0]), none, a, none)
    w, singular = checked_solve(h, a)
    return Solution(w, none, singular, namespace_of(a).ones_like(singular))


def bordered_solve(h: Structure, c_: Array, active: Array, a: Array, c: Array) -> Solution:
    """Solve the system above; rows of ``C`` (c_, (..., p, n)) that are not `active` (..., p) become ``η_j = 0``."""
    xp = namespace_of(a)
    if c_.shape[-2] == 0:
        return solve(h, a)
    # Give each active row of C unit length, whatever the units of its constraint: η̃ = η ‖C_j‖.
    zero = full((), 0.0, a)
    norms = xp.sqrt(xp.sum(c_ * c_, axis=-1, keepdims=True))
    scale = xp.where(active[..., None], norms, xp.ones_like(norms))
    c_ = xp.where(active[..., None], c_ / nan_where(scale == 0, scale), zero)
    c = xp.where(active[..., None], c / nan_where(scale == 0, scale), zero)
    # A one on the diagonal holds each other multiplier at zero; so all items have systems of one shape.
    free = xp.astype(~active, a.dtype)[..., None] * dense.identity(c_.shape[-2], a)
    if isinstance(h, Products):
        solution = _projected_cg(h, c_, c_ @ xp.matrix_transpose(c_) + free, a, c)
    elif isinstance(h, Dense):
        solution = _whole(h, c_, free, a, c)
    else:
        solution = _schur(h, c_, free, a, c)
    return solution._replace(eta=solution.eta / scale)


def _whole(h: Dense, c_: Array, free: Array, a: Array, c: Array) -> Solution:
    """Factorise the whole bordered matrix, its border scaled to the size of H."""
    xp = namespace_of(a)
    n = a.shape[-2]
    size = xp.max(xp.abs(h.x), axis=(-2, -1), keepdims=True)
    size = xp.where(size > 0, size, xp.ones_like(size))
    # The scale of the border is that of η, which is scaled back at the end.
    c_ = c_ * size
    top = xp.concat([h.x, -xp.matrix_transpose(c_)], axis=-1)
    bottom = xp.concat([c_, size * free], axis=-1)
    x, singular = checked_solve(Dense(xp.concat([top, bottom], axis=-2)), xp.concat([a, size * c], axis=-2))
    return Solution(x[..., :n, :], x[..., n:, :] * size, singular, xp.ones_like(singular))


def _schur(h: Structure, c_: Array, free: Array, a: Array, c: Array) -> Solution:
    """Eliminate w: ``(C H⁻¹ Cᵀ) η = c − C H⁻¹ a``, then ``w = H⁻¹ (a + Cᵀ η)``."""
    xp = namespace_of(a)
    k = a.shape[-1]
    # H⁻¹ a and H⁻¹ Cᵀ by one solve.
    solved, singular = checked_solve(h, xp.concat([a, xp.matrix_transpose(c_)], axis=-1))
    h_a, h_c = solved[..., :k], solved[..., k:]
    # Rows of constraints that are not active are zero; `free` keeps their diagonal at one.
    eta, schur_singular = checked_solve(Dense(c_ @ h_c + free), c - c_ @ h_a)
    singular = singular | schur_singular
    return Solution(h_a + h_c @ eta, eta, singular, xp.ones_like(singular))


def _projected_cg(h: Products, c_: Array, gram: Array, a: Array, c: Array) -> Solution:
    """Conjugate gradients in the null space of C: ``P H P z = P (a − H w₀)``, ``w₀ = Cᵀ (C Cᵀ)⁻¹ c``."""
    xp = namespace_of(a)
    n, p, c_t = a.shape[-2], c_.shape[-2], xp.matrix_transpose(c_)

    def apply(v: Array) -> Array:
        return xp.stack([h.apply(v[..., j]) for j in range(v.shape[-1])], axis=-1)

    def project(v: Array) -> Array:
        return v - c_t @ dense.solve(gram, c_ @ v) if p else v

    def product(rows: Array) -> Array:
        return xp.matrix_transpose(project(apply(xp.matrix_transpose(rows))))

    # Scale each right-hand side, whose squares could leave the range of exponents otherwise.
    size = power_of_two_below(xp.max(xp.abs(xp.concat([a, c], axis=-2)), axis=-2, keepdims=True))
    a, c = a / size, c / size
    # The shortest w that satisfies the constraints, and the rest in their null space.
    w_0 = c_t @ dense.solve(gram, c) if p else xp.zeros_like(a)
    b = project(a - apply(w_0) if p else a)
    rtol = 64 * eps(xp, a.dtype) if h.rtol is None else h.rtol
    options = LoopOptions(rtol, 10 * n if h.maxiter is None else h.maxiter, h.check_every, h.while_loop)
    end = solve_from_zero(product, xp.matrix_transpose(b), options)
    w = w_0 + xp.matrix_transpose(end.x)
    # The multipliers balance the part of the residual that the null space cannot.
    eta = dense.solve(gram, c_ @ (apply(w) - a)) if p else c
    converged = xp.all(end.status != ITERATION_LIMIT, axis=-1)
    singular = xp.any(end.status > ITERATION_LIMIT, axis=-1)  # no positive curvature, or not finite
    bad = (singular | ~converged)[..., None, None]
    w, eta = nan_where(bad, w) * size, nan_where(bad, eta) * size
    return Solution(w, eta, singular | xp.any(xp.isnan(eta), axis=(-2, -1)), converged)
