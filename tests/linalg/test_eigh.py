"""Eigendecomposition: the forward, and where its gradient exists, is exact, or must be refused."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import adjoint, projector_gradient, relative, rotation, symmetric, with_spectrum

import ddnref
from ddnref import GaugeError
from ddnref._kernels import numpy as _numpy
from ddnref._rules.samples import eigen_loss, random_spectrum
from ddnref.testing import check_vjp, numerical_jvp

TRIPLE = np.asarray([-1.0, 0.3, 0.3, 0.3, 1.1, 2.0])
INSIDE = TRIPLE == 0.3
DTYPES = ["float32", "float64", "complex64", "complex128"]


def draw(rng, shape, dtype):
    z = rng.standard_normal(shape)
    return (z + 1j * rng.standard_normal(shape) if dtype.startswith("complex") else z).astype(dtype)


# --- forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 4, 4), (2, 3, 4, 4), (0, 3, 3), (0, 0), (2, 0, 0)])
def test_forward_reconstructs_the_symmetrised_input(xp, dtype, shape, rng):
    x = draw(rng, shape, dtype)
    w, v = xp.jit(ddnref.eigh)(xp.asarray(x))
    w, v = xp.numpy(w), xp.numpy(v)
    assert v.dtype == x.dtype
    assert w.dtype == x.real.dtype
    eps = np.finfo(x.dtype).eps
    assert np.all(np.diff(w, axis=-1) >= 0)
    np.testing.assert_allclose((v * w[..., None, :]) @ adjoint(v), (x + adjoint(x)) / 2, atol=50 * eps)
    np.testing.assert_allclose(adjoint(v) @ v, np.broadcast_to(np.eye(shape[-1]), shape), atol=50 * eps)


def test_forward_does_not_overflow_while_symmetrising(xp):
    w, _ = ddnref.eigh(xp.asarray(np.diag([1.5e308, 1.0])))
    assert np.all(np.isfinite(xp.numpy(w)))


def test_a_matrix_on_which_lapack_fails_leaves_the_others_alone(monkeypatch, rng):
    x = symmetric(rng, 4, (5,))
    expected = ddnref.eigh(x)
    lapack = np.linalg.eigh

    def fails_on_item_three(batch):
        if any(np.array_equal(item, x[3]) for item in batch):
            raise np.linalg.LinAlgError
        return lapack(batch)

    monkeypatch.setattr(_numpy, "_driver", lambda name: None)  # an older NumPy
    monkeypatch.setattr(np.linalg, "eigh", fails_on_item_three)
    w, v = ddnref.eigh(x)
    assert np.all(np.isnan(w[3]))
    assert np.all(np.isnan(v[3]))
    for i in (0, 1, 2, 4):
        assert np.array_equal(w[i], expected[0][i])
        assert np.array_equal(v[i], expected[1][i])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_input_is_refused_on_request(bad, xp):
    x = xp.asarray(np.stack([np.eye(2), np.asarray([[1.0, bad], [0.0, 1.0]])]))
    for function in (ddnref.eigh, lambda x, **options: ddnref.eigh_topk(x, 1, **options)):
        with pytest.raises(ddnref.NonFiniteError, match=r"x contains NaN or infinity.*check_finite=False"):
            function(x, check_finite=True)
        function(x[:1, ...], check_finite=True)
        assert np.all(np.isnan(xp.numpy(function(x)[0])[1]))


# --- simple eigenvalues -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "bound"), [(1.0, 1e-9), (1e-2, 1e-9), (1e-3, 1e-7), (1e-4, 1e-7)])
@pytest.mark.parametrize("is_complex", [False, True])
def test_finite_differences_down_to_small_gaps(gap, bound, is_complex, rng):
    w = np.asarray([-1.0, 0.5, 0.5 + gap, 2.6])
    x = random_spectrum(rng, (), w, is_complex)
    loss = eigen_loss(np.asarray, rng, (4,), 4, is_complex)
    report = check_vjp(
        ddnref.eigh, ddnref.eigh_vjp, x, loss=loss, gap=gap, tangent="symmetric", symmetrises=True, rtol=bound
    )
    assert report.passed, report


@pytest.mark.parametrize("m", [256, 512, 1024])
def test_generic_float32_matrices_mask_nothing(m, rng):
    from ddnref.linalg._eigh import has_repeated

    w, v = ddnref.eigh(symmetric(rng, m).astype("float32"))
    assert not has_repeated(w)
    v_bar = rng.standard_normal((m, m)).astype("float32")
    assert float(ddnref.gauge_residual(None, v_bar, w, v)) == 0.0
    ddnref.eigh_vjp(None, v_bar, w, v)


@pytest.mark.parametrize("m", [8, 32, 128, 300])
def test_float32_against_float64(m, rng):
    w, v = ddnref.eigh(random_spectrum(rng, (), np.linspace(-1, 1, m)))
    arrays = [rng.standard_normal(m), rng.standard_normal((m, m)), w, v]
    single = [a.astype("float32") for a in arrays]
    double = [a.astype("float64") for a in single]
    bound = 20 * np.finfo("float32").eps * (m - 1) / 2
    assert relative(ddnref.eigh_vjp(*single), ddnref.eigh_vjp(*double)) <= bound


@pytest.mark.parametrize("scale", [1e-12, 1e-10, 1.0, 1e10])
def test_the_error_does_not_depend_on_the_scale(scale, xp, rng):
    q, w = rotation(rng, 5), np.asarray([-1.0, -0.2, 0.5, 1.3, 2.0])
    c = symmetric(rng, 5)
    inside = np.asarray([False, False, True, False, False])
    lam, v = ddnref.eigh(xp.asarray(scale * with_spectrum(q, w)))
    v_bar = np.where(inside, 2 * c @ xp.numpy(v), 0.0)
    x_bar = xp.numpy(xp.derivative(ddnref.eigh_vjp, None, xp.asarray(v_bar), lam, v))
    assert relative(x_bar * scale, projector_gradient(q, w, inside, c)) <= 1e-12


@given(
    m=st.integers(1, 7),
    batch=st.lists(st.integers(0, 2), max_size=2),
    is_complex=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(m, batch, is_complex, seed):
    rng = np.random.default_rng(seed)
    w = np.cumsum(rng.uniform(0.1, 1.0, (*batch, m)), axis=-1)
    x = random_spectrum(rng, tuple(batch), w, is_complex)
    loss = eigen_loss(np.asarray, rng, (*batch, m), m, is_complex)
    report = check_vjp(
        ddnref.eigh, ddnref.eigh_vjp, x, loss=loss, gap=0.1, tangent="symmetric", symmetrises=True, directions=2
    )
    assert report.passed, report


# --- repeated eigenvalues -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("scale", [1e-12, 1e-10, 1.0, 1e10])
def test_cluster_projectors_are_exact(is_complex, scale, xp, rng):
    """200 rotated triple eigenvalues against perturbation theory with the known rotation."""
    q = rotation(rng, 6, (200,), is_complex)
    c = symmetric(rng, 6, (200,), is_complex)
    w, v = ddnref.eigh(xp.asarray(scale * with_spectrum(q, TRIPLE)))
    v_bar = np.where(INSIDE, 2 * c @ xp.numpy(v), 0)
    x_bar = scale * xp.numpy(xp.jit(lambda *a: ddnref.eigh_vjp(None, *a, throw=False))(xp.asarray(v_bar), w, v))
    worst = max(relative(x_bar[i], projector_gradient(q[i], TRIPLE, INSIDE, c[i])) for i in range(200))
    assert worst <= 1e-12
    if xp.name != "jax":
        ddnref.eigh_vjp(None, xp.asarray(v_bar), w, v)  # and the check does not object


def test_symmetric_functions_of_a_cluster_are_exact(xp, rng):
    """``Σ λ_i³`` inside a cluster has gradient ``3 X²``; nothing there depends on an order."""
    x = with_spectrum(rotation(rng, 6), TRIPLE)
    w, v = ddnref.eigh(xp.asarray(x))
    x_bar = xp.numpy(xp.derivative(ddnref.eigh_vjp, 3 * w * w, None, w, v))
    assert relative(x_bar, 3 * x @ x) <= 1e-13


def test_what_masking_cannot_see_belongs_in_spectral_function(rng):
    """``tr(C X²)`` through eigenpairs passes the gauge check and is still wrong: the documented limit."""
    x, c = with_spectrum(rotation(rng, 6), TRIPLE), symmetric(rng, 6)
    w, v = ddnref.eigh(x)
    weights = np.sum(v * (c @ v), axis=-2)
    w_bar, v_bar = 2 * w * weights, 2 * (c @ v) * w**2
    exact = c @ x + x @ c
    assert float(ddnref.gauge_residual(None, v_bar, w, v)) < 1e-12
    assert relative(ddnref.eigh_vjp(w_bar, v_bar, w, v, gauge_rtol=float("inf")), exact) > 0.01
    y, saved = ddnref.spectral_function_fwd(x, f=np.square)
    x_bar = ddnref.spectral_function_vjp(c, y, *saved, f=np.square, df=lambda w: 2 * w)
    assert relative(x_bar, exact) <= 1e-12


def test_chained_neighbours_are_one_cluster(rng):
    """Three eigenvalues, neighbours within rtol, the outer two not: all are one cluster."""
    q, c = rotation(rng, 4), symmetric(rng, 4)
    w_exact = np.asarray([0.0, 1.0, 1.0, 1.0])
    w, v = np.asarray([0.0, 1.0, 1.0 + 3e-15, 1.0 + 6e-15]), q
    inside = w_exact == 1.0
    v_bar = np.where(inside, 2 * c @ v, 0.0)
    x_bar = ddnref.eigh_vjp(None, v_bar, w, v, rtol=4e-15)
    assert relative(x_bar, projector_gradient(q, w_exact, inside, c)) <= 1e-12


def test_rtol_decides_what_counts_as_equal(rng):
    w, v, v_bar = np.asarray([0.0, 1.0, 1.0 + 1e-9]), np.eye(3), rng.standard_normal((3, 3))
    ddnref.eigh_vjp(None, v_bar, w, v)
    with pytest.raises(GaugeError):
        ddnref.eigh_vjp(None, v_bar, w, v, rtol=1e-8)


def test_without_the_mask_the_answer_is_wrong(monkeypatch, rng):
    """The control of the projector test: rtol=0 masks only exact ties, and rounding splits them.

    That nothing counts as rounding is a part of it, because leaving rounding out is enough for this loss.
    """
    monkeypatch.setattr(ddnref._kernels.eigh_vjp, "ROUNDING", 0)
    q, c = rotation(rng, 6, (50,)), symmetric(rng, 6, (50,))
    w, v = ddnref.eigh(with_spectrum(q, TRIPLE))
    v_bar = np.where(INSIDE, 2 * c @ v, 0)
    x_bar = ddnref.eigh_vjp(None, v_bar, w, v, rtol=0.0, throw=False)
    errors = [relative(x_bar[i], projector_gradient(q[i], TRIPLE, INSIDE, c[i])) for i in range(50)]
    assert np.median(errors) > 1e-6


# --- small gaps -----------------------------------------------------------------------------------------------------

GAPS = 10.0 ** -np.arange(15.0)  # relative to the largest eigenvalue, which is one


def cluster_spectra(rng, m, half):
    """Spectra in [-1, 1] with one cluster of each gap, the others at least 0.15 from it, and which belong to it."""
    size = m // 2 if half else 3
    below = (m - size) // 2
    steps = np.cumsum(rng.uniform(0.5, 1.0, (len(GAPS), size)), axis=-1) * GAPS[:, None]
    cluster = 0.3 * steps / np.maximum(steps[:, -1:], 1.0) if half else 0.3 * np.minimum(steps, [0.2, 0.6, 1.0])
    rest = [np.linspace(*ends, count) for *ends, count in ((-1, -0.3, below), (0.6, 1, m - size - below))]
    others = [np.broadcast_to(part, (len(GAPS), len(part))) for part in rest]
    inside = np.arange(m)
    return np.concatenate([others[0], cluster, others[1]], axis=-1), (inside >= below) & (inside < below + size)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("m", "dtype"), [(6, "float32"), (6, "complex128"), (64, "float64"), (64, "complex64")])
def test_projectors_are_exact_at_every_gap(m, dtype, half, xp, rng):
    """Within 60 eps √m, whether eigenvalues are equal, close, or apart; a random scale of matrix and cotangent."""
    is_complex, unit = dtype.startswith("complex"), np.finfo(dtype).eps
    spectra, inside = cluster_spectra(rng, m, half)
    q = rotation(rng, m, (len(GAPS),), is_complex)
    c = symmetric(rng, m, (len(GAPS),), is_complex).astype(dtype)
    scales = [2.0**e for e in rng.integers(-60, 60, 2)]  # their squares are out of the range of float32
    w, v = ddnref.eigh(xp.asarray((scales[0] * with_spectrum(q, spectra)).astype(dtype)))
    v_bar = np.where(inside, 2 * c @ xp.numpy(v), 0).astype(dtype)
    index = tuple(map(int, np.flatnonzero(inside)))
    v_bar *= np.asarray(scales[1], v_bar.real.dtype)
    every, some = (
        xp.jit(lambda v_bar, w, v, index=index: ddnref.eigh_vjp(None, v_bar, w, v, index=index, throw=False))
        for index in (None, index)
    )
    for x_bar in (every(xp.asarray(v_bar), w, v), some(xp.asarray(v_bar[..., inside]), w, v)):
        x_bar = xp.numpy(x_bar).astype(q.dtype) * (scales[0] / scales[1])
        for i in range(len(GAPS)):
            expected = projector_gradient(q[i], spectra[i], inside, c[i].astype(q.dtype))
            assert relative(x_bar[i], expected) <= 60 * unit * m**0.5, GAPS[i]


@pytest.mark.parametrize(("m", "dtype"), [(256, "float64"), (300, "float32")])
def test_projectors_of_wide_matrices_are_exact_at_small_gaps(m, dtype, rng):
    spectra, inside = cluster_spectra(rng, m, half=True)
    q, c = rotation(rng, m), symmetric(rng, m).astype(dtype)
    for i in (0, 2, 4, 6, 11):
        w, v = ddnref.eigh(with_spectrum(q, spectra[i]).astype(dtype))
        x_bar = ddnref.eigh_vjp(None, np.where(inside, 2 * c @ v, 0), w, v)
        assert relative(x_bar, projector_gradient(q, spectra[i], inside, c)) <= 60 * np.finfo(dtype).eps * m**0.5


@pytest.mark.parametrize("seed", range(8))
def test_projectors_of_random_clusters(seed, xp):
    """Two clusters of any size and spacing, functions of the spaces mixed, other vectors in no loss."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(7, 20))
    sizes = rng.integers(2, 4, 2)
    parts = [np.cumsum(rng.uniform(0, 1, k)) * 10.0 ** rng.uniform(-14, -3) for k in sizes]
    w_exact = np.concatenate([parts[0] - 1, np.linspace(-0.5, 0.2, m - sum(sizes)), parts[1] + 1])
    masks = [np.arange(m) < sizes[0], np.arange(m) >= m - sizes[1]]
    q, cs = rotation(rng, m, (), bool(seed % 2)), [symmetric(rng, m, (), bool(seed % 2)) for _ in masks]
    w, v = ddnref.eigh(xp.asarray(with_spectrum(q, w_exact)))
    v_bar = sum(np.where(mask, 2 * c @ xp.numpy(v), 0) for mask, c in zip(masks, cs, strict=True))
    expected = sum(projector_gradient(q, w_exact, mask, c) for mask, c in zip(masks, cs, strict=True))
    x_bar = xp.derivative(ddnref.eigh_vjp, None, xp.asarray(v_bar), w, v, throw=False)
    assert relative(xp.numpy(x_bar), expected) <= 60 * 2.0**-52 * m**0.5


