r"""The general form: a backward sweep over the layers that eliminates each layer's weights (a Riccati recursion).

Orthonormal columns Q with ``z̃ = Rᵀ Qᵀ`` (N × ã, R is r × N, r = min(N, ã)) split a layer's weights as

    dW = Uᵀ Qᵀ + V,   V Q = 0          ds = Rᵀ U + dz Wᵀ

V meets only β: ``V = (G − βᵀ dz̃)(I − Q Qᵀ)/ε``. With ``½ dsᵀ M ds − mᵀ ds`` for all that follows the layer, what is
left is a quadratic in U (r × a_out) and the tangent dz of the input:

    Q_UU = ε I + (R⊗I) M (R⊗I)ᵀ,   Q_Ux = (R⊗I) M (I⊗W) + Qᵀ⊗β,   Q_xx = (I⊗W)ᵀ M (I⊗W) − ββᵀ ⊗ (I − QQᵀ)/ε

and eliminating U hands ``P = Q_xx − Q_Uxᵀ Q_UU⁻¹ Q_Ux`` to the layer before, where ``M = diag(c) + f P f``. Nothing is
inverted but the pivots Q_UU, which are the Schur complements of H + εI in layer order: z may have any rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, full
from ddnref._kernels.dense import identity
from ddnref.curvature.hessian._dense_blocks import add_diagonal, flat, matmul, space, symmetric, t
from ddnref.curvature.hessian._expansion import (  # fmt: skip
    CLOSE,
    OPEN,
    Blocks,
    Layer,
    Step,
    Terms,
    block_diagonal,
    extended,
    samples,
    units,
    units_right,
)
from ddnref.curvature.hessian._lu import Lu, lu, lu_and_solution, lu_slogdet, lu_solve


class Basis(NamedTuple):
    """A layer and the orthonormal basis of its inputs."""

    layer: Layer
    q: Array
    """(ã, r)."""
    r: Array
    """(r, N)."""

    @property
    def rest(self) -> int:
        """Dimensions of V: eigenvalues that count as ε."""
        return int(self.layer.weight.shape[0]) * int(self.q.shape[0] - self.q.shape[1])


def basis(layer: Layer) -> Basis:
    """By QR of the inputs, whatever their rank."""
    xp = space(layer.z)
    if layer.z.shape[0] == 1:  # a Householder reflection of one vector is a division
        size = xp.sqrt(xp.sum(layer.z * layer.z))
        first = xp.zeros_like(layer.z[0, :])
        first = xp.where(xp.arange(layer.z.shape[1], device=array_api_compat.device(first)) == 0, first + 1, first)
        safe = xp.where(size > 0, size, xp.ones_like(size))
        return Basis(layer, xp.where(size > 0, layer.z[0, :] / safe, first)[:, None], size[None, None])
    q, r = xp.linalg.qr(t(layer.z))
    return Basis(layer, q, r)


class Pivot(NamedTuple):
    """What the elimination of one layer leaves behind."""

    basis: Basis
    q_uu: Array
    q_ux: Array | None
    """``None`` in the first layer, whose input does not move."""
    q_xx: Array | None


class Value(NamedTuple):
    """``½ xᵀ P x`` of all that follows: current tangent first, then those kept for residual blocks."""

    p: Array
    n: int
    """Entries of the current tangent."""


def pull(step: Step, value: Value) -> Value:
    """P of the state before a mark, from P of the state after it."""
    return Value(_pull_rows(step, t(_pull_rows(step, value.p, value.n)), value.n), value.n)


def _pull_rows(step: Step, p: Array, n: int) -> Array:
    xp = space(p)
    if step == CLOSE:
        return xp.concat([p, p[:n, ...]])
    rest = p.shape[0] - n
    return xp.concat([p[:n, ...] + p[rest:, ...], p[n:rest, ...]])


def push(step: Step, x: Array, n: int) -> Array:
    """The state after a mark, from the state before it."""
    xp = space(x)
    if step == OPEN:
        return xp.concat([x, x[:n, ...]])
    rest = x.shape[0] - n
    return xp.concat([x[:n, ...] + x[rest:, ...], x[n:rest, ...]])


def behind(layer: Layer, value: Value) -> Array:
    """``M = diag(c) + f P f``: the cost of all that follows, in ds."""
    xp = space(value.p)
    f, c, kept = flat(layer.slope), flat(layer.c), value.p.shape[0] - value.n
    if kept:
        f = xp.concat([f, full((kept,), 1.0, f)])
        c = xp.concat([c, full((kept,), 0.0, c)])
    return add_diagonal(f[:, None] * value.p * f, c)


def pivot(b: Basis, m: Array, damping: Array | float, first: bool) -> Pivot:
    """Q_UU, Q_Ux and Q_xx of a layer."""
    layer, n = b.layer, b.layer.c.shape[0] * b.layer.c.shape[1]
    xp = space(m)
    rm = samples(b.r, m[:n, :])
    q_uu = add_diagonal(symmetric(samples(b.r, t(rm[:, :n]))), damping)
    if first:
        return Pivot(b, q_uu, None, None)
    w_t = t(layer.weight)
    q_ux = units_right(rm[:, :n], layer.weight) + coupling(b)
    q_xx = units(w_t, units_right(m[:n, :n], layer.weight)) - _free(b, damping)
    if m.shape[0] > n:
        across = units(w_t, m[:n, n:])
        q_ux = xp.concat([q_ux, rm[:, n:]], axis=1)
        above = xp.concat([q_xx, across], axis=1)
        q_xx = xp.concat([above, xp.concat([t(across), m[n:, n:]], axis=1)])
    return Pivot(b, q_uu, q_ux, q_xx)


def coupling(b: Basis) -> Array:
    """``Qᵀ ⊗ β``: the term ``β·(dW dz)``, rows (k, j) of U, columns (n, i) of dz."""
    xp = space(b.q)
    a_in, a_out = b.layer.weight.shape[1], b.layer.weight.shape[0]
    n, r = b.r.shape[1], b.r.shape[0]
    q_t, beta_t = t(b.q[:a_in, :]), t(b.layer.beta)
    return xp.reshape(q_t[:, None, None, :] * beta_t[None, :, :, None], (r * a_out, n * a_in))


def _free(b: Basis, damping: Array | float) -> Array | float:
    """``ββᵀ ⊗ (I − QQᵀ)/ε``: what V, eliminated exactly, leaves on the tangent of the input."""
    if b.rest == 0:
        return 0.0
    xp = space(b.q)
    a_in, n = b.layer.weight.shape[1], b.r.shape[1]
    gram = b.layer.beta @ t(b.layer.beta) / damping
    q = b.q[:a_in, :]
    free = identity(a_in, q) - q @ t(q)
    return xp.reshape(gram[:, None, :, None] * free[:, None, :], (n * a_in, n * a_in))


class Kept(NamedTuple):
    """One layer of the factorisation."""

    basis: Basis
    lu: Lu
    gain: Array | None
    """``Q_UU⁻¹ Q_Ux``."""


class Riccati(NamedTuple):
    """The factorisation: steps in order, each layer eliminated."""

    steps: tuple[Kept | str, ...]
    damping: Array | float
    outputs: int
    """Entries of the network's outputs."""


