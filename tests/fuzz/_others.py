"""Targets for the public functions that have no rule: one small problem each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import array_api_compat
import numpy as np
import scipy.sparse

import ddnref
from ddnref import testing

from ._targets import Make, Problem, Target, _solve, random_like

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
    "HessianSolveInfo",
    "Inertia",
    "IterationInfo",
    "LeastSquaresInfo",
    "OperatorCheck",
    "OperatorReport",
    "Progress",
    "RobustPoolInfo",
    "SinkhornInfo",
    "SolveInfo",
    "testing",
)
"""Public names that compute nothing: errors, what functions return, and a module."""


def driver(call: Callable[..., Any], like: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """`call` with the named arrays and the keyword options of the function that it drives."""
    options = [p for p in inspect.signature(like).parameters.values() if p.kind is p.KEYWORD_ONLY]
    arrays = [inspect.Parameter(f"{name}{'_' * i}", inspect.Parameter.POSITIONAL_ONLY) for i, name in enumerate(names)]

    @wraps(call)
    def driven(*given: Any, **chosen: Any) -> Any:
        return call(*given, **chosen)

    driven.__signature__ = inspect.Signature([*arrays, *options])  # type: ignore[attr-defined]
    return driven


def normal(rng: np.random.Generator, shape: tuple[int, ...], is_complex: bool = False) -> Any:
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def definite(rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool) -> Any:
    z = normal(rng, (*batch, m, m), is_complex)
    return z @ np.conj(np.swapaxes(z, -1, -2)) / m + np.eye(m)


def _make(build: Callable[..., tuple[Any, ...]], **options: Any) -> Make:
    """A `make` from a function of ``(rng, batch, m, is_complex)`` that returns the arrays."""
    return lambda *where: Problem(build(*where), dict(options))


def target(function: Any, build: Callable[..., tuple[Any, ...]], names: str, call: Any = None, **fields: Any) -> Target:
    """Of one function, its arrays named in one string."""
    fields = dict(fields)
    options = fields.pop("given", {})
    name = fields.pop("name", function.__name__)
    arrays = tuple(names.split())
    called = function if call is None else driver(call, fields.pop("like", function), arrays)
    return Target(name, called, _make(build, **options), arrays, **fields)


# --- eigenpairs -------------------------------------------------------------------------------------------------


def _pairs(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    """Far from eigenpairs: of residuals that are nothing but rounding no digit could be compared."""
    return (
        definite(rng, batch, m, is_complex),
        rng.uniform(1.0, 2.0, (*batch, m)),
        normal(rng, (*batch, m, m), is_complex),
    )


def _gauge(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    w, v = np.linalg.eigh(definite(rng, batch, m, False))
    return random_like(rng, w), random_like(rng, v), w, v


def eigen_targets() -> list[Target]:
    return [
        target(ddnref.eigen_residual, _pairs, "x w v", powers={"v": (1,)}),
        target(ddnref.fixed_point_residual, _pairs, "x w v", powers={"x": (0,), "w": (0,)}),
        target(ddnref.gauge_residual, _gauge, "w_bar v_bar w v", optional=("w_bar", "v_bar")),
        target(
            ddnref.align_signs,
            lambda rng, batch, m, c: (normal(rng, (*batch, m, 3)), normal(rng, (*batch, m))),
            "v reference",
            given={"axis": -2},
            call=_align,
            optional=("reference",),
            powers={"v": (1,), "reference": (0,)},
        ),
    ]


def _align(v: Any, reference: Any, **options: Any) -> Any:
    along = reference[..., :, None] if getattr(reference, "ndim", 0) > 1 else reference
    return ddnref.align_signs(v, along, **options)


# --- systems ----------------------------------------------------------------------------------------------------


def _system(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    return definite(rng, batch, m, is_complex), normal(rng, (*batch, m), is_complex)


def krylov_targets() -> list[Target]:
    def of(solver: Callable[..., Any]) -> Target:
        def call(a: Any, b: Any, **options: Any) -> Any:
            return solver(ddnref.dense(a, self_adjoint=True, positive_definite=True), b, **options)

        return target(
            solver,
            _system,
            "a b",
            call,
            given={"rtol": 1e-12},
            check=_solve,
            loose=1e3,
            is_complex=True,
            powers={"b": (1,), "a": (-1,)},
            aliases={"a": ("operator", "params")},
        )

    solvers = (ddnref.cg, ddnref.minres, ddnref.bicgstab, ddnref.gmres, ddnref.lsmr)

    def moved(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
        a, b = _system(rng, batch, m, is_complex)
        x = np.linalg.solve(a, b[..., None])[..., 0]
        return random_like(rng, a), random_like(rng, b), x, a, b

    return [
        *map(of, solvers),
        target(
            ddnref.linear_solve_jvp,
            moved,
            "params_dot b_dot x operator b",
            bars=2,
            aliases=PARAMS,
            loose=10.0,
            is_complex=True,
        ),
    ]


# --- operators --------------------------------------------------------------------------------------------------


def everything(operator: ddnref.LinearOperator, x: Any) -> Any:
    """All that an operator does, once."""
    y = operator(x)
    with np.errstate(all="ignore"):  # the bare formulas, which solvers call, look at nothing
        return y, operator.adjoint(operator.params, y), *operator.params_vjp(operator.params, y, x)


PARAMS = dict.fromkeys(("a", "d", "m", "kernel", "operator", "c", "damping", "operators"), ("params",))


def operator_targets() -> list[Target]:
    n = 6

    def of(function: Any, build: Any, names: str, call: Any, **fields: Any) -> Target:
        return target(function, build, names, call, **{"is_complex": True, "sums": True, "aliases": PARAMS, **fields})

    def matrix(rng: Any, batch: Any, m: int, c: bool) -> tuple[Any, ...]:
        return normal(rng, (*batch, m, m + 1), c), normal(rng, (*batch, m + 1), c)

    def square(rng: Any, batch: Any, m: int, c: bool) -> tuple[Any, ...]:
        return normal(rng, (*batch, m, m), c), normal(rng, (*batch, m, m), c), normal(rng, (*batch, m), c)

    def points(rng: Any, batch: Any, m: int, c: bool) -> tuple[Any, ...]:
        return normal(rng, (*batch, m), c), normal(rng, (*batch, m), c)

    def kernel(rng: Any, batch: Any, m: int, c: bool) -> tuple[Any, ...]:
        return normal(rng, (*batch, 3), c), normal(rng, (*batch, n), c)

    def grid(rng: Any, batch: Any, m: int, c: bool) -> tuple[Any, ...]:
        return (normal(rng, (*batch, 4, 5), c),)

    def coefficient(rng: Any, batch: Any, m: int, c: bool) -> tuple[Any, ...]:
        return normal(rng, (*batch, m, m), c), np.asarray(rng.uniform(0.5, 2.0, batch)), normal(rng, (*batch, m), c)

    def own(d: Any, x: Any) -> Any:
        def product(params: Any, x: Any) -> Any:
            return params[0] * x

        def bar(params: Any, y_bar: Any, x: Any) -> Any:
            return (y_bar * x,)

        return everything(ddnref.LinearOperator((d,), product, product, bar, (4,), (4,)), x)

    return [
        of(ddnref.dense, matrix, "a x", lambda a, x, **o: everything(ddnref.dense(a, **o), x)),
        of(ddnref.as_operator, matrix, "a x", lambda a, x, **o: everything(ddnref.as_operator(a, "a", **o), x)),
        of(ddnref.diagonal, points, "d x", lambda d, x, **o: everything(ddnref.diagonal(d, **o), x), items=False),
        of(
            ddnref.mask,
            lambda rng, batch, m, c: (rng.uniform(0, 1, m), normal(rng, (*batch, m), c)),
            "m x",
            lambda m, x, **o: everything(ddnref.mask(m, **o), x),
            items=False,
        ),
        of(ddnref.convolution, kernel, "kernel x", lambda k, x, **o: everything(ddnref.convolution(k, n, **o), x)),
        of(ddnref.difference, grid, "x", lambda x, **o: everything(ddnref.difference((4, 5), **o), x)),
        of(ddnref.scaled, coefficient, "operator c x", lambda a, s, x, **o: everything(ddnref.scaled(a, s, **o), x)),
        of(
            ddnref.normal,
            coefficient,
            "operator damping x",
            lambda a, s, x, **o: everything(ddnref.normal(a, s, **o), x),
            optional=("damping",),
        ),
        of(ddnref.add, square, "operators operators x", lambda a, b, x, **o: everything(ddnref.add(a, b, **o), x)),
        of(
            ddnref.compose,
            square,
            "operators operators x",
            lambda a, b, x, **o: everything(ddnref.compose(a, b, **o), x),
        ),
        of(ddnref.stack, square, "operators operators x", lambda a, b, x, **o: everything(ddnref.stack(a, b, **o), x)),
        of(
            ddnref.adjoint,
            lambda *w: (np.swapaxes(matrix(*w)[0], -1, -2).copy(), matrix(*w)[1]),
            "operator x",
            lambda a, x, **o: everything(ddnref.adjoint(a, **o), x),
        ),
        target(
            ddnref.LinearOperator,
            lambda rng, batch, m, c: (normal(rng, (4,)), normal(rng, (*batch, 4))),
            "params x",
            own,
            like=lambda: None,
            items=False,
            theirs=("params",),
        ),
        of(
            ddnref.check_operator,
            matrix,
            "a x",
            lambda a, x, **o: ddnref.check_operator(ddnref.dense(a), x, **o).passed,
            items=False,
            options={"rtol": "tolerance", "vjp_rtol": "tolerance", "seed": "seed"},
            double=True,
            optional=("x",),
        ),
    ]


def scipy_targets() -> list[Target]:
    """Of what goes to SciPy and comes from there: NumPy alone."""

    def back(a: Any, **options: Any) -> Any:
        operator = ddnref.to_scipy(ddnref.dense(a), **options)
        return operator @ np.ones(operator.shape[1], operator.dtype)

    sparse = scipy.sparse.csr_array(np.asarray([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    return [
        target(
            ddnref.to_scipy,
            lambda rng, batch, m, c: (normal(rng, (m, m + 1)),),
            "a",
            back,
            items=False,
            numpy_only=True,
            aliases={"a": ("parameters",)},
        ),
        target(
            ddnref.from_scipy,
            lambda rng, batch, m, c: (normal(rng, (*batch, 3)),),
            "x",
            lambda x, **o: (ddnref.from_scipy(sparse, **o)(x),),
            numpy_only=True,
            double=True,
        ),
    ]


# --- solutions of problems --------------------------------------------------------------------------------------


def _dot(a: Any, x: Any) -> Any:
    return (a @ x[..., None])[..., 0]


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
    "hessian": lambda y, nu, x, t: ddnref.Diagonal(1 + 0 * y),
    "constraint": lambda y, x, t: _total(y) - t,
    "constraint_jacobian": lambda y, x, t: _ones_row(y),
    "residual_vjp": lambda w, eta, y, nu, x, t: (-w, -eta),
}
LINEAR: dict[str, Any] = {
    "gradient": lambda y, x: y - x,
    "hessian": lambda y, x: ddnref.Diagonal(1 + 0 * y),
    "gradient_vjp": lambda w, y, x: -w,
}


def implicit_targets() -> list[Target]:
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
        return of(ddnref.root_vjp, build, "y_bar y inputs inputs", stated, name=name)

    return [
        of(ddnref.root_vjp, _root, "y_bar y inputs inputs", ROOT),
        of(ddnref.argmin_vjp, _root, "y_bar y inputs inputs", MINIMUM),
        of(ddnref.eq_argmin_vjp, _constrained, "y_bar y nu inputs inputs", CONSTRAINED, optional=("nu",)),
        of(
            ddnref.ineq_argmin_vjp,
            _constrained,
            "y_bar y nu inputs inputs",
            {**CONSTRAINED, "equalities": 1},
            optional=("nu",),
        ),
        of(ddnref.lineq_argmin_vjp, _equations, "y_bar y nu a b inputs", LINEAR, optional=("nu",)),
        structured("Diagonal", ddnref.Diagonal),
        structured("BlockDiagonal", lambda d: ddnref.BlockDiagonal(d[..., :, None, None])),
        structured("DiagonalPlusLowRank", lambda d: ddnref.DiagonalPlusLowRank(d, 0 * d[..., None])),
        structured("Products", lambda d: ddnref.Products(lambda v: d * v)),
    ]


# --- networks ---------------------------------------------------------------------------------------------------


def _network(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    weights = normal(rng, (m, 3)) / 2, normal(rng, (m,)) / 9, normal(rng, (2, m)) / 2
    return *weights, normal(rng, (5, 3)), normal(rng, (5, 2))


def _images(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    return normal(rng, (2, 1, 2, 2)), normal(rng, (2,)), normal(rng, (3, 1, 4, 4)), normal(rng, (3, 18))


def chain(weight: Any, bias: Any, last: Any) -> ddnref.Chain:
    return ddnref.Chain([ddnref.Dense(weight, bias, "tanh"), ddnref.Dense(last)], "mse")


SQUARE = ddnref.Activation(lambda s: s * s, lambda s: 2 * s, lambda s: 2 + 0 * s)


def _half_square(y: Any, t: Any) -> Any:
    return array_api_compat.array_namespace(y).sum((y - t) ** 2, axis=-1) / 2


def _identities(y: Any, t: Any) -> Any:
    xp = array_api_compat.array_namespace(y)
    i = xp.arange(y.shape[-1], device=array_api_compat.device(y))
    return xp.astype(i[:, None] == i, y.dtype) + 0 * y[..., None]


LOSS = ddnref.Loss(_half_square, lambda y, t: y - t, _identities, _identities)


def _scale_layer(scale: Any) -> ddnref.Layer:
    def total(z: Any) -> Any:
        return array_api_compat.array_namespace(z).sum(z, axis=0)

    return ddnref.Layer(
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
        layers = [ddnref.Conv2d(w, b, activation="softplus"), ddnref.Flatten()]
        return ddnref.Chain(layers, "mse").loss_and_gradient(x, t, throw=throw)

    def residual(w: Any, b: Any, v: Any, x: Any, t: Any, throw: bool = True) -> Any:
        inner = ddnref.Residual([ddnref.Dense(w, b, SQUARE), ddnref.Dense(v)])
        return ddnref.Chain([inner], LOSS).loss_and_gradient(x, t, throw=throw)

    def square(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
        return *(normal(rng, s) / 2 for s in ((m, 3), (m,), (3, m))), normal(rng, (5, 3)), normal(rng, (5, 3))

    def frozen(w: Any, b: Any, v: Any, x: Any, t: Any, throw: bool = True) -> Any:
        layers = [ddnref.Frozen(ddnref.Dense(w, b, "gelu")), ddnref.Dense(v)]
        return ddnref.Chain(layers, "mse").gradient(x, t, throw=throw)

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
        of("Chain.ggnvp", product("ggnvp")),
        of("Chain.output", lambda w, b, v, x, t: chain(w, b, v).output(x), theirs=("t",), like=lambda: None),
        of(
            "Dense",
            lambda w, b, v, x, t, throw=True: ddnref.Chain(
                [ddnref.Dense(w, b, "relu"), ddnref.Dense(v)], "bce"
            ).gradient(x, 1 / (1 + t * t), throw=throw),
            theirs=("t",),
        ),
        of("Conv2d", convolved, _images, "weight bias x t"),
        of("Flatten", convolved, _images, "weight bias x t"),
        *(of(name, residual, square, theirs=("t",)) for name in ("Residual", "Activation", "Loss")),
        of("Frozen", frozen, aliases={"weight": ("constants", "params"), "bias": ("constants", "params")}),
        of(
            "Layer",
            lambda s, x, t, throw=True: ddnref.Chain([_scale_layer(s)], "mse").gradient(x, t, throw=throw),
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
    if not hasattr(x, "ndim") or isinstance(x, type) or x.ndim == 0 or "sparse" in str(getattr(x, "layout", "")):
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
        reducer = ddnref.ggn_reducer(c, **options)
        first = reducer.update(reducer.init(), rows(x, slice(2)), rows(t, slice(2)))
        second = reducer.update(reducer.init(2), rows(x, slice(2, None)), rows(t, slice(2, None)))
        return reducer.finalise(reducer.merge(first, second)).grams

    def solved(c: Any, x: Any, t: Any, **options: Any) -> Any:
        return ddnref.hessian_solve(c, x, t, [p + 0 for p in c.params], **options)

    def factored(c: Any, x: Any, t: Any, **options: Any) -> Any:
        factor = ddnref.hessian_factor(c, x, t, **options)
        return factor.solve([p + 0 for p in c.params]), factor.slogdet(), factor.inertia()

    def reverse(c: Any, x: Any, t: Any, **options: Any) -> Any:
        factor = ddnref.hessian_factor(c, x, t, damping=5.0)
        b = [p + 0 for p in c.params]
        return ddnref.hessian_solve_vjp(b, factor.solve(b)[0], factor, **options)

    def pairs(c: Any, x: Any, t: Any, **options: Any) -> Any:
        return _free_of_sign(ddnref.hessian_eigvals(c, x, t, **{"k": 2, **options})[0])

    def derivatives(c: Any, x: Any, t: Any, **options: Any) -> Any:
        found = ddnref.ggn_directional_derivatives(c, x, t, **options)
        xp = array_api_compat.array_namespace(found.w)
        return found.w, xp.abs(found.first), found.second

    seeds = {"seed": "seed"}
    return [
        of(ddnref.ggn_eigvalsh, ddnref.ggn_eigvalsh, options={**seeds, "mc_samples": "k"}),
        of(
            ddnref.ggn_eigh,
            lambda *a, **o: _free_of_sign(ddnref.ggn_eigh(*a, **o)),
            {"k": 2},
            options={**seeds, "k": "k"},
        ),
        of(ddnref.ggn_directional_derivatives, derivatives, {"k": 2}, options=seeds),
        of(
            ddnref.ggn_damped_newton, ddnref.ggn_damped_newton, {"k": 2, "damping": 0.5}, options={"damping": "damping"}
        ),
        of(ddnref.ggn_reducer, reduced, options=seeds),
        of(ddnref.ggn_reducer, reduced, name="Ggn", functions=("Ggn", "GgnState")),
        of(
            ddnref.hessian_factor,
            factored,
            {"damping": 5.0},
            functions=("hessian_factor", "HessianFactor"),
            options={"damping": "damping"},
        ),
        of(ddnref.hessian_solve, solved, {"damping": 5.0}, options={"damping": "damping", "refine": "refine"}),
        of(ddnref.hessian_solve_vjp, reverse, options={"refine": "refine"}),
        of(
            ddnref.hessian_eigval_count,
            lambda c, x, t, interval=(-0.5, 0.7), **o: ddnref.hessian_eigval_count(c, x, t, interval, **o)[0],
            options={"interval": "interval"},
        ),
        of(ddnref.hessian_eigvals, pairs, options={"sigma": "any number", "interval": "interval"}, doubles=True),
    ]


# --- reducers, checks, bridges ----------------------------------------------------------------------------------


def _shards(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    return normal(rng, (*batch, m + 2, 2), is_complex), normal(rng, (*batch, m + 2, 3), is_complex)


def reducer_targets() -> list[Target]:
    def square(z: Any) -> Any:
        with np.errstate(all="ignore"):
            return z @ array_api_compat.array_namespace(z).matrix_transpose(z)

    def gram(a: Any, b: Any, **options: Any) -> Any:
        reducer = ddnref.gram_reducer(**options)
        second = reducer.update(reducer.init(), b)
        return reducer.finalise(reducer.merge(reducer.update(reducer.init(), a), second))

    def total(a: Any, b: Any, **options: Any) -> Any:
        reducer = ddnref.sum_reducer(square, **options)
        return reducer.finalise(reducer.update(reducer.update(reducer.init(), a), b))

    return [
        target(
            ddnref.gram_reducer,
            _shards,
            "factor factor",
            gram,
            is_complex=True,
            options={"shards": "name"},
            functions=("gram_reducer", "GramState", "Reducer"),
        ),
        target(
            ddnref.sum_reducer,
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

    def check(f: Callable[..., Any]) -> Any:
        def call(x: Any, **options: Any) -> Any:
            try:
                return f(sine, cosine, x, needs=(0,), **options).passed
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
        target(
            testing.check_vjp,
            lambda rng, batch, m, c: (normal(rng, (m,)),),
            "inputs",
            check(testing.check_vjp),
            items=False,
            options=several,
            double=True,
        ),
        target(
            testing.assert_vjp,
            lambda rng, batch, m, c: (normal(rng, (m,)),),
            "inputs",
            check(testing.assert_vjp),
            like=testing.check_vjp,
            items=False,
            options=several,
            double=True,
        ),
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
