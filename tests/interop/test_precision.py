"""The precision of the inputs is that of the computation: under autocast, in JAX, with numbers of NumPy as options."""

import inspect
import warnings

import numpy as np
import pytest
from public_names import PUBLIC

import ddnref
from conftest import TRACED
from ddnref import curvature, networks, operators
from ddnref._kernels.public import public
from ddnref._rules.binding import keywords, options_of, plain_forward, plain_vjp
from ddnref._rules.table import RULES, TRIALS

rules = pytest.mark.parametrize("name", RULES)


def single_precision(name, rng):
    """A problem of a rule in float32: inputs, options, and the cotangents of its loss (or ones)."""
    sample = TRIALS[name].sample(lambda a: np.asarray(a, np.float32), rng, (2,), 5, False)
    outputs, _ = plain_forward(RULES[name])(*sample.inputs, **options_of(RULES[name], sample.options)[0])
    bars = sample.loss[1](*outputs) if sample.loss else tuple(map(np.ones_like, outputs))
    return sample.inputs, sample.options, bars if isinstance(bars, tuple) else (bars,)


# --- numbers of NumPy as options ------------------------------------------------------------------------------------


def float_options(function):
    """Options that are numbers, and not flags."""
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind is not p.POSITIONAL_ONLY and "float" in str(p.annotation)]


NUMBERS = {
    name: {p.name: p.default or 1e-3 for function in (rule.forward, rule.vjp) for p in float_options(function)}
    for name, rule in RULES.items()
}


@pytest.mark.parametrize("name", [name for name, options in NUMBERS.items() if options])
def test_numbers_of_numpy_do_not_promote(name, xp, rng):
    inputs, options, bars = single_precision(name, rng)
    rule = RULES[name]
    given = {key: np.float64(options.get(key, value)) for key, value in NUMBERS[name].items()}
    forward, vjp = options_of(rule, options | given, xp.while_loop)
    inputs = tuple(map(xp.asarray, inputs))
    outputs, saved = plain_forward(rule)(*inputs, **forward)
    arrays = *map(xp.asarray, bars), *outputs, *saved, *(inputs[i] for i in rule.needs)
    gradients = plain_vjp(rule)(*arrays, **vjp)
    assert {str(a.dtype).rpartition(".")[2] for a in (*outputs, *gradients)} == {"float32"}


def test_every_function_with_such_an_option_is_decorated():
    for name, function in PUBLIC.items():
        if inspect.isfunction(function) and float_options(function):
            assert hasattr(function, "__wrapped__") or name == "cross_entropy", name  # which checks its own


def test_the_decorator_passes_python_numbers():
    @public
    def numbers(x, /, k=1, *, eps=0.1, n=2, flag=True):
        return k, eps, n, flag

    given = numbers(np.ones(1), np.int64(3), eps=np.float64(0.5), n=np.int32(4), flag=np.bool_(False))
    assert given == (3, 0.5, 4, False)
    assert list(map(type, given)) == [int, float, int, bool]
    assert type(numbers(np.ones(1), eps=np.longdouble(0.5))[1]) is float
    assert type(numbers(np.ones(1), k=np.int64(2))[0]) is int


# --- PyTorch --------------------------------------------------------------------------------------------------------


@pytest.fixture
def autocast(torch):
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.framework("torch")
@pytest.mark.parametrize("compute", [None, "torch"])
@rules
def test_autocast_changes_nothing(name, compute, torch, autocast, rng):
    """The bridge, its backward pass inside and outside, and the plain functions; half precision is converted."""
    from ddnref.interop.torch import differentiable

    inputs, options, bars = single_precision(name, rng)
    op, rule = differentiable(PUBLIC[name], compute=compute, **options), RULES[name]
    bars = tuple(map(torch.asarray, bars))

    def outputs_of(*x):
        result = op(*x)
        result = result[0] if rule.info else result
        return result if isinstance(result, tuple) else (result,)

    def gradients_of(y, x):
        return torch.autograd.grad(y, x, bars, retain_graph=True)

    forward, vjp = options_of(rule, options)

    def plain(*x):
        outputs, saved = plain_forward(rule)(*x, **forward)
        return *outputs, *plain_vjp(rule)(*bars, *outputs, *saved, *(x[i] for i in rule.needs), **vjp)

    for half in (False, True):
        rounded = [torch.asarray(x).bfloat16() if half else torch.asarray(x) for x in inputs]
        if half and name == "sinkhorn":  # marginals whose sums rounding leaves alone
            halves = [2.0 ** -min(i + 1, 4) for i in range(5)], [2.0 ** -min(i + 1, 5) for i in range(6)]
            rounded[1:3] = [torch.tensor(p).bfloat16().expand(2, -1) for p in halves]
        x = [x.float().clone().requires_grad_() for x in rounded]
        y = outputs_of(*x)
        expected, of_pair = (*y, *gradients_of(y, x)), plain(*(a.detach() for a in x))
        x = [x.clone().requires_grad_() for x in rounded]
        with autocast:
            y = outputs_of(*x)
            inside = gradients_of(y, x)
            assert_same(plain(*rounded), of_pair)
        assert all(x_bar.dtype == (torch.bfloat16 if half else torch.float32) for x_bar in inside)
        outside = gradients_of(y, x)
        for found in (inside, outside):
            assert_same((*y, *found), [a.to(b.dtype) for a, b in zip(expected, (*y, *found), strict=True)])


