"""The top k eigenpairs."""

import numpy as np
import pytest
from problems import relative, rotation, symmetric, with_spectrum

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
    expected = xp.numpy(ddnref.eigh_vjp(xp.asarray(full_w), xp.asarray(full_v), w_all, v_all))
    got = ddnref.eigh_topk_vjp(xp.asarray(w_bar), xp.asarray(v_bar), w, v, w_all, v_all, which=which)
    assert relative(xp.numpy(got), expected) <= 1e-13


def test_a_cut_cluster_is_refused(xp, rng):
    x = xp.asarray(with_spectrum(rotation(rng, 5), [0.0, 1.0, 2.0, 2.0, 2.0]))
    (w, v), saved = ddnref.eigh_topk_fwd(x, 2)
    c = symmetric(rng, 5)
    v_bar = xp.asarray(2 * c @ xp.numpy(v))
    with pytest.raises(GaugeError, match="cuts such a cluster"):
        ddnref.eigh_topk_vjp(None, v_bar, w, v, *saved)
    (w, v), saved = ddnref.eigh_topk_fwd(x, 3)
    ddnref.eigh_topk_vjp(None, xp.asarray(2 * c @ xp.numpy(v)), w, v, *saved)


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
