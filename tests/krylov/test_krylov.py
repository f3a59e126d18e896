"""The Krylov solvers: what all five promise, on every library."""

import numpy as np
import pytest
from krylov_problems import MATRICES, SOLVERS, TIGHT, definite, diagonal, direct, general, solve, stencil, vectors
from problems import relative

from ddnref import ConvergenceError, krylov
from ddnref.krylov import _system as common
from ddnref.operators import LinearOperator

NAMES = tuple(SOLVERS)
SQUARE = NAMES[:4]
SHORT = {"restart": 12}


# --- the right solution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_complex", [False, True])
def test_agrees_with_dense_solves(name, is_complex, xp, rng):
    """Two operators, three right-hand sides each, one of them zero."""
    a = MATRICES[name](rng, 16, (2,), is_complex)
    b = vectors(rng, (3, 2, a.shape[-2]), is_complex)
    b[1, 0] = 0
    x, info = solve(xp, name, xp.asarray(a), xp.asarray(b), **TIGHT)
    x, expected = xp.numpy(x), direct(a, b)
    assert relative(x, expected) <= 1e-11
    assert np.all(x[1, 0] == 0)
    for field in info:
        assert tuple(field.shape) == (3, 2)
    residual = np.linalg.norm(b - (a @ x[..., None])[..., 0], axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-300)
    np.testing.assert_allclose(xp.numpy(info.residual_norm), residual, rtol=1e-2, atol=1e-15)
    assert np.all(xp.numpy(info.converged))
    assert np.all(xp.numpy(info.status) == common.CONVERGED)
    n_iter = xp.numpy(info.n_iter)
    assert n_iter[1, 0] == 0
    assert np.all(np.delete(n_iter.ravel(), 2) > 4)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision(name, xp, rng):
    a = MATRICES[name](rng, 12)
    b = vectors(rng, (2, a.shape[0]))
    b[1] *= 1e-30  # its square is no float32 any more
    x, info = solve(xp, name, xp.asarray(a.astype(np.float32)), xp.asarray(b.astype(np.float32)), rtol=1e-5)
    for array in (x, info.residual_norm):
        assert xp.numpy(array).dtype == np.float32
    assert np.all(xp.numpy(info.converged))
    assert relative(xp.numpy(x)[0].astype(float), direct(a, b[0])) <= 1e-4
    assert relative(xp.numpy(x)[1].astype(float), direct(a, b[1])) <= 1e-4


