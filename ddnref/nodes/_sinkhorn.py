r"""Entropic optimal transport: scaling, a Newton finish on the plan, and derivatives from the plan alone.

    P = argmin ⟨C, P⟩ + ε Σ P (log P − 1)   subject to   P 1 = p,  Pᵀ 1 = q,        P_ij = exp(φ_i + γ_j − C_ij / ε)

With ``T = P̄ ∘ P`` and the symmetric system

    [ diag(P1)     P     ] [ α ]   [ T 1  ]        C̄ = P ∘ (α 1ᵀ + 1 βᵀ − P̄) / ε,   p̄ = α,   q̄ = β,
    [   Pᵀ     diag(Pᵀ1) ] [ β ] = [ Tᵀ 1 ]        ε̄ = −⟨C̄, C⟩ / ε = ⟨C̄, log P⟩

whose null vector (1, −1) shifts α against β. This gauge is free because both marginals have the same sum. Where the
plan splits into blocks that exchange no mass, each block has its own gauge, and C̄ does not depend on any of them.

The matrix is symmetric, and so the tangent of the plan comes from the same system:

    [ diag(P1)     P     ] [ φ̇ ]   [ ṗ − D 1  ]        Ṗ = P ∘ (φ̇ 1ᵀ + 1 γ̇ᵀ) + D,   D = −P ∘ (Ċ + ε̇ log P) / ε
    [   Pᵀ     diag(Pᵀ1) ] [ γ̇ ] = [ q̇ − Dᵀ 1 ]

The same system, with the error of the marginals on the right, is the Newton step of the two potentials φ and γ. So the
forward ends with such steps, and the size of the last one says how exact the plan, and with it the gradient, is.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple, NoReturn

import array_api_compat
import numpy as np

from ddnref._core.arrays import (
    Array,
    Namespace,
    as_dtype,
    clip,
    double,
    first_flagged,
    full,
    is_true,
    listed,
    namespace,
    namespace_of,
    nan_where,
    refuse_recording,
    with_axes,
)
from ddnref._core.arrays import eps as machine_eps
from ddnref._core.checks import check_dtypes, check_real, check_shapes
from ddnref._core.loops import CHECK_EVERY, WhileLoop, run
from ddnref._core.noise import noise
from ddnref._kernels import dense
from ddnref._kernels.components import components
from ddnref._kernels.public import public
from ddnref.errors import ConvergenceError, SingularError
from ddnref.implicit._tangents import require_direction
from ddnref.linalg._solve import summed_to

SCALED_ENOUGH = 0.6
"""Scaling goes on to an error of the marginals of eps to this power, from where one Newton step is enough."""
UPDATES = 2
"""Updates per column after which an item goes on with Newton steps, each of which costs about as much as m updates."""
EDGE = 16
"""Columns that exchange less than this many machine epsilons of their mass belong to different blocks."""
SMALL_STEP = 1e-5
"""Relative change of the plan in a Newton step after which one more step leaves nothing but rounding."""
ROUNDING = 2
"""Machine epsilons of rounding in the linear system, as the error estimate counts them: on 400 problems with a true
error above 100 eps the estimate was 2 to 30 times that error, 7 times in the median."""
PROBES = 4
"""Right-hand sides that measure how much the linear system amplifies rounding."""


class SinkhornInfo(NamedTuple):
    """How the solution ended for each item."""

    converged: Array
    """(...) flags: `residual_norm` is within `rtol`, and `error` within `vjp_rtol`."""
    n_iter: Array
    """(...) int32: updates of both potentials by scaling."""
    residual_norm: Array
    """(...): ``Σ |P 1 − p| + Σ |Pᵀ 1 − q|`` of the returned plan."""
    error: Array
    """(...): estimated relative error of the gradients of p and q through the plan, NaN without Newton steps. Those of
    cost and ε are at least as exact."""
    newton_steps: Array
    """(...) int32."""
    blocks: Array
    """(...) int32: parts of the plan that exchange no mass with each other; 0 without Newton steps."""
    feasible: Array
    """(...) flags: marginals finite, not negative, each with sum one, with a finite cost to go; eps positive."""


class SinkhornVjpInfo(NamedTuple):
    """How far a gradient or a tangent can be trusted, for each item."""

    converged: Array
    """(...) flags: the plan is finite, and so the derivative exists."""
    residual_norm: Array
    """(...): ``Σ |P 1 − p| + Σ |Pᵀ 1 − q|`` of the plan that was given."""
    error: Array
    """(...): estimated error of the gradients of p and q, relative to the larger of the two; in the forward mode that
    of the tangents of the potentials. The gradients of cost and ε and the tangent of the plan have none larger."""
    blocks: Array
    """(...) int32: parts of the plan that exchange no mass; each has its own gauge."""


@public
def sinkhorn(
    cost: Array,
    p: Array,
    q: Array,
    eps: Array | float,
    /,
    *,
    newton: bool = True,
    rtol: float | None = None,
    vjp_rtol: float = math.inf,
    maxiter: int | None = None,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, SinkhornInfo]:
    r"""Entropic optimal transport plan between two histograms.

    Parameters
    ----------
    cost : (..., n, m) real array
        Infinite where no mass may go; the plan is zero there.
    p : (..., n) array
    q : (..., m) array
        Marginals: not negative, each with sum one (up to ``64 eps n`` of the dtype). An entry of zero empties its
        row or column exactly.
    eps : (...) array, or float, positive
        Strength ε of the entropy, in the units of the cost. The batch axes of all four broadcast against each other.
    newton : bool, default True
        Finish with Newton steps on the plan. They make marginals exact to rounding, solve problems with small ε on
        which scaling does not converge, and estimate the error of the gradient. Each takes ``2 n m² + ⅔ m³`` flops for
        ``m <= n``, as the VJP does. Choose ``False`` where that is too much, or where a rough plan will do.
    rtol : float, optional
        Largest accepted `residual_norm`. Default 1e-9 in float64, 1e-5 in float32. Scaling stops there; Newton steps go
        on to rounding whatever it is.
    vjp_rtol : float, optional
        Largest accepted `error`, for which Newton steps are needed. By default it is only reported, because a small ε
        may leave the gradients of the marginals uncertain where plan and cost gradient are exact.
    maxiter : int, optional
        Most updates by scaling, rounded up to a multiple of `check_every`, and most Newton steps. Default
        ``max(100, 2 min(n, m))`` updates and 300 steps; for scaling alone 10,000 updates.
    check_every : int, default 10
        Updates between two looks at the flags. A Newton step, which takes far longer, is always followed by one.
    throw : bool, default True
        Raise for items that fail. With ``False`` their last plan is returned, and `converged` is not set.
    while_loop : callable, optional
        A loop such as ``jax.lax.while_loop``, where the call is traced.

    Returns
    -------
    plan : (..., n, m) array
        NaN for items whose marginals, cost or ε are not `feasible`.
    info : SinkhornInfo

    Raises
    ------
    ConvergenceError
        The marginals admit no plan, or the plan did not reach `rtol`, or its gradient `vjp_rtol`.
    TypeError, ValueError
        Mixed libraries or dtypes, complex arrays; shapes that do not fit; a number `eps` that is not positive.

    Notes
    -----
    Scaling alternates ``v = q / (Aᵀ u)`` and ``u = p / (A v)`` with ``A = exp(φ 1ᵀ + 1 γᵀ − C/ε)``. Potentials φ and γ
    take up u and v where these grow large, so that nothing overflows for any ε. An update takes two products with A.

    The Newton steps work on one potential,

    .. math:: \min_\gamma\; \sum_i p_i \log \sum_j e^{\gamma_j - C_{ij}/\varepsilon} - \langle q, \gamma \rangle ,

    whose Hessian is a graph Laplacian, with Levenberg's damping. Items that scaling has not brought close start anew
    with a large ε, which is halved step by step. In tests this solved every problem down to ε of 1e-4 times the range
    of the cost, usually in 10 to 40 steps. Steps multiply the plan, and so the rounding of ``C / ε`` does not limit
    the marginals. They are computed in float64 where the device has it.

    `error` is an estimate: with d the length of the last step and g the amplification of noise by the Laplacian, the
    larger of ``d min(1, d g)`` and ``2 eps g``. Where blocks are coupled by hardly any mass, no plan in this precision
    has an exact gradient of the marginals, and `error` says so. The gradients of cost and ε do not suffer. Without mass
    between them, blocks are counted, and what is said is true within each.

    References
    ----------
    .. [1] M. Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", NeurIPS (2013).
    .. [2] G. Peyré, M. Cuturi, "Computational Optimal Transport" (2019), sections 4.2 and 4.4.
    .. [3] B. Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized transport problems", SIAM J. Sci.
       Comput. 41 (2019), sections 3.1 and 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> half = np.full(2, 0.5)
    >>> plan, info = ddnref.nodes.sinkhorn(np.asarray([[0.0, 1.0], [1.0, 0.0]]), half, half, 0.5)
    >>> plan.round(4)
    array([[0.4404, 0.0596],
           [0.0596, 0.4404]])
    """
    xp, lead, eps = _conform("sinkhorn", cost, p, q, eps)
    if vjp_rtol < math.inf and not newton:
        raise ValueError("vjp_rtol is given with newton=False: only Newton steps tell the error of the gradient.")
    refuse_recording("sinkhorn", cost=cost, p=p, q=q, eps=eps)
    if rtol is None:
        rtol = 1e-5 if cost.dtype == xp.float32 else 1e-9
    # The Newton system has the order of the second side, so that should be the smaller one.
    swap = cost.shape[-2] < cost.shape[-1]
    if swap:
        cost, p, q = xp.matrix_transpose(cost), q, p
    n, m = cost.shape[-2:]
    p, q = xp.broadcast_to(p, (*lead, n)), xp.broadcast_to(q, (*lead, m))
    k = _exponents(cost, p, q, eps)
    feasible = _feasible(k, p, q, eps)

    # Items that admit no plan iterate on a harmless problem, so that nothing overflows or warns.
    bad = ~feasible[..., None]
    k = xp.where(bad[..., None], full((), 0.0, k), k)
    p, q = (xp.where(bad, full((), 1 / z.shape[-1], z), z) for z in (p, q))

    budget = (max(100, UPDATES * m) if newton else 10_000) if maxiter is None else maxiter
    target = machine_eps(xp, cost.dtype) ** SCALED_ENOUGH if newton else rtol
    scaled = _scale(k, p, q, feasible, target, budget, check_every, while_loop)
    plan = scaled.u[..., :, None] * scaled.plan * scaled.v[..., None, :]
    error = full(lead, math.nan, p)
    steps = blocks = xp.zeros(lead, dtype=xp.int32, device=array_api_compat.device(p))
    if newton:
        if (fine := double(xp, cost)).dtype != cost.dtype:
            # The rounding of C/ε is a relative error of the plan.
            k, plan = _exponents(fine, double(xp, p), double(xp, q), double(xp, eps)), None
            k = xp.where(bad[..., None], full((), 0.0, k), k)
        last, steps = _finish(k, p, q, plan, scaled, 300 if maxiter is None else maxiter, while_loop)
        plan, error, blocks = as_dtype(last.plan, p), as_dtype(last.error, p), last.blocks
        error = xp.where(error > machine_eps(xp, p.dtype), error, full((), machine_eps(xp, p.dtype), p))
    residual = nan_where(~feasible, _residual(plan, p, q))
    converged = (residual <= rtol) & ~(error > vjp_rtol)
    info = SinkhornInfo(converged, scaled.n_iter, residual, nan_where(~feasible, error), steps, blocks, feasible)
    if throw and is_true(xp.any(~info.converged)):
        _raise(info, rtol, vjp_rtol, newton)
    plan = nan_where(bad[..., None], plan)
    return xp.matrix_transpose(plan) if swap else plan, info


def _exponents(cost: Array, p: Array, q: Array, eps: Array) -> Array:
    """``k = −C / ε``, and −∞ in empty rows and columns."""
    xp = namespace_of(cost)
    log_p, log_q = (xp.where(z > 0, full((), 0.0, z), full((), -math.inf, z)) for z in (p, q))
    return cost / -eps[..., None, None] + (log_p[..., :, None] + log_q[..., None, :])


# --- scaling ------------------------------------------------------------------------------------------------------


class _Scaled(NamedTuple):
    """The plan ``u_i A_ij v_j`` with ``A = exp(φ_i + γ_j + k_ij)``."""

    plan: Array  # A
    phi: Array
    gamma: Array
    u: Array
    v: Array
    error: Array
    n_iter: Array
    absorb: Array
    """Whether u or v have grown so large that the potentials must take them up."""


def _scale(
    k: Array, p: Array, q: Array, feasible: Array, rtol: float, maxiter: int, every: int, while_loop: WhileLoop | None
) -> _Scaled:
    """Sinkhorn's updates until the marginals of the plan are within `rtol`, or until `maxiter`."""
    xp = namespace_of(k)
    lead = feasible.shape
    # A quarter of the exponents: then neither a product of u, A and v nor the next few updates overflow.
    limit = math.log(float(xp.finfo(k.dtype).max)) / 4
    # Empty bins have u = p / 1 = 0.
    empty_p, empty_q = (xp.astype(z == 0, z.dtype) for z in (p, q))
    blocks = -(-maxiter // every)

    def active(s: _Scaled) -> Array:
        return (s.error > rtol) & (s.n_iter < maxiter)

    def unobstructed(s: _Scaled) -> Array:
        flags = active(s)
        return flags & ~xp.any(flags & s.absorb)

    def update(s: _Scaled) -> _Scaled:
        go, u = active(s) & ~s.absorb, s.u
        for _ in range(every):
            v = q / (_product(u, s.plan) + empty_q)
            rows, before = dense.matvec(s.plan, v), u
            u = p / (rows + empty_p)
        error = xp.sum(xp.abs(before * rows - p), axis=-1)  # of the plan before the last half step, at least as large
        size = xp.maximum(xp.max(xp.abs(_log(u)), axis=-1), xp.max(xp.abs(_log(v)), axis=-1))
        # What has overflowed is dropped, and the potentials take up what was there before.
        good = go & (size < 3 * limit) & xp.isfinite(error)
        return s._replace(
            u=xp.where(good[..., None], u, s.u),
            v=xp.where(good[..., None], v, s.v),
            error=xp.where(good, error, s.error),
            n_iter=s.n_iter + every * xp.astype(go, xp.int32),
            absorb=s.absorb | (go & ~(good & (size < limit))),
        )

    def absorb_and_update(s: _Scaled) -> _Scaled:
        go = active(s)[..., None]
        # Make 1 the largest entry of each row and column of A.
        phi = _minus_highest(s.gamma[..., None, :] + _log(s.v)[..., None, :] + k, -1)
        exponents = phi[..., :, None] + k
        gamma = _minus_highest(exponents, -2)
        u = xp.exp(clip(s.phi + _log(s.u) - phi, limit / 2))
        u = xp.where((s.n_iter == 0)[..., None], xp.ones_like(u), u)
        plan = xp.exp(exponents + gamma[..., None, :])
        s = s._replace(
            plan=xp.where(go[..., None], plan, s.plan),
            phi=xp.where(go, phi, s.phi),
            gamma=xp.where(go, gamma, s.gamma),
            u=xp.where(go, u, s.u),
            v=xp.where(go, xp.ones_like(gamma), s.v),
            absorb=xp.zeros_like(s.absorb),
        )
        return run(unobstructed, update, s, maxiter=blocks, check_every=1, while_loop=while_loop)

    # NaN as the error of an infeasible item is not above rtol, and so the item is never active.
    error = xp.where(feasible, full(lead, math.inf, k), full((), math.nan, k))
    counts = xp.zeros(lead, dtype=xp.int32, device=array_api_compat.device(k))
    zeros = xp.zeros_like(p), xp.zeros_like(q)
    start = _Scaled(xp.zeros_like(k), *zeros, xp.ones_like(p), xp.ones_like(q), error, counts, counts > 0)
    return run(active, absorb_and_update, start, maxiter=blocks, check_every=1, while_loop=while_loop)


def _product(u: Array, a: Array) -> Array:
    """``Aᵀ u``."""
    return (u[..., None, :] @ a)[..., 0, :]


def _minus_highest(x: Array, axis: int) -> Array:
    xp = namespace_of(x)
    top = xp.max(x, axis=axis)
    return xp.where(xp.isfinite(top), -top, xp.zeros_like(top))


def _log(x: Array) -> Array:
    """Logarithm, 0 where there is nothing."""
    xp = namespace_of(x)
    return xp.log(xp.where(x == 0, xp.ones_like(x), x))


# --- Newton steps -------------------------------------------------------------------------------------------------


class _Newton(NamedTuple):
    """A plan with exact rows; its columns come from ``P = diag(p) softmax(γ_j + k_ij / stage)``."""

    plan: Array
    gamma: Array
    stage: Array
    """The factor by which ε is too large, at least one."""
    damping: Array
    step: Array
    """The largest relative change of an entry in the last step."""
    moved: Array
    """How far potentials have moved since the plan was computed from them; then underflowed entries may be missing."""
    n_iter: Array
    done: Array


def _finish(
    k: Array, p: Array, q: Array, plan: Array | None, scaled: _Scaled, maxiter: int, while_loop: WhileLoop | None
) -> tuple[_LastStep, Array]:
    """The plan to rounding with its error, and the number of steps. ``None`` is computed from the potentials."""
    xp = namespace_of(k)
    p, q = as_dtype(p, k), as_dtype(q, k)
    q = q * (xp.sum(p, axis=-1, keepdims=True) / xp.sum(q, axis=-1, keepdims=True))
    one = xp.ones_like(p[..., 0])
    gamma = as_dtype(scaled.gamma + _log(scaled.v), k)
    plan = _with_rows(gamma[..., None, :] + k, p) if plan is None else plan
    eye, unit = dense.identity(k.shape[-1], k), machine_eps(xp, scaled.plan.dtype)

    # Mostly one step is enough; a traced call cannot know that, and takes at least two.
    left = ~xp.isnan(scaled.error)
    first = None
    if while_loop is None:
        first = _last_step(plan, p, q, eye, unit)
        left = left & ~(first.remainder <= 2 * ROUNDING * machine_eps(xp, k.dtype) * first.growth)
        if not is_true(xp.any(left)):
            return first, xp.ones_like(scaled.n_iter)
    near = scaled.error <= 1e-2
    start = _Newton(plan, gamma, one, one, math.inf * one, 0 * one, xp.zeros_like(scaled.n_iter), ~(left & near))
    state = _steps(k, p, q, start, min(maxiter, 12), while_loop, stages=False)

    # What was not near enough starts anew, with an ε that is so large that the start is near.
    far = left & ~(near & state.done)
    if while_loop is not None or is_true(xp.any(far)):
        finite = xp.isfinite(k)
        top = xp.max(xp.where(finite, k, full((), -math.inf, k)), axis=(-2, -1))
        bottom = xp.min(xp.where(finite, k, full((), math.inf, k)), axis=(-2, -1))
        stage = xp.maximum(one, (top - bottom) / 20)
        gamma = _log(q)
        fresh = _with_rows(gamma[..., None, :] + k / with_axes(stage, 2), p)
        start = _Newton(fresh, gamma, stage, one, math.inf * one, 0 * one, state.n_iter, ~far)
        anew = _steps(k, p, q, start, maxiter, while_loop, stages=True)
        state = state._replace(plan=xp.where(far[..., None, None], anew.plan, state.plan), n_iter=anew.n_iter)
    last = _last_step(state.plan, p, q, eye, unit)
    if first is not None:  # what was right already stays as it is, bit for bit
        pairs = zip(last, first, strict=True)
        last = _LastStep(*(xp.where(with_axes(left, x.ndim - left.ndim), x, y) for x, y in pairs))
    return last, state.n_iter + 1


class _LastStep(NamedTuple):
    plan: Array
    error: Array
    blocks: Array
    growth: Array
    """How much the Laplacian amplifies noise."""
    remainder: Array
    """The part of the error that another step would take away."""


def _last_step(plan: Array, p: Array, q: Array, eye: Array, unit: float) -> _LastStep:
    """A Newton step in which each block has its own gauge, and the error that it leaves."""
    xp, w = namespace_of(plan), _laplacian(plan, p, eye)
    same, blocks = _same_block(w, unit)
    missing = q - w.columns
    right = xp.concat([(w.inverse * missing)[..., None], w.root[..., None] * _probes(w.root)], axis=-1)
    x = w.inverse[..., None] * dense.solve(_gauged(w, same, eye), right)
    plan, step = _moved(plan, p, x[..., 0])[:2]
    growth = xp.max(xp.abs(x[..., 1:]), axis=(-2, -1))
    remainder = step * xp.minimum(xp.ones_like(step), step * growth)
    error = xp.maximum(remainder, (ROUNDING * machine_eps(xp, plan.dtype) + _dropped(w, same)) * growth)
    return _LastStep(plan, error, blocks, growth, remainder)


def _steps(
    k: Array, p: Array, q: Array, state: _Newton, maxiter: int, while_loop: WhileLoop | None, *, stages: bool
) -> _Newton:
    """Newton steps on γ with Levenberg's damping until the plan changes by rounding only."""
    xp, unit = namespace_of(k), machine_eps(namespace_of(k), k.dtype)
    n, m = k.shape[-2:]
    eye = dense.identity(m, k)
    used = q > 0
    safe_q = xp.where(used, q, xp.ones_like(q))
    # Beyond this, entries that have underflowed may come back.
    far = math.log(float(xp.finfo(k.dtype).max)) / 4
    noise_level = 64 * unit * math.sqrt(n + m)

    def active(s: _Newton) -> Array:
        return ~s.done

    def body(s: _Newton) -> _Newton:
        go = ~s.done
        plan, gamma = s.plan, s.gamma
        if stages:
            # Half a step of Sinkhorn: exact columns, then exact rows.
            columns = xp.sum(plan, axis=-2)
            ratio = xp.where(used, q / xp.maximum(columns, 1e-30 * safe_q), xp.ones_like(q))
            ratio = xp.where(go[..., None], ratio, xp.ones_like(q))
            plan, gamma = plan * ratio[..., None, :], gamma + xp.log(ratio)
            rows = xp.sum(plan, axis=-1)
            ratio = xp.where(go[..., None] & (rows > 0), p / xp.where(rows > 0, rows, xp.ones_like(p)), xp.ones_like(p))
            plan = plan * ratio[..., :, None]

        # The Newton step, damped so much that no potential moves by more than 8.
        w = _laplacian(plan, p, eye)
        missing = q - w.columns
        wrong = xp.max(xp.abs(missing) / safe_q, axis=-1)
        damping = s.damping * xp.maximum(4 * m * unit * xp.ones_like(wrong), wrong / 8)
        matrix = _matrix(w, eye, damping) + dense.outer(w.root, w.root)
        beta = w.inverse * dense.solve(matrix, (w.inverse * missing)[..., None])[..., 0]
        beta = clip(beta, 8.0)
        plan_new, step, alpha = _moved(plan, p, beta)

        # Accept it if the objective falls, computed from the changes so that nothing cancels.
        slope = xp.sum(missing * beta, axis=-1)
        terms = p * alpha, q * beta
        change = -sum(xp.sum(z, axis=-1) for z in terms)
        slack = 8 * unit * (1 + sum(xp.sum(xp.abs(z), axis=-1) for z in terms))
        accept = go & (change <= -1e-4 * slope + slack)
        plan = xp.where(with_axes(accept, 2), plan_new, plan)
        gamma = xp.where(accept[..., None], gamma + beta, gamma)

        # At the wanted ε, end where steps are so small that the next one would be rounding, or no longer shrink.
        small = (step <= SMALL_STEP) & (wrong <= 1e-2)
        stalled = (step > s.step / 2) & (wrong <= noise_level)
        done = s.done | (accept & (s.stage <= 1) & (small | stalled))
        step = xp.where(accept, step, s.step)
        damping = xp.where(accept, xp.maximum(s.damping / 4, xp.ones_like(step)), 8 * s.damping)
        damping = xp.where(go, damping, s.damping)

        stage, moved = s.stage, s.moved
        if stages:
            # Go on with half of ε, to which the potentials, in units of ε, are inversely proportional.
            near = accept & (wrong < 0.3) & (slope < 0.1)
            stage = xp.where(near, xp.maximum(stage / 2, xp.ones_like(stage)), stage)
            moved = moved + xp.max(xp.abs(gamma - s.gamma), axis=-1)
            gamma = gamma * (s.stage / stage)[..., None]
            fresh = go & ((stage < s.stage) | (moved > far))
            moved = xp.where(fresh, xp.zeros_like(moved), moved)
            anew = _with_rows(gamma[..., None, :] + k / with_axes(stage, 2), p)
            plan = xp.where(with_axes(fresh, 2), anew, plan)
            step = xp.where(fresh, full((), math.inf, step), step)
            done = done & ~fresh
        return _Newton(plan, gamma, stage, damping, step, moved, s.n_iter + xp.astype(go, xp.int32), done)

    return run(active, body, state, maxiter=maxiter, check_every=1, while_loop=while_loop)


def _with_rows(x: Array, p: Array) -> Array:
    """``diag(p) softmax(x)``: rows with sums p."""
    xp = namespace_of(x)
    e = xp.exp(x + _minus_highest(x, -1)[..., :, None])
    total = xp.sum(e, axis=-1)
    return e * (p / xp.where(total > 0, total, xp.ones_like(total)))[..., :, None]


def _moved(plan: Array, p: Array, beta: Array) -> tuple[Array, Array, Array]:
    """``P_ij e^(α_i + β_j)`` with α so that rows have sums p, the largest change ``|α_i + β_j|``, and α."""
    xp = namespace_of(plan)
    plan = plan * xp.exp(beta)[..., None, :]
    rows = xp.sum(plan, axis=-1)
    used = (p > 0) & ~(rows == 0)
    ratio = xp.where(used, p / xp.where(used, rows, xp.ones_like(rows)), xp.ones_like(rows))
    alpha = xp.log(ratio)
    # Both vectors have entries of either sign, so that empty rows and columns, with 0, are never the largest.
    up = xp.max(alpha, axis=-1) + xp.max(beta, axis=-1)
    down = xp.min(alpha, axis=-1) + xp.min(beta, axis=-1)
    return plan * ratio[..., :, None], xp.maximum(up, -down), alpha


# --- the graph Laplacian ------------------------------------------------------------------------------------------


class _Laplacian(NamedTuple):
    """The system of the columns, ``diag(c) − Pᵀ diag(1/r) P`` with ``c = Pᵀ 1``, scaled by ``c^-½`` from both sides."""

    edges: Array
    """``(Pᵀ diag(1/r) P)_ij / √(c_i c_j)``, zeros on the diagonal."""
    columns: Array
    """``c``."""
    root: Array
    """``√c``."""
    inverse: Array
    """``1/√c``, 0 for empty columns."""


def _laplacian(plan: Array, rows: Array, eye: Array) -> _Laplacian:
    xp = namespace_of(plan)
    columns = xp.sum(plan, axis=-2)
    root = _root(columns)
    inverse = _reciprocal(root)
    scaled = plan * _reciprocal(_root(rows))[..., :, None] * inverse[..., None, :]
    return _Laplacian(xp.matrix_transpose(scaled) @ scaled * (1 - eye), columns, root, inverse)


def _root(x: Array) -> Array:
    """Square root, without taking that of 0, which a second derivative could not pass through."""
    xp = namespace_of(x)
    return xp.where(x == 0, xp.zeros_like(x), xp.sqrt(xp.where(x == 0, xp.ones_like(x), x)))


def _reciprocal(x: Array) -> Array:
    xp = namespace_of(x)
    return xp.where(x == 0, xp.zeros_like(x), 1 / xp.where(x == 0, xp.ones_like(x), x))


def _matrix(w: _Laplacian, eye: Array, damping: Array | None = None) -> Array:
    """The scaled Laplacian; its diagonal is summed from the rest, so that nothing cancels. Empty columns have a 1."""
    diagonal = w.inverse * dense.matvec(w.edges, w.root) + namespace_of(eye).astype(w.root == 0, eye.dtype)
    if damping is not None:
        diagonal = diagonal + damping[..., None]
    return eye * diagonal[..., None] - w.edges


def _same_block(w: _Laplacian, unit: float) -> tuple[Array, Array]:
    """Find which columns are in the same block, as numbers 0 and 1, and how many blocks there are.

    `unit` is the machine epsilon of the inputs: what their rounding could carry from block to block does not count.
    """
    xp, m = namespace_of(w.edges), w.root.shape[-1]
    labels = components(w.edges > EDGE * unit)
    i = xp.arange(m, dtype=labels.dtype, device=array_api_compat.device(labels))
    count = xp.sum(xp.astype((labels == i) & ~(w.root == 0), xp.int32), axis=-1, dtype=xp.int32)
    return xp.astype(labels[..., :, None] == labels[..., None, :], w.edges.dtype), count


def _dropped(w: _Laplacian, same: Array) -> Array:
    """The largest share of a column's mass that it exchanges with other blocks, which the gauged system leaves out."""
    return namespace_of(same).max(w.inverse * dense.matvec(w.edges * (1 - same), w.root), axis=-1)


def _gauged(w: _Laplacian, same: Array, eye: Array) -> Array:
    """The scaled Laplacian without edges between blocks, made positive definite by ``√c √cᵀ / mass`` of each block."""
    mass = dense.matvec(same, w.columns)
    gauge = same * dense.outer(w.root, w.root * _reciprocal(mass))
    return _matrix(w._replace(edges=w.edges * same), eye) + gauge


def _probes(root: Array) -> Array:
    """Fixed random columns ``(m, PROBES)`` with entries of about one."""
    xp, m = namespace_of(root), root.shape[-1]
    return math.sqrt(m) * xp.stack([noise(i, m, root) for i in range(PROBES)], axis=-1)


# --- arguments and errors -----------------------------------------------------------------------------------------


def _conform(
    name: str, cost: Array, p: Array, q: Array, eps: Array | float
) -> tuple[Namespace, tuple[int, ...], Array]:
    """Validate the inputs; return their namespace, the batch axes that they broadcast to, and ε as an array."""
    if isinstance(eps, numbers.Real):
        number = float(eps)  # NumPy's own numbers would promote float32
        if not 0 < number < math.inf:
            raise ValueError(f"eps is {number}, expected more than 0 and finite.")
        xp = namespace(cost=cost, p=p, q=q)
        eps = full((), number, cost)
    else:
        xp = namespace(cost=cost, p=p, q=q, eps=eps)
    check_real(cost=cost, p=p, q=q, eps=eps)
    check_dtypes(**{key: (array, cost.dtype) for key, array in {"p": p, "q": q, "eps": eps}.items()})
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"cost has shape {tuple(cost.shape)}, expected (..., n, m) with n and m at least 1.")
    for key, array, size in (("p", p, cost.shape[-2]), ("q", q, cost.shape[-1])):
        if array.ndim < 1 or array.shape[-1] != size:
            raise ValueError(f"{key} has shape {tuple(array.shape)}, expected (..., {size}) for this cost.")
    # Batch axes broadcast.
    strength: Array = eps
    batches = {"cost": cost.shape[:-2], "p": p.shape[:-1], "q": q.shape[:-1], "eps": strength.shape}
    try:
        return xp, np.broadcast_shapes(*map(tuple, batches.values())), strength
    except ValueError:
        shown = ", ".join(f"{key} {tuple(batch)}" for key, batch in batches.items())
        raise ValueError(f"The batch axes given to {name} do not broadcast against each other: {shown}.") from None


