"""The Gram matrix of columns that are given as factors, from any library or framework."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ddnref._core.arrays import Array, namespace, requires_grad
from ddnref._core.checks import check_dtypes, check_real, check_shapes, given
from ddnref._kernels.public import public
from ddnref.curvature.ggn._columns import AffineColumns
from ddnref.curvature.ggn._state import cross


@public
def gram_from_factors(us: Sequence[Array], deltas: Sequence[Array], /, *, bias: bool | Sequence[bool] = True) -> Array:
    r"""Return the Gram matrix ``VᵀV`` of the columns of linear maps, from their inputs and backpropagated factors.

    The functions of the GGN compute this matrix for a `Chain`. Here inputs and factors come from elsewhere, such as a
    function in JAX.

    Parameters
    ----------
    us : list of (N, a) or (N, P, a) arrays, real floating
        For each linear map ``s = W u + b`` its inputs: one for each sample, or one for each of P positions of a sample
        (tokens, or the patches of a convolution).
    deltas : list of (M, N, o) or (M, N, P, o) arrays
        For each map the cotangents of s, for M cotangents of the outputs of each sample.
    bias : bool or list of bool, default True
        Whether the maps, or which of them, have a bias that is counted.

    Returns
    -------
    gram : (M N, M N) array
        Exactly symmetric. The column of factor m and sample n has the number ``m N + n``.

    Raises
    ------
    TypeError
        Not real floating; mixed libraries, devices or dtypes; a PyTorch tensor that requires grad.
    ValueError
        Shapes that do not fit; lists of different lengths, or empty ones.

    See Also
    --------
    ddnref.interop.torch.ggn : finds the factors of any PyTorch module.
    gram_eigh : for a factor V that is an array.

    Notes
    -----
    .. math:: K_{(mn),(m'n')} = \sum_{\text{maps}} \sum_{p p'} (u_{np}^T u_{n'p'} + 1) (\delta_{mnp}^T \delta_{m'n'p'})

    The non-zero eigenvalues of K are those of :math:`V V^T`. Its eigenvectors :math:`\tilde e` give those of
    :math:`V V^T` as :math:`V \tilde e / \sqrt\lambda`, where the product with V is one vector-Jacobian product of the
    network. Cost: ``(M N)² Σ o`` flops for maps without positions, at most ``(M N)² Σ a o`` with them.

    Examples
    --------
    >>> import numpy as np
    >>> u, delta = np.asarray([[1.0, 0.0], [0.0, 3.0]]), np.asarray([[[1.0], [1.0]]])
    >>> ddnref.curvature.gram_from_factors([u], [delta], bias=False)
    array([[1., 0.],
           [0., 9.]])
    """
    us, deltas = list(us), list(deltas)
    if not us or len(us) != len(deltas):
        raise ValueError(
            f"us has {len(us)} arrays and deltas {len(deltas)}, expected one of each for every linear map."
        )
    has_bias = [bias] * len(us) if isinstance(bias, bool) else list(bias)
    if len(has_bias) != len(us):
        raise ValueError(f"bias has {len(has_bias)} entries, expected {len(us)}, one for each linear map.")
    arrays = {f"us[{i}]": u for i, u in enumerate(us)} | {f"deltas[{i}]": delta for i, delta in enumerate(deltas)}
    given(**arrays)
    namespace(**arrays)
    check_real(**arrays)
    check_dtypes(**{name: (array, us[0].dtype) for name, array in arrays.items()})
    for name, array in arrays.items():
        if requires_grad(array):
            raise TypeError(f"{name} requires grad, and PyTorch would record each product. Pass {name}.detach().")
    columns = []
    for i, (u, delta) in enumerate(zip(us, deltas, strict=True)):
        if u.ndim not in (2, 3) or delta.ndim != u.ndim + 1:
            raise ValueError(
                f"us[{i}] has shape {tuple(u.shape)} and deltas[{i}] {tuple(delta.shape)}, expected (N, a) and "
                "(M, N, o), or (N, P, a) and (M, N, P, o) for P positions."
            )
        m, n = deltas[0].shape[0], us[0].shape[0]
        check_shapes(**{
            f"us[{i}]": (u, (n, *u.shape[1:])),
            f"deltas[{i}]": (delta, (m, *u.shape[:-1], delta.shape[-1])),
        })  # fmt: skip
        if u.ndim == 3:
            # Positions last, as the patches of a convolution have them.
            xp = array_api_compat.array_namespace(u)
            u, delta = xp.matrix_transpose(u), xp.matrix_transpose(delta)
        shapes = ((delta.shape[2], u.shape[1]), (delta.shape[2],))
        columns.append(AffineColumns(u, delta, shapes if has_bias[i] else shapes[:1]))
    group = tuple(range(sum(c.n_params for c in columns)))
    return cross(tuple(columns), tuple(columns), group, symmetric=True)
