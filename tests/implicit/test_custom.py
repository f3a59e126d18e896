"""Solvers of a user's, differentiable by the condition of their solution: `custom_root` and `custom_argmin`."""

import importlib
import pickle
import warnings

import numpy as np
import pytest
import scipy.optimize

import ddnref
from conftest import TRACED
from ddnref.errors import ConvergenceError, OptimalityError, SingularError
from ddnref.implicit import custom_argmin, custom_root

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]
AXES = [None, 1]
N = 5


def equilibrium_problem(rng):
    """x, W, U and b of ``z = tanh(W z + U x + b)``, W not symmetric and of norm below one."""
    w = rng.standard_normal((N, N))
    return (
        rng.standard_normal((4, 3)),
        0.5 * w / np.linalg.norm(w, 2),
        rng.standard_normal((N, 3)),
        rng.standard_normal(N),
    )


def iterated(tanh, zeros):
    """Cell and solver by fixed-point steps, in a library."""

    def cell(z, x, w, u, b):
        return tanh(z @ w.T + x @ u.T + b)

    def solver(x, w, u, b, *, z0=None, steps=60):
        z = zeros((*x.shape[:-1], N), x) if z0 is None else z0
        for _ in range(steps):
            z = cell(z, x, w, u, b)
        return z

    return cell, solver


def in_torch(torch):
    return iterated(torch.tanh, lambda shape, x: torch.zeros(shape, dtype=x.dtype))


