"""Namespaces, devices and dtypes of arrays, and the few operations on them that every layer needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from operator import truth
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

from ddnref.errors import NonFiniteError

Array: TypeAlias = Any
"""Any array that follows the Python array API standard (NumPy, CuPy, PyTorch, JAX, array-api-strict, ...)."""

Namespace: TypeAlias = Any


def namespace(**arrays: Array | None) -> Namespace:
    """Return the namespace that all named arrays share, skipping ``None`` entries.

    Raises ``TypeError`` if there is no array, if they mix namespaces or devices, or if one is neither real nor complex
    floating. float16 is refused too, because LAPACK has no half precision.
    """
    present = {name: array for name, array in arrays.items() if array is not None}
    if not present:
        raise TypeError(f"{' and '.join(arrays)} must be given: there is nothing to compute from None.")
    for array in present.values():
        if not (type(array) is np.ndarray and array.dtype.char in "fdFD" and array.dtype.isnative):
            break
    else:
        return _numpy_namespace()  # a short cut for the common case, which takes a microsecond
    # Everything else: one library, one device, then a floating dtype.
    xp = library(**present)
    for name, array in present.items():
        if array.dtype not in (xp.float64, xp.float32, xp.complex128, xp.complex64):
            raise TypeError(
                f"{name} has dtype {array.dtype}; ddnref computes in float32, float64, complex64 or complex128. "
                f"Convert it first, for example with xp.astype({name}, xp.float64)."
            )
    return xp


@cache
def _numpy_namespace() -> Namespace:
    """Return array-api-compat's NumPy, imported on first use because it loads all of NumPy's subpackages."""
    import array_api_compat.numpy as xp

    return xp


HINTS = {
    "autograd": "wrap the operation with ddnref.interop.autograd.differentiable; an operator is made of plain arrays, "
    "then operator.with_params(...) takes the boxes",
    "dask": "pass the function to ddnref.interop.dask.map_items, which calls it on the blocks, or pass {}.compute()",
    "tensorflow": "wrap the operation with ddnref.interop.tensorflow.differentiable, or pass {}.numpy()",
}
"""Advice for arrays of libraries that the plain functions do not take."""


def library(**arrays: Array) -> Namespace:
    """Return the namespace that all named arrays share, whatever their dtypes.

    Raises ``TypeError`` if they mix namespaces or devices.
    """
    if all(type(array) is np.ndarray and array.dtype.isnative for array in arrays.values()):
        return _numpy_namespace()  # the common case
    # Refuse lists, scalars and types, some of which array libraries would take for arrays.
    for name, array in arrays.items():
        is_tensor = array_api_compat.is_torch_array(array)  # of whose class torch.compile knows no module
        if not is_tensor and (hint := HINTS.get(type(array).__module__.partition(".")[0])) is not None:
            raise TypeError(f"{name} is a {_kind(array)}: {hint.format(name)}.")
        if isinstance(array, type) or not array_api_compat.is_array_api_obj(array):
            raise TypeError(
                f"{name} is a {_kind(array)}, not an array. "
                f"Pass a NumPy, CuPy, PyTorch, JAX or other array-API array; {_instead(name, array)}."
            )
    # The message names each argument with its type, because several may be wrong.
    try:
        xp = array_api_compat.array_namespace(*arrays.values())
    except TypeError as error:
        kinds = ", ".join(f"{name}: {_kind(array)}" for name, array in arrays.items())
        raise TypeError(
            f"All arrays must come from one library, but got {kinds}. "
            "Nothing is converted silently; move them to one library first, for example with xp.from_dlpack."
        ) from error
    # Arrays of the right library may still be of a kind, or on a device, that would give wrong numbers.
    for name, array in arrays.items():
        _check_plain(name, array)
    _check_devices(arrays)
    return xp


def _instead(name: str, array: Any) -> str:
    """Say what becomes of objects that are not arrays, with the conversion of those that know one."""
    if isinstance(array, type):
        return "a type is none"
    if hasattr(array, "params_vjp") and hasattr(array, "domain_shape"):  # our own, of a layer above this one
        return "operators are taken by ddnref.eigsh, ddnref.linear_solve, the solvers of ddnref.krylov and gram_eigh"
    if hasattr(array, "matvec") or hasattr(array, "toarray"):
        dense = f"{name}.toarray() is one, and " if hasattr(array, "toarray") else ""
        return (
            f"{dense}ddnref.operators.from_scipy({name}) is a LinearOperator, which ddnref.eigsh, ddnref.linear_solve "
            "and the solvers of ddnref.krylov take"
        )
    if hasattr(array, "todense"):
        return f"{name}.todense() is one, and ddnref.operators.from_sparse({name}) is a LinearOperator"
    return "lists and scalars are not converted"


def _kind(array: Array) -> str:
    return f"{type(array).__module__.split('.')[0]}.{type(array).__qualname__}"


def _check_plain(name: str, array: Array) -> None:
    """Raise ``TypeError`` for masked, sparse, byte-swapped and matrix arrays, which would be misread."""
    # NumPy's subclasses would lose their mask, or multiply in another way.
    if isinstance(array, np.ndarray):
        if isinstance(array, np.matrix | np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a {_kind(array)}: its mask, or its way to multiply, would be ignored. Pass a plain array, "
                f"for example np.asarray({name})."
            )
        if not array.dtype.isnative:
            raise TypeError(
                f"{name} has dtype {array.dtype}, in foreign byte order. Convert it first, for example with "
                f'{name}.astype({name}.dtype.newbyteorder("=")).'
            )
    elif array_api_compat.is_torch_array(array) and (array.is_sparse or array.is_sparse_csr):
        raise TypeError(
            f"{name} has layout {array.layout}: ddnref takes dense tensors. Pass {name}.to_dense(), or, where "
            f"operators are taken, ddnref.operators.from_sparse({name})."
        )


def _check_devices(present: dict[str, Array]) -> None:
    devices = {name: array_api_compat.device(array) for name, array in present.items()}
    # Devices of different libraries compare by their names.
    if len({str(device) for device in devices.values() if device is not None}) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise TypeError(
            f"All arrays must be on one device, but got {where}. Move them first with array_api_compat.to_device."
        )
    if "cupy" in sys.modules and array_api_compat.is_cupy_array(next(iter(present.values()))):
        check_current_device(present)


def check_current_device(arrays: dict[str, Array]) -> None:
    """Raise ``TypeError`` for an array that is not on the device at which CuPy computes and makes new arrays."""
    import cupy

    # CuPy computes where its current device says, not where the array lies.
    current = cupy.cuda.Device()
    for name, array in arrays.items():
        if array.device != current:
            raise TypeError(
                f"{name} is on {array.device}, but CuPy's current device is {current}, where it would compute and "
                f"create arrays. Enter the device first: with {name}.device: ..."
            )


_namespaces: dict[type, Namespace] = {}


def namespace_of(x: Array) -> Namespace:
    """Return the namespace of `x`, cached per type because `array_namespace` takes as long as a short product."""
    xp = _namespaces.get(type(x))
    return _namespaces.setdefault(type(x), array_api_compat.array_namespace(x)) if xp is None else xp


def is_complex(x: Array) -> bool:
    """Return whether the dtype is complex, much faster than ``isdtype``, which takes as long as a short product."""
    # The dtypes of NumPy and CuPy have a kind, those of other libraries only a name.
    dtype = x.dtype
    return dtype.kind == "c" if isinstance(dtype, np.dtype) else "complex" in str(dtype)


def conj(x: Array) -> Array:
    """Return the complex conjugate; real arrays come back as they are."""
    return namespace_of(x).conj(x) if is_complex(x) else x


def real(x: Array) -> Array:
    """Return the real part; real arrays come back as they are."""
    return namespace_of(x).real(x) if is_complex(x) else x


def adjoint(x: Array) -> Array:
    """Return the conjugate transpose of the last two axes."""
    return conj(namespace_of(x).matrix_transpose(x))


def as_dtype(x: Array, like: Array) -> Array:
    """Return `x` in the dtype of `like`; the standard does not multiply real by complex arrays."""
    return x if x.dtype == like.dtype else namespace_of(x).astype(x, like.dtype)


def of_kind(x: Array, like: Array) -> Array:
    """Return a cotangent of `like`: the real part of `x` where `like` is real, complex where it is complex."""
    return real(x) if is_complex(x) and not is_complex(like) else as_dtype(x, like)


def real_dtype(xp: Namespace, dtype: Any) -> Any:
    """Return the real dtype of the same precision."""
    return xp.float32 if dtype in (xp.float32, xp.complex64) else xp.float64


def eps(xp: Namespace, dtype: Any) -> float:
    """Return the machine epsilon of a floating dtype as a Python float."""
    return 2.0**-23 if dtype in (xp.float32, xp.complex64) else 2.0**-52


def clip(x: Array, limit: float) -> Array:
    """Limit numbers to ``[-limit, limit]``; array-api-compat's form indexes with a mask, which no graph can hold."""
    xp = namespace_of(x)
    return xp.minimum(xp.maximum(x, full((), -limit, x)), full((), limit, x))


