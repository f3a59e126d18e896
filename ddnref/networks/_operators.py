"""The Hessian and the Gauss–Newton matrix of a chain as linear operators on flat vectors of all parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from ddnref._core.arrays import Array, is_complex, namespace_of
from ddnref._core.checks import check_dtypes
from ddnref._kernels.vectors import as_complex
from ddnref.operators._operator import LinearOperator, Params, Structure, check_ending, shared

Products = Callable[[list[Array]], list[Array]]


def curvature(chain: Any, x: Array, t: Array, kind: str, throw: bool) -> LinearOperator:
    """Return the operator of `Chain.hessian_operator` or `Chain.ggn_operator`."""
    chain.loss(x, t, throw=throw)  # raises for data that does not fit, before a solver does
    of, params = shared(_Curvature, chain, x, t, kind), tuple(chain.params)
    shape = (entries(params),)
    return LinearOperator(
        params, of.apply, of.apply, of.params_vjp, shape, shape, self_adjoint=True, prepare=of.prepare
    )


def entries(params: Sequence[Array]) -> int:
    """Count the entries of all parameters."""
    return sum(math.prod(array.shape) for array in params)


def lists(vectors: Array, params: Sequence[Array]) -> list[Array]:
    """Split vectors ``(..., p)`` into arrays ``(..., *shape)`` like the parameters."""
    check_dtypes(vectors=(vectors, params[0].dtype))
    check_ending("vectors", vectors, (entries(params),))
    xp, start, found = namespace_of(vectors), 0, []
    for array in params:
        end = start + math.prod(array.shape)
        found.append(xp.reshape(vectors[..., start:end], (*vectors.shape[:-1], *array.shape)))
        start = end
    return found


@dataclass(frozen=True, eq=False)
class _Curvature(Structure):
    """Products with the second derivatives of one chain's loss for one set of data."""

    chain: Any
    x: Array
    t: Array
    kind: str

    def products(self, params: Params) -> Products:
        """Make the pass through the network that all products share."""
        chain = self.chain
        if any(a is not b for a, b in zip(params, chain.params, strict=True)):
            chain = chain.with_params(params)
        return chain.products(self.x, self.t, self.kind, False)  # type: ignore[no-any-return]

    def apply(self, params: Params, v: Array) -> Array:
        return _applied(self.products(params), params, v)

    def prepare(self, params: Params) -> LinearOperator:
        shape, apply = (entries(params),), partial(_applied, self.products(params))
        return LinearOperator(params, apply, apply, self.params_vjp, shape, shape, self_adjoint=True)

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> NoReturn:
        name = "Hessian" if self.kind == "hessian" else "Gauss–Newton matrix"
        raise TypeError(
            f"There is no gradient with respect to the parameters of a network's {name}, because it would take third "
            "derivatives of the network."
        )


def _applied(products: Products, params: Params, v: Array) -> Array:
    """Apply products of lists to vectors ``(..., p)``, of which lists have at most one leading axis."""
    xp = namespace_of(v)
    if is_complex(v):
        parts = (as_complex(_applied(products, params, part)) for part in (xp.real(v), xp.imag(v)))
        return next(parts) + 1j * next(parts)
    rows = v if v.ndim == 1 else xp.reshape(v, (-1, v.shape[-1]))
    found = products(lists(rows, params))
    return xp.reshape(xp.concat([xp.reshape(array, (*rows.shape[:-1], -1)) for array in found], axis=-1), v.shape)
