"""Polar factors: equal, small and zero singular values, closest rotations, and what has no derivative."""

from functools import partial

import numpy as np
import pytest
from problems import adjoint, relative, rotation

import ddnref
from conftest import TRACED
from ddnref.reference import polar_through_gram, polar_vjp_through_gram
from ddnref.testing import assert_jvp, assert_transpose, assert_vjp, numerical_jvp

SHAPES = [(7, 4), (4, 4), (3, 6)]
EPS = np.finfo(np.float64).eps


def normal(rng, *shape, is_complex=False):
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def factors(rng, m, n, batch=(), is_complex=False):
    """Orthonormal columns U and V, of k = min(m, n) columns."""
    k = min(m, n)
    return tuple(rotation(rng, size, batch, is_complex)[..., :k] for size in (m, n))


def matrix(u, s, v):
    return (u * np.asarray(s)[..., None, :]) @ adjoint(v)


def textbook(u, s, v, w_bar, h_bar):
    """The gradient from given factors, by the formulas in their basis, for a square or tall matrix."""
    s, g = np.asarray(s), (h_bar + adjoint(h_bar)) / 2
    r, t = adjoint(u) @ w_bar @ v, adjoint(v) @ g @ v
    sums = s[:, None] + s[None, :]
    inner = (r - adjoint(r) + (s[:, None] - s[None, :]) * t) / sums + t
    outside = w_bar @ v - u @ r
    return u @ inner @ adjoint(v) + (outside / s) @ adjoint(v)


# --- the factors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), [*SHAPES, (1, 1), (5, 1), (1, 4)])
def test_factors(m, n, is_complex, xp, rng):
    x = normal(rng, 2, m, n, is_complex=is_complex)
    (w, h), (u, s, vh) = xp.lift(ddnref.polar_fwd)(x)
    assert relative(w @ h, x) <= 1e-14
    small = adjoint(w) @ w if m >= n else w @ adjoint(w)
    np.testing.assert_allclose(small, np.broadcast_to(np.eye(min(m, n)), small.shape), atol=1e-14)
    assert np.array_equal(h, adjoint(h))
    assert np.min(np.linalg.eigvalsh(h)) >= -1e-14
    assert relative(matrix(u, s, adjoint(vh)), x) <= 1e-14
    for ours, again in zip(xp.lift(ddnref.polar)(x), (w, h), strict=True):
        assert np.array_equal(ours, again)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_closest_rotation(n, xp, rng):
    x = normal(rng, 20, n, n)
    (w, h), _ = xp.lift(partial(ddnref.polar_fwd, rotation=True))(x)
    np.testing.assert_allclose(np.linalg.det(w), 1, rtol=1e-13)
    assert relative(w @ h, x) <= 1e-14
    assert np.array_equal(h, adjoint(h))
    signs = np.sign(np.linalg.eigvalsh(h))
    assert np.array_equal(np.prod(signs, axis=-1), np.sign(np.linalg.det(x)))
    # No other rotation is closer.
    if n > 1:
        others = rotation(rng, n, (500,))
        others = others * np.where(np.arange(n) == 0, np.sign(np.linalg.det(others))[:, None], 1)[:, None, :]
        distances = np.linalg.norm(others - x[:, None], axis=(-2, -1))
        assert np.all(distances >= np.linalg.norm(w - x, axis=(-2, -1))[:, None])
    positive = np.linalg.det(x) > 0
    (plain, _), _ = xp.lift(ddnref.polar_fwd)(x)
    assert relative(w[positive], plain[positive]) <= 1e-14
    assert np.all(np.linalg.norm((w - plain)[~positive], axis=(-2, -1)) > 0.1)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), [*SHAPES, (1, 1), (5, 1), (1, 4)])
@pytest.mark.parametrize("values", ["simple", "triple"])
def test_derivatives(m, n, values, is_complex, rng):
    """Check against finite differences and each other: tall, square and wide."""
    k = min(m, n)
    u, v = factors(rng, m, n, (2,), is_complex)
    s = np.linspace(2.0, 0.5, k) if values == "simple" else np.asarray([1.5, 1.5, 1.5, 0.7])[:k]
    x = matrix(u, s, v)
    options = {"saves": True, "needs": (), "gap": 0.5}
    assert assert_vjp(ddnref.polar_fwd, ddnref.polar_vjp, x, **options).error <= 1e-9
    assert_jvp(ddnref.polar_fwd, ddnref.polar_jvp, x, rtol=1e-9, **options)
    assert_transpose(ddnref.polar_fwd, ddnref.polar_jvp, ddnref.polar_vjp, x, rtol=1e-12, saves=True, needs=())


