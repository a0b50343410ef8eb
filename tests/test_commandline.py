"""Command lines: values that look like something else, options in any place, and what standard input may hold."""

import dataclasses
import io
import json
import shlex
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jaxlib
import pytest
import yaml

from gptjax import cli
from gptjax.configfile import config_to_yaml, load_config, read_yaml
from gptjax.errors import UserError
from gptjax.generate import Completion
from gptjax.shell.commandline import split_words


@pytest.fixture
def prompts(monkeypatch) -> list[str]:
    """The prompts that `sample` gives to a model that echoes them."""
    given: list[str] = []

    def complete(texts: list[str], *_: Any) -> list[Completion]:
        given.extend(texts)
        return [Completion(text, [0], " é€", [0.0]) for text in texts]

    tokenizer = SimpleNamespace(encode_prompt=lambda text: [0], decode=lambda ids: "x")
    lm = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(context_length=9999), complete=complete)
    monkeypatch.setattr("gptjax.convert.load", lambda *args: lm)
    return given


TEXTS = ["null", "~", "--- a", "-x", "-5", "", "true", "[1]", "{a: b}", "a: b", "--seedy", "--", "a\nb", "1e3", "é"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_the_text_that_was_typed(prompts, capsys, text):
    assert cli.sample(["run", "--prompt", text, "--num_samples=2"]) == 0
    assert cli.sample([f"--prompt={text}", "run"]) == 0
    assert prompts == [text] * 3


def test_a_prompt_that_is_an_option_needs_an_equals_sign(prompts, capsys):
    for option in ("--seed", "--help", "--seed=1"):
        with pytest.raises(SystemExit, match="2"):
            cli.sample(["run", "--prompt", option, "5"])
        assert f"write --prompt={option}" in capsys.readouterr().err
    assert cli.sample(["run", "--prompt=--seed"]) == 0
    assert prompts == ["--seed"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["run", "--prompt"], "--prompt needs a value"),
        (["run", "-x"], "unknown option -x"),
        (["run", "--promt", "a"], "did you mean '--prompt'"),
        (["run", "--prompt", "caf\udce9"], "is not UTF-8"),
        (["run\udcff"], "is not UTF-8"),
        (["run", "--num_samples", "two"], "num_samples"),
        (["run", "--top_k", "[" * 5000], "top_k"),
        (["run", "--num_samples", "0"], "num_samples 0 must be at least 1"),
        (["run", "--seed", str(10**30)], "seed 1000"),
        (["run", "--seed", "-1"], "seed -1 must lie in [0, 2^32)"),
        (["a", "b"], "Unrecognized arguments: b"),
        ([], "required"),
    ],
)
def test_a_wrong_command_line_is_one_line(prompts, capsys, words, complaint):
    with pytest.raises(SystemExit, match="2"):
        cli.sample(words)
    said = capsys.readouterr().err
    assert complaint.lower() in said.lower() and said.count("\n") == 1 and said.startswith("error: ")


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xff\xfea\x00", b"\x80"])
def test_standard_input_that_is_not_utf8_is_one_line(prompts, monkeypatch, capsys, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    with pytest.raises(SystemExit, match="2"):
        cli.sample(["run", "--prompt", "-"])
    assert "standard input is not UTF-8: byte 0x" in capsys.readouterr().err


def test_standard_input_is_utf8_in_any_locale(prompts, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffcafé".encode()), encoding="ascii"))
    assert cli.sample(["run", "--prompt", "-"]) == 0
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit, match="2"):
        cli.sample(["run", "--prompt", "-"])
    assert prompts == ["café"]


def test_a_file_of_prompts_has_one_a_line(prompts, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028still one\n\ntwo\x0cstill two\n".encode())
    assert cli.sample(["run", "--prompt_file", str(path)]) == 0
    assert prompts == ["one\u2028still one", "", "two\x0cstill two"]


def test_words_of_an_undecoded_locale_are_read_as_utf8():
    undecoded = "café".encode().decode("ascii", "surrogateescape")
    assert split_words(["--prompt", undecoded], {"prompt": False}, "p").options == [("prompt", "café")]


def test_after_two_dashes_every_word_stands_alone(prompts, capsys):
    assert cli.sample(["--prompt", "a", "--", "-run"]) == 0
    with pytest.raises(SystemExit, match="2"):
        cli.sample(["run", "--", "--prompt=a"])
    assert prompts == ["a"]


def test_help_is_given_wherever_it_is_asked_for(capsys):
    for words in (["--help"], ["run", "-h"], ["--seed", "1", "--help"]):
        assert cli.sample(words) == 0
        assert "--temperature" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        cli.train(["--model.n_layers", "2", "-h"])
    assert "--model.n_layers" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------
# The config's file and flags


def config_file(folder, text: str) -> str:
    path = folder / "my config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_version_is_printed_with_those_that_decide_a_runs_numbers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gptjax", "--version"])
    assert cli.main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith("gptjax ")
    assert f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, " in printed


def test_commands_without_docstrings_are_listed():
    """`python -OO` removes docstrings."""
    assert cli._about({"a": lambda args: 0, "b": cli.serve})["a"] == ""


