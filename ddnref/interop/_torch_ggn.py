"""The columns of the GGN of any PyTorch module, from the inputs and the cotangents of the parts that own parameters.

Hooks record what goes into each part. One batched gradient of the outputs, with the factors of the loss's Hessian as
cotangents, gives δ behind all parts at once. Then each part has its own columns, by the inputs and δ alone:

- a linear map, also at many positions (tokens, the pixels of a convolution): the factors themselves;
- every other part, such as a normalisation, an embedding, an attention block or a module that holds parameters itself:
  the vector-Jacobian products of that part for each sample, by ``torch.func``, stored.

Which parts those are is found out, not declared, and so the sum of all columns with random coefficients is compared
with PyTorch's gradient. Where a parameter is used in a way that no hook sees, its columns come from the whole module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from ddnref._core.arrays import namespace
from ddnref._core.checks import check_dtypes, check_real
from ddnref.curvature.ggn._columns import AffineColumns, Columns, ExplicitColumns
from ddnref.curvature.ggn._network import Linearised
from ddnref.interop._torch_calls import Axis, Call, Layout, Output, layout, record, replaced
from ddnref.networks._from_torch import loss_from
from ddnref.networks._losses import Loss, name_of, over_positions
from ddnref.networks._losses import resolve as resolve_loss

Tensor = Any  # torch is optional, so that types must not depend on it

ROUNDING = 1000  # times eps of the whole gradient: what rounding may leave of one parameter's


def ggn(module: Any, loss: Any = "cross_entropy", *, reduction: str | None = None) -> ModuleGgn:
    r"""Prepare any PyTorch module for the functions of the Gauss–Newton matrix, which take it in place of a `Chain`.

    Transformers, residual networks with normalisation, embeddings, shared weights and branches that depend on data all
    work, because nothing is known about a module but its calls. Sizes are those of the module's own forward pass.

    Parameters
    ----------
    module : torch.nn.Module
        A function of one tensor ``(N, ...)`` that treats its N samples one by one and returns ``(N, C)``, or
        ``(N, T, C)`` for outputs at T positions. It is followed, not copied: what it is at the time of a call counts.
        Parameters with ``requires_grad=False`` are constants.
    loss : str, Loss or module
        As in `Chain.from_torch`. For ``(N, T, C)`` it is that of each position, with targets ``(N, T)`` or
        ``(N, T, C)``: the C outputs come last, where PyTorch's losses want them second.
    reduction : {"mean", "sum"}, optional
        As in `Chain.from_torch`; the mean is over samples and positions.

    Returns
    -------
    network : ModuleGgn
        With the attributes `params` and `names`, both in the order of ``module.named_parameters()``. Results of
        `ggn_eigh` and `ggn_damped_newton` are dictionaries by these names, and `groups` may hold names.

    Raises
    ------
    TypeError
        Not a module; a loss that is not known; parameters of several dtypes or devices. When used: an output that is
        not a tensor, or of another dtype.
    ValueError
        No parameter is trained. When used: a part that computes statistics of the batch or drops units at random
        (``module.eval()`` helps); samples that depend on each other in another way; outputs of the wrong shape.

    See Also
    --------
    ddnref.curvature.ggn_eigh, ddnref.curvature.ggn_reducer
    ddnref.networks.Chain.from_torch : for a Sequential, with Hessian-vector products and the exact Hessian as well.

    Notes
    -----
    The Gram matrix ``VᵀV`` of the columns :math:`J_n^T S_n` is a sum over the parts of the module. A linear map with
    inputs u and backpropagated factors δ adds the products of inner products of both; a part of another kind stores its
    columns, N M times the number of its parameters. Cost: three passes forward and about M + 2 backward, two of them to
    compare the columns with PyTorch's gradient, for which two flags are read on the host.

    Parameters whose uses no hook sees, such as a weight that another module multiplies with too, are found by that
    comparison. Their columns are computed by the whole module, once for each sample and factor, which takes about as
    long as all else.

    Examples
    --------
    >>> import torch
    >>> from ddnref.interop.torch import ggn
    >>> module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2)).double()
    >>> x, t = torch.eye(2, dtype=torch.float64), torch.asarray([0, 1])
    >>> w, v = ddnref.curvature.ggn_eigh(ggn(module, "cross_entropy"), x, t, k=1)
    >>> list(v)
    ['0.weight', '0.bias', '1.weight', '1.bias', '2.weight', '2.bias']
    >>> v["0.weight"].shape
    torch.Size([1, 3, 2])
    """
    return ModuleGgn(module, loss, reduction)


class ModuleGgn:
    """A PyTorch module under a loss, made by `ddnref.interop.torch.ggn`.

    Attributes
    ----------
    module : torch.nn.Module
    criterion : Loss
        The loss of one sample, or of one position.
    reduction : str
    params : list of tensors
        The parameters that require grad, detached, in the order of ``module.named_parameters()``.
    names : tuple of str
        Their names.
    """

    def __init__(self, module: Any, loss: Any, reduction: str | None) -> None:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module is a {type(module).__name__}, expected a torch.nn.Module.")
        self.module = module
        given, self.reduction = loss_from(loss, reduction)
        self.criterion = resolve_loss(given, self.reduction)
        arrays = dict(zip(self.names, self.params, strict=True))
        if not arrays:
            raise ValueError("module trains no parameter: none of its parameters requires grad.")
        namespace(**arrays)
        check_real(**arrays)
        check_dtypes(**{name: (p, self.params[0].dtype) for name, p in arrays.items()})

    def __repr__(self) -> str:
        params = self.params
        total = sum(p.numel() for p in params)
        loss = f"{self.reduction} of {name_of(self.criterion)}"
        return f"ModuleGgn({type(self.module).__name__}; {loss}; {total} parameters, {params[0].dtype})"

    @property
    def params(self) -> list[Tensor]:
        return [p.detach() for p in self._trained().values()]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._trained())

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def scale(self, n: int | Tensor) -> Any:
        """Return the factor of the sum over samples or positions: 1/n for the mean, or 1 for the sum."""
        return 1 / n if self.reduction == "mean" else 1.0

    def linearised(self, x: Tensor) -> Linearised:
        """Run forward, and keep the graph until the columns are asked for."""
        refuse_dependent_samples(self.module)
        trained = self._trained()
        with _recording():
            x = x.clone() if x.is_inference() else x.detach()
            known = layout(self.module, x)
            owners = _owners(self.module, trained, known)
            y, calls = record(self.module, x, owners, known)
        flat, criterion = _outputs(y, x.shape[0], self.params[0].dtype, self.criterion)
        graph = _Graph(self.module, trained, owners, calls, y)
        return Linearised(flat, criterion, graph.columns)


@contextmanager
def _recording() -> Iterator[None]:
    """Record a graph whatever the caller's mode, with attention in operations that can be mapped over cotangents."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        warnings.catch_warnings(),
    ):
        # The user cannot change that a kernel has no rule for vmap and runs once for each cotangent.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


