"""The generalised eigenproblem: the forward, and where its gradients exist, are exact, or must be refused."""

from functools import partial

import numpy as np
import pytest
from problems import adjoint, relative, rotation, symmetric

import ddnref
from ddnref import GaugeError, SingularError
from ddnref._rules.samples import eigen_loss
from ddnref.reference import eigh_generalized_vjp_cholesky
from ddnref.testing import assert_jvp, assert_transpose, assert_vjp

TRIPLE = np.asarray([-1.0, 0.3, 0.3, 0.3, 1.1, 2.0])
INSIDE = TRIPLE == 0.3
DTYPES = ["float32", "float64", "complex64", "complex128"]
SYMMETRIC = {"tangent": "symmetric", "symmetrises": True}


def basis(rng, m, batch=(), is_complex=False, condition=3.0):
    """Random eigenvectors V with a given condition number, which is the root of that of B."""
    sizes = np.exp(rng.uniform(0, 1, (*batch, m)) * np.log(condition))
    return (rotation(rng, m, batch, is_complex) * sizes[..., None, :]) @ rotation(rng, m, batch, is_complex)


def pencil(v, w):
    """Matrices A and B with ``A V = B V Λ`` and ``Vᴴ B V = I``."""
    left = np.linalg.inv(v)
    both = (adjoint(left) @ (np.asarray(w)[..., :, None] * left), adjoint(left) @ left)
    return tuple((x + adjoint(x)) / 2 for x in both)


def space_gradients(v, w, inside, c):
    """Gradients of ``Re tr(C V_c V_cᴴ)`` for the marked columns c, whose own gaps do not enter."""
    m_ = np.where(inside, 2 * adjoint(v) @ (c @ v), 0)
    gap = w[None, :] - w[:, None]
    across = inside[:, None] != inside
    t = np.where(across, (m_ - adjoint(m_)) / np.where(across, 2 * gap, 1), 0)
    mean = (w[None, :] + w[:, None]) / 2
    return v @ t @ adjoint(v), -v @ (t * mean + (m_ + adjoint(m_)) / 4) @ adjoint(v)


# --- forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 4, 4), (2, 3, 4, 4), (0, 3, 3), (0, 0), (2, 0, 0)])
def test_forward(xp, dtype, shape, rng):
    is_complex = dtype.startswith("complex")
    a, z = rng.standard_normal((2, *shape))
    if is_complex:
        a, z = a + 1j * rng.standard_normal(shape), z + 1j * rng.standard_normal(shape)
    b = z @ adjoint(z) + np.eye(shape[-1]) + 0.1 * (z - adjoint(z))
    a, b = a.astype(dtype), b.astype(dtype)
    w, v = map(xp.numpy, xp.jit(partial(ddnref.eigh_generalized, throw=False))(xp.asarray(a), xp.asarray(b)))
    assert (w.dtype, v.dtype) == (a.real.dtype, a.dtype)
    assert np.all(np.diff(w, axis=-1) >= 0)
    a, b = (a + adjoint(a)) / 2, (b + adjoint(b)) / 2
    unit = 200 * np.finfo(a.dtype).eps
    scale = max(1.0, float(np.max(np.abs(w), initial=0.0)))
    np.testing.assert_allclose(a @ v, b @ v * w[..., None, :], atol=unit * scale * float(np.max(np.abs(b), initial=1)))
    np.testing.assert_allclose(adjoint(v) @ b @ v, np.broadcast_to(np.eye(shape[-1]), shape), atol=unit)


def test_forward_agrees_with_scipy(rng):
    import scipy.linalg

    a, b = pencil(basis(rng, 7), rng.standard_normal(7))
    w, v = ddnref.eigh_generalized(a, b)
    theirs = scipy.linalg.eigh(a, b)
    np.testing.assert_allclose(w, theirs[0], atol=1e-13)
    np.testing.assert_allclose(np.abs(v), np.abs(theirs[1]), atol=1e-12)


