"""Another library's kernels under PyTorch: tensors go out and results come back through DLPack, without a copy.

CuPy computes on PyTorch's current stream, so both libraries' work is in one order and neither frees memory that the
other still reads. A result is copied where PyTorch could be wrong about it: memory that is not to be written, or that
an input or another result lies in as well, which PyTorch's count of changes in place would not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ddnref._rules.binding import Bound
from ddnref._rules.contract import Rule
from ddnref.interop import _torch_batch
from ddnref.operators import LinearOperator

Tensor: TypeAlias = Any

REFUSAL = (
    "{name} computes on {library} arrays, whose operations PyTorch does not record, so there is no second derivative. "
    "Leave out compute={library!r} for one, or take the gradient without create_graph=True."
)


class Library(NamedTuple):
    """Where a library computes, and how tensors become its arrays."""

    device: str
    """The type of the tensors' device."""
    load: Callable[[], Any]
    """The module, which has ``from_dlpack``."""
    context: Callable[[Any, torch.device], Any]
    """In which it computes."""


def elsewhere(rule: Rule, bound: Bound, compute: str) -> tuple[Rule, Bound]:
    """The rule and its bound options such that tensors are computed with by another library.

    The rule counts as one whose VJP PyTorch cannot trace: it runs on whole batches, and no second derivative passes.
    """
    if compute not in LIBRARIES:
        raise ValueError(f'compute is {compute!r}, expected "cupy" or "numpy", or None for PyTorch itself.')
    library = LIBRARIES[compute]

    def forward(*inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        with _computing(library, compute, inputs) as (arrays, back):
            outputs, saved, info = bound.forward(*arrays)
            return tuple(map(back, outputs)), tuple(map(back, saved)), tuple(map(back, info))

    def reverse(bars: tuple[Tensor | None, ...], arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        count = len(bars)
        with _computing(library, compute, (*bars, *arrays)) as (given, back):
            return tuple(_mapped(back, bar) for bar in bound.reverse(given[:count], given[count:]))

    opaque = rule._replace(
        vjp_info=rule.vjp_info or tuple,
        recursive=False,
        undefined=None,
        refusal=REFUSAL.format(name=rule.name, library=compute),
    )
    return opaque, Bound(forward, reverse, None, bound.result)


@contextmanager
def _computing(
    library: Library, compute: str, inputs: tuple[Any, ...]
) -> Iterator[tuple[tuple[Any, ...], Callable[[Any], Tensor]]]:
    """The inputs as the library's arrays, and the way back for its results, inside its context."""
    tensors = list(_leaves(inputs))
    for tensor in tensors:
        if tensor.device.type != library.device:
            raise TypeError(
                f"A tensor is on {tensor.device}, but compute={compute!r} works on {library.device} tensors, without a "
                "copy. Move it first with tensor.to(...), or leave out compute= and compute with PyTorch where it is."
            )
    if any(isinstance(x, LinearOperator) and x.apply.__module__ == _torch_batch.__name__ for x in inputs):
        raise NotImplementedError(
            f"torch.func.vmap over the parameters of an operator runs on tensors alone: leave out compute={compute!r}, "
            "or give the operator's parameters batch axes in front."
        )
    module = library.load()
    taken = [_extent(tensor) for tensor in tensors]

    def there(tensor: Tensor) -> Any:
        # a conjugate is a bit that DLPack refuses, a negation one that it drops
        return module.from_dlpack(tensor.detach().resolve_conj().resolve_neg())

    def back(array: Any) -> Tensor:
        tensor = _tensor(array)
        if any(_overlap(_extent(tensor), other) for other in taken):
            tensor = tensor.clone()
        taken.append(_extent(tensor))
        return tensor

    with library.context(module, tensors[0].device):
        yield tuple(_mapped(there, x) for x in inputs), back


def _tensor(array: Any) -> Tensor:
    """A library's array as a tensor; a copy where PyTorch would write to read-only memory, or has no such strides."""
    if isinstance(array, (np.ndarray, np.generic)):
        array = np.asarray(array)
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
    elif any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.dtype == bool:  # not every version of every library exports these
        return torch.from_dlpack(array.view(np.uint8)).view(torch.bool)
    return torch.from_dlpack(array)


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """`function` of an array, of an operator's parameters, or of a tuple's entries; ``None`` stays."""
    if isinstance(x, LinearOperator):
        return x._replace(params=tuple(map(function, x.params)))
    if isinstance(x, tuple):
        return tuple(_mapped(function, entry) for entry in x)
    return None if x is None else function(x)


def _leaves(x: Any) -> Iterator[Tensor]:
    if isinstance(x, LinearOperator):
        x = x.params
    if isinstance(x, tuple):
        for entry in x:
            yield from _leaves(entry)
    elif x is not None:
        yield x


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last."""
    start: int = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


@contextmanager
def _on_host(module: Any, device: torch.device) -> Iterator[None]:  # noqa: ARG001
    yield


class _Stream:
    """A stream of PyTorch's, as the CUDA stream protocol has it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


@contextmanager
def _on_stream(cupy: Any, device: torch.device) -> Iterator[None]:
    """CuPy on the tensors' device and on PyTorch's current stream there."""
    with ExitStack() as stack:
        stack.enter_context(torch.cuda.device(device))  # tensors of another device are not exported
        stack.enter_context(cupy.cuda.Device(device.index))
        stack.enter_context(cupy.cuda.Stream.from_external(_Stream(torch.cuda.current_stream(device))))
        yield


def _cupy() -> Any:
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise ImportError('compute="cupy" needs CuPy: pip install "ddnref[cuda12]", or [cuda13].') from error
    return cupy


LIBRARIES = {"cupy": Library("cuda", _cupy, _on_stream), "numpy": Library("cpu", lambda: np, _on_host)}
