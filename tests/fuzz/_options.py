"""Options of the wrong type, out of range, or unknown."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from ._site import Hostile, Site
from ._targets import Target

# --- options ----------------------------------------------------------------------------------------------------

NAN = float("nan")
_TOLERANCE = (-1.0, NAN, "x", 1j, [1e-3], np.asarray([1e-3, 1e-2]))
_COUNT = (-1, 1.5, "x", NAN, [3], 2 + 0j)
_NAME = ("nope", 3, b"LA", ["x"], 1.5)
_POSITIVE = (0, -1.0, NAN, float("inf"), "x", 1j, [1.0, 2.0])
_CALL = (3, "x")
_ARRAY = ("x", [1.0], 3, np.ones(99), np.ones((7, 1, 2)), np.ones(3, dtype=int))
INVALID: dict[str, tuple[Any, ...]] = {
    "tolerance": _TOLERANCE,
    "count": _COUNT,
    "name": _NAME,
    "positive": _POSITIVE,
    "callable": _CALL,
    "array": _ARRAY,
    "k": (0, -1, 10**6, 1.5, "2", NAN, [1]),
    "check_every": (0, *_COUNT),
    "norm": (3, 0, "two", NAN, -1, [2]),
    "index": ([0, 0], [99], [-99], [1.5], "ab", 3, 1.5),
    "seed": (-1, 1.5, "x"),
    "axis": (99, 1.5, "x", -3),
    "function": (None, 3, "x", lambda w: None, lambda w: w[..., :1], lambda w: 1.0, lambda w: w.tolist()),
    "damping": ("x", None, NAN, float("inf"), [1.0], np.ones(3)),
    "refine": ("x", -1, 1.5, None),
    "gap": (0, -1.0, NAN, "x"),
    "interval": ("ab", (1.0,), (2.0, 1.0), (NAN, 1.0), 3, ("a", "b")),
    "any number": (NAN, "x", [1.0], 1j, float("inf")),
}
"""Values that an option must refuse, by what it is."""
KINDS: dict[str, str] = {
    **dict.fromkeys(("rtol", "gauge_rtol", "cluster_rtol", "check_rtol", "zero_rtol", "vjp_rtol", "atol"), "tolerance"),
    **dict.fromkeys(("maxiter", "n_iter", "basis"), "count"),
    **dict.fromkeys(("k", "n", "restart"), "k"),
    **dict.fromkeys(
        ("which", "method", "align", "kind", "solver", "curvature", "sign", "boundary", "reduction", "on_failure"),
        "name",
    ),
    **dict.fromkeys(("radius", "total", "alpha", "eps"), "positive"),
    **dict.fromkeys(("v0", "x0", "y0", "reference"), "array"),
    **dict.fromkeys(("callback", "while_loop", "preconditioner", "progress"), "callable"),
    **dict.fromkeys(("f", "df"), "function"),
    "check_every": "check_every",
    "norm": "norm",
    "index": "index",
    "seed": "seed",
    "axis": "axis",
}


def option_kinds(target: Target) -> dict[str, str]:
    """Every option of a target that has invalid values, and of which kind it is."""
    parameters = inspect.signature(target.call).parameters.values()
    own = {p.name: KINDS[p.name] for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name in KINDS}
    return {**own, **target.options}


def option(site: Site) -> Hostile | None:
    """A value of the wrong type, out of range, or unknown."""
    kinds = option_kinds(site.target)
    if not kinds:
        return None
    name = site.choice(kinds)
    value = site.choice(INVALID[kinds[name]])
    if name == "restart" and value == 10**6:
        return None
    shown = "a function" if callable(value) else " ".join(repr(value).split())
    options = {**site.problem.options, name: value}
    return Hostile(site.problem.arrays, options, f"{name}={shown}", "refused", (name,))


def keyword(site: Site) -> Hostile | None:
    """A keyword that does not exist."""
    options = {**site.problem.options, "no_such_option": 1}
    return Hostile(site.problem.arrays, options, "no_such_option=1", "refused", ("no_such_option",))


def throw(site: Site) -> Hostile | None:
    """Pass ``throw=False``, which changes nothing unless something fails."""
    if "throw" not in inspect.signature(site.target.call).parameters:
        return None
    return Hostile(site.problem.arrays, {**site.problem.options, "throw": False}, "throw=False", "same_thrown")
