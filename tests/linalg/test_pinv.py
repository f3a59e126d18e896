"""Pseudo-inverses: every rank, ranks at the threshold, directions that change the rank."""

from functools import partial

import numpy as np
import pytest
from problems import adjoint, relative, rotation

import ddnref
from ddnref.testing import assert_jvp, assert_transpose, assert_vjp, numerical_jvp

SHAPES = [(6, 4), (4, 4), (3, 5)]
EPS = np.finfo(np.float64).eps


def normal(rng, *shape, is_complex=False):
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def with_values(rng, m, n, s, batch=(), is_complex=False):
    """A matrix with these singular values, and its exact pseudo-inverse."""
    s = np.asarray(s)
    u, v = (rotation(rng, size, batch, is_complex)[..., : len(s)] for size in (m, n))
    inverse = np.where(s > 0, 1 / np.where(s > 0, s, 1), 0)
    return (u * s) @ adjoint(v), (v * inverse) @ adjoint(u)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_any_shape_and_rank(m, n, missing, is_complex, xp, rng):
    s = np.linspace(2.0, 1.0, min(m, n)) * (np.arange(min(m, n)) < min(m, n) - missing)
    x, wanted = with_values(rng, m, n, s, (2,), is_complex)
    assert relative(xp.lift(partial(ddnref.pinv, throw=False))(x), wanted) <= 1e-14


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_derivatives_of_full_rank(m, n, is_complex, rng):
    x, _ = with_values(rng, m, n, np.linspace(2.0, 1.0, min(m, n)), (2,), is_complex)
    assert assert_vjp(ddnref.pinv_fwd, ddnref.pinv_vjp, x, saves=True, needs=(0,), gap=0.5).error <= 1e-9
    assert_jvp(ddnref.pinv_fwd, ddnref.pinv_jvp, x, saves=True, needs=(0,), gap=0.5, rtol=1e-9)
    assert_transpose(ddnref.pinv_fwd, ddnref.pinv_jvp, ddnref.pinv_vjp, x, saves=True, needs=(0,), rtol=1e-12)


def kept_rank(rng, x, p):
    """A random direction that keeps the rank to first order, and a path along which it is kept."""
    a, b = normal(rng, x.shape[0], x.shape[0]), normal(rng, x.shape[1], x.shape[1])
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    path = lambda t: (np.eye(len(a)) + t * a) @ x @ (np.eye(len(b)) + t * b)
    return a @ x + x @ b, path


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), [(6, 5), (5, 6), (5, 5)])
def test_derivatives_along_directions_that_keep_the_rank(m, n, is_complex, xp, rng):
    x, _ = with_values(rng, m, n, [2.0, 1.5, 1.0, 0.0, 0.0], (), is_complex)
    p, saved = ddnref.pinv_fwd(x)
    p_bar = normal(rng, n, m, is_complex=is_complex)
    x_bar = xp.lift(ddnref.pinv_vjp)(p_bar, p, *saved, x)
    # The gradient has no part that would change the rank.
    assert relative((np.eye(m) - x @ p) @ x_bar @ (np.eye(n) - p @ x), 0 * x) <= 1e-13 * np.linalg.norm(x_bar)
    for _ in range(4):
        x_dot, path = kept_rank(rng, x, p)
        f_dot = numerical_jvp(lambda t, path=path: ddnref.pinv(path(t)), np.zeros(()), np.ones(()), gap=0.3)
        p_dot = xp.lift(partial(ddnref.pinv_jvp, throw=False))(x_dot, p, *saved, x)
        assert relative(p_dot, f_dot) <= 1e-9
        both = np.vdot(p_bar, p_dot).real, np.vdot(x_bar, x_dot).real
        assert abs(both[0] - both[1]) <= 1e-12 * np.linalg.norm(p_bar) * np.linalg.norm(p_dot)


def test_directions_that_change_the_rank(xp, rng):
    x, _ = with_values(rng, 5, 4, [2.0, 1.0, 0.5, 0.0], (3,))
    x[2] = with_values(rng, 5, 4, [2.0, 1.0, 0.5, 0.1])[0]
    p, saved = ddnref.pinv_fwd(xp.asarray(x))
    x_dot = xp.asarray(normal(rng, 3, 5, 4))
    with pytest.raises(ddnref.SingularError, match=r"x_dot changes the rank of x \(items 0, 1 of 3\).*gauge_rtol=inf"):
        ddnref.pinv_jvp(x_dot, p, *saved, xp.asarray(x))
    missing = np.isnan(xp.numpy(xp.derivative(ddnref.pinv_jvp, x_dot, p, *saved, xp.asarray(x), throw=False)))
    assert missing.all(axis=(-2, -1)).tolist() == missing.any(axis=(-2, -1)).tolist() == [True, True, False]
    left_out = xp.numpy(xp.derivative(ddnref.pinv_jvp, x_dot, p, *saved, xp.asarray(x), gauge_rtol=float("inf")))
    p_bar = normal(rng, 3, 4, 5)
    x_bar = xp.numpy(xp.derivative(ddnref.pinv_vjp, xp.asarray(p_bar), p, *saved, xp.asarray(x)))
    assert abs(np.sum(p_bar * left_out) - np.sum(x_bar * xp.numpy(x_dot))) <= 1e-11 * np.linalg.norm(left_out)


