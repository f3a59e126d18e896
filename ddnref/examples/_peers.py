"""The same losses differentiated by PyTorch's and JAX's own autograd, for comparison only."""

from __future__ import annotations

import importlib.util
import json
import platform
import runpy
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddnref._core.arrays import Array

MODULES = {"PyTorch": "torch", "JAX": "jax"}
RECORD = Path(__file__).with_name("recorded.json")


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


def recorded(name: str, seed: int) -> tuple[str, dict[str, tuple[NDArray[Any], NDArray[Any]]]] | None:
    """Return a label and, by dtype, the worst error and the number of NaN at each gap, as `record` wrote them.

    ``None`` for another seed than that of the record, because its matrices are others.
    """
    kept = json.loads(RECORD.read_text(encoding="utf-8"))
    found, release = kept[name], ".".join(kept[name]["version"].split(".")[:2])
    said = f"{name} {release}, recorded {kept['date']}"
    # A worst error is NaN, null in the file, where no error is finite.
    figures = {d: (np.asarray(found["worst"][d], dtype=float), np.asarray(nan)) for d, nan in found["nan"].items()}
    return (said, figures) if seed == kept["seed"] else None


def record() -> None:
    """Record the errors of both frameworks at repeated eigenvalues, for machines where they are not installed.

    Renew the record by ``python -c "from ddnref.examples._peers import record; record()"``.
    """
    if None in versions().values():
        raise RuntimeError(f"Not all that is to be recorded is installed: {versions()}.")
    story = runpy.run_module("ddnref.examples.plot_repeated_eigenvalues")
    made: dict[str, Any] = {"date": str(date.today()), "device": f"CPU, {platform.machine()}", "seed": 0}
    made |= {"Python": platform.python_version(), "NumPy": np.__version__}
    for name, number in versions().items():
        worst = {d: [float(e) if np.isfinite(e) else None for e in of[name]] for d, of in story["worst"].items()}
        nans = {d: of[name].tolist() for d, of in story["nans"].items()}
        made[name] = {"version": number, "worst": worst, "nan": nans}
    RECORD.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
