"""Operators through the bridges: gradients to their parameters, second derivatives, batches, failures."""

import numpy as np
import pytest

import ddnref
from ddnref import operators
from ddnref._rules.binding import flatten

SHAPE = (3, 4)
BATCHING = "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning"


def deblur(kernel, rho):
    return operators.normal(operators.convolution(kernel, SHAPE), rho)


def kernels(rng, *batch):
    k = 0.2 * rng.standard_normal((*batch, 3, 3))
    k[..., 1, 1] += 1
    return k


def test_a_layout_takes_inputs_apart_and_joins_them(rng):
    operator, b = deblur(kernels(rng), np.asarray(0.5)), rng.standard_normal(SHAPE)
    layout, arrays = flatten((operator, b))
    assert len(arrays) == 3
    assert not layout.plain
    again, same = layout.join(arrays)
    assert again == operator._replace(params=again.params)
    assert all(p is q for p, q in zip(again.params, operator.params, strict=True))
    assert same is b
    assert layout.places((1,)) == (2,)
    assert layout.places((0, 1, 7)) == (0, 1, 2)
    assert layout.select((1,)).plain
    assert hash(layout) == hash(flatten((operator, b))[0])
    assert layout == flatten((operator.with_params(*operator.params), b))[0]


# --- PyTorch ----------------------------------------------------------------------------------------------------


def tensors(torch, *arrays, grad=True):
    return tuple(torch.tensor(a, dtype=torch.float64, requires_grad=grad) for a in arrays)


def torch_solve(**options):
    from ddnref.interop.torch import differentiable

    return differentiable(ddnref.linear_solve, **{"rtol": 1e-13, **options})


@pytest.mark.framework("torch")
def test_torch_first_and_second_order_of_conjugate_gradients(torch, rng):
    solve = torch_solve()

    def x(kernel, rho, b):
        return solve(deblur(kernel, rho), b)[0]

    inputs = tensors(torch, kernels(rng), 0.5, rng.standard_normal((2, *SHAPE)))
    assert torch.autograd.gradcheck(x, inputs)
    assert torch.autograd.gradgradcheck(x, inputs, rtol=1e-6, atol=1e-6)


@pytest.mark.framework("torch")
def test_torch_first_and_second_order_without_symmetry(torch, rng):
    """The adjoint is another operator, and so the bridge meets two of them."""
    solve = torch_solve(solver="gmres")

    def x(d, a, b):
        return solve(operators.compose(operators.diagonal(d), operators.dense(a)), b)[0]

    inputs = tensors(torch, rng.uniform(1, 2, 3), np.eye(3) + 0.3 * rng.standard_normal((3, 3)), rng.standard_normal(3))
    assert torch.autograd.gradcheck(x, inputs)
    assert torch.autograd.gradgradcheck(x, inputs, rtol=1e-6, atol=1e-6)


@pytest.mark.framework("torch")
def test_torch_first_and_second_order_of_least_squares(torch, rng):
    solve = torch_solve()
    for shape in ((5, 3), (3, 5)):
        inputs = tensors(torch, rng.standard_normal(shape), rng.standard_normal(shape[0]))
        x = lambda a, b: solve(operators.dense(a), b)[0]
        assert torch.autograd.gradcheck(x, inputs)
        assert torch.autograd.gradgradcheck(x, inputs, rtol=1e-6, atol=1e-6)


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings(BATCHING)
@pytest.mark.parametrize("mapped", ["b", "kernel", "kernel and b"])
def test_torch_vmap(mapped, torch, rng):
    """Over right-hand sides of a shared operator, over operators, over both; and a gradient of the mapped sum."""
    solve = torch_solve()
    shared_kernel, shared_b = "kernel" not in mapped, "b" not in mapped
    kernel = kernels(rng, *([] if shared_kernel else [3]))
    b = rng.standard_normal((*([] if shared_b else [3]), 2, *SHAPE))
    kernel, rho, b = tensors(torch, kernel, 0.5, b, grad=False)

    def loss(kernel, rho, b):
        return (solve(deblur(kernel, rho), b)[0] ** 3).sum()

    each = torch.func.grad(loss, argnums=(0, 1, 2))
    dims = (None if shared_kernel else 0, None, None if shared_b else 0)
    whole = torch.func.vmap(each, in_dims=dims)(kernel, rho, b)
    one = [each(kernel if shared_kernel else kernel[i], rho, b if shared_b else b[i]) for i in range(3)]
    for i in range(3):
        torch.testing.assert_close(whole[i], torch.stack([bars[i] for bars in one]))
    total = lambda *inputs: torch.func.vmap(loss, in_dims=dims)(*inputs).sum()
    sums = torch.func.grad(total, argnums=(0, 1, 2))(kernel, rho, b)
    for i, shared in enumerate((shared_kernel, True, shared_b)):
        torch.testing.assert_close(sums[i], whole[i].sum(0) if shared else whole[i])


