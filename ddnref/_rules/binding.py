"""How bridges call a rule: its options bound once, its operators taken apart into arrays.

A framework differentiates with respect to arrays. An operator is taken apart into its parameters, which are arrays,
and a hashable rest of pure functions and shapes, and put together again where the operation runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, as_tuple, namespace_of, nan_where, with_axes
from ddnref._rules.contract import Rule
from ddnref.operators import LinearOperator

WARNING = (
    "A gradient is NaN for at least one item of the batch: the input is not finite, the loss depends on a choice "
    "inside repeated eigenvalues (see ddnref.gauge_residual), the function is not differentiable there (a singular "
    "matrix, a change of activity), or an iteration has not converged (see info). Call the operation and its VJP by "
    "hand with throw=True to see which."
)


# --- options ------------------------------------------------------------------------------------------------------


def options_of(rule: Rule, options: dict[str, Any], while_loop: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options between the forward and the VJP; both get ``throw=False``, as bridges call them.

    `while_loop` goes to those that iterate, unless the options name one.
    """
    forward, vjp = keywords(rule.forward), keywords(rule.vjp)
    unknown = set(options) - forward - vjp
    if unknown:
        raise TypeError(
            f"{rule.name} has no option {', '.join(sorted(unknown))}; it takes {', '.join(sorted(forward | vjp))}."
        )
    # Options that are given come last and replace the default of the bridge.
    given = {"while_loop": while_loop, **options, "throw": False}
    return {k: v for k, v in given.items() if k in forward}, {k: v for k, v in given.items() if k in vjp}


@cache
def keywords(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the keyword options of a function."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


@cache
def plain_forward(rule: Rule) -> Callable[..., tuple[tuple[Array, ...], tuple[Array, ...]]]:
    """The forward as ``(outputs, saved)``, two tuples, without the status of an iteration.

    Always the same function, so that a library that compiles does so once per shape.
    """
    function, iterates = rule.forward, rule.info is not None

    @wraps(function)
    def forward(*inputs: Array, **options: Any) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        result = function(*inputs, **options)
        outputs, saved = result[0] if iterates else result
        return as_tuple(outputs), saved

    return forward


@cache
def plain_vjp(rule: Rule) -> Callable[..., tuple[Array, ...]]:
    """The VJP as a tuple of cotangents, without the status of an iteration; always the same function, too."""
    # torch.compile accepts closures over a function and a flag, but not over a rule.
    function, iterates = rule.vjp, rule.vjp_info is not None

    @wraps(function)
    def vjp(*arrays: Array | None, **options: Any) -> tuple[Array, ...]:
        result = function(*arrays, **options)
        return as_tuple(result[0] if iterates else result)

    return vjp


class Bound(NamedTuple):
    """A rule with its options bound, as bridges call it."""

    forward: Callable[..., tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]]
    """Outputs, saved arrays, and the fields of ``rule.info``; outputs that have not converged are NaN."""
    reverse: Callable[..., tuple[Array | None, ...]]
    """``reverse(bars, arrays)``: from cotangents of outputs and saved arrays, or ``None``, to those of the inputs;
    `arrays` are outputs, saved arrays and the inputs that the rule needs."""
    undefined: Callable[..., Array] | None  # as in the rule, its tolerance bound
    result: Callable[..., Any]
    """``result(outputs, info)``: the return value of the operation, put together again."""


def bind(rule: Rule, options: dict[str, Any], while_loop: Any = None, solve: Callable[..., Any] | None = None) -> Bound:
    """Bind options once, or raise a ``TypeError`` that names those that are unknown or missing.

    `solve` is the function with which a recursive rule's VJP solves: the operation itself, made differentiable.
    """
    # An option without a default is required; without it the call inside the framework would fail obscurely.
    required = {
        p.name
        for function in (rule.forward, rule.vjp)
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)
    }
    if required - set(options):
        missing = ", ".join(f"{name}=..." for name in sorted(required - set(options)))
        raise TypeError(f"Bind the options of {rule.name} once: differentiable(ddnref.{rule.name}, {missing}).")
    forward_options, vjp_options = options_of(rule, options, while_loop)
    if rule.recursive and solve is not None:
        vjp_options["solve"] = solve
    # Closures over single fields, which torch.compile can guard.
    rtol = {"rtol": options["rtol"]} if "rtol" in options else {}
    function, undefined, iterates = rule.forward, rule.undefined, rule.info is not None

    def forward(*inputs: Array) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
        result = function(*inputs, **forward_options)
        if not iterates:
            return as_tuple(result[0]), result[1], ()
        # With throw=False an item that has not converged is returned as it is; a bridge must not pass it on.
        (outputs, saved), info = result
        outputs = tuple(nan_where(~spread(info.converged, y), y) for y in as_tuple(outputs))
        return outputs, saved, tuple(info)

    def result(outputs: tuple[Array, ...], info: tuple[Array, ...]) -> Any:
        value = outputs[0] if rule.outputs == 1 else outputs
        return value if rule.info is None else (value, rule.info(*info))

    return Bound(
        forward,
        _reverse(rule, vjp_options),
        None if undefined is None else lambda *arrays: undefined(*arrays, **rtol),
        result,
    )