def in_jax():
    import jax.numpy as jnp

    return iterated(jnp.tanh, lambda shape, x: jnp.zeros(shape, x.dtype))


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings(*TRACED)
@pytest.mark.parametrize("axes", AXES)
def test_an_equilibrium_in_torch(axes, torch, rng):
    cell, solver = in_torch(torch)
    equilibrium = custom_root(lambda z, *p: z - cell(z, *p), axes=axes, solve_rtol=1e-13)(solver)
    x, w, u, b = (torch.tensor(a, requires_grad=True) for a in equilibrium_problem(rng))
    assert torch.autograd.gradcheck(equilibrium, (x, w, u, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(equilibrium, (x, w, u, b))

    def loss(f):
        return lambda b: (f(x, w, u, b) ** 3).sum()

    func, point = torch.func, b.detach()
    torch.testing.assert_close(func.hessian(loss(equilibrium))(point), func.hessian(loss(solver))(point))
    samples = torch.tensor(rng.standard_normal((3, 4, 3)))
    each = lambda f: func.vmap(func.grad(lambda x: (f(x, w, u, b) ** 3).sum()))(samples)
    torch.testing.assert_close(each(equilibrium), each(solver))
    # Options have no gradient and no influence on the solution.
    start = torch.ones(4, N, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(equilibrium(x, w, u, b, z0=start), equilibrium(x, w, u, b))
    compiled = torch.compile(loss(equilibrium))
    (found,) = torch.autograd.grad(compiled(b), b)
    torch.testing.assert_close(found, torch.autograd.grad(loss(solver)(b), b)[0])


@pytest.mark.framework("jax")
@pytest.mark.parametrize("axes", AXES)
def test_an_equilibrium_in_jax(axes, jax, rng):
    import jax.numpy as jnp

    cell, solver = in_jax()
    equilibrium = custom_root(lambda z, *p: z - cell(z, *p), axes=axes, solve_rtol=1e-13)(solver)
    x, w, u, b = map(jnp.asarray, equilibrium_problem(rng))

    def loss(f):
        return lambda w: jnp.sum(f(x, w, u, b) ** 3)

    expected = jax.grad(loss(solver))(w)
    for derivative in (jax.grad, lambda f: jax.jit(jax.grad(f)), jax.jacfwd):
        np.testing.assert_allclose(derivative(loss(equilibrium))(w), expected, rtol=1e-7, atol=1e-9)
    second = lambda f: lambda b: jax.hessian(lambda b: jnp.sum(f(x, w, u, b) ** 3))(b)
    np.testing.assert_allclose(jax.jit(second(equilibrium))(b), second(solver)(b), rtol=1e-6, atol=1e-7)
    samples = jnp.asarray(rng.standard_normal((3, 4, 3)))
    each = lambda f: jax.vmap(jax.grad(lambda x: jnp.sum(f(x, w, u, b) ** 3)))(samples)
    np.testing.assert_allclose(each(equilibrium), each(solver), rtol=1e-7, atol=1e-9)


# --- NumPy: the user writes the derivatives of the residual ----------------------------------------------------------


def numpy_equilibrium(axes=1, wrong=1.0):
    cell, solver = iterated(np.tanh, lambda shape, x: np.zeros(shape))

    def residual_vjp(r_bar, z, x, w, u, b):
        s = -wrong * (1 - cell(z, x, w, u, b) ** 2) * r_bar
        return r_bar + s @ w / wrong, s @ u, s.T @ z, s.T @ x, s.sum(axis=0)

    def residual_jvp(z_dot, x_dot, w_dot, u_dot, b_dot, z, x, w, u, b):
        moved = z_dot @ w.T + z @ w_dot.T + x_dot @ u.T + x @ u_dot.T + b_dot
        return z_dot - (1 - cell(z, x, w, u, b) ** 2) * moved

    return custom_root(
        lambda z, *p: z - cell(z, *p), residual_vjp=residual_vjp, residual_jvp=residual_jvp, axes=axes,
        solve_rtol=1e-13,
    )(solver)  # fmt: skip


@pytest.mark.parametrize("axes", AXES)
def test_numpy_with_derivatives_of_the_user(axes, rng):
    f = numpy_equilibrium(axes)
    arrays = equilibrium_problem(rng)
    check = ddnref.testing
    vjp = lambda y_bar, y, *p: f.vjp(y_bar, y, *p)[0]
    jvp = lambda *p: f.jvp(*p)[0]
    assert check.check_vjp(f, vjp, *arrays, needs=range(4)).passed
    assert check.check_jvp(f, jvp, *arrays, needs=range(4)).passed
    assert check.check_transpose(f, jvp, vjp, *arrays, needs=range(4), rtol=1e-11).passed
    broken = numpy_equilibrium(axes, wrong=1.00001)
    assert not check.check_vjp(broken, lambda *p: broken.vjp(*p)[0], *arrays, needs=range(4)).passed


@pytest.mark.framework("autograd")
def test_autograd_uses_them(rng):
    import autograd
    import autograd.numpy as anp

    from ddnref.interop.autograd import differentiable

    f = numpy_equilibrium()
    x, w, u, b = equilibrium_problem(rng)
    y = f(x, w, u, b)
    expected = f.vjp(3 * y**2, y, x, w, u, b)[0][1]
    found = autograd.grad(lambda w: anp.sum(differentiable(f)(x, w, u, b) ** 3))(w)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.framework("tensorflow")
def test_tensorflow_uses_them(rng):
    import tensorflow as tf

    from ddnref.interop.tensorflow import differentiable

    f = numpy_equilibrium()
    x, w, u, b = equilibrium_problem(rng)
    y = f(x, w, u, b)
    variable = tf.Variable(w)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(differentiable(f)(x, variable, u, b) ** 3)
    np.testing.assert_allclose(tape.gradient(loss, variable), f.vjp(3 * y**2, y, x, w, u, b)[0][1], rtol=1e-12)


# --- minima ------------------------------------------------------------------------------------------------------


@pytest.mark.framework("torch")
@pytest.mark.parametrize("as_gradient", [False, True])
def test_a_minimum_in_torch(as_gradient, torch, rng):
    t = torch.tensor(np.sign(rng.standard_normal(20)))

    def objective(w, a, lam):
        return torch.log1p(torch.exp(-t * (a @ w))).sum() + lam * (w**2).sum() / 2

    def slope(w, a, lam):
        return -(t * torch.sigmoid(-t * (a @ w))) @ a + lam * w

    def newton(a, lam):
        w = torch.zeros(a.shape[1], dtype=a.dtype)
        for _ in range(20):
            p = torch.sigmoid(t * (a @ w))
            h = (a.mT * (p * (1 - p))) @ a + lam * torch.eye(len(w), dtype=a.dtype)
            w = w - torch.linalg.solve(h, slope(w, a, lam))
        return w

    maker = (
        custom_argmin(gradient=slope, solve_rtol=1e-13) if as_gradient else custom_argmin(objective, solve_rtol=1e-13)
    )
    fit = maker(newton)
    a, lam = (
        torch.tensor(rng.standard_normal((20, 3)), requires_grad=True),
        torch.tensor(0.3, requires_grad=True).double(),
    )
    assert torch.autograd.gradcheck(fit, (a, lam), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fit, (a, lam))


def quadratic_program(q, c, g, h, e=None, f=None):
    """Solve ``min ½ yᵀQy + cᵀy`` subject to ``G y ≤ h`` and ``E y = f`` by SciPy, then exactly on the active set."""
    q = (q + q.T) / 2
    bounds = [{"type": "ineq", "fun": lambda y: h - g @ y, "jac": lambda y: -g}]
    if e is not None:
        bounds.append({"type": "eq", "fun": lambda y: e @ y - f, "jac": lambda y: e})
    y = scipy.optimize.minimize(
        lambda y: y @ q @ y / 2 + c @ y, np.zeros(len(c)), jac=lambda y: q @ y + c, constraints=bounds, method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    ).x  # fmt: skip
    active = h - g @ y < 1e-7
    rows = g[active] if e is None else np.concatenate([g[active], e])
    right = h[active] if e is None else np.concatenate([h[active], f])
    k = len(right)
    system = np.block([[q, rows.T], [rows, np.zeros((k, k))]])
    return np.linalg.solve(system, np.concatenate([-c, right]))[: len(c)]


def program(rng, equalities):
    """A random program at whose solution one inequality is active and another is not."""
    while True:
        m = rng.standard_normal((5, 5))
        q, c, g = m @ m.T + np.eye(5), 3 * rng.standard_normal(5), rng.standard_normal((3, 5))
        data = [q, c, g, 0.01 * rng.random(3) - 0.3]
        data += [rng.standard_normal((1, 5)), rng.standard_normal(1)] if equalities else []
        slack = data[3] - g @ quadratic_program(*data)
        if np.any(np.abs(slack) < 1e-9) and np.any(slack > 1e-2) and np.all(slack > -1e-9):
            return data


def qp_layer(library, equalities):
    def objective(y, q, c, *_):
        return 0.5 * (y * (q @ y)).sum() + (c * y).sum()

    options = {"inequality": lambda y, q, c, g, h, *_: g @ y - h}
    if equalities:
        options["equality"] = lambda y, q, c, g, h, e, f: e @ y - f
    as_array = library.asarray
    return custom_argmin(objective, **options)(
        lambda *data: as_array(
            quadratic_program(*(np.asarray(x.detach() if hasattr(x, "detach") else x) for x in data))
        )
    )


@pytest.mark.framework("torch")
@pytest.mark.parametrize("equalities", [False, True])
def test_a_quadratic_program_in_torch(equalities, torch, rng):
    data = [torch.tensor(x, requires_grad=True) for x in program(rng, equalities)]
    layer = qp_layer(torch, equalities)
    slack = data[3] - data[2] @ layer(*data)
    assert (slack < 1e-9).any()
    assert (slack > 1e-3).any()  # an active and a free constraint
    assert torch.autograd.gradcheck(layer, data, check_forward_ad=True)
    each = torch.func.vmap(torch.func.grad(lambda c: layer(data[0], c, *data[2:]).sum()))
    costs = torch.stack([data[1], 1.1 * data[1]]).detach()
    one_by_one = [torch.func.grad(lambda c: layer(data[0], c, *data[2:]).sum())(c) for c in costs]
    torch.testing.assert_close(each(costs), torch.stack(one_by_one))
    with pytest.raises(NotImplementedError, match="a minimum under constraints"):
        torch.autograd.grad(torch.autograd.grad(layer(*data).sum(), data[1], create_graph=True)[0].sum(), data[1])


@pytest.mark.framework("jax")
@pytest.mark.parametrize("equalities", [False, True])
def test_a_quadratic_program_in_jax(equalities, jax, rng):
    import jax.numpy as jnp

    data = program(rng, equalities)
    layer = qp_layer(jnp, equalities)
    places = tuple(range(len(data)))
    found = jax.grad(lambda *p: jnp.sum(layer(*p) ** 2), argnums=places)(*map(jnp.asarray, data))
    report = ddnref.testing.check_vjp(
        lambda *p: np.sum(quadratic_program(*p) ** 2),
        lambda y_bar, y: tuple(np.asarray(x) * y_bar for x in found),
        *data,
    )
    assert report.passed, report
    with pytest.raises(NotImplementedError, match="a minimum under constraints"):
        jax.hessian(lambda c: jnp.sum(layer(jnp.asarray(data[0]), c, *map(jnp.asarray, data[2:])) ** 2))(
            jnp.asarray(data[1])
        )


# --- points that are no solutions, and what else is refused --------------------------------------------------------


@pytest.mark.framework("torch")
def test_an_inexact_solution_is_corrected_and_a_wrong_one_refused(torch):
    def of(factor):
        return custom_root(lambda y, x: y * y - x, axes=0)(lambda x: factor * x.sqrt())

    x = torch.tensor([4.0, 9.0], dtype=torch.float64, requires_grad=True)
    exact = 0.5 / x.detach().sqrt()
    (x_bar,) = torch.autograd.grad(of(1.001)(x).sum(), x)
    assert float(((x_bar - exact) / exact).abs().max()) < 1e-6  # where the solution is wrong by 1e-3
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        (x_bar,) = torch.autograd.grad(of(1.5)(x).sum(), x)
    assert x_bar.isnan().all()
    f, point = of(1.5), x.detach()
    with pytest.raises(OptimalityError, match="does not satisfy its condition"):
        f.vjp(torch.ones(2).double(), f(point), point)
    some = custom_root(lambda y, x: y * y - x, axes=0)(lambda x: x.sqrt() * torch.tensor([1.0, 1.5]))
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        (x_bar,) = torch.autograd.grad(some(x).sum(), x)
    torch.testing.assert_close(x_bar[0], exact[0])  # one bad item does not spoil the other
    assert x_bar[1].isnan()


def test_a_singular_jacobian_is_an_error():
    f = custom_root(
        lambda y, x: y**2 * 0 + 0 * x, residual_vjp=lambda w, y, x: (0 * w, w), residual_jvp=lambda a, b, y, x: b
    )(lambda x: x)
    with pytest.raises((ConvergenceError, OptimalityError, SingularError)):
        f.vjp(np.ones(2), np.ones(2), np.ones(2))
    x_bar, _ = f.vjp(np.ones(2), np.ones(2), np.ones(2), throw=False)
    assert np.isnan(x_bar).all()


@pytest.mark.framework("torch")
def test_a_tensor_in_a_closure_is_refused(torch):
    hidden = torch.ones(2, dtype=torch.float64, requires_grad=True)
    f = custom_root(lambda y, x: y - hidden * x)(lambda x: hidden * x)
    with pytest.raises(TypeError, match="requires grad and is not among its inputs"):
        f(torch.ones(2, dtype=torch.float64))


@pytest.mark.framework("torch")
def test_integers_are_inputs_without_gradient(torch, rng):
    take = custom_root(lambda y, x, i: y - x[i])(lambda x, i: x[i])
    x = torch.tensor(rng.standard_normal(3), requires_grad=True)
    assert torch.autograd.gradcheck(take, (x, torch.tensor([0, 0, 2])), check_forward_ad=True)


def test_what_is_missing_is_named():
    x = np.asarray([4.0, 9.0])
    f = custom_root(lambda y, x: y * y - x)(np.sqrt)
    assert repr(f) == "<sqrt, differentiable by its root>"
    np.testing.assert_array_equal(f(x), [2, 3])
    with pytest.raises(TypeError, match=r"residual_jvp is missing.*only PyTorch and JAX"):
        f.vjp(np.ones(2), f(x), x)
    with pytest.raises(TypeError, match="x_dot\\[0\\] are all None: there is no direction"):
        f.jvp(None, f(x), x)
    with pytest.raises(TypeError, match=r"sqrt\.jvp got 2 arrays, expected \*x_dots, y, \*inputs"):
        f.jvp(f(x), x)
    with pytest.raises(ValueError, match=r"y_bar has shape \(3,\), expected \(2,\)"):
        f.vjp(np.ones(3), f(x), x)
    unused = {"residual_vjp": of_square_vjp, "residual_jvp": of_square_jvp}
    short = custom_root(lambda y, x: y[:1], **unused)(np.sqrt)
    with pytest.raises(ValueError, match="as many equations as unknowns"):
        short.vjp(np.ones(2), f(x), x)
    with pytest.raises(TypeError, match="either an objective or gradient="):
        custom_argmin()
    with pytest.raises(TypeError, match="With constraints custom_argmin takes an objective"):
        custom_argmin(gradient=lambda y, x: y, equality=lambda y, x: y)
    limited = custom_argmin(lambda y, x: y, inequality=lambda y, x: y)(lambda x: x)
    with pytest.raises(TypeError, match="only PyTorch and JAX differentiate functions by themselves"):
        limited.vjp(np.ones(2), np.ones(2), np.ones(2))
    complex_root = custom_root(lambda y, x: y - x, **unused)(lambda x: x)
    with pytest.raises(TypeError, match="complex"):
        complex_root.vjp(np.ones(2) + 0j, np.ones(2) + 0j, np.ones(2) + 0j)


def of_square(y, x):
    return y * y - x


def of_square_vjp(w, y, x):
    return 2 * y * w, -w


def of_square_jvp(y_dot, x_dot, y, x):
    return 2 * y * y_dot - x_dot


def square_root(x):
    return np.sqrt(x)


def test_an_implicit_function_can_be_pickled():
    f = custom_root(of_square, residual_vjp=of_square_vjp, residual_jvp=of_square_jvp, axes=0)(square_root)
    other = pickle.loads(pickle.dumps(f))
    assert other.__name__ == "square_root"
    x = np.asarray([4.0, 9.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(other.vjp(np.ones(2), other(x), x)[0], 0.5 / np.sqrt(x), rtol=1e-7)


@pytest.mark.framework("torch")
def test_a_bridge_knows_an_operator_again(torch, rng):
    """The operators of two calls are equal, so that nothing is built a second time."""
    cell, solver = in_torch(torch)
    equilibrium = custom_root(lambda z, *p: z - cell(z, *p))(solver)
    arrays = tuple(map(torch.tensor, equilibrium_problem(rng)))
    operators = [equilibrium.condition.operator(solver(*arrays), arrays, True)._replace(params=()) for _ in range(2)]
    assert operators[0] == operators[1]
    assert hash(operators[0]) == hash(operators[1])


# --- options, names and transformations -------------------------------------------------------------------------------


def signed_root(x, sign=1.0, start=None):
    import jax.numpy as jnp

    return sign * jnp.sqrt(x) + (0 if start is None else 0 * start)


@pytest.mark.framework("jax")
def test_options_of_a_call_are_kept_by_transformations_of_jax(jax):
    """JAX may call the solver after the function has returned."""
    import jax.numpy as jnp

    root, x = custom_root(of_square, axes=0)(signed_root), jnp.asarray([4.0, 9.0])
    f = lambda x: jnp.sum(root(x, sign=-1.0))
    for transform in (
        jax.value_and_grad,
        lambda f: jax.value_and_grad(jax.jit(f)),
        lambda f: jax.jit(jax.value_and_grad(f)),
    ):
        value, x_bar = transform(f)(x)
        assert float(value) == -5
        np.testing.assert_allclose(x_bar, [-1 / 4, -1 / 6], rtol=1e-7)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(f))(x), [-1 / 4, -1 / 6], rtol=1e-7)
    total, _ = jax.lax.scan(lambda s, x: (s + f(x), None), 0.0, jnp.stack([x, x]))
    assert float(total) == -10
    # A start may be traced by the transformation itself; it has no derivative.
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(root(x, start=x)))(x), [1 / 4, 1 / 6], rtol=1e-7)
    each = jax.vmap(jax.grad(lambda x: jnp.sum(root(x, start=x))))(jnp.stack([x, x]))
    np.testing.assert_allclose(each[1], [1 / 4, 1 / 6], rtol=1e-7)
    assert float(jax.grad(custom_root(of_square)(jnp.sqrt))(4.0)) == pytest.approx(1 / 4)


@pytest.mark.parametrize("framework", [pytest.param(n, marks=pytest.mark.framework(n)) for n in ("torch", "jax")])
def test_an_input_may_be_named(framework, request):
    if framework == "torch":
        import torch

        x = torch.tensor([4.0, 9.0], dtype=torch.float64, requires_grad=True)
        f = custom_root(lambda y, x, s: y * y - s * x, axes=0)(lambda x, s: (s * x).detach().sqrt())
        x_bar = torch.autograd.grad(f(x=x, s=torch.ones(2).double()).sum(), x)[0]
    else:
        jax = request.getfixturevalue("jax")
        import jax.numpy as jnp

        f = custom_root(lambda y, x, s: y * y - s * x, axes=0)(lambda x, s: jax.lax.stop_gradient(jnp.sqrt(s * x)))
        x_bar = jax.grad(lambda x: jnp.sum(f(x=x, s=jnp.ones(2))))(jnp.asarray([4.0, 9.0]))
    np.testing.assert_allclose(x_bar, [1 / 4, 1 / 6], rtol=1e-7)


@pytest.mark.framework("torch")
def test_integers_in_every_transform_of_torch(torch, rng):
    take = custom_root(lambda y, x, i: y - x[i])(lambda x, i: x[i].detach().clone())
    x, i = torch.tensor(rng.standard_normal(3)), torch.tensor([2, 0, 2])
    func, loss = torch.func, lambda f: lambda x, i: (f(x, i) ** 2).sum()
    plain = lambda x, i: x[i]
    for transform in (
        lambda f: func.grad(loss(f))(x, i),
        lambda f: func.jacfwd(f)(x, i),
        lambda f: func.hessian(loss(f))(x, i),
        lambda f: func.vmap(func.grad(loss(f)))(torch.stack([x, 2 * x]), torch.stack([i, 2 - i])),
    ):
        torch.testing.assert_close(transform(take), transform(plain))


@pytest.mark.framework("torch")
def test_a_tensor_in_a_closure_is_refused_in_transforms_too(torch):
    one = torch.ones(2, dtype=torch.float64)

    def outer(w):
        return custom_root(lambda y, x: y - x * w)(lambda x: (x * w).detach())(one).sum()

    w = torch.tensor(2.0, dtype=torch.float64)
    for transform in (lambda: torch.func.grad(outer)(w), lambda: torch.func.jvp(outer, (w,), (w,))):
        with pytest.raises(TypeError, match="is not among its inputs"):
            transform()
    w.requires_grad_()
    with torch.no_grad():  # nothing is lost
        assert float(outer(w)) == 4


def test_what_does_not_fit_is_said_at_once():
    with pytest.raises(TypeError, match="linear_solve has no option solve_rol; it takes check_every"):
        custom_root(of_square, solve_rol=1e-3)
    with pytest.raises(ValueError, match="axes is -1, expected the number of the last axes"):
        custom_root(of_square, axes=-1)
    with pytest.raises(TypeError, match="The residual is 3, expected a function"):
        custom_root(3)
    with pytest.raises(TypeError, match="The solver is 3, expected a function"):
        custom_root(of_square)(3)
    x = np.asarray([4.0, 9.0])
    deep = custom_root(of_square, residual_vjp=of_square_vjp, residual_jvp=of_square_jvp, axes=2)(np.sqrt)
    with pytest.raises(ValueError, match=r"axes is 2, but the solution of sqrt has shape \(2,\)"):
        deep.vjp(x, np.sqrt(x), x)
    single = custom_root(of_square, residual_vjp=lambda w, y, x: 2 * y * w, residual_jvp=of_square_jvp)(np.sqrt)
    with pytest.raises(TypeError, match=r"residual_vjp returned 1 array\(s\), expected 2"):
        single.vjp(x, np.sqrt(x), x)


@pytest.mark.framework("torch")
def test_constraints_have_an_axis(torch):
    one = torch.ones(2, dtype=torch.float64)
    f = custom_argmin(lambda y, x: ((y - x) ** 2).sum(), equality=lambda y, x: y.sum() - 1)(lambda x: x)
    with pytest.raises(ValueError, match=r"equality has shape \(\) for a solution of shape \(2,\), expected \('p',\)"):
        f.vjp(one, one / 2, one)


@pytest.mark.framework("torch")
def test_a_solution_that_is_nan_does_not_spoil_the_others_under_constraints(torch):
    f = custom_argmin(lambda y, x: ((y - x) ** 2).sum(-1), inequality=lambda y, x: -y)(lambda x: x.clamp(min=0))
    x = torch.tensor([[-1.0, 2.0], [torch.nan, 1.0]], dtype=torch.float64)
    (x_bar), _ = f.vjp(torch.ones(2, 2).double(), f(x), x, throw=False)
    torch.testing.assert_close(x_bar[0], torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert x_bar[1].isnan().any()


@pytest.mark.parametrize(
    "framework", [pytest.param(n, marks=pytest.mark.framework(n)) for n in ("torch", "jax", "autograd", "tensorflow")]
)
def test_its_bridge_can_be_pickled(framework):
    differentiable = importlib.import_module(f"ddnref.interop.{framework}").differentiable
    f = custom_root(of_square, residual_vjp=of_square_vjp, residual_jvp=of_square_jvp, axes=0)(square_root)
    other = pickle.loads(pickle.dumps(differentiable(f)))
    assert repr(other) == f"ddnref.interop.{framework}.differentiable(square_root)"
