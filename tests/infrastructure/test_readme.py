"""README and first pages are true: examples run, CI runs the commands, tables and pictures match their sources."""

import re
import tomllib
from pathlib import Path

import pytest

import ddnref

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / f"docs/{name}.rst").read_text(encoding="utf-8") for name in ("index", "quickstart")}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
CI = (ROOT / ".ci/run").read_text(encoding="utf-8")


def commands(page):
    """The lines of a page's shell blocks."""
    blocks = re.findall(r"^\.\. code-block:: sh\n\n((?:   .*\n|\n)+)", page, re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_examples_are_those_of_the_first_page():
    """`test_docs.py` runs the examples of the first page, and compares what they print."""
    blocks = re.findall(r"```(?:python|text)\n(.*?)```", README, re.DOTALL)
    shown = [[line for line in block.splitlines() if line] for block in blocks]
    blocks = re.findall(r"\.\. code-block:: \w+\n   :class: \w+\n\n((?:   .*\n|\n)+)", PAGES["index"])
    assert shown == [[line[3:] for line in block.splitlines() if line] for block in blocks]
    assert len(shown) == 4
    for code in shown[::2]:
        assert len([line for line in code if not re.match(r"import|from", line)]) <= 14


@pytest.mark.framework("torch")
def test_the_gradient_of_the_first_example_is_right():
    import torch

    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], "README.md", "exec"), names)
    images, gradient = names["images"].numpy(), names["gradient"]
    assert (images == 0).all(axis=0).sum() == 16  # "Sixteen pixels are blank"
    direction = torch.linspace(-1, 1, 64, dtype=torch.float64)

    def unexplained(step):
        x = names["images"] * (1 + step * direction)
        return torch.linalg.eigvalsh(x.mT @ x)[:-4].sum() / x.numel()

    slope = (unexplained(1e-5) - unexplained(-1e-5)) / 2e-5
    assert abs(slope / (gradient @ direction) - 1) < 1e-6


def test_two_commands_set_up_everything():
    """The stages readme-report and readme-tests of CI run them in fresh clones."""
    found = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    assert len(found) == 2
    assert all(command.startswith("python -m pip install ") and "\n" not in command for command in found)
    assert found[0].endswith("ddnref report")
    assert "pytest" in found[1]


def test_the_commands_of_the_first_pages_run_somewhere():
    """An installation is a part of a command of the README, and the rest is called by a test."""
    verify = (ROOT / "tests/verify/test_verify.py").read_text(encoding="utf-8")
    for page in PAGES.values():
        found = commands(page)
        assert found
        for command in found:
            if command.startswith("python -m pip install "):
                assert f"```sh\n{command} &&" in README
            else:
                arguments = ", ".join(f'"{word}"' for word in command.removeprefix("ddnref ").split())
                assert f"main([{arguments}]) == 0" in verify, command


def test_the_table_of_installation_has_every_extra():
    table = README.split("<!-- install: begin -->\n")[1].split("<!-- install: end -->")[0]
    assert set(re.findall(r"\.\[(\w+)\]", table)) == set(EXTRAS)
    installed = {name for line in re.findall(r"install .*\.\[([\w,]+)\]", CI) for name in line.split(",")}
    assert installed >= {"torch", "jax", "autograd", "dask", "cuda12", "docs", "dev"}  # CI installs these


def test_every_extra_of_the_pages_exists():
    for path in [*(ROOT / "docs").glob("*.rst"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for extras in re.findall(r'"(?:\.|ddnref)\[([\w,]+)\]"', path.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= set(EXTRAS), path.name


def test_the_pictures_were_drawn_as_stated():
    said = re.search(r"drawn on (\S+) by `(python docs/pictures.py)` with\s+(.*?)\.\n", README, re.DOTALL)
    for name in ("deblurring", "repeated_eigenvalues"):
        data = (ROOT / f"docs/_static/{name}.png").read_bytes()
        assert f"docs/_static/{name}.png" in README
        text = re.search(rb"tEXtComment\x00([^\x00]+)", data)[1].decode("latin1")
        assert text.startswith(f"{said[1]}, ddnref {ddnref.__version__}, ")
        assert all(version.split("+")[0] in text for version in " ".join(said[3].split()).split(", "))
        assert said[2].encode() in data


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    heads = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", README, re.M)}
    assert {*re.findall(r"\]\(#([^)]+)\)", README)} <= heads


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    title = re.search(r'^title: "(.+)"$', citation, re.M)[1]
    assert f"\nversion: {ddnref.__version__}\n" in citation
    assert f"title   = {{{title}}},\n  version = {{{ddnref.__version__}}},\n" in README


def test_contributing_runs_what_pre_commit_runs():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for entry in re.findall(r"entry: ([^,]+),", hooks):
        assert entry in contributing
        assert entry in CI
