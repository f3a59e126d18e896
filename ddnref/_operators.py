"""Linear operators with their parameters in the open: pure functions of a flat tuple of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ddnref._array import Array

Params = tuple[Array, ...]


class LinearOperator(NamedTuple):
    """A linear map that is applied, never stored, and differentiated with respect to its parameters.

    A vector is ``(..., *domain_shape)``: batch axes lead. All functions are pure and accept any batch axes.
    """

    params: Params
    """The arrays that the map depends on; gradients are taken with respect to these."""
    apply: Callable[[Params, Array], Array]
    """``apply(params, x) = A x``, from ``(..., *domain_shape)`` to ``(..., *range_shape)``."""
    adjoint: Callable[[Params, Array], Array]
    """``adjoint(params, y) = Aᴴ y``."""
    params_vjp: Callable[[Params, Array, Array], Params]
    """``params_vjp(params, y_bar, x)``: the gradient of ``Re Σ conj(y_bar) · A x`` with respect to each parameter;
    one that a batch shares gets the sum."""
    domain_shape: tuple[int, ...]
    range_shape: tuple[int, ...]
    self_adjoint: bool = False
    positive_definite: bool = False

    @property
    def size(self) -> int:
        """Entries of a vector of the domain."""
        return math.prod(self.domain_shape)

    def __call__(self, x: Array) -> Array:
        """``A x``."""
        return self.apply(self.params, x)

    def with_params(self, *params: Array) -> LinearOperator:
        """The same map with other parameters."""
        return self._replace(params=params)
