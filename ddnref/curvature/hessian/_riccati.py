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

from ddnref._core.arrays import Array, Namespace, full, namespace_of
from ddnref._kernels.blocks import Lu, add_diagonal, lu, lu_and_solution, lu_slogdet, lu_solve, matmul
from ddnref._kernels.dense import identity
from ddnref.curvature.hessian._expansion import CLOSE, OPEN, Basis, Blocks, Expansion, Layer, Step, extended

# --- Kronecker products with small matrices, on vectors ordered (sample, unit) ----------------------------------------


def samples(xp: Namespace, r: Array, m: Array) -> Array:
    """Return ``(R ⊗ I) M``: R acts on the samples of the rows of M."""
    n, cols = r.shape[1], m.shape[1]
    width = m.shape[0] // n
    return xp.reshape(r @ xp.reshape(m, (n, width * cols)), (r.shape[0] * width, cols))


def units(xp: Namespace, w: Array, m: Array) -> Array:
    """Return ``(I ⊗ W) M``: W acts on the units of the rows of M."""
    n, cols = m.shape[0] // w.shape[1], m.shape[1]
    return xp.reshape(w @ xp.reshape(m, (n, w.shape[1], cols)), (n * w.shape[0], cols))


def units_right(xp: Namespace, m: Array, w: Array) -> Array:
    """Return ``M (I ⊗ W)``: W acts on the units of the columns of M."""
    rows, n = m.shape[0], m.shape[1] // w.shape[0]
    return xp.reshape(xp.reshape(m, (rows * n, w.shape[0])) @ w, (rows, n * w.shape[1]))


def block_diagonal(xp: Namespace, s: Array) -> Array:
    """Return the (N a, N a) matrix with the N given (a, a) blocks on its diagonal."""
    n, a = s.shape[0], s.shape[1]
    return xp.reshape(identity(n, s)[:, None, :, None] * s[:, :, None, :], (n * a, n * a))


def coupling(xp: Namespace, b: Basis) -> Array:
    """Return ``Qᵀ ⊗ β``, the term ``β·(dW dz)``: rows (k, j) of U, columns (n, i) of dz."""
    a_out, a_in = b.layer.weight.shape
    r, n = b.r.shape
    q_t, beta_t = b.q[:a_in, :].mT, b.layer.beta.mT
    return xp.reshape(q_t[:, None, None, :] * beta_t[None, :, :, None], (r * a_out, n * a_in))


class Value(NamedTuple):
    """``½ xᵀ P x`` of all that follows: current tangent first, then those kept for residual blocks."""

    p: Array
    n: int  # entries of the current tangent


def _pull_rows(xp: Namespace, step: Step, p: Array, n: int) -> Array:
    """Apply the transpose of `push` to the rows of P."""
    if step == CLOSE:
        return xp.concat([p, p[:n, ...]])
    rest = p.shape[0] - n
    return xp.concat([p[:n, ...] + p[rest:, ...], p[n:rest, ...]])


def push(xp: Namespace, step: Step, x: Array, n: int) -> Array:
    """The state after a mark, from the state before it."""
    if step == OPEN:
        return xp.concat([x, x[:n, ...]])
    rest = x.shape[0] - n
    return xp.concat([x[:n, ...] + x[rest:, ...], x[n:rest, ...]])


def pivot(xp: Namespace, b: Basis, value: Value, damping: Array | float, first: bool) -> tuple[Array, Array, Array]:
    """Form Q_UU, Q_Ux and Q_xx; the latter two are ``None`` in the first layer, whose input does not move."""
    layer, n = b.layer, b.layer.c.shape[0] * b.layer.c.shape[1]
    m = _behind(xp, layer, value)
    # Q_UU = ε I + (R⊗I) M (R⊗I)ᵀ
    rm = samples(xp, b.r, m[:n, :])
    q_uu = samples(xp, b.r, rm[:, :n].mT)
    q_uu = add_diagonal((q_uu + q_uu.mT) / 2, damping)
    if first:
        return q_uu, None, None
    # Q_Ux = (R⊗I) M (I⊗W) + Qᵀ⊗β
    q_ux = units_right(xp, rm[:, :n], layer.weight) + coupling(xp, b)
    # Q_xx = (I⊗W)ᵀ M (I⊗W) − ββᵀ ⊗ (I − QQᵀ)/ε
    w_t = layer.weight.mT
    q_xx = units(xp, w_t, units_right(xp, m[:n, :n], layer.weight)) - _free(xp, b, damping)
    if m.shape[0] > n:  # tangents kept for residual blocks pass by the layer
        across = units(xp, w_t, m[:n, n:])
        q_ux = xp.concat([q_ux, rm[:, n:]], axis=1)
        above = xp.concat([q_xx, across], axis=1)
        q_xx = xp.concat([above, xp.concat([across.mT, m[n:, n:]], axis=1)])
    return q_uu, q_ux, q_xx


