"""HIPS autograd: ``differentiable(op)`` makes an operation on NumPy arrays use our VJP, for first derivatives.

A complex gradient of autograd is the conjugate of ours; the bridge converts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from autograd.core import defvjp_argnums
from autograd.extend import Box, primitive
from autograd.tracer import getval

from ddnref._core.arrays import Array
from ddnref._rules.binding import Bound, Layout, bind, flatten, refuse_foreign
from ddnref._rules.contract import Rule
from ddnref._rules.table import rule_of
from ddnref.interop._numpy_pair import numpy_pair, refuse_second_derivative


def differentiable(operation: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations into a function that HIPS autograd differentiates with our VJP.

    Parameters
    ----------
    operation : callable
        A public operation with a rule, such as ``ddnref.eigh``.
    **options
        Options of the operation and of its VJP, bound once: ``differentiable(ddnref.eigh_topk, k=4)``.

    Returns
    -------
    function : callable
        Takes arrays or autograd's boxes and returns the same values as the operation. Gradients follow the convention
        of ``autograd.grad``.

    Raises
    ------
    TypeError
        The operation has no rule, an option is unknown, or a required one is missing.
    NotImplementedError
        When a second derivative is taken: autograd traces NumPy functions, not those of the array API.

    Notes
    -----
    Where no gradient exists (a gauge-dependent loss, a singular matrix), that item's gradient is NaN and a warning
    says why. The status of an iteration is a plain array. Make an operator from plain arrays first; its method
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
    rule = rule_of(operation)
    bound = bind(rule, options)
    operate = lru_cache(maxsize=16)(partial(_operation, rule, bound))
    n, fields = rule.outputs, rule.info_fields

    def function(*inputs: Any) -> Any:
        refuse_foreign(rule, inputs, lambda x: isinstance(x, np.ndarray | np.generic | Box), "a NumPy array")
        layout, arrays = flatten(inputs)
        flat = operate(layout)(*arrays)
        # The status has no gradient, so it leaves autograd here.
        info = tuple(_bare(flat[i]) for i in range(len(flat) - fields, len(flat)))
        return bound.result(tuple(flat[i] for i in range(n)), info)

    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = operation.__doc__
    return function


def _operation(rule: Rule, bound: Bound, layout: Layout) -> Callable[..., Any]:
    """A primitive of the arrays of a layout, which returns outputs, saved arrays and status in one tuple."""
    forward, reverse_on_numpy = numpy_pair(rule, bound, layout)
    operate = primitive(forward)
    needs, n, fields = layout.places(rule.needs), rule.outputs, rule.info_fields

    # The VJP is a primitive too, so that its own derivative can be refused.
    @primitive
    def reverse(*arrays: Array) -> tuple[Array, ...]:
        # Conjugate on the way in and out, for autograd's convention.
        gradients = reverse_on_numpy(tuple(map(np.conj, arrays[:n])), arrays[n:])
        return tuple(None if g is None else np.conj(g) for g in gradients)

    def pull(argnums: Sequence[int], flat: Any, inputs: tuple[Any, ...], _: Any) -> Callable[[Any], list[Any]]:
        results = tuple(flat[i] for i in range(len(flat) - fields))

        def cotangents(bars: Any) -> list[Any]:
            arrays = *results, *(inputs[i] for i in needs if i < len(inputs))
            found = reverse(*(bars[i] for i in range(n)), *arrays)
            found = found or (None,) * len(inputs)  # no output was used
            return [np.zeros_like(_bare(inputs[i])) if found[i] is None else found[i] for i in argnums]

        return cotangents

    defvjp_argnums(operate, pull)
    defvjp_argnums(reverse, refuse_second_derivative("autograd"))
    return operate  # type: ignore[no-any-return]


def _bare(value: Any) -> Any:
    """The array inside all of autograd's boxes."""
    while isinstance(value, Box):
        value = getval(value)
    return value
