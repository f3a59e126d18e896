"""The PyTorch bridge, where test_matrix.py does not go: repeated eigenvalues, warnings, refusals, options."""

import re
import warnings
from functools import partial

import numpy as np
import pytest
from problems import projector_gradient, relative, rotation, symmetric, with_spectrum
from public_names import PUBLIC
from smooth import SMOOTH, bridged, cube, total

import ddnref
from conftest import TRACED, compiles
from ddnref._rules.binding import inputs_of, options_of, plain_forward
from ddnref._rules.table import RULES, TRIALS

pytestmark = pytest.mark.framework("torch")

TRIPLE = np.asarray([-1.0, 0.3, 0.3, 0.3, 1.1, 2.0])
INSIDE = TRIPLE == 0.3


@pytest.fixture
def differentiable(torch):
    from ddnref.interop.torch import differentiable

    return differentiable


@pytest.mark.graphs
@pytest.mark.filterwarnings(*TRACED)
@pytest.mark.parametrize("name", ["eigh", "least_squares_on_sphere", "weighted_least_squares"])
def test_compiles_where_nothing_requires_grad(name, torch, differentiable):
    torch._dynamo.reset()
    op = bridged(torch, differentiable, name)
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    compiled = torch.compile(lambda x: total(op(x)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), total(op(x)))


@pytest.mark.graphs
@pytest.mark.filterwarnings(*TRACED)
@pytest.mark.parametrize("name", ["eigh", "svd", "polar", "sqrtm", "cholesky", "logdet", "qr"])
def test_a_module_parameter_goes_straight_into_compiled_code(name, torch, differentiable):
    torch._dynamo.reset()
    op = differentiable(PUBLIC[name])
    x = torch.nn.Parameter(torch.diag(torch.arange(1.0, 4.0)) + 0.1)

    def loss(x):
        outputs = op(x)
        return sum(y.square().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(found, expected)


def test_optional_inputs(torch, differentiable):
    """Without its last input, the ridge, the operation is another one to PyTorch."""
    a, b = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    op = differentiable(ddnref.nodes.weighted_least_squares)
    weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda weights: op(a, b, weights), weights)
    ridge = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda ridge: op(a, b, weights.detach(), ridge), ridge)


@pytest.mark.graphs
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.vjp_info])
@pytest.mark.filterwarnings(*TRACED)
def test_plain_vjp_compiles_without_a_graph_break(name, torch):
    """The flat pair itself, no bridge."""
    torch.manual_seed(3)
    torch._dynamo.reset()
    rule = RULES[name]
    inputs, _, given = SMOOTH[name]
    forward, options = options_of(rule, given)
    x = inputs(torch.randn(2, 4, 4, dtype=torch.float64), torch.diag(torch.arange(1.0, 5, dtype=torch.float64)))
    outputs, saved = plain_forward(rule)(*x, **forward)
    arrays = (*(torch.randn_like(y) for y in outputs), *outputs, *saved, *(x[i] for i in rule.needs))
    traced = torch.compile(lambda *a: rule.vjp(*a, **options), fullgraph=True, backend="aot_eager")(*arrays)
    torch.testing.assert_close(traced, rule.vjp(*arrays, **options))


def test_repeated_eigenvalues_are_exact_where_torch_is_not(torch, differentiable, rng):
    """The projector of a triple eigenvalue, 200 times: PyTorch's own derivative is NaN or wrong in nearly all."""
    q, c = rotation(rng, 6, (200,)), symmetric(rng, 6, (200,))

    def errors(eigh):
        x = torch.tensor(with_spectrum(q, TRIPLE), requires_grad=True)
        v = eigh(x)[1][..., 1:4]
        (torch.tensor(c) * (v @ v.mT)).sum().backward()
        return np.asarray(
            [relative(x.grad[i].numpy(), projector_gradient(q[i], TRIPLE, INSIDE, c[i])) for i in range(200)]
        )

    assert np.max(errors(differentiable(ddnref.eigh))) <= 1e-12
    theirs = errors(torch.linalg.eigh)
    assert np.mean(~(theirs < 1e-3)) > 0.9


