"""Solutions of ``A(θ) x = b``, and their derivatives by one more solve: nothing of an iteration is stored.

From ``A ẋ = ḃ − Ȧ x``, with y the solution of the adjoint system:

    Aᴴ y = x̄,            b̄ = y,      θ̄ = −vjp(y, x)                          vjp(ȳ, x): gradient of Re ⟨ȳ, A(θ) x⟩

Least squares, ``x = A⁺ b`` of full rank; A tall leaves ``r = b − A x``, A wide ``s = x̄ − Aᴴ y`` of the cotangent:

    y = (Aᴴ)⁺ x̄,         b̄ = y,      θ̄ = −vjp(y, x) + vjp(r, A⁺ y)           (tall)
                                      θ̄ = −vjp(y, x) + vjp((Aᴴ)⁺ x, s)        (wide)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import array_api_compat

from ddnref._core.arrays import Array, namespace, nan_where, refuse_recording, with_axes
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._core.loops import WhileLoop
from ddnref._kernels import dense as _linalg
from ddnref._kernels.public import public
from ddnref.errors import DdnrefError
from ddnref.krylov._bicgstab import bicgstab
from ddnref.krylov._cg import cg
from ddnref.krylov._common import SolveInfo
from ddnref.krylov._gmres import gmres
from ddnref.krylov._lsmr import LeastSquaresInfo, lsmr
from ddnref.krylov._minres import minres
from ddnref.linalg._dense_solver import DIRECT_UP_TO, direct
from ddnref.linalg._solve import check_source, summed_to
from ddnref.operators import LinearOperator, adjoint, as_operator
from ddnref.operators._operator import check_vector

Solver = Callable[..., tuple[Array, Any]]
SOLVERS: dict[str, Solver] = {
    "cg": cg, "minres": minres, "bicgstab": bicgstab, "gmres": gmres, "lsmr": lsmr, "direct": direct,
}  # fmt: skip


@public
def linear_solve(
    operator: Array | LinearOperator,
    b: Array,
    /,
    *,
    solver: str | Solver | None = None,
    preconditioner: Any = None,
    x0: Array | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int | None = None,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, SolveInfo]:
    r"""Solution of ``A x = b`` with an operator that is applied, never stored; least squares where it is not square.

    Parameters
    ----------
    operator : LinearOperator, or array (..., n, m)
    b : (..., \*range_shape) array
        Its leading axes broadcast against the batch axes of the operator; several right-hand sides are one more
        leading axis.
    solver : {"cg", "minres", "gmres", "bicgstab", "lsmr", "direct"} or callable, optional
        Default: by the flags of the operator, "cg" if it is positive definite, "minres" if self-adjoint, "gmres" if
        square, "lsmr" else; for an array of up to 256 columns "direct", which factorises it. A callable is called
        like ``ddnref.krylov.cg``, ``solver(operator, b, x0=..., ...)``, with those of the options below that are given.
        "direct" by its name takes no `preconditioner`, `x0` or `maxiter`; chosen by default it has no use for them.
    preconditioner : LinearOperator or callable, optional
        As the solver takes it: symmetric positive definite, ``M r ≈ A⁻¹ r``.
    x0 : (..., \*domain_shape) array, optional
        Where to start. Not for wide operators, where the result would depend on it.
    rtol, maxiter, check_every, throw, while_loop
        As in `cg`: a residual relative to ``‖b‖``, the most iterations, iterations between two looks at the flag,
        whether to raise what `info` says, ``jax.lax.while_loop`` under ``jax.jit``.

    Returns
    -------
    x : (..., \*domain_shape) array
        Least squares where the operator is tall, the shortest solution where it is wide.
    info : SolveInfo
        ``converged``, ``n_iter``, ``residual_norm`` (recomputed, relative), ``status``, for each right-hand side. Of
        least squares the residual is the smaller one of ``‖b − A x‖ / ‖b‖`` and ``‖Aᴴ(b − A x)‖ / ‖Aᴴ b‖``.

    Raises
    ------
    ConvergenceError
        A right-hand side was not solved to `rtol`; the message says why.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit; a solver that the operator's flags, or the other
        options, exclude.

    See Also
    --------
    linear_solve_vjp, linear_solve_jvp : its derivatives.
    solve : a dense matrix, factorised once for the solution and its gradient.

    Notes
    -----
    The relative error of x is up to κ times the residual, κ the condition of A. Cost: products with A, one an
    iteration for "cg", "minres" and "gmres", two for the others.

    Examples
    --------
    >>> import numpy as np
    >>> a = ddnref.operators.dense(np.asarray([[2.0, 1.0], [1.0, 2.0]]), positive_definite=True)
    >>> x, info = ddnref.linear_solve(a, np.asarray([3.0, 3.0]))
    >>> x, int(info.n_iter)
    (array([1., 1.]), 1)
    """
    a = as_operator(operator)
    for array in (*a.params, b):
        refuse_recording("linear_solve", array)
    if solver == "direct":
        _refuse_iteration(x0=x0, preconditioner=preconditioner, maxiter=maxiter)
    if x0 is not None and a.size > math.prod(a.range_shape):
        raise ValueError("x0 is given, but the operator is wide: the shortest solution starts from zero.")
    options = {"x0": x0, "preconditioner": preconditioner, "rtol": rtol, "maxiter": maxiter}
    options |= {"check_every": check_every, "while_loop": while_loop}
    given = {name: value for name, value in options.items() if value is not None}
    x, info = solver_of(operator, solver)(operator, b, **given, throw=throw)
    return x, _judged(info)


@public
def linear_solve_vjp(
    x_bar: Array,
    x: Array,
    operator: Array | LinearOperator,
    b: Array | None = None,
    /,
    *,
    solver: str | Solver | None = None,
    preconditioner: Any = None,
    y0: Array | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int | None = None,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
    solve: Solver = linear_solve,
) -> tuple[tuple[Array | tuple[Array, ...], Array], SolveInfo]:
    r"""Gradient through the solution of ``A(θ) x = b``, by one solve of the adjoint system.

    Parameters
    ----------
    x_bar, x : (..., \*domain_shape) arrays
        Cotangent of the solution, and the solution, from whatever found it.
    operator : LinearOperator, or array (..., n, m)
    b : (..., \*range_shape) array, optional
        Needed where the operator is tall, for the residual; where b was broadcast, for its shape.
    solver, preconditioner, rtol, maxiter, check_every, throw, while_loop
        As in `linear_solve`, for the adjoint system. By its contract a preconditioner serves both.
    y0 : (..., \*range_shape) array, optional
        Where to start, for a square operator: the `b_bar` of a similar problem, such as the last step of a training.
    solve : callable
        What solves: `linear_solve`, or the same made differentiable, by which bridges get second derivatives.

    Returns
    -------
    (params_bar, b_bar)
        ``params_bar`` is a tuple, one cotangent for each parameter of the operator; for an array it is the cotangent
        of that array, of free entries.
    info : SolveInfo
        Of the adjoint solve; where there are two, the worse of both and the sum of the iterations.

    Raises
    ------
    ConvergenceError
        The adjoint system was not solved to `rtol`. With ``throw=False`` the gradients of that item are NaN, a
        parameter's that it shares with others included.
    TypeError, ValueError
        As `linear_solve`; a tall operator without `b`.

    Notes
    -----
    .. math:: A^H y = \bar x, \qquad \bar b = y, \qquad \bar\theta = -\partial_\theta \mathrm{Re}\langle y, A x\rangle

    and for least squares, A of full rank, what the top of the module says: one further solve. Where the rank is not
    full no derivative exists, and what comes back is meaningless. Residuals of τ forward and here leave a relative
    error of at most ``2 κ τ``, often about τ. Cost: that of the solve, one product and one ``params_vjp``.

    References
    ----------
    .. [1] M. B. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
       differentiation" (2008), section 2.3.1.
    .. [2] G. H. Golub and V. Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems
       whose variables separate", SIAM J. Numer. Anal. 10 (1973), equation 4.12.

    Examples
    --------
    >>> import numpy as np
    >>> a = ddnref.operators.diagonal(np.asarray([2.0, 4.0]))
    >>> x, _ = ddnref.linear_solve(a, np.asarray([2.0, 2.0]))
    >>> ((d_bar,), b_bar), info = ddnref.linear_solve_vjp(np.ones(2), x, a)
    >>> np.round(d_bar, 12), np.round(b_bar, 12)
    (array([-0.5  , -0.125]), array([0.5 , 0.25]))
    """
    a = as_operator(operator)
    _check(a, x_bar, x, b, y0)
    call = {"solver": solver, "preconditioner": preconditioner, "rtol": rtol, "maxiter": maxiter}
    call |= {"check_every": check_every, "throw": throw, "while_loop": while_loop}
    n, m, domain, target = math.prod(a.range_shape), a.size, a.domain_shape, a.range_shape
    y, info = solve_for_derivative(solve, adjoint_of(operator), x_bar, x0=y0, **call)
    y = nan_where(with_axes(missing(x, domain), len(target)), without_failed(y, info, target))
    params_bar = _minus(a.params_vjp(a.params, y, x))
    if n > m:
        z, more = solve_for_derivative(solve, operator, y, **call)
        r = b - a.apply(a.params, x)
        params_bar = _plus(params_bar, a.params_vjp(a.params, r, without_failed(z, more, domain)))
        info = worse(info, more)
    elif n < m:
        w, more = solve_for_derivative(solve, adjoint_of(operator), x, **call)
        s = x_bar - a.adjoint(a.params, y)
        params_bar = _plus(params_bar, a.params_vjp(a.params, without_failed(w, more, target), s))
        info = worse(info, more)
    b_bar = y if b is None else summed_to(y, tuple(b.shape))
    return (params_bar if isinstance(operator, LinearOperator) else params_bar[0], b_bar), info


# --- below: which solver, and which way -------------------------------------------------------------------------


def solver_of(operator: Array | LinearOperator, solver: str | Solver | None) -> Solver:
    """The solver asked for by name, by itself, or by nothing but the operator's flags."""
    if solver is None:
        return SOLVERS[_default(operator)]
    if callable(solver):
        return solver
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected {', '.join(map(repr, SOLVERS))}, a callable or None.")
    return SOLVERS[solver]