def _behind(xp: Namespace, layer: Layer, value: Value) -> Array:
    """Return ``M = diag(c) + f P f``, the cost of all that follows as a function of ds."""
    f, c = xp.reshape(layer.slope, (-1,)), xp.reshape(layer.c, (-1,))
    kept = value.p.shape[0] - value.n
    if kept:
        f = xp.concat([f, full((kept,), 1.0, f)])
        c = xp.concat([c, full((kept,), 0.0, c)])
    return add_diagonal(f[:, None] * value.p * f, c)


def _free(xp: Namespace, b: Basis, damping: Array | float) -> Array | float:
    """Return ``ββᵀ ⊗ (I − QQᵀ)/ε``: what V, eliminated exactly, leaves on the tangent of the input."""
    if b.rest == 0:
        return 0.0
    a_in, n = b.layer.weight.shape[1], b.r.shape[1]
    gram = b.layer.beta @ b.layer.beta.mT / damping
    q = b.q[:a_in, :]
    free = identity(a_in, q) - q @ q.mT
    return xp.reshape(gram[:, None, :, None] * free[:, None, :], (n * a_in, n * a_in))


class Kept(NamedTuple):
    """One layer of the factorisation."""

    basis: Basis
    lu: Lu
    gain: Array | None  # ``Q_UU⁻¹ Q_Ux``; ``None`` in the first layer


class Riccati(NamedTuple):
    """The factorisation: steps in order, each layer eliminated."""

    steps: tuple[Kept | str, ...]
    damping: Array | float
    outputs: int  # entries of the network's outputs


def sweep(bases: list[Basis], e: Expansion, damping: Array | float) -> Iterator[tuple[Kept | str, Array | None]]:
    """Eliminate from the last layer to the first; yields what is kept of each and its pivot, or a mark and ``None``."""
    xp, last, bases_of = e.xp, block_diagonal(e.xp, e.curvature), reversed(bases)
    value = Value(last, last.shape[0])
    for step in reversed(e.steps):
        if not isinstance(step, Layer):
            # P of the state before the mark, from P of the state after it
            rows = _pull_rows(xp, step, value.p, value.n)
            value = Value(_pull_rows(xp, step, rows.mT, value.n), value.n)
            yield step, None
            continue
        b = next(bases_of)
        q_uu, q_ux, q_xx = pivot(xp, b, value, damping, b is bases[0])
        if q_ux is None:  # nothing is handed on
            yield Kept(b, lu(q_uu), None), q_uu
            continue
        factors, gain = lu_and_solution(q_uu, q_ux)
        yield Kept(b, factors, gain), q_uu
        # P = Q_xx − Q_Uxᵀ Q_UU⁻¹ Q_Ux goes to the layer before.
        p = q_xx - matmul(q_ux.mT, gain)
        value = Value((p + p.mT) / 2, step.weight.shape[1] * step.c.shape[0])


def factor(bases: list[Basis], e: Expansion, damping: Array | float) -> Riccati:
    """Factor all pivots; ``(4.7 + 4/N) (N a)³`` flops for a layer of N ≤ a samples and width a."""
    kept = [kept for kept, _ in sweep(bases, e, damping)]
    return Riccati(tuple(kept[::-1]), damping, e.curvature.shape[0] * e.curvature.shape[1])


def solve(f: Riccati, g: Blocks) -> Blocks:
    """Return ``(H + εI)⁻¹ G``: one sweep back for the right-hand sides, one forward for the weights."""
    xp, k = namespace_of(g[0]), g[0].shape[0]
    g_of = list(g)
    saved: list[tuple[Kept | str, Array | None]] = []
    current = f.outputs
    value = full((current, k), 0.0, g[0])  # mᵀ of all that follows, one column per right-hand side
    for kept in reversed(f.steps):
        if isinstance(kept, str):
            value = _pull_rows(xp, kept, value, current)
            saved.append((kept, None))
            continue
        layer, g_l = kept.basis.layer, g_of.pop()
        n = layer.c.shape[0] * layer.c.shape[1]
        # From the layer's output to its pre-activation, then to U; kept tangents pass by.
        m = xp.concat([xp.reshape(layer.slope, (-1, 1)) * value[:n, :], value[n:, :]])
        g_u = to_u(xp, kept.basis, g_l) + samples(xp, kept.basis.r, m[:n, :])
        saved.append((kept, g_u))
        # What is left for the input of the layer goes to the one before.
        if kept.gain is not None:
            p = units(xp, layer.weight.mT, m[:n, :]) - _free_rows(xp, kept.basis, g_l, f.damping)
            value = xp.concat([p, m[n:, :]]) - kept.gain.mT @ g_u
            current = layer.c.shape[0] * layer.weight.shape[1]
    return _forward(xp, saved[::-1], g, f.damping)


