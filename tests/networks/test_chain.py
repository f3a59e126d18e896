"""Chains: every derivative against dense oracles that share nothing with them, and what they refuse."""

import subprocess
import sys

import numpy as np
import pytest
from network_problems import block_arrays, block_chain, dense, flat, random_chain, richardson, targets

from ddnref import curvature, networks
from ddnref.networks._activations import ACTIVATIONS
from ddnref.networks._losses import LOSSES
from ddnref.reference import network_ggn, network_hessian, network_jacobian

EPS = np.finfo(float).eps


def moved(chain, v, h):
    return chain.with_params([p + h * d for p, d in zip(chain.params, v, strict=True)])


# --- right ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_dense_oracles(activation, loss, reduction, rng):
    chain = random_chain(rng, loss, activation, reduction, bias=activation != "sin")
    x, t = rng.standard_normal((6, 4)), targets(rng, loss, 6, 3)
    j, g, h = network_jacobian(chain, x), network_ggn(chain, x, t), network_hessian(chain, x, t)
    gradient = chain.scale(6) * np.tensordot(chain.criterion.gradient(chain.output(x), t), j, 2)
    assert np.max(np.abs(flat(chain.gradient(x, t)) - gradient)) <= 1e-14 * np.max(np.abs(gradient))
    assert np.max(np.abs(dense(chain.ggnvp, chain, x, t) - g)) <= 1e-13 * np.max(np.abs(g))
    assert np.max(np.abs(dense(chain.hvp, chain, x, t) - h)) <= 1e-13 * np.max(np.abs(h))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_against_finite_differences(loss, blocks, rng):
    chain = block_chain(block_arrays(rng), loss) if blocks else random_chain(rng, loss)
    x, t = rng.standard_normal((3, 1, 5, 3) if blocks else (3, 4)), targets(rng, loss, 3, 3)
    g = chain.gradient(x, t)
    directions = [[rng.standard_normal(p.shape) for p in chain.params] for _ in range(4)]
    for v in [*directions, g]:
        v = [d / np.linalg.norm(flat(v)) for d in v]
        slope = richardson(lambda h, v=v: moved(chain, v, h).loss(x, t))
        assert abs(slope - flat(g) @ flat(v)) <= 1e-7 * np.linalg.norm(flat(g))
        hv = flat(chain.hvp(x, t, v))
        change = richardson(lambda h, v=v: flat(moved(chain, v, h).gradient(x, t)))
        assert np.max(np.abs(change - hv)) <= 1e-7
        jv = richardson(lambda h, v=v: moved(chain, v, h).output(x))
        curved = np.squeeze(chain.criterion.hessian(chain.output(x), t) @ jv[..., None], -1)
        assert abs(flat(chain.ggnvp(x, t, v)) @ flat(v) - chain.scale(3) * np.sum(jv * curved)) <= 1e-7


def test_a_wrong_second_order_product_is_noticed(rng):
    """Mutation control: what the tests above would not see if they could not fail."""

    class Mutant(networks.Dense):
        def vjp_dot(self, params, saved, *args, **kwargs):
            return super().vjp_dot(params, saved._replace(curvature=None), *args, **kwargs)

    right = random_chain(rng)
    wrong = networks.Chain([Mutant(z.weight, z.bias, z.activation) for z in right.layers], "cross_entropy")
    x, t = rng.standard_normal((6, 4)), targets(rng, "cross_entropy", 6, 3)
    h = network_hessian(right, x, t)
    assert np.max(np.abs(dense(wrong.hvp, wrong, x, t) - h)) > 1e-3 * np.max(np.abs(h))


def test_every_library_agrees(xp, rng):
    arrays, x, t = block_arrays(rng), rng.standard_normal((3, 1, 5, 3)), targets(rng, "cross_entropy", 3, 3)
    chain, other = block_chain(arrays), block_chain([xp.asarray(a) for a in arrays])
    v = [rng.standard_normal((2, *p.shape)) for p in chain.params]

    def everything(chain, x, t, v):
        records = chain.layer_derivatives(x, t, throw=False)
        return [
            *chain.gradient(x, t, throw=False),
            *chain.per_sample_gradients(x, t, throw=False),
            *chain.hvp(x, t, v, throw=False),
            *chain.ggnvp(x, t, v, throw=False),
            *(r.b for r in records),
            *(r.z_out for r in records),
            chain.loss(x, t, throw=False),
        ]

    compiled = xp.jit(lambda params, *data: everything(other.with_params(params), *data))
    theirs = compiled(other.params, xp.asarray(x), xp.asarray(t), [xp.asarray(d) for d in v])
    for a, b in zip(everything(chain, x, t, v), theirs, strict=True):
        assert a.shape == b.shape
        assert np.max(np.abs(xp.numpy(b) - a)) <= 1e-13 * max(1, np.max(np.abs(a)))


