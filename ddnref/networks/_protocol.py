"""The protocol of layers, and the passes through a sequence of them that chains and residual blocks share.

For each layer ``y = f(θ, x)``:

    forward       y = f(θ, x)
    vjp           θ̄ = (∂f/∂θ)ᵀ ȳ,   x̄ = (∂f/∂x)ᵀ ȳ
    forward_dot   ẏ = ∂f/∂θ θ̇ + ∂f/∂x ẋ
    vjp_dot       the derivative of (θ̄, x̄) along (θ̇, ẋ, dȳ)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ddnref._core.arrays import Array

Params = tuple[Array, ...]
Shape = tuple[int, ...]


class LayerDerivatives(NamedTuple):
    """The contribution of one layer to the derivatives of the loss. The sample axis comes first everywhere."""

    z_in: Array
    """(N, ...): its input."""
    s: Array | None
    """(N, ...): its pre-activation ``W z_in + bias``; ``None`` for a layer without one."""
    z_out: Array
    """(N, ...): its output."""
    b: Array
    """(N, ...): derivative of the loss, as the chain reduces it, with respect to its output."""
    inner: tuple[LayerDerivatives, ...] = ()
    """The records of the layers inside a residual block."""


class AnyLayer(Protocol):
    """The protocol of a layer: pure functions of its parameters.

    Inputs and outputs are ``(N, ...)``. Cotangents and tangents may carry further leading axes, which come back in
    front of everything computed from them. ``None`` stands for a zero tangent.
    """

    @property
    def params(self) -> Params:
        """The arrays with respect to which gradients are taken."""

    def with_params(self, params: Params) -> AnyLayer:
        """Return the same layer with other parameters."""

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return the shape of one sample's output, ``None`` where unknown; ``ValueError`` for an unfit input shape."""

    def forward(self, params: Params, x: Array, order: int = 2) -> tuple[Array, Any]:
        """Return ``y`` and what derivatives up to `order` need."""

    def vjp(
        self, params: Params, saved: Any, y_bar: Array, *, wrt: str = "both", per_sample: bool = False
    ) -> tuple[Params | None, Array | None]:
        """Return ``θ̄, x̄`` with `wrt` ``"both"``, ``"params"`` or ``"x"``; `per_sample` does not sum θ̄."""

    def forward_dot(
        self, params: Params, saved: Any, params_dot: Params | None, x_dot: Array | None
    ) -> tuple[Array | None, Any]:
        """Return ``ẏ`` and what `vjp_dot` needs of the tangents."""

    def vjp_dot(
        self, params: Params, saved: Any, y_bar: Array, params_dot: Params | None, saved_dot: Any,
        y_bar_dot: Array | None, *, wrt: str = "both",
    ) -> tuple[Params, Array | None, Array | None]:  # fmt: skip
        """Return the tangents of ``θ̄`` and ``x̄``, and ``x̄``; the last two are ``None`` with `wrt` ``"params"``."""

    def derivatives(self, params: Params, saved: Any, y_bar: Array) -> LayerDerivatives:
        """Return the layer's record for `Chain.layer_derivatives`."""


Layers = Sequence[AnyLayer]


def split(layers: Layers, params: Sequence[Array]) -> list[Params]:
    """Split a flat list of parameters into one tuple for each layer."""
    parts, i = [], 0
    for layer in layers:
        n = len(layer.params)
        parts.append(tuple(params[i : i + n]))
        i += n
    return parts


def joined(parts: Sequence[Params]) -> list[Array]:
    """Join tuples of parameters into a flat list: the inverse of `split`."""
    return [array for part in parts for array in part]


def forward(layers: Layers, params: Sequence[Params], x: Array, order: int) -> tuple[Array, list[Any]]:
    """Return the output, and what each layer saved."""
    saved = []
    # Each layer takes the output of the one before it.
    for layer, theta in zip(layers, params, strict=True):
        x, kept = layer.forward(theta, x, order)
        saved.append(kept)
    return x, saved


