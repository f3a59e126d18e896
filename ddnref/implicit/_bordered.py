"""Linear systems of declarative nodes: a structured Hessian, bordered by the constraints that are active.

    [ H  −Cᵀ ] [ w ]   [ a ]
    [ C   0  ] [ η ] = [ c ]

Dense Hessians may be singular where the bordered matrix is not; structured ones are eliminated first and may not.
Vectors of the system are (..., n + p): w and η in one array.
"""

from __future__ import annotations

from typing import NamedTuple

from ddnref._core.arrays import Array, eps, namespace_of, nan_where, power_of_two_below
from ddnref._core.loops import LoopOptions
from ddnref._kernels import dense
from ddnref._kernels.vectors import safe_norm
from ddnref.implicit._structures import Dense, Inverse, Products, Structure
from ddnref.krylov._cg import solve_from_zero
from ddnref.krylov._system import ITERATION_LIMIT

ROUGH = 1e-3
"""Relative residual of conjugate gradients for a correction, of which the leading digits count."""


class Bordered(NamedTuple):
    """The matrix above; for p = 0 it is H. In place of a constraint that is not active stands ``free_j η_j = 0``."""

    h: Structure
    c: Array  # (..., p, n): C, with zeros in the rows that are not active
    free: Array  # (..., p): zero in the rows that are active, positive in the others

    def times(self, x: Array) -> Array:
        """The product with a vector."""
        return self._times(x, transposed=False)

    def adjoint_times(self, x: Array) -> Array:
        """The product with the adjoint, in which −η stands for η: only H is transposed."""
        return self._times(x, transposed=True)

    def _times(self, x: Array, transposed: bool) -> Array:
        xp, (w, eta) = namespace_of(x), self.parts(x[..., None])
        top = (self.h.transpose() if transposed else self.h).times(w) - xp.matrix_transpose(self.c) @ eta
        return xp.concat([top, self.c @ w + self.free[..., None] * eta], axis=-2)[..., 0]

    def size_times(self, x: Array, *, transposed: bool = False) -> Array:
        """The product of the absolute values, for the matrix or its adjoint."""
        xp, (w, eta) = namespace_of(x), self.parts(namespace_of(x).abs(x)[..., None])
        c = xp.abs(self.c)
        top = (self.h.transpose() if transposed else self.h).size_times(w) + xp.matrix_transpose(c) @ eta
        return xp.concat([top, c @ w + self.free[..., None] * eta], axis=-2)[..., 0]

    def parts(self, x: Array) -> tuple[Array, Array]:
        """``w`` and ``η`` of (..., n + p, k)."""
        n = self.c.shape[-1]
        return x[..., :n, :], x[..., n:, :]

    def inverse(self, softness: Array | None = None, *, scaled: bool = True) -> Direct | ConjugateGradients:
        """Return the inverse; rows and columns are scaled first, or taken as they are.

        `softness` (..., p) is added to the zeros of the diagonal, relative to ``‖C_j‖² / ‖H‖``. It makes the matrix
        regular where constraints repeat each other, and changes its solutions by as much.
        """
        xp, diagonal = namespace_of(self.c), self.free
        if softness is not None and self.c.shape[-2]:
            unit = 1 if isinstance(self.h, Products) else stiffness(self.h, self.c[..., 0, :])[..., None]
            diagonal = diagonal + softness * safe_norm(self.c) ** 2 / unit
        if isinstance(self.h, Products):
            return ConjugateGradients(self.h, self.c, diagonal)
        if self.c.shape[-2] == 0:
            return Direct(self.h.inverse(), self)
        if isinstance(self.h, Dense):
            top = xp.concat([self.h.x, -xp.matrix_transpose(self.c)], axis=-1)
            bottom = xp.concat([self.c, _diagonal_matrix(diagonal)], axis=-1)
            return Direct(Dense(xp.concat([top, bottom], axis=-2)).inverse(scaled=scaled), self)
        return Direct(_schur(self.h, self.c, diagonal, scaled), self)


