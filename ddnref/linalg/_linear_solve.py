"""Solutions of ``A(θ) x = b`` and their derivatives, from one more solve; no iterate is stored.

From ``A ẋ = ḃ − Ȧ x``, with y the solution of the adjoint system:

    ẋ = A⁻¹ (ḃ − Ȧ x)
    Aᴴ y = x̄,            b̄ = y,      θ̄ = −vjp(y, x)                          vjp(ȳ, x): gradient of Re ⟨ȳ, A(θ) x⟩

Least squares, ``x = A⁺ b`` of full rank. A tall A leaves ``r = b − A x``, a wide A ``s = x̄ − Aᴴ y`` of the cotangent:

    y = (Aᴴ)⁺ x̄,         b̄ = y,      θ̄ = −vjp(y, x) + vjp(r, A⁺ y)           (tall)
                                      θ̄ = −vjp(y, x) + vjp((Aᴴ)⁺ x, s)        (wide)

    ẋ = A⁺ (ḃ − Ȧ x + (Aᴴ)⁺ Ȧᴴ r)                                           (tall)
    ẋ = g + A⁺ (ḃ − Ȧ x − A g),       g = Ȧᴴ (Aᴴ)⁺ x                         (wide)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ddnref._core.arrays import (
    Array,
    eps,
    full,
    is_true,
    namespace,
    namespace_of,
    nan_where,
    refuse_recording,
    with_axes,
)
from ddnref._core.arrays import adjoint as matrix_adjoint
from ddnref._core.checks import check_dtypes, check_precision, check_shapes
from ddnref._core.loops import LoopOptions, WhileLoop
from ddnref._kernels.public import public
from ddnref._kernels.vectors import norm
from ddnref.errors import DdnrefError
from ddnref.krylov._bicgstab import bicgstab
from ddnref.krylov._cg import cg
from ddnref.krylov._gmres import gmres
from ddnref.krylov._lsmr import LeastSquaresInfo, lsmr
from ddnref.krylov._minres import minres
from ddnref.krylov._system import (
    BREAKDOWN,
    CONVERGED,
    NOT_FINITE,
    SLACK,
    STAGNATION,
    SolveInfo,
    raise_if_failed,
)
from ddnref.linalg._solve import check_source, raise_singular, solve, summed_to
from ddnref.operators import LinearOperator, adjoint, as_operator
from ddnref.operators._operator import check_vector

Solver = Callable[..., tuple[Array, Any]]
DIRECT_UP_TO = 256  # columns of an array that is factorised by default, as in `eigsh_vjp`


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
        The default follows the flags of the operator: "cg" if it is positive definite, "minres" if it is
        self-adjoint, "gmres" if it is square, otherwise "lsmr". For a square array of up to 256 columns it is
        "direct", which factorises the matrix. A callable is called like ``ddnref.krylov.cg``,
        ``solver(operator, b, x0=..., ...)``, with those of the options below that are given. "direct" refuses
        `preconditioner`, `x0` and `maxiter` if it was named, and ignores them if it is the default.
    preconditioner : LinearOperator or callable, optional
        Passed to the solver; symmetric positive definite, ``M r ≈ A⁻¹ r``.
    x0 : (..., \*domain_shape) array, optional
        Where to start. Not for wide operators, where the result would depend on it.
    rtol, maxiter, check_every, throw, while_loop
        As in `cg`: a residual relative to ``‖b‖``, the most iterations, iterations between two checks of the flag,
        whether to raise what `info` says, ``jax.lax.while_loop`` under ``jax.jit``.

    Returns
    -------
    x : (..., \*domain_shape) array
        Least squares where the operator is tall, the shortest solution where it is wide.
    info : SolveInfo
        ``converged``, ``n_iter``, ``residual_norm`` (recomputed, relative), ``status``, for each right-hand side. For
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
    linear_solve_vjp, linear_solve_jvp : the derivatives.
    solve : for a dense matrix, factorised once for the solution and its gradient.

    Notes
    -----
    The relative error of x is up to κ times the residual, where κ is the condition number of A. Cost: one product
    with A per iteration for "cg", "minres" and "gmres", two for the others.

    Examples
    --------
    >>> import numpy as np
    >>> a = ddnref.operators.dense(np.asarray([[2.0, 1.0], [1.0, 2.0]]), positive_definite=True)
    >>> x, info = ddnref.linear_solve(a, np.asarray([3.0, 3.0]))
    >>> x, int(info.n_iter)
    (array([1., 1.]), 1)
    """
    a = as_operator(operator)
    for array in (*a.params, b):  # PyTorch would record the iteration
        refuse_recording("linear_solve", array)
    if solver == "direct":
        steering = {"x0": x0, "preconditioner": preconditioner, "maxiter": maxiter}
        given = [name for name, value in steering.items() if value is not None]
        if given:
            raise TypeError(
                f'solver "direct" factorises the matrix and takes no {" and no ".join(given)}. Leave that out, or '
                'pass an iterative solver: "cg", "minres", "gmres", "bicgstab" or "lsmr".'
            )
    if x0 is not None and a.size > math.prod(a.range_shape):
        raise ValueError("x0 is given, but the operator is wide: the shortest solution starts from zero.")
    options = {"x0": x0, "preconditioner": preconditioner, "rtol": rtol, "maxiter": maxiter}
    options |= {"check_every": check_every, "while_loop": while_loop}
    # A solver of the user's need not know options that were not given.
    options = {name: value for name, value in options.items() if value is not None}
    x, info = _solver_of(operator, solver)(operator, b, **options, throw=throw)
    if isinstance(info, LeastSquaresInfo):
        # It watched two residuals; the smaller one decided.
        smaller = namespace_of(info.status).minimum(info.residual_norm, info.normal_residual_norm)
        info = SolveInfo(info.converged, info.n_iter, smaller, info.status)
    return x, info


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
    r"""Gradient through the solution of ``A(θ) x = b``, from one solve of the adjoint system.

    Parameters
    ----------
    x_bar, x : (..., \*domain_shape) arrays
        Cotangent of the solution, and the solution itself, by whichever solver.
    operator : LinearOperator, or array (..., n, m)
    b : (..., \*range_shape) array, optional
        Needed where the operator is tall, for the residual; where b was broadcast, for its shape.
    solver, preconditioner, rtol, maxiter, check_every, throw, while_loop
        As in `linear_solve`, for the adjoint system. By its contract a preconditioner serves both.
    y0 : (..., \*range_shape) array, optional
        Where to start, for a square operator: the `b_bar` of a similar problem, such as the last training step.
    solve : callable
        The solver: `linear_solve`, or the same made differentiable, with which bridges get second derivatives.

    Returns
    -------
    (params_bar, b_bar)
        ``params_bar`` is a tuple, one cotangent for each parameter of the operator; for an array it is the cotangent
        of that array, of free entries.
    info : SolveInfo
        Status of the adjoint solve; of two solves, the worse status and the sum of the iterations.

    Raises
    ------
    ConvergenceError
        The adjoint system was not solved to `rtol`. With ``throw=False`` the gradients of that item are NaN,
        including that of a parameter that it shares with others.
    TypeError, ValueError
        As `linear_solve`; a tall operator without `b`.

    Notes
    -----
    .. math:: A^H y = \bar x, \qquad \bar b = y, \qquad \bar\theta = -\partial_\theta \mathrm{Re}\langle y, A x\rangle

    Least squares with A of full rank take one further solve, by the equations at the top of the module. Where the
    rank is not full no derivative exists, and the result is meaningless. Residuals of τ in both solves leave a
    relative error of at most ``2 κ τ``, often about τ. Cost: the solve, one product and one ``params_vjp``.

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
    n, m, domain, target = math.prod(a.range_shape), a.size, a.domain_shape, a.range_shape
    namespace(x_bar=x_bar, x=x, b=b, y0=y0, **{f"params[{i}]": p for i, p in enumerate(a.params)})
    check_dtypes(x_bar=(x_bar, x.dtype), b=(b, x.dtype), y0=(y0, x.dtype))
    if y0 is not None:
        check_vector("y0", y0, tuple(target), ())
    lead = _check_problem(a, x, b, needs_residual=True, y0=y0)  # leading axes of the solution
    check_shapes(x_bar=(x_bar, (*lead, *domain)))
    call = {"solver": solver, "preconditioner": preconditioner, "rtol": rtol, "maxiter": maxiter}
    call |= {"check_every": check_every, "throw": throw, "while_loop": while_loop}

    # Aᴴ y = x̄; y is NaN wherever it, or the solution itself, was not found.
    y, info = _solve_for_derivative(solve, _adjoint_of(operator), x_bar, x0=y0, **call)
    y = nan_where(with_axes(_missing(x, domain), len(target)), _without_failed(y, info, target))
    params_bar = tuple(None if bar is None else -bar for bar in a.params_vjp(a.params, y, x))
    # What least squares adds to −vjp(y, x).
    if n > m:
        z, more = _solve_for_derivative(solve, operator, y, **call)  # A⁺ y
        r = b - a.apply(a.params, x)  # the residual that A leaves of b
        params_bar = _plus(params_bar, a.params_vjp(a.params, r, _without_failed(z, more, domain)))
        info = _worse(info, more)
    elif n < m:
        w, more = _solve_for_derivative(solve, _adjoint_of(operator), x, **call)  # (Aᴴ)⁺ x
        s = x_bar - a.adjoint(a.params, y)  # what Aᴴ cannot reach of the cotangent
        params_bar = _plus(params_bar, a.params_vjp(a.params, _without_failed(w, more, target), s))
        info = _worse(info, more)
    b_bar = y if b is None else summed_to(y, tuple(b.shape))  # b may have been broadcast
    return (params_bar if isinstance(operator, LinearOperator) else params_bar[0], b_bar), info


@public
def linear_solve_jvp(
    params_dot: Array | tuple[Array, ...] | None,
    b_dot: Array | None,
    x: Array,
    operator: Array | LinearOperator,
    b: Array | None = None,
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
    r"""Derivative of the solution of ``A(θ) x = b`` along a direction, from one more solve.

    Parameters
    ----------
    params_dot : tuple of arrays, array or None
        Direction of each parameter of the operator, or of the array; ``None`` where none of them moves.
    b_dot : (..., \*range_shape) array or None
        Direction of the right-hand side.
    x, operator, b
        As in `linear_solve_vjp`.
    x0 : (..., \*domain_shape) array, optional
        Where to start, for a square operator.
    solver, preconditioner, rtol, maxiter, check_every, throw, while_loop
        As in `linear_solve`.

    Returns
    -------
    x_dot : (..., \*domain_shape) array
        NaN where it was not found, with ``throw=False``, and where `x` is NaN.
    info : SolveInfo
        Status of that solve; of two for least squares, the worse status and the sum of the iterations.

    Raises
    ------
    ConvergenceError
        The system was not solved to `rtol`.
    TypeError, ValueError
        As `linear_solve_vjp`; an operator without ``params_jvp`` together with `params_dot`.

    See Also
    --------
    linear_solve_vjp : the transpose.

    Notes
    -----
    .. math:: A\, \dot x = \dot b - \dot A\, x

    ``Ȧ x`` is the operator's ``params_jvp(params, params_dot, x)``; for least squares ``Ȧᴴ y`` is that of its adjoint.

    Examples
    --------
    >>> import numpy as np
    >>> a = ddnref.operators.diagonal(np.asarray([2.0, 4.0]))
    >>> x, _ = ddnref.linear_solve(a, np.asarray([2.0, 2.0]))
    >>> x_dot, info = ddnref.linear_solve_jvp((np.asarray([1.0, 0.0]),), None, x, a)
    >>> np.round(x_dot, 12) + 0.0
    array([-0.5,  0. ])
    """
    a = as_operator(operator)
    # An array counts as one parameter.
    moves = params_dot if params_dot is None or isinstance(params_dot, tuple) else (params_dot,)
    lead = _check_directions(a, moves, b_dot, x, b, x0)
    call = {"solver": solver, "preconditioner": preconditioner, "rtol": rtol, "maxiter": maxiter}
    call |= {"check_every": check_every, "throw": throw, "while_loop": while_loop}
    n, m = math.prod(a.range_shape), a.size

    # The right-hand side ḃ − Ȧ x, and what least squares adds to it and to the solution.
    right = full((*lead, *a.range_shape), 0.0, x) if b_dot is None else b_dot
    shift, before = None, None
    if moves is not None:
        right = right - _moved(a, moves, x)
        if n > m:
            r = b - a.apply(a.params, x)
            y, before = _solve_for_derivative(linear_solve, _adjoint_of(operator), _moved(adjoint(a), moves, r), **call)
            right = right + y  # plus (Aᴴ)⁺ Ȧᴴ r
        elif n < m:
            w, before = _solve_for_derivative(linear_solve, _adjoint_of(operator), x, **call)
            shift = _moved(adjoint(a), moves, w)  # g = Ȧᴴ (Aᴴ)⁺ x
            right = right - a.apply(a.params, shift)
    x_dot, info = _solve_for_derivative(linear_solve, operator, right, x0=x0, **call)
    x_dot = x_dot if shift is None else shift + x_dot
    info = info if before is None else _worse(before, info)
    # Not solved, or no solution to begin with.
    bad = with_axes(~info.converged | _missing(x, a.domain_shape), len(a.domain_shape))
    return nan_where(bad, x_dot), info


def _moved(a: LinearOperator, params_dot: tuple[Array, ...], x: Array) -> Array:
    """``Ȧ x``."""
    if a.params_jvp is None:
        raise TypeError(
            "params_dot is given, but the operator (or its adjoint, for least squares) has no params_jvp, which "
            "computes Ȧ x. Pass one: LinearOperator(..., params_jvp=lambda params, params_dot, x: ...)."
        )
    return a.params_jvp(a.params, params_dot, x)


def _check_directions(
    a: LinearOperator,
    moves: tuple[Array, ...] | None,
    b_dot: Array | None,
    x: Array,
    b: Array | None,
    x0: Array | None,
) -> tuple[int, ...]:
    """Validate the arguments of the JVP; return the leading axes of the solution."""
    if moves is None and b_dot is None:
        raise TypeError("params_dot and b_dot are both None: there is no direction.")
    directions = {f"params_dot[{i}]": p for i, p in enumerate(moves or ())}
    parameters = {f"params[{i}]": p for i, p in enumerate(a.params)}
    xp = namespace(b_dot=b_dot, x=x, b=b, x0=x0, **directions, **parameters)  # one library, one device
    check_precision(xp, x=x, **directions, **parameters)  # real parameters may belong to a complex operator
    check_dtypes(b_dot=(b_dot, x.dtype), b=(b, x.dtype), x0=(x0, x.dtype))
    if moves is not None:
        if len(moves) != len(a.params):
            raise ValueError(
                f"params_dot has {len(moves)} entries, expected one for each of {len(a.params)} parameters."
            )
        check_shapes(**{f"params_dot[{i}]": (p, a.params[i].shape) for i, p in enumerate(moves)})
    lead = _check_problem(a, x, b, needs_residual=moves is not None, x0=x0)
    if b_dot is not None:
        check_source("b_dot", b_dot, lead, tuple(a.range_shape))
    return lead


# --- common to both derivatives -------------------------------------------------------------------------------------


def _check_problem(
    a: LinearOperator, x: Array, b: Array | None, *, needs_residual: bool, **start: Array | None
) -> tuple[int, ...]:
    """Validate the solution, the right-hand side and a named start; return the leading axes of the solution."""
    n, m = math.prod(a.range_shape), a.size
    if b is None and n > m and needs_residual:
        raise TypeError("b must be given: the operator is tall, and the residual b − A x enters the derivative.")
    for name, array in start.items():
        if array is not None and n != m:
            raise ValueError(f"{name} is given, but the operator is not square: the result would depend on it.")
    lead = tuple(x.shape[: max(0, x.ndim - len(a.domain_shape))])
    check_shapes(x=(x, (*lead, *a.domain_shape)))
    if b is not None:
        check_source("b", b, lead, tuple(a.range_shape))
    return lead


def _adjoint_of(operator: Array | LinearOperator) -> Array | LinearOperator:
    """``Aᴴ``, in the form that A was given in; a self-adjoint operator unchanged."""
    if not isinstance(operator, LinearOperator):
        return matrix_adjoint(operator)
    return operator if operator.self_adjoint else adjoint(operator)


def _solve_for_derivative(
    solve: Solver, operator: Array | LinearOperator, b: Array, **options: Any
) -> tuple[Array, SolveInfo]:
    """Solve a system of a derivative; an error says that it belongs to one."""
    try:
        return solve(operator, b, **options)
    except DdnrefError as error:
        raise type(error)(f"In a solve for the derivative of linear_solve: {error}") from error


def _without_failed(x: Array, info: SolveInfo, shape: tuple[int, ...]) -> Array:
    """`x` with NaN for every right-hand side that was not solved."""
    return nan_where(with_axes(~info.converged, len(shape)), x)


def _missing(x: Array, shape: tuple[int, ...]) -> Array:
    """Return which vectors contain NaN."""
    xp = namespace_of(x)
    return xp.any(xp.isnan(x), axis=tuple(range(x.ndim - len(shape), x.ndim)))


def _plus(bars: tuple[Any, ...], others: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sums of cotangents, some of which are ``None``."""
    return tuple(None if u is None else u + v for u, v in zip(bars, others, strict=True))


