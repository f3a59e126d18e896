"""Fuzzed functions: the targets of each rule, its forward and all its derivatives, and how others become one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from ddnref._rules.binding import as_tuple, options_of, plain_forward, required_of
from ddnref._rules.contract import Rule
from ddnref._rules.table import RULES, TRIALS
from ddnref.testing import numerical_jvp


class Problem(NamedTuple):
    """An input that a function takes: NumPy arrays in order, and options."""

    arrays: tuple[Any, ...]
    options: dict[str, Any] = {}
    condition: float = 100.0
    """Factor by which rounding is amplified."""


Make = Callable[[np.random.Generator, tuple[int, ...], int, bool], Problem]


class Target(NamedTuple):
    """One public function and how to call it."""

    name: str
    call: Callable[..., Any]
    """``call(*arrays, **options)``; what is not an array is bound."""
    make: Make
    names: tuple[str, ...]
    """Names of the arrays, as a message must spell them."""
    items: bool = True
    """Whether leading axes are those of a batch of independent problems."""
    bars: int = 0
    """How many of the first arrays the result is linear in."""
    powers: dict[str, tuple[float, ...]] = {}
    """For each argument, the power of its scale by which each output scales, if the scale is a power of two."""
    phases: tuple[int, ...] = ()
    """Outputs that hold unit vectors up to a sign or phase, in columns."""
    phases_of_rows: tuple[int, ...] = ()
    """Outputs that hold them in rows."""
    check: Callable[..., float] | None = None
    """``check(arrays, outputs, **options)``: error of one accepted item, independent of the library."""
    options: dict[str, str] = {}
    """Options that the call takes beyond those of its signature, and what is wrong for them (a key of `INVALID`)."""
    rule: Rule | None = None
    pushes: bool = False
    """Whether it is the JVP of its rule: the result is linear in tangents instead of cotangents."""
    functions: tuple[str, ...] = ()
    """The public names that this target exercises; its own name by default."""
    loose: float = 1.0
    """Factor of the tolerance, for iterations that stop early."""
    integers: tuple[str, ...] = ()
    """Arrays that are integers."""
    is_complex: bool = False
    theirs: tuple[str, ...] = ()
    """Arrays that only functions of the user see: what is wrong with them is for these to say."""
    aliases: dict[str, tuple[str, ...]] = {}
    """How a message may call an array besides."""
    numpy_only: bool = False
    double: bool = False
    """Whether float32 is refused."""
    doubles: bool = False
    """Whether it computes and returns float64 whatever comes in, as its documentation says."""
    compared: int | None = None
    """How many of the results are compared: what is saved may be any basis of an eigenspace."""
    sums: bool = False
    """Whether results may be summed over axes that broadcast."""
    optional: tuple[str, ...] = ()
    """Arrays that may be None."""
    kinds: tuple[str, ...] = ()
    """The only mutations that are tried; all where there are none."""
    unused: tuple[str, ...] = ()
    """Arrays that the result need not depend on."""


def positional(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY)


def random_like(rng: np.random.Generator, y: Any) -> Any:
    z = rng.standard_normal(y.shape)
    return np.asarray(z + 1j * rng.standard_normal(y.shape) if np.iscomplexobj(y) else z)


def accepted(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the function has."""
    known = inspect.signature(function).parameters
    return {key: value for key, value in options.items() if key in known}


# --- the rule table ---------------------------------------------------------------------------------------------

