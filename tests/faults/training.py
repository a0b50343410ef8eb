"""Train in processes that are killed, stopped or disturbed (worker.py), and compare what is left with another run."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).with_name("worker.py")
ARGUMENTS = [
    "configs/debug.yaml",
    *("--model.n_layers=1", "--model.d_model=32", "--model.context_length=32", "--train.eval_sequences=8"),
    *("--train.log_interval_steps=1", "--train.eval_interval_steps=5", "--checkpoint.save_interval_steps=5"),
]
TIMES = ("step_time_s", "tokens_per_s", "mfu", "goodput")


class Training:
    """A run in a directory, by as many attempts as it takes.

    Args:
        hosts: processes of an attempt.
        fault: what worker.py does in every attempt.
        environment: more variables of the processes.
    """

    def __init__(
        self,
        workdir: Path,
        corpus: Path,
        cache: Path,
        *more: str,
        hosts: int = 1,
        fault: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ):
        self.workdir, self.running_s, self.starts, self.hosts = workdir, 0.0, 0, hosts
        self.fault, self.environment = fault or {}, environment or {}
        data = [f"--data.path={corpus}", f"--data.cache_dir={cache}", f"--workdir={workdir}"]
        self.arguments = [*ARGUMENTS, *data, *more]

    def start(self, *more: str, fault: dict[str, Any] | None = None, **options: Any) -> subprocess.Popen:
        """Start a process, which does to itself what `fault` says (worker.py)."""
        environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
        environment |= {"PYTHONPATH": str(ROOT), "GPTJAX_FAULT": json.dumps(self.fault | (fault or {}))}
        self.starts += 1
        return subprocess.Popen(
            [sys.executable, str(WORKER), *self.arguments, *more],
            cwd=ROOT,
            env=environment | self.environment,
            text=True,
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options},
        )

    def start_hosts(self, *more: str, **options: Any) -> list[subprocess.Popen]:
        """Start all processes of an attempt; what they print to stderr goes to files (`errors_of`)."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        processes = []
        for number in range(self.hosts):
            own = ["--distributed.heartbeat_timeout_s=100", f"--distributed.coordinator=127.0.0.1:{port}"]
            own += [f"--distributed.num_processes={self.hosts}", f"--distributed.process_id={number}"]
            with self.log_of(number).open("w") as log:
                processes.append(self.start(*own, *more, stderr=log, **options))
        self.starts -= self.hosts - 1
        return processes

    def log_of(self, number: int) -> Path:
        return self.workdir.with_name(f"{self.workdir.name}.{number}.log")

    def errors_of(self, number: int) -> str:
        """Return what a process of the last attempt has printed to stderr."""
        return self.log_of(number).read_text()

    def run(self, *more: str, **options: Any) -> tuple[int, str]:
        """Run an attempt to its end; return its exit code (negative: the signal) and what it printed to stderr."""
        began = time.monotonic()
        if self.hosts == 1:
            process = self.start(*more, **options)
            _, errors = process.communicate(timeout=300)
            code = process.returncode
        else:
            codes = wait_all(self.start_hosts(*more, **options), 300)
            code = next((code for code in codes if code), 0)
            errors = "\n".join(map(self.errors_of, range(self.hosts)))
        self.running_s += time.monotonic() - began
        return code, errors

    def last_step(self) -> int:
        """Return the last step in metrics.jsonl; 0 where there is none."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return json.loads(line)["step"]
            except ValueError:  # it is being written
                continue
        return 0

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        """Return when metrics.jsonl has a step, or the process has ended."""
        while self.last_step() < step and process.poll() is None:
            time.sleep(0.01)

    def outcome(self) -> tuple[list[dict[str, Any]], str]:
        """Return the rows of metrics.jsonl without times, and a hash of the final weights."""
        from gptjax.checkpoint import Checkpoints

        rows = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        kept = [
            {name: value for name, value in row.items() if name not in TIMES and not name.startswith("seconds/")}
            for row in rows
        ]
        checkpoints = Checkpoints(str(self.workdir))
        step = checkpoints.steps()[0]
        checkpoints.close()
        return kept, f"{step}-{hash_of_weights(self.workdir, step)}"


def wait_all(processes: list[subprocess.Popen], timeout_s: float) -> list[int]:
    """Return the exit codes; what still runs after the time is killed, and TimeoutExpired raised."""
    ends_at = time.monotonic() + timeout_s
    try:
        return [process.wait(max(0.1, ends_at - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def hash_of_weights(workdir: Path, step: int) -> str:
    """Return a hash of the weights of a checkpoint, whatever files hold them and whichever devices wrote them."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    folder, reader = workdir / "checkpoints" / str(step) / "params", ocp.PyTreeCheckpointer()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
    )
    found = reader.restore(folder, restore_args=as_numpy)
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()