def double(xp: Namespace, x: Array) -> Array:
    """Return `x` in float64 or complex128; unchanged where JAX or the device does not compute in 64 bits."""
    if x.dtype in (xp.float64, xp.complex128):
        return x
    if array_api_compat.is_jax_array(x) and not sys.modules["jax"].config.jax_enable_x64:
        return x
    if str(array_api_compat.device(x)).startswith("mps"):  # a GPU without double precision
        return x
    return xp.astype(x, xp.complex128 if is_complex(x) else xp.float64)


def index_dtype(x: Array) -> Any:
    """Return the dtype of places along an axis of `x`: int32, and int64 where a map of PyTorch needs it (2.6)."""
    xp = namespace_of(x)
    return xp.int64 if array_api_compat.is_torch_array(x) else xp.int32


def named_arrays(**inputs: Any) -> dict[str, Array]:
    """Return the arrays among arguments by their names: an operator has ``name.params[i]``, a list ``name[i]``."""
    found: dict[str, Array] = {}
    for name, value in inputs.items():
        params = getattr(value, "params", None)
        if params is not None:
            found |= {f"{name}.params[{i}]": array for i, array in enumerate(params)}
        elif isinstance(value, (list, tuple)):
            found |= {f"{name}[{i}]": array for i, array in enumerate(value)}
        elif value is not None:
            found[name] = value
    return found


