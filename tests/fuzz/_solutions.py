"""Gradients through solutions of problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np

from ddnref import implicit

from ._drivers import definite, normal, target
from ._targets import Target, random_like

# --- solutions of problems --------------------------------------------------------------------------------------


def _dot(a: Any, x: Any) -> Any:
    return (a @ x[..., None])[..., 0]


def _transposed(a: Any) -> Any:
    return array_api_compat.array_namespace(a).matrix_transpose(a)


def _outer(u: Any, v: Any) -> Any:
    return u[..., :, None] * v[..., None, :]


def _root(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    a, b = definite(rng, batch, m, False), normal(rng, (*batch, m))
    return normal(rng, (*batch, m)), np.linalg.solve(a, b[..., None])[..., 0], a, b


def _constrained(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    """``½ ‖y − x‖²`` with the sum of y fixed: y is x less its mean deviation."""
    x = normal(rng, (*batch, m))
    t = normal(rng, (*batch, 1))
    nu = (t - np.sum(x, axis=-1, keepdims=True)) / m
    return normal(rng, (*batch, m)), x + nu, nu, x, t


def _equations(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    y_bar, y, nu, x, t = _constrained(rng, batch, m, False)
    return y_bar, y, nu, np.ones((*batch, 1, m)), t, x


def _ones_row(y: Any) -> Any:
    return array_api_compat.array_namespace(y).ones_like(y)[..., None, :]


def _total(y: Any) -> Any:
    return array_api_compat.array_namespace(y).sum(y, axis=-1, keepdims=True)


def _without(stated: dict[str, Any]) -> dict[str, Any]:
    """The functions that a JVP shares with a VJP: all but the one that is transposed."""
    return {name: f for name, f in stated.items() if not name.endswith("_vjp")}


ROOT: dict[str, Any] = {
    "residual": lambda y, a, b: _dot(a, y) - b,
    "jacobian": lambda y, a, b: a,
    "residual_vjp": lambda w, y, a, b: (_outer(w, y), -w),
}
MINIMUM: dict[str, Any] = {
    "gradient": ROOT["residual"],
    "hessian": ROOT["jacobian"],
    "gradient_vjp": ROOT["residual_vjp"],
}
CONSTRAINED: dict[str, Any] = {
    "gradient": lambda y, x, t: y - x,
    "hessian": lambda y, nu, x, t: implicit.Diagonal(1 + 0 * y),
    "constraint": lambda y, x, t: _total(y) - t,
    "constraint_jacobian": lambda y, x, t: _ones_row(y),
    "residual_vjp": lambda w, eta, y, nu, x, t: (-w, -eta),
}
ROOT_JVP = {**_without(ROOT), "residual_jvp": lambda a_dot, b_dot, y, a, b: _dot(a_dot, y) - b_dot}
MINIMUM_JVP = {**_without(MINIMUM), "gradient_jvp": ROOT_JVP["residual_jvp"]}
CONSTRAINED_JVP = {**_without(CONSTRAINED), "residual_jvp": lambda x_dot, t_dot, y, nu, x, t: (-x_dot, -t_dot)}
LINEAR: dict[str, Any] = {
    "gradient": lambda y, x: y - x,
    "hessian": lambda y, x: implicit.Diagonal(1 + 0 * y),
    "gradient_vjp": lambda w, y, x: -w,
}
LINEAR_JVP = {**_without(LINEAR), "gradient_jvp": lambda x_dot, y, x: -x_dot}


def implicit_targets() -> list[Target]:
    def root(**derivatives: Any) -> Any:
        return implicit.custom_root(ROOT["residual"], axes=1, solve_rtol=1e-12, **derivatives)

    def minimum(residual_vjp: Any, residual_jvp: Any) -> Any:
        derivatives = {"gradient_vjp": residual_vjp, "gradient_jvp": residual_jvp}
        return implicit.custom_argmin(gradient=ROOT["residual"], axes=1, solve_rtol=1e-12, **derivatives)

    fields: dict[str, Any] = {"bars": 1, "theirs": ("inputs",), "loose": 10.0}

    def of(function: Any, build: Any, names: str, stated: dict[str, Any], name: str = "", **more: Any) -> Target:
        kinds = dict.fromkeys(stated, "callable")
        kinds.pop("equalities", None)
        return target(
            function,
            build,
            names,
            lambda *arrays, **o: function(*arrays, **{**stated, **o}),
            options=kinds,
            name=name or function.__name__,
            **{**fields, **more},
        )

    def pushed(function: Any, build: Any, names: str, stated: dict[str, Any], **others: Any) -> Target:
        """A JVP at the point of a VJP: a tangent for each input in place of the cotangent."""
        inputs = [name for name in names.split() if name not in ("y", "nu")]
        dots = ["x_dot" if name == "inputs" else f"{name}_dot" for name in inputs]

        def make(rng: Any, *where: Any) -> tuple[Any, ...]:
            _, *arrays = build(rng, *where)
            return *(random_like(rng, x) for x in arrays[-len(inputs) :]), *arrays

        # No cotangent has the shape of y, so the first thing that does not fit may be what a function returned.
        aliases = {"inputs": ("x",), "y": tuple(stated)}
        more: dict[str, Any] = {"bars": len(dots), "optional": ("nu",), "aliases": aliases, **others}
        return of(function, make, " ".join([*dots, names]), stated, **more)

    def custom(maker: Any, name: str, mode: str) -> Target:
        """A derivative of a solver with its condition; the items are the last axis."""
        made = maker(
            residual_vjp=lambda w, y, a, b: (_dot(_transposed(a), w), _outer(w, y), -w),
            residual_jvp=lambda y_dot, a_dot, b_dot, y, a, b: _dot(a, y_dot) + _dot(a_dot, y) - b_dot,
        )(lambda a, b: np.linalg.solve(a, b[..., None])[..., 0])
        more: dict[str, Any] = {"name": f"{name}_{mode}", "functions": (name, "ImplicitFunction")}
        if mode == "vjp":
            return of(made.vjp, _root, "y_bar y inputs inputs", {}, **more)
        return pushed(made.jvp, _root, "y inputs inputs", {}, **more)

    def structured(name: str, of_matrix: Callable[[Any], Any]) -> Target:
        """A root whose Jacobian has a structure, of a diagonal matrix."""

        def build(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
            d, b = rng.uniform(1.0, 2.0, (*batch, m)), normal(rng, (*batch, m))
            return normal(rng, (*batch, m)), b / d, d, b

        stated = {
            "residual": lambda y, d, b: d * y - b,
            "jacobian": lambda y, d, b: of_matrix(d),
            "residual_vjp": lambda w, y, d, b: (w * y, -w),
        }
        return of(implicit.root_vjp, build, "y_bar y inputs inputs", stated, name=name)

    return [
        of(implicit.root_vjp, _root, "y_bar y inputs inputs", ROOT),
        of(implicit.argmin_vjp, _root, "y_bar y inputs inputs", MINIMUM),
        of(implicit.eq_argmin_vjp, _constrained, "y_bar y nu inputs inputs", CONSTRAINED, optional=("nu",)),
        of(
            implicit.ineq_argmin_vjp,
            _constrained,
            "y_bar y nu inputs inputs",
            {**CONSTRAINED, "equalities": 1},
            optional=("nu",),
        ),
        of(implicit.lineq_argmin_vjp, _equations, "y_bar y nu a b inputs", LINEAR, optional=("nu",)),
        pushed(implicit.root_jvp, _root, "y inputs inputs", ROOT_JVP),
        pushed(implicit.argmin_jvp, _root, "y inputs inputs", MINIMUM_JVP),
        pushed(implicit.eq_argmin_jvp, _constrained, "y nu inputs inputs", CONSTRAINED_JVP),
        pushed(implicit.ineq_argmin_jvp, _constrained, "y nu inputs inputs", {**CONSTRAINED_JVP, "equalities": 1}),
        pushed(implicit.lineq_argmin_jvp, _equations, "y nu a b inputs", LINEAR_JVP),
        structured("Diagonal", implicit.Diagonal),
        structured("BlockDiagonal", lambda d: implicit.BlockDiagonal(d[..., :, None, None])),
        structured("DiagonalPlusLowRank", lambda d: implicit.DiagonalPlusLowRank(d, 0 * d[..., None])),
        structured("Products", lambda d: implicit.Products(lambda v: d * v)),
        *(custom(root, "custom_root", mode) for mode in ("vjp", "jvp")),
        *(custom(minimum, "custom_argmin", mode) for mode in ("vjp", "jvp")),
    ]
