"""Operators with a fixed pattern of indices, whose parameters are numbers on it.

sparse matrix     y_i = Σ a_e x_{c(e)} over all e with r(e) = i           ā_e = Σ ȳ_{r(e)} conj(x_{c(e)})
graph Laplacian   y = Bᵀ (w ∘ (B x)),  (B x)_e = x_{i(e)} − x_{j(e)}    w̄_e = Re Σ (B ȳ)_e conj((B x)_e)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from ddnref._core.arrays import Array, conj, is_complex, namespace
from ddnref._kernels.public import public
from ddnref._kernels.scatter import (
    Indices,
    entries_of,
    fixed_integers,
    gather,
    has_sparse_matrix,
    in_order,
    laplacian_entries,
    scatter_difference,
    sparse_matrix,
    sparse_product,
    sparse_product_vjp,
)
from ddnref.operators._operator import Linear, LinearOperator, Params, cotangent, motions, no_params_vjp, shared
from ddnref.operators._scipy import from_scipy


@public
def coo(
    values: Array,
    rows: Any,
    columns: Any,
    shape: tuple[int, int],
    /,
    *,
    self_adjoint: bool = False,
    positive_definite: bool = False,
) -> LinearOperator:
    r"""A sparse matrix given by its entries, from ``(..., m)`` to ``(..., n)``, with their values as the parameter.

    Parameters
    ----------
    values : (..., e) array, real or complex floating
    rows, columns : (e,) integer arrays
        The place of each entry, of any library and in any order; entries of one place are added. They are fixed: they
        are read once, on the host, and have no gradient.
    shape : (int, int)
        The numbers of rows and columns, n and m.
    self_adjoint, positive_definite : bool, default False
        Properties of the matrix. Its gradient treats all values as free.

    Raises
    ------
    TypeError
        If `rows` or `columns` are not integers or are traced by JAX, or `values` are not floating numbers.
    ValueError
        For other shapes, for a place outside of the matrix, and for a flag of a matrix that is not square.

    Notes
    -----
    .. math:: y_i = \sum_{e: r(e) = i} a_e\, x_{c(e)}, \qquad \bar a_e = \sum \bar y_{r(e)}\, \overline{x_{c(e)}}

    A product takes two flops for each entry, and stores one number for each. On NumPy, values without batch axes are
    put into a matrix of SciPy, whose pattern is made once for all operators with these places that exist at the time.
    `LinearOperator.prepared` sorts them by rows, if they are not, so that a product need not do so.

    Examples
    --------
    >>> import numpy as np
    >>> a = ddnref.operators.coo(np.asarray([2.0, 3.0]), np.asarray([0, 1]), np.asarray([1, 0]), (2, 2))
    >>> a(np.asarray([1.0, 10.0]))
    array([20.,  3.])
    """
    namespace(values=values)
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"shape is {shape!r}, expected the numbers of rows and columns.")
    n, m = (as_size(f"shape[{k}]", size) for k, size in enumerate(shape))
    places = as_indices("rows", rows, n), as_indices("columns", columns, m)
    for name, place in zip(("rows", "columns"), places, strict=True):
        if values.ndim == 0 or values.shape[-1] != len(place):
            raise ValueError(f"values has shape {tuple(values.shape)}, expected (..., {len(place)}) as {name}.")
    if (self_adjoint or positive_definite) and n != m:
        raise ValueError(f"shape is {(n, m)}; only a square matrix can be self-adjoint.")
    flags = self_adjoint or positive_definite, positive_definite
    of = shared(_Entries, *places, *flags)
    return LinearOperator(
        (values,), of.apply, of.adjoint, of.params_vjp, (m,), (n,), *flags, prepare=of.prepare, **motions(of),
        sparse=of.matrix if has_sparse_matrix(values) else None,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Entries(Linear):
    rows: Indices
    columns: Indices
    self_adjoint: bool
    positive_definite: bool

    def apply(self, params: Params, x: Array) -> Array:
        return sparse_product(params[0], x, self.rows, self.columns)

    def adjoint(self, params: Params, y: Array) -> Array:
        return sparse_product(conj(params[0]), y, self.rows, self.columns, transposed=True)

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        # ā_e = Σ ȳ_{r(e)} conj(x_{c(e)})
        (a,) = params
        return (cotangent(sparse_product_vjp(y_bar, x, self.rows, self.columns, a.ndim == 1), a),)

    def prepare(self, params: Params) -> LinearOperator:
        return _in_order((params[0], self.rows, self.columns), self.self_adjoint, self.positive_definite)

    def matrix(self, params: Params) -> Any:
        return sparse_matrix(params[0], self.rows, self.columns)


def _in_order(entries: tuple[Array, Indices, Indices], self_adjoint: bool, positive_definite: bool) -> LinearOperator:
    """The prepared operator of some entries, which it sorts."""
    values, rows, columns = in_order(*entries)
    of, shapes = shared(_Entries, rows, columns, self_adjoint, positive_definite), ((columns.n,), (rows.n,))
    return LinearOperator((values,), of.apply, of.adjoint, no_params_vjp, *shapes, self_adjoint, positive_definite)


@public
def from_sparse(matrix: Any, /, *, self_adjoint: bool = False, positive_definite: bool = False) -> LinearOperator:
    """A sparse matrix of PyTorch, JAX, SciPy or CuPy as an operator in its own framework.

    Parameters
    ----------
    matrix : sparse tensor of PyTorch, BCOO or BCSR of JAX, or sparse matrix or array of SciPy or CuPy
        The layouts of PyTorch are COO, CSR and CSC. Its stored values are the parameter. Its indices are fixed: they
        are read once, on the host.
    self_adjoint, positive_definite : bool, default False
        Properties of the matrix.

    Raises
    ------
    TypeError
        If `matrix` is none of these, if its values are not floating numbers, or if JAX traces its indices.
    ValueError
        If `matrix` has batch axes or dense axes, and for a flag of a matrix that is not square.

    Notes
    -----
    The operator is that of `coo`, or for SciPy and CuPy that of `from_scipy`. Values that PyTorch or JAX differentiate
    stay so: gradients reach what the matrix was made of. An uncoalesced tensor of PyTorch is coalesced first.

    Examples
    --------
    >>> import numpy as np, scipy.sparse
    >>> a = ddnref.operators.from_sparse(scipy.sparse.coo_array(np.asarray([[0.0, 2.0], [3.0, 0.0]])))
    >>> a(np.asarray([1.0, 10.0])), a.params
    (array([20.,  3.]), (array([2., 3.]),))
    """
    flags = {"self_adjoint": self_adjoint, "positive_definite": positive_definite}
    entries = entries_of(matrix)
    if entries is not None:
        return coo(*entries, **flags)
    if hasattr(matrix, "tocsr") and hasattr(matrix, "nnz"):
        return from_scipy(matrix, **flags)
    raise TypeError(
        f"matrix is a {type(matrix).__module__}.{type(matrix).__qualname__}, expected a sparse matrix of PyTorch (COO, "
        "CSR or CSC), JAX (BCOO or BCSR), SciPy or CuPy. Dense arrays go to ddnref.operators.dense."
    )


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
    sparse matrix Bᵀ is made once, for all operators with these edges that exist at the time. There
    `LinearOperator.prepared`, which solvers use, stores the Laplacian itself, and constants become zero up to rounding.

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
    return LinearOperator(
        (weights,), of.apply, of.apply, of.params_vjp, (size,), (size,), True, prepare=of.prepare, **motions(of),
        sparse=of.matrix if has_sparse_matrix(weights) else None,
    )  # fmt: skip


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

    def prepare(self, params: Params) -> LinearOperator:
        # The product with the stored matrix of SciPy takes less than half of the time of that by edges.
        (w,), size = params, self.i.n
        if not has_sparse_matrix(w):
            return LinearOperator(params, self.apply, self.apply, no_params_vjp, (size,), (size,), True)
        return _in_order(laplacian_entries(w, self.i, self.j), True, False)

    def matrix(self, params: Params) -> Any:
        return sparse_matrix(*laplacian_entries(params[0], self.i, self.j))
