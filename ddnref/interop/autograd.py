"""HIPS autograd: ``differentiable(op)`` makes an operation on NumPy arrays use our VJP and JVP, for first derivatives.

A complex gradient of autograd is the conjugate of ours; the bridge converts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ddnref.interop._extras import needed_by_bridge

with needed_by_bridge("autograd"):
    from autograd.core import defjvp_argnums, defvjp_argnums
    from autograd.extend import Box, primitive
    from autograd.tracer import getval

from ddnref._core.arrays import Array
from ddnref._rules.binding import Bound, Bridged, Layout, flatten, numbers_as_arrays, refuse_foreign
from ddnref._rules.contract import Rule
from ddnref._rules.own import by_count
from ddnref._rules.table import rule_of
from ddnref.interop._on_numpy import bind_on_numpy, on_numpy, own_on_numpy, refuse_second_derivative


def differentiable(operation: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations, or a function of yours, into one that HIPS autograd differentiates.

    Operations, options, functions of yours and missing gradients are those of all bridges, see `ddnref.interop`. The
    function takes arrays or autograd's boxes. Gradients follow the convention of ``autograd.grad``, and
    ``autograd.make_jvp`` gives the tangents of the JVP.

    Raises
    ------
    NotImplementedError
        When a second derivative is taken, in any order of the modes: autograd traces NumPy functions, not those of the
        array API.

    Notes
    -----
    The status of an iteration is a plain array. Make an operator from plain arrays first; its method
    ``with_params(...)`` then takes autograd's boxes.

    Examples
    --------
    >>> import autograd, autograd.numpy as np
    >>> from ddnref.interop.autograd import differentiable
    >>> eigh = differentiable(ddnref.eigh)
    >>> autograd.grad(lambda x: eigh(x)[0][1])(np.diag(np.array([1.0, 2.0])))
    array([[0., 0.],
           [0., 1.]])
    """
    own = own_on_numpy(operation, options)
    if own is not None:
        return Bridged(by_count(own, partial(_function, options={})), own, differentiable, options)
    rule = rule_of(operation)
    return Bridged(_function(rule, options), rule, differentiable, options)


def _function(rule: Rule, options: dict[str, Any]) -> Callable[..., Any]:
    """The function that the user calls: it takes operators apart and puts the results together."""
    bound = bind_on_numpy(rule, options)
    operate = lru_cache(maxsize=16)(partial(_operation, rule, bound))
    n, fields = rule.outputs, rule.info_fields

    def function(*inputs: Any) -> Any:
        inputs = numbers_as_arrays(rule.forward, inputs, lambda number, x: np.asarray(number, _bare(x).dtype))
        refuse_foreign(rule, inputs, lambda x: isinstance(x, np.ndarray | np.generic | Box), "a NumPy array")
        layout, arrays = flatten(inputs)
        flat = operate(layout)(*arrays)
        # The status has no gradient, so it leaves autograd here.
        info = tuple(_bare(flat[i]) for i in range(len(flat) - fields, len(flat)))
        return bound.result(tuple(flat[i] for i in range(n)), info)

    return function


def _operation(rule: Rule, bound: Bound, layout: Layout) -> Callable[..., Any]:
    """A primitive of the arrays of a layout, which returns outputs, saved arrays and status in one tuple."""
    there = on_numpy(rule, bound, layout)
    operate = primitive(there.forward)
    needs, n, fields = layout.places(rule.needs), rule.outputs, rule.info_fields
    count = sum(layout.counts)

    # The derivatives are primitives too, so that their own derivatives can be refused.
    @primitive
    def reverse(*arrays: Array) -> tuple[Array, ...]:
        # Conjugate on the way in and out, for autograd's convention.
        gradients = there.reverse(tuple(map(np.conj, arrays[:n])), arrays[n:])
        return tuple(None if g is None else np.conj(g) for g in gradients)

    @primitive
    def push(*arrays: Array | None) -> tuple[Array, ...]:
        # Tangents have no convention to convert.
        dots, rest = arrays[:count], arrays[count:]
        return there.push(dots, rest) or tuple(map(np.zeros_like, rest[:n]))

    def kept(flat: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The last arrays that a derivative takes: outputs, saved arrays and the needed inputs."""
        results = (flat[i] for i in range(len(flat) - fields))
        return *results, *(inputs[i] for i in needs if i < len(inputs))

    def pull(argnums: Sequence[int], flat: Any, inputs: tuple[Any, ...], _: Any) -> Callable[[Any], list[Any]]:
        arrays = kept(flat, inputs)

        def cotangents(bars: Any) -> list[Any]:
            found = reverse(*(bars[i] for i in range(n)), *arrays)
            found = found or (None,) * len(inputs)  # no output was used
            return [np.zeros_like(_bare(inputs[i])) if found[i] is None else found[i] for i in argnums]

        return cotangents

    def tangents(argnums: Sequence[int], dots: Sequence[Any], flat: Any, inputs: tuple[Any, ...], _: Any) -> Any:
        moving = dict(zip(argnums, dots, strict=True))
        found = push(*map(moving.get, range(count)), *kept(flat, inputs))
        # Nothing uses those of saved arrays and of the status.
        return (*found, *(None,) * (len(flat) - n))

    defvjp_argnums(operate, pull)
    defjvp_argnums(operate, tangents)
    for derivative in (reverse, push):
        defvjp_argnums(derivative, refuse_second_derivative("autograd"))
        defjvp_argnums(derivative, refuse_second_derivative("autograd"))
    return operate  # type: ignore[no-any-return]


def _bare(value: Any) -> Any:
    """The array inside all of autograd's boxes."""
    while isinstance(value, Box):
        value = getval(value)
    return value
