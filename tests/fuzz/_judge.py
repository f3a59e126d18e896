"""One call and what is seen of it: results, errors, side effects, and when two results are equal."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import linecache
import re
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ddnref
from ddnref import DdnrefError

from ._site import Hostile, Site
from ._targets import Target

HOME = str(Path(ddnref.__file__).parent)
ERRORS = (DdnrefError, TypeError, ValueError)
TINY = 1e-290


class Finding(Exception):
    """Behaviour that must not occur."""


class Outcome(NamedTuple):
    """How a call ended: a result, or an error of which all is in order."""

    result: Any = None
    error: Exception | None = None

    @property
    def name(self) -> str:
        return "equal" if self.error is None else type(self.error).__name__


# --- what is done with results ----------------------------------------------------------------------------------


def leaves(result: Any) -> list[Any]:
    """Arrays and numbers of a result, as NumPy arrays; of an iteration's report only what is decided."""
    if result is None:
        return []
    if isinstance(result, tuple) and hasattr(result, "converged"):
        return [host(result.converged)]
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in leaves(part)]
    if isinstance(result, dict):
        return leaves(list(result.values()))
    if callable(result) or isinstance(result, str):
        return []
    return [host(result)]


def host(a: Any) -> Any:
    """An array of any library as one of NumPy."""
    kind = type(a).__module__.split(".")[0]
    if kind == "torch":
        a = a.detach().resolve_conj().resolve_neg()
        return (a.float() if "bfloat16" in str(a.dtype) else a).cpu().numpy()
    if kind == "array_api_strict":
        import array_api_strict

        return np.asarray(a.to_device(array_api_strict.Device("CPU_DEVICE")))
    return np.asarray(a)


def plain(a: Any) -> Any:
    """The same numbers as a fresh contiguous array in double precision."""
    if a is None or not hasattr(a, "dtype") or isinstance(a, np.generic):
        return a
    a = host(a)
    if a.dtype.kind in "fc":
        return np.array(a, dtype=np.complex128 if a.dtype.kind == "c" else np.float64, order="C")
    return np.array(a, order="C", dtype=a.dtype.newbyteorder("="))


def root(a: Any) -> Any:
    """The memory that a view looks at."""
    while isinstance(a, np.ndarray) and isinstance(a.base, np.ndarray):
        a = a.base
    return a


def digest(a: Any) -> str:
    """Return a digest of all the memory behind an argument."""
    kind = type(a).__module__.split(".")[0]
    if isinstance(a, tuple | list):
        return "".join(map(digest, a))
    if (kind == "torch" and not a.is_meta and not a.is_sparse) or kind == "array_api_strict":
        a = host(a)
    if not isinstance(a, np.ndarray) or a.dtype.hasobject:
        return ""
    return hashlib.blake2b(np.ascontiguousarray(root(a)).tobytes()).hexdigest()


def call(target: Target, arrays: Any, options: dict[str, Any]) -> Outcome:
    """One call, all of whose side effects are findings: arguments changed, warnings, errors that are not ours."""
    given = (*arrays, *options.values())
    before = [digest(a) for a in given]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = target.call(*arrays, **options)
    except ERRORS as error:
        outcome = Outcome(error=error)
        check_error(target, error)
    except Exception as error:
        raise Finding(f"{type(error).__name__} from {where(error)}: {str(error)[:200]}") from error
    else:
        outcome = Outcome(result)
        check_memory(target, arrays, result)
    if [digest(a) for a in given] != before:
        raise Finding("an argument was changed")
    return outcome


def where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def check_error(target: Target, error: Exception) -> None:
    """Ours: raised by a line of this package that says ``raise``, or by Python for a signature."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    if "unexpected keyword argument 'no_such_option'" in str(error):
        return
    if _is_users(target, error):
        return
    ours = last.filename.startswith(HOME)
    if not ours or "raise" not in linecache.getline(last.filename, last.lineno):
        raise Finding(f"{type(error).__name__} from {where(error)}, not raised by us: {str(error)[:200]}")


def _is_users(target: Target, error: Exception) -> bool:
    """Say whether a function of the user raised: in a JVP nothing else has the shape of y, so it fails first."""
    return target.name.endswith("_jvp") and where(error).startswith("_solutions.py:")


def check_memory(target: Target, arrays: Any, result: Any) -> None:
    """A result is the caller's: it is no view of an argument."""
    roots = [root(a) for a in arrays if isinstance(a, np.ndarray)]
    for leaf in leaves(result):
        if leaf.ndim and any(np.may_share_memory(leaf, a) for a in roots):
            raise Finding("the result shares memory with an argument")