def _forward(xp: Namespace, saved: list[tuple[Kept | str, Array | None]], g: Blocks, damping: Array | float) -> Blocks:
    """Solve ``U = Q_UU⁻¹ g_U − gain·x`` layer by layer, then pass on the tangent of the next input."""
    g_of, found, k = iter(g), [], g[0].shape[0]
    x: Array | None = None
    n = waiting = 0  # blocks opened before the first layer keep an input that does not move
    for kept, g_u in saved:
        if isinstance(kept, str) or g_u is None:
            waiting += x is None
            x = None if x is None else push(xp, str(kept), x, n)
            continue
        layer = kept.basis.layer
        u = lu_solve(kept.lu, g_u)
        if x is not None and kept.gain is not None:
            u = u - kept.gain @ x
        found.append(_weights(xp, kept.basis, u, None if x is None else x[:n, :], next(g_of), damping))
        # ds = Rᵀ U + dz Wᵀ, dz⁺ = f ∘ ds
        s = samples(xp, kept.basis.r.mT, u)
        if x is not None:
            s = s + units(xp, layer.weight, x[:n, :])
        z = xp.reshape(layer.slope, (-1, 1)) * s
        if x is None:
            x = full((waiting * layer.c.shape[0] * layer.weight.shape[1], k), 0.0, z)
        x = z if x.shape[0] == n else xp.concat([z, x[n:, :]])
        n = z.shape[0]
    return found


def to_u(xp: Namespace, b: Basis, g: Array) -> Array:
    """Return ``Qᵀ Gᵀ`` as rows (k, j), one column per right-hand side."""
    g_u = (g @ b.q).mT  # (rhs, r, a_out)
    return xp.reshape(g_u, (g.shape[0], -1)).mT


def _free_rows(xp: Namespace, b: Basis, g: Array, damping: Array | float) -> Array | float:
    """Return ``(β G)(I − QQᵀ)/ε`` as rows (n, i), one column per right-hand side."""
    if b.rest == 0:
        return 0.0
    y = b.layer.beta @ g
    y = (y - (y @ b.q) @ b.q.mT)[..., : b.layer.weight.shape[1]] / damping
    return xp.reshape(y, (g.shape[0], -1)).mT


def _weights(xp: Namespace, b: Basis, u: Array, x: Array | None, g: Array, damping: Array | float) -> Array:
    """Return ``dW = Uᵀ Qᵀ + (G − βᵀ dz̃)(I − QQᵀ)/ε``."""
    k, q_t = g.shape[0], b.q.mT
    dw = xp.reshape(u.mT, (k, b.r.shape[0], -1)).mT @ q_t
    if b.rest == 0:
        return dw
    if x is not None:
        dz = xp.reshape(x.mT, (k, b.r.shape[1], -1))
        g = g - b.layer.beta.mT @ extended(xp, dz, b.q.shape[0])
    return dw + (g - (g @ b.q) @ q_t) / damping


def slogdet(f: Riccati) -> tuple[Array, Array]:
    """Return sign and ``log|det(H + εI)|``: those of the pivots, and ε once for each dimension of V."""
    layers = [kept for kept in f.steps if isinstance(kept, Kept)]
    return slogdet_sum([lu_slogdet(kept.lu) for kept in layers], sum(kept.basis.rest for kept in layers), f.damping)


def slogdet_sum(parts: list[tuple[Array, Array]], rest: int, damping: Array | float) -> tuple[Array, Array]:
    """Return sign and logarithm of a product of determinants and ``ε^rest``."""
    xp = namespace_of(parts[0][0])
    sign = xp.prod(xp.stack([sign for sign, _ in parts]))
    log = xp.sum(xp.stack([log for _, log in parts]))
    if rest == 0:
        return sign, log
    eps = full((), damping, log) if isinstance(damping, float) else damping
    return sign * (xp.sign(eps) if rest % 2 else xp.ones_like(sign)), log + rest * xp.log(xp.abs(eps))
