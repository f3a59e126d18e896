"""The required outcome of a hostile call: an equal number or a helpful refusal; all else is a finding."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ddnref import DdnrefError, SingularError
from ddnref._rules.binding import options_of, plain_forward
from ddnref._rules.table import TRIALS
from ddnref.testing import check_jvp, check_vjp

from ._judge import (
    TINY,
    Finding,
    Outcome,
    call,
    difference,
    expect_equal,
    expect_helpful,
    kept_quiet,
    leaves,
    plain,
    size_of,
    tolerance,
    valid,
)
from ._site import Hostile, Site
from ._targets import Target, accepted

# --- expectations -----------------------------------------------------------------------------------------------


def same(site: Site, hostile: Hostile) -> Outcome:
    """Accepted, with the numbers of plain copies."""
    got = valid(site, hostile.arrays, hostile.options)
    expect_equal(site, got, valid(site, tuple(map(plain, hostile.arrays))))
    return Outcome(got)


def same_thrown(site: Site, hostile: Hostile) -> Outcome:
    got = valid(site, hostile.arrays, hostile.options)
    expect_equal(site, got, valid(site))
    return Outcome(got)


def refused(site: Site, hostile: Hostile) -> Outcome:
    """A TypeError or ValueError that names the argument."""
    outcome = call(site.target, hostile.arrays, hostile.options)
    if outcome.error is None:
        raise Finding("accepted what must be refused")
    expect_helpful(site, hostile, outcome.error)
    if isinstance(outcome.error, DdnrefError):
        raise Finding(f"a static fact raised as {outcome.name}: {str(outcome.error)[:200]}")
    return outcome


def same_or_refused(site: Site, hostile: Hostile) -> Outcome:
    outcome = call(site.target, hostile.arrays, hostile.options)
    if outcome.error is not None:
        expect_helpful(site, hostile, outcome.error)
        return outcome
    arrays = tuple(plain(np.asarray(a) if isinstance(a, tuple) else a) for a in hostile.arrays)
    expect_equal(site, outcome.result, valid(site, arrays))
    for leaf in flat(outcome.result):
        if isinstance(leaf, np.ndarray) and not leaf.dtype.isnative:
            raise Finding("a result has foreign byte order")
    return outcome


def flat(result: Any) -> list[Any]:
    """The leaves as they came."""
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in flat(part)]
    return [result]


def single(site: Site, hostile: Hostile) -> Outcome:
    """In float32: float32 comes out, near what double precision makes of the same numbers."""
    if "rtol" in hostile.options:
        hostile = hostile._replace(options={**hostile.options, "rtol": 1e-5})
    outcome = call(site.target, hostile.arrays, kept_quiet(site, hostile))
    if outcome.error is not None:
        if "check_rtol" in inspect.signature(site.target.call).parameters:
            return outcome
        raise Finding(f"float32 was refused: {str(outcome.error)[:200]}")
    for leaf in leaves(outcome.result):
        doubled = leaf.dtype.kind in "fc" and leaf.dtype.name not in ("float32", "complex64")
        if doubled and leaf.ndim and not site.target.doubles:
            raise Finding(f"float32 in, {leaf.dtype} out")
    wanted = call(site.target, tuple(map(plain, hostile.arrays)), kept_quiet(site, hostile))
    if wanted.error is None and all(np.all(np.isfinite(y)) for y in (*leaves(wanted.result), *leaves(outcome.result))):
        # eigenvectors of float32 are those of float64 only up to the gap: VJPs say so by NaN
        expect_equal(site, outcome.result, wanted.result, 1e-4 / 2e-13 / max(site.target.loose, 1), " in float32")
    return outcome


def none(site: Site, hostile: Hostile) -> Outcome:
    """Refused by name, or a cotangent of zeros, or what the function makes of leaving it out."""
    i = hostile.more
    outcome = call(site.target, hostile.arrays, hostile.options)
    if outcome.error is not None:
        expect_helpful(site, hostile._replace(names=()), outcome.error)
        return outcome
    if i < site.target.bars:
        arrays = tuple(0 * a if j == i else a for j, a in enumerate(site.problem.arrays))
        expect_equal(site, outcome.result, valid(site, arrays), saying=" with None for zeros")
    elif site.target.names[i] not in optional(site.target):
        raise Finding("accepted None for an argument that is not optional")
    return outcome


def optional(target: Target) -> set[str]:
    parameters = inspect.signature(target.call).parameters.values()
    bars = set(target.names[: target.bars])
    return {p.name for p in parameters if p.default is None} | set(target.optional) | bars


def item(arrays: Any, cores: Any, place: tuple[int, ...]) -> Any:
    """One item of each array, whose batch axes broadcast."""
    found = []
    for a, core in zip(arrays, cores, strict=True):
        if not isinstance(a, np.ndarray):
            found.append(a)
            continue
        lead = a.ndim - core
        index = [0 if n == 1 else k for n, k in zip(a.shape[:lead], place[len(place) - lead :], strict=True)]
        found.append(a[tuple(index)])
    return tuple(found)


def items(site: Site, hostile: Hostile) -> Outcome:
    """Refused, or what each item is alone, and for a forward what the definition says."""
    outcome = call(site.target, hostile.arrays, hostile.options)
    arrays = hostile.arrays
    leads = [a.shape[: max(0, a.ndim - c)] for a, c in zip(arrays, site.core, strict=True) if isinstance(a, np.ndarray)]
    low = any(a.ndim < c for a, c in zip(arrays, site.core, strict=True) if isinstance(a, np.ndarray))
    if outcome.error is not None:
        if hostile.what == "as it is":
            raise Finding(f"a valid call was refused: {str(outcome.error)[:300]}")
        expect_helpful(site, hostile, outcome.error)
        return outcome
    if not site.target.items:
        return outcome
    if low:
        return lower(site, hostile, outcome)
    try:
        batch = np.broadcast_shapes(*leads)
    except ValueError:
        raise Finding(f"accepted batches that do not fit: {leads}") from None
    if (site.target.bars or site.target.sums) and any(lead != batch for lead in leads):
        return outcome
    got = leaves(outcome.result)[: site.target.compared]
    for place in itertools.islice(itertools.product(*map(range, batch)), 6):
        one = item(arrays, site.core, place)
        alone = call(site.target, one, hostile.options)
        if alone.error is not None:
            raise Finding(f"accepted in a batch, refused alone: {str(alone.error)[:200]}")
        if any(y.shape[: len(batch)] != batch for y in got):
            raise Finding(
                f"a result of shape {next(y.shape for y in got if y.shape[: len(batch)] != batch)} for batch {batch}"
            )
        mine = [y[place] for y in got]
        expect_equal(site, mine, leaves(alone.result)[: site.target.compared], saying=f" in item {place}")
        check_definition(site, one, alone.result, hostile.options)
    return outcome


def lower(site: Site, hostile: Hostile, outcome: Outcome) -> Outcome:
    """An array with fewer axes than an item has: no meaning was given to it."""
    if hostile.what == "as it is":
        return outcome
    raise Finding("accepted an array with fewer axes than one item has")


def check_definition(site: Site, arrays: Any, result: Any, options: Any, allowed: float | None = None) -> None:
    if site.target.check is None or any(0 in a.shape for a in arrays if isinstance(a, np.ndarray)):
        return
    info = [part for part in (result if isinstance(result, tuple) else ()) if hasattr(part, "converged")]
    outputs = result[0] if info else result
    if info and not np.all(info[0].converged):
        return
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not all(np.all(np.isfinite(y)) for y in outputs):
        return
    with np.errstate(all="ignore"):
        error = site.target.check(arrays, outputs, **options)
    if not error <= (allowed or max(tolerance(site), 1e-9 if site.target.loose > 1 else 0)):
        raise Finding(f"a wrong number: off its definition by {error:.1e}")


def no_items(site: Site, hostile: Hostile) -> Outcome:
    """A batch of none has results of none, shaped like one item's."""
    outcome = call(site.target, hostile.arrays, hostile.options)
    if outcome.error is not None:
        expect_helpful(site, hostile, outcome.error)
        return outcome
    one = valid(site, item(site.problem.arrays, site.core, (0,) * len(site.batch))) if 0 not in site.batch else None
    got = leaves(outcome.result)
    if one is not None:
        wanted = [(*hostile.more, *y.shape) for y in leaves(one)]
        if [y.shape for y in got] != wanted:
            raise Finding(f"results of shapes {[y.shape for y in got]}, expected {wanted}")
    return outcome


