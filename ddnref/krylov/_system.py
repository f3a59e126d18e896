"""Build a `System` from an operator and right-hand sides, and say how each right-hand side ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, eps, is_recorded, is_true, namespace, namespace_of, with_axes
from ddnref._core.checks import check_dtypes, check_precision, check_shapes
from ddnref._core.loops import LoopOptions, WhileLoop
from ddnref._kernels.vectors import (
    are_surely_set,
    column,
    in_parts,
    keeping_last,
    keeps_shape,
    norm,
    power_of_two,
    steps_between_looks,
)
from ddnref.errors import ConvergenceError
from ddnref.operators import LinearOperator, as_operator
from ddnref.operators._operator import batch_axes, zeros

# Statuses of a right-hand side; `ADVICE` says what each failure means.
RUNNING = -1
CONVERGED = 0
ITERATION_LIMIT = 1
NOT_POSITIVE_DEFINITE = 2
BREAKDOWN = 3
STAGNATION = 4
NOT_FINITE = 5
PRECONDITIONER_NOT_POSITIVE_DEFINITE = 6

SLACK = 1.1  # the recomputed residual may exceed the tolerance by this factor
LEAST_STEPS, MOST_STEPS = 100, 20_000  # bounds of the default iteration limit, see `default_maxiter`

Preconditioner: TypeAlias = LinearOperator | Callable[[Array], Array]


class SolveInfo(NamedTuple):
    """How a solve ended, for each right-hand side."""

    converged: Array
    """(...) bool: whether the recomputed residual is at most 1.1 rtol."""
    n_iter: Array
    """(...) int32: steps taken before it was frozen."""
    residual_norm: Array
    """(...) real: ``‖b − A x‖ / ‖b‖``, computed from the x that is returned; 0 for b = 0, NaN where not finite."""
    status: Array
    """(...) int32: 0 converged, 1 iteration limit, 2 operator not positive definite, 3 breakdown, 4 stagnation,
    5 not finite, 6 preconditioner not positive definite."""


class Progress(NamedTuple):
    """The argument of a callback, which is called whenever the stopping rule is evaluated."""

    step: int
    """Steps so far."""
    residual_norm: Array
    """(...) real: the method's own estimate of ``‖b − A x‖ / ‖b‖``."""


Callback: TypeAlias = Callable[[Progress], object]


class System(NamedTuple):
    """``A x = b`` on vectors ``(*batch, n)``, with each b divided by a power of two so that squares stay in range.

    With `axes` above 1 vectors keep their shape, ``(*batch, *domain_shape)``.
    """

    function: str
    """The name of the method, for messages."""
    apply: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]
    precondition: Callable[[Array], Array] | None
    b: Array
    norm_b: Array
    """``‖b‖``; 1 where b is zero."""
    x0: Array | None
    """The start, divided by `scale`; ``None`` for zero."""
    scale: Array
    """The power of two by which b and x0 were divided."""
    status: Array
    """RUNNING, or the status of right-hand sides that need no step because they are zero or not finite."""
    batch: tuple[int, ...]
    domain_shape: tuple[int, ...]
    axes: int
    options: LoopOptions
    callback: Callback | None = None
    project: Callable[[Array], Array] | None = None
    """See `ddnref.krylov._cg.solve_from_zero`."""


