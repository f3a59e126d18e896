"""The tutorial's random matrices, and Gram matrices of patches of real photographs in place of network features.

All are symmetric with positive entries, so that the dominant eigenvalue is positive and simple, and power iteration
finds it in a few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

EDGE = 16  # pixels of a patch
COTANGENTS = ("ones", "random")


def _images(rng: np.random.Generator, b: int, m: int) -> NDArray[Any]:
    """Gram matrices of m random patches each, of the two photographs that ship with scikit-learn."""
    pixels = np.stack(load_sample_images().images) / 255  # (2, height, width, 3)
    patches = np.lib.stride_tricks.sliding_window_view(pixels, (EDGE, EDGE), axis=(1, 2))
    which, row, column = (rng.integers(size, size=(b, m)) for size in patches.shape[:3])
    features = patches[which, row, column].reshape(b, m, -1)
    return np.asarray(features @ np.swapaxes(features, -1, -2) / features.shape[-1])


def _with_transpose(z: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.abs(z) + np.abs(np.swapaxes(z, -1, -2)))


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int, int], NDArray[Any]]] = {
    "gaussian": lambda rng, b, m: _with_transpose(rng.standard_normal((b, m, m))),
    "uniform": lambda rng, b, m: _with_transpose(rng.random((b, m, m))),
    "von Mises": lambda rng, b, m: _with_transpose(rng.vonmises(0.0, 1.0, (b, m, m))),
    "integers 0–10": lambda rng, b, m: _with_transpose(rng.integers(0, 11, (b, m, m)).astype(np.float64)),
    "photographs": _images,
}


def matrices(distribution: str, b: int, m: int, seed: int) -> NDArray[Any]:
    """``(b, m, m)`` in float32, the same for every precision that computes with them."""
    return DISTRIBUTIONS[distribution](np.random.default_rng([seed, m]), b, m).astype(np.float32)


def cotangent(kind: str, shape: tuple[int, ...], seed: int) -> NDArray[Any]:
    """All ones, the derivative of a sum, or random numbers."""
    if kind == "ones":
        return np.ones(shape)
    return np.random.default_rng([seed, *shape]).standard_normal(shape)
