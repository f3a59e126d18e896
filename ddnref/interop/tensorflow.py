"""TensorFlow: ``differentiable(op)`` makes an operation use our VJP, eagerly and inside ``tf.function``.

TensorFlow's tensors do not follow the array API, so both ways run on the CPU on NumPy's view of the tensors: at once in
eager mode, through ``tf.numpy_function`` in a graph. TensorFlow's convention for complex gradients is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from ddnref._core.arrays import Array
from ddnref._rules.binding import Bound, Layout, bind, flatten, refuse_foreign
from ddnref._rules.contract import Rule
from ddnref._rules.table import rule_of
from ddnref.interop._host import FIRST_ORDER, pair

Tensor: TypeAlias = Any  # TensorFlow is optional, so that types must not depend on it


class Spec(NamedTuple):
    """What a graph knows of an array."""

    dtype: Any
    shape: tuple[int | None, ...]
    """``None`` for axes whose length is told at run time."""

    def lengths(self, unknown: int = 0) -> tuple[int, ...]:
        """The shape, with a length for those axes."""
        return tuple(unknown if n is None else n for n in self.shape)


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
        Takes tensors, variables or NumPy arrays, returns what the operation returns, as tensors.

    Raises
    ------
    TypeError
        The operation has no rule, an option is unknown, a required one is missing, or an input is no array.
    ValueError
        Inside ``tf.function``, when the shapes of the outputs do not follow from what is known of the inputs'.
    NotImplementedError
        When a second derivative or forward mode is asked for: the VJP runs outside of TensorFlow.

    Notes
    -----
    Where no gradient exists (a gauge-dependent loss, a singular matrix), that item's gradient is NaN and a warning
    says why. The status of an iteration has no gradient. An operator is made of NumPy arrays first; then
    ``operator.with_params(...)`` takes tensors. ``jit_compile=True`` raises, for XLA cannot call Python, and a saved
    model cannot be loaded by another process.

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
        refuse_foreign(rule, inputs, _is_tensor, "a tensor, a variable or a NumPy array")
        layout, arrays = flatten(inputs)
        flat = operate(layout)(*map(tf.convert_to_tensor, arrays))
        return bound.result(flat[:n], tuple(map(tf.stop_gradient, flat[n:])))

    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = operation.__doc__
    return tf.autograph.experimental.do_not_convert(function)  # type: ignore[no-any-return]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, np.ndarray | np.generic) or bool(tf.is_tensor(x))


def _operation(rule: Rule, bound: Bound, layout: Layout) -> Callable[..., tuple[Tensor, ...]]:
    """Outputs and status as a function of tensors, with our VJP."""
    host = pair(rule, bound, layout)
    needs, n, count = layout.places(rule.needs), rule.outputs, sum(layout.counts)

    @lru_cache(maxsize=64)
    def specs(*inputs: Spec) -> tuple[Spec, ...]:
        return _specs(rule, host.forward, layout, inputs)

    @tf.custom_gradient
    def operate(*inputs: Tensor) -> tuple[Any, Callable[..., Any]]:
        flat = _on_host(host.forward, inputs, specs)
        results, info = flat[: len(flat) - rule.info_fields], flat[len(flat) - rule.info_fields :]

        def pull(*bars: Tensor | None) -> Any:
            pairs = zip(bars[:n], results[:n], strict=True)
            given = (tf.zeros_like(y) if bar is None else tf.convert_to_tensor(bar) for bar, y in pairs)
            return reverse(*given, *results, *inputs)

        return (*results[:n], *info), pull

    @tf.custom_gradient  # of all inputs, also those that the VJP does not need: a second derivative comes through them
    def reverse(*tensors: Tensor) -> tuple[Any, Callable[..., Any]]:
        gradients = _on_host(pulled, tensors, lambda *specs: specs[len(specs) - count :])
        return (gradients[0] if count == 1 else gradients), _refuse  # TensorFlow takes longer over a tuple of one

    def pulled(*arrays: Array) -> tuple[Array, ...]:
        results, inputs = arrays[n : len(arrays) - count], arrays[len(arrays) - count :]
        gradients = host.reverse(arrays[:n], (*results, *(inputs[i] for i in needs if i < count)))
        return tuple(np.zeros_like(x) if g is None else g for x, g in zip_longest(inputs, gradients[:count]))

    return operate  # type: ignore[no-any-return]


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(FIRST_ORDER.format("TensorFlow"))


def _on_host(
    function: Callable[..., tuple[Array, ...]], tensors: Sequence[Tensor], specs: Callable[..., tuple[Spec, ...]]
) -> tuple[Tensor, ...]:
    """A function of NumPy arrays, called now, or by the graph that is being built: `specs` tells it the results."""
    if tf.executing_eagerly():
        return tuple(map(tf.constant, function(*map(np.asarray, tensors))))
    found = specs(*map(_spec, tensors))
    results = tf.numpy_function(function, tensors, [spec.dtype for spec in found], stateful=False)
    for result, spec in zip(results, found, strict=True):
        result.set_shape(spec.shape)
    return tuple(results)


def _spec(x: Tensor) -> Spec:
    if x.shape.rank is None:
        raise ValueError(
            "An input has no known rank inside tf.function: tell it with input_signature or tf.ensure_shape."
        )
    return Spec(x.dtype, tuple(x.shape))


def _specs(
    rule: Rule, forward: Callable[..., tuple[Array, ...]], layout: Layout, inputs: tuple[Spec, ...]
) -> tuple[Spec, ...]:
    """What the forward returns, seen from two runs in which there is next to nothing to compute.

    They differ in the lengths of the axes that are not known; where their results differ, an axis is not known either.
    """
    known = all(None not in spec.shape for spec in inputs)
    shapes = ", ".join(str(list(spec.shape)) for spec in inputs)
    try:
        with np.errstate(all="ignore"):
            first, last = (forward(*_probe(rule, layout, inputs, i)) for i in range(2))
    except ValueError as error:
        if known:
            forward(*(np.ones(spec.lengths(), spec.dtype.as_numpy_dtype) for spec in inputs))  # says which is wrong
            raise
        raise ValueError(
            f"The shapes that {rule.name} returns do not follow from {shapes}, where None is not known before the "
            f"graph runs: tell more lengths with input_signature or tf.ensure_shape. {error}"
        ) from error
    batch = 1 if layout.plain else 0
    return tuple(
        Spec(y.dtype, tuple(a if a == b else None for a, b in zip(y.shape[batch:], z.shape[batch:], strict=True)))
        for y, z in zip(first, last, strict=True)
    )


def _probe(rule: Rule, layout: Layout, inputs: tuple[Spec, ...], run: int) -> list[Array]:
    """An empty batch of inputs; beside operators, which not all take batches, a right-hand side of zeros.

    Axes that are not known are longer than any k, which takes no memory, or of an operator's batch, which does.
    """
    length = (251, 257)[run] if layout.plain else (2, 3)[run]
    shapes = [spec.lengths(length) for spec in inputs]
    dtypes = [spec.dtype.as_numpy_dtype for spec in inputs]
    if not layout.plain:
        fills = (value for part, count in zip(*layout, strict=True) for value in (0 if part is None else 1,) * count)
        return [np.full(shape, *rest) for shape, *rest in zip(shapes, fills, dtypes, strict=True)]
    own = rule.item_axes[: len(shapes)] or [len(shape) for shape in shapes]
    lead = max(len(shape) - n for shape, n in zip(shapes, own, strict=True))
    levels = [(0, *(1,) * (lead + n - len(shape)), *shape) for shape, n in zip(shapes, own, strict=True)]
    return list(map(np.zeros, levels, dtypes))
