r"""The second-order expansion of a network's loss, layer by layer, and its exact product with a vector.

A layer reads ``s = W z``, ``z⁺ = φ(s)`` for every sample (a bias is a column of W and a row of ones of z). With
``b = ∂loss/∂z⁺``, ``β = b∘φ'(s)``, ``c = b∘φ''(s)``, ``f = φ'(s)`` the expansion in all weights is

    Σ_l ½ Σ [ c_l ∘ ds_l² + 2 β_l ∘ (dW_l dz_{l−1}) ] + ½ ⟨do, S do⟩,   ds_l = dW_l z_{l−1} + W_l dz_{l−1},
    dz_l = f_l ∘ ds_l,   dz_0 = 0

Arrays hold one sample per row: z is (N, a_in), s is (N, a_out), ``ds = z dWᵀ + dz Wᵀ``.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from ddnref._core.arrays import Array
from ddnref._kernels.dense import identity
from ddnref.curvature.hessian._dense_blocks import dot, repeated, space, t


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
        xp = space(self.curvature)

        def linear(step: Step) -> Step:
            if isinstance(step, str):
                return step
            zero = xp.zeros_like(step.c)
            return step._replace(beta=zero, c=zero)

        return self._replace(steps=tuple(linear(step) for step in self.steps))


Blocks: TypeAlias = list[Array]
"""A vector of all weights: one (k, a_out, a_in [+ 1]) array for each layer, k vectors at once."""


def product(terms: Terms, v: Blocks) -> Blocks:
    """``H V``: tangents forward, their adjoints backward; 8 N p flops for p parameters and one vector."""
    v_of = iter(v)
    dz: Array = None  # does not move before the first layer
    kept: list[Array | None] = []
    saved: list[tuple[Layer, Array, Array, Array | None]] = []
    for step in terms.steps:
        if isinstance(step, str):
            if step == OPEN:
                kept.append(dz)
            else:
                dz = _sum(dz, kept.pop())
            continue
        v_l = next(v_of)
        ds = step.z @ t(v_l)
        if dz is not None:
            ds = ds + dz @ t(step.weight)
        saved.append((step, v_l, ds, dz))
        dz = step.slope * ds
    # q = ∂⟨∇loss, v⟩/∂z: how the gradient with respect to a layer's output changes along v
    q: Array | None = (terms.curvature @ dz[..., None])[..., 0]
    found: Blocks = []
    for step in reversed(terms.steps):
        if isinstance(step, str):
            if step == CLOSE:
                kept.append(q)
            else:
                q = _sum(q, kept.pop())
            continue
        q, h = _back(*saved.pop(), q)
        found.append(h)
    return found[::-1]


def _sum(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def _back(layer: Layer, v: Array, ds: Array, dz: Array | None, q: Array) -> tuple[Array, Array]:
    """``σ = c∘ds + f∘q``; its products with the layer's input and weight, and those of β with their tangents."""
    sigma = layer.c * ds + layer.slope * q
    back = sigma @ layer.weight + layer.beta @ v[..., : layer.weight.shape[1]]
    if dz is None:
        return back, t(sigma) @ layer.z
    xp, k = space(v), v.shape[0]  # both products as one: what is written is most of the time
    left = xp.concat([sigma, repeated(layer.beta, k)], axis=1)
    right = xp.concat([repeated(layer.z, k), extended(dz, layer.z.shape[-1])], axis=1)
    return back, t(left) @ right


def extended(dz: Array, width: int) -> Array:
    """Dz with a column of zeros where a bias adds one: the input of a bias does not move."""
    if dz.shape[-1] == width:
        return dz
    xp = space(dz)
    return xp.concat([dz, xp.zeros_like(dz[..., :1])], axis=-1)


def flat(v: Blocks) -> Array:
    """(k, p) from the blocks of k vectors."""
    xp = space(v[0])
    return xp.concat([xp.reshape(block, (block.shape[0], -1)) for block in v], axis=-1)


def blocks(rows: Array, terms: Terms) -> Blocks:
    """Blocks of the k vectors in the rows of a (k, p) array."""
    xp = space(rows)
    found, start = [], 0
    for layer, size in zip(terms.layers, terms.sizes, strict=True):
        shape = (rows.shape[0], layer.weight.shape[0], layer.z.shape[1])
        found.append(xp.reshape(rows[:, start : start + size], shape))
        start += size
    return found


def inner(u: Blocks, v: Blocks) -> Array:
    """``⟨u, v⟩`` of each pair of vectors, (k,)."""
    xp = space(u[0])
    return xp.sum(xp.stack([dot(a, b) for a, b in zip(u, v, strict=True)]), axis=0)


def norm(v: Blocks) -> Array:
    """Euclidean norm of each vector, (k,)."""
    return space(v[0]).sqrt(inner(v, v))


def combine(u: Blocks, factor: Array | float, v: Blocks) -> Blocks:
    """``u + factor · v``, with one factor per vector or one for all."""
    if not isinstance(factor, float):
        factor = factor[:, None, None]
    found = [factor * b for b in v]
    for i, a in enumerate(u):
        found[i] += a  # in place where the library can: passes over memory are most of the time
    return found


def samples(r: Array, m: Array) -> Array:
    """``(R ⊗ I) M``: R on the samples of rows ordered (sample, unit)."""
    xp = space(r)
    n, cols = r.shape[1], m.shape[1]
    units_ = m.shape[0] // n
    return xp.reshape(r @ xp.reshape(m, (n, units_ * cols)), (r.shape[0] * units_, cols))


def units(w: Array, m: Array) -> Array:
    """``(I ⊗ W) M``: W on the units of rows ordered (sample, unit)."""
    xp = space(w)
    n, cols = m.shape[0] // w.shape[1], m.shape[1]
    return xp.reshape(w @ xp.reshape(m, (n, w.shape[1], cols)), (n * w.shape[0], cols))


def units_right(m: Array, w: Array) -> Array:
    """``M (I ⊗ W)``, columns ordered (sample, unit)."""
    xp = space(w)
    rows, n = m.shape[0], m.shape[1] // w.shape[0]
    return xp.reshape(xp.reshape(m, (rows * n, w.shape[0])) @ w, (rows, n * w.shape[1]))


def block_diagonal(blocks_: Array) -> Array:
    """The (N a, N a) matrix with the N given (a, a) blocks on its diagonal."""
    xp = space(blocks_)
    n, a = blocks_.shape[0], blocks_.shape[1]
    eye = identity(n, blocks_)
    return xp.reshape(eye[:, None, :, None] * blocks_[:, :, None, :], (n * a, n * a))
