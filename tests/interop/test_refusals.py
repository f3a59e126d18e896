"""The bridges of every operation refuse foreign arrays, objects that are not arrays and other dtypes by name."""

from __future__ import annotations

import importlib
import subprocess
import sys
import traceback
import warnings
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
            if kind in ("list", "number") and parameter.annotation == "Array | float":
                continue  # a list of no axes is a number, too
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


# --- what is missing, and arrays of other libraries in plain functions ----------------------------------------------


def test_a_missing_framework_names_its_extra():
    code = (
        "import sys\nimport ddnref\n"
        "for name in ddnref.interop.BRIDGES:\n"
        "    sys.modules[name] = None\n"
        "    try:\n        getattr(ddnref.interop, name)\n"
        "    except ModuleNotFoundError as error:\n        print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.splitlines() == [
        f'ddnref.interop.{name} needs {name}, which is not installed: pip install "ddnref[{name}]"'
        for name in ddnref.interop.BRIDGES
    ]


def test_something_missing_inside_a_framework_is_another_error():
    from ddnref.interop._extras import needed_by_bridge

    with pytest.raises(ModuleNotFoundError, match=r"^no opt_einsum"), needed_by_bridge("jax"):
        raise ModuleNotFoundError("no opt_einsum", name="opt_einsum")


def test_bridges_are_attributes():
    assert ddnref.interop.BRIDGES == ("autograd", "dask", "jax", "tensorflow", "torch")
    with pytest.raises(AttributeError, match="has no attribute 'mxnet'"):
        ddnref.interop.mxnet  # noqa: B018


@pytest.mark.parametrize(("library", "hint"), [
    pytest.param("dask", r"x is a dask\.Array: call ddnref\.interop\.dask\.map_items\(ddnref\.[a-z._]+, x\).*compute",
                 marks=pytest.mark.framework("dask")),
    pytest.param("tensorflow", r"x is a tensorflow\..*: wrap .*interop\.tensorflow\.differentiable.*x\.numpy\(\)",
                 marks=pytest.mark.framework("tensorflow")),
])  # fmt: skip
def test_plain_functions_know_where_other_arrays_belong(library, hint):
    if library == "dask":
        x = importlib.import_module("dask.array").from_array(np.eye(2))
    else:
        x = importlib.import_module("tensorflow").eye(2)
    for function in (ddnref.eigh, ddnref.sqrtm, ddnref.power_iteration, ddnref.nodes.project_simplex):
        with pytest.raises(TypeError, match=hint):
            function(x)


# --- warnings name the operation and the items ----------------------------------------------------------------------


def gradient_of_nan(library, function, x):
    """The gradient of the sum of the operation's first output."""

    def loss(x):
        result = function(x)
        return (result[0] if isinstance(result, tuple) else result).sum()

    if library == "torch":
        y = importlib.import_module("torch").tensor(x, requires_grad=True)
        return loss(y).backward()
    if library == "jax":
        jax = importlib.import_module("jax")
        jax.grad(loss)(jax.numpy.asarray(x))
        return jax.effects_barrier()
    if library == "autograd":
        autograd = importlib.import_module("autograd")
        return autograd.grad(lambda x: autograd.numpy.sum(function(x)))(x)
    tf = importlib.import_module("tensorflow")
    y = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(y)
        value = tf.reduce_sum(function(y))
    return tape.gradient(value, y)


@pytest.mark.parametrize("library", [
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax", "autograd", "tensorflow")
])  # fmt: skip
@pytest.mark.parametrize(("shape", "bad", "words"), [
    ((), (), "expm"),
    ((3,), (1,), "expm, item 1 of 3"),
    ((9,), tuple(range(8)), "expm, items 0, 1, 2, 3, 4 and 3 more of 9"),
    ((2, 2), ((0, 1), (1, 0)), r"expm, items (0, 1), (1, 0) of (2, 2)"),
])  # fmt: skip
def test_warnings_name_operation_and_items(library, shape, bad, words):
    x = np.broadcast_to(np.eye(2), (*shape, 2, 2)).copy()
    for item in bad if shape else ((),):
        x[item] = np.nan
    function = importlib.import_module(f"ddnref.interop.{library}").differentiable(ddnref.expm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradient_of_nan(library, function, x)
    texts = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(texts) == 1
    assert texts[0].startswith(f"A gradient is NaN ({words}): the input is not finite, ")


@pytest.mark.parametrize("library", [
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax")
])  # fmt: skip
def test_items_of_inputs_that_others_share(library):
    """A matrix shared by all right-hand sides has one gradient; that of the right-hand sides tells them apart."""
    from conftest import backend

    function = importlib.import_module(f"ddnref.interop.{library}").differentiable(ddnref.solve)
    a, b = (backend(library).asarray(x) for x in (np.eye(2), np.asarray([[1.0, 2.0], [np.nan, 1.0], [0.0, 1.0]])))
    grad = importlib.import_module("torch").func.grad if library == "torch" else importlib.import_module("jax").grad
    with pytest.warns(RuntimeWarning, match=r"A gradient is NaN \(solve, item 1 of 3\)"):
        grad(lambda a, b: function(a, b).sum(), (0, 1))(a, b)


# --- plain functions under jax.jit ----------------------------------------------------------------------------------


@pytest.mark.framework("jax")
@pytest.mark.parametrize(("call", "name", "advice"), [
    (lambda x: ddnref.sqrtm(x), "sqrtm", "pass throw=False to get NaN"),
    (lambda x: ddnref.solve(x, x[0]), "solve", "pass throw=False to get NaN"),
    (lambda x: ddnref.eigh_vjp(None, x, *ddnref.eigh(x)), "eigh_vjp", "pass throw=False to get NaN"),
    (lambda x: ddnref.power_iteration(x), "power_iteration", "while_loop=jax.lax.while_loop and pass throw=False"),
    (lambda x: ddnref.power_iteration(x, throw=False), "power_iteration", "none: pass while_loop=jax[^ ]*, or wrap"),
    (lambda x: ddnref.linear_solve(x, x[0], solver="cg"), "linear_solve", "while_loop=jax.lax.while_loop"),
    (lambda x: ddnref.eigh(x, check_finite=True), "eigh", "leave out check_finite=True"),
    (lambda x: ddnref.nodes.project_sphere(ddnref.nodes.project_simplex(x)), "project_sphere", "throw=False"),
])  # fmt: skip
def test_a_plain_function_that_reads_a_value_says_so(call, name, advice):
    from conftest import backend

    jax, x = importlib.import_module("jax"), backend("jax").asarray(np.eye(3) + 0.1)
    for transform in (jax.jit, jax.vmap):
        with pytest.raises(TypeError, match=rf"^{name} reads a value.*{advice}.*ddnref\.interop\.jax\.differentiable"):
            transform(call)(x if transform is jax.jit else x[None])


@pytest.mark.framework("jax")
def test_a_function_of_the_user_that_reads_a_value_keeps_its_error():
    from conftest import backend

    jax, x = importlib.import_module("jax"), backend("jax").asarray(np.eye(2))

    def f(w):
        return w if w[0] > 0 else -w

    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda x: ddnref.spectral_function(x, f=f, throw=False))(x)
