"""A user's own function with its derivatives, through every bridge: written on the array API, or on NumPy alone."""

import importlib
import pickle

import array_api_compat
import numpy as np
import pytest

import ddnref
from conftest import TRACED, compiles

pytestmark = [  # of PyTorch's own forward mode
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]
FRAMEWORKS = [
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax", "autograd", "tensorflow")
]
TORCH_OR_JAX = FRAMEWORKS[:2]
COMPUTE = [None, "numpy"]


@pytest.fixture(autouse=True)
def double_precision(request):
    """The fixture of JAX turns it on."""
    if any(mark.args == ("jax",) for mark in request.node.iter_markers("framework")):
        request.getfixturevalue("jax")


def bridge(framework):
    return importlib.import_module(f"ddnref.interop.{framework}").differentiable


# --- a function of one input, and one of several, both with NumPy or any array API ------------------------------------


def softmax(x):
    xp = array_api_compat.array_namespace(x)
    e = xp.exp(x - xp.max(x))
    return e / xp.sum(e)


def softmax_vjp(y_bar, y, x):
    xp = array_api_compat.array_namespace(y)
    return y * (y_bar - xp.sum(y * y_bar))


def softmax_jvp(x_dot, y, x):
    return softmax_vjp(x_dot, y, x)  # it is symmetric


def wrong_vjp(y_bar, y, x):
    return 1.000001 * softmax_vjp(y_bar, y, x)


def affine(a, b, *, scale=1.0):
    """Two outputs of two inputs: a product, and the sum of one input."""
    return scale * (a @ b), a.sum()


def affine_vjp(y_bar, s_bar, y, s, a, b, *, scale=1.0):
    return scale * (y_bar[:, None] * b) + s_bar, scale * (a.T @ y_bar)


def affine_jvp(a_dot, b_dot, y, s, a, b, *, scale=1.0):
    return scale * (a_dot @ b + a @ b_dot), a_dot.sum()


def affine_fwd(a, b, *, scale=1.0):
    return affine(a, b, scale=scale), (a, b)


def affine_saved_vjp(y_bar, s_bar, y, s, a, b, *, scale=1.0):
    return affine_vjp(y_bar, s_bar, y, s, a, b, scale=scale)


def of_two(rng):
    return rng.standard_normal((3, 2)), rng.standard_normal(2)


def expected_gradients(a, b):
    """Gradients of ``Σ y² + 3 s`` with a scale of 2."""
    y = 2 * (a @ b)
    return 2 * np.outer(2 * y, b) + 3, 2 * (a.T @ (2 * y))


def gradients(framework, op, a, b, second_output=True):
    """The gradients of ``Σ y² + 3 s`` in the framework."""
    if framework == "torch":
        import torch

        inputs = [torch.tensor(x, requires_grad=True) for x in (a, b)]
        y, s = op(*inputs)
        found = torch.autograd.grad((y**2).sum() + 3 * s * second_output, inputs)
    elif framework == "jax":
        import jax
        import jax.numpy as jnp

        def loss(a, b):
            y, s = op(a, b)
            return jnp.sum(y**2) + 3 * s * second_output

        found = jax.grad(loss, argnums=(0, 1))(jnp.asarray(a), jnp.asarray(b))
    elif framework == "autograd":
        import autograd
        import autograd.numpy as anp

        def loss(a, b):
            y, s = op(a, b)
            return anp.sum(y**2) + 3 * s * second_output

        found = autograd.grad(loss, argnum=(0, 1))(a, b)
    else:
        import tensorflow as tf

        inputs = [tf.Variable(x) for x in (a, b)]

        @tf.function
        def of_graph():
            with tf.GradientTape() as tape:
                y, s = op(*inputs)
                loss = tf.reduce_sum(y**2) + 3 * s * second_output
            return tape.gradient(loss, inputs)

        found = of_graph()
    return [np.asarray(g.detach() if framework == "torch" else g) for g in found]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("saves", [False, True])
