"""The README's commands are those that CI runs, and the files, names and keys in README and docs exist."""

import ast
import re
from pathlib import Path

from conftest import ROOT

from gptjax.config import Config, RopeScaling, plain_values

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for config in re.findall(r"configs/[\w.]+\.yaml", text):
            assert (ROOT / config).exists(), f"{page.name}: {config}"


def defined_names(path: Path) -> set[str]:
    """Return the names that a file defines, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_python_names_that_readme_and_docs_name_exist():
    """A page writes them as `folder/file.py:name`, from the repository's root or from the package."""
    found = 0
    for page in PAGES:
        for path, name in re.findall(r"([\w./-]+\.py):([A-Za-z_]\w*(?:\.\w+)?)", page.read_text()):
            places = [place for place in (ROOT / path, ROOT / "gptjax" / path) if place.is_file()]
            assert places, f"{page.name}: {path} does not exist"
            assert any(name in defined_names(place) for place in places), f"{page.name}: {path} defines no {name}"
            found += 1
    assert found > 20


def test_config_keys_that_readme_and_docs_name_exist():
    """A page writes them as flags, `--section.key`, or as `section.key` in backticks."""
    keys = {*plain_values(Config()), *plain_values(RopeScaling(), "model.positions.scaling.")}
    known = {key.rsplit(".", count)[0] for key in keys for count in range(key.count(".") + 1)}
    sections = "|".join(sorted({key.partition(".")[0] for key in keys if "." in key}))
    found = 0
    for page in PAGES:
        for flag, quoted in re.findall(
            rf"--((?:{sections})\.[\w.]+)|`((?:{sections})(?:\.\w+)+)[`:]", page.read_text()
        ):
            key = flag or quoted
            if not key.endswith((".py", ".safetensors", ".json")):
                assert key in known, f"{page.name}: there is no key {key}"
                found += 1
    assert found > 40
