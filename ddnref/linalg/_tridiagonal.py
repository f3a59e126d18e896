"""Systems with a tridiagonal or a block tridiagonal matrix, and their derivatives in time linear in the size.

With ``y = A⁻ᴴ x̄``, a system of the same kind, and with band(M) the blocks of M on the three diagonals,

    b̄ = y,        Ā = −band(y xᴴ)
    ẋ = A⁻¹ (ḃ − Ȧ x)

A band is shared by all right-hand sides of its matrix and gets the sum of their outer products. Numbers are blocks of
order one: the functions for both add or drop two axes, and all that follows is the same.
"""

from __future__ import annotations

from typing import NamedTuple

from ddnref._core.arrays import (
    Array,
    Namespace,
    adjoint,
    as_dtype,
    is_complex,
    is_true,
    namespace,
    namespace_of,
    of_kind,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_precision, check_shapes
from ddnref._kernels import singularity
from ddnref._kernels.public import public
from ddnref._kernels.tridiagonal import Bands, adjoint_bands, product, solve_and_judge
from ddnref._kernels.vectors import as_complex
from ddnref.errors import SingularError
from ddnref.linalg._solve import (
    _check_direction,
    _columns,
    _nan_with,
    check_is_whole,
    check_source,
    joint_axes,
    solved_columns,
    summed_to,
)


@public
def solve_tridiagonal(
    lower: Array, diagonal: Array, upper: Array, b: Array, /, *, throw: bool = True
) -> Array:  # fmt: skip
    """Solution of ``A x = b`` for a tridiagonal matrix, in time linear in its size.

    Parameters
    ----------
    lower, diagonal, upper : (..., n - 1), (..., n) and (..., n - 1) arrays of one dtype, real or complex floating
        The entries ``A[i + 1, i]``, ``A[i, i]`` and ``A[i, i + 1]``; n is at least 1.
    b : (..., n) array of the same precision, real or complex
        Several right-hand sides are one more leading axis. The leading axes of all four arrays broadcast against each
        other, so that one band may be shared by a batch.
    throw : bool, default True
        Raise for a singular matrix, reading one flag. With ``False`` its solutions are NaN.

    Returns
    -------
    x : (..., n) array

    Raises
    ------
    SingularError
        A matrix of the batch is singular to working precision, as in `solve`.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; integers; shapes that do not fit. The message names the argument.

    See Also
    --------
    solve_block_tridiagonal : for matrices in the place of numbers, such as those of a smoothing spline.

    Notes
    -----
    The matrix need be neither symmetric nor diagonally dominant: rows are exchanged on NumPy (LAPACK's ``gttrf``), and
    pairs of rows turned by orthogonal transformations on other libraries, which take ``log₂ n`` steps and no loop over
    the unknowns. Both are backward stable, and the scale of a row does not matter. The relative error of x is about
    ``eps κ``, where κ is ``numpy.linalg.cond`` of the matrix. An item with NaN or infinity comes out as NaN; the others
    are not affected. Cost: about ``10 n`` flops on NumPy, four times that with the check for singular matrices, and a
    few hundred n elsewhere.

    References
    ----------
    .. [1] S. J. Wright, "Stable parallel algorithms for two-point boundary value problems", SIAM Journal on Scientific
       and Statistical Computing 13 (1992).

    Examples
    --------
    >>> import numpy as np
    >>> off = np.asarray([1.0, 1.0])
    >>> ddnref.solve_tridiagonal(off, np.asarray([0.0, 1.0, 2.0]), off, np.asarray([2.0, 6.0, 8.0]))
    array([1., 2., 3.])
    """
    return _solution("solve_tridiagonal", False, lower, diagonal, upper, b, throw)


@public
def solve_tridiagonal_vjp(
    x_bar: Array,
    x: Array,
    lower: Array,
    diagonal: Array,
    upper: Array,
    b: Array | None = None,
    /,
    *,
    throw: bool = True,
) -> tuple[Array, Array, Array, Array]:
    r"""Gradient through `solve_tridiagonal`, from one more system.

    Parameters
    ----------
    x_bar, x
        Cotangent of the solution ``(..., n)``, and the solution.
    lower, diagonal, upper
        The bands, as in `solve_tridiagonal`.
    b : (..., n) array, optional
        Needed, for its shape and dtype, only where it was broadcast against a batch of matrices, or is real beside a
        complex matrix.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` these gradients are NaN.

    Returns
    -------
    lower_bar, diagonal_bar, upper_bar, b_bar : arrays, shaped like `lower`, `diagonal`, `upper` and `b`
        Sums over the items that share them.

    Raises
    ------
    SingularError, TypeError, ValueError
        As `solve_tridiagonal`.

    Notes
    -----
    .. math:: A^H y = \bar x, \qquad \bar b = y, \qquad \bar A_{ij} = -y_i\, \mathrm{conj}(x_j), \quad |i - j| \le 1

    Where `x` is NaN, so are the gradients of that item. Cost: that of `solve_tridiagonal`.

    Examples
    --------
    >>> import numpy as np
    >>> off, diagonal = np.asarray([1.0, 1.0]), np.asarray([0.0, 1.0, 2.0])
    >>> x = ddnref.solve_tridiagonal(off, diagonal, off, np.asarray([2.0, 6.0, 8.0]))
    >>> lower_bar, diagonal_bar, upper_bar, b_bar = ddnref.solve_tridiagonal_vjp(
    ...     np.asarray([1.0, 0.0, 0.0]), x, off, diagonal, off)  # of x[0]
    >>> np.round(b_bar, 12).tolist()
    [-0.5, 1.0, -0.5]
    """
    return _vjp(False, x_bar, x, lower, diagonal, upper, b, throw)


@public
def solve_tridiagonal_jvp(
    lower_dot: Array | None,
    diagonal_dot: Array | None,
    upper_dot: Array | None,
    b_dot: Array | None,
    x: Array,
    lower: Array,
    diagonal: Array,
    upper: Array,
    b: Array | None = None,
    /,
    *,
    throw: bool = True,
) -> Array:
    r"""Derivative of the solution along a direction of the bands and the right-hand side, from one more system.

    Parameters
    ----------
    lower_dot, diagonal_dot, upper_dot, b_dot : arrays shaped like `lower`, `diagonal`, `upper` and `b`, or None
        ``None`` for one that does not move.
    x, lower, diagonal, upper
        The solution and the bands.
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
    SingularError, TypeError, ValueError
        As `solve_tridiagonal`; all directions are ``None``.

    Notes
    -----
    .. math:: A\, \dot x = \dot b - \dot A\, x

    Where `x` is NaN, so is its derivative. Cost: that of `solve_tridiagonal`.

    Examples
    --------
    >>> import numpy as np
    >>> off, diagonal = np.asarray([1.0, 1.0]), np.asarray([0.0, 1.0, 2.0])
    >>> x = ddnref.solve_tridiagonal(off, diagonal, off, np.asarray([2.0, 6.0, 8.0]))
    >>> x_dot = ddnref.solve_tridiagonal_jvp(None, None, None, np.asarray([1.0, 0.0, 0.0]), x, off, diagonal, off)
    >>> np.round(x_dot, 12).tolist()
    [-0.5, 1.0, -0.5]
    """
    return _jvp(False, (lower_dot, diagonal_dot, upper_dot), b_dot, x, lower, diagonal, upper, b, throw)


# --- blocks ---------------------------------------------------------------------------------------------------------


@public
def solve_block_tridiagonal(
    lower: Array, diagonal: Array, upper: Array, b: Array, /, *, throw: bool = True
) -> Array:  # fmt: skip
    """Solution of ``A x = b`` for a block tridiagonal matrix, in time linear in the number of blocks.

    Parameters
    ----------
    lower, diagonal, upper : (..., n - 1, k, k), (..., n, k, k) and (..., n - 1, k, k) arrays of one dtype
        The blocks ``A_{i+1,i}``, ``A_{i,i}`` and ``A_{i,i+1}``, real or complex floating; n and k are at least 1.
    b : (..., n, k) array of the same precision, real or complex
        Several right-hand sides are one more leading axis. The leading axes of all four arrays broadcast against each
        other, so that one band may be shared by a batch.
    throw : bool, default True
        Raise for a singular matrix, reading one flag. With ``False`` its solutions are NaN.

    Returns
    -------
    x : (..., n, k) array

    Raises
    ------
    SingularError, TypeError, ValueError
        As `solve_tridiagonal`.

    Notes
    -----
    Single blocks may be singular, those on the diagonal too. On NumPy the matrix is factored as a band of width
    ``4 k − 1`` with row exchanges (LAPACK's ``gbtrf``); on other libraries as `solve_tridiagonal` is. Cost: about
    ``16 n k³`` flops and ``6 n k²`` numbers on NumPy, ten times as many elsewhere.

    Examples
    --------
    >>> import numpy as np
    >>> diagonal, off = np.asarray([np.eye(2)] * 3), np.zeros((2, 2, 2))
    >>> ddnref.solve_block_tridiagonal(off, 2 * diagonal, off, np.ones((3, 2)))
    array([[0.5, 0.5],
           [0.5, 0.5],
           [0.5, 0.5]])
    """
    return _solution("solve_block_tridiagonal", True, lower, diagonal, upper, b, throw)


@public
def solve_block_tridiagonal_vjp(
    x_bar: Array,
    x: Array,
    lower: Array,
    diagonal: Array,
    upper: Array,
    b: Array | None = None,
    /,
    *,
    throw: bool = True,
) -> tuple[Array, Array, Array, Array]:
    r"""Gradient through `solve_block_tridiagonal`, from one more system.

    Parameters
    ----------
    x_bar, x
        Cotangent of the solution ``(..., n, k)``, and the solution.
    lower, diagonal, upper
        The blocks, as in `solve_block_tridiagonal`.
    b : (..., n, k) array, optional
        As in `solve_tridiagonal_vjp`.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` these gradients are NaN.

    Returns
    -------
    lower_bar, diagonal_bar, upper_bar, b_bar : arrays, shaped like `lower`, `diagonal`, `upper` and `b`
        Sums over the items that share them.

    Raises
    ------
    SingularError, TypeError, ValueError
        As `solve_tridiagonal`.

    Notes
    -----
    .. math:: A^H y = \bar x, \qquad \bar b = y, \qquad \bar A_{ij} = -y_i\, x_j^H, \quad |i - j| \le 1

    Cost: that of `solve_block_tridiagonal`.

    Examples
    --------
    >>> import numpy as np
    >>> diagonal, off = np.asarray([2 * np.eye(2)] * 3), np.zeros((2, 2, 2))
    >>> x = ddnref.solve_block_tridiagonal(off, diagonal, off, np.ones((3, 2)))
    >>> bars = ddnref.solve_block_tridiagonal_vjp(np.ones((3, 2)), x, off, diagonal, off)
    >>> bars[1][0]
    array([[-0.25, -0.25],
           [-0.25, -0.25]])
    """
    return _vjp(True, x_bar, x, lower, diagonal, upper, b, throw)


@public
def solve_block_tridiagonal_jvp(
    lower_dot: Array | None,
    diagonal_dot: Array | None,
    upper_dot: Array | None,
    b_dot: Array | None,
    x: Array,
    lower: Array,
    diagonal: Array,
    upper: Array,
    b: Array | None = None,
    /,
    *,
    throw: bool = True,
) -> Array:
    r"""Derivative of the solution along a direction of the blocks and the right-hand side, from one more system.

    Parameters
    ----------
    lower_dot, diagonal_dot, upper_dot, b_dot : arrays shaped like `lower`, `diagonal`, `upper` and `b`, or None
        ``None`` for one that does not move.
    x, lower, diagonal, upper, b, throw
        As in `solve_tridiagonal_jvp`, of blocks.

    Returns
    -------
    x_dot : (..., n, k) array
        Of the shape and dtype of `x`.

    Raises
    ------
    SingularError, TypeError, ValueError
        As `solve_tridiagonal`; all directions are ``None``.

    Notes
    -----
    .. math:: A\, \dot x = \dot b - \dot A\, x

    Cost: that of `solve_block_tridiagonal`.

    Examples
    --------
    >>> import numpy as np
    >>> diagonal, off = np.asarray([2 * np.eye(2)] * 3), np.zeros((2, 2, 2))
    >>> x = ddnref.solve_block_tridiagonal(off, diagonal, off, np.ones((3, 2)))
    >>> ddnref.solve_block_tridiagonal_jvp(None, diagonal, None, None, x, off, diagonal, off)[0]
    array([-0.5, -0.5])
    """
    return _jvp(True, (lower_dot, diagonal_dot, upper_dot), b_dot, x, lower, diagonal, upper, b, throw)


# --- both -----------------------------------------------------------------------------------------------------------


class _System(NamedTuple):
    """The bands of matrices as blocks with common batch axes, and the leading axes of their solutions."""

    xp: Namespace
    bands: Bands
    batch: tuple[int, ...]
    lead: tuple[int, ...]
    size: int  # of the matrix, n k


def _solution(
    name: str, blocks: bool, lower: Array, diagonal: Array, upper: Array, b: Array, throw: bool
) -> Array:  # fmt: skip
    """The solution, for the function of that name."""
    s = _system(blocks, lower, diagonal, upper, "b", b)
    refuse_recording(name, lower=lower, diagonal=diagonal, upper=upper, b=b)
    x, singular = _solved(s, s.bands, _flat(b, blocks))
    if throw:
        _raise_singular(s.xp, singular)
    return _shaped(x, diagonal, blocks)


def _vjp(
    blocks: bool,
    x_bar: Array,
    x: Array,
    lower: Array,
    diagonal: Array,
    upper: Array,
    b: Array | None,
    throw: bool,
) -> tuple[Array, Array, Array, Array]:
    """``b̄ = y`` and the three bands of ``−y xᴴ``."""
    s = _system(blocks, lower, diagonal, upper, "x", x, b, x_bar=x_bar)
    check_dtypes(x_bar=(x_bar, x.dtype))
    check_shapes(x_bar=(x_bar, tuple(x.shape)))
    flat = _flat(x, blocks)
    y, singular = _solved(s, adjoint_bands(s.bands), _flat(x_bar, blocks))
    if throw:
        _raise_singular(s.xp, singular)
    y = _nan_with(flat, y)
    bars = _outer_bands(s, y, flat, (lower, diagonal, upper), blocks)
    y = _shaped(y, diagonal, blocks)
    return *bars, y if b is None else of_kind(summed_to(y, tuple(b.shape)), b)


def _jvp(
    blocks: bool,
    dots: tuple[Array | None, Array | None, Array | None],
    b_dot: Array | None,
    x: Array,
    lower: Array,
    diagonal: Array,
    upper: Array,
    b: Array | None,
    throw: bool,
) -> Array:
    """``A⁻¹ (ḃ − Ȧ x)``."""
    names, given = ("lower", "diagonal", "upper"), (lower, diagonal, upper)
    directions = {f"{name}_dot": dot for name, dot in zip(names, dots, strict=True)}
    if b_dot is None and all(dot is None for dot in dots):
        raise TypeError(f"{', '.join(directions)} and b_dot are all None: there is no direction.")
    s = _system(blocks, lower, diagonal, upper, "x", x, b, b_dot=b_dot, **directions)
    for (name, dot), band in zip(directions.items(), given, strict=True):
        check_dtypes(**{name: (dot, band.dtype)})
        check_shapes(**{name: (dot, tuple(band.shape))})
    flat = _flat(x, blocks)
    right = s.xp.zeros_like(flat)
    if b_dot is not None:
        _check_direction(b_dot, x, diagonal, b, 2 if blocks else 1)
        right = right + as_dtype(_flat(b_dot, blocks), x)
    if any(dot is not None for dot in dots):
        moved = tuple(s.xp.zeros_like(band) if dot is None else dot for dot, band in zip(dots, given, strict=True))
        right = right - product(_as_blocks(s.xp, tuple(as_dtype(m, x) for m in moved), s.batch, blocks), flat)
    x_dot, singular = _solved(s, s.bands, right)
    if throw:
        _raise_singular(s.xp, singular)
    return _shaped(_nan_with(flat, x_dot), diagonal, blocks)


def _outer_bands(s: _System, y: Array, x: Array, given: Bands, blocks: bool) -> Bands:
    """The three bands of ``−Σ y xᴴ`` over the right-hand sides of each matrix, shaped like the given bands."""
    xp, n, k = s.xp, given[1].shape[-3 if blocks else -1], given[1].shape[-1] if blocks else 1
    if 0 in s.lead:
        return tuple(map(xp.zeros_like, given))
    y, x = (_columns(v, s.batch, s.lead) for v in (-y, x))
    y, x = (xp.reshape(v, (*v.shape[:-2], n, k, v.shape[-1])) for v in (y, x))
    x = adjoint(x)

    def outer(rows: slice, columns: slice, like: Array) -> Array:
        left, right = y[..., rows, :, :], x[..., columns, :, :]
        found = left * right if left.shape[-1] == 1 else left @ right
        found = found if blocks else found[..., 0, 0]
        return of_kind(summed_to(found, tuple(like.shape)), like)

    after, before, every = slice(1, None), slice(None, n - 1), slice(None)
    lower, diagonal, upper = given
    return outer(after, before, lower), outer(every, every, diagonal), outer(before, after, upper)


def _solved(s: _System, bands: Bands, b: Array) -> tuple[Array, Array]:
    """Solve for vectors that broadcast to the leading axes; return which matrices are singular as well."""
    if 0 in s.lead:
        like = as_complex(b) if is_complex(bands[1]) else b
        none = s.xp.any(s.xp.isnan(bands[1]), axis=(-3, -2, -1))
        return s.xp.broadcast_to(s.xp.zeros_like(like[..., :1]), (*s.lead, s.size)) + 0, none
    judged: list[Array] = []

    def solver(lower: Array, diagonal: Array, upper: Array, columns: Array) -> Array:
        x, singular = solve_and_judge(lower, diagonal, upper, columns)
        judged.append(singular)
        return x

    x = solved_columns(solver, bands, s.batch, _columns(b, s.batch, s.lead), s.lead)
    return x, judged[0]


# --- below: shapes --------------------------------------------------------------------------------------------------


def _system(
    blocks: bool,
    lower: Array,
    diagonal: Array,
    upper: Array,
    name: str,
    vectors: Array,
    b: Array | None = None,
    **others: Array | None,
) -> _System:
    """Validate bands and the vectors of the argument `name`; beside a solution, `b` is its right-hand side."""
    more = {} if b is None else {"b": b}
    xp = namespace(diagonal=diagonal, lower=lower, upper=upper, **{name: vectors}, **more, **others)
    check_dtypes(lower=(lower, diagonal.dtype), upper=(upper, diagonal.dtype))
    check_precision(xp, diagonal=diagonal, **{name: vectors}, **more)
    own, shape = 3 if blocks else 1, tuple(diagonal.shape)
    if len(shape) < own or 0 in shape[len(shape) - own :] or (blocks and shape[-1] != shape[-2]):
        wanted = "(..., n, k, k) with n and k at least 1" if blocks else "(..., n) with n at least 1"
        raise ValueError(f"diagonal has shape {shape}, expected {wanted}.")
    tail = shape[len(shape) - own :]
    batch = shape[: len(shape) - own]
    for band, array in (("lower", lower), ("upper", upper)):
        batch = joint_axes(band, _lead(band, array, (tail[0] - 1, *tail[1:]), "diagonal", shape), batch, "diagonal")
    item = tail[:2] if blocks else tail
    lead = joint_axes(name, _lead(name, vectors, item, "diagonal", shape), batch, "the bands")
    if name == "x":
        check_is_whole(vectors, len(item), lead, "these bands")
    if b is not None:
        check_source("b", b, lead, item)
    size = item[0] * item[1] if blocks else item[0]
    return _System(xp, _as_blocks(xp, (lower, diagonal, upper), batch, blocks), batch, lead, size)


def _lead(name: str, array: Array, item: tuple[int, ...], beside: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the leading axes of an array whose last axes must be `item`."""
    own = tuple(array.shape)
    if len(own) < len(item) or own[len(own) - len(item) :] != item:
        wanted = ", ".join(map(str, item))
        raise ValueError(f"{name} has shape {own}, expected (..., {wanted}) beside a {beside} of shape {shape}.")
    return own[: len(own) - len(item)]


def _as_blocks(xp: Namespace, bands: tuple[Array, ...], batch: tuple[int, ...], blocks: bool) -> Bands:
    """Bands with common batch axes, numbers as blocks of order one."""
    own = 3 if blocks else 1
    whole = (xp.broadcast_to(band, (*batch, *band.shape[band.ndim - own :])) for band in bands)
    return tuple(band if blocks else band[..., None, None] for band in whole)


def _flat(vectors: Array, blocks: bool) -> Array:
    """Vectors with one axis."""
    if not blocks:
        return vectors
    shape = tuple(vectors.shape)
    return namespace_of(vectors).reshape(vectors, (*shape[:-2], shape[-2] * shape[-1]))


def _shaped(flat: Array, diagonal: Array, blocks: bool) -> Array:
    """Vectors in the shape that the user knows."""
    if not blocks:
        return flat
    return namespace_of(flat).reshape(flat, (*flat.shape[:-1], *diagonal.shape[-3:-1]))


def _raise_singular(xp: Namespace, singular: Array) -> None:
    """Raise `SingularError`, which names the items; reads one flag."""
    if is_true(xp.any(singular)):
        raise SingularError(
            f"{singularity.named('The matrix', 'matrices', singular)}. The most likely causes are (a) rows or columns "
            "that depend on each other, such as those of second differences without a condition at the ends, (b) an "
            "eigenvalue on the diagonal of a shift. Remove the dependence, add a ridge to the diagonal, or pass "
            "throw=False to get NaN for these items and the right solutions of the others."
        )
