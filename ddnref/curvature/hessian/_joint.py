r"""The stable forms: the layers' joint stationarity blocks, with nothing divided by ε, factored by QR or counted.

With the bases of `_riccati` and ``βᵀ = Q_B R_B``, ``I − QQᵀ = Q⊥ Q⊥ᵀ`` a layer's weights are

    dW = Uᵀ Qᵀ + Q_B v Q⊥ᵀ + rest

and the rest meets neither inputs nor β, so that H + εI is εI there. x is the tangent that a layer reads, with those
kept for residual blocks; x⁺ = F x + J U the one that it leaves, λ its multiplier. In the order (U, v, x⁺, λ) for each
layer the stationarity of the expansion is symmetric and block tridiagonal:

    [ ε + (R⊗I) c (R⊗I)ᵀ              −Jᵀ ]      coupling to x, which belongs to the layer before:
    [                     ε               ]      U: (R⊗I) c (I⊗W) + Qᵀ⊗β,   v: R_B ⊗ Q⊥ᵀ,   λ: −F;
    [                           X     I   ]      X = (I⊗W)ᵀ c (I⊗W) of the layer after, S behind the last
    [      −J                   I         ]

*QR.* The stacked block column of a layer and the one after it, ``[D_k; E_k] = Q [R; 0]``, is factored by Householder
reflections, ``Qᵀ`` applied to the two block columns to its right; what fills in reaches one block further. Orthogonal
steps cannot grow, so that the factorisation is backward stable without pivoting across layers.

*Counting.* By Sylvester's law the signs of the pivots are the signs of the eigenvalues. Where a pivot is nearly
singular while its layer is coupled to the next, `count_delayed` does what sparse symmetric solvers do: it diagonalises
the pivot and hands the directions with ``|λ| < θ ‖coupling‖`` over to the next block, where the coupling itself makes
them large. Growth is bounded by 1/θ in every step, for every shift.
"""

from __future__ import annotations

from typing import NamedTuple

from ddnref._core.arrays import Array, Namespace, full, is_true, namespace_of
from ddnref._kernels.blocks import triangular_slogdet
from ddnref._kernels.dense import eigh, eigvalsh, identity
from ddnref._kernels.lu import solve_triangular
from ddnref.curvature.hessian._expansion import Basis, Blocks, Expansion, Layer, basis
from ddnref.curvature.hessian._riccati import block_diagonal, coupling, push, samples, slogdet_sum, to_u, units
from ddnref.errors import ConvergenceError

THETA = 1e-3  # directions of a pivot are delayed below this multiple of their coupling to the next layer


class Frame(NamedTuple):
    """One layer's coordinates."""

    basis: Basis
    free: Array  # Q⊥, (ã, ã − r)
    q_b: Array  # (a_out, r_B)
    r_b: Array  # (r_B, N)

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


def frame(xp: Namespace, layer: Layer) -> Frame:
    """Compute orthonormal bases by QR, whatever the ranks."""
    n, width = layer.z.shape
    if n >= width:  # inputs span everything, and nothing is free
        nothing = full((width, 0), 0.0, layer.z)
        return Frame(basis(xp, layer), nothing, full((layer.weight.shape[0], 0), 0.0, layer.z), layer.z[:0, :0])
    q, r = xp.linalg.qr(layer.z.mT, mode="complete")
    return Frame(Basis(layer, q[:, :n], r[:n, :]), q[:, n:], *xp.linalg.qr(layer.beta.mT))


class Joint(NamedTuple):
    """The block-tridiagonal system."""

    frames: list[Frame]
    diagonal: list[Array]
    below: list[Array]  # rows of layer l + 1, columns of layer l
    tangents: list[int]  # entries of x⁺ of each layer; as many multipliers
    damping: Array | float


def joint(e: Expansion, damping: Array | float) -> Joint:
    """Form all blocks, of sizes ``u + v + 2 tangents``."""
    xp = e.xp
    frames = [frame(xp, layer) for layer in e.layers]
    dynamics = _dynamics(xp, e, frames)
    quadratics = [_quadratic(xp, f, 0 if i == 0 else dynamics[i][1].shape[1]) for i, f in enumerate(frames)]
    # The quadratic of a layer in its input x belongs to the block before, where x is x⁺.
    x_x = [*(q[2] for q in quadratics[1:]), block_diagonal(xp, e.curvature)]
    diagonal, below = [], []
    for i, (j_u, f_x) in enumerate(dynamics):
        u_u, u_x, _ = quadratics[i]
        diagonal.append(_diagonal_block(xp, frames[i], j_u, u_u, x_x[i], damping))
        if i:
            below.append(_below_block(xp, frames[i], f_x, u_x, frames[i - 1]))
    return Joint(frames, diagonal, below, [j_u.shape[0] for j_u, _ in dynamics], damping)


