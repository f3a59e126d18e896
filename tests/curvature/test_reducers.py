"""Reducers over shards: any split, any grouping gives the numbers of the whole."""

import numpy as np
import pytest

import ddnref
from ddnref import curvature

SPLITS = [(6,), (1, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1)]


def columns(v, split):
    ends = np.cumsum(split)
    return [v[..., end - size : end] for size, end in zip(split, ends, strict=True)]


def reduced(reducer, shards):
    state = reducer.init()
    for shard in shards:
        state = reducer.update(state, shard)
    return state


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("is_complex", [False, True])
def test_shards_of_columns_give_the_whole(split, is_complex, rng):
    v = rng.standard_normal((2, 9, 6)) + (1j * rng.standard_normal((2, 9, 6)) if is_complex else 0)
    reducer = curvature.gram_reducer()
    k = reducer.finalise(reduced(reducer, columns(v, split)))
    assert np.max(np.abs(k - np.conj(np.swapaxes(v, -1, -2)) @ v)) <= 1e-12
    assert np.array_equal(k, np.conj(np.swapaxes(k, -1, -2))), "not exactly Hermitian"
    np.testing.assert_allclose(ddnref.eigh(k)[0][..., ::-1], curvature.gram_eigvalsh(v), atol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
def test_shards_of_rows_give_the_whole(split, rng):
    v = rng.standard_normal((6, 4))
    reducer = curvature.gram_reducer("rows")
    state = reduced(reducer, [np.ascontiguousarray(part.T) for part in columns(v.T, split)])
    assert np.max(np.abs(reducer.finalise(state) - v.T @ v)) <= 1e-12
    assert len(state.blocks) == 1, "nothing of a shard is kept"
    assert state.shards == ()


def test_on_every_library(xp, rng):
    v = rng.standard_normal((9, 6))
    shards = [xp.asarray(np.ascontiguousarray(part)) for part in (v[:, :2], v[:, 2:4], v[:, 4:])]
    reducer, by_rows = curvature.gram_reducer(), curvature.gram_reducer("rows")

    def everything(*shards):
        state = reducer.merge(reduced(reducer, shards[:2]), reduced(reducer, shards[2:]))
        added = reduced(by_rows, shards)
        return reducer.finalise(state), by_rows.finalise(added)

    k, added = xp.tuple(xp.jit(everything)(*shards))
    assert np.max(np.abs(k - v.T @ v)) <= 1e-12
    assert np.max(np.abs(added - sum(v[:, i : i + 2].T @ v[:, i : i + 2] for i in (0, 2, 4)))) <= 1e-12


@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_merging_is_associative_and_keeps_the_order(kind, rng):
    v = rng.standard_normal((5, 12, 3)) if kind == "columns" else rng.standard_normal((5, 3, 12))
    reducer = curvature.gram_reducer(kind)
    a, b, c, d, e = (reducer.update(reducer.init(), shard) for shard in v)
    left = reducer.merge(reducer.merge(reducer.merge(a, b), c), reducer.merge(d, e))
    right = reducer.merge(a, reducer.merge(reducer.merge(b, c), reducer.merge(d, e)))
    whole = np.concatenate(v, axis=-1 if kind == "columns" else 0)
    for state in (left, right, reducer.merge(reducer.init(), left), reducer.merge(right, reducer.init())):
        assert np.max(np.abs(reducer.finalise(state) - whole.T @ whole)) <= 1e-12


def test_an_update_leaves_the_old_state_as_it_was(rng):
    v = rng.standard_normal((3, 9, 2))
    for kind in ("columns", "rows"):
        reducer = curvature.gram_reducer(kind)
        first = reducer.update(reducer.init(), v[0])
        before = reducer.finalise(first).copy()
        reducer.update(first, v[1])
        reducer.merge(first, reducer.update(reducer.init(), v[2]))
        assert np.array_equal(reducer.finalise(first), before)


def test_pieces_in_shards(rng):
    v = rng.standard_normal((9, 6))
    reducer = curvature.gram_reducer()
    state = reduced(reducer, [[v[:4, :2], v[4:, :2]], [v[:4, 2:], v[4:, 2:]]])
    assert np.max(np.abs(reducer.finalise(state) - v.T @ v)) <= 1e-12


def test_a_memory_mapped_shard_stays_on_the_disk(tmp_path, rng):
    v = np.lib.format.open_memmap(tmp_path / "v.npy", mode="w+", dtype=np.float64, shape=(6, 40))
    v[...] = rng.standard_normal(v.shape)
    reducer = curvature.gram_reducer()
    state = reduced(reducer, [v[:3].T, v[3:].T])
    assert all(isinstance(piece, np.memmap) for pieces in state.shards for piece in pieces)
    assert np.max(np.abs(reducer.finalise(state) - v @ v.T)) <= 1e-12


def test_sums(xp, rng):
    v, u = rng.standard_normal((9, 6)), rng.standard_normal((6, 2))
    reducer = curvature.sum_reducer(lambda v, u: v @ u)
    state = reducer.init()
    for i in range(0, 6, 2):
        state = reducer.update(state, xp.asarray(v[:, i : i + 2]), xp.asarray(u[i : i + 2]))
    assert np.max(np.abs(xp.numpy(reducer.finalise(state)) - v @ u)) <= 1e-12


def test_means_are_weighted_by_their_shards(rng):
    x = rng.standard_normal((10, 3))
    reducer = curvature.sum_reducer(lambda x: [np.mean(x, axis=0), (np.mean(x),)], weight=len)
    states = [reducer.update(reducer.init(), part) for part in (x[:1], x[1:4], x[4:])]
    for merged in (
        reducer.merge(reducer.merge(*states[:2]), states[2]),
        reducer.merge(states[0], reducer.merge(*states[1:])),
        reducer.merge(reducer.init(), reducer.merge(reducer.merge(*states[:2]), states[2])),
    ):
        each, (all_of_them,) = reducer.finalise(merged)
        np.testing.assert_allclose(each, np.mean(x, axis=0), atol=1e-14)
        np.testing.assert_allclose(all_of_them, np.mean(x), atol=1e-14)


def test_a_named_tuple_stays_one(rng):
    reducer = curvature.sum_reducer(lambda x: curvature.SumState(x, 1.0))
    state = reducer.update(reducer.update(reducer.init(), np.ones(2)), np.ones(2))
    assert isinstance(reducer.finalise(state), curvature.SumState)
    assert reducer.finalise(state).weight == 2.0


def test_errors(rng):
    v = rng.standard_normal((5, 3))
    with pytest.raises(ValueError, match="shards is 'samples', expected"):
        curvature.gram_reducer("samples")
    for kind in ("columns", "rows"):
        reducer = curvature.gram_reducer(kind)
        with pytest.raises(ValueError, match="no shard"):
            reducer.finalise(reducer.init())
        with pytest.raises(ValueError, match="vectors are columns"):
            reducer.update(reducer.init(), v[0])
    reducer = curvature.gram_reducer("rows")
    with pytest.raises(ValueError, match="shard of rows has shape"):
        reducer.update(reducer.update(reducer.init(), v), v[:, :2])
    reducer = curvature.gram_reducer()
    with pytest.raises(ValueError, match=r"shape \(4, 3\), of another \(5, 3\)"):
        reducer.update(reducer.update(reducer.init(), v), v[:4])
    with pytest.raises(ValueError, match="has 2 pieces, another 1"):
        reducer.update(reducer.update(reducer.init(), v), [v, v])
    reducer = curvature.sum_reducer(np.sum, weight=lambda x: 0.0)
    with pytest.raises(ValueError, match="no shard"):
        reducer.finalise(reducer.init())
    with pytest.raises(ValueError, match="add up to zero"):
        reducer.finalise(reducer.update(reducer.init(), v))
