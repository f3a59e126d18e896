r"""The fast form for few samples: one symmetric block-tridiagonal matrix T over the pre-activations.

Where the N inputs of every layer are linearly independent, ``dW = (ds − dz Wᵀ)ᵀ z⁺ + V`` with ``z⁺ = K z``,
``K = (z zᵀ)⁻¹`` (z is N × ã), ``V zᵀ = 0``: the tangents ds of the pre-activations take the place of the weights. With
V eliminated as in `_riccati`, the stationarity of the expansion reads ``T ds = g``; primes mark the layer after:

    T_ll     = diag(c) + ε K⊗I + f [ ε K'⊗W'ᵀW' + ββᵀ'⊗(z⁺'ᵀz' − I)/ε − C' − C'ᵀ ] f      [last layer: + f S f]
    T_{l',l} = (z⁺'⊗β' − ε K'⊗W') f                        C'[(n',i'),(n,i)] = (β'W')[n,i'] z⁺'[n',i]

with rows and columns ordered (sample, unit). T also has the inertia and the determinant of H + εI:

    inertia(H + εI) = inertia(T) + sign(ε) Σ_l a_out (ã − N)
    log|det(H + εI)| = log|det T| + Σ_l a_out [ (ã − N) log|ε| + log det(z zᵀ) ]

`_riccati` does the same for every chain, and takes up to three times as long (see the page on tuning).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ddnref._core.arrays import Array, Namespace, namespace_of
from ddnref._kernels.blocks import Lu, add_diagonal, lu, lu_and_solution, lu_slogdet, lu_solve, matmul
from ddnref._kernels.dense import identity
from ddnref._kernels.lu import solve_triangular
from ddnref.curvature.hessian._expansion import Basis, Blocks, Expansion, extended, sum_of_products
from ddnref.curvature.hessian._riccati import block_diagonal, slogdet_sum


def supported(e: Expansion) -> bool:
    """Whether the chain is plain and has fewer samples than inputs in every layer."""
    layers = e.layers
    return len(layers) == len(e.steps) and all(x.z.shape[0] < x.z.shape[1] for x in layers)


def independent(bases: list[Basis], least: float) -> Array:
    """Whether the samples' inputs are independent in every layer: one flag, from the diagonals of the R."""
    xp = namespace_of(bases[0].r)
    size = xp.abs(xp.stack([xp.linalg.diagonal(b.r) for b in bases]))
    largest = xp.max(size, axis=-1)
    return xp.all((xp.min(size, axis=-1) > least * largest) & (largest > 0))


class Inputs(NamedTuple):
    """A layer, the basis of its inputs, and what takes their place."""

    basis: Basis
    pseudo: Array  # z⁺ = K z, (N, ã)
    k: Array  # K, (N, N)


def inputs(b: Basis) -> Inputs:
    """Return the pseudo-inverse ``z⁺ = R⁻¹ Qᵀ`` of ``z = Rᵀ Qᵀ``, and ``K = z⁺ z⁺ᵀ``."""
    pseudo = b.q.mT / b.r if b.r.shape[0] == 1 else solve_triangular(b.r, b.q.mT, lower=False)
    return Inputs(b, pseudo, pseudo @ pseudo.mT)


def row(
    xp: Namespace, here: Inputs, after: Inputs | None, curvature: Array, damping: Array | float
) -> tuple[Array, Array]:
    """Return ``T_ll`` and ``T_{l',l}``, which is ``None`` in the last layer."""
    layer = here.basis.layer
    n, a = layer.c.shape
    f, c, k = xp.reshape(layer.slope, (-1,)), xp.reshape(layer.c, (-1,)), damping * here.k
    if after is None:
        inside, below = block_diagonal(xp, curvature), None
    else:
        inside, below = _next(xp, after, damping)
        below = below * f
    # T_ll = diag(c) + ε K⊗I + f [ … ] f
    d = f[:, None] * inside * f
    if n == 1:
        return add_diagonal(d, c + k[0, 0]), below
    d = d + xp.reshape(k[:, None, :, None] * identity(a, d)[:, None, :], d.shape)
    return add_diagonal(d, c), below


def _next(xp: Namespace, after: Inputs, damping: Array | float) -> tuple[Array, Array]:
    """Return the brackets of ``T_ll`` and ``T_{l',l}``: all that they have of the layer after."""
    w, beta, q = after.basis.layer.weight, after.basis.layer.beta, after.basis.q
    (a_out, a_in), n = w.shape, beta.shape[0]
    pseudo, q = after.pseudo[:, :a_in], q[:a_in, :]
    k, gram, ww = damping * after.k, beta @ beta.mT / damping, matmul(w.mT, w)
    if n == 1:
        # One sample: what is added to ε K' W'ᵀW' has rank three and is one product.
        left = xp.concat([gram * q.mT, -(beta @ w), -pseudo])
        right = xp.concat([q.mT, pseudo, beta @ w])
        inside = left.mT @ right
        inside += k * ww
        return add_diagonal(inside, -gram[0, 0]), beta.mT * pseudo - k * w
    # ε K'⊗W'ᵀW' + ββᵀ'⊗(z⁺'ᵀz' − I)/ε − C' − C'ᵀ, where z⁺'ᵀz' = QQᵀ
    free = identity(a_in, q) - q @ q.mT
    c = (beta @ w).mT[None, :, :, None] * pseudo[:, None, None, :]
    c = xp.reshape(c, (n * a_in, n * a_in))
    both = k[:, None, :, None] * ww[:, None, :] - gram[:, None, :, None] * free[:, None, :]
    inside = xp.reshape(both, c.shape) - c - c.mT
    # z⁺'⊗β' − ε K'⊗W'
    below = pseudo[:, None, None, :] * beta.mT[None, :, :, None] - k[:, None, :, None] * w[:, None, :]
    return inside, xp.reshape(below, (n * a_out, n * a_in))