@pytest.mark.parametrize("is_complex", [False, True])
def test_units_of_the_unknowns_do_not_matter(is_complex, xp, rng):
    """In units that differ by powers of two, every result is the same to the last bit."""
    v = basis(rng, 6, (), is_complex)
    a, b = pencil(v, TRIPLE)
    c = symmetric(rng, 6, (), is_complex)
    d = np.ldexp(1.0, rng.integers(-60, 61, 6))
    d = d[:, None]

    def both(a, b, v_bar_of):
        w, v = ddnref.eigh_generalized(xp.asarray(a), xp.asarray(b))
        v_bar = xp.asarray(np.where(INSIDE, v_bar_of(xp.numpy(v)), 0))
        return tuple(map(xp.numpy, (w, v, *ddnref.eigh_generalized_vjp(None, v_bar, w, v))))

    plain = both(a, b, lambda v: 2 * c @ v)
    scaled = both(d * a * d.T, d * b * d.T, lambda v: d * (2 * c @ (d * v)))
    for x, y, unit in zip(plain, scaled, (1, d, d * d.T, d * d.T), strict=True):
        assert np.array_equal(x, y * unit)


def test_extreme_sizes(xp):
    for size in (1e-300, 1e300):
        a, b = np.diag([3.0, 1.0]) * size, np.diag([1.0, 2.0]) * size
        w, v = ddnref.eigh_generalized(xp.asarray(a), xp.asarray(b))
        np.testing.assert_allclose(xp.numpy(w), [0.5, 3.0], rtol=1e-14)
        assert np.all(np.isfinite(xp.numpy(v)))


# --- derivatives at simple eigenvalues --------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1.0, 1e-2])
@pytest.mark.parametrize("is_complex", [False, True])
def test_finite_differences(gap, is_complex, rng):
    v = basis(rng, 4, (), is_complex, 1.5)
    a, b = pencil(v / np.linalg.norm(v, 2), np.asarray([-1.0, 0.5, 0.5 + gap, 2.6]))
    loss = eigen_loss(np.asarray, rng, (4,), 4, is_complex)
    options = {"loss": loss, "gap": gap, "rtol": 1e-9, **SYMMETRIC}
    assert_vjp(ddnref.eigh_generalized, ddnref.eigh_generalized_vjp, a, b, **options)
    assert_jvp(ddnref.eigh_generalized, ddnref.eigh_generalized_jvp, a, b, **options)
    options.pop("gap")
    functions = ddnref.eigh_generalized_jvp, ddnref.eigh_generalized_vjp
    assert_transpose(ddnref.eigh_generalized, *functions, a, b, **{**options, "rtol": 1e-12})


@pytest.mark.parametrize("index", [(0,), (-2, 1), range(4), range(2, 6), (5, 0, 3)])
@pytest.mark.parametrize("is_complex", [False, True])
def test_a_subset_of_the_columns(index, is_complex, xp, rng):
    """Agrees with zero cotangents in the other columns, and with the columns of the whole tangent."""
    a, b = pencil(basis(rng, 6, (2,), is_complex), np.arange(6.0))
    w, v = ddnref.eigh_generalized(xp.asarray(a), xp.asarray(b))
    columns = [i % 6 for i in index]
    loss = eigen_loss(np.asarray, rng, (2, 6), 6, is_complex)
    bars = [np.where(np.isin(np.arange(6), columns), x, 0) for x in loss[1](xp.numpy(w), xp.numpy(v))]
    chosen = [xp.asarray(x[..., columns]) for x in bars]
    vjp, jvp = (xp.jit(partial(f, throw=False)) for f in (ddnref.eigh_generalized_vjp, ddnref.eigh_generalized_jvp))
    some_vjp, some_jvp = (
        xp.jit(partial(f, throw=False, index=tuple(index)))
        for f in (ddnref.eigh_generalized_vjp, ddnref.eigh_generalized_jvp)
    )
    for cotangents in ((0, 1), (0,), (1,)):
        whole, part = ([x if i in cotangents else None for i, x in enumerate(given)] for given in (bars, chosen))
        whole = [None if x is None else xp.asarray(x) for x in whole]
        for x, y in zip(some_vjp(*part, w, v), vjp(*whole, w, v), strict=True):
            assert np.array_equal(xp.numpy(x), adjoint(xp.numpy(x)))
            assert relative(xp.numpy(x), xp.numpy(y)) <= 1e-13
    dots = [xp.asarray(symmetric(rng, 6, (2,), is_complex)) for _ in range(2)]
    for given in (dots, (dots[0], None), (None, dots[1])):
        for x, y in zip(some_jvp(*given, w, v), jvp(*given, w, v), strict=True):
            assert relative(xp.numpy(x), xp.numpy(y)[..., columns]) <= 1e-13


