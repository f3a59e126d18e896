"""Dense linear systems ``A x = b`` and their derivatives from the same factorisation.

With ``y = A⁻ᴴ x̄``:

    b̄ = y,        Ā = −y xᴴ
    ẋ = A⁻¹ (ḃ − Ȧ x)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from ddnref._core.arrays import (
    Array,
    Namespace,
    adjoint,
    as_dtype,
    full,
    is_complex,
    is_true,
    library,
    namespace,
    namespace_of,
    of_kind,
    put_nan,
    real_dtype,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_precision, check_shapes, check_square
from ddnref._kernels import singularity
from ddnref._kernels.dense import move_axis
from ddnref._kernels.lu import lu_factor, lu_factor_jvp, lu_factor_vjp, lu_solve, rcond_of_matrix
from ddnref._kernels.public import public
from ddnref._kernels.vectors import as_complex
from ddnref.errors import SingularError


@public
def solve(a: Array, b: Array, /, *, throw: bool = True) -> Array:
    """Solution of ``A x = b`` for a dense matrix, one right-hand side or many.

    Parameters
    ----------
    a : (..., n, n) array, real or complex floating
    b : (..., n) array of the same precision, real or complex
        Vectors, never columns. Their leading axes broadcast against those of `a`; several right-hand sides for one
        matrix, or for each of a batch, are one more leading axis: ``(k, n)`` for ``(n, n)``, ``(k, 5, n)`` for
        ``(5, n, n)``.
    throw : bool, default True
        Raise for a singular matrix, reading one flag. With ``False`` its solutions are NaN.

    Returns
    -------
    x : (..., n) array

    Raises
    ------
    SingularError
        A matrix of the batch is singular to working precision.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; integers; shapes that do not fit.

    See Also
    --------
    linear_solve : for operators that are never stored.

    Notes
    -----
    A matrix counts as singular where ``σ_min(D_r A D_c) <= 16 eps σ_max(D_r A D_c)``. The powers of two D_r and D_c
    bring rows and columns to one size, so that units do not matter: ``diag(1, 1e-20)`` is regular. Matrices that are
    singular but for rounding have at most 7 eps there; the error message prints the value. Rows whose sizes differ by
    more than 16 are scaled while pivots are chosen. The relative error of x is about ``eps κ`` and that of the gradient
    twice as much, where κ is ``numpy.linalg.cond(a)``. An item with NaN or infinity comes out as NaN; the others are
    not affected. Cost: ``⅔ n³`` flops and one n×n array for each matrix, ``2 n²`` flops for each vector, and ``4 n²``
    (not on NumPy, and near singular: about ``40 n²``) for the condition.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.solve(np.asarray([[2.0, 1.0], [1.0, 1.0]]), np.asarray([3.0, 2.0]))
    array([1., 1.])
    """
    return solve_fwd(a, b, throw=throw)[0]


@public
def solve_fwd(a: Array, b: Array, /, *, throw: bool = True) -> tuple[Array, tuple[Array, Array]]:
    """Compute `solve` and the factorisation that its reverse pass uses: ``x, (lu, pivots)``.

    Parameters and errors are those of `solve`. The arrays ``(..., n, n)`` and ``(..., n)`` are in the library's own
    form, NaN for singular items.
    """
    xp = namespace(a=a, b=b)
    check_square("a", a)
    if real_dtype(xp, a.dtype) != real_dtype(xp, b.dtype):
        check_dtypes(b=(b, a.dtype))
    lead = _leading_axes("b", a, b)
    refuse_recording("solve", a=a, b=b)
    lu, pivots, singular = lu_factor(a)  # NaN in singular items
    x = _solved(lu, pivots, b, lead, is_adjoint=False)
    if throw and is_true(xp.any(singular)):
        raise_singular(singular, a)
    return x, (lu, pivots)


@public
def solve_vjp(
    x_bar: Array, x: Array, lu: Array, pivots: Array, b: Array | None = None, /, *, throw: bool = True
) -> tuple[Array, Array]:
    r"""Gradient through `solve`, without another factorisation.

    Parameters
    ----------
    x_bar, x, lu, pivots
        Cotangent of the solution ``(..., n)``, the solution, and what `solve_fwd` saved.
    b : (..., n) array, optional
        Needed, for its shape and dtype, only where it was broadcast against a batch of matrices, or is real beside a
        complex matrix.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` these gradients are NaN.

    Returns
    -------
    a_bar : (..., n, n) array, shaped like `a`
        The sum over the right-hand sides that share a matrix.
    b_bar : (..., n) array, shaped like `b`

    Raises
    ------
    SingularError
        A matrix of the batch is singular (or not finite): there is no derivative.
    TypeError, ValueError
        As `solve`.

    Notes
    -----
    .. math:: y = A^{-H} \bar x, \qquad \bar b = y, \qquad \bar A = -y\, x^H

    Where `x` is NaN, so are both gradients of that item. Cost: ``2 n²`` flops for y and ``n²`` for the outer product of
    each right-hand side.

    References
    ----------
    .. [1] M. B. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
       differentiation" (2008), section 2.3.1.

    Examples
    --------
    >>> import numpy as np
    >>> x, saved = ddnref.solve_fwd(np.asarray([[2.0, 1.0], [1.0, 1.0]]), np.asarray([3.0, 2.0]))
    >>> ddnref.solve_vjp(np.asarray([1.0, 0.0]), x, *saved)  # of x[0]
    (array([[-1., -1.],
           [ 1.,  1.]]), array([ 1., -1.]))
    """
    xp = namespace(x_bar=x_bar, x=x, lu=lu, b=b)
    check_dtypes(x_bar=(x_bar, x.dtype))
    lead = _check_solution(xp, x, lu, pivots, b)
    if tuple(x_bar.shape) != tuple(x.shape):
        raise ValueError(f"x_bar has shape {tuple(x_bar.shape)}, expected that of x, {tuple(x.shape)}.")
    if throw:
        _raise_if_failed(lu)
    y = _solved(lu, pivots, x_bar, lead, is_adjoint=True)  # the same factorisation, transposed
    y = _nan_with(x, y)
    # A real matrix or vector has a real gradient, also where the other one is complex.
    return of_kind(_minus_outer(y, x, lu), lu), y if b is None else of_kind(summed_to(y, tuple(b.shape)), b)


@public
def solve_jvp(
    a_dot: Array | None,
    b_dot: Array | None,
    x: Array,
    lu: Array,
    pivots: Array,
    b: Array | None = None,
    /,
    *,
    throw: bool = True,
) -> Array:
    r"""Derivative of the solution along a direction of the matrix and the right-hand side, from the same factors.

    Parameters
    ----------
    a_dot : (..., n, n) array shaped like `a`, or None
        ``None`` where the matrix does not move.
    b_dot : (..., n) array shaped like `b`, or None
    x, lu, pivots
        The solution, and what `solve_fwd` saved.
    b : (..., n) array, optional
        Needed only to check shape and dtype of `b_dot`; without it any direction that broadcasts to the solution is
        taken.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` the derivatives of such an item are NaN.

    Returns
    -------
    x_dot : (..., n) array
        Of the shape and dtype of `x`.

    Raises
    ------
    SingularError
        A matrix of the batch is singular (or not finite): there is no derivative.
    TypeError, ValueError
        As `solve_vjp`; both directions are ``None``.

    Notes
    -----
    .. math:: \dot x = A^{-1} (\dot b - \dot A\, x)

    Where `x` is NaN, so is its derivative. Cost: ``4 n²`` flops for each right-hand side, half of them for the product
    with `a_dot`.

    References
    ----------
    .. [1] M. B. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
       differentiation" (2008), section 2.3.1.

    Examples
    --------
    >>> import numpy as np
    >>> x, saved = ddnref.solve_fwd(np.asarray([[2.0, 1.0], [1.0, 1.0]]), np.asarray([3.0, 2.0]))
    >>> ddnref.solve_jvp(None, np.asarray([1.0, 0.0]), x, *saved)
    array([ 1., -1.])
    """
    if a_dot is None and b_dot is None:
        raise TypeError("a_dot and b_dot are both None: there is no direction.")
    xp = namespace(a_dot=a_dot, b_dot=b_dot, x=x, lu=lu, b=b)
    lead = _check_solution(xp, x, lu, pivots, b)
    check_dtypes(a_dot=(a_dot, lu.dtype))
    check_shapes(a_dot=(a_dot, tuple(lu.shape)))
    if b_dot is not None:
        _check_direction(b_dot, x, lu, b)
    if throw:
        _raise_if_failed(lu)
    if 0 in x.shape:  # LAPACK takes no empty matrices
        return xp.zeros_like(x)
    # All right-hand sides of a matrix are the columns of one product and one solve.
    batch = tuple(lu.shape[:-2])
    right = None if b_dot is None else as_dtype(_columns(b_dot, batch, lead), x)
    if a_dot is not None:
        moved = as_dtype(a_dot, x) @ _columns(x, batch, lead)
        right = -moved if right is None else right - moved
    x_dot = _solved_columns(lu, pivots, right, lead, is_adjoint=False)
    return _nan_with(x, x_dot)


def saved_solve_vjp(lu_bar: Array, _: None, lu: Array, pivots: Array, *needed: Array) -> tuple[Array, None]:  # noqa: ARG001
    """Turn a cotangent of the factorisation into one of the matrix, as second derivatives need."""
    return lu_factor_vjp(lu_bar, lu, pivots), None


def saved_solve_jvp(
    a_dot: Array | None,
    _: Array | None,
    lu: Array,
    pivots: Array,
    *needed: Array,  # noqa: ARG001
) -> tuple[Array | None, None]:
    """Turn a tangent of the matrix into one of the factorisation, as second derivatives need; pivots never move."""
    return None if a_dot is None else lu_factor_jvp(a_dot, lu, pivots), None


# --- below: shapes -----------------------------------------------------------------------------------------------


def summed_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of broadcasting `shape` to that of `x`, a sum over the axes that were broadcast."""
    xp = namespace_of(x)
    extra = x.ndim - len(shape)  # axes that broadcasting put in front
    x = xp.sum(x, axis=tuple(range(extra))) if extra else x
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return xp.sum(x, axis=axes, keepdims=True) if axes else x


