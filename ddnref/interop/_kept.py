"""Bridged operations are kept, so that what a framework built or compiled for one of them is found again."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

from ddnref._rules.contract import Rule
from ddnref._rules.table import RULES

LIBRARIES = ("math", "numpy", "jax", "jax.numpy", "torch")
Bridge: TypeAlias = Callable[[Rule, dict[str, Any]], Callable[..., Any]]


def constant(value: Any) -> bool:
    """Whether a value cannot change: a number, a string, ``None``, a tuple of them; a function that depends on no more.

    Arrays can change, and so can what a function finds in its closure or in its module.
    """
    if isinstance(value, tuple):
        return all(map(constant, value))
    if isinstance(value, FunctionType):
        return _depends_on_its_arguments(value)
    return value is None or isinstance(value, (bool, int, float, complex, str))


def _depends_on_its_arguments(function: FunctionType) -> bool:
    """Whether all else that it names are attributes, built-in functions and array libraries."""
    code = function.__code__
    if function.__closure__ or any(isinstance(part, CodeType) for part in code.co_consts):
        return False
    named = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    known = all(isinstance(value, ModuleType) and value.__name__ in LIBRARIES for value in named)
    return known and constant((function.__defaults__, *(function.__kwdefaults__ or {}).values()))


def kept(bridge: Bridge) -> Bridge:
    """A bridge that gives the same function again for the same options, where these cannot change.

    They are told apart by how they are written as well: 2, 2.0 and True are equal.
    """

    @lru_cache(maxsize=256)
    def find(name: str, options: tuple[tuple[str, Any, str], ...]) -> Callable[..., Any]:
        return bridge(RULES[name], {key: value for key, value, _ in options})

    @wraps(bridge)
    def keeping(rule: Rule, options: dict[str, Any]) -> Callable[..., Any]:
        if all(map(constant, options.values())):
            return find(rule.name, tuple((key, value, repr(value)) for key, value in sorted(options.items())))
        return bridge(rule, options)

    return keeping
