"""Figures that no clock enters: gradient errors, host reads, extra memory. Deterministic on one machine."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ddnref import eigh, eigh_vjp, spectral_function_fwd, spectral_function_vjp, testing
from ddnref._rules import binding as _rule
from ddnref._rules import samples as _samples
from ddnref._rules import table as _rules
from ddnref.linalg._eigh import has_repeated

from ._common import Call, lean_problem, load, load_jax, problem

WRONG = 1e-6  # relative error above which a float64 gradient counts as wrong
SCALES = (1.0, 1e-12, 1e-10, 1e10)


def relative(value: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Frobenius norm of the difference over that of the expected, per item."""
    size = np.linalg.norm(expected, axis=(-2, -1))
    return np.linalg.norm(value - expected, axis=(-2, -1)) / np.where(size > 0, size, 1.0)


# --- repeated eigenvalues ---------------------------------------------------------------------------------------


class Repeated(NamedTuple):
    """Random 6×6 matrices ``Q Λ Qᵀ`` with a triple eigenvalue, and a random symmetric C for the loss."""

    x: np.ndarray
    w: np.ndarray
    q: np.ndarray
    c: np.ndarray
    inside: np.ndarray
    """Mask of the ascending eigenvalues that belong to the triple one."""


def repeated(scale: float = 1.0, count: int = 200, seed: int = 0) -> Repeated:
    rng = np.random.default_rng(seed)
    distinct = np.cumsum(rng.uniform(0.5, 1.5, (count, 4)), axis=-1) - 2
    place = rng.integers(0, 4, count)
    column = np.asarray([np.repeat(np.arange(4), np.where(np.arange(4) == p, 3, 1)) for p in place])
    w = scale * np.take_along_axis(distinct, column, axis=-1)
    q, _ = np.linalg.qr(rng.standard_normal((count, 6, 6)))
    c = rng.standard_normal((count, 6, 6))
    x = (q * w[..., None, :]) @ q.mT
    return Repeated((x + x.mT) / 2, w, q, c + c.mT, column == place[:, None])


def projector_gradient(p: Repeated) -> np.ndarray:
    """Closed form of the gradient of ``tr(C P)``, P the projector on the triple eigenvalue's eigenspace.

    ``Σ C̃_ij / (λ_i − λ_j) (q_i q_jᵀ + q_j q_iᵀ)`` over i inside and j outside, ``C̃ = Qᵀ C Q``.
    """
    across = p.inside[:, :, None] & ~p.inside[:, None, :]
    gap = np.where(across, p.w[:, :, None] - p.w[:, None, :], 1.0)
    g = p.q @ np.where(across, (p.q.mT @ p.c @ p.q) / gap, 0.0) @ p.q.mT
    return g + g.mT


def projector_errors(implementation: str, scale: float = 1.0) -> np.ndarray:
    """Relative error of the gradient of ``tr(C P)`` in each of 200 matrices; NaN where the gradient is NaN."""
    p = repeated(scale)

    def cotangent(v: np.ndarray) -> np.ndarray:
        return np.where(p.inside[:, None, :], 2 * p.c @ v, 0.0)

    with np.errstate(all="ignore"):  # peers return NaN and infinity
        return relative(_GRADIENTS[implementation](p.x, cotangent), projector_gradient(p))


def wrong_share(implementation: str) -> float:
    """The share of the 200 gradients that are NaN or off by more than 1e-6."""
    return float(np.mean(~(projector_errors(implementation) <= WRONG)))


