"""Any command line ends with exit code 0, or with 2 and one line: random ones over all commands.

`pytest -m slow -n 0 tests/test_any_command_line.py` tries 2,000; the suite 100.
"""

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax import cli
from gptjax.configfile import CONFIG_OPTIONS
from gptjax.errors import UserError
from gptjax.generate import Completion
from gptjax.tokenizers.plain import ByteTokenizer


def verbs() -> dict[tuple[str, ...], Any]:
    """Every command with its function, from which its options follow; train has the keys of a config."""
    found: dict[tuple[str, ...], Any] = {("train",): None, ("sample",): cli.sample_from}
    found |= {("convert", name): function for name, function in cli.CONVERSIONS.items()}
    for name, (module, _) in cli.DATA_COMMANDS.items():
        function = getattr(importlib.import_module(f"gptjax.apps.data_prep.{module}"), name.replace("-", "_"))
        found["data", name] = function
    for group, modules in {
        "scaling": ["scaling.commands", "scaling.predict.commands"],
        "bench": ["bench.commands"],
        "launch": ["launch.commands"],
    }.items():
        for module in modules:
            made = importlib.import_module(f"gptjax.apps.{module}").VERBS
            found |= {(group, name): function for name, function in made.items()}
    found["chat",] = importlib.import_module("gptjax.apps.chat.commands").chat
    found["serve",] = importlib.import_module("gptjax.apps.serve.commands").serve
    found["plan",] = importlib.import_module("gptjax.apps.plan.commands").plan
    return found


VERBS = verbs()
PATHS = ["text.txt", "rows.jsonl", "table.csv", "c.yaml", "folder", "out/new", "missing", "fake-run", "~/x", "a b"]
NUMBERS = ["-1", "0", "1", "2", "3", "64", "257", "0.5", "-0.5", "nan", "inf", "1e-3", "1e400", "0x10", "1_000", "٣"]
ODD = [
    *(
        "",
        "null",
        "~",
        "--",
        "-",
        "-x",
        "--- a",
        "true",
        "[1, 2]",
        "{a: b}",
        "a: b",
        "&a [*a]",
        "[" * 2000,
        "é",
        "日本",
    ),
    *("caf\udce9", "a\nb", "x" * 5000, "gs://bucket/x", "http://a/b", "'", '"', "$(x)", "a=b", "=", "%", "\\", "\t"),
    *(str(10**30), "1" * 5000, "byte", "char", "v5e:4x4", "h100:2x8", "gpt2-124m", "-h", "--help", "--json", "!!x"),
    *("2020-01-01", "*.txt", "\u2028", "\ufeff", "a\0b"),
]


JOB = ("c.yaml", "--out=out/job", "--workdir=gs://b/r", "--data.path=gs://b/data")
# What makes a command line complete; None stands for a path.
SENSIBLE: dict[tuple[str, ...], tuple[str | None, ...]] = dict.fromkeys(VERBS, (None,)) | {
    ("train",): ("c.yaml",),
    ("sample",): ("fake-run",),
    ("serve",): ("fake-run",),
    ("chat",): ("fake-run",),
    ("convert", "from-hf"): (None, "--out=out/model"),
    ("convert", "to-hf"): (None, "--out=out/model"),
    ("convert", "to-gguf"): (None, "--out=out/model.gguf"),
    ("data", "prepare"): (None, "--out=out/data", "--tokenizer=byte", "--workers=1", "--val_frac=0.3"),
    ("data", "inspect"): ("prepared",),
    ("data", "train-tokenizer"): (None, "--out=out/tokenizer.json", "--vocab_size=300"),
    ("bench", "train"): (),
    ("bench", "sample"): (),
    ("bench", "data"): (),
    ("bench", "reach"): ("c.yaml", "text.txt"),
    ("plan",): ("c.yaml", "--topology=v5e:4x4"),
    ("scaling", "fit"): ("--table=table.csv",),
    ("scaling", "compare"): (None, None),
    ("scaling", "coord-check"): ("c.yaml",),
    ("launch", "slurm"): ("c.yaml", "--gpus_per_node=0"),
    ("launch", "gke"): (*JOB, "--image=i", "--topology=v5e:2x2"),
    ("launch", "serve-gke"): ("gs://bucket/run", "--image=i", "--out=out/serve"),
    ("launch", "tpu-vm"): (*JOB, "--image=i", "--topology=v5e:2x2", "--zone=z"),
}


def options_of(verb: tuple[str, ...]) -> dict[str, Any]:
    """The options of a command with their types; the keys of a config have none here."""
    function = VERBS[verb]
    keys = dict.fromkeys(CONFIG_OPTIONS)
    if function is None:
        return keys
    own = inspect.signature(function).parameters
    typed = {name: p.annotation for name, p in own.items() if name != "flags" and p.default is not p.empty}
    return typed | ({name: keys[name] for name in keys if name not in typed} if "flags" in own else {})


ANYTHING = st.one_of(st.sampled_from(PATHS), st.sampled_from(NUMBERS), st.sampled_from(ODD), st.text(max_size=8))


def values_of(kind: Any) -> st.SearchStrategy[str]:
    """Mostly values of a type, so that many a command line gets as far as the command."""
    names = [
        name for part in (kind, *typing.get_args(kind)) for name in typing.get_args(part) if isinstance(name, str)
    ]
    if names and "path" not in names:
        return st.sampled_from(names)
    if kind in (int, int | None):
        return st.sampled_from(["-1", "0", "1", "2", "3", "17", "64", "300", str(10**30)])
    if kind in (float, float | None):
        return st.sampled_from([*NUMBERS, "0.25"])
    if kind is bool:
        return st.sampled_from(["true", "false"])
    return ANYTHING


