"""Layers made of others: a shortcut around some, one whose parameters are constants; and an activation alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ddnref._core.arrays import Array
from ddnref.networks import _protocol as _sweeps
from ddnref.networks._activations import Activation, jet, resolve
from ddnref.networks._layers import AffineSaved, Parameterless, times
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
        layers = tuple(self.layers)
        if not layers:
            raise ValueError("layers is empty: a Residual needs at least one layer.")
        object.__setattr__(self, "layers", layers)

    @property
    def params(self) -> Params:
        """Those of all its layers."""
        return tuple(array for layer in self.layers for array in layer.params)

    @property
    def constants(self) -> Params:
        """Arrays of frozen layers inside."""
        return tuple(array for layer in self.layers for array in getattr(layer, "constants", ()))

    def with_params(self, params: Params) -> Self:
        """The same block with other arrays."""
        parts = _sweeps.split(self.layers, params)
        return replace(self, layers=[z.with_params(p) for z, p in zip(self.layers, parts, strict=True)])

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """The same."""
        inner = _sweeps.output_shape(self.layers, shape)
        if shape is not None and inner is not None and inner != shape:
            raise ValueError(f"its layers map samples of shape {shape} to {inner}: nothing to add the shortcut to.")
        return inner if shape is None else shape

    def forward(self, params: Params, x: Array, order: int = 2) -> tuple[Array, Any]:
        """``y = x + f(x)``."""
        inner, saved = _sweeps.forward(self.layers, _sweeps.split(self.layers, params), x, order)
        y = x + inner
        return y, (x, y, saved)

    def vjp(
        self, params: Params, saved: Any, y_bar: Array, *, wrt: str = "both", per_sample: bool = False
    ) -> tuple[Params | None, Array | None]:
        """``x̄ = ȳ + f's``."""
        parts = _sweeps.split(self.layers, params)
        bars, bar = _sweeps.vjp(self.layers, parts, saved[2], y_bar, wrt=wrt, per_sample=per_sample)
        return None if wrt == "x" else tuple(_sweeps.joined(bars)), None if wrt == "params" else y_bar + bar

    def forward_dot(
        self, params: Params, saved: Any, params_dot: Params | None, x_dot: Array | None
    ) -> tuple[Array | None, Any]:
        """``ẏ = ẋ + f's``."""
        parts = _sweeps.split(self.layers, params)
        dots = None if params_dot is None else _sweeps.split(self.layers, params_dot)
        inner, saved_dot = _sweeps.forward_dot(self.layers, parts, saved[2], dots, x_dot)
        return add(x_dot, inner), saved_dot

    def jvp(self, params: Params, saved: Any, params_dot: Params | None, x_dot: Array | None) -> Array | None:
        """``ẏ`` alone."""
        return self.forward_dot(params, saved, params_dot, x_dot)[0]

    def vjp_dot(
        self, params: Params, saved: Any, y_bar: Array, params_dot: Params | None, saved_dot: Any,
        y_bar_dot: Array | None, *, wrt: str = "both",
    ) -> tuple[Params, Array | None, Array | None]:  # fmt: skip
        """``dx̄ = dȳ + f's``."""
        parts = _sweeps.split(self.layers, params)
        dots = None if params_dot is None else _sweeps.split(self.layers, params_dot)
        bars, bar_dot, bar = _sweeps.vjp_dot(
            self.layers, parts, saved[2], y_bar, dots, saved_dot, y_bar_dot, wrt=wrt
        )  # fmt: skip
        flat = tuple(_sweeps.joined(bars))
        if wrt == "params":
            return flat, None, None
        return flat, add(y_bar_dot, bar_dot), y_bar + bar

    def derivatives(self, params: Params, saved: Any, y_bar: Array) -> LayerDerivatives:
        """Input and output of the block, and what its layers tell."""
        inner = _sweeps.derivatives(self.layers, _sweeps.split(self.layers, params), saved[2], y_bar)
        return LayerDerivatives(saved[0], None, saved[1], y_bar, inner)


