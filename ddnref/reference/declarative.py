"""Reverse passes through single eigenvectors, derived as in the deep declarative networks tutorial.

Each eigenpair (λ, y) of the real symmetric X is a solution of ``min −tr(uᵀXu) s.t. uᵀu = 1``:

    DDN   A = 2 yᵀ,   B_jab = −(δ_ja y_b + y_a δ_jb),   H = 2λ I − (X + Xᵀ)
          dy/dX = H⁻¹Aᵀ (A H⁻¹Aᵀ)⁻¹ A H⁻¹B − H⁻¹B                 (Gould, Hartley & Campbell 2022, proposition 4.6)

or a fixed point of power iteration with the sign of its eigenvalue, ``f(X, y) = y − sign(λ) X y / ‖X y‖ = 0``:

    IFT   dy/dX = −(∂f/∂y)⁻¹ ∂f/∂X

Forms "with the Jacobian" build dy/dX or its factors, m×m² numbers for each eigenvector; "structured" ones use the two
vectors in B and never store it. At the solution H is exactly singular, because ``H y = 0``, and so these are baselines
to measure against. Use ``ddnref.simultaneous_iteration_vjp``, whose well-conditioned bordered system gives the same
gradient.
"""

from __future__ import annotations

from ddnref._core.arrays import Array, Namespace, eps, is_complex, namespace_of
from ddnref._core.checks import conform
from ddnref._kernels.dense import hermitian_part, identity, solve

MODES = ("solve", "pinv")


def ddn_vjp_jacobian(
    v_bar: Array, x: Array, w: Array, v: Array, /, *, mode: str = "pinv", stacked: bool = True
) -> Array:
    """Gradient of a loss of eigenvectors by explicit A, B, H and dy/dX of the declarative node.

    Parameters
    ----------
    v_bar : (..., m, n) real array
        Cotangent of the eigenvectors.
    x : (..., m, m) array
        The symmetric matrix.
    w, v : (..., n) and (..., m, n) arrays
        Its n eigenpairs, eigenvectors of unit length in the columns.
    mode : {"pinv", "solve"}
        How H is inverted; see Notes.
    stacked : bool, default True
        One system of order m n for all pairs, or n systems of order m, one after the other. The gradient is the
        same; A, B and H take n², n and n² times the memory.

    Returns
    -------
    x_bar : (..., m, m) array, symmetric

    Raises
    ------
    TypeError, ValueError
        Mixed libraries, complex or mixed dtypes, shapes that do not fit, unknown `mode`.

    Notes
    -----
    ``solve`` uses the equation unchanged. H is singular up to rounding, so ``H⁻¹B`` is large along y, and the
    difference of the two terms has few correct digits or none. Measured relative errors are 0.06 to 3 with random
    cotangents, in float32 and float64 alike, and 100 to 400 with all ones where X has positive entries, because there
    the gradient itself is small; the result is NaN where elimination meets an exact zero. ``pinv`` leaves out the null
    space of H (singular values below ``m n eps ‖H‖``), the only space that A acts on: then ``A H⁺ = 0`` and
    ``dy/dX = −H⁺B``, which is right for simple eigenvalues.

    Cost: O(m⁴ n) flops and O(m³ n) memory one pair at a time, O(m⁴ n²) and O(m³ n) + O(m² n²) stacked.
    """
    xp = _check(v_bar, x, w, v, mode)
    if not stacked:  # each pair as a stack of one
        columns = [slice(i, i + 1) for i in range(w.shape[-1])]
        parts = [ddn_vjp_jacobian(v_bar[..., i], x, w[..., i], v[..., i], mode=mode) for i in columns]
        return sum(parts, xp.zeros_like(x))
    # The Jacobian of all eigenvectors, one below the other, and their cotangents as one row.
    dy_dx = _ddn(*_stacked(x, w, v), mode)
    y_bar = xp.reshape(xp.matrix_transpose(v_bar), (*x.shape[:-2], 1, dy_dx.shape[-2]))
    return xp.reshape(y_bar @ dy_dx, x.shape)


def ddn_vjp_schur(v_bar: Array, x: Array, w: Array, v: Array, /, *, mode: str = "pinv") -> Array:
    """Gradient of `ddn_vjp_jacobian` without storing B, one pair at a time: ``X̄ = −Σ (K yᵀ + y Kᵀ)``.

    ``K = H⁻¹Aᵀ (A H⁻¹Aᵀ)⁻¹ A H⁻¹ ȳ − H⁻¹ȳ`` is the cotangent taken through H, which is symmetric. Parameters, errors,
    result and modes are those of `ddn_vjp_jacobian`. Cost: O(m³ n) flops, O(m²) memory.
    """
    xp = _check(v_bar, x, w, v, mode)
    eye, x_bar = identity(x.shape[-1], x), xp.zeros_like(x)
    for i in range(w.shape[-1]):
        y, y_bar = v[..., i : i + 1], v_bar[..., i : i + 1]
        h = 2 * w[..., i, None, None] * eye - (x + xp.matrix_transpose(x))
        k = _ddn(h, 2 * xp.matrix_transpose(y), y_bar, mode)
        # B holds −(δ_ja y_b + y_a δ_jb), and so k is multiplied by y from either side.
        outer = k @ xp.matrix_transpose(y)
        x_bar = x_bar - (outer + xp.matrix_transpose(outer))
    return x_bar


