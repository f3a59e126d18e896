"""The same call gives the same bits: again, in several threads at once, and however often a flag is looked at."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from public_names import PUBLIC
from threadpoolctl import threadpool_limits

import ddnref
from ddnref import krylov, networks, nodes

rng = np.random.default_rng(0)
MATRICES = rng.standard_normal((200, 32, 32))
V_BAR = rng.standard_normal((200, 32, 32))
SYSTEM = MATRICES[0] @ MATRICES[0].T + np.eye(32)
B = rng.standard_normal((6, 32))
COST = rng.random((5, 12, 16))
P, Q = np.full((5, 12), 1 / 12), np.full((5, 16), 1 / 16)


def eigh_and_vjp():
    w, v = ddnref.eigh(MATRICES)
    return w, v, ddnref.eigh_vjp(None, V_BAR, w, v)


def curvature():
    chain = networks.Chain.mlp(8, 8, 4, 6, bias=False)
    x, t = B[:4, :8], np.asarray([0, 1, 2, 3])
    step, _ = ddnref.curvature.hessian_solve(chain, x, t, chain.gradient(x, t), damping=0.1)
    return (*step, ddnref.curvature.ggn_eigvalsh(chain, x, t, mc_samples=1))


CALLS = {
    "eigh": eigh_and_vjp,
    "eigsh": lambda: ddnref.eigsh(MATRICES[0], 2, method="iterative")[0],
    "cg": lambda: krylov.cg(SYSTEM, B)[0],
    "gmres": lambda: krylov.gmres(MATRICES[0] + 20 * np.eye(32), B)[0],
    "sinkhorn": lambda: nodes.sinkhorn(COST, P, Q, 0.1)[0],
    "curvature": curvature,
}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_again_and_in_eight_threads(name):
    first = CALLS[name]()
    with threadpool_limits(1), ThreadPoolExecutor(8) as pool:
        assert all(same(result, first) for result in pool.map(lambda _: CALLS[name](), range(16)))


@pytest.mark.parametrize("solver", ["cg", "minres", "gmres", "bicgstab", "lsmr"])
def test_check_every_changes_no_bit(solver):
    solve = PUBLIC[solver]
    assert np.array_equal(solve(SYSTEM, B)[0], solve(SYSTEM, B, check_every=7)[0])


def test_an_item_of_a_batch_has_the_same_bits_alone():
    w, v, x_bar = eigh_and_vjp()
    w_2, v_2 = ddnref.eigh(MATRICES[2])
    assert same((w_2, v_2, ddnref.eigh_vjp(None, V_BAR[2], w_2, v_2)), (w[2], v[2], x_bar[2]))


def test_global_generators_are_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - it is the one that must not move
    ddnref.eigsh(MATRICES[0], 2, method="iterative")
    ddnref.power_iteration(SYSTEM, throw=False)
    curvature()
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