def test_second_order_raises_where_anything_was_masked(torch, differentiable):
    for name, values in (("eigh", "eigenvalues"), ("svdvals", "or zero singular values")):
        x = torch.eye(3, dtype=torch.float64, requires_grad=True)
        out = SMOOTH[name].outputs(differentiable(PUBLIC[name])(x))[0]
        (grad,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
        with pytest.raises(ddnref.GaugeError, match=f"second derivative through repeated {values}"):
            grad.sum().backward()


@pytest.mark.parametrize("name", ["eigh", "eigh_topk", "gram_eigh"])
def test_second_order_where_rounding_is_left_out(name, torch, differentiable):
    """Couplings of close eigenvalues that are zero at a diagonal matrix have a derivative, which must not be lost."""
    op = differentiable(PUBLIC[name], **({} if name == "eigh" else {"k": 4}))
    x = torch.diag(torch.tensor([-1.0, 0.5, 0.51, 2.0, 0.52, 3.0], dtype=torch.float64) + 2)

    def loss(eigh):
        def value(x):
            x = x if name == "gram_eigh" else (x + x.mT) / 2
            v = eigh(x)[1]
            v = v if v.shape[1] == 4 else v.flip(-1)[:, :4]
            a, b, c = v[:, 1], v[:, 2], v[:, 3]
            # A function of squares: it does not depend on signs.
            return (a[3] * a[1]) ** 2 + 3 * (b[2] * b[4]) ** 2 + (a[4] * c[4]) * (a[1] * c[1]) + (v[:, 0] ** 4).sum()

        return value

    def plain(x):
        return torch.linalg.eigh(x @ x.mT if name == "gram_eigh" else x)

    ours, theirs = (torch.autograd.functional.hessian(loss(f), x) for f in (op, plain))
    assert theirs.abs().max() > 10
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-7)


@pytest.mark.filterwarnings("ignore:A gradient is NaN")
def test_second_order_under_vmap_is_nan_for_that_item_only(torch, differentiable):
    eigh = differentiable(ddnref.eigh)
    x = torch.stack([torch.eye(3), torch.diag(torch.arange(3.0))]).double()
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda x: (eigh(x)[0] ** 3).sum())))(x)
    assert torch.all(torch.isnan(hessian[0]))
    assert torch.all(torch.isfinite(hessian[1]))


def test_rtol_reaches_the_second_order_refusal(torch, differentiable):
    x = torch.diag(torch.tensor([1.0, 1.0 + 1e-6, 2.0], dtype=torch.float64)).requires_grad_()
    for rtol, refused in ((1e-9, False), (1e-3, True)):
        w, _ = differentiable(ddnref.eigh, rtol=rtol, gauge_rtol=float("inf"))(x)
        (grad,) = torch.autograd.grad((w**2).sum(), x, create_graph=True)
        if refused:
            with pytest.raises(ddnref.GaugeError):
                grad.sum().backward()
        else:
            grad.sum().backward()


def test_a_gradient_that_does_not_exist_is_nan_and_warns(torch, differentiable, rng):
    spectra = np.stack([TRIPLE, np.arange(6.0)])
    x = torch.tensor(with_spectrum(rotation(rng, 6, (2,)), spectra), requires_grad=True)
    loss = differentiable(ddnref.eigh)(x)[1][:, 0].sum()
    with pytest.warns(RuntimeWarning, match=r"A gradient is NaN.*gauge_residual.*throw=True"):
        loss.backward()
    assert torch.all(torch.isnan(x.grad[0]))
    assert torch.all(torch.isfinite(x.grad[1]))


def test_the_warning_passes_vmap(torch, differentiable):
    """If no value can be read, as under vmap, an operator of PyTorch warns when it runs."""
    x = torch.stack([torch.eye(3), torch.diag(torch.arange(3.0))])
    each = torch.func.vmap(torch.func.grad(lambda x: differentiable(ddnref.eigh)(x)[1][0].sum()))
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        x_bar = each(x)
    assert torch.all(torch.isnan(x_bar[0]))
    assert torch.all(torch.isfinite(x_bar[1]))


