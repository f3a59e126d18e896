"""An operation and its VJP as functions of NumPy arrays, for the bridges that give first derivatives only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddnref._core.arrays import Array
from ddnref._rules.binding import WARNING, Bound, Layout, failed, on_arrays
from ddnref._rules.contract import Rule


class NumpyPair(NamedTuple):
    """A bound operation on flat NumPy arrays."""

    forward: Callable[..., tuple[Array, ...]]
    """``forward(*inputs)`` returns outputs, saved arrays and the status of an iteration in one tuple."""
    reverse: Callable[..., tuple[Array | None, ...]]
    """``reverse(bars, arrays)`` as in `Bound`, from cotangents of the outputs only. A cotangent of zeros counts as
    ``None``. The result is empty where all are zero. Warns of NaN."""


def numpy_pair(rule: Rule, bound: Bound, layout: Layout) -> NumpyPair:
    """Make a bound operation one on the arrays of a layout."""
    flat = on_arrays(bound, rule, layout)

    def forward(*inputs: Array) -> tuple[Array, ...]:
        return tuple(np.asarray(y) for group in flat.forward(*inputs) for y in group)

    def reverse(bars: tuple[Array, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        # These frameworks fill in zeros for outputs that the loss does not use; the VJP saves work at None.
        gradients = flat.reverse(tuple(bar if np.any(bar) else None for bar in bars), arrays)
        if any(g is not None and np.any(failed(g)) for g in gradients):
            warnings.warn(WARNING, RuntimeWarning, stacklevel=2)
        return gradients

    return NumpyPair(forward, reverse)


def refuse_second_derivative(framework: str) -> Callable[..., Any]:
    """The derivative of a VJP in a first-order bridge: it always raises."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"A second derivative was taken through ddnref's bridge to {framework}, which gives first derivatives "
            "only. The bridges to PyTorch and JAX give second ones."
        )

    return refuse
