"""Blocks of vectors: one adapter between operators, matrices and the algorithms that work on several vectors at once.

A block of j vectors is either rows ``(..., j, m)`` or columns ``(..., m, j)``. Krylov methods take rows, where each
vector is contiguous: a product of a block with a basis reads both in the order in which they lie in memory. Gram
matrices take columns. An operator takes neither, but several right-hand sides as leading axes, ``(j, ..., *shape)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, adjoint, conj, is_complex, library, namespace, namespace_of
from ddnref._core.checks import check_dtypes, check_shapes, check_square
from ddnref._kernels.dense import gram as gram_of
from ddnref._kernels.dense import hermitian_part, identity, move_axis, symmetrised
from ddnref._kernels.vectors import norm, real_dot
from ddnref.operators._operator import LinearOperator, batch_axes, check_ending

Pieces: TypeAlias = tuple[Array, ...]
Factor: TypeAlias = Array | Sequence[Array] | LinearOperator
COLUMNS = 64  # columns of an operator that are made at once: more take more memory, fewer take more calls


# --- self-adjoint maps on rows --------------------------------------------------------------------------------------


class SelfAdjoint(NamedTuple):
    """A self-adjoint map on blocks of rows."""

    apply: Callable[[Array], Array]
    """The map of rows ``(..., j, m)``, each of which is replaced by its image."""
    batch: tuple[int, ...]
    shape: tuple[int, ...]
    """Shape of one vector."""
    like: Array
    """An array with the dtype of the vectors, on their device."""
    metric: Callable[[Array], Array] | None = None
    """The map B of rows in whose inner product ``⟨x, B y⟩`` the map is self-adjoint; ``None`` for the identity."""

    @property
    def m(self) -> int:
        """Entries of a vector."""
        return math.prod(self.shape)

    def inner(self, y: Array, q: Array) -> Array:
        """``h_ji = ⟨q_i, y_j⟩`` in the inner product of the map, ``(..., j, i)``."""
        return inner(y if self.metric is None else self.metric(y), q)

    def norm(self, y: Array) -> Array:
        """Length of each row in the inner product of the map."""
        return norm(y) if self.metric is None else real_dot(y, self.metric(y)) ** 0.5

    def without(self, y: Array, q: Array) -> Array:
        """Rows y less their part in the span of rows q that are orthonormal in the inner product of the map."""
        return y - self.inner(y, q) @ q

    def rows(self, v: Array) -> Array:
        """Columns ``(..., *shape, j)`` as rows ``(..., j, m)``."""
        xp = array_api_compat.array_namespace(v)
        return xp.matrix_transpose(xp.reshape(v, (*self.batch, self.m, v.shape[-1])))

    def columns(self, rows: Array) -> Array:
        """The inverse of `rows`."""
        xp = array_api_compat.array_namespace(rows)
        return xp.reshape(xp.matrix_transpose(rows), (*self.batch, *self.shape, rows.shape[-2]))

    def vectors(self, rows: Array) -> Array:
        """Rows ``(..., j, m)`` as an operator takes them, ``(j, ..., *shape)``."""
        xp = array_api_compat.array_namespace(rows)
        return xp.reshape(move_axis(rows, -2, 0), (rows.shape[-2], *self.batch, *self.shape))

    def matrix(self) -> Array:
        """The map as a matrix ``(..., m, m)``, exactly Hermitian."""
        xp = array_api_compat.array_namespace(self.like)
        # The image of the identity has the columns of A as rows.
        eye = identity(self.m, self.like)
        return hermitian_part(xp.matrix_transpose(self.apply(xp.broadcast_to(eye, (*self.batch, self.m, self.m)))))


def self_adjoint(a: Array | LinearOperator, function: str, like: Array | None = None) -> SelfAdjoint:
    """The map of a matrix (its Hermitian part) or of a self-adjoint operator, validated.

    `like`, a vector ``(..., *shape)``, gives an operator batch axes and a dtype that its parameters may lack.
    """
    if isinstance(a, LinearOperator):
        return _of_operator(a, function, like)
    xp = namespace(x=a)
    check_square("x", a)
    if like is not None:
        check_dtypes(v0=(like, a.dtype))
        check_shapes(v0=(like, tuple(a.shape[:-1])))
    s = symmetrised(a)
    s_t = xp.matrix_transpose(s) if is_complex(s) else s  # rows q ↦ q Sᵀ; BLAS is faster untransposed
    return SelfAdjoint(lambda q: q @ s_t, tuple(a.shape[:-2]), (a.shape[-1],), a)


def _of_operator(a: LinearOperator, function: str, like: Array | None) -> SelfAdjoint:
    if not a.self_adjoint or a.domain_shape != a.range_shape:
        raise ValueError(
            f"{function} needs a self-adjoint operator, but self_adjoint is {a.self_adjoint}, domain_shape "
            f"{a.domain_shape}, range_shape {a.range_shape}. Set self_adjoint=True only if A = Aᴴ for all parameters."
        )
    namespace(**{f"params[{i}]": parameter for i, parameter in enumerate(a.params)}, v0=like)
    # One product shows the batch axes and the dtype of all images.
    if like is not None:
        check_ending("A vector", like, a.domain_shape)
    batch, image = batch_axes(a, like)

    def apply(q: Array) -> Array:
        xp = array_api_compat.array_namespace(q)
        if q.shape[-2] == 1:  # a product with a network takes 1.3 times as long with one more axis
            return xp.reshape(a(xp.reshape(q, (*batch, *a.domain_shape))), q.shape)
        # The rows become one more leading axis, in front of the batch axes.
        lead = move_axis(q, -2, 0) if batch else q
        y = a(xp.reshape(lead, (q.shape[-2], *batch, *a.domain_shape)))
        y = xp.reshape(y, lead.shape)
        return move_axis(y, 0, -2) if batch else y

    return SelfAdjoint(apply, batch, a.domain_shape, image)


def inner(y: Array, q: Array) -> Array:
    """``h_ji = ⟨q_i, y_j⟩``, ``(..., j, i)``: the coefficients of rows y in orthonormal rows q."""
    return conj(conj(y) @ namespace_of(y).matrix_transpose(q))


def without(y: Array, q: Array) -> Array:
    """Rows y less their part in the span of orthonormal rows q."""
    return y - inner(y, q) @ q


# --- tall factors and their columns ---------------------------------------------------------------------------------


class Tall(NamedTuple):
    """A tall factor V with n columns, by its products with columns ``(..., n, j)`` and pieces ``(..., D_l, j)``.

    The rows of V may be spread over pieces, such as the parameters of one layer each, because ``VᴴV = Σ_l V_lᴴ V_l``;
    and an operator never stores V.
    """

    n: int
    rows: int
    """The number of entries of a column; the rank is at most ``min(rows, n)``."""
    like: Array
    batch: tuple[int, ...]
    gram: Callable[[], Array]
    """``VᴴV``, ``(..., n, n)``, exactly Hermitian; in double precision where V is an array and the device has it."""
    apply: Callable[[Array], Pieces]
    """``V u``."""
    adjoint: Callable[[Pieces], Array]
    """``Vᴴ e``."""
    outer: Callable[[Pieces, Array], Pieces]
    """``outer(a, b)``: the cotangents of the arrays that define V if the cotangent of V is ``a bᴴ``, b with n rows."""
    times: Callable[[Array], Pieces]
    """The cotangents of the arrays that define V if the cotangent of V is ``V x``, x an n×n matrix."""
    split: Callable[[Any, str], Pieces]
    """Validate vectors in the caller's form and split them into pieces."""
    join: Callable[[Pieces], Any]
    """Join pieces to vectors in the caller's form, a tuple for several pieces."""
    join_bar: Callable[[Pieces], Any]
    """Bring cotangents to the caller's form, a tuple for the parameters of an operator."""


