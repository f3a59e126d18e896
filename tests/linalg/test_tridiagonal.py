"""Tridiagonal and block tridiagonal systems: small pivots, singular items, bands that broadcast, forms that agree."""

from functools import partial

import numpy as np
import pytest
from problems import adjoint, relative

import ddnref
from conftest import Backend, backend
from ddnref._kernels import tridiagonal
from ddnref.reference import thomas_solve
from ddnref.testing import assert_vjp, numerical_jvp

NUMPY = Backend("numpy", np)
EPS = np.finfo(float).eps
FORMS = {
    False: (ddnref.solve_tridiagonal, ddnref.solve_tridiagonal_vjp, ddnref.solve_tridiagonal_jvp),
    True: (ddnref.solve_block_tridiagonal, ddnref.solve_block_tridiagonal_vjp, ddnref.solve_block_tridiagonal_jvp),
}
kinds = pytest.mark.parametrize("blocks", [False, True], ids=["numbers", "blocks"])
fields = pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])


def normal(rng, shape, is_complex=False):
    z = rng.standard_normal((2, *shape))
    return z[0] + 1j * z[1] if is_complex else z[0]


def dense(bands, blocks):
    """The matrix of one system."""
    lower, diagonal, upper = bands if blocks else (band[:, None, None] for band in bands)
    n, k = diagonal.shape[:2]
    a = np.zeros((n, k, n, k), diagonal.dtype)
    for i in range(n):
        a[i, :, i] = diagonal[i]
        if i + 1 < n:
            a[i + 1, :, i], a[i, :, i + 1] = lower[i], upper[i]
    return a.reshape(n * k, n * k)


def system(rng, n, blocks, is_complex=False, batch=(), k=3):
    """Random bands, neither symmetric nor dominant."""
    more = (k, k) if blocks else ()
    bands = tuple(normal(rng, (*batch, count, *more), is_complex) for count in (n - 1, n, n - 1))
    return bands, normal(rng, (*batch, n, *more[:1]), is_complex)


def backward_error(a, x, b):
    a, x, b = (np.asarray(z, np.result_type(z, np.float64)) for z in (a, x, b))
    size = np.linalg.norm(a, 2) * np.linalg.norm(x) + np.linalg.norm(b)
    return np.linalg.norm(a @ x.ravel() - b.ravel()) / size


@kinds
@fields
@pytest.mark.parametrize("n", [1, 2, 3, 6, 13])
def test_backward_error_without_dominance(n, blocks, is_complex, xp, rng):
    bands, b = system(rng, n, blocks, is_complex)
    x = xp.numpy(FORMS[blocks][0](*map(xp.asarray, (*bands, b))))
    assert x.shape == b.shape
    assert backward_error(dense(bands, blocks), x, b) <= 10 * EPS


def zero_diagonal(n, rng):
    return np.ones(n - 1), np.zeros(n), np.ones(n - 1)


def small_pivots(n, rng):
    """The leading blocks are nearly singular, the matrix is not."""
    return np.full(n - 1, 1.0), np.where(np.arange(n) % 2 == 0, 1e-12, 1.0), np.full(n - 1, -1.0)


def shifted(n, rng):
    """The second difference between two of its eigenvalues."""
    j = n // 3
    between = 2 - np.cos(j * np.pi / (n + 1)) - np.cos((j + 1) * np.pi / (n + 1))
    return np.full(n - 1, -1.0), np.full(n, 2 - between), np.full(n - 1, -1.0)


def rotations(n, rng):
    return np.full(n - 1, 0.8), 1e-3 * rng.standard_normal(n), rng.choice([-0.9, 0.9], n - 1)


def units(n, rng):
    """Rows and columns in different units."""
    r, c = 10.0 ** rng.uniform(-8, 8, (2, n))
    lower, diagonal, upper = np.full(n - 1, 1.0), np.full(n, 0.5), np.full(n - 1, -1.0)
    return lower * r[1:] * c[:-1], diagonal * r * c, upper * r[:-1] * c[1:]


@pytest.mark.parametrize("make", [zero_diagonal, small_pivots, shifted, rotations])
def test_small_pivots_do_no_harm(make, xp, rng):
    """Without exchanges of rows, elimination in their order fails on these or loses digits."""
    n = 64
    bands, b = make(n, rng), rng.standard_normal(n)
    a = dense(bands, False)
    x = xp.numpy(ddnref.solve_tridiagonal(*map(xp.asarray, (*bands, b))))
    assert backward_error(a, x, b) <= 10 * EPS
    with np.errstate(all="ignore"):
        naive = thomas_solve(*bands, b)
    if make in (zero_diagonal, small_pivots):
        assert not relative(naive, np.linalg.solve(a, b)) <= 1e-8
        assert relative(x, np.linalg.solve(a, b)) <= 1e-12