def _feasible(k: Array, p: Array, q: Array, eps: Array) -> Array:
    """Whether the items have histograms, no cost of NaN or −∞, and a finite one for each bin with mass."""
    xp = namespace_of(k)
    good = _histogram(p) & _histogram(q) & (eps > 0) & xp.isfinite(eps)
    for mass, highest in ((p, xp.max(k, axis=-1)), (q, xp.max(k, axis=-2))):
        good = good & xp.all((highest < math.inf) & ((highest > -math.inf) | (mass == 0)), axis=-1)
    return good


def _histogram(p: Array) -> Array:
    """Whether a histogram is not negative and has sum one up to rounding, n eps, with 64 for sums done elsewhere."""
    xp = namespace_of(p)
    off = xp.abs(xp.sum(nan_where(~xp.isfinite(p), p), axis=-1) - 1)
    return xp.all(p >= 0, axis=-1) & (off <= 64 * machine_eps(xp, p.dtype) * p.shape[-1])


def _residual(plan: Array, p: Array, q: Array) -> Array:
    xp = namespace_of(plan)
    return sum(xp.sum(xp.abs(xp.sum(plan, axis=axis) - z), axis=-1) for axis, z in ((-1, p), (-2, q)))


def _raise(info: SinkhornInfo, rtol: float, vjp_rtol: float, newton: bool) -> NoReturn:
    xp = namespace_of(info.converged)
    if not is_true(xp.all(info.feasible)):
        raise ConvergenceError(
            f"The marginals given to sinkhorn admit no plan{_which(~info.feasible)}: p and q must be finite, not "
            "negative and each of sum one, the cost free of NaN with a finite entry for each bin with mass, and eps "
            "positive. Divide each histogram by its sum, or pass throw=False to get NaN for these items."
        )
    worst = float(xp.max(info.residual_norm))
    which, last = _which(~info.converged), "or pass throw=False to get the last plan."
    if worst > rtol:
        raise ConvergenceError(
            f"sinkhorn did not converge{which}: the error of the marginals is {worst:.1e} > rtol {rtol:.1e} after "
            f"{int(xp.max(info.n_iter))} updates and {int(xp.max(info.newton_steps))} Newton steps. The most likely "
            "causes are infinite costs that leave no way for the mass, and an eps that is small compared with the "
            f"cost. Raise eps, maxiter or rtol, {'' if newton else 'allow Newton steps, '}{last}"
        )
    worst_error = float(xp.max(info.error))
    raise ConvergenceError(
        f"sinkhorn found a plan whose gradient is uncertain{which}: its marginals hold to {worst:.1e}, but the "
        f"estimated error of the gradient is {worst_error:.1e} > vjp_rtol {vjp_rtol:.1e}. The most likely cause is an "
        f"eps so small that parts of the plan exchange hardly any mass. Raise eps or vjp_rtol, {last}"
    )


