"""Wrap operators of SciPy, CuPy and PyLops, and hand ours to ``scipy.sparse.linalg``.

sparse matrix  y = A x      Ā_e = Σ ȳ_{row(e)} conj(x_{col(e)})  for each stored entry e
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, conj, full
from ddnref._kernels.public import public
from ddnref.operators._operator import (
    Constant,
    Linear,
    LinearOperator,
    Params,
    as_shape,
    cotangent,
    motions,
    shared,
)


@public
def from_scipy(
    operator: Any,
    /,
    *,
    domain_shape: tuple[int, ...] | int | None = None,
    range_shape: tuple[int, ...] | int | None = None,
    self_adjoint: bool = False,
    positive_definite: bool = False,
) -> LinearOperator:
    r"""A SciPy, CuPy or PyLops operator, or a sparse matrix, as one of ours, on NumPy's or CuPy's arrays.

    Parameters
    ----------
    operator : sparse matrix or array, or object with ``shape``, ``matvec``, ``rmatvec``
        Products as those of ``scipy.sparse.linalg.LinearOperator``; ``matmat`` and ``rmatmat`` are used where they
        exist. From PyLops operators the shapes of their grids (``dims``, ``dimsd``) are taken over.
    domain_shape, range_shape : tuple of int, optional
        Shapes of vectors, with as many entries as `operator` has columns and rows.
    self_adjoint, positive_definite : bool, default False
        Properties of the operator.

    Raises
    ------
    TypeError
        If `operator` has none of these; in a product, if a vector belongs to another library.
    NotImplementedError
        Raised by SciPy in a product with the adjoint if its operator was made without ``rmatvec``.

    Notes
    -----
    A sparse matrix has one parameter, its stored values ``.data`` (those of ``.tocsr()`` for formats other than CSR and
    CSC), and its gradient has their sparsity. Any other operator has none, because its parameters cannot be seen from
    outside.

    Such an operator runs its own code, which ``jax.jit`` and ``torch.compile`` cannot trace. To differentiate with
    respect to the parameters of a foreign operator, write a `LinearOperator` around its products with a ``params_vjp``
    of your own, and test it with `check_operator`.

    Examples
    --------
    >>> import numpy as np
    >>> import scipy.sparse
    >>> a = ddnref.operators.from_scipy(scipy.sparse.csr_array(np.asarray([[0.0, 2.0], [3.0, 0.0]])))
    >>> a(np.asarray([1.0, 1.0])), a.params
    (array([2., 3.]), (array([2., 3.]),))
    """
    sparse = hasattr(operator, "tocsr") and hasattr(operator, "nnz")
    if not sparse and not all(hasattr(operator, name) for name in ("shape", "matvec", "rmatvec")):
        raise TypeError(
            f"operator is a {type(operator).__qualname__}, expected a sparse matrix, or an object with shape, matvec "
            "and rmatvec as scipy.sparse.linalg.LinearOperator has them. Arrays go to ddnref.operators.dense."
        )
    # Shapes of grids: those given, those that PyLops knows, or flat vectors
    n, m = (int(k) for k in operator.shape)
    domain = _grid("domain_shape", domain_shape, getattr(operator, "dims", None), m)
    target = _grid("range_shape", range_shape, getattr(operator, "dimsd", None), n)
    if (self_adjoint or positive_definite) and domain != target:
        raise ValueError(f"An operator from {domain} to {target} cannot be self-adjoint.")
    flags = self_adjoint or positive_definite, positive_definite
    return _sparse(operator, domain, target, flags) if sparse else _products(operator, domain, target, flags)


def _grid(name: str, given: Any, known: Any, size: int) -> tuple[int, ...]:
    shape = given if given is not None else (known if known is not None else size)
    sizes = as_shape(name, shape if isinstance(shape, int) else tuple(int(k) for k in shape))
    if math.prod(sizes) != size:
        raise ValueError(f"{name} is {sizes}, with {math.prod(sizes)} entries; the operator has {size}.")
    return sizes


def _refuse_others(x: Array, like: Any) -> None:
    """Raise ``TypeError`` unless `x` is of the library that the operator computes with."""
    on_gpu = type(like).__module__.split(".")[0] in ("cupy", "cupyx")
    fits = array_api_compat.is_cupy_array(x) if on_gpu else array_api_compat.is_numpy_array(x)
    if not fits:
        raise TypeError(
            f"A vector is a {type(x).__module__.split('.')[0]}.{type(x).__qualname__}, but the wrapped operator "
            f"computes with {'CuPy' if on_gpu else 'NumPy'} arrays: nothing is moved or converted silently."
        )


def _by_columns(x: Array, shape: tuple[int, ...], target: tuple[int, ...], product: Callable[[Array], Array]) -> Array:
    """Vectors ``(..., *shape)`` as columns, their images as vectors ``(..., *target)`` again."""
    lead = x.shape[: x.ndim - len(shape)]
    y = product(x.reshape(math.prod(lead), math.prod(shape)).T)
    return y.T.reshape(*lead, *target)


# --- sparse matrices --------------------------------------------------------------------------------------------


def _sparse(matrix: Any, domain: tuple[int, ...], target: tuple[int, ...], flags: tuple[bool, bool]) -> LinearOperator:
    # Other formats have no array of values in a fixed order.
    matrix = matrix if matrix.format in ("csr", "csc") else matrix.tocsr()
    if matrix.data.dtype.char not in "fdFD":
        raise TypeError(f"operator has dtype {matrix.data.dtype}; convert it to a floating dtype first.")
    entries = matrix.tocoo(copy=False)
    rows, columns = entries.row, entries.col  # in the order of the data
    frame = copy.copy(matrix)  # the sparsity: its values are replaced in each product
    of = shared(_Stored, frame, rows, columns, domain, target)
    return LinearOperator(
        (matrix.data,), of.apply, of.adjoint, of.params_vjp, domain, target, *flags, **motions(of), sparse=of.filled
    )


@dataclass(frozen=True, eq=False)
class _Stored(Linear):
    frame: Any
    """A sparse matrix whose values are replaced in each product."""
    rows: Array
    columns: Array
    domain: tuple[int, ...]
    target: tuple[int, ...]

    def filled(self, params: Params) -> Any:
        _refuse_others(params[0], self.frame)
        a = copy.copy(self.frame)
        a.data = params[0]
        return a

    def apply(self, params: Params, x: Array) -> Array:
        _refuse_others(x, self.frame)
        return _by_columns(x, self.domain, self.target, lambda z: self.filled(params) @ z)

    def adjoint(self, params: Params, y: Array) -> Array:
        _refuse_others(y, self.frame)
        return _by_columns(y, self.target, self.domain, lambda z: conj(self.filled(params).T @ conj(z)))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        # Ā_e = Σ ȳ_{row(e)} conj(x_{col(e)}), summed over the right-hand sides
        (data,) = params
        lead = np.broadcast_shapes(y_bar.shape[: y_bar.ndim - len(self.target)], x.shape[: x.ndim - len(self.domain)])
        xp, count = array_api_compat.array_namespace(data), math.prod(lead)
        left = xp.broadcast_to(y_bar, (*lead, *self.target)).reshape(count, math.prod(self.target))
        right = xp.broadcast_to(x, (*lead, *self.domain)).reshape(count, math.prod(self.domain))
        bar = full(data.shape, 0.0, data)
        for y_i, x_i in zip(left, right, strict=True):  # one at a time: each product has as many numbers as the data
            bar = bar + cotangent(y_i[self.rows] * conj(x_i[self.columns]), data)
        return (bar,)


def factorised(matrix: Any) -> Callable[[Array], Array] | None:
    """Factor a sparse, self-adjoint matrix, and return the map of rows ``(j, m)`` to solutions; ``None`` if singular.

    The ordering is one for symmetric patterns, with pivots on the diagonal wherever these are not small. On a grid of
    100×200 points the factorisation takes a third of the time with SciPy's default ordering, and a solve half.
    """
    if type(matrix).__module__.split(".")[0] == "cupyx":
        from cupyx.scipy.sparse.linalg import splu
    else:
        from scipy.sparse.linalg import splu
    try:
        factors = splu(
            matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=1e-3, options={"SymmetricMode": True}
        )
    except RuntimeError:  # exactly singular
        return None
    return lambda rows: factors.solve(rows.T).T


# --- anything with products -------------------------------------------------------------------------------------


def _products(
    operator: Any, domain: tuple[int, ...], target: tuple[int, ...], flags: tuple[bool, bool]
) -> LinearOperator:
    of = shared(_Products, operator, domain, target)
    return LinearOperator((), of.apply, of.adjoint, of.params_vjp, domain, target, *flags, **motions(of))


@dataclass(frozen=True, eq=False)
class _Products(Constant):
    operator: Any
    domain: tuple[int, ...]
    target: tuple[int, ...]

    def apply(self, params: Params, x: Array) -> Array:  # noqa: ARG002
        _refuse_others(x, self.operator)
        return _by_columns(x, self.domain, self.target, self.columns("matvec", "matmat", math.prod(self.target)))

    def adjoint(self, params: Params, y: Array) -> Array:  # noqa: ARG002
        _refuse_others(y, self.operator)
        return _by_columns(y, self.target, self.domain, self.columns("rmatvec", "rmatmat", math.prod(self.domain)))

    def columns(self, one: str, many: str, rows: int) -> Callable[[Array], Array]:
        # All columns at once where the operator can, else one by one
        if hasattr(self.operator, many):
            return lambda z: getattr(self.operator, many)(z)
        vector = getattr(self.operator, one)

        def product(z: Array) -> Array:
            xp = array_api_compat.array_namespace(z)
            if z.shape[1] == 0:
                return full((rows, 0), 0.0, z)
            return xp.stack([vector(z[:, j]).reshape(-1) for j in range(z.shape[1])], axis=1)

        return product


@public
def to_scipy(operator: LinearOperator, /, *, dtype: Any = None) -> Any:
    """One of our operators for ``scipy.sparse.linalg``, or for CuPy's if its parameters are CuPy's.

    It has shape ``(n, m)``, for flattened vectors, and computes once all that does not depend on the vector.

    Parameters
    ----------
    operator : LinearOperator
        With NumPy or CuPy parameters, or none; without batch axes, which SciPy's operators do not have.
    dtype : dtype, optional
        Dtype of the vectors; that of the parameters by default, float64 without parameters.

    Examples
    --------
    >>> import numpy as np
    >>> import scipy.sparse.linalg
    >>> a = ddnref.operators.to_scipy(ddnref.operators.diagonal(np.asarray([1.0, 2.0]), positive_definite=True))
    >>> scipy.sparse.linalg.cg(a, np.asarray([1.0, 1.0]), rtol=1e-12)[0]
    array([1. , 0.5])
    """
    foreign = [p for p in operator.params if not array_api_compat.is_numpy_array(p)]
    on_gpu = bool(foreign) and all(array_api_compat.is_cupy_array(p) for p in operator.params)
    if foreign and not on_gpu:
        raise TypeError(f"operator has parameters of {type(foreign[0]).__module__}, expected NumPy's or CuPy's.")
    if on_gpu:
        import cupy as xp
        import cupyx.scipy.sparse.linalg as linalg
    else:
        import numpy as xp
        import scipy.sparse.linalg as linalg
    # One product shows the dtype, and whether there are batch axes.
    a = operator.prepared()
    n, m = math.prod(a.range_shape), operator.size
    kind = dtype or xp.result_type(*(p.dtype for p in operator.params), xp.float32 if operator.params else xp.float64)
    image = a.apply(a.params, xp.zeros(a.domain_shape, dtype=kind))
    if tuple(image.shape) != tuple(a.range_shape):
        raise ValueError(
            f"The image of one vector has shape {tuple(image.shape)}, expected {tuple(a.range_shape)}: the parameters "
            "have batch axes, which SciPy's operators do not have. Pass the parameters of a single item."
        )

    # SciPy's blocks have vectors as columns, ours as leading axes.
    def matmat(z: Array) -> Array:
        y = a.apply(a.params, z.T.reshape(-1, *a.domain_shape))
        return y.reshape(-1, n).T

    def rmatmat(z: Array) -> Array:
        x = a.adjoint(a.params, z.T.reshape(-1, *a.range_shape))
        return x.reshape(-1, m).T

    return linalg.LinearOperator(
        (n, m),
        matvec=lambda z: matmat(z.reshape(m, 1))[:, 0],
        rmatvec=lambda z: rmatmat(z.reshape(n, 1))[:, 0],
        matmat=matmat,
        rmatmat=rmatmat,
        dtype=image.dtype,
    )
