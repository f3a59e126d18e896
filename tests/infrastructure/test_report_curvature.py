"""The curvature section: what its pictures show is what the network does, and its checks can fail."""

from __future__ import annotations

import numpy as np
import pytest
from problems import relative
from threadpoolctl import threadpool_limits

from ddnref.report import curvature, pictures
from ddnref.report import curvature_model as model
from ddnref.report.content import Context, Picture, Table, Text
from ddnref.verify._backends import backend


@pytest.fixture(scope="module")
def section():
    """A context, and all that the section has to say in it; fewer images, to be quick."""
    with pytest.MonkeyPatch.context() as patch, pictures.style(), threadpool_limits(1), backend("numpy") as library:
        patch.setattr(model, "LOOKS", (0, 25, 60))
        patch.setattr(model, "TRAIN", 400)
        patch.setattr(model, "SAMPLES", 60)
        context = Context(library, 0, lambda items, description: items)
        data = model.prepare(context)
        yield context, data, model.learn(context, data), curvature.SECTION.run(context)


def part(content, name):
    return next(part for part in content.parts if not isinstance(part, Text) and part.name == name)


def flat(arrays):
    return np.concatenate([np.reshape(a, -1) for a in arrays])


def test_the_numbers(section):
    *_, content = section
    numbers = dict(part(content, "numbers").rows)
    assert numbers["weights, and rows of the smaller matrix"] == "3466, 540"
    spectrum, pairs, slopes = (value for value in numbers.values() if isinstance(value, float))
    assert spectrum <= 1e-14
    assert pairs <= 1e-14
    assert slopes <= 1e-7
    (headline,) = content.headlines
    assert headline.values[0].startswith("eigenvalues ")
    before, after = next(v for k, v in numbers.items() if k.startswith("held-out")).split(", ")
    assert float(before[:-1]) < 40 < 90 < float(after[:-1])


def test_the_captions(section):
    """A gap behind the ninth eigenvalue that closes; shares that were even and are not; slopes lost in the noise."""
    *_, content = section
    values = {}
    for step, number, w in part(content, "spectrum").rows:
        values[step, number] = w
    assert len(values) == 3 * 540
    assert all(values[step, i] >= values[step, i + 1] for step in (0, 25, 60) for i in range(1, 540))
    assert values[0, 9] > 2 * values[0, 10]
    assert all(values[step, 9] < 1.6 * values[step, 10] for step in (25, 60))
    assert values[25, 9] > 1.5 * values[0, 9]
    rows = part(content, "classes").rows
    before, after = (np.asarray([row[2:] for row in rows if row[0] == when]) for when in ("before", "after"))
    assert before.shape == after.shape == (9, 10)
    assert np.max(np.abs(before - np.mean(before, axis=0))) < 0.05 < 0.3 < np.max(after)
    noise = np.asarray([row[1:] for row in part(content, "noise").rows])
    clear = np.mean(noise > 1 / 400, axis=0)
    assert clear[0] > 0.6 > 0.2 > clear[1]


def test_shares_are_curvatures_of_the_digits_alone(section):
    """Independently: ``e_kᵀ G_c e_k`` with the Gauss–Newton matrix of one digit's images."""
    context, data, learned, _ = section
    chain, (x, t) = learned.end, (z[: model.SAMPLES] for z in data[:2])
    x, t = np.asarray(x), np.asarray(t)
    w, v = model.ddnref.curvature.ggn_eigh(chain, x, t, k=model.LEADING)
    expected = np.zeros((model.LEADING, 10))
    for digit in range(10):
        of = t == digit
        product = chain.ggnvp(x[of], t[of], v)
        for k in range(model.LEADING):
            curved = flat(e[k] for e in v) @ flat(g[k] for g in product)
            expected[k, digit] = np.mean(of) * curved / w[k]
    found = model.shares(model.slopes(context, data, chain), np.asarray(data.t))
    assert relative(found, expected) <= 1e-10
    assert np.allclose(np.sum(found, axis=1), 1, rtol=0, atol=1e-12)


def test_signal_to_noise_is_that_of_single_gradients(section):
    context, data, learned, _ = section
    chain, x, t = learned.start, data.x, data.t
    _, v = model.ddnref.curvature.ggn_eigh(chain, x[: model.SAMPLES], t[: model.SAMPLES], k=4, method="full")
    gradients = chain.per_sample_gradients(x, t)
    slopes = np.stack(
        [[flat(g[n] for g in gradients) @ flat(e[k] for e in v) for k in range(4)] for n in range(len(x))]
    )
    expected = np.mean(slopes, axis=0) ** 2 / np.var(slopes, axis=0, ddof=1)
    found = model.signal_to_noise(model.slopes(context, data, chain))[:4]
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "field"), [
    ("ggn_eigvalsh", "spectrum"), ("ggn_eigh", "pairs"), ("ggn_directional_derivatives", "slopes"),
])  # fmt: skip
def test_checks_notice_a_wrong_result(section, monkeypatch, name, field):
    """One millionth off, in the one function that the check is about."""
    context, data, learned, _ = section
    correct = getattr(model.ddnref.curvature, name)

    def wrong(*arguments, **options):
        found = correct(*arguments, **options)
        if name == "ggn_eigvalsh":
            return (1 + 1e-6) * found
        if name == "ggn_eigh":
            return (1 + 1e-6) * found[0], found[1]
        return found._replace(first=found.first + 1e-6 * np.max(np.abs(found.first)))

    right = model.check(context, data, learned.start)
    monkeypatch.setattr(model.ddnref.curvature, name, wrong)
    errors = model.check(context, data, learned.start)
    assert getattr(right, field) <= 1e-8
    assert getattr(errors, field) >= 1e-7
    others = [other for other in errors._fields if other != field]
    assert all(getattr(errors, other) == getattr(right, other) for other in others)


def test_the_pictures(section):
    *_, content = section
    shown = [part for part in content.parts if isinstance(part, Picture)]
    assert [picture.name for picture in shown] == ["spectrum", "classes", "noise"]
    top = shown[0].drawing.axes[0]
    blue = [line for line in top.lines if line.get_color() == pictures.BLUE]
    assert len(top.lines) == curvature.DRAWN
    assert len(blue) == model.LEADING
    assert min(line.get_ydata()[-1] for line in blue) >= max(
        line.get_ydata()[-1] for line in top.lines if line not in blue
    )
    for picture in shown:
        assert all(len(row) == len(picture.columns) for row in picture.rows)
        assert pictures.png(picture.drawing).startswith(b"\x89PNG")
    assert sum(isinstance(part, Table) for part in content.parts) == 1