class Direct:
    """The inverse of a bordered matrix whose Hessian is an array or a structure."""

    def __init__(self, inverse: Inverse, of: Bordered) -> None:
        xp = namespace_of(inverse.rcond)
        self._inverse, self._is_whole = inverse, of.c.shape[-2] == 0
        self.rcond, self.limited = inverse.rcond, xp.zeros_like(inverse.rcond) > 0
        self._of = of

    def solve(self, b: Array, *, rough: bool = False) -> Array:  # noqa: ARG002
        """Solve for a vector; NaN where the matrix is singular."""
        return self._inverse.solve(b[..., None])[..., 0]

    def solve_adjoint(self, b: Array, *, rough: bool = False) -> Array:
        """Solve with the adjoint. With constraints H is symmetric, and the adjoint is the matrix itself."""
        return self._inverse.solve_transposed(b[..., None])[..., 0] if self._is_whole else self.solve(b, rough=rough)

    def reaction(self) -> Array:
        """Return the answer of each multiplier to a change of its constraint, (..., p)."""
        xp, (p, n) = namespace_of(self._of.c), self._of.c.shape[-2:]
        unit = dense.identity(p, self._of.c) + xp.zeros_like(self._of.free[..., None])
        right = xp.concat([xp.zeros_like(xp.matrix_transpose(self._of.c)), unit], axis=-2)
        return xp.abs(xp.linalg.diagonal(self._inverse.solve(right)[..., n:, :]))

    def spans(self, c: Array) -> Array:
        """Whether each row of c (..., p, n) is a combination of the active constraints, (..., p)."""
        xp = namespace_of(c)
        right = xp.concat([xp.matrix_transpose(c), xp.zeros_like(c @ xp.matrix_transpose(c))], axis=-2)
        free = self._inverse.solve(right)[..., : c.shape[-1], :]  # the part of each row along which y may move
        length = xp.sqrt(xp.sum(free * free, axis=-2)) * stiffness(self._of.h, c[..., 0, :])[..., None]
        return length <= eps(xp, c.dtype) ** 0.5 * safe_norm(c)


def _schur(h: Structure, c: Array, diagonal: Array, scaled: bool) -> Inverse:
    """Eliminate w: ``(C H⁻¹ Cᵀ) η = c − C H⁻¹ a``, then ``w = H⁻¹ (a + Cᵀ η)``."""
    xp, n = namespace_of(c), c.shape[-1]
    h_inv = h.inverse()  # type: ignore[union-attr]
    h_c = h_inv.solve(xp.matrix_transpose(c))
    # Rows of constraints that are not active are zero, and have a one on the diagonal.
    free = _diagonal_matrix(diagonal)
    small = Dense(c @ h_c + free).inverse(scaled=scaled, size=xp.abs(c) @ xp.abs(h_c) + free)

    def solve(b: Array) -> Array:
        h_a = h_inv.solve(b[..., :n, :])
        eta = small.solve(b[..., n:, :] - c @ h_a)
        return xp.concat([h_a + h_c @ eta, eta], axis=-2)

    return Inverse(solve, solve, xp.minimum(h_inv.rcond, small.rcond))


