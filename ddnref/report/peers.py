"""The same losses differentiated by PyTorch's and JAX's own autograd, for comparison only."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddnref._core.arrays import Array

Loss = Callable[..., Array]
"""``loss(w, v, *constants)``: a scalar of the eigenpairs of a matrix, in functions of the array API standard."""

_MODULES = {"PyTorch": "torch", "JAX": "jax"}


def versions() -> dict[str, str | None]:
    """Each peer's version, ``None`` where it is not installed."""
    return {name: version(module) if _installed(module) else None for name, module in _MODULES.items()}


def gradients(loss: Loss, x: NDArray[Any], *constants: NDArray[Any]) -> dict[str, NDArray[Any] | None]:
    """Gradient of ``loss(*eigh(x), *constants)`` by each peer's autograd, symmetrised; ``None`` if not installed."""
    found: dict[str, NDArray[Any] | None] = {}
    for (name, module), run in zip(_MODULES.items(), (_torch, _jax), strict=True):
        raw = run(loss, x, constants) if _installed(module) else None
        with np.errstate(invalid="ignore"):  # infinity minus infinity: that is what we are here to show
            found[name] = None if raw is None else (raw + np.swapaxes(raw, -1, -2)) / 2
    return found


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _torch(loss: Loss, x: NDArray[Any], constants: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    import torch

    leaf = torch.tensor(x, requires_grad=True)
    loss(*torch.linalg.eigh(leaf), *map(torch.tensor, constants)).backward()
    return np.asarray(leaf.grad)


def _jax(loss: Loss, x: NDArray[Any], constants: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    import jax

    jax.config.update("jax_enable_x64", True)
    held = tuple(map(jax.numpy.asarray, constants))
    gradient = jax.jit(jax.grad(lambda matrix: loss(*jax.numpy.linalg.eigh(matrix), *held)))
    return np.asarray(gradient(jax.numpy.asarray(x)))
