"""Functions of a matrix: values, exact gradients at any degeneracy, and where they are refused."""

from functools import partial

import mpmath
import numpy as np
import pytest
from problems import projector_gradient, relative, rotation, symmetric, with_spectrum

import ddnref
from ddnref import SingularError
from ddnref.testing import numerical_jvp

SQUARE = {"f": lambda w: w * w, "df": lambda w: 2 * w}
TRIPLE = np.asarray([0.2, 0.7, 0.7, 0.7, 1.1, 2.0])
NAMED = {
    "sqrtm": (mpmath.sqrt, lambda x: 1 / (2 * mpmath.sqrt(x))),
    "invsqrtm": (lambda x: 1 / mpmath.sqrt(x), lambda x: -1 / (2 * x * mpmath.sqrt(x))),
    "logm": (mpmath.log, lambda x: 1 / x),
    "expm": (mpmath.exp, mpmath.exp),
}


def exact_gradient(q, w, c, f, df):
    """Daleckii–Krein in 60 digits, from known eigenvectors and eigenvalues."""
    with mpmath.workdps(60):
        w = [mpmath.mpf(float(a)) for a in w]
        phi = [[df(a) if a == b else (f(a) - f(b)) / (a - b) for b in w] for a in w]
    return q @ (np.asarray(phi, dtype=float) * (q.T @ ((c + c.T) / 2) @ q)) @ q.T


def gradient(name, x, c, xp, **options):
    y, saved = getattr(ddnref, f"{name}_fwd")(xp.asarray(x), **{k: v for k, v in options.items() if k == "f"})
    return xp.numpy(getattr(ddnref, f"{name}_vjp")(xp.asarray(c), y, *saved, **options))


@pytest.mark.parametrize("name", NAMED)
def test_values(name, xp, rng):
    q = rotation(rng, 6)
    expected = with_spectrum(q, [float(NAMED[name][0](w)) for w in TRIPLE])
    assert relative(xp.numpy(getattr(ddnref, name)(xp.asarray(with_spectrum(q, TRIPLE)))), expected) <= 1e-14


def test_functions_are_inverse_to_each_other(xp, rng):
    x = with_spectrum(rotation(rng, 5, (3,)), rng.uniform(0.5, 2, (3, 5)))
    y = ddnref.sqrtm(xp.asarray(x))
    assert relative(xp.numpy(y @ y), x) <= 1e-14
    assert relative(xp.numpy(ddnref.expm(ddnref.logm(xp.asarray(x)))), x) <= 1e-14
    whitened = xp.numpy(ddnref.invsqrtm(xp.asarray(x)))
    assert relative(whitened @ x @ whitened, np.broadcast_to(np.eye(5), x.shape)) <= 1e-14


def test_trace_of_c_x_squared_on_triple_eigenvalues_and_on_the_identity(xp, rng):
    """The loss that masked eigenvectors get wrong: exact here, 200 matrices and the identity."""
    x = np.concatenate([with_spectrum(rotation(rng, 6, (200,)), TRIPLE), np.eye(6)[None]])
    c = symmetric(rng, 6, (201,))
    x_bar = gradient("spectral_function", x, c, xp, **SQUARE)
    exact = c @ x + x @ c
    assert max(relative(x_bar[i], exact[i]) for i in range(201)) <= 1e-12


# --- tangents ------------------------------------------------------------------------------------------------------

CUBE = {"f": lambda w: w**3, "df": lambda w: 3 * w**2}
SECOND_OF_CUBE = {**CUBE, "d2f": lambda w: 6 * w}
EVERY = {"spectral_function": CUBE, **{name: {} for name in NAMED}}


def with_eigenpairs(name, x, **options):
    """The output and the saved arrays at `x`, after which derivatives take their options."""
    y, saved = getattr(ddnref, f"{name}_fwd")(x, **{k: v for k, v in options.items() if k in ("f", "throw")})
    return y, *saved


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_tangents_and_cotangents_are_adjoint(name, is_complex, xp, rng):
    """Exactly so on triple eigenvalues, in a batch, for directions that are not Hermitian."""
    x = with_spectrum(rotation(rng, 6, (2,), is_complex), TRIPLE)
    x_dot, y_bar = rng.standard_normal((2, *x.shape)) + (1j * rng.standard_normal((2, *x.shape)) if is_complex else 0)
    arrays = with_eigenpairs(name, xp.asarray(x), **EVERY[name])
    y_dot = xp.numpy(getattr(ddnref, f"{name}_jvp")(xp.asarray(x_dot), *arrays, **EVERY[name]))
    x_bar = xp.numpy(getattr(ddnref, f"{name}_vjp")(xp.asarray(y_bar), *arrays, **EVERY[name]))
    assert y_dot.dtype == x.dtype
    assert np.all(y_dot == np.conj(y_dot.mT))
    defect = np.sum((np.conj(y_bar) * y_dot - np.conj(x_bar) * x_dot).real, axis=(-2, -1))
    assert np.all(np.abs(defect) <= 1e-14 * np.linalg.norm(y_bar, axis=(-2, -1)) * np.linalg.norm(y_dot, axis=(-2, -1)))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_tangents_agree_with_finite_differences(name, is_complex, rng):
    x = with_spectrum(rotation(rng, 6, (), is_complex), TRIPLE)
    x_dot = rng.standard_normal(x.shape) + (1j * rng.standard_normal(x.shape) if is_complex else 0)
    y_dot = getattr(ddnref, f"{name}_jvp")(x_dot, *with_eigenpairs(name, x, **EVERY[name]), **EVERY[name])
    forward = partial(getattr(ddnref, name), **{k: v for k, v in EVERY[name].items() if k == "f"})
    assert relative(numerical_jvp(forward, x, x_dot), y_dot) <= 1e-9


