r"""The exact diagonal of a network's Hessian, and its trace layer by layer, in one sweep without products.

The diagonal has to do with one layer at a time. Where only ``dW_l`` moves, the input of that layer stands still, and of
the expansion in `_expansion` only ``½ ds ∘ M ds`` remains, with ``ds = z dWᵀ``. M holds all that follows the layer, and
joins no two samples. With one (a, a) block for each sample n,

    M = diag(c) + f P f,    P of the layer before = Wᵀ M W,    P behind the last layer = S,
    diag(H)[j, i] = Σ_n M_n[j, j] z[n, i]²

Where no activation bends (all c are zero: ReLU, and every Gauss–Newton matrix) M has the form ``FᵀSF`` with the
derivatives F of the outputs in s, C rows for each sample, which are cheaper to carry where C is below the width.
"""

from __future__ import annotations

from collections.abc import Iterator

from ddnref._core.arrays import Array, Namespace, double, full, is_true, namespace_of
from ddnref._kernels.dense import identity
from ddnref._kernels.public import public
from ddnref.curvature.hessian._expansion import CLOSE, OPEN, Blocks, Expansion, Layer, NetworkHessian, Step, hessian_of
from ddnref.curvature.hessian._methods import DENSE_LIMIT
from ddnref.networks._chain import Chain

CHUNK = 2**22  # numbers of P that are held at once: 32 MB


@public
def hessian_diagonal(chain: Chain, x: Array, t: Array, /, *, curvature: str = "hessian") -> list[Array]:
    r"""Diagonal of the Hessian of a network's loss in all its weights, exact, without Hessian-vector products.

    Parameters
    ----------
    chain : Chain
        Made of `Dense` and `Flatten` layers and `Residual` blocks of them. Other layers are taken only while the
        matrix is small enough to be formed (6000 parameters).
    x, t, curvature
        As in `hessian_factor`.

    Returns
    -------
    diagonal : list of arrays, shaped like ``chain.params``
        Entry by entry the second derivative of the loss in one weight, in the dtype of the weights.

    Raises
    ------
    NonFiniteError, TypeError, ValueError
        As `hessian_factor`.

    See Also
    --------
    hessian_trace : its sums, one for each array of parameters.
    hessian_eigvals : eigenvalues.

    Notes
    -----
    .. math:: \mathrm{diag}(H_l)_{ji} = \sum_n M_{n,jj}\, z_{ni}^2, \qquad
        M = \mathrm{diag}(c_l) + f_l P f_l, \quad P = W_{l+1}^T M_{l+1} W_{l+1}

    Each sample carries one square block P through the layers, from the last to the first: ``2 N a b (a + b)`` flops
    for a layer of a outputs and b inputs, with ``8 N a b`` for a Hessian-vector product. Where no activation has a
    second derivative, and for the Gauss–Newton matrix, the derivatives of the C outputs are carried where that is
    cheaper: ``2 N C a b`` flops. Memory: ``N a²`` or ``N C a`` numbers, but at most 32 MB.

    Arithmetic is in float64 wherever the library has it.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.from_arrays([np.asarray([[2.0, 1.0]])], activation="identity", loss="mse")
    >>> x, t = np.asarray([[1.0, 3.0]]), np.asarray([[1.0]])  # the loss (w₁ + 3 w₂ - 1)²
    >>> ddnref.curvature.hessian_diagonal(chain, x, t)
    [array([[ 2., 18.]])]
    """
    hessian = hessian_of(chain, x, t, curvature)
    return [entry[0, ...] for entry in hessian.params(_diagonal(hessian))]


@public
def hessian_trace(chain: Chain, x: Array, t: Array, /, *, curvature: str = "hessian") -> Array:
    r"""Traces of the diagonal blocks of the Hessian of a network's loss, one for each array of parameters, exact.

    Parameters
    ----------
    chain, x, t, curvature
        As in `hessian_diagonal`.

    Returns
    -------
    traces : (n,) array
        In the order of ``chain.params``: of the block of each weight matrix and each bias. Their sum is the trace of H.

    Raises
    ------
    NonFiniteError, TypeError, ValueError
        As `hessian_factor`.

    See Also
    --------
    hessian_diagonal : the entries that are summed, at the same cost.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.from_arrays([np.asarray([[2.0, 1.0]])], activation="identity", loss="mse")
    >>> x, t = np.asarray([[1.0, 3.0]]), np.asarray([[1.0]])  # the loss (w₁ + 3 w₂ - 1)²
    >>> ddnref.curvature.hessian_trace(chain, x, t)
    array([20.])
    """
    diagonal = hessian_diagonal(chain, x, t, curvature=curvature)
    xp = namespace_of(diagonal[0])
    traces = xp.stack([xp.sum(double(xp, entry)) for entry in diagonal])
    return xp.astype(traces, diagonal[0].dtype, copy=False)