@pytest.mark.parametrize("least", [1e-6, 1e-9])
def test_a_small_singular_value_does_not_refuse_directions_that_keep_the_rank(least, rng):
    """The projectors have an error of eps κ, more than the tolerance."""
    x, _ = with_values(rng, 6, 5, [1.0, 0.9, 0.5, least, 0.0])
    p, saved = ddnref.pinv_fwd(x)
    for _ in range(20):
        assert np.all(np.isfinite(ddnref.pinv_jvp(kept_rank(rng, x, p)[0], p, *saved, x)))
        with pytest.raises(ddnref.SingularError):
            ddnref.pinv_jvp(normal(rng, 6, 5), p, *saved, x)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), [(6, 5), (5, 6), (5, 5)])
def test_values_that_count_as_zero_and_are_not(m, n, is_complex, xp, rng):
    """A tenth of the limit of the rank is not negligible: it turns with the values that are kept."""
    x, _ = with_values(rng, m, n, [2.0, 1.5, 1.0, 0.1, 0.02], (2,), is_complex)
    functions = [partial(ddnref.pinv_fwd, rtol=0.15), ddnref.pinv_jvp, ddnref.pinv_vjp]
    options = {"saves": True, "needs": (0,), "gap": 0.1}
    assert assert_vjp(functions[0], functions[2], x, **options).error <= 1e-9
    assert_jvp(*functions[:2], x, rtol=1e-9, **options)
    assert_transpose(*functions, x, rtol=1e-12, saves=True, needs=(0,))
    p, saved = xp.lift(partial(functions[0], throw=False))(x)
    bar, dot = normal(rng, *p.shape, is_complex=is_complex), normal(rng, *x.shape, is_complex=is_complex)
    for ours, same in (
        (xp.lift(functions[2])(bar, p, *saved, x), functions[2](bar, p, *saved, x)),
        (xp.lift(partial(functions[1], throw=False))(dot, p, *saved, x), functions[1](dot, p, *saved, x)),
    ):
        assert relative(ours, same) <= 1e-13
    # Without the coupling the error would be about the ratio of the values.
    kept = ddnref.pinv_vjp(bar, p, *saved[:1], 0 * saved[1] + 1e-300, *saved[2:], x)
    assert relative(kept, functions[2](bar, p, *saved, x)) > 0.01


@pytest.mark.framework("torch")
def test_second_derivatives_are_refused_where_values_are_dropped(torch, rng):
    from ddnref.interop.torch import differentiable

    x = torch.tensor(with_values(rng, 4, 3, [2.0, 1.0, 0.05])[0], requires_grad=True)
    b = torch.ones(4, dtype=torch.float64)
    for op in (differentiable(ddnref.pinv, rtol=0.1), lambda a: differentiable(ddnref.lstsq, rtol=0.1)(a, b)):
        assert torch.autograd.gradcheck(op, x)
        (gradient,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
        with pytest.raises(ddnref.GaugeError, match="rtol= drops singular values"):
            torch.autograd.grad(gradient.sum(), x)


def test_ranks_at_the_threshold(xp, rng):
    """Rounding must not decide: near the limit the matrix is refused; two factors away it is not."""
    found = {}
    for ratio in (0.2, 0.4, 0.6, 0.9, 1.1, 1.7, 2.5, 5.0):
        x, _ = with_values(rng, 5, 4, [1.0, 0.8, 0.6, ratio * 1e-6])
        try:
            found[ratio] = float(np.max(np.abs(xp.numpy(ddnref.pinv(xp.asarray(x), rtol=1e-6)))))
        except ddnref.SingularError as error:
            found[ratio] = str(error)
    assert all(isinstance(found[r], str) for r in (0.6, 0.9, 1.1, 1.7)), found
    assert "rank of x is not decided: a singular value is 6.0e-07 times" in found[0.6]
    assert all(found[r] < 10 for r in (0.2, 0.4))
    assert all(found[r] > 1e4 for r in (2.5, 5.0))
    batch = np.stack([np.diag([1.0, 1e-6]), np.diag([1.0, 0.5])])
    with pytest.raises(ddnref.SingularError, match="item 0 of 2"):
        ddnref.pinv(xp.asarray(batch), rtol=1e-6)
    p = xp.numpy(ddnref.pinv(xp.asarray(batch), rtol=1e-6, throw=False))
    assert np.all(np.isnan(p[0]))
    assert relative(p[1], np.diag([1.0, 2.0])) <= 1e-15


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_three_hundred_singular_matrices_are_seen_by_default(dtype):
    """Products of thin factors, duplicated and centred features: the rank is found, and none is refused."""
    rng = np.random.default_rng(7)
    for i in range(300):
        m, n = (int(rng.integers(3, 40)) for _ in range(2))
        k = min(m, n)
        rank = k - 1 - int(rng.integers(0, max(1, k - 2)))
        x = normal(rng, m, n)
        if i % 3 == 0:
            x = normal(rng, m, rank) @ normal(rng, rank, n)
        elif i % 3 == 1:
            x[:, -1] = x[:, 0]
            rank = min(m, n - 1)
        else:
            x = x - x.mean(axis=0)
            rank = min(m - 1, n)
        x = x.astype(dtype)
        assert abs(np.trace(ddnref.pinv(x) @ x) - rank) <= 0.1


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9])
def test_errors_are_those_of_the_condition(condition, xp, rng):
    """Compare the pseudo-inverse and its gradient with those of fifty digits."""
    import mpmath

    x, _ = with_values(rng, 6, 4, np.geomspace(1, 1 / condition, 4))
    p_bar = normal(rng, 4, 6)
    with mpmath.workdps(50):
        to_mp = lambda a: mpmath.matrix(a.tolist())
        a, bar = to_mp(x), to_mp(p_bar)
        p = (a.T * a) ** -1 * a.T
        gradient = -p.T * bar * p.T + (mpmath.eye(6) - a * p) * bar.T * p * p.T
        p_exact, x_bar = (np.asarray(y.tolist(), dtype=float) for y in (p, gradient))
    p, saved = xp.lift(partial(ddnref.pinv_fwd, throw=False))(x)
    assert relative(p, p_exact) <= 8 * EPS * condition
    assert relative(xp.lift(ddnref.pinv_vjp)(p_bar, p, *saved, x), x_bar) <= 32 * EPS * condition


