"""Checks of what a chain is given: static facts, and one flag that says whether the targets are in range."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ddnref._core.arrays import Array, is_true, library, namespace, nan_where, requires_grad
from ddnref._core.checks import check_dtypes, check_shapes, given
from ddnref.networks import _protocol
from ddnref.networks._losses import Loss
from ddnref.networks._protocol import Layers


def inputs(layers: Layers, x: Array, like: Array) -> None:
    """Raise unless `x` fits the first layer and the layers fit each other."""
    given(x=x)
    namespace(x=x, params=like)
    check_dtypes(x=(x, like.dtype))
    refuse_recorded({"x": x})
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, features): one row for each sample.")
    # With the shape of a sample, layers that do not fit each other are found before anything is computed.
    _protocol.output_shape(layers, tuple(x.shape[1:]))


def bad_targets(loss: Loss, reduction: str, y: Array, t: Array, throw: bool) -> Array | None:
    """Return which samples have targets out of range, or raise with `throw`; wrong shapes and dtypes always raise."""
    # Static facts first: they raise in any case.
    if y.ndim != 2:
        raise ValueError(
            f"The last layer gives shape {tuple(y.shape)}, but a loss takes (N, C): end with a Dense, or a Flatten."
        )
    if y.shape[0] == 0 and reduction == "mean":
        raise ValueError('x holds no samples, and the mean over none is not defined. Pass reduction="sum" to get zero.')
    library(x=y, t=t)
    if loss.check is not None:
        loss.check(y, t)
    if t.ndim < 1 or t.shape[0] != y.shape[0]:
        raise ValueError(f"t has shape {tuple(t.shape)}, expected one target for each of {y.shape[0]} samples.")
    if loss.valid is None:
        return None
    # The values of the targets: one flag is read on the host, and only with throw.
    bad = ~loss.valid(y, t)
    if not throw:
        return bad
    if is_true(array_api_compat.array_namespace(bad).any(bad)):
        raise ValueError(
            f"t is out of range in at least one sample: class indices lie in [0, {y.shape[-1]}), weights of classes "
            "are not negative, binary targets lie in [0, 1], and none is NaN. The most likely cause is labels that "
            "count from one, or a padding value. Pass throw=False to get NaN for these samples."
        )
    return None


def refuse_recorded(arrays: dict[str, Array]) -> None:
    """Raise ``TypeError`` for tensors whose graph PyTorch would record beside the derivatives written out here."""
    for name, array in arrays.items():
        if requires_grad(array):
            raise TypeError(
                f"{name} requires grad, so PyTorch would record every operation of the chain. Pass "
                f"{name}.detach(), which shares its memory; Chain.from_torch does so for the weights."
            )


def marked(x: Array, bad: Array | None) -> Array:
    """Return `x` with NaN in bad samples; the sample axis is the first, or the one before the last."""
    if bad is None:
        return x
    return nan_where(bad if x.ndim == 1 else bad[:, None], x)


def like_params(name: str, vectors: Sequence[Array], like: Sequence[Array], leading: bool = False) -> None:
    """Check a list of arrays against the parameters, with or without one leading axis on every entry."""
    if len(vectors) != len(like):
        raise ValueError(f"{name} has {len(vectors)} arrays, expected {len(like)}, one for each of the chain's params.")
    # Several vectors have one more axis in front, the same for all arrays.
    lead: tuple[int, ...] = ()
    if leading and vectors and getattr(vectors[0], "ndim", 0) == like[0].ndim + 1:
        lead = (vectors[0].shape[0],)
    # Library, dtype and shape of each array, which messages call by its place in the list.
    arrays = {f"{name}[{i}]": array for i, array in enumerate(vectors)}
    given(**arrays)
    namespace(params=like[0], **arrays)
    check_dtypes(**{label: (array, like[0].dtype) for label, array in arrays.items()})
    check_shapes(**{label: (array, (*lead, *p.shape)) for (label, array), p in zip(arrays.items(), like, strict=True)})