def assert_same(found, expected):
    import torch

    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.framework("torch")
def test_what_has_no_rule_ignores_autocast_too(torch, autocast):
    torch.manual_seed(0)
    a, x, t = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 4)
    chain = networks.Chain([networks.Dense(a, activation="tanh")], "mse")
    reducer = curvature.gram_reducer()

    def results():
        operator = operators.dense(a)
        state = reducer.update(reducer.update(reducer.init(), a), 2 * a)
        return (
            operator(x), chain.output(x), chain.forward(x)[0], *chain.hvp(x, t, chain.params), reducer.finalise(state),
            curvature.gram_eigvalsh([a, a]), ddnref.linear_solve(operator, t)[0],
        )  # fmt: skip

    expected = results()
    with autocast:
        assert_same(results(), expected)
        assert chain.output(x.bfloat16()).dtype == operators.dense(a)(x.half()).dtype == torch.float32


@pytest.mark.graphs
@pytest.mark.framework("torch")
@pytest.mark.filterwarnings(*TRACED)
def test_autocast_around_compiled_functions(torch, autocast):
    """A compiler traces the backward pass with autocast off."""
    from ddnref.interop.torch import differentiable

    torch._dynamo.reset()
    op, x = differentiable(ddnref.sqrtm, compute="torch"), torch.eye(6) + 0.1

    def gradient(function):
        y = x.clone().requires_grad_()
        (function(y) * torch.arange(6.0)).sum().backward()
        return y.grad

    expected, compiled = gradient(op), torch.compile(op, fullgraph=True, backend="aot_eager")
    with autocast:
        assert_same([gradient(compiled)], [expected])


@pytest.mark.framework("torch")
def test_second_derivatives_ignore_autocast_around_the_first(torch, autocast):
    from ddnref.interop.torch import differentiable

    op, x = differentiable(curvature.gram_eigvalsh), torch.randn(6, 3, generator=torch.Generator().manual_seed(1))

    def second(context):
        y = x.clone().requires_grad_()
        with context:
            (first,) = torch.autograd.grad((op(y) ** 3).sum(), y, create_graph=True)
        return torch.autograd.grad(first.square().sum(), y)

    assert_same(second(autocast), second(torch.enable_grad()))


@pytest.mark.framework("torch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_refused_by_name_outside_of_autocast(dtype, torch):
    from ddnref.interop.torch import differentiable

    x = torch.eye(3, dtype=getattr(torch, dtype))
    for call in (
        ddnref.sqrtm,
        differentiable(ddnref.sqrtm),
        operators.dense,
        lambda x: ddnref.eigh_vjp(x[0], None, x[0], x),
    ):
        with pytest.raises(TypeError, match=rf"(x|params\[0\]|a|w_bar) has dtype torch.{dtype}; ddnref computes in"):
            call(x)


@pytest.mark.framework("torch")
def test_products_in_low_precision_are_warned_of_once(torch, monkeypatch):
    from ddnref._kernels import torch as kernels

    monkeypatch.setattr(kernels, "_warned", False)
    monkeypatch.setattr(kernels, "_fp32_precision", lambda backend, op: "tf32")
    ddnref.sqrtm(torch.eye(2, dtype=torch.float64))  # not concerned
    with pytest.warns(RuntimeWarning, match="float32 matrices in tf32 on cpu.*set_float32_matmul_precision"):
        ddnref.sqrtm(torch.eye(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddnref.sqrtm(torch.eye(2))


@pytest.mark.framework("torch")
def test_pytorch_says_how_it_multiplies(torch):
    """The private getter agrees with the public property, and older versions are asked in their own way."""
    from ddnref._kernels.torch import _fp32_precision
    from ddnref._kernels.torch_versions import fp32_precision

    assert fp32_precision("cuda", "matmul") == fp32_precision("mkldnn", "matmul") == "ieee"
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        assert _fp32_precision is fp32_precision
        return
    for backend in ("cuda", "mkldnn"):
        assert _fp32_precision(backend, "matmul") == getattr(torch.backends, backend).matmul.fp32_precision


# --- JAX ------------------------------------------------------------------------------------------------------------


@pytest.mark.framework("jax")
@rules
def test_products_of_jax_are_exact(name, rng):
    """Gradients are too, and the default of the user does not count."""
    from conftest import backend

    backend("jax")
    import jax

    from ddnref.interop.jax import differentiable

    inputs, options, _ = single_precision(name, rng)
    rule, inputs = RULES[name], tuple(map(jax.numpy.asarray, inputs))
    op = differentiable(PUBLIC[name], **options)

    def loss(*x):
        result = op(*x)
        result = result[0] if rule.info else result
        return sum(abs(y).sum() for y in (result if isinstance(result, tuple) else (result,)))

    with jax.default_matmul_precision("bfloat16"):
        graph = str(jax.make_jaxpr(jax.grad(loss, tuple(range(len(inputs)))))(*inputs))
    assert graph.count("HIGHEST") == 2 * graph.count("dot_general[")  # one for each factor
    assert "DEFAULT" not in graph


def test_the_option_of_bridges_is_not_one_of_operations():
    assert all("on_failure" not in keywords(rule.forward) for rule in RULES.values())
