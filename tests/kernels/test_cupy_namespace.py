"""Every call of the package exists in CuPy with its arguments. CuPy imports without a GPU, and CI has none.

The calls are recorded, not listed by hand: every operation runs on array-api-strict through a namespace that notes
the name and the keywords of each call, and each is then bound to the signature in ``array_api_compat.cupy``.
"""

import ast
import importlib
import inspect
import pkgutil
import sys
from functools import partial
from pathlib import Path

import array_api_compat
import numpy as np
import operator_cases
import pytest
from network_problems import block_arrays, block_chain, targets

import ddnref
from conftest import backend, need
from ddnref import curvature, krylov, networks, operators
from ddnref._core import arrays as _array
from ddnref._kernels import cupy as _cupy
from ddnref._rules.binding import options_of, plain_forward, plain_vjp
from ddnref._rules.table import RULES, TRIALS
from ddnref.networks._activations import ACTIVATIONS, jet
from ddnref.networks._losses import LOSSES
from ddnref.testing import check_vjp

ELSEWHERE = (
    "ddnref.examples",
    "ddnref.interop",
    "ddnref.report",
    "ddnref.reference",
    "ddnref.verify",
    "ddnref._kernels.torch",
    "ddnref._kernels.jax",
)  # each of these runs on one library only
NAMES = sorted(p.name for p in pkgutil.walk_packages(ddnref.__path__, "ddnref.") if not p.name.startswith(ELSEWHERE))
MODULES = [module for name in NAMES if hasattr(module := importlib.import_module(name), "array_api_compat")]


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
def calls(monkeypatch, rng, request):
    """Every (function, number of positional arguments, keywords) that the package uses."""
    need(request.config, "cupy")  # first, because the calls take seconds
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
    monkeypatch.setattr(_array, "_namespaces", {})
    for rule in RULES.values():
        for is_complex in (False, True)[: 1 + TRIALS[rule.name].is_complex]:
            sample = TRIALS[rule.name].sample(strict.asarray, rng, (2,), 4, is_complex)
            forward, vjp = options_of(rule, sample.options)
            check_vjp(
                partial(plain_forward(rule), **forward), partial(plain_vjp(rule), **vjp), *sample.inputs,
                saves=True, needs=rule.needs, loss=sample.loss, gap=sample.gap,
                tangent=TRIALS[rule.name].tangent, directions=1,
            )  # fmt: skip
            if rule.undefined is not None:
                outputs, saved = plain_forward(rule)(*sample.inputs, **forward)
                rule.undefined(*outputs, *saved, *(sample.inputs[i] for i in rule.needs))
    for name in operator_cases.NAMES:
        for is_complex in (False, True):
            operator = operator_cases.case(name, strict.asarray, is_complex=is_complex, batch=(2,))
            assert operators.check_operator(operator).passed
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
        state = curvature.ggn_reducer(chain, mc_samples=1, subsampling=[0, 2])
        ggn = state.finalise(state.update(state.update(state.init(), x, t), x, t))
        curvature.ggn_eigvalsh(ggn)
        curvature.ggn_eigh(ggn, k=1)
        curvature.ggn_damped_newton(ggn, damping=lambda derivatives: derivatives.w)
    for activation in ACTIVATIONS.values():
        jet(activation, strict.asarray(np.eye(2)), 2)
    deep = small_chain(rng, strict)
    for method in ("tridiagonal", "riccati", "qr", "dense"):
        factor = curvature.hessian_factor(*deep, damping=0.1, method=method)
        factor.solve(deep[0].params)
        factor.slogdet()
        factor.inertia()
    curvature.hessian_eigvals(*deep, interval=(0.5, 5.0))
    a, b = (strict.asarray(z) for z in (np.eye(4) * [1.0, 2, 3, 4], np.ones((2, 4))))
    for solve in (
        krylov.cg,
        krylov.minres,
        krylov.bicgstab,
        krylov.gmres,
        krylov.lsmr,
    ):
        solve(operators.dense(a, positive_definite=True), b)
    ddnref.eigsh(operators.dense(a, self_adjoint=True), 1, v0=b[0, ...])
    on_cupy_only(strict, rng)
    return seen


def small_chain(rng, xp):
    layers = [networks.Dense(xp.asarray(rng.standard_normal((3, 3))), None, a) for a in ("tanh", "tanh", "identity")]
    return networks.Chain(layers, "mse"), *(xp.asarray(rng.standard_normal((2, 3))) for _ in range(2))


