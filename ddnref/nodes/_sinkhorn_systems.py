"""The linear system behind both derivatives of a transport plan, and the estimate of their errors.

`ddnref.nodes._sinkhorn` has the equations.
"""

from __future__ import annotations

from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, as_dtype, double, namespace_of
from ddnref._core.arrays import eps as machine_eps
from ddnref._kernels import dense
from ddnref.nodes._sinkhorn_plan import (
    PROBES,
    ROUNDING,
    _dropped,
    _gauged,
    _Laplacian,
    _laplacian,
    _log,
    _probes,
    _reciprocal,
    _residual,
    _same_block,
)


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