def test_flags_may_stand_before_the_config_file(tmp_path):
    path = config_file(tmp_path, "model: {n_layers: 1}\n")
    for words in (["--workdir", "w", path], [path, "--workdir=w"], ["--workdir", "w", "--", path]):
        cfg = load_config(["--mesh.data", "-1", *words])
        assert (cfg.workdir, cfg.model.n_layers) == ("w", 1)
    for words in ([], ["--workdir", "w"], [path, path]):
        with pytest.raises(UserError, match="give one config file"):
            load_config(words)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model.positions.scaling.factor", "[" * 300], "is not YAML"),
        (["--model.positions.scaling.factor", "[" * 5000], "is nested too deeply"),
        (["--model.positions.scaling.factor", "2020-13-99"], "model.positions.scaling.factor 2020-13-99 must be a"),
        (["--model.n_kv_heads", "x"], "model.n_kv_heads x must be a whole number or null"),
        (["--train.total_steps", "1e3"], "train.total_steps 1000.0 must be a whole number"),
        (["--model.bias=maybe"], "model.bias maybe must be true or false"),
        (["--model.dtype", "half"], "model.dtype half must be one of float32, bfloat16"),
        (["--mesh={data: [1]}"], "mesh.data [1] must be a whole number"),
        (["--data.mixture=[{pth: x}]"], "unknown key data.mixture.pth"),
        (["--model=5"], "model 5 must be a section of `key: value` lines"),
        (["--data.mixture=[{path: 5}]"], "data.mixture.path 5 must be a text, in quotes"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule_in_one_line(tmp_path, capsys, words, complaint):
    with pytest.raises(SystemExit, match="2"):
        cli.train([config_file(tmp_path, "seed: 1\n"), *words])
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1 and len(said) < 400


def test_a_run_is_named_after_its_config_unless_told(tmp_path):
    path = config_file(tmp_path, "workdir: null\n")
    for words in ([], ["--workdir="], ["--workdir", "null"]):
        assert load_config([path, *words]).workdir == "runs/my config"


def test_yaml_merges_as_pyyaml_does(tmp_path):
    text = "model: &m {n_layers: 2}\noptim: {<<: {peak_lr: 0.01, b1: 0.8}, b1: 0.7}\n"
    path = config_file(tmp_path, text)
    assert read_yaml(path) == yaml.safe_load(text)
    cfg = load_config([path])
    assert (cfg.optim.peak_lr, cfg.optim.b1) == (0.01, 0.7)
    several = "optim:\n  <<: [{peak_lr: 0.01}, {peak_lr: 0.02, b2: 0.9}]\n  <<: {eps: 1.0e-6}\n"
    assert read_yaml(config_file(tmp_path, several)) == yaml.safe_load(several)
    with pytest.raises(UserError, match="'b1' is there twice"):
        read_yaml(config_file(tmp_path, "optim: {<<: {b1: 0.1}, b1: 0.2, b1: 0.3}\n"))


def test_numbers_of_a_config_are_decimal_and_dates_are_texts(tmp_path):
    """What YAML 1.1 takes for numbers of base 8 and 60, and for dates."""
    path = config_file(tmp_path, "workdir: 2020-01-01\ndata: {path: 1:30}\ntrain: {total_steps: 010}\nseed: 0x10\n")
    cfg = load_config([path])
    assert (cfg.workdir, cfg.data.path, cfg.train.total_steps, cfg.seed) == ("2020-01-01", "1:30", 10, 16)
    for text in ("08", "1:30", "2020-01-01", "010", "1e5", "+.5", "0o7", "1_0", "0b1", "1:30.5", ".inf", "no"):
        (tmp_path / "again.yaml").write_text(config_to_yaml(dataclasses.replace(cfg, workdir=text)))
        assert load_config([str(tmp_path / "again.yaml")]).workdir == text


@pytest.mark.parametrize(
    "text",
    [
        "optim: &a {lr_scales: *a}\n",
        f"optim: {{lr_scales: {'[' * 5000}\n",
        f"seed: {'[' * 900}{']' * 900}\n",
        "seed: 2020-13-99\n",
        "? [a]\n: b\n",
        "a: !!python/object:os.system {}\n",
        "seed: \x00\n",
        "<<: 5\n",
        "- a\n",
        "seed: {}\n",
        "1: 2\n",
        "model: {2: 3}\n",
        "---\na: 1\n---\nb: 2\n",
        "seed: 1\n\tmodel: 2\n",
    ],
)
def test_a_wrong_config_file_is_one_line(tmp_path, capsys, text):
    with pytest.raises(SystemExit, match="2"):
        cli.train([config_file(tmp_path, text)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and len(said) < 2100


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    assert load_config([config_file(tmp_path, "\ufeffseed: 7\n")]).seed == 7


def test_what_is_printed_to_be_run_again_is_quoted(tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / "my run; $(x)")
    monkeypatch.setattr("gptjax.convert.import_model", lambda *_: None)
    assert cli.convert(["from-hf", "model", "--out", folder]) == 0
    sampling = capsys.readouterr().out.split("    samples")[0]
    assert shlex.split(sampling) == ["python", "sample.py", folder, "--prompt", "..."]
    path = config_file(tmp_path, "{}")
    assert cli.launch(["slurm", path, "--nodes=1", "--gpus_per_node=0", "--dry_run", "--out", folder]) == 0
    assert shlex.split(capsys.readouterr().out.split("    ")[0]) == ["sbatch", f"{folder}/job.sbatch"]


def test_jsonl_keeps_every_character_where_the_terminal_lacks_them(prompts, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.sample(["run", "--prompt", "é", "--format", "jsonl"]) == 0
    assert json.loads(raw.getvalue())["text"] == " é€"
