"""Processes of one run, each a host of a place, with a log of each."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import ROOT
from places import devices_of

HOST = ROOT / "tests" / "pod" / "host.py"


class Cluster:
    """Start all hosts of a place; their logs lie beside the run's directory.

    Args:
        arguments: of train.py, from the config on.
        host_arguments: process -> more of them, for that host alone.
        batches: a folder for the parts of the global batches that the hosts place.
        environment: more variables, of all hosts.
    """

    def __init__(
        self,
        place: str,
        arguments: list[str],
        workdir: Path,
        host_arguments: dict[int, list[str]] | None = None,
        batches: Path | None = None,
        **environment: str,
    ):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        devices = devices_of(place)
        count = devices[-1].process_index + 1
        env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"PYTHONPATH": str(ROOT)}
        env |= environment | ({} if batches is None else {"POD_BATCHES": str(batches)})
        # A slow machine shall not lose a peer that is only slow, unless the arguments say so.
        command = [sys.executable, str(HOST), place, arguments[0], "--distributed.heartbeat_timeout_s=100"]
        command += [*arguments[1:], f"--workdir={workdir}", f"--mesh.cpu_devices={len(devices) // count}"]
        if count > 1:
            command += [f"--distributed.coordinator=127.0.0.1:{port}", f"--distributed.num_processes={count}"]
        self.workdir, self.logs, self.processes = workdir, [], []
        for number in range(count):
            own = [*command, *([f"--distributed.process_id={number}"] if count > 1 else [])]
            own += (host_arguments or {}).get(number, [])
            self.logs.append(workdir.with_name(f"{workdir.name}.{number}.log"))
            with self.logs[-1].open("w") as log:
                self.processes.append(subprocess.Popen(own, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))

    def wait_for_step(self, step: int) -> None:
        metrics = self.workdir / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not reached():
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def signal(self, process: int, number: int = signal.SIGTERM) -> None:
        self.processes[process].send_signal(number)

    def codes(self, timeout: float = 400) -> list[int]:
        """Return the exit codes; what still runs after the timeout is killed."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self, process: int | None = None) -> str:
        logs = self.logs if process is None else [self.logs[process]]
        return "\n".join(log.read_text() for log in logs)


def assembled(batches: Path, shape: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    """Return the global batches that the hosts' parts make up; every element must be there, the same in all parts."""
    found = []
    folders = sorted(batches.iterdir())
    for number in range(min(len(list(folder.iterdir())) for folder in folders)):
        whole, seen = {}, {}
        for folder in folders:
            for key, part in np.load(folder / f"{number}.npz").items():
                name, row, column = key.split("/")
                array = whole.setdefault(name, np.zeros(shape, part.dtype))
                mask = seen.setdefault(name, np.zeros(shape, bool))
                where = np.s_[int(row) : int(row) + part.shape[0], int(column) : int(column) + part.shape[1]]
                np.testing.assert_array_equal(array[where][mask[where]], part[mask[where]])
                array[where], mask[where] = part, True
        assert all(mask.all() for mask in seen.values())
        found.append(whole)
    return found
