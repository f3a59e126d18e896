"""Checks of the functions that users pass: their signatures, and the arrays that they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, as_tuple, library, with_scalars_as_arrays

Forward = Callable[..., tuple[tuple[Array, ...], tuple[Array, ...]]]


class Returned(NamedTuple):
    """A kind of function that returns one array for each of some others, in words for messages."""

    function: str
    """Name of the function."""
    what: str
    """Name of one array that it returns."""
    of: str
    """Name of the arrays to which those that it returns belong."""
    remedy: str
    """Advice for a function that returns ``None``."""


COTANGENTS = Returned("f_vjp", "cotangent", "inputs", "Return zeros where the loss does not depend on that input.")
TANGENTS_OF_OUTPUTS = Returned("f_jvp", "tangent", "outputs", "Return zeros where that output does not move.")
SECONDS = Returned("second", "derivative of the cotangent", "inputs", "Return zeros where the cotangent does not move.")


class Checked(NamedTuple):
    """A function and its derivatives, as a check takes them."""

    f: Callable[..., Any]
    derivatives: tuple[Callable[..., Any], ...]
    inputs: tuple[Array, ...]
    saves: bool
    needs: Sequence[int]


def checked(f: Callable[..., Any], arguments: Sequence[Any], saves: bool, needs: Sequence[int], *names: str) -> Checked:
    """Collect what is checked, from the derivatives in `names` and the inputs behind them.

    A function that a bridge made brings its derivatives along: then all arguments are inputs.
    """
    pair = getattr(f, "pair", None)
    if pair is None:
        n = len(names)
        for name, function in zip(names, arguments, strict=False):
            if not callable(function):
                kind = f"{type(function).__module__}.{type(function).__qualname__}"
                raise TypeError(f"f_{name} is a {kind}, expected a function; only f of a bridge brings its own.")
        return Checked(f, tuple(arguments[:n]), tuple(arguments[n:]), saves, needs)
    inputs = tuple(x for x in arguments if x is not None)
    parts = pair(len(inputs))
    return Checked(parts.forward, tuple(getattr(parts, name) for name in names), inputs, True, parts.needs)


def forward_of(f: Callable[..., Any], saves: bool) -> Forward:
    """Return `f` as a function with two tuples: outputs and saved arrays."""

    def forward(*arrays: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        result, saved = f(*arrays) if saves else (f(*arrays), ())
        return as_tuple(result), as_tuple(saved)

    return forward


def check_outputs(function: str, results: tuple[Any, ...]) -> None:
    """Raise ``TypeError`` unless a user's function returned arrays."""
    for i, result in enumerate(results):
        if not array_api_compat.is_array_api_obj(with_scalars_as_arrays(result)):
            which = f"{function} returned" if len(results) == 1 else f"result {i} of {function} is"
            raise TypeError(f"{which} a {type(result).__name__}, expected an array or a tuple of arrays.")


def check_call(name: str, function: Callable[..., Any], counts: dict[str, int], n_inputs: int) -> None:
    """Raise ``TypeError`` where the signature of a function does not take what it would be given.

    `counts` says how many arguments of each kind there are. The last kind are the inputs that `needs` names.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    total = sum(counts.values())
    try:
        signature.bind(*range(total))
    except TypeError as error:
        # With a list of inputs that would fit, the remedy can be named.
        needed = counts["input(s)"]
        missing = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        wanted = len([p for p in missing if p.default is p.empty]) - (total - needed)
        example = f", here needs={tuple(range(wanted))}" if wanted in (1, n_inputs) and not needed else ""
        *most, last = (f"{count} {kind}" for kind, count in counts.items())
        raise TypeError(
            f"{name} does not take {total} arguments ({error}): {', '.join(most)} and {last}. needs= names the "
            f"positions of the inputs that it takes{example}; saves= says whether f returns saved arrays too."
        ) from None


def check_returned(returned: Returned, results: tuple[Any, ...], like: Sequence[Array]) -> None:
    """Raise unless a function returned one array for each of `like`, of its library, shape and dtype."""
    function, what, of, remedy = returned
    for i, (result, x) in enumerate(zip(results, like, strict=False)):
        if result is None:
            raise TypeError(
                f"{function} returned None for {of}[{i}], expected an array of shape {tuple(x.shape)}. {remedy}"
            )
        x = with_scalars_as_arrays(x)
        library(**{f"the {what} of {of}[{i}]": with_scalars_as_arrays(result), f"{of}[{i}]": x})
    shapes = [tuple(result.shape) for result in results], [tuple(x.shape) for x in like]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{function} returned shapes {shapes[0]} for {of} of shapes {shapes[1]}.")
    for i, (result, x) in enumerate(zip(results, like, strict=True)):
        if result.dtype != x.dtype:
            raise TypeError(f"{function} returned dtype {result.dtype} for {of}[{i}] of dtype {x.dtype}.")
