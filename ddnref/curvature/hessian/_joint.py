r"""The layers' joint stationarity blocks: weights, tangent and multiplier together, nothing divided by ε.

With the bases of `_riccati` and ``βᵀ = Q_B R_B``, ``I − QQᵀ = Q⊥ Q⊥ᵀ`` a layer's weights are

    dW = Uᵀ Qᵀ + Q_B v Q⊥ᵀ + rest

and the rest meets neither inputs nor β: there H + εI is εI. x is the tangent that a layer reads, with those kept for
residual blocks; x⁺ = F x + J U the one that it leaves, λ its multiplier. In the order (U, v, x⁺, λ) for each layer the
stationarity of the expansion is symmetric and block tridiagonal:

    [ ε + (R⊗I) c (R⊗I)ᵀ              −Jᵀ ]      coupling to x, which belongs to the layer before:
    [                     ε               ]      U: (R⊗I) c (I⊗W) + Qᵀ⊗β,   v: R_B ⊗ Q⊥ᵀ,   λ: −F;
    [                           X     I   ]      X = (I⊗W)ᵀ c (I⊗W) of the layer after, S behind the last
    [      −J                   I         ]
"""

from __future__ import annotations

from typing import NamedTuple

from ddnref._core.arrays import Array, full
from ddnref._kernels.dense import identity
from ddnref.curvature.hessian._dense_blocks import flat, space, t
from ddnref.curvature.hessian._expansion import Blocks, Layer, Terms, block_diagonal, samples, units
from ddnref.curvature.hessian._riccati import Basis, _to_u, basis, coupling, push


class Frame(NamedTuple):
    """One layer's coordinates."""

    basis: Basis
    free: Array
    """Q⊥, (ã, ã − r)."""
    q_b: Array
    """(a_out, r_B)."""
    r_b: Array
    """(r_B, N)."""

    @property
    def u(self) -> int:
        """Entries of U."""
        return int(self.basis.r.shape[0]) * int(self.basis.layer.weight.shape[0])

    @property
    def v(self) -> int:
        """Entries of v."""
        return int(self.q_b.shape[1]) * int(self.free.shape[1])

    @property
    def rest(self) -> int:
        """Dimensions in which H + εI is εI."""
        return int(self.basis.layer.weight.shape[0] - self.q_b.shape[1]) * int(self.free.shape[1])


def frame(layer: Layer) -> Frame:
    """Orthonormal bases by QR, of whatever rank."""
    xp = space(layer.z)
    n, width = layer.z.shape
    b = basis(layer)
    if n >= width:
        nothing = layer.z[:0, :0]
        a_out = layer.weight.shape[0]
        empty = full((width, 0), 0.0, layer.z)
        return Frame(b, empty, full((a_out, 0), 0.0, layer.z), nothing)
    q, r = xp.linalg.qr(t(layer.z), mode="complete")
    q_b, r_b = xp.linalg.qr(t(layer.beta))
    return Frame(Basis(layer, q[:, :n], r[:n, :]), q[:, n:], q_b, r_b)


class Joint(NamedTuple):
    """The block-tridiagonal system."""

    frames: list[Frame]
    diagonal: list[Array]
    below: list[Array]
    """Rows of layer l + 1, columns of layer l."""
    tangents: list[int]
    """Entries of x⁺ of each layer; as many multipliers."""


class _Dynamics(NamedTuple):
    u: Array
    """J: U to x⁺."""
    x: Array
    """F: x to x⁺; ``None`` in the first layer."""


def joint(terms: Terms, damping: Array | float) -> Joint:
    """All blocks, for any shape of the weights' part: block sizes ``u + v + 2 tangents``."""
    frames = [frame(layer) for layer in terms.layers]
    dynamics = _dynamics(terms, frames)
    quadratics = [_quadratic(f, 0 if d.x is None else d.x.shape[1]) for f, d in zip(frames, dynamics, strict=True)]
    diagonal, below = [], []
    last = block_diagonal(terms.curvature)
    for i, (f, d) in enumerate(zip(frames, dynamics, strict=True)):
        x_x = quadratics[i + 1][2] if i + 1 < len(frames) else last
        diagonal.append(_diagonal_block(f, d, quadratics[i][0], x_x, damping))
        if i:
            below.append(_below_block(f, d, quadratics[i][1], frames[i - 1]))
    return Joint(frames, diagonal, below, [d.u.shape[0] for d in dynamics])


def _dynamics(terms: Terms, frames: list[Frame]) -> list[_Dynamics]:
    """J and F of every layer, the marks that follow it included."""
    xp = space(terms.curvature)
    found: list[_Dynamics] = []
    frames_of = iter(frames)
    size = n = waiting = 0
    for step in terms.steps:
        if not isinstance(step, Layer):
            if not found:
                waiting += 1
                continue
            u, x = found[-1]
            found[-1] = _Dynamics(push(step, u, n), None if x is None else push(step, x, n))
            size = found[-1].u.shape[0]
            continue
        f, n_in = next(frames_of), step.c.shape[0] * step.weight.shape[1]
        n = step.c.shape[0] * step.c.shape[1]
        slope = flat(step.slope)[:, None]
        j = slope * samples(t(f.basis.r), identity(f.u, step.c))
        kept = waiting * n_in if not found else size - n_in
        j = xp.concat([j, full((kept, f.u), 0.0, j)])
        x = None
        if found:
            eye = identity(size, j)
            x = xp.concat([slope * units(step.weight, eye[:n_in, :]), eye[n_in:, :]])
        found.append(_Dynamics(j, x))
        size = j.shape[0]
    return found


