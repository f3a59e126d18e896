r"""The second-order expansion of a network's loss, layer by layer, and its exact product with a vector.

A layer reads ``s = W z``, ``z⁺ = φ(s)`` for every sample (a bias is a column of W and a row of ones of z). With
``b = ∂loss/∂z⁺``, ``β = b∘φ'(s)``, ``c = b∘φ''(s)``, ``f = φ'(s)`` the expansion in all weights is

    Σ_l ½ Σ [ c_l ∘ ds_l² + 2 β_l ∘ (dW_l dz_{l−1}) ] + ½ ⟨do, S do⟩,   ds_l = dW_l z_{l−1} + W_l dz_{l−1},
    dz_l = f_l ∘ ds_l,   dz_0 = 0

Arrays hold one sample per row: z is (N, a_in), s is (N, a_out), ``ds = z dWᵀ + dz Wᵀ``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import array_api_compat

from ddnref._array import Array
from ddnref._linalg import identity


class Layer(NamedTuple):
    """One affine map with its activation, at the current weights."""

    weight: Array
    """W, (a_out, a_in), without the bias."""
    z: Array
    """Input, (N, a_in), or (N, a_in + 1) with a last column of ones where there is a bias."""
    beta: Array
    """β, (N, a_out): gradient of the loss with respect to s."""
    c: Array
    """c, (N, a_out)."""
    slope: Array
    """f, (N, a_out)."""


OPEN, CLOSE = "open", "close"
"""A residual block begins (its input is kept) and ends (its input is added)."""

Step: TypeAlias = "Layer | str"


class Terms(NamedTuple):
    """The expansion: layers in order, with marks where residual blocks begin and end."""

    steps: tuple[Step, ...]
    curvature: Array
    """S, (N, C, C): Hessian of the loss in the outputs, with the factor of the reduction."""

    @property
    def layers(self) -> list[Layer]:
        """The affine ones among the steps."""
        return [step for step in self.steps if isinstance(step, Layer)]

    @property
    def sizes(self) -> list[int]:
        """Parameters of each layer."""
        return [layer.weight.shape[0] * layer.z.shape[1] for layer in self.layers]

    def gauss_newton(self) -> Terms:
        """The same without the curvature of the network: β and c dropped."""
        xp = array_api_compat.array_namespace(self.curvature)

        def linear(step: Step) -> Step:
            return step if isinstance(step, str) else step._replace(beta=xp.zeros_like(step.c), c=xp.zeros_like(step.c))

        return self._replace(steps=tuple(linear(step) for step in self.steps))


Blocks: TypeAlias = list[Array]
"""A vector of all weights: one (k, a_out, a_in [+ 1]) array for each layer, k vectors at once."""


def product(terms: Terms, v: Blocks) -> Blocks:
    """``H V``: tangents forward, their adjoints backward; 8 N p flops for p parameters and one vector."""
    xp = array_api_compat.array_namespace(terms.curvature)
    v_of = iter(v)
    dz: Array | None = None
    kept: list[Array | None] = []
    saved: list[tuple[Layer, Array, Array, Array | None]] = []
    for step in terms.steps:
        if step == OPEN:
            kept.append(dz)
        elif step == CLOSE:
            dz = _sum(dz, kept.pop())
        elif isinstance(step, Layer):
            v_l = next(v_of)
            ds = step.z @ xp.matrix_transpose(v_l)
            if dz is not None:
                ds = ds + dz @ xp.matrix_transpose(step.weight)
            saved.append((step, v_l, ds, dz))
            dz = step.slope * ds
    # q = ∂⟨∇loss, v⟩/∂z: how the gradient with respect to a layer's output changes along v
    q: Array | None = (terms.curvature @ dz[..., None])[..., 0]
    found: Blocks = []
    for step in reversed(terms.steps):
        if step == CLOSE:
            kept.append(q)
        elif step == OPEN:
            q = _sum(q, kept.pop())
        else:
            q, h = _back(*saved.pop(), q)
            found.append(h)
    return found[::-1]


def _sum(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def _back(layer: Layer, v: Array, ds: Array, dz: Array | None, q: Array) -> tuple[Array, Array]:
    """``σ = c∘ds + f∘q``; its products with the layer's input and weight, and those of β with their tangents."""
    xp = array_api_compat.array_namespace(v)
    sigma = layer.c * ds + layer.slope * q
    h = xp.matrix_transpose(sigma) @ layer.z
    a_in = layer.weight.shape[1]
    if dz is not None:
        h = h + xp.matrix_transpose(layer.beta) @ extended(dz, layer.z.shape[1])
    return sigma @ layer.weight + layer.beta @ v[..., :a_in], h