POWERS: dict[str, dict[str, tuple[float, ...]]] = {
    "eigh": {"x": (1, 0)},
    "eigh_topk": {"x": (1, 0)},
    "eigh_generalized": {"a": (1, 0), "b": (-1, -0.5)},
    "eigsh_generalized": {"a": (1, 0), "b": (-1, -0.5)},
    "eigsh": {"x": (1, 0)},
    "gram_eigvalsh": {"factor": (2,)},
    "gram_eigh": {"factor": (2, 0)},
    "svd": {"x": (0, 1, 0)},
    "svd_topk": {"x": (0, 1, 0)},
    "svdvals": {"a": (1,)},
    "polar": {"x": (0, 1)},
    "pinv": {"x": (-1,)},
    "lstsq": {"a": (-1,), "b": (1,)},
    "svds": {"a": (0, 1, 0)},
    "spectral_function": {"x": (2,)},
    "sqrtm": {"x": (0.5,)},
    "invsqrtm": {"x": (-0.5,)},
    "power_iteration": {"x": (1, 0)},
    "simultaneous_iteration": {"x": (1, 0)},
    "qr": {"a": (0, 1)},
    "weighted_least_squares": {"b": (1,)},
    "solve": {"a": (-1,), "b": (1,)},
    "cholesky": {"a": (0.5,)},
    "solve_triangular": {"a": (-1,), "b": (1,)},
    "solve_tridiagonal": {"b": (1,)},
    "solve_block_tridiagonal": {"b": (1,)},
    "linear_solve": {"operator": (-1,), "b": (1,)},
}
"""For each rule and input, the powers by which the outputs scale with it. Other rules are checked without them."""
PHASES = {
    **dict.fromkeys(("eigh", "eigh_topk", "eigh_generalized", "eigsh", "eigsh_generalized", "gram_eigh"), (1,)),
    **dict.fromkeys(("svd", "svd_topk", "svds"), (0,)),
}
PHASES_OF_ROWS = dict.fromkeys(("svd", "svd_topk", "svds"), (2,))
UNUSED = {"solve_triangular": ("a", "a_dot")}
"""Names of arrays, for each rule, that have a part which is not read."""


def off(error: Any, scale: Any) -> float:
    """Largest error, relative to a size."""
    return float(np.max(np.abs(error), initial=0.0)) / (float(np.max(np.abs(scale), initial=0.0)) or 1.0)


def sym(x: Any) -> Any:
    x = x / 2
    return x + np.conj(np.swapaxes(x, -1, -2))


def _t(x: Any) -> Any:
    return np.conj(np.swapaxes(x, -1, -2))


def _pairs_error(x: Any, w: Any, v: Any) -> float:
    return max(off(x @ v - v * w[..., None, :], x), off(_t(v) @ v - np.eye(v.shape[-1]), 1.0))


def _eigh(arrays: Any, outputs: Any, **options: Any) -> float:
    x, (w, v) = sym(arrays[0]), outputs
    k = w.shape[-1]
    every = np.linalg.eigvalsh(x)
    order = {"LA": every[..., ::-1], "SA": every, "LM": every[..., np.argsort(-np.abs(every), -1)]}
    wanted = every if "k" not in options else order[options.get("which", "LA")][..., :k]
    return max(_pairs_error(x, w, v), off(w - wanted, x))


def _svd(arrays: Any, outputs: Any, **options: Any) -> float:
    (x,), (u, s, vh) = arrays, outputs
    wanted, eye = np.linalg.svd(x, compute_uv=False), np.eye(s.shape[-1])
    spaces = max(off(_t(u) @ u - eye, 1.0), off(vh @ _t(vh) - eye, 1.0))
    return max(spaces, off(x @ _t(vh) - u * s[..., None, :], x), off(s - wanted[..., : s.shape[-1]], x))


def _pencil(arrays: Any, outputs: Any, **options: Any) -> float:
    (a, b), (w, v) = map(sym, arrays), outputs
    b_v = b @ v
    size = off(a, 0.0) * off(v, 0.0) + off(b_v * w[..., None, :], 0.0)
    return max(off(a @ v - b_v * w[..., None, :], size), off(_t(v) @ b_v - np.eye(v.shape[-1]), 1.0))


