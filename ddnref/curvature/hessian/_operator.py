"""A factored Hessian as a linear operator on flat vectors of all parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from ddnref._core.arrays import Array, is_complex, namespace_of
from ddnref._kernels.vectors import as_complex
from ddnref.networks._operators import entries, lists
from ddnref.operators._operator import LinearOperator, Params, Structure, shared


def operator(factor: Any, inverse: bool) -> LinearOperator:
    """Return the operator of `HessianFactor.as_operator`."""
    of, params = shared(_Factored, factor, inverse), tuple(factor._hessian.weights)
    shape = (entries(params),)
    return LinearOperator(params, of.apply, of.apply, of.params_vjp, shape, shape, self_adjoint=True)


@dataclass(frozen=True, eq=False)
class _Factored(Structure):
    """Products with ``H + εI`` or its inverse, from the copies of weights and data that the factor holds."""

    factor: Any
    inverse: bool

    def apply(self, params: Params, v: Array) -> Array:
        xp, hessian = namespace_of(v), self.factor._hessian
        if any(a is not b for a, b in zip(params, hessian.weights, strict=True)):
            raise TypeError("The parameters of a factored Hessian cannot be replaced: make another by hessian_factor.")
        if is_complex(v):
            parts = (as_complex(self.apply(params, part)) for part in (xp.real(v), xp.imag(v)))
            return next(parts) + 1j * next(parts)
        blocks = hessian.blocks(lists(xp.reshape(v, (-1, v.shape[-1])), params))
        found = self.factor.inverse(blocks) if self.inverse else self.factor.product(blocks)
        rows = [xp.reshape(array, (array.shape[0], -1)) for array in hessian.params(found)]
        return xp.reshape(xp.concat(rows, axis=-1), v.shape)

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> NoReturn:  # noqa: ARG002
        raise TypeError(
            "There is no gradient with respect to the parameters of a network's Hessian, because it would take third "
            "derivatives of the network."
        )
