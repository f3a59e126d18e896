r"""The stable form: Householder QR of the block-tridiagonal system of `_joint`, without pivoting across layers.

The stacked block column of a layer and the one after it, ``[D_k; E_k] = Q [R; 0]``, is factored, ``Qᵀ`` applied to
the two block columns to its right; what fills in reaches one block further. Orthogonal steps cannot grow, so that the
factorisation is backward stable whatever the pivots of an elimination would be. It costs several times as much.
"""

from __future__ import annotations

from typing import NamedTuple

from ddnref._core.arrays import Array
from ddnref.curvature.hessian._dense_blocks import space, t
from ddnref.curvature.hessian._expansion import Blocks, Terms
from ddnref.curvature.hessian._joint import Joint, joint, rights, weights
from ddnref.curvature.hessian._lu import solve_upper, triangular_slogdet
from ddnref.curvature.hessian._riccati import slogdet_sum


class Row(NamedTuple):
    """One block row of the triangular factor."""

    q: Array
    """Square, of this block and the next."""
    r: Array
    next: Array | None
    second: Array | None


class Qr(NamedTuple):
    """The factorisation, and the coordinates it is in."""

    joint: Joint
    rows: tuple[Row, ...]
    damping: Array | float


def factor(terms: Terms, damping: Array | float) -> Qr:
    """From the first layer to the last."""
    j = joint(terms, damping)
    xp = space(terms.curvature)
    rows: list[Row] = []
    d, right = j.diagonal[0], None if not j.below else t(j.below[0])
    for i, e in enumerate(j.below):
        n = d.shape[0]
        q, r = xp.linalg.qr(xp.concat([d, e]), mode="complete")
        q_t = t(q)
        first = q_t @ xp.concat([right, j.diagonal[i + 1]])
        second = None
        if i + 1 < len(j.below):
            above = t(j.below[i + 1])
            second = q_t[:, n:] @ above
        rows.append(Row(q, r[:n, :], first[:n, :], None if second is None else second[:n, :]))
        d, right = first[n:, :], None if second is None else second[n:, :]
    q, r = xp.linalg.qr(d, mode="complete")
    rows.append(Row(q, r, None, None))
    return Qr(j, tuple(rows), damping)


def solve(f: Qr, g: Blocks) -> Blocks:
    """``(H + εI)⁻¹ G``."""
    xp = space(g[0])
    b = rights(f.joint, g)
    for i, row in enumerate(f.rows):
        n = row.r.shape[0]
        if row.next is None:
            b[i] = t(row.q) @ b[i]
        else:
            both = t(row.q) @ xp.concat([b[i], b[i + 1]])
            b[i], b[i + 1] = both[:n, :], both[n:, :]
    y: list[Array] = []
    for row, right in zip(reversed(f.rows), reversed(b), strict=True):
        if row.next is not None:
            right = right - row.next @ y[-1]
        if row.second is not None:
            right = right - row.second @ y[-2]
        y.append(solve_upper(row.r, right))
    return weights(f.joint, y[::-1], g, f.damping)


def slogdet(f: Qr) -> tuple[Array, Array]:
    """Sign and ``log|det(H + εI)|``: the joint matrix has ``(−1)^tangents`` times that determinant."""
    xp = space(f.rows[0].r)
    parts = []
    for row in f.rows:
        sign, log = triangular_slogdet(xp.linalg.diagonal(row.r))
        parts.append((sign * xp.linalg.slogdet(row.q)[0], log))
    sign, log = slogdet_sum(parts, sum(frame.rest for frame in f.joint.frames), f.damping)
    return (-sign if sum(f.joint.tangents) % 2 else sign), log