def test_two_inputs_and_two_outputs(framework, saves, rng):
    parts = {"vjp": affine_vjp, "jvp": affine_jvp}
    if saves:
        parts = {"vjp": affine_saved_vjp, "fwd": affine_fwd, "needs": (), "outputs": 2}
    op = bridge(framework)(affine, **parts, scale=2.0)
    a, b = of_two(rng)
    for found, expected in zip(gradients(framework, op, a, b), expected_gradients(a, b), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_output_that_the_loss_ignores_has_a_cotangent_of_zeros(framework, rng):
    op = bridge(framework)(affine, vjp=affine_vjp, scale=2.0)
    a, b = of_two(rng)
    if framework == "torch":
        import torch

        x = torch.tensor(a, requires_grad=True)
        op(x, torch.tensor(b))[1].backward()  # the product is not used at all
        torch.testing.assert_close(x.grad, torch.ones_like(x))
    a_bar, _ = gradients(framework, op, a, b, second_output=False)
    np.testing.assert_allclose(a_bar, expected_gradients(a, b)[0] - 3, rtol=1e-12)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_pickle_and_name(framework, rng):
    op = bridge(framework)(affine, vjp=affine_vjp, jvp=affine_jvp, scale=2.0)
    assert op.__name__ == "affine"
    assert op.__doc__ == affine.__doc__
    assert repr(op) == (f"ddnref.interop.{framework}.differentiable(affine, vjp=affine_vjp, jvp=affine_jvp, scale=2.0)")
    other = pickle.loads(pickle.dumps(op))
    a, b = of_two(rng)
    for found, expected in zip(gradients(framework, other, a, b), expected_gradients(a, b), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings(*TRACED)
@pytest.mark.parametrize("compute", COMPUTE)
def test_transforms_of_torch(compute, rng, torch):
    op = bridge("torch")(softmax, vjp=softmax_vjp, jvp=softmax_jvp, compute=compute)
    x = torch.tensor(rng.standard_normal(5), requires_grad=True)
    batch = torch.tensor(rng.standard_normal((3, 5)))
    assert torch.autograd.gradcheck(op, (x,), check_forward_ad=True, check_batched_grad=True)
    func = torch.func

    def expected(x):
        return torch.softmax(x, 0)

    def loss(f):
        return lambda x: (f(x) ** 2).sum()

    for transform in (
        lambda f: func.vmap(f)(batch),
        lambda f: func.vmap(func.grad(loss(f)))(batch),
        lambda f: func.jacrev(f)(batch[0]),
        lambda f: func.jacfwd(f)(batch[0]),
        lambda f: func.vmap(func.jacfwd(f))(batch),
        lambda f: func.vmap(func.vmap(func.grad(loss(f))), in_dims=1)(batch[None].movedim(0, 1)),
    ):
        torch.testing.assert_close(transform(op), transform(expected))
    if compute is None:
        torch.testing.assert_close(
            func.linearize(op, batch[0])[1](batch[1]), func.linearize(expected, batch[0])[1](batch[1])
        )
    else:
        with pytest.raises(NotImplementedError, match="linearize records softmax as a graph"):
            func.linearize(op, batch[0])
    compiled = torch.compile(loss(op), fullgraph=compute is None and compiles())
    (found,) = torch.autograd.grad(compiled(x), x)
    (wanted,) = torch.autograd.grad(loss(expected)(x), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.framework("torch")
def test_second_derivatives_in_torch(rng, torch):
    op = bridge("torch")(softmax, vjp=softmax_vjp, jvp=softmax_jvp)
    x = torch.tensor(rng.standard_normal(5), requires_grad=True)
    assert torch.autograd.gradgradcheck(op, (x,))
    loss = lambda f: lambda x: (f(x) ** 3).sum()
    for outer in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        torch.testing.assert_close(outer(loss(op))(x.detach()), outer(loss(lambda x: torch.softmax(x, 0)))(x.detach()))
    there = bridge("torch")(softmax, vjp=softmax_vjp, jvp=softmax_jvp, compute="numpy")
    with pytest.raises(NotImplementedError, match="leave out compute='numpy'"):
        torch.autograd.grad(torch.autograd.grad(there(x)[0], x, create_graph=True)[0].sum(), x)


@pytest.mark.framework("jax")
@pytest.mark.parametrize("compute", COMPUTE)
def test_transforms_of_jax(compute, rng):
    import jax
    import jax.numpy as jnp

    op = bridge("jax")(softmax, vjp=softmax_vjp, jvp=softmax_jvp, compute=compute)
    x, batch = jnp.asarray(rng.standard_normal(5)), jnp.asarray(rng.standard_normal((3, 5)))

    def loss(f):
        return lambda x: jnp.sum(f(x) ** 3)

    for transform in (
        lambda f: jax.grad(loss(f))(x),
        lambda f: jax.jit(jax.grad(loss(f)))(x),
        lambda f: jax.jit(jax.vmap(jax.grad(loss(f))))(batch),
        lambda f: jax.vmap(jax.jacfwd(f))(batch),
        lambda f: jax.jit(jax.jacrev(f))(x),
        lambda f: jax.jvp(f, (x,), (batch[0],))[1],
        lambda f: jax.lax.map(jax.grad(loss(f)), batch),
    ):
        np.testing.assert_allclose(transform(op), transform(jax.nn.softmax), rtol=1e-12, atol=1e-15)
    hessian = lambda f: jax.jit(jax.hessian(loss(f)))(x)
    twice = lambda f: jax.grad(lambda x: jnp.sum(jax.grad(loss(f))(x) ** 2))(x)
    for second in (hessian, twice):
        if compute is None:
            np.testing.assert_allclose(second(op), second(jax.nn.softmax), rtol=1e-12, atol=1e-15)
        else:
            with pytest.raises(NotImplementedError, match="leave out compute="):
                second(op)


@pytest.mark.framework("jax")
def test_a_pair_without_jvp_in_jax_has_reverse_mode_only(rng):
    import jax
    import jax.numpy as jnp

    op, x = bridge("jax")(softmax, vjp=softmax_vjp), jnp.asarray(rng.standard_normal(5))
    loss = lambda f: lambda x: jnp.sum(f(x) ** 3)
    np.testing.assert_allclose(jax.jit(jax.grad(loss(op)))(x), jax.grad(loss(jax.nn.softmax))(x), rtol=1e-13)
    for transform in (lambda f: jax.jvp(f, (x,), (x,)), lambda f: jax.jacrev(jax.grad(loss(f)))(x)):
        with pytest.raises(NotImplementedError, match=r"tangent of softmax was asked for.*second derivative.*jvp="):
            transform(op)


def only_numpy(x):
    """Code that takes nothing but NumPy arrays of one item."""
    assert isinstance(x, np.ndarray)
    assert x.ndim == 2
    return np.linalg.inv(x)


def only_numpy_vjp(y_bar, y):
    assert isinstance(y_bar, np.ndarray)
    return -(y.T @ y_bar @ y.T)


def inverse_of_all(x):
    assert x.ndim == 3, "all items at once"
    return np.linalg.inv(x)


def inverse_of_all_vjp(y_bar, y):
    return -(y.mT @ y_bar @ y.mT)


@pytest.mark.parametrize("framework", TORCH_OR_JAX)
def test_a_mapped_function_of_numpy_is_called_for_each_item_or_for_all(framework, rng):
    x = np.eye(3) + 0.1 * rng.standard_normal((4, 3, 3))
    for function, vjp, batched in ((only_numpy, only_numpy_vjp, False), (inverse_of_all, inverse_of_all_vjp, True)):
        shapes = {"shapes": lambda x: x} if batched else {}
        op = bridge(framework)(function, vjp=vjp, needs=(), compute="numpy", batched=batched, **shapes)
        if framework == "torch":
            import torch

            found = torch.func.vmap(torch.func.grad(lambda x, op=op: op(x).sum()))(torch.tensor(x))
        else:
            import jax
            import jax.numpy as jnp

            found = jax.jit(jax.vmap(jax.grad(lambda x, op=op: jnp.sum(op(x)))))(jnp.asarray(x))
        np.testing.assert_allclose(found, inverse_of_all_vjp(np.ones_like(x), np.linalg.inv(x)), rtol=1e-12)


@pytest.mark.framework("jax")
def test_shapes_that_no_trial_finds_are_given(rng):
    import jax
    import jax.numpy as jnp

    def factor(x):  # random numbers are not positive definite
        return np.linalg.cholesky(x)

    vjp = lambda y_bar, y, x: ddnref.cholesky_vjp(np.tril(y_bar), y)
    x = jnp.asarray(np.eye(3) + 0.1)
    op = bridge("jax")(factor, vjp=vjp, compute="numpy")
    np.testing.assert_allclose(op(x), np.linalg.cholesky(x))  # outside of a graph there are values
    with pytest.raises(ValueError, match=r"A graph has to know the shapes that factor returns.*Pass shapes="):
        jax.jit(op)(x)
    op = bridge("jax")(factor, vjp=vjp, compute="numpy", shapes=lambda x: x)
    expected = jax.grad(lambda x: jnp.sum(jnp.linalg.cholesky(x)))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: jnp.sum(op(x))))(x), expected, rtol=1e-12)


