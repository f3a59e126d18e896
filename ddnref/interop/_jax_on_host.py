"""Functions of NumPy in JAX: called at once on arrays that have values, and through a callback inside of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from ddnref._core.arrays import Array
from ddnref._rules.contract import Rule


def on_host(rule: Rule) -> Rule:
    """The rule of a user's function with functions of NumPy, as a rule with functions of JAX.

    Its derivatives take all inputs, which tell the shapes of the results.
    """
    count, n = len(rule.forward.__signature__.parameters), rule.outputs  # type: ignore[attr-defined]

    @lru_cache(maxsize=64)
    def shapes_of(inputs: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        outputs, saved = rule.shapes(*(np.zeros(x.shape, x.dtype) for x in inputs))  # type: ignore[misc]
        return tuple(map(_shape, outputs)), tuple(map(_shape, saved))

    def forward(*inputs: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        inputs = _arrays(inputs)
        if not _traced(inputs):
            outputs, saved = rule.forward(*map(np.asarray, inputs))
            return tuple(map(jnp.asarray, outputs)), tuple(map(jnp.asarray, saved))
        outputs, saved = shapes_of(tuple(map(_shape, inputs)))

        def flat(*arrays: Any) -> tuple[Any, ...]:
            found = rule.forward(*arrays)
            return *found[0], *found[1]

        results = _called(flat, inputs, (*outputs, *saved), rule)
        return results[: len(outputs)], results[len(outputs) :]

    def needed(arrays: Sequence[Any]) -> tuple[Any, ...]:
        """The arrays that the derivative itself takes, in its order, of those that end with all inputs."""
        inputs = arrays[len(arrays) - count :]
        return *arrays[: len(arrays) - count], *(inputs[i] for i in rule.needs)

    def vjp(*arrays: Array) -> tuple[Array, ...]:
        return _called(lambda *given: rule.vjp(*needed(given)), arrays, arrays[len(arrays) - count :], rule)

    def jvp(*arrays: Array) -> tuple[Array, ...]:
        return _called(lambda *given: rule.jvp(*needed(given)), arrays, arrays[count : count + n], rule)

    forward.__signature__ = rule.forward.__signature__  # type: ignore[attr-defined]
    return rule._replace(forward=forward, vjp=vjp, jvp=jvp, needs=tuple(range(count)))


def _called(
    function: Callable[..., tuple[Any, ...]], arrays: Sequence[Array | None], results: Sequence[Any], rule: Rule
) -> tuple[Array, ...]:
    """Call a function of NumPy arrays whose results have known shapes; one that it leaves out is zero."""
    arrays, results = _arrays(arrays), _arrays(results)
    there = [x is not None for x in arrays]

    def call(*given: Any) -> tuple[Any, ...]:
        rest = iter(given)
        found = function(*(np.asarray(next(rest)) if is_there else None for is_there in there))
        # A callback must return what was promised, also where a function computes in double precision only.
        return tuple(
            np.zeros(like.shape, like.dtype) if y is None else np.asarray(y, like.dtype)
            for y, like in zip(found, shapes, strict=True)
        )

    given, shapes = [x for x in arrays if x is not None], tuple(map(_shape, results))
    if not _traced(given):
        return tuple(map(jnp.asarray, call(*given)))
    mapped = "sequential" if rule.one_by_one else "broadcast_all"

    @jax.custom_jvp
    def called(*given: Array) -> tuple[Array, ...]:
        return tuple(jax.pure_callback(call, shapes, *given, vmap_method=mapped))

    @called.defjvp
    def _(*_: Any) -> NoReturn:
        raise NotImplementedError(rule.refusal)

    return called(*given)  # type: ignore[no-any-return]


def _arrays(values: Sequence[Any]) -> tuple[Any, ...]:
    """Numbers of Python, which come as a private type of JAX, and arrays of NumPy as those of JAX."""
    kept = jax.Array | jax.ShapeDtypeStruct | None
    return tuple(x if isinstance(x, kept) else jnp.asarray(x) for x in values)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(x.shape), jax.dtypes.canonicalize_dtype(x.dtype))


def _traced(arrays: Sequence[Array]) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in arrays)
