"""Bridges: one module per framework, imported only when used: ``differentiable(operation, **options)``, or Dask's maps.

``differentiable`` turns an operation with a rule, such as ``ddnref.eigh``, into a function that the framework
differentiates with our VJP. Options of the operation and of its VJP are bound once, as in
``differentiable(ddnref.eigh_topk, k=4)``. The function takes the framework's arrays and returns the values of the
operation. An operation without a rule, or an option that is unknown or missing, raises ``TypeError``.

``differentiable(function, vjp=...)`` does the same for a function of yours:

- ``vjp(*cotangents, *outputs, *saved, *inputs)`` returns one cotangent for each input, ``None`` for one without. All
  outputs have a cotangent; it is zero where the loss does not use the output.
- ``jvp(*tangents, *outputs, *saved, *inputs)``, optional, returns one tangent for each output and gives forward mode.
  All inputs have a tangent; it is zero for one that does not move.
- ``fwd(*inputs)`` returns ``(outputs, saved)`` and replaces the function where derivatives need more than inputs and
  outputs. ``needs=(0,)`` names the inputs that derivatives take, by default all. ``outputs=2`` says how many arrays the
  function returns, where the signature of ``vjp`` does not.
- The functions get the framework's own arrays, so write them with the array API or with the framework. With
  ``compute="numpy"`` they get NumPy arrays, in the bridges to PyTorch and JAX, and with ``compute="cupy"`` those of
  CuPy, in the bridge to PyTorch; autograd and TensorFlow always compute with NumPy. A batch that ``vmap`` maps is then
  a loop over its items. ``batched=True`` promises that the functions take batch axes in front, and makes it one call.
- A graph of JAX or TensorFlow must know the shapes of results before it runs. With NumPy they come from a trial call
  on random numbers between 0.5 and 1.5, or from ``shapes=``, a function that takes arrays of the right shapes and
  returns what ``fwd``, or the function itself, would return, with any values.
- Other keywords go to those of the functions that have a keyword of that name.

Second derivatives are the framework's own, through ``vjp`` and ``jvp``, and so are refused with ``compute="numpy"`` and
``"cupy"``, and where ``fwd=`` saves arrays. Neither NaN nor an exception of yours is changed.
`ddnref.testing.check_vjp` and its siblings take the function that ``differentiable`` returns.

The VJP of an operation runs with ``throw=False``: where no gradient exists (a gauge-dependent loss, a singular matrix),
that item's gradient is NaN and a warning says why. An iteration that has not converged counts as such a failure, unless
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
