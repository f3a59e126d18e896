"""Power and simultaneous iteration and their derivatives: what is special about them beyond the table of rules."""

from functools import partial

import numpy as np
import pytest
from estimates._iterations import exact, non_normal
from problems import relative, rotation, symmetric, with_spectrum

import ddnref
from ddnref.testing import assert_vjp, check_vjp, numerical_jvp

SPECTRUM = np.asarray([-3.0, 1.4, -0.6, 0.2, 0.1, -0.05, 0.02])  # converges within forty steps
METHODS = ("bordered", "fixed_point", "unrolled")


def matrix(rng, batch=(), is_symmetric=True, spectrum=SPECTRUM):
    """A matrix with that spectrum, its eigenvectors orthogonal or not."""
    q = rotation(rng, len(spectrum), batch)
    if is_symmetric:
        return with_spectrum(q, spectrum)
    basis = q + 0.2 * rng.standard_normal(q.shape) / len(spectrum) ** 0.5
    return (basis * spectrum) @ np.linalg.inv(basis)


def dominant(x, n):
    """By NumPy: real eigenpairs, largest magnitude first, first components positive."""
    w, v = np.linalg.eig(x)
    assert np.all(np.isreal(w))
    order = np.argsort(-np.abs(w), axis=-1)[..., :n]
    w = np.take_along_axis(w.real, order, axis=-1)
    return w, ddnref.align_signs(np.take_along_axis(v.real, order[..., None, :], axis=-1))


# --- forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_pairs_agree_with_eig(is_symmetric, batch, xp, rng):
    x = matrix(rng, batch, is_symmetric)
    w, v = dominant(x, 3)
    loop = {"symmetric": is_symmetric, "while_loop": xp.while_loop, "throw": xp.name != "jax"}  # compiled, none can be
    (w_1, v_1), info = xp.lift(partial(ddnref.power_iteration, **loop))(x)
    assert relative(w_1, w[..., 0]) <= 1e-13
    assert relative(v_1, v[..., 0]) <= 1e-12
    assert np.all(info.converged)
    assert info.n_iter.shape == batch
    (w_3, v_3), info = xp.lift(partial(ddnref.simultaneous_iteration, n=3, **loop))(x)
    assert relative(w_3, w) <= 1e-13
    assert relative(v_3, v) <= 1e-12
    assert np.all(info.residual_norm <= (16 + 7**0.5) * np.finfo(float).eps)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e10, 1e25])
def test_any_scale_in_single_precision(scale, rng):
    x = matrix(rng, (2,), False)
    for solve in (ddnref.power_iteration, partial(ddnref.simultaneous_iteration, n=2)):
        (w, v), _ = solve(x.astype(np.float32))
        (w_s, v_s), _ = solve((scale * x).astype(np.float32))
        assert w_s.dtype == v_s.dtype == np.float32
        assert relative(w_s.astype(np.float64), scale * w.astype(np.float64)) <= 1e-6
        assert relative(v_s, v) <= 2e-6


def test_symmetric_option_symmetrises(rng):
    x = matrix(rng, (), False) + np.triu(np.ones((7, 7)))
    for solve in (ddnref.power_iteration, partial(ddnref.simultaneous_iteration, n=2)):
        (w, v), _ = solve(x, symmetric=True)
        (w_s, v_s), _ = solve((x + x.T) / 2, symmetric=True)
        assert np.array_equal(w, w_s)
        assert np.array_equal(v, v_s)


def test_repeated_eigenvalues_among_the_wanted_cost_no_steps(rng):
    x = matrix(rng, (), True, np.asarray([2.0, 2.0, 1.999, 0.5, 0.1, 0.1]))
    (w, v), info = ddnref.simultaneous_iteration(x, 3, symmetric=True)
    assert relative(w, np.asarray([2.0, 2.0, 1.999])) <= 1e-14
    assert np.all(ddnref.eigen_residual(x, w, v) <= 1e-14)
    assert info.n_iter < 40


def test_signs(rng):
    x = matrix(rng, (3,))
    reference = rng.standard_normal(7)
    (_, v), _ = ddnref.power_iteration(x, align="negative", reference=reference)
    assert np.all(v @ reference < 0)
    (_, v), _ = ddnref.simultaneous_iteration(x, 2, align="positive", reference=-v[..., None])
    assert np.all(np.sum(v * -v, axis=-2) < 0)
    columns = rng.standard_normal((3, 7, 2))
    (_, v), _ = ddnref.simultaneous_iteration(x, 2, reference=columns)
    assert np.all(np.sum(v * columns, axis=-2) > 0)
    (_, free), _ = ddnref.power_iteration(x, v0=rng.standard_normal(7), align=None)
    (_, flipped), _ = ddnref.power_iteration(x, v0=-np.random.default_rng(20).standard_normal(7), align=None)
    assert free.shape == flipped.shape
    (_, a), _ = ddnref.power_iteration(x, v0=reference, align=None)
    (_, b), _ = ddnref.power_iteration(x, v0=-reference, align=None)
    assert np.array_equal(a, -b)


