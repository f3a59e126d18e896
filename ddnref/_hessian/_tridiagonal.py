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

import array_api_compat

from ddnref._array import Array
from ddnref._hessian._lu import Lu, lu, lu_slogdet, lu_solve
from ddnref._hessian._riccati import Basis, basis, slogdet_sum
from ddnref._hessian._terms import Blocks, Terms, block_diagonal, extended
from ddnref._linalg import identity


class Inputs(NamedTuple):
    """A layer, the basis of its inputs, and what takes their place."""

    basis: Basis
    pseudo: Array
    """z⁺ = K z, (N, ã)."""
    k: Array
    """K, (N, N)."""


def inputs(b: Basis) -> Inputs:
    """From ``z = Rᵀ Qᵀ``: ``z⁺ = R⁻¹ Qᵀ``, ``K = R⁻¹ R⁻ᵀ``."""
    xp = array_api_compat.array_namespace(b.r)
    r_inverse = 1 / b.r if b.r.shape[0] == 1 else xp.linalg.inv(b.r)
    return Inputs(b, r_inverse @ xp.matrix_transpose(b.q), r_inverse @ xp.matrix_transpose(r_inverse))


def independent(bases: list[Basis], least: float) -> Array:
    """Whether the samples' inputs are independent in every layer: one flag, from the diagonals of the R."""
    xp = array_api_compat.array_namespace(bases[0].r)
    flags = []
    for b in bases:
        n = b.r.shape[0]
        size = xp.abs(xp.sum(b.r * identity(n, b.r), axis=0))
        flags.append((xp.min(size) > least * xp.max(size)) & (xp.max(size) > 0))
    return xp.all(xp.stack(flags))


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
    xp = array_api_compat.array_namespace(curvature)
    layer = here.basis.layer
    n, a = layer.c.shape
    f = xp.reshape(layer.slope, (n * a,))
    own = damping * here.k
    if after is None:
        inside, below = block_diagonal(curvature), None
    else:
        inside, below = _next(after, damping)
        below = below * f
    d = f[:, None] * inside * f
    d = d + xp.reshape(own[:, None, :, None] * identity(a, d)[:, None, :], d.shape)
    return Row(d + identity(n * a, d) * xp.reshape(layer.c, (n * a,)), below)


def _next(after: Inputs, damping: Array | float) -> tuple[Array, Array]:
    """What the next layer puts on the tangent of its input, and the coupling of that with its own ds."""
    xp = array_api_compat.array_namespace(after.k)
    w, beta, q = after.basis.layer.weight, after.basis.layer.beta, after.basis.q
    (a_out, a_in), n = w.shape, beta.shape[0]
    pseudo, q = after.pseudo[:, :a_in], q[:a_in, :]
    w_t, beta_t = xp.matrix_transpose(w), xp.matrix_transpose(beta)
    k = damping * after.k
    gram = beta @ beta_t / damping
    free = identity(a_in, q) - q @ xp.matrix_transpose(q)
    c = xp.matrix_transpose(beta @ w)[None, :, :, None] * pseudo[:, None, None, :]
    c = xp.reshape(c, (n * a_in, n * a_in))
    ww = w_t @ w
    if n == 1:
        inside = k * ww - gram * free - c - xp.matrix_transpose(c)
        return inside, beta_t * pseudo - k * w
    both = k[:, None, :, None] * ww[:, None, :] - gram[:, None, :, None] * free[:, None, :]
    inside = xp.reshape(both, c.shape) - c - xp.matrix_transpose(c)
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
    growth: Array
    """Largest entry that an elimination subtracted, relative to the largest of T."""


def sweep(bases: list[Basis], terms: Terms, damping: Array | float) -> Iterator[tuple[Inputs, Array, Lu, Row, Array]]:
    """Eliminate from the last layer to the first; yields inputs, pivot, its factors, row, and gain of the next."""
    xp = array_api_compat.array_namespace(terms.curvature)
    after: Inputs | None = None
    factors: Lu | None = None
    for b in reversed(bases):
        here = inputs(b)
        found = row(here, after, terms.curvature, damping)
        pivot, gain = found.diagonal, None
        if found.below is not None and factors is not None:
            gain = lu_solve(factors, found.below)
            pivot = pivot - xp.matrix_transpose(found.below) @ gain
            pivot = (pivot + xp.matrix_transpose(pivot)) / 2
        factors = lu(pivot)
        yield here, pivot, factors, found, gain
        after = here


