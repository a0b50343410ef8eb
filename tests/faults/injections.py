"""Faults of processes: they are killed, stopped by a signal, or stuck. Each function injects one fault, or a row of
them, into a new run of a `Ground`, finishes the run and compares it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gptjax.lifecycle.goodput import FILE, read_attempts

from .bad_numbers import disturb_batches
from .disks import damage_file, fill_disk, limit_files, truncate_shard
from .training import Training, wait_all
from .trials import Ground, Wrong, timed_out

STALL_S, GRACE_S = 4, 30

# Kills of one run, in this order: in which phase, within the first how many times that it begins, within how many
# seconds.
KILLS = (
    ("preparing the token cache", "prepare", 1, 0.05),
    ("starting", "start", 1, 4.0),
    ("initialising or restoring", "restore", 1, 0.3),
    ("compiling", "compile", 3, 1.0),
    ("the first step", "steps", 1, 0.1),
    ("a save", "save", 3, 0.3),
    ("an evaluation", "evaluate", 3, 0.02),
    ("waiting for data", "data", 14, 0.005),
    ("steps", "steps", 20, 0.02),
    ("the closing sample", "sample", 1, 0.5),
)


def kill_ten_times(ground: Ground, number: int) -> None:
    """Kill a run ten times, each time in another phase. Its token cache and its compiled programs are its own."""
    own = ground.folder / f"own-{number}"
    wanted = ground.whole().wanted
    training = ground.new(cache=own / "tokens", environment={"JAX_COMPILATION_CACHE_DIR": str(own / "xla")})
    for name, phase, times, most_s in KILLS:
        kill = [phase, ground.chance.randint(1, times), ground.chance.uniform(0, most_s)]
        code, errors = ground.run(training, fault={"kill": kill})
        ground.notes.append((f"SIGKILL: {name}", code != 0))
        if code not in (0, -signal.SIGKILL):
            raise Wrong(f"{name}: ended with {code}: {errors.strip()[-300:]}")
    ground.finish(training, wanted)


def stop_by(number: signal.Signals) -> Callable[[Ground, int], None]:
    """Return an injection that sends a signal at a random moment. Before the loop it ends the process at once."""

    def inject(ground: Ground, _: int) -> None:
        whole, training = ground.whole(), ground.new()
        process = training.start()
        time.sleep(ground.chance.uniform(0.3, 1) * whole.seconds)
        process.send_signal(number)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=120)
        code = process.returncode
        ground.notes.append((f"{number.name}, one process", code != 0))
        if code not in (0, 75, -number, 128 + number):
            raise Wrong(f"it ended with {code}: {errors.strip()[-300:]}")
        timed_out(sent, GRACE_S, "the end")
        finish_stopped(ground, training, whole.wanted, code == 75)

    return inject


def stop_one_of_two(ground: Ground, number: int) -> None:
    """Send SIGTERM or SIGINT to one of two processes while they take steps."""
    sign, target = (signal.SIGTERM, signal.SIGINT)[number % 2], ground.chance.randint(0, 1)
    whole, training = ground.whole(hosts=2), ground.new(hosts=2)
    processes = training.start_hosts()
    try:
        training.wait_for_step(ground.chance.randint(1, 50), processes[0])
        time.sleep(ground.chance.uniform(0, 0.1))
        processes[target].send_signal(sign)
        sent = time.monotonic()
        codes = wait_all(processes, 120)
    finally:
        for process in processes:
            process.kill()
    ground.notes.append((f"{sign.name} to one of two processes", any(codes)))
    if codes not in ([75, 75], [0, 0]):
        said = "\n".join(training.errors_of(host).strip()[-300:] for host in (0, 1))
        raise Wrong(f"they ended with {codes}: {said}")
    timed_out(sent, GRACE_S, "the end")
    finish_stopped(ground, training, whole.wanted, any(codes))


def finish_stopped(ground: Ground, training: Training, wanted: tuple, saved: bool) -> None:
    """Finish a run that a signal has stopped; raise Wrong where it takes steps again although all was saved."""
    before = read_attempts(training.workdir / FILE)
    ground.finish(training, wanted)
    if saved:
        resumed = read_attempts(training.workdir / FILE)[len(before)]
        if resumed["from_step"] != before[-1]["step"]:
            raise Wrong(f"stopped after step {before[-1]['step']}, resumed after {resumed['from_step']}")


def stop_worker(ground: Ground, _: int) -> None:
    """A data worker hangs: the watchdog ends the run."""
    wanted, training = ground.whole().wanted, ground.new()
    with training.log_of(0).open("w") as log:  # a stopped worker would keep a pipe open
        process = training.start("--data.workers=1", f"--distributed.stall_timeout_s={STALL_S}", stderr=log)
    training.wait_for_step(ground.chance.randint(1, 30), process)
    stopped = workers_of(process.pid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        process.wait(6 * STALL_S + 60)
    finally:
        process.kill()
        for pid in stopped:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    errors = training.errors_of(0)
    ground.notes.append(("a data worker stopped (SIGSTOP)", process.returncode != 0))
    if process.returncode not in (0, 1) or (process.returncode == 1 and "no progress for" not in errors):
        raise Wrong(f"it ended with {process.returncode}: {errors.strip()[-300:]}")
    timed_out(began, STALL_S + 30, "the end")
    ground.finish(training, wanted)


def kill_worker(ground: Ground, _: int) -> None:
    """A data worker dies: the run ends and names it."""
    wanted, training = ground.whole().wanted, ground.new()
    process = training.start("--data.workers=1", f"--distributed.stall_timeout_s={STALL_S}")
    training.wait_for_step(ground.chance.randint(1, 30), process)
    for pid in workers_of(process.pid):
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=6 * STALL_S + 60)
    ground.notes.append(("a data worker killed", process.returncode != 0))
    if process.returncode and "a process that loads data ended (exit code -9" not in errors:
        raise Wrong(f"it ended with {process.returncode}: {errors.strip()[-300:]}")
    ground.finish(training, wanted)


def workers_of(pid: int) -> list[int]:
    """Return the children of a process that prepare data; none where it has ended."""
    try:
        children = [
            child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
        ]
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []


def stop_process(ground: Ground, number: int) -> None:
    """One of two processes hangs: the other's watchdog ends it, with the stacks of its threads."""
    wanted, training, stuck = ground.whole(hosts=2).wanted, ground.new(hosts=2), number % 2
    processes = training.start_hosts(f"--distributed.stall_timeout_s={STALL_S}")
    try:
        training.wait_for_step(ground.chance.randint(1, 40), processes[0])
        processes[stuck].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code = processes[1 - stuck].wait(STALL_S + 60)
    except subprocess.TimeoutExpired:
        raise Wrong(f"it still waits {STALL_S + 60} s later: {training.errors_of(1 - stuck)[-300:]}") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    errors = training.errors_of(1 - stuck)
    ground.notes.append(("one of two processes stopped (SIGSTOP)", code != 0))
    if code not in (0, 1) or (code == 1 and "no progress for" not in errors):
        raise Wrong(f"it ended with {code}: {errors.strip()[-300:]}")
    timed_out(began, STALL_S + 30, "the end")
    ground.finish(training, wanted)