@pytest.mark.framework("torch")
def test_torch_vmap_of_a_matrix_with_many_right_hand_sides(torch, rng):
    """As many right-hand sides as matrices: the mapped axes must meet each other, not the others."""
    solve = torch_solve(solver="gmres")
    a, b = tensors(torch, np.eye(4) + 0.2 * rng.standard_normal((3, 4, 4)), rng.standard_normal((3, 3, 4)), grad=False)
    loss = lambda a, b: (solve(a, b)[0] ** 3).sum()
    whole = torch.func.vmap(torch.func.grad(loss))(a, b)
    torch.testing.assert_close(whole, torch.stack([torch.func.grad(loss)(a[i], b[i]) for i in range(3)]))


@pytest.mark.framework("torch")
def test_torch_eigenpairs_of_an_operator(torch):
    from ddnref.interop.torch import differentiable

    eigsh = differentiable(ddnref.eigsh, k=2)

    def pairs(d):
        (w, v), _ = eigsh(operators.diagonal(d)._replace(self_adjoint=True))
        return w, v**2

    (d,) = tensors(torch, [1.0, 3.0, 2.0, 5.0, 4.0])
    assert torch.autograd.gradcheck(pairs, (d,))
    loss = lambda d: (pairs(d)[0] ** 2).sum()
    each = torch.func.vmap(torch.func.grad(loss))(torch.stack([d.detach(), 2 * d.detach()]))
    expected = torch.tensor([[0.0, 0, 0, 10, 8], [0, 0, 0, 20, 16]], dtype=torch.float64)
    torch.testing.assert_close(each, expected)
    (gradient,) = torch.autograd.grad(pairs(d)[1].sum() + loss(d), d, create_graph=True)
    gradient.sum().backward()
    torch.testing.assert_close(d.grad, torch.tensor([0.0, 0, 0, 2, 2], dtype=torch.float64))


@pytest.mark.framework("torch")
def test_torch_what_has_not_converged_is_nan_and_warns(torch):
    d = torch.logspace(0, 3, 12, dtype=torch.float64).requires_grad_()
    b = torch.ones(2, 12, dtype=torch.float64)
    b[0, 1:] = 0
    b.requires_grad_()
    operator = operators.diagonal(d)._replace(self_adjoint=True, positive_definite=True)
    x, info = torch_solve(maxiter=3)(operator, b)
    assert info.converged.tolist() == [True, False]
    assert torch.isnan(x).all(dim=-1).tolist() == [False, True]
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        torch.nansum(x**2).backward()
    assert torch.isnan(b.grad).all(dim=-1).tolist() == [False, True]
    assert torch.isnan(d.grad).all()


@pytest.mark.framework("torch")
def test_torch_refuses_to_record_an_operator(torch, rng):
    (kernel,) = tensors(torch, kernels(rng))
    with pytest.raises(TypeError, match=r"given to linear_solve requires grad.*interop\.torch\.differentiable"):
        ddnref.linear_solve(deblur(kernel, 0.5), torch.ones(SHAPE, dtype=torch.float64))