@pytest.mark.parametrize("m", [5, 300])
def test_a_large_component_along_the_vector_itself_hides_nothing(m, xp, rng):
    """It does not enter the gradient: couplings of 1 to a neighbour stay beside 1e18 on the diagonal."""
    w = np.arange(1.0, m + 1)
    w[1] = w[0] + 1e-6
    v_bar = np.diag(np.full(m, 1e18))
    v_bar[1, 0] = 1.0
    x_bar = xp.numpy(xp.derivative(ddnref.eigh_vjp, None, *map(xp.asarray, (v_bar, w, np.eye(m)))))
    assert x_bar[0, 1] == x_bar[1, 0] == 0.5 / (w[0] - w[1])


def test_couplings_above_rounding_stay_at_small_gaps(xp, rng):
    """Single vectors of a close pair: a gradient of 1 / gap is right, and not taken for rounding."""
    w, q = np.asarray([-1.0, 0.5, 0.5 + 1e-9, 1.0]), rotation(rng, 4)
    v_bar = rng.standard_normal((4, 4))
    k = q.T @ v_bar
    gap = w[None, :] - w[:, None]
    expected = q @ np.divide(k - k.T, 2 * gap, where=gap != 0, out=np.zeros((4, 4))) @ q.T
    assert relative(xp.numpy(xp.derivative(ddnref.eigh_vjp, None, *map(xp.asarray, (v_bar, w, q)))), expected) <= 1e-14


