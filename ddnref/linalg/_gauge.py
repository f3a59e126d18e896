"""Whether a loss of eigenpairs is well defined: clusters of equal eigenvalues, and the freedom inside them."""

from __future__ import annotations

import math
from typing import NoReturn

import array_api_compat

from ddnref._core.arrays import Array, full, real
from ddnref._core.selection import Columns, scatter, take
from ddnref._kernels.dense import adjoint
from ddnref.errors import GaugeError

RTOL = 16  # neighbours closer than this many eps·max|λ| are equal; exact repeats split by at most 1, their spread by 13


def masked(m_: Array, same: Array, columns: Columns) -> tuple[Array, Array]:
    """The largest entry of ``M − Mᴴ`` inside clusters (its diagonal is the phase), and the largest of ``M``."""
    xp = array_api_compat.array_namespace(m_)
    inside = xp.where(same, m_, full((), 0.0, m_))
    inside_h = adjoint(take(inside, columns, -2))  # M is zero in the columns not chosen
    return largest(inside - scatter(inside_h, columns, m_.shape[-2], -2), 2), largest(m_, 2)


def jump(w_bar: Array, near: Array, columns: Columns) -> tuple[Array, Array]:
    """The largest jump of ``λ̄`` between neighbours of a cluster, and the largest ``λ̄``."""
    xp = array_api_compat.array_namespace(w_bar)
    every = scatter(w_bar, columns, near.shape[-1] + 1, -1)
    jump = every[..., 1:] - every[..., :-1]
    return largest(xp.where(near, jump, xp.zeros_like(jump)), 1), largest(w_bar, 1)


def largest(x: Array, axes: int) -> Array:
    """The largest magnitude over the last one or two axes, 0 of nothing."""
    xp = array_api_compat.array_namespace(x)
    if 0 in x.shape[x.ndim - axes :]:
        return full(x.shape[: x.ndim - axes], 0.0, real(x))
    return xp.max(xp.abs(x), axis=-1 if axes == 1 else (-2, -1))


def exceeds(part: Array, whole: Array, rtol: float) -> Array:
    """``part > rtol * whole``; nothing exceeds an infinite `rtol`, and 0 · ∞ is not asked for."""
    return part > rtol * whole if math.isfinite(rtol) else part < 0


def ratio(part: Array, whole: Array) -> Array:
    """``part / whole``, and `part` itself where `whole` is zero."""
    xp = array_api_compat.array_namespace(part)
    return part / xp.where(whole > 0, whole, xp.ones_like(whole))


def raise_gauge(residual: Array, gauge_rtol: float) -> NoReturn:
    """Say what a loss that is not well defined depends on, and by how much."""
    xp = array_api_compat.array_namespace(residual)
    worst = float(xp.max(xp.where(xp.isnan(residual), xp.zeros_like(residual), residual)))
    raise GaugeError(
        f"The loss depends on a choice that the matrix does not determine: gauge residual {worst:.1e} > gauge_rtol "
        f"{gauge_rtol:.1e}. Likely it treats eigenvectors or eigenvalues inside a cluster of equal eigenvalues "
        "individually, cuts such a cluster, or depends on the phase of a complex eigenvector; no gradient exists "
        "there. Write it through the cluster's projector V_c V_cᴴ or through ddnref.spectral_function; or pass "
        "throw=False to get NaN for these items, gauge_rtol=inf to accept the masked gradient."
    )
