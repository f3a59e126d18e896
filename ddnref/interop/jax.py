"""JAX: ``differentiable(op)`` makes an operation use our VJP instead of JAX's own derivative.

Works with ``jit``, ``vmap`` and ``grad``; second derivatives go reverse over reverse, ``jax.jacrev(jax.grad(f))``.
JAX's convention for complex gradients is the conjugate of ours; the bridge converts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ddnref._array import Array
from ddnref._layout import Layout, flatten, on_arrays
from ddnref._rule import WARNING, Bound, Rule, bind, failed, spread
from ddnref._rules import rule_of


def differentiable(operation: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations into a function that JAX differentiates with our VJP.

    Parameters
    ----------
    operation : callable
        A public operation with a rule, such as ``ddnref.eigh``.
    **options
        Options of the operation and of its VJP, bound once: ``differentiable(ddnref.eigh_topk, k=4)``.

    Returns
    -------
    function : callable
        Takes arrays, returns what the operation returns; gradients follow ``jax.grad``'s convention.

    Raises
    ------
    TypeError
        The operation has no rule, an option is unknown, or a required one is missing.

    Notes
    -----
    Where no gradient exists (a gauge-dependent loss, a singular matrix), that item's gradient is NaN and a warning
    says why; a second derivative through repeated eigenvalues is NaN too. Forward mode, and so ``jax.hessian``,
    raises: take ``jax.jacrev(jax.grad(f))``. Calling ``ddnref.eigh`` itself under ``jax.grad`` would use JAX's
    derivative of ``jnp.linalg.eigh``, which is NaN or wrong there.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from ddnref.interop.jax import differentiable
    >>> eigh = differentiable(ddnref.eigh)
    >>> jax.grad(lambda x: eigh(x)[0][1])(jnp.diag(jnp.asarray([1.0, 2.0]))).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    rule = rule_of(operation)
    bound = bind(rule, options, jax.lax.while_loop, _again(operation) if rule.recursive else None)
    operate = lru_cache(maxsize=16)(partial(_operation, rule, bound))

    def function(*inputs: Array) -> Any:
        layout, arrays = flatten(inputs)
        outputs, _, info = operate(layout)(*map(jnp.asarray, arrays))  # JAX hands some constants on as NumPy's
        return bound.result(outputs, info)

    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = operation.__doc__
    return function


def _again(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation made differentiable, for a VJP that solves its own systems with it."""

    def solve(*inputs: Any, **options: Any) -> Any:
        return differentiable(operation, **options)(*inputs)

    return solve


def _operation(rule: Rule, bound: Bound, layout: Layout) -> Callable[..., tuple[tuple[Array, ...], ...]]:
    """Outputs, saved arrays and status as a function of arrays, with our VJP."""
    forward, reverse, undefined, _ = on_arrays(bound, rule, layout)
    first_order = _first_order(undefined)
    needs = layout.places(rule.needs)

    @jax.custom_vjp
    def operate(*inputs: Array) -> tuple[tuple[Array, ...], ...]:
        return forward(*inputs)

    def operate_fwd(*inputs: Any) -> tuple[tuple[tuple[Array, ...], ...], tuple[tuple[Array, ...], tuple[Array, ...]]]:
        values = tuple(primal.value for primal in inputs)
        outputs, saved, info = operate(*values)
        return (outputs, saved, info), ((*outputs, *saved), values)

    def operate_bwd(
        kept: tuple[tuple[Array, ...], tuple[Array, ...]], bars: tuple[tuple[Any, ...], ...]
    ) -> tuple[Array | None, ...]:
        results, inputs = kept
        arrays = *results, *(inputs[i] for i in needs)
        used = tuple(None if isinstance(bar, SymbolicZero) else jnp.conj(bar) for bar in (*bars[0], *bars[1]))
        gradients = reverse(used, arrays)[: len(inputs)]
        if not gradients:
            return tuple(None for _ in inputs)
        for gradient in gradients:
            if gradient is not None:
                _warn(failed(gradient))
        return tuple(None if g is None else jnp.conj(first_order(g, *arrays)) for g in gradients)

    operate.defvjp(operate_fwd, operate_bwd, symbolic_zeros=True)
    return operate  # type: ignore[no-any-return]


def _first_order(undefined: Callable[..., Array] | None) -> Callable[..., Array]:
    """Identity on a gradient; its own derivative is NaN where that would be wrong."""
    if undefined is None:
        return lambda x_bar, *arrays: x_bar  # noqa: ARG005

    @jax.custom_jvp
    def first_order(x_bar: Array, *arrays: Array) -> Array:  # noqa: ARG001
        return x_bar

    @first_order.defjvp
    def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
        x_bar, *arrays = primals
        keep = jnp.where(spread(undefined(*arrays), x_bar), jnp.nan, 1.0).astype(tangents[0].real.dtype)
        return x_bar, tangents[0] * keep

    return first_order  # type: ignore[no-any-return]


def _warn(flags: Array) -> None:
    """Warn from the device's own stream, only where a flag is set."""

    def say(flags: Array) -> None:
        if flags.any():
            warnings.warn(WARNING, RuntimeWarning, stacklevel=2)

    jax.lax.cond(jnp.any(flags), lambda f: jax.debug.callback(say, f), lambda f: None, flags)  # noqa: ARG005
