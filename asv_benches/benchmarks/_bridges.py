"""Cost of a bridge: forward and backward through it, against the same pair by hand and in the barest wrapper.

The last is an ``autograd.Function`` or ``custom_vjp`` around the same two calls, with no status, no warning, no second
derivative and no transform. The framework's own part is what one costs that computes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import ddnref
from ddnref._rules.binding import as_tuple, options_of
from ddnref._rules.contract import Rule
from ddnref._rules.table import RULES, TRIALS

from ._common import Call, burst, load, load_jax, seconds

M = 8
OPERATIONS = ("eigh", "eigh_topk", "spectral_function", "solve", "sinkhorn")
FRAMEWORKS = ("torch", "jax")


class Calls(NamedTuple):
    bridge: Call
    by_hand: Call
    bare: Call
    nothing: Call
    """Pass through a function of the framework that only returns ready-made outputs and cotangents."""


class Overhead(NamedTuple):
    """The median over rounds of time(a) − time(b) in µs, with the quartiles of the rounds."""

    median: float
    low: float
    high: float


def overhead(a: Call, b: Call) -> Overhead:
    """Measure the overhead of a over b, interleaved as a b, b a, … in bursts of 20 ms, after a warm-up of both."""
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


class Problem(NamedTuple):
    inputs: tuple[Any, ...]
    bars: tuple[Any, ...]
    options: dict[str, Any]
    forward: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]
    """Map inputs to outputs and saved arrays."""
    vjp: Callable[..., tuple[Any, ...]]
    """Map cotangents, outputs, saved arrays and the inputs that it needs to cotangents of the inputs."""

    def needed(self, rule: Rule) -> tuple[Any, ...]:
        return tuple(self.inputs[i] for i in rule.needs)

    def by_hand(self, rule: Rule) -> tuple[Any, ...]:
        outputs, saved = self.forward(*self.inputs)
        return self.vjp(*self.bars, *outputs, *saved, *self.needed(rule))


def problem(name: str, convert: Callable[[Any], Any]) -> Problem:
    """An operation's own sample at m = 8, with the cotangents of its loss, or random ones."""
    rule, rng = RULES[name], np.random.default_rng(0)
    sample = TRIALS[rule.name].sample(convert, rng, (), M, False)
    forward_options, vjp_options = options_of(rule, sample.options)

    def forward(*inputs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        result = rule.forward(*inputs, **forward_options)
        outputs, saved = result if rule.info is None else result[0]
        return as_tuple(outputs), saved

    def vjp(*arrays: Any) -> tuple[Any, ...]:
        gradients = rule.vjp(*arrays, **vjp_options)
        return as_tuple(gradients[0] if rule.vjp_info else gradients)

    outputs, _ = forward(*sample.inputs)
    bars = sample.loss[1](*outputs) if sample.loss else [convert(rng.standard_normal(tuple(y.shape))) for y in outputs]
    return Problem(sample.inputs, tuple(bars), sample.options, forward, vjp)


def calls(framework: str, name: str) -> Calls:
    """The three of one operation."""
    return {"torch": _torch, "jax": _jax}[framework](name)


def _torch(name: str) -> Calls:
    torch = load("torch")
    from ddnref.interop.torch import differentiable

    p, rule = problem(name, torch.from_numpy), RULES[name]
    operation = differentiable(rule.function, **p.options)
    inputs = tuple(x.clone().requires_grad_() for x in p.inputs)
    n = len(p.bars)
    # NumPy computes, as in the bridge, unless an option is a function of tensors.
    by_numpy = not any(map(callable, p.options.values()))
    pair = problem(name, np.asarray) if by_numpy else p

    def given(tensors: Any) -> Any:
        return [x.detach().numpy() for x in tensors] if by_numpy else tensors

    def back(arrays: Any) -> Any:
        return tuple(map(torch.from_numpy, arrays)) if by_numpy else tuple(arrays)

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
            outputs, saved = map(back, pair.forward(*given(inputs)))
            ctx.save_for_backward(*outputs, *saved, *(inputs[i] for i in rule.needs))
            return outputs  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, *bars: Any) -> tuple[Any, ...]:
            return back(pair.vjp(*given(bars), *given(ctx.saved_tensors)))  # type: ignore[no-any-return]

    outputs, cotangents = p.forward(*p.inputs)[0], p.by_hand(rule)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:  # noqa: ARG004
            return tuple(y.view_as(y) for y in outputs)

        @staticmethod
        def backward(ctx: Any, *bars: Any) -> tuple[Any, ...]:  # noqa: ARG004
            return cotangents

    def bridge() -> Any:
        outputs = operation(*inputs)
        return torch.autograd.grad(as_tuple(outputs if rule.info is None else outputs[0]), inputs, p.bars)

    def through(function: Any) -> Call:
        return lambda: torch.autograd.grad(function.apply(*inputs)[:n], inputs, p.bars)

    return Calls(bridge, lambda: pair.by_hand(rule), through(Bare), through(Nothing))