def smoothed(y, t, weight, smoothing, ignored):
    """PyTorch's documented formula, sample by sample, and what the mean divides by."""
    total = count = 0.0
    for y_n, t_n in zip(y, t, strict=True):
        if t_n != ignored:
            log_p = y_n - y_n.max() - np.log(np.sum(np.exp(y_n - y_n.max())))
            total -= (1 - smoothing) * weight[t_n] * log_p[t_n] + smoothing * np.mean(weight * log_p)
            count += weight[t_n]
    return total, count


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_smoothing_and_ignored_samples_in_every_library(reduction, xp, rng):
    weight, t = np.asarray([0.5, 3.0, 1.0]), np.asarray([0, 2, -1, 1, 1, -1])
    x, arrays = rng.standard_normal((6, 4)), [rng.standard_normal((5, 4)), rng.standard_normal((3, 5))]

    def chain(arrays, weight):
        loss = networks.cross_entropy(weight=weight, label_smoothing=0.25, ignore_index=-1)
        return networks.Chain.from_arrays(arrays, loss=loss, reduction=reduction)

    def everything(arrays, weight, x, t, throw=False):
        c = chain(arrays, weight)
        results = c.gradient, c.per_sample_gradients
        products = c.hvp, c.ggnvp
        return [c.loss(x, t, throw=throw), *(a for f in results for a in f(x, t, throw=throw)),
                *(a for f in products for a in f(x, t, c.params, throw=throw))]  # fmt: skip

    ours = everything(arrays, weight, x, t, throw=True)
    total, count = smoothed(chain(arrays, weight).output(x), t, weight, 0.25, -1)
    assert abs(ours[0] - total / (count if reduction == "mean" else 1)) <= 1e-14
    theirs = xp.jit(everything)([xp.asarray(a) for a in arrays], *map(xp.asarray, (weight, x, t)))
    for a, b in zip(ours, theirs, strict=True):
        assert np.max(np.abs(xp.numpy(b) - a)) <= 1e-14 * max(1, np.max(np.abs(a)))
    # A target out of range is NaN, and the other samples are not affected.
    bad = np.where(np.arange(6) == 3, 7, t)
    each = chain([xp.asarray(a) for a in arrays], xp.asarray(weight)).per_sample_gradients(
        xp.asarray(x), xp.asarray(bad), throw=False
    )
    right = chain(arrays, weight).per_sample_gradients(x, t)
    for a, b in zip(each, right, strict=True):
        found = xp.numpy(a)
        assert np.all(np.isnan(found[3]))
        assert np.max(np.abs(np.delete(found - b, 3, axis=0))) <= 1e-14


def test_what_losses_with_options_refuse(rng):
    chain = lambda **options: networks.Chain.mlp(4, 5, 3, 2, loss=networks.cross_entropy(**options))
    x, t = rng.standard_normal((2, 4)), np.asarray([0, 2])
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5"):
        networks.cross_entropy(label_smoothing=1.5)
    with pytest.raises(TypeError, match=r"ignore_index is 1\.5"):
        networks.cross_entropy(ignore_index=1.5)
    with pytest.raises(ValueError, match=r"weight has shape \(2,\), expected \(3,\)"):
        chain(weight=np.ones(2)).loss(x, t)
    with pytest.raises(TypeError, match="weight has dtype float64, expected float32"):
        networks.Chain.mlp(
            4, 5, 3, 2, loss=networks.cross_entropy(weight=np.ones(3)), like=np.zeros((), np.float32)
        ).loss(x.astype(np.float32), t)
    with pytest.raises(TypeError, match="weight is a"):
        chain(weight=[1.0, 1.0, 1.0]).loss(x, t)
    with pytest.raises(ValueError, match="weights of classes are not negative"):
        chain(weight=np.asarray([1.0, -1.0, 1.0])).loss(x, t)
    with pytest.raises(ValueError, match="out of range"):
        chain(ignore_index=-100).loss(x, np.asarray([0, -1]))
    with pytest.raises(ValueError, match="ignore_index is 1, but t holds weights"):
        chain(ignore_index=1).loss(x, np.ones((2, 3)))


