"""TensorFlow: ``differentiable(op)`` makes an operation use our VJP, eagerly and inside ``tf.function``.

TensorFlow's tensors do not follow the array API, so everything runs on the CPU, on NumPy arrays that view the tensors:
at once in eager mode, through ``tf.numpy_function`` in a graph. Complex gradients have the same convention as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from ddnref._core.arrays import Array
from ddnref._rules.binding import Bound, Layout, bind, flatten, refuse_foreign
from ddnref._rules.contract import Rule
from ddnref._rules.table import rule_of
from ddnref.interop._numpy_pair import numpy_pair, refuse_second_derivative

Tensor: TypeAlias = Any  # TensorFlow is optional, so that types must not depend on it


Spec: TypeAlias = Any  # tf.TensorSpec: dtype and shape of a tensor in a graph, None for unknown lengths


def differentiable(operation: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations into a function that TensorFlow differentiates with our VJP.

    Parameters
    ----------
    operation : callable
        A public operation with a rule, such as ``ddnref.eigh``.
    **options
        Options of the operation and of its VJP, bound once: ``differentiable(ddnref.eigh_topk, k=4)``.

    Returns
    -------
    function : callable
        Takes tensors, variables or NumPy arrays and returns the values of the operation as tensors.

    Raises
    ------
    TypeError
        The operation has no rule, an option is unknown, a required one is missing, or an input is not an array.
    ValueError
        Inside ``tf.function``, when too little is known of the shapes of the inputs to tell those of the outputs.
    NotImplementedError
        When a second derivative or forward mode is asked for, because the VJP runs outside of TensorFlow.

    Notes
    -----
    Where no gradient exists (a gauge-dependent loss, a singular matrix), that item's gradient is NaN and a warning
    says why. The status of an iteration has no gradient. Make an operator from NumPy arrays first; its method
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
    rule = rule_of(operation)
    bound = bind(rule, options)
    operate = lru_cache(maxsize=16)(partial(_operation, rule, bound))
    n = rule.outputs

    def function(*inputs: Any) -> Any:
        def is_tensor(x: Any) -> bool:
            return isinstance(x, np.ndarray | np.generic) or bool(tf.is_tensor(x))

        refuse_foreign(rule, inputs, is_tensor, "a tensor, a variable or a NumPy array")
        layout, arrays = flatten(inputs)
        flat = operate(layout)(*map(tf.convert_to_tensor, arrays))
        return bound.result(flat[:n], tuple(map(tf.stop_gradient, flat[n:])))

    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = operation.__doc__
    return tf.autograph.experimental.do_not_convert(function)  # type: ignore[no-any-return]


def _operation(rule: Rule, bound: Bound, layout: Layout) -> Callable[..., tuple[Tensor, ...]]:
    """A function of the tensors of a layout, with our VJP, that returns outputs and status."""
    forward, reverse_on_numpy = numpy_pair(rule, bound, layout)
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

    # It takes also inputs that the VJP does not need: a second derivative may come through them, and is refused.
    @tf.custom_gradient
    def reverse(*tensors: Tensor) -> tuple[Any, Callable[..., Any]]:
        gradients = _on_numpy(on_numpy, tensors, lambda *specs: specs[len(specs) - count :])
        # TensorFlow takes longer for a tuple of one.
        return (gradients[0] if count == 1 else gradients), refuse_second_derivative("TensorFlow")

    def on_numpy(*arrays: Array) -> tuple[Array, ...]:
        results, inputs = arrays[n : len(arrays) - count], arrays[len(arrays) - count :]
        gradients = reverse_on_numpy(arrays[:n], (*results, *(inputs[i] for i in needs if i < count)))
        return tuple(np.zeros_like(x) if g is None else g for x, g in zip_longest(inputs, gradients[:count]))

    return operate  # type: ignore[no-any-return]


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

    The runs differ in the lengths of unknown axes of the inputs. An axis of a result is unknown if its lengths differ.
    """
    known = all(None not in spec.shape for spec in inputs)
    shapes = ", ".join(str(list(spec.shape)) for spec in inputs)
    try:
        with np.errstate(all="ignore"):
            first, last = (forward(*_trial_inputs(rule, layout, inputs, i)) for i in range(2))
    except ValueError as error:
        if known:
            # The error names the lengths of the trial. Real lengths raise one that names those of the user.
            forward(*(np.ones(spec.shape, spec.dtype.as_numpy_dtype) for spec in inputs))
            raise
        raise ValueError(
            f"The shapes that {rule.name} returns do not follow from {shapes}, where None is not known before the "
            f"graph runs: tell more lengths with input_signature or tf.ensure_shape. {error}"
        ) from error
    batch = 1 if layout.plain else 0  # the axis of length zero that the trial adds
    return tuple(
        tf.TensorSpec([a if a == b else None for a, b in zip(y.shape[batch:], z.shape[batch:], strict=True)], y.dtype)
        for y, z in zip(first, last, strict=True)
    )


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