@pytest.mark.framework("jax")
def test_a_function_of_numpy_keeps_single_precision_in_a_graph():
    import jax
    import jax.numpy as jnp

    doubles = bridge("jax")(
        lambda x: np.asarray(x, np.float64) * 2, vjp=lambda y_bar, y, x: 2 * np.asarray(y_bar, np.float64),
        compute="numpy", shapes=lambda x: x,
    )  # fmt: skip
    found = jax.jit(jax.grad(lambda x: jnp.sum(doubles(x))))(jnp.ones(3, jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 2)


@pytest.mark.framework("torch")
def test_many_inputs_integers_and_returned_inputs(torch, rng):
    x = torch.tensor(rng.standard_normal(4), requires_grad=True)
    differentiable = bridge("torch")
    total = differentiable(lambda *xs: sum(xs), vjp=lambda y_bar, *rest: (y_bar,) * (len(rest) - 1))
    assert torch.autograd.gradcheck(total, (x, x, x))
    assert torch.autograd.gradcheck(total, (x, x))
    take = differentiable(
        lambda x, i: x[i], vjp=lambda y_bar, y, x, i: (torch.zeros_like(x).index_add(0, i, y_bar), None)
    )
    assert torch.autograd.gradcheck(take, (x, torch.tensor([2, 0, 2])))
    same = differentiable(lambda x: x, vjp=lambda y_bar, y, x: 2 * y_bar)  # a wrong derivative shows which one is used
    torch.testing.assert_close(torch.func.grad(lambda x: same(x).sum())(x.detach()), torch.full((4,), 2.0).double())
    transposed = differentiable(lambda x: x.mT, vjp=lambda y_bar, y, x: y_bar.mT, jvp=lambda x_dot, y, x: x_dot.mT)
    assert torch.autograd.gradcheck(transposed, (x.reshape(2, 2),), check_forward_ad=True)


@pytest.mark.framework("torch")
def test_saved_arrays_are_refused_in_second_derivatives_and_may_be_outputs(torch, rng):
    def fwd(x):
        y = 2 * x
        return y, (y, x, y.argmax())

    op = bridge("torch")(lambda x: 2 * x, fwd=fwd, vjp=lambda y_bar, y, y_too, x, i: 2 * y_bar * x / x, needs=())
    x = torch.tensor(rng.standard_normal(4), requires_grad=True)
    assert torch.autograd.gradcheck(op, (x,))
    assert torch.func.vmap(torch.func.grad(lambda x: op(x).sum()))(x.detach().reshape(2, 2)).shape == (2, 2)
    with pytest.raises(NotImplementedError, match="fwd= saves arrays with unknown derivatives"):
        torch.autograd.grad(torch.autograd.grad(op(x).sum(), x, create_graph=True)[0].sum(), x)


@pytest.mark.framework("jax")
def test_saved_arrays_are_refused_in_second_derivatives_of_jax():
    import jax
    import jax.numpy as jnp

    fwd = lambda x: (2 * x, (x,))
    op = bridge("jax")(
        lambda x: 2 * x, fwd=fwd, vjp=lambda y_bar, y, x: 2 * y_bar * x / x, jvp=lambda x_dot, y, x: 2 * x_dot * x / x,
        needs=(),
    )  # fmt: skip
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: jnp.sum(op(x))))(jnp.ones(3)), 2)
    for second in (jax.hessian, lambda f: jax.jacrev(jax.grad(f)), lambda f: jax.jit(jax.hessian(f))):
        with pytest.raises(NotImplementedError, match="fwd= saves arrays with unknown derivatives"):
            second(lambda x: jnp.sum(op(x)) ** 2)(jnp.ones(3))