def test_the_scale_of_rows_and_columns_does_not_matter(xp, rng):
    n = 16
    state = np.random.default_rng(3)
    bands, b = units(n, state), rng.standard_normal(n)
    import mpmath

    with mpmath.workdps(60):
        exact = mpmath.lu_solve(mpmath.matrix(dense(bands, False).tolist()), mpmath.matrix(b.tolist()))
        exact = np.asarray([float(v) for v in exact])
    x = xp.numpy(ddnref.solve_tridiagonal(*map(xp.asarray, (*bands, b))))
    assert np.max(np.abs(x / exact - 1)) <= 1e-11


@kinds
@pytest.mark.parametrize("decades", [4, 8, 12])
def test_ill_conditioned_ones_against_fifty_digits(decades, blocks, xp, rng):
    """The error of solution and gradients grows with the condition, about eps κ, and with nothing else."""
    import mpmath

    bands, b = system(rng, 6, blocks, k=2)
    a = dense(bands, blocks)
    # Move an eigenvalue of the symmetric part close to zero by a shift of the diagonal.
    w = np.linalg.eigvals(a)
    shift = w[np.argmin(np.abs(w.imag))].real - 10.0**-decades if np.any(np.abs(w.imag) < 1e-12) else 0.0
    diagonal = bands[1] - shift * (np.eye(2) if blocks else 1.0)
    bands = bands[0], diagonal, bands[2]
    a = dense(bands, blocks)
    x_bar = rng.standard_normal(b.shape)
    with mpmath.workdps(50):
        matrix = mpmath.matrix(a.tolist())
        exact = [mpmath.lu_solve(matrix, mpmath.matrix(b.ravel().tolist())),
                 mpmath.lu_solve(matrix.T, mpmath.matrix(x_bar.ravel().tolist()))]  # fmt: skip
        x_exact, y_exact = (np.asarray([float(v) for v in z]) for z in exact)
    limit = 10 * EPS * np.linalg.cond(a)
    solve, vjp, _ = FORMS[blocks]
    given = tuple(map(xp.asarray, bands))
    x = solve(*given, xp.asarray(b))
    assert relative(xp.numpy(x).ravel(), x_exact) <= limit
    bars = xp.tuple(vjp(xp.asarray(x_bar), x, *given))
    assert relative(bars[3].ravel(), y_exact) <= limit
    full = -np.outer(y_exact, x_exact)
    expected = np.zeros_like(full)
    expected[a != 0] = full[a != 0]
    assert relative(dense(bars[:3], blocks), expected) <= 2 * limit


@kinds
@fields
def test_finite_differences(blocks, is_complex, rng):
    bands, b = system(rng, 5, blocks, is_complex, k=2)
    diagonal = bands[1] + 3 * (np.eye(2) if blocks else 1.0)
    forward, vjp, _ = FORMS[blocks]
    inputs = (bands[0], diagonal, bands[2], np.stack([b, 2 * b, normal(rng, b.shape, is_complex)]))
    report = assert_vjp(forward, vjp, *inputs, needs=(0, 1, 2, 3), saves=False)
    assert report.error <= 1e-9


LEADS = [
    ((), (), (), ()),
    ((), (), (), (3,)),
    ((2,), (2,), (2,), (2,)),
    ((2,), (), (), ()),
    ((), (2, 1), (3,), (5, 2, 3)),
    ((1,), (2,), (1,), (4, 2)),
    ((0,), (0,), (0,), (0,)),
    ((), (), (), (0,)),
]
CASES = [
    *((lead, False, False) for lead in LEADS),
    *((((), (2,), (1,), (3, 2)), *mixed) for mixed in ((True, False), (False, True), (True, True))),
]


