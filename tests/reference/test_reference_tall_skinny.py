"""The textbook form of the Hessian solve against the dense matrix, and where it loses its digits."""

import numpy as np
import pytest
from hessian_problems import backward_error, dense, lists, network, problem

from conftest import backend
from ddnref import curvature, networks, reference


@pytest.mark.parametrize(("n_layers", "a", "n"), [(1, 4, 2), (2, 4, 3), (5, 3, 1), (4, 3, 7)])
def test_product_and_solve(n_layers, a, n, rng):
    check(n_layers, a, n, backend("numpy"), rng)


def test_every_library(xp, rng):
    check(2, 3, 3, xp, rng)


def check(n_layers, a, n, xp, rng):
    chain, x, t = network(rng, n_layers, a, n)
    h = dense(chain, x, t)
    v = rng.standard_normal(len(h))
    arrays = networks.Chain.from_arrays([xp.asarray(p) for p in chain.params])
    arrays = networks.Chain([*arrays.layers[:-1], networks.Dense(arrays.params[-1])], "cross_entropy")
    layers = reference.tall_skinny_derivatives(arrays, xp.asarray(x), xp.asarray(t))
    parts = [xp.asarray(u.reshape(-1)) for u in (z[0] for z in lists(v[None], chain))]
    hv = np.concatenate([xp.numpy(u) for u in reference.tall_skinny_product(layers, parts)])
    np.testing.assert_allclose(hv, h @ v, rtol=0, atol=1e-12 * np.linalg.norm(h @ v))
    u = np.concatenate([xp.numpy(z) for z in reference.tall_skinny_solve(layers, parts, 0.1)])
    exact = np.linalg.solve(h + 0.1 * np.eye(len(h)), v)
    np.testing.assert_allclose(u, exact, rtol=0, atol=1e-10 * np.linalg.norm(exact))


def test_it_needs_what_the_elimination_across_layers_needs(rng):
    """It fails if the first block that it eliminates is singular, even for a well-conditioned system."""
    q = problem(rng, 5, 4, 3)
    layers = reference.tall_skinny_derivatives(q.chain, q.x, q.t)
    pivot = layers[0].dxx + layers[0].dx.T @ layers[1].dzz @ layers[0].dx
    first = -float(np.linalg.eigvalsh(pivot)[-1])
    assert np.max(np.abs(q.w + first)) / np.min(np.abs(q.w + first)) < 1e4
    parts = [z.reshape(-1) for z in lists(q.b, q.chain)]
    with np.errstate(all="ignore"):
        flat = np.concatenate(reference.tall_skinny_solve(layers, parts, first))
    theirs = [z[0] for z in lists(flat[None], q.chain)]
    ours, _ = curvature.hessian_solve(q.chain, q.x, q.t, [z[0] for z in lists(q.b, q.chain)], damping=first)
    assert not backward_error(q, first, theirs) < 1e-10
    assert backward_error(q, first, ours) < 2e-15


def test_static_errors(rng):
    chain, x, t = network(rng, 2, 3, 2, bias=True)
    with pytest.raises(TypeError, match="without bias"):
        reference.tall_skinny_derivatives(chain, x, t)
