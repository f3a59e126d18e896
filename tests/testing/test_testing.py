"""The checker itself: it must pass what is right, reject what is wrong, and say what it saw."""

import math
from functools import partial

import numpy as np
import pytest
from problems import symmetric

import ddnref
from ddnref.testing import TANGENTS, assert_vjp, check_vjp, numerical_jvp


def cube_vjp(y_bar, y, x, factor=3.0):
    return factor * x**2 * y_bar


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_a_right_rule_passes(shape, xp, rng):
    x = xp.asarray(rng.standard_normal(shape))
    assert assert_vjp(lambda x: x**3, cube_vjp, x, needs=(0,)).error < 1e-9


@pytest.mark.parametrize("factor", [-3.0, 6.0, 3.0 * (1 + 1e-6), math.nan])
def test_a_wrong_rule_fails(factor, xp, rng):
    x = xp.asarray(rng.standard_normal(4))
    with pytest.raises(AssertionError, match=r"disagrees with finite differences(.|\n)*FAILED"):
        assert_vjp(lambda x: x**3, partial(cube_vjp, factor=factor), x, needs=(0,))


def test_the_gradients_own_direction_sees_what_random_ones_miss(rng):
    """One part in a million over 4096 entries: each random direction sees a 64th of it."""
    x = rng.standard_normal((64, 64))
    wrong = lambda y_bar, y: y_bar * (1 + 1e-6)
    report = check_vjp(lambda x: x + 0.0, wrong, x)
    assert not report.passed
    assert report.direction == "gradient"
    assert all(d.error < 1e-7 for d in report.directions if d.name != "gradient")


def test_a_missing_symmetrisation_is_seen_twice(rng):
    x, c = symmetric(rng, 5), rng.standard_normal((5, 5))
    f, one_sided = lambda x: (x + x.T) / 2, lambda y_bar, y: np.tril(y_bar + y_bar.T) - np.diag(np.diag(y_bar))
    loss = (lambda y: np.sum(c * y), lambda y: c)
    by_structure = check_vjp(f, one_sided, x, loss=loss, tangent="symmetric")
    assert not by_structure.passed
    assert by_structure.structure > 0.1
    by_direction = check_vjp(f, one_sided, x, loss=loss, tangent="symmetric", symmetrises=True)
    assert by_direction.error > 1e-3


def test_order_of_the_differences_is_reported():
    smooth = check_vjp(np.exp, lambda y_bar, y: y_bar * y, np.linspace(-1, 1, 5), step=1e-2)
    assert smooth.order == pytest.approx(2.0, abs=0.01)
    kink = check_vjp(np.abs, lambda y_bar, y, x: y_bar * np.sign(x), np.asarray([1e-3]), needs=(0,), step=1e-1)
    assert not kink.passed
    assert kink.order < 1.5


def test_step_follows_size_and_gap():
    x = 1e6 * np.ones(4)
    f, vjp = (lambda x: 2 * x), (lambda y_bar, y: 2 * y_bar)
    assert check_vjp(f, vjp, x).step == pytest.approx(1e-4 * 2e6)
    assert check_vjp(f, vjp, x, gap=1.0).step == pytest.approx(3e-3)
    assert check_vjp(f, vjp, x, step=0.5).step == 0.5
    assert check_vjp(f, vjp, np.zeros(4)).step == 1e-4


def test_several_inputs_and_outputs(rng):
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((3, 2))
    right = lambda y_bar, s_bar, y, s, a, b: (y_bar @ b.T + s_bar, a.T @ y_bar)
    f = lambda a, b: (a @ b, np.sum(a))
    assert check_vjp(f, right, a, b, needs=(0, 1)).passed
    wrong = lambda *args: (right(*args)[0], 2 * right(*args)[1])
    report = check_vjp(f, wrong, a, b, needs=(0, 1))
    assert report.direction.endswith("of input 1")


