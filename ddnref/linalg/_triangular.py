"""Systems with a triangular matrix and their derivatives.

With ``y = A⁻ᴴ x̄`` and tri(M) the triangle of M that the system reads:

    b̄ = y,        Ā = −tri(y xᴴ)
    ẋ = A⁻¹ (ḃ − tri(Ȧ) x)
"""

from __future__ import annotations

from collections.abc import Callable

from ddnref._core.arrays import (
    Array,
    adjoint,
    among,
    as_dtype,
    full,
    is_true,
    namespace,
    namespace_of,
    nan_where,
    of_kind,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_precision, check_shapes, check_square
from ddnref._kernels.dense import identity
from ddnref._kernels.lu import solve_triangular as _solve_triangular
from ddnref._kernels.public import public
from ddnref.errors import SingularError
from ddnref.linalg._solve import (
    _check_direction,
    _columns,
    _leading_axes,
    _minus_outer,
    _nan_with,
    check_is_whole,
    check_source,
    solved_columns,
    summed_to,
)


@public
def solve_triangular(a: Array, b: Array, /, *, lower: bool = False, throw: bool = True) -> Array:
    """Solution of ``A x = b`` for a triangular matrix, one right-hand side or many.

    Parameters
    ----------
    a : (..., n, n) array, real or complex floating
        Only one triangle is read, with its diagonal; the other may hold anything.
    b : (..., n) array of the same precision, real or complex
        Vectors, never columns. They broadcast as in `solve`: several right-hand sides are one more leading axis.
    lower : bool, default False
        Read the lower triangle instead of the upper one.
    throw : bool, default True
        Raise for a singular matrix, reading one flag. With ``False`` its solutions are NaN.

    Returns
    -------
    x : (..., n) array

    Raises
    ------
    SingularError
        A matrix of the batch has a zero on its diagonal.
    TypeError, ValueError
        As `solve`.

    See Also
    --------
    cholesky, qr : where triangular matrices come from.

    Notes
    -----
    By substitution, whose result solves a system in which every entry of the triangle is off by at most ``n eps`` of
    itself. So a triangular matrix is singular where its diagonal has a zero and nowhere else: one of a large condition
    is not refused, unlike in `solve`. An item with NaN or infinity in its triangle comes out as NaN; the others are not
    affected. Cost: ``n²`` flops for each vector.

    References
    ----------
    .. [1] N. J. Higham, "Accuracy and stability of numerical algorithms" (SIAM, 2002), theorem 8.5.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.solve_triangular(np.asarray([[2.0, 1.0], [0.0, 4.0]]), np.asarray([4.0, 8.0]))
    array([1., 2.])
    """
    xp = namespace(a=a, b=b)
    check_square("a", a)
    check_precision(xp, a=a, b=b)
    lead = _leading_axes("b", a, b)
    refuse_recording("solve_triangular", a=a, b=b)
    solver, singular = _solver(a, lower, is_adjoint=False)
    if throw:
        _raise_singular(singular)
    return solver(b, lead)


@public
def solve_triangular_vjp(
    x_bar: Array, x: Array, a: Array, b: Array | None = None, /, *, lower: bool = False, throw: bool = True
) -> tuple[Array, Array]:
    r"""Gradient through `solve_triangular`.

    Parameters
    ----------
    x_bar, x, a
        Cotangent of the solution ``(..., n)``, the solution and the matrix.
    b : (..., n) array, optional
        Needed, for its shape and dtype, only where it was broadcast against a batch of matrices, or is real beside a
        complex matrix.
    lower : bool, default False
        As in `solve_triangular`.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` these gradients are NaN.

    Returns
    -------
    a_bar : (..., n, n) array, shaped like `a`
        Zero in the triangle that is not read. The sum over the right-hand sides that share a matrix.
    b_bar : (..., n) array, shaped like `b`

    Raises
    ------
    SingularError
        A matrix of the batch has a zero on its diagonal: there is no derivative.
    TypeError, ValueError
        As `solve_triangular`.

    Notes
    -----
    .. math:: y = A^{-H} \bar x, \qquad \bar b = y, \qquad \bar A = -\mathrm{tri}(y\, x^H)

    Where `x` is NaN, so are both gradients of that item. Cost: ``n²`` flops for y and for the outer product of each
    right-hand side.

    References
    ----------
    .. [1] M. B. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
       differentiation" (2008), section 2.3.1.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.asarray([[2.0, 1.0], [0.0, 4.0]])
    >>> x = ddnref.solve_triangular(a, np.asarray([4.0, 8.0]))
    >>> ddnref.solve_triangular_vjp(np.asarray([1.0, 0.0]), x, a)  # of x[0]
    (array([[-0.5 , -1.  ],
           [ 0.  ,  0.25]]), array([ 0.5  , -0.125]))
    """
    xp = namespace(x_bar=x_bar, x=x, a=a, b=b)
    check_dtypes(x_bar=(x_bar, x.dtype))
    lead = _check_solution(a, x, b)
    check_shapes(x_bar=(x_bar, tuple(x.shape)))
    solver, singular = _solver(a, lower, is_adjoint=True)
    if throw:
        _raise_singular(singular)
    y = _nan_with(x, solver(x_bar, lead))
    a_bar = of_kind(_minus_outer(y, x, a), a)
    a_bar = a_bar * _triangle(xp.ones_like(a_bar), lower)  # a product, so that NaN fills the whole item
    return a_bar, y if b is None else of_kind(summed_to(y, tuple(b.shape)), b)


@public
def solve_triangular_jvp(
    a_dot: Array | None,
    b_dot: Array | None,
    x: Array,
    a: Array,
    b: Array | None = None,
    /,
    *,
    lower: bool = False,
    throw: bool = True,
) -> Array:
    r"""Derivative of the solution along a direction of the matrix and the right-hand side.

    Parameters
    ----------
    a_dot : (..., n, n) array shaped like `a`, or None
        Only the triangle that is read counts.
    b_dot : (..., n) array shaped like `b`, or None
    x, a, b, lower, throw
        As in `solve_triangular_vjp`.

    Returns
    -------
    x_dot : (..., n) array
        Of the shape and dtype of `x`.

    Raises
    ------
    SingularError, TypeError, ValueError
        As `solve_triangular_vjp`; both directions are ``None``.

    Notes
    -----
    .. math:: \dot x = A^{-1} (\dot b - \mathrm{tri}(\dot A)\, x)

    Where `x` is NaN, so is its derivative. Cost: ``3 n²`` flops for each right-hand side.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.asarray([[2.0, 1.0], [0.0, 4.0]])
    >>> x = ddnref.solve_triangular(a, np.asarray([4.0, 8.0]))
    >>> ddnref.solve_triangular_jvp(None, np.asarray([0.0, 1.0]), x, a)
    array([-0.125,  0.25 ])
    """
    if a_dot is None and b_dot is None:
        raise TypeError("a_dot and b_dot are both None: there is no direction.")
    xp = namespace(a_dot=a_dot, b_dot=b_dot, x=x, a=a, b=b)
    lead = _check_solution(a, x, b)
    check_dtypes(a_dot=(a_dot, a.dtype))
    check_shapes(a_dot=(a_dot, tuple(a.shape)))
    if b_dot is not None:
        _check_direction(b_dot, x, a, b)
    solver, singular = _solver(a, lower, is_adjoint=False)
    if throw:
        _raise_singular(singular)
    right = None if b_dot is None else xp.broadcast_to(as_dtype(b_dot, x), x.shape)
    if a_dot is not None and 0 not in x.shape:
        moved = (as_dtype(_triangle(a_dot, lower), x) @ x[..., None])[..., 0]
        right = -moved if right is None else right - moved
    if right is None or 0 in x.shape:
        return xp.zeros_like(x)
    return _nan_with(x, solver(right, lead))


def _triangle(a: Array, lower: bool) -> Array:
    """The triangle of a matrix that the system reads, with its diagonal."""
    xp = namespace_of(a)
    return xp.tril(a) if lower else xp.triu(a)


def _solver(a: Array, lower: bool, is_adjoint: bool) -> tuple[Callable[[Array, tuple[int, ...]], Array], Array]:
    """Return how to solve with A, or with Aᴴ, for vectors that broadcast to leading axes, and which are singular."""
    xp, batch = namespace_of(a), tuple(a.shape[:-2])
    t = _triangle(a, lower)
    singular = xp.any(xp.linalg.diagonal(t) == 0, axis=-1)
    bad = singular | ~xp.all(xp.isfinite(t), axis=(-2, -1))
    t = xp.where(bad[..., None, None], identity(t.shape[-1], t), t)
    t, reads_lower = (adjoint(t), not lower) if is_adjoint else (t, lower)

    def kernel(t: Array, bad: Array, columns: Array) -> Array:
        return nan_where(bad[..., None, None], _solve_triangular(t, columns, lower=reads_lower))

    def solver(vectors: Array, lead: tuple[int, ...]) -> Array:
        if 0 in (*lead, t.shape[-1]):
            return full((*lead, t.shape[-1]), 0.0, vectors)
        return solved_columns(kernel, (t, bad), batch, _columns(vectors, batch, lead), lead)

    return solver, singular


def _check_solution(a: Array, x: Array, b: Array | None) -> tuple[int, ...]:
    """Validate a solution, its matrix and its right-hand side; return the leading axes of the solution."""
    check_square("a", a)
    check_precision(namespace_of(a), a=a, x=x, **({} if b is None else {"b": b}))
    lead = _leading_axes("x", a, x)
    check_is_whole(x, 1, lead, "this matrix")
    if b is not None:
        check_source("b", b, tuple(x.shape[:-1]), tuple(x.shape[-1:]))
    return lead


def _raise_singular(singular: Array) -> None:
    """Raise `SingularError` for items with a zero on the diagonal; reads one flag."""
    if is_true(namespace_of(singular).any(singular)):
        raise SingularError(
            f"A triangular matrix has a zero on its diagonal and is singular{among(singular)}. The most likely causes "
            "are (a) the wrong triangle, see lower=, (b) a factor of a matrix with dependent columns. Remove the "
            "dependence, add a ridge to the matrix that was factored, or pass throw=False to get NaN for these items "
            "and the right solutions of the others."
        )
