"""Matrix products in the derivatives of a rule, counted instead of timed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddnref._rules import binding as _rule
from ddnref._rules import table as _rules

M = 320  # wide enough for tiles and block rows
OTHERS = ("svd", "svd_topk", "svdvals", "polar", "qr")  # no stated limit, but products alone, of the sample's shape


class Counted(np.ndarray):
    """An array that adds up the multiplications of every matrix product it takes part in."""

    multiplications = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        if ufunc is np.matmul:
            a, b = inputs
            batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            Counted.multiplications += int(np.prod(batch)) * a.shape[-2] * a.shape[-1] * b.shape[-1]
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(x.view(np.ndarray) if isinstance(x, Counted) else x for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        return result.view(Counted) if isinstance(result, np.ndarray) and result.ndim else result


def names() -> tuple[str, ...]:
    """The rules whose derivatives consist of matrix products."""
    return tuple(
        name
        for name, rule in _rules.RULES.items()
        if getattr(_rules.TRIALS[rule.name], "products", None) or name in OTHERS
    )


def products(name: str, mode: str = "vjp") -> float:
    """Matrix products in the VJP or the JVP of a rule, NumPy form, in units of m³ multiplications."""
    rule = _rules.RULES[name]
    derivative = getattr(rule, mode, None)
    if derivative is None:
        raise NotImplementedError(f"{name} has no {mode}")
    sample = _rules.TRIALS[rule.name].sample(np.asarray, np.random.default_rng(0), (), M, False)
    forward, options = _rule.options_of(rule, sample.options)
    outputs, saved = rule.forward(*sample.inputs, **forward)
    outputs = _rule.as_tuple(outputs)
    moved = sample.inputs
    if mode == "vjp":
        moved = sample.loss[1](*outputs) if sample.loss else outputs
    arrays = [np.ascontiguousarray(a).view(Counted) for a in (*moved, *outputs, *saved)]
    Counted.multiplications = 0
    derivative(*arrays, **options)
    return Counted.multiplications / M**3
