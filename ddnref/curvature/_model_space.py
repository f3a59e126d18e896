r"""The quadratic model of a trust region on a small space, and its minimum for any radius without further products.

On a space with the orthonormal basis Q let ``S = Qᵀ H Q = U diag(θ) Uᵀ`` and ``c = Uᵀ Qᵀ g``. With ``p = Q U y``

    min gᵀp + ½ pᵀHp,  ‖p‖ ≤ r      is      min Σ c_i y_i + ½ Σ θ_i y_i²,  ‖y‖ ≤ r,
    y = −c / (θ + ε),   ε ≥ max(0, −θ_1),   ‖y‖ = r or ε = 0.

The saddle-free model has |θ| in place of θ. Three kinds of space give θ and c:

- vectors of a Krylov space of H, from g and, if wanted, from a random start;
- those of the inverse of a factored ``H + ε₀ I``, in which H itself is projected by exact products;
- the whole range of a Gauss–Newton matrix ``G = V Vᵀ``, from its Gram matrix, and the part of g outside of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, eps, full, is_true, namespace_of, nan_where
from ddnref._core.noise import noise
from ddnref._kernels import singularity
from ddnref._kernels.dense import eigh, hermitian_part, infinity
from ddnref._kernels.vectors import norm, norm_of_pieces, normalised, put_row, safe_norm
from ddnref.curvature._gram import zero_tolerance
from ddnref.curvature.ggn import _state
from ddnref.curvature.hessian._expansion import flat
from ddnref.curvature.hessian._solve import HessianFactor
from ddnref.nodes._least_squares import NEWTON_STEPS, secular
from ddnref.operators._blocks import SelfAdjoint, inner, without

NOISE = 2**10  # · eps: part of a random direction in each vector, which is all that is left of an invariant space
ROUNDING = 64  # · eps · ‖g‖: what is left of a component of g that is zero
GUESS = 8  # Newton steps for ε where the space may still grow: too small an ε means too large a residual
OUTSIDE = 0.5  # power of eps: a part of g outside the range of G, relative to ‖g‖, from which on it counts


class Rows(NamedTuple):
    """Orthonormal vectors, their products with H, and the eigenvectors of the projection."""

    q: Array  # (..., k, n)
    hq: Array  # (..., k, n): rows H q
    u: Array  # (..., k, k)
    g: Array  # (..., *shape), whose shape is that of a step

    def step(self, y: Array) -> Array:
        """Return ``p = Q U y``."""
        xp = namespace_of(y)
        return xp.reshape(_combined(self.u, y, self.q), self.g.shape)

    def outside(self, y: Array) -> Array:
        """Return the length of the part of ``H p`` outside of the space, which the model does not see."""
        return safe_norm(without(_combined(self.u, y, self.hq)[..., None, :], self.q))[..., 0]


class Lists(NamedTuple):
    """Vectors of all parameters in double precision, for a network whose step is a list like its parameters."""

    rows: Rows
    factor: HessianFactor

    def step(self, y: Array) -> list[Array]:
        """Return ``p = Q U y`` as a list."""
        hessian = self.factor._hessian
        return [entry[0, ...] for entry in hessian.params(hessian.from_rows(self.rows.step(y)[None, :]))]

    def outside(self, y: Array) -> Array:
        """Return the length of the part of ``H p`` outside of the space."""
        return self.rows.outside(y)


class GramSpace(NamedTuple):
    """The range of ``G = V Vᵀ`` with eigenvectors ``V ẽ / √λ``, and one vector outside of it."""

    ggn: _state.Ggn
    u: Array  # (n, n): columns ẽ / √λ, zero for λ = 0
    rest: list[Array]  # like the parameters: the unit vector along the part of g outside of the range

    def step(self, y: Array) -> list[Array]:
        """Return the step as a list, by one product with V."""
        inside = _state.apply(self.ggn, self.ggn.options.groups[0], (self.u @ y[:-1])[:, None])
        return [a[0, ...] + y[-1] * b for a, b in zip(inside, self.rest, strict=True)]

    def outside(self, y: Array) -> Array:
        """Return zero: G maps this space to itself."""
        return namespace_of(y).zeros_like(y[..., 0])


Basis: TypeAlias = Rows | Lists | GramSpace


class Space(NamedTuple):
    """The quadratic model on a space."""

    theta: Array  # (..., k): curvatures of the model, absolute values for the saddle-free one
    c: Array  # (..., k): components of g
    size: Array  # (...): ‖g‖
    lambda_min: Array  # (...): the smallest eigenvalue of the projection
    indefinite: Array  # (...) bool: whether the model has negative curvature
    n_products: int
    basis: Basis
    rtol: float | None = None  # residual that counts as converged, ``sqrt(eps)`` by default

    def __repr__(self) -> str:
        return f"Space({self.theta.shape[-1]} dimensions)"  # not the numbers of all its vectors


class Minimum(NamedTuple):
    """The minimum of the model in the coordinates of the space."""

    y: Array
    damping: Array
    predicted: Array
    boundary: Array
    hard: Array


def minimum(space: Space, radius: Array, steps: int = NEWTON_STEPS) -> Minimum:
    """Minimise the model for one radius for each item, ``(...)``."""
    xp, c, radius = namespace_of(space.c), space.c, radius[..., None]
    zero, unit = full((), 0.0, c), eps(xp, c.dtype)
    # The damping is ε = ε₀ + μ with the smallest possible ε₀; curvatures δ = θ + ε₀ of rounding size count as zero.
    lowest = xp.min(space.theta, axis=-1, keepdims=True)
    least = xp.maximum(-lowest, zero * lowest)
    delta = space.theta + least
    tol = singularity.SINGULAR * unit * xp.max(xp.abs(space.theta), axis=-1, keepdims=True)
    rounded = delta <= tol
    c = xp.where(rounded & (xp.abs(c) <= ROUNDING * unit * space.size[..., None]), zero * c, c)
    # The step without further damping. Where it leaves the region, or has no length, the secular equation gives μ.
    floor = xp.where(rounded, tol + zero * delta, delta)
    z = xp.where(floor > 0, c / xp.where(floor > 0, floor, xp.ones_like(floor)), xp.where(c == 0, c, infinity(c)))
    inside = safe_norm(z)[..., None] <= radius
    mu = secular(c / radius, delta, steps)
    d = delta + mu
    outer = xp.where(c == 0, c, c / xp.where(d > 0, d, xp.ones_like(d)))
    y = -xp.where(inside, z, outer)
    # The hard case: the model falls along the lowest eigenvector, of which g has no part, up to the boundary.
    hard = inside & space.indefinite[..., None]
    index = xp.arange(c.shape[-1], device=array_api_compat.device(c))
    first = index == xp.argmin(space.theta, axis=-1, keepdims=True)
    others = xp.where(first, zero * y, y)
    rest = safe_norm(others)[..., None] / radius
    tau = radius * xp.sqrt(xp.maximum((1 - rest) * (1 + rest), zero * rest))
    y = xp.where(hard & first, xp.where(c > 0, -tau, tau), y)
    y = nan_where(~(radius > 0), y)
    damping = xp.where(inside, xp.where(hard, least, zero * least), least + mu)[..., 0]
    predicted = -xp.sum(y * (space.c + space.theta * y / 2), axis=-1)
    return Minimum(y, damping, predicted, (~inside | hard)[..., 0], hard[..., 0])


def residual(space: Space, found: Minimum) -> Array:
    """Return ``‖(I − QQᵀ) H p‖ / max(‖g‖, ε ‖p‖)``; zero for a step of zero."""
    xp = namespace_of(space.c)
    size = xp.maximum(space.size, found.damping * safe_norm(found.y))
    return space.basis.outside(found.y) / xp.where(size > 0, size, xp.ones_like(size))


# --- the spaces -------------------------------------------------------------------------------------------------------


class Extent(NamedTuple):
    """How large a Krylov space becomes."""

    k: int
    """Dimensions at most."""
    probes: int
    """Further ones from a random start."""
    rtol: float | None
    """Residual of the step that ends the Krylov space; with 0 it is not computed and the space has k dimensions. By
    default 0 where k dimensions are all, which finds the hard case, and ``sqrt(eps)`` elsewhere."""
    check_every: int
    """Dimensions between two looks."""

    def within(self, n: int, unit: float) -> tuple[int, int, float]:
        """Return `k`, `probes` and `rtol` in n dimensions."""
        k = min(self.k, n)
        rtol = self.rtol if self.rtol is not None else unit**0.5 if k < n else 0.0
        return k, min(self.probes, n - k), rtol


def first(g: Array, axes: int = 1) -> Array:
    """Return ``g / ‖g‖``, or random directions for gradients of zero, whose last axes are those of one vector."""
    xp = namespace_of(g)
    shape = tuple(g.shape)
    rows = xp.reshape(g, (*shape[: g.ndim - axes], math.prod(shape[g.ndim - axes :])))
    size = safe_norm(rows)
    # Zero leaves the start to chance, and the smallest eigenvalue is still found.
    start = noise(1, rows.shape[-1], rows) + full((), 0.0, rows) * rows
    return xp.reshape(xp.where(size[..., None] > 0, normalised(rows, size), start), g.shape)


def krylov_space(a: SelfAdjoint, g: Array, image: Array | None, radius: Array, extent: Extent, absolute: bool) -> Space:
    """Build the Krylov space of H and g by Lanczos' method with full orthogonalisation.

    `image` is the product of the first vector, `first`, if it is known.
    """
    xp, shape = namespace_of(g), (*a.batch, 1, a.m)
    image = None if image is None else xp.reshape(image, shape)
    return _projected(a.apply, None, xp.reshape(g, shape), image, g, radius, extent, absolute)


def inverse_space(factor: HessianFactor, g: list[Array], radius: Array, extent: Extent, absolute: bool) -> Space:
    """Build the Krylov space of the factored inverse and g, and project H on it by exact products."""
    hessian = factor._hessian
    rows = flat(hessian.blocks([entry[None, ...] for entry in g]))

    def product(rows: Array) -> Array:
        return flat(hessian.product(hessian.from_rows(rows)))

    def inverse(rows: Array) -> Array:
        return flat(factor.inverse(hessian.from_rows(rows)))

    space = _projected(product, inverse, rows, None, rows[0, :], radius, extent, absolute)
    return space._replace(basis=Lists(space.basis, factor))  # type: ignore[arg-type]


def _projected(
    product: Callable[[Array], Array],
    inverse: Callable[[Array], Array] | None,
    rows: Array,
    image: Array | None,
    g: Array,
    radius: Array,
    extent: Extent,
    absolute: bool,
) -> Space:
    """Build orthonormal rows by repeated products, or solves, and project H on them."""
    xp, m = namespace_of(rows), rows.shape[-1]
    unit, size = eps(xp, rows.dtype), safe_norm(rows)
    k, probes, rtol = extent.within(m, unit)
    start = noise(1, m, rows)
    noises = NOISE * unit * xp.concat([start, start])  # a part of it is another direction in each step
    shape, device = (*rows.shape[:-2], k + probes, m), array_api_compat.device(rows)
    q, hq = (xp.zeros(shape, dtype=rows.dtype, device=device) for _ in range(2))  # rows that stay empty take no memory

    def described(j: int) -> Space:
        """Return the model on the first j rows."""
        theta, u = eigh(hermitian_part(inner(hq[..., :j, :], q[..., :j, :])))
        negative = theta[..., 0] < -singularity.SINGULAR * unit * xp.max(xp.abs(theta), axis=-1)
        return Space(
            theta=xp.abs(theta) if absolute else theta,
            c=size * u[..., 0, :],  # Q starts with g / ‖g‖
            size=size[..., 0],
            lambda_min=theta[..., 0],
            indefinite=negative & (not absolute),
            n_products=j,
            basis=Rows(q[..., :j, :], hq[..., :j, :], u, g),
        )

    def is_enough(j: int) -> bool:
        """Return whether the minimum on the first j rows solves the equations of the whole problem."""
        space = described(j)
        found = minimum(space, radius, GUESS)
        # A step of zero says nothing: a gradient of zero may hide negative curvature. NaN does not get better.
        solved = (residual(space, found) <= rtol) & (safe_norm(found.y) > 0)
        return is_true(xp.all(solved | ~xp.isfinite(safe_norm(found.y))))

    def extended(j: int, following: Array) -> Array:
        """Store row j and its product, and return the direction that follows."""
        nonlocal q, hq
        if j:
            # A little noise leaves an invariant space in a random direction. At rounding size, what two passes leave of
            # it would not be orthogonal; and with one pass errors grow threefold with each such vector.
            basis, length = q[..., :j, :], safe_norm(following)[..., None]
            following = without(following / xp.where(length > 0, length, xp.ones_like(length)), basis)
            following = without(following + noises[j % m : j % m + m], basis)
            following = normalised(following, norm(following))
        h_following = product(following) if j or image is None else image
        q, hq = put_row(q, j, following), put_row(hq, j, h_following)
        return h_following if inverse is None else inverse(following)

    following, j = first(rows), 0
    while j < k and not (rtol and j and j % extent.check_every == 0 and is_enough(j)):
        following, j = extended(j, following), j + 1
    following = start + full((), 0.0, rows) * rows  # NaN where g is
    for i in range(j, j + probes):
        following = extended(i, following)
    return described(j + probes)


def gram_space(ggn: _state.Ggn, g: list[Array]) -> Space:
    """Describe the whole range of a Gauss–Newton matrix by its Gram matrix; both models are the same."""
    group = ggn.options.groups[0]
    w, e = eigh(ggn.grams[0])
    xp = namespace_of(w)
    # e_i = V ẽ_i / √λ_i, without directions whose λ is rounding
    zero = w <= zero_tolerance(xp, w, None) * w[-1:]
    roots = xp.sqrt(xp.where(zero, xp.ones_like(w), w))
    u = xp.where(zero, xp.zeros_like(w), 1 / roots) * e
    lead = [entry[None, ...] for entry in g]
    c = (xp.matrix_transpose(u) @ _state.adjoint(ggn, group, lead))[:, 0]
    # The part of g outside of the range has no curvature; rounding is left out.
    inside = _state.apply(ggn, group, (u @ c)[:, None])
    rest = [a[0, ...] - b[0, ...] for a, b in zip(lead, inside, strict=True)]
    axes = [entry[None, ...] for entry in rest]
    size = norm_of_pieces([xp.reshape(entry, (1, -1)) for entry in lead], 1)
    left = norm_of_pieces([xp.reshape(entry, (1, -1)) for entry in axes], 1)
    left = xp.where(left > eps(xp, w.dtype) ** OUTSIDE * size, left, full((), 0.0, left) * left)
    safe = xp.where(left > 0, left, xp.ones_like(left))
    theta = xp.concat([xp.where(zero, xp.zeros_like(w), w) * ggn.scale, full((1,), 0.0, w)])
    basis = GramSpace(ggn, u, [entry / safe[0] for entry in rest])
    lowest = w[0] * ggn.scale
    return Space(theta, xp.concat([c, left]), size[0], lowest, xp.min(theta) < 0, 0, basis)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _combined(u: Array, y: Array, rows: Array) -> Array:
    """Return ``Σ (U y)_i rows_i``."""
    return ((u @ y[..., None])[..., 0][..., None, :] @ rows)[..., 0, :]