def test_tangent_of_the_square_on_triple_eigenvalues_and_on_the_identity(xp, rng):
    x = np.stack([with_spectrum(rotation(rng, 6), TRIPLE), np.eye(6)])
    x_dot = symmetric(rng, 6, (2,))
    arrays = with_eigenpairs("spectral_function", xp.asarray(x), **SQUARE)
    y_dot = xp.numpy(xp.derivative(ddnref.spectral_function_jvp, xp.asarray(x_dot), *arrays, **SQUARE))
    assert relative(y_dot, x_dot @ x + x @ x_dot) <= 1e-14


@pytest.mark.parametrize("name", EVERY)
def test_tangents_in_single_precision(name, xp, rng):
    """The directions of double precision, up to the rounding of the eigenpairs."""
    x, x_dot = with_spectrum(rotation(rng, 6), TRIPLE).astype("float32"), symmetric(rng, 6).astype("float32")
    results = []
    for dtype in ("float32", "float64"):
        arrays = with_eigenpairs(name, xp.asarray(x.astype(dtype)), **EVERY[name])
        y_dot = getattr(ddnref, f"{name}_jvp")(xp.asarray(x_dot.astype(dtype)), *arrays, **EVERY[name])
        results.append(xp.numpy(y_dot))
    assert results[0].dtype == np.float32
    assert relative(*results) <= 1e-5


# --- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0])
def test_named_functions_are_accurate_at_every_gap(name, gap, rng):
    q, w = rotation(rng, 4), np.asarray([0.5, 0.9, 0.9 + gap, 3.0])
    c = rng.standard_normal((4, 4))
    f, df = NAMED[name]
    assert relative(gradient_of_known(name, q, w, c), exact_gradient(q, w, c, f, df)) <= 2e-14


def gradient_of_known(name, q, w, c, **options):
    """The VJP at eigenpairs given exactly, so that only its own error is seen."""
    y = np.zeros_like(q)
    return getattr(ddnref, f"{name}_vjp")(c, y, w, q, **options)


# --- divided differences of any function ---------------------------------------------------------------------------

SMOOTH = {  # f, df, both with mpmath, and whether the domain is positive
    "1 - exp(-w)": ("1 - xp.exp(-w)", "xp.exp(-w)", False),
    "log(1 + w)": ("xp.log(1 + w)", "1 / (1 + w)", True),
    "sigmoid - 1/2": ("1 / (1 + xp.exp(-w)) - 0.5", "xp.exp(-w) / (1 + xp.exp(-w))**2", False),
    "w log w": ("w * xp.log(w)", "1 + xp.log(w)", True),
    "w^5": ("w**5", "5 * w**4", False),
    "sin": ("xp.sin(w)", "xp.cos(w)", False),
    "1/(w^2 + .01)": ("1 / (w * w + 0.01)", "-2 * w / (w * w + 0.01)**2", False),
}


def compiled_function(text, xp):
    return eval(f"lambda w: {text}", {"xp": xp})


def exact_differences(w, f, df):
    """``f[w_i, w_j]`` in 60 digits."""
    with mpmath.workdps(60):
        w = [mpmath.mpf(float(a)) for a in w]
        return np.asarray([[df(a) if a == b else (f(a) - f(b)) / (a - b) for b in w] for a in w], dtype=float)


