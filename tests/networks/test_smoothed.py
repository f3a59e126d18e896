"""Kinks that count: second derivatives of smoothed activations, and chains of them."""

import pickle

import numpy as np
import pytest
from hessian_problems import dense

from ddnref import curvature, networks
from ddnref.networks import Activation, Chain, Conv2d, Dense, Flatten, Frozen, Residual, smoothed

HARD_TANH = Activation(
    lambda z: np.clip(z, -1, 1), lambda z: (np.abs(z) < 1) * 1.0, lambda z: 0 * z, kinks=((-1.0, 1.0), (1.0, -1.0))
)


@pytest.mark.parametrize(("name", "slopes"), [("relu", (0.0, 1.0)), ("leaky_relu", (0.01, 1.0))])
@pytest.mark.parametrize("width", [0.05, 0.2, 3.0])
def test_the_bump_is_the_second_difference_and_the_rest_is_unchanged(name, slopes, width):
    z = np.linspace(-4.0, 4.0, 4001)
    z = np.concatenate([z, [0.0, -0.0, width, -width]])
    phi, first = smoothed(name, width), networks._activations.resolve(name)
    difference = (first.value(z + width) - 2 * first.value(z) + first.value(z - width)) / width**2
    assert np.max(np.abs(phi.curvature(z) - difference)) <= 1e-12 / width**2
    assert np.array_equal(phi.value(z), first.value(z))
    assert np.array_equal(phi.slope(z), first.slope(z))
    fine = np.linspace(-2 * width, 2 * width, 100_001)
    area = np.sum(phi.curvature(fine)) * (fine[1] - fine[0])
    assert abs(area - (slopes[1] - slopes[0])) <= 1e-6
    assert first.curvature(z).any() == np.False_


def test_several_kinks_and_curvature_of_the_activation_itself():
    z = np.asarray([-1.3, -1.0, -0.9, 0.0, 0.75, 1.0, 2.0])
    assert np.allclose(smoothed(HARD_TANH, 0.5).curvature(z), [0.8, 2.0, 1.6, 0.0, -1.0, -2.0, 0.0])
    parabola = Activation(lambda z: z * abs(z), lambda z: 2 * abs(z), lambda z: 2 * np.sign(z), kinks=((0.0, 0.5),))
    assert np.allclose(smoothed(parabola, 1.0).curvature(np.asarray([-2.0, -0.5, 0.5])), [-2, -1.75, 2.25])
    assert np.isnan(smoothed("relu", 1.0).curvature(np.asarray([np.nan])))[0]


def test_to_smooth_again_replaces_the_width():
    z = np.linspace(-1, 1, 41)
    again = smoothed(smoothed("relu", 0.1), 0.4)
    assert np.array_equal(again.curvature(z), smoothed("relu", 0.4).curvature(z))
    copy = pickle.loads(pickle.dumps(again))
    assert np.array_equal(copy.curvature(z), again.curvature(z))


def test_every_library_agrees(xp):
    z = np.linspace(-1, 1, 41)
    for order, expected in enumerate(smoothed("leaky_relu", 0.3).jet(z, 2)):
        assert np.array_equal(xp.numpy(smoothed("leaky_relu", 0.3).jet(xp.asarray(z), 2)[order]), expected)
    assert (
        smoothed("relu", 0.3).jet(xp.asarray(z.astype(np.float32)), 2)[2].dtype
        == xp.asarray(z.astype(np.float32)).dtype
    )


def parts(chain):
    """The activations of all layers, inside blocks too."""

    def of(layers):
        for layer in layers:
            inner = getattr(layer, "layers", None) or ([layer.layer] if isinstance(layer, Frozen) else None)
            if inner is None:
                yield getattr(layer, "activation", None)
            else:
                yield from of(inner)

    return list(of(chain.layers))


def widths(chain):
    return [a.jet.args[1] for a in parts(chain) if isinstance(a, Activation) and a.kinks]


def nested(rng):
    return Chain([
        Conv2d(rng.standard_normal((2, 1, 2, 2)), activation="leaky_relu"),
        Flatten(),
        Frozen(Dense(rng.standard_normal((6, 8)), activation="relu")),
        Residual([Dense(rng.standard_normal((6, 6)), None, a) for a in ("tanh", "relu")]),
        Dense(rng.standard_normal((3, 6))),
    ], "cross_entropy")  # fmt: skip