# --- where no gradient exists ---------------------------------------------------------------------------------------


def gauge_dependent(kind, rng, xp):
    """Arguments and options for a loss that has no gradient, one for each way to lose it."""
    is_complex = kind == "phase"
    spectrum = np.arange(6.0) if is_complex else TRIPLE
    w, v = ddnref.eigh(xp.asarray(with_spectrum(rotation(rng, 6, (3,), is_complex), spectrum)))
    v_np = xp.numpy(v)
    if kind == "vectors of a cluster":
        return (None, xp.asarray(rng.standard_normal(v_np.shape)), w, v), {}
    if kind == "order inside a cluster":
        return (xp.asarray(np.broadcast_to(np.arange(6.0), (3, 6)).copy()), None, w, v), {}
    if kind == "phase":
        return (None, xp.asarray(1j * v_np), w, v), {}
    c = symmetric(rng, 6)
    return (None, xp.asarray(2 * (c @ v_np)[..., 1:3]), w, v), {"index": (1, 2)}  # a cut cluster


KINDS = ["vectors of a cluster", "order inside a cluster", "phase", "cut cluster"]


@pytest.mark.parametrize("kind", KINDS)
def test_gauge_dependent_losses_are_refused(kind, xp, rng):
    args, options = gauge_dependent(kind, rng, xp)
    with pytest.raises(GaugeError, match=r"gauge residual .* > gauge_rtol .*spectral_function.*throw=False"):
        ddnref.eigh_vjp(*args, **options)
    assert np.all(xp.numpy(ddnref.gauge_residual(*args, **options)) > 0.01)
    x_bar = xp.numpy(xp.jit(lambda *a: ddnref.eigh_vjp(*a, **options, throw=False))(*args))
    assert np.all(np.isnan(x_bar))
    accepted = xp.numpy(xp.derivative(ddnref.eigh_vjp, *args, **options, gauge_rtol=float("inf")))
    assert np.all(np.isfinite(accepted))


