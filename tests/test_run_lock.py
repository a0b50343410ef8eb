"""Two runs in one directory: the second is refused; a dead one refuses nobody."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

from gptjax.errors import UserError
from gptjax.lifecycle.rundir import RunLock

HOLD = """
import sys, time
from gptjax.lifecycle.rundir import RunLock
with RunLock(sys.argv[1]) as lock:
    lock.acquire()
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that uses tmp_path / run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_run_in_a_directory_that_another_run_uses_is_refused(holder, tiny_run, tmp_path):
    code = (
        "import sys; from gptjax import cli; from gptjax.lifecycle import rundir; "
        "rundir.RunLock.WAIT_S = 0.0; sys.exit(cli.train(sys.argv[2:]))"
    )
    done = run_script("-c", code, *tiny_run, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert f"is in use by another run (process {holder.pid} on " in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_killed_run_holds_no_lock(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(RunLock, "WAIT_S", 0.0)
    with RunLock(str(tmp_path / "run")) as lock, pytest.raises(UserError, match="is in use by another run"):
        lock.acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for _ in range(2):  # and it is given back
        with RunLock(str(tmp_path / "run")) as lock:
            lock.acquire()


def test_a_run_waits_for_one_that_is_just_ending(holder, tmp_path):
    subprocess.Popen(["sh", "-c", f"sleep 1; kill {holder.pid}"])
    with RunLock(str(tmp_path / "run")) as lock:
        lock.acquire()
        assert holder.wait() == -signal.SIGTERM