def nothing(site: Site, hostile: Hostile) -> Outcome:
    outcome = call(site.target, hostile.arrays, hostile.options)
    if outcome.error is not None:
        expect_helpful(site, hostile, outcome.error)
    return outcome


def copied(a: Any) -> Any:
    return a.copy() if isinstance(a, np.ndarray) else a


def _others(site: Site, hostile: Hostile, right: bool) -> Outcome:
    """The item with NaN fails or is NaN; the bits of the others are what they were."""
    options = kept_quiet(site, hostile)
    # of the same strides as the hostile ones, on which rounding depends
    bad, sound = ([copied(a) for a in arrays] for arrays in (hostile.arrays, site.problem.arrays))
    loud, quiet = call(site.target, bad, hostile.options), call(site.target, bad, options)
    good = call(site.target, sound, options)
    if quiet.error is not None:
        if options is not hostile.options and "throw" in options:
            expect_helpful(site, hostile, quiet.error)
            if isinstance(quiet.error, DdnrefError) and site.target.items:
                raise Finding(f"raised {quiet.name} with throw=False: {str(quiet.error)[:150]}")
        return quiet
    place = hostile.more
    got, wanted = leaves(quiet.result), leaves(good.result)
    if not site.target.items:
        silent(site, hostile, loud, got, right)
        return loud
    for x, y in zip(got, wanted, strict=True):
        if x.shape != y.shape:
            raise Finding(f"a result of shape {x.shape} instead of {y.shape}")
        others = np.ones(site.batch, bool)
        others[place] = False
        if x.shape[: len(site.batch)] == site.batch and not np.array_equal(x[others], y[others], equal_nan=True):
            raise Finding(f"the bad item changed others: {x[others].ravel()[:3]} instead of {y[others].ravel()[:3]}")
    if site.target.bars and all(np.array_equal(x, y) for x, y in zip(got, wanted, strict=True)):
        return loud  # a VJP need not look at all that its forward made
    silent(site, hostile, loud, [x[place] for x in got if x.shape[: len(site.batch)] == site.batch], right)
    return loud


