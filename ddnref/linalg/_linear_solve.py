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
from typing import Any, NamedTuple

from ddnref._core.arrays import (
    Array,
    as_dtype,
    eps,
    full,
    is_complex,
    is_true,
    named_arrays,
    namespace,
    namespace_of,
    nan_where,
    of_kind,
    refuse_recording,
    with_axes,
)
from ddnref._core.arrays import adjoint as matrix_adjoint
from ddnref._core.checks import check_dtypes, check_precision, check_shapes
from ddnref._core.loops import LoopOptions, WhileLoop
from ddnref._kernels.dense import identity
from ddnref._kernels.public import public
from ddnref._kernels.vectors import quotient, safe_norm
from ddnref.errors import ConvergenceError, DdnrefError
from ddnref.krylov._bicgstab import bicgstab
from ddnref.krylov._cg import cg
from ddnref.krylov._gmres import gmres
from ddnref.krylov._lsmr import LeastSquaresInfo, checked_damping, damped, lsmr, right_preconditioner, with_zeros
from ddnref.krylov._minres import minres
from ddnref.krylov._system import BREAKDOWN, SolveInfo, raise_if_failed
from ddnref.linalg._direct import Factors, error_of, factorise, orthogonal, solve_refined
from ddnref.linalg._solve import check_source, raise_singular, summed_to
from ddnref.operators import LinearOperator, adjoint, as_operator, compose
from ddnref.operators._operator import check_vector

Solver = Callable[..., tuple[Array, Any]]
DIRECT_UP_TO = 256  # rows or columns, whichever are fewer, of an array that is factorised by default
ESTIMATE_RTOL = 0.1  # tolerance of the solve for the error: more digits of an error are of no use