def _jax(name: str) -> Calls:
    jax = load_jax()
    from ddnref.interop.jax import differentiable

    p, rule = problem(name, jax.numpy.asarray), RULES[name]
    operation = differentiable(rule.function, **p.options)

    @jax.custom_vjp
    def wrapped(*inputs: Any) -> tuple[Any, ...]:
        return p.forward(*inputs)[0]

    def fwd(*inputs: Any) -> Any:
        outputs, saved = p.forward(*inputs)
        return outputs, (*outputs, *saved, *(inputs[i] for i in rule.needs))

    wrapped.defvjp(fwd, lambda kept, bars: p.vjp(*bars, *kept))

    made, cotangents = p.forward(*p.inputs)[0], p.by_hand(rule)

    @jax.custom_vjp
    def nothing(*inputs: Any) -> tuple[Any, ...]:  # noqa: ARG001
        return made

    nothing.defvjp(lambda *inputs: (made, None), lambda kept, bars: cotangents)  # noqa: ARG005

    def outputs(*inputs: Any) -> tuple[Any, ...]:
        result = operation(*inputs)
        return as_tuple(result if rule.info is None else result[0])

    def through(function: Callable[..., Any]) -> Call:
        return lambda: jax.block_until_ready(jax.vjp(function, *p.inputs)[1](p.bars))

    return Calls(through(outputs), lambda: jax.block_until_ready(p.by_hand(rule)), through(wrapped), through(nothing))


# --- forward and backward in PyTorch, ours and its own ----------------------------------------------------------------


def end_to_end(name: str, ours: bool, batch: int, m: int, dtype: str) -> Call:
    """Forward and backward of an operation through the bridge to PyTorch, or as PyTorch's users write it."""
    torch = load("torch")
    from ddnref.interop.torch import differentiable

    operation = differentiable(getattr(ddnref, name)) if ours else getattr(_InTorch(torch), name)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((batch, m, m)), rng.standard_normal((batch, m))
    if name != "solve":  # positive definite, and well conditioned
        a = a @ a.mT / m + np.eye(m)
    inputs = [torch.from_numpy(x.astype(dtype)).requires_grad_() for x in ((a, b) if name == "solve" else (a,))]
    outputs = as_tuple(operation(*inputs))
    bars = [torch.from_numpy(rng.standard_normal(tuple(y.shape)).astype(dtype)) for y in outputs]
    return lambda: torch.autograd.grad(as_tuple(operation(*inputs)), inputs, bars)


class _InTorch(NamedTuple):
    """The operations of `end_to_end` by PyTorch alone."""

    torch: Any

    def eigh(self, x: Any) -> tuple[Any, Any]:
        return tuple(self.torch.linalg.eigh(x))  # type: ignore[return-value]

    def solve(self, a: Any, b: Any) -> Any:
        return self.torch.linalg.solve(a, b[..., None])[..., 0]

    def invsqrtm(self, x: Any) -> Any:
        w, v = self.torch.linalg.eigh(x)
        return (v / w.sqrt()[..., None, :]) @ v.mT
