"""From an operator and right-hand sides to a `System`; what does not depend on values is checked here."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np

from ddnref._array import Array, check_dtypes, check_shapes, eps, full, namespace
from ddnref._krylov._common import CONVERGED, NOT_FINITE, RUNNING, Callback, Options, Preconditioner, System, mark
from ddnref._krylov._vectors import column, norms, power_of_two
from ddnref._linalg import adjoint as adjoint_of
from ddnref._linalg import matvec
from ddnref._loops import WhileLoop
from ddnref._operators import LinearOperator
from ddnref._rows import namespace_of

MOST = 20_000  # steps by default: enough for condition 1e6 at 1.5e-8, see `default_maxiter`


def as_operator(a: Array | LinearOperator, function: str) -> LinearOperator:
    """An operator as it is, or the one that multiplies by a matrix ``(..., n, m)``, taken at its word."""
    if isinstance(a, LinearOperator):
        return a
    namespace(operator=a)
    if a.ndim < 2:
        raise ValueError(f"The operator given to {function} has shape {tuple(a.shape)}, expected (..., n, m).")
    n, m = a.shape[-2:]

    def refuse(*_: object) -> tuple[Array, ...]:
        raise NotImplementedError("a solver needs no gradient")

    return LinearOperator(
        (a,), lambda p, x: matvec(p[0], x), lambda p, y: matvec(adjoint_of(p[0]), y), refuse, (m,), (n,),
        self_adjoint=n == m,
    )  # fmt: skip


def prepare(
    function: str,
    operator: Array | LinearOperator,
    b: Array,
    x0: Array | None,
    preconditioner: Preconditioner | None,
    limits: dict[str, Any],
    callback: Callback | None,
    while_loop: WhileLoop | None,
    *,
    self_adjoint: bool = False,
    rectangular: bool = False,
) -> tuple[System, Array | None]:
    """The system, after a look at everything that does not depend on values, and ``x0`` scaled like it."""
    a = _prepared(as_operator(operator, function))
    xp = namespace(b=b, x0=x0, **{f"params[{i}]": parameter for i, parameter in enumerate(a.params)})
    check_dtypes(x0=(x0, b.dtype))
    _refuse_recording(function, b, *a.params)
    _check_operator(function, a, self_adjoint, rectangular)
    if callback is not None and while_loop is not None:
        raise ValueError(f"{function} calls no callback inside while_loop, where no value can be read: pass one only.")
    n, k = len(a.range_shape), len(a.domain_shape)
    if b.ndim < n or tuple(b.shape[b.ndim - n :]) != tuple(a.range_shape):
        raise ValueError(
            f"b has shape {tuple(b.shape)}, expected (..., {', '.join(map(str, a.range_shape))}): the operator's "
            "range, with any batch axes in front."
        )
    if x0 is not None and (x0.ndim < k or tuple(x0.shape[x0.ndim - k :]) != tuple(a.domain_shape)):
        raise ValueError(f"x0 has shape {tuple(x0.shape)}, expected (..., *{tuple(a.domain_shape)}).")
    batch = _batch(a, b, x0)
    rows = xp.reshape(xp.broadcast_to(b, (*batch, *a.range_shape)), (*batch, math.prod(a.range_shape)))
    start = None if x0 is None else _broadcast_start(x0, a, batch)
    options = _options(xp, b, a, **limits)._replace(callback=callback, while_loop=while_loop)
    return _scaled(a, rows, start, _precondition(a, preconditioner, batch), batch, options)


def _prepared(a: LinearOperator) -> LinearOperator:
    """The same map with what does not depend on x computed once."""
    prepared = getattr(a, "prepared", None)
    return a if prepared is None else prepared()


def _check_operator(function: str, a: LinearOperator, self_adjoint: bool, rectangular: bool) -> None:
    if not rectangular and tuple(a.domain_shape) != tuple(a.range_shape):
        raise ValueError(
            f"{function} needs a square operator, got domain_shape {tuple(a.domain_shape)} and range_shape "
            f"{tuple(a.range_shape)}: use ddnref.lsmr for least squares."
        )
    if self_adjoint and not a.self_adjoint:
        raise ValueError(
            f"{function} needs a self-adjoint operator, but self_adjoint is False. Set it only if A = Aᴴ for all "
            "parameters; otherwise use ddnref.gmres or ddnref.bicgstab."
        )
    if math.prod(a.domain_shape) == 0 or math.prod(a.range_shape) == 0:
        raise ValueError(f"The operator given to {function} has no unknowns or no equations: {tuple(a.domain_shape)}.")


def _batch(a: LinearOperator, b: Array, x0: Array | None) -> tuple[int, ...]:
    """Leading axes of the solution: those of b, x0 and of the image of one vector, which is a product's only use."""
    y = a(full(tuple(a.domain_shape), 0.0, b))
    n, k = len(a.range_shape), len(a.domain_shape)
    check_dtypes(**{"operator.apply(params, x)": (y, b.dtype)})
    lead = tuple(y.shape[: y.ndim - n])
    check_shapes(**{"operator.apply(params, x)": (y, (*lead, *a.range_shape))})
    others = [tuple(b.shape[: b.ndim - n])] + ([] if x0 is None else [tuple(x0.shape[: x0.ndim - k])])
    try:
        return np.broadcast_shapes(lead, *others)
    except ValueError as error:
        names = " and ".join(map(str, others))
        raise ValueError(f"Batch axes do not broadcast: the operator has {lead}, b (and x0) {names}.") from error