def _which(flags: Array) -> str:
    """Name the items of a batch that are flagged."""
    places, count = first_flagged(flags)
    if flags.ndim == 0 or count == 0:
        return ""
    more = f" and {count - len(places)} more" if count > len(places) else ""
    return f" for item{'s' if count > 1 else ''} {listed(places)}{more} of the batch"


# --- the derivatives ----------------------------------------------------------------------------------------------


@public
def sinkhorn_vjp(
    plan_bar: Array, plan: Array, cost: Array, p: Array, q: Array, eps: Array | float, /, *, throw: bool = True
) -> tuple[tuple[Array, Array, Array, Array], SinkhornVjpInfo]:
    r"""Gradient of a loss of `sinkhorn`: one direct solve, without any of its iterates.

    Parameters
    ----------
    plan_bar, plan : (..., n, m) arrays
        Cotangent of the plan, and the plan.
    cost, p, q, eps
        The inputs of `sinkhorn`, which has the same ``TypeError`` and ``ValueError``. Of the cost only the shape is
        used.
    throw : bool, default True
        Raise `SingularError`, reading one flag; with ``False`` such items are NaN.

    Returns
    -------
    gradients : tuple of arrays
        Of cost, p, q and ε, each shaped like its input, with the sum over the items that share it; that of a number ε
        has the shape (). The gauge is fixed so that the gradients of both marginals have mean zero over the entries of
        a block that are not zero, because the marginals move with their sums fixed. Entries of zero stay zero, and
        their gradient is 0; so is that of an infinite cost.
    info : SinkhornVjpInfo

    Raises
    ------
    SingularError
        The plan is not finite, as that of an item that `sinkhorn` refused.

    Notes
    -----
    Of the system of order n + m, the larger side is eliminated. What remains is a graph Laplacian, whose diagonal
    is summed from the rest so that nothing cancels. Adding ``c cᵀ / mass`` in each block, with the sums c of the
    columns, fixes the gauge and makes it positive definite. Columns belong to different blocks where they exchange less
    than 16 eps of their mass, with the eps of the dtype given. Between blocks the gradients of the marginals are free;
    those of cost and ε always exist. A cotangent ``a_i + b_j`` does not change the cost's gradient, so the mean of its
    rows is taken out beforehand.

    float32 is computed in float64 where the device has it. `error` is estimated from right-hand sides of random signs
    and the size of rounding errors, and from the Newton step that the marginals of the plan ask for. Cost:
    2 n m² + ⅔ m³ flops for m ≤ n; libraries other than NumPy take another ``2 m³ log₂ m`` to find the blocks.

    References
    ----------
    .. [1] M. Eisenberger, A. Toker, L. Leal-Taixé, F. Bernard, D. Cremers, "A unified framework for implicit
       Sinkhorn differentiation", CVPR (2022), theorem 3.

    Examples
    --------
    >>> import numpy as np
    >>> half, cost = np.full(2, 0.5), np.asarray([[0.0, 1.0], [1.0, 0.0]])
    >>> plan, _ = ddnref.nodes.sinkhorn(cost, half, half, 0.5)
    >>> (cost_bar, p_bar, q_bar, eps_bar), info = ddnref.nodes.sinkhorn_vjp(cost, plan, cost, half, half, 0.5)
    >>> cost_bar.round(4)  # of the transported cost
    array([[ 0.105, -0.105],
           [-0.105,  0.105]])
    """
    xp, lead, eps = _conform("sinkhorn_vjp", cost, p, q, eps)
    shapes = [tuple(z.shape) for z in (cost, p, q)]
    expected, dtype = (*lead, *cost.shape[-2:]), cost.dtype
    namespace(plan=plan, plan_bar=plan_bar, cost=cost)
    check_dtypes(plan=(plan, dtype), plan_bar=(plan_bar, dtype))
    check_shapes(plan=(plan, expected), plan_bar=(plan_bar, expected))
    # Eliminate the larger side, so that the smaller one is left to solve for.
    if plan.shape[-2] < plan.shape[-1]:
        plan_bar, plan = xp.matrix_transpose(plan_bar), xp.matrix_transpose(plan)
        (cost_bar, q_bar, p_bar, eps_bar), info = _gradients(plan_bar, plan, q, p, eps)
        cost_bar = xp.matrix_transpose(cost_bar)
    else:
        (cost_bar, p_bar, q_bar, eps_bar), info = _gradients(plan_bar, plan, p, q, eps)
    _refuse(info, "sinkhorn_vjp", "its loss has no gradient", throw)
    # Inputs that items share get the sum over these.
    cost_bar, p_bar, q_bar = (
        summed_to(bar, shape) for bar, shape in zip((cost_bar, p_bar, q_bar), shapes, strict=True)
    )
    return (cost_bar, p_bar, q_bar, summed_to(eps_bar, tuple(eps.shape))), info


