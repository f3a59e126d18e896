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
    double,
    first_flagged,
    full,
    is_true,
    listed,
    namespace,
    namespace_of,
    nan_where,
    refuse_recording,
)
from ddnref._core.arrays import eps as machine_eps
from ddnref._core.checks import check_dtypes, check_real, check_shapes
from ddnref._core.loops import CHECK_EVERY, WhileLoop
from ddnref._kernels.public import public
from ddnref.errors import ConvergenceError, SingularError
from ddnref.implicit._tangents import require_direction
from ddnref.linalg._solve import summed_to
from ddnref.nodes._sinkhorn_plan import _residual
from ddnref.nodes._sinkhorn_steps import _finish, _scale
from ddnref.nodes._sinkhorn_systems import SinkhornVjpInfo, _gradients, _tangent

SCALED_ENOUGH = 0.6
"""Scaling goes on to an error of the marginals of eps to this power, from where one Newton step is enough."""
UPDATES = 2
"""Updates per column after which an item goes on with Newton steps, each of which costs about as much as m updates."""


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
