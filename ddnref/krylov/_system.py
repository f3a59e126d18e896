"""From an operator and right-hand sides to a `System`; what does not depend on values is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, eps, full, is_recorded, namespace, namespace_of, quiet, with_axes
from ddnref._core.checks import check_dtypes, check_precision, check_shapes
from ddnref._core.loops import WhileLoop
from ddnref._kernels.vectors import column, norm, power_of_two
from ddnref.krylov._common import CONVERGED, NOT_FINITE, RUNNING, Callback, Options, Preconditioner, System, mark
from ddnref.operators import LinearOperator, as_operator

LONG = 2**13  # numbers in a vector from which a matrix would take half a gigabyte
PART = 2**15  # numbers in a part of many long vectors
MOST = 20_000  # steps by default: enough for condition 1e6 at 1.5e-8, see `default_maxiter`


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
    shaped: bool = False,
) -> tuple[System, Array | None]:
    """The system, after a look at everything that does not depend on values, and ``x0`` scaled like it."""
    a = as_operator(operator)
    if a is not operator and a.domain_shape == a.range_shape:
        a = a._replace(self_adjoint=True)  # a square matrix is taken at its word
    a = a.prepared()
    xp = namespace(b=b, x0=x0, **{f"params[{i}]": parameter for i, parameter in enumerate(a.params)})
    check_precision(xp, b=b, **{f"params[{i}]": parameter for i, parameter in enumerate(a.params)})
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
    batch, is_batched = _batch(a, b, x0)
    shaped = shaped and n > 1 and not array_api_compat.is_numpy_array(b)
    spaces = _Spaces(a.domain_shape, a.range_shape) if shaped else _Spaces(*_lengths(a))
    b = xp.reshape(xp.broadcast_to(b, (*batch, *a.range_shape)), (*batch, *spaces.range))
    if x0 is not None:
        x0 = xp.reshape(xp.broadcast_to(x0, (*batch, *a.domain_shape)), (*batch, *spaces.domain))
    options = _options(xp, b, a, **limits)._replace(callback=callback, while_loop=while_loop)
    m = _precondition(a, preconditioner, batch, spaces.range)
    return _scaled(a if is_batched else in_parts(a), b, x0, m, batch, spaces, options)


def _check_operator(function: str, a: LinearOperator, self_adjoint: bool, rectangular: bool) -> None:
    if not rectangular and tuple(a.domain_shape) != tuple(a.range_shape):
        raise ValueError(
            f"{function} needs a square operator, got domain_shape {tuple(a.domain_shape)} and range_shape "
            f"{tuple(a.range_shape)}: use ddnref.krylov.lsmr for least squares."
        )
    if self_adjoint and not a.self_adjoint:
        raise ValueError(
            f"{function} needs a self-adjoint operator, but self_adjoint is False. Set it only if A = Aᴴ for all "
            "parameters; otherwise use ddnref.krylov.gmres or ddnref.krylov.bicgstab."
        )
    if math.prod(a.domain_shape) == 0 or math.prod(a.range_shape) == 0:
        raise ValueError(f"The operator given to {function} has no unknowns or no equations: {tuple(a.domain_shape)}.")


def _batch(a: LinearOperator, b: Array, x0: Array | None) -> tuple[tuple[int, ...], bool]:
    """Leading axes of the solution: those of b, x0 and of the image of one vector; whether the last has any."""
    with quiet():
        y = a(full(tuple(a.domain_shape), 0.0, b))
    n, k = len(a.range_shape), len(a.domain_shape)
    check_dtypes(**{"operator.apply(params, x)": (y, b.dtype)})
    lead = tuple(y.shape[: y.ndim - n])
    check_shapes(**{"operator.apply(params, x)": (y, (*lead, *a.range_shape))})
    others = [tuple(b.shape[: b.ndim - n])] + ([] if x0 is None else [tuple(x0.shape[: x0.ndim - k])])
    try:
        return np.broadcast_shapes(lead, *others), lead != ()
    except ValueError as error:
        names = " and ".join(map(str, others))
        raise ValueError(f"Batch axes do not broadcast: the operator has {lead}, b (and x0) {names}.") from error


def in_parts(a: LinearOperator) -> LinearOperator:
    """The operator, applied to a few of many long NumPy vectors at a time.

    What a product makes on its way then stays in the second-level cache. Short vectors go through at once: a matrix is
    read once for all of them. Measured for 64 images of 128×128 and a product by Fourier transforms: 0.63 of the time.
    """
    if min(math.prod(a.domain_shape), math.prod(a.range_shape)) < LONG:
        return a

    def parts(product: Callable[[Any, Array], Array], shape: tuple[int, ...]) -> Callable[[Any, Array], Array]:
        def apply(params: Any, x: Array) -> Array:
            batch, n = x.shape[: x.ndim - len(shape)], math.prod(shape)
            count, width = math.prod(batch), max(1, PART // n)
            if type(x) is not np.ndarray or count <= width:
                return product(params, x)
            x = x.reshape(count, *shape)
            images = [product(params, x[i : i + width]) for i in range(0, count, width)]
            return np.concatenate(images).reshape(*batch, *images[0].shape[1:])

        return apply

    return a._replace(apply=parts(a.apply, a.domain_shape), adjoint=parts(a.adjoint, a.range_shape))


class _Spaces(NamedTuple):
    """The shape that vectors have inside a method."""

    domain: tuple[int, ...]
    range: tuple[int, ...]


def _lengths(a: LinearOperator) -> tuple[tuple[int], tuple[int]]:
    return (math.prod(a.domain_shape),), (math.prod(a.range_shape),)


def _precondition(
    a: LinearOperator, preconditioner: Preconditioner | None, batch: tuple[int, ...], space: tuple[int, ...]
) -> Callable[[Array], Array] | None:
    if preconditioner is None:
        return None
    if isinstance(preconditioner, LinearOperator) and tuple(preconditioner.domain_shape) != tuple(a.range_shape):
        raise ValueError(
            f"preconditioner has domain_shape {tuple(preconditioner.domain_shape)}, expected {tuple(a.range_shape)}."
        )
    shape = (*batch, *a.range_shape)
    m = preconditioner.prepared() if isinstance(preconditioner, LinearOperator) else preconditioner

    def precondition(r: Array) -> Array:
        xp = namespace_of(r)
        z = m(xp.reshape(r, shape))
        check_shapes(**{"preconditioner(r)": (z, shape)})
        check_dtypes(**{"preconditioner(r)": (z, r.dtype)})
        return xp.reshape(z, (*batch, *space))

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
    if any(map(is_recorded, arrays)):
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
    spaces: _Spaces,
    options: Options,
) -> tuple[System, Array | None]:
    xp = array_api_compat.array_namespace(b)
    axes = len(spaces.range)
    on_host = type(b) is np.ndarray
    kept: list[Array] = [None]

    def apply(x: Array) -> Array:
        y = xp.reshape(a.apply(a.params, xp.reshape(x, (*batch, *a.domain_shape))), (*batch, *spaces.range))
        if on_host:
            # freed before the next is made, it would go back to the system page by page: 10 % of a step on 256×256
            kept[0] = y
        return y

    def adjoint(y: Array) -> Array:
        return xp.reshape(a.adjoint(a.params, xp.reshape(y, (*batch, *a.range_shape))), (*batch, *spaces.domain))

    finite = xp.all(xp.isfinite(b), axis=tuple(range(-axes, 0)))
    b = xp.where(with_axes(finite, axes), b, xp.zeros_like(b))
    scale = power_of_two(b, axes)
    b = b / column(scale, b)
    size = norm(b, axes)
    zero = size == 0
    status = xp.zeros(batch, dtype=xp.int32, device=array_api_compat.device(b)) + RUNNING
    status = mark(mark(status, zero & finite, CONVERGED), ~finite, NOT_FINITE)
    norm_b = xp.where(zero, xp.ones_like(size), size)
    if x0 is not None:
        x0 = xp.where(with_axes(zero, axes), xp.zeros_like(x0), x0 / column(scale, x0))
    system = System(
        apply, adjoint, precondition, b, norm_b, scale, status, batch, tuple(a.domain_shape), axes, options
    )  # fmt: skip
    return system, x0
