"""What the package calls must exist in CuPy with these arguments: CuPy imports without a GPU, and CI has none.

The calls are recorded, not listed by hand: every operation runs on array-api-strict through a namespace that notes
the name and the keywords of each call, and each is then bound to the signature in ``array_api_compat.cupy``.
"""

import importlib
import inspect
import pkgutil
from functools import partial

import array_api_compat
import numpy as np
import operator_cases
import pytest
from test_network import block_arrays, block_chain, targets

import ddnref
from conftest import backend, need
from ddnref import _ggn, _network, _operators
from ddnref._network._activations import ACTIVATIONS, jet
from ddnref._network._losses import LOSSES
from ddnref._rule import options_of, plain_forward, plain_vjp
from ddnref._rules import RULES
from ddnref.testing import check_vjp

NAMES = sorted(p.name for p in pkgutil.iter_modules(ddnref.__path__))
NAMES += sorted(f"_network.{p.name}" for p in pkgutil.iter_modules(_network.__path__))
NAMES += sorted(f"_ggn.{p.name}" for p in pkgutil.iter_modules(_ggn.__path__))
NAMES += sorted(f"_operators.{p.name}" for p in pkgutil.iter_modules(_operators.__path__))
MODULES = [module for name in NAMES
           if hasattr(module := importlib.import_module(f"ddnref.{name}"), "array_api_compat")]  # fmt: skip


class Recorder:
    """Stands for a namespace and notes which of its functions are called, and how."""

    def __init__(self, namespace, calls, prefix=""):
        self.namespace, self.calls, self.prefix = namespace, calls, prefix

    def __getattr__(self, name):
        value = getattr(self.namespace, name)
        if inspect.ismodule(value):
            return Recorder(value, self.calls, f"{self.prefix}{name}.")
        if not inspect.isfunction(value):
            return value

        def call(*args, **kwargs):
            self.calls.add((self.prefix + name, len(args), tuple(sorted(kwargs))))
            return value(*args, **kwargs)

        return call


@pytest.fixture
def calls(monkeypatch, rng):
    """Every (function, number of positional arguments, keywords) that the package uses."""
    seen = set()
    original = array_api_compat.array_namespace

    class Compat:
        def __getattr__(self, name):
            return getattr(array_api_compat, name)

        @staticmethod
        def array_namespace(*arrays):
            return Recorder(original(*arrays), seen)

    strict = backend("array-api-strict")
    for module in MODULES:
        monkeypatch.setattr(module, "array_api_compat", Compat())
    for rule in RULES.values():
        for is_complex in (False, True)[: 1 + rule.is_complex]:
            sample = rule.sample(strict.asarray, rng, (2,), 4, is_complex)
            forward, vjp = options_of(rule, sample.options)
            check_vjp(
                partial(plain_forward(rule), **forward), partial(plain_vjp(rule), **vjp), *sample.inputs,
                saves=True, needs=rule.needs, loss=sample.loss, gap=sample.gap, tangent=rule.tangent, directions=1,
            )  # fmt: skip
            if rule.undefined is not None:
                outputs, saved = plain_forward(rule)(*sample.inputs, **forward)
                rule.undefined(*outputs, *saved, *(sample.inputs[i] for i in rule.needs))
    for name in operator_cases.NAMES:
        for is_complex in (False, True):
            operator = operator_cases.case(name, strict.asarray, is_complex=is_complex, batch=(2,))
            assert ddnref.check_operator(operator).passed
            operator.matrix(operator.params[0])
    for loss in LOSSES:
        chain = block_chain(block_arrays(rng, strict.asarray), loss)
        x, t = strict.asarray(rng.standard_normal((3, 1, 5, 3))), strict.asarray(targets(rng, loss, 3, 3))
        for v in (chain.params, [p[None, ...] for p in chain.params]):
            chain.hvp(x, t, v)
            chain.ggnvp(x, t, v)
        chain.per_sample_gradients(x, t)
        chain.layer_derivatives(x, t)
        chain.criterion.hessian_sqrt(chain.output(x), t)
        chain.loss(x, t)
        state = ddnref.ggn_reducer(chain, mc_samples=1, subsampling=[0, 2])
        ggn = state.finalise(state.update(state.update(state.init(), x, t), x, t))
        ddnref.ggn_eigvalsh(ggn)
        ddnref.ggn_eigh(ggn, k=1)
        ddnref.ggn_damped_newton(ggn, damping=lambda derivatives: derivatives.w)
    for activation in ACTIVATIONS.values():
        jet(activation, strict.asarray(np.eye(2)), 2)
    return seen


def test_every_call_exists_in_cupy_with_its_arguments(calls, request):
    need(request.config, "cupy")
    import array_api_compat.cupy as cupy

    names = {name for name, _, _ in calls}
    assert {"where", "linalg.eigh", "cumulative_sum", "take", "fft.rfftn", "tensordot"} <= names
    unfit = []
    for name, count, keywords in sorted(calls):
        function = cupy
        try:
            for part in name.split("."):
                function = getattr(function, part)
            signature = inspect.signature(function)
        except AttributeError:
            unfit.append(f"{name} does not exist")
            continue
        except ValueError:  # a compiled ufunc: elementwise, its keywords are NumPy's
            assert not keywords, f"{name} is a ufunc called with {keywords}"
            continue
        try:
            signature.bind(*range(count), **dict.fromkeys(keywords))
        except TypeError as error:
            unfit.append(f"{name} with {count} arguments and {keywords}: {error}")
    assert unfit == []


def test_the_recorder_sees_keywords():
    seen = set()
    xp = Recorder(backend("array-api-strict").namespace, seen)
    xp.zeros((2,), dtype=xp.float64)
    xp.linalg.eigh(xp.asarray(np.eye(2)))
    assert ("zeros", 1, ("dtype",)) in seen
    assert any(name == "linalg.eigh" for name, _, _ in seen)