@public
def sinkhorn_jvp(
    cost_dot: Array | None,
    p_dot: Array | None,
    q_dot: Array | None,
    eps_dot: Array | float | None,
    plan: Array,
    cost: Array,
    p: Array,
    q: Array,
    eps: Array | float,
    /,
    *,
    throw: bool = True,
) -> tuple[Array, SinkhornVjpInfo]:
    r"""Derivative of `sinkhorn` along a direction: one direct solve, without any of its iterates.

    Parameters
    ----------
    cost_dot, p_dot, q_dot, eps_dot : arrays or None
        Tangents, each of the shape of its input; ``None`` for an input that does not move. That of a number ε is a
        number or an array without axes. The marginals move with their sums fixed: the mean over the entries of a block
        that are not zero is taken out of `p_dot` and `q_dot`, and a change of the total mass moves nothing. Entries of
        zero stay zero. So this is the transpose of `sinkhorn_vjp`.
    plan : (..., n, m) array
    cost, p, q, eps
        The inputs of `sinkhorn`, which has the same ``TypeError`` and ``ValueError``. Of the cost only the shape is
        used.
    throw : bool, default True
        Raise `SingularError`, reading one flag; with ``False`` such items are NaN.

    Returns
    -------
    plan_dot : (..., n, m) array
        Zero where the plan is.
    info : SinkhornVjpInfo

    Raises
    ------
    SingularError
        The plan is not finite, as that of an item that `sinkhorn` refused.

    Notes
    -----
    The matrix, its gauge and its blocks are those of `sinkhorn_vjp`, and so are precision and cost. What `p_dot` and
    `q_dot` would move from block to block needs a path that does not exist, and is taken out with the means.

    Examples
    --------
    >>> import numpy as np
    >>> half, cost = np.full(2, 0.5), np.asarray([[0.0, 1.0], [1.0, 0.0]])
    >>> plan, _ = ddnref.nodes.sinkhorn(cost, half, half, 0.5)
    >>> plan_dot, info = ddnref.nodes.sinkhorn_jvp(cost, None, None, None, plan, cost, half, half, 0.5)
    >>> plan_dot.round(4)  # along the cost itself
    array([[ 0.105, -0.105],
           [-0.105,  0.105]])
    """
    xp, lead, eps = _conform("sinkhorn_jvp", cost, p, q, eps)
    if isinstance(eps_dot, numbers.Real):
        eps_dot = full((), float(eps_dot), cost)
    dots = {"cost_dot": cost_dot, "p_dot": p_dot, "q_dot": q_dot, "eps_dot": eps_dot}
    require_direction(**dots)
    namespace(plan=plan, **dots, cost=cost)
    check_real(plan=plan, **dots)
    check_dtypes(**{key: (array, cost.dtype) for key, array in {"plan": plan, **dots}.items()})
    shapes = (tuple(z.shape) for z in (cost, p, q, eps))
    check_shapes(
        plan=(plan, (*lead, *cost.shape[-2:])),
        **{key: (dot, shape) for (key, dot), shape in zip(dots.items(), shapes, strict=True)},
    )
    # Eliminate the larger side, so that the smaller one is left to solve for.
    if plan.shape[-2] < plan.shape[-1]:
        cost_dot = None if cost_dot is None else xp.matrix_transpose(cost_dot)
        plan_dot, info = _tangent(cost_dot, q_dot, p_dot, eps_dot, xp.matrix_transpose(plan), q, p, eps)
        plan_dot = xp.matrix_transpose(plan_dot)
    else:
        plan_dot, info = _tangent(cost_dot, p_dot, q_dot, eps_dot, plan, p, q, eps)
    _refuse(info, "sinkhorn_jvp", "it has no tangent", throw)
    return plan_dot, info


