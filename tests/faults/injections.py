"""Faults that a run must survive: each is injected once, the run is started again, and its result is compared."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gptjax.goodput import FILE, read_attempts

from .training import Training

TOTAL_STEPS = 20  # with a checkpoint every 5
STALL_S = 4


class Wrong(Exception):
    """A run did not survive, or ended with other numbers."""


@dataclass
class Trial:
    """One fault in one run.

    Attributes:
        training: a run that has not begun.
        whole: the directory of a run without faults.
        wanted: what that run has left (`Training.outcome`).
        whole_s: how long it took.
    """

    training: Training
    whole: Path
    wanted: tuple
    whole_s: float
    random: random.Random

    def finish(self) -> None:
        """Run to the end and compare; raises Wrong."""
        code, errors = self.training.run()
        if code != 0:
            raise Wrong(f"the resume ended with {code}: {errors.strip()[-300:]}")
        if self.training.outcome() != self.wanted:
            raise Wrong("metrics or weights differ from those of the run without faults")


def kill_in(phase: str, number: int, most_s: float) -> Callable[[Trial], bool]:
    """Return a trial that sends SIGKILL within `most_s` seconds of one of the first `number` starts of a phase."""

    def inject(trial: Trial) -> bool:
        n, after_s = trial.random.randint(1, number), trial.random.uniform(0, most_s)
        code, errors = trial.training.run(kill=f"{phase}:{n}:{after_s:.4f}")
        if code not in (0, -signal.SIGKILL):
            raise Wrong(f"it ended with {code}: {errors.strip()[-300:]}")
        trial.finish()
        return code != 0

    return inject


def stop_by(number: signal.Signals) -> Callable[[Trial], bool]:
    """Return a trial that sends a signal at a random moment. Before the loop it ends the process at once."""

    def inject(trial: Trial) -> bool:
        process = trial.training.start()
        time.sleep(trial.random.uniform(0.3, 1) * trial.whole_s)
        process.send_signal(number)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=120)
        code = process.returncode
        if code not in (0, 75, -number, 128 + number):
            raise Wrong(f"it ended with {code}: {errors.strip()[-300:]}")
        if code == 75 and time.monotonic() - sent > 30:
            raise Wrong("it took more than 30 s to stop")
        trial.finish()
        before, after = read_attempts(trial.training.workdir / FILE)[-2:] if code == 75 else ({"step": 0},) * 2
        if code == 75 and after["from_step"] != before["step"]:
            raise Wrong(f"stopped after step {before['step']}, resumed after {after['from_step']}")
        return code != 0

    return inject


def damage_file(change: Callable[[Path, random.Random], None]) -> Callable[[Trial], bool]:
    """Return a trial that changes one file of the newest checkpoint."""

    def inject(trial: Trial) -> bool:
        shutil.copytree(trial.whole, trial.training.workdir)
        newest = trial.training.workdir / "checkpoints" / str(TOTAL_STEPS)
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        chosen = trial.random.choice(files)
        change(chosen, trial.random)
        try:
            trial.finish()
        except Wrong as error:
            raise Wrong(f"{chosen.relative_to(newest)}: {error}") from None
        return (trial.training.workdir / f"damaged-{TOTAL_STEPS}").exists()

    return inject


def truncate(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(max(1, len(data)))])


def flip_bit(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def limit_files(trial: Trial) -> bool:
    """No file can be longer than a checkpoint's: a write fails in the middle."""
    longest = trial.random.randrange(2_000, 150_000)
    code, errors = trial.training.run(
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest))
    )
    check_message(code, errors)
    trial.finish()
    return code != 0


def fill_disk(trial: Trial) -> bool:
    """The run's directory is a small file system of its own, which is full until it is made larger."""
    folder, kib = trial.training.workdir, trial.random.randrange(100, 700)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], check=True)
    try:
        code, errors = trial.training.run()
        check_message(code, errors)
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        trial.finish()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    return code != 0


def check_message(code: int, errors: str) -> None:
    """Raise Wrong where a process that could not write ends with anything but one or two clear lines."""
    lines = [line for line in errors.splitlines() if not line.startswith(("note:", "warning:"))]
    if code not in (0, 2) or (code == 2 and (len(lines) > 2 or "error: cannot write" not in errors)):
        raise Wrong(f"it ended with {code} and {len(lines)} lines: {errors.strip()[-300:]}")


def stop_worker(trial: Trial) -> bool:
    """A data worker hangs: the watchdog ends the run."""
    more = ("--data.workers=1", f"--distributed.stall_timeout_s={STALL_S}")
    process = trial.training.start(*more)
    stopped: list[int] = []
    while not stopped and process.poll() is None:
        time.sleep(0.05)
        stopped = workers_of(process.pid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        _, errors = process.communicate(timeout=6 * STALL_S + 60)
    finally:
        for pid in stopped:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    if process.returncode not in (0, 1) or (process.returncode == 1 and "no progress for" not in errors):
        raise Wrong(f"it ended with {process.returncode}: {errors.strip()[-300:]}")
    trial.finish()
    return process.returncode != 0


def workers_of(pid: int) -> list[int]:
    """Return the children of a process that prepare data."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def can_mount() -> bool:
    """Return whether this process may mount a file system."""
    folder = Path("/tmp/gptjax-mount-trial")
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    folder.rmdir()
    return mounted.returncode == 0


INJECTIONS: dict[str, Callable[[Trial], bool]] = {
    "SIGKILL while starting (imports, corpus)": kill_in("start", 1, 4.0),
    "SIGKILL while initialising": kill_in("restore", 1, 0.3),
    "SIGKILL while compiling": kill_in("compile", 3, 1.0),
    "SIGKILL at the first step": kill_in("steps", 1, 0.3),
    "SIGKILL between steps": kill_in("steps", 40, 0.02),
    "SIGKILL while waiting for data": kill_in("data", 20, 0.005),
    "SIGKILL during an evaluation": kill_in("evaluate", 5, 0.02),
    "SIGKILL during a save": kill_in("save", 4, 0.3),
    "SIGTERM at a random moment": stop_by(signal.SIGTERM),
    "SIGINT at a random moment": stop_by(signal.SIGINT),
    "a file of the newest checkpoint deleted": damage_file(lambda path, _: path.unlink()),
    "a file of the newest checkpoint truncated": damage_file(truncate),
    "one bit of the newest checkpoint flipped": damage_file(flip_bit),
    "disk full: a limit on the length of files": limit_files,
    "disk full: a small file system": fill_disk,
    "a data worker stopped (SIGSTOP)": stop_worker,
}