@pytest.mark.parametrize("s", [(2.0, 1.0, -0.4), (1.5, 1.5, -0.5), (1.5, 1.5, 1.5), (2.0, 1.0, 0.0)])
def test_derivatives_of_the_closest_rotation(s, rng):
    u, v = (q * np.sign(np.linalg.det(q)) for q in (rotation(rng, 3), rotation(rng, 3)))
    x = matrix(u, s, v)
    functions = [partial(f, rotation=True) for f in (ddnref.polar_fwd, ddnref.polar_jvp, ddnref.polar_vjp)]
    options = {"saves": True, "needs": (), "gap": 0.5}
    assert assert_vjp(functions[0], functions[2], x, **options).error <= 1e-9
    assert_jvp(*functions[:2], x, rtol=1e-9, **options)
    assert_transpose(*functions, x, rtol=1e-12, saves=True, needs=())


def test_two_hundred_matrices_with_a_triple_singular_value():
    """Compare with the gradient from the factors of which each matrix was made."""
    rng = np.random.default_rng(18)
    worst = 0.0
    for i in range(200):
        is_complex, m = bool(i % 2), (6, 9)[i // 2 % 2]
        u, v = factors(rng, m, 6, (), is_complex)
        s = np.concatenate([np.repeat(rng.uniform(0.5, 2), 3), rng.uniform(0.5, 2, 3)])
        w_bar, h_bar = normal(rng, m, 6, is_complex=is_complex), normal(rng, 6, 6, is_complex=is_complex)
        (w, h), saved = ddnref.polar_fwd(matrix(u, s, v))
        found = ddnref.polar_vjp(w_bar, h_bar, w, h, *saved)
        worst = max(worst, relative(found, textbook(u, s, v, w_bar, h_bar)))
    assert worst <= 1e-12


def exact(x, w_bar, h_bar):
    """The gradients of a loss of W and of one of H, with sixty digits."""
    import mpmath

    with mpmath.workdps(60):
        to_mp = lambda a: mpmath.matrix(np.asarray(a, dtype=float).tolist())
        u, s, vt = mpmath.svd_r(to_mp(x), full_matrices=False)
        v, n = vt.T, len(s)
        w_bar, g = to_mp(w_bar), to_mp((h_bar + h_bar.T) / 2)
        r, t = u.T * w_bar * v, v.T * g * v
        of_w, of_h = mpmath.zeros(n), mpmath.zeros(n)
        for i in range(n):
            for j in range(n):
                of_w[i, j] = (r[i, j] - r[j, i]) / (s[i] + s[j])
                of_h[i, j] = t[i, j] * (s[i] - s[j]) / (s[i] + s[j]) + t[i, j]
        outside = (w_bar * v - u * r) * mpmath.diag([1 / z for z in s])
        found = u * of_w * v.T + outside * v.T, u * of_h * v.T
        return tuple(np.asarray(y.tolist(), dtype=float) for y in found)


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e100])
@pytest.mark.parametrize(("m", "small"), [(4, (1e-8,)), (4, (3e-8, 1e-8)), (7, (1e-8,)), (4, (1e-4,)), (7, (1e-11,))])
def test_ill_conditioned(m, small, scale, xp, rng):
    """Sums of singular values and reciprocals lose what the smallest ones have lost, and no more.

    The decomposition and the products round by some 12 eps at any condition.
    """
    u, v = factors(rng, m, 4)
    s = np.concatenate([np.linspace(1.0, 0.5, 4 - len(small)), small])
    x = scale * matrix(u, s, v)
    w_bar, h_bar = normal(rng, m, 4), normal(rng, 4, 4)
    of_w, of_h = exact(x, w_bar, h_bar)
    (w, h), saved = xp.lift(ddnref.polar_fwd)(x)
    vjp = xp.lift(partial(ddnref.polar_vjp, throw=False))
    # A tall matrix has reciprocals of single values; a square one has sums of two.
    condition = 1 / s[-1] if m > 4 else 1 / (s[-1] + s[-2])
    bound = EPS * (8 * condition + 16)
    assert relative(vjp(w_bar, None, w, h, *saved), of_w) <= bound
    assert relative(vjp(None, h_bar, w, h, *saved), of_h) <= bound
    # A direction, and so the tangents.
    x_dot = normal(rng, m, 4)
    w_dot, h_dot = xp.lift(partial(ddnref.polar_jvp, throw=False))(x_dot, w, h, *saved)
    size = np.linalg.norm(x_dot)
    assert abs(np.vdot(w_bar, w_dot) - np.vdot(of_w, x_dot)) <= bound * np.linalg.norm(of_w) * size
    assert abs(np.vdot(h_bar, h_dot) - np.vdot(of_h, x_dot)) <= bound * np.linalg.norm(of_h) * size
    assert np.array_equal(h_dot, h_dot.T)


