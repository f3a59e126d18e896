"""Forward mode and second derivatives in the JAX bridge, in nestings that the matrix of transforms does not have."""

import numpy as np
import pytest
from problems import rotation, symmetric, with_spectrum
from smooth import bridged, total

import ddnref

pytestmark = pytest.mark.framework("jax")


@pytest.fixture
def differentiable(jax):
    from ddnref.interop.jax import differentiable

    return differentiable


def nestings(jax, loss):
    """The Hessian of a function of two numbers, in every order of modes and inside of other transforms."""
    hessian, few = jax.hessian(loss), jax.numpy.arange(2.0)
    return {
        "reverse over reverse": jax.jacrev(jax.grad(loss)),
        "forward over reverse": hessian,
        "reverse over forward": jax.jacrev(jax.jacfwd(loss)),
        "forward over forward": jax.jacfwd(jax.jacfwd(loss)),
        "linearize": lambda s: jax.vmap(jax.linearize(jax.grad(loss), s)[1])(jax.numpy.eye(2)),
        "vmap": lambda s: jax.vmap(hessian)(s + 0.01 * few[:, None])[0],
        "checkpoint": jax.hessian(jax.checkpoint(loss)),
        "scan": lambda s: jax.lax.scan(lambda c, shift: (c, hessian(c + shift)), s, 0.01 * few)[1][0],
    }


@pytest.mark.parametrize("name", ["eigh", "sqrtm", "solve", "linear_solve"])
def test_second_derivatives_in_every_nesting(name, jax, differentiable, rng):
    """They are the differences of the gradient, and agree with each other far beyond these."""
    f, jnp = bridged(jax.numpy, differentiable, name), jax.numpy
    x, *directions = jnp.asarray(rng.standard_normal((3, 3, 3)))

    def loss(s):
        return total(f(x + s[0] * directions[0] + (s[0] * s[1] + jnp.sin(s[1])) * directions[1]))

    s, step, gradient = jnp.asarray([0.1, -0.2]), 1e-4, jax.jit(jax.grad(loss))
    differences = np.stack([(gradient(s + step * e) - gradient(s - step * e)) / (2 * step) for e in jnp.eye(2)])
    # A loop inside of each takes a minute to compile.
    few = 4 if name == "linear_solve" else None
    found = jax.jit(lambda s: {name: hessian(s) for name, hessian in list(nestings(jax, loss).items())[:few]})(s)
    size = np.max(np.abs(differences))
    assert np.max(np.abs(found["reverse over reverse"] - differences)) <= 1e-6 * size
    for nesting, hessian in found.items():
        assert np.max(np.abs(hessian - found["reverse over reverse"])) <= 1e-9 * size, nesting


@pytest.mark.parametrize("name", ["eigh_topk", "solve"])
def test_second_derivatives_without_jit(name, jax, differentiable, rng):
    """The outermost level sees arrays with values there, and the saved arrays still move along it."""
    f, jnp = bridged(jax.numpy, differentiable, name), jax.numpy
    x, x_dot = jnp.asarray(rng.standard_normal((2, 3, 3)))
    product = lambda x: jax.jvp(jax.grad(lambda x: total(f(x))), (x,), (x_dot,))[1]
    np.testing.assert_allclose(product(x), jax.jit(product)(x), rtol=1e-10, atol=1e-10)


def test_third_derivatives_agree_with_those_of_jax(jax, differentiable, rng):
    x, *directions, c = jax.numpy.asarray(symmetric(rng, 4, (4,)))

    def loss(eigh, s):
        w, v = eigh(x + s[0] * directions[0] + s[1] * directions[1])
        return (w[:2] ** 3).sum() + (c * (v[:, :2] @ v[:, :2].T)).sum()

    ways = [
        lambda f: jax.jacfwd(jax.jacfwd(jax.jacfwd(f))),
        lambda f: jax.jacrev(jax.jacfwd(jax.jacrev(f))),
        lambda f: jax.jacrev(jax.jacrev(jax.jacrev(f))),
    ]
    s = jax.numpy.zeros(2)
    expected = jax.jit(ways[0](lambda s: loss(jax.numpy.linalg.eigh, s)))(s)
    for way in ways:
        ours = jax.jit(way(lambda s: loss(differentiable(ddnref.eigh), s)))(s)
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


def test_complex_tangents_and_hessians(jax, differentiable, rng):
    """JAX's convention in both modes: of a complex matrix, its own rules and ours give the same."""
    x, x_dot, c = jax.numpy.asarray(symmetric(rng, 3, (3,), is_complex=True))

    def loss(eigh, x):
        w, v = eigh(x)
        return (w**3).sum() + (c * (v[:, :1] @ v[:, :1].conj().T)).real.sum()

    def measures(eigh, x, x_dot):
        f = lambda x: loss(eigh, x)
        gradient = lambda x: jax.grad(f)(x)
        return jax.jvp(f, (x,), (x_dot,))[1], gradient(x), jax.jvp(gradient, (x,), (x_dot,))[1]

    ours = jax.jit(lambda *a: measures(differentiable(ddnref.eigh), *a))(x, x_dot)
    theirs = jax.jit(lambda *a: measures(lambda x: jax.numpy.linalg.eigh((x + x.conj().T) / 2), *a))(x, x_dot)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    from jax.test_util import check_grads

    root = differentiable(ddnref.sqrtm)
    positive = x @ x.conj().T + jax.numpy.eye(3)
    check_grads(jax.jit(root), (positive,), order=2, atol=1e-4, rtol=1e-4)