@pytest.mark.framework("jax")
def test_integers_among_inputs_and_outputs_of_jax():
    import jax
    import jax.numpy as jnp

    largest = bridge("jax")(
        lambda x, i: (x.max(), x.argmax() + i),
        vjp=lambda y_bar, i_bar, y, k, x, i: (jnp.zeros_like(x).at[k - i].set(y_bar), None),
        jvp=lambda x_dot, i_dot, y, k, x, i: (x_dot[k - i], None),
    )  # fmt: skip
    x, i = jnp.arange(3.0), jnp.asarray(5)
    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
        np.testing.assert_array_equal(derivative(lambda x: largest(x, i)[0])(x), [0, 0, 1])


@pytest.mark.framework("torch")
def test_an_operator_is_an_input_like_any_other(torch, rng):
    def energy(a, x):
        return (x * (a @ x)).sum()

    def energy_vjp(y_bar, y, a, x):
        return a.params_vjp(a.params, y_bar * x, x), y_bar * ((a @ x) + (a.H @ x))

    op = bridge("torch")(energy, vjp=energy_vjp)
    d, x = (torch.tensor(rng.standard_normal(4), requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda d, x: op(ddnref.operators.diagonal(d), x), (d, x))


# --- the same object in the checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_checks_take_the_bridged_function(framework, rng):
    x, (a, b) = rng.standard_normal(5), of_two(rng)
    differentiable = bridge(framework)
    op = differentiable(softmax, vjp=softmax_vjp, jvp=softmax_jvp)
    check = ddnref.testing
    assert check.check_vjp(op, x).passed
    assert check.check_jvp(op, x).passed
    assert check.check_transpose(op, x).passed
    assert not check.check_vjp(differentiable(softmax, vjp=wrong_vjp), x).passed
    two = differentiable(affine, vjp=affine_vjp, jvp=affine_jvp, scale=2.0)
    assert check.assert_vjp(two, a, b).passed
    assert check.assert_jvp(two, a, b).passed
    saving = differentiable(affine, vjp=affine_saved_vjp, fwd=affine_fwd, needs=(), outputs=2)
    assert check.check_vjp(saving, a, b).passed
    assert check.check_vjp(differentiable(ddnref.sqrtm), a.T @ a + np.eye(2), symmetrises=True).passed
    ignoring = differentiable(lambda a, b: 2 * a, vjp=lambda y_bar, y, a, b: (2 * y_bar, None))
    assert check.check_vjp(ignoring, a, b).passed  # no gradient counts as zeros
    with pytest.raises(TypeError, match=r"f_vjp is a numpy\.ndarray, expected a function"):
        check.check_vjp(softmax, x)


# --- what does not fit is said at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"vjp": lambda y_bar, y: y_bar},
            r"VJP of softmax takes 2 arrays.* 1 of 1 input.*needs= names, by default all",
        ),
        ({"vjp": 3}, "vjp is 3, expected a function"),
        ({"vjp": softmax_vjp, "jvp": lambda x_dot, y: x_dot}, "JVP of softmax takes 2 arrays, expected 3"),
        ({"vjp": softmax_vjp, "rank": 2}, "rank is no option of differentiable, and neither softmax"),
        ({"vjp": softmax_vjp, "outputs": 2}, "VJP of softmax takes 3 arrays"),
    ],
)
def test_signatures_that_do_not_fit(framework, parts, message):
    with pytest.raises(TypeError, match=message):
        bridge(framework)(softmax, **parts)


