"""The top k eigenpairs."""

import numpy as np
import pytest
from problems import projector_gradient, relative, rotation, symmetric, with_spectrum

import ddnref
from ddnref import GaugeError


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_most_wanted_first(which, xp, rng):
    x = symmetric(rng, 6, (2,))
    w_all, v_all = np.linalg.eigh(x)
    order = [5, 4, 3] if which == "LA" else [0, 1, 2]
    w, v = ddnref.eigh_topk(xp.asarray(x), 3, which=which)
    np.testing.assert_allclose(xp.numpy(w), w_all[:, order], atol=1e-12)
    np.testing.assert_allclose(np.abs(xp.numpy(v)), np.abs(v_all[..., order]), atol=1e-12)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_vjp_is_the_full_one_of_these_columns(which, xp, rng):
    x = symmetric(rng, 6, (2,))
    (w, v), (w_all, v_all) = ddnref.eigh_topk_fwd(xp.asarray(x), 2, which=which)
    w_bar, v_bar = rng.standard_normal((2, 2)), rng.standard_normal((2, 6, 2))
    full_w, full_v = np.zeros((2, 6)), np.zeros((2, 6, 6))
    order = [5, 4] if which == "LA" else [0, 1]
    full_w[:, order], full_v[..., order] = w_bar, v_bar
    expected = xp.numpy(xp.derivative(ddnref.eigh_vjp, xp.asarray(full_w), xp.asarray(full_v), w_all, v_all))
    got = xp.derivative(ddnref.eigh_topk_vjp, xp.asarray(w_bar), xp.asarray(v_bar), w, v, w_all, v_all, which=which)
    assert relative(xp.numpy(got), expected) <= 1e-13


@pytest.mark.parametrize(("dtype", "gap"), [("float64", 1e-10), ("complex64", 1e-3)])
def test_a_projector_inside_of_the_k_is_exact_at_small_gaps(dtype, gap, xp, rng):
    m, is_complex = 12, dtype.startswith("complex")
    spectrum = np.concatenate([np.linspace(-1, 0.3, m - 5), 0.6 + gap * np.asarray([0.0, 1.0, 2.5]), [0.9, 1.0]])
    q, c = rotation(rng, m, (), is_complex), symmetric(rng, m, (), is_complex).astype(dtype)
    x = xp.asarray(with_spectrum(q, spectrum).astype(dtype))
    (w, v), saved = xp.jit(lambda x: ddnref.eigh_topk_fwd(x, 5))(x)
    inside = np.asarray([False, False, True, True, True])
    v_bar = np.where(inside, 2 * c @ xp.numpy(v), 0).astype(dtype)
    vjp = xp.jit(lambda *arrays: ddnref.eigh_topk_vjp(None, *arrays, throw=False))
    x_bar = vjp(xp.asarray(v_bar), w, v, *saved)
    expected = projector_gradient(q, spectrum, np.abs(spectrum - 0.6) < 0.1, c)
    assert relative(xp.numpy(x_bar), expected) <= 60 * np.finfo(dtype).eps * m**0.5


def test_a_cut_cluster_is_refused(xp, rng):
    x = xp.asarray(with_spectrum(rotation(rng, 5), [0.0, 1.0, 2.0, 2.0, 2.0]))
    (w, v), saved = ddnref.eigh_topk_fwd(x, 2)
    c = symmetric(rng, 5)
    v_bar = xp.asarray(2 * c @ xp.numpy(v))
    with pytest.raises(GaugeError, match="cuts such a cluster"):
        ddnref.eigh_topk_vjp(None, v_bar, w, v, *saved)
    (w, v), saved = ddnref.eigh_topk_fwd(x, 3)
    ddnref.eigh_topk_vjp(None, xp.asarray(2 * c @ xp.numpy(v)), w, v, *saved)


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_jvp_is_the_full_one_of_these_columns(which, is_complex, xp, rng):
    x, x_dot = symmetric(rng, 6, (2,), is_complex), symmetric(rng, 6, (2,), is_complex)
    (w, v), (w_all, v_all) = ddnref.eigh_topk_fwd(xp.asarray(x), 2, which=which)
    order = [5, 4] if which == "LA" else [0, 1]
    full_w, full_v = (xp.numpy(a) for a in xp.derivative(ddnref.eigh_jvp, xp.asarray(x_dot), w_all, v_all, throw=False))
    jvp = xp.jit(lambda *a: ddnref.eigh_topk_jvp(*a, which=which, throw=False))
    w_dot, v_dot = (xp.numpy(a) for a in jvp(xp.asarray(x_dot), w, v, w_all, v_all))
    assert relative(w_dot, full_w[:, order]) <= 1e-13
    assert relative(v_dot, full_v[..., order]) <= 1e-13
    w_bar, v_bar = rng.standard_normal((2, 2)), rng.standard_normal((2, 6, 2)).astype(x.dtype)
    arrays = (xp.asarray(w_bar), xp.asarray(v_bar), w, v, w_all, v_all)
    x_bar = xp.numpy(xp.derivative(ddnref.eigh_topk_vjp, *arrays, which=which, gauge_rtol=float("inf")))
    right = np.vdot(w_bar, w_dot) + np.vdot(v_bar, v_dot).real
    bound = np.hypot(*map(np.linalg.norm, (w_bar, v_bar))) * np.hypot(*map(np.linalg.norm, (w_dot, v_dot)))
    assert abs(np.vdot(x_bar, x_dot).real - right) <= 1e-12 * bound


def test_a_direction_that_splits_a_cut_cluster_is_refused(xp, rng):
    x = with_spectrum(rotation(rng, 5), [0.0, 1.0, 2.0, 2.0, 2.0])
    (w, v), saved = ddnref.eigh_topk_fwd(xp.asarray(x), 2)
    ddnref.eigh_topk_jvp(xp.asarray(x @ x), w, v, *saved)
    for direction in (symmetric(rng, 5), np.outer(*2 * [xp.numpy(saved[1])[:, 2]])):  # the second: of a vector left out
        with pytest.raises(GaugeError, match="splits equal eigenvalues, those at 2, by"):
            ddnref.eigh_topk_jvp(xp.asarray(direction), w, v, *saved)
        dots = ddnref.eigh_topk_jvp(xp.asarray(direction), w, v, *saved, throw=False)
        assert all(np.all(np.isnan(xp.numpy(a))) for a in dots)
    # One that moves the whole cluster and all else freely has derivatives for a k that does not cut.
    (w, v), saved = ddnref.eigh_topk_fwd(xp.asarray(x), 3)
    q = xp.numpy(saved[1])
    free = symmetric(rng, 5)
    free[2:, 2:] = 3 * np.eye(3)
    w_dot, _ = ddnref.eigh_topk_jvp(xp.asarray(q @ free @ q.T), w, v, *saved)
    np.testing.assert_allclose(xp.numpy(w_dot), 3.0, rtol=1e-13)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 <= k <= 3"):
        ddnref.eigh_topk(np.eye(3), k)


def test_static_errors():
    with pytest.raises(ValueError, match="which is 'LM', expected \"LA\""):
        ddnref.eigh_topk(np.eye(3), 1, which="LM")
    with pytest.raises(TypeError):
        ddnref.eigh_topk(np.eye(3), 1.5)
    w, v = ddnref.eigh(np.eye(3))
    with pytest.raises(ValueError, match="v has shape"):
        ddnref.eigh_topk_vjp(None, np.ones((3, 2)), w[:2], v, w, v)