@pytest.mark.parametrize("blocks", [False, True])
def test_several_vectors_are_a_loop(blocks, rng):
    chain = block_chain(block_arrays(rng)) if blocks else random_chain(rng)
    x, t = rng.standard_normal((3, 1, 5, 3) if blocks else (3, 4)), targets(rng, "cross_entropy", 3, 3)
    v = [rng.standard_normal((4, *p.shape)) for p in chain.params]
    for product in (chain.hvp, chain.ggnvp):
        together = product(x, t, v)
        for k in range(4):
            alone = product(x, t, [d[k] for d in v])
            for a, b in zip(alone, together, strict=True):
                assert np.max(np.abs(b[k] - a)) <= 1e-14 * max(1, np.max(np.abs(a)))


def test_products_are_symmetric_and_linear(rng):
    chain, x = random_chain(rng), rng.standard_normal((5, 4))
    t = targets(rng, "cross_entropy", 5, 3)
    for product in (chain.hvp, chain.ggnvp):
        matrix = dense(product, chain, x, t)
        assert np.max(np.abs(matrix - matrix.T)) <= 1e-14 * np.max(np.abs(matrix))
        zero = product(x, t, [0 * p for p in chain.params])
        assert all(np.all(z == 0) for z in zero)
    assert np.min(np.linalg.eigvalsh(dense(chain.ggnvp, chain, x, t))) >= -1e-13


@pytest.mark.parametrize("blocks", [False, True])
def test_per_sample_gradients_are_those_of_single_samples(blocks, rng):
    chain = block_chain(block_arrays(rng)) if blocks else random_chain(rng)
    x, t = rng.standard_normal((3, 1, 5, 3) if blocks else (3, 4)), targets(rng, "cross_entropy", 3, 3)
    each = chain.per_sample_gradients(x, t)
    for n in range(3):
        alone = chain.gradient(x[n : n + 1], t[n : n + 1])
        assert all(np.max(np.abs(a - b[n])) <= 1e-14 for a, b in zip(alone, each, strict=True))
    assert all(np.allclose(np.mean(a, 0), g, 0, 1e-14) for a, g in zip(each, chain.gradient(x, t), strict=True))


def test_layer_derivatives(rng):
    chain, x, t = random_chain(rng), rng.standard_normal((5, 4)), targets(rng, "cross_entropy", 5, 3)
    records, g = chain.layer_derivatives(x, t), chain.gradient(x, t)
    z = x
    for i, (layer, r) in enumerate(zip(chain.layers, records, strict=True)):
        assert np.array_equal(r.z_in, z)
        assert np.allclose(r.s, z @ layer.weight.T + layer.bias, 1e-14, 1e-14)
        assert np.array_equal(r.z_out, layer.phi.value(r.s))
        beta = r.b * layer.phi.slope(r.s)
        assert np.allclose(beta.T @ r.z_in, g[2 * i], 1e-13, 1e-15)
        z = r.z_out
    assert np.allclose(records[-1].b, chain.criterion.gradient(z, t) / 5, 1e-15, 0)


def test_layer_derivatives_of_blocks(rng):
    chain, x = block_chain(block_arrays(rng)), rng.standard_normal((3, 1, 5, 3))
    t = targets(rng, "cross_entropy", 3, 3)
    convolution, flat_, block, frozen, last = chain.layer_derivatives(x, t)
    assert convolution.s.shape == convolution.z_out.shape == convolution.b.shape == (3, 2, 3, 4)
    assert np.allclose(convolution.z_out, np.logaddexp(0, convolution.s), 1e-15, 1e-15)
    assert flat_.s is None
    assert flat_.z_out.shape == (3, 24)
    assert block.s is None
    assert len(block.inner) == 2
    inner = block.inner[1]
    assert np.array_equal(block.z_out, block.z_in + inner.z_out)
    assert np.array_equal(inner.b, block.b)
    assert frozen.s.shape == (3, 4)
    g = dict(enumerate(chain.gradient(x, t)))
    assert np.allclose(inner.b.T @ inner.z_in, g[4], 1e-13, 1e-15)
    assert np.allclose(last.b.T @ last.z_in, g[5], 1e-13, 1e-15)


