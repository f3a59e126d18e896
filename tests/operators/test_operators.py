"""Linear operators: every constructor is what it says, on every library, alone and in a batch."""

from functools import partial

import numpy as np
import pytest
from operator_cases import EDGES, GRID, NAMES, case, vectors

from ddnref import operators
from ddnref import operators as _operators
from ddnref._kernels import grid as kernel
from ddnref.operators import _grid

KINDS = pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
CASES = pytest.mark.parametrize("name", NAMES)


def everything(operator):
    """Return all that an operator computes, as one function of arrays."""

    def run(params, x, y):
        a = operator.with_params(*params)
        fast = a.prepared()
        return (
            a.apply(a.params, x), a.adjoint(a.params, y), *a.params_vjp(a.params, y, x),
            fast.apply(fast.params, x), fast.adjoint(fast.params, y),
        )  # fmt: skip

    return run


# --- each constructor -------------------------------------------------------------------------------------------


@CASES
@KINDS
@pytest.mark.parametrize("batch", [(), (2,)], ids=["alone", "batch"])
def test_is_what_it_says(name, is_complex, batch):
    """Dot products, finite differences to 1e-7, linearity, flags, batch against loop, prepared against plain."""
    report = operators.check_operator(case(name, is_complex=is_complex, batch=batch))
    names = {check.name for check in report.checks}
    assert {"adjoint", "linearity of apply", "batch of apply"} <= names


@CASES
def test_real_operators_take_complex_vectors(name):
    """The gradients of real parameters are then real, too."""
    operator = case(name)
    x, y = vectors(operator, (), True)
    operators.check_operator(operator, x)
    assert all(bar.dtype == np.float64 for bar in operator.params_vjp(operator.params, y, x))


@CASES
def test_libraries_agree(name, xp):
    for is_complex in (False, True):
        here, there = (
            case(name, is_complex=is_complex, batch=(2,)),
            case(name, xp.asarray, is_complex=is_complex, batch=(2,)),
        )
        x, y = vectors(here, (3, 2), is_complex)
        y = y + 0j if name == "scaled by a complex number" else y
        wanted = everything(here)(here.params, x, y)
        found = xp.jit(everything(there))(there.params, xp.asarray(x), xp.asarray(y))
        assert len(found) == len(wanted)
        for z, z_here in zip(found, wanted, strict=True):
            assert xp.numpy(z).dtype == z_here.dtype
            np.testing.assert_allclose(xp.numpy(z), z_here, rtol=0, atol=1e-12 * (1 + np.max(np.abs(z_here))))


@CASES
@KINDS
def test_single_precision(name, is_complex):
    single = case(name, is_complex=is_complex, dtype=np.float32)
    double = single.with_params(*(p.astype(np.complex128 if p.dtype.kind == "c" else float) for p in single.params))
    x, y = vectors(single, (), is_complex, np.float32)
    y = y + np.complex64(0) if name == "scaled by a complex number" else y
    for z, wanted in zip(everything(single)(single.params, x, y), everything(double)(double.params, x, y), strict=True):
        assert z.dtype in (np.float32, np.complex64)
        np.testing.assert_allclose(z, wanted, rtol=0, atol=1e-4 * (1 + np.max(np.abs(wanted))))


@CASES
def test_parameters_of_a_batch(name):
    """Items of a batch are the operators with their parameters, also for several right-hand sides."""
    operator = case(name, batch=(2,))
    x, y = vectors(operator, (3, 2), False)
    y = y + 0j if name == "scaled by a complex number" else y
    together = everything(operator)(operator.params, x, y)
    n = len(operator.params)
    for i in range(2):
        alone = everything(operator)(tuple(p[i] for p in operator.params), x[:, i], y[:, i])
        for k, (z, wanted) in enumerate(zip(together, alone, strict=True)):
            np.testing.assert_allclose(z[i] if 2 <= k < 2 + n else z[:, i], wanted, rtol=1e-12, atol=1e-12)


@CASES
def test_one_vector_for_a_batch_of_parameters(name):
    operator = case(name, batch=(2,))
    x, _ = vectors(operator, (), False)
    y = operator(np.broadcast_to(x, (2, *x.shape)))
    for a in (operator, operator.prepared()):
        np.testing.assert_allclose(a.apply(a.params, x) + 0 * y, y, rtol=1e-13, atol=1e-13)


