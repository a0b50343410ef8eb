"""End a run early: a signal stops all processes after the same step; the watchdog ends a process that hangs, or that
has lost another, and prints its stacks.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback

import jax
from jax.experimental import multihost_utils

from gptjax.errors import UserError
from gptjax.shell.console import describe_failure

START_FACTOR = 6  # times the limit of a step, for each phase before the first step has ended
BACKSTOP_S = 15
MAIN_FRAMES, OTHER_FRAMES, MOST_STACKS = 40, 6, 10  # that are printed of a process


class StopSignal:
    """While active, SIGINT and SIGTERM request a stop after the current step; a second signal ends the process.

    Several processes stop after the same step, whichever received the signal: JAX's preemption service handles
    SIGTERM, and the processes agree on a step that none has begun, without a collective in every step.
    """

    def __init__(self):
        self.requested, self.several = False, jax.process_count() > 1

    def __enter__(self) -> "StopSignal":
        numbers = (signal.SIGINT,) if self.several else (signal.SIGINT, signal.SIGTERM)
        self.previous = {s: signal.signal(s, self._note) for s in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Return whether to stop after this step; every process calls it once a step."""
        return multihost_utils.reached_preemption_sync_point(step) if self.several else self.requested

    def _note(self, number, frame) -> None:
        self.requested = True
        signal.signal(number, self.previous[number])
        if self.several:
            signal.raise_signal(signal.SIGTERM)


class Watchdog:
    """While active, a process that makes no progress ends with exit code 1, and says where its threads are.

    That is: no step has ended for `timeout_s` (None: no limit), or no phase of the start for START_FACTOR times as
    long. With several processes it also ends at any error but a UserError, since an orderly exit would wait for the
    others. A thread watches the time; where Python's lock is held, so that no thread runs, faulthandler's timer ends
    the process BACKSTOP_S later.
    """

    def __init__(self, timeout_s: int | None):
        self.timeout_s = timeout_s
        self.timer: tuple[float, float] | None = None  # when it was set, and its limit; both in seconds
        self.closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        _active.append(self)
        if self.timeout_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def start_phase(self) -> None:
        """Restart the timer with START_FACTOR times the limit: what follows reads data, restores or compiles."""
        self._allow(START_FACTOR)

    def step_done(self) -> None:
        """Restart the timer with the limit of a step."""
        self._allow(1)

    def pause(self) -> None:
        """Stop the timer: what follows waits for another process, whose own watchdog ends it if it is stuck."""
        self.timer = None
        faulthandler.cancel_dump_traceback_later()

    def _allow(self, factor: int) -> None:
        if self.timeout_s is None:
            return
        now_s, limit_s = time.monotonic(), factor * self.timeout_s
        often_s = min(1.0, limit_s / 10)  # a timer that is younger need not be set again
        if self.timer is None or self.timer[1] != limit_s or now_s > self.timer[0] + often_s:
            self.timer = (now_s, limit_s)
            faulthandler.dump_traceback_later(limit_s + BACKSTOP_S, exit=True)

    def _watch(self) -> None:
        while not self.closed.wait(0.5):
            timer = self.timer
            if timer is not None and time.monotonic() > sum(timer):
                end_process(
                    1,
                    f"error: no progress for {timer[1]:.0f} s (distributed.stall_timeout_s {self.timeout_s}; "
                    f"{START_FACTOR} times that before the first step has ended); the threads of this process:",
                )

    def __exit__(self, kind, error, trace) -> None:
        self.closed.set()
        _active.remove(self)
        self.pause()
        if error is not None and not isinstance(error, UserError) and jax.process_count() > 1:
            end_process(*describe_failure(error))


_active: list[Watchdog] = []


def note_progress() -> None:
    """Restart the timer of the watchdog, if one is active: a part of a long phase is done."""
    for watchdog in _active:
        watchdog.start_phase()


def end_process(code: int, text: str) -> None:
    """Print a text and where the threads are, and end the process without waiting for anything."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{text}\n{describe_threads()}", file=sys.stderr, flush=True)
    os._exit(code)


def describe_threads() -> str:
    """Return the stack of each thread, the main thread's first; at most about 100 lines, as all processes print it.

    Threads that are at the same place are counted and shown once.
    """
    main, own = threading.main_thread().ident, threading.get_ident()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks: dict[tuple[str, ...], list[str]] = {}
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        if ident == own != main:
            continue
        frames = traceback.extract_stack(frame)[-(MAIN_FRAMES if ident == main else OTHER_FRAMES) :]
        lines = tuple(f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
        stacks.setdefault(lines, []).append(names.get(ident, "unnamed"))
    shown = []
    for lines, of in list(stacks.items())[:MOST_STACKS]:
        shown += [f"{len(of)} threads, such as {of[0]}:" if len(of) > 1 else f"{of[0]}:", *lines]
    left = len(stacks) - MOST_STACKS
    return "\n".join([*shown, *([f"and {left} more threads"] if left > 0 else [])])
