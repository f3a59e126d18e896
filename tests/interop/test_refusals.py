"""The bridges of every operation refuse foreign arrays, objects that are not arrays and other dtypes by name."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path

import numpy as np
import pytest

import ddnref
from ddnref._rules.binding import inputs_of
from ddnref._rules.table import RULES, TRIALS

HOME = str(Path(ddnref.__file__).parent)
bridges = pytest.mark.parametrize(
    "library", [pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax", "autograd")]
)
KINDS = {
    "list": lambda a, own: a.tolist(),
    "number": lambda a, own: 1.5,
    "string": lambda a, own: "x",
    "None": lambda a, own: None,
    "integers": lambda a, own: own(np.zeros(a.shape, np.int64)),
    "half precision": lambda a, own: own(a.astype(np.float16)),
}


def own_and_foreign(library):
    """How NumPy arrays become those of the bridge's library, and of one that it does not take."""
    if library == "torch":
        torch = importlib.import_module("torch")
        return torch.asarray, np.array
    strict = importlib.import_module("array_api_strict")
    if library == "jax":
        return importlib.import_module("jax.numpy").asarray, strict.asarray
    return np.array, strict.asarray


@bridges
@pytest.mark.parametrize("name", RULES)
def test_what_is_no_array_of_the_library_is_refused_by_name(name, library, rng):
    pytest.importorskip("array_api_strict")
    rule = RULES[name]
    own, foreign = own_and_foreign(library)
    sample = TRIALS[rule.name].sample(lambda a: a, rng, (), 4, False)
    function = importlib.import_module(f"ddnref.interop.{library}").differentiable(rule.function, **sample.options)
    given = [own(x) if isinstance(x, np.ndarray) else x for x in sample.inputs]
    for i, (parameter, x) in enumerate(zip(inputs_of(rule), sample.inputs, strict=False)):
        for kind, change in {**KINDS, "another library": lambda a, own: foreign(a)}.items():
            with pytest.raises(TypeError) as refused:  # noqa: PT012
                function(*given[:i], change(x, own), *given[i + 1 :])
                pytest.fail(f"{kind} is taken as {parameter.name}")
            last = traceback.extract_tb(refused.value.__traceback__)[-1]
            assert last.filename.startswith(HOME), f"{kind} as {parameter.name}: raised in {last.filename}"
            assert parameter.name in str(refused.value), f"{kind} as {parameter.name}: {refused.value}"


@bridges
def test_parameters_of_operators_too(library):
    own, foreign = own_and_foreign(library)
    operator = ddnref.operators.diagonal(own(np.asarray([1.0, 2.0]))).with_params(foreign(np.asarray([1.0, 2.0])))
    solve = importlib.import_module(f"ddnref.interop.{library}").differentiable(ddnref.linear_solve)
    with pytest.raises(TypeError, match=r"operator\.params\[0\] is a .*; pass "):
        solve(operator, own(np.ones(2)))