def test_only_the_item_without_a_gradient_is_nan(xp, rng):
    spectra = np.stack([np.arange(6.0), TRIPLE, np.arange(6.0) ** 2])
    w, v = ddnref.eigh(xp.asarray(with_spectrum(rotation(rng, 6, (3,)), spectra)))
    v_bar = xp.asarray(rng.standard_normal((3, 6, 6)))
    x_bar = xp.numpy(xp.derivative(ddnref.eigh_vjp, None, v_bar, w, v, throw=False))
    assert [bool(np.all(np.isnan(g))) for g in x_bar] == [False, True, False]
    alone = xp.numpy(xp.derivative(ddnref.eigh_vjp, None, v_bar[2, ...], w[2, ...], v[2, ...]))
    assert relative(x_bar[2], alone) <= 1e-13


def test_a_nan_item_is_no_gauge_error(rng):
    x = symmetric(rng, 4, (2,))
    x[0, 0, 0] = np.nan
    w, v = ddnref.eigh(x)
    x_bar = ddnref.eigh_vjp(None, rng.standard_normal((2, 4, 4)), w, v)
    assert np.all(np.isnan(x_bar[0]))
    assert np.all(np.isfinite(x_bar[1]))


def test_zero_matrix_is_one_cluster(xp):
    w, v = ddnref.eigh(xp.asarray(np.zeros((3, 3))))
    assert np.array_equal(xp.numpy(xp.derivative(ddnref.eigh_vjp, xp.asarray(np.ones(3)), None, w, v)), np.eye(3))


def test_gauge_residual_is_small_for_invariant_losses(xp, rng):
    q, c = rotation(rng, 6), symmetric(rng, 6)
    w, v = ddnref.eigh(xp.asarray(with_spectrum(q, TRIPLE)))
    v_bar = xp.asarray(np.where(INSIDE, 2 * c @ xp.numpy(v), 0.0))
    assert float(xp.numpy(ddnref.gauge_residual(None, v_bar, w, v))) <= 1e-14
    assert float(xp.numpy(ddnref.gauge_residual(2 * w, None, w, v))) <= 1e-14


# --- a subset of the columns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [(0,), (-1, -2), (4, 1, 3), (1, 2, 3), range(5), (3, 2, 1), ()])
@pytest.mark.parametrize("is_complex", [False, True])
def test_index_equals_zeros_elsewhere(index, is_complex, xp, rng):
    dtype = "complex128" if is_complex else "float64"
    w, v = ddnref.eigh(xp.asarray(symmetric(rng, 5, (2,), is_complex)))
    k = len(tuple(index))
    w_bar, v_bar = rng.standard_normal((2, k)), draw(rng, (2, 5, k), dtype)
    full_w, full_v = np.zeros((2, 5)), np.zeros((2, 5, 5), dtype)
    full_w[:, list(index)], full_v[..., list(index)] = w_bar, v_bar
    options = {"gauge_rtol": float("inf")}  # random complex cotangents depend on the phase
    expected = xp.numpy(xp.derivative(ddnref.eigh_vjp, xp.asarray(full_w), xp.asarray(full_v), w, v, **options))
    for some_w, some_v in [(w_bar, v_bar), (None, v_bar), (w_bar, None)]:
        arrays = [None if a is None else xp.asarray(a) for a in (some_w, some_v)]
        full = [None if a is None else xp.asarray(b) for a, b in ((some_w, full_w), (some_v, full_v))]
        expected = xp.numpy(xp.derivative(ddnref.eigh_vjp, *full, w, v, **options))
        got = xp.numpy(xp.derivative(ddnref.eigh_vjp, *arrays, w, v, index=index, **options))
        assert relative(got, expected) <= 1e-13
        assert np.array_equal(got, adjoint(got))


def test_index_out_of_range_or_twice(rng):
    w, v = ddnref.eigh(symmetric(rng, 4))
    with pytest.raises(ValueError, match=r"index \(4,\) is out of range for a matrix with 4 columns"):
        ddnref.eigh_vjp(np.ones(1), None, w, v, index=(4,))
    with pytest.raises(ValueError, match="names a column twice"):
        ddnref.eigh_vjp(np.ones(2), None, w, v, index=(3, -1))
    with pytest.raises(TypeError):
        ddnref.eigh_vjp(np.ones(1), None, w, v, index=(1.5,))


# --- forward mode ---------------------------------------------------------------------------------------------------


def pairing(a_s, b_s):
    """``Re Σ conj(a) b`` of each item, and the product of both norms."""
    flat = [[np.reshape(a, (a.shape[0], -1)) for a in arrays] for arrays in (a_s, b_s)]
    a, b = (np.concatenate(parts, axis=-1) for parts in flat)
    return np.vecdot(a, b).real, np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("index", [None, (0,), (-1, -2), (4, 1, 3), (1, 2, 3), range(5), ()])
