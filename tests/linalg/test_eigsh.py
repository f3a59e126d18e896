"""k eigenpairs without the rest: the iteration, its gradient, and everything that can go wrong with them."""

from functools import partial

import numpy as np
import pytest
from problems import adjoint, projector_gradient, relative, rotation, symmetric, with_spectrum

import ddnref
from conftest import backend
from ddnref import ConvergenceError, GaugeError, operators
from ddnref._core.loops import LoopOptions
from ddnref._kernels.dense import hermitian_part
from ddnref._kernels.vectors import norm, normalised
from ddnref._rules.samples import eigen_loss, random_spectrum
from ddnref.linalg import _lanczos
from ddnref.linalg._complement import (
    Method,
    complement_solve,
    complement_solve_jvp,
    complement_solve_vjp,
    in_complement,
)
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import inner, self_adjoint, without
from ddnref.testing import assert_vjp, numerical_jvp

ITERATIVE = {"method": "iterative"}
BASIS = {"method": "iterative", "basis": 16}
INSIDE = {"LA": lambda w: -w, "SA": lambda w: w, "LM": lambda w: -np.abs(w)}


def spread(rng, m, batch=(), is_complex=False):
    """Random eigenvectors, neighbouring eigenvalues 0.05 to 0.15 apart, around zero, no two magnitudes equal."""
    w = np.cumsum(rng.uniform(0.05, 0.15, (*batch, m)), axis=-1)
    return random_spectrum(rng, batch, w - 0.047 * m, is_complex)


def expected_vjp(x, w, v, w_bar, v_bar, which):
    """`eigh_vjp` of the same pairs, found in the whole spectrum, with the phases of v."""
    w_all, v_all = np.linalg.eigh(hermitian_part(x))
    order = np.argsort(INSIDE[which](w_all), axis=-1)[..., : w.shape[-1]]
    place = np.broadcast_to(order[..., None, :], v.shape)
    phase = np.sum(np.conj(np.take_along_axis(v_all, place, -1)) * v, axis=-2, keepdims=True)
    full_w, full_v = np.zeros_like(w_all), np.zeros_like(v_all)
    np.put_along_axis(full_w, order, 0 if w_bar is None else w_bar, -1)
    np.put_along_axis(full_v, place, 0 if v_bar is None else v_bar * np.conj(phase), -1)
    return ddnref.eigh_vjp(full_w, full_v, w_all, v_all, gauge_rtol=np.inf)


def bars(rng, w, v):
    """Cotangents of a loss without a gauge."""
    return eigen_loss(np.asarray, rng, v.shape[:-1], v.shape[-1], np.iscomplexobj(v))[1](w, v)


def forward(xp, x, k, **options):
    """`eigsh_fwd` with ``throw=False``; on JAX compiled, where each operation alone would be compiled once a shape."""
    return compiled(xp, ddnref.eigsh_fwd, k=k, **options)(x)


def reverse(xp, *arrays, **options):
    """`eigsh_vjp`, likewise; a cotangent may be None."""
    return compiled(xp, ddnref.eigsh_vjp, **options)(*arrays)


def compiled(xp, function, **options):
    if xp.name == "jax":
        import jax

        options["while_loop"] = jax.lax.while_loop
    return xp.jit(partial(function, throw=False, **options))


# --- against the whole spectrum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("method", ["iterative", "full"])
def test_pairs_and_gradient_of_a_batch(which, method, xp, rng):
    x = spread(rng, 40, (2,), which == "SA")
    k = 3
    ((w, v), saved), info = forward(xp, xp.asarray(x), k, which=which, method=method, basis=16)
    w_np, v_np = xp.numpy(w), xp.numpy(v)
    w_all = np.linalg.eigvalsh(x)
    expected = np.take_along_axis(w_all, np.argsort(INSIDE[which](w_all), -1)[..., :k], -1)
    np.testing.assert_allclose(w_np, expected, atol=1e-12)
    np.testing.assert_allclose(x @ v_np, v_np * w_np[..., None, :], atol=1e-10)
    np.testing.assert_allclose(adjoint(v_np) @ v_np, np.broadcast_to(np.eye(k), (2, k, k)), atol=1e-12)
    assert np.all(xp.numpy(info.converged))
    assert not np.any(xp.numpy(info.cut))
    assert np.all((xp.numpy(info.n_iter) > 0) == (method == "iterative"))
    assert np.all(xp.numpy(info.residual_norm) <= 2e-12)
    w_bar, v_bar = bars(rng, w_np, v_np)
    some = ((w_bar, v_bar), (w_bar, None), (None, v_bar))
    for some_w, some_v in some if xp.name != "jax" else some[:1]:  # a compilation each
        gradient = expected_vjp(x, w_np, v_np, some_w, some_v, which)
        cotangents = [None if bar is None else xp.asarray(bar) for bar in (some_w, some_v)]
        for rest in ((), saved):
            x_bar, info = reverse(xp, *cotangents, w, v, *rest, xp.asarray(x), which=which, solver="direct")
            x_bar = xp.numpy(x_bar)
            assert relative(x_bar, gradient) <= 1e-10
            assert np.array_equal(x_bar, adjoint(x_bar))
            assert np.all(xp.numpy(info.converged))


@pytest.mark.parametrize(("dtype", "gap"), [("float64", 1e-10), ("complex128", 1e-5), ("float32", 1e-4)])
def test_a_projector_inside_of_the_k_is_exact_at_small_gaps(dtype, gap, xp, rng):
    """Three close pairs of five: what their cotangents have in each other is rounding, and not divided by the gap."""
    m, is_complex = 20, dtype.startswith("complex")
    spectrum = np.concatenate([np.linspace(0.0, 0.3, m - 5), 0.6 + gap * np.asarray([0.0, 1.0, 2.5]), [0.9, 1.0]])
    q, c = rotation(rng, m, (), is_complex), symmetric(rng, m, (), is_complex).astype(dtype)
    x = with_spectrum(q, spectrum).astype(dtype)
    ((w, v), saved), _ = forward(xp, xp.asarray(x), 5, method="full")
    inside = np.asarray([False, False, True, True, True])
    v_bar = np.where(inside, 2 * c @ xp.numpy(v), 0).astype(dtype)
    x_bar, _ = reverse(xp, None, xp.asarray(v_bar), w, v, *saved, xp.asarray(x))
    expected = projector_gradient(q, spectrum, np.abs(spectrum - 0.6) < 0.1, c)
    assert relative(xp.numpy(x_bar), expected) <= 60 * np.finfo(dtype).eps * m**0.5


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_methods_of_the_gradient(solver, which, xp, rng):
    x = spread(rng, 40, (2,), which == "SA")  # compiled above
    ((w, v), saved), _ = forward(xp, xp.asarray(x), 3, which=which, **BASIS)
    w_bar, v_bar = bars(rng, xp.numpy(w), xp.numpy(v))
    expected = expected_vjp(x, xp.numpy(w), xp.numpy(v), w_bar, v_bar, which)
    for rest in ((), saved):
        arrays = (xp.asarray(w_bar), xp.asarray(v_bar), w, v, *rest, xp.asarray(x))
        x_bar, info = reverse(xp, *arrays, which=which, solver=solver)
        x_bar = xp.numpy(x_bar)
        assert relative(x_bar, expected) <= 1e-10
        assert np.array_equal(x_bar, adjoint(x_bar))
        assert np.all(xp.numpy(info.converged))
        assert np.all((xp.numpy(info.n_iter) > 0) == (solver == "cg"))


