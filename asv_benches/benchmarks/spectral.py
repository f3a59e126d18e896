"""Functions of a symmetric matrix and their VJPs, from the table of rules: time, ratio to the limit, errors."""

from __future__ import annotations

from typing import Any

import numpy as np

import ddnref
from ddnref._rules import binding as _rule
from ddnref._rules import table as _rules

from . import _accuracy as accuracy
from ._cases import products
from ._common import BACKENDS, Backend, Call, backend, interleaved, lean_problem, prepared

FUNCTIONS = ("spectral_function", "sqrtm", "invsqrtm", "logm", "expm")


def calls(on: Backend, name: str, size: tuple[int, int], dtype: str) -> tuple[Call, Call]:
    """Forward and VJP of the rule's own sample problem, every check on that the backend allows."""
    rule = _rules.RULES[name]

    def convert(values: Any) -> Any:
        return on.array(np.asarray(values, dtype=dtype))

    sample = _rules.TRIALS[rule.name].sample(convert, np.random.default_rng(0), size[:1], size[1], False)
    throw = on.options.get("throw", True)
    forward_options, vjp_options = ({**o, "throw": throw} for o in _rule.options_of(rule, sample.options))
    outputs, saved = rule.forward(*sample.inputs, **forward_options)
    y_bar = convert(np.random.default_rng(1).standard_normal((*size, size[1])))
    return (
        prepared(on, rule.forward, *sample.inputs, **forward_options),
        prepared(on, rule.vjp, y_bar, outputs, *saved, **vjp_options),
    )


class Spectral:
    """Time of the forward pass and of the VJP on every backend."""

    params = (BACKENDS, ("spectral_function", "invsqrtm", "logm"), ((5, 64),), ("float64",))
    param_names = ("backend", "function", "size", "dtype")

    def setup(self, name: str, function: str, size: tuple[int, int], dtype: str) -> None:
        self.forward, self.vjp = calls(backend(name), function, size, dtype)
        self.forward()
        self.vjp()

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_vjp(self, *_: object) -> None:
        self.vjp()


class SpectralMemory:
    """Peak resident memory of the process; what a call adds is its figure less that of `peakmem_setup`."""

    params = (("numpy", "torch"), ("spectral_function", "logm"), (1024,))
    param_names = ("backend", "function", "m")

    def setup(self, name: str, function: str, m: int) -> None:
        on = backend(name)
        self.rule = _rules.RULES[function]
        sample = _rules.TRIALS[function].sample(on.array, np.random.default_rng(0), (), 2, False)
        self.options, self.vjp_options = _rule.options_of(self.rule, sample.options)
        p = lean_problem(m, "float64")
        self.w, self.v = on.array(p.w), on.array(p.v)

    def peakmem_setup(self, *_: object) -> None:
        """The baseline: nothing."""

    peakmem_setup.version = "5f3aeafb9a9355c05ce39b27c463b8981ac2c190aabe7401661729dbbc03e5eb"  # type: ignore[attr-defined]

    def peakmem_forward(self, *_: object) -> None:
        self.rule.forward(self.v, **self.options)  # logm of a reflection is not finite, and as large

    peakmem_forward.version = "a47138fa6990b6f8703a99dad01f0c7515e38d751527f5572a110c5d0961fb31"  # type: ignore[attr-defined]

    def peakmem_vjp(self, *_: object) -> None:
        self.rule.vjp(self.v, self.v, self.w, self.v, **self.vjp_options)

    peakmem_vjp.version = "cddc834e37ad5a126d109f07eca6508bbd06892b5cd0cabfcf87d640cd74bef9"  # type: ignore[attr-defined]


class SpectralLimit:
    """Time of the VJP over that of the four NumPy products that its rule states, interleaved in one process."""

    params = (FUNCTIONS, ((5, 64), (1, 512)))
    param_names = ("function", "size")
    unit = "ratio"

    def setup(self, function: str, size: tuple[int, int]) -> None:
        count = round(_rules.TRIALS[function].products(size[1], size[1]))
        self.calls = calls(backend("numpy"), function, size, "float64")[1], products(*size, "float64", count)

    def track_vjp_over_its_products(self, *_: object) -> float:
        return interleaved(*self.calls).median

    track_vjp_over_its_products.version = "12a025165e79ede870b22bb0a12f6f9f1bdfa0182a391b4946e5c5f407f313bd"  # type: ignore[attr-defined]


class SpectralErrors:
    """Relative errors of gradients at repeated eigenvalues."""

    unit = "relative error"

    def track_trace_of_square_at_triple_eigenvalue(self) -> float:
        return accuracy.trace_of_square_error()


class SpectralFloat32:
    """Error of float32 gradients against float64 ones."""

    params = FUNCTIONS
    param_names = ("function",)
    unit = "eps·‖A‖/gap"

    def track_float32(self, function: str) -> float:
        return accuracy.single_precision_error(function)


class SingularValues:
    """Time of the singular values of a tall matrix, of their gradient, and of what goes through the Gram matrix."""

    params = (("float64", "float32"),)
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        self.v = np.random.default_rng(0).standard_normal((2000, 150)).astype(dtype)
        self.s, self.saved = ddnref.svdvals_fwd(self.v)

    def time_forward(self, *_: object) -> None:
        ddnref.svdvals_fwd(self.v)

    def time_vjp(self, *_: object) -> None:
        ddnref.svdvals_vjp(self.s, self.s, *self.saved)

    def time_through_gram(self, *_: object) -> None:
        ddnref.curvature.gram_eigvalsh_fwd(self.v)
