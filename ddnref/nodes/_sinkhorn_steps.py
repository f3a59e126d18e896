"""Entropic transport: scaling from a start, and Newton steps on the plan that make it exact to rounding."""

from __future__ import annotations

import math
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, as_dtype, clip, full, is_true, namespace_of, with_axes
from ddnref._core.arrays import eps as machine_eps
from ddnref._core.loops import WhileLoop, run
from ddnref._kernels import dense
from ddnref.nodes._sinkhorn_plan import ROUNDING, _dropped, _gauged, _laplacian, _log, _matrix, _probes, _same_block

SMALL_STEP = 1e-5
"""Relative change of the plan in a Newton step after which one more step leaves nothing but rounding."""


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