def silent(site: Site, hostile: Hostile, loud: Outcome, bad: list[Any], right: bool) -> None:
    """A result that is finite all over although NaN went in, with nothing said."""
    numbers = [x for x in bad if x.dtype.kind in "fc"]
    flags = [x for x in bad if x.dtype.kind == "b"]
    if not numbers or any(not np.all(np.isfinite(x)) for x in numbers) or any(not np.all(x) for x in flags):
        return
    if hostile.what.partition(":")[0] in site.target.unused:
        return
    if loud.error is None and not right and any(x.size for x in numbers):
        raise Finding(f"NaN went in, {numbers[0].ravel()[:4]} came out, nothing was said")


def others(site: Site, hostile: Hostile) -> Outcome:
    return _others(site, hostile, right=False)


def others_or_right(site: Site, hostile: Hostile) -> Outcome:
    """Infinity may have a finite answer, such as the projection of one onto a cube."""
    return _others(site, hostile, right=True)


def scaled(site: Site, hostile: Hostile) -> Outcome:
    """Refused, not finite, or scaled as the definition says."""
    outcome = call(site.target, hostile.arrays, hostile.options)
    if outcome.error is not None:
        expect_helpful(site, hostile, outcome.error)
        return outcome
    name, p = hostile.more
    if lost(site, hostile):
        return outcome
    got, good = leaves(outcome.result), leaves(valid(site))
    if name is None or name in site.target.powers:
        powers = [1.0] * len(good) if name is None else site.target.powers[name]
        for i, (x, y) in enumerate(zip(got, good, strict=False)):
            if y.dtype.kind not in "fc" or i >= len(powers):
                continue
            with np.errstate(all="ignore"):
                # the smaller number is scaled back, so that nothing is lost
                k = round(p * powers[i]) if abs(p * powers[i] - round(p * powers[i])) < 1e-9 else None
                if k is None:
                    continue
                wanted = _times(y, k)
            if not np.all(np.isfinite(x)):
                continue
            if not np.all(np.isfinite(wanted)):
                raise Finding(f"result {i} is finite where it overflows: {x.ravel()[:3]}")
            if size_of(wanted) < TINY:  # the digits are lost below the smallest normal numbers
                if np.max(np.abs(x), initial=0.0) > 1e3 * TINY:
                    raise Finding(f"a wrong number: result {i} is {x.ravel()[:3]}, expected {wanted.ravel()[:3]}")
                continue
            why = difference(
                site.target._replace(
                    phases=(0,) if i in site.target.phases else (),
                    phases_of_rows=(0,) if i in site.target.phases_of_rows else (),
                ),
                [x],
                [wanted],
                10 * tolerance(site),
            )
            if why:
                raise Finding(f"a wrong number: {why}; {x.ravel()[:3]}, expected {wanted.ravel()[:3]}")
    if site.target.check is not None and site.target.items and abs(p) <= 300:
        for place in itertools.islice(itertools.product(*map(range, site.batch)), 4):
            one = item(hostile.arrays, site.core, place)
            alone = call(site.target, one, hostile.options)
            if alone.error is None:
                check_definition(site, one, alone.result, hostile.options, 100 * max(tolerance(site), 1e-9))
    return outcome