def check_source(name: str, b: Array, lead: tuple[int, ...], item: tuple[int, ...]) -> None:
    """Raise unless vectors ``(*lead, *item)`` can have come from `b` by broadcasting."""
    shape, extra = tuple(b.shape), len(lead) + len(item) - b.ndim
    wanted = (*lead, *item)[max(extra, 0) :]  # the axes that b has itself
    own = zip(shape[: len(wanted) - len(item)], wanted[: len(wanted) - len(item)], strict=True)
    if extra < 0 or shape[len(shape) - len(item) :] != item or any(p not in (1, q) for p, q in own):
        raise ValueError(
            f"{name} has shape {shape}, but the solution belongs to right-hand sides that broadcast to "
            f"{(*lead, *item)}: pass the {name} that was solved for."
        )


def _check_solution(xp: Namespace, x: Array, lu: Array, pivots: Array, b: Array | None) -> tuple[int, ...]:
    """Validate a solution, its factors and its right-hand side; return the leading axes of the solution."""
    check_factors(lu, pivots, "solve_fwd")
    check_precision(xp, lu=lu, x=x, **({} if b is None else {"b": b}))
    lead = _leading_axes("x", lu, x)
    check_is_whole(x, 1, lead, "this matrix")
    if b is not None:
        check_source("b", b, tuple(x.shape[:-1]), tuple(x.shape[-1:]))
    return lead


