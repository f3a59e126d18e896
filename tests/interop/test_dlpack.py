"""Other libraries that compute for PyTorch: the same gradients, no copies, no memory shared behind PyTorch's back."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from public_names import PUBLIC
from smooth import SMOOTH

import ddnref
from conftest import TRACED
from ddnref import nodes, operators
from ddnref._rules.binding import Bound
from ddnref._rules.table import RULES, TRIALS

pytestmark = pytest.mark.framework("torch")
numpy_computes = pytest.mark.parametrize("compute", ["numpy", None])


@pytest.fixture
def differentiable(torch):
    from ddnref.interop.torch import differentiable

    return differentiable


@pytest.fixture
def bridge(torch):
    from ddnref.interop import _torch_foreign_kernels

    return _torch_foreign_kernels


@pytest.fixture
def spy(bridge, monkeypatch):
    """The arrays that NumPy gets and gives, in order."""
    seen = SimpleNamespace(given=[], returned=[])

    def from_dlpack(tensor):
        seen.given.append(np.from_dlpack(tensor))
        return seen.given[-1]

    def back(array, own=bridge._tensor):
        seen.returned.append(array)
        return own(array)

    library = bridge.LIBRARIES["numpy"]._replace(load=lambda: SimpleNamespace(from_dlpack=from_dlpack))
    monkeypatch.setitem(bridge.LIBRARIES, "numpy", library)
    monkeypatch.setattr(bridge, "_tensor", back)
    return seen


def address(array):
    return array.ctypes.data


def loss_of(torch, differentiable, name, compute):
    inputs, outputs, options = SMOOTH[name]
    operation = differentiable(PUBLIC[name], compute=compute, **options)

    def loss(x):
        steps = torch.diag(torch.arange(1.0, x.shape[-1] + 1, dtype=x.real.dtype)).to(x.dtype)
        parts = outputs(operation(*inputs(x, steps)))
        return sum((abs(y) ** 2 * (1 + 0.1 * i) + y.real).sum() + y.sum().real.sin() for i, y in enumerate(parts))

    return loss


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_those_of_the_bridge_that_stays_in_torch(name, torch, differentiable):
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.complex128)[: 1 + TRIALS[name].is_complex]:
        x = torch.randn(3, 4, 4, dtype=dtype, requires_grad=True)
        expected, loss = (loss_of(torch, differentiable, name, compute) for compute in ("torch", "numpy"))
        (theirs,) = torch.autograd.grad(expected(x), x)
        (ours,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (default,) = torch.autograd.grad(loss_of(torch, differentiable, name, None)(x), x)
        for found in (ours.detach(), default):
            torch.testing.assert_close(found, theirs, rtol=1e-7, atol=1e-7)
        with pytest.raises(NotImplementedError, match="compute="):
            ours.abs().sum().backward()
        each = torch.func.vmap(torch.func.grad(loss))(x.detach()) if dtype == torch.float64 else None
        for i, item in enumerate([] if each is None else x.detach()):
            torch.testing.assert_close(each[i], torch.func.grad(expected)(item), rtol=1e-7, atol=1e-7)


def test_nothing_is_copied(torch, differentiable, spy):
    x = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    w, v = differentiable(ddnref.eigh, compute="numpy")(x)
    assert [address(a) for a in spy.given] == [x.data_ptr()]
    assert [address(a) for a in spy.returned] == [w.data_ptr(), v.data_ptr()]
    w_bar, v_bar = torch.ones_like(w), torch.zeros_like(v)
    (x_bar,) = torch.autograd.grad((w, v), x, (w_bar, v_bar))
    addresses = [address(a) for a in spy.given[1:]]
    assert addresses == [t.data_ptr() for t in (w_bar, v_bar, w, v)]
    assert address(spy.returned[-1]) == x_bar.data_ptr()


@numpy_computes
@pytest.mark.parametrize("change", ["conjugated", "negated", "transposed", "every second", "expanded", "reversed"])
def test_lazy_bits_and_strides(change, compute, torch, differentiable):
    z = torch.randn(2, 8, 8, dtype=torch.complex128)
    x = {
        "conjugated": z.conj(),
        "negated": torch._neg_view(z),
        "transposed": z.mT,
        "every second": z[:, ::2, ::2],
        "expanded": z[:1].expand(3, 8, 8),
        "reversed": z.flip(0),
    }[change].requires_grad_()
    copied = x.detach().clone().resolve_conj().resolve_neg().contiguous().requires_grad_()
    whiten, plain = (differentiable(ddnref.expm, compute=c) for c in (compute, "torch"))
    bar = torch.randn(*x.shape, dtype=x.dtype).conj()
    (ours,) = torch.autograd.grad(whiten(x), x, bar)
    (theirs,) = torch.autograd.grad(plain(copied), copied, bar.resolve_conj())
    torch.testing.assert_close(ours, theirs)


def test_a_result_in_the_memory_of_an_input_or_another_result_is_copied(torch, bridge):
    """Otherwise a change in place, which PyTorch counts per tensor, would alter saved arrays unnoticed."""
    kept = np.zeros(4)
    derivatives = dict.fromkeys(("push", "push_saved", "second", "undefined", "result"))
    bound = Bound(
        lambda x: ((x, x[1:]), (kept, kept[:2]), ()), lambda bars, arrays: (bars[0], arrays[0]), **derivatives
    )
    _, bound = bridge.computed_by("numpy", RULES["eigh"], bound)
    x = torch.arange(3.0)
    outputs, saved, _ = bound.forward(x)
    results = [x, *outputs, *saved, *bound.reverse((x,), (x,))]
    for i, tensor in enumerate(results):
        assert not any(np.may_share_memory(tensor.numpy(), other.numpy()) for other in results[:i])
    outputs[0][0] = 7
    assert x[0] == 0


@numpy_computes
def test_changes_in_place_are_noticed(compute, torch, differentiable):
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    y = differentiable(ddnref.expm, compute=compute)(x)
    w, _ = differentiable(ddnref.eigh, compute=compute)(x)
    w.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()
    y.sum().backward()


def test_results_that_must_not_be_written_to_are_copied(torch, bridge):
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    for array in (fixed, np.broadcast_to(np.zeros(1), (3,)), np.arange(3.0)[::-1], np.float64(2), np.ones(3) > 0):
        tensor = bridge._tensor(array)
        expected = np.array(array)
        assert tensor.shape == expected.shape
        assert np.array_equal(tensor.numpy(), expected)
        tensor.zero_()
        assert np.array_equal(array, expected) or array.flags.writeable


@numpy_computes
def test_bool_and_integers_of_info(compute, torch, differentiable):
    p = torch.full((4,), 0.25, dtype=torch.float64).expand(2, 4)
    _, info = differentiable(nodes.sinkhorn, compute=compute)(torch.rand(2, 4, 4, dtype=torch.float64), p, p, 0.5)
    assert info.converged.dtype == torch.bool
    assert info.converged.tolist() == [True, True]
    assert info.n_iter.dtype == torch.int32


@numpy_computes
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3, 3), (1, 1)])
def test_empty_and_single(shape, compute, torch, differentiable):
    x = torch.ones(*shape, dtype=torch.float32, requires_grad=True)
    w, v = differentiable(ddnref.eigh, compute=compute)(x)
    (w.sum() + v.square().sum()).backward()
    assert x.grad.shape == shape
    assert x.grad.dtype == torch.float32


def test_operators(torch, differentiable):
    def solved(compute, d, b):
        solve = differentiable(ddnref.linear_solve, compute=compute, rtol=1e-13)
        x, info = solve(operators.diagonal(d, positive_definite=True), b)
        assert info.converged.all()
        return x

    d = (torch.rand(5, dtype=torch.float64) + 1).requires_grad_()
    b = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    ours, theirs = (torch.autograd.grad(solved(c, d, b).square().sum(), (d, b)) for c in ("numpy", "torch"))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(NotImplementedError, match="leave out compute="):
        torch.func.vmap(lambda d, b: solved("numpy", d, b))(d.detach().expand(2, 5), b.detach())


@numpy_computes
def test_a_failed_item_is_nan_with_a_warning(compute, torch, differentiable):
    x = torch.stack([torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.eye(3)]).double().requires_grad_()
    _, v = differentiable(ddnref.eigh, compute=compute)(x)
    with pytest.warns(RuntimeWarning, match="gradient is NaN"):
        v[..., 0, 1].sum().backward()
    assert torch.isfinite(x.grad[0]).all()
    assert torch.isnan(x.grad[1]).all()


@pytest.mark.filterwarnings(*TRACED)
def test_compiled_code_runs_it_between_its_graphs(torch, differentiable):
    torch._dynamo.reset()
    eigh = differentiable(ddnref.eigh, compute="numpy")
    x = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return (eigh(2 * x)[0] ** 3).sum()

    (eager,) = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], eager)
    assert eigh.__name__ == "eigh"
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.(compiler|_dynamo)\.disable"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(x)


def test_refusals(torch, differentiable):
    with pytest.raises(ValueError, match="compute is 'jax', expected"):
        differentiable(ddnref.eigh, compute="jax")
    with pytest.raises(TypeError, match="on cpu, but compute='cupy' works on cuda tensors"):
        differentiable(ddnref.eigh, compute="cupy")(torch.eye(2))
    with pytest.raises(TypeError, match="on meta, but compute='numpy' works on cpu tensors"):
        differentiable(ddnref.eigh, compute="numpy")(torch.empty(2, 2, device="meta"))
    with pytest.raises(TypeError, match="no option"):
        differentiable(ddnref.eigh, compute="numpy", rank=2)


def test_cupy_works_on_torchs_stream_and_device(torch, differentiable, bridge, monkeypatch):
    """Everything between the tensors and the results happens inside: stood in for, because there is no GPU."""
    events = []

    @contextmanager
    def inside(name):
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    class Stream:
        @staticmethod
        def from_external(stream):
            return inside(f"stream {stream.__cuda_stream__()}")

    def from_dlpack(tensor):
        events.append("in")
        return np.from_dlpack(tensor)

    def back(array, own=bridge._tensor):
        events.append("out")
        return own(array)

    cuda = SimpleNamespace(Device=lambda index: inside(f"cupy device {index}"), Stream=Stream)
    module = SimpleNamespace(cuda=cuda, from_dlpack=from_dlpack)
    library = bridge.LIBRARIES["cupy"]._replace(device="cpu", load=lambda: module)
    monkeypatch.setitem(bridge.LIBRARIES, "cupy", library)
    monkeypatch.setattr(bridge, "_tensor", back)
    monkeypatch.setattr(torch.cuda, "device", lambda device: inside(f"torch device {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    x = torch.eye(2, dtype=torch.float64, requires_grad=True)
    w = differentiable(ddnref.eigh, compute="cupy")(x)[0]
    before = ["enter torch device cpu", "enter cupy device None", "enter stream (0, 77)"]
    after = ["leave stream (0, 77)", "leave cupy device None", "leave torch device cpu"]
    assert events == [*before, "in", "out", "out", *after]
    events.clear()
    w.sum().backward()
    assert events == [*before, "in", "in", "in", "out", *after]
    assert torch.equal(x.grad, torch.eye(2, dtype=torch.float64))


def test_cupy_missing(torch, bridge, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(ImportError, match="cuda12"):
        bridge.LIBRARIES["cupy"].load()
