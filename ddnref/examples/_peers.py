"""Figures of PyTorch and JAX, for comparison: measured where they are installed, recorded elsewhere."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
from collections.abc import Callable, Iterable
from datetime import date
from functools import lru_cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddnref._core.arrays import Array
from ddnref.examples._measure import Figures, Size
from ddnref.examples._show import settings

MODULES = {"PyTorch": "torch", "JAX": "jax"}
RECORD = Path(__file__).with_name("recorded.json")
SEED = 0  # of the record
_measured: dict[str, dict[str, NDArray[Any]]] = {name: {} for name in MODULES}


def installed(name: str) -> bool:
    """Whether a framework can be imported."""
    return importlib.util.find_spec(MODULES[name]) is not None


@lru_cache(maxsize=1)
def recorded() -> Any:
    """Read the record: versions, date and machine, and a dictionary of figures for each framework."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def peers() -> dict[str, str]:
    """Return a label for the figures of each framework, which says when they were recorded, if they were."""

    def label(name: str) -> str:
        if installed(name):
            return name
        seed = f" with seed {SEED}" if settings.seed != SEED else ""
        return f"{name} {recorded()['versions'][name]} (recorded {recorded()['date']}{seed})"

    return {name: label(name) for name in MODULES}


def note() -> str:
    """Say which figures are recorded, and how to measure them; nothing where all frameworks are installed."""
    missing = [name for name in MODULES if not installed(name)]
    if not missing:
        return ""
    kept, modules = recorded(), " ".join(MODULES[name] for name in missing)
    return (
        f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed here. Figures with a version and a "
        f"date were recorded on {kept['date']} ({kept['machine']}, Python {kept['Python']}, NumPy {kept['NumPy']}). To "
        f"measure them on this machine: python -m pip install {modules}, then run ddnref report again."
    )


def compared() -> str:
    """Return the versions that figures are of."""
    both = peers().items()
    return "; ".join(f"{name} {version(MODULES[name])}" if name == label else label for name, label in both)


def figure(key: str, name: str, measure: Callable[[str], ArrayLike | None]) -> Any:
    """Return ``measure(name)`` where a framework is installed, elsewhere what the record has under that key.

    The result is a number, or an array of them for a list, with NaN for all that is not finite. It is ``None`` where
    `measure` returns that, or where nothing is recorded.
    """
    if installed(name):
        if (found := measure(name)) is None:
            return None
        value = np.asarray(found, dtype=float)
        _measured[name][key] = value = np.where(np.isfinite(value), value, np.nan)
    elif key in (kept := recorded()["figures"][name]):
        value = np.asarray(kept[key], dtype=float)  # null becomes NaN
    else:
        return None
    return value if value.ndim else float(value)


def with_peers(what: str, passes: dict[str, str], sizes: Iterable[Size], found: Figures) -> Figures:
    """Return figures by pass and size together with recorded ones; `passes` names the framework of each pass."""
    everything = dict(found)
    for (name, library), size in product(passes.items(), sizes):

        def measured(_: str, key: tuple[str, Size] = (name, size)) -> float | None:
            return found.get(key)

        if (value := figure(f"{what} of {name} at {size}", library, measured)) is not None:
            everything[name, size] = value
    return everything


def write_record() -> None:
    """Write all figures that were measured in this process, to four digits and one in a line, as the record."""

    def plain(value: NDArray[Any]) -> Any:
        return (
            [plain(item) for item in value] if value.ndim else None if np.isnan(value) else json.loads(f"{value:.4g}")
        )

    made: dict[str, Any] = {"date": str(date.today()), "machine": f"{platform.machine()} CPU, one thread"}
    made |= {"Python": platform.python_version(), "NumPy": np.__version__}
    made["versions"] = {name: ".".join(version(module).split(".")[:2]) for name, module in MODULES.items()}
    made["figures"] = {name: {key: plain(value) for key, value in kept.items()} for name, kept in _measured.items()}
    text = json.dumps(made, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^{}\"]*\]", lambda found: re.sub(r"\s+", "", found[0]), text)  # arrays in one line
    RECORD.write_text(text + "\n", encoding="utf-8")
    recorded.cache_clear()


def autograd_gradient(name: str, loss: Callable[..., Array], x: NDArray[Any], *constants: NDArray[Any]) -> NDArray[Any]:
    """Differentiate ``loss(*eigh(x), *constants)`` by a framework's own autograd, and symmetrise the gradient.

    `x` is a NumPy array of matrices, `loss` a scalar function in the array API standard.
    """
    raw = (_torch if name == "PyTorch" else _jax)(loss, x, constants)
    with np.errstate(invalid="ignore"):  # where it divides by a gap of zero, infinity minus infinity
        return np.asarray((raw + np.swapaxes(raw, -1, -2)) / 2)


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
