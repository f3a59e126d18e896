"""Iterations that have not converged: NaN, or with ``on_failure="iterate"`` the derivative as if they had."""

import importlib
import warnings

import numpy as np
import pytest
from problems import relative
from public_names import PUBLIC

import ddnref
from ddnref import nodes
from ddnref._rules.binding import options_of, plain_forward
from ddnref._rules.table import RULES, TRIALS

FRAMEWORKS = [
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax", "autograd", "tensorflow")
]
TRUNCATED = {
    "eigsh": {"method": "iterative", "maxiter": 3, "basis": 6},
    "svds": {"method": "iterative", "maxiter": 3, "basis": 6},
    "eigsh_generalized": {"method": "iterative", "maxiter": 3, "basis": 6},
    "power_iteration": {"maxiter": 3},
    "simultaneous_iteration": {"maxiter": 3},
    "sinkhorn": {"newton": False, "maxiter": 1, "check_every": 1},
    "robust_pool": {"maxiter": 1, "rtol": 1e-15},
    "linear_solve": {"solver": "gmres", "maxiter": 3},
}


def gradient(library, function, inputs):
    """Value, status, and the gradient of the sum of the first output, all as NumPy arrays."""
    status = []

    def first(*x):
        result, info = function(*x)
        status.append(info)
        return result[0] if isinstance(result, tuple) else result

    if library == "torch":
        torch = importlib.import_module("torch")
        x = [torch.tensor(a, requires_grad=True) for a in inputs]
        y = first(*x)
        bars = torch.autograd.grad(y.sum(), x)
        return y.detach().numpy(), status[0].converged.numpy(), [b.numpy() for b in bars]
    if library == "jax":
        jax = importlib.import_module("jax")
        from conftest import backend

        backend("jax")
        x = tuple(map(jax.numpy.asarray, inputs))
        y, pull = jax.vjp(lambda *x: first(*x), *x)
        bars = pull(jax.numpy.ones_like(y))
        jax.effects_barrier()
        converged = function(*x)[1].converged
        return np.asarray(y), np.asarray(converged), list(map(np.asarray, bars))
    if library == "autograd":
        autograd = importlib.import_module("autograd")
        bars = autograd.grad(lambda x: autograd.numpy.sum(first(*x)))(tuple(inputs))
        result, info = function(*inputs)
        return result[0] if isinstance(result, tuple) else result, info.converged, list(bars)
    tf = importlib.import_module("tensorflow")
    x = list(map(tf.constant, inputs))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = first(*x)
        total = tf.reduce_sum(y)
    return y.numpy(), status[0].converged.numpy(), [b.numpy() for b in tape.gradient(total, x)]


def finished(library, value):
    """Wait for the callbacks of JAX."""
    if library == "jax":
        importlib.import_module("jax").effects_barrier()
    return value


def differentiable(library, *args, **options):
    return importlib.import_module(f"ddnref.interop.{library}").differentiable(*args, **options)


def test_every_iteration_has_a_line():
    assert set(TRUNCATED) == {name for name, rule in RULES.items() if rule.info is not None}


@pytest.mark.parametrize("library", FRAMEWORKS)
@pytest.mark.parametrize("name", TRUNCATED)
def test_an_iterate_and_its_gradient(name, library, rng):
    sample = TRIALS[name].sample(np.asarray, rng, (2,), 12, False)
    options = sample.options | TRUNCATED[name]
    message = rf"A gradient is that of an iterate \({name}, items 0, 1 of 2\)"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        y, converged, bars = gradient(
            library, differentiable(library, PUBLIC[name], on_failure="iterate", **options), sample.inputs
        )
    assert [w.category for w in caught].count(RuntimeWarning) == 1  # autograd 1.7 uses old names of NumPy
    assert not np.any(converged)
    (expected, *_), _ = plain_forward(RULES[name])(*sample.inputs, **options_of(RULES[name], options)[0])
    sign = np.sign(np.sum(y * expected, axis=-2, keepdims=True)) if name == "svds" else 1  # each library takes its own
    assert relative(y * sign, expected) <= 1e-12
    assert all(np.all(np.isfinite(bar)) for bar in bars)
    with pytest.warns(RuntimeWarning, match=rf"A gradient is NaN \({name}, items 0, 1 of 2\)"):
        y, _, bars = gradient(library, differentiable(library, PUBLIC[name], **options), sample.inputs)
    assert np.all(np.isnan(y))
    assert all(np.all(np.isnan(bar)) for bar in bars)


@pytest.mark.parametrize("library", FRAMEWORKS[:2])
def test_it_is_nearer_to_the_gradient_than_the_iterate_is_far(library, rng):
    """Truncated conjugate gradients, 10, 20 and 40 steps: the formula of the derivative at x_k and y_k."""
    n = 60
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    a, b = (q * np.logspace(0, 2, n)) @ q.T, rng.standard_normal(n)
    x, y = np.linalg.solve(a, b), np.linalg.solve(a, np.ones(n))
    errors = []
    for steps in (10, 20, 40):
        f = differentiable(library, ddnref.linear_solve, solver="cg", maxiter=steps, on_failure="iterate")
        with pytest.warns(RuntimeWarning, match=r"of an iterate \(linear_solve\)"):
            x_k, _, (a_bar, b_bar) = gradient(library, f, (a, b))
        error = relative(x_k, x)
        assert relative(b_bar, y) <= 10 * error
        assert relative(a_bar, -np.outer(y, x)) <= 10 * error
        errors.append(error)
    assert errors[0] > 1e-2 > errors[2]


