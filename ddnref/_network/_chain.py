"""Chains of layers under a loss: gradient, Hessian-vector and Gauss–Newton-vector products, all written out.

With the outputs ``y(θ)``, ``J = ∂y/∂θ`` and the loss ``Σ_n ℓ(y_n)`` (times 1/N for the mean):

    gradient   g   = Jᵀ ∇ℓ                          one pass forward, one backward
    GGN        G v = Jᵀ ∇²ℓ J v                     the tangent ẏ = J v forward, one pass backward
    Hessian    H v = Jᵀ ∇²ℓ J v + (dJ/dθ · v)ᵀ ∇ℓ   the same, and the tangent of every step of the backward pass
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import array_api_compat

from ddnref._array import (
    Array,
    check_dtypes,
    check_real,
    check_shapes,
    is_true,
    namespace,
    nan_where,
)
from ddnref._network import _construct, _losses, _sweeps
from ddnref._network._activations import Activation
from ddnref._network._losses import Loss
from ddnref._network._sweeps import AnyLayer, LayerDerivatives, Params


class Chain:
    """TODO."""

    def __init__(self, layers: Sequence[AnyLayer], loss: str | Loss, reduction: str = "mean") -> None:
        self.layers = tuple(layers)
        self.criterion = _losses.resolve(loss, reduction)
        self.reduction = reduction
        self.params = [array for layer in self.layers for array in layer.params]
        if not self.params:
            raise ValueError("layers hold no parameters: there is nothing to differentiate.")
        names = {f"params[{i}]": array for i, array in enumerate(self.params)}
        namespace(**names)
        check_real(**names)
        check_dtypes(**{name: (array, self.params[0].dtype) for name, array in names.items()})
        _sweeps.output_shape(self.layers, None)

    def with_params(self, params: Sequence[Array]) -> Self:
        """The same chain with other arrays, shaped like `params`; those of the old one are left alone."""
        params = list(params)
        _check_list("params", params, self.params)
        parts = self.split(params)
        layers = [layer.with_params(theta) for layer, theta in zip(self.layers, parts, strict=True)]
        return type(self)(layers, self.criterion, self.reduction)

    def split(self, params: Sequence[Array]) -> list[Params]:
        """A list like `params` as one tuple for each layer."""
        return _sweeps.split(self.layers, params)

    def scale(self, n: int) -> float:
        """What the sum over n samples is multiplied by: 1/n for the mean, 1 for the sum."""
        return 1 / n if self.reduction == "mean" else 1.0

    # --- values ---------------------------------------------------------------------------------------------------

    def forward(self, x: Array, order: int = 2) -> tuple[Array, list[Any]]:
        """Outputs, and what derivatives up to `order` need of each layer."""
        self._check_input(x)
        return _sweeps.forward(self.layers, self.split(self.params), x, order)

    def output(self, x: Array) -> Array:
        """Outputs ``(N, C)`` of the last layer."""
        return self.forward(x, 0)[0]

    def loss(self, x: Array, t: Array, *, throw: bool = True) -> Array:
        """The loss, an array without axes."""
        y = self.output(x)
        bad = self._check_targets(y, t, throw)
        xp = array_api_compat.array_namespace(y)
        return self.scale(y.shape[0]) * xp.sum(_marked(self.criterion.value(y, t), bad))

    # --- first order ----------------------------------------------------------------------------------------------

    def gradient(self, x: Array, t: Array, *, throw: bool = True) -> list[Array]:
        """The gradient of the loss, a list like `params`."""
        return self._gradient(x, t, throw)[1]

    def loss_and_gradient(self, x: Array, t: Array, *, throw: bool = True) -> tuple[Array, list[Array]]:
        """Both from one pass."""
        (y, bad), gradient = self._gradient(x, t, throw)
        xp = array_api_compat.array_namespace(y)
        return self.scale(y.shape[0]) * xp.sum(_marked(self.criterion.value(y, t), bad)), gradient

    def _gradient(self, x: Array, t: Array, throw: bool) -> tuple[tuple[Array, Array | None], list[Array]]:
        y, saved, y_bar, bad = self._reverse(x, t, 1, throw)
        bars, _ = _sweeps.vjp(self.layers, self.split(self.params), saved, y_bar, wrt="params")
        return (y, bad), _sweeps.joined(bars)

    def per_sample_gradients(self, x: Array, t: Array, *, throw: bool = True) -> list[Array]:
        """The gradients of the samples' losses ``(N, *shape)``; `gradient` is their mean or sum."""
        y, saved, y_bar, _ = self._reverse(x, t, 1, throw)
        y_bar = y_bar / self.scale(y.shape[0])
        parts = self.split(self.params)
        return _sweeps.joined(_sweeps.vjp(self.layers, parts, saved, y_bar, wrt="params", per_sample=True)[0])

    def layer_derivatives(self, x: Array, t: Array, *, throw: bool = True) -> tuple[LayerDerivatives, ...]:
        """One record for each layer: input, pre-activation, output, and the loss's derivative by the output."""
        _, saved, y_bar, _ = self._reverse(x, t, 0, throw)
        return _sweeps.derivatives(self.layers, self.split(self.params), saved, y_bar)

    # --- second order ---------------------------------------------------------------------------------------------

    def hvp(self, x: Array, t: Array, v: Sequence[Array], *, throw: bool = True) -> list[Array]:
        """``H v``."""
        v = self._check_vector(v)
        y, saved, y_bar, bad = self._reverse(x, t, 2, throw)
        parts, v_parts = self.split(self.params), self.split(v)
        y_dot, saved_dot = _sweeps.forward_dot(self.layers, parts, saved, v_parts)
        y_bar_dot = self._curved(y, t, y_dot, bad)
        dots = _sweeps.vjp_dot(self.layers, parts, saved, y_bar, v_parts, saved_dot, y_bar_dot, wrt="params")
        return _sweeps.joined(dots[0])

    def ggnvp(self, x: Array, t: Array, v: Sequence[Array], *, throw: bool = True) -> list[Array]:
        """``G v``."""
        v = self._check_vector(v)
        y, saved = self.forward(x, 1)
        bad = self._check_targets(y, t, throw)
        parts = self.split(self.params)
        y_dot, _ = _sweeps.forward_dot(self.layers, parts, saved, self.split(v))
        bars, _ = _sweeps.vjp(self.layers, parts, saved, self._curved(y, t, y_dot, bad), wrt="params")
        return _sweeps.joined(bars)

    def _reverse(self, x: Array, t: Array, order: int, throw: bool) -> tuple[Array, list[Any], Array, Array | None]:
        """Outputs, what was saved, the loss's derivative by the outputs, and which samples have bad targets."""
        y, saved = self.forward(x, order)
        bad = self._check_targets(y, t, throw)
        return y, saved, self.scale(y.shape[0]) * _marked(self.criterion.gradient(y, t), bad), bad

    def _curved(self, y: Array, t: Array, y_dot: Array | None, bad: Array | None) -> Array:
        """``∇²ℓ ẏ`` with the factor of the mean."""
        product = _losses.hessian_product(self.criterion, y, t, y_dot)
        return self.scale(y.shape[0]) * _marked(product, bad)

    # --- checks ---------------------------------------------------------------------------------------------------

    def _check_input(self, x: Array) -> None:
        namespace(x=x, params=self.params[0])
        check_dtypes(x=(x, self.params[0].dtype))
        if x.ndim < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, features): one row for each sample.")
        _sweeps.output_shape(self.layers, tuple(x.shape[1:]))

    def _check_targets(self, y: Array, t: Array, throw: bool) -> Array | None:
        if y.ndim != 2:
            raise ValueError(f"The last layer gives shape {tuple(y.shape)}; a loss takes (N, C): end with a Dense.")
        if y.shape[0] == 0 and self.reduction == "mean":
            raise ValueError('x holds no samples: the mean over none is not defined. Pass reduction="sum" for zero.')
        array_api_compat.array_namespace(y, t)
        if self.criterion.check is not None:
            self.criterion.check(y, t)
        if self.criterion.valid is None:
            return None
        bad = ~self.criterion.valid(y, t)
        if not throw:
            return bad
        if is_true(array_api_compat.array_namespace(bad).any(bad)):
            raise ValueError(
                f"t is out of range in at least one sample: class indices lie in [0, {y.shape[-1]}), weights of "
                "classes are not negative, binary targets lie in [0, 1], and none is NaN. Likely labels that count "
                "from one, or a padding value. Pass throw=False to get NaN for these samples."
            )
        return None

    def _check_vector(self, v: Sequence[Array]) -> list[Array]:
        v = list(v)
        _check_list("v", v, self.params, leading=True)
        return v

    @classmethod
    def mlp(
        cls,
        inputs: int,
        hidden: int,
        outputs: int,
        layers: int,
        *,
        activation: str | Activation = "tanh",
        loss: str | Loss = "cross_entropy",
        reduction: str = "mean",
        bias: bool = True,
        gain: float = 1.0,
        seed: int = 0,
        like: Array | None = None,
    ) -> Self:
        """A chain of dense layers with normal weights."""
        dense = _construct.mlp(inputs, hidden, outputs, layers, activation, bias, gain, seed, like)
        return cls(dense, loss, reduction)

    @classmethod
    def from_arrays(
        cls,
        arrays: Sequence[Array],
        *,
        activation: str | Activation = "tanh",
        loss: str | Loss = "cross_entropy",
        reduction: str = "mean",
    ) -> Self:
        """A chain of dense layers from ``[W1, b1, W2, …]``."""
        return cls(_construct.from_arrays(arrays, activation), loss, reduction)


def _marked(x: Array, bad: Array | None) -> Array:
    """`x`, whose sample axis is the first or that before the last, NaN in bad samples."""
    if bad is None:
        return x
    return nan_where(bad if x.ndim == 1 else bad[:, None], x)


def _check_list(name: str, given: Sequence[Array], like: Sequence[Array], leading: bool = False) -> None:
    """Static facts of a list of arrays like the parameters, with or without one leading axis on every entry."""
    if len(given) != len(like):
        raise ValueError(f"{name} has {len(given)} arrays, expected {len(like)}, one for each of the chain's params.")
    lead: tuple[int, ...] = ()
    if leading and given and getattr(given[0], "ndim", 0) == like[0].ndim + 1:
        lead = (given[0].shape[0],)
    for i, (array, p) in enumerate(zip(given, like, strict=True)):
        label = f"{name}[{i}]"
        namespace(**{label: array, "params": p})
        check_dtypes(**{label: (array, p.dtype)})
        check_shapes(**{label: (array, (*lead, *p.shape))})
