r"""Solve with the Hessian of a deep network by one augmented system, with every derivative stored as a matrix.

For the chain ``z_l = f_l(x_l, z_{l−1})`` with weights x_l, the loss being the last layer, let ``b_l = ∂loss/∂z_l`` and

    Dx = ∂f_l/∂x,  Dz = ∂f_l/∂z,  Dxx = ∂²(b_l·f_l)/∂x²,  Dzx = ∂²(b_l·f_l)/∂x∂z,  Dzz = ∂²(b_l·f_l)/∂z²

block diagonal over the layers, P the shift from z_l to the layer that reads it and ``M = I − Dz P``. Then

    H v = Dxx v + Dzx P M⁻¹ Dx v + Dxᵀ M⁻ᵀ Pᵀ Dzxᵀ v + Dxᵀ M⁻ᵀ Pᵀ Dzz P M⁻¹ Dx v

and ``(H + εI) v = g`` is the first row of a system whose 3×3 blocks are at most bidiagonal:

    [ Dxx + εI      Dzx P       Dxᵀ ] [ v ]   [ g ]          y = M⁻¹ Dx v: tangents of the activations
    [   −Dx           M          0  ] [ y ] = [ 0 ]
    [ −Pᵀ Dzxᵀ   −Pᵀ Dzz P      Mᵀ  ] [ λ ]   [ 0 ]          λ: changes of the gradient with respect to them

Sorted by layers instead of by unknowns it is block tridiagonal, with a block of size ``p_l + 2 N a`` for each layer,
and solved by block elimination, first layer to last. The cost is O(a⁶) for each layer of width a, and there is no
pivoting across layers; `ddnref.curvature.hessian_factor` reduces the first and bounds the effect of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ddnref._core.arrays import Array, full, namespace_of
from ddnref._kernels.dense import identity, solve
from ddnref.networks._chain import Chain
from ddnref.networks._layers import Dense
from ddnref.networks._losses import count


class LayerMatrices(NamedTuple):
    """The derivatives of one layer, weights row by row, activations sample by sample."""

    dx: Array
    dz: Array
    dxx: Array
    dzx: Array  # (p, entries of z)
    dzz: Array


def tall_skinny_derivatives(chain: Chain, x: Array, t: Array, /) -> list[LayerMatrices]:
    """All five matrices of every layer, the last one including the loss.

    The layers must be `Dense` without bias; others raise ``TypeError``. `x` and `t` are as for `Chain.loss`.
    """
    records = chain.layer_derivatives(x, t)
    found = []
    for layer, record in zip(chain.layers, records, strict=True):
        if not isinstance(layer, Dense) or layer.bias is not None or record.s is None:
            raise TypeError(f"The textbook form takes Dense layers without bias, not {type(layer).__name__}.")
        last = record is records[-1]
        slope, curvature = layer.phi.slope(record.s), layer.phi.curvature(record.s)
        second = (record.b * curvature)[:, :, None] * identity(curvature.shape[1], curvature)
        if last:  # the loss follows the activation of the outputs
            s = chain.scale(count(chain.criterion, record.z_out, t)) * chain.criterion.hessian(record.z_out, t)
            second = second + slope[:, :, None] * s * slope[:, None, :]
        found.append(_layer(layer.weight, record.z_in, record.b * slope, slope, second, last))
    return found


def _layer(weight: Array, z: Array, beta: Array, slope: Array, second: Array, last: bool) -> LayerMatrices:
    """Chain rule through ``s = W z``: ∂s/∂x and ∂s/∂z are Kronecker products, ``∂²(β·s)/∂x∂z = I ⊗ β``."""
    xp = namespace_of(weight)
    (n, a_in), a_out = z.shape, weight.shape[0]
    s_x = identity(a_out, z)[None, :, :, None] * z[:, None, None, :]  # I ⊗ z
    s_x = xp.reshape(s_x, (n, a_out, a_out * a_in))
    s_z = identity(n, z)[:, None, :, None] * weight[None, :, None, :]  # each sample reads its own z
    s_z = xp.reshape(s_z, (n, a_out, n * a_in))
    zx = xp.reshape(beta, (n, a_out, 1, 1)) * identity(a_in, z)  # (N, a_out, a_in of x, a_in of z)
    zx = xp.reshape(xp.permute_dims(zx, (1, 2, 0, 3)), (a_out * a_in, n * a_in))
    # Second derivatives of the activation (and of the loss), pulled back through s.
    bent_x, bent_z = second @ s_x, second @ s_z

    def pull(u: Array, v: Array) -> Array:
        return xp.sum(xp.matrix_transpose(u) @ v, axis=0)

    if last:  # the output of the last layer is the loss, one number
        dx, dz = xp.sum(beta[:, None, :] @ s_x, axis=0), xp.sum(beta[:, None, :] @ s_z, axis=0)
    else:
        dx, dz = (xp.reshape(slope[:, :, None] * d, (n * a_out, d.shape[-1])) for d in (s_x, s_z))
    return LayerMatrices(dx, dz, pull(s_x, bent_x), pull(s_x, bent_z) + zx, pull(s_z, bent_z))


def tall_skinny_product(layers: Sequence[LayerMatrices], v: Sequence[Array], /) -> list[Array]:
    """``H v`` by the four terms, from the matrices of `tall_skinny_derivatives` and one vector ``(p_l,)`` per layer."""
    xp = namespace_of(v[0])
    # Forward: y = M⁻¹ Dx v, from the first layer to the last; `read` holds P y, which each layer reads, and the last y.
    read = [0 * layers[0].dz[0, :]]
    for m, u in zip(layers, v, strict=True):
        read.append(m.dx @ u + m.dz @ read[-1])
    # Backward: λ = M⁻ᵀ Pᵀ (Dzxᵀ v + Dzz P y), from the last layer to the first.
    lam = [0 * read[-1]]
    for m, u, q in zip(reversed(layers[1:]), reversed(v[1:]), reversed(read[1:-1]), strict=True):
        lam.append(xp.matrix_transpose(m.dzx) @ u + m.dzz @ q + xp.matrix_transpose(m.dz) @ lam[-1])
    return [
        m.dxx @ u + m.dzx @ q + xp.matrix_transpose(m.dx) @ r
        for m, u, q, r in zip(layers, v, read[:-1], reversed(lam), strict=True)
    ]


def tall_skinny_solve(layers: Sequence[LayerMatrices], g: Sequence[Array], damping: float, /) -> list[Array]:
    """``(H + εI)⁻¹ g`` by block elimination of the augmented system, with arguments as in `tall_skinny_product`.

    The result is NaN or wrong where a pivot block is singular, which is not checked.
    """
    xp = namespace_of(g[0])
    diagonal, above, below = _sorted_by_layers(layers, damping)
    sizes = [m.dxx.shape[0] for m in layers]
    right = [
        xp.concat([r, full((d.shape[0] - r.shape[0],), 0.0, r)])[:, None] for r, d in zip(g, diagonal, strict=True)
    ]
    pivots, rights = [diagonal[0]], [right[0]]
    for i in range(1, len(layers)):  # eliminate the block below each pivot
        found = solve(pivots[-1], xp.concat([above[i - 1], rights[-1]], axis=1))
        pivots.append(diagonal[i] - below[i - 1] @ found[:, :-1])
        rights.append(right[i] - below[i - 1] @ found[:, -1:])
    v = [solve(pivots[-1], rights[-1])]
    for i in range(len(layers) - 2, -1, -1):  # substitute back
        v.append(solve(pivots[i], rights[i] - above[i] @ v[-1]))
    return [u[:p, 0] for u, p in zip(reversed(v), sizes, strict=True)]


def _sorted_by_layers(layers: Sequence[LayerMatrices], damping: float) -> tuple[list[Array], list[Array], list[Array]]:
    """Diagonal, upper and lower blocks, with the rows and columns of each in the order (v, y, λ)."""
    xp = namespace_of(layers[0].dx)
    diagonal, above, below = [], [], []
    for i, m in enumerate(layers):
        p, n = m.dxx.shape[0], m.dx.shape[0]
        dx_t, eye = xp.matrix_transpose(m.dx), identity(n, m.dx)
        after = layers[i + 1] if i + 1 < len(layers) else None
        bent = full((n, n), 0.0, m.dx) if after is None else -after.dzz
        diagonal.append(_matrix([
            [m.dxx + damping * identity(p, m.dx), full((p, n), 0.0, m.dx), dx_t],
            [-m.dx, eye, full((n, n), 0.0, m.dx)],
            [full((n, p), 0.0, m.dx), bent, eye],
        ]))  # fmt: skip
        if after is None:
            continue
        q, k = after.dxx.shape[0], after.dx.shape[0]
        above.append(_matrix([  # rows of this layer, columns of the next, which reads y of this layer
            [full((p + n, q + 2 * k), 0.0, m.dx)],
            [-xp.matrix_transpose(after.dzx), full((n, k), 0.0, m.dx), -xp.matrix_transpose(after.dz)],
        ]))  # fmt: skip
        below.append(_matrix([
            [full((q, p), 0.0, m.dx), after.dzx, full((q, n), 0.0, m.dx)],
            [full((k, p), 0.0, m.dx), -after.dz, full((k, n), 0.0, m.dx)],
            [full((k, p + 2 * n), 0.0, m.dx)],
        ]))  # fmt: skip
    return diagonal, above, below


def _matrix(rows: Sequence[Sequence[Array]]) -> Array:
    xp = namespace_of(rows[0][0])
    return xp.concat([xp.concat(list(row), axis=1) for row in rows])