def test_single_precision(rng):
    chain, x, t = random_chain(rng), rng.standard_normal((6, 4)), targets(rng, "cross_entropy", 6, 3)
    v = [rng.standard_normal(p.shape) for p in chain.params]
    x, v, params = x.astype(np.float32), [d.astype(np.float32) for d in v], [p.astype(np.float32) for p in chain.params]
    single = networks.Chain.from_arrays(params)
    double = networks.Chain.from_arrays([p.astype(np.float64) for p in params])
    x_64, v_64 = x.astype(np.float64), [d.astype(np.float64) for d in v]
    for low, high in [
        (single.gradient(x, t), double.gradient(x_64, t)),
        (single.hvp(x, t, v), double.hvp(x_64, t, v_64)),
        (single.ggnvp(x, t, v), double.ggnvp(x_64, t, v_64)),
    ]:
        assert all(a.dtype == np.float32 for a in low)
        assert np.max(np.abs(flat(low) - flat(high))) <= 1e-5 * np.max(np.abs(flat(high)))
    for method in (single.loss, single.loss_and_gradient):
        value = method(x, t)
        assert (value[0] if isinstance(value, tuple) else value).dtype == np.float32


def test_loss_and_gradient_is_both(rng):
    chain, x, t = random_chain(rng, reduction="sum"), rng.standard_normal((6, 4)), targets(rng, "cross_entropy", 6, 3)
    loss, gradient = chain.loss_and_gradient(x, t)
    assert loss == chain.loss(x, t)
    assert all(np.array_equal(a, b) for a, b in zip(gradient, chain.gradient(x, t), strict=True))


# --- where it runs ----------------------------------------------------------------------------------------------


def test_a_device_that_is_not_the_default(second, rng):
    arrays, x = block_arrays(rng, second.asarray), second.asarray(rng.standard_normal((3, 1, 5, 3)))
    chain, t = block_chain(arrays), second.asarray(targets(rng, "cross_entropy", 3, 3))
    v = [second.asarray(rng.standard_normal((2, *p.shape))) for p in chain.params]
    assert [d.shape for d in chain.hvp(x, t, v, throw=False)] == [d.shape for d in v]
    assert chain.gradient(x, t, throw=False)[0].device == x.device
    assert networks.Chain.mlp(3, 3, 2, 2, like=x).params[0].device == x.device
    for loss in ("mse", "bce"):
        smooth = networks.Chain(chain.layers, loss)
        assert smooth.hvp(x, second.asarray(rng.uniform(size=(3, 3))), v, throw=False)[0].dtype == x.dtype


def test_host_reads(host_reads, rng):
    from conftest import backend

    xp = backend("array-api-strict")
    chain, x = block_chain(block_arrays(rng, xp.asarray)), xp.asarray(rng.standard_normal((3, 1, 5, 3)))
    t, v = xp.asarray(targets(rng, "cross_entropy", 3, 3)), [0 * p for p in chain.params]
    host_reads.clear()
    chain.loss(x, t, throw=False)
    chain.hvp(x, t, v, throw=False)
    chain.layer_derivatives(x, t, throw=False)
    assert host_reads == []
    chain.hvp(x, t, v)
    assert host_reads == ["__bool__"]


def test_products_with_the_weights_are_as_stated(monkeypatch, rng):
    """For L layers: L for the loss, 3L − 1 for the gradient, 5L − 2 for ggnvp, 8L − 5 for hvp."""
    import array_api_strict

    from conftest import backend

    xp, count = backend("array-api-strict"), []
    cls = type(array_api_strict.asarray(0))
    original = cls.__matmul__
    monkeypatch.setattr(cls, "__matmul__", lambda a, b: count.append(1) or original(a, b))
    chain = networks.Chain.mlp(3, 3, 3, 5, like=xp.asarray(np.zeros(())))
    x, t = xp.asarray(rng.standard_normal((2, 3))), xp.asarray(np.asarray([0, 2]))

    def products(function, *args):
        count.clear()
        function(x, t, *args)
        return len(count)

    assert products(chain.loss) == 5
    assert products(chain.gradient) == 3 * 5 - 1
    assert products(chain.ggnvp, chain.params) == 5 * 5 - 2
    assert products(chain.hvp, chain.params) == 8 * 5 - 5


