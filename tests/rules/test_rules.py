"""Every rule in the table, on every array library: finite differences, structure, precision, bad batches."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import matrix
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import adjoint, relative
from public_names import PUBLIC

from conftest import Backend
from ddnref._rules.binding import as_tuple, jvp_options_of, options_of, plain_forward, plain_jvp, plain_vjp
from ddnref._rules.contract import Rule
from ddnref._rules.samples import random_spectrum
from ddnref._rules.samples.eigen import square, twice
from ddnref._rules.table import RULES, TRIALS
from ddnref.testing import assert_jvp, assert_transpose, assert_vjp, check_jvp, check_transpose, check_vjp
from ddnref.testing._differences import random_like, tangent_spaces

rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
domains = pytest.mark.parametrize(
    ("rule", "is_complex"),
    [
        pytest.param(rule, is_complex, id=f"{rule.name}-{'complex' if is_complex else 'real'}")
        for rule in RULES.values()
        for is_complex in (False, True)
        if TRIALS[rule.name].is_complex or not is_complex
    ],
)
STRUCTURE = 1e-13


NUMPY = Backend("numpy", np)


class Solved(NamedTuple):
    """A rule at work on one of its samples: by an array library, but from NumPy arrays to NumPy arrays."""

    outputs: tuple
    kept: tuple
    """Arguments of the VJP after the cotangents."""
    bars: tuple
    vjp: Callable[..., tuple]


def solve(rule: Rule, sample, backend: Backend) -> Solved:
    """Run the forward, and take the cotangents of the sample's loss, or random ones."""
    forward, vjp = lifted(rule, sample, backend)
    outputs, saved = forward(*sample.inputs)
    bars = as_tuple(sample.loss[1](*outputs)) if sample.loss else tuple(map(random, outputs, range(rule.outputs)))
    return Solved(outputs, (*outputs, *saved, *needed(rule, sample.inputs)), bars, vjp)


def lifted(rule: Rule, sample, backend: Backend, vjp=None) -> tuple[Callable, Callable]:
    """Forward and VJP with the options of a sample, as the library compiles them."""
    forward_options, vjp_options = options_of(rule, sample.options, backend.while_loop)
    return (
        backend.lift(partial(plain_forward(rule), **forward_options)),
        backend.lift(partial(vjp or plain_vjp(rule), **vjp_options)),
    )


def random(y: np.ndarray, seed: int) -> np.ndarray:
    z = np.random.default_rng(seed).standard_normal((2, *y.shape))
    return (z[0] + 1j * z[1] if np.iscomplexobj(y) else z[0]).astype(y.dtype)


def needed(rule: Rule, inputs: tuple) -> tuple:
    return tuple(inputs[i] for i in rule.needs)


def flat(arrays: tuple) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in arrays])


def rounding(rule: Rule, sample) -> float:
    """Tolerance of an identity; an iterative solve amplifies its rounding."""
    return STRUCTURE * (sample.condition if rule.vjp_info else 1)


def checked(rule: Rule, sample, backend: Backend, check=assert_vjp, vjp=None, **options):
    return check(
        *lifted(rule, sample, backend, vjp),
        *sample.inputs,
        saves=True,
        needs=rule.needs,
        loss=sample.loss,
        gap=sample.gap,
        tangent=TRIALS[rule.name].tangent,
        symmetrises=TRIALS[rule.name].symmetrises,
        **options,
    )


@domains
@pytest.mark.parametrize(("batch", "m"), [((), 1), ((), 5), ((3,), 5), ((2, 2), 3)])
def test_vjp_agrees_with_finite_differences(rule, is_complex, batch, m, xp, rng, cell):
    """On NumPy by differences; elsewhere the forward and the VJP give the gradient of NumPy's, which is stricter."""
    sample = TRIALS[rule.name].sample(np.asarray, rng, batch, m, is_complex)
    _, kept, bars, vjp = solve(rule, sample, NUMPY)
    if xp.name == "numpy":
        report = checked(rule, sample, xp, directions=8)
        assert report.error <= 1e-9, report
    else:
        _, theirs, their_bars, their_vjp = solve(rule, sample, xp)
        expected = flat(vjp(*bars, *kept))
        assert relative(flat(their_vjp(*their_bars, *theirs)), expected) <= 1e-9
        assert relative(flat(their_vjp(*bars, *kept)), expected) <= rounding(rule, sample)
    if xp.name in matrix.LIBRARIES:
        cell(matrix.PAIR, f"{matrix.LIBRARIES[xp.name]}{', batched' if batch else ''}", rule.name)