def check_factors(lu: Array, pivots: Array, source: str) -> None:
    """Validate LU factors that the function `source` saved."""
    check_square("lu", lu)
    xp = library(lu=lu, pivots=pivots)  # pivots are integers, so their dtype is not compared
    if not xp.isdtype(pivots.dtype, "integral"):
        raise TypeError(f"pivots has dtype {pivots.dtype}, expected the integers that {source} saved.")
    check_shapes(pivots=(pivots, tuple(lu.shape[:-1])))


def _check_direction(b_dot: Array, x: Array, matrix: Array, b: Array | None, axes: int = 1) -> None:
    """Raise unless `b_dot` can be a direction of the right-hand side, whose vectors have so many axes."""
    if b is not None:
        check_dtypes(b_dot=(b_dot, b.dtype))
        check_shapes(b_dot=(b_dot, tuple(b.shape)))
        return
    # A complex solution may belong to a real right-hand side if the matrix is complex.
    check_precision(namespace_of(x), x=x, b_dot=b_dot)
    if is_complex(b_dot) or not is_complex(matrix):
        check_dtypes(b_dot=(b_dot, x.dtype))
    check_source("b_dot", b_dot, tuple(x.shape[: x.ndim - axes]), tuple(x.shape[x.ndim - axes :]))


