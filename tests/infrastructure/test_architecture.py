"""The layers of the package: imports point down, nothing goes in circles, and only the kernels know the libraries."""

import ast
import re
from pathlib import Path

import pytest

import ddnref

HOME = Path(ddnref.__file__).parent

LAYERS = (
    {"errors"}, {"_core"}, {"_kernels"}, {"testing"}, {"operators"}, {"krylov"}, {"linalg"}, {"implicit"},
    {"nodes", "networks"}, {"curvature"}, {"_rules"}, {"interop", "verify", "reference"}, {"examples"}, {"report"},
)  # fmt: skip
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}

KNOW_LIBRARIES = ("ddnref._kernels.", "ddnref.interop.", "ddnref._core.arrays", "ddnref.operators._scipy")
"""Modules that may ask an array for its library: kernels, bridges, the definition of a namespace, wrappers of SciPy."""

LIBRARY_TESTS = re.compile(r"is_(numpy|cupy|torch|jax|dask|pydata_sparse)_(array|namespace)")
ARRAY_TYPES = {"np.ndarray", "np.generic", "numpy.ndarray", "torch.Tensor", "jax.Array", "cupy.ndarray"}
LIBRARY_KERNELS = {f"ddnref._kernels.{name}" for name in ("numpy", "cupy", "torch", "jax")}


def package(module):
    return [*module.split("."), ""][1]


def imports(module, source, modules):
    """Every import of a module of the package: ``(imported module, imported name or None)``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "ddnref")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "ddnref"):
            home = ".".join(module.split(".")[: -node.level]) if node.level else ""
            path = ".".join(filter(None, (home, node.module)))
            for alias in node.names:
                full = f"{path}.{alias.name}"
                yield (full, alias.name) if full in modules else (path, alias.name)


def violations(modules):
    """Sentences about each breach of the rules; `modules` maps names to source texts."""
    edges = {module: list(imports(module, source, modules)) for module, source in modules.items()}
    found = []
    for module, targets in edges.items():
        if module == "ddnref":
            continue  # the top level re-exports
        for target, name in targets:
            # Nothing may import the top level, which imports everything; examples and the report use it as users do.
            if target == "ddnref" and package(module) not in ("verify", "examples", "report", "reference"):
                found.append(f"{module} imports the top level")
            elif target != "ddnref" and package(target) != package(module):
                if RANK[package(target)] >= RANK[package(module)]:
                    found.append(f"{module} imports upwards from {target}")
                if (name or "").startswith("_"):
                    found.append(f"{module} imports the private name {name} from {target}")
    found += circles({module: {target for target, _ in targets} for module, targets in edges.items()})
    for module, source in modules.items():
        if not module.startswith(KNOW_LIBRARIES):
            found += [f"{module}: {text}" for text in library_tests(source)]
            found += [f"{module} imports {target}" for target, _ in edges[module] if target in LIBRARY_KERNELS]
    return found


def circles(edges):
    """Modules that import each other, by a depth-first search over all imports, those inside functions too."""
    found, done, path = [], set(), []

    def visit(module):
        if module in path:
            found.append("a circle: " + " -> ".join([*path[path.index(module) :], module]))
        elif module not in done and module != "ddnref":
            path.append(module)
            for target in sorted(edges.get(module, ())):
                visit(target)
            done.add(path.pop())

    for module in sorted(edges):
        visit(module)
    return found


def library_tests(source):
    """Places that ask an array which library it comes from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if LIBRARY_TESTS.fullmatch(name):
                yield f"line {node.lineno} calls {name}"
        elif isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            parts = [node.left, *node.comparators]
            yield from (f"line {node.lineno} compares a type" for part in parts if ast.unparse(part) in ARRAY_TYPES)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            parts = ast.walk(node.args[1])
            yield from (f"line {node.lineno} asks isinstance" for part in parts if ast.unparse(part) in ARRAY_TYPES)


def sources():
    found = {}
    for path in HOME.rglob("*.py"):
        parts = path.relative_to(HOME.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def test_every_package_has_its_layer():
    assert {package(module) for module in sources()} - {""} == set(RANK)
    entries = sorted(path.name for path in HOME.iterdir() if path.name != "__pycache__")
    assert len(entries) <= 20
    assert {name for name in entries if (HOME / name).is_file()} == {"__init__.py", "errors.py", "py.typed"}
    assert {name for name in entries if name.startswith("_")} == {"__init__.py", "_core", "_kernels", "_rules"}


def test_the_rules_hold():
    assert violations(sources()) == []


@pytest.mark.parametrize(("module", "source", "message"), [
    ("ddnref.krylov._cg", "from ddnref.linalg._eigh import eigh", "imports upwards from ddnref.linalg._eigh"),
    ("ddnref.krylov._cg", "def f():\n    import ddnref.linalg._eigh", "imports upwards from ddnref.linalg._eigh"),
    ("ddnref.krylov._cg", "from ..linalg import _eigh", "imports upwards from ddnref.linalg._eigh"),
    ("ddnref.nodes._a", "from ddnref.networks._b import c", "imports upwards from ddnref.networks._b"),
    ("ddnref.krylov._cg", "from ddnref import linalg", "imports upwards from ddnref.linalg"),
    ("ddnref.krylov._cg", "import ddnref", "imports the top level"),
    ("ddnref.linalg._eigsh", "from ddnref.krylov._cg import _step", "imports the private name _step"),
    ("ddnref.linalg._eigsh", "from ddnref.krylov import _cg", "imports the private name _cg"),
    ("ddnref.linalg._eigsh", "from ddnref.linalg._eigh import eigh", "a circle"),
    ("ddnref.krylov._cg", "if array_api_compat.is_numpy_array(x): pass", "calls is_numpy_array"),
    ("ddnref.krylov._cg", "y = x if type(x) is np.ndarray else 0", "compares a type"),
    ("ddnref.krylov._cg", "y = isinstance(x, (np.ndarray, np.generic))", "asks isinstance"),
    ("ddnref.krylov._cg", "from ddnref._kernels.numpy import eigh", "imports ddnref._kernels.numpy"),
])  # fmt: skip
def test_a_planted_violation_is_found(module, source, message):
    right = {
        "ddnref.linalg": "from ddnref.linalg._eigh import eigh",
        "ddnref.linalg._eigh": "from ddnref.krylov._cg import cg\nfrom ddnref.linalg._eigsh import eigsh",
        "ddnref.linalg._eigsh": "from ddnref._kernels.dense import eigh",
        "ddnref.krylov._cg": "import numpy",
    }
    assert violations(right) == []
    assert any(message in text for text in violations({**right, module: source}))
