"""An operation and its VJP as functions of NumPy arrays, for the bridges that give first derivatives only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ddnref._core.arrays import Array
from ddnref._rules.binding import WARNING, Bound, Layout, failed, on_arrays
from ddnref._rules.contract import Rule


def numpy_pair(
    rule: Rule, bound: Bound, layout: Layout
) -> tuple[Callable[..., tuple[Array, ...]], Callable[..., tuple[Array | None, ...]]]:
    """A bound operation on the arrays of a layout, as ``(forward, reverse)``.

    ``forward(*inputs)`` returns outputs, saved arrays and the status of an iteration in one tuple. ``reverse(bars,
    arrays)`` is that of `Bound`, for cotangents of the outputs only; it returns ``()`` if all of them are zero.
    """
    flat = on_arrays(bound, rule, layout)

    def forward(*inputs: Array) -> tuple[Array, ...]:
        return tuple(np.asarray(y) for group in flat.forward(*inputs) for y in group)

    def reverse(bars: tuple[Array, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        # These frameworks fill in zeros for outputs that the loss does not use; the VJP saves work at None.
        gradients = flat.reverse(tuple(bar if np.any(bar) else None for bar in bars), arrays)
        # With throw=False a gradient that does not exist is NaN.
        if any(g is not None and np.any(failed(g)) for g in gradients):
            warnings.warn(WARNING, RuntimeWarning, stacklevel=2)
        return gradients

    return forward, reverse


def refuse_second_derivative(framework: str) -> Callable[..., Any]:
    """The derivative of a VJP in a first-order bridge: it always raises."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"A second derivative was taken through ddnref's bridge to {framework}, which gives first derivatives "
            "only. The bridges to PyTorch and JAX give second ones."
        )

    return refuse