def test_through_the_gram_matrix_half_of_the_digits_are_lost(rng):
    """Why neither W nor its gradient is taken from XᴴX, the textbook form."""
    u, v = factors(rng, 6, 4)
    w_bar = normal(rng, 6, 4)
    for small, ours, theirs in ((1e-1, 1e-13, 1e-11), (1e-6, 1e-8, None)):
        x = matrix(u, [1.0, 0.8, 0.5, small], v)
        of_w, _ = exact(x, w_bar, np.zeros((4, 4)))
        (w, h), saved = ddnref.polar_fwd(x)
        assert relative(ddnref.polar_vjp(w_bar, None, w, h, *saved), of_w) <= ours
        gram = relative(polar_vjp_through_gram(w_bar, x), of_w)
        assert gram <= theirs if theirs else gram > 1e-6
        others = polar_through_gram(x)
        lost = np.linalg.norm(adjoint(others[0]) @ others[0] - np.eye(4))
        assert lost <= 1e-12 if theirs else lost > 1e-7
        assert np.linalg.norm(adjoint(w) @ w - np.eye(4)) <= 1e-14


# --- where there is no derivative -------------------------------------------------------------------------------------


def test_zero_singular_values(xp, rng):
    """A loss of H without a kink, and one of W without a part there, have gradients; others do not."""
    u, v = factors(rng, 6, 4, (3,))
    x = matrix(u, [2.0, 1.0, 0.5, 0.0], v)
    x[2] = matrix(u[2], [2.0, 1.0, 0.5, 0.1], v[2])
    (w, h), saved = ddnref.polar_fwd(xp.asarray(x))
    w_bar, h_bar = normal(rng, 3, 6, 4), normal(rng, 3, 4, 4)
    arrays = (w, h, *saved)
    vjp, jvp = ddnref.polar_vjp, ddnref.polar_jvp
    for bars in ((w_bar, None), (None, h_bar)):
        given = tuple(None if bar is None else xp.asarray(bar) for bar in bars)
        with pytest.raises(
            ddnref.SingularError, match=r"zero to working precision \(items 0, 1 of 3\).*the loss depen"
        ):
            vjp(*given, *arrays)
        missing = np.isnan(xp.numpy(vjp(*given, *arrays, throw=False)))
        assert missing.all(axis=(-2, -1)).tolist() == missing.any(axis=(-2, -1)).tolist() == [True, True, False]
        assert np.all(np.isfinite(xp.numpy(vjp(*given, *arrays, throw=False, gauge_rtol=np.inf))))
    # No part in the null space of these cotangents.
    p, q = u[..., :3] @ adjoint(u[..., :3]), v[..., :3] @ adjoint(v[..., :3])
    smooth = q @ (h_bar + adjoint(h_bar)) + (h_bar + adjoint(h_bar)) @ q
    x_bar = xp.numpy(vjp(xp.asarray(p @ w_bar @ q), xp.asarray(smooth), *arrays))
    x_dot = x @ normal(rng, 3, 4, 4)  # the rank stays
    loss = lambda x: np.sum((p @ w_bar @ q) * ddnref.polar(x)[0]) + np.sum(smooth * ddnref.polar(x)[1])
    f_dot = numerical_jvp(loss, x, x_dot, gap=0.1)
    assert abs(f_dot - np.sum(x_bar * x_dot)) <= 1e-9 * np.linalg.norm(x_bar) * np.linalg.norm(x_dot)
    w_dot, h_dot = (xp.numpy(y) for y in jvp(xp.asarray(x_dot), *arrays))
    f_dot = np.sum(p @ w_bar @ q * w_dot) + np.sum(smooth * h_dot)
    assert abs(f_dot - np.sum(x_bar * x_dot)) <= 1e-12 * np.linalg.norm(x_bar) * np.linalg.norm(x_dot)
    # Any other direction gives H a kink.
    with pytest.raises(ddnref.SingularError, match=r"items 0, 1 of 3.*the direction moves it"):
        jvp(xp.asarray(normal(rng, 3, 6, 4)), *arrays)
    missing = np.isnan(xp.numpy(jvp(xp.asarray(normal(rng, 3, 6, 4)), *arrays, throw=False)[0]))
    assert missing.all(axis=(-2, -1)).tolist() == missing.any(axis=(-2, -1)).tolist() == [True, True, False]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_zero_singular_values_of_every_shape(m, n, rng):
    """A loss of H whose cotangent vanishes between vectors of the null space has a gradient, a wide matrix included."""
    k = min(m, n)
    u, v = factors(rng, m, n)
    s = np.concatenate([np.linspace(2.0, 1.0, k - 1), [0.0]])
    x = matrix(u, s, v)
    (w, h), saved = ddnref.polar_fwd(x)
    h_bar, q = normal(rng, n, n), v[:, : k - 1] @ v[:, : k - 1].T
    h_bar = q @ h_bar + h_bar @ q - q @ h_bar @ q
    x_bar = ddnref.polar_vjp(None, h_bar, w, h, *saved)
    for _ in range(4):
        x_dot = normal(rng, m, n)  # the kink of H is not seen by the loss
        f_dot = numerical_jvp(lambda x: np.sum(h_bar * ddnref.polar(x)[1]), x, x_dot, step=1e-7)
        assert abs(f_dot - np.sum(x_bar * x_dot)) <= 1e-6 * np.linalg.norm(x_bar) * np.linalg.norm(x_dot)
    with pytest.raises(ddnref.SingularError, match="A singular value is zero"):
        ddnref.polar_vjp(None, h_bar + (np.eye(n) - q), w, h, *saved)