class Fault(NamedTuple):
    """How a fault is injected.

    Attributes:
        inject: (ground, number of the trial) -> nothing; notes each injection, and raises Wrong.
        trials: how often by default; None: once for each file of a checkpoint.
    """

    inject: Callable[[Ground, int], None]
    trials: int | None


FAULTS = {
    "kill": Fault(kill_ten_times, 10),
    "sigterm": Fault(stop_by(signal.SIGTERM), 10),
    "sigint": Fault(stop_by(signal.SIGINT), 10),
    "signal-two": Fault(stop_one_of_two, 10),
    "deleted": Fault(damage_file("deleted"), None),
    "truncated": Fault(damage_file("truncated"), None),
    "flipped": Fault(damage_file("flipped"), None),
    "limit": Fault(limit_files, 10),
    "disk-save": Fault(fill_disk("save"), 5),
    "disk-log": Fault(fill_disk("log"), 5),
    "disk-cache": Fault(fill_disk("cache"), 5),
    "disk-start": Fault(fill_disk("start"), 5),
    "shard": Fault(truncate_shard, 6),
    "worker-stopped": Fault(stop_worker, 5),
    "worker-killed": Fault(kill_worker, 5),
    "process-stopped": Fault(stop_process, 4),
    "nan-batch": Fault(disturb_batches("nan batch", 1), 3),
    "nan-gradient": Fault(disturb_batches("nan gradient", 1), 3),
    "spike": Fault(disturb_batches("spike", 1), 3),
    "bad-batches": Fault(disturb_batches("nan batch", 20), 3),
}
