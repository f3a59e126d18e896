r"""The sweep of `_riccati` on active units alone, with LU or Cholesky pivots.

A pre-activation (n, j) whose slope f and curvature c are both zero changes nothing behind its layer: the row and the
column of ``M = diag(c) + f P f`` are zero there. A are the others, the *active* ones, half of them with ReLU. Three
things shrink:

- *The state.* ``dz = f ∘ ds`` moves on A only, so that P is kept on A × A.
- *The controls.* The weights ``w = dW[j, :]`` of a unit act as ``ds[A_j, j] = z̃[A_j, :] w`` on its active samples A_j.
  Where these are fewer than the rank r of all inputs, they span a smaller space: with ``z = Rᵀ Qᵀ`` as in `_riccati`,

      R[:, A_j] = y_j T_j,    Y_j = Q y_j,    w = Y_j u_j + v_j,   Y_jᵀ v_j = 0

  by QR; elsewhere y_j = I. u_j has ``ρ_j = min(|A_j|, r)`` entries. β vanishes with f, so v_j meets only what is known
  when dz is: ``v_j = (I − Y_j Y_jᵀ) (G − βᵀ dz̃)_j / ε``.
- *The pivots.* With T = diag(T_1, T_2, …), whose block of unit j acts on the rows A_j, and C with the rows
  ``(j, k) ↦ β[n, j] Y_j[i, k]``,

      Q_uu = ε I + T M Tᵀ,   Q_ux = T M (I⊗W) + C,
      Q_xx = (I⊗W)ᵀ M (I⊗W) − Σ_j β_j β_jᵀ ⊗ (I − Y_j Y_jᵀ) / ε

The pivots are Schur complements of H + εI, which is positive definite if and only if all of them are and ε > 0 wherever
some v_j has entries. With ``Q_uu = L Lᵀ`` and ``X = L⁻¹ Q_ux``, ``P = Q_xx − XᵀX`` takes half of the flops of LU, and
the first pivot without a factor says that the matrix is not positive definite.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, Namespace, full, index_dtype, is_true, namespace_of
from ddnref._kernels.blocks import (
    Lu,
    add_diagonal,
    cholesky,
    forward_substitution,
    lu,
    lu_and_solution,
    lu_slogdet,
    lu_solve,
    matmul,
    minus_gram,
    triangular_slogdet,
)
from ddnref._kernels.dense import identity
from ddnref._kernels.lu import solve_triangular
from ddnref.curvature.hessian._expansion import CLOSE, OPEN, Basis, Blocks, Expansion, Layer, extended
from ddnref.curvature.hessian._riccati import block_diagonal, samples, slogdet_sum, units

GATHERED = 150.0
"""Flops that take as long as gathering one entry of ``Σ_j β_j β_jᵀ ⊗ (I − Y_j Y_jᵀ)``, where the Y_j differ."""


class NotDefiniteError(ArithmeticError):
    """A pivot has no Cholesky factor."""

    def __init__(self, eliminated: int) -> None:
        super().__init__()
        self.eliminated = eliminated  # layers that had one


# --- where a layer is active ------------------------------------------------------------------------------------------


class Support(NamedTuple):
    """Places of a tangent that can move, ascending in the order (sample, unit)."""

    mask: Array  # (N, a)
    index: Array  # (m,), positions in the N·a places
    sizes: list[int]  # how many of each sample

    @property
    def full(self) -> bool:
        """Whether every place can move."""
        return int(self.index.shape[0]) == int(self.mask.shape[0] * self.mask.shape[1])


def support(xp: Namespace, mask: Array) -> Support:
    """Read the places on the host: their number fixes the shapes of all that follows."""
    sizes = _counts(xp, mask, 1)
    # A stable sort puts the places that can move first, in their order.
    order = xp.argsort(xp.astype(~xp.reshape(mask, (-1,)), xp.int32), stable=True)
    return Support(mask, xp.astype(order[: sum(sizes)], index_dtype(order), copy=False), sizes)


def _counts(xp: Namespace, mask: Array, axis: int) -> list[int]:
    counts = xp.sum(xp.astype(mask, xp.int32), axis=axis)
    return [int(counts[i]) for i in range(counts.shape[0])]


def _spans(sizes: list[int]) -> list[tuple[int, int]]:
    """Return where each of the pieces of these sizes begins and ends."""
    return list(pairwise(accumulate(sizes, initial=0)))


def _rank(xp: Namespace, s: Support) -> Array:
    """Return for each of the N·a places its position in `index`, and the length of `index` where it cannot move."""
    flat = xp.reshape(s.mask, (-1,))
    order = xp.cumulative_sum(xp.astype(flat, s.index.dtype)) - 1
    return xp.where(flat, order, xp.asarray(s.index.shape[0], dtype=order.dtype, device=array_api_compat.device(order)))


def _spread(xp: Namespace, rank: Array, rows: Array) -> Array:
    """Return all N·a rows from those that can move, zero elsewhere."""
    return xp.take(xp.concat([rows, xp.zeros_like(rows[:1, :]) if rows.shape[0] else _row(rows)]), rank, axis=0)


def _row(rows: Array) -> Array:
    return full((1, rows.shape[1]), 0.0, rows)


class Places(NamedTuple):
    """Supports of the state before and after a step: of the tangent that moves first, then of those kept."""

    before: tuple[Support, ...]
    after: tuple[Support, ...]


def places(e: Expansion) -> list[Places]:
    """Follow the supports through the network; before the first layer nothing moves."""
    xp, found = e.xp, []
    first = e.layers[0]
    nothing = xp.zeros(
        (first.z.shape[0], first.weight.shape[1]), dtype=xp.bool, device=array_api_compat.device(first.z)
    )
    state: tuple[Support, ...] = (support(xp, nothing),)
    for step in e.steps:
        before = state
        if isinstance(step, Layer):
            state = (support(xp, (step.slope != 0) | (step.c != 0)), *state[1:])
        elif step == OPEN:
            state = (*state, state[0])
        else:
            joined = state[0] if state[-1].index.shape[0] == 0 else support(xp, state[0].mask | state[-1].mask)
            state = (joined, *state[1:-1])
        found.append(Places(before, state))
    return found


# --- the controls of a layer ------------------------------------------------------------------------------------------


class Controls(NamedTuple):
    """One layer: the coordinates u of its weights, and how they act on its active pre-activations."""

    basis: Basis
    at: Support
    by_unit: Array  # (m,): the active places in the order (unit, sample)
    t: list[Array] | None  # T_j of every unit; ``None`` where T = R⊗I, with rows in the order (direction, unit)
    y: Array | None  # (a_out, r, ρ), y_j padded by zeros; ``None`` where all are the identity
    packed: Array | None  # positions of the entries of u among the a_out·ρ of y
    sizes: list[int]  # ρ_j

    @property
    def u(self) -> int:
        """Entries of u."""
        return sum(self.sizes)

    @property
    def rest(self) -> int:
        """Dimensions of all v_j, where H + εI is εI."""
        return int(self.basis.layer.weight.shape[0] * self.basis.q.shape[0]) - self.u


def controls(xp: Namespace, b: Basis, at: Support, state: int) -> Controls:
    """Choose the coordinates of every unit; `state` is the number of entries of the state before the layer."""
    (r, n), a = b.r.shape, b.layer.weight.shape[0]
    if at.full and not (state == 0 and n < r):
        return Controls(b, at, at.index, None, None, None, [r] * a)
    # Active places in the order (unit, sample), as positions in `index`
    by_unit = xp.argsort((at.index % a) * n + at.index // a)
    counts = _counts(xp, at.mask, 0)
    small = [min(count, r) for count in counts]
    common = [0 if count == 0 else r for count in counts]
    # Smaller spaces save controls, and cost passes over memory and a product where the layer has a state before it.
    extra = (GATHERED + 2.0 * sum(s for s in small if s < r)) * state**2
    if _flops(sum(common), state) - _flops(sum(small), state) <= extra:
        small = common
    columns = xp.take(at.index // a, by_unit, axis=0)  # the sample of each place
    t: list[Array] = [b.r[:, :0]] * a
    y, wide = [full((r, max(small)), 0.0, b.r)] * a, max(small)
    spans = _spans(counts)
    # QR of all units with equally many active samples at once
    for count in sorted({c for c, s in zip(counts, small, strict=True) if s}):
        chosen = [j for j in range(a) if counts[j] == count]
        r_j = xp.stack([xp.take(b.r, columns[slice(*spans[j])], axis=1) for j in chosen])
        if small[chosen[0]] < r:
            y_j, t_j = xp.linalg.qr(r_j)
        else:
            y_j, t_j = xp.broadcast_to(identity(r, b.r), (len(chosen), r, r)), r_j
        if y_j.shape[-1] < wide:
            y_j = xp.concat([y_j, full((len(chosen), r, wide - y_j.shape[-1]), 0.0, y_j)], axis=-1)
        for i, j in enumerate(chosen):
            t[j], y[j] = t_j[i, ...], y_j[i, ...]
    device = array_api_compat.device(b.r)
    packed = [j * wide + k for j, size in enumerate(small) for k in range(size)]
    return Controls(b, at, by_unit, t, xp.stack(y), xp.asarray(packed, dtype=index_dtype(b.r), device=device), small)


def _flops(u: int, x: int) -> float:
    """Flops of a Cholesky factor of u controls, of its coupling to a state of x, and of the Schur complement."""
    return u**3 / 3 + float(u) ** 2 * x + float(u) * x**2


def _act(xp: Namespace, k: Controls, m: Array) -> Array:
    """Return ``T M``: rows of active pre-activations to rows of u."""
    if k.t is None:
        return samples(xp, k.basis.r, m)
    rows = xp.take(m, k.by_unit, axis=0)
    spans = _spans([t_j.shape[1] for t_j in k.t])
    return xp.concat([t_j @ rows[i:j, :] for t_j, (i, j) in zip(k.t, spans, strict=True) if j > i])


class Between(NamedTuple):
    """``(I⊗W)ᵀ`` from active pre-activations to the tangent before the layer, sample by sample."""

    w_t: Array
    parts: list[tuple[int, int, Array]] | None  # rows from and to, and Wᵀ between them; ``None`` where all can move


def _between(xp: Namespace, w: Array, at: Support, before: Support) -> Between:
    if at.full and before.full:
        return Between(w.mT, None)
    (a_out, a_in), w_t, parts = w.shape, w.mT, []
    for (i, j), (k, h) in zip(_spans(at.sizes), _spans(before.sizes), strict=True):
        if h > k:
            w_n = xp.take(w_t, before.index[k:h] % a_in, axis=0) if h - k < a_in else w_t
            parts.append((i, j, xp.take(w_n, at.index[i:j] % a_out, axis=1) if j - i < a_out else w_n))
    return Between(w_t, parts)


def _through(xp: Namespace, between: Between, m: Array) -> Array:
    """Return ``(I⊗W)ᵀ M``."""
    if between.parts is None:
        return units(xp, between.w_t, m)
    return xp.concat([w_n @ m[i:j, :] for i, j, w_n in between.parts]) if between.parts else m[:0, :]


def _coupling(xp: Namespace, k: Controls, before: Support) -> Array:
    """Return C: rows of u, columns (n, i) of the tangent before the layer."""
    layer = k.basis.layer
    a_out, a_in = layer.weight.shape
    sample, unit = before.index // a_in, before.index % a_in
    q_t = k.basis.q[:a_in, :].mT
    if k.t is None or k.y is None:  # rows (direction, unit)
        rows = xp.take(q_t, unit, axis=1)[:, None, :] * xp.take(layer.beta, sample, axis=0).mT[None, :, :]
        return xp.reshape(rows, (k.u, before.index.shape[0]))
    y_t = xp.reshape(k.y.mT @ q_t, (-1, a_in))  # (a_out·ρ, a_in)
    beta = xp.reshape(
        xp.broadcast_to(layer.beta.mT[:, None, :], (a_out, k.y.shape[2], layer.beta.shape[0])),
        (-1, layer.beta.shape[0]),
    )
    y_t, beta = xp.take(y_t, k.packed, axis=0), xp.take(beta, k.packed, axis=0)
    return xp.take(y_t, unit, axis=1) * xp.take(beta, sample, axis=1)


def _free(xp: Namespace, k: Controls, before: Support, c: Array, damping: Array | float) -> Array | None:
    """Return ``Σ_j β_j β_jᵀ ⊗ (I − Y_j Y_jᵀ) / ε``, or ``None`` where it vanishes."""
    layer, r = k.basis.layer, k.basis.r.shape[0]
    a_in, whole = layer.weight.shape[1], r == k.basis.q.shape[0]
    small = [0 < s < r for s in k.sizes]  # β is zero for units that are never active
    if whole and not any(small):
        return None
    sample, unit = before.index // a_in, before.index % a_in
    beta, q = layer.beta, k.basis.q[:a_in, :]

    def kronecker(gram: Array, inner: Array) -> Array:
        """Entries of ``gram ⊗ inner`` where the state moves."""
        gram, inner = xp.take(gram, sample, axis=0), xp.take(inner, unit, axis=0)
        return xp.take(gram, sample, axis=1) * xp.take(inner, unit, axis=1)

    chosen = xp.asarray([1.0 if s else 0.0 for s in small], dtype=beta.dtype, device=array_api_compat.device(beta))
    eye = identity(a_in, q)
    if not any(small):
        return kronecker(beta @ beta.mT / damping, eye - q @ q.mT)
    # Units with the whole basis Q have I − QQᵀ in common; the others are Σ_j β_j β_jᵀ ⊗ I minus CᵀC of their rows.
    found = kronecker((beta * chosen) @ beta.mT / damping, eye)
    if not whole and not all(small):
        found = found + kronecker((beta * (1 - chosen)) @ beta.mT / damping, eye - q @ q.mT)
    ends = _spans(k.sizes)
    rows = xp.concat([c[slice(*ends[j]), :] for j, s in enumerate(small) if s])
    return found - matmul(rows.mT, rows) / damping if rows.shape[0] else found


# --- the sweep --------------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """One layer of the factorisation."""

    controls: Controls
    before: tuple[Support, ...]
    ranks: tuple[Array, ...]  # of `before`
    factors: Array | Lu  # L of a Cholesky factorisation, or LU factors
    gain: Array | None  # ``L⁻¹ Q_ux``, or ``Q_uu⁻¹ Q_ux``; ``None`` in the first layer


class Active(NamedTuple):
    """The factorisation: steps in order, each layer eliminated."""

    steps: tuple[Kept | str, ...]
    damping: Array | float
    outputs: int  # entries of the network's outputs


def sweep(
    bases: list[Basis], e: Expansion, damping: Array | float, definite: bool
) -> Iterator[tuple[Kept | str, Array | None]]:
    """Eliminate from the last layer to the first; yields what is kept of each and its pivot, or a mark and ``None``.

    With `definite` raises `NotDefiniteError` at the first pivot that has no Cholesky factor.
    """
    xp, bases_of, at_of, eliminated = e.xp, reversed(bases), places(e), 0
    p = _restricted(xp, block_diagonal(xp, e.curvature), at_of[-1].after[0])
    for step, at in zip(reversed(e.steps), reversed(at_of), strict=True):
        if not isinstance(step, Layer):
            p = _pull(xp, step, at, _pull(xp, step, at, p).mT)
            yield step, None
            continue
        k = controls(xp, next(bases_of), at.after[0], sum(s.index.shape[0] for s in at.before))
        q_uu, q_ux, q_xx = _pivot(xp, k, at, p, damping)
        if definite and k.rest and not is_true(damping > 0):
            raise NotDefiniteError(eliminated)  # H + εI is εI on the v_j
        eliminate = _by_cholesky if definite else _by_lu
        found = eliminate(q_uu, q_ux, q_xx)
        if found is None:
            raise NotDefiniteError(eliminated)
        factors, gain, handed_on = found
        p = q_uu[:0, :0] if handed_on is None else handed_on  # nothing moves before the layer
        eliminated += 1
        yield Kept(k, at.before, tuple(_rank(xp, s) for s in at.before), factors, gain), q_uu


Eliminated: TypeAlias = "tuple[Array | Lu, Array | None, Array | None]"
"""Factors of a pivot, its gain, and P for the layer before; the latter two are ``None`` in the first layer."""


def _by_cholesky(q_uu: Array, q_ux: Array | None, q_xx: Array | None) -> Eliminated | None:
    """Eliminate with ``Q_uu = L Lᵀ``; ``None`` where there is no such factor. On NumPy all three are overwritten."""
    l_, definite = cholesky(q_uu)
    if not is_true(definite):
        return None
    if q_ux is None or q_xx is None:
        return l_, None, None
    x = forward_substitution(l_, q_ux)
    return l_, x, minus_gram(q_xx, x)


def _by_lu(q_uu: Array, q_ux: Array | None, q_xx: Array | None) -> Eliminated:
    """Eliminate with LU factors of the pivot, which may be indefinite."""
    if q_ux is None or q_xx is None:
        return lu(q_uu), None, None
    factors, gain = lu_and_solution(q_uu, q_ux)
    p = q_xx - matmul(q_ux.mT, gain)
    return factors, gain, (p + p.mT) / 2


def _restricted(xp: Namespace, p: Array, at: Support) -> Array:
    return p if at.full else xp.take(xp.take(p, at.index, axis=0), at.index, axis=1)


def _pull(xp: Namespace, step: str, at: Places, p: Array) -> Array:
    """Apply the transpose of a mark to the rows of P: those of the state before it, from those after it."""
    n = at.after[0].index.shape[0]
    if step == OPEN:
        rest = p.shape[0] - at.after[-1].index.shape[0]
        return xp.concat([p[:n, :] + p[rest:, :], p[n:rest, :]])
    # Where a block ends, both summands move the places of the sum that they hold.
    rank = _rank(xp, at.after[0])
    first, last = (xp.take(rank, s.index, axis=0) for s in (at.before[0], at.before[-1]))
    return xp.concat([xp.take(p, first, axis=0), p[n:, :], xp.take(p, last, axis=0)])


def _pivot(
    xp: Namespace, k: Controls, at: Places, p: Array, damping: Array | float
) -> tuple[Array, Array | None, Array | None]:
    """Form Q_uu, Q_ux and Q_xx; the latter two are ``None`` where no state comes before the layer."""
    layer, here, before = k.basis.layer, at.after[0], at.before[0]
    m, n = _behind(xp, layer, here, p), here.index.shape[0]
    # Q_uu = ε I + T M Tᵀ
    tm = _act(xp, k, m[:n, :]) if k.u else m[:0, :]
    q_uu = _act(xp, k, tm[:, :n].mT) if k.u else m[:0, :0]
    q_uu = add_diagonal((q_uu + q_uu.mT) / 2, damping)
    if all(s.index.shape[0] == 0 for s in at.before):
        return q_uu, None, None
    # Q_ux = T M (I⊗W) + C
    c = _coupling(xp, k, before)
    between = _between(xp, layer.weight, here, before)
    q_ux = _through(xp, between, tm[:, :n].mT).mT + c
    # Q_xx = (I⊗W)ᵀ M (I⊗W) − Σ_j β_j β_jᵀ ⊗ (I − Y_j Y_jᵀ) / ε
    wm = _through(xp, between, m[:n, :])
    q_xx = _through(xp, between, wm[:, :n].mT)
    free = _free(xp, k, before, c, damping)
    q_xx = q_xx if free is None else q_xx - free
    if m.shape[0] > n:  # tangents kept for residual blocks pass by the layer
        q_ux = xp.concat([q_ux, tm[:, n:]], axis=1)
        above = xp.concat([q_xx, wm[:, n:]], axis=1)
        q_xx = xp.concat([above, xp.concat([wm[:, n:].mT, m[n:, n:]], axis=1)])
    return q_uu, q_ux, q_xx


def _behind(xp: Namespace, layer: Layer, at: Support, p: Array) -> Array:
    """Return ``M = diag(c) + f P f`` where the layer is active; kept tangents pass by."""
    f, c = (xp.take(xp.reshape(z, (-1,)), at.index, axis=0) for z in (layer.slope, layer.c))
    if is_true(xp.all((f == 1) & (c == 0))):
        return p
    kept = p.shape[0] - at.index.shape[0]
    if kept:
        f, c = xp.concat([f, full((kept,), 1.0, f)]), xp.concat([c, full((kept,), 0.0, c)])
    return add_diagonal(f[:, None] * p * f, c)


def factor(bases: list[Basis], e: Expansion, damping: Array | float, definite: bool) -> Active:
    """Factor all pivots; raises `NotDefiniteError` where Cholesky factors are asked for and do not exist."""
    kept = [kept for kept, _ in sweep(bases, e, damping, definite)]
    return Active(tuple(kept[::-1]), damping, e.curvature.shape[0] * e.curvature.shape[1])


def is_definite(bases: list[Basis], e: Expansion, damping: Array | float) -> bool:
    """Whether H + εI is positive definite: all pivots have Cholesky factors. Nothing is kept."""
    try:
        for _ in sweep(bases, e, damping, True):
            pass
    except NotDefiniteError:
        return False
    return True


def sizes(e: Expansion) -> list[tuple[int, int, int]]:
    """Count for every layer the controls, the active pre-activations and the entries of the state before it."""
    found = []
    for step, at in zip(e.steps, places(e), strict=True):
        if isinstance(step, Layer):
            r = min(step.z.shape)
            u = sum(r if at.after[0].full else min(count, r) for count in _counts(e.xp, at.after[0].mask, 0))
            found.append((u, int(at.after[0].index.shape[0]), sum(int(s.index.shape[0]) for s in at.before)))
    return found


# --- solve ------------------------------------------------------------------------------------------------------------


def _to_u(xp: Namespace, k: Controls, rows: Array) -> Array:
    """Return ``y_jᵀ`` of ``(a_out, r, k)``, packed to rows of u, one column per right-hand side."""
    if k.t is None or k.y is None:
        return xp.reshape(xp.permute_dims(rows, (1, 0, 2)), (k.u, rows.shape[2]))
    return xp.take(xp.reshape(k.y.mT @ rows, (-1, rows.shape[2])), k.packed, axis=0)


def _from_u(xp: Namespace, k: Controls, u: Array) -> Array:
    """Return ``y_j u_j``, (a_out, r, k): the transpose of `_to_u`."""
    r, a = k.basis.r.shape[0], k.basis.layer.weight.shape[0]
    if k.t is None or k.y is None:
        return xp.permute_dims(xp.reshape(u, (r, a, u.shape[1])), (1, 0, 2))
    # Entries of u at their padded places, zero elsewhere
    wide = k.y.shape[2]
    place, start = [], 0
    for size in k.sizes:
        place += [start + i if i < size else k.u for i in range(wide)]
        start += size
    index = xp.asarray(place, dtype=index_dtype(u), device=array_api_compat.device(u))
    return k.y @ xp.reshape(_spread(xp, index, u), (a, wide, u.shape[1]))


def _directions(xp: Namespace, k: Controls, g: Array) -> Array:
    """Return ``Qᵀ Gᵀ`` as (a_out, r, k)."""
    return xp.permute_dims(g @ k.basis.q, (1, 2, 0))


def _rest(xp: Namespace, k: Controls, g: Array, damping: Array | float) -> Array | None:
    """Return ``(I − Y_j Y_jᵀ) G_j / ε`` of all units, exactly zero where Y_j spans everything; ``None`` if all do."""
    if k.rest == 0:
        return None
    inside = _from_u(xp, k, _to_u(xp, k, _directions(xp, k, g)))
    found = (g - xp.permute_dims(inside, (2, 0, 1)) @ k.basis.q.mT) / damping
    whole = [size == k.basis.q.shape[0] for size in k.sizes]
    if not any(whole):
        return found
    keep = xp.asarray([0.0 if w else 1.0 for w in whole], dtype=g.dtype, device=array_api_compat.device(g))
    return found * keep[:, None]


def solve(f: Active, g: Blocks) -> Blocks:
    """Return ``(H + εI)⁻¹ G``: one sweep back for the right-hand sides, one forward for the weights.

    Tangents have all N·a places here, zero where nothing moves: vectors are cheap beside the factors.
    """
    xp, k = namespace_of(g[0]), g[0].shape[0]
    g_of = list(g)
    saved: list[tuple[Kept | str, Array | None]] = []
    pieces = [full((f.outputs, k), 0.0, g[0])]  # mᵀ of all that follows, one column per right-hand side
    for kept in reversed(f.steps):
        if isinstance(kept, str):
            pieces = [*pieces, pieces[0]] if kept == CLOSE else [pieces[0] + pieces[-1], *pieces[1:-1]]
            saved.append((kept, None))
            continue
        c, g_l = kept.controls, g_of.pop()
        layer = c.basis.layer
        n, a = layer.c.shape
        # From the layer's output to its pre-activation, then to u
        m = xp.reshape(layer.slope, (-1, 1)) * pieces[0]
        by_unit = xp.permute_dims(xp.reshape(m, (n, a, k)), (1, 0, 2))
        g_u = _to_u(xp, c, _directions(xp, c, g_l) + c.basis.r @ by_unit)
        if not isinstance(kept.factors, Lu):
            g_u = solve_triangular(kept.factors, g_u, lower=True)
        saved.append((kept, g_u))
        # What is left for the input of the layer goes to the one before.
        p = units(xp, layer.weight.mT, m)
        rest = _rest(xp, c, g_l, f.damping)
        if rest is not None:
            y = (layer.beta @ rest)[..., : layer.weight.shape[1]]
            p = p - xp.reshape(y, (k, -1)).mT
        pieces = [p, *pieces[1:]]
        if kept.gain is not None:
            back, spans = kept.gain.mT @ g_u, _spans([s.index.shape[0] for s in kept.before])
            passed = [_spread(xp, rank, back[i:j, :]) for rank, (i, j) in zip(kept.ranks, spans, strict=True)]
            pieces = [p_i - q_i for p_i, q_i in zip(pieces, passed, strict=True)]
    return _forward(xp, saved[::-1], g, f.damping)


def _forward(xp: Namespace, saved: list[tuple[Kept | str, Array | None]], g: Blocks, damping: Array | float) -> Blocks:
    """Solve for u layer by layer, then pass on the tangent of the next input."""
    g_of, found, k = iter(g), [], g[0].shape[0]
    pieces: list[Array] | None = None
    for kept, g_u in saved:
        if isinstance(kept, str) or g_u is None:
            if pieces is None:
                continue
            pieces = [*pieces, pieces[0]] if kept == OPEN else [pieces[0] + pieces[-1], *pieces[1:-1]]
            continue
        c, g_l = kept.controls, next(g_of)
        layer = c.basis.layer
        n, a = layer.c.shape
        if pieces is None:  # the input of the network, and what residual blocks before the first layer keep of it
            pieces = [full((s.mask.shape[0] * s.mask.shape[1], k), 0.0, g_l) for s in kept.before]
        # u = Q_uu⁻¹ (g_u − Q_ux x)
        u = lu_solve(kept.factors, g_u) if isinstance(kept.factors, Lu) else g_u
        if kept.gain is not None:
            state = [xp.take(x, s.index, axis=0) for x, s in zip(pieces, kept.before, strict=True)]
            u = u - kept.gain @ xp.concat(state)
        if not isinstance(kept.factors, Lu):
            u = solve_triangular(kept.factors.mT, u, lower=False)
        inner = _from_u(xp, c, u)
        # dW = y_j u_j Qᵀ + (I − Y_j Y_jᵀ) (G − βᵀ dz̃)_j / ε
        dz = xp.reshape(pieces[0].mT, (k, n, -1))
        free = _rest(xp, c, g_l - layer.beta.mT @ extended(xp, dz, c.basis.q.shape[0]), damping)
        dw = xp.permute_dims(inner, (2, 0, 1)) @ c.basis.q.mT
        found.append(dw if free is None else dw + free)
        # ds = Rᵀ y_j u_j + dz Wᵀ, dz⁺ = f ∘ ds
        s = xp.reshape(xp.permute_dims(c.basis.r.mT @ inner, (1, 0, 2)), (n * a, k))
        s = s + units(xp, layer.weight, pieces[0])
        pieces = [xp.reshape(layer.slope, (-1, 1)) * s, *pieces[1:]]
    return found


def slogdet(f: Active) -> tuple[Array, Array]:
    """Return sign and ``log|det(H + εI)|``: those of the pivots, and ε once for each entry of the v_j."""
    layers = [kept for kept in f.steps if isinstance(kept, Kept)]
    parts = []
    for kept in layers:
        if isinstance(kept.factors, Lu):
            parts.append(lu_slogdet(kept.factors))
        else:
            sign, log = triangular_slogdet(kept.factors)
            parts.append((sign, 2 * log))
    return slogdet_sum(parts, sum(kept.controls.rest for kept in layers), f.damping)
