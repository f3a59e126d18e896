"""Faults that this library once had, each in a copy of a rule: the hard problems must find every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ddnref._kernels import dense
from ddnref._rules.contract import Rule
from ddnref._rules.table import RULES
from ddnref.errors import SingularError
from ddnref.operators import as_operator

EPS = 16


def _t(x: Any) -> Any:
    return np.conj(np.swapaxes(x, -1, -2))


def _unit(x: Any) -> float:
    return float(np.finfo(x.dtype).eps)


def _plain_formula(rule: Rule) -> Rule:
    """Rounding of ``VᴴV̄`` over every gap that is not one of equal eigenvalues."""

    def vjp(w_bar: Any, v_bar: Any, w: Any, v: Any, **options: Any) -> Any:
        gap = w - w[:, None]
        far = np.abs(gap) > EPS * _unit(w) * np.max(np.abs(w))
        half = v @ (np.where(far, _t(v) @ v_bar / np.where(far, gap, 1), 0)) @ _t(v)
        return (half + _t(half)) / 2

    return rule._replace(vjp=vjp)


def _differences_of_values(rule: Rule) -> Rule:
    """The rounding of f was taken to be relative to f, also where f subtracts."""

    def vjp(y_bar: Any, y: Any, w: Any, v: Any, *, f: Any, df: Any, **options: Any) -> Any:
        a, b = w[:, None], w[None, :]
        gap, mean = a - b, (df(a) + df(b)) / 2
        quotient = (f(a) - f(b)) / np.where(gap == 0, 1, gap)
        rounding = 2 * _unit(w) * (np.abs(f(a)) + np.abs(f(b))) / np.where(gap == 0, 1, np.abs(gap))
        phi = np.where((gap == 0) | (np.abs(quotient - mean) <= rounding), mean, quotient)
        return v @ (phi * (_t(v) @ y_bar @ v)) @ _t(v)

    return rule._replace(vjp=vjp)


def _pivots_by_their_size(rule: Rule) -> Rule:
    """A column in small units counted as one that depends on the others."""

    def vjp(q_bar: Any, r_bar: Any, q: Any, r: Any, **options: Any) -> Any:
        size = np.abs(np.diagonal(r))
        if np.min(size) <= len(r) * _unit(size) * np.max(size):
            raise SingularError("R is singular to working precision.")
        return rule.vjp(q_bar, r_bar, q, r, **options)

    return rule._replace(vjp=vjp)


def _units_in_the_factors(rule: Rule) -> Rule:
    """Singular by the pivots themselves, whatever the units."""

    def forward(a: Any, b: Any, **options: Any) -> Any:
        if np.linalg.cond(a) > 1 / (EPS * _unit(a)):
            raise SingularError("A matrix is singular.")
        return rule.forward(a, b, **options)

    return rule._replace(forward=forward)


def _normal_equations(rule: Rule) -> Rule:
    """The bias as a column of ones beside features that are far from zero."""

    def forward(a: Any, b: Any, weights: Any, ridge: Any = None, **options: Any) -> Any:
        full = np.concatenate([a, np.ones_like(a[:, :1])], axis=1)
        h = full.T @ (weights[:, None] * full)
        if np.linalg.cond(h) > 1 / (EPS * len(h) * _unit(h)):
            raise SingularError("The normal equations are singular.")
        return np.linalg.solve(h, full.T @ (weights * b)), ()

    return rule._replace(forward=forward)


def _rayleigh_quotients(rule: Rule) -> Rule:
    """Eigenvalues of the symmetric part of ``QᵀXQ``, converged by a residual relative to a huge matrix."""

    def function(x: Any, *, n: int = 1, throw: bool = True) -> Any:
        q = np.linalg.qr(np.cos(np.arange(x.shape[0] * n, dtype=x.dtype)).reshape(-1, n))[0]
        for _ in range(500):
            image = x @ q
            t = q.T @ image
            if np.linalg.norm(image - q @ t) <= 1e-9 * np.linalg.norm(x):
                break
            q = np.linalg.qr(image)[0]
        info = rule.function(np.eye(2, dtype=x.dtype), throw=False, **({} if n == 1 else {"n": 1}))[1]
        return (np.diagonal(t), q), info._replace(converged=np.asarray(True), **_no_error(info))

    return rule._replace(function=function)


def _no_error(info: Any) -> dict[str, Any]:
    """An estimate of the error that is blind, where iterations have one."""
    return {"error": np.zeros(())} if hasattr(info, "error") else {}


def _singular_by_rounding(rule: Rule) -> Rule:
    """A zero eigenvalue that rounding made positive has an inverse square root."""

    def forward(x: Any, **options: Any) -> Any:
        w, v = np.linalg.eigh(x)
        if np.min(w) <= 0:
            raise SingularError("An eigenvalue is not positive.")
        return (v * w**-0.5) @ _t(v), (w, v)

    return rule._replace(forward=forward)


def _squares(rule: Rule) -> Rule:
    """The squared length of ``Aᴴb`` underflows, so that x = 0 counts as the solution."""

    def forward(operator: Any, b: Any, **options: Any) -> Any:
        operator = as_operator(operator)
        gradient = _t(operator.params[0]) @ b
        with np.errstate(all="ignore"):
            square = np.sum(gradient * gradient)
        if square == 0:
            (_, saved), info = rule.forward(operator.with_params(np.eye(len(b), dtype=b.dtype)), b, **options)
            return (0 * b, saved), info
        return rule.forward(operator, b, **options)

    return rule._replace(forward=forward)


def _one_gauge(rule: Rule) -> Rule:
    """One additive constant for a plan of several blocks, each of which has its own."""

    def vjp(plan_bar: Any, plan: Any, *rest: Any, **options: Any) -> Any:
        p, q = np.sum(plan, axis=1), np.sum(plan, axis=0)
        laplacian = np.diag(q) - plan.T @ (plan / p[:, None])
        if np.linalg.cond(laplacian + np.outer(q, q)) > 1 / (EPS * len(q) * _unit(q)):
            raise SingularError("The plan splits into parts that exchange no mass.")
        return rule.vjp(plan_bar, plan, *rest, **options)

    return rule._replace(vjp=vjp)


def _products_of_the_region(rule: Rule) -> Rule:
    """Products in the precision that the region asks for."""

    def forward(x: Any, **options: Any) -> Any:
        w, v = dense.eigh((x + x.mT) / 2)
        return ((v * w**0.5) @ v.mT).to(x.dtype), (w, v)

    return rule._replace(forward=forward)


def _through_singular_vectors(rule: Rule) -> Rule:
    """Derivatives of U and V one by one, as automatic differentiation has them."""

    def vjp(w_bar: Any, h_bar: Any, w: Any, h: Any, u: Any, s: Any, vh: Any, **options: Any) -> Any:
        v = _t(vh)
        g = (h_bar + _t(h_bar)) / 2
        inside, of_v = _t(u) @ w_bar @ v, _t(v) @ (_t(w_bar) @ u @ vh + 2 * g @ (v * s) @ vh) @ v
        gap = s**2 - s[:, None] ** 2
        f = np.where(gap == 0, 0, 1 / np.where(gap == 0, 1, gap))
        left, right = f * (inside - _t(inside)), f * (of_v - _t(of_v))
        of_s = np.real(np.diagonal(_t(v) @ g @ v))
        both = u @ (left * s + s[:, None] * right + np.diag(of_s)) @ vh
        return both + (w_bar @ v - u @ inside) / s @ vh

    return rule._replace(vjp=vjp)


def _rank_alone(rule: Rule) -> Rule:
    """The formula of the matrices of one rank, also where what was dropped is not zero."""

    def vjp(p_bar: Any, p: Any, u: Any, s: Any, inverse: Any, vh: Any, x: Any, **options: Any) -> Any:
        left, right = _t(p_bar) @ p, p @ _t(p_bar)
        return (left - x @ p @ left) @ _t(p) + _t(p) @ (right - right @ p @ x) - _t(p) @ p_bar @ _t(p)

    return rule._replace(vjp=vjp)


OLD: dict[str, tuple[str, str, Callable[[Rule], Rule], str]] = {
    "rounding over a small gap": ("clusters at every gap", "eigh", _plain_formula, "a wrong number"),
    "quotients of a function that cancels": (
        "functions that cancel", "spectral_function", _differences_of_values, "a wrong number",
    ),
    "units of unknowns": ("units of unknowns", "solve", _units_in_the_factors, "SingularError"),
    "units of columns": ("units of columns", "qr", _pivots_by_their_size, "SingularError"),
    "normal equations with a bias column": (
        "units of features", "weighted_least_squares", _normal_equations, "SingularError",
    ),
    "Rayleigh quotients of a non-normal matrix": (
        "non-normal", "simultaneous_iteration", _rayleigh_quotients, "a wrong number",
    ),
    "differences of singular values": ("close singular values", "polar", _through_singular_vectors, "a wrong number"),
    "nothing but the rank": ("dropped singular values", "pinv", _rank_alone, "a wrong number"),
    "singular as rounding has it": ("near-singular", "invsqrtm", _singular_by_rounding, "accepted a singular matrix"),
    "squares of a tiny operator": ("tiny operators", "linear_solve", _squares, "a wrong number"),
    "one gauge for several blocks": ("splitting plans", "sinkhorn", _one_gauge, "SingularError"),
    "products in the precision of the region": (
        "low-precision regions", "sqrtm", _products_of_the_region, "a wrong number",
    ),
}  # fmt: skip
"""The kind of problem, the rule, the fault, and what the finding says."""


def old_rule(name: str) -> Rule:
    """A copy of a rule with that fault."""
    _, rule, fault, _ = OLD[name]
    return fault(RULES[rule])