def _refuse(info: SinkhornVjpInfo, name: str, so: str, throw: bool) -> None:
    if throw and not is_true(namespace_of(info.converged).all(info.converged)):
        raise SingularError(
            f"The plan given to {name} is not finite{_which(~info.converged)}, so {so}. The most likely cause is a "
            "cost or marginals that sinkhorn refused. Pass throw=False to get NaN for them."
        )


def _gradients(
    plan_bar: Array, plan: Array, p: Array, q: Array, eps: Array
) -> tuple[tuple[Array, Array, Array, Array], SinkhornVjpInfo]:
    """Gradients per item, in the dtype of the plan, by a system for its columns."""
    xp, given = namespace_of(plan), plan
    plan_bar, eps = double(xp, plan_bar), double(xp, eps)
    s = _system(plan, p, q)
    plan = s.plan

    # Take out the mean of each row of the cotangent, which α alone accounts for: then T 1 = 0.
    mean = s.inverse_rows * xp.sum(plan_bar * plan, axis=-1)
    centred = plan_bar - mean[..., :, None]
    t = plan * centred
    beta, errors = _solved(s, xp.sum(t, axis=-2), t)
    shift = s.inverse_rows * dense.matvec(plan, beta)
    cost_bar = plan * ((beta[..., None, :] - shift[..., :, None]) - centred) / eps[..., None, None]
    eps_bar = xp.sum(cost_bar * _log(plan), axis=(-2, -1))

    # Each block has its gauge: mean zero over the entries that are used, among rows and among columns.
    q_bar = _mean_free_columns(s, beta)
    p_bar = _mean_free_rows(s, mean - shift)
    size = xp.maximum(xp.max(xp.abs(p_bar), axis=-1), xp.max(xp.abs(q_bar), axis=-1))
    info = _info(s, errors, size, given)
    return (as_dtype(cost_bar, given), as_dtype(p_bar, given), as_dtype(q_bar, given), as_dtype(eps_bar, given)), info