@CASES
def test_a_shared_parameter_gets_the_sum(name):
    operator = case(name)
    x, y = vectors(operator, (3, 2), False)
    bars = operator.params_vjp(operator.params, y, x)
    items = [operator.params_vjp(operator.params, y[i, j], x[i, j]) for i in range(3) for j in range(2)]
    assert [bar.shape for bar in bars] == [p.shape for p in operator.params]
    for bar, each in zip(bars, zip(*items, strict=True), strict=True):
        np.testing.assert_allclose(bar, sum(each), rtol=1e-12, atol=1e-12)


@CASES
def test_an_empty_batch(name, xp):
    operator = case(name, xp.asarray)
    x, y = (xp.asarray(np.zeros((0, *shape))) for shape in (operator.domain_shape, operator.range_shape))
    a_x, a_y, *bars, fast_x, fast_y = xp.jit(everything(operator))(operator.params, x, y)
    assert {tuple(z.shape) for z in (a_x, fast_x)} == {tuple(y.shape)}
    assert {tuple(z.shape) for z in (a_y, fast_y)} == {tuple(x.shape)}
    for bar, p in zip(bars, operator.params, strict=True):
        np.testing.assert_array_equal(xp.numpy(bar), np.zeros(p.shape))


@CASES
def test_another_device(name, second):
    operator = case(name, second.asarray)
    x, y = (second.asarray(z) for z in vectors(operator, (2,), False))
    y = operator(x) if name == "scaled by a complex number" else y
    for z in everything(operator)(operator.params, x, y):
        assert z.device == x.device


def test_host_reads(host_reads):
    from conftest import backend

    strict = backend("array-api-strict")
    for name in NAMES:
        operator = case(name, strict.asarray)
        x, y = (strict.asarray(z) for z in vectors(operator, (2,), False))
        y = operator(x) if name == "scaled by a complex number" else y
        host_reads.clear()
        everything(operator)(operator.params, x, y)
        assert host_reads == [], name


# --- against their definitions ----------------------------------------------------------------------------------


