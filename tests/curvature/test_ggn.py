"""The GGN through its Gram matrix, against the dense matrix from explicit Jacobians."""

import math

import numpy as np
import pytest
from network_problems import block_arrays, block_chain, dense, flat, random_chain, targets, unit_vectors

from ddnref import NonFiniteError, SingularError, curvature, networks
from ddnref.reference import ggn_dense_derivatives, ggn_dense_newton, ggn_power_iteration, network_ggn

LOSSES = ("cross_entropy", "mse", "bce")
EXACT = 1e-10


def problem(rng, loss="cross_entropy", n=6, **options):
    chain = random_chain(rng, loss, **options)
    return chain, rng.standard_normal((n, 4)), targets(rng, loss, n, 3)


def on(xp, chain, x, t):
    """The same problem on another library."""
    moved = networks.Chain(
        [networks.Dense(xp.asarray(z.weight), None if z.bias is None else xp.asarray(z.bias), z.activation)
         for z in chain.layers],
        "cross_entropy" if t.ndim == 1 else "mse", chain.reduction,
    )  # fmt: skip
    return moved, xp.asarray(x), xp.asarray(t)


def blocks(rng, n=5):
    """Convolution, residual, frozen, dense layers."""
    return block_chain(block_arrays(rng)), rng.standard_normal((n, 1, 4, 5)), rng.integers(0, 3, n)


def error(got, expected):
    scale = np.max(np.abs(expected))
    return np.max(np.abs(got - expected)) / (scale if scale else 1.0)


def aligned(v, reference):
    """Rows with the signs of others."""
    return v * np.sign(np.sum(v * reference, axis=-1, keepdims=True))


def leading(g, k):
    w, v = np.linalg.eigh(g)
    return w[::-1][:k], v[:, ::-1][:, :k].T


# --- against the dense matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_everything_against_the_dense_matrix(loss, bias, reduction, rng):
    chain, x, t = problem(rng, loss, bias=bias, reduction=reduction)
    k = 5
    w, v, first, second = ggn_dense_derivatives(chain, x, t, k)
    all_values = np.linalg.eigvalsh(network_ggn(chain, x, t))[::-1]
    got = curvature.ggn_eigvalsh(chain, x, t)
    assert got.shape == (min(len(all_values), 6 * (2 if loss == "cross_entropy" else 3)),)
    assert error(got, all_values[: len(got)]) <= EXACT
    assert np.all(np.abs(all_values[len(got) :]) <= EXACT * all_values[0]), "the others are zero"
    got_w, got_v = curvature.ggn_eigh(chain, x, t, k=k)
    assert [a.shape for a in got_v] == [(k, *p.shape) for p in chain.params]
    got_v = flat(got_v, (k,))
    signs = np.sign(np.sum(got_v * v.T, axis=-1))
    assert error(got_w, w) <= EXACT
    assert error(got_v * signs[:, None], v.T) <= EXACT
    derivatives = curvature.ggn_directional_derivatives(chain, x, t, k=k)
    signs = np.sign(np.sum(derivatives.first * first, axis=0))
    assert error(derivatives.w, w) <= EXACT
    assert error(derivatives.first * signs, first) <= EXACT
    assert error(derivatives.second, second) <= EXACT
    assert (
        error(
            flat(curvature.ggn_damped_newton(chain, x, t, k=k, damping=0.3)),
            ggn_dense_newton(chain, x, t, k, 0.3),
        )
        <= EXACT
    )


def test_on_every_library(xp, rng):
    """All functions from traced weights; JAX compiles them once."""
    chain, x, t = problem(rng)
    there = on(xp, chain, x, t)
    some = {"subsampling": [0, 2, 3], "mc_samples": 2, "groups": [[0, 1], [3, 4]]}

    def everything(chain, x, t):
        reducer = curvature.ggn_reducer(chain, throw=False)
        ggn = reducer.finalise(reducer.update(reducer.init(), x, t))
        options = {"k": 3, "method": "full", "throw": False}
        step = curvature.ggn_damped_newton(chain, x, t, damping=0.5, method="full", throw=False, **some)
        derivatives = curvature.ggn_directional_derivatives(ggn, **options)
        return curvature.ggn_eigvalsh(ggn), *curvature.ggn_eigh(ggn, **options), derivatives, step

    traced = xp.jit(lambda params, x, t: everything(there[0].with_params(list(params)), x, t))
    w, top, v, derivatives, step = traced(tuple(there[0].params), *there[1:])
    w_here, top_here, v_here, derivatives_here, step_here = everything(chain, x, t)
    assert error(xp.numpy(w), w_here) <= EXACT
    assert error(xp.numpy(top), top_here) <= EXACT
    v_here = flat(v_here, (3,))
    assert error(aligned(flat(xp.tuple(v), (3,)), v_here), v_here) <= EXACT
    assert error(np.abs(xp.numpy(derivatives.first)), np.abs(derivatives_here.first)) <= EXACT
    assert error(xp.numpy(derivatives.second), derivatives_here.second) <= EXACT
    assert error(flat(xp.tuple(step)), flat(step_here)) <= EXACT


