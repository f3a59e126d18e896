"""Directional derivatives and damped Newton steps along the leading eigenvectors of the GGN.

With ``K = VᵀV = Ẽ Λ Ẽᵀ``, for the k largest eigenvalues:

    e_k = V ẽ_k / √λ_k                                   eigenvectors of G = V Vᵀ
    γ_nk = e_kᵀ g_n = ẽ_kᵀ Vᵀ g_n / √λ_k                 first derivative of sample n's loss along e_k
    λ_nk = ‖S_nᵀ J_n e_k‖² = λ_k Σ_m ẽ²_(mn)k            second derivative: Vᵀ e_k = √λ_k ẽ_k
    s = − Σ_k γ_k / (λ_k + δ_k) e_k = − V (Σ_k ẽ_k γ_k / (√λ_k (λ_k + δ_k)))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, full, is_true
from ddnref._core.checks import check_shapes
from ddnref._kernels.public import public
from ddnref.curvature._gram import zero_tolerance
from ddnref.curvature.ggn._functions import Batches, Progress, each, resolve, top
from ddnref.curvature.ggn._network import named
from ddnref.curvature.ggn._state import Ggn, adjoint, apply, combined, cross, placed
from ddnref.errors import SingularError


class DirectionalDerivatives(NamedTuple):
    """Derivatives along each of the k leading eigenvectors of the GGN."""

    w: Array
    """(k,): its eigenvalue."""
    first: Array
    """(N_g, k): γ, the derivative of each sample's own loss; its mean or sum is that of the whole loss."""
    second: Array
    """(N, k): λ, the second derivative of each sample's own loss; its mean or sum is the eigenvalue."""


@public
def ggn_directional_derivatives(
    chain: Any,
    x: Array | None = None,
    t: Array | None = None,
    *,
    k: int | None = None,
    batches: Batches | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    subsampling: Iterable[int] | None = None,
    subsampling_gradient: Iterable[int] | None = None,
    mc_samples: int | None = None,
    seed: int = 0,
    method: str = "auto",
    zero_rtol: float | None = None,
    progress: Progress | None = None,
    throw: bool = True,
) -> Any:
    r"""Return first and second derivatives of each sample's loss along the k leading eigenvectors of the GGN.

    Parameters
    ----------
    chain, x, t, k, batches, groups, subsampling, mc_samples, seed, method, zero_rtol, progress, throw
        As in `ggn_eigh`.
    subsampling_gradient : iterable of int, optional
        Numbers of the samples whose first derivatives are wanted; default all.

    Returns
    -------
    derivatives : DirectionalDerivatives
        Samples in the order of their numbers; with `groups` a tuple of one for each group. The sign of a column of
        `first` is that of the eigenvector, which is arbitrary.

    Raises
    ------
    SingularError, TypeError, ValueError, NonFiniteError, ConvergenceError, GaugeError
        As `ggn_eigh`; a `Ggn` that was accumulated with ``gradient=False``.

    Notes
    -----
    .. math:: \gamma_{nk} = e_k^T g_n, \qquad \lambda_{nk} = \| S_n^T J_n e_k \|^2 .

    No eigenvector is formed: :math:`\gamma` needs :math:`V^T g_n`, a block of a Gram matrix, and :math:`\lambda` the
    entries of the Gram matrix's eigenvectors alone. Cost beyond `ggn_eigh`'s decomposition: one further column
    backward, ``N n Σ a_out`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain([ddnref.networks.Dense(np.asarray([[1.0, 2.0]]))], "mse")
    >>> x, t = np.asarray([[1.0, 0.0], [0.0, 3.0]]), np.asarray([[1.0], [1.0]])
    >>> ddnref.curvature.ggn_directional_derivatives(chain, x, t, k=2).second
    array([[ 0.,  2.],
           [18.,  0.]])
    """
    ggn = resolve(
        chain, x, t, batches, progress, groups, subsampling, subsampling_gradient, mc_samples, seed, True, throw
    )
    return each(ggn, lambda i: _derivatives(ggn, i, *top(ggn, i, k, method, zero_rtol, throw)))