@public
def linear_solve(
    operator: Array | LinearOperator,
    b: Array,
    /,
    *,
    solver: str | Solver | None = None,
    preconditioner: Any = None,
    preconditioner_adjoint: Any = None,
    damping: float = 0.0,
    x0: Array | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int | None = None,
    estimate_error: bool = False,
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
        self-adjoint, "gmres" if it is square, otherwise "lsmr". For an array with up to 256 rows or columns it is
        "direct", which factorises the matrix, by LU if it is square and by QR if it is tall or wide. A callable is
        called like ``ddnref.krylov.cg``, ``solver(operator, b, x0=..., ...)``, with those of the options below that
        are given. "direct" refuses `preconditioner`, `x0` and `maxiter` if it was named, and ignores them if it is the
        default.
    preconditioner : LinearOperator or callable, optional
        Passed to the solver, ``M r ≈ A⁻¹ r``: positive definite for "cg" and "minres". "lsmr" takes ``x = N z``.
    preconditioner_adjoint : callable, optional
        ``y -> Mᴴ y`` where `preconditioner` is a function: "lsmr" needs it, and so do derivatives unless M is
        self-adjoint. A `LinearOperator` has its own adjoint.
    damping : float, default 0
        The weight λ of least squares with ``‖b − A x‖² + λ ‖x‖²``, which always has full rank. It is a constant; for
        a gradient to λ solve ``normal(A, λ) x = Aᴴ b``.
    x0 : (..., \*domain_shape) array, optional
        Where to start. Not for wide operators, where the result would depend on it.
    rtol, maxiter, check_every, throw, while_loop
        As in `cg`; for "lsmr" the tolerance is one of the error of x.
    estimate_error : bool, default False
        Estimate the error of an iterative solution by solving ``A e = b − A x`` to a tenth, which takes 10 to 30 % more
        steps; "cg" and "minres" then estimate the condition number too. "direct" and "lsmr" estimate the error in any
        case.

    Returns
    -------
    x : (..., \*domain_shape) array
        Complex if A or b is. Least squares where the operator is tall, the shortest solution where it is wide.
    info : SolveInfo
        As from `cg`. For least squares the residual is the smaller one of ``‖b − A x‖ / ‖b‖`` and
        ``‖Aᴴ(b − A x)‖ / ‖Aᴴ b‖``. With "lsmr" it is ``error`` that decides whether x has converged; with "direct" the
        residuals are relative to the terms of their sums, ``‖|A| |x| + |b|‖`` and ``‖|A|ᴴ |r|‖``. ``condition`` is
        estimated by "lsmr" and "direct" (where A is tall or wide, with columns, or rows, of length near one).

    Raises
    ------
    ConvergenceError
        A right-hand side was not solved to `rtol`; the message says why.
    SingularError
        "direct": a matrix has not full rank. ``solver="lsmr"`` returns the shortest solution of least squares.
    TypeError, ValueError
        Mixed libraries, devices or precisions; shapes that do not fit; a solver that the operator's flags, or the other
        options, exclude.

    See Also
    --------
    solve : for a dense matrix, factorised once for the solution and its gradient.

    Notes
    -----
    The relative error of x is up to κ times the residual, where κ is the condition number of A. Cost: one product
    with A per iteration for "cg", "minres" and "gmres", two for the others. "direct" refines the solution once, which
    also shows its error: ``⅔ n³`` flops for a square matrix, ``4 n m²`` for QR of a tall one, then ``16 n m`` for each
    right-hand side.

    Examples
    --------
    >>> import numpy as np
    >>> a = ddnref.operators.dense(np.asarray([[2.0, 1.0], [1.0, 2.0]]), positive_definite=True)
    >>> x, info = ddnref.linear_solve(a, np.asarray([3.0, 3.0]))
    >>> x, int(info.n_iter)
    (array([1., 1.]), 1)
    """
    a, damping = as_operator(operator), checked_damping(damping)
    held = {"preconditioner": preconditioner, "preconditioner_adjoint": preconditioner_adjoint}
    operators = {name: f for name, f in held.items() if isinstance(f, LinearOperator)}
    # PyTorch would record the iteration.
    refuse_recording("linear_solve", **named_arrays(operator=operator, b=b, x0=x0, **operators))
    if solver == "direct":
        steering = {"x0": x0, "preconditioner": preconditioner, "maxiter": maxiter}
        given = [name for name, value in steering.items() if value is not None]
        if given:
            raise TypeError(
                f'solver "direct" factorises the matrix and takes no {" and no ".join(given)}. Leave that out, or '
                'pass an iterative solver: "cg", "minres", "gmres", "bicgstab" or "lsmr".'
            )
    if x0 is not None and a.size > math.prod(a.range_shape) and not damping:
        raise ValueError("x0 is given, but the operator is wide: the shortest solution starts from zero.")
    operator, b = _with_damping(operator, b, damping)
    chosen = _solver_of(operator, solver)
    options = {"x0": x0, "preconditioner": preconditioner, "rtol": rtol, "maxiter": maxiter}
    options |= {"check_every": check_every, "while_loop": while_loop}
    if chosen is SOLVERS["lsmr"]:
        options["preconditioner_adjoint"] = preconditioner_adjoint
    if estimate_error and chosen in (SOLVERS["cg"], SOLVERS["minres"]):
        options["estimate_condition"] = True
    # A solver of the user's need not know options that were not given.
    options = {name: value for name, value in options.items() if value is not None}
    x, info = chosen(operator, b, **options, throw=throw)
    if isinstance(info, LeastSquaresInfo):
        # Of two residuals the smaller one is of interest; the error has decided.
        smaller = namespace_of(info.status).minimum(info.residual_norm, info.normal_residual_norm)
        info = SolveInfo(info.converged, info.n_iter, smaller, info.status, info.error, info.condition)
    elif estimate_error and chosen is not SOLVERS["direct"]:
        info = info._replace(error=_solved_error(chosen, operator, b, x, options))
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
    preconditioner_adjoint: Any = None,
    damping: float = 0.0,
    y0: Array | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int | None = None,
    estimate_error: bool = False,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
    solve: Solver = linear_solve,
) -> tuple[tuple[Array | tuple[Array, ...], Array], SolveInfo]:
    r"""Gradient through the solution of ``A(θ) x = b``, from one solve of the adjoint system.

    Parameters
    ----------
    x_bar, x : (..., \*domain_shape) arrays
        Cotangent of the solution, and the solution itself, by whichever solver.
    operator, b
        As in `linear_solve`. `b` is needed where the operator is tall or damped, for the residual, and where it was
        broadcast or is real beside a complex solution, for its shape and dtype.
    solver, damping, rtol, maxiter, check_every, throw, while_loop
        As in `linear_solve`, for the adjoint system.
    preconditioner, preconditioner_adjoint
        As in `linear_solve`, for A itself. The adjoint system takes Mᴴ: the adjoint of a `LinearOperator`, or
        `preconditioner_adjoint`. Without that a function is used as it is, which is right if M is self-adjoint.
    estimate_error : bool, default False
        Estimate the error of the gradient that an iteration leaves, by solves for the errors of x and y, which take b
        and 10 to 30 % more steps. "direct" and "lsmr" estimate it in any case.
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
        Status of the adjoint solve; of two solves, the worse status and the sum of the iterations. ``error`` is that
        of the gradient: of both vectors in ``y xᴴ``, and for least squares of the other product too. "lsmr" takes x
        for as exact as y.

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
    relative error of at most ``2 κ τ``, often about τ. Cost: the solve, one product and one ``params_vjp``. "direct"
    factorises once more, since the factors of the forward are not kept. A real parameter has a real gradient.

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
    domain, target = a.domain_shape, a.range_shape
    xp = namespace(x_bar=x_bar, x=x, b=b, y0=y0, **{f"params[{i}]": p for i, p in enumerate(a.params)})
    check_dtypes(x_bar=(x_bar, x.dtype))
    check_precision(xp, x=x, **{name: v for name, v in (("b", b), ("y0", y0)) if v is not None})
    if y0 is not None:
        check_vector("y0", y0, tuple(target), ())
    if b is None and estimate_error:
        raise TypeError("b must be given: with estimate_error=True the residual b − A x shows the error of x.")
    lead = _check_problem(a, x, b, damping=damping, needs_residual=True, y0=y0)  # leading axes of the solution
    check_shapes(x_bar=(x_bar, (*lead, *domain)))
    given, count, like = operator, math.prod(target), b
    operator, b = _with_damping(operator, b, damping)
    a = as_operator(operator)
    n, m, target = math.prod(a.range_shape), a.size, a.range_shape
    systems = _systems(
        solve, operator, a, solver, preconditioner, preconditioner_adjoint, x, rtol=rtol, maxiter=maxiter,
        check_every=check_every, estimate_error=estimate_error, throw=throw, while_loop=while_loop,
    )  # fmt: skip

    # Aᴴ y = x̄; y is NaN wherever it, or the solution itself, was not found.
    y, info = systems.adjoint(x_bar, x0=y0)
    y = nan_where(with_axes(_missing(x, domain), len(target)), _without_failed(y, info, target))
    params_bar = tuple(None if bar is None else -bar for bar in a.params_vjp(a.params, y, x))
    error, other = systems.error_of(x, b, info.error) + info.error, None
    # What least squares adds to −vjp(y, x).
    if n > m:
        z, more = systems.forward(y)  # A⁺ y
        r, change = systems.remainder(b - a.apply(a.params, x))  # what A leaves of b
        params_bar = _plus(params_bar, a.params_vjp(a.params, r, _without_failed(z, more, domain)))
        other, source, partner = (r, target, z, domain), _rows(b, target), _rows(z, domain)
    elif n < m:
        w, more = systems.adjoint(x)  # (Aᴴ)⁺ x
        s, change = systems.remainder(x_bar - a.adjoint(a.params, y))  # what Aᴴ cannot reach of the cotangent
        params_bar = _plus(params_bar, a.params_vjp(a.params, _without_failed(w, more, target), s))
        other, source, partner = (w, target, s, domain), _rows(x_bar, domain), _rows(w, target)
    if other is not None:
        # The two products are orthogonal to each other. What remains of b, or of x̄, has the rounding of the whole.
        info, first, second = _worse(info, more), _product(y, target, x, domain), _product(*other)
        size, change = (first * first + second * second) ** 0.5, change + eps(xp, x.dtype) * safe_norm(source)
        error = quotient(first * error + second * more.error + change * safe_norm(partner), size, size > 0)
    info = info._replace(error=error)

    # Undo the damping, and give real parameters and right-hand sides real gradients.
    params_bar = tuple(None if g is None else of_kind(g, p) for g, p in zip(params_bar, a.params, strict=True))
    b_bar = y if not damping else _reshaped(y[..., :count], lead, as_operator(given).range_shape)
    b_bar = b_bar if like is None else of_kind(summed_to(b_bar, tuple(like.shape)), like)  # b may have been broadcast
    if isinstance(given, LinearOperator):
        return (params_bar, b_bar), info
    (a_bar,) = params_bar
    return (a_bar[..., :count, :] if damping and a_bar is not None else a_bar, b_bar), info


@public
def linear_solve_jvp(
    params_dot: Array | tuple[Array | None, ...] | None,
    b_dot: Array | None,
    x: Array,
    operator: Array | LinearOperator,
    b: Array | None = None,
    /,
    *,
    solver: str | Solver | None = None,
    preconditioner: Any = None,
    preconditioner_adjoint: Any = None,
    damping: float = 0.0,
    x0: Array | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int | None = None,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
    solve: Solver = linear_solve,
) -> tuple[Array, SolveInfo]:
    r"""Derivative of the solution of ``A(θ) x = b`` along a direction, from one more solve.

    Parameters
    ----------
    params_dot : tuple of arrays, array or None
        Direction of each parameter of the operator, or of the array, of its shape and dtype; ``None`` for one that
        does not move, or in place of the tuple where none does.
    b_dot : (..., \*range_shape) array or None
        Direction of the right-hand side, shaped like `b`. Without `b` any direction that broadcasts to the solution is
        taken.
    x, operator, b, solver, preconditioner, preconditioner_adjoint, damping, rtol, maxiter, check_every, throw,
    while_loop, solve
        As in `linear_solve_vjp`.
    x0 : (..., \*domain_shape) array, optional
        Where to start, for a square operator.

    Returns
    -------
    x_dot : (..., \*domain_shape) array
        Of the dtype of `x`. NaN where it was not found, with ``throw=False``, and where `x` is NaN.
    info : SolveInfo
        As from `linear_solve_vjp`.

    Raises
    ------
    ConvergenceError, TypeError, ValueError
        As `linear_solve_vjp`; an operator without ``params_jvp`` together with `params_dot`.

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
    moves = None if moves is None or all(p is None for p in moves) else moves
    if moves is None and b_dot is None:
        raise TypeError("params_dot and b_dot are both None: there is no direction.")
    if moves is not None and len(moves) != len(a.params):
        raise ValueError(f"params_dot has {len(moves)} entries, expected one for each of {len(a.params)} parameters.")
    directions = {f"params_dot[{i}]": p for i, p in enumerate(moves or ())}
    parameters = {f"params[{i}]": p for i, p in enumerate(a.params)}
    xp = namespace(b_dot=b_dot, x=x, b=b, x0=x0, **directions, **parameters)  # one library, one device
    vectors = {"b_dot": b_dot, "b": b, "x0": x0}
    check_precision(xp, x=x, **parameters)  # real parameters may belong to a complex operator
    check_precision(xp, x=x, **{name: v for name, v in vectors.items() if v is not None})
    for i, p in enumerate(moves or ()):
        check_dtypes(**{f"params_dot[{i}]": (p, a.params[i].dtype)})
        check_shapes(**{f"params_dot[{i}]": (p, tuple(a.params[i].shape))})
    lead = _check_problem(a, x, b, damping=damping, needs_residual=moves is not None, x0=x0)
    if b_dot is not None:
        _check_direction(b_dot, x, b, lead, tuple(a.range_shape))
        b_dot = xp.broadcast_to(as_dtype(b_dot, x), (*lead, *a.range_shape))
    if moves is not None:
        moves = tuple(xp.zeros_like(p) if d is None else d for p, d in zip(a.params, moves, strict=True))
    if damping:  # the rows below A do not move
        _, b_dot = _with_damping(operator, b_dot, damping)
        if moves is not None and not isinstance(operator, LinearOperator):
            moves = (xp.concat([moves[0], xp.zeros_like(_damping_rows(operator, damping))], axis=-2),)
        operator, b = _with_damping(operator, b, damping)
        a = as_operator(operator)
    systems = _systems(
        solve, operator, a, solver, preconditioner, preconditioner_adjoint, x, rtol=rtol, maxiter=maxiter,
        check_every=check_every, throw=throw, while_loop=while_loop,
    )  # fmt: skip
    n, m = math.prod(a.range_shape), a.size

    # The right-hand side ḃ − Ȧ x, and what least squares adds to it and to the solution.
    right = full((*lead, *a.range_shape), 0.0, x) if b_dot is None else b_dot
    shift, before = None, None
    if moves is not None:
        right = right - _moved(a, moves, x)
        if n > m:
            r = b - a.apply(a.params, x)
            y, before = systems.adjoint(_moved(adjoint(a), moves, r))
            right = right + y  # plus (Aᴴ)⁺ Ȧᴴ r
        elif n < m:
            w, before = systems.adjoint(x)
            shift = _moved(adjoint(a), moves, w)  # g = Ȧᴴ (Aᴴ)⁺ x
            right = right - a.apply(a.params, shift)
    x_dot, info = systems.forward(right, x0=x0)
    x_dot = x_dot if shift is None else shift + x_dot
    info = info if before is None else _worse(before, info)
    # Not solved, or no solution to begin with.
    bad = with_axes(~info.converged | _missing(x, a.domain_shape), len(a.domain_shape))
    return nan_where(bad, x_dot), info


def _check_direction(b_dot: Array, x: Array, b: Array | None, lead: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Raise unless `b_dot` can be a direction of the right-hand side."""
    if b is not None:
        check_dtypes(b_dot=(b_dot, b.dtype))
        check_shapes(b_dot=(b_dot, tuple(b.shape)))
        return
    if not is_complex(x):  # a complex solution may belong to a real right-hand side
        check_dtypes(b_dot=(b_dot, x.dtype))
    check_source("b_dot", b_dot, lead, target)


def _moved(a: LinearOperator, params_dot: tuple[Array, ...], x: Array) -> Array:
    """``Ȧ x``."""
    if a.params_jvp is None:
        raise TypeError(
            "params_dot is given, but the operator (or its adjoint, for least squares) has no params_jvp, which "
            "computes Ȧ x. Pass one: LinearOperator(..., params_jvp=lambda params, params_dot, x: ...)."
        )
    return a.params_jvp(a.params, params_dot, x)


# --- common to both derivatives -------------------------------------------------------------------------------------


def _check_problem(
    a: LinearOperator, x: Array, b: Array | None, *, damping: float, needs_residual: bool, **start: Array | None
) -> tuple[int, ...]:
    """Validate the solution, the right-hand side and a named start; return the leading axes of the solution."""
    n, m = math.prod(a.range_shape), a.size
    damping = checked_damping(damping)
    if b is None and (n > m or damping) and needs_residual:
        kind = "damped" if damping else "tall"
        raise TypeError(f"b must be given: the operator is {kind}, and the residual b − A x enters the derivative.")
    for name, array in start.items():
        if array is not None and (n != m or damping):
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


class _Systems(NamedTuple):
    """How a derivative solves with A and with Aᴴ, and what it knows of the error of x."""

    forward: Callable[..., tuple[Array, SolveInfo]]
    adjoint: Callable[..., tuple[Array, SolveInfo]]
    error_of: Callable[[Array, Array | None, Array], Array]
    """``error_of(x, b, error of y)``: the relative error of the solution that was given."""
    remainder: Callable[[Array], tuple[Array, Any]]
    """The residual of least squares, or what a wide A does not reach, made orthogonal to the range of A (or Aᴴ) once
    more where that costs little, and the size of the change."""


def _systems(
    solve: Solver,
    operator: Array | LinearOperator,
    a: LinearOperator,
    solver: str | Solver | None,
    m: Any,
    m_adjoint: Any,
    like: Array,
    **call: Any,
) -> _Systems:
    """The solves of a derivative, with A and M for the one system, Aᴴ and Mᴴ for the other.

    Where the matrix is factorised, both use the same factors, unless `solve` has to be differentiated.
    """
    chosen, adjoint_operator = _solver_of(operator, solver), _adjoint_of(operator)
    if chosen is SOLVERS["direct"] and solve is linear_solve:
        f = factorise(_matrix(operator, a, like))
        shared = {"factors": f, "rtol": call["rtol"], "throw": call["throw"]}

        def of_solution(x: Array, b: Array | None, _: Array) -> Array:
            return error_of(f, _rows(x, a.domain_shape), None if b is None else _rows(b, a.range_shape))

        def remainder(r: Array) -> tuple[Array, Array]:
            shape = a.domain_shape if f.wide else a.range_shape
            rows = _rows(r, shape)
            rest = orthogonal(f, rows)
            return _reshaped(rest, tuple(rest.shape[:-1]), shape), safe_norm(rows - rest)

        def with_factors(system: Array | LinearOperator, is_adjoint: bool) -> Callable[..., tuple[Array, SolveInfo]]:
            return lambda b, x0=None: _in_derivative(chosen, system, b, **shared, x0=x0, is_adjoint=is_adjoint)

        return _Systems(with_factors(operator, False), with_factors(adjoint_operator, True), of_solution, remainder)

    # A self-adjoint system is its own adjoint. Of a function that has no adjoint we know nothing better than itself.
    call["solver"], given = solver, m_adjoint
    self_adjoint = a.self_adjoint or chosen in (SOLVERS["cg"], SOLVERS["minres"])
    if m_adjoint is None:
        m_adjoint = m if self_adjoint or not isinstance(m, LinearOperator) or m.self_adjoint else adjoint(m)
    advice = ""
    if m is not None and given is None and not self_adjoint and not isinstance(m, LinearOperator):
        advice = (
            " The adjoint system was solved with the preconditioner of A itself. If that is not self-adjoint, pass "
            "preconditioner_adjoint=, or a LinearOperator."
        )

    def forward(b: Array, x0: Array | None = None) -> tuple[Array, SolveInfo]:
        pair = {"preconditioner": m, "preconditioner_adjoint": given}
        return _in_derivative(solve, operator, b, x0=x0, **pair, **call)

    def backward(b: Array, x0: Array | None = None) -> tuple[Array, SolveInfo]:
        if m is not None and chosen is SOLVERS["lsmr"]:
            # NᴴAᴴ y = Nᴴ b has the solutions of Aᴴ y = b, and so the same shortest one.
            right = right_preconditioner(a, m, given, None, 0.0)
            left = adjoint(right)
            return _in_derivative(solve, compose(left, as_operator(adjoint_operator)), left(b), **call)
        pair = {"preconditioner": m_adjoint, "preconditioner_adjoint": None if given is None else m}
        return _in_derivative(solve, adjoint_operator, b, x0=x0, **pair, **call, advice=advice)

    def of_iterate(x: Array, b: Array | None, y_error: Array) -> Array:
        if chosen is SOLVERS["lsmr"]:
            return y_error
        if not call.get("estimate_error") or solve is not linear_solve:
            return y_error + float("inf")
        options = {"preconditioner": m, **{name: call[name] for name in ("maxiter", "check_every", "while_loop")}}
        return _solved_error(chosen, operator, b, x, {k: v for k, v in options.items() if v is not None})

    return _Systems(forward, backward, of_iterate, lambda r: (r, 0.0))


def _in_derivative(
    solve: Solver, operator: Array | LinearOperator, b: Array, *, advice: str = "", **options: Any
) -> tuple[Array, SolveInfo]:
    """Solve a system of a derivative; an error says that it belongs to one."""
    options = {name: value for name, value in options.items() if value is not None}
    try:
        return solve(operator, b, **options)
    except DdnrefError as error:
        more = advice if isinstance(error, ConvergenceError) else ""
        raise type(error)(f"In a solve for the derivative of linear_solve: {error}{more}") from error


def _solved_error(
    solver: Solver, operator: Array | LinearOperator, b: Array, x: Array, options: dict[str, Any]
) -> Array:
    """The relative error of x, from a solution of ``A e = b − A x``, which is unknown where that was not found."""
    a, xp = as_operator(operator), namespace_of(x)
    options = {name: value for name, value in options.items() if name not in ("x0", "rtol")}
    e, info = solver(operator, b - a.apply(a.params, x), **options, rtol=ESTIMATE_RTOL, throw=False)
    size, whole = safe_norm(_rows(e, a.domain_shape)), safe_norm(_rows(x, a.domain_shape))
    unknown = full((), float("inf"), size)
    error = xp.where(whole > 0, quotient(size, whole, whole > 0), xp.where(size == 0, xp.zeros_like(size), unknown))
    return xp.where(info.converged, error, unknown)


def _product(u: Array, u_shape: tuple[int, ...], v: Array, v_shape: tuple[int, ...]) -> Array:
    """The size of ``u vᴴ``."""
    return safe_norm(_rows(u, u_shape)) * safe_norm(_rows(v, v_shape))


def _rows(v: Array, shape: tuple[int, ...]) -> Array:
    """Vectors ``(..., *shape)`` with one axis each."""
    return _reshaped(v, tuple(v.shape[: v.ndim - len(shape)]), (math.prod(shape),))


def _reshaped(v: Array, lead: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    return namespace_of(v).reshape(v, (*lead, *shape))


def _with_damping(
    operator: Array | LinearOperator, b: Array | None, damping: float
) -> tuple[Array | LinearOperator, Array | None]:
    """``[A; √λ I]`` and ``[b; 0]``, a matrix for a matrix, or both as they are without damping."""
    if checked_damping(damping) == 0:
        return operator, b
    a = as_operator(operator)
    stacked = damped(a, damping)
    b = None if b is None else with_zeros(a, b)
    if isinstance(operator, LinearOperator):
        return stacked, b
    rows = _damping_rows(operator, damping)
    return namespace_of(operator).concat([operator, rows], axis=-2), b


def _damping_rows(a: Array, damping: float) -> Array:
    """``√λ I`` for each matrix."""
    m = a.shape[-1]
    return namespace_of(a).broadcast_to(math.sqrt(damping) * identity(m, a), (*a.shape[:-2], m, m))


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
        xp.maximum(one.error, other.error),
        xp.minimum(one.condition, other.condition),
    )


# --- which solver ---------------------------------------------------------------------------------------------------


def direct(
    operator: Array | LinearOperator,
    b: Array,
    /,
    *,
    x0: Array | None = None,
    rtol: float | None = None,
    factors: Factors | None = None,
    is_adjoint: bool = False,
    throw: bool = True,
    **_: Any,
) -> tuple[Array, SolveInfo]:
    """Factorise the matrix of an operator and report the status that an iteration would have.

    With few unknowns that is faster than any iteration. Options that steer an iteration have no effect. `factors` are
    those of the matrix, or of its adjoint if `is_adjoint`.
    """
    a = as_operator(operator)
    check_vector("b", b, tuple(a.range_shape), a.params)
    if x0 is not None:
        check_vector("x0", x0, tuple(a.domain_shape), a.params)
    f = factorise(_matrix(operator, a, b)) if factors is None else factors
    x, info = solve_refined(f, _rows(b, a.range_shape), rtol, is_adjoint=is_adjoint)
    if throw:
        xp = namespace_of(b)
        if is_true(xp.any(info.status == BREAKDOWN)):
            raise_singular(info.status == BREAKDOWN)
        raise_if_failed("linear_solve", info, LoopOptions(eps(xp, b.dtype) ** 0.5 if rtol is None else rtol, maxiter=0))
    return _reshaped(x, tuple(x.shape[:-1]), a.domain_shape), info


def _matrix(operator: Array | LinearOperator, a: LinearOperator, like: Array | None = None) -> Array:
    """The matrix of an operator, by products with unit vectors."""
    return a.matrix(like) if isinstance(operator, LinearOperator) else operator


SOLVERS: dict[str, Solver] = {
    "cg": cg, "minres": minres, "bicgstab": bicgstab, "gmres": gmres, "lsmr": lsmr, "direct": direct,
}  # fmt: skip


def _solver_of(operator: Array | LinearOperator, solver: str | Solver | None) -> Solver:
    """The solver that was named or given, or else the fastest that the shape and the flags of an operator allow."""
    if callable(solver):
        return solver
    if solver is None:
        a = as_operator(operator)
        if not isinstance(operator, LinearOperator) and min(a.size, math.prod(a.range_shape)) <= DIRECT_UP_TO:
            solver = "direct"  # faster than any iteration, and its error does not depend on rtol
        elif a.size != math.prod(a.range_shape):
            solver = "lsmr"  # least squares or the shortest solution
        elif a.self_adjoint:
            solver = "cg" if a.positive_definite else "minres"
        else:
            solver = "gmres"
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected {', '.join(map(repr, SOLVERS))}, a callable or None.")
    return SOLVERS[solver]
