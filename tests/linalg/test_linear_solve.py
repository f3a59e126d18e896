"""``linear_solve``: choice of the solver, accuracy of gradients against the tolerance, least squares, failures."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
from operator_cases import NAMES, case
from problems import relative

import ddnref
from conftest import backend
from ddnref import krylov, operators
from ddnref.linalg import _linear_solve
from ddnref.testing import check_vjp, numerical_jvp

GRID = (4, 3)


def random(rng, shape, is_complex=False):
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def problem(name, rng, is_complex=False):
    """From parameters to an operator for this solver, the parameters, and the shapes of its vectors."""
    kernel = 0.3 * random(rng, (3, 3), is_complex)
    kernel[1, 1] += 1
    near = np.eye(12) + 0.1 * random(rng, (12, 12), is_complex)
    return {
        "cg": (
            lambda k, rho: operators.normal(operators.convolution(k, GRID), rho),
            (kernel, np.asarray(0.5)),
            GRID,
            GRID,
        ),
        "minres": (
            lambda k, d: operators.add(operators.normal(operators.convolution(k, GRID)), operators.diagonal(d, GRID)),
            (kernel, np.where(np.arange(12) % 2, -9.0, 3.0).reshape(GRID)),
            GRID,
            GRID,
        ),
        "gmres": (operators.dense, (near,), (12,), (12,)),
        "bicgstab": (
            lambda d, a: operators.compose(operators.diagonal(d), operators.dense(a)),
            (rng.uniform(1, 2, 12), near),
            (12,),
            (12,),
        ),
        "lsmr": (operators.dense, (random(rng, (15, 12), is_complex),), (12,), (15,)),
        "lsmr, wide": (operators.dense, (random(rng, (9, 12), is_complex),), (12,), (9,)),
        "direct": (operators.dense, (near,), (12,), (12,)),
    }[name]


PROBLEMS = ("cg", "minres", "gmres", "bicgstab", "lsmr", "lsmr, wide", "direct")


def solver(name):
    return name.partition(",")[0]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("is_complex", [False, True])
def test_gradients_agree_with_finite_differences(name, is_complex, rng):
    """With the solver at 1e-12, for the right-hand side and every parameter."""
    build, params, _, target = problem(name, rng, is_complex)
    n, options = len(params), {"solver": solver(name), "rtol": 1e-12}

    def vjp(x_bar, x, *arrays):
        (params_bar, b_bar), _ = ddnref.linear_solve_vjp(x_bar, x, build(*arrays[:n]), arrays[n], **options)
        return *params_bar, b_bar

    report = check_vjp(
        lambda *arrays: ddnref.linear_solve(build(*arrays[:n]), arrays[n], **options)[0],
        vjp, *params, random(rng, target, is_complex), needs=range(n + 1), directions=2,
    )  # fmt: skip
    assert report.passed, report
    assert report.error <= 1e-7


@pytest.mark.parametrize("name", ["cg", "gmres", "lsmr"])
def test_every_library_gives_the_same_gradient(name, xp, rng):
    """Compiled where it can be, from a batch of parameters and two right-hand sides for each."""
    build, params, domain, target = problem(name, rng)
    params = [np.stack([p, 1.1 * p, 0.9 * p]) for p in params]
    b, x_bar = rng.standard_normal((2, 3, *target)), rng.standard_normal((2, 3, *domain))

    def both(x_bar, b, *params, loop):
        operator = build(*params)
        options = {"solver": name, "rtol": 1e-12, "throw": False, "while_loop": loop}
        x, info = ddnref.linear_solve(operator, b, **options)
        (params_bar, b_bar), more = ddnref.linear_solve_vjp(x_bar, x, operator, b, **options)
        return x, b_bar, *params_bar, info.converged, more.converged

    theirs = xp.jit(partial(both, loop=xp.while_loop))(*map(xp.asarray, (x_bar, b, *params)))
    ours = both(x_bar, b, *params, loop=None)
    for y, z in zip(map(xp.numpy, theirs), ours, strict=True):
        np.testing.assert_allclose(y, z, rtol=0, atol=1e-9 * max(1.0, np.abs(z).max()))
    for i in range(3):  # a batch is its items, and a parameter gets the sum over its right-hand sides
        alone = [both(x_bar[j, i], b[j, i], *(p[i, ...] for p in params), loop=None) for j in range(2)]
        for k in range(len(params)):
            np.testing.assert_allclose(ours[2 + k][i], sum(a[2 + k] for a in alone), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("tau", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("smooth", [False, True], ids=["random b", "b = A x"])
def test_residuals_and_gradients_follow_the_tolerance(tau, smooth, rng):
    """Residuals ≤ 1.1 τ, recomputed here, and gradients within 2 κ τ of the exact ones."""
    kernel = np.outer([0.2, 0.6, 0.2], [0.2, 0.6, 0.2])
    operator = operators.normal(operators.convolution(kernel, (16, 16)), np.asarray(1e-2))
    matrix = operator.matrix()
    kappa = np.linalg.cond(matrix)
    b, x_bar = rng.standard_normal((2, 16, 16))
    b = operator(b) if smooth else b

    def gradients(x, y):
        return *operator.params_vjp(operator.params, -y, x), y

    exact = gradients(*(np.linalg.solve(matrix, v.ravel()).reshape(16, 16) for v in (b, x_bar)))
    x, info = ddnref.linear_solve(operator, b, rtol=tau)
    (params_bar, b_bar), more = ddnref.linear_solve_vjp(x_bar, x, operator, rtol=tau)
    for left, right, said in ((x, b, info), (b_bar, x_bar, more)):
        residual = relative(operator(left), right)
        assert residual <= 1.1 * tau
        assert said.residual_norm == pytest.approx(residual, rel=1e-3, abs=1e-14)
    for ours, theirs in zip((*params_bar, b_bar), exact, strict=True):
        assert relative(ours, theirs) <= 2 * kappa * tau


def test_the_solver_follows_the_flags(rng, monkeypatch):
    chosen = []

    def record(name, original):
        def call(*args, **options):
            chosen.append(name)
            return original(*args, **options)

        return call

    for name, original in list(_linear_solve.SOLVERS.items()):
        monkeypatch.setitem(_linear_solve.SOLVERS, name, record(name, original))
    for name in PROBLEMS[:5]:
        build, params, _, target = problem(name, rng)
        ddnref.linear_solve(build(*params), rng.standard_normal(target))
    large = np.eye(258)
    for a in (np.eye(256), large, large[:, :9], np.eye(3)[:2], large[:, :257], large[:257]):
        ddnref.linear_solve(a, np.ones(a.shape[0]))
    arrays = ["direct", "gmres", "direct", "direct", "lsmr", "lsmr"]
    assert chosen == ["cg", "minres", "gmres", "gmres", "lsmr", *arrays]
    chosen.clear()
    build, params, _, target = problem("gmres", rng)
    for name in ("bicgstab", "gmres", "direct"):
        x, _ = ddnref.linear_solve(build(*params), np.ones(target), solver=name)
        ddnref.linear_solve_vjp(np.ones(12), x, build(*params), solver=name)
    assert chosen == ["bicgstab"] * 2 + ["gmres"] * 2 + ["direct"] * 2


def test_a_solver_of_ones_own(rng):
    """Called with the operator and with its adjoint, and with the options that were given, no others."""
    build, params, _, _ = problem("gmres", rng)
    seen = []

    def own(operator, b, /, **options):
        seen.append((operator.matrix(), options))
        return krylov.gmres(operator, b, **options)

    x, _ = ddnref.linear_solve(build(*params), np.ones(12), solver=own, maxiter=77)
    ddnref.linear_solve_vjp(np.ones(12), x, build(*params), solver=own)
    np.testing.assert_allclose(seen[0][0], params[0])
    np.testing.assert_allclose(seen[1][0], params[0].T)
    assert seen[0][1] == {"maxiter": 77, "throw": True}
    assert seen[1][1] == {"throw": True}


def test_warm_starts_and_preconditioners_reach_their_solve(rng):
    build, params, _, _ = problem("cg", rng)
    operator = build(*params)
    b, x_bar = rng.standard_normal((2, *GRID))
    x, cold = ddnref.linear_solve(operator, b, rtol=1e-10)
    (_, b_bar), more = ddnref.linear_solve_vjp(x_bar, x, operator, rtol=1e-10)
    assert cold.n_iter > 3
    assert more.n_iter > 3
    assert ddnref.linear_solve(operator, b, x0=x, rtol=1e-9)[1].n_iter == 0
    assert ddnref.linear_solve_vjp(x_bar, x, operator, y0=b_bar, rtol=1e-9)[1].n_iter == 0
    inverse = np.linalg.inv(operator.matrix())
    exact = lambda r: (r.reshape(*r.shape[:-2], 12) @ inverse).reshape(r.shape)
    assert ddnref.linear_solve(operator, b, preconditioner=exact, rtol=1e-10)[1].n_iter <= 2
    assert ddnref.linear_solve_vjp(x_bar, x, operator, preconditioner=exact, rtol=1e-10)[1].n_iter <= 2


def test_check_every_says_how_often_a_flag_is_read(host_reads, rng):
    strict = backend("array-api-strict")
    build, params, _, _ = problem("cg", rng)
    operator, b = build(*map(strict.asarray, params)), strict.asarray(rng.standard_normal(GRID))
    counts = []
    for every in (1, 20):
        host_reads.clear()
        x, _ = ddnref.linear_solve(operator, b, check_every=every, throw=False, rtol=1e-10)
        ddnref.linear_solve_vjp(b, x, operator, check_every=every, throw=False, rtol=1e-10)
        counts.append(len(host_reads))
    assert counts[1] < counts[0] / 2


@pytest.mark.parametrize("m", [9, 15])
@pytest.mark.parametrize("name", ["direct", "lsmr"])
def test_least_squares_in_closed_form(name, m, xp, rng):
    """Golub and Pereyra's formula, from the pseudo-inverse."""
    a, b, x_bar = rng.standard_normal((m, 12)), rng.standard_normal(m), rng.standard_normal(12)
    plus = np.linalg.pinv(a)
    x = plus @ b
    y = plus.T @ x_bar
    expected = np.outer(-y, x)
    if m > 12:
        expected += np.outer(b - a @ x, plus @ y)
    else:
        expected += np.outer(plus.T @ x, x_bar - a.T @ y)
    options = {"solver": name, "rtol": 1e-13}
    found, info = ddnref.linear_solve(xp.asarray(a), xp.asarray(b), **options)
    assert relative(xp.numpy(found), x) <= 1e-11
    assert info.residual_norm <= 1.1e-13
    (a_bar, b_bar), both = ddnref.linear_solve_vjp(xp.asarray(x_bar), found, xp.asarray(a), xp.asarray(b), **options)
    assert relative(xp.numpy(a_bar), expected) <= 1e-10
    assert relative(xp.numpy(b_bar), y) <= 1e-10
    assert both.n_iter > 12 or m == 9 or name == "direct"


