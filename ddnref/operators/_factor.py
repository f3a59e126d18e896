"""A tall factor V by what its Gram matrix asks of it: an array, pieces stacked on top of each other, or an operator.

``V`` has n columns. Its rows may be spread over pieces, such as the parameters of one layer each, because
``VᴴV = Σ_l V_lᴴ V_l``; and an operator never stores it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from ddnref._core.arrays import Array, Namespace, full, library, namespace
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._kernels.dense import adjoint, hermitian_part, hermitian_product, identity
from ddnref.operators import LinearOperator

Pieces: TypeAlias = tuple[Array, ...]
Factor: TypeAlias = Array | Sequence[Array] | LinearOperator
COLUMNS = 64  # of an operator that are made at once: the memory that its Gram matrix takes


class Tall(NamedTuple):
    """The products with V of the Gram route: of columns ``(..., n, j)`` and of pieces ``(..., D_l, j)``."""

    n: int
    rows: int
    """The number of entries of a column: the rank is at most ``min(rows, n)``."""
    like: Array
    batch: tuple[int, ...]
    gram: Callable[[], Array]
    """``VᴴV``, ``(..., n, n)``, exactly Hermitian."""
    apply: Callable[[Array], Pieces]
    """``V u``."""
    adjoint: Callable[[Pieces], Array]
    """``Vᴴ e``."""
    outer: Callable[[Pieces, Array], Pieces]
    """``outer(a, b)``: the cotangents of what V is made of if that of V is ``a bᴴ``, b with n rows."""
    times: Callable[[Array], Pieces]
    """The cotangents of what V is made of if that of V is ``V x``, x an n×n matrix."""
    split: Callable[[Any, str], Pieces]
    """Vectors as the caller holds them, checked."""
    join: Callable[[Pieces], Any]
    """Vectors as the caller holds them: pieces in a tuple."""
    join_bar: Callable[[Pieces], Any]
    """Cotangents as the caller holds what they belong to: those of an operator's parameters in a tuple."""


def tall(factor: Factor) -> Tall:
    """The products of a factor, after a look at what it is made of."""
    if isinstance(factor, LinearOperator):
        return _of_operator(factor)
    if isinstance(factor, (list, tuple)):
        return _of_pieces(tuple(factor), [f"factor[{i}]" for i in range(len(factor))], tuple)
    return _of_pieces((factor,), ["factor"], _only)


def _only(pieces: Pieces) -> Array:
    return pieces[0]


def _of_pieces(pieces: Pieces, names: list[str], join: Callable[[Pieces], Any]) -> Tall:
    if not pieces:
        raise ValueError("factor is an empty list: pass at least one piece of shape (..., D, n).")
    namespace(**dict(zip(names, pieces, strict=True)))
    if any(piece.ndim < 2 for piece in pieces):
        raise ValueError(f"factor has shape {_shapes(pieces)}, expected (..., D, n): vectors are columns.")
    batch, n = tuple(pieces[0].shape[:-2]), pieces[0].shape[-1]
    for name, piece in zip(names, pieces, strict=True):
        check_shapes(**{name: (piece, (*batch, piece.shape[-2], n))})
        check_dtypes(**{name: (piece, pieces[0].dtype)})

    def gram() -> Array:
        if len(pieces) == 1:
            return hermitian_product(adjoint(pieces[0]), adjoint(pieces[0]))
        return hermitian_part(sum((adjoint(v) @ v for v in pieces[1:]), adjoint(pieces[0]) @ pieces[0]))

    def split(vectors: Any, name: str) -> Pieces:
        given = (vectors,) if join is _only else tuple(vectors)
        if len(given) != len(pieces):
            raise ValueError(f"{name} has {len(given)} pieces, the factor {len(pieces)}.")
        library(**{f"{name}[{i}]" if len(given) > 1 else name: e for i, e in enumerate(given)}, factor=pieces[0])
        for e, v in zip(given, pieces, strict=True):
            check_dtypes(**{name: (e, v.dtype)})
            check_shapes(**{name: (e, (*v.shape[:-1], e.shape[-1] if e.ndim else 0))})
        return given

    return Tall(
        n=n,
        rows=sum(piece.shape[-2] for piece in pieces),
        like=pieces[0],
        batch=batch,
        gram=gram,
        apply=lambda u: tuple(v @ u for v in pieces),
        adjoint=lambda e: sum((adjoint(v) @ e_l for v, e_l in _pairs(pieces, e)[1:]), adjoint(pieces[0]) @ e[0]),
        outer=lambda a, b: tuple(a_l @ adjoint(b) for a_l in a),
        times=lambda x: tuple(v @ x for v in pieces),
        split=split,
        join=join,
        join_bar=join,
    )