def test_the_input_is_symmetrised(rng):
    x = spread(rng, 30)
    skew = rng.standard_normal((30, 30))
    x_1 = x + skew - skew.T
    (w, _), _ = ddnref.eigsh(x, 2, **ITERATIVE)
    (w_1, v_1), _ = ddnref.eigsh(x_1, 2, **ITERATIVE)
    np.testing.assert_allclose(w_1, w, atol=1e-12)
    w_bar, v_bar = bars(rng, w, v_1)
    x_bar, _ = ddnref.eigsh_vjp(w_bar, v_bar, w_1, v_1, x_1, solver="cg")
    assert relative(x_bar, expected_vjp(x, w_1, v_1, w_bar, v_bar, "LA")) <= 1e-10


@pytest.mark.parametrize("m", [300, 257])
@pytest.mark.parametrize("is_complex", [False, True])
def test_tiles_of_numpy(m, is_complex, rng):
    """Wider than a tile: `x` taken as it is where Hermitian, symmetrised where not."""
    from ddnref._kernels.numpy import hermitian_sum, symmetrised

    x = rng.standard_normal((2, m, m)) + (1j * rng.standard_normal((2, m, m)) if is_complex else 0)
    np.testing.assert_array_equal(symmetrised(x), hermitian_part(x))
    s = hermitian_part(x)
    assert symmetrised(s) is s
    b, v = x[..., :3], x[..., 3:6]
    product = hermitian_sum(b, v)
    assert relative(product, b @ adjoint(v) + v @ adjoint(b)) <= 1e-14
    assert np.array_equal(product, adjoint(product))


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("method", ["iterative", "full"])
def test_finite_differences(which, is_complex, method, rng):
    m, k = 24, 3
    x = spread(rng, m, (), is_complex)
    forward = partial(ddnref.eigsh_fwd, k=k, which=which, method=method, rtol=1e-14)
    reverse = partial(ddnref.eigsh_vjp, which=which, solver="cg", rtol=1e-13)
    assert_vjp(
        lambda x: forward(x)[0][0],
        lambda *arrays: reverse(*arrays)[0],
        x,
        needs=(0,),
        loss=eigen_loss(np.asarray, rng, (m,), k, is_complex),
        tangent="symmetric",
        symmetrises=True,
        gap=0.05,
        directions=3,
    )


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_single_precision_against_double(dtype, solver, rng):
    m, k = 40, 3
    x = spread(rng, m, (), dtype == "complex64").astype(dtype)
    ((w, v), saved), _ = ddnref.eigsh_fwd(x, k, **BASIS)
    assert w.dtype == np.float32
    assert v.dtype == dtype
    w_bar, v_bar = (a.astype(d) for a, d in zip(bars(rng, w, v), ("float32", dtype), strict=True))
    x_bar, _ = ddnref.eigsh_vjp(w_bar, v_bar, w, v, *saved, x, solver=solver)
    assert x_bar.dtype == dtype
    wide = np.result_type(dtype, np.float64)
    expected = expected_vjp(x.astype(wide), w.astype(float), v.astype(wide), w_bar, v_bar.astype(wide), "LA")
    assert relative(x_bar, expected) <= 20 * np.finfo(np.float32).eps * 2.5 / 0.05


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_error_does_not_depend_on_the_scale(scale, rng):
    x = spread(rng, 40)
    (w, v), _ = ddnref.eigsh(scale * x, 3, **ITERATIVE)
    _, v_bar = bars(rng, w, v)
    x_bar, _ = ddnref.eigsh_vjp(None, v_bar, w, v, scale * x, solver="cg")
    assert relative(scale * x_bar, expected_vjp(x, w / scale, v, None, v_bar, "LA")) <= 1e-8


# --- repeated eigenvalues ---------------------------------------------------------------------------------------

REPEATED = np.concatenate([[3.0, 3.0, 3.0, 2.0, 2.0, 1.5], np.linspace(-1.0, 1.0, 34)])


@pytest.mark.parametrize("is_complex", [False, True])
def test_repeats_are_found_with_their_multiplicity(is_complex, xp, rng):
    x = np.stack([with_spectrum(rotation(rng, 40, (), is_complex), REPEATED), np.diag(REPEATED).astype(complex)])
    x = x if is_complex else x.real
    ((w, v), _), info = forward(xp, xp.asarray(x), 5, **BASIS)
    np.testing.assert_allclose(xp.numpy(w), np.broadcast_to(REPEATED[:5], (2, 5)), atol=1e-12)
    v = xp.numpy(v)
    np.testing.assert_allclose(adjoint(v) @ v, np.broadcast_to(np.eye(5), (2, 5, 5)), atol=1e-12)
    assert np.all(xp.numpy(info.converged))


@pytest.mark.parametrize("which", ["SA", "LM"])
def test_repeats_at_the_other_end(which, rng):
    x = with_spectrum(rotation(rng, 40), -REPEATED)
    (w, _), _ = ddnref.eigsh(x, 5, which=which, **ITERATIVE)
    np.testing.assert_allclose(w, -REPEATED[:5], atol=1e-12)


def test_without_the_check_repeats_are_missed(rng, monkeypatch):
    """The control: a search that stops when k pairs have converged takes 1.5 for the third."""

    def decided(a, plan, state, kept, following, theta, residual):
        wanted = np.max(residual[..., : plan.k], axis=-1) <= plan.rtol * state.scale
        return state._replace(y=np.concatenate([kept, following], axis=-2), done=wanted)

    monkeypatch.setattr(_lanczos, "_decided", decided)
    x = np.diag(np.concatenate([REPEATED[:6] + 2, np.linspace(-1, 1, 194)]))
    w = ddnref.eigsh(x, 3, throw=False, **BASIS)[0][0]
    assert abs(w[1] - 5.0) > 0.5


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_cluster_projectors_are_exact(solver, xp, rng):
    q, c = rotation(rng, 40), symmetric(rng, 40)
    ((w, v), saved), _ = forward(xp, xp.asarray(with_spectrum(q, REPEATED)), 5, **BASIS)
    weight = np.asarray([1.0, 1.0, 1.0, 0.3, 0.3])
    v_bar = xp.asarray(2 * c @ xp.numpy(v) * weight)
    x = xp.asarray(with_spectrum(q, REPEATED))
    expected = projector_gradient(q, REPEATED, REPEATED == 3.0, c)
    expected = expected + 0.3 * projector_gradient(q, REPEATED, REPEATED == 2.0, c)
    for rest in ((), saved):
        x_bar, _ = reverse(xp, None, v_bar, w, v, *rest, x, solver=solver)
        assert relative(xp.numpy(x_bar), expected) <= 1e-9
    random = xp.asarray(rng.standard_normal((40, 5)))
    assert np.all(np.isnan(xp.numpy(reverse(xp, None, random, w, v, x)[0])))
    accepted = xp.numpy(reverse(xp, None, random, w, v, x, gauge_rtol=float("inf"))[0])
    assert np.all(np.isfinite(accepted))
    if xp.name == "jax":
        return  # compiled, nothing can be raised
    with pytest.raises(GaugeError, match=r"gauge_rtol .*projector V_c V_cᴴ.*throw=False"):
        ddnref.eigsh_vjp(None, random, w, v, x)
    with pytest.raises(GaugeError, match="equal eigenvalues individually"):
        ddnref.eigsh_vjp(xp.asarray(np.arange(5.0)), None, w, v, x)


