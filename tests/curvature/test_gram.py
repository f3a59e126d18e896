"""Eigenpairs through the Gram matrix of a tall factor: an array, pieces of it, an operator."""

import math
from functools import partial

import numpy as np
import pytest
from problems import adjoint, projector_gradient, relative, rotation, symmetric, with_singular

import ddnref
from ddnref import GaugeError, NonFiniteError, SingularError, curvature, operators
from ddnref._rules.samples import eigen_loss
from ddnref.operators import LinearOperator
from ddnref.testing import assert_vjp, check_vjp, numerical_jvp


def draw(rng, *shape, is_complex=False):
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def as_operator(v, shape=None):
    """The matrix as an operator, its vectors of the range shaped like `shape`."""

    def apply(params, x):
        y = (params[0] @ x[..., None])[..., 0]
        return y.reshape(*y.shape[:-1], *rows)

    def back(y):
        return y.reshape(*y.shape[: y.ndim - len(rows)], v.shape[-2])

    def params_vjp(params, y_bar, x):
        outer = back(y_bar)[..., :, None] * np.conj(x)[..., None, :]
        return (outer.reshape(-1, *params[0].shape).sum(axis=0),)

    rows = shape or (v.shape[-2],)
    transposed = lambda params, y: (adjoint(params[0]) @ back(y)[..., None])[..., 0]
    return LinearOperator((v,), apply, transposed, params_vjp, (v.shape[-1],), rows)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(9, 4, 2), (9, 4, 4), (4, 7, 3), (5, 5, 5), (6, 1, 1)])
def test_eigenpairs_are_those_of_a_singular_value_decomposition(m, n, k, is_complex, rng):
    v = draw(rng, 2, m, n, is_complex=is_complex)
    left, sigma, _ = np.linalg.svd(v, full_matrices=False)
    w, e = curvature.gram_eigh(v, k)
    np.testing.assert_allclose(w, sigma[..., :k] ** 2, rtol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(np.conj(e) * left[..., :k], axis=-2)), 1, rtol=1e-10)
    np.testing.assert_allclose(adjoint(e) @ e, np.broadcast_to(np.eye(k), (2, k, k)), atol=1e-10)
    np.testing.assert_allclose(curvature.gram_eigvalsh(v), sigma**2, rtol=1e-10)


def test_on_every_library(xp, rng):
    """Pieces, their VJPs, eigenvalues alone; each library compiles once. `tests/rules/test_rules.py` has the rest."""
    v = with_singular(rng, 9, [2.0, 1.6, 1.2, 0.8])
    pieces = tuple(map(xp.asarray, (v[:2], v[2:])))
    loss = eigen_loss(np.asarray, rng, (9,), 3, False)

    def everything(*pieces):
        (w, e), saved = curvature.gram_eigh_fwd(list(pieces), 3, throw=False)
        w_all, saved_all = curvature.gram_eigvalsh_fwd(list(pieces))
        bars = curvature.gram_eigvalsh_vjp(w_all, w_all, *saved_all, list(pieces), throw=False)
        return w, e, saved, curvature.gram_eigvalsh(list(pieces)), bars

    w, e, saved, values, bars = xp.jit(everything)(*pieces)
    w_bar, e_bar = loss[1](xp.numpy(w), np.concatenate(xp.tuple(e)))
    e_bar = [xp.asarray(e_bar[:2]), xp.asarray(e_bar[2:])]
    vjp = xp.jit(partial(curvature.gram_eigh_vjp, throw=False))
    got = np.concatenate(xp.tuple(vjp(xp.asarray(w_bar), e_bar, w, e, *saved, list(pieces))))
    (w_here, e_here), saved_here = curvature.gram_eigh_fwd(v, 3)
    expected = curvature.gram_eigh_vjp(*loss[1](w_here, e_here), w_here, e_here, *saved_here, v)
    assert relative(got, expected) <= 1e-12
    np.testing.assert_allclose(xp.numpy(w), [4.0, 2.56, 1.44], rtol=1e-12)
    np.testing.assert_allclose(xp.numpy(values), [4.0, 2.56, 1.44, 0.64], rtol=1e-12)
    left, sigma, right = np.linalg.svd(v, full_matrices=False)
    assert relative(np.concatenate(xp.tuple(bars)), (left * (2 * sigma**3)) @ right) <= 1e-12


def test_default_k_is_the_rank_bound(rng):
    w, e = curvature.gram_eigh(draw(rng, 3, 7, 4))
    assert w.shape == (3, 4)
    assert e.shape == (3, 7, 4)
    assert curvature.gram_eigvalsh(draw(rng, 3, 4, 7)).shape == (3, 4)


def test_float32_in_float32_out(rng):
    v = draw(rng, 9, 4).astype(np.float32)
    w, e = curvature.gram_eigh(v, 3)
    assert w.dtype == e.dtype == curvature.gram_eigvalsh(v).dtype == np.float32
    expected = curvature.gram_eigh(v.astype(np.float64), 3)
    np.testing.assert_allclose(w, expected[0], rtol=1e-5)
    np.testing.assert_allclose(np.abs(e), np.abs(expected[1]), atol=1e-5)


