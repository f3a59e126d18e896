"""What a refined solve knows of its solutions, and how it says so."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from ddnref._core.arrays import Array, full, is_true
from ddnref.curvature.hessian._dense_blocks import space
from ddnref.curvature.hessian._expansion import Blocks
from ddnref.errors import ConvergenceError, SingularError

SINGULAR = 2**-5
"""Times 1/eps: the amplification from which a system counts as singular to working precision."""


class HessianSolveInfo(NamedTuple):
    """How a solve ended; arrays have one entry for each right-hand side."""

    converged: Array
    """(...) bool: the backward error is within `HessianFactor.rtol`, the system not singular to working precision."""
    n_iter: Array
    """(...) int32: refinement steps taken."""
    residual_norm: Array
    """(...): ``‖b − (H + εI) x‖ / ‖b‖``, from an exact product."""
    backward_error: Array
    """(...): ``‖b − (H + εI) x‖ / (‖H‖ ‖x‖ + ‖b‖)``, with a lower estimate of ‖H‖ from a few products."""
    amplification: Array
    """(...): ``(‖H‖ + |ε|) ‖x‖ / ‖b‖``, a lower bound of the condition number."""
    path: str
    """The factorisation that gave the solution."""


class Result(NamedTuple):
    """A solution on the way to being good enough."""

    x: Blocks
    r: Blocks
    """``b − (H + εI) x``."""
    sizes: tuple[Array, Array, Array]
    """``‖x‖``, ``‖r‖``, ``‖b‖``."""
    error: Array
    """Backward error."""
    steps: Array
    name: str
    """Of the path."""


def chosen(first: Array, a: Result, b: Result) -> Result:
    """`a` for the right-hand sides in `first`, `b` for the others."""
    xp = space(first)
    flags = first[:, None, None]
    x, r = ([xp.where(flags, p, q) for p, q in zip(u, v, strict=True)] for u, v in ((a.x, b.x), (a.r, b.r)))
    size_x, size_r, size_g = (xp.where(first, p, q) for p, q in zip(a.sizes, b.sizes, strict=True))
    error, steps = xp.where(first, a.error, b.error), xp.where(first, a.steps, b.steps)
    return Result(x, r, (size_x, size_r, size_g), error, steps, a.name)


def better_of(old: Result, new: Result) -> Result:
    """For each right-hand side the one with the smaller backward error; of the new path if that is any."""
    better = new.error < old.error
    name = new.name if is_true(space(better).any(better)) else old.name
    return chosen(better, new, old)._replace(name=name)


def precision(like: Array) -> float:
    """Machine epsilon of what was computed in."""
    return 2.0**-23 if like.dtype == space(like).float32 else 2.0**-52


def goal(like: Array) -> float:
    """Backward error at which refinement stops."""
    return 4 * precision(like)


def raise_failed(info: HessianSolveInfo, rtol: float) -> NoReturn:
    """Say which of the two ways of not converging it was."""
    xp = space(info.converged)
    if is_true(xp.any(info.amplification >= SINGULAR / precision(info.amplification))):
        raise SingularError(
            "H + damping·I is singular to working precision: its inverse amplifies this right-hand side by "
            f"{float(xp.max(info.amplification)):.1e}. Likely damping is minus an eigenvalue of the Hessian, or zero "
            'where weights do not matter, or a method other than "auto" and "qr" met a singular pivot. Pass another '
            'damping or method="auto", or throw=False to get the solution with its info.amplification.'
        )
    raise ConvergenceError(
        f"The solution by {info.path} has backward error {float(xp.max(info.backward_error)):.1e}, above "
        f"{rtol:.1e}, after {int(xp.max(info.n_iter))} refinement steps. Likely NaN in weights "
        'or data, activations that explode with depth, or a method that cannot take this damping. Pass method="auto" '
        'or "qr", a larger damping, or throw=False to get the solution with its info.backward_error.'
    )


def described(result: Result, size: Array, rtol: float) -> HessianSolveInfo:
    """For the user; `size` is that of ``H + εI``, `rtol` the largest backward error that counts as converged."""
    xp = space(result.error)
    size_x, size_r, size_g = result.sizes
    safe = xp.where(size_g > 0, size_g, xp.ones_like(size_g))
    amplification = size * size_x / safe
    amplification = xp.where(xp.isfinite(amplification), amplification, full((), float("inf"), safe))
    good = (result.error <= rtol) & (amplification < SINGULAR / precision(amplification))
    return HessianSolveInfo(good, result.steps, size_r / safe, result.error, amplification, result.name)
