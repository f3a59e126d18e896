"""What a bridge costs: forward and backward through it, the same pair called by hand, and a bridge that does nothing.

The last is the framework's own part: an operation of as many inputs, outputs and saved arrays, which hands out arrays
that were made beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddnref._rule import as_tuple, options_of
from ddnref._rules import RULES

from ._common import Call, burst, load, load_jax, seconds

M = 8
OPERATIONS = ("eigh", "eigh_topk", "spectral_function", "solve", "sinkhorn")
FRAMEWORKS = ("torch", "jax")


class Calls(NamedTuple):
    bridge: Call
    by_hand: Call
    floor: Call


class Overhead(NamedTuple):
    """The median over rounds of time(a) − time(b) in µs, with the quartiles of the rounds."""

    median: float
    low: float
    high: float


def overhead(a: Call, b: Call) -> Overhead:
    """Of a over b, interleaved: a b, b a, … in bursts of 20 ms, after a warm-up of both."""
    duration = min(0.02, seconds() / 10)
    for call in (a, b):
        burst(call, 5 * duration)
    differences: list[float] = []
    end = time.perf_counter() + seconds()
    while len(differences) < 6 or time.perf_counter() < end:
        times = {i: burst((a, b)[i], duration) for i in ((1, 0) if len(differences) % 2 else (0, 1))}
        differences.append(1e6 * (times[0] - times[1]))
    low, middle, high = np.quantile(differences, [0.25, 0.5, 0.75])
    return Overhead(float(middle), float(low), float(high))


def nothing() -> None:
    """Beside which a floor is measured."""


class Problem(NamedTuple):
    inputs: tuple[Any, ...]
    results: tuple[Any, ...]
    """Outputs and saved arrays."""
    bars: tuple[Any, ...]
    options: dict[str, Any]
    by_hand: Callable[[], tuple[Any, ...]]
    """All cotangents."""


def problem(name: str, convert: Callable[[Any], Any]) -> Problem:
    """An operation's own sample at m = 8, with the cotangents of its loss, or random ones."""
    rule, rng = RULES[name], np.random.default_rng(0)
    sample = rule.sample(convert, rng, (), M, False)
    forward_options, vjp_options = options_of(rule, sample.options)
    needed = tuple(sample.inputs[i] for i in rule.needs)

    def forward() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        result = rule.forward(*sample.inputs, **forward_options)
        outputs, saved = result if rule.info is None else result[0]
        return as_tuple(outputs), saved

    outputs, saved = forward()
    bars = sample.loss[1](*outputs) if sample.loss else [convert(rng.standard_normal(tuple(y.shape))) for y in outputs]

    def by_hand() -> tuple[Any, ...]:
        outputs, saved = forward()
        gradients = rule.vjp(*bars, *outputs, *saved, *needed, **vjp_options)
        return as_tuple(gradients[0] if rule.vjp_info else gradients)

    return Problem(sample.inputs, (*outputs, *saved), tuple(bars), sample.options, by_hand)


def calls(framework: str, name: str) -> Calls:
    """The three, warmed up by being built."""
    return {"torch": _torch, "jax": _jax}[framework](name)


def _torch(name: str) -> Calls:
    torch = load("torch")
    from ddnref.interop.torch import differentiable

    p, rule = problem(name, torch.from_numpy), RULES[name]
    operation = differentiable(rule.function, **p.options)
    inputs = tuple(x.clone().requires_grad_() for x in p.inputs)
    n = len(p.bars)

    class Floor(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> tuple[Any, ...]:  # noqa: ARG004
            return tuple(y.view_as(y) for y in p.results)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*output, *(inputs[i] for i in rule.needs))

        @staticmethod
        def backward(ctx: Any, *bars: Any) -> tuple[Any, ...]:  # noqa: ARG004
            return p.inputs if ctx.saved_tensors else ()

    def bridge() -> Any:
        outputs = operation(*inputs)
        return torch.autograd.grad(as_tuple(outputs if rule.info is None else outputs[0]), inputs, p.bars)

    def floor() -> Any:
        return torch.autograd.grad(Floor.apply(*inputs)[:n], inputs, p.bars)

    return Calls(bridge, p.by_hand, floor)


def _jax(name: str) -> Calls:
    jax = load_jax()
    from ddnref.interop.jax import differentiable

    p, rule = problem(name, jax.numpy.asarray), RULES[name]
    operation = differentiable(rule.function, **p.options)
    n = len(p.bars)

    @jax.custom_vjp
    def empty(*inputs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:  # noqa: ARG001
        return p.results[:n], p.results[n:]

    def fwd(*inputs: Any) -> Any:  # noqa: ARG001
        return (p.results[:n], p.results[n:]), (p.results, p.inputs)

    empty.defvjp(fwd, lambda kept, bars: kept[1], symbolic_zeros=True)  # noqa: ARG005

    def outputs(*inputs: Any) -> tuple[Any, ...]:
        result = operation(*inputs)
        return as_tuple(result if rule.info is None else result[0])

    def bridge() -> Any:
        return jax.block_until_ready(jax.vjp(outputs, *p.inputs)[1](p.bars))

    def floor() -> Any:
        return jax.block_until_ready(jax.vjp(lambda *inputs: empty(*inputs)[0], *p.inputs)[1](p.bars))

    return Calls(bridge, lambda: jax.block_until_ready(p.by_hand()), floor)