def test_bad_input(xp, host_reads, rng):
    x = normal(rng, 3, 4, 3)
    x[1, 0, 0] = np.inf
    p, saved = ddnref.pinv_fwd(xp.asarray(x))
    found = [p, xp.derivative(ddnref.pinv_vjp, xp.asarray(normal(rng, 3, 3, 4)), p, *saved, xp.asarray(x))]
    found.append(xp.derivative(ddnref.pinv_jvp, xp.asarray(normal(rng, 3, 4, 3)), p, *saved, xp.asarray(x)))
    for y in map(xp.numpy, found):
        missing = np.isnan(y)
        assert missing.all(axis=(-2, -1)).tolist() == missing.any(axis=(-2, -1)).tolist() == [False, True, False]
    for bad, error, match in [
        (np.ones(3), ValueError, r"x has shape \(3,\), expected"),
        (np.ones((3, 2), dtype=np.int64), TypeError, "float32, float64"),
    ]:
        with pytest.raises(error, match=match):
            ddnref.pinv(bad)
    p, saved = ddnref.pinv_fwd(x[0])
    one = (p, *saved)
    with pytest.raises(ValueError, match="rtol is -1"):
        ddnref.pinv(x[0], rtol=-1.0)
    with pytest.raises(ValueError, match=r"p_bar has shape \(4, 3\), expected \(3, 4\)"):
        ddnref.pinv_vjp(x[0], *one, x[0])
    with pytest.raises(TypeError, match="p has dtype float32"):
        ddnref.pinv_vjp(x[0].T, x[0].T.astype(np.float32), *one[1:], x[0])
    with pytest.raises(TypeError, match="x_dot is None"):
        ddnref.pinv_jvp(None, *one, x[0])
    for shape in ((0, 0), (3, 0), (0, 3), (0, 3, 2), (2, 0, 3)):
        ones = xp.asarray(np.ones(shape))
        p, saved = ddnref.pinv_fwd(ones)
        assert tuple(p.shape) == (*shape[:-2], shape[-1], shape[-2])
        assert tuple(ddnref.pinv_vjp(p, p, *saved, ones).shape) == shape
        assert ddnref.pinv_jvp(ones, p, *saved, ones).shape == p.shape
    import array_api_strict as strict

    x = strict.asarray(normal(rng, 2, 4, 3))
    host_reads.clear()
    p, saved = ddnref.pinv_fwd(x, throw=False)
    ddnref.pinv_vjp(p, p, *saved, x)
    ddnref.pinv_jvp(x, p, *saved, x, throw=False)
    assert host_reads == []
    ddnref.pinv(x)
    ddnref.pinv_jvp(x, p, *saved, x)
    assert host_reads == ["__bool__", "__bool__"]


@pytest.mark.framework("torch")
def test_second_derivatives_without_full_rank(torch, rng):
    """Along directions that keep the rank, which a product with the matrix makes of every direction."""
    from ddnref.interop.torch import differentiable

    x = torch.tensor(with_values(rng, 5, 4, [2.0, 1.0, 0.0, 0.0])[0])
    op = differentiable(ddnref.pinv)
    moved = lambda a: op((torch.eye(5) + a) @ x @ (torch.eye(4) + a[:4, :4]))
    a = torch.zeros((5, 5), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moved, a)
    assert torch.autograd.gradgradcheck(moved, a)
