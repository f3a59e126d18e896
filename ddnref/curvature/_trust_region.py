r"""Steps of a trust region, ``min gᵀp + ½ pᵀHp`` subject to ``‖p‖ ≤ r``, and their derivative.

p is a minimum if and only if for some ε

    (H + ε I) p = −g,   H + ε I ⪰ 0,   ε ≥ 0,   ε = 0 or ‖p‖ = r.

Consider a step on the boundary with ``A = H + ε I`` positive definite. Along tangents of H, g and r

    A ṗ + ε̇ p = −(Ḣ p + ġ),    pᵀṗ = r ṙ.

With ``q = A⁻¹ p``, ``s = A⁻¹ p̄`` and ``μ = pᵀs / pᵀq`` the adjoint system has the solution ``u = s − μ q``, and

    ḡ = −u,    H̄ = −u pᵀ (its symmetric part for an array),    r̄ = μ r.

Inside the region ε = 0 and μ = 0. In the hard case A is singular: the step is not unique, and no derivative exists.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple, NoReturn

import array_api_compat

from ddnref._core.arrays import (
    Array,
    among,
    eps,
    full,
    is_true,
    named_arrays,
    namespace,
    namespace_of,
    nan_where,
    refuse_recording,
    with_axes,
)
from ddnref._core.checks import check_precision, check_real
from ddnref._core.loops import WhileLoop
from ddnref._kernels.dense import eigh, hermitian_part, matvec, outer
from ddnref._kernels.public import guarded, public
from ddnref._kernels.vectors import norm_of_pieces, safe_norm
from ddnref.curvature import _model_space
from ddnref.curvature._gram import not_negative
from ddnref.curvature._model_space import Extent, Space
from ddnref.curvature.ggn._state import Ggn
from ddnref.curvature.hessian._expansion import flat
from ddnref.curvature.hessian._solve import HessianFactor
from ddnref.errors import ConvergenceError, GaugeError, NonFiniteError, OptimalityError, SingularError
from ddnref.krylov import cg
from ddnref.linalg._solve import summed_to
from ddnref.networks._checks import like_params
from ddnref.operators import LinearOperator, add, as_operator, dense, diagonal
from ddnref.operators._blocks import self_adjoint
from ddnref.operators._operator import check_ending, cotangent

MODELS = ("exact", "absolute")
CHECK_EVERY = 4  # products; a look takes as long as one or two of them
INDEFINITE = 1e3  # · eps · λ_max: a Gram matrix with an eigenvalue below minus this is none
SOLVED = 2**8  # · eps: residual to which the systems of the derivative are solved where rounding allows it
LOST = 2**12  # · eps: reciprocal amplification from which on a derivative has no digits worth having


class TrustRegionInfo(NamedTuple):
    """Facts about a step, with one entry for each item of the batch, and the model, for steps of another radius."""

    converged: Array
    """(...) bool: whether `residual_norm` is at most `rtol` (by default ``sqrt(eps)``, which raises nothing)."""
    n_iter: int
    """Dimensions of the space; 0 for a `Ggn`, whose space is everything."""
    residual_norm: Array
    """(...): the part of ``H p`` outside of the space, ``‖(I − QQᵀ) H p‖ / max(‖g‖, ε ‖p‖)``. In the exact model this
    is the residual of ``(H + ε I) p = −g``, and about the relative error of p. In the absolute model it is neither."""
    damping: Array
    """(...): ε."""
    predicted: Array
    """(...): the decrease ``−gᵀp − ½ pᵀHp`` that the model expects, with ``|H|`` in the absolute one."""
    boundary: Array
    """(...) bool: whether the step ends on the boundary."""
    hard: Array
    """(...) bool: whether it is the hard case, in which p has a part along an eigenvector of the smallest eigenvalue
    that g does not determine, and of arbitrary sign if g has none."""
    lambda_min: Array
    """(...): the smallest eigenvalue of H in the space, which the smallest eigenvalue of H does not exceed."""
    n_products: int
    """Products of H with a vector, the one that shows the batch axes included."""
    space: Any
    """The model on the space."""

    @property
    def kind(self) -> Any:
        """``"interior"``, ``"boundary"`` or ``"hard"``; for a batch nested lists of them. Reads the host."""

        def named(boundary: Array, hard: Array) -> Any:
            if boundary.ndim:
                return [named(boundary[i, ...], hard[i, ...]) for i in range(boundary.shape[0])]
            return "hard" if is_true(hard) else "boundary" if is_true(boundary) else "interior"

        return named(self.boundary, self.hard)

    @guarded
    def retry(self, radius: Array | float, *, throw: bool = True) -> tuple[Any, TrustRegionInfo]:
        """Return the step for another radius, and its `TrustRegionInfo`, from the same space, without products.

        A larger radius may need a larger space than the first one took. Then ``converged`` is false, or `rtol` raises.
        """
        p, info = _step(self.space, _radius(radius, self.damping), throw)
        return p, info._replace(n_products=0)


@public
def trust_region_step(
    a: Any,
    g: Any,
    radius: Array | float,
    /,
    *,
    model: str = "exact",
    k: int = 30,
    probes: int = 0,
    rtol: float | None = None,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
) -> tuple[Any, TrustRegionInfo]:
    r"""Minimum of ``gᵀp + ½ pᵀHp`` subject to ``‖p‖₂ ≤ radius``, for any symmetric H, indefinite or singular ones too.

    Parameters
    ----------
    a : LinearOperator, (..., n, n) array, HessianFactor or Ggn
        H: a self-adjoint operator, such as ``chain.hessian_operator(x, t)``, or an array, whose symmetric part is
        taken; a factored Hessian, whose damping is no part of H and only says where its inverse is good: solves take
        the place of products in building the space; or a Gauss–Newton matrix, from `ggn_reducer`.
    g : (..., \*domain_shape) array, or a list of arrays
        The gradient; a list like ``chain.params`` for a `HessianFactor` or a `Ggn`.
    radius : float, or (...) array, positive
    model : {"exact", "absolute"}
        H itself, or ``|H|``, the saddle-free model [2]_: negative curvature counts as positive, and the step leaves a
        saddle point along it. Training took about half of the steps with it.
    k : int, default 30
        Largest dimension of the Krylov space in which the model is minimised. Each costs one product. A `Ggn` needs
        none.
    probes : int, default 0
        Further dimensions from a random start, which find directions of negative curvature that g has no part in.
        Without them, and with k < n, the hard case is recognised only for ``g = 0``.
    rtol : float, optional
        The exact model takes no more products once ``info.residual_norm`` is at most this, and raises if it is larger
        in the end; 0.1 is enough for training. With 0 it takes all k. By default it stops at ``sqrt(eps)``, raises
        nothing, and with ``k >= n`` takes all n, which gives the exact minimum, also in the hard case. The absolute
        model always takes k products, because the residual does not tell its error.
    check_every : int, default 4
        Products between two looks at the residual. A look takes as long as one product with a small network, and reads
        one flag.
    throw : bool, default True
        Raise for what is not finite and for `rtol`, reading a few flags; with ``False`` items that are not finite, or
        whose radius is not positive, are NaN. With ``rtol=0`` too nothing is read, as under ``jax.jit``.

    Returns
    -------
    p : array or list of arrays like `g`
        The step, to be added to the parameters.
    info : TrustRegionInfo
        With ``damping``, ``predicted``, ``kind`` ("interior", "boundary" or "hard"), ``lambda_min``, ``n_products``,
        and ``retry(radius)``, which gives the step for another radius without products.

    Raises
    ------
    NonFiniteError
        `g` or H is not finite.
    ConvergenceError
        `rtol` was not reached: k is too small.
    ValueError
        A radius that is not positive and finite; an unknown model; k or check_every below 1; shapes that do not
        fit; an operator that is not self-adjoint; a Gram matrix that is not semidefinite, or of several groups.
    TypeError
        Mixed libraries or dtypes, complex arrays.

    See Also
    --------
    trust_region_step_vjp : the gradient.
    ddnref.networks.Chain.hessian_operator : the Hessian of a network.

    Notes
    -----
    p is a minimum if and only if for some ε

    .. math:: (H + \varepsilon I)\, p = -g, \qquad H + \varepsilon I \succeq 0, \qquad \varepsilon \geq 0, \qquad
              \varepsilon\, (r - \|p\|) = 0 .

    On the space H is a small matrix. One eigendecomposition gives the whole curve p(ε), and Newton's method for
    :math:`1/r - 1/\|p(\varepsilon)\|` the root, at no cost that matters: so a rejected step costs nothing. Lanczos'
    vectors are orthogonalised twice against all before. Cost for j ≤ k dimensions: j products, ``6 j² n`` flops,
    ``2 j n`` numbers of memory. A batch goes on until all its items have converged. A `HessianFactor` takes j solves
    and j products. Where the spectrum of H is wide, its space is better than
    Lanczos' of the same size, but a solve costs as much as 20 to 40 products. A `Ggn` costs one eigendecomposition of
    its Gram matrix, and three products with V.

    References
    ----------
    .. [1] N. I. M. Gould, S. Lucidi, M. Roma, Ph. L. Toint, "Solving the trust-region subproblem using the Lanczos
       method", SIAM J. Optim. 9 (1999).
    .. [2] Y. N. Dauphin et al., "Identifying and attacking the saddle point problem in high-dimensional non-convex
       optimization", NeurIPS (2014).
    .. [3] J. J. Moré, D. C. Sorensen, "Computing a trust region step", SIAM J. Sci. Stat. Comput. 4 (1983).

    Examples
    --------
    >>> import numpy as np
    >>> p, info = ddnref.curvature.trust_region_step(np.diag([2.0, -1.0]), np.asarray([2.0, 0.5]), 1.0)
    >>> info.kind, bool(info.damping > 1)
    ('boundary', True)
    >>> shorter, info = info.retry(0.5)
    >>> float(np.linalg.norm(p).round(12)), float(np.linalg.norm(shorter).round(12)), info.n_products
    (1.0, 0.5, 0)
    """
    if model not in MODELS:
        raise ValueError(f'model is {model!r}, expected "exact" or "absolute".')
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1.")
    absolute = model == "absolute"
    # The residual of the absolute model says too little about the step to end the space.
    extent = Extent(k, probes, 0.0 if absolute else rtol, check_every)
    if isinstance(a, HessianFactor):
        _single("g", a, g, throw)
        size = full((), 0.0, a._hessian.like)
        space = _model_space.inverse_space(a, list(g), _radius(radius, size), extent, absolute)
    elif isinstance(a, Ggn):
        space = _of_ggn(a, g, throw)
    else:
        _conform(a, g=g)
        refuse_recording("trust_region_step", **named_arrays(a=a, g=g))
        prepared = a.prepared() if isinstance(a, LinearOperator) else a
        # The product that shows the batch axes is the first of the space.
        start = _model_space.first(g, len(prepared.domain_shape) if isinstance(a, LinearOperator) else 1)
        adapted = self_adjoint(prepared, "trust_region_step", start)
        image = adapted.like if isinstance(a, LinearOperator) else None
        xp = namespace_of(adapted.like)
        # An image in every item shows the batch axes of both.
        g = xp.broadcast_to(g, (*adapted.batch, *adapted.shape))
        size = full(adapted.batch, 0.0, g)
        space = _model_space.krylov_space(adapted, g, image, _radius(radius, size), extent, absolute)
    if throw and not is_true(namespace_of(space.c).all(_finite(space))):
        raise NonFiniteError(
            f"g or H is not finite{among(~_finite(space))}. The most likely cause is a diverged step before this call, "
            "or activations that overflow. Take a smaller radius there, or pass throw=False to get NaN."
        )
    return _step(space._replace(rtol=rtol), _radius(radius, space.size), throw)


class TrustRegionVjpInfo(NamedTuple):
    """How the systems of the derivative were solved, for each item of the batch."""

    converged: Array
    """(...) bool: whether the step is a minimum at which a gradient exists, and the systems were solved."""
    n_iter: Array
    """(...) int32: steps of the iteration."""
    residual_norm: Array
    """(...): the larger relative residual of the two systems."""
    damping: Array
    """(...): ε, as the step tells it."""
    boundary: Array
    """(...) bool: whether the radius matters."""


@public
def trust_region_step_vjp(
    p_bar: Any,
    p: Any,
    a: Any,
    g: Any,
    radius: Array | float,
    /,
    *,
    check_rtol: float | None = None,
    rtol: float | None = None,
    maxiter: int | None = None,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[Any, ...], TrustRegionVjpInfo]:
    r"""Gradient of a loss of `trust_region_step` with the exact model.

    Parameters
    ----------
    p_bar, p : arrays or lists of arrays like `g`
        Cotangent of the step, and the step, by whichever method.
    a, g, radius
        As in `trust_region_step`, a `Ggn` excepted.
    check_rtol : float, optional
        `p` is accepted where ``‖(H + ε I) p + g‖ <= check_rtol · (‖g‖ + ‖H p‖)``, and its length or its damping counts
        as on the boundary within it; default ``sqrt(eps)``. A step on a Krylov space that is too small is refused.
    rtol, maxiter
        As in `ddnref.krylov.cg`, for the systems with H + ε I of an operator. By default they are solved as far as
        rounding allows, and at least to ``sqrt(eps)``. Arrays and factors are solved directly.
    throw : bool, default True
        Raise what is below, reading flags; with ``False`` the gradients of such items are NaN.
    while_loop : callable, optional
        ``jax.lax.while_loop`` under ``jax.jit`` (with ``throw=False``), for an operator.

    Returns
    -------
    (a_bar, g_bar, radius_bar)
        For an array `a_bar` is the symmetric gradient; for an operator it is a tuple, one cotangent for each parameter.
        For a `HessianFactor` it is left out, because it would take third derivatives of the network.
    info : TrustRegionVjpInfo

    Raises
    ------
    OptimalityError
        `p` is not the minimum of this problem.
    GaugeError
        No gradient exists: the hard case; or the minimum without a constraint lies on the boundary to rounding.
    SingularError
        Inside the region, H is singular to working precision.
    ConvergenceError
        A system was not solved to `rtol`.
    TypeError, ValueError
        As `trust_region_step`; an operator whose parameters have no gradient.

    Notes
    -----
    With :math:`A = H + \varepsilon I`, :math:`q = A^{-1} p`, :math:`s = A^{-1} \bar p` and, on the boundary,
    :math:`\mu = p^T s / p^T q`, inside :math:`\mu = 0`,

    .. math:: u = s - \mu q, \qquad \bar g = -u, \qquad \bar H = -\tfrac12 (u p^T + p u^T), \qquad \bar r = \mu r .

    Cost: two solves with A, one product and one ``params_vjp``. For a `HessianFactor` one more factorisation.

    Examples
    --------
    >>> import numpy as np
    >>> h, g = np.diag([2.0, -1.0]), np.asarray([2.0, 0.5])
    >>> p, _ = ddnref.curvature.trust_region_step(h, g, 1.0)
    >>> (_, g_bar, radius_bar), _ = ddnref.curvature.trust_region_step_vjp(p, p, h, g, 1.0)
    >>> np.abs(g_bar).max() < 1e-12, radius_bar.round(12)  # ½‖p‖² depends on the radius alone
    (np.True_, np.float64(1.0))
    """
    if isinstance(a, Ggn):
        raise TypeError("a is a Ggn, which has no gradient here. Pass chain.ggn_operator(x, t) and flat vectors.")
    if isinstance(a, HessianFactor):
        return _factor_vjp(p_bar, p, a, g, radius, check_rtol, throw)
    _conform(a, g=g, p=p, p_bar=p_bar)
    refuse_recording("trust_region_step_vjp", **named_arrays(p_bar=p_bar, p=p, a=a, g=g))
    is_array = not isinstance(a, LinearOperator)
    h = dense(hermitian_part(a), self_adjoint=True) if is_array else a.prepared()
    xp, axes, batch = namespace_of(p), len(h.domain_shape), tuple(p.shape[: p.ndim - len(h.domain_shape)])
    if p_bar.shape != p.shape:
        raise ValueError(f"p_bar has shape {tuple(p_bar.shape)}, expected {tuple(p.shape)} of p.")

    def rows(z: Array) -> Array:
        return xp.reshape(z, (*tuple(z.shape)[: z.ndim - axes], math.prod(h.domain_shape)))

    point = _point(
        rows(p), rows(xp.broadcast_to(g, p.shape)), rows(h(p)), _radius(radius, full(batch, 0.0, p)), check_rtol
    )
    both = xp.stack([p, p_bar])
    if is_array:
        solved = _by_eigenvectors(h.params[0], both, point.damping)
    else:
        solved = _by_iteration(h, both, point, rows, {"rtol": rtol, "maxiter": maxiter, "while_loop": while_loop})
    u, mu, info = _adjoint(point, rows(solved.x), solved, throw)
    u = xp.reshape(u, p.shape)
    a_bar = -hermitian_part(outer(u, p)) if is_array else tuple(a.params_vjp(a.params, -u, p))
    radius_bar = mu * point.radius
    return (a_bar, cotangent(-u, g), _like_radius(radius_bar, radius)), info


def _factor_vjp(
    p_bar: Any, p: Any, factor: HessianFactor, g: Any, radius: Array | float, check_rtol: float | None, throw: bool
) -> tuple[tuple[Any, ...], TrustRegionVjpInfo]:
    """Return the cotangents of g and the radius, by a factorisation of ``H + ε I``."""
    for name, entries in {"g": g, "p": p, "p_bar": p_bar}.items():
        _single(name, factor, entries, throw)
    hessian = factor._hessian
    blocks = [hessian.blocks([entry[None, ...] for entry in entries]) for entries in (p, g)]
    step, slope, hp = (flat(v)[0, :] for v in (*blocks, hessian.product(blocks[0])))
    point = _point(step, slope, hp, _radius(radius, step[0]), check_rtol)
    xp = namespace_of(step)
    # One factorisation for both systems; the damping is that of the step.
    right = hessian.blocks([xp.stack([a, b]) for a, b in zip(p, p_bar, strict=True)])
    size = norm_of_pieces(right, 2)
    found = HessianFactor(hessian, point.damping, "auto").solved(right)
    solved = _Solved(flat(found.x), found.error, found.steps[0], _amplified(flat(found.x), size, factor.norm), None)
    u, mu, info = _adjoint(point, solved.x, solved, throw)
    g_bar = [entry[0, ...] for entry in hessian.params(hessian.from_rows(-u[None, :]))]
    mu = xp.astype(mu * point.radius, g[0].dtype, copy=False)
    return (g_bar, _like_radius(mu, radius)), info


# --- the point and its systems ----------------------------------------------------------------------------------------


class _Point(NamedTuple):
    """A step as the equations see it."""

    p: Array  # (..., n)
    radius: Array  # (...)
    damping: Array  # (...)
    boundary: Array  # (...) bool
    scale: Array  # (...): a lower bound of ‖H + ε I‖
    wrong: Array  # (...) bool: not a minimum
    weak: Array  # (...) bool: on the boundary, but without force


class _Solved(NamedTuple):
    """Solutions of ``A x = p`` and ``A x = p̄``."""

    x: Array  # (2, ..., n)
    residual: Array  # (2, ...)
    n_iter: Array  # (...)
    singular: Array  # (...) bool: A is singular to working precision
    indefinite: Array | None  # (...) bool: A is not positive definite, where that is known


def _point(p: Array, g: Array, hp: Array, radius: Array, check_rtol: float | None) -> _Point:
    """Find the damping of a step, and judge whether it is a minimum."""
    xp = namespace_of(p)
    rtol = eps(xp, p.dtype) ** 0.5 if check_rtol is None else check_rtol
    size, size_g, size_hp = safe_norm(p), safe_norm(g), safe_norm(hp)
    safe = xp.where(size > 0, size, xp.ones_like(size))
    # ε = −pᵀ(H p + g) / pᵀp on the boundary
    direction = p / safe[..., None]
    boundary = xp.abs(size - radius) <= rtol * radius
    damping = -xp.sum(direction * (hp + g), axis=-1) / safe
    limit = rtol * (size_g + size_hp)
    weak = boundary & (xp.abs(damping) * size <= limit)
    damping = xp.where(boundary, damping, xp.zeros_like(damping))
    left = safe_norm(hp + g + damping[..., None] * p)
    wrong = ~(left <= limit) | (size > radius * (1 + rtol)) | (damping * size < -limit)
    return _Point(p, radius, damping, boundary, size_hp / safe + xp.abs(damping), wrong, weak)


def _by_eigenvectors(h: Array, both: Array, damping: Array) -> _Solved:
    """Solve with a matrix, whose smallest eigenvalue says whether the step is a minimum."""
    xp, unit = namespace_of(h), eps(namespace_of(h), h.dtype)
    w, v = eigh(h)
    d = w + damping[..., None]
    scale = xp.max(xp.abs(w), axis=-1)
    singular = ~(xp.abs(d[..., 0]) > LOST * unit * scale)
    safe = xp.where(singular[..., None], xp.ones_like(d), d)
    x = matvec(v, matvec(xp.matrix_transpose(v), both) / safe)
    residual = xp.zeros_like(both[..., 0])
    count = xp.zeros(d.shape[:-1], dtype=xp.int32, device=array_api_compat.device(h))
    return _Solved(x, residual, count, singular, d[..., 0] < -(unit**0.5) * scale)


def _by_iteration(h: LinearOperator, both: Array, point: _Point, rows: Any, options: dict[str, Any]) -> _Solved:
    """Solve with an operator by conjugate gradients, which notice that A is not positive definite."""
    xp, axes = namespace_of(both), len(h.domain_shape)
    shift = diagonal(xp.broadcast_to(with_axes(point.damping, axes), both.shape[1:]), h.domain_shape)
    if options["rtol"] is None:
        options["rtol"] = SOLVED * eps(xp, both.dtype)
    x, info = cg(add(h, shift, positive_definite=True), both, **options, throw=False)
    singular = _amplified(rows(x), safe_norm(rows(both)), point.scale)
    return _Solved(x, info.residual_norm, xp.max(info.n_iter, axis=0), singular, xp.any(info.status == 2, axis=0))


def _amplified(x: Array, size: Array, scale: Array) -> Array:
    """Return for which items one of two solutions is so large that A must be singular to working precision."""
    xp = namespace_of(x)
    return xp.any(~(safe_norm(x) * scale * (LOST * eps(xp, x.dtype)) <= size) & (size > 0), axis=0)


def _adjoint(point: _Point, x: Array, solved: _Solved, throw: bool) -> tuple[Array, Array, TrustRegionVjpInfo]:
    """Return ``u = s − μ q``, μ, and how it went; NaN, or an error, where there is no gradient."""
    xp, q, s = namespace_of(x), x[0, ...], x[1, ...]
    pq = xp.sum(point.p * q, axis=-1)
    mu = xp.sum(point.p * s, axis=-1) / xp.where(pq == 0, xp.ones_like(pq), pq)
    mu = xp.where(point.boundary, mu, xp.zeros_like(mu))
    u = s - mu[..., None] * q
    residual = xp.max(solved.residual, axis=0)
    unsolved = ~(residual <= eps(xp, x.dtype) ** 0.5)
    wrong = point.wrong if solved.indefinite is None else point.wrong | (solved.indefinite & ~solved.singular)
    bad = wrong | point.weak | solved.singular | unsolved
    if throw and is_true(xp.any(bad)):
        _raise(point, wrong, solved.singular)
    info = TrustRegionVjpInfo(~bad, solved.n_iter, residual, point.damping, point.boundary)
    return nan_where(bad[..., None], u), nan_where(bad, mu), info


def _raise(point: _Point, wrong: Array, singular: Array) -> NoReturn:
    """Raise the error of the most fundamental failure that occurred."""
    xp = namespace_of(wrong)
    if is_true(xp.any(wrong)):
        raise OptimalityError(
            f"p is not a minimum of this model{among(wrong)}: (H + ε I) p = −g with a positive semidefinite H + ε I "
            "does not hold, or p is longer than the radius. The most likely cause is (a) a step on a Krylov space that "
            "is too small: pass a larger k, or rtol= to be told; (b) a step of the absolute model, which has no "
            "gradient; or (c) inputs that have changed since. Pass throw=False to get NaN for these items."
        )
    if is_true(xp.any(point.weak)):
        raise GaugeError(
            f"The minimum without a constraint lies on the boundary{among(point.weak)}, where the step has a kink and "
            "no gradient. Change the radius a little, or pass throw=False to get NaN for these items."
        )
    hard = singular & point.boundary
    if is_true(xp.any(hard)):
        raise GaugeError(
            f"The hard case has no gradient{among(hard)}: g has no part along the eigenvector of the smallest "
            "eigenvalue, and the sign of the step along it is arbitrary. Perturb g, take a smaller radius, or pass "
            "throw=False to get NaN for these items."
        )
    if is_true(xp.any(singular)):
        raise SingularError(
            f"The step ends inside the region, and H is singular to working precision{among(singular)}: any small "
            "change of g may send it far away. Add a damping to H, take a smaller radius, or pass throw=False to get "
            "NaN for these items."
        )
    raise ConvergenceError(
        "The systems with H + ε I were not solved. The most likely cause is that it is nearly singular, close to the "
        "hard case. Pass a larger maxiter, or throw=False to get NaN for these items."
    )


# --- arguments --------------------------------------------------------------------------------------------------------


def _step(space: Space, radius: Array, throw: bool) -> tuple[Any, TrustRegionInfo]:
    """Minimise the model on the space."""
    xp, unit, rtol = namespace_of(space.c), eps(namespace_of(space.c), space.c.dtype), space.rtol
    valid = (radius > 0) & xp.isfinite(radius)
    if throw and not is_true(xp.all(valid)):
        raise ValueError(f"radius is not a positive finite number{among(~valid)}. Pass throw=False to get NaN there.")
    radius = nan_where(~valid, radius)
    found = _model_space.minimum(space, radius)
    residual = _model_space.residual(space, found)
    converged = residual <= (unit**0.5 if rtol is None else rtol)
    if throw and rtol is not None and not is_true(xp.all(converged)):
        raise ConvergenceError(
            f"The step has the residual {float(xp.max(residual)):.1e}, above rtol {rtol:.1e}, on a space of "
            f"{space.c.shape[-1]} dimensions{among(~converged)}. Pass a larger k, call trust_region_step instead of "
            "retry for a larger radius, or pass throw=False to get the step as it is."
        )
    info = TrustRegionInfo(
        converged, 0 if isinstance(space.basis, _model_space.GramSpace) else space.c.shape[-1], residual,
        found.damping, found.predicted, found.boundary, found.hard, space.lambda_min, space.n_products, space,
    )  # fmt: skip
    return space.basis.step(found.y), info


def _of_ggn(ggn: Ggn, g: Any, throw: bool) -> Space:
    """Validate a Gauss–Newton matrix, and describe its range."""
    if ggn.options.grouped:
        raise ValueError("a is a Ggn with groups=, whose blocks have no common region. Leave groups out.")
    like_params("g", list(g), ggn.options.chain.params)
    space = _model_space.gram_space(ggn, list(g))
    xp = namespace_of(space.c)
    limit = INDEFINITE * eps(xp, space.c.dtype) * xp.max(xp.abs(space.theta))
    if throw and is_true(space.lambda_min < -limit):
        raise ValueError(
            f"a is a Ggn whose Gram matrix has the eigenvalue {float(space.lambda_min):.1e}, but V V' has no negative "
            "one. The most likely cause is a matrix that was changed after ggn_reducer made it."
        )
    return space._replace(lambda_min=not_negative(space.lambda_min))


def _conform(a: Any, **vectors: Any) -> None:
    """Raise unless a is real and symmetric, and the vectors go together with it."""
    h = as_operator(a, "a")
    arrays = {f"a.params[{i}]": parameter for i, parameter in enumerate(h.params)}
    check_precision(namespace(**vectors, **arrays), **vectors, **arrays)
    check_real(**vectors, **arrays)
    for name, vector in vectors.items():
        check_ending(name, vector, h.domain_shape)


def _single(name: str, factor: HessianFactor, v: Any, throw: bool) -> None:
    """Raise unless v is one list like the parameters."""
    factor.check(name, list(v), finite=throw)
    if v[0].ndim != factor._hessian.weights[0].ndim:
        raise ValueError(f"{name} has several vectors, expected one: arrays with the shapes of chain.params.")


def _radius(radius: Array | float, like: Array) -> Array:
    """Return the radius as an array that broadcasts to the batch ``(...)`` of `like`."""
    if isinstance(radius, numbers.Real):
        number = float(radius)  # NumPy's own numbers would promote float32
        if not 0 < number < math.inf:
            raise ValueError(f"radius is {number}, expected more than 0 and finite.")
        return full(tuple(like.shape), number, like)
    xp = namespace(radius=radius, g=like)
    check_real(radius=radius)
    radius = xp.astype(radius, like.dtype, copy=False)
    if radius.ndim and tuple(radius.shape) != tuple(like.shape):
        raise ValueError(f"radius has shape {tuple(radius.shape)}, expected () or {tuple(like.shape)}.")
    return xp.broadcast_to(radius, tuple(like.shape))


def _like_radius(radius_bar: Array, radius: Any) -> Array:
    """Return the cotangent of the radius, summed where it is shared; a number counts as shared."""
    shape = () if isinstance(radius, numbers.Real) else tuple(radius.shape)
    return summed_to(radius_bar, shape)


def _finite(space: Space) -> Array:
    xp = namespace_of(space.c)
    return xp.isfinite(space.lambda_min) & xp.isfinite(space.size)