def _gram(arrays: Any, outputs: Any, **options: Any) -> float:
    f, w = arrays[0], outputs[0]
    wanted = np.linalg.svd(f, compute_uv=False)[: w.shape[-1]] ** 2
    errors = [off(w[: len(wanted)] - wanted, wanted[:1]), off(w[len(wanted) :], wanted[:1])]
    if len(outputs) > 1:
        errors.append(_pairs_error(f @ _t(f), *outputs))
    return max(errors)


def _function_of_matrix(f: Callable[[Any], Any]) -> Callable[..., float]:
    def check(arrays: Any, outputs: Any, **options: Any) -> float:
        w, v = np.linalg.eigh(sym(arrays[0]))
        wanted = (v * f(w)[..., None, :]) @ _t(v)
        return off(outputs[0] - wanted, wanted)

    return check


def _power(arrays: Any, outputs: Any, **options: Any) -> float:
    (x,), (w, v) = arrays, outputs
    w, v = (w[..., None], v[..., None]) if v.ndim == x.ndim - 1 else (w, v)
    return max(off(x @ v - v * w[..., None, :], x), off(np.sum(v * v, axis=-2) - 1, 1.0))


def _qr(arrays: Any, outputs: Any, **options: Any) -> float:
    (a,), (q, r) = arrays, outputs
    return max(off(q @ r - a, a), off(_t(q) @ q - np.eye(q.shape[-1]), 1.0), off(np.tril(r, -1), a))


def _sphere(arrays: Any, outputs: Any, **options: Any) -> float:
    y, radius = outputs[0], options.get("radius", 1.0)
    return off(np.linalg.norm(y, options.get("norm", 2)) - radius, radius)


def _ball(arrays: Any, outputs: Any, **options: Any) -> float:
    (x,), (y,), radius, norm = arrays, outputs, options.get("radius", 1.0), options.get("norm", 2)
    inside = np.linalg.norm(x, norm) <= radius
    return off(y - x, x) if inside else off(np.linalg.norm(y, norm) - radius, radius)


def _simplex(arrays: Any, outputs: Any, **options: Any) -> float:
    (x,), (y,), total = arrays, outputs, options.get("total", 1.0)
    theta = np.max((x - y)[y > 0], initial=-np.inf)
    stationary = max(off((x - y)[y > 0] - theta, 1.0 + np.abs(x)), float(np.max(x[y == 0] - theta, initial=0.0)))
    return max(off(np.sum(y) - total, total), off(np.minimum(y, 0), total), stationary)


def _least_squares_on_sphere(arrays: Any, outputs: Any, **options: Any) -> float:
    (a, b), (y,), radius = arrays, outputs, options.get("radius", 1.0)
    gradient = a.T @ (a @ y - b)
    tangent = gradient - y * (y @ gradient) / radius**2
    return max(off(np.linalg.norm(y) - radius, radius), off(tangent, a.T @ b))


def _weighted_least_squares(arrays: Any, outputs: Any, *, bias: bool = True, **options: Any) -> float:
    a, b, weights, *ridge = arrays
    a = np.concatenate([a, np.ones((len(a), 1))], axis=-1) if bias else a
    damping = (ridge[0] if ridge else 0) * np.eye(a.shape[-1])
    if bias:
        damping = damping * np.diag([1.0] * (a.shape[-1] - 1) + [0.0])
    y = outputs[0]
    return off(a.T @ (weights * (a @ y - b)) + damping @ y, a.T @ (weights * b))


def _sinkhorn(arrays: Any, outputs: Any, **_: Any) -> float:
    (cost, p, q, eps), (plan,) = arrays, outputs
    scaling = np.log(plan) + cost / eps  # log u_i + log v_j
    rank_one = scaling - scaling[:, :1] - scaling[:1] + scaling[0, 0]
    return max(off(plan.sum(1) - p, p), off(plan.sum(0) - q, q), off(rank_one, np.abs(scaling) + 1))