def aligned(y: Any, reference: Any) -> Any:
    """Columns with the phases of the reference."""
    inner = np.sum(np.conj(y) * reference, axis=-2, keepdims=True)
    size = np.abs(inner)
    return y * np.where(size > 0, inner / np.where(size > 0, size, 1), 1)


def difference(target: Target, got: Any, wanted: Any, tolerance: float) -> str:
    """Why two results are not equal; nothing where they are."""
    a, b = leaves(got), leaves(wanted)
    if len(a) != len(b) and target.compared is None:
        return f"{len(a)} results instead of {len(b)}"
    largest = max((size_of(y) for y in b), default=0.0)
    for i, (x, y) in enumerate(itertools.islice(zip(a, b, strict=False), target.compared)):
        if x.shape != y.shape:
            return f"result {i} has shape {x.shape} instead of {y.shape}"
        if y.dtype.kind not in "fc":
            if not np.array_equal(x, y):
                return f"result {i} is {x.ravel()[:4]} instead of {y.ravel()[:4]}"
            continue
        if not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return f"result {i} is finite elsewhere: {x.ravel()[:4]} instead of {y.ravel()[:4]}"
        keep = np.isfinite(y)
        if i in target.phases and keep.all() and y.size:
            x = aligned(x, y)
        if i in target.phases_of_rows and keep.all() and y.size:
            x = aligned(x.swapaxes(-1, -2), y.swapaxes(-1, -2)).swapaxes(-1, -2)
        scale = max(size_of(y), 1e-3 * largest)
        with np.errstate(all="ignore"):
            worst = float(np.max(np.abs(x[keep] / 2 - y[keep] / 2), initial=0.0)) * 2
        if worst > tolerance * scale + TINY * 1e-10:
            return f"result {i} is off by {worst / (scale or 1):.1e} (allowed {tolerance:.0e})"
    return ""


def size_of(y: Any) -> float:
    if y.dtype.kind not in "fc":
        return 0.0
    with np.errstate(all="ignore"):
        return float(np.max(np.abs(y[np.isfinite(y)]), initial=0.0))


def tolerance(site: Site) -> float:
    return 2e-13 * site.problem.condition * site.target.loose


def expect_equal(site: Site, got: Any, wanted: Any, loosened: float = 1.0, saying: str = "") -> None:
    why = difference(site.target, got, wanted, tolerance(site) * loosened)
    if why:
        raise Finding(f"a wrong number{saying}: {why}")


def names_in(message: str, names: Any) -> bool:
    return any(re.search(rf"(?<![A-Za-z]){re.escape(n.strip('_'))}(?![A-Za-z])", message) for n in names)


def expect_helpful(site: Site, hostile: Hostile, error: Exception) -> None:
    """A refusal of a static fact says which argument it is about."""
    more = (alias for aliases in site.target.aliases.values() for alias in aliases)
    names = hostile.names or (*site.target.names, *site.problem.options, *more)
    if isinstance(error, DdnrefError) or _is_users(site.target, error):
        return
    if not names_in(str(error), names):
        raise Finding(f"{type(error).__name__} names none of {', '.join(names)}: {str(error)[:200]}")


def valid(site: Site, arrays: Any = None, options: Any = None) -> Any:
    """The result of a call that must succeed."""
    outcome = call(site.target, site.problem.arrays if arrays is None else arrays,
                   site.problem.options if options is None else options)  # fmt: skip
    if outcome.error is not None:
        raise Finding(f"a valid call was refused: {str(outcome.error)[:300]}") from outcome.error
    return outcome.result


def kept_quiet(site: Site, hostile: Hostile) -> dict[str, Any]:
    """Return the options, with ``throw=False`` if the function has that option."""
    quiet = {"throw": False} if "throw" in inspect.signature(site.target.call).parameters else {}
    return {**hostile.options, **quiet}