def refuse_recording(function: str, /, **arrays: Array) -> None:
    """Raise ``TypeError`` where PyTorch would record its own derivative of the forward instead of ours."""
    for name, x in arrays.items():
        if is_recorded(x):
            raise TypeError(
                f"{name} given to {function} requires grad, so PyTorch would record its own derivative (NaN or wrong "
                "at repeated eigenvalues) instead of ours. Call "
                f"ddnref.interop.torch.differentiable({public_path(function)}) to train through it, or pass "
                f"{name}.detach() and call {function}_vjp yourself."
            )


def public_path(function: str) -> str:
    """Return the path under which users know a function, such as ``ddnref.nodes.sinkhorn``."""
    # The subject modules are layers above this one, so they are looked up among those that are loaded.
    modules = (name for name in ("ddnref", "ddnref.nodes", "ddnref.curvature") if name in sys.modules)
    return next(
        (f"{name}.{function}" for name in modules if hasattr(sys.modules[name], function)), f"ddnref.{function}"
    )


def requires_grad(x: Array) -> bool:
    """Return whether `x` is a PyTorch tensor that requires grad, to any of the transforms of ``torch.func`` around."""
    if "torch" not in sys.modules or not array_api_compat.is_torch_array(x):
        return False
    torch = sys.modules["torch"]
    if x.requires_grad or not torch._C._are_functorch_transforms_active():
        return bool(x.requires_grad)
    # A compiler answers no for every transform. If one of them differentiates, ask outside of its graph.
    if torch.compiler.is_compiling():
        return _a_transform_differentiates() and bool(torch.compiler.disable(_requires_grad_at_any_level)(x))
    return _requires_grad_at_any_level(x)


def is_compiling() -> bool:
    """Return whether ``torch.compile`` traces the caller."""
    return "torch" in sys.modules and bool(sys.modules["torch"].compiler.is_compiling())


def _requires_grad_at_any_level(x: Array) -> bool:
    """Take off the wrappers of transforms, each of which knows only its own level."""
    functorch = sys.modules["torch"]._C._functorch
    while not x.requires_grad and functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return bool(x.requires_grad)


def _a_transform_differentiates() -> bool:
    """Whether ``grad`` is among the active transforms of ``torch.func``; a compiler can trace this."""
    torch = sys.modules["torch"]
    if not torch._C._are_functorch_transforms_active():
        return False
    innermost = torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter()
    if innermost.key() == torch._C._functorch.TransformType.Grad:
        return True
    with innermost.lower():
        return _a_transform_differentiates()


def is_recorded(x: Array) -> bool:
    """Return whether PyTorch records operations on `x` at present."""
    return requires_grad(x) and bool(sys.modules["torch"].is_grad_enabled())


is_true: Callable[[Array], bool] = truth
"""Read one flag on the host. Nothing else in the package synchronises with a device."""


SHOWN = 5
"""How many items of a batch a message names."""


def first_flagged(flags: Array, shown: int = SHOWN) -> tuple[list[tuple[int, ...]], int]:
    """Return the batch indices of at most `shown` flagged items, and how many are flagged. Reads the host."""
    xp, shape = namespace_of(flags), tuple(flags.shape)
    left = xp.astype(xp.reshape(flags, (-1,)), xp.int32)
    count, places = int(xp.sum(left)), []
    numbers = xp.arange(left.shape[0], dtype=xp.int32, device=array_api_compat.device(flags))
    # The first flagged item, the next one, and so on: no more reads than names.
    for _ in range(min(count, shown)):
        first = int(xp.argmax(left))
        places.append(tuple(map(int, np.unravel_index(first, shape))))
        left = xp.where(numbers == first, xp.zeros_like(left), left)
    return places, count