def scaled_single(site: Site, hostile: Hostile) -> Outcome:
    """In float32: refused, not finite, or what float64 makes of the same numbers."""
    options = kept_quiet(site, hostile)
    outcome = call(site.target, hostile.arrays, options)
    if outcome.error is not None:
        expect_helpful(site, hostile, outcome.error)
        return outcome
    wanted = call(site.target, tuple(map(plain, hostile.arrays)), options)
    got, good = leaves(outcome.result), leaves(wanted.result)
    sizes = [size_of(y) for y in good if y.dtype.kind in "fc"]
    # below the smallest normal numbers of float32 digits are lost, of arguments and results alike
    lost = any(_least(a) < 2.0**-120 for a in hostile.arrays) or any(0 < size < 2.0**-110 for size in sizes)
    if wanted.error is not None or lost or max(sizes, default=0.0) > 2.0**126:
        return outcome
    if all(np.all(np.isfinite(y)) for y in (*got, *good)):
        flags = [x for x in got if x.dtype.kind == "b"]
        if all(np.all(x) for x in flags):
            expect_equal(site, outcome.result, wanted.result, 1e-3 / tolerance(site), " in float32")
    return outcome


def _least(a: Any) -> float:
    if not isinstance(a, np.ndarray) or a.dtype.kind not in "fc":
        return 1.0
    return float(np.min(np.abs(a[a != 0]), initial=1.0))


def lost(site: Site, hostile: Hostile) -> bool:
    """Whether the scale took digits away from the argument, below the smallest normal numbers."""
    pairs = zip(hostile.arrays, site.problem.arrays, strict=True)
    sizes = [
        np.min(np.abs(a[b != 0]), initial=1.0) for a, b in pairs if isinstance(a, np.ndarray) and a.dtype.kind in "fc"
    ]
    return min(sizes, default=1.0) < 2.0**-1015


