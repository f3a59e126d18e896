"""Gather and scatter-add along the last axis, by indices that are fixed: no parameters, and without a gradient.

    gather        (..., n) to (..., m)    y_e = x_{k(e)}
    scatter_add   (..., m) to (..., n)    y_i = Σ x_e over all e with k(e) = i, the adjoint of gather

    sparse_product  A x, A given by the value of each entry e in row r(e) and column c(e)

The standard has no scatter-add, so that each library sums in its own way. On NumPy it is a product with a sparse matrix
of ones, which is made once for each array of indices and takes all vectors at once. With 1,000,000 numbers it takes
three quarters of the time of ``np.add.at`` or ``np.bincount``, and float32 stays float32. On a GPU the order of the sum
may change from run to run, as in PyTorch's and CuPy's own functions.
"""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import array_api_compat
import numpy as np
import scipy  # its parts are loaded where they are first used

from ddnref._core.arrays import Array, conj, full, is_compiling, is_complex, namespace_of

BLOCK = 64  # numbers that the form without scatter-add compares with all places at once: more take more memory


class Indices:
    """Integers from 0 to n − 1 that never change. They compare by value, and come as an array of each library."""

    def __init__(self, values: Any, n: int) -> None:
        self.values = np.array(values, dtype=np.int64)
        self.values.flags.writeable = False
        self.n = n
        self._hash = hash((self.values.tobytes(), n))
        self.made: dict[Any, Any] = {}
        """Arrays and sparse matrices made of the indices, by library and device, or by dtype."""

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Indices) and self.n == other.n and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Indices, (self.values, self.n)

    def __len__(self) -> int:
        return int(self.values.size)

    def like(self, x: Array) -> Array:
        """The indices as an array of the library of `x`, on its device."""
        if array_api_compat.is_numpy_array(x):
            return self.values
        xp, device = namespace_of(x), array_api_compat.device(x)
        if array_api_compat.is_jax_array(x):
            key, make = "jax", self._of_jax
        else:
            key, make = (xp.__name__, str(device)), lambda: xp.asarray(self.values.copy(), device=device)  # type: ignore[assignment]
        # While PyTorch traces or transforms, a new tensor may be one of the tracer's.
        if array_api_compat.is_torch_array(x) and not _torch_is_eager():
            return make()
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def _of_jax(self) -> Array:
        import jax

        with jax.ensure_compile_time_eval():  # no traced value, which could not be kept
            return jax.numpy.asarray(self.values)


def _torch_is_eager() -> bool:
    if is_compiling():
        return False
    from ddnref._kernels.torch import is_eager

    return is_eager()


def fixed_integers(name: str, x: Any) -> np.ndarray[Any, Any]:
    """Indices as an array of NumPy, from an array of any library or a list; reads a device."""
    if "jax" in sys.modules and isinstance(x, sys.modules["jax"].core.Tracer):
        raise TypeError(f"{name} is traced by JAX, but indices are fixed: close over them, or make them static.")
    if array_api_compat.is_torch_array(x):
        x = x.detach().cpu().numpy()
    elif array_api_compat.is_cupy_array(x):
        x = x.get()
    values = np.asarray(x)
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {values.dtype}, expected integers.")
    return values


# --- gather and scatter ---------------------------------------------------------------------------------------------


def gather(x: Array, index: Indices) -> Array:
    """``x_{k(e)}``, from ``(..., n)`` to ``(..., m)``."""
    return namespace_of(x).take(x, index.like(x), axis=-1)


def scatter_add(x: Array, index: Indices) -> Array:
    """``Σ x_e`` over all e with ``k(e) = i``, from ``(..., m)`` to ``(..., n)``."""
    if array_api_compat.is_numpy_array(x):
        return _times_columns(_ones(index, None, x.dtype), x)
    shape = (*x.shape[:-1], index.n)
    if array_api_compat.is_jax_array(x):
        return namespace_of(x).zeros(shape, dtype=x.dtype).at[..., index.like(x)].add(x)
    if array_api_compat.is_torch_array(x):
        return x.new_zeros(shape).index_add(-1, index.like(x), x)
    if array_api_compat.is_cupy_array(x):
        return _by_cupy(x, index)
    return scatter_add_by_comparison(x, index)


def scatter_difference(x: Array, plus: Indices, minus: Indices) -> Array:
    """``scatter_add(x, plus) − scatter_add(x, minus)``, on NumPy as one product with a sparse matrix."""
    if array_api_compat.is_numpy_array(x):
        return _times_columns(_ones(plus, minus, x.dtype), x)
    return scatter_add(x, plus) - scatter_add(x, minus)


