"""Layers, activations and losses one by one: finite differences, inner products, extremes."""

import array_api_compat
import numpy as np
import pytest
from network_problems import richardson
from scipy import special

from ddnref import networks
from ddnref._kernels.special import erf, erf_standard
from ddnref.networks import _losses
from ddnref.networks._activations import ACTIVATIONS, jet
from ddnref.networks._blocks import Elementwise

# --- the error function ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_erf_is_that_of_scipy(dtype, xp):
    x = np.concatenate([np.linspace(-7, 7, 1401), [0.0, 1e-300, -1e-8, 2.5, 1e4, -1e4, np.inf, -np.inf, np.nan]])
    x = x.astype(dtype)
    for f in (erf, erf_standard):
        if f is erf_standard and xp.name in ("torch", "jax"):
            continue  # they have their own
        y = xp.numpy(f(xp.asarray(x)))
        assert y.dtype == dtype
        assert np.array_equal(np.isnan(y), np.isnan(x))
        assert np.nanmax(np.abs(y - special.erf(x.astype(np.float64)))) <= 5 * np.finfo(dtype).eps


# --- activations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_against_finite_differences(name):
    phi = ACTIVATIONS[name]
    z = np.linspace(-6, 6, 240)  # away from the kink at zero by half a step
    assert np.max(np.abs(richardson(lambda h: phi.value(z + h)) - phi.slope(z))) <= 1e-10
    assert np.max(np.abs(richardson(lambda h: phi.slope(z + h)) - phi.curvature(z))) <= 1e-10


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_jets_are_the_three_functions(name, xp):
    phi, z = ACTIVATIONS[name], np.linspace(-6, 6, 41)
    expected = [f(z) for f in phi[:3]]
    assert np.max(np.abs(xp.numpy(phi.value(xp.asarray(z))) - expected[0])) <= 4e-15
    for order in (0, 1, 2):
        parts = jet(phi, xp.asarray(z), order)
        assert len(parts) == 3
        for k, (part, whole) in enumerate(zip(parts, expected, strict=True)):
            if part is not None:
                assert k <= order
                assert np.max(np.abs(xp.numpy(part) - whole)) <= 4e-15
            elif k <= order:
                assert np.all(whole == (1.0 if k == 1 else 0.0))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_do_not_overflow(name, dtype):
    phi = ACTIVATIONS[name]
    z = np.asarray([-1e4, -100, -30, 0, 30, 100, 1e4], dtype)
    for f in phi[:3]:
        assert f(z).dtype == dtype
        assert np.all(np.isfinite(f(z)))
    if name in ("relu", "softplus", "gelu", "gelu_tanh", "silu"):
        assert np.array_equal(phi.value(z)[[0, -1]], [0, np.asarray(1e4, dtype)])
        assert np.array_equal(phi.slope(z)[[0, -1]], [0, 1])
        assert np.array_equal(phi.curvature(z)[[0, -1]], [0, 0])
    if name in ("sigmoid", "softplus", "silu"):
        tail = {
            "sigmoid": special.expit(-30.0),
            "softplus": np.log1p(np.exp(-30.0)),
            "silu": -30 * special.expit(-30.0),
        }
        assert abs(phi.value(z)[2] / tail[name] - 1) <= 8 * np.finfo(dtype).eps, "relatively accurate in the tail"


def test_a_triple_of_ones_own_is_used(rng):
    cube = networks.Activation(lambda z: z**3, lambda z: 3 * z**2, lambda z: 6 * z)
    w, x, t = rng.standard_normal((2, 3)), rng.standard_normal((4, 3)), rng.standard_normal((4, 2))
    chain = networks.Chain([networks.Dense(w, activation=cube)], "mse", "sum")
    v = rng.standard_normal((2, 3))
    assert np.allclose(chain.gradient(x, t)[0], (2 * ((x @ w.T) ** 3 - t) * 3 * (x @ w.T) ** 2).T @ x, 1e-13)
    moved = lambda h: chain.with_params([w + h * v]).gradient(x, t)[0]
    hv = chain.hvp(x, t, [v])[0]
    assert np.max(np.abs(richardson(moved) - hv)) <= 1e-8 * np.max(np.abs(hv))