GRAPH = np.asarray([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [1, 4], [0, 5]])


@pytest.mark.framework("torch")
def test_torch_eigenpairs_and_systems_of_a_graph(torch, rng):
    from ddnref.interop.torch import differentiable

    eigsh = differentiable(ddnref.eigsh, k=2)
    solve = torch_solve()
    w, b = tensors(torch, rng.uniform(0.5, 2.0, len(GRAPH)), rng.standard_normal(6))

    def pairs(w):
        (values, vectors), _ = eigsh(operators.laplacian(GRAPH, w, 6))
        return values, vectors**2

    def solution(w, b):
        a = operators.laplacian(GRAPH, w, 6) + operators.diagonal(w[:6], positive_definite=True)
        return solve(a._replace(positive_definite=True), b)[0]

    assert torch.autograd.gradcheck(pairs, (w,))
    assert torch.autograd.gradcheck(solution, (w, b))
    assert torch.autograd.gradgradcheck(solution, (w, b), rtol=1e-6, atol=1e-6)
    batch = torch.stack([w.detach(), 2 * w.detach()])
    each = torch.func.vmap(torch.func.grad(lambda w: (pairs(w)[0] ** 2).sum()))(batch)
    torch.testing.assert_close(each[1], 2 * each[0])


@pytest.mark.framework("jax")
def test_jax_eigenpairs_and_systems_of_a_graph(jax, rng):
    from jax.test_util import check_grads

    from ddnref.interop.jax import differentiable

    eigsh, solve = differentiable(ddnref.eigsh, k=2), jax_solve()
    w, b = map(jax.numpy.asarray, (rng.uniform(0.5, 2.0, len(GRAPH)), rng.standard_normal(6)))

    def pairs(w):
        (values, vectors), _ = eigsh(operators.laplacian(GRAPH, w, 6))
        return values, vectors**2

    def solution(w, b):
        a = operators.laplacian(GRAPH, w, 6) + operators.diagonal(w[:6], positive_definite=True)
        return solve(a._replace(positive_definite=True), b)[0]

    check_grads(jax.jit(pairs), (w,), order=1, rtol=1e-6, atol=1e-6)
    check_grads(jax.jit(solution), (w, b), order=2, modes=["rev"], rtol=1e-6, atol=1e-6)


# --- JAX --------------------------------------------------------------------------------------------------------


def jax_solve(**options):
    from ddnref.interop.jax import differentiable

    return differentiable(ddnref.linear_solve, **{"rtol": 1e-13, **options})


@pytest.mark.framework("jax")
def test_jax_first_and_second_order_under_jit(jax, rng):
    from jax.test_util import check_grads

    solve = jax_solve()
    inputs = tuple(map(jax.numpy.asarray, (kernels(rng), 0.5, rng.standard_normal(SHAPE))))
    x = lambda kernel, rho, b: solve(deblur(kernel, rho), b)[0]
    check_grads(jax.jit(x), inputs, order=2, modes=["rev"], rtol=1e-6, atol=1e-6)


@pytest.mark.framework("jax")
def test_jax_traces_operators_of_one_structure_once(jax, monkeypatch):
    from ddnref.operators._indexed import _Laplacian

    traced, product = [], _Laplacian.apply

    def counted(self, params, x):
        traced.append(x)
        return product(self, params, x)

    for name in ("apply", "adjoint"):
        monkeypatch.setattr(_Laplacian, name, counted)
    solve, b = jax_solve(), jax.numpy.arange(6.0)

    def loss(w, edges=GRAPH):
        a = operators.laplacian(edges, w, 6) + operators.diagonal(w[:6], positive_definite=True)
        return (solve(a._replace(positive_definite=True), b)[0] ** 2).sum()

    w = jax.numpy.linspace(0.5, 2.0, len(GRAPH))
    first = jax.grad(loss)(w)
    count = len(traced)
    assert count > 0
    assert not np.allclose(jax.grad(loss)(2 * w), first)  # other numbers, of the same edges
    np.testing.assert_allclose(jax.grad(loss)(2 * w), first / 8, rtol=1e-10)
    assert len(traced) == count
    assert not np.allclose(jax.grad(loss)(w, GRAPH[::-1]), first)
    assert len(traced) > count