class Kept(NamedTuple):
    """One block of the factorisation."""

    inputs: Inputs
    lu: Lu
    gain: Array  # ``D'⁻¹ T_{l',l}``, of the layer after this one; ``None`` in the last layer


def sweep(bases: list[Basis], e: Expansion, damping: Array | float) -> Iterator[tuple[Kept, Array]]:
    """Eliminate from the last layer to the first; yields what is kept of each, and its pivot."""
    xp, here = e.xp, inputs(bases[-1])
    pivot, gain = row(xp, here, None, e.curvature, damping)[0], None
    for b in reversed(bases[:-1]):
        before = inputs(b)
        diagonal, below = row(xp, before, here, e.curvature, damping)
        factors, coupled = lu_and_solution(pivot, below)
        yield Kept(here, factors, gain), pivot
        here, gain = before, coupled
        # The pivot of a layer is the Schur complement of all layers after it.
        pivot = diagonal - matmul(below.mT, gain)
        pivot = (pivot + pivot.mT) / 2
    yield Kept(here, lu(pivot), gain), pivot


def factor(bases: list[Basis], e: Expansion, damping: Array | float) -> list[Kept]:
    """Factor all pivots, returned in the order of the layers; 4.7 (N a)³ flops for each, and 2 a³ for WᵀW."""
    return [kept for kept, _ in sweep(bases, e, damping)][::-1]


def solve(f: list[Kept], g: Blocks, damping: Array | float) -> Blocks:
    """Return ``(H + εI)⁻¹ G``: right-hand sides of T, block substitution, and the weights from the pre-activations."""
    xp = namespace_of(g[0])
    rights = _rights(xp, f, g, damping)
    # Substitute backward: each layer passes its right-hand side to the one before.
    for i in range(len(rights) - 2, -1, -1):
        rights[i] = rights[i] - f[i].gain.mT @ rights[i + 1]
    # Substitute forward, where ds of a layer gives its weights and the tangent of the next input.
    found: Blocks = []
    ds: Array | None = None
    dz: Array | None = None
    for i, (kept, right) in enumerate(zip(f, rights, strict=True)):
        new = lu_solve(kept.lu, right)
        ds = new if ds is None else new - f[i - 1].gain @ ds
        rows = xp.reshape(ds.mT, (g[0].shape[0], *kept.inputs.basis.layer.c.shape))
        found.append(_weights(xp, kept.inputs, rows, dz, g[i], damping))
        dz = kept.inputs.basis.layer.slope * rows
    return found


def _rights(xp: Namespace, f: list[Kept], g: Blocks, damping: Array | float) -> list[Array]:
    """Return ``z⁺ Gᵀ`` of the layer itself minus ``f (z⁺ Gᵀ W + β G (I − QQᵀ)/ε)`` of the next, as rows (n, j)."""
    found: list[Array] = []
    passed: Array | None = None
    for kept, g_l in zip(reversed(f), reversed(g), strict=True):
        layer, q = kept.inputs.basis.layer, kept.inputs.basis.q
        own = kept.inputs.pseudo @ g_l.mT  # (k, N, a_out)
        right = own if passed is None else own - layer.slope * passed
        found.append(xp.reshape(right, (g_l.shape[0], -1)).mT)
        y = layer.beta @ g_l
        y = (y - (y @ q) @ q.mT) / damping
        passed = own @ layer.weight + y[..., : layer.weight.shape[1]]
    return found[::-1]


def _weights(xp: Namespace, i: Inputs, ds: Array, dz: Array | None, g: Array, damping: Array | float) -> Array:
    """Return ``dW = (ds − dz Wᵀ)ᵀ z⁺ + (G − βᵀ dz̃)(I − QQᵀ)/ε``, as G/ε and one product: two passes over memory."""
    layer, q = i.basis.layer, i.basis.q
    gq = (g @ q).mT
    left, right = [], []
    if dz is not None:
        wide = extended(xp, dz, q.shape[0])
        ds = ds - dz @ layer.weight.mT
        gq = gq - (wide @ q).mT @ layer.beta
        left, right = [layer.beta / -damping], [wide]
    found = sum_of_products(xp, g.shape[0], [*left, ds, gq / -damping], [*right, i.pseudo, q.mT])
    found += g / damping  # in place where the library can
    return found


def slogdet(f: list[Kept], damping: Array | float) -> tuple[Array, Array]:
    """Return sign and ``log|det(H + εI)|``, by the identity above."""
    bases = [kept.inputs.basis for kept in f]
    xp = namespace_of(bases[0].r)
    sign, log = slogdet_sum([lu_slogdet(kept.lu) for kept in f], sum(b.rest for b in bases), damping)
    for b in bases:  # log det(z zᵀ) = 2 log|det R|
        log = log + 2 * b.layer.weight.shape[0] * xp.sum(xp.log(xp.abs(xp.linalg.diagonal(b.r))))
    return sign, log
