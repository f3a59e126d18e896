"""How a function without a rule becomes a target: its arrays, their names, its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from ._targets import Make, Problem, Target


def driver(call: Callable[..., Any], like: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """`call` with the named arrays and the keyword options of the function that it drives."""
    options = [p for p in inspect.signature(like).parameters.values() if p.kind is p.KEYWORD_ONLY]
    arrays = [inspect.Parameter(f"{name}{'_' * i}", inspect.Parameter.POSITIONAL_ONLY) for i, name in enumerate(names)]

    @wraps(call)
    def driven(*given: Any, **chosen: Any) -> Any:
        return call(*given, **chosen)

    driven.__signature__ = inspect.Signature([*arrays, *options])  # type: ignore[attr-defined]
    return driven


def normal(rng: np.random.Generator, shape: tuple[int, ...], is_complex: bool = False) -> Any:
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def definite(rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool) -> Any:
    z = normal(rng, (*batch, m, m), is_complex)
    return z @ np.conj(np.swapaxes(z, -1, -2)) / m + np.eye(m)


def _make(build: Callable[..., tuple[Any, ...]], **options: Any) -> Make:
    """A `make` from a function of ``(rng, batch, m, is_complex)`` that returns the arrays."""
    return lambda *where: Problem(build(*where), dict(options))


def target(function: Any, build: Callable[..., tuple[Any, ...]], names: str, call: Any = None, **fields: Any) -> Target:
    """Make the target of one function, whose arrays are named in one string."""
    fields = dict(fields)
    options = fields.pop("given", {})
    name = fields.pop("name", function.__name__)
    arrays = tuple(names.split())
    called = function if call is None else driver(call, fields.pop("like", function), arrays)
    return Target(name, called, _make(build, **options), arrays, **fields)
