"""What the bridges that compute on NumPy arrays share: the pair as functions from flat arrays to flat arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddnref._core.arrays import Array
from ddnref._rules.binding import WARNING, Bound, Layout, failed, on_arrays
from ddnref._rules.contract import Rule

FIRST_ORDER = (
    "A second derivative was taken through ddnref's bridge to {}, which gives first derivatives only. The bridges to "
    "PyTorch and JAX give second ones."
)


class Pair(NamedTuple):
    """A bound operation on NumPy arrays."""

    forward: Callable[..., tuple[Array, ...]]
    """``forward(*inputs)``: outputs, saved arrays and the status of an iteration, one after the other."""
    reverse: Callable[..., tuple[Array | None, ...]]
    """``reverse(bars, arrays)`` as in `Bound`, from cotangents of the outputs only, where zeros are as good as
    ``None``; empty where all are. Warns of NaN."""


def pair(rule: Rule, bound: Bound, layout: Layout) -> Pair:
    """The operation on the arrays of a layout."""
    own = on_arrays(bound, rule, layout)

    def forward(*inputs: Array) -> tuple[Array, ...]:
        return tuple(np.asarray(y) for group in own.forward(*inputs) for y in group)

    def reverse(bars: tuple[Array, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        gradients = own.reverse(tuple(bar if np.any(bar) else None for bar in bars), arrays)
        if any(g is not None and np.any(failed(g)) for g in gradients):
            warnings.warn(WARNING, RuntimeWarning, stacklevel=2)
        return gradients

    return Pair(forward, reverse)
