"""Targets for the public functions that have no rule: one small problem each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np

from ddnref import curvature, testing

from ._drivers import normal, target
from ._linear import eigen_targets, krylov_targets, operator_targets, scipy_targets
from ._networks import curvature_targets, network_targets
from ._solutions import implicit_targets
from ._targets import Target

VALUES = (
    "ConvergenceError",
    "DdnrefError",
    "GaugeError",
    "NonFiniteError",
    "OperatorError",
    "OptimalityError",
    "SingularError",
    "DirectionalDerivatives",
    "EigshInfo",
    "EigshVjpInfo",
    "EigvalCountInfo",
    "HessianEigvalsInfo",
    "HessianSolveInfo",
    "Inertia",
    "IterationInfo",
    "Laplace",
    "LeastSquaresInfo",
    "NodeInfo",
    "OperatorCheck",
    "OperatorReport",
    "Progress",
    "RobustPoolInfo",
    "SinkhornInfo",
    "SinkhornVjpInfo",
    "SolveInfo",
    "TrustRegionInfo",
    "TrustRegionVjpInfo",
)
"""Public names that compute nothing: errors, what functions return, and a module."""


# --- reducers, checks, bridges ----------------------------------------------------------------------------------


def _shards(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    return normal(rng, (*batch, m + 2, 2), is_complex), normal(rng, (*batch, m + 2, 3), is_complex)


def reducer_targets() -> list[Target]:
    def square(z: Any) -> Any:
        with np.errstate(all="ignore"):
            return z @ array_api_compat.array_namespace(z).matrix_transpose(z)

    def gram(a: Any, b: Any, **options: Any) -> Any:
        reducer = curvature.gram_reducer(**options)
        second = reducer.update(reducer.init(), b)
        return reducer.finalise(reducer.merge(reducer.update(reducer.init(), a), second))

    def total(a: Any, b: Any, **options: Any) -> Any:
        reducer = curvature.sum_reducer(square, **options)
        return reducer.finalise(reducer.update(reducer.update(reducer.init(), a), b))

    return [
        target(
            curvature.gram_reducer,
            _shards,
            "factor factor",
            gram,
            is_complex=True,
            options={"shards": "name"},
            functions=("gram_reducer", "GramState", "Reducer"),
        ),
        target(
            curvature.sum_reducer,
            _shards,
            "function function",
            total,
            theirs=("function",),
            options={"weight": "callable"},
            functions=("sum_reducer", "SumState"),
        ),
    ]


def testing_targets() -> list[Target]:
    def sine(x: Any) -> Any:
        with np.errstate(all="ignore"):
            return array_api_compat.array_namespace(x).sin(x)

    def cosine(y_bar: Any, y: Any, x: Any) -> Any:
        return y_bar * array_api_compat.array_namespace(x).cos(x)

    def jvp(x: Any, x_dot: Any, **options: Any) -> Any:
        return testing.numerical_jvp(sine, x, x_dot, **options)

    def check(f: Callable[..., Any], *functions: Callable[..., Any]) -> Any:
        def call(x: Any, **options: Any) -> Any:
            try:
                return f(sine, *functions, x, needs=(0,), **options).passed
            except AssertionError:
                return False

        return call

    kinds = {
        "step": "positive",
        "gap": "gap",
        "directions": "k",
        "rtol": "tolerance",
        "tangent": "name",
        "seed": "seed",
    }
    several = {name: kinds[name] for name in ("step", "gap", "rtol", "tangent", "seed")}

    def checker(f: Callable[..., Any], like: Callable[..., Any], count: int, options: dict[str, str]) -> Target:
        # The derivative of a sine is its own transpose, so one function serves both modes.
        return target(
            f,
            lambda rng, batch, m, c: (normal(rng, (m,)),),
            "inputs",
            check(f, *[cosine] * count),
            like=like,
            items=False,
            options=options,
            double=True,
        )

    without_step = {name: kinds[name] for name in ("rtol", "tangent", "seed")}
    return [
        target(
            testing.numerical_jvp,
            lambda rng, batch, m, c: (normal(rng, (m,)), normal(rng, (m,))),
            "x x_dot",
            jvp,
            items=False,
            options={"step": "positive", "gap": "gap"},
            double=True,
            loose=1e5,
        ),
        checker(testing.check_vjp, testing.check_vjp, 1, several),
        checker(testing.assert_vjp, testing.check_vjp, 1, several),
        checker(testing.check_jvp, testing.check_jvp, 1, several),
        checker(testing.assert_jvp, testing.check_jvp, 1, several),
        checker(testing.check_transpose, testing.check_transpose, 2, without_step),
        checker(testing.assert_transpose, testing.check_transpose, 2, without_step),
    ]


def other_targets() -> list[Target]:
    return [
        *eigen_targets(),
        *krylov_targets(),
        *operator_targets(),
        *scipy_targets(),
        *implicit_targets(),
        *network_targets(),
        *curvature_targets(),
        *reducer_targets(),
        *testing_targets(),
    ]