def differences(w, xp, f, df):
    """Φ from the gradients of the entries of ``f(X)`` for a diagonal X, one cotangent for each."""
    m = len(w)
    y_bar = np.zeros((m, m, m, m), w.dtype)
    i, j = np.indices((m, m))
    y_bar[i, j, i, j] = 1.0
    every, v = np.broadcast_to(w, (m, m, m)).copy(), np.broadcast_to(np.eye(m, dtype=w.dtype), y_bar.shape).copy()
    x_bar = ddnref.spectral_function_vjp(*map(xp.asarray, (y_bar, y_bar, every, v)), f=f, df=df)
    return xp.numpy(x_bar)[i, j, i, j] * np.where(i == j, 1, 2)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_divided_differences_at_every_gap(name, dtype, xp):
    """Relative error 1e-12 (1e-5), or the rounding of f over the gap: clusters of every gap, signs, and scales."""
    rng = np.random.default_rng(sorted(SMOOTH).index(name))
    f, df, positive = SMOOTH[name]
    exact = [compiled_function(text, mpmath) for text in (f, df)]
    own, numpy_f = [compiled_function(text, xp.namespace) for text in (f, df)], compiled_function(f, np)
    unit = np.finfo(dtype).eps
    for size in (1.0, 1e-3, 10.0):
        gaps = 10.0 ** rng.uniform(np.log10(unit), 0, 4)
        base = rng.uniform(0.05, 1, 4) * (1 if positive else rng.choice([-1, 1], 4))
        around_zero = [] if positive else [-gaps[0] - 200 * unit, 0.0, gaps[1] + 200 * unit]  # no zeros by rounding
        w = (size * np.sort(np.concatenate([base, base + gaps, around_zero]))).astype(dtype)
        phi, expected = differences(w, xp, *own), exact_differences(w, *exact)
        with mpmath.workdps(60):
            error = np.asarray([float(abs(numpy_f(a) - exact[0](mpmath.mpf(float(a))))) for a in w])
        value = error + unit * (np.abs(numpy_f(w)) + np.abs(w * np.diag(expected)))
        gap = np.abs(w[:, None] - w[None, :])
        rounding = np.where(gap > 0.01, value[:, None] + value[None, :], 0) / np.where(gap > 0, gap, 1)
        slope = np.diag(np.abs(compiled_function(df, np)(w) - np.diag(expected)))
        bound = np.maximum((1e-12 if dtype == "float64" else 1e-5) * np.abs(expected), 2 * rounding + 2 * slope)
        bad = ~(np.abs(phi - expected) <= bound + unit**2 * np.max(np.abs(expected)))  # not the powers that underflow
        assert not np.any(bad), (w, gap[bad], phi[bad], expected[bad])


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_any_function_is_accurate_at_every_gap(gap, scale, rng):
    """Full accuracy at any scale of the spectrum."""
    q, w = rotation(rng, 4), scale * np.asarray([0.5, 0.9, 0.9 + gap, 3.0])
    c = rng.standard_normal((4, 4))
    exact = exact_gradient(q, w, c, lambda x: mpmath.sin(x / scale), lambda x: mpmath.cos(x / scale) / scale)
    options = {"f": lambda w: np.sin(w / scale), "df": lambda w: np.cos(w / scale) / scale}
    assert relative(gradient_of_known("spectral_function", q, w, c, **options), exact) <= 2e-14


