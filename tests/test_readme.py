"""The README's commands are those that CI runs, and what it names is there."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_two_commands_are_those_that_ci_runs():
    """.ci/run takes them from here by their first words."""
    first, second = (
        "pip install -e '.[demo]' && python train.py configs/quickstart.yaml",
        "pip install -e '.[test]' && pytest",
    )
    lines = README.splitlines()
    assert first in lines
    assert second in lines
    ci = (ROOT / ".ci" / "run").read_text()
    assert "command_of demo" in ci
    assert "command_of test" in ci


def test_files_that_readme_and_docs_name_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for config in re.findall(r"configs/[\w.]+\.yaml", text):
            assert (ROOT / config).exists(), f"{page.name}: {config}"
