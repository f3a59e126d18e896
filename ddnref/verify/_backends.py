"""Array libraries by name: conversion from NumPy and back, compilation, and which extra installs each."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddnref._core.arrays import Array

NAMES = ("numpy", "cupy", "torch", "jax", "array-api-strict")
STRICT_FLAGS = {"boolean_indexing": False, "data_dependent_shapes": False}  # as compilers and GPUs need it


class Backend(NamedTuple):
    """One array library, ready to compute in double precision."""

    name: str
    version: str
    convert: Callable[[NDArray[Any]], Array]
    """Converts an array from NumPy and keeps its dtype."""
    to_numpy: Callable[[Array], NDArray[Any]]
    bind: Callable[..., Callable[..., Any]] = partial
    """``bind(function, **options)`` returns a function of arrays only, compiled if the library compiles."""
    compiles: bool = False
    while_loop: Any = None
    """The library's own loop, if compiled iterations need one."""

    # A library that compiles would do so for every operation of a check, and every shape. There the checks hold arrays
    # of NumPy, and only the functions of a rule run on the library.

    def hold(self, values: NDArray[Any]) -> Array:
        """Make an array for the arithmetic of checks."""
        return values if self.compiles else self.convert(values)

    def bound(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Bind the options of a function, for arrays that checks hold."""
        return self.held(self.bind(function, **options))

    def held(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` for arrays that checks hold."""
        return self._lifted(function) if self.compiles else function

    def _lifted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def copied(result: Any) -> Any:
            if isinstance(result, tuple):
                return tuple(map(copied, result))
            if type(result).__module__ == "numpy":
                raise TypeError(f"a function of {self.name} arrays returned one of NumPy")
            return self.to_numpy(result)

        return lambda *arrays: copied(function(*(None if a is None else self.convert(np.asarray(a)) for a in arrays)))


class MissingDependencyError(Exception):
    """An optional dependency is not installed or not usable; the message says how to install it."""


def require(*modules: str, extra: str, what: str) -> None:
    """Raise `MissingDependencyError`, naming the extra and the pip command, unless all modules can be found."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        extras = " or ".join(f'pip install "ddnref[{name}]"' for name in extra.split("|"))
        raise MissingDependencyError(
            f"{what} needs {' and '.join(missing)}, which is not installed. "
            f"Install the extra {extra.replace('|', ' or ')}: {extras}"
        )


@contextmanager
def backend(name: str) -> Iterator[Backend]:
    """Load the array library `name`. The strict flags of array-api-strict hold only inside the ``with`` block.

    Raises `MissingDependencyError` if the library is not installed, or if it is CuPy and there is no GPU.
    """
    opened, inside = _LOADERS[name]()
    with inside:
        yield opened


Loaded = tuple[Backend, AbstractContextManager[object]]


def _numpy() -> Loaded:
    return Backend("numpy", np.__version__, np.asarray, np.asarray), nullcontext()


def _cupy() -> Loaded:
    cupy = _load("cupy", "cuda12|cuda13", "The backend cupy")
    try:  # CuPy can be imported without a GPU; the first call to the driver fails
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise MissingDependencyError(
            f"The backend cupy is installed but finds no usable GPU ({error}). It needs an NVIDIA GPU and a driver "
            "for the CUDA version of the wheel: ddnref[cuda12] or ddnref[cuda13]."
        ) from error
    try:  # since CuPy 14 wheels have no CUDA libraries, and load those of the system at the first call
        _ = cupy.cuda.cublas, cupy.cuda.cusolver
    except ImportError as error:
        raise MissingDependencyError(
            f"The backend cupy finds a GPU but not the libraries of CUDA ({error}). Install a CUDA toolkit, or its "
            'libraries by pip install "cupy-cuda12x[ctk]" or "cupy-cuda13x[ctk]".'
        ) from error
    return Backend("cupy", cupy.__version__, cupy.asarray, cupy.asnumpy), nullcontext()


def _torch() -> Loaded:
    torch = _load("torch", "torch", "The backend torch")

    def to_numpy(array: Array) -> NDArray[Any]:
        # NumPy cannot read PyTorch's lazy conjugates and negatives.
        return np.asarray(array.detach().resolve_conj().resolve_neg())

    return Backend("torch", torch.__version__, torch.tensor, to_numpy), nullcontext()


def _jax() -> Loaded:
    jax = _load("jax", "jax", "The backend jax")
    jax.config.update("jax_enable_x64", True)

    def bind(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        # Options are Python values and functions: static, so that each combination is compiled once.
        return partial(jax.jit(function, static_argnames=tuple(options)), **options)

    # JAX compiles a function once more for arrays that are not bound to a device, and once more for each precision of
    # products. Rules make theirs on the device of their inputs and in full precision: so do the checks around them.
    convert = partial(jax.numpy.asarray, device=jax.devices()[0])
    loaded = Backend("jax", jax.__version__, convert, np.asarray, bind, True, jax.lax.while_loop)
    return loaded, jax.default_matmul_precision("highest")


def _strict() -> Loaded:
    strict = _load("array_api_strict", "test", "The backend array-api-strict")
    flags = strict.ArrayAPIStrictFlags(**STRICT_FLAGS)
    return Backend("array-api-strict", strict.__version__, strict.asarray, np.asarray), flags


_LOADERS: dict[str, Callable[[], Loaded]] = dict(zip(NAMES, (_numpy, _cupy, _torch, _jax, _strict), strict=True))


def _load(module: str, extra: str, what: str) -> Any:
    require(module, extra=extra, what=what)
    return importlib.import_module(module)
