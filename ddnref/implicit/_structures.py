"""The forms in which a Hessian H can be given, and the inverse of each.

A form has ``transpose()``, ``times(v)`` for ``H V`` with v of shape (..., n, k), ``size_times(v)`` for ``|H| |V|``, and
``inverse()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from ddnref._core.arrays import Array, namespace_of, nan_where, power_of_two_below
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._core.loops import CHECK_EVERY, WhileLoop
from ddnref._kernels import dense, singularity


class Inverse(NamedTuple):
    """``H⁻¹`` as functions of right-hand sides (..., n, k), whose results are NaN where H is singular."""

    solve: Callable[[Array], Array]
    """``H⁻¹ B``."""
    solve_transposed: Callable[[Array], Array]
    """``H⁻ᵀ B``."""
    rcond: Array
    """(...): the reciprocal condition number of H with its rows and columns scaled to about unit length."""


class Dense(NamedTuple):
    """A matrix x (..., n, n) with all its entries; a bare array means the same."""

    x: Array

    def transpose(self) -> Dense:
        """``Hᵀ``."""
        return Dense(namespace_of(self.x).matrix_transpose(self.x))

    def times(self, v: Array) -> Array:
        """``H V``."""
        return self.x @ v

    def size_times(self, v: Array) -> Array:
        """``|H| |V|``."""
        xp = namespace_of(self.x)
        return xp.abs(self.x) @ xp.abs(v)

    def inverse(self, *, scaled: bool = True, size: Array | None = None) -> Inverse:
        """``H⁻¹``, explicitly: the many right-hand sides of a node then cost products, in a batch too.

        Without `scaled` rows and columns are taken as they are, and `rcond` is one. Where the entries are sums that may
        have cancelled, `size` holds the sums of the absolute values: what is small against these is rounding.
        """
        xp, n = namespace_of(self.x), self.x.shape[-1]
        if not scaled:
            x_inv = dense.solve(self.x, dense.identity(n, self.x) + xp.zeros_like(self.x))
            one = xp.ones_like(self.x[..., 0, 0])
            return Inverse(lambda b: x_inv @ b, lambda b: xp.matrix_transpose(x_inv) @ b, one)
        size = self.x if size is None else size
        rows, columns = _scales(size)
        a, size = (rows[..., None] * x * columns[..., None, :] for x in (self.x, size))
        a_inv = dense.solve(a, dense.identity(n, a) + xp.zeros_like(a))
        # Near a singular matrix one singular value dominates the inverse, and the Frobenius norm is the largest one.
        growth = _largest_singular_value(size) * xp.sqrt(xp.sum(a_inv * a_inv, axis=(-2, -1)))
        rcond = 1 / nan_where(growth == 0, growth)

        def solve(b: Array) -> Array:
            return columns[..., None] * (a_inv @ (rows[..., None] * b))

        def solve_transposed(b: Array) -> Array:
            return rows[..., None] * (xp.matrix_transpose(a_inv) @ (columns[..., None] * b))

        return Inverse(solve, solve_transposed, rcond)


class Diagonal(NamedTuple):
    """``H = diag(d)``, with d (..., n)."""

    d: Array

    def transpose(self) -> Diagonal:
        """``Hᵀ``."""
        return self

    def times(self, v: Array) -> Array:
        """``H V``."""
        return self.d[..., None] * v

    def size_times(self, v: Array) -> Array:
        """``|H| |V|``."""
        return namespace_of(v).abs(self.d[..., None] * v)

    def inverse(self) -> Inverse:
        """``H⁻¹``; scaled, its condition number is one."""
        xp = namespace_of(self.d)
        d = nan_where(self.d == 0, self.d)[..., None]  # NaN, not infinity
        regular = xp.all(xp.isfinite(d), axis=(-2, -1))
        rcond = xp.astype(regular, self.d.dtype)
        return Inverse(lambda b: b / d, lambda b: b / d, rcond)


class BlockDiagonal(NamedTuple):
    """Blocks (..., n/s, s, s) of equal size s along the diagonal."""

    blocks: Array

    def transpose(self) -> BlockDiagonal:
        """``Hᵀ``."""
        return BlockDiagonal(namespace_of(self.blocks).matrix_transpose(self.blocks))

    def times(self, v: Array) -> Array:
        """``H V``."""
        return self._of_parts(lambda parts: self.blocks @ parts)(v)

    def size_times(self, v: Array) -> Array:
        """``|H| |V|``."""
        xp = namespace_of(v)
        return self._of_parts(lambda parts: xp.abs(self.blocks) @ xp.abs(parts))(v)

    def inverse(self) -> Inverse:
        """``H⁻¹``, block by block."""
        each = Dense(self.blocks).inverse()
        rcond = namespace_of(self.blocks).min(each.rcond, axis=-1)
        return Inverse(self._of_parts(each.solve), self._of_parts(each.solve_transposed), rcond)

    def _of_parts(self, function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """Apply a function to the rows of each block, for which the blocks are one more batch axis."""

        def apply(b: Array) -> Array:
            xp = namespace_of(b)
            return xp.reshape(function(xp.reshape(b, (*self.blocks.shape[:-1], b.shape[-1]))), b.shape)

        return apply


class DiagonalPlusLowRank(NamedTuple):
    """``H = diag(d) + U Vᵀ``: d (..., n) without zeros, U and V (..., n, r), ``V = U`` where it is not given."""

    d: Array
    u: Array
    v: Array | None = None

    def transpose(self) -> DiagonalPlusLowRank:
        """``Hᵀ``."""
        return self if self.v is None else DiagonalPlusLowRank(self.d, self.v, self.u)

    def times(self, v: Array) -> Array:
        """``H V``."""
        return self.d[..., None] * v + self.u @ (self._right() @ v)

    def size_times(self, v: Array) -> Array:
        """An upper bound of ``|H| |V|`` that takes no n×n matrix."""
        xp = namespace_of(v)
        return Diagonal(self.d).size_times(v) + xp.abs(self.u) @ (xp.abs(self._right()) @ xp.abs(v))

    def inverse(self) -> Inverse:
        """``H⁻¹ = D⁻¹ − D⁻¹U (I + Vᵀ D⁻¹ U)⁻¹ Vᵀ D⁻¹`` (Woodbury)."""
        xp, v_t = namespace_of(self.d), self._right()
        d = Diagonal(self.d).inverse()
        d_u, d_v = d.solve(self.u), d.solve(xp.matrix_transpose(v_t))
        # Only a system of order r is left to solve.
        one = dense.identity(v_t.shape[-2], d_u)
        small = Dense(one + v_t @ d_u).inverse(size=one + xp.abs(v_t) @ xp.abs(d_u))

        def solve(b: Array) -> Array:
            d_b = d.solve(b)
            return d_b - d_u @ small.solve(v_t @ d_b)

        def solve_transposed(b: Array) -> Array:
            d_b = d.solve(b)
            return d_b - d_v @ small.solve_transposed(xp.matrix_transpose(self.u) @ d_b)

        return Inverse(solve, solve_transposed, xp.minimum(d.rcond, small.rcond))

    def _right(self) -> Array:
        """``Vᵀ``."""
        return namespace_of(self.d).matrix_transpose(self.u if self.v is None else self.v)


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

    def transpose(self) -> Products:
        """``Hᵀ``."""
        return self

    def times(self, v: Array) -> Array:
        """``H V``."""
        return namespace_of(v).stack([self.apply(v[..., j]) for j in range(v.shape[-1])], axis=-1)

    def size_times(self, v: Array) -> Array:
        """``|H V|``, for want of ``|H| |V|``."""
        return namespace_of(v).abs(self.times(v))


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


# --- scales and sizes of matrices -------------------------------------------------------------------------------------


def _scales(x: Array) -> tuple[Array, Array]:
    """Return powers of two that bring rows and columns of ``(..., n, n)`` to about unit length.

    Ones stand for rows of zeros.
    """
    xp = namespace_of(x)
    # The first sweep works with the largest entries, whose squares may leave the range of exponents.
    rows = 1 / power_of_two_below(xp.max(xp.abs(x), axis=-1))
    columns = 1 / power_of_two_below(xp.max(xp.abs(rows[..., None] * x), axis=-2))
    a = rows[..., None] * x * columns[..., None, :]
    more = 1 / power_of_two_below(xp.sqrt(xp.sum(a * a, axis=-1)))
    a = more[..., None] * a
    return rows * more, columns / power_of_two_below(xp.sqrt(xp.sum(a * a, axis=-2)))


def _largest_singular_value(a: Array) -> Array:
    """Return ``‖A‖₂`` of a scaled matrix, from below and to about 10 %, by three steps of the power method."""
    xp = namespace_of(a)
    v = singularity.probe(a[..., 0, :])[..., None]
    for _ in range(3):
        v = xp.matrix_transpose(a) @ (a @ v)
        length = xp.sqrt(xp.sum(v * v, axis=-2, keepdims=True))
        v = v / xp.where(length > 0, length, xp.ones_like(length))
    return xp.sqrt(xp.sum((a @ v) ** 2, axis=(-2, -1)))
