"""A cache of bridged operations, so that a framework finds again what it built or compiled for one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

from ddnref._rules.contract import Rule

LIBRARIES = ("math", "numpy", "jax", "jax.numpy", "torch")
Bridge: TypeAlias = Callable[[Rule, dict[str, Any]], Callable[..., Any]]


def cached_by_options(bridge: Bridge) -> Bridge:
    """Make a bridge return the same function for the same options, where these cannot change."""

    @lru_cache(maxsize=256)
    def find(rule: Rule, options: tuple[tuple[str, Any, str], ...]) -> Callable[..., Any]:
        return bridge(rule, {key: value for key, value, _ in options})

    @wraps(bridge)
    def cached(rule: Rule, options: dict[str, Any]) -> Callable[..., Any]:
        if not all(map(is_constant, options.values())):
            return bridge(rule, options)
        # The text of an option is part of the key, because 2, 2.0 and True are equal and have the same hash.
        return find(rule, tuple((key, value, repr(value)) for key, value in sorted(options.items())))

    return cached


def is_constant(value: Any) -> bool:
    """Whether a value cannot change: a number, a string, ``None``, a tuple of these, or a function that uses no others.

    Arrays can change, and so can the objects that a function finds in its closure or in its module.
    """
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    if not isinstance(value, FunctionType):
        return value is None or isinstance(value, (bool, int, float, complex, str))
    # A closure can change, and a function inside this one may have a closure or name globals that are not seen here.
    code = value.__code__
    if value.__closure__ or any(isinstance(part, CodeType) for part in code.co_consts):
        return False
    # Other names are attributes and built-in functions, which count as fixed, and globals: only libraries are allowed.
    named = [value.__globals__[name] for name in code.co_names if name in value.__globals__]
    known = all(isinstance(found, ModuleType) and found.__name__ in LIBRARIES for found in named)
    return known and is_constant((value.__defaults__, *(value.__kwdefaults__ or {}).values()))