def test_the_phase_of_a_complex_eigenvector_is_a_gauge(rng):
    x = spread(rng, 20, (), True)
    (w, v), _ = ddnref.eigsh(x, 2)
    with pytest.raises(GaugeError, match="phase"):
        ddnref.eigsh_vjp(None, 1j * v, w, v, x)


@pytest.mark.parametrize("seed", [161, 445, 492, *range(30)])
def test_a_cut_cluster_is_heard_of_whatever_the_matrix(seed):
    """The VJP detects it too, without saved arrays, from the size of a solution; the first seeds were once missed."""
    rng = np.random.default_rng(seed)
    x = with_spectrum(rotation(rng, 40, (2,)), np.stack([np.linspace(2.0, -1.0, 40), REPEATED]))
    (w, v), info = ddnref.eigsh(x, 2, method="iterative", basis=16, throw=False)
    assert info.cut.tolist() == [False, True]
    x_bar, _ = ddnref.eigsh_vjp(None, 2 * symmetric(rng, 40) @ v, w, v, x, throw=False)
    assert np.isnan(x_bar).all(axis=(1, 2)).tolist() == [False, True]


@pytest.mark.parametrize("seed", [2, 9, 16, 36, 58, 413, 1151, 1363])
def test_a_next_eigenvalue_that_the_check_has_not_found_is_not_trusted(seed):
    """Four equal ones of which three are asked for, and a basis so small that the check once ended too early."""
    rng = np.random.default_rng(seed)
    spectrum = np.sort(rng.standard_normal(60))[::-1]
    spectrum[:4], spectrum[4:6] = spectrum[0] + 0.2, spectrum[4]
    x = with_spectrum(rotation(rng, 60, ()), spectrum)
    assert ddnref.eigsh(x, 3, method="iterative", basis=12, throw=False)[1].cut


def missed_when_unlucky(rng, monkeypatch, part, which, is_complex):
    """In how many of 60 matrices a cut cluster goes unnoticed, where each check starts with such a part in the copy.

    A part of 1 is the average of random vectors.
    """
    m, k = 40, 2
    spectra = np.sort(rng.standard_normal((60, m)), axis=-1)[:, ::-1] + (6.0 if which == "LM" else 0.0)
    spectra[:, : k + 1], spectra[::2, k + 2] = spectra[:, :1], spectra[::2, k + 1]
    q = rotation(rng, m, (60,), is_complex)
    cluster = q[..., : k + 1].swapaxes(-1, -2)

    def fresh(a, checks, kept):
        z = fresh_by_chance(a, checks, kept)
        inside = inner(z, cluster) @ cluster
        size = norm(inside)
        unlucky = z - inside + normalised(inside, size) * part / m**0.5
        z = without(np.where(size[..., None] > 1e-8, unlucky, z), kept)
        return normalised(z, norm(z))

    fresh_by_chance = _lanczos._fresh
    monkeypatch.setattr(_lanczos, "_fresh", fresh)
    info = ddnref.eigsh(with_spectrum(q, spectra), k, which=which, basis=12, throw=False, **ITERATIVE)[1]
    assert np.all(info.converged)
    return np.sum(~info.cut)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("which", ["LA", "LM"])
def test_a_copy_is_met_however_unlucky_the_start(which, is_complex, rng, monkeypatch):
    hidden = _lanczos.POOREST
    assert missed_when_unlucky(rng, monkeypatch, 1.5 * hidden, which, is_complex) == 0
    monkeypatch.setattr(_lanczos, "POOREST", 100 * hidden)
    assert missed_when_unlucky(rng, monkeypatch, 1.5 * hidden, which, is_complex) > 10


@pytest.mark.parametrize("method", ["iterative", "full"])
def test_a_cut_cluster_is_heard_of(method, xp, rng):
    spectra = np.stack([np.linspace(2.0, -1.0, 40), REPEATED])
    x = xp.asarray(with_spectrum(rotation(rng, 40, (2,)), spectra))
    if xp.name != "jax":
        with pytest.raises(GaugeError, match=r"Eigenvalue 2 equals the next one.*throw=False"):
            ddnref.eigsh(x, 2, method=method, basis=16)
    ((w, v), saved), info = forward(xp, x, 2, method=method, basis=16)
    assert xp.numpy(info.cut).tolist() == [False, True]
    assert np.all(xp.numpy(info.converged))
    np.testing.assert_allclose(xp.numpy(w)[1], [3.0, 3.0], atol=1e-12)
    c = symmetric(rng, 40)
    v_bar, w_bar = xp.asarray(2 * c @ xp.numpy(v)), xp.asarray(np.ones((2, 2)))
    calls = [(w_bar, None, saved), (None, v_bar, saved), (None, v_bar, ())]  # without both, nothing can be seen
    for some_w, some_v, rest in calls:
        if xp.name != "jax":
            with pytest.raises(GaugeError, match="has no gradient"):
                ddnref.eigsh_vjp(some_w, some_v, w, v, *rest, x)
        x_bar, info = reverse(xp, some_w, some_v, w, v, *rest, x)
        assert np.isnan(xp.numpy(x_bar)).all(axis=(1, 2)).tolist() == [False, True]
        assert xp.numpy(info.cut).tolist() == [False, True]


def test_a_loss_that_leaves_the_cut_cluster_out_has_a_gradient(rng):
    x = with_spectrum(rotation(rng, 40), [5.0, *REPEATED[1:]])
    ((w, v), saved), info = ddnref.eigsh_fwd(x, 2, throw=False, **ITERATIVE)
    assert info.cut
    v_bar = np.stack([2 * symmetric(rng, 40) @ v[:, 0], np.zeros(40)], axis=-1)
    x_bar, _ = ddnref.eigsh_vjp(np.asarray([1.0, 0.0]), v_bar, w, v, *saved, x)
    one = ddnref.eigsh_vjp(np.ones(1), v_bar[:, :1], w[:1], v[:, :1], x)[0]
    assert relative(x_bar, one) <= 1e-10


def test_cluster_rtol_decides_what_counts_as_equal(rng):
    x = with_spectrum(rotation(rng, 30), np.concatenate([[2.0, 2.0 - 1e-6], np.linspace(-1, 1, 28)]))
    (w, v), info = ddnref.eigsh(x, 1, **ITERATIVE)
    assert not info.cut
    with pytest.raises(GaugeError):
        ddnref.eigsh(x, 1, cluster_rtol=1e-5, **ITERATIVE)
    (w, v), _ = ddnref.eigsh(x, 2, **ITERATIVE)
    v_bar = rng.standard_normal((30, 2))
    ddnref.eigsh_vjp(None, v_bar, w, v, x)
    with pytest.raises(GaugeError):
        ddnref.eigsh_vjp(None, v_bar, w, v, x, cluster_rtol=1e-5)