class ConjugateGradients:
    """Conjugate gradients in the null space of C: ``P H P z = P (a − H w₀)``, ``w₀ = Cᵀ (C Cᵀ)⁻¹ c``."""

    def __init__(self, h: Products, c: Array, diagonal: Array) -> None:
        xp = namespace_of(c)
        self._h, self._c = h, c
        self._gram = Dense(c @ xp.matrix_transpose(c) + _diagonal_matrix(diagonal)).inverse() if c.shape[-2] else None
        flags = xp.zeros_like(c[..., 0, 0] if c.shape[-2] else xp.sum(c, axis=(-2, -1))) > 0
        self.limited = flags
        """Items for which a solve has reached its limit; such solutions are NaN."""
        one = xp.astype(~flags, c.dtype)
        self.rcond = one if self._gram is None else self._gram.rcond
        """The reciprocal condition number of ``C Cᵀ``, because that of H is not known."""

    def solve(self, b: Array, *, rough: bool = False) -> Array:
        """Solve for a vector; NaN where a direction has no positive curvature."""
        xp, h, c = namespace_of(b), self._h, self._c
        n, p, c_t = c.shape[-1], c.shape[-2], xp.matrix_transpose(c)
        unit = eps(xp, b.dtype)

        def gram(v: Array) -> Array:
            assert self._gram is not None  # noqa: S101
            return self._gram.solve(v[..., None])[..., 0]

        def project(v: Array) -> Array:
            return v - dense.matvec(c_t, gram(dense.matvec(c, v))) if p else v

        # Scale each right-hand side, whose squares could leave the range of exponents otherwise.
        size = power_of_two_below(xp.max(xp.abs(b), axis=-1, keepdims=True))
        a, rest = b[..., :n] / size, b[..., n:] / size
        # The shortest w that satisfies the constraints, and the rest in their null space.
        w_0 = dense.matvec(c_t, gram(rest)) if p else xp.zeros_like(a)
        whole = a - h.apply(w_0) if p else a
        right = project(whole)
        # What is left of a right-hand side that the constraints balance is rounding.
        is_rounding = safe_norm(right) <= 8 * unit * safe_norm(whole)
        right = xp.where(is_rounding[..., None], xp.zeros_like(right), right)
        rtol = 64 * unit if h.rtol is None else h.rtol
        options = LoopOptions(
            max(rtol, ROUGH) if rough else rtol,
            10 * n if h.maxiter is None else h.maxiter,
            h.check_every,
            h.while_loop,
        )
        end = solve_from_zero(lambda v: project(h.apply(v)), right, options)
        w = w_0 + end.x
        # The multipliers balance the part of the residual that the null space cannot.
        eta = gram(dense.matvec(c, h.apply(w) - a)) if p else rest
        x = xp.concat([w, eta], axis=-1) * size
        if rough:  # as far as it goes: a correction may be nothing but rounding
            return x
        self.limited = self.limited | (end.status == ITERATION_LIMIT)
        # Beyond the limit: no positive curvature, or not finite.
        return nan_where((end.status >= ITERATION_LIMIT)[..., None], x)

    solve_adjoint = solve

    def reaction(self) -> Array:
        """Return the answer of each multiplier to a change of its constraint, with the identity for H."""
        xp, p = namespace_of(self._c), self._c.shape[-2]
        assert self._gram is not None  # noqa: S101
        unit = dense.identity(p, self._c) + xp.zeros_like(self._c[..., :1])
        return xp.abs(xp.linalg.diagonal(self._gram.solve(unit))) * safe_norm(self._c)

    def spans(self, c: Array) -> Array:
        """Whether each row of c is a combination of the active constraints: no, for want of a cheap test."""
        return namespace_of(c).isnan(c[..., 0])


def stiffness(h: Structure, like: Array) -> Array:
    """Return the largest ``Σ_j |H_ij|``, (...), which is one for a Hessian of zeros."""
    xp = namespace_of(like)
    size = xp.max(h.size_times(xp.ones_like(like)[..., None])[..., 0], axis=-1)
    return xp.where(size == 0, xp.ones_like(size), size)


def lengths_of(h_y: Array) -> Array:
    """Lengths of the gradients of the constraints, with one for zero."""
    xp, norms = namespace_of(h_y), safe_norm(h_y)
    return xp.where(norms > 0, norms, xp.ones_like(norms))


def _diagonal_matrix(d: Array) -> Array:
    return d[..., None] * dense.identity(d.shape[-1], d)
