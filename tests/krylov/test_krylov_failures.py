"""How the Krylov solvers fail: each status, its message, and that nothing wrong comes back as right."""

import numpy as np
import pytest
from krylov_problems import MATRICES, SOLVERS, definite, indefinite, solve, vectors
from problems import relative, rotation, with_spectrum

from ddnref import ConvergenceError, krylov
from ddnref.krylov import _system as common
from ddnref.operators import LinearOperator

NAMES = tuple(SOLVERS)
SQUARE = NAMES[:4]
MESSAGES = {
    common.NOT_POSITIVE_DEFINITE: "pᴴAp ≤ 0: the operator is not positive definite",
    common.BREAKDOWN: "broke down",
    common.STAGNATION: "stagnated",
    common.NOT_FINITE: "met NaN or infinity",
    common.PRECONDITIONER_NOT_POSITIVE_DEFINITE: "rᴴMr ≤ 0: the preconditioner is not positive definite",
}


def fails(name, status, *args, **options):
    """Check for that status without `throw` and for its error with it; return x and info."""
    x, info = SOLVERS[name](*args, throw=False, **options)
    assert np.any(info.status == status), info
    assert not np.any(info.converged & (info.status != 0))
    with pytest.raises(ConvergenceError, match=MESSAGES[status]):
        SOLVERS[name](*args, **options)
    return x, info


def singular(rng, n, batch=()):
    return with_spectrum(rotation(rng, n, batch), np.concatenate([[0.0], np.linspace(1.0, 5.0, n - 1)]))


# --- statuses ---------------------------------------------------------------------------------------------------


def test_indefinite_operator_in_cg(xp, rng):
    """At once, or after some steps; next to a definite one."""
    a = np.stack([definite(rng, 12), indefinite(rng, 12), -definite(rng, 12)])
    b = rng.standard_normal((3, 12))
    x, info = solve(xp, "cg", xp.asarray(a), xp.asarray(b))
    assert list(xp.numpy(info.status)) == [0, common.NOT_POSITIVE_DEFINITE, common.NOT_POSITIVE_DEFINITE]
    assert np.all(np.isfinite(xp.numpy(x)))
    assert xp.numpy(info.n_iter)[2] == 0
    fails("cg", common.NOT_POSITIVE_DEFINITE, a[1], b[1])


@pytest.mark.parametrize("name", ["cg", "minres"])
def test_indefinite_preconditioner(name, xp, rng):
    """Found by the first product for one item, later for another; the third has a good one."""
    a, b = definite(rng, 20, (3,)), rng.standard_normal((3, 20))
    d = np.ones((3, 20))
    d[0] = -1
    d[1, :2] = -0.2
    m = xp.asarray(d)
    x, info = solve(xp, name, xp.asarray(a), xp.asarray(b), preconditioner=lambda r: m * r)
    status = [common.PRECONDITIONER_NOT_POSITIVE_DEFINITE] * 2 + [0]
    assert list(xp.numpy(info.status)) == status
    n_iter = xp.numpy(info.n_iter)
    assert n_iter[0] == 0
    assert n_iter[1] > 0
    assert np.all(np.isfinite(xp.numpy(x)))
    fails(name, status[0], a[0], b[0], preconditioner=lambda r: -r)


def test_breakdown_in_bicgstab(xp, rng):
    """ρ or r̃ᴴAp vanishes for an operator without a symmetric part; others in the batch do not mind."""
    z = rng.standard_normal((10, 10))
    shift = np.roll(np.eye(10), 1, axis=0)
    a = np.stack([shift, 3 * np.eye(10) + z / 4, 0 * z])
    b = np.stack([np.eye(10)[0], rng.standard_normal(10), rng.standard_normal(10)])
    x, info = solve(xp, "bicgstab", xp.asarray(a), xp.asarray(b), rtol=1e-10)
    assert list(xp.numpy(info.status)) == [common.BREAKDOWN, 0, common.BREAKDOWN]
    assert relative(xp.numpy(x)[1], np.linalg.solve(a[1], b[1])) <= 1e-8
    fails("bicgstab", common.BREAKDOWN, shift, b[0])
    x, info = krylov.bicgstab(z - z.T, b[1], throw=False)  # runs away
    assert info.status != 0
    assert np.isfinite(info.residual_norm)