def test_planes_without_a_closest_rotation(xp, rng):
    """A rotation is not determined where the last two values are equal and the determinant is negative."""
    u, v = (q * np.sign(np.linalg.det(q))[..., None, None] for q in (rotation(rng, 3, (3,)), rotation(rng, 3, (3,))))
    s = np.asarray([[2.0, 1.0, -1.0], [2.0, 1.0, 1.0], [2.0, 0.0, 0.0]])
    x = xp.asarray(matrix(u, s, v))
    (w, h), saved = ddnref.polar_fwd(x, rotation=True)
    arrays = (w, h, *saved)
    vjp = partial(ddnref.polar_vjp, rotation=True)
    for bars in ((normal(rng, 3, 3, 3), None), (None, normal(rng, 3, 3, 3))):
        given = tuple(None if bar is None else xp.asarray(bar) for bar in bars)
        with pytest.raises(ddnref.SingularError, match=r"sum of two singular values.*items 0, 2 of 3.*reflection"):
            vjp(*given, *arrays)
        missing = np.isnan(xp.numpy(vjp(*given, *arrays, throw=False)))
        assert missing.all(axis=(-2, -1)).tolist() == missing.any(axis=(-2, -1)).tolist() == [True, False, True]
    # The axis that goes with the first value is determined but for turns of the others.
    first = u[:, :, :1] @ adjoint(v[:, :, :1])
    assert np.all(np.isfinite(xp.numpy(vjp(xp.asarray(first), None, *arrays))))
    with pytest.raises(ddnref.SingularError, match=r"items 0, 2 of 3.*the direction moves it"):
        ddnref.polar_jvp(xp.asarray(normal(rng, 3, 3, 3)), *arrays, rotation=True)
    assert np.all(np.isfinite(xp.numpy(xp.derivative(ddnref.polar_jvp, x, *arrays, rotation=True)[0])))


def test_the_zero_matrix(xp):
    (w, h), saved = ddnref.polar_fwd(xp.asarray(np.zeros((2, 3, 3))))
    assert np.all(xp.numpy(h) == 0)
    zero = xp.asarray(np.zeros((2, 3, 3)))
    assert np.all(xp.numpy(xp.derivative(ddnref.polar_vjp, zero, zero, w, h, *saved)) == 0)
    with pytest.raises(ddnref.SingularError):
        ddnref.polar_vjp(zero + 1, None, w, h, *saved)