def vjp(
    layers: Layers, params: Sequence[Params], saved: Sequence[Any], y_bar: Array, *, wrt: str = "both",
    per_sample: bool = False,
) -> tuple[list[Params], Array | None]:  # fmt: skip
    """Return the cotangents of all parameters and of the input."""
    bars: list[Params] = [()] * len(layers)
    # Below the first layer with parameters nobody asks for cotangents.
    first = _first_with_params(layers) if wrt == "params" else 0
    bar: Array | None = y_bar
    # From the last layer to the first, each passes on the cotangent of its input.
    for i in range(len(layers) - 1, first - 1, -1):
        wanted = _wanted(wrt, i == first)
        theta_bar, bar = layers[i].vjp(params[i], saved[i], bar, wrt=wanted, per_sample=per_sample)
        bars[i] = theta_bar or ()
    return bars, bar


def forward_dot(
    layers: Layers, params: Sequence[Params], saved: Sequence[Any], params_dot: Sequence[Params] | None,
    x_dot: Array | None = None,
) -> tuple[Array | None, list[Any]]:  # fmt: skip
    """Return the tangent of the output, and what each layer saved of it."""
    saved_dot = []
    # Tangents enter at every layer that has parameters and travel forward.
    for i, layer in enumerate(layers):
        theta_dot = params_dot[i] if params_dot is not None and params_dot[i] else None
        x_dot, kept = layer.forward_dot(params[i], saved[i], theta_dot, x_dot)
        saved_dot.append(kept)
    return x_dot, saved_dot


def vjp_dot(
    layers: Layers, params: Sequence[Params], saved: Sequence[Any], y_bar: Array,
    params_dot: Sequence[Params] | None, saved_dot: Sequence[Any], y_bar_dot: Array | None, *, wrt: str = "both",
) -> tuple[list[Params], Array | None, Array | None]:  # fmt: skip
    """Return the tangents of the cotangents of all parameters and of the input, and the cotangent of the input."""
    dots: list[Params] = [()] * len(layers)
    # As in vjp, the layers below the first parameters are skipped.
    first = _first_with_params(layers) if wrt == "params" else 0
    bar: Array | None = y_bar
    bar_dot = y_bar_dot
    # The cotangent of each layer's input travels back together with its tangent.
    for i in range(len(layers) - 1, first - 1, -1):
        theta_dot = params_dot[i] if params_dot is not None and params_dot[i] else None
        wrt_i = _wanted(wrt, i == first)
        dots[i], bar_dot, bar = layers[i].vjp_dot(params[i], saved[i], bar, theta_dot, saved_dot[i], bar_dot, wrt=wrt_i)
    return dots, bar_dot, bar


def derivatives(
    layers: Layers, params: Sequence[Params], saved: Sequence[Any], y_bar: Array
) -> tuple[LayerDerivatives, ...]:
    """Return one record for each layer, first layer first."""
    # The cotangent of each layer's output, from the last layer to the first.
    records, bar = [], y_bar
    for i in range(len(layers) - 1, -1, -1):
        records.append(layers[i].derivatives(params[i], saved[i], bar))
        if i:  # nobody asks for the cotangent of the chain's input
            bar = layers[i].vjp(params[i], saved[i], bar, wrt="x")[1]
    return tuple(reversed(records))


def output_shape(layers: Layers, shape: Shape | None) -> Shape | None:
    """Return the shape of one sample after all layers; a ``ValueError`` names a layer that does not fit."""
    for i, layer in enumerate(layers):
        try:
            shape = layer.output_shape(shape)
        # A layer does not know its place in the chain.
        except ValueError as error:
            raise ValueError(f"layers[{i}] ({type(layer).__name__}): {error}") from None
    return shape


def add(a: Array | None, b: Array | None) -> Array | None:
    """Add two tangents, either of which may be zero (``None``)."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _first_with_params(layers: Layers) -> int:
    return next((i for i, layer in enumerate(layers) if layer.params), len(layers))


def _wanted(wrt: str, is_first: bool) -> str:
    # Layers above the first one with parameters must pass a cotangent down to it.
    return "both" if wrt == "params" and not is_first else wrt
