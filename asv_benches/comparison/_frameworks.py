"""How each framework makes arrays, differentiates a loss once and twice, and waits for its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Loss = Callable[..., Any]
"""A number from arrays, or that number and a status: whether the library says that all went well."""


class Framework(NamedTuple):
    array: Callable[[np.ndarray], Any]
    gradient: Callable[[Loss], Callable[..., tuple[Any, Any]]]
    """Turn a loss into ``(x, **constants) -> gradient, status``, compiled where that is usual."""
    second: Callable[[Loss], Callable[..., Any]]
    """Turn a loss into ``(x, d, **constants) -> Hessian times d``, by differentiating the gradient."""
    value: Callable[[Loss], Callable[..., tuple[Any, Any]]]
    """Turn a function of a problem without a gradient into ``(x, **constants) -> result, status``."""
    wait: Callable[[Any], Any] = lambda result: result
    """Return when a result has been computed."""
    use: Callable[[str], Any] = lambda _: None
    """Prepare for a dtype: JAX computes in float32 with double precision switched off, as it is by default."""


def split(result: Any) -> tuple[Any, Any]:
    """Return the number and the status of a loss."""
    return result if isinstance(result, tuple) else (result, True)


def eager(function: Loss) -> Callable[..., tuple[Any, Any]]:
    """Return a function that returns its result and its status."""
    return lambda x, **constants: split(function(x, **constants))


def _torch() -> Framework:
    import torch

    def gradient(loss: Loss) -> Callable[..., Any]:
        def call(x: Any, **constants: Any) -> Any:
            leaf = x.detach().requires_grad_()
            value, ok = split(loss(leaf, **constants))
            return torch.autograd.grad(value, leaf)[0], ok

        return call

    def second(loss: Loss) -> Callable[..., Any]:
        def call(x: Any, d: Any, **constants: Any) -> Any:
            leaf = x.detach().requires_grad_()
            (first,) = torch.autograd.grad(split(loss(leaf, **constants))[0], leaf, create_graph=True)
            return torch.autograd.grad((first * d).sum(), leaf)[0]

        return call

    return Framework(torch.from_numpy, gradient, second, eager)


def _jax() -> Framework:
    import jax

    def use(dtype: str) -> None:
        jax.config.update("jax_enable_x64", dtype == "float64")

    use("float64")

    def gradient(loss: Loss) -> Callable[..., Any]:
        return jax.jit(jax.grad(lambda x, **constants: split(loss(x, **constants)), has_aux=True))

    def second(loss: Loss) -> Callable[..., Any]:
        def along(x: Any, d: Any, **constants: Any) -> Any:
            first = jax.grad(lambda x: split(loss(x, **constants))[0])
            return jax.grad(lambda x: (first(x) * d).sum())(x)

        return jax.jit(along)

    return Framework(jax.numpy.asarray, gradient, second, lambda f: jax.jit(eager(f)), jax.block_until_ready, use)


def _autograd() -> Framework:
    import autograd

    def gradient(loss: Loss) -> Callable[..., Any]:
        def call(x: Any, **constants: Any) -> Any:
            return autograd.grad(lambda x: split(loss(x, **constants))[0])(x), True

        return call

    def second(loss: Loss) -> Callable[..., Any]:
        def call(x: Any, d: Any, **constants: Any) -> Any:
            first = autograd.grad(lambda x: split(loss(x, **constants))[0])
            return autograd.grad(lambda x: (first(x) * d).sum())(x)

        return call

    return Framework(np.asarray, gradient, second, eager)


def _tensorflow() -> Framework:
    import tensorflow as tf

    def gradient(loss: Loss) -> Callable[..., Any]:
        @tf.function
        def call(x: Any, **constants: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                value, ok = split(loss(x, **constants))
            return tape.gradient(value, x), ok

        return call

    def second(loss: Loss) -> Callable[..., Any]:
        @tf.function
        def call(x: Any, d: Any, **constants: Any) -> Any:
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    value, _ = split(loss(x, **constants))
                along = tf.reduce_sum(inner.gradient(value, x) * d)
            return outer.gradient(along, x)

        return call

    return Framework(tf.convert_to_tensor, gradient, second, eager)


FRAMEWORKS = {"torch": _torch, "jax": _jax, "autograd": _autograd, "tensorflow": _tensorflow}
