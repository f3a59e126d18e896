"""A linear operator as a matrix, factorised: where there are few unknowns that is faster than any iteration."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat

from ddnref._core.arrays import Array, eps, is_true, namespace
from ddnref._kernels.vectors import norm
from ddnref.krylov._common import (
    BREAKDOWN,
    CONVERGED,
    NOT_FINITE,
    SLACK,
    STAGNATION,
    Options,
    SolveInfo,
    raise_if_failed,
)
from ddnref.linalg._solve import raise_singular, solve
from ddnref.operators import LinearOperator, as_operator
from ddnref.operators._operator import check_vector

DIRECT_UP_TO = 256  # columns, as in `eigsh_vjp`


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
    """`ddnref.solve` with the status of an iteration; options that steer an iteration have no effect."""
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
    matrix = a.matrix(b) if isinstance(operator, LinearOperator) else operator
    rows = xp.reshape(b, (*b.shape[: b.ndim - axes], n))
    x = solve(matrix, rows, throw=False)
    finite = xp.all(xp.isfinite(matrix), axis=(-2, -1)) & xp.all(xp.isfinite(rows), axis=-1)
    lead = tuple(x.shape[:-1])
    x = xp.reshape(x, (*lead, *a.domain_shape))
    r = xp.reshape(b - a.apply(a.params, x), (*lead, n))
    status, size = _judged(r, rows, finite, rtol := eps(xp, b.dtype) ** 0.5 if rtol is None else rtol)
    info = SolveInfo(status == CONVERGED, xp.zeros_like(status), size, status)
    if throw:
        if is_true(xp.any(status == BREAKDOWN)):
            raise_singular(status == BREAKDOWN)
        raise_if_failed("linear_solve", info, Options(rtol, 0, 1, None, None))
    return x, info


def _judged(r: Array, b: Array, finite: Array, rtol: float) -> tuple[Array, Array]:
    """The status of each right-hand side and its relative residual; NaN where there is no solution."""
    xp = array_api_compat.array_namespace(r)
    size = norm(b)
    size = norm(r) / xp.where(size > 0, size, xp.ones_like(size))
    status = xp.zeros(r.shape[:-1], dtype=xp.int32, device=array_api_compat.device(r))
    for bad, code in ((size > SLACK * rtol, STAGNATION), (xp.isnan(size), BREAKDOWN), (~finite, NOT_FINITE)):
        status = xp.where(bad, xp.zeros_like(status) + code, status)
    return status, size
