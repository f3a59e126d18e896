"""Every rule in the table, on every array library: finite differences, structure, precision, bad batches."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import adjoint, relative

import ddnref
from conftest import Backend
from ddnref._rules import RULES, Rule, as_tuple, options_of
from ddnref.testing import assert_vjp, check_vjp

rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
domain = pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])


def solve(rule: Rule, sample, backend: Backend):
    """Outputs, saved arrays, cotangents of the sample's loss (or ones) and the bound VJP."""
    forward, vjp = options_of(rule, sample.options)
    outputs, saved = rule.forward(*sample.inputs, **forward)
    outputs = as_tuple(outputs)
    bars = as_tuple(sample.loss[1](*outputs)) if sample.loss else tuple(backend.namespace.ones_like(y) for y in outputs)
    return outputs, saved, bars, partial(rule.vjp, **vjp)


@rules
@domain
@pytest.mark.parametrize(("batch", "m"), [((), 1), ((), 7), ((3,), 5), ((2, 2), 3)])
def test_vjp_agrees_with_finite_differences(rule, is_complex, batch, m, xp, rng):
    sample = rule.sample(xp.asarray, rng, batch, m, is_complex)
    forward, vjp = options_of(rule, sample.options)
    report = assert_vjp(
        xp.jit(partial(rule.forward, **forward)),
        xp.jit(partial(rule.vjp, **vjp)),
        *sample.inputs,
        saves=True,
        loss=sample.loss,
        gap=sample.gap,
        tangent=rule.tangent,
        symmetrises=rule.symmetrises,
    )
    assert report.error <= 1e-9, report


@rules
@domain
def test_structure_of_the_vjp(rule, is_complex, xp, rng):
    sample = rule.sample(xp.asarray, rng, (3,), 6, is_complex)
    outputs, saved, bars, vjp = solve(rule, sample, xp)
    x_bar = xp.numpy(vjp(*bars, *outputs, *saved))
    assert np.array_equal(x_bar, adjoint(x_bar)), "not exactly Hermitian"
    twice = xp.numpy(vjp(*(2.5 * b for b in bars), *outputs, *saved))
    assert relative(twice, 2.5 * x_bar) <= 1e-13
    zero = xp.numpy(vjp(*(0 * b for b in bars), *outputs, *saved))
    assert np.all(zero == 0)
    loop = [xp.numpy(vjp(*(a[i, ...] for a in (*bars, *outputs, *saved)))) for i in range(3)]
    assert relative(np.stack(loop), x_bar) <= 1e-13


@rules
@domain
def test_float32_agrees_with_float64_on_identical_inputs(rule, is_complex, xp, rng):
    sample = rule.sample(np.asarray, rng, (4,), 8, is_complex)
    outputs, saved, bars, vjp = solve(rule, sample, Backend("numpy", np))
    if rule.outputs == 2:  # cotangents rounded to float32 leave a phase of 1e-7 in float64: judge it as float32
        vjp = partial(vjp, gauge_rtol=float(np.finfo(np.float32).eps) ** 0.5)
    arrays = [a.astype(np.complex64 if np.iscomplexobj(a) else np.float32) for a in (*bars, *outputs, *saved)]
    single = vjp(*(xp.asarray(a) for a in arrays))
    double = vjp(*(a.astype(np.complex128 if np.iscomplexobj(a) else np.float64) for a in arrays))
    assert str(single.dtype).endswith("complex64" if is_complex else "float32")
    assert relative(xp.numpy(single), double) <= 20 * np.finfo(np.float32).eps * sample.condition


@rules
def test_one_bad_item_leaves_the_others_alone(rule, xp, rng):
    sample = rule.sample(np.asarray, rng, (5,), 6, False)
    forward, _ = options_of(rule, sample.options)
    (x,) = sample.inputs
    bad = x.copy()
    bad[2, 1, 0] = np.nan
    good_outputs, good_saved = rule.forward(xp.asarray(x), **forward)
    outputs, saved = rule.forward(xp.asarray(bad), **forward)
    _, vjp = options_of(rule, sample.options)

    def gradient(outputs, saved):
        outputs = as_tuple(outputs)
        shapes = [np.random.default_rng(i).standard_normal(y.shape) for i, y in enumerate(outputs)]
        return rule.vjp(*(xp.asarray(b) for b in shapes), *outputs, *saved, **vjp)

    others = [0, 1, 3, 4]
    pairs = zip(
        (*as_tuple(outputs), gradient(outputs, saved)),
        (*as_tuple(good_outputs), gradient(good_outputs, good_saved)),
        strict=True,
    )
    for y, good in pairs:
        y, good = xp.numpy(y), xp.numpy(good)
        assert np.all(np.isnan(y[2]))
        assert np.array_equal(y[others], good[others])


