"""The README is true: its examples run, its table is the table of rules, its commands are two."""

import re
from pathlib import Path

import pytest

from ddnref._rules.table import TEXTS
from ddnref._rules.texts import capability_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_gives_what_it_says(capsys):
    (numpy_only,) = (code for code in EXAMPLES if "torch" not in code)
    assert len([line for line in numpy_only.splitlines() if line.strip()]) <= 16
    exec(compile(numpy_only, "README.md", "exec"), {})
    assert capsys.readouterr().out == "1.000000000\n"


@pytest.mark.framework("torch")
def test_the_torch_example(capsys):
    (bridged,) = (code for code in EXAMPLES if "torch" in code)
    names = {}
    exec(compile(bridged, "README.md", "exec"), names)
    assert names["x"].grad.tolist() == (2 * names["torch"].eye(4)).tolist()


def test_the_capability_table_is_the_table_of_rules():
    table = README.split("<!-- capabilities: begin -->\n")[1].split("<!-- capabilities: end -->")[0]
    assert table == capability_table(TEXTS)


def test_two_commands_set_up_everything():
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    assert len(commands) == 2
    assert all(command.startswith("python -m pip install ") and "\n" not in command for command in commands)
    assert commands[0].endswith("ddnref report")
    assert "pytest" in commands[1]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_contributing_runs_what_pre_commit_runs():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for entry in re.findall(r"entry: ([^,]+),", hooks):
        assert entry in contributing
        assert entry in (ROOT / ".ci/run").read_text(encoding="utf-8")
