"""Whole runs on prepared data: mixtures with a loss for each source, packed rows, worker processes."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import TINY_RUN, run_script
from test_train import assert_refused, losses

from gptjax.apps.data_prep.prepare import Options, prepare_data
from gptjax.data.reading import Reading

WORDS = Path(__file__).with_name("conftest.py").read_text().split()


def prepare_bytes(source: Path, out: Path, pack: int | None = None, val_frac: float = 0.2, tokenizer: str = "byte"):
    prepare_data([str(source)], str(out), tokenizer, Options(Reading(), val_frac, pack, False, None))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    folder, rng, found = tmp_path_factory.mktemp("prepared"), random.Random(0), {}
    for name, pack in (("one", None), ("two", None), ("packed", 32)):
        lines = [json.dumps({"text": name + " " + " ".join(rng.choices(WORDS, k=9))}) for _ in range(300)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        prepare_bytes(folder / f"{name}.jsonl", folder / name, pack)
        found[name] = folder / name
    return found


def mixture(prepared, *parts: dict) -> str:
    named = [{"path": str(prepared[name]), **part} for name, part in zip(("one", "two"), parts, strict=True)]
    return f"--data.mixture={json.dumps(named)}"


@pytest.fixture(scope="module")
def mixed(prepared, tmp_path_factory) -> tuple[Path, list[str]]:
    """A finished run of a mixture, and its arguments."""
    workdir = tmp_path_factory.mktemp("mixed") / "run"
    args = ["train.py", *TINY_RUN, mixture(prepared, {"weight": 3}, {"weight": 1, "weight_from": {"20": 5}})]
    result = run_script(*args, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir, args


@pytest.mark.whole
def test_each_source_of_a_mixture_has_its_validation_loss(mixed):
    rows = [json.loads(line) for line in (mixed[0] / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "val/loss" in row):
        assert row["val/loss"] == pytest.approx(0.75 * row["val/loss/one"] + 0.25 * row["val/loss/two"])
    assert row["val/loss/one"] < rows[0]["val/loss/one"]


@pytest.mark.whole
def test_worker_processes_change_nothing_and_end_quietly(mixed, tmp_path):
    result = run_script(*mixed[1], f"--workdir={tmp_path / 'run'}", "--data.workers=2")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == losses(mixed[0])
    assert "Exception" not in result.stderr and "leaked" not in result.stderr


@pytest.mark.whole
def test_another_mixture_is_refused_unless_asked_for(mixed, prepared, tmp_path):
    workdir = Path(shutil.copytree(mixed[0], tmp_path / "copy"))
    changed = ["train.py", *TINY_RUN, mixture(prepared, {"weight": 1}, {"weight": 1}), f"--workdir={workdir}"]
    assert_refused(run_script(*changed, "--train.total_steps=35"), "another --workdir, or --data.change_mixture true")
    result = run_script(*changed, "--train.total_steps=35", "--data.change_mixture=true")
    assert result.returncode == 0, result.stderr
    assert losses(workdir)[:31] == losses(mixed[0])
    assert losses(workdir)[-1]["step"] == 35


@pytest.mark.whole
def test_a_run_learns_from_packed_rows(prepared, tmp_path):
    result = run_script(
        "tests/train_briefly.py", *TINY_RUN, f"--data.path={prepared['packed']}", f"--workdir={tmp_path / 'run'}"
    )
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run")[-1]["val/loss"] < losses(tmp_path / "run")[0]["val/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("data", "fsdp")], ids=["one", "four"])
def test_a_run_on_packed_rows_goes_on_as_if_nothing_had_stopped_it(prepared, tmp_path, mesh):
    """On one device, and on four."""
    args = ["train.py", *TINY_RUN, f"--data.path={prepared['packed']}", "--optim.schedule=constant"]
    devices = [f"--mesh.{axis}=2" for axis in mesh] + ["--mesh.cpu_devices=4"] * bool(mesh)
    for name, steps, more in (("run", 10, []), ("run", 20, devices), ("straight", 20, [])):
        result = run_script(*args, f"--workdir={tmp_path / name}", f"--train.total_steps={steps}", *more)
        assert result.returncode == 0, result.stderr
    for row, expected in zip(losses(tmp_path / "run"), losses(tmp_path / "straight"), strict=True):
        assert row == pytest.approx(expected, abs=1e-5 if mesh else 0, rel=0)


BAD = {
    "context": (["--model.context_length=64"], "packed into rows of 32, not model.context_length 64"),
    "tokenizer": (["--data.tokenizer=char"], "data.tokenizer char is not what"),
    "vocabulary": (["--model.vocab_size=200"], "model.vocab_size 200 is less than the tokenizer's 257"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_the_data_is_one_line(prepared, tmp_path, name):
    args, message = BAD[name]
    run = ("train.py", *TINY_RUN, f"--data.path={prepared['packed']}", f"--workdir={tmp_path / 'bad'}", *args)
    assert_refused(run_script(*run), message)
    assert not (tmp_path / "bad").exists()


@pytest.mark.whole
def test_another_tokenizer_than_the_runs_is_refused(prepared, tmp_path):
    """The config is the same; the folder was prepared anew."""
    args = ["train.py", *TINY_RUN, f"--data.path={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}"]
    args += ["--checkpoint.save_interval_steps=2"]
    source = prepared["one"].with_suffix(".jsonl")
    prepare_bytes(source, tmp_path / "data")
    assert run_script(*args, "--train.total_steps=2").returncode == 0
    for other, message in (
        ({"tokenizer": "char"}, "has another tokenizer than this run's checkpoint"),
        ({"val_frac": 0.3}, "is not the one that this run was trained on"),
    ):
        shutil.rmtree(tmp_path / "data")
        prepare_bytes(source, tmp_path / "data", **other)
        assert_refused(run_script(*args, "--model.vocab_size=257", "--train.total_steps=6"), message)