def tall(factor: Factor) -> Tall:
    """Validate a factor and return its products."""
    if isinstance(factor, LinearOperator):
        return _tall_operator(factor)
    if isinstance(factor, (list, tuple)):
        return _tall_pieces(tuple(factor), [f"factor[{i}]" for i in range(len(factor))], tuple)
    return _tall_pieces((factor,), ["factor"], None)


def _tall_pieces(pieces: Pieces, names: list[str], join: Callable[[Pieces], Any] | None) -> Tall:
    """The products of an array, or of pieces that lie on top of each other."""
    if not pieces:
        raise ValueError("factor is an empty list: pass at least one piece of shape (..., D, n).")
    namespace(**dict(zip(names, pieces, strict=True)))
    if any(piece.ndim < 2 for piece in pieces):
        shapes = " and ".join(str(tuple(piece.shape)) for piece in pieces)
        raise ValueError(f"factor has shape {shapes}, expected (..., D, n): vectors are columns.")
    # All pieces have the batch axes, the columns and the dtype of the first.
    batch, n = tuple(pieces[0].shape[:-2]), pieces[0].shape[-1]
    for name, piece in zip(names, pieces, strict=True):
        check_shapes(**{name: (piece, (*batch, piece.shape[-2], n))})
        check_dtypes(**{name: (piece, pieces[0].dtype)})

    def gram() -> Array:
        products = [gram_of(piece) for piece in pieces]
        return sum(products[1:], products[0])

    def times_adjoint(e: Pieces) -> Array:
        terms = [adjoint(v) @ e_l for v, e_l in zip(pieces, e, strict=True)]
        return sum(terms[1:], terms[0])

    def split(vectors: Any, name: str) -> Pieces:
        # A bare array for a bare factor, else one array for each piece
        given = (vectors,) if join is None else tuple(vectors)
        if len(given) != len(pieces):
            raise ValueError(f"{name} has {len(given)} pieces, the factor {len(pieces)}.")
        library(**{f"{name}[{i}]" if len(given) > 1 else name: e for i, e in enumerate(given)}, factor=pieces[0])
        for e, v in zip(given, pieces, strict=True):
            check_dtypes(**{name: (e, v.dtype)})
            check_shapes(**{name: (e, (*v.shape[:-1], e.shape[-1] if e.ndim else 0))})
        return given

    def apply(u: Array) -> Pieces:
        return tuple(v @ u for v in pieces)

    # The caller's form of vectors: as many arrays as the factor was given
    joined = (lambda pieces: pieces[0]) if join is None else join
    return Tall(
        n=n,
        rows=sum(piece.shape[-2] for piece in pieces),
        like=pieces[0],
        batch=batch,
        gram=gram,
        apply=apply,
        adjoint=times_adjoint,
        outer=lambda a, b: tuple(a_l @ adjoint(b) for a_l in a),
        times=apply,
        split=split,
        join=joined,
        join_bar=joined,
    )


