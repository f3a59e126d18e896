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


# --- second derivatives -----------------------------------------------------------------------------------------------


def cube_second(x_dot, y_bar, y, x, factor=6.0):
    return factor * x * x_dot * y_bar


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_a_right_second_derivative_passes(shape, xp, rng):
    x = xp.asarray(rng.standard_normal(shape))
    report = assert_vjp(lambda x: x**3, cube_vjp, x, needs=(0,), second=cube_second)
    assert report.error < 1e-8
    assert sum(d.name.startswith("second, random") for d in report.directions) == 8


@pytest.mark.parametrize("factor", [-6.0, 0.0, 6.0 * (1 + 1e-6), math.nan])
def test_a_wrong_second_derivative_fails(factor, rng):
    x = rng.standard_normal(4)
    report = check_vjp(lambda x: x**3, cube_vjp, x, needs=(0,), second=partial(cube_second, factor=factor))
    assert not report.passed
    assert {d.name.startswith("second") for d in report.directions if not d.error <= 1e-7} == {True}


def product_vjp(y_bar, y, a, b):
    return y_bar @ b.T, a.T @ y_bar


def product_second(a_dot, b_dot, y_bar, y, a, b, drops=None):
    a_dot, b_dot = (0 * x if d is None or drops == i else d for i, (d, x) in enumerate(((a_dot, a), (b_dot, b))))
    return y_bar @ b_dot.T, a_dot.T @ y_bar


def test_mixed_second_derivatives_of_several_inputs(rng):
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((3, 2))
    f = lambda a, b: a @ b
    assert check_vjp(f, product_vjp, a, b, needs=(0, 1), second=product_second).passed
    for drops, found in ((0, "input 0"), (1, "input 1")):
        report = check_vjp(f, product_vjp, a, b, needs=(0, 1), second=partial(product_second, drops=drops))
        wrong = {d.name.partition(" of ")[2] for d in report.directions if d.error > 1e-7}
        assert wrong == {found, "all inputs"}


def test_with_a_loss_the_second_derivative_is_that_of_the_whole(rng):
    """``Σ (x³)²`` has the second derivative ``30 x⁴``; at a constant cotangent ``2 x³`` only ``12 x⁴`` of it."""
    x, loss = rng.standard_normal(4), (lambda y: np.sum(y * y), lambda y: 2 * y)
    check = partial(check_vjp, lambda x: x**3, cube_vjp, x, needs=(0,), loss=loss)
    assert check(second=lambda x_dot, y_bar, y, x: 30 * x**4 * x_dot).passed
    assert not check(second=cube_second).passed


def test_second_derivatives_of_a_matrix_function(rng):
    """``X² `` at a constant cotangent: symmetric directions, and one that is not."""
    x = symmetric(rng, 4)
    half = lambda x: (x + x.T) / 2
    f, vjp = lambda x: half(x) @ half(x), lambda b, y, x: half(half(x) @ half(b) + half(b) @ half(x))
    second = lambda d, b, y, x: half(half(d) @ half(b) + half(b) @ half(d))
    check = partial(check_vjp, f, vjp, x, needs=(0,), tangent="symmetric", symmetrises=True)
    assert check(second=second).passed
    assert not check(second=lambda d, b, y, x: d @ half(b) + half(b) @ d).passed


def test_what_is_wrong_with_a_second_derivative_is_said():
    x, vjp = np.ones(3), lambda y_bar, y: y_bar * y
    with pytest.raises(TypeError, match=r"second does not take 3 arguments.*1 tangent\(s\), 1 cotangent\(s\)"):
        check_vjp(np.exp, vjp, x, second=lambda x_dot, y_bar: y_bar)
    with pytest.raises(TypeError, match=r"second returned None for inputs\[0\].*Return zeros"):
        check_vjp(np.exp, vjp, x, second=lambda *arrays: None)
    with pytest.raises(ValueError, match=r"second returned shapes \[\(2,\)\] for inputs"):
        check_vjp(np.exp, vjp, x, second=lambda *arrays: arrays[0][:2])