def test_chains_of_all_layers(rng):
    chain = nested(rng)
    x, t = rng.standard_normal((5, 1, 3, 3)), np.asarray([0, 1, 2, 1, 0])
    smooth = chain.smoothed([0.1, 0.2, 0.3])
    assert widths(smooth) == [0.1, 0.2, 0.3]
    assert widths(smooth.smoothed(0.5)) == [0.5] * 3
    assert parts(chain)[:2] == ["leaky_relu", None]
    assert smooth.loss(x, t) == chain.loss(x, t)
    for a, b in zip(smooth.gradient(x, t), chain.gradient(x, t), strict=True):
        assert np.array_equal(a, b)
    assert all(a is b for a, b in zip(smooth.params, chain.params, strict=True))
    # Relative widths are those of the root mean squares of the pre-activations.
    sizes = []
    for record in chain.layer_derivatives(x, t):
        sizes += [r.s for r in (record.inner or (record,)) if r.s is not None]
    rms = [np.sqrt(np.mean(sizes[i] ** 2)) for i in (0, 1, 3)]
    assert len(sizes) == 5
    assert np.allclose(widths(chain.smoothed(0.2, x)), 0.2 * np.asarray(rms))
    assert widths(chain.smoothed(0.2, 0 * x)) == [0.2] * 3  # nothing to measure


def test_the_hessian_sees_the_kinks(rng):
    """One unit, by hand: the bump enters as ``b φ'' z zᵀ``."""
    chain = Chain([Dense(np.asarray([[0.1, 0.0]]), None, "relu"), Dense(np.asarray([[2.0]]))], "mse")
    x, t = np.asarray([[1.0, 3.0]]), np.asarray([[5.0]])
    plain, smooth = dense(chain, x, t), dense(chain.smoothed(0.5), x, t)
    s, b = 0.1, 2 * (2.0 * 0.1 - 5.0) * 2.0  # ∂loss/∂z
    bump = (1 - s / 0.5) / 0.5
    expected = np.zeros((3, 3))
    expected[:2, :2] = b * bump * np.outer(x[0], x[0])
    assert np.max(np.abs(smooth - plain - expected)) <= 1e-13
    # The factored Hessian is that of the same products.
    factor = curvature.hessian_factor(chain.smoothed(0.5), x, t, damping=100.0)
    solution, _ = factor.solve(chain.gradient(x, t))
    exact = np.linalg.solve(smooth + 100 * np.eye(3), chain.flatten(chain.gradient(x, t)))
    assert np.max(np.abs(chain.flatten(solution) - exact)) <= 1e-14


def test_smoothed_products_are_differences_of_gradients_over_the_width(rng):
    """Along a line that moves one layer's pre-activations by ±w, H_w is the average curvature that gradients show."""
    chain = Chain(
        [Dense(rng.standard_normal((40, 3)), None, "relu"), Dense(rng.standard_normal((1, 40)))], "mse", "sum"
    )
    x, t = rng.standard_normal((400, 3)), rng.standard_normal((400, 1))
    v = [0.05 * rng.standard_normal((40, 3)), np.zeros((1, 40))]

    def slope(h):
        moved = chain.with_params([p + h * d for p, d in zip(chain.params, v, strict=True)])
        return sum(np.sum(g * d) for g, d in zip(moved.gradient(x, t), v, strict=True))

    measured = (slope(1.0) - slope(-1.0)) / 2
    width = float(np.sqrt(np.mean((x @ v[0].T) ** 2)))
    curved = [
        sum(np.sum(a * d) for a, d in zip(c.hvp(x, t, v), v, strict=True)) for c in (chain, chain.smoothed(width))
    ]
    assert abs(curved[1] - measured) < abs(curved[0] - measured)


def test_from_torch(torch):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
    chain = Chain.from_torch(module)
    x, t = torch.ones((2, 3), dtype=torch.float64), torch.tensor([0, 1])
    smooth = chain.smoothed(0.2, x)
    assert float(smooth.loss(x, t)) == float(chain.loss(x, t))
    assert len(widths(smooth)) == 1


def test_bad_input():
    chain = Chain.mlp(3, 4, 2, 3, activation="relu")
    for call, match in [
        (lambda: smoothed("tanh", 0.2), "'tanh' has no kinks"),
        (lambda: smoothed(Activation(np.sin, np.cos, np.sin), 0.2), "this Activation has no kinks"),
        (lambda: smoothed("relu", 0.0), "width is 0.0"),
        (lambda: smoothed("relu", -1.0), "width is -1.0"),
        (lambda: smoothed("relu", np.inf), "width is inf"),
        (lambda: smoothed("relu", np.nan), "width is nan"),
        (lambda: chain.smoothed([0.1]), "1 entries for 2 layers"),
        (lambda: chain.smoothed(0.0), "width is 0.0"),
        (lambda: Chain.mlp(3, 4, 2, 3).smoothed(0.1), "for 0 layers"),
        (lambda: chain.smoothed(0.1, np.ones(3)), "x has shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
