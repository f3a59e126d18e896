"""Gather and scatter-add by fixed indices: every library against NumPy's ``add.at``, and the indices themselves."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

from ddnref._kernels import scatter
from ddnref._kernels.scatter import Indices, fixed_integers, gather, scatter_add, scatter_difference

N = 5


def at(x, index, n=N):
    y = np.zeros((*x.shape[:-1], n), x.dtype)
    np.add.at(y, (..., np.asarray(index, dtype=int)), x)
    return y


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3), (0,)])
@pytest.mark.parametrize("index", [[0, 2, 2, 4, 0, 2], [3], []])
def test_against_add_at(dtype, lead, index, xp, rng):
    k, other = Indices(index, N), Indices(index[::-1], N)
    x = rng.standard_normal((*lead, len(index)))
    x = (x + 1j * rng.standard_normal(x.shape) if np.issubdtype(dtype, np.complexfloating) else x).astype(dtype)
    rtol = 1e-6 if np.finfo(dtype).eps > 1e-10 else 1e-14
    given = xp.namespace.asarray(x)
    for found, wanted in (
        (xp.jit(lambda x: scatter_add(x, k))(given), at(x, k.values)),
        (xp.jit(lambda x: scatter_difference(x, k, other))(given), at(x, k.values) - at(x, other.values)),
        (gather(scatter_add(given, k), k), at(x, k.values)[..., k.values]),
        (scatter.scatter_add_by_comparison(given, k), at(x, k.values)),
    ):
        assert xp.numpy(found).dtype == dtype
        np.testing.assert_allclose(xp.numpy(found), wanted, rtol=rtol, atol=rtol)


def test_many_numbers_in_blocks(xp, rng):
    index = rng.integers(0, N, 3 * scatter.BLOCK + 7)
    x = rng.standard_normal((2, index.size))
    for function in (scatter_add, scatter.scatter_add_by_comparison):
        found = xp.numpy(function(xp.asarray(x), Indices(index, N)))
        np.testing.assert_allclose(found, at(x, index), rtol=1e-12, atol=1e-12)


def test_what_is_not_finite_stays_where_it_is(xp):
    x = xp.asarray(np.asarray([1.0, np.nan, 3.0, np.inf]))
    for function in (scatter_add, scatter.scatter_add_by_comparison):
        found = xp.numpy(function(x, Indices([0, 1, 2, 4], N)))
        np.testing.assert_array_equal(found, [1, np.nan, 3, 0, np.inf])


def test_indices_compare_by_value():
    k = Indices([0, 2, 2], N)
    for same in (Indices(np.asarray([0, 2, 2], np.int32), N), pickle.loads(pickle.dumps(k)), copy.deepcopy(k)):
        assert k == same
        assert hash(k) == hash(same)
    assert all(k != other for other in (Indices([0, 2, 1], N), Indices([0, 2, 2], 6), Indices([0, 2], N), [0, 2, 2]))
    collides = Indices([0, 2, 1], N)
    collides._hash = hash(k)
    assert k != collides
    with pytest.raises(ValueError, match="read-only"):
        k.values[0] = 1


def test_later_changes_of_the_given_array_are_not_seen():
    given = np.asarray([0, 1, 2])
    k = Indices(given, N)
    given[0] = 4
    np.testing.assert_array_equal(k.values, [0, 1, 2])


def test_an_array_of_each_library_is_made_once(xp):
    k, x = Indices([0, 2, 2], N), xp.asarray(np.ones(N))
    assert k.like(x) is k.like(x)
    np.testing.assert_array_equal(xp.numpy(k.like(x)), k.values)
    matrix = weakref.ref(k)
    del k, x
    gc.collect()
    assert matrix() is None


def test_on_another_device(second):
    k = Indices([0, 2, 2], N)
    x = second.asarray(np.asarray([1.0, 2.0, 4.0]))
    assert scatter_add(x, k).device == gather(x, k).device == k.like(x).device == x.device


def test_integers_of_every_library(xp):
    values = np.asarray([[0, 1], [1, 2]])
    np.testing.assert_array_equal(fixed_integers("edges", xp.namespace.asarray(values)), values)
    with pytest.raises(TypeError, match="edges has dtype float64, expected integers"):
        fixed_integers("edges", xp.asarray(values / 1.0))


@pytest.mark.framework("jax")
def test_traced_integers_are_refused():
    import jax

    with pytest.raises(TypeError, match="edges is traced by JAX, but indices are fixed"):
        jax.jit(lambda edges: fixed_integers("edges", edges))(jax.numpy.asarray([0, 1]))


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_under_transforms_and_the_compiler_of_pytorch(rng):
    import torch

    x = torch.asarray(rng.standard_normal((4, 3)))
    for wrap in (torch.func.vmap, lambda f: torch.compile(f, fullgraph=True, backend="eager")):
        k = Indices([0, 2, 2], N)
        found = wrap(lambda x, k=k: scatter_add(x, k))(x)
        torch.testing.assert_close(found, torch.asarray(at(x.numpy(), k.values)))
        assert k.made == {}
        torch.testing.assert_close(scatter_add(x, k), found)
        torch.testing.assert_close(wrap(lambda x, k=k: scatter_add(x, k))(x), found)