def test_the_textbook_form_agrees_at_simple_eigenvalues(rng):
    a, b = pencil(basis(rng, 6, (3,), True), np.arange(6.0))
    w, v = ddnref.eigh_generalized(a, b)
    bars = eigen_loss(np.asarray, rng, (3, 6), 6, True)[1](w, v)
    ours, theirs = ddnref.eigh_generalized_vjp(*bars, w, v), eigh_generalized_vjp_cholesky(*bars, w, v, a, b)
    for x, y in zip(ours, theirs, strict=True):
        assert relative(x, y) <= 1e-12


# --- repeated and close eigenvalues -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_losses_of_a_space_are_exact_at_a_triple_eigenvalue(is_complex, scale, xp, rng):
    """Check 200 random pencils against perturbation theory with the known eigenvectors."""
    v_exact = basis(rng, 6, (200,), is_complex)
    c = symmetric(rng, 6, (200,), is_complex)
    a, b = pencil(v_exact, TRIPLE)
    w, v = ddnref.eigh_generalized(xp.asarray(scale * a), xp.asarray(b))
    v_bar = xp.asarray(np.where(INSIDE, 2 * c @ xp.numpy(v), 0))
    a_bar, b_bar = map(xp.numpy, xp.jit(partial(ddnref.eigh_generalized_vjp, None, throw=False))(v_bar, w, v))
    errors = []
    for i in range(200):
        expected = space_gradients(v_exact[i], TRIPLE, INSIDE, c[i])
        errors += [relative(scale * a_bar[i], expected[0]), relative(b_bar[i], expected[1])]
    assert max(errors) <= 1e-12
    if xp.name != "jax":
        ddnref.eigh_generalized_vjp(None, v_bar, w, v)  # and the check does not object


def test_the_textbook_form_is_wrong_there(rng):
    """The control: through the Cholesky factor, rounding is divided by gaps that are rounding."""
    v_exact, c = basis(rng, 6, (200,)), symmetric(rng, 6, (200,))
    a, b = pencil(v_exact, TRIPLE)
    w, v = ddnref.eigh_generalized(a, b)
    found = eigh_generalized_vjp_cholesky(0 * w, np.where(INSIDE, 2 * c @ v, 0), w, v, a, b)
    errors = [relative(found[1][i], space_gradients(v_exact[i], TRIPLE, INSIDE, c[i])[1]) for i in range(200)]
    assert np.nanmedian(errors) > 1e-2


def test_symmetric_functions_of_a_cluster_are_exact(xp, rng):
    """``Σ λ_i³`` is ``tr (B⁻¹ A)³``; nothing there depends on an order."""
    a, b = pencil(basis(rng, 6), TRIPLE)
    w, v = ddnref.eigh_generalized(xp.asarray(a), xp.asarray(b))
    a_bar, b_bar = map(xp.numpy, xp.derivative(ddnref.eigh_generalized_vjp, 3 * w * w, None, w, v))
    x = np.linalg.solve(b, a)
    inverse = np.linalg.inv(b)
    assert relative(a_bar, 3 * x @ x @ inverse) <= 1e-12
    assert relative(b_bar, -3 * x @ x @ x @ inverse) <= 1e-12


