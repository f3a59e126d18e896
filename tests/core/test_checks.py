"""Shapes and dtypes from a signature: what fits passes, and the message names what does not."""

import numpy as np
import pytest

from ddnref._core.checks import conform

SIGNATURE = "(m,m),(m)r,(m,k)"


def arrays(**more):
    return {"v": np.ones((2, 3, 3)), "w": np.ones((2, 3)), "y": np.ones((2, 3, 4))} | more


def test_what_fits(xp):
    found = conform(SIGNATURE, **{name: xp.asarray(a) for name, a in arrays().items()})
    assert (found.batch, found.sizes) == ((2,), {"m": 3, "k": 4})
    assert conform(SIGNATURE, **arrays(w=None)).sizes == {"m": 3, "k": 4}
    assert conform(SIGNATURE, **arrays(v=np.ones((2, 3, 3), complex), y=np.ones((2, 3, 4), complex))).batch == (2,)
    assert conform("(),()", a=np.ones(()), b=np.ones(())).batch == ()


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"w": np.ones((2, 4))}, ValueError, r"w has shape \(2, 4\), expected \(2, 3\)"),
    ({"w": np.ones(3)}, ValueError, r"w has shape \(3,\), expected \(2, 3\)"),
    ({"v": np.ones((2, 3, 4))}, ValueError, r"v has shape .*expected \(..., m, m\): square in its last two axes"),
    ({"v": np.ones(3)}, ValueError, r"v has shape \(3,\), expected \(..., m, m\)"),
    ({"y": np.ones((1, 3, 4))}, ValueError, r"y has shape \(1, 3, 4\), expected \(2, 3, 4\)"),
    ({"y": np.ones((2, 3, 4), np.float32)}, TypeError, "y has dtype float32, expected float64"),
    ({"w": np.ones((2, 3), complex)}, TypeError, "w has dtype complex128, expected float64"),
    ({"v": np.ones((2, 3, 3), int)}, TypeError, "v has dtype int64"),
    ({"v": [[1.0]]}, TypeError, "v is a builtins.list"),
])  # fmt: skip
def test_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        conform(SIGNATURE, **arrays(**change))


def test_a_length_that_is_known_from_elsewhere():
    assert conform(SIGNATURE, sizes={"k": 4}, **arrays()).sizes == {"m": 3, "k": 4}
    with pytest.raises(ValueError, match=r"y has shape \(2, 3, 4\), expected \(2, 3, 5\)"):
        conform(SIGNATURE, sizes={"k": 5}, **arrays())


def test_axes_that_may_not_be_empty_and_real_operations():
    assert conform("(m)", x=np.ones(0)).sizes == {"m": 0}
    with pytest.raises(ValueError, match=r"expected \(..., m\) with m at least 1"):
        conform("(m+)", x=np.ones(0))
    with pytest.raises(ValueError, match=r"expected \(..., m, n\) with n at least 1\."):
        conform("(m,n+)", x=np.ones((2, 0)))
    with pytest.raises(TypeError, match="real arrays only"):
        conform("(m)", real_only=True, x=np.ones(2, complex))
