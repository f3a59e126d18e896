"""Steps of a trust region against dense answers: every kind of step, every kind of H, their gradient, bad input."""

from functools import partial

import numpy as np
import pytest
from hessian_problems import dense as dense_hessian
from hessian_problems import flatten, network

import ddnref
from ddnref import curvature, networks, operators
from ddnref.curvature import _model_space, _trust_region, trust_region_step, trust_region_step_vjp
from ddnref.reference import trust_region_dense

SPECTRA = {
    "indefinite": [-3.0, -1.0, -0.2, 0.4, 1.0, 2.5, 4.0],
    "definite": [0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0],
    "negative": [-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.1],
    "singular": [0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0],
    "indefinite, repeated": [-2.0, -2.0, -2.0, 1.0, 1.0, 3.0, 3.0],
    "zero": [0.0] * 7,
    "far apart": [-1e-6, 1e-6, 1e-3, 1.0, 1e3, 1e4, 1e5],
}


def matrix(rng, w):
    v, _ = np.linalg.qr(rng.standard_normal((len(w), len(w))))
    h = v * w @ v.T
    return (h + h.T) / 2, v


def value(h, g, p):
    return g @ p + p @ h @ p / 2


def check_minimum(h, g, radius, p, info, rtol=1e-12):
    """Check the conditions that hold at a minimum and nowhere else, and the numbers of `info`."""
    damping, size = float(info.damping), np.linalg.norm(p)
    scale = np.linalg.norm(g) + np.linalg.norm(h, 2) * radius
    assert size <= radius * (1 + rtol)
    assert damping >= 0
    assert abs(damping * (size - radius)) <= rtol * scale
    assert np.linalg.norm(h @ p + damping * p + g) <= rtol * scale
    assert np.linalg.eigvalsh(h)[0] + damping >= -rtol * np.linalg.norm(h, 2)
    assert abs(info.predicted + value(h, g, p)) <= rtol * scale * radius


