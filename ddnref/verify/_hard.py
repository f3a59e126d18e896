"""Hard problems with a known answer, each of a kind that once led to a wrong number in silence.

``ddnref verify`` and the fuzz campaign draw them. Each has arrays, a call of one rule, and a judge that knows the
answer from another way to compute it: in double precision, in closed form, or from how the problem was made.

===========================  =========================================================================================
kind                         what is hard
===========================  =========================================================================================
clusters at every gap        a loss of the projector of a cluster whose eigenvalues are 1e-16 to 0.3 apart
clusters of pencils          the same for two matrices, in units that differ by many powers of two
functions that cancel        ``f(X)`` with an f that subtracts, such as ``1 − exp(−w)``, at close eigenvalues
units of unknowns            unknowns of a system in units that differ by many powers of two
units of columns             columns of a matrix likewise
units of features            features of a fit likewise, and far from zero
close singular values        polar factors of a matrix whose singular values are 1e-16 to 0.3 apart
dropped singular values      a pseudo-inverse for which some values count as zero that are not
non-normal                   matrices whose eigenvectors are nearly parallel, of units that differ
near-singular                covariances with a dependent feature, and regular ones of a large condition number
tiny operators               operators whose squares leave the range of exponents
splitting plans              transport plans in blocks that exchange no mass
low-precision regions        tensors of single precision inside ``torch.autocast``
===========================  =========================================================================================
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from ddnref import operators
from ddnref._core.arrays import Array, adjoint, as_tuple
from ddnref._rules.binding import keywords, options_of, plain_forward, plain_vjp
from ddnref._rules.contract import Rule
from ddnref._rules.table import RULES, TRIALS
from ddnref.errors import DdnrefError, SingularError

Numbers = NDArray[Any]


class Hard(NamedTuple):
    """One hard problem."""

    what: str
    """How it was made, in words for a report."""
    arrays: tuple[Numbers, ...]
    call: Callable[..., tuple[Array, ...]]
    """Takes the arrays in any library."""
    judge: Callable[[tuple[Numbers, ...]], tuple[float, float]]
    """Error of the results, as arrays of NumPy, and its tolerance."""
    is_singular: bool = False
    """Whether the call must raise `SingularError` instead."""


Make = Callable[[Rule, np.random.Generator, Any], Hard]
"""``make(rule, rng, dtype)`` draws a problem for the functions of a rule."""


def measure(
    problem: Hard, convert: Callable[[Numbers], Array] = np.asarray, to_numpy: Callable[[Array], Numbers] = np.asarray
) -> tuple[float, float]:
    """Return the error and the tolerance of one problem; a refusal that is wrong, or missing, is infinite."""
    try:
        results = problem.call(*map(convert, problem.arrays))
    except SingularError:
        return (0.0 if problem.is_singular else math.inf), 0.0
    except DdnrefError:
        return math.inf, 0.0
    if problem.is_singular:
        return math.inf, 0.0
    with np.errstate(all="ignore"):
        error, tolerance = problem.judge(tuple(map(to_numpy, results)))
    return (math.inf if math.isnan(error) else error), tolerance


# --- random matrices ----------------------------------------------------------------------------------------------


def _normal(rng: np.random.Generator, dtype: Any, *shape: int) -> Numbers:
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else z


def _orthogonal(rng: np.random.Generator, dtype: Any, m: int) -> Numbers:
    q: Numbers = np.linalg.qr(_normal(rng, dtype, m, m))[0]
    return q


def _t(x: Numbers) -> Numbers:
    y: Numbers = np.conj(np.swapaxes(x, -1, -2))
    return y


def _double(x: Numbers) -> Numbers:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def _eps(dtype: Any) -> float:
    return float(np.finfo(dtype).eps)


def _off(x: Numbers, reference: Numbers) -> float:
    return float(np.linalg.norm(_double(x) - reference) / (np.linalg.norm(reference) or 1.0))


def _steps(rng: np.random.Generator, n: int) -> Numbers:
    """Ascending numbers from 0 to at most 0.3, with neighbours that are equal or 1e-16 to 0.3 apart."""
    gaps = 10.0 ** rng.uniform(-16, -0.5, n - 1) * (rng.uniform(size=n - 1) > 0.1)
    total = float(np.sum(gaps))
    return np.concatenate([[0.0], np.cumsum(gaps)]) * min(1.0, 0.3 / (total or 1.0))


def _both(
    rule: Rule,
    inputs: tuple[Array, ...],
    options: dict[str, Any],
    bars: tuple[Any, ...] | Callable[..., tuple[Any, ...]],
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return outputs and cotangents of the inputs; `bars` are those of the outputs, or a function of these."""
    given = {**options, "throw": True}
    forward, vjp = ({k: v for k, v in given.items() if k in keywords(f)} for f in (rule.forward, rule.vjp))
    outputs, saved = plain_forward(rule)(*inputs, **forward)
    cotangents = bars(*outputs) if callable(bars) else bars
    needed = (inputs[i] for i in rule.needs)
    return outputs, plain_vjp(rule)(*cotangents, *outputs, *saved, *needed, **vjp)


