"""NumPy's in-place forms against their standard-only twins, and the threads over a batch."""

import gc
import os
import subprocess
import sys
import tracemalloc

import array_api_strict
import numpy as np
import pytest
from problems import relative, rotation, symmetric, with_spectrum

import ddnref
from ddnref._kernels import numpy as _numpy
from ddnref._kernels.bordered import solve_dominant
from ddnref._rules.binding import as_tuple, options_of
from ddnref._rules.table import RULES, TRIALS


def twin(w_bar, v_bar, w, v):
    """The same call on array-api-strict, which takes the standard-only form."""
    arrays = (None if a is None else array_api_strict.asarray(a) for a in (w_bar, v_bar, w, v))
    return np.asarray(ddnref.eigh_vjp(*arrays, throw=False))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 2, 40), (5, 128), (2, 192), (130,), (257,), (2, 300), (520,)])
@pytest.mark.parametrize("repeated", [False, True])
def test_eigh_vjp(shape, is_complex, repeated, rng):
    """All kernels (in one pass, by panels, tiled), simple and clustered, with cotangents that have a gradient."""
    *batch, m = shape
    spectrum = np.linspace(-1, 1, m)
    if repeated:
        spectrum[m // 3 : m // 2] = spectrum[m // 3]
    x = with_spectrum(rotation(rng, m, tuple(batch), is_complex), spectrum)
    w, v = ddnref.eigh(x)
    c = symmetric(rng, m, tuple(batch), is_complex)
    inside = (spectrum <= spectrum[m // 3]) if repeated else np.arange(m) < m // 2
    w_bar, v_bar = np.where(inside, 0.5, 1.0) * np.ones_like(w), np.where(inside, c @ v, 0)
    for value_bar in (w_bar, None):
        x_bar = ddnref.eigh_vjp(value_bar, v_bar, w, v)
        assert relative(x_bar, twin(value_bar, v_bar, w, v)) <= 1e-12
        assert np.array_equal(x_bar, np.conj(x_bar.mT))


@pytest.mark.parametrize("shape", [(3, 7), (2, 2, 40), (3, 128), (256,), (300,)])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_rounding_is_left_out_by_every_kernel(shape, dtype, size, rng):
    """Items with close eigenvalues beside items without, cotangents whose squares leave the range of float32."""
    *batch, m = shape
    spectrum = np.broadcast_to(np.linspace(-1, 1, m), shape).copy()
    spectrum[..., 2 : m // 2] = spectrum[..., 2:3] + np.arange(m // 2 - 2) * 1e-4 / m
    if batch:
        spectrum[-1] = np.linspace(-1, 1, m)
    is_complex = dtype == "complex128"
    w, v = ddnref.eigh(with_spectrum(rotation(rng, m, tuple(batch), is_complex), spectrum).astype(dtype))
    c = symmetric(rng, m, tuple(batch), is_complex)
    v_bar = (size * np.where(np.arange(m) < m // 2, c @ v, 0)).astype(dtype)
    bound = 100 * np.finfo(dtype).eps * m**0.5
    assert relative(ddnref.eigh_vjp(None, v_bar, w, v) / size, twin(None, v_bar, w, v) / size) <= bound


@pytest.mark.parametrize("m", [6, 300])
@pytest.mark.parametrize("is_complex", [False, True])
def test_gauge_is_seen_by_every_kernel(m, is_complex, rng):
    spectrum = np.linspace(-1, 1, m)
    if not is_complex:
        spectrum[3:5] = spectrum[3]
    w, v = ddnref.eigh(with_spectrum(rotation(rng, m, (2,), is_complex), spectrum))
    v_bar = rng.standard_normal(v.shape).astype(v.dtype)
    with pytest.raises(ddnref.GaugeError):
        ddnref.eigh_vjp(None, v_bar, w, v)
    assert np.all(np.isnan(ddnref.eigh_vjp(None, v_bar, w, v, throw=False)))


@pytest.mark.parametrize("m", [1, 5, 255, 256, 257, 513])
@pytest.mark.parametrize("is_complex", [False, True])
def test_hermitian_product(m, is_complex, rng):
    a = rng.standard_normal((2, m, 4)) + (1j * rng.standard_normal((2, m, 4)) if is_complex else 0)
    x = _numpy.hermitian_product(a, a)
    assert relative(x, a @ np.conj(a.mT)) <= 1e-14
    assert np.array_equal(x, np.conj(x.mT))


@pytest.mark.parametrize("m", [0, 1, 5, 128, 130, 300])
@pytest.mark.parametrize("is_complex", [False, True])
def test_hermitian_sum(m, is_complex, rng):
    b, v = (rng.standard_normal((2, m, 3)) + (1j * rng.standard_normal((2, m, 3)) if is_complex else 0) for _ in "bv")
    x = _numpy.hermitian_sum(b, v)
    assert relative(x, b @ np.conj(v.mT) + v @ np.conj(b.mT)) <= 1e-14
    assert np.array_equal(x, np.conj(x.mT))


def dominant_pairs(rng, m, n, batch, first=0):
    """Matrices and n pairs, in order of magnitude and of both signs, from the given one on."""
    spectrum = (1.0 - 0.4 * np.arange(m) / m) * np.where(np.arange(m) % 3 == 1, -1, 1)
    v = rotation(rng, m, batch)
    return (v * spectrum) @ v.mT, np.broadcast_to(spectrum[first : first + n], (*batch, n)), v[..., first : first + n]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("batch", "m", "n"), [((), 1, 1), ((3,), 7, 3), ((2, 2), 40, 1), ((2,), 60, 4), ((0,), 5, 2)])
def test_cholesky_of_dominant_pairs(batch, m, n, dtype, rng):
    x, w, v = dominant_pairs(rng, m, n, batch)
    arrays = [
        a.astype(dtype) for a in (rng.standard_normal(w.shape), rng.standard_normal(v.shape), w, v, (x + x.mT) / 2)
    ]
    x_bar = ddnref.simultaneous_iteration_vjp(*arrays, symmetric=True)
    expected = ddnref.simultaneous_iteration_vjp(*map(array_api_strict.asarray, arrays), symmetric=True)
    assert x_bar.dtype == dtype
    assert relative(x_bar, np.asarray(expected)) <= (1e-6 if dtype == "float32" else 1e-12)


def test_pairs_that_do_not_dominate_take_the_other_way_item_by_item(rng):
    x, w, v = (np.stack(both) for both in zip(*(dominant_pairs(rng, 9, 2, (), first) for first in (0, 3)), strict=True))
    size = np.ones((2, 1))
    *_, failed = solve_dominant(w, v, np.ones((2, 9, 2)), size, x)
    assert failed.tolist() == [False, True]
    w_bar, v_bar = rng.standard_normal(w.shape), rng.standard_normal(v.shape)
    x_bar = ddnref.simultaneous_iteration_vjp(w_bar, v_bar, w, v, x, symmetric=True)
    every_w, every_v = ddnref.eigh(x)
    for i in range(2):
        index = [int(np.argmin(np.abs(every_w[i] - value))) for value in w[i]]
        sign = np.sign(np.sum(every_v[i][:, index] * v[i], axis=0))
        expected = ddnref.eigh_vjp(w_bar[i], v_bar[i] * sign, every_w[i], every_v[i], index=index)
        assert relative(x_bar[i], expected) <= 1e-12


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("count", "m"), [(1, 40), (2, 200), (7, 128), (1000, 16), (0, 8)])
def test_parts_cover_the_batch_once(workers, count, m, monkeypatch):
    monkeypatch.setattr(_numpy, "threads", lambda: workers)
    seen = np.zeros(count, dtype=int)

    def run(part):
        seen[part] += 1

    _numpy.for_parts(run, count, m)
    assert np.all(seen == 1)


def test_an_error_in_a_part_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(_numpy, "threads", lambda: 2)

    def run(part):
        raise KeyError(part.start)

    with pytest.raises(KeyError):
        _numpy.for_parts(run, 1000, 32)


def test_threads_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert _numpy.threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
    assert _numpy.threads() >= 1


@pytest.mark.framework("torch")
def test_threads_follow_pytorch(torch, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _numpy.threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_forked_child_does_not_wait_for_the_parents_threads(rng):
    """The pool of the parent is dead in a child; a large batch there must still run."""
    code = (
        "import os, numpy as np, ddnref\n"
        "x = np.random.default_rng(0).standard_normal((600, 16, 16))\n"
        "w, v = ddnref.eigh(x)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    ddnref.eigh(x); os._exit(0)\n"
        "raise SystemExit(os.waitpid(pid, 0)[1])\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == 0


def test_neighbours_of_a_nan_item_bit_for_bit_with_blas_on_one_thread():
    """A separate process is used, as BLAS counts its threads once; the sizes are wide enough for every kernel."""
    code = (
        "import numpy as np, ddnref\n"
        "rng = np.random.default_rng(0)\n"
        "for count, m in [(600, 16), (4, 128), (3, 300)]:\n"
        "    x = rng.standard_normal((count, m, m))\n"
        "    bad = x.copy(); bad[1, 0, 0] = np.nan\n"
        "    bar = rng.standard_normal((count, m, m))\n"
        "    keep = np.arange(count) != 1\n"
        "    good = ddnref.eigh(x); ours = ddnref.eigh(bad)\n"
        "    pairs = [*zip(good, ours), (ddnref.eigh_vjp(None, bar, *good), ddnref.eigh_vjp(None, bar, *ours))]\n"
        "    for a, b in pairs:\n"
        "        assert np.array_equal(a[keep], b[keep]) and np.all(np.isnan(b[1]))\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_no_array_waits_for_the_garbage_collector(name, rng):
    """A cycle (a closure that calls itself) keeps the arrays of a call, and a loop over blocks runs out of memory."""
    rule = RULES[name]
    sample = TRIALS[rule.name].sample(np.asarray, rng, (300,), 8, False)
    forward, vjp = options_of(rule, sample.options)

    def both_ways():
        result = rule.forward(*sample.inputs, **forward)
        outputs, saved = result[0] if rule.info is not None else result
        outputs = as_tuple(outputs)
        bars = outputs if sample.loss is None else as_tuple(sample.loss[1](*outputs))[: rule.outputs]
        rule.vjp(*bars, *outputs, *saved, *(sample.inputs[i] for i in rule.needs), **vjp)

    both_ways()  # what is cached stays
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        both_ways()
        kept = max(trace.size for trace in tracemalloc.take_snapshot().traces)
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < 300 * 8, "an array with a number for each item is still there"


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("name", ["eigh", "svd"])
def test_single_precision_is_computed_in_single_precision(name, dtype, monkeypatch, rng):
    """The driver takes half of the time of ``numpy.linalg``, which would convert; its errors are a few eps."""
    x = symmetric(rng, 40, (3,), dtype == "complex64").astype(dtype)
    taken, driver = [], _numpy._driver

    def noted(name):
        taken.append(name)
        return driver(name)

    monkeypatch.setattr(_numpy, "_driver", noted)
    factors = {"eigh": ddnref.eigh, "svd": ddnref.svd}[name](x)
    assert taken
    assert set(taken) <= {"eigh_lo", "svd_s"}
    u, s, v_h = factors if name == "svd" else (factors[1], factors[0], np.conj(factors[1].mT))
    assert (u.dtype, s.dtype, v_h.dtype) == (dtype, "float32", dtype)
    size = 16 * np.finfo(np.float32).eps
    assert relative((u * s[..., None, :]) @ v_h, x) <= size
    assert relative(np.conj(u.mT) @ u, np.broadcast_to(np.eye(40), x.shape)) <= size


def test_blas_gets_its_threads_back(monkeypatch, rng):
    """Several batches at once hold BLAS to one thread, and the last one lets it go."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(_numpy, "threads", lambda: 2)
    hold = _numpy._one_blas_thread(os.getpid())
    numbers = lambda: [get() for get, _ in hold.libraries]
    seen, decompose, before = [], _numpy._decompose_part, numbers()
    assert before

    def noted(*args):
        seen.extend(numbers())
        decompose(*args)

    monkeypatch.setattr(_numpy, "_decompose_part", noted)
    x = symmetric(rng, 32, (300,))
    hold._set((2,) * len(before))
    try:
        with ThreadPoolExecutor(4) as pool:
            alone = ddnref.eigh(x)
            for w, v in pool.map(lambda _: ddnref.eigh(x), range(16)):
                assert np.array_equal(w, alone[0])
                assert np.array_equal(v, alone[1])
        assert numbers() == [2] * len(before)
    finally:
        hold._set(tuple(before))
    assert set(seen) == {1}


@pytest.mark.parametrize("shape", [(3, 3), (2, 100, 100), (130, 130), (2, 2, 101, 101)])
def test_transposed_copies(shape):
    x = np.arange(np.prod(shape), dtype=float).reshape(shape)
    for given in (x, x.mT):
        found = _numpy.transposed(given)
        assert found.flags.c_contiguous
        assert not np.shares_memory(found, x)
        np.testing.assert_array_equal(found, given.mT)
