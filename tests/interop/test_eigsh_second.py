"""Second derivatives through `eigsh` in the bridges: right in every mode, and refused where there are none."""

import numpy as np
import pytest
from problems import relative, rotation, symmetric, with_spectrum

import ddnref
from conftest import TRACED
from ddnref import GaugeError
from ddnref.operators import dense

M, K = 8, 3
ITERATIVE = {"method": "iterative", "basis": 7, "rtol": 1e-13}
# Of each kind of solve one: known eigenpairs, factorisations, iterations; a matrix and an operator.
FORMS = {
    "full": ({}, False),
    "direct": ({**ITERATIVE, "solver": "direct"}, False),
    "cg": ({**ITERATIVE, "solver": "cg"}, False),
    "full operator": ({}, True),
    "operator": (ITERATIVE, True),
}
forms = pytest.mark.parametrize("form", FORMS)
REPEATED = np.asarray([3.0, 3.0, 2.0, 1.0, 0.5, 0.2, -1.0, -2.0])
CUT = np.asarray([4.0, 3.0, 2.0, 2.0, 0.5, 0.2, -1.0, -2.0])


@pytest.fixture
def problem(rng):
    """A matrix, two directions, and the weights of a loss of three eigenpairs."""
    return [symmetric(rng, M, (), False) for _ in range(4)] + [rng.standard_normal(K)]


def loss_of(pairs, c, d):
    """A loss that uses the eigenvalues, the eigenvectors one by one, and the input beyond its symmetric part."""

    def loss(x):
        w, v = pairs((x + x.T) / 2)
        return ((v * (d * w**2)) @ v.T * c).sum() + (w**3).sum() + (v**4).sum()

    return loss


def pairs_of(differentiable, form):
    """The eigenpairs as a function of the matrix, in one form."""
    options, is_operator = FORMS[form]
    eigsh = differentiable(ddnref.eigsh, k=K, **options)
    return lambda x: eigsh(dense(x, self_adjoint=True) if is_operator else x)[0]


# --- PyTorch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_torch(torch, problem):
    """``in_torch(form)``: the loss of this form, that of `eigh_topk`, and the other arrays of the problem."""
    from ddnref.interop.torch import differentiable

    x, a, b, c, d = map(torch.tensor, problem)
    closed = loss_of(differentiable(ddnref.eigh_topk, k=K), c, d)
    return lambda form: (loss_of(pairs_of(differentiable, form), c, d), closed, x, a, b)


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings(*TRACED)
@forms
def test_torch_in_every_mode(form, torch, in_torch):
    from torch.func import grad, hessian, jacrev, jvp, vmap

    loss, closed, x, a, b = in_torch(form)
    both = torch.stack([x, x + a / 10])

    def recorded(f):
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(y), y, create_graph=True)
        return torch.autograd.grad((g * a).sum(), y)[0]

    modes = {
        "reverse over reverse": lambda f: grad(lambda x: (grad(f)(x) * a).sum())(x),
        "double backward": recorded,
        "forward over forward": lambda f: jvp(lambda x: jvp(f, (x,), (a,))[1], (x,), (b,))[1],
        "forward over reverse": lambda f: jvp(grad(f), (x,), (a,))[1],
        "reverse over forward": lambda f: grad(lambda x: jvp(f, (x,), (a,))[1])(x),
        "hessian": lambda f: hessian(f)(x),
        "jacrev": lambda f: jacrev(jacrev(f))(x),
        "vmap": lambda f: vmap(hessian(f))(both),
        "third": lambda f: jvp(lambda x: jvp(grad(f), (x,), (a,))[1], (x,), (b,))[1],
    }
    for name, mode in modes.items():
        assert relative(mode(loss), mode(closed)) <= 1e-11, name

    step = 1e-5
    differences = (grad(loss)(x + step * a) - grad(loss)(x - step * a)) / (2 * step)
    assert relative(modes["forward over reverse"](loss), differences) <= 1e-6