@domains
def test_structure_of_the_vjp(rule, is_complex, xp, rng):
    sample = TRIALS[rule.name].sample(np.asarray, rng, (3,), 5, is_complex)
    _, kept, bars, vjp = solve(rule, sample, xp)
    gradients = vjp(*bars, *kept)
    tolerance = rounding(rule, sample)
    if TRIALS[rule.name].tangent == "symmetric":
        assert np.array_equal(gradients[0], adjoint(gradients[0])), "not exactly Hermitian"
    twice = vjp(*(2.5 * b for b in bars), *kept)
    assert relative(flat(twice), 2.5 * flat(gradients)) <= tolerance
    assert np.all(flat(vjp(*(0 * b for b in bars), *kept)) == 0)
    for i in range(3):
        one = vjp(*(a[i, ...] for a in (*bars, *kept)))
        assert relative(flat(one), flat(tuple(g[i, ...] for g in gradients))) <= tolerance


def as_precision(a, dtype):
    """Integers, such as the pivots of a factorisation, stay as they are."""
    return a if a.dtype.kind in "iu" else a.astype(np.result_type(dtype, np.complex64) if np.iscomplexobj(a) else dtype)


@domains
def test_float32_agrees_with_float64_on_identical_inputs(rule, is_complex, xp, rng):
    sample = TRIALS[rule.name].sample(np.asarray, rng, (4,), 8, is_complex)
    _, kept, bars, _ = solve(rule, sample, NUMPY)
    vjp = partial(plain_vjp(rule), **options_of(rule, sample.options)[1])
    # outputs and cotangents rounded to float32 leave a phase, or miss the solution, by 1e-7: judge it as float32
    for name in {"gauge_rtol", "check_rtol"} & set(inspect.signature(rule.vjp).parameters):
        vjp = partial(vjp, **{name: float(np.finfo(np.float32).eps) ** 0.5})
    if rule.vjp_info and not rule.direct:
        vjp = partial(vjp, rtol=16 * float(np.finfo(np.float32).eps))
    arrays = [as_precision(a, np.float32) for a in (*bars, *kept)]
    single = xp.lift(vjp)(*arrays)
    double = vjp(*(as_precision(a, np.float64) for a in arrays))
    assert all(x_bar.dtype == ("complex64" if is_complex else "float32") for x_bar in single)
    tolerance = 20 * np.finfo(np.float32).eps * sample.condition
    assert relative(flat(single), flat(double)) <= tolerance


@rules
def test_one_bad_item_leaves_the_others_alone(rule, xp, rng):
    sample = TRIALS[rule.name].sample(np.asarray, rng, (3,), 5, False)
    solve, pull = lifted(rule, sample, xp)

    def evaluate(inputs):
        outputs, saved = solve(*inputs)
        return *outputs, *pull(*map(random, outputs, range(rule.outputs)), *outputs, *saved, *needed(rule, inputs))

    good = evaluate(sample.inputs)
    others = [0, 2]
    for i, x in enumerate(sample.inputs):
        bad = x.copy()
        bad[1] = np.where(np.arange(x[1].size) == x[1].size - 1, np.nan, x[1].ravel()).reshape(x[1].shape)
        for y, same in zip(evaluate((*sample.inputs[:i], bad, *sample.inputs[i + 1 :])), good, strict=True):
            assert np.all(np.isnan(y[1]))
            assert np.array_equal(y[others], same[others])


@rules
def test_runs_where_no_value_can_be_read(rule, second, rng):
    """On torch's meta device nothing that iterates can run: there its VJP is given what NumPy computed."""
    sample = TRIALS[rule.name].sample(np.asarray, rng, (2,), 5, False)
    valueless = second.name == "torch"
    forward, vjp = options_of(rule, sample.options)
    on = NUMPY if valueless and rule.info is not None else second
    inputs = tuple(map(on.asarray, sample.inputs))
    outputs, saved = plain_forward(rule)(*inputs, **forward)
    kept = (*outputs, *saved, *needed(rule, inputs))
    kept = kept if on is second else tuple(second.asarray(np.ascontiguousarray(a)) for a in kept)
    gradients = plain_vjp(rule)(*kept[: rule.outputs], *kept, **vjp)
    for x, x_bar in zip(sample.inputs, gradients, strict=True):
        assert tuple(x_bar.shape) == x.shape
        assert x_bar.device == kept[0].device