def prepare(
    function: str,
    operator: Array | LinearOperator,
    b: Array,
    *,
    x0: Array | None,
    rtol: float | None,
    maxiter: int | None,
    check_every: int | None,
    while_loop: WhileLoop | None,
    throw: bool,
    callback: Callback | None,
    preconditioner: Preconditioner | None = None,
    self_adjoint: bool = False,
    rectangular: bool = False,
    shaped: bool = False,
) -> System:
    """Validate the arguments of a method and build its `System`.

    `self_adjoint` and `rectangular` say which operators the method takes, `shaped` that its vectors may keep their
    shape.
    """
    # Compute once what does not depend on x, such as the spectrum of a kernel.
    a = as_operator(operator)
    if a is not operator and a.domain_shape == a.range_shape:
        a = a._replace(self_adjoint=True)  # whether a matrix is symmetric is not checked
    a = a.prepared()

    # Validate everything that does not depend on values.
    params = {f"params[{i}]": parameter for i, parameter in enumerate(a.params)}
    xp = namespace(b=b, x0=x0, **params)
    check_precision(xp, b=b, **params)
    check_dtypes(x0=(x0, b.dtype))
    if any(map(is_recorded, (b, *a.params))):
        raise TypeError(
            f"A tensor given to {function} requires grad, so PyTorch would record every step, and the gradient of an "
            "unrolled Krylov method is wrong after a few hundred steps. Differentiate ddnref.linear_solve instead, or "
            "pass detached tensors."
        )
    _check_operator(function, a, self_adjoint, rectangular)
    # A traced loop has no values that a callback could be given.
    if callback is not None and while_loop is not None:
        raise ValueError(f"{function} calls no callback inside while_loop, where no value can be read: pass one only.")

    # √eps is reached up to condition 1/√eps. How often to evaluate the rule depends on what a look costs the library.
    rtol = eps(xp, b.dtype) ** 0.5 if rtol is None else rtol
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}, expected 0 <= rtol < 1: the tolerance is relative to ‖b‖.")
    limit = default_maxiter(math.prod(a.domain_shape)) if maxiter is None else maxiter
    every = steps_between_looks(b) if check_every is None else check_every
    if limit < 0 or every < 1:
        raise ValueError(f"maxiter is {limit} and check_every {every}; expected at least 0 and 1.")
    options = LoopOptions(rtol, limit, every, while_loop, throw)

    # Bring all vectors to the batch axes of the solution, flattened unless the method can use their shape.
    n, k = len(a.range_shape), len(a.domain_shape)
    if b.ndim < n or tuple(b.shape[b.ndim - n :]) != tuple(a.range_shape):
        raise ValueError(
            f"b has shape {tuple(b.shape)}, expected (..., {', '.join(map(str, a.range_shape))}): the operator's "
            "range, with any batch axes in front."
        )
    if x0 is not None and (x0.ndim < k or tuple(x0.shape[x0.ndim - k :]) != tuple(a.domain_shape)):
        raise ValueError(f"x0 has shape {tuple(x0.shape)}, expected (..., *{tuple(a.domain_shape)}).")
    of_operator, image = batch_axes(a, zeros(a.domain_shape, b))
    check_dtypes(**{"operator.apply(params, x)": (image, b.dtype)})
    # Batch axes are those of b, of x0 and of the image of one vector, which the parameters bring in.
    others = [tuple(b.shape[: b.ndim - n])] + ([] if x0 is None else [tuple(x0.shape[: x0.ndim - k])])
    try:
        batch = np.broadcast_shapes(of_operator, *others)
    except ValueError as error:
        names = " and ".join(map(str, others))
        raise ValueError(f"Batch axes do not broadcast: the operator has {of_operator}, b (and x0) {names}.") from error
    shaped = shaped and n > 1 and keeps_shape(b)
    domain, target = (s if shaped else (math.prod(s),) for s in (tuple(a.domain_shape), tuple(a.range_shape)))
    b = xp.reshape(xp.broadcast_to(b, (*batch, *a.range_shape)), (*batch, *target))
    if x0 is not None:
        x0 = xp.reshape(xp.broadcast_to(x0, (*batch, *a.domain_shape)), (*batch, *domain))

    # A product that the whole batch shares may be applied to a few right-hand sides at a time.
    forward, backward = a.apply, a.adjoint
    if of_operator == ():
        forward, backward = in_parts(forward, a.domain_shape, target), in_parts(backward, a.range_shape, domain)
    forward = keeping_last(forward)

    def apply(x: Array) -> Array:
        y = forward(a.params, xp.reshape(x, (*batch, *a.domain_shape)))
        return xp.reshape(y, (*batch, *target))

    def adjoint(y: Array) -> Array:
        x = backward(a.params, xp.reshape(y, (*batch, *a.range_shape)))
        return xp.reshape(x, (*batch, *domain))

    # Scale each right-hand side; settle at once those that are zero or not finite.
    axes = len(target)
    finite = xp.all(xp.isfinite(b), axis=tuple(range(-axes, 0)))
    b = xp.where(with_axes(finite, axes), b, xp.zeros_like(b))
    scale = power_of_two(b, axes)
    b = b / column(scale, b)
    size = norm(b, axes)
    zero = size == 0  # also where b was not finite
    status = xp.zeros(batch, dtype=xp.int32, device=array_api_compat.device(b)) + RUNNING
    status = mark(mark(status, zero & finite, CONVERGED), ~finite, NOT_FINITE)
    # A zero right-hand side has the solution zero, whatever x0 is.
    if x0 is not None:
        x0 = xp.where(with_axes(zero, axes), xp.zeros_like(x0), x0 / column(scale, x0))
    norm_b = xp.where(zero, xp.ones_like(size), size)
    precondition = _precondition(a, preconditioner, batch, target)
    return System(
        function, apply, adjoint, precondition, b, norm_b, x0, scale, status, batch, tuple(a.domain_shape), axes,
        options, callback,
    )  # fmt: skip


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


def default_maxiter(n: int) -> int:
    """Ten times the number of unknowns, at least 100 and at most 20,000.

    Conjugate gradients need at most ``½ √κ ln(2 √κ / rtol)`` steps for a residual of rtol, which is 12,800 for κ = 1e6
    at the default tolerance.
    """
    return max(LEAST_STEPS, min(10 * n, MOST_STEPS))


