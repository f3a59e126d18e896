"""The bridges, as smoke: every rule through PyTorch and HIPS autograd, with the gradient of a fixed loss."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from ddnref._rules.binding import as_tuple
from ddnref._rules.contract import Rule
from ddnref._rules.table import RULES, TRIALS

from ._stored import to_torch
from ._targets import PHASES, Problem, Target, positional

KINDS = ("twice", "as it is, item by item", "strides, order, alignment, read-only", "stride 0", "items reordered")
"""Others warn by contract, or are PyTorch's to refuse."""
OPERATORS = ("linear_solve",)
"""Left out: its ``solve=`` comes from the bridge itself and is covered by the framework's matrix of tests."""


def _torch(rule: Rule) -> Any:
    def call(*arrays: Any) -> Any:
        from ddnref.interop.torch import differentiable

        leaves = [to_torch(a).requires_grad_() for a in arrays[: len(arrays) - 1]]
        options: dict[str, Any] = arrays[-1]
        result = differentiable(rule.function, **options)(*leaves)
        w = as_tuple(result[0] if rule.info is not None else result)[0]
        (w * w).sum().backward()
        return w.detach().numpy(), [leaf.grad.numpy() for leaf in leaves]

    return call


def _autograd(rule: Rule) -> Any:
    def call(*arrays: Any) -> Any:
        import autograd
        import autograd.numpy as anp

        from ddnref.interop.autograd import differentiable

        options: dict[str, Any] = arrays[-1]
        bound = differentiable(rule.function, **options)

        def first(*inputs: Any) -> Any:
            result = bound(*inputs)
            return (
                (result[0] if rule.info is not None else result)[0]
                if rule.outputs > 1
                else (result[0] if rule.info is not None else result)
            )

        inputs = tuple(np.array(a, order="C") for a in arrays[:-1])
        count = tuple(range(len(inputs)))
        gradient = autograd.grad(lambda *z: anp.sum(first(*z) ** 2), count)(*inputs)
        return np.array(first(*inputs)), list(gradient)

    return call


def _target(name: str, rule: Rule, call: Any) -> Target:
    def make(rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool) -> Problem:
        sample = TRIALS[rule.name].sample(np.asarray, rng, batch, m, False)
        return Problem(sample.inputs, sample.options, 10 * sample.condition)

    return Target(
        f"{name}.differentiable({rule.name})",
        lambda *arrays, **options: call(*arrays, options),
        make,
        positional(rule.forward),
        kinds=KINDS,
        phases=(0,) if 0 in PHASES.get(rule.name, ()) else (),  # of the outputs only the first is compared
        loose=100.0,
    )


def bridge_targets() -> list[Target]:
    found = []
    for name, build in (("torch", _torch), ("autograd", _autograd)):
        if importlib.util.find_spec(name) is not None:
            found += [_target(name, rule, build(rule)) for rule in RULES.values() if rule.name not in OPERATORS]
    return found
