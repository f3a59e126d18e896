"""Dask: the numbers of the plain functions, block by block; in two processes; and when one of these is killed."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from problems import symmetric
from public_names import PUBLIC

import ddnref
from ddnref import curvature, networks, nodes, operators
from ddnref._rules.binding import as_tuple, leaves, options_of
from ddnref._rules.table import RULES, TRIALS

pytestmark = pytest.mark.framework("dask")
dask = pytest.importorskip("dask", reason='pip install "ddnref[dask]"')  # CI fails where anything is skipped

import dask.array as da  # noqa: E402

from ddnref.interop.dask import map_gradients, map_items, reduce_blocks  # noqa: E402

CASES = [(name, is_complex) for name, rule in RULES.items() for is_complex in (False, True)
         if TRIALS[rule.name].is_complex or not is_complex]  # fmt: skip

ANY_SAVED = ("eigsh", "eigsh_generalized", "svds")  # the number of arrays that these save depends on their method


@pytest.fixture(autouse=True)
def _here(request):
    """In this thread, unless the test has a cluster."""
    if "client" in request.fixturenames:
        yield
    else:
        with dask.config.set(scheduler="synchronous"):
            yield


def chunked(array, *sizes):
    """Chunks along the leading axes."""
    return da.from_array(array, chunks=(*sizes, *array.shape[len(sizes) :]))


def assert_same(found, expected, rtol=0.0):
    """Compare to the last bit or to rounding, and check the announced nesting, shapes, dtypes and metadata."""
    assert type(found) is (type(expected) if isinstance(expected, tuple) else da.Array)
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            assert_same(f, e, rtol)
        return
    values = found.compute()
    expected = np.asarray(expected)
    assert found.shape == values.shape == expected.shape
    assert found.dtype == values.dtype == found._meta.dtype == expected.dtype
    assert found._meta.ndim == expected.ndim
    np.testing.assert_allclose(values, expected, rtol=0, atol=rtol * max(np.abs(expected).max(initial=0), 1e-300))


# --- every rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "is_complex"), CASES)
def test_the_numbers_of_the_plain_functions(name, is_complex, rng):
    rule = RULES[name]
    sample = TRIALS[rule.name].sample(np.asarray, rng, (3, 2), 5, is_complex)
    forward_options, vjp_options = options_of(rule, sample.options)
    inputs = [chunked(x, 2, 1) for x in sample.inputs]
    expected = rule.function(*sample.inputs, **forward_options)
    assert_same(map_items(rule.function, *inputs, **forward_options), expected)

    result = rule.forward(*sample.inputs, **forward_options)
    outputs, saved = result[0] if rule.info is not None else result
    if PUBLIC.get(f"{name}_fwd") is rule.forward and name not in ANY_SAVED:
        assert_same(map_items(rule.forward, *inputs, **forward_options), result)
    outputs, saved = as_tuple(outputs), () if name in ANY_SAVED else saved
    draw = lambda *ys: [rng.standard_normal(y.shape).astype(y.dtype) for y in ys]
    bars = draw(*outputs) if sample.loss is None else as_tuple(sample.loss[1](*outputs))[: rule.outputs]
    arrays = (*bars, *outputs, *saved, *(sample.inputs[i] for i in rule.needs))
    found = map_items(rule.vjp, *(chunked(a, 2, 1) for a in arrays), **vjp_options)
    # Eigenvectors that were cut out of an array lie in memory otherwise, and BLAS adds up in another order.
    assert_same(found, rule.vjp(*arrays, **vjp_options), rtol=1e-11)


@pytest.mark.parametrize("name", RULES)
def test_fused_gradients(name, rng):
    """The gradients equal those of forward and VJP by hand, and the values are those that the loss returned."""
    rule = RULES[name]
    sample = TRIALS[rule.name].sample(np.asarray, rng, (5,), 5, False)
    forward_options, vjp_options = options_of(rule, sample.options)
    result = rule.forward(*sample.inputs, **forward_options)
    outputs, saved = result[0] if rule.info is not None else result
    outputs = as_tuple(outputs)
    weights = [rng.standard_normal(y.shape) for y in outputs]

    def loss(*arrays):
        ys, cs = arrays[: len(outputs)], arrays[len(outputs) :]
        return sum(np.sum((c * y).reshape(len(y), -1), axis=-1) for c, y in zip(cs, ys, strict=True)), cs

    inputs, data = ([chunked(x, 2) for x in arrays] for arrays in (sample.inputs, weights))
    found = map_gradients(rule.function, loss, *inputs, data=data, throw=False, **sample.options)
    needed = (sample.inputs[i] for i in rule.needs)
    gradients = rule.vjp(*weights, *outputs, *saved, *needed, **vjp_options)
    gradients = gradients[0] if rule.vjp_info is not None else gradients
    assert_same(found, (loss(*outputs, *weights)[0], gradients))


def test_without_cotangents_and_of_some_columns(rng):
    x = symmetric(rng, 4, (5,))
    w, v = ddnref.eigh(x)
    pairs = map_items(ddnref.eigh, chunked(x, 2))
    w_bar = rng.standard_normal((5, 2))
    found = map_items(ddnref.eigh_vjp, chunked(w_bar, 2), None, *pairs, index=(-1, 0))
    assert_same(found, ddnref.eigh_vjp(w_bar, None, w, v, index=(-1, 0)))


@pytest.mark.parametrize("ridge", [True, False])
def test_optional_inputs(ridge, rng):
    a, b, weights = rng.random((4, 5, 2)), rng.random((4, 5)), rng.random((4, 5))
    inputs = (a, b, weights, rng.random(4)) if ridge else (a, b, weights)
    y = nodes.weighted_least_squares(*inputs, bias=False)
    arrays = [chunked(z, 3) for z in inputs]
    found = map_items(nodes.weighted_least_squares, *arrays, bias=False)
    assert_same(found, y)
    bars = map_items(nodes.weighted_least_squares_vjp, found, found, *arrays, bias=False)
    expected = nodes.weighted_least_squares_vjp(y, y, *inputs, bias=False)
    assert_same(bars[:3], expected[:3])
    assert (bars[3] is None) is (not ridge)
    _, gradients = map_gradients(nodes.weighted_least_squares, halves, *arrays, bias=False)
    assert_same(gradients, expected[: len(inputs)])


def halves(*outputs):
    """Half the sum of squares, whose cotangents are the outputs."""
    return sum(np.sum((y * y).reshape(len(y), -1), axis=-1) for y in outputs) / 2, outputs


# --- what is shared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (5, 4, 4), (1, 1, 4, 4)])
@pytest.mark.parametrize("batch", [(5,), (3, 5)])
def test_a_shared_array_gets_the_sum_of_its_cotangents(shape, batch, rng):
    a = rng.standard_normal(shape) + 4 * np.eye(4)
    b = rng.standard_normal((*batch, 4))
    x, _ = ddnref.linear_solve(a, b)
    x_bar = rng.standard_normal(x.shape)
    arrays = da.from_array(a, chunks=(*(2,) * (a.ndim - 2), 4, 4)), chunked(b, *(2,) * len(batch))
    found, info = map_items(ddnref.linear_solve, *arrays)
    assert_same(found, x, rtol=1e-14)
    assert info.converged.all().compute()
    bars, _ = map_items(ddnref.linear_solve_vjp, chunked(x_bar, *(2,) * (x.ndim - 1)), found, *arrays)
    (a_bar, b_bar), _ = ddnref.linear_solve_vjp(x_bar, x, a, b)
    assert bars[0].shape == a.shape
    np.testing.assert_allclose(bars[0].compute(), a_bar, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(bars[1].compute(), b_bar, rtol=1e-13, atol=1e-14)


def test_a_factorisation_that_is_shared(rng):
    a, b = rng.standard_normal((4, 4)) + 4 * np.eye(4), rng.standard_normal((5, 4))
    x, saved = ddnref.solve_fwd(a, b)
    arrays = chunked(b, 2), chunked(x, 2), *(da.from_array(s) for s in saved)
    a_bar, b_bar = map_items(ddnref.solve_vjp, *arrays)
    for found, expected in zip((a_bar, b_bar), ddnref.solve_vjp(b, x, *saved), strict=True):
        np.testing.assert_allclose(found.compute(), expected, rtol=1e-13, atol=1e-14)
    with pytest.raises(ValueError, match="would compute again what solve_fwd saves"):
        map_items(ddnref.solve_fwd, da.from_array(a), chunked(b, 2))


def test_bare_arrays_are_one_block(rng):
    """Beside Dask arrays, whose chunks they take; shared, where they have no batch axes; and alone."""
    a, b = rng.standard_normal((5, 4, 4)) + 4 * np.eye(4), rng.standard_normal((5, 4))
    found = map_items(ddnref.solve, a, chunked(b, 2))
    assert found.chunks == ((2, 2, 1), (4,))
    assert_same(found, ddnref.solve(a, b))
    assert_same(map_items(ddnref.solve, a[0], chunked(b, 2)), ddnref.solve(a[0], b), rtol=1e-14)
    w, v = map_items(ddnref.eigh, a)
    assert w.numblocks == (1, 1)
    assert_same((w, v), ddnref.eigh(a))
    weighted = lambda x, c: (np.sum(c * x, axis=-1), (c,))
    value, gradients = map_gradients(ddnref.solve, weighted, a[0], chunked(b, 2), data=[b])
    x, saved = ddnref.solve_fwd(a[0], b)
    assert_same(value, np.sum(b * x, axis=-1), rtol=1e-14)
    assert_same(gradients, ddnref.solve_vjp(b, x, *saved), rtol=1e-12)


@pytest.mark.parametrize("batch", [(7,), (3, 5), ()])
def test_one_number_for_a_block(batch, rng):
    """Its sum over the blocks, one of which may be empty, and the gradient of the sum; a loss that couples items."""
    x = symmetric(rng, 3, batch)

    def coupled(w, v):
        return np.sum(w) ** 2, (2 * np.sum(w) + 0 * w, None)

    value, gradient = map_gradients(ddnref.eigh, coupled, chunked(x, *(2,) * len(batch)), loss_per="block")
    blocks = [x[tuple(slice(2 * i, 2 * i + 2) for i in place)] for place in np.ndindex(*(-(-n // 2) for n in batch))]
    traces = [np.trace(block, axis1=-2, axis2=-1).sum() for block in blocks]
    assert value.shape == ()
    assert value.dtype == value._meta.dtype == float
    np.testing.assert_allclose(value.compute(), np.sum(np.square(traces)), rtol=1e-12)
    first = tuple(slice(2) for _ in batch)
    np.testing.assert_allclose(
        gradient.compute()[first], 2 * traces[0] * np.broadcast_to(np.eye(3), blocks[0].shape), atol=1e-12
    )
    if batch == (7,):
        keep = np.asarray([1, 1, 0, 0, 1, 0, 1], dtype=bool)  # nothing of the second block
        some = chunked(x, 2)[da.from_array(keep, chunks=2)]
        value, _ = map_gradients(ddnref.eigh, coupled, some, loss_per="block")
        traces = [np.trace(x[i:j][keep[i:j]], axis1=-2, axis2=-1).sum() for i, j in ((0, 2), (4, 6), (6, 7))]
        np.testing.assert_allclose(value.compute(), np.sum(np.square(traces)), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda x: ddnref.eigh(x), "x is a dask.Array: call ddnref.interop.dask.map_items(ddnref.eigh, x), which"),
        (lambda x: ddnref.eigh_topk(x, k=2), "call ddnref.interop.dask.map_items(ddnref.eigh_topk, x, k=...), which"),
        (lambda x: ddnref.eigh_vjp(x[..., 0], None, x[..., 0], x),
         "w_bar is a dask.Array: call ddnref.interop.dask.map_items(ddnref.eigh_vjp, w_bar, v_bar, w, v), which"),
        (lambda x: nodes.project_simplex(x), "ddnref.interop.dask.map_items(ddnref.nodes.project_simplex, x), which"),
        (lambda x: ddnref.solve(np.eye(4), x[..., 0]), "b is a dask.Array: pass the function to ddnref.interop.dask.m"),
        (lambda x: operators.diagonal(x[..., 0]), "or pass d.compute()"),
    ],
)  # fmt: skip
def test_a_plain_function_says_what_to_call(call, advice, rng):
    with pytest.raises(TypeError, match=re.escape(advice)):
        call(chunked(symmetric(rng, 4, (6,)), 2))


# --- chunks -----------------------------------------------------------------------------------------------------


def test_different_chunks_are_brought_together(rng):
    x = symmetric(rng, 3, (6,))
    w, v = ddnref.eigh(x)
    found = map_items(ddnref.eigh_vjp, chunked(w, 4), None, chunked(w, 2), chunked(v, 3))
    assert_same(found, ddnref.eigh_vjp(w, None, w, v))


def test_unknown_chunks(rng):
    x, keep = symmetric(rng, 3, (7,)), np.asarray([1, 0, 0, 1, 1, 0, 1], dtype=bool)
    some = chunked(x, 2)[da.from_array(keep, chunks=2)]  # its second block may be empty
    w, v = map_items(ddnref.eigh, some)
    assert np.isnan(w.shape[0])
    found = map_items(ddnref.eigh_vjp, 2 * w, None, w, v).compute()
    np.testing.assert_allclose(found, 2 * x[keep], atol=1e-13)
    _, gradient = map_gradients(ddnref.eigh, lambda w, v: (np.sum(w**2, axis=-1), (2 * w, None)), some)
    assert np.array_equal(gradient.compute(), found)
    b = chunked(rng.random((7, 3)), 2)[da.from_array(keep, chunks=2)]
    x, (lu, _) = map_items(ddnref.solve_fwd, some, b)
    assert lu.compute().shape == (4, 3, 3)
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        map_items(ddnref.eigh_vjp, chunked(np.ones((4, 3)), 2), None, w, v)
    unknown = da.from_array(np.ones((4, 3)), chunks=2)[:, da.from_array(np.ones(3, dtype=bool), chunks=2)]
    with pytest.raises(ValueError, match=r"unknown length inside an item: w_bar.compute_chunk_sizes\(\)"):
        map_items(ddnref.eigh_vjp, unknown, None, w, v)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3, 3), (4, 0, 0), (3, 3)])
def test_no_items_no_rows_no_batch(shape, rng):
    x = symmetric(rng, shape[-1], shape[:-2])
    found = map_items(ddnref.eigh, da.from_array(x))
    assert_same(found, ddnref.eigh(x))
    assert_same(map_items(ddnref.eigh_vjp, found[0], found[1], *found), ddnref.eigh_vjp(*ddnref.eigh(x) * 2))


def test_an_empty_block_among_others(rng):
    x = symmetric(rng, 3, (4,))
    blocks = da.concatenate([da.from_array(x[:0]), chunked(x, 3), da.from_array(x[:0])])
    assert_same(map_items(ddnref.sqrtm, blocks @ blocks), ddnref.sqrtm(x @ x))


class Own(np.ndarray):
    """An array type distinct from NumPy's, like CuPy's."""


def test_nothing_runs_while_the_graph_is_made(rng):
    """The metadata is stated: no trial run; and it is of the kind that the blocks are."""

    def refuse(w):
        raise AssertionError("called")

    x = chunked(symmetric(rng, 4, (5,)), 2).map_blocks(np.asarray, meta=np.empty((0, 0, 0)).view(Own))
    w, v = map_items(ddnref.eigh, x)
    y = map_items(ddnref.spectral_function, x, f=refuse)
    value, x_bar = map_gradients(ddnref.eigh, refuse, x)
    assert {type(array._meta) for array in (w, v, y, value, x_bar)} == {Own}


def test_gradients_take_one_task_a_block():
    """No task returns the arrays saved between forward and VJP, or the tuple of results."""
    gradient = map_gradients(ddnref.eigh, first_entry, matrices())[1]
    (found,) = dask.optimize(gradient)
    ours = {name for name in gradient.__dask_graph__().layers if name.startswith("eigh_gradient")}
    assert len(ours) == 2
    names = [key[0] for key in dict(found.__dask_graph__()) if isinstance(key, tuple)]
    assert names.count(gradient.name) == BLOCKS
    assert not {*names} & (ours - {gradient.name})


# --- failures ---------------------------------------------------------------------------------------------------


def test_a_bad_item_is_alone(rng):
    """NaN in one item, a singular matrix in another, in blocks of which the rest is right."""
    a, b = rng.standard_normal((6, 4, 4)), rng.standard_normal((6, 4))
    good = ddnref.solve(a, b)
    a_bar, b_bar = ddnref.solve_vjp(good, *flat(ddnref.solve_fwd(a, b)))
    a[1], a[4] = np.nan, 0
    arrays, keep = (chunked(a, 3), chunked(b, 3)), [0, 2, 3, 5]
    x = map_items(ddnref.solve, *arrays, throw=False)
    value, gradients = map_gradients(ddnref.solve, halves, *arrays, throw=False)
    for found, expected in zip((x, *gradients), (good, a_bar, b_bar), strict=True):
        assert np.array_equal(found.compute()[keep], expected[keep])
        assert np.all(np.isnan(found.compute()[[1, 4]]))
    assert np.array_equal(np.isnan(value.compute()), [0, 1, 0, 0, 1, 0])
    with pytest.raises(ddnref.SingularError):
        map_items(ddnref.solve, *arrays).compute()


def flat(result):
    return tuple(leaves(result))


def test_errors_keep_their_type(rng):
    x = np.stack([np.diag([1.0, 1.0, 2.0]), np.diag([1.0, 2.0, 3.0])])
    one_of_two = lambda w, v: (w[..., 0], (np.asarray([1.0, 0.0, 0.0]) + 0 * w, None))
    w, v = map_items(ddnref.eigh, chunked(x, 1))
    bar = da.zeros_like(w) + np.asarray([1.0, 0.0, 0.0])
    with pytest.raises(ddnref.GaugeError):
        map_items(ddnref.eigh_vjp, bar, None, w, v).compute()
    with pytest.raises(ddnref.GaugeError):
        map_gradients(ddnref.eigh, one_of_two, chunked(x, 1))[1].compute()
    for gradient in (
        map_items(ddnref.eigh_vjp, bar, None, w, v, throw=False),
        map_gradients(ddnref.eigh, one_of_two, chunked(x, 1), throw=False)[1],
    ):
        assert np.all(np.isnan(gradient[0].compute()))
        assert np.array_equal(gradient[1].compute(), np.diag([1.0, 0.0, 0.0]))
    with pytest.raises(ddnref.NonFiniteError):
        map_items(ddnref.eigh, chunked(x * np.nan, 1), check_finite=True)[0].compute()


def test_what_has_not_converged_has_a_status_and_no_gradient(rng):
    cost, p = rng.random((4, 3, 3)), np.full((4, 3), 1 / 3)
    p_bad = p.copy()
    p_bad[2] = -1.0
    arrays = [chunked(z, 3) for z in (cost, p_bad, p)]
    plan, info = map_items(nodes.sinkhorn, *arrays, 0.5, throw=False)
    assert np.array_equal(info.converged.compute(), [True, True, False, True])
    assert np.array_equal(np.isnan(plan.compute()).any(axis=(1, 2)), [False, False, True, False])
    with pytest.raises(ddnref.ConvergenceError):
        map_items(nodes.sinkhorn, *arrays, 0.5)[0].compute()
    value, (*bars, eps_bar) = map_gradients(nodes.sinkhorn, halves, *arrays, 0.5, throw=False)
    assert np.array_equal(np.isnan(value.compute()), [False, False, True, False])
    assert all(np.array_equal(np.isnan(g.compute()[:, 0].reshape(4, -1)).any(axis=1), [0, 0, 1, 0]) for g in bars)
    assert np.isnan(eps_bar.compute()), "the sum over all items, one of which has no gradient"
    with pytest.raises(ddnref.ConvergenceError):
        map_gradients(nodes.sinkhorn, halves, *arrays, 0.5)[0].compute()
    slow = chunked(np.stack([np.diag([1.0, 1 - 1e-7, 0.5]), np.diag([3.0, 1.0, 0.5])]), 1)
    _, info = map_items(ddnref.power_iteration, slow, maxiter=60, throw=False)
    value, _ = map_gradients(ddnref.power_iteration, lambda w, v: (w, (w, None)), slow, maxiter=60, throw=False)
    assert np.array_equal(info.converged.compute(), [False, True])
    assert np.array_equal(np.isnan(value.compute()), [True, False]), "an output that has not converged was used"


def test_refusals(rng):
    x = chunked(symmetric(rng, 4, (6,)), 2)
    w, v = map_items(ddnref.eigh, x)
    for error, message, call in (
        (TypeError, "sin has no rule", partial(map_items, np.sin, x)),
        (ValueError, r"x is chunked along the last 2 axes.*pass x.rechunk\(\{-2: -1, -1: -1\}\)",
         partial(map_items, ddnref.eigh, x.rechunk((2, 4, 2)))),
        (ValueError, r"w is chunked along the last 1 axes.*w.rechunk\(\{-1: -1\}\)",
         partial(map_items, ddnref.eigh_vjp, w, None, w.rechunk((2, 1)), v)),
        (ValueError, r"x has shape \(4,\), expected \(..., m, m\)", partial(map_items, ddnref.eigh, x[0, 0])),
        (ValueError, r"x has shape \(6, 3, 4\), but its axis m has length 3",
         partial(map_items, ddnref.eigh, x[:, :3])),
        (ValueError, "Batch axes do not fit.*'w_bar': 5", partial(map_items, ddnref.eigh_vjp, w[:5], None, w, v)),
        (TypeError, "x is of type list, not a Dask array", partial(map_items, ddnref.eigh, [[1.0]])),
        (ValueError, "loss_per is 'batch', expected", partial(map_gradients, ddnref.eigh, halves, x, loss_per="batch")),
        (TypeError, "k is of type int, not a Dask array", partial(map_items, ddnref.eigh_topk, x, 2)),
        (TypeError, "eigh_topk: missing a required argument: 'k'", partial(map_items, ddnref.eigh_topk, x)),
        (TypeError, "eigh: got an unexpected keyword argument 'rtol'", partial(map_items, ddnref.eigh, x, rtol=1.0)),
        (TypeError, "v0 is a Dask collection", partial(map_items, ddnref.power_iteration, x, v0=w)),
        (TypeError, "x has dtype int64", partial(map_items, ddnref.eigh, x.astype(np.int64))),
        (TypeError, "w_bar has dtype float32, expected float64",
         partial(map_items, ddnref.eigh_vjp, w.astype(np.float32), None, w, v)),
        (TypeError, "The arrays that eigsh_fwd saves depend", partial(map_items, ddnref.eigsh_fwd, x, k=1)),
        (TypeError, "eigh_topk: missing a required argument: 'k'", partial(map_gradients, ddnref.eigh_topk, halves, x)),
        (TypeError, "df=", partial(map_gradients, ddnref.spectral_function, halves, x, f=np.square)),
        (TypeError, "has no option rtl", partial(map_gradients, ddnref.eigh, halves, x, rtl=1.0)),
        (TypeError, "operator is of type LinearOperator",
         partial(map_items, ddnref.linear_solve, operators.diagonal(np.ones(4)), w)),
        (TypeError, r"data\[0\] is of type list", partial(map_gradients, ddnref.eigh, halves, x, data=[[1.0]])),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    total = lambda w, v: (np.sum(w), (w, v))
    with pytest.raises(ValueError, match=r"value has shape \(\), expected \(2,\)"):
        map_gradients(ddnref.eigh, total, x)[0].compute()
    with pytest.raises(ValueError, match=r"value has shape \(2,\), expected \(\)"):
        map_gradients(ddnref.eigh, halves, x, loss_per="block")[0].compute()
    rounded = lambda w, v: (np.sum(w, axis=-1).astype(np.float32), (w, v))
    with pytest.raises(TypeError, match="value has dtype float32"):
        map_gradients(ddnref.eigh, rounded, x)[0].compute()


# --- reducers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_every", [2, 3, 8])
@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_gram_matrices(kind, split_every, rng):
    v = rng.standard_normal((14, 10))
    chunks = (14, 3) if kind == "columns" else (3, 10)
    k = reduce_blocks(curvature.gram_reducer(kind), da.from_array(v, chunks=chunks), split_every=split_every).compute()
    assert np.max(np.abs(k - v.T @ v)) <= 1e-12


def test_split_every_is_the_number_of_states_that_a_task_merges(rng):
    v = da.from_array(rng.standard_normal((16, 2)), chunks=(1, 2))
    for split_every, merges in ((2, 15), (4, 5), (16, 1)):
        graph = dict(reduce_blocks(curvature.gram_reducer("rows"), v, split_every=split_every).__dask_graph__())
        assert sum("merged" in str(key) for key in graph if not isinstance(key, tuple)) == merges


@pytest.fixture
def problem(rng):
    chain = networks.Chain.mlp(6, 5, 3, 2)
    return chain, rng.random((11, 6)), rng.integers(0, 3, 11)


def test_the_ggn_of_a_collection(problem, rng):
    """Numbers of the samples matter to the signs of the Monte-Carlo columns, and to sub-samples."""
    chain, x, t = problem
    unknown = np.ones(11, dtype=bool)
    collections = {
        "known": (chunked(x, 4), chunked(t, 4)),
        "unknown": (chunked(x, 4)[da.from_array(unknown, chunks=4)], chunked(t, 4)[da.from_array(unknown, chunks=4)]),
        "delayed": tuple([dask.delayed(part) for part in np.array_split(a, 3)] for a in (x, t)),
    }
    for options in ({}, {"mc_samples": 2, "seed": 3}, {"subsampling": [1, 5, 10]}):
        whole = curvature.ggn_eigvalsh(chain, x, t, **options)
        for name, parts in collections.items():
            ggn = reduce_blocks(curvature.ggn_reducer(chain, **options), *parts)
            w = dask.delayed(curvature.ggn_eigvalsh)(ggn).compute()
            assert np.max(np.abs(w - whole)) <= 1e-12 * whole[0], (name, options)
    step = curvature.ggn_damped_newton(reduce_blocks(curvature.ggn_reducer(chain), *parts).compute(), k=2, damping=0.1)
    for found, expected in zip(step, curvature.ggn_damped_newton(chain, x, t, k=2, damping=0.1), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_gradients_of_a_network_add_up(problem):
    chain, x, t = problem
    reducer = curvature.sum_reducer(chain.gradient, weight=lambda x, t: len(x))
    keep = np.asarray([1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=bool)  # the second block of three is empty
    some = [chunked(a, 3)[da.from_array(keep, chunks=3)] for a in (x, t)]
    for arrays, rows in (([chunked(x, 3), chunked(t, 3)], keep | True), (some, keep)):
        found = reduce_blocks(reducer, *arrays).compute()
        for gradient, expected in zip(found, chain.gradient(x[rows], t[rows]), strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)


def test_refused_collections(problem):
    chain, x, t = problem
    reducer = curvature.gram_reducer("rows")
    with pytest.raises(ValueError, match="split_every is 1"):
        reduce_blocks(reducer, chunked(x, 3), split_every=1)
    with pytest.raises(ValueError, match=r"chunked along axes \[0, 1\]"):
        reduce_blocks(reducer, da.from_array(x, chunks=(3, 3)))
    with pytest.raises(ValueError, match="all need the same blocks"):
        reduce_blocks(
            curvature.ggn_reducer(chain),
            da.from_array(x, chunks=((4, 7), 6)),
            da.from_array(t, chunks=((7, 4),)),
        )
    with pytest.raises(ValueError, match="all need the same blocks"):
        reduce_blocks(curvature.ggn_reducer(chain), chunked(x, 3), chunked(t, 6))
    with pytest.raises(ValueError, match="at least one"):
        reduce_blocks(reducer, [])
    with pytest.raises(ValueError, match="chunked along its features"):
        reduce_blocks(curvature.ggn_reducer(chain), da.from_array(x, chunks=(11, 3)), [t, t])


def test_ddnref_does_not_import_dask():
    code = "import sys, ddnref; assert not {'dask', 'distributed'} & set(sys.modules); import ddnref.interop.dask"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- processes --------------------------------------------------------------------------------------------------

BLOCKS, ITEMS, M = 20, 40, 32


def drawn(block):
    return symmetric(np.random.default_rng(block), M, (ITEMS,))


def slowly(_, block_info=None):
    """A block of matrices, made where it is used; the pause leaves time to kill a process in the middle."""
    time.sleep(0.05)
    return drawn(block_info[None]["chunk-location"][0])


def first_entry(w, v):
    """A loss of all eigenvalues and of the last projector."""
    w_bar, v_bar = 3 * w**2, np.zeros_like(v)
    v_bar[..., 0, -1] = 2 * v[..., 0, -1]
    return np.sum(w**3, axis=-1) + v[..., 0, -1] ** 2, (w_bar, v_bar)


@pytest.fixture(scope="module")
def expected():
    """Values and gradients computed in this process."""
    values, gradients = [], []
    for block in range(BLOCKS):
        w, v = ddnref.eigh(drawn(block))
        value, bars = first_entry(w, v)
        values.append(value)
        gradients.append(ddnref.eigh_vjp(*bars, w, v))
    return np.concatenate(values), np.concatenate(gradients)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Two processes of one thread, nothing that a loaded machine could make late, no port that could be taken."""
    from distributed import Client, LocalCluster

    cluster = partial(
        LocalCluster, n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=":0",
        memory_limit=0, local_directory=str(tmp_path_factory.mktemp("dask")), silence_logs=logging.CRITICAL,
    )  # fmt: skip
    timeouts = {"distributed.comm.timeouts.connect": "120s", "distributed.comm.timeouts.tcp": "120s"}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP", "OPENBLAS", "MKL"):  # as a user has it, who has set nothing
            patch.delenv(f"{name}_NUM_THREADS", raising=False)
        with dask.config.set(timeouts), cluster() as processes, Client(processes) as client:
            yield client