def test_start_and_limit_and_tolerance_are_used(rng):
    x = matrix(rng, (2,))
    (_, v), cold = ddnref.power_iteration(x)
    _, warm = ddnref.power_iteration(x, v0=v)
    assert np.all(warm.n_iter == 1)
    assert np.all(cold.n_iter > 10)
    _, loose = ddnref.power_iteration(x, rtol=1e-3)
    assert np.all(loose.n_iter < cold.n_iter)
    assert np.all((loose.residual_norm <= 1e-3) & (loose.residual_norm > 1e-6))
    _, short = ddnref.power_iteration(x, maxiter=3, throw=False)
    assert np.all(short.n_iter == 3)
    assert not np.any(short.converged)
    for solve in (ddnref.power_iteration, partial(ddnref.simultaneous_iteration, n=2)):
        seldom, often = (solve(x, check_every=every) for every in (50, 1))
        assert all(np.array_equal(a, b) for a, b in zip(seldom[0], often[0], strict=True)), "frozen items moved"
        assert np.array_equal(seldom[1].n_iter, often[1].n_iter)
    (_, pair), cold = ddnref.simultaneous_iteration(x, 2)
    assert np.all(ddnref.simultaneous_iteration(x, 2, v0=pair)[1].n_iter < cold.n_iter / 4)


@pytest.mark.framework("jax")
def test_under_jit_with_jax_loop(rng):
    from conftest import backend

    jax_backend = backend("jax")
    import jax

    x = matrix(rng, (2,))
    solve = jax.jit(partial(ddnref.power_iteration, while_loop=jax.lax.while_loop, throw=False))
    (w, v), info = solve(jax_backend.asarray(x))
    (w_n, v_n), info_n = ddnref.power_iteration(x)
    assert relative(np.asarray(w), w_n) <= 1e-14
    assert relative(np.asarray(v), v_n) <= 1e-13
    assert np.array_equal(info.converged, info_n.converged)


def test_reads_one_flag_every_so_many_steps(host_reads, rng):
    import array_api_strict as strict

    x = strict.asarray(matrix(rng, (2,)))
    for solve in (ddnref.power_iteration, partial(ddnref.simultaneous_iteration, n=2)):
        host_reads.clear()
        _, info = solve(x, check_every=7, throw=False)
        reads = len(host_reads)
        steps = int(np.max(np.asarray(info.n_iter)))
        assert reads <= steps // 7 + 2
        host_reads.clear()
        solve(x, check_every=7)
        assert len(host_reads) == reads + 1
    (w, v), _ = ddnref.power_iteration(x)
    host_reads.clear()
    ddnref.power_iteration_vjp(w, v, w, v, x, throw=False)
    assert host_reads == []
    ddnref.power_iteration_vjp(w, v, w, v, x)
    assert len(host_reads) == 1


# --- matrices that are not normal -----------------------------------------------------------------------------------


def vjp_of_value(w_bar, w, v, x, **options):
    """The cotangent of a matrix for a loss of its eigenvalue alone, always the same function, which compiles once."""
    return ddnref.power_iteration_vjp(w_bar, None, w, v, x, **options)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("s", [1e3, 1e6, 1e12, 1e16, 1e30])
