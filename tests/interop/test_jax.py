"""The JAX bridge, where test_matrix.py does not go: the complex convention, repeated eigenvalues, refusals."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
from problems import projector_gradient, relative, rotation, symmetric, with_spectrum

import ddnref

pytestmark = pytest.mark.framework("jax")

TRIPLE = np.asarray([-1.0, 0.3, 0.3, 0.3, 1.1, 2.0])
INSIDE = TRIPLE == 0.3


@pytest.fixture
def differentiable(jax):
    from ddnref.interop.jax import differentiable

    return differentiable


def test_complex_gradients_follow_jax(jax, differentiable, rng):
    """The same loss through jnp.linalg.eigh, whose convention is the conjugate of ours."""
    x = jax.numpy.asarray(symmetric(rng, 4, (), True))
    c = jax.numpy.asarray(rng.standard_normal((4, 4)) + 1j * rng.standard_normal((4, 4)))

    def loss(eigh):
        def value(x):
            w, v = eigh(x)
            return jax.numpy.sum(w**3) + jax.numpy.sum(jax.numpy.abs(v.conj().T @ c @ v) ** 2)

        return value

    ours = jax.grad(loss(differentiable(ddnref.eigh)))(x)
    theirs = jax.grad(loss(jax.numpy.linalg.eigh))(x)
    assert relative(np.asarray(ours), np.asarray(theirs)) <= 1e-12


def test_repeated_eigenvalues_are_exact_where_jax_is_not(jax, differentiable, rng):
    q, c = rotation(rng, 6, (200,)), symmetric(rng, 6, (200,))

    def errors(eigh):
        def loss(x):
            v = eigh(x)[1][..., 1:4]
            return jax.numpy.sum(c * (v @ v.swapaxes(-1, -2)))

        g = np.asarray(jax.jit(jax.grad(loss))(jax.numpy.asarray(with_spectrum(q, TRIPLE))))
        return np.asarray([relative(g[i], projector_gradient(q[i], TRIPLE, INSIDE, c[i])) for i in range(200)])

    assert np.max(errors(differentiable(ddnref.eigh))) <= 1e-12
    assert np.mean(~(errors(jax.numpy.linalg.eigh) < 1e-3)) > 0.9


def test_a_gradient_that_does_not_exist_is_nan_and_warns(jax, differentiable, rng):
    spectra = np.stack([TRIPLE, np.arange(6.0)])
    x = jax.numpy.asarray(with_spectrum(rotation(rng, 6, (2,)), spectra))
    eigh = differentiable(ddnref.eigh)
    gradient = jax.jit(jax.grad(lambda x: eigh(x)[1][:, 0].sum()))
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        g = jax.block_until_ready((gradient(x), jax.effects_barrier())[0])
    assert np.all(np.isnan(g[0]))
    assert np.all(np.isfinite(g[1]))


def test_it_warns_where_jax_drops_callbacks_of_custom_vmap(jax, differentiable, monkeypatch):
    """Before JAX 0.8: item by item, and only of those that are NaN."""
    bridge = importlib.import_module("ddnref.interop.jax")
    monkeypatch.setattr(bridge, "batching_keeps_effects", lambda: False)
    bridge._in_stream.cache_clear()
    eigh = differentiable(ddnref.eigh, rtol=1e-7)  # options of no other test, so that nothing is compiled yet
    x = jax.numpy.asarray([np.diag([1.0, 2.0]), np.eye(2)])
    with pytest.warns(RuntimeWarning, match=r"A gradient is NaN \(eigh\)") as caught:
        x_bar = (jax.jit(jax.vmap(jax.grad(lambda x: eigh(x)[1][0].sum())))(x), jax.effects_barrier())[0]
    bridge._in_stream.cache_clear()
    assert len(caught) == 1
    assert np.array_equal(np.isnan(x_bar), [np.zeros((2, 2)), np.ones((2, 2))])


def test_a_gradient_that_does_not_exist_warns_without_jit(jax, differentiable, rng):
    x = jax.numpy.asarray(with_spectrum(rotation(rng, 6), TRIPLE))
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        g = jax.grad(lambda x: differentiable(ddnref.eigh)(x)[1][:, 2].sum())(x)
    assert np.all(np.isnan(g))


def test_what_reads_values_runs_without_jit(jax, differentiable):
    """The bridge compiles where nothing asks for a value; where something does, it runs as it is."""
    gradient = jax.grad(lambda x: differentiable(ddnref.eigh, check_finite=True)(x)[0][-1])
    x = np.diag([1.0, 2.0])
    np.testing.assert_array_equal(gradient(jax.numpy.asarray(x)), np.diag([0.0, 1.0]))
    with pytest.raises(ddnref.NonFiniteError):
        gradient(jax.numpy.asarray(x * np.nan))


def test_functions_that_change_are_not_compiled(jax, differentiable):
    """A compiled function would silently keep its first value."""
    power = [2.0]
    op = differentiable(
        ddnref.spectral_function, f=lambda w: w ** power[0], df=lambda w: power[0] * w ** (power[0] - 1)
    )
    x = jax.numpy.diag(jax.numpy.asarray([1.0, 3.0]))
    for power[0] in (2.0, 3.0):
        np.testing.assert_allclose(op(x), np.diag([1.0, 3.0 ** power[0]]), atol=1e-13)
        expected = power[0] * np.asarray([1.0, 3.0]) ** (power[0] - 1)
        np.testing.assert_allclose(np.diag(jax.grad(lambda x: op(x).trace())(x)), expected)


@pytest.mark.filterwarnings("ignore:A (gradient|tangent) is NaN")
def test_second_order_is_nan_where_anything_was_masked(jax, differentiable):
    eigh = differentiable(ddnref.eigh)
    hessian = jax.jit(jax.vmap(jax.jacrev(jax.grad(lambda x: (eigh(x)[0] ** 3).sum()))))
    h = np.asarray(hessian(jax.numpy.stack([jax.numpy.eye(3), jax.numpy.diag(jax.numpy.arange(3.0))])))
    assert np.all(np.isnan(h[0]))
    assert np.all(np.isfinite(h[1]))


def test_second_order_where_rounding_is_left_out(jax, differentiable):
    """Couplings of close eigenvalues that are zero at a diagonal matrix have a derivative, which must not be lost."""

    def loss(eigh):
        def value(x):
            v = eigh((x + x.T) / 2)[1]
            return (v[1, 4] * v[1, 1]) ** 2 + 3 * (v[2, 4] * v[2, 2]) ** 2 + v[4, 1] * v[4, 2] * v[1, 1] * v[1, 2]

        return value

    x = jax.numpy.diag(jax.numpy.asarray([-1.0, 0.5, 0.51, 0.515, 0.52, 3.0]))
    ours, theirs = (
        np.asarray(jax.jit(jax.jacrev(jax.grad(loss(f))))(x))
        for f in (differentiable(ddnref.eigh), jax.numpy.linalg.eigh)
    )
    assert np.max(np.abs(theirs)) > 10
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_loss_of_the_eigenvalues_alone_has_no_vector_part(jax, differentiable):
    """Symbolic zeros arrive as None: no products for them, and no gauge at a triple eigenvalue."""
    eigh = differentiable(ddnref.eigh)
    np.testing.assert_array_equal(jax.grad(lambda x: eigh(x)[0].sum())(jax.numpy.eye(3)), np.eye(3))
    program = jax.jit(jax.grad(lambda x: eigh(x)[0].sum())).lower(jax.numpy.eye(3)).as_text()
    assert program.count("dot_general") == 1


def test_default_precision_without_a_warning():
    """JAX computes in float32 and int32 by default; a separate process is used as 64-bit mode is global."""
    code = (
        "import jax, jax.numpy as jnp, ddnref\n"
        "from ddnref.interop.jax import differentiable\n"
        "x = jnp.diag(jnp.arange(1.0, 5.0)) + 0.1\n"
        "for op in (differentiable(ddnref.eigh), differentiable(ddnref.eigh_topk, k=2)):\n"
        "    g = jax.grad(lambda x: (op(x)[1][0] ** 2 @ jnp.arange(float(op(x)[1].shape[-1]))).sum())(x)\n"
        "    assert g.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(g)))\n"
        "w, v = ddnref.eigh(x)\n"
        "ddnref.eigh_vjp(w[:2], v[:, :2], w, v, index=(3, 0), gauge_rtol=float('inf'))\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=120, check=True)


def test_static_errors(differentiable):
    with pytest.raises(TypeError, match="has no rule"):
        differentiable(np.sum)
    with pytest.raises(TypeError, match=r"differentiable\(ddnref\.eigh_topk, k=\.\.\.\)"):
        differentiable(ddnref.eigh_topk)


def test_optional_inputs(jax, differentiable, rng):
    """Weighted least squares without its last input, the ridge."""
    from jax.test_util import check_grads

    op = differentiable(ddnref.nodes.weighted_least_squares)
    a, b, weights = (jax.numpy.asarray(rng.uniform(0.5, 1.5, shape)) for shape in ((6, 2), (6,), (6,)))
    check_grads(op, (a, b, weights), order=2, modes=["rev"])