def _diagonal(hessian: NetworkHessian) -> Blocks:
    """Return the diagonal as one vector of all weights."""
    e = hessian.expansion
    if e is None:
        if hessian.total > DENSE_LIMIT:
            raise TypeError(
                f"The chain has a layer of type {hessian.refused}, which the sweep over the layers does not take, and "
                f"{hessian.total} parameters, too many for the dense matrix (at most {DENSE_LIMIT}). Use Dense, "
                "Flatten and Residual layers, or estimate the diagonal from chain.hvp with random signs."
            )
        diagonal = namespace_of(hessian.like).linalg.diagonal(hessian.matrix())
        return hessian.from_rows(diagonal[None, :])
    # Sum over the samples, as many at once as fit in memory.
    n, widest = e.curvature.shape[0], max(_state_sizes(e))
    step = max(1, CHUNK // widest**2)
    parts = [_samples(e, slice(start, min(start + step, n))) for start in range(0, n, step)]
    sums = [[d.mT @ (layer.z * layer.z) for layer, d in _own(part)] for part in parts]
    # The last layer came first.
    return [sum(terms[1:], terms[0])[None, ...] for terms in zip(*sums, strict=True)][::-1]


def _own(e: Expansion) -> Iterator[tuple[Layer, Array]]:
    """Yield each layer, the last one first, with the diagonal of its ``M = diag(c) + f P f``, (N, a_out)."""
    carry = _by_outputs if _outputs_are_cheaper(e) else _by_blocks
    return carry(e)


def _by_blocks(e: Expansion) -> Iterator[tuple[Layer, Array]]:
    """Carry P itself, (N, state, state): the tangent that moves first, then those kept for residual blocks."""
    xp, p, n = e.xp, e.curvature, e.curvature.shape[-1]
    for step in reversed(e.steps):
        if not isinstance(step, Layer):
            p = _pull(xp, step, _pull(xp, step, p, n).mT, n)
            continue
        # M = diag(c) + f P f on the tangent that moves; the kept ones pass by
        slope = _with_ones(xp, step.slope, p.shape[-1] - n)
        c = xp.concat([step.c, full((step.c.shape[0], p.shape[-1] - n), 0.0, step.c)], axis=-1)
        m = slope[:, :, None] * p * slope[:, None, :] + c[:, :, None] * identity(p.shape[-1], p)
        yield step, xp.linalg.diagonal(m)[:, :n]
        if step is e.layers[0]:
            return
        # P = Wᵀ M W
        p, n = _through(xp, step.weight, _through(xp, step.weight, m, n).mT, n), step.weight.shape[1]


def _by_outputs(e: Expansion) -> Iterator[tuple[Layer, Array]]:
    """Carry the derivatives of the outputs, (N, C, state), of which P is ``FᵀSF`` where all c are zero."""
    xp, n = e.xp, e.curvature.shape[-1]
    f = xp.broadcast_to(identity(n, e.curvature), e.curvature.shape)
    for step in reversed(e.steps):
        if not isinstance(step, Layer):
            f = _pull(xp, step, f, n)
            continue
        f = f * _with_ones(xp, step.slope, f.shape[-1] - n)[:, None, :]
        own = f[..., :n]
        yield step, xp.sum((e.curvature @ own) * own, axis=1)
        if step is e.layers[0]:
            return
        f, n = _through(xp, step.weight, f, n), step.weight.shape[1]


def _through(xp: Namespace, w: Array, m: Array, n: int) -> Array:
    """Return ``M W`` in the columns of the tangent that moves, and the others as they are."""
    moved = xp.reshape(xp.reshape(m[..., :n], (-1, n)) @ w, (*m.shape[:-1], w.shape[1]))
    return moved if m.shape[-1] == n else xp.concat([moved, m[..., n:]], axis=-1)


def _pull(xp: Namespace, step: Step, m: Array, n: int) -> Array:
    """Return the columns of the state before a mark, from those of the state after it."""
    if step == CLOSE:  # the input that was kept was added: both move the sum
        return xp.concat([m, m[..., :n]], axis=-1)
    rest = m.shape[-1] - n
    return xp.concat([m[..., :n] + m[..., rest:], m[..., n:rest]], axis=-1)


def _with_ones(xp: Namespace, slope: Array, kept: int) -> Array:
    return slope if not kept else xp.concat([slope, full((slope.shape[0], kept), 1.0, slope)], axis=-1)


def _outputs_are_cheaper(e: Expansion) -> bool:
    """Whether all c are zero, and C derivatives for each sample take fewer flops than one block P."""
    c = e.curvature.shape[-1]
    shapes = [layer.weight.shape for layer in e.layers[1:]]
    if sum(c * a * b for a, b in shapes) >= sum(a * b * (a + b) for a, b in shapes):
        return False
    return not is_true(e.xp.any(e.xp.stack([e.xp.any(layer.c != 0) for layer in e.layers])))


def _state_sizes(e: Expansion) -> list[int]:
    """Count the entries of the state of one sample, in all places of the network."""
    kept: list[int] = []
    found = [e.curvature.shape[-1]]
    current = e.layers[0].weight.shape[1]
    for step in e.steps:
        if isinstance(step, Layer):
            current = step.weight.shape[0]
        elif step == OPEN:
            kept.append(current)
        else:
            kept.pop()
        found.append(current + sum(kept))
    return found


def _samples(e: Expansion, part: slice) -> Expansion:
    """Return the expansion of the loss of some of the samples."""
    if part == slice(0, e.curvature.shape[0]):
        return e

    def of(step: Step) -> Step:
        if not isinstance(step, Layer):
            return step
        return step._replace(**{name: getattr(step, name)[part, :] for name in ("z", "beta", "c", "slope")})

    steps = tuple(of(step) for step in e.steps)
    layers = tuple(step for step in steps if isinstance(step, Layer))
    return e._replace(steps=steps, layers=layers, curvature=e.curvature[part, ...])