@pytest.mark.parametrize("small", [1e-3, 1e-5, 1e-7])
def test_float32_factors_are_multiplied_in_double(small, xp, rng):
    """In float32 products a singular value of 1e-5 is 900 % off, and the nuclear norm is NaN."""
    v = with_singular(rng, 30, [1.0, 0.3, small]).astype(np.float32)
    s = np.linalg.svd(v.astype(np.float64), compute_uv=False)
    bound = 1e-7 + 4 * np.finfo(float).eps / s**2
    w, saved = xp.lift(curvature.gram_eigvalsh_fwd)(v)
    assert w.dtype == saved[0].dtype == saved[1].dtype == np.float32
    for got in (
        w,
        xp.lift(curvature.gram_eigvalsh)(v),
        xp.lift(lambda *pieces: curvature.gram_eigvalsh(list(pieces)))(v[:11], v[11:]),
        xp.lift(partial(curvature.gram_eigh_fwd, k=3, throw=False))(v)[0][0],
    ):
        assert np.all(np.abs(np.sqrt(got) / s - 1) <= bound)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_no_eigenvalue_is_negative(dtype):
    """Duplicated, dead and zero columns, at any scale, wide and tall; in pieces, as an operator, with and without e."""
    rng = np.random.default_rng(5)
    for trial in range(30):
        m, n = rng.integers(2, 9, 2)
        v = draw(rng, m, n, is_complex=np.issubdtype(dtype, np.complexfloating))
        v[:, rng.integers(n)] = v[:, rng.integers(n)] * (trial % 2)
        v = (10.0 ** rng.uniform(-6, 6) * v).astype(dtype)
        for got in (
            curvature.gram_eigvalsh(v),
            curvature.gram_eigvalsh([v, v[:1]]),
            curvature.gram_eigvalsh(as_operator(v)),
            *curvature.gram_eigvalsh_fwd(v)[1][:1],
            curvature.gram_eigh(v, throw=False)[0],
        ):
            assert np.all(got >= 0)
            assert np.isfinite(np.sum(np.log(got + 1e-3 * got[..., :1].max() + 1e-30)))


def test_rows_are_converted_a_few_at_a_time(monkeypatch, rng):
    v = draw(rng, 2, 9, 4).astype(np.float32)
    whole = curvature.gram_eigvalsh(v)
    monkeypatch.setattr("ddnref._kernels.dense.GRAM_PIECE", 20)
    np.testing.assert_allclose(curvature.gram_eigvalsh(v), whole, rtol=1e-6)
    np.testing.assert_allclose(whole, curvature.gram_eigvalsh(v.astype(np.float64)), rtol=1e-6)


# --- pieces and operators ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
def test_pieces_are_the_whole(is_complex, rng):
    v = draw(rng, 2, 9, 4, is_complex=is_complex)
    parts = [slice(0, 2), slice(2, 3), slice(3, 9)]
    pieces = [np.asarray(v[:, part]) for part in parts]
    (w, e), saved = curvature.gram_eigh_fwd(pieces, 3)
    (w_whole, e_whole), saved_whole = curvature.gram_eigh_fwd(np.asarray(v), 3)
    e_whole = e_whole
    phase = np.sum(np.conj(e_whole) * np.concatenate(e, axis=-2), axis=-2, keepdims=True)
    np.testing.assert_allclose(w, w_whole, rtol=1e-13)
    np.testing.assert_allclose(np.concatenate(e, axis=-2), e_whole * phase, atol=1e-12)
    _, gradient = eigen_loss(np.asarray, rng, (2, 9), 3, is_complex)
    w_bar, e_bar = gradient(w, np.concatenate(e, axis=-2))
    got = curvature.gram_eigh_vjp(
        np.asarray(w_bar), [np.asarray(e_bar[:, part]) for part in parts], w, e, *saved, pieces
    )  # fmt: skip
    assert isinstance(got, tuple)
    w_bar, e_bar = gradient(w_whole, e_whole)
    expected = curvature.gram_eigh_vjp(
        np.asarray(w_bar), np.asarray(e_bar), w_whole, np.asarray(e_whole), *saved_whole, np.asarray(v)
    )
    assert relative(np.concatenate(got, axis=-2), expected) <= 1e-11
    w, saved = curvature.gram_eigvalsh_fwd(pieces)
    w_bar = np.asarray(rng.standard_normal((2, 4)))
    got = curvature.gram_eigvalsh_vjp(w_bar, w, *saved, pieces)
    expected = curvature.gram_eigvalsh_vjp(w_bar, w, *saved, np.asarray(v))
    assert relative(np.concatenate(got, axis=-2), expected) <= 1e-13
    np.testing.assert_allclose(curvature.gram_eigvalsh(pieces), w, rtol=1e-12)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_an_operator_is_its_matrix(batch, is_complex, rng):
    v = draw(rng, *batch, 6, 3, is_complex=is_complex)
    operator = as_operator(v, (2, 3))
    (w, e), saved = curvature.gram_eigh_fwd(operator, 2)
    (w_whole, e_whole), saved_whole = curvature.gram_eigh_fwd(v, 2)
    assert e.shape == (*batch, 2, 3, 2)
    np.testing.assert_allclose(w, w_whole, rtol=1e-13)
    _, gradient = eigen_loss(np.asarray, rng, (*batch, 6), 2, is_complex)
    w_bar, e_bar = gradient(w, e.reshape(*batch, 6, 2))
    (got,) = curvature.gram_eigh_vjp(w_bar, e_bar.reshape(e.shape), w, e, *saved, operator)
    expected = curvature.gram_eigh_vjp(*gradient(w_whole, e_whole), w_whole, e_whole, *saved_whole, v)
    assert relative(got, expected) <= 1e-11
    w, saved = curvature.gram_eigvalsh_fwd(operator)
    w_bar = rng.standard_normal(w.shape)
    (got,) = curvature.gram_eigvalsh_vjp(w_bar, w, *saved, operator)
    assert relative(got, curvature.gram_eigvalsh_vjp(w_bar, w, *saved, v)) <= 1e-12
    np.testing.assert_allclose(curvature.gram_eigvalsh(operator), w, rtol=1e-12)


