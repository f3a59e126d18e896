"""The forms in which a Hessian can be given, and the solve that tells whether it is singular.

Each structure but `Products` has ``transpose()``, ``solve(b)`` for ``H⁻¹ B`` with b of shape (..., n, k), NaN where H
is singular, and ``row_size()`` for the sums ``Σ_j |H_ij|``, (..., n).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from ddnref._core.arrays import Array, namespace_of, nan_where
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._core.loops import CHECK_EVERY, WhileLoop
from ddnref._kernels import dense, singularity


class Dense(NamedTuple):
    """A matrix with all its entries; a bare array means the same."""

    x: Array
    """(..., n, n)."""

    def transpose(self) -> Dense:
        """``Hᵀ``."""
        return Dense(namespace_of(self.x).matrix_transpose(self.x))

    def row_size(self) -> Array:
        """``Σ_j |H_ij|``."""
        xp = namespace_of(self.x)
        return xp.sum(xp.abs(self.x), axis=-1)

    def solve(self, b: Array) -> Array:
        """``H⁻¹ B``; NaN for singular items."""
        return dense.solve(self.x, b)


class Diagonal(NamedTuple):
    """``H = diag(d)``."""

    d: Array
    """(..., n)."""

    def transpose(self) -> Diagonal:
        """``Hᵀ``."""
        return self

    def row_size(self) -> Array:
        """``Σ_j |H_ij|``."""
        return namespace_of(self.d).abs(self.d)

    def solve(self, b: Array) -> Array:
        """``H⁻¹ B``; NaN in the rows of zeros."""
        return b / nan_where(self.d == 0, self.d)[..., None]


class BlockDiagonal(NamedTuple):
    """Blocks of equal size s along the diagonal, ``n = blocks · s``."""

    blocks: Array
    """(..., blocks, s, s)."""

    def transpose(self) -> BlockDiagonal:
        """``Hᵀ``."""
        return BlockDiagonal(namespace_of(self.blocks).matrix_transpose(self.blocks))

    def row_size(self) -> Array:
        """``Σ_j |H_ij|``."""
        *batch, count, size, _ = self.blocks.shape
        return namespace_of(self.blocks).reshape(Dense(self.blocks).row_size(), (*batch, count * size))

    def solve(self, b: Array) -> Array:
        """``H⁻¹ B``; NaN in the rows of singular blocks."""
        xp = namespace_of(b)
        # The blocks are one more batch axis, and each takes its own rows of b.
        parts = xp.reshape(b, (*self.blocks.shape[:-1], b.shape[-1]))
        return xp.reshape(dense.solve(self.blocks, parts), b.shape)


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
        """An upper bound of ``Σ_j |H_ij|``."""
        xp = namespace_of(self.d)
        # |U Vᵀ| is at most |U| |V|ᵀ, whose row sums take no n×n matrix.
        columns = xp.sum(xp.abs(self.u if self.v is None else self.v), axis=-2, keepdims=True)
        return xp.abs(self.d) + xp.sum(xp.abs(self.u) * columns, axis=-1)

    def solve(self, b: Array) -> Array:
        """``H⁻¹ B = D⁻¹B − D⁻¹U (I + Vᵀ D⁻¹ U)⁻¹ Vᵀ D⁻¹B`` (Woodbury)."""
        d, v_t = Diagonal(self.d), namespace_of(b).matrix_transpose(self.u if self.v is None else self.v)
        # Only a system of order r is left to solve.
        d_b, d_u = d.solve(b), d.solve(self.u)
        small = dense.identity(v_t.shape[-2], b) + v_t @ d_u
        return d_b - d_u @ dense.solve(small, v_t @ d_b)


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
    """A loop such as ``jax.lax.while_loop``, where the node itself is traced."""


Structure: TypeAlias = Dense | Diagonal | BlockDiagonal | DiagonalPlusLowRank | Products
"""All that a Hessian may be; users write a bare array for `Dense`."""


def as_structure(h: Array | Structure, y: Array, name: str) -> Structure:
    """Wrap a bare array, and check the shape of any structure against ``y``."""
    shape, n = tuple(y.shape), y.shape[-1]
    if isinstance(h, Products):  # a function has no shape to check
        return h
    if isinstance(h, BlockDiagonal):
        # Rounded up, the number of blocks fits no array whose block size does not divide n.
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


def checked_solve(h: Structure, b: Array) -> tuple[Array, Array]:
    """Return ``H⁻¹ B``, and whether H is singular to working precision, from one more right-hand side."""
    xp = namespace_of(b)
    assert not isinstance(h, Products)  # noqa: S101
    probe = singularity.condition_probe(h.row_size())
    x = h.solve(xp.concat([b, probe[..., None]], axis=-1))
    return x[..., :-1], singularity.condition(x[..., -1])