GAPS = 10.0 ** -np.arange(15.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [6, 48])
def test_the_error_is_flat_against_the_gap(m, dtype, xp, rng):
    """Losses of the space of three eigenvalues, equal, close or apart, all columns and three of them."""
    is_complex, unit = dtype.startswith("complex"), np.finfo(dtype).eps
    below = (m - 3) // 2
    inside = (np.arange(m) >= below) & (np.arange(m) < below + 3)
    index = tuple(map(int, np.flatnonzero(inside)))
    v_exact, c = basis(rng, m, (len(GAPS),), is_complex), symmetric(rng, m, (len(GAPS),), is_complex)
    spectra = np.empty((len(GAPS), m))
    spectra[:, :below], spectra[:, below + 3 :] = np.linspace(-1, -0.3, below), np.linspace(0.6, 1, m - below - 3)
    spectra[:, inside] = 0.2 * GAPS[:, None] * [0.2, 0.6, 1.0]
    a, b = (x.astype(dtype) for x in pencil(v_exact, spectra))
    w, v = ddnref.eigh_generalized(xp.asarray(a), xp.asarray(b))
    v_bar = np.where(inside, 2 * c @ xp.numpy(v), 0).astype(dtype)
    every, some = (
        xp.jit(partial(ddnref.eigh_generalized_vjp, None, throw=False, index=index)) for index in (None, index)
    )
    for found in (every(xp.asarray(v_bar), w, v), some(xp.asarray(v_bar[..., inside]), w, v)):
        for i in range(len(GAPS)):
            expected = space_gradients(v_exact[i], spectra[i], inside, c[i])
            for x, y in zip(found, expected, strict=True):
                assert relative(xp.numpy(x)[i], y) <= 400 * unit * m**0.5, GAPS[i]


def test_couplings_above_rounding_stay_at_small_gaps(xp, rng):
    """Single vectors of a close pair: a gradient of 1 / gap is right, and not taken for rounding."""
    w, v = np.asarray([-1.0, 0.5, 0.5 + 1e-9, 1.0]), basis(rng, 4)
    v_bar = rng.standard_normal((4, 4))
    m_ = v.T @ v_bar
    gap = w[None, :] - w[:, None]
    t = np.divide(m_ - m_.T, 2 * gap, where=gap != 0, out=np.zeros((4, 4)))
    expected = v @ t @ v.T, -v @ ((t * w + w[:, None] * t) / 2 + (m_ + m_.T) / 4) @ v.T
    for x, y in zip(
        xp.derivative(ddnref.eigh_generalized_vjp, None, *map(xp.asarray, (v_bar, w, v))), expected, strict=True
    ):
        assert relative(xp.numpy(x), y) <= 1e-14


@pytest.mark.parametrize("is_complex", [False, True])
def test_directions_at_a_triple_eigenvalue(is_complex, xp, rng):
    """Directions along which the three stay together have derivatives; others split them and are refused."""
    v_exact = basis(rng, 6, (3,), is_complex)
    a, b = pencil(v_exact, TRIPLE)
    w, v = ddnref.eigh_generalized(xp.asarray(a), xp.asarray(b))
    left = adjoint(np.linalg.inv(xp.numpy(v)))
    q = symmetric(rng, 6, (3,), is_complex)
    r = symmetric(rng, 6, (3,), is_complex)
    both = INSIDE[:, None] & INSIDE
    r = np.where(both, 0.7 * np.eye(6), r)
    p = r + (q * TRIPLE + TRIPLE[:, None] * q) / 2
    dots = [xp.asarray(left @ x @ adjoint(left)) for x in (p, q)]
    for index in (None, (1, 2, 3), (2, 4), range(2, 5)):
        w_dot, _ = map(xp.numpy, xp.derivative(ddnref.eigh_generalized_jvp, *dots, w, v, index=index))
        columns = list(range(6) if index is None else index)
        expected = np.real(np.diagonal(r, axis1=-2, axis2=-1))[..., columns]
        np.testing.assert_allclose(w_dot, expected, atol=1e-12)
    # The projector of the cluster moves as the transpose says.
    c = symmetric(rng, 6, (3,), is_complex)
    _, v_dot = map(xp.numpy, xp.derivative(ddnref.eigh_generalized_jvp, *dots, w, v))
    v_bar = np.where(INSIDE, 2 * c @ xp.numpy(v), 0)
    bars = map(xp.numpy, xp.derivative(ddnref.eigh_generalized_vjp, None, xp.asarray(v_bar), w, v))
    moved = sum(np.vdot(x, xp.numpy(y)).real for x, y in zip(bars, dots, strict=True))
    assert abs(np.vdot(v_bar, v_dot).real - moved) <= 1e-12 * np.linalg.norm(v_bar) * np.linalg.norm(v_dot)

    splitting = xp.asarray(symmetric(rng, 6, (3,), is_complex))
    for given in ((splitting, None), (None, splitting)):
        for index in (None, (1, 2), (3,)):
            with pytest.raises(GaugeError, match=r"splits equal eigenvalues \(items 0, 1, 2 of 3\).*block of R"):
                ddnref.eigh_generalized_jvp(*given, w, v, index=index)
            found = ddnref.eigh_generalized_jvp(*given, w, v, index=index, throw=False)
            assert all(np.all(np.isnan(xp.numpy(x))) for x in found)
    w_dot, _ = ddnref.eigh_generalized_jvp(splitting, None, w, v, gauge_rtol=float("inf"))
    assert np.all(np.isfinite(xp.numpy(w_dot)))