@KINDS
def test_convolution_is_the_sum_of_its_definition(is_complex):
    for kernel_shape, shape in (((3,), (5,)), ((4, 3), (4, 5)), ((2, 1, 3), (3, 2, 4)), ((5,), (5,))):
        rng = np.random.default_rng(3)
        k, x = rng.standard_normal(kernel_shape), rng.standard_normal(shape)
        k, x = (k * (1 + 2j), x + 1j * x[::-1]) if is_complex else (k, x)
        wanted = np.zeros_like(x)
        for j in np.ndindex(*kernel_shape):
            offset = [a - b // 2 for a, b in zip(j, kernel_shape, strict=True)]
            wanted += k[j] * np.roll(x, offset, axis=range(len(shape)))  # x_{i − (j − c)}
        np.testing.assert_allclose(operators.convolution(k, shape)(x), wanted, atol=1e-13)


SCIPY_MODES = {"periodic": "wrap", "zero": "constant", "reflect": "reflect"}


@pytest.mark.parametrize("boundary", SCIPY_MODES)
def test_borders_are_those_of_scipy(boundary, xp, rng):
    import scipy.ndimage

    for kernel_shape, shape in (((3,), (5,)), ((5,), (5,)), ((4,), (7,)), ((2, 3), (4, 6)), ((4, 5), (4, 5)),
                                ((1, 2, 3), (2, 3, 3))):  # fmt: skip
        k, x = rng.standard_normal(kernel_shape), rng.standard_normal(shape)
        operator = operators.convolution(xp.asarray(k), shape, boundary=boundary)
        wanted = scipy.ndimage.convolve(x, k, mode=SCIPY_MODES[boundary])
        np.testing.assert_allclose(xp.numpy(operator(xp.asarray(x))), wanted, atol=1e-13)


def test_the_flags_of_a_symmetric_kernel_hold_at_every_border():
    kernel = np.outer([1.0, 4.0, 1.0], [1.0, 3.0, 1.0])
    for boundary in SCIPY_MODES:
        operators.check_operator(operators.convolution(kernel, (4, 6), boundary=boundary, positive_definite=True))
    skew = operators.convolution(np.asarray([-1.0, 2.0, 2.0]), 5, boundary="reflect", self_adjoint=True)
    assert not operators.check_operator(skew, throw=False).passed


def test_only_a_periodic_convolution_has_a_cheaper_normal_operator():
    has = {b: operators.convolution(np.ones(3), 5, boundary=b).gram is not None for b in SCIPY_MODES}
    assert has == {"periodic": True, "zero": False, "reflect": False}


@KINDS
def test_toeplitz_is_the_matrix_of_scipy(is_complex, xp, rng):
    import scipy.linalg

    for n, m in ((1, 1), (4, 4), (5, 2), (1, 4), (3, 1)):
        c, r = rng.standard_normal(n), rng.standard_normal(m)
        if is_complex:
            c, r = c + 1j * rng.standard_normal(n), r + 1j * rng.standard_normal(m)
        matrix = operators.toeplitz(xp.asarray(c), xp.asarray(r)).matrix()
        np.testing.assert_allclose(xp.numpy(matrix), scipy.linalg.toeplitz(c, r), atol=1e-14)
        c[0] = c[0].real
        hermitian = operators.toeplitz(xp.asarray(c))
        np.testing.assert_allclose(xp.numpy(hermitian.matrix()), scipy.linalg.toeplitz(c), atol=1e-14)
        assert hermitian.self_adjoint


def test_toeplitz_of_a_real_column_and_a_complex_row(rng):
    """The gradients are real and complex, and the entry that both state is that of the column."""
    c, r = rng.standard_normal((2, 4)), rng.standard_normal(3) + 1j
    operator = operators.toeplitz(c, r)
    operators.check_operator(operator)
    x, y = vectors(operator, (2,), True)
    c_bar, r_bar = operator.params_vjp(operator.params, y, x)
    assert (c_bar.dtype, r_bar.dtype) == (np.float64, np.complex128)
    assert (c_bar.shape, r_bar[0]) == ((2, 4), 0)


@pytest.mark.parametrize(
    ("boundary", "last"),
    [("periodic", [1, 0, 0, -1]), ("replicate", [0, 0, 0, 0]), ("zero", [0, 0, 0, -1])],
)
def test_difference_is_its_matrix(boundary, last, xp):
    d = np.eye(4, k=1) - np.eye(4)
    d[3] = last
    line = operators.difference(4, axis=0, boundary=boundary)
    like = xp.asarray(np.zeros(1))
    np.testing.assert_array_equal(xp.numpy(line.matrix(like)), d)
    np.testing.assert_array_equal(xp.numpy(operators.adjoint(line).matrix(like)), d.T)
    grid = operators.difference((3, 4), boundary=boundary)
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    y = xp.numpy(grid(xp.asarray(x)))
    assert (grid.range_shape, y.shape) == ((2, 3, 4), (2, 2, 3, 4))
    np.testing.assert_allclose(y[:, 1], x @ d.T, atol=1e-15)
    operators.check_operator(grid, np.zeros((3, 4)))
    for size in (1, 2):
        operators.check_operator(operators.difference((size, 3), boundary=boundary), np.zeros((size, 3)))
    laplacian = operators.normal(grid, np.asarray([0.0, 0.5])).prepared()
    wanted = np.stack([operators.adjoint(grid)(grid(x[i])) + i * 0.5 * x[i] for i in range(2)])
    np.testing.assert_allclose(laplacian(x), wanted, atol=1e-14)


def test_difference_along_chosen_axes():
    x = np.random.default_rng(0).standard_normal((3, 4, 2))
    whole = operators.difference((3, 4, 2))(x)
    np.testing.assert_array_equal(operators.difference((3, 4, 2), axis=(2, 0))(x), whole[[2, 0]])
    np.testing.assert_array_equal(operators.difference((3, 4, 2), axis=-2)(x), whole[1])


@KINDS
def test_algebra_of_matrices(is_complex):
    """An operator built from others has the matrix built from their matrices."""
    k, d = case("convolution", is_complex=is_complex), case("diagonal", is_complex=is_complex)
    a, b = k.matrix(), d.matrix()
    c = np.asarray(0.7 - 0.2j if is_complex else 0.7)
    h = np.conj(a.T)
    for operator, matrix in (
        (operators.dense(a), a),
        (operators.scaled(k, c), c * a),
        (operators.scaled(k, 0.7), 0.7 * a),
        (operators.add(k, d, k), a + b + a),
        (operators.compose(k, d, k), a @ b @ a),
        (operators.adjoint(k), h),
        (operators.stack(k, d), np.concatenate([a, b])),
        (operators.normal(k), h @ a),
        (operators.normal(k, 0.5), h @ a + 0.5 * np.eye(20)),
        (
            operators.normal(operators.stack(k, d), np.asarray(0.5)),
            h @ a + np.conj(b.T) @ b + 0.5 * np.eye(20),
        ),
    ):
        like = a if operator.params == () else None
        np.testing.assert_allclose(operator.matrix(like), matrix, atol=1e-12)
        np.testing.assert_allclose(operator.prepared().matrix(a[0]), matrix, atol=1e-12)


def test_matrix_of_a_batch(xp):
    a = np.random.default_rng(0).standard_normal((2, 3, 4))
    np.testing.assert_array_equal(xp.numpy(operators.dense(xp.asarray(a)).matrix()), a)


def test_stacked_ranges():
    k, d, g = case("convolution"), case("diagonal"), operators.difference(GRID)
    x, _ = vectors(k, (3,), False)
    np.testing.assert_array_equal(operators.stack(k, d)(x), np.stack([k(x), d(x)], axis=1))
    unequal = operators.stack(k, g)
    assert unequal.range_shape == (60,)
    np.testing.assert_array_equal(unequal(x), np.concatenate([k(x).reshape(3, 20), g(x).reshape(3, 40)], axis=1))


@KINDS
def test_block_diagonal_and_kronecker_are_their_matrices(is_complex, rng):
    import scipy.linalg

    a, b, c = (rng.standard_normal(shape) * (1 + 1j if is_complex else 1) for shape in ((3, 2), (2, 2), (2, 4)))
    k = case("convolution", is_complex=is_complex)
    for operator, wanted in (
        (operators.block_diagonal(a, b, c), scipy.linalg.block_diag(a, b, c)),
        (operators.block_diagonal(b, b.T), scipy.linalg.block_diag(b, b.T)),
        (operators.block_diagonal(a, b), scipy.linalg.block_diag(a, b)),
        (operators.kronecker(a), a),
        (operators.kronecker(a, b), np.kron(a, b)),
        (operators.kronecker(a, c, b), np.kron(np.kron(a, c), b)),
        (operators.kronecker(a, k, c), np.kron(np.kron(a, k.matrix()), c)),
        (operators.kronecker(a, operators.difference(3), c), np.kron(np.kron(a, np.eye(3, k=1) - np.eye(3) +
                                                                             np.eye(3, k=-2)), c)),
    ):  # fmt: skip
        np.testing.assert_allclose(operator.matrix(), wanted, atol=1e-13)
        np.testing.assert_allclose(operator.prepared().matrix(a), wanted, atol=1e-13)
        np.testing.assert_allclose(operator.H.matrix(), np.conj(wanted.T), atol=1e-13)


def test_domains_of_blocks_and_of_kronecker_products():
    k, d, g = case("convolution"), case("diagonal"), operators.difference(GRID)
    assert operators.block_diagonal(k, d).domain_shape == (2, *GRID)
    mixed = operators.block_diagonal(k, g)
    assert (mixed.domain_shape, mixed.range_shape) == ((2, *GRID), (60,))
    both = operators.kronecker(g, k)
    assert (both.domain_shape, both.range_shape) == ((*GRID, *GRID), (2, *GRID, *GRID))
    x, _ = vectors(k, (3,), False)
    left = operators.compose(operators.block_diagonal(k, d), operators.stack(d, k))
    np.testing.assert_allclose(left(x), operators.stack(operators.compose(k, d), operators.compose(d, k))(x))
    outer = np.einsum("ij,kl->ijkl", x[0], x[1])
    np.testing.assert_allclose(operators.kronecker(k, d)(outer), np.einsum("ij,kl->ijkl", k(x[0]), d(x[1])), atol=1e-12)


def test_kronecker_products_of_parameters_with_different_batch_axes(rng):
    """Vectors along the other axes must not meet a batch axis of the parameters, as long as it may be."""
    a, b = rng.standard_normal((2, 3, 3)), rng.standard_normal((3, 1, 2, 2))
    operator = operators.kronecker(a, b)
    x = rng.standard_normal((3, 2))
    wanted = np.einsum("cij,bukl,jl->bcik", a, b, x)
    np.testing.assert_allclose(operator(x), wanted, atol=1e-13)
    np.testing.assert_allclose(operator(np.broadcast_to(x, (5, 3, 2, 3, 2)))[4], wanted, atol=1e-13)
    operators.check_operator(operator)
    assert operators.kronecker(np.zeros((2, 1, 0)), np.zeros((2, 3, 4)))(np.ones((0, 4))).shape == (2, 1, 3)


@pytest.mark.parametrize("form", ["array", "tuple", "list", "pair of the library"])
def test_laplacian_is_degrees_minus_weights(form, xp, rng):
    edges, w = np.asarray(EDGES), rng.standard_normal((2, len(EDGES)))
    ends = tuple(xp.namespace.asarray(edges[:, k]) for k in (0, 1))
    given = {"array": xp.namespace.asarray(edges), "tuple": tuple(edges.T), "list": list(EDGES)}.get(form, ends)
    operator = operators.laplacian(given, xp.asarray(w), 6)
    adjacency = np.zeros((2, 6, 6))
    for k, (i, j) in enumerate(EDGES):
        adjacency[:, i, j] += w[:, k] * (i != j)
        adjacency[:, j, i] += w[:, k] * (i != j)
    wanted = np.sum(adjacency, axis=-1)[..., None] * np.eye(6) - adjacency
    np.testing.assert_allclose(xp.numpy(operator.matrix()), wanted, atol=1e-14)
    assert flags(operator) == (True, False)
    constant = xp.numpy(operator(xp.asarray(np.full(6, 0.1))))
    np.testing.assert_array_equal(constant, np.zeros((2, 6)))


def test_laplacians_of_graphs_without_edges_or_nodes():
    no_edges = operators.laplacian(np.zeros((0, 2), int), np.zeros(0), 3)
    np.testing.assert_array_equal(no_edges(np.ones((2, 3))), np.zeros((2, 3)))
    assert operators.laplacian(np.zeros((0, 2), int), np.zeros(0), 0)(np.ones((2, 0))).shape == (2, 0)


def test_laplacians_of_equal_edges_share_what_is_made_of_them():
    first, second = (operators.laplacian(np.asarray(EDGES), np.ones(len(EDGES)), 6) for _ in range(2))
    assert first.apply == second.apply
    other = operators.laplacian(np.asarray(EDGES)[::-1], np.ones(len(EDGES)), 6)
    assert other.apply != first.apply
    assert operators.laplacian(np.asarray(EDGES), np.ones(len(EDGES)), 7).apply != first.apply


def test_a_boolean_mask(xp):
    keep = np.asarray([[True, False], [True, True]])
    operator = operators.mask(xp.namespace.asarray(keep), (2, 2))
    assert operator.params[0].dtype == xp.namespace.zeros(()).dtype
    x = xp.namespace.ones((2, 2))
    np.testing.assert_array_equal(xp.numpy(operator(x)), keep)


# --- flags ------------------------------------------------------------------------------------------------------


def flags(operator):
    return operator.self_adjoint, operator.positive_definite


def test_flags():
    free, symmetric = operators.dense(np.ones((2, 2))), operators.dense(np.eye(2), self_adjoint=True)
    positive, number = operators.dense(np.eye(2), positive_definite=True), np.asarray(2.0)
    assert [flags(a) for a in (free, symmetric, positive)] == [(False, False), (True, False), (True, True)]
    kernel = np.ones(1)
    assert flags(operators.convolution(kernel, 3)) == (False, False)
    assert flags(operators.convolution(kernel, 3, self_adjoint=True)) == (True, False)
    assert flags(operators.convolution(kernel, 3, positive_definite=True)) == (True, True)
    assert flags(operators.diagonal(kernel)) == flags(operators.mask(kernel)) == (True, False)
    assert flags(operators.diagonal(kernel, positive_definite=True)) == (True, True)
    assert flags(operators.diagonal(kernel + 0j)) == (False, False)
    assert flags(operators.toeplitz(kernel)) == flags(operators.toeplitz(kernel + 0j)) == (True, False)
    assert flags(operators.toeplitz(kernel, kernel)) == (False, False)
    assert flags(operators.toeplitz(kernel, positive_definite=True)) == (True, True)
    assert flags(operators.scaled(positive, 2.0)) == (True, True)
    assert flags(operators.scaled(positive, -2.0)) == flags(operators.scaled(positive, number)) == (True, False)
    assert flags(operators.scaled(positive, number, positive_definite=True)) == (True, True)
    assert flags(operators.scaled(positive, 2j)) == flags(operators.scaled(positive, number + 0j)) == (False, False)
    assert flags(operators.add(positive, positive)) == (True, True)
    assert flags(operators.add(positive, symmetric)) == (True, False)
    assert flags(operators.add(positive, symmetric, positive_definite=True)) == (True, True)
    assert flags(operators.add(positive, free)) == (False, False)
    assert flags(operators.compose(positive)) == (True, True)
    assert flags(operators.compose(positive, positive)) == (False, False)
    assert flags(operators.compose(positive, positive, self_adjoint=True)) == (True, False)
    assert flags(operators.compose(positive, positive, positive_definite=True)) == (True, True)
    assert flags(operators.stack(positive, positive)) == (False, False)
    for make in (operators.block_diagonal, operators.kronecker):
        assert flags(make(positive, positive)) == (True, True)
        assert flags(make(positive, symmetric)) == (True, False)
        assert flags(make(positive, free)) == (False, False)
    assert all(flags(operators.adjoint(a)) == flags(a) for a in (free, symmetric, positive))
    assert flags(operators.normal(free)) == (True, False)
    assert flags(operators.normal(free, positive_definite=True)) == (True, True)
    assert flags(operators.normal(free, number)) == flags(operators.normal(free, 0.5)) == (True, True)
    assert flags(operators.normal(free, 0.0, positive_definite=False)) == (True, False)


@CASES
def test_prepared_operators_keep_shapes_and_flags(name):
    operator = case(name)
    fast = operator.prepared()
    assert flags(fast) == flags(operator)
    assert (fast.domain_shape, fast.range_shape) == (operator.domain_shape, operator.range_shape)


# --- speed that can be counted ----------------------------------------------------------------------------------


@pytest.fixture
def transforms(monkeypatch):
    """Shapes of the arrays that were transformed."""
    seen = []

    def counted(original, x, n):
        seen.append(tuple(x.shape))
        return original(x, n)

    for module in (_grid, kernel):
        monkeypatch.setattr(module, "transform", partial(counted, module.transform))
    return seen


def test_a_prepared_spectrum_is_computed_once(transforms):
    operator = operators.normal(operators.convolution(np.ones((2, 2)), GRID), np.asarray(0.1))
    fast = operator.prepared()
    assert len(fast.params) == 1  # |k̂|² + ρ, real
    assert fast.params[0].dtype == np.float64
    before = len(transforms)
    fast(np.ones(GRID))
    assert len(transforms) - before == 1, "one transform there, and one back"
    both = operators.add(operator, operators.scaled(operators.compose(operator, operator), np.asarray(2.0))).prepared()
    before = len(transforms)
    both(np.ones(GRID))
    assert len(transforms) - before == 3, "no spectrum is computed again"


def test_the_numpy_form_is_the_standard_one(rng, monkeypatch):
    """In chunks or whole, for factors with and without batch axes."""

    def standard(x, factor, shape):
        axes = tuple(range(-len(shape), 0))
        if np.iscomplexobj(x):
            return np.fft.ifftn(np.fft.fftn(x, axes=axes) * factor, axes=axes)
        return np.fft.irfftn(np.fft.rfftn(x, axes=axes) * factor, s=shape, axes=axes)

    for shape, half in (((6,), (4,)), ((4, 5), (4, 3)), ((2, 3, 4), (2, 3, 3))):
        for chunk in (1, 30, 2**16):
            monkeypatch.setattr(kernel, "PART", chunk)
            for lead in ((), (5,), (3, 2)):
                for batch in {(), lead[-1:], (1,) * len(lead), (*lead[:1], 1)[: len(lead)], lead}:
                    x, factor = rng.standard_normal((*lead, *shape)), rng.standard_normal((*batch, *half))
                    for given in (factor, factor + 1j * rng.standard_normal(factor.shape)):
                        found = kernel.filtered(x, kernel.multiplier(given, shape), shape, True)
                        np.testing.assert_allclose(found, standard(x, given, shape), atol=1e-13)
                    whole = rng.standard_normal((*batch, *shape))
                    found = kernel.filtered(x, kernel.multiplier(whole, shape), shape, False)
                    np.testing.assert_allclose(found, standard(x + 0j, whole, shape), atol=1e-13)


def test_arguments_are_not_written_to(rng):
    for name in NAMES:
        operator = case(name, batch=(2,))
        x, y = vectors(operator, (2,), False)
        y = y + 0j if name == "scaled by a complex number" else y
        for z in (x, y, *operator.params):
            z.flags.writeable = False
        everything(operator)(operator.params, x, y)


@pytest.mark.graphs
@pytest.mark.framework("torch")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_traces_under_torch_compile():
    import torch

    operator = case("normal", torch.asarray)
    x, y = (torch.asarray(z) for z in vectors(operator, (), False))
    run = everything(operator)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for z, wanted in zip(compiled(operator.params, x, y), run(operator.params, x, y), strict=True):
        torch.testing.assert_close(z, wanted)


# --- bad input --------------------------------------------------------------------------------------------------


K, D, E = np.ones((3, 3)), np.ones((4, 4)), np.asarray([[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: operators.dense(np.ones((2, 2), dtype=int)), TypeError, "a has dtype int64"),
        (lambda: operators.dense([[1.0]]), TypeError, "a is a builtins.list"),
        (lambda: operators.dense(np.ones(3)), ValueError, "a has shape"),
        (lambda: operators.dense(np.ones((3, 2)), self_adjoint=True), ValueError, "only a square matrix"),
        (lambda: operators.diagonal(np.ones(3), (4,)), ValueError, "d has shape"),
        (lambda: operators.diagonal(np.asarray(1.0)), ValueError, "d has shape"),
        (lambda: operators.diagonal(np.ones(3, dtype=complex), positive_definite=True), TypeError, "is real"),
        (lambda: operators.diagonal(np.ones(3, dtype=np.float16)), TypeError, "d has dtype float16"),
        (lambda: operators.mask(np.ones(3, dtype=int)), TypeError, "m has dtype int64"),
        (lambda: operators.mask(np.ones(3, dtype=complex)), TypeError, "a mask is real"),
        (lambda: operators.mask([True]), TypeError, "m is a builtins.list"),
        (lambda: operators.convolution(np.ones((5, 3)), (4, 4)), ValueError, "longer than the grid's"),
        (lambda: operators.convolution(np.ones(3), (4, 4)), ValueError, "expected 2 axes"),
        (lambda: operators.convolution(np.ones((0, 3)), (4, 4)), ValueError, "none empty"),
        (lambda: operators.convolution(K, (0, 4)), ValueError, "one to three axes, none of them empty"),
        (lambda: operators.convolution(np.ones((1,) * 4), (2,) * 4), ValueError, "one to three axes"),
        (lambda: operators.convolution(np.ones((3, 3), dtype=int), (4, 4)), TypeError, "kernel has dtype int64"),
        (lambda: operators.convolution(K, (4, 4), boundary="replicate"), ValueError, "boundary is 'replicate'"),
        (lambda: operators.toeplitz(np.asarray(1.0)), ValueError, r"column has shape \(\), expected"),
        (lambda: operators.toeplitz(np.ones(2), np.ones(0)), ValueError, r"row has shape \(0,\)"),
        (lambda: operators.toeplitz(np.ones(2), np.ones(2, np.float32)), TypeError, "one precision"),
        (lambda: operators.toeplitz(np.ones(2, int)), TypeError, "column has dtype int64"),
        (lambda: operators.toeplitz(D[0], D[0], positive_definite=True), ValueError, "leave out row"),
        (lambda: operators.laplacian(E, np.ones(2) + 0j, 3), TypeError, "the weights of a graph are real"),
        (lambda: operators.laplacian(E, np.ones(3), 3), ValueError, r"weights has shape \(3,\), expected \(..., 2\)"),
        (lambda: operators.laplacian(E, np.ones(2), 2), ValueError, "edges has values from 1 to 2, expected 0 to 1"),
        (lambda: operators.laplacian(-E, np.ones(2), 3), ValueError, "edges has values from -1 to 0"),
        (lambda: operators.laplacian(E, np.ones(2), 3.0), TypeError, "n is 3.0, expected an integer"),
        (lambda: operators.laplacian(E, np.ones(2), -1), ValueError, "n is -1"),
        (lambda: operators.laplacian(E / 1, np.ones(2), 3), TypeError, "edges has dtype float64, expected integers"),
        (lambda: operators.laplacian(E[:, :1], np.ones(2), 3), ValueError, r"edges has shape \(2, 1\), expected"),
        (lambda: operators.laplacian((E, E, E), np.ones(2), 3), ValueError, "edges is a tuple of 3 arrays"),
        (lambda: operators.laplacian((E, E), np.ones(2), 3), ValueError, r"edges\[0\] has shape \(2, 2\)"),
        (lambda: operators.laplacian((E[0], E[0, :1]), np.ones(2), 3), ValueError, "edges has 2 and 1 nodes"),
        (lambda: operators.difference((4, -1)), ValueError, "cannot be negative"),
        (lambda: operators.difference((4, 0)), ValueError, "no empty one"),
        (lambda: operators.difference((4,), axis=1), ValueError, "axis is 1"),
        (lambda: operators.difference((4, 3), axis=(0, -2)), ValueError, "different axes"),
        (lambda: operators.difference((4,), boundary="reflect"), ValueError, "boundary is 'reflect'"),
        (lambda: operators.scaled(D, np.ones((), dtype=np.float32)), TypeError, "one precision.*c: float32"),
        (lambda: operators.scaled(D, np.asarray(2)), TypeError, "c has dtype int64"),
        (lambda: operators.add(), TypeError, "add needs at least one"),
        (lambda: operators.compose(), TypeError, "compose needs"),
        (lambda: operators.stack(), TypeError, "stack needs"),
        (lambda: operators.block_diagonal(), TypeError, "block_diagonal needs"),
        (lambda: operators.kronecker(), TypeError, "kronecker needs"),
        (lambda: operators.kronecker(D, "eye"), TypeError, r"operators\[1\] is a str"),
        (lambda: operators.kronecker(D, np.ones((4, 4), dtype=np.float32)), TypeError, "one precision"),
        (lambda: operators.add(D, np.ones((3, 4))), ValueError, r"operators\[1\].range_shape"),
        (lambda: operators.add(D, np.ones((4, 3))), ValueError, r"operators\[1\].domain_shape"),
        (lambda: operators.compose(D, np.ones((3, 4))), ValueError, r"operators\[0\].domain_shape is \(4,\)"),
        (lambda: operators.stack(D, np.ones((4, 3))), ValueError, r"operators\[1\].domain_shape"),
        (lambda: operators.add(D, np.ones((4, 4), dtype=np.float32)), TypeError, "one precision"),
        (lambda: operators.add(D, "eye"), TypeError, r"operators\[1\] is a str"),
        (lambda: operators.normal(D, np.asarray(1j)), TypeError, "damping has dtype complex128"),
        (lambda: operators.normal(D, 1j), TypeError, "damping is 1j"),
        (lambda: operators.normal(D, np.ones((), dtype=np.float32)), TypeError, "one precision"),
        (lambda: operators.dense(D).with_params(D, D), ValueError, "2 parameters given; this operator has 1"),
        (lambda: operators.difference(4).matrix(), TypeError, "pass like="),
    ],
)  # fmt: skip
def test_bad_operators(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((4, 5)), ValueError, r"x has shape \(4, 5\), expected \(..., 4, 4\)"),
        (np.ones(4), ValueError, r"x has shape \(4,\)"),
        (np.ones((4, 4), dtype=int), TypeError, "x has dtype int64"),
        (np.ones((4, 4), dtype=np.float32), TypeError, "one precision"),
        ([[1.0]], TypeError, "x is a builtins.list"),
    ],
)
def test_bad_vectors(x, error, message):
    with pytest.raises(error, match=message):
        operators.convolution(K, (4, 4))(x)


