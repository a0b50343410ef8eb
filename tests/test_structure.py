"""The shape of the code: floors, the lengths of files and functions, and the linter."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from gptjax.configfile import _StrictLoader

PACKAGE = ROOT / "gptjax"

# A file imports only from the floors above its own line here. Files of one folder may import each other.
FLOORS = [
    ["errors", "shell.files", "presets", "shell.display"],
    ["shell.paths", "shell.console"],
    ["shell.commandline"],
    ["checks", "cpu", "shell.environment", "figures"],
    ["config", "configversions"],
    [
        "parametrization",
        "checksums",
        "fingerprint",
        "configfile",
        "hosts",
        "pages",
        "sharding",
        "tokenizers",
        "process",
        "lifecycle.faults",
    ],
    [
        "nn.attention",
        "nn.convolution",
        "nn.products",
        "nn.rotary",
        "nn.grouped",
        "loss",
        "muon",
        "spikes",
        "sampling",
        "decoding.grammars",
        "decoding.answers",
    ],
    ["optim"],
    ["checkpoint", "metrics"],
    ["lifecycle.goodput"],
    ["nn.weights"],
    ["nn.layers", "nn.blocked", "nn.kernels", "nn.ring", "data"],
    ["nn.backends", "nn.moe", "nn.pipeline"],
    ["nn.transformer"],
    ["nn.adapters"],
    ["objectives", "decoding.adapter_stack"],
    ["step", "engine"],
    ["generate", "decoding.prompts", "decoding.marks"],
    ["decoding.scoring", "decoding.beam", "decoding.speculative", "decoding.forms", "inspection"],
    ["convert"],
    ["lifecycle.report", "lifecycle.rundir", "lifecycle.start", "lifecycle.evaluation"],
    ["lifecycle.reference"],
    ["hooks", "lifecycle.closing", "lifecycle.rollback", "lifecycle.verification"],
    ["trainer"],
    ["lifecycle.following"],
    [
        "apps.bench",
        "apps.chat",
        "apps.data_prep",
        "apps.evaluate",
        "apps.inspection",
        "apps.launch",
        "apps.plan",
        "apps.report",
        "apps.sample",
        "apps.scaling",
        "apps.serve",
    ],
    ["cli", "apps"],
    ["__main__", "__init__"],
]
# Folders whose files lie on several floors.
SHARED_ROOMS = {"nn", "lifecycle", "decoding", "shell"}
STARTS_PYTHON = {"apps.bench", "apps.plan", "apps.scaling"}  # and nothing but Python: see environment.run_program
ALONE = {
    "subprocess": {"shell.environment", *STARTS_PYTHON},
    "orbax": {"checkpoint"},
    "grain": {"data"},
    "wandb": {"metrics"},
    "tensorboardX": {"metrics"},
    "starlette": {"apps.serve"},
    "uvicorn": {"apps.serve"},
}


def room(module: str) -> str:
    """The entry of FLOORS to which a module, named without `gptjax.`, belongs."""
    known = {name for floor in FLOORS for name in floor}
    return next((module[:end] for end in _ends(module) if module[:end] in known), module)


def _ends(module: str) -> list[int]:
    return [i for i in range(len(module), 0, -1) if i == len(module) or module[i] == "."]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" and parts[0] in SHARED_ROOMS and len(parts) == 2:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name.removeprefix("gptjax.") in MODULES} or {node.module}
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    own = room(module)
    assert own in height, f"{module} has no floor; add it to FLOORS"
    for imported in imports(MODULES[module]):
        top = imported.split(".")[0]
        assert own in ALONE.get(top, {own}), f"{module} imports {top}"
        if top == "gptjax" and imported != "gptjax":
            target = room(imported.removeprefix("gptjax."))
            assert target == own or height[target] < height[own], f"{module} imports {imported}"


# Modules that run inside compiled programs: whether they may convert floats, and to what (docs/design.md, rule 5).
CASTS = dict.fromkeys(["nn.layers", "nn.rotary", "nn.weights", "nn.adapters", "nn.moe", "nn.transformer"], "any")
CASTS |= dict.fromkeys(["loss", "optim"], "any")
CASTS |= dict.fromkeys(["nn.attention", "nn.blocked", "nn.grouped", "nn.ring"], "to the dtype of an argument")
INTEGERS = ("jnp.int32", "np.int32")


def casts(path: Path) -> list[str]:
    """The dtypes to which a file converts arrays, as they are written there, without integers."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = [ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func).endswith(".astype")]
    assert not [call for call in calls if "convert_element_type" in ast.unparse(call.func)], path
    return [dtype for dtype in found if dtype not in INTEGERS]


def test_only_the_model_converts_floats():
    compiled = {
        name: path
        for name, path in modules().items()
        if name.startswith("nn.") or name in ("loss", "spikes", "optim", "sampling", "objectives", "step", "engine")
    }
    found = {name: dtypes for name, path in compiled.items() if (dtypes := casts(path))}
    assert found.keys() == CASTS.keys()
    for name, dtypes in found.items():
        assert CASTS[name] == "any" or all(dtype.endswith(".dtype") for dtype in dtypes), name


def test_what_the_index_of_questions_names_exists():
    text = (ROOT / "docs" / "design.md").read_text()
    index = text[text.index("## Where to find what") : text.index("## From tokens to loss")]
    named = re.findall(r"`([a-z_/]+\.py):([A-Za-z_.]+)`", index)
    assert len(named) > 25
    for file, name in named:
        tree = ast.parse((PACKAGE / file).read_text())
        for part in name.split("."):
            tree = next((node for node in tree.body if part in _names(node)), None)
            assert tree is not None, f"docs/design.md: {file} has no {name}"


def _names(node: ast.stmt) -> list[str]:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]


CODE_IN_DATA = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_that_is_read_can_run_code(module):
    """docs/security.md: no pickle, no eval, and only YAML's safe loader."""
    path = MODULES[module]
    assert not {name.split(".")[0] for name in imports(path)} & CODE_IN_DATA
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called, words = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            assert called not in ("eval", "exec", "compile", "torch.load", "yaml.full_load", "yaml.unsafe_load")
            assert "allow_pickle" not in words and "trust_remote_code" not in words
            if called in ("yaml.load", "yaml.load_all"):
                assert ast.unparse(node.args[1]) == "_StrictLoader"
    assert issubclass(_StrictLoader, yaml.SafeLoader)


def test_the_tests_that_the_page_of_security_names_exist():
    named = set(re.findall(r"`(tests/[a-z_/]+\.py)`", (ROOT / "docs" / "security.md").read_text()))
    assert len(named) >= 9
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_no_file_is_over_500_lines():
    files = [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > 500}
    assert not long


def test_no_function_is_over_60_lines():
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert not long


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
