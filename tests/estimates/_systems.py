"""Linear systems and least squares: factorised, by `lsmr`, and by iterations that estimate their error on request."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np

import ddnref
from ddnref import krylov, operators
from ddnref._rules.table import RULES, TRIALS
from ddnref.verify._hard import near_singular, scaled_solve, tiny

from ._results import ITERATIONS, Promise, Results, distance, joined, of_batch

RTOL = 1e-8
"""The tolerance up to which the promise for estimates on request holds."""
GROUP = 25
"""Systems of one shape, which are solved at once."""


def exact(a, b, x_bar):
    """The solution of least squares, or the shortest one, and the gradient to A, in 50 digits."""
    with mpmath.workdps(50):
        a, b, x_bar = (mpmath.matrix(v.astype(float).tolist()) for v in (a, b, x_bar))
        if a.rows >= a.cols:
            h = a.T * a
            x, z = mpmath.lu_solve(h, a.T * b), mpmath.lu_solve(h, x_bar)
            y = a * z
            a_bar = (b - a * x) * z.T - y * x.T
        else:
            h = a * a.T
            w, y = mpmath.lu_solve(h, b), mpmath.lu_solve(h, a * x_bar)
            x = a.T * w
            a_bar = w * (x_bar - a.T * y).T - y * x.T
        return np.asarray(x.tolist(), dtype=float)[:, 0], np.asarray(a_bar.tolist(), dtype=float)


def with_values(rng, m, n, values):
    """A matrix with these singular values."""
    k = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((j, k)))[0] for j in (m, n))
    return (u * values) @ v.T


# --- factorised -----------------------------------------------------------------------------------------------------


def dense_system(rng: np.random.Generator, number: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """A and b: any condition, square, tall or wide, graded too; units of unknowns; dependent features; an easy one."""
    match number % 6:
        case 0:
            return scaled_solve(RULES["solve"], rng, dtype).arrays[:2]
        case 1:
            name = ("solve", "qr")[int(rng.integers(2))]
            a, *b = near_singular(RULES[name], rng, dtype).arrays
            return a, b[0] if b else rng.standard_normal(len(a)).astype(dtype)
        case 2:
            sample = TRIALS["linear_solve"].sample(np.asarray, rng, (), int(rng.integers(2, 9)), False)
            return tuple(array.astype(dtype) for array in sample.inputs)
    m, n = ((6, 6), (8, 4), (4, 8))[number % 3]
    condition = 10 ** rng.uniform(0, 11 if dtype is np.float64 else 4)
    a = with_values(rng, m, n, np.geomspace(1, 1 / condition, min(m, n)))
    a = a * 10.0 ** rng.uniform(-3, 3, n) if rng.integers(4) == 0 and m >= n else a
    b = rng.standard_normal(m) if rng.integers(2) else a @ rng.standard_normal(n)
    return a.astype(dtype), b.astype(dtype)


def direct(rng: np.random.Generator, problems: int, dtype: Any) -> list[Results]:
    """Solutions and gradients by a factorisation."""
    rows = []
    for number in range(problems):
        a, b = dense_system(rng, number, dtype)
        x_bar = rng.standard_normal(a.shape[-1]).astype(dtype)
        x, info = ddnref.linear_solve(a, b, solver="direct", throw=False)
        (a_bar, _), more = ddnref.linear_solve_vjp(x_bar, x, a, b, solver="direct", throw=False)
        if np.isnan(x).any():
            rows += [(np.nan, info.error, info.converged, np.nan, more.error, more.converged)]
            continue
        right, right_bar = exact(a, b, x_bar)
        errors = distance(x, right), distance(a_bar, right_bar, 2)
        rows += [(errors[0], info.error, info.converged, errors[1], more.error, more.converged)]
    columns = list(zip(*rows, strict=True))
    names = ("linear_solve, direct", "linear_solve_vjp, direct")
    return [of_batch(name, dtype, Promise(), *columns[3 * i : 3 * i + 3]) for i, name in enumerate(names)]


# --- by iteration ---------------------------------------------------------------------------------------------------


def refined(a: np.ndarray, b: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Least squares or shortest solutions of a batch with A of full rank, with residuals in extended precision."""
    size = np.ldexp(1.0, np.frexp(np.max(np.abs(a), axis=(-2, -1), keepdims=True))[1])
    a, b = (a / size).astype(np.longdouble), b.astype(np.longdouble)[..., None]
    inverse, x = np.linalg.pinv(a.astype(float)), 0 * np.swapaxes(a, -1, -2) @ b
    m, n = a.shape[-2:]
    if m == n:
        for _ in range(rounds):
            x = x + inverse @ (b - a @ x).astype(float)
    else:
        # Solve r + A x = b, Aᵀ r = 0, or x = Aᵀ w, A x = b, both of which are one symmetric system.
        wide, adjoint = m < n, np.swapaxes(a, -1, -2)
        tall, tall_inverse = (adjoint, np.swapaxes(inverse, -1, -2)) if wide else (a, inverse)
        r, y = (x, 0 * b) if wide else (0 * b, x)  # the long vector and the short one
        for _ in range(rounds):
            f = (-(r + tall @ y) if wide else b - r - tall @ y).astype(float)
            g = ((b if wide else 0) - np.swapaxes(tall, -1, -2) @ r).astype(float)
            y_step = tall_inverse @ (f - np.swapaxes(tall_inverse, -1, -2) @ g)
            r = r + (f - tall.astype(float) @ y_step)
            y = y + y_step
        x = r if wide else y
    return (x / size)[..., 0]