@rules
@pytest.mark.parametrize(("batch", "m"), [((0,), 4), ((2, 0), 3), ((2,), 1)])
def test_empty_and_single(rule, batch, m, xp, rng):
    sample = TRIALS[rule.name].sample(np.asarray, rng, batch, m, False)
    _, kept, bars, vjp = solve(rule, sample, xp)
    for x, x_bar in zip(sample.inputs, vjp(*bars, *kept), strict=True):
        assert x_bar.shape == x.shape


@pytest.mark.parametrize("name", ["eigh", "spectral_function", "sqrtm", "invsqrtm", "logm", "expm"])
@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0)])
def test_matrices_without_entries(name, shape, xp):
    forward, vjp = options_of(RULES[name], {"f": square, "df": twice} if name == "spectral_function" else {})
    outputs, saved = plain_forward(RULES[name])(xp.asarray(np.ones(shape)), **forward)
    (x_bar,) = plain_vjp(RULES[name])(*outputs, *outputs, *saved, **vjp)
    assert tuple(x_bar.shape) == shape


@given(
    spectrum=st.lists(st.floats(0.25, 4.0), min_size=1, max_size=6),
    batch=st.lists(st.integers(0, 2), max_size=2),
    seed=st.integers(0, 2**16),
)
def test_functions_of_a_matrix_at_any_spectrum(spectrum, batch, seed):
    rng = np.random.default_rng(seed)
    w = np.broadcast_to(spectrum, (*batch, len(spectrum)))
    x = random_spectrum(rng, tuple(batch), w)
    for name in ("sqrtm", "invsqrtm", "logm", "expm"):
        rule = RULES[name]
        assert_vjp(rule.forward, rule.vjp, x, saves=True, tangent="symmetric", symmetrises=True, gap=0.25, directions=2)


def moving(rule: Rule, inputs: tuple) -> range:
    """Outputs that have a derivative: the sign of a real determinant has none."""
    return range(1 if rule.name == "slogdet" and not np.iscomplexobj(inputs[0]) else 0, rule.outputs)


def mutants(rule: Rule, inputs: tuple):
    """Wrong VJPs as people write them, from MATH: each must be rejected."""
    vjp = plain_vjp(rule)

    def wrap(change):
        return lambda *arrays, **options: tuple(change(g) for g in vjp(*arrays, **options))

    def one_triangle(g):
        half = np.triu(g)
        return 2 * half - np.einsum("...ii->...i", half)[..., None] * np.eye(g.shape[-1])

    yield "sign", wrap(lambda g: -g)
    yield "scale", wrap(lambda g: 2 * g)
    yield "one part in a million", wrap(lambda g: g * (1 + 1e-6))
    if TRIALS[rule.name].symmetrises:
        yield "one triangle (no symmetrisation)", wrap(one_triangle)
    elif inputs[0].ndim > 1 and inputs[0].shape[-1] == inputs[0].shape[-2] > 1:
        yield "transposed", wrap(lambda g: np.swapaxes(g, -1, -2) if g.ndim > 1 and g.shape[-1] == g.shape[-2] else g)
    for i in moving(rule, inputs):
        yield f"no cotangent {i}", lambda *a, i=i, **k: vjp(*a[:i], 0 * a[i], *a[i + 1 :], **k)
        yield f"sign of cotangent {i}", lambda *a, i=i, **k: vjp(*a[:i], -a[i], *a[i + 1 :], **k)
    for i in range(len(inputs) if len(inputs) > 1 else 0):
        yield (
            f"no gradient of input {i}",
            lambda *a, i=i, **k: tuple(0 * g if j == i else g for j, g in enumerate(vjp(*a, **k))),
        )
    if rule.outputs == 1 and TRIALS[rule.name].tangent == "symmetric":
        yield "wrong transpose", lambda *a, **k: vjp(*a[:-1], adjoint(a[-1]), **k)


SLOW = tuple(pytest.param(m, marks=pytest.mark.slow) for m in (16, 64))


@domains
@pytest.mark.parametrize("m", [3, *SLOW])
def test_every_mutant_is_rejected(rule, is_complex, m, rng):
    sample = TRIALS[rule.name].sample(np.asarray, rng, (), m, is_complex)
    survivors = [
        name
        for name, mutant in mutants(rule, sample.inputs)
        if checked(rule, sample, NUMPY, check_vjp, mutant, directions=2).passed
    ]
    assert survivors == []