@pytest.mark.parametrize("is_complex", [False, True])
def test_the_jvp_is_the_adjoint_of_the_vjp(index, is_complex, xp, rng):
    dtype, k = "complex128" if is_complex else "float64", 5 if index is None else len(tuple(index))
    w, v = ddnref.eigh(xp.asarray(symmetric(rng, 5, (3,), is_complex)))
    x_dot, w_bar, v_bar = draw(rng, (3, 5, 5), dtype), rng.standard_normal((3, k)), draw(rng, (3, 5, k), dtype)
    x_bar = xp.derivative(
        ddnref.eigh_vjp, xp.asarray(w_bar), xp.asarray(v_bar), w, v, index=index, gauge_rtol=float("inf")
    )
    jvp = xp.jit(lambda *a: ddnref.eigh_jvp(*a, index=index, throw=False))
    dots = [xp.numpy(a) for a in jvp(xp.asarray(x_dot), w, v)]
    assert (dots[0].dtype, dots[1].dtype) == (np.dtype("float64"), np.dtype(dtype))
    left, bound = pairing((w_bar, v_bar), dots)
    right, _ = pairing((xp.numpy(x_bar),), (x_dot,))
    assert np.all(np.abs(left - right) <= 1e-12 * bound)


@pytest.mark.parametrize(("m", "dtype"), [(6, "float32"), (6, "complex128"), (64, "float64"), (64, "complex64")])
def test_the_jvp_is_the_adjoint_of_the_vjp_at_every_gap(m, dtype, xp, rng):
    """Losses of the space have cotangents with couplings that the VJP takes for rounding; single vectors do not."""
    is_complex, unit = dtype.startswith("complex"), np.finfo(dtype).eps
    spectra, inside = cluster_spectra(rng, m, half=False)
    spectra = spectra[np.greater(GAPS, 100 * unit)]
    q, c = (f(rng, m, (len(spectra),), is_complex) for f in (rotation, symmetric))
    w, v = ddnref.eigh(xp.asarray(with_spectrum(q, spectra).astype(dtype)))
    x_dot = draw(rng, v.shape, dtype)
    dots = [xp.numpy(a) for a in xp.derivative(ddnref.eigh_jvp, xp.asarray(x_dot), w, v, throw=False)]
    for v_bar in (np.where(inside, 2 * c @ xp.numpy(v), 0), draw(rng, v.shape, dtype)):
        v_bar = v_bar.astype(dtype)
        x_bar = xp.numpy(xp.derivative(ddnref.eigh_vjp, None, xp.asarray(v_bar), w, v, gauge_rtol=float("inf")))
        left, bound = pairing((v_bar,), (dots[1],))
        right, _ = pairing((x_bar,), (x_dot,))
        assert np.all(np.abs(left - right) <= 60 * unit * bound)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("gap", [1.0, 0.1])
def test_the_jvp_against_finite_differences(gap, is_complex, rng):
    """Eigenvalues and the projector of each single vector, which has no phase, move as differences say."""
    x = random_spectrum(rng, (), np.asarray([-1.0, 0.5, 0.5 + gap, 2.6]), is_complex)
    x_dot = draw(rng, (4, 4), "complex128" if is_complex else "float64")

    def outputs(x):
        w, v = ddnref.eigh(x)
        return w, v[:, None, :] * v.conj()[None, :, :]

    w_dot, p_dot = numerical_jvp(outputs, x, x_dot, gap=gap)
    w, v = ddnref.eigh(x)
    got, v_dot = ddnref.eigh_jvp(x_dot, w, v)
    rank_one = v_dot[:, None, :] * v.conj()[None, :, :]
    assert relative(got, w_dot) <= 1e-9
    assert relative(rank_one + rank_one.swapaxes(0, 1).conj(), p_dot) <= 1e-9
    np.testing.assert_allclose(np.vecdot(v, v_dot, axis=0), 0, atol=1e-14 / gap)


@pytest.mark.parametrize("m", [8, 32, 128, 300])
def test_the_jvp_in_float32_against_float64(m, rng):
    w, v = ddnref.eigh(random_spectrum(rng, (), np.linspace(-1, 1, m)))
    single = [a.astype("float32") for a in (rng.standard_normal((m, m)), w, v)]
    double = [a.astype("float64") for a in single]
    bound = 20 * np.finfo("float32").eps * (m - 1) / 2
    for a, b in zip(ddnref.eigh_jvp(*single), ddnref.eigh_jvp(*double), strict=True):
        assert relative(a, b) <= bound


def invariant_tangents(w, v, w_dot, v_dot, inside):
    """Derivatives of the projector of a cluster and of the sum of its eigenvalues."""
    half = np.where(inside, v_dot, 0) @ adjoint(v)
    return half + adjoint(half), np.sum(w_dot, axis=-1, where=inside)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e10])
def test_masked_tangents_of_cluster_functions_are_exact(is_complex, scale, xp, rng):
    """Triple eigenvalues, any direction, against perturbation theory with the known rotation."""
    q, x_dot = rotation(rng, 6, (50,), is_complex), symmetric(rng, 6, (50,), is_complex)
    w, v = ddnref.eigh(xp.asarray(scale * with_spectrum(q, TRIPLE)))
    w_dot, v_dot = xp.derivative(ddnref.eigh_jvp, xp.asarray(x_dot), w, v, gauge_rtol=float("inf"))
    p_dot, sum_dot = invariant_tangents(*(xp.numpy(a) for a in (w, v, w_dot, v_dot)), INSIDE)
    p = np.where(INSIDE, q, 0) @ adjoint(q)
    for i in range(50):
        assert relative(scale * p_dot[i], projector_gradient(q[i], TRIPLE, INSIDE, x_dot[i])) <= 1e-12
    np.testing.assert_allclose(sum_dot, np.trace(p @ x_dot, axis1=-2, axis2=-1).real, rtol=1e-12)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("m", "dtype"), [(6, "float32"), (6, "complex128"), (64, "float64")])
