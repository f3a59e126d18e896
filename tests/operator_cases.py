"""One operator for each constructor and combination, made of arrays from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import ddnref
from ddnref import LinearOperator

GRID = (4, 5)
Draw = Callable[..., Any]


def draws(rng: np.random.Generator, convert: Callable[[Any], Any], is_complex: bool, dtype: Any) -> tuple[Draw, Draw]:
    """Random arrays of a shape, possibly complex, and positive ones."""

    def free(*shape: int) -> Any:
        z = rng.standard_normal(shape)
        z = z + 1j * rng.standard_normal(shape) if is_complex else z
        return convert(z.astype({np.float32: np.complex64}.get(dtype, np.complex128) if is_complex else dtype))

    def positive(*shape: int) -> Any:
        return convert(rng.uniform(0.5, 2.0, shape).astype(dtype))

    return free, positive


def build(free: Draw, positive: Draw, batch: tuple[int, ...] = ()) -> dict[str, LinearOperator]:
    """Every case, its parameters with the given batch axes."""
    blur = ddnref.convolution(free(*batch, 3, 2), GRID)
    points = ddnref.diagonal(free(*batch, *GRID), GRID)
    matrix = ddnref.dense(free(*batch, 3, 4))
    gradient = ddnref.difference(GRID)
    return {
        "dense": matrix,
        "diagonal": points,
        "mask": ddnref.mask(positive(*batch, *GRID), GRID),
        "convolution": blur,
        "convolution, 1 axis": ddnref.convolution(free(*batch, 4), 7),
        "convolution, 3 axes": ddnref.convolution(free(*batch, 1, 2, 3), (2, 2, 3)),
        "scaled": ddnref.scaled(blur, free(*batch)),
        "scaled by a number": ddnref.scaled(points, 2.0),
        "scaled by a complex number": ddnref.scaled(points, 2j),
        "add": ddnref.add(blur, points),
        "compose": ddnref.compose(gradient, blur, points),
        "stack": ddnref.stack(blur, points, blur),
        "stack of unequal ranges": ddnref.stack(blur, gradient),
        "adjoint": ddnref.adjoint(matrix),
        "adjoint of a convolution": ddnref.adjoint(blur),
        "normal": ddnref.normal(blur, positive(*batch)),
        "normal, dense": ddnref.normal(matrix, positive(*batch)),
        "normal, undamped": ddnref.normal(matrix),
        "normal, damped by a number": ddnref.normal(points, 0.5),
        "normal of a stack": ddnref.normal(ddnref.stack(blur, gradient), positive(*batch)),
        "regularised": ddnref.add(
            ddnref.normal(blur, positive(*batch)),
            ddnref.scaled(ddnref.normal(gradient), positive(*batch)),
            positive_definite=True,
        ),
    }


NAMES = tuple(build(*draws(np.random.default_rng(0), np.asarray, False, np.float64)))


def case(
    name: str,
    convert: Callable[[Any], Any] = np.asarray,
    *,
    is_complex: bool = False,
    batch: tuple[int, ...] = (),
    dtype: Any = np.float64,
) -> LinearOperator:
    """The same numbers for every library."""
    return build(*draws(np.random.default_rng(20), convert, is_complex, dtype), batch)[name]


def vectors(operator: LinearOperator, batch: tuple[int, ...], is_complex: bool, dtype: Any = np.float64) -> Any:
    """Random x and ȳ as NumPy arrays."""
    free, _ = draws(np.random.default_rng(21), np.asarray, is_complex, dtype)
    return free(*batch, *operator.domain_shape), free(*batch, *operator.range_shape)
