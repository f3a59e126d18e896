"""Layers made of other layers: residual blocks, frozen layers, and a separate activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ddnref._core.arrays import Array
from ddnref.networks import _protocol
from ddnref.networks._activations import Activation, resolve
from ddnref.networks._layers import Activated, Parameterless
from ddnref.networks._protocol import AnyLayer, LayerDerivatives, Params, Shape, add


@dataclass(frozen=True, eq=False)
class Residual:
    """A shortcut around layers: ``y = x + f(x)``.

    Parameters
    ----------
    layers : sequence of layers
        Those of f, whose output has the shape of its input.

    Examples
    --------
    >>> import numpy as np
    >>> from ddnref.networks import Chain, Dense, Residual
    >>> block = Residual([Dense(np.eye(2), activation="tanh"), Dense(0.1 * np.eye(2))])
    >>> Chain([block], "mse").output(np.asarray([[1.0, 0.0]])).round(4)
    array([[1.0762, 0.    ]])
    """

    layers: Sequence[AnyLayer]

    def __post_init__(self) -> None:
        # A tuple, because the caller may go on with the list.
        layers = tuple(self.layers)
        if not layers:
            raise ValueError("layers is empty: a Residual needs at least one layer.")
        object.__setattr__(self, "layers", layers)

    @property
    def params(self) -> Params:
        """The parameters of all layers inside."""
        return tuple(array for layer in self.layers for array in layer.params)

    @property
    def constants(self) -> Params:
        """The arrays of frozen layers inside."""
        return tuple(array for layer in self.layers for array in getattr(layer, "constants", ()))

    def with_params(self, params: Params) -> Self:
        """Return the same block with other arrays."""
        parts = _protocol.split(self.layers, params)
        return replace(self, layers=[z.with_params(p) for z, p in zip(self.layers, parts, strict=True)])

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return the shape of one sample's output, which is that of its input."""
        inner = _protocol.output_shape(self.layers, shape)
        # Either shape may be unknown, and then nothing can be said.
        if shape is not None and inner is not None and inner != shape:
            raise ValueError(f"its layers map samples of shape {shape} to {inner}: nothing to add the shortcut to.")
        return inner if shape is None else shape

    def forward(self, params: Params, x: Array, order: int = 2) -> tuple[Array, Any]:
        """Return ``y = x + f(x)``, and what derivatives need: x, y and what the layers inside saved."""
        inner, saved = _protocol.forward(self.layers, _protocol.split(self.layers, params), x, order)
        y = x + inner
        return y, (x, y, saved)

    def vjp(
        self, params: Params, saved: Any, y_bar: Array, *, wrt: str = "both", per_sample: bool = False
    ) -> tuple[Params | None, Array | None]:
        """Return the cotangents inside and ``x̄ = ȳ + (∂f/∂x)ᵀ ȳ``."""
        parts = _protocol.split(self.layers, params)
        # The shortcut passes ȳ on unchanged, and f adds its own cotangent.
        bars, bar = _protocol.vjp(self.layers, parts, saved[2], y_bar, wrt=wrt, per_sample=per_sample)
        return None if wrt == "x" else tuple(_protocol.joined(bars)), None if wrt == "params" else y_bar + bar

    def forward_dot(
        self, params: Params, saved: Any, params_dot: Params | None, x_dot: Array | None
    ) -> tuple[Array | None, Any]:
        """Return ``ẏ = ẋ + ḟ`` and what the layers inside saved."""
        parts = _protocol.split(self.layers, params)
        dots = None if params_dot is None else _protocol.split(self.layers, params_dot)
        inner, saved_dot = _protocol.forward_dot(self.layers, parts, saved[2], dots, x_dot)
        # Either tangent may be zero.
        return add(x_dot, inner), saved_dot

    def vjp_dot(
        self, params: Params, saved: Any, y_bar: Array, params_dot: Params | None, saved_dot: Any,
        y_bar_dot: Array | None, *, wrt: str = "both",
    ) -> tuple[Params, Array | None, Array | None]:  # fmt: skip
        """Return the tangents of the cotangents: those inside, and ``dx̄ = dȳ`` plus that of f."""
        parts = _protocol.split(self.layers, params)
        dots = None if params_dot is None else _protocol.split(self.layers, params_dot)
        bars, bar_dot, bar = _protocol.vjp_dot(self.layers, parts, saved[2], y_bar, dots, saved_dot, y_bar_dot, wrt=wrt)
        flat = tuple(_protocol.joined(bars))
        if wrt == "params":
            return flat, None, None
        # The shortcut adds dȳ to the tangent of x̄ and ȳ to x̄.
        return flat, add(y_bar_dot, bar_dot), y_bar + bar

    def derivatives(self, params: Params, saved: Any, y_bar: Array) -> LayerDerivatives:
        """Return input and output of the block, and the records of its layers."""
        x, y, kept = saved
        inner = _protocol.derivatives(self.layers, _protocol.split(self.layers, params), kept, y_bar)
        return LayerDerivatives(x, None, y, y_bar, inner)