def _tangent(
    cost_dot: Array | None,
    p_dot: Array | None,
    q_dot: Array | None,
    eps_dot: Array | None,
    plan: Array,
    p: Array,
    q: Array,
    eps: Array,
) -> tuple[Array, SinkhornVjpInfo]:
    """The tangent of the plan per item, in its dtype, by a system for its columns."""
    xp, given = namespace_of(plan), plan
    s = _system(plan, p, q)
    plan, eps = s.plan, double(xp, eps)[..., None, None]

    # What cost and ε do at fixed potentials, D = P ∘ G. A cost where there is no mass has no effect, and may be
    # infinite. The mean of each row of G is taken out, because φ̇ alone accounts for it: then D 1 = 0.
    g = xp.zeros_like(plan)
    if cost_dot is not None:
        g = xp.where(plan == 0, g, -double(xp, cost_dot) / eps)
    if eps_dot is not None:
        g = g - _log(plan) * (double(xp, eps_dot)[..., None, None] / eps)
    g = g - (s.inverse_rows * xp.sum(plan * g, axis=-1))[..., :, None]
    d = plan * g

    # The marginals move within blocks and on their support; what is left of the rows is φ̇ without γ̇.
    right, own = -xp.sum(d, axis=-2), xp.zeros_like(s.rows)
    noise_p = noise_q = None
    if q_dot is not None:
        noise_q = _mean_free_columns(s, double(xp, q_dot) + 0 * s.columns)
        right = right + noise_q
    if p_dot is not None:
        noise_p = _mean_free_rows(s, double(xp, p_dot) + 0 * s.rows)
        own = s.inverse_rows * noise_p
        right = right - dense.matvec(xp.matrix_transpose(plan), own)
    gamma, errors = _solved(s, right, d, noise_p, noise_q)
    phi = own - s.inverse_rows * dense.matvec(plan, gamma)
    plan_dot = d + plan * (phi[..., :, None] + gamma[..., None, :])
    size = xp.maximum(xp.max(xp.abs(phi), axis=-1), xp.max(xp.abs(gamma), axis=-1))
    return as_dtype(plan_dot, given), _info(s, errors, size, given)