def test_heat_filter_of_a_graph_with_three_components(xp):
    """Three zero eigenvalues that LAPACK splits: 1 − e^−w cancels there, and the quotient was noise."""
    rng = np.random.default_rng(3)
    weights = rng.uniform(0.5, 1.5, (3, 4, 4))
    laplacian = np.zeros((12, 12))
    for i, part in enumerate(weights):
        part = np.triu(part, 1) + np.triu(part, 1).T
        laplacian[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = np.diag(part.sum(axis=0)) - part
    q = rotation(rng, 12)
    laplacian, c = q @ laplacian @ q.T, symmetric(rng, 12)
    w, v = np.linalg.eigh((laplacian + laplacian.T) / 2)
    w[:3] = 0.0  # as it is known
    exact = exact_differences(w, lambda x: 1 - mpmath.exp(-x), lambda x: mpmath.exp(-x))
    expected = v @ (exact * (v.T @ c @ v)) @ v.T
    ns = xp.namespace
    for f in (lambda w: 1 - ns.exp(-w), lambda w: -ns.expm1(-w)):
        assert (
            relative(gradient("spectral_function", laplacian, c, xp, f=f, df=lambda w: ns.exp(-w)), expected) <= 1e-13
        )


@pytest.mark.parametrize("gap", [1e-12, 1e-6, 1e-3, 0.3])
def test_steps_and_kinks_are_seen(gap, xp, rng):
    """The derivative of a step is zero on both sides, that of a kink jumps; eigenvalues lie on both sides of it."""
    ns, w = xp.namespace, np.sort(np.concatenate([0.5 + gap * np.asarray([-1.0, -0.4, 0.2, 0.9]), [-1.0, 2.0]]))
    cases = {
        "step": (lambda w: w > 0.5, lambda w: 0 * w),
        "ramp": (lambda w: ns.where(w > 0.5, w - 0.5, 0 * w), lambda w: w > 0.5),
        "modulus": (lambda w: ns.abs(w - 0.5), lambda w: ns.sign(w - 0.5)),
        "step on a slope": (lambda w: w + ns.astype(w > 0.5, w.dtype), lambda w: 1 + 0 * w),
    }
    for name, functions in cases.items():
        f, df = (lambda w, g=g: ns.astype(g(w), ns.float64) for g in functions)
        values, slopes = (xp.numpy(g(xp.asarray(w))) for g in (f, df))
        difference = w[:, None] - w[None, :]
        apart = difference != 0
        expected = np.where(
            apart, (values[:, None] - values[None, :]) / np.where(apart, difference, 1), np.diag(slopes)
        )
        rounding = 4 * 2.0**-52 * 3 / np.where(apart, np.abs(difference), np.inf)
        assert np.all(np.abs(differences(w, xp, f, df) - expected) <= 1e-12 * np.abs(expected) + rounding), name


def test_projectors_as_functions_are_exact(xp, rng):
    """A step between clusters is their projector, whatever is equal inside them."""
    q, w = rotation(rng, 6), np.asarray([-1.0, -1.0, -1.0 + 1e-9, 0.5, 0.5 + 1e-12, 2.0])
    c, ns = symmetric(rng, 6), xp.namespace
    f = {"f": lambda w: ns.astype(w > 0, w.dtype), "df": lambda w: 0 * w}
    assert (
        relative(gradient("spectral_function", with_spectrum(q, w), c, xp, **f), projector_gradient(q, w, w > 0, c))
        <= 1e-14
    )


# --- second derivatives --------------------------------------------------------------------------------------------

SECOND = {
    "sqrtm": lambda x: -1 / (4 * x * mpmath.sqrt(x)),
    "invsqrtm": lambda x: 3 / (4 * x**2 * mpmath.sqrt(x)),
    "logm": lambda x: -1 / x**2,
    "expm": mpmath.exp,
}
EVERY_SECOND = {"spectral_function": SECOND_OF_CUBE, **{name: {} for name in NAMED}}
GAPS = [0.0, 1e-15, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1]


def exact_second_differences(w, f, df, d2f):
    """``f[w_i, w_k, w_j]`` in 80 digits."""
    with mpmath.workdps(80):
        w = [mpmath.mpf(float(x)) for x in w]
        values, slopes, bends = ([g(x) for x in w] for g in (f, df, d2f))

        def first(i, j):
            return slopes[i] if w[i] == w[j] else (values[i] - values[j]) / (w[i] - w[j])

        def second(i, k, j):
            if w[i] != w[j]:
                return (first(i, k) - first(k, j)) / (w[i] - w[j])
            return (first(i, j) - first(k, j)) / (w[i] - w[k]) if w[i] != w[k] else bends[i] / 2

        every = range(len(w))
        return np.asarray([[[float(second(i, k, j)) for j in every] for k in every] for i in every])


def exact_second_derivative(q, w, a, b, *functions):
    """``D²f(X)[A, B]`` of symmetric A and B, from known eigenvectors and eigenvalues."""
    differences = exact_second_differences(w, *functions)
    t = np.einsum("ikj,ik,kj->ij", differences, q.T @ a @ q, q.T @ b @ q)
    return q @ (t + t.T) @ q.T


def second_of_known(name, q, w, a, b, **options):
    """The second derivative at eigenpairs given exactly, so that only its own error is seen."""
    return getattr(ddnref, f"{name}_second_derivative")(a, b, np.zeros_like(q), w, q, **options)


def spectra(gap, scale=1.0):
    """Eigenvalues of which some are `gap` apart: all, a triple, two pairs, and small ones beside large ones."""
    yield scale * (1 + gap * np.asarray([0.0, 0.3, 0.35, 1.0]))
    yield scale * np.sort([0.2, 0.7, 0.7 + gap, 0.7 + 2 * gap, 1.1, 2.0])
    yield scale * np.sort([0.3, 0.3 + gap, 1.5, 1.5 + gap])
    yield scale * np.sort([1e-3, 1e-3 * (1 + gap), 3e-3, 0.5, 0.5 + gap, 2.0])


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("gap", GAPS)
def test_second_derivatives_of_named_functions_at_every_gap(name, gap, rng):
    """Rounding for roots, whose second differences are closed forms, and for equal eigenvalues."""
    for w in spectra(gap):
        q, (a, b) = rotation(rng, len(w)), symmetric(rng, len(w), (2,))
        exact = exact_second_derivative(q, w, a, b, *NAMED[name], SECOND[name])
        bound = 1e-13 if name in ("sqrtm", "invsqrtm") or gap == 0 else 1e-11
        assert relative(second_of_known(name, q, w, a, b), exact) <= bound, w


BENDS = {  # f''
    "1 - exp(-w)": "-xp.exp(-w)",
    "log(1 + w)": "-1 / (1 + w)**2",
    "sigmoid - 1/2": "xp.exp(-w) * (xp.exp(-w) - 1) / (1 + xp.exp(-w))**3",
    "w log w": "1 / w",
    "w^5": "20 * w**3",
    "sin": "-xp.sin(w)",
    "1/(w^2 + .01)": "(6 * w * w - 0.02) / (w * w + 0.01)**3",
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("gap", GAPS)
def test_second_derivatives_of_any_function_at_every_gap(name, gap, rng):
    texts = (*SMOOTH[name][:2], BENDS[name])
    exact, own = ([compiled_function(text, library) for text in texts] for library in (mpmath, np))
    options = dict(zip(("f", "df", "d2f"), own, strict=True))
    for w in spectra(gap):
        q, (a, b) = rotation(rng, len(w)), symmetric(rng, len(w), (2,))
        expected = exact_second_derivative(q, w, a, b, *exact)
        bound = 1e-13 if gap == 0 and w[0] > 0.1 else 2e-11  # the last spectrum has close eigenvalues at any gap
        assert relative(second_of_known("spectral_function", q, w, a, b, **options), expected) <= bound, w


@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1e6, 1e100])
@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-4])
def test_second_derivatives_do_not_depend_on_the_scale(gap, scale, rng):
    for w in spectra(gap, scale):
        q, (a, b) = rotation(rng, len(w)), symmetric(rng, len(w), (2,))
        functions = [
            (lambda x, s=s, p=p, g=g, xp=xp: s * getattr(xp, g)(x / scale) / scale**p)
            for xp in (mpmath, np)
            for s, p, g in ((1, 0, "sin"), (1, 1, "cos"), (-1, 2, "sin"))
        ]
        exact = exact_second_derivative(q, w, a * scale, b * scale, *functions[:3])
        options = dict(zip(("f", "df", "d2f"), functions[3:], strict=True))
        assert relative(second_of_known("spectral_function", q, w, a * scale, b * scale, **options), exact) <= 1e-11