def _broadcast_start(x0: Array, a: LinearOperator, batch: tuple[int, ...]) -> Array:
    xp = array_api_compat.array_namespace(x0)
    return xp.reshape(xp.broadcast_to(x0, (*batch, *a.domain_shape)), (*batch, math.prod(a.domain_shape)))


def _precondition(
    a: LinearOperator, preconditioner: Preconditioner | None, batch: tuple[int, ...]
) -> Callable[[Array], Array] | None:
    if preconditioner is None:
        return None
    if isinstance(preconditioner, LinearOperator) and tuple(preconditioner.domain_shape) != tuple(a.range_shape):
        raise ValueError(
            f"preconditioner has domain_shape {tuple(preconditioner.domain_shape)}, expected {tuple(a.range_shape)}."
        )
    shape, n = (*batch, *a.range_shape), math.prod(a.range_shape)
    m = _prepared(preconditioner) if isinstance(preconditioner, LinearOperator) else preconditioner

    def precondition(r: Array) -> Array:
        xp = namespace_of(r)
        z = m(xp.reshape(r, shape))
        check_shapes(**{"preconditioner(r)": (z, shape)})
        check_dtypes(**{"preconditioner(r)": (z, r.dtype)})
        return xp.reshape(z, (*batch, n))

    return precondition


def default_maxiter(n: int) -> int:
    """Ten times the number of unknowns, at least 100 and at most 20,000.

    Conjugate gradients need at most ``½ √κ ln(2 √κ / rtol)`` steps for a residual of rtol: 12,800 for κ = 1e6 at the
    default tolerance.
    """
    return max(100, min(10 * n, MOST))


def _options(
    xp: Any,
    b: Array,
    a: LinearOperator,
    *,
    rtol: float | None,
    maxiter: int | None,
    check_every: int | None,
) -> Options:
    rtol = eps(xp, b.dtype) ** 0.5 if rtol is None else rtol
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}, expected 0 <= rtol < 1: the tolerance is relative to ‖b‖.")
    limit = default_maxiter(math.prod(a.domain_shape)) if maxiter is None else maxiter
    every = (1 if array_api_compat.is_numpy_array(b) else 10) if check_every is None else check_every
    if limit < 0 or every < 1:
        raise ValueError(f"maxiter is {limit} and check_every {every}; expected at least 0 and 1.")
    return Options(rtol, limit, every, None, None)


def _refuse_recording(function: str, *arrays: Array) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    if any(array_api_compat.is_torch_array(array) and array.requires_grad for array in arrays):
        raise TypeError(
            f"A tensor given to {function} requires grad, so PyTorch would record every step, and the gradient of an "
            "unrolled Krylov method is wrong after some hundred steps. Differentiate ddnref.linear_solve instead, or "
            "pass detached tensors."
        )


def _scaled(
    a: LinearOperator,
    b: Array,
    x0: Array | None,
    precondition: Callable[[Array], Array] | None,
    batch: tuple[int, ...],
    options: Options,
) -> tuple[System, Array | None]:
    xp = array_api_compat.array_namespace(b)
    n, m = math.prod(a.range_shape), math.prod(a.domain_shape)

    def apply(x: Array) -> Array:
        return xp.reshape(a.apply(a.params, xp.reshape(x, (*batch, *a.domain_shape))), (*batch, n))

    def adjoint(y: Array) -> Array:
        return xp.reshape(a.adjoint(a.params, xp.reshape(y, (*batch, *a.range_shape))), (*batch, m))

    finite = xp.all(xp.isfinite(b), axis=-1)
    b = xp.where(finite[..., None], b, xp.zeros_like(b))
    scale = power_of_two(b)
    b = b / column(scale, b)
    size = norms(b)
    zero = size == 0
    status = xp.zeros(batch, dtype=xp.int32, device=array_api_compat.device(b)) + RUNNING
    status = mark(mark(status, zero & finite, CONVERGED), ~finite, NOT_FINITE)
    norm_b = xp.where(zero, xp.ones_like(size), size)
    if x0 is not None:
        x0 = xp.where(zero[..., None], xp.zeros_like(x0), x0 / column(scale, x0))
    return System(apply, adjoint, precondition, b, norm_b, scale, status, batch, tuple(a.domain_shape), options), x0
