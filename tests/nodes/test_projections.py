"""Every node, on every library: its gradient and its tangent against finite differences, each other and mutants."""

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
from ddnref._rules.table import RULES
from ddnref.testing import Tangent, assert_vjp, check_vjp, numerical_jvp


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
        bars = PUBLIC[f"{self.name}_vjp"](y_bar, y, *inputs, **options, **more)
        return as_tuple(bars[0] if RULES[self.name].vjp_info else bars)

    def jvp(self, *arrays, **more):
        """The tangent of the output, from tangents of the inputs, the output and the inputs that the VJP takes."""
        options = {k: v for k, v in self.options.items() if k in self.vjp_options}
        y_dot = PUBLIC[f"{self.name}_jvp"](*arrays, **options, **more)
        return y_dot[0] if RULES[self.name].vjp_info else y_dot

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
    Case("sinkhorn", samples.sinkhorn, (0, 1, 2, 3), {}, (), True),
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
    inputs[0].reshape(4, -1)[2, 0] = -bad if case.name == "sinkhorn" else bad  # a cost may be infinite
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


# --- the forward mode ---------------------------------------------------------------------------------------------


def directions(case, rng, inputs):
    """Random tangents along which the inputs may move."""
    dots = [rng.standard_normal(a.shape) for a in inputs]
    return [TANGENT.project(a, d) for a, d in zip(inputs, dots, strict=True)] if case.name == "sinkhorn" else dots


def pairing(a, b):
    return sum(np.sum(x * y) for x, y in zip(a, b, strict=True))


def transpose_error(case, y_bar, y_dot, bars, dots):
    return abs(pairing([y_bar], [y_dot]) - pairing(bars, dots)) / (np.linalg.norm(y_bar) * np.linalg.norm(y_dot))


@cases
@pytest.mark.parametrize(("batch", "m"), [((), 3), ((3,), 6), ((2, 2), 4)])
def test_jvp_is_the_derivative_and_the_transpose_of_the_vjp(case, batch, m, rng):
    """Along all inputs together, and along each alone with ``None`` for the others."""
    sample = case.sample(np.asarray, rng, batch, m, False, **case.extra)
    inputs, y = sample.inputs, case.forward(*sample.inputs)
    needed, y_bar = [inputs[i] for i in case.needs], rng.standard_normal(y.shape)
    bars, dots = case.vjp(y_bar, y, *needed), directions(case, rng, inputs)
    alone = [[d if i == j else None for j, d in enumerate(dots)] for i in range(len(dots))]
    for given in [dots] + alone * (len(dots) > 1):
        moved = [np.zeros_like(a) if d is None else d for a, d in zip(inputs, given, strict=True)]
        y_dot = case.jvp(*given, y, *needed)
        assert y_dot.shape == y.shape
        assert transpose_error(case, y_bar, y_dot, bars, moved) <= 1e-12
        size = max(np.linalg.norm(d) for d in moved)
        step = min(1e-4 * max(np.linalg.norm(a) for a in inputs), 3e-3 * sample.gap) / size
        along = lambda t, moved=moved: case.forward(*(a + t[0] * d for a, d in zip(inputs, moved, strict=True)))
        numerical = numerical_jvp(along, np.zeros(1), np.ones(1), step=step)
        assert np.linalg.norm(numerical - y_dot) <= 1e-9 * max(np.linalg.norm(y_dot), size)


@cases
def test_jvp_on_every_library_traced_and_not(case, xp, rng):
    inputs = case.inputs(rng, (2, 3))
    y, dots = case.forward(*inputs), directions(case, rng, inputs)
    arrays = [*dots, y, *(inputs[i] for i in case.needs)]
    expected = case.jvp(*arrays)
    for jvp in (case.jvp, xp.jit(partial(case.jvp, **throwing(case)))):
        got = xp.numpy(jvp(*map(xp.asarray, arrays)))
        assert got.dtype == np.float64
        assert relative(got, expected) <= 1e-11


@cases
def test_structure_of_the_jvp(case, rng):
    """Linear in the tangents, and each item of a batch as it is alone."""
    inputs = case.inputs(rng, (4,))
    y, needed = case.forward(*inputs), [inputs[i] for i in case.needs]
    dots = directions(case, rng, inputs)
    y_dot = case.jvp(*dots, y, *needed)
    assert np.all(case.jvp(*(0 * d for d in dots), y, *needed) == 0)
    assert relative(case.jvp(*(2.5 * d for d in dots), y, *needed), 2.5 * y_dot) <= 1e-13
    alone = [case.jvp(*(d[i] for d in dots), y[i, ...], *(a[i, ...] for a in needed)) for i in range(4)]
    assert relative(np.stack(alone), y_dot) <= 1e-13


