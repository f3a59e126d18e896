"""Layers from sizes, from a list of arrays, from a PyTorch module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array
from ddnref.networks._activations import Activation
from ddnref.networks._layers import Dense


def mlp(
    inputs: int, hidden: int, outputs: int, layers: int, activation: str | Activation, bias: bool, gain: float,
    seed: int, like: Array | None,
) -> list[Dense]:  # fmt: skip
    """Dense layers with ``W_ij ~ N(0, gain² / a_in)`` and biases of zero."""
    for name, value in {"inputs": inputs, "hidden": hidden, "outputs": outputs, "layers": layers}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
    like = np.zeros(()) if like is None else like
    xp, device = array_api_compat.array_namespace(like), array_api_compat.device(like)
    rng = np.random.default_rng(seed)
    widths = [inputs, *[hidden] * (layers - 1), outputs]
    built = []
    for i in range(layers):
        draw = gain / math.sqrt(widths[i]) * rng.standard_normal((widths[i + 1], widths[i]))
        weight = xp.asarray(draw, dtype=like.dtype, device=device)
        zero = xp.zeros((widths[i + 1],), dtype=like.dtype, device=device) if bias else None
        built.append(Dense(weight, zero, activation if i < layers - 1 else "identity"))
    return built


def from_arrays(arrays: Sequence[Array], activation: str | Activation) -> list[Dense]:
    """Dense layers from ``[W1, b1, W2, …]``: a vector is the bias of the matrix before it."""
    pairs: list[list[Array]] = []
    for i, array in enumerate(arrays):
        if getattr(array, "ndim", None) == 2:
            pairs.append([array])
        elif getattr(array, "ndim", None) == 1 and pairs and len(pairs[-1]) == 1:
            pairs[-1].append(array)
        else:
            raise ValueError(
                f"arrays[{i}] has shape {tuple(getattr(array, 'shape', ()))}; expected weights (a_out, a_in), each "
                "followed by its bias (a_out,) or by none."
            )
    if not pairs:
        raise ValueError("arrays is empty: expected weights (a_out, a_in) and biases (a_out,).")
    last = len(pairs) - 1
    return [
        Dense(pair[0], pair[1] if len(pair) > 1 else None, activation if i < last else "identity")
        for i, pair in enumerate(pairs)
    ]