@pytest.mark.parametrize("by_pairs", [True, False])
def test_convolutions_residuals_and_frozen_layers(by_pairs, monkeypatch, rng):
    chain, x, t = blocks(rng)
    if not by_pairs:
        monkeypatch.setattr("ddnref.curvature.ggn._columns._cross_positions", curvature.ggn._columns._cross_channels)
        monkeypatch.setattr("ddnref.curvature.ggn._columns.EXPLICIT_NUMBERS", 1)
    else:
        monkeypatch.setattr("ddnref.curvature.ggn._columns._cross_channels", curvature.ggn._columns._cross_positions)
    check_blocks(chain, x, t)


def check_blocks(chain, x, t):
    g = dense(chain.ggnvp, chain, x, t)
    n = curvature.ggn_eigvalsh(chain, x, t).shape[0]
    assert error(curvature.ggn_eigvalsh(chain, x, t), leading(g, n)[0]) <= EXACT
    w, v = curvature.ggn_eigh(chain, x, t, k=4)
    expected = leading(g, 4)
    assert error(w, expected[0]) <= EXACT
    assert error(aligned(flat(v, (4,)), expected[1]), expected[1]) <= EXACT
    gradients = flat(chain.per_sample_gradients(x, t), (x.shape[0],))
    derivatives = curvature.ggn_directional_derivatives(chain, x, t, k=4)
    assert error(np.abs(derivatives.first), np.abs(gradients @ expected[1].T)) <= EXACT
    slope = expected[1] @ flat(chain.gradient(x, t))
    step = -(slope / (expected[0] + 0.1)) @ expected[1]
    assert error(flat(curvature.ggn_damped_newton(chain, x, t, k=4, damping=0.1)), step) <= EXACT


def test_a_layer_that_a_user_defines(rng):
    scale = networks.Layer(
        (rng.standard_normal(5), rng.standard_normal(5)),
        forward=lambda p, x: (p[0] * x + p[1], x),
        vjp=lambda p, x, y_bar: ((np.sum(y_bar * x, axis=0), np.sum(y_bar, axis=0)), p[0] * y_bar),
        jvp=lambda p, x, p_dot, x_dot: p_dot[0] * x + p_dot[1] + p[0] * x_dot,
    )
    layers = [
        networks.Dense(rng.standard_normal((5, 4)), activation="tanh"),
        scale,
        networks.Dense(rng.standard_normal((3, 5))),
    ]
    chain = networks.Chain(layers, "cross_entropy")
    check_blocks(chain, rng.standard_normal((6, 4)), rng.integers(0, 3, 6))
    chain = networks.Chain([scale, networks.Dense(rng.standard_normal((3, 5)))], "mse")
    check_blocks(chain, rng.standard_normal((6, 5)), rng.standard_normal((6, 3)))


def test_leading_curvature_without_any_matrix(rng):
    chain, x, t = problem(rng, n=8)
    w, v = ggn_power_iteration(chain, x, t, 2, steps=300)
    got_w, got_v = curvature.ggn_eigh(chain, x, t, k=2)
    np.testing.assert_allclose(got_w, w, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(flat(got_v, (2,)) * v.T, axis=-1)), 1, rtol=1e-5)


def test_the_seed_example():
    """Four samples, 7-5-5-3, ReLU, mean-squared error: twelve eigenvalues, the rest of the dense matrix's are zero."""
    rng = np.random.default_rng(0)
    chain = networks.Chain.mlp(7, 5, 3, 3, activation="relu", loss="mse", seed=1)
    x, t = rng.random((4, 7)), rng.random((4, 3))
    w = curvature.ggn_eigvalsh(chain, x, t)
    assert w.shape == (12,)
    assert error(w, np.linalg.eigvalsh(network_ggn(chain, x, t))[::-1][:12]) <= EXACT


@pytest.mark.parametrize("loss", LOSSES)
def test_single_precision(loss, rng):
    chain, x, t = problem(rng, loss, n=8, sizes=(4, 6, 3))
    single = [networks.Dense(*(p.astype(np.float32) for p in layer.params), layer.activation) for layer in chain.layers]
    given = networks.Chain(single, loss), x.astype(np.float32), t if t.ndim == 1 else t.astype(np.float32)
    for function in (
        curvature.ggn_eigvalsh,
        lambda *a: curvature.ggn_directional_derivatives(*a, k=2).second,
        lambda *a: np.abs(curvature.ggn_directional_derivatives(*a, k=2).first),
        lambda *a: np.abs(flat(curvature.ggn_eigh(*a, k=2)[1])),
        lambda *a: flat(curvature.ggn_damped_newton(*a, k=2, damping=0.1)),
    ):
        got = function(*given)
        assert got.dtype == np.float32
        assert error(got, function(chain, x, t)) <= 1e-5