@pytest.mark.framework("torch")
def test_values_that_do_not_fit(torch):
    differentiable, x = bridge("torch"), torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"needs is \(2,\), but softmax has 1 input"):
        differentiable(softmax, vjp=softmax_vjp, needs=(2,))
    with pytest.raises(TypeError, match="needs is 0, expected a sequence of positions"):
        differentiable(softmax, vjp=softmax_vjp, needs=0)
    with pytest.raises(TypeError, match=r"returned 2 array\(s\), expected 1: pass outputs=2"):
        differentiable(lambda x: (x, x), vjp=lambda y_bar, y, x: y_bar)(x)
    with pytest.raises(TypeError, match="returned a float, expected an array"):
        differentiable(lambda x: 3.0, vjp=lambda y_bar, y, x: y_bar)(x)
    with pytest.raises(TypeError, match="returned 2 cotangents for 1 inputs"):
        differentiable(softmax, vjp=lambda y_bar, y, x: (y_bar, y))(x).sum().backward()
    with pytest.raises(ValueError, match=r"cotangent of input 0 with shape \(\), expected \(3,\)"):
        differentiable(softmax, vjp=lambda y_bar, y, x: y_bar.sum())(x).sum().backward()
    op = differentiable(softmax, vjp=softmax_vjp, jvp=lambda x_dot, y, x: x_dot.sum())
    with pytest.raises(ValueError, match=r"tangent of output 0 with shape \(\), expected \(3,\)"):
        torch.func.jvp(op, (x.detach(),), (x.detach(),))
    with pytest.raises(TypeError, match=r"x is a builtins\.float; pass a PyTorch tensor"):
        differentiable(softmax, vjp=softmax_vjp)(3.0)
    with pytest.raises(TypeError, match="has no rule; pass vjp= with a function of yours, or one of"):
        differentiable(softmax)