def _pairs(a: Pieces, b: Pieces) -> list[tuple[Array, Array]]:
    return list(zip(a, b, strict=True))


def _shapes(pieces: Pieces) -> str:
    return " and ".join(str(tuple(piece.shape)) for piece in pieces)


class _Columns(NamedTuple):
    """Columns as the operator takes them: as rows, the j of them in front of its batch axes."""

    v: LinearOperator
    batch: tuple[int, ...]
    xp: Namespace

    def domain(self, u: Array) -> Array:
        """``(..., n, j)`` to ``(j, ..., *domain_shape)``."""
        return self.xp.reshape(self.xp.moveaxis(u, -1, 0), (u.shape[-1], *self.batch, *self.v.domain_shape))

    def range(self, e: Array) -> Array:
        """``(..., D, j)`` to ``(j, ..., *range_shape)``."""
        return self.xp.reshape(self.xp.moveaxis(e, -1, 0), (e.shape[-1], *self.batch, *self.v.range_shape))

    def back(self, rows: Array) -> Array:
        """The inverse of both."""
        return self.xp.moveaxis(self.xp.reshape(rows, (rows.shape[0], *self.batch, -1)), 0, -1)

    def apply(self, u: Array) -> Array:
        """``V u``."""
        return self.back(self.v(self.domain(u)))

    def adjoint(self, e: Array) -> Array:
        """``Vᴴ e``."""
        return self.back(self.v.adjoint(self.v.params, self.range(e)))

    def gram(self, eye: Array) -> Array:
        """``VᴴV``, some columns at a time."""
        n = eye.shape[-1]
        blocks = [self.adjoint(self.apply(eye[..., i : min(i + COLUMNS, n)])) for i in range(0, n, COLUMNS)]
        return hermitian_part(blocks[0] if len(blocks) == 1 else self.xp.concat(blocks, axis=-1))

    def outer(self, a: Array, b: Array) -> Pieces:
        """Each parameter gets the sum over the leading axis."""
        return self.v.params_vjp(self.v.params, self.range(a), self.domain(b))


def _of_operator(v: LinearOperator) -> Tall:
    xp = namespace(**{f"factor.params[{i}]": parameter for i, parameter in enumerate(v.params)})
    n, rows = v.size, math.prod(v.range_shape)
    like = v(full(v.domain_shape, 0.0, v.params[0]))
    batch = tuple(like.shape[: like.ndim - len(v.range_shape)])
    check_shapes(**{"factor.apply(params, x)": (like, (*batch, *v.range_shape))})
    columns, eye = _Columns(v, batch, xp), xp.broadcast_to(identity(n, like), (*batch, n, n))

    def split(vectors: Array, name: str) -> Pieces:
        namespace(**{name: vectors, "factor": like})
        k = vectors.shape[-1] if vectors.ndim else 0
        check_shapes(**{name: (vectors, (*batch, *v.range_shape, k))})
        return (xp.reshape(vectors, (*batch, rows, k)),)

    return Tall(
        n=n,
        rows=rows,
        like=like,
        batch=batch,
        gram=lambda: columns.gram(eye),
        apply=lambda u: (columns.apply(u),),
        adjoint=lambda e: columns.adjoint(e[0]),
        outer=lambda a, b: columns.outer(a[0], b),
        times=lambda x: columns.outer(columns.apply(x), eye),
        split=split,
        join=lambda pieces: xp.reshape(pieces[0], (*batch, *v.range_shape, pieces[0].shape[-1])),
        join_bar=tuple,
    )