# --- input -----------------------------------------------------------------------------------------------------------


def test_bad_items_are_nan_alone(xp, rng):
    x = normal(rng, 3, 4, 4)
    x[1, 2, 2] = np.nan
    for options in ({}, {"rotation": True}):
        (w, h), saved = ddnref.polar_fwd(xp.asarray(x), **options)
        bars = xp.asarray(normal(rng, 3, 4, 4)), None
        found = [w, h, xp.derivative(ddnref.polar_vjp, *bars, w, h, *saved, **options)]
        found += xp.derivative(ddnref.polar_jvp, bars[0], w, h, *saved, **options)
        for y in map(xp.numpy, found):
            missing = np.isnan(y)
            assert missing.all(axis=(-2, -1)).tolist() == missing.any(axis=(-2, -1)).tolist() == [False, True, False]


def test_bad_input(host_reads, rng):
    for bad, options, error, match in [
        (np.ones(3), {}, ValueError, r"x has shape \(3,\), expected"),
        (np.ones((3, 2), dtype=np.int64), {}, TypeError, "float32, float64"),
        (np.ones((3, 2)), {"rotation": True}, ValueError, "only square matrices"),
        (np.ones((2, 2)) + 0j, {"rotation": True}, TypeError, "for real matrices"),
        (None, {}, TypeError, "x is None"),
    ]:
        with pytest.raises(error, match=match):
            ddnref.polar(bad, **options)
    (w, h), saved = ddnref.polar_fwd(normal(rng, 2, 5, 3))
    arrays = (w, h, *saved)
    for bars, error, match in [
        ((None, None), TypeError, "both None"),
        ((w[0], None), ValueError, "w_bar has shape"),
        ((None, w), ValueError, "h_bar has shape"),
        ((w.astype(np.float32), None), TypeError, "w_bar has dtype float32, expected float64"),
        ((w, h.astype(np.float32)), TypeError, "h_bar has dtype float32, expected float64"),
    ]:
        with pytest.raises(error, match=match):
            ddnref.polar_vjp(*bars, *arrays)
    with pytest.raises(TypeError, match="x_dot is None"):
        ddnref.polar_jvp(None, *arrays)
    with pytest.raises(ValueError, match=r"u has shape \(2, 5, 2\), expected \(2, 5, 3\)"):
        ddnref.polar_vjp(w, None, w, h, saved[0][..., :2], *saved[1:])
    import array_api_strict as strict

    arrays = [strict.asarray(a) for a in arrays]
    host_reads.clear()
    ddnref.polar_fwd(strict.asarray(normal(rng, 2, 5, 3)))
    ddnref.polar_vjp(arrays[0], arrays[1], *arrays, throw=False)
    ddnref.polar_jvp(arrays[0], *arrays, throw=False)
    assert host_reads == []
    ddnref.polar_vjp(arrays[0], arrays[1], *arrays)
    ddnref.polar_jvp(arrays[0], *arrays)
    assert host_reads == ["__bool__", "__bool__"]


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0, 3), (2, 0, 0), (0, 4, 3)])
def test_matrices_without_entries(shape, xp):
    (w, h), saved = ddnref.polar_fwd(xp.asarray(np.ones(shape)))
    assert tuple(w.shape) == shape
    assert tuple(h.shape) == (*shape[:-2], shape[-1], shape[-1])
    assert tuple(ddnref.polar_vjp(w, h, w, h, *saved).shape) == shape
    assert [tuple(y.shape) for y in ddnref.polar_jvp(w, w, h, *saved)] == [tuple(w.shape), tuple(h.shape)]


# --- second derivatives ----------------------------------------------------------------------------------------------


@pytest.mark.framework("torch")
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_second_derivatives_at_equal_singular_values(m, n, is_complex, torch, rng):
    from ddnref.interop.torch import differentiable

    u, v = factors(rng, m, n, (), is_complex)
    s = np.asarray([1.5, 1.5, 1.5, 0.7])[: min(m, n)]
    x = torch.tensor(matrix(u, s, v), requires_grad=True)
    op = differentiable(ddnref.polar)
    assert torch.autograd.gradcheck(op, x)
    assert torch.autograd.gradgradcheck(op, x)


