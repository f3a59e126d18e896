"""Bridges: one module per framework, imported only when used: ``differentiable(operation, **options)``, or Dask's maps.

``differentiable`` turns an operation with a rule, such as ``ddnref.eigh``, into a function that the framework
differentiates with our VJP. Options of the operation and of its VJP are bound once, as in
``differentiable(ddnref.eigh_topk, k=4)``. The function takes the framework's arrays and returns the values of the
operation. An operation without a rule, or an option that is unknown or missing, raises ``TypeError``.

The VJP runs with ``throw=False``: where no gradient exists (a gauge-dependent loss, a singular matrix), that item's
gradient is NaN and a warning says why. An iteration that has not converged counts as such a failure, unless
``on_failure="iterate"`` is among the options. Then its last iterate is returned and differentiated as if it had
converged: the formula of the derivative is evaluated at the iterate. The relative error of the gradient is about the
sum of the errors of the iterate and of the solution for the derivative, which stops after the same number of steps. A
warning names the items.
"""

from importlib import import_module
from typing import Any

BRIDGES = ("autograd", "dask", "jax", "tensorflow", "torch")


def __getattr__(name: str) -> Any:
    """Import a bridge when it is first used, as in ``ddnref.interop.torch.differentiable``."""
    if name in BRIDGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