def test_an_operator_is_multiplied_in_blocks(rng, monkeypatch):
    v = draw(rng, 9, 5)
    whole = curvature.gram_eigvalsh(as_operator(v))
    monkeypatch.setattr("ddnref.operators._blocks.COLUMNS", 2)
    np.testing.assert_allclose(curvature.gram_eigvalsh(as_operator(v)), whole, rtol=1e-13)


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(8, 4, 4), (4, 8, 2), (5, 3, 1)])
def test_gradient_at_any_shape(m, n, k, is_complex, rng):
    v = with_singular(rng, max(m, n), 1 + 0.4 * np.arange(min(m, n)), (2,), is_complex)
    v = v if m > n else adjoint(v)
    loss = eigen_loss(np.asarray, rng, (2, m), k, is_complex)
    forward = partial(curvature.gram_eigh_fwd, k=k)
    assert assert_vjp(forward, curvature.gram_eigh_vjp, v, saves=True, needs=(0,), loss=loss, gap=0.3).error <= 1e-9
    assert (
        assert_vjp(curvature.gram_eigvalsh_fwd, curvature.gram_eigvalsh_vjp, v, saves=True, needs=(0,), gap=0.3).error
        <= 1e-9
    )


def test_gradient_of_a_rank_deficient_factor(rng):
    """Zero eigenvalues beside those asked for: no gap to them is small, and none is divided by."""
    v = with_singular(rng, 8, [2.0, 1.5, 0.0, 0.0, 0.0])
    loss = eigen_loss(np.asarray, rng, (8,), 2, False)
    forward = partial(curvature.gram_eigh_fwd, k=2)
    assert assert_vjp(forward, curvature.gram_eigh_vjp, v, saves=True, needs=(0,), loss=loss, gap=0.5).error <= 1e-9
    w, saved = curvature.gram_eigvalsh_fwd(v)
    got = curvature.gram_eigvalsh_vjp(np.asarray([1.0, 2.0, 3.0, 4.0, 5.0]), w, *saved, v)
    left, sigma, right = np.linalg.svd(v, full_matrices=False)
    expected = (left[:, :2] * (2 * sigma[:2] * [1.0, 2.0])) @ right[:2]
    assert relative(got, expected) <= 1e-12


@pytest.mark.parametrize("is_complex", [False, True])
def test_a_repeated_eigenvalue_against_perturbation_theory(is_complex, xp, rng):
    """``tr(C P)`` of the projector of a triple eigenvalue, as a function of V: ``V̄ = 2 Ḡ V``."""
    q = rotation(rng, 7, (), is_complex)
    w = np.asarray([0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 0.5])
    v = (q * np.sqrt(w)) @ adjoint(rotation(rng, 7, (), is_complex))
    c = symmetric(rng, 7, (), is_complex)
    (values, e), saved = xp.jit(partial(curvature.gram_eigh_fwd, k=3, throw=False))(xp.asarray(v))
    e_bar = xp.asarray(2 * c @ xp.numpy(e))
    vjp = xp.jit(partial(curvature.gram_eigh_vjp, throw=False))
    got = vjp(None, e_bar, values, e, *saved, xp.asarray(v))
    assert relative(xp.numpy(got), 2 * projector_gradient(q, w, w == 2.0, c) @ v) <= 1e-12


@pytest.mark.parametrize(
    ("dtype", "gap", "pieces"), [("float64", 1e-10, False), ("complex128", 1e-5, True), ("float32", 1e-4, False)]
)
def test_a_projector_is_exact_at_small_gaps(dtype, gap, pieces, xp, rng):
    """The projector of three close eigenvalues of V Vᴴ, among them and with smaller ones that are close as well."""
    d, n, is_complex = 14, 8, dtype.startswith("complex")
    spectrum = np.concatenate([[1.0, 0.9], 0.6 + gap * np.asarray([2.5, 1.0, 0.0]), 0.01 + gap * np.arange(3.0)[::-1]])
    left = rotation(rng, d, (), is_complex)
    v = ((left[:, :n] * spectrum**0.5) @ adjoint(rotation(rng, n, (), is_complex))).astype(dtype)
    c = symmetric(rng, d, (), is_complex).astype(dtype)
    # The loss by the eigenvectors that come out, its cotangent, and the VJP, all on the library.
    split = (lambda x: (x[:5, :], x[5:, :])) if pieces else (lambda x: x)

    def gradient(v, c):
        ns = xp.namespace
        (w, e), saved = curvature.gram_eigh_fwd(split(v), 5, throw=False)
        e_bar = 2 * (c @ (ns.concat(e) if pieces else e))
        e_bar = ns.concat([ns.zeros_like(e_bar[:, :2]), e_bar[:, 2:]], axis=1)
        v_bar = curvature.gram_eigh_vjp(None, split(e_bar), w, e, *saved, split(v), throw=False)
        return ns.concat(v_bar) if pieces else v_bar

    every = np.concatenate([spectrum, np.zeros(d - n)])
    expected = 2 * projector_gradient(left, every, np.abs(every - 0.6) < 0.1, c) @ v
    v_bar = xp.numpy(xp.jit(gradient)(xp.asarray(v), xp.asarray(c)))
    assert relative(v_bar, expected) <= 60 * np.finfo(dtype).eps * d**0.5