def _refuse_iteration(**options: Any) -> None:
    """``TypeError`` for what only steers an iteration, where none was asked for."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise TypeError(
            f'solver "direct" factorises the matrix and takes no {" and no ".join(given)}. Leave that out, or pass an '
            'iterative solver: "cg", "minres", "gmres", "bicgstab" or "lsmr".'
        )


def _default(operator: Array | LinearOperator) -> str:
    a = as_operator(operator)
    if a.size != math.prod(a.range_shape):
        return "lsmr"
    if not isinstance(operator, LinearOperator) and a.size <= DIRECT_UP_TO:
        return "direct"
    if a.self_adjoint:
        return "cg" if a.positive_definite else "minres"
    return "gmres"


def adjoint_of(operator: Array | LinearOperator) -> Array | LinearOperator:
    """``Aᴴ``, in the form that A was given in; a self-adjoint operator itself."""
    if not isinstance(operator, LinearOperator):
        return _linalg.adjoint(operator)
    return operator if operator.self_adjoint else adjoint(operator)


def solve_for_derivative(
    solve: Solver, operator: Array | LinearOperator, b: Array, **options: Any
) -> tuple[Array, SolveInfo]:
    """A solve that belongs to a derivative, and says so where it fails."""
    try:
        return solve(operator, b, **options)
    except DdnrefError as error:
        raise type(error)(f"In a solve for the derivative of linear_solve: {error}") from error


def _judged(info: SolveInfo | LeastSquaresInfo) -> SolveInfo:
    """With the residual that decided, where a least-squares solver watched two."""
    if not isinstance(info, LeastSquaresInfo):
        return info
    xp = array_api_compat.array_namespace(info.status)
    smaller = xp.minimum(info.residual_norm, info.normal_residual_norm)
    return SolveInfo(info.converged, info.n_iter, smaller, info.status)


# --- below: shapes and statuses ---------------------------------------------------------------------------------


def _check(a: LinearOperator, x_bar: Array, x: Array, b: Array | None, y0: Array | None) -> tuple[int, ...]:
    """The leading axes of the solution, after a look at shapes and dtypes."""
    namespace(x_bar=x_bar, x=x, b=b, y0=y0, **{f"params[{i}]": p for i, p in enumerate(a.params)})
    check_dtypes(x_bar=(x_bar, x.dtype), b=(b, x.dtype), y0=(y0, x.dtype))
    n, m = math.prod(a.range_shape), a.size
    if b is None and n > m:
        raise TypeError("b must be given: the operator is tall, and the residual b − A x enters the gradient.")
    if y0 is not None:
        check_vector("y0", y0, tuple(a.range_shape), ())
    if y0 is not None and n != m:
        raise ValueError("y0 is given, but the operator is not square: the result would depend on it.")
    k = len(a.domain_shape)
    lead = tuple(x.shape[: max(0, x.ndim - k)])
    check_shapes(x=(x, (*lead, *a.domain_shape)), x_bar=(x_bar, (*lead, *a.domain_shape)))
    if b is not None:
        check_source("b", b, lead, a.range_shape)
    return lead


def without_failed(x: Array, info: SolveInfo, shape: tuple[int, ...]) -> Array:
    """NaN for every right-hand side that was not solved."""
    return nan_where(with_axes(~info.converged, len(shape)), x)


def missing(x: Array, shape: tuple[int, ...]) -> Array:
    """Which vectors have a NaN."""
    xp = array_api_compat.array_namespace(x)
    return xp.any(xp.isnan(x), axis=tuple(range(x.ndim - len(shape), x.ndim)))


def _minus(bars: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if bar is None else -bar for bar in bars)


def _plus(bars: tuple[Any, ...], others: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if u is None else u + v for u, v in zip(bars, others, strict=True))


def worse(one: SolveInfo, other: SolveInfo) -> SolveInfo:
    """Of two solves in a row."""
    xp = array_api_compat.array_namespace(one.status)
    return SolveInfo(
        one.converged & other.converged,
        one.n_iter + other.n_iter,
        xp.maximum(one.residual_norm, other.residual_norm),
        xp.where(one.converged, other.status, one.status),
    )