def _precondition(
    a: LinearOperator, preconditioner: Preconditioner | None, batch: tuple[int, ...], space: tuple[int, ...]
) -> Callable[[Array], Array] | None:
    """The preconditioner on vectors ``(*batch, *space)``, with its results checked."""
    if preconditioner is None:
        return None
    if isinstance(preconditioner, LinearOperator) and tuple(preconditioner.domain_shape) != tuple(a.range_shape):
        raise ValueError(
            f"preconditioner has domain_shape {tuple(preconditioner.domain_shape)}, expected {tuple(a.range_shape)}."
        )
    # The preconditioner sees residuals in the shape of the range, all right-hand sides at once.
    shape = (*batch, *a.range_shape)
    m = preconditioner.prepared() if isinstance(preconditioner, LinearOperator) else preconditioner

    def precondition(r: Array) -> Array:
        xp = namespace_of(r)
        z = m(xp.reshape(r, shape))
        check_shapes(**{"preconditioner(r)": (z, shape)})
        check_dtypes(**{"preconditioner(r)": (z, r.dtype)})
        return xp.reshape(z, (*batch, *space))

    return precondition


# --- statuses ---------------------------------------------------------------------------------------------------


def mark(status: Array, bad: Array, code: int) -> Array:
    """`status` with `code` where `bad`, which may be set for running items only."""
    # The status was RUNNING, so that adding the difference gives the code.
    return status + namespace_of(status).astype(bad, status.dtype) * (code - RUNNING)


def failure(status: Array, go: Array, value: Array, code: int) -> Array:
    """`status` with `code` where `value` is not positive, and NOT_FINITE where it is NaN or infinite."""
    if are_surely_set(((value > 0) & (value < float("inf"))) | ~go):
        return status  # the usual case, in which nothing has failed
    low = go & (value <= 0)
    return mark(mark(status, low, code), go & ~low & ~(value < float("inf")), NOT_FINITE)


def count(go: Array, n_iter: Array) -> Array:
    """One more step for the items that took it."""
    return n_iter + namespace_of(n_iter).astype(go, n_iter.dtype)


ADVICE = {
    ITERATION_LIMIT: (
        "reached the iteration limit of {maxiter}",
        "an ill-conditioned operator. Pass a preconditioner, a larger maxiter= or rtol=",
    ),
    NOT_POSITIVE_DEFINITE: (
        "met a direction with pᴴAp ≤ 0: the operator is not positive definite",
        "an indefinite or singular operator, or one of the wrong sign. Use ddnref.krylov.minres",
    ),
    BREAKDOWN: (
        "broke down: an inner product that it divides by vanished",
        "an operator without a symmetric part. Use ddnref.krylov.gmres, or another x0=",
    ),
    STAGNATION: (
        "stagnated: the recomputed residual does not fall any further",
        "a singular operator, an rtol below what rounding allows (eps times the condition), or a restart length that "
        "is too short. Pass a larger rtol= (or restart=)",
    ),
    NOT_FINITE: (
        "met NaN or infinity in the operator, b, x0 or the preconditioner",
        "a diverged step or a division by zero before this call. Look at these inputs",
    ),
    PRECONDITIONER_NOT_POSITIVE_DEFINITE: (
        "met rᴴMr ≤ 0: the preconditioner is not positive definite",
        "a preconditioner of the wrong sign or one that is not symmetric. Pass one that approximates A⁻¹ and is "
        "symmetric positive definite",
    ),
}
"""The event behind each failure, and its most likely cause."""


def raise_if_failed(function: str, info: Any, options: LoopOptions) -> None:
    """Raise `ConvergenceError` that names every status that occurred; one flag is read if all have converged."""
    xp = array_api_compat.array_namespace(info.status)
    if is_true(xp.all(info.converged)):
        return
    # Name each failure that occurred, with its number of right-hand sides and what to do about it.
    parts = []
    for code, (event, cause) in ADVICE.items():
        number = int(xp.sum(xp.astype(info.status == code, xp.int32)))
        if number:
            parts.append(f"{number} of {math.prod(info.status.shape)} right-hand sides "
                         f"{event.format(maxiter=options.maxiter)}. The most likely cause is {cause}.")  # fmt: skip
    # Right-hand sides that have converged must not hide the size of the failure.
    worst = float(xp.max(xp.where(info.converged, xp.zeros_like(info.residual_norm), info.residual_norm)))
    raise ConvergenceError(
        f"{function} did not converge: {' '.join(parts)} Largest residual ‖b − A x‖/‖b‖ {worst:.1e} (rtol "
        f"{options.rtol:.1e}). Pass throw=False to get the last iterate and info.status."
    )
