"""Layers that users define by functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import array_api_compat

from ddnref._core.arrays import Array
from ddnref.networks._protocol import LayerDerivatives, Params, Shape, add


class _Saved(NamedTuple):
    x: Array
    y: Array
    own: Any


class Layer:
    """A layer that its user defines by pure functions of its parameters.

    Samples must not depend on each other. All functions see arrays without extra axes: where several cotangents or
    tangents come at once, they are called once for each.

    Parameters
    ----------
    params : tuple of arrays
    forward : callable
        ``forward(params, x) -> (y, saved)``, with anything that the others need in `saved`.
    vjp : callable
        ``vjp(params, saved, y_bar) -> (params_bar, x_bar)``, with a tuple for the parameters.
    jvp : callable
        ``jvp(params, saved, params_dot, x_dot) -> y_dot``.
    second_order : callable, optional
        ``second_order(params, saved, y_bar, params_dot, x_dot) -> (params_bar_dot, x_bar_dot)``: the derivative of
        what `vjp` returns along ``(params_dot, x_dot)``, `y_bar` fixed. Needed by `Chain.hvp` alone.
    output_shape : callable, optional
        From the shape of one sample's input, a tuple, to that of its output, so that layers which do not fit are
        named; ``ValueError`` for a shape that it does not take.

    Examples
    --------
    A scale that is learned:

    >>> import numpy as np
    >>> scale = ddnref.networks.Layer(
    ...     (np.asarray([2.0]),),
    ...     forward=lambda p, x: (p[0] * x, x),
    ...     vjp=lambda p, x, y_bar: ((np.sum(y_bar * x, axis=0),), p[0] * y_bar),
    ...     jvp=lambda p, x, p_dot, x_dot: p_dot[0] * x + p[0] * x_dot,
    ...     second_order=lambda p, x, y_bar, p_dot, x_dot: ((np.sum(y_bar * x_dot, axis=0),), p_dot[0] * y_bar),
    ... )
    >>> chain = ddnref.networks.Chain([scale], "mse")
    >>> chain.hvp(np.asarray([[3.0]]), np.asarray([[0.0]]), [np.asarray([1.0])])
    [array([18.])]
    """

    def __init__(
        self,
        params: Sequence[Array],
        *,
        forward: Callable[..., tuple[Array, Any]],
        vjp: Callable[..., tuple[Sequence[Array], Array]],
        jvp: Callable[..., Array],
        second_order: Callable[..., tuple[Sequence[Array], Array]] | None = None,
        output_shape: Callable[[Shape], Shape] | None = None,
    ) -> None:
        self._params = tuple(params)
        self._forward, self._vjp, self._jvp = forward, vjp, jvp
        self._second_order, self._output_shape = second_order, output_shape

    @property
    def params(self) -> Params:
        """The arrays that were given."""
        return self._params

    def with_params(self, params: Params) -> Self:
        """Return a layer with the same functions and other arrays."""
        return type(self)(
            params, forward=self._forward, vjp=self._vjp, jvp=self._jvp, second_order=self._second_order,
            output_shape=self._output_shape,
        )  # fmt: skip

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return the output shape that the user states, or ``None``."""
        return None if self._output_shape is None or shape is None else tuple(self._output_shape(shape))

    def forward(self, params: Params, x: Array, order: int = 2) -> tuple[Array, _Saved]:
        """Call the user's forward."""
        y, own = self._forward(params, x)
        return y, _Saved(x, y, own)

    def vjp(
        self, params: Params, saved: _Saved, y_bar: Array, *, wrt: str = "both", per_sample: bool = False
    ) -> tuple[Params | None, Array | None]:
        """Call the user's VJP once for each leading index of the cotangent, or for each sample."""
        # User functions see no extra axes.
        if y_bar.ndim > saved.y.ndim:
            each = (y_bar[i, ...] for i in range(y_bar.shape[0]))
            parts = [self.vjp(params, saved, bar, wrt=wrt, per_sample=per_sample) for bar in each]
            return _stacked(parts)  # type: ignore[no-any-return]
        if per_sample:
            return self._per_sample(params, saved, y_bar, wrt)
        bars, x_bar = self._vjp(params, saved.own, y_bar)
        return None if wrt == "x" else tuple(bars), None if wrt == "params" else x_bar

    def _per_sample(self, params: Params, saved: _Saved, y_bar: Array, wrt: str) -> tuple[Params, Array | None]:
        # The cotangent of a single sample needs what forward saves for that sample alone.
        parts = []
        for n in range(y_bar.shape[0]):
            own = self._forward(params, saved.x[n : n + 1, ...])[1]
            parts.append(self._vjp(params, own, y_bar[n : n + 1, ...]))
        bars = _stacked([part[0] for part in parts])
        if wrt == "params":
            return bars, None
        return bars, array_api_compat.array_namespace(y_bar).concat([part[1] for part in parts], axis=0)

    def forward_dot(
        self, params: Params, saved: _Saved, params_dot: Params | None, x_dot: Array | None
    ) -> tuple[Array | None, tuple[Params, Array] | None]:
        """Call the user's JVP, with zeros for a missing tangent."""
        if params_dot is None and x_dot is None:
            return None, None
        # Both tangents get the same leading axes, over which the user's function is called one by one.
        dots = self._tangents(params, saved, params_dot, x_dot)
        return _each(partial(self._jvp, params, saved.own), dots, saved.x.ndim), dots

    def _tangents(
        self, params: Params, saved: _Saved, params_dot: Params | None, x_dot: Array | None
    ) -> tuple[Params, Array]:
        """Broadcast both tangents to the same leading axes."""
        xp = array_api_compat.array_namespace(saved.x)
        # Leading axes come from whichever tangent is present; the missing one is zero.
        if params_dot is not None and params:
            lead = params_dot[0].shape[: params_dot[0].ndim - params[0].ndim]
        else:
            lead = () if x_dot is None else x_dot.shape[: x_dot.ndim - saved.x.ndim]
        given = tuple(xp.zeros_like(p) for p in params) if params_dot is None else params_dot
        theta = tuple(xp.broadcast_to(d, (*lead, *p.shape)) for d, p in zip(given, params, strict=True))
        return theta, xp.broadcast_to(xp.zeros_like(saved.x) if x_dot is None else x_dot, (*lead, *saved.x.shape))

    def vjp_dot(
        self, params: Params, saved: _Saved, y_bar: Array, params_dot: Params | None, saved_dot: Any,
        y_bar_dot: Array | None, *, wrt: str = "both",
    ) -> tuple[Params, Array | None, Array | None]:  # fmt: skip
        """Return the VJP of the cotangent's tangent, plus `second_order` of the cotangent."""
        # d(Jᵀ ȳ) = (dJ)ᵀ ȳ + Jᵀ dȳ: the user's second_order, and the VJP of dȳ.
        x_bar = self._vjp(params, saved.own, y_bar)[1]
        bars, x_bar_dot = None, None
        if saved_dot is not None:
            if self._second_order is None:
                raise ValueError("A Layer without second_order has no Hessian-vector product: pass it, or use ggnvp.")
            bars, x_bar_dot = _each(partial(self._second_order, params, saved.own, y_bar), saved_dot, saved.x.ndim)
        # Either term may be zero.
        if y_bar_dot is not None:
            moved, x_moved = self.vjp(params, saved, y_bar_dot)
            bars = moved if bars is None else tuple(a + b for a, b in zip(bars, moved or (), strict=True))
            x_bar_dot = add(x_bar_dot, x_moved)
        return tuple(bars or ()), x_bar_dot, x_bar

    def derivatives(self, params: Params, saved: _Saved, y_bar: Array) -> LayerDerivatives:
        """Return input and output."""
        return LayerDerivatives(saved.x, None, saved.y, y_bar)


def _each(function: Callable[..., Any], dots: tuple[Params, Array], ndim: int) -> Any:
    """Call a function of tangents, once for each leading index where x_dot has more than `ndim` axes."""
    params_dot, x_dot = dots
    if x_dot.ndim == ndim:
        return function(params_dot, x_dot)
    return _stacked([function(tuple(d[i, ...] for d in params_dot), x_dot[i, ...]) for i in range(x_dot.shape[0])])


def _stacked(parts: list[Any]) -> Any:
    """Stack results along a new first axis: arrays, tuples of results entry by entry, and ``None`` as it is."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], (tuple, list)):
        return tuple(_stacked(list(column)) for column in zip(*parts, strict=True))
    return array_api_compat.array_namespace(parts[0]).stack(parts, axis=0)
