"""Seconds of a run by what they were spent on, over all its attempts, also those that were killed."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from etils import epath

from gptjax.errors import UserError
from gptjax.hosts import is_writer
from gptjax.metrics import read_records
from gptjax.shell import display
from gptjax.shell.files import write_atomically

FILE = "attempts.jsonl"
STEPS, DATA, LOST, BETWEEN = "steps", "data", "lost", "between"
NAMES = {
    STEPS: "steps",
    DATA: "waiting for data",
    "evaluate": "evaluation",
    "sample": "samples",
    "save": "saving",
    "verify": "verifying devices",
    "compile": "compiling",
    "restore": "restoring or initialising",
    "start": "starting",
    LOST: "steps that were lost",
    BETWEEN: "between attempts",
}
LEAST_PAUSE_S, MOST_PAUSE_S, BUCKET_PAUSE_S = 0.2, 10.0, 30.0  # between two writes of an attempt's seconds
SHARE_OF_AGE = 0.01  # of an attempt's age that may be missing when it is killed


class Clock:
    """Seconds by what they were spent on. Every second since the beginning counts under exactly one name of NAMES.

    Args:
        age_s: seconds since the beginning of what is measured, which count as "start".
    """

    def __init__(self, age_s: float = 0.0):
        self.seconds = {"start": age_s}
        self.names, self.since = ["start"], perf_counter()
        self.lock = threading.Lock()

    def turn_to(self, name: str) -> None:
        """Count what follows, outside of `spend_on`, under a name."""
        self._change(lambda: self.names.__setitem__(0, name))

    @contextmanager
    def spend_on(self, name: str) -> Iterator[None]:
        """Count the seconds of a `with` block under a name; a block inside it counts under its own name only."""
        self._change(lambda: self.names.append(name))
        try:
            yield
        finally:
            self._change(self.names.pop)

    def _change(self, change: Any) -> None:
        with self.lock:
            now = perf_counter()
            name = self.names[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
            self.since = now
            change()

    def read(self) -> dict[str, float]:
        """Return the seconds by name up to now."""
        with self.lock:
            name = self.names[-1]
            return self.seconds | {name: self.seconds.get(name, 0.0) + perf_counter() - self.since}

    def step_seconds(self) -> float:
        """Return the seconds of steps and of waiting for their data."""
        seconds = self.read()
        return seconds.get(STEPS, 0.0) + seconds.get(DATA, 0.0)


_active: list[Clock] = []
_process_is_run = False


def note_process_is_run() -> None:
    """Count the age of this process as part of the run that it starts next: it exists for that run alone."""
    global _process_is_run
    _process_is_run = True


def start_clock() -> Clock:
    """Return the clock of a run that starts now, or with this process."""
    global _process_is_run
    age_s, _process_is_run = process_age_s() if _process_is_run else 0.0, False
    return Clock(age_s)


def process_age_s() -> float:
    """Return the seconds since this process began; 0 where Linux's /proc does not tell."""
    with suppress(OSError, ValueError, IndexError):
        # Field 22 of proc(5): ticks since boot; the second field may contain spaces, and ends with ")".
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return age_s if age_s > 0 else 0.0
    return 0.0


def spend_on(name: str) -> Any:
    """Return a context that counts its seconds under a name in the clock of the run, if there is one."""
    return _active[-1].spend_on(name) if _active else nullcontext()


