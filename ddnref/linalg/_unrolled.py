"""Reverse of the iterations as they ran: every iterate is computed again, kept, and reversed step by step.

power          v ← ± z/‖z‖, z ← X v          reversed: z̄ = ± (v̄ − v vᵀv̄)/‖z‖,  X̄ += z̄ vᵀ,  v̄ = Xᵀ z̄
simultaneous   Q R = Z, Z ← X Q              reversed: Z̄ = qr_vjp(Q̄),          X̄ += Z̄ Qᵀ,  Q̄ = Xᵀ Z̄

Memory grows with the number of steps. It is the right gradient of an iteration that was stopped early, and the
baseline against which the implicit ones are measured.
"""

from __future__ import annotations

import array_api_compat

from ddnref._core.arrays import Array, Namespace
from ddnref._kernels.dense import eigh, hermitian_part, matvec, outer
from ddnref.linalg._eigh import eigh_vjp
from ddnref.linalg._iterations import _length, _start
from ddnref.linalg._qr import qr, qr_vjp


def power_unrolled_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    v: Array,
    x: Array,
    symmetric: bool,
    v0: Array | None,
    n_iter: int,
) -> Array:
    """Gradient through `n_iter` steps of power iteration, the last of which gives the eigenvalue ``vᵀXv``."""
    xp = array_api_compat.array_namespace(x)
    s = hermitian_part(x) if symmetric else x
    kept = [_start(xp, v0, x, ())]
    kept[0] = kept[0] / _length(xp, kept[0])[..., None]
    signed_lengths = []
    for _ in range(n_iter - 1):
        z = matvec(s, kept[-1])
        length = _length(xp, z)[..., None]
        length = xp.where(xp.sum(kept[-1] * z, axis=-1, keepdims=True) < 0, -length, length)
        signed_lengths.append(length)
        kept.append(z / length)
    last = kept.pop()
    s_bar, bar = xp.zeros_like(x), xp.zeros_like(last)
    if v_bar is not None:
        bar = xp.where(xp.sum(last * v, axis=-1, keepdims=True) < 0, -v_bar, v_bar)
    if w_bar is not None:
        s_bar = s_bar + outer(w_bar[..., None] * last, last)
        bar = bar + w_bar[..., None] * (matvec(s, last) + matvec(xp.matrix_transpose(s), last))
    for before, length in zip(reversed(kept), reversed(signed_lengths), strict=True):
        z_bar = (bar - last * xp.sum(last * bar, axis=-1, keepdims=True)) / length
        s_bar = s_bar + outer(z_bar, before)
        bar, last = matvec(xp.matrix_transpose(s), z_bar), before
    return hermitian_part(s_bar) if symmetric else s_bar


def simultaneous_unrolled_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    x: Array,
    symmetric: bool,
    v0: Array | None,
    n_iter: int,
) -> Array:
    """Gradient through `n_iter` steps of simultaneous iteration and the eigenpairs of ``T = QᵀXQ`` after the last."""
    xp = array_api_compat.array_namespace(x)
    s = hermitian_part(x) if symmetric else x
    kept = [qr(_start(xp, v0, x, v.shape[-1:]))]
    for _ in range(n_iter - 1):
        kept.append(qr(s @ kept[-1][0]))
    q, _ = kept[-1]
    q_bar, s_bar = _ritz_vjp(xp, w_bar, v_bar, w, v, s, q)
    for (q, r), (before, _) in zip(reversed(kept[1:]), reversed(kept[:-1]), strict=True):
        z_bar = qr_vjp(q_bar, None, q, r, throw=False)
        s_bar = s_bar + z_bar @ xp.matrix_transpose(before)
        q_bar = xp.matrix_transpose(s) @ z_bar
    return hermitian_part(s_bar) if symmetric else s_bar


def _ritz_vjp(
    xp: Namespace, w_bar: Array | None, v_bar: Array | None, w: Array, v: Array, s: Array, q: Array
) -> tuple[Array, Array]:
    """Reverse of ``T = QᵀSQ``, ``T U = U Λ``, ``V = Q U`` in the order and with the signs of (w, v)."""
    q_t = xp.matrix_transpose(q)
    values, u = eigh(hermitian_part(q_t @ s @ q))
    back = xp.argsort(w, axis=-1)  # ascending, as T's
    given = xp.take_along_axis(v, back[..., None, :], axis=-1)
    same = xp.sum((q @ u) * given, axis=-2, keepdims=True) >= 0
    u = xp.where(same, u, -u)
    values_bar = None if w_bar is None else xp.take_along_axis(w_bar, back, axis=-1)
    u_bar, q_bar = None, xp.zeros_like(q)
    if v_bar is not None:
        ordered = xp.take_along_axis(v_bar, back[..., None, :], axis=-1)
        u_bar = q_t @ ordered
        q_bar = ordered @ xp.matrix_transpose(u)
    t_bar = eigh_vjp(values_bar, u_bar, values, u, gauge_rtol=float("inf"), throw=False)
    q_bar = q_bar + (s @ q + xp.matrix_transpose(s) @ q) @ t_bar
    return q_bar, q @ t_bar @ q_t
