"""Run two sides in turn, and compare their times."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gptjax.apps.bench.limits import Load
from gptjax.errors import UserError
from gptjax.shell.display import significant, size, table


class Side:
    """One side of a comparison: a process that works on request and sleeps otherwise.

    Args:
        job: the job of the worker (`gptjax.apps.bench.worker`).
        checkout: path of another checkout of this project, whose worker does the job; None for this one.
    """

    def __init__(self, job: dict[str, Any], checkout: str | None = None):
        self.name = job["side"] if checkout is None else checkout
        module, environment = "gptjax.apps.bench.worker", dict(os.environ)
        if checkout is not None:
            if not Path(checkout, "gptjax/apps/bench").is_dir():
                module = "gptjax.bench.worker"  # its place up to commit 7539928
            environment["PYTHONPATH"] = checkout
        command = [sys.executable, "-m", module, json.dumps(job)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
        )
        self.answer()  # waits until it is ready

    def turn(self) -> dict[str, float]:
        """Do one turn and return its figures, `seconds` among them."""
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next line that the process writes; raise UserError if it has ended."""
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the side {self.name} of the comparison ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> int:
        """End the process and return its peak memory in bytes."""
        self.process.stdin.close()
        peak = self.answer()["peak_bytes"]
        self.process.wait()
        return peak


def compare(ours: dict[str, Any], peer: str | None, pairs: int, unit: str, per_turn: int) -> dict[str, Any]:
    """Run both sides in turn and return their rates.

    Args:
        ours: the job of this checkout.
        peer: the other side's name, or the path of another checkout of this project; None for no other side.
        pairs: measured turns of each side, after one that is not measured.
        unit: unit of work, such as "tokens".
        per_turn: units of work in a turn.

    Returns:
        the median rate of each side, in units per second, with its peak memory in bytes; and the ratios of the pairs,
        ours / peer: all of them, their median, lowest and highest.
    """
    load, sides = Load(), [Side(ours)]
    if peer is not None:
        sides.append(Side(ours, checkout=peer) if is_checkout(peer) else Side({**ours, "side": peer}))
    for side in sides:
        side.turn()
    # The sides take turns at going first: the second of a pair finds the cores awake, and was up to 1.3x as fast
    # where both sides were this checkout.
    rates = []
    for number in range(pairs):
        order = sides if number % 2 == 0 else sides[::-1]
        seconds = {side: side.turn()["seconds"] for side in order}
        rates.append([per_turn / seconds[side] for side in sides])
    found: dict[str, Any] = {"machine": machine(), "job": ours, "unit": f"{unit}/s"}
    for number, side in enumerate(sides):
        found[side.name] = {
            "median": statistics.median(rate[number] for rate in rates),
            "peak_bytes": side.close(),
        }
    if peer is not None:
        found["ratio"] = spread_of([a / b for a, b in rates])
    found["warnings"] = load.warnings(found.get("ratio", {}).get("all", ()))
    return found


def spread_of(ratios: Sequence[float]) -> dict[str, Any]:
    """Return the ratios of pairs: all of them, their median, lowest and highest."""
    spread = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return spread | {"all": [round(ratio, 3) for ratio in ratios]}


def choose_fastest(job: dict[str, Any], names: Sequence[str], turns: int = 3) -> tuple[str, dict[str, float | str]]:
    """Run each of several peers alone.

    Returns:
        the fastest; and by name the seconds of the fastest of `turns` turns, or why the peer could not run.

    Raises:
        UserError: none of them could run.
    """
    tried: dict[str, float | str] = {}
    for name in names:
        if "compile" in name and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            tried[name] = "needs a C++ compiler, g++ or clang++"
            continue
        print(f"trying {name}", file=sys.stderr)  # to compile takes a minute
        try:
            side = Side({**job, "side": name})
            side.turn()
            tried[name] = min(side.turn()["seconds"] for _ in range(turns))
            side.close()
        except UserError as error:
            tried[name] = str(error)
    seconds = {name: value for name, value in tried.items() if isinstance(value, float)}
    if not seconds:
        raise UserError(f"none of {', '.join(names)} could run: {next(iter(tried.values()))}")
    return min(seconds, key=seconds.__getitem__), tried


def measure_limits(size: str, rows: int, dtypes: Sequence[str]) -> dict[str, Any]:
    """Return this machine's limits for a model, in a process of their own (`worker.measure_machine`)."""
    side = Side({"work": "machine", "side": "gptjax", "size": size, "rows": rows, "dtypes": list(dtypes)})
    found = side.turn()
    side.close()
    return found


def fastest_products(limits: dict[str, Any], dtype: str) -> tuple[str, float]:
    """Return the backend that computed `measure_limits`' products fastest, and its FLOP/s."""
    rates = {name: rate for name, rate in limits["flops_per_s"][dtype].items() if rate is not None}
    return max(rates.items(), key=lambda item: item[1])


def is_checkout(peer: str) -> bool:
    """Return whether a peer is the path of a checkout of this project."""
    return Path(peer, "gptjax").is_dir()


def machine() -> dict[str, Any]:
    """Return the machine and the package versions of a measurement."""
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
    """Return `machine` as one line of text."""
    return f"{m['cpu']}, {m['cores']} cores, " + ", ".join(f"{k} {v}" for k, v in m["versions"].items())


def show(title: str, found: dict[str, Any], sides: Sequence[str]) -> str:
    """Return the result of `compare` as text."""
    rows = [(side, significant(found[side]["median"]), size(found[side]["peak_bytes"])) for side in sides]
    lines = [title, machine_line(found["machine"])]
    for name, tried in found.get("tried", {}).items():
        lines.append(f"tried {name}: {tried if isinstance(tried, str) else f'{1000 * tried:,.0f} ms a turn'}")
    lines += table(rows, ("", found["unit"], "peak memory"))
    if "ratio" in found:
        r = found["ratio"]
        lines.append(f"ratio {r['median']:.2f}x ({r['lowest']:.2f} to {r['highest']:.2f} in {len(r['all'])} pairs)")
    if "share" in found:
        lines.append(f"{found['share']['of']}: {found['share']['value']:.0%} reached")
    return "\n".join([*lines, *busy(found["warnings"])])


def busy(warnings: Sequence[str]) -> list[str]:
    """Return a line about `Load.warnings`; none where there are none."""
    return (
        [f"warning: the machine was busy ({'; '.join(warnings)}); measure again when it is not"] if warnings else []
    )