@pytest.mark.framework("jax")
@pytest.mark.parametrize("compute", COMPUTE)
def test_numbers_of_python_in_jax(compute):
    import jax

    cube = bridge("jax")(
        lambda x: x**3, vjp=lambda y_bar, y, x: 3 * x**2 * y_bar, jvp=lambda x_dot, y, x: 3 * x**2 * x_dot,
        compute=compute,
    )  # fmt: skip
    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
        assert float(derivative(cube)(2.0)) == 12
    if compute is None:
        assert float(jax.hessian(cube)(2.0)) == 12


@pytest.mark.framework("torch")
def test_vmap_over_an_empty_batch(torch):
    f = bridge("torch")(
        lambda x: (2 * x, x.sum(), x[0]), vjp=lambda a, b, c, *y: 2 * a + b, outputs=3, needs=(), compute="numpy"
    )
    empty = torch.ones(0, 3, dtype=torch.float64)
    assert [tuple(y.shape) for y in torch.func.vmap(f)(empty)] == [(0, 3), (0,), (0,)]
    assert torch.func.vmap(torch.func.grad(lambda x: f(x)[1]))(empty).shape == (0, 3)


@pytest.mark.framework("jax")
@pytest.mark.parametrize("compute", COMPUTE)
def test_a_gradient_has_the_dtype_of_its_input(compute):
    import jax
    import jax.numpy as jnp

    xp = np if compute else jnp
    vjp = lambda y_bar, y, x: xp.asarray(3 * x**2 * y_bar, dtype=xp.complex128) + 1j
    wide = bridge("jax")(lambda x: (x**3).sum(), vjp=vjp, compute=compute)
    for gradient in (jax.grad(wide), jax.jit(jax.grad(wide))):
        found = gradient(jnp.ones(2, jnp.float32))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, 3)


@pytest.mark.framework("torch")
def test_what_is_no_array_is_said(torch):
    differentiable, x = bridge("torch"), torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match="returned the cotangent of input 0 as a float, expected an array"):
        differentiable(lambda x: x.sum(), vjp=lambda y_bar, y, x: 2.0)(x).backward()
    with pytest.raises(TypeError, match="returned a list, expected an array or a tuple"):
        differentiable(lambda x: [x, x], vjp=lambda a, b, y, z, x: a)(x)
    with pytest.raises(TypeError, match="vjp is None, expected a function"):
        differentiable(lambda x: x, vjp=None)


WITH_COMPUTE = [
    pytest.param(f.values[0], c, marks=f.marks) for f in FRAMEWORKS for c in (COMPUTE if f in TORCH_OR_JAX else [None])
]


@pytest.mark.parametrize(("framework", "compute"), WITH_COMPUTE)
def test_needs_may_be_in_any_order(framework, compute, rng):
    """All inputs, but the last one first."""
    options = {"compute": compute} if compute else {}
    vjp = lambda y_bar, s_bar, y, s, b, a: affine_vjp(y_bar, s_bar, y, s, a, b, scale=2.0)
    op = bridge(framework)(lambda a, b: affine(a, b, scale=2.0), vjp=vjp, needs=(1, 0), outputs=2, **options)
    a, b = of_two(rng)
    for found, expected in zip(gradients(framework, op, a, b), expected_gradients(a, b), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13)
