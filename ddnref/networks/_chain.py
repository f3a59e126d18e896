"""Chains of layers under a loss, with gradients, Hessian-vector and Gauss–Newton-vector products written out.

With the outputs ``y(θ)``, ``J = ∂y/∂θ`` and the loss ``Σ_n ℓ(y_n)`` (times 1/N for the mean):

    gradient   g   = Jᵀ ∇ℓ                          one pass forward, one backward
    GGN        G v = Jᵀ ∇²ℓ J v                     the tangent ẏ = J v forward, one pass backward
    Hessian    H v = Jᵀ ∇²ℓ J v + (dJ/dθ · v)ᵀ ∇ℓ   the same, and the tangent of every step of the backward pass
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any, Self

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, namespace
from ddnref._core.checks import check_dtypes, check_real
from ddnref._kernels.public import guarded, public
from ddnref.networks import _checks, _from_torch, _losses, _operators, _protocol, _smoothing
from ddnref.networks._activations import Activation
from ddnref.networks._blocks import Frozen, Residual
from ddnref.networks._layers import Dense
from ddnref.networks._losses import Loss
from ddnref.networks._protocol import AnyLayer, LayerDerivatives, Params
from ddnref.operators import LinearOperator


class Chain:
    r"""Layers under a loss, with all its derivatives written out.

    Its methods take N samples ``x (N, ...)`` in the dtype of the parameters, where N may be zero, and targets t,
    ``(N,)`` or ``(N, C)``, as the loss takes them. Targets out of range raise, for which one flag is read. With
    ``throw=False`` nothing is read, as ``jax.jit`` needs it, and such a sample is NaN. Gradients and vectors v are
    lists of arrays like `params`. For k vectors every array has one more axis of length k in front, and so has every
    array of their products.

    Parameters
    ----------
    layers : sequence of layers
        `Dense`, `Conv2d`, `Flatten`, `Residual`, `Frozen`, `Layer`; the last gives ``(N, C)``.
    loss : str or Loss
        ``"cross_entropy"`` of class indices ``(N,)`` or of weights ``(N, C)``, ``"mse"`` or ``"bce"`` (of logits) of
        targets ``(N, C)``, or functions of your own.
    reduction : {"mean", "sum"}
        Over the samples, and for ``"mse"`` and ``"bce"`` over the C outputs too, as in PyTorch.

    Attributes
    ----------
    layers : tuple of layers
    criterion : Loss
        The loss of one sample, with the factor of the reduction over its outputs.
    reduction : str
    params : list of arrays
        Those of all layers, ``[W1, b1, W2, …]``.

    Raises
    ------
    TypeError, ValueError
        Parameters of several libraries, devices or dtypes, or that PyTorch records; none at all; layers that do not
        fit the one before them; unknown names. Its methods: inputs and vectors that do not fit, no samples under the
        mean, and targets of the wrong shape, dtype or range.

    Notes
    -----
    With the outputs y, :math:`J = \partial y / \partial \theta`, and the loss :math:`\sum_n \ell(y_n)`,

    .. math:: g = J^T \nabla\ell, \qquad G v = J^T \nabla^2\ell\, J v, \qquad
              H v = G v + \left(\tfrac{d}{d\tau} J(\theta + \tau v)\right)^T \nabla\ell .

    Nothing is recorded or cached: each call runs forward. Counted in products with the weights, the loss of a
    deep network costs 1 per layer, the gradient 3, `ggnvp` 5 and `hvp` 9; several vectors share the first pass. Each
    layer keeps its input, pre-activation, and one or two derivatives of the activation in memory.

    A sample that is NaN leaves the outputs and the per-sample gradients of the others alone. A kink counts as smooth:
    the second derivative of ``"relu"`` is zero.

    References
    ----------
    .. [1] B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
    .. [2] N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
       Computation 14 (2002).

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain([ddnref.networks.Dense(np.asarray([[1.0, 2.0]]))], "mse")
    >>> x, t = np.asarray([[1.0, 0.0], [1.0, 1.0]]), np.asarray([[1.0], [1.0]])
    >>> chain.gradient(x, t)
    [array([[2., 2.]])]
    """

    def __init__(self, layers: Sequence[AnyLayer], loss: str | Loss, reduction: str = "mean") -> None:
        self._source: _from_torch.Source | None = None
        self._set(layers, loss, reduction)

    def _set(self, layers: Sequence[AnyLayer], loss: str | Loss, reduction: str) -> None:
        # Every array must come from one library, device and dtype, constants of frozen layers included.
        layers, criterion = tuple(layers), _losses.resolve(loss, reduction)
        parts = [layer.params for layer in layers]
        names = {f"params[{i}]": array for i, array in enumerate(_protocol.joined(parts))}
        if not names:
            raise ValueError("layers hold no parameters: there is nothing to differentiate.")
        constants = [array for layer in layers for array in getattr(layer, "constants", ())]
        names |= {f"constants[{i}]": array for i, array in enumerate(constants)}
        namespace(**names)
        check_real(**names)
        check_dtypes(**{name: (array, names["params[0]"].dtype) for name, array in names.items()})
        _checks.refuse_recorded(names)
        # Shapes that are known without an input must fit from layer to layer.
        _protocol.output_shape(layers, None)
        self._layers, self._parts, self._criterion, self._reduction = layers, parts, criterion, reduction

    def __repr__(self) -> str:
        # Equal neighbours are counted, so that a deep chain has a short line.
        runs = ((text, len(list(equal))) for text, equal in groupby(map(_described, self.layers)))
        layers = ", ".join(text if n == 1 else f"{n} × {text}" for text, n in runs)
        total = sum(math.prod(p.shape) for p in self.params)
        loss = f"{self.reduction} of {_losses.name_of(self.criterion)}"
        return f"Chain({layers}; {loss}; {total} parameters, {self.params[0].dtype})"

    def __reduce__(self) -> Any:
        # A chain that follows modules is made of them again, because the identities that it compares are other ones.
        if self._source is not None:
            return _from_modules, (type(self), *self._source.given)
        return type(self), (self._layers, self._criterion, self._reduction)

    def _follow(self) -> None:
        """Read the modules again that this chain was made from, if they were changed other than in place."""
        if self._source is not None and self._source.changed():
            source = _from_torch.Source(*self._source.given)
            self._set(*source.read())
            self._source = source  # only now: what cannot be read raises on every call

    @property
    def layers(self) -> tuple[AnyLayer, ...]:
        """The layers, first to last."""
        self._follow()
        return self._layers

    @property
    def criterion(self) -> Loss:
        """The loss of one sample, with the factor of the reduction over its outputs."""
        self._follow()
        return self._criterion

    @property
    def reduction(self) -> str:
        """The reduction over the samples, ``"mean"`` or ``"sum"``."""
        self._follow()
        return self._reduction

    @property
    def params(self) -> list[Array]:
        """The arrays of all layers, as a new list on each call."""
        self._follow()
        return _protocol.joined(self._parts)

    def with_params(self, params: Sequence[Array]) -> Self:
        """Return a new chain with other arrays like `params`, which may be traced under ``jax.jit``."""
        params = list(params)
        _checks.like_params("params", params, self.params)
        # A new chain checks again that all arrays are of one library.
        parts = _protocol.split(self._layers, params)
        layers = [layer.with_params(p) for layer, p in zip(self._layers, parts, strict=True)]
        return type(self)(layers, self._criterion, self._reduction)

    def smoothed(self, width: float | Sequence[float], x: Array | None = None) -> Self:
        r"""Return a chain of the same arrays whose kinks count as curvature, as `networks.smoothed` says.

        Outputs, loss and gradient are the same; `hvp` and everything made of it, a factored Hessian too, see the kinks
        that a step may cross. Make it anew for each step.

        Parameters
        ----------
        width : float, or a sequence of one for each layer whose activation has kinks
            Of the bump that takes the place of a kink.
        x : (N, ...) array, optional
            Samples: widths are then relative to the root mean square of the layer's pre-activations on these, which is
            read on the host. ``chain.smoothed(0.2, x)`` trained well on the page of trust regions.

        Raises
        ------
        ValueError
            No activation has kinks; as many widths as layers with kinks are expected, positive and finite.

        Examples
        --------
        >>> import numpy as np
        >>> chain = ddnref.networks.Chain.mlp(3, 4, 2, 3, activation="relu")
        >>> x, t = np.ones((1, 3)), np.asarray([1])
        >>> smooth = chain.smoothed(0.2, x)
        >>> bool(smooth.loss(x, t) == chain.loss(x, t)), [type(layer.activation).__name__ for layer in smooth.layers]
        (True, ['Activation', 'Activation', 'str'])
        """
        kinked = _smoothing.kinked(self.layers)
        widths = [float(width)] * len(kinked) if isinstance(width, (int, float)) else [float(w) for w in width]
        if not kinked or len(widths) != len(kinked):
            raise ValueError(
                f"width has {len(widths)} entries for {len(kinked)} layers whose activation has kinks; expected one "
                'number, or one for each. Kinks are those of "relu", "leaky_relu" and of Activation(..., kinks=).'
            )
        if x is not None:
            sizes = _smoothing.sizes(self.layers, self.forward(x, 1)[1])
            widths = [w * size for w, size in zip(widths, sizes, strict=True)]
        return type(self)(_smoothing.replaced(self.layers, iter(widths)), self.criterion, self.reduction)

    def split(self, params: Sequence[Array]) -> list[Params]:
        """Split a list like `params` into one tuple for each layer."""
        return _protocol.split(self.layers, params)

    def scale(self, n: int | Array) -> Any:
        """Return the factor of the sum over the samples: 1/n for the mean, with n their number, or 1 for the sum.

        Where the loss has a `Loss.sample_weight`, n is the sum of these weights.
        """
        return 1 / n if self.reduction == "mean" else 1.0

    def _scale(self, y: Array, t: Array) -> Any:
        return 1 / _losses.count(self._criterion, y, t) if self._reduction == "mean" else 1.0

    # --- values ---------------------------------------------------------------------------------------------------

    @guarded
    def forward(self, x: Array, order: int = 2) -> tuple[Array, list[Any]]:
        """Return outputs ``(N, C)``, and what each layer saves for derivatives up to `order` (0, 1 or 2)."""
        self._follow()
        _checks.inputs(self._layers, x, next(part[0] for part in self._parts if part))
        return _protocol.forward(self._layers, self._parts, x, order)

    @public
    def output(self, x: Array) -> Array:
        """Return the outputs ``(N, C)`` of the last layer."""
        return self.forward(x, 0)[0]

    @public
    def loss(self, x: Array, t: Array, *, throw: bool = True) -> Array:
        """Return the loss, an array ``()``."""
        y = self.output(x)
        # Targets are checked against the outputs, which show the number of classes.
        return self._loss(y, t, _checks.bad_targets(self._criterion, self._reduction, y, t, throw))

    def _loss(self, y: Array, t: Array, bad: Array | None) -> Array:
        xp = array_api_compat.array_namespace(y)
        return self._scale(y, t) * xp.sum(_checks.marked(self._criterion.value(y, t), bad))

    # --- first order ----------------------------------------------------------------------------------------------

    @public
    def gradient(self, x: Array, t: Array, *, throw: bool = True) -> list[Array]:
        """Return the gradient of the loss with respect to `params`."""
        return self._gradient(x, t, throw)[1]

    @public
    def loss_and_gradient(self, x: Array, t: Array, *, throw: bool = True) -> tuple[Array, list[Array]]:
        """Return the loss and its gradient from one pass."""
        (y, bad), gradient = self._gradient(x, t, throw)
        return self._loss(y, t, bad), gradient

    def _gradient(self, x: Array, t: Array, throw: bool) -> tuple[tuple[Array, Array | None], list[Array]]:
        y, saved, y_bar, bad = self._reverse(x, t, 1, throw)
        bars, _ = _protocol.vjp(self._layers, self._parts, saved, y_bar, wrt="params")
        return (y, bad), _protocol.joined(bars)

    @public
    def per_sample_gradients(self, x: Array, t: Array, *, throw: bool = True) -> list[Array]:
        """Return the gradient of each sample's own loss, as arrays ``(N, *shape)``; `gradient` is their mean or sum.

        With a `Loss.sample_weight` their sum is divided by that of the weights.
        """
        # The loss of one sample carries no factor of the mean.
        _, saved, y_bar, _ = self._reverse(x, t, 1, throw, scaled=False)
        return _protocol.joined(
            _protocol.vjp(self._layers, self._parts, saved, y_bar, wrt="params", per_sample=True)[0]
        )

    @public
    def layer_derivatives(self, x: Array, t: Array, *, throw: bool = True) -> tuple[LayerDerivatives, ...]:
        """Return a record for each layer, with arrays ``(N, ...)``.

        Its fields are `z_in`, the input; `s`, the pre-activation, or ``None``; `z_out`, the output; `b`, the derivative
        of the loss with respect to that; and `inner`, the records inside a `Residual`.
        """
        _, saved, y_bar, _ = self._reverse(x, t, 1, throw)
        return _protocol.derivatives(self._layers, self._parts, saved, y_bar)

    # --- second order ---------------------------------------------------------------------------------------------

    @public
    def hvp(self, x: Array, t: Array, v: Sequence[Array], *, throw: bool = True) -> list[Array]:
        """Multiply the Hessian of the loss with one or several vectors."""
        v = list(v)
        _checks.like_params("v", v, self.params, leading=True)
        return self.products(x, t, "hessian", throw)(v)

    def products(self, x: Array, t: Array, curvature: str, throw: bool) -> Callable[[list[Array]], list[Array]]:
        """Return the product with "hessian" or "ggn", of lists that are not checked; all share one pass forward."""
        return (self._hessian_products if curvature == "hessian" else self._ggn_products)(x, t, throw)

    def _hessian_products(self, x: Array, t: Array, throw: bool) -> Callable[[list[Array]], list[Array]]:
        """Return ``v -> H v``; the pass that does not depend on v is made once."""
        y, saved, y_bar, bad = self._reverse(x, t, 2, throw)
        parts, layers = self._parts, self._layers

        def product(v: list[Array]) -> list[Array]:
            # Tangent forward: ẏ = J v.
            v_parts = _protocol.split(layers, v)
            y_dot, saved_dot = _protocol.forward_dot(layers, parts, saved, v_parts)
            # Tangent of the outputs' cotangent: ∇²ℓ ẏ.
            y_bar_dot = self._curved(y, t, y_dot, bad)
            # Tangent of the backward pass: d(Jᵀ ∇ℓ) along v.
            dots = _protocol.vjp_dot(layers, parts, saved, y_bar, v_parts, saved_dot, y_bar_dot, wrt="params")
            return _protocol.joined(dots[0])

        return product

    @public
    def ggnvp(self, x: Array, t: Array, v: Sequence[Array], *, throw: bool = True) -> list[Array]:
        """Multiply the generalised Gauss–Newton matrix with one or several vectors."""
        v = list(v)
        _checks.like_params("v", v, self.params, leading=True)
        return self.products(x, t, "ggn", throw)(v)

    def _ggn_products(self, x: Array, t: Array, throw: bool) -> Callable[[list[Array]], list[Array]]:
        """Return ``v -> G v``; the pass that does not depend on v is made once."""
        y, saved = self.forward(x, 1)
        bad = _checks.bad_targets(self._criterion, self._reduction, y, t, throw)
        parts, layers = self._parts, self._layers

        def product(v: list[Array]) -> list[Array]:
            # G v = Jᵀ ∇²ℓ J v: tangent forward, Hessian of the loss, backward.
            y_dot, _ = _protocol.forward_dot(layers, parts, saved, _protocol.split(layers, v))
            bars, _ = _protocol.vjp(layers, parts, saved, self._curved(y, t, y_dot, bad), wrt="params")
            return _protocol.joined(bars)

        return product

    def hessian_operator(self, x: Array, t: Array, *, throw: bool = True) -> LinearOperator:
        """Return the Hessian of the loss as a self-adjoint operator on vectors ``(..., p)`` of all p parameters.

        A vector holds the arrays of `params` one after the other, each in C order, as `flatten` joins them. The
        operator's ``params`` are those of the chain, and it follows them when they change in place. A solver makes the
        pass through the network that all products share once (`LinearOperator.prepared`). There is no gradient with
        respect to the parameters, because it would take third derivatives of the network. Targets out of range raise
        here, or make products NaN with ``throw=False``.

        Examples
        --------
        >>> import numpy as np
        >>> chain = ddnref.networks.Chain.mlp(3, 4, 2, 2)
        >>> x, t = np.ones((5, 3)), np.asarray([0, 1, 0, 1, 1])
        >>> h = chain.hessian_operator(x, t)
        >>> (w, _), _ = ddnref.eigsh(h, 1)
        >>> h.shape, w.shape
        ((26, 26), (1,))
        """
        return _operators.curvature(self, x, t, "hessian", throw)

    def ggn_operator(self, x: Array, t: Array, *, throw: bool = True) -> LinearOperator:
        """Return the generalised Gauss–Newton matrix as an operator, like `hessian_operator`."""
        return _operators.curvature(self, x, t, "ggn", throw)

    def flatten(self, v: Sequence[Array]) -> Array:
        """Join a list like `params`, or k of them with one leading axis, to vectors ``(p,)`` or ``(k, p)``."""
        v = list(v)
        _checks.like_params("v", v, self.params, leading=True)
        lead = (v[0].shape[0],) if v[0].ndim > self.params[0].ndim else ()
        xp = array_api_compat.array_namespace(v[0])
        return xp.concat([xp.reshape(entry, (*lead, -1)) for entry in v], axis=-1)

    def unflatten(self, vectors: Array) -> list[Array]:
        """Split vectors ``(p,)`` or ``(k, p)`` into a list like `params`: the inverse of `flatten`."""
        return _operators.lists(vectors, self.params)

    def _reverse(
        self, x: Array, t: Array, order: int, throw: bool, scaled: bool = True
    ) -> tuple[Array, list[Any], Array, Array | None]:
        """Return outputs, saved values, the cotangent of the outputs, and which samples have bad targets."""
        y, saved = self.forward(x, order)
        bad = _checks.bad_targets(self._criterion, self._reduction, y, t, throw)
        y_bar = _checks.marked(self._criterion.gradient(y, t), bad)
        return y, saved, self._scale(y, t) * y_bar if scaled else y_bar, bad

    def _curved(self, y: Array, t: Array, y_dot: Array | None, bad: Array | None) -> Array:
        """Return ``∇²ℓ ẏ`` with the factor of the reduction."""
        product = _losses.hessian_product(self._criterion, y, t, y_dot)
        return self._scale(y, t) * _checks.marked(product, bad)

    # --- other ways to make one -----------------------------------------------------------------------------------

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
        """Make a chain of dense layers with random weights.

        Parameters
        ----------
        inputs, hidden, outputs : int
            Widths of the input, of every hidden layer and of the output.
        layers : int
            How many weight matrices; one is a linear model.
        activation : str or Activation
            The activation of all layers but the last, which has none.
        bias : bool
            Whether layers have biases, zero at first.
        gain : float
            Weights are drawn from the normal distribution of standard deviation ``gain / sqrt(a_in)``: with a gain of
            one the signals of a deep linear network keep their size, for ``"relu"`` with ``sqrt(2)``.
        seed : int
            The same for every library: drawn by NumPy in float64, weight by weight.
        like : array, optional
            Its library, dtype and device; default NumPy's float64.

        Examples
        --------
        >>> chain = ddnref.networks.Chain.mlp(7, 5, 3, 3, activation="relu", loss="mse")
        >>> [p.shape for p in chain.params]
        [(5, 7), (5,), (5, 5), (5,), (3, 5), (3,)]
        """
        for name, value in {"inputs": inputs, "hidden": hidden, "outputs": outputs, "layers": layers}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1.")
        like = np.zeros(()) if like is None else like
        xp, device = array_api_compat.array_namespace(like), array_api_compat.device(like)
        # NumPy draws the weights, so that a seed means the same for every library.
        rng = np.random.default_rng(seed)
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        arrays = []
        for a_in, a_out in pairwise(widths):
            weight = gain / math.sqrt(a_in) * rng.standard_normal((a_out, a_in))
            arrays.append(xp.asarray(weight, dtype=like.dtype, device=device))
            if bias:
                arrays.append(xp.zeros((a_out,), dtype=like.dtype, device=device))
        return cls.from_arrays(arrays, activation=activation, loss=loss, reduction=reduction)

    @classmethod
    def from_arrays(
        cls,
        arrays: Sequence[Array],
        *,
        activation: str | Activation = "tanh",
        loss: str | Loss = "cross_entropy",
        reduction: str = "mean",
    ) -> Self:
        """Make a chain of dense layers from weights ``(a_out, a_in)``, each followed by its bias ``(a_out,)``, if any.

        The arrays are shared, not copied. All layers but the last have the activation.
        """
        # Group each weight with the bias that follows it, if any.
        pairs: list[list[Array | None]] = []
        for i, array in enumerate(arrays):
            if getattr(array, "ndim", None) == 2:
                pairs.append([array, None])
            elif getattr(array, "ndim", None) == 1 and pairs and pairs[-1][1] is None:
                pairs[-1][1] = array
            else:
                raise ValueError(
                    f"arrays[{i}] has shape {tuple(getattr(array, 'shape', ()))}; expected weights (a_out, a_in), each "
                    "followed by its bias (a_out,) or by none."
                )
        if not pairs:
            raise ValueError("arrays is empty: expected weights (a_out, a_in) and biases (a_out,).")
        # The last layer has no activation: the loss takes its outputs.
        kinds = [activation] * (len(pairs) - 1) + ["identity"]
        return cls([Dense(w, b, kind) for (w, b), kind in zip(pairs, kinds, strict=True)], loss, reduction)

    @classmethod
    def from_torch(cls, module: Any, *, loss: Any = "cross_entropy", reduction: str | None = None) -> Self:
        """Make a chain that shares its weights with a `torch.nn.Sequential`.

        Its `params` are the detached parameters that require grad, in the module's order: an optimiser's step in place
        is seen by both. Each use of the chain compares the module with what it was, and reads it again after any other
        change: ``load_state_dict(assign=True)``, a new parameter or layer, ``double()``, ``to(device)``, an option, a
        hook, `requires_grad`. The same holds for a loss module. A ``TypeError``, here or then, names a module that is
        not supported. `with_params` returns a chain that follows nothing.

        Parameters
        ----------
        module : torch.nn.Sequential
            Of Linear, Conv2d (zero padding, one group, no dilation), Flatten, Identity, ReLU, LeakyReLU, Tanh,
            Sigmoid, Softplus, GELU, SiLU, Dropout in evaluation mode, and Sequential of these. A Linear or Conv2d
            whose parameters do not require grad becomes `Frozen`.
        loss : str, Loss or module
            As in `Chain`, or a `torch.nn.CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss` with any of its options;
            `weight` and `pos_weight` of the last have one entry for each output.
        reduction : {"mean", "sum"}, optional
            Default: that of the loss module, or the mean.
        """
        source = _from_torch.Source(module, loss, reduction)
        chain = cls(*source.read())
        chain._source = source
        return chain


def _from_modules(cls: type[Chain], module: Any, loss: Any, reduction: str | None) -> Chain:
    return cls.from_torch(module, loss=loss, reduction=reduction)


def _described(layer: AnyLayer) -> str:
    """A layer in a few words: its type, the layers inside it, or the shapes of its arrays and its activation."""
    name = type(layer).__name__
    if isinstance(layer, Residual):
        return f"{name}({', '.join(map(_described, layer.layers))})"
    if isinstance(layer, Frozen):
        return f"{name}({_described(layer.layer)})"
    shapes = " ".join(str(tuple(p.shape)) for p in layer.params)
    activation = getattr(layer, "activation", "")
    activation = "" if activation == "identity" else activation if isinstance(activation, str) else "Activation"
    return " ".join(filter(None, (name, shapes, activation)))