@pytest.mark.parametrize("gap", [1e-12, 1e-9, 1e-7, 1e-5, 1e-4])
def test_second_derivatives_at_inflection_points(gap, rng):
    """The second derivative is as small as the gap there, and cannot be the scale of an error."""
    options = {"f": np.sin, "df": np.cos, "d2f": lambda w: -np.sin(w)}
    exact = (mpmath.sin, mpmath.cos, lambda x: -mpmath.sin(x))
    for w in ([-1.0, -gap, 0.0, gap, 0.5], [-1.0, -gap, 0.3 * gap, 2 * gap], [-gap, 0.0, gap], [-gap, 0.3 * gap, gap]):
        q, (a, b) = rotation(rng, len(w)), symmetric(rng, len(w), (2,))
        z = second_of_known("spectral_function", q, np.asarray(w), a, b, **options)
        assert relative(z, exact_second_derivative(q, w, a, b, *exact)) <= (1e-11 if len(w) > 3 else 1e-9), w


def test_second_derivatives_need_both_estimates_of_closeness(rng):
    """A change of f'' that its mean does not show, and a derivative that has more rounding than its value explains."""
    cases = [
        (np.asarray([-0.3, 0.3, 1.0]), "xp.sin(w) + w * w", "xp.cos(w) + 2 * w", "2 - xp.sin(w)"),
        (1e-6 * np.asarray([1.0, 1.001, 1.5, 2.0]), "w + xp.exp(-w)", "1 - xp.exp(-w)", "xp.exp(-w)"),
    ]
    for w, *texts in cases:
        exact, own = ([compiled_function(text, library) for text in texts] for library in (mpmath, np))
        q, (a, b) = rotation(rng, len(w)), symmetric(rng, len(w), (2,))
        z = second_of_known("spectral_function", q, w, a, b, **dict(zip(("f", "df", "d2f"), own, strict=True)))
        assert relative(z, exact_second_derivative(q, w, a, b, *exact)) <= 1e-11, texts


def test_directions_of_wide_matrices_are_symmetrised(rng):
    """Wide products compute one triangle only, which shows what is not symmetric before them."""
    x, (a, b) = with_spectrum(rotation(rng, 300), rng.uniform(1, 2, 300)), rng.standard_normal((2, 300, 300))
    arrays, (a_h, b_h) = with_eigenpairs("sqrtm", x), ((a + a.T) / 2, (b + b.T) / 2)
    assert relative(ddnref.sqrtm_jvp(a, *arrays), ddnref.sqrtm_jvp(a_h, *arrays)) <= 1e-14
    assert relative(ddnref.sqrtm_vjp(a, *arrays), ddnref.sqrtm_jvp(a_h, *arrays)) <= 1e-14
    z = ddnref.sqrtm_second_derivative(a, b, *arrays)
    assert relative(z, ddnref.sqrtm_second_derivative(b_h, a_h, *arrays)) <= 1e-13


@pytest.mark.parametrize("gap", [1e-15, 1e-12, 1e-6, 1e-3, 0.3])
def test_second_derivatives_see_steps_and_kinks(gap, rng):
    """Projectors of clusters as functions of the matrix, and the positive part, in exact arithmetic."""
    zero, one = (lambda x: 0 * x), (lambda x: 1 + 0 * x)
    above = lambda x: np.where(x > 0.5, 1.0, 0.0) if isinstance(x, np.ndarray) else mpmath.mpf(x > 0.5)
    cases = {
        "step": (above, zero, zero),
        "step on a slope": (lambda x: x + above(x), one, zero),
        "step on a parabola": (lambda x: x**2 + above(x) / 10, lambda x: 2 * x, lambda x: 2 + 0 * x),
        "ramp": (lambda x: (x - 0.5) * above(x), above, zero),
    }
    near = 0.5 + gap * np.asarray([-1.0, -0.4, 0.2, 0.9])
    for w in (np.asarray([0.1, 0.1 + gap, 0.1 + 3 * gap, 0.9, 0.9 + gap]), np.sort([-1.0, *near, 2.0])):
        q, (a, b) = np.eye(len(w)), symmetric(rng, len(w), (2,))
        for name, functions in cases.items():
            z = second_of_known(
                "spectral_function", q, w, a, b, **dict(zip(("f", "df", "d2f"), functions, strict=True))
            )
            # A first difference has the rounding of f and of its argument over the gap, a second one once more.
            exact = exact_second_derivative(q, w, a, b, *functions)
            rounding = 0.0 if name == "step" else 1e-15 / gap if w[0] > 0 else 4e-15 / gap**2
            assert np.linalg.norm(z - exact) <= 1e-12 * np.linalg.norm(exact) + rounding, (name, w)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("name", EVERY_SECOND)