class _System(NamedTuple):
    """The system for the columns of a plan, in double precision where the device has it."""

    plan: Array
    rows: Array
    inverse_rows: Array
    columns: Array
    laplacian: _Laplacian
    matrix: Array
    """The Laplacian with a gauge for each block."""
    same: Array
    """Whether two columns are in the same block, as 0 and 1."""
    blocks: Array
    missing: Array
    """(..., m): what the columns of the plan lack beyond rounding."""
    residual: Array
    unit: float
    """Machine epsilon of the plan that was given."""


def _system(plan: Array, p: Array, q: Array) -> _System:
    xp = namespace_of(plan)
    residual, unit = _residual(plan, p, q), machine_eps(xp, plan.dtype)
    plan, q = double(xp, plan), double(xp, q)
    rows = xp.sum(plan, axis=-1)
    eye = dense.identity(plan.shape[-1], plan)
    w = _laplacian(plan, rows, eye)
    same, blocks = _same_block(w, unit)
    missing, slack, zero = q - w.columns, 8 * unit * w.columns, xp.zeros_like(w.columns)
    missing = xp.maximum(missing - slack, zero) - xp.maximum(-missing - slack, zero)
    matrix = _gauged(w, same, eye)
    return _System(plan, rows, _reciprocal(rows), w.columns, w, matrix, same, blocks, missing, residual, unit)


