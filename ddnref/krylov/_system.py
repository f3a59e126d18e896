"""Build a `System` from an operator and right-hand sides, and say how each right-hand side ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import array_api_compat
import numpy as np

from ddnref._core.arrays import (
    Array,
    Namespace,
    among,
    eps,
    is_complex,
    is_recorded,
    is_true,
    named_arrays,
    namespace,
    namespace_of,
    power_of_two_below,
    real_dtype,
    with_axes,
)
from ddnref._core.checks import check_dtypes, check_precision, check_shapes
from ddnref._core.loops import CHECK_EVERY, LoopOptions, WhileLoop
from ddnref._kernels.vectors import (
    as_complex,
    column,
    in_parts,
    keeping_last,
    keeps_shape,
    norm,
    on_host,
    power_of_two,
    safe_norm,
    without_structure,
)
from ddnref.errors import ConvergenceError
from ddnref.operators import LinearOperator, as_operator
from ddnref.operators._operator import batch_axes, check_ending

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
    error: Array
    """(...) real: estimate of the relative error of the result (of x, or of the gradient). Infinity where none was
    made: `linear_solve` says when it is."""
    condition: Array
    """(...) real: estimate of the condition number of A; infinity where none was made or A is singular."""


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
    xp: Namespace
    eps: float
    """The machine epsilon of the vectors."""
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
    size_a: Array | None
    """The power of two by which products are divided and by which x is larger; ``None`` for 1."""
    status: Array
    """RUNNING, or the status of right-hand sides that need no step because they are zero or not finite."""
    batch: tuple[int, ...]
    domain_shape: tuple[int, ...]
    axes: int
    options: LoopOptions
    on_host: bool
    """Whether a flag can be read without waiting for a device."""
    callback: Callback | None = None
    project: Callable[[Array], Array] | None = None
    """See `ddnref.krylov._cg.solve_from_zero`."""
    metric: Callable[[Array], Array] | None = None
    """The inner product of conjugate gradients, likewise."""
    ritz: bool = False
    """Whether `cg` and `minres` estimate the condition number."""


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
    squares: bool = True,
) -> System:
    """Validate the arguments of a method and build its `System`.

    `self_adjoint` and `rectangular` say which operators the method takes, `shaped` that its vectors may keep their
    shape, `squares` that it squares products with A, so that these must be near 1.
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
    if x0 is not None and real_dtype(xp, x0.dtype) != real_dtype(xp, b.dtype):
        check_dtypes(x0=(x0, b.dtype))
    given = named_arrays(operator=operator, b=b, x0=x0, preconditioner=preconditioner)
    for name in (name for name, array in given.items() if is_recorded(array)):
        raise TypeError(
            f"{name} given to {function} requires grad, so PyTorch would record every step, and the gradient of an "
            "unrolled Krylov method is wrong after a few hundred steps. Differentiate ddnref.linear_solve instead, or "
            f"pass {name}.detach()."
        )
    _check_operator(function, a, self_adjoint, rectangular)
    # A traced loop has no values that a callback could be given.
    if callback is not None and while_loop is not None:
        raise ValueError(f"{function} calls no callback inside while_loop, where no value can be read: pass one only.")

    # √eps is reached up to condition 1/√eps. How often to evaluate the rule depends on what a look costs the library.
    unit = eps(xp, b.dtype)
    rtol = unit**0.5 if rtol is None else rtol
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}, expected 0 <= rtol < 1: the tolerance is relative to ‖b‖.")
    limit = default_maxiter(math.prod(a.domain_shape)) if maxiter is None else maxiter
    every = check_every or (1 if on_host(b) else CHECK_EVERY)
    options = LoopOptions(rtol, limit, every, while_loop, throw)

    # Bring all vectors to the batch axes of the solution, flattened unless the method can use their shape.
    n, k = len(a.range_shape), len(a.domain_shape)
    check_ending("b", b, a.range_shape)
    if x0 is not None:
        check_ending("x0", x0, a.domain_shape)
    trial = without_structure(tuple(a.domain_shape), b)
    of_operator, image = batch_axes(a, trial)
    # Real and complex go together: whatever is complex makes the solution complex.
    if is_complex(image) or (x0 is not None and is_complex(x0)):
        b, x0 = as_complex(b), None if x0 is None else as_complex(x0)
    elif x0 is not None and is_complex(b):
        x0 = as_complex(x0)
    check_precision(xp, **{"b": b, "operator.apply(params, x)": image})
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
    apply = keeping_last(xp, forward, a.params, (*batch, *a.domain_shape), (*batch, *target))
    adjoint = keeping_last(xp, backward, a.params, (*batch, *a.range_shape), (*batch, *domain))

    # Bring the size of A near 1, where its squares would leave the range of exponents. M A has no such size.
    size_a = None
    if squares and preconditioner is None:
        size_a = xp.broadcast_to(_size_of(image, n), batch)
        apply, adjoint = _divided(apply, size_a), _divided(adjoint, size_a)

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
        factor = scale if size_a is None else scale / size_a
        x0 = xp.where(with_axes(zero, axes), xp.zeros_like(x0), x0 / column(factor, x0))
    norm_b = xp.where(zero, xp.ones_like(size), size)
    precondition = _precondition(xp, a, preconditioner, batch, target)
    return System(
        function, xp, unit, apply, adjoint, precondition, b, norm_b, x0, scale, size_a, status, batch,
        tuple(a.domain_shape), axes, options, on_host(b), callback,
    )  # fmt: skip