def _robust(arrays: Any, outputs: Any, **options: Any) -> float:
    if options.get("kind", "pseudo-huber") != "pseudo-huber":
        return 0.0
    (x,), (y,), alpha = arrays, outputs, options.get("alpha", 1.0)
    u = (y - x) / alpha
    return abs(float(np.sum(u / np.sqrt(1 + u * u)))) / x.size


def _solve(arrays: Any, outputs: Any, **options: Any) -> float:
    (a, b), (x,) = arrays, outputs
    return off(a @ x - b, np.max(np.abs(a)) * np.max(np.abs(x), initial=0) + np.max(np.abs(b), initial=0))


def _polar(arrays: Any, outputs: Any, **options: Any) -> float:
    (x,), (w, h) = arrays, outputs
    small = _t(w) @ w if w.shape[-2] >= w.shape[-1] else w @ _t(w)
    least = np.minimum(np.linalg.eigvalsh(h), 0)
    return max(off(w @ h - x, x), off(small - np.eye(small.shape[-1]), 1.0), off(h - _t(h), x), off(least, x))


def _lstsq(arrays: Any, outputs: Any, **options: Any) -> float:
    (a, b), (x,) = arrays, outputs
    wanted = np.linalg.pinv(a) @ b
    return off(x - wanted, wanted)


def _cholesky(arrays: Any, outputs: Any, **options: Any) -> float:
    (a,), (factor,) = arrays, outputs
    return max(off(factor @ _t(factor) - sym(a), a), off(np.triu(factor, 1), factor))


def _logdet(arrays: Any, outputs: Any, **options: Any) -> float:
    return off(outputs[0] - np.linalg.slogdet(sym(arrays[0]))[1], 1.0 + np.abs(outputs[0]))


def _slogdet(arrays: Any, outputs: Any, **options: Any) -> float:
    sign, logabsdet = np.linalg.slogdet(arrays[0])
    if outputs[0] == 0:  # singular to working precision, which NumPy does not judge
        return 0.0 if outputs[1] == -np.inf and np.linalg.cond(arrays[0]) > 1e12 else np.inf
    return max(off(outputs[0] - sign, 1.0), off(outputs[1] - logabsdet, 1.0 + np.abs(logabsdet)))


def _solve_triangular(arrays: Any, outputs: Any, *, lower: bool = False, **options: Any) -> float:
    return _solve((np.tril(arrays[0]) if lower else np.triu(arrays[0]), arrays[1]), outputs)


def _solve_tridiagonal(arrays: Any, outputs: Any, **options: Any) -> float:
    lower, diagonal, upper, b = arrays
    return _solve((np.diag(lower, -1) + np.diag(diagonal) + np.diag(upper, 1), b), outputs)


def _solve_block_tridiagonal(arrays: Any, outputs: Any, **options: Any) -> float:
    lower, diagonal, upper, b = arrays
    n, k = b.shape
    a = np.zeros((n, k, n, k), diagonal.dtype)
    for i in range(n):
        a[i, :, i] = diagonal[i]
    for i in range(n - 1):
        a[i + 1, :, i], a[i, :, i + 1] = lower[i], upper[i]
    return _solve((a.reshape(n * k, n * k), b.ravel()), (outputs[0].ravel(),))


def _svds(arrays: Any, outputs: Any, **options: Any) -> float:
    a, (u, s, vh) = arrays[0], outputs
    known = np.linalg.svd(a, compute_uv=False)[..., : s.shape[-1]]
    return max(off(s - known, known), off(a @ _t(vh) - u * s[..., None, :], known))


