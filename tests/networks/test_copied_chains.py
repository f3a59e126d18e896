"""Chains, layers, losses and factors survive pickle, deepcopy and joblib, and say in a line what they are."""

import copy
import io
import pickle

import joblib
import numpy as np
import pytest

from ddnref import curvature, networks
from ddnref.networks import Chain, Conv2d, Dense, Flatten, Frozen, Layer, Residual
from ddnref.networks._activations import ACTIVATIONS, leaky_relu


def through_joblib(value):
    file = io.BytesIO()
    joblib.dump(value, file)
    file.seek(0)
    return joblib.load(file)


copied = pytest.mark.parametrize(
    "again", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy, through_joblib],
    ids=["pickle", "deepcopy", "joblib"],
)  # fmt: skip


def scaled(params, x):
    return params[0] * x, x


def scaled_vjp(params, x, y_bar):
    return (np.sum(y_bar * x, axis=0),), params[0] * y_bar


def scaled_jvp(params, x, params_dot, x_dot):
    return params_dot[0] * x + params[0] * x_dot


def drawn(rng, *shape):
    return rng.standard_normal(shape) / 2


@pytest.fixture
def chain(rng):
    layers = [
        Conv2d(drawn(rng, 2, 1, 3, 3), activation="relu"), Flatten(), Frozen(Dense(drawn(rng, 4, 8), drawn(rng, 4))),
        Residual([Dense(drawn(rng, 4, 4), activation=leaky_relu(0.2))]),
        Layer((drawn(rng, 4),), forward=scaled, vjp=scaled_vjp, jvp=scaled_jvp), Dense(drawn(rng, 3, 4)),
    ]  # fmt: skip
    return Chain(layers, networks.cross_entropy(weight=np.asarray([1.0, 2.0, 0.5]), label_smoothing=0.1))


@copied
def test_a_chain_of_every_layer(again, chain, rng):
    x, t = drawn(rng, 5, 1, 4, 4), rng.integers(0, 3, 5)
    other = again(chain)
    assert type(other) is Chain
    assert repr(other) == repr(chain)
    for found, expected in zip(other.gradient(x, t), chain.gradient(x, t), strict=True):
        np.testing.assert_array_equal(found, expected)
    for copied_array, array in zip(other.params, chain.params, strict=True):
        assert not np.shares_memory(copied_array, array)


@copied
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_every_activation_and_loss(again, activation, loss, rng):
    chain = Chain([Dense(drawn(rng, 3, 4), activation=activation)], loss, "sum")
    x, t = drawn(rng, 5, 4), rng.random((5, 3))
    other = again(chain)
    assert other.reduction == "sum"
    for name in ("value", "slope", "curvature"):  # which the products do not call
        functions = (getattr(c.layers[0].phi, name) for c in (chain, other))
        np.testing.assert_array_equal(*(f(x) for f in functions))
    v = [drawn(rng, 3, 4)]
    np.testing.assert_array_equal(other.hvp(x, t, v)[0], chain.hvp(x, t, v)[0])


@copied
@pytest.mark.parametrize(("dtype", "frozen"), [("float64", False), ("float32", False), ("float32", True)])
def test_a_factor_is_that_of_the_copied_arrays(again, dtype, frozen, rng):
    """A change of the weights in place does not reach it, and every array has the dtype that it had."""
    w = drawn(rng, 4, 4).astype(dtype)
    body = Dense(np.eye(4, dtype=dtype), activation="tanh")
    chain = Chain([Frozen(body) if frozen else body, Dense(w)], "mse")
    x, t = drawn(rng, 6, 4).astype(dtype), drawn(rng, 6, 4).astype(dtype)
    factor = curvature.hessian_factor(chain, x, t, damping=0.5, curvature="ggn", method="dense")
    b = chain.gradient(x, t)
    expected, _ = factor.solve(b)
    for array in (w, x, t):
        array += 1
    other = again(factor)
    assert repr(other) == repr(factor)
    for found, wanted in zip(other.solve(b)[0], expected, strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.framework("torch")
@copied
def test_a_chain_that_follows_a_module_follows_its_copy(again, torch):
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    chain = Chain.from_torch(module, loss=torch.nn.CrossEntropyLoss(reduction="sum"))
    other = again(chain)
    assert other.reduction == "sum"
    assert torch.equal(other.params[0], chain.params[0])
    (copied_module, *_) = other._source.given
    copied_module[0].weight = torch.nn.Parameter(torch.zeros(3, 4))
    assert not other.params[0].any()
    assert chain.params[0].any()


def test_functions_without_a_name_are_the_error(rng):
    square = networks.Activation(lambda z: z * z, lambda z: 2 * z, lambda z: 0 * z + 2)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(Chain([Dense(drawn(rng, 2, 2), activation=square)], "mse"))
    mse = Chain([Dense(drawn(rng, 2, 2))], "mse").criterion
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(mse._replace(value=lambda y, t: y[:, 0]))  # no longer what the name stands for


def test_what_they_say(chain, rng):
    assert repr(chain) == (
        "Chain(Conv2d (2, 1, 3, 3) relu, Flatten, Frozen(Dense (4, 8) (4,)), Residual(Dense (4, 4) Activation), "
        "Layer (4,), Dense (3, 4); mean of cross_entropy; 50 parameters, float64)"
    )
    deep = Chain.mlp(8, 8, 3, 30, bias=False)
    assert repr(deep) == (
        "Chain(29 × Dense (8, 8) tanh, Dense (3, 8); mean of cross_entropy; 1880 parameters, float64)"
    )
    x, t = drawn(rng, 1, 8), np.asarray([2])
    assert repr(curvature.hessian_factor(deep, x, t, damping=0.25, method="qr")) == (
        "HessianFactor(1880 parameters in 30 arrays (8, 8), (3, 8), float64; qr, damping=0.25)"
    )
    own = networks.Loss(*deep.criterion)
    assert "; sum of Loss; " in repr(Chain(deep.layers, own, "sum"))