class _Errors(NamedTuple):
    """The effect of each source of error on the solution, (...)."""

    step: Array
    """The Newton step that the marginals of the plan ask for, relative."""
    noise: Array
    """Rounding of the right-hand side, absolute."""
    growth: Array
    """How much the solution amplifies rounding of the system, relative."""
    finite: Array


def _solved(
    s: _System, right: Array, t: Array, p_part: Array | None = None, q_part: Array | None = None
) -> tuple[Array, _Errors]:
    """Solve for the columns, and measure the errors.

    `right` is made of the sums of the columns of t, whose rows sum to zero, and of parts for rows and columns.
    """
    xp, plan, w = namespace_of(s.plan), s.plan, s.laplacian
    # Each block sums to zero, but for rounding.
    mass = _reciprocal(dense.matvec(s.same, s.columns))
    right = right - s.columns * (mass * dense.matvec(s.same, right))
    # One factorisation serves the solution, the Newton step that the marginals ask for beyond rounding, and probes: of
    # the rounding of the right-hand side, and of the solution.
    probes = _probes(w.root)
    # Rounding changes entry ij by z_i w_j, of random sign. The means of the rows change with it.
    z, w_noise = _probes(s.rows), probes
    of_rows = t @ w_noise
    t_noise = w_noise * (xp.matrix_transpose(t) @ z)
    if q_part is not None:
        t_noise = t_noise + w_noise * q_part[..., :, None]
    if p_part is not None:
        of_rows = of_rows + p_part[..., :, None]
    t_noise = t_noise - xp.matrix_transpose(plan) @ (s.inverse_rows[..., None] * z * of_rows)
    columns = [
        (w.inverse * right)[..., None],
        (w.inverse * s.missing)[..., None],
        s.unit * w.inverse[..., None] * t_noise,
        w.root[..., None] * probes,
    ]
    x = w.inverse[..., None] * dense.solve(s.matrix, xp.concat(columns, axis=-1))
    step, noise, growth = (
        xp.max(xp.abs(e), axis=(-2, -1)) for e in (x[..., 1:2], x[..., 2 : 2 + PROBES], x[..., 2 + PROBES :])
    )
    return x[..., 0], _Errors(step, noise, growth, xp.all(xp.isfinite(x[..., 1]), axis=-1))


def _info(s: _System, errors: _Errors, size: Array, given: Array) -> SinkhornVjpInfo:
    """Add the errors up, relative to a solution of a given size."""
    xp = namespace_of(size)
    error = xp.maximum(errors.step, errors.noise * _reciprocal(size))
    left_out = _dropped(s.laplacian, s.same)
    error = xp.maximum(error, (ROUNDING * machine_eps(xp, s.plan.dtype) + left_out) * errors.growth)
    error = xp.maximum(error, s.unit * xp.ones_like(error))
    return SinkhornVjpInfo(errors.finite, s.residual, as_dtype(error, given), s.blocks)


def _mean_free_columns(s: _System, x: Array) -> Array:
    """Take the mean over the columns in use of its block out of each column; 0 for empty ones."""
    used = namespace_of(x).astype(s.columns > 0, x.dtype) + 0 * s.columns
    return used * (x - _mean(s.same, used, x))


def _mean_free_rows(s: _System, x: Array) -> Array:
    """Take the mean over the rows in use of its block out of each row; 0 for empty ones."""
    xp = namespace_of(x)
    # A row belongs to the block of its largest entry.
    place = xp.argmax(s.plan, axis=-1)
    i = xp.arange(s.plan.shape[-1], dtype=place.dtype, device=array_api_compat.device(place))
    member = xp.astype(place[..., :, None] == i, x.dtype)
    used = xp.astype(s.rows > 0, x.dtype) + 0 * s.rows
    sums = member @ (s.same @ (xp.matrix_transpose(member) @ xp.stack([used * x, used], axis=-1)))
    return used * (x - sums[..., 0] * _reciprocal(sums[..., 1]))


def _mean(same: Array, used: Array, x: Array) -> Array:
    """The mean of the used entries in the block of each column."""
    return dense.matvec(same, used * x) * _reciprocal(dense.matvec(same, used))
