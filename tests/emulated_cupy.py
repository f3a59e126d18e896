"""CuPy's differences from NumPy, emulated on the CPU, so that the code for CuPy runs where there is no GPU.

``pytest --backend emulated-cupy`` puts this in the place of the package; `array_api_compat.cupy`, the real one, is
loaded over it. What is emulated, and what a test can therefore see:

- arrays of NumPy are refused next to CuPy's, in ``numpy`` functions too; NumPy scalars are refused as well
- ``linalg.solve`` does not broadcast; the batched ``eigh`` fails above a million matrices
- LAPACK's status is not looked at: nothing raises ``LinAlgError``, a singular matrix gives infinity or NaN
- cuBLAS and cuSOLVER take addresses, in LAPACK's order, with pivots counted from 1
- arrays belong to a device, and new ones are made on the current device
- reads on the host are counted (`READS`)

It is no GPU: neither streams nor speed nor the rounding of other kernels can be seen here.
"""

import ctypes
import math
import sys
import time
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import scipy.fft
import scipy.linalg
import scipy.special

READS = []
"""The name of each conversion of a value for the host since the list was last cleared."""
SCALARS = (bool, int, float, complex)


class Device:
    current = 0

    def __init__(self, device=None):
        self.id = Device.current if device is None else int(getattr(device, "id", device))

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def __enter__(self):
        self.before, Device.current = Device.current, self.id
        return self

    def __exit__(self, *_):
        Device.current = self.before


class Memory:
    def __init__(self, ptr):
        self.ptr = ptr


def unwrap(x):
    if isinstance(x, ndarray):
        return x.on_host
    if isinstance(x, (np.ndarray, np.generic)):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, (list, tuple)):
        return type(x)(map(unwrap, x))
    return x


def wrap(y):
    if isinstance(y, (np.ndarray, np.generic)):
        return ndarray(y)
    if isinstance(y, tuple):
        return tuple(map(wrap, y))
    return list(map(wrap, y)) if isinstance(y, list) else y


def wrapped(function):
    @wraps(function)
    def call(*args, **options):
        with np.errstate(all="ignore"):
            return wrap(function(*unwrap(args), **{name: unwrap(value) for name, value in options.items()}))

    return call


class ndarray:
    __array_ufunc__ = None
    __hash__ = None

    def __init__(self, values):
        self.on_host = np.asarray(values)
        self.device = Device()

    @property
    def data(self):
        return Memory(self.on_host.ctypes.data)

    def get(self):
        READS.append("get")
        return self.on_host.copy()

    def item(self):
        READS.append("item")
        return self.on_host.item()

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __getitem__(self, key):
        if any(isinstance(k, ndarray) and k.dtype.kind == "b" for k in (key if isinstance(key, tuple) else (key,))):
            READS.append("mask")
        return wrap(self.on_host[unwrap(key)])

    def __setitem__(self, key, value):
        if not isinstance(value, (ndarray, *SCALARS)):
            raise TypeError(f"Unsupported type {type(value)}")
        self.on_host[unwrap(key)] = unwrap(value)

    def __len__(self):
        return len(self.on_host)

    def __iter__(self):
        return (wrap(np.asarray(item)) for item in self.on_host)

    def __repr__(self):
        return f"emulated_{self.on_host!r}"

    def __dlpack__(self, *, stream=None, **options):
        return self.on_host.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.on_host.__dlpack_device__()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.on_host, name)
        if callable(value):
            return wrapped(value)
        return wrap(value)


def _operators():
    arithmetic = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
    binary = (*arithmetic, "and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne")

    def two(name):
        def call(self, other):
            if not isinstance(other, (ndarray, *SCALARS)) or isinstance(other, np.generic):
                return NotImplemented
            with np.errstate(all="ignore"):
                return wrap(np.asarray(getattr(self.on_host, name)(unwrap(other))))

        return call

    def in_place(name):
        def call(self, other):
            if not isinstance(other, (ndarray, *SCALARS)) or isinstance(other, np.generic):
                return NotImplemented
            with np.errstate(all="ignore"):
                self.on_host = getattr(self.on_host, name)(unwrap(other))
            return self

        return call

    def one(name):
        return lambda self: wrap(np.asarray(getattr(self.on_host, name)()))

    def read(name):
        def call(self):
            READS.append(name)
            return getattr(self.on_host, name)()

        return call

    for name in binary:
        for prefix in ("", "r"):
            if hasattr(np.ndarray, f"__{prefix}{name}__"):
                setattr(ndarray, f"__{prefix}{name}__", two(f"__{prefix}{name}__"))
        if hasattr(np.ndarray, f"__i{name}__"):
            setattr(ndarray, f"__i{name}__", in_place(f"__i{name}__"))
    for name in ("__neg__", "__pos__", "__abs__", "__invert__"):
        setattr(ndarray, name, one(name))
    for name in ("__bool__", "__int__", "__float__", "__complex__", "__index__"):
        setattr(ndarray, name, read(name))