@kinds
@pytest.mark.parametrize(("leads", "a_complex", "b_complex"), CASES)
def test_all_inputs_broadcast_and_their_gradients_are_sums(leads, a_complex, b_complex, blocks, xp, rng):
    """Derivatives of each item by itself, summed, and the transpose identity between the two modes."""
    n, k = 4, 2
    more = (k, k) if blocks else ()
    bands = [normal(rng, (*lead, count, *more), a_complex)
             for lead, count in zip(leads[:3], (n - 1, n, n - 1), strict=True)]  # fmt: skip
    bands[1] = bands[1] + 4 * (np.eye(k) if blocks else 1.0)
    b = normal(rng, (*leads[3], n, *more[:1]), b_complex)
    solve, vjp, jvp = FORMS[blocks]
    x = xp.numpy(solve(*map(xp.asarray, (*bands, b))))
    lead = np.broadcast_shapes(*leads)
    assert x.shape == (*lead, n, *more[:1])
    own = 3 if blocks else 1
    whole = [np.broadcast_to(band, (*lead, *band.shape[band.ndim - own :])) for band in bands]
    rights = np.broadcast_to(b, x.shape)
    for item in np.ndindex(lead):
        a = dense([band[item] for band in whole], blocks)
        np.testing.assert_allclose(x[item].ravel(), np.linalg.solve(a, rights[item].ravel()), atol=1e-12)

    x_bar = normal(rng, x.shape, np.iscomplexobj(x))
    dots = [normal(rng, z.shape, np.iscomplexobj(z)) for z in (*bands, b)]
    given = tuple(map(xp.asarray, (x, *bands, b)))
    bars = xp.tuple(vjp(xp.asarray(x_bar), *given))
    x_dot = xp.numpy(jvp(*map(xp.asarray, dots), *given))
    assert [bar.shape for bar in bars] == [z.shape for z in (*bands, b)]
    assert [bar.dtype for bar in bars] == [z.dtype for z in (*bands, b)]
    assert x_dot.dtype == x.dtype
    forward = np.sum(np.conj(x_bar) * x_dot).real
    backward = sum(np.sum(np.conj(u) * v).real for u, v in zip(bars, dots, strict=True))
    assert abs(forward - backward) <= 1e-12 * np.linalg.norm(x_bar) * np.linalg.norm(x_dot)
    if x.size and xp.name == "numpy":
        moved = lambda t: solve(*(z + t * d for z, d in zip((*bands, b), dots, strict=True)))
        assert relative(x_dot, numerical_jvp(moved, np.zeros(1), np.ones(1), step=1e-3)) <= 1e-9


@kinds
def test_without_the_right_hand_side(blocks, xp, rng):
    """It is needed for its shape only where it was broadcast."""
    bands, b = system(rng, 5, blocks, batch=(2,))
    solve, vjp, jvp = FORMS[blocks]
    given = tuple(map(xp.asarray, bands))
    x = solve(*given, xp.asarray(b))
    with_b, without = vjp(x, x, *given, xp.asarray(b)), vjp(x, x, *given)
    for u, v in zip(with_b, without, strict=True):
        assert np.array_equal(xp.numpy(u), xp.numpy(v))
    dot = xp.asarray(b[:1] * 2)
    moved = xp.numpy(jvp(None, None, None, dot, x, *given))
    assert relative(moved, xp.numpy(solve(*given, dot))) <= 1e-14
    alone = [jvp(*(d if i == j else None for j, d in enumerate(given)), None, x, *given) for i in range(3)]
    together = jvp(*given, None, x, *given)
    assert relative(sum(map(xp.numpy, alone)), xp.numpy(together)) <= 1e-11
    assert relative(xp.numpy(together), -xp.numpy(x)) <= 1e-10  # of twice the matrix, half the solution


@kinds
def test_a_singular_item_raises_or_is_nan_alone(blocks, xp, rng):
    bands, b = system(rng, 5, blocks, batch=(5,))
    bands[1][1] = 0  # an odd number of zeros on the diagonal: exactly singular
    second = dense([np.full(4, -1.0), np.asarray([1.0, 2, 2, 2, 1]), np.full(4, -1.0)], False)  # but for rounding
    for band, value in zip(bands, (-0.1, None, -0.1), strict=True):
        band[2] = 0
        if value:
            band[2] = value * (np.eye(3) if blocks else 1.0)
    bands[1][2] = np.einsum("i,jk->ijk", 0.1 * np.diagonal(second), np.eye(3)) if blocks else 0.1 * np.diagonal(second)
    bands[0][3].flat[2] = np.nan
    b[4].flat[1] = np.inf
    given, right = tuple(map(xp.asarray, bands)), xp.asarray(b)
    solve, vjp, jvp = FORMS[blocks]
    says = r"2 of 5 matrices are singular to working precision \(items 1, 2\).*ridge.*throw=False"
    with pytest.raises(ddnref.SingularError, match=says):
        solve(*given, right)
    x = solve(*given, right, throw=False)
    with pytest.raises(ddnref.SingularError, match="items 1, 2"):
        vjp(right, x, *given)
    with pytest.raises(ddnref.SingularError, match="items 1, 2"):
        jvp(None, None, None, right, x, *given)
    ones = xp.asarray(np.ones(b.shape))
    bars = vjp(ones, x, *given, right, throw=False)
    for array in (x, *bars, jvp(*given, ones, x, *given, right, throw=False)):
        flags = np.isnan(xp.numpy(array).reshape(5, -1))
        assert flags.all(axis=-1).tolist() == flags.any(axis=-1).tolist() == [False, True, True, True, True]
    alone = solve(*(band[0, ...] for band in given), right[0, ...])
    assert relative(xp.numpy(x)[0], xp.numpy(alone)) <= 1e-13