def test_a_multiple_of_the_pencil_itself_splits_nothing(rng):
    """Along ``Ȧ = A, Ḃ = B`` no eigenvalue moves: what is left of R is rounding, and not a splitting."""
    a, b = pencil(basis(rng, 6, (5,)), TRIPLE)
    w, v = ddnref.eigh_generalized(a, b)
    for index in (None, (1, 2), (2,)):
        w_dot, _ = ddnref.eigh_generalized_jvp(a, b, w, v, index=index)
        np.testing.assert_allclose(w_dot, 0, atol=1e-13)


# --- where no gradient exists -----------------------------------------------------------------------------------


def gauge_dependent(kind, rng, xp):
    """Arguments and options for a loss that has no gradient, one for each way to lose it."""
    is_complex = kind == "phase"
    v = basis(rng, 6, (3,), is_complex)
    w, v = ddnref.eigh_generalized(*map(xp.asarray, pencil(v, np.arange(6.0) if is_complex else TRIPLE)))
    v_np = xp.numpy(v)
    if kind == "vectors of a cluster":
        return (None, xp.asarray(rng.standard_normal(v_np.shape)), w, v), {}
    if kind == "order inside a cluster":
        return (xp.asarray(np.broadcast_to(np.arange(6.0), (3, 6)).copy()), None, w, v), {}
    if kind == "order beside vectors":
        return (xp.asarray(np.broadcast_to(np.arange(6.0), (3, 6)).copy()), xp.asarray(0 * v_np), w, v), {}
    if kind == "phase":
        return (None, xp.asarray(1j * adjoint(np.linalg.inv(v_np))), w, v), {}
    c = symmetric(rng, 6)
    return (None, xp.asarray(2 * (c @ v_np)[..., 1:3]), w, v), {"index": (1, 2)}  # a cut cluster


KINDS = ["vectors of a cluster", "order inside a cluster", "order beside vectors", "phase", "cut cluster"]


@pytest.mark.parametrize("kind", KINDS)
def test_gauge_dependent_losses_are_refused(kind, xp, rng):
    args, options = gauge_dependent(kind, rng, xp)
    with pytest.raises(GaugeError, match=r"items 0, 1, 2 of 3.*gauge residual .* > gauge_rtol"):
        ddnref.eigh_generalized_vjp(*args, **options)
    for x in ddnref.eigh_generalized_vjp(*args, **options, throw=False):
        assert np.all(np.isnan(xp.numpy(x)))
    for x in ddnref.eigh_generalized_vjp(*args, **options, gauge_rtol=float("inf")):
        assert np.all(np.isfinite(xp.numpy(x)))