def sweep(terms: Terms, damping: Array | float) -> Iterator[tuple[Pivot | str, Lu | None, Array | None]]:
    """Eliminate from the last layer to the first; yields ``(pivot, its factors, its gain)``, or a mark."""
    last = block_diagonal(terms.curvature)
    value = Value(last, last.shape[0])
    first = terms.layers[0]
    for step in reversed(terms.steps):
        if not isinstance(step, Layer):
            value = pull(step, value)
            yield step, None, None
            continue
        found = pivot(basis(step), behind(step, value), damping, step is first)
        if found.q_ux is None or found.q_xx is None:
            yield found, lu(found.q_uu), None
            continue
        factors, gain = lu_and_solution(found.q_uu, found.q_ux)
        yield found, factors, gain
        p = symmetric(found.q_xx - matmul(t(found.q_ux), gain))
        value = Value(p, step.weight.shape[1] * step.c.shape[0])


def factor(terms: Terms, damping: Array | float) -> Riccati:
    """All pivots factored; ``(4.7 + 4/N) (N a)³`` flops for a layer of N ≤ a samples and width a."""
    kept: list[Kept | str] = []
    for found, factors, gain in sweep(terms, damping):
        if isinstance(found, str) or factors is None:
            kept.append(str(found))
        else:
            kept.append(Kept(found.basis, factors, gain))
    return Riccati(tuple(kept[::-1]), damping, terms.curvature.shape[0] * terms.curvature.shape[1])


