"""Dense Jacobian, Gauss–Newton matrix and Hessian of a chain of dense layers, by forward differentiation.

For one sample, ``J`` the derivative of a layer's output by all D parameters, ``K`` its second derivative, and ``E_oi``
the unit vector of the weight that joins input i to output o (``E_o`` that of a bias):

    s_o   = Σ_i W_oi z_i + b_o
    J_s,o = Σ_i W_oi J_i + Σ_i z_i E_oi + E_o                               J ← φ'(s_o) J_s,o
    K_s,o = Σ_i W_oi K_i + Σ_i (E_oi J_iᵀ + J_i E_oiᵀ)                      K ← φ'(s_o) K_s,o + φ''(s_o) J_s,o J_s,oᵀ

With the loss ``ℓ`` on top, ``G = Σ_n J_nᵀ ∇²ℓ_n J_n`` and ``H = G + Σ_n Σ_c (∇ℓ_n)_c K_nc``. This is the oracle of the
reverse passes of `ddnref.networks.Chain`, with which it shares nothing. K takes N·C·D² numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, namespace_of
from ddnref._kernels.dense import identity
from ddnref.networks._chain import Chain
from ddnref.networks._layers import Dense
from ddnref.networks._losses import count


def network_jacobian(chain: Chain, x: Array) -> Array:
    """Derivatives ``(N, C, D)`` of all outputs with respect to all parameters, for x of shape ``(N, a_0)``.

    D counts the parameters in the order of ``chain.params``, each flattened. The layers must be `Dense`; others raise
    ``TypeError``.
    """
    return _propagate(chain, x, second=False).first


def network_ggn(chain: Chain, x: Array, t: Array) -> Array:
    """The generalised Gauss–Newton matrix ``(D, D)``; parameters as `network_jacobian` and `Chain.loss`."""
    return _ggn(chain, _propagate(chain, x, second=False), t)


def network_hessian(chain: Chain, x: Array, t: Array) -> Array:
    """The Hessian of the loss ``(D, D)``; parameters as `network_jacobian` and `Chain.loss`."""
    xp, state = namespace_of(x), _propagate(chain, x, second=True)
    # The curvature of the loss in the outputs, and that of the outputs in the parameters.
    g = chain.scale(count(chain.criterion, state.z, t)) * chain.criterion.gradient(state.z, t)
    return _ggn(chain, state, t) + xp.sum(g[..., None, None] * state.second, axis=(0, 1))


class _State(NamedTuple):
    z: Array  # (N, a): output of the layers so far
    first: Array  # J (N, a, D)
    second: Array  # K (N, a, D, D)


def _propagate(chain: Chain, x: Array, second: bool) -> _State:
    """Carry the outputs and their derivatives through all layers; K only if `second`."""
    xp, device = namespace_of(x), array_api_compat.device(x)
    size = sum(math.prod(p.shape) for p in chain.params)
    eye, offset, (n, a) = identity(size, x), 0, x.shape
    # The input does not depend on the parameters.
    k_shape = (n, a, size, size) if second else (n, a, 1, 1)
    state = _State(
        x,
        xp.zeros((n, a, size), dtype=x.dtype, device=device),
        xp.zeros(k_shape, dtype=x.dtype, device=device),
    )
    for layer in chain.layers:
        if not isinstance(layer, Dense):
            raise TypeError(f"The reference takes chains of Dense layers, but one is a {type(layer).__name__}.")
        state = _layer(layer, state, eye[offset:, :], second)
        offset += sum(math.prod(p.shape) for p in layer.params)
    return state


def _layer(layer: Dense, state: _State, units: Array, second: bool) -> _State:
    """One layer, `units` the unit vectors of its parameters and all later ones."""
    xp = namespace_of(state.z)
    w, size = layer.weight, units.shape[-1]
    entries = math.prod(w.shape)
    # E_oi as rows of the identity, and s, J_s and K_s before the activation.
    e = xp.reshape(units[:entries, :], (*w.shape, size))
    z, j, k = state
    s = z @ xp.matrix_transpose(w)
    j_s = w @ j + xp.sum(z[:, None, :, None] * e, axis=2)
    if layer.bias is not None:
        s = s + layer.bias
        j_s = j_s + units[entries : entries + w.shape[0], :]
    # The chain rule through φ.
    y, slope, curvature = (f(s) for f in layer.phi[:3])
    if second:
        cross = xp.matrix_transpose(e) @ j[:, None, :, :]
        k_s = xp.tensordot(w, k, axes=((1,), (1,)))
        k_s = xp.moveaxis(k_s, 0, 1) + cross + xp.matrix_transpose(cross)
        k = slope[..., None, None] * k_s + curvature[..., None, None] * j_s[..., :, None] * j_s[..., None, :]
    return _State(y, slope[..., None] * j_s, k)


def _ggn(chain: Chain, state: _State, t: Array) -> Array:
    xp = namespace_of(state.z)
    curved = chain.criterion.hessian(state.z, t) @ state.first
    return chain.scale(count(chain.criterion, state.z, t)) * xp.sum(xp.matrix_transpose(state.first) @ curved, axis=0)