def ift_vjp_jacobian(v_bar: Array, x: Array, w: Array, v: Array, /, *, symmetric: bool = True) -> Array:
    """Gradient through the fixed point, with explicit ``∂f/∂y`` and ``∂f/∂X``, one pair at a time.

    ``(∂f/∂y)ᵀ q = ȳ``, then ``X̄ = −(∂f/∂X)ᵀ q``. Arrays and errors are those of `ddn_vjp_jacobian`; no eigenvalue may
    be zero. Without `symmetric` the result is the plain gradient of f, which is right for any real matrix.

    The tutorial assumes λ > 0 and has no sign in f. For λ < 0 no eigenvector is a fixed point of its f, and the
    gradient is off by a factor of two or three. It also solves by the normal equations ``(∂f/∂y)(∂f/∂y)ᵀ``, which
    square the condition number. Cost: O(m³ n) flops, O(m³) memory.
    """
    xp = _check(v_bar, x, w, v)
    eye, x_bar = identity(x.shape[-1], x), xp.zeros_like(x)
    for i in range(w.shape[-1]):
        y, sign = v[..., i : i + 1], xp.sign(w[..., i, None, None])
        # f = y − z / l with z = X y and the signed length l = sign(λ) ‖z‖, whose derivative is the projector P / l.
        z = x @ y
        length = sign * xp.sqrt(xp.sum(z * z, axis=-2, keepdims=True))
        p = eye - (z / length) @ xp.matrix_transpose(z / length)
        df_dy = eye - p @ x / length
        df_dx = -(p / length)[..., None] * y[..., None, None, :, 0]  # (..., j, a, b)
        q = solve(xp.matrix_transpose(df_dy), v_bar[..., i : i + 1])
        x_bar = x_bar - xp.sum(q[..., None] * df_dx, axis=-3)
    return hermitian_part(x_bar) if symmetric else x_bar


def ift_vjp_structured(
    v_bar: Array, x: Array, w: Array, v: Array, /, *, store_b: bool = False, symmetric: bool = True
) -> Array:
    """Gradient of `ift_vjp_jacobian` simplified at the eigenpair: ``(I − XᵀP/λ) q = ȳ``, ``X̄ = (P q / λ) yᵀ``.

    Arguments, result and errors are the same, and ``P = I − y yᵀ``. `store_b` stores ``B = ∂f/∂X``, m×m² numbers, where
    an outer product gives the same.

    The tutorial's structured form solves with ``I − P X/λ`` in place of the transpose used here. They are equal for a
    symmetric X, where ``P X = X P``; for any other X the tutorial's is wrong. Cost: O(m³ n) flops; O(m²) memory, O(m³)
    with `store_b`.
    """
    xp = _check(v_bar, x, w, v)
    x_t, eye, x_bar = xp.matrix_transpose(x), identity(x.shape[-1], x), xp.zeros_like(x)
    for i in range(w.shape[-1]):
        y, w_i = v[..., i : i + 1], w[..., i, None, None]
        p = eye - y @ xp.matrix_transpose(y)
        q = solve(eye - x_t @ p / w_i, v_bar[..., i : i + 1])
        if store_b:
            b = -(p / w_i)[..., None] * y[..., None, None, :, 0]
            x_bar = x_bar - xp.sum(q[..., None] * b, axis=-3)
        else:
            x_bar = x_bar + (p @ q / w_i) @ xp.matrix_transpose(y)
    return hermitian_part(x_bar) if symmetric else x_bar


def _stacked(x: Array, w: Array, v: Array) -> tuple[Array, Array, Array]:
    """H (mn×mn), A (n×mn) and B (mn×m²) of all pairs, the rows of one pair after those of the other."""
    xp = namespace_of(x)
    *batch, m, n = v.shape
    eye, pair, y = identity(m, x), identity(n, x), xp.matrix_transpose(v)
    h = 2 * w[..., None, None] * eye - (x + xp.matrix_transpose(x))[..., None, :, :]
    h = pair[:, None, :, None] * h[..., None, :]  # block diagonal: pairs do not interact
    a = 2 * pair[:, :, None] * y[..., None, :, :]
    b = -(eye[:, :, None] * y[..., None, None, :] + y[..., None, :, None] * eye[:, None, :])
    shapes = (n * m, n * m), (n, n * m), (n * m, m * m)
    h, a, b = (xp.reshape(one, (*batch, *shape)) for one, shape in zip((h, a, b), shapes, strict=True))
    return h, a, b


def _ddn(h: Array, a: Array, b: Array, mode: str) -> Array:
    """``H⁻¹Aᵀ (A H⁻¹Aᵀ)⁻¹ A H⁻¹B − H⁻¹B``; with H⁺ the first term is zero."""
    xp = namespace_of(h)
    if mode == "pinv":
        rtol = h.shape[-1] * eps(xp, h.dtype)
        return -(xp.linalg.pinv(h, rtol=rtol) @ b)
    h_a, h_b = solve(h, xp.matrix_transpose(a)), solve(h, b)
    return h_a @ solve(a @ h_a, a @ h_b) - h_b


def _check(v_bar: Array, x: Array, w: Array, v: Array, mode: str = "pinv") -> Namespace:
    xp = conform("(m,m),(n),(m,n),(m,n)", x=x, w=w, v=v, v_bar=v_bar).xp
    if is_complex(x):
        raise TypeError(f"The tutorial's forms take real matrices, got {x.dtype}: use ddnref.eigh_vjp.")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    return xp