def _tall_operator(v: LinearOperator) -> Tall:
    """The products of an operator, whose columns are made a few at a time."""
    xp = namespace(**{f"factor.params[{i}]": parameter for i, parameter in enumerate(v.params)})
    n, rows = v.size, math.prod(v.range_shape)
    batch, like = batch_axes(v, name="factor")
    # The columns of the identity, of which products with V are made
    eye = xp.broadcast_to(identity(n, like), (*batch, n, n))

    def leading(u: Array, shape: tuple[int, ...]) -> Array:
        """Columns ``(..., m, j)`` as ``(j, ..., *shape)``."""
        return xp.reshape(xp.moveaxis(u, -1, 0), (u.shape[-1], *batch, *shape))

    def columns(y: Array) -> Array:
        return xp.moveaxis(xp.reshape(y, (y.shape[0], *batch, -1)), 0, -1)

    def apply(u: Array) -> Array:
        return columns(v(leading(u, v.domain_shape)))

    def times_adjoint(e: Array) -> Array:
        return columns(v.adjoint(v.params, leading(e, v.range_shape)))

    def gram() -> Array:
        # A few columns at a time bound the memory.
        blocks = [times_adjoint(apply(eye[..., i : min(i + COLUMNS, n)])) for i in range(0, n, COLUMNS)]
        return hermitian_part(blocks[0] if len(blocks) == 1 else xp.concat(blocks, axis=-1))

    def outer(a: Array, b: Array) -> Pieces:
        # Each parameter gets the sum over the columns.
        return v.params_vjp(v.params, leading(a, v.range_shape), leading(b, v.domain_shape))

    def split(vectors: Array, name: str) -> Pieces:
        namespace(**{name: vectors, "factor": like})
        k = vectors.shape[-1] if vectors.ndim else 0
        check_shapes(**{name: (vectors, (*batch, *v.range_shape, k))})
        return (xp.reshape(vectors, (*batch, rows, k)),)  # an operator is a single piece

    return Tall(
        n=n,
        rows=rows,
        like=like,
        batch=batch,
        gram=gram,
        apply=lambda u: (apply(u),),
        adjoint=lambda e: times_adjoint(e[0]),
        outer=lambda a, b: outer(a[0], b),
        times=lambda x: outer(apply(x), eye),
        split=split,
        join=lambda pieces: xp.reshape(pieces[0], (*batch, *v.range_shape, pieces[0].shape[-1])),
        join_bar=tuple,
    )