def _dynamics(xp: Namespace, e: Expansion, frames: list[Frame]) -> list[tuple[Array, Array]]:
    """Compute J and F of every layer, including the marks that follow it; F is ``None`` in the first layer."""
    found: list[tuple[Array, Array]] = []
    frames_of = iter(frames)
    n = waiting = 0  # blocks opened before the first layer keep an input that does not move
    for step in e.steps:
        if isinstance(step, Layer):
            f, n_in = next(frames_of), step.c.shape[0] * step.weight.shape[1]
            n, size = step.c.shape[0] * step.c.shape[1], found[-1][0].shape[0] if found else (1 + waiting) * n_in
            # J = f (R⊗I)ᵀ, and zero for the tangents kept for residual blocks
            slope = xp.reshape(step.slope, (-1, 1))
            j = slope * samples(xp, f.basis.r.mT, identity(f.u, step.c))
            j = xp.concat([j, full((size - n_in, f.u), 0.0, j)])
            # F = f (I⊗W), and the identity for the tangents kept
            x = None
            if found:
                eye = identity(size, j)
                x = xp.concat([slope * units(xp, step.weight, eye[:n_in, :]), eye[n_in:, :]])
            found.append((j, x))
        elif found:
            u, x = found[-1]
            found[-1] = push(xp, step, u, n), None if x is None else push(xp, step, x, n)
        else:
            waiting += 1
    return found


def _quadratic(xp: Namespace, f: Frame, size: int) -> tuple[Array, Array, Array]:
    """Return ``½ c ds²`` and ``β·(dW dz)`` in U and the `size` entries of x: blocks UU, Ux and xx."""
    layer, r = f.basis.layer, f.basis.r
    c = xp.reshape(layer.c, (-1, 1))
    u_u = samples(xp, r, c * samples(xp, r.mT, identity(f.u, layer.c)))
    if not size:
        return u_u, u_u[:, :0], u_u[:0, :0]
    n_in = layer.c.shape[0] * layer.weight.shape[1]
    c_x = c * units(xp, layer.weight, identity(size, layer.c)[:n_in, :])
    u_x = samples(xp, r, c_x) + _padded(xp, coupling(xp, f.basis), size)
    x_x = xp.concat([units(xp, layer.weight.mT, c_x), full((size - n_in, size), 0.0, c_x)])
    return u_u, u_x, x_x


def _padded(xp: Namespace, m: Array, columns: int) -> Array:
    return xp.concat([m, full((m.shape[0], columns - m.shape[1]), 0.0, m)], axis=1)


def _diagonal_block(xp: Namespace, f: Frame, j: Array, u_u: Array, x_x: Array, damping: Array | float) -> Array:
    """Form the matrix of the module's docstring for one layer."""
    m, v = j.shape[0], f.v
    eye_x = identity(m, u_u)

    def zeros(rows: int, columns: int) -> Array:
        return full((rows, columns), 0.0, u_u)

    rows = [
        [u_u + damping * identity(f.u, u_u), zeros(f.u, v), zeros(f.u, m), -j.mT],
        [zeros(v, f.u), damping * identity(v, u_u), zeros(v, m), zeros(v, m)],
        [zeros(m, f.u), zeros(m, v), x_x, eye_x],
        [-j, zeros(m, v), eye_x, zeros(m, m)],
    ]
    return xp.concat([xp.concat(r, axis=1) for r in rows])


def _below_block(xp: Namespace, f: Frame, f_x: Array, u_x: Array, before: Frame) -> Array:
    """Form the rows (U, v, x⁺, λ) of a layer in the columns of the one before, of which only x takes part."""
    size, m = u_x.shape[1], f_x.shape[0]
    n, a_in = f.basis.layer.c.shape[0], f.basis.layer.weight.shape[1]
    free_t = f.free[:a_in, :].mT
    v_x = xp.reshape(f.r_b[:, None, :, None] * free_t[None, :, None, :], (f.v, n * a_in)) if f.v else u_x[:0, :a_in]
    moving = xp.concat([u_x, _padded(xp, v_x, size), full((m, size), 0.0, u_x), -f_x])
    left, right = (full((moving.shape[0], columns), 0.0, moving) for columns in (before.u + before.v, size))
    return xp.concat([left, moving, right], axis=1)


# --- QR ---------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One block row of the triangular factor."""

    q: Array  # Square, of this block and the next
    r: Array
    next: Array | None
    second: Array | None  # what fills in, two blocks to the right


def factor(e: Expansion, damping: Array | float) -> tuple[Joint, list[Row]]:
    """Factor from the first layer to the last."""
    j, xp = joint(e, damping), e.xp
    rows: list[Row] = []
    d, right = j.diagonal[0], None if not j.below else j.below[0].mT
    for i, below in enumerate(j.below):
        n = d.shape[0]
        q, r = xp.linalg.qr(xp.concat([d, below]), mode="complete")
        # Qᵀ changes the block column of the next layer, and fills in the one behind it.
        first = q.mT @ xp.concat([right, j.diagonal[i + 1]])
        second = q.mT[:, n:] @ j.below[i + 1].mT if i + 1 < len(j.below) else None
        rows.append(Row(q, r[:n, :], first[:n, :], None if second is None else second[:n, :]))
        d, right = first[n:, :], None if second is None else second[n:, :]
    q, r = xp.linalg.qr(d, mode="complete")
    rows.append(Row(q, r, None, None))
    return j, rows


