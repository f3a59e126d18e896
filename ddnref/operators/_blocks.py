"""Vectors as rows: what Krylov methods ask of a dense matrix and of an operator alike.

A block of j vectors is ``(..., j, m)``, each vector contiguous: a product of a block with a basis reads both in the
order in which they lie in memory, and one vector is a block of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, conj, full, is_complex, namespace, namespace_of
from ddnref._core.checks import check_dtypes, check_shapes, check_square
from ddnref._kernels import numpy as _numpy
from ddnref._kernels.dense import hermitian_part, identity
from ddnref.operators import LinearOperator


class SelfAdjoint(NamedTuple):
    """A self-adjoint map on blocks of rows."""

    apply: Callable[[Array], Array]
    """From ``(..., j, m)`` to ``(..., j, m)``, each row replaced by its image."""
    batch: tuple[int, ...]
    shape: tuple[int, ...]
    """Of one vector."""
    like: Array
    """An array of the vectors' dtype, on their device."""

    @property
    def m(self) -> int:
        """Entries of a vector."""
        return math.prod(self.shape)

    def rows(self, v: Array) -> Array:
        """Columns ``(..., *shape, j)`` as rows ``(..., j, m)``."""
        xp = array_api_compat.array_namespace(v)
        return xp.matrix_transpose(xp.reshape(v, (*self.batch, self.m, v.shape[-1])))

    def columns(self, rows: Array) -> Array:
        """The inverse of `rows`."""
        xp = array_api_compat.array_namespace(rows)
        return xp.reshape(xp.matrix_transpose(rows), (*self.batch, *self.shape, rows.shape[-2]))

    def matrix(self) -> Array:
        """The map as a matrix ``(..., m, m)``, exactly Hermitian."""
        xp = array_api_compat.array_namespace(self.like)
        eye = identity(self.m, self.like)
        return hermitian_part(xp.matrix_transpose(self.apply(xp.broadcast_to(eye, (*self.batch, self.m, self.m)))))


def self_adjoint(a: Array | LinearOperator, function: str, like: Array | None = None) -> SelfAdjoint:
    """The map of a matrix (its Hermitian part) or of a self-adjoint operator.

    `like`, a vector ``(..., *shape)``, tells an operator's batch axes and dtype where its parameters do not.
    """
    if isinstance(a, LinearOperator):
        return _of_operator(a, function, like)
    xp = namespace(x=a)
    check_square("x", a)
    if like is not None:
        check_dtypes(v0=(like, a.dtype))
        check_shapes(v0=(like, tuple(a.shape[:-1])))
    s = _numpy.symmetrised(a) if array_api_compat.is_numpy_array(a) else hermitian_part(a)
    s_t = xp.matrix_transpose(s) if is_complex(s) else s  # rows q ↦ q Sᵀ; BLAS is faster untransposed
    return SelfAdjoint(lambda q: q @ s_t, tuple(a.shape[:-2]), (a.shape[-1],), a)


def _of_operator(a: LinearOperator, function: str, like: Array | None) -> SelfAdjoint:
    if not a.self_adjoint or a.domain_shape != a.range_shape:
        raise ValueError(
            f"{function} needs a self-adjoint operator, but self_adjoint is {a.self_adjoint}, domain_shape "
            f"{a.domain_shape}, range_shape {a.range_shape}. Set self_adjoint=True only if A = Aᴴ for all parameters."
        )
    given = {f"params[{i}]": parameter for i, parameter in enumerate(a.params)}
    namespace(**given, v0=like)
    n = len(a.domain_shape)
    if like is not None and tuple(like.shape[like.ndim - n :]) != tuple(a.domain_shape):
        raise ValueError(f"A vector has shape {tuple(like.shape)}, expected (..., *{tuple(a.domain_shape)}).")
    y = a(full(a.domain_shape, 0.0, a.params[0]) if like is None else like)
    batch = tuple(y.shape[: y.ndim - n])
    check_shapes(**{"operator.apply(params, v)": (y, (*batch, *a.domain_shape))})

    def apply(q: Array) -> Array:  # several right-hand sides are one more leading axis
        xp = array_api_compat.array_namespace(q)
        j = q.shape[-2]
        lead = xp.moveaxis(q, -2, 0) if batch else q
        y = a(xp.reshape(lead, (j, *batch, *a.domain_shape)))
        y = xp.reshape(y, lead.shape)
        return xp.moveaxis(y, 0, -2) if batch else y

    return SelfAdjoint(apply, batch, a.domain_shape, y)


# --- products of rows ------------------------------------------------------------------------------------------


def inner(y: Array, q: Array) -> Array:
    """``h_ji = ⟨q_i, y_j⟩``, ``(..., j, i)``: the coefficients of rows y in orthonormal rows q."""
    return conj(conj(y) @ namespace_of(y).matrix_transpose(q))


def without(y: Array, q: Array) -> Array:
    """Rows y less their part in the span of orthonormal rows q."""
    return y - inner(y, q) @ q
