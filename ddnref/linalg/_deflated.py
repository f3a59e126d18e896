"""Conjugate gradients on the complement of known eigenvectors.

For the rows v_i of V, orthonormal eigenvectors of A at the end of its spectrum, and ``P = I − Vᴴ V``,

    σ_i (λ_i I − A) x_i = P b_i   on range(P)

is positive definite with ``σ_i = ±1``: all other eigenvalues lie on one side of each λ_i. For the largest magnitudes
too, where the wanted ones may lie at both ends and the rest between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, as_dtype, conj, namespace_of
from ddnref._core.loops import LoopOptions, WhileLoop
from ddnref._kernels.dense import identity, solve
from ddnref.krylov._cg import solve_from_zero
from ddnref.krylov._system import ITERATION_LIMIT
from ddnref.operators._blocks import SelfAdjoint, inner, without


class Shifted(NamedTuple):
    """The k systems: eigenpairs as rows, the signs, and what preconditions them."""

    a: SelfAdjoint
    w: Array
    v: Array
    sign: Array
    w_rest: Array | None
    rest: Array | None


class Solution(NamedTuple):
    """One solution a row."""

    x: Array
    n_iter: Array
    positive: Array
    """Whether no direction of negative or no curvature was met."""


def shifted(s: Shifted, x: Array) -> Array:
    """``σ_i P (λ_i I − A) x_i``."""
    return as_dtype(s.sign, x)[..., None] * without(as_dtype(s.w, x)[..., None] * x - s.a.apply(x), s.v)


def cg(s: Shifted, b: Array, *, rtol: float, maxiter: int, check_every: int, while_loop: WhileLoop | None) -> Solution:
    """Solve for all rows of `b`, which lie in range(P)."""
    options = LoopOptions(rtol, maxiter, check_every, while_loop)
    last = solve_from_zero(
        lambda p: shifted(s, p), b, options, precondition=_preconditioner(s), project=lambda r: without(r, s.v)
    )
    return Solution(last.x, last.n_iter, last.status <= ITERATION_LIMIT)


def _column(x: Array, like: Array) -> Array:
    return as_dtype(x, like)[..., None]


def _preconditioner(s: Shifted) -> Callable[[Array], Array] | None:
    """``z = r + Σ_j u_j (c_i / |λ_i − θ_j| − 1) ⟨u_j, r⟩`` with leftover Ritz pairs: they move to the far end c_i."""
    if s.rest is None or s.w_rest is None or s.rest.shape[-2] == 0:
        return None
    xp = namespace_of(s.v)
    u = s.rest
    gap = xp.abs(s.w[..., :, None] - s.w_rest[..., None, :])
    c = xp.max(gap, axis=-1, keepdims=True)
    factor = as_dtype(xp.where(gap > 0, c / xp.where(gap > 0, gap, xp.ones_like(gap)), xp.ones_like(gap)) - 1, u)
    return lambda r: r + (factor * inner(r, u)) @ u


def direct(s: Shifted, b: Array) -> Array:
    """The same systems from dense factorisations: ``λ_i I − A + σ_i c VᴴV`` is regular and keeps range(P)."""
    xp = array_api_compat.array_namespace(b)
    matrix = s.a.matrix()
    m = s.a.m
    eye = identity(m, b)
    c = xp.max(xp.sum(xp.abs(matrix), axis=-1), axis=-1)[..., None, None, None]
    v_t = xp.matrix_transpose(s.v)
    span = v_t @ conj(s.v)
    shift = _column(s.sign, b)[..., None] * as_dtype(c, b) * span[..., None, :, :]
    x = solve(_column(s.w, b)[..., None] * eye - matrix[..., None, :, :] + shift, b[..., None])
    return _column(s.sign, b) * without(x[..., 0], s.v)
