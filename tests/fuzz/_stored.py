"""The same numbers stored in another way, and inputs that are not arrays of floating-point numbers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ._site import NUMBERS, Hostile, Site

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


# --- other than plain floating arrays ----------------------------------------------------------------------------

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
    if i is None or (how == "bool" and site.target.name == "mask"):  # which takes flags
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
    """Pass lists, numbers, strings, matrices, masked arrays and other objects that are not plain arrays."""
    how = site.choice(CONTAINERS)
    i = site.pick(lambda a: a.size > 0 and (how != "Python number" or a.ndim > 0), floating=False)
    if i is None or (how == "NumPy number" and site.problem.arrays[i].ndim == 0):
        return None
    if how == "Python number" and site.target.names[i] in NUMBERS:
        return None
    expect = "same_or_refused" if how in ("tuple", "NumPy number") else "refused"
    names = {"names": ()} if how == "NumPy number" else {}  # an array of the wrong shape
    return site.replaced(i, CONTAINERS[how](site.problem.arrays[i]), how, expect, **names)


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