_operators()


# --- linear algebra, with a status that nobody reads -------------------------------------------------------------


def _items(function, count):
    """`function` of matrices for a batch, item by item; NaN where LAPACK fails."""

    def call(a):
        batch = a.shape[:-2]
        flat = a.reshape(math.prod(batch), *a.shape[-2:])
        found = []
        for item in flat:
            try:
                result = function(item)
            except np.linalg.LinAlgError:
                result = tuple(np.full_like(z, np.nan) for z in function(np.eye(*item.shape, dtype=item.dtype)))
            found.append(result)
        if not found:
            found = [tuple(z for z in function(np.eye(*a.shape[-2:], dtype=a.dtype)))] if 0 not in a.shape[-2:] else []
            if not found:
                return function(a)
            return tuple(np.zeros((*batch, *z.shape), z.dtype) for z in found[0])
        return tuple(np.stack(z).reshape(*batch, *z[0].shape) for z in zip(*found, strict=True))

    @wraps(function)
    def checked(a):
        if a.ndim > 2 and math.prod(a.shape[:-2]) > 10**6:
            raise RuntimeError("CUSOLVER_STATUS_INVALID_VALUE")
        result = call(a)
        return result if count > 1 else result[0]

    return wrapped(checked)


def solve(a, b):
    if b.ndim > 1 and a.shape[:-1] != b.shape[:-1]:
        raise ValueError("a must have (..., M, M) shape and b must have (..., M, K) for multidimensional b")
    raise AssertionError("the package solves through lu_factor, which tells singular items")


def _lu_factor(a_t, dtype):
    """Transposed in, transposed out; pivots counted from 1; a status for each item."""
    assert a_t.dtype == dtype
    lu_t = np.array(a_t.on_host, order="C")
    batch, n = lu_t.shape[:-2], lu_t.shape[-1]
    pivots, status = np.empty((*batch, n), np.int32), np.empty(batch, np.int32)
    getrf = scipy.linalg.get_lapack_funcs("getrf", (lu_t,))
    for item in np.ndindex(batch):
        lu, swaps, status[item] = getrf(lu_t[item].T)
        lu_t[item], pivots[item] = lu.T, swaps + 1
    return wrap(lu_t), wrap(pivots), wrap(status)


def _at(address, count, dtype):
    """Memory at an address, to be read and written, as a kernel does."""
    buffer = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype=dtype)


def _getrs(dtype):
    def getrs(handle, trans, n, k, a, lda, pivots, b, ldb, info):
        lu, swaps = _at(a, n * lda, dtype).reshape(n, lda).T[:n], _at(pivots, n, np.int32) - 1
        x = _at(b, k * ldb, dtype).reshape(k, ldb)
        x[:, :n] = scipy.linalg.lu_solve((lu, swaps), x[:, :n].T, trans=trans, check_finite=False).T
        _at(info, 1, np.int32)[:] = 0

    return getrs


def _getrs_batched(dtype):
    one = _getrs(dtype)

    def getrs(handle, trans, n, k, a_array, lda, pivots, b_array, ldb, info, items):
        a, b = _at(a_array, items, np.uint64), _at(b_array, items, np.uint64)
        for i in range(items):
            one(handle, trans, n, k, int(a[i]), lda, pivots + 4 * n * i, int(b[i]), ldb, info)

    return getrs


def solve_triangular(a, b, trans=0, lower=False, unit_diagonal=False, overwrite_b=False, check_finite=False):
    assert a.shape[:-1] == b.shape[:-1]
    assert trans == 0
    x = np.empty_like(b)
    for item in np.ndindex(a.shape[:-2]):
        trtrs = scipy.linalg.get_blas_funcs("trsm", (a, b))
        x[item] = trtrs(1.0, a[item], b[item], lower=lower, diag=unit_diagonal)
    return x


# --- modules -----------------------------------------------------------------------------------------------------


def _asarray(obj, dtype=None, order=None, blocking=False):  # arrays of the host are taken here, and here alone
    if isinstance(obj, ndarray) and dtype in (None, obj.dtype):
        return obj
    return ndarray(np.array(getattr(obj, "on_host", obj), dtype=dtype, order=order))


def _array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, blocking=False):
    return ndarray(np.array(getattr(obj, "on_host", obj), dtype=dtype, order=order)) if copy else _asarray(obj, dtype)


def _from_dlpack(x, *, device=None, copy=None):
    return ndarray(np.from_dlpack(x))


def _transform(function):
    def call(a, *args, **options):
        if 0 in a.shape:
            raise ValueError("Invalid number of FFT data points (0) specified.")
        return function(a, *args, **options)

    return wrapped(wraps(function)(call))


def _scatter_add(a, slices, value):
    if a.dtype.kind not in "fiu":
        raise TypeError("cupyx.scatter_add only supports real numbers here.")
    np.add.at(a.on_host, unwrap(slices), unwrap(value))