def test_one_bad_right_hand_side_is_its_own(xp, rng):
    """Not finite, not converged, zero: four right-hand sides of a shared operator."""
    d = np.geomspace(1, 1e3, 12)
    operator = operators.diagonal(xp.asarray(d))._replace(self_adjoint=True, positive_definite=True)
    b = np.zeros((4, 12))
    b[0, 3], b[1], b[3, 0] = 1.0, 1.0, np.nan  # found in a step; needs twelve; zero; not finite
    with pytest.raises(ddnref.ConvergenceError, match="1 of 4 right-hand sides reached the iteration limit of 3"):
        ddnref.linear_solve(operator, xp.asarray(b), maxiter=3)
    x, info = ddnref.linear_solve(operator, xp.asarray(b), maxiter=3, throw=False)
    assert xp.numpy(info.converged).tolist() == [True, False, True, False]
    assert xp.numpy(info.status).tolist() == [0, 1, 0, 5]
    assert np.all(xp.numpy(x)[2] == 0)
    (_, b_bar), more = ddnref.linear_solve_vjp(xp.asarray(b), x, operator, maxiter=3, throw=False)
    assert np.isnan(xp.numpy(b_bar)).all(axis=-1).tolist() == [False, True, False, True]
    assert np.isnan(xp.numpy(b_bar)).any(axis=-1).tolist() == [False, True, False, True]
    assert xp.numpy(more.converged).tolist() == [True, False, True, False]


