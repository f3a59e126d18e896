"""Every rule without a clock: matrix products of derivatives, and errors in single precision."""

from __future__ import annotations

from ddnref._rules import table as _rules

from . import _work as work
from ._accuracy import single_precision_error


class DerivativeProducts:
    """Matrix products in a VJP or a JVP on NumPy arrays, in products of m×m matrices."""

    params = (work.names(), ("vjp", "jvp"))
    param_names = ("operation", "mode")
    unit = "m×m products"

    def track_products(self, operation: str, mode: str) -> float:
        return work.products(operation, mode)


class DerivativeErrors:
    """Largest relative error of 20 float32 gradients against float64 ones, over eps times the condition."""

    params = tuple(_rules.RULES)
    param_names = ("operation",)
    unit = "eps·condition"

    def track_float32(self, operation: str) -> float:
        return single_precision_error(operation)