# --- operators --------------------------------------------------------------------------------------------------


def laplacian(weights, xp):
    """A path graph on a (3, 8) grid, read row by row, with an edge weight between neighbours and a potential."""

    def apply(params, x):
        e, d = params
        flat = xp.reshape(x, (*x.shape[:-2], 24))
        flow = (flat[..., 1:] - flat[..., :-1]) * e
        zero = xp.zeros_like(flow[..., :1])
        y = xp.concat([zero, flow], axis=-1) - xp.concat([flow, zero], axis=-1) + d * flat
        return xp.reshape(y, (*y.shape[:-1], 3, 8))

    def params_vjp(params, y_bar, x):
        y_bar, x = (xp.reshape(a, (*a.shape[:-2], 24)) for a in (y_bar, x))
        grads = (y_bar[..., 1:] - y_bar[..., :-1]) * (x[..., 1:] - x[..., :-1]), y_bar * x
        return tuple(
            xp.sum(g, axis=tuple(range(g.ndim - p.ndim))) if g.ndim > p.ndim else g
            for g, p in zip(grads, params, strict=True)
        )

    return LinearOperator(weights, apply, apply, params_vjp, (3, 8), (3, 8), self_adjoint=True)


def weights(rng, batch=()):
    return rng.uniform(0.5, 1.5, (*batch, 23)), rng.uniform(0.0, 1.0, (*batch, 24))


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_operator_pairs_and_gradient(batch, which, xp, rng):
    params = tuple(xp.asarray(p) for p in weights(rng, batch))
    operator = laplacian(params, xp.namespace)

    def on_params(function, arrays, **options):
        given = lambda *args, **kw: function(*args[2:], laplacian(args[:2], xp.namespace), **kw)
        return compiled(xp, given, which=which, **options)(*params, *arrays)

    ((w, v), saved), _ = on_params(ddnref.eigsh_fwd, (), k=2, **BASIS)
    assert tuple(v.shape) == (*batch, 3, 8, 2)
    dense = np.stack([xp.numpy(operator(xp.asarray(np.broadcast_to(e, (*batch, 3, 8)).copy()))).reshape(*batch, 24)
                      for e in np.eye(24).reshape(24, 3, 8)], axis=-1)  # fmt: skip
    flat = xp.numpy(v).reshape(*batch, 24, 2)
    np.testing.assert_allclose(dense @ flat, flat * xp.numpy(w)[..., None, :], atol=1e-10)
    w_bar, v_bar = bars(rng, xp.numpy(w), flat)
    x_bar = expected_vjp(dense, xp.numpy(w), flat, w_bar, v_bar, which)
    diagonal = np.diagonal(x_bar, axis1=-2, axis2=-1)
    beside = np.diagonal(x_bar, 1, axis1=-2, axis2=-1)
    expected = diagonal[..., 1:] + diagonal[..., :-1] - 2 * beside, diagonal
    cotangents = xp.asarray(w_bar), xp.asarray(v_bar.reshape(v.shape))
    for rest in ((), saved):
        got, info = on_params(ddnref.eigsh_vjp, (*cotangents, w, v, *rest))
        assert np.all(xp.numpy(info.n_iter) > 0)
        for e_bar, e in zip(got, expected, strict=True):
            assert relative(xp.numpy(e_bar), e) <= 1e-9


def test_operator_gradient_against_finite_differences(rng):
    def forward(e, d):
        return ddnref.eigsh(laplacian((e, d), np), 3, which="SA", rtol=1e-14, **BASIS)[0]

    def reverse(w_bar, v_bar, w, v, e, d):
        return ddnref.eigsh_vjp(w_bar, v_bar, w, v, laplacian((e, d), np), which="SA", rtol=1e-13)[0]

    value, gradient = eigen_loss(np.asarray, rng, (24,), 3, False)
    loss = (
        lambda w, v: value(w, v.reshape(24, 3)),
        lambda w, v: (gradient(w, v.reshape(24, 3))[0], gradient(w, v.reshape(24, 3))[1].reshape(v.shape)),
    )
    e, d = weights(rng)
    w, _ = ddnref.eigh(self_adjoint(laplacian((e, d), np), "").matrix())
    assert_vjp(forward, reverse, e, d, needs=(0, 1), loss=loss, gap=float(np.min(np.diff(w[:5]))), directions=3)


def test_the_constant_vector_of_a_free_laplacian(rng):
    """Its eigenvalue is zero: every tolerance must be relative to ‖A‖, none to the eigenvalue."""
    operator = laplacian((rng.uniform(0.5, 1.5, 23), np.zeros(24)), np)
    (w, v), _ = ddnref.eigsh(operator, 1, which="SA", **BASIS)
    assert abs(w[0]) <= 1e-14
    np.testing.assert_allclose(np.abs(v), 24**-0.5, atol=1e-10)
    (e_bar, d_bar), _ = ddnref.eigsh_vjp(np.ones(1), None, w, v, operator, which="SA")
    np.testing.assert_allclose(e_bar, 0, atol=1e-14)
    np.testing.assert_allclose(d_bar, 1 / 24, atol=1e-12)


def test_small_operators_are_taken_as_matrices(rng):
    operator = laplacian(weights(rng), np)
    full = ddnref.eigsh(operator, 3)
    assert full[1].n_iter == 0
    np.testing.assert_allclose(full[0][0], ddnref.eigsh(operator, 3, **BASIS)[0][0], atol=1e-12)


def test_v0_tells_the_batch_of_an_operator(rng):
    operator = laplacian(weights(rng), np)
    (w, v), _ = ddnref.eigsh(operator, 2, v0=rng.standard_normal((3, 3, 8)), **BASIS)
    assert v.shape == (3, 3, 8, 2)
    np.testing.assert_allclose(w, np.broadcast_to(w[:1], (3, 2)), atol=1e-12)
    v_bar = rng.standard_normal(v.shape)
    both = ddnref.eigsh_vjp(None, v_bar, w, v, operator)[0]
    each = [ddnref.eigsh_vjp(None, v_bar[i], w[i], v[i], operator)[0] for i in range(3)]
    assert relative(both[0], sum(g[0] for g in each)) <= 1e-10  # shared parameters get the sum


# --- options ----------------------------------------------------------------------------------------------------


def test_options_change_the_iteration(rng):
    x = symmetric(rng, 120)

    def count(**options):
        return int(ddnref.eigsh(x, 3, **{**ITERATIVE, **options})[1].n_products)

    usual = count()
    assert count(rtol=1e-3) < usual
    assert count(basis=12) > usual
    assert count(v0=np.linalg.eigh(x)[1][:, -3:] @ np.ones(3)) != usual
    assert count(method="full") == 120
    _, info = ddnref.eigsh(x, 3, maxiter=2, throw=False, **ITERATIVE)
    assert (info.n_iter, bool(info.converged)) == (2, False)