def test_large_gram_matrices_go_through_lanczos(monkeypatch, rng):
    chain, x, t = problem(rng, n=300)
    full = curvature.ggn_eigh(chain, x, t, k=4, method="full")
    calls = []
    original = curvature.ggn._spectrum.eigsh
    monkeypatch.setattr("ddnref.curvature.ggn._spectrum.eigsh", lambda *a, **k: calls.append(k) or original(*a, **k))
    for method in ("auto", "iterative"):
        w, v = curvature.ggn_eigh(chain, x, t, k=4, method=method)
        assert error(w, full[0]) <= EXACT
        v_full = flat(full[1], (4,))
        assert error(aligned(flat(v, (4,)), v_full), v_full) <= EXACT
    assert len(calls) == 2
    monkeypatch.setattr("ddnref.curvature.ggn._spectrum.eigsh", lambda *a, **k: original(*a, **{**k, "maxiter": 0}))
    w, _ = curvature.ggn_eigh(chain, x, t, k=4)
    assert error(w, full[0]) <= EXACT, "what has not converged is computed in full"


# --- options -----------------------------------------------------------------------------------------------------


def test_groups_are_the_blocks_of_the_dense_matrix(rng):
    chain, x, t = problem(rng)
    ends = np.cumsum([0] + [p.size for p in chain.params])
    g = network_ggn(chain, x, t)
    groups = [[0], [5, 1, 2], [3]]  # a weight alone, a bias alone with others, no group for the fifth
    for i, (w, (values, v)) in enumerate(
        zip(
            curvature.ggn_eigvalsh(chain, x, t, groups=groups),
            curvature.ggn_eigh(chain, x, t, k=3, groups=groups),
            strict=True,
        )
    ):
        inside = np.concatenate([np.arange(ends[p], ends[p + 1]) for p in sorted(groups[i])])
        block = g[np.ix_(inside, inside)]
        expected = leading(block, 3)
        assert len(w) == min(12, len(inside))
        assert error(w, leading(block, len(w))[0]) <= EXACT
        assert error(values, expected[0]) <= EXACT
        assert error(aligned(flat(v, (3,)), expected[1]), expected[1]) <= EXACT
        assert [a.shape[1:] for a in v] == [chain.params[p].shape for p in sorted(groups[i])]
    step = curvature.ggn_damped_newton(chain, x, t, k=3, damping=0.2, groups=groups)
    alone = curvature.ggn_damped_newton(chain, x, t, k=3, damping=0.2, groups=[[0]])
    assert np.all(step[4] == 0)
    assert np.any(step[0])
    assert error(step[0], alone[0]) <= EXACT
    assert all(np.all(a == 0) for a in alone[1:])
    derivatives = curvature.ggn_directional_derivatives(chain, x, t, k=3, groups=groups)
    assert len(derivatives) == 3
    gradients = flat(chain.per_sample_gradients(x, t), (6,))
    inside = np.concatenate([np.arange(ends[p], ends[p + 1]) for p in (1, 2, 5)])
    expected = leading(g[np.ix_(inside, inside)], 3)[1]
    assert error(np.abs(derivatives[1].first), np.abs(gradients[:, inside] @ expected.T)) <= EXACT


def test_subsampling_is_the_chain_of_these_samples(rng):
    chain, x, t = problem(rng, n=7)
    some, others = [4, 1, 2], [0, 6]
    order = sorted(some)
    assert (
        error(
            curvature.ggn_eigvalsh(chain, x, t, subsampling=some),
            curvature.ggn_eigvalsh(chain, x[order], t[order]),
        )
        <= EXACT
    )
    got = curvature.ggn_directional_derivatives(chain, x, t, k=2, subsampling=some, subsampling_gradient=others)
    w, v, _, second = ggn_dense_derivatives(chain, x[order], t[order], 2)
    gradients = flat(chain.per_sample_gradients(x[others], t[others]), (2,))
    assert got.first.shape == (2, 2)
    assert error(np.abs(got.first), np.abs(gradients @ v)) <= EXACT
    assert error(got.second, second) <= EXACT
    got = curvature.ggn_directional_derivatives(chain, x, t, k=2, subsampling=some)
    assert got.first.shape == (7, 2)
    step = curvature.ggn_damped_newton(chain, x, t, k=2, damping=0.1, subsampling=some, subsampling_gradient=others)
    slope = flat(chain.gradient(x[others], t[others])) @ v
    assert error(flat(step), -v @ (slope / (w + 0.1))) <= EXACT


