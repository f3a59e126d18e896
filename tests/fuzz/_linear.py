"""Eigenpairs, systems and operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse

import ddnref
from ddnref import krylov, operators

from ._drivers import definite, normal, target
from ._targets import Target, _solve, off, random_like, sym

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


def _split(rng: Any, batch: Any, m: int, is_complex: bool) -> tuple[Any, ...]:
    w, v = np.linalg.eigh(definite(rng, batch, m, is_complex))
    w[..., : m // 2] = w[..., :1]  # equal ones
    return normal(rng, (*batch, m, m), is_complex), w, v


def _first_order(arrays: Any, outputs: Any, **options: Any) -> float:
    """The eigenvalues of the direction inside each cluster, where the drawn ones are at most one."""
    x_dot, w, v = arrays
    inside = np.sum(w == w[0])
    s = np.conj(v.T) @ sym(x_dot) @ v
    wanted = np.concatenate([np.linalg.eigvalsh(s[:inside, :inside]), np.real(np.diagonal(s))[inside:]])
    return off(outputs[0] - wanted, np.max(np.abs(x_dot)) * np.max(np.abs(v), initial=0.0) ** 2)


def eigen_targets() -> list[Target]:
    return [
        target(ddnref.eigen_residual, _pairs, "x w v", powers={"v": (1,)}),
        target(ddnref.fixed_point_residual, _pairs, "x w v", powers={"x": (0,), "w": (0,)}),
        target(ddnref.gauge_residual, _gauge, "w_bar v_bar w v", optional=("w_bar", "v_bar")),
        target(
            ddnref.cluster_derivatives,
            _split,
            "x_dot w v",
            check=_first_order,
            powers={"x_dot": (1,)},
            is_complex=True,
        ),
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
            return solver(operators.dense(a, self_adjoint=True, positive_definite=True), b, **options)

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

    solvers = (krylov.cg, krylov.minres, krylov.bicgstab, krylov.gmres, krylov.lsmr)

    return [*map(of, solvers)]


# --- operators --------------------------------------------------------------------------------------------------


def everything(operator: operators.LinearOperator, x: Any) -> Any:
    """All that an operator does, once."""
    y = operator(x)
    with np.errstate(all="ignore"):  # the bare formulas, which solvers call, look at nothing
        return y, operator.adjoint(operator.params, y), *operator.params_vjp(operator.params, y, x)


EDGES = np.asarray([[0, 1], [1, 2], [3, 1], [4, 2]])
PLACES = np.asarray([[3, 0, 1, 2, 4, 0], [1, 2, 3, 4, 0, 2]])  # an entry in each row and column
PARAMS = dict.fromkeys(
    ("a", "d", "m", "kernel", "column", "row", "values", "weights", "operator", "c", "damping", "operators"),
    ("params",),
)


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

        return everything(operators.LinearOperator((d,), product, product, bar, (4,), (4,)), x)

    return [
        of(operators.dense, matrix, "a x", lambda a, x, **o: everything(operators.dense(a, **o), x)),
        of(
            operators.as_operator,
            matrix,
            "a x",
            lambda a, x, **o: everything(operators.as_operator(a, "a", **o), x),
        ),
        of(
            operators.diagonal,
            points,
            "d x",
            lambda d, x, **o: everything(operators.diagonal(d, **o), x),
            items=False,
        ),
        of(
            operators.mask,
            lambda rng, batch, m, c: (rng.uniform(0, 1, m), normal(rng, (*batch, m), c)),
            "m x",
            lambda m, x, **o: everything(operators.mask(m, **o), x),
            items=False,
        ),
        of(
            operators.convolution,
            kernel,
            "kernel x",
            lambda k, x, **o: everything(operators.convolution(k, n, **o), x),
            options={"boundary": "name"},
        ),
        of(
            operators.convolution,
            kernel,
            "kernel x",
            lambda k, x, **o: everything(operators.convolution(k, n, **{"boundary": "reflect", **o}), x),
        ),
        of(
            operators.toeplitz,
            lambda *w: (points(*w)[0], *points(*w)),
            "column row x",
            lambda c, r, x, **o: everything(operators.toeplitz(c, r, **o), x),
            optional=("row",),
            unused=("row",),  # its first entry is that of the column
        ),
        of(
            operators.difference,
            grid,
            "x",
            lambda x, **o: everything(operators.difference((4, 5), **o), x),
        ),
        of(
            operators.coo,
            lambda rng, batch, m, c: (normal(rng, (*batch, 6), c), normal(rng, (*batch, 5), c)),
            "values x",
            lambda v, x, **o: everything(operators.coo(v, *PLACES, (5, 5), **o), x),
        ),
        of(
            operators.laplacian,
            lambda rng, batch, m, c: (rng.uniform(0.5, 2.0, (*batch, 4)), normal(rng, (*batch, 5), c)),
            "weights x",
            lambda w, x, **o: everything(operators.laplacian(EDGES, w, 5, **o), x),
        ),
        of(
            operators.scaled,
            coefficient,
            "operator c x",
            lambda a, s, x, **o: everything(operators.scaled(a, s, **o), x),
        ),
        of(
            operators.normal,
            coefficient,
            "operator damping x",
            lambda a, s, x, **o: everything(operators.normal(a, s, **o), x),
            optional=("damping",),
        ),
        of(
            operators.add,
            square,
            "operators operators x",
            lambda a, b, x, **o: everything(operators.add(a, b, **o), x),
        ),
        of(
            operators.compose,
            square,
            "operators operators x",
            lambda a, b, x, **o: everything(operators.compose(a, b, **o), x),
        ),
        of(
            operators.stack,
            square,
            "operators operators x",
            lambda a, b, x, **o: everything(operators.stack(a, b, **o), x),
        ),
        of(
            operators.block_diagonal,
            lambda *w: (*square(*w)[:2], np.stack([points(*w)[0], points(*w)[0]], axis=-2)),
            "operators operators x",
            lambda a, b, x, **o: everything(operators.block_diagonal(a, b, **o), x),
        ),
        of(
            operators.kronecker,
            lambda *w: (*square(*w)[:2], square(*w)[0]),
            "operators operators x",
            lambda a, b, x, **o: everything(operators.kronecker(a, b, **o), x),
        ),
        of(
            operators.adjoint,
            lambda *w: (np.swapaxes(matrix(*w)[0], -1, -2).copy(), matrix(*w)[1]),
            "operator x",
            lambda a, x, **o: everything(operators.adjoint(a, **o), x),
        ),
        of(
            operators.transpose,
            lambda *w: (np.swapaxes(matrix(*w)[0], -1, -2).copy(), matrix(*w)[1]),
            "operator x",
            lambda a, x, **o: everything(operators.transpose(a, **o), x),
        ),
        target(
            operators.LinearOperator,
            lambda rng, batch, m, c: (normal(rng, (4,)), normal(rng, (*batch, 4))),
            "params x",
            own,
            like=lambda: None,
            items=False,
            theirs=("params",),
        ),
        of(
            operators.check_operator,
            matrix,
            "a x",
            lambda a, x, **o: operators.check_operator(operators.dense(a), x, **o).passed,
            items=False,
            options={"rtol": "tolerance", "vjp_rtol": "tolerance", "seed": "seed"},
            double=True,
            optional=("x",),
        ),
    ]


def scipy_targets() -> list[Target]:
    """Make the targets for conversions to and from SciPy, on NumPy alone."""

    def back(a: Any, **options: Any) -> Any:
        operator = operators.to_scipy(operators.dense(a), **options)
        return operator @ np.ones(operator.shape[1], operator.dtype)

    sparse = scipy.sparse.csr_array(np.asarray([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    return [
        target(
            operators.to_scipy,
            lambda rng, batch, m, c: (normal(rng, (m, m + 1)),),
            "a",
            back,
            items=False,
            numpy_only=True,
            aliases={"a": ("parameters",)},
        ),
        target(
            operators.from_sparse,
            lambda rng, batch, m, c: (normal(rng, (*batch, 3)),),
            "x",
            lambda x, **o: (operators.from_sparse(sparse, **o)(x),),
            numpy_only=True,
            double=True,
        ),
        target(
            operators.from_scipy,
            lambda rng, batch, m, c: (normal(rng, (*batch, 3)),),
            "x",
            lambda x, **o: (operators.from_scipy(sparse, **o)(x),),
            numpy_only=True,
            double=True,
        ),
    ]
