"""Linear maps as a primitive of JAX, each with its transpose, so that an operation has both modes at every order.

JAX derives reverse mode from forward mode: it transposes the map of tangents. Here that map is the operation's JVP and
its transpose the operation's VJP, not what JAX would make of the JVP. The two are one `LinearMap` in two directions,
and the rules below say how JAX batches, differentiates and compiles it. Only public modules of JAX are used.

A map is linear in `dots`, tangents or cotangents of which those that are zero are ``None``, and depends on `arrays`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ddnref._core.arrays import Array
from ddnref._kernels.jax_versions import typeof

Some = tuple[Array | None, ...]
Flags = tuple[bool, ...]


class Shape(NamedTuple):
    """Shape and dtype of a tangent that need not be there."""

    shape: tuple[int, ...]
    dtype: Any


Apply = Callable[[Some, Some, Flags], Some]
"""``apply(dots, arrays, wanted)``: as many tangents as `wanted` has flags, of which those not wanted do not matter."""
Moved = Callable[[Some, Some, Some, Flags], Some]
"""``moved(dots, arrays, moves, wanted)``: how the results change as the arrays move."""


class LinearMap:
    """A map, how it changes with its arrays, and its transpose. JAX knows it by its identity."""

    transpose: LinearMap
    unchecked: LinearMap
    """This map without the check of its tangents, for one part of a sum that can only be checked as a whole."""

    def __init__(self, apply: Apply, moved: Moved, compiles: bool = False) -> None:
        self.apply, self.moved = apply, moved
        self.run = apply  # for arrays that have values
        self.compiles = compiles
        """Whether JAX may compile the map of a batch."""
        self.mapped = cache(self._mapped)
        self.unchecked = self

    def transposed_by(self, transpose: LinearMap) -> LinearMap:
        """Make two maps the transposes of each other."""
        self.transpose, transpose.transpose = transpose, self
        return self

    def _mapped(self, axes: tuple[int | None, ...]) -> LinearMap:
        """The map of a batch of tangents, and of those arrays whose axis is 0."""
        mapped = _over_a_batch(self, axes)
        mapped.transposed_by(mapped if self.transpose is self else _over_a_batch(self.transpose, axes))
        if self.unchecked is not self:
            mapped.unchecked = self.unchecked.mapped(axes)
            mapped.transpose.unchecked = mapped.unchecked.transpose
        return mapped


def _over_a_batch(one: LinearMap, axes: tuple[int | None, ...]) -> LinearMap:
    def apply(dots: Some, arrays: Some, wanted: Flags) -> Some:
        return jax.vmap(lambda d, a: one.apply(d, a, wanted), in_axes=(0, axes))(dots, arrays)  # type: ignore[no-any-return]

    def moved(dots: Some, arrays: Some, moves: Some, wanted: Flags) -> Some:
        # An array and its move have the same axis.
        mapped = jax.vmap(lambda d, a, m: one.moved(d, a, m, wanted), in_axes=(0, axes, axes))
        return mapped(dots, arrays, moves)  # type: ignore[no-any-return]

    mapped = LinearMap(apply, moved, one.compiles)
    if one.compiles:
        mapped.run = jax.jit(apply, static_argnums=2)
    return mapped


def linear(
    of: LinearMap, dots: Some, arrays: Sequence[Array], shapes: Sequence[Shape], results: Sequence[Shape], wanted: Flags
) -> Some:
    """Apply a map to tangents of the given `shapes`; ``None`` in place of what is zero or not wanted."""
    given = tuple(dot is not None for dot in dots)
    if not any(given) or not any(wanted):
        return (None,) * len(wanted)
    flat = iter(
        linear_p.bind(
            *arrays, *(dot for dot in dots if dot is not None), of=of, count=len(arrays), given=given, wanted=wanted,
            shapes=tuple(shapes), results=tuple(results),
        )
    )  # fmt: skip
    return tuple(next(flat) if want else None for want in wanted)


def shape_of(x: Any) -> Shape:
    """Shape and dtype of an array."""
    return Shape(tuple(x.shape), x.dtype)


def differentiated(
    plain: Callable[[Some, Some, Flags], Some], dots: Some, arrays: Some, moves: Some, wanted: Flags
) -> Some:
    """The derivative of a map in its arrays, taken by JAX from ``plain(dots, arrays, wanted)``."""
    places = [i for i, move in enumerate(moves) if move is not None]

    def at(*values: Array) -> Some:
        own = list(arrays)
        for i, value in zip(places, values, strict=True):
            own[i] = value
        found = plain(dots, tuple(own), wanted)
        return tuple(y if want else None for y, want in zip(found, wanted, strict=True))

    _, found = jax.jvp(at, [arrays[i] for i in places], [moves[i] for i in places])
    return found  # type: ignore[no-any-return]


# --- the primitive ------------------------------------------------------------------------------------------------

linear_p = Primitive("ddnref_linear")
linear_p.multiple_results = True


def _split(operands: Sequence[Any], count: int, given: Flags) -> tuple[tuple[Any, ...], Some]:
    """The arrays, and the tangents with ``None`` where there is none."""
    rest = iter(operands[count:])
    return tuple(operands[:count]), tuple(next(rest) if there else None for there in given)


def _results(found: Some, wanted: Flags, results: Sequence[Shape]) -> list[Array]:
    """Select the results that are wanted; one that does not exist is zero."""
    found = found or (None,) * len(wanted)
    return [
        jnp.zeros(shape, dtype) if y is None else y
        for y, want, (shape, dtype) in zip(found, wanted, results, strict=True)
        if want
    ]


@linear_p.def_impl
def _(*operands: Array, of: LinearMap, count: int, given: Flags, wanted: Flags, results: Any, **_: Any) -> list[Array]:
    arrays, dots = _split(operands, count, given)
    return _results(of.run(dots, arrays, wanted), wanted, results)


@linear_p.def_abstract_eval
def _(*_: Any, wanted: Flags, results: Sequence[Shape], **__: Any) -> list[ShapedArray]:
    return [ShapedArray(shape, dtype) for (shape, dtype), want in zip(results, wanted, strict=True) if want]


def _traced(*operands: Array, of: LinearMap, count: int, given: Flags, wanted: Flags, results: Any, **_: Any) -> Any:
    arrays, dots = _split(operands, count, given)
    return _results(of.apply(dots, arrays, wanted), wanted, results)


mlir.register_lowering(linear_p, mlir.lower_fun(_traced, multiple_results=True))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **parameters: Any) -> tuple[Any, Any]:
    of, count, wanted = parameters["of"], parameters["count"], parameters["wanted"]
    shapes, results = parameters["shapes"], parameters["results"]
    arrays, dots = _split(primals, count, parameters["given"])
    moves = tuple(None if _is_zero(t) else t for t in tangents)
    # The map itself for tangents of what it is linear in, and its derivative in the arrays.
    moves, own = _split(moves, count, parameters["given"])
    in_parts = any(move is not None for move in moves)
    parts = [linear(of.unchecked if in_parts else of, own, arrays, shapes, results, wanted)]
    if in_parts:
        parts.append(of.moved(dots, arrays, moves, wanted) or (None,) * len(wanted))
    out = linear_p.bind(*primals, **parameters)
    sums = [_sum([part[i] for part in parts]) for i, want in enumerate(wanted) if want]
    return out, [ad.Zero(typeof(y).to_tangent_aval()) if s is None else s for y, s in zip(out, sums, strict=True)]


def _sum(terms: Sequence[Array | None]) -> Array | None:
    there = [term for term in terms if term is not None]
    return None if not there else there[0] if len(there) == 1 else there[0] + there[1]


def _is_zero(tangent: Any) -> bool:
    """Whether a tangent is zero by its form; those of flags and integers always are."""
    return isinstance(tangent, ad.Zero) or tangent.dtype == jax.dtypes.float0


def _transpose(cotangents: Sequence[Any], *operands: Any, **parameters: Any) -> list[Any]:
    of, count, given, wanted = (parameters[name] for name in ("of", "count", "given", "wanted"))
    arrays = operands[:count]
    rest = iter(cotangents)
    bars = tuple(next(rest) if want else None for want in wanted)
    bars = tuple(None if bar is None or isinstance(bar, ad.Zero) else bar for bar in bars)
    _, dots = _split(operands, count, given)
    sought = tuple(ad.is_undefined_primal(dot) for dot in dots)
    found = linear(of.transpose, bars, arrays, parameters["results"], parameters["shapes"], sought)
    return [*(None,) * count, *(x_bar for x_bar, there in zip(found, given, strict=True) if there)]


def _batch(operands: Sequence[Any], axes: Sequence[int | None], **parameters: Any) -> tuple[Any, list[int]]:
    count = parameters["count"]
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    # All tangents get the axis, so that the transpose, whose results all have it, fits.
    dots = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else x
        for x, axis in zip(moved[count:], axes[count:], strict=True)
    ]
    mapped = parameters["of"].mapped(tuple(None if axis is None else 0 for axis in axes[:count]))
    shapes, results = (
        tuple(Shape((size, *shape), dtype) for shape, dtype in parameters[name]) for name in ("shapes", "results")
    )
    out = linear_p.bind(*moved[:count], *dots, **{**parameters, "of": mapped, "shapes": shapes, "results": results})
    return out, [0] * len(out)


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch
