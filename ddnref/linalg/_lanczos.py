"""Thick-restart Lanczos: a few extremal eigenpairs, repeated ones included.

A cycle extends l kept Ritz vectors and one vector to continue with to an orthonormal basis Q of p rows,

    A q_j = Σ_{i ≤ j} T_ij q_i + β_j q_{j+1},

and keeps the l most wanted Ritz vectors of ``T = Qᴴ A Q``; ``‖A y − θ y‖ = β_p |s_p|`` for a Ritz vector ``y = Q s``.

One start vector meets each eigenspace in one direction only, so a repeated eigenvalue shows once. Therefore, when k
pairs have converged, a *check* begins: the k are kept, everything else is dropped, and the cycle goes on from a new
random vector. Only a check that leaves the k as they are, that would have met a copy of one of them, and that has
placed the next eigenvalue, ends the search.
"""

from __future__ import annotations

from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, adjoint, as_dtype, conj, eps, full, namespace_of, real, with_axes
from ddnref._core.loops import LoopOptions, run
from ddnref._core.noise import noise
from ddnref._kernels.dense import eigh, hermitian_part
from ddnref._kernels.vectors import normalised, put_row, real_dot
from ddnref.operators._blocks import SelfAdjoint

POOREST = 1e-4  # a check misses a copy only if its start is this much poorer in it than on average
STAND_IN = 8  # · scale: takes the place of a Ritz value that does not exist; T is at most 3 · scale


class State(NamedTuple):
    """State of the iteration between two cycles."""

    y: Array
    """Kept Ritz vectors, most wanted first, and the vector to continue with, ``(..., l + 1, m)``."""
    theta: Array
    """Their Ritz values, ``(..., l)``."""
    live: Array
    """Flags of the rows that exist; the others are zero."""
    found: Array
    """The k values with which the present check began, ``(..., k)``; NaN before the first."""
    w_rest: Array
    rest: Array
    """Leftover Ritz pairs when the check began, more accurate than those of the check, ``(..., l − k[, m])``."""
    scale: Array
    """The largest size of ``A q`` and of θ so far, a lower bound of ‖A‖."""
    residual: Array
    """Largest estimated residual of the k wanted, relative to `scale`."""
    checks: Array
    growth: Array
    """Growth, since the check began, of the last vector's part in a copy of each wanted eigenvalue, ``(..., k)``."""
    done: Array
    n_iter: Array


class Found(NamedTuple):
    """The result, with one vector per row."""

    w: Array
    rows: Array
    w_rest: Array
    rest: Array
    """Leftover Ritz pairs, most wanted first; the first value is that of the next eigenvalue."""
    residual: Array
    scale: Array
    done: Array
    n_iter: Array


class Plan(NamedTuple):
    """The static choices of an iteration."""

    k: int
    which: str
    p: int
    """Rows of the basis."""
    l: int  # noqa: E741
    """Rows that a restart keeps."""
    rtol: float
    """Largest accepted residual, relative to ‖A‖."""


def preference(theta: Array, which: str) -> Array:
    """How much each value is wanted: larger means more."""
    return {"LA": theta, "SA": -theta}[which] if which != "LM" else namespace_of(theta).abs(theta)


def lanczos(a: SelfAdjoint, plan: Plan, v0: Array | None, options: LoopOptions) -> Found:
    """Find the `plan.k` most wanted eigenpairs of `a`."""

    def active(state: State) -> Array:
        return ~state.done & (state.scale < float("inf"))  # an item with NaN is not

    def body(state: State) -> State:
        new, go = cycle(a, plan, state), active(state)
        xp = namespace_of(go)
        pairs = zip(new, state, strict=True)
        return State(*(xp.where(with_axes(go, n.ndim - go.ndim), n, old) for n, old in pairs))

    state = run(
        active, body, _first(a, plan, v0),
        maxiter=options.maxiter, check_every=options.check_every, while_loop=options.while_loop,
    )  # fmt: skip
    return _refined(a, plan, state)


def _first(a: SelfAdjoint, plan: Plan, v0: Array | None) -> State:
    """The state before the first cycle: a start vector, and nothing kept."""
    xp, device = namespace_of(a.like), array_api_compat.device(a.like)
    start = noise(0, a.m, a.like) if v0 is None else xp.reshape(v0, (*a.batch, a.m))
    start = xp.broadcast_to(start, (*a.batch, a.m))[..., None, :]
    start = normalised(start, a.norm(start))
    number = real(full((), 0.0, a.like))
    count = xp.zeros(a.batch, dtype=xp.int32, device=device)
    return State(
        y=xp.concat([full((*a.batch, plan.l, a.m), 0.0, a.like), start], axis=-2),
        theta=full((*a.batch, plan.l), 0.0, number),
        live=xp.zeros((*a.batch, plan.l), dtype=xp.bool, device=device),
        found=full((*a.batch, plan.k), float("nan"), number),
        w_rest=full((*a.batch, plan.l - plan.k), 0.0, number),
        rest=full((*a.batch, plan.l - plan.k, a.m), 0.0, a.like),
        scale=full(a.batch, 0.0, number),
        residual=full(a.batch, float("inf"), number),
        checks=count,
        growth=full((*a.batch, plan.k), 1.0, number),
        done=xp.zeros(a.batch, dtype=xp.bool, device=device),
        n_iter=count,
    )


def cycle(a: SelfAdjoint, plan: Plan, state: State) -> State:
    """Extend the basis to p rows, take Ritz pairs, keep l of them, and decide how to go on."""
    q, t_rows, beta, scale = _extended(a, plan, state)
    theta, s_t = _ritz(plan, state, t_rows, scale)
    xp = namespace_of(theta)
    is_present = theta < _stand_in(scale) / 2
    growth = _grown(plan, state.growth, theta, s_t, beta, scale)
    # One more than is kept, for the next eigenvalue.
    theta = theta[..., : plan.l + 1]
    residual = beta[..., None] * xp.abs(s_t[..., : plan.l + 1, -1])
    live = is_present[..., : plan.l]
    size = xp.max(xp.where(live, xp.abs(theta[..., : plan.l]), full((), 0.0, theta)), axis=-1)
    scale = xp.maximum(scale, size)
    state = state._replace(theta=theta[..., : plan.l], live=live, scale=scale, growth=growth, n_iter=state.n_iter + 1)
    # A restart keeps the Ritz vectors and the vector that follows the basis.
    kept = s_t[..., : plan.l, :] @ q[..., :-1, :]
    return _decided(a, plan, state, kept, q[..., -1:, :], theta, residual)


def _extended(a: SelfAdjoint, plan: Plan, state: State) -> tuple[Array, Array, Array, Array]:
    """The basis (p rows and the next one), the rows ``T_j,i≤j`` that are new, the last β, and the scale."""
    xp = namespace_of(state.y)
    l, p = plan.l, plan.p  # noqa: E741
    q = xp.concat([state.y, full((*a.batch, p - l, a.m), 0.0, state.y)], axis=-2)
    scale, rows, beta = state.scale, [], state.scale
    unit = eps(xp, a.like.dtype)
    noise_floor = unit * noise(1, a.m, a.like)
    noise_floor = xp.concat([noise_floor, noise_floor])  # a part of it is another direction at each step
    zeros = full((*a.batch, 1, p - l), 0.0, a.like)
    for j in range(l, p):
        basis = q[..., : j + 1, :]
        y = a.apply(q[..., j : j + 1, :])
        h = a.inner(y, basis)
        # Noise at rounding level leaves an invariant subspace in a random direction, and never divides by zero.
        size = scale + xp.astype(scale == 0, scale.dtype)
        y = y - h @ basis
        y = y + as_dtype(size, y)[..., None, None] * noise_floor[j % a.m : j % a.m + a.m]
        # Orthogonalise again, and once more: at rounding level one pass may leave nothing but rounding.
        g = a.inner(y, basis)
        y = y - g @ basis
        h = h + g
        y = a.without(y, basis)
        beta = a.norm(y)
        q = put_row(q, j + 1, normalised(y, beta))
        # An invariant subspace: the noise is no part of A.
        beta = xp.where(beta > 4 * unit * size[..., None], beta, xp.zeros_like(beta))[..., 0]
        scale = xp.maximum(scale, (real_dot(h, h)[..., 0] + beta * beta) ** 0.5)  # ‖A q_j‖
        rows.append(xp.concat([h, zeros[..., : p - j - 1]], axis=-1))
    return q, xp.concat(rows, axis=-2), beta, scale


