"""100 MB, killed at five random moments and once while shards are written."""

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_prepare import WORDS, contents


@pytest.mark.slow
def test_100_mb_killed_five_times_is_the_same_and_takes_little_memory(tmp_path, gpt2_cache):
    """Also with 1, 2 and 4 workers. Memory is that of all processes together."""
    source, rng = tmp_path / "a.jsonl", random.Random(0)
    pieces = [" ".join(WORDS[n : n + 300]) for n in range(0, len(WORDS), 50)]
    with source.open("w") as stream:
        while stream.tell() < 100_000_000:
            stream.write(json.dumps({"text": " ".join(rng.choices(pieces, k=rng.randrange(1, 9)))}) + "\n")

    def start(out: str, workers: int = 2) -> subprocess.Popen:
        command = [sys.executable, "-m", "gptjax", "data", "prepare", str(source), "--out", str(tmp_path / out)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([*command, "--workers", str(workers)], cwd=ROOT, env=env, stderr=subprocess.PIPE)

    straight, began, peak = start("straight"), time.monotonic(), 0
    while straight.poll() is None:
        with contextlib.suppress(OSError):  # one of them has just ended
            children = Path(f"/proc/{straight.pid}/task/{straight.pid}/children").read_text().split()
            pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (straight.pid, *children)]
            peak = max(peak, sum(pages) * resource.getpagesize())
        time.sleep(0.2)
    print(straight.stderr.read().decode(), f"peak {peak / 1e6:.0f} MB")
    duration = time.monotonic() - began
    assert straight.returncode == 0
    assert peak < 1e9
    for _ in range(5):  # together less than the whole takes
        process = start("killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0.05, 0.2) * duration)
        assert process.poll() is None
        process.kill()
        process.wait()
    process = start("killed")
    while not list((tmp_path / "killed").glob("*.new")):  # and once more, while shards are written
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert start("killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    for workers in (1, 4):
        assert start(f"by{workers}", workers).wait() == 0
        assert contents(tmp_path / f"by{workers}") == contents(tmp_path / "straight")