def matrices():
    blocks = da.zeros(BLOCKS * ITEMS, chunks=ITEMS)
    chunks = ((ITEMS,) * BLOCKS, (M,), (M,))
    return blocks.map_blocks(slowly, chunks=chunks, new_axis=[1, 2], dtype=float, meta=np.empty((0, 0, 0)))


def test_two_processes_and_one_killed_give_the_same_bits(client, expected):
    from distributed import as_completed, futures_of

    value, gradient = map_gradients(ddnref.eigh, first_entry, matrices())
    for found, right in zip(dask.compute(value, gradient), expected, strict=True):
        assert np.array_equal(found, right)

    processes = client.run(os.getpid)
    assert len(set(processes.values()) - {os.getpid()}) == 2
    gradient = client.persist(map_gradients(ddnref.eigh, first_entry, matrices())[1])
    blocks = futures_of(gradient)
    done = as_completed(blocks)
    for _ in range(4):
        next(done)
    held = [address for places in client.who_has(blocks).values() for address in places]
    victim = max(processes, key=held.count)
    assert 0 < held.count(victim) <= len(held) < BLOCKS, "not in the middle of the work"
    os.kill(processes[victim], getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows kills by the latter
    assert np.array_equal(gradient.compute(), expected[1])
    assert processes[victim] not in client.run(os.getpid).values()


def test_reducers_and_errors_in_two_processes(client, problem, rng):
    chain, x, t = problem
    ggn = reduce_blocks(curvature.ggn_reducer(chain), chunked(x, 2), chunked(t, 2))
    whole = curvature.ggn_eigvalsh(chain, x, t)
    assert np.max(np.abs(curvature.ggn_eigvalsh(ggn.compute()) - whole)) <= 1e-12 * whole[0]
    x = chunked(np.stack([np.zeros((3, 3)), np.eye(3)]), 1)
    with pytest.raises(ddnref.SingularError, match="invsqrtm is not finite"):
        map_items(ddnref.invsqrtm, x).compute()
    y = map_items(ddnref.spectral_function, x, f=lambda w: w + 1).compute()  # a function without a name travels
    np.testing.assert_allclose(y, x.compute() + np.eye(3), atol=1e-15)


def test_blas_has_one_thread_a_worker(client):
    """Dask's nanny sees to it, and our own threads over a batch follow."""

    def threads():
        from threadpoolctl import threadpool_info

        from ddnref._kernels import numpy as _numpy

        return {"ddnref": _numpy.threads(), **{p["filepath"]: p["num_threads"] for p in threadpool_info()}}

    for counts in client.run(threads).values():
        assert len(counts) > 1
        assert set(counts.values()) == {1}


class Pickled:
    """Parameters that count how often they are sent."""

    count = 0

    def __reduce__(self):
        Pickled.count += 1
        return Pickled, ()


def test_a_reducer_is_not_sent_with_every_task(client, rng):
    parameters, v = Pickled(), da.from_array(rng.random((24, 2)), chunks=(1, 2))
    reducer = curvature.sum_reducer(lambda v: (parameters, v)[1])
    assert reduce_blocks(reducer, v).compute().shape == (1, 2)
    assert 0 < Pickled.count <= 3
