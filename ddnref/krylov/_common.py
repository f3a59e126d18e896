"""What all Krylov solvers share: statuses, what a system is, what comes back, and what is said when it fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, is_true, namespace_of
from ddnref._core.loops import WhileLoop
from ddnref._kernels.vectors import NUMPY
from ddnref.errors import ConvergenceError
from ddnref.operators import LinearOperator

RUNNING = -1
CONVERGED = 0
ITERATION_LIMIT = 1
NOT_POSITIVE_DEFINITE = 2
BREAKDOWN = 3
STAGNATION = 4
NOT_FINITE = 5
PRECONDITIONER_NOT_POSITIVE_DEFINITE = 6

SLACK = 1.1  # the recomputed residual may exceed the tolerance by this

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
    """What a callback is given whenever the stopping rule is looked at."""

    step: int
    """Steps so far."""
    residual_norm: Array
    """(...) real: the method's own estimate of ``‖b − A x‖ / ‖b‖``."""


Callback: TypeAlias = Callable[[Progress], object]


class Options(NamedTuple):
    """How far and how to iterate."""

    rtol: float
    maxiter: int
    check_every: int
    callback: Callback | None
    while_loop: WhileLoop | None


class System(NamedTuple):
    """``A x = b`` on vectors ``(*batch, n)``, each b over a power of two so that squares stay in range.

    With `axes` above 1 vectors keep their shape, ``(*batch, *domain_shape)``.
    """

    apply: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]
    precondition: Callable[[Array], Array] | None
    b: Array
    norm_b: Array
    """``‖b‖``; 1 where b is zero."""
    scale: Array
    status: Array
    """RUNNING, or what is known without a step: zero and non-finite right-hand sides."""
    batch: tuple[int, ...]
    domain_shape: tuple[int, ...]
    axes: int
    options: Options


def mark(status: Array, bad: Array, code: int) -> Array:
    """`status` with `code` where `bad`, which may be set for running items only."""
    return status + namespace_of(status).astype(bad, status.dtype) * (code - RUNNING)


def failure(status: Array, go: Array, value: Array, code: int) -> Array:
    """Mark what should have been positive and finite: `code` where it is ≤ 0, NOT_FINITE for NaN and infinity."""
    on_host = isinstance(value, NUMPY)
    if on_host and (((value > 0) & (value < float("inf"))) | ~go).all():
        return status  # the rule, and nothing is lost by looking: ten calls fewer
    low = go & (value <= 0)
    return mark(mark(status, low, code), go & ~low & ~(value < float("inf")), NOT_FINITE)


def count(go: Array, n_iter: Array) -> Array:
    """One more step for the items that took it."""
    if isinstance(n_iter, NUMPY):
        return n_iter + go
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


def raise_if_failed(function: str, info: Any, options: Options) -> None:
    """Raise `ConvergenceError` that names every status that occurred; one flag is read where all is well."""
    xp = array_api_compat.array_namespace(info.status)
    if is_true(xp.all(info.converged)):
        return
    parts = []
    for code, (what, why) in ADVICE.items():
        number = int(xp.sum(xp.astype(info.status == code, xp.int32)))
        if number:
            parts.append(f"{number} of {math.prod(info.status.shape)} right-hand sides "
                         f"{what.format(maxiter=options.maxiter)}. Likely {why}.")  # fmt: skip
    worst = float(xp.max(xp.where(info.converged, xp.zeros_like(info.residual_norm), info.residual_norm)))
    raise ConvergenceError(
        f"{function} did not converge: {' '.join(parts)} Largest residual ‖b − A x‖/‖b‖ {worst:.1e} (rtol "
        f"{options.rtol:.1e}). Pass throw=False to get what there is and info.status."
    )
