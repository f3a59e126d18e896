"""JAX: ``differentiable(op)`` makes an operation use our VJP instead of JAX's own derivative.

It works with ``jit``, ``vmap`` and ``grad``. Second derivatives need reverse mode twice, ``jax.jacrev(jax.grad(f))``.
A complex gradient of JAX is the conjugate of ours; the bridge converts.
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
from ddnref.interop._bridge_cache import cached_by_options, is_constant


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
        Takes arrays and returns the same values as the operation. Gradients follow the convention of ``jax.grad``.

    Raises
    ------
    TypeError
        The operation has no rule, an option is unknown, or a required one is missing.

    Notes
    -----
    Where no gradient exists (a gauge-dependent loss, a singular matrix), that item's gradient is NaN and a warning
    says why. A second derivative through repeated eigenvalues is NaN too. Forward mode raises, and so does
    ``jax.hessian``; use ``jax.jacrev(jax.grad(f))``. Calling ``ddnref.eigh`` itself under ``jax.grad`` would use
    JAX's derivative of ``jnp.linalg.eigh``, which is NaN or wrong at repeated eigenvalues.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from ddnref.interop.jax import differentiable
    >>> eigh = differentiable(ddnref.eigh)
    >>> jax.grad(lambda x: eigh(x)[0][1])(jnp.diag(jnp.asarray([1.0, 2.0]))).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    return _bridge(rule_of(operation), options)


@cached_by_options
def _bridge(rule: Rule, options: dict[str, Any]) -> Callable[..., Any]:
    def solve(*inputs: Any, **others: Any) -> Any:
        return _bridge(rule, others)(*inputs)

    # A VJP that solves its own systems solves them with this bridge, and so it can be differentiated again.
    bound = bind(rule, options, jax.lax.while_loop, solve if rule.recursive else None)
    operate = lru_cache(maxsize=16)(partial(_operation, rule, bound, all(map(is_constant, options.values()))))

    def function(*inputs: Array) -> Any:
        layout, arrays = flatten(inputs)
        if not all(isinstance(x, jax.Array) for x in arrays):
            # JAX's constants may be NumPy arrays, or of a private type.
            own = jax.Array | np.ndarray | np.generic
            refuse_foreign(
                rule, inputs, lambda x: isinstance(x, own) or type(x).__module__.startswith("jax."),
                "an array of JAX or NumPy",
            )  # fmt: skip
            arrays = tuple(map(jnp.asarray, arrays))
        outputs, _, info = operate(layout)(*arrays)
        return bound.result(outputs, info)

    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = rule.function.__doc__
    return function


def _operation(
    rule: Rule, bound: Bound, is_constant: bool, layout: Layout
) -> Callable[..., tuple[tuple[Array, ...], ...]]:
    """A function of the arrays of a layout, with our VJP, that returns outputs, saved arrays and status."""
    own = on_arrays(bound, rule, layout)
    # Compile each step where no option can change.
    compiled = _compiled if is_constant and layout.plain else lambda function: function
    forward, first_order = compiled(own.forward), _first_order(own.undefined)
    needs, count = layout.places(rule.needs), sum(layout.counts)

    # The VJP in JAX's convention, and whether any gradient is NaN.
    @compiled
    def reverse(bars: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[tuple[Array | None, ...], Any]:
        bars = tuple(None if bar is None else jnp.conj(bar) for bar in bars)
        gradients = tuple(None if g is None else jnp.conj(g) for g in own.reverse(bars, arrays)[:count])
        flags = [jnp.any(failed(g)) for g in gradients if g is not None]
        return gradients, reduce(jnp.logical_or, flags) if flags else None

    @jax.custom_vjp
    def operate(*inputs: Array) -> tuple[tuple[Array, ...], ...]:
        return forward(*inputs)  # type: ignore[no-any-return]

    def operate_fwd(*inputs: Any) -> tuple[tuple[tuple[Array, ...], ...], tuple[tuple[Array, ...], tuple[Array, ...]]]:
        values = tuple(primal.value for primal in inputs)
        # Traced values are differentiated once more, which must find our VJP; others can skip JAX's tracing.
        outputs, saved, info = (operate if _traced(values) else forward)(*values)
        return (outputs, saved, info), ((*outputs, *saved), values)

    def operate_bwd(
        residuals: tuple[tuple[Array, ...], tuple[Array, ...]], bars: tuple[tuple[Any, ...], ...]
    ) -> tuple[Array | None, ...]:
        results, inputs = residuals
        arrays = *results, *(inputs[i] for i in needs)
        # Cotangents that are symbolically zero are absent, so that the VJP does not compute with them.
        used = tuple(None if isinstance(bar, SymbolicZero) else bar for bar in (*bars[0], *bars[1]))
        gradients, flag = reverse(used, arrays)
        if not gradients:  # no cotangent was given
            return tuple(None for _ in inputs)
        _warn(flag)
        # A second derivative can only follow under a trace.
        if not _traced((*gradients, *arrays)):
            return gradients  # type: ignore[no-any-return]
        return tuple(None if g is None else first_order(g, *arrays) for g in gradients)

    operate.defvjp(operate_fwd, operate_bwd, symbolic_zeros=True)  # or absent cotangents would be arrays of zeros
    return operate  # type: ignore[no-any-return]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` of a function, or the function itself if it reads values, as with ``check_finite=True``."""
    jitted = jax.jit(function, inline=True)

    def call(*arrays: Any) -> Any:
        try:
            return jitted(*arrays)
        except jax.errors.JAXTypeError:  # it asked a tracer for its value
            return function(*arrays)

    return call


def _traced(arrays: tuple[Array | None, ...]) -> bool:
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def _first_order(undefined: Callable[..., Array] | None) -> Callable[..., Array]:
    """An identity on gradients whose own derivative is NaN for items where it would be wrong."""
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
    """Warn if the flag is set: at once if it is on a CPU, else from the stream of its device, without waiting."""
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