# --- losses -----------------------------------------------------------------------------------------------------


def target_kinds(rng, n, c):
    return {
        "index": ("cross_entropy", rng.integers(0, c, n)),
        "int8": ("cross_entropy", rng.integers(0, c, n).astype(np.int8)),
        "soft": ("cross_entropy", rng.uniform(size=(n, c))),
        "mse": ("mse", rng.standard_normal((n, c))),
        "bce": ("bce", rng.uniform(size=(n, c))),
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["index", "int8", "soft", "mse", "bce"])
def test_losses(kind, reduction, xp, rng):
    name, t = target_kinds(rng, 5, 4)[kind]
    loss, y = _losses.resolve(name, reduction), rng.standard_normal((5, 4))
    u = rng.standard_normal((3, 5, 4))
    g, h = loss.gradient(y, t), loss.hessian(y, t)
    for c in range(4):
        e = np.eye(4)[c]
        assert np.max(np.abs(richardson(lambda s, e=e: loss.value(y + s * e, t)) - g[:, c])) <= 1e-10
        assert np.max(np.abs(richardson(lambda s, e=e: loss.gradient(y + s * e, t)) - h[:, c])) <= 1e-10
    root = loss.hessian_sqrt(y, t)
    assert root.shape == (5, 4, 3 if name == "cross_entropy" else 4)
    assert np.max(np.abs(root @ np.swapaxes(root, -1, -2) - h)) <= 1e-15
    product = _losses.hessian_product(loss, y, t, u)
    assert np.max(np.abs(product - (h @ u[..., None])[..., 0])) <= 1e-15
    default = loss._replace(hessian_product=None)
    assert np.max(np.abs(_losses.hessian_product(default, y, t, u) - product)) <= 1e-15
    for f in ("value", "gradient", "hessian", "hessian_sqrt"):
        other = getattr(loss, f)(xp.asarray(y), xp.asarray(t))
        assert np.max(np.abs(xp.numpy(other) - getattr(loss, f)(y, t))) <= 2e-15


def test_classes_are_weights_of_one(rng):
    y, t = rng.standard_normal((6, 3)), rng.integers(0, 3, 6)
    loss = _losses.resolve("cross_entropy", "mean")
    for f in (loss.value, loss.gradient, loss.hessian, loss.hessian_sqrt):
        assert np.max(np.abs(f(y, t) - f(y, np.eye(3)[t]))) <= 4e-16
        assert np.max(np.abs(f(y, t) - f(y + 7, t))) <= 1e-14


@pytest.mark.parametrize("kind", ["index", "soft", "mse", "bce"])
def test_losses_do_not_overflow(kind, rng):
    name, t = target_kinds(rng, 3, 4)[kind]
    loss = _losses.resolve(name, "mean")
    y = np.asarray([[1e4, -1e4, 0, 0], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, -1e4, 1e4]])
    for f in (loss.value, loss.gradient, loss.hessian, loss.hessian_sqrt):
        assert np.all(np.isfinite(f(y, t)))
    root = loss.hessian_sqrt(y, t)
    assert np.max(np.abs(root @ np.swapaxes(root, -1, -2) - loss.hessian(y, t))) <= 1e-15


def test_a_loss_of_ones_own(rng):
    """Its Hessian alone is enough; nothing is checked that it does not check."""
    quartic = networks.Loss(
        lambda y, t: np.sum((y - t) ** 4, axis=-1),
        lambda y, t: 4 * (y - t) ** 3,
        lambda y, t: np.sqrt(12) * np.abs(y - t)[..., None] * np.eye(y.shape[-1]),
        lambda y, t: 12 * ((y - t) ** 2)[..., None] * np.eye(y.shape[-1]),
    )
    chain = networks.Chain([networks.Dense(rng.standard_normal((2, 3)), activation="tanh")], quartic)
    x, v = rng.standard_normal((4, 3)), rng.standard_normal((2, 3))
    moved = lambda h: chain.with_params([chain.params[0] + h * v]).gradient(x, 0.5)[0]
    with pytest.raises(TypeError, match="t is a"):
        chain.gradient(x, 0.5)
    t = np.full((4, 1), 0.5)
    moved = lambda h: chain.with_params([chain.params[0] + h * v]).gradient(x, t)[0]
    assert np.max(np.abs(richardson(moved) - chain.hvp(x, t, [v])[0])) <= 1e-9


