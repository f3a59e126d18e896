"""Power and simultaneous iteration and their VJPs: what is special about them beyond the table of rules."""

from functools import partial

import numpy as np
import pytest
from problems import relative, rotation, symmetric, with_spectrum

import ddnref
from ddnref.testing import assert_vjp, check_vjp

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
        directions=3,
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
    solve = partial(solve, while_loop=xp.while_loop)
    x = bad_batch(rng)
    (w, v), info = solve(xp.asarray(x), throw=False)
    assert list(xp.numpy(info.converged)) == [True, False, False, False, False, True]
    assert np.all(np.isnan(xp.numpy(w)[3]))
    assert np.all(np.isnan(xp.numpy(v)[3]))
    (w_1, v_1), _ = solve(xp.asarray(x[[0, 5]]))
    assert relative(xp.numpy(w)[[0, 5]], xp.numpy(w_1)) <= 1e-15  # a library may multiply batches otherwise
    assert relative(xp.numpy(v)[[0, 5]], xp.numpy(v_1)) <= 1e-14
    with pytest.raises(ddnref.NonFiniteError, match="throw=False"):
        solve(xp.asarray(x))
    for item in (1, 2, 4):
        with pytest.raises(ddnref.ConvergenceError, match=r"1 of 1 items.*same largest magnitude"):
            solve(xp.asarray(x[item : item + 1]))
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
