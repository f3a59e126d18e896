"""The handwritten digits that ship with scikit-learn: 1797 images of 8×8 pixels, nothing to download."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

CLASSES = 10
PIXELS = 64
TRAIN = 1200  # of 1797 images; the others are held out


class Digits(NamedTuple):
    """Images as ``(n, 64)`` numbers between 0 and 1, and which digit each one is."""

    images: NDArray[Any]
    labels: NDArray[Any]


def split(seed: int) -> tuple[Digits, Digits]:
    """A random training set and the held-out rest."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = images[order] / 16, labels[order]
    return Digits(images[:TRAIN], labels[:TRAIN]), Digits(images[TRAIN:], labels[TRAIN:])


def one_of_each(digits: Digits) -> NDArray[Any]:
    """The place of the first image of every digit."""
    return np.asarray([int(np.argmax(digits.labels == digit)) for digit in range(CLASSES)])


def square(images: NDArray[Any]) -> NDArray[Any]:
    """``(..., 64)`` as ``(..., 8, 8)``."""
    return images.reshape(*images.shape[:-1], 8, 8)


def pixel_columns() -> tuple[str, ...]:
    """Column names for the 64 pixels in a CSV file."""
    return tuple(f"pixel {row},{column}" for row in range(8) for column in range(8))