# --- layers -----------------------------------------------------------------------------------------------------


def scale_layer(rng):
    """y = a x² with a learned factor for each feature: second derivatives in x, and mixed."""

    def forward(params, x):
        return params[0] * x**2, x

    def vjp(params, x, y_bar):
        xp = array_api_compat.array_namespace(x)
        return (xp.sum(y_bar * x**2, axis=0),), 2 * params[0] * x * y_bar

    def jvp(params, x, params_dot, x_dot):
        return params_dot[0] * x**2 + 2 * params[0] * x * x_dot

    def second_order(params, x, y_bar, params_dot, x_dot):
        xp = array_api_compat.array_namespace(x)
        x_bar = 2 * y_bar * (params_dot[0] * x + params[0] * x_dot)
        return (xp.sum(2 * y_bar * x * x_dot, axis=0),), x_bar

    functions = {"forward": forward, "vjp": vjp, "jvp": jvp, "second_order": second_order}
    return networks.Layer((rng.standard_normal(6),), **functions, output_shape=lambda shape: shape)


LAYERS = {
    "dense": ((6,), lambda r: networks.Dense(r.standard_normal((4, 6)), r.standard_normal(4), "tanh")),
    "dense without bias": ((6,), lambda r: networks.Dense(r.standard_normal((4, 6)), activation="softplus")),
    "linear": ((6,), lambda r: networks.Dense(r.standard_normal((4, 6)), r.standard_normal(4))),
    "flatten": ((2, 3), lambda r: networks.Flatten()),
    "elementwise": ((2, 3), lambda r: Elementwise("sin")),
    "residual": (
        (6,),
        lambda r: networks.Residual([LAYERS["dense"][1](r), networks.Dense(r.standard_normal((6, 4)))]),
    ),
    "frozen": ((6,), lambda r: networks.Frozen(LAYERS["dense"][1](r))),
    "residual around frozen": (
        (6,),
        lambda r: networks.Residual([LAYERS["frozen"][1](r), LAYERS["back"][1](r)]),
    ),
    "back": ((4,), lambda r: networks.Dense(r.standard_normal((6, 4)), activation="sigmoid")),
    "user": ((6,), scale_layer),
    "residual around user": ((6,), lambda r: networks.Residual([scale_layer(r), Elementwise("tanh")])),
}
for _kernel, _stride, _padding in [((3, 2), 1, 0), ((2, 3), (2, 3), (0, 2)), ((1, 1), 2, 1), ((3, 3), 2, (3, 1))]:
    LAYERS[f"conv {_kernel} {_stride} {_padding}"] = (
        (2, 5, 6),
        lambda r, k=_kernel, s=_stride, p=_padding: networks.Conv2d(
            r.standard_normal((3, 2, *k)), r.standard_normal(3), s, p, "tanh"
        ),
    )


class Problem:
    """A layer, a batch for it, tangents with one leading axis, and a cotangent of its output."""

    def __init__(self, name, rng, lead=(2,)):
        shape, make = LAYERS[name]
        self.layer = make(rng)
        self.params = self.layer.params
        self.x = rng.standard_normal((3, *shape))
        self.y, self.saved = self.layer.forward(self.params, self.x)
        self.y_bar = rng.standard_normal(self.y.shape)
        self.y_bar_dot = rng.standard_normal((*lead, *self.y.shape))
        self.params_dot = tuple(rng.standard_normal((*lead, *p.shape)) for p in self.params)
        self.x_dot = rng.standard_normal((*lead, *self.x.shape))