def test_a_parameter_shared_with_a_failed_item_has_no_gradient(rng):
    d = np.geomspace(1, 1e3, 12)
    operator = operators.diagonal(d)._replace(self_adjoint=True, positive_definite=True)
    b = np.stack([np.eye(12)[0], np.ones(12)])
    x, _ = ddnref.linear_solve(operator, b)
    ((d_bar,), _), _ = ddnref.linear_solve_vjp(b, x, operator, maxiter=3, throw=False)
    assert np.all(np.isnan(d_bar))


def test_an_adjoint_solve_that_fails_raises_and_says_so():
    operator = operators.diagonal(np.geomspace(1, 1e3, 12))._replace(self_adjoint=True, positive_definite=True)
    x, _ = ddnref.linear_solve(operator, np.ones(12))
    with pytest.raises(ddnref.ConvergenceError, match=r"In a solve for the derivative of linear_solve: .*limit of 3"):
        ddnref.linear_solve_vjp(np.ones(12), x, operator, maxiter=3)
    with pytest.raises(ddnref.ConvergenceError, match="In a solve for the derivative"):
        ddnref.linear_solve_jvp(None, np.ones(12), x, operator, maxiter=3)


def test_a_singular_system_is_never_silent(rng):
    singular = np.ones((4, 4))
    for name in ("direct", "gmres", "bicgstab"):
        with pytest.raises((ddnref.SingularError, ddnref.ConvergenceError)):
            ddnref.linear_solve(singular, rng.standard_normal(4), solver=name)
    x, info = ddnref.linear_solve(singular, rng.standard_normal(4), throw=False)
    assert np.all(np.isnan(x))
    assert not info.converged


