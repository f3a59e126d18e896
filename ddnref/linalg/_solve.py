"""Dense linear systems ``A x = b`` and their VJP from the same factorisation.

With ``y = A⁻ᴴ x̄``:

    b̄ = y,        Ā = −y xᴴ
"""

from __future__ import annotations

import math

from ddnref._core.arrays import (
    Array,
    adjoint,
    full,
    is_true,
    library,
    namespace,
    namespace_of,
    nan_where,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes, check_square
from ddnref._kernels.dense import move_axis
from ddnref._kernels.lu import lu_factor, lu_factor_vjp, lu_solve
from ddnref._kernels.public import public
from ddnref.errors import SingularError


@public
def solve(a: Array, b: Array, /, *, throw: bool = True) -> Array:
    """Solution of ``A x = b`` for a dense matrix, one right-hand side or many.

    Parameters
    ----------
    a : (..., n, n) array, real or complex floating
    b : (..., n) array of the same dtype
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
    solve_fwd : also returns the factorisation.
    solve_vjp : the reverse-mode derivative.
    linear_solve : for operators that are never stored.

    Notes
    -----
    A matrix counts as singular where a pivot of its LU factorisation is no larger than the rounding errors of the
    sum that it is the result of, ``|u_jj| <= 64 eps Σ_k |l_jk| |u_kj|``, whatever the scale of rows and columns.
    That is always so where a pivot is exactly zero, and for 98 of 100 random matrices that are singular but for
    rounding; the others have a condition number κ near 1 / (64 eps). No condition number is estimated: the relative
    error of x is about ``eps κ`` and that of the gradient twice as much, where κ is ``numpy.linalg.cond(a)``. An item
    with NaN or infinity comes out as NaN; the others are not affected. Cost: ``⅔ n³`` flops and one n×n array for each
    matrix, ``2 n²`` flops for each vector.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.solve(np.asarray([[2.0, 1.0], [1.0, 1.0]]), np.asarray([3.0, 2.0]))
    array([1., 1.])
    """
    return solve_fwd(a, b, throw=throw)[0]


@public
def solve_fwd(a: Array, b: Array, /, *, throw: bool = True) -> tuple[Array, tuple[Array, Array]]:
    """Compute `solve` and the factorisation that its reverse pass uses.

    Parameters
    ----------
    a, b, throw
        As in `solve`.

    Returns
    -------
    x : (..., n) array
    (lu, pivots) : (..., n, n) and (..., n) arrays
        Factorisation of `a`, in the library's own form; NaN for singular items.

    Raises
    ------
    SingularError, TypeError, ValueError
        As `solve`.
    """
    xp = namespace(a=a, b=b)
    check_square("a", a)
    check_dtypes(b=(b, a.dtype))
    _batch("b", a, b)
    refuse_recording("solve", a)
    refuse_recording("solve", b)
    lu, pivots, singular = lu_factor(a)  # NaN in singular items
    x = _solved(lu, pivots, b, is_adjoint=False)
    if throw and is_true(xp.any(singular)):
        raise_singular(singular)
    return x, (lu, pivots)


@public
def solve_vjp(
    x_bar: Array, x: Array, lu: Array, pivots: Array, b: Array | None = None, /, *, throw: bool = True
) -> tuple[Array, Array]:
    r"""Gradient through `solve`, without another factorisation.

    Parameters
    ----------
    x_bar : (..., n) array
        Cotangent of the solution.
    x, lu, pivots
        The solution, and what `solve_fwd` saved.
    b : (..., n) array, optional
        Needed, for its shape, only where it was broadcast against a batch of matrices.
    throw : bool, default True
        Raise where the matrix was singular, reading one flag. With ``False`` these gradients are NaN.

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
    check_square("lu", lu)
    check_dtypes(x_bar=(x_bar, lu.dtype), x=(x, lu.dtype), b=(b, lu.dtype))
    library(lu=lu, pivots=pivots)  # pivots are integers, so their dtype is not compared
    if not xp.isdtype(pivots.dtype, "integral"):
        raise TypeError(f"pivots has dtype {pivots.dtype}, expected the integers that solve_fwd saved.")
    check_shapes(pivots=(pivots, tuple(lu.shape[:-1])))
    if tuple(x_bar.shape) != tuple(x.shape):
        raise ValueError(f"x_bar has shape {tuple(x_bar.shape)}, expected that of x, {tuple(x.shape)}.")
    _batch("x", lu, x)
    if b is not None:
        check_source("b", b, tuple(x.shape[:-1]), tuple(x.shape[-1:]))
    failed = xp.any(xp.isnan(xp.linalg.diagonal(lu)), axis=-1)  # how the forward marked singular items
    if throw and is_true(xp.any(failed)):
        raise_singular(failed)
    y = _solved(lu, pivots, x_bar, is_adjoint=True)  # the same factorisation, transposed
    y = nan_where(xp.any(xp.isnan(x), axis=-1, keepdims=True), y)
    return _minus_outer(y, x, lu), y if b is None else summed_to(y, tuple(b.shape))


def saved_solve_vjp(lu_bar: Array, _: None, lu: Array, pivots: Array, *needed: Array) -> tuple[Array, None]:  # noqa: ARG001
    """Turn a cotangent of the factorisation into one of the matrix, as second derivatives need."""
    return lu_factor_vjp(lu_bar, lu, pivots), None


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


def _batch(name: str, a: Array, b: Array) -> tuple[int, ...]:
    """Validate the right-hand sides; return the leading axes of the solution."""
    n = a.shape[-1]
    if b.ndim < 1 or b.shape[-1] != n:
        raise ValueError(
            f"{name} has shape {tuple(b.shape)}, expected (..., {n}): vectors for a matrix of shape {tuple(a.shape)}. "
            "Several right-hand sides are leading axes, not columns: pass xp.matrix_transpose of a matrix of columns."
        )
    return _broadcast(name, tuple(a.shape[:-2]), tuple(b.shape[:-1]))


def _broadcast(name: str, batch: tuple[int, ...], lead: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that batch axes and leading axes broadcast to."""
    width = max(len(batch), len(lead))  # missing axes count as 1
    pairs = list(zip((1,) * (width - len(batch)) + batch, (1,) * (width - len(lead)) + lead, strict=True))
    if any(p != q and 1 not in (p, q) for p, q in pairs):
        raise ValueError(f"the leading axes {lead} of {name} do not broadcast against the batch axes {batch} of a.")
    return tuple(q if p == 1 else p for p, q in pairs)


def _columns(v: Array, batch: tuple[int, ...], lead: tuple[int, ...]) -> Array:
    """Vectors ``(*lead, n)`` as columns ``(*lead[k:], n, K)``: axes in front of those of the batch become columns."""
    xp = namespace_of(v)
    v = xp.broadcast_to(v, (*lead, v.shape[-1]))
    extra = len(lead) - len(batch)
    if extra == 0:
        return v[..., None]
    return move_axis(xp.reshape(v, (math.prod(lead[:extra]), *v.shape[extra:])), 0, -1)


def _solved(lu: Array, pivots: Array, b: Array, *, is_adjoint: bool) -> Array:
    """`lu_solve` for vectors that broadcast; NaN for a vector that is not finite."""
    xp = namespace_of(lu)
    batch = tuple(lu.shape[:-2])
    lead = _broadcast("b", batch, tuple(b.shape[:-1]))
    if 0 in (*lead, b.shape[-1]):  # LAPACK takes no empty matrices
        return full((*lead, b.shape[-1]), 0.0, b)
    # Several right-hand sides of one matrix become columns of one solve.
    columns = _columns(b, batch, lead)
    items = columns.shape[:-2]
    if tuple(items) != batch:
        lu = xp.broadcast_to(lu, (*items, *lu.shape[-2:]))
        pivots = xp.broadcast_to(pivots, (*items, pivots.shape[-1]))
    bad = ~xp.all(xp.isfinite(columns), axis=-2, keepdims=True)  # one bad vector must not spoil others of its matrix
    x = nan_where(bad, lu_solve(lu, pivots, columns, adjoint=is_adjoint))
    if columns.shape[-1] == 1 and len(lead) == len(batch):
        return x[..., 0]
    return xp.reshape(move_axis(x, -1, 0), (*lead, x.shape[-2]))


def _minus_outer(y: Array, x: Array, a: Array) -> Array:
    """``−Σ y xᴴ`` over the right-hand sides of each matrix: one product."""
    batch, lead = tuple(a.shape[:-2]), tuple(x.shape[:-1])
    if 0 in (*lead, x.shape[-1]):
        return full(tuple(a.shape), 0.0, a)
    y, x = -_columns(y, batch, lead), adjoint(_columns(x, batch, lead))
    return summed_to(y * x if y.shape[-1] == 1 else y @ x, tuple(a.shape))  # n² numbers in one pass, or a product


def raise_singular(singular: Array) -> None:
    """Raise `SingularError`, saying how many matrices are singular and what helps."""
    xp = namespace_of(singular)
    count, items = int(xp.sum(xp.astype(singular, xp.int32))), math.prod(singular.shape)
    raise SingularError(
        f"{count} of {items} matrices are singular to working precision: a pivot of the factorisation is zero or "
        "nothing but rounding. The most likely cause is linearly dependent rows or columns, or fewer equations than "
        'unknowns. Remove the dependence, add a ridge, use ddnref.linear_solve(..., solver="lsmr") for least '
        "squares, or pass throw=False to get NaN for these items and the right solutions of the others."
    )
