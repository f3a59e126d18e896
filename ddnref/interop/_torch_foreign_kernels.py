"""The ``compute=`` option of the PyTorch bridge: another library computes on tensors, through DLPack, without a copy.

CuPy computes on PyTorch's current stream. So the work of both libraries has one order, and neither frees memory that
the other still reads. A result is copied if it is read-only, or if it shares memory with an input or another result:
PyTorch counts changes in place for each tensor and would not notice a change through the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ddnref._rules.binding import Bound, flatten, leaves
from ddnref._rules.contract import Rule
from ddnref.interop import _torch_vmap
from ddnref.interop._torch_on_numpy import writable

Tensor: TypeAlias = Any

REFUSAL = (
    "{name} computes on {library} arrays, whose operations PyTorch does not record, so there is no second derivative. "
    "If you need one, leave out compute={library!r}. Otherwise take the gradient without create_graph=True."
)


class Library(NamedTuple):
    """A library that can compute on the memory of tensors of a device type; its module has ``from_dlpack``.

    ``context(module, device)`` is entered around each computation.
    """

    device: str
    load: Callable[[], Any]
    context: Callable[[Any, torch.device], AbstractContextManager[Any]]


def computed_by(compute: str, rule: Rule, bound: Bound) -> tuple[Rule, Bound]:
    """Let another library compute a bound operation on tensors; return the rule and the operation to use instead."""
    if compute not in LIBRARIES:
        raise ValueError(f'compute is {compute!r}, expected "cupy" or "numpy", or None for PyTorch itself.')
    library = LIBRARIES[compute]

    def forward(*inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        with _computing(library, compute, inputs) as (arrays, to_tensor):
            outputs, saved, info = bound.forward(*arrays)
            return tuple(map(to_tensor, outputs)), tuple(map(to_tensor, saved)), tuple(map(to_tensor, info))

    def reverse(bars: tuple[Tensor | None, ...], arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        n = len(bars)
        with _computing(library, compute, (*bars, *arrays)) as (given, to_tensor):
            gradients = leaves(bound.reverse(given[:n], given[n:]))
            return tuple(None if x_bar is None else to_tensor(x_bar) for x_bar in gradients)

    def push(dots: tuple[Tensor | None, ...], arrays: tuple[Any, ...], **options: bool) -> tuple[Any, ...]:
        n = len(dots)
        with _computing(library, compute, (*dots, *arrays)) as (given, to_tensor):
            moved = bound.push(given[:n], given[n:], **options)  # type: ignore[misc]
            return tuple(None if y_dot is None else to_tensor(y_dot) for y_dot in moved)

    # PyTorch cannot trace this VJP. So the rule counts as one whose VJP iterates: it runs on whole batches, or item by
    # item, and has no second derivative.
    opaque = rule._replace(
        vjp_info=rule.vjp_info or tuple,
        direct=False,
        recursive=False,
        undefined=None,
        refusal=REFUSAL.format(name=rule.name, library=compute),
    )
    return opaque, Bound(forward, reverse, push, None, None, None, bound.result)


@contextmanager
def _computing(
    library: Library, compute: str, inputs: tuple[Any, ...]
) -> Iterator[tuple[tuple[Any, ...], Callable[[Any], Tensor]]]:
    """Enter the library's context; yield the inputs as its arrays, and the function that makes results tensors."""
    layout, values = flatten(inputs)
    tensors = [tensor for tensor in values if tensor is not None]
    for tensor in tensors:
        if tensor.device.type != library.device:
            raise TypeError(
                f"A tensor is on {tensor.device}, but compute={compute!r} works on {library.device} tensors, without a "
                "copy. Move it first with tensor.to(...), or leave out compute= and compute with PyTorch where it is."
            )
    # An operator whose parameters are mapped calls torch.func.vmap, which takes tensors only.
    if any(part is not None and part.apply.__module__ == _torch_vmap.__name__ for part in layout.parts):
        raise NotImplementedError(
            f"torch.func.vmap over the parameters of an operator works on tensors only: leave out compute={compute!r}, "
            "or give the operator's parameters batch axes in front."
        )
    module = library.load()
    memory = [_extent(tensor) for tensor in tensors]  # of all inputs and results so far

    def to_array(tensor: Tensor | None) -> Any:
        # DLPack refuses tensors that are conjugated by a bit, and drops the bit of a negated one.
        return None if tensor is None else module.from_dlpack(tensor.detach().resolve_conj().resolve_neg())

    def to_tensor(array: Any) -> Tensor:
        tensor = _tensor(array)
        start, end = _extent(tensor)
        # Copy a result that overlaps with an input or with another result.
        if any(start < other_end and other_start < end for other_start, other_end in memory):
            tensor = tensor.clone()
        memory.append(_extent(tensor))
        return tensor

    with library.context(module, tensors[0].device):
        yield tuple(layout.join(tuple(map(to_array, values)))), to_tensor


def _tensor(array: Any) -> Tensor:
    """A library's array as a tensor that PyTorch may write to; a copy where it is read-only or has negative strides."""
    if isinstance(array, (np.ndarray, np.generic)):
        array = writable(array)
    elif any(stride < 0 for stride in array.strides):  # PyTorch has no such strides
        array = array.copy()
    if array.dtype == bool:  # not every version of every library exports these
        return torch.from_dlpack(array.view(np.uint8)).view(torch.bool)
    return torch.from_dlpack(array)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the byte after its last one."""
    start: int = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _cupy() -> Any:
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise ImportError('compute="cupy" needs CuPy: pip install "ddnref[cuda12]", or [cuda13].') from error
    return cupy


@contextmanager
def _on_torch_stream(cupy: Any, device: torch.device) -> Iterator[None]:
    """Make CuPy work on the tensors' device and on PyTorch's current stream there."""
    with (
        torch.cuda.device(device),  # PyTorch exports only tensors of the current device
        cupy.cuda.Device(device.index),
        cupy.cuda.Stream.from_external(_CudaStream(torch.cuda.current_stream(device))),
    ):
        yield


class _CudaStream:
    """A stream of PyTorch that follows the CUDA stream protocol."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


LIBRARIES = {
    "cupy": Library("cuda", _cupy, _on_torch_stream),
    "numpy": Library("cpu", lambda: np, lambda module, device: nullcontext()),  # noqa: ARG005
}
