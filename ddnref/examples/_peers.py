"""The same losses differentiated by PyTorch's and JAX's own autograd, for comparison only."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddnref._core.arrays import Array

MODULES = {"PyTorch": "torch", "JAX": "jax"}


def installed(module: str) -> bool:
    """Whether a framework can be imported."""
    return importlib.util.find_spec(module) is not None


def versions() -> dict[str, str | None]:
    """Return each framework's version, ``None`` where it is not installed."""
    return {name: version(module) if installed(module) else None for name, module in MODULES.items()}


def autograd_gradients(
    loss: Callable[..., Array], x: NDArray[Any], *constants: NDArray[Any]
) -> dict[str, NDArray[Any] | None]:
    """Differentiate ``loss(*eigh(x), *constants)`` by PyTorch's and by JAX's own autograd.

    `x` is a NumPy array of matrices, `loss` a scalar function in the array API standard. Returns the symmetrised
    gradient by the framework's name, ``None`` where it is not installed.
    """
    found: dict[str, NDArray[Any] | None] = {}
    for (name, module), run in zip(MODULES.items(), (_torch, _jax), strict=True):
        raw = run(loss, x, constants) if installed(module) else None
        # Where they divide by a gap of zero, the sum of both halves is infinity minus infinity.
        with np.errstate(invalid="ignore"):
            found[name] = None if raw is None else (raw + np.swapaxes(raw, -1, -2)) / 2
    return found


def _torch(loss: Callable[..., Array], x: NDArray[Any], constants: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    import torch

    leaf = torch.tensor(x, requires_grad=True)
    loss(*torch.linalg.eigh(leaf), *map(torch.tensor, constants)).backward()
    return np.asarray(leaf.grad)


def _jax(loss: Callable[..., Array], x: NDArray[Any], constants: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    import jax

    jax.config.update("jax_enable_x64", True)
    held = tuple(map(jax.numpy.asarray, constants))
    gradient = jax.jit(jax.grad(lambda matrix: loss(*jax.numpy.linalg.eigh(matrix), *held)))
    return np.asarray(gradient(jax.numpy.asarray(x)))
