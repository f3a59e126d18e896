"""Calls of public functions on JAX arrays: full precision of products, and a sentence where a value cannot be read."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

import jax

from ddnref._core.arrays import quiet

FULL = ("highest", "float32")  # two names of one precision
READ = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
"""Errors of JAX where a traced array is asked for its value."""
LIBRARIES = ("jax", "jaxlib", "array_api_compat", "numpy", "scipy")


class TracedError(TypeError):
    """A function that reads a value was traced."""


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make products of single precision exact to float32 in `function`, and in the derivatives that JAX takes of it.

    By default JAX multiplies float32 arrays in TensorFloat-32 on recent GPUs and in bfloat16 on TPUs.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if jax.config.jax_default_matmul_precision in FULL:
            return function(*args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return call


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a public function in full precision; say what to do where it asks a traced array for a value."""
    try:
        with quiet():
            return in_full_precision(function)(*args, **kwargs)
    except TracedError as error:  # a public function calls others: the outermost one is named
        raise TracedError(_advice(function, kwargs)) from error.__cause__
    except READ as error:
        if not _is_raised_by_us(error):
            raise  # by a function of the user's
        raise TracedError(_advice(function, kwargs)) from error


def _is_raised_by_us(error: Exception) -> bool:
    """Return whether the last line outside of libraries that led to the error is one of this package."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [name for name in modules if name.partition(".")[0] not in LIBRARIES]
    return own[-1].startswith("ddnref.")


def _advice(function: Callable[..., Any], kwargs: dict[str, Any]) -> str:
    """Return what happened under ``jax.jit``, and which options of this call avoid it."""
    options = inspect.signature(function).parameters
    change = []
    if kwargs.get("check_finite"):
        change.append("leave out check_finite=True")
    if "while_loop" in options and kwargs.get("while_loop") is None:
        change.append("pass while_loop=jax.lax.while_loop")
    if "throw" in options and kwargs.get("throw", True):
        change.append("pass throw=False to get NaN in place of errors")
    if not change:
        change = ["call it outside"]
    return (
        f"{function.__name__} reads a value, to raise errors or to end a loop, but jax.jit (or vmap, or grad) traced "
        f"it with arrays that have none: {' and '.join(change)}, or wrap the operation by "
        "ddnref.interop.jax.differentiable, which does all of this."
    )