@pytest.mark.framework("torch")
@pytest.mark.parametrize("form", ["full", "operator"])
def test_torch_of_complex_matrices_and_batches(form, torch, rng):
    from ddnref.interop.torch import differentiable

    pairs = pairs_of(differentiable, form)

    def smooth(x):  # without the phases of the eigenvectors
        w, v = pairs((x + x.mH) / 2)
        return w, v[..., :1, :] * v[..., 1:2, :].conj()

    x = torch.tensor(symmetric(rng, M, (2,), True), requires_grad=True)
    assert torch.autograd.gradgradcheck(smooth, x, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings("ignore:A gradient is NaN")
@pytest.mark.parametrize("spectrum", [REPEATED, CUT])
@pytest.mark.parametrize("form", ["full", "full operator"])
def test_torch_refuses_where_there_is_none(form, spectrum, torch, rng):
    """An error, or NaN for an item of a batch that is mapped; the first derivative exists."""
    from ddnref.interop.torch import differentiable

    loss = lambda x: (pairs_of(differentiable, form)(x)[0][:2] ** 2).sum()
    bad = torch.tensor(with_spectrum(rotation(rng, M), spectrum))
    good = torch.tensor(symmetric(rng, M, (), False))
    second = torch.func.grad(lambda x: torch.func.grad(loss)(x)[0, 1])
    assert torch.isfinite(torch.func.grad(loss)(bad)).all()
    with pytest.raises(GaugeError, match=r"second derivative through eigsh .* two of the k eigenvalues, or the k-th"):
        second(bad)
    found = torch.func.vmap(second)(torch.stack([good, bad]))
    assert torch.isnan(found).all(dim=(-2, -1)).tolist() == [False, True]
    assert relative(found[0], second(good)) <= 1e-12


@pytest.mark.framework("torch")
def test_torch_takes_cluster_rtol_for_what_is_equal(torch, rng):
    from ddnref.interop.torch import differentiable

    x = torch.tensor(with_spectrum(rotation(rng, M), np.asarray([3.0, 2.9, 2.0, 1.0, 0.5, 0.2, -1.0, -2.0])))
    for cluster_rtol, is_refused in ((None, False), (0.1, True)):
        eigsh = differentiable(ddnref.eigsh, k=2, cluster_rtol=cluster_rtol)
        second = torch.func.grad(lambda x, eigsh=eigsh: torch.func.grad(lambda x: eigsh(x)[0][0].sum() ** 2)(x)[0, 0])
        if is_refused:
            with pytest.raises(GaugeError):
                second(x)
        else:
            assert torch.isfinite(second(x)).all()


@pytest.mark.framework("torch")
def test_torch_of_pairs_that_have_not_converged(torch, rng):
    from ddnref.interop.torch import differentiable

    eigsh = differentiable(ddnref.eigsh, k=2, method="iterative", maxiter=1, basis=6)
    loss = lambda x: (eigsh(x)[0][1] ** 4).sum()
    x = torch.tensor(symmetric(rng, 30, (), False))
    with pytest.warns(RuntimeWarning, match="NaN .*eigsh"):
        found = torch.func.grad(lambda x: torch.func.grad(loss)(x)[0, 1])(x)
    assert torch.isnan(found).all()


# --- JAX --------------------------------------------------------------------------------------------------------


@pytest.mark.framework("jax")
@pytest.mark.parametrize("form", ["full", "cg", "operator"])
def test_jax_in_every_mode(form, jax, problem):
    """Compiled, because that takes less time than to compile each operation alone."""
    from ddnref.interop.jax import differentiable

    x, a, b, c, d = map(jax.numpy.asarray, problem)
    loss = loss_of(pairs_of(differentiable, form), c, d)
    closed = loss_of(differentiable(ddnref.eigh_topk, k=K), c, d)
    dot = lambda f: lambda x: jax.numpy.vdot(jax.grad(f)(x), a)
    modes = {
        "reverse over reverse": lambda f: jax.grad(dot(f))(x),
        "forward over forward": lambda f: jax.jvp(lambda x: jax.jvp(f, (x,), (a,))[1], (x,), (b,))[1],
        "vmap": lambda f: jax.vmap(jax.grad(lambda x: jax.jvp(f, (x,), (a,))[1]))(jax.numpy.stack([x, x + a / 10])),
        "hessian": lambda f: jax.hessian(f)(x),
    }
    run = jax.jit(lambda f: {name: mode(f) for name, mode in modes.items()}, static_argnums=0)
    found, expected = run(loss), run(closed)
    for name in modes:
        assert relative(found[name], expected[name]) <= 1e-11, name

    gradient, step = jax.jit(jax.grad(loss)), 1e-5
    differences = (gradient(x + step * a) - gradient(x - step * a)) / (2 * step)
    assert relative(found["reverse over reverse"], (differences + differences.T) / 2) <= 1e-6


@pytest.mark.framework("jax")
@pytest.mark.filterwarnings("ignore:A .* is NaN")
def test_jax_gives_nan_where_there_is_none(jax, rng):
    from ddnref.interop.jax import differentiable

    pairs = pairs_of(differentiable, "full")
    loss = lambda x: (pairs(x)[0][:2] ** 2).sum()
    x = jax.numpy.asarray(
        np.stack([symmetric(rng, M, (), False), *(with_spectrum(rotation(rng, M), w) for w in (REPEATED, CUT))])
    )
    second = jax.grad(lambda x: jax.grad(loss)(x)[0, 1])
    first, found = jax.jit(lambda x: (jax.vmap(jax.grad(loss))(x), jax.vmap(second)(x)))(x)
    assert np.all(np.isfinite(first))
    assert np.isnan(found).all(axis=(-2, -1)).tolist() == [False, True, True]


@pytest.mark.framework("jax")
@pytest.mark.filterwarnings("ignore:A .* is NaN")
def test_jax_of_pairs_that_have_not_converged(jax, rng):
    from ddnref.interop.jax import differentiable

    eigsh = differentiable(ddnref.eigsh, k=2, method="iterative", maxiter=1, basis=6)
    loss = lambda x: (eigsh(x)[0][1] ** 4).sum()
    x = jax.numpy.asarray(symmetric(rng, 30, (), False))
    assert np.all(np.isnan(jax.jit(jax.grad(lambda x: jax.grad(loss)(x)[0, 1]))(x)))