def test_tangents_of_projectors_of_close_eigenvalues(m, dtype, half, xp, rng):
    """Directions that leave the space of a close group alone amplify nothing, at any gap."""
    is_complex, unit = dtype.startswith("complex"), np.finfo(dtype).eps
    spectra, inside = cluster_spectra(rng, m, half)
    q, x_dot = rotation(rng, m, (len(GAPS),), is_complex), symmetric(rng, m, (len(GAPS),), is_complex)
    x_dot = x_dot - q @ np.where(inside[:, None] & inside, adjoint(q) @ x_dot @ q, 0) @ adjoint(q)
    w, v = ddnref.eigh(xp.asarray(with_spectrum(q, spectra).astype(dtype)))
    w_dot, v_dot = xp.derivative(ddnref.eigh_jvp, xp.asarray(x_dot.astype(dtype)), w, v, throw=False)
    p_dot, _ = invariant_tangents(
        *(xp.numpy(a).astype(q.dtype) for a in (w, v)), *map(xp.numpy, (w_dot, v_dot)), inside
    )
    for i in range(len(GAPS)):
        assert relative(p_dot[i], projector_gradient(q[i], spectra[i], inside, x_dot[i])) <= 60 * unit * m**0.5, GAPS[i]


def splitting(kind, rng):
    """A direction that splits equal eigenvalues, the choice of columns and the spectrum."""
    direction, index = symmetric(rng, 6, (3,)), None
    if kind == "cut cluster":
        index = (1, 2)
    elif kind == "cut cluster, not consecutive":
        index = (5, 2)
    elif kind == "cut where the direction is diagonal":
        # V is the identity, so that nothing in the chosen columns shows it.
        return np.diag(TRIPLE)[None], np.diag([1.0, 2.0, 2.0, 3.0, 4.0, 5.0])[None], (0, 1, 2)
    elif kind == "one of a cluster, where the direction is diagonal":
        return np.diag(TRIPLE)[None], np.diag([1.0, 2.0, 2.0, 3.0, 4.0, 5.0])[None], (1,)
    return with_spectrum(rotation(rng, 6, (3,)), TRIPLE), direction, index


SPLITTING = [
    "whole cluster", "cut cluster", "cut cluster, not consecutive", "cut where the direction is diagonal",
    "one of a cluster, where the direction is diagonal",
]  # fmt: skip


@pytest.mark.parametrize("kind", SPLITTING)
def test_directions_that_split_equal_eigenvalues_are_refused(kind, xp, rng):
    x, x_dot, index = splitting(kind, rng)
    args = (xp.asarray(x_dot), *ddnref.eigh(xp.asarray(x)))
    message = (
        r"splits equal eigenvalues \(item.*those at 0\.3, by .*cluster_derivatives.*spectral_function.*throw=False"
    )
    with pytest.raises(GaugeError, match=message):
        ddnref.eigh_jvp(*args, index=index)
    dots = xp.jit(lambda *a: ddnref.eigh_jvp(*a, index=index, throw=False))(*args)
    assert all(np.all(np.isnan(xp.numpy(a))) for a in dots)
    dots = xp.derivative(ddnref.eigh_jvp, *args, index=index, gauge_rtol=float("inf"))
    assert all(np.all(np.isfinite(xp.numpy(a))) for a in dots)


@pytest.mark.parametrize("index", [None, (1, 2, 3), (1, 2), (2,), (5, 1, 3), (3, 2, 1)])
def test_directions_that_split_nothing_are_accepted(index, xp, rng):
    """``Ẋ = X²`` moves equal eigenvalues together; what a direction does elsewhere does not matter."""
    x = with_spectrum(rotation(rng, 6, (3,)), TRIPLE)
    w, v = ddnref.eigh(xp.asarray(x))
    w_dot, v_dot = ddnref.eigh_jvp(xp.asarray(x @ x), w, v, index=index)
    chosen = list(range(6)) if index is None else list(index)
    np.testing.assert_allclose(xp.numpy(w_dot), np.broadcast_to(TRIPLE**2, (3, 6))[:, chosen], atol=1e-13)
    np.testing.assert_allclose(xp.numpy(v_dot), 0, atol=1e-13)
    apart = with_spectrum(xp.numpy(v)[0], [1e8, 2.0, 2.0, 2.0, 3.0, 4.0])
    ddnref.eigh_jvp(xp.asarray(apart), w[0, ...], v[0, ...], index=index)


CLUSTERS = [
    [0.0, 0.0, 0.0, 1.0, 2.0, 3.0],
    [0.0, 1.0, 1.0, 2.0, 2.0, 3.0],
    [0.0, 1.0, 2.0, 3.0, 3.0, 3.0],
    [1.0, 1.0, 2.0, 2.0, 3.0, 3.0],
    [2.0] * 6,
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
]


