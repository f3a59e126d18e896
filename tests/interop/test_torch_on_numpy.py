"""The bridge to PyTorch lets NumPy compute plain calls, and leaves all others in tensors."""

import itertools
import warnings

import numpy as np
import pytest

import ddnref
from ddnref._rules.binding import Bound
from ddnref._rules.table import RULES

pytestmark = pytest.mark.framework("torch")
TOLERANCES = (1e-12 / n for n in itertools.count(1))


@pytest.fixture
def kinds(torch, monkeypatch):
    """The kinds of arrays that the forward and the reverse pass got, in order."""
    from ddnref.interop import torch as bridge

    seen, bind, own = [], bridge.bind, bridge.bound_on_numpy

    def watched(bound):
        def forward(*inputs):
            seen.append(type(inputs[0]))
            return bound.forward(*inputs)

        def reverse(bars, arrays):
            seen.append(type(arrays[0]))
            return bound.reverse(bars, arrays)

        return bound._replace(forward=forward, reverse=reverse)

    def bound_on_numpy(*args):
        bound = own(*args)
        return None if bound is None else watched(bound)

    monkeypatch.setattr(bridge, "bind", lambda *args, **options: watched(bind(*args, **options)))
    monkeypatch.setattr(bridge, "bound_on_numpy", bound_on_numpy)
    return seen


@pytest.fixture
def eigvals(kinds):
    from ddnref.interop.torch import differentiable

    eigh = differentiable(ddnref.eigh, rtol=next(TOLERANCES))  # a bridge that no cache holds
    return lambda x: eigh(x)[0].square().sum()


def test_plain_tensors_and_parameters(torch, eigvals, kinds):
    for x in (torch.eye(3), torch.nn.Parameter(torch.eye(3)), torch.eye(3, dtype=torch.complex128)):
        kinds.clear()
        x = x.requires_grad_()
        eigvals(x).backward()
        assert kinds == [np.ndarray, np.ndarray]
        torch.testing.assert_close(x.grad, 2 * torch.eye(3, dtype=x.dtype))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_what_pytorch_must_see_stays_in_tensors(torch, eigvals, kinds):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        pass

    names, x = [], torch.eye(3)

    def under_a_mode():
        with Seen():
            eigvals(x)
        assert any("linalg_eigh" in name for name in names)

    for call in (
        under_a_mode,
        lambda: eigvals(x.as_subclass(Own)),
        lambda: eigvals(x.to("meta")),
        lambda: torch.func.vmap(eigvals)(x[None]),
        lambda: torch.func.jvp(eigvals, (x,), (x,)),
    ):
        kinds.clear()
        call()
        assert kinds
        assert np.ndarray not in kinds


def test_a_trace_holds_the_operation_and_not_its_result(torch, eigvals):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of each shape that is compared
        traced = torch.jit.trace(eigvals, torch.eye(3), check_trace=False)
    torch.testing.assert_close(traced(2 * torch.eye(3)), torch.tensor(12.0))


def test_the_second_derivative_goes_through_tensors(torch, eigvals, kinds):
    x = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)).requires_grad_()
    (first,) = torch.autograd.grad(eigvals(x), x, create_graph=True)
    assert kinds[0] is np.ndarray
    assert kinds[1] is torch.Tensor
    (second,) = torch.autograd.grad(first.diagonal().sum(), x)
    torch.testing.assert_close(second, 2 * torch.eye(3, dtype=torch.float64))


def test_options_that_hold_functions_or_tensors_keep_the_tensors(torch, kinds):
    from ddnref.interop.torch import differentiable

    x = torch.eye(3)
    for op in (
        differentiable(ddnref.spectral_function, f=torch.exp, df=torch.exp),
        differentiable(ddnref.power_iteration, v0=torch.ones(3)),
        differentiable(ddnref.eigh, compute="torch", rtol=next(TOLERANCES)),
    ):
        kinds.clear()
        op(x)
        assert np.ndarray not in kinds


def test_a_zero_cotangent_gives_zeros(torch, eigvals):
    x = torch.eye(3, requires_grad=True)
    (0 * eigvals(x)).backward()
    torch.testing.assert_close(x.grad, torch.zeros(3, 3))


def test_results_in_the_memory_of_others_are_copied(torch):
    """Otherwise a change in place, which PyTorch counts per tensor, would alter saved arrays unnoticed."""
    from ddnref._rules.binding import Layout
    from ddnref.interop._torch_on_numpy import on_numpy

    kept = np.zeros(4)
    others = dict.fromkeys(("push", "push_saved", "second", "undefined", "result"))
    bound = Bound(lambda x: ((x, x[1:]), (kept, kept[:2]), ()), lambda bars, arrays: (arrays[0],), **others)

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    x = torch.arange(3.0, requires_grad=True)
    apply = on_numpy(None, setup_context, RULES["eigh"], bound, Layout((None,), (1,)), 0)
    results = apply(x)
    (x_bar,) = torch.autograd.grad(results[0].sum(), x)
    tensors = [x.detach(), *(y.detach() for y in results), x_bar]
    for i, tensor in enumerate(tensors):
        assert not any(np.may_share_memory(tensor.numpy(), other.numpy()) for other in tensors[:i])