@pytest.mark.framework("jax")
def test_jax_operators_are_arguments_of_transforms(jax, rng):
    traced = []
    solve, b = jax_solve(), jax.numpy.asarray(rng.standard_normal(SHAPE))

    @jax.jit
    def loss(operator):
        traced.append(operator)
        return (solve(operator, b)[0] ** 2).sum()

    inputs = tuple(map(jax.numpy.asarray, (kernels(rng), 0.5)))
    operator = deblur(*inputs)
    gradient = jax.grad(loss)(operator)
    assert gradient.apply == operator.apply
    wanted = jax.grad(lambda *inputs: loss(deblur(*inputs)), argnums=(0, 1))(*inputs)
    for found, expected in zip(gradient.params, wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    count = len(traced)
    loss(deblur(2 * inputs[0], inputs[1]))
    loss(deblur(*inputs))
    jax.grad(loss)(deblur(2 * inputs[0], inputs[1]))
    assert len(traced) == count
    many = jax.vmap(lambda operator: operator @ b)(operators.convolution(jax.numpy.stack([inputs[0]] * 2), SHAPE))
    np.testing.assert_allclose(many[1], operators.convolution(inputs[0], SHAPE) @ b, rtol=1e-12)


@pytest.mark.framework("jax")
def test_jax_functions_of_the_user_are_called_each_time(jax):
    solve, state = jax_solve(), {"scale": 1.0}

    def product(params, x):
        return state["scale"] * params[0] * x

    d, b = jax.numpy.asarray([1.0, 2.0, 4.0]), jax.numpy.ones(3)
    bar = lambda params, y_bar, x: (state["scale"] * y_bar * x,)
    own = operators.LinearOperator((d,), product, product, bar, (3,), (3,), True, True)
    for operator in (own, operators.normal(own)._replace(positive_definite=True)):
        state["scale"] = 1.0
        before = solve(operator, b)[0]
        state["scale"] = 2.0
        assert not np.allclose(solve(operator, b)[0], before)


@pytest.mark.framework("jax")
def test_jax_vmap_over_right_hand_sides_and_kernels(jax, rng):
    solve = jax_solve()
    kernel, b = map(jax.numpy.asarray, (kernels(rng, 2), rng.standard_normal((2, 3, *SHAPE))))
    loss = lambda kernel, b: (solve(deblur(kernel, 0.5), b)[0] ** 3).sum()
    each = jax.jit(jax.grad(loss, argnums=(0, 1)))
    whole = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))(kernel, b)
    one = [each(kernel[i], b[i]) for i in range(2)]
    for i in range(2):
        np.testing.assert_allclose(whole[i], jax.numpy.stack([bars[i] for bars in one]), atol=1e-11)


@pytest.mark.framework("jax")
def test_jax_eigenvalues_of_an_operator(jax):
    from ddnref.interop.jax import differentiable

    eigsh = differentiable(ddnref.eigsh, k=2)
    loss = lambda d: (eigsh(operators.diagonal(d)._replace(self_adjoint=True))[0][0] ** 2).sum()
    gradient = jax.jit(jax.grad(loss))(jax.numpy.asarray([1.0, 3.0, 2.0, 5.0, 4.0]))
    np.testing.assert_allclose(gradient, [0, 0, 0, 10, 8], atol=1e-10)


