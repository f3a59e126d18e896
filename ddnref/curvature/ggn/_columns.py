"""The columns of V, factored layer by layer: ``G = V Vᵀ`` with one column for each sample n and factor m.

Column (m, n) of a layer ``s = W u + b`` is the gradient of ``(J_nᵀ S_n)_m`` with respect to its parameters,

    δ_mn u_nᵀ  for W,    δ_mn  for b        (dense)
    Σ_p δ_mnp u_npᵀ,     Σ_p δ_mnp          (convolution: u_np is the patch at position p)

with δ backpropagated from the columns of ``S_n``, where ``S_n S_nᵀ = ∇²ℓ_n``. Columns are never stored: the Gram matrix
needs only ``(u_nᵀ u_n' [+ 1]) (δ_mnᵀ δ_m'n')``, and the products ``V c`` and ``Vᵀ v`` one pass over u and δ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import combinations, product, starmap
from operator import add
from typing import Any, NamedTuple, Protocol, Self

import array_api_compat

from ddnref._core.arrays import Array, adjoint
from ddnref._kernels.gram import Factors
from ddnref.networks._blocks import Residual
from ddnref.networks._layers import Affine, times
from ddnref.networks._protocol import Layers, Params, split

EXPLICIT_NUMBERS = 2**24  # numbers of a convolution's columns that are stored at a time


class Columns(Protocol):
    """The columns of one layer, for M factors of each of N samples."""

    @property
    def n_params(self) -> int:
        """Number of parameters (arrays) of the layer."""

    def part(self, rows: slice) -> Self:
        """Return the columns of some of the factors m."""

    def cross(self, other: Any, chosen: Sequence[int]) -> Array:
        """Return ``VᵀV'`` of the chosen parameters, ``(M N, M' N')``."""

    def apply(self, c: Array, chosen: Sequence[int]) -> Params:
        """Return ``V c`` for coefficients ``(k, M, N)``: one array ``(k, *shape)`` for each chosen parameter."""

    def adjoint(self, vectors: Sequence[Array], chosen: Sequence[int]) -> Array:
        """Return ``Vᵀ v``, ``(k, M, N)``, for arrays ``(k, *shape)``, one for each chosen parameter."""


