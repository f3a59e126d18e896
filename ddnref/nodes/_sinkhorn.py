r"""Entropic optimal transport by Sinkhorn's iteration in the logarithmic domain, and its VJP from the plan alone.

    P = argmin ⟨C, P⟩ + ε Σ P (log P − 1)   subject to   P 1 = p,  Pᵀ 1 = q,        P_ij = exp(φ_i + γ_j − C_ij / ε)

With ``T = P̄ ∘ P`` and the symmetric system

    [ diag(P1)     P     ] [ α ]   [ T 1  ]
    [   Pᵀ     diag(Pᵀ1) ] [ β ] = [ Tᵀ 1 ]        C̄ = P ∘ (α 1ᵀ + 1 βᵀ − P̄) / ε,   p̄ = α,   q̄ = β

whose null vector (1, −1) shifts α against β. This gauge is free because both marginals have the same sum.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import array_api_compat

from ddnref._core.arrays import Array, full, is_true, namespace_of, nan_where, refuse_recording
from ddnref._core.arrays import eps as machine_eps
from ddnref._core.checks import conform
from ddnref._core.loops import CHECK_EVERY, LoopOptions, WhileLoop, run
from ddnref._kernels import dense
from ddnref._kernels.public import public
from ddnref.errors import ConvergenceError, SingularError
from ddnref.implicit._structures import Dense, checked_solve


class SinkhornInfo(NamedTuple):
    """How the iteration ended for each item."""

    converged: Array
    """(...) flags: the error of the marginals is within `rtol`."""
    n_iter: Array
    """(...) integers: updates of both potentials."""
    residual_norm: Array
    """(...): ``Σ |P 1 − p|`` of the returned plan; its columns sum to q up to rounding."""
    feasible: Array
    """(...) flags: marginals finite, not negative, each with sum one."""


@public
def sinkhorn(
    cost: Array,
    p: Array,
    q: Array,
    /,
    *,
    eps: float,
    rtol: float | None = None,
    maxiter: int = 10_000,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, SinkhornInfo]:
    r"""Entropic optimal transport plan between two histograms.

    Parameters
    ----------
    cost : (..., n, m) real array
    p : (..., n) array
    q : (..., m) array
        Marginals: not negative, each with sum one (up to ``64 eps n`` of the dtype). An entry of zero empties its
        row or column exactly.
    eps : float, positive
        Strength ε of the entropy, in the units of the cost. The number of updates grows at least as ``1 / eps``.
    rtol : float, optional
        Largest error ``Σ |P 1 − p|`` of the marginals, relative to their sum of one. Default 1e-9 in float64, 1e-5
        in float32.
    maxiter : int
        Updates of both potentials.
    check_every : int
        Updates between two looks at the flags.
    throw : bool, default True
        Raise for items that fail; with ``False`` these are NaN, and only the flags of the loop are read.
    while_loop : callable, optional
        A loop such as ``jax.lax.while_loop``, where the call is traced.

    Returns
    -------
    plan : (..., n, m) array
        NaN in items that failed.
    info : SinkhornInfo

    Raises
    ------
    ConvergenceError
        The marginals admit no plan (negative, not finite, not of sum one), or the error stayed above `rtol`.
    TypeError, ValueError
        Mixed libraries or dtypes, complex arrays; shapes that do not fit; `eps` not positive.

    See Also
    --------
    sinkhorn_vjp : its reverse-mode derivative.

    Notes
    -----
    .. math:: \varphi_i = \log p_i - \log \sum_j e^{\gamma_j - C_{ij}/\varepsilon}, \qquad
              \gamma_j = \log q_j - \log \sum_i e^{\varphi_i - C_{ij}/\varepsilon}

    Rounding leaves an error of a few tens of ``max|C| / eps`` units of the last digit; a smaller `rtol` is never met.
    Cost: two exponentials of an n×m array per update; three such arrays.

    References
    ----------
    .. [1] M. Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", NeurIPS (2013).
    .. [2] G. Peyré, M. Cuturi, "Computational Optimal Transport" (2019), sections 4.2 and 4.4.

    Examples
    --------
    >>> import numpy as np
    >>> half = np.full(2, 0.5)
    >>> plan, info = ddnref.nodes.sinkhorn(np.asarray([[0.0, 1.0], [1.0, 0.0]]), half, half, eps=0.5)
    >>> plan.round(4)
    array([[0.4404, 0.0596],
           [0.0596, 0.4404]])
    """
    xp = conform("(n+,m+),(n),(m)", real_only=True, cost=cost, p=p, q=q).xp
    refuse_recording("sinkhorn", cost)
    if rtol is None:
        rtol = 1e-5 if cost.dtype == xp.float32 else 1e-9
    # Items that admit no plan iterate on a harmless problem, so that nothing overflows or warns.
    feasible = _feasible(p) & _feasible(q) & xp.all(xp.isfinite(cost), axis=(-2, -1))
    bad = ~feasible[..., None]
    safe_p, safe_q = (xp.where(bad, full(z.shape, 1 / z.shape[-1], z), z) for z in (p, q))
    k = xp.where(bad[..., None], full((), 0.0, cost), -cost / eps)
    state = _iterate(k, safe_p, safe_q, feasible, LoopOptions(rtol, maxiter, check_every, while_loop, throw))
    plan = xp.exp(state.phi[..., :, None] + (state.gamma[..., None, :] + k))
    # The error in the loop is that of the plan before; judge the one that is returned.
    error = nan_where(~feasible, xp.sum(xp.abs(xp.sum(plan, axis=-1) - safe_p), axis=-1))
    info = SinkhornInfo((state.error <= rtol) | (error <= rtol), state.n_iter, error, feasible)
    if throw and is_true(xp.any(~info.converged)):
        _raise(info, rtol)
    return nan_where(~info.converged[..., None, None], plan), info


class _State(NamedTuple):
    phi: Array
    gamma: Array
    error: Array
    n_iter: Array


def _iterate(k: Array, p: Array, q: Array, feasible: Array, options: LoopOptions) -> _State:
    """Potentials φ, γ over ``k = −C / ε``."""
    xp, rtol = namespace_of(k), options.rtol
    log_p, log_q = _log(p), _log(q)

    def active(s: _State) -> Array:
        return s.error > rtol

    def body(s: _State) -> _State:
        phi = log_p - _log_sum_exp(s.gamma[..., None, :] + k, -1)
        # The new φ tells the row sums p exp(φ − φ_new) of the plan before it, each at most one.
        change = xp.where(p > 0, s.phi, xp.zeros_like(p)) - xp.where(p > 0, phi, xp.zeros_like(p))
        error = xp.sum(p * xp.abs(xp.expm1(change)), axis=-1)
        # Items that have converged stay as they are, bit for bit.
        error = xp.where(active(s), error, s.error)
        go = (error > rtol)[..., None]
        phi = xp.where(go, phi, s.phi)
        gamma = xp.where(go, log_q - _log_sum_exp(phi[..., :, None] + k, -2), s.gamma)
        return _State(phi, gamma, error, s.n_iter + xp.astype(go[..., 0], s.n_iter.dtype))

    # NaN as the error of an infeasible item is not above rtol, and so the item is never active.
    error = xp.where(feasible, full(feasible.shape, float("inf"), k), full((), float("nan"), k))
    n_iter = xp.zeros(feasible.shape, dtype=xp.int64, device=array_api_compat.device(k))
    start = _State(log_p, log_q - _log_sum_exp(log_p[..., :, None] + k, -2), error, n_iter)
    return run(
        active, body, start, maxiter=options.maxiter, check_every=options.check_every, while_loop=options.while_loop
    )


def _log(p: Array) -> Array:
    """Logarithm, −∞ of zero without a warning."""
    xp = namespace_of(p)
    return xp.where(p > 0, xp.log(xp.where(p > 0, p, xp.ones_like(p))), full((), float("-inf"), p))


def _log_sum_exp(x: Array, axis: int) -> Array:
    xp = namespace_of(x)
    top = xp.max(x, axis=axis, keepdims=True)
    total = xp.log(xp.sum(xp.exp(x - top), axis=axis, keepdims=True))
    return xp.squeeze(total + top, axis=axis)


def _feasible(p: Array) -> Array:
    """Whether a histogram is not negative and has sum one up to rounding, n eps, with 64 for sums done elsewhere."""
    xp = namespace_of(p)
    off = xp.abs(xp.sum(nan_where(~xp.isfinite(p), p), axis=-1) - 1)
    return xp.all(p >= 0, axis=-1) & (off <= 64 * machine_eps(xp, p.dtype) * p.shape[-1])


def _raise(info: SinkhornInfo, rtol: float) -> NoReturn:
    xp = namespace_of(info.converged)
    if not is_true(xp.all(info.feasible)):
        raise ConvergenceError(
            "The marginals given to sinkhorn admit no plan: p and q must be finite, not negative and each of sum one "
            "(and the cost finite). Divide each histogram by its sum, or pass throw=False to get NaN for these items."
        )
    worst = float(xp.max(info.residual_norm))
    raise ConvergenceError(
        f"sinkhorn did not converge: the error of the marginals is {worst:.1e} > rtol {rtol:.1e} after "
        f"{int(xp.max(info.n_iter))} updates. The most likely cause is an eps that is small compared with the cost. "
        "Raise eps, maxiter or rtol, or pass throw=False to get NaN for these items."
    )


@public
def sinkhorn_vjp(plan_bar: Array, plan: Array, /, *, eps: float, throw: bool = True) -> tuple[Array, Array, Array]:
    r"""Gradient of a loss of `sinkhorn`: one direct solve, without any of its iterates.

    Parameters
    ----------
    plan_bar, plan : (..., n, m) arrays
        Cotangent of the plan, and the plan.
    eps : float
        As in `sinkhorn`.
    throw : bool, default True
        Raise `SingularError`, reading one flag; with ``False`` such items are NaN.

    Returns
    -------
    cost_bar : (..., n, m) array
    p_bar : (..., n) array
    q_bar : (..., m) array
        The gauge is fixed so that both gradients have mean zero over the entries that are not zero, because the
        marginals move with their sums fixed. Entries of zero stay zero, and their gradient is 0.

    Raises
    ------
    SingularError
        The plan splits into parts that exchange no mass (to working precision), between which the gauge of the
        marginals is free: `eps` is too small for a gradient.
    TypeError, ValueError
        As `sinkhorn`.

    Notes
    -----
    Of the system of order n + m, the larger side is eliminated. What remains is a graph Laplacian, whose diagonal
    is summed from the rest so that nothing cancels; adding ``q qᵀ`` fixes the gauge and makes it positive definite.
    A cotangent ``a_i + b_j`` does not change the cost's gradient, so the mean of its rows is taken out beforehand.
    The error of the gradient is that of the plan times the condition of the Laplacian. Cost: 2 n m² + ⅔ m³ flops for
    m ≤ n.

    References
    ----------
    .. [1] M. Eisenberger, A. Toker, L. Leal-Taixé, F. Bernard, D. Cremers, "A unified framework for implicit
       Sinkhorn differentiation", CVPR (2022), theorem 3.

    Examples
    --------
    >>> import numpy as np
    >>> half, cost = np.full(2, 0.5), np.asarray([[0.0, 1.0], [1.0, 0.0]])
    >>> plan, _ = ddnref.nodes.sinkhorn(cost, half, half, eps=0.5)
    >>> ddnref.nodes.sinkhorn_vjp(cost, plan, eps=0.5)[0].round(4)  # of the transported cost
    array([[ 0.105, -0.105],
           [-0.105,  0.105]])
    """
    xp = conform("(n+,m+),(n,m)", real_only=True, plan=plan, plan_bar=plan_bar).xp
    if 0 in plan.shape[:-2]:  # an empty batch
        return xp.zeros_like(plan), xp.zeros_like(plan[..., 0]), xp.zeros_like(plan[..., 0, :])
    # Eliminate the larger side, so that the smaller one is left to solve for.
    if plan.shape[-2] < plan.shape[-1]:
        alpha, beta, singular = _potentials(xp.matrix_transpose(plan_bar), xp.matrix_transpose(plan))
        alpha, beta = beta, alpha
    else:
        alpha, beta, singular = _potentials(plan_bar, plan)
    if throw and is_true(xp.any(singular)):
        raise SingularError(
            "The plan given to sinkhorn_vjp splits into parts that exchange no mass, or is not finite: the linear "
            "system of its gradient is singular to working precision. The most likely cause is an eps that is too "
            "small for the cost. Raise eps, or pass throw=False to get NaN for these items."
        )
    alpha, beta = (nan_where(singular[..., None], z) for z in (alpha, beta))
    cost_bar = plan * (alpha[..., :, None] + beta[..., None, :] - plan_bar) / eps
    used = xp.sum(plan, axis=-1) > 0, xp.sum(plan, axis=-2) > 0
    return cost_bar, _mean_zero(alpha, used[0] | singular[..., None]), _mean_zero(beta, used[1] | singular[..., None])


def _potentials(plan_bar: Array, plan: Array) -> tuple[Array, Array, Array]:
    """α (..., n) and β (..., m) of the symmetric system, rows eliminated, and which items are singular."""
    xp = namespace_of(plan)
    rows = xp.sum(plan, axis=-1, keepdims=True)
    one = xp.ones_like(rows)
    inverse = xp.where(rows > 0, 1 / xp.where(rows > 0, rows, one), 0 * rows)  # an empty row takes no part
    # Take out the mean of each row of the cotangent, which α alone accounts for: then T 1 = 0.
    mean = inverse * xp.sum(plan_bar * plan, axis=-1, keepdims=True)
    t = plan * (plan_bar - mean)
    # Eliminate α: a graph Laplacian in β, whose diagonal is summed from the rest so that nothing cancels.
    k = xp.matrix_transpose(plan) @ (inverse * plan)
    columns = xp.sum(plan, axis=-2)
    eye = dense.identity(plan.shape[-1], plan)
    off = k * (1 - eye)
    empty = xp.astype(columns == 0, plan.dtype) + (columns - columns)  # NaN stays NaN
    laplacian = eye * (xp.sum(off, axis=-1) + empty)[..., None] - off
    # Adding q qᵀ fixes the gauge, qᵀβ = 0, and makes the matrix positive definite.
    gauged = laplacian + columns[..., :, None] * columns[..., None, :]
    beta, singular = checked_solve(Dense(gauged), xp.sum(t, axis=-2)[..., None])
    alpha = mean - inverse * (plan @ beta)
    return alpha[..., 0], beta[..., 0], singular


def _mean_zero(x: Array, used: Array) -> Array:
    """Shift the used entries to mean zero; the others are 0."""
    xp = namespace_of(x)
    mask = xp.astype(used, x.dtype)
    mean = xp.sum(mask * x, axis=-1, keepdims=True) / xp.sum(mask, axis=-1, keepdims=True)
    return mask * (x - mean)