def _ritz(plan: Plan, state: State, t_rows: Array, scale: Array) -> tuple[Array, Array]:
    """All Ritz values, most wanted first, and the rows ``sᵀ`` that combine the basis to Ritz vectors."""
    xp = namespace_of(t_rows)
    p = plan.p
    stand_in = _stand_in(scale)
    # T is diagonal in the kept vectors; values that do not exist are moved out of the spectrum.
    lower = xp.concat([_diagonal(xp.where(state.live, state.theta, stand_in), p, t_rows), t_rows], axis=-2)
    below = xp.tril(lower, k=-1)  # only the lower triangle was computed: twice it, before the Hermitian part
    return _ordered(hermitian_part(2 * below + xp.tril(xp.triu(lower))), stand_in, plan.which)


def _ordered(t_t: Array, stand_in: Array, which: str) -> tuple[Array, Array]:
    """Eigenvalues of T, most wanted first, stand-ins last, and the rows ``sᵀ`` that combine the basis, from ``Tᵀ``."""
    xp = namespace_of(t_t)
    theta, u = eigh(t_t)  # the eigenvectors of Tᵀ are conj(s)
    key = xp.where(theta > stand_in / 2, full((), -float("inf"), theta), preference(theta, which))
    order = xp.argsort(key, axis=-1, descending=True, stable=True)
    rows = xp.take_along_axis(adjoint(u), xp.broadcast_to(order[..., None], u.shape), axis=-2)
    return xp.take_along_axis(theta, order, axis=-1), rows


def _decided(
    a: SelfAdjoint, plan: Plan, state: State, kept: Array, following: Array, theta: Array, residual: Array
) -> State:
    """Go on, begin a check, or stop."""
    xp = namespace_of(theta)
    # Has the search converged, would it have met a copy, is the next eigenvalue placed, are the k as before the check?
    k, tol = plan.k, plan.rtol * state.scale
    key = preference(theta, plan.which)
    distance = key[..., k - 1] - key[..., k]
    converged = xp.max(residual[..., :k], axis=-1) <= tol
    shown = POOREST * xp.min(state.growth, axis=-1) >= kept.shape[-1] ** 0.5
    placed = (residual[..., k] <= tol) | (shown & (residual[..., k] <= distance / 8))
    same = xp.all(xp.abs(theta[..., :k] - state.found) <= 4 * tol[..., None], axis=-1)  # NaN: not yet
    done = converged & placed & same
    # A check keeps the k, drops everything else, and continues with a new random vector.
    check = converged & ~same & (placed | (state.checks == 0))
    first_k = xp.arange(plan.l, device=array_api_compat.device(theta)) < k
    live = state.live & (first_k | ~check[..., None])
    leftover, kept = kept[..., k:, :], xp.where(live[..., None], kept, xp.zeros_like(kept))
    fresh = _fresh(a, state.checks, kept)
    size = _nonzero(state.scale)
    new = check[..., None]
    return state._replace(
        y=xp.concat([kept, xp.where(new[..., None], fresh, following)], axis=-2),
        live=live,
        found=xp.where(new, theta[..., :k], state.found),
        w_rest=xp.where(new, theta[..., k : plan.l], state.w_rest),
        rest=xp.where(new[..., None], leftover, state.rest),
        residual=xp.max(residual[..., :k], axis=-1) / size,
        checks=state.checks + xp.astype(check, state.checks.dtype),
        growth=xp.where(new, xp.ones_like(state.growth), state.growth),
        done=done,
    )


