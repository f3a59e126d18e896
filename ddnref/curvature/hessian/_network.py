"""From a chain and its data to the terms of the expansion, and vectors between the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, double, full, own
from ddnref._kernels.dense import identity
from ddnref.curvature.hessian import _expansion as _terms
from ddnref.curvature.hessian._expansion import CLOSE, OPEN, Blocks, Layer, Step, Terms
from ddnref.curvature.hessian._riccati import Basis, basis
from ddnref.networks._activations import jet
from ddnref.networks._blocks import Frozen, Residual
from ddnref.networks._chain import Chain
from ddnref.networks._layers import Dense, Flatten
from ddnref.networks._protocol import LayerDerivatives


class System(NamedTuple):
    """What a factorisation needs to know of the network."""

    terms: Terms | None
    """``None`` where a layer is of another type than the sweeps take."""
    refused: str
    """The name of that type."""
    sizes: list[int]
    """Parameters of each layer, or of the network in one."""
    product: Callable[[Blocks], Blocks]
    """H V."""
    blocks: Callable[[Sequence[Array]], Blocks]
    """From lists like the chain's parameters, with a leading axis on every entry, in double precision."""
    params: Callable[[Blocks], list[Array]]
    """Back."""
    bases: Callable[[], list[Basis]]
    """Orthonormal bases of the inputs of all layers, computed once."""

    @property
    def total(self) -> int:
        """Parameters of the network."""
        return sum(self.sizes)

    def dense(self, like: Array, chunk: int = 2**22) -> Array:
        """The whole matrix, from products with the columns of the identity."""
        xp = array_api_compat.array_namespace(like)
        p = self.total
        eye, width = identity(p, like), max(1, chunk // p)
        rows = [_terms.flat(self.product(self.split(eye[i : min(i + width, p), :]))) for i in range(0, p, width)]
        h = xp.concat(rows)
        return (h + xp.matrix_transpose(h)) / 2

    def split(self, rows: Array) -> Blocks:
        """Blocks of the vectors in the rows of a (k, p) array."""
        if self.terms is not None:
            return _terms.blocks(rows, self.terms)
        return [rows[:, None, :]]


def system(chain: Chain, x: Array, t: Array, curvature: str) -> System:
    """In double precision wherever the library has it: the Hessian at small damping loses digits otherwise.

    All arrays are copies, so that what is factored stays that of these weights and data when they change in place.
    """
    xp = array_api_compat.array_namespace(x)
    dtype = chain.params[0].dtype
    chain = type(chain)([_own(layer) for layer in chain.layers], chain.criterion, chain.reduction)
    x, t = exact_copy(x), exact_copy(t)
    refused = next((name for name in map(_refused, chain.layers) if name), "")
    if refused:
        return _opaque(chain, x, t, curvature, dtype, refused)
    terms = _expansion(chain, x, t)
    if curvature == "ggn":
        terms = terms.gauss_newton()
    biased = [layer.z.shape[1] > layer.weight.shape[1] for layer in terms.layers]

    def blocks(v: Sequence[Array]) -> Blocks:
        entries = iter([double(xp, entry) for entry in v])
        return [_with_bias(next(entries), next(entries)) if has else next(entries) for has in biased]

    def params(v: Blocks) -> list[Array]:
        found = []
        for block, has in zip(v, biased, strict=True):
            found += [block[..., :-1], block[..., -1]] if has else [block]
        return [xp.astype(entry, dtype, copy=False) for entry in found]

    return System(terms, "", terms.sizes, lambda v: _terms.product(terms, v), blocks, params, _bases(terms))


def _bases(terms: Terms) -> Callable[[], list[Basis]]:
    @lru_cache(maxsize=1)
    def bases() -> list[Basis]:
        return [basis(layer) for layer in terms.layers]

    return bases


def exact_copy(array: Array) -> Array:
    """A copy, of floating numbers in double precision."""
    xp = array_api_compat.array_namespace(array)
    exact = double(xp, array) if xp.isdtype(array.dtype, "real floating") else array
    return own(array) if exact is array else exact


def _own(layer: Any) -> Any:
    """The layer with copies of its arrays, frozen ones included."""
    if isinstance(layer, Residual):
        return replace(layer, layers=[_own(inner) for inner in layer.layers])
    if isinstance(layer, Frozen):
        return replace(layer, layer=_own(layer.layer))
    return layer.with_params(tuple(exact_copy(p) for p in layer.params))


def _with_bias(weight: Array, bias: Array) -> Array:
    return array_api_compat.array_namespace(weight).concat([weight, bias[..., None]], axis=-1)


def _refused(layer: Any) -> str:
    if isinstance(layer, Residual):
        return next((name for name in map(_refused, layer.layers) if name), "")
    return "" if type(layer) in (Dense, Flatten) else type(layer).__name__


def _expansion(chain: Chain, x: Array, t: Array) -> Terms:
    records = chain.layer_derivatives(x, t)
    y = records[-1].z_out
    curvature = chain.scale(x.shape[0]) * chain.criterion.hessian(y, t)
    return Terms(tuple(_steps(chain.layers, records)), curvature)


def _steps(layers: Sequence[Any], records: Sequence[LayerDerivatives]) -> list[Step]:
    steps: list[Step] = []
    for layer, record in zip(layers, records, strict=True):
        if isinstance(layer, Residual):
            steps += [OPEN, *_steps(layer.layers, record.inner), CLOSE]
        elif isinstance(layer, Dense):
            steps.append(_dense_layer(layer, record))
    return steps


def _dense_layer(layer: Dense, record: LayerDerivatives) -> Layer:
    xp = array_api_compat.array_namespace(record.z_in)
    _, slope, curvature = jet(layer.phi, record.s, 2)
    slope = xp.ones_like(record.b) if slope is None else slope
    c = xp.zeros_like(record.b) if curvature is None else record.b * curvature
    z = record.z_in
    if layer.bias is not None:
        z = xp.concat([z, full((z.shape[0], 1), 1.0, z)], axis=1)
    return Layer(layer.weight, z, record.b * slope, c, slope)


def _opaque(chain: Chain, x: Array, t: Array, curvature: str, dtype: Any, refused: str) -> System:
    """A network with other layers, known by its products alone."""
    xp = array_api_compat.array_namespace(x)
    times = chain.hvp if curvature == "hessian" else chain.ggnvp
    shapes = [tuple(p.shape) for p in chain.params]

    def blocks(v: Sequence[Array]) -> Blocks:
        rows = [xp.reshape(double(xp, entry), (entry.shape[0], -1)) for entry in v]
        return [xp.concat(rows, axis=-1)[:, None, :]]

    def split(v: Blocks) -> list[Array]:
        found, start = [], 0
        for shape in shapes:
            found.append(xp.reshape(v[0][:, 0, start : start + math.prod(shape)], (v[0].shape[0], *shape)))
            start += math.prod(shape)
        return found

    def params(v: Blocks) -> list[Array]:
        return [xp.astype(entry, dtype, copy=False) for entry in split(v)]

    total = sum(map(math.prod, shapes))
    return System(None, refused, [total], lambda v: blocks(times(x, t, split(v))), blocks, params, list)
