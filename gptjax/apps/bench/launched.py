"""Time a whole command, from its start to its first step."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptjax.errors import UserError


def seconds_to_first_step(config: str, cache: str) -> float:
    """Return the seconds that `gptjax train`, in a new directory, takes to its first line of metrics; then stop it.

    Args:
        cache: directory of compiled programs and of tokens; empty for a cold start.

    Raises:
        UserError: the command ended before its first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [sys.executable, "-m", "gptjax", "train", config, "--workdir", str(workdir)]
        command += ["--train.log_interval_steps", "1", "--data.cache_dir", f"{cache}/tokens"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{cache}/xla"}
        began = time.perf_counter()
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                while not _first_step(workdir / "metrics.jsonl"):
                    if process.poll() is not None:
                        log.seek(0)
                        raise UserError(f"{config} ended before its first step: {log.read().strip()[-300:]}")
                    time.sleep(0.02)
                return time.perf_counter() - began
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait()


def _first_step(metrics: Path) -> bool:
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return any(json.loads(line)["step"] >= 1 for line in lines)
