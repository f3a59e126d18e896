"""The code for CuPy alone: collected with ``--backend cupy``, or ``emulated-cupy``, which needs no GPU."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from problems import relative
from public_names import PUBLIC

import ddnref
from ddnref._core.arrays import check_current_device
from ddnref._kernels import cupy as _cupy
from ddnref._kernels import dense as _linalg
from ddnref._kernels import lu as _lu
from ddnref._rules.binding import options_of, plain_forward, plain_vjp
from ddnref._rules.table import RULES, TRIALS
from ddnref.verify import _checks as checks
from ddnref.verify import _gpu
from ddnref.verify._cli import main


def hermitian(rng, shape, dtype=np.float64):
    z = rng.standard_normal(shape)
    z = z + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else z
    return ((z + np.conj(np.swapaxes(z, -1, -2))) / 2).astype(dtype)


@pytest.fixture
def broken(xp, monkeypatch):
    """cuSOLVER as it was seen to fail, without a word: the eigenvalues of one item are its diagonal."""
    own = xp.namespace.linalg.eigh

    def eigh(s):
        w, v = own(s)
        if s.ndim > 2 and s.shape[0] > 1:
            w[1, :] = xp.namespace.sort(xp.namespace.real(xp.namespace.linalg.diagonal(s[1, ...])))
            v[1, ...] = xp.asarray(np.eye(s.shape[-1], dtype=xp.numpy(s).dtype))
        return w, v

    monkeypatch.setattr(xp.namespace.linalg, "eigh", eigh)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_an_eigendecomposition_that_failed_in_silence_is_nan(dtype, scale, xp, rng, broken):
    s = (scale * hermitian(rng, (3, 6, 6))).astype(dtype)
    for w, v in (_linalg.eigh(xp.asarray(s)), ddnref.eigh(xp.asarray(s))):
        w, v = xp.numpy(w), xp.numpy(v)
        assert np.isnan(w[1]).all()
        assert np.isnan(v[1]).all()
        for i in (0, 2):
            again = (v[i] * (w[i] / scale)) @ np.conj(v[i].T)
            assert relative(again, s[i] / scale) < 100 * np.finfo(dtype).eps
    assert np.isnan(xp.numpy(_linalg.eigvalsh(xp.asarray(s)))).any(axis=-1).tolist() == [False, True, False]


def test_eigenvalues_alone_that_failed_in_silence_are_nan(xp, rng, monkeypatch):
    s = hermitian(rng, (6, 6))
    assert relative(xp.numpy(_linalg.eigvalsh(xp.asarray(s))), np.linalg.eigvalsh(s)) < 1e-14
    monkeypatch.setattr(xp.namespace.linalg, "eigvalsh", lambda s: xp.namespace.linalg.diagonal(s))
    assert np.isnan(xp.numpy(_linalg.eigvalsh(xp.asarray(s)))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("m", [1, 2, 30, 200])
def test_right_ones_pass(dtype, m, xp, rng):
    """Random, repeated, graded and zero spectra, at all scales."""
    q, _ = np.linalg.qr(rng.standard_normal((m, m)))
    spectra = [np.ones(m), np.zeros(m), np.arange(m) // 2, np.geomspace(1, 1e-12, m), rng.standard_normal(m)]
    tiny, huge = np.finfo(dtype).tiny, np.finfo(dtype).max / (4 * m)
    s = np.stack([scale * ((q * w) @ q.T) for w in spectra for scale in (1, 1e3 * tiny, huge)]).astype(dtype)
    s = xp.asarray(s / 2 + np.swapaxes(s, -1, -2) / 2)
    w, v = _linalg.eigh(s)
    assert np.isfinite(xp.numpy(w)).all()
    assert np.isfinite(xp.numpy(v)).all()
    assert all(np.isfinite(xp.numpy(_linalg.eigvalsh(s[i, ...]))).all() for i in range(s.shape[0]))


@pytest.mark.parametrize(("items", "entries", "calls"), [(2, 2**27, 3), (2**19, 32, 3), (2**19, 1, 5), (5, 80, 1)])
def test_a_large_batch_is_decomposed_in_parts(items, entries, calls, xp, rng, monkeypatch):
    s = hermitian(rng, (5, 4, 4))
    shapes = []
    own = xp.namespace.linalg.eigh

    def eigh(part):
        shapes.append(part.shape)
        return own(part)

    monkeypatch.setattr(xp.namespace.linalg, "eigh", eigh)
    monkeypatch.setattr(_cupy, "EIGH_ITEMS", items)
    monkeypatch.setattr(_cupy, "EIGH_ENTRIES", entries)
    w, v = _linalg.eigh(xp.asarray(s))
    assert len(shapes) == calls
    assert relative(xp.numpy(w), np.linalg.eigvalsh(s)) < 1e-14
    assert relative(xp.numpy(v @ (w[..., None] * _linalg.adjoint(v))), s) < 1e-14


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("is_adjoint", [False, True])
def test_solutions_from_factors(batched, dtype, is_adjoint, xp, rng, monkeypatch):
    """One call for the batch, or one for each matrix; from factors in any order of memory, which stay as they are."""
    monkeypatch.setattr(_cupy, "BATCHED_LU", 2**16 if batched else 0)
    z = rng.standard_normal((2, 2, 3, 5, 7))
    a, b = ((y + 1j * y[::-1] if np.dtype(dtype).kind == "c" else y).astype(dtype)[0] for y in (z[..., :5], z[..., 5:]))
    lu, pivots, singular = _lu.lu_factor(xp.asarray(a))
    assert not xp.numpy(singular).any()
    by_rows = xp.asarray(np.ascontiguousarray(xp.numpy(lu)))
    right = xp.asarray(b)
    expected = np.linalg.solve(np.conj(np.swapaxes(a, -1, -2)) if is_adjoint else a, b)
    for factors in (lu, by_rows):
        x = _lu.lu_solve(factors, pivots, right, adjoint=is_adjoint)
        assert relative(xp.numpy(x), expected) < 1e4 * np.finfo(dtype).eps
    assert np.array_equal(xp.numpy(right), b)
    assert np.array_equal(xp.numpy(by_rows), xp.numpy(lu))


def test_factors_that_do_not_fit_are_refused_before_their_addresses_are_used(xp, rng):
    lu, pivots, _ = _lu.lu_factor(xp.asarray(rng.standard_normal((2, 4, 4))))
    for shape in ((3, 4, 1), (4, 4, 1), (2, 2, 4)):
        with pytest.raises(ValueError, match="reshape"):
            _cupy.lu_solve(lu, pivots, xp.asarray(np.ones(shape)), False)


def test_a_singular_matrix_is_nan_whatever_the_right_hand_side(xp, rng):
    """A right-hand side of zeros avoids the division by the pivot that is zero."""
    a, b = rng.standard_normal((4, 3, 3)), np.zeros((4, 3, 1))
    a[1], a[2] = np.diag([1.0, 0, 2]), 0
    b[1, 0] = 1
    x = xp.numpy(_linalg.solve(xp.asarray(a), xp.asarray(b)))
    assert np.isnan(x).all(axis=(-2, -1)).tolist() == [False, True, True, False]
    assert (x[[0, 3]] == 0).all()


def columns(rng, m, n, is_complex=False):
    z = rng.standard_normal((m, n))
    return z + 1j * rng.standard_normal((m, n)) if is_complex else z


@pytest.mark.parametrize("is_complex", [False, True])
def test_qr_of_a_batch(is_complex, xp, rng):
    full = columns(rng, 7, 3, is_complex)
    dependent, zero, first = full.copy(), full.copy(), full.copy()
    dependent[:, 2] = dependent[:, 0] + dependent[:, 1]
    zero[:, 1] = 0
    first[:2] = 0
    close = full[:, :1] + 1e-14 * full  # beyond 1/√eps, where Cholesky of AᵀA gives up
    scaled = [1e-200 * full, 1e200 * full]
    a = np.stack([full, dependent, zero, first, close, 0 * full, *scaled])
    q, r = (xp.numpy(y) for y in ddnref.qr(xp.asarray(a)))
    for i in range(len(a)):
        assert np.abs(np.conj(q[i].T) @ q[i] - np.eye(3)).max() < 1e-14
        assert np.abs(q[i] @ r[i] - a[i]).max() <= 1e-14 * np.abs(a[i]).max()
        assert np.array_equal(r[i], np.triu(r[i]))
        assert (np.diag(r[i]).real >= 0).all()
    assert relative(r[0], ddnref.qr(a[0])[1]) < 1e-13


@pytest.mark.parametrize(("batch", "calls"), [((), 1), ((3,), 1), ((2, 2), 0), ((4,), 0)])
def test_qr_takes_the_whole_batch_where_there_are_more_matrices_than_columns(batch, calls, xp, rng, monkeypatch):
    counted = []
    own = xp.namespace.linalg.qr
    monkeypatch.setattr(xp.namespace.linalg, "qr", lambda *a, **k: counted.append(1) or own(*a, **k))
    a = rng.standard_normal((*batch, 5, 3))
    q, _ = ddnref.qr(xp.asarray(a))
    assert len(counted) == calls
    assert relative(xp.numpy(q), ddnref.qr(a)[0]) < 1e-13


@pytest.mark.parametrize("shape", [(0, 4, 2), (5, 4, 0), (5, 0, 0)])
def test_qr_of_nothing(shape, xp):
    q, r = ddnref.qr(xp.asarray(np.ones(shape)))
    assert tuple(q.shape) == shape
    assert tuple(r.shape) == (*shape[:-2], shape[-1], shape[-1])


def test_an_array_on_another_device_than_the_current_one_is_refused(xp):
    with pytest.raises(TypeError, match=r"x is on <CUDA Device 1>.*Enter the device first"):
        check_current_device({"x": SimpleNamespace(device="<CUDA Device 1>")})
    check_current_device({"x": xp.asarray(np.ones(2))})


@pytest.mark.parametrize("name", RULES)
def test_closed_forms_read_nothing_on_the_host(name, xp, rng):
    """Only iterations read a flag now and then. The emulation alone counts the reads."""
    import cupy

    rule = RULES[name]
    sample = TRIALS[rule.name].sample(np.asarray, rng, (5,), 4, False)
    forward, vjp = options_of(rule, sample.options)
    inputs = tuple(map(xp.asarray, sample.inputs))
    getattr(cupy, "EMULATED", []).clear()
    outputs, saved = plain_forward(rule)(*inputs, **forward)
    reads = list(getattr(cupy, "EMULATED", []))
    assert set(reads) <= ({"__bool__"} if rule.info is not None else set())
    kept = (*outputs, *saved, *(inputs[i] for i in rule.needs))
    bars = sample.loss[1] if sample.loss else lambda *y: tuple(map(np.cos, y))  # y itself has no gradient on a sphere
    bars = bars(*map(xp.numpy, outputs))
    bars = tuple(xp.asarray(np.asarray(bar)) for bar in (bars if isinstance(bars, tuple) else (bars,)))
    getattr(cupy, "EMULATED", []).clear()
    gradients = plain_vjp(rule)(*bars, *kept, **vjp)
    assert set(getattr(cupy, "EMULATED", [])) <= ({"__bool__"} if rule.vjp_info else set())
    theirs = plain_vjp(rule)(*map(xp.numpy, (*bars, *kept)), **vjp)
    for ours, expected in zip(gradients, theirs, strict=True):
        assert relative(xp.numpy(ours), expected) <= 1e-9


def test_the_record_of_a_gpu(xp, monkeypatch, tmp_path, capsys):
    """``ddnref gpu-record`` for a few rules at a small size; the array tests are those that run here."""
    few = {name: RULES[name] for name in ("eigh", "solve")}
    monkeypatch.setattr(_gpu, "RULES", few)
    monkeypatch.setattr(_gpu, "SOLVERS", ("cg", "eigsh"))
    if hasattr(pytest.importorskip("cupy"), "EMULATED"):
        monkeypatch.setattr(_gpu, "find_spec", lambda name: None)  # test_gpu.py has the bridges
    monkeypatch.setattr(_gpu, "BUSY", 8)
    monkeypatch.setattr(_gpu, "SECONDS", 0.01)
    monkeypatch.setattr(_gpu, "rules", partial(_gpu.rules, sizes=((2, 4),)))
    monkeypatch.setattr(_gpu, "others", partial(_gpu.others, n=8, widths=(5, 4, 3, 3)))
    monkeypatch.setattr(_gpu, "array_tests", lambda: {"summary": "2 passed", "failed": []})
    monkeypatch.setattr(_gpu, "measure", lambda backend, dtypes, seed: [
        outcome for case in checks.cases(backend, RULES["solve"], ("float64",))
        for outcome in checks.run_case(backend, case, seed)
    ])  # fmt: skip
    assert main(["gpu-record", "--out", str(tmp_path / "gpu.json")]) == 0
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["environment"]["device"]
    assert all(row["passed"] for row in kept["verify"])
    assert {row["rule"] for row in kept["rules"] if "rule" in row} == set(few)
    assert {row.get("solver") or row["network"] for row in kept["solvers and networks"]} == {
        *_gpu.SOLVERS, "gradient", "hvp", "ggn_eigh", "hessian_solve",
    }  # fmt: skip
    for row in kept["rules"]:
        for part in [row] if "limit" in row else [row["forward"], row["vjp"]]:
            assert part["ms"] > 0
            assert part["MiB"] >= 0
        if "rule" in row:
            assert not row["forward"]["host waits"]
            assert not row["vjp"]["host waits"]
            assert row["VJP - NumPy's, relative"] < 100 * np.finfo(row["dtype"]).eps
    assert all("skipped" in row or row["difference"] < 1e-12 for row in kept["bridges"])
    capsys.readouterr()
    assert main(["gpu-record", "--show", str(tmp_path / "gpu.json")]) == 0
    page = capsys.readouterr().out
    assert page.startswith("## ")
    assert "Tests: 2 passed. Failures in all: 0." in page
    assert page.count("| `eigh` | (2, 4) |") == 2


def test_a_read_on_the_host_and_a_failure_are_recorded(xp, monkeypatch):
    import cupy

    x = xp.asarray(np.ones((4, 4)))
    assert _gpu.host_waits(cupy, lambda: float(x[0, 0]), x)
    assert not _gpu.host_waits(cupy, lambda: x @ x, x)
    assert _gpu._measured(cupy, lambda: 1 / 0, x) == {"error": "ZeroDivisionError: division by zero"}


def test_the_code_on_the_pages_runs(xp):
    from infrastructure.test_docs import pages_with, run

    for page in pages_with("cupy"):
        run(page, "cupy")


@pytest.mark.framework("torch")
@pytest.mark.parametrize("name", ["eigh", "sinkhorn", "solve"])
def test_under_pytorch(name, xp, rng, monkeypatch):
    """On CUDA tensors; over the emulation on the CPU's, with a stand-in for PyTorch's stream."""
    import torch

    from ddnref.interop import _torch_foreign_kernels
    from ddnref.interop.torch import differentiable

    device = "cuda"
    if hasattr(cupy := pytest.importorskip("cupy"), "EMULATED"):
        device = "cpu"
        library = _torch_foreign_kernels.LIBRARIES["cupy"]._replace(device="cpu", load=lambda: cupy)
        monkeypatch.setitem(_torch_foreign_kernels.LIBRARIES, "cupy", library)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    sample = TRIALS[name].sample(np.asarray, rng, (3,), 4, False)
    inputs = [torch.tensor(x, device=device, requires_grad=True) for x in sample.inputs]

    def gradients(compute):
        result = differentiable(PUBLIC[name], compute=compute, **sample.options)(*inputs)
        outputs = result[0] if RULES[name].info is not None else result
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if name == "sinkhorn":
            assert result[1].converged.dtype == torch.bool
            assert result[1].converged.all()
        return torch.autograd.grad(sum((y.abs() ** 2).sum() for y in outputs), inputs)

    for ours, theirs in zip(gradients("cupy"), gradients(None), strict=True):
        assert ours.device == theirs.device
        torch.testing.assert_close(ours, theirs)