def test_a_triangular_matrix_has_its_diagonal(s, dtype, xp):
    """Before balancing, s = 1e6 gave 1.506 and 0.994, and called them converged."""
    x, eps = np.asarray([[1.0, s], [0.0, 1.5]], dtype=dtype), np.finfo(dtype).eps
    loop = {"while_loop": xp.while_loop, "throw": xp.name != "jax"}
    (w, v), info = xp.lift(partial(ddnref.simultaneous_iteration, n=2, **loop))(x)
    assert relative(w.astype(np.float64), np.asarray([1.5, 1.0])) <= 2 * eps
    assert np.all(info.error <= 4 * eps)
    vectors = np.asarray([[1.0, 1.0], [0.5 / s, 0.0]])
    vectors = vectors / np.linalg.norm(vectors, axis=0)
    assert np.all(np.abs(v - vectors) <= 1e3 * eps * vectors + eps / s)  # entry by entry
    (w, v), info = xp.lift(partial(ddnref.power_iteration, **loop))(x)
    assert abs(w - 1.5) <= 2 * eps
    assert info.error <= 4 * eps
    # ∂λ/∂X = u vᵀ with u = (0, 1 / v_2)
    expected = np.asarray([[0.0, 0.0], [2 * s, 1.0]])
    for method in METHODS[:2]:
        got = xp.lift(partial(vjp_of_value, method=method, throw=False))(np.ones((), dtype), w, v, x)
        assert relative(got, expected) <= 1e4 * eps, method


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_units_of_the_variables_do_not_matter(dtype, rng):
    """``D⁻¹XD`` has the eigenvalues of X; without balancing all digits were lost at 1e6."""
    x = matrix(rng, (), False)
    w, _ = dominant(x, 3)
    for unit in (1e2, 1e4, 1e6):
        d = unit ** np.linspace(-1, 1, 7)
        (got, _), info = ddnref.simultaneous_iteration((x / d[:, None] * d).astype(dtype), 3)
        assert relative(got, w) <= 50 * np.finfo(dtype).eps
        assert np.all(info.error <= 1e3 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_converged_eigenvalues_meet_the_tolerance(dtype):
    """The tolerance is relative to the largest eigenvalue, and holds for matrices that are far from normal."""
    rng, eps, converged = np.random.default_rng(16), np.finfo(dtype).eps, []
    for trial in range(40):
        x = non_normal(rng, dtype)
        right = exact(x)
        options = {"rtol": 1e3 * eps**0.7} if trial % 3 == 0 else {}
        (w, _), info = ddnref.simultaneous_iteration(x, 1 + trial % len(x), throw=False, **options)
        converged.append(bool(info.converged))
        if info.converged:
            tolerance = options.get("rtol", 1e-12 if dtype == np.float64 else 3e-6)
            assert np.max(np.abs(w - right[: len(w)])) <= 2 * tolerance * abs(right[0])
    assert np.mean(converged) >= 0.75


def test_an_eigenvalue_that_is_nothing_but_error_has_no_finite_estimate():
    """The error is relative to the eigenvalue, not to the much larger number that was found in its place."""
    for seed in range(40):
        x = non_normal(np.random.default_rng(seed), np.float32)
        (w, _), info = ddnref.power_iteration(x, throw=False)
        wrong = abs(w - exact(x)[0])
        assert info.error >= 0.1 * wrong / abs(exact(x)[0]) or wrong <= 1e-5 * abs(w)


def test_what_rounding_does_not_allow_is_refused():
    """Rotated, so that no scaling helps: NumPy's `eigvals` is as wrong, and says nothing."""
    q = np.asarray([[0.8, -0.6], [0.6, 0.8]])
    x = q @ np.asarray([[1.0, 1e6], [0.0, 1.5]]) @ q.T
    with pytest.raises(ddnref.ConvergenceError, match=r"an eigenvalue may be off by .* far from normal"):
        ddnref.power_iteration(x)
    (w, _), info = ddnref.power_iteration(x, throw=False)
    assert not info.converged
    assert info.error >= 1e-6
    assert ddnref.power_iteration(x, rtol=1e-2)[1].converged
    # equal eigenvalues: independent vectors or none
    (w, _), info = ddnref.simultaneous_iteration(np.diag([2.0, 2.0, 1.0]) + np.diag([0.0, 1e-3], k=1), 2)
    np.testing.assert_allclose(w, 2, rtol=1e-13)
    assert np.all(info.error <= 1e-13)
    (w, _), info = ddnref.simultaneous_iteration(q @ np.asarray([[1.0, 1.0], [0.0, 1.0]]) @ q.T, 2, throw=False)
    assert np.all(np.abs(w - 1) <= 2 * info.error)
    assert not info.converged


def test_a_looser_tolerance_takes_fewer_steps(rng):
    x = matrix(rng, (2,), False)
    _, exact = ddnref.power_iteration(x)
    for rtol in (1e-3, 1e-7):
        _, info = ddnref.power_iteration(x, rtol=rtol)
        assert np.all(info.n_iter < 0.8 * exact.n_iter)
        assert np.all((info.error <= rtol) & (info.error > 1e-12))


# --- VJP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_finite_differences(method, is_symmetric, n, xp, rng):
    x = matrix(rng, (2,), is_symmetric)
    given = {"symmetric": is_symmetric}
    loop = {"while_loop": xp.while_loop, "maxiter": 6 if method == "unrolled" else 1000}
    if n == 1:
        forward, vjp = ddnref.power_iteration, ddnref.power_iteration_vjp
    else:
        forward, vjp = partial(ddnref.simultaneous_iteration, n=n), ddnref.simultaneous_iteration_vjp
    if method == "unrolled":
        given["n_iter"] = 6
        if n > 1 and not is_symmetric:
            with pytest.raises(ValueError, match="needs symmetric=True"):
                vjp(*forward(x)[0], *forward(x)[0], x, method=method, n_iter=1)
            return
    report = assert_vjp(
        xp.lift(lambda x: forward(x, symmetric=is_symmetric, throw=False, **loop)[0]),
        xp.lift(partial(vjp, method=method, throw=False, **given)),
        x,
        needs=(0,),
        gap=0.5,
        symmetrises=is_symmetric,
        tangent="symmetric" if is_symmetric else "dense",
        directions=3 if xp.name == "numpy" else 1,
    )
    assert report.error <= 1e-9, report


@pytest.mark.parametrize("sign", [1, -1])
def test_dominant_eigenvalue_of_either_sign_not_symmetric(sign, rng):
    x = sign * matrix(rng, (), False)
    for method in METHODS[:2]:
        report = check_vjp(
            lambda x: ddnref.power_iteration(x)[0], partial(ddnref.power_iteration_vjp, method=method), x,
            needs=(0,), gap=0.5,
        )  # fmt: skip
        assert report.error <= 1e-10, (method, report)


@pytest.mark.parametrize("method", METHODS)
def test_unsymmetrised_gradient_of_a_symmetric_matrix_is_another(method, rng):
    """``symmetric=`` changes the gradient, by its antisymmetric part alone."""
    x = matrix(rng)
    (w, v), _ = ddnref.power_iteration(x)
    arrays = (rng.standard_normal(()), rng.standard_normal(7), w, v, x)
    raw, sym = (
        ddnref.power_iteration_vjp(*arrays, method=method, symmetric=s, n_iter=60) for s in (False, True)
    )  # fmt: skip
    assert relative(raw, sym) > 0.1
    assert relative((raw + raw.T) / 2, sym) <= 1e-13


def test_other_forwards_and_interior_pairs(rng):
    """The eigenpairs may come from anywhere, and need not be dominant."""
    x = symmetric(rng, 8, (2,))
    w, v = ddnref.eigh(x)
    w_bar, v_bar = rng.standard_normal((2, 3)), rng.standard_normal((2, 8, 3))
    index = (1, 4, 6)
    exact = ddnref.eigh_vjp(w_bar, v_bar, w, v, index=index)
    for method in METHODS[:2]:
        ours = ddnref.simultaneous_iteration_vjp(
            w_bar, v_bar, w[:, index], v[..., index], x, method=method, symmetric=True
        )
        assert relative(ours, exact) <= 1e-12
    one = ddnref.power_iteration_vjp(None, v_bar[..., 0], w[:, 4], v[..., 4], x, symmetric=True)
    assert relative(one, ddnref.eigh_vjp(None, v_bar[..., :1], w, v, index=(4,))) <= 1e-12


def test_projector_of_a_repeated_eigenvalue_is_exact(rng):
    x = matrix(rng, (2,), True, np.asarray([2.0, 2.0, 2.0, 1.0, 0.5, 0.1]))
    w, v = ddnref.eigh(x)
    c = symmetric(rng, 6, (2,))
    top = v[..., 3:]
    bar = 2 * c @ top
    ours = ddnref.simultaneous_iteration_vjp(None, bar, w[:, 3:], top, x, symmetric=True)
    assert relative(ours, ddnref.eigh_vjp(None, bar, w, v, index=(3, 4, 5))) <= 1e-13


def test_repeated_eigenvalues_are_refused(xp, rng):
    spectra = np.asarray([[2.0, 2.0, 1.0, 0.5], [3.0, 2.0, 1.0, 0.5]])
    x = xp.asarray(with_spectrum(rotation(rng, 4, (2,)), spectra))
    w, v = ddnref.eigh(x)
    bar = xp.asarray(rng.standard_normal((2, 4, 1)))
    for method in METHODS[:2]:
        for is_symmetric in (True, False):
            vjp = partial(ddnref.simultaneous_iteration_vjp, None, bar, w[:, -1:], v[..., -1:], x, method=method)
            with pytest.raises(ddnref.GaugeError, match="repeated to working precision"):
                vjp(symmetric=is_symmetric)
            x_bar = xp.numpy(vjp(symmetric=is_symmetric, throw=False))
            assert np.all(np.isnan(x_bar[0]))
            assert np.all(np.isfinite(x_bar[1]))
    # the whole cluster, but a loss of one of its vectors
    both = xp.asarray(np.stack([rng.standard_normal((2, 4)), np.zeros((2, 4))], axis=-1))
    with pytest.raises(ddnref.GaugeError):
        ddnref.simultaneous_iteration_vjp(None, both, w[:, -2:], v[..., -2:], x, symmetric=True)
    ahead = xp.asarray(np.asarray([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(ddnref.GaugeError):  # of one of two equal eigenvalues
        ddnref.simultaneous_iteration_vjp(ahead, None, w[:, -2:], v[..., -2:], x, symmetric=True)


@pytest.mark.parametrize("m", [64, 300])  # one chunk, and one item in each
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("method", "bar"), [("bordered", 1e-6), ("fixed_point", 1e-4)])
def test_single_precision_from_correctly_rounded_pairs(n, m, method, bar, rng):
    """Random cotangents, zero-mean Gaussian matrices: where the node's textbook form is off by 0.05 and more."""
    x = symmetric(rng, m, (5,)).astype(np.float32)
    w, v = np.linalg.eigh(x.astype(np.float64))
    order = np.argsort(-np.abs(w), axis=-1)[:, :n]
    w_n = np.take_along_axis(w, order, axis=-1)
    v_n = np.take_along_axis(v, order[:, None, :], axis=-1)
    w_bar, v_bar = rng.standard_normal((5, n)), rng.standard_normal((5, m, n))
    single = ddnref.simultaneous_iteration_vjp(
        *(a.astype(np.float32) for a in (w_bar, v_bar, w_n, v_n)), x, method=method, symmetric=True
    )
    for i in range(5):
        exact = ddnref.eigh_vjp(w_bar[i], v_bar[i], w[i], v[i], index=order[i])
        gap = np.min(np.abs(w_n[i][:, None] - w[i])[np.abs(w_n[i][:, None] - w[i]) > 0])
        assert relative(single[i], exact) <= max(bar, 20 * np.finfo(np.float32).eps * np.abs(w_n[i, 0]) / gap)
    assert single.dtype == np.float32


def test_chunks_change_nothing(monkeypatch, rng):
    from ddnref._kernels import bordered

    x = matrix(rng, (2, 3))
    (w, v), _ = ddnref.simultaneous_iteration(x, 2, symmetric=True)
    whole = ddnref.simultaneous_iteration_vjp(w, v, w, v, x, symmetric=True)
    monkeypatch.setattr(bordered, "CHUNK", 2 * 49)
    assert np.array_equal(ddnref.simultaneous_iteration_vjp(w, v, w, v, x, symmetric=True), whole)


def test_unrolled_repeats_the_given_start_and_steps(rng):
    """It is also the gradient of an iteration that has not converged, which the implicit methods cannot compute."""
    x, v0 = matrix(rng), rng.standard_normal(7)
    stopped = {"v0": v0, "maxiter": 4, "throw": False}
    for is_symmetric in (True, False):
        report = check_vjp(
            lambda x, s=is_symmetric: ddnref.power_iteration(x, symmetric=s, **stopped)[0],
            partial(ddnref.power_iteration_vjp, method="unrolled", symmetric=is_symmetric, v0=v0, n_iter=4),
            x, needs=(0,), symmetrises=is_symmetric,
        )  # fmt: skip
        assert report.error <= 1e-9, report
    start = rng.standard_normal((7, 2))
    report = check_vjp(
        lambda x: ddnref.simultaneous_iteration(x, 2, symmetric=True, v0=start, maxiter=4, throw=False)[0],
        partial(ddnref.simultaneous_iteration_vjp, method="unrolled", symmetric=True, v0=start, n_iter=4),
        x, needs=(0,), symmetrises=True,
    )  # fmt: skip
    assert report.error <= 1e-9, report


# --- bad input --------------------------------------------------------------------------------------------------


def bad_batch(rng):
    """Good, zero, λ and −λ, NaN, a rotation (complex pair), good."""
    good = matrix(rng, (2,))
    opposite = matrix(rng, (), True, np.asarray([2.0, -2.0, 1.0, 0.5, 0.3, 0.2, 0.1]))
    turning = np.zeros((7, 7))
    turning[:2, :2] = [[0.0, -1.0], [1.0, 0.0]]
    return np.stack([good[0], np.zeros((7, 7)), opposite, np.full((7, 7), np.nan), turning, good[1]])


@pytest.mark.parametrize("name", ["power", "simultaneous"])
def test_a_bad_item_has_a_status_and_harms_no_other(name, xp, rng):
    solve = ddnref.power_iteration if name == "power" else partial(ddnref.simultaneous_iteration, n=1)
    solve = partial(solve, while_loop=xp.while_loop, maxiter=200)
    x = bad_batch(rng)
    (w, v), info = solve(xp.asarray(x), throw=False)
    assert list(xp.numpy(info.converged)) == [True, False, False, False, False, True]
    assert np.all(np.isnan(xp.numpy(w)[3]))
    assert np.all(np.isnan(xp.numpy(v)[3]))
    # All batches have six items, so that JAX compiles each operation once.
    (w_1, v_1), _ = solve(xp.asarray(x[[0, 5, 0, 5, 0, 5]]))
    assert relative(xp.numpy(w)[[0, 5]], xp.numpy(w_1)[:2]) <= 1e-15  # a library may multiply batches otherwise
    assert relative(xp.numpy(v)[[0, 5]], xp.numpy(v_1)[:2]) <= 1e-14
    with pytest.raises(ddnref.NonFiniteError, match="throw=False"):
        solve(xp.asarray(x))
    for item in (1, 2, 4):
        with pytest.raises(ddnref.ConvergenceError, match=r"1 of 6 items.*same largest magnitude"):
            solve(xp.asarray(x[[0, 5, item, 0, 5, 0]]))
    single, _ = solve(xp.asarray(x[0]))
    assert single[0].shape == w_1.shape[1:]


def test_static_errors(rng):
    x = matrix(rng)
    (w, v), _ = ddnref.power_iteration(x)
    for call, error, match in [
        (lambda: ddnref.power_iteration(x[:3]), ValueError, "square"),
        (lambda: ddnref.power_iteration(x[:0, :0]), ValueError, "without entries"),
        (lambda: ddnref.power_iteration(x + 0j), TypeError, "takes real matrices"),
        (lambda: ddnref.power_iteration(x, align="up"), ValueError, "align is 'up'"),
        (lambda: ddnref.power_iteration(x, v0=v[:3]), ValueError, r"v0 has shape \(3,\), expected \(7,\)"),
        (lambda: ddnref.power_iteration(x, v0=v.astype(np.float32)), TypeError, "v0 has dtype float32"),
        (lambda: ddnref.power_iteration(x, check_every=0), ValueError, "check_every is 0"),
        (lambda: ddnref.simultaneous_iteration(x, 0), ValueError, "n is 0, expected 1 <= n <= 7"),
        (lambda: ddnref.simultaneous_iteration(x, 8), ValueError, "n is 8"),
        (lambda: ddnref.align_signs(v, sign="up"), ValueError, "sign is 'up'"),
        (lambda: ddnref.align_signs(v[:, None], v[:3]), ValueError, "does not fit"),
        (lambda: ddnref.power_iteration_vjp(w, v, w, v, x, method="guess"), ValueError, "method is 'guess'"),
        (lambda: ddnref.power_iteration_vjp(w, v, w, v, x, method="unrolled"), ValueError, "needs n_iter"),
        (lambda: ddnref.power_iteration_vjp(None, None, w, v, x), TypeError, "both None"),
        (lambda: ddnref.power_iteration_vjp(w, v[:3], w, v, x), ValueError, "v_bar has shape"),
        (lambda: ddnref.power_iteration_vjp(w, v, w, v, x + 0j), TypeError, "dtype"),
        (lambda: ddnref.eigen_residual(x, w, v[:3]), ValueError, "v has shape"),
    ]:
        with pytest.raises(error, match=match):
            call()


def test_residuals(xp, rng):
    x = matrix(rng, (2,), False)
    w, v = dominant(x, 3)
    arrays = [xp.asarray(a) for a in (x, w, v)]
    for residual in (ddnref.eigen_residual, ddnref.fixed_point_residual):
        assert residual(*arrays).shape == (2, 3)
        assert np.max(xp.numpy(residual(*arrays))) <= 1e-13
        one = residual(arrays[0], arrays[1][:, 0], arrays[2][..., 0])
        assert one.shape == (2,)
        off = xp.numpy(residual(arrays[0], arrays[1], xp.asarray(v + 0.5 * rng.standard_normal(v.shape))))
        assert np.all(off > 0.1)
    wrong = xp.numpy(ddnref.eigen_residual(arrays[0], xp.asarray(w + 0.5), arrays[2]))
    np.testing.assert_allclose(wrong, 0.5, rtol=1e-12)
    assert np.isnan(ddnref.fixed_point_residual(np.zeros((2, 2)), np.ones(()), np.asarray([1.0, 0.0])))


# --- JVP --------------------------------------------------------------------------------------------------------


def pairing_error(bars, dots, x_bar, x_dot):
    """``|⟨ȳ, J ẋ⟩ − ⟨Jᵀ ȳ, ẋ⟩|`` relative to ``‖ȳ‖ ‖J ẋ‖``."""
    forward = sum(np.sum(bar * dot) for bar, dot in zip(bars, dots, strict=True))
    sizes = (np.sqrt(sum(np.sum(a.astype(np.float64) ** 2) for a in arrays)) for arrays in (bars, dots))
    return abs(forward - np.sum(x_bar * x_dot)) / np.prod(list(sizes))


def exact_tangents(x_dot, w, v, columns):
    """Derivatives of chosen pairs of a symmetric matrix with simple eigenvalues, from all of its pairs."""
    s = np.swapaxes(v, -1, -2) @ x_dot @ v[..., columns]
    gap = w[..., None, columns] - w[..., :, None]
    k = np.where(gap == 0, 0, s / np.where(gap == 0, 1, gap))
    return np.stack([s[..., c, j] for j, c in enumerate(columns)], axis=-1), v @ k


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_jvp_agrees_with_finite_differences_and_with_the_vjp(method, is_symmetric, n, xp, rng):
    x, x_dot = matrix(rng, (2,), is_symmetric), rng.standard_normal((2, 7, 7))
    options, steps = {"symmetric": is_symmetric, "method": method}, {}
    if method == "unrolled":
        options["n_iter"] = steps["maxiter"] = 6
    if n == 1:
        forward, vjp, jvp = ddnref.power_iteration, ddnref.power_iteration_vjp, ddnref.power_iteration_jvp
    else:
        forward = partial(ddnref.simultaneous_iteration, n=n)
        vjp, jvp = ddnref.simultaneous_iteration_vjp, ddnref.simultaneous_iteration_jvp
    pairs = lambda x: forward(x, symmetric=is_symmetric, throw=False, **steps)[0]
    w, v = pairs(x)
    if method == "unrolled" and n > 1 and not is_symmetric:
        with pytest.raises(ValueError, match="needs symmetric=True"):
            jvp(x_dot, w, v, x, **options)
        return
    dots = xp.lift(partial(jvp, throw=False, **options))(x_dot, w, v, x)
    for dot, numerical in zip(dots, numerical_jvp(pairs, x, x_dot, gap=0.5), strict=True):
        assert relative(dot, numerical) <= 1e-9
    # Each cotangent alone, so that no error hides behind the other.
    bars = rng.standard_normal(w.shape), rng.standard_normal(v.shape)
    for given in ((bars[0], 0 * bars[1]), (0 * bars[0], bars[1])):
        assert pairing_error(given, dots, vjp(*given, w, v, x, **options), x_dot) <= 1e-12


def test_the_jvp_of_other_forwards_and_interior_pairs(rng):
    x, x_dot = symmetric(rng, 8, (2,)), rng.standard_normal((2, 8, 8))
    w, v = ddnref.eigh(x)
    index = [1, 4, 6]
    exact = exact_tangents((x_dot + np.swapaxes(x_dot, -1, -2)) / 2, w, v, index)
    for method in METHODS[:2]:
        ours = ddnref.simultaneous_iteration_jvp(
            x_dot, w[:, index], v[..., index], x, method=method, symmetric=True
        )  # fmt: skip
        assert all(relative(dot, expected) <= 1e-12 for dot, expected in zip(ours, exact, strict=True))
    w_dot, v_dot = ddnref.power_iteration_jvp(x_dot, w[:, 4], v[..., 4], x, symmetric=True)
    assert relative(w_dot, exact[0][:, 1]) <= 1e-12
    assert relative(v_dot, exact[1][..., 1]) <= 1e-12


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("s", [1e3, 1e12, 1e30])
def test_the_jvp_of_a_triangular_matrix(s, dtype, xp):
    """λ = 1.5 with ``v ∝ (2 s, 1)``; its left eigenvector is (0, 1)."""
    x, eps = np.asarray([[1.0, s], [0.0, 1.5]], dtype=dtype), np.finfo(dtype).eps
    x_dot = np.asarray([[0.3, 0.2 * s], [0.7 / s, -0.4]], dtype=dtype)  # in the units of x
    (w, v), _ = ddnref.power_iteration(x)
    rate = 0.7 * 2 - 0.4
    # With v = (a, 1) / ‖·‖ and (X − λ) v = 0: 0.5 ȧ = 0.3 a + 0.2 s − λ̇ a for a = 2 s.
    a, a_dot = 2.0 * s, 2 * (0.3 * 2 * s + 0.2 * s - rate * 2 * s)
    slope = np.asarray([a_dot, -a * a_dot]) / (a * a + 1) ** 1.5
    for method in METHODS[:2]:
        jvp = partial(ddnref.power_iteration_jvp, method=method, throw=False)
        w_dot, v_dot = xp.lift(jvp)(x_dot, w, v, x)
        assert abs(w_dot - rate) <= 1e3 * eps, method
        assert abs(v_dot[1] - slope[1]) <= 1e4 * eps * abs(slope[1]), method
        assert abs(v_dot[0] - slope[0]) <= 1e4 * eps * abs(slope[1]), method


@pytest.mark.parametrize("unit", [1e2, 1e6])
def test_the_jvp_is_the_transpose_in_any_units(unit, rng):
    d = unit ** np.linspace(-1, 1, 7)
    x, x_dot = matrix(rng, (), False) / d[:, None] * d, rng.standard_normal((7, 7)) / d[:, None] * d
    (w, v), _ = ddnref.simultaneous_iteration(x, 3)
    bars = rng.standard_normal(w.shape), rng.standard_normal(v.shape)
    for method in METHODS[:2]:
        dots = ddnref.simultaneous_iteration_jvp(x_dot, w, v, x, method=method)
        x_bar = ddnref.simultaneous_iteration_vjp(*bars, w, v, x, method=method)
        assert pairing_error(bars, dots, x_bar, x_dot) <= 1e-12


def test_the_jvp_in_every_direction_of_a_cluster(xp, rng):
    """A direction that keeps equal eigenvalues together has a derivative; one that splits them is refused."""
    spectrum = np.asarray([2.0, 2.0, 2.0, 1.0, 0.5, 0.1])
    q = rotation(rng, 6, (2,))
    x, split = with_spectrum(q, spectrum), symmetric(rng, 6, (2,))
    top, rest = q[..., :3], q[..., 3:]
    w, v = np.broadcast_to(spectrum[:3], (2, 3)), top
    across = top @ rng.standard_normal((2, 3, 3)) @ np.swapaxes(rest, -1, -2)
    together = 0.7 * x + across + np.swapaxes(across, -1, -2)
    together[1] = split[1]
    jvp = partial(ddnref.simultaneous_iteration_jvp, symmetric=True)
    arrays = tuple(map(xp.asarray, (together, w, v, x)))
    with pytest.raises(ddnref.GaugeError, match=r"splits equal eigenvalues \(item 1 of 2\), by .* > gauge_rtol"):
        jvp(*arrays)
    w_dot, v_dot = xp.tuple(jvp(*arrays, throw=False))
    for dot in (w_dot, v_dot):
        assert np.all(np.isnan(dot[1]))
        assert np.all(np.isfinite(dot[0]))
    np.testing.assert_allclose(w_dot[0], 1.4, rtol=1e-13)
    # The projector and the trace of the cluster have a derivative in any direction.
    w_dot, v_dot = xp.tuple(jvp(*arrays, gauge_rtol=float("inf")))
    gap = 2.0 - spectrum[3:]
    outside = np.swapaxes(rest, -1, -2) @ together @ top / gap[:, None]
    expected = rest @ outside @ np.swapaxes(top, -1, -2)
    projector = v_dot @ np.swapaxes(top, -1, -2)
    assert relative(projector + np.swapaxes(projector, -1, -2), expected + np.swapaxes(expected, -1, -2)) <= 1e-13
    trace = np.einsum("bij,bij->b", top, together @ top)
    np.testing.assert_allclose(np.sum(w_dot, axis=-1), trace, rtol=1e-12)


def test_the_jvp_refuses_repeated_eigenvalues(xp, rng):
    spectra = np.asarray([[2.0, 2.0, 1.0, 0.5], [3.0, 2.0, 1.0, 0.5]])
    x = xp.asarray(with_spectrum(rotation(rng, 4, (2,)), spectra))
    w, v = ddnref.eigh(x)
    x_dot = xp.asarray(rng.standard_normal((2, 4, 4)))
    for method in METHODS[:2]:
        for is_symmetric in (True, False):
            jvp = partial(ddnref.simultaneous_iteration_jvp, method=method, symmetric=is_symmetric)
            with pytest.raises(ddnref.GaugeError, match=r"repeated to working precision \(item 0 of 2\)"):
                jvp(x_dot, w[:, -1:], v[..., -1:], x)
            for dot in xp.tuple(jvp(x_dot, w[:, -1:], v[..., -1:], x, throw=False)):
                assert np.all(np.isnan(dot[0]))
                assert np.all(np.isfinite(dot[1]))


def test_a_direction_that_is_not_finite_is_nan_alone(xp, rng):
    for is_symmetric in (True, False):
        x, x_dot = matrix(rng, (3,), is_symmetric), rng.standard_normal((3, 7, 7))
        (w, v), _ = ddnref.simultaneous_iteration(x, 2, symmetric=is_symmetric)
        x_dot[1, 2, 3] = np.inf
        arrays = map(xp.asarray, (x_dot, w, v, x))
        dots = xp.tuple(xp.derivative(ddnref.simultaneous_iteration_jvp, *arrays, symmetric=is_symmetric))
        for dot in (dot.reshape(3, -1) for dot in dots):
            assert np.isnan(dot).all(axis=-1).tolist() == [False, True, False]
            assert np.isnan(dot).any(axis=-1).tolist() == [False, True, False]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("method", "bar"), [("bordered", 1e-6), ("fixed_point", 1e-4)])
def test_the_jvp_in_single_precision_from_correctly_rounded_pairs(n, method, bar, rng):
    m = 64
    x, x_dot = (symmetric(rng, m, (5,)).astype(np.float32) for _ in range(2))
    w, v = np.linalg.eigh(x.astype(np.float64))
    for i in range(5):
        order = np.argsort(-np.abs(w[i]))[:n]
        exact = exact_tangents(x_dot[i].astype(np.float64), w[i], v[i], order)
        pairs = w[i, order].astype(np.float32), v[i][:, order].astype(np.float32)
        single = ddnref.simultaneous_iteration_jvp(x_dot[i], *pairs, x[i], method=method, symmetric=True)
        gaps = np.abs(w[i, order][:, None] - w[i])
        limit = max(bar, 20 * np.finfo(np.float32).eps * np.abs(w[i, order[0]]) / np.min(gaps[gaps > 0]))
        for dot, expected in zip(single, exact, strict=True):
            assert dot.dtype == np.float32
            assert relative(dot, expected) <= limit


def test_the_jvp_in_chunks(monkeypatch, rng):
    from ddnref._kernels import bordered

    x, x_dot = matrix(rng, (2, 3), False), rng.standard_normal((2, 3, 7, 7))
    (w, v), _ = ddnref.simultaneous_iteration(x, 2)
    for method in METHODS[:2]:
        whole = ddnref.simultaneous_iteration_jvp(x_dot, w, v, x, method=method)
        with monkeypatch.context() as small:
            small.setattr(bordered, "CHUNK", 2 * 49)
            parts = ddnref.simultaneous_iteration_jvp(x_dot, w, v, x, method=method)
        assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_unrolled_jvp_repeats_the_given_start_and_steps(rng):
    x, x_dot, v0 = matrix(rng), rng.standard_normal((7, 7)), rng.standard_normal((7, 2))
    for is_symmetric, n in ((True, 1), (False, 1), (True, 2)):
        options = {"symmetric": is_symmetric, "v0": v0[:, :n]}
        pairs = lambda x, n=n, o=options: ddnref.simultaneous_iteration(x, n, maxiter=4, throw=False, **o)[0]
        dots = ddnref.simultaneous_iteration_jvp(x_dot, *pairs(x), x, method="unrolled", n_iter=4, **options)
        for dot, numerical in zip(dots, numerical_jvp(pairs, x, x_dot, gap=0.5), strict=True):
            assert relative(dot, numerical) <= 1e-9


def test_static_errors_of_the_jvp(rng):
    x = matrix(rng)
    (w, v), _ = ddnref.power_iteration(x)
    with pytest.raises(TypeError, match="x_dot is None"):
        ddnref.power_iteration_jvp(None, w, v, x)
    with pytest.raises(ValueError, match=r"x_dot has shape \(7,\), expected \(7, 7\)"):
        ddnref.power_iteration_jvp(v, w, v, x)
    with pytest.raises(TypeError, match="x_dot has dtype float32"):
        ddnref.power_iteration_jvp(x.astype(np.float32), w, v, x)
    with pytest.raises(TypeError, match="real matrices"):
        ddnref.power_iteration_jvp(x + 0j, w, v, x + 0j)
    with pytest.raises(ValueError, match="method is 'lu'"):
        ddnref.power_iteration_jvp(x, w, v, x, method="lu")
    with pytest.raises(ValueError, match="needs n_iter"):
        ddnref.power_iteration_jvp(x, w, v, x, method="unrolled")
    with pytest.raises(ValueError, match="v0 has shape"):
        ddnref.power_iteration_jvp(x, w, v, x, v0=np.ones(3))
    empty = ddnref.simultaneous_iteration_jvp(x, w[None][:0], v[:, None][:, :0], x)
    assert [dot.shape for dot in empty] == [(0,), (7, 0)]


def test_the_jvp_reads_one_flag_or_none(host_reads, rng):
    import array_api_strict as strict

    x = strict.asarray(matrix(rng, (2,)))
    for is_symmetric in (True, False):
        (w, v), _ = ddnref.simultaneous_iteration(x, 2, symmetric=is_symmetric)
        for method in METHODS[:2]:
            options = {"symmetric": is_symmetric, "method": method}
            host_reads.clear()
            ddnref.simultaneous_iteration_jvp(x, w, v, x, **options, throw=False)
            assert host_reads == []
            ddnref.simultaneous_iteration_jvp(x, w, v, x, **options)
            assert host_reads == ["__bool__"]
