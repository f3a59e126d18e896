"""Chains of layers under a loss, with gradients, Hessian-vector and Gauss–Newton-vector products written out.

With the outputs ``y(θ)``, ``J = ∂y/∂θ`` and the loss ``Σ_n ℓ(y_n)`` (times 1/N for the mean):

    gradient   g   = Jᵀ ∇ℓ                          one pass forward, one backward
    GGN        G v = Jᵀ ∇²ℓ J v                     the tangent ẏ = J v forward, one pass backward
    Hessian    H v = Jᵀ ∇²ℓ J v + (dJ/dθ · v)ᵀ ∇ℓ   the same, and the tangent of every step of the backward pass
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, namespace
from ddnref._core.checks import check_dtypes, check_real
from ddnref._kernels.public import public
from ddnref.networks import _checks, _from_torch, _losses, _protocol
from ddnref.networks._activations import Activation
from ddnref.networks._layers import Dense
from ddnref.networks._losses import Loss
from ddnref.networks._protocol import AnyLayer, LayerDerivatives, Params


class Chain:
    r"""Layers under a loss, with all its derivatives written out.

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
        Those of all layers, ``[W1, b1, W2, …]``: gradients and vectors are lists like it.

    Raises
    ------
    TypeError, ValueError
        Parameters of several libraries, devices or dtypes, or that PyTorch records; none at all; layers that do not
        fit the one before them; unknown names. Its methods: inputs and vectors that do not fit, no samples under the
        mean, and targets of the wrong shape, dtype or range.

    See Also
    --------
    Chain.from_torch, Chain.from_arrays, Chain.mlp : other ways to make one.

    Notes
    -----
    With the outputs y, :math:`J = \partial y / \partial \theta`, and the loss :math:`\sum_n \ell(y_n)`,

    .. math:: g = J^T \nabla\ell, \qquad G v = J^T \nabla^2\ell\, J v, \qquad
              H v = G v + \left(\tfrac{d}{d\tau} J(\theta + \tau v)\right)^T \nabla\ell .

    Nothing is recorded or cached: each call runs forward. Counted in products with the weights, the loss of a
    deep network costs 1 per layer, the gradient 3, `ggnvp` 5 and `hvp` 9; several vectors share the first pass. Each
    layer keeps its input, pre-activation, and one or two derivatives of the activation in memory.

    A sample whose values are NaN leaves the others' outputs and gradients alone, as do targets out of range with
    ``throw=False``, which reads no value on the host and is what ``jax.jit`` needs. A kink counts as smooth: the
    second derivative of ``"relu"`` is zero.

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
        # Every array must come from one library, device and dtype, constants of frozen layers included.
        self.layers = tuple(layers)
        self.criterion = _losses.resolve(loss, reduction)
        self.reduction = reduction
        self._parts = [layer.params for layer in self.layers]
        names = {f"params[{i}]": array for i, array in enumerate(self.params)}
        if not names:
            raise ValueError("layers hold no parameters: there is nothing to differentiate.")
        constants = [array for layer in self.layers for array in getattr(layer, "constants", ())]
        names |= {f"constants[{i}]": array for i, array in enumerate(constants)}
        namespace(**names)
        check_real(**names)
        check_dtypes(**{name: (array, names["params[0]"].dtype) for name, array in names.items()})
        _checks.refuse_recorded(names)
        # Shapes that are known without an input must fit from layer to layer.
        _protocol.output_shape(self.layers, None)

    @property
    def params(self) -> list[Array]:
        """The arrays of all layers, as a new list on each call."""
        return _protocol.joined(self._parts)

    def with_params(self, params: Sequence[Array]) -> Self:
        """Return the same chain with other arrays.

        Parameters
        ----------
        params : sequence of arrays
            Shaped like `params`, in the same library and dtype. Under ``jax.jit`` these may be traced.

        Returns
        -------
        chain : Chain
            A new one; this one stays as it is.
        """
        params = list(params)
        _checks.like_params("params", params, self.params)
        layers = [layer.with_params(p) for layer, p in zip(self.layers, self.split(params), strict=True)]
        return type(self)(layers, self.criterion, self.reduction)

    def split(self, params: Sequence[Array]) -> list[Params]:
        """Split a list like `params` into one tuple for each layer."""
        return _protocol.split(self.layers, params)

    def scale(self, n: int) -> float:
        """Return the factor of the sum over n samples: 1/n for the mean, 1 for the sum."""
        return 1 / n if self.reduction == "mean" else 1.0

    # --- values ---------------------------------------------------------------------------------------------------

    def forward(self, x: Array, order: int = 2) -> tuple[Array, list[Any]]:
        """Return outputs ``(N, C)``, and what each layer saves for derivatives up to `order` (0, 1 or 2)."""
        _checks.inputs(self.layers, x, next(part[0] for part in self._parts if part))
        return _protocol.forward(self.layers, self._parts, x, order)

    @public
    def output(self, x: Array) -> Array:
        """Return the outputs of the last layer.

        Parameters
        ----------
        x : (N, ...) array
            Samples, also none; of the dtype of the parameters.

        Returns
        -------
        y : (N, C) array
        """
        return self.forward(x, 0)[0]

    @public
    def loss(self, x: Array, t: Array, *, throw: bool = True) -> Array:
        """Return the loss.

        Parameters
        ----------
        x : (N, ...) array
        t : (N,) or (N, C) array
            Targets, as the loss takes them.
        throw : bool, default True
            Raise for targets out of range, reading one flag; with ``False`` such a sample is NaN.

        Returns
        -------
        loss : () array
        """
        y = self.output(x)
        return self._loss(y, t, _checks.bad_targets(self.criterion, self.reduction, y, t, throw))

    def _loss(self, y: Array, t: Array, bad: Array | None) -> Array:
        xp = array_api_compat.array_namespace(y)
        return self.scale(y.shape[0]) * xp.sum(_checks.marked(self.criterion.value(y, t), bad))

    # --- first order ----------------------------------------------------------------------------------------------

    @public
    def gradient(self, x: Array, t: Array, *, throw: bool = True) -> list[Array]:
        """Return the gradient of the loss.

        Parameters
        ----------
        x, t, throw
            As in `loss`.

        Returns
        -------
        gradient : list of arrays like `params`
        """
        return self._gradient(x, t, throw)[1]

    @public
    def loss_and_gradient(self, x: Array, t: Array, *, throw: bool = True) -> tuple[Array, list[Array]]:
        """Return the loss and its gradient from one pass."""
        (y, bad), gradient = self._gradient(x, t, throw)
        return self._loss(y, t, bad), gradient

    def _gradient(self, x: Array, t: Array, throw: bool) -> tuple[tuple[Array, Array | None], list[Array]]:
        y, saved, y_bar, bad = self._reverse(x, t, 1, throw)
        bars, _ = _protocol.vjp(self.layers, self._parts, saved, y_bar, wrt="params")
        return (y, bad), _protocol.joined(bars)

    @public
    def per_sample_gradients(self, x: Array, t: Array, *, throw: bool = True) -> list[Array]:
        """Return the gradient of each sample's own loss; `gradient` is their mean or sum.

        Parameters
        ----------
        x, t, throw
            As in `loss`.

        Returns
        -------
        gradients : list of arrays ``(N, *shape)``
        """
        y, saved, y_bar, _ = self._reverse(x, t, 1, throw)
        # The loss of one sample carries no factor of the mean.
        y_bar = y_bar / self.scale(y.shape[0])
        return _protocol.joined(_protocol.vjp(self.layers, self._parts, saved, y_bar, wrt="params", per_sample=True)[0])

    @public
    def layer_derivatives(self, x: Array, t: Array, *, throw: bool = True) -> tuple[LayerDerivatives, ...]:
        """Return the inputs, outputs and derivatives of the loss at each layer.

        Parameters
        ----------
        x, t, throw
            As in `loss`.

        Returns
        -------
        records : tuple of LayerDerivatives
            One for each layer: `z_in`, its input; `s`, its pre-activation, or ``None``; `z_out`, its output; `b`, the
            derivative of the loss with respect to that; `inner`, the records inside a `Residual`. All ``(N, ...)``.
        """
        _, saved, y_bar, _ = self._reverse(x, t, 1, throw)
        return _protocol.derivatives(self.layers, self._parts, saved, y_bar)

    # --- second order ---------------------------------------------------------------------------------------------

    @public
    def hvp(self, x: Array, t: Array, v: Sequence[Array], *, throw: bool = True) -> list[Array]:
        """Multiply the Hessian of the loss with one or several vectors.

        Parameters
        ----------
        x, t, throw
            As in `loss`.
        v : sequence of arrays like `params`
            For k vectors, every array with one more axis of length k in front.

        Returns
        -------
        product : list of arrays shaped like v
        """
        v = list(v)
        _checks.like_params("v", v, self.params, leading=True)
        y, saved, y_bar, bad = self._reverse(x, t, 2, throw)
        # Tangent forward: ẏ = J v.
        parts, v_parts = self._parts, self.split(v)
        y_dot, saved_dot = _protocol.forward_dot(self.layers, parts, saved, v_parts)
        y_bar_dot = self._curved(y, t, y_dot, bad)
        # Tangent of the backward pass: d(Jᵀ ∇ℓ) along v.
        dots = _protocol.vjp_dot(self.layers, parts, saved, y_bar, v_parts, saved_dot, y_bar_dot, wrt="params")
        return _protocol.joined(dots[0])

    @public
    def ggnvp(self, x: Array, t: Array, v: Sequence[Array], *, throw: bool = True) -> list[Array]:
        """Multiply the generalised Gauss–Newton matrix with one or several vectors.

        Parameters
        ----------
        x, t, v, throw
            As in `hvp`.

        Returns
        -------
        product : list of arrays shaped like v
        """
        v = list(v)
        _checks.like_params("v", v, self.params, leading=True)
        y, saved = self.forward(x, 1)
        bad = _checks.bad_targets(self.criterion, self.reduction, y, t, throw)
        parts = self._parts
        # G v = Jᵀ ∇²ℓ J v: tangent forward, Hessian of the loss, backward.
        y_dot, _ = _protocol.forward_dot(self.layers, parts, saved, self.split(v))
        bars, _ = _protocol.vjp(self.layers, parts, saved, self._curved(y, t, y_dot, bad), wrt="params")
        return _protocol.joined(bars)

    def _reverse(self, x: Array, t: Array, order: int, throw: bool) -> tuple[Array, list[Any], Array, Array | None]:
        """Return outputs, saved values, the cotangent of the outputs, and which samples have bad targets."""
        y, saved = self.forward(x, order)
        bad = _checks.bad_targets(self.criterion, self.reduction, y, t, throw)
        return y, saved, self.scale(y.shape[0]) * _checks.marked(self.criterion.gradient(y, t), bad), bad

    def _curved(self, y: Array, t: Array, y_dot: Array | None, bad: Array | None) -> Array:
        """Return ``∇²ℓ ẏ`` with the factor of the reduction."""
        product = _losses.hessian_product(self.criterion, y, t, y_dot)
        return self.scale(y.shape[0]) * _checks.marked(product, bad)

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
        loss, reduction
            As in `Chain`.
        bias : bool
            Whether layers have biases, zero at first.
        gain : float
            Weights are drawn from the normal distribution of standard deviation ``gain / sqrt(a_in)``: with a gain of
            one the signals of a deep linear network keep their size, for ``"relu"`` with ``sqrt(2)``.
        seed : int
            The same for every library: drawn by NumPy in float64, weight by weight.
        like : array, optional
            Its library, dtype and device; default NumPy's float64.

        Returns
        -------
        chain : Chain

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
        dense = []
        for i in range(layers):
            draw = gain / math.sqrt(widths[i]) * rng.standard_normal((widths[i + 1], widths[i]))
            weight = xp.asarray(draw, dtype=like.dtype, device=device)
            zero = xp.zeros((widths[i + 1],), dtype=like.dtype, device=device) if bias else None
            dense.append(Dense(weight, zero, activation if i < layers - 1 else "identity"))
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
        """Make a chain of dense layers from ``[W1, b1, W2, …]``.

        Parameters
        ----------
        arrays : sequence of arrays
            Weights ``(a_out, a_in)``; a vector is the bias of the matrix before it. Shared, not copied.
        activation : str or Activation
            The activation of all layers but the last, which has none.
        loss, reduction
            As in `Chain`.

        Returns
        -------
        chain : Chain
        """
        # Group each weight with the bias that follows it, if any.
        pairs: list[list[Array]] = []
        for i, array in enumerate(arrays):
            if getattr(array, "ndim", None) == 2:
                pairs.append([array])
            elif getattr(array, "ndim", None) == 1 and pairs and len(pairs[-1]) == 1:
                pairs[-1].append(array)
            else:
                raise ValueError(
                    f"arrays[{i}] has shape {tuple(getattr(array, 'shape', ()))}; expected weights (a_out, a_in), each "
                    "followed by its bias (a_out,) or by none."
                )
        if not pairs:
            raise ValueError("arrays is empty: expected weights (a_out, a_in) and biases (a_out,).")
        last = len(pairs) - 1
        dense = [
            Dense(pair[0], pair[1] if len(pair) > 1 else None, activation if i < last else "identity")
            for i, pair in enumerate(pairs)
        ]
        return cls(dense, loss, reduction)

    @classmethod
    def from_torch(cls, module: Any, *, loss: Any = "cross_entropy", reduction: str | None = None) -> Self:
        """Make a chain that shares its weights with a `torch.nn.Sequential`.

        Parameters
        ----------
        module : torch.nn.Sequential
            Of Linear, Conv2d (zero padding, one group, no dilation), Flatten, Identity, ReLU, LeakyReLU, Tanh,
            Sigmoid, Softplus, GELU, SiLU, Dropout in evaluation mode, and Sequential of these. A Linear or Conv2d
            whose parameters do not require grad becomes `Frozen`.
        loss : str, Loss or module
            As in `Chain`, or a `torch.nn.CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss` without further options.
        reduction : {"mean", "sum"}, optional
            Default: that of the loss module, or the mean.

        Returns
        -------
        chain : Chain
            Its `params` are the detached parameters that require grad, in the module's order: an optimiser's step in
            place is seen by both.

        Raises
        ------
        TypeError
            A module that is not supported, by its name in the Sequential.
        """
        criterion, reduction = _from_torch.loss_from(loss, reduction)
        return cls(_from_torch.layers_from(module), criterion, reduction)
