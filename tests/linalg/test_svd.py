"""Singular value decomposition: forward, and where its derivative exists, is exact, or must be refused."""

from functools import partial

import numpy as np
import pytest
from problems import adjoint, projector_gradient, relative, rotation, symmetric

import ddnref
from ddnref import GaugeError, SingularError
from ddnref._kernels import numpy as _numpy
from ddnref._rules.samples.eigen import triple_loss
from ddnref.reference import svd_gram, svd_vjp_squares
from ddnref.testing import assert_transpose, check_jvp, check_vjp

DTYPES = ["float32", "float64", "complex64", "complex128"]
SHAPES = [(6, 6), (9, 6), (6, 9)]
TRIPLE = np.asarray([2.0, 1.1, 0.5, 0.5, 0.5, 0.2])
ZEROS = np.asarray([2.0, 1.1, 0.7, 0.0, 0.0, 0.0])
both_kinds = pytest.mark.parametrize("is_complex", [False, True])
shapes = pytest.mark.parametrize("shape", SHAPES)


def draw(rng, shape, is_complex=False):
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def bases(rng, shape, batch=(), is_complex=False):
    """Complete orthonormal bases of both spaces."""
    return tuple(rotation(rng, side, batch, is_complex) for side in shape)


def with_values(left, right, s):
    k = np.shape(s)[-1]
    return (left[..., :k] * np.asarray(s)[..., None, :]) @ adjoint(right[..., :k])


def exact_gradient(left, right, s, inside, e):
    """Gradient of ``Re tr(E Π)``, Π the projector of ``[[0, X], [Xᴴ, 0]]`` on chosen eigenvalues, by their formula.

    The eigenvalues are ``s``, ``-s``, and zeros for what is left of the bases; `inside` chooses among all of them.
    """
    m, n, k = left.shape[-1], right.shape[-1], len(s)
    top = np.concatenate([left[:, :k], left[:, :k], 2**0.5 * left[:, k:], np.zeros((m, n - k))], axis=1)
    bottom = np.concatenate([right[:, :k], -right[:, :k], np.zeros((n, m - k)), 2**0.5 * right[:, k:]], axis=1)
    w = np.concatenate([s, -np.asarray(s), np.zeros(m + n - 2 * k)])
    return 2 * projector_gradient(np.concatenate([top, bottom]) / 2**0.5, w, inside(w), e)[:m, m:]


def cotangents(e, u, vh, chosen):
    """Cotangents of ``Re tr(E Π)``, Π the projector on the positive eigenvalues of the chosen triples."""
    m, v = u.shape[-2], adjoint(vh)
    u_bar = np.where(chosen, e[..., :m, :m] @ u + e[..., :m, m:] @ v, 0)
    v_bar = np.where(chosen, e[..., m:, m:] @ v + e[..., m:, :m] @ u, 0)
    return u_bar, adjoint(v_bar)


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 3), (3, 5), (3, 4, 4), (2, 3, 4, 2), (0, 3, 2), (3, 0), (2, 0, 4), (0, 0)]
)
def test_forward_reconstructs_the_input(xp, dtype, shape, rng):
    x = draw(rng, shape, dtype.startswith("complex")).astype(dtype)
    u, s, vh = map(xp.numpy, xp.jit(ddnref.svd)(xp.asarray(x)))
    k = min(shape[-2:])
    assert (u.shape, s.shape, vh.shape) == (
        (*shape[:-1], k),
        (*shape[:-2], k),
        (*shape[:-2], k, shape[-1]),
    )
    assert (u.dtype, s.dtype, vh.dtype) == (x.dtype, x.real.dtype, x.dtype)
    bound = 50 * np.finfo(dtype).eps
    np.testing.assert_allclose((u * s[..., None, :]) @ vh, x, atol=bound)
    np.testing.assert_allclose(adjoint(u) @ u, np.broadcast_to(np.eye(k), (*shape[:-2], k, k)), atol=bound)
    np.testing.assert_allclose(vh @ adjoint(vh), np.broadcast_to(np.eye(k), (*shape[:-2], k, k)), atol=bound)
    assert np.all(np.diff(s, axis=-1) <= 0)
    assert np.all(s >= 0)