def _leading_axes(name: str, a: Array, b: Array) -> tuple[int, ...]:
    """Validate the right-hand sides; return the leading axes of the solution, broadcast from both."""
    n, batch, lead = a.shape[-1], tuple(a.shape[:-2]), tuple(b.shape[:-1])
    if b.ndim < 1 or b.shape[-1] != n:
        raise ValueError(
            f"{name} has shape {tuple(b.shape)}, expected (..., {n}): vectors for a matrix of shape {tuple(a.shape)}. "
            "Several right-hand sides are leading axes, not columns: pass xp.matrix_transpose of a matrix of columns."
        )
    return joint_axes(name, lead, batch)


def joint_axes(name: str, lead: tuple[int, ...], batch: tuple[int, ...], of: str = "a") -> tuple[int, ...]:
    """Broadcast the leading axes of right-hand sides against the batch axes of the matrix `of`, or raise."""
    if lead == batch:
        return lead
    width = max(len(batch), len(lead))  # missing axes count as 1
    pairs = list(zip((1,) * (width - len(batch)) + batch, (1,) * (width - len(lead)) + lead, strict=True))
    if any(p != q and 1 not in (p, q) for p, q in pairs):
        raise ValueError(f"the leading axes {lead} of {name} do not broadcast against the batch axes {batch} of {of}.")
    return tuple(q if p == 1 else p for p, q in pairs)


def check_is_whole(x: Array, axes: int, lead: tuple[int, ...], of: str) -> None:
    """Raise unless a solution, whose vectors have so many axes, has all the leading axes that solving gave it."""
    own = tuple(x.shape[: x.ndim - axes])
    if own != lead:
        raise ValueError(f"x has leading axes {own}, expected {lead}: the solution for {of}.")


def _columns(v: Array, batch: tuple[int, ...], lead: tuple[int, ...]) -> Array:
    """Vectors ``(*lead, n)`` as columns ``(*lead[k:], n, K)``: axes in front of those of the batch become columns."""
    xp = namespace_of(v)
    if v.shape[:-1] != lead:
        v = xp.broadcast_to(v, (*lead, v.shape[-1]))
    extra = len(lead) - len(batch)
    if extra == 0:
        return v[..., None]
    return move_axis(xp.reshape(v, (math.prod(lead[:extra]), *v.shape[extra:])), 0, -1)


def _vectors(columns: Array, batch: tuple[int, ...], lead: tuple[int, ...]) -> Array:
    """The inverse of `_columns`."""
    if len(lead) == len(batch):
        return columns[..., 0]
    return namespace_of(columns).reshape(move_axis(columns, -1, 0), (*lead, columns.shape[-2]))


