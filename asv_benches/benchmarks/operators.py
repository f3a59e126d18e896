"""Products with linear operators: time, memory, ratio to another form, error of the dot-product test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.fft
import scipy.ndimage

import ddnref

from ._common import BACKENDS, Backend, Call, backend, interleaved, prepared

SHIFT = 0.1


def blurred(n: int, dtype: str, convert: Callable[[Any], Any] = np.asarray) -> ddnref.operators.LinearOperator:
    """Blur and ridge, ``KᴴK + ρ``, on n×n points."""
    k = np.random.default_rng(0).random((9, 9))
    k, rho = convert((k / k.sum()).astype(dtype)), convert(np.asarray(SHIFT, dtype=dtype))
    return ddnref.operators.normal(ddnref.operators.convolution(k, (n, n)), rho)


def image(n: int, dtype: str, count: int = 0) -> np.ndarray:
    shape = (count, n, n) if count else (n, n)
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def calls(on: Backend, n: int, dtype: str) -> tuple[Call, Call]:
    """A product with the prepared operator, and the gradient to kernel and ridge."""
    operator = blurred(n, dtype, on.array)
    fast, x = operator.prepared(), on.array(image(n, dtype))
    return (
        prepared(on, fast.apply, fast.params, x),
        prepared(on, operator.params_vjp, operator.params, x, x),
    )


class Operators:
    """Time of a product and of the gradient to the parameters on every backend."""

    params = (BACKENDS, (32, 256), ("float64", "float32"))
    param_names = ("backend", "n", "dtype")

    def setup(self, name: str, n: int, dtype: str) -> None:
        self.product, self.vjp = calls(backend(name), n, dtype)
        self.product()
        self.vjp()

    def time_product(self, *_: object) -> None:
        self.product()

    def time_params_vjp(self, *_: object) -> None:
        self.vjp()


class OperatorsMemory:
    """Peak resident memory of the process; what a call adds is its figure less that of `peakmem_setup`."""

    params = (("numpy", "torch"), (64, 1024))
    param_names = ("backend", "n")

    def setup(self, name: str, n: int) -> None:
        self.product, self.vjp = calls(backend(name), n, "float64")

    def peakmem_setup(self, *_: object) -> None:
        """The baseline: nothing."""

    def peakmem_product(self, *_: object) -> None:
        self.product()

    def peakmem_params_vjp(self, *_: object) -> None:
        self.vjp()


# --- ratios, NumPy ----------------------------------------------------------------------------------------------


def blur_by_hand(n: int, dtype: str) -> tuple[Call, Call]:
    """One pair of SciPy's two-dimensional transforms, the spectrum computed before, the ridge added."""
    operator, x = blurred(n, dtype), image(n, dtype)
    fast = operator.prepared()
    embedded = np.zeros((n, n), dtype=dtype)
    embedded[:9, :9] = operator.params[0]
    power = np.abs(scipy.fft.rfft2(embedded)) ** 2
    rho = operator.params[1]
    return (
        lambda: fast.apply(fast.params, x),
        lambda: scipy.fft.irfft2(scipy.fft.rfft2(x) * power, s=(n, n)) + rho * x,
    )


def blur_at_once(n: int, dtype: str) -> tuple[Call, Call]:
    """64 images in one product, and one by one."""
    fast, x = blurred(n // 2, dtype).prepared(), image(n // 2, dtype, 64)
    return lambda: fast.apply(fast.params, x), lambda: [fast.apply(fast.params, z) for z in x]


def dense_at_once(n: int, dtype: str) -> tuple[Call, Call]:
    """64 right-hand sides of a 4n×4n matrix in one product, and one by one."""
    a = ddnref.operators.dense(np.random.default_rng(0).standard_normal((4 * n, 4 * n)).astype(dtype))
    x = np.random.default_rng(1).standard_normal((64, 4 * n)).astype(dtype)
    return lambda: a.apply(a.params, x), lambda: [a.apply(a.params, z) for z in x]


def laplacian(n: int, dtype: str) -> tuple[Call, Call]:
    """The normal operator of differences in its own form, and by the differences and their adjoint."""
    d, x = ddnref.operators.difference((n, n)), image(n, dtype)
    fast = ddnref.operators.normal(d).prepared()
    return lambda: fast.apply(fast.params, x), lambda: d.adjoint((), d.apply((), x))


def graph(n: int, dtype: str) -> tuple[Call, Call]:
    """The Laplacian of the graph of n×n points, prepared, and SciPy's product with the stored matrix."""
    i = np.arange(n * n).reshape(n, n)
    ends = np.concatenate([i[:, :-1].ravel(), i[:-1].ravel()]), np.concatenate([i[:, 1:].ravel(), i[1:].ravel()])
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(ends[0])).astype(dtype)
    operator, x = ddnref.operators.laplacian(ends, weights, n * n), image(n, dtype).ravel()
    fast, matrix = operator.prepared(), operator.sparse(operator.params)  # type: ignore[misc]
    return lambda: fast.apply(fast.params, x), lambda: matrix @ x


def stored(n: int, dtype: str) -> tuple[Call, Call]:
    """A sparse matrix of 5 n² entries in random order, prepared, and SciPy's product."""
    rng = np.random.default_rng(0)
    values, rows, columns = rng.standard_normal(5 * n * n).astype(dtype), *rng.integers(0, n * n, (2, 5 * n * n))
    operator, x = ddnref.operators.coo(values, rows, columns, (n * n, n * n)), image(n, dtype).ravel()
    fast, matrix = operator.prepared(), operator.sparse(operator.params)  # type: ignore[misc]
    return lambda: fast.apply(fast.params, x), lambda: matrix @ x


def reflected(n: int, dtype: str) -> tuple[Call, Call]:
    """A blur with a reflecting boundary by Fourier transforms, and SciPy's sum over a kernel of 9×9 points."""
    k, x = np.random.default_rng(0).random((9, 9)).astype(dtype), image(n, dtype)
    fast = ddnref.operators.convolution(k, (n, n), boundary="reflect").prepared()
    return lambda: fast.apply(fast.params, x), lambda: scipy.ndimage.convolve(x, k, mode="reflect")


FORMS = blur_by_hand, blur_at_once, dense_at_once, laplacian, graph, stored, reflected
PAIRS = {form.__name__: form for form in FORMS}


class OperatorsLimit:
    """Time over that of the other form, interleaved in one process."""

    params = (tuple(PAIRS), (32, 256), ("float64", "float32"))
    param_names = ("form", "n", "dtype")
    unit = "ratio"

    def setup(self, form: str, n: int, dtype: str) -> None:
        self.calls = PAIRS[form](n, dtype)

    def track_ratio(self, *_: object) -> float:
        return interleaved(*self.calls).median


class OperatorsErrors:
    """The dot-product test at a size at which rounding adds up."""

    unit = "relative error"

    def track_dot_product(self) -> float:
        blur = ddnref.operators.convolution(np.random.default_rng(0).standard_normal((9, 9)), (256, 256))
        x, y = image(256, "float64", 2)
        a_x, a_y = blur(x), blur.adjoint(blur.params, y)
        return float(abs(np.sum(a_x * y) - np.sum(x * a_y)) / (np.linalg.norm(a_x) * np.linalg.norm(y)))

    track_dot_product.version = "06d5668b5f2c5e60cee9bed56c462fce8f9e6dfb083608ddaa2472cb5379394d"  # type: ignore[attr-defined]