def test_frameworks_are_not_imported():
    code = "import sys; from ddnref.networks import Chain; Chain.mlp(2, 2, 2, 2); "
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'jax')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- constructors -----------------------------------------------------------------------------------------------


def test_mlp_draws_what_it_says():
    chain = networks.Chain.mlp(300, 400, 10, 3, gain=2.0, seed=3)
    assert [p.shape for p in chain.params] == [(400, 300), (400,), (400, 400), (400,), (10, 400), (10,)]
    assert [layer.activation for layer in chain.layers] == ["tanh", "tanh", "identity"]
    assert all(np.all(p == 0) for p in chain.params[1::2])
    assert [abs(np.std(p) * p.shape[1] ** 0.5 - 2) <= 0.1 for p in chain.params[::2]] == [True] * 3
    again, other = (
        networks.Chain.mlp(300, 400, 10, 3, gain=2.0, seed=3),
        networks.Chain.mlp(300, 400, 10, 3, seed=4),
    )
    assert np.array_equal(again.params[0], chain.params[0])
    assert not np.array_equal(other.params[0], chain.params[0])
    assert networks.Chain.mlp(3, 5, 2, 1, bias=False, activation="relu").params[0].shape == (2, 3)
    assert networks.Chain.mlp(3, 5, 2, 1, like=np.zeros((), np.float32)).params[0].dtype == np.float32
    assert networks.Chain.mlp(3, 5, 2, 2, loss="mse", reduction="sum").scale(7) == 1


def test_from_arrays_shares_and_places_activations(rng):
    w1, b1, w2, w3 = (rng.standard_normal(s) for s in [(4, 3), (4,), (5, 4), (2, 5)])
    chain = networks.Chain.from_arrays([w1, b1, w2, w3], activation="relu", loss="mse")
    assert [z.activation for z in chain.layers] == ["relu", "relu", "identity"]
    assert all(a is b for a, b in zip(chain.params, [w1, b1, w2, w3], strict=True))
    for arrays, where in [([b1, w1], 0), ([w1, b1, b1], 2), ([w1, np.zeros((1, 1, 1))], 1), ([w1, "b"], 1)]:
        with pytest.raises(ValueError, match=rf"arrays\[{where}\]"):
            networks.Chain.from_arrays(arrays)
    with pytest.raises(ValueError, match="empty"):
        networks.Chain.from_arrays([])


def test_with_params_leaves_the_old_chain_alone(rng):
    chain, x = random_chain(rng), rng.standard_normal((2, 4))
    before, copies = chain.output(x), [p.copy() for p in chain.params]
    twice = chain.with_params([2 * p for p in chain.params])
    assert not np.allclose(twice.output(x), before)
    assert np.array_equal(chain.output(x), before)
    chain.hvp(x, np.asarray([0, 1]), chain.params)
    assert all(np.array_equal(a, b) for a, b in zip(copies, chain.params, strict=True))
    chain.params[0] = None
    assert np.array_equal(chain.output(x), before)


# --- bad input --------------------------------------------------------------------------------------------------


def test_nan_stays_in_its_sample(rng):
    chain, x, t = random_chain(rng), rng.standard_normal((4, 4)), targets(rng, "cross_entropy", 4, 3)
    clean = chain.per_sample_gradients(x, t)
    x[1, 2] = np.nan
    rest = np.arange(4) != 1
    assert np.array_equal(np.isnan(chain.output(x)).all(axis=-1), ~rest)
    for a, b in zip(clean, chain.per_sample_gradients(x, t), strict=True):
        assert np.array_equal(a[rest], b[rest])
        assert np.all(np.isnan(b[1]))
    for name in LOSSES:
        loss = networks.Chain(chain.layers, name).criterion
        y, targets_ = chain.output(x), targets(rng, name, 4, 3)
        for f in (loss.value, loss.gradient, loss.hessian, loss.hessian_sqrt):
            value = f(y, targets_)
            assert np.all(np.isfinite(value[rest]))
            assert np.all(np.isnan(value[1]))


