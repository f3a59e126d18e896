r"""The fast form for few samples: one symmetric block-tridiagonal matrix T over the pre-activations.

Where the N inputs of every layer are linearly independent, ``dW = (ds − dz Wᵀ)ᵀ z⁺ + V`` with ``z⁺ = K z``,
``K = (z zᵀ)⁻¹`` (z is N × ã), ``V zᵀ = 0``: the tangents ds of the pre-activations take the place of the weights. With
V eliminated as in `_riccati`, the stationarity of the expansion reads ``T ds = g``; primes mark the layer after:

    T_ll     = diag(c) + ε K⊗I + f [ ε K'⊗W'ᵀW' + ββᵀ'⊗(z⁺'ᵀz' − I)/ε − C' − C'ᵀ ] f      [last layer: + f S f]
    T_{l',l} = (z⁺'⊗β' − ε K'⊗W') f                        C'[(n',i'),(n,i)] = (β'W')[n,i'] z⁺'[n',i]

rows and columns ordered (sample, unit). The same five lines give inertia and determinant of H + εI:

    inertia(H + εI) = inertia(T) + sign(ε) Σ_l a_out (ã − N)
    log|det(H + εI)| = log|det T| + Σ_l a_out [ (ã − N) log|ε| + log det(z zᵀ) ]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ddnref._core.arrays import Array
from ddnref._kernels.dense import identity
from ddnref._kernels.dense import solve as solve_dense
from ddnref.curvature.hessian._dense_blocks import add_diagonal, flat, matmul, repeated, space, symmetric, t
from ddnref.curvature.hessian._expansion import Blocks, Terms, block_diagonal, extended
from ddnref.curvature.hessian._lu import Lu, lu, lu_and_solution, lu_slogdet, lu_solve
from ddnref.curvature.hessian._riccati import Basis, slogdet_sum


class Inputs(NamedTuple):
    """A layer, the basis of its inputs, and what takes their place."""

    basis: Basis
    pseudo: Array
    """z⁺ = K z, (N, ã)."""
    k: Array
    """K, (N, N)."""


def inputs(b: Basis) -> Inputs:
    """From ``z = Rᵀ Qᵀ``: ``z⁺ = R⁻¹ Qᵀ``, ``K = R⁻¹ R⁻ᵀ``."""
    r_inverse = 1 / b.r if b.r.shape[0] == 1 else solve_dense(b.r, identity(b.r.shape[0], b.r))
    return Inputs(b, r_inverse @ t(b.q), r_inverse @ t(r_inverse))


def independent(bases: list[Basis], least: float) -> Array:
    """Whether the samples' inputs are independent in every layer: one flag, from the diagonals of the R."""
    xp = space(bases[0].r)
    size = xp.abs(xp.stack([xp.linalg.diagonal(b.r) for b in bases]))
    largest = xp.max(size, axis=-1)
    return xp.all((xp.min(size, axis=-1) > least * largest) & (largest > 0))


def supported(terms: Terms) -> bool:
    """A plain chain with fewer samples than inputs in every layer."""
    layers = terms.layers
    return len(layers) == len(terms.steps) and all(x.z.shape[0] < x.z.shape[1] for x in layers)


class Row(NamedTuple):
    """One block row of T."""

    diagonal: Array
    below: Array | None
    """``T_{l',l}``; ``None`` in the last layer."""


def row(here: Inputs, after: Inputs | None, curvature: Array, damping: Array | float) -> Row:
    """``T_ll`` and ``T_{l',l}``."""
    xp = space(curvature)
    layer = here.basis.layer
    n, a = layer.c.shape
    f, own = flat(layer.slope), damping * here.k
    if after is None:
        inside, below = block_diagonal(curvature), None
    else:
        inside, below = _next(after, damping)
        below = below * f
    d = f[:, None] * inside * f
    if n == 1:
        return Row(add_diagonal(d, flat(layer.c) + own[0, 0]), below)
    d = d + xp.reshape(own[:, None, :, None] * identity(a, d)[:, None, :], d.shape)
    return Row(add_diagonal(d, flat(layer.c)), below)


def _next(after: Inputs, damping: Array | float) -> tuple[Array, Array]:
    """What the next layer puts on the tangent of its input, and the coupling of that with its own ds."""
    xp = space(after.k)
    w, beta, q = after.basis.layer.weight, after.basis.layer.beta, after.basis.q
    (a_out, a_in), n = w.shape, beta.shape[0]
    pseudo, q = after.pseudo[:, :a_in], q[:a_in, :]
    w_t, beta_t = t(w), t(beta)
    k = damping * after.k
    gram = beta @ beta_t / damping
    ww = matmul(w_t, w)
    if n == 1:  # two symmetric updates of rank one, as one product
        left = xp.concat([gram * t(q), -(beta @ w), -pseudo])
        right = xp.concat([t(q), pseudo, beta @ w])
        inside = t(left) @ right
        inside += k * ww
        return add_diagonal(inside, -gram[0, 0]), beta_t * pseudo - k * w
    free = identity(a_in, q) - q @ t(q)
    c = t(beta @ w)[None, :, :, None] * pseudo[:, None, None, :]
    c = xp.reshape(c, (n * a_in, n * a_in))
    both = k[:, None, :, None] * ww[:, None, :] - gram[:, None, :, None] * free[:, None, :]
    inside = xp.reshape(both, c.shape) - c - t(c)
    below = pseudo[:, None, None, :] * beta_t[None, :, :, None] - k[:, None, :, None] * w[:, None, :]
    return inside, xp.reshape(below, (n * a_out, n * a_in))


