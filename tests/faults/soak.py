"""Train with an evaluation and a checkpoint about every two seconds, and print whether memory, open files and step
time stay flat: python -m tests.faults.soak --hours 1
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from gptjax.shell import display

from .training import Training

INTERVAL_STEPS, PAUSE_S, WARM_UP_S = 100, 5.0, 60.0
WORDS = ("the", "king", "and", "queen", "of", "night", "do", "speak", "in", "thee", "my", "lord", "what", "love")


def main() -> int:
    """Print the table; return 1 where the run has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak")
    parser.add_argument("--hours", type=float, default=1.0)
    wish = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gptjax-soak-"))
    try:
        return soak(folder, 3600 * wish.hours)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def soak(folder: Path, seconds: float) -> int:
    """Train and watch; return the exit code."""
    chance, corpus = random.Random(0), folder / "corpus.txt"
    corpus.write_text("\n".join(" ".join(chance.choices(WORDS, k=6)) for _ in range(1200)))
    more = [f"--{key}={INTERVAL_STEPS}" for key in ("train.eval_interval_steps", "checkpoint.save_interval_steps")]
    more += ["--train.total_steps=100000000", f"--train.log_interval_steps={INTERVAL_STEPS}"]
    more += ["--optim.schedule=constant", "--optim.peak_lr=1e-4"]
    training = Training(folder / "run", corpus, folder / "cache", *more)
    with open(folder / "output.txt", "w") as output:
        process = training.start(stdout=output)
        began, memory, files = time.monotonic(), [], []
        while process.poll() is None and time.monotonic() - began < seconds:
            time.sleep(PAUSE_S)
            if time.monotonic() - began > WARM_UP_S:
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory.append(int(status.split("VmRSS:")[1].split()[0]) * 1024)
                files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    if process.returncode != 75:
        print(f"the run ended with {process.returncode}: {errors}")
        return 1
    rows = [json.loads(line) for line in (training.workdir / "metrics.jsonl").read_text().splitlines()]
    times = [row["step_time_s"] for row in rows if "step_time_s" in row]
    print(f"{rows[-1]['step']:,} steps, {len(times):,} evaluations and checkpoints in {display.duration(seconds)}")
    kinds = {
        "resident memory": (memory, display.size),
        "open files": (files, lambda n: f"{n:.1f}"),
        "step time": (times[len(times) // 20 :], display.duration),
    }
    print("\n".join(display.table([row_of(name, *kind) for name, kind in kinds.items()], HEADER)))
    return 0


HEADER = ("median", "first quarter", "last quarter", "change")


def row_of(name: str, values: list[float], show) -> tuple[str, ...]:
    """Return a row of the table: medians of the first and the last quarter of the values."""
    quarter = max(1, len(values) // 4)
    first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
    return name, show(first), show(last), f"{last / first - 1:+.1%}"


if __name__ == "__main__":
    sys.exit(main())
