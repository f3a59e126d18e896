"""Networks and their curvature."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np

from ddnref import curvature, networks

from ._drivers import normal, target
from ._targets import Target

# --- networks ---------------------------------------------------------------------------------------------------


def _network(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    weights = normal(rng, (m, 3)) / 2, normal(rng, (m,)) / 9, normal(rng, (2, m)) / 2
    return *weights, normal(rng, (5, 3)), normal(rng, (5, 2))


def _images(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    return normal(rng, (2, 1, 2, 2)), normal(rng, (2,)), normal(rng, (3, 1, 4, 4)), normal(rng, (3, 18))


def chain(weight: Any, bias: Any, last: Any) -> networks.Chain:
    return networks.Chain([networks.Dense(weight, bias, "tanh"), networks.Dense(last)], "mse")


SQUARE = networks.Activation(lambda s: s * s, lambda s: 2 * s, lambda s: 2 + 0 * s)


def _half_square(y: Any, t: Any) -> Any:
    return array_api_compat.array_namespace(y).sum((y - t) ** 2, axis=-1) / 2


def _identities(y: Any, t: Any) -> Any:
    xp = array_api_compat.array_namespace(y)
    i = xp.arange(y.shape[-1], device=array_api_compat.device(y))
    return xp.astype(i[:, None] == i, y.dtype) + 0 * y[..., None]


LOSS = networks.Loss(_half_square, lambda y, t: y - t, _identities, _identities)


def _scale_layer(scale: Any) -> networks.Layer:
    def total(z: Any) -> Any:
        return array_api_compat.array_namespace(z).sum(z, axis=0)

    return networks.Layer(
        (scale,),
        forward=lambda p, x: (p[0] * x, x),
        vjp=lambda p, x, y_bar: ((total(y_bar * x),), p[0] * y_bar),
        jvp=lambda p, x, p_dot, x_dot: p_dot[0] * x + p[0] * x_dot,
    )


def _own_layer(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    return normal(rng, (3,)), normal(rng, (4, 3)), normal(rng, (4, 3))


def network_targets() -> list[Target]:
    names = "weight bias weight x t"

    def of(name: str, call: Any, build: Any = _network, names: str = names, **fields: Any) -> Target:
        aliases = fields.pop("aliases", {"weight": ("params", "layers"), "bias": ("params",)})
        fields = {"optional": ("bias",), **fields}
        like = fields.pop("like", lambda *, throw=True: None)
        return target(call, build, names, call, like=like, name=name, items=False, aliases=aliases, **fields)

    def convolved(w: Any, b: Any, x: Any, t: Any, throw: bool = True) -> Any:
        layers = [networks.Conv2d(w, b, activation="softplus"), networks.Flatten()]
        return networks.Chain(layers, "mse").loss_and_gradient(x, t, throw=throw)

    def residual(w: Any, b: Any, v: Any, x: Any, t: Any, throw: bool = True) -> Any:
        inner = networks.Residual([networks.Dense(w, b, SQUARE), networks.Dense(v)])
        return networks.Chain([inner], LOSS).loss_and_gradient(x, t, throw=throw)

    def square(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
        return *(normal(rng, s) / 2 for s in ((m, 3), (m,), (3, m))), normal(rng, (5, 3)), normal(rng, (5, 3))

    def frozen(w: Any, b: Any, v: Any, x: Any, t: Any, throw: bool = True) -> Any:
        layers = [networks.Frozen(networks.Dense(w, b, "gelu")), networks.Dense(v)]
        return networks.Chain(layers, "mse").gradient(x, t, throw=throw)

    def smoothed(w: Any, b: Any, v: Any, x: Any, t: Any, throw: bool = True) -> Any:
        kinked = networks.Activation(*SQUARE[:3], kinks=((0.1, 1.0),))
        layers = [networks.Dense(w, b, networks.smoothed(kinked, 0.5)), networks.Dense(v)]
        c = networks.Chain(layers, "mse")
        return c.hvp(x, t, [p + 0 for p in c.params], throw=throw)

    def weighted(w: Any, b: Any, v: Any, c: Any, x: Any, t: Any, throw: bool = True) -> Any:
        loss = networks.cross_entropy(weight=c, label_smoothing=0.1)
        return networks.Chain([networks.Dense(w, b, "tanh"), networks.Dense(v)], loss).loss_and_gradient(
            x, t, throw=throw
        )

    def classes(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
        *weights, x, t = _network(rng, batch, m, is_complex)
        return *weights, rng.uniform(0.5, 2.0, 2), x, np.abs(t)

    def product(name: str) -> Any:
        def call(w: Any, b: Any, v: Any, x: Any, t: Any, throw: bool = True) -> Any:
            c = chain(w, b, v)
            return getattr(c, name)(x, t, [p + 0 for p in c.params], throw=throw)

        return call

    def method(name: str) -> Any:
        return lambda w, b, v, x, t, throw=True: getattr(chain(w, b, v), name)(x, t, throw=throw)

    def vector(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
        return *_network(rng, batch, m, is_complex), normal(rng, (m, 3)), normal(rng, (m,)), normal(rng, (2, m))

    def with_vector(w: Any, b: Any, v: Any, x: Any, t: Any, *vs: Any, throw: bool = True) -> Any:
        return chain(w, b, v).hvp(x, t, list(vs), throw=throw)

    return [
        of("Chain", lambda w, b, v, x, t, throw=True: chain(w, b, v).loss_and_gradient(x, t, throw=throw)),
        of("Chain.loss", method("loss")),
        of("Chain.gradient", method("gradient")),
        of("Chain.per_sample_gradients", method("per_sample_gradients")),
        of("Chain.hvp", with_vector, vector, names + " v v v"),
        of("Chain.ggnvp", product("ggnvp"), unused=("t",)),
        of("Chain.output", lambda w, b, v, x, t: chain(w, b, v).output(x), theirs=("t",), like=lambda: None),
        of(
            "Dense",
            lambda w, b, v, x, t, throw=True: networks.Chain(
                [networks.Dense(w, b, "relu"), networks.Dense(v)], "bce"
            ).gradient(x, 0 * t, throw=throw),
            theirs=("t",),
        ),
        of("Conv2d", convolved, _images, "weight bias x t"),
        of("Flatten", convolved, _images, "weight bias x t"),
        *(of(name, residual, square, theirs=("t",)) for name in ("Residual", "Activation", "Loss")),
        of("cross_entropy", weighted, classes, "weight bias weight weight_ x t", optional=("bias", "weight_")),
        of("smoothed", smoothed),
        of("Frozen", frozen, aliases={"weight": ("constants", "params"), "bias": ("constants", "params")}),
        of(
            "Layer",
            lambda s, x, t, throw=True: networks.Chain([_scale_layer(s)], "mse").gradient(x, t, throw=throw),
            _own_layer,
            "params x t",
            theirs=("params", "x"),
        ),
    ]


# --- curvature --------------------------------------------------------------------------------------------------


def _free_of_sign(result: Any) -> Any:
    w, v = result
    return w, [array_api_compat.array_namespace(z).abs(z) for z in v]


def rows(x: Any, part: slice) -> Any:
    """Some samples; what has none is handed on as it is."""
    if not hasattr(x, "dtype") or isinstance(x, type) or x.ndim == 0 or "sparse" in str(getattr(x, "layout", "")):
        return x
    return x[part, ...]


def curvature_targets() -> list[Target]:
    names = "weight bias weight x t"
    aliases = {"weight": ("params",), "bias": ("params",)}

    def of(function: Any, call: Any, given: Any = None, name: str = "", **fields: Any) -> Target:
        def called(w: Any, b: Any, v: Any, x: Any, t: Any, **options: Any) -> Any:
            return call(chain(w, b, v), x, t, **options)

        return target(
            function,
            _network,
            names,
            called,
            like=function,
            name=name or function.__name__,
            items=False,
            aliases=aliases,
            given=given or {},
            loose=1e4,
            optional=("bias",),
            unused=("t",),
            **fields,
        )

    def reduced(c: Any, x: Any, t: Any, **options: Any) -> Any:
        reducer = curvature.ggn_reducer(c, **options)
        first = reducer.update(reducer.init(), rows(x, slice(2)), rows(t, slice(2)))
        second = reducer.update(reducer.init(2), rows(x, slice(2, None)), rows(t, slice(2, None)))
        return reducer.finalise(reducer.merge(first, second)).grams

    def solved(c: Any, x: Any, t: Any, **options: Any) -> Any:
        return curvature.hessian_solve(c, x, t, [p + 0 for p in c.params], **options)

    def factored(c: Any, x: Any, t: Any, **options: Any) -> Any:
        factor = curvature.hessian_factor(c, x, t, **options)
        return factor.solve([p + 0 for p in c.params]), factor.slogdet(), factor.inertia()

    def reverse(c: Any, x: Any, t: Any, **options: Any) -> Any:
        factor = curvature.hessian_factor(c, x, t, damping=5.0)
        b = [p + 0 for p in c.params]
        return curvature.hessian_solve_vjp(b, factor.solve(b)[0], factor, **options)

    def pairs(c: Any, x: Any, t: Any, **options: Any) -> Any:
        return _free_of_sign(curvature.hessian_eigvals(c, x, t, **{"k": 2, **options})[0])

    def derivatives(c: Any, x: Any, t: Any, **options: Any) -> Any:
        found = curvature.ggn_directional_derivatives(c, x, t, **options)
        xp = array_api_compat.array_namespace(found.w)
        return found.w, xp.abs(found.first), found.second

    def factors(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
        return normal(rng, (4, m)), normal(rng, (4, 3, 2)), normal(rng, (2, 4, 3)), normal(rng, (2, 4, 3, m))

    def stepped(c: Any, x: Any, t: Any, radius: Any = 0.5, **options: Any) -> Any:
        g = c.flatten(c.gradient(x, t))
        p, info = curvature.trust_region_step(c.ggn_operator(x, t), g, radius, **options)
        return p, info.damping, info.predicted

    def stepped_back(c: Any, x: Any, t: Any, **options: Any) -> Any:
        g = c.gradient(x, t)
        factor = curvature.hessian_factor(c, x, t, damping=5.0)
        p, _ = curvature.trust_region_step(factor, g, 1e-3, k=100)
        return curvature.trust_region_step_vjp(g, p, factor, g, 1e-3, **options)[0]

    seeds = {"seed": "seed"}
    return [
        target(
            curvature.gram_from_factors,
            factors,
            "us us deltas deltas",
            lambda u, v, delta, epsilon: curvature.gram_from_factors([u, v], [delta, epsilon]),
            like=lambda: None,
            name="gram_from_factors",
            items=False,
        ),
        of(
            curvature.trust_region_step,
            stepped,
            options={
                "radius": "positive",
                "k": "check_every",
                "probes": "count",
                "model": "name",
                "rtol": "tolerance",
                "check_every": "check_every",
            },
        ),
        of(curvature.trust_region_step_vjp, stepped_back),
        of(curvature.ggn_eigvalsh, curvature.ggn_eigvalsh, options={**seeds, "mc_samples": "check_every"}),
        of(
            curvature.ggn_eigh,
            lambda *a, **o: _free_of_sign(curvature.ggn_eigh(*a, **o)),
            {"k": 2},
            options={**seeds, "k": "k"},
        ),
        of(curvature.ggn_directional_derivatives, derivatives, {"k": 2}, options=seeds),
        of(
            curvature.ggn_damped_newton,
            curvature.ggn_damped_newton,
            {"k": 2, "damping": 0.5},
            options={"damping": "damping"},
        ),
        of(
            curvature.ggn_laplace,
            lambda c, x, t, **o: curvature.ggn_laplace(c, x, t, **{"precision": 2.0, "x_new": x, **o}),
            options={"precision": "positive"},
        ),
        of(curvature.ggn_reducer, reduced, options=seeds),
        of(curvature.ggn_reducer, reduced, name="Ggn", functions=("Ggn", "GgnState")),
        of(
            curvature.hessian_factor,
            factored,
            {"damping": 5.0},
            functions=("hessian_factor", "HessianFactor"),
            options={"damping": "damping"},
        ),
        of(curvature.hessian_solve, solved, {"damping": 5.0}, options={"damping": "damping", "refine": "refine"}),
        of(curvature.hessian_solve_vjp, reverse, options={"refine": "refine"}),
        of(
            curvature.hessian_eigval_count,
            lambda c, x, t, interval=(-0.5, 0.7), **o: curvature.hessian_eigval_count(c, x, t, interval, **o)[0],
            options={"interval": "interval"},
        ),
        of(curvature.hessian_diagonal, curvature.hessian_diagonal),
        of(curvature.hessian_trace, curvature.hessian_trace),
        of(
            curvature.hessian_eigvals,
            pairs,
            options={"sigma": "any number", "interval": "interval"},
            doubles=True,
        ),
    ]
