"""Errors of ``linear_solve`` and ``lsmr``: least squares in hard cases, estimates, scales, real and complex."""

from functools import partial

import numpy as np
import pytest
from estimates._systems import exact, least_squares_system, with_values
from problems import relative

import ddnref
from ddnref import krylov, operators

EPS = {np.float64: 2.0**-52, np.float32: 2.0**-23}


def polynomial(degree, dtype, points=50):
    t = np.linspace(0.0, 1.0, points)
    return np.vander(t, degree + 1).astype(dtype), np.sin(3 * t).astype(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("degree", "dtype", "limit"), [(4, np.float32, 2e-5), (5, np.float32, 2e-5), (8, np.float64, 2e-10)]
)
def test_polynomial_fits(degree, dtype, limit, transposed, xp, rng):
    """Condition 600 and more; a default call was 75 % off in single precision, and its gradient 98 %."""
    a, b = polynomial(degree, dtype)
    if transposed:
        a, b = np.ascontiguousarray(a.T), a.T @ b
    x_bar = rng.standard_normal(a.shape[1]).astype(dtype)
    x, a_bar = exact(a, b, x_bar)
    found, info = ddnref.linear_solve(xp.asarray(a), xp.asarray(b))
    (bar, _), more = ddnref.linear_solve_vjp(xp.asarray(x_bar), found, xp.asarray(a), xp.asarray(b))
    rounding = 8 * float(info.condition) * EPS[dtype]
    assert relative(xp.numpy(found), x) <= (rounding if transposed else limit)
    assert relative(xp.numpy(bar), a_bar) <= rounding <= 4e-3
    assert relative(xp.numpy(found), x) / 2 <= float(info.error) <= rounding
    assert relative(xp.numpy(bar), a_bar) / 4 <= float(more.error) <= rounding  # XLA rounds more than BLAS


def test_a_polynomial_fit_by_iteration():
    a, b = polynomial(4, np.float32)
    x, info = krylov.lsmr(a, b)
    assert relative(x, exact(a, b, x)[0]) <= info.error <= 2.0**-11.5


@pytest.mark.parametrize("factor", [1e-24, 1e24])
@pytest.mark.parametrize("name", ["lsmr", "direct", "minres", "gmres", "bicgstab"])
def test_no_scale_is_out_of_range(name, factor, xp, rng):
    """Squares of these numbers are no float32: x was 0 and converged."""
    square = name not in ("lsmr", "direct")
    a = rng.standard_normal((5, 5) if square else (20, 5))
    a = a + a.T + 8 * np.eye(5) if square else a
    b = rng.standard_normal(len(a)).astype(np.float32)
    scaled = (a * factor).astype(np.float32)
    options = {"solver": name, "rtol": 1e-5, "throw": False, "while_loop": xp.while_loop}
    x, info = xp.jit(partial(ddnref.linear_solve, **options))(xp.asarray(scaled), xp.asarray(b))
    assert bool(info.converged)
    assert relative(xp.numpy(x).astype(float) * factor, np.linalg.pinv(a) @ b) <= 1e-4
    bar = np.full(5, 1e-20 if factor < 1 else 1e20, dtype=np.float32)  # so that the gradient is in range
    solve = xp.jit(partial(ddnref.linear_solve_vjp, **options))
    (a_bar, _), _ = solve(xp.asarray(bar), x, xp.asarray(scaled), xp.asarray(b))
    (expected, _), _ = ddnref.linear_solve_vjp(np.ones(5), np.linalg.pinv(a) @ b, a, b.astype(float), rtol=1e-12)
    assert relative(xp.numpy(a_bar).astype(float) * factor**2 / float(bar[0]), expected) <= 1e-4


