r"""The second-order expansion of a network's loss, layer by layer, and exact products with its Hessian.

A layer reads ``s = W z``, ``z⁺ = φ(s)`` for every sample (a bias is a column of W and a row of ones of z). With
``b = ∂loss/∂z⁺``, ``β = b∘φ'(s)``, ``c = b∘φ''(s)``, ``f = φ'(s)`` the expansion in all weights is

    Σ_l ½ Σ [ c_l ∘ ds_l² + 2 β_l ∘ (dW_l dz_{l−1}) ] + ½ ⟨do, S do⟩,   ds_l = dW_l z_{l−1} + W_l dz_{l−1},
    dz_l = f_l ∘ ds_l,   dz_0 = 0

Arrays hold one sample per row: z is (N, a_in), s is (N, a_out), ``ds = z dWᵀ + dz Wᵀ``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, Namespace, double, is_true, namespace_of, own
from ddnref._kernels.dense import identity
from ddnref.errors import NonFiniteError
from ddnref.networks._blocks import Frozen, Residual
from ddnref.networks._chain import Chain
from ddnref.networks._checks import bad_targets, inputs
from ddnref.networks._layers import Dense, Flatten
from ddnref.networks._losses import count
from ddnref.networks._protocol import Params, add, forward, split


class Layer(NamedTuple):
    """One affine map with its activation, at the current weights."""

    weight: Array  # W, (a_out, a_in), without the bias
    z: Array  # Input, (N, a_in), or (N, a_in + 1) with a last column of ones where there is a bias
    beta: Array  # β, (N, a_out): gradient of the loss with respect to s
    c: Array  # c, (N, a_out)
    slope: Array  # f, (N, a_out)


OPEN, CLOSE = "open", "close"
"""Marks where a residual block begins (its input is kept) and ends (its input is added)."""

Step: TypeAlias = "Layer | str"


class Expansion(NamedTuple):
    """The second-order expansion of the loss in the weights."""

    steps: tuple[Step, ...]  # layers in order, with marks where residual blocks begin and end
    layers: tuple[Layer, ...]  # the layers without the marks
    curvature: Array  # S, (N, C, C): Hessian of the loss in the outputs, with the factor of the reduction
    xp: Namespace  # of all arrays


class Basis(NamedTuple):
    """A layer and an orthonormal basis of its inputs, ``z = Rᵀ Qᵀ``."""

    layer: Layer
    q: Array  # (ã, r), r = min(N, ã)
    r: Array  # (r, N)

    @property
    def rest(self) -> int:
        """Dimensions of the weights V with ``V Q = 0``: those eigenvalues count as ε."""
        return int(self.layer.weight.shape[0]) * int(self.q.shape[0] - self.q.shape[1])


def basis(xp: Namespace, layer: Layer) -> Basis:
    """Compute the basis by QR of the inputs, whatever their rank."""
    if layer.z.shape[0] > 1:
        return Basis(layer, *xp.linalg.qr(layer.z.mT))
    # The QR of one vector is a division by its length; a zero vector gets the first unit vector.
    size = xp.sqrt(xp.sum(layer.z * layer.z))
    i = xp.arange(layer.z.shape[1], device=array_api_compat.device(layer.z))
    first = xp.astype(i == 0, layer.z.dtype)
    safe = xp.where(size > 0, size, xp.ones_like(size))
    return Basis(layer, xp.where(size > 0, layer.z[0, :] / safe, first)[:, None], size[None, None])


# --- vectors of all weights -------------------------------------------------------------------------------------------

# A vector of all weights: one (k, a_out, a_in [+ 1]) array for each layer, k vectors at once.
Blocks: TypeAlias = list[Array]


def flat(v: Blocks) -> Array:
    """Join the blocks of k vectors to (k, p)."""
    xp = namespace_of(v[0])
    return xp.concat([xp.reshape(block, (block.shape[0], -1)) for block in v], axis=-1)


def unflat(rows: Array, shapes: Sequence[tuple[int, ...]]) -> Blocks:
    """Split k vectors (k, p) into arrays ``(k, *shape)``: the inverse of `flat`."""
    xp, start, found = namespace_of(rows), 0, []
    for shape in shapes:
        end = start + math.prod(shape)
        found.append(xp.reshape(rows[:, start:end], (rows.shape[0], *shape)))
        start = end
    return found


def combine(u: Blocks, factor: Array | float, v: Blocks) -> Blocks:
    """Return ``u + factor · v``, with one factor per vector or one for all."""
    if not isinstance(factor, float):
        factor = factor[:, None, None]
    found = [factor * b for b in v]
    for i, a in enumerate(u):
        found[i] += a  # in place where the library can: passes over memory take most of the time
    return found


def sum_of_products(xp: Namespace, k: int, lefts: list[Array], rights: list[Array]) -> Array:
    """Return ``Σ Lᵀ R`` for each of k vectors as one product, because writing the result takes most of the time.

    Factors are (k, m, n) arrays, or (m, n) where they are the same for all vectors.
    """

    def repeated(x: Array) -> Array:
        if x.ndim == 3:
            return x
        return x[None, ...] if k == 1 else xp.broadcast_to(x, (k, *x.shape))  # which takes 6 µs

    return xp.concat(list(map(repeated, lefts)), axis=1).mT @ xp.concat(list(map(repeated, rights)), axis=1)


def extended(xp: Namespace, dz: Array, width: int) -> Array:
    """Append a zero column to dz where there is a bias, because its input of ones does not move."""
    return dz if dz.shape[-1] == width else xp.concat([dz, xp.zeros_like(dz[..., :1])], axis=-1)


def product(e: Expansion, v: Blocks) -> Blocks:
    """Return ``H V``: tangents forward, their adjoints backward; 8 N p flops for p parameters and one vector."""
    xp, v_of = e.xp, iter(v)
    dz: Array = None  # the input of the first layer does not move
    kept: list[Array | None] = []
    saved: list[tuple[Layer, Array, Array, Array | None]] = []
    for step in e.steps:
        if isinstance(step, Layer):
            # ds = z Vᵀ + dz Wᵀ,  dz⁺ = f∘ds
            v_l = next(v_of)
            ds = step.z @ v_l.mT
            if dz is not None:
                ds = ds + dz @ step.weight.mT
            saved.append((step, v_l, ds, dz))
            dz = step.slope * ds
        elif step == OPEN:
            kept.append(dz)
        else:
            dz = add(dz, kept.pop())
    # Going back, q = ∂⟨∇loss, v⟩/∂z says how the gradient with respect to a layer's output changes along v.
    q: Array | None = (e.curvature @ dz[..., None])[..., 0]
    found: Blocks = []
    for step in reversed(e.steps):
        if isinstance(step, Layer):
            q, h = _back(xp, *saved.pop(), q)
            found.append(h)
        elif step == CLOSE:
            kept.append(q)
        else:
            q = add(q, kept.pop())
    return found[::-1]


def _back(xp: Namespace, layer: Layer, v: Array, ds: Array, dz: Array | None, q: Array) -> tuple[Array, Array]:
    """Return ``σ W + β V`` for the layer before and ``H V = σᵀ z + βᵀ dz`` of this one, with ``σ = c∘ds + f∘q``."""
    sigma = layer.c * ds + layer.slope * q
    back = sigma @ layer.weight + layer.beta @ v[..., : layer.weight.shape[1]]
    if dz is None:
        return back, sigma.mT @ layer.z
    dz = extended(xp, dz, layer.z.shape[-1])
    return back, sum_of_products(xp, v.shape[0], [sigma, layer.beta], [layer.z, dz])


# --- the Hessian of a chain -------------------------------------------------------------------------------------------


class NetworkHessian(NamedTuple):
    """The Hessian of a network's loss: products with it, and its expansion if all layers have one."""

    expansion: Expansion | None  # ``None`` where the chain has a layer of a type that the eliminations do not take
    refused: str  # the name of that type
    total: int  # parameters of the network
    shapes: Sequence[tuple[int, ...]]  # of the block of each layer, or of the whole network as one
    product: Callable[[Blocks], Blocks]  # ``H V``
    # Convert lists like the chain's parameters, with a leading axis on every entry, to double precision blocks.
    blocks: Callable[[Sequence[Array]], Blocks]
    params: Callable[[Blocks], list[Array]]  # convert blocks to lists like the chain's parameters, in their dtype
    bases: Callable[[], list[Basis]]  # return orthonormal bases of the inputs of all layers, computed once
    like: Array  # an array on the device and of the dtype that is computed in
    weights: list[Array]  # the chain's parameters, for their shapes and dtype
    # Return the arguments of `hessian_of`, from the copies of their arrays.
    given: Callable[[], tuple[Chain, Array, Array, str]]

    def matrix(self, chunk: int = 2**22) -> Array:
        """Form the whole matrix from products with the columns of the identity."""
        xp, p = namespace_of(self.like), self.total
        eye, width = identity(p, self.like), max(1, chunk // p)  # columns of one product
        h = xp.concat([flat(self.product(self.from_rows(eye[i : min(i + width, p), :]))) for i in range(0, p, width)])
        return (h + h.mT) / 2

    def from_rows(self, rows: Array) -> Blocks:
        """Split the k vectors in the rows of a (k, p) array into blocks."""
        return unflat(rows, self.shapes)


def hessian_of(chain: Chain, x: Array, t: Array, curvature: str) -> NetworkHessian:
    """Validate the chain and its data, and expand the loss in the weights.

    In double precision wherever the library has it, because the Hessian at small damping loses digits otherwise. All
    arrays are copies, so that a factorisation stays that of these weights and data when they change in place.
    """
    if curvature not in ("hessian", "ggn"):
        raise ValueError(f'curvature is {curvature!r}, expected "hessian" or "ggn".')
    weights = chain.params
    dtype = weights[0].dtype
    inputs(chain.layers, x, weights[0])
    if x.shape[0] == 0:
        raise ValueError("x holds no samples: there is no Hessian to factor.")
    refused = _refused(chain.layers)
    if refused:
        return _by_products(chain, x, t, curvature, weights, refused)
    # One pass forward with copies in double precision. The targets must fit the outputs in the dtype of the weights.
    x = exact_copy(x)
    xp = namespace_of(x)
    parts = [tuple(xp.astype(p, x.dtype) for p in layer.params) for layer in chain.layers]
    y, saved = forward(chain.layers, parts, x, 2)
    bad_targets(chain.criterion, chain.reduction, xp.astype(y, dtype, copy=False), t, throw=True)
    t = exact_copy(t)
    # The derivatives of the loss in the outputs, and then of each layer, make the expansion.
    scale = chain.scale(count(chain.criterion, y, t))
    s = scale * chain.criterion.hessian(y, t)
    steps, _ = _steps(xp, chain.layers, parts, saved, scale * chain.criterion.gradient(y, t), curvature)
    layers = tuple(step for step in reversed(steps) if isinstance(step, Layer))
    # NaN or infinity in anything would spread over all of the solution.
    arrays = [s, *(layer.beta for layer in layers), *(layer.z for layer in layers)]
    if not is_true(xp.all(xp.stack([xp.all(xp.isfinite(array)) for array in arrays]))):
        raise NonFiniteError(
            "The derivatives of the loss contain NaN or infinity. The most likely cause is NaN in weights, data or "
            "targets, or activations that overflow with depth. Look at chain.loss(x, t) first."
        )
    expansion = Expansion(tuple(reversed(steps)), layers, s, xp)
    shapes = [(layer.weight.shape[0], layer.z.shape[1]) for layer in layers]
    # A bias is the last column of its layer's block.
    biased = [layer.z.shape[1] > layer.weight.shape[1] for layer in layers]

    def blocks(v: Sequence[Array]) -> Blocks:
        entries, found = (xp.astype(entry, x.dtype, copy=False) for entry in v), []
        for has_bias in biased:
            block = next(entries)
            found.append(xp.concat([block, next(entries)[..., None]], axis=-1) if has_bias else block)
        return found

    def params(v: Blocks) -> list[Array]:
        found = []
        for block, has_bias in zip(v, biased, strict=True):
            found += [block[..., :-1], block[..., -1]] if has_bias else [block]
        return [xp.astype(entry, dtype, copy=False) for entry in found]

    total, bases = sum(map(math.prod, shapes)), cache(lambda: [basis(xp, layer) for layer in layers])

    def given() -> tuple[Chain, Array, Array, str]:
        own = [layer.with_params(part) for layer, part in zip(chain.layers, parts, strict=True)]
        return *_in_dtype(chain, own, x, t, dtype), curvature

    return NetworkHessian(
        expansion, "", total, shapes, lambda v: product(expansion, v), blocks, params, bases, x, weights, given
    )


def _steps(
    xp: Namespace, layers: Sequence[Any], parts: Sequence[Params], saved: Sequence[Any], b: Array, curvature: str
) -> tuple[list[Step], Array]:
    """Collect the coefficients of every layer, the last one first, with marks for residual blocks.

    b is the gradient of the loss with respect to the output; that with respect to the input is returned too.
    """
    steps: list[Step] = []
    for layer, theta, kept in zip(reversed(layers), reversed(parts), reversed(saved), strict=True):
        if isinstance(layer, Residual):
            inner, bar = _steps(xp, layer.layers, split(layer.layers, theta), kept[2], b, curvature)
            steps += [CLOSE, *inner, OPEN]
            b = b + bar
        elif isinstance(layer, Dense):
            # f = φ'(s), β = b∘f, c = b∘φ''(s); an activation of ``None`` has slope 1 and no curvature.
            slope = xp.ones_like(b) if kept.slope is None else kept.slope
            beta, c = b * slope, xp.zeros_like(b) if kept.curvature is None else b * kept.curvature
            b = beta @ theta[0]
            if curvature == "ggn":  # keeps the curvature of the loss, and drops that of the network
                beta, c = xp.zeros_like(beta), xp.zeros_like(c)
            z = kept.u if layer.bias is None else xp.concat([kept.u, xp.ones_like(kept.u[:, :1])], axis=1)
            steps.append(Layer(theta[0], z, beta, c, slope))
        else:
            b = layer.vjp((), kept, b, wrt="x")[1]
    return steps, b


def _by_products(
    chain: Chain, x: Array, t: Array, curvature: str, weights: list[Array], refused: str
) -> NetworkHessian:
    """Describe a network with other layers by its products alone: all parameters are one block."""
    chain.loss(x, t)  # raises for targets that do not fit
    # The check of the loss has passed, and would refuse its class weights beside outputs in double precision.
    criterion, first = chain.criterion._replace(check=None), chain
    chain = type(chain)([_converted(layer, exact_copy) for layer in chain.layers], criterion, chain.reduction)
    x, t = exact_copy(x), exact_copy(t)
    xp, times = namespace_of(x), chain.hvp if curvature == "hessian" else chain.ggnvp
    shapes = [tuple(p.shape) for p in weights]

    def blocks(v: Sequence[Array]) -> Blocks:
        return [flat([xp.astype(entry, x.dtype, copy=False) for entry in v])[:, None, :]]

    def arrays(v: Blocks) -> list[Array]:
        return unflat(v[0][:, 0, :], shapes)

    def params(v: Blocks) -> list[Array]:
        return [xp.astype(entry, weights[0].dtype, copy=False) for entry in arrays(v)]

    def given() -> tuple[Chain, Array, Array, str]:
        return *_in_dtype(first, chain.layers, x, t, weights[0].dtype), curvature

    total = sum(map(math.prod, shapes))
    return NetworkHessian(
        None, refused, total, [(1, total)], lambda v: blocks(times(x, t, arrays(v))), blocks, params, list, x, weights,
        given,
    )  # fmt: skip


def _in_dtype(chain: Chain, layers: Sequence[Any], x: Array, t: Array, dtype: Any) -> tuple[Chain, Array, Array]:
    """Return a chain of these layers, and its data, in the dtype that all of them had before they were copied."""
    xp = namespace_of(x)

    def back(array: Array) -> Array:
        return xp.astype(array, dtype) if xp.isdtype(array.dtype, "real floating") else array

    own = [_converted(layer, back) for layer in layers]
    return type(chain)(own, chain.criterion, chain.reduction), back(x), back(t)


def _refused(layers: Sequence[Any]) -> str:
    """Name the type of the first layer that has no expansion, or return an empty string."""
    for layer in layers:
        name = _refused(layer.layers) if isinstance(layer, Residual) else type(layer).__name__
        if name and type(layer) not in (Dense, Flatten):
            return name
    return ""


def exact_copy(array: Array) -> Array:
    """Copy an array; floating numbers in double precision."""
    xp = namespace_of(array)
    exact = double(xp, array) if xp.isdtype(array.dtype, "real floating") else array  # integers are classes
    return own(array) if exact is array else exact


def _converted(layer: Any, convert: Callable[[Array], Array]) -> Any:
    """Copy a layer with its arrays converted, frozen ones included."""
    if isinstance(layer, Residual):
        return replace(layer, layers=[_converted(inner, convert) for inner in layer.layers])
    if isinstance(layer, Frozen):  # its arrays are no parameters
        return replace(layer, layer=_converted(layer.layer, convert))
    return layer.with_params(tuple(convert(p) for p in layer.params))