def _nan_with(x: Array, y: Array) -> Array:
    """Vectors y, which nothing else holds, NaN where those of the solution x are."""
    xp = namespace_of(x)
    return put_nan(y, xp.any(xp.isnan(x), axis=-1, keepdims=True))


def _solved(lu: Array, pivots: Array, b: Array, lead: tuple[int, ...], *, is_adjoint: bool) -> Array:
    """`lu_solve` for vectors that broadcast to `lead`; NaN for a vector that is not finite."""
    if 0 in (*lead, b.shape[-1]):  # LAPACK takes no empty matrices
        return full((*lead, b.shape[-1]), 0.0, b)
    # Several right-hand sides of one matrix become columns of one solve.
    return _solved_columns(lu, pivots, _columns(b, tuple(lu.shape[:-2]), lead), lead, is_adjoint=is_adjoint)


def _solved_columns(lu: Array, pivots: Array, columns: Array, lead: tuple[int, ...], *, is_adjoint: bool) -> Array:
    """`_solved` for vectors in the form of `_columns`."""
    solver = partial(lu_solve, adjoint=is_adjoint)
    return solved_columns(solver, (lu, pivots), tuple(lu.shape[:-2]), columns, lead)


def solved_columns(
    solver: Callable[..., Array],
    factors: tuple[Array, ...],
    batch: tuple[int, ...],
    columns: Array,
    lead: tuple[int, ...],
) -> Array:
    """Vectors ``(*lead, n)`` from ``solver(*factors, columns)``, for right-hand sides in the form of `_columns`.

    The first of the factors, all with the axes `batch`, says whether the matrix is complex. NaN for a vector that is
    not finite.
    """
    like = factors[0]
    xp, items = namespace_of(like), tuple(columns.shape[:-2])
    if items != batch:
        factors = tuple(xp.broadcast_to(f, (*items, *f.shape[len(batch) :])) for f in factors)
    bad = ~xp.all(xp.isfinite(columns), axis=-2, keepdims=True)  # one bad vector must not spoil others of its matrix
    if is_complex(columns) and not is_complex(like):  # both parts, by the real factors
        parts = solver(*factors, xp.concat([xp.real(columns), xp.imag(columns)], axis=-1))
        k = columns.shape[-1]
        x = put_nan(as_complex(parts[..., :k]) + 1j * as_complex(parts[..., k:]), bad)
    else:
        x = put_nan(solver(*factors, as_dtype(columns, like)), bad)
    return _vectors(x, batch, lead)


def _minus_outer(y: Array, x: Array, a: Array) -> Array:
    """``−Σ y xᴴ`` over the right-hand sides of each matrix: one product."""
    batch, lead = tuple(a.shape[:-2]), tuple(x.shape[:-1])
    if 0 in (*lead, x.shape[-1]):
        return full(tuple(a.shape), 0.0, a)
    y, x = -_columns(y, batch, lead), adjoint(_columns(x, batch, lead))
    return summed_to(y * x if y.shape[-1] == 1 else y @ x, tuple(a.shape))  # n² numbers in one pass, or a product


def _raise_if_failed(lu: Array) -> None:
    """Raise `SingularError` for items that the forward marked as singular by NaN factors; reads one flag."""
    xp = namespace_of(lu)
    failed = xp.any(xp.isnan(xp.linalg.diagonal(lu)), axis=-1)
    if is_true(xp.any(failed)):
        raise_singular(failed)


def raise_singular(singular: Array, a: Array | None = None) -> None:
    """Raise `SingularError`, which names the items and, where the matrices are given, the condition of the first."""
    rcond = None if a is None else lambda i: rcond_of_matrix(a[(*i, ...)])
    found = singularity.named("The matrix", "matrices", singular, rcond)
    raise SingularError(
        f"{found}. The most likely cause is linearly dependent rows or columns, or fewer equations than unknowns. "
        'Remove the dependence, add a ridge, use ddnref.linear_solve(..., solver="lsmr") for least squares, or pass '
        "throw=False to get NaN for these items and the right solutions of the others."
    )