def test_condition_numbers_and_tolerances():
    """A condition is right to a factor, and an iteration that has converged leaves no larger error than `rtol`."""
    unconverged = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        a = with_values(rng, 6, 6, np.geomspace(1, 10 ** rng.uniform(-11, 0), 6))
        _, info = ddnref.linear_solve(a, rng.standard_normal(6))
        assert 0.1 <= info.condition / np.linalg.cond(a) <= 10
        (m, n), rtol = ((40, 20), (20, 40))[seed % 2], (None, 1e-5)[seed // 40]
        a, b = least_squares_system(rng, seed % 4, m, n, np.float64)
        x, info = krylov.lsmr(a, b, rtol=rtol, maxiter=1000, throw=False)
        unconverged += not info.converged
        if info.converged:
            assert relative(x, np.linalg.pinv(a) @ b) <= 1.1 * (rtol or 2.0**-26)
            assert 0.6 <= info.condition / np.linalg.cond(a) <= 1.7
    assert unconverged <= 8


@pytest.mark.parametrize("name", ["cg", "minres", "gmres", "bicgstab"])
def test_the_error_of_an_iteration_on_request(name, rng):
    """Half of the true error or more; a tenth where that is rounding, which docs/estimates.md does not count."""
    ratios, above_rounding = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        condition = 10 ** rng.uniform(0.5, 3)
        q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
        w = np.geomspace(1, condition, 30)
        a = operators.dense((q * w) @ q.T, self_adjoint=name in ("cg", "minres"))
        b, x_bar = rng.standard_normal((2, 30))
        options = {"solver": name, "rtol": 1e-8, "maxiter": 2000}
        plain = ddnref.linear_solve(a, b, **options)[1]
        assert np.isinf(plain.error)
        assert np.isinf(plain.condition)
        x, info = ddnref.linear_solve(a, b, estimate_error=True, **options)
        ((a_bar,), _), more = ddnref.linear_solve_vjp(x_bar, x, a, b, estimate_error=True, **options)
        for said in (info, more) if name in ("cg", "minres") else ():
            assert 0.2 <= said.condition / condition <= 2.1
        right = (q / w) @ q.T @ b, -np.outer((q / w) @ q.T @ x_bar, (q / w) @ q.T @ b)
        errors = np.asarray([relative(x, right[0]), relative(a_bar, right[1])])
        ratios += [np.asarray([info.error, more.error]) / errors]
        above_rounding += [errors > 100 * np.finfo(float).eps]
    assert np.min(ratios) >= 0.1
    assert np.min(np.where(above_rounding, ratios, 1)) >= 0.5
    assert np.sum(above_rounding) >= 6
    assert np.median(ratios) <= 10
    with pytest.raises(TypeError, match="b must be given: with estimate_error=True"):
        ddnref.linear_solve_vjp(x_bar, x, a, estimate_error=True, **options)


def test_dependent_columns_are_refused_and_the_shortest_solution_is_had_on_request(xp, rng):
    a = rng.standard_normal((3, 7, 4))
    a[1, :, 3] = a[1, :, 0] - 2 * a[1, :, 1]
    a[2] *= np.asarray([1e-9, 1.0, 1e9, 1e30])  # graded, but regular
    b = rng.standard_normal((3, 7))
    for matrix, right in ((a, b), (np.swapaxes(a, 1, 2), b[:, :4])):
        with pytest.raises(ddnref.SingularError, match="singular"):
            ddnref.linear_solve(xp.asarray(matrix), xp.asarray(right))
        x, info = ddnref.linear_solve(xp.asarray(matrix), xp.asarray(right), throw=False)
        assert xp.numpy(info.converged).tolist() == [True, False, True]
        assert np.isnan(xp.numpy(x)).all(axis=-1).tolist() == [False, True, False]
    shortest, _ = ddnref.linear_solve(xp.asarray(a[1]), xp.asarray(b[1]), solver="lsmr", throw=False)
    assert relative(xp.numpy(shortest), np.linalg.pinv(a[1]) @ b[1]) <= 1e-8


def test_direct_least_squares_reads_nothing_and_leaves_other_items_alone(host_reads, rng):
    import array_api_strict as strict

    a, b = rng.standard_normal((3, 6, 4)), rng.standard_normal((2, 3, 6))
    expected = np.einsum("kij,lkj->lki", np.linalg.pinv(a), b)
    b[1, 0, 2], a[2, 1, 1] = np.nan, np.inf
    host_reads.clear()
    x, info = ddnref.linear_solve(strict.asarray(a), strict.asarray(b), throw=False)
    ddnref.linear_solve_vjp(x, x, strict.asarray(a), strict.asarray(b), throw=False)
    assert not host_reads
    x, bad = np.asarray(x), np.asarray([[False, False, True], [True, False, True]])
    assert np.array_equal(np.isnan(x).all(axis=-1), bad)
    assert np.array_equal(np.asarray(info.status) == 5, bad)
    assert relative(x[~bad], expected[~bad]) <= 1e-13


# --- damping, preconditioners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
@pytest.mark.parametrize("form", ["matrix", "operator"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_damped_least_squares(shape, form, is_complex, rng):
    draw = lambda *s: rng.standard_normal(s) + (1j * rng.standard_normal(s) if is_complex else 0)
    (m, n), weight = shape, 0.3
    a, b, x_bar = draw(m, n), draw(2, m), draw(2, n)
    h = a.conj().T @ a + weight * np.eye(n)
    x, u = np.linalg.solve(h, a.conj().T @ b.T).T, np.linalg.solve(h, x_bar.T).T
    y = u @ a.T
    expected = (b - x @ a.T).T @ u.conj() - y.T @ x.conj()
    operator = a if form == "matrix" else operators.dense(a)
    options = {"damping": weight, "rtol": 1e-12}
    found, info = ddnref.linear_solve(operator, b, **options)
    (bar, b_bar), _ = ddnref.linear_solve_vjp(x_bar, found, operator, b, **options)
    assert np.all(info.converged)
    assert relative(found, x) <= 1e-12
    assert relative(b_bar, y) <= 1e-12
    assert relative(bar if form == "matrix" else bar[0], expected) <= 1e-12
    a_dot = draw(m, n)
    x_dot, _ = ddnref.linear_solve_jvp(a_dot if form == "matrix" else (a_dot,), None, found, operator, b, **options)
    assert np.sum(x_bar.conj() * x_dot).real == pytest.approx(np.sum(expected.conj() * a_dot).real, rel=1e-11)
    for value, kind in ((-1, ValueError), (np.inf, ValueError), (None, TypeError), ("x", TypeError)):
        for solver in (ddnref.linear_solve, krylov.lsmr):
            with pytest.raises(kind, match=f"damping is {value!r}"):
                solver(operator, b, damping=value)


def test_a_preconditioner_of_least_squares(xp, rng):
    """Columns of very different lengths, which a diagonal from the right cures; the gradient is that without it."""
    d = np.geomspace(1, 1e3, 15)
    a, b, x_bar = rng.standard_normal((40, 15)) * d, rng.standard_normal((2, 40)), rng.standard_normal((2, 15))
    x, z = b @ np.linalg.pinv(a).T, x_bar @ np.linalg.inv(a.T @ a)
    expected = (b - x @ a.T).T @ z - (z @ a.T).T @ x
    arrays = tuple(map(xp.asarray, (a, b, x_bar, 1 / d)))
    options = {"solver": "lsmr", "rtol": 1e-11, "while_loop": xp.while_loop, "throw": False}

    def both(a, b, x_bar, inverse, kind):
        m = {"operator": {"preconditioner": operators.diagonal(inverse)},
             "function": dict.fromkeys(("preconditioner", "preconditioner_adjoint"), lambda r: r * inverse),
             "none": {}}[kind]  # fmt: skip
        x, info = ddnref.linear_solve(operators.dense(a), b, **options, **m)
        ((a_bar,), _), more = ddnref.linear_solve_vjp(x_bar, x, operators.dense(a), b, **options, **m)
        return x, a_bar, info.n_iter, more.n_iter

    steps = {}
    for kind in ("operator", "function", "none")[: 1 if xp.name == "jax" else 3]:
        found, a_bar, *counts = xp.jit(partial(both, kind=kind))(*arrays)
        assert relative(xp.numpy(found), x) <= 1e-10
        assert relative(xp.numpy(a_bar), expected) <= 1e-9
        steps[kind] = sum(int(np.max(xp.numpy(count))) for count in counts)
    assert xp.name == "jax" or steps["operator"] == steps["function"] < steps["none"] / 2


def test_preconditioners_of_least_squares_that_cannot_be_used(rng):
    a, b = rng.standard_normal((6, 3)), np.ones(6)
    m = operators.diagonal(np.ones(3))
    with pytest.raises(ValueError, match="the operator is wide"):
        krylov.lsmr(a.T, np.ones(3), preconditioner=operators.diagonal(np.ones(6)))
    with pytest.raises(TypeError, match="LSMR needs its adjoint too: pass preconditioner_adjoint="):
        krylov.lsmr(a, b, preconditioner=lambda r: r)
    with pytest.raises(ValueError, match="x0 and preconditioner are both given"):
        krylov.lsmr(a, b, preconditioner=m, x0=np.ones(3))
    with pytest.raises(ValueError, match=r"preconditioner maps \(6,\) to \(6,\), expected \(3,\) to itself"):
        krylov.lsmr(a, b, preconditioner=operators.diagonal(np.ones(6)))


@pytest.mark.parametrize("name", ["gmres", "bicgstab"])
@pytest.mark.parametrize("kind", ["operator", "pair", "alone"])
def test_the_adjoint_system_takes_the_adjoint_preconditioner(name, kind, xp):
    """Convection with an exact factor of most of it: as few steps back as forth; unchanged, M does not help."""
    n = 60
    a = np.diag(np.full(n, 1.0)) + np.diag(np.full(n - 1, -0.97), -1)
    m = np.linalg.inv(a)
    a = a + 0.02 * np.random.default_rng(0).standard_normal((n, n)) / n**0.5
    b, x_bar = np.random.default_rng(1).standard_normal((2, n))
    m, m_t = xp.asarray(m), xp.asarray(np.ascontiguousarray(m.T))
    option = {
        "operator": {"preconditioner": operators.dense(m)},
        "pair": {"preconditioner": lambda r: r @ m_t, "preconditioner_adjoint": lambda r: r @ m},
        "alone": {"preconditioner": lambda r: r @ m_t},
    }[kind]
    options = {"solver": name, "rtol": 1e-10, "maxiter": 30, "while_loop": xp.while_loop, "throw": False}

    def both(a, b, x_bar):
        operator = operators.dense(a)
        x, info = ddnref.linear_solve(operator, b, **options, **option)
        (_, b_bar), more = ddnref.linear_solve_vjp(x_bar, x, operator, b, **options, **option)
        return b_bar, info.n_iter, more.n_iter, more.converged

    b_bar, forth, back, converged = xp.jit(both)(*map(xp.asarray, (a, b, x_bar)))
    if kind == "alone":
        assert not bool(converged)
        if xp.name == "numpy":
            x, _ = ddnref.linear_solve(operators.dense(a), b, solver=name, **option)
            with pytest.raises(ddnref.ConvergenceError, match="pass preconditioner_adjoint=, or a LinearOperator"):
                ddnref.linear_solve_vjp(x_bar, x, operators.dense(a), b, solver=name, maxiter=30, **option)
    else:
        assert bool(converged)
        assert int(back) <= int(forth) + 3 <= 15
        assert relative(xp.numpy(b_bar), np.linalg.solve(a.T, x_bar)) <= 1e-8


# --- real and complex -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["direct", "gmres", "bicgstab", "lsmr", "cg", "minres", "tall", "wide", "lsmr, tall"])
@pytest.mark.parametrize("which", ["A", "b"])
def test_real_and_complex_go_together(name, which, xp, rng):
    """The solution is complex if either is; a real input has a real gradient, the real part of the complex one."""
    m, n = {"tall": (9, 6), "lsmr, tall": (9, 6), "wide": (6, 9)}.get(name, (6, 6))
    a, b = rng.standard_normal((m, n)), rng.standard_normal((2, m))
    if name in ("cg", "minres"):
        a = a @ a.T + np.eye(6)
    solver = {"tall": None, "wide": None, "lsmr, tall": "lsmr"}.get(name, name)
    if which == "A":
        skew = rng.standard_normal((m, n))
        a = a + 1j * (skew - skew.T if m == n else skew)
        a = a + 6 * np.eye(6) if m == n else a
    else:
        a, b = (a + 6 * np.eye(6) if m == n else a), b + 1j * rng.standard_normal((2, m))
    x_bar = rng.standard_normal((2, n)) + 1j * rng.standard_normal((2, n))
    options = {"solver": solver, "rtol": 1e-11, "throw": False, "while_loop": xp.while_loop}

    def both(a, b, x_bar):
        x, _ = ddnref.linear_solve(a, b, **options)
        return x, *ddnref.linear_solve_vjp(x_bar, x, a, b, **options)[0]

    run = xp.jit(both)
    found = tuple(map(xp.numpy, run(*map(xp.asarray, (a, b, x_bar)))))
    whole = tuple(map(xp.numpy, run(*map(xp.asarray, (a + 0j, b + 0j, x_bar)))))
    assert relative(found[0], b @ np.linalg.pinv(a).T) <= 1e-9
    for bar, complex_bar, like in zip(found[1:], whole[1:], (a, b), strict=True):
        assert bar.dtype == like.dtype
        assert relative(bar, complex_bar if np.iscomplexobj(like) else complex_bar.real) <= 1e-9


@pytest.mark.parametrize("which", ["a", "b"])
def test_solve_of_real_and_complex(which, xp, rng):
    a, b = rng.standard_normal((2, 4, 4)), rng.standard_normal((3, 2, 4))
    a, b = (a + 1j * a[::-1], b) if which == "a" else (a, b + 1j * b[::-1])
    x_bar = b[::-1] + 1j * rng.standard_normal(b.shape)
    x, saved = ddnref.solve_fwd(*map(xp.asarray, (a, b)))
    whole, whole_saved = ddnref.solve_fwd(xp.asarray(a + 0j), xp.asarray(b + 0j))
    assert relative(xp.numpy(x), xp.numpy(whole)) <= 1e-13
    bars = ddnref.solve_vjp(xp.asarray(x_bar), x, *saved, xp.asarray(b))
    whole_bars = ddnref.solve_vjp(xp.asarray(x_bar), whole, *whole_saved, xp.asarray(b + 0j))
    for bar, complex_bar, like in zip(bars, whole_bars, (a, b), strict=True):
        bar, complex_bar = xp.numpy(bar), xp.numpy(complex_bar)
        assert bar.dtype == like.dtype
        assert relative(bar, complex_bar if np.iscomplexobj(like) else complex_bar.real) <= 1e-12