def test_options_change_the_solve(rng):
    x = symmetric(rng, 120)
    ((w, v), saved), _ = ddnref.eigsh_fwd(x, 3, **ITERATIVE)
    v_bar = rng.standard_normal(v.shape)

    def count(*rest, **options):
        return int(np.max(ddnref.eigsh_vjp(None, v_bar, w, v, *rest, x, **{"solver": "cg", **options})[1].n_iter))

    usual = count()
    assert count(*saved) < 0.8 * usual
    assert count(rtol=1e-3) < usual
    assert count(maxiter=5, throw=False) == 5


def test_the_choice_of_method():
    from ddnref.linalg._eigsh import cheaper

    assert cheaper(256, 4, 32, False)
    assert not cheaper(2048, 4, 32, False)
    assert cheaper(2048, 64, 192, False)
    assert not cheaper(256, 4, 32, True)
    assert cheaper(32, 4, 32, True)


@pytest.mark.parametrize("check_every", [1, 3])
def test_host_reads(check_every, host_reads, rng):
    xp = backend("array-api-strict")
    x = xp.asarray(spread(rng, 40, (2,)))
    options = {**BASIS, "check_every": check_every}
    host_reads.clear()
    ((w, v), saved), info = ddnref.eigsh_fwd(x, 3, throw=False, **options)
    steps = int(np.max(xp.numpy(info.n_iter)))
    assert host_reads.count("__bool__") <= -(-steps // check_every) + 1
    assert set(host_reads) <= {"__bool__", "__array__", "__buffer__"}  # the latter are this test's own
    host_reads.clear()
    ddnref.eigsh(x, 3, **options)
    assert len(host_reads) <= -(-steps // check_every) + 2
    v_bar = xp.asarray(rng.standard_normal((2, 40, 3)))
    host_reads.clear()
    info = ddnref.eigsh_vjp(None, v_bar, w, v, *saved, x, solver="cg", check_every=check_every, throw=False)[1]
    reads = len(host_reads)
    assert reads <= -(-int(np.max(xp.numpy(info.n_iter))) // check_every) + 1
    host_reads.clear()
    ddnref.eigsh_vjp(None, v_bar, w, v, *saved, x, solver="cg", check_every=check_every)
    assert len(host_reads) == reads + 1
    host_reads.clear()
    ddnref.eigsh_vjp(None, v_bar, w, v, x, solver="direct", throw=False)
    assert host_reads == []


def test_arguments_are_not_changed(rng):
    x = spread(rng, 40)
    ((w, v), saved), _ = ddnref.eigsh_fwd(x, 3, **ITERATIVE)
    arrays = [*bars(rng, w, v), w, v, *saved, x]
    copies = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    ddnref.eigsh(x, 3, v0=copies[3][:, 0], **ITERATIVE)
    for solver in ("cg", "direct"):
        ddnref.eigsh_vjp(*arrays, solver=solver)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, copies, strict=True))


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["iterative", "full"])
def test_one_bad_item_leaves_the_others_alone(method, xp, rng):
    x = spread(rng, 40, (3,))
    good = forward(xp, xp.asarray(x), 2, method=method, basis=16)[0][0]
    x[1, 3, 5] = np.nan
    if xp.name != "jax":
        with pytest.raises(ConvergenceError, match=r"1 item\(s\).*not finite.*throw=False"):
            ddnref.eigsh(xp.asarray(x), 2, method=method, basis=16)
    ((w, v), saved), info = forward(xp, xp.asarray(x), 2, method=method, basis=16)
    assert xp.numpy(info.converged).tolist() == [True, False, True]
    assert np.all(np.isnan(xp.numpy(v)[1]))
    assert np.all(np.isnan(xp.numpy(w)[1]))
    np.testing.assert_allclose(xp.numpy(w)[::2], xp.numpy(good[0])[::2], atol=1e-12)
    v_bar = xp.asarray(rng.standard_normal((3, 40, 2)))
    for rest in ((), saved):
        x_bar, info = reverse(xp, None, v_bar, w, v, *rest, xp.asarray(x))
        assert np.isnan(xp.numpy(x_bar)).all(axis=(1, 2)).tolist() == [False, True, False]
        assert np.isfinite(xp.numpy(x_bar)).all(axis=(1, 2)).tolist() == [True, False, True]
        assert xp.numpy(info.converged).tolist() == [True, False, True]


@pytest.mark.parametrize("method", ["iterative", "full"])
def test_a_zero_matrix_is_one_cluster(method, xp):
    x = xp.asarray(np.zeros((20, 20)))
    if xp.name != "jax":
        with pytest.raises(GaugeError, match="zero matrix"):
            ddnref.eigsh(x, 2, method=method, basis=12)
    ((w, _), _), info = forward(xp, x, 2, method=method, basis=12)
    assert bool(info.cut)
    assert xp.numpy(w).tolist() == [0.0, 0.0]
    assert bool(info.converged)


def test_not_converged(rng):
    x = symmetric(rng, 200)
    with pytest.raises(ConvergenceError, match=r"rtol 1.0e-12.*after 2 cycles.*Pass a larger basis="):
        ddnref.eigsh(x, 3, maxiter=2, **ITERATIVE)
    (w, v), _ = ddnref.eigsh(x, 3, maxiter=2, throw=False, **ITERATIVE)
    with pytest.raises(ConvergenceError, match="not the extremal eigenpairs"):
        ddnref.eigsh_vjp(np.ones(3), None, w, v, x)
    assert np.all(np.isnan(ddnref.eigsh_vjp(np.ones(3), None, w, v, x, throw=False)[0]))
    (w, v), _ = ddnref.eigsh(x, 3, **ITERATIVE)
    v_bar = rng.standard_normal(v.shape)
    with pytest.raises(ConvergenceError, match=r"after 3 iterations.*larger maxiter="):
        ddnref.eigsh_vjp(None, v_bar, w, v, x, maxiter=3, solver="cg")
    assert np.all(np.isnan(ddnref.eigsh_vjp(None, v_bar, w, v, x, maxiter=3, solver="cg", throw=False)[0]))


def test_pairs_that_are_not_extremal_are_refused(rng):
    x = spread(rng, 40)
    w, v = np.linalg.eigh(x)
    with pytest.raises(ConvergenceError, match="which="):
        ddnref.eigsh_vjp(None, rng.standard_normal((40, 2)), w[20:22], v[:, 20:22], x, solver="cg")


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 <= k <= 3"):
        ddnref.eigsh(np.eye(3), k)


def test_all_of_them(rng):
    x = spread(rng, 6)
    (w, v), info = ddnref.eigsh(x, 6)
    np.testing.assert_allclose(w, np.linalg.eigvalsh(x)[::-1], atol=1e-12)
    assert not info.cut
    w_bar, v_bar = bars(rng, w, v)
    x_bar, _ = ddnref.eigsh_vjp(w_bar, v_bar, w, v, x)
    assert relative(x_bar, expected_vjp(x, w, v, w_bar, v_bar, "LA")) <= 1e-12


