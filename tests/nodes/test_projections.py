"""Every node, on every library: its minimum against an oracle, its gradient against finite differences and mutants."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from problems import relative
from public_names import PUBLIC

from conftest import backend
from ddnref._rules.binding import as_tuple
from ddnref._rules.samples import nodes as samples
from ddnref.testing import Tangent, assert_vjp, check_vjp


@dataclass(frozen=True)
class Case:
    """A node with options, and which inputs its VJP takes."""

    name: str
    sample: Any
    needs: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    vjp_options: tuple[str, ...] = ()
    iterative: bool = False

    def inputs(self, rng, batch, m=6):
        return self.sample(np.asarray, rng, batch, m, False, **self.extra).inputs

    @property
    def extra(self):
        return {k: v for k, v in self.options.items() if k in ("norm", "kind")}

    def forward(self, *inputs, **more):
        y = PUBLIC[self.name](*inputs, **self.options, **more)
        return y[0] if self.iterative else y

    def vjp(self, y_bar, y, *inputs, **more):
        options = {k: v for k, v in self.options.items() if k in self.vjp_options}
        return as_tuple(PUBLIC[f"{self.name}_vjp"](y_bar, y, *inputs, **options, **more))

    @property
    def throws(self):
        return self.name not in ("project_ball", "project_simplex")

    def __str__(self):
        return "-".join([self.name, *(str(v) for v in self.extra.values())])


CASES = [
    *(Case("project_sphere", samples.sphere, (0,), {"norm": n}, ("norm",)) for n in (1, 2, np.inf)),
    *(Case("project_ball", samples.sphere, (0,), {"norm": n}, ("norm",)) for n in (1, 2, np.inf)),
    Case("project_simplex", samples.simplex, ()),
    Case("least_squares_on_sphere", samples.least_squares_on_sphere, (0, 1)),
    Case("weighted_least_squares", samples.weighted_least_squares, (0, 1, 2, 3)),
    Case("sinkhorn", samples.sinkhorn, (), {"eps": 0.2, "rtol": 1e-13}, ("eps",), True),
    *(
        Case("robust_pool", samples.robust_pool, (0,), {"kind": k}, ("kind",), True)
        for k in ("quadratic", "pseudo-huber", "huber", "welsch", "truncated")
    ),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def is_histogram(x):
    return x.ndim >= 1 and np.allclose(np.sum(x, axis=-1), 1, atol=1e-3)


TANGENT = Tangent(
    project=lambda x, d: d - np.mean(d, axis=-1, keepdims=True) if is_histogram(x) else d, retract=lambda x, d: x + d
)
"""Histograms keep their sums; any other input is free."""


def tangent(case):
    return TANGENT if case.name == "sinkhorn" else "dense"


def throwing(case, throw=False):
    return {"throw": throw} if case.throws else {}


def compiled(case, xp, throw=False):
    """Forward and VJP as the library compiles them; JAX needs its own loop, and cannot raise errors."""
    options = throwing(case, throw and xp.name != "jax")
    loop = {}
    if case.iterative and xp.name == "jax":
        import jax

        loop = {"while_loop": jax.lax.while_loop}
    return xp.jit(partial(case.forward, **options, **loop)), xp.jit(partial(case.vjp, **options))


@cases
@pytest.mark.parametrize(("batch", "m"), [((), 3), ((3,), 6), ((2, 2), 4)])
def test_agrees_with_finite_differences(case, batch, m, rng):
    sample = case.sample(np.asarray, rng, batch, m, False, **case.extra)
    report = assert_vjp(case.forward, case.vjp, *sample.inputs, needs=case.needs, gap=sample.gap, tangent=tangent(case))
    assert report.error <= 1e-9, report


@cases
def test_every_library_agrees_traced_and_not(case, xp, rng):
    inputs = case.inputs(rng, (2, 3))
    y = case.forward(*inputs)
    y_bar = rng.standard_normal(y.shape)
    needed = [inputs[i] for i in case.needs]
    forward, vjp = compiled(case, xp)
    got = forward(*(xp.asarray(a) for a in inputs))
    assert relative(xp.numpy(got), y) <= 1e-11
    arrays = [xp.asarray(a) for a in (y_bar, y, *needed)]
    for bar, e in zip(vjp(*arrays), case.vjp(y_bar, y, *needed), strict=True):
        assert relative(xp.numpy(bar), e) <= 1e-11
        assert xp.numpy(bar).dtype == np.float64


@cases
def test_structure(case, rng):
    inputs = case.inputs(rng, (4,))
    y = case.forward(*inputs)
    y_bar = rng.standard_normal(y.shape)
    needed = [inputs[i] for i in case.needs]
    bars = case.vjp(y_bar, y, *needed)
    assert [g.shape for g in bars] == [a.shape for a in inputs]
    assert all(np.all(g == 0) for g in case.vjp(0 * y_bar, y, *needed))
    loop = zip(*(case.vjp(y_bar[i, ...], y[i, ...], *(a[i, ...] for a in needed)) for i in range(4)), strict=True)
    for g, twice, alone in zip(bars, case.vjp(2.5 * y_bar, y, *needed), loop, strict=True):
        assert relative(twice, 2.5 * g) <= 1e-13
        assert relative(np.stack(alone), g) <= 1e-13
    alone = np.stack([case.forward(*(a[i, ...] for a in inputs)) for i in range(4)])
    assert relative(alone, y) <= 1e-13


@cases
def test_float32(case, xp, rng):
    sample = case.sample(np.asarray, rng, (4,), 8, False, **case.extra)
    if case.iterative and "rtol" in case.options:
        case = Case(case.name, case.sample, case.needs, {"eps": 0.2}, case.vjp_options, True)
    single = [a.astype(np.float32) for a in sample.inputs]
    forward, vjp = compiled(case, xp)
    y = xp.numpy(forward(*(xp.asarray(a) for a in single)))
    assert y.dtype == np.float32
    if case.name != "sinkhorn":  # its marginals, rounded to float32, do not sum to one in float64
        assert relative(y, case.forward(*(a.astype(np.float64) for a in single))) <= 1e-5
    arrays = [rng.standard_normal(y.shape).astype(np.float32), y, *(single[i] for i in case.needs)]
    exact = case.vjp(*(a.astype(np.float64) for a in arrays), **({"throw": False} if case.throws else {}))
    if case.name == "least_squares_on_sphere":  # y is a solution to float32 only
        double = [a.astype(np.float64) for a in single]
        exact = case.vjp(arrays[0].astype(np.float64), case.forward(*double), *double)
    for got, e in zip(vjp(*(xp.asarray(a) for a in arrays)), exact, strict=True):
        assert xp.numpy(got).dtype == np.float32
        assert relative(xp.numpy(got), e) <= 20 * np.finfo(np.float32).eps * sample.condition


@cases
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_item_leaves_the_others_alone(case, bad, xp, rng):
    inputs = [a.copy() for a in case.inputs(rng, (4,))]
    y = case.forward(*inputs)
    y_bar = rng.standard_normal(y.shape)
    good = case.vjp(y_bar, y, *(inputs[i] for i in case.needs))
    inputs[0].reshape(4, -1)[2, 0] = bad
    forward, vjp = compiled(case, xp)
    got = forward(*(xp.asarray(a) for a in inputs))
    bars = vjp(xp.asarray(y_bar), got, *(xp.asarray(inputs[i]) for i in case.needs))
    others = [0, 1, 3]
    for a, e in zip((got, *bars), (y, *good), strict=True):
        a = xp.numpy(a)
        assert np.all(np.isnan(a[2]))
        np.testing.assert_allclose(a[others], e[others], rtol=1e-9, atol=1e-11)


@cases
def test_mutants_are_rejected(case, rng):
    sample = case.sample(np.asarray, rng, (), 6, False, **case.extra)
    check = partial(check_vjp, case.forward, needs=case.needs, gap=sample.gap, directions=2, tangent=tangent(case))

    def each(change):
        return lambda *a: tuple(change(g) for g in case.vjp(*a))

    assert check(case.vjp, *sample.inputs).passed
    for mutant in (each(lambda g: -g), each(lambda g: 2 * g), each(lambda g: g * (1 + 1e-6))):
        assert not check(mutant, *sample.inputs).passed
    for i in range(len(sample.inputs)):  # one cotangent dropped
        dropped = lambda *a, i=i: tuple(0 * g if i == j else g for j, g in enumerate(case.vjp(*a)))
        assert not check(dropped, *sample.inputs).passed


@cases
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_empty_batches(case, batch, xp):
    inputs = [xp.asarray(np.zeros((*batch, *a.shape))) for a in case.inputs(np.random.default_rng(0), ())]
    forward, vjp = compiled(case, xp, throw=True)
    y = forward(*inputs)
    bars = vjp(y, y, *(inputs[i] for i in case.needs))
    assert [tuple(g.shape) for g in bars] == [tuple(a.shape) for a in inputs]


@cases
def test_host_reads(case, host_reads, rng):
    strict = backend("array-api-strict")
    inputs = [strict.asarray(a) for a in case.inputs(rng, (2,))]
    y = case.forward(*inputs)
    host_reads.clear()
    case.vjp(y, y, *(inputs[i] for i in case.needs), **throwing(case))
    if not case.iterative:  # an iteration reads its flag every few steps
        case.forward(*inputs, **throwing(case))
    assert host_reads == []


@cases
def test_another_device(case, second, rng):
    inputs = [second.asarray(a) for a in case.inputs(rng, (2,))]
    y = case.forward(*inputs, **throwing(case)) if not case.iterative else None
    if y is None:
        y = second.asarray(np.asarray(case.forward(*case.inputs(rng, (2,)))))
    bars = case.vjp(y, y, *(inputs[i] for i in case.needs), **throwing(case))
    assert all(bar.device == inputs[0].device for bar in bars)


@cases
def test_bad_arrays(case, rng):
    inputs = case.inputs(rng, ())
    y = case.forward(*inputs)
    needed = [inputs[i] for i in case.needs]
    with pytest.raises(TypeError, match="int64"):
        case.forward(np.ones(inputs[0].shape, dtype=np.int64), *inputs[1:])
    with pytest.raises(TypeError, match="not an array"):
        case.forward([1.0], *inputs[1:])
    with pytest.raises(TypeError, match="real arrays only"):
        case.forward(*(a + 0j for a in inputs))
    with pytest.raises(ValueError, match="has shape"):
        case.forward(np.asarray(1.0), *inputs[1:])
    with pytest.raises(TypeError, match="float32"):
        case.vjp(np.zeros_like(y, dtype=np.float32), y, *needed)
    with pytest.raises(ValueError, match="has shape"):
        case.vjp(np.ones((*y.shape, 2)), y, *needed)


@pytest.mark.framework("torch")
@cases
def test_recording_is_refused(case, rng):
    xp = backend("torch")
    inputs = [xp.asarray(a) for a in case.inputs(rng, ())]
    inputs[0].requires_grad_(True)
    with pytest.raises(TypeError, match="requires grad"):
        case.forward(*inputs)