def test_libraries_are_not_mixed():
    import array_api_strict

    kernel, d = array_api_strict.ones((2, 2), dtype=array_api_strict.float64), np.ones((4, 4))
    with pytest.raises(TypeError, match="one library"):
        operators.add(operators.convolution(kernel, (4, 4)), operators.diagonal(d, (4, 4)))
    with pytest.raises(TypeError, match="one library"):
        operators.convolution(kernel, (4, 4))(d)


def test_a_prepared_operator_refuses_gradients():
    x = np.ones((4, 4))
    for operator in (
        operators.convolution(K, (4, 4)),
        operators.normal(operators.diagonal(x, (4, 4)), 0.1),
    ):
        fast = operators.adjoint(operator).prepared()
        with pytest.raises(TypeError, match="prepared operator has no params_vjp"):
            fast.params_vjp(fast.params, x, x)


def test_scalars_of_numpy_are_parameters():
    """Scalars that NumPy's functions return are parameters; Python's numbers are constants."""
    a = np.eye(2, dtype=np.float32)
    for c in (np.exp(np.asarray(0.5, dtype=np.float32)), np.asarray(2.0, dtype=np.float32)):
        for operator in (operators.scaled(a, c), operators.normal(a, c)):
            assert operator.params[1].dtype == np.float32
            assert operator(a[0]).dtype == np.float32
    assert not operators.scaled(operators.dense(a, positive_definite=True), np.float32(2)).positive_definite
    assert len(operators.scaled(a, 2.0).params) == len(operators.normal(a, 2.0).params) == 1
    with pytest.raises(TypeError, match="one precision"):
        operators.scaled(a, np.float64(2.0))


def test_arrays_stand_for_dense_operators():
    a = np.arange(6.0).reshape(2, 3)
    assert _operators.as_operator(operators.dense(a)).params[0] is a
    np.testing.assert_array_equal(operators.as_operator(a).matrix(), a)
    with pytest.raises(TypeError, match="b is a list, expected a LinearOperator or an array"):
        operators.as_operator([[1.0]], "b")


@pytest.mark.parametrize("make", ["toeplitz", "convolution"])
def test_real_maps_of_a_batch_take_one_complex_vector(make, rng):
    """The real and the imaginary part are an axis that must not meet that of the batch, here of the same length."""
    k, x = rng.standard_normal((2, 3)), rng.standard_normal(5) + 1j * rng.standard_normal(5)
    if make == "toeplitz":
        k = rng.standard_normal((2, 5))
        batch, one = operators.toeplitz(k), [operators.toeplitz(row) for row in k]
    else:
        batch, one = operators.convolution(k, (5,)), [operators.convolution(row, (5,)) for row in k]
    for product, parts in ((batch(x), [a(x) for a in one]), (batch.H(x), [a.H(x) for a in one])):
        np.testing.assert_allclose(product, np.stack(parts), rtol=1e-13)