# --- the forward derivative -----------------------------------------------------------------------------------------


def lifted_jvp(rule: Rule, sample, backend: Backend, jvp=None) -> Callable:
    """The JVP with the options of a sample, as the library compiles it."""
    options = jvp_options_of(rule, sample.options, backend.while_loop)
    return backend.lift(partial(jvp or plain_jvp(rule), **options))


def tangents(rule: Rule, sample, rng) -> tuple:
    """Random tangents in the set where the inputs may move; any matrix, where the rule symmetrises."""
    trial = TRIALS[rule.name]
    drawn = [random_like(rng, x) for x in sample.inputs]
    spaces = tangent_spaces("dense" if trial.symmetrises else trial.tangent, len(drawn))
    return tuple(space.project(x, d) for space, x, d in zip(spaces, sample.inputs, drawn, strict=True))


def checked_forward(rule: Rule, sample, check, *functions, **options):
    trial = TRIALS[rule.name]
    settings = {"loss": sample.loss, "tangent": trial.tangent, "symmetrises": trial.symmetrises}
    forward, _ = lifted(rule, sample, NUMPY)
    return check(forward, *functions, *sample.inputs, saves=True, needs=rule.needs, **settings, **options)


@domains
@pytest.mark.parametrize(("batch", "m"), [((), 1), ((), 5), ((3,), 5), ((2, 2), 3)])
def test_jvp_agrees_with_finite_differences_and_with_the_vjp(rule, is_complex, batch, m, rng):
    sample = TRIALS[rule.name].sample(np.asarray, rng, batch, m, is_complex)
    jvp, (_, vjp) = lifted_jvp(rule, sample, NUMPY), lifted(rule, sample, NUMPY)
    checked_forward(rule, sample, assert_jvp, jvp, gap=sample.gap, directions=4, rtol=1e-9)
    # Systems that are solved by iteration are solved to a residual that their condition number amplifies.
    amplification = sample.condition if rule.vjp_info and not rule.direct else 1.0
    checked_forward(rule, sample, assert_transpose, jvp, vjp, rtol=1e-12 * amplification)


@domains
def test_structure_of_the_jvp(rule, is_complex, xp, rng):
    """It agrees with NumPy, and is linear, zero at zero, and that of each item of a batch."""
    sample = TRIALS[rule.name].sample(np.asarray, rng, (3,), 5, is_complex)
    _, kept, _, _ = solve(rule, sample, NUMPY)
    jvp, dots, tolerance = lifted_jvp(rule, sample, xp), tangents(rule, sample, rng), rounding(rule, sample)
    moved = jvp(*dots, *kept)
    assert [dot.dtype for dot in moved] == [y.dtype for y in kept[: rule.outputs]]
    assert relative(flat(moved), flat(lifted_jvp(rule, sample, NUMPY)(*dots, *kept))) <= tolerance
    assert relative(flat(jvp(*(2.5 * d for d in dots), *kept)), 2.5 * flat(moved)) <= tolerance
    assert np.all(flat(jvp(*(0 * d for d in dots), *kept)) == 0)
    one = jvp(*(a[1, ...] for a in (*dots, *kept)))
    assert relative(flat(one), flat(tuple(dot[1, ...] for dot in moved))) <= tolerance


@rules
def test_none_is_a_tangent_of_zeros(rule, rng):
    sample = TRIALS[rule.name].sample(np.asarray, rng, (2,), 5, False)
    _, kept, _, _ = solve(rule, sample, NUMPY)
    jvp, dots = partial(plain_jvp(rule), **jvp_options_of(rule, sample.options)), tangents(rule, sample, rng)
    for i in range(len(dots) if len(dots) > 1 else 0):
        alone = jvp(*(d if j == i else None for j, d in enumerate(dots)), *kept)
        zeros = jvp(*(d if j == i else 0 * d for j, d in enumerate(dots)), *kept)
        assert relative(flat(alone), flat(zeros)) <= rounding(rule, sample)
    with pytest.raises(TypeError, match=r"None"):
        jvp(*(None for _ in dots), *kept)