def scatter_add_by_comparison(x: Array, index: Indices) -> Array:
    """`scatter_add` by functions of the standard: every number is compared with every place, m n in all.

    A difference of cumulative sums would take less, and lose the digits of small sums beside large ones.
    """
    xp, m = namespace_of(x), len(index)
    places = xp.arange(index.n, device=array_api_compat.device(x))
    k, y, zero = index.like(x), full((*x.shape[:-1], index.n), 0.0, x), full((), 0.0, x)
    for start in range(0, m, BLOCK):
        block = slice(start, min(start + BLOCK, m))
        # Not a product with ones and zeros, where one NaN would be NaN everywhere
        y = y + xp.sum(xp.where(k[block, None] == places, x[..., block, None], zero), axis=-2)
    return y


def _ones(plus: Indices, minus: Indices | None, dtype: Any) -> Any:
    """The sparse matrix ``(n, m)`` with a one in row k(e) of each column e, and a minus one in that of `minus`."""
    key = ("sparse", minus, dtype.char)
    if key not in plus.made:
        count, one = len(plus), np.ones(len(plus), dtype=dtype)
        columns = np.arange(count)
        data, rows = [one], [plus.values]
        if minus is not None:
            data, rows = [one, -one], [plus.values, minus.values]
        entries = np.concatenate(data), (np.concatenate(rows), np.concatenate([columns] * len(rows)))
        plus.made[key] = scipy.sparse.coo_array(entries, shape=(plus.n, count)).tocsr()
    return plus.made[key]


def _times_columns(matrix: Any, x: Array) -> Array:
    """Vectors ``(..., m)`` of NumPy times a sparse matrix."""
    lead = x.shape[:-1]
    if math.prod(lead) == 1:
        return (matrix @ x.reshape(-1)).reshape(*lead, matrix.shape[0])
    return (matrix @ x.reshape(math.prod(lead), x.shape[-1]).T).T.reshape(*lead, matrix.shape[0])


def _by_cupy(x: Array, index: Indices) -> Array:
    from cupyx import scatter_add

    if is_complex(x):  # a GPU adds real numbers
        return _by_cupy(x.real, index) + 1j * _by_cupy(x.imag, index)
    y = full((math.prod(x.shape[:-1]), index.n), 0.0, x)
    scatter_add(y, (slice(None), index.like(x)), x.reshape(y.shape[0], len(index)))
    return y.reshape(*x.shape[:-1], index.n)


# --- sparse matrices ------------------------------------------------------------------------------------------------


def sparse_product(values: Array, x: Array, rows: Indices, columns: Indices, transposed: bool = False) -> Array:
    """``y_i = Σ a_e x_{c(e)}`` over all e with ``r(e) = i``, or that of the transpose.

    NumPy has SciPy's product, the others gather and scatter-add. SciPy takes a third of the time for 1,000,000 entries
    in order, because it stores no number for each.
    """
    if array_api_compat.is_numpy_array(x) and values.ndim == 1:
        matrix = _filled(values, rows, columns)
        return _times_columns(matrix.T if transposed else matrix, x)
    source, target = (rows, columns) if transposed else (columns, rows)
    return scatter_add(values * gather(x, source), target)


def sparse_product_vjp(y_bar: Array, x: Array, rows: Indices, columns: Indices, shared: bool) -> Array:
    """``ȳ_{r(e)} conj(x_{c(e)})``; on NumPy summed over all vectors, one at a time, if they share the values."""
    if not (array_api_compat.is_numpy_array(x) and shared):
        return gather(y_bar, rows) * conj(gather(x, columns))
    lead = np.broadcast_shapes(y_bar.shape[:-1], x.shape[:-1])
    left = np.broadcast_to(y_bar, (*lead, rows.n)).reshape(math.prod(lead), rows.n)
    right = np.broadcast_to(x, (*lead, columns.n)).reshape(math.prod(lead), columns.n)
    bar = np.zeros(len(rows), dtype=np.result_type(y_bar, x))
    for y_i, x_i in zip(left, right, strict=True):
        bar += np.take(y_i, rows.values) * np.take(conj(x_i), columns.values)
    return bar


def in_order(values: Array, rows: Indices, columns: Indices) -> tuple[Array, Indices, Indices]:
    """The entries in the order of their rows on NumPy, whose product would otherwise reorder the values each time.

    A product with 1,000,000 entries in random order takes eleven times as long. Elsewhere the order is left as it is.
    """
    if not array_api_compat.is_numpy_array(values):
        return values, rows, columns
    key = ("in order", columns)
    if key not in rows.made:
        order = _ones(rows, None, np.dtype(float)).indices  # the entries of each row, by a sort in linear time
        is_sorted = bool(np.all(order[1:] > order[:-1]))
        places = Indices(rows.values[order], rows.n), Indices(columns.values[order], columns.n)
        rows.made[key] = None if is_sorted else (order, *places)
    if rows.made[key] is None:
        return values, rows, columns
    order, rows, columns = rows.made[key]
    return values[..., order], rows, columns