def test_second_derivatives_are_symmetric_in_three_directions(name, is_complex, xp, rng):
    """In a batch of a triple eigenvalue, the identity and a simple spectrum, for directions that are not Hermitian."""
    w = np.stack([TRIPLE, np.ones(6), np.linspace(0.3, 2, 6)])
    x = with_spectrum(rotation(rng, 6, (3,), is_complex), w)
    directions = rng.standard_normal((3, *x.shape)) + (1j * rng.standard_normal((3, *x.shape)) if is_complex else 0)
    arrays = with_eigenpairs(name, xp.asarray(x), **EVERY_SECOND[name])
    second = partial(getattr(ddnref, f"{name}_second_derivative"), **EVERY_SECOND[name])
    found = []
    for i, j, k in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)):
        z = xp.numpy(second(xp.asarray(directions[i]), xp.asarray(directions[j]), *arrays))
        assert z.dtype == x.dtype
        assert np.all(z == np.conj(z.mT))
        found.append(np.sum((np.conj(directions[k]) * z).real, axis=(-2, -1)))
    size = np.linalg.norm(z, axis=(-2, -1)) * np.linalg.norm(directions[0], axis=(-2, -1))
    assert np.all(np.ptp(np.stack(found), axis=0) <= 1e-12 * size)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("name", EVERY_SECOND)
def test_second_derivatives_agree_with_finite_differences_of_the_gradient(name, is_complex, rng):
    first = {k: v for k, v in EVERY_SECOND[name].items() if k != "d2f"}
    for w in (np.linspace(0.3, 2, 6), TRIPLE, np.ones(6)):
        x = with_spectrum(rotation(rng, 6, (), is_complex), w)
        x_dot, y_bar = rng.standard_normal((2, *x.shape)) + (1j * rng.standard_normal(x.shape) if is_complex else 0)

        def gradient_at(x, y_bar=y_bar):
            return getattr(ddnref, f"{name}_vjp")(y_bar, *with_eigenpairs(name, x, **first), **first)

        arrays = with_eigenpairs(name, x, **first)
        z = getattr(ddnref, f"{name}_second_derivative")(x_dot, y_bar, *arrays, **EVERY_SECOND[name])
        assert relative(numerical_jvp(gradient_at, x, x_dot, step=2e-3), z) <= 1e-9


@pytest.mark.parametrize("name", EVERY_SECOND)
def test_second_derivatives_in_single_precision(name, xp, rng):
    x, directions = with_spectrum(rotation(rng, 6), TRIPLE).astype("float32"), symmetric(rng, 6, (2,))
    results = []
    for dtype in ("float32", "float64"):
        arrays = with_eigenpairs(name, xp.asarray(x.astype(dtype)), **EVERY_SECOND[name])
        moved = [xp.asarray(d.astype("float32").astype(dtype)) for d in directions]
        second = getattr(ddnref, f"{name}_second_derivative")
        results.append(xp.numpy(second(*moved, *arrays, **EVERY_SECOND[name])))
    assert results[0].dtype == np.float32
    assert relative(*results) <= 1e-4


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 2, 2), (1, 1)])
@pytest.mark.parametrize("name", ["spectral_function", "sqrtm", "logm"])
def test_second_derivatives_of_matrices_without_entries(name, shape, xp):
    x = xp.asarray(np.ones(shape))
    arrays = with_eigenpairs(name, x, **EVERY_SECOND[name])
    z = getattr(ddnref, f"{name}_second_derivative")(x, x, *arrays, **EVERY_SECOND[name])
    assert tuple(z.shape) == shape
    if shape == (1, 1):
        assert float(xp.numpy(z)[0, 0]) == {"spectral_function": 6.0, "sqrtm": -0.25, "logm": -1.0}[name]


@pytest.mark.parametrize("name", ["sqrtm", "invsqrtm", "logm"])
def test_second_derivatives_do_not_exist_at_singular_matrices(name, xp, rng):
    x = xp.asarray(with_spectrum(rotation(rng, 3, (2,)), [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]]))
    arrays, second = with_eigenpairs(name, x, throw=False), getattr(ddnref, f"{name}_second_derivative")
    with pytest.raises(SingularError, match=rf"The second derivative of {name} is not finite.*\(item 1 of 2\)"):
        second(x, x, *arrays)
    z = xp.numpy(xp.jit(partial(second, throw=False))(x, x, *arrays))
    assert np.all(np.isfinite(z[0]))
    assert not np.any(np.isfinite(z[1]))