def test_monte_carlo_converges_at_the_root_of_the_samples(rng):
    chain, x, t = problem(rng, n=4, sizes=(4, 3))
    g = network_ggn(chain, x, t)

    def root_mean_square(samples, seeds=30):
        errors = []
        for seed in range(seeds):
            w, v = curvature.ggn_eigh(chain, x, t, k=min(15, 4 * samples), mc_samples=samples, seed=seed, throw=False)
            keep = np.isfinite(flat(v, (len(w),))[:, 0])
            v = flat(v, (len(w),))[keep]
            errors.append(np.linalg.norm((v.T * w[keep]) @ v - g))
        return math.sqrt(np.mean(np.square(errors)))

    few, many = root_mean_square(1), root_mean_square(16)
    assert 0.8 <= few / many / 4 <= 1.25, "16 times the samples, a quarter of the error"


@pytest.mark.parametrize("loss", LOSSES)
def test_monte_carlo_of_everything_converges(loss, rng):
    chain, x, t = problem(rng, loss, n=5, sizes=(4, 3))
    exact = curvature.ggn_damped_newton(chain, x, t, damping=0.5)
    near = curvature.ggn_damped_newton(chain, x, t, damping=0.5, mc_samples=80)
    assert error(flat(near), flat(exact)) <= 0.2
    if loss == "cross_entropy":  # the others' eigenvalues are repeated here
        second = curvature.ggn_directional_derivatives(chain, x, t, k=1).second
        assert error(curvature.ggn_directional_derivatives(chain, x, t, k=1, mc_samples=80).second, second) <= 0.2


def test_the_seed_is_used(rng):
    chain, x, t = problem(rng)
    values = [curvature.ggn_eigvalsh(chain, x, t, mc_samples=1, seed=seed) for seed in (0, 0, 1)]
    assert values[0].shape == (6,)
    assert np.array_equal(values[0], values[1])
    assert not np.allclose(values[0], values[2])


def test_damping_constant_per_direction_and_function(rng):
    chain, x, t = problem(rng)
    w, v, first, second = ggn_dense_derivatives(chain, x, t, 4)
    slope = np.mean(first, axis=0)
    delta = np.asarray([0.1, 0.2, 0.4, 0.8])
    expected = -v @ (slope / (w + delta))
    assert error(flat(curvature.ggn_damped_newton(chain, x, t, k=4, damping=delta)), expected) <= EXACT
    seen = []

    def noisy(d):
        seen.append(d)
        return np.var(d.first, axis=0) + np.var(d.second, axis=0)

    got = curvature.ggn_damped_newton(chain, x, t, k=4, damping=noisy)
    delta = np.var(first, axis=0) + np.var(second, axis=0)
    assert error(flat(got), -v @ (slope / (w + delta))) <= EXACT
    assert error(seen[0].w, w) <= EXACT