def _quadratic(f: Frame, size: int) -> tuple[Array, Array, Array]:
    """``½ c ds²`` and ``β·(dW dz)`` in U and the `size` entries of x: blocks UU, Ux and xx."""
    xp = space(f.basis.r)
    layer = f.basis.layer
    c, w_t = flat(layer.c)[:, None], t(layer.weight)
    s_u = samples(t(f.basis.r), identity(f.u, layer.c))
    u_u = samples(f.basis.r, c * s_u)
    if not size:
        return u_u, u_u[:, :0], u_u[:0, :0]
    n_in = layer.c.shape[0] * layer.weight.shape[1]
    c_x = c * units(layer.weight, identity(size, layer.c)[:n_in, :])
    u_x = samples(f.basis.r, c_x) + _padded(coupling(f.basis), size)
    x_x = xp.concat([units(w_t, c_x), full((size - n_in, size), 0.0, c_x)])
    return u_u, u_x, x_x


def _padded(m: Array, columns: int) -> Array:
    xp = space(m)
    return xp.concat([m, full((m.shape[0], columns - m.shape[1]), 0.0, m)], axis=1)


def _diagonal_block(f: Frame, d: _Dynamics, u_u: Array, x_x: Array, damping: Array | float) -> Array:
    xp = space(u_u)
    m = d.u.shape[0]
    v = f.v
    eye_x = identity(m, u_u)

    def zeros(rows: int, columns: int) -> Array:
        return full((rows, columns), 0.0, u_u)

    rows = [
        [u_u + damping * identity(f.u, u_u), zeros(f.u, v), zeros(f.u, m), -t(d.u)],
        [zeros(v, f.u), damping * identity(v, u_u), zeros(v, m), zeros(v, m)],
        [zeros(m, f.u), zeros(m, v), x_x, eye_x],
        [-d.u, zeros(m, v), eye_x, zeros(m, m)],
    ]
    return xp.concat([xp.concat(r, axis=1) for r in rows])


def _below_block(f: Frame, d: _Dynamics, u_x: Array, before: Frame) -> Array:
    """Rows (U, v, x⁺, λ) of a layer, columns of the one before, of which only x takes part."""
    xp = space(u_x)
    size, m = u_x.shape[1], d.u.shape[0]
    n, a_in = f.basis.layer.c.shape[0], f.basis.layer.weight.shape[1]
    free_t = t(f.free[:a_in, :])
    v_x = xp.reshape(f.r_b[:, None, :, None] * free_t[None, :, None, :], (f.v, n * a_in)) if f.v else u_x[:0, :a_in]
    moving = xp.concat([u_x, _padded(v_x, size), full((m, size), 0.0, u_x), -d.x])
    left, right = before.u + before.v, size
    return xp.concat(
        [full((moving.shape[0], left), 0.0, moving), moving, full((moving.shape[0], right), 0.0, moving)], axis=1
    )


def rights(j: Joint, g: Blocks) -> list[Array]:
    """Right-hand sides in the coordinates of the blocks, one column each."""
    xp = space(g[0])
    found = []
    for f, g_l, m in zip(j.frames, g, j.tangents, strict=True):
        g_v = t(f.q_b) @ g_l @ f.free
        g_v = t(xp.reshape(g_v, (g_l.shape[0], f.v)))
        found.append(xp.concat([_to_u(f.basis, g_l), g_v, full((2 * m, g_l.shape[0]), 0.0, g_l)]))
    return found


def weights(j: Joint, y: list[Array], g: Blocks, damping: Array | float) -> Blocks:
    """``dW = Uᵀ Qᵀ + Q_B v Q⊥ᵀ + (I − Q_B Q_Bᵀ) G Q⊥ Q⊥ᵀ / ε``."""
    xp = space(g[0])
    found = []
    for f, y_l, g_l in zip(j.frames, y, g, strict=True):
        k = g_l.shape[0]
        u = xp.reshape(t(y_l[: f.u, :]), (k, f.basis.r.shape[0], -1))
        dw = t(u) @ t(f.basis.q)
        if f.free.shape[1]:
            v = xp.reshape(t(y_l[f.u : f.u + f.v, :]), (k, f.q_b.shape[1], f.free.shape[1]))
            part = f.q_b @ v
            if f.rest:
                g_free = g_l @ f.free
                part = part + (g_free - f.q_b @ (t(f.q_b) @ g_free)) / damping
            dw = dw + part @ t(f.free)
        found.append(dw)
    return found
