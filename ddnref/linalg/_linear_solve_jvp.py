"""The forward mode of `linear_solve`.

    ẋ = A⁻¹ (ḃ − Ȧ x)

Least squares of full rank, ``x = A⁺ b``, with ``r = b − A x`` of a tall A and ``g = Ȧᴴ (Aᴴ)⁺ x`` of a wide one:

    ẋ = A⁺ (ḃ − Ȧ x + (Aᴴ)⁺ Ȧᴴ r)         (tall)
    ẋ = g + A⁺ (ḃ − Ȧ x − A g)             (wide)
"""

from __future__ import annotations

import math
from typing import Any

from ddnref._core.arrays import Array, full, namespace, nan_where, with_axes
from ddnref._core.checks import check_dtypes, check_precision, check_shapes
from ddnref._core.loops import WhileLoop
from ddnref._kernels.public import public
from ddnref.krylov._common import SolveInfo
from ddnref.linalg._linear_solve import Solver, adjoint_of, linear_solve, missing, solve_for_derivative, worse
from ddnref.linalg._solve import check_source
from ddnref.operators import LinearOperator, adjoint, as_operator


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
    r"""How the solution of ``A(θ) x = b`` moves along a direction, by one more solve.

    Parameters
    ----------
    params_dot : tuple of arrays, array or None
        Direction of each parameter of the operator, or of the array; ``None`` where nothing of it moves.
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
        Of that solve; of two for least squares the worse, and the sum of the iterations.

    Raises
    ------
    ConvergenceError
        The system was not solved to `rtol`.
    TypeError, ValueError
        As `linear_solve_vjp`; an operator without ``params_jvp`` together with `params_dot`.

    See Also
    --------
    linear_solve_vjp : its transpose.

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
    moves = params_dot if params_dot is None or isinstance(params_dot, tuple) else (params_dot,)
    _check(a, moves, b_dot, x, b, x0)
    call = {"solver": solver, "preconditioner": preconditioner, "rtol": rtol, "maxiter": maxiter}
    call |= {"check_every": check_every, "throw": throw, "while_loop": while_loop}
    n, m = math.prod(a.range_shape), a.size
    right = full((*x.shape[: x.ndim - len(a.domain_shape)], *a.range_shape), 0.0, x) if b_dot is None else b_dot
    if moves is None or n == m:
        right = right if moves is None else right - _moved(a, moves, x)
        x_dot, info = solve_for_derivative(linear_solve, operator, right, x0=x0, **call)
    else:
        right, shift, more = (_tall if n > m else _wide)(operator, a, moves, right, x, b, call)
        x_dot, info = solve_for_derivative(linear_solve, operator, right, **call)
        x_dot, info = x_dot if shift is None else shift + x_dot, worse(more, info)
    bad = with_axes(~info.converged | missing(x, a.domain_shape), len(a.domain_shape))
    return nan_where(bad, x_dot), info


def _tall(
    operator: Array | LinearOperator,
    a: LinearOperator,
    moves: tuple[Array, ...],
    right: Array,
    x: Array,
    b: Array | None,
    call: dict[str, Any],
) -> tuple[Array, Array | None, SolveInfo]:
    """``ḃ − Ȧ x + (Aᴴ)⁺ Ȧᴴ r``, nothing to add to the solution, and how the solve ended."""
    r = b - a.apply(a.params, x)
    y, info = solve_for_derivative(linear_solve, adjoint_of(operator), _moved(adjoint(a), moves, r), **call)
    return right - _moved(a, moves, x) + y, None, info


def _wide(
    operator: Array | LinearOperator,
    a: LinearOperator,
    moves: tuple[Array, ...],
    right: Array,
    x: Array,
    _: Array | None,
    call: dict[str, Any],
) -> tuple[Array, Array | None, SolveInfo]:
    """``ḃ − Ȧ x − A g``, g, and how the solve for it ended."""
    w, info = solve_for_derivative(linear_solve, adjoint_of(operator), x, **call)
    g = _moved(adjoint(a), moves, w)
    return right - _moved(a, moves, x) - a.apply(a.params, g), g, info


def _moved(a: LinearOperator, params_dot: tuple[Array, ...], x: Array) -> Array:
    """``Ȧ x``."""
    if a.params_jvp is None:
        raise TypeError(
            "params_dot is given, but the operator (or its adjoint, for least squares) has no params_jvp, which says "
            "what Ȧ x is. Pass one: LinearOperator(..., params_jvp=lambda params, params_dot, x: ...)."
        )
    return a.params_jvp(a.params, params_dot, x)


def _check(
    a: LinearOperator,
    moves: tuple[Array, ...] | None,
    b_dot: Array | None,
    x: Array,
    b: Array | None,
    x0: Array | None,
) -> None:
    if moves is None and b_dot is None:
        raise TypeError("params_dot and b_dot are both None: there is no direction.")
    given = {f"params_dot[{i}]": p for i, p in enumerate(moves or ())}
    parameters = {f"params[{i}]": p for i, p in enumerate(a.params)}
    xp = namespace(b_dot=b_dot, x=x, b=b, x0=x0, **given, **parameters)
    check_precision(xp, x=x, **given, **parameters)
    check_dtypes(b_dot=(b_dot, x.dtype), b=(b, x.dtype), x0=(x0, x.dtype))
    if moves is not None:
        if len(moves) != len(a.params):
            raise ValueError(
                f"params_dot has {len(moves)} entries, expected one for each of {len(a.params)} parameters."
            )
        check_shapes(**{f"params_dot[{i}]": (p, a.params[i].shape) for i, p in enumerate(moves)})
    n, m = math.prod(a.range_shape), a.size
    if b is None and n > m and moves is not None:
        raise TypeError("b must be given: the operator is tall, and the residual b − A x enters the derivative.")
    k = len(a.domain_shape)
    lead = tuple(x.shape[: max(0, x.ndim - k)])
    check_shapes(x=(x, (*lead, *a.domain_shape)))
    for name, right in (("b_dot", b_dot), ("b", b)):
        if right is not None:
            check_source(name, right, lead, tuple(a.range_shape))
    if x0 is not None and n != m:
        raise ValueError("x0 is given, but the operator is not square: the result would depend on it.")