def _reverse(rule: Rule, options: dict[str, Any]) -> Callable[..., tuple[Array | None, ...]]:
    vjp, n, saved_vjp = plain_vjp(rule), rule.outputs, rule.saved_vjp
    accepting = {**options, "gauge_rtol": float("inf")} if "gauge_rtol" in keywords(rule.vjp) else options

    def reverse(bars: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        # Cotangents of saved arrays come only from a second derivative.
        used = any(bar is not None for bar in bars[:n])
        if saved_vjp is None or all(bar is None for bar in bars[n:]):
            return vjp(*bars[:n], *arrays, **options) if used else ()
        # Second order: outputs and saved arrays hold the same eigenvectors, and only the sum is independent of gauge.
        through_saved = as_tuple(saved_vjp(*bars[n:], *arrays[n:]))
        if not used:
            return through_saved
        # So the gauge of one part alone is not checked.
        through_outputs = vjp(*bars[:n], *arrays, **accepting)
        return tuple(b if a is None else a + b for a, b in zip(through_saved, through_outputs, strict=True))

    return reverse


@cache
def inputs_of(rule: Rule) -> tuple[inspect.Parameter, ...]:
    """The arrays and operators that the operation takes."""
    return tuple(p for p in inspect.signature(rule.forward).parameters.values() if p.kind is p.POSITIONAL_ONLY)


def input_counts(rule: Rule) -> range:
    """How many inputs a call may have; some are optional."""
    inputs = inputs_of(rule)
    return range(sum(p.default is p.empty for p in inputs), len(inputs) + 1)


def spread(flags: Array, like: Array) -> Array:
    """One flag per item, shaped to broadcast against an array of these items, or any flag where it has no items."""
    if flags.ndim > like.ndim:
        return namespace_of(flags).any(flags)
    return with_axes(flags, like.ndim - flags.ndim)


def failed(x_bar: Array) -> Array:
    """Return where a gradient is NaN. One column tells, because all entries of a failed item are NaN."""
    return namespace_of(x_bar).isnan(x_bar[..., :1] if x_bar.ndim else x_bar)


# --- operators among the inputs -----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The composition of the inputs: which are operators, and how many arrays each holds."""

    parts: tuple[LinearOperator | None, ...]  # operators without their parameters, and None for arrays
    counts: tuple[int, ...]  # how many arrays each input is

    @property
    def plain(self) -> bool:
        """Whether there is no operator."""
        return all(part is None for part in self.parts)

    def select(self, positions: Sequence[int]) -> Layout:
        """The layout of some of the inputs; positions beyond the last are optional inputs that were not given."""
        given = [i for i in positions if i < len(self.parts)]
        return Layout(tuple(self.parts[i] for i in given), tuple(self.counts[i] for i in given))

    def places(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Positions of the arrays of these inputs among all arrays."""
        # Array j of input i is number starts[i] + j of all.
        starts = [sum(self.counts[:i]) for i in range(len(self.counts) + 1)]
        return tuple(j for i in positions if i < len(self.counts) for j in range(starts[i], starts[i + 1]))

    def join(self, arrays: Sequence[Array]) -> Iterator[Any]:
        """Put the inputs together again from all their arrays."""
        rest = iter(arrays)
        for part, count in zip(self.parts, self.counts, strict=True):
            own = tuple(next(rest) for _ in range(count))
            yield own[0] if part is None else part._replace(params=own)


def flatten(inputs: Sequence[Any]) -> tuple[Layout, tuple[Array, ...]]:
    """Take the inputs apart into a layout and arrays."""
    parts = tuple(x._replace(params=()) if isinstance(x, LinearOperator) else None for x in inputs)
    groups = [x.params if isinstance(x, LinearOperator) else (x,) for x in inputs]
    return Layout(parts, tuple(map(len, groups))), tuple(array for group in groups for array in group)


def refuse_foreign(rule: Rule, inputs: Sequence[Any], is_own: Callable[[Any], bool], wanted: str) -> None:
    """Raise ``TypeError`` for an input, or a parameter of an operator, that is not an array of the bridge's library."""
    # Not strict: where there are too many or too few, the call itself raises Python's own error.
    for parameter, x in zip(inputs_of(rule), inputs, strict=False):
        params = x.params if isinstance(x, LinearOperator) else (x,)
        for i, array in enumerate(params):
            if not is_own(array):
                name = f"{parameter.name}.params[{i}]" if isinstance(x, LinearOperator) else parameter.name
                kind = f"{type(array).__module__}.{type(array).__qualname__}"
                raise TypeError(f"{name} is a {kind}; pass {wanted}: nothing else is converted.")


def on_arrays(bound: Bound, rule: Rule, layout: Layout) -> Bound:
    """A bound operation that takes the arrays of a layout, and gives a cotangent for each."""
    if layout.plain:
        return bound
    # The VJP sees the needed inputs alone.
    needed = layout.select(rule.needs)
    count = sum(needed.counts)

    def forward(*arrays: Array) -> Any:
        return bound.forward(*layout.join(arrays))

    def reverse(bars: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        # The needed inputs are the last arrays; outputs and saved arrays come before them.
        results, inputs = arrays[: len(arrays) - count], arrays[len(arrays) - count :]
        return tuple(leaves(bound.reverse(bars, (*results, *needed.join(inputs)))))

    return bound._replace(forward=forward, reverse=reverse)


def leaves(bars: Any) -> Iterator[Array | None]:
    """Flatten cotangents: those of an operator are a tuple."""
    for bar in bars:
        if isinstance(bar, tuple):
            yield from leaves(bar)
        else:
            yield bar
