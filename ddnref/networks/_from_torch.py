"""Layers of a `torch.nn.Sequential` that share its weights and follow it; torch itself is not imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ddnref.networks._activations import Activation, leaky_relu
from ddnref.networks._blocks import Elementwise, Frozen
from ddnref.networks._convolution import Conv2d
from ddnref.networks._layers import Dense, Flatten
from ddnref.networks._losses import LOSSES, Loss, bce, cross_entropy
from ddnref.networks._protocol import AnyLayer

KNOWN = (
    "Linear, Conv2d, Flatten, Identity, ReLU, LeakyReLU, Tanh, Sigmoid, Softplus, GELU, SiLU, Dropout in evaluation "
    "mode, and Sequential of these"
)
NAMED = {"ReLU": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "SiLU": "silu"}
NAMED_LOSSES = {"CrossEntropyLoss": "cross_entropy", "MSELoss": "mse", "BCEWithLogitsLoss": "bce"}

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
PLAIN = (bool, int, float, str, tuple)
"""Types of the options of a module."""


class Source:
    """The modules that a chain was made from, and what of them decides its layers, as it was then.

    Writing into the weights, as an optimiser does, changes nothing here: the chain shares their memory. Other memory,
    dtypes, devices, modules, options or hooks do, and `changed` says so.
    """

    def __init__(self, module: Any, loss: Any, reduction: str | None) -> None:
        self.given = (module, loss, reduction)
        self._options: dict[int, tuple[str, ...]] = {}  # names of the options of each module
        self._stamp, self._held = ([], []) if _is_compiling() else self._current()

    def read(self) -> tuple[list[AnyLayer], str | Loss, str]:
        """Return layers, loss and reduction of the modules as they are now."""
        module, loss, reduction = self.given
        return layers_from(module), *loss_from(loss, reduction)

    def changed(self) -> bool:
        """Return whether the modules may no longer be those that they were."""
        return _is_compiling() or self._current()[0] != self._stamp

    def _current(self) -> tuple[list[Any], list[Any]]:
        """Return what decides the layers, in numbers and strings, and the objects whose identity is part of it."""
        stamp: list[Any] = []
        held: list[Any] = []  # an identity means something only as long as its object lives
        modules = [module for module in self.given[:2] if hasattr(module, "_parameters")]
        while modules:
            module = modules.pop()
            held.append(module)
            stamp += (id(module), type(module).__name__)
            # Options such as a slope, a stride or the mode, whose names are looked up once; hooks and parametrisations.
            own = vars(module)
            if id(module) not in self._options:
                self._options[id(module)] = tuple(k for k, v in own.items() if isinstance(v, PLAIN) or v is None)
            stamp += map(own.get, self._options[id(module)])
            stamp += [bool(own.get(name)) for name in HOOKS]
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                held.append(tensor)
                stamp.append((name, id(tensor), *_place(tensor)))
            modules += module._modules.values()
        return stamp, held


def _is_compiling() -> bool:
    """Return whether `torch.compile` traces, which cannot compare pointers.

    What is read in a trace, on the other hand, is watched by the compiler itself, which traces again after a change.
    """
    return "torch" in sys.modules and bool(sys.modules["torch"].compiler.is_compiling())


def _place(tensor: Any) -> tuple[Any, ...]:
    """Return where a tensor lies, and what it may be used for."""
    if tensor is None:
        return ()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def layers_from(module: Any) -> list[AnyLayer]:
    """Return the layers of a Sequential, each activation merged into the affine layer before it."""
    if type(module).__name__ != "Sequential" or not hasattr(module, "parameters"):
        raise TypeError(f"module is a {type(module).__name__}, expected a torch.nn.Sequential.")
    layers: list[AnyLayer] = []
    seen: set[int] = set()
    for name, child in _children(module, ""):
        # A shared weight would get a gradient for each of its places, where PyTorch adds them.
        own = {id(p) for p in child.parameters()}
        if own & seen:
            raise _unsupported(name, child, "it shares a weight with a module before it, and a chain counts each alone")
        seen |= own
        # An activation joins the layer before it, or becomes a layer where that is not affine.
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
    if reduction not in (None, loss.reduction):
        raise ValueError(f"reduction is {reduction!r}, but that of {kind} is {loss.reduction!r}.")
    # Weights are detached and share their memory with the module, as the parameters do.
    given = {name: getattr(loss, name, None) for name in ("weight", "pos_weight")}
    weight, pos_weight = (a if a is None else a.detach()[None] if a.ndim == 0 else a.detach() for a in given.values())
    if kind == "CrossEntropyLoss":
        found = cross_entropy(weight=weight, label_smoothing=loss.label_smoothing, ignore_index=loss.ignore_index)
        return found, loss.reduction
    if kind == "BCEWithLogitsLoss" and not (weight is None and pos_weight is None):
        for name, array in (("weight", weight), ("pos_weight", pos_weight)):
            if array is not None and array.ndim != 1:
                raise ValueError(
                    f"{kind} has a {name} of shape {tuple(array.shape)}, expected (C,): one factor for each output. "
                    "Put factors that differ between samples into a ddnref.networks.Loss of your own, with the mean "
                    "over the samples: PyTorch divides by their number too."
                )
        return bce(loss.reduction == "mean", weight, pos_weight), loss.reduction
    return NAMED_LOSSES[kind], loss.reduction


def _children(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    # Nested modules are named like "1.0", as PyTorch names them.
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
    for hooks in HOOKS:
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
    # Detached tensors share the memory of the parameters, and PyTorch records nothing.
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
    inner = layer.layer if isinstance(layer, Frozen) else layer
    if not isinstance(inner, Dense | Conv2d) or inner.activation != "identity":
        return None
    merged = replace(inner, activation=activation)
    return Frozen(merged) if isinstance(layer, Frozen) else merged


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