@dataclass(frozen=True, eq=False)
class Frozen(Parameterless):
    """A layer whose parameters are constants: none of a chain's `params`, gradients and products sees them.

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
        """That of the layer."""
        return self.layer.output_shape(shape)

    def forward(self, params: Params, x: Array, order: int = 2) -> tuple[Array, Any]:
        """That of the layer."""
        return self.layer.forward(self.layer.params, x, order)

    def vjp(
        self, params: Params, saved: Any, y_bar: Array, *, wrt: str = "both", per_sample: bool = False
    ) -> tuple[Params, Array | None]:
        """``x̄`` alone."""
        return (), self.layer.vjp(self.layer.params, saved, y_bar, wrt="x")[1]

    def forward_dot(
        self, params: Params, saved: Any, params_dot: Params | None, x_dot: Array | None
    ) -> tuple[Array | None, Any]:
        """``ẏ`` from ``ẋ`` alone."""
        return self.layer.forward_dot(self.layer.params, saved, None, x_dot)

    def vjp_dot(
        self, params: Params, saved: Any, y_bar: Array, params_dot: Params | None, saved_dot: Any,
        y_bar_dot: Array | None, *, wrt: str = "both",
    ) -> tuple[Params, Array | None, Array | None]:  # fmt: skip
        """``dx̄`` and ``x̄`` alone."""
        own = self.layer.params
        _, x_bar_dot, x_bar = self.layer.vjp_dot(own, saved, y_bar, None, saved_dot, y_bar_dot, wrt="x")
        return (), x_bar_dot, x_bar

    def derivatives(self, params: Params, saved: Any, y_bar: Array) -> LayerDerivatives:
        """Those of the layer."""
        return self.layer.derivatives(self.layer.params, saved, y_bar)


@dataclass(frozen=True, eq=False)
class Elementwise(Parameterless):
    """An activation of its own, where no affine layer precedes it."""

    activation: str | Activation
    phi: Activation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "phi", resolve(self.activation))

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """The same."""
        return shape

    def forward(self, params: Params, x: Array, order: int = 2) -> tuple[Array, AffineSaved | None]:
        """``y = φ(x)``."""
        y, slope, curvature = jet(self.phi, x, order)
        return y, AffineSaved(x, x, y, slope, curvature, x) if order else None

    def vjp(
        self, params: Params, saved: AffineSaved, y_bar: Array, *, wrt: str = "both", per_sample: bool = False
    ) -> tuple[Params, Array]:
        """``x̄ = ȳ ∘ φ'``."""
        return (), times(y_bar, saved.slope)

    def forward_dot(
        self, params: Params, saved: AffineSaved, params_dot: Params | None, x_dot: Array | None
    ) -> tuple[Array | None, Array | None]:
        """``ẏ = φ' ∘ ẋ``."""
        return None if x_dot is None else times(x_dot, saved.slope), x_dot

    def vjp_dot(
        self, params: Params, saved: AffineSaved, y_bar: Array, params_dot: Params | None, saved_dot: Array | None,
        y_bar_dot: Array | None, *, wrt: str = "both",
    ) -> tuple[Params, Array | None, Array | None]:  # fmt: skip
        """``dx̄ = dȳ ∘ φ' + ȳ ∘ φ'' ∘ ẋ``."""
        x_bar_dot = None if y_bar_dot is None else times(y_bar_dot, saved.slope)
        if saved.curvature is not None and saved_dot is not None:
            x_bar_dot = add(x_bar_dot, (y_bar * saved.curvature) * saved_dot)
        return (), x_bar_dot, times(y_bar, saved.slope)

    def derivatives(self, params: Params, saved: AffineSaved, y_bar: Array) -> LayerDerivatives:
        """The pre-activation is the input."""
        return LayerDerivatives(saved.x, saved.s, saved.y, y_bar)