def factor(bases: list[Basis], terms: Terms, damping: Array | float) -> Tridiagonal:
    """All pivots factored; 4.7 (N a)³ flops for each layer, and 2 a³ for WᵀW."""
    xp = array_api_compat.array_namespace(terms.curvature)
    kept, sizes, changes = [], [], []
    for here, _, factors, found, gain in sweep(bases, terms, damping):
        kept.append(Kept(here, factors, gain))
        sizes.append(xp.max(xp.abs(found.diagonal)))
        if gain is not None:
            changes.append(xp.max(xp.abs(xp.sum(found.below * gain, axis=0))))
    size = xp.max(xp.stack(sizes))
    change = xp.max(xp.stack(changes)) if changes else 0 * size
    return Tridiagonal(tuple(kept[::-1]), damping, change / xp.where(size > 0, size, xp.ones_like(size)))


def solve(f: Tridiagonal, g: Blocks) -> Blocks:
    """``(H + εI)⁻¹ G``: right-hand sides of T, block substitution, and the weights from the pre-activations."""
    xp = array_api_compat.array_namespace(*g)
    rights = _rights(f, g)
    for i in range(len(rights) - 2, -1, -1):
        rights[i] = rights[i] - xp.matrix_transpose(f.blocks[i].gain) @ rights[i + 1]
    found: Blocks = []
    ds: Array | None = None
    dz: Array | None = None
    for i, (kept, right) in enumerate(zip(f.blocks, rights, strict=True)):
        new = lu_solve(kept.lu, right)
        ds = new if ds is None else new - f.blocks[i - 1].gain @ ds
        rows = xp.reshape(xp.matrix_transpose(ds), (g[0].shape[0], *kept.inputs.basis.layer.c.shape))
        found.append(_weights(kept.inputs, rows, dz, g[i], f.damping))
        dz = kept.inputs.basis.layer.slope * rows
    return found


def _rights(f: Tridiagonal, g: Blocks) -> list[Array]:
    """``z⁺ Gᵀ`` of the layer itself; from the next ``−f (z⁺ Gᵀ W + β G (I − QQᵀ)/ε)``, as rows (n, j)."""
    xp = array_api_compat.array_namespace(*g)
    found: list[Array] = []
    passed: Array | None = None
    for kept, g_l in zip(reversed(f.blocks), reversed(g), strict=True):
        layer, q = kept.inputs.basis.layer, kept.inputs.basis.q
        own = kept.inputs.pseudo @ xp.matrix_transpose(g_l)  # (k, N, a_out)
        right = own if passed is None else own - layer.slope * passed
        found.append(xp.matrix_transpose(xp.reshape(right, (g_l.shape[0], -1))))
        y = layer.beta @ g_l
        y = (y - (y @ q) @ xp.matrix_transpose(q)) / f.damping
        passed = own @ layer.weight + y[..., : layer.weight.shape[1]]
    return found[::-1]


def _weights(i: Inputs, ds: Array, dz: Array | None, g: Array, damping: Array | float) -> Array:
    """``dW = (ds − dz Wᵀ)ᵀ z⁺ + (G − βᵀ dz̃)(I − QQᵀ)/ε``."""
    xp = array_api_compat.array_namespace(g)
    layer, q = i.basis.layer, i.basis.q
    if dz is not None:
        ds = ds - dz @ xp.matrix_transpose(layer.weight)
        g = g - xp.matrix_transpose(layer.beta) @ extended(dz, q.shape[0])
    return xp.matrix_transpose(ds) @ i.pseudo + (g - (g @ q) @ xp.matrix_transpose(q)) / damping


def slogdet(f: Tridiagonal) -> tuple[Array, Array]:
    """Sign and ``log|det(H + εI)|``, by the identity above."""
    xp = array_api_compat.array_namespace(f.growth)
    sign, log = slogdet_sum([lu_slogdet(b.lu) for b in f.blocks], sum(b.inputs.basis.rest for b in f.blocks), f.damping)
    for b in f.blocks:
        r = b.inputs.basis.r
        diagonal = xp.abs(xp.sum(r * identity(r.shape[0], r), axis=0))
        log = log + 2 * b.inputs.basis.layer.weight.shape[0] * xp.sum(xp.log(diagonal))
    return sign, log


def bases_of(terms: Terms) -> list[Basis]:
    """Orthonormal bases of the inputs of all layers."""
    return [basis(layer) for layer in terms.layers]