def extended(dz: Array, width: int) -> Array:
    """dz with a column of zeros where a bias adds one: the input of a bias does not move."""
    if dz.shape[-1] == width:
        return dz
    xp = array_api_compat.array_namespace(dz)
    return xp.concat([dz, xp.zeros_like(dz[..., :1])], axis=-1)


def dense(terms: Terms, chunk: int = 2**22) -> Array:
    """The whole Hessian, (p, p), from products with the columns of the identity."""
    xp = array_api_compat.array_namespace(terms.curvature)
    total = sum(terms.sizes)
    eye = identity(total, terms.curvature)
    width = max(1, chunk // total)
    rows = [flat(product(terms, blocks(eye[i : i + width, ...], terms))) for i in range(0, total, width)]
    h = xp.concat(rows)
    return (h + xp.matrix_transpose(h)) / 2


def flat(v: Blocks) -> Array:
    """(k, p) from the blocks of k vectors."""
    xp = array_api_compat.array_namespace(*v)
    return xp.concat([xp.reshape(block, (block.shape[0], -1)) for block in v], axis=-1)


def blocks(rows: Array, terms: Terms) -> Blocks:
    """Blocks of the k vectors in the rows of a (k, p) array."""
    xp = array_api_compat.array_namespace(rows)
    found, start = [], 0
    for layer, size in zip(terms.layers, terms.sizes, strict=True):
        shape = (rows.shape[0], layer.weight.shape[0], layer.z.shape[1])
        found.append(xp.reshape(rows[:, start : start + size], shape))
        start += size
    return found


def inner(u: Blocks, v: Blocks) -> Array:
    """``⟨u, v⟩`` of each pair of vectors, (k,)."""
    xp = array_api_compat.array_namespace(*u)
    parts = [xp.sum(a * b, axis=(-2, -1)) for a, b in zip(u, v, strict=True)]
    return xp.sum(xp.stack(parts), axis=0)


def norm(v: Blocks) -> Array:
    """Euclidean norm of each vector, (k,)."""
    return array_api_compat.array_namespace(*v).sqrt(inner(v, v))


def combine(u: Blocks, factor: Array | float, v: Blocks) -> Blocks:
    """``u + factor · v``, with one factor per vector or one for all."""
    if not isinstance(factor, float):
        factor = factor[:, None, None]
    return [a + factor * b for a, b in zip(u, v, strict=True)]


def samples(r: Array, m: Array) -> Array:
    """``(R ⊗ I) M``: R on the samples of rows ordered (sample, unit)."""
    xp = array_api_compat.array_namespace(r, m)
    n, cols = r.shape[1], m.shape[1]
    units_ = m.shape[0] // n
    return xp.reshape(r @ xp.reshape(m, (n, units_ * cols)), (r.shape[0] * units_, cols))


def units(w: Array, m: Array) -> Array:
    """``(I ⊗ W) M``: W on the units of rows ordered (sample, unit)."""
    xp = array_api_compat.array_namespace(w, m)
    n, cols = m.shape[0] // w.shape[1], m.shape[1]
    return xp.reshape(w @ xp.reshape(m, (n, w.shape[1], cols)), (n * w.shape[0], cols))


def units_right(m: Array, w: Array) -> Array:
    """``M (I ⊗ W)``, columns ordered (sample, unit)."""
    xp = array_api_compat.array_namespace(w, m)
    rows, n = m.shape[0], m.shape[1] // w.shape[0]
    return xp.reshape(xp.reshape(m, (rows * n, w.shape[0])) @ w, (rows, n * w.shape[1]))


def block_diagonal(blocks_: Array) -> Array:
    """The (N a, N a) matrix with the N given (a, a) blocks on its diagonal."""
    xp = array_api_compat.array_namespace(blocks_)
    n, a = blocks_.shape[0], blocks_.shape[1]
    eye = identity(n, blocks_)
    return xp.reshape(eye[:, None, :, None] * blocks_[:, :, None, :], (n * a, n * a))


def total_size(sizes: Sequence[int]) -> int:
    """Parameters of the whole network."""
    return sum(sizes)