@pytest.mark.parametrize("name", SQUARE)
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_recomputed_residuals_meet_the_tolerance(name, condition, rng):
    """For a b that A makes harmless and one that it does not; forward, and adjoint for the reverse."""
    a = definite(rng, 40, condition=condition)
    for tau in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):
        z = rng.standard_normal((2, 40))
        b = np.stack([z[0], a @ z[1]])
        for matrix in (a, a.T):
            x, info = SOLVERS[name](matrix, b, rtol=tau, maxiter=5000)
            residual = np.linalg.norm(b - x @ matrix.T, axis=-1) / np.linalg.norm(b, axis=-1)
            assert np.all(residual <= 1.1 * tau)
            assert np.all(info.converged)
            # twice κ τ is what a gradient through this solve may be off by
            assert np.all(np.linalg.norm(x - direct(a, b), axis=-1) <= 2 * condition * tau * np.linalg.norm(x, axis=-1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("condition", [1e6, 1e9])
def test_ill_conditioned_is_solved_or_reported(name, condition, rng):
    a, b = definite(rng, 40, condition=condition), rng.standard_normal(40)
    x, info = SOLVERS[name](a, b, throw=False)
    residual = np.linalg.norm(b - a @ x) / np.linalg.norm(b)
    assert abs(residual - info.residual_norm) <= 1e-6 * residual + 1e-12
    size = info.normal_residual_norm if name == "lsmr" else residual
    assert bool(info.converged) == (min(size, residual) <= 1.1 * 2.0**-26)
    if not info.converged:
        with pytest.raises(ConvergenceError, match=f"{name} did not converge: 1 of 1 right-hand sides"):
            SOLVERS[name](a, b)
    if name == "cg" and condition == 1e6:
        assert info.converged


# --- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_the_loop_and_the_converged_are_frozen(name, rng):
    """Bit for bit: easy items next to hard ones, and steps after convergence, cost nothing."""
    n = 24
    d = np.stack([np.linspace(1, 1 + spread, n) for spread in (0.01, 1.0, 30.0)])
    b = rng.standard_normal((3, n))
    b[1] *= 1e8
    together = SOLVERS[name](diagonal(d), b, rtol=1e-10)
    for i in range(3):
        alone = SOLVERS[name](diagonal(d[i]), b[i], rtol=1e-10)
        assert np.array_equal(together[1].n_iter[i], alone[1].n_iter)
        if name == "gmres":  # its products with the basis add up in another order
            assert relative(together[0][i], alone[0]) <= 1e-13
        else:
            for whole, part in zip((together[0], *together[1]), (alone[0], *alone[1]), strict=True):
                assert np.array_equal(whole[i], part), name
    n_iter = together[1].n_iter
    assert n_iter[0] < n_iter[1] < n_iter[2]
    seldom = SOLVERS[name](diagonal(d), b, rtol=1e-10, check_every=9)
    for one, other in zip((together[0], *together[1]), (seldom[0], *seldom[1]), strict=True):
        assert np.array_equal(one, other)


def test_a_batch_of_long_vectors_is_the_loop(rng):
    """From 2048 numbers on NumPy's updates go through BLAS, one right-hand side after the other."""
    operator = stencil(rng.uniform(0.1, 0.2, (40, 60)))
    b = rng.standard_normal((2, 3, 40, 60)) * np.asarray([1, 1e-3, 1e4])[:, None, None]
    x, info = krylov.cg(operator, b)
    for i in np.ndindex(2, 3):
        alone, alone_info = krylov.cg(operator, b[i])
        assert np.array_equal(x[i], alone)
        assert info.n_iter[i] == alone_info.n_iter


@pytest.mark.parametrize("name", NAMES)
def test_items_that_are_not_finite_leave_the_others_alone(name, xp, rng):
    """NaN or infinity in a right-hand side or in an operator: the other items come out as they did without."""
    a = MATRICES[name](rng, 12, (6,))
    b = vectors(rng, (6, a.shape[-2]))
    good = SOLVERS[name](a, b, throw=False, **TIGHT)[0]
    b[1, 2], b[2, 0], a[3, 4, 4], a[4, 0, 1] = np.nan, np.inf, np.nan, -np.inf
    x, info = solve(xp, name, xp.asarray(a), xp.asarray(b), **TIGHT)
    x, status = xp.numpy(x), xp.numpy(info.status)
    assert np.all(np.isnan(x[1:5]))
    assert np.all(np.isnan(xp.numpy(info.residual_norm)[1:5]))
    assert list(status) == [0, *[common.NOT_FINITE] * 4, 0]
    assert relative(x[[0, 5]], good[[0, 5]]) <= 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_and_zero_right_hand_sides(name, xp, rng):
    a = xp.asarray(MATRICES[name](rng, 6))
    for batch in ((0,), (2, 0)) if xp.name != "jax" else ():  # nothing to compile for nothing
        x, info = SOLVERS[name](a, xp.asarray(np.zeros((*batch, a.shape[0]))))
        assert tuple(x.shape) == (*batch, 6)
        assert tuple(info.converged.shape) == batch
    b = np.zeros((2, a.shape[0]))
    start = rng.standard_normal((2, 6))
    loop = {"while_loop": xp.while_loop, "throw": False}
    x, info = xp.jit(lambda a, b, start: SOLVERS[name](a, b, x0=start, **loop))(a, xp.asarray(b), xp.asarray(start))
    assert np.all(xp.numpy(x) == 0)
    assert np.all(xp.numpy(info.residual_norm) == 0)
    if xp.name == "numpy":
        x += 1
        assert np.all(b == 0)
        assert not np.any(start == 0)


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_start_limit_and_tolerance_are_used(name, rng):
    a = MATRICES[name](rng, 30)
    b = vectors(rng, (2, a.shape[0]))
    exact = direct(a, b)
    kept = b.copy(), exact.copy()
    x, warm = SOLVERS[name](a, b, x0=exact)
    assert np.all(warm.n_iter == 0)
    assert np.array_equal(x, exact)
    assert not np.shares_memory(x, exact)
    _, near = SOLVERS[name](a, b, x0=exact * (1 + 1e-5))
    _, cold = SOLVERS[name](a, b)
    assert np.all((near.n_iter > 0) & (near.n_iter < cold.n_iter))
    _, loose = SOLVERS[name](a, b, rtol=1e-2)
    assert np.all(loose.n_iter < cold.n_iter)
    _, short = SOLVERS[name](a, b, maxiter=3, throw=False)
    assert np.all(short.n_iter == 3)
    assert np.all(short.status == common.ITERATION_LIMIT)
    with pytest.raises(ConvergenceError, match="2 of 2 right-hand sides reached the iteration limit of 3"):
        SOLVERS[name](a, b, maxiter=3)
    assert np.array_equal(b, kept[0])
    assert np.array_equal(exact, kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_that_are_stated(name, rng):
    from ddnref.krylov._system import default_maxiter

    assert (default_maxiter(3), default_maxiter(50), default_maxiter(10**6)) == (100, 500, 20_000)
    a = MATRICES[name](rng, 30)
    b = vectors(rng, a.shape[:1])
    for dtype, rtol in ((np.float64, 2.0**-26), (np.float32, 2.0**-11.5)):
        stated = SOLVERS[name](a.astype(dtype), b.astype(dtype), rtol=rtol, maxiter=300, check_every=1)
        default = SOLVERS[name](a.astype(dtype), b.astype(dtype))
        assert np.array_equal(stated[0], default[0])


@pytest.mark.parametrize("name", NAMES)
def test_callback_sees_every_look(name, rng):
    a = MATRICES[name](rng, 20)
    b = vectors(rng, (2, a.shape[0]))
    seen = []
    options = SHORT if name == "gmres" else {}
    _, info = SOLVERS[name](a, b, callback=seen.append, check_every=4, **options)
    steps = [progress.step for progress in seen]
    assert steps[:3] == [0, 4, 8]
    assert steps == sorted(steps)
    assert steps[-1] >= np.max(info.n_iter) > steps[-1] - 12
    assert seen[0].residual_norm.shape == (2,)
    assert np.all(seen[0].residual_norm == 1)
    assert np.all(seen[-1].residual_norm < 0.9)
    with pytest.raises(ValueError, match="no callback inside while_loop"):
        SOLVERS[name](a, b, callback=seen.append, while_loop=lambda *_: None)


@pytest.mark.parametrize("name", NAMES)
def test_reads_one_flag_every_so_many_steps(name, host_reads, rng):
    import array_api_strict as strict

    a = definite(rng, 40, condition=100) if name in SQUARE else MATRICES[name](rng, 40)
    a, b = strict.asarray(a), strict.asarray(vectors(rng, (2, a.shape[0])))
    options = {"restart": 40} if name == "gmres" else {}
    for every in (7, 10):
        host_reads.clear()
        _, info = SOLVERS[name](a, b, check_every=every, throw=False, **options)
        reads = len(host_reads)
        steps = int(np.max(np.asarray(info.n_iter)))
        assert steps > 2 * every
        assert reads <= steps // every + 4  # before the first round and after it, before the first step and the last
        host_reads.clear()
        SOLVERS[name](a, b, check_every=every, **options)
        assert len(host_reads) == reads + 1
    if not options:
        host_reads.clear()
        SOLVERS[name](a, b)
        assert len(host_reads) == reads + 1, "ten steps are the default"


@pytest.mark.parametrize("name", SQUARE)
def test_preconditioner_is_used_and_batched(name, xp, rng):
    """The inverse of a badly scaled diagonal, as a function and as an operator, for two operators at once."""
    scale = np.geomspace(1.0, 30.0, 20) * np.asarray([1.0, 3.0])[:, None]
    a = MATRICES[name](rng, 20, (2,)) + np.eye(20) * (2 if name == "cg" else 0)
    self_adjoint = name in ("cg", "minres")
    a = a * scale[..., None] * scale[..., None, :] if self_adjoint else a * scale[..., None]
    d = xp.asarray(scale**-2 if self_adjoint else scale**-1)
    b = vectors(rng, (3, 2, 20))
    m = LinearOperator((d,), lambda p, r: p[0] * r, lambda p, r: p[0] * r, None, (20,), (20,), True, True)
    options = {"rtol": 1e-9, "maxiter": 400}
    _, plain = SOLVERS[name](a, b, throw=False, **options)
    for preconditioner in (m, lambda r: d * r)[: 1 if xp.name == "jax" else 2]:
        x, info = solve(xp, name, xp.asarray(a), xp.asarray(b), preconditioner=preconditioner, **options)
        assert np.all(xp.numpy(info.converged))
        assert np.all(xp.numpy(info.residual_norm) <= 1.1e-9)
        assert np.all(xp.numpy(info.n_iter) < plain.n_iter)
        assert relative(xp.numpy(x), direct(a, b)) <= 1e-7


def test_restart_length_is_used(rng):
    a, b = general(rng, 40), rng.standard_normal(40)
    _, long = krylov.gmres(a, b, restart=40)
    _, short = krylov.gmres(a, b, restart=4)
    assert long.n_iter < short.n_iter
    shift = np.roll(np.eye(8), 1, axis=0)  # nothing is gained before step 8
    assert krylov.gmres(shift, np.eye(8)[0], restart=8)[1].n_iter == 8
    assert krylov.gmres(shift, np.eye(8)[0], restart=50)[1].n_iter == 8
    for length in (1, 7):
        _, info = krylov.gmres(shift, np.eye(8)[0], restart=length, throw=False)
        assert info.status == common.STAGNATION
    with pytest.raises(ValueError, match="restart is 0"):
        krylov.gmres(a, b, restart=0)


def test_long_vectors_go_through_a_product_a_few_at_a_time(rng):
    """Each vector's solution is as if it were alone; short vectors, or those of a batched operator, go all at once."""
    sizes = []

    def apply(params, x):
        sizes.append(x.shape)
        return params[0] * x

    def solve(w, b, shape):
        sizes.clear()
        a = LinearOperator((w,), apply, apply, None, shape, shape, self_adjoint=True)
        return krylov.cg(a, b, rtol=1e-12)[0]

    shape = (96, 128)
    w, b = rng.uniform(1.0, 2.0, shape), rng.standard_normal((7, 3, *shape))
    x = solve(w, b, shape)
    assert x.shape == b.shape
    assert relative(x, b / w) <= 1e-12
    assert {s[0] for s in sizes if len(s) == 3} == {1, 5}
    assert np.array_equal(x[6, 2], solve(w, b[6, 2], shape))
    w = rng.uniform(1.0, 2.0, (3, *shape))
    assert relative(solve(w, b, shape), b / w) <= 1e-12
    assert (7, 3, *shape) in sizes
    w, b = rng.uniform(1.0, 2.0, 30), rng.standard_normal((500, 30))
    assert relative(solve(w, b, (30,)), b / w) <= 1e-12
    assert (500, 30) in sizes


# --- what is in the way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_may_reuse_its_buffer_or_return_its_input(name, rng):
    d, b = np.linspace(1.0, 2.0, 3000), rng.standard_normal(3000)
    x, _ = SOLVERS[name](diagonal(d), b, **TIGHT)
    assert relative(x, b / d) <= 1e-11
    identity = LinearOperator((d,), lambda p, x: x, lambda p, x: x, None, (3000,), (3000,), self_adjoint=True)
    x, info = SOLVERS[name](identity, b, preconditioner=lambda r: r) if name != "lsmr" else krylov.lsmr(identity, b)
    assert relative(x, b) <= 1e-14
    assert info.n_iter == 1
    assert not np.shares_memory(x, b)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_of_any_shape(name, xp, rng):
    """Images as vectors, and vectors without an axis."""

    def images(w, b):
        a = LinearOperator((w,), lambda p, x: p[0] * x, lambda p, x: p[0] * x, None, shape, shape, self_adjoint=True)
        return SOLVERS[name](a, b, throw=False, while_loop=xp.while_loop, **TIGHT)

    for shape in ((4, 6), ())[: 1 if xp.name == "jax" else 2]:
        w, b = rng.uniform(1.0, 2.0, shape), rng.standard_normal((3, *shape))
        x, info = xp.jit(images)(xp.asarray(w), xp.asarray(b))
        assert tuple(info.status.shape) == (3,)
        assert tuple(x.shape) == b.shape
        assert relative(xp.numpy(x), b / w) <= 1e-11
