"""LSMR (Fong and Saunders 2011): least squares, by MINRES on the normal equations without forming them.

Golub–Kahan bidiagonalisation, ``β_{k+1} u_{k+1} = A v_k − α_k u_k`` and ``α_{k+1} v_{k+1} = Aᴴ u_{k+1} − β_{k+1} v_k``,
turns the problem into a bidiagonal one, and two sequences of rotations solve that. The letters are those of the paper,
section 2.8, with accents written out: ``rhobar`` is ρ̄, ``betadd`` β̈.

The first sequence makes an upper bidiagonal R with the diagonal ρ and θ above it. Its singular values approach those of
A from the inside, and the smallest one, σ, turns residuals into a bound of the error of x:

    ‖x − A⁺b‖ <= min( ‖Aᴴr‖ / σ², ‖r‖ / σ )

σ is read off a grid of shifts without storing R, see `ddnref.krylov._pivots`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, full, namespace_of, nan_where, own
from ddnref._core.loops import WhileLoop, run
from ddnref._kernels.public import public
from ddnref._kernels.singularity import SINGULAR
from ddnref._kernels.vectors import axpy, column, norm, quotient
from ddnref.krylov._pivots import grid, next_pivot
from ddnref.krylov._rounds import FALL, decided, iterator, solution
from ddnref.krylov._system import (
    CONVERGED,
    NOT_FINITE,
    RUNNING,
    SLACK,
    Callback,
    Preconditioner,
    System,
    mark,
    prepare,
    raise_if_failed,
)
from ddnref.operators import LinearOperator, as_operator, compose
from ddnref.operators._operator import Params, Structure, check_vector, motions_of, shared

HEADROOM = 2**12
"""How far above the size of A, as `System.size_a` measures it, the grid of shifts begins."""


class LeastSquaresInfo(NamedTuple):
    """How a least-squares solve ended, for each right-hand side."""

    converged: Array
    """(...) bool: whether `error` is at most 1.1 rtol."""
    n_iter: Array
    """(...) int32: steps taken before it was frozen."""
    residual_norm: Array
    """(...) real: ``‖b − A x‖ / ‖b‖``, computed from the x that is returned; large where b is not in the range of A."""
    status: Array
    """(...) int32, with the codes of `SolveInfo`."""
    normal_residual_norm: Array
    """(...) real: ``‖Aᴴ(b − A x)‖ / ‖Aᴴ b‖``, computed from the x that is returned."""
    error: Array
    """(...) real: bound of the relative error of x, from the residuals and the smallest singular value that was met."""
    condition: Array
    """(...) real: ratio of the largest and the smallest singular value that were met."""


class _Round(NamedTuple):
    """The state between two rounds, judged by residuals that were computed afresh."""

    x: Array
    r: Array
    size: Array
    """``‖r‖ / ‖b‖``."""
    normal: Array
    """``‖Aᴴ r‖ / ‖Aᴴ b‖``."""
    error: Array
    least: Array
    """The smallest singular value that was met; infinity before the first step."""
    largest: Array
    status: Array
    n_iter: Array


class _State(NamedTuple):
    x: Array
    u: Array
    v: Array
    h: Array
    hbar: Array
    alpha: Array
    alphabar: Array
    rho: Array
    rhobar: Array
    cbar: Array
    sbar: Array
    zeta: Array
    zetabar: Array
    """``±‖Aᴴ r‖``."""
    betadd: Array
    betad: Array
    rhod: Array
    tautilde: Array
    thetatilde: Array
    theta: Array
    """The entry of R above the next ρ."""
    shifts: Array
    """Squares of singular values that fall by √2, from HEADROOM to below those that count as zero."""
    slack: Array
    """``(d − ρ²) / d`` of the last pivot d, for each shift."""
    below: Array
    """The number of singular values below each shift."""
    least: Array
    largest: Array
    size: Array
    """``‖r‖ / ‖b‖``, by recurrence."""
    status: Array
    n_iter: Array
    active: Array


@public
def lsmr(
    operator: Array | LinearOperator,
    b: Array,
    /,
    *,
    x0: Array | None = None,
    damping: float = 0.0,
    preconditioner: Preconditioner | None = None,
    preconditioner_adjoint: Callable[[Array], Array] | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int | None = None,
    callback: Callback | None = None,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, LeastSquaresInfo]:
    r"""Minimise ``‖b − A x‖² + λ ‖x‖²``, by LSMR.

    Parameters
    ----------
    operator : LinearOperator or (..., n, m) array, real or complex floating
        Of any shape. Its `adjoint` is used as well.
    b, x0, maxiter, check_every, callback, throw, while_loop
        As in `cg`.
    damping : float, default 0
        The weight λ. With ``λ > 0`` the solution is unique whatever the rank of A.
    preconditioner : LinearOperator or callable, optional
        ``z -> N z`` from the domain of A to itself, regular, for a tall or square A of full rank. The iteration runs
        with A N, whose condition should be near 1; ``x = N z``. Refused for a wide A, whose shortest solution it would
        change, and together with `x0`.
    preconditioner_adjoint : callable, optional
        ``y -> Nᴴ y``, needed where `preconditioner` is a function.
    rtol : float, optional
        For each right-hand side, the relative error of x that is asked for; default ``√eps``, 1.5e-8 in double and
        3.5e-4 in single precision. Rounding allows about ``eps (κ + κ² ‖r‖ / (‖A‖ ‖x‖))``.

    Returns
    -------
    x : (..., \*domain_shape) array
        Where A does not determine x, the solution of smallest norm if ``x0=None``.
    info : LeastSquaresInfo

    Raises
    ------
    ConvergenceError
        The error of x is not known to be below `rtol`: iteration limit, stagnation where rounding allows no less, NaN
        or infinity.
    TypeError, ValueError
        As `cg`, and where a preconditioner cannot be used.

    Notes
    -----
    With r = b − A x and σ the smallest singular value that the bidiagonalisation has met,

    .. math:: \mathrm{error} = \min\Bigl(\frac{\|A^H r\|}{\sigma^2}, \frac{\|r\|}{\sigma}\Bigr) \frac{1}{\|x\|}
        + \epsilon \Bigl(\kappa + \kappa^2 \frac{\|r\|}{\|A\| \|x\|}\Bigr)

    The first part is a bound as soon as σ is that of A, the second part allows for rounding. A small singular value is
    met only after its part of b stands out of the residual. So the iteration goes on until the first part is below
    ``√eps rtol``, or below the second. A singular value whose part of b is smaller still remains unseen, and no
    estimate shows it: where A is stored, ``linear_solve(..., solver="direct")`` is safe. Singular values below
    ``16 eps ‖A‖`` count as zero. With a preconditioner all this holds for A N and z.

    The products are divided by a power of two near the size of A, so that no scale of A or b is out of range. Cost of a
    step: one product with A, one with Aᴴ, ``3 n + 12 m`` flops. Memory: two vectors of n numbers, four of m numbers.

    References
    ----------
    .. [1] D. C.-L. Fong and M. A. Saunders, "LSMR: an iterative algorithm for sparse least-squares problems", SIAM J.
       Sci. Comput. 33 (2011), section 2.8.
    .. [2] B. N. Parlett and I. S. Dhillon, "Relatively robust representations of symmetric tridiagonals", Linear
       Algebra Appl. 309 (2000), section 4: pivots of a shifted matrix, which show σ.

    Examples
    --------
    >>> import numpy as np
    >>> x, info = ddnref.krylov.lsmr(np.asarray([[1.0], [1.0]]), np.asarray([1.0, 3.0]))
    >>> np.round(x, 12), bool(info.converged)
    (array([2.]), True)
    """
    a, damping = as_operator(operator), checked_damping(damping)
    right = right_preconditioner(a, preconditioner, preconditioner_adjoint, x0, damping)
    if damping:
        check_vector("b", b, tuple(a.range_shape), ())
        a, b = damped(a, damping), with_zeros(a, b)
    system = prepare(
        "lsmr", a if right is None else compose(a, right), b, x0=x0, callback=callback, rtol=rtol, maxiter=maxiter,
        check_every=check_every, while_loop=while_loop, throw=throw, rectangular=True,
    )  # fmt: skip
    # The size to which ‖Aᴴ r‖ is relative; 1 where Aᴴ b = 0, so that x = 0 is a solution
    norm_ab = norm(system.adjoint(system.b))
    norm_ab = system.xp.where(norm_ab > 0, norm_ab, system.xp.ones_like(norm_ab))
    last = _rounds(system, norm_ab)
    x = solution(system, last.x, last.status)
    bad = last.status == NOT_FINITE
    condition = quotient(last.largest, last.least, (last.least > 0) & (last.largest > 0))
    condition = system.xp.where(condition > 0, condition, full((), float("inf"), condition))
    info = LeastSquaresInfo(
        last.status == CONVERGED, last.n_iter, nan_where(bad, last.size), last.status, nan_where(bad, last.normal),
        nan_where(bad, last.error), nan_where(bad, condition),
    )  # fmt: skip
    if throw:
        raise_if_failed("lsmr", info, system.options)
    return x if right is None else right.apply(right.params, x), info


# --- damping and preconditioners as operators ---------------------------------------------------------------------


def damped(a: LinearOperator, damping: float) -> LinearOperator:
    """The operator ``[A; √λ I]`` of damped least squares, with flat vectors ``(..., n + m)`` as its range."""
    of = shared(_Damped, a._replace(params=()), damping)
    return LinearOperator(
        a.params, of.apply, of.adjoint, of.params_vjp, a.domain_shape, (math.prod(a.range_shape) + a.size,),
        prepare=of.prepare, **motions_of(of, a),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Damped(Structure):
    a: LinearOperator
    damping: float

    def upper(self, y: Array) -> Array:
        rows = y[..., : math.prod(self.a.range_shape)]
        return namespace_of(y).reshape(rows, (*y.shape[:-1], *self.a.range_shape))

    def lower(self, y: Array) -> Array:
        rows = y[..., math.prod(self.a.range_shape) :]
        return namespace_of(y).reshape(rows, (*y.shape[:-1], *self.a.domain_shape))

    def joined(self, y: Array, x: Array) -> Array:
        xp, a = namespace_of(y), self.a
        lead = tuple(y.shape[: y.ndim - len(a.range_shape)])
        x = xp.astype(xp.broadcast_to(x, (*lead, *a.domain_shape)), y.dtype)
        flat = xp.reshape(y, (*lead, math.prod(a.range_shape))), xp.reshape(x, (*lead, a.size))
        return xp.concat(flat, axis=-1)

    def apply(self, params: Params, x: Array) -> Array:
        return self.joined(self.a.apply(params, x), math.sqrt(self.damping) * x)

    def adjoint(self, params: Params, y: Array) -> Array:
        return self.a.adjoint(params, self.upper(y)) + math.sqrt(self.damping) * self.lower(y)

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        return self.a.params_vjp(params, self.upper(y_bar), x)

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:
        moved = self.a.params_jvp(params, params_dot, x)  # type: ignore[misc]
        return self.joined(moved, namespace_of(x).zeros_like(x))

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:
        return self.a.adjoint_jvp(params, params_dot, self.upper(y))  # type: ignore[misc]

    def prepare(self, params: Params) -> LinearOperator:
        return damped(self.a._replace(params=params).prepared(), self.damping)


def checked_damping(damping: Any) -> float:
    """The weight of damping as a Python number, or an error that names it."""
    if not isinstance(damping, Real):
        raise TypeError(f"damping is {damping!r}, expected a number.")
    number = float(damping)
    if not 0 <= number < float("inf"):
        raise ValueError(f"damping is {damping}, expected a finite number that is at least 0.")
    return number


def with_zeros(a: LinearOperator, b: Array) -> Array:
    """The right-hand side ``[b; 0]`` of damped least squares."""
    xp = namespace_of(b)
    lead = tuple(b.shape[: b.ndim - len(a.range_shape)])
    return xp.concat([xp.reshape(b, (*lead, math.prod(a.range_shape))), full((*lead, a.size), 0.0, b)], axis=-1)


def right_preconditioner(
    a: LinearOperator,
    n: Preconditioner | None,
    n_adjoint: Callable[[Array], Array] | None,
    x0: Array | None,
    damping: float,
) -> LinearOperator | None:
    """The preconditioner N as an operator, after a check that it may be used."""
    if n is None:
        return None
    if math.prod(a.range_shape) < a.size and not damping:
        raise ValueError(
            "preconditioner is given, but the operator is wide: with A N the solution of smallest norm would be "
            "another one. Leave it out, or pass damping=."
        )
    if x0 is not None:
        raise ValueError("x0 and preconditioner are both given: LSMR starts from zero where it solves for z, x = N z.")
    if isinstance(n, LinearOperator):
        if tuple(n.domain_shape) != tuple(a.domain_shape) or tuple(n.range_shape) != tuple(a.domain_shape):
            raise ValueError(
                f"preconditioner maps {tuple(n.domain_shape)} to {tuple(n.range_shape)}, expected "
                f"{tuple(a.domain_shape)} to itself: LSMR takes it from the right, x = N z."
            )
        return n
    if n_adjoint is None:
        raise TypeError(
            "preconditioner is a function, and LSMR needs its adjoint too: pass preconditioner_adjoint=, or a "
            "LinearOperator."
        )
    return LinearOperator(
        (), lambda _, z: n(z), lambda _, y: n_adjoint(y), lambda *_: (), a.domain_shape, a.domain_shape
    )  # fmt: skip


# --- the iteration --------------------------------------------------------------------------------------------------


def _rounds(system: System, norm_ab: Array) -> _Round:
    """Repeat LSMR until the error of every x, from residuals computed afresh, meets the tolerance or cannot fall."""
    xp, iterate, rtol = system.xp, iterator(system), system.options.rtol

    def residuals(r: Array) -> tuple[Array, Array]:
        return norm(r) / system.norm_b, norm(system.adjoint(r)) / norm_ab

    def body(last: _Round) -> _Round:
        state = iterate(partial(_step, system), _first(system, last))
        r = system.b - system.apply(state.x)
        size, normal = residuals(r)
        # The residuals of the recurrence count, unless the true ones exceed them by more than rounding.
        norm_x, norm_r = norm(state.x), size * system.norm_b
        noise = 8 * system.eps * (state.largest * norm_x + norm_r + system.norm_b)
        norm_ar = xp.maximum(xp.abs(state.zetabar), normal * norm_ab - state.largest * noise)
        norm_r = xp.maximum(state.size * system.norm_b, norm_r - noise)
        bound, rounding, _ = _bounds(system, norm_x, norm_r, norm_ar, state)
        error = xp.where(last.status == RUNNING, bound + rounding, last.error)
        helps = (size <= FALL * last.size) | (normal <= FALL * last.normal)
        finite = (size < float("inf")) & (normal < float("inf"))
        status = decided(system, last.status, state.n_iter, error <= SLACK * rtol, finite, helps)
        return _Round(state.x, r, size, normal, error, state.least, state.largest, status, state.n_iter)

    # From zero no product is needed.
    if system.x0 is None:
        x, r = full((*system.batch, math.prod(system.domain_shape)), 0.0, system.b), own(system.b)
    else:
        x, r = own(system.x0), system.b - system.apply(system.x0)
    size, normal = residuals(r)
    # Nothing is known of the singular values yet. So a start counts only if its residuals are zero up to rounding.
    zero = xp.minimum(size, normal) <= min(rtol, 64 * system.eps)
    unknown = xp.zeros_like(size) + float("inf")
    error = xp.where((normal == 0) & (system.status != NOT_FINITE), xp.zeros_like(size), unknown)
    status = mark(system.status, (system.status == RUNNING) & zero, CONVERGED)
    status = mark(status, (status == RUNNING) & ~((size < float("inf")) & (normal < float("inf"))), NOT_FINITE)
    first = _Round(x, r, size, normal, error, unknown, xp.zeros_like(size), status, xp.zeros_like(status))
    return run(
        lambda state: state.status == RUNNING, body, first, maxiter=system.options.maxiter + 1, check_every=1,
        while_loop=system.options.while_loop,
    )  # fmt: skip


def _first(system: System, start: _Round) -> _State:
    """``β u = r``, ``α v = Aᴴ u`` and the other letters before the first step."""
    xp = system.xp
    u, beta = _unit(start.r)
    v, alpha = _unit(system.adjoint(u))
    # Both sequences of rotations start with the identity.
    zero, one = xp.zeros_like(beta), xp.ones_like(beta)
    shifts = grid(xp, HEADROOM**2, (SINGULAR * system.eps) ** 2 / 2, 2.0, beta)
    zeros = zero[..., None] + 0 * shifts
    return _State(
        x=start.x, u=u, v=v, h=v, hbar=xp.zeros_like(v), alpha=alpha, alphabar=alpha, rho=one, rhobar=one, cbar=one,
        sbar=zero, zeta=zero, zetabar=alpha * beta, betadd=beta, betad=zero, rhod=one, tautilde=zero, thetatilde=zero,
        theta=zero, shifts=shifts, slack=zeros, below=zeros, least=start.least, largest=start.largest, size=start.size,
        status=start.status, n_iter=start.n_iter,
        active=(start.status == RUNNING) & (alpha * beta != 0) & (start.n_iter < system.options.maxiter),
    )  # fmt: skip


def _step(system: System, state: _State) -> _State:
    """The next u and v, two rotations, one step along h̄, and the estimates of both residuals and of the error."""
    xp = system.xp
    # Bidiagonalise: ``β u ← A v − α u``, ``α v ← Aᴴ u − β v``.
    u, beta = _unit(system.apply(state.v) - column(state.alpha, state.u) * state.u)
    v, alpha = _unit(system.adjoint(u) - column(beta, state.v) * state.v)

    # Rotate the bidiagonal matrix to an upper one, R, and Rᵀ to R̄.
    c, s, rho = _rotation(state.alphabar, beta)
    thetanew, alphabar = s * alpha, c * alpha
    thetabar = state.sbar * rho
    cbar, sbar, rhobar = _rotation(state.cbar * rho, thetanew)
    zeta, zetabar = cbar * state.zetabar, -sbar * state.zetabar

    # Step along h̄, except where a number that it divides by is zero, infinite or NaN.
    finite = (rho < float("inf")) & (rhobar < float("inf"))
    status = mark(state.status, state.active & ~finite, NOT_FINITE)
    go = state.active & finite & (rho > 0) & (rhobar > 0)
    # h̄ ← h − (θ̄ ρ / ρ_old ρ̄_old) h̄,  x ← x + (ζ / ρ ρ̄) h̄,  h ← v − (θ / ρ) h
    hbar = state.h - column(quotient(thetabar * rho, state.rho * state.rhobar, go), v) * state.hbar
    x = axpy(state.x, go, quotient(zeta, rho * rhobar, go), hbar)
    h = v - column(quotient(thetanew, rho, go), v) * state.h

    # Estimate ‖r‖ by a third sequence of rotations; ‖Aᴴ r‖ is the last entry of the rotated right-hand side.
    betahat, betadd = c * state.betadd, -s * state.betadd
    # ρ̃ rotates the lower bidiagonal matrix R̄ᵀ to an upper one.
    ctilde, stilde, rhotilde = _rotation(state.rhod, thetabar)
    thetatilde, rhod = stilde * rhobar, ctilde * rhobar
    betad = -stilde * state.betad + ctilde * betahat
    # τ solves the triangular system that the estimate needs.
    tautilde = quotient(state.zeta - state.thetatilde * state.tautilde, rhotilde, rhotilde > 0)
    taud = quotient(zeta - thetatilde * tautilde, rhod, rhod != 0)
    length = ((betad - taud) ** 2 + betadd * betadd) ** 0.5

    # One more column of R: its pivots, and from their signs the smallest singular value.
    new = state._replace(theta=thetanew, n_iter=state.n_iter + xp.astype(go, state.n_iter.dtype))
    new = _with_column(xp, system.eps, new, go, state.theta, rho)
    zetabar = xp.where(go, zetabar, state.zetabar)
    bound, rounding, settled = _bounds(system, norm(x), length, xp.abs(zetabar), new)
    # Beyond the tolerance, so that a small singular value stands out: see the notes of `lsmr`.
    enough = (bound <= system.eps**0.5 * system.options.rtol) | (bound <= rounding) | settled
    return new._replace(
        x=x, u=u, v=v, h=h, hbar=hbar, alpha=alpha, alphabar=alphabar, rho=rho, rhobar=rhobar, cbar=cbar, sbar=sbar,
        zeta=zeta, zetabar=zetabar, betadd=betadd, betad=betad, rhod=rhod, tautilde=tautilde, thetatilde=thetatilde,
        size=xp.where(go, length / system.norm_b, state.size), status=status,
        active=go & ~enough & (new.n_iter < system.options.maxiter),
    )  # fmt: skip


def _with_column(xp: Any, unit: float, state: _State, go: Array, theta: Array, rho: Array) -> _State:
    """Update pivots, counts and extreme singular values for the column ``(θ, ρ)`` of R, where `go` is set."""
    shifts = state.shifts
    slack, negative = next_pivot(xp, unit, shifts, state.slack, rho * rho, theta * theta)
    below = state.below + xp.astype(negative, rho.dtype)
    largest = xp.maximum(state.largest, (rho * rho + theta * theta) ** 0.5)
    # Singular values that count as zero are left out; the next one is above every shift with no more below it.
    zero = shifts <= ((SINGULAR * unit) * largest[..., None]) ** 2
    none = xp.max(xp.where(zero, below, xp.zeros_like(below)), axis=-1)
    free = ~zero & (below <= none[..., None])
    least = xp.max(xp.where(free, shifts, xp.zeros_like(slack)), axis=-1) ** 0.5 * 2**0.25  # the middle of the gap
    least = xp.minimum(xp.maximum(least, SINGULAR * unit * largest), state.least)
    return state._replace(
        slack=xp.where(go[..., None], slack, state.slack), below=xp.where(go[..., None], below, state.below),
        largest=xp.where(go, largest, state.largest), least=xp.where(go, least, state.least),
    )  # fmt: skip


def _bounds(system: System, norm_x: Array, norm_r: Array, norm_ar: Array, state: _State) -> tuple[Array, Array, Array]:
    """The bound of the relative error of x, the part of rounding, and whether the residuals are only rounding."""
    xp, least, largest = system.xp, state.least, state.largest
    known = (least < float("inf")) & (least > 0)
    sigma = xp.where(known, least, xp.ones_like(least))
    absolute = xp.minimum(norm_ar / (sigma * sigma), norm_r / sigma)
    rounding = system.eps * (largest / sigma) * (norm_x + 0.25 * norm_r / sigma)
    inf = xp.zeros_like(norm_x) + float("inf")

    def relative(e: Array) -> Array:
        return xp.where(known & (norm_x > 0), quotient(e, norm_x, norm_x > 0), xp.where(e == 0, e, inf))

    unit = 4 * system.eps * largest
    settled = (norm_ar <= unit * norm_r) | (norm_r <= unit * norm_x)
    return relative(absolute), relative(rounding), settled


def _unit(u: Array) -> tuple[Array, Array]:
    """A vector divided by its length, or zero, and the length."""
    size = norm(u)
    return u * column(quotient(namespace_of(size).ones_like(size), size, size > 0), u), size


def _rotation(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """``c, s, r`` with ``c a + s b = r`` and ``c b = s a``; c = 1 where both vanish."""
    xp = namespace_of(a)
    r = (a * a + b * b) ** 0.5
    positive = r > 0  # else c = 1, s = 0
    return xp.where(positive, quotient(a, r, positive), xp.ones_like(a)), quotient(b, r, positive), r
