"""Whole runs, in processes of their own: resume, signals, meshes, several processes, and what users get wrong."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script

from gptjax.errors import UserError
from gptjax.metrics import read_metrics

LOSSES = ("step", "tokens", "train/loss", "val/loss", "val/bpb", "grad_norm", "lr")


def losses(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in LOSSES if name in row} for row in rows]


def start(*args: object, **environment: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | environment
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.stdout.read())
        path = workdir / "metrics.jsonl"
        if path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus_file, token_cache) -> Path:
    """A run of 30 steps that nothing interrupted."""
    from conftest import TINY_RUN

    workdir = tmp_path_factory.mktemp("straight") / "run"
    data = (f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}")
    result = run_script("train.py", *TINY_RUN, *data, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir


def test_a_run_leaves_what_every_tool_reads(straight):
    assert {p.name for p in straight.iterdir()} >= {
        *("config.yaml", "metrics.jsonl", "checkpoints", "loss.png", "env.json"),
    }
    rows = losses(straight)
    assert [row["step"] for row in rows] == list(range(31))
    assert rows[-1]["train/loss"] < rows[1]["train/loss"]
    assert all(row["tokens"] == row["step"] * 8 * 32 for row in rows)
    assert {"jax", "flax", "optax"} <= set(json.loads((straight / "env.json").read_text())["versions"])


@pytest.mark.whole
@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_and_started_again_it_gives_the_same_losses_to_the_last_bit(straight, tiny_run, tmp_path, kills):
    workdir = tmp_path / "killed"
    for step in sorted(random.Random(0).sample(range(2, 29), kills)):
        process = start(*tiny_run, f"--workdir={workdir}")
        wait_for_step(workdir, step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run_script(*tiny_run, f"--workdir={workdir}").returncode == 0
    assert losses(workdir) == losses(straight)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda s: s.name
)
def test_a_signal_saves_and_leaves_with_75(straight, tiny_run, tmp_path, number):
    workdir = tmp_path / "stopped"
    process = start(*tiny_run, f"--workdir={workdir}", "--checkpoint.save_interval_steps=1000")
    wait_for_step(workdir, 1, process)  # the first of 30: the signal comes before the last on a quick machine too
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    stopped_at = losses(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(stopped_at)).is_dir()
    again = run_script(*tiny_run, f"--workdir={workdir}")
    assert f"resuming after step {stopped_at}" in again.stdout
    assert losses(workdir) == losses(straight)


def test_done_is_done(straight, tiny_run):
    before = (straight / "metrics.jsonl").read_bytes()
    result = run_script(*tiny_run, f"--workdir={straight}")
    assert result.returncode == 0
    assert (straight / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def resumed(whole_run, tmp_path_factory) -> Path:
    """A run of 10 steps and, resumed, of 5 more; with averaged weights and samples."""
    workdir = tmp_path_factory.mktemp("resumed") / "run"
    for steps in (10, 15):
        options = ("--log.sample_tokens=8", "--optim.schedule=constant", "--optim.ema_decay=0.9")
        result = run_script(*whole_run, f"--workdir={workdir}", f"--train.total_steps={steps}", *options)
        assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.whole
def test_samples_and_resumes_are_kept_beside_the_metrics(resumed):
    samples = [json.loads(line) for line in (resumed / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 5, 10, 15]
    assert all(0 < len(row["text"]) <= 400 for row in samples)
    [event] = map(json.loads, (resumed / "events.jsonl").read_text().splitlines())
    assert (event["step"], event["event"]) == (10, "resume")


WITHOUT_MATPLOTLIB = """
import runpy, sys
sys.modules["matplotlib"] = None
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.whole
def test_without_matplotlib_no_picture_is_promised(straight, whole_run, tmp_path):
    workdir = copy_of(straight, tmp_path)
    shown = run_script(*whole_run, f"--workdir={workdir}").stdout
    (workdir / "loss.png").unlink()
    hidden = run_script("-c", WITHOUT_MATPLOTLIB, *whole_run[1:], f"--workdir={workdir}")
    assert hidden.returncode == 0, hidden.stderr
    assert "loss.png" in shown
    assert "loss.png" not in hidden.stdout
    assert "sample.py" in hidden.stdout


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_more_steps_go_on_from_the_last(straight, tiny_run, tmp_path):
    workdir = copy_of(straight, tmp_path)
    result = run_script(*tiny_run, f"--workdir={workdir}", "--train.total_steps=33")
    assert result.returncode == 0, result.stderr
    assert losses(workdir)[:31] == losses(straight)
    assert losses(workdir)[-1]["step"] == 33