def test_stiefel_directions_stay_on_the_manifold(xp, rng):
    x = xp.asarray(np.linalg.qr(rng.standard_normal((5, 2)))[0])
    space = TANGENTS["stiefel"]
    d = space.project(x, xp.asarray(rng.standard_normal((5, 2))))
    x_np, d_np = xp.numpy(x), xp.numpy(d)
    np.testing.assert_allclose(x_np.T @ d_np + d_np.T @ x_np, 0, atol=1e-15)
    moved = xp.numpy(space.retract(x, 1e-2 * d))
    np.testing.assert_allclose(moved.T @ moved, np.eye(2), atol=1e-14)


def test_stiefel_check_ignores_what_leaves_the_manifold(rng):
    """``tr(xᵀ c x)`` with a gradient that is off along the normal space only: right on the manifold."""
    x, c = np.linalg.qr(rng.standard_normal((6, 2)))[0], symmetric(rng, 6)
    f = lambda x: np.sum(x * (c @ x))
    off = lambda y_bar, y, x: y_bar * (2 * c @ x + x @ np.asarray([[5.0, 1.0], [1.0, -2.0]]))
    assert check_vjp(f, off, x, needs=(0,), tangent="stiefel").passed
    assert not check_vjp(f, off, x, needs=(0,)).passed


def test_a_tangent_of_ones_own(rng):
    positive = ddnref.testing.Tangent(lambda x, d: d * (x > 0), lambda x, d: x + d)
    x = np.asarray([1.0, 0.0, 2.0])
    assert check_vjp(np.sqrt, lambda y_bar, y: y_bar / (2 * np.where(y > 0, y, 1)), x, tangent=positive).passed


def test_complex_pairing(xp, rng):
    x = xp.asarray(rng.standard_normal(4) + 1j * rng.standard_normal(4))
    conj = xp.namespace.conj
    assert check_vjp(lambda x: x * x, lambda y_bar, y, x: 2 * conj(x) * y_bar, x, needs=(0,)).passed
    assert not check_vjp(lambda x: x * x, lambda y_bar, y, x: 2 * x * y_bar, x, needs=(0,)).passed


def test_numerical_jvp_of_a_tuple(xp, rng):
    x, d = xp.asarray(rng.standard_normal(4)), xp.asarray(rng.standard_normal(4))
    cube, total = numerical_jvp(lambda x: (x**3, xp.namespace.sum(x)), x, d)
    np.testing.assert_allclose(xp.numpy(cube), xp.numpy(3 * x**2 * d), atol=1e-8)
    np.testing.assert_allclose(xp.numpy(total), np.sum(xp.numpy(d)), atol=1e-8)


def test_static_errors():
    with pytest.raises(TypeError, match="dtype float32: finite differences need float64"):
        check_vjp(np.exp, cube_vjp, np.ones(2, np.float32))
    with pytest.raises(ValueError, match="x_dot is zero"):
        numerical_jvp(np.exp, np.ones(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"f_vjp returned shapes \[\(3,\)\] for inputs of shapes \[\(2,\)\]"):
        check_vjp(np.exp, lambda y_bar, y: np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="tangent is 'sphere'"):
        check_vjp(np.exp, lambda y_bar, y: y, np.ones(2), tangent="sphere")
    with pytest.raises(ValueError, match="has norm 1e-310: too small for a step"):
        check_vjp(np.exp, lambda y_bar, y: y, np.asarray([1e-310]))


def test_nothing_to_check_passes():
    assert check_vjp(np.exp, lambda y_bar, y: y_bar * y, np.ones((0, 3))).passed


def test_report_reads_as_a_table():
    text = str(check_vjp(np.exp, lambda y_bar, y: y_bar * y, np.ones(2)))
    assert text.splitlines()[0].split() == ["direction", "numerical", "analytic", "error", "order"]
    assert text.splitlines()[-1].startswith("passed: worst relative error")