def blockwise(q, w, x_dot):
    """Eigenvalues of the block of the direction inside each cluster, with the known rotation."""
    s = adjoint(q) @ ((x_dot + adjoint(x_dot)) / 2) @ q
    return np.concatenate([np.linalg.eigvalsh(s[np.ix_(w == value, w == value)]) for value in np.unique(w)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sided_derivatives_are_those_of_the_blocks(dtype, xp, rng):
    is_complex, unit = dtype.startswith("complex"), np.finfo(dtype).eps
    spectra = np.asarray(CLUSTERS)
    q, x_dot = rotation(rng, 6, (6,), is_complex), draw(rng, (6, 6, 6), dtype)
    w, v = ddnref.eigh(xp.asarray(with_spectrum(q, spectra).astype(dtype)))
    w_dot = xp.numpy(xp.jit(ddnref.cluster_derivatives)(xp.asarray(x_dot), w, v))
    assert w_dot.dtype == x_dot.real.dtype
    expected = np.stack([blockwise(*item) for item in zip(q, spectra, x_dot.astype(q.dtype), strict=True)])
    assert np.max(np.abs(w_dot - expected)) <= 30 * unit * np.max(np.linalg.norm(x_dot, axis=(-2, -1)))
    for values, spectrum in zip(w_dot, spectra, strict=True):
        assert np.all(np.diff(values)[np.diff(spectrum) == 0] >= 0)


def test_one_sided_derivatives_of_many_clusters_are_right_to_rounding(rng):
    """A hundred pairs, and directions that split them by little: the places of the blocks cost no digit."""
    w, v, m = np.repeat(np.arange(100.0), 2), np.eye(200), 200
    for size in (1.0, 1e-6):
        x_dot = np.diag(rng.standard_normal(100).repeat(2)) + size * symmetric(rng, m)
        error = ddnref.cluster_derivatives(x_dot, w, v) - blockwise(v, w, x_dot)
        assert np.max(np.abs(error)) <= 8 * 2.0**-52 * np.max(np.abs(x_dot))


@pytest.mark.parametrize("is_complex", [False, True])
def test_one_sided_derivatives_are_the_limits_of_quotients(is_complex, rng):
    x = with_spectrum(rotation(rng, 6, (), is_complex), TRIPLE)
    x_dot = symmetric(rng, 6, (), is_complex)
    w, v = ddnref.eigh(x)

    def quotient(h):
        return (ddnref.eigh(x + h * x_dot)[0] - w) / h

    # A polynomial in h through four quotients, at zero.
    h = 1e-3
    limit = (64 * quotient(h / 8) - 56 * quotient(h / 4) + 14 * quotient(h / 2) - quotient(h)) / 21
    assert relative(ddnref.cluster_derivatives(x_dot, w, v), limit) <= 1e-9
    below = (64 * quotient(-h / 8) - 56 * quotient(-h / 4) + 14 * quotient(-h / 2) - quotient(-h)) / 21
    assert relative(-ddnref.cluster_derivatives(-x_dot, w, v), below) <= 1e-9


def test_one_sided_derivatives_of_a_bad_item_are_nan(xp, rng):
    w, v = np.asarray([[0.0, 1.0], [np.nan, 1.0], [1.0, 1.0]]), np.stack([np.eye(2)] * 3)
    w_dot = xp.numpy(ddnref.cluster_derivatives(*map(xp.asarray, (symmetric(rng, 2, (3,)), w, v))))
    assert np.isnan(w_dot).tolist() == [[False, False], [True, True], [False, False]]


def test_edges_of_one_sided_derivatives(host_reads, xp_strict, rng):
    for shape in [(0, 3, 3), (0, 0), (2, 0, 0), (1, 1), (2, 1, 1), (2, 3, 4, 4)]:
        w, v = ddnref.eigh(symmetric(rng, shape[-1], shape[:-2]))
        w_dot = ddnref.cluster_derivatives(symmetric(rng, shape[-1], shape[:-2]), w, v)
        assert w_dot.shape == shape[:-1]
    with pytest.raises(ValueError, match=r"x_dot has shape \(3, 3\), expected"):
        ddnref.cluster_derivatives(np.eye(3), np.ones(4), np.eye(4))
    x_dot, w, v = (xp_strict.asarray(a) for a in (symmetric(rng, 4), np.asarray([1.0, 1.0, 2.0, 3.0]), np.eye(4)))
    host_reads.clear()
    ddnref.cluster_derivatives(x_dot, w, v)
    assert host_reads == []


def test_only_the_item_that_is_split_is_nan(xp, rng):
    spectra = np.stack([np.arange(6.0), TRIPLE, np.arange(6.0) ** 2])
    w, v = ddnref.eigh(xp.asarray(with_spectrum(rotation(rng, 6, (3,)), spectra)))
    x_dot = xp.asarray(symmetric(rng, 6, (3,)))
    dots = [xp.numpy(a) for a in ddnref.eigh_jvp(x_dot, w, v, throw=False)]
    for a in dots:
        assert [bool(np.all(np.isnan(item))) for item in a] == [False, True, False]
    alone = ddnref.eigh_jvp(x_dot[2, ...], w[2, ...], v[2, ...])
    assert all(relative(a[2], xp.numpy(b)) <= 1e-13 for a, b in zip(dots, alone, strict=True))


def test_a_nan_direction_is_no_gauge_error(rng):
    w, v = ddnref.eigh(with_spectrum(rotation(rng, 6, (2,)), TRIPLE))
    x_dot = np.stack([np.full((6, 6), np.nan), np.eye(6)])
    w_dot, v_dot = ddnref.eigh_jvp(x_dot, w, v)
    assert np.all(np.isnan(w_dot[0]))
    assert np.all(np.isnan(v_dot[0]))
    assert np.all(np.isfinite(v_dot[1]))


def test_host_reads_of_the_jvp(host_reads, xp_strict, rng):
    w, v = ddnref.eigh(xp_strict.asarray(symmetric(rng, 5, (2,))))
    x_dot = xp_strict.asarray(rng.standard_normal((2, 5, 5)))
    for index in (None, (1, 2), (4, 0)):
        host_reads.clear()
        ddnref.eigh_jvp(x_dot, w, v, index=index, throw=False)
        assert host_reads == []
        ddnref.eigh_jvp(x_dot, w, v, index=index)
        assert host_reads == ["__bool__"]


@pytest.mark.parametrize("shape", [(0, 3, 3), (0, 0), (2, 0, 0), (1, 1), (2, 3, 4, 4)])
def test_shapes_of_tangents(shape, xp, rng):
    w, v = ddnref.eigh(xp.asarray(rng.standard_normal(shape)))
    w_dot, v_dot = xp.derivative(ddnref.eigh_jvp, xp.asarray(rng.standard_normal(shape)), w, v)
    assert (tuple(w_dot.shape), tuple(v_dot.shape)) == (shape[:-1], shape)


def test_bad_input_of_the_jvp():
    w, v = np.arange(4.0), np.eye(4)
    with pytest.raises(TypeError, match="x_dot is None: eigh_jvp needs an array"):
        ddnref.eigh_jvp(None, w, v)
    with pytest.raises(TypeError, match="x_dot has dtype float32, expected float64"):
        ddnref.eigh_jvp(np.eye(4, dtype="float32"), w, v)
    with pytest.raises(TypeError, match=r"x_dot is a builtins\.list"):
        ddnref.eigh_jvp([[1.0]], w, v)
    with pytest.raises(ValueError, match=r"x_dot has shape \(4, 3\), expected \(4, 4\)"):
        ddnref.eigh_jvp(np.ones((4, 3)), w, v)
    with pytest.raises(ValueError, match=r"index \(4,\) is out of range"):
        ddnref.eigh_jvp(np.eye(4), w, v, index=(4,))


# --- cost -------------------------------------------------------------------------------------------------------------


def test_host_reads(host_reads, xp_strict, rng):
    w, v = ddnref.eigh(xp_strict.asarray(symmetric(rng, 5, (2,))))
    w_bar, v_bar = xp_strict.asarray(rng.standard_normal((2, 5))), xp_strict.asarray(rng.standard_normal((2, 5, 5)))
    for options in ({}, {"index": range(5)}):
        host_reads.clear()
        ddnref.eigh_vjp(w_bar, v_bar, w, v, throw=False, **options)
        assert host_reads == []
        ddnref.eigh_vjp(w_bar, v_bar, w, v, **options)
        assert host_reads == ["__bool__"]


@pytest.fixture
def xp_strict():
    from conftest import backend

    return backend("array-api-strict")


def test_forward_reads_nothing(host_reads, xp_strict, rng):
    x = xp_strict.asarray(symmetric(rng, 5, (2,)))
    host_reads.clear()
    ddnref.eigh(x)
    assert host_reads == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_peak_memory_is_three_matrices(dtype, rng):
    m = 1024
    v = np.linalg.qr(rng.standard_normal((m, m)))[0].astype(dtype)
    w = np.sort(rng.standard_normal(m)).astype(dtype)
    v_bar = rng.standard_normal((m, m)).astype(dtype)
    ddnref.eigh_vjp(w, v_bar, w, v)
    tracemalloc.start()
    ddnref.eigh_vjp(w, v_bar, w, v)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 3 * v.nbytes


def test_arguments_are_not_changed(rng):
    w, v = ddnref.eigh(with_spectrum(rotation(rng, 300), np.arange(300.0)))
    arrays = [rng.standard_normal(300), rng.standard_normal((300, 300)), w, v]
    copies = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    ddnref.eigh_vjp(*arrays)
    ddnref.eigh_vjp(arrays[0][:2], arrays[1][:, :2], w, v, index=(0, 5))
    assert all(np.array_equal(a, b) for a, b in zip(arrays, copies, strict=True))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "bool", "float16"])
