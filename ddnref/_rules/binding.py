"""How bridges call a rule: its options bound once, its operators taken apart into arrays.

A framework differentiates with respect to arrays. An operator is taken apart into its parameters, which are arrays,
and a hashable rest of pure functions and shapes, and put together again where the operation runs.
"""

from __future__ import annotations

import inspect
import numbers
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, as_tuple, first_flagged, listed, namespace_of, nan_where, with_axes
from ddnref._kernels.public import CHECKS
from ddnref._rules.contract import Rule
from ddnref._rules.own import Own, own_rule
from ddnref.operators import LinearOperator
from ddnref.operators._operator import is_known

NAN = (
    "A gradient is NaN ({}): the input is not finite, the loss depends on a choice inside repeated eigenvalues (see "
    "ddnref.gauge_residual), the function is not differentiable there (a singular matrix, a change of activity), or "
    "an iteration has not converged (see info). Call the operation and its VJP by hand with throw=True to see which."
)
NAN_TANGENT = (
    "A tangent is NaN ({}): the input or its tangent is not finite, the direction splits repeated eigenvalues (see "
    "ddnref.eigh_jvp), the function is not differentiable there (a singular matrix, a change of activity), or an "
    "iteration has not converged (see info). Call the operation and its JVP by hand with throw=True to see which."
)
ITERATE = (
    "A gradient is that of an iterate ({}): the iteration, or the one that solves for the derivative, has not "
    'converged, and on_failure="iterate" goes on as if it had. Its error is about that of the iterate (see info).'
)
"""Warnings of bridges, with the place of the operation and the items."""

_remembered = lru_cache(maxsize=1024)  # functions of users come and go


# --- options ------------------------------------------------------------------------------------------------------


def options_of(rule: Rule, options: dict[str, Any], while_loop: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options between the forward and the VJP; both get ``throw=False``, as bridges call them.

    `while_loop` goes to those that iterate, unless the options name one.
    """
    forward, vjp = keywords(rule.forward), keywords(rule.vjp)
    known = forward | vjp | keywords(rule.jvp) | keywords(rule.second)
    unknown = set(options) - known
    if unknown:
        raise TypeError(f"{rule.name} has no option {', '.join(sorted(unknown))}; it takes {', '.join(sorted(known))}.")
    # Options that are given come last and replace the default of the bridge.
    given = {"while_loop": while_loop, **options, "throw": False}
    return {k: v for k, v in given.items() if k in forward}, {k: v for k, v in given.items() if k in vjp}


def jvp_options_of(rule: Rule, options: dict[str, Any], while_loop: Any = None) -> dict[str, Any]:
    """Select the options of the JVP: those of the VJP that it takes as well, and those that it alone takes."""
    _, of_vjp = options_of(rule, options, while_loop)
    others = keywords(rule.forward) | keywords(rule.vjp)  # a start of the forward is none of the JVP
    alone = {name: value for name, value in options.items() if name not in others}
    given = {**alone, "throw": False, **of_vjp}
    return {name: value for name, value in given.items() if name in keywords(rule.jvp)}


@_remembered
def keywords(function: Callable[..., Any] | None) -> frozenset[str]:
    """The names of the keyword options of a function; none where there is no function."""
    if function is None:
        return frozenset()
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


@_remembered
def required_of(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the options without a default."""
    parameters = inspect.signature(function).parameters.values()
    given_by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return frozenset(p.name for p in parameters if p.default is p.empty and p.kind not in given_by_place)


@_remembered
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


@_remembered
def plain_vjp(rule: Rule) -> Callable[..., tuple[Array, ...]]:
    """The VJP as a tuple of cotangents, without the status of an iteration; always the same function, too."""
    return _without_status(rule.vjp, rule.vjp_info is not None)


@_remembered
def plain_jvp(rule: Rule) -> Callable[..., tuple[Array, ...]]:
    """The JVP as a tuple of tangents, without the status of an iteration; always the same function, too."""
    return _without_status(rule.jvp, rule.vjp_info is not None)


def _without_status(function: Callable[..., Any], iterates: bool) -> Callable[..., tuple[Array, ...]]:
    # torch.compile accepts closures over a function and a flag, but not over a rule.
    @wraps(function)
    def derivative(*arrays: Array | None, **options: Any) -> tuple[Array, ...]:
        result = function(*arrays, **options)
        return as_tuple(result[0] if iterates else result)

    return derivative


class Bound(NamedTuple):
    """A rule with its options bound, as bridges call it."""

    forward: Callable[..., tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]]
    """Outputs, saved arrays, and the fields of ``rule.info``; outputs that have not converged are NaN, unless
    iterates are wanted."""
    reverse: Callable[..., tuple[Array | None, ...]]
    """``reverse(bars, arrays)``: from cotangents of outputs and saved arrays, or ``None``, to those of the inputs;
    `arrays` are outputs, saved arrays and the inputs that the rule needs."""
    push: Callable[..., tuple[Array, ...]] | None
    """``push(dots, arrays)``: from tangents of the inputs, or ``None``, to those of the outputs, with the same arrays;
    empty where no input moves. ``None`` where another library computes. With ``throw=True`` it raises, not NaN."""
    push_saved: Callable[..., tuple[Array | None, ...]] | None
    """``push_saved(dots, arrays)``: the tangents of the saved arrays, which only a second derivative uses."""
    second: Callable[..., Array] | None
    """``second(x_dot, y_bar, *arrays)`` as in the rule; ``None`` also where an option is missing that it needs."""
    undefined: Callable[..., Array] | None  # as in the rule, its options bound
    result: Callable[..., Any]
    """``result(outputs, info)``: the return value of the operation, put together again."""