@cases
def test_jvp_in_float32(case, xp, rng):
    sample = case.sample(np.asarray, rng, (4,), 8, False, **case.extra)
    y, dots = case.forward(*sample.inputs), directions(case, rng, sample.inputs)
    arrays = [a.astype(np.float32) for a in (*dots, y, *(sample.inputs[i] for i in case.needs))]
    options = throwing(case, xp.name != "jax")
    got = xp.numpy(xp.jit(partial(case.jvp, **options))(*map(xp.asarray, arrays)))
    exact = case.jvp(*dots, y, *(sample.inputs[i] for i in case.needs))
    assert got.dtype == np.float32
    assert relative(got, exact) <= 20 * np.finfo(np.float32).eps * sample.condition


@cases
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_item_leaves_the_tangents_of_the_others_alone(case, bad, xp, rng):
    inputs = [a.copy() for a in case.inputs(rng, (4,))]
    y, dots = case.forward(*inputs), directions(case, rng, inputs)
    good = case.jvp(*dots, y, *(inputs[i] for i in case.needs))
    inputs[0].reshape(4, -1)[2, 0] = -bad if case.name == "sinkhorn" else bad  # a cost may be infinite
    y = case.forward(*inputs, **throwing(case)) if not case.iterative else case.forward(*inputs, throw=False)
    arrays = [*dots, y, *(inputs[i] for i in case.needs)]
    got = xp.numpy(xp.jit(partial(case.jvp, **throwing(case)))(*map(xp.asarray, arrays)))
    assert np.all(np.isnan(got[2]))
    np.testing.assert_allclose(got[[0, 1, 3]], good[[0, 1, 3]], rtol=1e-9, atol=1e-11)


@cases
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_tangents_of_empty_batches(case, batch, xp):
    inputs = [xp.asarray(np.zeros((*batch, *a.shape))) for a in case.inputs(np.random.default_rng(0), ())]
    y = case.forward(*inputs)
    y_dot = case.jvp(*inputs, y, *(inputs[i] for i in case.needs))
    assert tuple(y_dot.shape) == tuple(y.shape)


@cases
def test_jvp_reads_nothing_on_the_host(case, host_reads, rng):
    strict = backend("array-api-strict")
    inputs = [strict.asarray(a) for a in case.inputs(rng, (2,))]
    y = case.forward(*inputs)
    host_reads.clear()
    case.jvp(*inputs, y, *(inputs[i] for i in case.needs), **throwing(case))
    assert host_reads == []


@cases
def test_jvp_on_another_device(case, second, rng):
    inputs = [second.asarray(a) for a in case.inputs(rng, (2,))]
    y = second.asarray(np.asarray(case.forward(*case.inputs(rng, (2,)))))
    y_dot = case.jvp(*inputs, y, *(inputs[i] for i in case.needs), **throwing(case))
    assert y_dot.device == inputs[0].device


@cases
def test_bad_tangents(case, rng):
    inputs = case.inputs(rng, ())
    y, needed = case.forward(*inputs), [inputs[i] for i in case.needs]
    for i in range(len(inputs)):
        one = [None] * len(inputs)
        for value, error, says in (
            (inputs[i].astype(np.float32), TypeError, "float32"),
            (np.ones((*inputs[i].shape, 2)), ValueError, "_dot has shape"),
            (np.ones((7, 3)).tolist(), TypeError, "_dot is a list|not an array"),
            (inputs[i] + 0j, TypeError, "real arrays only"),
        ):
            one[i] = value
            with pytest.raises(error, match=says):
                case.jvp(*one, y, *needed)
    with pytest.raises(TypeError, match="None"):
        case.jvp(*[None] * len(inputs), y, *needed)
    with pytest.raises(TypeError, match="None"):
        case.jvp(*inputs, None, *needed)


@cases
def test_mutants_of_the_jvp_are_rejected(case, rng):
    """The transpose identity alone tells a wrong sign, a wrong factor and a missing term."""
    inputs = case.inputs(rng, ())
    y, needed = case.forward(*inputs), [inputs[i] for i in case.needs]
    y_bar, dots = rng.standard_normal(y.shape), directions(case, rng, inputs)
    bars, y_dot = case.vjp(y_bar, y, *needed), case.jvp(*dots, y, *needed)
    wrong = [-y_dot, y_dot * (1 + 1e-9)]
    wrong += [case.jvp(*(0 * d if i == j else d for j, d in enumerate(dots)), y, *needed) for i in range(len(dots))]
    for mutant in wrong[: None if len(dots) > 1 else 2]:
        assert transpose_error(case, y_bar, mutant, bars, dots) > 1e-12


@pytest.mark.framework("torch")
@cases
def test_recording_is_refused(case, rng):
    xp = backend("torch")
    inputs = [xp.asarray(a) for a in case.inputs(rng, ())]
    inputs[0].requires_grad_(True)
    with pytest.raises(TypeError, match="requires grad"):
        case.forward(*inputs)