def test_an_operator_with_a_wrong_adjoint_is_named(rng):
    """The gradient cannot be right then; the check says which function is wrong."""
    build, params, _, _ = problem("gmres", rng)
    wrong = build(*params)._replace(adjoint=build(*params).apply)
    with pytest.raises(ddnref.OperatorError, match="adjoint"):
        operators.check_operator(wrong)


def test_memory_does_not_grow_with_the_iterations(rng):
    operator = operators.normal(operators.convolution(np.full((5, 5), 0.04), (64, 64)), 1e-9)
    b = rng.standard_normal((64, 64))

    def peak(maxiter):
        tracemalloc.start()
        x, info = ddnref.linear_solve(operator, b, maxiter=maxiter, rtol=1e-14, throw=False)
        _, more = ddnref.linear_solve_vjp(b, x, operator, maxiter=maxiter, rtol=1e-14, throw=False)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size, int(info.n_iter + more.n_iter)

    peak(5)
    (few, first), (many, last) = peak(10), peak(200)
    assert last >= 10 * first
    assert many <= 1.05 * few


# --- forward mode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "direct"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_jvp_agrees_with_finite_differences_and_with_the_vjp(name, is_complex, rng):
    build, params, domain, target = problem(name, rng, is_complex)
    b, x_bar = random(rng, target, is_complex), random(rng, domain, is_complex)
    operator, options = build(*params), {"solver": solver(name), "rtol": 1e-13}
    dots = tuple(random(rng, p.shape, np.iscomplexobj(p)) for p in params)
    b_dot = random(rng, target, is_complex)
    x, _ = ddnref.linear_solve(operator, b, **options)
    x_dot, info = ddnref.linear_solve_jvp(dots, b_dot, x, operator, b, **options)
    assert info.converged

    def moved(t):
        moved = build(*(p + t[0] * d for p, d in zip(params, dots, strict=True)))
        return ddnref.linear_solve(moved, b + t[0] * b_dot, **options)[0]

    numerical = numerical_jvp(moved, np.zeros(1), np.ones(1), step=1e-3)
    assert relative(x_dot, numerical) <= 1e-7
    (params_bar, b_bar), _ = ddnref.linear_solve_vjp(x_bar, x, operator, b, **options)
    forward = np.sum(np.conj(x_bar) * x_dot).real
    backward = sum(np.sum(np.conj(u) * v).real for u, v in zip((*params_bar, b_bar), (*dots, b_dot), strict=True))
    assert backward == pytest.approx(forward, rel=1e-10)


def test_jvp_of_a_matrix_and_of_one_argument_alone(xp, rng):
    a, b, b_dot = np.eye(5) + 0.2 * rng.standard_normal((5, 5)), rng.standard_normal(5), rng.standard_normal(5)
    a_dot = rng.standard_normal((5, 5))
    x = np.linalg.solve(a, b)
    options = {"rtol": 1e-12}
    arrays = [xp.asarray(y) for y in (a_dot, b_dot, x, a)]
    both, _ = ddnref.linear_solve_jvp(*arrays, **options)
    first, _ = ddnref.linear_solve_jvp(arrays[0], None, *arrays[2:], **options)
    second, _ = ddnref.linear_solve_jvp(None, *arrays[1:], **options)
    assert relative(xp.numpy(both), np.linalg.solve(a, b_dot - a_dot @ x)) <= 1e-10
    assert relative(xp.numpy(first), np.linalg.solve(a, -a_dot @ x)) <= 1e-10
    assert relative(xp.numpy(second), np.linalg.solve(a, b_dot)) <= 1e-10