def test_static_errors(rng):
    x = spread(rng, 6)
    for options, message in (
        ({"which": "BE"}, "which is 'BE', expected \"LA\""),
        ({"method": "qr"}, "method is 'qr', expected \"auto\""),
        ({"basis": 4}, "basis is 4, expected at least"),
        ({"v0": np.ones(5)}, "v0 has shape"),
        ({"method": "iterative", "maxiter": -1, "basis": 6}, "maxiter is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ddnref.eigsh(x, 2, **options)
    with pytest.raises(ValueError, match="leave no room"):
        ddnref.eigsh(x, 5, method="iterative")
    with pytest.raises(TypeError):
        ddnref.eigsh(x, 1.5)
    operator = laplacian(weights(rng), np)
    with pytest.raises(ValueError, match=r"needs a self-adjoint operator.*self_adjoint=True only if"):
        ddnref.eigsh(operator._replace(self_adjoint=False), 2)
    (w, v), _ = ddnref.eigsh(x, 2)
    for args, options, error, message in (
        ((None, None, w, v, x), {}, TypeError, "both None"),
        ((None, v, w, v), {}, TypeError, "after w, v come x"),
        ((None, v, w, v, operator), {}, ValueError, "A vector has shape"),
        ((None, v[:, :1], w, v, x), {}, ValueError, "v_bar has shape"),
        ((None, v, w, v, x), {"which": "XX"}, ValueError, "which is 'XX'"),
        ((None, v, w, v, x), {"solver": "lu"}, ValueError, "solver is 'lu'"),
        ((None, v.astype("float32"), w, v, x), {}, TypeError, "v_bar has dtype float32"),
    ):
        with pytest.raises(error, match=message):
            ddnref.eigsh_vjp(*args, **options)


@pytest.mark.framework("torch")
def test_torch_does_not_record_the_iteration():
    import torch

    with pytest.raises(TypeError, match="given to eigsh requires grad"):
        ddnref.eigsh(torch.eye(3, dtype=torch.float64, requires_grad=True), 1)


def test_an_operator_that_maps_its_null_space_to_exact_zeros():
    """Nothing but the operator's own rounding would leave the invariant subspace twice by the same direction."""
    d = np.zeros(60)
    d[:5] = [5.0, 4.0, 3.0, 2.0, 1.0]
    apply = lambda params, v: params[0] * v
    operator = operators.LinearOperator((d,), apply, apply, None, (60,), (60,), self_adjoint=True)
    (w, _), info = ddnref.eigsh(operator, 2, v0=np.ones(60), method="iterative", basis=20)
    np.testing.assert_allclose(w, [5.0, 4.0], rtol=1e-14)
    assert int(info.n_iter) <= 5


@pytest.mark.parametrize("value", [-0.5, 0.5, 1 / 3])
@pytest.mark.parametrize("which", ["LA", "LM"])
def test_all_other_eigenvalues_are_equal(value, which, rng):
    """The basis leaves an invariant subspace at nearly each step, and must stay orthogonal."""
    d = np.r_[2.0, 1.5, 1.0, np.full(97, value)]
    operator = operators.diagonal(d)._replace(self_adjoint=True)
    (w, v), info = ddnref.eigsh(operator, 3, which=which, v0=rng.standard_normal(100), method="iterative")
    np.testing.assert_allclose(w, d[:3], rtol=1e-13)
    np.testing.assert_allclose(v.T @ v, np.eye(3), atol=1e-12)
    assert int(info.n_iter) <= 5


def test_identity_and_a_low_rank(rng):
    a = rng.standard_normal((300, 3))
    a = np.eye(300) + a @ a.T / 300
    (w, _), _ = ddnref.eigsh(a, 2, method="iterative")
    np.testing.assert_allclose(w, np.linalg.eigvalsh(a)[:-3:-1], rtol=1e-13)


# --- forward mode -----------------------------------------------------------------------------------------------------


def tangents(xp, *arrays, **options):
    """`eigsh_jvp` with ``throw=False``, as NumPy arrays; on JAX compiled."""
    (w_dot, v_dot), info = compiled(xp, ddnref.eigsh_jvp, **options)(*arrays)
    return xp.numpy(w_dot), xp.numpy(v_dot), info


def expected_jvp(x, x_dot, w, v, which):
    """`eigh_jvp` of the same pairs, found in the whole spectrum, with the phases of v."""
    w_all, v_all = np.linalg.eigh(hermitian_part(x))
    w_dot, v_dot = ddnref.eigh_jvp(x_dot, w_all, v_all, gauge_rtol=np.inf)
    order = np.argsort(INSIDE[which](w_all), axis=-1)[..., : w.shape[-1]]
    place = np.broadcast_to(order[..., None, :], v.shape)
    phase = np.sum(np.conj(np.take_along_axis(v_all, place, -1)) * v, axis=-2, keepdims=True)
    return np.take_along_axis(w_dot, order, -1), np.take_along_axis(v_dot, place, -1) * phase


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("method", ["iterative", "full"])
def test_tangents_of_a_batch(which, method, xp, rng):
    """Check them against the whole spectrum, and as the adjoint of the VJP; the solves leave 1e-10 of each."""
    x, x_dot = spread(rng, 40, (2,), which == "SA"), rng.standard_normal((2, 40, 40)) + 0j
    x_dot = x_dot if which == "SA" else x_dot.real.copy()
    ((w, v), saved), _ = forward(xp, xp.asarray(x), 3, which=which, method=method, basis=16)
    w_np, v_np = xp.numpy(w), xp.numpy(v)
    expected = expected_jvp(x, x_dot, w_np, v_np, which)
    w_bar, v_bar = bars(rng, w_np, v_np)
    x_bar, _ = reverse(
        xp, xp.asarray(w_bar), xp.asarray(v_bar), w, v, *saved, xp.asarray(x), which=which, solver="direct"
    )
    for rest, solver in (((), "direct"), (saved, "cg"), (saved, "direct")):
        arrays = (xp.asarray(x_dot), w, v, *rest, xp.asarray(x))
        w_dot, v_dot, info = tangents(xp, *arrays, which=which, solver=solver)
        assert np.all(xp.numpy(info.converged))
        assert relative(w_dot, expected[0]) <= 1e-12
        assert relative(v_dot, expected[1]) <= 1e-9
        left = np.vdot(w_bar, w_dot) + np.vdot(v_bar, v_dot).real
        bound = np.hypot(*map(np.linalg.norm, (w_bar, v_bar))) * np.hypot(*map(np.linalg.norm, (w_dot, v_dot)))
        assert abs(left - np.vdot(xp.numpy(x_bar), x_dot).real) <= (1e-12 if solver == "direct" else 1e-10) * bound
        if xp.name == "jax":
            break  # a compilation each


def test_tangents_against_differences(rng):
    """Differentiate the eigenvalues and the projectors of the single vectors, which have no sign."""
    x, x_dot = spread(rng, 12), rng.standard_normal((12, 12))

    def outputs(x):
        (w, v), _ = ddnref.eigsh(x, 3, method="full")
        return w, v[:, None, :] * v[None, :, :]

    (w, v), _ = ddnref.eigsh(x, 3, method="full")
    (w_dot, v_dot), _ = ddnref.eigsh_jvp(x_dot, w, v, x)
    w_expected, p_expected = numerical_jvp(outputs, x, x_dot, gap=0.05)
    half = v_dot[:, None, :] * v[None, :, :]
    assert relative(w_dot, w_expected) <= 1e-9
    assert relative(half + half.swapaxes(0, 1), p_expected) <= 1e-9


def scaled_and_shifted(x, scale, d):
    """``c X + diag(d)`` with the parameters c and d, on vectors shaped (2, n), and its forward mode."""
    m = d.shape[-1]

    def flat(y):
        return y.reshape(*y.shape[:-2], m)

    def apply(params, y):
        return (params[0] * (flat(y) @ x.T) + params[1] * flat(y)).reshape(y.shape)

    def params_vjp(params, y_bar, y):
        y_bar, y = (flat(u).reshape(-1, m) for u in (y_bar, y))
        return np.sum(y_bar * (y @ x.T)), np.sum(y_bar * y, axis=0)

    return LinearOperator(
        (scale, d), apply, apply, params_vjp, (2, m // 2), (2, m // 2), self_adjoint=True,
        params_jvp=lambda params, params_dot, y: apply(params_dot, y),
    )  # fmt: skip


def test_tangents_of_an_operator(rng):
    """Check the tangents of parameters, one of which may rest, against those of the matrix."""
    x, d = spread(rng, 30), 0.01 * rng.standard_normal(30)
    a = scaled_and_shifted(x, np.asarray(1.3), d)
    ((w, v), saved), _ = ddnref.eigsh_fwd(a, 3)
    c_dot, d_dot = np.asarray(0.7), rng.standard_normal(30)
    for dots in ((c_dot, d_dot), (c_dot, None), (None, d_dot)):
        x_dot = (0 if dots[0] is None else dots[0]) * x + (0 if dots[1] is None else np.diag(dots[1]))
        expected = expected_jvp(1.3 * x + np.diag(d), x_dot, w, v.reshape(30, 3), "LA")
        (w_dot, v_dot), info = ddnref.eigsh_jvp(dots, w, v, *saved, a)
        assert np.all(info.converged)
        assert v_dot.shape == v.shape
        assert relative(w_dot, expected[0]) <= 1e-12
        assert relative(v_dot.reshape(30, 3), expected[1]) <= 1e-9
    w_bar, v_bar = bars(rng, w, v.reshape(30, 3))
    (c_bar, d_bar), _ = ddnref.eigsh_vjp(w_bar, v_bar.reshape(v.shape), w, v, *saved, a)
    (w_dot, v_dot), _ = ddnref.eigsh_jvp((c_dot, d_dot), w, v, *saved, a)
    left = np.vdot(w_bar, w_dot) + np.vdot(v_bar, v_dot)
    bound = np.hypot(*map(np.linalg.norm, (w_bar, v_bar))) * np.hypot(*map(np.linalg.norm, (w_dot, v_dot)))
    assert abs(left - c_bar * c_dot - d_bar @ d_dot) <= 1e-10 * bound  # the tolerance of the solves
    with pytest.raises(TypeError, match="entries of x_dot are all None: there is no direction"):
        ddnref.eigsh_jvp((None, None), w, v, a)
    with pytest.raises(ValueError, match="x_dot has 1 entries, expected 2"):
        ddnref.eigsh_jvp((c_dot,), w, v, a)
    with pytest.raises(TypeError, match="no params_jvp, which computes"):
        ddnref.eigsh_jvp((c_dot, d_dot), w, v, a._replace(params_jvp=None))


@pytest.mark.parametrize(
    ("dtype", "gap"), [("float64", 0.0), ("float64", 1e-10), ("complex128", 1e-5), ("float32", 1e-4)]
)
def test_tangents_of_a_projector_inside_of_the_k(dtype, gap, xp, rng):
    m, is_complex = 20, dtype.startswith("complex")
    spectrum = np.concatenate([np.linspace(0.0, 0.3, m - 5), 0.6 + gap * np.asarray([0.0, 1.0, 2.5]), [0.9, 1.0]])
    q, x_dot = rotation(rng, m, (), is_complex), symmetric(rng, m, (), is_complex)
    inside = np.abs(spectrum - 0.6) < 0.1
    x_dot = x_dot - q @ np.where(inside[:, None] & inside, adjoint(q) @ x_dot @ q, 0) @ adjoint(q)
    x = with_spectrum(q, spectrum).astype(dtype)
    ((w, v), saved), _ = forward(xp, xp.asarray(x), 5, method="full")
    w_dot, v_dot, _ = tangents(xp, xp.asarray(x_dot.astype(dtype)), w, v, *saved, xp.asarray(x))
    half = v_dot[:, 2:] @ adjoint(xp.numpy(v)[:, 2:])
    bound = 60 * np.finfo(dtype).eps * m**0.5
    assert relative(half + adjoint(half), projector_gradient(q, spectrum, inside, x_dot)) <= bound
    np.testing.assert_allclose(np.sum(w_dot[2:]), 0, atol=bound)


def test_directions_that_eigsh_refuses(xp, rng):
    spectra = np.stack([np.asarray([0.0, 1.0, 2.0, 3.0, 3.0, 4.0]), np.arange(6.0)])
    q = rotation(rng, 6, (2,))
    x = with_spectrum(q, spectra)
    ((w, v), saved), _ = forward(xp, xp.asarray(x), 3, method="full")
    x_dot = symmetric(rng, 6, (2,))
    message = r"splits equal eigenvalues \(item 0 of 2\), those at 3, by"
    for rest in ((), saved):
        with pytest.raises(GaugeError, match=message):
            ddnref.eigsh_jvp(xp.asarray(x_dot), w, v, *rest, xp.asarray(x))
        w_dot, v_dot, _ = tangents(xp, xp.asarray(x_dot), w, v, *rest, xp.asarray(x))
        for dot in (w_dot, v_dot):
            assert np.all(np.isnan(dot[0]))
            assert np.all(np.isfinite(dot[1]))
        accepted, *_ = tangents(xp, xp.asarray(x_dot), w, v, *rest, xp.asarray(x), gauge_rtol=np.inf)
        np.testing.assert_allclose(
            np.sum(accepted[0, 1:]), np.trace(q[0, :, 3:5].T @ x_dot[0] @ q[0, :, 3:5]), rtol=1e-12
        )
    # Along X² they stay equal.
    w_dot, _, _ = tangents(xp, xp.asarray(x @ x), w, v, *saved, xp.asarray(x))
    np.testing.assert_allclose(w_dot, xp.numpy(w) ** 2, rtol=1e-12)
    # The second one cuts the pair, whose two parts the direction couples.
    ((w, v), saved), _ = forward(xp, xp.asarray(x), 2, method="full")
    x_dot = x_dot + xp.numpy(v)[..., 1:] @ adjoint(xp.numpy(saved[1])[..., :1])
    for rest in ((), saved):
        with pytest.raises(GaugeError, match=r"cuts a cluster of equal ones \(item 0 of 2\), of which the next"):
            ddnref.eigsh_jvp(xp.asarray(x_dot), w, v, *rest, xp.asarray(x))
        w_dot, v_dot, info = tangents(xp, xp.asarray(x_dot), w, v, *rest, xp.asarray(x))
        assert list(xp.numpy(info.cut)) == [True, False]
        assert np.all(np.isnan(v_dot[0]))
        assert np.all(np.isfinite(v_dot[1]))
    # A direction of the part that is left out moves the largest of the cluster, and nothing of it is seen.
    other = xp.numpy(saved[1])[..., :1]
    _, _, info = tangents(xp, xp.asarray(other @ adjoint(other)), w, v, *saved, xp.asarray(x))
    assert list(xp.numpy(info.cut)) == [True, False]


def test_scales_of_tangents(rng):
    """The squares of a direction may leave the range of exponents."""
    x, x_dot = spread(rng, 20), symmetric(rng, 20)
    (w, v), _ = ddnref.eigsh(x, 3)
    expected, _ = ddnref.eigsh_jvp(x_dot, w, v, x)
    for power in (-600, 600):
        got, _ = ddnref.eigsh_jvp(np.ldexp(x_dot, power), w, v, x)
        for a, b in zip(got, expected, strict=True):
            assert np.array_equal(a, np.ldexp(b, power))


def test_failures_and_bad_input_of_the_jvp(host_reads, rng):
    x, x_dot = spread(rng, 40), symmetric(rng, 40)
    (w, v), saved = ddnref.eigsh_fwd(x, 2)[0]
    with pytest.raises(ConvergenceError, match="eigsh_jvp did not converge"):
        ddnref.eigsh_jvp(x_dot, w, v, x, solver="cg", maxiter=1)
    options = {"solver": "cg", "maxiter": 1, "throw": False}
    (w_dot, v_dot), info = ddnref.eigsh_jvp(x_dot, w, v, x, **options)
    assert not info.converged
    assert np.all(np.isnan(w_dot))
    assert np.all(np.isnan(v_dot))
    (w_dot, v_dot), info = ddnref.eigsh_jvp(x_dot, w, v, x, on_failure="iterate", **options)
    assert np.all(np.isfinite(v_dot))
    with pytest.raises(ConvergenceError, match="not the extremal eigenpairs"):
        ddnref.eigsh_jvp(x_dot, w + 0.1, v, x)
    with pytest.raises(TypeError, match="x_dot is None: there is no direction"):
        ddnref.eigsh_jvp(None, w, v, x)
    with pytest.raises(TypeError, match="x_dot has dtype float32, expected float64"):
        ddnref.eigsh_jvp(x_dot.astype("float32"), w, v, x)
    with pytest.raises(ValueError, match=r"x_dot has shape \(3, 3\), expected \(40, 40\)"):
        ddnref.eigsh_jvp(np.eye(3), w, v, x)
    with pytest.raises(TypeError, match="after w, v come x, or w_rest, v_rest, x"):
        ddnref.eigsh_jvp(x_dot, w, v, saved[0], x)
    strict = backend("array-api-strict")
    arrays = [strict.asarray(a) for a in (x_dot, w, v, *saved, x)]
    host_reads.clear()
    ddnref.eigsh_jvp(*arrays, throw=False, solver="direct")
    assert host_reads == []
    ddnref.eigsh_jvp(*arrays, solver="direct")
    assert host_reads == ["__bool__"]


# --- the systems that the derivatives solve, and their derivatives ------------------------------------------------


def system(rng, is_complex, rest, batch=(2,)):
    """A matrix, a right-hand side and their directions, and the arguments of `complement_solve` at each time."""
    x = spread(rng, 9, batch, is_complex)
    random = lambda *shape: (
        rng.standard_normal((*batch, *shape)) + (1j * rng.standard_normal(shape) if is_complex else 0)
    )
    b, b_dot, x_dot = random(9, 3), random(9, 3), hermitian_part(random(9, 9))

    def arguments(t):
        (w, v), (w_rest, v_rest) = ddnref.eigsh_fwd(x + t * x_dot, 3, method="full")[0]
        v = v * (np.abs(v[..., :1, :]) / v[..., :1, :])  # one phase, and sign, at all times
        right = b + t * b_dot
        right = right - v @ (adjoint(v) @ right)
        return right, w, v, np.abs(w).max(-1), w_rest[..., :rest], v_rest[..., :rest], x + t * x_dot

    return arguments, x_dot


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("rest", "solver"), [(6, "cg"), (2, "cg"), (0, "cg"), (0, "direct")])
def test_tangents_of_the_systems_against_differences(rest, solver, is_complex, rng):
    method = Method("LA", solver, 1e-14, LoopOptions(1e-14, 1000))
    arguments, x_dot = system(rng, is_complex, rest)
    step = 5e-5

    def along(f):
        one, two = (f(n * step) - f(-n * step) for n in (1, 2))
        return (8 * one - two) / (12 * step)

    dots = [along(lambda t, i=i: arguments(t)[i]) for i in range(3)]
    u = complement_solve(*arguments(0), method=method)[0]
    u_dot, info = complement_solve_jvp(*dots, None, None, None, x_dot, u, *arguments(0)[1:], method=method)
    assert np.all(info.converged)
    assert relative(u_dot, along(lambda t: complement_solve(*arguments(t), method=method)[0])) <= 1e-9


@pytest.mark.parametrize("is_complex", [False, True])
def test_systems_have_a_vjp_that_is_the_adjoint_of_their_jvp(is_complex, xp, rng):
    method = Method("LA", "direct", 1e-14, LoopOptions(1e-14, 1000))
    arguments, x_dot = system(rng, is_complex, 2)
    given = [xp.asarray(np.ascontiguousarray(x)) for x in arguments(0)]
    dots = [rng.standard_normal(x.shape).astype(x.dtype) for x in arguments(0)[:3]]
    u = complement_solve(*given, method=method)[0]
    u_bar = rng.standard_normal(u.shape).astype(dots[0].dtype)
    u_dot, _ = complement_solve_jvp(
        *map(xp.asarray, dots), None, None, None, xp.asarray(x_dot), u, *given[1:], method=method
    )
    bars, _ = complement_solve_vjp(xp.asarray(u_bar), u, *given[1:], method=method)
    assert bars[3:6] == (None, None, None)
    left = np.vdot(u_bar, xp.numpy(u_dot)).real
    right = sum(
        np.vdot(xp.numpy(bars[i]), dot).real for i, dot in ((0, dots[0]), (1, dots[1]), (2, dots[2]), (6, x_dot))
    )
    assert abs(left - right) <= 1e-12 * np.linalg.norm(u_bar) * np.linalg.norm(xp.numpy(u_dot))


@pytest.mark.framework("torch")
def test_right_hand_sides_that_are_rounding_keep_their_derivative(torch):
    v = torch.eye(4, dtype=torch.float64)[:2]
    b = (v * 2.0 + 1e-18).requires_grad_()
    part = in_complement(b, v)
    assert torch.all(part == 0)
    part.sum().backward()
    assert b.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2