class Attempt:
    """While active, has the clock of a run and keeps its seconds in attempts.jsonl.

    A thread writes them whenever a hundredth of the attempt's age has passed, so that little is missing of an attempt
    that is killed. Where a write fails, as on a full disk, the next one is tried: no run depends on it.
    """

    def __init__(self, workdir: str):
        self.path, self.clock = epath.Path(workdir) / FILE, start_clock()
        self.least_pause_s = BUCKET_PAUSE_S if "://" in workdir else LEAST_PAUSE_S
        self.earlier: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {"from_step": None, "step": 0, "rolled_back_steps": 0}
        self.closed, self.thread = threading.Event(), threading.Thread(target=self._keep_writing, daemon=True)

    def begin(self) -> None:
        """Start to write; the run's directory exists. One process writes for all."""
        self.row["began"] = time.time() - sum(self.clock.read().values())
        if is_writer():
            self.earlier = read_attempts(self.path)
            self._write()
            self.thread.start()

    def resume(self, step: int) -> None:
        """Note from which step this attempt takes steps."""
        self.row |= {"from_step": step, "step": step}

    def totals(self) -> dict[str, float]:
        """Return the seconds of the run so far by name of NAMES, those of this attempt up to now included."""
        return total_seconds([*self.earlier, self._current()])

    def _current(self) -> dict[str, Any]:
        return self.row | {"seconds": {name: round(s, 3) for name, s in self.clock.read().items()}}

    def _write(self) -> None:
        with suppress(OSError):
            write_atomically(self.path, "".join(f"{json.dumps(row)}\n" for row in [*self.earlier, self._current()]))

    def _keep_writing(self) -> None:
        pause_s = self.least_pause_s
        while not self.closed.wait(pause_s):
            self._write()
            age_s = sum(self.clock.read().values())
            pause_s = max(self.least_pause_s, min(SHARE_OF_AGE * age_s, MOST_PAUSE_S))

    def __enter__(self) -> "Attempt":
        _active.append(self.clock)
        return self

    def __exit__(self, *_) -> None:
        _active.remove(self.clock)
        self.closed.set()
        if self.thread.ident is not None:
            self.thread.join()
            self._write()


def read_attempts(path: str | Path | epath.Path) -> list[dict[str, Any]]:
    """Return the attempts of a run from its attempts.jsonl, the first one first, without lines of another form."""

    def is_attempt(row: dict[str, Any]) -> bool:
        numbers = [row.get("began"), row.get("step"), row.get("rolled_back_steps"), row.get("from_step") or 0]
        seconds = row.get("seconds")
        return isinstance(seconds, dict) and all(map(display.finite, [*numbers, *seconds.values()]))

    return [row for row in read_records(path) if is_attempt(row)]


def total_seconds(attempts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of all attempts by name of NAMES; they add up to the time since the first one began.

    Steps that a later attempt took again, because it resumed from an earlier checkpoint, and steps that a rollback
    gave up count as lost, with the mean seconds of a step of their attempt.
    """
    totals = dict.fromkeys(NAMES, 0.0)
    kept_until, next_began = float("inf"), None
    for row in reversed(attempts):
        for name, seconds in row["seconds"].items():
            totals[name if name in NAMES else "start"] += seconds
        if row["from_step"] is not None:
            taken = row["step"] - row["from_step"]
            kept = max(0, min(row["step"], kept_until) - row["from_step"] - row["rolled_back_steps"])
            lost_s = row["seconds"].get(STEPS, 0.0) * (1 - kept / taken if taken > 0 else 0.0)
            totals[LOST] += lost_s
            totals[STEPS] -= lost_s
            kept_until = min(kept_until, row["from_step"])
        if next_began is not None:
            totals[BETWEEN] += max(0.0, next_began - row["began"] - sum(row["seconds"].values()))
        next_began = row["began"]
    return totals


def share_of_steps(totals: dict[str, float]) -> float:
    """Return the goodput: the share of steps that count in the time in which the run was running."""
    running = sum(totals.values()) - totals[BETWEEN]
    return totals[STEPS] / running if running else 0.0


def table_of(totals: dict[str, float], n_attempts: int) -> list[str]:
    """Return the lines of a table of seconds; names without seconds are left out."""
    running = sum(totals.values()) - totals[BETWEEN]
    rows = [
        (f"  {NAMES[name]}", display.duration(seconds), "" if name == BETWEEN else f"{seconds / running:.1%}")
        for name, seconds in totals.items()
        if seconds >= 0.05
    ]
    attempts = display.plural(n_attempts, "attempt")
    head = f"goodput {share_of_steps(totals):.1%} of {display.duration(running)} in {attempts}"
    return [head, *display.table(rows)]


def read_goodput(workdir: str) -> tuple[dict[str, float], int]:
    """Return the seconds of a run by name, and how many attempts it has had.

    Raises:
        UserError: the directory has no record of them.
    """
    attempts = read_attempts(epath.Path(workdir) / FILE)
    if not attempts:
        raise UserError(f"{workdir} holds no {FILE}; give the directory of a run of this version of gptjax")
    return total_seconds(attempts), len(attempts)