def test_a_symmetric_function_of_repeated_eigenvalues(rng):
    v = with_singular(rng, 7, [2.0, 2.0, 2.0, 1.0])
    (w, e), saved = curvature.gram_eigh_fwd(v, 3)
    got = curvature.gram_eigh_vjp(np.ones(3), None, w, e, *saved, v)
    left, _, right = np.linalg.svd(v, full_matrices=False)
    assert relative(got, 4 * left[:, :3] @ right[:3]) <= 1e-12


@pytest.mark.parametrize(
    "bars",
    [
        pytest.param(lambda e, rng: (np.asarray([1.0, 0.0, 0.0]), None), id="one of equal eigenvalues"),
        pytest.param(lambda e, rng: (None, rng.standard_normal(e.shape)), id="single eigenvectors"),
    ],
)
def test_a_gauge_dependent_loss_is_refused(bars, rng):
    v = with_singular(rng, 7, [2.0, 2.0, 2.0, 1.0])
    (w, e), saved = curvature.gram_eigh_fwd(v, 3)
    with pytest.raises(GaugeError, match="depends on a choice"):
        curvature.gram_eigh_vjp(*bars(e, rng), w, e, *saved, v)
    assert np.all(np.isnan(curvature.gram_eigh_vjp(*bars(e, rng), w, e, *saved, v, throw=False)))
    assert np.all(np.isfinite(curvature.gram_eigh_vjp(*bars(e, rng), w, e, *saved, v, gauge_rtol=math.inf)))
    with pytest.raises(GaugeError):
        curvature.gram_eigvalsh_vjp(np.asarray([1.0, 0.0, 0.0, 0.0]), *flat(curvature.gram_eigvalsh_fwd(v)), v)


def flat(result):
    w, saved = result
    return w, *saved


def test_a_cut_cluster_and_a_phase_are_refused(rng):
    v = with_singular(rng, 7, [2.0, 2.0, 2.0, 1.0])
    (w, e), saved = curvature.gram_eigh_fwd(v, 2)
    with pytest.raises(GaugeError):
        curvature.gram_eigh_vjp(None, 2 * symmetric(rng, 7) @ e, w, e, *saved, v)
    v = with_singular(rng, 7, [2.0, 1.0], (), True)
    (w, e), saved = curvature.gram_eigh_fwd(v, 2)
    with pytest.raises(GaugeError):
        curvature.gram_eigh_vjp(None, draw(rng, 7, 2, is_complex=True), w, e, *saved, v)


def test_rtol_decides_what_is_equal(rng):
    v = with_singular(rng, 7, [2.0, 2.0 + 1e-7, 1.0])
    (w, e), saved = curvature.gram_eigh_fwd(v, 1)
    e_bar = 2 * symmetric(rng, 7) @ e
    assert np.all(np.isfinite(curvature.gram_eigh_vjp(None, e_bar, w, e, *saved, v)))
    with pytest.raises(GaugeError):
        curvature.gram_eigh_vjp(None, e_bar, w, e, *saved, v, rtol=1e-6)
    w, saved = curvature.gram_eigvalsh_fwd(v)
    w_bar = np.asarray([1.0, 0.0, 0.0])
    assert np.all(np.isfinite(curvature.gram_eigvalsh_vjp(w_bar, w, *saved, v)))
    with pytest.raises(GaugeError):
        curvature.gram_eigvalsh_vjp(w_bar, w, *saved, v, rtol=1e-6)


def mutants():
    """The VJP as one might get it wrong; each must be rejected."""
    right = curvature.gram_eigh_vjp

    def without_null_space(w_bar, e_bar, w, e, *rest):
        """Treats ē outside the range of V as an eigendecomposition of a square matrix of full rank would."""
        return right(w_bar, e @ (adjoint(e) @ e_bar), w, e, *rest)

    yield "without the null space", without_null_space
    yield (
        "through the Gram matrix alone",
        lambda w_bar, e_bar, w, e, w_all, u, v: (
            v
            @ (
                2
                * ddnref.eigh_vjp(
                    w_bar, (adjoint(v) @ e_bar / np.sqrt(w)), w_all, u, index=range(len(w_all) - 1, -1, -1)
                )
            )
        ),
    )
    yield "sign", lambda *a: -right(*a)
    yield "one part in a million", lambda *a: (1 + 1e-6) * right(*a)
    yield "half the eigenvalues", lambda w_bar, *a: right(w_bar / 2, *a)
    yield "no eigenvectors", lambda w_bar, e_bar, *a: right(w_bar, None, *a)


@pytest.mark.parametrize(("name", "mutant"), list(mutants()))
def test_a_wrong_vjp_is_rejected(name, mutant, rng):
    v = with_singular(rng, 9, [2.0, 1.6, 1.2, 0.8])
    loss = eigen_loss(np.asarray, rng, (9,), 4, False)
    forward = partial(curvature.gram_eigh_fwd, k=4)
    assert not check_vjp(forward, mutant, v, saves=True, needs=(0,), loss=loss, gap=0.4, directions=2).passed


# --- bad input ---------------------------------------------------------------------------------------------------