def test_rtol_decides_what_counts_as_equal(rng):
    w, v, v_bar = np.asarray([0.0, 1.0, 1.0 + 1e-9]), basis(rng, 3), rng.standard_normal((3, 3))
    ddnref.eigh_generalized_vjp(None, v_bar, w, v)
    with pytest.raises(GaugeError):
        ddnref.eigh_generalized_vjp(None, v_bar, w, v, rtol=1e-8)
    splitting = symmetric(rng, 3)
    ddnref.eigh_generalized_jvp(splitting, None, w, v)
    with pytest.raises(GaugeError):
        ddnref.eigh_generalized_jvp(splitting, None, w, v, rtol=1e-8)


# --- bad input --------------------------------------------------------------------------------------------------


def indefinite(kind, rng, m):
    """Matrices B that are not positive definite, one for each way."""
    q, w = rotation(rng, m), np.linspace(1, 2, m)
    if kind == "negative":
        w[1] = -0.5
    b = (q * w) @ q.T
    if kind == "no mass":
        b[2], b[:, 2] = 0, 0
    if kind == "duplicated feature":
        samples = rng.standard_normal((50, m))
        samples[:, 2] = samples[:, 0]
        b = samples.T @ samples
    if kind == "negative diagonal":
        b[0, 0] = -1.0
    return b