class AffineColumns(NamedTuple):
    """Columns of a linear map ``W u + b``, as the factors u and δ.

    A map that is applied at several positions (tokens, pixels) has one pair of factors for each: a column is a sum over
    the positions. The activation of the layer is already in δ.
    """

    u: Array  # (N, a_in), or (N, a_in, P) with P positions: the patches of a convolution, or tokens
    delta: Array  # (M, N, a_out), or (M, N, a_out, P)
    shapes: tuple[tuple[int, ...], ...]  # of W, in any form with a_out rows in front, and of b if there is one

    @property
    def n_params(self) -> int:
        return len(self.shapes)

    @property
    def is_dense(self) -> bool:
        """Whether a column is ``δ uᵀ`` and δ, without a sum over positions."""
        return bool(self.u.ndim == 2)

    def part(self, rows: slice) -> AffineColumns:
        return self._replace(delta=self.delta[rows, ...])

    def factors(self, other: AffineColumns, chosen: Sequence[int]) -> Factors:
        """Return what `hadamard_gram` needs of a dense layer, in place of `cross`."""
        return Factors(self.u, other.u, self.delta, other.delta, 0 in chosen, 1 in chosen)

    def cross(self, other: AffineColumns, chosen: Sequence[int]) -> Array:
        """Return ``VᵀV'`` of a map with positions."""
        xp = array_api_compat.array_namespace(self.u)
        parts = []
        if 0 in chosen:
            # Pairs of positions cost less where they are fewer than the entries of a kernel.
            by_pairs = self.u.shape[-1] * other.u.shape[-1] <= self.u.shape[-2]
            parts.append(_cross_positions(self, other) if by_pairs else _cross_channels(self, other))
        if 1 in chosen:
            parts.append(_matrix(xp.sum(self.delta, axis=-1)) @ adjoint(_matrix(xp.sum(other.delta, axis=-1))))
        return reduce(add, parts)

    def apply(self, c: Array, chosen: Sequence[int]) -> Params:
        """Return ``(Σ_m c_m δ_m)ᵀ u``: mix the factors, then one product for each parameter."""
        xp = array_api_compat.array_namespace(c)
        m, n, *rest = self.delta.shape
        k = c.shape[0]
        # Mix the M factors of each sample: (k, N, …) with entries Σ_m c_m δ_m.
        delta = xp.moveaxis(xp.reshape(self.delta, (m, n, math.prod(rest))), 0, 1)
        mixed = xp.moveaxis(xp.permute_dims(c, (2, 0, 1)) @ delta, 0, 1)
        mixed = xp.reshape(mixed, (k, n, *rest))
        summed = [i for i in range(mixed.ndim) if i not in (0, 2)]  # samples and positions
        found = []
        for i in chosen:
            if i == 0:
                image = xp.tensordot(mixed, self.u, axes=(summed, [j for j in range(self.u.ndim) if j != 1]))
            else:
                image = xp.sum(mixed, axis=tuple(summed))
            found.append(xp.reshape(image, (k, *self.shapes[i])))
        return tuple(found)

    def adjoint(self, vectors: Sequence[Array], chosen: Sequence[int]) -> Array:
        """Return ``δᵀ (v u)``: the tangent of the map, then one product for each sample."""
        xp = array_api_compat.array_namespace(self.delta)
        m, n, *rest = self.delta.shape
        k = vectors[0].shape[0]
        # The tangent of the pre-activation, (k, N, a_out [, P])
        s = None
        for i, v in zip(chosen, vectors, strict=True):
            if i == 0:
                w = xp.reshape(v, (k, rest[0], self.u.shape[1]))
                term = self.u @ adjoint(w) if self.is_dense else w[:, None, :, :] @ self.u
            else:
                term = xp.reshape(v, (k, 1, rest[0], *[1] * len(rest[1:])))
            s = term if s is None else s + term
        # Its inner product with each factor δ
        s = xp.broadcast_to(s, (k, n, *rest))
        s = xp.permute_dims(xp.reshape(s, (k, n, math.prod(rest))), (1, 0, 2))
        delta = xp.permute_dims(xp.reshape(self.delta, (m, n, math.prod(rest))), (1, 2, 0))
        return xp.permute_dims(s @ delta, (1, 2, 0))


class ExplicitColumns(NamedTuple):
    """Columns of a layer that a user defined, stored as ``(M, N, *shape)`` for each parameter."""

    arrays: tuple[Array, ...]

    @property
    def n_params(self) -> int:
        return len(self.arrays)

    def part(self, rows: slice) -> ExplicitColumns:
        return ExplicitColumns(tuple(array[rows, ...] for array in self.arrays))

    def cross(self, other: ExplicitColumns, chosen: Sequence[int]) -> Array:
        own = ((_matrix(self.arrays[i]), i) for i in chosen)
        return reduce(add, (a @ adjoint(a if other is self else _matrix(other.arrays[i])) for a, i in own))

    def apply(self, c: Array, chosen: Sequence[int]) -> Params:
        xp = array_api_compat.array_namespace(c)
        flat = xp.reshape(c, (c.shape[0], -1))
        arrays = (self.arrays[i] for i in chosen)
        return tuple(xp.reshape(flat @ _matrix(a), (c.shape[0], *a.shape[2:])) for a in arrays)

    def adjoint(self, vectors: Sequence[Array], chosen: Sequence[int]) -> Array:
        xp = array_api_compat.array_namespace(self.arrays[0])
        rows = (xp.reshape(v, (v.shape[0], -1)) for v in vectors)
        c = reduce(add, (v @ adjoint(_matrix(self.arrays[i])) for i, v in zip(chosen, rows, strict=True)))
        return xp.reshape(c, (vectors[0].shape[0], *self.arrays[0].shape[:2]))


