"""SciPy's and PyLops' operators taken in, ours handed to SciPy."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg as linalg
from operator_cases import case

from ddnref import operators


def matrix(rng, n=6, m=5, is_complex=False):
    a = rng.standard_normal((n, m)) * (rng.random((n, m)) < 0.5)
    return a * (1 + 0.5j) if is_complex else a


class Minimal:
    """The protocol of a PyLops operator, and no more: products with one vector, and the shapes of its grids."""

    def __init__(self, a, dims, dimsd):
        self.a, self.dims, self.dimsd, self.shape, self.dtype = a, dims, dimsd, a.shape, a.dtype

    def matvec(self, x):
        assert x.shape == (self.a.shape[1],)
        return self.a @ x

    def rmatvec(self, y):
        assert y.shape == (self.a.shape[0],)
        return np.conj(self.a.T) @ y


# --- taken in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csr_array", "csc_array", "coo_array", "csr_matrix", "dia_array"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_sparse_matrices(kind, is_complex, rng):
    dense = matrix(rng, is_complex=is_complex)
    sparse = getattr(scipy.sparse, kind)(dense)
    a = operators.from_scipy(sparse)
    stored = sparse if kind in ("csr_array", "csc_array", "csr_matrix") else sparse.tocsr()
    np.testing.assert_array_equal(a.params[0], stored.data)
    np.testing.assert_allclose(a.matrix(), dense)
    assert operators.check_operator(a).passed
    x = rng.standard_normal((2, 3, 5))
    np.testing.assert_allclose(a(x), x @ dense.T, atol=1e-14)
    y = rng.standard_normal((2, 3, 6))
    (bar,) = a.params_vjp(a.params, y, x)
    whole = np.einsum("bci,bcj->ij", y, x)  # of a dense matrix, at the stored places
    entries = stored.tocoo()
    np.testing.assert_allclose(bar, whole[entries.row, entries.col], atol=1e-13)
    assert bar.dtype == dense.dtype


def test_a_sparse_matrix_with_other_values(rng):
    sparse = scipy.sparse.csr_array(matrix(rng))
    before = sparse.data.copy()
    a = operators.from_scipy(sparse)
    np.testing.assert_allclose(a.with_params(2 * before).matrix(), 2 * sparse.toarray())
    np.testing.assert_array_equal(sparse.data, before)


def test_empty_and_single_precision(rng):
    single = scipy.sparse.csr_array(matrix(rng).astype(np.float32))
    a = operators.from_scipy(single)
    x = rng.standard_normal((2, 5)).astype(np.float32)
    assert a(x).dtype == a.params_vjp(a.params, a(x), x)[0].dtype == np.float32
    assert a(np.zeros((0, 5), np.float32)).shape == (0, 6)
    np.testing.assert_array_equal(a.params_vjp(a.params, a(x[:0]), x[:0])[0], 0 * single.data)
    b = operators.from_scipy(Minimal(matrix(rng), (5,), (6,)))
    assert b(np.zeros((0, 5))).shape == (0, 6)


@pytest.mark.parametrize("is_complex", [False, True])
def test_scipy_operators(is_complex, rng):
    dense = matrix(rng, is_complex=is_complex)
    a = operators.from_scipy(linalg.aslinearoperator(dense), domain_shape=(5,), range_shape=(2, 3))
    assert (a.params, a.domain_shape, a.range_shape) == ((), (5,), (2, 3))
    assert operators.check_operator(a, np.zeros((2, 5), dtype=dense.dtype)).passed
    x = rng.standard_normal((4, 5))
    np.testing.assert_allclose(a(x), (x @ dense.T).reshape(4, 2, 3), atol=1e-14)


def test_the_protocol_of_pylops(rng):
    dense = matrix(rng, 6, 4)
    a = operators.from_scipy(Minimal(dense, (2, 2), (3, 2)))
    assert (a.domain_shape, a.range_shape) == ((2, 2), (3, 2))
    assert operators.check_operator(a, np.zeros((2, 2))).passed
    np.testing.assert_allclose(a.matrix(np.zeros(1)), dense)


def test_flags_are_taken_over():
    eye = scipy.sparse.eye_array(3, format="csr")
    a = operators.from_scipy(eye)
    assert (a.self_adjoint, a.positive_definite) == (False, False)
    assert operators.from_scipy(eye, self_adjoint=True)[6:8] == (True, False)
    assert operators.from_scipy(eye, positive_definite=True)[6:8] == (True, True)


def test_in_an_expression(rng):
    """A foreign operator among ours, differentiated with respect to its values and ours."""
    sparse = scipy.sparse.csr_array(matrix(rng, 5, 5))
    a = operators.normal(
        operators.add(operators.from_scipy(sparse), operators.diagonal(rng.standard_normal(5))),
        np.asarray(0.3),
    )
    assert operators.check_operator(a).passed


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: operators.from_scipy(np.eye(3)),
            TypeError,
            "operator is a ndarray.*Arrays go to ddnref.operators.dense",
        ),
        (
            lambda: operators.from_scipy(scipy.sparse.eye_array(3, dtype=int)),
            TypeError,
            "operator has dtype int64",
        ),
        (
            lambda: operators.from_scipy(scipy.sparse.eye_array(3), domain_shape=(2, 2)),
            ValueError,
            "domain_shape is",
        ),
        (lambda: operators.from_scipy(scipy.sparse.eye_array(3), range_shape=4), ValueError, "range_shape is"),
        (
            lambda: operators.from_scipy(scipy.sparse.csr_array(np.ones((2, 3))), self_adjoint=True),
            ValueError,
            "cannot be self-adjoint",
        ),
        (lambda: operators.from_scipy(scipy.sparse.csr_array(np.eye(3)))(np.ones(4)), ValueError, "x has shape"),
    ],
)
def test_bad_operators(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_other_libraries_are_refused():
    import array_api_strict

    x = array_api_strict.ones(3, dtype=array_api_strict.float64)
    for a in (
        operators.from_scipy(scipy.sparse.eye_array(3)),
        operators.from_scipy(Minimal(np.eye(3), (3,), (3,))),
    ):
        for product in (a.apply, a.adjoint):
            with pytest.raises(TypeError, match="computes with NumPy arrays: nothing is moved"):
                product(a.params, x)


# --- handed over ------------------------------------------------------------------------------------------------


def test_scipy_solves_with_ours(rng):
    """cg, lsqr and eigsh of SciPy on an operator of ours, held to dense algebra."""
    blur = case("convolution")
    k = blur.matrix()
    system = operators.to_scipy(operators.normal(blur, np.asarray(0.5)))
    b = rng.standard_normal(20)
    x, status = linalg.cg(system, b, rtol=1e-12)
    assert status == 0
    np.testing.assert_allclose(x, np.linalg.solve(k.T @ k + 0.5 * np.eye(20), b), rtol=1e-9)
    rectangular = operators.compose(operators.difference((4, 5), boundary="zero"), blur)
    g = rectangular.matrix()
    b = rng.standard_normal(40)
    x = linalg.lsqr(operators.to_scipy(rectangular), b, atol=1e-13, btol=1e-13)[0]
    np.testing.assert_allclose(x, np.linalg.lstsq(g, b)[0], rtol=1e-7)
    w = linalg.eigsh(system, 3, return_eigenvectors=False, v0=np.ones(20))
    np.testing.assert_allclose(np.sort(w), np.linalg.eigvalsh(k.T @ k + 0.5 * np.eye(20))[-3:], rtol=1e-10)


@pytest.mark.parametrize("is_complex", [False, True])
def test_there_and_back(is_complex, rng):
    operator = case("stack of unequal ranges", is_complex=is_complex)
    theirs = operators.to_scipy(operator)
    assert (theirs.shape, theirs.dtype) == ((60, 20), operator.params[0].dtype)
    dense, x, y = operator.matrix(), rng.standard_normal((20, 3)), rng.standard_normal((60, 3))
    np.testing.assert_allclose(theirs @ x, dense @ x, atol=1e-12)
    np.testing.assert_allclose(theirs.rmatmat(y), np.conj(dense.T) @ y, atol=1e-12)
    np.testing.assert_allclose(theirs.matvec(x[:, 0]), dense @ x[:, 0], atol=1e-12)
    np.testing.assert_allclose(theirs.rmatvec(y[:, 0]), np.conj(dense.T) @ y[:, 0], atol=1e-12)
    back = operators.from_scipy(theirs, domain_shape=operator.domain_shape)
    np.testing.assert_allclose(back.matrix(dense), dense, atol=1e-12)


def test_dtypes_handed_over():
    assert operators.to_scipy(operators.difference(4)).dtype == np.float64
    assert operators.to_scipy(operators.difference(4), dtype=np.float32).dtype == np.float32
    assert operators.to_scipy(operators.diagonal(np.ones(3, np.float32))).dtype == np.float32
    assert operators.to_scipy(operators.scaled(operators.diagonal(np.ones(3)), 1j)).dtype == np.complex128


def test_what_cannot_be_handed_over():
    import array_api_strict

    with pytest.raises(TypeError, match="parameters of array_api_strict"):
        operators.to_scipy(operators.diagonal(array_api_strict.ones(3, dtype=array_api_strict.float64)))
    with pytest.raises(ValueError, match="batch axes, which SciPy's operators do not have"):
        operators.to_scipy(operators.diagonal(np.ones((2, 3))))