@pytest.mark.parametrize("kind", ["negative", "no mass", "duplicated feature", "negative diagonal"])
def test_an_indefinite_item_is_named_and_spoils_no_other(kind, xp, rng):
    a, b = pencil(basis(rng, 5, (4,)), np.arange(5.0))
    alone = [xp.numpy(x) for x in ddnref.eigh_generalized(xp.asarray(a), xp.asarray(b))]
    b[2] = indefinite(kind, rng, 5)
    with pytest.raises(SingularError, match=r"b is not positive definite.*\(item 2 of 4\).*throw=False"):
        ddnref.eigh_generalized(xp.asarray(a), xp.asarray(b))
    found = ddnref.eigh_generalized(xp.asarray(a), xp.asarray(b), throw=False)
    for x, y in zip(found, alone, strict=True):
        assert np.all(np.isnan(xp.numpy(x)[2]))
        assert np.array_equal(xp.numpy(x)[[0, 1, 3]], y[[0, 1, 3]])
    gradients = xp.derivative(ddnref.eigh_generalized_vjp, found[0], None, *found)
    for x in gradients:
        assert np.all(np.isnan(xp.numpy(x)[2]))
        assert np.all(np.isfinite(xp.numpy(x)[[0, 1, 3]]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whether_a_matrix_is_singular_does_not_depend_on_rounding(dtype):
    """Covariances with a duplicated feature in any unit are refused, regular ones of a large condition are not."""
    rng = np.random.default_rng(3)
    for m in (3, 10, 40, 120):
        for _ in range(10):
            samples = rng.standard_normal((3 * m, m)) * 10.0 ** rng.uniform(-3, 3, m)
            good = (samples.T @ samples).astype(dtype)
            ddnref.eigh_generalized(np.eye(m, dtype=dtype), good)
            i, j = rng.choice(m, 2, replace=False)
            samples[:, i] = samples[:, j] * 10.0 ** rng.uniform(-3, 3)
            with pytest.raises(SingularError):
                ddnref.eigh_generalized(np.eye(m, dtype=dtype), (samples.T @ samples).astype(dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_input(bad, xp, rng):
    a, b = pencil(basis(rng, 3, (2,)), np.arange(3.0))
    for i, name in enumerate("ab"):
        matrices = [a.copy(), b.copy()]
        matrices[i][1, 0, 2] = bad
        w, v = ddnref.eigh_generalized(*map(xp.asarray, matrices))  # not an error, as in eigh
        assert np.all(np.isnan(xp.numpy(w)[1]))
        assert np.all(np.isnan(xp.numpy(v)[1]))
        assert np.all(np.isfinite(xp.numpy(v)[0]))
        with pytest.raises(ddnref.NonFiniteError, match=rf"{name} contains NaN or infinity"):
            ddnref.eigh_generalized(*map(xp.asarray, matrices), check_finite=True)


def test_static_facts(rng):
    a, b = pencil(basis(rng, 4, (2,)), np.arange(4.0))
    w, v = ddnref.eigh_generalized(a, b)
    forward, vjp, jvp = ddnref.eigh_generalized, ddnref.eigh_generalized_vjp, ddnref.eigh_generalized_jvp
    for function, args, options, error, match in [
        (forward, (a, b.astype("float32")), {}, TypeError, "b has dtype float32, expected float64"),
        (forward, (a, b.astype(complex)), {}, TypeError, "b has dtype complex128, expected float64"),
        (forward, (a[..., :3], b), {}, ValueError, "a has shape"),
        (forward, (a, b[0]), {}, ValueError, r"b has shape \(4, 4\), expected \(2, 4, 4\)"),
        (forward, (a, None), {}, TypeError, "b is None"),
        (forward, (a, b.tolist()), {}, TypeError, "b is a builtins.list"),
        (forward, (a.astype(int), b.astype(int)), {}, TypeError, "a has dtype int64"),
        (vjp, (None, None, w, v), {}, TypeError, "both None"),
        (vjp, (w[..., :2], None, w, v), {}, ValueError, r"w_bar has shape \(2, 2\), expected \(2, 4\)"),
        (vjp, (w, v.astype(complex), w, v), {}, TypeError, "v_bar has dtype complex128"),
        (vjp, (w, None, w[0], v), {}, ValueError, "w has shape"),
        (vjp, (w, None, w, v), {"index": (0, 4)}, ValueError, "index"),
        (jvp, (None, None, w, v), {}, TypeError, "both None"),
        (jvp, (a, b[0], w, v), {}, ValueError, "b_dot has shape"),
        (jvp, (a, b.astype("float32"), w, v), {}, TypeError, "b_dot has dtype float32"),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            function(*args, **options)


def test_host_reads(host_reads, rng):
    """One flag with the default checks, none without."""
    import array_api_strict as strict

    a, b = (strict.asarray(x) for x in pencil(basis(rng, 4, (2,)), np.arange(4.0)))
    for throw, expected in ((True, ["__bool__"]), (False, [])):
        host_reads.clear()
        w, v = ddnref.eigh_generalized(a, b, throw=throw)
        assert host_reads == expected
        for function, args in ((ddnref.eigh_generalized_vjp, (w, v)), (ddnref.eigh_generalized_jvp, (a, b))):
            host_reads.clear()
            function(*args, w, v, throw=throw)
            assert host_reads == expected


# --- second derivatives -----------------------------------------------------------------------------------------


@pytest.mark.framework("torch")
@pytest.mark.parametrize("is_complex", [False, True])
def test_second_derivatives_in_torch(is_complex, torch, rng):
    from ddnref.interop.torch import differentiable

    a, b = (torch.asarray(x).requires_grad_() for x in pencil(basis(rng, 4, (), is_complex), np.arange(4.0)))
    function = differentiable(ddnref.eigh_generalized)

    def invariant(a, b):
        w, v = function(a, b)
        return w, v.abs() ** 2, v[..., :1, :] * v[..., 1:2, :].conj()

    assert torch.autograd.gradcheck(invariant, (a, b))
    assert torch.autograd.gradgradcheck(invariant, (a, b))


@pytest.mark.framework("torch")
def test_second_derivatives_are_refused_at_repeated_eigenvalues(torch, rng):
    from ddnref.interop.torch import differentiable

    a, b = (torch.asarray(x).requires_grad_() for x in pencil(basis(rng, 6), TRIPLE))
    w, _ = differentiable(ddnref.eigh_generalized)(a, b)
    (a_bar,) = torch.autograd.grad((w**3).sum(), a, create_graph=True)
    with pytest.raises(GaugeError, match="eigh_generalized was asked for at repeated eigenvalues"):
        a_bar.sum().backward()