def _grown(plan: Plan, growth: Array, theta: Array, s_t: Array, beta: Array, scale: Array) -> Array:
    """Growth of the part in a copy of each wanted eigenvalue, by which a check would have met it.

    Let u be an eigenvector for λ, orthogonal to the k found. By ``A Q = Q T + β q_{p+1} e_pᴴ`` its parts in the Ritz
    vectors are ``β s_p,i ⟨u, q_{p+1}⟩ / (λ − θ_i)``, so in this cycle its part in the next vector has grown by
    ``1 / |β Σ_i s_l+1,i s_p,i / (λ − θ_i)|``. It cannot exceed 1. So a copy of which the random start of the check has
    a part c, on average ``c² = 1 / m``, does not exist once the growth exceeds 1 / c; c is taken to be at least
    `POOREST` times its average. The residual of the next Ritz value alone is not enough: with it a cut cluster went
    unnoticed in 8 of 1950 random matrices, and with a basis of 12 in 87 of 1500.
    """
    xp = namespace_of(theta)
    k, unit = plan.k, eps(xp, theta.dtype)
    gap = theta[..., :k, None] - theta[..., None, k:]
    gap = xp.where(xp.abs(gap) > unit * scale[..., None, None], gap, unit * _nonzero(scale)[..., None, None])
    coupling = conj(s_t[..., k:, plan.l]) * s_t[..., k:, -1]
    fade = beta[..., None] * xp.abs(xp.sum(coupling[..., None, :] / as_dtype(gap, coupling), axis=-1))
    return xp.minimum(growth / xp.maximum(fade, full((), unit, fade)), full((), unit**-2, fade))


def _fresh(a: SelfAdjoint, checks: Array, kept: Array) -> Array:
    """A random unit vector orthogonal to the kept rows, a different one for each check of an item."""
    xp, m = namespace_of(kept), kept.shape[-1]
    phase = xp.astype(checks + 1, real(kept).dtype)[..., None] * (20 * m**0.5)
    z = as_dtype(xp.sin(phase * real(noise(2, m, kept))), kept)[..., None, :]
    for _ in range(2):
        z = a.without(z, kept)
        z = normalised(z, a.norm(z))
    return z


def _refined(a: SelfAdjoint, plan: Plan, state: State) -> Found:
    """Repeat Rayleigh–Ritz on the k + 1 most wanted, for eigenvalues to rounding and residuals that are computed."""
    xp = namespace_of(state.y)
    k, n = plan.k, plan.k + 1
    y = state.y[..., :n, :]
    y = 1.5 * y - a.inner(y, y) @ y / 2  # orthonormal to rounding: a Newton step for (Y Yᴴ)^(-1/2) Y
    ay = a.apply(y)
    stand_in = _stand_in(state.scale)
    # Pairs that do not exist are zero rows; a stand-in keeps their values out of the way.
    missing = xp.where(state.live[..., :n], xp.zeros_like(stand_in), stand_in)
    g = a.inner(ay, y)  # g_ji = ⟨y_i, A y_j⟩: the transpose of Yᴴ A Y
    theta, s_t = _ordered(hermitian_part(g + _diagonal(missing, n, g)), stand_in, plan.which)
    y, ay = s_t @ y, s_t @ ay
    residual = a.norm(ay - as_dtype(theta, y)[..., None] * y)
    size = _nonzero(state.scale)[..., None]
    return Found(
        w=theta[..., :k],
        rows=y[..., :k, :],
        w_rest=xp.concat([theta[..., k:], state.w_rest[..., 1:]], axis=-1),
        rest=state.rest,
        residual=residual[..., :k] / size,
        scale=state.scale,
        done=state.done,
        n_iter=state.n_iter,
    )


def _stand_in(scale: Array) -> Array:
    """A value outside the spectrum, for Ritz pairs that do not exist."""
    return STAND_IN * _nonzero(scale)[..., None]


def _nonzero(scale: Array) -> Array:
    """`scale`, and 1 where it is zero."""
    xp = namespace_of(scale)
    return xp.where(scale > 0, scale, xp.ones_like(scale))


def _diagonal(x: Array, columns: int, like: Array) -> Array:
    """The diagonal matrix of x, ``(..., l, columns)``."""
    xp = namespace_of(x)
    eye = xp.eye(x.shape[-1], columns, dtype=like.dtype, device=array_api_compat.device(like))
    return as_dtype(x, like)[..., None] * eye