@rules
def test_runs_where_no_value_can_be_read(rule, second, rng):
    sample = rule.sample(second.asarray, rng, (2,), 5, False)
    outputs, saved, bars, vjp = solve(rule, sample, second)
    x_bar = vjp(*bars, *outputs, *saved)
    assert tuple(x_bar.shape) == (2, 5, 5)
    assert x_bar.device == sample.inputs[0].device


@rules
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3, 3), (2, 1, 1), (0, 0), (3, 0, 0)])
def test_empty_and_single(rule, shape, xp):
    if rule.name == "eigh_topk" and shape[-1] == 0:
        with pytest.raises(ValueError, match="k is 1"):
            rule.function(xp.asarray(np.ones(shape)), 1)
        return
    options = {"k": 1} if rule.name == "eigh_topk" else {}
    if rule.name == "spectral_function":
        options = {"f": lambda w: w * w, "df": lambda w: 2 * w}
    forward, vjp = options_of(rule, options)
    outputs, saved = rule.forward(xp.asarray(np.ones(shape)), **forward)
    x_bar = rule.vjp(*as_tuple(outputs), *as_tuple(outputs), *saved, **vjp)
    assert tuple(x_bar.shape) == shape


@given(
    spectrum=st.lists(st.floats(0.25, 4.0), min_size=1, max_size=6),
    batch=st.lists(st.integers(0, 2), max_size=2),
    seed=st.integers(0, 2**16),
)
def test_functions_of_a_matrix_at_any_spectrum(spectrum, batch, seed):
    rng = np.random.default_rng(seed)
    w = np.broadcast_to(spectrum, (*batch, len(spectrum)))
    from ddnref._rules import random_spectrum

    x = random_spectrum(rng, tuple(batch), w)
    for name in ("sqrtm", "invsqrtm", "logm", "expm"):
        rule = RULES[name]
        assert_vjp(rule.forward, rule.vjp, x, saves=True, tangent="symmetric", symmetrises=True, gap=0.25, directions=2)


def mutants(rule: Rule):
    """Wrong VJPs as people write them, from MATH: each must be rejected."""

    def wrap(change):
        return lambda *arrays, **options: change(rule.vjp(*arrays, **options))

    def skew(g):
        xp = np
        half = xp.triu(g)
        return 2 * half - xp.einsum("...ii->...i", half)[..., None] * xp.eye(g.shape[-1])

    yield "sign", wrap(lambda g: -g)
    yield "scale", wrap(lambda g: 2 * g)
    yield "one part in a million", wrap(lambda g: g * (1 + 1e-6))
    yield "one triangle (no symmetrisation)", wrap(skew)
    yield "no vector part", lambda *a, **k: rule.vjp(a[0], 0 * a[1], *a[2:], **k) if rule.outputs == 2 else 0 * a[0]
    if rule.outputs == 2:
        yield "no value part", lambda *a, **k: rule.vjp(None, *a[1:], **k)
        yield "wrong sign of the gaps", lambda *a, **k: rule.vjp(a[0], -a[1], *a[2:], **k)
    else:
        yield "wrong transpose", lambda *a, **k: rule.vjp(*a[:-1], adjoint(a[-1]), **k)


@rules
@domain
@pytest.mark.parametrize("m", [3, 16, 64])
def test_every_mutant_is_rejected(rule, is_complex, m, rng):
    sample = rule.sample(np.asarray, rng, (), m, is_complex)
    forward, vjp = options_of(rule, sample.options)
    check = partial(
        check_vjp, saves=True, loss=sample.loss, gap=sample.gap, tangent=rule.tangent,
        symmetrises=rule.symmetrises, directions=2,
    )  # fmt: skip
    survivors = [
        name
        for name, mutant in mutants(rule)
        if check(partial(rule.forward, **forward), partial(mutant, **vjp), *sample.inputs).passed
    ]
    assert survivors == []


def test_the_table_is_the_public_api():
    differentiable = {name.removesuffix("_vjp") for name in ddnref.__all__ if name.endswith("_vjp")}
    assert differentiable == set(RULES)
    for name, rule in RULES.items():
        assert rule.function is getattr(ddnref, name)
        assert rule.vjp is getattr(ddnref, f"{name}_vjp")
    assert sorted(ddnref.__all__) == ddnref.__all__
