"""Version, changelog, supported versions and the commands that check them agree with each other."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import ddnref

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS = (ROOT / "docs/versions.rst").read_text(encoding="utf-8")
FRAMEWORKS = {"torch", "jax", "autograd", "tensorflow", "dask", "cuda12", "cuda13"}


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert first == ("Unreleased" if "dev" in ddnref.__version__ else ddnref.__version__)


def test_types_are_shipped():
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert Path(ddnref.__file__).with_name("py.typed").is_file()


def rows():
    """The rows of the table of supported versions, by the package's name."""
    found = re.findall(r"   \* - ``(\S+)``\n     - (.+)\n     - (.+)\n     - (.+)\n", VERSIONS)
    return {name: columns for name, *columns in found}


def requirements():
    optional = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *optional["report"], *optional["test"]]
    for extra in FRAMEWORKS & set(optional):
        wanted += optional[extra]
    first = {}  # an extra may ask for more than the core does
    for item in wanted:
        first.setdefault(item.split(">=")[0], item)
    return sorted(item for item in first.values() if not item.startswith("ddnref["))


@pytest.mark.parametrize("requirement", requirements())
def test_every_requirement_is_in_the_table_of_versions(requirement):
    name, lowest = re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", requirement).groups()
    assert rows()[name][0] == lowest


def test_python_versions_agree():
    stated = rows()["python"][0]
    assert PROJECT["requires-python"] == f">={stated}"
    classified = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert classified[0] == stated


def test_the_conda_recipe_asks_for_the_same():
    recipe = (ROOT / "packaging/conda/recipe.yaml").read_text(encoding="utf-8")
    assert re.search(r'^  version: "(.+)"$', recipe, re.MULTILINE)[1] == ddnref.__version__.removesuffix(".dev0")
    host, run = (
        {re.sub(r"^ *- ", "", line).replace(" ", "") for line in block.splitlines()}
        for block in re.search(r"^  host:\n((?:    .+\n)+)  run:\n((?:    .+\n)+)", recipe, re.MULTILINE).groups()
    )
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert run == {f"python{PROJECT['requires-python']}", *PROJECT["dependencies"]}
    assert host == {"python" + PROJECT["requires-python"].removeprefix(">=") + ".*", "pip", *build}
    (command,) = [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    assert f"      - {command}\n" in recipe
    assert f"license: {PROJECT['license']}\n" in recipe


@pytest.mark.parametrize("command", re.findall(r"bash (\.ci/\w+)", VERSIONS + (ROOT / "CONTRIBUTING.md").read_text()))
def test_commands_exist(command):
    assert (ROOT / command).is_file()


def ci(*arguments):
    return subprocess.run(["bash", ".ci/run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_ci_names_its_stages():
    done = ci("--list")
    assert done.returncode == 0
    stages = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert stages.keys() >= {"lint", "unit", "readme-report", "readme-tests", "docs", "package", "lowest", "tests"}
    source = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert all(re.search(rf"^{name}\(\) {{", source, re.MULTILINE) for name in stages)
    documented = re.findall(r"`.ci/run ((?:--here )?[a-z -]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert {"lint", "unit"} <= {*" ".join(documented).split()} <= {"--here", "--list", *stages}


def test_ci_refuses_an_unknown_stage():
    done = ci("lint", "nothing")
    assert done.returncode == 2
    assert "unknown stage nothing" in done.stderr
