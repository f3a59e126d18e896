"""What is done to an input, and what must follow: one function for each kind, from a valid problem to a hostile one."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ._targets import Problem, Target


class Hostile(NamedTuple):
    """A mutated call and what it must lead to."""

    arrays: tuple[Any, ...]
    options: dict[str, Any]
    what: str
    """For the report: which argument and how."""
    expect: str
    """A function of `_oracle`: ``same``, ``refused``, ``same_or_refused``, ``items``, ``others``, ..."""
    names: tuple[str, ...] = ()
    """What the message of a refusal must mention one of; any argument by default."""
    more: Any = None
    """What that expectation needs besides."""


class Site(NamedTuple):
    """Where a mutation works."""

    rng: np.random.Generator
    target: Target
    problem: Problem
    core: tuple[int, ...]
    """Axes of one item of each array."""
    batch: tuple[int, ...]

    def pick(
        self, accept: Callable[[Any], bool] = lambda a: True, floating: bool = True, ours: bool = True
    ) -> int | None:
        """One of the arrays that satisfy a condition."""
        names = self.target.names
        places = [
            i
            for i, a in enumerate(self.problem.arrays)
            if isinstance(a, np.ndarray)
            and accept(a)
            and not (floating and names[i] in self.target.integers)
            and not (ours and names[i] in self.target.theirs)
        ]
        return int(self.rng.choice(places)) if places else None

    def choice(self, values: Any) -> Any:
        values = list(values)
        return values[int(self.rng.integers(len(values)))]

    def replaced(self, i: int, value: Any, how: str, expect: str, **fields: Any) -> Hostile:
        arrays = self.problem.arrays
        name = self.target.names[i]
        fields = {"names": (name, *self.target.aliases.get(name, ())), **fields}
        return Hostile((*arrays[:i], value, *arrays[i + 1 :]), self.problem.options, f"{name}: {how}", expect, **fields)

    def all(self, change: Callable[[Any], Any], how: str, expect: str, **fields: Any) -> Hostile:
        arrays = tuple(map(change, self.problem.arrays))
        return Hostile(arrays, self.problem.options, f"all: {how}", expect, **fields)


# --- the same numbers, stored in another way --------------------------------------------------------------------


def _gaps(a: Any) -> Any:
    """Every second entry of a larger array full of numbers that must not be touched."""
    big = np.full(tuple(2 * n + 1 for n in a.shape), 77.0, dtype=a.dtype)
    view = big[(..., *(slice(1, None, 2) for _ in a.shape))]
    view[...] = a
    return view


def _reversed(a: Any) -> Any:
    backwards = tuple(slice(None, None, -1) for _ in a.shape)
    return np.ascontiguousarray(a[backwards])[backwards] if a.ndim else a.copy()


def _unaligned(a: Any) -> Any:
    buffer = bytearray(a.nbytes + 1)
    view = np.frombuffer(buffer, dtype=a.dtype, offset=1, count=a.size).reshape(a.shape)
    view[...] = a
    return view


def _read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def _last_first(a: Any) -> Any:
    """The memory of the array with its axes in another order."""
    order = (*range(1, a.ndim), 0)
    return np.transpose(np.ascontiguousarray(np.transpose(a, order)), np.argsort(order)) if a.ndim > 1 else a.copy()


def _bytes(a: Any) -> Any:
    return np.frombuffer(a.tobytes(), dtype=a.dtype).reshape(a.shape)  # immutable for good


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "Fortran order": lambda a: np.array(a, order="F"),
    "gaps": _gaps,
    "negative strides": _reversed,
    "unaligned": _unaligned,
    "read-only": _read_only,
    "axes permuted": _last_first,
    "a view of bytes": _bytes,
}


def layout(site: Site) -> Hostile | None:
    """Strides, order, alignment, write protection: of one array or of all."""
    how = site.choice(LAYOUTS)
    i = site.pick(floating=False, ours=False)
    if i is None:
        return None
    if site.rng.integers(2):
        return site.all(lambda a: LAYOUTS[how](a) if isinstance(a, np.ndarray) else a, how, "same")
    return site.replaced(i, LAYOUTS[how](site.problem.arrays[i]), how, "same")


def broadcast(site: Site) -> Hostile | None:
    """A batch of the same item, by a stride of zero."""
    if not site.batch or 0 in site.batch or not site.target.items:
        return None

    def stretch(a: Any, core: int) -> Any:
        if not isinstance(a, np.ndarray) or a.ndim <= core:
            return a
        return np.broadcast_to(a[(0,) * (a.ndim - core)], a.shape)

    arrays = tuple(map(stretch, site.problem.arrays, site.core))
    return Hostile(arrays, site.problem.options, "all: stride 0", "same")


def byte_order(site: Site) -> Hostile | None:
    """Big-endian numbers."""
    i = site.pick()
    if i is None:
        return None
    a = site.problem.arrays[i]
    return site.replaced(i, a.astype(a.dtype.newbyteorder(">")), "big-endian", "same_or_refused")


class Subclass(np.ndarray):
    """A subclass that changes nothing."""


def _memmap(a: Any) -> Any:
    if a.size == 0:
        return a.view(Subclass)
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, dtype=a.dtype, mode="w+", shape=a.shape)
        mapped[...] = a
        return mapped


def subclass(site: Site) -> Hostile | None:
    """A memory map, a subclass of our own."""
    how, change = site.choice([("memmap", _memmap), ("subclass", lambda a: a.copy().view(Subclass))])
    i = site.pick(lambda a: a.ndim > 0, floating=False)
    return None if i is None else site.replaced(i, change(site.problem.arrays[i]), how, "same_or_refused")


# --- what is no plain floating array ----------------------------------------------------------------------------

DTYPES: dict[str, Callable[[Any], Any]] = {
    **{
        name: partial(lambda a, name: np.real(a).astype(name), name=name)
        for name in ("int64", "int8", "uint8", "bool", "float16")
    },
    "longdouble": lambda a: a.astype(np.clongdouble if np.iscomplexobj(a) else np.longdouble),
    "object": lambda a: a.astype(object),
    "str": lambda a: np.asarray(np.real(a)).astype(str),
    "bytes": lambda a: np.asarray(np.real(a)).astype("S8"),
    "datetime64": lambda a: np.real(a).astype("int64").astype("datetime64[s]"),
    "timedelta64": lambda a: np.real(a).astype("int64").astype("timedelta64[s]"),
    "structured": lambda a: np.zeros(a.shape, dtype=[("x", "f8")]),
}


def dtype(site: Site) -> Hostile | None:
    """Integers, booleans, half and extended precision, objects, strings, dates, records."""
    how, i = site.choice(DTYPES), site.pick()
    if i is None:
        return None
    if site.rng.integers(4) == 0:
        names = tuple(m for n in site.target.names for m in (n, *site.target.aliases.get(n, ())))
        change = lambda a: DTYPES[how](a) if isinstance(a, np.ndarray) and a.dtype.kind in "fc" else a
        return site.all(change, how, "refused", names=names)
    return site.replaced(i, DTYPES[how](site.problem.arrays[i]), how, "refused")


def single(site: Site) -> Hostile | None:
    """All arrays in float32: close to what float64 makes of the same numbers, and float32 again."""
    if site.target.double:
        return None
    kinds = {"float64": np.float32, "complex128": np.complex64}
    change = lambda a: a.astype(kinds[a.dtype.name]) if isinstance(a, np.ndarray) and a.dtype.kind in "fc" else a
    return site.all(change, "float32", "single")


def mixed_precision(site: Site) -> Hostile | None:
    """One array in float32, or complex, beside others."""
    i = site.pick()
    if i is None or len(site.problem.arrays) < 2 or site.target.numpy_only:
        return None
    a = site.problem.arrays[i]
    if site.rng.integers(2) and not np.iscomplexobj(a):
        return site.replaced(i, a + 0j, "complex among others", "same_or_refused", names=())
    kind = np.complex64 if np.iscomplexobj(a) else np.float32
    return site.replaced(i, a.astype(kind), "float32 among float64", "refused", names=())


def _matrix(a: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pending deprecation
        return np.asmatrix(a) if a.ndim == 2 else np.ma.masked_array(a, mask=np.zeros(a.shape, bool))


def _masked(a: Any) -> Any:
    mask = np.zeros(a.shape, bool)
    mask[(0,) * a.ndim] = True
    return np.ma.masked_array(a, mask=mask)


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda a: a.tolist(),
    "tuple": lambda a: tuple(a.tolist()) if a.ndim else a.tolist(),
    "Python number": lambda a: 1.5,
    "NumPy number": lambda a: np.float64(1.5),
    "string": lambda a: "x",
    "dict": lambda a: {"x": a},
    "set": lambda a: {1.0},
    "generator": lambda a: (x for x in a.ravel()),
    "function": lambda a: lambda: a,
    "type": lambda a: np.ndarray,
    "ellipsis": lambda a: ...,
    "matrix": _matrix,
    "masked array": _masked,
    "memoryview": lambda a: memoryview(np.ascontiguousarray(a)),
}


def container(site: Site) -> Hostile | None:
    """Lists, numbers, strings, matrices, masked arrays and what else is no array."""
    how = site.choice(CONTAINERS)
    i = site.pick(lambda a: a.size > 0 and (how != "Python number" or a.ndim > 0), floating=False)
    if i is None or (how == "NumPy number" and site.problem.arrays[i].ndim == 0):
        return None
    expect = "same_or_refused" if how in ("tuple", "NumPy number") else "refused"
    return site.replaced(i, CONTAINERS[how](site.problem.arrays[i]), how, expect)


def none(site: Site) -> Hostile | None:
    """No array: a cotangent of zeros, or a refusal."""
    i = site.pick(floating=False)
    return None if i is None else site.replaced(i, None, "None", "none", more=i)


# --- other libraries --------------------------------------------------------------------------------------------


def to_torch(a: Any) -> Any:
    import torch

    return torch.asarray(np.array(a, order="C"))


def to_strict(a: Any, device: str = "CPU_DEVICE") -> Any:
    import array_api_strict as xp

    return xp.asarray(np.array(a, order="C"), device=xp.Device(device))


def to_jax(a: Any) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy.asarray(np.array(a))


def _torch_conj(a: Any) -> Any:
    t = to_torch(a)
    return t.conj().resolve_conj().conj() if t.is_complex() else t


def _torch_negative(a: Any) -> Any:
    import torch

    t = to_torch(a)
    return torch._neg_view(-t) if t.is_floating_point() else t


LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "torch": to_torch,
    "torch, not contiguous": lambda a: to_torch(_last_first(a)) if a.ndim < 2 else to_torch(np.swapaxes(a, -1, -2)).mT,
    "torch, conjugate bit": _torch_conj,
    "torch, negative bit": _torch_negative,
    "array-api-strict": to_strict,
    "array-api-strict, second device": partial(to_strict, device="device1"),
}


def library(site: Site) -> Hostile | None:
    """All arrays in another library: the numbers of NumPy."""
    how = site.choice(LIBRARIES)
    if not site.problem.arrays or site.target.numpy_only:
        return None
    return site.all(lambda a: LIBRARIES[how](a) if isinstance(a, np.ndarray) else a, how, "same")


def mixed_library(site: Site) -> Hostile | None:
    """One array elsewhere: another library, another device, without values."""
    i = site.pick(floating=False)
    if i is None or len(site.problem.arrays) < 2 or site.target.numpy_only:
        return None
    there: dict[str, Callable[[Any], Any]] = {
        "torch": to_torch,
        "array-api-strict": to_strict,
        "jax": to_jax,
        "meta": lambda a: to_torch(a).to("meta"),
        "device1": partial(to_strict, device="device1"),
        "sparse": lambda a: to_torch(a).to_sparse(),
    }
    how = site.choice(there)
    here: Callable[[Any], Any] = {"meta": to_torch, "device1": to_strict, "sparse": to_torch}.get(how, lambda a: a)
    arrays = tuple(
        a if not isinstance(a, np.ndarray) else there[how](a) if j == i else here(a)
        for j, a in enumerate(site.problem.arrays)
    )
    name = site.target.names[i]
    names = (name, *site.target.aliases.get(name, ()))
    return Hostile(arrays, site.problem.options, f"{name}: {how} among others", "refused", names)


def foreign_dtype(site: Site) -> Hostile | None:
    """Dtypes of PyTorch that do not fit."""
    import torch

    i = site.pick()
    if i is None or site.target.numpy_only:
        return None
    kinds = {k: getattr(torch, k) for k in ("float16", "bfloat16", "int32", "bool")}
    how = site.choice(kinds)
    arrays = tuple(
        a if not isinstance(a, np.ndarray) else to_torch(np.real(a)).to(kinds[how]) if j == i else to_torch(a)
        for j, a in enumerate(site.problem.arrays)
    )
    name = site.target.names[i]
    names = (name, *site.target.aliases.get(name, ()))
    return Hostile(arrays, site.problem.options, f"{name}: torch {how}", "refused", names)


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
    "reshaped": lambda a: a.reshape((-1, *a.shape[2:])).copy() if a.ndim > 1 else a[None, None],
}


def shape(site: Site) -> Hostile | None:
    """The shape of one array: refused, or right for what it then means."""
    how, i = site.choice(SHAPES), site.pick(floating=False)
    if i is None:
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
    """The same in float32, whose exponents end at 2**±126."""
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
    """All cotangents times a power of two: the VJP is linear."""
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
    """The VJP of a combination of cotangents is that of theirs."""
    if not site.target.bars:
        return None
    return Hostile(site.problem.arrays, site.problem.options, "two cotangents", "linear")


def derivative(site: Site) -> Hostile | None:
    """The VJP against finite differences, at a random problem of any size."""
    if site.target.rule is None or not site.target.bars:
        return None
    return Hostile(site.problem.arrays, site.problem.options, "finite differences", "derivative")


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
        ("which", "method", "align", "kind", "solver", "curvature", "sign", "boundary", "reduction"), "name"
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
    shown = "a function" if callable(value) else repr(value)
    options = {**site.problem.options, name: value}
    return Hostile(site.problem.arrays, options, f"{name}={shown}", "refused", (name,))


def keyword(site: Site) -> Hostile | None:
    """A keyword that does not exist."""
    options = {**site.problem.options, "no_such_option": 1}
    return Hostile(site.problem.arrays, options, "no_such_option=1", "refused", ("no_such_option",))


def throw(site: Site) -> Hostile | None:
    """Where nothing fails, ``throw=False`` changes nothing."""
    if "throw" not in inspect.signature(site.target.call).parameters:
        return None
    return Hostile(site.problem.arrays, {**site.problem.options, "throw": False}, "throw=False", "same_thrown")


MUTATIONS: dict[str, Callable[[Site], Hostile | None]] = {
    "strides, order, alignment, read-only": layout,
    "stride 0": broadcast,
    "byte order": byte_order,
    "memory map, subclass": subclass,
    "wrong dtype": dtype,
    "wrong dtype of PyTorch": foreign_dtype,
    "float32": single,
    "mixed precision": mixed_precision,
    "not an array": container,
    "None": none,
    "another library or device": library,
    "mixed libraries or devices": mixed_library,
    "shape": shape,
    "batch axes that disagree": batches,
    "empty": empty,
    "NaN or infinity in one item": not_finite,
    "scale up to 2**±1000": scale,
    "scale up to 2**±120, float32": scale_single,
    "scale of the cotangents": scale_bars,
    "as it is, item by item": items,
    "items reordered": order,
    "twice": again,
    "sum of cotangents": linear,
    "finite differences": derivative,
    "option out of range or of wrong type": option,
    "unknown keyword": keyword,
    "throw=False": throw,
}
"""Kinds of the table in the documentation, in its order."""