def on_cupy_only(xp, rng):
    """The forms for CuPy that are made of the standard's functions; what they call of CuPy itself is checked below."""
    s = rng.standard_normal((3, 4, 4))
    s = xp.asarray(s + np.swapaxes(s, -1, -2))
    _cupy.eigh(s)
    _cupy.eigh(s[0, ...])
    _cupy.eigvalsh(s[0, ...])
    _cupy.qr(s[:2, :, :2])
    _cupy.householder(s[..., :2])


@pytest.mark.slow
def test_every_call_exists_in_cupy_with_its_arguments(calls):
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


FRAMEWORKS = {("linalg.solve_ex", ()), *((f"linalg.{name}", ("symmetrize_input",)) for name in ("eigh", "eigvalsh"))}
"""PyTorch's and JAX's, behind a question whose array it is."""


def called_on_xp():
    """Every call of a function of `xp` in the source: what no test may have come through."""
    for name in NAMES:
        source = Path(sys.modules[name].__file__ if name in sys.modules else importlib.import_module(name).__file__)
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function, part = [], node.func
            while isinstance(part, ast.Attribute):
                function, part = [part.attr, *function], part.value
            if function and (is_call_of_space(part) or (isinstance(part, ast.Name) and part.id == "xp")):
                names = [k.arg for k in node.keywords]
                starred = None in names or any(isinstance(a, ast.Starred) for a in node.args)
                keywords = tuple(sorted(filter(None, names)))
                yield f"{source.name}:{node.lineno}", ".".join(function), None if starred else len(node.args), keywords


def is_call_of_space(part):
    """``space(x).sum(…)``, ``namespace_of(x).sum(…)`` and ``array_api_compat.array_namespace(x).sum(…)``."""
    if not isinstance(part, ast.Call):
        return False
    name = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
    return name in ("space", "namespace_of", "array_namespace")


def test_every_call_in_the_source_exists_in_cupy_with_its_arguments(request):
    need(request.config, "cupy")
    import array_api_compat.cupy as cupy

    unfit, found = [], 0
    for place, name, count, keywords in called_on_xp():
        if not name or (name, keywords) in FRAMEWORKS:
            continue
        found += 1
        function = cupy
        try:
            for part in name.split("."):
                function = getattr(function, part)
            if count is not None:
                inspect.signature(function).bind(*range(count), **dict.fromkeys(keywords))
        except AttributeError:
            unfit.append(f"{place}: {name} does not exist")
        except TypeError as error:
            unfit.append(f"{place}: {name} with {count} arguments and {keywords}: {error}")
        except ValueError:  # a compiled ufunc: elementwise, its keywords are NumPy's
            assert not keywords, f"{name} is a ufunc called with {keywords}"
    assert unfit == []
    assert found > 500


def test_what_the_forms_for_cupy_call_of_cupy_itself_exists(request):
    """Beyond the standard, and one of it private. cuBLAS and cuSOLVER cannot be loaded without CUDA's libraries."""
    need(request.config, "cupy")
    import cupy
    from cupy.linalg._decomposition import _lu_factor
    from cupyx.profiler import benchmark

    assert list(inspect.signature(_lu_factor).parameters) == ["a_t", "dtype"]
    assert {"cublas", "cusolver"} <= set(vars(sys.modules["cupy.cuda"])["__getattr__"].__code__.co_consts)
    assert callable(cupy.cuda.device.get_cublas_handle)
    assert callable(cupy.cuda.device.get_cusolver_handle)
    assert callable(cupy.cuda.Stream.from_external)
    assert callable(cupy.from_dlpack)
    inspect.signature(benchmark).bind(print, n_repeat=1, n_warmup=1, max_duration=1.0)
    assert {"malloc_postprocess", "free_postprocess"} <= set(dir(cupy.cuda.MemoryHook))
    folder = Path(cupy.__file__).parents[1] / "cupyx" / "scipy"
    tree = ast.parse((folder / "linalg" / "_solve_triangular.py").read_text(encoding="utf-8"))
    (solve,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "solve_triangular")
    assert {"a", "b", "lower", "unit_diagonal"} <= {argument.arg for argument in solve.args.args}
    batched = (Path(cupy.__file__).parent / "cublas.py").read_text(encoding="utf-8")
    call = "getrs(handle, cublas.CUBLAS_OP_N, n, nrhs, a_array.data.ptr, lda,"
    assert call in batched, "CuPy's own call of getrsBatched, whose order of arguments ours follows, has changed"


def test_the_recorder_sees_keywords():
    seen = set()
    xp = Recorder(backend("array-api-strict").namespace, seen)
    xp.zeros((2,), dtype=xp.float64)
    xp.linalg.eigh(xp.asarray(np.eye(2)))
    assert ("zeros", 1, ("dtype",)) in seen
    assert any(name == "linalg.eigh" for name, _, _ in seen)