def test_newton_in_all_directions_leaves_out_those_without_curvature(rng):
    chain, x, t = problem(rng, "mse", n=4, sizes=(4, 3))
    x[3] = x[0]  # twice the same sample: rank 9
    step = flat(curvature.ggn_damped_newton(chain, x, t, damping=0.1))
    g, slope = network_ggn(chain, x, t), flat(chain.gradient(x, t))
    assert error(step, -np.linalg.solve(g + 0.1 * np.eye(len(g)), slope)) <= EXACT
    got = flat(curvature.ggn_damped_newton(chain, x, t, damping=0.0))
    assert error(got, -np.linalg.pinv(g, rcond=1e-10) @ slope) <= EXACT


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(7,), (1, 6), (2, 3, 2), (1, 1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("make", [problem, blocks])
def test_batches_give_the_whole(make, sizes, rng):
    chain, x, t = make(rng, n=7)
    ends = np.cumsum(sizes)
    batches = [(x[e - s : e], t[e - s : e]) for s, e in zip(sizes, ends, strict=True)]
    options = {"subsampling": [1, 2, 5, 6], "mc_samples": 1, "groups": [[0, 2], [1, 3]], "seed": 3}
    for given in ({}, options):
        k = 3
        whole, sharded = (
            curvature.ggn_eigvalsh(chain, x, t, **given),
            curvature.ggn_eigvalsh(chain, batches=iter(batches), **given),
        )
        assert error(np.concatenate(np.atleast_2d(sharded)), np.concatenate(np.atleast_2d(whole))) <= 1e-12
        whole = curvature.ggn_damped_newton(chain, x, t, k=k, damping=0.1, subsampling_gradient=[0, 3, 6], **given)
        sharded = curvature.ggn_damped_newton(
            chain, batches=batches, k=k, damping=0.1, subsampling_gradient=[0, 3, 6], **given
        )
        assert error(flat(sharded), flat(whole)) <= 1e-12
        whole = curvature.ggn_directional_derivatives(chain, x, t, k=k, **given)
        sharded = curvature.ggn_directional_derivatives(chain, batches=batches, k=k, **given)
        for a, b in zip(*((z,) if given == {} else z for z in (sharded, whole)), strict=True):
            assert error(np.abs(a.first), np.abs(b.first)) <= 1e-11
            assert error(a.second, b.second) <= 1e-12


def refilled(x, t, size):
    """Batches that all come in the same two buffers."""
    x_buffer, t_buffer = 0 * x[:size], 0 * t[:size]
    for start in range(0, len(x), size):
        x_buffer[...], t_buffer[...] = x[start : start + size], t[start : start + size]
        yield x_buffer, t_buffer
    x_buffer[...], t_buffer[...] = 0, 0


def images(rng, n):
    """A view of the data is what the dense layer takes."""
    layers = [networks.Flatten(), networks.Dense(rng.standard_normal((3, 6)), rng.standard_normal(3))]
    return networks.Chain(layers, "cross_entropy"), rng.standard_normal((n, 1, 2, 3)), rng.integers(0, 3, n)


def targets_as_gradient(rng, n):
    """Targets are the gradient of ``tᵀ y``, and those of the state."""
    chain, x, t = problem(rng, "mse", n=n)
    return networks.Chain(chain.layers, chain.criterion._replace(gradient=lambda y, t: t)), x, t


@pytest.mark.parametrize("make", [problem, blocks, images, targets_as_gradient])
def test_batches_may_come_in_one_buffer(make, rng):
    chain, x, t = make(rng, n=8)
    for size in (1, 2, 4):
        whole, sharded = (
            curvature.ggn_eigvalsh(chain, x, t),
            curvature.ggn_eigvalsh(chain, batches=refilled(x, t, size)),
        )
        assert error(sharded, whole) <= 1e-12
    for options in ({}, {"subsampling": [1, 2, 6]}, {"subsampling_gradient": [0, 7]}):
        options = {"k": 3, "damping": 0.1, **options}
        whole = curvature.ggn_damped_newton(chain, x, t, **options)
        sharded = curvature.ggn_damped_newton(chain, batches=refilled(x, t, 2), **options)
        assert error(flat(sharded), flat(whole)) <= 1e-12


@pytest.mark.framework("torch")
def test_batches_may_come_in_one_tensor(rng):
    import torch

    chain, x, t = problem(rng, n=8)
    layers = [networks.Dense(*(torch.from_numpy(p) for p in layer.params), layer.activation) for layer in chain.layers]
    chain, x, t = networks.Chain(layers, "cross_entropy"), torch.from_numpy(x), torch.from_numpy(t)
    sharded = curvature.ggn_eigvalsh(chain, batches=refilled(x, t, 2))
    assert error(sharded.numpy(), curvature.ggn_eigvalsh(chain, x, t).numpy()) <= 1e-12
    with pytest.raises(TypeError, match="x requires grad"):
        curvature.ggn_eigvalsh(chain, batches=[(x.requires_grad_(), t)])


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_only_files_mapped_for_reading_are_not_copied(mode, tmp_path, rng):
    chain, x, t = problem(rng)
    np.save(tmp_path / "x.npy", x)
    there = np.load(tmp_path / "x.npy", mmap_mode=mode)
    reducer = curvature.ggn_reducer(chain)
    state = reducer.update(reducer.update(reducer.init(), there[:2], t[:2]), there[2:], t[2:])
    kept = [shard.columns[0].u for shard in state.shards]
    assert [np.shares_memory(u, there) for u in kept] == [mode == "r"] * 2
    assert error(curvature.ggn_eigvalsh(reducer.finalise(state)), curvature.ggn_eigvalsh(chain, x, t)) <= 1e-12


def test_states_of_several_processes_merge_in_any_grouping(rng):
    chain, x, t = problem(rng, n=9)
    reducer = curvature.ggn_reducer(chain, mc_samples=2, seed=5)
    parts = [slice(0, 2), slice(2, 3), slice(3, 7), slice(7, 9)]
    states = [reducer.update(reducer.init(part.start), x[part], t[part]) for part in parts]
    left = reducer.merge(reducer.merge(reducer.merge(*states[:2]), states[2]), states[3])
    right = reducer.merge(states[0], reducer.merge(states[1], reducer.merge(*states[2:])))
    whole = curvature.ggn_eigvalsh(chain, x, t, mc_samples=2, seed=5)
    for state in (left, right, reducer.merge(reducer.init(), left)):
        ggn = reducer.finalise(state)
        assert error(curvature.ggn_eigvalsh(ggn), whole) <= 1e-12
        step = curvature.ggn_damped_newton(ggn, k=3, damping=1.0)
        assert (
            error(
                flat(step),
                flat(curvature.ggn_damped_newton(chain, x, t, k=3, damping=1.0, mc_samples=2, seed=5)),
            )
            <= 1e-12
        )
    with pytest.raises(ValueError, match="The first state ends before sample 2, the second begins with 3"):
        reducer.merge(states[0], states[2])


def test_one_gram_matrix_serves_all(monkeypatch, rng):
    chain, x, t = problem(rng)
    reducer = curvature.ggn_reducer(chain)
    ggn = reducer.finalise(reducer.update(reducer.init(), x, t))
    monkeypatch.setattr("ddnref.curvature.ggn._network.collect", None)
    assert error(curvature.ggn_eigvalsh(ggn), leading(network_ggn(chain, x, t), 12)[0]) <= EXACT
    assert curvature.ggn_eigh(ggn, k=2)[0].shape == (2,)
    assert curvature.ggn_directional_derivatives(ggn, k=2).first.shape == (6, 2)
    assert len(curvature.ggn_damped_newton(ggn, k=2, damping=1.0)) == 6
    with pytest.raises(TypeError, match="A Ggn holds its data and options"):
        curvature.ggn_eigvalsh(ggn, x, t)
    with pytest.raises(TypeError, match="A Ggn holds its data and options"):
        curvature.ggn_eigvalsh(ggn, groups=[[0]])


@pytest.mark.parametrize("make", [problem, blocks])
def test_a_state_is_left_as_it_was_and_can_be_sent(make, rng):
    import pickle

    chain, x, t = make(rng, n=6)
    reducer = curvature.ggn_reducer(chain, gradient=False)
    first = reducer.update(reducer.init(), x[:3], t[:3])
    sent = pickle.loads(pickle.dumps(first))
    both = reducer.update(first, x[3:], t[3:])
    assert len(first.shards) == 1
    assert len(both.shards) == 2
    assert np.array_equal(sent.blocks[0][0][0], first.blocks[0][0][0])
    merged = reducer.merge(sent, reducer.update(reducer.init(3), x[3:], t[3:]))
    assert error(curvature.ggn_eigvalsh(reducer.finalise(merged)), curvature.ggn_eigvalsh(chain, x, t)) <= 1e-12
    assert all(shard.gradient == () for shard in both.shards)
    with pytest.raises(ValueError, match="gradient=False"):
        curvature.ggn_damped_newton(reducer.finalise(both), k=1, damping=1.0)


def test_progress_is_told_after_each_batch(rng):
    chain, x, t = problem(rng)
    batches = [(x[:2], t[:2]), (x[2:], t[2:])]
    for function, options in (
        (curvature.ggn_eigvalsh, {}),
        (curvature.ggn_eigh, {"k": 1}),
        (curvature.ggn_directional_derivatives, {"k": 1}),
        (curvature.ggn_damped_newton, {"damping": 1.0}),
    ):
        for given, total in ((batches, 2), (iter(batches), None)):
            told = []
            function(chain, batches=given, progress=lambda *a, told=told: told.append(a), **options)
            assert told == [(1, total), (2, total)]


# --- bad input ---------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "eigvalsh": curvature.ggn_eigvalsh,
    "eigh": lambda *a, **k: curvature.ggn_eigh(*a, **{"k": 1, **k}),
    "derivatives": lambda *a, **k: curvature.ggn_directional_derivatives(*a, **{"k": 1, **k}),
    "newton": lambda *a, **k: curvature.ggn_damped_newton(*a, **{"k": 1, "damping": 1.0, **k}),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_bad_data(function, rng):
    chain, x, t = problem(rng)
    with pytest.raises(ValueError, match="t is out of range"):
        function(chain, x, t + 1 * (t == 2))
    with pytest.raises(TypeError, match="t has dtype"):
        function(chain, x, t.astype(np.float32))
    with pytest.raises(ValueError, match="t has shape"):
        function(chain, x, t[:-1])
    with pytest.raises(ValueError, match="no samples"):
        function(chain, x[:0], t[:0])
    with pytest.raises(ValueError, match="no batch"):
        function(chain, batches=[])
    with pytest.raises(TypeError, match="all given"):
        function(chain, x, t, batches=[(x, t)])
    with pytest.raises(TypeError, match="x and t must be given"):
        function(chain, x)
    with pytest.raises(TypeError, match="chain is a list"):
        function([1], x, t)
    x[1, 2], x[4, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"), pytest.raises(NonFiniteError, match=r"2 of 6 samples \(numbers 1, 4\)"):
        function(chain, x, t)
    with np.errstate(invalid="ignore"):
        result = function(chain, x, t, throw=False)
    while not hasattr(result, "dtype"):
        result = result[0]
    assert np.all(np.isnan(result))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_cross_entropy_of_one_output_has_no_columns(function, rng):
    layers, x = [networks.Dense(rng.standard_normal((1, 4)))], rng.standard_normal((5, 4))
    chain, t = networks.Chain(layers, "cross_entropy"), np.zeros(5, dtype=np.int64)
    for options in ({}, {"mc_samples": 2}, {"throw": False}, {"subsampling": [1, 3]}):
        with pytest.raises(ValueError, match=r'C = 1 output.*no curvature.*"bce"'):
            function(chain, x, t, **options)
    with pytest.raises(ValueError, match="no curvature"):
        function(chain, batches=[(x, t)])
    two = networks.Chain([networks.Dense(np.concatenate([layers[0].weight, np.zeros((1, 4))]))], "cross_entropy")
    expected = curvature.ggn_eigvalsh(two, x, t, groups=[[0]])[0] / 2  # logits (y, 0): opposite rows
    assert (
        error(curvature.ggn_eigvalsh(networks.Chain(layers, "bce"), x, 1.0 + np.zeros((5, 1))), expected[:4]) <= EXACT
    )


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_bad_options(function, rng):
    chain, x, t = problem(rng)
    for groups, kind, message in (
        ([[0, 1], [2, 0]], ValueError, r"groups\[1\] and groups\[0\] overlap in parameter 0"),
        ([[0], []], ValueError, r"groups\[1\] has no parameters"),
        ([], ValueError, "groups is empty"),
        ([[6]], ValueError, "names parameter 6, but chain.params has 6.*Frozen"),
        ([[-1]], ValueError, "names parameter -1"),
        ([0, 1], TypeError, r"groups\[0\] is 0, expected a list"),
        ([[chain.params[0]]], TypeError, "contains ndarray, expected positions"),
        ([[0, 0]], ValueError, "overlap in parameter 0"),
    ):
        with pytest.raises(kind, match=message):
            function(chain, x, t, groups=groups)
    for some, message in (([1, 1], "names sample 1 twice"), ([6], "names sample 6, but there are 6"),
                          ([-1], "contains -1"), ([], "subsampling is empty")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            function(chain, x, t, subsampling=some)
    with pytest.raises(TypeError):
        function(chain, x, t, subsampling=[0.5])
    with pytest.raises(ValueError, match="mc_samples is 0"):
        function(chain, x, t, mc_samples=0)


@pytest.mark.parametrize("name", ["eigh", "derivatives", "newton"])
def test_k_and_rank(name, rng):
    function = FUNCTIONS[name]
    chain, x, t = problem(rng)
    for k in (0, 13, -1):
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 <= k <= 12"):
            function(chain, x, t, k=k)
    with pytest.raises(ValueError, match="of group 1"):
        function(chain, x, t, k=9, groups=[[0], [1, 3]])
    with pytest.raises(ValueError, match="method is 'lanczos'"):
        function(chain, x, t, method="lanczos")
    x[5], t[5] = x[0], t[0]  # twice the same sample: rank 10
    function(chain, x, t, k=10)
    with pytest.raises(SingularError, match="k = 11 eigenvectors were asked for, but only 10"):
        function(chain, x, t, k=11)
    with pytest.raises(SingularError):
        function(chain, x, t, k=10, zero_rtol=0.5)
    linear = networks.Chain([networks.Dense(rng.standard_normal((3, 4)))], "mse")
    with pytest.raises(SingularError, match="all eigenvalues are zero") as caught:
        function(linear, 0 * x, np.zeros((6, 3)), k=1)
    assert "Pass k=" not in str(caught.value), "k = 0 is refused"


def test_bad_subsampling_of_gradients_and_damping(rng):
    chain, x, t = problem(rng)
    for function in (FUNCTIONS["derivatives"], FUNCTIONS["newton"]):
        with pytest.raises(ValueError, match="subsampling_gradient names sample 9"):
            function(chain, x, t, subsampling_gradient=[9])
    newton = FUNCTIONS["newton"]
    with pytest.raises(ValueError, match="expected a finite number of at least 0"):
        newton(chain, x, t, damping=-0.1)
    with pytest.raises(ValueError, match="damping is nan"):
        newton(chain, x, t, damping=float("nan"))
    with pytest.raises(ValueError, match="damping has shape"):
        newton(chain, x, t, damping=np.ones(2))
    with pytest.raises(TypeError, match="damping is a list"):
        newton(chain, x, t, damping=[1.0])
    with pytest.raises(SingularError, match="must be positive"):
        newton(chain, x, t, damping=np.asarray([-1e9]))
    assert np.all(np.isnan(newton(chain, x, t, damping=np.asarray([-1e9]), throw=False)[0]))


@pytest.mark.framework("torch")
def test_three_lines_from_torch(rng):
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    module[0].bias.requires_grad_(False)
    x, t = torch.rand(6, 4), torch.randint(0, 3, (6,))
    with pytest.raises(TypeError, match="chain is a Sequential"):
        curvature.ggn_eigvalsh(module, x, t)
    module[0].bias.requires_grad_(True)
    chain = networks.Chain.from_torch(module, loss="cross_entropy")
    w, v = curvature.ggn_eigh(chain, x, t, k=2)
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(chain.params, module.parameters(), strict=True))
    assert w.dtype == torch.float32
    assert [tuple(a.shape[1:]) for a in v] == [tuple(p.shape) for p in module.parameters()]


def test_host_reads(host_reads, rng):
    import array_api_strict as strict

    chain, x, t = problem(rng)
    layers = [networks.Dense(*(strict.asarray(p) for p in layer.params), layer.activation) for layer in chain.layers]
    there = networks.Chain(layers, "cross_entropy"), strict.asarray(x), strict.asarray(t)
    curvature.ggn_eigvalsh(*there, throw=False)
    curvature.ggn_damped_newton(*there, k=2, damping=0.1, throw=False)
    curvature.ggn_directional_derivatives(*there, k=2, throw=False)
    assert host_reads == []


# --- wrong ones must fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", ["no bias", "no slope", "one column less", "wrong factor of the mean"])
def test_a_wrong_gram_matrix_is_noticed(mutant, monkeypatch, rng):
    chain, x, t = problem(rng)
    if mutant == "no bias":
        monkeypatch.setattr("ddnref.curvature.ggn._state.choices", without_biases(curvature.ggn._state.choices))
    elif mutant == "no slope":
        monkeypatch.setattr("ddnref.curvature.ggn._columns.times", lambda y, slope: y)
    elif mutant == "one column less":
        loss = chain.criterion
        chain = networks.Chain(chain.layers, loss._replace(hessian_sqrt=lambda y, t: loss.hessian_sqrt(y, t)[..., :-1]))
    else:
        monkeypatch.setattr(networks.Chain, "scale", lambda self, n: 1 / (n + 1e-6))
    w = curvature.ggn_eigvalsh(chain, x, t)
    monkeypatch.undo()
    assert not error(w, np.linalg.eigvalsh(network_ggn(chain, x, t))[::-1][: len(w)]) <= EXACT


def without_biases(choices):
    return lambda columns, group: [(c, tuple(i for i in local if i == 0)) for c, local in choices(columns, group)]


def test_the_in_place_form_is_the_standard_one(monkeypatch, rng):
    chain, x, t = problem(rng, n=9)
    monkeypatch.setattr("ddnref._kernels.gram.ROWS", 4)
    monkeypatch.setattr("ddnref._kernels.gram.TILE", 5)
    reducer = curvature.ggn_reducer(chain, groups=[[0, 1, 2], [3], [4, 5]])
    here = reducer.update(reducer.update(reducer.init(), x[:5], t[:5]), x[5:], t[5:])
    monkeypatch.setattr("ddnref._kernels.gram.array_api_compat.is_numpy_array", lambda a: False)
    there = reducer.update(reducer.update(reducer.init(), x[:5], t[:5]), x[5:], t[5:])
    for a, b in zip(reducer.finalise(here).grams, reducer.finalise(there).grams, strict=True):
        assert np.array_equal(a, a.T)
        assert error(a, b) <= 1e-14


def test_unit_vectors_see_the_products_with_v(rng):
    """``Vᵀ`` is the transpose of ``V``, for each kind of layer."""
    for chain, x, t in (problem(rng), blocks(rng)):
        reducer = curvature.ggn_reducer(chain)
        ggn = reducer.finalise(reducer.update(reducer.init(), x, t))
        group, n = ggn.options.groups[0], ggn.grams[0].shape[0]
        v = flat(curvature.ggn._state.apply(ggn, group, np.eye(n)), (n,))
        v_t = curvature.ggn._state.adjoint(ggn, group, unit_vectors(chain.params))
        assert error(v, v_t) <= 1e-13
        assert error(v @ v.T, ggn.grams[0]) <= 1e-12


@pytest.mark.parametrize("method", ["full", "iterative"])
def test_no_eigenvalue_is_negative(method):
    """In single precision those that are zero came out as −8e-5 of 1e3, and a log-determinant as NaN."""
    rng, negative = np.random.default_rng(3), 0
    for _ in range(8):
        chain = networks.Chain(
            [networks.Dense(rng.standard_normal((o, i)).astype(np.float32)) for i, o in ((6, 20), (20, 3))], "mse"
        )
        x = np.repeat(10 * rng.standard_normal((6, 6)).astype(np.float32), 2, axis=0)
        t = rng.standard_normal((12, 3)).astype(np.float32)
        w = curvature.ggn_eigvalsh(chain, x, t)
        gram = curvature.ggn_reducer(chain).update(curvature.ggn_reducer(chain).init(), x, t).blocks[0][0][0]
        negative += int(np.sum(np.linalg.eigvalsh(gram) < 0))
        assert np.all(w >= 0)
        assert np.isfinite(np.sum(np.log(w + np.float32(1e-3) * w[0])))
        w, _ = curvature.ggn_eigh(chain, x, t, k=3 if method == "iterative" else 36, method=method, throw=False)
        assert np.all(w >= 0)
    assert negative, "the matrices show nothing"