def test_overflowing_second_derivatives_are_refused(rng):
    w, (a, b), (q, y) = np.asarray([1.0, 800.0]), symmetric(rng, 2, (2,)), (np.eye(2), np.zeros((2, 2)))
    with pytest.raises(SingularError, match="second derivative of expm"):
        ddnref.expm_second_derivative(a, b, y, w, q)
    functions = {"f": lambda w: w**1.5, "df": lambda w: 1.5 * w**0.5, "d2f": lambda w: 0.75 * w**-0.5}
    with pytest.raises(SingularError, match="second derivative of spectral_function"):
        ddnref.spectral_function_second_derivative(a, b, y, np.asarray([0.0, 1.0]), q, **functions)
    z = ddnref.spectral_function_second_derivative(a, b, y, np.asarray([0.0, 1.0]), q, **functions, throw=False)
    assert np.all(np.isnan(z))


# --- singular matrices ---------------------------------------------------------------------------------------------


def covariances(rng, dtype):
    """100 covariances each that are singular but for rounding, and that are not, by kind."""
    x = rng.standard_normal((100, 12, 5))
    duplicate, dead, units = x.copy(), x.copy(), x * 10.0 ** rng.uniform(-2, 1, 5)
    duplicate[..., 3], dead[..., 2] = duplicate[..., 1], 1e-20
    few = rng.standard_normal((100, 4, 5))

    def of(samples):
        samples = samples.astype(dtype)
        samples = samples - samples.mean(axis=-2, keepdims=True)
        return samples.mT @ samples / samples.dtype.type(samples.shape[-2])

    conditions = with_spectrum(rotation(rng, 5, (100,)), np.geomspace(1e-12 if dtype == "float64" else 1e-5, 1, 5))
    centred = of(x) @ (np.eye(5) - 0.2).astype(dtype)
    centred = (np.eye(5) - 0.2).astype(dtype) @ centred
    singular = {
        "duplicated feature": of(duplicate),
        "dead feature": of(dead),
        "few samples": of(few),
        "centred": centred,
    }
    return singular, {"full rank": of(x), "units": of(units), "condition": conditions.astype(dtype)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_singular_covariances_are_always_refused_and_graded_ones_never(dtype, xp, rng):
    """Whatever sign rounding gave to the zero eigenvalue."""
    singular, regular = covariances(rng, dtype)
    for matrices, refused in ((singular, True), (regular, False)):
        for kind, x in matrices.items():
            for name in ("invsqrtm", "logm"):
                y = xp.numpy(getattr(ddnref, name)(xp.asarray(x), throw=False))
                assert np.all(np.all(np.isfinite(y), axis=(-2, -1)) != refused), (kind, name)
            y, saved = ddnref.sqrtm_fwd(xp.asarray(x))
            assert relative(xp.numpy(y @ y), x) <= 100 * np.finfo(dtype).eps, kind
            x_bar = xp.numpy(xp.derivative(ddnref.sqrtm_vjp, y, y, *saved, throw=False))
            assert np.all(np.all(np.isfinite(x_bar), axis=(-2, -1)) != refused), kind


def test_functions_of_singular_matrices_do_not_see_rounding(xp, rng):
    """At a zero eigenvalue a pseudo-inverse and a step are those of zero, a reciprocal is refused."""
    q, w = rotation(rng, 5, (50,)), np.asarray([0.0, 0.0, 1.0, 2.0, 5.0])
    x, ns = xp.asarray(with_spectrum(q, w)), xp.namespace
    positive = lambda w: ns.where(w > 0, w, ns.ones_like(w))
    inverse = ddnref.spectral_function(x, f=lambda w: ns.where(w > 0, 1 / positive(w), ns.zeros_like(w)))
    assert relative(xp.numpy(inverse), with_spectrum(q, [0.0, 0.0, 1.0, 0.5, 0.2])) <= 1e-14
    step = ddnref.spectral_function(x, f=lambda w: ns.astype(w > 0, w.dtype))
    assert relative(xp.numpy(step), with_spectrum(q, w > 0)) <= 1e-14
    y = xp.numpy(ddnref.spectral_function(x, f=lambda w: w**-0.5, throw=False))
    assert not np.any(np.all(np.isfinite(y), axis=(-2, -1)))


def test_the_singular_item_is_named(xp):
    x = xp.asarray(np.stack([np.eye(2), np.ones((2, 2)), np.eye(2)]))
    with pytest.raises(SingularError, match=r"\(item 1 of 3\): the eigenvalues are 0.0e\+00 to 2.0e\+00"):
        ddnref.logm(x)


@pytest.mark.parametrize("name", ["sqrtm", "invsqrtm", "logm"])
def test_indefinite_and_singular_matrices_are_refused(name, xp, rng):
    x = xp.asarray(with_spectrum(rotation(rng, 3, (2,)), [[1.0, 2.0, 3.0], [-1.0, 1.0, 2.0]]))
    with pytest.raises(SingularError, match=rf"{name} is not finite at an eigenvalue.*Add a ridge.*throw=False"):
        getattr(ddnref, name)(x)
    y = xp.numpy(xp.jit(lambda x: getattr(ddnref, name)(x, throw=False))(x))
    assert np.all(np.isfinite(y[0]))
    assert not np.any(np.isfinite(y[1]))
    arrays = with_eigenpairs(name, x, throw=False)
    y_dot = xp.numpy(xp.jit(partial(getattr(ddnref, f"{name}_jvp"), throw=False))(x, *arrays))
    assert np.all(np.isfinite(y_dot[0]))
    assert not np.any(np.isfinite(y_dot[1]))


def test_square_root_of_a_singular_matrix_has_a_value_and_no_gradient(xp, rng):
    q, w = rotation(rng, 4), [0.0, 0.0, 1.0, 4.0]
    y, saved = ddnref.sqrtm_fwd(xp.asarray(with_spectrum(q, w)))
    np.testing.assert_allclose(xp.numpy(y), with_spectrum(q, np.sqrt(w)), atol=1e-7)
    for derivative in (ddnref.sqrtm_vjp, ddnref.sqrtm_jvp):
        with pytest.raises(SingularError, match="The derivative of sqrtm is not finite"):
            derivative(y, y, xp.asarray(np.asarray(w)), saved[1])


def test_overflowing_exponential_is_refused(xp):
    x = xp.asarray(np.diag([1.0, 800.0]))
    with pytest.raises(SingularError, match="expm is not finite"):
        ddnref.expm(x)
    y, saved = ddnref.expm_fwd(xp.asarray(np.diag([-2000.0, 1.0])))
    x_bar = xp.numpy(xp.derivative(ddnref.expm_vjp, xp.asarray(np.ones((2, 2))), y, *saved))
    np.testing.assert_allclose(x_bar, [[0.0, np.e / 2001], [np.e / 2001, np.e]], rtol=1e-14)


def test_what_f_returns_is_checked():
    with pytest.raises(ValueError, match=r"f\(w\) has shape \(\), expected \(2,\)"):
        ddnref.spectral_function(np.eye(2), f=np.sum)
    with pytest.raises(TypeError, match=r"f\(w\) has dtype complex128"):
        ddnref.spectral_function(np.eye(2), f=lambda w: w + 0j)


def test_static_errors(rng):
    with pytest.raises(ValueError, match="x has shape"):
        ddnref.sqrtm(np.ones((2, 3)))
    y, (w, v) = ddnref.sqrtm_fwd(np.eye(2))
    with pytest.raises(ValueError, match=r"y_bar has shape \(3, 3\), expected \(2, 2\)"):
        ddnref.sqrtm_vjp(np.eye(3), y, w, v)
    with pytest.raises(TypeError, match="y_bar has dtype float32"):
        ddnref.sqrtm_vjp(np.eye(2, dtype=np.float32), y, w, v)
    with pytest.raises(ValueError, match=r"x_dot has shape \(3, 3\), expected \(2, 2\)"):
        ddnref.sqrtm_jvp(np.eye(3), y, w, v)
    with pytest.raises(TypeError, match="x_dot has dtype complex128"):
        ddnref.sqrtm_jvp(np.eye(2) + 0j, y, w, v)
    with pytest.raises(TypeError, match="x_dot is None"):
        ddnref.sqrtm_jvp(None, y, w, v)
    with pytest.raises(ValueError, match=r"x_dot has shape \(3, 3\), expected \(2, 2\)"):
        ddnref.sqrtm_second_derivative(np.eye(3), y, y, w, v)
    with pytest.raises(TypeError, match="y_bar has dtype float32"):
        ddnref.sqrtm_second_derivative(y, np.eye(2, dtype=np.float32), y, w, v)
    with pytest.raises(TypeError, match="x_dot is None"):
        ddnref.sqrtm_second_derivative(None, y, y, w, v)
    with pytest.raises(TypeError, match="d2f is 2, expected a function"):
        ddnref.spectral_function_second_derivative(y, y, y, w, v, **SQUARE, d2f=2)
    with pytest.raises(ValueError, match=r"d2f\(w\) has shape \(\), expected \(2,\)"):
        ddnref.spectral_function_second_derivative(y, y, y, w, v, **SQUARE, d2f=np.sum)


@pytest.mark.parametrize("name", NAMED)
def test_host_reads(name, host_reads, rng):
    from conftest import backend

    strict = backend("array-api-strict")
    x = strict.asarray(with_spectrum(rotation(rng, 4), [0.5, 1.0, 1.0, 2.0]))
    host_reads.clear()
    y, saved = getattr(ddnref, f"{name}_fwd")(x, throw=False)
    derivatives = [getattr(ddnref, f"{name}_{mode}") for mode in ("vjp", "jvp")]
    for derivative in derivatives:
        derivative(y, y, *saved, throw=False)
    second = getattr(ddnref, f"{name}_second_derivative")
    second(y, y, y, *saved, throw=False)
    assert host_reads == []
    getattr(ddnref, f"{name}_fwd")(x)
    for derivative in derivatives:
        derivative(y, y, *saved)
    second(y, y, y, *saved)
    assert host_reads == ["__bool__"] * 4