def _times(y: Any, k: int) -> Any:
    half = k // 2
    with np.errstate(all="ignore"):
        return y * 2.0**half * 2.0 ** (k - half)


def permuted(site: Site, hostile: Hostile) -> Outcome:
    got, wanted = leaves(valid(site, hostile.arrays)), leaves(valid(site))
    # a solver whose items stop together may take a step more
    expect_equal(site, got, [y[hostile.more] for y in wanted], saying=" after a permutation")
    return Outcome(got)


def twice(site: Site, hostile: Hostile) -> Outcome:
    first, second = leaves(valid(site)), leaves(valid(site))
    if any(not np.array_equal(x, y, equal_nan=x.dtype.kind in "fc") for x, y in zip(first, second, strict=True)):
        raise Finding("two calls with the same arguments differ")
    return Outcome(first)


def linear(site: Site, hostile: Hostile) -> Outcome:
    """Expect linearity in the directions; the second ones are different random multiples of the first."""
    k, arrays = site.target.bars, site.problem.arrays
    factors = site.rng.uniform(-2.0, 2.0, k)
    second = tuple(f * a for f, a in zip(factors, arrays[:k], strict=True))
    both = tuple(2 * a + b for a, b in zip(arrays[:k], second, strict=True))
    gauge = {key: float("inf") for key in ("gauge_rtol",) if key in inspect.signature(site.target.call).parameters}
    options = {**hostile.options, **gauge}
    one, two, sum_ = (leaves(valid(site, (*bars, *arrays[k:]), options)) for bars in (arrays[:k], second, both))
    wanted = [y if y.dtype.kind not in "fc" else 2 * y + z for y, z in zip(one, two, strict=True)]
    expect_equal(site, sum_, wanted, 20.0, " of a sum of cotangents")
    return Outcome(sum_)


def derivative(site: Site, hostile: Hostile) -> Outcome:
    rule = site.target.rule
    trial = TRIALS[rule.name]
    sample = trial.sample(np.asarray, site.rng, site.batch, int(site.rng.integers(1, 8)), False)
    forward, options = options_of(rule, sample.options)
    bound = partial(site.target.call, **(accepted(rule.jvp, options) if site.target.pushes else options))
    report = (check_jvp if site.target.pushes else check_vjp)(
        partial(plain_forward(rule), **forward),
        (lambda *a: bound(*a)[0]) if rule.vjp_info else bound,
        *sample.inputs, saves=True, needs=rule.needs, loss=sample.loss, gap=sample.gap,
        tangent=trial.tangent, symmetrises=trial.symmetrises, directions=2,
    )  # fmt: skip
    if not report.passed:
        raise Finding(f"a wrong derivative: off by {report.error:.1e}")
    return Outcome()


def judged(site: Site, hostile: Hostile) -> Outcome:
    """A hard problem: as accurate as its judge demands, or refused where it is singular."""
    problem = hostile.more
    outcome = call(site.target, hostile.arrays, hostile.options)
    if problem.is_singular and outcome.error is None:
        raise Finding("accepted a singular matrix")
    if outcome.error is not None:
        if not (problem.is_singular and isinstance(outcome.error, SingularError)):
            raise Finding(f"a valid call was refused: {str(outcome.error)[:300]}")
        return outcome
    with np.errstate(all="ignore"):
        error, tolerance = problem.judge(tuple(leaves(outcome.result)))
    if not error <= tolerance:
        raise Finding(f"a wrong number: off by {error:.1e} (allowed {tolerance:.0e})")
    return outcome


EXPECTATIONS: dict[str, Callable[[Site, Hostile], Outcome]] = {
    f.__name__: f
    for f in (
        same, same_thrown, refused, same_or_refused, single, none, items, no_items, nothing, others, others_or_right,
        scaled, scaled_single, permuted, twice, linear, derivative, judged,
    )
}  # fmt: skip