def test_the_eigenvector_of_a_zero_eigenvalue_is_refused(rng):
    v = np.stack([with_singular(rng, 6, [2.0, 1.0, 0.5]), with_singular(rng, 6, [2.0, 1.0, 0.0])])
    with pytest.raises(SingularError, match="k = 3 eigenvectors were asked for, but only 2"):
        curvature.gram_eigh(v, 3)
    w, e = curvature.gram_eigh(v, 3, throw=False)
    assert np.all(np.isfinite(w))
    assert np.all(np.isfinite(e[0]))
    assert np.all(np.isfinite(e[1, :, :2]))
    assert np.all(np.isnan(e[1, :, 2]))
    curvature.gram_eigh(v, 2)
    (w, e), saved = curvature.gram_eigh_fwd(v, 3, throw=False)
    got = curvature.gram_eigh_vjp(w, e, w, e, *saved, v, throw=False)
    assert np.all(np.isfinite(got[0]))
    assert np.all(np.isnan(got[1]))


def test_zero_rtol(rng):
    v = with_singular(rng, 6, [1.0, 1e-4])
    curvature.gram_eigh(v, 2)
    with pytest.raises(SingularError):
        curvature.gram_eigh(v, 2, zero_rtol=1e-6)


def test_check_finite(rng):
    v = draw(rng, 6, 3)
    v[2, 1] = np.nan
    for function in (
        curvature.gram_eigvalsh,
        curvature.gram_eigvalsh_fwd,
        curvature.gram_eigh,
        curvature.gram_eigh_fwd,
    ):
        with pytest.raises(NonFiniteError, match="Gram matrix"):
            function(v, check_finite=True)
    assert np.all(np.isnan(curvature.gram_eigvalsh(v)))


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_beyond_the_rank_bound(k, rng):
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 <= k <= 3"):
        curvature.gram_eigh(draw(rng, 5, 3), k)
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 <= k <= 3"):
        curvature.gram_eigh(draw(rng, 3, 5), k)


def test_static_errors(rng):
    v = draw(rng, 5, 3)
    with pytest.raises(ValueError, match="empty list"):
        curvature.gram_eigvalsh([])
    with pytest.raises(ValueError, match="vectors are columns"):
        curvature.gram_eigvalsh(v[:, 0])
    with pytest.raises(ValueError, match=r"factor\[1\] has shape"):
        curvature.gram_eigvalsh([v, v[:, :2]])
    with pytest.raises(TypeError, match=r"factor\[1\] has dtype"):
        curvature.gram_eigvalsh([v, v.astype(np.float32)])
    with pytest.raises(TypeError, match="float32, float64"):
        curvature.gram_eigvalsh(np.ones((3, 2), dtype=np.int64))
    with pytest.raises(TypeError):
        curvature.gram_eigh(v, 1.5)
    (w, e), saved = curvature.gram_eigh_fwd([v, v], 2)
    with pytest.raises(TypeError, match="both None"):
        curvature.gram_eigh_vjp(None, None, w, e, *saved, [v, v])
    with pytest.raises(ValueError, match="e_bar has 1 pieces"):
        curvature.gram_eigh_vjp(w, e[:1], w, e, *saved, [v, v])
    with pytest.raises(ValueError, match="e has shape"):
        curvature.gram_eigh_vjp(w, None, w, (v[:2, :2], v[:, :2]), *saved, [v, v])
    with pytest.raises(ValueError, match="w_bar has shape"):
        curvature.gram_eigh_vjp(w[:1], None, w, e, *saved, [v, v])


@pytest.mark.framework("torch")
def test_torch_must_not_record_the_forward(rng):
    import torch

    v = torch.from_numpy(draw(rng, 5, 3)).requires_grad_()
    for factor in (v, [v, v]):
        with pytest.raises(TypeError, match="requires grad"):
            curvature.gram_eigvalsh(factor)
        with pytest.raises(TypeError, match="requires grad"):
            curvature.gram_eigh(factor, 1)


def test_the_closed_form_reads_nothing_on_the_host(host_reads, rng):
    import array_api_strict as strict

    v = strict.asarray(draw(rng, 2, 6, 3))
    (w, e), saved = curvature.gram_eigh_fwd(v, 2, throw=False)
    curvature.gram_eigh_vjp(w, e, w, e, *saved, v, throw=False)
    w, saved = curvature.gram_eigvalsh_fwd(v)
    curvature.gram_eigvalsh_vjp(w, w, *saved, v, throw=False)
    assert host_reads == []
    curvature.gram_eigh(v, 2)
    assert host_reads == ["__bool__"]


def test_an_operator_of_the_library_on_every_library(xp, rng):
    v = with_singular(rng, 9, [2.0, 1.6, 1.2])

    def both(v):
        operator = operators.dense(v)
        (w, e), saved = curvature.gram_eigh_fwd(operator, 2, throw=False)
        return w, curvature.gram_eigh_vjp(2 * w, None, w, e, *saved, operator, throw=False)[0]

    w, bar = xp.jit(both)(xp.asarray(v))
    np.testing.assert_allclose(xp.numpy(w), [4.0, 2.56], rtol=1e-12)
    left, sigma, right = np.linalg.svd(v, full_matrices=False)
    assert relative(xp.numpy(bar), (left[:, :2] * (4 * sigma[:2] ** 3)) @ right[:2]) <= 1e-12


# --- forward mode ---------------------------------------------------------------------------------------------------