def test_stagnation_in_gmres(xp):
    shift = np.roll(np.eye(8), 1, axis=0)
    x, info = solve(xp, "gmres", xp.asarray(np.stack([shift, np.eye(8)])), xp.asarray(np.eye(8)[0]), restart=5)
    assert list(xp.numpy(info.status)) == [common.STAGNATION, 0]
    np.testing.assert_array_equal(xp.numpy(info.residual_norm), [1, 0])
    np.testing.assert_array_equal(xp.numpy(x)[1], np.eye(8)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_tolerance_below_rounding(name, rng):
    """Reported with the residual that there is, which is as small as rounding lets it be."""
    a = MATRICES[name](rng, 20)
    b = a @ rng.standard_normal(20)
    _, info = SOLVERS[name](a, b, rtol=1e-17, throw=False, maxiter=3000)
    assert info.status in (common.STAGNATION, common.ITERATION_LIMIT)
    assert info.residual_norm <= 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_singular_operators(name, xp, rng):
    """Solved where b is in the range; reported where it is not, but for least squares, which has a solution."""
    a = singular(rng, 16)
    b = np.stack([a @ rng.standard_normal(16), rng.standard_normal(16)])
    x, info = solve(xp, name, xp.asarray(a), xp.asarray(b), maxiter=400)
    converged, x = xp.numpy(info.converged), xp.numpy(x)
    assert converged[0]
    assert np.linalg.norm(b[0] - a @ x[0]) <= 1e-7 * np.linalg.norm(b[0])
    assert bool(converged[1]) == (name == "lsmr")
    if name in ("lsmr", "minres"):
        best = np.linalg.lstsq(a, b[1], rcond=1e-10)[0]
        assert np.linalg.norm(b[1] - a @ x[1]) <= (1 + 1e-6) * np.linalg.norm(b[1] - a @ best)
        assert name == "lsmr" or xp.numpy(info.status)[1] == common.STAGNATION


def test_cg_names_a_null_space_that_rounding_makes_positive(xp):
    """p is nearly in the null space, pᴴAp is rounding, and iterates grow by 1/eps a step: not a defect of the input."""
    a, b = np.diag([1.0, 0.0]), np.asarray([[0.41163054, 1.04251337], [1.0, 0.0], [np.inf, 1.0]])
    x, info = solve(xp, "cg", xp.asarray(a), xp.asarray(b))
    assert list(xp.numpy(info.status)) == [common.NOT_POSITIVE_DEFINITE, common.CONVERGED, common.NOT_FINITE]
    assert np.all(np.isfinite(xp.numpy(x)[:2]))
    fails("cg", common.NOT_POSITIVE_DEFINITE, a, b[0])
    fails("cg", common.NOT_POSITIVE_DEFINITE, a.astype(np.float32), b[0].astype(np.float32))
    fails("cg", common.NOT_FINITE, np.diag([1.0, np.inf]), b[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_zero_operator(name):
    _, info = SOLVERS[name](np.zeros((4, 4)), np.ones(4), throw=False)
    assert bool(info.converged) == (name == "lsmr")
    assert info.residual_norm == 1


@pytest.mark.parametrize("name", NAMES)
def test_nan_from_start_or_preconditioner(name, rng):
    a = MATRICES[name](rng, 8)
    b = vectors(rng, a.shape[:1])
    x, _ = fails(name, common.NOT_FINITE, a, b, x0=np.full(8, np.nan))
    assert np.all(np.isnan(x))
    if name != "lsmr":
        fails(name, common.NOT_FINITE, a, b, preconditioner=lambda r: r * np.nan)


def test_residual_that_drifted_is_replaced(rng):
    """Next to the solution from a start that is far away: the recurrence meets the tolerance, b − A x does not."""
    a, b = definite(rng, 60, condition=1e3), rng.standard_normal(60)
    far = 1e9 * rng.standard_normal(60)
    for name in SQUARE:
        _, cold = SOLVERS[name](a, b, rtol=1e-9, maxiter=6000)
        x, info = SOLVERS[name](a, b, x0=far, rtol=1e-9, maxiter=6000)
        assert np.linalg.norm(b - a @ x) <= 1.1e-9 * np.linalg.norm(b)
        assert info.n_iter > cold.n_iter


def test_every_status_is_counted_in_the_message(rng):
    a = np.stack([indefinite(rng, 12), definite(rng, 12, condition=1e5), definite(rng, 12), definite(rng, 12)])
    b = rng.standard_normal((4, 12))
    b[2, 0] = np.nan
    with pytest.raises(ConvergenceError) as error:
        krylov.cg(a, b, maxiter=14)
    text = str(error.value)
    for part in ("1 of 4 right-hand sides met a direction", "1 of 4 right-hand sides reached the iteration limit of 14",
                 "1 of 4 right-hand sides met NaN", "ddnref.krylov.minres", "throw=False"):  # fmt: skip
        assert part in text


# --- static facts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_static_errors(name, rng):
    solver = SOLVERS[name]
    a, b = np.eye(3), np.ones(3)
    plain = LinearOperator((a,), lambda p, x: x @ p[0], lambda p, y: y @ p[0], None, (3,), (3,), self_adjoint=True)
    short = plain._replace(apply=lambda p, x: x[..., :2])
    for wrong, kind, text in (
        ((a, np.ones(4)), ValueError, r"b has shape \(4,\), expected \(..., 3\)"),
        ((a, np.float64(1) + np.zeros(())), ValueError, r"b has shape \(\)"),
        ((np.ones(3), b), ValueError, r"has shape \(3,\), expected \(..., n, m\)"),
        ((np.stack([a] * 2), np.ones((3, 3))), ValueError, "Batch axes do not broadcast"),
        ((a, b.astype(np.float32)), TypeError, "must have one precision, but got b: float32"),
        ((a.astype(int), b), TypeError, "dtype int64"),
        ((a, [1.0, 1.0, 1.0]), TypeError, "b is a builtins.list"),
        ((a.astype(np.complex64), b), TypeError, "must have one precision"),
        ((np.zeros((0, 0)), np.zeros(0)), ValueError, "no unknowns"),
        ((short, b), ValueError, r"operator.apply\(params, x\) has shape \(2,\)"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            solver(*wrong)
    for options, kind, text in (
        ({"x0": np.ones(4)}, ValueError, r"x0 has shape \(4,\)"),
        ({"x0": np.ones(3, dtype=np.float32)}, TypeError, "x0 has dtype float32"),
        ({"rtol": -1.0}, ValueError, "rtol is -1.0"),
        ({"rtol": 1.0}, ValueError, "relative to ‖b‖"),
        ({"maxiter": -1}, ValueError, "maxiter is -1"),
        ({"check_every": 0}, ValueError, "check_every is 0"),
    ):
        with pytest.raises(kind, match=text):
            solver(plain, b, **options)
    if name != "lsmr":
        with pytest.raises(ValueError, match=r"use ddnref\.krylov\.lsmr"):
            solver(np.ones((4, 3)), np.ones(4))
        with pytest.raises(ValueError, match=r"preconditioner\(r\) has shape"):
            solver(a, b, preconditioner=lambda r: r[:2])
        with pytest.raises(TypeError, match=r"preconditioner\(r\) has dtype float32"):
            solver(a, b, preconditioner=lambda r: r.astype(np.float32))
        with pytest.raises(ValueError, match="preconditioner has domain_shape"):
            solver(a, b, preconditioner=plain._replace(domain_shape=(4,)))
    if name in ("cg", "minres"):
        with pytest.raises(ValueError, match="self_adjoint is False"):
            solver(plain._replace(self_adjoint=False), b)


@pytest.mark.framework("torch")
@pytest.mark.parametrize("name", NAMES)
def test_recording_is_refused(name):
    import torch

    a, b = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for tensors in ((a.clone().requires_grad_(), b), (a, b.clone().requires_grad_())):
        with pytest.raises(TypeError, match=r"Differentiate ddnref\.linear_solve instead"):
            SOLVERS[name](*tensors)
        with torch.no_grad():
            SOLVERS[name](*tensors)


@pytest.mark.parametrize("name", NAMES)
def test_libraries_are_not_mixed(name):
    import array_api_strict as strict

    with pytest.raises(TypeError, match="All arrays must come from one library"):
        SOLVERS[name](np.eye(3), strict.ones(3))