def pairing(a, b):
    return sum(np.sum(p * q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_output_shape(name, rng):
    p = Problem(name, rng)
    assert p.layer.output_shape(p.x.shape[1:]) == p.y.shape[1:]
    assert np.array_equal(p.layer.with_params(p.params).forward(p.params, p.x)[0], p.y)
    assert np.array_equal(p.layer.forward(p.params, p.x, 0)[0], p.y)


@pytest.mark.parametrize("name", LAYERS)
def test_jvp_is_the_derivative_and_vjp_its_transpose(name, rng):
    p = Problem(name, rng)
    y_dot = p.layer.forward_dot(p.params, p.saved, p.params_dot or None, p.x_dot)[0]
    each = p.layer.vjp(p.params, p.saved, p.y_bar_dot)
    for k in range(2):
        theta, x_dot = tuple(d[k] for d in p.params_dot), p.x_dot[k]

        def moved(h, theta=theta, x_dot=x_dot):
            params = tuple(a + h * d for a, d in zip(p.params, theta, strict=True))
            return p.layer.forward(params, p.x + h * x_dot)[0]

        assert np.max(np.abs(richardson(moved) - y_dot[k])) <= 1e-8
        bars, x_bar = p.layer.vjp(p.params, p.saved, p.y_bar)
        left = np.sum(p.y_bar * y_dot[k])
        assert abs(left - pairing(bars, theta) - np.sum(x_bar * x_dot)) <= 1e-12 * max(1, abs(left))
        alone = p.layer.vjp(p.params, p.saved, p.y_bar_dot[k])
        for a, b in zip((*each[0], each[1]), (*alone[0], alone[1]), strict=True):
            assert np.max(np.abs(a[k] - b)) <= 1e-13


@pytest.mark.parametrize("name", LAYERS)
def test_missing_tangents_are_zero(name, rng):
    p = Problem(name, rng)
    zeros = tuple(0 * d for d in p.params_dot)
    f = lambda theta, x_dot: p.layer.forward_dot(p.params, p.saved, theta, x_dot)[0]
    assert f(None, None) is None
    assert np.allclose(f(None, p.x_dot), f(zeros or None, p.x_dot), 0, 1e-14)
    if p.params:
        assert np.allclose(f(p.params_dot, None), f(p.params_dot, 0 * p.x_dot), 0, 1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_wrt_and_per_sample(name, rng):
    p = Problem(name, rng)
    bars, x_bar = p.layer.vjp(p.params, p.saved, p.y_bar)
    assert np.array_equal(p.layer.vjp(p.params, p.saved, p.y_bar, wrt="x")[1], x_bar)
    alone = p.layer.vjp(p.params, p.saved, p.y_bar, wrt="params")[0]
    assert all(np.array_equal(a, b) for a, b in zip(alone, bars, strict=True))
    for lead in ((), (2,)):
        y_bar = p.y_bar_dot if lead else p.y_bar
        whole, each = (p.layer.vjp(p.params, p.saved, y_bar, wrt="params", per_sample=s)[0] for s in (False, True))
        for a, b in zip(whole, each, strict=True):
            assert b.shape == (*lead, 3, *a.shape[len(lead) :])
            assert np.max(np.abs(np.sum(b, axis=len(lead)) - a)) <= 1e-13


def tangent_errors(p, layer):
    """Largest errors of the tangents of both cotangents, and of the cotangent itself, in each direction."""
    _, saved_dot = layer.forward_dot(p.params, p.saved, p.params_dot or None, p.x_dot)
    dots, x_bar_dot, x_bar = layer.vjp_dot(p.params, p.saved, p.y_bar, p.params_dot or None, saved_dot, p.y_bar_dot)
    errors = [np.max(np.abs(x_bar - layer.vjp(p.params, p.saved, p.y_bar)[1]))]
    for k in range(2):

        def moved(h, k=k):
            params = tuple(a + h * d[k] for a, d in zip(p.params, p.params_dot, strict=True))
            _, saved = layer.forward(params, p.x + h * p.x_dot[k])
            bars, bar = layer.vjp(params, saved, p.y_bar + h * p.y_bar_dot[k])
            return np.concatenate([np.ravel(z) for z in (*bars, bar)])

        ours = np.concatenate([np.ravel(z[k]) for z in (*dots, x_bar_dot)])
        errors.append(np.max(np.abs(richardson(moved) - ours)) / max(1, np.max(np.abs(ours))))
    return max(errors)


@pytest.mark.parametrize("name", LAYERS)
def test_vjp_dot_is_the_derivative_of_vjp(name, rng):
    p = Problem(name, rng)
    assert tangent_errors(p, p.layer) <= 1e-8


@pytest.mark.parametrize("mutation", ["curvature", "slope", "u", "sign", "last digits"])
def test_a_wrong_vjp_dot_is_noticed(mutation, rng):
    class Mutant(networks.Dense):
        def vjp_dot(self, params, saved, y_bar, params_dot, saved_dot, y_bar_dot, **kwargs):
            if mutation == "u":
                saved_dot = saved_dot._replace(u=None)
            elif mutation in saved._fields:
                saved = saved._replace(**{mutation: None})
            factor = {"sign": -1, "last digits": 1 + 1e-6}.get(mutation, 1)
            dots, x_bar_dot, x_bar = super().vjp_dot(params, saved, y_bar, params_dot, saved_dot, y_bar_dot, **kwargs)
            return dots, factor * x_bar_dot, x_bar

    p = Problem("dense", rng)
    layer = Mutant(p.layer.weight, p.layer.bias, p.layer.activation)
    assert tangent_errors(p, layer) > 1e-7


def test_convolution_takes_its_options(rng):
    w, x = rng.standard_normal((1, 1, 2, 2)), rng.standard_normal((1, 1, 4, 4))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (2, 2)))
    y = networks.Conv2d(w, stride=(1, 2), padding=(1, 2)).forward((w,), x)[0]
    assert y.shape == (1, 1, 5, 4)
    for i in range(5):
        for j in range(4):
            assert abs(y[0, 0, i, j] - np.sum(w * padded[..., i : i + 2, 2 * j : 2 * j + 2])) <= 1e-14
    for options in ({"stride": 0}, {"padding": -1}, {"stride": (1, 2, 3)}, {"padding": 1.5 * np.ones(2)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            networks.Conv2d(w, **options)
    chain = networks.Chain([networks.Conv2d(w), networks.Flatten()], "mse")
    with pytest.raises(ValueError, match=r"layers\[0\] \(Conv2d\): its kernel \(2, 2\) is larger"):
        chain.output(np.ones((1, 1, 1, 4)))
    with pytest.raises(ValueError, match=r"\(1, height, width\)"):
        chain.output(np.ones((1, 2, 4, 4)))
    with pytest.raises(ValueError, match="weight of Conv2d has shape"):
        networks.Conv2d(w[0])


def test_a_layer_without_second_order_has_ggnvp_alone(rng):
    full = scale_layer(rng)
    functions = {"forward": full._forward, "vjp": full._vjp, "jvp": full._jvp}
    chain = networks.Chain([networks.Layer(full.params, **functions)], "mse")
    x = rng.standard_normal((3, 6))
    assert np.all(np.isfinite(chain.ggnvp(x, x, chain.params)[0]))
    with pytest.raises(ValueError, match="without second_order"):
        chain.hvp(x, x, chain.params)


def test_frozen_parameters_are_constants(rng):
    body, head = LAYERS["dense"][1](rng), networks.Dense(rng.standard_normal((3, 4)))
    free, fixed = (
        networks.Chain([body, head], "mse"),
        networks.Chain([networks.Frozen(body), head], "mse"),
    )
    x, t, v = rng.standard_normal((5, 6)), rng.standard_normal((5, 3)), rng.standard_normal((3, 4))
    assert fixed.params[0] is head.weight
    assert np.array_equal(fixed.gradient(x, t)[0], free.gradient(x, t)[2])
    within = [0 * body.weight, 0 * body.bias, v]
    for name in ("hvp", "ggnvp"):
        a, b = getattr(fixed, name)(x, t, [v])[0], getattr(free, name)(x, t, within)[2]
        assert np.max(np.abs(a - b)) <= 1e-14