def collect(
    layers: Layers, params: Sequence[Params], saved: Sequence[Any], y_bar: Array, *, wrt_x: bool = False
) -> tuple[tuple[Columns, ...], Array | None]:
    """Return the columns of every layer with parameters, first layer first, from cotangents ``(M, N, C)``; and x̄."""
    found: list[tuple[Columns, ...]] = []
    # Below the first layer with parameters no cotangent is needed.
    first = 0 if wrt_x else next(i for i, layer in enumerate(layers) if layer.params)
    for i in range(len(layers) - 1, first - 1, -1):
        layer, theta, kept = layers[i], params[i], saved[i]
        on = wrt_x or i > first
        # The shortcut adds the cotangent unchanged.
        if isinstance(layer, Residual):
            inner, bar = collect(layer.layers, split(layer.layers, theta), kept[2], y_bar, wrt_x=on)
            found.append(inner)
            y_bar = y_bar + bar if on else y_bar
        elif isinstance(layer, Affine):
            # Dense and convolutional layers keep δ and u, a user's layer its explicit columns.
            delta = times(layer.flat(y_bar), kept.slope)
            found.append((AffineColumns(kept.u, delta, tuple(tuple(p.shape) for p in layer.params)),))
            y_bar = layer.linear_x(theta[0], delta, kept) if on else y_bar
        elif layer.params:
            bars, y_bar = layer.vjp(theta, kept, y_bar, per_sample=True)
            found.append((ExplicitColumns(bars or ()),))
        else:
            y_bar = layer.vjp(theta, kept, y_bar, wrt="x")[1]
    return tuple(columns for part in reversed(found) for columns in part), y_bar if wrt_x else None


def _matrix(a: Array) -> Array:
    """Reshape ``(M, N, *shape)`` to ``(M N, entries)``."""
    return array_api_compat.array_namespace(a).reshape(a, (a.shape[0] * a.shape[1], math.prod(a.shape[2:])))


def _cross_positions(v: AffineColumns, w: AffineColumns) -> Array:
    """Return ``Σ_pp' (u_npᵀ u_n'p') (δ_mnpᵀ δ_m'n'p')``."""
    xp = array_api_compat.array_namespace(v.u)
    (m, n), (m_, n_) = v.delta.shape[:2], w.delta.shape[:2]
    # The factors of each position as matrices with contiguous rows
    left = [(_matrix(v.delta[..., p]), v.u[..., p]) for p in range(v.u.shape[-1])]

    def pair(one: tuple[Array, Array], other: tuple[Array, Array]) -> Array:
        outputs, inputs = one[0] @ adjoint(other[0]), one[1] @ adjoint(other[1])
        return xp.reshape(xp.reshape(outputs, (m, n, m_, n_)) * inputs[:, None, :], (m * n, m_ * n_))

    if w is not v:
        right = [(_matrix(w.delta[..., p]), w.u[..., p]) for p in range(w.u.shape[-1])]
        return reduce(add, starmap(pair, product(left, right)))
    # The pair (q, p) adds the transpose of what (p, q) adds.
    k = reduce(add, (pair(one, one) for one in left))
    if len(left) == 1:
        return k
    above = reduce(add, starmap(pair, combinations(left, 2)))
    return k + above + adjoint(above)


def _cross_channels(v: AffineColumns, w: AffineColumns) -> Array:
    """Multiply explicit columns, of as many output channels at a time as `EXPLICIT_NUMBERS` allows."""
    xp = array_api_compat.array_namespace(v.u)
    count, size = v.delta.shape[-2], max(c.delta.shape[0] * c.delta.shape[1] * c.u.shape[-2] for c in (v, w))
    step = max(1, EXPLICIT_NUMBERS // size)

    def some(start: int) -> Array:
        channels = slice(start, min(start + step, count))
        a = _matrix(v.delta[..., channels, :] @ xp.matrix_transpose(v.u))
        b = a if w is v else _matrix(w.delta[..., channels, :] @ xp.matrix_transpose(w.u))
        return a @ adjoint(b)

    return reduce(add, map(some, range(0, count, step)))