def listed(places: list[tuple[int, ...]]) -> str:
    """Write batch indices for a message; those of a single batch axis are plain numbers."""
    return ", ".join(str(i[0]) if len(i) == 1 else str(i) for i in places)


def among(bad: Array) -> str:
    """Say for a message which items of a batch are flagged; nothing where there is no batch. Reads the host."""
    places, count = first_flagged(bad) if bad.ndim else ([], 0)
    if count == 0:
        return ""
    size = " x ".join(map(str, bad.shape))
    more = f", ..., {count} in all," if count > len(places) else ""
    return f" (item{'s' if count > 1 else ''} {listed(places)}{more} of {size})"


def refuse_non_finite(name: str, x: Array) -> None:
    """Raise `NonFiniteError` if `x`, matrices ``(..., m, n)``, contains NaN or infinity; reads one flag."""
    xp = array_api_compat.array_namespace(x)
    # One flag for the whole batch, so that a device is waited for once.
    if is_true(xp.any(~xp.isfinite(x))):
        bad = xp.any(~xp.isfinite(x), axis=(-2, -1)) if x.ndim > 1 else xp.any(~xp.isfinite(x))
        raise NonFiniteError(
            f"{name} contains NaN or infinity{among(bad)}. The most likely cause is a diverged step or a division by "
            "zero before this call. Pass check_finite=False to get NaN for these items of the batch and the right "
            "results for the others."
        )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a tuple unchanged, anything else as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)


def is_number(c: Any) -> bool:
    """Return whether a coefficient is a plain Python number: a constant, whereas an array is a parameter."""
    return isinstance(c, (int, float, complex)) and not isinstance(c, np.generic)


def with_scalars_as_arrays(c: Array) -> Array:
    """Return a NumPy scalar, which functions return for arrays without axes, as an array; all else as it is."""
    return np.asarray(c) if isinstance(c, np.generic) else c


def quiet() -> np.errstate:
    """Silence the floating-point warnings of NumPy and array-api-strict: statuses report what is not finite."""
    return np.errstate(all="ignore")


def full(shape: tuple[int, ...], value: float, like: Array) -> Array:
    """Return an array filled with `value`, of the dtype and on the device of `like`."""
    if type(like) is np.ndarray:  # without looking for its namespace, a third of the time
        return np.full(shape, value, like.dtype)
    xp = array_api_compat.array_namespace(like)
    return xp.full(shape, value, dtype=like.dtype, device=array_api_compat.device(like))


def power_of_two_below(size: Array) -> Array:
    """Return the power of two below each number, and 1 for zero. Dividing by it is exact."""
    xp = array_api_compat.array_namespace(size)
    return full((), 2.0, size) ** xp.floor(xp.log2(xp.where(size > 0, size, xp.ones_like(size))))


def own(x: Array) -> Array:
    """Return a copy that may be overwritten and does not change with `x`."""
    if array_api_compat.is_torch_array(x):
        return x.clone()  # asarray warns of a tensor that requires grad
    return namespace_of(x).asarray(x, copy=True)


def keep(x: Array) -> Array:
    """Return `x` as it is now, whatever its owner writes to it later: a copy, unless it is read from a file."""
    if array_api_compat.is_torch_array(x):
        return x.clone()  # a copy by asarray would hide that the tensor requires grad
    if isinstance(x, np.memmap) and x.mode == "r":
        return x  # mapped read-only: a copy would load the file
    return own(x)


def with_axes(x: Array, count: int) -> Array:
    """Append `count` axes of length one to numbers ``(...)``, so that they broadcast against arrays per item."""
    if count == 1:
        return x[..., None]  # the quickest form, for the Krylov methods, which need it in every step
    return namespace_of(x).reshape(x, (*x.shape, *(1,) * count)) if count else x


def nan_where(bad: Array, x: Array) -> Array:
    """Return `x` with NaN wherever `bad` (broadcast against it) is set, without reading anything on the host."""
    if type(x) is np.ndarray:  # as in `full`
        return np.where(bad, x.dtype.type(np.nan), x)
    return array_api_compat.array_namespace(x).where(bad, full((), float("nan"), x), x)


def put_nan(x: Array, bad: Array) -> Array:
    """Do what `nan_where` does to an `x` that nothing else holds: NumPy writes to it, and only where it has to."""
    if type(x) is not np.ndarray:
        return nan_where(bad, x)
    if bad.any():
        np.copyto(x, np.nan, where=bad)
    return x