def test_a_matrix_on_which_lapack_fails_leaves_the_others_alone(monkeypatch, rng):
    x = rng.standard_normal((5, 4, 3))
    expected, lapack = ddnref.svd(x), np.linalg.svd

    def fails_on_item_three(batch, **options):
        if any(np.array_equal(item, x[3]) for item in batch):
            raise np.linalg.LinAlgError
        return lapack(batch, **options)

    monkeypatch.setattr(_numpy, "_driver", lambda name: None)  # an older NumPy
    monkeypatch.setattr(np.linalg, "svd", fails_on_item_three)
    for got, wanted in zip(ddnref.svd(x), expected, strict=True):
        assert np.all(np.isnan(got[3]))
        assert np.array_equal(got[[0, 1, 2, 4]], wanted[[0, 1, 2, 4]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_input_is_refused_on_request(bad, xp):
    x = np.ones((2, 3, 2))
    x[1, 0, 1] = bad
    x = xp.asarray(x)
    for function in (ddnref.svd, lambda x, **options: ddnref.svd_topk(x, 1, **options)):
        with pytest.raises(ddnref.NonFiniteError, match=r"x contains NaN or infinity \(item 1 of 2\)"):
            function(x, check_finite=True)
        function(x[:1, ...], check_finite=True)
        assert all(np.all(np.isnan(xp.numpy(y)[1])) for y in function(x))


# --- simple values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1.0, 1e-1, 1e-2])
@both_kinds
@pytest.mark.parametrize("shape", [(4, 4), (7, 4), (4, 6)])
def test_finite_differences(shape, is_complex, gap, rng):
    s = np.asarray([2.6, 0.5 + gap, 0.5, 0.2])
    x = with_values(*bases(rng, shape, (), is_complex), np.sort(s)[::-1])
    for k in (4, 2):
        loss = triple_loss(np.asarray, rng, (), *shape, k, is_complex)
        options = {"saves": True, "loss": loss, "gap": min(gap, 0.1)}
        forward, vjp, jvp = (
            partial(ddnref.svd_topk_fwd, k=k),
            ddnref.svd_topk_vjp,
            ddnref.svd_topk_jvp,
        )
        report = check_vjp(forward, vjp, x, needs=(), rtol=1e-9, **options)
        assert report.passed, report
        report = check_jvp(forward, jvp, x, needs=(), rtol=1e-9, **options)
        assert report.passed, report
        assert_transpose(forward, jvp, vjp, x, saves=True, needs=(), loss=loss, rtol=1e-12)


@both_kinds
@shapes
def test_top_k_is_the_full_one_of_these_columns(shape, is_complex, xp, rng):
    x = with_values(*bases(rng, shape, (2,), is_complex), np.arange(6.0, 0, -1))
    (outputs, saved), k = ddnref.svd_topk_fwd(xp.asarray(x), 2), 2
    loss = triple_loss(np.asarray, rng, (2,), *shape, k, is_complex)
    bars = loss[1](*map(xp.numpy, outputs))
    full = [np.zeros(a.shape, dtype) for a, dtype in zip(saved, (x.dtype, float, x.dtype), strict=True)]
    full[0][..., :k], full[1][..., :k], full[2][..., :k, :] = bars
    expected = xp.numpy(xp.derivative(ddnref.svd_vjp, *map(xp.asarray, full), *saved))
    got = xp.numpy(xp.derivative(ddnref.svd_topk_vjp, *map(xp.asarray, bars), *outputs, *saved))
    assert relative(got, expected) <= 1e-13
    x_dot = xp.asarray(draw(rng, x.shape, is_complex))
    jvp = xp.jit(partial(ddnref.svd_topk_jvp, throw=False))
    dots, (u_dot, s_dot, vh_dot) = jvp(x_dot, *outputs, *saved), xp.derivative(ddnref.svd_jvp, x_dot, *saved)
    for got, expected in zip(dots, (u_dot[..., :k], s_dot[..., :k], vh_dot[..., :k, :]), strict=True):
        assert relative(xp.numpy(got), xp.numpy(expected)) <= 1e-13


@shapes
def test_none_is_zero(shape, xp, rng):
    x = with_values(*bases(rng, shape), np.arange(6.0, 0, -1))
    u, s, vh = ddnref.svd(xp.asarray(x))
    bars = [xp.asarray(rng.standard_normal(a.shape)) for a in (u, s, vh)]
    for given in [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)]:
        nones = [bar if i in given else None for i, bar in enumerate(bars)]
        zeros = [bar if i in given else 0 * bar for i, bar in enumerate(bars)]
        got, wanted = (xp.numpy(xp.derivative(ddnref.svd_vjp, *some, u, s, vh)) for some in (nones, zeros))
        assert relative(got, wanted) <= 1e-14


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_error_does_not_depend_on_the_scale(scale, rng):
    left, right = bases(rng, (5, 5))
    e, s = symmetric(rng, 10), np.asarray([2.0, 1.3, 0.5, 0.3, 0.1])
    u, values, vh = ddnref.svd(scale * with_values(left, right, s))
    u_bar, vh_bar = cotangents(e, u, vh, np.arange(5) == 1)
    x_bar = scale * ddnref.svd_vjp(u_bar, None, vh_bar, u, values, vh)
    assert relative(x_bar, exact_gradient(left, right, s, lambda w: w == 1.3, e)) <= 1e-12


# --- equal values, zero values ----------------------------------------------------------------------------------------


@both_kinds
@shapes
def test_losses_of_a_cluster_are_exact_at_a_triple_value(shape, is_complex, xp, rng):
    """200 random matrices; functions of ``U_c U_cᴴ``, ``V_c V_cᴴ`` and ``U_c V_cᴴ`` against perturbation theory."""
    left, right = bases(rng, shape, (200,), is_complex)
    e = symmetric(rng, sum(shape), (200,), is_complex)
    u, s, vh = ddnref.svd(xp.asarray(with_values(left, right, TRIPLE)))
    u_bar, vh_bar = cotangents(e, xp.numpy(u), xp.numpy(vh), TRIPLE == 0.5)
    vjp = xp.jit(lambda u_bar, vh_bar, *a: ddnref.svd_vjp(u_bar, None, vh_bar, *a, throw=False))
    x_bar = xp.numpy(vjp(xp.asarray(u_bar), xp.asarray(vh_bar), u, s, vh))
    exact = [exact_gradient(left[i], right[i], TRIPLE, lambda w: w == 0.5, e[i]) for i in range(200)]
    assert max(relative(x_bar[i], exact[i]) for i in range(200)) <= 1e-12
    ddnref.svd_vjp(xp.asarray(u_bar), None, xp.asarray(vh_bar), u, s, vh)  # the check does not object
    saved = u, s, vh
    outputs = u[..., :5], s[..., :5], vh[..., :5, :]
    top = xp.derivative(
        ddnref.svd_topk_vjp, xp.asarray(u_bar[..., :5]), None, xp.asarray(vh_bar[..., :5, :]), *outputs, *saved
    )
    assert max(relative(xp.numpy(top)[i], exact[i]) for i in range(200)) <= 1e-12


@both_kinds
@shapes
def test_losses_of_spaces_are_exact_at_a_triple_zero(shape, is_complex, xp, rng):
    """200 random matrices each: of the space of a value beside the zeros, and of the space of the zeros themselves."""
    left, right = bases(rng, shape, (200,), is_complex)
    m, n = shape
    u, s, vh = ddnref.svd(xp.asarray(with_values(left, right, ZEROS)))
    e = symmetric(rng, m + n, (200,), is_complex)
    u_bar, vh_bar = cotangents(e, xp.numpy(u), xp.numpy(vh), ZEROS == 1.1)
    # Of the zeros, only the space that is smaller is determined.
    inner = symmetric(rng, m + n, (200,), is_complex)
    inner[..., :m, m:] = inner[..., m:, :m] = 0
    if m > n:
        inner[..., :m, :m] = 0
    if n > m:
        inner[..., m:, m:] = 0
    more_u, more_vh = cotangents(inner, xp.numpy(u), xp.numpy(vh), ZEROS == 0)
    u_bar, vh_bar = u_bar + 2 * more_u, vh_bar + 2 * more_vh
    x_bar = xp.numpy(xp.derivative(ddnref.svd_vjp, xp.asarray(u_bar), None, xp.asarray(vh_bar), u, s, vh))
    for i in range(200):
        exact = exact_gradient(left[i], right[i], ZEROS, lambda w: w == 1.1, e[i])
        exact = exact + exact_gradient(left[i], right[i], ZEROS, lambda w: w == 0, inner[i])
        assert relative(x_bar[i], exact) <= 1e-12


def test_symmetric_functions_of_a_cluster_are_exact(xp, rng):
    """``Σ s_i⁴`` has the gradient ``4 X Xᴴ X``, also at zero values."""
    for values in (TRIPLE, ZEROS):
        x = with_values(*bases(rng, (8, 6), (), True), values)
        u, s, vh = ddnref.svd(xp.asarray(x))
        x_bar = xp.numpy(xp.derivative(ddnref.svd_vjp, None, 4 * s**3, None, u, s, vh))
        assert relative(x_bar, 4 * x @ adjoint(x) @ x) <= 1e-13


def test_without_the_mask_the_answer_is_wrong(monkeypatch, rng):
    """The control of the tests above, in which nothing counts as rounding or as equal, and the form with squares."""
    monkeypatch.setattr(ddnref._kernels.svd_vjp, "ROUNDING", 0)
    monkeypatch.setattr(ddnref._kernels.eigh_vjp, "ROUNDING", 0)
    left, right = bases(rng, (6, 6), (50,))
    e = symmetric(rng, 12, (50,))
    u, s, vh = ddnref.svd(with_values(left, right, TRIPLE))
    u_bar, vh_bar = cotangents(e, u, vh, TRIPLE == 0.5)
    with np.errstate(all="ignore"):
        wrong = [
            ddnref.svd_vjp(u_bar, None, vh_bar, u, s, vh, rtol=0.0, throw=False),
            svd_vjp_squares(u_bar, 0 * s, vh_bar, u, s, vh),
        ]
    exact = [exact_gradient(left[i], right[i], TRIPLE, lambda w: w == 0.5, e[i]) for i in range(50)]
    for x_bar in wrong:
        errors = np.nan_to_num([relative(x_bar[i], exact[i]) for i in range(50)], nan=1.0)
        assert np.median(errors) > 1e-6


# --- small gaps -------------------------------------------------------------------------------------------------------

GAPS = 10.0 ** -np.arange(1.0, 17.0)  # relative to the largest value, which is one


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 6), (40, 24), (24, 40)])
def test_losses_of_a_group_are_exact_at_every_gap(shape, dtype, xp, rng):
    """Within 60 eps √m, whether values are equal, close, or apart; a random scale of matrix and cotangent."""
    is_complex, unit, k = dtype.startswith("complex"), np.finfo(dtype).eps, min(shape)
    group = 0.5 + 0.2 * GAPS[:, None] * np.asarray([1.0, 0.4, 0.0])
    rest = [np.linspace(*ends, count) for *ends, count in ((1.0, 0.8, k // 2), (0.3, 0.2, k - k // 2 - 3))]
    rest = [np.broadcast_to(part, (len(GAPS), len(part))) for part in rest]
    s_exact = np.concatenate([rest[0], group, rest[1]], axis=-1)
    left, right = bases(rng, shape, (len(GAPS),), is_complex)
    e = symmetric(rng, sum(shape), (len(GAPS),), is_complex).astype(dtype)
    scales = [2.0**p for p in rng.integers(-60, 60, 2)]  # their squares are out of the range of float32
    u, s, vh = ddnref.svd(xp.asarray((scales[0] * with_values(left, right, s_exact)).astype(dtype)))
    chosen = (np.arange(k) >= k // 2) & (np.arange(k) < k // 2 + 3)
    bars = [xp.asarray((scales[1] * bar).astype(dtype)) for bar in cotangents(e, xp.numpy(u), xp.numpy(vh), chosen)]
    x_bar = xp.numpy(xp.derivative(ddnref.svd_vjp, bars[0], None, bars[1], u, s, vh, throw=False))
    if xp.name == "numpy":  # each alone, because nothing is equal to rounding in most of them
        alone = [
            ddnref.svd_vjp(*(None if a is None else a[i] for a in (bars[0], None, bars[1], u, s, vh)))
            for i in range(len(GAPS))
        ]
        x_bar = np.stack(alone)
    for i, gap in enumerate(GAPS):
        exact = exact_gradient(left[i], right[i], s_exact[i], lambda w: (w > 0.4) & (w < 0.75), e[i].astype(left.dtype))
        error = relative(x_bar[i].astype(left.dtype) * (scales[0] / scales[1]), exact)
        assert error <= 60 * unit * max(shape) ** 0.5, gap


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (30, 20), (20, 30), (70, 70), (5, 1), (1, 5)])
def test_the_form_for_numpy_is_the_standard_one(shape, dtype, monkeypatch, rng):
    """Close and small values, losses of their spaces and of single vectors, and any scale."""
    is_complex, k = dtype.startswith("complex"), min(shape)
    steps = 10.0 ** rng.uniform(np.log10(64 * np.finfo(dtype).eps), 0, (4, k))
    s_exact = np.flip(np.cumsum(steps, axis=-1), axis=-1)
    left, right = bases(rng, shape, (4,), is_complex)
    e = symmetric(rng, sum(shape), (4,), is_complex)
    for power in (0, 60):
        u, s, vh = ddnref.svd((2.0**power * with_values(left, right, s_exact)).astype(dtype))
        of_spaces = cotangents(e, u, vh, np.arange(k) >= k // 2)
        of_vectors = triple_loss(np.asarray, rng, (4,), *shape, k, is_complex)[1](u, s, vh)[::2]
        for u_bar, vh_bar in (of_spaces, of_vectors):
            u_bar, vh_bar = (np.asarray(2.0**-power * bar, dtype) for bar in (u_bar, vh_bar))
            for s_bar in (None, s):
                options = {"throw": False, "gauge_rtol": float("inf")}
                fast = ddnref.svd_vjp(u_bar, s_bar, vh_bar, u, s, vh, **options)
                with monkeypatch.context() as patch:
                    patch.setattr(ddnref._kernels.svd_vjp, "is_numpy_array", lambda array: False)
                    standard = ddnref.svd_vjp(u_bar, s_bar, vh_bar, u, s, vh, **options)
                assert fast.dtype == dtype
                for i in range(4):
                    assert (
                        relative(fast[i].astype(left.dtype), standard[i].astype(left.dtype)) <= 64 * np.finfo(dtype).eps
                    )


@both_kinds
@pytest.mark.parametrize("with_s", [True, False])
def test_items_with_equal_or_zero_values_beside_others(with_s, is_complex, rng):
    """NumPy computes them apart; each item comes out as on its own, and the refused ones are named."""
    left, right = bases(rng, (6, 6), (2, 2), is_complex)
    x = with_values(left, right, np.asarray([[TRIPLE, np.arange(6.0, 0, -1)], [ZEROS, np.linspace(3, 1, 6)]]))
    u, s, vh = ddnref.svd(x)
    bars = (
        draw(rng, u.shape, is_complex),
        rng.standard_normal(s.shape) if with_s else None,
        draw(rng, vh.shape, is_complex),
    )
    if is_complex:  # no loss depends on the phase
        inner = np.sum(u.conj() * bars[0], -2) + np.sum(vh * bars[2].conj(), -1)
        bars = bars[0] - 1j * u * inner.imag[..., None, :], *bars[1:]
    found = ddnref.svd_vjp(*bars, u, s, vh, throw=False)
    for i in np.ndindex(2, 2):
        alone = ddnref.svd_vjp(*(None if b is None else b[i] for b in bars), u[i], s[i], vh[i], throw=False)
        np.testing.assert_allclose(found[i], alone, rtol=1e-11, atol=1e-11)
    assert np.isnan(found[:, 0]).all()
    assert np.isfinite(found[:, 1]).all()
    error, named = (SingularError, r"\(item \(1, 0\)") if with_s else (GaugeError, r"\(items \(0, 0\), \(1, 0\)")
    with pytest.raises(error, match=named + " of 2 x 2"):
        ddnref.svd_vjp(*bars, u, s, vh)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_spaces_of_small_values_are_exact_at_every_size(shape, dtype, xp, rng):
    """A group of values that goes to zero, whose space on the smaller side stays determined."""
    is_complex, unit, (m, n) = dtype.startswith("complex"), np.finfo(dtype).eps, shape
    s_exact = np.concatenate(
        [np.broadcast_to([1.0, 0.7, 0.5], (len(GAPS), 3)), GAPS[:, None] * np.asarray([1.0, 0.6, 0.3])], axis=-1
    )
    left, right = bases(rng, shape, (len(GAPS),), is_complex)
    e = symmetric(rng, m + n, (len(GAPS),), is_complex)
    e[..., :m, m:] = e[..., m:, :m] = 0
    if m > n:
        e[..., :m, :m] = 0
    if n > m:
        e[..., m:, m:] = 0
    e = e.astype(dtype)
    u, s, vh = ddnref.svd(xp.asarray(with_values(left, right, s_exact).astype(dtype)))
    u_bar, vh_bar = cotangents(2 * e, xp.numpy(u), xp.numpy(vh), np.arange(6) >= 3)
    x_bar = xp.numpy(xp.derivative(ddnref.svd_vjp, xp.asarray(u_bar), None, xp.asarray(vh_bar), u, s, vh))
    for i, size in enumerate(GAPS):
        exact = exact_gradient(left[i], right[i], s_exact[i], lambda w: np.abs(w) < 0.2, e[i].astype(left.dtype))
        assert relative(x_bar[i], exact) <= 60 * unit * max(shape) ** 0.5, size


def test_couplings_above_rounding_stay_at_small_gaps(xp, rng):
    """Single vectors of a close pair: a gradient of 1 / gap is right, and not taken for rounding."""
    s, (left, right) = np.asarray([1.0, 0.5 + 1e-9, 0.5, 0.1]), bases(rng, (4, 4))
    u_bar, vh_bar = rng.standard_normal((2, 4, 4))
    expected = svd_vjp_squares(u_bar, 0 * s, vh_bar, left, s, right.T)
    got = xp.numpy(xp.derivative(ddnref.svd_vjp, *map(xp.asarray, (u_bar, 0 * s, vh_bar, left, s, right.T.copy()))))
    assert relative(got, expected) <= 1e-6  # the other form has lost half of its digits


def test_what_the_gram_matrix_loses(rng):
    """Values below 1e-8 of the largest have no digit in it; ours have an error of eps times the largest."""
    s = np.asarray([1.0, 1e-4, 1e-10, 1e-12])
    x = with_values(*bases(rng, (8, 4)), s)
    assert np.max(np.abs(ddnref.svd(x)[1] - s)) <= 1e-15
    assert np.max(np.abs(ddnref.svdvals(x) - s)) <= 1e-15
    assert np.abs(svd_gram(x)[1] / s - 1)[2:].min() > 0.1


# --- where there is no derivative -------------------------------------------------------------------------------------


def refused(kind, xp, rng):
    """Cotangents and triples of three items, of which the second has no gradient, and the error that says so."""
    shape, is_complex = ((8, 6) if "outside" in kind else (6, 6)), kind == "phase"
    left, right = bases(rng, shape, (3,), is_complex)
    s = np.stack([np.arange(6.0, 0.0, -1.0)] * 3)
    s[1] = {"zero": ZEROS, "phase": s[1]}.get(kind.split()[0], TRIPLE)
    u, s, vh = ddnref.svd(xp.asarray(with_values(left, right, s)))
    u_bar, vh_bar = (np.zeros(a.shape, left.dtype) for a in (u, vh))
    s_bar = np.ones(s.shape)
    if kind == "vectors of a cluster":
        u_bar[1] = rng.standard_normal((6, 6))
    elif kind == "order in a cluster":
        s_bar[1] = np.arange(6.0)
    elif kind == "phase":
        u_bar[1] = 1j * xp.numpy(u)[1]
    elif kind == "zero value":
        pass
    elif kind == "zero vectors":
        s_bar[1, 3:] = 0
        vh_bar[1] = rng.standard_normal((6, 6))
    elif kind == "zero outside":
        s_bar[1, 3:] = 0
        u_bar[1, :, 3] = left[1][:, 6]
    error = SingularError if kind in ("zero value", "zero outside") else GaugeError
    return (*map(xp.asarray, (u_bar, s_bar, vh_bar)), u, s, vh), error


REFUSED = ["vectors of a cluster", "order in a cluster", "phase", "zero value", "zero vectors", "zero outside"]


@pytest.mark.parametrize("kind", REFUSED)
def test_losses_without_a_gradient_are_refused(kind, xp, rng):
    arrays, error = refused(kind, xp, rng)
    with pytest.raises(error, match=r"\(item 1 of 3\)"):
        ddnref.svd_vjp(*arrays)
    x_bar = xp.numpy(xp.jit(partial(ddnref.svd_vjp, throw=False))(*arrays))
    assert np.all(np.isnan(x_bar[1]))
    assert np.all(np.isfinite(x_bar[[0, 2]]))
    assert np.all(np.isfinite(xp.numpy(xp.derivative(ddnref.svd_vjp, *arrays, gauge_rtol=float("inf")))))


def test_the_phase_between_u_and_v_is_no_gauge(rng):
    """``Re u_1ᴴ C v_1`` of a complex matrix depends on it, and has a gradient."""
    x, c = with_values(*bases(rng, (5, 4), (), True), np.asarray([2.0, 1.0, 0.6, 0.3])), draw(rng, (5, 4), True)

    def gradient(u, s, vh):
        u_bar, vh_bar = np.zeros_like(u), np.zeros_like(vh)
        u_bar[:, 0], vh_bar[0] = c @ np.conj(vh[0]), np.conj(u[:, 0]) @ c
        return u_bar, 0 * s, vh_bar

    def value(u, s, vh):
        return np.real(np.conj(u[:, 0]) @ c @ np.conj(vh[0]))

    assert check_vjp(ddnref.svd, ddnref.svd_vjp, x, loss=(value, gradient), gap=0.3, rtol=1e-9).passed


def test_rtol_decides_what_counts_as_equal(rng):
    s, bar = np.asarray([1.0 + 1e-9, 1.0, 0.3]), rng.standard_normal((3, 3))
    ddnref.svd_vjp(bar, None, None, np.eye(3), s, np.eye(3))
    with pytest.raises(GaugeError):
        ddnref.svd_vjp(bar, None, None, np.eye(3), s, np.eye(3), rtol=1e-8)


def test_a_cut_cluster_is_refused(xp, rng):
    x = with_values(*bases(rng, (7, 6)), TRIPLE)
    for k, passes in ((2, True), (3, False), (4, False), (5, True), (6, True)):
        (u, s, vh), saved = ddnref.svd_topk_fwd(xp.asarray(x), k)
        c = xp.asarray(symmetric(rng, 7))
        arrays = (2 * c @ u, None, None, u, s, vh, *saved)
        if passes:
            ddnref.svd_topk_vjp(*arrays)
        else:
            with pytest.raises(GaugeError, match="cuts such a cluster"):
                ddnref.svd_topk_vjp(*arrays)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_at_equal_values(shape, xp, rng):
    left, right = bases(rng, shape)
    x = xp.asarray(with_values(left, right, TRIPLE))
    u, s, vh = ddnref.svd(x)
    direction = xp.asarray(rng.standard_normal(shape))
    with pytest.raises(GaugeError, match=r"splits equal singular values, those at 0\.5, by"):
        ddnref.svd_jvp(direction, u, s, vh)
    assert all(np.all(np.isnan(xp.numpy(dot))) for dot in ddnref.svd_jvp(direction, u, s, vh, throw=False))
    # One that moves the cluster as a whole, and turns the rest freely.
    free = rng.standard_normal(shape)
    turned = left.T @ free @ right
    turned[2:5, 2:5] = 3 * np.eye(3) + (np.triu(turned[2:5, 2:5], 1) - np.triu(turned[2:5, 2:5], 1).T)
    direction = left @ turned @ right.T
    u_dot, s_dot, vh_dot = map(xp.numpy, xp.derivative(ddnref.svd_jvp, xp.asarray(direction), u, s, vh))
    np.testing.assert_allclose(s_dot[2:5], 3.0, rtol=1e-12)
    e = symmetric(rng, sum(shape))
    u_bar, vh_bar = cotangents(e, xp.numpy(u), xp.numpy(vh), TRIPLE == 0.5)
    expected = np.sum(exact_gradient(left, right, TRIPLE, lambda w: w == 0.5, e) * direction)
    assert abs(np.sum(u_bar * u_dot) + np.sum(vh_bar * vh_dot) - expected) <= 1e-11 * abs(expected)
    # A direction that moves only a vector of the cluster which k leaves out.
    outputs, saved = ddnref.svd_topk_fwd(x, 4)
    aside = xp.numpy(saved[0])[:, 4:5] @ xp.numpy(saved[2])[4:5]
    with pytest.raises(GaugeError, match=r"splits equal singular values, those at 0\.5, by"):
        ddnref.svd_topk_jvp(xp.asarray(aside), *outputs, *saved)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_at_zero_values(shape, xp, rng):
    left, right = bases(rng, shape)
    x = with_values(left, right, ZEROS)
    outputs = ddnref.svd(xp.asarray(x))
    moving = xp.asarray(np.outer(left[:, 5], right[:, 5]))
    with pytest.raises(SingularError, match="moves a singular value that is zero"):
        ddnref.svd_jvp(moving, *outputs)
    dots = ddnref.svd_jvp(moving, *outputs, throw=False)
    assert all(np.all(np.isnan(xp.numpy(dot))) for dot in dots)
    # The rank stays along this one, and so do the zeros.
    staying = rng.standard_normal((shape[0],) * 2) @ x + x @ rng.standard_normal((shape[1],) * 2)
    _, s_dot, _ = ddnref.svd_jvp(xp.asarray(staying), *outputs)
    np.testing.assert_allclose(xp.numpy(s_dot)[3:], 0, atol=1e-13)
    # Larger triples do not see that zeros move.
    top, saved = ddnref.svd_topk_fwd(xp.asarray(x), 3)
    _, s_dot, _ = ddnref.svd_topk_jvp(moving, *top, *saved)
    np.testing.assert_allclose(xp.numpy(s_dot), 0, atol=1e-14)


# --- second derivatives -----------------------------------------------------------------------------------------------


@pytest.mark.framework("torch")
@both_kinds
@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (2, 4)])
@pytest.mark.parametrize("name", ["svd", "svd_topk", "svdvals"])
def test_second_derivatives(name, shape, is_complex, rng):
    import torch

    from ddnref.interop.torch import differentiable

    operation = differentiable(getattr(ddnref, name), **({"k": 1} if name == "svd_topk" else {}))
    x = with_values(*bases(rng, shape, (), is_complex), np.asarray([2.0, 1.3, 0.6])[: min(shape)])
    a = torch.from_numpy(draw(rng, shape, is_complex))

    def loss(x):
        found = operation(x)
        if name == "svdvals":
            return (found**3).sum()
        u, s, vh = found
        products = torch.einsum("mi,mn,in->i", u.conj(), a, vh.conj())
        weights = torch.arange(u.shape[-2])[:, None]
        return (s**2).sum() + (products.abs() ** 2).sum() + products.real.sum() + (weights * u.abs() ** 2).sum()

    x = torch.from_numpy(x).requires_grad_()
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


@pytest.mark.framework("torch")
@pytest.mark.parametrize("values", [TRIPLE, ZEROS])
def test_second_derivatives_are_refused_at_equal_and_zero_values(values, rng):
    import torch

    from ddnref.interop.torch import differentiable

    x = torch.from_numpy(with_values(*bases(rng, (6, 6)), values)).requires_grad_()
    _, s, _ = differentiable(ddnref.svd)(x)
    (x_bar,) = torch.autograd.grad((s**4).sum(), x, create_graph=True)
    with pytest.raises(GaugeError, match="second derivative through repeated or zero singular values"):
        torch.autograd.grad(x_bar.sum(), x)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_static_errors(rng):
    x = rng.standard_normal((4, 5, 3))
    u, s, vh = ddnref.svd(x)
    for bad, error, match in [
        (lambda: ddnref.svd(np.ones(3)), ValueError, r"x has shape \(3,\), expected \(\.\.\., m, n\)"),
        (lambda: ddnref.svd(np.ones((3, 2), np.int64)), TypeError, "x has dtype int64"),
        (lambda: ddnref.svd_vjp(None, None, None, u, s, vh), TypeError, "u_bar, s_bar and vh_bar are all None"),
        (lambda: ddnref.svd_vjp(u[:, :4], None, None, u, s, vh), ValueError, "u_bar has shape"),
        (lambda: ddnref.svd_vjp(None, s[:, :2], None, u, s, vh), ValueError, "s_bar has shape"),
        (lambda: ddnref.svd_vjp(None, None, u, u, s, vh), ValueError, "vh_bar has shape"),
        (lambda: ddnref.svd_vjp(None, s.astype("f"), None, u, s, vh), TypeError, "s_bar has dtype float32"),
        (lambda: ddnref.svd_vjp(None, s[..., :2], None, u[..., :2], s[..., :2], vh[:, :2]), ValueError, "svd_topk"),
        (lambda: ddnref.svd_jvp(None, u, s, vh), TypeError, "x_dot is None"),
        (lambda: ddnref.svd_jvp(x[:, :3], u, s, vh), ValueError, "x_dot has shape"),
        (lambda: ddnref.svd_topk(x, 4), ValueError, "k is 4, expected 1 <= k <= 3"),
        (lambda: ddnref.svd_topk(x, 0), ValueError, "k is 0, expected 1 <= k <= 3"),
        (lambda: ddnref.svd_topk(x, 1.5), TypeError, r"k is 1\.5, expected an integer"),
    ]:
        with pytest.raises(error, match=match):
            bad()


def test_nothing_is_read_without_the_check(host_reads, rng):
    import array_api_strict as strict

    x = strict.asarray(rng.standard_normal((2, 4, 3)))
    host_reads.clear()
    u, s, vh = ddnref.svd(x)
    ddnref.svd_vjp(u, s, vh, u, s, vh, throw=False)
    ddnref.svd_jvp(x, u, s, vh, throw=False)
    assert host_reads == []
    ddnref.svd_vjp(u, s, vh, u, s, vh)
    ddnref.svd_jvp(x, u, s, vh)
    assert host_reads == ["__bool__"] * 2


def test_matrices_without_entries(xp):
    for shape in [(3, 0), (0, 3), (2, 0, 0), (0, 3, 2)]:
        u, s, vh = ddnref.svd(xp.asarray(np.ones(shape)))
        assert tuple(ddnref.svd_vjp(u, s, vh, u, s, vh, throw=False).shape) == shape
        dots = ddnref.svd_jvp(xp.asarray(np.ones(shape)), u, s, vh, throw=False)
        assert [tuple(dot.shape) for dot in dots] == [tuple(a.shape) for a in (u, s, vh)]
