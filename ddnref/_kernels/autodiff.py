"""Derivatives of a user's function by the library of its arrays: PyTorch's or JAX's own differentiation.

NumPy, CuPy and array-api-strict have none: there the user writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import array_api_compat

from ddnref._core.arrays import Array, full, namespace_of, requires_grad

Function = Callable[..., Array]


def autodiff_of(arrays: Sequence[Any]) -> str | None:
    """Return "torch" or "jax" where one of the arrays belongs to it, and ``None`` where nothing differentiates."""
    if any(map(array_api_compat.is_torch_array, arrays)):
        return "torch"
    return "jax" if any(map(array_api_compat.is_jax_array, arrays)) else None


def pullback(function: Function, arrays: tuple[Array, ...]) -> Callable[[Array], tuple[Array, ...]]:
    """Evaluate a function once, and return what maps a cotangent of its value to those of the arrays."""
    if autodiff_of(arrays) == "jax":
        import jax

        _, back = jax.vjp(function, *arrays)
        return back  # type: ignore[no-any-return]
    import torch

    _, back = torch.func.vjp(function, *_constants(torch, arrays))
    return back  # type: ignore[no-any-return]


def pushforward(function: Function, arrays: tuple[Array, ...], dots: tuple[Array, ...]) -> Array:
    """The tangent of a function's value along tangents of the arrays."""
    if autodiff_of(arrays) == "jax":
        import jax

        return jax.jvp(function, arrays, dots)[1]
    import torch

    # The transpose of the transpose is the map itself. PyTorch's forward mode does not nest, lacks some functions, and
    # warns of itself when it is first used.
    value, back = torch.func.vjp(function, *_constants(torch, arrays))
    return torch.func.vjp(back, torch.zeros_like(value))[1](dots)[0]


def gradient(function: Function, arrays: tuple[Array, ...], place: int) -> Array:
    """The gradient of the sum of a function's values with respect to one of the arrays."""

    def total(x: Array) -> Array:
        value = function(*arrays[:place], x, *arrays[place + 1 :])
        return namespace_of(value).sum(value)

    (x_bar,) = pullback(total, (arrays[place],))(full((), 1.0, arrays[place]))
    return x_bar


def mapped(function: Function, x: Array) -> Array:
    """Call a function for each entry of the first axis, and stack its values."""
    library = autodiff_of((x,))
    if library == "jax":
        return sys.modules["jax"].vmap(function)(x)
    if library == "torch":
        return sys.modules["torch"].func.vmap(function)(x)
    return namespace_of(x).stack([function(x[i, ...]) for i in range(x.shape[0])])


def holds_gradients(function: Function, arrays: tuple[Array, ...]) -> bool:
    """Return whether a function's value is differentiated although its arrays are not: a closure holds a tensor."""
    if autodiff_of(arrays) != "torch":
        return False  # JAX raises by itself
    import torch

    from ddnref._kernels.torch import is_forward, primal

    if not (torch.is_grad_enabled() or is_forward()) or torch.compiler.is_compiling():
        return False
    value = function(*(primal(x).detach() for x in arrays))
    return requires_grad(value) or (is_forward() and torch.autograd.forward_ad.unpack_dual(value).tangent is not None)


@contextmanager
def unrecorded(arrays: tuple[Array, ...]) -> Iterator[tuple[Array, ...]]:
    """The arrays as constants, for computations that nothing differentiates."""
    library = autodiff_of(arrays)
    if library == "jax":
        yield sys.modules["jax"].lax.stop_gradient(arrays)
    elif library == "torch":
        with sys.modules["torch"].no_grad():
            yield tuple(x.detach() for x in arrays)
    else:
        yield arrays


def _constants(torch: Any, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """The arrays without their history where nothing records, so that none of it is followed."""
    from ddnref._kernels.torch import is_eager, is_forward

    if torch.is_grad_enabled() or is_forward() or not is_eager():
        return arrays
    return tuple(x.detach() for x in arrays)
