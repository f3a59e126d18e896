"""What one operation tells bridges, ``ddnref verify``, benchmarks and documentation, and how they call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, nan_where, with_axes
from ddnref._rules.samples.common import Convert, Sample


class Rule(NamedTuple):
    """One differentiable operation.

    An iterative one returns ``(result, info)`` where a closed form returns its result: outputs from `function`,
    ``(outputs, saved)`` from `forward`, cotangents from `vjp`.
    """

    name: str
    function: Callable[..., Any]
    forward: Callable[..., Any]
    """Returns ``(outputs, saved)``, each an array or a tuple of arrays."""
    vjp: Callable[..., Any]
    """Takes cotangents, outputs, saved arrays and the inputs that `needs` names; one cotangent per input."""
    sample: Callable[[Convert, np.random.Generator, tuple[int, ...], int, bool], Sample]
    """``sample(convert, rng, batch, m, is_complex)``."""
    outputs: int
    """How many arrays the operation returns."""
    docs: str
    """One line for the capability table."""
    signature: str
    """Axes of one item, as of a generalised ufunc: ``inputs->outputs->saved->info->info of the VJP``, the last ones
    where there are any. Without a letter behind them arrays have the dtype of the inputs; r: the real one, b: flags,
    i, l: integers of 32 and 64 bits."""
    singular: str
    """Where the derivative does not exist, and what is raised there, for the capability table."""
    cost: str
    """Of the VJP, for the capability table."""
    products: Callable[[int, int], float] | None = None
    """Where that is products of m×m matrices (2 m³ flops real): their number for one item and k columns."""
    needs: tuple[int, ...] = ()
    """Positions of the inputs that the VJP takes last."""
    info: type[Any] | None = None
    """The NamedTuple of arrays by which an iterative forward says how it ended."""
    vjp_info: type[Any] | None = None
    """The same of the VJP, where it iterates too."""
    saved_vjp: Callable[..., Any] | None = None
    """Cotangents of the saved arrays to those of the inputs, called as ``saved_vjp(*saved_bars, *saved, *needed)``;
    second derivatives pass through it."""
    undefined: Callable[..., Array] | None = None
    """``undefined(*outputs, *saved, *needed, rtol=...)``: items at which a second derivative through the VJP is
    wrong; ``None`` where it is right."""
    refusal: str = ""
    """What to say where a second derivative is refused."""
    is_complex: bool = True
    """Whether complex input is taken."""
    tangent: str | tuple[str, ...] = "dense"
    """Where the inputs may move, as in `ddnref.testing`; a tuple has one for each."""
    symmetrises: bool = False
    item_axes: tuple[int, ...] = ()
    """How many axes of each input are those of one item, where the inputs' batch axes broadcast."""
    recursive: bool = False
    """Whether the VJP takes ``solve=``, the function by which it solves its own systems: a bridge hands it this very
    operation made differentiable, and so the VJP can be differentiated again, although it iterates."""

    @property
    def info_fields(self) -> int:
        """How many arrays say how an iterative forward ended."""
        return 0 if self.info is None else len(self.info._fields)

    @property
    def opaque(self) -> bool:
        """Whether the VJP iterates and is not differentiated again."""
        return self.vjp_info is not None and not self.recursive