def _module(name, **contents):
    module = ModuleType(name)
    module.__path__, module.__spec__ = [], ModuleSpec(name, None)
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _public(module):
    """Functions of a NumPy module for emulated arrays; everything else as it is."""
    names = (name for name in dir(module) if not name.startswith("_"))
    found = {name: getattr(module, name) for name in names}
    return {
        name: wrapped(value) if callable(value) and not isinstance(value, type) else value
        for name, value in found.items()
        if not isinstance(value, ModuleType)
    }


class Stream:
    def __init__(self, ptr=0):
        self.ptr = ptr

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @classmethod
    def from_external(cls, stream):
        version, ptr = stream.__cuda_stream__()
        assert version == 0
        return cls(ptr)

    def synchronize(self):
        READS.append("synchronize")


class Event:
    """An event behind work that ends only when the host waits for it, by reading a value."""

    def record(self, stream=None):
        self.before = len(READS)

    @property
    def done(self):
        return len(READS) > self.before


class MemoryHook:
    """Hears of arrays that `full` and its relatives make: enough to see whether a hook adds up."""

    active = None

    def __enter__(self):
        MemoryHook.active = self
        return self

    def __exit__(self, *_):
        MemoryHook.active = None


def _empty(shape, dtype=float, order="C"):
    made = ndarray(np.zeros(shape, dtype=dtype, order=order))
    if MemoryHook.active is not None:
        size = made.nbytes
        MemoryHook.active.malloc_postprocess(device_id=0, size=size, mem_size=size, mem_ptr=0, pmem_id=0)
    return made


def _benchmark(call, args=(), kwargs=None, n_repeat=10000, *, name=None, n_warmup=10, max_duration=math.inf):
    times = []
    while len(times) < min(n_repeat, 3):
        start = time.perf_counter()
        call(*args)
        times.append(time.perf_counter() - start)
    return SimpleNamespace(gpu_times=np.asarray([times]))


def install():
    """Put the emulation in the place of CuPy, for the rest of the process."""
    if "cupy" in sys.modules and not hasattr(sys.modules["cupy"], "EMULATED"):
        raise RuntimeError("CuPy itself has been imported already.")
    numbers = {"f": np.float32, "d": np.float64, "F": np.complex64, "D": np.complex128}
    kinds = dict(zip("sdcz", numbers.values(), strict=True))
    _module("cupy", EMULATED=READS, **_public(np))
    vars(sys.modules["cupy"]).update(
        ndarray=ndarray, asarray=_asarray, array=_array, from_dlpack=_from_dlpack, abs=wrapped(np.abs),
        max=wrapped(np.max), min=wrapped(np.min), round=wrapped(np.round), bool_=np.bool_, empty=_empty,
        isdtype=np.isdtype, asnumpy=lambda x: x.get() if isinstance(x, ndarray) else np.asarray(x),
        __version__="14.emulated",
    )  # fmt: skip
    _module("cupy.cuda", Device=Device, Stream=Stream, get_current_stream=Stream, MemoryHook=MemoryHook, Event=Event)
    properties = {"name": b"an emulation", "major": 0, "minor": 0, "totalGlobalMem": 2**30}
    _module("cupy.cuda.runtime", getDeviceCount=lambda: 1, CUDARuntimeError=RuntimeError,
            getDeviceProperties=lambda _: properties, runtimeGetVersion=lambda: 0,
            driverGetVersion=lambda: 0)  # fmt: skip
    _module("cupy.cuda.device", Device=Device, get_cublas_handle=lambda: 0, get_cusolver_handle=lambda: 0)
    _module("cupy.cuda.cublas", CUBLAS_OP_N=0, CUBLAS_OP_T=1, CUBLAS_OP_C=2,
            **{f"{kind}getrsBatched": _getrs_batched(dtype) for kind, dtype in kinds.items()})  # fmt: skip
    _module("cupy.cuda.cusolver", **{f"{kind}getrs": _getrs(dtype) for kind, dtype in kinds.items()})
    linalg = _module("cupy.linalg", **_public(np.linalg))
    vars(linalg).update(
        eigh=_items(lambda a: tuple(np.linalg.eigh(a)), 2), cholesky=_items(lambda a: (np.linalg.cholesky(a),), 1),
        eigvalsh=_items(lambda a: (np.linalg.eigvalsh(a),), 1),
        solve=wrapped(solve), pinv=lambda a, rcond: ndarray(np.linalg.pinv(a.on_host, rcond)),  # of finfo's type
    )  # fmt: skip
    _module("cupy.linalg._decomposition", _lu_factor=_lu_factor)
    _module("cupy.fft", **{name: _transform(getattr(np.fft, name)) for name in np.fft.__all__})
    _module("cupyx", scatter_add=_scatter_add)
    _module("cupyx.profiler", benchmark=_benchmark)
    _module("cupyx.scipy")
    _module("cupyx.scipy.linalg", solve_triangular=wrapped(solve_triangular))
    _module("cupyx.scipy.special", erf=wrapped(scipy.special.erf))
