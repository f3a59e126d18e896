"""The story of the curvature: its pictures show what the network does, and its checks can fail."""

from __future__ import annotations

import numpy as np
import pytest
from problems import relative
from threadpoolctl import threadpool_limits

from ddnref import curvature
from ddnref.report.runner import Check, Picture, run
from ddnref.verify._backends import backend

BRIEF = {"STEPS": {"gradient descent": 30, "with momentum": 30, "damped Newton": 6}, "SUBSAMPLE": 80}


def story(name="numpy", **constants):
    with threadpool_limits(1), backend(name) as library:
        return run("ggn", library, 0, constants={**BRIEF, **constants})


@pytest.fixture(scope="module")
def told():
    """The story with fewer images, to be quick."""
    return story(LOOKS=(0, 25, 60), TRAIN=400, N=60)


@pytest.fixture(scope="module")
def names(told):
    return told.namespace


def parts(told, kind):
    return {part.label if kind is Check else part.name: part for part in told.parts if isinstance(part, kind)}


def flat(arrays):
    return np.concatenate([np.reshape(a, -1) for a in arrays])


def test_the_numbers(told):
    assert not told.failed
    spectrum, pairs, slopes, samples, *_ = (part.error for part in parts(told, Check).values())
    assert spectrum <= 1e-14
    assert pairs <= 1e-14
    assert slopes <= 1e-7
    assert samples <= 1e-7
    assert told.card.result.startswith("The 540 eigenvalues of a matrix of 3466 rows")


def test_it_learns(names):
    accuracy = {
        step: np.mean(np.argmax(chain.output(names["images"][400:]), axis=1) == names["labels"][400:])
        for step, chain in names["chains"].items()
    }
    assert accuracy[0] < 0.4 < 0.9 < accuracy[60]
    losses = {method: found[0] for method, found in names["courses"].items()}
    assert all(course[-1] < 0.9 * course[0] for course in losses.values())
    assert losses["damped Newton"][6] < losses["gradient descent"][6]


def test_the_captions(told):
    """A gap behind the ninth eigenvalue that closes; shares that were even and are not; slopes lost in the noise."""
    shown = parts(told, Picture)
    values = {(step, number): w for step, number, w in shown["spectrum"].rows}
    assert len(values) == 3 * 540
    assert all(values[step, i] >= values[step, i + 1] for step in (0, 25, 60) for i in range(1, 540))
    assert values[0, 9] > 2 * values[0, 10]
    assert all(values[step, 9] < 1.6 * values[step, 10] for step in (25, 60))
    assert values[25, 9] > 1.5 * values[0, 9]
    rows = shown["classes"].rows
    before, after = (
        np.asarray([row[2:] for row in rows if row[0] == when]) for when in ("share at step 0", "share at step 60")
    )
    assert before.shape == after.shape == (9, 10)
    assert np.max(np.abs(before - np.mean(before, axis=0))) < 0.05 < 0.3 < np.max(after)
    noise = np.asarray([row[1:3] for row in shown["noise"].rows])
    clear = np.mean(noise > 1 / 400, axis=0)
    assert clear[0] > 0.6 > 0.2 > clear[1]


def test_shares_are_curvatures_of_the_digits_alone(names):
    """Independently: ``e_kᵀ G_c e_k`` with the Gauss–Newton matrix of one digit's images."""
    chain, x, t = names["chains"][60], names["images"][:60], names["labels"][:60]
    w, v = curvature.ggn_eigh(chain, x, t, k=9)
    expected = np.zeros((9, 10))
    for digit in range(10):
        of = t == digit
        product = chain.ggnvp(x[of], t[of], v)
        for k in range(9):
            curved = flat(e[k] for e in v) @ flat(g[k] for g in product)
            expected[k, digit] = np.mean(of) * curved / w[k]
    found = names["shares"](60)
    assert relative(found, expected) <= 1e-10
    assert np.allclose(np.sum(found, axis=1), 1, rtol=0, atol=1e-12)


def test_signal_to_noise_is_that_of_single_gradients(names):
    chain, x, t = names["start"], names["x"], names["t"]
    _, v = curvature.ggn_eigh(chain, x[:60], t[:60], k=4, method="full")
    gradients = chain.per_sample_gradients(x, t)
    slopes = np.stack(
        [[flat(g[n] for g in gradients) @ flat(e[k] for e in v) for k in range(4)] for n in range(len(x))]
    )
    expected = np.mean(slopes, axis=0) ** 2 / np.var(slopes, axis=0, ddof=1)
    assert np.allclose(names["ratios"][0][:4], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "label"), [
    ("ggn_eigvalsh", "eigenvalues against the dense matrix"),
    ("ggn_eigh", "eigenpairs"),
    ("ggn_directional_derivatives", "slopes against finite differences"),
    ("second", "curvature of each sample"),
])  # fmt: skip
def test_checks_notice_a_wrong_result(monkeypatch, name, label):
    """One millionth off, in the one function that the check is about."""
    function = "ggn_directional_derivatives" if name == "second" else name
    correct = getattr(curvature, function)

    def wrong(*arguments, **options):
        found = correct(*arguments, **options)
        if name == "ggn_eigvalsh":
            return (1 + 1e-6) * found
        if name == "ggn_eigh":
            return (1 + 1e-6) * found[0], found[1]
        if name == "second":
            return found._replace(second=(1 + 1e-6) * found.second)
        return found._replace(first=found.first + 1e-6 * np.max(np.abs(found.first)))

    monkeypatch.setattr(curvature, function, wrong)
    told = story(LOOKS=(0, 2), LATE=2, TRAIN=100, N=20)
    assert told.failed.startswith(label)
    *before, last = parts(told, Check).values()
    assert last.label.startswith(label)
    assert all(part.error <= part.limit for part in before)


def test_the_pictures(told):
    shown = parts(told, Picture)
    assert list(shown) == ["spectrum", "classes", "noise", "newton"]
    for picture in shown.values():
        assert all(len(row) == len(picture.columns) for row in picture.rows)
        assert picture.figure.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["array-api-strict", *(
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax"))])  # fmt: skip
def test_other_backends(name):
    brief = {"LOOKS": (0, 1, 2), "LATE": 2, "N": 12, "SUBSAMPLE": 12, "STEPS": dict.fromkeys(BRIEF["STEPS"], 1)}
    here, there = (story(library, **brief) for library in ("numpy", name))
    assert not there.failed
    for picture, rtol in (("spectrum", 1e-9), ("noise", 1e-6)):
        assert np.allclose(*(parts(told, Picture)[picture].rows for told in (here, there)), rtol=rtol, atol=1e-9)


def test_same_seed_same_bytes():
    """The same seed gives the same pictures, except the last one, which shows seconds, as does the text."""
    brief = {"LOOKS": (0, 2), "LATE": 2, "TRAIN": 100, "N": 20, "STEPS": dict.fromkeys(BRIEF["STEPS"], 1)}
    first, again = (parts(story(**brief), Picture) for _ in range(2))
    assert all(first[name] == again[name] for name in ("spectrum", "classes", "noise"))