@st.composite
def command_lines(draw) -> list[str]:
    """A command, and words that may be its options and their values, or anything else."""
    groups = sorted({verb[0] for verb in VERBS})
    group = draw(st.sampled_from(groups))
    verb = draw(st.sampled_from(sorted(verb for verb in VERBS if verb[0] == group)))
    complete = draw(st.integers(0, 9)) > 0
    words = [draw(st.sampled_from(PATHS)) if word is None else word for word in SENSIBLE[verb]] if complete else []
    options = options_of(verb) or {"json": bool}
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(sorted(options)))
        value = draw(values_of(options[name]) if draw(st.integers(0, 3)) else ANYTHING)
        forms = [[f"--{name}", value]] * 4 + [[f"--{name}={value}"]] * 4 + [[f"--{name}"], [value]]
        added = draw(st.sampled_from(forms))
        words = [*added, *words] if draw(st.booleans()) else [*words, *added]
    return [*verb, *words] if draw(st.integers(0, 20)) else [*verb[:-1], draw(ANYTHING), *words]


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """A folder with a file of each kind, in which nothing trains, compiles, measures or asks the network."""
    folder = tmp_path_factory.mktemp("playground")
    (folder / "folder").mkdir()
    (folder / "home").mkdir()
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 20)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"name {i}"}) + "\n" for i in range(30)))
    (folder / "table.csv").write_text("params,tokens,loss\n1e6,1e8,3.5\n2e6,1e8,3.4\n")
    (folder / "c.yaml").write_text("model: {n_layers: 1, d_model: 32, n_heads: 2}\ntrain: {total_steps: 2}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["data", "prepare", "rows.jsonl", "--out=prepared", "--tokenizer=byte", "--val_frac=0.3"])[0] == 0
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PATH", str(folder / "home"))
        patch.setattr("gptjax.tokenizers.published_tokenizer", refuse)
        patch.setattr("gptjax.convert.hub._download", refuse)
        patch.setattr("gptjax.convert.load", load_or_echo(importlib.import_module("gptjax.convert").load))
        for heavy in ("trainer.train", "apps.plan.planning.make_plan", "apps.plan.planning.search"):
            importlib.import_module(f"gptjax.{heavy.rpartition('.')[0]}")
            patch.setattr(f"gptjax.{heavy}", (lambda *_, **__: 0) if heavy == "trainer.train" else refuse)
        if importlib.util.find_spec("uvicorn"):
            importlib.import_module("gptjax.apps.serve.run")
            patch.setattr("gptjax.apps.serve.run.run_server", lambda *_: None)
        for heavy in ("compare", "Side", "seconds_to_first_step"):
            patch.setattr(f"gptjax.apps.bench.commands.{heavy}", refuse)
        patch.setattr("gptjax.data.corpus.load_corpus", refuse)
        patch.setattr("gptjax.data.sources.fetch", refuse)
        for module in (
            "cli",
            "apps.plan.commands",
            "apps.scaling.commands",
            "apps.scaling.coordinates",
            "apps.serve.commands",
            "apps.chat.commands",
            "process",
        ):
            patch.setattr(f"gptjax.{module}.prepare_process", lambda *_: None)
        patch.setattr("gptjax.apps.scaling.coordinates.change_of_activations", refuse)
        patch.setattr("gptjax.decoding.beam.BeamSearch", refuse)  # the model that echoes has no engine
        yield folder


def refuse(*_: Any, **__: Any) -> Any:
    raise UserError("this test computes nothing large and asks nobody; try elsewhere")


def load_or_echo(load: Any) -> Any:
    """The real `load`, but for one path, which is a model that says its prompt again."""

    def complete(prompts: list[str], *_: Any) -> list[Completion]:
        return [Completion(prompt, [0], prompt, [0.0]) for prompt in prompts]

    tokenizer = ByteTokenizer()
    echo = SimpleNamespace(
        tokenizer=tokenizer,
        config=SimpleNamespace(context_length=9, vocab_size=tokenizer.vocab_size),
        complete=complete,
        stream=lambda *_: iter(()),
        prompt_ids=tokenizer.encode_prompt,
    )
    return lambda path, *how: echo if path == "fake-run" else load(path, *how)


def run(words: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["gptjax", *words], io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9"))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv, sys.stdin = before
    return code, out.getvalue(), err.getvalue()


def check(words: list[str]) -> None:
    code, out, err = run(words)
    said = [line for line in err.splitlines() if not line.startswith(("note: ", "warning: ")) and "MB/s" not in line]
    assert code in (0, 2), (words, err)
    assert "Traceback" not in out + err
    if code == 2:
        assert len(said) == 1 and said[0].startswith("error: ") and len(said[0]) < 2100, (words, err)


def settle(examples: int):
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=slow)


@settle(100)
@given(words=command_lines())
def test_a_random_command_line_ends_with_0_or_one_line(playground, words):
    check(words)


@pytest.mark.slow
@settle(2000)
@given(words=command_lines())
def test_2000_random_command_lines_end_with_0_or_one_line(playground, words):
    check(words)


def test_every_command_explains_itself(playground):
    for verb in VERBS:
        code, out, err = run([*verb, "--help"])
        assert (code, err) == (0, "") and out.startswith("usage: "), verb
    assert Path("c.yaml").exists() and os.listdir("folder") == []