@pytest.mark.parametrize("name", ["solve", "weighted_least_squares"])
def test_values_are_read_once_a_backward_pass(name, torch, differentiable, monkeypatch):
    """However many inputs there are: on a GPU each read would wait for it."""
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    loss = total(bridged(torch, partial(differentiable, compute="torch"), name)(x))
    reads = []
    read = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda flag: reads.append(flag) or read(flag))
    loss.backward()
    assert len(reads) == 1


def test_the_same_options_give_the_same_function(differentiable):
    """A framework can thus reuse what it compiled; equal numbers of different types are different options."""
    assert differentiable(ddnref.eigh_topk, k=2) is differentiable(ddnref.eigh_topk, k=2)
    assert differentiable(ddnref.eigh_topk, k=2) is not differentiable(ddnref.eigh_topk, k=3)
    assert differentiable(ddnref.eigh_topk, k=True) is not differentiable(ddnref.eigh_topk, k=1)
    assert differentiable(ddnref.eigh_topk, k=1.0) is not differentiable(ddnref.eigh_topk, k=1)


def test_what_can_change_is_not_kept():
    from ddnref.interop._bridge_cache import is_constant

    power = 2.0

    def default(w, power=power):
        return w**power

    def with_list(w, powers=[2.0]):  # noqa: B006
        return w ** powers[0]

    for value in (None, 2, (1.0, ("a", True)), cube, np.float64(2.0), lambda w: np.exp(w), default):
        assert is_constant(value), value
    for value in ([2], np.ones(2), (1, [2]), lambda w: w**power, lambda w: w * TRIPLE[0], with_list, warnings.warn,
                  lambda w: [v + w for v in w], lambda w: relative(w, w)):  # fmt: skip
        assert not is_constant(value), value