@pytest.mark.parametrize("radius", [1e-3, 0.3, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("kind", SPECTRA)
def test_a_step_is_the_dense_answer(kind, radius, rng):
    h, _ = matrix(rng, SPECTRA[kind])
    g = rng.standard_normal(7)
    p, info = trust_region_step(h, g, radius)
    check_minimum(h, g, radius, p, info)
    exact, damping, named = trust_region_dense(h, g, radius)
    assert info.kind == named
    condition = 1e5 if kind == "far apart" else 1e1
    assert np.linalg.norm(p - exact) <= 1e-13 * condition * max(1, radius) * radius
    assert abs(float(info.damping) - damping) <= 1e-12 * (np.linalg.norm(h, 2) + damping)
    assert abs(float(info.lambda_min) - np.linalg.eigvalsh(h)[0]) <= 1e-13 * np.linalg.norm(h, 2)


@pytest.mark.parametrize("radius", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("kind", SPECTRA)
def test_the_absolute_model_is_the_dense_answer(kind, radius, rng):
    h, v = matrix(rng, SPECTRA[kind])
    g = rng.standard_normal(7)
    p, info = trust_region_step(h, g, radius, model="absolute")
    exact, damping, named = trust_region_dense(h, g, radius, absolute=True)
    assert info.kind == named
    condition = 1e5 if kind == "far apart" else 1e1
    assert np.linalg.norm(p - exact) <= 1e-13 * condition * max(1, radius) * radius
    assert abs(float(info.damping) - damping) <= 1e-12 * (np.linalg.norm(h, 2) + damping)
    turned = v * np.abs(SPECTRA[kind]) @ v.T
    assert abs(info.predicted + value(turned, g, p)) <= 1e-12 * (1 + radius) * (1 + radius * np.linalg.norm(h, 2))
    assert abs(float(info.lambda_min) - np.linalg.eigvalsh(h)[0]) <= 1e-13 * np.linalg.norm(h, 2)


@pytest.mark.parametrize("radius", [0.05, 2.0, 50.0])
@pytest.mark.parametrize("lowest", [1, 3])
def test_the_hard_case(lowest, radius, rng):
    h, v = matrix(rng, [-2.0] * lowest + [0.5, 1.0, 3.0])
    g = v[:, lowest:] @ np.asarray([1.0, -1.0, 0.5])
    p, info = trust_region_step(h, g, radius)
    check_minimum(h, g, radius, p, info)
    _, damping, named = trust_region_dense(h, g, radius)
    assert info.kind == named == ("boundary" if radius < 0.1 else "hard")
    assert abs(float(info.damping) - damping) <= 1e-13
    assert abs(np.linalg.norm(p) - radius) <= 1e-14 * radius


@pytest.mark.parametrize("part", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
def test_almost_the_hard_case(part, rng):
    h, v = matrix(rng, [-2.0, 0.5, 1.0, 3.0])
    g = v @ np.asarray([part, 1.0, -1.0, 0.5])
    p, info = trust_region_step(h, g, 5.0)
    check_minimum(h, g, 5.0, p, info)
    assert info.kind == ("hard" if part < 1e-14 else "boundary")
    if part > 1e-14:  # the sign is that of a descent direction
        assert (v.T @ p)[0] < 0


def test_a_gradient_of_zero():
    indefinite, definite = np.diag([-1.0, 2.0, 3.0]), np.diag([1.0, 2.0, 3.0])
    zero = np.zeros(3)
    p, info = trust_region_step(indefinite, zero, 2.0)
    assert info.kind == "hard"
    assert np.allclose(np.abs(p), [2, 0, 0], atol=1e-12)
    assert abs(info.predicted - 2.0) <= 1e-12
    for h, model in ((definite, "exact"), (indefinite, "absolute"), (np.zeros((3, 3)), "exact")):
        p, info = trust_region_step(h, zero, 2.0, model=model)
        assert (info.kind, float(info.predicted), np.abs(p).max()) == ("interior", 0.0, 0.0)


def test_singular_models(rng):
    h, v = matrix(rng, [0.0, 0.0, 1.0, 2.0])
    inside = v @ np.asarray([0.0, 0.0, 1.0, -1.0])
    p, info = trust_region_step(h, inside, 10.0)
    assert info.kind == "interior"
    assert np.linalg.norm(p + np.linalg.pinv(h) @ inside) <= 1e-13
    outside = inside + 1e-3 * v[:, 0]  # the model falls along v_0, without curvature, up to the boundary
    p, info = trust_region_step(h, outside, 10.0)
    check_minimum(h, outside, 10.0, p, info)
    assert info.kind == "boundary"


def test_one_dimension_and_scales(rng):
    for h, g, r, p in ((2.0, -1.0, 3.0, 0.5), (2.0, -1.0, 0.1, 0.1), (-2.0, 1e-9, 3.0, -3.0), (0.0, 2.0, 3.0, -3.0)):
        assert abs(trust_region_step(np.asarray([[h]]), np.asarray([g]), r)[0][0] - p) <= 1e-15
    h, _ = matrix(rng, SPECTRA["indefinite"])
    g = rng.standard_normal(7)
    p, _ = trust_region_step(h, g, 0.7)
    for of_h, of_g in ((1e-100, 1e-100), (1e100, 1e100), (1e60, 1e-60), (1e-60, 1e60), (1.0, 1e-250), (1.0, 1e250)):
        scaled, info = trust_region_step(of_h * h, of_g * g, 0.7 * of_g / of_h)
        assert np.max(np.abs(scaled - of_g / of_h * p)) <= 1e-12 * of_g / of_h
        assert np.isfinite(info.damping)


# --- the Krylov space ------------------------------------------------------------------------------------------------


def counted(h):
    """A matrix as an operator that counts its products with single vectors."""
    count = [0]

    def apply(params, x):
        count[0] += x.size // h.shape[0]
        return x @ params[0]

    a = operators.LinearOperator((h,), apply, apply, lambda *_: (), (len(h),), (len(h),), self_adjoint=True)
    return a, count


def test_a_small_space_approaches_the_minimum_and_says_how_far_it_is(rng):
    h, _ = matrix(rng, np.linspace(-1.0, 20.0, 200))
    g = rng.standard_normal(200)
    exact, _, _ = trust_region_dense(h, g, 1.0)
    errors = []
    for k in (5, 10, 20, 40):
        p, info = trust_region_step(h, g, 1.0, k=k, rtol=0, throw=False)
        errors.append(np.linalg.norm(p - exact))
        damped = h @ p + info.damping * p + g
        size = max(np.linalg.norm(g), info.damping * np.linalg.norm(p))
        assert abs(float(info.residual_norm) - np.linalg.norm(damped) / size) <= 1e-13
        assert info.n_iter == k
        assert abs(np.linalg.norm(p) - 1) <= 1e-13
    assert errors[0] > 1e-3 > 1e-9 > errors[-1]
    with pytest.raises(ddnref.ConvergenceError, match="larger k"):
        trust_region_step(h, g, 1.0, k=5, rtol=1e-6)
    assert not trust_region_step(h, g, 1.0, k=5, rtol=1e-6, throw=False)[1].converged
    assert trust_region_step(h, g, 1.0, k=40, rtol=1e-6)[1].converged


def test_products_are_counted_and_a_retry_takes_none(rng):
    h, _ = matrix(rng, np.linspace(-2.0, 5.0, 60))
    g = rng.standard_normal(60)
    a, count = counted(h)
    for model in ("exact", "absolute"):
        for k, probes in ((12, 0), (12, 5), (100, 0)):
            options = {"k": k, "probes": probes, "model": model, "rtol": 0, "throw": False}
            _, info = trust_region_step(a, g, 1.0, **options)
            assert info.n_products == count[0] == min(k, 60) + (probes if k < 60 else 0)
            count[0] = 0
            for radius in (1e-2, 0.3, 1.0, 30.0):
                again, repeated = info.retry(radius, throw=False)
                assert count[0] == 0
                assert repeated.n_products == 0
                fresh, once = trust_region_step(a, g, radius, **options)
                count[0] = 0
                assert np.array_equal(again, fresh)
                assert (repeated.kind, float(repeated.damping)) == (once.kind, float(once.damping))
    with pytest.raises(ValueError, match="radius is -1"):
        info.retry(-1.0)


@pytest.mark.parametrize("radius", [0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("lowest", [-1.0, 0.5])
def test_products_end_where_the_residual_is_small(lowest, radius, rng):
    h, _ = matrix(rng, np.linspace(lowest, 20.0, 200))
    g = rng.standard_normal(200)
    exact, _, kind = trust_region_dense(h, g, radius)
    a, count = counted(h)
    fixed = [trust_region_step(h, g, radius, k=k, rtol=0, throw=False)[1] for k in range(1, 101)]
    assert all(info.n_iter == k for k, info in enumerate(fixed, 1))
    for rtol in (1e-1, 1e-3, 1e-6, None):
        count[0] = 0
        p, info = trust_region_step(a, g, radius, k=150, rtol=rtol)
        limit = 2.0**-26 if rtol is None else rtol
        first_k = next(k for k, other in enumerate(fixed, 1) if other.residual_norm <= limit)
        # No later than at the next look, and no earlier than it must
        assert first_k <= info.n_iter < first_k + 4
        assert info.n_products == count[0] == info.n_iter
        assert info.converged
        assert info.residual_norm <= limit
        if rtol != 1e-1:
            assert info.kind == kind
            condition = 20.0 / (lowest + info.damping)
            assert np.linalg.norm(p - exact) <= condition * limit * np.linalg.norm(exact)
    with pytest.raises(ddnref.ConvergenceError, match="space of 2 dimensions"):
        trust_region_step(h, g, radius, k=2, rtol=1e-3)


def test_the_space_of_one_radius_may_be_too_small_for_a_larger_one(rng):
    h, _ = matrix(rng, np.linspace(0.1, 20.0, 200))
    g = rng.standard_normal(200)
    _, info = trust_region_step(h, g, 0.05, rtol=1e-4)
    for radius in (0.01, 0.05):
        assert info.retry(radius)[1].converged
    with pytest.raises(ddnref.ConvergenceError, match="instead of retry"):
        info.retry(20.0)
    p, again = info.retry(20.0, throw=False)
    assert not again.converged
    assert again.residual_norm > 1e-4
    fresh, larger = trust_region_step(h, g, 20.0, k=100, rtol=1e-4)
    assert larger.n_products > info.n_products
    assert value(h, g, fresh) < value(h, g, p)


def test_flags_are_read_every_few_products(host_reads, rng):
    import array_api_strict as strict

    arrays = [strict.asarray(z) for z in (np.diag(np.linspace(1.0, 9.0, 60)), rng.standard_normal(60))]
    for every in (1, 4, 7):
        host_reads.clear()
        _, info = trust_region_step(*arrays, 1.0, k=40, check_every=every, throw=False)
        assert 8 < info.n_iter < 30
        assert info.n_iter % every == 0
        assert host_reads == ["__bool__"] * (info.n_iter // every)
        host_reads.clear()
        for options in ({"rtol": 0}, {"model": "absolute"}):
            assert trust_region_step(*arrays, 1.0, k=25, check_every=every, throw=False, **options)[1].n_iter == 25
        assert host_reads == []


def test_a_batch_goes_on_until_the_last_item_has_converged(rng):
    h = np.stack([np.diag(np.linspace(1.0, 2.0, 80)), np.diag(np.linspace(1.0, 100.0, 80))])
    g = rng.standard_normal((2, 80))
    alone = [trust_region_step(h[i], g[i], 0.5, k=60, rtol=1e-6)[1].n_iter for i in range(2)]
    p, info = trust_region_step(h, g, 0.5, k=60, rtol=1e-6)
    assert alone[0] < alone[1] == info.n_iter
    for i in range(2):
        assert np.linalg.norm(p[i] - trust_region_dense(h[i], g[i], 0.5)[0]) <= 1e-5
    g[1, 0] = np.nan  # never converges, and is not waited for
    assert trust_region_step(h, g, 0.5, k=60, rtol=1e-6, throw=False)[1].n_iter == alone[0]


def test_a_small_residual_does_not_hide_the_hard_case(rng):
    """It is found with all dimensions, with probes, and for a gradient of zero."""
    w = np.concatenate([[-1.0], np.linspace(3.0, 4.0, 79)])
    h, v = matrix(rng, w)
    g = v @ np.concatenate([[0.0], np.ones(79)])
    exact, damping, kind = trust_region_dense(h, g, 30.0)
    assert kind == "hard"
    for options in ({"k": 80}, {"probes": 15}, {"probes": 15, "rtol": 1e-6}):
        p, info = trust_region_step(h, g, 30.0, **options)
        assert info.kind == "hard"
        assert abs(info.damping - damping) <= 1e-6
        assert abs(value(h, g, p) - value(h, g, exact)) <= 1e-6 * abs(value(h, g, exact))
    assert info.n_iter < 30
    # Without them the step is that of a model which g does not see to be indefinite.
    blind, info = trust_region_step(h, g, 30.0)
    assert (info.kind, bool(info.converged)) == ("interior", True)
    assert value(h, g, blind) > value(h, g, exact) + 100
    _, info = trust_region_step(h, 0 * g, 2.0, rtol=1e-3)
    assert info.kind == "hard"
    assert abs(info.predicted - 2.0) <= 1e-5
    definite = h + 2 * np.eye(80)
    assert trust_region_step(definite, 0 * g, 2.0)[1].n_iter == 30  # nothing says that the search may end


def test_a_residual_that_is_too_small_is_noticed(rng, monkeypatch):
    """Mutation control: without the part of H p outside of the space the tests above fail."""
    h, _ = matrix(rng, np.linspace(-1.0, 20.0, 200))
    g = rng.standard_normal(200)
    exact, _, _ = trust_region_dense(h, g, 1.0)
    assert np.linalg.norm(trust_region_step(h, g, 1.0, rtol=1e-6)[0] - exact) <= 1e-5
    monkeypatch.setattr(_model_space.Rows, "outside", lambda _, y: 0 * y[..., 0])
    assert np.linalg.norm(trust_region_step(h, g, 1.0, rtol=1e-6)[0] - exact) > 1e-2


def test_probes_find_negative_curvature_that_the_gradient_does_not_see():
    w = np.concatenate([[-1.0], np.linspace(0.5, 4.0, 79)])
    h, g = np.diag(w), np.concatenate([[0.0], np.ones(79)])
    blind, info = trust_region_step(h, g, 30.0, k=10)
    assert info.kind == "interior"
    assert info.lambda_min > 0
    p, info = trust_region_step(h, g, 30.0, k=10, probes=40)
    exact, damping, kind = trust_region_dense(h, g, 30.0)
    assert info.kind == kind == "hard"
    assert abs(info.lambda_min + 1) <= 1e-6
    assert abs(value(h, g, p) - value(h, g, exact)) <= 1e-3 * abs(value(h, g, exact))
    assert value(h, g, p) < 0.5 * value(h, g, blind)
    assert abs(info.damping - damping) <= 1e-6


def test_an_invariant_space_does_not_end_the_search(rng):
    """g meets two eigenspaces only; the rest of the space is found in a random direction."""
    h, v = matrix(rng, [-1.0, -1.0, 2.0, 2.0, 3.0, 3.0])
    g = v[:, 2] + v[:, 4]
    p, info = trust_region_step(h, g, 9.0)
    assert info.kind == "hard"
    check_minimum(h, g, 9.0, p, info)


def test_vectors_on_a_grid_and_batches(rng):
    h = np.stack([matrix(rng, SPECTRA[kind])[0] for kind in ("indefinite", "definite", "singular")])
    g, radius = rng.standard_normal((3, 7)), np.asarray([0.1, 20.0, 3.0])
    p, info = trust_region_step(h, g, radius)
    assert info.kind == ["boundary", "interior", "boundary"]
    for i in range(3):
        one, alone = trust_region_step(h[i], g[i], radius[i])
        assert np.linalg.norm(p[i] - one) <= 1e-13 * max(1, np.linalg.norm(one))
        assert abs(info.damping[i] - alone.damping) <= 1e-13
    shared, _ = trust_region_step(operators.dense(h, self_adjoint=True), g[0], 0.5)
    assert shared.shape == (3, 7)
    assert np.linalg.norm(shared[2] - trust_region_step(h[2], g[0], 0.5)[0]) <= 1e-13
    d, b = rng.standard_normal((4, 5)), rng.standard_normal((4, 5))
    q, info = trust_region_step(operators.diagonal(d, (4, 5)), b, 0.5)
    exact, _, _ = trust_region_dense(np.diag(d.ravel()), b.ravel(), 0.5)
    assert q.shape == (4, 5)
    assert np.linalg.norm(q.ravel() - exact) <= 1e-12


def test_one_bad_item_leaves_the_others_alone(rng):
    h = np.stack([matrix(rng, SPECTRA["indefinite"])[0]] * 5)
    g, radius = rng.standard_normal((5, 7)), np.ones(5)
    good, _ = trust_region_step(h, g, radius)
    bad_h, bad_g, bad_r = h.copy(), g.copy(), radius.copy()
    bad_h[0, 1, 2] = np.nan
    bad_g[1, 0], bad_g[2, 0] = np.inf, np.nan
    bad_r[3] = -1.0
    p, info = trust_region_step(bad_h, bad_g, bad_r, throw=False)
    assert np.isnan(p[:4]).all()
    assert np.array_equal(p[4], good[4])
    assert list(info.converged) == [False] * 4 + [True]
    with pytest.raises(ddnref.NonFiniteError, match=r"items 0, 1, 2 of 5"):
        trust_region_step(bad_h, bad_g, radius)
    with pytest.raises(ValueError, match=r"radius is not a positive finite number \(item 3 of 5\)"):
        trust_region_step(h, g, bad_r)


# --- networks --------------------------------------------------------------------------------------------------------


def small(rng, **options):
    chain, x, t = network(rng, 3, 4, 5, **options)
    return chain, x, t, dense_hessian(chain, x, t), chain.flatten(chain.gradient(x, t))


@pytest.mark.parametrize("model", ["exact", "absolute"])
@pytest.mark.parametrize("radius", [0.01, 0.3, 5.0])
def test_a_factored_hessian_gives_the_dense_answer(radius, model, rng):
    chain, x, t, h, g = small(rng, bias=True)
    exact, damping, kind = trust_region_dense(h, g, radius, absolute=model == "absolute")
    lowest = -np.linalg.eigvalsh(h)[0]
    for epsilon, k in ((1.5 * lowest, h.shape[0]), (0.3 * lowest, h.shape[0]), (1.5 * lowest, 16)):
        factor = curvature.hessian_factor(chain, x, t, damping=float(epsilon))
        p, info = trust_region_step(factor, chain.gradient(x, t), radius, k=k, model=model)
        assert [a.shape for a in p] == [a.shape for a in chain.params]
        if k == 16 and model == "absolute":  # |H| of a small space is another matrix
            continue
        rtol = 1e-11 if k == h.shape[0] else 1e-4
        assert np.linalg.norm(chain.flatten(p) - exact) <= rtol * np.linalg.norm(exact)
        assert info.kind == kind
        assert abs(info.damping - damping) <= rtol * lowest
        again, _ = info.retry(radius / 2)
        assert abs(np.linalg.norm(chain.flatten(again)) - radius / 2) <= 1e-12 * radius
    # Lanczos on the operator of products is the same problem.
    q, _ = trust_region_step(chain.hessian_operator(x, t), g, radius, k=h.shape[0], model=model)
    assert np.linalg.norm(q - exact) <= 1e-10 * np.linalg.norm(exact)


def test_solves_find_the_smallest_eigenvalue_sooner_than_products(rng):
    chain, x, t, h, _ = small(rng)
    g = chain.gradient(x, t)
    lowest = np.linalg.eigvalsh(h)[0]
    factor = curvature.hessian_factor(chain, x, t, damping=float(-1.2 * lowest))
    _, by_solves = trust_region_step(factor, g, 0.3, k=5)
    _, by_products = trust_region_step(chain.hessian_operator(x, t), chain.flatten(g), 0.3, k=5)
    errors = [float(info.lambda_min - lowest) for info in (by_solves, by_products)]
    assert -1e-12 <= errors[0] < 0.01 * errors[1]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("extra", [0.0, 0.1])
def test_a_gram_matrix_gives_the_dense_answer(loss, extra, rng):
    """A part of g outside the range of G, as weight decay makes it, has no curvature."""
    chain = networks.Chain.mlp(4, 5, 3, 3, loss=loss)
    x = rng.standard_normal((6, 4))
    t = rng.integers(0, 3, 6) if loss == "cross_entropy" else rng.standard_normal((6, 3))
    reducer = curvature.ggn_reducer(chain, gradient=False)
    ggn = reducer.finalise(reducer.update(reducer.init(), x, t))
    g = [a + extra * p for a, p in zip(chain.gradient(x, t), chain.params, strict=True)]
    h = dense_hessian(chain, x, t, "ggnvp")
    for radius in (0.05, 0.5, 1e4):
        p, info = trust_region_step(ggn, g, radius)
        exact, damping, _ = trust_region_dense(h, chain.flatten(g), radius)
        # In the interior the eigenvalues of G, right to eps of the largest one, limit the step.
        limit = 1e-6 if radius == 1e4 and not extra else 1e-9
        assert np.linalg.norm(chain.flatten(p) - exact) <= limit * np.linalg.norm(exact)
        assert info.kind == ("interior" if radius == 1e4 and not extra else "boundary")
        assert abs(info.damping - damping) <= 1e-9
        assert abs(info.predicted + value(h, chain.flatten(g), chain.flatten(p))) <= 1e-8 * float(info.predicted)
        assert info.n_products == 0
        again, _ = info.retry(radius / 4)
        fresh, _ = trust_region_step(ggn, g, radius / 4)
        assert np.array_equal(chain.flatten(again), chain.flatten(fresh))


def test_operators_of_a_network(rng):
    chain, x, t, h, g = small(rng, bias=True)
    eye = np.eye(len(h))
    a, b = chain.hessian_operator(x, t), chain.ggn_operator(x, t)
    assert np.max(np.abs(a(eye) - h)) <= 1e-14
    assert np.max(np.abs(a.prepared()(eye) - h)) <= 1e-14
    assert np.max(np.abs(b(eye) - dense_hessian(chain, x, t, "ggnvp"))) <= 1e-14
    assert np.max(np.abs(b.prepared()(eye) - b(eye))) <= 1e-15
    assert a(eye.reshape(len(h), 1, 1, -1)).shape == (len(h), 1, 1, len(h))
    assert np.max(np.abs(a(eye + 2j * eye) - (1 + 2j) * h)) <= 1e-13
    moved = [p + 0.1 for p in chain.params]
    other = chain.with_params(moved)
    assert np.max(np.abs(a.with_params(*moved)(eye) - dense_hessian(other, x, t))) <= 1e-14
    assert np.array_equal(chain.flatten(chain.unflatten(g)), g)
    assert np.array_equal(chain.flatten(chain.unflatten(np.stack([g, g]))), np.stack([g, g]))
    with pytest.raises(TypeError, match="third derivatives"):
        a.params_vjp(a.params, g, g)
    with pytest.raises(ValueError, match="out of range"):
        chain.hessian_operator(x, t + 7)
    assert np.isnan(chain.hessian_operator(x, t + 7, throw=False)(g)).all()
    with pytest.raises(ValueError, match="vectors has shape"):
        chain.unflatten(g[1:])
    with pytest.raises(TypeError, match="float32"):
        a(g.astype(np.float32))


def test_a_factor_as_an_operator(rng):
    chain, x, t, h, g = small(rng, bias=True)
    factor = curvature.hessian_factor(chain, x, t, damping=0.7)
    damped, eye = h + 0.7 * np.eye(len(h)), np.eye(len(h))
    assert np.max(np.abs(factor.as_operator()(eye) - damped)) <= 1e-13
    inverse = factor.as_operator(inverse=True)
    assert np.max(np.abs(inverse(eye) - np.linalg.inv(damped))) <= 1e-12 * np.linalg.cond(damped)
    assert np.max(np.abs(inverse(eye) - inverse(eye.T).T)) <= 1e-12
    (w, _), _ = ddnref.eigsh(inverse, 1, which="LM")
    assert np.min(np.abs(1 / w - 0.7 - np.linalg.eigvalsh(h))) <= 1e-10
    with pytest.raises(TypeError, match="hessian_factor"):
        inverse.with_params(*(p + 1 for p in chain.params))(g)
    with pytest.raises(TypeError, match="third derivatives"):
        inverse.params_vjp(inverse.params, g, g)


# --- the gradient ----------------------------------------------------------------------------------------------------


def first(*args, **options):
    return trust_region_step(*args, **options)[0]


def cotangents(*args, **options):
    return trust_region_step_vjp(*args, **options)[0]


@pytest.mark.parametrize(("kind", "radius"), [
    ("indefinite", 0.3), ("indefinite", 3.0), ("negative", 1.0), ("definite", 0.5), ("definite", 100.0),
    ("singular", 0.5), ("zero", 1.0), ("indefinite, repeated", 0.7),
])  # fmt: skip
def test_the_gradient_is_right(kind, radius, rng):
    h, _ = matrix(rng, SPECTRA[kind])
    g = rng.standard_normal(7)
    check = partial(ddnref.testing.assert_vjp, needs=(0, 1, 2), rtol=1e-8)
    check(first, cotangents, h, g, np.asarray(radius), tangent=("symmetric", "dense", "dense"), symmetrises=True)

    def of_operator(m, g, r):
        return first(operators.dense(m, self_adjoint=True), g, r)

    def cotangents_of_operator(p_bar, p, m, g, r):
        (m_bar,), *rest = cotangents(p_bar, p, operators.dense(m, self_adjoint=True), g, r)
        return ((m_bar + m_bar.T) / 2, *rest)

    check(of_operator, cotangents_of_operator, h, g, np.asarray(radius), tangent=("symmetric", "dense", "dense"))


def test_the_gradient_of_batches_and_shared_inputs(rng):
    h = np.stack([matrix(rng, SPECTRA["indefinite"])[0], matrix(rng, SPECTRA["definite"])[0]])
    g, r = rng.standard_normal((2, 7)), np.asarray([0.5, 60.0])
    check = partial(ddnref.testing.assert_vjp, first, cotangents, needs=(0, 1, 2), rtol=1e-8)
    check(h, g, r, tangent=("symmetric", "dense", "dense"))
    check(h, g, np.asarray(0.8), tangent=("symmetric", "dense", "dense"))

    def diagonal(d, g, r):
        return first(operators.diagonal(d), g, r)

    def of_diagonal(p_bar, p, d, g, r):
        (d_bar,), *rest = cotangents(p_bar, p, operators.diagonal(d), g, r)
        return (d_bar, *rest)

    check = partial(ddnref.testing.assert_vjp, diagonal, of_diagonal, needs=(0, 1, 2), rtol=1e-8)
    check(np.asarray([-1.0, 2.0, 3.0]), rng.standard_normal((2, 3)), np.asarray([0.5, 0.1]))
    grid = np.asarray([[-1.0, 2.0], [3.0, 0.5]])

    def on_grid(d, g, r):
        return first(operators.diagonal(d, (2, 2)), g, r)

    def of_grid(p_bar, p, d, g, r):
        (d_bar,), *rest = cotangents(p_bar, p, operators.diagonal(d, (2, 2)), g, r)
        return (d_bar, *rest)

    check = partial(ddnref.testing.assert_vjp, on_grid, of_grid, needs=(0, 1, 2), rtol=1e-8)
    check(grid, rng.standard_normal((2, 2)), np.asarray(0.5))


@pytest.mark.parametrize("radius", [0.1, 1.0])
def test_the_gradient_through_a_factored_hessian(radius, rng):
    chain, x, t, h, _ = small(rng)
    g, epsilon = chain.gradient(x, t), float(-1.2 * np.linalg.eigvalsh(h)[0])
    factor = curvature.hessian_factor(chain, x, t, damping=epsilon)
    p, _ = trust_region_step(factor, g, radius, k=len(h))
    p_bar = [rng.standard_normal(a.shape) for a in p]
    (g_bar, radius_bar), info = trust_region_step_vjp(p_bar, p, factor, g, radius)
    dense_p, _ = trust_region_step(h, chain.flatten(g), radius, k=len(h))
    (_, exact, exact_r), _ = trust_region_step_vjp(chain.flatten(p_bar), dense_p, h, chain.flatten(g), radius)
    assert info.converged
    assert np.linalg.norm(chain.flatten(g_bar) - exact) <= 1e-9 * np.linalg.norm(exact)
    assert abs(radius_bar - exact_r) <= 1e-9 * abs(exact_r)


def test_a_wrong_gradient_is_noticed(rng, monkeypatch):
    """Mutation controls: without μ, or with another sign, the checks above fail."""
    h, _ = matrix(rng, SPECTRA["indefinite"])
    g, r = rng.standard_normal(7), np.asarray(0.5)
    right = _trust_region._adjoint

    def without_mu(point, x, solved, throw):
        return right(point._replace(boundary=point.boundary & False), x, solved, throw)

    monkeypatch.setattr(_trust_region, "_adjoint", without_mu)
    report = ddnref.testing.check_vjp(
        first, cotangents, h, g, r, needs=(0, 1, 2), tangent=("symmetric", "dense", "dense")
    )
    assert not report.passed


def test_where_no_gradient_exists(rng):
    h, v = matrix(rng, [-2.0, 0.5, 1.0, 3.0])
    g, bar = v[:, 1:] @ np.asarray([1.0, -1.0, 0.5]), rng.standard_normal(4)
    operator = operators.dense(h, self_adjoint=True)
    p, info = trust_region_step(h, g, 5.0)
    assert info.kind == "hard"
    for a in (h, operator):
        with pytest.raises(ddnref.GaugeError, match="hard case"):
            trust_region_step_vjp(bar, p, a, g, 5.0)
        (a_bar, g_bar, radius_bar), info = trust_region_step_vjp(bar, p, a, g, 5.0, throw=False)
        assert np.isnan(g_bar).all()
        assert np.isnan(radius_bar)
        assert np.isnan(a_bar[0]).all()
        assert not info.converged
    # The unconstrained minimum lies exactly on the boundary.
    definite = np.diag([1.0, 2.0])
    with pytest.raises(ddnref.GaugeError, match="kink"):
        trust_region_step_vjp(bar[:2], np.asarray([-0.6, -0.8]), definite, np.asarray([0.6, 1.6]), 1.0)
    singular, inside = np.diag([0.0, 1.0, 2.0]), np.asarray([0.0, 1.0, 1.0])
    p, _ = trust_region_step(singular, inside, 9.0)
    for a in (singular, operators.dense(singular, self_adjoint=True)):
        with pytest.raises(ddnref.SingularError, match="inside the region"):
            trust_region_step_vjp(bar[:3], p, a, inside, 9.0)


def test_a_point_that_is_no_minimum_is_refused(rng):
    h, _ = matrix(rng, SPECTRA["indefinite"])
    g, bar = rng.standard_normal(7), rng.standard_normal(7)
    p, _ = trust_region_step(h, g, 1.0)
    poor, _ = trust_region_step(h, g, 1.0, k=2)
    turned, _ = trust_region_step(h, g, 1.0, model="absolute")
    # A stationary point on the sphere with a negative multiplier: the maximum there.
    highest, _ = trust_region_step(-h, -g, 1.0)
    for point in (poor, turned, highest, 2 * p, 0 * p, 0.5 * p, np.nan * p):
        for a in (h, operators.dense(h, self_adjoint=True)):
            with pytest.raises(ddnref.OptimalityError, match="not a minimum"):
                trust_region_step_vjp(bar, point, a, g, 1.0)
    # A saddle inside the region satisfies H p = −g, with an indefinite H.
    saddle = np.linalg.solve(h, -g)
    for a in (h, operators.dense(h, self_adjoint=True)):
        with pytest.raises(ddnref.OptimalityError, match="not a minimum"):
            trust_region_step_vjp(bar, saddle, a, g, 100.0)
    trust_region_step_vjp(bar, poor, h, g, 1.0, check_rtol=10.0, throw=False)


# --- libraries and precision -----------------------------------------------------------------------------------------


def problem(rng, dtype=float):
    h = np.stack([matrix(rng, SPECTRA[kind])[0] for kind in ("indefinite", "definite", "singular")])
    return tuple(z.astype(dtype) for z in (h, rng.standard_normal((3, 7)), np.asarray([0.3, 40.0, 1.0])))


def everything(h, g, radius, p_bar):
    p, info = trust_region_step(h, g, radius, k=5, rtol=0, throw=False)
    q, absolute = trust_region_step(h, g, radius, model="absolute", throw=False)
    s, _ = info.retry(radius / 3, throw=False)
    full, _ = trust_region_step(h, g, radius, throw=False)
    bars, state = trust_region_step_vjp(p_bar, full, h, g, radius, throw=False)
    return p, q, s, info.damping, info.predicted, info.boundary, absolute.lambda_min, *bars, state.damping


@pytest.mark.parametrize("kind", [np.asarray, lambda h: operators.dense(h, self_adjoint=True)])
def test_batches_without_items(kind):
    a, g = kind(np.zeros((0, 5, 5))), np.zeros((0, 5))
    p, info = trust_region_step(a, g, 1.0, k=3)
    (_, g_bar, *_), _ = trust_region_step_vjp(p, p, a, g, 1.0)
    assert p.shape == g_bar.shape == g.shape
    assert info.converged.shape == (0,)


def test_every_library_agrees(xp, rng):
    arrays = (*problem(rng), rng.standard_normal((3, 7)))
    expected = everything(*arrays)
    found = xp.lift(everything)(*arrays)
    for a, b in zip(expected, found, strict=True):
        assert np.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_every_library_agrees_on_a_network(xp, rng):
    chain, x, t, h, g = small(rng)
    other = chain.from_arrays([xp.asarray(p) for p in chain.params])
    a = other.hessian_operator(xp.asarray(x), xp.asarray(t))
    p, info = trust_region_step(a, xp.asarray(g), 0.5, k=12)
    q, _ = trust_region_step(chain.hessian_operator(x, t), g, 0.5, k=12)
    assert np.max(np.abs(xp.numpy(p) - q)) <= 1e-10
    assert info.kind == "boundary"
    gradient = [xp.asarray(z) for z in chain.gradient(x, t)]
    factor = curvature.hessian_factor(other, xp.asarray(x), xp.asarray(t), damping=5.0)
    reducer = curvature.ggn_reducer(other)
    ggn = reducer.finalise(reducer.update(reducer.init(), xp.asarray(x), xp.asarray(t)))
    for source in (factor, ggn):
        found, _ = trust_region_step(source, gradient, 0.5, k=8)
        assert abs(np.linalg.norm(np.concatenate([xp.numpy(z).ravel() for z in found])) - 0.5) <= 1e-12
    p, _ = trust_region_step(factor, gradient, 0.5, k=len(h))
    (g_bar, _), _ = trust_region_step_vjp(gradient, p, factor, gradient, 0.5)
    assert len(g_bar) == len(gradient)


def test_an_operator_under_jit(jax, rng):
    h, g, radius = (z[0] for z in problem(rng))
    bar = rng.standard_normal(7)

    def both(h, g, radius, bar):
        a = operators.dense(h, self_adjoint=True)
        p, info = trust_region_step(a, g, radius, throw=False)
        bars, _ = trust_region_step_vjp(bar, p, a, g, radius, throw=False, while_loop=jax.lax.while_loop)
        return p, info, bars

    p, info, ((h_bar,), g_bar, radius_bar) = jax.jit(both)(*map(jax.numpy.asarray, (h, g, radius, bar)))
    q, _ = trust_region_step(h, g, radius)
    (_, exact, exact_r), _ = trust_region_step_vjp(bar, q, h, g, radius)
    assert np.allclose(p, q, atol=1e-12)
    assert info.kind == "boundary"
    assert np.allclose(g_bar, exact, atol=1e-9)
    assert np.allclose(radius_bar, exact_r, atol=1e-9)
    assert np.all(np.isfinite(h_bar))


def test_nothing_is_read_on_the_host_without_throw(host_reads, second, rng):
    arrays = [second.asarray(z) for z in (*problem(rng), rng.standard_normal((3, 7)))]
    host_reads.clear()
    everything(*arrays)
    assert host_reads == []


def test_single_precision(rng):
    arrays = problem(rng)
    p, info = trust_region_step(*arrays)
    q, single = trust_region_step(*(z.astype(np.float32) for z in arrays))
    assert q.dtype == single.damping.dtype == single.predicted.dtype == np.float32
    assert np.max(np.abs(p - q)) <= 1e-4 * np.max(np.abs(p))
    assert single.kind == info.kind
    bar = rng.standard_normal((3, 7))
    exact = cotangents(bar, p, *arrays)
    found = cotangents(bar.astype(np.float32), q, *(z.astype(np.float32) for z in arrays))
    for a, b in zip(exact, found, strict=True):
        assert b.dtype == np.float32
        assert np.max(np.abs(a - b)) <= 1e-3 * np.max(np.abs(a))
    chain, x, t, _, _ = small(rng)
    chain = chain.from_arrays([z.astype(np.float32) for z in chain.params])
    x = x.astype(np.float32)
    g = chain.gradient(x, t)
    step, info = trust_region_step(curvature.hessian_factor(chain, x, t, damping=5.0), g, 0.5)
    assert step[0].dtype == np.float32
    (g_bar, radius_bar), _ = trust_region_step_vjp(g, step, curvature.hessian_factor(chain, x, t, damping=5.0), g, 0.5,
                                                   check_rtol=1e-2)  # fmt: skip
    assert g_bar[0].dtype == radius_bar.dtype == np.float32


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input(rng):
    h, g = np.eye(3), np.ones(3)
    chain, x, t, _, _ = small(rng)
    grad = chain.gradient(x, t)
    factor = curvature.hessian_factor(chain, x, t, damping=1.0)
    reducer, grouped = curvature.ggn_reducer(chain), curvature.ggn_reducer(chain, groups=[[0], [1]])
    ggn = reducer.finalise(reducer.update(reducer.init(), x, t))
    groups = grouped.finalise(grouped.update(grouped.init(), x, t))
    negative = ggn._replace(grams=(ggn.grams[0] - np.eye(ggn.grams[0].shape[0]),))
    nan = [a * np.nan for a in grad]
    for arguments, options, error, match in [
        ((h, g, 0.0), {}, ValueError, "radius is 0.0, expected more than 0"),
        ((h, g, -1), {}, ValueError, "radius is -1.0, expected more than 0"),
        ((h, g, np.inf), {}, ValueError, "radius is inf"),
        ((h, g, np.nan), {}, ValueError, "radius is nan"),
        ((h, g, np.asarray(0.0)), {}, ValueError, "radius is not a positive finite number"),
        ((h, g, np.ones(2)), {}, ValueError, r"radius has shape \(2,\)"),
        ((h, g, None), {}, TypeError, "radius is None"),
        ((h, g, 1j * np.ones(())), {}, TypeError, "complex|defined for real"),
        ((h, g * np.nan, 1.0), {}, ddnref.NonFiniteError, "not finite"),
        ((h, np.asarray([np.inf, 0, 0]), 1.0), {}, ddnref.NonFiniteError, "not finite"),
        ((h * np.nan, g, 1.0), {}, ddnref.NonFiniteError, "not finite"),
        ((factor, nan, 1.0), {}, ddnref.NonFiniteError, "NaN"),
        ((ggn, nan, 1.0), {}, ddnref.NonFiniteError, "not finite"),
        ((h, np.ones(4), 1.0), {}, ValueError, r"g has shape \(4,\)"),
        ((np.ones((2, 3)), g, 1.0), {}, ValueError, "square|shape"),
        ((operators.dense(h), g, 1.0), {}, ValueError, "self-adjoint"),
        ((h, g.astype(np.float32), 1.0), {}, TypeError, "precision"),
        ((h + 0j, g + 0j, 1.0), {}, TypeError, "real arrays only"),
        (("h", g, 1.0), {}, TypeError, "a is a str"),
        ((chain, grad, 1.0), {}, TypeError, "a is a Chain"),
        ((factor, grad[1:], 1.0), {}, ValueError, "g has 2 arrays"),
        ((factor, [np.stack([a, a]) for a in grad], 1.0), {}, ValueError, "several vectors"),
        ((ggn, grad[1:], 1.0), {}, ValueError, "g has 2 arrays"),
        ((groups, grad, 1.0), {}, ValueError, "groups"),
        ((negative, grad, 1.0), {}, ValueError, "no negative one"),
        ((h, g, 1.0), {"model": "saddle"}, ValueError, "model is 'saddle'"),
        ((h, g, 1.0), {"k": 0}, ValueError, "k is 0"),
        ((h, g, 1.0), {"k": 2.5}, TypeError, "k is 2.5"),
        ((h, g, 1.0), {"probes": -1}, ValueError, "probes is -1"),
        ((h, g, 1.0), {"rtol": -1.0}, ValueError, "rtol"),
    ]:
        with pytest.raises(error, match=match):
            raise AssertionError((match, trust_region_step(*arguments, **options)))
    p, _ = trust_region_step(h, g, 1.0)
    for arguments, options, error, match in [
        ((p, p, ggn, grad, 1.0), {}, TypeError, "ggn_operator"),
        ((p[:2], p, h, g, 1.0), {}, ValueError, "p_bar has shape"),
        ((np.stack([p, p]), p, h, g, 1.0), {}, ValueError, "p_bar has shape"),
        ((p, p[:2], h, g, 1.0), {}, ValueError, "p has shape"),
        ((p, p, h, g, -1.0), {}, ValueError, "radius"),
        ((p, p, h, g, 1.0), {"check_rtol": -1.0}, ValueError, "check_rtol"),
    ]:
        with pytest.raises(error, match=match):
            trust_region_step_vjp(*arguments, **options)


def test_tensors_that_require_grad_are_refused(torch):
    h, g = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match="g given to trust_region_step requires grad"):
        trust_region_step(h, g, 1.0)


def test_an_option_that_is_ignored_is_noticed(rng):
    """Each option changes the result where it should."""
    h, _ = matrix(rng, np.linspace(-2.0, 5.0, 60))
    g = rng.standard_normal(60)
    steps = [trust_region_step(h, g, 1.0, **o)[0] for o in ({}, {"k": 5}, {"model": "absolute"}, {"probes": 5, "k": 5})]
    for i, p in enumerate(steps):
        for q in steps[:i]:
            assert np.linalg.norm(p - q) > 1e-6


def test_both_orthogonalisations_are_needed(rng, monkeypatch):
    """Mutation control: with one, vectors lose their orthogonality, where products are almost parallel to them."""
    h, _ = matrix(rng, 10.0 ** np.linspace(-6, 6, 80))
    g = rng.standard_normal(80)
    exact = trust_region_step(h, g, 1.0, k=80)[1]
    assert abs(exact.lambda_min - 1e-6) <= 1e-8
    basis = exact.space.basis.q
    assert np.max(np.abs(basis @ basis.T - np.eye(80))) <= 1e-14
    calls, right = [0], _model_space.without

    def once(y, q):
        calls[0] += 1
        return right(y, q) if calls[0] % 2 else y

    monkeypatch.setattr(_model_space, "without", once)
    basis = trust_region_step(h, g, 1.0, k=80)[1].space.basis.q
    assert np.max(np.abs(basis @ basis.T - np.eye(80))) > 1e-10


def test_the_oracle_is_the_best_of_many_points(rng):
    """The dense answer itself, against random points of the ball and the conditions of a minimum."""
    for kind in SPECTRA:
        h, _ = matrix(rng, SPECTRA[kind])
        g = rng.standard_normal(7)
        p, damping, _ = trust_region_dense(h, g, 1.0)
        points = rng.standard_normal((4000, 7))
        points *= rng.uniform(0, 1, (4000, 1)) ** 0.1 / np.linalg.norm(points, axis=1, keepdims=True)
        near = p + 1e-2 * points
        near /= np.maximum(1, np.linalg.norm(near, axis=1, keepdims=True))
        values = [points @ g + np.sum(points @ h * points, axis=1) / 2, near @ g + np.sum(near @ h * near, axis=1) / 2]
        assert np.min(values) >= value(h, g, p) - 1e-12 * np.linalg.norm(h, 2)
        assert np.linalg.norm(h @ p + damping * p + g) <= 1e-9 * np.linalg.norm(h, 2)


def test_flatten_of_lists_is_what_the_tests_use(rng):
    chain, _, _, _, g = small(rng)
    assert np.array_equal(flatten([z[None] for z in chain.unflatten(g)])[0], g)
