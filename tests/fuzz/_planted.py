"""Defects as people make them, each in a copy of a rule: the campaign must report every one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from ddnref._rules.table import RULES

from ._hard import hard_target
from ._old_faults import OLD, old_rule
from ._targets import Target, forward_target, jvp_target, vjp_target

Change = Callable[[Callable[..., Any]], Callable[..., Any]]


def _planted(name: str, change: Change) -> Target:
    """A copy of the target of that name with a defect in it."""
    operation, _, kind = name.rpartition("_")
    makers = {"vjp": vjp_target, "jvp": jvp_target}
    target = makers[kind](RULES[operation]) if kind in makers else forward_target(RULES[name])
    return target._replace(call=wraps(target.call)(change(target.call)))


def _on_numpy(defect: Callable[[Any], Any]) -> Change:
    """Apply a defect to the first argument if it is a NumPy array."""

    def change(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *rest, **options: f(defect(x) if isinstance(x, np.ndarray) else x, *rest, **options)

    return change


def _as_stored(x: Any) -> Any:
    """The entries in the order of memory: right for C order alone."""
    return x.ravel(order="K").reshape(x.shape)


def _in_place(x: Any) -> Any:
    if x.flags.writeable and x.size and x.dtype.kind in "fc":
        x *= 1.0 + 1e-15
        x.flat[0] += x.flat[0] * 1e-12
    return x


def _poisoned(x: Any) -> Any:
    return x + 0 * np.sum(x) if x.dtype.kind in "fc" else x


def _first_item(x: Any) -> Any:
    return np.broadcast_to(x[:1], x.shape) if x.ndim > 2 and x.dtype.kind in "fc" and len(x) else x


def _unhelpful(f: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, *rest: Any, **options: Any) -> Any:
        return f(np.asarray(x, dtype=float) if not hasattr(x, "dtype") else x[..., :, :], *rest, **options)

    return call


def _nameless(f: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arrays: Any, **options: Any) -> Any:
        try:
            return f(*arrays, **options)
        except (TypeError, ValueError) as error:
            error.args = ("Wrong input.",)
            raise

    return call


def _noisy(f: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arrays: Any, **options: Any) -> Any:
        warnings.warn("look out", stacklevel=1)
        return f(*arrays, **options)

    return call


def _after(defect: Callable[[Any], Any]) -> Change:
    """Apply a defect to a result that is a single array."""
    return lambda f: lambda *arrays, **options: defect(f(*arrays, **options))


def _random(y: Any) -> Any:
    return y * (1 + 1e-9 * float(np.random.default_rng().random()))


def _underflow(f: Callable[..., Any]) -> Callable[..., Any]:
    """The length by squares, which leave the range of exponents."""

    def call(x_bar: Any, *rest: Any, **options: Any) -> Any:
        result = f(x_bar, *rest, **options)
        small = isinstance(x_bar, np.ndarray) and x_bar.dtype.kind == "f" and not np.sum(x_bar * x_bar) > 0
        return 0 * result if small else result

    return call


def _deaf(f: Callable[..., Any]) -> Callable[..., Any]:
    """An option that nobody looks at."""

    def call(*arrays: Any, radius: Any = 1.0, **options: Any) -> Any:
        sane = isinstance(radius, float) and 0 < radius < np.inf
        return f(*arrays, radius=radius if sane else 1.0, **options)

    return call


def _swallowed(f: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, *rest: Any, **options: Any) -> Any:
        return f(np.nan_to_num(x) if isinstance(x, np.ndarray) and x.dtype.kind in "fc" else x, *rest, **options)

    return call


def _crash(f: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arrays: Any, **options: Any) -> Any:
        import ctypes

        return ctypes.string_at(0)

    return call


def _hang(f: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arrays: Any, **options: Any) -> Any:
        while True:
            time.sleep(1)

    return call


PLANTED: dict[str, tuple[str, Change, str]] = {
    "wrong strides": ("qr", _on_numpy(_as_stored), "a wrong number"),
    "argument changed": ("qr", _on_numpy(_in_place), "an argument was changed"),
    "one bad item poisons its batch": ("expm", _on_numpy(_poisoned), "the bad item changed others"),
    "the first item for all": ("logm", _on_numpy(_first_item), "a wrong number in item"),
    "integers converted silently": (
        "eigh", _on_numpy(lambda x: x.astype(float) if x.dtype.kind == "i" else x), "accepted what must be refused",
    ),
    "error from deep inside": ("invsqrtm", _unhelpful, "IndexError"),
    "message without the name": ("project_simplex", _nameless, "names none of"),
    "warning": ("project_ball", _noisy, "UserWarning"),
    "not deterministic": ("project_sphere", _after(_random), "differ"),
    "a view of the argument": ("project_ball", lambda f: lambda x, **o: (f(x, **o), x)[1], "shares memory"),
    "float64 out": ("expm", _after(lambda y: y.astype(float) if isinstance(y, np.ndarray) else y), "float32 in"),
    "option ignored": ("project_sphere", _deaf, "accepted what must be refused"),
    "NaN swallowed": ("project_simplex", _swallowed, "nothing was said"),
    "squares that underflow": ("project_simplex_vjp", _underflow, "a wrong number"),
    "wrong derivative": (
        "sqrtm_vjp", _after(lambda y: y * (1 + 1e-6) if isinstance(y, np.ndarray) else y), "a wrong derivative",
    ),
    "wrong sign of a tangent": (
        "project_ball_jvp", _after(lambda y: -y if isinstance(y, np.ndarray) else y), "a wrong derivative",
    ),
    "a tangent that is not linear": (
        "logm_jvp", _after(lambda y: y * abs(y) if isinstance(y, np.ndarray) else y), "of a sum of cotangents",
    ),
    **{name: (f"{kind}: {rule}", lambda f: f, says) for name, (kind, rule, _, says) in OLD.items()},
    "crash of the interpreter": ("qr", _crash, "the interpreter ended"),
    "hang": ("qr", _hang, "the interpreter ended"),
}  # fmt: skip
"""Name of the target, the defect, and what the finding says."""


def planted(name: str) -> Target:
    """The copy with that defect."""
    if name in OLD:
        return hard_target(OLD[name][0], old_rule(name))
    function, change, _ = PLANTED[name]
    return _planted(function, change)
