"""Linear systems of declarative nodes: a structured Hessian, bordered by the constraints that are active.

    [ H  −Cᵀ ] [ w ]   [ a ]
    [ C   0  ] [ η ] = [ c ]

Dense Hessians may be singular where the bordered matrix is not; structured ones are eliminated first and may not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, eps, full, nan_where, power_of_two_below
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._core.loops import CHECK_EVERY, WhileLoop, run
from ddnref._kernels import dense as _linalg

SINGULAR = 16  # a condition above 1 / (16 n eps) leaves no digit of the solution worth having


class Dense(NamedTuple):
    """A matrix with all its entries; a bare array means the same."""

    x: Array
    """(..., n, n)."""

    def transpose(self) -> Dense:
        """``Hᵀ``."""
        return Dense(array_api_compat.array_namespace(self.x).matrix_transpose(self.x))

    def row_size(self) -> Array:
        """``Σ_j |H_ij|``, (..., n)."""
        return _sum_abs(self.x)

    def solve(self, b: Array) -> Array:
        """``H⁻¹ B`` for b of shape (..., n, k); NaN for singular items."""
        return _linalg.solve(self.x, b)


class Diagonal(NamedTuple):
    """``H = diag(d)``."""

    d: Array
    """(..., n)."""

    def transpose(self) -> Diagonal:
        """``Hᵀ``."""
        return self

    def row_size(self) -> Array:
        """``Σ_j |H_ij|``, (..., n)."""
        return array_api_compat.array_namespace(self.d).abs(self.d)

    def solve(self, b: Array) -> Array:
        """``H⁻¹ B`` for b of shape (..., n, k); NaN in the rows of zeros."""
        return b / nan_where(self.d == 0, self.d)[..., None]


class BlockDiagonal(NamedTuple):
    """Blocks of equal size s along the diagonal, ``n = blocks · s``."""

    blocks: Array
    """(..., blocks, s, s)."""

    def transpose(self) -> BlockDiagonal:
        """``Hᵀ``."""
        return BlockDiagonal(array_api_compat.array_namespace(self.blocks).matrix_transpose(self.blocks))

    def row_size(self) -> Array:
        """``Σ_j |H_ij|``, (..., n)."""
        xp = array_api_compat.array_namespace(self.blocks)
        *batch, count, size, _ = self.blocks.shape
        return xp.reshape(_sum_abs(self.blocks), (*batch, count * size))

    def solve(self, b: Array) -> Array:
        """``H⁻¹ B`` for b of shape (..., n, k); NaN in the rows of singular blocks."""
        xp = array_api_compat.array_namespace(b)
        parts = xp.reshape(b, (*self.blocks.shape[:-1], b.shape[-1]))
        return xp.reshape(_linalg.solve(self.blocks, parts), b.shape)


class DiagonalPlusLowRank(NamedTuple):
    """``H = diag(d) + U Vᵀ``, with ``V = U`` where it is not given."""

    d: Array
    """(..., n), without zeros."""
    u: Array
    """(..., n, r)."""
    v: Array | None = None
    """(..., n, r)."""

    def transpose(self) -> DiagonalPlusLowRank:
        """``Hᵀ``."""
        return self if self.v is None else DiagonalPlusLowRank(self.d, self.v, self.u)

    def row_size(self) -> Array:
        """At least ``Σ_j |H_ij|``, (..., n)."""
        xp = array_api_compat.array_namespace(self.d)
        columns = xp.sum(xp.abs(self.u if self.v is None else self.v), axis=-2, keepdims=True)
        return xp.abs(self.d) + xp.sum(xp.abs(self.u) * columns, axis=-1)

    def solve(self, b: Array) -> Array:
        """``H⁻¹ B = D⁻¹B − D⁻¹U (I + Vᵀ D⁻¹ U)⁻¹ Vᵀ D⁻¹B`` (Woodbury) for b of shape (..., n, k)."""
        xp = array_api_compat.array_namespace(b)
        d, v_t = Diagonal(self.d), xp.matrix_transpose(self.u if self.v is None else self.v)
        d_b, d_u = d.solve(b), d.solve(self.u)
        small = _linalg.identity(v_t.shape[-2], b) + v_t @ d_u
        return d_b - d_u @ _linalg.solve(small, v_t @ d_b)


class Products(NamedTuple):
    """A symmetric Hessian known by its products; solved by conjugate gradients in the tangent of the constraints.

    It must be positive definite there: a direction of zero or negative curvature counts as singular.
    """

    apply: Callable[[Array], Array]
    """``apply(v) = H v`` for v of the shape of y."""
    rtol: float | None = None
    """Residual relative to the right-hand side; default ``64 eps``."""
    maxiter: int | None = None
    """Default ``10 n``."""
    check_every: int = CHECK_EVERY
    """Steps between two looks at the flags."""
    while_loop: WhileLoop | None = None
    """As ``jax.lax.while_loop``, where the node itself is traced."""


Structure: TypeAlias = Dense | Diagonal | BlockDiagonal | DiagonalPlusLowRank | Products
"""What a Hessian may be, besides a bare array."""


class Solution(NamedTuple):
    """Of a bordered system; NaN in failed items."""

    w: Array
    """(..., n, k)."""
    eta: Array
    """(..., p, k)."""
    singular: Array
    """(...) flags."""
    converged: Array
    """(...) flags of the inner iteration."""


def as_structure(h: Array | Structure, y: Array, name: str) -> Structure:
    """Wrap a bare array, and check the shape of any structure against ``y``."""
    shape, n = tuple(y.shape), y.shape[-1]
    if isinstance(h, Products):
        return h
    if isinstance(h, BlockDiagonal):
        s = h.blocks.shape[-1]
        check_shapes(**{f"{name}.blocks": (h.blocks, (*shape[:-1], -(-n // s), s, s))})
    elif isinstance(h, Diagonal):
        check_shapes(**{f"{name}.d": (h.d, shape)})
    elif isinstance(h, DiagonalPlusLowRank):
        check_shapes(**{f"{name}.d": (h.d, shape), f"{name}.u": (h.u, (*shape, h.u.shape[-1]))})
        check_shapes(**{f"{name}.v": (h.v, tuple(h.u.shape))})
    else:
        h = h if isinstance(h, Dense) else Dense(h)
        check_shapes(**{name: (h.x, (*shape, n))})
    check_dtypes(**{name: (h[0], y.dtype)})
    return h


def solve(h: Structure, a: Array) -> Solution:
    """``H w = a`` without constraints, for a of shape (..., n, k)."""
    xp = array_api_compat.array_namespace(a)
    none = a[..., :0, :]
    if isinstance(h, Products):
        return _projected_cg(h, xp.matrix_transpose(none[..., :0]), none, a, none)
    w, singular = probed(h, a)
    return Solution(w, none, singular, xp.ones_like(singular))


def bordered_solve(h: Structure, c_: Array, active: Array, a: Array, c: Array) -> Solution:
    """The system above; rows of ``C`` (c_, (..., p, n)) that are not `active` (..., p) are replaced by ``η_j = 0``."""
    xp = array_api_compat.array_namespace(a)
    if c_.shape[-2] == 0:
        return solve(h, a)
    zero = full((), 0.0, a)
    norms = xp.sqrt(xp.sum(c_ * c_, axis=-1, keepdims=True))
    scale = xp.where(active[..., None], norms, xp.ones_like(norms))
    c_ = xp.where(active[..., None], c_ / nan_where(scale == 0, scale), zero)  # rows of unit length: η̃ = η ‖C_j‖
    c = xp.where(active[..., None], c / nan_where(scale == 0, scale), zero)
    free = xp.astype(~active, a.dtype)[..., None] * _linalg.identity(c_.shape[-2], a)
    if isinstance(h, Products):
        solution = _projected_cg(h, c_, c_ @ xp.matrix_transpose(c_) + free, a, c)
    elif isinstance(h, Dense):
        solution = _dense(h, c_, free, a, c)
    else:
        solution = _schur(h, c_, free, a, c)
    return solution._replace(eta=solution.eta / scale)


def _dense(h: Dense, c_: Array, free: Array, a: Array, c: Array) -> Solution:
    """The bordered matrix as it stands; its border scaled to the size of H."""
    xp = array_api_compat.array_namespace(a)
    n = a.shape[-2]
    size = xp.max(xp.abs(h.x), axis=(-2, -1), keepdims=True)
    size = xp.where(size > 0, size, xp.ones_like(size))
    c_ = c_ * size
    top = xp.concat([h.x, -xp.matrix_transpose(c_)], axis=-1)
    bottom = xp.concat([c_, size * free], axis=-1)
    x, singular = probed(Dense(xp.concat([top, bottom], axis=-2)), xp.concat([a, size * c], axis=-2))
    return Solution(x[..., :n, :], x[..., n:, :] * size, singular, xp.ones_like(singular))


def _schur(h: Structure, c_: Array, free: Array, a: Array, c: Array) -> Solution:
    """``(C H⁻¹ Cᵀ) η = c − C H⁻¹ a``, then ``w = H⁻¹ (a + Cᵀ η)``."""
    xp = array_api_compat.array_namespace(a)
    k = a.shape[-1]
    solved, singular = probed(h, xp.concat([a, xp.matrix_transpose(c_)], axis=-1))
    h_a, h_c = solved[..., :k], solved[..., k:]
    eta, schur_singular = probed(Dense(c_ @ h_c + free), c - c_ @ h_a)
    singular = singular | schur_singular
    return Solution(h_a + h_c @ eta, eta, singular, xp.ones_like(singular))


def probed(h: Structure, b: Array) -> tuple[Array, Array]:
    """``H⁻¹ B``, and whether H is singular to working precision.

    One more right-hand side, of the size of the rows of H with fixed signs, bounds from below the condition number
    ‖ |H⁻¹| |H| e ‖∞ of Skeel, which no scaling of the rows can change.
    """
    xp = array_api_compat.array_namespace(b)
    assert not isinstance(h, Products)  # noqa: S101
    n = b.shape[-2]
    i = xp.arange(n, dtype=b.dtype, device=array_api_compat.device(b))
    probe = h.row_size() * xp.cos(2.4 * i * i + 0.3)  # no symmetry that a null vector might share
    x = h.solve(xp.concat([b, probe[..., None]], axis=-1))
    condition = xp.max(xp.abs(x[..., -1]), axis=-1)
    return x[..., :-1], ~(condition <= 1 / (SINGULAR * n * eps(xp, b.dtype)))


class _State(NamedTuple):
    z: Array
    r: Array
    d: Array
    rho: Array
    active: Array
    curved: Array


def _projected_cg(h: Products, c_: Array, gram: Array, a: Array, c: Array) -> Solution:
    """Conjugate gradients in the null space of C: ``P H P z = P (a − H w₀)``, ``w₀ = Cᵀ (C Cᵀ)⁻¹ c``."""
    xp = array_api_compat.array_namespace(a)
    n, p, c_t = a.shape[-2], c_.shape[-2], xp.matrix_transpose(c_)
    rtol = 64 * eps(xp, a.dtype) if h.rtol is None else h.rtol

    def apply(v: Array) -> Array:
        return xp.stack([h.apply(v[..., j]) for j in range(v.shape[-1])], axis=-1)

    def project(v: Array) -> Array:
        return v - c_t @ _linalg.solve(gram, c_ @ v) if p else v

    def dot(u: Array, v: Array) -> Array:
        return xp.sum(u * v, axis=-2, keepdims=True)

    size = power_of_two_below(xp.max(xp.abs(xp.concat([a, c], axis=-2)), axis=-2, keepdims=True))  # for their squares
    a, c = a / size, c / size
    w_0 = c_t @ _linalg.solve(gram, c) if p else xp.zeros_like(a)
    b = project(a - apply(w_0) if p else a)
    goal = rtol * rtol * dot(b, b)

    def body(s: _State) -> _State:
        h_d = project(apply(s.d))
        curvature = dot(s.d, h_d)
        curved = xp.where(s.active, curvature > 0, s.curved)
        go = s.active & curved
        step = xp.where(go, s.rho / xp.where(go, curvature, xp.ones_like(curvature)), xp.zeros_like(s.rho))
        z, r = s.z + step * s.d, s.r - step * h_d
        rho = dot(r, r)
        ratio = rho / xp.where(s.rho > 0, s.rho, xp.ones_like(s.rho))
        return _State(z, r, xp.where(go, r + ratio * s.d, s.d), rho, go & (rho > goal), curved)

    rho = dot(b, b)
    start = _State(0 * b, b, b, rho, rho > goal, rho == rho)  # 0 · NaN = NaN: a bad item stays one
    end = run(
        lambda s: s.active, body, start, maxiter=10 * n if h.maxiter is None else h.maxiter,
        check_every=h.check_every, while_loop=h.while_loop,
    )  # fmt: skip
    w = w_0 + end.z
    eta = _linalg.solve(gram, c_ @ (apply(w) - a)) if p else c
    singular = xp.any(~end.curved, axis=(-2, -1))
    converged = xp.all(~end.active, axis=(-2, -1))
    bad = (singular | ~converged)[..., None, None]
    w, eta = nan_where(bad, w) * size, nan_where(bad, eta) * size
    return Solution(w, eta, singular | xp.any(xp.isnan(eta), axis=(-2, -1)), converged)


def _sum_abs(x: Array) -> Array:
    xp = array_api_compat.array_namespace(x)
    return xp.sum(xp.abs(x), axis=-1)
