"""The Gram matrix of factored columns: ``K = Σ_layers (U U'ᵀ + c) ∘ (Δ Δ'ᵀ)``.

A column of a dense layer is ``δ uᵀ``, so that the inner product of two columns is the product of ``uᵀu'`` and ``δᵀδ'``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, adjoint

ROWS = 128  # rows of the Gram matrix that NumPy's form finishes over all layers while they are in cache
TILE = 128  # width of the tiles in which it mirrors the lower triangle


class Factors(NamedTuple):
    """One layer's share: M factors δ for each of N samples with inputs u, and those of the other side."""

    u: Array
    """(N, a)"""
    u_other: Array
    """(N', a)"""
    delta: Array
    """(M, N, o)"""
    delta_other: Array
    """(M', N', o)"""
    weight: bool
    """Whether ``δ uᵀ`` is part of the column."""
    bias: bool
    """Whether δ is part of the column."""

    def inputs(self) -> Array | None:
        """Return ``U U'ᵀ [+ 1]``, or ``None``, which stands for one, if δ is the whole column."""
        if not self.weight:
            return None
        products = self.u @ adjoint(self.u_other)
        return products + 1.0 if self.bias else products


def hadamard_gram(layers: Sequence[Factors], symmetric: bool = False) -> Array:
    """Return K as ``(M N, M' N')``, exactly symmetric if both sides are the same and `symmetric` says so."""
    if array_api_compat.is_numpy_array(layers[0].delta):
        return _in_block_rows(layers, symmetric)
    xp = array_api_compat.array_namespace(layers[0].delta)
    k = None
    for layer in layers:
        (m, n, _), (m_, n_, _) = layer.delta.shape, layer.delta_other.shape
        rows, columns = xp.reshape(layer.delta, (m * n, -1)), xp.reshape(layer.delta_other, (m_ * n_, -1))
        outputs = rows @ adjoint(columns)
        if (inputs := layer.inputs()) is not None:
            outputs = xp.reshape(xp.reshape(outputs, (m, n, m_, n_)) * inputs[:, None, :], (m * n, m_ * n_))
        k = outputs if k is None else k + outputs
    return (k + adjoint(k)) / 2 if symmetric else k


def _in_block_rows(layers: Sequence[Factors], symmetric: bool) -> Any:
    """Finish some rows over all layers before the next ones, so that what is written stays in cache.

    With `symmetric` only the lower triangle is multiplied. Measured in float32 on one thread: 0.5 of the time of whole
    matrices on 64-128-128-10 with N = 128 (n = 1152), 0.9 on 784-64-32-10 with N = 64 (n = 576).
    """
    (m, n, _), (m_, n_, _) = layers[0].delta.shape, layers[0].delta_other.shape
    k = np.empty((m * n, m_ * n_), dtype=layers[0].delta.dtype)
    inputs = [layer.inputs() for layer in layers]
    others = [layer.delta_other.reshape(m_ * n_, -1).T for layer in layers]
    buffer = np.empty((max(1, ROWS // n) * min(n, ROWS), m_ * n_), dtype=k.dtype)
    for factors, samples in _block_rows(m, n):
        wide = factors.stop if symmetric else m_
        shape = (factors.stop - factors.start, samples.stop - samples.start, wide, n_)
        start, count = factors.start * n + samples.start, shape[0] * shape[1]
        out = k[start : start + count, : wide * n_]
        for j, layer in enumerate(layers):
            # The first layer writes the block, each other one adds its product from the buffer.
            here = buffer[:count, : wide * n_] if j else out
            np.matmul(layer.delta[factors, samples].reshape(count, -1), others[j][:, : wide * n_], out=here)
            if (z := inputs[j]) is not None:
                view = here.reshape(shape)  # splitting axes makes a view
                view *= z[samples, None, :]
            if j:
                out += here
    if symmetric:
        _mirror(k)
    return k


def _block_rows(m: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Cut the rows into blocks of about `ROWS`: several factors of all samples, or a part of one factor's samples."""
    several = max(1, ROWS // n)
    for i in range(0, m, several):
        for start in range(0, n, max(n, 1) if several > 1 else ROWS):
            stop = n if several > 1 else min(start + ROWS, n)
            yield slice(i, min(i + several, m)), slice(start, stop)


def _mirror(k: Any) -> None:
    """Copy the lower triangle to the upper one in tiles."""
    n = k.shape[0]
    for i in range(0, n, TILE):
        rows = slice(i, min(i + TILE, n))
        block = k[rows, rows]
        block[...] = np.tril(block) + np.tril(block, -1).T
        for j in range(0, i, TILE):
            k[j : j + TILE, rows] = k[rows, j : j + TILE].T