@pytest.mark.parametrize("shape", [(5, 5), (7, 5), (4, 6)])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_jvp_of_factorised_batches(shape, is_complex, damping, xp, rng):
    """Two matrices, three right-hand sides that broadcast; with factors the transpose identity is one of rounding."""
    a, a_dot = (random(rng, (2, *shape), is_complex) for _ in range(2))
    a = a + 2 * np.eye(*shape)
    b, b_dot = (random(rng, (3, 1, shape[0]), is_complex) for _ in range(2))
    options = {"solver": "direct", "damping": damping, "throw": False}

    def both(a_dot, b_dot, a, b):
        x, _ = ddnref.linear_solve(a, b, **options)
        return x, ddnref.linear_solve_jvp(a_dot, b_dot, x, a, b, **options)[0]

    x, x_dot = xp.lift(both)(a_dot, b_dot, a, b)
    assert x_dot.shape == (3, 2, shape[1])
    moved = lambda t: ddnref.linear_solve(a + t * a_dot, b + t * b_dot, **options)[0]
    assert relative(x_dot, numerical_jvp(moved, np.zeros(1), np.ones(1), step=3e-4)) <= 1e-9
    x_bar = random(rng, x.shape, is_complex)
    (a_bar, b_bar), _ = ddnref.linear_solve_vjp(x_bar, x, a, b, **options)
    forward = np.sum(np.conj(x_bar) * x_dot).real
    backward = np.sum(np.conj(a_bar) * a_dot).real + np.sum(np.conj(b_bar) * b_dot).real
    assert abs(forward - backward) <= 1e-12 * np.linalg.norm(x_bar) * np.linalg.norm(x_dot)


@pytest.mark.parametrize("solver", ["direct", "gmres"])
def test_the_jvp_of_one_parameter_and_of_mixed_kinds(solver, rng):
    """A parameter that does not move may be ``None``; real ones, and real right-hand sides, may be beside complex."""
    d, a, b = rng.uniform(1, 2, 6), np.eye(6) + 0.1 * random(rng, (6, 6), True), rng.standard_normal(6)
    operator = operators.compose(operators.diagonal(d), operators.dense(a))
    options = {"solver": solver, "rtol": 1e-13}
    x, _ = ddnref.linear_solve(operator, b, **options)
    d_dot, a_dot, b_dot = rng.standard_normal(6), random(rng, (6, 6), True), rng.standard_normal(6)
    dense, moved = d[:, None] * a, {"d": d_dot[:, None] * a, "a": d[:, None] * a_dot}
    for params_dot, right in (
        ((d_dot, None), -moved["d"] @ x),
        ((None, a_dot), -moved["a"] @ x),
        ((d_dot, a_dot), -(moved["d"] + moved["a"]) @ x),
        ((None, None), 0),
    ):
        for more in ((), (b,)):
            x_dot, _ = ddnref.linear_solve_jvp(params_dot, b_dot, x, operator, *more, **options)
            assert x_dot.dtype == np.complex128
            assert relative(x_dot, np.linalg.solve(dense, b_dot + right)) <= 1e-12
    shared, info = ddnref.linear_solve_jvp(None, b_dot, np.stack([x, x]), operator, **options)
    assert info.converged.shape == (2,)
    assert relative(shared, np.stack(2 * [np.linalg.solve(dense, b_dot)])) <= 1e-12


@pytest.mark.parametrize("name", ["cg", "gmres", "lsmr"])
def test_every_library_gives_the_same_jvp(name, xp, rng):
    """Compiled where it can be, from a batch of parameters and two right-hand sides for each."""
    build, params, _, target = problem(name, rng)
    params = [np.stack([p, 1.1 * p, 0.9 * p]) for p in params]
    dots, (b, b_dot) = [rng.standard_normal(p.shape) for p in params], rng.standard_normal((2, 2, 3, *target))
    count = len(params)

    def both(b_dot, b, *arrays, loop):
        operator = build(*arrays[:count])
        options = {"solver": name, "rtol": 1e-12, "throw": False, "while_loop": loop}
        x, _ = ddnref.linear_solve(operator, b, **options)
        x_dot, info = ddnref.linear_solve_jvp(arrays[count:], b_dot, x, operator, b, **options)
        return x_dot, info.converged

    theirs = xp.jit(partial(both, loop=xp.while_loop))(*map(xp.asarray, (b_dot, b, *params, *dots)))
    x_dot, converged = both(b_dot, b, *params, *dots, loop=None)
    assert np.all(converged)
    assert np.all(xp.numpy(theirs[1]))
    assert relative(xp.numpy(theirs[0]), x_dot) <= 1e-9
    for i in range(3):  # a batch is its items
        alone, _ = both(b_dot[1, i], b[1, i], *(p[i] for p in (*params, *dots)), loop=None)
        assert relative(x_dot[1, i], alone) <= 1e-9


