"""Paths as users write them: home, Path objects, buckets, blanks and dashes; and files where folders should be."""

import os
import pathlib
import shlex

import pytest
from etils import epath

import gptjax
from gptjax import cli
from gptjax.apps.data_prep.prepare import Options, prepare_data
from gptjax.apps.launch.commands import make_folder
from gptjax.apps.plan.commands import write_config
from gptjax.config import Config
from gptjax.configfile import config_from_dict, config_to_yaml, load_config
from gptjax.convert.export import new_folder
from gptjax.data.reading import Reading
from gptjax.data.sources import list_files
from gptjax.errors import UserError
from gptjax.shell.paths import shell, user_path, writing


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_a_path_is_taken_as_the_shell_would(home):
    for given, expected in {
        "~": str(home),
        "~/runs/a": f"{home}/runs/a",
        pathlib.Path("~/runs/a"): f"{home}/runs/a",
        epath.Path("~/a"): f"{home}/a",
        "a/~/b": "a/~/b",
        "~nobody-of-this-name/a": "~nobody-of-this-name/a",
        "runs/b": "runs/b",
        pathlib.Path("runs/b"): "runs/b",
        "-x": "./-x",
        "--out": "./--out",
        "gpt2": "gpt2",
        "org/name": "org/name",
        "gs://bucket/a b": "gs://bucket/a b",
        pathlib.Path("gs://bucket/a"): "gs://bucket/a",
        pathlib.PurePosixPath("s3://b/~"): "s3://b/~",
    }.items():
        assert user_path(given) == expected
        assert user_path(user_path(given)) == expected


@pytest.mark.parametrize("path", [b"a", 5, None, ["a"], "a\0b", "caf\udce9", "http://a/b", "az://a", "./a://b"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(UserError):
        user_path(path)


def test_every_key_of_a_config_that_is_a_path_knows_home(home, tmp_path):
    (tmp_path / "c.yaml").write_text("data: {path: ~/text.txt, cache_dir: ~/cache}\nworkdir: ~/runs/a\n")
    cfg = load_config(["~/../c.yaml", "--init_from=~/base", "--data.tokenizer", "~/tokenizer.json"])
    found = (cfg.workdir, cfg.init_from, cfg.data.path, cfg.data.tokenizer, cfg.data.cache_dir)
    assert found == tuple(f"{home}/{name}" for name in ("runs/a", "base", "text.txt", "tokenizer.json", "cache"))
    assert load_config(["c.yaml", "--workdir=~"]).workdir == str(home)
    mixture = config_from_dict({"data": {"mixture": [{"path": "~/web", "weight": 1}]}}).data.mixture
    assert (mixture[0].path, mixture[0].label) == (f"{home}/web", "web")
    assert config_from_dict({"data": {"tokenizer": "gpt2"}}).data.tokenizer == "gpt2"


@pytest.mark.parametrize("path", ["~/model", pathlib.Path("~/model")])
def test_a_model_is_looked_for_at_home(home, path):
    (home / "model").mkdir()
    with pytest.raises(UserError, match=f"{home}/model' is empty"):
        gptjax.load(path)


def test_the_commands_look_at_home(home, capsys):
    (home / "text.txt").write_text("to be or not to be " * 50)
    assert cli.data(["prepare", "~/text.txt", "--out=~/out", "--tokenizer", "byte", "--workers=1"]) == 0
    assert cli.data(["inspect", "~/out"]) == 0
    assert cli.data(["train-tokenizer", "~/text.txt", "--out=~/my tokenizer.json", "--vocab_size=300"]) == 0
    using = capsys.readouterr().out.rpartition("gptjax data prepare ... ")[2].rpartition(" uses it")[0]
    assert shlex.split(using) == ["--tokenizer", f"{home}/my tokenizer.json"]
    assert [file.path for file in list_files("~/text.txt").files] == [f"{home}/text.txt"]
    for command, words in ((cli.sample, ["~/nothing"]), (cli.convert, ["from-hf", "~/nothing", "--out=~/new"])):
        with pytest.raises(SystemExit, match="2"):
            command(words)
        assert f"{home}/nothing" in capsys.readouterr().err


def test_a_command_to_run_again_is_split_into_the_words_that_were_meant():
    for words in (["a b"], ["$(x)", "`y`"], ["it's"], ["", "*"], ["a\nb", "~"], [pathlib.Path("a b")]):
        assert shlex.split(shell("sample.py", *words)) == ["sample.py", *map(str, words)]


def test_out_where_something_else_is_is_one_line(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    (folder / "x").mkdir(parents=True)
    (tmp_path / "c.yaml").write_text("seed: 1\n")

    def plan(out: str) -> None:
        write_config(out, str(tmp_path / "c.yaml"), [], {})

    def launch(out: str) -> None:
        make_folder(out, "name", Config())

    def convert(out: str) -> None:
        with new_folder(out):
            pass

    def prepare(out: str) -> None:
        prepare_data([str(file)], out, "byte", Options(Reading(), 0.5, None, False, None))

    def anything(out: str) -> None:
        with writing(out) as path:
            path.write_text("x")

    for door, outs in {
        plan: [str(folder), f"{file}/c.yaml", "gs://bucket/c.yaml"],
        launch: [str(file), f"{file}/inside", "gs://bucket/job"],
        convert: [str(file), str(folder), f"{file}/inside"],
        prepare: [str(file), f"{file}/inside", "gs://bucket/data"],
        anything: [str(folder), f"{file}/a", "gs://bucket/a", "a\0b", "/proc/nothing/a", "x" * 5000],
    }.items():
        for out in outs:
            with pytest.raises(UserError) as raised:
                door(out)
            assert "\n" not in str(raised.value)
    assert file.read_text() == "mine"


def test_a_run_that_was_moved_is_told_by_its_own_config(tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    data = {"path": "books.txt", "tokenizer": f"{old}/tokenizer.json"}
    values = config_from_dict({"workdir": str(old), "init_from": str(old), "data": data})
    (new / "checkpoints").mkdir(parents=True)
    (new / "config.yaml").write_text(config_to_yaml(values))
    cfg = load_config([str(new / "config.yaml")])
    assert (cfg.workdir, cfg.init_from, cfg.data.tokenizer) == (str(new), str(new), f"{new}/tokenizer.json")
    assert cfg.data.path == "books.txt" and f"its run is taken to be {new}" in capsys.readouterr().err
    assert load_config([str(new / "config.yaml"), f"--workdir={tmp_path}/c"]).workdir == f"{tmp_path}/c"
    (new / "checkpoints").rmdir()  # a config that was copied out of its run says what it says
    assert load_config([str(new / "config.yaml")]).workdir == str(old)
    assert os.path.exists(new) and capsys.readouterr().err.count("is taken to be") == 1


@pytest.mark.parametrize(
    ("address", "instead"),
    [
        ("https://huggingface.co/openai-community/gpt2", "give the id, 'openai-community/gpt2'"),
        ("https://www.huggingface.co/org/name/tree/main?a=b", "give the id, 'org/name'"),
        ("hf://org/name", "give the id, 'org/name'"),
        ("https://hf.co/datasets/org/name", "hf download org/name --repo-type dataset"),
    ],
)
def test_an_address_of_the_hub_is_answered_by_what_to_give(address, instead):
    with pytest.raises(UserError, match=f"is an address of the Hugging Face hub; .*{instead}"):
        user_path(address)