CHECKS: dict[str, Callable[..., float]] = {
    "eigh": _eigh, "eigh_topk": _eigh, "eigsh": _eigh, "gram_eigvalsh": _gram, "gram_eigh": _gram,
    "svd": _svd, "svd_topk": _svd,
    "eigh_generalized": _pencil, "eigsh_generalized": _pencil,
    "svdvals": lambda arrays, outputs, **_: off(outputs[0] - np.linalg.svd(arrays[0], compute_uv=False), outputs[0]),
    "polar": _polar, "lstsq": _lstsq,
    "pinv": lambda arrays, outputs, **_: off(outputs[0] - np.linalg.pinv(arrays[0]), outputs[0]),
    "svds": _svds,
    "spectral_function": _function_of_matrix(lambda w: w * w), "sqrtm": _function_of_matrix(np.sqrt),
    "invsqrtm": _function_of_matrix(lambda w: w**-0.5), "logm": _function_of_matrix(np.log),
    "expm": _function_of_matrix(np.exp), "power_iteration": _power, "simultaneous_iteration": _power, "qr": _qr,
    "project_sphere": _sphere, "project_ball": _ball, "project_simplex": _simplex,
    "least_squares_on_sphere": _least_squares_on_sphere, "weighted_least_squares": _weighted_least_squares,
    "sinkhorn": _sinkhorn, "robust_pool": _robust, "solve": _solve, "linear_solve": _solve,
    "cholesky": _cholesky, "logdet": _logdet, "slogdet": _slogdet, "solve_triangular": _solve_triangular,
    "solve_tridiagonal": _solve_tridiagonal, "solve_block_tridiagonal": _solve_block_tridiagonal,
}  # fmt: skip
"""Errors of accepted forwards, in plain NumPy."""
PARAMS = {"operator": ("params",), "w": ("k",)}
SAVED = {
    **dict.fromkeys(("eigsh_vjp", "eigsh_jvp"), ("w_rest", "v_rest", "x")),
    **dict.fromkeys(("eigsh_generalized_vjp", "eigsh_generalized_jvp"), ("w_rest", "v_rest", "a", "b")),
    **dict.fromkeys(("svds_vjp", "svds_jvp"), ("s_rest", "uv_rest", "a")),
}
"""Names of arrays that a signature collects in one."""


def _looseness(rule: Rule) -> float:
    return 1.0 if rule.info is None and not rule.vjp_info else 100.0


def _public(rule: Rule, suffix: str) -> Any:
    """The public function of that suffix, or ``None``, from the subject module that has the operation."""
    return getattr(import_module(rule.function.__module__.rpartition(".")[0]), rule.name + suffix, None)


def forward_target(rule: Rule, suffix: str = "") -> Target:
    """The operation itself, or its `_fwd`."""
    function = _public(rule, suffix)

    def make(rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool) -> Problem:
        sample = TRIALS[rule.name].sample(np.asarray, rng, batch, m, is_complex)
        return Problem(sample.inputs, accepted(function, sample.options), sample.condition)

    return Target(
        rule.name + suffix, function, make, positional(function), powers={} if suffix else POWERS.get(rule.name, {}),
        phases=PHASES.get(rule.name, ()), phases_of_rows=PHASES_OF_ROWS.get(rule.name, ()),
        check=None if suffix else CHECKS.get(rule.name), rule=rule,
        loose=_looseness(rule), aliases=PARAMS, compared=rule.outputs if suffix else None,
        is_complex=TRIALS[rule.name].is_complex, unused=UNUSED.get(rule.name, ()),
    )  # fmt: skip


class Solved(NamedTuple):
    """A sample of a rule and what its forward returns."""

    sample: Any
    outputs: tuple[Any, ...]
    kept: tuple[Any, ...]
    """The last arrays that derivatives take: outputs, saved arrays and the needed inputs."""
    options: dict[str, Any]
    """The options of the VJP."""


def _solved(rule: Rule, where: tuple[Any, ...]) -> Solved:
    rng, batch, m, is_complex = where
    sample = TRIALS[rule.name].sample(np.asarray, rng, batch, m, is_complex)
    forward, vjp = options_of(rule, sample.options)
    outputs, saved = plain_forward(rule)(*sample.inputs, **forward)
    given = {k: v for k, v in vjp.items() if v is not None and k != "throw"}
    return Solved(sample, outputs, (*outputs, *saved, *(sample.inputs[i] for i in rule.needs)), given)