@pytest.mark.parametrize("loss", ["cross_entropy", "soft", "bce"])
def test_targets_out_of_range(loss, xp, rng):
    chain = random_chain(rng, "cross_entropy" if loss == "soft" else loss, sizes=(4, 3))
    chain = networks.Chain.from_arrays([xp.asarray(p) for p in chain.params], loss=chain.criterion)
    x, v, rest = xp.asarray(rng.standard_normal((4, 4))), chain.params, [0, 1, 3]
    t = rng.integers(0, 3, 4) if loss == "cross_entropy" else rng.uniform(size=(4, 3))
    right = [xp.numpy(g) for g in chain.per_sample_gradients(x, xp.asarray(t))]
    bad = {"cross_entropy": [3, -1, 255], "soft": [-0.1, np.nan], "bce": [1.5, -0.1, np.nan]}[loss]
    for value in bad:
        wrong = t.copy()
        wrong[(2,) if loss == "cross_entropy" else (2, 1)] = value
        wrong = xp.asarray(wrong)
        with pytest.raises(ValueError, match="t is out of range"):
            chain.gradient(x, wrong)
        for a, b in zip(right, chain.per_sample_gradients(x, wrong, throw=False), strict=True):
            assert np.all(np.isnan(xp.numpy(b)[2]))
            assert np.array_equal(xp.numpy(b)[rest], a[rest])
        assert np.all(np.isnan(xp.numpy(chain.hvp(x, wrong, v, throw=False)[0])))
        assert np.all(np.isnan(xp.numpy(chain.ggnvp(x, wrong, v, throw=False)[0])))
        assert np.isnan(float(chain.loss(x, wrong, throw=False)))


def test_static_facts_of_data(rng):
    chain, x, t = random_chain(rng), rng.standard_normal((4, 4)), targets(rng, "cross_entropy", 4, 3)
    with pytest.raises(ValueError, match=r"layers\[0\] \(Dense\).*\(4,\).*\(5,\)"):
        chain.output(rng.standard_normal((4, 5)))
    with pytest.raises(ValueError, match="x has shape"):
        chain.output(x[0])
    with pytest.raises(TypeError, match="x has dtype float32"):
        chain.output(x.astype(np.float32))
    with pytest.raises(TypeError, match=r"x is a builtins\.list"):
        chain.output(x.tolist())
    with pytest.raises(ValueError, match="t has shape"):
        chain.loss(x, t[:3])
    with pytest.raises(ValueError, match="t has shape"):
        chain.loss(x, np.ones((4, 2)))
    with pytest.raises(TypeError, match="t has dtype float32"):
        chain.loss(x, np.ones((4, 3), np.float32))
    with pytest.raises(TypeError, match=r"t is a builtins\.list"):
        chain.loss(x, t.tolist())
    for loss in ("mse", "bce"):
        other = networks.Chain(chain.layers, loss)
        with pytest.raises(TypeError, match="t has dtype int64"):
            other.loss(x, t)
        with pytest.raises(ValueError, match="t has shape"):
            other.loss(x, np.ones((4, 1)))


def test_static_facts_of_vectors(rng):
    chain, x, t = random_chain(rng), rng.standard_normal((4, 4)), targets(rng, "cross_entropy", 4, 3)
    v = chain.params
    for wrong, message in [
        (v[:-1], "v has 5 arrays, expected 6"),
        ([*v[:-1], v[-1][:2]], r"v\[5\] has shape"),
        ([v[0][None], *v[1:]], r"v\[1\] has shape"),
        ([v[0], v[1][None], *v[2:]], r"v\[1\] has shape"),
    ]:
        for product in (chain.hvp, chain.ggnvp):
            with pytest.raises(ValueError, match=message):
                product(x, t, wrong)
    with pytest.raises(TypeError, match=r"v\[2\] has dtype float32"):
        chain.hvp(x, t, [*v[:2], v[2].astype(np.float32), *v[3:]])
    with pytest.raises(ValueError, match=r"params\[0\] has shape"):
        chain.with_params([v[0][None], *v[1:]])


def test_no_samples(rng):
    chain, x, t = random_chain(rng), np.zeros((0, 4)), np.zeros(0, np.int64)
    for method in (chain.loss, chain.gradient, chain.per_sample_gradients, chain.layer_derivatives):
        with pytest.raises(ValueError, match="no samples"):
            method(x, t)
    assert chain.output(x).shape == (0, 3)
    total = networks.Chain(chain.layers, "cross_entropy", "sum")
    assert total.loss(x, t) == 0
    for arrays in (total.gradient(x, t), total.hvp(x, t, chain.params), total.ggnvp(x, t, chain.params)):
        assert all(np.all(a == 0) for a in arrays)


