"""The Laplace approximation by the Gram matrix, against dense matrices of all parameters."""

import math

import numpy as np
import pytest
from network_problems import block_arrays, block_chain, flat, random_chain, targets

from ddnref import NonFiniteError, curvature, networks
from ddnref.reference import network_ggn, network_jacobian

EXACT = 1e-10


def problem(rng, loss="cross_entropy", n=7):
    chain = random_chain(rng, loss, reduction="sum")
    return chain, rng.standard_normal((n, 4)), targets(rng, loss, n, 3), rng.standard_normal((5, 4))


def reference(chain, x, t, x_new, precision):
    """Evidence and covariances from ``H = G + δ I``, without the Gram matrix."""
    h = network_ggn(chain, x, t) + precision * np.eye(sum(p.size for p in chain.params))
    theta = flat(chain.params)
    evidence = -chain.loss(x, t) - precision / 2 * theta @ theta
    evidence += len(theta) / 2 * math.log(precision) - np.linalg.slogdet(h)[1] / 2
    j = network_jacobian(chain, x_new).reshape(len(x_new), 3, -1)
    return evidence, j @ np.linalg.solve(h, np.swapaxes(j, 1, 2))


def error(got, expected):
    return np.max(np.abs(got - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("precision", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_against_dense_matrices(loss, precision, rng, monkeypatch):
    monkeypatch.setattr("ddnref.curvature.ggn._laplace.SAMPLES", 2)
    chain, x, t, x_new = problem(rng, loss)
    found = curvature.ggn_laplace(chain, x, t, precision=precision, x_new=x_new)
    evidence, covariance = reference(chain, x, t, x_new, precision)
    assert abs(found.log_evidence - evidence) <= EXACT * abs(evidence)
    assert error(found.covariance, covariance) <= EXACT
    assert np.array_equal(found.mean, chain.output(x_new)) or error(found.mean, chain.output(x_new)) <= 1e-15
    alone = curvature.ggn_laplace(chain, x, t, precision=precision)
    assert alone.mean is None
    assert alone.covariance is None
    assert alone.log_evidence == found.log_evidence


def test_the_evidence_of_a_linear_model_is_exact(rng):
    """Compare with the density of the targets: of Gaussians of variance 1/2 the approximation is the posterior."""
    w, x = rng.standard_normal((1, 3)), rng.standard_normal((6, 3))
    t, precision = rng.standard_normal((6, 1)), 0.7
    h = 2 * x.T @ x + precision * np.eye(3)
    w = np.linalg.solve(h, 2 * x.T @ t).T  # the minimum
    chain = networks.Chain([networks.Dense(w)], "mse", "sum")
    cov = np.eye(6) / 2 + x @ x.T / precision
    density = -t[:, 0] @ np.linalg.solve(cov, t[:, 0]) / 2 - np.linalg.slogdet(2 * math.pi * cov)[1] / 2
    found = curvature.ggn_laplace(chain, x, t, precision=precision).log_evidence
    # The squared error is the negative logarithm of the density but for its factor, √π for each of six samples.
    assert abs(found - (density + 3 * math.log(math.pi))) <= 1e-10


def test_convolutions_and_libraries(xp, rng):
    arrays = block_arrays(rng)
    x, t = rng.standard_normal((5, 1, 4, 5)), rng.integers(0, 3, 5)
    here, there = block_chain(arrays), block_chain([xp.asarray(a) for a in arrays])
    expected = curvature.ggn_laplace(here, x, t, precision=0.5, x_new=x)
    found = curvature.ggn_laplace(there, xp.asarray(x), xp.asarray(t), precision=0.5, x_new=xp.asarray(x))
    for a, b in zip(found, expected, strict=True):
        assert error(xp.numpy(a), b) <= EXACT


@pytest.mark.framework("torch")
def test_a_module(torch, rng):
    from ddnref.interop.torch import ggn

    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x, t = torch.asarray(rng.standard_normal((6, 4))), torch.arange(6) % 3
    expected = curvature.ggn_laplace(networks.Chain.from_torch(module), x, t, precision=0.5, x_new=x[:2])
    found = curvature.ggn_laplace(ggn(module), x, t, precision=0.5, x_new=x[:2])
    assert all(error(a.numpy(), b.numpy()) <= EXACT for a, b in zip(found, expected, strict=True))


def test_bad_input(rng):
    chain, x, t, x_new = problem(rng)
    for precision in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="precision is"):
            curvature.ggn_laplace(chain, x, t, precision=precision)
    with pytest.raises(TypeError, match="precision is a str"):
        curvature.ggn_laplace(chain, x, t, precision="1")
    with pytest.raises(ValueError, match="no samples"):
        curvature.ggn_laplace(chain, x[:0], t[:0], precision=1.0)
    with pytest.raises(ValueError, match="out of range"):
        curvature.ggn_laplace(chain, x, t + 3, precision=1.0)
    assert np.isnan(curvature.ggn_laplace(chain, x, t + 3, precision=1.0, throw=False).log_evidence)
    assert curvature.ggn_laplace(chain, x, t, precision=1.0, x_new=x_new[:0]).covariance.shape == (0, 3, 3)
    x[3, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"numbers 3"):
        curvature.ggn_laplace(chain, x, t, precision=1.0)
