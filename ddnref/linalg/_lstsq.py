"""Least squares with a stored matrix of any shape and rank, the shortest solution, and its derivatives.

``x = P b`` with the pseudo-inverse P of A, which is saved. With the residual ``r = b − A x``,

    b̄ = Pᴴ x̄,      Ā = −b̄ xᴴ + r (P b̄)ᴴ + (Pᴴ x) (x̄ − Aᴴ b̄)ᴴ
    ẋ = P (ḃ − Ȧ x + Pᴴ Ȧᴴ r) + (I − P A) Ȧᴴ Pᴴ x

The second terms vanish where b is in the range of A, the third ones where A has independent columns. Below full rank
this holds along directions that keep the rank, see `ddnref.linalg._pinv`, where values that are not zero, but count as
zero, add terms.

One step of refinement, ``x + P (b − A x)``, halves the errors of x: at a condition of 1e6 they are then below those of
LAPACK's ``gelsd``. Gradients gain nothing by it.
"""

from __future__ import annotations

from typing import Any

from ddnref._core.arrays import (
    Array,
    Namespace,
    adjoint,
    as_dtype,
    full,
    is_complex,
    namespace,
    nan_where,
    of_kind,
    real_dtype,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_precision, check_shapes, conform
from ddnref._kernels.dense import constant
from ddnref._kernels.public import public
from ddnref._kernels.vectors import alike, as_complex
from ddnref.linalg._pinv import (
    SAVED,
    Saved,
    changes_rank,
    check_matrix,
    counts_noise,
    coupling,
    pinv_of,
    rank_preserving_jvp,
    rank_preserving_vjp,
)
from ddnref.linalg._solve import _columns, _nan_with, _vectors, check_is_whole, check_source, joint_axes, summed_to


@public
def lstsq(a: Array, b: Array, /, *, rtol: float | None = None, throw: bool = True) -> Array:
    r"""Least squares: the shortest x that minimises ``‖b − A x‖``, for a matrix of any shape and rank.

    Parameters
    ----------
    a : (..., m, n) array, real or complex floating
    b : (..., m) array of the same precision, real or complex
        Vectors, never columns. Their leading axes broadcast against those of `a`; several right-hand sides for one
        matrix, or for each of a batch, are one more leading axis: ``(k, m)`` for ``(m, n)``, ``(k, 5, m)`` for
        ``(5, m, n)``.
    rtol : float, optional
        Singular values of at most ``rtol`` times the largest one count as zero. Default ``max(m, n, 16) * eps``, which
        is rounding. Pass the relative size of the errors in `a` where these are larger.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` the solutions of such an item are NaN.

    Returns
    -------
    x : (..., n) array
        Complex if `a` or `b` is.

    Raises
    ------
    SingularError
        A singular value is within a factor of 2 of the limit, on either side: the solution would jump there.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; integers; shapes that do not fit.

    See Also
    --------
    linear_solve : for operators that are never stored, with damping, and for columns in very different units.
    ddnref.nodes.weighted_least_squares : with weights, a ridge and a bias, all of which have gradients.

    Notes
    -----
    By the singular value decomposition, and one step of refinement. With κ the largest over the smallest singular value
    that counts, the relative error is about ``eps κ (1 + κ ‖r‖ / (‖A‖ ‖x‖))``, as of LAPACK's ``gelsd``. That of the
    gradient has the same order. An item with NaN or infinity comes out as NaN; the others are not affected. Cost: the
    decomposition and ``2 m n k`` flops for each matrix, k the smaller of m and n, and ``6 m n`` for each vector.

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, "Matrix Computations", 4th ed. (2013), section 5.5.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.asarray([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> np.round(ddnref.lstsq(a, np.asarray([1.0, 3.0, 5.0])), 12)  # the line 1 + 2 t
    array([1., 2.])
    """
    return lstsq_fwd(a, b, rtol=rtol, throw=throw)[0]


@public
def lstsq_fwd(
    a: Array, b: Array, /, *, rtol: float | None = None, throw: bool = True
) -> tuple[Array, tuple[Array, Array, Array, Array, Array]]:
    """Compute `lstsq` and what its derivatives use: ``x, (p, u, s, inverse, vh)``.

    Parameters and errors are those of `lstsq`. p is the pseudo-inverse, and the others are as in `pinv_fwd`.
    """
    xp = namespace(a=a, b=b)
    check_matrix("a", a)
    if real_dtype(xp, a.dtype) != real_dtype(xp, b.dtype):
        check_dtypes(b=(b, a.dtype))
    m, batch = a.shape[-2], tuple(a.shape[:-2])
    if b.ndim < 1 or b.shape[-1] != m:
        raise ValueError(
            f"b has shape {tuple(b.shape)}, expected (..., {m}): vectors for a matrix of shape {tuple(a.shape)}. "
            "Several right-hand sides are leading axes, not columns: pass xp.matrix_transpose of a matrix of columns."
        )
    lead = joint_axes("b", tuple(b.shape[:-1]), batch)
    refuse_recording("lstsq", a=a, b=b)
    p, factors = pinv_of("a", a, rtol, throw)
    if 0 in (*lead, *a.shape[-2:]):
        x = full((*lead, a.shape[-1]), 0.0, a)
        return (as_complex(x) if is_complex(b) else x), (p, *factors)
    columns = _columns(b, batch, lead)
    x = _product(p, columns)
    x = x + _product(p, _minus(columns, _product(a, x)))  # refined
    bad = ~xp.all(xp.isfinite(columns), axis=-2, keepdims=True)  # one bad vector must not spoil others of its matrix
    return _vectors(nan_where(bad, x), batch, lead), (p, *factors)


@public
def lstsq_vjp(
    x_bar: Array,
    x: Array,
    p: Array,
    u: Array,
    s: Array,
    inverse: Array,
    vh: Array,
    a: Array,
    b: Array,
    /,
) -> tuple[Array, Array]:
    r"""Gradient through `lstsq`, without another factorisation.

    Parameters
    ----------
    x_bar, x, p, u, s, inverse, vh
        Cotangent of the solution ``(..., n)``, the solution, and what `lstsq_fwd` saved.
    a, b : (..., m, n) and (..., m) arrays
        The inputs of `lstsq`.

    Returns
    -------
    a_bar : (..., m, n) array, shaped like `a`
        The sum over the right-hand sides that share a matrix. For a matrix without full rank, the gradient on the set
        of matrices of this rank: in every direction that changes the rank the solution is not continuous.
    b_bar : (..., m) array, shaped like `b`

    Raises
    ------
    TypeError, ValueError
        As `lstsq`.

    Notes
    -----
    With the pseudo-inverse P and the residual :math:`r = b - A x`,

    .. math:: \bar b = P^H \bar x, \qquad
              \bar A = -\bar b\, x^H + r\, (P \bar b)^H + (P^H x)\, (\bar x - A^H \bar b)^H

    Where `x` is NaN, so are both gradients of that item. Cost: ``16 m n`` flops for each right-hand side.

    References
    ----------
    .. [1] G. H. Golub and V. Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems
       whose variables separate", SIAM Journal on Numerical Analysis 10 (1973), equation 4.12.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.asarray([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), np.asarray([1.0, 3.0, 5.0])
    >>> x, saved = ddnref.lstsq_fwd(a, b)
    >>> a_bar, b_bar = ddnref.lstsq_vjp(np.asarray([0.0, 1.0]), x, *saved, a, b)  # of the slope
    >>> np.round(b_bar, 12) + 0.0
    array([-0.5,  0. ,  0.5])
    """
    xp = namespace(x_bar=x_bar, x=x, p=p, u=u, s=s, inverse=inverse, vh=vh, a=a, b=b)
    check_dtypes(x_bar=(x_bar, x.dtype))
    batch, lead = _check_solution(xp, x, p, (u, s, inverse, vh), a, b)
    check_shapes(x_bar=(x_bar, tuple(x.shape)))
    if 0 in (*lead, *a.shape[-2:]):
        return xp.zeros_like(a), xp.zeros_like(b)
    a_h, p_h = adjoint(a), adjoint(p)
    bar, x_, b_ = (_columns(y, batch, lead) for y in (x_bar, x, b))
    bar = nan_where(xp.any(xp.isnan(x_), axis=-2, keepdims=True), bar)
    b_bar = _product(p_h, bar)
    back, source = _product(p, b_bar), _product(p_h, x_)
    residual, rest = _minus(b_, _product(a, x_)), _minus(bar, _product(a_h, b_bar))
    # The sum over the right-hand sides of a matrix is part of each product.
    x_h, back_h, rest_h = adjoint(x_), adjoint(back), adjoint(rest)
    a_bar = _product(residual, back_h) + _product(source, rest_h) - _product(b_bar, x_h)
    if counts_noise(s, inverse, a):
        u, vh = constant(u), constant(vh)
        r = _product(_product(adjoint(u), b_), adjoint(_product(vh, bar)))
        a_bar = a_bar + _product(_product(u, coupling(r, s, inverse, a)), vh)
    b_bar = _vectors(b_bar, batch, lead)
    return of_kind(summed_to(a_bar, tuple(a.shape)), a), of_kind(summed_to(b_bar, tuple(b.shape)), b)


@public
def lstsq_jvp(
    a_dot: Array | None,
    b_dot: Array | None,
    x: Array,
    p: Array,
    u: Array,
    s: Array,
    inverse: Array,
    vh: Array,
    a: Array,
    b: Array,
    /,
    *,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    r"""Derivative of the solution along a direction of the right-hand side, and one of the matrix that keeps its rank.

    Parameters
    ----------
    a_dot : (..., m, n) array shaped like `a`, or None
        ``None`` where the matrix does not move.
    b_dot : (..., m) array shaped like `b`, or None
    x, p, u, s, inverse, vh, a, b
        The solution, what `lstsq_fwd` saved, and the inputs.
    gauge_rtol, throw
        As in `pinv_jvp`.

    Returns
    -------
    x_dot : (..., n) array
        Of the shape and dtype of `x`.

    Raises
    ------
    SingularError
        The matrix has not full rank, and the direction changes it: the solution is not continuous there.
    TypeError, ValueError
        As `lstsq_vjp`; both directions are ``None``.

    Notes
    -----
    .. math:: \dot x = P (\dot b - \dot A x + P^H \dot A^H r) + (I - P A)\, \dot A^H P^H x, \qquad r = b - A x

    Cost: ``18 m n`` flops for each right-hand side.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.asarray([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), np.asarray([1.0, 3.0, 5.0])
    >>> x, saved = ddnref.lstsq_fwd(a, b)
    >>> np.round(ddnref.lstsq_jvp(None, np.ones(3), x, *saved, a, b), 12) + 0.0
    array([1., 0.])
    """
    if a_dot is None and b_dot is None:
        raise TypeError("a_dot and b_dot are both None: there is no direction.")
    xp = namespace(a_dot=a_dot, b_dot=b_dot, x=x, p=p, u=u, s=s, inverse=inverse, vh=vh, a=a, b=b)
    batch, lead = _check_solution(xp, x, p, (u, s, inverse, vh), a, b)
    check_dtypes(a_dot=(a_dot, a.dtype), b_dot=(b_dot, b.dtype))
    check_shapes(a_dot=(a_dot, tuple(a.shape)), b_dot=(b_dot, tuple(b.shape)))
    if 0 in (*lead, *a.shape[-2:]):
        return xp.zeros_like(x)
    right: Any = None if b_dot is None else as_dtype(_columns(b_dot, batch, lead), x)
    if a_dot is None:
        return _nan_with(x, _vectors(_product(p, right), batch, lead))
    x_, b_ = _columns(x, batch, lead), _columns(b, batch, lead)
    dot_h, p_h = adjoint(a_dot), adjoint(p)
    moved = _product(p_h, _product(dot_h, _minus(b_, _product(a, x_)))) - _product(a_dot, x_)
    aside = _product(dot_h, _product(p_h, x_))
    x_dot = _product(p, (moved if right is None else moved + right) - _product(a, aside)) + aside
    if counts_noise(s, inverse, a):
        u_, vh_ = constant(u), constant(vh)
        turned = coupling(adjoint(u_) @ a_dot @ adjoint(vh_), s, inverse, a)
        x_dot = x_dot + _product(adjoint(vh_), _product(adjoint(turned), _product(adjoint(u_), b_)))
    x_dot = _nan_with(x, _vectors(x_dot, batch, lead))
    changed = changes_rank("a", a_dot, u, s, inverse, vh, gauge_rtol, throw)
    return x_dot if changed is None else nan_where(changed[..., None], x_dot)


def saved_lstsq_vjp(
    p_bar: Array | None,
    _u: Array | None,
    _s: Array | None,
    _inverse: Array | None,
    _vh: Array | None,
    p: Array,
    *saved_and_needed: Array,
) -> tuple[Array | None, None]:
    """Turn a cotangent of the pseudo-inverse into one of the matrix, as second derivatives need.

    The factors are constants: a second derivative is refused where they matter.
    """
    return None if p_bar is None else rank_preserving_vjp(p_bar, p, saved_and_needed[-2]), None


def saved_lstsq_jvp(
    a_dot: Array | None, _: Array | None, p: Array, *saved_and_needed: Array
) -> tuple[Array | None, None, None, None, None]:
    """Turn a tangent of the matrix into one of the pseudo-inverse, as second derivatives need."""
    p_dot = None if a_dot is None else rank_preserving_jvp(a_dot, p, saved_and_needed[-2])
    return p_dot, None, None, None, None


# --- below: columns ---------------------------------------------------------------------------------------------------


def _check_solution(
    xp: Namespace, x: Array, p: Array, factors: Saved, a: Array, b: Array
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Validate a solution, the pseudo-inverse and the inputs; return the batch axes and those of the solution."""
    check_matrix("a", a)
    check_precision(xp, a=a, b=b, p=p, x=x)
    check_dtypes(p=(p, a.dtype), x=(x, b.dtype if is_complex(b) else a.dtype))
    *batch, m, n = a.shape
    conform(f"(m,n),(n,m),{SAVED}", a=a, p=p, **dict(zip(("u", "s", "inverse", "vh"), factors, strict=True)))
    if x.ndim < 1 or x.shape[-1] != n:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {n}): the solution for a.")
    lead = joint_axes("x", tuple(x.shape[:-1]), tuple(batch))
    check_is_whole(x, 1, lead, "a")
    check_source("b", b, tuple(x.shape[:-1]), (m,))
    return tuple(batch), lead


def _product(a: Array, b: Array) -> Array:
    """``A B`` where one may be real and the other one complex."""
    a, b = alike(a, b)
    return a @ b


def _minus(a: Array, b: Array) -> Array:
    """``A − B`` where one may be real and the other one complex."""
    a, b = alike(a, b)
    return a - b