@pytest.mark.framework("jax")
def test_jax_what_has_not_converged_is_nan_and_warns(jax):
    solve = jax_solve(maxiter=3)

    def loss(d):
        operator = operators.diagonal(d)._replace(self_adjoint=True, positive_definite=True)
        return (solve(operator, jax.numpy.ones(12))[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        gradient = jax.block_until_ready((gradient(jax.numpy.logspace(0, 3, 12)), jax.effects_barrier())[0])
    assert np.all(np.isnan(gradient))


# --- preconditioners and starts that depend on what is differentiated or mapped -----------------------------------

N = 8


def convection(rng):
    return np.diag(np.linspace(1, 40, N)) + rng.standard_normal((N, N)), rng.standard_normal(N)


def held(kind, a_diagonal, b, **more):
    """Options that hold values computed from the matrix."""
    return {
        "operator": {"preconditioner": operators.diagonal(1 / a_diagonal)},
        "function": {"preconditioner": lambda r: r / a_diagonal, **more},
        "start": {"x0": b / a_diagonal},
    }[kind]


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings(BATCHING)
@pytest.mark.parametrize("kind", ["operator", "function", "start"])
def test_torch_options_may_depend_on_the_matrix(kind, torch, rng):
    a, b = tensors(torch, *convection(rng), grad=False)

    def loss(a):
        solve = torch_solve(solver="gmres", **held(kind, torch.diagonal(a), b))
        return (solve(a, b)[0] ** 3).sum()

    exact = torch.func.grad(lambda a: (torch.linalg.solve(a, b) ** 3).sum())
    torch.testing.assert_close(torch.func.grad(loss)(a), exact(a))
    leaf = a.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(leaf.grad, exact(a))
    batch = torch.stack([a, 2 * a])
    if kind == "function":
        with pytest.raises(TypeError, match=r"a function that holds a tensor which torch\.func\.vmap"):
            torch.func.vmap(torch.func.grad(loss))(batch)
    else:
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(batch), torch.func.vmap(exact)(batch))


@pytest.mark.framework("jax")
@pytest.mark.parametrize("kind", ["operator", "function", "start"])
def test_jax_options_may_depend_on_the_matrix(kind, jax, rng):
    """Traced values in a closure leaked; now they are operands without a gradient."""
    a, b = map(jax.numpy.asarray, convection(rng))

    def loss(a):
        d = jax.numpy.diagonal(a)
        solve = jax_solve(solver="gmres", **held(kind, d, b, preconditioner_adjoint=lambda r: r / d))
        return (solve(a, b)[0] ** 3).sum()

    exact = jax.grad(lambda a: (jax.numpy.linalg.solve(a, b) ** 3).sum())
    each = jax.jit(jax.vmap(jax.grad(loss)))(jax.numpy.stack([a, 2 * a]))
    for i in range(2):
        np.testing.assert_allclose(each[i], exact((i + 1) * a), atol=1e-12)
    np.testing.assert_allclose(jax.grad(loss)(a), exact(a), atol=1e-12)
    if kind == "function":
        second = jax.grad(lambda a: (jax.grad(loss)(a) ** 2).sum())
        np.testing.assert_allclose(second(a), jax.grad(lambda a: (exact(a) ** 2).sum())(a), atol=1e-12)


@pytest.mark.framework("jax")
def test_the_warning_of_a_tangent_names_the_item(jax):
    """Vectors of an operator may have several axes, which are those of one item."""
    from ddnref.interop.jax import differentiable

    d = jax.numpy.asarray(np.stack([np.ones((2, 3)), np.zeros((2, 3)), np.ones((2, 3))]))
    solve = differentiable(ddnref.linear_solve, solver="cg")
    b = jax.numpy.ones((3, 2, 3))
    with pytest.warns(RuntimeWarning, match=r"A tangent is NaN \(linear_solve, item 1 of 3\)"):
        jax.jvp(lambda b: solve(operators.diagonal(d, (2, 3)), b)[0], (b,), (b,))