def test_the_jvp_in_single_precision(xp, rng):
    a, b = np.eye(5) + 0.2 * rng.standard_normal((5, 5)), rng.standard_normal(5)
    a_dot, b_dot = rng.standard_normal((5, 5)), rng.standard_normal(5)
    exact = np.linalg.solve(a, b_dot - a_dot @ np.linalg.solve(a, b))
    a, b, a_dot, b_dot = (xp.asarray(y.astype(np.float32)) for y in (a, b, a_dot, b_dot))
    x, _ = ddnref.linear_solve(a, b)
    x_dot = xp.numpy(xp.derivative(ddnref.linear_solve_jvp, a_dot, b_dot, x, a, b)[0])
    assert x_dot.dtype == np.float32
    assert relative(x_dot, exact) <= 1e-5


def test_a_jvp_that_was_not_found_is_nan_alone(xp, rng):
    """A right-hand side that needs more steps, and one that has no solution."""
    d = np.geomspace(1, 1e3, 12)
    operator = operators.diagonal(xp.asarray(d))._replace(self_adjoint=True, positive_definite=True)
    b = np.stack([np.eye(12)[3], np.ones(12), np.full(12, np.nan)])
    x = np.stack([b[0] / d, b[1] / d, b[2]])
    arrays = (None, xp.asarray(np.stack([b[0], b[1], b[0]])), xp.asarray(x), operator)
    x_dot, info = ddnref.linear_solve_jvp(*arrays, maxiter=3, throw=False)
    missing = np.isnan(xp.numpy(x_dot))
    assert missing.all(axis=-1).tolist() == missing.any(axis=-1).tolist() == [False, True, True]
    assert xp.numpy(info.converged).tolist() == [True, False, True]


def test_the_jvp_reads_nothing_on_the_host_without_throw(host_reads, rng):
    strict = backend("array-api-strict")
    a, b = strict.asarray(np.eye(5) + 0.2 * rng.standard_normal((2, 5, 5))), strict.asarray(rng.standard_normal((2, 5)))
    x, _ = ddnref.linear_solve(a, b, throw=False)
    host_reads.clear()
    ddnref.linear_solve_jvp(a, b, x, a, b, throw=False)
    assert host_reads == []


def test_the_jvp_uses_the_solver_that_it_is_given(rng):
    """A differentiable solver makes the derivative differentiable again."""
    a, b = np.eye(4) + 0.1 * rng.standard_normal((4, 4)), rng.standard_normal(4)
    x, calls = np.linalg.solve(a, b), []

    def own(operator, right, /, **options):
        calls.append(right)
        return ddnref.linear_solve(operator, right, **options)

    x_dot, _ = ddnref.linear_solve_jvp(None, b, x, a, solve=own)
    assert len(calls) == 1
    assert relative(x_dot, x) <= 1e-14


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_complex", [False, True])
def test_operators_know_how_they_move(name, is_complex, rng):
    """``params_jvp`` and ``adjoint_jvp`` of every constructor: transposes of its ``params_vjp``, and differences."""
    operator = case(name, is_complex=is_complex)
    x, y = random(rng, operator.domain_shape, is_complex), random(rng, operator.range_shape, is_complex)
    dots = tuple(random(rng, p.shape, np.iscomplexobj(p)) for p in operator.params)
    bars = operator.params_vjp(operator.params, y, x)
    backward = sum(np.sum(np.conj(u) * v).real for u, v in zip(bars, dots, strict=True))
    moved = operator.params_jvp(operator.params, dots, x)
    assert np.sum(np.conj(y) * moved).real == pytest.approx(backward, rel=1e-11, abs=1e-12)
    moved = operator.adjoint_jvp(operator.params, dots, y)
    assert np.sum(np.conj(x) * moved).real == pytest.approx(backward, rel=1e-11, abs=1e-12)


