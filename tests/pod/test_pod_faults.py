"""Two processes of one run, of which one is stopped, killed or stuck: the other ends, says why, and can go on."""

import signal
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import TINY_RUN
from test_train import losses

KEPT = ("--checkpoint.save_interval_steps=1000", "--optim.schedule=constant", "--train.eval_interval_steps=1000")


def pair(arguments: list[str], workdir: Path, *more: str) -> Cluster:
    """Start two processes of four devices each."""
    return Cluster("v5e:2x4", [*arguments, "--mesh.data=2", "--mesh.fsdp=4", *more], workdir)


@pytest.fixture
def arguments(tiny_run) -> list[str]:
    return tiny_run[1:]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus_file, token_cache) -> Path:
    """Thirty steps of two processes that nothing interrupted."""
    data = (f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}")
    run = pair([*TINY_RUN, *data], tmp_path_factory.mktemp("two") / "straight")
    assert run.codes() == [0, 0], run.said()
    return run.workdir


@pytest.mark.slow
def test_sigterm_to_one_stops_both_after_the_same_step(arguments, tmp_path):
    run = pair(arguments, tmp_path / "run", *KEPT, "--train.total_steps=100000")
    run.wait_for_step(7)
    run.signal(1)
    assert run.codes() == [75, 75], run.said()
    last = losses(run.workdir)[-1]["step"]
    assert f"stopped at step {last} of 100000" in run.said(0)
    assert [path.name for path in (run.workdir / "checkpoints").iterdir()] == [str(last)]


@pytest.mark.slow
def test_after_sigterm_the_run_goes_on_to_the_last_bit(arguments, tmp_path):
    run = pair(arguments, tmp_path / "stopped", *KEPT, "--train.total_steps=100000")
    run.wait_for_step(7)
    run.signal(0, signal.SIGINT)
    assert run.codes() == [75, 75], run.said()
    end = f"--train.total_steps={losses(tmp_path / 'stopped')[-1]['step'] + 5}"
    for name in ("stopped", "straight"):
        run = pair(arguments, tmp_path / name, *KEPT, end)
        assert run.codes() == [0, 0], run.said()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_within_a_minute_and_the_run_goes_on(straight, arguments, tmp_path, killed):
    saving = "--checkpoint.save_interval_steps=15"
    run = pair(arguments, tmp_path / "run", saving, "--distributed.heartbeat_timeout_s=20")
    run.wait_for_step(17)
    run.wait_until((tmp_path / "run" / "checkpoints" / "15").exists)  # it is saved while steps go on
    run.signal(killed, signal.SIGKILL)
    codes = run.codes(60)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] not in (0, 75)
    assert "in train\n" in run.said(1 - killed)  # of the stacks: where the loop was
    again = pair(arguments, tmp_path / "run")
    assert again.codes() == [0, 0], again.said()
    assert "resuming after step 15" in again.said()
    assert losses(tmp_path / "run") == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["--distributed.heartbeat_timeout_s=10", "--distributed.stall_timeout_s=10"])
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_stuck_process_ends_the_other_with_its_stacks(arguments, tmp_path, limit, stuck):
    """By the heartbeats, and, where these are still waited for, by the time since the last step."""
    run = pair(arguments, tmp_path / "run", "--train.total_steps=100000", limit)
    run.wait_for_step(17)
    run.signal(stuck, signal.SIGSTOP)
    try:
        assert run.processes[1 - stuck].wait(60) not in (0, 75)
    finally:
        for process in run.processes:
            process.kill()
    said = run.said(1 - stuck)
    assert "in train\n" in said
    assert ("error: no progress for 10 s" in said) == ("stall" in limit)
    assert len(said.splitlines()) < 1000
