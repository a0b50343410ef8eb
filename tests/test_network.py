"""How processes find each other on networks that are not at their best: minutes, so `pytest -m slow -n 0`."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from pods import free_port

pytestmark = pytest.mark.slow


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as listener:
            listener.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_coordinator_that_starts_late_is_found_by_its_ipv6_address(tmp_path, tiny_run):
    """Process 1 looks for process 0 for ten seconds before that is started."""
    flags = ["--train.total_steps=1", f"--workdir={tmp_path / 'run'}", "--distributed.num_processes=2"]
    flags += [f"--distributed.coordinator=[::1]:{free_port()}"]
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = []
    for number in (1, 0):
        command = [sys.executable, *tiny_run, *flags, f"--distributed.process_id={number}"]
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
        time.sleep(10 if number else 0)
    logs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], logs
    assert json.loads((tmp_path / "run/env.json").read_text())["processes"] == 2