def least_squares(rng: np.random.Generator, problems: int, dtype: Any) -> list[Results]:
    """Tall and wide systems by `lsmr`: one small value, clusters, spread, consistent or not, tiny ones, easy ones."""
    parts = []
    for first in range(0, problems, GROUP):
        count, kind = min(GROUP, problems - first), first // GROUP % 6
        loose = 1e-5 if dtype is np.float64 else 1e-2
        rtol = loose if rng.integers(2) else None
        if kind == 5:
            drawn = [tiny(RULES["linear_solve"], rng, dtype).arrays[:2] for _ in range(count)]
        else:
            m, n = ((40, 20), (20, 40))[int(rng.integers(2))]
            drawn = [least_squares_system(rng, kind, m, n, dtype) for _ in range(count)]
        # Systems of one shape together; the tiny ones have several.
        for shape in {a.shape for a, _ in drawn}:
            a, b = (np.stack(part) for part in zip(*(pair for pair in drawn if pair[0].shape == shape), strict=True))
            x, info = krylov.lsmr(operators.dense(a), b, rtol=rtol, maxiter=1000, throw=False)
            error = distance(x, refined(a.astype(float), b.astype(float)))
            promise = ITERATIONS if dtype is np.float64 else None
            parts.append(of_batch("lsmr", dtype, promise, error, info.error, info.converged))
    return [joined(parts)]


def least_squares_system(
    rng: np.random.Generator, kind: int, m: int, n: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """A and b with one of four spectra of any condition up to 1e5, or 1e3 in float32, or near orthogonal columns."""
    k = min(m, n)
    condition = 10 ** rng.uniform(0.5, 5 if dtype is np.float64 else 3)
    values = (
        np.geomspace(1, 1 / condition, k), np.append(np.linspace(1, 0.5, k - 1), 1 / condition),
        np.linspace(1, 1 / condition, k), np.where(np.arange(k) % 2, 1.0, 1 / condition), np.linspace(1, 0.5, k),
    )[kind]  # fmt: skip
    a = with_values(rng, m, n, values)
    b = rng.standard_normal(m) if rng.integers(3) else a @ rng.standard_normal(n)
    return a.astype(dtype), b.astype(dtype)


def on_request(name: str, rng: np.random.Generator, problems: int, dtype: Any) -> list[Results]:
    """Solutions and gradients of square systems by an iteration that solves for its error too."""
    found: tuple[list[Results], list[Results]] = ([], [])
    promise = ITERATIONS if name == "cg" and dtype is np.float64 else None
    options = {"solver": name, "maxiter": 2000, "estimate_error": True, "throw": False}
    if dtype is np.float64:
        options["rtol"] = RTOL
    for first in range(0, problems, GROUP):
        count, kind = min(GROUP, problems - first), first // GROUP % 5
        drawn = [square_system(rng, name, kind, dtype) for _ in range(count)]
        for shape in {a.shape for a, _ in drawn}:
            a, b = (np.stack(part) for part in zip(*(pair for pair in drawn if pair[0].shape == shape), strict=True))
            # The gradient grows with the square of the inverse, and must stay in range.
            size = np.ldexp(1.0, np.frexp(np.max(np.abs(a), axis=(-2, -1)))[1])[:, None]
            x_bar = (size * rng.standard_normal(b.shape)).astype(dtype)
            symmetric = name in ("cg", "minres")
            operator = operators.dense(a, self_adjoint=symmetric, positive_definite=symmetric)
            x, info = ddnref.linear_solve(operator, b, **options)
            ((a_bar,), _), more = ddnref.linear_solve_vjp(x_bar, x, operator, b, **options)
            right, y = (refined(s.astype(float), v.astype(float)) for s, v in ((a, b), (np.swapaxes(a, -1, -2), x_bar)))
            errors = distance(x, right), distance(a_bar, -y[..., :, None] * right[..., None, :], 2)
            for part, label, error, said in zip(
                found, ("linear_solve", "linear_solve_vjp"), errors, (info, more), strict=True
            ):
                part.append(of_batch(f"{label}, {name}", dtype, promise, error, said.error, said.converged))
    return list(map(joined, found))


def square_system(rng: np.random.Generator, name: str, kind: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """A and b with one of three spectra of any condition up to 1e3, tiny, or near the identity."""
    if kind == 3:
        return tiny(RULES["linear_solve"], rng, dtype).arrays[:2]
    n = 30
    if kind == 4:
        a, b = (z.astype(dtype) for z in TRIALS["linear_solve"].sample(np.asarray, rng, (), n, False).inputs)
        return (a @ a.T if name in ("cg", "minres") else a), b
    condition = 10 ** rng.uniform(0.5, 3)
    values = (
        np.geomspace(1, condition, n), np.append(np.linspace(1, 2, n - 1), condition), np.linspace(1, condition, n),
    )[kind]  # fmt: skip
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    a = ((q * values) @ q.T).astype(dtype)
    return (a + a.T) / 2, rng.standard_normal(n).astype(dtype)
