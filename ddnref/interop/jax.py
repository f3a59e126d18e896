"""JAX: ``differentiable(op)`` makes an operation use our VJP instead of JAX's own derivative.

Works with ``jit``, ``vmap`` and ``grad``; second derivatives go reverse over reverse, ``jax.jacrev(jax.grad(f))``.
JAX's convention for complex gradients is the conjugate of ours; the bridge converts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from ddnref._core.arrays import Array
from ddnref._rules.binding import WARNING, Bound, Layout, bind, failed, flatten, on_arrays, refuse_foreign, spread
from ddnref._rules.contract import Rule
from ddnref._rules.table import rule_of
from ddnref.interop._kept import constant, kept


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
    return _bridge(rule_of(operation), options)


@kept
def _bridge(rule: Rule, options: dict[str, Any]) -> Callable[..., Any]:
    bound = bind(rule, options, jax.lax.while_loop, _again(rule) if rule.recursive else None)
    operate = lru_cache(maxsize=16)(partial(_operation, rule, bound, all(map(constant, options.values()))))

    def function(*inputs: Array) -> Any:
        layout, arrays = flatten(inputs)
        if not all(isinstance(x, jax.Array) for x in arrays):
            refuse_foreign(rule, inputs, _is_array, "an array of JAX or NumPy")
            arrays = tuple(map(jnp.asarray, arrays))
        outputs, _, info = operate(layout)(*arrays)
        return bound.result(outputs, info)

    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = rule.function.__doc__
    return function


def _is_array(x: Any) -> bool:
    """Also constants, which JAX hands on as NumPy's or in a type of its own."""
    return isinstance(x, jax.Array | np.ndarray | np.generic) or type(x).__module__.startswith("jax.")


def _again(rule: Rule) -> Callable[..., Any]:
    """The operation made differentiable, for a VJP that solves its own systems with it."""

    def solve(*inputs: Any, **options: Any) -> Any:
        return _bridge(rule, options)(*inputs)

    return solve


def _operation(
    rule: Rule, bound: Bound, is_constant: bool, layout: Layout
) -> Callable[..., tuple[tuple[Array, ...], ...]]:
    """Outputs, saved arrays and status as a function of arrays, with our VJP; compiled where no option can change."""
    own = on_arrays(bound, rule, layout)
    compiled = _compiled if is_constant and layout.plain else lambda function: function
    forward, reverse = compiled(own.forward), compiled(_conjugate(own.reverse, sum(layout.counts)))
    first_order = _first_order(own.undefined)
    needs = layout.places(rule.needs)

    @jax.custom_vjp
    def operate(*inputs: Array) -> tuple[tuple[Array, ...], ...]:
        return forward(*inputs)  # type: ignore[no-any-return]

    def operate_fwd(*inputs: Any) -> tuple[tuple[tuple[Array, ...], ...], tuple[tuple[Array, ...], tuple[Array, ...]]]:
        values = tuple(primal.value for primal in inputs)
        outputs, saved, info = (operate if _traced(values) else forward)(*values)
        return (outputs, saved, info), ((*outputs, *saved), values)

    def operate_bwd(
        residuals: tuple[tuple[Array, ...], tuple[Array, ...]], bars: tuple[tuple[Any, ...], ...]
    ) -> tuple[Array | None, ...]:
        results, inputs = residuals
        arrays = *results, *(inputs[i] for i in needs)
        used = tuple(None if isinstance(bar, SymbolicZero) else bar for bar in (*bars[0], *bars[1]))
        gradients, flag = reverse(used, arrays)
        if not gradients:
            return tuple(None for _ in inputs)
        _warn(flag)
        if not _traced((*gradients, *arrays)):
            return gradients  # type: ignore[no-any-return]
        return tuple(None if g is None else first_order(g, *arrays) for g in gradients)

    operate.defvjp(operate_fwd, operate_bwd, symbolic_zeros=True)
    return operate  # type: ignore[no-any-return]


def _conjugate(reverse: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The VJP in JAX's convention, of so many arrays; and whether any gradient is NaN."""

    def conjugate(bars: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[tuple[Array | None, ...], Any]:
        bars = tuple(None if bar is None else jnp.conj(bar) for bar in bars)
        gradients = tuple(None if g is None else jnp.conj(g) for g in reverse(bars, arrays)[:count])
        flags = [jnp.any(failed(g)) for g in gradients if g is not None]
        return gradients, reduce(jnp.logical_or, flags) if flags else None

    return conjugate


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit``, unless the function looks at values, as ``check_finite=True`` does."""
    jitted = jax.jit(function, inline=True)

    def call(*arrays: Any) -> Any:
        try:
            return jitted(*arrays)
        except jax.errors.JAXTypeError:
            return function(*arrays)

    return call


def _traced(arrays: tuple[Array | None, ...]) -> bool:
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


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


def _warn(flag: Array) -> None:
    """Warn where the flag is set: now where it lies on a CPU, else from the device's own stream."""
    if isinstance(flag, jax.core.Tracer):
        _warn_in_stream(flag)
    elif flag.is_fully_addressable and all(device.platform == "cpu" for device in flag.devices()):
        _say(flag)
    else:
        _warn_from_device(flag)


def _say(flag: Array) -> None:
    if flag.any():
        warnings.warn(WARNING, RuntimeWarning, stacklevel=2)


def _warn_in_stream(flag: Array) -> None:
    jax.lax.cond(flag, lambda f: jax.debug.callback(_say, f), lambda f: None, flag)  # noqa: ARG005


_warn_from_device = jax.jit(_warn_in_stream)