@domains
def test_float32_jvp_agrees_with_float64_on_identical_inputs(rule, is_complex, xp, rng):
    sample = TRIALS[rule.name].sample(np.asarray, rng, (4,), 8, is_complex)
    _, kept, _, _ = solve(rule, sample, NUMPY)
    jvp = partial(plain_jvp(rule), **jvp_options_of(rule, sample.options))
    # Outputs that were rounded to float32 miss the solution by 1e-7, so judge them as float32.
    for name in {"gauge_rtol", "check_rtol"} & set(inspect.signature(rule.jvp).parameters):
        jvp = partial(jvp, **{name: float(np.finfo(np.float32).eps) ** 0.5})
    if rule.vjp_info and not rule.direct:
        jvp = partial(jvp, rtol=16 * float(np.finfo(np.float32).eps))
    arrays = [as_precision(a, np.float32) for a in (*tangents(rule, sample, rng), *kept)]
    single, double = xp.lift(jvp)(*arrays), jvp(*(as_precision(a, np.float64) for a in arrays))
    assert [dot.dtype for dot in single] == [as_precision(y, np.float32).dtype for y in kept[: rule.outputs]]
    assert relative(flat(single), flat(double)) <= 20 * np.finfo(np.float32).eps * sample.condition


def forward_mutants(rule: Rule, inputs: tuple):
    """Wrong JVPs, each of which must be rejected."""
    jvp, n = plain_jvp(rule), len(inputs)

    def wrap(change):
        return lambda *arrays, **options: tuple(change(t) for t in jvp(*arrays, **options))

    yield "sign", wrap(lambda t: -t)
    yield "zero", wrap(lambda t: 0 * t)
    yield "one part in a million", wrap(lambda t: t * (1 + 1e-6))
    if np.iscomplexobj(inputs[0]) and rule.name not in (
        "gram_eigvalsh",
        "svdvals",
        "logdet",
    ):  # their tangents are real
        yield "conjugate", wrap(np.conj)
    if TRIALS[rule.name].symmetrises:
        upper = lambda d: None if d is None else np.triu(d) + adjoint(np.triu(d, 1))
        yield "one triangle (no symmetrisation)", lambda d, *a, **k: jvp(upper(d), *a, **k)
    for i in range(n if n > 1 else 0):
        yield (
            f"no tangent of input {i}",
            lambda *a, i=i, **k: jvp(*a[:i], None if a[i] is None else 0 * a[i], *a[i + 1 :], **k),
        )
    for i in moving(rule, inputs) if rule.outputs > 1 else ():
        yield (
            f"sign of output {i}",
            lambda *a, i=i, **k: tuple(-t if j == i else t for j, t in enumerate(jvp(*a, **k))),
        )


@domains
@pytest.mark.parametrize("m", [3, *SLOW[:1]])
def test_every_mutant_of_the_jvp_is_rejected(rule, is_complex, m, rng):
    """Finite differences reject it, and so does the transpose identity."""
    sample = TRIALS[rule.name].sample(np.asarray, rng, (), m, is_complex)
    _, vjp = lifted(rule, sample, NUMPY)
    survivors = []
    for name, mutant in forward_mutants(rule, sample.inputs):
        jvp = lifted_jvp(rule, sample, NUMPY, mutant)
        if checked_forward(rule, sample, check_jvp, jvp, gap=sample.gap, directions=2).passed:
            survivors.append(f"{name}, by differences")
        if checked_forward(rule, sample, check_transpose, jvp, vjp, directions=2, rtol=1e-9).passed:
            survivors.append(f"{name}, by the transpose")
    assert survivors == []


def test_the_table_is_the_public_api():
    pairs = {name.removesuffix("_vjp") for name in PUBLIC if name.endswith("_vjp")}
    # These take functions, or a network of which no gradient is given: nothing to bridge. The last has no JVP yet.
    others = {"root", "argmin", "eq_argmin", "lineq_argmin", "ineq_argmin", "hessian_solve", "trust_region_step"}
    assert pairs - others == set(RULES)
    for name, rule in RULES.items():
        assert rule.function is PUBLIC[name]
        assert rule.vjp is PUBLIC[f"{name}_vjp"]
        assert rule.jvp is PUBLIC[f"{name}_jvp"]


def test_what_is_saved_carries_second_derivatives_or_they_are_refused(rng):
    """A bridge would silently drop the part of a second derivative that passes through other saved arrays."""
    for rule in RULES.values():
        sample = TRIALS[rule.name].sample(np.asarray, rng, (), 4, False)
        _, saved = plain_forward(rule)(*sample.inputs, **options_of(rule, sample.options)[0])
        assert not saved or rule.saved_vjp is not None or rule.undefined is not None, rule.name
        assert (rule.undefined is None) == (rule.refusal == ""), rule.name
