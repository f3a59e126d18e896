"""One operator for each constructor and combination, made of arrays from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ddnref import operators
from ddnref.operators import LinearOperator

GRID = (4, 5)
EDGES = ((0, 1), (3, 1), (1, 4), (4, 0), (0, 1), (5, 3), (2, 2))  # one of them twice, and a loop
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
    blur = operators.convolution(free(*batch, 3, 2), GRID)
    points = operators.diagonal(free(*batch, *GRID), GRID)
    matrix = operators.dense(free(*batch, 3, 4))
    gradient = operators.difference(GRID)
    return {
        "dense": matrix,
        "diagonal": points,
        "mask": operators.mask(positive(*batch, *GRID), GRID),
        "convolution": blur,
        "convolution, 1 axis": operators.convolution(free(*batch, 4), 7),
        "convolution, 3 axes": operators.convolution(free(*batch, 1, 2, 3), (2, 2, 3)),
        "convolution, zeros outside": operators.convolution(free(*batch, 3, 4), GRID, boundary="zero"),
        "convolution, reflected": operators.convolution(free(*batch, 4, 3), GRID, boundary="reflect"),
        "convolution, reflected, 1 axis": operators.convolution(free(*batch, 6), 6, boundary="reflect"),
        "toeplitz": operators.toeplitz(free(*batch, 4), free(*batch, 6)),
        "toeplitz, tall": operators.toeplitz(free(*batch, 5), free(*batch, 2)),
        "toeplitz, Hermitian": operators.toeplitz(free(*batch, 5)),
        "coo": operators.coo(free(*batch, len(EDGES)), *np.asarray(EDGES).T, (6, 5)),
        "laplacian": operators.laplacian(np.asarray(EDGES), positive(*batch, len(EDGES)), 6),
        "scaled": operators.scaled(blur, free(*batch)),
        "scaled by a number": operators.scaled(points, 2.0),
        "scaled by a complex number": operators.scaled(points, 2j),
        "add": operators.add(blur, points),
        "compose": operators.compose(gradient, blur, points),
        "stack": operators.stack(blur, points, blur),
        "stack of unequal ranges": operators.stack(blur, gradient),
        "block_diagonal": operators.block_diagonal(blur, points),
        "block_diagonal of unequal shapes": operators.block_diagonal(matrix, gradient),
        "kronecker": operators.kronecker(matrix, operators.dense(free(*batch, 2, 3))),
        "kronecker of three": operators.kronecker(
            operators.diagonal(positive(*batch, 2)), operators.difference((2, 3)), free(*batch, 2, 1)
        ),
        "adjoint": operators.adjoint(matrix),
        "transpose": operators.transpose(matrix),
        "adjoint of a convolution": operators.adjoint(blur),
        "normal": operators.normal(blur, positive(*batch)),
        "normal, dense": operators.normal(matrix, positive(*batch)),
        "normal, undamped": operators.normal(matrix),
        "normal, damped by a number": operators.normal(points, 0.5),
        "normal of a stack": operators.normal(operators.stack(blur, gradient), positive(*batch)),
        "regularised": operators.add(
            operators.normal(blur, positive(*batch)),
            operators.scaled(operators.normal(gradient), positive(*batch)),
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