@pytest.mark.graphs
@pytest.mark.filterwarnings(*TRACED)
def test_the_warning_survives_compilation(torch, differentiable):
    torch._dynamo.reset()
    eigh = differentiable(ddnref.eigh)
    compiled = torch.compile(lambda x: eigh(x)[1][0].sum(), fullgraph=True, backend="aot_eager")
    x = torch.eye(3, dtype=torch.float64, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        compiled(x).backward()
    assert torch.all(torch.isnan(x.grad))


def test_no_warning_without_reason(torch, differentiable):
    x = torch.randn(2, 4, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differentiable(ddnref.eigh)(x)[0].sum().backward()


def test_float32_and_device_are_kept(torch, differentiable):
    x = torch.randn(3, 3, requires_grad=True)
    w, v = differentiable(ddnref.eigh)(x)
    (w.sum() + (v**4).sum()).backward()
    assert w.dtype == v.dtype == x.grad.dtype == torch.float32
    assert x.grad.device == x.device


def test_tensors_go_straight_into_the_pair(torch):
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    w, v = ddnref.eigh(x)
    assert isinstance(ddnref.eigh_vjp(w, None, w, v), torch.Tensor)
    with torch.no_grad():
        ddnref.eigh(x.clone().requires_grad_())


@pytest.mark.parametrize("name", RULES)
def test_recording_torchs_own_derivative_is_refused(name, torch):
    inputs, _, given = SMOOTH[name]
    options, _ = options_of(RULES[name], given)
    options.pop("throw", None)
    x = inputs(torch.ones(3, 3, requires_grad=True), torch.diag(torch.arange(1.0, 4)))
    with pytest.raises(TypeError, match=rf"given to {name} requires grad.*"
                                        r"interop\.torch\.differentiable"):  # fmt: skip
        PUBLIC[name](*x, **options)


@pytest.mark.parametrize("name", RULES)
def test_every_argument_that_would_be_recorded_is_refused(name, torch):
    """One that PyTorch records beside others that it does not leads to its derivative as well."""
    sample = TRIALS[name].sample(np.asarray, np.random.default_rng(0), (), 4, False)
    options, _ = options_of(RULES[name], sample.options)
    arrays = [torch.asarray(a) for a in sample.inputs]
    for i, array in enumerate(arrays):
        given = [*arrays[:i], array.clone().requires_grad_(), *arrays[i + 1 :]]
        argument = inputs_of(RULES[name])[i].name
        with pytest.raises(TypeError, match=rf"^{argument} given to {name} requires grad.*pass {argument}\.detach"):
            PUBLIC[name](*given, **options)


def test_parameters_lists_and_starts_that_would_be_recorded_are_named(torch):
    d = torch.arange(1.0, 5, dtype=torch.float64)
    g, x = d.clone().requires_grad_(), torch.diag(d)
    diagonal, cg = ddnref.operators.diagonal, ddnref.krylov.cg
    for name, call in (
        ("operator.params[0] given to linear_solve", lambda: ddnref.linear_solve(diagonal(g), d)),
        ("x0 given to linear_solve", lambda: ddnref.linear_solve(diagonal(d), d, x0=g)),
        ("preconditioner.params[0] given to linear_solve",
         lambda: ddnref.linear_solve(diagonal(d), d, solver="cg", preconditioner=diagonal(g))),
        ("operator.params[0] given to cg", lambda: cg(diagonal(g), d)),
        ("b given to lsmr", lambda: ddnref.krylov.lsmr(diagonal(d), g)),
        ("x0 given to cg", lambda: cg(diagonal(d), d, x0=g)),
        ("preconditioner.params[0] given to cg", lambda: cg(diagonal(d), d, preconditioner=diagonal(g))),
        ("x.params[0] given to eigsh", lambda: ddnref.eigsh(diagonal(g), k=1)),
        ("v0 given to eigsh", lambda: ddnref.eigsh(x, k=1, v0=g)),
        ("b.params[0] given to eigsh_generalized",
         lambda: ddnref.eigsh_generalized(diagonal(d), diagonal(g), k=1)),
        ("a.params[0] given to svds", lambda: ddnref.svds(diagonal(g), k=1)),
        ("v0 given to svds", lambda: ddnref.svds(x, k=1, v0=g)),
        ("factor[1] given to gram_eigh", lambda: ddnref.curvature.gram_eigh([x, g[:, None] * x])),
        ("v0 given to power_iteration", lambda: ddnref.power_iteration(x, v0=g)),
        ("v0 given to simultaneous_iteration", lambda: ddnref.simultaneous_iteration(x, 1, v0=g[:, None])),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"^{re.escape(name)} requires grad"):
            call()


def test_only_cotangents_that_exist_are_used(torch, differentiable, monkeypatch):
    """A loss of the eigenvalues alone asks the VJP for no eigenvector part."""
    x = torch.eye(3, dtype=torch.float64, requires_grad=True)
    w, _ = differentiable(ddnref.eigh)(x)
    w.sum().backward()  # v_bar is None: no NaN at the triple eigenvalue, no gauge
    torch.testing.assert_close(x.grad, torch.eye(3, dtype=torch.float64))


MANY_INPUTS = ["solve", "linear_solve", "least_squares_on_sphere", "weighted_least_squares", "sinkhorn"]


@pytest.mark.parametrize("compute", [None, "torch"])
@pytest.mark.parametrize("name", RULES)
def test_many_cotangents_at_once(name, compute, torch, differentiable, rng):
    """PyTorch maps them by an older vmap, which has no rules for most functions."""
    op = bridged(torch, partial(differentiable, compute=compute), name)
    x = torch.tensor(rng.standard_normal((3, 3)))
    for create_graph in (False, True):
        options = {"vectorize": True, "create_graph": create_graph}
        rows = torch.autograd.functional.jacobian(op, x, **options)
        for row, expected in zip(rows, torch.autograd.functional.jacobian(op, x), strict=True):
            torch.testing.assert_close(row.detach(), expected)


def test_batched_gradients_pass_gradcheck(torch, differentiable):
    x = torch.randn(2, 4, 4, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: differentiable(ddnref.expm)(x), x, check_batched_grad=True)


@pytest.mark.parametrize("name", [*MANY_INPUTS, "invsqrtm", "power_iteration"])
def test_nested_vmap(name, torch, differentiable, rng):
    """One input has another batch axis than the others, values and gradients: it is the loop over both axes."""
    sample = TRIALS[name].sample(np.asarray, rng, (3,), 4, False)
    op, outputs = differentiable(PUBLIC[name], **sample.options), SMOOTH[name].outputs
    inputs = tuple(map(torch.asarray, sample.inputs))
    count, func = len(inputs), torch.func

    def derivatives(*x):
        return func.grad_and_value(lambda *x: total(outputs(op(*x))), tuple(range(count)))(*x)

    for i in range(count):
        twice = torch.stack([inputs[i], inputs[i].roll(1, 0)], 1)  # another item's, so that it stays feasible
        x = (*inputs[:i], twice, *inputs[i + 1 :])
        both = func.vmap(func.vmap(derivatives, tuple(0 if j == i else None for j in range(count))))(*x)
        for item in range(3):
            for k in range(2):
                alone = derivatives(*(a[item, k] if j == i else a[item] for j, a in enumerate(x)))
                found = [a[item, k] for a in (*both[0], both[1])]
                torch.testing.assert_close(found, [*alone[0], alone[1]], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["solve", "least_squares_on_sphere"])
def test_nested_vmap_of_second_derivatives(name, torch, differentiable, rng):
    sample = TRIALS[name].sample(np.asarray, rng, (2,), 3, False)
    op, func = differentiable(PUBLIC[name]), torch.func
    a, b = map(torch.asarray, sample.inputs)
    b = torch.stack([b, 2 * b, 3 * b], 1)

    def second(a, b):
        return func.jacrev(func.grad(lambda a, b: (op(a, b) ** 3).sum()), (0, 1))(a, b)

    both = func.vmap(func.vmap(second, (None, 0)))(a, b)
    for i, j in np.ndindex(2, 3):
        for found, expected in zip(both, second(a[i], b[i, j]), strict=True):
            torch.testing.assert_close(found[i, j], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_the_solve_of_transforms_has_the_derivative_of_pytorchs(dtype, adjoint, torch):
    """PyTorch's derivatives to the factors and the right-hand side are right where no axis broadcasts."""
    from ddnref._kernels.torch import _Solve

    torch.manual_seed(0)
    lu, pivots = torch.linalg.lu_factor(torch.randn(2, 4, 4, dtype=getattr(torch, dtype)))
    x = lu.requires_grad_(), torch.randn(2, 4, 3, dtype=lu.dtype, requires_grad=True)
    y = _Solve.apply(x[0], pivots, x[1], adjoint)
    theirs = torch.linalg.lu_solve(x[0], pivots, x[1], adjoint=adjoint)
    torch.testing.assert_close(y, theirs)
    bar = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, bar), torch.autograd.grad(theirs, x, bar))


@pytest.mark.filterwarnings(*TRACED)
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", pytest.param("jacrev", marks=pytest.mark.graphs)])
def test_a_compiler_does_not_drop_the_derivative(transform, torch, differentiable, rng):
    """The derivative of ``torch.linalg.eigh`` would be 18 % wrong at a triple eigenvalue, without a warning."""
    torch._dynamo.reset()
    func, eigh = torch.func, differentiable(ddnref.eigh)
    q, c = rotation(rng, 6), torch.asarray(symmetric(rng, 6))
    expected = torch.asarray(projector_gradient(q, TRIPLE, INSIDE, c.numpy()))

    def loss(x):
        v = eigh(x)[1][..., 1:4]
        return (c * (v @ v.mT)).sum()

    transformed = {"grad": func.grad(loss), "vmap of grad": func.vmap(func.grad(loss)), "jacrev": func.jacrev(loss)}
    x = torch.asarray(with_spectrum(q, TRIPLE))
    x, expected = (x[None], expected[None]) if transform == "vmap of grad" else (x, expected)
    found = torch.compile(transformed[transform], backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    torch._dynamo.reset()  # or what was compiled is used again
    reason = "would drop the derivative of eigh" if compiles() else "torch.(_dynamo|compiler).disable"
    with pytest.raises(Exception, match=reason):
        torch.compile(transformed[transform], fullgraph=True, backend="aot_eager")(x)


@pytest.mark.filterwarnings(*TRACED)
def test_recording_is_refused_at_every_level(torch):
    """Transforms and compilers hide from a tensor that an outer ``grad`` records what is done with it."""
    torch._dynamo.reset()
    func, x = torch.func, torch.eye(3).expand(2, 3, 3)

    def plain(x):
        return ddnref.sqrtm(x, throw=False).sum()

    def over_vmap(x):
        return func.grad(lambda x: func.vmap(plain)(x).sum())(x)

    for f in (func.vmap(func.grad(plain)), over_vmap):
        for run in (f, torch.compile(f, backend="aot_eager")) if compiles() else (f,):
            with pytest.raises(TypeError, match="given to sqrtm requires grad"):
                run(x)
    # Where nothing differentiates, a plain function is compiled as before.
    torch._dynamo.reset()
    twice = func.vmap(func.vmap(lambda x: plain(x)))
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True) if compiles() else twice
    torch.testing.assert_close(compiled(x[None]), torch.full((1, 2), 3.0))


def test_static_errors(differentiable):
    with pytest.raises(TypeError, match=r"sum has no rule; pass vjp= .* or one of ddnref's operations: eigh, "):
        differentiable(np.sum)
    with pytest.raises(TypeError, match="eigh has no option k; it takes "):
        differentiable(ddnref.eigh, k=2)
    with pytest.raises(TypeError, match=r"Bind the options.*differentiable\(ddnref\.eigh_topk, k=\.\.\.\)"):
        differentiable(ddnref.eigh_topk)
    with pytest.raises(TypeError, match=r"differentiable\(ddnref\.spectral_function, df=\.\.\., f=\.\.\.\)"):
        differentiable(ddnref.spectral_function)


@pytest.mark.parametrize("gap", [1e-1, 1e-4, 1e-6, 1e-7, 1e-10, 1e-13])
def test_second_derivatives_at_close_eigenvalues(gap, torch, differentiable):
    """The error through `eigh` grows as eps / gap², and that of a step function stays, as the page of `eigh` says."""
    rng = np.random.default_rng(0)
    q, (c, d) = np.linalg.qr(rng.standard_normal((8, 8)))[0], rng.standard_normal((2, 8, 8))
    c, d = torch.tensor(c + c.T), d + d.T
    x = (q * np.asarray([-3, -3 + gap, -3 + 2 * gap, -1, 0.2, 1, 2, 3.3])) @ q.T
    x = (x + x.T) / 2
    eigh = differentiable(ddnref.eigh)
    step = {"f": lambda w: (w < -2).to(w.dtype), "df": torch.zeros_like, "d2f": torch.zeros_like}
    through_eigh = lambda x: (v := eigh(x)[1][:, :3]) @ v.mT
    projector = differentiable(ddnref.spectral_function, **step)

    def gradient(function, x):
        return torch.autograd.grad((c * function(x)).sum(), x, create_graph=True)[0]

    def difference(h):
        above, below = (gradient(projector, torch.tensor(x + s * h * d, requires_grad=True)) for s in (1, -1))
        return (above - below).detach().numpy() / (2 * h)

    def error(function):
        leaf = torch.tensor(x, requires_grad=True)
        found = torch.autograd.grad((gradient(function, leaf) * torch.tensor(d)).sum(), leaf)[0].numpy()
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    # Richardson's extrapolation, twice
    coarse, middle, fine = map(difference, (1e-3, 5e-4, 2.5e-4))
    expected = (16 * (4 * fine - middle) / 3 - (4 * middle - coarse) / 3) / 15
    assert error(projector) <= 1e-10
    if gap >= 1e-7:  # below there is no digit, and equal ones are refused
        assert error(through_eigh) <= 1e-10 + 100 * np.finfo(float).eps / (gap / 3.3) ** 2
