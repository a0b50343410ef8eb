"""Train in processes that are killed or stopped in chosen phases, and compare what is left with an unbroken run."""

import hashlib
import json
import os
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
    """A run in a directory, by as many processes as it takes."""

    def __init__(self, workdir: Path, corpus: Path, cache: Path, *more: str):
        self.workdir, self.running_s, self.starts = workdir, 0.0, 0
        data = [f"--data.path={corpus}", f"--data.cache_dir={cache}", f"--workdir={workdir}"]
        self.arguments = [*ARGUMENTS, *data, *more]

    def start(self, *more: str, kill: str = "", **options: Any) -> subprocess.Popen:
        """Start a process, which kills itself where `kill` says so (worker.py)."""
        environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
        environment |= {"PYTHONPATH": str(ROOT), "GPTJAX_KILL": kill}
        self.starts += 1
        return subprocess.Popen(
            [sys.executable, str(WORKER), *self.arguments, *more],
            cwd=ROOT,
            env=environment,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def run(self, *more: str, kill: str = "", **options: Any) -> tuple[int, str]:
        """Run a process to its end; return its exit code (negative: the signal) and what it printed to stderr."""
        began = time.monotonic()
        process = self.start(*more, kill=kill, **options)
        _, errors = process.communicate(timeout=300)
        self.running_s += time.monotonic() - began
        return process.returncode, errors

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


def hash_of_weights(workdir: Path, step: int) -> str:
    """Return a hash of the weights of a checkpoint, whatever files hold them."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "params")
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()