SPECTRA = [[1.0, 1.0, 1.0], [1.0, 1.0, 3.0], [1.0, 1.0 + 1e-9, 3.0]]


@pytest.mark.parametrize("kind", ["logm and expm", "sqrtm", "user's"])
def test_second_derivatives_of_functions_are_exact_at_repeated_eigenvalues(kind, jax, differentiable, rng):
    """log exp X = X and (√X)² = X, whatever the eigenvalues, and tr X³ is known."""
    c, *directions = jax.numpy.asarray(symmetric(rng, 3, (3,)))
    sqrtm, logm, expm = (differentiable(f) for f in (ddnref.sqrtm, ddnref.logm, ddnref.expm))
    cube = differentiable(ddnref.spectral_function, f=lambda w: w**3, df=lambda w: 3 * w**2, d2f=lambda w: 6 * w)
    own, plain = {
        "logm and expm": (lambda x: (c * logm(expm(x)) ** 2).sum(), lambda x: (c * x**2).sum()),
        "sqrtm": (lambda x: (c * (sqrtm(x) @ sqrtm(x)) ** 2).sum(), lambda x: (c * x**2).sum()),
        "user's": (lambda x: jax.numpy.trace(cube(x)), lambda x: jax.numpy.trace(x @ x @ x)),
    }[kind]

    def hessians(f, few, x):
        ways = nestings(jax, lambda s: f(x + s[0] * directions[0] + s[1] * directions[1]))
        return [way(jax.numpy.zeros(2)) for way in list(ways.values())[:few]]

    ours, theirs = jax.jit(lambda x: hessians(own, 4, x)), jax.jit(lambda x: hessians(plain, 1, x))
    for spectrum in SPECTRA:
        x = jax.numpy.asarray(with_spectrum(rotation(rng, 3), np.asarray(spectrum)))
        (expected,) = theirs(x)
        for hessian in ours(x):
            np.testing.assert_allclose(hessian, expected, rtol=0, atol=1e-10 * np.max(np.abs(expected)))


def test_a_third_derivative_of_a_function_of_a_matrix_is_refused(jax, differentiable):
    trace = lambda t: jax.numpy.trace(differentiable(ddnref.sqrtm)(t * jax.numpy.eye(2)))
    for third in (jax.grad(jax.grad(jax.grad(trace))), jax.jacfwd(jax.jacfwd(jax.jacfwd(trace)))):
        with pytest.raises(NotImplementedError, match="third derivative of sqrtm"):
            third(1.0)


def test_a_direction_that_splits_equal_eigenvalues(jax, differentiable):
    """It has no tangent, unless the loss is known to depend on their space alone; the other items keep theirs."""
    x = jax.numpy.stack([jax.numpy.eye(3), jax.numpy.diag(jax.numpy.arange(3.0))])
    x_dot = jax.numpy.stack([jax.numpy.diag(jax.numpy.arange(3.0))] * 2)
    tangent = jax.jit(lambda f: jax.jvp(lambda x: f(x)[0], (x,), (x_dot,))[1], static_argnums=0)
    with pytest.warns(RuntimeWarning, match=r"A tangent is NaN \(eigh, item 0 of 2\)"):
        w_dot = jax.block_until_ready((tangent(differentiable(ddnref.eigh)), jax.effects_barrier())[0])
    assert np.all(np.isnan(w_dot[0]))
    np.testing.assert_allclose(w_dot[1], [0.0, 1.0, 2.0])
    accepted = tangent(differentiable(ddnref.eigh, gauge_rtol=float("inf")))
    np.testing.assert_allclose(np.sum(accepted, axis=-1), [3.0, 3.0])


def test_a_tangent_of_some_inputs_alone(jax, differentiable, rng):
    """Nothing is computed for an input that does not move."""
    a, b = (jax.numpy.asarray(rng.standard_normal(shape)) for shape in ((3, 3), (3,)))
    solve = differentiable(ddnref.solve)
    one = jax.jit(lambda b_dot: jax.jvp(lambda b: solve(a, b), (b,), (b_dot,))[1])
    both = jax.jit(lambda b_dot: jax.jvp(solve, (a, b), (a, b_dot))[1])
    np.testing.assert_allclose(one(b), jax.numpy.linalg.solve(a, b), atol=1e-12)
    products = [program.lower(b).as_text().count("dot_general") for program in (one, both)]
    assert products[0] < products[1]