@kinds
@fields
@pytest.mark.parametrize("n", [1, 2, 9, 30])
def test_both_forms_agree(blocks, is_complex, n, rng):
    """LAPACK's and the one that halves; on matrices from regular to singular they give the same verdict."""
    strict = backend("array-api-strict")
    k = 3 if blocks else 1
    (lower, diagonal, upper), _ = system(rng, n, True, is_complex, batch=(12,), k=k)
    b = normal(rng, (12, n * k, 2), is_complex)
    # The determinant of the first five is 10^-2 … 10^-17 of what it was, so that their condition is as much larger.
    exponents = (2, 5, 8, 11, 17)
    for i, exponent in enumerate(exponents):
        inverse = np.linalg.inv(dense((lower[i], diagonal[i], upper[i]), True))
        j = np.argmax(np.abs(np.diagonal(inverse)))
        diagonal[i, j // k, j % k, j % k] -= (1 - 10.0**-exponent) / inverse[j, j]
    x, singular = tridiagonal.solve_and_judge(lower, diagonal, upper, b)
    with np.errstate(all="ignore"):  # as public functions do
        theirs = tridiagonal.solve_and_judge(*map(strict.asarray, (lower, diagonal, upper, b)))
    y, flags = map(strict.numpy, theirs)
    assert np.array_equal(singular, flags)
    assert singular.tolist() == [False] * 4 + [True] + [False] * 7
    for i in np.flatnonzero(~singular):
        limit = 20 * EPS * np.linalg.cond(dense((lower[i], diagonal[i], upper[i]), True))
        assert relative(x[i], y[i]) <= limit
    turned = tridiagonal.adjoint_bands((lower, diagonal, upper))
    z = tridiagonal.solve(*turned, b)[~singular]
    a = np.stack([dense(bands, True) for bands in zip(lower, diagonal, upper, strict=True)])[~singular]
    residual = np.linalg.norm(adjoint(a) @ z - b[~singular], axis=(-2, -1))
    assert np.all(residual <= 100 * EPS * np.linalg.norm(a, axis=(-2, -1)) * np.linalg.norm(z, axis=(-2, -1)))


@kinds
def test_single_precision(blocks, xp, rng):
    bands, b = system(rng, 9, blocks, batch=(2,))
    bands = bands[0], bands[1] + 5 * (np.eye(3) if blocks else 1.0), bands[2]
    solve, vjp, jvp = FORMS[blocks]
    x = solve(*bands, b)
    dots = [normal(rng, z.shape) for z in (*bands, b)]
    exact = (x, *vjp(x, x, *bands), jvp(*dots, x, *bands))
    given, dots = ([xp.asarray(z.astype(np.float32)) for z in arrays] for arrays in ((*bands, b), dots))
    x = solve(*given)
    found = (x, *vjp(x, x, *given[:3]), jvp(*dots, x, *given[:3]))
    for ours, wanted in zip(found, exact, strict=True):
        assert xp.numpy(ours).dtype == np.float32
        assert relative(xp.numpy(ours), wanted) <= 1e-4


def test_the_longest_system(xp, rng):
    """The number of steps elsewhere than on NumPy grows with the logarithm, and nothing is lost on the way."""
    n = 300 if xp.name == "jax" else 3000  # every halving is compiled
    lower, upper = rng.standard_normal((2, n - 1))
    diagonal, b = rng.standard_normal((2, n))
    x = xp.numpy(ddnref.solve_tridiagonal(*map(xp.asarray, (lower, diagonal, upper, b)), throw=False))
    product = tridiagonal.product(tuple(z[:, None, None] for z in (lower, diagonal, upper)), x)
    assert np.linalg.norm(product - b) <= 10 * EPS * 4 * np.linalg.norm(x)


@kinds
def test_static_errors(blocks, rng):
    (lower, diagonal, upper), b = system(rng, 4, blocks)
    solve, vjp, jvp = FORMS[blocks]
    with pytest.raises(ValueError, match=r"lower has shape .*, expected \(..., 3.*\) beside a diagonal of shape"):
        solve(diagonal, diagonal, upper, b)
    with pytest.raises(ValueError, match=r"upper has shape .*, expected \(..., 3.*\) beside a diagonal of shape"):
        solve(lower, diagonal, upper[1:], b)
    with pytest.raises(ValueError, match=r"b has shape .*, expected \(..., 4.*\) beside a diagonal of shape"):
        solve(lower, diagonal, upper, b[1:])
    with pytest.raises(ValueError, match="diagonal has shape"):
        solve(lower[:0], diagonal[:0], upper[:0], b[:0])
    batch = lambda z, n: np.broadcast_to(z, (n, *z.shape))
    with pytest.raises(ValueError, match=r"the leading axes \(3,\) of upper do not broadcast .* \(2,\) of diagonal"):
        solve(batch(lower, 2), diagonal, batch(upper, 3), b)
    with pytest.raises(ValueError, match=r"the leading axes \(3,\) of b do not broadcast .* \(2,\) of the bands"):
        solve(batch(lower, 2), diagonal, upper, batch(b, 3))
    with pytest.raises(TypeError, match="lower has dtype float32, expected float64"):
        solve(lower.astype(np.float32), diagonal, upper, b)
    with pytest.raises(TypeError, match="upper has dtype complex128, expected float64"):
        solve(lower, diagonal, upper + 0j, b)
    with pytest.raises(TypeError, match="one precision"):
        solve(lower, diagonal, upper, b.astype(np.float32))
    with pytest.raises(TypeError, match="diagonal has dtype int64"):
        solve(lower, diagonal.astype(np.int64), upper, b)
    with pytest.raises(TypeError, match="one library"):
        solve(backend("array-api-strict").asarray(lower), diagonal, upper, b)
    x = solve(lower, diagonal, upper, b)
    with pytest.raises(ValueError, match=r"x_bar has shape .*, expected \(4"):
        vjp(batch(x, 2), x, lower, diagonal, upper)
    with pytest.raises(ValueError, match=r"x has leading axes \(\), expected \(2,\): the solution for these bands"):
        vjp(x, x, batch(lower, 2), diagonal, upper)
    with pytest.raises(TypeError, match="lower_dot, diagonal_dot, upper_dot and b_dot are all None"):
        jvp(None, None, None, None, x, lower, diagonal, upper)
    with pytest.raises(ValueError, match=r"upper_dot has shape .*, expected \(3"):
        jvp(None, None, diagonal, None, x, lower, diagonal, upper)
    with pytest.raises(ValueError, match=r"b_dot has shape .*, but the solution belongs to"):
        jvp(None, None, None, batch(b, 2), x, lower, diagonal, upper)
    if blocks:
        with pytest.raises(ValueError, match=r"diagonal has shape \(4, 3, 2\), expected \(..., n, k, k\)"):
            solve(lower, diagonal[..., :2], upper, b)


@kinds
def test_one_flag_is_read(blocks, host_reads, rng):
    strict = backend("array-api-strict")
    bands, b = system(rng, 5, blocks, batch=(2,))
    given = tuple(map(strict.asarray, (*bands, b)))
    solve, vjp, jvp = FORMS[blocks]
    x = solve(*given, throw=False)
    vjp(x, x, *given, throw=False)
    jvp(*given, x, *given, throw=False)
    assert host_reads == []
    solve(*given)
    vjp(x, x, *given)
    jvp(*given, x, *given)
    assert host_reads == ["__bool__"] * 3


@kinds
def test_arguments_are_not_changed(blocks, rng):
    bands, b = system(rng, 5, blocks, batch=(2,))
    bands[0][0] *= 1e6  # rows in different units
    copies = [z.copy() for z in (*bands, b)]
    solve, vjp, jvp = FORMS[blocks]
    x = solve(*bands, b)
    kept = x.copy()
    vjp(x, x, *bands, b)
    jvp(*bands, b, x, *bands, b)
    for now, before in zip((*bands, b, x), (*copies, kept), strict=True):
        assert np.array_equal(now, before)


@kinds
def test_under_jit(blocks, jax, rng):
    on = backend("jax")
    bands, b = system(rng, 6, blocks)
    x = on.lift(partial(FORMS[blocks][0], throw=False))(*bands, b)
    assert backward_error(dense(bands, blocks), x, b) <= 10 * EPS