def _size_of(image: Array, axes: int) -> Array:
    """A power of two near the size of A, from its image of `without_structure`: the root mean square of the entries."""
    xp, shape = namespace_of(image), tuple(image.shape)
    batch = shape[: len(shape) - axes]
    flat = xp.reshape(image, (*batch, math.prod(shape[len(batch) :])))
    size = safe_norm(flat) / max(flat.shape[-1], 1) ** 0.5
    return power_of_two_below(xp.where(size < float("inf"), size, xp.ones_like(size)))


def _divided(product: Callable[[Array], Array], size: Array) -> Callable[[Array], Array]:
    """Products with A divided by its size, exactly."""

    def divided(x: Array) -> Array:
        y = product(x)
        return y / column(size, y)

    return divided


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
    xp: Namespace, a: LinearOperator, m: Preconditioner | None, batch: tuple[int, ...], space: tuple[int, ...]
) -> Callable[[Array], Array] | None:
    """The preconditioner on vectors ``(*batch, *space)``, with its results checked."""
    if m is None:
        return None
    if isinstance(m, LinearOperator) and tuple(m.domain_shape) != tuple(a.range_shape):
        raise ValueError(f"preconditioner has domain_shape {tuple(m.domain_shape)}, expected {tuple(a.range_shape)}.")
    # The preconditioner sees residuals in the shape of the range, all right-hand sides at once.
    shape = (*batch, *a.range_shape)
    product = m.prepared() if isinstance(m, LinearOperator) else m

    def precondition(r: Array) -> Array:
        z = product(xp.reshape(r, shape))
        check_shapes(**{"preconditioner(r)": (z, shape)})
        check_dtypes(**{"preconditioner(r)": (z, r.dtype)})
        return xp.reshape(z, (*batch, *space))

    return precondition


# --- statuses ---------------------------------------------------------------------------------------------------


def mark(status: Array, bad: Array, code: int) -> Array:
    """`status` with `code` where `bad`, which may be set for running items only."""
    # The status was RUNNING, so that adding the difference gives the code.
    return status + namespace_of(status).astype(bad, status.dtype) * (code - RUNNING)


def failure(system: System, status: Array, go: Array, value: Array, code: int) -> Array:
    """`status` with `code` where `value` is not positive, and NOT_FINITE where it is NaN or infinite.

    Conjugate gradients with a Laplacian of 32×32 points take 1.18 times as long without the shortcut.
    """
    right = ((value > 0) & (value < float("inf"))) | ~go
    if system.on_host and right.all():
        return status  # the usual case, in which nothing has failed
    low = go & (value <= 0)
    return mark(mark(status, low, code), go & ~low & ~(value < float("inf")), NOT_FINITE)


def active(system: System, size: Array, status: Array, n_iter: Array) -> Array:
    """Whether an item takes a further step: it neither converged nor failed, and may."""
    return (size > system.options.rtol) & (status == RUNNING) & (n_iter < system.options.maxiter)


def counted(system: System, go: Array, size: Array, status: Array, n_iter: Array) -> tuple[Array, Array]:
    """The new count, after the step of the items in `go`, and the flags of the items that are still active."""
    n_iter = n_iter + system.xp.astype(go, n_iter.dtype)
    return n_iter, active(system, size, status, n_iter)


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
                         f"{event.format(maxiter=options.maxiter)}{among(info.status == code)}. "
                         f"The most likely cause is {cause}.")  # fmt: skip
    # Right-hand sides that have converged must not hide the size of the failure. LSMR is judged by its error.
    judged, name = info.residual_norm, "residual ‖b − A x‖/‖b‖"
    if hasattr(info, "normal_residual_norm"):
        judged, name = info.error, "estimated relative error of x"
    worst = float(xp.max(xp.where(info.converged, xp.zeros_like(judged), judged)))
    raise ConvergenceError(
        f"{function} did not converge: {' '.join(parts)} Largest {name} {worst:.1e} (rtol "
        f"{options.rtol:.1e}). Pass throw=False to get the last iterate and info.status."
    )
