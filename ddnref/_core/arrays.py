"""Namespaces, devices and dtypes of arrays, and the few operations on them that every layer needs."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

from ddnref.errors import NonFiniteError

Array: TypeAlias = Any
"""Any array that follows the Python array API standard (NumPy, CuPy, PyTorch, JAX, array-api-strict, ...)."""

Namespace: TypeAlias = Any


def namespace(**arrays: Array | None) -> Namespace:
    """Return the namespace that all named arrays share, skipping ``None`` entries.

    Raises
    ------
    TypeError
        If there is no array, or the arrays mix namespaces or devices, or one is neither real nor complex
        floating (float16 included: LAPACK has no half precision).
    """
    present = {name: array for name, array in arrays.items() if array is not None}
    if not present:
        raise TypeError(f"{' and '.join(arrays)} must be given: there is nothing to compute from None.")
    if all(type(a) is np.ndarray and a.dtype.char in "fdFD" and a.dtype.isnative for a in present.values()):
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


def library(**arrays: Array) -> Namespace:
    """Return the namespace that all named arrays share, whatever their dtypes.

    Raises ``TypeError`` if they mix namespaces or devices.
    """
    xp = _shared_namespace(arrays)
    for name, array in arrays.items():
        _check_plain(name, array)
    _check_devices(arrays)
    return xp


def _kind(array: Array) -> str:
    return f"{type(array).__module__.split('.')[0]}.{type(array).__qualname__}"


def _shared_namespace(present: dict[str, Array]) -> Namespace:
    for name, array in present.items():
        if isinstance(array, type) or not array_api_compat.is_array_api_obj(array):
            raise TypeError(
                f"{name} is a {_kind(array)}, not an array. "
                "Pass a NumPy, CuPy, PyTorch, JAX or other array-API array; lists and scalars are not converted."
            )
    # The message names each argument with its type, because several may be wrong.
    try:
        return array_api_compat.array_namespace(*present.values())
    except TypeError as error:
        kinds = ", ".join(f"{name}: {_kind(array)}" for name, array in present.items())
        raise TypeError(
            f"All arrays must come from one library, but got {kinds}. "
            "Nothing is converted silently; move them to one library first, for example with xp.from_dlpack."
        ) from error


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
        raise TypeError(f"{name} has layout {array.layout}: ddnref takes dense tensors. Pass {name}.to_dense().")


def _check_devices(present: dict[str, Array]) -> None:
    try:
        devices = {name: array_api_compat.device(array) for name, array in present.items()}
    except AttributeError as error:  # autograd's boxes look like arrays but have no device
        kinds = ", ".join(f"{name}: {_kind(array)}" for name, array in present.items())
        raise TypeError(
            f"Expected arrays, but got {kinds}. Inside autograd, wrap the operation with ddnref.interop.autograd"
            ".differentiable; an operator is made of plain arrays, then operator.with_params(...) takes the boxes."
        ) from error
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


def real_dtype(xp: Namespace, dtype: Any) -> Any:
    """Return the real dtype of the same precision."""
    return xp.float32 if dtype in (xp.float32, xp.complex64) else xp.float64


def eps(xp: Namespace, dtype: Any) -> float:
    """Return the machine epsilon of a floating dtype as a Python float."""
    return 2.0**-23 if dtype in (xp.float32, xp.complex64) else 2.0**-52


def double(xp: Namespace, x: Array) -> Array:
    """Return `x` in float64, or unchanged where JAX has not been told to compute in 64 bits."""
    if x.dtype == xp.float64 or (array_api_compat.is_jax_array(x) and not sys.modules["jax"].config.jax_enable_x64):
        return x
    return xp.astype(x, xp.float64)


def refuse_recording(function: str, x: Array) -> None:
    """Raise ``TypeError`` where PyTorch would record its own derivative of the forward instead of ours."""
    if is_recorded(x):
        raise TypeError(
            f"The tensor given to {function} requires grad, so PyTorch would record its own derivative "
            "(NaN or wrong at repeated eigenvalues) instead of ours. Call "
            f"ddnref.interop.torch.differentiable(ddnref.{function}) to train through it, or pass x.detach() "
            f"and call {function}_vjp yourself."
        )


def requires_grad(x: Array) -> bool:
    """Return whether `x` is a PyTorch tensor that requires grad."""
    return "torch" in sys.modules and array_api_compat.is_torch_array(x) and bool(x.requires_grad)


def is_recorded(x: Array) -> bool:
    """Return whether PyTorch records operations on `x` at present."""
    return requires_grad(x) and bool(sys.modules["torch"].is_grad_enabled())


def is_true(flag: Array) -> bool:
    """Read one flag on the host. Nothing else in the package synchronises with a device."""
    return bool(flag)


def refuse_non_finite(name: str, x: Array) -> None:
    """Raise `NonFiniteError` if `x` contains NaN or infinity; reads one flag."""
    xp = array_api_compat.array_namespace(x)
    if is_true(xp.any(~xp.isfinite(x))):
        raise NonFiniteError(
            f"{name} contains NaN or infinity. The most likely cause is a diverged step or a division by zero before "
            "this call. Pass check_finite=False to get NaN for these items of the batch and the right results for the "
            "others."
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
    xp = array_api_compat.array_namespace(like)
    return xp.full(shape, value, dtype=like.dtype, device=array_api_compat.device(like))


def power_of_two_below(size: Array) -> Array:
    """Return the power of two below each number, and 1 for zero. Dividing by it is exact."""
    xp = array_api_compat.array_namespace(size)
    return full((), 2.0, size) ** xp.floor(xp.log2(xp.where(size > 0, size, xp.ones_like(size))))


def own(x: Array) -> Array:
    """Return a copy that may be overwritten and does not change with `x`."""
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
    return array_api_compat.array_namespace(x).where(bad, full((), float("nan"), x), x)
