"""Two sides that take turns, and what their times say."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gptjax.errors import UserError


class Side:
    """One side of a comparison, a process that works only when told to; idle, it sleeps.

    Args:
        job: what `gptjax.apps.bench.worker` is to do.
    """

    def __init__(self, job: dict[str, Any]):
        self.name = job["side"]
        command = [sys.executable, "-m", "gptjax.apps.bench.worker", json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()  # it is ready

    def turn(self) -> dict[str, float]:
        """The figures of one turn, its `seconds` among them."""
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that the process writes; raises UserError where it ended instead."""
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the side {self.name} of the comparison ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> int:
        """End the process; its peak memory in bytes."""
        self.process.stdin.close()
        peak = self.answer()["peak_bytes"]
        self.process.wait()
        return peak


def compare(
    ours: dict[str, Any], peer: dict[str, Any] | None, pairs: int, unit: str, per_turn: int
) -> dict[str, Any]:
    """Let both sides work in turn.

    Args:
        ours, peer: jobs; None for no peer.
        pairs: turns of each side that count; one more goes before, uncounted.
        unit: what a turn makes, such as tokens.
        per_turn: how many of them.

    Returns:
        medians by side, in units a second, with peak memory in bytes; and of the pairs, ours / peer: every ratio,
        their median, lowest and highest.
    """
    sides = [Side(job) for job in (ours, peer) if job is not None]
    for side in sides:
        side.turn()
    rates = [[per_turn / side.turn()["seconds"] for side in sides] for _ in range(pairs)]
    found: dict[str, Any] = {"machine": machine(), "job": ours, "unit": f"{unit}/s"}
    for number, side in enumerate(sides):
        found[side.name] = {
            "median": statistics.median(rate[number] for rate in rates),
            "peak_bytes": side.close(),
        }
    if peer is not None:
        ratios = [a / b for a, b in rates]
        spread = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        found["ratio"] = spread | {"all": [round(r, 3) for r in ratios]}
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def machine_line(m: dict[str, Any]) -> str:
    """`machine`, for people."""
    return f"{m['cpu']}, {m['cores']} cores, " + ", ".join(f"{k} {v}" for k, v in m["versions"].items())


def show(title: str, found: dict[str, Any], sides: Sequence[str]) -> str:
    """The result of `compare`, for people."""
    lines = [title, machine_line(found["machine"])]
    for side in sides:
        row = found[side]
        peak = f"peak memory {row['peak_bytes'] / 2**30:.2f} GiB"
        lines.append(f"  {side:12} {row['median']:12,.0f} {found['unit']}   {peak}")
    if "ratio" in found:
        r = found["ratio"]
        lines.append(
            f"  ratio        {r['median']:12.2f}x  ({r['lowest']:.2f} to {r['highest']:.2f} in {len(r['all'])} pairs)"
        )
    return "\n".join(lines)