@pytest.mark.parametrize("damage", ["truncated", pytest.param("removed", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(straight, tiny_run, tmp_path, damage):
    workdir = copy_of(straight, tmp_path)
    for path in (workdir / "checkpoints" / "30" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 500:
            path.unlink() if damage == "removed" else os.truncate(path, path.stat().st_size // 2)
    result = run_script(*tiny_run, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert "warning: checkpoint 30" in result.stdout + result.stderr
    assert "resuming after step 25" in result.stdout
    assert losses(workdir) == losses(straight)
    assert (workdir / "damaged-30" / "params").is_dir()
    sampled = run_script("sample.py", workdir, "--max_new_tokens", "5")
    assert sampled.returncode == 0, sampled.stderr
    assert not sampled.stderr  # the last checkpoint was saved anew, and is read


@pytest.mark.whole
@pytest.mark.parametrize(
    "mesh",
    [
        ("--mesh.fsdp=2", "--mesh.tensor=2"),  # and data=2
        pytest.param(("--mesh.data=1", "--mesh.fsdp=8"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_checkpoint_resumes_on_another_mesh(straight, tiny_run, tmp_path, mesh):
    """5 more steps on other devices than those that wrote it, to 1e-5; and from those back to one."""
    runs = []
    for name, flags in (("one", ()), ("several", (*mesh, "--mesh.cpu_devices=8"))):
        workdir = Path(shutil.copytree(straight, tmp_path / name))
        more = ("--train.total_steps=35", "--checkpoint.save_interval_steps=100")
        result = run_script(*tiny_run, f"--workdir={workdir}", *more, *flags)
        assert result.returncode == 0, result.stderr
        runs.append([row["train/loss"] for row in losses(workdir)[31:]])
    back = run_script(*tiny_run, f"--workdir={tmp_path / 'several'}", "--train.total_steps=37")
    assert back.returncode == 0, back.stderr
    np.testing.assert_allclose(runs[1], runs[0], atol=1e-5)


@pytest.mark.whole
def test_two_processes_give_the_losses_of_one(straight, tiny_run, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = (*tiny_run, f"--workdir={tmp_path / 'two'}", f"--distributed.coordinator=127.0.0.1:{port}")
    shared += ("--distributed.num_processes=2", "--mesh.cpu_devices=2", "--mesh.data=2", "--mesh.fsdp=2")
    both = [start(*shared, f"--distributed.process_id={i}") for i in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    for one, two in zip(losses(straight), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    sampled = run_script("sample.py", tmp_path / "two", "--max_new_tokens", "5")
    assert sampled.returncode == 0, sampled.stderr


def test_init_from_starts_with_the_weights_of_another_run(straight, tiny_run, tmp_path):
    args = (*tiny_run, f"--init_from={straight}", "--train.total_steps=5", f"--workdir={tmp_path / 'tuned'}")
    assert run_script(*args).returncode == 0
    assert losses(tmp_path / "tuned")[0]["val/loss"] == losses(straight)[-1]["val/loss"]
    other = run_script(*args[:-1], f"--workdir={tmp_path / 'other'}", "--model.n_layers=2")
    assert other.returncode == 2
    assert "another shape" in other.stderr


@pytest.mark.whole
def test_the_average_is_what_is_evaluated_saved_and_sampled(resumed, tiny_run, tmp_path):
    tuned = (*tiny_run, f"--init_from={resumed}", "--train.total_steps=5", f"--workdir={tmp_path / 'from'}")
    assert run_script(*tuned).returncode == 0
    assert losses(tmp_path / "from")[0]["val/loss"] == losses(resumed)[-1]["val/loss"]


@pytest.mark.whole
def test_a_profile_is_written_and_tensorboard_gets_the_metrics(tiny_run, tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install -e '.[tensorboard]'")
    options = ("--train.total_steps=6", "--profile=3:5", '--log.trackers=["tensorboard"]')
    result = run_script(*tiny_run, f"--workdir={tmp_path}", *options)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "tensorboard").glob("events*"))


BAD = {
    "unknown key": (["--model.n_layer=3"], "unknown option --model.n_layer; did you mean '--model.n_layers'?"),
    "wrong type": (["--model.n_layers=three"], "model.n_layers"),
    "missing file": (["--data.path=nowhere.txt"], "data.path 'nowhere.txt' does not exist"),
    "short corpus": (["--model.context_length=30000"], "fewer than one window"),
    "heads": (["--model.n_heads=5"], "model.n_heads 5 does not divide model.d_model 32"),
    "mesh": (["--mesh.data=3", "--mesh.cpu_devices=4"], "mesh data=3 needs a multiple of 3 devices and there are 4"),
    "tokenizer": (["--data.tokenizer=chars"], "did you mean 'char'?"),
    "profile": (["--profile=5"], "profile 5 is not START:STOP"),
    "profile beyond the end": (["--profile=9:90"], "run.profile 9:90 must stop at 31 or before"),
    "no windows": (["--train.eval_sequences=0"], "train.eval_sequences 0 must be at least 1"),
    "short validation": (["--data.val_frac=0.0001"], "validation tokens"),
    "initial model": (["--init_from=nowhere/at/all"], "'nowhere/at/all' does not exist"),
    "batch": (["--train.microbatches=3"], "train.microbatches 3 does not divide"),
    "vocabulary": (["--model.vocab_size=5"], "model.vocab_size 5 is less than the tokenizer's"),
}


def assert_refused(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_run, tmp_path, name):
    args, message = BAD[name]
    assert_refused(run_script(*tiny_run, f"--workdir={tmp_path / 'bad'}", *args), message)
    assert not (tmp_path / "bad").exists()


def test_a_directory_of_another_config_is_left_as_it_is(straight, tiny_run):
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    result = run_script(*tiny_run, f"--workdir={straight}", "--optim.peak_lr=0.5", "--model.conv_width=2")
    assert_refused(result, "model.conv_width (null there, 2 here), optim.peak_lr (0.003 there, 0.5 here)")
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_a_directory_without_its_config_is_known_by_its_checkpoints(straight, tiny_run, tmp_path):
    workdir = copy_of(straight, tmp_path)
    (workdir / "config.yaml").unlink()
    (workdir / "metrics.jsonl").unlink()
    assert_refused(run_script(*tiny_run, f"--workdir={workdir}", "--optim.peak_lr=0.5"), "optim.peak_lr (0.003 there")
    assert not (workdir / "config.yaml").exists()


@pytest.mark.parametrize("line", [b"garbage", b'{"tokens": 3}', b"\xff"], ids=str)
def test_a_damaged_line_of_metrics_is_named_and_kept(straight, tmp_path, line):
    workdir = copy_of(straight, tmp_path)
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines()
    (workdir / "metrics.jsonl").write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]))
    with pytest.raises(UserError, match="line 4 is damaged"):
        read_metrics(workdir)


def test_an_unwritable_directory_is_refused(tiny_run, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(run_script(*tiny_run, f"--workdir={tmp_path / 'file' / 'run'}"), "cannot write to workdir")


@pytest.mark.slow
def test_nanogpt_budget_reaches_the_loss_that_the_docs_name(tinyshakespeare, tmp_path):
    """1,536,000 tokens, at most 0.85M parameters, the whole validation split: nanoGPT has 1.8857."""
    args = (f"--data.path={tinyshakespeare}", f"--workdir={tmp_path / 'run'}")
    result = run_script("train.py", "configs/shakespeare_char_cpu.yaml", *args, timeout=1200)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split(" parameters")[0].replace(",", "")) <= 850_000
    last = losses(tmp_path / "run")[-1]
    assert last["tokens"] == 1_536_000
    assert last["val/loss"] <= 1.54
