"""The tutorial's forms: right where they can be, and off where their equation is singular."""

import numpy as np
import pytest
from problems import relative, rotation, with_spectrum

import ddnref
from ddnref.reference import ddn_vjp_jacobian, ddn_vjp_schur, ift_vjp_jacobian, ift_vjp_structured

DDN = {
    "Jacobian, stacked": ddn_vjp_jacobian,
    "Jacobian, one at a time": lambda *a, **k: ddn_vjp_jacobian(*a, stacked=False, **k),
    "Schur": ddn_vjp_schur,
}
IFT = {
    "Jacobian": ift_vjp_jacobian,
    "structured": ift_vjp_structured,
    "structured, with B": lambda *a, **k: ift_vjp_structured(*a, store_b=True, **k),
}
RIGHT = DDN | {f"fixed point, {name}": form for name, form in IFT.items()}


def pose(rng, m, n, batch=()):
    """A symmetric matrix whose n eigenvalues of largest magnitude have both signs, and a random cotangent."""
    lam = np.asarray([-4.0, 3.0, -2.0, 1.5, *np.linspace(-1, 1, m)])[:m]
    q = rotation(rng, m, batch)
    w = np.broadcast_to(lam[:n], (*batch, n)).copy()
    return with_spectrum(q, lam), w, q[..., :n], rng.standard_normal((*batch, m, n))


def truth(x, v, v_bar):
    """`ddnref.eigh_vjp` with the cotangent at the columns that hold these eigenvectors."""
    all_w, all_v = ddnref.eigh(x)
    overlap = np.swapaxes(all_v, -1, -2) @ v
    chosen = np.where(np.abs(overlap) > 0.5, np.sign(overlap), 0.0)  # which column, and its sign
    return ddnref.eigh_vjp(None, v_bar @ np.swapaxes(chosen, -1, -2), all_w, all_v)


@pytest.mark.parametrize("form", RIGHT)
@pytest.mark.parametrize(("m", "n", "batch"), [(6, 1, ()), (8, 4, (2,)), (5, 2, (2, 3))])
def test_right_forms_agree_with_the_closed_form(form, m, n, batch, xp, rng):
    x, w, v, v_bar = pose(rng, m, n, batch)
    found = xp.numpy(RIGHT[form](*map(xp.asarray, (v_bar, x, w, v))))
    assert relative(found, truth(x, v, v_bar)) <= 1e-11


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_solve_is_off_and_bordered_is_not(dtype, rng):
    """H is singular at the solution, whatever the precision."""
    x, w, v, v_bar = (a.astype(dtype) for a in pose(rng, 16, 2, (20,)))
    right = truth(*(a.astype("float64") for a in (x, v, v_bar)))
    bordered = relative(ddnref.simultaneous_iteration_vjp(None, v_bar, w, v, x, symmetric=True), right)
    assert bordered <= 10 * np.finfo(dtype).eps
    for form in DDN.values():
        assert relative(form(v_bar, x, w, v, mode="pinv"), right) <= 100 * np.finfo(dtype).eps
        assert relative(form(v_bar, x, w, v, mode="solve"), right) > 1000 * bordered


def test_solve_is_right_away_from_the_solution(rng):
    """All three forms agree, so it is the formula of the tutorial, and only H's singularity is to blame."""
    x, w, v, v_bar = pose(rng, 6, 2)
    w = w + 0.25
    found = [form(v_bar, x, w, v, mode="solve") for form in DDN.values()]
    for other in found[1:]:
        assert relative(other, found[0]) <= 1e-12
    assert relative(found[0], truth(x, v, v_bar)) > 1e-3  # w is no eigenvalue


def test_fixed_point_of_a_matrix_that_is_not_symmetric(rng):
    q = rotation(rng, 6) + 0.2 * rng.standard_normal((6, 6))
    lam = np.asarray([-4.0, 3.0, -2.0, 1.0, 0.5, -0.2])
    x = q @ np.diag(lam) @ np.linalg.inv(q)
    v = q[:, :2] / np.linalg.norm(q[:, :2], axis=0)
    v_bar = rng.standard_normal((6, 2))
    right = ddnref.simultaneous_iteration_vjp(None, v_bar, lam[:2], v, x)
    for form in IFT.values():
        raw = form(v_bar, x, lam[:2], v, symmetric=False)
        assert relative(raw, right) <= 1e-12
        assert np.array_equal(form(v_bar, x, lam[:2], v), (raw + raw.T) / 2)


@pytest.mark.parametrize("form", RIGHT)
def test_static_errors(form, rng):
    x, w, v, v_bar = pose(rng, 4, 2)
    with pytest.raises(ValueError, match=r"v_bar has shape \(4, 1\), expected \(4, 2\)"):
        RIGHT[form](v_bar[:, :1], x, w, v)
    with pytest.raises(TypeError, match="real matrices"):
        RIGHT[form](*(a.astype("complex128") for a in (v_bar, x, w, v)))
    with pytest.raises(TypeError, match="w has dtype"):
        RIGHT[form](v_bar, x, w.astype("float32"), v)


def test_unknown_mode(rng):
    x, w, v, v_bar = pose(rng, 4, 2)
    for form in DDN.values():
        with pytest.raises(ValueError, match="mode is 'inv', expected one of solve, pinv"):
            form(v_bar, x, w, v, mode="inv")