def solve(f: Riccati, g: Blocks) -> Blocks:
    """``(H + εI)⁻¹ G``: one sweep back for the right-hand sides, one forward for the weights."""
    xp = space(g[0])
    k = g[0].shape[0]
    g_of = list(g)
    saved: list[tuple[Kept | str, Array | None]] = []
    current = f.outputs
    value = full((current, k), 0.0, g[0])  # mᵀ of all that follows, one column per right-hand side
    for kept in reversed(f.steps):
        if isinstance(kept, str):
            value = _pull_rows(kept, value, current)
            saved.append((kept, None))
            continue
        layer, g_l = kept.basis.layer, g_of.pop()
        n = layer.c.shape[0] * layer.c.shape[1]
        m = xp.concat([flat(layer.slope)[:, None] * value[:n, :], value[n:, :]])
        g_u = _to_u(kept.basis, g_l) + samples(kept.basis.r, m[:n, :])
        saved.append((kept, g_u))
        if kept.gain is not None:
            p = units(t(layer.weight), m[:n, :]) - _free_rows(kept.basis, g_l, f.damping)
            value = xp.concat([p, m[n:, :]]) - t(kept.gain) @ g_u
            current = layer.c.shape[0] * layer.weight.shape[1]
    return _forward(saved[::-1], g, f.damping)


def _forward(saved: list[tuple[Kept | str, Array | None]], g: Blocks, damping: Array | float) -> Blocks:
    """``U = Q_UU⁻¹ g_U − gain·x``, then the tangent of the next input."""
    xp = space(g[0])
    g_of, found, k = iter(g), [], g[0].shape[0]
    x: Array | None = None
    n = waiting = 0  # blocks opened before the first layer keep an input that does not move
    for kept, g_u in saved:
        if isinstance(kept, str) or g_u is None:
            waiting += x is None
            x = None if x is None else push(str(kept), x, n)
            continue
        layer = kept.basis.layer
        u = lu_solve(kept.lu, g_u)
        if x is not None and kept.gain is not None:
            u = u - kept.gain @ x
        found.append(_weights(kept.basis, u, None if x is None else x[:n, :], next(g_of), damping))
        s = samples(t(kept.basis.r), u)
        if x is not None:
            s = s + units(layer.weight, x[:n, :])
        z = flat(layer.slope)[:, None] * s
        if x is None:
            x = full((waiting * layer.c.shape[0] * layer.weight.shape[1], k), 0.0, z)
        x = z if x.shape[0] == n else xp.concat([z, x[n:, :]])
        n = z.shape[0]
    return found


def _to_u(b: Basis, g: Array) -> Array:
    """``Qᵀ Gᵀ`` as rows (k, j), one column per right-hand side."""
    xp = space(g)
    g_u = t(g @ b.q)  # (rhs, r, a_out)
    return t(xp.reshape(g_u, (g.shape[0], -1)))


def _free_rows(b: Basis, g: Array, damping: Array | float) -> Array | float:
    """``(β G)(I − QQᵀ)/ε`` as rows (n, i), one column per right-hand side."""
    if b.rest == 0:
        return 0.0
    xp = space(g)
    y = b.layer.beta @ g
    y = (y - (y @ b.q) @ t(b.q))[..., : b.layer.weight.shape[1]] / damping
    return t(xp.reshape(y, (g.shape[0], -1)))


def _weights(b: Basis, u: Array, x: Array | None, g: Array, damping: Array | float) -> Array:
    """``dW = Uᵀ Qᵀ + (G − βᵀ dz̃)(I − QQᵀ)/ε``."""
    xp = space(g)
    k, q_t = g.shape[0], t(b.q)
    u = xp.reshape(t(u), (k, b.r.shape[0], -1))
    dw = t(u) @ q_t
    if b.rest == 0:
        return dw
    if x is not None:
        dz = xp.reshape(t(x), (k, b.r.shape[1], -1))
        g = g - t(b.layer.beta) @ extended(dz, b.q.shape[0])
    return dw + (g - (g @ b.q) @ q_t) / damping


def slogdet(f: Riccati) -> tuple[Array, Array]:
    """Sign and ``log|det(H + εI)|``: those of the pivots, and ε once for each dimension of V."""
    parts = [(lu_slogdet(kept.lu), kept.basis.rest) for kept in f.steps if isinstance(kept, Kept)]
    return slogdet_sum([part for part, _ in parts], sum(rest for _, rest in parts), f.damping)


def slogdet_sum(parts: list[tuple[Array, Array]], rest: int, damping: Array | float) -> tuple[Array, Array]:
    """Of a product of determinants and ``ε^rest``."""
    xp = array_api_compat.array_namespace(parts[0][0])
    sign = xp.prod(xp.stack([sign for sign, _ in parts]))
    log = xp.sum(xp.stack([log for _, log in parts]))
    eps = full((), damping, log) if isinstance(damping, float) else damping
    if rest == 0:
        return sign, log
    return sign * (xp.sign(eps) if rest % 2 else xp.ones_like(sign)), log + rest * xp.log(xp.abs(eps))
