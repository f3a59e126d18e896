"""TensorFlow: ``differentiable(op)`` makes an operation use our VJP and JVP, eagerly and inside ``tf.function``.

TensorFlow's tensors do not follow the array API, so everything runs on the CPU, on NumPy arrays that view the tensors:
at once in eager mode, through ``tf.numpy_function`` in a graph. Complex gradients have the same convention as ours.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np

from ddnref.interop._extras import needed_by_bridge

with needed_by_bridge("tensorflow"):
    import tensorflow as tf

from ddnref._core.arrays import Array
from ddnref._rules.binding import Bound, Bridged, Layout, flatten, numbers_as_arrays, refuse_foreign
from ddnref._rules.contract import Rule
from ddnref._rules.own import by_count
from ddnref._rules.table import rule_of
from ddnref.interop._on_numpy import bind_on_numpy, on_numpy, own_on_numpy, refuse_second_derivative

Tensor: TypeAlias = Any  # TensorFlow is optional, so that types must not depend on it
Spec: TypeAlias = Any  # tf.TensorSpec: dtype and shape of a tensor in a graph, None for unknown lengths


def differentiable(operation: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations, or a function of yours, into one that TensorFlow differentiates.

    Operations, options, functions of yours and missing gradients are those of all bridges, see `ddnref.interop`. The
    function takes tensors, variables or NumPy arrays. ``tf.autodiff.ForwardAccumulator`` gives the tangents of the JVP
    in eager mode.

    Raises
    ------
    ValueError
        Inside ``tf.function``, when too little is known of the shapes of the inputs to tell those of the outputs.
    NotImplementedError
        When a second derivative is asked for, because the derivatives run outside of TensorFlow, or forward mode in a
        graph, where TensorFlow loses the tangents of such calls.

    Notes
    -----
    The status of an iteration has no gradient. Make an operator from NumPy arrays first; its method
    ``with_params(...)`` then takes tensors. ``jit_compile=True`` raises, because XLA cannot call Python, and another
    process cannot load a saved model.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from ddnref.interop.tensorflow import differentiable
    >>> eigh, x = differentiable(ddnref.eigh), tf.Variable([[1.0, 0.0], [0.0, 2.0]])
    >>> with tf.GradientTape() as tape:
    ...     largest = eigh(x)[0][1]
    >>> tape.gradient(largest, x).numpy().tolist()
    [[0.0, 0.0], [0.0, 1.0]]
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
    n = rule.outputs

    def function(*inputs: Any) -> Any:
        def is_tensor(x: Any) -> bool:
            return isinstance(x, np.ndarray | np.generic) or bool(tf.is_tensor(x))

        inputs = numbers_as_arrays(rule.forward, inputs, lambda number, x: tf.constant(number, x.dtype))
        refuse_foreign(rule, inputs, is_tensor, "a tensor, a variable or a NumPy array")
        layout, arrays = flatten(inputs)
        flat = operate(layout)(*map(tf.convert_to_tensor, arrays))
        return bound.result(flat[:n], tuple(map(tf.stop_gradient, flat[n:])))

    return tf.autograph.experimental.do_not_convert(function)  # type: ignore[no-any-return]


def _operation(rule: Rule, bound: Bound, layout: Layout) -> Callable[..., tuple[Tensor, ...]]:
    """A function of the tensors of a layout, with our VJP and JVP, that returns outputs and status."""
    there = on_numpy(rule, bound, layout)
    forward = there.forward
    needs, n, count = layout.places(rule.needs), rule.outputs, sum(layout.counts)

    @lru_cache(maxsize=64)
    def specs(*inputs: Spec) -> tuple[Spec, ...]:
        return _specs(rule, forward, layout, inputs)

    @tf.custom_gradient
    def operate(*inputs: Tensor) -> tuple[Any, Callable[..., Any]]:
        flat = _on_numpy(forward, inputs, specs)
        results, info = flat[: len(flat) - rule.info_fields], flat[len(flat) - rule.info_fields :]

        def pull(*bars: Tensor | None) -> Any:
            # The status has cotangents too, which count for nothing.
            pairs = zip(bars[:n], results[:n], strict=True)
            given = (tf.zeros_like(y) if bar is None else tf.convert_to_tensor(bar) for bar, y in pairs)
            return reverse(*given, *results, *inputs)

        return (*results[:n], *info), pull

    def reverse(*tensors: Tensor) -> Any:
        # All inputs, also those that the VJP does not need: a second derivative may come through any, and is refused.
        return linear(*tensors[:n], *_fixed(*tensors[n:]))

    @tf.custom_gradient
    def linear(*tensors: Tensor) -> tuple[Any, Callable[..., Any]]:
        """The VJP as a linear map of cotangents, whose gradient is its transpose: the JVP."""
        rest = tensors[n:]
        if _call.runs:
            gradients = tuple(map(tf.zeros_like, tensors[len(tensors) - count :]))
        else:
            gradients = _on_numpy(gradients_of, tensors, lambda *specs: specs[len(specs) - count :])

        def transposed(*dots: Tensor) -> Any:
            if not tf.executing_eagerly():
                raise NotImplementedError(_IN_GRAPH.format(rule.name))
            moved = push(*map(tf.convert_to_tensor, dots), *rest)
            # Zeros, not None, so that what holds the rest fixed is asked.
            return (*((moved,) if n == 1 else moved), *map(tf.zeros_like, rest))

        # TensorFlow takes longer for a tuple of one.
        return (gradients[0] if count == 1 else gradients), transposed

    @tf.custom_gradient
    def push(*tensors: Tensor) -> tuple[Any, Callable[..., Any]]:
        moved = _on_numpy(tangents_of, tensors, lambda *specs: specs[count : count + n])
        return (moved[0] if n == 1 else moved), refuse_second_derivative("TensorFlow")

    def needed(rest: Sequence[Array]) -> tuple[Array, ...]:
        """The last arrays that a derivative takes, from results and all inputs."""
        results, inputs = rest[: len(rest) - count], rest[len(rest) - count :]
        return *results, *(inputs[i] for i in needs if i < count)

    def gradients_of(*arrays: Array) -> tuple[Array, ...]:
        gradients = there.reverse(arrays[:n], needed(arrays[n:]))
        inputs = arrays[len(arrays) - count :]
        return tuple(np.zeros_like(x) if g is None else g for x, g in zip_longest(inputs, gradients[:count]))

    def tangents_of(*arrays: Array) -> tuple[Array, ...]:
        return there.push(arrays[:count], needed(arrays[count:])) or tuple(
            map(np.zeros_like, arrays[count : count + n])
        )

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        _call.runs = True
        try:
            return operate(*inputs)  # type: ignore[no-any-return]
        finally:
            _call.runs = False

    return call


class _Call(threading.local):
    """Whether an operation runs in this thread.

    Reverse mode pulls cotangents after the call. Forward mode pulls meaningless ones before the call returns, and only
    to transpose what that does; their gradient need not be computed, and must not warn.
    """

    runs = False


_call = _Call()
_IN_GRAPH = (
    "Forward mode of {}, or a second derivative, was asked for inside tf.function. TensorFlow loses the tangents of "
    "functions that a graph calls through ddnref's bridge to TensorFlow, which gives first derivatives only: use "
    "tf.autodiff.ForwardAccumulator in eager mode."
)


@tf.custom_gradient
def _fixed(*tensors: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    """Tensors as they are, with no derivative: if one is asked for, it is a second derivative of the operation."""
    return tuple(map(tf.identity, tensors)), refuse_second_derivative("TensorFlow")


def _on_numpy(
    function: Callable[..., tuple[Array, ...]], tensors: Sequence[Tensor], specs: Callable[..., tuple[Spec, ...]]
) -> tuple[Tensor, ...]:
    """Call a function of NumPy arrays now, or put the call into the graph that is being built.

    `specs` takes the `Spec` of each tensor and returns that of each result.
    """
    if tf.executing_eagerly():
        return tuple(map(tf.constant, function(*map(np.asarray, tensors))))
    if any(x.shape.rank is None for x in tensors):
        raise ValueError(
            "An input has no known rank inside tf.function: tell it with input_signature or tf.ensure_shape."
        )
    found = specs(*(tf.TensorSpec(x.shape, x.dtype) for x in tensors))
    # The graph learns dtypes and shapes only from us.
    results = tf.numpy_function(function, tensors, [spec.dtype for spec in found], stateful=False)
    for result, spec in zip(results, found, strict=True):
        result.set_shape(spec.shape)
    return tuple(results)


def _specs(
    rule: Rule, forward: Callable[..., tuple[Array, ...]], layout: Layout, inputs: tuple[Spec, ...]
) -> tuple[Spec, ...]:
    """Find dtypes and shapes of the results from two runs of the forward that have almost nothing to compute.

    A function of a user, which need not take batches, says them itself. The runs differ in the lengths of unknown axes
    of the inputs. An axis of a result is unknown if its lengths differ.
    """
    known = all(None not in spec.shape for spec in inputs)
    shapes = ", ".join(str(list(spec.shape)) for spec in inputs)
    try:
        with np.errstate(all="ignore"):
            first, last = (
                forward(*_trial_inputs(rule, layout, inputs, i)) if rule.shapes is None
                else [np.asarray(y) for group in rule.shapes(*_of_length(inputs, (5, 7)[i])) for y in group]
                for i in range(2)
            )  # fmt: skip
    except ValueError as error:
        if known:
            # The error names the lengths of the trial. Real lengths raise one that names those of the user.
            forward(*(np.ones(spec.shape, spec.dtype.as_numpy_dtype) for spec in inputs))
            raise
        raise ValueError(
            f"The shapes that {rule.name} returns do not follow from {shapes}, where None is not known before the "
            f"graph runs: tell more lengths with input_signature or tf.ensure_shape. {error}"
        ) from error
    batch = 1 if layout.plain and rule.shapes is None else 0  # the axis of length zero that the trial adds
    return tuple(
        tf.TensorSpec([a if a == b else None for a, b in zip(y.shape[batch:], z.shape[batch:], strict=True)], y.dtype)
        for y, z in zip(first, last, strict=True)
    )


def _of_length(inputs: tuple[Spec, ...], length: int) -> list[Array]:
    """Zeros for the inputs, with this length for unknown axes."""
    return [np.zeros([length if n is None else n for n in x.shape], x.dtype.as_numpy_dtype) for x in inputs]


def _trial_inputs(rule: Rule, layout: Layout, inputs: tuple[Spec, ...], run: int) -> list[Array]:
    """Inputs for a trial run: an empty batch, or, as not all operators take batches, a right-hand side of zeros."""
    # In an empty batch unknown axes cost no memory, so they are longer than any k. With an operator they must be short.
    length = (251, 257)[run] if layout.plain else (2, 3)[run]
    shapes = [tuple(length if n is None else n for n in spec.shape) for spec in inputs]
    dtypes = [spec.dtype.as_numpy_dtype for spec in inputs]
    if not layout.plain:
        fills = (value for part, count in zip(*layout, strict=True) for value in (0 if part is None else 1,) * count)
        return [np.full(shape, *rest) for shape, *rest in zip(shapes, fills, dtypes, strict=True)]
    # Inputs that broadcast against each other get axes of length one, so that the empty axes meet.
    own = rule.item_axes[: len(shapes)] or [len(shape) for shape in shapes]
    lead = max(len(shape) - n for shape, n in zip(shapes, own, strict=True))
    levels = [(0, *(1,) * (lead + n - len(shape)), *shape) for shape, n in zip(shapes, own, strict=True)]
    return list(map(np.zeros, levels, dtypes))
