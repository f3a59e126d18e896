"""Shapes and values: what fits no function, and what fits but is hard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._site import NUMBERS, Hostile, Site

# --- shapes -----------------------------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[Any], Any]] = {
    "0-d": lambda a: np.array(a.ravel()[0] if a.size else 1.0, dtype=a.dtype),
    "1-d": lambda a: a.ravel().copy(),
    "an axis less": lambda a: a[0].copy() if a.ndim and len(a) else a[..., None],
    "an axis more": lambda a: a[..., None].copy(),
    "an axis of one in front": lambda a: a[None].copy(),
    "longer": lambda a: np.concatenate([a, a[..., :1]], axis=-1) if a.ndim and a.size else a[..., None],
    "shorter": lambda a: a[..., :-1].copy() if a.ndim else a[None],
    "more rows": lambda a: np.concatenate([a, a[..., :1, :]], axis=-2) if a.ndim > 1 and a.size else a[..., None],
    "fewer rows": lambda a: a[..., 1:, :].copy() if a.ndim > 1 else a[None],
    "transposed": lambda a: np.swapaxes(a, -1, -2).copy() if a.ndim > 1 else a[:, None] if a.ndim else a[None],
    "no entries": lambda a: np.zeros(0, dtype=a.dtype),
    "reshaped": lambda a: a.reshape((a.shape[0] * a.shape[1], *a.shape[2:])).copy() if a.ndim > 1 else a[None, None],
}


def shape(site: Site) -> Hostile | None:
    """The shape of one array: refused, or right for what it then means."""
    how, i = site.choice(SHAPES), site.pick(floating=False)
    if i is None or (how in ("0-d", "an axis less") and site.target.names[i] in NUMBERS):
        return None
    value = SHAPES[how](site.problem.arrays[i])
    return site.replaced(i, value, f"{how}, {value.shape}", "items", names=())


def batches(site: Site) -> Hostile | None:
    """Batch axes that do not agree."""
    if not site.batch or not site.target.items or len(site.problem.arrays) < 2:
        return None
    i = site.pick(floating=False)
    if i is None or site.problem.arrays[i].ndim <= site.core[i]:
        return None
    a = site.problem.arrays[i]
    how, change = site.choice(
        [
            ("another batch", lambda a: np.concatenate([a, a], axis=0)),
            ("a batch of none", lambda a: a[:0]),
            ("no batch", lambda a: a[(0,) * (a.ndim - site.core[i])]),
            ("a batch of one", lambda a: a[:1]),
        ]
    )
    return site.replaced(i, np.array(change(a)), how, "items", names=())


def empty(site: Site) -> Hostile | None:
    """No items, or items without entries."""
    if not site.target.items or any(not isinstance(a, np.ndarray) for a in site.problem.arrays):
        return None
    if site.rng.integers(2):
        batch = site.choice([(0,), (2, 0), (0, 3)])
        arrays = tuple(
            np.zeros((*batch, *a.shape[a.ndim - c :]), dtype=a.dtype)
            for a, c in zip(site.problem.arrays, site.core, strict=True)
        )
        return Hostile(arrays, site.problem.options, f"all: batch {batch}", "no_items", more=batch)
    arrays = tuple(
        np.zeros((*a.shape[: a.ndim - c], *(0,) * c), a.dtype)
        for a, c in zip(site.problem.arrays, site.core, strict=True)
    )
    return Hostile(arrays, site.problem.options, "all: items without entries", "nothing")


# --- values -----------------------------------------------------------------------------------------------------


def not_finite(site: Site) -> Hostile | None:
    """NaN or infinity in one entry of one item; the other items keep their bits."""
    i = site.pick(lambda a: a.size > 0)
    if i is None:
        return None
    how, value = site.choice([("NaN", np.nan), ("inf", np.inf), ("-inf", -np.inf)])
    a = site.problem.arrays[i].copy()
    place = tuple(int(site.rng.integers(n)) for n in a.shape)
    a[place] = value
    lead = place[: a.ndim - site.core[i]] if site.target.items else ()
    expect = "others" if how == "NaN" else "others_or_right"
    return site.replaced(i, a, f"{how} at {place}", expect, more=lead, names=())


POWERS_OF_TWO = (-1060, -1000, -600, -500, -300, -100, 100, 300, 500, 600, 1000, 1015)


def scale(site: Site, powers: Any = POWERS_OF_TWO) -> Hostile | None:
    """One argument times a power of two, up to the ends of the exponent."""
    names = [n for n in site.target.names[: len(site.problem.arrays)] if n not in site.target.integers]
    if not names:
        return None
    name, p = site.choice(names), site.choice(powers)
    i = site.target.names.index(name)
    if not isinstance(site.problem.arrays[i], np.ndarray):
        return None
    with np.errstate(all="ignore"):
        a = np.ldexp(1.0, p) * site.problem.arrays[i]
    if not np.all(np.isfinite(a)):
        return None
    return site.replaced(i, a, f"times 2**{p}", "scaled", names=(), more=(name, p))


def scale_single(site: Site) -> Hostile | None:
    """Scale one argument in float32, whose exponents end at 2**±126."""
    hostile = None if site.target.double else scale(site, (-140, -120, -70, -30, 30, 70, 120))
    if hostile is None:
        return None
    kinds = {"float64": np.float32, "complex128": np.complex64}
    with np.errstate(all="ignore"):
        arrays = tuple(
            a.astype(kinds.get(a.dtype.name, a.dtype)) if isinstance(a, np.ndarray) else a for a in hostile.arrays
        )
    if not all(np.all(np.isfinite(a)) for a in arrays if isinstance(a, np.ndarray)):
        return None
    options = {k: 1e-5 if k == "rtol" else v for k, v in hostile.options.items()}
    return hostile._replace(arrays=arrays, options=options, expect="scaled_single", what=f"{hostile.what} in float32")


def scale_bars(site: Site) -> Hostile | None:
    """All cotangents, or all tangents, times a power of two: a derivative is linear."""
    if not site.target.bars:
        return None
    p, k = site.choice(POWERS_OF_TWO), site.target.bars
    with np.errstate(all="ignore"):
        bars = tuple(np.ldexp(1.0, p) * a for a in site.problem.arrays[:k])
    if not all(np.all(np.isfinite(a)) for a in bars):
        return None
    arrays = (*bars, *site.problem.arrays[k:])
    return Hostile(arrays, site.problem.options, f"cotangents times 2**{p}", "scaled", more=(None, p))


def items(site: Site) -> Hostile | None:
    """Nothing changed: the batch is what its items are alone, and what the definition says."""
    return Hostile(site.problem.arrays, site.problem.options, "as it is", "items")


def order(site: Site) -> Hostile | None:
    """The items in another order."""
    if (
        not site.target.items
        or not site.batch
        or any(
            not isinstance(a, np.ndarray) or a.ndim - c != len(site.batch)
            for a, c in zip(site.problem.arrays, site.core, strict=True)
        )
    ):
        return None
    turn = site.rng.permutation(site.batch[0])
    return site.all(lambda a: a[turn], f"items in the order {turn.tolist()}", "permuted", more=turn)


def again(site: Site) -> Hostile | None:
    """Twice: the same bits."""
    return Hostile(site.problem.arrays, site.problem.options, "twice", "twice")


def linear(site: Site) -> Hostile | None:
    """The derivative of a combination of cotangents or tangents is that of theirs."""
    if not site.target.bars:
        return None
    return Hostile(site.problem.arrays, site.problem.options, "two cotangents", "linear")


def hard(site: Site) -> Hostile | None:
    """Nothing changed: a hard problem, of which the answer is known."""
    problem = site.problem.options.get("problem")
    if problem is None:
        return None
    return Hostile(site.problem.arrays, site.problem.options, problem.what, "judged", more=problem)


def derivative(site: Site) -> Hostile | None:
    """The VJP or JVP against finite differences, at a random problem of any size."""
    if site.target.rule is None or not site.target.bars:
        return None
    return Hostile(site.problem.arrays, site.problem.options, "finite differences", "derivative")