class Kept(NamedTuple):
    """One block of the factorisation."""

    inputs: Inputs
    lu: Lu
    gain: Array | None
    """``D'⁻¹ T_{l',l}``, of the layer after this one."""


class Tridiagonal(NamedTuple):
    """Block LU of T, from the last layer to the first."""

    blocks: tuple[Kept, ...]
    damping: Array | float


def sweep(bases: list[Basis], terms: Terms, damping: Array | float) -> Iterator[tuple[Kept, Array]]:
    """Eliminate from the last layer to the first; yields what is kept of each, and its pivot."""
    here = inputs(bases[-1])
    pivot, gain = row(here, None, terms.curvature, damping).diagonal, None
    for b in reversed(bases[:-1]):
        before = inputs(b)
        found = row(before, here, terms.curvature, damping)
        factors, coupled = lu_and_solution(pivot, found.below)
        yield Kept(here, factors, gain), pivot
        here, gain = before, coupled
        pivot = symmetric(found.diagonal - matmul(t(found.below), gain))
    yield Kept(here, lu(pivot), gain), pivot


def factor(bases: list[Basis], terms: Terms, damping: Array | float) -> Tridiagonal:
    """All pivots factored; 4.7 (N a)³ flops for each layer, and 2 a³ for WᵀW."""
    kept = [kept for kept, _ in sweep(bases, terms, damping)]
    return Tridiagonal(tuple(kept[::-1]), damping)


def solve(f: Tridiagonal, g: Blocks) -> Blocks:
    """``(H + εI)⁻¹ G``: right-hand sides of T, block substitution, and the weights from the pre-activations."""
    xp = space(g[0])
    rights = _rights(f, g)
    for i in range(len(rights) - 2, -1, -1):
        rights[i] = rights[i] - t(f.blocks[i].gain) @ rights[i + 1]
    found: Blocks = []
    ds: Array | None = None
    dz: Array | None = None
    for i, (kept, right) in enumerate(zip(f.blocks, rights, strict=True)):
        new = lu_solve(kept.lu, right)
        ds = new if ds is None else new - f.blocks[i - 1].gain @ ds
        rows = xp.reshape(t(ds), (g[0].shape[0], *kept.inputs.basis.layer.c.shape))
        found.append(_weights(kept.inputs, rows, dz, g[i], f.damping))
        dz = kept.inputs.basis.layer.slope * rows
    return found


def _rights(f: Tridiagonal, g: Blocks) -> list[Array]:
    """``z⁺ Gᵀ`` of the layer itself; from the next ``−f (z⁺ Gᵀ W + β G (I − QQᵀ)/ε)``, as rows (n, j)."""
    xp = space(g[0])
    found: list[Array] = []
    passed: Array | None = None
    for kept, g_l in zip(reversed(f.blocks), reversed(g), strict=True):
        layer, q = kept.inputs.basis.layer, kept.inputs.basis.q
        own = kept.inputs.pseudo @ t(g_l)  # (k, N, a_out)
        right = own if passed is None else own - layer.slope * passed
        found.append(t(xp.reshape(right, (g_l.shape[0], -1))))
        y = layer.beta @ g_l
        y = (y - (y @ q) @ t(q)) / f.damping
        passed = own @ layer.weight + y[..., : layer.weight.shape[1]]
    return found[::-1]


def _weights(i: Inputs, ds: Array, dz: Array | None, g: Array, damping: Array | float) -> Array:
    """``dW = (ds − dz Wᵀ)ᵀ z⁺ + (G − βᵀ dz̃)(I − QQᵀ)/ε``, as G/ε and one product: two passes over memory."""
    xp = space(g)
    layer, q = i.basis.layer, i.basis.q
    gq, k = t(g @ q), g.shape[0]
    left, right = [], []
    if dz is not None:
        wide = extended(dz, q.shape[0])
        ds = ds - dz @ t(layer.weight)
        gq = gq - t(wide @ q) @ layer.beta
        left, right = [repeated(layer.beta / -damping, k)], [wide]
    left += [ds, gq / -damping]
    right += [repeated(i.pseudo, k), repeated(t(q), k)]
    found = t(xp.concat(left, axis=1)) @ xp.concat(right, axis=1)
    found += g / damping  # in place where the library can
    return found


def slogdet(f: Tridiagonal) -> tuple[Array, Array]:
    """Sign and ``log|det(H + εI)|``, by the identity above."""
    xp = space(f.blocks[0].inputs.k)
    sign, log = slogdet_sum([lu_slogdet(b.lu) for b in f.blocks], sum(b.inputs.basis.rest for b in f.blocks), f.damping)
    for b in f.blocks:
        r = b.inputs.basis.r
        log = log + 2 * b.inputs.basis.layer.weight.shape[0] * xp.sum(xp.log(xp.abs(xp.linalg.diagonal(r))))
    return sign, log