def test_static_facts_of_chains(rng):
    w = rng.standard_normal((3, 4))
    with pytest.raises(ValueError, match=r"activation is 'swish'.*\"identity\", \"relu\""):
        networks.Dense(w, activation="swish")
    with pytest.raises(ValueError, match=r"loss is 'hinge'.*\"cross_entropy\", \"mse\", \"bce\""):
        networks.Chain([networks.Dense(w)], "hinge")
    with pytest.raises(ValueError, match="reduction is 'none'"):
        networks.Chain([networks.Dense(w)], "mse", "none")
    with pytest.raises(ValueError, match=r"layers\[1\] \(Dense\): its weight \(3, 4\)"):
        networks.Chain([networks.Dense(w), networks.Dense(w)], "mse")
    with pytest.raises(ValueError, match="no parameters"):
        networks.Chain([networks.Flatten()], "mse")
    with pytest.raises(ValueError, match="weight of Dense has shape"):
        networks.Dense(w[0])
    with pytest.raises(ValueError, match="bias has shape"):
        networks.Dense(w, w[0])
    with pytest.raises(TypeError, match="bias has dtype"):
        networks.Dense(w, np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="real arrays only"):
        networks.Dense(w + 0j)
    with pytest.raises(TypeError, match=r"params\[1\] has dtype"):
        networks.Chain([networks.Dense(w), networks.Dense(np.ones((2, 3), np.float32))], "mse")
    single = networks.Residual([networks.Frozen(networks.Dense(np.ones((3, 3), np.float32)))])
    with pytest.raises(TypeError, match=r"constants\[0\] has dtype float32"):
        networks.Chain([networks.Dense(w), single], "mse")
    with pytest.raises(ValueError, match="nothing to add the shortcut"):
        networks.Chain([networks.Residual([networks.Dense(w)])], "mse").output(np.ones((2, 4)))
    with pytest.raises(ValueError, match="layers is empty"):
        networks.Residual([])
    with pytest.raises(ValueError, match="end with a Dense"):
        networks.Chain([networks.Conv2d(np.ones((1, 1, 1, 1)))], "mse").loss(np.ones((1, 1, 2, 2)), np.ones((1, 1)))
    with pytest.raises(ValueError, match=r"Put a ddnref.networks.Flatten before it"):
        networks.Chain([networks.Dense(w)], "mse").output(np.ones((1, 2, 2)))
    for sizes in [(0, 3, 2, 2), (3, 0, 2, 2), (3, 3, 0, 2), (3, 3, 2, 0)]:
        with pytest.raises(ValueError, match="expected at least 1"):
            networks.Chain.mlp(*sizes)


def test_the_oracles_refuse_other_layers(rng):
    with pytest.raises(TypeError, match="Conv2d"):
        network_jacobian(block_chain(block_arrays(rng)), rng.standard_normal((3, 4)))


@pytest.mark.parametrize("layer", ["dense", "residual"])
def test_the_hessian_in_double_precision_takes_class_weights_of_the_network(layer, rng):
    """It is expanded in float64 for dense layers, and formed by products for others."""
    w, v, x, t = rng.standard_normal((3, 3)), rng.standard_normal((3, 3)), rng.standard_normal((5, 3)), [0, 1, 2, 2, 1]

    def chain(dtype):
        inner = networks.Dense(w.astype(dtype), activation="tanh")
        layers = [networks.Residual([inner]) if layer == "residual" else inner, networks.Dense(v.astype(dtype))]
        return networks.Chain(layers, networks.cross_entropy(weight=np.asarray([1.0, 3.0, 0.5], dtype)))

    single, double = chain(np.float32), chain(np.float64)
    solved, _ = curvature.hessian_solve(single, x.astype(np.float32), np.asarray(t), single.params, damping=5.0)
    h = dense(double.hvp, double, x, np.asarray(t)) + 5.0 * np.eye(18)
    assert np.max(np.abs(flat(solved) - np.linalg.solve(h, flat(double.params)))) <= 1e-6