def bind(
    rule: Rule,
    options: dict[str, Any],
    while_loop: Any = None,
    solve: Callable[..., Any] | None = None,
    notify: Callable[[Array], None] | None = None,
) -> Bound:
    """Bind options once, or raise a ``TypeError`` that names those that are unknown or missing.

    `solve` is the function with which the derivatives of a recursive rule solve: `rule.inner`, made differentiable.
    `notify` is called by the VJP with flags of the items whose gradient is that of an iterate.
    """
    options = dict(options)
    on_failure = options.pop("on_failure", "nan")
    CHECKS["on_failure"]("on_failure", on_failure)
    if on_failure == "iterate" and rule.info is None:
        raise TypeError(f'on_failure="iterate" was given, but {rule.name} does not iterate: leave it out.')
    # An option without a default is required; without it the call inside the framework would fail obscurely.
    required = required_of(rule.forward) | required_of(rule.vjp)
    if required - set(options):
        missing = ", ".join(f"{name}=..." for name in sorted(required - set(options)))
        raise TypeError(f"Bind the options of {rule.name} once: differentiable(ddnref.{rule.name}, {missing}).")
    forward_options, vjp_options = options_of(rule, options, while_loop)
    jvp_options = jvp_options_of(rule, options, while_loop)
    if rule.recursive and solve is not None:
        vjp_options["solve"] = jvp_options["solve"] = solve
    # Closures over single fields, which torch.compile can guard.
    function, iterates = rule.forward, rule.info is not None

    def forward(*inputs: Array) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
        result = function(*inputs, **forward_options)
        if not iterates:
            return as_tuple(result[0]), result[1], ()
        # With throw=False an item that has not converged is returned as it is.
        (outputs, saved), info = result
        if on_failure == "iterate":
            return as_tuple(outputs), (info.converged, *saved), tuple(info)
        outputs = tuple(nan_where(~spread(info.converged, y), y) for y in as_tuple(outputs))
        return outputs, saved, tuple(info)

    def result(outputs: tuple[Array, ...], info: tuple[Array, ...]) -> Any:
        value = outputs[0] if rule.outputs == 1 else outputs
        return value if rule.info is None else (value, rule.info(*info))

    if on_failure == "nan":
        reverse, push = _reverse(rule, vjp_options), _push(rule, jvp_options)
    else:
        reverse = _at_iterate(rule.vjp, rule, vjp_options, notify)
        push = _at_iterate(rule.jvp, rule, jvp_options, notify)
    return Bound(
        forward,
        reverse,
        push,
        _push_saved(rule),
        _second(rule, options),
        _undefined(rule, options, on_failure),
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


def _push(rule: Rule, options: dict[str, Any]) -> Callable[..., tuple[Array, ...]]:
    jvp, can_throw = plain_jvp(rule), "throw" in options

    def push(dots: tuple[Array | None, ...], arrays: tuple[Array, ...], throw: bool = False) -> tuple[Array, ...]:
        if all(dot is None for dot in dots):
            return ()
        dots = _with_optional(rule, dots)
        return jvp(*dots, *arrays, **({**options, "throw": True} if throw and can_throw else options))

    return push


def _push_saved(rule: Rule) -> Callable[..., tuple[Array | None, ...]] | None:
    function, n = rule.saved_jvp, rule.outputs
    if function is None:
        return None

    def push_saved(dots: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        if all(dot is None for dot in dots):
            return ()
        return as_tuple(function(*_with_optional(rule, dots), *arrays[n:]))

    return push_saved


def _with_optional(rule: Rule, dots: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
    """The tangents, and ``None`` for each optional input that was not given: outputs come after all of them."""
    return (*dots, *(None,) * (len(inputs_of(rule)) - len(dots)))


def _second(rule: Rule, options: dict[str, Any]) -> Callable[..., Array] | None:
    function = rule.second
    if function is None or not required_of(function) <= set(options):
        return None
    given = {name: value for name, value in options.items() if name in keywords(function)}
    given["throw"] = False

    # A closure, not a partial function, for torch.compile.
    def second(*arrays: Array) -> Array:
        moved: Array = function(*arrays, **given)
        return moved

    return second


def _undefined(rule: Rule, options: dict[str, Any], on_failure: str) -> Callable[..., Array] | None:
    function, n = rule.undefined, rule.outputs
    if function is None:
        return None
    given = {name: value for name, value in options.items() if name in keywords(function)}

    def undefined(*arrays: Array) -> Array:
        if on_failure == "iterate":
            arrays = (*arrays[:n], *arrays[n + 1 :])  # without the flags of what has converged
        return function(*arrays, **given)

    return undefined


def _at_iterate(
    function: Callable[..., Any], rule: Rule, options: dict[str, Any], notify: Callable[[Array], None] | None
) -> Callable[..., tuple[Array | None, ...]]:
    """A derivative of an iterative rule, its VJP or JVP, at the last iterate, as if that had converged.

    The first saved array is the flags of the items that did converge.
    """
    n, count, known = rule.outputs, rule.outputs if function is rule.vjp else None, keywords(function)
    if "check_rtol" in known:
        options = {"check_rtol": float("inf"), **options}
    if "on_failure" in known:
        options = {**options, "on_failure": "iterate"}
    inner = rule.inner or rule
    bridged = rule.recursive and "solve" in options
    solve = partial(options["solve"], on_failure="iterate") if bridged else inner.function

    def derivative(given: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        given = given[:count]  # cotangents of saved arrays come only from a second derivative
        if all(x is None for x in given):
            return ()
        if function is rule.jvp:
            given = _with_optional(rule, given)
        converged = [arrays[n]]

        def solve_to_iterate(*inputs: Any, **others: Any) -> Any:
            x, info = solve(*inputs, **others)
            converged.append(info.converged)
            return x, info._replace(converged=info.converged | True)

        own_solve = {"solve": solve_to_iterate} if rule.recursive else {}
        result = function(*given, *arrays[:n], *arrays[n + 1 :], **{**options, **own_solve})
        if rule.vjp_info is not None:
            result, info = result
            converged.append(info.converged)
        if notify is not None:
            notify(_any_false(converged))
        return as_tuple(result)

    return derivative


def _any_false(flags: Sequence[Array]) -> Array:
    """Return which items lack one of several flags; flags of other axes count for all items."""
    first, *others = (~flag for flag in flags)
    for other in others:
        first = first | (other if other.shape == first.shape else namespace_of(other).any(other))
    return first


@_remembered
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


def failed(x_bar: Array, axes: int | None) -> Array:
    """Return where a gradient is NaN. One column tells, because all entries of a failed item are NaN.

    `axes` says how many axes of the gradient are those of one item; where it is ``None``, all entries are looked at.
    """
    return namespace_of(x_bar).isnan(x_bar if axes is None else x_bar[..., :1] if x_bar.ndim else x_bar)


def failed_items(flags: Array, axes: int | None) -> Array | None:
    """Reduce the flags of `failed` to one per item, whose own axes are the last `axes`; ``None`` if unknown."""
    if axes is None:
        return None
    return namespace_of(flags).any(flags, axis=tuple(range(flags.ndim - axes, flags.ndim))) if axes else flags


def widest(gradients: Sequence[Array | None], axes: Sequence[int | None]) -> int:
    """The gradient that has the most batch axes, and so tells items apart that share other inputs."""
    pairs = enumerate(zip(gradients, axes, strict=False))
    batch = {i: x.ndim - n for i, (x, n) in pairs if x is not None and n is not None}
    return max(batch, key=batch.__getitem__, default=0)


def warn(message: str, operation: str, items: Any = None) -> None:
    """Warn of gradients of an operation; `items` are flags of those concerned, as an array of NumPy if known."""
    warnings.warn(message.format(operation + _among(items)), RuntimeWarning, stacklevel=3)


def _among(items: Any) -> str:
    """Return in words which items of a batch are flagged."""
    places, count = ([], 0) if items is None or items.ndim == 0 else first_flagged(items)
    if count == 0:
        return ""
    more = f" and {count - len(places)} more" if count > len(places) else ""
    size = str(tuple(items.shape) if items.ndim > 1 else items.shape[0])
    return f", item{'s' if count > 1 else ''} {listed(places)}{more} of {size}"


class Bridged:
    """An operation as a framework's own function, with the name and the docstring of the operation.

    Pickle stores ``differentiable``, the operation and the options, and makes it again: closures cannot be pickled.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        rule: Rule | Own,
        differentiable: Callable[..., Any],
        options: dict[str, Any],
    ) -> None:
        self.call, self.rule, self.made_by, self.options = call, rule, differentiable, options
        self.__name__ = self.__qualname__ = rule.name
        self.__doc__ = rule.function.__doc__

    def __call__(self, *inputs: Any) -> Any:
        return self.call(*inputs)

    def pair(self, count: int) -> Checkable:
        """The parts of the function of `count` inputs that `ddnref.testing` checks."""
        rule = own_rule(self.rule, count) if isinstance(self.rule, Own) else self.rule
        options = {} if isinstance(self.rule, Own) else {k: v for k, v in self.options.items() if k != "compute"}
        bound, n = bind(rule, options), rule.outputs

        def forward(*inputs: Array) -> tuple[Any, Any]:
            return bound.forward(*inputs)[:2]

        def vjp(*arrays: Array) -> Any:
            x_bars = bound.reverse(arrays[:n], arrays[n:])
            # An input without a gradient has zeros, where the derivative takes that input at all.
            inputs = dict(zip(rule.needs, arrays[len(arrays) - len(rule.needs) :], strict=False))
            return tuple(
                namespace_of(inputs[i]).zeros_like(inputs[i]) if x_bar is None and i in inputs else x_bar
                for i, x_bar in enumerate(x_bars)
            )

        def jvp(*arrays: Array | None) -> Any:
            return bound.push(arrays[:count], arrays[count:])  # type: ignore[misc]

        return Checkable(forward, vjp, jvp, tuple(i for i in rule.needs if i < count))

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (self.made_by, self.rule.function, self.options)

    def __repr__(self) -> str:
        texts = {name: getattr(value, "__name__", repr(value)) for name, value in self.options.items()}
        options = "".join(f", {name}={text}" for name, text in texts.items())
        return f"{self.made_by.__module__}.differentiable({self.rule.name}{options})"


class Checkable(NamedTuple):
    """The parts of a bridged function, as `ddnref.testing` checks them."""

    forward: Callable[..., Any]
    """Returns ``(outputs, saved)``."""
    vjp: Callable[..., Any]
    jvp: Callable[..., Any]
    needs: tuple[int, ...]


def _made_again(differentiable: Callable[..., Any], operation: Callable[..., Any], options: dict[str, Any]) -> Any:
    return differentiable(operation, **options)


def own_axes(rule: Rule, layout: Layout) -> tuple[int | None, ...]:
    """How many axes of each array of a layout are those of one item; ``None`` for the parameters of an operator.

    Empty for a rule that is not judged: then there are no warnings.
    """
    if rule.is_own:
        return (None,) * sum(layout.counts) if rule.judged else ()
    axes = _axes_in(rule.signature.split("->")[0])
    long = _long_axes(axes, layout)
    found: list[int | None] = []
    for part, count, letters in zip(layout.parts, layout.counts, axes, strict=False):
        found += [sum(long.get(letter, 1) for letter in letters) if part is None else None] * count
    return tuple(found)


def output_axes(rule: Rule, layout: Layout) -> tuple[int | None, ...]:
    """How many axes of each output are those of one item; ``None`` where that is unknown, empty as in `own_axes`."""
    if rule.is_own:
        return (None,) * rule.outputs if rule.judged else ()
    inputs, outputs = map(_axes_in, rule.signature.split("->")[:2])
    long = _long_axes(inputs, layout)
    return tuple(sum(long.get(letter, 1) for letter in letters) for letters in outputs)


def _long_axes(axes: list[list[str]], layout: Layout) -> dict[str, int]:
    """The vectors of an operator may have several axes for each of its two letters: how many."""
    for part, letters in zip(layout.parts, axes, strict=False):
        if part is not None:
            return {letters[0]: len(part.range_shape), letters[1]: len(part.domain_shape)}
    return {}


def _axes_in(signature: str) -> list[list[str]]:
    """The letters of the axes of each array, in one part of a signature."""
    return [part.split(",") if part else [] for part in re.findall(r"\(([^)]*)\)", signature)]


# --- operators among the inputs -----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The composition of the inputs: which are operators, and how many arrays each holds."""

    parts: tuple[LinearOperator | None, ...]  # operators without their parameters, and None for arrays
    counts: tuple[int, ...]  # how many arrays each input is

    @property
    def plain(self) -> bool:
        """Whether there is no operator."""
        return all(part is None for part in self.parts)

    @property
    def known(self) -> bool:
        """Whether all operators are of the package, so that they compute the same whenever the layout is the same."""
        return all(is_known(part) for part in self.parts)

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

    def directions(self, dots: Sequence[Array | None], operands: dict[int, Any]) -> Iterator[Any]:
        """Put tangents together again: for an operator a tuple, ``None`` where none of its parameters moves.

        `operands` are the operators by their position; a parameter that rests beside one that moves gets zeros.
        """
        rest = iter(dots)
        for i, (part, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            own = tuple(next(rest) for _ in range(count))
            if part is None or all(dot is None for dot in own):
                yield own[0] if part is None else None
            else:
                pairs = zip(own, operands[i].params, strict=True)
                yield tuple(namespace_of(p).zeros_like(p) if dot is None else dot for dot, p in pairs)


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
    """A bound operation that takes the arrays of a layout, and takes or gives a tangent or cotangent for each."""
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

    def on_operators(push: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if push is None:
            return None

        def pushed(dots: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
            results, inputs = arrays[: len(arrays) - count], arrays[len(arrays) - count :]
            operands = tuple(needed.join(inputs))
            directions = layout.directions(dots, dict(zip(rule.needs, operands, strict=False)))
            return push(tuple(directions), (*results, *operands))  # type: ignore[no-any-return]

        return pushed

    def undefined(*arrays: Array) -> Array:
        results, inputs = arrays[: len(arrays) - count], arrays[len(arrays) - count :]
        return bound.undefined(*results, *needed.join(inputs))  # type: ignore[misc]

    push, push_saved = on_operators(bound.push), on_operators(bound.push_saved)
    flags = None if bound.undefined is None else undefined
    return bound._replace(forward=forward, reverse=reverse, push=push, push_saved=push_saved, undefined=flags)


@_remembered
def _places_of_numbers(function: Callable[..., Any]) -> frozenset[int]:
    """Positions of the arguments that may be numbers instead of arrays, by their annotation."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(i for i, p in enumerate(parameters) if p.annotation == "Array | float")


def numbers_as_arrays(
    function: Callable[..., Any], inputs: Sequence[Any], array: Callable[[float, Any], Any]
) -> tuple[Any, ...]:
    """The inputs, with numbers made arrays by ``array(number, first input)`` where the function takes numbers."""
    if not any(isinstance(x, numbers.Real) for x in inputs):
        return tuple(inputs)
    places = _places_of_numbers(function)
    return tuple(
        array(float(x), inputs[0]) if i in places and isinstance(x, numbers.Real) else x for i, x in enumerate(inputs)
    )


def leaves(bars: Any) -> Iterator[Array | None]:
    """Flatten cotangents: those of an operator are a tuple."""
    for bar in bars:
        if isinstance(bar, tuple):
            yield from leaves(bar)
        else:
            yield bar