def laplacian_entries(weights: Array, i: Indices, j: Indices) -> tuple[Array, Indices, Indices]:
    """The entries of a graph Laplacian of NumPy weights: both of each edge, and the degrees on the diagonal."""
    key = ("laplacian", j)
    if key not in i.made:
        nodes = np.arange(i.n)
        ends = np.concatenate([i.values, j.values, nodes]), np.concatenate([j.values, i.values, nodes])
        i.made[key] = tuple(Indices(end, i.n) for end in ends)
    degrees = scatter_add(weights, i) + scatter_add(weights, j)
    return np.concatenate([-weights, -weights, degrees]), *i.made[key]


def sparse_matrix(values: Array, rows: Indices, columns: Indices) -> Any:
    """The matrix of SciPy with these entries, those of one place added."""
    return scipy.sparse.coo_array((values, (rows.values, columns.values)), shape=(rows.n, columns.n)).tocsr()


def has_sparse_matrix(values: Array) -> bool:
    """Return whether there is a `sparse_matrix` of these values: SciPy has none with batch axes."""
    return bool(array_api_compat.is_numpy_array(values)) and values.ndim == 1


def _filled(values: Array, rows: Indices, columns: Indices) -> Any:
    """A CSR matrix with these values, on a pattern that is made once."""
    values, rows, columns = in_order(values, rows, columns)
    key = ("pattern", columns)
    if key not in rows.made:
        # Several entries in one place stay several, so that each value of the list is one of the matrix.
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows.values, minlength=rows.n))])
        rows.made[key] = scipy.sparse.csr_array((np.zeros(len(rows)), columns.values, starts), (rows.n, columns.n))
    matrix = copy.copy(rows.made[key])
    matrix.data = values
    return matrix


def entries_of(matrix: Any) -> tuple[Array, Any, Any, tuple[int, int]] | None:
    """Values, rows, columns and shape of a sparse matrix of PyTorch or JAX; ``None`` for anything else."""
    if array_api_compat.is_torch_array(matrix):
        return _entries_of_torch(matrix)
    if type(matrix).__name__ in ("BCOO", "BCSR") and type(matrix).__module__.startswith("jax."):
        return _entries_of_jax(matrix)
    return None


def _entries_of_torch(matrix: Array) -> tuple[Array, Any, Any, tuple[int, int]] | None:
    import torch

    if matrix.layout not in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
        return None
    if matrix.ndim != 2 or matrix.dense_dim():
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)} and {matrix.dense_dim()} dense axes, expected (n, m)."
        )
    if matrix.layout is torch.sparse_coo:
        matrix = matrix.coalesce()  # its values are differentiable, those of the uncoalesced matrix are not
        rows, columns = matrix.indices()
    elif matrix.layout is torch.sparse_csr:
        rows, columns = _repeated(matrix.crow_indices()), matrix.col_indices()
    else:
        rows, columns = matrix.row_indices(), _repeated(matrix.ccol_indices())
    return matrix.values(), rows, columns, tuple(matrix.shape)


def _entries_of_jax(matrix: Any) -> tuple[Array, Any, Any, tuple[int, int]]:
    if len(matrix.shape) != 2 or matrix.n_batch or matrix.n_dense:
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)}, {matrix.n_batch} batch axes and {matrix.n_dense} dense axes, "
            "expected (n, m) without both."
        )
    indices = fixed_integers("matrix.indices", matrix.indices)
    if type(matrix).__name__ == "BCOO":
        rows, columns = indices.T
    else:
        rows, columns = _repeated(matrix.indptr), indices
    # Entries out of range are padding.
    n, m = matrix.shape
    columns = columns[: len(rows)]
    inside = np.flatnonzero((rows < n) & (columns < m))
    if inside.size == matrix.data.shape[0]:
        return matrix.data, rows, columns, (n, m)
    return namespace_of(matrix.data).take(matrix.data, inside), rows[inside], columns[inside], (n, m)


def _repeated(starts: Any) -> np.ndarray[Any, Any]:
    """The row of each entry, from where the entries of each row start."""
    starts = fixed_integers("matrix.indptr", starts)
    return np.repeat(np.arange(starts.size - 1), np.diff(starts))