def projectors(e, e_dot):
    """Derivatives of the projectors of the single vectors, which have no phase."""
    half = np.moveaxis(e_dot, -1, 0)[..., :, None] * np.conj(np.moveaxis(e, -1, 0))[..., None, :]
    return half + adjoint(half)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(9, 4, 2), (9, 4, 4), (4, 7, 3), (5, 5, 5), (6, 1, 1)])
def test_jvp(m, n, k, is_complex, xp, rng):
    """Check it against differences and as the adjoint of the VJP, phases included."""
    sigma = np.concatenate([2 + 0.3 * np.arange(min(m, n)), np.zeros(max(n - m, 0))])
    v = (
        rotation(rng, m, (2,), is_complex)[..., :n]
        * sigma[:m]
        @ adjoint(rotation(rng, n, (2,), is_complex)[..., : min(m, n)])
    )
    v_dot = draw(rng, 2, m, n, is_complex=is_complex)
    (w, e), saved = xp.jit(partial(curvature.gram_eigh_fwd, k=k, throw=False))(xp.asarray(v))
    jvp = xp.jit(partial(curvature.gram_eigh_jvp, throw=False))
    w_dot, e_dot = (xp.numpy(a) for a in jvp(xp.asarray(v_dot), w, e, *saved, xp.asarray(v)))
    w_bar, e_bar = rng.standard_normal((2, k)), draw(rng, 2, m, k, is_complex=is_complex)
    arrays = (xp.asarray(w_bar), xp.asarray(e_bar), w, e, *saved, xp.asarray(v))
    vjp = xp.jit(partial(curvature.gram_eigh_vjp, gauge_rtol=np.inf, throw=False))
    v_bar = xp.numpy(vjp(*arrays))
    left = np.vdot(w_bar, w_dot) + np.vdot(e_bar, e_dot).real
    bound = np.hypot(*map(np.linalg.norm, (w_bar, e_bar))) * np.hypot(*map(np.linalg.norm, (w_dot, e_dot)))
    assert abs(left - np.vdot(v_bar, v_dot).real) <= 1e-12 * bound

    def outputs(v):
        w, e = curvature.gram_eigh(v, k)
        return w, projectors(e, e) / 2

    expected = numerical_jvp(outputs, v, v_dot, gap=0.3)
    assert relative(w_dot, expected[0]) <= 1e-9
    assert relative(projectors(xp.numpy(e), e_dot), expected[1]) <= 1e-9


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), [(9, 4), (4, 7), (5, 5), (6, 1)])
def test_jvp_of_eigenvalues(m, n, is_complex, xp, rng):
    v, v_dot = (draw(rng, 2, m, n, is_complex=is_complex) for _ in range(2))
    w, saved = curvature.gram_eigvalsh_fwd(xp.asarray(v))
    jvp = xp.jit(partial(curvature.gram_eigvalsh_jvp, throw=False))
    w_dot = xp.numpy(jvp(xp.asarray(v_dot), w, *saved, xp.asarray(v)))
    w_bar = rng.standard_normal(w_dot.shape)
    v_bar = xp.numpy(xp.derivative(curvature.gram_eigvalsh_vjp, xp.asarray(w_bar), w, *saved, xp.asarray(v)))
    assert abs(np.vdot(w_bar, w_dot) - np.vdot(v_bar, v_dot).real) <= 1e-12 * np.linalg.norm(w_bar) * np.linalg.norm(
        w_dot
    )
    assert relative(w_dot, numerical_jvp(curvature.gram_eigvalsh, v, v_dot)) <= 1e-9


def with_motion(v, shape=None):
    """`as_operator` with its forward modes."""
    a = as_operator(v, shape)
    return a._replace(
        params_jvp=lambda params, params_dot, x: a.apply(params_dot, x),
        adjoint_jvp=lambda params, params_dot, y: a.adjoint(params_dot, y),
    )