def options_of(rule: Rule, options: dict[str, Any], while_loop: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options between the forward and the VJP; both run with ``throw=False``, as bridges do.

    `while_loop` is handed to those that iterate, unless the options name one.
    """
    forward, vjp = _keywords(rule.forward), _keywords(rule.vjp)
    unknown = set(options) - forward - vjp
    if unknown:
        raise TypeError(
            f"{rule.name} has no option {', '.join(sorted(unknown))}; it takes {', '.join(sorted(forward | vjp))}."
        )
    given = {"while_loop": while_loop, **options, "throw": False}
    return {k: v for k, v in given.items() if k in forward}, {k: v for k, v in given.items() if k in vjp}


@cache
def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


@cache
def plain_forward(rule: Rule) -> Callable[..., tuple[tuple[Array, ...], tuple[Array, ...]]]:
    """The forward as ``(outputs, saved)``, two tuples, without the status of an iteration.

    Always the same function, so that a library that compiles compiles it once a shape.
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
    """The VJP as a tuple of cotangents, without the status of an iteration; always the same function, likewise."""
    function, iterates = rule.vjp, rule.vjp_info is not None  # torch.compile takes closures over these, not over a rule

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
    undefined: Callable[..., Array] | None
    result: Callable[..., Any]
    """``result(outputs, info)``: what the operation returns, put together again."""


def bind(rule: Rule, options: dict[str, Any], while_loop: Any = None, solve: Callable[..., Any] | None = None) -> Bound:
    """Bind options once, or ``TypeError`` naming those that are unknown or missing.

    `solve` is what a recursive rule's VJP solves with: the operation itself, made differentiable.
    """
    _refuse_missing(rule, options)
    forward_options, vjp_options = options_of(rule, options, while_loop)
    if rule.recursive and solve is not None:
        vjp_options["solve"] = solve
    rtol = {"rtol": options["rtol"]} if "rtol" in options else {}
    function, undefined, iterates = rule.forward, rule.undefined, rule.info is not None

    def forward(*inputs: Array) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
        result = function(*inputs, **forward_options)
        if not iterates:
            return as_tuple(result[0]), result[1], ()
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


def _refuse_missing(rule: Rule, options: dict[str, Any]) -> None:
    required = {
        p.name
        for function in (rule.forward, rule.vjp)
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)
    }
    if required - set(options):
        missing = ", ".join(f"{name}=..." for name in sorted(required - set(options)))
        raise TypeError(f"Bind the options of {rule.name} once: differentiable(ddnref.{rule.name}, {missing}).")


def _reverse(rule: Rule, options: dict[str, Any]) -> Callable[..., tuple[Array | None, ...]]:
    vjp, n, saved_vjp = plain_vjp(rule), rule.outputs, rule.saved_vjp
    accepting = {**options, "gauge_rtol": float("inf")} if "gauge_rtol" in _keywords(rule.vjp) else options

    def reverse(bars: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        used = any(bar is not None for bar in bars[:n])
        if saved_vjp is None or all(bar is None for bar in bars[n:]):
            return vjp(*bars[:n], *arrays, **options) if used else ()
        # Second order: outputs and saved arrays hold the same eigenvectors, and only the sum is free of gauge.
        through_saved = as_tuple(saved_vjp(*bars[n:], *arrays[n:]))
        if not used:
            return through_saved
        through_outputs = vjp(*bars[:n], *arrays, **accepting)
        return tuple(b if a is None else a + b for a, b in zip(through_saved, through_outputs, strict=True))

    return reverse


@cache
def inputs_of(rule: Rule) -> tuple[inspect.Parameter, ...]:
    """The arrays and operators that the operation takes."""
    return tuple(p for p in inspect.signature(rule.forward).parameters.values() if p.kind is p.POSITIONAL_ONLY)


def input_counts(rule: Rule) -> range:
    """How many of them: some may be optional."""
    inputs = inputs_of(rule)
    return range(sum(p.default is p.empty for p in inputs), len(inputs) + 1)


def spread(flags: Array, like: Array) -> Array:
    """One flag per item, shaped to broadcast against an array of these items; for one without them, any flag."""
    if flags.ndim > like.ndim:
        return array_api_compat.array_namespace(flags).any(flags)
    return with_axes(flags, like.ndim - flags.ndim)


def failed(x_bar: Array) -> Array:
    """Where a gradient is NaN, seen in one column: with ``throw=False`` all entries of a failed item are."""
    xp = array_api_compat.array_namespace(x_bar)
    return xp.isnan(x_bar[..., :1] if x_bar.ndim else x_bar)


WARNING = (
    "A gradient is NaN for at least one item of the batch: the input is not finite, the loss depends on a choice "
    "inside repeated eigenvalues (see ddnref.gauge_residual), the function is not differentiable there (a singular "
    "matrix, a change of activity), or an iteration has not converged (see info). Call the operation and its VJP by "
    "hand with throw=True to see which."
)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple as it is, anything else as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)
