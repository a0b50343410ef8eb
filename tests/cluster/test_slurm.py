"""A job of `gptjax launch slurm` on a real Slurm of two nodes (slurm.sh): requeued once, and finished."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_RUN

STEPS = 100
SCRIPT = Path(__file__).with_name("slurm.sh")
RUN = [
    *TINY_RUN,
    f"--train.total_steps={STEPS}",
    "--train.eval_interval_steps=50",
    "--checkpoint.save_interval_steps=50",
]
RUN += ["--distributed.heartbeat_timeout_s=600"]  # a slow machine shall not lose a peer that is only slow


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    if os.geteuid() or shutil.which("slurmctld") is None:
        pytest.skip("needs root, and: apt-get install slurm-wlm munge")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))
    for name in ("XLA_FLAGS", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    subprocess.run([SCRIPT, "up", tmp_path / "slurm"], check=True, timeout=120)
    yield
    subprocess.run([SCRIPT, "down", tmp_path / "slurm"], check=True, timeout=60)


def wait_until(done, what: str) -> None:
    deadline = time.monotonic() + 600
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_on_two_nodes_is_requeued_goes_on_and_finishes(cluster, tmp_path, corpus_file, token_cache):
    run, out = tmp_path / "run", tmp_path / "job"
    launch = ["gptjax", "launch", "slurm", *RUN, "--nodes=2", "--gpus_per_node=0", "--time=10", f"--out={out}"]
    data = [f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}", f"--workdir={run}"]
    said = subprocess.run(
        [sys.executable, "-m", *launch, *data], cwd=ROOT, capture_output=True, text=True, check=True
    )
    number = re.match(r"job (\d+), log", said.stdout).group(1)
    log = out / f"{number}.log"

    def metrics() -> str:
        return (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""

    def state() -> str:
        shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True).stdout
        return re.search(r"JobState=(\w+)", shown).group(1)

    wait_until(lambda: '"step": 10,' in metrics(), "the tenth step")
    subprocess.run(["scancel", "--signal=TERM", number], check=True)
    wait_until(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), "the end of the job")
    text = log.read_text()
    print(text)  # the log that docs/scaling_out.md shows; pytest -s
    assert state() == "COMPLETED", text
    stopped = int(re.search(rf"stopped at step (\d+) of {STEPS}; all is saved", text).group(1))
    assert text.count("requeued: attempt 1 ended with everything saved") == 1
    assert text.count("2 x cpu, run") == 2  # two attempts, each of two processes
    assert f"resuming after step {stopped}" in text
    assert f"done: {STEPS} steps" in text
    assert [json.loads(line)["step"] for line in metrics().splitlines()] == list(range(STEPS + 1))
