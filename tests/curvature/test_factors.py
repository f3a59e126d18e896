"""The Gram matrix of given factors, against the columns written out and a function in JAX."""

import numpy as np
import pytest

from ddnref import curvature, networks

EXACT = 1e-12


def columns(u, delta, bias):
    """V^T, one row for each factor and sample."""
    if u.ndim == 2:
        u, delta = u[:, None, :], delta[:, :, None, :]
    v = np.einsum("mnpo,npa->mnoa", delta, u).reshape(delta.shape[0] * u.shape[0], -1)
    return np.concatenate([v, delta.sum(2).reshape(len(v), -1)], 1) if bias else v


@pytest.mark.parametrize("positions", [2, 4])
@pytest.mark.parametrize("bias", [True, False, [True, False]])
def test_against_the_columns(bias, positions, xp, rng):
    """Positions are fewer or more than the square root of the inputs, which decides how they are multiplied."""
    us = [rng.standard_normal((4, 3)), rng.standard_normal((4, positions, 6))]
    deltas = [rng.standard_normal((2, 4, 5)), rng.standard_normal((2, 4, positions, 3))]
    got = xp.numpy(curvature.gram_from_factors([xp.asarray(u) for u in us], [xp.asarray(d) for d in deltas], bias=bias))
    each = bias if isinstance(bias, list) else [bias] * 2
    v = [columns(*pair) for pair in zip(us, deltas, each, strict=True)]
    expected = sum(a @ a.T for a in v)
    assert np.max(np.abs(got - expected)) <= EXACT * np.max(np.abs(expected))
    assert np.array_equal(got, got.T)


def test_it_is_that_of_a_chain(rng):
    chain = networks.Chain.mlp(4, 5, 3, 2)
    x, t = rng.standard_normal((6, 4)), np.arange(6) % 3
    y, saved = chain.forward(x, 1)
    s = np.moveaxis(chain.criterion.hessian_sqrt(y, t), -1, 0)
    hidden = (s @ chain.params[2]) * saved[0].slope
    k = curvature.gram_from_factors([x, saved[1].x], [hidden, s]) / 6
    w = curvature.ggn_eigvalsh(chain, x, t)
    assert np.max(np.abs(np.linalg.eigvalsh(k)[::-1] - w)) <= EXACT * w[0]


@pytest.mark.framework("jax")
def test_taps_of_a_function_in_jax():
    """The example on the page on the Gauss–Newton matrix; the oracle is the explicit Jacobian."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    w, v = (jnp.asarray(rng.standard_normal(shape)) for shape in ((5, 4), (3, 5)))
    x = jnp.asarray(rng.standard_normal((6, 4)))

    def network(params, taps):
        w, v = params
        s = x @ w.T + taps[0]
        z = jnp.tanh(s)
        return z @ v.T + taps[1], (x, z)

    taps = (jnp.zeros((6, 5)), jnp.zeros((6, 3)))
    y, pull, us = jax.vjp(lambda taps: network((w, v), taps), taps, has_aux=True)
    p = jax.nn.softmax(y)
    s = networks.cross_entropy().hessian_sqrt(y, jnp.zeros(6, dtype=jnp.int32))
    (deltas,) = jax.vmap(pull)(jnp.moveaxis(s, -1, 0))
    k = curvature.gram_from_factors(us, deltas, bias=False)
    j = jax.jacrev(lambda params: network(params, taps)[0])((w, v))
    j = jnp.concatenate([a.reshape(6, 3, -1) for a in j], -1)
    h = p[:, :, None] * jnp.eye(3) - p[:, :, None] * p[:, None, :]
    g = jnp.einsum("nci,ncd,ndj->ij", j, h, j)
    expected = np.linalg.eigvalsh(np.asarray(g))[::-1][:12]
    assert np.max(np.abs(np.linalg.eigvalsh(np.asarray(k))[::-1] - expected)) <= EXACT * expected[0]


@pytest.mark.parametrize(("us", "deltas", "options", "error", "message"), [
    ([(4, 3)], [], {}, ValueError, "us has 1 arrays and deltas 0"),
    ([], [], {}, ValueError, "us has 0 arrays"),
    ([(4, 3)], [(2, 4, 5)], {"bias": [True, False]}, ValueError, "bias has 2 entries, expected 1"),
    ([(4, 3)], [(4, 5)], {}, ValueError, r"us\[0\] has shape \(4, 3\) and deltas\[0\] \(4, 5\)"),
    ([(4, 3)], [(2, 5, 5)], {}, ValueError, r"deltas\[0\] has shape \(2, 5, 5\)"),
    ([(4, 2, 3)], [(2, 4, 1, 5)], {}, ValueError, r"deltas\[0\] has shape \(2, 4, 1, 5\)"),
    ([(4, 3), (5, 3)], [(2, 4, 5), (2, 5, 5)], {}, ValueError, r"us\[1\] has shape \(5, 3\)"),
    ([(4, 3), (4, 3)], [(2, 4, 5), (3, 4, 5)], {}, ValueError, r"deltas\[1\] has shape \(3, 4, 5\)"),
])  # fmt: skip
def test_bad_input(us, deltas, options, error, message):
    with pytest.raises(error, match=message):
        curvature.gram_from_factors([np.ones(s) for s in us], [np.ones(s) for s in deltas], **options)