@dataclass(frozen=True, eq=False)
class Frozen(Parameterless):
    """A layer whose parameters are constants, which are not among a chain's `params`, gradients and vectors.

    Parameters
    ----------
    layer : layer

    Examples
    --------
    >>> import numpy as np
    >>> body, head = ddnref.networks.Dense(np.eye(2), activation="tanh"), ddnref.networks.Dense(np.ones((1, 2)))
    >>> chain = ddnref.networks.Chain([ddnref.networks.Frozen(body), head], "mse")
    >>> [p.shape for p in chain.params]
    [(1, 2)]
    """

    layer: AnyLayer

    @property
    def constants(self) -> Params:
        """The arrays of the layer."""
        return (*self.layer.params, *getattr(self.layer, "constants", ()))

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return the output shape of the layer."""
        return self.layer.output_shape(shape)

    def forward(self, params: Params, x: Array, order: int = 2) -> tuple[Array, Any]:
        """Return the output of the layer and what it saved."""
        return self.layer.forward(self.layer.params, x, order)

    def vjp(
        self, params: Params, saved: Any, y_bar: Array, *, wrt: str = "both", per_sample: bool = False
    ) -> tuple[Params, Array | None]:
        """Return ``x̄`` alone."""
        # wrt="x" saves the products that the layer's parameters would need.
        return (), self.layer.vjp(self.layer.params, saved, y_bar, wrt="x")[1]

    def forward_dot(
        self, params: Params, saved: Any, params_dot: Params | None, x_dot: Array | None
    ) -> tuple[Array | None, Any]:
        """Return ``ẏ`` from ``ẋ`` alone."""
        # Constants have no tangents.
        return self.layer.forward_dot(self.layer.params, saved, None, x_dot)

    def vjp_dot(
        self, params: Params, saved: Any, y_bar: Array, params_dot: Params | None, saved_dot: Any,
        y_bar_dot: Array | None, *, wrt: str = "both",
    ) -> tuple[Params, Array | None, Array | None]:  # fmt: skip
        """Return ``dx̄`` and ``x̄`` alone."""
        own = self.layer.params
        _, x_bar_dot, x_bar = self.layer.vjp_dot(own, saved, y_bar, None, saved_dot, y_bar_dot, wrt="x")
        return (), x_bar_dot, x_bar

    def derivatives(self, params: Params, saved: Any, y_bar: Array) -> LayerDerivatives:
        """Return the record of the layer."""
        return self.layer.derivatives(self.layer.params, saved, y_bar)


@dataclass(frozen=True, eq=False)
class Elementwise(Parameterless, Activated):
    """A separate activation, for places where no affine layer precedes it."""

    activation: str | Activation
    phi: Activation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "phi", resolve(self.activation))

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return the shape of one sample's output, which is that of its input."""
        return shape