@pytest.mark.framework("torch")
def test_second_derivatives_of_rotations(torch, rng):
    from ddnref.interop.torch import differentiable

    u, v = (q * np.sign(np.linalg.det(q)) for q in (rotation(rng, 3), rotation(rng, 3)))
    op = differentiable(ddnref.polar, rotation=True)
    for s in ((1.5, 1.5, -0.5), (1.0, 1.0, 1.0), (1.0, 1.0, 0.0)):
        x = torch.tensor(matrix(u, s, v), requires_grad=True)
        assert torch.autograd.gradcheck(op, x)
        assert torch.autograd.gradgradcheck(op, x)
    x = torch.tensor(matrix(u, (2.0, 1.0, -1.0), v), requires_grad=True)
    (gradient,) = torch.autograd.grad(op(x)[0] @ torch.tensor(v[:, 0]) @ torch.tensor(u[:, 0]), x, create_graph=True)
    with pytest.raises(ddnref.GaugeError, match="A second derivative of the polar factors"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.graphs
@pytest.mark.framework("torch")
@pytest.mark.filterwarnings(*TRACED)
def test_rotations_under_the_transforms_of_torch(torch, rng):
    """Check `vmap`, forward over reverse, and a graph, which the matrix of operations has for no option."""
    from ddnref.interop.torch import differentiable

    x, op = torch.tensor(normal(rng, 5, 3, 3)), differentiable(ddnref.polar, rotation=True)
    loss = lambda x: sum((y**3).sum() for y in op(x))
    for derivative in (torch.func.grad(loss), torch.func.hessian(loss)):
        each = torch.stack([derivative(item) for item in x])
        torch.testing.assert_close(torch.func.vmap(derivative)(x), each)
    torch._dynamo.reset()
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf), torch.autograd.grad(loss(leaf), leaf))


@pytest.mark.framework("torch")
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_third_derivatives_in_torch_at_equal_singular_values(m, n, torch, rng):
    from ddnref.interop.torch import differentiable

    u, v = factors(rng, m, n)
    x = torch.tensor(matrix(u, np.asarray([1.5, 1.5, 1.5, 0.7])[: min(m, n)], v))
    op, (d, e) = differentiable(ddnref.polar), torch.tensor(normal(rng, 2, m, n))
    a, b = torch.tensor(normal(rng, m, n)), torch.tensor(normal(rng, n, n))
    slope = lambda x: (
        torch.func.grad(lambda x: sum((c * y**2).sum() for c, y in zip((a, b), op(x), strict=True)))(x) * d
    )
    second = lambda x: torch.func.grad(lambda x: slope(x).sum())(x)
    third = (torch.func.grad(lambda x: (second(x) * e).sum())(x) * d).sum()
    f_dot = numerical_jvp(lambda x: (second(torch.tensor(x)) * e).sum().numpy(), x.numpy(), d.numpy(), gap=0.5)
    assert abs(float(third) - f_dot) <= 1e-8 * abs(f_dot)


@pytest.mark.framework("jax")
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_hessians_in_jax_at_equal_singular_values(m, n, jax, rng):
    """A third derivative is right too: the systems are differentiated as often as it takes."""
    from ddnref.interop.jax import differentiable

    u, v = factors(rng, m, n)
    x = matrix(u, np.asarray([1.5, 1.5, 1.5, 0.7])[: min(m, n)], v)
    op = differentiable(ddnref.polar)
    a, b = normal(rng, m, n), normal(rng, n, n)
    loss = lambda x: sum(jax.numpy.sum(c * y**2) for c, y in zip((a, b), op(x), strict=True))
    d, e = map(jax.numpy.asarray, normal(rng, 2, m, n))
    once = lambda x: jax.jvp(jax.grad(loss), (x,), (d,))[1]
    first, second, third = jax.jit(lambda x: (jax.grad(loss)(x), once(x), jax.jvp(once, (x,), (e,))[1]))(
        jax.numpy.asarray(x)
    )
    gradient = jax.jit(jax.grad(loss))
    assert relative(second, numerical_jvp(lambda x: np.asarray(gradient(x)), x, np.asarray(d), gap=0.5)) <= 1e-8
    moved = jax.jit(once)
    assert relative(third, numerical_jvp(lambda x: np.asarray(moved(x)), x, np.asarray(e), gap=0.5)) <= 1e-8
    assert np.all(np.isfinite(first))
