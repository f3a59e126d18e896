"""Layers of a `torch.nn.Sequential` that share its weights; torch itself is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ddnref.networks._activations import Activation, leaky_relu
from ddnref.networks._blocks import Elementwise, Frozen
from ddnref.networks._convolution import Conv2d
from ddnref.networks._layers import Dense, Flatten
from ddnref.networks._losses import LOSSES, Loss
from ddnref.networks._protocol import AnyLayer

KNOWN = (
    "Linear, Conv2d, Flatten, Identity, ReLU, LeakyReLU, Tanh, Sigmoid, Softplus, GELU, SiLU, Dropout in evaluation "
    "mode, and Sequential of these"
)
NAMED = {"ReLU": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "SiLU": "silu"}
NAMED_LOSSES = {"CrossEntropyLoss": "cross_entropy", "MSELoss": "mse", "BCEWithLogitsLoss": "bce"}


def layers_from(module: Any) -> list[AnyLayer]:
    """Return the layers of a Sequential, each activation merged into the affine layer before it."""
    if type(module).__name__ != "Sequential" or not hasattr(module, "parameters"):
        raise TypeError(f"module is a {type(module).__name__}, expected a torch.nn.Sequential.")
    layers: list[AnyLayer] = []
    seen: set[int] = set()
    for name, child in _children(module, ""):
        own = {id(p) for p in child.parameters()}
        if own & seen:
            raise _unsupported(name, child, "it shares a weight with a module before it, and a chain counts each alone")
        seen |= own
        activation = _activation(name, child)
        if activation is None:
            layers += _layer(name, child)
        elif layers and (merged := _merged(layers[-1], activation)) is not None:
            layers[-1] = merged
        elif activation != "identity":
            layers.append(Elementwise(activation))
    return layers


def loss_from(loss: Any, reduction: str | None) -> tuple[str | Loss, str]:
    """Return a loss, by name or from a PyTorch loss module, and its reduction."""
    if isinstance(loss, str | Loss):
        return loss, reduction or "mean"
    kind = type(loss).__name__
    if kind not in NAMED_LOSSES:
        known = ", ".join([*(f'"{name}"' for name in LOSSES), *(f"torch.nn.{name}" for name in NAMED_LOSSES)])
        raise TypeError(f"loss is a {kind}, expected one of {known}, or a ddnref.networks.Loss.")
    options = (("weight", None), ("pos_weight", None), ("label_smoothing", 0.0), ("ignore_index", -100))
    for option, default in options:
        if getattr(loss, option, default) != default:
            raise ValueError(
                f"{kind} has {option} set, which is not supported: write the loss as a ddnref.networks.Loss."
            )
    if reduction not in (None, loss.reduction):
        raise ValueError(f"reduction is {reduction!r}, but that of {kind} is {loss.reduction!r}.")
    return NAMED_LOSSES[kind], loss.reduction


def _children(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    _refuse_hooks(prefix[:-1], module)
    for i, child in enumerate(module):  # named_children would leave out a module that comes twice
        path = f"{prefix}{i}"
        if type(child).__name__ == "Sequential":
            yield from _children(child, f"{path}.")
        else:
            _refuse_hooks(path, child)
            yield path, child


def _refuse_hooks(name: str, module: Any) -> None:
    """Refuse hooks and parametrisations, which may change a module's input, weights or output."""
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        if getattr(module, hooks, None):
            raise _unsupported(name, module, f"its {hooks} (weight_norm is one) may change what it computes")


def _layer(name: str, module: Any) -> list[AnyLayer]:
    kind = type(module).__name__
    if kind == "Flatten":
        if (module.start_dim, module.end_dim) != (1, -1):
            raise _unsupported(name, module, "only Flatten(1, -1) keeps the samples apart")
        return [Flatten()]
    if kind == "Linear":
        return [_frozen(name, module, Dense(*_arrays(module)))]
    if kind == "Conv2d":
        return [_frozen(name, module, _convolution(name, module))]
    raise _unsupported(name, module, "its derivatives are not known here")


def _convolution(name: str, module: Any) -> Conv2d:
    if module.padding_mode != "zeros" or module.groups != 1 or tuple(module.dilation) != (1, 1):
        raise _unsupported(name, module, "only padding with zeros, one group and no dilation are")
    # "same" means equal margins, which only odd kernels have.
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    if padding == "same":
        if any(k % 2 == 0 for k in module.kernel_size):
            raise _unsupported(name, module, 'padding="same" of an even kernel has unequal sides')
        padding = tuple((k - 1) // 2 for k in module.kernel_size)
    return Conv2d(*_arrays(module), tuple(module.stride), tuple(padding))


def _arrays(module: Any) -> tuple[Any, Any]:
    bias = module.bias
    return module.weight.detach(), None if bias is None else bias.detach()


def _frozen(name: str, module: Any, layer: Dense | Conv2d) -> AnyLayer:
    """Return the layer, frozen if PyTorch was told not to train it."""
    trained = {p.requires_grad for p in module.parameters()}
    if len(trained) > 1:
        raise _unsupported(name, module, "weight and bias are frozen together or not at all")
    return layer if trained.pop() else Frozen(layer)


def _merged(layer: AnyLayer, activation: str | Activation) -> AnyLayer | None:
    """Return the affine layer with this activation if it has none yet, else ``None``."""
    # An activation merges into an affine layer that has none yet.
    inner = layer.layer if isinstance(layer, Frozen) else layer
    if not isinstance(inner, Dense | Conv2d) or inner.activation != "identity":
        return None
    if isinstance(inner, Dense):
        new: Any = Dense(inner.weight, inner.bias, activation)
    else:
        new = Conv2d(inner.weight, inner.bias, inner.stride, inner.padding, activation)
    return Frozen(new) if isinstance(layer, Frozen) else new


def _activation(name: str, module: Any) -> str | Activation | None:
    """Return the activation that a module is, or ``None``."""
    kind = type(module).__name__
    if kind == "Identity" or (kind == "Dropout" and (not module.training or module.p == 0)):
        return "identity"
    if kind == "Dropout":
        raise _unsupported(name, module, "it draws numbers while training: call module.eval() first")
    if kind == "LeakyReLU":
        return leaky_relu(module.negative_slope)
    if kind == "GELU":
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind == "Softplus":
        if module.beta != 1:
            raise _unsupported(name, module, "only beta=1 is")
        if module.threshold < 20:  # from there on it differs from its line by less than 2.1e-9
            raise _unsupported(name, module, "only a threshold of at least 20, above which it is a line, is")
        return "softplus"
    return NAMED.get(kind)


def _unsupported(name: str, module: Any, why: str) -> TypeError:
    return TypeError(
        f"module {name!r}, {module}, is not supported: {why}. Supported are {KNOWN}. Build the chain from ddnref "
        "layers instead; ddnref.networks.Layer takes functions of your own."
    )
