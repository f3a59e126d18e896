"""``ddnref gpu-record``, as far as NumPy arrays can show; tests/kernels/test_cupy.py runs it over CuPy's emulation."""

import math

import numpy as np
import pytest

from ddnref._rules.table import RULES
from ddnref.verify import _gpu


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", _gpu.DTYPES)
def test_every_rule_has_a_case(name, dtype):
    forward, vjp = _gpu.rule(np.asarray, name, 2, 4, dtype)
    for y in (*forward()[0], *vjp()):
        assert y.dtype == dtype
        assert np.isfinite(y).all()


@pytest.mark.parametrize("name", _gpu.SOLVERS)
def test_every_solver_has_a_case(name):
    _, info = _gpu.solver(np.asarray, name, 16, "float32")()
    assert np.all(info.converged)


def test_networks_have_a_case():
    for call in _gpu.networks(np.asarray, (5, 4, 3, 3)).values():
        assert call() is not None


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax")
])  # fmt: skip
def test_bridges_are_compared(name, monkeypatch):
    monkeypatch.setattr(_gpu, "BRIDGED", ("eigh", "solve"))
    rows = list({"torch": _gpu.torch_bridge, "jax": _gpu.jax_bridge}[name]("cpu"))
    assert [row["rule"] for row in rows] == ["eigh", "solve"]
    assert all(row["difference"] < 1e-12 for row in rows), rows


@pytest.mark.parametrize("bridge", [_gpu.torch_bridge, _gpu.jax_bridge])
def test_a_missing_framework_is_named(bridge, monkeypatch):
    monkeypatch.setattr(_gpu, "find_spec", lambda name: None)
    (row,) = bridge("cuda")
    assert "is not installed or has no" in row["skipped"]


def test_a_wrong_bridge_is_seen():
    def gradients(function, *inputs, bars):
        return [2 * x_bar for x_bar in _gpu.rule(np.asarray, "solve", 3, 16, "float64")[1]()]

    assert _gpu._bridged("solve", lambda *_, **__: None, gradients)["difference"] == pytest.approx(1.0)


def test_the_tests_of_a_clone_are_run_and_summed_up(monkeypatch, tmp_path):
    conftest = tmp_path / "tests" / "conftest.py"
    conftest.parent.mkdir()
    conftest.write_text("def pytest_addoption(parser):\n    parser.addoption('--backend')\n")
    body = "def test_right(request):\n    assert request.config.getoption('--backend') == 'cupy'\n"
    (conftest.parent / "test_a.py").write_text(body + "def test_wrong():\n    assert 0\n")
    monkeypatch.setattr(_gpu, "TESTS", conftest)
    found = _gpu.array_tests("tests")
    assert found["command"].endswith("--backend cupy tests")
    assert found["summary"].startswith("1 failed, 1 passed")
    assert [name.split(" ")[0] for name in found["failed"]] == ["tests/test_a.py::test_wrong"]


def test_an_installation_has_no_tests(monkeypatch, tmp_path):
    monkeypatch.setattr(_gpu, "TESTS", tmp_path / "conftest.py")
    assert "clone" in _gpu.array_tests()["skipped"]


def test_failures_are_listed_in_words():
    kept = {
        "verify": [{"rule": "eigh", "check": "vjp", "error": 1.0, "passed": False}],
        "rules": [{"rule": "svd", "dtype": "float32", "forward": {"ms": 1.0}, "vjp": {"error": "ValueError: x"}}],
        "solvers and networks": [],
        "bridges": [{"bridge": "jax", "rule": "eigh", "error": "TypeError: y"}],
        "tests": {"failed": ["tests/a.py::b"]},
    }
    assert _gpu.failures(kept) == [
        "verify: eigh, vjp: 1.0", "rules: svd, float32: ValueError: x", "bridges: jax, eigh: TypeError: y",
        "tests: tests/a.py::b",
    ]  # fmt: skip


def test_json_has_no_nan():
    assert _gpu._plain({"a": (math.nan, 1.23456, np.True_, None)}) == {"a": ["nan", 1.235, True, None]}