def _ours(x: np.ndarray, cotangent: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    w, v = eigh(x)
    return eigh_vjp(None, cotangent(v), w, v)


def _torch(x: np.ndarray, cotangent: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    torch = load("torch")
    leaf = torch.from_numpy(x.copy()).requires_grad_()
    _, v = torch.linalg.eigh(leaf)
    (g,) = torch.autograd.grad(v, leaf, torch.from_numpy(cotangent(v.detach().numpy())))
    return (g.numpy() + g.numpy().mT) / 2


def _jax(x: np.ndarray, cotangent: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    jax = load_jax()
    v, vjp = jax.vjp(lambda a: jax.numpy.linalg.eigh(a)[1], jax.numpy.asarray(x))
    g = np.asarray(vjp(jax.numpy.asarray(cotangent(np.asarray(v))))[0])
    return (g + g.mT) / 2


_GRADIENTS = {"ddnref": _ours, "torch": _torch, "jax": _jax}


def trace_of_square_error() -> float:
    """Worst relative error of the gradient ``C X + X C`` of ``tr(C X²)`` on the same matrices and on X = I."""
    p = repeated()
    worst = 0.0
    for x in (p.x, np.broadcast_to(np.eye(6), p.x.shape).copy()):
        y, saved = spectral_function_fwd(x, f=np.square)
        x_bar = spectral_function_vjp(p.c, y, *saved, f=np.square, df=lambda w: 2 * w)
        worst = max(worst, float(np.max(relative(x_bar, p.c @ x + x @ p.c))))
    return worst


# --- simple eigenvalues -----------------------------------------------------------------------------------------


def masked_neighbours(m: int) -> int:
    """Count the matrices, out of five generic float32 ones, in which `eigh_vjp` takes two eigenvalues for equal."""
    return sum(int(np.sum(has_repeated(problem(1, m, "float32", seed).w))) for seed in range(5))


def finite_difference_error(gap: float, seed: int = 0) -> float:
    """Worst error of `check_vjp`, float64, on an 8×8 matrix whose closest eigenvalues are that far apart."""
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(0.5, 1.5, 8)
    spacing[4] = gap
    x = _samples.random_spectrum(rng, (), np.cumsum(spacing) - 4)
    loss = _samples.eigen_loss(np.asarray, rng, (8,), 8, False)
    return testing.check_vjp(
        eigh, eigh_vjp, x, loss=loss, gap=gap, tangent="symmetric", symmetrises=True, seed=seed
    ).error


def single_precision_error(name: str, m: int = 32) -> float:
    """Worst error of float32 gradients against float64 ones, in units of ``eps · ‖A‖ / gap``."""
    rule = _rules.RULES[name]
    gradients = []
    for dtype in ("float32", "float64"):
        drawn = name == "sinkhorn" and dtype == "float64"  # rounded to float32 its marginals do not sum to one
        convert = np.asarray if drawn else partial(_rounded, dtype=dtype)
        sample = _rules.TRIALS[rule.name].sample(convert, np.random.default_rng(0), (20,), m, False)
        forward_options, vjp_options = _rule.options_of(rule, sample.options)
        outputs, saved = _rule.plain_forward(rule)(*sample.inputs, **forward_options)
        bars = sample.loss[1](*outputs) if sample.loss else _fixed_cotangents(outputs)
        needed = (sample.inputs[i] for i in rule.needs)
        gradients.append(_rule.plain_vjp(rule)(*bars, *outputs, *saved, *needed, **vjp_options)[0])
    errors = relative(gradients[0].astype(np.float64), gradients[1])
    return float(np.max(errors) / (np.finfo(np.float32).eps * sample.condition))


def _fixed_cotangents(outputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)
    return tuple(_rounded(rng.standard_normal(y.shape), y.dtype) for y in outputs)


def _rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The same numbers in either precision."""
    return np.asarray(values, dtype=np.float32).astype(dtype)


# --- host reads and memory --------------------------------------------------------------------------------------


@contextmanager
def counted_reads(array_type: type) -> Iterator[list[str]]:
    """Collect the name of every conversion of an array of that type to a Python number."""
    reads: list[str] = []
    names = ("__bool__", "__float__", "__int__", "__index__", "__complex__")
    originals = {name: getattr(array_type, name) for name in names}

    def counting(name: str) -> Callable[[Any], Any]:
        def read(array: Any) -> Any:
            reads.append(name)
            return originals[name](array)

        return read

    try:
        for name in names:
            setattr(array_type, name, counting(name))
        yield reads
    finally:
        for name, original in originals.items():
            setattr(array_type, name, original)


def host_reads(throw: bool, batch: int = 3, m: int = 6) -> int:
    """Values that `eigh_vjp` reads on the host, counted on array-api-strict arrays."""
    strict = load("array_api_strict")
    p = problem(batch, m, "float64")
    arrays = [strict.asarray(a) for a in (p.w_bar, p.v_bar, p.w, p.v)]
    with counted_reads(type(arrays[0])) as reads:
        eigh_vjp(*arrays, throw=throw)
    return len(reads)


def extra_arrays(call: Call, like: np.ndarray) -> float:
    """Peak memory of a second call above what exists before it, its result included, in arrays of that size."""
    call()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return (peak - before) / like.nbytes


def extra_arrays_of_vjp(m: int, dtype: str) -> float:
    """Extra memory of `eigh_vjp`, in m×m arrays."""
    p = lean_problem(m, dtype)
    return extra_arrays(lambda: eigh_vjp(p.w_bar, p.v_bar, p.w, p.v), p.v)
