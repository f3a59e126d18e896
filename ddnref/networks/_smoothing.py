"""Layers whose activations have kinks: found, measured and smoothed, inside blocks and frozen layers too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ddnref._core.arrays import namespace_of
from ddnref.networks._activations import Activation, smoothed
from ddnref.networks._blocks import Frozen, Residual
from ddnref.networks._layers import Activated


def kinked(layers: Sequence[Any]) -> list[Activated]:
    """List the layers whose activation has kinks, in order."""
    found: list[Activated] = []
    for layer in layers:
        if isinstance(layer, (Residual, Frozen)):
            found += kinked(layer.layers if isinstance(layer, Residual) else [layer.layer])
        elif _has_kinks(layer):
            found.append(layer)
    return found


def sizes(layers: Sequence[Any], saved: Sequence[Any]) -> list[float]:
    """Return the root mean square of the pre-activations of each layer with kinks; one for zeros."""
    found: list[float] = []
    for layer, kept in zip(layers, saved, strict=True):
        if isinstance(layer, Residual):
            found += sizes(layer.layers, kept[2])
        elif isinstance(layer, Frozen):
            found += sizes([layer.layer], [kept])
        elif _has_kinks(layer):
            xp = namespace_of(kept.s)
            found.append(float(xp.mean(kept.s * kept.s)) ** 0.5 or 1.0)
    return found


def replaced(layers: Sequence[Any], widths: Iterator[float]) -> list[Any]:
    """Return the layers with smoothed activations, of the next width for each layer that has kinks."""
    found: list[Any] = []
    for layer in layers:
        if isinstance(layer, Residual):
            found.append(replace(layer, layers=replaced(layer.layers, widths)))
        elif isinstance(layer, Frozen):
            found.append(replace(layer, layer=replaced([layer.layer], widths)[0]))
        elif _has_kinks(layer):
            found.append(replace(layer, activation=smoothed(layer.activation, next(widths))))
        else:
            found.append(layer)
    return found


def _has_kinks(layer: Any) -> bool:
    phi = getattr(layer, "phi", None)
    return isinstance(phi, Activation) and bool(phi.kinks)