def test_jvp_of_pieces_and_operators(rng):
    v, v_dot = draw(rng, 6, 3), draw(rng, 6, 3)
    v_dot[:2] = 0
    (w, e), saved = curvature.gram_eigh_fwd(v, 2)
    expected = curvature.gram_eigh_jvp(v_dot, w, e, *saved, v)
    pieces, dots = [v[:2], v[2:]], (None, v_dot[2:])
    w_dot, e_dot = curvature.gram_eigh_jvp(dots, w, [e[:2], e[2:]], *saved, pieces)
    assert isinstance(e_dot, tuple)
    assert relative(w_dot, expected[0]) <= 1e-13
    assert relative(np.concatenate(e_dot), expected[1]) <= 1e-13
    w_dot, e_dot = curvature.gram_eigh_jvp((v_dot,), w, e.reshape(2, 3, 2), *saved, with_motion(v, (2, 3)))
    assert relative(w_dot, expected[0]) <= 1e-13
    assert relative(e_dot.reshape(6, 2), expected[1]) <= 1e-13
    w, saved = curvature.gram_eigvalsh_fwd(v)
    expected = curvature.gram_eigvalsh_jvp(v_dot, w, *saved, v)
    assert relative(curvature.gram_eigvalsh_jvp(dots, w, *saved, pieces), expected) <= 1e-13
    assert relative(curvature.gram_eigvalsh_jvp((v_dot,), w, *saved, with_motion(v)), expected) <= 1e-13


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-8, 1e-4])
@pytest.mark.parametrize(("is_complex", "n"), [(False, 5), (True, 5), (False, 9)])
def test_jvp_of_the_projector_of_equal_and_close_eigenvalues(gap, is_complex, n, xp, rng):
    """Zero eigenvalues beside them do not matter, nor do directions outside of the range."""
    m, spectrum = 12, np.zeros(n)
    spectrum[:4] = [4.0, 1 + 2.5 * gap, 1 + gap, 1.0]
    left, right = rotation(rng, m, (), is_complex), rotation(rng, n, (), is_complex)
    v = left[:, :n] * np.sqrt(spectrum) @ adjoint(right)
    inside = np.asarray([False, True, True, True] + [False] * (m - 4))
    v_dot = draw(rng, m, n, is_complex=is_complex)
    # A direction in which the close ones move together.
    x_dot = v_dot @ adjoint(v)
    block = adjoint(left) @ (x_dot + adjoint(x_dot)) @ left
    full = np.zeros(m)
    full[:n] = spectrum
    block = np.where(inside[:, None] & inside, block / np.where(inside, 2 * full, 1), 0)
    v_dot = v_dot - left @ block @ adjoint(left) @ v
    x_dot = v_dot @ adjoint(v) + v @ adjoint(v_dot)
    (w, e), saved = curvature.gram_eigh_fwd(xp.asarray(v), 4)
    jvp = xp.jit(partial(curvature.gram_eigh_jvp, throw=False))
    w_dot, e_dot = (xp.numpy(a) for a in jvp(xp.asarray(v_dot), w, e, *saved, xp.asarray(v)))
    half = e_dot[:, 1:] @ adjoint(xp.numpy(e)[:, 1:])
    assert relative(half + adjoint(half), projector_gradient(left, full, inside, x_dot)) <= 1e-12
    np.testing.assert_allclose(w_dot[1:].sum(), 0, atol=1e-11)
    values, saved = curvature.gram_eigvalsh_fwd(xp.asarray(v))
    values_dot = xp.numpy(
        xp.derivative(curvature.gram_eigvalsh_jvp, xp.asarray(v_dot), values, *saved, xp.asarray(v), throw=False)
    )
    np.testing.assert_allclose(values_dot[:4], w_dot, atol=1e-12)
    np.testing.assert_allclose(values_dot[4:], 0, atol=1e-6)  # rounding of the square root of zero


def test_splitting_directions_of_a_factor_are_refused(xp, rng):
    v = xp.asarray(with_singular(rng, 9, [2.0, 1.0, 1.0, 1.0, 0.0, 0.0], (2,)))
    v_dot = xp.asarray(draw(rng, 2, 9, 6))
    w, saved = curvature.gram_eigvalsh_fwd(v)
    with pytest.raises(GaugeError, match=r"splits equal eigenvalues \(items 0, 1 of 2\), those at 1, by.*Gram matrix"):
        curvature.gram_eigvalsh_jvp(v_dot, w, *saved, v)
    assert np.all(np.isnan(xp.numpy(xp.derivative(curvature.gram_eigvalsh_jvp, v_dot, w, *saved, v, throw=False))))
    assert np.all(
        np.isfinite(xp.numpy(xp.derivative(curvature.gram_eigvalsh_jvp, v_dot, w, *saved, v, gauge_rtol=np.inf)))
    )
    for k in (2, 4):  # the second one cuts them
        (w, e), saved = curvature.gram_eigh_fwd(v, k)
        with pytest.raises(GaugeError, match=r"splits equal eigenvalues .*those at 1, by"):
            curvature.gram_eigh_jvp(v_dot, w, e, *saved, v)
        for dot in curvature.gram_eigh_jvp(v_dot, w, e, *saved, v, throw=False):
            assert np.all(np.isnan(xp.numpy(dot)))
        for dot in curvature.gram_eigh_jvp(v_dot, w, e, *saved, v, gauge_rtol=np.inf):
            assert np.all(np.isfinite(xp.numpy(dot)))
    # One vector of the cluster is left alone and chosen, another one moves.
    v = xp.asarray(np.eye(5)[:, :3] * [2.0, 1.0, 1.0])
    for moving in (1, 2):
        v_dot = np.zeros((5, 3))
        v_dot[moving, moving] = 1.0
        (w, e), saved = curvature.gram_eigh_fwd(v, 2)
        with pytest.raises(GaugeError, match="those at 1, by"):
            curvature.gram_eigh_jvp(xp.asarray(v_dot), w, e, *saved, v)
    # Only rounding moves in a direction that is orthogonal to the factor.
    left = np.linalg.qr(rng.standard_normal((9, 9)))[0]
    v, v_dot = xp.asarray(left[:, :4] @ rotation(rng, 4)), xp.asarray(left[:, 4:8] @ rng.standard_normal((4, 4)))
    w, saved = curvature.gram_eigvalsh_fwd(v)
    np.testing.assert_allclose(xp.numpy(xp.derivative(curvature.gram_eigvalsh_jvp, v_dot, w, *saved, v)), 0, atol=1e-13)