def _derivative(rule: Rule, function: Callable[..., Any], make: Make, **fields: Any) -> Target:
    """The target of a function of ``(*directions, *outputs, *saved, *needed)``."""
    name = function.__name__
    names = (*positional(function), *SAVED.get(name, ()))
    pivots = tuple(n for n in names if n == "pivots")
    return Target(
        name, function, make, names, rule=rule, loose=_looseness(rule), integers=pivots, aliases=PARAMS,
        is_complex=TRIALS[rule.name].is_complex, unused=UNUSED.get(rule.name, ()), **fields,
    )  # fmt: skip


def vjp_target(rule: Rule) -> Target:
    """Its VJP at what its forward returns, for the loss of the sample: free of gauge."""

    def make(rng: np.random.Generator, *where: Any) -> Problem:
        sample, outputs, kept, options = _solved(rule, (rng, *where))
        bars = as_tuple(sample.loss[1](*outputs)) if sample.loss else tuple(random_like(rng, y) for y in outputs)
        return Problem((*bars, *kept), options, sample.condition)

    return _derivative(rule, rule.vjp, make, bars=rule.outputs)


def jvp_target(rule: Rule) -> Target:
    """Its JVP at what its forward returns, along a random direction of all inputs."""

    def make(rng: np.random.Generator, *where: Any) -> Problem:
        sample, _, kept, options = _solved(rule, (rng, *where))
        dots = (random_like(rng, np.asarray(x)) for x in sample.inputs)
        return Problem((*dots, *kept), accepted(rule.jvp, options), sample.condition)

    return _derivative(rule, rule.jvp, make, bars=len(positional(rule.forward)), pushes=True)


def second_target(rule: Rule) -> Target:
    """Its second derivative along two directions, which is linear in each, against differences of its VJP."""
    needed = required_of(rule.second)

    def make(rng: np.random.Generator, *where: Any) -> Problem:
        sample, _, kept, options = _solved(rule, (rng, *where))
        (x,) = sample.inputs
        given = {"d2f": lambda w: 2.0 + 0.0 * w, **options}
        chosen = {name: value for name, value in given.items() if name in needed}
        return Problem((random_like(rng, x), random_like(rng, x), *kept), chosen, sample.condition)

    def check(arrays: Any, outputs: Any, **options: Any) -> float:
        x_dot, y_bar, y, w, v = arrays
        x = (v * w[..., None, :]) @ _t(v)

        def forward(x: Any) -> Any:
            return plain_forward(rule)(x, **accepted(rule.forward, options))

        # The definition holds at what the forward returns, not at what a mutation makes of it.
        if off(_t(v) @ v - np.eye(len(w)), 1.0) > 1e-6 or off(y - forward(x)[0][0], y) > 1e-6:
            return 0.0

        def pulled(x: Any) -> Any:
            outputs, saved = forward(x)
            return rule.vjp(y_bar, *outputs, *saved, **accepted(rule.vjp, options))

        # All functions of the table but two have a singularity at zero.
        return off(outputs[0] - numerical_jvp(pulled, x, sym(x_dot), gap=float(np.min(np.abs(w)))), outputs[0])

    found = _derivative(rule, rule.second, make, bars=1, powers={"x_dot": (1,), "y_bar": (1,)}, check=check)
    return found._replace(rule=None, loose=1e4)  # the differences are good to nine digits


def rule_targets() -> list[Target]:
    """Make the targets of all rules, so that a new rule is included automatically."""
    found = []
    for rule in RULES.values():
        found += [forward_target(rule), vjp_target(rule), jvp_target(rule)]
        if rule.second is not None:
            found.append(second_target(rule))
        if _public(rule, "_fwd") is not None:
            found.append(forward_target(rule, "_fwd"))
    return found
