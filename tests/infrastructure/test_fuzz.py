"""The fuzz campaign: its first 2,000 cases, that it finds planted defects, that it leaves no function out, threads."""

import inspect
import re
import sys
import threading
from functools import partial

import numpy as np
import pytest
from fuzz import _all, _campaign, _mutations, _others, _planted
from public_names import PUBLIC
from threadpoolctl import threadpool_limits

import ddnref
from ddnref import implicit, krylov, nodes, operators, testing
from ddnref._rules.binding import as_tuple, options_of, plain_forward, plain_vjp
from ddnref._rules.table import RULES, TRIALS

SEED = 0
CASES = 2000


@pytest.mark.framework("torch")
@pytest.mark.framework("jax")
@pytest.mark.framework("autograd")
def test_the_first_cases_find_nothing():
    """The scheduled run is ``python -m tests.fuzz --cases 20000 --seed 0``."""
    targets = _all.targets()
    findings = [case.line() for case in _campaign.run(SEED, range(CASES), targets) if case.finding]
    assert findings == []


def test_every_public_function_is_fuzzed():
    fuzzed = {name for target in _all.targets() for name in (target.name, *target.functions)}
    public = set(PUBLIC) - set(_others.VALUES)
    assert public - fuzzed == set()
    assert set(_others.VALUES) <= set(PUBLIC)
    assert not set(_others.VALUES) & fuzzed
    assert {name for name in testing.__all__ if inspect.isfunction(getattr(testing, name))} <= fuzzed
    for name in _others.VALUES:  # nothing among them that computes
        value = PUBLIC[name]
        assert inspect.ismodule(value) or issubclass(value, Exception) or hasattr(value, "_fields")


def test_a_new_rule_is_picked_up_by_itself(monkeypatch):
    rule = RULES["qr"]._replace(name="solve")  # the name of another function of ddnref
    monkeypatch.setitem(RULES, "another", rule)
    names = [target.name for target in _all.rule_targets()]
    assert names.count("solve") == 2


@pytest.mark.framework("torch")
@pytest.mark.framework("jax")
@pytest.mark.framework("autograd")
def test_a_case_is_its_number():
    targets = _all.targets()
    for number in (3, 77, 400):
        first, second = (_campaign.run_case(SEED, number, targets) for _ in range(2))
        assert first == second
        assert f"--seed {SEED} --case {number}" in first.line()


@pytest.mark.framework("torch")
@pytest.mark.framework("jax")
@pytest.mark.framework("autograd")
@pytest.mark.parametrize("name", [n for n in _planted.PLANTED if n not in ("crash of the interpreter", "hang")])
def test_a_planted_defect_is_found(name):
    function, _, says = _planted.PLANTED[name]
    sound = [t for t in _all.targets() if t.name == function]
    for number in range(400):
        case = _campaign.run_case(SEED, number, (_planted.planted(name),))
        if says in case.finding:
            assert not sound or _campaign.run_case(SEED, number, sound).finding == "", "the rule itself has it too"
            return
    pytest.fail(f"{name} was not found")


@pytest.mark.parametrize("name", ["crash of the interpreter", "hang"])
def test_an_interpreter_that_ends_is_a_finding_and_the_campaign_goes_on(name):
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "20" if "crash" in name else "0.5", "--planted", name]
    cases = _campaign.in_workers(SEED, range(2), 1, command)
    assert [case.number for case in cases] == [0, 1]
    assert all(_planted.PLANTED[name][2] in case.finding for case in cases)


def test_the_record_in_the_documentation_is_of_this_campaign():
    text = (_campaign.ROOT / "docs" / "fuzz.md").read_text(encoding="utf-8")
    head = r"Recorded on \d{4}-\d\d-\d\d by `python -m tests.fuzz --cases \d+ --seed \d+ --record docs/fuzz.md`"
    assert re.match(head, text)
    assert re.match(head, _campaign.record([_campaign.Case(0, 0, "", "", "", "equal")], 1))
    kinds = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[1:]
    assert kinds == [*_mutations.MUTATIONS, "all"]
    total = [cell.strip() for cell in text.strip().splitlines()[-1].strip("|").split("|")]
    assert int(total[1]) >= 20_000
    assert total[-1] == "0"
    counts = list(map(int, total[1:]))
    assert counts[0] == sum(counts[1:])


# --- threads ------------------------------------------------------------------------------------------------------