# --- static errors ----------------------------------------------------------------------------------------------


def test_static_errors(rng):
    a, b = np.eye(3), np.ones(3)
    tall, wide = rng.standard_normal((4, 3)), rng.standard_normal((3, 4))
    x = ddnref.linear_solve(tall, np.ones(4))[0]
    with pytest.raises(ValueError, match="solver is 'lu', expected 'cg', 'minres'"):
        ddnref.linear_solve(a, b, solver="lu")
    with pytest.raises(ValueError, match="x0 is given, but the operator is wide"):
        ddnref.linear_solve(wide, b, x0=np.ones(4))
    with pytest.raises(ValueError, match="y0 is given, but the operator is not square"):
        ddnref.linear_solve_vjp(x, x, tall, np.ones(4), y0=np.ones(4))
    with pytest.raises(TypeError, match="b must be given: the operator is tall"):
        ddnref.linear_solve_vjp(x, x, tall)
    with pytest.raises(ValueError, match=r"x_bar has shape \(2,\), expected \(3,\)"):
        ddnref.linear_solve_vjp(np.ones(2), b, a)
    with pytest.raises(TypeError, match="x_bar has dtype float32"):
        ddnref.linear_solve_vjp(b.astype(np.float32), b, a)
    for name, value in (("x0", b), ("preconditioner", lambda r: r), ("maxiter", 3)):
        with pytest.raises(TypeError, match=f'solver "direct" factorises the matrix and takes no {name}'):
            ddnref.linear_solve(a, b, solver="direct", **{name: value})
        np.testing.assert_array_equal(ddnref.linear_solve(a, b, **{name: value})[0], b)
    with pytest.raises(TypeError, match="both None: there is no direction"):
        ddnref.linear_solve_jvp(None, None, b, a)
    with pytest.raises(ValueError, match="params_dot has 2 entries, expected one for each of 1"):
        ddnref.linear_solve_jvp((a, a), None, b, a)
    with pytest.raises(TypeError, match="both None: there is no direction"):
        ddnref.linear_solve_jvp((None,), None, b, a)
    with pytest.raises(TypeError, match=r"params_dot\[0\] has dtype complex128, expected float64"):
        ddnref.linear_solve_jvp(a + 0j, None, b, a)
    with pytest.raises(TypeError, match="b_dot has dtype complex128, expected float64"):
        ddnref.linear_solve_jvp(None, b + 0j, b, a)
    with pytest.raises(TypeError, match="b_dot has dtype complex128, expected float64"):
        ddnref.linear_solve_jvp(None, b + 0j, b, a, b)
    with pytest.raises(ValueError, match=r"b_dot has shape \(2, 3\), expected \(3,\)"):
        ddnref.linear_solve_jvp(None, np.ones((2, 3)), b, a, b)
    with pytest.raises(ValueError, match=r"b_dot has shape \(2, 3\), but the solution belongs to"):
        ddnref.linear_solve_jvp(None, np.ones((2, 3)), b, a)
    with pytest.raises(ValueError, match=r"params_dot\[0\] has shape \(3,\)"):
        ddnref.linear_solve_jvp(b, None, b, a)
    with pytest.raises(TypeError, match="b must be given: the operator is tall"):
        ddnref.linear_solve_jvp(tall, None, x, tall)
    with pytest.raises(ValueError, match="x0 is given, but the operator is not square"):
        ddnref.linear_solve_jvp(tall, None, x, tall, np.ones(4), x0=x)
    with pytest.raises(TypeError, match="has no params_jvp"):
        ddnref.linear_solve_jvp((a,), None, b, operators.dense(a)._replace(params_jvp=None))


@pytest.mark.parametrize("shape", [(3, 5), (4,), (5, 1)])
def test_a_right_hand_side_that_was_not_solved_for(shape, rng):
    a = operators.dense(rng.standard_normal((5, 2)))
    x, _ = ddnref.linear_solve(a, rng.standard_normal(5), rtol=1e-12)
    with pytest.raises(ValueError, match=r"b has shape .* pass the b that was solved for"):
        ddnref.linear_solve_vjp(np.ones(2), x, a, np.ones(shape))
    x, saved = ddnref.solve_fwd(np.eye(5), np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"b has shape .* pass the b that was solved for"):
        ddnref.solve_vjp(x, x, *saved, np.ones(shape))