def _outputs(y: Any, n: int, dtype: Any, criterion: Loss) -> tuple[Tensor, Loss]:
    """Check the output of a module, and return it as ``(N, C)``, with the loss that takes it."""
    if not isinstance(y, torch.Tensor):
        raise TypeError(
            f"module returns a {type(y).__name__}, expected one tensor (N, C) or (N, T, C): wrap it in a module that "
            "returns the outputs alone."
        )
    if y.dtype != dtype:
        raise TypeError(f"module returns {y.dtype}, its parameters are {dtype}: both must be the same.")
    if y.ndim not in (2, 3) or y.shape[0] != n:
        raise ValueError(
            f"module returns shape {tuple(y.shape)} for N = {n} samples, expected (N, C), or (N, T, C) with the "
            "outputs of each position last."
        )
    if not y.requires_grad:
        raise ValueError("The output of module does not depend on its parameters: none of them has a derivative.")
    flat = y.detach()
    if y.ndim == 2:
        return flat, criterion
    return flat.reshape(n, y.shape[1] * y.shape[2]), over_positions(criterion, int(y.shape[1]))


def refuse_dependent_samples(module: Any) -> None:
    """Raise for parts that compute statistics of the batch, or draw random numbers."""
    batch, instance = torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.instancenorm._InstanceNorm
    dropout = torch.nn.modules.dropout._DropoutNd
    for name, part in module.named_modules():
        what = None
        if isinstance(part, batch) and (part.training or part.running_mean is None):
            what = "computes the mean and variance of the batch, so that samples depend on each other"
        elif isinstance(part, instance) and part.training and part.track_running_stats:
            what = "changes its running statistics"
        elif part.training and (
            (isinstance(part, dropout) and part.p > 0)
            or (isinstance(part, torch.nn.MultiheadAttention | torch.nn.RNNBase) and part.dropout > 0)
        ):
            what = "drops units at random, so that no two passes compute the same function"
        if what is not None:
            remedy = "Call module.eval() first."
            if not part.training:
                remedy = "Build it with track_running_stats=True, or use another normalisation."
            raise ValueError(f"module has {type(part).__name__} {name!r}, which {what}. {remedy}")