@pytest.mark.parametrize("is_complex", [False, True])
def test_jvp_is_the_adjoint_of_the_vjp_at_equal_eigenvalues(is_complex, rng):
    """Both mask the same entries, also for losses and directions that have no derivative."""
    v = with_singular(rng, 9, [2.0, 1.0, 1.0, 0.0], (2,), is_complex)
    v_dot, e_bar = (draw(rng, 2, 9, n, is_complex=is_complex) for n in (4, 3))
    w_bar = rng.standard_normal((2, 3))
    (w, e), saved = curvature.gram_eigh_fwd(v, 3)
    w_dot, e_dot = curvature.gram_eigh_jvp(v_dot, w, e, *saved, v, gauge_rtol=np.inf)
    v_bar = curvature.gram_eigh_vjp(w_bar, e_bar, w, e, *saved, v, gauge_rtol=np.inf)
    left = np.vdot(w_bar, w_dot) + np.vdot(e_bar, e_dot).real
    bound = np.hypot(*map(np.linalg.norm, (w_bar, e_bar))) * np.hypot(*map(np.linalg.norm, (w_dot, e_dot)))
    assert abs(left - np.vdot(v_bar, v_dot).real) <= 1e-12 * bound


def test_eigenvalues_that_count_as_zero_are_no_cluster_to_split(rng):
    v, v_dot = with_singular(rng, 9, [1.0, 3e-8, 2e-8]), draw(rng, 9, 3)
    w, saved = curvature.gram_eigvalsh_fwd(v)
    assert np.all(np.isfinite(curvature.gram_eigvalsh_jvp(v_dot, w, *saved, v)))


def test_refused_eigenvectors_have_no_tangent_and_leave_the_others_alone(xp, rng):
    v, v_dot = with_singular(rng, 7, [3.0, 2.0, 0.0, 0.0]), draw(rng, 7, 4)
    (w, e), saved = curvature.gram_eigh_fwd(xp.asarray(v), 3, throw=False)
    w_dot, e_dot = (
        xp.numpy(a) for a in xp.derivative(curvature.gram_eigh_jvp, xp.asarray(v_dot), w, e, *saved, xp.asarray(v))
    )
    assert np.all(np.isnan(e_dot[:, 2]))
    got = projectors(xp.numpy(e)[:, :2], e_dot[:, :2])
    (w, e), saved = curvature.gram_eigh_fwd(v, 2)
    expected = curvature.gram_eigh_jvp(v_dot, w, e, *saved, v)
    np.testing.assert_allclose(w_dot[:2], expected[0], rtol=1e-12)
    np.testing.assert_allclose(got, projectors(e, expected[1]), atol=1e-12)


def test_jvp_in_float32(rng):
    v, v_dot = with_singular(rng, 9, [2.0, 1.6, 1.2, 0.8]).astype("float32"), draw(rng, 9, 4).astype("float32")
    (w, e), saved = curvature.gram_eigh_fwd(v, 3)
    single = (v_dot, w, e, *saved, v)
    double = [a.astype("float64") for a in single]
    for a, b in zip(curvature.gram_eigh_jvp(*single), curvature.gram_eigh_jvp(*double), strict=True):
        assert a.dtype == np.float32
        assert relative(a, b) <= 40 * 2.0**-23
    w_dot = curvature.gram_eigvalsh_jvp(v_dot, *_flat(curvature.gram_eigvalsh_fwd(v)), v)
    assert relative(w_dot[:3], curvature.gram_eigh_jvp(*double)[0]) <= 40 * 2.0**-23


def _flat(result):
    w, saved = result
    return w, *saved


def test_bad_input_of_the_jvps(host_reads, rng):
    v = draw(rng, 2, 6, 3)
    (w, e), saved = curvature.gram_eigh_fwd(v, 2)
    for bad, error, match in [
        (None, TypeError, "factor_dot is None: there is no direction"),
        (v.astype("float32"), TypeError, "factor_dot has dtype float32, expected float64"),
        (v[:, :5], ValueError, r"factor_dot has shape \(2, 5, 3\), expected \(2, 6, 3\)"),
    ]:
        with pytest.raises(error, match=match):
            curvature.gram_eigh_jvp(bad, w, e, *saved, v)
        with pytest.raises(error, match=match):
            curvature.gram_eigvalsh_jvp(bad, *_flat(curvature.gram_eigvalsh_fwd(v)), v)
    with pytest.raises(TypeError, match="are all None: there is no direction"):
        curvature.gram_eigh_jvp((None, None), w, [e[:, :2], e[:, 2:]], *saved, [v[:, :2], v[:, 2:]])
    with pytest.raises(ValueError, match="factor_dot has 1 entries, expected 2"):
        curvature.gram_eigh_jvp((v,), w, [e[:, :2], e[:, 2:]], *saved, [v[:, :2], v[:, 2:]])
    with pytest.raises(TypeError, match="no params_jvp and adjoint_jvp"):
        curvature.gram_eigvalsh_jvp((v[0],), *_flat(curvature.gram_eigvalsh_fwd(v[0])), as_operator(v[0]))
    for shape in [(2, 4, 0), (0, 4, 2)]:
        empty = np.ones(shape)
        w_dot = curvature.gram_eigvalsh_jvp(empty, *_flat(curvature.gram_eigvalsh_fwd(empty)), empty)
        assert w_dot.shape == (shape[0], shape[2])
    import array_api_strict as strict

    arrays = [strict.asarray(a) for a in (v, w, e, *saved, v)]
    values = [strict.asarray(a) for a in (v, *_flat(curvature.gram_eigvalsh_fwd(v)), v)]
    for function, given in ((curvature.gram_eigh_jvp, arrays), (curvature.gram_eigvalsh_jvp, values)):
        host_reads.clear()
        function(*given, throw=False)
        assert host_reads == []
        function(*given)
        assert host_reads == ["__bool__"]
