"""The decorators of public functions: they validate options by name and make every library compute as it should."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import array_api_compat
import numpy as np

from ddnref._core.arrays import public_path, quiet

P = ParamSpec("P")
R = TypeVar("R")

REQUIRED = ("Array", "Array | LinearOperator", "Array | float", "Factor")
"""Annotations of arguments that cannot be ``None``."""


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Validate the options and arrays of `function` on each call, and call it as `guarded` does.

    Options that are not given cost nothing. A number of NumPy becomes Python's: as an array without axes it would turn
    arrays of single precision into double precision. With the warnings the decorator costs 2 µs per call on NumPy.
    """
    # Everything that depends on the signature alone is worked out once.
    parameters = inspect.signature(function).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    checks = {n: CHECKS[n] for n, p in parameters.items() if n in CHECKS and p.annotation not in (bool, "bool")}
    places = tuple((i, name) for i, (name, p) in enumerate(parameters.items()) if p.kind is not p.KEYWORD_ONLY)
    required = tuple((i, name) for i, name in places if parameters[name].annotation in REQUIRED)
    # Arguments that can only be given by position are arrays.
    by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD
    positional = tuple((i, name) for i, name in places if parameters[name].kind is by_name)
    call = guarded(function)

    def check(name: str, value: Any) -> None:
        if name in checks and value is not defaults[name]:
            checks[name](name, value)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> R:
        # Check the options that were given; defaults are right.
        for name, value in kwargs.items():
            check(name, value)
            if isinstance(value, np.generic):
                kwargs[name] = _python_number(value)
        for i, name in positional:
            if i < len(args):
                check(name, args[i])
                if isinstance(args[i], np.generic):
                    args = (*args[:i], _python_number(args[i]), *args[i + 1 :])
        # A missing array is named here, before an algorithm fails on it.
        for i, name in required:
            if (args[i] if i < len(args) else kwargs.get(name, ...)) is None:
                raise TypeError(f"{name} is None: {function.__name__} needs an array there.")
        return call(*args, **kwargs)

    return checked


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Call `function` as the library of its arrays needs it.

    Floating-point warnings of NumPy are off, because an item that is not finite comes out as NaN or is raised, and a
    warning from the middle of an algorithm helps nobody. PyTorch's autocast and JAX's low precision of products are
    off: see ``_kernels/torch.py`` and ``_kernels/jax.py``.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(type(a) is np.ndarray for a in args):
            library = _library(args) or _library(kwargs.values())
            if library == "torch":
                from ddnref._kernels import torch as _torch

                return _torch.call(function, args, kwargs)  # type: ignore[no-any-return]
            if library == "jax":
                from ddnref._kernels import jax as _jax

                return _jax.call(function, args, kwargs)  # type: ignore[no-any-return]
            if library is None and "dask" in sys.modules:
                _refuse_dask(function, args, kwargs)
        with quiet():
            return function(*args, **kwargs)

    return call


def _library(values: Iterable[Any]) -> str | None:
    """Return "torch" or "jax" if the first tensor or array of JAX is among the values, or what they hold, else None."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is None and jax is None:
        return None
    for value in values:
        if torch is not None and isinstance(value, torch.Tensor):
            return "torch"
        if jax is not None and isinstance(value, jax.Array):
            return "jax"
        # Operators and chains hold parameters, and a factor may be a list of pieces.
        held = getattr(value, "params", value)
        if isinstance(held, (tuple, list)) and (found := _library(held)):
            return found
    return None


def _refuse_dask(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ``TypeError`` for arrays of Dask, with the call that takes them."""
    given = dict(zip(inspect.signature(function).parameters, args, strict=False))
    found = [name for name, value in given.items() if type(value).__module__.partition(".")[0] == "dask"]
    if found:
        call = ", ".join([public_path(function.__name__), *given, *(f"{option}=..." for option in kwargs)])
        raise TypeError(
            f"{found[0]} is a dask.{type(given[found[0]]).__name__}: call ddnref.interop.dask.map_items({call}), which "
            f"calls {function.__name__} on the blocks, or pass {found[0]}.compute()."
        )


def _python_number(value: Any) -> Any:
    """Return a number of NumPy as one of Python; a `longdouble` has no other `item` than itself."""
    return float(value) if isinstance(value, np.floating) else value.item()


def _number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) and not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {_shown(value)}, expected a number.")
    if value != value:
        raise ValueError(f"{name} is NaN, expected a number.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"a {type(value).__name__}"


def _number_that(holds: Callable[[Any], bool], expected: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        _number(name, value)
        if not holds(value):
            raise ValueError(f"{name} is {value}, expected {expected}.")

    return check


_finite = _number_that(math.isfinite, "a finite number")
_tolerance = _number_that(lambda value: value >= 0, "at least 0")
_positive = _number_that(lambda value: value > 0, "more than 0")


def _step(name: str, value: Any) -> None:
    _positive(name, value)
    _finite(name, value)


def _integer(name: str, value: Any) -> None:
    # Accept anything that Python accepts as an index, NumPy's integers too.
    try:
        operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {_shown(value)}, expected an integer.") from None


def _from(least: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        _integer(name, value)
        if operator.index(value) < least:
            raise ValueError(f"{name} is {value}, expected at least {least}.")

    return check


def _callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} is {_shown(value)}, expected a function.")


def _array(name: str, value: Any) -> None:
    if not array_api_compat.is_array_api_obj(value):
        raise TypeError(f"{name} is {_shown(value)}, expected an array.")


def _failure(name: str, value: Any) -> None:
    if not isinstance(value, str) or value not in ("nan", "iterate"):
        raise ValueError(f'{name} is {_shown(value)}, expected "nan" or "iterate".')


CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(("rtol", "atol", "gauge_rtol", "cluster_rtol", "check_rtol", "zero_rtol", "vjp_rtol"), _tolerance),
    **dict.fromkeys(("step", "radius", "total", "alpha"), _step),
    "sigma": _finite,
    "on_failure": _failure,
    "gap": _positive,
    **dict.fromkeys(("maxiter", "n_iter", "seed", "equalities", "probes"), _from(0)),
    **dict.fromkeys(("check_every", "restart", "directions", "mc_samples"), _from(1)),
    **dict.fromkeys(("k", "n", "basis"), _integer),
    **dict.fromkeys(("v0", "x0", "y0", "reference"), _array),
    **dict.fromkeys(
        (
            "callback", "while_loop", "preconditioner", "preconditioner_adjoint", "progress", "f", "df", "d2f",
            "residual", "jacobian", "residual_vjp", "residual_jvp", "gradient", "hessian", "gradient_vjp",
            "gradient_jvp", "constraint", "constraint_jacobian", "function", "weight",
        ),
        _callable,
    ),
}  # fmt: skip
"""The check of each option by its name, the same in every function that has it. Defaults are not checked."""
