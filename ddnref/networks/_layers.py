"""Dense layers, and the affine map with an activation that they share with convolutions.

    s = W x + b,   y = φ(s)                         ṡ = Ẇ x + W ẋ + ḃ,       ẏ = φ' ∘ ṡ
    δ = ȳ ∘ φ'(s)                                   δ̇ = dȳ ∘ φ' + ȳ ∘ φ'' ∘ ṡ
    W̄ = δᵀ x,   b̄ = Σ δ,   x̄ = δ W                  dW̄ = δ̇ᵀ x + δᵀ ẋ,   db̄ = Σ δ̇,   dx̄ = δ̇ W + δ Ẇ

with one row for each sample, the sums over the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import array_api_compat

from ddnref._core.arrays import Array, namespace
from ddnref._core.checks import check_dtypes, check_real, check_shapes, given
from ddnref.networks._activations import Activation, jet, resolve
from ddnref.networks._protocol import LayerDerivatives, Params, Shape, add


class AffineSaved(NamedTuple):
    """Forward values that an affine layer saves."""

    u: Array
    """The input as the linear map takes it: ``(N, a_in)``, or the patches of an image."""
    s: Array
    y: Array
    slope: Array | None
    """φ'(s); ``None`` for one."""
    curvature: Array | None
    """φ''(s); ``None`` for zero."""
    x: Array


class AffineDot(NamedTuple):
    """Tangents that an affine layer saves."""

    u: Array | None
    s: Array | None


class Activated:
    """A linear map followed by an activation; subclasses define the map and its transposes, here the identity.

    These take any leading axes.
    """

    phi: Activation
    # For layers with parameters; sums over the samples are left out with per_sample=True.
    linear_w: Callable[..., Array]  # (δ, u, per_sample=False): δ uᵀ
    linear_b: Callable[..., Array]  # (δ, per_sample=False): the sum of δ over all entries that share a bias
    spread: Callable[[Array], Array]  # the bias, made to broadcast against s

    def lift(self, x: Array, ndim: int) -> Array:
        """Return the input, which has `ndim` axes, or its tangent, which may have more, as the linear map takes it."""
        return x

    def linear(self, weight: Array | None, u: Array) -> Array:
        """Return ``W u``."""
        return u

    def linear_x(self, weight: Array | None, delta: Array, saved: AffineSaved) -> Array:
        """Return ``Wᵀ δ``, shaped like the input."""
        return delta

    def shaped(self, s: Array, saved_x: Array) -> Array:
        """Shape ``s`` or ``y`` as the layer returns it."""
        return s

    def flat(self, y_bar: Array) -> Array:
        """Undo `shaped`."""
        return y_bar

    def forward(self, params: Params, x: Array, order: int = 2) -> tuple[Array, AffineSaved | None]:
        """Return ``y = φ(W x + b)`` and what derivatives need, or ``None`` with `order` 0."""
        # s = W u + b
        u = self.lift(x, x.ndim)
        s = self.linear(_weight(params), u)
        if len(params) > 1:
            s = s + self.spread(params[1])
        # The activation comes with as many derivatives as are needed later.
        y, slope, curvature = jet(self.phi, s, order)
        return self.shaped(y, x), AffineSaved(u, s, y, slope, curvature, x) if order else None

    def vjp(
        self, params: Params, saved: AffineSaved, y_bar: Array, *, wrt: str = "both", per_sample: bool = False
    ) -> tuple[Params | None, Array | None]:
        """Return ``W̄ = δᵀ x, b̄ = Σ δ, x̄ = δ W``."""
        # δ = ȳ ∘ φ' is the cotangent of the pre-activation.
        delta = times(self.flat(y_bar), saved.slope)
        # Each of the two products is skipped where nobody asks for it.
        bars = None if wrt == "x" else self._bars(params, delta, saved.u, per_sample)
        return bars, None if wrt == "params" else self.linear_x(_weight(params), delta, saved)

    def _bars(self, params: Params, delta: Array, u: Array, per_sample: bool = False) -> Params:
        bars = (self.linear_w(delta, u, per_sample),) if params else ()
        return (*bars, self.linear_b(delta, per_sample)) if len(params) > 1 else bars

    def forward_dot(
        self, params: Params, saved: AffineSaved, params_dot: Params | None, x_dot: Array | None
    ) -> tuple[Array | None, AffineDot]:
        """Return ``ẏ = φ' ∘ (Ẇ x + W ẋ + ḃ)`` and what `vjp_dot` needs."""
        # ṡ = W ẋ + Ẇ x + ḃ, where each term may be zero.
        u_dot = None if x_dot is None else self.lift(x_dot, saved.x.ndim)
        s_dot = None if u_dot is None else self.linear(_weight(params), u_dot)
        if params_dot is not None:
            s_dot = add(s_dot, self.linear(params_dot[0], saved.u))
            if len(params_dot) > 1:
                s_dot = add(s_dot, self.spread(params_dot[1]))
        # ẏ = φ' ∘ ṡ
        y_dot = None if s_dot is None else self.shaped(times(s_dot, saved.slope), saved.x)
        return y_dot, AffineDot(u_dot, s_dot)

    def vjp_dot(
        self, params: Params, saved: AffineSaved, y_bar: Array, params_dot: Params | None, saved_dot: AffineDot,
        y_bar_dot: Array | None, *, wrt: str = "both",
    ) -> tuple[Params, Array | None, Array | None]:  # fmt: skip
        """Return ``dW̄ = δ̇ᵀ x + δᵀ ẋ``, ``dx̄ = δ̇ W + δ Ẇ`` and ``x̄``."""
        # δ̇ = dȳ ∘ φ' + ȳ ∘ φ'' ∘ ṡ.
        y_bar = self.flat(y_bar)
        delta = times(y_bar, saved.slope)
        delta_dot = None if y_bar_dot is None else times(self.flat(y_bar_dot), saved.slope)
        if saved.curvature is not None and saved_dot.s is not None:
            delta_dot = add(delta_dot, (y_bar * saved.curvature) * saved_dot.s)
        if delta_dot is None:
            delta_dot = array_api_compat.array_namespace(delta).zeros_like(delta)
        # dW̄ = δ̇ᵀ x + δᵀ ẋ and db̄ = Σ δ̇.
        bars: Params = () if wrt == "x" else self._bars(params, delta_dot, saved.u)
        if saved_dot.u is not None and bars:
            bars = (bars[0] + self.linear_w(delta, saved_dot.u), *bars[1:])
        if wrt == "params":
            return bars, None, None
        # dx̄ = δ̇ W + δ Ẇ.
        x_bar_dot = self.linear_x(_weight(params), delta_dot, saved)
        if params_dot is not None:
            x_bar_dot = x_bar_dot + self.linear_x(params_dot[0], delta, saved)
        return bars, x_bar_dot, self.linear_x(_weight(params), delta, saved)

    def derivatives(self, params: Params, saved: AffineSaved, y_bar: Array) -> LayerDerivatives:
        """Return input, pre-activation, output and the output's cotangent."""
        return LayerDerivatives(saved.x, self.shaped(saved.s, saved.x), self.shaped(saved.y, saved.x), y_bar)


