"""Eigenpairs through the Gram matrix of a tall factor: an array, pieces of it, an operator."""

import math
from functools import partial

import numpy as np
import pytest
from problems import adjoint, projector_gradient, relative, rotation, symmetric

import ddnref
from ddnref import GaugeError, NonFiniteError, SingularError, curvature, operators
from ddnref._rules.samples import eigen_loss
from ddnref.operators import LinearOperator
from ddnref.testing import assert_vjp, check_vjp


def draw(rng, *shape, is_complex=False):
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def with_singular(rng, m, sigma, batch=(), is_complex=False):
    """A tall matrix with these singular values."""
    n = len(sigma)
    left = rotation(rng, m, batch, is_complex)[..., :n]
    return (left * np.asarray(sigma)) @ adjoint(rotation(rng, n, batch, is_complex))


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