# --- clusters at every gap ----------------------------------------------------------------------------------------


def clusters(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """``⟨C, P⟩`` with the projector P on the s eigenvectors of a cluster that is far from all others."""
    if rule.name.startswith("svd"):
        return _triples(rule, rng, dtype)
    m = int(rng.integers(3, 13))
    s = int(rng.integers(2, m))
    gram = rule.name.startswith("gram")
    # The s largest eigenvalues lie in [1, 1.3], the others, which may be close to each other too, in [0, 0.5].
    w = np.concatenate([0.2 + _steps(rng, m - s), 1.0 + _steps(rng, s)])
    v = _orthogonal(rng, dtype, m)
    if gram:
        x = (v[:, m - (n := int(rng.integers(s, m + 1))) :] * np.sqrt(w[m - n :])) @ _t(_orthogonal(rng, dtype, n))
    else:
        x = (v * w) @ _t(v)
    c = _normal(rng, dtype, m, m)
    x, c = x.astype(dtype), (c + _t(c)).astype(dtype)
    every = rule.name == "eigh"
    keep = (np.arange(m) >= m - s if every else np.ones(s)).astype(dtype)
    options = {} if every else {"k": s}

    def call(x: Array, c: Array, keep: Array) -> tuple[Array, ...]:
        return _both(rule, (x,), options, lambda *pairs: (None, 2 * (c @ pairs[1]) * keep))[1]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        # X̄ couples the cluster with the others alone, over gaps of 0.5 and more.
        square = _double(x) @ _t(_double(x)) if gram else _double(x)
        w, v = np.linalg.eigh((square + _t(square)) / 2)
        inside = np.arange(m) >= m - s
        coupled = inside[:, None] != inside
        phi = np.where(coupled, 1 / np.where(coupled, np.abs(w[:, None] - w), 1), 0)
        wanted = v @ (phi * (_t(v) @ _double(c) @ v)) @ _t(v)
        # Through the square of the factor the errors of eigenvectors count twice.
        tolerance = (120 if gram else 60) * _eps(dtype) * math.sqrt(m)
        return _off(results[0], 2 * wanted @ _double(x) if gram else wanted), tolerance

    return Hard(f"{s} of {m}, closest {np.min(np.diff(w[m - s :])):.0e}", (x, c, keep), call, judge)


def _triples(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """``⟨E, Π⟩``, Π the projector on the eigenvalues of ``[[0, X], [Xᴴ, 0]]`` that are the s largest values of X."""
    m, n = map(int, rng.integers(3, 13, 2))
    k = min(m, n)
    s = int(rng.integers(2, k))
    # The s largest values lie in [1, 1.3], the others in [0, 0.3], of which one is zero.
    values = np.concatenate([_steps(rng, k - s), 1.0 + _steps(rng, s)])[::-1]
    x = ((_orthogonal(rng, dtype, m)[:, :k] * values) @ _t(_orthogonal(rng, dtype, n)[:, :k])).astype(dtype)
    e = _normal(rng, dtype, m + n, m + n)
    e = (e + _t(e)).astype(dtype)
    every = rule.name == "svd"
    keep = (np.arange(k if every else s) < s).astype(dtype)

    def call(x: Array, of_u: Array, both: Array, of_v: Array, keep: Array) -> tuple[Array, ...]:
        def bars(u: Array, _: Array, vh: Array) -> tuple[Any, ...]:
            v = adjoint(vh)
            return (of_u @ u + both @ v) * keep, None, adjoint((of_v @ v + adjoint(both) @ u) * keep)

        return _both(rule, (x,), {} if every else {"k": s}, bars)[1]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        h = np.zeros((m + n, m + n), _double(x).dtype)
        h[:m, m:], h[m:, :m] = _double(x), _t(_double(x))
        w, q = np.linalg.eigh(h)
        inside = np.arange(m + n) >= m + n - s
        coupled = inside[:, None] != inside
        phi = np.where(coupled, 1 / np.where(coupled, np.abs(w[:, None] - w), 1), 0)
        wanted = 2 * (q @ (phi * (_t(q) @ _double(e) @ q)) @ _t(q))[:m, m:]
        return _off(results[0], wanted), 60 * _eps(dtype) * math.sqrt(m + n)

    arrays = (x, e[:m, :m].copy(), e[:m, m:].copy(), e[m:, m:].copy(), keep)
    return Hard(f"{s} of {m} x {n}, closest {np.min(-np.diff(values[:s])):.0e}", arrays, call, judge)


# --- clusters of pencils ------------------------------------------------------------------------------------------


def pencils(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """``⟨C, V_c V_cᴴ⟩`` with the s eigenvectors of a cluster of ``A v = w B v``, unknowns in units of powers of two."""
    m = int(rng.integers(3, 13))
    s = int(rng.integers(2, m))
    # The cluster is far from the others, as in `clusters`.
    w = np.concatenate([0.2 + _steps(rng, m - s), 1.0 + _steps(rng, s)])
    left = (_orthogonal(rng, dtype, m) * np.exp(rng.uniform(0, 1, m))) @ _orthogonal(rng, dtype, m)
    c = _normal(rng, dtype, m, m)
    a, b, c = (x.astype(dtype) for x in ((_t(left) * w) @ left, _t(left) @ left, c + _t(c)))
    units = _exponents(rng, dtype, m, 60)
    both = units[:, None] * units
    inside = np.arange(m) >= m - s
    given = tuple((x * both).astype(dtype) for x in (a, b, c))

    def call(a: Array, b: Array, c: Array, keep: Array) -> tuple[Array, ...]:
        return _both(rule, (a, b), {}, lambda _, v: (None, 2 * (c @ v) * keep))[1]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        # Through the root of B, in double precision; the cluster couples with the others alone.
        a_2, b_2 = ((_double(x) + _t(_double(x))) / 2 for x in (a, b))
        root = np.linalg.inv(np.linalg.cholesky(b_2))
        w, y = np.linalg.eigh(root @ a_2 @ _t(root))
        v = _t(root) @ y
        m_ = np.where(inside, 2 * _t(v) @ _double(c) @ v, 0)
        coupled = inside[:, None] != inside
        t = np.where(coupled, (m_ - _t(m_)) / np.where(coupled, 2 * (w - w[:, None]), 1), 0)
        wanted = v @ t @ _t(v), -v @ (t * (w + w[:, None]) / 2 + (m_ + _t(m_)) / 4) @ _t(v)
        errors = (_off(x * both, y) for x, y in zip(results, wanted, strict=True))
        return max(errors), 100 * _eps(dtype) * math.sqrt(m)

    what = f"{s} of {m}, closest {np.min(np.diff(w[m - s :])):.0e}, units up to 2**{np.log2(units.max()):.0f}"
    return Hard(what, (*given, inside.astype(dtype)), call, judge)


# --- functions that cancel ----------------------------------------------------------------------------------------


def _over(numerator: Numbers, gap: Numbers, limit: Numbers) -> Numbers:
    """A quotient with a gap, and its limit where that is zero."""
    return np.where(gap == 0, limit, numerator / np.where(gap == 0, 1, gap))


class _Function(NamedTuple):
    """A function that subtracts, its derivative, and its divided differences without a difference of values."""

    name: str
    f: Callable[[Array], Array]
    df: Callable[[Array], Array]
    divided: Callable[[Numbers, Numbers], Numbers]
    low: float


def _xp(w: Array) -> Any:
    return array_api_compat.array_namespace(w)


def _relaxation_difference(a: Numbers, b: Numbers) -> Numbers:
    return np.asarray(np.exp(-a) * _over(-np.expm1(a - b), b - a, np.ones_like(a)))


def _log_difference(a: Numbers, b: Numbers) -> Numbers:
    return _over(np.log1p((a - b) / (1 + b)), a - b, 1 / (1 + b))


def _logistic_difference(a: Numbers, b: Numbers) -> Numbers:
    # tanh(a) − tanh(b) = sinh(a − b) / (cosh a cosh b), at half the arguments and times a half.
    half = (a - b) / 2
    return np.asarray(_over(np.sinh(half), half, np.ones_like(a)) / (4 * np.cosh(a / 2) * np.cosh(b / 2)))


FUNCTIONS = (
    _Function("1 - exp(-w)", lambda w: 1 - _xp(w).exp(-w), lambda w: _xp(w).exp(-w), _relaxation_difference, -0.5),
    _Function("log(1 + w)", lambda w: _xp(w).log(1 + w), lambda w: 1 / (1 + w), _log_difference, -0.5),
    _Function(
        "sigmoid(w) - 1/2", lambda w: 1 / (1 + _xp(w).exp(-w)) - 0.5,
        lambda w: _xp(w).exp(-w) / (1 + _xp(w).exp(-w)) ** 2, _logistic_difference, -1.0,
    ),
    _Function(
        "w / (1 + w)", lambda w: 1 - 1 / (1 + w), lambda w: 1 / (1 + w) ** 2, lambda a, b: 1 / (1 + a) / (1 + b), -0.5
    ),
    _Function(
        "sqrt(1 + w**2) - 1", lambda w: _xp(w).sqrt(1 + w * w) - 1, lambda w: w / _xp(w).sqrt(1 + w * w),
        lambda a, b: (a + b) / (np.sqrt(1 + a * a) + np.sqrt(1 + b * b)), -1.0,
    ),
    _Function("w**3", lambda w: w**3, lambda w: 3 * w**2, lambda a, b: a * a + a * b + b * b, -1.0),
)  # fmt: skip


def cancelling(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """``⟨C, f(X)⟩`` where f subtracts: eigenvalues close to each other and to zero, or of a graph in parts."""
    m, f = int(rng.integers(3, 13)), FUNCTIONS[int(rng.integers(len(FUNCTIONS)))]
    if rng.integers(4) == 0:
        # The Laplacian of a graph in two or three parts: eigenvalues that are zero but for rounding.
        part = rng.integers(0, int(rng.integers(2, 4)), m)
        weights = np.triu(rng.uniform(size=(m, m)) * (part[:, None] == part), 1)
        x = np.diag((weights + weights.T).sum(0)) - weights - weights.T
        x = x.astype(dtype)
        made = "graph"
    else:
        starts = [0.0, *rng.uniform(f.low + 0.1, 1.5, 2)]
        w = np.concatenate(
            [a + _steps(rng, n) for a, n in zip(starts, (m - 2 * (m // 3), m // 3, m // 3), strict=True)]
        )
        v = _orthogonal(rng, dtype, m)
        x, made = ((v * w) @ _t(v)).astype(dtype), "clusters"
    c = _normal(rng, dtype, m, m)
    c = (c + _t(c)).astype(dtype)
    options = {"f": f.f, "df": f.df}

    def call(x: Array, c: Array) -> tuple[Array, ...]:
        return _both(rule, (x,), options, (c,))[1]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        square = _double(x)
        w, v = np.linalg.eigh((square + _t(square)) / 2)
        wanted = v @ (f.divided(w[:, None], w[None, :]) * (_t(v) @ _double(c) @ v)) @ _t(v)
        return _off(results[0], wanted), 4500 * _eps(dtype)

    return Hard(f"{f.name}, {made}, m={m}", (x, c), call, judge)


# --- scales -------------------------------------------------------------------------------------------------------


def _exponents(rng: np.random.Generator, dtype: Any, n: int, most: int) -> Numbers:
    """Powers of two, up to 2**±most in double precision and a third of that in single precision."""
    most = most if _eps(dtype) < 1e-10 else most // 3
    return np.ldexp(1.0, rng.integers(-most, most + 1, n))


def scaled_solve(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """``A x = b`` and its gradient with unknowns in units that differ by powers of two."""
    n = int(rng.integers(2, 9))
    a = (_orthogonal(rng, dtype, n) * rng.uniform(1, 10, n)) @ _orthogonal(rng, dtype, n)
    b, x_bar = _normal(rng, dtype, n), _normal(rng, dtype, n)
    units = _exponents(rng, dtype, n, 40)
    arrays = tuple(z.astype(dtype) for z in (a, b, x_bar))
    a, b, x_bar = map(_double, arrays)
    given = ((arrays[0] * units).astype(dtype), arrays[1], (arrays[2] * units).astype(dtype))

    def call(a: Array, b: Array, x_bar: Array) -> tuple[Array, ...]:
        (x,), (_, b_bar) = _both(rule, (a, b), {}, (x_bar,))
        return x, b_bar

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        x, b_bar = results
        errors = _off(x * units, np.linalg.solve(a, b)), _off(b_bar, np.linalg.solve(_t(a), x_bar))
        return max(errors), 2000 * _eps(dtype)

    return Hard(f"units of {n} unknowns", given, call, judge)


def scaled_qr(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """The gradient through Q, which the units of the columns do not change."""
    n = int(rng.integers(2, 7))
    m = n + int(rng.integers(0, 4))
    left, right = _orthogonal(rng, dtype, m)[:, :n], _orthogonal(rng, dtype, n)
    a = ((left * rng.uniform(1, 10, n)) @ right).astype(dtype)
    units, q_bar = _exponents(rng, dtype, n, 60), _normal(rng, dtype, m, n).astype(dtype)

    def call(a: Array, q_bar: Array) -> tuple[Array, ...]:
        return _both(rule, (a,), {}, (q_bar, None))[1]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        wanted = call(_double(a), _double(q_bar))[0]
        return _off(results[0] * units, wanted), 2000 * _eps(dtype)

    return Hard(f"units of {n} columns", ((a * units).astype(dtype), q_bar), call, judge)


def scaled_features(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """A fit of features far from zero, in units that differ by powers of two."""
    n, m = int(rng.integers(1, 5)), int(rng.integers(20, 51))
    far = 10.0 ** rng.uniform(0, 3 if _eps(dtype) > 1e-10 else 6)
    units = _exponents(rng, dtype, n, 30)
    a = ((far + rng.standard_normal((m, n))) * units).astype(dtype)
    b = (rng.standard_normal(m) + rng.standard_normal((m, n)) @ np.ones(n)).astype(dtype)
    weights = rng.uniform(0.5, 2.0, m).astype(dtype)

    def call(a: Array, b: Array, weights: Array) -> tuple[Array, ...]:
        return plain_forward(rule)(a, b, weights)[0]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        # Centred in extended precision, so that only the spread of the features is left.
        z, t, omega = a.astype(np.longdouble), b.astype(np.longdouble), weights.astype(np.longdouble)
        z = z - omega @ z / omega.sum()
        root = np.sqrt(omega)
        z, t = (root[:, None] * z / units).astype(float), (root * (t - omega @ t / omega.sum())).astype(float)
        slopes = np.linalg.lstsq(z, t, rcond=None)[0]
        # Relative to what the targets may move them by: slopes of noise may cancel.
        size = float(np.linalg.norm(t) * np.linalg.norm(np.linalg.pinv(z), 2))
        return float(np.linalg.norm(_double(results[0][:n]) * units - slopes)) / size, 100 * far * _eps(dtype)

    return Hard(f"{n} features at {far:.0e}", (a, b, weights), call, judge)


# --- non-normal ---------------------------------------------------------------------------------------------------


def non_normal(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """Eigenvalues by iteration of matrices whose eigenvectors are nearly parallel, or whose units differ."""
    base = 1e-8 if _eps(dtype) < 1e-10 else 1e-3
    if rng.integers(2):
        w = np.asarray([1.5, 1.0])
        x = np.asarray([[1.0, 10.0 ** rng.uniform(0, 12 if base < 1e-5 else 6)], [0.0, 1.5]])
    else:
        m = int(rng.integers(2, 7))
        w = 2.0 * 0.6 ** np.arange(m) * rng.choice([-1, 1], m)
        v = _orthogonal(rng, float, m) @ np.diag(rng.uniform(1, 3, m)) @ _orthogonal(rng, float, m)
        units = _exponents(rng, dtype, m, 20)
        x = units[:, None] * (v @ np.diag(w) @ np.linalg.inv(v)) / units
    n = 1 if rule.name == "power_iteration" else 2
    options: dict[str, Any] = {"throw": False} if n == 1 else {"throw": False, "n": n}

    def call(x: Array) -> tuple[Array, ...]:
        (w, _), info = rule.function(x, **options)
        return w, info.converged, *([info.error] if hasattr(info, "error") else [])

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        found, converged, *error = results
        if not np.all(converged):
            return 0.0, base
        # An estimate of the error that holds takes the place of the tolerance.
        allowed = max(base, 100 * float(np.max(error[0]))) if error else base
        return float(np.max(np.abs(np.reshape(found, (-1,)) / w[:n] - 1))), allowed

    return Hard(f"{len(x)} x {len(x)}, largest entry {np.max(np.abs(x)):.0e}", (x.astype(dtype),), call, judge)


# --- near-singular ------------------------------------------------------------------------------------------------


def _features(rng: np.random.Generator, dtype: Any, n: int) -> tuple[Numbers, str]:
    """Samples of n features of which one depends on the others."""
    z = _normal(rng, dtype, int(rng.integers(2 * n, 40)), n)
    how = ("duplicated", "combined", "centred")[int(rng.integers(3))]
    if how == "duplicated":
        z[:, -1] = z[:, 0] * 10.0 ** rng.uniform(0, 3)
    elif how == "combined":
        z[:, -1] = z[:, :-1] @ rng.standard_normal(n - 1)
    else:
        z = z - np.mean(z, axis=1, keepdims=True)
    return z, how


def near_singular(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """A dependent feature, which is refused whatever rounding makes of it, or a regular matrix, which is not."""
    n, singular = int(rng.integers(3, 9)), bool(rng.integers(2))
    tall = rule.name in ("qr", "weighted_least_squares")
    if singular:
        z, how = _features(rng, dtype, n)
        z = z.astype(dtype)
        x = z if tall else (_t(z) @ z / len(z)).astype(dtype)
    else:
        condition = 10.0 ** rng.uniform(0, 10 if _eps(dtype) < 1e-10 else 3)
        v, how = _orthogonal(rng, dtype, n), f"condition {condition:.0e}"
        w = condition ** -np.linspace(0, 1, n)
        x = ((_orthogonal(rng, dtype, 3 * n)[:, :n] if tall else v) * w) @ _t(v)
        x = x.astype(dtype)
    extra = (
        tuple(rng.uniform(1, 2, len(x)).astype(dtype) for _ in range(2))
        if rule.name == "weighted_least_squares"
        else ()
    )
    if rule.name == "solve":
        extra = (_normal(rng, dtype, n).astype(dtype),)

    def call(x: Array, *extra: Array) -> tuple[Array, ...]:
        if rule.name in ("sqrtm", "qr", "slogdet"):  # where the value exists, and its derivative does not
            return _both(rule, (x, *extra), {}, lambda *outputs: outputs)[1]
        given = {"throw": True, **({"bias": False} if tall else {})}
        return plain_forward(rule)(x, *extra, **given)[0]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        return (0.0 if all(np.all(np.isfinite(y)) for y in results) else math.inf), 0.0

    return Hard(how, (x, *extra), call, judge, singular)


# --- singular values ------------------------------------------------------------------------------------------------


def _factors(rng: np.random.Generator, dtype: Any, s: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """A tall matrix with these singular values, and its singular vectors."""
    n = len(s)
    u = _orthogonal(rng, dtype, n + int(rng.integers(0, 4)))[:, :n]
    v = _orthogonal(rng, dtype, n)
    return ((u * s) @ _t(v)).astype(dtype), u, v


def close_singular(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """A random loss of both polar factors, by sums of the values that the matrix was made from."""
    s = 0.5 + _steps(rng, int(rng.integers(2, 9)))
    x, u, v = _factors(rng, dtype, s)
    w_bar, h_bar = (_normal(rng, dtype, *shape).astype(dtype) for shape in (x.shape, (len(s), len(s))))
    r, t = _t(u) @ w_bar @ v, _t(v) @ (h_bar + _t(h_bar)) @ v / 2
    row, column = s[:, None], s[None, :]
    inner = (r - _t(r) + (row - column) * t) / (row + column) + t
    expected = u @ inner @ _t(v) + ((w_bar @ v - u @ r) / s) @ _t(v)

    def call(x: Array, *bars: Array) -> tuple[Array, ...]:
        return _both(rule, (x,), {}, bars)[1]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        return _off(results[0], expected), 100 * _eps(dtype)

    return Hard(f"values {s[0]:.1f} to {s[-1]:.3f}", (x, w_bar, h_bar), call, judge)


def dropped_singular(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """A random loss of a pseudo-inverse that drops small values, by divided differences of ``1 / s`` and 0."""
    kept, dropped = (int(k) for k in rng.integers(1, 4, 2))
    s = np.concatenate([[2.0], rng.uniform(0.5, 2, kept), rng.uniform(1e-3, 0.08, dropped)])
    x, u, v = _factors(rng, dtype, s)
    p_bar = _normal(rng, dtype, *x.shape[::-1]).astype(dtype)
    r, f = _t(u) @ _t(p_bar) @ v, np.where(s > 0.2, 1 / s, 0)
    row, column = s[:, None], s[None, :]
    mixed = (row > 0.2) != (column > 0.2)
    differences = np.where(mixed, _over(f[:, None] - f[None, :], row - column, 1e-3 + 0 * row), -np.outer(f, f))
    sums = (f[:, None] + f[None, :]) / (row + column)
    inner = differences * (r + _t(r)) / 2 + sums * (r - _t(r)) / 2
    expected = u @ inner @ _t(v) + ((_t(p_bar) @ v - u @ r) * f / s) @ _t(v)

    def call(x: Array, p_bar: Array) -> tuple[Array, ...]:
        return _both(rule, (x,), {"rtol": 0.1}, (p_bar,))[1]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        return _off(results[0], expected), 500 * _eps(dtype)

    return Hard(f"{dropped} of {len(s)} dropped", (x, p_bar), call, judge)


# --- tiny operators -----------------------------------------------------------------------------------------------


def tiny(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """A system by iteration whose operator is so small, or large, that its square is zero, or infinite."""
    n, double = int(rng.integers(3, 9)), _eps(dtype) < 1e-10
    p = int(rng.choice([-900, -600, -300, 500] if double else [-80, -66, -40, 66]))
    solver = ("cg", "minres", "bicgstab", "gmres", "lsmr")[int(rng.integers(5))]
    v = _orthogonal(rng, dtype, n)
    a = ((v * rng.uniform(1, 5, n)) @ _t(v)).astype(dtype)
    b, x_bar = (_normal(rng, dtype, n).astype(dtype) for _ in range(2))

    def call(a: Array, b: Array, x_bar: Array) -> tuple[Array, ...]:
        operator = operators.dense(a, self_adjoint=True, positive_definite=True)
        (x,), bars = _both(rule, (operator, b), {"solver": solver}, (x_bar,))
        return x, bars[-1]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        square = _double(a)
        wanted = np.linalg.solve(square, _double(b)), np.linalg.solve(_t(square), _double(x_bar))
        errors = (_off(np.ldexp(1.0, p) * _double(x), y) for x, y in zip(results, wanted, strict=True))
        return max(errors), 1e-6 if double else 1e-2

    return Hard(f"{solver}, 2**{p}", ((np.ldexp(1.0, p) * a).astype(dtype), b, x_bar), call, judge)


# --- splitting plans ----------------------------------------------------------------------------------------------


def splitting(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:
    """The gradient of ``⟨C, P⟩`` with respect to the cost, for a plan in blocks that exchange no mass."""
    blocks, eps = int(rng.integers(2, 4)), float(rng.uniform(0.2, 1.0))
    rows, columns = rng.integers(1, 4, blocks), rng.integers(1, 4, blocks)
    i, j = np.repeat(np.arange(blocks), rows), np.repeat(np.arange(blocks), columns)
    same = i[:, None] == j
    cost = (rng.uniform(size=same.shape) + np.where(same, 0, eps * rng.uniform(45, 200))).astype(dtype)
    p, q = ((1 / blocks / sizes[k]).astype(dtype) for sizes, k in ((rows, i), (columns, j)))
    c = rng.standard_normal(same.shape).astype(dtype)
    strength, by_array = np.asarray(eps, dtype), "eps" not in keywords(rule.forward)

    def call(cost: Array, p: Array, q: Array, eps: Array, c: Array) -> tuple[Array, ...]:
        inputs = (cost, p, q, eps) if by_array else (cost, p, q)
        (plan,), bars = _both(rule, inputs, {} if by_array else {"eps": float(strength)}, (c,))
        return plan, bars[0]

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        plan, found = map(_double, results)
        # The linear system of each block by itself, where the singular direction is the only one.
        inner = np.where(same, plan, 0)
        system = np.block([[np.diag(inner.sum(1)), inner], [inner.T, np.diag(inner.sum(0))]])
        weighted = inner * _double(c)
        u = np.linalg.pinv(system, rcond=1e-9, hermitian=True) @ np.concatenate([weighted.sum(1), weighted.sum(0)])
        wanted = inner * (u[: len(i), None] + u[len(i) :] - _double(c)) / float(strength)
        # Relative to the terms, which may cancel: at a vertex of the polytope nothing is left.
        size = float(np.max(np.abs(weighted))) / float(strength)
        return float(np.max(np.abs(found - wanted))) / size, 1e-7 if _eps(dtype) < 1e-10 else 1e-3

    return Hard(f"{blocks} blocks, eps {eps:.1f}", (cost, p, q, strength, c), call, judge)


# --- low-precision regions ----------------------------------------------------------------------------------------


def low_precision(rule: Rule, rng: np.random.Generator, dtype: Any) -> Hard:  # noqa: ARG001
    """Compare calls of PyTorch tensors outside and inside ``torch.autocast``, plain and through the bridge."""
    import torch

    def tensor(values: Any) -> Any:
        return torch.asarray(np.array(values, np.float32))

    sample = TRIALS[rule.name].sample(tensor, rng, (), 5, False)
    options = {k: 1e-5 if k == "rtol" else v for k, v in sample.options.items()}
    forward, vjp = options_of(rule, options)
    seed = int(rng.integers(2**31))

    def bars_of(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        with torch.autocast("cpu", enabled=False):  # the loss is not ours
            own = np.random.default_rng(seed)
            gradient = (
                sample.loss[1] if sample.loss else lambda *ys: tuple(tensor(own.standard_normal(y.shape)) for y in ys)
            )
            return as_tuple(gradient(*(y.to(torch.float32) for y in outputs)))

    def plain(*arrays: Any) -> tuple[Any, ...]:
        outputs, saved = plain_forward(rule)(*arrays, **forward)
        needed = (arrays[i] for i in rule.needs)
        return *outputs, *plain_vjp(rule)(*bars_of(outputs), *outputs, *saved, *needed, **vjp)

    def through_the_bridge(*arrays: Any) -> tuple[Any, ...]:
        # The bridges are a layer beside this one, so this one is loaded by name.
        differentiable: Any = importlib.import_module("ddnref.interop.torch").differentiable
        leaves = [a.clone().requires_grad_() for a in arrays]
        result = differentiable(rule.function, **options)(*leaves)
        outputs = as_tuple(result[0] if rule.info is not None else result)
        gradients = torch.autograd.grad(outputs, leaves, bars_of(tuple(y.detach() for y in outputs)), allow_unused=True)
        return *(y.detach() for y in outputs), *(g for g in gradients if g is not None)

    def call(*arrays: Any) -> tuple[Array, ...]:
        tensors = [torch.asarray(a).to(torch.float32, copy=True) for a in arrays]
        outside = plain(*tensors) + through_the_bridge(*tensors)
        with torch.autocast("cpu", torch.bfloat16):
            inside = plain(*tensors) + through_the_bridge(*tensors)
        # NumPy has no bfloat16, in which a result is wrong by what was rounded off.
        return tuple(y.to(torch.float32) for y in (*outside, *inside))

    def judge(results: tuple[Numbers, ...]) -> tuple[float, float]:
        half = len(results) // 2
        return max(_off(b, _double(a)) for a, b in zip(results[:half], results[half:], strict=True)), 1e-6

    return Hard("plain and through the bridge", tuple(a.numpy() for a in sample.inputs), call, judge)


# --- all kinds ----------------------------------------------------------------------------------------------------

HARD: dict[str, tuple[Make, tuple[str, ...]]] = {
    "clusters at every gap": (clusters, ("eigh", "eigh_topk", "eigsh", "gram_eigh", "svd", "svd_topk")),
    "clusters of pencils": (pencils, ("eigh_generalized",)),
    "functions that cancel": (cancelling, ("spectral_function",)),
    "units of unknowns": (scaled_solve, ("solve",)),
    "units of columns": (scaled_qr, ("qr",)),
    "units of features": (scaled_features, ("weighted_least_squares",)),
    "close singular values": (close_singular, ("polar",)),
    "dropped singular values": (dropped_singular, ("pinv",)),
    "non-normal": (non_normal, ("power_iteration", "simultaneous_iteration")),
    "near-singular": (
        near_singular,
        ("invsqrtm", "logm", "sqrtm", "cholesky", "logdet", "slogdet", "solve", "qr", "weighted_least_squares"),
    ),
    "tiny operators": (tiny, ("linear_solve",)),
    "splitting plans": (splitting, ("sinkhorn",)),
    "low-precision regions": (low_precision, tuple(name for name in RULES if name != "linear_solve")),
}
"""The generator of each kind, and the rules that it draws for."""
OF_TORCH = ("low-precision regions",)
"""Kinds that exist for PyTorch alone."""
