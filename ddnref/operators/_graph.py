"""Operators with a fixed pattern of indices, whose parameters are numbers on it.

graph Laplacian   y = Bᵀ (w ∘ (B x)),  (B x)_e = x_{i(e)} − x_{j(e)}    w̄_e = Re Σ (B ȳ)_e conj((B x)_e)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from ddnref._core.arrays import Array, conj, is_complex, namespace
from ddnref._kernels.public import public
from ddnref._kernels.scatter import Indices, fixed_integers, gather, scatter_difference
from ddnref.operators._operator import Linear, LinearOperator, Params, cotangent, motions, shared


@public
def laplacian(edges: Any, weights: Array, n: int, /) -> LinearOperator:
    r"""The Laplacian of a graph with weighted edges, from ``(..., n)`` to the same; self-adjoint.

    Parameters
    ----------
    edges : (m, 2) integer array, or a tuple of two ``(m,)`` integer arrays
        The two nodes of each edge, counted from 0, in any order and of any library. They are fixed: they are read once,
        on the host, and have no gradient. An edge that occurs twice counts twice, and a loop does not count.
    weights : (..., m) array, real floating
        One number for each edge.
    n : int
        The number of nodes.

    Raises
    ------
    TypeError
        If `edges` are not integers or are traced by JAX, or `weights` are not real floating numbers.
    ValueError
        For other shapes, and for a node that is not between 0 and n − 1.

    Notes
    -----
    .. math:: y = B^T (w \circ (B x)), \quad (B x)_e = x_{i(e)} - x_{j(e)}, \qquad
       \bar w_e = \operatorname{Re} \sum\, (\bar y_{i(e)} - \bar y_{j(e)})\, \overline{(x_{i(e)} - x_{j(e)})}

    As a matrix it is the degrees on the diagonal minus the weights of the edges. It maps constant vectors to zero
    exactly, and is positive semidefinite if no weight is negative. Add a `diagonal`, or project the constants out,
    before a system is solved. A product takes six flops for each edge, and stores one number for each. On NumPy the
    sparse matrix Bᵀ is made once, for all operators with these edges that exist at the time.

    Examples
    --------
    >>> import numpy as np
    >>> path = ddnref.operators.laplacian(np.asarray([[0, 1], [1, 2]]), np.asarray([1.0, 3.0]), 3)
    >>> path(np.asarray([0.0, 1.0, 3.0]))
    array([-1., -5.,  6.])
    """
    namespace(weights=weights)
    if is_complex(weights):
        raise TypeError(f"weights has dtype {weights.dtype}; the weights of a graph are real.")
    size = as_size("n", n)
    i, j = _ends(edges, size)
    if weights.ndim == 0 or weights.shape[-1] != len(i):
        raise ValueError(f"weights has shape {tuple(weights.shape)}, expected (..., {len(i)}), one for each edge.")
    of = shared(_Laplacian, i, j)
    return LinearOperator((weights,), of.apply, of.apply, of.params_vjp, (size,), (size,), True, **motions(of))


def as_size(name: str, n: Any) -> int:
    """A number of entries, or an error that names it."""
    try:
        size = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} is {n!r}, expected an integer.") from None
    if size < 0:
        raise ValueError(f"{name} is {size}, expected at least 0.")
    return size


def as_indices(name: str, given: Any, n: int) -> Indices:
    """Integers ``(m,)`` from 0 to n − 1 as fixed indices, or an error that names them."""
    values = fixed_integers(name, given)
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}, expected one axis.")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < n:
        raise ValueError(f"{name} has values from {values.min()} to {values.max()}, expected 0 to {n - 1}.")
    return Indices(values, n)


def _ends(edges: Any, n: int) -> tuple[Indices, Indices]:
    if isinstance(edges, tuple):
        if len(edges) != 2:
            raise ValueError(f"edges is a tuple of {len(edges)} arrays, expected two: both nodes of each edge.")
        i, j = (as_indices(f"edges[{k}]", ends, n) for k, ends in enumerate(edges))
        if len(i) != len(j):
            raise ValueError(f"edges has {len(i)} and {len(j)} nodes, expected as many of both.")
        return i, j
    values = fixed_integers("edges", edges)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"edges has shape {values.shape}, expected (m, 2), or a tuple of two arrays (m,).")
    return as_indices("edges", values[:, 0], n), as_indices("edges", values[:, 1], n)


@dataclass(frozen=True, eq=False)
class _Laplacian(Linear):
    i: Indices
    j: Indices

    def along_edges(self, x: Array) -> Array:
        """``B x``."""
        return gather(x, self.i) - gather(x, self.j)

    def apply(self, params: Params, x: Array) -> Array:
        return scatter_difference(params[0] * self.along_edges(x), self.i, self.j)

    adjoint = apply

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        # w̄ = Re Σ (B ȳ) ∘ conj(B x)
        return (cotangent(self.along_edges(y_bar) * conj(self.along_edges(x)), params[0]),)