# --- which part owns which parameter --------------------------------------------------------------------------------


def _owners(module: Any, trained: dict[str, Tensor], known: Layout) -> dict[Any, dict[str, Tensor]]:
    """Return the parts whose columns are needed, each with the parameters that it owns, by their names inside it.

    A parameter belongs to the innermost module around it that is called with samples: so a weight that an attention
    block reads from a part of it that is never called belongs to the block. A shared one belongs to several.
    """
    wanted = {id(p) for p in trained.values()}
    owners: dict[Any, dict[str, Tensor]] = {}
    seen: dict[Any, set[int]] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, p in part._parameters.items():
            if p is None or id(p) not in wanted:
                continue
            path, inside = prefix, name
            while path and not known.carries_samples(module.get_submodule(path)):
                path, _, last = path.rpartition(".")
                inside = f"{last}.{inside}"
            owner = module.get_submodule(path)
            # Names of one parameter twice in a part count once.
            if id(p) not in seen.setdefault(owner, set()):
                seen[owner].add(id(p))
                owners.setdefault(owner, {})[inside] = p
    return owners


# --- columns --------------------------------------------------------------------------------------------------------


class _Graph(NamedTuple):
    """A forward pass that was recorded."""

    module: Any
    trained: dict[str, Tensor]
    owners: dict[Any, dict[str, Tensor]]
    calls: list[Call]
    y: Tensor

    def columns(self, y_bar: Tensor) -> tuple[Columns, ...]:
        """Return the columns of cotangents ``(M, N, C)``, one block for each linear map or other parameter."""
        with _recording():
            y_bar = y_bar.clone() if y_bar.is_inference() else y_bar
            c = _coefficients(y_bar)
            found = self._blocks(*self._deltas(y_bar, c))
            wrong = self._disagreeing(found, y_bar, c)
            if wrong:
                exact = self._one_sample_at_a_time(wrong, y_bar)
                found |= {id(p): ExplicitColumns((columns,)) for p, columns in zip(wrong, exact, strict=True)}
        # One block after the other, in the order of the parameters; a linear map has one for weight and bias.
        return tuple({id(block): block for block in (found[id(p)] for p in self.trained.values())}.values())

    def _blocks(self, m: int, n: int, deltas: list[tuple[Call, list[Tensor]]]) -> dict[int, Columns]:
        """Return the block of each parameter."""
        shared = _shared(self.owners)
        found: dict[int, Columns] = {}
        terms: dict[int, list[Tensor]] = {}
        for part, own in self.owners.items():
            calls = [(call, delta) for call, delta in deltas if call.module is part]
            if not shared & {id(p) for p in own.values()} and _is_affine(part, own, calls):
                block = _affine(part, own, calls)
                found |= dict.fromkeys((id(p) for p in own.values()), block)
                continue
            for call, delta in calls:
                for name, columns in _by_sample(call, delta, own).items():
                    terms.setdefault(id(own[name]), []).append(columns)
        for p in self.trained.values():
            if id(p) not in found:
                # Parameters that were not used have columns of zeros, which take no memory.
                own_terms = terms.get(id(p)) or [p.detach().new_zeros(()).expand(m, n, *p.shape)]
                found[id(p)] = ExplicitColumns((reduce(add, own_terms),))
        return found

    def _deltas(self, y_bar: Tensor, c: Tensor) -> tuple[int, int, list[tuple[Call, list[Tensor]]]]:
        """Return the calls that the output depends on, each with the cotangents ``(M, *shape)`` of its outputs.

        One more cotangent, of every other sample alone, must leave the rest at zero: else samples depend on each other.
        """
        m, n, _ = y_bar.shape
        half = (c[..., None] * y_bar).sum(0) * (torch.arange(n, device=y_bar.device) % 2 == 0)[:, None]
        # δ behind each call, and the cotangents of what its inner calls take
        tensors = [call.tensors() for call in self.calls]
        edges = [tensor.edge for own in tensors for tensor in own if tensor.edge is not None]
        bars = iter(self._gradient(edges, torch.cat([y_bar, half[None]]), batched=True))
        found, crossing = [], []
        for call, own in zip(self.calls, tensors, strict=True):
            given = [None if tensor.edge is None else next(bars) for tensor in own]
            if all(bar is None for bar in given):
                continue
            zeros = y_bar.new_zeros(())
            filled = [
                zeros.expand(m + 1, *tensor.shape) if bar is None else bar
                for tensor, bar in zip(own, given, strict=True)
            ]
            found.append((call, [bar[:m] for bar in filled]))
            crossing.append(_reaches_others(own, [bar[m] for bar in filled]))
        flags = torch.stack(crossing).tolist() if n > 1 and crossing else []
        if any(flags):
            last = max(i for i, flag in enumerate(flags) if flag)
            part = found[last][0].module
            where = next(name for name, other in self.module.named_modules() if other is part)
            raise ValueError(
                f"Samples depend on each other behind {type(part).__name__} {where!r}: its output for one sample "
                "changes the outputs of others. The most likely cause is a statistic of the batch, or a sum over the "
                "axis of samples. Only a module that treats samples one by one has a Gram matrix of samples."
            )
        return m, n, found

    def _gradient(self, inputs: list[Any], y_bar: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        """Return the cotangents of tensors, or edges of the graph, from those of the outputs."""
        bar = y_bar.reshape(*y_bar.shape[: y_bar.ndim - 2], *self.y.shape)
        return torch.autograd.grad(self.y, inputs, bar, retain_graph=True, allow_unused=True, is_grads_batched=batched)  # type: ignore[no-any-return]

    def _disagreeing(self, found: dict[int, Columns], y_bar: Tensor, c: Tensor) -> list[Tensor]:
        """Return the parameters whose columns, with coefficients ``(M, N)``, do not add up to PyTorch's gradient."""
        params = list(self.trained.values())
        sums: dict[int, Tensor] = {}
        for block in {id(block): block for block in found.values()}.values():
            mine = [p for p in params if found[id(p)] is block]
            vectors = block.apply(c[None], range(block.n_params))
            sums |= {id(p): v[0] for p, v in zip(mine, vectors, strict=True)}
        bars = self._gradient(params, (c[..., None] * y_bar).sum(0), batched=False)
        gradients = [torch.zeros_like(p) if bar is None else bar for p, bar in zip(params, bars, strict=True)]
        gap = torch.stack([(sums[id(p)] - g).norm() for p, g in zip(params, gradients, strict=True)])
        own = torch.stack([g.norm() for g in gradients])
        eps = torch.finfo(own.dtype).eps
        # NaN compares as false: samples that are not finite are named later.
        bad = gap > eps**0.5 * own + ROUNDING * eps * own.norm()
        return [p for p, flag in zip(params, bad.tolist(), strict=True) if flag]

    def _one_sample_at_a_time(self, params: list[Tensor], y_bar: Tensor) -> list[Tensor]:
        """Return columns by the whole graph: one batched gradient for each sample."""
        columns = []
        for i in range(y_bar.shape[1]):
            alone = torch.zeros_like(y_bar)
            alone[:, i] = y_bar[:, i]
            bars = self._gradient(params, alone, batched=True)
            zeros = (y_bar.new_zeros((y_bar.shape[0], *p.shape)) for p in params)
            columns.append([z if bar is None else bar for bar, z in zip(bars, zeros, strict=True)])
        return [torch.stack(samples, 1) for samples in zip(*columns, strict=True)]


def _coefficients(y_bar: Tensor) -> Tensor:
    """Return fixed random coefficients ``(M, N)`` of both signs, none near zero."""
    rng, (m, n, _) = np.random.default_rng(0), y_bar.shape
    draws = rng.uniform(0.5, 1.5, (m, n)) * rng.choice([-1.0, 1.0], (m, n))
    return torch.asarray(draws, dtype=y_bar.dtype, device=y_bar.device)


def _reaches_others(tensors: list[Output], bars: list[Tensor]) -> Tensor:
    """Return whether tensors of samples 1, 3, … have a cotangent, though the loss is of samples 0, 2, … alone."""
    crossing = bars[0].new_zeros((), dtype=torch.bool)
    for tensor, bar in zip(tensors, bars, strict=True):
        if tensor.axis is not None and bar.numel():
            size = tensor.axis.apart(bar).flatten(1).abs().amax(1)
            # NaN compares as false.
            crossing = crossing | (size[1::2] > torch.finfo(bar.dtype).eps * size.max()).any()
    return crossing


def _shared(owners: dict[Any, dict[str, Tensor]]) -> set[int]:
    """Return the parameters that several parts own."""
    seen: set[int] = set()
    shared: set[int] = set()
    for own in owners.values():
        here = {id(p) for p in own.values()}
        shared |= here & seen
        seen |= here
    return shared


# --- linear maps ----------------------------------------------------------------------------------------------------


def _is_affine(part: Any, own: dict[str, Tensor], calls: list[tuple[Call, list[Tensor]]]) -> bool:
    """Whether a part is a Linear or Conv2d with a trained weight, whose columns are factors."""
    if not calls or set(own) != {name for name, p in part._parameters.items() if p is not None} or "weight" not in own:
        return False
    if part._forward_hooks or part._forward_pre_hooks or any(len(call.leaves) != 1 for call, _ in calls):
        return False
    axes = [(call.axes[0], call.outputs[0].axis, call.leaves[0].ndim) for call, _ in calls]
    if type(part).forward is torch.nn.Linear.forward:
        # The last axis has the features.
        return all(a is not None and a == b and a.place < ndim - 1 for a, b, ndim in axes)
    if type(part).forward is torch.nn.Conv2d.forward and part.groups == 1 and part.padding_mode == "zeros":
        return _padding(part) is not None and all(a is not None and a == b and a.place == 0 for a, b, _ in axes)
    return False


def _padding(part: Any) -> tuple[int, ...] | None:
    """Return the margins of a convolution; ``None`` where its two sides differ."""
    if part.padding == "valid":
        return (0, 0)
    if part.padding == "same":
        total = [d * (k - 1) for d, k in zip(part.dilation, part.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    return tuple(part.padding)


def _affine(part: Any, own: dict[str, Tensor], calls: list[tuple[Call, list[Tensor]]]) -> AffineColumns:
    """Return the factors of a linear map; several calls are several positions."""
    factors = [_factors(part, call, delta[0]) for call, delta in calls]
    shapes = tuple(tuple(p.shape) for p in own.values())
    if len(factors) == 1:
        return AffineColumns(*factors[0], shapes)
    us, deltas = ([_with_positions(f, base) for f in side] for side, base in zip(zip(*factors), (2, 3)))  # noqa: B905
    return AffineColumns(torch.cat(us, -1), torch.cat(deltas, -1), shapes)


def _with_positions(factor: Tensor, ndim: int) -> Tensor:
    return factor[..., None] if factor.ndim == ndim else factor


def _factors(part: Any, call: Call, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return u, ``(N, a_in [, P])``, and δ, ``(M, N, a_out [, P])``, of one call."""
    u, axis = call.leaves[0], call.axes[0]
    assert axis is not None  # noqa: S101
    if type(part).forward is torch.nn.Conv2d.forward:
        # (N W, q, P) to (N, q, W P): each patch of each of a sample's images is a position.
        u = functional.unfold(u, part.kernel_size, part.dilation, _padding(part), part.stride)
        delta = delta.flatten(-2)
        if axis.width > 1:
            u, delta = axis.apart(u).transpose(1, 2).flatten(2), axis.apart(delta, 1).transpose(2, 3).flatten(3)
        return u, delta
    if u.ndim == 2 and axis == Axis(0, 1):
        return u, delta
    # (N, …, a) to (N, a, P)
    return axis.apart(u).flatten(1, -2).mT, axis.apart(delta, 1).flatten(2, -2).mT


# --- every other part -----------------------------------------------------------------------------------------------


def _by_sample(call: Call, deltas: list[Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns ``(M, N, *shape)`` of a part's parameters, by vector-Jacobian products for each sample.

    Inner calls are held at what they returned: what depends on the parameters is the output and what these take. None
    are returned for a part that cannot be mapped over samples.
    """
    params = {name: p.detach() for name, p in own.items()}
    arguments = _Sliced(call.leaves, call.axes)
    results = [_Sliced(part.results, part.axes) for part in call.inner]
    tensors = call.tensors()
    kept = [i for i, tensor in enumerate(tensors) if tensor.axis is not None]
    bars = [tensors[i].axis.apart(deltas[i], 1) for i in kept]  # type: ignore[union-attr]

    def of_sample(slices: list[Tensor], inner: list[list[Tensor]], own_bars: list[Tensor]) -> dict[str, Tensor]:
        def outputs(parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
            args, kwargs = pytree.tree_unflatten(arguments.whole(slices), call.structure)
            inputs: list[Tensor] = []
            with replaced(call.inner, [r.whole(i) for r, i in zip(results, inner, strict=True)], inputs):
                result = torch.func.functional_call(call.module, parameters, args, kwargs)
            found = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)] + inputs
            return tuple(found[i] for i in kept)

        pull = torch.func.vjp(outputs, params)[1]
        return torch.func.vmap(lambda *bar: pull(bar)[0])(*own_bars)  # type: ignore[no-any-return]

    try:
        return torch.func.vmap(of_sample, (0, 0, 1), 1)(  # type: ignore[no-any-return]
            arguments.slices(), [result.slices() for result in results], bars
        )
    except RuntimeError:
        # A branch that depends on data, or a kernel that vmap does not know: without these columns the check fails.
        return {}


class _Sliced(NamedTuple):
    """A flat list of values, some of which are tensors of samples."""

    leaves: tuple[Any, ...]
    axes: tuple[Axis | None, ...]

    def slices(self) -> list[Tensor]:
        """Return the tensors of samples, each with the samples first."""
        return [axis.apart(leaf) for leaf, axis in zip(self.leaves, self.axes, strict=True) if axis is not None]

    def whole(self, slices: list[Tensor]) -> list[Any]:
        """Return the list of one sample."""
        own = iter(slices)
        return [leaf if axis is None else next(own) for leaf, axis in zip(self.leaves, self.axes, strict=True)]