THREADS = 8


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_eight_threads_get_the_same_bits(rule, rng):
    sample = TRIALS[rule.name].sample(np.asarray, rng, (3,), 12, False)
    forward, vjp = options_of(rule, sample.options)
    forward, vjp = partial(plain_forward(rule), **forward), partial(plain_vjp(rule), **vjp)
    barrier, found = threading.Barrier(THREADS), [b""] * THREADS

    def work():
        outputs, saved = forward(*sample.inputs)
        bars = as_tuple(sample.loss[1](*outputs)) if sample.loss else tuple(map(np.ones_like, outputs))
        needed = (sample.inputs[i] for i in rule.needs)
        return b"".join(np.asarray(a).tobytes() for a in (*outputs, *vjp(*bars, *outputs, *saved, *needed)))

    def thread(i):
        barrier.wait()
        found[i] = b"".join(work() for _ in range(2))

    with threadpool_limits(1):
        alone = work()
        threads = [threading.Thread(target=thread, args=(i,)) for i in range(THREADS)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(bits == 2 * alone for bits in found)


# --- what the campaign found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-900, -560, 560, 900])
def test_eigsh_vjp_of_cotangents_whose_squares_leave_the_range(power, rng):
    """They counted as rounding, and the part outside the k eigenvectors was left out in silence."""
    rule = RULES["eigsh"]
    sample = TRIALS[rule.name].sample(np.asarray, rng, (2,), 8, False)
    (outputs, saved), _ = ddnref.eigsh_fwd(*sample.inputs, **sample.options)
    bars = sample.loss[1](*outputs)
    x_bar, _ = ddnref.eigsh_vjp(*bars, *outputs, *saved, *sample.inputs)
    scaled, _ = ddnref.eigsh_vjp(*(np.ldexp(b, power) for b in bars), *outputs, *saved, *sample.inputs)
    np.testing.assert_allclose(np.ldexp(scaled, -power), x_bar, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("power", [-1000, -600, 600, 1000])
def test_residuals_of_any_scale(power, rng):
    x, w, v = rng.standard_normal((4, 4)), rng.standard_normal(4), rng.standard_normal((4, 4))
    for f in (ddnref.eigen_residual, ddnref.fixed_point_residual):
        residual = f(np.ldexp(x, power), np.ldexp(w, power), v)
        wanted = f(x, w, v) if f is ddnref.fixed_point_residual else np.ldexp(f(x, w, v), power)
        np.testing.assert_allclose(residual, wanted, rtol=1e-13)


@pytest.mark.parametrize("power", [-1000, -560, 560, 1000])
def test_eigsh_of_matrices_whose_squares_leave_the_range(power, rng):
    rule = RULES["eigsh"]
    sample = TRIALS[rule.name].sample(np.asarray, rng, (2,), 24, False)
    (x,) = sample.inputs
    for wrap in (lambda a: a, lambda a: operators.dense(a, self_adjoint=True)):
        (w, v), _ = ddnref.eigsh(wrap(x), **sample.options)
        (scaled, same), _ = ddnref.eigsh(wrap(np.ldexp(x, power)), **sample.options)
        assert np.array_equal(np.ldexp(scaled, -power), w)
        assert np.array_equal(same, v)


@pytest.mark.parametrize("power", [-900, -560, 560, 900])
def test_products_of_cotangents_whose_squares_leave_the_range(power):
    """Conjugate gradients took them for zero."""
    d, y = np.asarray([1.0, 2.0, 4.0]), np.asarray([1.0, -1.0, 0.5])
    stated = {
        "residual": lambda y, b: d * y - b,
        "jacobian": lambda y, b: implicit.Products(lambda v: d * v),
        "residual_vjp": lambda w, y, b: -w,
    }
    b_bar, _ = implicit.root_vjp(np.ldexp(np.ones(3), power), y, d * y, **stated)
    np.testing.assert_allclose(np.ldexp(b_bar, -power), 1 / d, rtol=1e-13)


def test_nan_is_not_lost_in_what_judges(rng):
    w, v = ddnref.eigh(rng.standard_normal((3, 4, 4)))
    v_bar = rng.standard_normal(v.shape)
    bad = w.copy()
    bad[1, 2] = np.nan
    assert np.isnan(ddnref.gauge_residual(None, v_bar, bad, v)).tolist() == [False, True, False]
    residual = ddnref.fixed_point_residual(rng.standard_normal((3, 4, 4)), bad, v)
    assert np.isnan(residual).tolist() == [[False] * 4, [False, False, True, False], [False] * 4]
    reference = rng.standard_normal(4)
    reference[0] = np.nan
    assert np.all(np.isnan(ddnref.align_signs(v[0], reference)))


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x: np.ma.masked_array(x, mask=x > 0), "MaskedArray"),
        (np.asmatrix, "matrix"),
        (lambda x: x.astype(">f8"), "byte order"),
    ],
    ids=["masked", "matrix", "big-endian"],
)
def test_arrays_of_which_only_a_part_would_be_seen(make, says):
    x = make(np.eye(2))
    with pytest.raises(TypeError, match=f"x .*{says}"):
        ddnref.eigh(x)


@pytest.mark.framework("torch")
def test_sparse_tensors():
    import torch

    with pytest.raises(TypeError, match=r"x has layout torch\.sparse_coo"):
        ddnref.eigh(torch.eye(2, dtype=torch.float64).to_sparse())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x, w, v: ddnref.eigh_vjp(w, None, w, v, gauge_rtol="x"), TypeError, "gauge_rtol is 'x'"),
        (lambda x, w, v: ddnref.eigh_vjp(w, None, w, v, rtol=float("nan")), ValueError, "rtol is NaN"),
        (lambda x, w, v: ddnref.eigh_vjp(w, None, w, v, gauge_rtol=-1.0), ValueError, "gauge_rtol is -1.0"),
        (lambda x, w, v: ddnref.eigh_topk(x, 1.5), TypeError, "k is 1.5, expected an integer"),
        (lambda x, w, v: ddnref.eigsh(x, k=1, maxiter=-1), ValueError, "maxiter is -1"),
        (lambda x, w, v: krylov.cg(x, w, callback=3), TypeError, "callback is 3, expected a function"),
        (lambda x, w, v: ddnref.eigsh(x, 1, v0=[1.0, 2.0]), TypeError, r"v0 is \[1.0, 2.0\], expected an array"),
        (lambda x, w, v: nodes.project_ball(w, radius=float("inf")), ValueError, "radius is inf"),
        (lambda x, w, v: ddnref.solve(x, None), TypeError, "b is None"),
    ],
)
def test_options_are_what_their_names_say(call, error, says):
    w, v = np.asarray([1.0, 2.0]), np.eye(2)
    with pytest.raises(error, match=says):
        call(np.diag(w), w, v)