@pytest.mark.framework("torch")
def test_items_that_converged_keep_their_gradient(torch, rng):
    """One of two items: the other one comes out as without the option, and only the first is warned of."""
    x = torch.tensor(np.stack([np.diag([1.0, 1.001, 0.1]), np.diag([1.0, 1e-3, 0.1])]) + 1e-3, requires_grad=True)
    both = []
    for on_failure in ("iterate", "nan"):
        f = differentiable("torch", ddnref.power_iteration, maxiter=20, on_failure=on_failure)
        with pytest.warns(RuntimeWarning, match=r"\(power_iteration, item 0 of 2\)"):
            both += torch.autograd.grad(f(x)[0][1].sum(), x)
    assert torch.equal(both[0][1], both[1][1])
    assert torch.isfinite(both[0]).all()
    assert torch.isnan(both[1][0]).all()


@pytest.mark.framework("torch")
@pytest.mark.framework("jax")
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_under_transforms(library, rng):
    """One warning for the whole batch, and the gradients of the batch."""
    from conftest import backend

    sample = TRIALS["linear_solve"].sample(np.asarray, rng, (3,), 8, False)
    options = sample.options | {"solver": "gmres", "maxiter": 2, "on_failure": "iterate"}
    f = differentiable(library, ddnref.linear_solve, **options)
    func = importlib.import_module("torch").func if library == "torch" else importlib.import_module("jax")
    a, b = map(backend(library).asarray, sample.inputs)
    whole_batch = library == "torch" or importlib.import_module("ddnref._kernels.jax_versions").batching_keeps_effects()
    items = ", items 0, 1, 2 of 3" if whole_batch else ""  # JAX before 0.8: a warning for each of the three
    with pytest.warns(RuntimeWarning, match=rf"of an iterate \(linear_solve{items}\)") as caught:
        each = finished(library, func.vmap(func.grad(lambda a, b: (f(a, b)[0] ** 2).sum(), (0, 1)))(a, b))
    assert len(caught) == (1 if whole_batch else 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = func.grad(lambda a, b: (f(a, b)[0] ** 2).sum(), (0, 1))(a, b)
    for found, expected in zip(each, whole, strict=True):
        assert relative(np.asarray(found), np.asarray(expected)) <= 1e-12


@pytest.mark.framework("torch")
@pytest.mark.parametrize("solver", ["cg", "lsmr"])
def test_an_adjoint_that_does_not_converge_is_reported(solver, torch, rng):
    """The forward has converged, from a start that is the solution; the solve for the derivative has not."""
    q = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    a = torch.tensor((q * np.logspace(0, 3, 40)) @ q.T)
    a = (a + a.mT) / 2
    x = torch.ones(40, dtype=torch.float64)
    options = {"solver": solver, "x0": x, "maxiter": 8}
    b = (a @ x).requires_grad_()
    for on_failure, message in (("iterate", "of an iterate"), ("nan", "is NaN")):
        f = differentiable("torch", ddnref.linear_solve, on_failure=on_failure, **options)
        found, info = f(a, b)
        assert info.converged
        with pytest.warns(RuntimeWarning, match=message):
            (b_bar,) = torch.autograd.grad(found.sin().sum(), b)
        assert bool(torch.isfinite(b_bar).all()) == (on_failure == "iterate")


@pytest.mark.parametrize("library", FRAMEWORKS)
def test_it_is_validated(library):
    with pytest.raises(ValueError, match='on_failure is \'raise\', expected "nan" or "iterate"'):
        differentiable(library, ddnref.linear_solve, on_failure="raise")
    with pytest.raises(TypeError, match=r"on_failure=.*eigh does not iterate"):
        differentiable(library, ddnref.eigh, on_failure="iterate")


def test_robust_pool_returns_its_last_iterate(xp):
    x = xp.asarray(np.asarray([[0.0, 1.0, 5.0], [0.0, np.nan, 1.0]]))
    y, info = nodes.robust_pool(x, maxiter=1, rtol=0.0, throw=False, while_loop=xp.while_loop)
    assert not np.any(xp.numpy(info.converged))
    assert list(np.isnan(xp.numpy(y))) == [False, True]
    assert isinstance(nodes.robust_pool(x[0, ...], throw=False, while_loop=xp.while_loop)[0], type(x))


def test_eigsh_vjp_of_solves_that_stop_early(xp, rng):
    x = xp.asarray(np.diag(np.linspace(0, 1, 30)) + 0.01)
    (w, v), _ = ddnref.eigsh(x, 2, method="full")
    v_bar = xp.asarray(rng.standard_normal((30, 2)))
    options = {"solver": "cg", "maxiter": 3, "throw": False, "gauge_rtol": float("inf"), "while_loop": xp.while_loop}
    exact, _ = ddnref.eigsh_vjp(None, v_bar, w, v, x, **options | {"maxiter": None})
    for on_failure, error in (("iterate", 0.5), ("nan", None)):
        x_bar, info = ddnref.eigsh_vjp(None, v_bar, w, v, x, on_failure=on_failure, **options)
        assert not info.converged
        if error is None:
            assert np.all(np.isnan(xp.numpy(x_bar)))
        else:
            assert relative(xp.numpy(x_bar), xp.numpy(exact)) <= error
    with pytest.raises(ValueError, match="on_failure is 'x'"):
        ddnref.eigsh_vjp(None, v_bar, w, v, x, on_failure="x")