def test_dtypes_that_are_refused(dtype):
    with pytest.raises(TypeError, match=f"x has dtype {dtype}.*float32, float64, complex64 or complex128"):
        ddnref.eigh(np.eye(2).astype(dtype))


def test_not_an_array():
    with pytest.raises(TypeError, match=r"x is a builtins\.list, not an array"):
        ddnref.eigh([[1.0]])
    with pytest.raises(TypeError, match="w_bar and v_bar are both None"):
        ddnref.eigh_vjp(None, None, np.ones(1), np.ones((1, 1)))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2)])
def test_not_square(shape):
    with pytest.raises(ValueError, match=r"x has shape .*, expected \(\.\.\., m, m\)"):
        ddnref.eigh(np.ones(shape))


@pytest.mark.parametrize(
    ("name", "change"),
    [("w", {"w": np.ones(3)}), ("w_bar", {"w_bar": np.ones(3)}), ("v_bar", {"v_bar": np.ones((4, 3))}),
     ("v_bar", {"v_bar": np.ones((2, 4, 4))})],
)  # fmt: skip
def test_shapes_are_named(name, change):
    good = {"w_bar": np.ones(4), "v_bar": np.ones((4, 4)), "w": np.arange(4.0), "v": np.eye(4)}
    with pytest.raises(ValueError, match=rf"^{name} has shape .*, expected"):
        ddnref.eigh_vjp(*{**good, **change}.values())


def test_precisions_are_not_mixed():
    with pytest.raises(TypeError, match="v_bar has dtype float32, expected float64"):
        ddnref.eigh_vjp(None, np.ones((2, 2), np.float32), np.arange(2.0), np.eye(2))
    with pytest.raises(TypeError, match="w_bar has dtype complex128, expected float64"):
        ddnref.eigh_vjp(np.ones(2) + 0j, None, np.arange(2.0), np.eye(2))


@pytest.mark.framework("torch")
def test_libraries_and_devices_are_not_mixed():
    import torch

    with pytest.raises(TypeError, match=r"one library.*v_bar: torch\.Tensor, w: numpy\.ndarray"):
        ddnref.eigh_vjp(None, torch.ones(2, 2, dtype=torch.float64), np.arange(2.0), np.eye(2))
    with pytest.raises(TypeError, match="one device, but got v_bar on meta, w on cpu"):
        ddnref.eigh_vjp(None, torch.ones(2, 2, device="meta"), torch.arange(2.0), torch.eye(2))


def test_non_contiguous_and_reversed_arrays(rng):
    """Views with any strides give what their copies give."""
    w, v = ddnref.eigh(symmetric(rng, 5, (4,)))
    v_bar = rng.standard_normal((4, 5, 5))
    expected = ddnref.eigh_vjp(None, v_bar, w, v)
    strided = [np.asfortranarray(v_bar), np.repeat(w, 2, -1)[..., ::2], v[::-1][::-1]]
    assert relative(ddnref.eigh_vjp(None, *strided), expected) <= 1e-14
    np.testing.assert_array_equal(ddnref.eigh(symmetric(rng, 3)[::-1, ::-1])[0].shape, (3,))


def test_numerical_jvp_of_eigenvalues(rng):
    x, d = symmetric(rng, 5), symmetric(rng, 5)
    w, v = ddnref.eigh(x)
    w_dot = numerical_jvp(lambda x: ddnref.eigh(x)[0], x, d, gap=float(np.min(np.diff(w))))
    np.testing.assert_allclose(w_dot, np.sum(v * (d @ v), axis=0), atol=1e-8)