def _worse(one: SolveInfo, other: SolveInfo) -> SolveInfo:
    """The status of two solves in a row."""
    xp = namespace_of(one.status)
    return SolveInfo(
        one.converged & other.converged,
        one.n_iter + other.n_iter,
        xp.maximum(one.residual_norm, other.residual_norm),
        xp.where(one.converged, other.status, one.status),  # the first failure is the cause
    )


# --- which solver ---------------------------------------------------------------------------------------------------


def direct(
    operator: Array | LinearOperator,
    b: Array,
    /,
    *,
    x0: Array | None = None,
    rtol: float | None = None,
    throw: bool = True,
    **_: Any,
) -> tuple[Array, SolveInfo]:
    """Factorise the matrix of an operator and report the status that an iteration would have.

    With few unknowns that is faster than any iteration. Options that steer an iteration have no effect.
    """
    a = as_operator(operator)
    n = a.size
    if n != math.prod(a.range_shape):
        raise ValueError(
            f'solver "direct" needs a square operator, got {a.domain_shape} to {a.range_shape}: use "lsmr".'
        )
    xp = namespace(b=b, **{f"params[{i}]": parameter for i, parameter in enumerate(a.params)})
    axes = len(a.range_shape)
    if b.ndim < axes or tuple(b.shape[b.ndim - axes :]) != tuple(a.range_shape):
        raise ValueError(f"b has shape {tuple(b.shape)}, expected (..., *{tuple(a.range_shape)}).")
    if x0 is not None:
        check_vector("x0", x0, tuple(a.domain_shape), a.params)
    matrix = a.matrix(b) if isinstance(operator, LinearOperator) else operator  # by products with unit vectors
    rows = xp.reshape(b, (*b.shape[: b.ndim - axes], n))
    x = solve(matrix, rows, throw=False)  # NaN in singular items
    finite = xp.all(xp.isfinite(matrix), axis=(-2, -1)) & xp.all(xp.isfinite(rows), axis=-1)
    lead = tuple(x.shape[:-1])
    x = xp.reshape(x, (*lead, *a.domain_shape))

    # Judge the solution by its residual, as iterations are; there is none, NaN, where the matrix is singular.
    rtol = eps(xp, b.dtype) ** 0.5 if rtol is None else rtol
    size, r = norm(rows), xp.reshape(b - a.apply(a.params, x), (*lead, n))
    size = norm(r) / xp.where(size > 0, size, xp.ones_like(size))
    status = xp.zeros_like(size, dtype=xp.int32)
    for bad, code in ((size > SLACK * rtol, STAGNATION), (xp.isnan(size), BREAKDOWN), (~finite, NOT_FINITE)):
        status = xp.where(bad, xp.zeros_like(status) + code, status)
    info = SolveInfo(status == CONVERGED, xp.zeros_like(status), size, status)
    if throw:
        if is_true(xp.any(status == BREAKDOWN)):
            raise_singular(status == BREAKDOWN)
        raise_if_failed("linear_solve", info, LoopOptions(rtol, maxiter=0))
    return x, info


SOLVERS: dict[str, Solver] = {
    "cg": cg, "minres": minres, "bicgstab": bicgstab, "gmres": gmres, "lsmr": lsmr, "direct": direct,
}  # fmt: skip


def _solver_of(operator: Array | LinearOperator, solver: str | Solver | None) -> Solver:
    """The solver that was named or given, or else the fastest that the shape and the flags of an operator allow."""
    if callable(solver):
        return solver
    if solver is None:
        a = as_operator(operator)
        if a.size != math.prod(a.range_shape):
            solver = "lsmr"  # least squares or the shortest solution
        elif not isinstance(operator, LinearOperator) and a.size <= DIRECT_UP_TO:
            solver = "direct"  # faster than any iteration, and its error does not depend on rtol
        elif a.self_adjoint:
            solver = "cg" if a.positive_definite else "minres"
        else:
            solver = "gmres"
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected {', '.join(map(repr, SOLVERS))}, a callable or None.")
    return SOLVERS[solver]