def solve(j: Joint, rows: list[Row], g: Blocks) -> Blocks:
    """Return ``(H + εI)⁻¹ G``."""
    xp = namespace_of(g[0])
    b = _rights(xp, j, g)
    # Apply Qᵀ from the first layer to the last.
    for i, row in enumerate(rows):
        both, n = row.q.mT @ xp.concat(b[i : i + 2]), row.r.shape[0]
        b[i] = both[:n, :]
        if row.next is not None:
            b[i + 1] = both[n:, :]
    # Substitute from the last layer to the first.
    y: list[Array] = []
    for row, right in zip(reversed(rows), reversed(b), strict=True):
        if row.next is not None:
            right = right - row.next @ y[-1]
        if row.second is not None:
            right = right - row.second @ y[-2]
        y.append(solve_triangular(row.r, right, lower=False))
    return _weights(xp, j, y[::-1], g)


def _rights(xp: Namespace, j: Joint, g: Blocks) -> list[Array]:
    """Express right-hand sides in the coordinates of the blocks, one column each."""
    found = []
    for f, g_l, m in zip(j.frames, g, j.tangents, strict=True):
        g_v = xp.reshape(f.q_b.mT @ g_l @ f.free, (g_l.shape[0], f.v)).mT
        found.append(xp.concat([to_u(xp, f.basis, g_l), g_v, full((2 * m, g_l.shape[0]), 0.0, g_l)]))
    return found


def _weights(xp: Namespace, j: Joint, y: list[Array], g: Blocks) -> Blocks:
    """Return ``dW = Uᵀ Qᵀ + Q_B v Q⊥ᵀ + (I − Q_B Q_Bᵀ) G Q⊥ Q⊥ᵀ / ε``."""
    found = []
    for f, y_l, g_l in zip(j.frames, y, g, strict=True):
        k = g_l.shape[0]
        u = xp.reshape(y_l[: f.u, :].mT, (k, f.basis.r.shape[0], -1))
        dw = u.mT @ f.basis.q.mT
        if f.free.shape[1]:
            v = xp.reshape(y_l[f.u : f.u + f.v, :].mT, (k, f.q_b.shape[1], f.free.shape[1]))
            part = f.q_b @ v
            if f.rest:
                g_free = g_l @ f.free
                part = part + (g_free - f.q_b @ (f.q_b.mT @ g_free)) / j.damping
            dw = dw + part @ f.free.mT
        found.append(dw)
    return found


def slogdet(j: Joint, rows: list[Row]) -> tuple[Array, Array]:
    """Return sign and ``log|det(H + εI)|``: the joint matrix has ``(−1)^tangents`` times that determinant."""
    xp = namespace_of(rows[0].r)
    parts = []
    for row in rows:
        sign, log = triangular_slogdet(row.r)
        parts.append((sign * xp.linalg.slogdet(row.q)[0], log))
    sign, log = slogdet_sum(parts, sum(frame.rest for frame in j.frames), j.damping)
    return (-sign if sum(j.tangents) % 2 else sign), log


# --- counting ---------------------------------------------------------------------------------------------------------


def count_below(w: Array, bound: float) -> int:
    """Count the eigenvalues below a bound; NaN, which would count as none, is refused."""
    xp = namespace_of(w)
    if is_true(xp.any(xp.isnan(w))):
        raise ConvergenceError(
            "Eigenvalues cannot be counted: an eigendecomposition has not converged, or met NaN. The most likely cause "
            "is huge weights or data, or a damping that makes a block exactly singular. Pass another damping."
        )
    return int(xp.sum(xp.astype(w < bound, xp.int32)))


def count_delayed(e: Expansion, damping: float) -> int:
    """Count the negative eigenvalues of H + εI for any shift, with delayed pivots."""
    j, xp, count = joint(e, damping), e.xp, 0
    pivot = j.diagonal[0]
    for i, below in enumerate(j.below):
        w, q = eigh((pivot + pivot.mT) / 2)
        old = pivot.shape[0] - below.shape[1]
        b = below @ q[old:, :]  # the next block is coupled to the layer itself alone
        # Order the directions so that those to be delayed come first.
        ratio = xp.abs(w) / xp.sqrt(xp.sum(b * b, axis=0) + full((), 1e-300, w))
        order = xp.argsort(ratio)
        late = int(xp.sum(xp.astype(ratio < THETA, xp.int32)))
        w, b = xp.take(w, order, axis=0), xp.take(b, order, axis=1)
        # Count and eliminate the others; the delayed ones join the next block.
        count += count_below(w[late:], 0.0)
        now = b[:, late:]
        d = j.diagonal[i + 1] - (now / w[late:]) @ now.mT
        top = xp.concat([identity(late, d) * w[:late], b[:, :late].mT], axis=1)
        pivot = xp.concat([top, xp.concat([b[:, :late], d], axis=1)])
    count += count_below(eigvalsh((pivot + pivot.mT) / 2), 0.0)
    # The joint matrix has one negative eigenvalue more for each multiplier.
    return count - sum(j.tangents) + (damping < 0) * sum(f.rest for f in j.frames)