def _weight(params: Params) -> Array | None:
    """Return the weight, or ``None`` for a layer without parameters."""
    return params[0] if params else None


class Affine(Activated):
    """An affine map ``W x + b`` followed by an activation."""

    weight: Array
    bias: Array | None
    activation: str | Activation

    @property
    def params(self) -> Params:
        """``(weight,)`` or ``(weight, bias)``."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def with_params(self, params: Params) -> Self:
        """Return the same layer with other arrays."""
        return replace(self, weight=params[0], bias=params[1] if len(params) > 1 else None)  # type: ignore[type-var]

    def check(self, ndim: int, layout: str) -> None:
        """Check weight and bias, and find the activation."""
        # The weight defines library, dtype and sizes, and the bias must fit it.
        given(weight=self.weight)
        namespace(weight=self.weight, bias=self.bias)
        check_real(weight=self.weight, bias=self.bias)
        check_dtypes(bias=(self.bias, self.weight.dtype))
        if self.weight.ndim != ndim or 0 in self.weight.shape:
            name, shape = type(self).__name__, tuple(self.weight.shape)
            raise ValueError(f"weight of {name} has shape {shape}, expected {layout}, none zero.")
        check_shapes(bias=(self.bias, (self.weight.shape[0],)))
        # The dataclass is frozen, so that its own assignment would raise.
        object.__setattr__(self, "phi", resolve(self.activation))


@dataclass(frozen=True, eq=False)
class Dense(Affine):
    """A dense layer ``φ(x Wᵀ + b)`` of inputs ``(N, a_in)``.

    Parameters
    ----------
    weight : (a_out, a_in) array, real floating
    bias : (a_out,) array, optional
    activation : str or Activation
        ``"identity"``, ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"sigmoid"``, ``"softplus"``, ``"gelu"``,
        ``"gelu_tanh"``, ``"silu"``, ``"sin"``, or a triple of your own.

    Raises
    ------
    TypeError, ValueError
        Arrays that are not real floating, of several libraries, devices or dtypes; shapes that do not fit; an
        unknown activation.

    Examples
    --------
    >>> import numpy as np
    >>> layer = ddnref.networks.Dense(np.asarray([[1.0, -2.0]]), np.asarray([0.5]), "relu")
    >>> ddnref.networks.Chain([layer], "mse").output(np.asarray([[2.0, 1.0]]))
    array([[0.5]])
    """

    weight: Array
    bias: Array | None = None
    activation: str | Activation = "identity"
    phi: Activation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.check(2, "(a_out, a_in)")

    def output_shape(self, shape: Shape | None) -> Shape:
        """Return ``(a_out,)``."""
        a_out, a_in = self.weight.shape
        # Images whose pixels are as many as the weight takes only lack a Flatten.
        if shape is not None and shape != (a_in,):
            raise ValueError(
                f"its weight {(a_out, a_in)} takes samples of shape {(a_in,)}, but they come with shape {shape}"
                + (". Put a ddnref.networks.Flatten before it." if len(shape) > 1 and math.prod(shape) == a_in else ".")
            )
        return (a_out,)

    def linear(self, weight: Array, u: Array) -> Array:
        """Return ``u Wᵀ``."""
        return _rows(u, _transposed(weight))

    def linear_x(self, weight: Array, delta: Array, saved: AffineSaved) -> Array:
        """Return ``δ W``."""
        return _rows(delta, weight)

    def linear_w(self, delta: Array, u: Array, per_sample: bool = False) -> Array:
        """Return ``δᵀ u``."""
        if per_sample:  # an outer product for each sample
            return delta[..., :, None] * u[..., None, :]
        # The matrix product sums over the samples.
        return _transposed(delta) @ u

    def linear_b(self, delta: Array, per_sample: bool = False) -> Array:
        """Return ``Σ_n δ_n``."""
        return delta if per_sample else array_api_compat.array_namespace(delta).sum(delta, axis=-2)

    def spread(self, bias: Array) -> Array:
        """Return the bias as one row for all samples."""
        return bias[..., None, :]


class Parameterless:
    """The methods that layers without parameters share."""

    @property
    def params(self) -> Params:
        """The empty tuple."""
        return ()

    def with_params(self, params: Params) -> Self:
        """Return the layer itself."""
        return self


@dataclass(frozen=True, eq=False)
class Flatten(Parameterless, Activated):
    """A layer that makes one vector of each sample: ``(N, ...)`` to ``(N, features)``.

    Examples
    --------
    >>> import numpy as np
    >>> head = ddnref.networks.Dense(np.ones((1, 4)))
    >>> ddnref.networks.Chain([ddnref.networks.Flatten(), head], "mse").output(np.ones((3, 2, 2))).shape
    (3, 1)
    """

    phi = resolve("identity")

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return ``(features,)``."""
        return None if shape is None else (math.prod(shape),)

    def lift(self, x: Array, ndim: int) -> Array:
        """Reshape what belongs to one sample to a vector."""
        own = ndim - 1
        return _reshaped(x, own, (math.prod(x.shape[x.ndim - own :]),))

    def linear_x(self, weight: Array | None, delta: Array, saved: AffineSaved) -> Array:
        """Undo `lift`."""
        return _reshaped(delta, 1, saved.x.shape[1:])

    def derivatives(self, params: Params, saved: AffineSaved, y_bar: Array) -> LayerDerivatives:
        """Return input and output, without a pre-activation."""
        return super().derivatives(params, saved, y_bar)._replace(s=None)


def times(a: Array, b: Array | None) -> Array:
    """Return ``a ∘ b``, where ``None`` stands for one."""
    return a if b is None else a * b


def _transposed(x: Array) -> Array:
    """Transpose the last two axes; ``.T`` serves a single matrix, because a namespace costs as much as a product."""
    return x.T if x.ndim == 2 else array_api_compat.array_namespace(x).matrix_transpose(x)


def _rows(x: Array, w: Array) -> Array:
    """Return ``x w``, as one product for all rows if w is a single matrix."""
    if w.ndim > 2 or x.ndim == 2:
        return x @ w
    xp = array_api_compat.array_namespace(x)
    # A batched product would be one call of BLAS per leading index.
    return xp.reshape(xp.reshape(x, (-1, x.shape[-1])) @ w, (*x.shape[:-1], w.shape[-1]))


def _reshaped(x: Array, trailing: int, shape: Sequence[int]) -> Array:
    """Reshape the last `trailing` axes of `x`."""
    leading = x.shape[: x.ndim - trailing]
    return array_api_compat.array_namespace(x).reshape(x, (*leading, *shape))
