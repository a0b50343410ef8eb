"""Two processes of one run, of which one is stopped, killed or stuck: the other ends, says why, and can go on."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import losses

PATIENT = "--distributed.heartbeat_timeout_s=100"  # a slow machine shall not lose a peer that is only slow
KEPT = (
    PATIENT,
    "--checkpoint.save_interval_steps=1000",
    "--optim.schedule=constant",
    "--train.eval_interval_steps=1000",
)


class Pair:
    """Two processes of two devices each, that write logs beside the run's directory."""

    def __init__(self, arguments: list[str], workdir: Path, *more: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *arguments, f"--workdir={workdir}", f"--distributed.coordinator=127.0.0.1:{port}"]
        command += ["--distributed.num_processes=2", "--mesh.cpu_devices=2", "--mesh.data=2", "--mesh.fsdp=2", *more]
        self.metrics = workdir / "metrics.jsonl"
        self.logs = [workdir.with_name(f"{workdir.name}.{i}.log") for i in range(2)]
        self.processes = []
        for number, log in enumerate(self.logs):
            with log.open("w") as stream:
                own = [*command, f"--distributed.process_id={number}"]
                self.processes.append(
                    subprocess.Popen(own, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT)
                )

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.metrics.exists() and f'"step": {step},' in self.metrics.read_text())

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not reached():
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def codes(self, timeout: float = 400) -> list[int]:
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus_file, token_cache) -> Path:
    """Thirty steps of two processes that nothing interrupted."""
    from conftest import TINY_RUN

    data = (f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}")
    pair = Pair(["train.py", *TINY_RUN, *data], tmp_path_factory.mktemp("two") / "straight", PATIENT)
    assert pair.codes() == [0, 0], pair.said()
    return pair.metrics.parent


@pytest.mark.slow
def test_sigterm_to_one_stops_both_after_the_same_step(tiny_run, tmp_path):
    pair = Pair(tiny_run, tmp_path / "run", *KEPT, "--train.total_steps=100000")
    pair.wait_for_step(7)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.codes() == [75, 75], pair.said()
    last = losses(pair.metrics.parent)[-1]["step"]
    assert f"stopped at step {last} of 100000" in pair.logs[0].read_text()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(last)]


@pytest.mark.slow
def test_after_sigterm_the_run_goes_on_to_the_last_bit(tiny_run, tmp_path):
    pair = Pair(tiny_run, tmp_path / "stopped", *KEPT, "--train.total_steps=100000")
    pair.wait_for_step(7)
    pair.processes[0].send_signal(signal.SIGINT)
    assert pair.codes() == [75, 75], pair.said()
    end = f"--train.total_steps={losses(tmp_path / 'stopped')[-1]['step'] + 5}"
    for name in ("stopped", "straight"):
        pair = Pair(tiny_run, tmp_path / name, *KEPT, end)
        assert pair.codes() == [0, 0], pair.said()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_within_a_minute_and_the_run_goes_on(straight, tiny_run, tmp_path, killed):
    saving = "--checkpoint.save_interval_steps=15"
    pair = Pair(tiny_run, tmp_path / "run", saving, "--distributed.heartbeat_timeout_s=20")
    pair.wait_for_step(17)
    pair.wait_until((tmp_path / "run" / "checkpoints" / "15").exists)  # it is saved while steps go on
    pair.processes[killed].kill()
    codes = pair.codes(60)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] not in (0, 75)
    assert "in train\n" in pair.logs[1 - killed].read_text()  # of the stacks: where the loop was
    again = Pair(tiny_run, tmp_path / "run", PATIENT)
    assert again.codes() == [0, 0], again.said()
    assert "resuming after step 15" in again.said()
    assert losses(tmp_path / "run") == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["--distributed.heartbeat_timeout_s=10", "--distributed.stall_timeout_s=10"])
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_stuck_process_ends_the_other_with_its_stacks(tiny_run, tmp_path, limit, stuck):
    """By the heartbeats, and, where these are still waited for, by the time since the last step."""
    pair = Pair(tiny_run, tmp_path / "run", "--train.total_steps=100000", PATIENT, limit)
    pair.wait_for_step(17)
    pair.processes[stuck].send_signal(signal.SIGSTOP)
    try:
        assert pair.processes[1 - stuck].wait(60) not in (0, 75)
    finally:
        for process in pair.processes:
            process.kill()
    log = pair.logs[1 - stuck].read_text()
    assert "Thread 0x" in log
    assert "in train\n" in log
    assert ("Timeout (0:00:10)!" in log) == ("stall" in limit)