@public
def ggn_damped_newton(
    chain: Any,
    x: Array | None = None,
    t: Array | None = None,
    *,
    k: int | None = None,
    damping: float | Array | Callable[[DirectionalDerivatives], Array],
    batches: Batches | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    subsampling: Iterable[int] | None = None,
    subsampling_gradient: Iterable[int] | None = None,
    mc_samples: int | None = None,
    seed: int = 0,
    method: str = "auto",
    zero_rtol: float | None = None,
    progress: Progress | None = None,
    throw: bool = True,
) -> Any:
    r"""Return the damped Newton step in the span of the k leading eigenvectors of the GGN.

    Parameters
    ----------
    chain, x, t, batches, groups, subsampling, subsampling_gradient, mc_samples, seed
        As in `ggn_directional_derivatives`; the gradient is the mean or sum over its samples.
    k : int, optional
        How many directions; default all whose eigenvalue is not zero.
    damping : float, (k,) array, or callable
        δ: one for all directions; one for each; or a function from `DirectionalDerivatives` to ``(k,)``, for example
        of the noise in them. With `groups` it is used, or called, for each group.
    method, zero_rtol, progress, throw
        As in `ggn_eigh`.

    Returns
    -------
    step : list of arrays like ``chain.params``, or a dictionary by name for a PyTorch module
        To be added to the parameters; zero for parameters in no group.

    Raises
    ------
    SingularError
        If k exceeds the rank, or ``λ + δ`` is not positive in some direction. With ``throw=False`` the step is NaN.
    TypeError, ValueError, NonFiniteError, ConvergenceError, GaugeError
        As `ggn_directional_derivatives`; a negative constant; a `damping` of the wrong shape.

    Notes
    -----
    .. math:: s = - \sum_k \frac{\gamma_k}{\lambda_k + \delta_k}\, e_k, \qquad \gamma_k = e_k^T g .

    Outside the span the step is zero, which a constant damping of the whole matrix would not give. Cost beyond the
    decomposition: one product with V and one with Vᵀ, 4 D N flops, for any k; with a function also `first`.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain([ddnref.networks.Dense(np.asarray([[1.0, 2.0]]))], "mse")
    >>> x, t = np.asarray([[1.0, 0.0], [0.0, 3.0]]), np.asarray([[1.0], [3.0]])
    >>> (step,) = ddnref.curvature.ggn_damped_newton(chain, x, t, damping=0.0)
    >>> np.round(step, 12) + 0.0  # a linear model: to the minimum, [1, 1]
    array([[ 0., -1.]])
    """
    ggn = resolve(
        chain, x, t, batches, progress, groups, subsampling, subsampling_gradient, mc_samples, seed, True, throw
    )
    if isinstance(damping, (int, float)) and not 0 <= damping < math.inf:
        raise ValueError(
            f"damping is {damping}, expected a finite number of at least 0: a negative one makes steps uphill."
        )
    network = ggn.options.chain
    step = [array_api_compat.array_namespace(p).zeros_like(p) for p in network.params]
    for i, group in enumerate(ggn.options.groups):
        for position, s in zip(group, _step(ggn, i, k, damping, method, zero_rtol, throw), strict=True):
            step[position] = s[0, ...]
    return named(network, tuple(range(len(step))), step)


# --- one group ----------------------------------------------------------------------------------------------------


def _derivatives(ggn: Ggn, i: int, w: Array, u: Array, scale: Array) -> DirectionalDerivatives:
    """Return γ and λ of the eigenpairs of a group's Gram matrix, with ``scale = 1/√λ``."""
    return DirectionalDerivatives(w * ggn.scale, _first(ggn, i, u * scale), _second(ggn, w, u))


def _first(ggn: Ggn, i: int, c: Array) -> Array:
    """Return ``(V c)ᵀ g_n`` for coefficients ``(n, k)``."""
    xp, group = array_api_compat.array_namespace(c), ggn.options.groups[i]

    def of(gradient: Any) -> Array:
        blocks = ((cross(v.columns, gradient, group), c[place, :]) for v, place in placed(ggn.shards))
        return reduce(add, (xp.matrix_transpose(block) @ own for block, own in blocks))

    return xp.concat([of(shard.gradient) for shard in ggn.shards if shard.n_gradient], axis=0)


def _second(ggn: Ggn, w: Array, u: Array) -> Array:
    """Return ``λ_k Σ_m ẽ²_(mn)k``."""
    xp = array_api_compat.array_namespace(w)
    squares = (xp.reshape(u[place, :] ** 2, (shard.m, shard.n, u.shape[1])) for shard, place in placed(ggn.shards))
    return w * xp.concat([xp.sum(square, axis=0) for square in squares], axis=0)


def _step(
    ggn: Ggn, i: int, k: int | None, damping: Any, method: str, zero_rtol: float | None, throw: bool
) -> list[Array]:
    """Return ``− V (Σ_k ẽ_k γ_k / (√λ_k (λ_k + δ_k)))``."""
    w, u, scale = top(ggn, i, k, method, zero_rtol, throw and k is not None)
    xp, group = array_api_compat.array_namespace(w), ggn.options.groups[i]
    zero = w <= zero_tolerance(xp, w, zero_rtol) * w[:1]
    if k is None:  # directions without curvature are left out; otherwise they raise
        scale = xp.where(zero, xp.zeros_like(w), scale)
    # The gradient g is the sum over samples of their columns, with the factor of the mean.
    parts = ((v.gradient, ggn.scale_gradient * full((1, 1, v.n_gradient), 1.0, w)) for v in ggn.shards if v.n_gradient)
    gradient = combined(group, parts)
    # γ_k = ẽ_kᵀ Vᵀ g / √λ_k
    slope = scale * (xp.matrix_transpose(u) @ adjoint(ggn, group, gradient))[:, 0]
    delta = _damping(ggn, i, w, u, scale, damping)
    curvature = w * ggn.scale + delta
    bad = ~zero & ~(curvature > 0)
    if throw and is_true(xp.any(bad)):
        raise SingularError(
            f"λ + δ is {float(xp.min(curvature)):.1e} in some direction: the damped curvature must be positive. The "
            "most likely cause is a damping per direction, or a function, with negative entries."
        )
    # s = − V (Σ_k ẽ_k γ_k / (√λ_k (λ_k + δ_k))).
    safe = xp.where(zero & (k is None), xp.ones_like(w), xp.where(bad, full((), float("nan"), w), curvature))
    return apply(ggn, group, (u @ (-scale * slope / safe))[:, None])


def _damping(ggn: Ggn, i: int, w: Array, u: Array, scale: Array, damping: Any) -> Array | float:
    if isinstance(damping, (int, float)):
        return float(damping)
    if callable(damping):
        damping = damping(_derivatives(ggn, i, w, u, scale))
    if not array_api_compat.is_array_api_obj(damping):
        raise TypeError(f"damping is a {type(damping).__name__}, expected a number, an array (k,), or a function.")
    check_shapes(damping=(damping, tuple(w.shape)))
    return damping
